# SPDX-License-Identifier: Apache-2.0
"""Down through the tables of any format, level by level, whole arrays of tables at a time.

:func:`descend` flattens everything above the tables of level 0; :func:`expand` turns tables of level 0 into
leaves. All other jobs (leaves, extents, verify, diff, digest) are made of these two. Inside, an IOVA is
*raw*: its input bits only, 0 ... 2**input_lg2 - 1; ``Format.extend`` makes the IOVA that a device uses.

Nothing in a table is trusted. A page that serves at two levels is a loop: it is reported and not followed.
Sub-trees may be shared, but only so often that time and memory stay bounded by the size of the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iokeep.errors import InputError, MemoryAbsent
from iokeep.mem.arrays import unique
from iokeep.mem.memory import I64, U8, U64, Memory, Rows
from iokeep.pt.formats.base import Format, LevelSpec, any_of

#: reasons of problems, as verdicts name them
RESERVED, ATTRS, LOOP, ABSENT, CONTIG = 1, 2, 3, 4, 9
REASONS = {RESERVED: "reserved", ATTRS: "attrs", LOOP: "loop", ABSENT: "absent", CONTIG: "contig"}
#: reasons of items that translate all the same
SOFT = (ATTRS, CONTIG)

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
        self._views: dict[int, Rows] = {}
        #: per level: a table that begins at less than its size is so many rows
        self.parts = [max(fmt.bytes_of(n) // fmt.table_align, 1) for n in range(len(fmt.levels))]
        self.rows = self.view(0)
        #: per level: rows are uint64 items as they are
        self.plains = [fmt.item_bytes == 8 and fmt.byte_order == "<" and not s.invert for s in fmt.levels]
        self.plain = self.plains[0]

    def view(self, level: int) -> Rows:
        """Memory as rows of the tables of this level, or of their parts."""
        size = min(self.fmt.bytes_of(level), self.fmt.table_align)
        view = self._views.get(size)
        if view is None:
            view = self._views[size] = self.mem.rows(size)
        return view

    def present(self, level: int) -> np.uint64:
        """No item is present without any of these bits."""
        return np.uint64(self.fmt.occupied(level) if self.linux else self.fmt.levels[level].valid_mask)

    def places(self, level: int, flat: U64) -> NDArray[np.intp]:
        """Positions of the items that are present."""
        here = np.flatnonzero(flat & self.present(level))
        values = self.fmt.levels[level].valid_values
        if values and not self.linux:
            here = here[any_of(flat[here], values)]
        return here

    @property
    def capacity(self) -> int:
        """Tables that this memory can hold at most."""
        return len(self.rows.data)

    def _decode(self, raw: U8, level: int) -> U64:
        items = raw.view(self.fmt.item_dtype)
        if self.plains[level]:
            return items.view(np.uint64)
        return items.astype(np.uint64) ^ np.uint64(self.fmt.levels[level].invert)

    def root(self, root_pa: int) -> U64:
        """Items of the root table, uint64[1, n]. :raises MemoryAbsent: it is not in this memory."""
        if root_pa % self.fmt.root_align or root_pa >> 64 or root_pa < 0:
            raise InputError(f"root_pa {root_pa:#x} is not a multiple of {self.fmt.root_align:#x}")
        raw = self.mem.read(root_pa, self.fmt.root_bytes)
        return self._decode(np.frombuffer(raw, np.uint8), self.fmt.top_level).reshape(1, -1)

    def index(self, level: int, pas: U64) -> I64:
        """Row of the first part of each table of this level; -1 where any part of it is absent."""
        view, parts = self.view(level), self.parts[level]
        rows = view.index(pas)
        step = np.uint64(view.data.shape[1])
        for part in range(1, parts):
            at = pas + np.uint64(part) * step
            more = view.index(at)
            rows[(more < 0) | (at < pas)] = -1
        return rows

    def items(self, rows: I64, level: int = 0) -> U64:
        """Items of the tables in ``rows`` (int64[n] of :meth:`index`), uint64[n, items]; may be a view of
        the memory.
        """
        data, parts = self.view(level).data, self.parts[level]
        if parts > 1:  # sound rows are followed by those of their other parts: pas and rows are in one order
            chosen = (rows[:, None] + np.arange(parts)).reshape(-1)
            return self._decode(np.take(data, chosen, axis=0), level).reshape(len(rows), -1)
        first, n = int(rows[0]) if len(rows) else 0, len(rows)
        if n and int(rows[-1]) - first == n - 1 and bool((rows[1:] > rows[:-1]).all()):
            raw = data[first : first + n]
        else:
            raw = np.take(data, rows, axis=0)
        return self._decode(raw, level)


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
    ``prot``, ``lg2`` uint8[n].

    A contiguous entry whose items agree is one leaf, with the first item. ``lg2`` is log2 of the bytes.
    ``prot`` is what the leaf *and* all items above it grant; 0 = present, but nothing may pass.
    """

    iova: U64
    pa: U64
    level: U8
    prot: U8
    item: U64
    at: U64
    lg2: U8

    def __len__(self) -> int:
        return len(self.iova)

    def take(self, chosen: NDArray[np.bool_]) -> Items:
        """Only the chosen ones."""
        columns = ("iova", "pa", "level", "prot", "item", "at", "lg2")
        return Items(*(getattr(self, c)[chosen] for c in columns))

    @classmethod
    def join(cls, parts: list[Items], *, sort: bool = False) -> Items:
        """All of them, in the order given or sorted by iova."""
        columns = ("iova", "pa", "level", "prot", "item", "at", "lg2")
        if len(parts) == 1:
            return parts[0]
        if not parts:
            z8, z64 = np.zeros(0, np.uint8), np.zeros(0, np.uint64)
            return cls(z64, z64, z8, z8, z64, z64, z8)
        out = [np.concatenate([getattr(p, c) for p in parts]) for c in columns]
        if sort:
            order = np.argsort(out[0], kind="stable")
            out = [column[order] for column in out]
        return cls(*out)


