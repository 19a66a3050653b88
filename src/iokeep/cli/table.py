# SPDX-License-Identifier: Apache-2.0
"""``iokeep table``: look into the IO page tables of a capture, and compare them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iokeep import __version__
from iokeep.cli import table_nested
from iokeep.errors import InputError, UsageError

if TYPE_CHECKING:
    from iokeep.mem.capture import Capture
    from iokeep.mem.memory import U8
    from iokeep.pt.compare import Bbm, LayoutRange, Mismatch, Verdict
    from iokeep.pt.extents import Extents
    from iokeep.pt.formats.base import Format
    from iokeep.pt.gate import Descriptor
    from iokeep.pt.nested import Nested
    from iokeep.pt.tables import Problems

# numpy is imported by the handlers, not by the parser: --help stays fast.

_SIZES = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
_SOURCE = "capture directory (meta.json, tables.npz)"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``table`` and its verbs."""
    table = subparsers.add_parser("table", help="IO page tables", description=__doc__)
    verbs = table.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, handler: Any, text: str) -> argparse.ArgumentParser:
        parser = verbs.add_parser(name, help=text, description=text)
        parser.add_argument("-j", "--json", action="store_true", help="one JSON document on stdout")
        parser.set_defaults(run=handler, schema=f"iokeep.table-{name}-v1")
        return parser

    show = verb("show", _show, "format, size and contents of a table in short")
    show.add_argument("source", metavar="SOURCE", type=Path, help=_SOURCE)
    show.add_argument(
        "--gate",
        metavar="PROFILE",
        help="exit 1 unless the table is what this kernel takes: linux-7.3, soft-7.2, soft-7.3, soft-7.4, or "
        "a FILE (.json, .toml; what show --json printed of another table too)",
    )
    walk = verb("walk", _walk, "translate IOVAs one by one, with the path")
    walk.add_argument("source", metavar="SOURCE", type=Path, help=_SOURCE)
    walk.add_argument("iova", metavar="IOVA", nargs="+", help="0x... or decimal")
    extents = verb("extents", _extents, "everything that the table translates, as maximal runs")
    extents.add_argument("source", metavar="SOURCE", type=Path, help=_SOURCE)
    extents.add_argument("--tsv", action="store_true", help="the form of truth.tsv")
    extents.add_argument(
        "--attrs",
        action="store_true",
        help="with memory attributes as IOMMU_* flags (of two stages: what both make)",
    )
    verify = verb(
        "verify", _verify, "prove that the table translates exactly what is expected (exit 1: it does not)"
    )
    verify.add_argument("source", metavar="SOURCE", type=Path, help=_SOURCE)
    verify.add_argument(
        "--against", metavar="FILE.tsv", type=Path, help="expected extents (default: truth.tsv of SOURCE)"
    )
    diff = verb("diff", _diff, "compare two tables: translations, and leaf sizes apart (exit 1: they differ)")
    diff.add_argument("a", metavar="A", type=Path, help=_SOURCE)
    diff.add_argument("b", metavar="B", type=Path, help=_SOURCE)
    for parser, switch in ((verify, "to what is expected"), (diff, "from A to B")):
        parser.add_argument(
            "--layout", action="store_true", help="different leaf sizes count as a difference"
        )
        parser.add_argument(
            "--bbm",
            type=int,
            choices=(0, 1, 2),
            metavar="LEVEL",
            help=f"a live switch {switch} that hardware of this break-before-make level (SMMU_IDR3.BBML: "
            "0, 1, 2) forbids counts as a difference",
        )
    for parser in (show, walk, extents, verify):
        table_nested.add_options(parser)
    for parser in (verify, diff):
        parser.add_argument(
            "--limit", type=int, default=16, metavar="N", help="name the first N differences (default 16)"
        )
    digest = verb(
        "digest", _digest, "keyed digest of the translations; equal however they are cut into leaves"
    )
    digest.add_argument("source", metavar="SOURCE", type=Path, help=_SOURCE)
    digest.add_argument(
        "--key", metavar="HEX", help="16 bytes; equal keys make digests comparable (default: random)"
    )


def _capture(path: Path) -> Capture:
    from iokeep.mem.capture import Capture

    return Capture.load(path)


def _format(capture: Capture) -> Format:
    from iokeep.pt.registry import open_format

    return open_format(capture.format, capture.config)


