# SPDX-License-Identifier: Apache-2.0
"""The sums of ``digest`` over tables of level 0: by compiled loops (``sum_kernels``), or by NumPy a few
tables at a time.

A table whose items differ in nothing but the OA (and bits that do not matter) needs only the sums of its
frame numbers: what its first item says of permissions holds for all. So does one with holes. Any other is
left to the general code.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from iokeep.mem.memory import I64, U8, U64
from iokeep.pt.digest import Digest, fold
from iokeep.pt.formats.base import LevelSpec
from iokeep.pt.memo import Memo
from iokeep.pt.tables import TableMemory, Upper, leaves_of

#: so many tables are read at once by NumPy: they stay in the second cache with what is made of them
_FEW = 64
#: what an item grants and whether its OA is not its own: by item and what is granted above
_KNOWN: Memo[tuple[int, bool]] = Memo(1024)


def _masks(spec: LevelSpec) -> U64:
    same = ~(spec.leaf_pa_mask | spec.leaf_ignored)
    for contig in spec.contig:
        same |= contig.mask
        if not contig.replicated:
            same &= ~contig.mask
    same |= spec.w_mask | spec.r_mask
    return np.array([spec.leaf_pa_mask, 12 - spec.pa_shift, same & (2**64 - 1), spec.valid_mask], np.uint64)


def _grants(tm: TableMemory, head: U64, above: U8) -> tuple[U8, NDArray[np.bool_]]:
    """What each item grants, 0 = it does not translate; and which are part of a replicated entry, whose OA is
    not theirs alone.
    """
    spec = tm.fmt.levels[0]
    same = int(_masks(spec)[2]) & ~spec.leaf_pa_mask
    if len(head) and all(mask & ~same == 0 for mask, _ in spec.leaf_bad):
        key = head & np.uint64(same)
        if bool((key == key[0]).all()) and bool((above == above[0]).all()):
            # What decides is the same in all, as in most tables.
            place = int(key[0]), int(above[0])
            one, coded = _KNOWN.get(tm.fmt, place, lambda: _alone(tm, key[:1], above[:1]))
            return np.full(len(head), one, np.uint8), np.full(len(head), coded)
    return _each(tm, head, above)


def _alone(tm: TableMemory, head: U64, above: U8) -> tuple[int, bool]:
    """:func:`_grants` of one item."""
    grant, coded = _each(tm, head, above)
    return int(grant[0]), bool(coded[0])


def _each(tm: TableMemory, head: U64, above: U8) -> tuple[U8, NDArray[np.bool_]]:
    """:func:`_grants` of any items."""
    spec = tm.fmt.levels[0]
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


def add_tables(
    out: Digest,
    tm: TableMemory,
    upper: Upper,
    which: I64,
    threads: int | None = None,
    *,
    compiled: bool = True,
) -> I64:
    """Count the tables of level 0 at ``which`` positions; those of them that are left to be counted.

    :param compiled: by Numba; else by NumPy, without those that have holes. :param threads: of the former.
    """
    if not compiled:
        return _add_plain(out, tm, upper, which)
    from iokeep.pt.kernels import in_memory_order, over_threads
    from iokeep.pt.sum_kernels import sum_alike, sum_holed

    items = tm.rows.data.view(np.uint64)
    k, m = (np.ascontiguousarray(lane.page) for lane in out.lanes)
    masks = _masks(tm.fmt.levels[0])
    base = tm.fmt.extend(upper.base)
    place, rows = in_memory_order(upper.row, which)
    head, odd, x, y = (np.empty(len(rows), np.uint64) for _ in range(4))

    def work(a: int, b: int) -> None:
        sum_alike(items, rows[a:b], k, m, masks, head[a:b], odd[a:b], x[a:b], y[a:b])

    over_threads(work, len(rows), tm.fmt.table_bytes, threads)
    grants, coded = _grants(tm, head, upper.prot[place])
    whole = (odd == 0) & ~coded
    # One that grants nothing adds nothing; its frames do not count.
    good = whole & (grants != 0)
    keys = [lane.page.sum(keepdims=True, dtype=np.uint64) for lane in out.lanes]
    _add(out, base[place], x, y, keys, grants, good)
    out.change(0, 0, int(np.count_nonzero(good)) * tm.fmt.levels[0].items)
    rest = np.flatnonzero(~whole)
    if not len(rest):
        return place[:0]
    rows, place = rows[rest], place[rest]
    head, odd, x, y, kx, ly, pages = (np.empty(len(rows), np.uint64) for _ in range(7))
    sum_holed(items, rows, k, m, masks, head, odd, x, y, kx, ly, pages)
    grants, coded = _grants(tm, head, upper.prot[place])
    whole = (odd == 0) & ~coded
    good = whole & (grants != 0)
    _add(out, base[place], x, y, [kx, ly], grants, good)
    out.change(0, 0, int(pages[good].sum()))
    return np.sort(place[~whole])


def _add(
    out: Digest, base: U64, x: U64, y: U64, keys: list[U64], grants: U8, good: NDArray[np.bool_]
) -> None:
    """Add the sums of the tables that are ``good``.

    :param keys: of each lane, as for ``weigh``: one, or as many as tables.
    """
    from iokeep.pt.sum_kernels import weigh

    if not good.all():
        base, x, y, grants = base[good], x[good], y[good], grants[good]
        keys = [some[good] if len(some) == len(good) else some for some in keys]
    block = base >> np.uint64(21)
    sums = [
        int(weigh(block, frames, grants, some, lane.table, lane.salt))
        for frames, some, lane in zip((x, y), keys, out.lanes, strict=True)
    ]
    out.change(sums[0], sums[1], 0)


def _add_plain(out: Digest, tm: TableMemory, upper: Upper, which: I64) -> I64:
    """:func:`add_tables` by NumPy, of tables without holes."""
    pa_mask, down, same, _ = _masks(tm.fmt.levels[0])
    base = tm.fmt.extend(upper.base)
    left = []
    for lo in range(0, len(which), _FEW):
        at = which[lo : lo + _FEW]
        items = tm.items(upper.row[at])
        grants, coded = _grants(tm, np.ascontiguousarray(items[:, 0]), upper.prot[at])
        odd = np.bitwise_or.reduce((items ^ items[:, :1]) & same, axis=1)
        whole = (odd == 0) & ~coded
        good = whole & (grants != 0)
        if not whole.all():
            left.append(at[~whole])
        if not good.all():
            items, grants, at = items[good], grants[good], at[good]
        n = (items & pa_mask) >> down
        sums = []
        for words, lane in ((n << np.uint64(2), out.lanes[0]), (fold(n) << np.uint64(2), out.lanes[1])):
            key = np.add.reduce(lane.page, dtype=np.uint64)
            sums.append(words @ lane.page + grants.astype(np.uint64) * key)
        out.add_tables(base[at], sums[0], sums[1], items.size)
    return np.concatenate(left) if left else which[:0]
