# SPDX-License-Identifier: Apache-2.0
"""The policies of a live update on the library, each split by who waits for it.

*Blackout* is the time from the replayed areas to a domain that iommufd may own: a VMM waits for it before its
guest runs, or the guest faults on what is not there yet. *First use* is what the first unmap of 2 MiB waits
for afterwards. *Background* goes on beside the guest. *Start-up* is that of the process, before any byte of
a table: Python, NumPy, Numba; a kernel has no such thing.

Every policy begins with a look at the root, as ADOPT does. What a policy has to prove is proved here too: a
run that gets it wrong raises.
"""

from __future__ import annotations

import hmac
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter, thread_time

import numpy as np

from iokeep.bench.cases import Built, Case, fill
from iokeep.bench.limit import limit, must
from iokeep.mem.memory import I64, U64
from iokeep.mem.ram import Ram
from iokeep.pt.deferred import TICK, Deferred
from iokeep.pt.diff import diff, normalised
from iokeep.pt.digest import digest_extents
from iokeep.pt.extents import Extents
from iokeep.pt.formats.base import Format
from iokeep.pt.registry import open_format
from iokeep.pt.tables import TableMemory
from iokeep.pt.verify import verify

_USE = 2 << 20
_KEY = bytes(range(16))


@dataclass(frozen=True, slots=True)
class StartUp:
    """Of a process that works on tables: CPU time in ms.

    :param python: until its first line. :param numpy: import. :param engine: import of the engine.
    :param compiled: Numba and its compiled code from the cache.
    :param compile: the same with an empty cache, once per machine.
    """

    python: float
    numpy: float
    engine: float
    compiled: float
    compile: float

    def of(self, method: str) -> float:
        """What a method of :func:`play` needs of it."""
        plain = self.python + self.numpy + self.engine
        return plain + self.compiled if method in _COMPILED else plain


@dataclass(slots=True)
class Lap:
    """One policy, once, in seconds. :param blackout: its steps. :param first_use: None = is in them.
    :param tick: the longest of the sweep, None = there is none.
    """

    blackout: dict[str, float] = field(default_factory=dict)
    first_use: float | None = None
    background: float = 0.0
    tick: float | None = None

    @property
    def total(self) -> float:
        """All work."""
        return sum(self.blackout.values()) + (self.first_use or 0.0) + self.background


class _Clock:
    """CPU time of one thread, which others on the same cores do not lengthen; time, where there are more."""

    def __init__(self, threads: int = 1) -> None:
        self._now = thread_time if threads == 1 else perf_counter
        self._since = self._now()

    def lap(self) -> float:
        """Seconds since the last."""
        now = self._now()
        since, self._since = self._since, now
        return now - since


def expectation(e: Extents) -> Callable[[int, int], Extents]:
    """What :class:`Deferred` asks: the extents that touch a range, found in O(log n)."""

    def expect(start: int, last: int) -> Extents:
        lo = int(np.searchsorted(e.last, np.uint64(start), side="left"))
        hi = int(np.searchsorted(e.iova, np.uint64(last), side="right"))
        return Extents(e.iova[lo:hi], e.last[lo:hi], e.pa[lo:hi], e.prot[lo:hi])

    return expect


def _open(case: Case, built: Built) -> Format:
    """The record's format, and that there is a root."""
    fmt = open_format(case.format, {})
    must(bool(TableMemory(fmt, built.ram).root(built.root_pa).any()))
    return fmt


class _Rebuild:
    """New tables beside the prior ones, and the proof that both translate what the areas say.

    :param warm: into memory that this process has touched before. :param by_diff: compare both tables with
        each other, attributes and leaf sizes too, as COMPARE does; else each with the areas.
    """

    def __init__(self, case: Case, built: Built, threads: int, *, warm: bool, by_diff: bool = False) -> None:
        self.case, self.built, self.threads, self.by_diff = case, built, threads, by_diff
        fmt = built.fmt
        self.tables = len(built.table.pages()) + 1
        self.pas: U64 = (np.arange(self.tables, dtype=np.uint64) + np.uint64(64)) * np.uint64(fmt.table_bytes)
        self.ram = self._fresh() if warm else None

    def _fresh(self) -> Ram:
        return Ram.of((self.tables + 64) * self.built.fmt.table_bytes)

    def __call__(self) -> Lap:
        built, clock = self.built, _Clock(self.threads)
        fmt = _open(self.case, built)
        ram, lap = self.ram, Lap({"root": clock.lap()})
        if ram is None:
            ram = self._fresh()
        else:
            ram.bytes.fill(0)
        args = fmt, ram, self.pas, built.extents, built.leaf_lg2
        table = fill(*args, compiled=True, threads=self.threads)
        lap.blackout["build"] = clock.lap()
        if self.by_diff:
            pair = fmt, ram, table.root_pa, fmt, built.ram, built.root_pa
            must(diff(*pair, compiled=True, threads=self.threads).equal)
        else:
            for mem, root in ((built.ram, built.root_pa), (ram, table.root_pa)):
                must(verify(fmt, mem, root, built.extents, compiled=True, threads=self.threads).equal)
        lap.blackout["compare"] = clock.lap()
        return lap


