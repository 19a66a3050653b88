# SPDX-License-Identifier: Apache-2.0
"""``iokeep table ... --nested``: a stage 1 in guest physical memory under the table of a capture."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from iokeep.errors import InputError, UsageError

if TYPE_CHECKING:
    from iokeep.mem.capture import Capture
    from iokeep.pt.formats.base import Format
    from iokeep.pt.nested import Nested, NestedProblems, NestedWalk
    from iokeep.pt.walk import Walk


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that name a stage 1."""
    group = parser.add_argument_group("two stages")
    group.add_argument(
        "--nested",
        action="store_true",
        help="translate through both stages; stage 1 as meta.json says it (stage1, or hw)",
    )
    group.add_argument("--stage1", metavar="FORMAT", help="format of stage 1; SOURCE holds stage 2")
    group.add_argument("--stage1-config", metavar="K=V,...", help="its configuration, as in meta.json")
    group.add_argument("--stage1-root", metavar="GPA", help="gpa of its root table")
    group.add_argument(
        "--device", metavar="ID", help="with --nested: BB:DD.F or number (default: that of hw)"
    )
    group.add_argument("--pasid", metavar="N", help="with --nested: PASID, substream or process id")
    group.add_argument(
        "--ttbr",
        type=int,
        choices=(0, 1),
        default=0,
        help="with --nested: an SMMU's TTB0 or TTB1 (default 0)",
    )


def number(text: str, what: str, limit: int = 1 << 64) -> int:
    """A number of the command line. :raises UsageError: it is none, or not below ``limit``."""
    try:
        value = int(text, 16) if text.lower().startswith("0x") else int(text)
    except ValueError:
        value = -1
    if not 0 <= value < limit:
        raise UsageError(f"{text[:40]!r} is no {what}", f"write 0x... or a decimal number below {limit:#x}")
    return value


def _config(text: str | None) -> dict[str, object]:
    """``--stage1-config``: integers, decimal or 0x..."""
    out: dict[str, object] = {}
    for part in (text or "").split(",") if text else ():
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals or not key or key in out:
            why = "twice" if key in out else "not KEY=VALUE"
            raise UsageError(
                f"--stage1-config: {part[:60]!r} is {why}", "for example levels=4,output_bits=48"
            )
        out[key] = number(value.strip(), f"value of {key[:40]}")
    return out


def stages_of(args: argparse.Namespace, capture: Capture) -> tuple[Nested, str] | None:
    """Both stages where the command line asks for two, and where stage 1 comes from; else None.

    :raises UsageError, InputError: options that contradict each other; no stage 1; tables that are none.
    """
    from iokeep.pt.nested import Nested
    from iokeep.pt.registry import open_format

    named = args.stage1 is not None or args.stage1_root is not None or args.stage1_config is not None
    if not named and not args.nested:
        for option in ("device", "pasid"):
            if getattr(args, option) is not None:
                raise UsageError(f"--{option} has no meaning without --nested")
        return None
    if named:
        if args.stage1 is None or args.stage1_root is None:
            raise UsageError(
                "a stage 1 needs --stage1 FORMAT and --stage1-root GPA",
                "or --nested, where meta.json of SOURCE says it",
            )
        one = open_format(args.stage1, _config(args.stage1_config))
        two = open_format(capture.format, capture.config)
        root = number(args.stage1_root, "gpa")
        return Nested(one, root, two, capture.root_pa, capture.memory), "command line"
    if "stage1" in capture.meta:
        one, root = _stated(capture)
        two = open_format(capture.format, capture.config)
        return Nested(one, root, two, capture.root_pa, capture.memory), "meta.json, stage1"
    return _found(args, capture), "meta.json, hw"


def _stated(capture: Capture) -> tuple[Format, int]:
    """``stage1`` of meta.json: format, config and root_gpa."""
    from iokeep.pt.registry import open_format

    said, where = capture.meta["stage1"], f"{capture.path}/meta.json: stage1"
    if not isinstance(said, dict) or not isinstance(said.get("format"), str):
        raise InputError(f'{where} is no object with "format", "config" and "root_gpa"')
    config, root = said.get("config", {}), said.get("root_gpa")
    if not isinstance(config, dict):
        raise InputError(f'{where}: "config" is not an object')
    if not isinstance(root, str) or not re.fullmatch(r"0x[0-9a-fA-F]{1,16}", root):
        raise InputError(f'{where}: "root_gpa" = {str(root)[:40]!r} is no "0x..." value of at most 64 bits')
    return open_format(said["format"], config), int(root, 16)