@dataclass(frozen=True, slots=True)
class Tables:
    """Tables of one level that are to be read or proved: ``base`` uint64[n] the IOVA of each, increasing;
    ``row`` int64[n]; ``above`` uint8[n] what the items above it grant.
    """

    level: int
    base: U64
    row: I64
    above: U8

    def __len__(self) -> int:
        return len(self.base)

    def take(self, chosen: NDArray[Any] | slice) -> Tables:
        """Only the chosen ones."""
        return Tables(self.level, self.base[chosen], self.row[chosen], self.above[chosen])


@dataclass(slots=True)
class Upper:
    """Everything above level 0: see :func:`descend`.

    ``leaves`` of levels above 0; ``base`` uint64[k] raw IOVA, ``pa`` uint64[k], ``row`` int64[k] and ``prot``
    uint8[k] (of the items above) of each visit to a table of level 0, sorted by base; ``pages`` per level,
    the root's first, the pas of the visits, with their ``bases`` (raw IOVAs) and ``prots`` likewise.
    ``alike``: levels all of whose tables hold nothing but sound table items and zeroes, if that was seen.
    """

    leaves: Items
    base: U64
    pa: U64
    row: I64
    prot: U8
    problems: Problems
    pages: list[U64]
    bases: list[U64]
    prots: list[U8]
    alike: frozenset[int] = frozenset()

    @property
    def visits(self) -> int:
        """Tables visited, the root included."""
        return sum(len(p) for p in self.pages)

    def tables(self, fmt: Format) -> Tables:
        """The visits to tables of level 0."""
        return Tables(0, fmt.extend(self.base), self.row, self.prot)

    def visited_bytes(self, fmt: Format) -> int:
        """Bytes of the tables visited."""
        return sum(len(p) * fmt.bytes_of(fmt.top_level - n) for n, p in enumerate(self.pages))


