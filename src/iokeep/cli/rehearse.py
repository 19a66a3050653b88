# SPDX-License-Identifier: Apache-2.0
"""``iokeep rehearse``: a whole live update on the software host, measured, and broken on request."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iokeep.errors import InputError, UsageError

if TYPE_CHECKING:
    from iokeep.rehearse.run import Options

#: option -> its default, and the type that TOML must give
_DEFAULTS: dict[str, Any] = {
    "like": "",
    "policy": "adopt",
    "format": "",
    "memory": "",
    "page-size": "",
    "devices": 2,
    "from": "soft-7.3",
    "to": "soft-7.4",
    "seed": 1,
    "inject": [],
    "unsafe": False,
    "capture": "",
}
#: bytes of a SPEC.toml
_SPEC_LIMIT = 1 << 20

_EPILOG = """\
faults (--inject, may be repeated):
  pte-bit, pte-swap, leaf-size, unknown-bit   in the prior tables, between the kernels
  drop-area, extra-area, wrong-prot, wrong-file, wrong-offset   in what the VMM replays
  stale-root, truncate-records, version-skew  in the records that cross the kexec
  kill-at=STEP                                the VMM is killed in that step, and carries on

exit codes: 0 restored, no damage; 1 refused, contained or corrupted; 2 usage; 3 bad --like or SPEC.toml;
4 a missing capability; 130 interrupted
"""


def add_parser(subparsers: Any) -> None:
    """Add ``rehearse`` to the command line."""
    p: argparse.ArgumentParser = subparsers.add_parser(
        "rehearse",
        help="a whole live update on the software host, measured and broken on request",
        description="Rehearse a live update: set a guest up, let its devices do DMA, replace the kernel "
        "under them, restore by a policy, and count what happened to every DMA and every frame.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("spec", nargs="?", metavar="SPEC.toml", help="options from a file; the command line wins")
    p.add_argument("--like", metavar="SOURCE", help="take the guest from a capture of a real table")
    p.add_argument("--policy", metavar="P", help="rebuild, adopt (default), deferred, sealed or trust")
    p.add_argument(
        "--format",
        metavar="F",
        help="of the IO page tables, and with it the host's IOMMU: vtdss (default) or x86_64 (VT-d), amdv1 "
        "(AMD-Vi), arm_lpae_s1 or arm_lpae_s2 (SMMUv3), riscv64 (RISC-V IOMMU)",
    )
    p.add_argument("--memory", metavar="SIZE", help="guest RAM, e.g. 64M (default 1G)")
    p.add_argument("--page-size", metavar="S", help="4K, 2M, 1G or mixed (default)")
    p.add_argument("--devices", metavar="N", type=int, help="devices that do DMA (default 2)")
    p.add_argument("--seed", metavar="N", type=int, help="of all placements and page orders (default 1)")
    p.add_argument("--from", dest="kernel_from", metavar="PROFILE", help="first kernel (default soft-7.3)")
    p.add_argument("--to", dest="kernel_to", metavar="PROFILE", help="second kernel (default soft-7.4)")
    p.add_argument("--inject", action="append", metavar="FAULT", help="a fault; see below")
    p.add_argument("--unsafe", action="store_true", default=None, help="allow policy trust")
    p.add_argument("--capture", metavar="DIR", help="save what lies between the kernels as captures in DIR")
    p.add_argument("-j", "--json", action="store_true", help="print one JSON document")
    p.add_argument("-q", "--quiet", action="store_true", help="no progress on stderr")
    p.set_defaults(run=run, schema="iokeep.rehearse-v1")


def _spec(path: str) -> dict[str, Any]:
    """The options of a SPEC.toml. :raises InputError: unreadable, no TOML, unknown keys or types."""
    import tomllib

    try:
        raw = Path(path).read_bytes()[: _SPEC_LIMIT + 1]
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}") from e
    if len(raw) > _SPEC_LIMIT:
        raise InputError(f"{path}: more than {_SPEC_LIMIT} bytes is no SPEC.toml")
    try:
        found = tomllib.loads(raw.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise InputError(f"{path}: no TOML: {e}") from e
    for key, value in found.items():
        if key not in _DEFAULTS:
            raise InputError(f"{path}: unknown key {key!r}", f"keys: {', '.join(_DEFAULTS)}")
        want = _DEFAULTS[key]
        good = (
            isinstance(value, bool)
            if isinstance(want, bool)
            else isinstance(value, int) and not isinstance(value, bool)
            if isinstance(want, int)
            else isinstance(value, list) and all(isinstance(v, str) for v in value)
            if isinstance(want, list)
            else isinstance(value, str)
        )
        if not good:
            raise InputError(f"{path}: {key} = {value!r} has the wrong type; e.g. {want!r}")
    return found


def options_of(args: argparse.Namespace) -> Options:
    """What to rehearse, from the command line over SPEC.toml over the defaults.

    :raises UsageError, InputError: see there.
    """
    from iokeep.rehearse.inject import parse_fault
    from iokeep.rehearse.run import Options
    from iokeep.rehearse.scenario import parse_size

    spec = _spec(args.spec) if args.spec else {}
    given = {
        "like": args.like,
        "policy": args.policy,
        "format": args.format,
        "memory": args.memory,
        "page-size": args.page_size,
        "devices": args.devices,
        "from": args.kernel_from,
        "to": args.kernel_to,
        "seed": args.seed,
        "inject": args.inject,
        "unsafe": args.unsafe,
        "capture": args.capture,
    }
    value = {k: spec.get(k, d) if given[k] is None else given[k] for k, d in _DEFAULTS.items()}
    if value["like"]:
        for key in ("format", "memory", "page-size"):
            if value[key]:
                raise UsageError(
                    f"--{key} comes from the capture where --like is given", f"leave --{key} out"
                )
    if not 0 <= value["seed"] < 1 << 32:
        raise UsageError(f"--seed {value['seed']}: 0 ... {2**32 - 1} are possible")
    return Options(
        policy=value["policy"],
        format=value["format"] or "vtdss",
        memory=parse_size(value["memory"] or "1G", "--memory"),
        page_size=value["page-size"] or "mixed",
        devices=value["devices"],
        seed=value["seed"],
        kernel_from=value["from"],
        kernel_to=value["to"],
        like=value["like"],
        inject=tuple(parse_fault(f) for f in value["inject"]),
        unsafe=value["unsafe"],
        capture=value["capture"],
    )


def run(args: argparse.Namespace) -> int:
    """Rehearse; 0 = restored without damage, 1 = refused, contained or corrupted."""
    from iokeep.rehearse.run import SCHEMA, rehearse
    from iokeep.report import json as report_json
    from iokeep.report import text

    progress = text.Progress(quiet=args.quiet or args.json)
    options = options_of(args)

    def stop(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    # kill(1) must leave as little behind as Ctrl-C does.
    before = signal.signal(signal.SIGTERM, stop)
    try:
        body = rehearse(options, progress.say)
    finally:
        signal.signal(signal.SIGTERM, before)
        progress.done()
    sys.stdout.write(report_json.document(SCHEMA, body) if args.json else text.rehearsal(body))
    return 0 if body["outcome"] == "restored" else 1
