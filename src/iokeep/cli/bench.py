# SPDX-License-Identifier: Apache-2.0
"""``iokeep bench``: the engine against memory's speed and its peers, side by side in one run."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from iokeep.errors import UsageError

_SUFFIX = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_MOST = 16 << 40
_LEAST = 8 << 20


def add_parser(subparsers: Any) -> None:
    """Add ``bench`` to the command line."""
    p: argparse.ArgumentParser = subparsers.add_parser(
        "bench", help="how fast the engine is here, next to memory's own speed, C and NumPy"
    )
    verbs = p.add_subparsers(dest="verb", metavar="VERB", required=True)
    about = "what can be measured"
    listing = verbs.add_parser("list", help=about, description=about)
    listing.add_argument("-j", "--json", action="store_true", help="print one JSON document")
    listing.set_defaults(run=_list, schema="iokeep.bench-list-v1")
    about = "measure: every method in turn, round by round; the median counts"
    r = verbs.add_parser("run", help=about, description=about)
    for name, text in (
        ("job", "a job (default: verify, digest, expect)"),
        ("format", "a format (default: vtdss, arm_lpae_s2)"),
        ("layout", "contiguous, scattered-2m or random-4k (default: all)"),
        ("tables", "sequential or shuffled (default: both)"),
        ("leaf", "4K (default), 2M, 1G or mixed"),
    ):
        r.add_argument(f"--{name}", action="append", default=[], metavar=name[0].upper(), help=text)
    r.add_argument("--size", action="append", metavar="SIZE", help="mapped bytes, 8M ... 16T (default 64G)")
    r.add_argument("--repeat", type=int, default=7, metavar="N", help="rounds (default 7)")
    r.add_argument("--threads", type=int, default=1, metavar="N", help="of the engine (default 1)")
    r.add_argument("--no-peers", action="store_true", help="without the peers in C")
    r.add_argument(
        "--kernel-source",
        metavar="DIR",
        help="a Linux source tree: job verify beside that kernel's own iova_to_phys, compiled for this run",
    )
    r.add_argument("-j", "--json", action="store_true", help="print one JSON document")
    r.add_argument("-q", "--quiet", action="store_true", help="no progress on stderr")
    r.set_defaults(run=_run, schema="iokeep.bench-v1")


def _size(text: str) -> int:
    match = re.fullmatch(r"([1-9][0-9]{0,12})([KMGT]?)", text)
    value = int(match[1]) * _SUFFIX[match[2]] if match else 0
    if not _LEAST <= value <= _MOST or value % (2 << 20):
        raise UsageError(f"--size {text!r}: a multiple of 2M from 8M to 16T", "write for example 64G")
    return value


def _list(args: argparse.Namespace) -> int:
    from iokeep.bench.cases import FORMATS, JOBS, LAYOUTS, LEAVES, METHODS, TABLES

    body = {
        "jobs": [{"name": name, "what": text} for name, text in JOBS.items()],
        "methods": [{"name": name, "what": text} for name, text in METHODS.items()],
        "formats": list(FORMATS),
        "layouts": [{"name": name, "what": text} for name, text in LAYOUTS.items()],
        "tables": list(TABLES),
        "leaves": list(LEAVES),
    }
    if args.json:
        from iokeep.report import json as report_json

        sys.stdout.write(report_json.document(args.schema, body))
        return 0
    for name, text in JOBS.items():
        print(f"{name:14} {text}")
    print()
    for number, (name, text) in enumerate(METHODS.items()):
        print(f"{'' if number else 'methods':9} {name}: {text}")
    print(f"\nformats   {', '.join(FORMATS)}")
    for number, (name, text) in enumerate(LAYOUTS.items()):
        print(f"{'' if number else 'layouts':9} {name}: {text}")
    print(f"tables    {', '.join(TABLES)} in memory\nleaf      {', '.join(LEAVES)}")
    return 0


def _run(args: argparse.Namespace) -> int:
    from iokeep.bench.cases import FORMATS, JOBS, LAYOUTS, LEAVES, TABLES, cases
    from iokeep.bench.kernel_walk import KernelSource
    from iokeep.bench.run import Options, run
    from iokeep.report import json as report_json
    from iokeep.report import text

    known = {"job": JOBS, "format": FORMATS, "layout": LAYOUTS, "tables": TABLES, "leaf": LEAVES}
    for name, values in known.items():
        for value in getattr(args, name):
            if value not in values:
                raise UsageError(f"--{name} {value!r} is not known", f"one of: {', '.join(values)}")
    if not 1 <= args.repeat <= 1000 or not 1 <= args.threads <= 64:
        raise UsageError("--repeat is 1 ... 1000, --threads 1 ... 64")
    which = (args.job, args.format, args.layout, args.tables, args.leaf)
    chosen = [case for size in args.size or ["64G"] for case in cases(*which, _size(size))]
    if not chosen:
        raise UsageError("no such case: a scattered layout has no leaves larger than its pieces")
    if args.kernel_source is not None and args.no_peers:
        raise UsageError(
            "--kernel-source adds a peer in C, and --no-peers leaves them out", "give one of them"
        )
    if args.kernel_source is not None and all(case.job != "verify" for case in chosen):
        raise UsageError("--kernel-source adds a peer of job verify", "add --job verify")
    kernel = None if args.kernel_source is None else KernelSource.at(Path(args.kernel_source))
    progress = text.Progress(quiet=args.quiet or args.json)
    body = run(chosen, Options(args.repeat, args.threads, not args.no_peers, kernel), progress.say)
    progress.done()
    if args.json:
        sys.stdout.write(report_json.document(args.schema, body))
    else:
        _print(body)
    return 0


_HEAD = "  method              ms    ns/page   GiB/s  of limit    16 TiB  times faster than "
_PEERS = ("c_walk", "c_table", "numpy")


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _print(body: dict[str, Any]) -> None:
    before = None
    measured = any(row["speedup"]["iova_to_phys"] is not None for row in body["results"])
    peers = (*_PEERS, "iova_to_phys") if measured else _PEERS
    if body["start_up_ms"]:
        parts = ", ".join(f"{name} {ms:.0f} ms" for name, ms in body["start_up_ms"].items())
        print(f"start-up of a process: {parts} (once per machine)")
    for row in body["results"]:
        case = tuple(row[k] for k in ("job", "format", "layout", "tables", "leaf", "mapped_bytes"))
        if case != before:
            before = case
            job, fmt, layout, tables, leaf, _ = case
            size = f"{row['mapped_bytes'] / (1 << 30):.4g} GiB in {leaf} leaves"
            of = f"tables {tables}, {row['table_bytes'] / (1 << 20):.4g} MiB"
            print(f"\n{job}: {fmt}, {size}, {layout}; {of}\n{_HEAD}{', '.join(peers)}")
        print(
            f"  {row['method']:12}{row['ms']:10.2f} {row['ns_per_page']:10.3f}"
            f" {_cell(row['gib_per_s'], '7.1f'):>7} {_cell(row['share_of_limit'], '9.0%'):>9}"
            f" {row['s_per_16_tib']:7.2f} s"
            + "".join(f" {_cell(row['speedup'][peer], '.1f'):>8}" for peer in peers)
        )
        if split := row["split"]:
            steps = ", ".join(f"{name} {ms:.3f}" for name, ms in split["steps_ms"].items())
            longest = split["longest_tick_ms"]
            tick = "" if longest is None else f" in ticks of {longest:.3f} ms at most"
            use = "" if split["first_use_ms"] is None else f"; first use {split['first_use_ms']:.3f} ms"
            print(
                f"{'':14}blackout {split['blackout_ms']:.3f} ms ({steps}){use};"
                f" background {split['background_ms']:.3f} ms{tick}"
            )
    if body["peers_missing"]:
        print(f"\nwithout the peers in C: {body['peers_missing']}")
    if source := body["kernel_source"]:
        if measured:
            print(f"\niova_to_phys: Linux {source['version']}, compiled with {source['flags']}")
        for name, why in source["missing"].items():
            print(f"without iova_to_phys of {name}: {why}")
