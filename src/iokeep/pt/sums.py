# SPDX-License-Identifier: Apache-2.0
"""The sums of ``digest`` over tables of level 0, compiled; imported only for big tables.

A table whose items differ in nothing but the OA (and bits that do not matter) needs only the sums of its
frame numbers: what its first item says of permissions holds for all. So does one with holes. Any other is
left to the general code.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from iokeep.mem.memory import I64, U64
from iokeep.pt.digest import Digest
from iokeep.pt.formats.base import LevelSpec
from iokeep.pt.kernels import compiled, in_memory_order, over_threads
from iokeep.pt.tables import TableMemory, Upper, leaves_of

_ZERO = np.uint64(0)
_ONE = np.uint64(1)
_FOLD = np.uint64(20)
_LOW = np.uint64((1 << 20) - 1)


@compiled
def _alike(
    items: U64, row: I64, k: U64, m: U64, masks: U64, head: U64, odd: U64, x: U64, y: U64
) -> None:  # fmt: skip
    """Sums of the frame numbers of whole tables: ``x`` by k, ``y`` folded by m; ``head`` is the first item,
    and ``odd`` the bits that matter in which another differs.
    """
    pa_mask, down, same = masks[0], masks[1], masks[2]
    size = np.uint64(items.shape[1])
    for t in range(len(row)):
        table = items[row[t]]
        first = table[_ZERO]
        sum_x, sum_y, differ = _ZERO, _ZERO, _ZERO
        for i in range(size):
            item = table[i]
            n = (item & pa_mask) >> down
            differ |= item ^ first
            sum_x += k[i] * n
            sum_y += m[i] * (((n & _LOW) << _FOLD) + (n >> _FOLD))
        head[t] = first
        odd[t] = differ & same
        x[t] = sum_x
        y[t] = sum_y


@compiled
def _holed(
    items: U64, row: I64, k: U64, m: U64, masks: U64, head: U64, odd: U64, x: U64, y: U64, kx: U64, ly: U64,
    pages: U64,
) -> None:  # fmt: skip
    """As :func:`_alike` for tables with absent items: ``head`` is the first that is there; ``kx``, ``ly`` the
    sums of k and m over those that are there, ``pages`` their number.
    """
    pa_mask, down, same, valid = masks[0], masks[1], masks[2], masks[3]
    size = np.uint64(items.shape[1])
    for t in range(len(row)):
        table = items[row[t]]
        first = _ZERO
        for i in range(size):
            if table[i] & valid != _ZERO:
                first = table[i]
                break
        sum_x, sum_y, sum_k, sum_l, number, differ = _ZERO, _ZERO, _ZERO, _ZERO, _ZERO, _ZERO
        for i in range(size):
            item = table[i]
            there = _ONE if item & valid != _ZERO else _ZERO
            n = ((item & pa_mask) >> down) * there
            differ |= (item ^ first) * there
            sum_x += k[i] * n
            sum_y += m[i] * (((n & _LOW) << _FOLD) + (n >> _FOLD))
            sum_k += k[i] * there
            sum_l += m[i] * there
            number += there
        head[t] = first
        odd[t] = differ & same
        x[t] = sum_x
        y[t] = sum_y
        kx[t] = sum_k
        ly[t] = sum_l
        pages[t] = number


def _masks(spec: LevelSpec) -> U64:
    same = ~(spec.leaf_pa_mask | spec.leaf_ignored)
    for contig in spec.contig:
        same |= contig.mask
        if not contig.replicated:
            same &= ~contig.mask
    same |= spec.w_mask | spec.r_mask
    return np.array([spec.leaf_pa_mask, 12 - spec.pa_shift, same & (2**64 - 1), spec.valid_mask], np.uint64)


def _grants(
    tm: TableMemory, head: U64, above: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """What each item grants, 0 = it does not translate; and which are part of a replicated entry, whose OA is
    not theirs alone.
    """
    spec = tm.fmt.levels[0]
    if len(head) > 1:
        same = _masks(spec)[2] & ~np.uint64(spec.leaf_pa_mask)
        first = head[0] & same
        known = all(mask & ~int(same) == 0 for mask, _ in spec.leaf_bad)
        if known and bool(((head & same) == first).all()) and bool((above == above[0]).all()):
            # What decides is the same in all, as in most tables.
            grant, code = _grants(tm, head[:1], above[:1])
            return np.repeat(grant, len(head)), np.repeat(code, len(head))
    grants = np.zeros(len(head), np.uint8)
    here = tm.places(0, head)
    items = head[here]
    # Of an item by itself: contiguity that is only a hint says nothing.
    for contig in spec.contig:
        if not contig.replicated:
            mine = (items & np.uint64(contig.mask)) == np.uint64(contig.value)
            items = np.where(mine, items & np.uint64(~contig.mask & (2**64 - 1)), items).astype(np.uint64)
    coded = np.zeros(len(head), np.bool_)
    for contig in spec.contig:
        if contig.replicated:
            coded[here] |= (items & np.uint64(contig.mask)) == np.uint64(contig.value)
    if spec.contig_select is not None:
        mask, value = spec.contig_select
        coded[here] |= (items & np.uint64(mask)) == np.uint64(value)
    plain = here[~coded[here]]
    number = np.arange(len(head), dtype=np.uint64)
    leaves, _ = leaves_of(tm, 0, number[plain], items[~coded[here]], number[plain], above[plain])
    grants[leaves.iova.view(np.int64)] = leaves.prot
    return grants, coded


def add_tables(out: Digest, tm: TableMemory, upper: Upper, which: I64, threads: int | None) -> I64:
    """Count the tables of level 0 at ``which`` positions; those of them that are left to be counted."""
    items = tm.rows.data.view(np.uint64)
    k, m = (np.ascontiguousarray(lane.page) for lane in out.lanes)
    masks = _masks(tm.fmt.levels[0])
    base = tm.fmt.extend(upper.base)
    place, rows = in_memory_order(upper.row, which)
    head, odd, x, y = (np.empty(len(rows), np.uint64) for _ in range(4))

    def work(a: int, b: int) -> None:
        _alike(items, rows[a:b], k, m, masks, head[a:b], odd[a:b], x[a:b], y[a:b])

    over_threads(work, len(rows), tm.fmt.table_bytes, threads)
    grants, coded = _grants(tm, head, upper.prot[place])
    whole = (odd == 0) & ~coded
    good = whole & (grants != 0)
    if not good.all():
        place_, x_, y_, prot = place[good], x[good], y[good], grants[good].astype(np.uint64)
    else:
        place_, x_, y_, prot = place, x, y, grants.astype(np.uint64)
    four = np.uint64(4)
    sums = [np.add.reduce(lane.page, dtype=np.uint64) for lane in out.lanes]
    out.add_tables(base[place_], four * x_ + prot * sums[0], four * y_ + prot * sums[1], len(place_) * 512)
    rest = np.flatnonzero(~whole)
    if not len(rest):
        return place[:0]
    rows, place = rows[rest], place[rest]
    head, odd, x, y, kx, ly, pages = (np.empty(len(rows), np.uint64) for _ in range(7))
    _holed(items, rows, k, m, masks, head, odd, x, y, kx, ly, pages)
    grants, coded = _grants(tm, head, upper.prot[place])
    whole = (odd == 0) & ~coded
    good = whole & (grants != 0)
    prot = grants.astype(np.uint64)
    x, y = (four * x + prot * kx)[good], (four * y + prot * ly)[good]
    out.add_tables(base[place[good]], x, y, int(pages[good].sum()))
    return np.sort(place[~whole])
