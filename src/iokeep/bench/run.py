# SPDX-License-Identifier: Apache-2.0
"""Runs cases: every method in turn, round by round, so that what disturbs one disturbs all; medians."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from iokeep.bench.cases import POLICIES, Built, Case, build, needed_bytes
from iokeep.bench.kernel_walk import FLAGS, KernelSource, KernelWalk
from iokeep.bench.limit import Method, inputs, limit, must
from iokeep.bench.peers import Peers, can_read, compile_peers
from iokeep.bench.policies import Lap, StartUp, play, start_up, typical
from iokeep.mem.memory import I64, U64
from iokeep.pt.build import Table
from iokeep.pt.diff import diff, normalised
from iokeep.pt.digest import digest_extents
from iokeep.pt.leaves import extents
from iokeep.pt.table_digest import digest
from iokeep.pt.tables import TableMemory, Tables, descend
from iokeep.pt.verify import entries_of, verify

SCHEMA = "iokeep.bench-v1"
_KEY = bytes(range(16))
_SCALE = 16 << 40
#: any byte but 0, which some processors write in a way of its own
_BYTE = 0x5A


@dataclass(frozen=True, slots=True)
class Options:
    """:param repeat: rounds; the median counts. :param threads: of the engine. :param peers: those in C.

    :param kernel: a source tree whose ``iova_to_phys`` is a peer of job ``verify``.
    """

    repeat: int = 7
    threads: int = 1
    peers: bool = True
    kernel: KernelSource | None = None


def _methods(
    case: Case, built: Built, peers: Peers | None, threads: int, walk: KernelWalk | None
) -> tuple[dict[str, Method], int]:
    """Method -> what it does; and the bytes of tables that are read (or written)."""
    fmt, ram, root, e = built.fmt, built.ram, built.root_pa, built.extents
    upper = descend(TableMemory(fmt, ram), root)
    size = upper.visited_bytes(fmt)
    methods: dict[str, Method] = {"limit": limit(built, upper.row)}
    args = (fmt, ram, root)
    if case.job == "verify":
        check = partial(verify, *args, e)
        methods["iokeep"] = lambda: must(check(compiled=True, threads=threads).equal)
        methods["numpy"] = lambda: must(check(compiled=False).equal)
        if case.layout == "random-4k":
            methods["inputs"] = inputs(methods["limit"], e)
        elif case.leaf == "4K":
            methods["sweep"] = _sweep(built, upper.tables(fmt))
        if peers is not None:
            methods["c_walk"] = lambda: must(peers.walk_pages(fmt, ram, root, e) == 0)
            if case.leaf == "4K" and case.layout != "random-4k":
                order = np.argsort(upper.row)
                rows = np.ascontiguousarray(upper.row[order])
                words = _first_words(built, upper.base)[order]
                methods["c_table"] = lambda: must(peers.sweep_tables(fmt, ram, rows, words) == 0)
        if walk is not None:
            walk.open(*args)
            methods["iova_to_phys"] = lambda: must(walk.wrong_pages(e) == 0)
    elif case.job == "verify-range":
        start = int(e.iova[len(e) // 2]) & -(2 << 20)
        some = partial(verify, *args, e, start=start, last=start + (2 << 20) - 1)
        methods["iokeep"] = lambda: must(some().equal)
    elif case.job == "digest":
        want = digest_extents(normalised(e, fmt.write_only), _KEY)
        methods["iokeep"] = lambda: must(digest(*args, _KEY, compiled=True, threads=threads) == want)
        methods["numpy"] = lambda: must(digest(*args, _KEY, compiled=False) == want)
    elif case.job == "expect":
        methods["iokeep"] = lambda: digest_extents(e, _KEY)
    elif case.job == "extents":
        methods["iokeep"] = lambda: extents(*args, compiled=True, threads=threads)
        methods["numpy"] = lambda: extents(*args, compiled=False)
    elif case.job == "diff":
        other = build(case, seed=1)
        methods["limit"] = _both(methods["limit"], limit(other, descend(_memory(other), other.root_pa).row))
        both = (*args, other.fmt, other.ram, other.root_pa)
        methods["iokeep"] = lambda: must(diff(*both, compiled=True, threads=threads).equal)
        methods["numpy"] = lambda: must(diff(*both, compiled=False).equal)
        size *= 2
    elif case.job == "build":
        pages = np.unique(np.concatenate(upper.pages))
        again = partial(_build_again, built, pages)
        filled = partial(_memset, built, upper.row, _BYTE)
        methods["limit"] = filled
        methods["zeros"] = partial(_memset, built, upper.row, 0)
        if case.layout == "random-4k":
            # What is read is three times what is written: no map of extents is faster than both.
            methods["inputs"] = inputs(filled, e)
            methods["frames"] = partial(again, True, threads, frames=True)
        methods["iokeep"] = partial(again, True, threads)
        methods["numpy"] = partial(again, False, 1)
    return methods, size


def _sweep(built: Built, tables: Tables) -> Method:
    """The compiled loop of ``verify`` over tables of level 0 that hold one run each; what they must hold and
    their order in memory are found before.
    """
    from iokeep.pt.kernels import in_memory_order
    from iokeep.pt.sweep import Plan

    plan = Plan(_memory(built), tables, built.extents, entries_of(built.fmt, 0))
    place, rows = in_memory_order(tables.row)
    columns = rows, plan.kind[place], plan.word[place], plan.entry[place], np.zeros(len(rows), np.uint8)

    def run() -> None:
        plan.runs(*columns)
        must(bool(columns[-1].view(np.bool_).all()))

    return run


def _memory(built: Built) -> TableMemory:
    return TableMemory(built.fmt, built.ram)


def _both(a: Method, b: Method) -> Method:
    def run() -> None:
        a()
        b()

    return run


def _first_words(built: Built, base: U64) -> U64:
    """First item of each table of level 0, where one extent fills each."""
    e, spec = built.extents, built.fmt.levels[0]
    at = np.searchsorted(e.iova, base, side="right") - 1
    perm = spec.leaf_base | spec.prot_bits[3]
    return (e.pa[at] + (base - e.iova[at])) | np.uint64(perm)


def _leaf_tables(built: Built, rows: I64) -> U64:
    words = built.ram.words.reshape(-1, built.fmt.levels[0].items)
    return words[int(rows.min()) : int(rows.max()) + 1]


def _memset(built: Built, rows: I64, byte: int) -> None:
    """The C library's memset of the tables of level 0."""
    words = _leaf_tables(built, rows)
    ctypes.memset(words.ctypes.data, byte, words.nbytes)


