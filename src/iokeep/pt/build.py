# SPDX-License-Identifier: Apache-2.0
"""Building tables: map and unmap as Linux's generic page-table code does them, by whole arrays.

Source for what the results look like: drivers/iommu/iommu.c (``iommu_pgsize()``: leaf sizes) and
drivers/iommu/generic_pt/iommu_pt.h (``map_pages``, ``unmap_pages``, 7.3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from iokeep.errors import MemoryAbsent
from iokeep.mem.arrays import unique
from iokeep.mem.memory import I64, U8, U64, WritableMemory
from iokeep.pt.choice import loaded, worth_compiled
from iokeep.pt.extents import Extents
from iokeep.pt.formats.base import Contig, Format
from iokeep.pt.leaves import Leaves
from iokeep.pt.mapped import Mapped
from iokeep.pt.segments import Runs, Segments, batches, choose_leaves, cut, firsts, places, sizes_of
from iokeep.pt.tables import descend, raise_unreadable

#: n -> pas (uint64[n]) of n zeroed tables, aligned to their size: ``fmt.table_bytes``, or the size given as
#: the second argument, where a table of this format is larger or smaller than that
TableAllocator = Callable[..., U64]
#: pas (uint64[n]) of tables that nothing links to any more, and their size as for the allocator. The caller
#: flushes the IOTLB before they are reused.
TableFree = Callable[..., None]

#: tables of level 0 from so many bytes on are written by compiled code, where it is loaded and where it is
#: not: whole tables, which NumPy writes well, and single pages
COMPILED_WARM = 1 << 20
COMPILED_COLD = 1 << 30
COMPILED_COLD_PAGES = 64 << 20
#: a map of up to so many extents and items goes item by item
_SMALL_EXTENTS = 4
_SMALL_ITEMS = 1024


class AlreadyMapped(ValueError):
    """A map met an IOVA that is mapped (Linux: -EADDRINUSE). Nothing was changed.

    :param iova: the first one met, in bytes.
    """

    def __init__(self, iova: int) -> None:
        super().__init__(f"iova {iova:#x} is already mapped")
        self.iova = iova


@dataclass(slots=True)
class _Needed:
    """Tables of one level that a map goes through: sorted keys, pas and rows (-1: to be allocated)."""

    key: U64
    pa: U64
    row: I64


class Table(Mapped):
    """A page table in writable memory.

    :param fmt: format. :param mem: memory. :param root_pa: pa of its root.
    :param alloc: gives zeroed table pages. :param free: takes pages that were unlinked, after the store that
    did so.
    """

    def __init__(
        self, fmt: Format, mem: WritableMemory, root_pa: int, alloc: TableAllocator, free: TableFree
    ) -> None:
        super().__init__(fmt, mem, root_pa)
        self.mem = mem
        self._alloc = alloc
        self._free = free
        #: (level, log2 size, contiguous entry) of the leaves that Linux makes, from large to small
        self._all_sizes = sizes_of(fmt, None)

    @classmethod
    def create(cls, fmt: Format, mem: WritableMemory, alloc: TableAllocator, free: TableFree) -> Table:
        """An empty table: its root comes from ``alloc`` too."""
        table = cls(fmt, mem, int(_tables(fmt, fmt.top_level, 1, alloc)[0]), alloc, free)
        table._clear(fmt.top_level, np.array([table._row(fmt.top_level, table.root_pa)], np.int64))
        return table

    def grown(self, fmt: Format) -> Table:
        """This table under a new root one level higher, as Linux grows an AMD v1 table. The old root stays
        what it is; the caller makes hardware use the new one.

        :param fmt: the format with one level more.
        :raises ValueError: the format cannot grow so.
        """
        old, top = self.fmt, fmt.top_level
        if fmt.name != old.name or fmt.levels[:-1] != old.levels or fmt.sign_extend or fmt.iova_base:
            raise ValueError(f"a table of {old.name} does not grow into the given format")
        table = Table.create(fmt, self.mem, self._alloc, self._free)
        item = fmt.table_items(top, np.array([self.root_pa], np.uint64))[0]
        table._words[top][table._row(top, table.root_pa), 0] = item
        return table

    def _clear(self, level: int, rows: I64) -> None:
        """Make zeroed tables empty, where an empty item is not 0."""
        if self.fmt.levels[level].invert:
            self._words[level][rows] = self._inverts[level]

    def _leaf_words(self, level: int, contig: Contig | None, pa: U64, prot: U8) -> U64:
        """Items for the OAs ``pa``, each that of its own item."""
        if contig is not None and contig.replicated:
            size = 1 << (self.fmt.levels[level].shift + contig.lg2)
            pa = pa & ~np.uint64(size - 1)
        return self.fmt.leaf_items(level, pa, prot, contig)

    # -- map -------------------------------------------------------------------------------------------

    def map(
        self,
        extents: Extents,
        max_lg2: int | None = None,
        *,
        compiled: bool | None = None,
        threads: int | None = None,
    ) -> None:
        """Map every extent, with the leaf sizes that ``iommu_map`` chooses: at each point the largest that
        divides iova and pa and fits. All or nothing.

        A large leaf takes the place of an emptied table, which then goes to ``free``.

        :param extents: sorted, disjoint; multiples of the smallest leaf; prot not 0.
        :param max_lg2: no leaf is larger than 2**max_lg2 bytes (a domain's pgsize_bitmap).
        :param compiled: write tables by Numba (True), by NumPy alone (False), or by size (None). The result
            is the same.
        :param threads: of compiled writing; None = as ``kernels.thread_count`` says.
        :raises AlreadyMapped: an IOVA of them is mapped. Nothing was changed.
        :raises ValueError: an extent cannot be expressed. Nothing was changed.
        """
        if not len(extents):
            return
        if len(extents) >= _SMALL_ITEMS and self._compiled(len(extents), compiled, COMPILED_COLD_PAGES):
            page = self.fmt.levels[0].shift
            if (max_lg2 is None or max_lg2 >= page) and self._map_pages(extents, threads):
                return
        iova, length = self._checked(extents)
        items = (
            int(length.sum()) >> self.fmt.levels[0].shift if len(extents) <= _SMALL_EXTENTS else _SMALL_ITEMS
        )
        if items < _SMALL_ITEMS:
            columns = (iova.tolist(), length.tolist(), extents.pa.tolist(), extents.prot.tolist())
            self._map_small([run for row in zip(*columns, strict=True) for run in self._runs(*row, max_lg2)])
        else:
            runs = choose_leaves(self.fmt, iova, length, extents.pa, extents.prot, max_lg2)
            if not self._map_run(runs, compiled, threads):
                self._map_arrays(runs, compiled, threads)

    def _compiled(self, items: int, asked: bool | None, cold: int = COMPILED_COLD) -> bool:
        """Whether so many items of level 0 are written by compiled code: as asked, or where it is faster.

        :param cold: bytes of tables that are worth its start.
        """
        if not worth_compiled(asked, "fill", items * self.fmt.item_bytes, COMPILED_WARM, cold):
            return False
        spec = self.fmt.levels[0]
        plain = self._tm.plain and self._uniform and not spec.pa_pieces
        return plain and self._words[0].dtype == np.uint64

    def map_frames(
        self,
        iova: int,
        pas: U64,
        prot: int,
        *,
        compiled: bool | None = None,
        threads: int | None = None,
    ) -> None:
        """Map single pages of the smallest size at neighbouring IOVAs from ``iova`` on, each to a pa of its
        own: what a list of pinned pages is. The result is that of :meth:`map` of an extent for each, whose
        columns are three times as large as the tables; this reads 8 bytes a page.

        :param pas: uint64[n], in order of IOVA. :param prot: of all. :param compiled: :param threads: as for
            :meth:`map`.
        :raises AlreadyMapped, ValueError: as :meth:`map`. Nothing was changed.
        """
        spec = self.fmt.levels[0]
        n, size = len(pas), 1 << spec.shift
        if n >= _SMALL_ITEMS and prot in (1, 2, 3) and self._compiled(n, compiled, COMPILED_COLD_PAGES):
            from iokeep.pt import fill

            def write(words: U64, row: I64) -> bool:
                return fill.frames(self.fmt, words, row, iova, pas, prot, threads)

            if fill.in_line(self.fmt, iova, iova + n * size - 1, n) and self._map_new(iova, n, write):
                return
        begin = np.uint64(iova) + (np.arange(n, dtype=np.uint64) << np.uint64(spec.shift))
        last = begin + np.uint64(size - 1)
        self.map(Extents(begin, last, pas, np.full(n, prot, np.uint8)), spec.shift, compiled=compiled)

    def _map_run(self, runs: list[Runs], compiled: bool | None, threads: int | None) -> bool:
        """Map one run of single pages into new tables, as most of a guest's memory is. False = they are
        something else; nothing was changed.
        """
        one = runs[0]
        if len(runs) > 1 or len(one.iova) > 1 or one.level or one.contig is not None:
            return False
        n, iova, pa, prot = int(one.count[0]), int(one.iova[0]), int(one.pa[0]), int(one.prot[0])
        if not self._compiled(n, compiled):
            return False
        from iokeep.pt import fill

        def write(words: U64, row: I64) -> bool:
            fill.run(self.fmt, words, row, iova, pa, n, prot, threads)
            return True

        return self._map_new(iova, n, write)

    def _map_pages(self, e: Extents, threads: int | None) -> bool:
        """Map single pages of neighbouring IOVAs into new tables, checked as they are written. False = they
        are something else; nothing was changed.
        """
        from iokeep.pt import fill

        def write(words: U64, row: I64) -> bool:
            return fill.pages(self.fmt, words, row, e, threads)

        first = int(e.iova[0])
        in_line = fill.in_line(self.fmt, first, int(e.last[-1]), len(e))
        return in_line and self._map_new(first, len(e), write)

    def _map_new(self, iova: int, n: int, write: Callable[[U64, I64], bool]) -> bool:
        """Map ``n`` pages from ``iova`` on into new tables. False = tables are there already, the format has
        no such leaf, or ``write`` says so; nothing was changed.

        :param write: given all memory (uint64[rows, items]) and the rows of the tables, writes their items.
        """
        fmt, spec = self.fmt, self.fmt.levels[0]
        if spec.shift not in spec.lg2s:
            return False
        low = (1 << fmt.input_lg2) - 1
        bits = spec.shift + spec.index_bits
        first, last = (iova & low) >> bits, ((iova + (n << spec.shift) - 1) & low) >> bits
        keys = [np.arange(first, last + 1, dtype=np.uint64)]
        keys += [np.zeros(0, np.uint64) for _ in fmt.levels[1:]]
        try:
            needed = self._needed(keys)
        except (ValueError, MemoryAbsent):  # the general way says what is wrong, and with what first
            return False
        if int(needed[0].row.max()) >= 0:
            return False
        missing = self._allocated(needed)
        if not write(self._words[0].view(np.uint64), needed[0].row):
            self._give_back([(level, needed[level].pa[new]) for level, new in enumerate(missing)])
            return False
        self._link(needed, missing)
        return True

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
        output = np.uint64(~fmt.levels[0].leaf_pa(2**64 - 1) & (2**64 - 1)) & ~small
        if bool(((extents.pa | (extents.pa + (length - one))) & output).any()) or bool(
            (extents.pa + (length - one) < extents.pa).any()
        ):
            raise ValueError("an extent's pa is beyond the output bits of this table")
        if bool(((extents.prot == 0) | (extents.prot > 3)).any()):
            raise ValueError("an extent has neither read nor write permission")
        return extents.iova & np.uint64((1 << fmt.input_lg2) - 1), length

    def _runs(self, iova: int, length: int, pa: int, prot: int, max_lg2: int | None) -> list[_Small]:
        """:func:`choose_leaves` of one extent, in order."""
        sizes = self._all_sizes if max_lg2 is None else sizes_of(self.fmt, max_lg2)
        out = []
        while length:
            fits = (
                i
                for i, (_, lg2, _) in enumerate(sizes)
                if length >> lg2 and not (iova | pa) & ((1 << lg2) - 1)
            )
            n = next(fits)
            level, lg2, contig = sizes[n]
            count = length >> lg2
            if n:  # up to where a larger leaf fits
                larger = 1 << sizes[n - 1][1]
                ahead = -iova & (larger - 1)
                if not (iova ^ pa) & (larger - 1) and ahead and ahead + larger <= length:
                    count = ahead >> lg2
            items = count if contig is None else count << contig.lg2
            out.append((level, contig, iova, items, pa, prot))
            iova, pa, length = iova + (count << lg2), pa + (count << lg2), length - (count << lg2)
        return out

    def _map_small(self, runs: list[_Small]) -> None:
        fmt = self.fmt
        # (level, key) -> row, or -1 where the table is still to be allocated
        rows: dict[tuple[int, int], int] = {(fmt.top_level, 0): self._row(fmt.top_level, self.root_pa)}
        new: list[tuple[int, int]] = []

        def resolve(level: int, key: int, iova: int) -> int:
            row = rows.get((level, key))
            if row is not None:
                return row
            spec = fmt.levels[level + 1]
            bits = spec.index_bits
            parent = resolve(level + 1, key >> bits, iova)
            item = self._item(level + 1, parent, key & ((1 << bits) - 1)) if parent >= 0 else 0
            if parent < 0 or not item & self._occupied[level + 1]:
                new.append((level, key))
                row = -1
            elif spec.is_leaf(item):
                raise AlreadyMapped(self._extended(iova))
            else:
                row = self._row(level, self._table(level + 1, item))
            rows[level, key] = row
            return row

        todo: list[tuple[int, Contig | None, int, int, int, int, int]] = []
        replaced: list[tuple[int, U64]] = []
        for level, contig, iova, count, pa, prot in runs:
            spec = fmt.levels[level]
            while count:
                key, index = iova >> (spec.shift + spec.index_bits), (iova >> spec.shift) & (spec.items - 1)
                n = min(count, spec.items - index)
                row = resolve(level, key, iova)
                if row >= 0:
                    there = self._words[level][row, index : index + n].astype(np.uint64, copy=False)
                    there = there ^ self._inverts[level]
                    busy = np.flatnonzero(there & np.uint64(self._occupied[level]))
                    if len(busy):
                        at = np.uint64(iova) + (busy.astype(np.uint64) << np.uint64(spec.shift))
                        replaced += self._emptied(level, there[busy], at)
                todo.append((level, contig, key, index, n, pa, prot))
                iova, count, pa = iova + (n << spec.shift), count - n, pa + (n << spec.shift)
        pas: dict[tuple[int, int], int] = {}
        for level in sorted({place[0] for place in new}) if not self._uniform else [0] if new else []:
            places = new if self._uniform else [place for place in new if place[0] == level]
            tables = _tables(fmt, level, len(places), self._alloc)
            for place, table in zip(places, tables.tolist(), strict=True):
                pas[place] = table
                rows[place] = row = self._row(place[0], table)
                if fmt.levels[place[0]].invert:
                    self._words[place[0]][row] = self._inverts[place[0]]
        for level, contig, key, index, n, pa, prot in todo:
            spec = fmt.levels[level]
            step = np.arange(n, dtype=np.uint64) << np.uint64(spec.shift)
            if contig is None and not spec.pa_shift and not spec.pa_pieces:
                words = step + np.uint64(pa | fmt.leaf_bits(level, prot))
            else:
                prots = np.full(n, prot, np.uint8)
                words = self._leaf_words(level, contig, step + np.uint64(pa), prots)
            self._words[level][rows[level, key], index : index + n] = words
        # The lowest first: what hardware can reach is complete at every moment.
        for (level, key), table in sorted(pas.items()):
            bits = fmt.levels[level + 1].index_bits
            item = fmt.table_items(level + 1, np.array([table], np.uint64))[0]
            self._words[level + 1][rows[level + 1, key >> bits], key & ((1 << bits) - 1)] = item
        self._give_back(replaced)

    def _give_back(self, tables: list[tuple[int, U64]]) -> None:
        """Free tables of levels."""
        sizes = {level: self.fmt.bytes_of(level) for level, _ in tables}
        for size in sorted(set(sizes.values())):
            pas = np.concatenate([pas for level, pas in tables if sizes[level] == size])
            if _standard(self.fmt, size):
                self._free(pas)
            else:
                self._free(pas, size)

    def _emptied(self, level: int, items: U64, iovas: U64) -> list[tuple[int, U64]]:
        """Level and pas of the tables that ``items`` of ``level`` point to; they hold no leaf.

        Linux: clear_contig() and __collect_tables() in iommu_pt.h. :raises AlreadyMapped: an item is a leaf,
        or a leaf lies below.
        """
        spec = self.fmt.levels[level]
        leaf = spec.are_leaves(items)
        if leaf.any():
            raise AlreadyMapped(self._extended(int(iovas[leaf][0])))
        pages = []
        while len(items):
            pas = self._below(level, items)
            level -= 1
            spec = self.fmt.levels[level]
            pages.append((level, pas))
            below = self._words[level][self._rows(level, pas)].astype(np.uint64) ^ self._inverts[level]
            table, index = np.nonzero(below & np.uint64(self._occupied[level]))
            items = below[table, index]
            iovas = iovas[table] + (index.astype(np.uint64) << np.uint64(spec.shift))
            leaf = spec.are_leaves(items)
            if leaf.any():
                raise AlreadyMapped(self._extended(int(iovas[leaf][0])))
        return pages

    def _map_arrays(self, runs: list[Runs], compiled: bool | None, threads: int | None) -> None:
        fmt = self.fmt
        segments = [cut(fmt, run) for run in runs]
        keys = [np.zeros(0, np.uint64) for _ in fmt.levels]
        for seg in segments:  # a level with contiguous entries has several
            keys[seg.level] = unique(keys[seg.level], seg.unique) if len(keys[seg.level]) else seg.unique
        needed = self._needed(keys)
        for seg in segments:  # other sizes may need tables of the same level
            if len(needed[seg.level].key) != len(seg.unique):
                seg.table = np.searchsorted(needed[seg.level].key, seg.unique)[seg.table]
        replaced: list[tuple[int, U64]] = []
        for seg in segments:
            replaced += self._check_free(seg, needed[seg.level])
        missing = self._allocated(needed)
        for seg in segments:
            self._write(seg, needed[seg.level].row, compiled, threads)
        self._link(needed, missing)
        self._give_back(replaced)

    def _allocated(self, needed: list[_Needed]) -> list[NDArray[np.intp]]:
        """Give the tables that are missing memory; which they are, per level."""
        fmt = self.fmt
        missing = [np.flatnonzero(n.row < 0) for n in needed]
        total = sum(len(m) for m in missing)
        if total:
            pas, place = self._alloc(total) if self._uniform else np.zeros(0, np.uint64), 0
            for level in range(fmt.top_level, -1, -1):
                at, new = needed[level], missing[level]
                if not len(new):
                    continue
                if self._uniform:
                    given = pas[place : place + len(new)]
                    place += len(new)
                else:
                    given = _tables(fmt, level, len(new), self._alloc)
                rows = self._rows(level, given)
                self._clear(level, rows)
                if len(new) == len(at.pa):
                    at.pa, at.row = given, rows
                else:
                    at.pa[new], at.row[new] = given, rows
        return missing

    def _link(self, needed: list[_Needed], missing: list[NDArray[np.intp]]) -> None:
        """Point to the new tables."""
        fmt = self.fmt
        # The lowest first: what hardware can reach is complete at every moment.
        for level, new in enumerate(missing[:-1]):
            if len(new):
                at, above, bits = needed[level], needed[level + 1], fmt.levels[level + 1].index_bits
                key, pa = (at.key, at.pa) if len(new) == len(at.key) else (at.key[new], at.pa[new])
                words, items = self._words[level + 1], fmt.table_items(level + 1, pa)
                if loaded("fill") and words.dtype == items.dtype and _in_line(above.key):
                    from iokeep.pt import fill

                    fill.link(words, above.row, key, above.key[0], np.uint64(bits), items)
                else:
                    of, index = _above(key, above.key, bits)
                    words[above.row[of], index] = items

    def _needed(self, keys: list[U64]) -> list[_Needed]:
        """Tables of every level on the way to those with the sorted ``keys``, per level.

        :raises AlreadyMapped: a leaf is in the way.
        """
        fmt = self.fmt
        for level in range(fmt.top_level):
            up = _shifted(keys[level], fmt.levels[level + 1].index_bits)
            keys[level + 1] = unique(keys[level + 1], up) if len(keys[level + 1]) else up
        root = np.array([self.root_pa], np.uint64)
        out = [_Needed(np.zeros(1, np.uint64), root, self._rows(fmt.top_level, root))]
        for level in range(fmt.top_level - 1, -1, -1):
            above, key = out[0], keys[level]
            pa, row = np.zeros(len(key), np.uint64), np.full(len(key), -1, np.int64)
            out.insert(0, _Needed(key, pa, row))
            if bool((above.row < 0).all()):
                continue
            of, index = _above(key, above.key, fmt.levels[level + 1].index_bits)
            parent = above.row[of]
            linked = np.flatnonzero(parent >= 0)
            item = self._load(level + 1, parent[linked], index[linked])
            there = (item & np.uint64(self._occupied[level + 1])) != 0
            linked, item = linked[there], item[there]
            leaf = fmt.levels[level + 1].are_leaves(item)
            if leaf.any():
                spec = fmt.levels[level]
                raise AlreadyMapped(
                    self._extended(int(key[linked[leaf]][0]) << (spec.shift + spec.index_bits))
                )
            pa[linked] = self._below(level + 1, item)
            row[linked] = self._rows(level, pa[linked])
        return out

    def _check_free(self, seg: Segments, needed: _Needed) -> list[tuple[int, U64]]:
        """Level and pas of emptied tables where the leaves go. :raises AlreadyMapped: one place is taken."""
        spec = self.fmt.levels[seg.level]
        old = needed.row[seg.table] >= 0
        if not old.any():
            return []
        replaced: list[tuple[int, U64]] = []
        there = Segments(
            seg.level, seg.contig, seg.key[old], seg.index[old], seg.count[old], seg.pa[old], seg.prot[old],
            seg.unique, seg.table[old],
        )  # fmt: skip
        flat = self._words[seg.level].reshape(-1)
        for part in batches(there.count):
            where, owner, _ = places(there, needed.row, part, spec.items)
            item = flat[where].astype(np.uint64, copy=False) ^ self._inverts[seg.level]
            busy = np.flatnonzero(item & np.uint64(self._occupied[seg.level]))
            if len(busy):
                index = (where[busy] & (spec.items - 1)).astype(np.uint64)
                key = there.key[part][owner[busy]] if owner is not None else there.key[part][busy]
                iova = ((key << np.uint64(spec.index_bits)) + index) << np.uint64(spec.shift)
                replaced += self._emptied(seg.level, item[busy], iova)
        return replaced

    def _write(self, seg: Segments, rows: I64, compiled: bool | None, threads: int | None) -> None:
        spec = self.fmt.levels[seg.level]
        full = np.flatnonzero(seg.count == spec.items)
        words = self._words[seg.level]
        fast = seg.level == 0 and self._compiled(len(full) * spec.items, compiled)
        simple = self._tm.plains[seg.level] and seg.contig is None and not spec.pa_pieces
        if len(full) and (fast or simple):
            every = len(full) == len(seg.count)
            some: NDArray[np.intp] | slice = slice(None) if every else full
            first = self._leaf_words(seg.level, seg.contig, seg.pa[some], seg.prot[some])
            place = rows if every and len(rows) == len(seg.table) else rows[seg.table[some]]
            if fast:
                from iokeep.pt import fill

                fill.ramps(self.fmt, words.view(np.uint64), place, first, seg.contig, threads)
            else:
                step = np.uint64((1 << spec.shift) >> spec.pa_shift)
                ramp = np.arange(spec.items, dtype=np.uint64) * step
                for n, row in enumerate(place.tolist()):
                    np.add(ramp, first[n], out=words[row])
            if every:
                return
            rest = seg.count != spec.items
            seg = Segments(
                seg.level, seg.contig, seg.key[rest], seg.index[rest], seg.count[rest], seg.pa[rest],
                seg.prot[rest], seg.unique, seg.table[rest],
            )  # fmt: skip
        flat = words.reshape(-1)
        for part in batches(seg.count):
            where, owner, inner = places(seg, rows, part, spec.items)
            pa, prot = seg.pa[part], seg.prot[part]
            if owner is not None and inner is not None:
                pa = pa[owner] + (inner.astype(np.uint64) << np.uint64(spec.shift))
                prot = prot[owner]
            flat[where] = self._leaf_words(seg.level, seg.contig, pa, prot)

    # -- unmap -----------------------------------------------------------------------------------------

    def unmap(self, iova: int, last: int) -> Leaves:
        """Remove every leaf of [iova, last]; emptied tables stay linked. Holes are no error.

        :return: what was removed.
        :raises ValueError: a leaf is only partly inside. Nothing was changed.
        """
        found, level, rows, index = self._look(iova, last)
        lasts = found.last
        if len(found) and (int(found.iova[0]) < iova or int(lasts[-1]) > last):
            part = 0 if int(found.iova[0]) < iova else -1
            raise ValueError(
                f"[{iova:#x}, {last:#x}] cuts the leaf [{int(found.iova[part]):#x}, {int(lasts[part]):#x}]"
            )
        levels = np.unique(level).tolist() if len(level) > 1 else level.tolist()
        for number in levels:
            r, i = rows, index
            if len(levels) > 1:
                mine = level == number
                r, i = rows[mine], index[mine]
            if self.fmt.levels[number].contig:
                lg2 = found.lg2 if len(levels) == 1 else found.lg2[mine]
                count = np.int64(1) << (lg2.astype(np.int64) - self.fmt.levels[number].shift)
                owner = np.repeat(np.arange(len(count)), count)
                inner = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
                r, i = r[owner], i[owner] + inner
            self._words[number][r, i] = self._inverts[number]
        return found

    def free_all(self) -> None:
        """Give every table, the root included, to ``free``; the table is of no use afterwards."""
        if self._uniform:
            self._free(self.pages())
            return
        upper = descend(self._tm, self.root_pa)
        raise_unreadable(self.fmt, upper.problems)
        top = self.fmt.top_level
        self._give_back([(top - n, unique(pas)) for n, pas in enumerate(upper.pages) if len(pas)])


def _in_line(values: U64) -> bool:
    """Sorted, different ``values`` have no gap."""
    return len(values) > 0 and int(values[-1]) - int(values[0]) == len(values) - 1


def _shifted(key: U64, bits: int) -> U64:
    """The different values of the sorted ``key`` without their low bits."""
    if _in_line(key):
        return np.arange(int(key[0]) >> bits, (int(key[-1]) >> bits) + 1, dtype=np.uint64)
    up = key >> np.uint64(bits)
    return up[firsts(up)]


def _above(key: U64, above: U64, bits: int) -> tuple[I64, I64]:
    """Position among the sorted keys ``above`` of the table above each of the tables with sorted ``key``, and
    the item there that points to it.
    """
    up, index = key >> np.uint64(bits), (key & np.uint64((1 << bits) - 1)).view(np.int64)
    if _in_line(above):
        return (up - above[0]).view(np.int64), index
    first = firsts(up)
    count = np.diff(first, append=len(up))
    return np.repeat(np.searchsorted(above, up[first]), count), index


#: level, contiguous entry, raw iova, items, pa, prot
_Small = tuple[int, Contig | None, int, int, int, int]


def _standard(fmt: Format, size: int) -> bool:
    """Tables of this size are allocated as ``fmt.table_bytes``; a small root gets a whole one."""
    return size == fmt.table_bytes or (size == fmt.root_bytes and size < fmt.table_bytes)


def _tables(fmt: Format, level: int, n: int, alloc: TableAllocator) -> U64:
    """n zeroed tables of a level."""
    size = fmt.bytes_of(level)
    return alloc(n) if _standard(fmt, size) else alloc(n, size)