def _prot(items: U64, r_mask: int, r_value: int, w_mask: int, w_value: int) -> U8:
    r = (items & np.uint64(r_mask)) == np.uint64(r_value)
    w = (items & np.uint64(w_mask)) == np.uint64(w_value)
    prot: U8 = r.view(np.uint8) | (w.view(np.uint8) << np.uint8(1))
    return prot


def _spans(iova: U64, shift: int) -> U64:
    return iova + np.uint64((1 << shift) - 1)


def _contigs(spec: LevelSpec, items: U64) -> tuple[U8, NDArray[np.bool_] | None, U64 | None]:
    """Of leaves: which contiguous entry each is part of (1 + its number in ``spec.contig``, 0 = none), which
    claim one that there is not (None = none does), and the bits that are reserved in each.
    """
    run = np.zeros(len(items), np.uint8)
    if spec.contig_select is not None:
        mask, value = spec.contig_select
        claim = (items & np.uint64(mask)) == np.uint64(value)
        if not claim.any():
            return run, None, None
    reserved = np.full(len(items), spec.leaf_reserved, np.uint64)
    for number, contig in enumerate(spec.contig, 1):
        mine = (items & np.uint64(contig.mask)) == np.uint64(contig.value)
        run[mine] = number
        bits = spec.leaf_reserved & ~contig.mask if contig.reserved is None else contig.reserved
        reserved[mine] = np.uint64(bits)
    false = None
    if spec.contig_select is not None:
        false = claim & (run == 0)
    return run, false, reserved


def leaves_of(
    tm: TableMemory, level: int, iova: U64, items: U64, at: U64, upper: U8
) -> tuple[Items, Problems]:
    """Leaves from items that are leaves, in order of iova, and what is wrong with them.

    :param upper: what the items above grant.
    """
    spec = tm.fmt.levels[level]
    run: U8 | None = None
    false: NDArray[np.bool_] | None = None
    reserved_bits: U64 | None = None
    if spec.contig:
        run, false, reserved_bits = _contigs(spec, items)
    problems: list[Problems] = []
    if not tm.linux:
        bits = np.uint64(spec.leaf_reserved) if reserved_bits is None else reserved_bits
        reserved = (items & bits) != 0
        if spec.leaf_bad:
            reserved |= any_of(items, spec.leaf_bad)
        if false is not None:
            reserved |= false
        attrs = (items & np.uint64(spec.leaf_attrs)) != np.uint64(spec.leaf_attrs_value)
        if run is not None and any(c.attrs is not None for c in spec.contig):
            for number, contig in enumerate(spec.contig, 1):
                if contig.attrs is not None:
                    mine = run == number
                    attrs[mine] = (items[mine] & np.uint64(contig.attrs)) != np.uint64(
                        contig.attrs_value or 0
                    )
        attrs &= ~reserved
        if reserved.any() or attrs.any():
            bad = reserved | attrs
            reason = np.where(reserved[bad], np.uint8(RESERVED), np.uint8(ATTRS))
            where = iova[bad]
            levels = np.full(len(where), level, np.uint8)
            last = _spans(where, spec.shift)
            problems.append(Problems(where, last, reason, levels, at[bad], items[bad]))
            if reserved.any():
                sound = ~reserved
                iova, items, at, upper = iova[sound], items[sound], at[sound], upper[sound]
                run = None if run is None else run[sound]
    leaves = Items(
        iova,
        spec.leaf_pas(items),
        np.full(len(iova), level, np.uint8),
        spec.leaf_prots(items) & upper,
        items,
        at,
        np.full(len(iova), spec.shift, np.uint8),
    )
    if run is not None and run.any():
        leaves, torn = _join_runs(tm, level, leaves, run)
        if not tm.linux:
            problems.append(torn)
    return leaves, problems[0] if len(problems) == 1 else Problems.join(problems)


