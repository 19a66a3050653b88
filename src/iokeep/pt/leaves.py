# SPDX-License-Identifier: Apache-2.0
"""Leaves and extents of a table: what it translates, in IOVA order, as arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from iokeep.mem.memory import Memory
from iokeep.pt.choice import loaded, worth_compiled
from iokeep.pt.extents import U8, U64, Extents
from iokeep.pt.formats.base import Format
from iokeep.pt.states import RUN
from iokeep.pt.tables import (
    Items,
    Problems,
    Straight,
    TableMemory,
    Tables,
    Upper,
    descend,
    expand,
    raise_unreadable,
)

if TYPE_CHECKING:
    from iokeep.pt.runs import OneRange, Runs
    from iokeep.pt.traits import Traits

#: tables from so many bytes on are read by compiled code, where it is loaded and where it is not
COMPILED_WARM = 1 << 20
COMPILED_COLD = 32 << 20
#: the same, where most tables are one run each: NumPy reads those well
COMPILED_COLD_RUNS = 512 << 20
#: so many tables are worth a look by NumPy whether each is one run
PLAIN_TABLES = 8


@dataclass(frozen=True, slots=True)
class Leaves:
    """Leaves sorted by iova; arrays of equal length n.

    ``iova`` uint64[n]; ``pa`` uint64[n] OA; ``lg2`` uint8[n] log2 of the size in bytes; ``prot`` uint8[n]
    granted by the leaf and all items above (0 = present, but nothing may pass); ``item`` uint64[n] as it lies
    in memory (after ``invert``).
    """

    iova: U64
    pa: U64
    lg2: U8
    prot: U8
    item: U64

    def __len__(self) -> int:
        return len(self.iova)

    @classmethod
    def of(cls, fmt: Format, items: Items) -> Leaves:
        """From the engine's items, whose IOVAs are raw."""
        return cls(fmt.extend(items.iova), items.pa, items.lg2, items.prot, items.item)

    @property
    def last(self) -> U64:
        """Last IOVA of each leaf, uint64[n]."""
        return self.iova + ((np.uint64(1) << self.lg2.astype(np.uint64)) - np.uint64(1))

    def extents(self) -> Extents:
        """The canonical extents: maximal runs; leaves that let nothing pass are not in them."""
        passing = self.prot != 0
        if passing.all():
            return Extents(self.iova, self.last, self.pa, self.prot).canonical()
        return Extents(
            self.iova[passing], self.last[passing], self.pa[passing], self.prot[passing]
        ).canonical()


def raw_ranges(fmt: Format, start: int, last: int | None) -> list[tuple[int, int]]:
    """The raw ranges of the IOVAs [start, last]: none, one, or two (both halves of a sign-extended space)."""
    end = 2**64 - 1 if last is None else last
    top = 1 << fmt.input_lg2
    if not fmt.sign_extend:
        low, high = max(start - fmt.iova_base, 0), min(end - fmt.iova_base, top - 1)
        return [(low, high)] if low <= high else []
    half = top // 2
    out = []
    if start < half:
        out.append((start, min(end, half - 1)))
    high = 2**64 - half
    if end >= high:
        out.append((max(start, high) - high + half, end - high + half))
    return [(a, b) for a, b in out if a <= b]


def upper_within(tm: TableMemory, root_pa: int, start: int, last: int) -> Upper:
    """Everything above the tables of level 0 that touches the IOVAs [start, last].

    :raises MemoryAbsent, InputError: as ``descend``.
    """
    parts = [descend(tm, root_pa, a, b) for a, b in raw_ranges(tm.fmt, start, last)]
    if len(parts) == 1:
        return parts[0]
    tm.root(root_pa)
    leaves = Items.join([part.leaves for part in parts])
    problems = Problems.join([part.problems for part in parts])
    columns = [
        np.concatenate([np.zeros(0, np.uint64), *(getattr(p, c) for p in parts)]) for c in ("base", "pa")
    ]
    row = np.concatenate([np.zeros(0, np.int64), *(p.row for p in parts)])
    prot = np.concatenate([np.zeros(0, np.uint8), *(p.prot for p in parts)])
    pages, bases = (
        [np.concatenate(same) for same in zip(*(getattr(p, c) for p in parts), strict=True)]
        for c in ("pages", "bases")
    )
    prots = [np.concatenate(same) for same in zip(*(p.prots for p in parts), strict=True)]
    return Upper(leaves, columns[0], columns[1], row, prot, problems, pages, bases, prots)


def leaf_items(
    tm: TableMemory, root_pa: int, start: int = 0, last: int | None = None
) -> tuple[Items, Problems]:
    """The leaves that touch [start, last] with raw IOVAs and the pa of each item, and what is wrong.

    :raises MemoryAbsent, InputError: a table that the range needs is absent or in a loop.
    """
    fmt = tm.fmt
    parts: list[Items] = []
    problems: list[Problems] = []
    whole = start == 0 and last is None
    for a, b in [(0, None)] if whole else raw_ranges(fmt, start, last):
        upper = descend(tm, root_pa, a, b)
        raise_unreadable(fmt, upper.problems)
        lower = [upper.leaves] if len(upper.leaves) else []
        problems.append(upper.problems)
        for found, bad in expand(tm, upper.base, upper.pa, upper.row, upper.prot, a, b):
            lower.append(found)
            problems.append(bad)
        parts.append(Items.join(lower, sort=bool(len(upper.leaves)) and len(lower) > 1))
    return Items.join(parts), Problems.join(problems)


