#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Makes docs/validation-cost.md's tables and figures from a run of ``iokeep bench``.

``measure`` runs the benchmark (minutes, best on an idle machine) and writes docs/data/validation-cost.json,
``measure N...`` only those of ``COMMANDS``, ``measure kernel`` what the calls of the software kernel take
(docs/data/kernel-cost.json), ``measure iova_to_phys DIR`` validation beside the iova_to_phys of the Linux
source tree in DIR; what is not run is kept. Without arguments the page and docs/validation-cost-*.svg are
made from that; ``--check`` says whether they are.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import thread_time
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "validation-cost.md"
DATA = ROOT / "docs" / "data" / "validation-cost.json"
KERNEL = ROOT / "docs" / "data" / "kernel-cost.json"
BLOCK = re.compile(r"(<!-- made: (\S+) -->\n\n)(.*?)(\n<!-- end -->\n)", re.DOTALL)

_ALL = "--job rebuild --job adopt --job deferred-start --job sealed-start --job trust"
_LATER = "--job deferred-start --job sealed-start"
_BOTH = "--format vtdss --format arm_lpae_s2 --layout contiguous --tables shuffled"
_VTD = "--format vtdss --tables shuffled"
_QUIET = "--no-peers --quiet --json"
#: what is run, in this order; that of 4 TiB needs 10 GiB of memory
COMMANDS = (
    f"iokeep bench run {_LATER} {_VTD} --layout scattered-2m --leaf 2M"
    f" --size 8M --size 128M --size 2G --size 32G --size 512G --size 4T --repeat 5 {_QUIET}",
    f"iokeep bench run {_ALL} {_VTD} --tables sequential --size 16G --repeat 5 {_QUIET}",
    f"iokeep bench run {_ALL} {_BOTH}"
    f" --size 1G --size 4G --size 16G --size 64G --size 256G --repeat 5 {_QUIET}",
    f"iokeep bench run {_ALL} {_BOTH} --leaf 2M --leaf 1G --leaf mixed --size 1T --repeat 5 {_QUIET}",
    f"iokeep bench run {_ALL} {_BOTH} --size 1T --repeat 3 {_QUIET}",
    f"iokeep bench run --job adopt {_LATER} --job trust {_VTD}"
    f" --layout contiguous --size 4T --repeat 3 {_QUIET}",
    "iokeep bench run --job verify --job digest --job diff --job extents --job build --format vtdss"
    f" --format arm_lpae_s2 --layout contiguous --layout random-4k --size 64G --repeat 7 {_QUIET}",
)
#: where DIR is a Linux source tree
WALK = (
    "iokeep bench run --job verify --format vtdss --format arm_lpae_s2 --layout contiguous --layout random-4k"
    " --size 1G --size 64G --repeat 5 --quiet --json --kernel-source DIR"
)
#: columns that nothing here uses
_UNUSED = ("speedup", "gib_per_s", "s_per_16_tib", "ns_per_page")
GIB, TIB = 1 << 30, 1 << 40
#: job, its best method -> name of the policy
POLICIES = {
    ("rebuild", "fresh"): "rebuild, fresh memory",
    ("rebuild", "warm"): "rebuild, warm memory",
    ("adopt", "iokeep"): "adopt",
    ("sealed-start", "plain"): "sealed",
    ("deferred-start", "plain"): "deferred",
    ("trust", "plain"): "trust",
}
#: Okabe and Ito's colours, which colour-blind people can tell apart, and a marker besides
LOOK = {
    "rebuild, fresh memory": ("#D55E00", "v"),
    "rebuild, warm memory": ("#E69F00", "^"),
    "adopt": ("#0072B2", "o"),
    "sealed": ("#009E73", "s"),
    "deferred": ("#56B4E9", "D"),
    "trust": ("#999999", "x"),
}
Row = dict[str, Any]


# ---- numbers


