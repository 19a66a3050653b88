# SPDX-License-Identifier: Apache-2.0
"""``iokeep host``: what this machine offers for a live update, and whether files would survive one."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iokeep.errors import UsageError

if TYPE_CHECKING:
    from iokeep.inspect.doctor import Report
    from iokeep.inspect.preflight import FileVerdict, Problem, Verdict, Wanted
    from iokeep.uapi.transport import Transport

DOCTOR_SCHEMA = "iokeep.host-doctor-v1"
PREFLIGHT_SCHEMA = "iokeep.host-preflight-v1"
#: what stands before a line, by the state of a check
_MARKS = {"ok": "ok", "missing": "MISSING", "warning": "warning", "unknown": "?", "absent": "nowhere"}
_ABILITIES = {
    "rehearse": "rehearse a live update on the software host",
    "map": "give a device an IO address space (iommufd, VFIO)",
    "carry_memory": "carry memfds over a kexec",
    "keep_translations": "keep devices translating over a kexec",
}
#: what `host doctor` says when what a live update needs is not there
EXIT_MISSING = 4


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``host`` with its verbs."""
    parser = subparsers.add_parser(
        "host",
        help="this machine: doctor, preflight",
        description="Look at this machine and its processes; nothing is changed.",
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    doctor = verbs.add_parser(
        "doctor",
        help="what kernel, IOMMU, configuration and command line offer, and what to set",
        description="Say what this machine offers for a live update, and for what is missing the option or "
        "parameter to set. Exit code 4 where anything that a released kernel can do is missing.",
    )
    _common(doctor)
    doctor.set_defaults(run=run_doctor, schema=DOCTOR_SCHEMA)
    preflight = verbs.add_parser(
        "preflight",
        help="would these files be preserved, in this order?",
        description="Say for each file whether a live-update session would take it, with the reason before "
        "the kernel's errno. Exit code 1 where anything would be refused, or nothing was found.",
    )
    _common(preflight)
    what = preflight.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--pid", type=int, metavar="PID", help="every memfd, iommufd and VFIO device of a process, in order"
    )
    what.add_argument(
        "--fd",
        nargs="+",
        metavar="PID:FD[=TOKEN]",
        help="these descriptors, in the order of preservation; 'self' is this process",
    )
    preflight.add_argument("--name", help="the name that the session is to have")
    preflight.set_defaults(run=run_preflight, schema=PREFLIGHT_SCHEMA)


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-j", "--json", action="store_true", help="one JSON document on stdout")
    # another tree instead of the machine, for tests and for what was copied from elsewhere
    parser.add_argument("--root", type=Path, default=Path("/"), help=argparse.SUPPRESS)


def _transport(root: Path) -> Transport | None:
    if root != Path("/"):
        return None
    from iokeep.uapi.kernel import KernelTransport

    return KernelTransport()


def doctor_document(report: Report) -> dict[str, Any]:
    """The body of ``host doctor --json``."""
    return {
        "release": report.release,
        "checks": [
            {"name": c.name, "state": c.state, "found": c.found, "hint": c.hint} for c in report.checks
        ],
        "abilities": report.abilities,
        "missing": len(report.missing),
    }


def doctor_text(report: Report) -> list[str]:
    """The lines that a person reads."""
    from iokeep.report.text import table

    lines = [f"Linux {report.release}"]
    rows = [[_MARKS[c.state], c.name, c.found] for c in report.checks]
    for check, line in zip(report.checks, table(rows), strict=True):
        lines.append(line)
        if check.hint and check.state != "ok":
            lines.append(f"{'':9}-> {check.hint}")
    lines.append("")
    for name, text in _ABILITIES.items():
        lines.append(f"{'can' if report.abilities[name] else 'cannot':8} {text}")
    return lines


def run_doctor(args: argparse.Namespace) -> int:
    """``iokeep host doctor``: 0, or 4 where something that a live update needs is missing."""
    from iokeep.inspect.doctor import examine
    from iokeep.report.json import document

    report = examine(args.root, _transport(args.root))
    if args.json:
        sys.stdout.write(document(DOCTOR_SCHEMA, doctor_document(report)))
    else:
        sys.stdout.write("\n".join(doctor_text(report)) + "\n")
    return EXIT_MISSING if report.missing else 0