def _join_runs(tm: TableMemory, level: int, leaves: Items, run: U8) -> tuple[Items, Problems]:
    """Items of contiguous entries as one leaf each, where they agree. Each item's pa is set, in any case."""
    spec = tm.fmt.levels[level]
    count = np.array([0, *(c.lg2 for c in spec.contig)], np.uint64)[run]
    hint = np.array([False, *(not c.replicated for c in spec.contig)], np.bool_)[run]
    shift = np.uint64(spec.shift)
    item_mask = np.uint64((1 << spec.shift) - 1)
    whole = (np.uint64(1) << (count + shift)) - np.uint64(1)  # no entry is as large as 2**64
    start = leaves.iova & ~whole
    inner = leaves.iova & whole & ~item_mask
    coded = (run != 0) & ~hint
    pa = np.where(coded, (leaves.pa & ~whole) | inner, leaves.pa).astype(np.uint64)
    fresh = np.concatenate((np.ones(1, np.bool_), (start[1:] != start[:-1]) | (run[1:] != run[:-1])))
    fresh |= run == 0
    first = np.flatnonzero(fresh)
    owner = first[np.cumsum(fresh) - 1]
    memory = 0  # attributes count, also where any value of them is allowed
    for _, mask in spec.memory:
        memory |= mask
    care = np.uint64((~spec.leaf_ignored | memory) & (2**64 - 1))
    address = spec.leaf_pa_mask
    for piece, _ in spec.pa_pieces:
        address |= piece
    # Of the items of a run hardware may have marked some as dirty (D8, "Hardware management of the dirty
    # state"): all may be written.
    same = spec.one_writable(leaves.item)
    differ = (same ^ same[owner]) & care
    differ = np.where(hint, differ & np.uint64(~address & (2**64 - 1)), differ)
    agree = (differ == 0) & (leaves.prot == leaves.prot[owner])
    agree &= pa == pa[owner] + (leaves.iova - leaves.iova[owner])
    agree &= ((pa[owner] & whole) == 0) | (run == 0)
    members = np.diff(np.append(first, len(run)))
    sound = np.logical_and.reduceat(agree, first) & (
        members.astype(np.uint64) == np.uint64(1) << count[first]
    )
    torn = first[~sound]
    if len(torn) > 1:  # an entry may be torn into several pieces; starts are multiples of the item
        torn = torn[np.unique(start[torn] | run[torn], return_index=True)[1]]
    joined = np.repeat(sound, members)
    lg2 = np.where(joined, count.astype(np.uint8) + leaves.lg2, leaves.lg2).astype(np.uint8)
    out = Items(leaves.iova, pa, leaves.level, leaves.prot, leaves.item, leaves.at, lg2)
    problems = Problems(
        start[torn],
        start[torn] + whole[torn],
        np.full(len(torn), CONTIG, np.uint8),
        np.full(len(torn), level, np.uint8),
        leaves.at[torn],
        leaves.item[torn],
    )
    return out.take(fresh | ~joined), problems


def _window(spec: LevelSpec, start: int, last: int) -> tuple[np.uint64, np.uint64]:
    """[start, last] with the whole of every contiguous entry that it touches."""
    if not spec.contig:
        return np.uint64(start), np.uint64(last)
    whole = (1 << (spec.shift + max(c.lg2 for c in spec.contig))) - 1
    return np.uint64(start & ~whole), np.uint64(min(last | whole, 2**64 - 1))


def clipped(leaves: Items, problems: Problems, start: int, last: int) -> tuple[Items, Problems]:
    """What touches [start, last]."""
    a, b = np.uint64(start), np.uint64(last)
    end = leaves.iova + ((np.uint64(1) << leaves.lg2.astype(np.uint64)) - np.uint64(1))
    leaves = leaves.take((end >= a) & (leaves.iova <= b))
    if len(problems):
        problems = problems.take((problems.last >= a) & (problems.iova <= b))
    return leaves, problems


