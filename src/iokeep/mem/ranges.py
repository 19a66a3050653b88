# SPDX-License-Identifier: Apache-2.0
"""Closed ranges ``[start, last]`` of 64-bit values, as in the uAPI: the whole space has no u64 length."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Range(NamedTuple):
    """A closed range; ``start <= last``, both in [0, 2**64 - 1]."""

    start: int
    last: int

    @property
    def size(self) -> int:
        """Number of addresses in the range, 1 ... 2**64."""
        return self.last - self.start + 1

    def overlaps(self, other: Range) -> bool:
        """True where any address is in both."""
        return self.start <= other.last and other.start <= self.last

    def contains(self, other: Range) -> bool:
        """True where all of ``other`` is in this range."""
        return self.start <= other.start and other.last <= self.last


def merge(ranges: list[Range]) -> list[Range]:
    """Sorted, disjoint, maximal ranges that cover the same addresses; touching ones are joined."""
    out: list[Range] = []
    for r in sorted(ranges):
        if out and r.start <= out[-1].last + 1:
            out[-1] = Range(out[-1].start, max(out[-1].last, r.last))
        else:
            out.append(r)
    return out


def subtract(ranges: list[Range], holes: list[Range]) -> list[Range]:
    """What of ``ranges`` (disjoint, sorted) is in none of ``holes``."""
    out = []
    for r in ranges:
        start = r.start
        for h in merge([h for h in holes if h.overlaps(r)]):
            if h.start > start:
                out.append(Range(start, h.start - 1))
            start = h.last + 1
        if start <= r.last:
            out.append(Range(start, r.last))
    return out


class RangeSet:
    """Values as closed ranges: sorted, disjoint, maximal. Empty when made, and then O(1).

    Every method costs O(log n) and what it touches; :meth:`add` and :meth:`discard` move list tails as well.
    """

    __slots__ = ("_lasts", "_starts")

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._lasts: list[int] = []
        for start, last in ranges:
            self.add(start, last)

    def __bool__(self) -> bool:
        return bool(self._starts)

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Range]:
        return (Range(a, b) for a, b in zip(self._starts, self._lasts, strict=True))

    @property
    def size(self) -> int:
        """How many values there are."""
        return sum(self._lasts) - sum(self._starts) + len(self._starts)

    def add(self, start: int, last: int) -> None:
        """All of [start, last]; touching ranges are joined."""
        a, b = bisect_left(self._lasts, start - 1), bisect_right(self._starts, last + 1)
        if a < b:
            start, last = min(start, self._starts[a]), max(last, self._lasts[b - 1])
        self._starts[a:b], self._lasts[a:b] = [start], [last]

    def discard(self, start: int, last: int) -> None:
        """Nothing of [start, last] any more."""
        a, b = self._touching(start, last)
        if a == b:
            return
        first, end = self._starts[a], self._lasts[b - 1]
        starts, lasts = [], []
        if first < start:
            starts.append(first)
            lasts.append(start - 1)
        if last < end:
            starts.append(last + 1)
            lasts.append(end)
        self._starts[a:b], self._lasts[a:b] = starts, lasts

    def within(self, start: int, last: int) -> list[Range]:
        """What of [start, last] is in the set."""
        a, b = self._touching(start, last)
        return [Range(max(start, self._starts[i]), min(last, self._lasts[i])) for i in range(a, b)]

    def outside(self, start: int, last: int) -> list[Range]:
        """What of [start, last] is not."""
        out = []
        for r in self.within(start, last):
            if start < r.start:
                out.append(Range(start, r.start - 1))
            start = r.last + 1
        if start <= last:
            out.append(Range(start, last))
        return out

    def first_outside(self, start: int = 0) -> Range | None:
        """The first whole gap of 64-bit values at or after ``start``; None where all are in the set."""
        at = bisect_left(self._lasts, start)
        if at < len(self._starts) and self._starts[at] <= start:
            start = self._lasts[at] + 1
            at += 1
        if start >= 1 << 64:
            return None
        return Range(start, self._starts[at] - 1 if at < len(self._starts) else 2**64 - 1)

    def touches(self, start: int, last: int) -> bool:
        """Whether any of [start, last] is in the set."""
        a, b = self._touching(start, last)
        return a < b

    def _touching(self, start: int, last: int) -> tuple[int, int]:
        return bisect_left(self._lasts, start), bisect_right(self._starts, last)
