# SPDX-License-Identifier: Apache-2.0
"""Two translations side by side, as closed ranges; and the verdict that names the differences.

Both sides are cut at every boundary of either, each piece is judged, and neighbours that differ in the same
way are joined again: a mismatch is maximal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from iokeep.mem.arrays import unique
from iokeep.pt.extents import PROT_TEXT, U8, U64, Extents
from iokeep.pt.tables import ABSENT, ATTRS, CONTIG, LOOP, REASONS, RESERVED

MISSING, EXTRA, PA, PROT = 5, 6, 7, 8
TEXTS = {**REASONS, MISSING: "missing", EXTRA: "extra", PA: "pa", PROT: "prot"}

_MAX = np.uint64(2**64 - 1)
_ONE = np.uint64(1)
_NO_LEVEL = 255


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A maximal range [iova, last] that differs in one way.

    :param expected_pa: pa that ``iova`` must translate to, None = nothing may be there. :param expected_prot:
    likewise.
    :param found_pa: pa it translates to, None = nothing is there (or it cannot be said). :param found_prot:
    likewise.
    :param reason: missing, extra, pa, prot; reserved (a bit that must be zero), attrs (a memory attribute),
        contig (items of a contiguous entry that disagree), loop, absent (table memory is not there), root;
        span (a leaf crosses the edge of an area).
    :param level: level of the item found, None where nothing is. :param text: one line for people.
    :param expected_attrs: memory attributes by name, where they are what differs. :param found_attrs:
        likewise.
    """

    iova: int
    last: int
    expected_pa: int | None
    expected_prot: int | None
    found_pa: int | None
    found_prot: int | None
    reason: str
    level: int | None
    text: str
    expected_attrs: str | None = None
    found_attrs: str | None = None


@dataclass(frozen=True, slots=True)
class LayoutRange:
    """A maximal range that is mapped on both sides by leaves of different size: log2 bytes on either side."""

    iova: int
    last: int
    lg2_a: int
    lg2_b: int


@dataclass(frozen=True, slots=True)
class BbmRange:
    """A range where the switch breaks break-before-make.

    :param kind: "size", "contiguous", or the reason of a mismatch ("pa", "attrs", ...).
    :param lg2_a: log2 of the leaf's bytes before, None for a mismatch. :param lg2_b: likewise after.
    :param level: the lowest level that allows it, None = none does.
    """

    iova: int
    last: int
    kind: str
    lg2_a: int | None
    lg2_b: int | None
    level: int | None


