# SPDX-License-Identifier: Apache-2.0
"""Down through the tables of any format, level by level, whole arrays of tables at a time.

:func:`descend` flattens everything above the tables of level 0; :func:`expand` turns tables of level 0 into
leaves. All other jobs (leaves, extents, verify, diff, digest) are made of these two. Inside, an IOVA is
*raw*: its input bits only, 0 ... 2**input_lg2 - 1; ``Format.extend`` makes the IOVA that a device uses.

Nothing in a table is trusted. A page that serves at two levels is a loop: it is reported and not followed.
Sub-trees may be shared, but only so often that time and memory stay bounded by the size of the memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from iokeep.errors import InputError, MemoryAbsent
from iokeep.mem.memory import I64, U8, U64, Memory
from iokeep.pt.formats.base import Format

#: reasons of problems, as verdicts name them
RESERVED, ATTRS, LOOP, ABSENT = 1, 2, 3, 4
REASONS = {RESERVED: "reserved", ATTRS: "attrs", LOOP: "loop", ABSENT: "absent"}

#: so many visits to tables that were visited before are followed in one tree; beyond it is no table but a
#: bomb
SHARED_LIMIT = 1 << 16
#: tables worked on at once: 128 tables of 4 KiB stay in the second-level cache with their intermediates
CHUNK = 128


class TableMemory:
    """Tables of one format in one memory: the only place that loads items.

    :param fmt: the format. :param mem: where the tables are.
    :param linux: take items as Linux's page-table code does, not as hardware does: an item is there where any
        bit of ``occupied_mask`` is set, and nobody looks at reserved bits.
    """

    def __init__(self, fmt: Format, mem: Memory, *, linux: bool = False) -> None:
        self.fmt = fmt
        self.linux = linux
        self.mem = mem
        self.rows = mem.rows(fmt.table_bytes)
        #: rows of ``rows.data`` are uint64 items as they are
        self.plain = fmt.item_bytes == 8 and fmt.byte_order == "<" and fmt.invert == 0

    def present(self, level: int) -> np.uint64:
        """Any of these bits makes an item present."""
        return np.uint64(self.fmt.occupied_mask if self.linux else self.fmt.levels[level].valid_mask)

    @property
    def capacity(self) -> int:
        """Tables that this memory can hold at most."""
        return len(self.rows.data)

    def _decode(self, raw: U8) -> U64:
        items = raw.view(self.fmt.item_dtype)
        if self.plain:
            return items.view(np.uint64)
        return items.astype(np.uint64) ^ np.uint64(self.fmt.invert)

    def root(self, root_pa: int) -> U64:
        """Items of the root table, uint64[1, n]. :raises MemoryAbsent: it is not in this memory."""
        if root_pa % self.fmt.root_align or root_pa >> 64 or root_pa < 0:
            raise InputError(f"root_pa {root_pa:#x} is not a multiple of {self.fmt.root_align:#x}")
        raw = self.mem.read(root_pa, self.fmt.root_bytes)
        return self._decode(np.frombuffer(raw, np.uint8)).reshape(1, -1)

    def items(self, rows: I64) -> U64:
        """Items of the tables in ``rows`` (int64[n] row numbers), uint64[n, items]; may be a view of the
        memory.
        """
        first, n = int(rows[0]) if len(rows) else 0, len(rows)
        if n and int(rows[-1]) - first == n - 1 and bool((rows[1:] > rows[:-1]).all()):
            raw = self.rows.data[first : first + n]
        else:
            raw = np.take(self.rows.data, rows, axis=0)
        return self._decode(raw)


@dataclass(slots=True)
class Problems:
    """What is wrong in the tables themselves; arrays of equal length, in no particular order.

    ``iova``, ``last`` uint64[n] raw closed range that the item maps; ``reason`` uint8[n] of :data:`REASONS`;
    ``level`` uint8[n] of the table; ``at`` uint64[n] pa of the item; ``item`` uint64[n] its value.
    """

    iova: U64 = field(default_factory=lambda: np.zeros(0, np.uint64))
    last: U64 = field(default_factory=lambda: np.zeros(0, np.uint64))
    reason: U8 = field(default_factory=lambda: np.zeros(0, np.uint8))
    level: U8 = field(default_factory=lambda: np.zeros(0, np.uint8))
    at: U64 = field(default_factory=lambda: np.zeros(0, np.uint64))
    item: U64 = field(default_factory=lambda: np.zeros(0, np.uint64))

    def __len__(self) -> int:
        return len(self.iova)

    @classmethod
    def join(cls, parts: list[Problems]) -> Problems:
        """All of them, sorted by iova."""
        parts = [p for p in parts if len(p)]
        if not parts:
            return cls()
        order = np.argsort(np.concatenate([p.iova for p in parts]), kind="stable")
        columns = ("iova", "last", "reason", "level", "at", "item")
        return cls(*(np.concatenate([getattr(p, c) for p in parts])[order] for c in columns))

    def take(self, chosen: NDArray[np.bool_]) -> Problems:
        """Only the chosen ones."""
        columns = ("iova", "last", "reason", "level", "at", "item")
        return Problems(*(getattr(self, c)[chosen] for c in columns))


@dataclass(slots=True)
class Items:
    """Leaves, sorted by raw iova: ``iova``, ``pa``, ``item``, ``at`` (pa of the item) uint64[n]; ``level``,
    ``prot`` uint8[n].

    ``prot`` is what the leaf *and* all items above it grant; 0 = present, but nothing may pass.
    """

    iova: U64
    pa: U64
    level: U8
    prot: U8
    item: U64
    at: U64

    def __len__(self) -> int:
        return len(self.iova)

    @classmethod
    def join(cls, parts: list[Items], *, sort: bool = False) -> Items:
        """All of them, in the order given or sorted by iova."""
        columns = ("iova", "pa", "level", "prot", "item", "at")
        if len(parts) == 1:
            return parts[0]
        if not parts:
            z8, z64 = np.zeros(0, np.uint8), np.zeros(0, np.uint64)
            return cls(z64, z64, z8, z8, z64, z64)
        out = [np.concatenate([getattr(p, c) for p in parts]) for c in columns]
        if sort:
            order = np.argsort(out[0], kind="stable")
            out = [column[order] for column in out]
        return cls(*out)


@dataclass(slots=True)
class Upper:
    """Everything above level 0: see :func:`descend`.

    ``leaves`` of levels above 0; ``base`` uint64[k] raw IOVA, ``pa`` uint64[k], ``row`` int64[k] and ``prot``
    uint8[k] (of the items above) of each visit to a table of level 0, sorted by base; ``pages`` per level the
    pas of the visits.
    """

    leaves: Items
    base: U64
    pa: U64
    row: I64
    prot: U8
    problems: Problems
    pages: list[U64]

    @property
    def visits(self) -> int:
        """Tables visited, the root included."""
        return sum(len(p) for p in self.pages)


def _prot(items: U64, r_mask: int, r_value: int, w_mask: int, w_value: int) -> U8:
    r = (items & np.uint64(r_mask)) == np.uint64(r_value)
    w = (items & np.uint64(w_mask)) == np.uint64(w_value)
    prot: U8 = r.view(np.uint8) | (w.view(np.uint8) << np.uint8(1))
    return prot


def _spans(iova: U64, shift: int) -> U64:
    return iova + np.uint64((1 << shift) - 1)


def _leaf_problems(
    tm: TableMemory, level: int, iova: U64, items: U64, at: U64
) -> tuple[Problems, NDArray[np.bool_] | None]:
    """Problems of leaves, and which leaves are sound (None = all)."""
    if tm.linux:
        return Problems(), None
    spec = tm.fmt.levels[level]
    reserved = (items & np.uint64(spec.leaf_reserved)) != 0
    attrs = ((items & np.uint64(spec.leaf_attrs)) != np.uint64(spec.leaf_attrs_value)) & ~reserved
    if not reserved.any() and not attrs.any():
        return Problems(), None
    bad = reserved | attrs
    reason = np.where(reserved[bad], np.uint8(RESERVED), np.uint8(ATTRS))
    where = iova[bad]
    levels = np.full(len(where), level, np.uint8)
    return Problems(where, _spans(where, spec.shift), reason, levels, at[bad], items[bad]), ~reserved


def _classify(
    tm: TableMemory, level: int, base: U64, at: U64, prot: U8, items: U64, start: int, last: int, whole: bool
) -> tuple[Items, tuple[U64, U64, U8, U64, U64], Problems]:
    """Sort the items of some tables of one level: leaves; and table items as iova, pa, prot, item, at;
    problems.

    :param base: raw IOVA of each table, uint64[t]. :param at: its pa. :param items: uint64[t, n].
    """
    fmt, spec = tm.fmt, tm.fmt.levels[level]
    flat = items.reshape(-1)
    here = np.flatnonzero(flat & tm.present(level))
    table, index = here >> spec.index_bits, (here & (spec.items - 1)).astype(np.uint64)
    item = flat[here]
    iova = base[table] + (index << np.uint64(spec.shift))
    if not whole:
        inside = (_spans(iova, spec.shift) >= np.uint64(start)) & (iova <= np.uint64(last))
        table, index, item, iova = table[inside], index[inside], item[inside], iova[inside]
    where = at[table] + index * np.uint64(fmt.item_bytes)
    upper = prot[table]
    if spec.leaf and spec.table:
        leaf = (item & np.uint64(spec.leaf_mask)) == np.uint64(spec.leaf_value)
    else:
        leaf = np.full(len(item), spec.leaf)
    problems = []
    l_iova, l_item, l_at, l_upper = iova[leaf], item[leaf], where[leaf], upper[leaf]
    found, sound = _leaf_problems(tm, level, l_iova, l_item, l_at)
    problems.append(found)
    if sound is not None:
        l_iova, l_item, l_at, l_upper = l_iova[sound], l_item[sound], l_at[sound], l_upper[sound]
    leaves = Items(
        l_iova,
        l_item & np.uint64(spec.leaf_pa_mask),
        np.full(len(l_iova), level, np.uint8),
        _prot(l_item, spec.r_mask, spec.r_value, spec.w_mask, spec.w_value) & l_upper,
        l_item,
        l_at,
    )
    down = ~leaf
    t_iova, t_item, t_at, t_upper = iova[down], item[down], where[down], upper[down]
    reserved = (t_item & np.uint64(spec.table_reserved)) != 0
    attrs = (t_item & np.uint64(spec.table_attrs)) != 0
    if not tm.linux and (reserved.any() or attrs.any()):
        bad = reserved | attrs
        problems.append(
            Problems(
                t_iova[bad],
                _spans(t_iova[bad], spec.shift),
                np.where(reserved[bad], np.uint8(RESERVED), np.uint8(ATTRS)),
                np.full(int(bad.sum()), level, np.uint8),
                t_at[bad],
                t_item[bad],
            )
        )
        t_iova, t_item, t_at, t_upper = (a[~reserved] for a in (t_iova, t_item, t_at, t_upper))
    t_prot = _prot(t_item, spec.tr_mask, spec.tr_value, spec.tw_mask, spec.tw_value) & t_upper
    below = (t_iova, t_item & np.uint64(spec.table_pa_mask), t_prot, t_item, t_at)
    return leaves, below, Problems.join(problems)


def descend(tm: TableMemory, root_pa: int, start: int = 0, last: int | None = None) -> Upper:
    """Everything above the tables of level 0 that touches the raw IOVAs [start, last].

    :raises MemoryAbsent: the root is absent. (An absent table below is a problem of the result.)
    :raises InputError: sub-trees are shared so often that the tree is a bomb.
    """
    fmt = tm.fmt
    whole = start == 0 and last is None
    end = (1 << fmt.input_lg2) - 1 if last is None else last
    base, pa, prot = np.zeros(1, np.uint64), np.array([root_pa], np.uint64), np.full(1, 3, np.uint8)
    row: I64 = np.full(1, -1, np.int64)
    pages = [pa]
    seen = pa
    leaves: list[Items] = []
    problems: list[Problems] = []
    limit = tm.capacity + SHARED_LIMIT
    for level in range(fmt.top_level, 0, -1):
        tables: list[tuple[U64, U64, U8, U64, U64]] = []
        count = 0
        for lo in range(0, len(base), CHUNK):
            hi = lo + CHUNK
            items = tm.root(root_pa) if level == fmt.top_level else tm.items(row[lo:hi])
            found, below, bad = _classify(
                tm, level, base[lo:hi], pa[lo:hi], prot[lo:hi], items, start, end, whole
            )
            if len(found):
                leaves.append(found)
            if len(bad):
                problems.append(bad)
            if len(below[0]):
                tables.append(below)
                count += len(below[0])
            if count > limit:
                raise _bomb(level, root_pa)
        if tables:
            base, pa, prot, item, at = (np.concatenate([t[i] for t in tables]) for i in range(5))
        else:
            base, pa, item, at = (np.zeros(0, np.uint64) for _ in range(4))
            prot = np.zeros(0, np.uint8)
        row = tm.rows.index(pa)
        place = np.minimum(np.searchsorted(seen, pa), len(seen) - 1)
        loop = seen[place] == pa
        absent = (row < 0) & ~loop
        if loop.any() or absent.any():
            bad_rows = loop | absent
            where = base[bad_rows]
            problems.append(
                Problems(
                    where,
                    _spans(where, fmt.levels[level].shift),
                    np.where(loop[bad_rows], np.uint8(LOOP), np.uint8(ABSENT)),
                    np.full(len(where), level, np.uint8),
                    at[bad_rows],
                    item[bad_rows],
                )
            )
            base, pa, prot, row = base[~bad_rows], pa[~bad_rows], prot[~bad_rows], row[~bad_rows]
        if len(pa) > SHARED_LIMIT and len(pa) - len(np.unique(pa)) > SHARED_LIMIT:
            raise _bomb(level, root_pa)
        pages.append(pa)
        seen = np.union1d(seen, pa) if level > 1 else seen
    if fmt.top_level == 0:  # a tree of one table: the root is level 0
        pages = pages[:1]
        row = tm.rows.index(pa)
    upper = Items.join(leaves, sort=len(leaves) > 1)
    return Upper(upper, base, pa, row, prot, Problems.join(problems), pages)


def _bomb(level: int, root_pa: int) -> InputError:
    return InputError(
        f"tables under root_pa {root_pa:#x} are shared more than {SHARED_LIMIT} times at level {level}: "
        "this is no page table",
        "check root_pa and the format's configuration",
    )


def expand(
    tm: TableMemory, base: U64, pa: U64, row: I64, prot: U8, start: int = 0, last: int | None = None
) -> Iterator[tuple[Items, Problems]]:
    """The leaves of tables of level 0, a chunk of tables at a time, in order.

    :param base: raw IOVA of each table; :param pa: its pa; :param row: its row; :param prot: what the items
    above grant.
    """
    fmt = tm.fmt
    spec = fmt.levels[0]
    whole = start == 0 and last is None
    end = (1 << fmt.input_lg2) - 1 if last is None else last
    for lo in range(0, len(base), CHUNK):
        hi = lo + CHUNK
        items = tm.items(row[lo:hi]).reshape(-1)
        here = np.flatnonzero(items & tm.present(0))
        item = items[here]
        table, index = here >> spec.index_bits, (here & (spec.items - 1)).astype(np.uint64)
        iova = base[lo:hi][table] + (index << np.uint64(spec.shift))
        if not whole:
            inside = (_spans(iova, spec.shift) >= np.uint64(start)) & (iova <= np.uint64(end))
            table, index, item, iova = table[inside], index[inside], item[inside], iova[inside]
        at = pa[lo:hi][table] + index * np.uint64(fmt.item_bytes)
        bad, sound = _leaf_problems(tm, 0, iova, item, at)
        if sound is not None:
            table, item, iova, at = table[sound], item[sound], iova[sound], at[sound]
        yield (
            Items(
                iova,
                item & np.uint64(spec.leaf_pa_mask),
                np.zeros(len(iova), np.uint8),
                _prot(item, spec.r_mask, spec.r_value, spec.w_mask, spec.w_value) & prot[lo:hi][table],
                item,
                at,
            ),
            bad,
        )


def raise_unreadable(fmt: Format, problems: Problems) -> None:
    """Raise for the first loop or absent table: what translates there cannot be said.

    :raises InputError: a loop. :raises MemoryAbsent: a table is not in the memory.
    """
    for reason in (LOOP, ABSENT):
        for i in np.flatnonzero(problems.reason == reason)[:1]:
            level = int(problems.level[i])
            pa = int(problems.item[i]) & fmt.levels[level].table_pa_mask
            iova = int(fmt.extend(problems.iova[i : i + 1])[0])
            at = int(problems.at[i])
            of = f"the level {level - 1} table for iova {iova:#x}, from the item at pa {at:#x}"
            if reason == LOOP:
                raise InputError(f"table page {pa:#x} is in a loop: {of}, serves at a higher level too")
            raise MemoryAbsent(pa, fmt.table_bytes, of)


def table_pages(fmt: Format, mem: Memory, root_pa: int) -> U64:
    """Pas of every table page, sorted, each once, the root included.

    :raises MemoryAbsent, InputError: a table is absent or in a loop.
    """
    upper = descend(TableMemory(fmt, mem), root_pa)
    raise_unreadable(fmt, upper.problems)
    return np.unique(np.concatenate(upper.pages))