def _open(path: Path) -> tuple[Capture, Format]:
    capture = _capture(path)
    return capture, _format(capture)


def _print_json(args: argparse.Namespace, document: dict[str, Any]) -> None:
    print(json.dumps({"schema": args.schema, "tool_version": __version__, **document}, indent=1))


def _described(fmt: Format) -> dict[str, Any]:
    return {"format": fmt.name, "config": dict(fmt.config)}


def _size(count: int) -> str:
    for unit, name in _SIZES:
        if count >= unit:
            return f"{count // unit} {name}" if count % unit == 0 else f"{count / unit:.1f} {name}"
    return f"{count} bytes"


def _lg2(lg2: int) -> str:
    return _size(1 << lg2).replace(" ", "").removesuffix("iB")


def _hex(value: int | None) -> str | None:
    return None if value is None else f"{value:#x}"


def _prot(value: int | None) -> str | None:
    from iokeep.pt.extents import PROT_TEXT

    return None if value is None else PROT_TEXT[value]


def _warn(fmt: Format, problems: Problems) -> int:
    """Say on stderr what is bad in a table; 1 where anything is."""
    from iokeep.pt.tables import REASONS

    iovas = fmt.extend(problems.iova)
    for i in range(min(len(problems), 16)):
        print(
            f"warning: iova {int(iovas[i]):#x}: {REASONS[int(problems.reason[i])]}: "
            f"item {int(problems.item[i]):#x} at pa {int(problems.at[i]):#x}, level {int(problems.level[i])}",
            file=sys.stderr,
        )
    if len(problems) > 16:
        print(f"warning: and {len(problems) - 16} more bad items", file=sys.stderr)
    return int(len(problems) > 0)


# -- show ----------------------------------------------------------------------------------------------