def leaves(fmt: Format, mem: Memory, root_pa: int, start: int = 0, last: int | None = None) -> Leaves:
    """The leaves that touch the IOVAs [start, last] (None = to the end of the space), sorted.

    Only tables that the range needs are read. Leaves with reserved bits do not translate and are not among
    them.

    :param root_pa: pa of the root table.
    :raises MemoryAbsent, InputError: a table that the range needs is absent or in a loop.
    """
    return Leaves.of(fmt, leaf_items(TableMemory(fmt, mem), root_pa, start, last)[0])


def by_kernels(tables: int, asked: bool | None, cold: int = COMPILED_COLD) -> bool:
    """Whether so many bytes of tables are read by compiled code: as asked, or (None) where that is faster.

    :param cold: bytes that are worth its start.
    """
    return worth_compiled(asked, "run_kernels", tables, COMPILED_WARM, cold)


def kernels_down(asked: bool | None) -> Straight | None:
    """The compiled way through upper tables, where it costs no start of Numba."""
    if asked is False or (asked is None and not loaded("kernels")):
        return None
    from iokeep.pt.descent import straight

    return straight


class LargeRuns:
    """Reads tables above level 0 that are one run of leaves, as ``descend`` meets them: see ``tables.Known``.

    :param compiled: as for :func:`extents`. After the descent ``found`` has them.
    """

    def __init__(self, tm: TableMemory, compiled: bool | None, threads: int | None) -> None:
        self.tm, self.compiled, self.threads = tm, compiled, threads
        self.found: list[Runs | OneRange] = []

    def __call__(self, tables: Tables) -> NDArray[np.bool_]:
        """Which tables are such a run."""
        tm, level = self.tm, tables.level
        compiled = by_kernels(len(tables) * tm.fmt.bytes_of(level), self.compiled)
        if not compiled and len(tables) < PLAIN_TABLES:
            return np.zeros(len(tables), np.bool_)
        from iokeep.pt import runs

        if not runs.readable(tm, level):
            return np.zeros(len(tables), np.bool_)
        found = runs.runs_of(tm, tables, self.threads, compiled=compiled)
        self.found.append(found)
        return np.asarray(found.state == RUN, np.bool_)

    def extents(self) -> list[Extents]:
        """What they translate, canonical for each level."""
        return [found.extents(self.tm.fmt.levels[found.level]) for found in self.found]

    def traits(self) -> list[Traits]:
        """Their traits."""
        return [found.traits(self.tm.fmt.levels[found.level]) for found in self.found]


def extents(
    fmt: Format, mem: Memory, root_pa: int, *, compiled: bool | None = None, threads: int | None = None
) -> tuple[Extents, Problems]:
    """The canonical extents of the whole table, and what is wrong in it (reserved bits, attributes).

    Memory grows with the extents, not with the leaves.

    :param compiled: by Numba (True), by NumPy alone (False), or by size (None). The result is the same.
    :param threads: of the compiled reading; None = as ``kernels.thread_count`` says.
    :raises MemoryAbsent, InputError: as :func:`leaves`.
    """
    tm = TableMemory(fmt, mem)
    large = LargeRuns(tm, compiled, threads)
    upper = descend(tm, root_pa, straight=kernels_down(compiled), known=large)
    raise_unreadable(fmt, upper.problems)
    parts = large.extents()
    problems = [upper.problems]
    if len(upper.leaves):
        parts.append(Leaves.of(fmt, upper.leaves).extents())
    tables = upper.base, upper.pa, upper.row, upper.prot
    if len(upper.base) >= (1 if compiled else PLAIN_TABLES):
        from iokeep.pt import runs

        if runs.readable(tm):
            of = upper.tables(fmt)
            cold = COMPILED_COLD_RUNS if runs.likely(tm, of) else COMPILED_COLD
            kernels = by_kernels(len(of) * fmt.table_bytes, compiled, cold)
            most, left = runs.extents_of(tm, of, threads, compiled=kernels)
            parts.append(most)
            tables = upper.base[left], upper.pa[left], upper.row[left], upper.prot[left]
    for found, bad in expand(tm, *tables):
        parts.append(Leaves.of(fmt, found).extents())
        problems.append(bad)
    parts = [part for part in parts if len(part)]
    return parts[0] if len(parts) == 1 else join_extents(parts), Problems.join(problems)


def join_extents(parts: list[Extents]) -> Extents:
    """One canonical :class:`Extents` from disjoint parts in any order."""
    if not parts:
        return Extents.empty()
    columns = [np.concatenate([getattr(p, c) for p in parts]) for c in ("iova", "last", "pa", "prot")]
    if len(parts) > 1:
        order = np.argsort(columns[0], kind="stable")
        columns = [c[order] for c in columns]
    return Extents(*columns).canonical()
