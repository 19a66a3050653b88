# SPDX-License-Identifier: Apache-2.0
"""How a mapping is cut into leaves, apart from what it translates.

It matters for a hitless switch: hardware without break-before-make level 2 must not see the same IOVA with
two leaf sizes (Arm Architecture Reference Manual, D8.16 "TLB maintenance"; VT-d 6.2.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from iokeep.mem.arrays import unique
from iokeep.mem.memory import Memory
from iokeep.pt.compare import LayoutRange, clip
from iokeep.pt.extents import U8, U64, Extents
from iokeep.pt.formats.base import Format
from iokeep.pt.leaves import Leaves
from iokeep.pt.segments import choose_leaves
from iokeep.pt.tables import TableMemory, descend, expand, raise_unreadable

_ONE = np.uint64(1)
_MAX = np.uint64(2**64 - 1)
_WINDOW = 1 << 18


@dataclass(frozen=True, slots=True)
class Layout:
    """Maximal runs of leaves of one size: ``iova``, ``last`` uint64[n] closed, ``lg2`` uint8[n]; sorted,
    disjoint.
    """

    iova: U64
    last: U64
    lg2: U8

    def __len__(self) -> int:
        return len(self.iova)

    @classmethod
    def of(cls, iova: U64, last: U64, lg2: U8) -> Layout:
        """Runs from sorted, disjoint pieces."""
        if len(iova) < 2:
            return cls(iova, last, lg2)
        joins = (iova[1:] == last[:-1] + _ONE) & (lg2[1:] == lg2[:-1]) & (last[:-1] != _MAX)
        first = np.flatnonzero(np.concatenate((np.ones(1, np.bool_), ~joins)))
        end = np.concatenate((first[1:] - 1, np.array([len(joins)])))
        return cls(iova[first], last[end], lg2[first])

    @classmethod
    def join(cls, parts: list[Layout]) -> Layout:
        """One layout from disjoint parts in any order."""
        if not parts:
            return cls(np.zeros(0, np.uint64), np.zeros(0, np.uint64), np.zeros(0, np.uint8))
        iova, last = (np.concatenate([getattr(p, c) for p in parts]) for c in ("iova", "last"))
        lg2 = np.concatenate([p.lg2 for p in parts])
        order = np.argsort(iova, kind="stable")
        return cls.of(iova[order], last[order], lg2[order])


def table_layout(fmt: Format, mem: Memory, root_pa: int) -> Layout:
    """The layout of a table. :raises MemoryAbsent, InputError: a table is absent or in a loop."""
    tm = TableMemory(fmt, mem)
    upper = descend(tm, root_pa)
    raise_unreadable(fmt, upper.problems)
    parts = []
    if len(upper.leaves):
        large = Leaves.of(fmt, upper.leaves)
        parts.append(Layout.of(large.iova, large.last, large.lg2))
    for items, _ in expand(tm, upper.base, upper.pa, upper.row, upper.prot):
        small = Leaves.of(fmt, items)
        parts.append(Layout.of(small.iova, small.last, small.lg2))
    return Layout.join(parts)


def kernel_layout(fmt: Format, areas: Extents, max_lg2: int | None = None) -> Layout:
    """The layout that Linux gives these areas when each is mapped by one call.

    :param areas: extents as they are mapped; joining them first may change the answer.
    :param max_lg2: no leaf is larger than 2**max_lg2 bytes.
    """
    raw = areas.iova & np.uint64((1 << fmt.input_lg2) - 1)
    parts = []
    for run in choose_leaves(fmt, raw, areas.last - areas.iova + _ONE, areas.pa, areas.prot, max_lg2):
        shift = np.uint64(fmt.levels[run.level].shift)
        iova = fmt.extend(run.iova)
        last = iova + ((run.count.astype(np.uint64) << shift) - _ONE)
        parts.append(Layout.of(iova, last, np.full(len(iova), run.lg2, np.uint8)))
    return Layout.join(parts)


def compare_layouts(a: Layout, b: Layout, limit: int) -> tuple[list[LayoutRange], int]:
    """Ranges that both sides map by leaves of different size: the first ``limit``, and their number."""
    kept: list[LayoutRange] = []
    total = 0
    before: tuple[int, int, int] | None = None
    bounds = [0, *a.iova[_WINDOW::_WINDOW].tolist(), 1 << 64]
    for start, after in pairwise(bounds):
        pa, a_first, a_last, _ = clip(start, after - 1, a.iova, a.last)
        pb, b_first, b_last, _ = clip(start, after - 1, b.iova, b.last)
        if not len(a_first) or not len(b_first):
            continue
        cuts = unique(a_first, b_first)
        ia = np.searchsorted(a_first, cuts, side="right") - 1
        ib = np.searchsorted(b_first, cuts, side="right") - 1
        some = (ia >= 0) & (ib >= 0)
        cuts, ia, ib = cuts[some], ia[some], ib[some]
        last = np.minimum(a_last[ia], b_last[ib])
        lg2_a, lg2_b = a.lg2[pa][ia], b.lg2[pb][ib]
        differ = (last >= cuts) & (lg2_a != lg2_b)
        cuts, last, lg2_a, lg2_b = cuts[differ], last[differ], lg2_a[differ], lg2_b[differ]
        if not len(cuts):
            continue
        joins = (cuts[1:] == last[:-1] + _ONE) & (lg2_a[1:] == lg2_a[:-1]) & (lg2_b[1:] == lg2_b[:-1])
        first = np.flatnonzero(np.concatenate((np.ones(1, np.bool_), ~joins)))
        end = np.concatenate((first[1:] - 1, np.array([len(joins)])))
        # A range that a window's edge cut is one range.
        edge = (int(cuts[0]), int(lg2_a[0]), int(lg2_b[0]))
        joined = before == edge
        total += len(first) - int(joined)
        if joined and kept and total <= limit:
            kept[-1] = LayoutRange(kept[-1].iova, int(last[end[0]]), *edge[1:])
        for f, e in zip(first[int(joined) :].tolist(), end[int(joined) :].tolist(), strict=True):
            if len(kept) >= limit:
                break
            kept.append(LayoutRange(int(cuts[f]), int(last[e]), int(lg2_a[f]), int(lg2_b[f])))
        before = (int(last[-1]) + 1, int(lg2_a[-1]), int(lg2_b[-1]))
    return kept, total