def _show(args: argparse.Namespace) -> int:
    import numpy as np

    from iokeep.pt.gate import check, describe
    from iokeep.pt.gate_file import document_of, find_gate
    from iokeep.pt.leaves import Leaves
    from iokeep.pt.tables import Problems, TableMemory, descend, expand, raise_unreadable

    gate = None if args.gate is None else find_gate(args.gate)
    capture = _capture(args.source)
    stages = table_nested.stages_of(args, capture)
    if stages is not None:
        if gate is not None:
            raise UsageError("--gate looks at one table", "leave out --nested, or --stage1")
        return _show_nested(args, stages)
    fmt = _format(capture)
    tm = TableMemory(fmt, capture.memory)
    upper = descend(tm, capture.root_pa)
    raise_unreadable(fmt, upper.problems)
    counts: dict[int, int] = {}
    union = [0] * len(fmt.levels)
    mapped, empty, problems = 0, 0, [upper.problems]
    low, high = None, None
    for items, bad in [
        (upper.leaves, Problems()),
        *expand(tm, upper.base, upper.pa, upper.row, upper.prot),
    ]:
        problems.append(bad)
        if not len(items):
            continue
        leaves = Leaves.of(fmt, items)
        mapped += leaves.extents().mapped_bytes
        first, last = int(leaves.iova[0]), int(leaves.last[-1])
        low, high = first if low is None else min(low, first), last if high is None else max(high, last)
        sizes, numbers = np.unique(items.lg2, return_counts=True)
        for lg2, number in zip(sizes.tolist(), numbers.tolist(), strict=True):
            counts[lg2] = counts.get(lg2, 0) + number
        for level in range(len(fmt.levels)):
            mine = items.item[items.level == level]
            union[level] |= int(np.bitwise_or.reduce(mine)) if len(mine) else 0
    for lo in range(0, len(upper.row), 1024):
        items_ = tm.items(upper.row[lo : lo + 1024])
        used = np.unique(tm.places(0, items_.reshape(-1)) >> fmt.levels[0].index_bits)
        empty += len(items_) - len(used)
    bad_items = Problems.join(problems)
    pages = {fmt.top_level - n: len(np.unique(p)) for n, p in enumerate(upper.pages)}
    table_bytes = sum(n * fmt.bytes_of(level) for level, n in pages.items())
    shared = upper.visits - sum(pages.values())
    spec_bits = {
        "attributes": 0, "ignored": 0,
    }  # fmt: skip
    for level, seen in enumerate(union):
        spec_bits["attributes"] |= seen & fmt.levels[level].leaf_attrs
        spec_bits["ignored"] |= seen & fmt.levels[level].leaf_ignored
    possible = {lg2 for spec in fmt.levels for lg2 in spec.lg2s} | set(counts)
    leaves_by_size = {_lg2(lg2): counts.get(lg2, 0) for lg2 in sorted(possible)}
    descriptor = describe(fmt, capture.memory, capture.root_pa)
    whose = args.source.resolve().name or "table"
    refused = [] if gate is None else check(fmt, descriptor, gate)
    if args.json:
        document = {
            "source": str(args.source),
            **_described(fmt),
            "descriptor": document_of(descriptor, whose) | _descriptor(descriptor),
            "gate": None if gate is None else {"profile": gate.name, "violations": refused},
            "spec": fmt.spec,
            "levels": len(fmt.levels),
            "input_bits": fmt.input_lg2,
            "root_pa": _hex(capture.root_pa),
            "kernel": capture.meta.get("kernel") if isinstance(capture.meta.get("kernel"), str) else None,
            "table_pages": sum(pages.values()),
            "table_pages_by_level": {str(level): n for level, n in pages.items()},
            "shared_visits": shared,
            "empty_tables": empty,
            "table_bytes": table_bytes,
            "leaves": leaves_by_size,
            "mapped_bytes": mapped,
            "first_iova": _hex(low),
            "last_iova": _hex(high),
            "leaf_bits_seen": {name: _hex(bits) for name, bits in spec_bits.items()},
            "bad_items": len(bad_items),
        }
        _print_json(args, document)
        return int(len(bad_items) > 0 or bool(refused))
    config = ", ".join(f"{key} {value}" for key, value in fmt.config.items())
    rows = [
        ("format", f"{fmt.name} ({config})"),
        ("spec", fmt.spec),
        ("root", f"{capture.root_pa:#x}, {len(fmt.levels)} levels, {fmt.input_lg2}-bit IOVA"),
        (
            "tables",
            f"{sum(pages.values())} pages ({_size(table_bytes)}); by level "
            + ", ".join(f"{level}: {n}" for level, n in pages.items())
            + (f"; {empty} of level 0 are empty" if empty else "")
            + (f"; {shared} visits to shared ones" if shared else ""),
        ),
        ("leaves", ", ".join(f"{n} x {size}" for size, n in leaves_by_size.items())),
        ("mapped", _size(mapped) + (f" in {low:#x}-{high:#x}" if low is not None else "")),
        ("bits", ", ".join(f"{name} {bits:#x}" for name, bits in spec_bits.items()) + " seen in leaves"),
    ]
    rows.append(("uses", ", ".join(descriptor.features) or "no feature bits in leaves"))
    rows.append(("", "in table items: " + (", ".join(descriptor.table_features) or "none")))
    for level, kind, bits in descriptor.unknown:
        rows.append(("unknown", f"bits {bits:#x} in a {kind} of level {level}"))
    for level, bits in descriptor.stale:
        rows.append(("stale", f"bits {bits:#x} in items of level {level} that are not present"))
    if gate is not None:
        rows.append(("gate", f"{gate.name}: " + ("passes" if not refused else "refused")))
        rows += [("", text) for text in refused]
    if isinstance(capture.meta.get("kernel"), str):
        rows.insert(0, ("kernel", capture.meta["kernel"]))
    for name, text in rows:
        print(f"{name:8}{text}")
    return max(_warn(fmt, bad_items), int(bool(refused)))


def _show_nested(args: argparse.Namespace, stages: tuple[Nested, str]) -> int:
    nested, source = stages
    found, problems = nested.extents()
    one, two = nested.fmt, nested.fmt_two
    if args.json:
        document = {"source": str(args.source), **table_nested.described(*stages)}
        ends = (None, None) if not len(found) else (int(found.iova[0]), int(found.last[-1]))
        document |= {"mapped_bytes": found.mapped_bytes, "extents": len(found), "bad_items": len(problems)}
        _print_json(args, document | {"first_iova": _hex(ends[0]), "last_iova": _hex(ends[1])})
        return int(len(problems) > 0)
    for line in table_nested.problem_lines(problems):
        print(line, file=sys.stderr)
    roots = ("stage 1", one, f"gpa {nested.root_gpa:#x}"), ("stage 2", two, f"pa {nested.root_pa:#x}")
    for name, fmt, root in roots:
        config = ", ".join(f"{key} {value}" for key, value in fmt.config.items())
        size = f"{len(fmt.levels)} levels, {fmt.input_lg2}-bit input"
        print(f"{name:8}{fmt.name} ({config}), root {root}, {size}")
    print(f"{'from':8}{source}")
    where = f" in {int(found.iova[0]):#x}-{int(found.last[-1]):#x}" if len(found) else ""
    print(f"{'mapped':8}{_size(found.mapped_bytes)}{where}, {len(found)} extents iova -> pa")
    return int(len(problems) > 0)