def _adopt(case: Case, built: Built, pages: U64, compiled: bool, threads: int) -> Lap:
    """:param pages: as for :func:`_later`."""
    clock = _Clock(threads)
    fmt = _open(case, built)
    lap = Lap({"root": clock.lap()})
    args = fmt, built.ram, built.root_pa, built.extents
    must(verify(*args, compiled=compiled, threads=threads, owned=pages).equal)
    lap.blackout["validate"] = clock.lap()
    return lap


def _later(case: Case, built: Built, pages: U64, sealed: bytes | None) -> Lap:
    """:param pages: pas of all tables, sorted: what a kernel that is going to change them knows."""
    e, clock = built.extents, _Clock()
    fmt = _open(case, built)
    lap = Lap({"root": clock.lap()})
    if sealed is not None:
        areas = normalised(e.canonical(), fmt.write_only)
        must(hmac.compare_digest(digest_extents(areas, _KEY), sealed))
        lap.blackout["digest"] = clock.lap()
    state = Deferred(fmt, built.ram, built.root_pa, expectation(e), owned=lambda: pages)
    lap.blackout["adopt"] = clock.lap()
    start = int(e.iova[len(e) // 2])
    start += (int(e.last[len(e) // 2]) - start) // 2 & -_USE
    must(not state.need(start, start + _USE - 1))
    lap.first_use = clock.lap()
    lap.tick = 0.0
    while not state.done:
        state.sweep(TICK)
        took = clock.lap()
        lap.background += took
        lap.tick = max(lap.tick, took)
    must(state.sound)
    return lap


def _trust(case: Case, built: Built) -> Lap:
    clock = _Clock()
    _open(case, built)
    return Lap({"root": clock.lap()})


_COMPILED = ("iokeep", "warm", "fresh", "diff")
#: slow methods are left out where there are more tables of level 0: 64 GiB in leaves of 4 KiB
_SLOW_TABLES = 1 << 15


def play(case: Case, built: Built, rows: I64, repeat: int, threads: int) -> dict[str, list[Lap]]:
    """Method -> its laps, round by round; "limit" is memory's speed.

    :param rows: of the tables of level 0.
    """
    read = limit(built, rows)

    def reading() -> Lap:
        clock = _Clock()
        read()
        return Lap({"read": clock.lap()})

    pages = np.sort(built.table.pages())
    methods: dict[str, Callable[[], Lap]] = {"limit": reading}
    if case.job == "rebuild":
        methods["warm"] = _Rebuild(case, built, threads, warm=True)
        methods["fresh"] = _Rebuild(case, built, threads, warm=False)
        if len(rows) <= _SLOW_TABLES:
            methods["diff"] = _Rebuild(case, built, threads, warm=True, by_diff=True)
    elif case.job == "adopt":
        methods["iokeep"] = lambda: _adopt(case, built, pages, True, threads)
        if len(rows) <= _SLOW_TABLES:
            methods["numpy"] = lambda: _adopt(case, built, pages, False, threads)
    elif case.job == "trust":
        methods["plain"] = lambda: _trust(case, built)
    else:
        sealed = None
        if case.job == "sealed-start":
            sealed = digest_extents(normalised(built.extents, built.fmt.write_only), _KEY)
        methods["plain"] = lambda: _later(case, built, pages, sealed)
    for method in methods.values():  # compiled, and warm
        method()
    laps: dict[str, list[Lap]] = {name: [] for name in methods}
    for _ in range(repeat):
        for name, method in methods.items():
            laps[name].append(method())
    return laps


def typical(laps: list[Lap]) -> Lap:
    """Medians, each part by itself."""
    uses = [lap.first_use for lap in laps if lap.first_use is not None]
    ticks = [lap.tick for lap in laps if lap.tick is not None]
    return Lap(
        {name: median(lap.blackout[name] for lap in laps) for name in laps[0].blackout},
        median(uses) if uses else None,
        median(lap.background for lap in laps),
        median(ticks) if ticks else None,
    )


_PROBE = """
import time
at = [0, time.process_time_ns()]
import numpy
at.append(time.process_time_ns())
import iokeep.pt.deferred, iokeep.pt.diff, iokeep.pt.digest, iokeep.pt.registry
at.append(time.process_time_ns())
from iokeep.bench.cases import Case, build
built = build(Case("adopt", "vtdss", "contiguous", "shuffled", "4K", 1 << 26))
args = built.fmt, built.ram, built.root_pa, built.extents
iokeep.pt.verify.verify(*args, compiled=False)
before = time.process_time_ns()
assert iokeep.pt.verify.verify(*args, compiled=True).equal
at.append(at[-1] + time.process_time_ns() - before)
print([b - a for a, b in zip(at, at[1:])])
"""


def start_up(rounds: int = 3) -> StartUp:
    """Measure start-up with processes of their own; medians of ``rounds``, with a compile before."""
    with tempfile.TemporaryDirectory(prefix="iokeep-bench-") as place:
        environment = {**os.environ, "NUMBA_CACHE_DIR": place}
        times = []
        for _ in range(rounds + 1):
            command = [sys.executable, "-c", _PROBE]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            times.append([ns / 1e6 for ns in json.loads(done.stdout)])
    python, numpy, engine, compiled = (median(column) for column in zip(*times[1:], strict=True))
    return StartUp(python, numpy, engine, compiled, times[0][3])