def _clear_all(built: Built) -> None:
    """What an allocator gives is zeroed: memory that was touched before, cleared."""
    built.ram.words[:] = 0


def _build_again(built: Built, pages: U64, compiled: bool, threads: int, *, frames: bool = False) -> None:
    """The same tables again, into memory of :func:`_clear_all`.

    :param frames: from a list of pages, not from extents.
    """
    fmt, ram = built.fmt, built.ram
    given = 0

    def alloc(n: int, size: int = fmt.table_bytes) -> U64:
        nonlocal given
        if size > fmt.table_bytes:
            return np.array([built.root_pa], np.uint64)
        given += n
        return stock[given - n : given].copy()

    stock = pages[pages != np.uint64(built.root_pa)] if fmt.root_bytes > fmt.table_bytes else pages
    table = Table.create(fmt, ram, alloc, lambda gone, size=0: None)
    e = built.extents
    if frames:
        table.map_frames(int(e.iova[0]), e.pa, int(e.prot[0]), compiled=compiled, threads=threads)
    else:
        table.map(e, max_lg2=built.leaf_lg2, compiled=compiled, threads=threads)
    built.table = table


def measure(case: Case, peers: Peers | None, options: Options) -> list[dict[str, Any]]:
    """One row for each method of a case that is no policy. :raises CapabilityError: not enough memory."""
    built = build(case)
    usable = peers if peers is not None and options.peers and can_read(built.fmt) else None
    walk = options.kernel.walk(case.format) if options.kernel and case.job == "verify" else None
    methods, size = _methods(case, built, usable, options.threads, walk)
    times: dict[str, list[float]] = {name: [] for name in methods}
    slow: set[str] = set()
    prepare: Method = partial(_clear_all, built) if case.job == "build" else dict
    for name, method in methods.items():  # compiled, and warm
        prepare()
        begin = perf_counter()
        method()
        if perf_counter() - begin > 2.0:
            slow.add(name)
    for number in range(options.repeat):
        for name, method in methods.items():
            if name in slow and number:
                continue  # minutes for nothing
            prepare()
            begin = perf_counter()
            method()
            times[name].append(perf_counter() - begin)
    ms = {name: float(np.median(values)) * 1e3 for name, values in times.items()}
    rows = []
    for name in methods:
        row = _row(case, built, size, name, times[name], ms["limit"] if case.job in _READERS else None)
        for peer in _PEERS:
            row["speedup"][peer] = ms[peer] / ms[name] if peer in ms and ms[name] else None
        rows.append(row)
    return rows