def _descriptor(found: Descriptor) -> dict[str, Any]:
    return {
        "leaf_features": list(found.features),
        "table_features": list(found.table_features),
        "leaf_fields": found.leaf,
        "table_fields": found.table,
        "leaf_bytes": {str(1 << lg2): n for lg2, n in found.sizes.items()},
        "contiguous_items": {str(1 << lg2): n for lg2, n in found.contiguous.items()},
        "unknown": [{"level": n, "kind": kind, "bits": _hex(bits)} for n, kind, bits in found.unknown],
        "stale": [{"level": n, "bits": _hex(bits)} for n, bits in found.stale],
        "levels": [
            {
                "level": b.level,
                "leaves": b.leaves,
                "leaf_or": _hex(b.leaf_or),
                "leaf_and": _hex(b.leaf_and) if b.leaves else None,
                "tables": b.tables,
                "table_or": _hex(b.table_or),
                "table_and": _hex(b.table_and) if b.tables else None,
            }
            for b in found.levels
        ],
    }


# -- walk ----------------------------------------------------------------------------------------------


def _iova(text: str) -> int:
    return table_nested.number(text, "IOVA")


def _walk(args: argparse.Namespace) -> int:
    from iokeep.pt.walk import walk

    iovas = [_iova(text) for text in args.iova]
    capture = _capture(args.source)
    stages = table_nested.stages_of(args, capture)
    if stages is not None:
        both = [stages[0].walk(iova) for iova in iovas]
        if args.json:
            document = {"source": str(args.source), **table_nested.described(*stages)}
            _print_json(args, {**document, "walks": [table_nested.walk_json(w) for w in both]})
        else:
            print("\n".join(line for w in both for line in table_nested.walk_lines(w)))
        return 0
    fmt = _format(capture)
    walks = [walk(fmt, capture.memory, capture.root_pa, iova) for iova in iovas]
    if args.json:
        _print_json(
            args,
            {
                "source": str(args.source),
                **_described(fmt),
                "root_pa": _hex(capture.root_pa),
                "walks": [
                    {
                        "iova": _hex(w.iova),
                        "pa": _hex(w.pa),
                        "prot": _prot(w.prot) if w.pa is not None else None,
                        "leaf_bytes": None if w.leaf_lg2 is None else 1 << w.leaf_lg2,
                        "why": w.why,
                        "steps": [
                            {"level": level, "item_pa": _hex(at), "item": _hex(item)}
                            for level, at, item in w.steps
                        ],
                    }
                    for w in walks
                ],
            },
        )
        return 0
    for w in walks:
        for level, at, item in w.steps:
            print(f"  level {level}  pa {at:#018x}  item {item:#018x}")
        if w.pa is None or w.leaf_lg2 is None:
            print(f"{w.iova:#x}: no translation: {w.why}")
        else:
            print(f"{w.iova:#x}: pa {w.pa:#x} {_prot(w.prot)}, {_lg2(w.leaf_lg2)} leaf")
    return 0


# -- extents -------------------------------------------------------------------------------------------


