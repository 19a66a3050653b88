# SPDX-License-Identifier: Apache-2.0
"""Closed ranges ``[start, last]`` of 64-bit values, as in the uAPI: the whole space has no u64 length."""

from __future__ import annotations

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