def _row(
    case: Case, built: Built, size: int, method: str, times: list[float], limit_ms: float | None
) -> dict[str, Any]:
    """What every row says. :param times: s, of each round. :param limit_ms: None = there is none for it."""
    mapped, ms = built.extents.mapped_bytes, float(np.median(times)) * 1e3
    measurable = ms and limit_ms is not None
    return {
        "job": case.job,
        "format": case.format,
        "layout": case.layout,
        "tables": case.tables,
        "leaf": case.leaf,
        "mapped_bytes": mapped,
        "areas": len(built.extents),
        "table_bytes": size,
        "method": method,
        "ms": ms,
        "ms_least": min(times) * 1e3,
        "ms_most": max(times) * 1e3,
        "ns_per_page": ms * 1e6 / (mapped >> 12),
        "share_of_limit": limit_ms / ms if measurable and limit_ms is not None else None,
        "gib_per_s": size / ms * 1e3 / (1 << 30) if measurable else None,
        "s_per_16_tib": ms / 1e3 * _SCALE / mapped,
        "speedup": dict.fromkeys(_PEERS),
        "split": None,
    }


def measure_policies(
    group: list[Case], options: Options, starting: StartUp | None = None
) -> list[dict[str, Any]]:
    """One row for each method of policies on the same tables. :raises CapabilityError: not enough memory."""
    largest = max(group, key=needed_bytes)
    built = build(largest)
    return [row for case in group for row in _policy(case, built, options, starting)]


def _policy(case: Case, built: Built, options: Options, starting: StartUp | None) -> list[dict[str, Any]]:
    upper = descend(TableMemory(built.fmt, built.ram), built.root_pa)
    size = upper.visited_bytes(built.fmt)
    laps = play(case, built, upper.row, options.repeat, options.threads)
    limit_ms = float(np.median([lap.total for lap in laps["limit"]])) * 1e3
    rows = []
    for name, mine in laps.items():
        row = _row(case, built, size, name, [lap.total for lap in mine], None)
        if name != "limit":
            row["split"] = _split(typical(mine), starting, name)
            reads = row["split"]["background_ms"] or row["split"]["blackout_ms"]
            if case.job != "trust" and len(upper.row):
                row["share_of_limit"] = limit_ms / reads
        rows.append(row)
    return rows


def _split(lap: Lap, starting: StartUp | None, method: str) -> dict[str, Any]:
    return {
        "start_up_ms": None if starting is None else starting.of(method),
        "blackout_ms": sum(lap.blackout.values()) * 1e3,
        "first_use_ms": None if lap.first_use is None else lap.first_use * 1e3,
        "background_ms": lap.background * 1e3,
        "longest_tick_ms": None if lap.tick is None else lap.tick * 1e3,
        "steps_ms": {name: seconds * 1e3 for name, seconds in lap.blackout.items()},
    }


_PEERS = ("c_walk", "c_table", "numpy", "iova_to_phys")
#: jobs that go through all tables: others have no limit in memory's speed
_READERS = ("verify", "digest", "extents", "diff", "build")


def run(
    chosen: Iterable[Case], options: Options, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """All cases; the document of ``iokeep bench run``. :param say: told each case before it runs."""
    compiled = compile_peers() if options.peers else "not asked for"
    peers = compiled if isinstance(compiled, Peers) else None
    chosen = list(chosen)
    starting = None
    if any(case.job in POLICIES for case in chosen):
        say("start-up of a process")
        starting = start_up()
    load = os.getloadavg()[0]
    results: list[dict[str, Any]] = []
    for _, same in groupby(chosen, lambda case: (case.job in POLICIES, replace(case, job=""))):
        group = list(same)
        if group[0].job in POLICIES:
            say(f"{', '.join(case.job for case in group)}: {group[0].name} {group[0].size >> 20} MiB")
            results += measure_policies(group, options, starting)
            continue
        for case in group:
            say(f"{case.name} {case.size >> 20} MiB")
            results += measure(case, peers, options)
    return {
        "machine": {
            "cpu": _cpu(),
            "cpus": len(os.sched_getaffinity(0)),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "load_before": load,
            "load_after": os.getloadavg()[0],
            "python": platform.python_version(),
            "numpy": np.__version__,
            "numba": version("numba"),
        },
        "repeat": options.repeat,
        "threads": options.threads,
        "peers_missing": compiled if isinstance(compiled, str) else None,
        "kernel_source": None if options.kernel is None else _source(options.kernel),
        "start_up_ms": None if starting is None else asdict(starting),
        "results": results,
    }


def _source(kernel: KernelSource) -> dict[str, Any]:
    return {"version": kernel.version, "flags": " ".join(FLAGS), "missing": kernel.missing}


def _cpu() -> str:
    """What /proc/cpuinfo calls it, else the architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