def _extents(args: argparse.Namespace) -> int:
    from iokeep.mem.capture import attrs_text, tsv_lines
    from iokeep.pt.attributes import attributed
    from iokeep.pt.extents import PROT_TEXT
    from iokeep.pt.leaves import extents

    if args.json and args.tsv:
        raise UsageError("--json and --tsv exclude each other")
    capture = _capture(args.source)
    stages = table_nested.stages_of(args, capture)
    if stages is not None:
        nested = stages[0]
        found, wrong = nested.extents()
        for line in table_nested.problem_lines(wrong):
            print(line, file=sys.stderr)
        code, bad_items = int(len(wrong) > 0), len(wrong)
        said: dict[str, Any] = table_nested.described(*stages)
        if args.attrs:
            found = nested.attributed()
    else:
        fmt = _format(capture)
        found, problems = extents(fmt, capture.memory, capture.root_pa)
        if args.attrs:
            found = attributed(fmt, capture.memory, capture.root_pa)
        code, bad_items, said = _warn(fmt, problems), len(problems), _described(fmt)
    if args.tsv:
        for text in tsv_lines(found.iova, found.last, found.pa, found.prot, found.attrs):
            sys.stdout.write(text)
        return code
    attrs = [attrs_text(f) for f in found.attrs.tolist()] if found.attrs is not None else None
    columns = (found.iova.tolist(), found.last.tolist(), found.pa.tolist(), found.prot.tolist())
    if args.json:
        rows = [
            {"iova": _hex(a), "last": _hex(z), "pa": _hex(p), "length": _hex(z - a + 1), "prot": PROT_TEXT[q]}
            for a, z, p, q in zip(*columns, strict=True)
        ]
        for row, text in zip(rows, attrs or (), strict=False):
            row["attrs"] = text
        document: dict[str, Any] = {"source": str(args.source), **said, "extents": rows}
        document |= {"mapped_bytes": found.mapped_bytes, "bad_items": bad_items}
        _print_json(args, document)
        return code
    for n, (a, z, p, q) in enumerate(zip(*columns, strict=True)):
        more = "" if attrs is None else f"  {attrs[n]}"
        print(f"{a:#018x} {z:#018x} {p:#018x} {PROT_TEXT[q]}  {_size(z - a + 1)}{more}")
    print(f"{len(found)} extents, {_size(found.mapped_bytes)}")
    return code


# -- verify, diff --------------------------------------------------------------------------------------


def _limit(args: argparse.Namespace) -> int:
    if not 0 <= args.limit <= 1 << 20:
        raise UsageError(f"--limit {args.limit} is not within 0 and {1 << 20}")
    return int(args.limit)


def _mismatch(m: Mismatch) -> dict[str, Any]:
    return {
        "iova": _hex(m.iova),
        "last": _hex(m.last),
        "reason": m.reason,
        "expected_pa": _hex(m.expected_pa),
        "expected_prot": _prot(m.expected_prot),
        "found_pa": _hex(m.found_pa),
        "found_prot": _prot(m.found_prot),
        "level": m.level,
        "text": m.text,
        **({"expected_attrs": m.expected_attrs, "found_attrs": m.found_attrs} if m.expected_attrs else {}),
    }


def _layout(r: LayoutRange, a: str = "a", b: str = "b") -> dict[str, Any]:
    return {
        "iova": _hex(r.iova),
        "last": _hex(r.last),
        f"leaf_bytes_{a}": 1 << r.lg2_a,
        f"leaf_bytes_{b}": 1 << r.lg2_b,
    }


def _verdict(v: Verdict) -> dict[str, Any]:
    return {
        "equal": v.equal,
        "pages": v.pages,
        "table_bytes": v.table_bytes,
        "total": v.total,
        "differ": v.differ,
        "mismatches": [_mismatch(m) for m in v.mismatches],
        "attrs_compared": None if v.attrs_compared is None else list(v.attrs_compared),
        "attrs_not_compared": list(v.attrs_not_compared),
    }


def _differ(v: Verdict) -> str:
    pages = ", ".join(f"{reason} {count}" for reason, count in v.differ.items())
    return f"{v.total} ranges (pages: {pages}); {v.pages} pages ({_size(v.pages << 12)}) hold"


def _print_mismatches(v: Verdict) -> None:
    for m in v.mismatches:
        print(f"  {m.text}")
    if v.total > len(v.mismatches):
        print(f"  and {v.total - len(v.mismatches)} more")


def _print_attrs(v: Verdict) -> None:
    if v.attrs_not_compared:
        print(f"attributes not compared (only one side can say them): {', '.join(v.attrs_not_compared)}")


def _refuse_loop(source: Path, v: Verdict) -> None:
    """A table that loops is no table: bad input, not a difference. :raises InputError:"""
    if "loop" in v.differ:
        first = next((m.text for m in v.mismatches if m.reason == "loop"), "a table serves at two levels")
        raise InputError(f"{source}: {first}", "check root_pa and the format's configuration")