@dataclass(frozen=True, slots=True)
class Bbm:
    """The switch from a to b: ``blocked[level]`` ranges forbid it at a level, the first are in ``ranges``."""

    blocked: tuple[int, int, int] = (0, 0, 0)
    ranges: tuple[list[BbmRange], list[BbmRange], list[BbmRange]] = field(
        default_factory=lambda: ([], [], [])
    )

    def allowed(self, level: int) -> bool:
        """Whether hardware of this level allows the switch."""
        return self.blocked[level] == 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a comparison found.

    :param equal: the translations are equal. :param mismatches: the first differences, in IOVA order.
    :param total: number of differences. :param pages: pages of 4096 bytes that were proved.
    :param differ: reason -> pages of 4096 bytes that differ for it.
    :param table_bytes: bytes of tables that were read to say so.
    :param layout: ranges of different leaf size, the first ones. :param layout_total: number of them.
    :param layout_equal: no such range; None where it was not asked.
    :param bbm: whether a live device may be switched without break-before-make (``bbm``); None = not asked.
    :param attrs_compared: names of the memory attributes that were compared; None = none were, beyond those
        that the format has one value for. :param attrs_not_compared: those that only one side can say.
    """

    equal: bool
    mismatches: list[Mismatch] = field(default_factory=list)
    total: int = 0
    pages: int = 0
    differ: dict[str, int] = field(default_factory=dict)
    table_bytes: int = 0
    layout: list[LayoutRange] = field(default_factory=list)
    layout_total: int = 0
    layout_equal: bool | None = None
    bbm: Bbm | None = None
    attrs_compared: tuple[str, ...] | None = None
    attrs_not_compared: tuple[str, ...] = ()


@dataclass(slots=True)
class Found:
    """One side as found in tables: sorted, disjoint. ``iova``, ``last``, ``pa`` uint64[n]; ``prot``,
    ``level`` uint8[n].
    """

    iova: U64
    last: U64
    pa: U64
    prot: U8
    level: U8

    def __len__(self) -> int:
        return len(self.iova)


@dataclass(slots=True)
class Spans:
    """Closed ranges with a reason and a level, sorted and disjoint; ``number`` tells them apart."""

    iova: U64
    last: U64
    reason: U8
    level: U8
    number: NDArray[np.int64]


@dataclass(slots=True)
class _Ranges:
    """Judged pieces that differ; has_e, has_f: whether a side has something there."""

    iova: U64
    last: U64
    has_e: NDArray[np.bool_]
    e_pa: U64
    e_prot: U8
    has_f: NDArray[np.bool_]
    f_pa: U64
    f_prot: U8
    reason: U8
    level: U8
    number: NDArray[np.int64]

    def columns(self) -> list[NDArray[np.generic]]:
        return [getattr(self, name) for name in self.__slots__]

    def take(self, chosen: NDArray[np.generic] | slice) -> _Ranges:
        return _Ranges(*(c[chosen] for c in self.columns()))  # type: ignore[arg-type]


def find(starts: U64, lasts: U64, points: U64) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """For each point the range that holds it, and whether one does."""
    if not len(starts):
        return np.zeros(len(points), np.intp), np.zeros(len(points), np.bool_)
    at = np.searchsorted(starts, points, side="right") - 1
    inside = at >= 0
    at = np.maximum(at, 0)
    return at, inside & (lasts[at] >= points)


def _at(values: NDArray[np.generic], at: NDArray[np.intp], inside: NDArray[np.bool_]) -> NDArray[np.generic]:
    """Values at positions, zero outside."""
    if not len(values):
        return np.zeros(len(at), values.dtype)
    return np.where(inside, values[at], values.dtype.type(0))


def _judge(
    start: int,
    last: int,
    e: Extents,
    f: Found,
    opaque: Spans,
    attrs: Spans,
    memory: Spans,
    proved: tuple[U64, U64],
) -> _Ranges:
    """All differing pieces within [start, last], but for what lies in the ranges ``proved``."""
    sides = [(s.iova, s.last) for s in (e, f, opaque, attrs, memory)] + [proved]
    cuts = np.concatenate(
        [np.array([start], np.uint64), *(a for a, _ in sides), *(b[b != _MAX] + _ONE for _, b in sides)]
    )
    cuts = unique(cuts)
    cuts = cuts[(cuts >= np.uint64(start)) & (cuts <= np.uint64(last))]
    ends = np.concatenate((cuts[1:] - _ONE, np.array([last], np.uint64)))
    ei, has_e = find(e.iova, e.last, cuts)
    fi, has_f = find(f.iova, f.last, cuts)
    oi, has_o = find(opaque.iova, opaque.last, cuts)
    ai, has_a = find(attrs.iova, attrs.last, cuts)
    e_pa = np.where(has_e, _at(e.pa, ei, has_e) + (cuts - _at(e.iova, ei, has_e)), 0).astype(np.uint64)
    f_pa = np.where(has_f, _at(f.pa, fi, has_f) + (cuts - _at(f.iova, fi, has_f)), 0).astype(np.uint64)
    e_prot = _at(e.prot, ei, has_e).astype(np.uint8)
    f_prot = _at(f.prot, fi, has_f).astype(np.uint8)
    both = has_e & has_f
    reason = np.zeros(len(cuts), np.uint8)
    mi, has_m = find(memory.iova, memory.last, cuts)
    has_m &= both
    reason[has_m] = ATTRS
    reason[has_a] = _at(attrs.reason, ai, has_a)[has_a]
    reason[both & (e_prot != f_prot)] = PROT
    reason[both & (e_pa != f_pa)] = PA
    reason[has_e & ~has_f] = MISSING
    reason[has_f & ~has_e] = EXTRA
    reason = np.where(has_o, _at(opaque.reason, oi, has_o), reason).astype(np.uint8)
    reason[find(*proved, cuts)[1]] = 0
    level = np.where(has_f, _at(f.level, fi, has_f), np.uint8(_NO_LEVEL))
    level = np.where(((reason == ATTRS) | (reason == CONTIG)) & has_a, _at(attrs.level, ai, has_a), level)
    level = np.where(has_o, _at(opaque.level, oi, has_o), level).astype(np.uint8)
    number = np.where(has_o, _at(opaque.number, oi, has_o), -1).astype(np.int64)
    has_m &= (reason == ATTRS) & ~has_a & ~has_o
    number = np.where(has_m, _at(memory.number, mi, has_m), number).astype(np.int64)
    everything = _Ranges(cuts, ends, has_e, e_pa, e_prot, has_f & ~has_o, f_pa, f_prot, reason, level, number)
    return everything.take(reason != 0)


def _merge(r: _Ranges) -> _Ranges:
    """Join neighbours that differ in the same way, both sides going on without a jump."""
    if len(r.iova) < 2:
        return r
    step = r.last[:-1] - r.iova[:-1] + _ONE
    same_e = (r.has_e[1:] == r.has_e[:-1]) & (
        ~r.has_e[1:] | ((r.e_pa[1:] == r.e_pa[:-1] + step) & (r.e_prot[1:] == r.e_prot[:-1]))
    )
    same_f = (r.has_f[1:] == r.has_f[:-1]) & (
        ~r.has_f[1:] | ((r.f_pa[1:] == r.f_pa[:-1] + step) & (r.f_prot[1:] == r.f_prot[:-1]))
    )
    joins = (
        (r.last[:-1] != _MAX)
        & (r.iova[1:] == r.last[:-1] + _ONE)
        & (r.reason[1:] == r.reason[:-1])
        & (r.number[1:] == r.number[:-1])
        # One bad item is one mismatch, whatever was expected below it; so is a run of other attributes.
        & ((r.number[1:] != -1) | (same_e & same_f))
    )
    first = np.flatnonzero(np.concatenate((np.ones(1, np.bool_), ~joins)))
    end = np.concatenate((first[1:] - 1, np.array([len(joins)])))
    out = r.take(first)
    out.last = r.last[end]
    return out


def _total(first: U64, last: U64) -> int:
    """Bytes in closed ranges, as an unbounded int."""
    spans = last - first
    high, low = spans >> np.uint64(32), spans & np.uint64(0xFFFFFFFF)
    return (int(high.sum()) << 32) + int(low.sum()) + len(first)


def clip(start: int, last: int, first: U64, end: U64) -> tuple[slice, U64, U64, U64]:
    """The part of sorted, disjoint closed ranges within [start, last]: slice, first, end, and how far each
    first moved.
    """
    a, b = np.uint64(start), np.uint64(last)
    part = slice(int(np.searchsorted(end, a, side="left")), int(np.searchsorted(first, b, side="right")))
    new = np.maximum(first[part], a)
    return part, new, np.minimum(end[part], b), new - first[part]


def clip_extents(e: Extents, start: int, last: int) -> Extents:
    """The part of ``e`` within [start, last]."""
    part, first, end, moved = clip(start, last, e.iova, e.last)
    return Extents(first, end, e.pa[part] + moved, e.prot[part])


class Comparison:
    """Collects differences window by window, in IOVA order: only the first ``limit`` stay in memory.

    :param limit: differences that are kept; all are counted.
    :param memory: ranges of different memory attributes, with numbers below -1. :param texts: number of
        such a range -> attributes expected and found.
    """

    def __init__(
        self,
        limit: int,
        memory: Spans | None = None,
        texts: Callable[[int], tuple[str, str]] | None = None,
    ) -> None:
        self.limit = limit
        z64, z8 = np.zeros(0, np.uint64), np.zeros(0, np.uint8)
        self.memory = memory or Spans(z64, z64, z8, z8, np.zeros(0, np.int64))
        self.texts = texts
        self.total = 0
        #: bytes that were expected and did not hold
        self.failed_bytes = 0
        #: reason -> bytes of the differences
        self.bytes_of: dict[int, int] = {}
        self._kept: list[_Ranges] = []
        self._kept_count = 0
        self._tail: _Ranges | None = None

    def window(
        self,
        start: int,
        last: int,
        e: Extents,
        f: Found,
        opaque: Spans,
        attrs: Spans,
        proved: tuple[U64, U64] | None = None,
    ) -> None:
        """Compare within [start, last]; the arguments may reach beyond.

        :param proved: sorted, disjoint closed ranges that are known to be equal.
        """
        e = clip_extents(e, start, last)
        part, first, end, moved = clip(start, last, f.iova, f.last)
        f = Found(first, end, f.pa[part] + moved, f.prot[part], f.level[part])
        spans = []
        for s in (opaque, attrs, self.memory):
            part, first, end, _ = clip(start, last, s.iova, s.last)
            spans.append(Spans(first, end, s.reason[part], s.level[part], s.number[part]))
        known = (np.zeros(0, np.uint64), np.zeros(0, np.uint64))
        if proved is not None:
            known = clip(start, last, *proved)[1:3]
        ranges = _judge(start, last, e, f, spans[0], spans[1], spans[2], known)
        failed = ranges.has_e
        self.failed_bytes += _total(ranges.iova[failed], ranges.last[failed])
        if self._tail is not None:
            columns = zip(self._tail.columns(), ranges.columns(), strict=True)
            ranges = _Ranges(*(np.concatenate(pair) for pair in columns))
        if not len(ranges.iova):
            return
        merged = _merge(ranges)
        self._keep(merged.take(slice(0, -1)))
        self._tail = merged.take(slice(-1, None))

    def _keep(self, ranges: _Ranges) -> None:
        self.total += len(ranges.iova)
        for reason in np.unique(ranges.reason).tolist():
            chosen = ranges.reason == reason
            size = _total(ranges.iova[chosen], ranges.last[chosen])
            self.bytes_of[reason] = self.bytes_of.get(reason, 0) + size
        if self._kept_count < self.limit and len(ranges.iova):
            kept = ranges.take(slice(0, self.limit - self._kept_count))
            self._kept.append(kept)
            self._kept_count += len(kept.iova)

    def mismatches(self) -> list[Mismatch]:
        """The first ``limit`` differences; to be called once, at the end."""
        if self._tail is not None:
            self._keep(self._tail)
            self._tail = None
        out = []
        for r in self._kept:
            for i in range(len(r.iova)):
                number = int(r.number[i])
                out.append(_mismatch(r, i, self.texts(number) if self.texts and number < -1 else None))
        return out

    def differ(self) -> dict[str, int]:
        """Reason -> pages of 4096 bytes (at least 1) that differ for it; after :meth:`mismatches`."""
        return {TEXTS[reason]: max(size >> 12, 1) for reason, size in sorted(self.bytes_of.items())}


def _mismatch(r: _Ranges, i: int, attrs: tuple[str, str] | None) -> Mismatch:
    e_pa, e_prot = (int(r.e_pa[i]), int(r.e_prot[i])) if r.has_e[i] else (None, None)
    f_pa, f_prot = (int(r.f_pa[i]), int(r.f_prot[i])) if r.has_f[i] else (None, None)
    level = None if r.level[i] == _NO_LEVEL else int(r.level[i])
    reason = int(r.reason[i])
    expected = "nothing" if e_pa is None or e_prot is None else f"pa {e_pa:#x} {PROT_TEXT[e_prot]}"
    found = "nothing" if f_pa is None or f_prot is None else f"pa {f_pa:#x} {PROT_TEXT[f_prot]}"
    where = f"iova {int(r.iova[i]):#x}-{int(r.last[i]):#x}"
    what = {
        RESERVED: f"a reserved bit is set in an item of level {level}",
        LOOP: f"the table that an item of level {level} points to serves at a higher level too",
        ABSENT: f"the table that an item of level {level} points to is not in the memory",
        ATTRS: f"memory attributes differ in an item of level {level}",
        CONTIG: f"the items of a contiguous entry of level {level} do not agree",
    }.get(reason, f"expected {expected}, found {found}")
    if attrs is not None:
        what += f": expected {attrs[0]}, found {attrs[1]}"
    return Mismatch(
        int(r.iova[i]), int(r.last[i]), e_pa, e_prot, f_pa, f_prot, TEXTS[reason], level,
        f"{where}: {TEXTS[reason]}: {what}", *(attrs or (None, None)),
    )  # fmt: skip
