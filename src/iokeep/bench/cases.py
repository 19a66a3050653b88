# SPDX-License-Identifier: Apache-2.0
"""What is measured: jobs x formats x layouts x order of tables x leaf sizes, and how each case is built."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from iokeep.errors import CapabilityError
from iokeep.mem.memory import U64
from iokeep.mem.ram import Ram
from iokeep.pt.build import Table
from iokeep.pt.extents import Extents
from iokeep.pt.formats.base import Format
from iokeep.pt.registry import open_format

JOBS = {
    "verify": "the tables translate exactly what is expected, end to end",
    "verify-range": "the same for one range of 2 MiB of it",
    "digest": "keyed digest of what the tables translate",
    "expect": "the digest that the areas must give; no table is read",
    "extents": "the canonical extents of the tables",
    "diff": "two tables of the same translations, compared",
    "build": "the tables written anew into memory that is there; the limit is memset of the same",
    "rebuild": "policy rebuild: new tables from the areas, compared with the prior ones",
    "adopt": "policy adopt: the prior tables validated against the areas",
    "deferred-start": "policy deferred: adopted at once; first use of 2 MiB, then the sweep",
    "sealed-start": "policy sealed: the digest of the areas against the sealed one, then as deferred",
    "trust": "policy trust: adopted without a look",
}
#: jobs that play a policy: their rows are split into start-up, blackout and background
POLICIES = ("rebuild", "adopt", "deferred-start", "sealed-start", "trust")
#: what a job is done by, and what it is measured by; which of them depends on the job
METHODS = {
    "limit": "the tables of leaves, read once; for build: memset, of a byte other than 0",
    "inputs": "the tables of leaves as for the limit, and the expectation, read once",
    "zeros": "memset of zeros, for which some processors have a way that no data can take",
    "frames": "the engine, compiled, given a list of pages instead of extents",
    "iokeep": "the engine, compiled",
    "sweep": "the compiled loop of verify alone, one thread: what it is given was found before",
    "numpy": "the engine by NumPy alone",
    "c_walk": "C that walks from the root for each page",
    "c_table": "C that compares table by table",
    "iova_to_phys": "the kernel's own, called for each page (--kernel-source)",
    "warm": "rebuild into memory that was touched before",
    "fresh": "rebuild into memory that the kernel has to clear first",
    "diff": "rebuild, and the two tables compared with each other",
    "plain": "a policy that reads little or nothing before its start",
}
FORMATS = ("vtdss", "x86_64", "amdv1", "arm_lpae_s1", "arm_lpae_s2", "riscv64")
LAYOUTS = {
    "contiguous": "one area",
    "scattered-2m": "2 MiB pieces in any order in memory",
    "random-4k": "each page of 4 KiB anywhere",
}
TABLES = ("sequential", "shuffled")
#: name -> log2 of the leaf size, None = what the kernel chooses
LEAVES: dict[str, int | None] = {"4K": 12, "2M": 21, "1G": 30, "mixed": None}
_DEFAULT_JOBS = ("verify", "digest", "expect")
_DEFAULT_FORMATS = ("vtdss", "arm_lpae_s2")
#: of a scattered layout the largest leaf; of mixed leaves the area that is cut: 1 GiB, 2 MiB and 4 KiB leaves
_PIECE = {"scattered-2m": 21, "random-4k": 12}
_MIXED = (3 << 30) + (5 << 21) + (7 << 12)


@dataclass(frozen=True, slots=True)
class Case:
    """One combination. :param size: mapped bytes, about."""

    job: str
    format: str
    layout: str
    tables: str
    leaf: str
    size: int

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.job} {self.format} {self.layout} {self.tables} {self.leaf}"


def possible(layout: str, leaf: str) -> bool:
    """Whether a layout can have leaves of this size: what is scattered has no larger ones."""
    lg2, piece = LEAVES[leaf], _PIECE.get(layout)
    return piece is None or (lg2 is not None and lg2 <= piece)


def cases(
    jobs: list[str], formats: list[str], layouts: list[str], tables: list[str], leaves: list[str], size: int
) -> Iterator[Case]:
    """Every combination that is possible; an empty list stands for the usual ones."""
    for fmt, layout, leaf, order, job in product(
        formats or _DEFAULT_FORMATS,
        layouts or LAYOUTS,
        leaves or ["4K"],
        tables or TABLES,
        jobs or _DEFAULT_JOBS,
    ):
        if possible(layout, leaf):
            yield Case(job, fmt, layout, order, leaf, size)


@dataclass(slots=True)
class Built:
    """Tables in memory. ``extents`` as they were mapped."""

    fmt: Format
    ram: Ram
    table: Table
    extents: Extents
    leaf_lg2: int | None

    @property
    def root_pa(self) -> int:
        """Pa of the root."""
        return self.table.root_pa


def extents_of(layout: str, leaf: str, size: int) -> Extents:
    """What is mapped."""
    if leaf == "mixed":
        starts = np.arange(max(size // _MIXED, 1), dtype=np.uint64) * np.uint64(4 << 30)
        length = np.uint64(_MIXED - 1)
        return Extents(
            starts, starts + length, starts + np.uint64(1 << 40), np.full(len(starts), 3, np.uint8)
        )
    if layout == "contiguous":
        return Extents.of([(0, size - 1, 1 << 40, 3)])
    lg2 = _PIECE[layout]
    n = size >> lg2
    iova = np.arange(n, dtype=np.uint64) << np.uint64(lg2)
    pa = np.random.default_rng(1).permutation(n).astype(np.uint64)
    pa <<= np.uint64(lg2)
    pa += np.uint64(1 << 40)
    # Columns that begin at the same place of a page disturb each other.
    out = []
    for number, column in enumerate((iova, iova + np.uint64((1 << lg2) - 1), pa)):
        room = np.empty(n + 4 * 64, np.uint64)
        part = room[64 * number : 64 * number + n]
        part[:] = column
        out.append(part)
    return Extents(out[0], out[1], out[2], np.full(n, 3, np.uint8))


def _free_bytes() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 1 << 62


def needed_bytes(case: Case) -> int:
    """Memory that a case takes, about."""
    lg2 = LEAVES[case.leaf] or 21
    tables = (case.size >> lg2) * 8 + (4 << 20)
    columns = (case.size >> 12) * 60 if case.layout == "random-4k" else 0
    return {"diff": 2, "rebuild": 3}.get(case.job, 1) * tables * 5 // 4 + columns


def build(case: Case, seed: int = 0) -> Built:
    """Make the tables of a case. :raises CapabilityError: there is not enough memory."""
    need, free = needed_bytes(case), _free_bytes()
    if need > free - (256 << 20):
        raise CapabilityError(
            f"{case.name} of {case.size >> 30} GiB needs about {need >> 20} MiB of memory, "
            f"{free >> 20} MiB are available",
            "choose a smaller --size",
        )
    fmt = open_format(case.format, {})
    lg2 = LEAVES[case.leaf]
    extents = extents_of(case.layout, case.leaf, case.size)
    tables = _table_count(fmt, extents, lg2)
    ram = Ram.of((tables + 64) * fmt.table_bytes)
    pas = (np.arange(tables, dtype=np.uint64) + np.uint64(64)) * np.uint64(fmt.table_bytes)
    if case.tables == "shuffled":
        np.random.default_rng(seed + 2).shuffle(pas)
    table = fill(fmt, ram, pas, extents, lg2)
    return Built(fmt, ram, table, extents, lg2)


def fill(
    fmt: Format,
    ram: Ram,
    pas: U64,
    extents: Extents,
    lg2: int | None,
    *,
    compiled: bool | None = None,
    threads: int | None = None,
) -> Table:
    """Write tables into ``ram``. :param pas: of the tables, in the order in which they are taken.

    :param compiled: :param threads: as for ``Table.map``.
    """
    given = 0

    def alloc(n: int, size: int = fmt.table_bytes) -> U64:
        nonlocal given
        if size > fmt.table_bytes:  # a root of several tables; at most 16 (Arm)
            return np.array([size], np.uint64)
        given += n
        return pas[given - n : given].copy()

    table = Table.create(fmt, ram, alloc, lambda gone, size=0: None)
    table.map(extents, max_lg2=lg2, compiled=compiled, threads=threads)
    return table


def _table_count(fmt: Format, e: Extents, lg2: int | None) -> int:
    """At most so many tables are needed."""
    last = int(e.last[-1])
    total = 16
    for spec in fmt.levels:
        if lg2 is None or spec.shift + spec.index_bits > lg2:
            blocks = (last >> (spec.shift + spec.index_bits)) + 1
            if lg2 is None and spec.shift + spec.index_bits <= 30:
                blocks = min(blocks, 8 * len(e) + 8)
            total += blocks
    return total