def _expected(args: argparse.Namespace, capture: Capture) -> tuple[Path, Extents, U8 | None]:
    from iokeep.mem.capture import read_expected
    from iokeep.pt.extents import Extents

    path = args.against or args.source / "truth.tsv"
    if args.against is None and not capture.has_truth:
        raise InputError(
            f"{args.source} has no truth.tsv to verify against",
            "name expected extents with --against FILE.tsv",
        )
    rows, attrs, lg2 = read_expected(path)
    return path, Extents(*rows, attrs), lg2


def _verify(args: argparse.Namespace) -> int:
    from iokeep.pt.diff import traits_layout
    from iokeep.pt.verify import verify
    from iokeep.pt.wanted import wanted_traits, with_bbm

    limit = _limit(args)
    capture = _capture(args.source)
    stages = table_nested.stages_of(args, capture)
    if stages is not None:
        if args.layout or args.bbm is not None:
            raise UsageError(
                "leaf sizes are compared in one table, --nested and --stage1 prove two",
                "leave out --layout and --bbm, or verify each stage by itself",
            )
        return _verify_nested(args, capture, stages, limit)
    fmt = _format(capture)
    path, expected, lg2 = _expected(args, capture)
    wanted = wanted_traits(fmt, expected, lg2, str(path))
    v = verify(fmt, capture.memory, capture.root_pa, expected, limit=limit, layout=traits_layout(wanted))
    _refuse_loop(args.source, v)
    v = with_bbm(fmt, capture.memory, capture.root_pa, wanted, v, limit)
    if args.json:
        document = {"source": str(args.source), "against": str(path), **_described(fmt), **_verdict(v)}
        document |= {
            "layout_of": "kernel" if lg2 is None else "lg2",
            "layout_equal": v.layout_equal,
            "layout_total": v.layout_total,
            "layout": [_layout(r, "expected", "found") for r in v.layout],
            "bbm": _bbm(v, args.bbm or 0, "found", "expected"),
        }
        _print_json(args, document)
    elif v.equal:
        size = _size(v.table_bytes)
        print(f"equal: {v.pages} pages ({_size(v.pages << 12)}) proved, {size} of {fmt.name} tables")
    else:
        print(f"different: {_differ(v)}")
        _print_mismatches(v)
    if not args.json:
        _print_attrs(v)
        _print_layout(v, "a kernel makes" if lg2 is None else "column lg2 says")
        if v.bbm is not None and (v.equal or args.bbm is not None):
            _print_bbm(v.bbm, args.bbm)
    forbidden = args.bbm is not None and (v.bbm is None or not v.bbm.allowed(args.bbm))
    return int(not v.equal or (args.layout and v.layout_equal is False) or forbidden)


def _print_layout(v: Verdict, whose: str) -> None:
    """Where the table is cut into other leaves than expected. Silent where nothing is to be said."""
    if not v.layout:
        return
    print(f"layout differs from what {whose}: {v.layout_total} ranges (translations are not affected)")
    for r in v.layout:
        print(f"  iova {r.iova:#x}-{r.last:#x}: leaves of {_lg2(r.lg2_b)}, {whose} {_lg2(r.lg2_a)}")
    if v.layout_total > len(v.layout):
        print(f"  and {v.layout_total - len(v.layout)} more")


def _verify_nested(args: argparse.Namespace, capture: Capture, stages: tuple[Nested, str], limit: int) -> int:
    nested = stages[0]
    path, expected, lg2 = _expected(args, capture)
    if lg2 is not None:
        raise UsageError(
            f"{path} states leaf sizes (column lg2), two stages have none in common",
            "leave the column out, or verify each stage by itself",
        )
    v = nested.verify(expected, limit=limit)
    _refuse_loop(args.source, v)
    if args.json:
        document = {"source": str(args.source), "against": str(path), **table_nested.described(*stages)}
        _print_json(args, {**document, **_verdict(v)})
        return int(not v.equal)
    if v.equal:
        names = f"{nested.fmt.name} under {nested.fmt_two.name}"
        size = _size(v.table_bytes)
        print(f"equal: {v.pages} pages ({_size(v.pages << 12)}) proved, {size} of {names} tables")
    else:
        print(f"different: {_differ(v)}")
        _print_mismatches(v)
    _print_attrs(v)
    return int(not v.equal)


