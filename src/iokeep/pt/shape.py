# SPDX-License-Identifier: Apache-2.0
"""May this table be changed? What matters beside its translations before a kernel takes a table over.

A table may translate exactly what is expected and still be a trap for whoever maps and unmaps in it
afterwards, as Linux does (drivers/iommu/generic_pt/iommu_pt.h):

* a page of tables that is reached at two places: a map at one shows at the other, whose IOTLB entries nobody
  flushes ("loop");
* a page of tables that is not the owner's: it is freed, or written by somebody else, under the walk of the
  hardware ("absent");
* a table item that takes permissions away from what is mapped below it later ("prot");
* a table item that leads further down than one level, which Linux neither makes nor takes ("reserved");
* an item that hardware takes for absent and Linux for a pointer to a table: a map writes where it points to
  (VT-d: R = W = 0 and a pa; vtdss_pt_load_entry_raw() looks for 0 alone) ("reserved").

All of this is above the tables of level 0: 1/512 of the bytes of a table of small pages. :func:`unfit` looks
for it. :func:`crossing` finds leaves that reach over the edge of an area: an unmap of that area alone cannot
take the leaf out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from iokeep.mem.arrays import unique
from iokeep.mem.memory import I64, U8, U64, Memory
from iokeep.pt.choice import loaded
from iokeep.pt.compare import PROT, TEXTS, Mismatch
from iokeep.pt.formats.base import Format
from iokeep.pt.leaves import Leaves
from iokeep.pt.tables import (
    ABSENT,
    CHUNK,
    LOOP,
    RESERVED,
    Items,
    TableMemory,
    Tables,
    Upper,
    distinct,
    units_of,
)

#: what pages of tables are counted in: their owner has them by this many bytes
_PAGE = 4096
_ONE = np.uint64(1)
#: a bitmap of owned pages has at most so many bits for each
_DENSE = 64
_WHY = {
    LOOP: "the table that an item of level {level} points to is reached at another place too",
    ABSENT: "the table that an item of level {level} points to is not one of the table's own pages",
    PROT: "an item of level {level} takes permissions away from all that is mapped below it",
}
_SKIPS = "an item of level {level} leads further down than to the next level"
_GHOST = "an item of level {level} is not present, but points to a table"


@dataclass(frozen=True, slots=True)
class Unfit:
    """Ranges in which the table must not be changed: the outermost ones, sorted and disjoint.

    ``iova``, ``last`` uint64[n] (as devices use them); ``reason`` uint8[n] as in ``compare.TEXTS``; ``level``
    uint8[n] of the item; ``text`` number of its words.
    """

    iova: U64
    last: U64
    reason: U8
    level: U8
    text: U8

    def __len__(self) -> int:
        return len(self.iova)

    def mismatches(self, limit: int) -> list[Mismatch]:
        """The first ``limit`` of them."""
        out = []
        for i in range(min(limit, len(self))):
            iova, last = int(self.iova[i]), int(self.last[i])
            reason, level = int(self.reason[i]), int(self.level[i])
            words = (_WHY.get(reason, ""), _SKIPS, _GHOST)[int(self.text[i])].format(level=level)
            name = TEXTS[reason]
            text = f"iova {iova:#x}-{last:#x}: {name}: {words}"
            out.append(Mismatch(iova, last, None, None, None, None, name, level, text))
        return out


class _Found:
    """Collects ranges: raw IOVAs and log2 of their bytes."""

    def __init__(self) -> None:
        self.columns: list[tuple[U64, U64, U8, U8, U8]] = []

    def add(self, base: U64, lg2: int, reason: int, level: int, text: int = 0) -> None:
        if len(base):
            n, low = len(base), np.uint64((1 << lg2) - 1)
            same = [np.full(n, v, np.uint8) for v in (reason, level, text)]
            self.columns.append((base & ~low, base | low, same[0], same[1], same[2]))

    def outermost(self, fmt: Format) -> Unfit:
        none = np.zeros(0, np.uint8)
        columns = self.columns or [(np.zeros(0, np.uint64), np.zeros(0, np.uint64), none, none, none)]
        iova, last = (np.concatenate([c[i] for c in columns]) for i in (0, 1))
        reason, level, text = (np.concatenate([c[i] for c in columns]) for i in (2, 3, 4))
        order = np.lexsort((~last, iova))
        iova, last = iova[order], last[order]
        fresh = np.ones(len(iova), np.bool_)
        fresh[1:] = last[1:] > np.maximum.accumulate(last)[:-1]
        iova, last = iova[fresh], last[fresh]
        reason, level, text = (c[order][fresh] for c in (reason, level, text))
        if fmt.sign_extend and len(iova) == 1 and int(last[0] - iova[0]) >> (fmt.input_lg2 - 1):
            half = np.uint64(1 << (fmt.input_lg2 - 1))  # both halves of the space
            iova, last = np.array([0, half], np.uint64), np.array([half - _ONE, last[0]], np.uint64)
            reason, level, text = (np.repeat(c, 2) for c in (reason, level, text))
        return Unfit(fmt.extend(iova), fmt.extend(last), reason, level, text)


def only_leaves(tm: TableMemory, tables: Tables) -> NDArray[np.bool_]:
    """Which tables lead to no other: the descent for :func:`unfit` need not look into them."""
    level = tables.level
    spec, out = tm.fmt.levels[level], np.zeros(len(tables), np.bool_)
    if not spec.leaf:
        return out
    if _in_place(tm, level) and spec.table and not spec.leaf_values:
        from iokeep.pt.kernels import only_such

        masks = (tm.present(level), np.uint64(spec.leaf_mask), np.uint64(spec.leaf_value))
        only_such(tm.view(level).data.view(np.uint64), tables.row, *masks, out)
        return out
    for lo in range(0, len(tables), CHUNK):
        row = tables.row[lo : lo + CHUNK]
        flat = tm.items(row, level).reshape(-1)
        here = tm.places(level, flat)
        down = here[~spec.are_leaves(flat[here])] >> spec.index_bits
        out[lo : lo + CHUNK] = True
        out[lo + down] = False
    return out


def _in_place(tm: TableMemory, level: int) -> bool:
    """Whether compiled code is at hand, and can look at the tables of a level where they are."""
    whole = tm.plains[level] and tm.parts[level] == 1
    return loaded("kernels") and whole and not tm.fmt.levels[level].valid_values


def unfit(tm: TableMemory, upper: Upper, owned: U64) -> Unfit:
    """Where the table must not be changed as Linux changes tables; see the module.

    :param upper: the upper levels of all of it (``tables.descend``). Of its ``problems`` only loops count;
        what else is wrong with an item by itself is known.
    :param owned: pas of the 4096-byte pages that its tables lie in, sorted. The root is taken to be there.
    """
    fmt, top = tm.fmt, tm.fmt.top_level
    found = _Found()
    plain = _plain(tm, upper, owned)
    looped = _looped(tm, upper, found)
    for depth, (base, pa, prot) in enumerate(zip(upper.bases, upper.pages, upper.prots, strict=True)):
        if not len(pa):
            continue
        level = top - depth
        spec = fmt.levels[level]
        lg2, above = spec.shift + spec.index_bits, min(level + 1, top)
        if not plain:
            shared = _shared(tm, level, pa, looped)
            if shared is not None:
                found.add(base[shared], lg2, LOOP, above)
            if depth:
                foreign = _foreign(fmt.bytes_of(level), pa, owned)
                found.add(base[foreign], lg2, ABSENT, above)
                found.add(base[prot != 3], lg2, PROT, above)
        if depth and not upper.alike.issuperset(range(level + 1, top + 1)):
            _skips(fmt, upper, level, found)
        if level and level not in upper.alike:
            _ghosts(tm, level, base, pa, found)
    return found.outermost(fmt)


def _plain(tm: TableMemory, upper: Upper, owned: U64) -> bool:
    """Whether all tables below the root are seen, by compiled code, to be reached once, in pages of their
    owner, and to get all permissions from above. False = that is to be looked at.
    """
    fmt, p = tm.fmt, upper.problems
    sizes = {fmt.bytes_of(level) for level in range(fmt.top_level)}
    if not loaded("kernels") or not len(owned) or sizes != {_PAGE} or bool((p.reason == LOOP).any()):
        return False
    span = int(owned[-1] - owned[0]) // _PAGE + 1
    if span > _DENSE * len(owned):
        return False
    from iokeep.pt.kernels import visit_once

    shift, first = np.uint64(_PAGE.bit_length() - 1), int(upper.pages[0][0]) & -_PAGE
    state = np.zeros(span, np.uint8)
    state[((owned - owned[0]) >> shift).view(np.int64)] = 1
    root = np.arange(first, first + fmt.root_bytes, _PAGE, dtype=np.uint64)
    root = root[(root >= owned[0]) & (root <= owned[-1])]
    state[((root - owned[0]) >> shift).view(np.int64)] = 2
    return all(
        visit_once(pa, prot, owned[0], state)
        for pa, prot in zip(upper.pages[1:], upper.prots[1:], strict=True)
    )


def _looped(tm: TableMemory, upper: Upper, found: _Found) -> U64:
    """Units of tables that serve at a higher level too. The items that lead there again are found; the visits
    to them at the higher level are not among the problems.
    """
    fmt, p = tm.fmt, upper.problems
    units = [np.zeros(0, np.uint64)]
    for number, spec in enumerate(fmt.levels):
        mine = (p.reason == LOOP) & (p.level == number)
        items = p.item[mine]
        if not len(items):
            continue
        found.add(p.iova[mine], spec.shift, LOOP, number)
        below = np.full(len(items), max(number - 1, 0), np.uint8)
        for mask, value, target in reversed(spec.next_levels):
            below[(items & np.uint64(mask)) == np.uint64(value)] = target
        for target in np.unique(below).tolist():
            units.append(units_of(tm, target, spec.table_pas(items[below == target])))
    return unique(*units)


def _shared(tm: TableMemory, level: int, pa: U64, looped: U64) -> NDArray[np.bool_] | None:
    """Which visits are to pages that are visited elsewhere too; None = none are."""
    units = units_of(tm, level, pa)
    bad = looped
    if not bool((units[1:] > units[:-1]).all()):
        unit = min(tm.fmt.bytes_of(n) for n in range(max(tm.fmt.top_level, 1))).bit_length() - 1
        if distinct((units >> np.uint64(unit)).view(np.int64)) != len(units):
            ordered = np.sort(units)
            bad = unique(bad, ordered[1:][ordered[1:] == ordered[:-1]])
    if not len(bad):
        return None
    twice: NDArray[np.bool_] = np.isin(units, bad)
    return np.asarray(twice.reshape(len(pa), -1).any(axis=1), np.bool_)


def _foreign(size: int, pa: U64, owned: U64) -> NDArray[np.bool_]:
    """Which tables of ``size`` bytes are not wholly in the pages ``owned``."""
    if not len(owned):
        return np.ones(len(pa), np.bool_)
    first = pa & np.uint64(-_PAGE & (2**64 - 1))
    out = np.zeros(len(pa), np.bool_)
    for at in range(0, max(size, _PAGE), _PAGE):
        out |= _not_among(first + np.uint64(at), owned)
    return out


def _not_among(pages: U64, owned: U64) -> NDArray[np.bool_]:
    """Which pages are not among the sorted ``owned``, which are some."""
    shift = np.uint64(_PAGE.bit_length() - 1)
    low, span = owned[0], int((owned[-1] - owned[0]) >> shift) + 1
    if span <= _DENSE * len(owned):  # look-ups in order of memory, whatever the order of the tables
        there = np.zeros(span + 1, np.bool_)
        there[((owned - low) >> shift).view(np.int64)] = True
        number = (pages - low) >> shift  # what is below wraps around, and is beyond the end
        np.minimum(number, np.uint64(span), out=number)
        out: NDArray[np.bool_] = ~there[number.view(np.int64)]
        return out
    at = np.minimum(np.searchsorted(owned, pages), len(owned) - 1)
    return np.asarray(owned[at] != pages, np.bool_)


def _skips(fmt: Format, upper: Upper, level: int, found: _Found) -> None:
    """Tables of a level that no table of the next level leads to."""
    if all(len(spec.next_levels) < 2 for spec in fmt.levels[level + 1 :]):
        return
    base = upper.bases[fmt.top_level - level]
    for number in range(level + 1, fmt.top_level + 1):
        spec = fmt.levels[number]
        over = base & ~np.uint64((1 << (spec.shift + spec.index_bits)) - 1)
        there = np.isin(over, upper.bases[fmt.top_level - number])
        if number > level + 1:
            found.add(base[there], spec.shift, RESERVED, number, 1)
        base = base[~there]


def _ghosts(tm: TableMemory, level: int, base: U64, pa: U64, found: _Found) -> None:
    """Items of tables of a level that point to tables for Linux, and are absent for hardware."""
    fmt, spec = tm.fmt, tm.fmt.levels[level]
    occupied = fmt.occupied(level)
    if not spec.table or (not occupied & ~spec.valid_mask and not spec.valid_values):
        return
    rows = np.zeros(1, np.int64) if level == fmt.top_level else tm.index(level, pa)
    if level < fmt.top_level and _in_place(tm, level):
        from iokeep.pt.kernels import any_hidden

        masks = np.uint64(spec.valid_mask), np.uint64(occupied)
        if not any_hidden(tm.view(level).data.view(np.uint64), rows, *masks):
            return
    for lo in range(0, len(pa), CHUNK):
        part = slice(lo, lo + CHUNK)
        items = tm.root(int(pa[0])) if level == fmt.top_level else tm.items(rows[part], level)
        flat = items.reshape(-1)
        ghost = (flat & np.uint64(occupied)) != 0
        ghost[tm.places(level, flat)] = False
        at = np.flatnonzero(ghost)
        at = at[~spec.are_leaves(flat[at])] if len(at) else at
        index = (at & (spec.items - 1)).astype(np.uint64)
        iova = base[part][at >> spec.index_bits] + (index << np.uint64(spec.shift))
        found.add(iova, spec.shift, RESERVED, level, 2)


def crossing(fmt: Format, mem: Memory, root_pa: int, cuts: U64) -> Leaves:
    """The leaves (whole contiguous entries) that begin before one of the IOVAs ``cuts`` and go on at it.

    One walk for each, without a look at anything else: what is wrong on the way ends the walk, and finds no
    leaf. O(cuts), whatever the table holds.

    :param cuts: uint64[n] in any order; IOVAs that the table does not translate are in no leaf.
    :raises MemoryAbsent, InputError: the root is absent, or not aligned.
    """
    tm = TableMemory(fmt, mem)
    cuts = unique(cuts)
    raw = cuts[fmt.covers_array(cuts)] & np.uint64(((1 << fmt.input_lg2) - 1) & (2**64 - 1))
    pa = np.full(len(raw), root_pa, np.uint64)
    prot = np.full(len(raw), 3, np.uint8)
    levels = np.full(len(raw), fmt.top_level, np.int64)
    root = tm.root(root_pa).reshape(-1)
    out: list[Items] = []
    for level in range(fmt.top_level, -1, -1):
        here = levels == level
        at, tables, granted = raw[here], pa[here], prot[here]
        spec = fmt.levels[level]
        index = ((at >> np.uint64(spec.shift)) & np.uint64(spec.items - 1)).astype(np.int64)
        if level == fmt.top_level:
            items, sound = root[index], np.ones(len(at), np.bool_)
        else:
            items, sound = _load(tm, level, tables, index)
        there = np.zeros(len(at), np.bool_)
        there[tm.places(level, items)] = True
        there &= sound
        leaf = spec.are_leaves(items) & there
        out.append(_over(fmt, level, at[leaf], items[leaf], granted[leaf]))
        down = there & ~leaf
        rest = (levels < level) & (levels >= 0)
        at, items, granted = at[down], items[down], granted[down]
        target = np.full(len(at), level - 1, np.int64)
        for mask, value, number in reversed(spec.next_levels):
            target[(items & np.uint64(mask)) == np.uint64(value)] = number
        r = (items & np.uint64(spec.tr_mask)) == np.uint64(spec.tr_value)
        w = (items & np.uint64(spec.tw_mask)) == np.uint64(spec.tw_value)
        granted = granted & (r.astype(np.uint8) | (w.astype(np.uint8) << np.uint8(1)))
        if len(spec.next_levels) > 1 and level:  # what lies between is 0, or nothing translates
            bits = np.array([s.shift + s.index_bits for s in fmt.levels], np.uint64)[target]
            inside = ((at & np.uint64((1 << spec.shift) - 1)) >> bits) == 0
            at, items, granted, target = at[inside], items[inside], granted[inside], target[inside]
        raw = np.concatenate((raw[rest], at))
        pa = np.concatenate((pa[rest], spec.table_pas(items)))
        prot = np.concatenate((prot[rest], granted))
        levels = np.concatenate((levels[rest], target))
    found = Items.join(out, sort=True)
    first = np.ones(len(found), np.bool_)
    first[1:] = found.iova[1:] != found.iova[:-1]
    return Leaves.of(fmt, found.take(first))


def _load(tm: TableMemory, level: int, pas: U64, index: I64) -> tuple[U64, NDArray[np.bool_]]:
    """Item ``index`` of each table, and whether the table is there; 0 where it is not."""
    fmt, view = tm.fmt, tm.view(level)
    rows = tm.index(level, pas)
    sound = rows >= 0
    words = view.data.view(fmt.item_dtype)
    each = words.shape[1]
    items = np.zeros(len(pas), np.uint64)
    at = index[sound]
    loaded = words[rows[sound] + at // each, at % each].astype(np.uint64)
    items[sound] = loaded ^ np.uint64(fmt.levels[level].invert)
    return items, sound


def _over(fmt: Format, level: int, at: U64, items: U64, granted: U8) -> Items:
    """Of leaves that hold the raw IOVAs ``at``, those that begin before."""
    spec = fmt.levels[level]
    lg2 = np.full(len(at), spec.shift, np.uint64)
    coded = np.zeros(len(at), np.bool_)
    seen = np.zeros(len(at), np.bool_)
    for contig in spec.contig:
        mine = ((items & np.uint64(contig.mask)) == np.uint64(contig.value)) & ~seen
        seen |= mine
        lg2[mine] += np.uint64(contig.lg2)
        coded |= mine if contig.replicated else False
    low = (_ONE << lg2) - _ONE
    start = at & ~low
    pa = spec.leaf_pas(items)
    item_start = at & ~np.uint64((1 << spec.shift) - 1)
    pa = np.where(coded, pa & ~low, pa - (item_start - start)).astype(np.uint64)
    found = Items(
        start, pa, np.full(len(at), level, np.uint8), spec.leaf_prots(items) & granted, items,
        np.zeros(len(at), np.uint64), lg2.astype(np.uint8),
    )  # fmt: skip
    return found.take(start < at)
