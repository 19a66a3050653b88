# SPDX-License-Identifier: Apache-2.0
"""Building tables: map, unmap and look-up as Linux's generic page-table code does them, by whole arrays.

Source for what the results look like: drivers/iommu/iommu.c (``iommu_pgsize()``: leaf sizes) and
drivers/iommu/generic_pt/iommu_pt.h (``map_pages``, ``unmap_pages``, ``iova_to_phys``, 7.3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from iokeep.errors import MemoryAbsent
from iokeep.mem.memory import I64, U8, U64, WritableMemory
from iokeep.pt.extents import Extents
from iokeep.pt.formats.base import Format
from iokeep.pt.leaves import Leaves, leaf_items, raw_ranges
from iokeep.pt.tables import Items, TableMemory, descend, raise_unreadable

#: n -> pas (uint64[n]) of n zeroed table pages of ``fmt.table_bytes``
TableAllocator = Callable[[int], U64]
#: pas (uint64[n]) of table pages that nothing links to any more. The caller flushes the IOTLB before they are
#: reused.
TableFree = Callable[[U64], None]

#: items written at once: their intermediates stay in the cache
_BATCH = 1 << 16
#: up to so many extents and items a map, and so many bytes a look at a range, goes item by item
_SMALL_EXTENTS = 4
_SMALL_ITEMS = 1024
_SMALL_SPAN = 1 << 26


class AlreadyMapped(ValueError):
    """A map met an IOVA that is mapped (Linux: -EADDRINUSE). Nothing was changed.

    :param iova: the first one met, in bytes.
    """

    def __init__(self, iova: int) -> None:
        super().__init__(f"iova {iova:#x} is already mapped")
        self.iova = iova


@dataclass(slots=True)
class _Runs:
    """Leaves of one size: ``iova`` (raw), ``pa`` uint64[n], ``count`` int64[n] of items, ``prot`` uint8[n];
    sorted.
    """

    level: int
    iova: U64
    count: I64
    pa: U64
    prot: U8


@dataclass(slots=True)
class _Segments:
    """Runs cut at tables: ``key`` uint64[s] = iova >> bits of one table, ``index`` int64[s] of the first
    item.
    """

    level: int
    key: U64
    index: I64
    count: I64
    pa: U64
    prot: U8
    unique: U64
    table: I64


@dataclass(slots=True)
class _Needed:
    """Tables of one level that a map goes through: sorted keys, pas and rows (-1: to be allocated)."""

    key: U64
    pa: U64
    row: I64


class Table:
    """A page table in writable memory.

    Nothing is cached but row numbers: the memory is the truth, as it is for hardware.

    :param fmt: format. :param mem: memory. :param root_pa: pa of its root.
    :param alloc: gives zeroed table pages. :param free: takes pages that were unlinked, after the store that
    did so.
    """

    def __init__(
        self, fmt: Format, mem: WritableMemory, root_pa: int, alloc: TableAllocator, free: TableFree
    ) -> None:
        if not fmt.in_words or fmt.root_bytes != fmt.table_bytes:
            raise ValueError(f"{fmt.name}: building is not there yet")
        self.fmt = fmt
        self.mem = mem
        self.root_pa = root_pa
        self._alloc = alloc
        self._free = free
        self._tm = TableMemory(fmt, mem, linux=True)
        #: [row, item] as it lies in memory
        self._words = self._tm.rows.data.view(fmt.item_dtype)
        self._row_of: dict[int, int] = {}
        self._invert = np.uint64(fmt.invert)
        self._row(root_pa)

    @classmethod
    def create(cls, fmt: Format, mem: WritableMemory, alloc: TableAllocator, free: TableFree) -> Table:
        """An empty table: its root comes from ``alloc`` too."""
        return cls(fmt, mem, int(alloc(1)[0]), alloc, free)

    # -- rows and items --------------------------------------------------------------------------------

    def _row(self, pa: int) -> int:
        row = self._row_of.get(pa)
        if row is None:
            row = int(self._tm.rows.index(np.array([pa], np.uint64))[0])
            if row < 0:
                raise MemoryAbsent(pa, self.fmt.table_bytes, f"table of root_pa {self.root_pa:#x}")
            if len(self._row_of) >= 1 << 16:
                self._row_of.clear()
            self._row_of[pa] = row
        return row

    def _rows(self, pas: U64) -> I64:
        rows = self._tm.rows.index(pas)
        if len(rows) and int(rows.min()) < 0:
            raise MemoryAbsent(
                int(pas[rows < 0][0]), self.fmt.table_bytes, f"table of root_pa {self.root_pa:#x}"
            )
        return rows

    def _load(self, rows: I64, index: I64) -> U64:
        return self._words[rows, index].astype(np.uint64, copy=False) ^ self._invert

    def _item(self, row: int, index: int) -> int:
        return int(self._words[row, index]) ^ self.fmt.invert

    def _is_leaf(self, level: int, item: int) -> bool:
        spec = self.fmt.levels[level]
        return spec.leaf and (not spec.table or item & spec.leaf_mask == spec.leaf_value)

    def _are_leaves(self, level: int, items: U64) -> NDArray[np.bool_]:
        spec = self.fmt.levels[level]
        if spec.leaf and spec.table:
            leaf: NDArray[np.bool_] = (items & np.uint64(spec.leaf_mask)) == np.uint64(spec.leaf_value)
            return leaf
        return np.full(len(items), spec.leaf)

    def _raw(self, iova: int) -> int:
        if not 0 <= iova < 1 << 64 or not self.fmt.covers(iova):
            raise ValueError(f"iova {iova:#x} is beyond the {self.fmt.input_lg2}-bit input of this table")
        return iova & ((1 << self.fmt.input_lg2) - 1)

    # -- map -------------------------------------------------------------------------------------------

    def map(self, extents: Extents, max_lg2: int | None = None) -> None:
        """Map every extent, with the leaf sizes that ``iommu_map`` chooses: at each point the largest that
        divides iova and pa and fits. All or nothing.

        A large leaf takes the place of an emptied table, which then goes to ``free``.

        :param extents: sorted, disjoint; multiples of the smallest leaf; prot not 0.
        :param max_lg2: no leaf is larger than 2**max_lg2 bytes (a domain's pgsize_bitmap).
        :raises AlreadyMapped: an IOVA of them is mapped. Nothing was changed.
        :raises ValueError: an extent cannot be expressed. Nothing was changed.
        """
        if not len(extents):
            return
        iova, length = self._checked(extents)
        items = (
            int(length.sum()) >> self.fmt.levels[0].shift if len(extents) <= _SMALL_EXTENTS else _SMALL_ITEMS
        )
        if items < _SMALL_ITEMS:
            columns = (iova.tolist(), length.tolist(), extents.pa.tolist(), extents.prot.tolist())
            self._map_small([run for row in zip(*columns, strict=True) for run in self._runs(*row, max_lg2)])
        else:
            self._map_arrays(choose_leaves(self.fmt, iova, length, extents.pa, extents.prot, max_lg2))

    def _checked(self, extents: Extents) -> tuple[U64, U64]:
        """Raw iovas and lengths. :raises ValueError: not expressible."""
        fmt = self.fmt
        small = np.uint64((1 << fmt.levels[0].shift) - 1)
        one = np.uint64(1)
        length = extents.last - extents.iova + one
        if bool(((extents.iova | extents.pa | length) & small).any()):
            raise ValueError(f"an extent is not a multiple of {int(small) + 1:#x} bytes")
        if bool((extents.last <= extents.iova).any() or (extents.iova[1:] <= extents.last[:-1]).any()):
            raise ValueError("extents are not sorted and disjoint")
        if not bool((fmt.covers_array(extents.iova) & fmt.covers_array(extents.last)).all()) or (
            fmt.sign_extend and bool(((extents.iova ^ extents.last) >> np.uint64(63)).any())
        ):
            raise ValueError(f"an extent is beyond the {fmt.input_lg2}-bit input of this table")
        output = np.uint64(~fmt.levels[0].leaf_pa_mask & (2**64 - 1)) & ~small
        if bool(((extents.pa | (extents.pa + (length - one))) & output).any()) or bool(
            (extents.pa + (length - one) < extents.pa).any()
        ):
            raise ValueError("an extent's pa is beyond the output bits of this table")
        if bool(((extents.prot == 0) | (extents.prot > 3)).any()):
            raise ValueError("an extent has neither read nor write permission")
        return extents.iova & np.uint64((1 << fmt.input_lg2) - 1), length

    def _runs(
        self, iova: int, length: int, pa: int, prot: int, max_lg2: int | None
    ) -> list[tuple[int, int, int, int, int]]:
        """:func:`choose_leaves` of one extent, in order: (level, raw iova, items, pa, prot)."""
        sizes = self._sizes(max_lg2)
        out = []
        while length:
            fits = (
                i for i, (_, lg2) in enumerate(sizes) if length >> lg2 and not (iova | pa) & ((1 << lg2) - 1)
            )
            n = next(fits)
            level, lg2 = sizes[n]
            count = length >> lg2
            if n:  # up to where a larger leaf fits
                larger = 1 << sizes[n - 1][1]
                ahead = -iova & (larger - 1)
                if not (iova ^ pa) & (larger - 1) and ahead and ahead + larger <= length:
                    count = ahead >> lg2
            out.append((level, iova, count, pa, prot))
            iova, pa, length = iova + (count << lg2), pa + (count << lg2), length - (count << lg2)
        return out

    def _sizes(self, max_lg2: int | None) -> list[tuple[int, int]]:
        """(level, log2 size) of the leaves, from large to small."""
        levels = enumerate(self.fmt.levels)
        sizes = [(n, s.shift) for n, s in levels if s.leaf and (max_lg2 is None or s.shift <= max_lg2)]
        if not sizes:
            raise ValueError(f"{self.fmt.name} has no leaf of at most 2**{max_lg2} bytes")
        return sizes[::-1]

    def _map_small(self, runs: list[tuple[int, int, int, int, int]]) -> None:
        fmt = self.fmt
        # (level, key) -> row, or -1 where the table is still to be allocated
        rows: dict[tuple[int, int], int] = {(fmt.top_level, 0): self._row(self.root_pa)}
        new: list[tuple[int, int]] = []

        def resolve(level: int, key: int, iova: int) -> int:
            row = rows.get((level, key))
            if row is not None:
                return row
            bits = fmt.levels[level + 1].index_bits
            parent = resolve(level + 1, key >> bits, iova)
            item = self._item(parent, key & ((1 << bits) - 1)) if parent >= 0 else 0
            if parent < 0 or not item & fmt.occupied_mask:
                new.append((level, key))
                row = -1
            elif self._is_leaf(level + 1, item):
                raise AlreadyMapped(self._extended(iova))
            else:
                row = self._row(item & fmt.levels[level + 1].table_pa_mask)
            rows[level, key] = row
            return row

        todo: list[tuple[int, int, int, int, int, int]] = []
        replaced: list[U64] = []
        occupied = np.uint64(fmt.occupied_mask)
        for level, iova, count, pa, prot in runs:
            spec = fmt.levels[level]
            while count:
                key, index = iova >> (spec.shift + spec.index_bits), (iova >> spec.shift) & (spec.items - 1)
                n = min(count, spec.items - index)
                row = resolve(level, key, iova)
                if row >= 0:
                    there = self._words[row, index : index + n].astype(np.uint64, copy=False) ^ self._invert
                    busy = np.flatnonzero(there & occupied)
                    if len(busy):
                        at = np.uint64(iova) + (busy.astype(np.uint64) << np.uint64(spec.shift))
                        replaced += self._emptied(level, there[busy], at)
                todo.append((level, key, index, n, pa, prot))
                iova, count, pa = iova + (n << spec.shift), count - n, pa + (n << spec.shift)
        pas: dict[tuple[int, int], int] = {}
        if new:
            for place, table in zip(new, self._alloc(len(new)).tolist(), strict=True):
                pas[place] = table
                rows[place] = self._row(table)
        for level, key, index, n, pa, prot in todo:
            spec = fmt.levels[level]
            step = np.arange(n, dtype=np.uint64) << np.uint64(spec.shift)
            first = np.uint64(pa | spec.prot_bits[prot] | spec.leaf_base)
            self._words[rows[level, key], index : index + n] = (step + first) ^ self._invert
        # The lowest first: what hardware can reach is complete at every moment.
        for (level, key), table in sorted(pas.items()):
            bits = fmt.levels[level + 1].index_bits
            item = fmt.table_items(level + 1, np.array([table], np.uint64))[0]
            self._words[rows[level + 1, key >> bits], key & ((1 << bits) - 1)] = item
        if replaced:
            self._free(np.concatenate(replaced))

    def _emptied(self, level: int, items: U64, iovas: U64) -> list[U64]:
        """Pages of the tables that ``items`` of ``level`` point to; they hold no leaf.

        Linux: clear_contig() and __collect_tables() in iommu_pt.h. :raises AlreadyMapped: an item is a leaf,
        or a leaf lies below.
        """
        leaf = self._are_leaves(level, items)
        if leaf.any():
            raise AlreadyMapped(self._extended(int(iovas[leaf][0])))
        pages = []
        while len(items):
            pas = items & np.uint64(self.fmt.levels[level].table_pa_mask)
            pages.append(pas)
            level -= 1
            below = self._tm.items(self._rows(pas), level)
            table, index = np.nonzero(below & np.uint64(self.fmt.occupied_mask))
            items = below[table, index]
            iovas = iovas[table] + (index.astype(np.uint64) << np.uint64(self.fmt.levels[level].shift))
            leaf = self._are_leaves(level, items)
            if leaf.any():
                raise AlreadyMapped(self._extended(int(iovas[leaf][0])))
        return pages

    def _extended(self, raw: int) -> int:
        return int(self.fmt.extend(np.array([raw], np.uint64))[0])

    def _map_arrays(self, runs: list[_Runs]) -> None:
        fmt = self.fmt
        segments = [_cut(fmt, run) for run in runs]
        needed = self._needed(segments)
        for seg in segments:  # other sizes may need tables of the same level
            seg.table = np.searchsorted(needed[seg.level].key, seg.unique)[seg.table]
        replaced: list[U64] = []
        for seg in segments:
            replaced += self._check_free(seg, needed[seg.level])
        missing = [np.flatnonzero(n.row < 0) for n in needed]
        total = sum(len(m) for m in missing)
        if total:
            pas, place = self._alloc(total), 0
            for at, new in zip(reversed(needed), reversed(missing), strict=True):
                at.pa[new] = pas[place : place + len(new)]
                at.row[new] = self._rows(at.pa[new])
                place += len(new)
        for seg in segments:
            self._write(seg, needed[seg.level].row)
        # The lowest first: what hardware can reach is complete at every moment.
        for level, new in enumerate(missing[:-1]):
            if len(new):
                bits = np.uint64(fmt.levels[level + 1].index_bits)
                key = needed[level].key[new]
                parent = np.searchsorted(needed[level + 1].key, key >> bits)
                index = (key & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)
                items = fmt.table_items(level + 1, needed[level].pa[new])
                self._words[needed[level + 1].row[parent], index] = items
        if replaced:
            self._free(np.concatenate(replaced))

    def _needed(self, segments: list[_Segments]) -> list[_Needed]:
        """Tables of every level that the segments go through. :raises AlreadyMapped: a leaf is in the way."""
        fmt = self.fmt
        keys = [np.zeros(0, np.uint64) for _ in fmt.levels]
        for seg in segments:
            keys[seg.level] = seg.unique
        for level in range(fmt.top_level):
            up = keys[level] >> np.uint64(fmt.levels[level + 1].index_bits)
            up = up[_firsts(up)]
            keys[level + 1] = np.union1d(keys[level + 1], up) if len(keys[level + 1]) else up
        root = np.array([self.root_pa], np.uint64)
        out = [_Needed(np.zeros(1, np.uint64), root, self._rows(root))]
        for level in range(fmt.top_level - 1, -1, -1):
            above, key = out[0], keys[level]
            bits = np.uint64(fmt.levels[level + 1].index_bits)
            parent = above.row[np.searchsorted(above.key, key >> bits)]
            index = (key & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)
            pa, row = np.zeros(len(key), np.uint64), np.full(len(key), -1, np.int64)
            linked = np.flatnonzero(parent >= 0)
            item = self._load(parent[linked], index[linked])
            there = (item & np.uint64(fmt.occupied_mask)) != 0
            linked, item = linked[there], item[there]
            leaf = self._are_leaves(level + 1, item)
            if leaf.any():
                spec = fmt.levels[level]
                raise AlreadyMapped(
                    self._extended(int(key[linked[leaf]][0]) << (spec.shift + spec.index_bits))
                )
            pa[linked] = item & np.uint64(fmt.levels[level + 1].table_pa_mask)
            row[linked] = self._rows(pa[linked])
            out.insert(0, _Needed(key, pa, row))
        return out

    def _check_free(self, seg: _Segments, needed: _Needed) -> list[U64]:
        """Pages of emptied tables where the leaves go. :raises AlreadyMapped: one place is taken."""
        spec = self.fmt.levels[seg.level]
        old = needed.row[seg.table] >= 0
        if not old.any():
            return []
        replaced: list[U64] = []
        there = _Segments(
            seg.level, seg.key[old], seg.index[old], seg.count[old], seg.pa[old], seg.prot[old],
            seg.unique, seg.table[old],
        )  # fmt: skip
        flat = self._words.reshape(-1)
        for part in _batches(there.count):
            where, owner, _ = _places(there, needed.row, part, spec.items)
            item = flat[where].astype(np.uint64, copy=False) ^ self._invert
            busy = np.flatnonzero(item & np.uint64(self.fmt.occupied_mask))
            if len(busy):
                index = (where[busy] & (spec.items - 1)).astype(np.uint64)
                key = there.key[part][owner[busy]] if owner is not None else there.key[part][busy]
                iova = ((key << np.uint64(spec.index_bits)) + index) << np.uint64(spec.shift)
                replaced += self._emptied(seg.level, item[busy], iova)
        return replaced

    def _write(self, seg: _Segments, rows: I64) -> None:
        spec = self.fmt.levels[seg.level]
        full = np.flatnonzero(seg.count == spec.items)
        if len(full) and self._tm.plain:
            first = self.fmt.leaf_items(seg.level, seg.pa[full], seg.prot[full])
            ramp = np.arange(spec.items, dtype=np.uint64) << np.uint64(spec.shift)
            place = rows[seg.table[full]]
            for n, row in enumerate(place.tolist()):
                np.add(ramp, first[n], out=self._words[row])
            if len(full) == len(seg.count):
                return
            rest = seg.count != spec.items
            seg = _Segments(
                seg.level, seg.key[rest], seg.index[rest], seg.count[rest], seg.pa[rest], seg.prot[rest],
                seg.unique, seg.table[rest],
            )  # fmt: skip
        flat = self._words.reshape(-1)
        for part in _batches(seg.count):
            where, owner, inner = _places(seg, rows, part, spec.items)
            pa, prot = seg.pa[part], seg.prot[part]
            if owner is not None and inner is not None:
                pa = pa[owner] + (inner.astype(np.uint64) << np.uint64(spec.shift))
                prot = prot[owner]
            flat[where] = self.fmt.leaf_items(seg.level, pa, prot)

    # -- unmap -----------------------------------------------------------------------------------------

    def unmap(self, iova: int, last: int) -> Leaves:
        """Remove every leaf of [iova, last]; emptied tables stay linked. Holes are no error.

        :return: what was removed.
        :raises ValueError: a leaf is only partly inside. Nothing was changed.
        """
        found, rows, index = self._look(iova, last)
        lasts = found.last
        if len(found) and (int(found.iova[0]) < iova or int(lasts[-1]) > last):
            part = 0 if int(found.iova[0]) < iova else -1
            raise ValueError(
                f"[{iova:#x}, {last:#x}] cuts the leaf [{int(found.iova[part]):#x}, {int(lasts[part]):#x}]"
            )
        if len(rows):
            self._words[rows, index] = 0
        return found

    def _look(self, start: int, last: int) -> tuple[Leaves, I64, I64]:
        """Leaves that touch [start, last], with row and index of each item; as Linux sees them."""
        if start > last:
            raise ValueError(f"[{start:#x}, {last:#x}] is no range")
        fmt = self.fmt
        if last - start < _SMALL_SPAN:
            parts: list[tuple[Items, I64, I64]] = []
            for a, b in raw_ranges(fmt, start, last):
                self._look_small(fmt.top_level, self._row(self.root_pa), 0, 3, a, b, parts)
            if not parts:
                none = np.zeros(0, np.int64)
                return Leaves.of(fmt, Items.join([])), none, none
            items = Items.join([p[0] for p in parts])
            return (
                Leaves.of(fmt, items),
                np.concatenate([p[1] for p in parts]),
                np.concatenate([p[2] for p in parts]),
            )
        items, _ = leaf_items(self._tm, self.root_pa, start, last)
        size = np.uint64(fmt.table_bytes - 1)
        index = ((items.at & size) // np.uint64(fmt.item_bytes)).astype(np.int64)
        return Leaves.of(fmt, items), self._rows(items.at & ~size), index

    def _look_small(
        self, level: int, row: int, base: int, prot: int, a: int, b: int, out: list[tuple[Items, I64, I64]]
    ) -> None:
        fmt, spec = self.fmt, self.fmt.levels[level]
        lo, hi = max(a - base, 0) >> spec.shift, min((b - base) >> spec.shift, spec.items - 1)
        items = self._words[row, lo : hi + 1].astype(np.uint64, copy=False) ^ self._invert
        index = np.flatnonzero(items & np.uint64(fmt.occupied_mask))
        if not len(index):
            return
        found = items[index]
        leaf = self._are_leaves(level, found)
        if leaf.all():
            out.append(self._found(level, row, base, prot, found, index + lo))
            return
        for i, item, is_leaf in zip((index + lo).tolist(), found.tolist(), leaf.tolist(), strict=True):
            if is_leaf:
                one = np.array([i], np.int64)
                out.append(self._found(level, row, base, prot, np.array([item], np.uint64), one))
                continue
            through = (
                int(item & spec.tr_mask == spec.tr_value) | int(item & spec.tw_mask == spec.tw_value) << 1
            )
            below = self._row(item & spec.table_pa_mask)
            self._look_small(level - 1, below, base + (i << spec.shift), prot & through, a, b, out)

    def _found(
        self, level: int, row: int, base: int, prot: int, items: U64, index: I64
    ) -> tuple[Items, I64, I64]:
        spec, n = self.fmt.levels[level], len(items)
        r = (items & np.uint64(spec.r_mask)) == np.uint64(spec.r_value)
        w = (items & np.uint64(spec.w_mask)) == np.uint64(spec.w_value)
        grants = (r.view(np.uint8) | (w.view(np.uint8) << np.uint8(1))) & np.uint8(prot)
        iova = np.uint64(base) + (index.astype(np.uint64) << np.uint64(spec.shift))
        pa = items & np.uint64(spec.leaf_pa_mask)
        levels, lg2 = np.full(n, level, np.uint8), np.full(n, spec.shift, np.uint8)
        leaves = Items(iova, pa, levels, grants, items, np.zeros(n, np.uint64), lg2)
        return leaves, np.full(n, row, np.int64), index

    # -- looking ---------------------------------------------------------------------------------------

    def iova_to_phys(self, iovas: U64) -> U64:
        """Pa of each IOVA (uint64[n], any order and alignment), 0 where nothing translates, as Linux's
        ``iommu_iova_to_phys()`` says: permissions and reserved bits are not looked at.

        :raises MemoryAbsent: a table on the way is not in this memory.
        """
        fmt = self.fmt
        if len(iovas) <= 8:
            return np.array([self._one_to_phys(iova) for iova in iovas.tolist()], np.uint64)
        raw = iovas & np.uint64((1 << fmt.input_lg2) - 1)
        block = np.uint64(fmt.levels[0].shift + fmt.levels[0].index_bits)
        # Neighbours share all tables but the last look-up: walk once per run of them.
        first = _firsts(raw >> block)
        one = raw[first]
        row = np.full(len(first), self._row(self.root_pa), np.int64)
        done = np.zeros(len(first), np.bool_)
        pa, mask = np.zeros(len(first), np.uint64), np.zeros(len(first), np.uint64)
        for level in range(fmt.top_level, 0, -1):
            spec = fmt.levels[level]
            index = ((one >> np.uint64(spec.shift)) & np.uint64(spec.items - 1)).astype(np.int64)
            item = self._load(row, index)
            there = ((item & np.uint64(fmt.occupied_mask)) != 0) & ~done
            leaf = self._are_leaves(level, item) & there
            if leaf.any():
                pa[leaf] = item[leaf] & np.uint64(spec.leaf_pa_mask)
                mask[leaf] = np.uint64((1 << spec.shift) - 1)
            down = there & ~leaf
            done = ~down
            row = np.zeros(len(first), np.int64)
            row[down] = self._rows(item[down] & np.uint64(spec.table_pa_mask))
        spec = fmt.levels[0]
        if len(first) != len(raw):
            owner = np.zeros(len(raw), np.int64)
            owner[first[1:]] = 1
            owner = np.cumsum(owner)
            row, done, pa, mask = row[owner], done[owner], pa[owner], mask[owner]
        index = ((raw >> np.uint64(spec.shift)) & np.uint64(spec.items - 1)).astype(np.int64)
        item = self._load(row, index)
        last = (item & np.uint64(spec.leaf_pa_mask)) | (raw & np.uint64((1 << spec.shift) - 1))
        last[(item & np.uint64(fmt.occupied_mask)) == 0] = 0
        large = pa | (raw & mask)
        found = np.where(done, large, last)
        found[~fmt.covers_array(iovas)] = 0
        return found

    def _one_to_phys(self, iova: int) -> int:
        fmt = self.fmt
        if not fmt.covers(iova):
            return 0
        row = self._row(self.root_pa)
        for level in range(fmt.top_level, -1, -1):
            spec = fmt.levels[level]
            item = self._item(row, (iova >> spec.shift) & (spec.items - 1))
            if not item & fmt.occupied_mask:
                return 0
            if self._is_leaf(level, item):
                return (item & spec.leaf_pa_mask) | (iova & ((1 << spec.shift) - 1))
            row = self._row(item & spec.table_pa_mask)
        return 0

    def leaves(self, start: int = 0, last: int | None = None) -> Leaves:
        """The leaves that touch the IOVAs [start, last], sorted, as Linux sees them."""
        return self._look(start, 2**64 - 1 if last is None else last)[0]

    def pages(self) -> U64:
        """Pas of every table page, sorted, the root included."""
        upper = descend(self._tm, self.root_pa)
        raise_unreadable(self.fmt, upper.problems)
        return np.unique(np.concatenate(upper.pages))

    def free_all(self) -> None:
        """Give every table page, the root included, to ``free``; the table is of no use afterwards."""
        self._free(self.pages())


def _firsts(values: U64) -> NDArray[np.intp]:
    """Positions where a value differs from the one before."""
    if not len(values):
        return np.zeros(0, np.intp)
    return np.concatenate((np.zeros(1, np.intp), np.flatnonzero(values[1:] != values[:-1]) + 1))


def choose_leaves(fmt: Format, iova: U64, length: U64, pa: U64, prot: U8, max_lg2: int | None) -> list[_Runs]:
    """Leaf sizes as ``iommu_pgsize()`` takes them: runs per level, from large to small. ``iova`` is raw."""
    sizes = [
        n for n, level in enumerate(fmt.levels) if level.leaf and (max_lg2 is None or level.shift <= max_lg2)
    ]
    if not sizes:
        raise ValueError(f"{fmt.name} has no leaf of at most 2**{max_lg2} bytes")
    out = []
    for level in reversed(sizes[1:]):
        size = np.uint64(1 << fmt.levels[level].shift)
        mask = size - np.uint64(1)
        begin, end = (iova + mask) & ~mask, (iova + length) & ~mask
        fits = (((iova ^ pa) & mask) == 0) & (end > begin)
        if not fits.any():
            continue
        b, e, i, n = begin[fits], end[fits], iova[fits], length[fits]
        count = ((e - b) >> np.uint64(fmt.levels[level].shift)).astype(np.int64)
        out.append(_sorted(_Runs(level, b, count, pa[fits] + (b - i), prot[fits])))
        rest = ~fits
        head, tail = b > i, i + n > e
        iova, length, pa, prot = (
            np.concatenate((iova[rest], i[head], e[tail])),
            np.concatenate((length[rest], (b - i)[head], (i + n - e)[tail])),
            np.concatenate((pa[rest], pa[fits][head], (pa[fits] + (e - i))[tail])),
            np.concatenate((prot[rest], prot[fits][head], prot[fits][tail])),
        )
    level = sizes[0]
    if len(iova):
        count = (length >> np.uint64(fmt.levels[level].shift)).astype(np.int64)
        out.append(_sorted(_Runs(level, iova, count, pa, prot)))
    return out


def _sorted(runs: _Runs) -> _Runs:
    if bool((runs.iova[1:] > runs.iova[:-1]).all()):
        return runs
    order = np.argsort(runs.iova, kind="stable")
    return _Runs(runs.level, runs.iova[order], runs.count[order], runs.pa[order], runs.prot[order])


def _cut(fmt: Format, runs: _Runs) -> _Segments:
    """Runs cut where one table ends and the next begins."""
    spec = fmt.levels[runs.level]
    shift, bits = np.uint64(spec.shift), np.uint64(spec.index_bits)
    start = runs.iova >> shift  # in items
    key = start >> bits
    last_key = (start + runs.count.astype(np.uint64) - np.uint64(1)) >> bits
    pa, prot, count = runs.pa, runs.prot, runs.count
    if bool((last_key != key).any()):
        parts = (last_key - key).astype(np.int64) + 1
        owner = np.repeat(np.arange(len(parts)), parts)
        nth = np.arange(len(owner)) - np.repeat(np.cumsum(parts) - parts, parts)
        key = key[owner] + nth.astype(np.uint64)
        begin = np.maximum(start[owner], key << bits)
        end = np.minimum((start + count.astype(np.uint64))[owner], (key + np.uint64(1)) << bits)
        pa, prot = pa[owner] + ((begin - start[owner]) << shift), prot[owner]
        start, count = begin, (end - begin).astype(np.int64)
    index = (start & np.uint64(spec.items - 1)).astype(np.int64)
    first = _firsts(key)
    step = np.zeros(len(key), np.int64)
    step[first[1:]] = 1
    return _Segments(runs.level, key, index, count, pa, prot, key[first], np.cumsum(step))


def _batches(count: I64) -> list[slice]:
    """Slices of segments of about _BATCH items each; a segment is never cut."""
    ends = np.cumsum(count)
    cuts = np.searchsorted(ends, np.arange(_BATCH, int(ends[-1]) + _BATCH, _BATCH), side="left") + 1
    bounds = np.unique(np.concatenate((np.zeros(1, np.int64), np.minimum(cuts, len(ends)))))
    return [slice(lo, hi) for lo, hi in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]


def _places(seg: _Segments, rows: I64, part: slice, items: int) -> tuple[I64, I64 | None, I64 | None]:
    """Flat item numbers in memory of the segments ``part``; which segment owns each, and its place therein.

    Owner and place are None where every segment is one item.
    """
    base = rows[seg.table[part]] * items + seg.index[part]
    count = seg.count[part]
    total = int(count.sum())
    if total == len(count):
        return base, None, None
    owner = np.repeat(np.arange(len(count)), count)
    inner = np.arange(total) - np.repeat(np.cumsum(count) - count, count)
    return base[owner] + inner, owner, inner