#: table items: iova, pa of the table, prot, item, pa of the item; and the level that each leads to
_Below = tuple[U64, U64, U8, U64, U64]


def _classify(
    tm: TableMemory, level: int, base: U64, at: U64, prot: U8, items: U64, start: int, last: int, whole: bool
) -> tuple[Items, _Below, U8 | None, Problems]:
    """Sort the items of some tables of one level: leaves; table items, and the level that each leads to
    (None = all one level down); problems.

    :param base: raw IOVA of each table, uint64[t]. :param at: its pa. :param items: uint64[t, n].
    """
    fmt, spec = tm.fmt, tm.fmt.levels[level]
    flat = items.reshape(-1)
    here = tm.places(level, flat)
    table, index = here >> spec.index_bits, (here & (spec.items - 1)).astype(np.uint64)
    item = flat[here]
    iova = base[table] + (index << np.uint64(spec.shift))
    if not whole:
        a, b = _window(spec, start, last)
        inside = (_spans(iova, spec.shift) >= a) & (iova <= b)
        table, index, item, iova = table[inside], index[inside], item[inside], iova[inside]
    where = at[table] + index * np.uint64(fmt.item_bytes)
    upper = prot[table]
    leaf = spec.are_leaves(item)
    leaves, found = leaves_of(tm, level, iova[leaf], item[leaf], where[leaf], upper[leaf])
    if not whole and spec.contig:
        leaves, found = clipped(leaves, found, start, last)
    problems = [found]
    down = ~leaf
    if not whole and spec.contig:
        down &= (_spans(iova, spec.shift) >= np.uint64(start)) & (iova <= np.uint64(last))
    t_iova, t_item, t_at, t_upper = iova[down], item[down], where[down], upper[down]
    if not tm.linux:
        reserved = (t_item & np.uint64(spec.table_reserved)) != 0
        if spec.table_bad:
            reserved |= any_of(t_item, spec.table_bad)
        if spec.next_levels:
            reserved |= ~any_of(t_item, tuple((m, v) for m, v, _ in spec.next_levels))
        attrs = (t_item & np.uint64(spec.table_attrs)) != np.uint64(spec.table_attrs_value)
        if reserved.any() or attrs.any():
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
    target: U8 | None = None
    if spec.next_levels and len(t_item):
        target = np.full(len(t_item), level - 1, np.uint8)
        for mask, value, number in spec.next_levels:
            target[(t_item & np.uint64(mask)) == np.uint64(value)] = number
        if not whole:  # a table that skips levels covers less than its item
            bits = np.array([s.shift + s.index_bits for s in fmt.levels], np.uint64)[target]
            end = t_iova + ((np.uint64(1) << bits) - np.uint64(1))
            inside = end >= np.uint64(start)
            t_iova, t_item, t_at, t_prot, target = (
                t_iova[inside], t_item[inside], t_at[inside], t_prot[inside], target[inside],
            )  # fmt: skip
        if bool((target == level - 1).all()):
            target = None
    below = (t_iova, spec.table_pas(t_item), t_prot, t_item, t_at)
    return leaves, below, target, Problems.join(problems)


#: which of some tables hold nothing but leaves that are known already
Known = Callable[[Tables], NDArray[np.bool_]]


@dataclass(slots=True)
class Down:
    """The way down to the tables of ``level``, whose ``row`` int64[n] these are: per level, the root's first,
    ``pages``, ``bases`` and ``prots`` of :class:`Upper`.
    """

    level: int
    row: I64
    pages: list[U64]
    bases: list[U64]
    prots: list[U8]


#: the way down from a root as far as all is as Linux writes it; None = the format is none for this
#: (``descent.straight``)
Straight = Callable[[TableMemory, int], "Down | None"]
#: bits of a page number that a filter of pages knows
_FILTER = 16