def size(n: int) -> str:
    """64 GiB, 1 TiB."""
    for unit, name in ((TIB, "TiB"), (GIB, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if n >= unit:
            return f"{n / unit:.3g} {name}"
    return f"{n} bytes"


def duration(ms: float | None) -> str:
    """Three digits: 95 ns, 230 us, 1.23 ms, 4.5 s."""
    if ms is None:
        return "-"
    if ms >= 999.5:
        return f"{ms / 1e3:.3g} s"
    if ms >= 0.9995:
        return f"{ms:.3g} ms"
    return f"{ms * 1e3:.3g} us" if ms >= 0.0009995 else f"{ms * 1e6:.3g} ns"


def count(n: int) -> str:
    """16 384."""
    return f"{n:,}".replace(",", " ")


def percent(share: float | None) -> str:
    """62 %."""
    return "-" if share is None else f"{share:.0%}".replace("%", " %")


def times(ratio: float) -> str:
    """2.5 times, as one writes it."""
    return f"{ratio:.2g}" if ratio < 100 else f"{ratio:.0f}"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return value


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; the first column is text, the others are numbers."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


# ---- the measurement


@dataclass(frozen=True)
class Measured:
    """What ``measure`` wrote."""

    runs: list[dict[str, Any]]
    walk: dict[str, Any]
    kernel: list[dict[str, Any]]

    @classmethod
    def load(cls) -> Measured:
        """From the repository."""
        read = [json.loads(path.read_text(encoding="utf-8")) for path in (DATA, KERNEL)]
        return cls(read[0]["runs"], read[0]["iova_to_phys"], read[1]["rows"])

    @property
    def rows(self) -> list[Row]:
        """Of all runs."""
        return [row for run in self.runs for row in run["results"]]

    def find(self, job: str, method: str, **what: Any) -> list[Row]:
        """Rows by size; ``layout`` contiguous, ``tables`` shuffled, vtdss, 4K where nothing else is said."""
        what = {"format": "vtdss", "layout": "contiguous", "tables": "shuffled", "leaf": "4K"} | what
        found = [
            row
            for row in self.rows
            if (row["job"], row["method"]) == (job, method) and all(row[k] == v for k, v in what.items())
        ]
        # What two commands have measured counts once.
        once = {(row["mapped_bytes"], row["areas"]): row for row in reversed(found)}
        return [once[size] for size in sorted(once)]

    def at(self, job: str, method: str, mapped: int, **what: Any) -> Row | None:
        """The one of about that size."""
        near = [r for r in self.find(job, method, **what) if 0.7 * mapped < r["mapped_bytes"] < 1.4 * mapped]
        return near[0] if near else None

    def sizes(self, **what: Any) -> list[int]:
        """Sizes that were measured."""
        return sorted({r["mapped_bytes"] for r in self.find("trust", "plain", **what)})


def measure(which: Sequence[int]) -> None:
    """Run ``COMMANDS[which]``, write the JSON after each; runs of other commands stay."""
    old = _stored()
    runs = {run["command"]: run for run in old["runs"]}
    for command in [COMMANDS[n] for n in which]:
        runs[command] = _bench(command)
        _save([runs[known] for known in COMMANDS if known in runs], old["iova_to_phys"])


def measure_walk(source: str) -> None:
    """Run ``WALK`` with a Linux source tree; the other runs stay."""
    walk = _bench(WALK, WALK.removesuffix("DIR") + shlex.quote(source))
    if walk["kernel_source"]["missing"]:
        sys.exit(f"not measured: {walk['kernel_source']['missing']}")
    _save(_stored()["runs"], walk)


def _stored() -> dict[str, Any]:
    empty: dict[str, Any] = {"runs": [], "iova_to_phys": None}
    return empty | (json.loads(DATA.read_text(encoding="utf-8")) if DATA.exists() else {})


def _bench(command: str, real: str = "") -> dict[str, Any]:
    """What a command prints, with what is used of it. :param real: what is run, where less is stored."""
    print(real or command, file=sys.stderr)
    words = [sys.executable, "-m", *shlex.split(real or command)]
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    document = json.loads(done.stdout)
    for row in document["results"]:
        for key in _UNUSED:
            del row[key]
    run = {"command": command} | {key: _rounded(value) for key, value in document.items()}
    return run | {"results": [_rounded(row) for row in document["results"]]}


def measure_kernel(rounds: int = 5) -> None:
    """What the calls of a live update take in the software kernel, for guests of pages of 4 KiB anywhere."""
    rows = []
    for mapped in (1 << 24, 1 << 26, 1 << 28, GIB):
        print(f"software kernel: {size(mapped)}", file=sys.stderr)
        laps = [_live_update(mapped) for _ in range(rounds)]
        rows.append({"mapped_bytes": mapped, "rounds": rounds} | {
            name: float(f"{median(lap[name] for lap in laps):.4g}") for name in laps[0]
        })  # fmt: skip
    lines = ",\n".join(json.dumps(row) for row in rows)
    KERNEL.write_text('{"rows": [\n' + lines + "\n]}\n", encoding="utf-8")


def _live_update(mapped: int) -> dict[str, float]:
    """One update of a guest that maps so much: step -> CPU time of the kernel in ms."""
    from iokeep.iommufd.client import Iommufd, VfioDevice
    from iokeep.luo.client import LiveUpdate
    from iokeep.soft.testing import LocalHost

    params: dict[str, str | int] = {"placement": "4k-random", "sweep_rate": 0}
    with LocalHost(mapped * 3 // 2 + (64 << 20), params=params, devices=False) as host:
        t = host.transport()
        ram = t.memfd_create("ram", 2)  # MFD_ALLOW_SEALING
        t.ftruncate(ram, mapped)
        t.add_seals(ram, 7)
        iommufd, device = Iommufd(t), VfioDevice(t, "/dev/vfio/devices/vfio0")
        number = device.bind(iommufd)
        ioas = iommufd.ioas_alloc()
        ioas.map_file(ram, 0, mapped, iova=4 * GIB)
        hwpt = iommufd.hwpt_alloc(number, ioas.id)
        device.attach(hwpt)
        session = LiveUpdate(t).create("vm")
        clock = _kernel_clock()
        session.preserve(ram, 1)
        iommufd.mark_preserve(hwpt, 2)
        session.preserve(iommufd.fd, 3)
        session.preserve(device.fd, 4)
        steps = {"preserve_ms": clock()}
        at: list[float] = []
        host.kernel.reboot_hooks.insert(0, lambda kernel: at.append(thread_time()))
        host.kernel.reboot_hooks.append(lambda kernel: at.append(thread_time()))
        t.reboot_kexec()
        steps["freeze_ms"] = at[1] - at[0]
        host.kexec("soft-7.4", params)
        t = host.transport()
        session = LiveUpdate(t).retrieve("vm")
        ram = session.retrieve(1)
        iommufd, device = Iommufd(t, session.retrieve(3)), VfioDevice(t, session.retrieve(4))
        device.bind(iommufd)
        ioas = iommufd.ioas_alloc()
        ioas.map_file(ram, 0, mapped, iova=4 * GIB)
        clock = _kernel_clock()
        device.attach(iommufd.adopt(ioas.id, 2, deferred=True).hwpt_id)
        steps["deferred_ms"] = clock()
    return {name: seconds * 1e3 for name, seconds in steps.items()}


def _kernel_clock() -> Callable[[], float]:
    """CPU time of the software kernel's thread from now on, in seconds; while it runs."""
    (thread,) = (t.ident for t in threading.enumerate() if t is not threading.main_thread())
    clock = time.pthread_getcpuclockid(thread or 0)
    start = time.clock_gettime(clock)
    return lambda: time.clock_gettime(clock) - start


def _save(runs: list[dict[str, Any]], walk: dict[str, Any] | None) -> None:
    """A line for each row."""
    text = '{"runs": [\n' + ",\n".join(_lines(run) for run in runs) + "\n]"
    if walk is not None:
        text += ',\n"iova_to_phys": ' + _lines(walk)
    DATA.parent.mkdir(exist_ok=True)
    DATA.write_text(text + "}\n", encoding="utf-8")


def _lines(run: dict[str, Any]) -> str:
    head = json.dumps({key: value for key, value in run.items() if key != "results"})
    rows = ",\n".join(json.dumps(row) for row in run["results"])
    return f'{head[:-1]}, "results": [\n{rows}\n]}}'


# ---- the page


def _blackout(row: Row | None) -> float | None:
    return None if row is None else row["split"]["blackout_ms"]


def _must(row: Row | None) -> Row:
    if row is None:
        sys.exit(f"{DATA} lacks a case that the page needs: run {sys.argv[0]} measure")
    return row


def _answer(m: Measured) -> str:
    adopts = [r for f in ("vtdss", "arm_lpae_s2") for r in m.find("adopt", "iokeep", format=f)]
    shares = [r["share_of_limit"] for r in adopts if r["mapped_bytes"] >= 64 * GIB]
    low, high = percent(min(shares)), percent(max(shares))
    adopt, large = _must(m.at("adopt", "iokeep", TIB)), _must(m.at("adopt", "iokeep", TIB, leaf="2M"))
    tables = size(adopt["table_bytes"]), size(large["table_bytes"])
    small_ms, large_ms = duration(_blackout(adopt)), duration(_blackout(large))
    warm, fresh = (
        times(_must(m.at("rebuild", method, TIB))["split"]["blackout_ms"] / adopt["split"]["blackout_ms"])
        for method in ("warm", "fresh")
    )
    first, last = m.find("deferred-start", "plain")[0], m.find("deferred-start", "plain")[-1]
    sizes = size(first["mapped_bytes"]), size(last["mapped_bytes"])
    starts = duration(_blackout(first)), duration(_blackout(last))
    uses = duration(first["split"]["first_use_ms"]), duration(last["split"]["first_use_ms"])
    sealed = _must(m.at("sealed-start", "plain", last["mapped_bytes"]))
    in_digest = duration(_blackout(sealed))
    trust = _must(m.at("trust", "plain", last["mapped_bytes"]))
    saved = last["split"]["blackout_ms"] - trust["split"]["blackout_ms"]
    slower = [row["ms"] / own["ms"] for row, own, _ in _walks(m, 64 * GIB) if row["layout"] == "contiguous"]
    walks = f"{times(min(slower))} to {times(max(slower))}"
    gain = f"{duration(abs(saved))} {'sooner' if saved > 0 else 'later'} than `deferred`"
    return f"""\
1. **A full and exact validation costs one pass over the memory of the tables**: from 64 GiB in 4 KiB
   pages on, `adopt` runs at {low} to {high} of the speed at which one core can read that memory at all,
   which is {small_ms} for 1 TiB; rebuilding takes {warm} times (warm memory) to {fresh} times (fresh
   memory) as long. In 2 MiB pages the tables have {tables[1]} instead of {tables[0]}, and 1 TiB takes
   {large_ms}. A loop over the kernel's own `iova_to_phys` [takes](#against-iova_to_phys)
   {walks} times as long as one such pass.
2. **Nobody has to wait for it**: with `deferred` the domain is in use {starts[0]} after the replay of
   {sizes[0]} and {starts[1]} after that of {sizes[1]}. An unmap of 2 MiB at once then waits {uses[0]} and
   {uses[1]} ([why](#what-dominates)), and all else is proved beside the guest; `sealed` also
   proves, in {in_digest} for {sizes[1]} in one area, that the set-up is the one that was frozen.
3. **So `trust` gains nothing**: at {sizes[1]} it starts {gain}, and proves nothing.
"""


def _machine(m: Measured) -> str:
    machine = m.runs[0]["machine"]
    loads = [run["machine"][when] for run in m.runs for when in ("load_before", "load_after")]
    load = f"{min(loads):.1f} to {max(loads):.1f}"
    spread = sorted((r["ms_most"] - r["ms_least"]) / r["ms"] for r in m.rows if r["ms"] > 1)
    typical, much = percent(median(spread)), percent(spread[int(len(spread) * 0.9)])
    repeats = " or ".join(str(n) for n in sorted({run["repeat"] for run in m.runs}))
    versions = f"Python {machine['python']}, NumPy {machine['numpy']}, Numba {machine['numba']}"
    memory = size(machine["memory_bytes"])
    return f"""\
* {machine["cpu"]}, {machine["cpus"]} cores of a virtual machine, {memory} of memory;
  {versions}.
* Times are CPU time of the one thread that works, system calls and page faults included.
* Medians of {repeats} rounds; in a round every method of a case runs once, so that what disturbs one
  disturbs all.
* The machine was not idle: load average {load}. Others who use memory and caches lengthen CPU time too:
  from the quickest to the slowest round of a row (of those above 1 ms) lie {typical} of its median
  typically, and more than {much} in one row of ten. Take the second digit of a time lightly, and the
  ratios first.
"""


def _ratios(m: Measured) -> str:
    rows = []
    for mapped in m.sizes():
        cells = [size(mapped), size(_must(m.at("adopt", "iokeep", mapped))["table_bytes"])]
        for fmt in ("vtdss", "arm_lpae_s2"):
            row = m.at("adopt", "iokeep", mapped, format=fmt)
            cells.append(percent(row["share_of_limit"]) if row else "-")
        sweep = m.at("deferred-start", "plain", mapped)
        cells.append(percent(sweep["share_of_limit"]) if sweep else "-")
        base = _must(m.at("adopt", "iokeep", mapped))["split"]["blackout_ms"]
        for job, method in (("rebuild", "warm"), ("rebuild", "fresh"), ("sealed-start", "plain"),
                            ("deferred-start", "plain"), ("trust", "plain")):  # fmt: skip
            other = _blackout(m.at(job, method, mapped))
            cells.append("-" if other is None else f"{other / base:.2g}")
        rows.append(cells)
    return table(
        ("guest in 4K pages", "tables", "adopt, of the limit", "the same, arm_lpae_s2",
         "sweep of deferred, of the limit", "rebuild warm / adopt", "rebuild fresh / adopt",
         "sealed / adopt", "deferred / adopt", "trust / adopt"),
        rows,
    )  # fmt: skip


def _times(m: Measured, fmt: str) -> str:
    rows = []
    for mapped in m.sizes(format=fmt):
        cells = [size(mapped)]
        cells.append(duration(_must(m.at("adopt", "limit", mapped, format=fmt))["ms"]))
        for job, method in POLICIES:
            cells.append(duration(_blackout(m.at(job, method, mapped, format=fmt))))
        later = m.at("deferred-start", "plain", mapped, format=fmt)
        split = {} if later is None else later["split"]
        cells += [duration(split.get(f"{name}_ms")) for name in ("first_use", "background", "longest_tick")]
        rows.append(cells)
    return table(
        (
            "guest in 4K pages",
            "limit: reading the tables",
            *POLICIES.values(),
            "first use of 2 MiB",
            "sweep in the background",
            "its longest tick",
        ),
        rows,
    )


def _leaves(m: Measured) -> str:
    rows = []
    for leaf in ("4K", "mixed", "2M", "1G"):
        for fmt in ("vtdss", "arm_lpae_s2"):
            adopt = m.at("adopt", "iokeep", TIB, leaf=leaf, format=fmt)
            if adopt is None:
                continue
            cells = [f"{leaf}, {fmt}", size(adopt["table_bytes"])]
            for job, method in POLICIES:
                cells.append(duration(_blackout(m.at(job, method, TIB, leaf=leaf, format=fmt))))
            later = _must(m.at("deferred-start", "plain", TIB, leaf=leaf, format=fmt))["split"]
            cells += [duration(later[f"{name}_ms"]) for name in ("first_use", "background", "longest_tick")]
            rows.append(cells)
    return table(
        (
            "1 TiB in leaves of",
            "tables",
            *POLICIES.values(),
            "first use of 2 MiB",
            "sweep in the background",
            "its longest tick",
        ),
        rows,
    )


def _layouts(m: Measured) -> str:
    rows = []
    for layout in ("contiguous", "scattered-2m", "random-4k"):
        for order in ("sequential", "shuffled"):
            what = {"layout": layout, "tables": order}
            adopt = m.at("adopt", "iokeep", 16 * GIB, **what)
            if adopt is None:
                continue
            plain = m.at("adopt", "numpy", 16 * GIB, **what)
            by_diff = m.at("rebuild", "diff", 16 * GIB, **what)
            warm = _must(m.at("rebuild", "warm", 16 * GIB, **what))["split"]["steps_ms"]
            sealed = _must(m.at("sealed-start", "plain", 16 * GIB, **what))["split"]
            rows.append([
                f"{layout}, tables {order}", count(adopt["areas"]),
                percent(adopt["share_of_limit"]), duration(_blackout(adopt)), duration(_blackout(plain)),
                duration(warm["build"]), duration(warm["compare"]),
                duration(by_diff["split"]["steps_ms"]["compare"] if by_diff else None),
                duration(sealed["steps_ms"]["digest"]), duration(sealed["background_ms"]),
            ])  # fmt: skip
    return table(
        ("16 GiB in 4K pages", "areas", "adopt, of the limit", "adopt", "adopt by NumPy",
         "rebuild: build", "rebuild: compare both with the areas", "rebuild: compare by `diff`",
         "sealed: digest", "sweep"), rows
    )  # fmt: skip


def _areas(m: Measured) -> str:
    rows = []
    for row in m.find("sealed-start", "plain", layout="scattered-2m", leaf="2M"):
        split = row["split"]
        other = _must(m.at("deferred-start", "plain", row["mapped_bytes"], layout="scattered-2m", leaf="2M"))
        digest = split["steps_ms"]["digest"]
        rows.append((count(row["areas"]), size(row["mapped_bytes"]), duration(digest),
                     duration(digest / row["areas"]), duration(_blackout(other))))  # fmt: skip
    one = m.find("sealed-start", "plain")[-1]
    rows.append(("1", size(one["mapped_bytes"]), duration(one["split"]["steps_ms"]["digest"]), "-",
                 duration(_blackout(m.find("deferred-start", "plain")[-1]))))  # fmt: skip
    return table(("areas", "guest", "sealed: digest of the areas", "per area", "deferred"), rows)


#: job, layout, method, what it is measured by -> what the row is called
_JOBS = {
    ("verify", "contiguous", "sweep", "limit"): "the sweep of verify alone, one area",
    ("verify", "contiguous", "iokeep", "limit"): "verify, one area",
    ("verify", "random-4k", "iokeep", "inputs"): "verify, each page anywhere, of reading tables and areas",
    ("digest", "contiguous", "iokeep", "limit"): "digest, one area",
    ("digest", "random-4k", "iokeep", "limit"): "digest, each page anywhere",
    ("diff", "contiguous", "iokeep", "limit"): "diff, one area, of reading both",
    ("diff", "random-4k", "iokeep", "limit"): "diff, each page anywhere, of reading both",
    ("extents", "contiguous", "iokeep", "limit"): "extents, one area",
    ("extents", "random-4k", "iokeep", "limit"): "extents, each page anywhere",
    ("build", "contiguous", "iokeep", "limit"): "build, one area, of memset",
    ("build", "random-4k", "frames", "limit"): "build, each page anywhere, from a list of pages, of memset",
    ("build", "random-4k", "iokeep", "inputs"): "build, each page anywhere, of reading areas and memset",
}


def _jobs(m: Measured) -> str:
    kinds = [(fmt, order) for fmt in ("vtdss", "arm_lpae_s2") for order in ("sequential", "shuffled")]
    lines = []
    for (job, layout, method, measure_by), name in _JOBS.items():
        cells = [name]
        for fmt, order in kinds:
            what = {"layout": layout, "format": fmt, "tables": order}
            row = _must(m.at(job, method, 64 * GIB, **what))
            base = _must(m.at(job, measure_by, 64 * GIB, **what))
            cells.append(
                f"{duration(row['ms'] / (row['mapped_bytes'] >> 12))}, {percent(base['ms'] / row['ms'])}"
            )
        lines.append(cells)
    return table(("64 GiB in 4K pages", *(f"{fmt}, {order}" for fmt, order in kinds)), lines)


def _walks(m: Measured, mapped: int) -> Iterator[tuple[Row, Row, dict[str, Row]]]:
    """Of each case of a size: the row of ``iova_to_phys``, that of the engine, and all of them by method."""
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in m.walk["results"]:
        if row["mapped_bytes"] == mapped:
            case = (row["format"], row["layout"], row["tables"])
            cases.setdefault(case, {})[row["method"]] = row
    for rows in cases.values():
        yield rows["iova_to_phys"], rows["iokeep"], rows


def _walk(m: Measured) -> str:
    source, machine = m.walk["kernel_source"], m.walk["machine"]
    lines = []
    for mapped in sorted({row["mapped_bytes"] for row in m.walk["results"]}):
        for walk, own, rows in _walks(m, mapped):
            per_page = (
                duration(rows[method]["ms"] / (mapped >> 12)) if method in rows else "-"
                for method in ("iova_to_phys", "c_walk", "numpy", "iokeep", "c_table")
            )
            lines.append([
                f"{walk['format']}, {size(mapped)}, {walk['layout']}, tables {walk['tables']}", *per_page,
                times(walk["ms"] / own["ms"]), times(rows["c_walk"]["ms"] / own["ms"]),
            ])  # fmt: skip
    head = (
        "in 4K pages; time per page", "`iova_to_phys`", "C walk", "NumPy", "iokeep", "C by tables",
        "iokeep faster than `iova_to_phys`", "than the C walk",
    )  # fmt: skip
    load = f"{machine['load_before']:.1f} to {machine['load_after']:.1f}"
    note = (
        f"Linux {source['version']}; `{source['flags']}`; medians of {m.walk['repeat']} rounds, load {load}."
    )
    return f"{table(head, lines)}\n{note}\n"


def _start_up(m: Measured) -> str:
    names = {
        "python": "the interpreter, until its first line",
        "numpy": "import of NumPy",
        "engine": "import of the engine",
        "compiled": "Numba, its compiled code from the cache (`adopt`, `rebuild` from a certain size on)",
        "compile": "the same with an empty cache, once per machine",
    }
    ups = [run["start_up_ms"] for run in m.runs if run["start_up_ms"]]
    return table(
        ("start-up of a process", "time"),
        [(text, duration(median(u[k] for u in ups))) for k, text in names.items()],
    )


def _kernel(m: Measured) -> str:
    names = ("preserve_ms", "freeze_ms", "deferred_ms")
    rows = [[size(row["mapped_bytes"]), *(duration(row[name]) for name in names)] for row in m.kernel]
    return table(("guest in 4K pages", "preserve", "freeze", "ADOPT deferred, and attach"), rows)


def _again(m: Measured) -> str:
    tool = ".venv/bin/python tools/validation_cost.py"
    commands = "\n".join(run["command"] for run in m.runs)
    walk = f'{tool} measure iova_to_phys "$(.venv/bin/python -m vmtest source)"'
    commands += f"\n{m.walk['command']}"
    return f"```\n{tool} measure && \\\n{walk} && \\\n{tool}\n```\n\nIt runs\n\n```\n{commands}\n```\n"


MADE: dict[str, Callable[[Measured], str]] = {
    "answer": _answer,
    "machine": _machine,
    "ratios": _ratios,
    "times-vtdss": lambda m: _times(m, "vtdss"),
    "times-arm": lambda m: _times(m, "arm_lpae_s2"),
    "leaves": _leaves,
    "layouts": _layouts,
    "areas": _areas,
    "start-up": _start_up,
    "jobs": _jobs,
    "iova_to_phys": _walk,
    "kernel": _kernel,
    "again": _again,
}


def filled(text: str, m: Measured) -> str:
    """The page with its blocks made anew."""
    return BLOCK.sub(lambda f: f[1] + MADE[f[2]](m) + f[4], text)


# ---- the figures


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = [figure.add_subplot(1, columns, n + 1) for n in range(columns)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(True, which="major", color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, axes


def _log(ax: Axes, way: str) -> None:
    scale, axis = (ax.set_xscale, ax.xaxis) if way == "x" else (ax.set_yscale, ax.yaxis)
    scale("log")
    axis.set_major_formatter(FuncFormatter(lambda ms, _: duration(float(ms))))
    axis.set_minor_formatter(FuncFormatter(lambda ms, _: ""))


def _draw_sizes(m: Measured) -> Figure:
    figure, (left, right) = _figure(10.5, 4.6, 2)
    for ax in (left, right):
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: size(int(n))))
        ax.set_xlabel("guest memory, in pages of 4 KiB (VT-d second stage)")
        ax.set_xticks([GIB << n for n in range(0, 13, 2)])
        read = m.find("adopt", "limit")
        ax.plot([r["mapped_bytes"] for r in read], [r["ms"] for r in read], color="black", linestyle="--",
                linewidth=1, label="limit: reading the tables once")  # fmt: skip
    for (job, method), name in POLICIES.items():
        rows = m.find(job, method)
        at, (colour, marker) = [r["mapped_bytes"] for r in rows], LOOK[name]
        left.plot(
            at,
            [r["split"]["blackout_ms"] for r in rows],
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=1.4,
            label=name,
        )
        if name in ("deferred", "sealed"):
            swept = [r["split"]["background_ms"] for r in rows]
            right.plot(
                at, swept, color=colour, marker=marker, markersize=5, linewidth=1.4, label=f"{name}: sweep"
            )
    first = m.find("deferred-start", "plain")
    at, use = [r["mapped_bytes"] for r in first], [r["split"]["first_use_ms"] for r in first]
    label = "deferred: first use of 2 MiB"
    right.plot(at, use, color="#CC79A7", marker="P", markersize=5, linewidth=1.4, label=label)
    for ax, title in ((left, "blackout: before the guest may run"), (right, "afterwards, beside the guest")):
        _log(ax, "y")
        ax.set_title(title, fontsize=11, loc="left")
        ax.legend(fontsize=8, frameon=False)
    low = min(left.get_ylim()[0], right.get_ylim()[0])
    high = max(left.get_ylim()[1], right.get_ylim()[1])
    for ax in (left, right):
        ax.set_ylim(low, high)
    return figure


def _draw_split(m: Measured) -> Figure:
    figure, (ax,) = _figure(9, 3.6)
    kinds = {
        "start_up_ms": ("start-up of the process (no kernel has it)", "#999999", "|"),
        "blackout_ms": ("blackout", "#D55E00", "o"),
        "first_use_ms": ("first use of 2 MiB", "#CC79A7", "P"),
        "background_ms": ("background", "#0072B2", "s"),
    }
    names = list(POLICIES.items())
    for n, ((job, method), _) in enumerate(names):
        split = _must(m.at(job, method, TIB))["split"]
        here = [(key, split[key]) for key in kinds if split[key]]
        ax.plot([ms for _, ms in here], [n] * len(here), color="#cccccc", linewidth=1, zorder=1)
        for key, ms in here:
            _, colour, marker = kinds[key]
            ax.plot(
                [ms],
                [n],
                color=colour,
                marker=marker,
                markersize=13 if marker == "|" else 8,
                markeredgewidth=2.5 if marker == "|" else 1,
                linestyle="none",
                zorder=2,
            )
    _log(ax, "x")
    ax.set_yticks(range(len(names)), [name for _, name in names])
    ax.invert_yaxis()
    ax.set_xlabel("1 TiB in pages of 4 KiB (VT-d second stage)")
    for label, colour, marker in kinds.values():
        ax.plot([], [], color=colour, marker=marker, linestyle="none", label=label)
    figure.legend(
        *ax.get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8, frameon=False
    )
    return figure


def _draw_leaves(m: Measured) -> Figure:
    figure, (ax,) = _figure(9, 4.2)
    leaves, names = ("4K", "mixed", "2M", "1G"), list(POLICIES.items())
    width = 0.8 / len(names)
    for n, ((job, method), name) in enumerate(names):
        rows = [m.at(job, method, TIB, leaf=leaf) for leaf in leaves]
        at = [i + (n - len(names) / 2 + 0.5) * width for i, row in enumerate(rows) if row]
        ax.bar(
            at, [_blackout(row) or 0 for row in rows if row], width * 0.92, color=LOOK[name][0], label=name
        )
    _log(ax, "y")
    counts = [size(_must(m.at("adopt", "iokeep", TIB, leaf=leaf))["table_bytes"]) for leaf in leaves]
    ax.set_xticks(
        range(len(leaves)), [f"{leaf}\n{n} of tables" for leaf, n in zip(leaves, counts, strict=True)]
    )
    ax.set_xlabel("leaves of a guest of 1 TiB (VT-d second stage)")
    ax.set_ylabel("blackout")
    ax.grid(False, axis="x")
    ax.legend(fontsize=8, frameon=False, ncols=2)
    return figure


def _draw_areas(m: Measured) -> Figure:
    figure, (ax,) = _figure(7, 3.8)
    for job, name, step in (("sealed-start", "sealed", "digest"), ("deferred-start", "deferred", None)):
        rows = m.find(job, "plain", layout="scattered-2m", leaf="2M")
        values = [r["split"]["steps_ms"][step] if step else r["split"]["blackout_ms"] for r in rows]
        colour, marker = LOOK[name]
        label = f"{name}: {'digest of the areas' if step else 'start'}"
        ax.plot([r["areas"] for r in rows], values, color=colour, marker=marker, label=label)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}".replace(",", " ")))
    _log(ax, "y")
    ax.set_xlabel("areas, each of 2 MiB")
    ax.legend(fontsize=8, frameon=False)
    return figure


FIGURES = {"sizes": _draw_sizes, "split": _draw_split, "leaves": _draw_leaves, "areas": _draw_areas}


def drawn(name: str, m: Measured) -> str:
    """The text of an SVG, the same each time."""
    with mpl.rc_context(
        {
            "svg.hashsalt": name,
            "svg.fonttype": "none",
            "font.family": ["sans-serif"],
            "font.sans-serif": ["DejaVu Sans"],
            "font.size": 9,
        }
    ):
        out = io.StringIO()
        FIGURES[name](m).savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def figure_path(name: str) -> Path:
    """Where it is kept."""
    return ROOT / "docs" / f"validation-cost-{name}.svg"


def main(words: list[str]) -> int:
    """See the module."""
    if words[:2] == ["measure", "iova_to_phys"]:
        measure_walk(words[2])
        return 0
    if words[:1] == ["measure"]:
        if words[1:] != ["kernel"]:
            measure([int(word) for word in words[1:]] or range(len(COMMANDS)))
        if words[1:] in ([], ["kernel"]):
            measure_kernel()
        return 0
    m = Measured.load()
    files = {PAGE: filled(PAGE.read_text(encoding="utf-8"), m)}
    files |= {figure_path(name): drawn(name, m) for name in FIGURES}
    for path, text in files.items():
        if words == ["--check"]:
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                print(f"{path} is not what {DATA.name} says: run {sys.argv[0]}", file=sys.stderr)
                return 1
        else:
            path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
