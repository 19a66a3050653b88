# SPDX-License-Identifier: Apache-2.0
"""A table looked up in place, as Linux's generic page-table code does it, by whole arrays.

Source: drivers/iommu/generic_pt/iommu_pt.h (``iova_to_phys``, 7.3).
"""

from __future__ import annotations

import numpy as np

from iokeep.errors import MemoryAbsent
from iokeep.mem.arrays import unique
from iokeep.mem.memory import I64, U8, U64, Memory, Rows
from iokeep.pt.formats.base import Format
from iokeep.pt.leaves import Leaves, leaf_items, raw_ranges
from iokeep.pt.segments import firsts
from iokeep.pt.tables import Items, TableMemory, clipped, descend, leaves_of, raise_unreadable

#: a look at a range of up to so many bytes goes item by item
_SMALL_SPAN = 1 << 26


class Mapped:
    """A page table in memory. Nothing is cached but row numbers: the memory is the truth, as it is for
    hardware.

    :param fmt: format. :param mem: memory. :param root_pa: pa of its root.
    :raises MemoryAbsent: the root is not in this memory.
    """

    def __init__(self, fmt: Format, mem: Memory, root_pa: int) -> None:
        self.fmt = fmt
        self.root_pa = root_pa
        self._tm = TableMemory(fmt, mem, linux=True)
        views: dict[int, tuple[Rows, U8, dict[int, int]]] = {}
        for level in range(len(fmt.levels)):
            size = fmt.bytes_of(level)
            if size not in views:
                view = mem.rows(size)
                views[size] = view, view.data.view(fmt.item_dtype), {}
        sizes = [fmt.bytes_of(level) for level in range(len(fmt.levels))]
        #: per level: memory as tables of its size; [row, item] as it lies there; rows by pa
        self._views = [views[size][0] for size in sizes]
        self._words = [views[size][1] for size in sizes]
        self._row_of = [views[size][2] for size in sizes]
        self._inverts = [np.uint64(spec.invert) for spec in fmt.levels]
        self._occupied = [fmt.occupied(level) for level in range(len(fmt.levels))]
        self._uniform = len(views) == 1
        self._row(fmt.top_level, root_pa)

    def _row(self, level: int, pa: int) -> int:
        rows = self._row_of[level]
        row = rows.get(pa)
        if row is None:
            view, size = self._views[level], self.fmt.bytes_of(level)
            if view.linear and pa % size == 0 and pa // size < len(view.data):
                row = pa // size
            else:
                row = int(self._rows(level, np.array([pa], np.uint64))[0])
            if len(rows) >= 1 << 16:
                rows.clear()
            rows[pa] = row
        return row

    def _rows(self, level: int, pas: U64) -> I64:
        rows = self._views[level].index(pas)
        if len(rows) and int(rows.min()) < 0:
            raise MemoryAbsent(
                int(pas[rows < 0][0]), self.fmt.bytes_of(level), f"table of root_pa {self.root_pa:#x}"
            )
        if not self._uniform and bool((pas & np.uint64(self.fmt.bytes_of(level) - 1)).any()):
            raise ValueError(f"a level {level} table of root_pa {self.root_pa:#x} is not aligned to its size")
        return rows

    def _load(self, level: int, rows: I64, index: I64) -> U64:
        return self._words[level][rows, index].astype(np.uint64, copy=False) ^ self._inverts[level]

    def _item(self, level: int, row: int, index: int) -> int:
        return int(self._words[level][row, index]) ^ self.fmt.levels[level].invert

    def _below(self, level: int, items: U64) -> U64:
        """Pas of the tables that ``items`` of ``level`` point to."""
        spec = self.fmt.levels[level]
        if len(spec.next_levels) > 1 and len(items):
            mask, value, _ = spec.next_levels[0]
            if bool(((items & np.uint64(mask)) != np.uint64(value)).any()):
                raise ValueError(_skips(level))
        return spec.table_pas(items)

    def _table(self, level: int, item: int) -> int:
        """:meth:`_below` of one item."""
        spec = self.fmt.levels[level]
        if len(spec.next_levels) > 1 and spec.next_level(item, level) != level - 1:
            raise ValueError(_skips(level))
        return spec.table_pa(item)

    def _extended(self, raw: int) -> int:
        return int(self.fmt.extend(np.array([raw], np.uint64))[0])

    def _look(self, start: int, last: int) -> tuple[Leaves, U8, I64, I64]:
        """Leaves that touch [start, last], with level, row and index of the first item of each; as Linux
        sees them.
        """
        if start > last:
            raise ValueError(f"[{start:#x}, {last:#x}] is no range")
        fmt = self.fmt
        if last - start < _SMALL_SPAN:
            parts: list[tuple[Items, I64, I64]] = []
            for a, b in raw_ranges(fmt, start, last):
                self._look_small(fmt.top_level, self._row(fmt.top_level, self.root_pa), 0, 3, a, b, parts)
            if not parts:
                none = np.zeros(0, np.int64)
                return Leaves.of(fmt, Items.join([])), np.zeros(0, np.uint8), none, none
            items = Items.join([p[0] for p in parts])
            return (
                Leaves.of(fmt, items),
                items.level,
                np.concatenate([p[1] for p in parts]),
                np.concatenate([p[2] for p in parts]),
            )
        items, _ = leaf_items(self._tm, self.root_pa, start, last)
        rows, index = np.zeros(len(items), np.int64), np.zeros(len(items), np.int64)
        for level in [0] if self._uniform else np.unique(items.level).tolist():
            mine = slice(None) if self._uniform else items.level == level
            at, size = items.at[mine], np.uint64(fmt.bytes_of(level) - 1)
            index[mine] = ((at & size) // np.uint64(fmt.item_bytes)).astype(np.int64)
            rows[mine] = self._rows(level, at & ~size)
        return Leaves.of(fmt, items), items.level, rows, index

    def _look_small(
        self, level: int, row: int, base: int, prot: int, a: int, b: int, out: list[tuple[Items, I64, I64]]
    ) -> None:
        spec = self.fmt.levels[level]
        lo, hi = max(a - base, 0) >> spec.shift, min((b - base) >> spec.shift, spec.items - 1)
        if spec.contig:  # with the whole of every contiguous entry
            whole = (1 << max(c.lg2 for c in spec.contig)) - 1
            lo, hi = lo & ~whole, min(hi | whole, spec.items - 1)
        items = self._words[level][row, lo : hi + 1].astype(np.uint64, copy=False) ^ self._inverts[level]
        index = np.flatnonzero(items & np.uint64(self._occupied[level]))
        if not len(index):
            return
        found = items[index]
        leaf = spec.are_leaves(found)
        if leaf.all():
            self._found(level, row, base, prot, found, index + lo, a, b, out)
            return
        first = 0
        tables = np.flatnonzero(~leaf).tolist()
        for n in [*tables, len(found)]:
            if n > first:
                part = slice(first, n)
                self._found(level, row, base, prot, found[part], index[part] + lo, a, b, out)
            first = n + 1
            if n == len(found):
                return
            item, start = int(found[n]), base + ((int(index[n]) + lo) << spec.shift)
            if start > b or start + (1 << spec.shift) - 1 < a:
                continue
            through = (
                int(item & spec.tr_mask == spec.tr_value) | int(item & spec.tw_mask == spec.tw_value) << 1
            )
            below = self._row(level - 1, self._table(level, item))
            self._look_small(level - 1, below, start, prot & through, a, b, out)

    def _found(
        self, level: int, row: int, base: int, prot: int, items: U64, index: I64, a: int, b: int,
        out: list[tuple[Items, I64, I64]],
    ) -> None:  # fmt: skip
        """Leaves of one table, in order."""
        spec, n = self.fmt.levels[level], len(items)
        iova = np.uint64(base) + (index.astype(np.uint64) << np.uint64(spec.shift))
        # With the index for the item's pa: which items are the first of their leaf is the engine's to say.
        at = index.astype(np.uint64)
        leaves, torn = leaves_of(self._tm, level, iova, items, at, np.full(n, prot, np.uint8))
        if spec.contig:
            leaves, _ = clipped(leaves, torn, a, b)
            if not len(leaves):
                return
        out.append((leaves, np.full(len(leaves), row, np.int64), leaves.at.astype(np.int64)))

    def iova_to_phys(self, iovas: U64) -> U64:
        """Pa of each IOVA (uint64[n], any order and alignment), 0 where nothing translates, as Linux's
        ``iommu_iova_to_phys()`` says: permissions and reserved bits are not looked at.

        :raises MemoryAbsent: a table on the way is not in this memory.
        """
        fmt = self.fmt
        if len(iovas) <= 8:
            return np.array([self._one_to_phys(iova) for iova in iovas.tolist()], np.uint64)
        raw = iovas & np.uint64((1 << fmt.input_lg2) - 1)
        block = np.uint64(min(fmt.levels[0].shift + fmt.levels[0].index_bits, 63))
        # Neighbours share all tables but the last look-up: walk once per run of them.
        first = firsts(raw >> block)
        one = raw[first]
        row = np.full(len(first), self._row(fmt.top_level, self.root_pa), np.int64)
        done = np.zeros(len(first), np.bool_)
        #: at each block the item of a large leaf, and its level
        large, at_level = np.zeros(len(first), np.uint64), np.zeros(len(first), np.uint8)
        for level in range(fmt.top_level, 0, -1):
            spec = fmt.levels[level]
            index = ((one >> np.uint64(spec.shift)) & np.uint64(spec.items - 1)).astype(np.int64)
            item = self._load(level, row, index)
            there = ((item & np.uint64(self._occupied[level])) != 0) & ~done
            leaf = spec.are_leaves(item) & there
            if leaf.any():
                large[leaf], at_level[leaf] = item[leaf], level
            down = there & ~leaf
            done = ~down
            row = np.zeros(len(first), np.int64)
            row[down] = self._rows(level - 1, self._below(level, item[down]))
        spec = fmt.levels[0]
        if len(first) != len(raw):
            owner = np.zeros(len(raw), np.int64)
            owner[first[1:]] = 1
            owner = np.cumsum(owner)
            row, done, large, at_level = row[owner], done[owner], large[owner], at_level[owner]
        index = ((raw >> np.uint64(spec.shift)) & np.uint64(spec.items - 1)).astype(np.int64)
        item = self._load(0, row, index)
        found = self._outputs(0, item, raw)
        found[(item & np.uint64(self._occupied[0])) == 0] = 0
        found[done] = 0
        for level in np.unique(at_level).tolist():
            if level:
                mine = at_level == level
                found[mine] = self._outputs(level, large[mine], raw[mine])
        found[~fmt.covers_array(iovas)] = 0
        return found

    def _outputs(self, level: int, items: U64, raw: U64) -> U64:
        """What leaves of one level make of raw IOVAs."""
        spec = self.fmt.levels[level]
        inner = np.uint64((1 << spec.shift) - 1)
        pa = spec.leaf_pas(items) | (raw & inner)
        for contig in spec.contig:
            mine = (items & np.uint64(contig.mask)) == np.uint64(contig.value)
            if contig.replicated and mine.any():
                inner = np.uint64((1 << (spec.shift + contig.lg2)) - 1)
                pa[mine] = (pa[mine] & ~inner) | (raw[mine] & inner)
        return pa

    def _one_to_phys(self, iova: int) -> int:
        fmt = self.fmt
        if not fmt.covers(iova):
            return 0
        row = self._row(fmt.top_level, self.root_pa)
        for level in range(fmt.top_level, -1, -1):
            spec = fmt.levels[level]
            item = self._item(level, row, (iova >> spec.shift) & (spec.items - 1))
            if not item & self._occupied[level]:
                return 0
            if spec.is_leaf(item):
                contig = spec.contig_of(item) if spec.contig else None
                lg2 = spec.shift + (contig.lg2 if contig is not None and contig.replicated else 0)
                return spec.leaf_pa(item) & -(1 << lg2) | (iova & ((1 << lg2) - 1))
            row = self._row(level - 1, self._table(level, item))
        return 0

    def leaves(self, start: int = 0, last: int | None = None) -> Leaves:
        """The leaves that touch the IOVAs [start, last], sorted, as Linux sees them."""
        return self._look(start, 2**64 - 1 if last is None else last)[0]

    def pages(self) -> U64:
        """Pas of every table, sorted, the root included."""
        upper = descend(self._tm, self.root_pa)
        raise_unreadable(self.fmt, upper.problems)
        return unique(*upper.pages)


def _skips(level: int) -> str:
    return (
        f"a level {level} item leads further down than level {level - 1}: such a table can be walked, "
        "verified and compared, but not changed here, and none is built (nor does Linux make one: "
        "amdv1pt_install_table() always writes the level below)"
    )