def _classified(
    tm: TableMemory,
    level: int,
    root_pa: int,
    above: tuple[U64, U64, U8, I64],
    window: tuple[int, int, bool],
    waiting: list[list[tuple[int, _Below]]],
    limit: int,
) -> tuple[list[Items], list[Problems]]:
    """:func:`_classify` of all tables of a level (base, pa, prot, row): leaves and problems; what is below
    goes to ``waiting``.
    """
    leaves: list[Items] = []
    problems: list[Problems] = []
    base, pa, prot, row = above
    count = 0
    for lo in range(0, len(base), CHUNK):
        hi = lo + CHUNK
        items = tm.root(root_pa) if level == tm.fmt.top_level else tm.items(row[lo:hi], level)
        found, below, target, bad = _classify(tm, level, base[lo:hi], pa[lo:hi], prot[lo:hi], items, *window)
        if len(found):
            leaves.append(found)
        if len(bad):
            problems.append(bad)
        if len(below[0]):
            count += len(below[0])
            if target is None:
                waiting[level - 1].append((level, below))
            else:
                for number in np.unique(target).tolist():
                    mine = target == number
                    iova, to, granted, item, at = below
                    part = iova[mine], to[mine], granted[mine], item[mine], at[mine]
                    waiting[number].append((level, part))
        if count > limit:
            raise _bomb(level, root_pa)
    return leaves, problems


def _sorted_below(parts: list[tuple[int, _Below]]) -> tuple[U64, U64, U8, U64, U64, U8]:
    """Tables of a level, from each level above, in order of IOVA; with the level that each is from."""
    if not parts:
        none = np.zeros(0, np.uint64)
        return none, none, np.zeros(0, np.uint8), none, none, np.zeros(0, np.uint8)
    base, pa, prot, item, at = (_joined([t[i] for _, t in parts]) for i in range(5))
    source = np.repeat(np.array([n for n, _ in parts], np.uint8), [len(t[0]) for _, t in parts])
    if bool((base[1:] < base[:-1]).any()):  # from several levels
        order = np.argsort(base, kind="stable")
        base, pa, prot, item, at = base[order], pa[order], prot[order], item[order], at[order]
        source = source[order]
    return base, pa, prot, item, at, source


def _unknown(
    tm: TableMemory, level: int, above: tuple[U64, U64, U8, I64], known: Known
) -> tuple[U64, U64, U8, I64]:
    """Those of the tables of a level (base, pa, prot, row) that have to be looked into."""
    fmt, spec = tm.fmt, tm.fmt.levels[level]
    base, pa, prot, row = above
    if not spec.leaf or tm.parts[level] != 1 or spec.shift + spec.index_bits >= 64:
        return above
    if level == fmt.top_level:
        # A root of another size is no row of memory; one of a sign-extended space is in two halves.
        if fmt.root_bytes != fmt.table_bytes or fmt.sign_extend:
            return above
        row = tm.index(level, pa)
        if int(row[0]) < 0:
            return above
    some = np.flatnonzero(_have_leaves(tm, level, row))
    if not len(some):
        return above
    left = np.ones(len(base), np.bool_)
    left[some] = ~known(Tables(level, fmt.extend(base[some]), row[some], prot[some]))
    return above if left.all() else (base[left], pa[left], prot[left], above[3][left])