def _found(args: argparse.Namespace, capture: Capture) -> Nested:
    from iokeep.pt.nested import Nested
    from iokeep.pt.nested_roots import find_stages
    from iokeep.pt.registry import open_format

    hw = capture.meta.get("hw")
    if not isinstance(hw, dict) or not hw:
        raise InputError(
            f"{capture.path}/meta.json has no stage1 and no hw that lead to a stage 1",
            "name it with --stage1 FORMAT --stage1-root GPA",
        )
    pasid = None if args.pasid is None else number(args.pasid, "PASID", 1 << 20)
    device: int | str | None = args.device
    if args.device is not None and ":" not in args.device:
        device = number(args.device, "device id", 1 << 32)
    stages = find_stages(hw, capture.memory, device, pasid=pasid, upper=bool(args.ttbr))
    one, two = (
        open_format(table.format, _merged(capture, table.format, table.root_pa, table.config))
        for table in (stages.first, stages.second)
    )
    first, second = stages.first.root_pa, stages.second.root_pa
    return Nested(one, first, two, second, capture.memory, stages.found.prot)


def _merged(capture: Capture, name: str, root: int, config: Mapping[str, object]) -> dict[str, object]:
    """The configuration that the entries say, with what else meta.json says of the same table."""
    if capture.format != name or capture.root_pa != root:
        return dict(config)
    for key, value in config.items():
        if key in capture.config and capture.config[key] != value:
            raise InputError(
                f"{capture.path}/meta.json: config says {key} {str(capture.config[key])[:40]!r}, the entries "
                f"in hw say {str(value)[:40]!r} for the table at {root:#x}",
                "correct config, or leave the key out",
            )
    return {**config, **capture.config}


# -- for people and for machines -----------------------------------------------------------------------


def described(nested: Nested, source: str) -> dict[str, Any]:
    """Both stages, for JSON."""
    return {
        "stage1": {
            "format": nested.fmt.name,
            "config": dict(nested.fmt.config),
            "root_gpa": f"{nested.root_gpa:#x}",
            "from": source,
        },
        "format": nested.fmt_two.name,
        "config": dict(nested.fmt_two.config),
        "root_pa": f"{nested.root_pa:#x}",
    }


def _path(path: Walk) -> list[dict[str, Any]]:
    return [{"level": n, "item_pa": f"{at:#x}", "item": f"{item:#x}"} for n, at, item in path.steps]


def walk_json(w: NestedWalk) -> dict[str, Any]:
    """One walk through both stages."""
    from iokeep.pt.extents import PROT_TEXT

    return {
        "iova": f"{w.iova:#x}",
        "gpa": None if w.gpa is None else f"{w.gpa:#x}",
        "pa": None if w.pa is None else f"{w.pa:#x}",
        "prot": PROT_TEXT[w.prot] if w.pa is not None else None,
        "leaf_bytes": None if w.leaf_lg2 is None else 1 << w.leaf_lg2,
        "stage": w.stage or None,
        "why": w.why,
        "steps": [
            {
                "level": step.level,
                "item_gpa": f"{step.gpa:#x}",
                "item_pa": None if step.item is None or step.fetch.pa is None else f"{step.fetch.pa:#x}",
                "item": None if step.item is None else f"{step.item:#x}",
                "fetch": _path(step.fetch),
            }
            for step in w.steps
        ],
        "output": [] if w.output is None else _path(w.output),
    }


def walk_lines(w: NestedWalk) -> list[str]:
    """The two-dimensional path: below each item of stage 1 the walk of stage 2 that fetched it."""
    from iokeep.pt.extents import PROT_TEXT

    def below(path: Walk) -> list[str]:
        return [f"      stage 2 level {n}  pa {at:#018x}  item {item:#018x}" for n, at, item in path.steps]

    out = []
    for step in w.steps:
        out += below(step.fetch)
        item = "not fetched" if step.item is None else f"item {step.item:#018x}"
        out.append(f"  stage 1 level {step.level}  gpa {step.gpa:#018x}  {item}")
    if w.output is not None:
        out += below(w.output)
    if w.pa is None or w.leaf_lg2 is None:
        return [*out, f"{w.iova:#x}: no translation: {w.why}"]
    size = f"{1 << w.leaf_lg2:#x}"
    return [*out, f"{w.iova:#x}: gpa {w.gpa:#x}, pa {w.pa:#x} {PROT_TEXT[w.prot]}, {size} bytes in one piece"]


def problem_lines(problems: NestedProblems) -> list[str]:
    """The first bad items of both stages."""
    from iokeep.pt.tables import REASONS

    out = [
        f"warning: iova {int(problems.iova[i]):#x}-{int(problems.last[i]):#x}: "
        f"{REASONS[int(problems.reason[i])]}: an item of stage {int(problems.stage[i])}, level "
        f"{int(problems.level[i])}"
        for i in range(min(len(problems), 16))
    ]
    return out + ([f"warning: and {len(problems) - 16} more"] if len(problems) > 16 else [])