def _bbm(v: Verdict, level: int, a: str = "a", b: str = "b") -> dict[str, Any] | None:
    """May a live device be switched? None = it cannot be said."""
    if v.bbm is None:
        return None
    return {
        "level": level,
        "allowed": v.bbm.allowed(level),
        "allowed_by_level": [v.bbm.allowed(n) for n in range(3)],
        "total": v.bbm.blocked[level],
        "ranges": [
            {
                "iova": _hex(r.iova),
                "last": _hex(r.last),
                "kind": r.kind,
                f"leaf_bytes_{a}": None if r.lg2_a is None else 1 << r.lg2_a,
                f"leaf_bytes_{b}": None if r.lg2_b is None else 1 << r.lg2_b,
                "allowed_from_level": r.level,
            }
            for r in v.bbm.ranges[level]
        ],
    }


def _print_bbm(bbm: Bbm, level: int | None) -> None:
    """What hardware of each level (or of one) says to a live switch."""
    words = [f"level {n} {'allows' if bbm.allowed(n) else 'forbids'}" for n in range(3)]
    if level is None:
        if bbm.blocked[0]:
            print(f"live switch without break-before-make: {', '.join(words)} it")
        return
    print(f"live switch without break-before-make: {words[level]} it")
    for r in bbm.ranges[level]:
        sizes = "" if r.lg2_a is None or r.lg2_b is None else f" {_lg2(r.lg2_a)} to {_lg2(r.lg2_b)}"
        print(f"  iova {r.iova:#x}-{r.last:#x}: {r.kind}{sizes}")
    if bbm.blocked[level] > len(bbm.ranges[level]):
        print(f"  and {bbm.blocked[level] - len(bbm.ranges[level])} more")


def _diff(args: argparse.Namespace) -> int:
    from iokeep.pt.diff import diff

    limit = _limit(args)
    a, fmt_a = _open(args.a)
    b, fmt_b = _open(args.b)
    v = diff(fmt_a, a.memory, a.root_pa, fmt_b, b.memory, b.root_pa, limit=limit)
    _refuse_loop(args.b, v)
    if args.json:
        document = {
            "a": str(args.a),
            "b": str(args.b),
            "formats": [_described(fmt_a), _described(fmt_b)],
            **_verdict(v),
            "layout_equal": v.layout_equal,
            "layout_total": v.layout_total,
            "layout": [_layout(r) for r in v.layout],
            "bbm": _bbm(v, args.bbm or 0),
        }
        _print_json(args, document)
    else:
        if v.equal:
            print(f"translations equal: {v.pages} pages ({_size(v.pages << 12)})")
        else:
            print(f"translations differ: {_differ(v)}")
            _print_mismatches(v)
        _print_attrs(v)
        if v.layout_equal is not None:
            print("layout equal" if v.layout_equal else f"layout differs: {v.layout_total} ranges")
        for r in v.layout:
            print(f"  iova {r.iova:#x}-{r.last:#x}: leaves of {_lg2(r.lg2_a)} and {_lg2(r.lg2_b)}")
        if v.layout_total > len(v.layout):
            print(f"  and {v.layout_total - len(v.layout)} more")
        if v.bbm is not None:
            _print_bbm(v.bbm, args.bbm)
    forbidden = args.bbm is not None and (v.bbm is None or not v.bbm.allowed(args.bbm))
    return int(not v.equal or (args.layout and v.layout_equal is False) or forbidden)


# -- digest --------------------------------------------------------------------------------------------


def _digest(args: argparse.Namespace) -> int:
    import os

    from iokeep.pt.digest import KEY_BYTES
    from iokeep.pt.table_digest import digest

    if args.key is None:
        key = os.urandom(KEY_BYTES)
    else:
        try:
            key = bytes.fromhex(args.key.removeprefix("0x"))
        except ValueError:
            key = b""
        if len(key) != KEY_BYTES:
            raise UsageError(
                f"--key {args.key[:64]!r} is not {KEY_BYTES} bytes in hex ({2 * KEY_BYTES} digits)"
            )
    capture, fmt = _open(args.source)
    value = digest(fmt, capture.memory, capture.root_pa, key)
    if args.json:
        document = {"source": str(args.source), **_described(fmt), "algorithm": "iokeep-digest-v1"}
        _print_json(args, {**document, "key": key.hex(), "digest": value.hex()})
    else:
        print(f"{value.hex()}  key {key.hex()}")
    return 0