def _have_leaves(tm: TableMemory, level: int, row: I64) -> NDArray[np.bool_]:
    """Which tables above level 0 have leaves, by a look at three items of each: most have leaves in all
    places, or tables.
    """
    spec = tm.fmt.levels[level]
    words = tm.view(level).data.view(tm.fmt.item_dtype)
    some = np.array([0, spec.items // 2, spec.items - 1])
    items = words[row[:, None], some].astype(np.uint64).reshape(-1) ^ np.uint64(spec.invert)
    there = np.zeros(len(items), np.bool_)
    there[tm.places(level, items)] = True
    leaf = np.logical_and(there, spec.are_leaves(items))
    return np.asarray(leaf.reshape(-1, 3).any(axis=1), np.bool_)


def descend(
    tm: TableMemory,
    root_pa: int,
    start: int = 0,
    last: int | None = None,
    straight: Straight | None = None,
    known: Known | None = None,
) -> Upper:
    """Everything above the tables of level 0 that touches the raw IOVAs [start, last].

    :param straight: the compiled way down a whole tree; the result is the same.
    :param known: asked about tables above level 0 that have leaves: where it says yes, leaves are left out.
        Not asked below a level where anything is wrong, nor for a range.
    :raises MemoryAbsent: the root is absent. (An absent table below is a problem of the result.)
    :raises InputError: sub-trees are shared so often that the tree is a bomb.
    """
    fmt = tm.fmt
    whole = start == 0 and last is None
    end = (1 << fmt.input_lg2) - 1 if last is None else last
    down = straight(tm, root_pa) if whole and straight is not None else None
    if down is None:
        root, none = np.array([root_pa], np.uint64), np.full(1, -1, np.int64)
        down = Down(fmt.top_level, none, [root], [np.zeros(1, np.uint64)], [np.full(1, 3, np.uint8)])
    first, row, pages, bases, prots = down.level, down.row, down.pages, down.bases, down.prots
    pa, base, prot = pages[-1], bases[-1], prots[-1]
    #: per level: its tables, from each level above
    waiting: list[list[tuple[int, _Below]]] = [[] for _ in fmt.levels]
    seen = pa  # of all levels from here up, sorted
    if first:
        seen = unique(*(units_of(tm, n, pages[fmt.top_level - n]) for n in range(first, fmt.top_level + 1)))
    leaves: list[Items] = []
    problems: list[Problems] = []
    limit = tm.capacity + SHARED_LIMIT
    for level in range(first, 0, -1):
        above = base, pa, prot, row
        if known is not None and whole and not problems:
            above = _unknown(tm, level, above, known)
        found, bad = _classified(tm, level, root_pa, above, (start, end, whole), waiting, limit)
        leaves += found
        problems += bad
        base, pa, prot, item, at, source = _sorted_below(waiting[level - 1])
        waiting[level - 1] = []
        row = tm.index(level - 1, pa)
        # A page that serves at two levels is a loop.
        units = units_of(tm, level - 1, pa)
        loop = _among(units, seen)
        if len(units) != len(pa):
            loop = np.asarray(loop.reshape(len(pa), -1).any(axis=1), np.bool_)
        absent = (row < 0) & ~loop
        if loop.any() or absent.any():
            bad_rows = loop | absent
            where = base[bad_rows]
            # A table that skips levels covers less than the item that leads to it.
            covers = np.uint64((1 << (fmt.levels[level - 1].shift + fmt.levels[level - 1].index_bits)) - 1)
            shifts = np.array([spec.shift for spec in fmt.levels], np.uint64)
            problems.append(
                Problems(
                    where,
                    where + np.minimum((np.uint64(1) << shifts[source[bad_rows]]) - np.uint64(1), covers),
                    np.where(loop[bad_rows], np.uint8(LOOP), np.uint8(ABSENT)),
                    source[bad_rows],
                    at[bad_rows],
                    item[bad_rows],
                )
            )
            base, pa, prot, row = base[~bad_rows], pa[~bad_rows], prot[~bad_rows], row[~bad_rows]
        if len(pa) > SHARED_LIMIT and len(pa) - distinct(row) > SHARED_LIMIT:
            raise _bomb(level, root_pa)
        pages.append(pa)
        bases.append(base)
        prots.append(prot)
        if level > 1:
            seen = np.sort(np.concatenate((seen, units_of(tm, level - 1, pa))))
    if fmt.top_level == 0:  # a tree of one table: the root is level 0
        tm.root(root_pa)
        row = tm.index(0, pa)
    upper_leaves = Items.join(leaves, sort=len(leaves) > 1)
    alike = frozenset(range(first + 1, fmt.top_level + 1))
    return Upper(upper_leaves, base, pa, row, prot, Problems.join(problems), pages, bases, prots, alike)


def _joined(parts: list[NDArray[Any]]) -> NDArray[Any]:
    """All of them in one; a copy of a single one costs more than all that is done with it."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def distinct(rows: I64) -> int:
    """Number of different rows."""
    low = int(rows.min())
    span = int(rows.max()) - low + 1
    if span > 16 * len(rows):
        return len(unique(rows))
    there = np.zeros(span, np.bool_)
    there[rows - low] = True
    return int(np.count_nonzero(there))


def _among(values: U64, known: U64) -> NDArray[np.bool_]:
    """Which values are among the sorted ``known``. Most are not, and a small table of page numbers' low bits
    says so without a search.
    """
    low, may = np.uint64((1 << _FILTER) - 1), np.zeros(1 << _FILTER, np.bool_)
    may[(known >> np.uint64(12)) & low] = True
    out = np.take(may, ((values >> np.uint64(12)) & low).view(np.int64), mode="clip")
    some = np.flatnonzero(out)
    if len(some):
        place = np.minimum(np.searchsorted(known, values[some]), len(known) - 1)
        out[some] = known[place] == values[some]
    return out


def units_of(tm: TableMemory, level: int, pas: U64) -> U64:
    """Memory that tables of a level cover, in units that no two tables share: one pa a table where all have
    one size, else so many for each.
    """
    fmt = tm.fmt
    unit = min(fmt.bytes_of(n) for n in range(max(fmt.top_level, 1)))
    pas = pas & ~np.uint64(unit - 1)
    size = fmt.bytes_of(level)
    if size <= unit:
        return pas
    steps = np.arange(size // unit, dtype=np.uint64) * np.uint64(unit)
    return (pas[:, None] + steps).reshape(-1)


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
    a, b = _window(spec, start, end)
    for lo in range(0, len(base), CHUNK):
        hi = lo + CHUNK
        items = tm.items(row[lo:hi]).reshape(-1)
        here = tm.places(0, items)
        item = items[here]
        table, index = here >> spec.index_bits, (here & (spec.items - 1)).astype(np.uint64)
        iova = base[lo:hi][table] + (index << np.uint64(spec.shift))
        if not whole:
            inside = (_spans(iova, spec.shift) >= a) & (iova <= b)
            table, index, item, iova = table[inside], index[inside], item[inside], iova[inside]
        at = pa[lo:hi][table] + index * np.uint64(fmt.item_bytes)
        leaves, bad = leaves_of(tm, 0, iova, item, at, prot[lo:hi][table])
        if not whole and spec.contig:
            leaves, bad = clipped(leaves, bad, start, end)
        yield leaves, bad


def raise_unreadable(fmt: Format, problems: Problems) -> None:
    """Raise for the first loop or absent table: what translates there cannot be said.

    :raises InputError: a loop. :raises MemoryAbsent: a table is not in the memory.
    """
    for reason in (LOOP, ABSENT):
        for i in np.flatnonzero(problems.reason == reason)[:1]:
            level = int(problems.level[i])
            spec, item = fmt.levels[level], int(problems.item[i])
            pa, below = spec.table_pa(item), spec.next_level(item, level)
            iova = int(fmt.extend(problems.iova[i : i + 1])[0])
            at = int(problems.at[i])
            of = f"the level {below} table for iova {iova:#x}, from the item at pa {at:#x}"
            if reason == LOOP:
                raise InputError(f"table page {pa:#x} is in a loop: {of}, serves at a higher level too")
            raise MemoryAbsent(pa, fmt.bytes_of(below), of)


def table_pages(fmt: Format, mem: Memory, root_pa: int) -> U64:
    """Pas of every table page, sorted, each once, the root included.

    :raises MemoryAbsent, InputError: a table is absent or in a loop.
    """
    upper = descend(TableMemory(fmt, mem), root_pa)
    raise_unreadable(fmt, upper.problems)
    return unique(*upper.pages)