def _wanted(text: str) -> Wanted:
    import os

    from iokeep.inspect.preflight import Wanted

    found = re.fullmatch(r"(self|\d{1,9}):(\d{1,9})(?:=(0x[0-9a-fA-F]{1,16}|\d{1,20}))?", text)
    token = int(found[3], 0) if found and found[3] else None
    if found is None or (token is not None and token >= 1 << 64):
        raise UsageError(f"{text!r} is not PID:FD or PID:FD=TOKEN", "for example --fd 4711:12=0x1 4711:13")
    pid = os.getpid() if found[1] == "self" else int(found[1])
    return Wanted(pid, int(found[2]), token)


def _problem(problem: Problem) -> dict[str, Any]:
    return {
        "severity": problem.severity,
        "errno": problem.errno or None,
        "why": problem.why,
        "hint": problem.hint,
    }


def _file(file: FileVerdict) -> dict[str, Any]:
    facts, wanted = file.facts, file.wanted
    return {
        "pid": wanted.pid,
        "fd": wanted.fd,
        "token": None if wanted.token is None else f"{wanted.token:#x}",
        "kind": facts.kind if facts else None,
        "link": facts.link if facts else None,
        "size": facts.size if facts else None,
        "seals": facts.seals if facts else None,
        "problems": [_problem(problem) for problem in file.problems],
    }


def preflight_document(verdict: Verdict, *, preserves_iommufd: bool) -> dict[str, Any]:
    """The body of ``host preflight --json``."""
    return {
        "preserves": verdict.preserves,
        "preserves_iommufd": preserves_iommufd,
        "name": verdict.name,
        "files": [_file(file) for file in verdict.files],
        "problems": [_problem(problem) for problem in verdict.problems],
    }


def _plain(text: str) -> str:
    """Text that another process chose, safe for a terminal."""
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def _problem_lines(problem: Problem, indent: str) -> list[str]:
    errno = f" ({problem.errno})" if problem.errno else ""
    lines = [f"{indent}{problem.severity}{errno}: {_plain(problem.why)}"]
    return [*lines, f"{indent}-> {problem.hint}"] if problem.hint else lines


def preflight_text(verdict: Verdict) -> list[str]:
    """The lines that a person reads."""
    from iokeep.inspect.preflight import seal_names
    from iokeep.report.text import size

    lines = []
    for file in verdict.files:
        wanted, facts = file.wanted, file.facts
        head = f"{wanted.pid}:{wanted.fd}"
        head += f" token {wanted.token:#x}" if wanted.token is not None else ""
        if facts is not None:
            head += f"  {facts.kind}  {_plain(facts.link)}"
            head += f"  {size(facts.size)}" if facts.size else ""
            head += f"  seals {seal_names(facts.seals)}" if facts.seals is not None else ""
        lines.append(head)
        for problem in file.problems:
            lines += _problem_lines(problem, "    ")
    for problem in verdict.problems:
        lines += _problem_lines(problem, "")
    refused = sum(problem.severity == "refused" for problem in verdict.all_problems())
    what = f"refused for {refused} reason{'' if refused == 1 else 's'}"
    if not refused:
        what = "the session would be preserved" if verdict.files else "an empty session would be preserved"
    return [*lines, what]


def run_preflight(args: argparse.Namespace) -> int:
    """``iokeep host preflight``: 0, or 1 where anything would be refused, or there is nothing to preserve."""
    from iokeep.inspect.preflight import ProcFs, candidates, preflight
    from iokeep.report.json import document
    from iokeep.uapi.probe import known_ioctls

    processes = ProcFs(args.root)
    wanted = [_wanted(text) for text in args.fd] if args.fd else candidates(processes, args.pid)
    transport = _transport(args.root)
    known = known_ioctls(transport) if transport is not None else None
    capable = known is not None and "IOMMU_HWPT_LIVEUPDATE_MARK_PRESERVE" in known
    verdict = preflight(processes, wanted, name=args.name, preserves_iommufd=capable)
    if args.json:
        sys.stdout.write(document(PREFLIGHT_SCHEMA, preflight_document(verdict, preserves_iommufd=capable)))
    else:
        sys.stdout.write("\n".join(preflight_text(verdict)) + "\n")
    return 0 if verdict.preserves else 1
