# SPDX-License-Identifier: Apache-2.0
"""``iokeep handover``: what one kernel left in memory for the next."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iokeep.errors import InputError, MemoryAbsent

if TYPE_CHECKING:
    from iokeep.handover.iommu import IommuRecord
    from iokeep.handover.luo import File
    from iokeep.handover.metadata import Scratch
    from iokeep.handover.reader import Handover
    from iokeep.mem.memory import Memory

SHOW_SCHEMA = "iokeep.handover-show-v1"
CHECK_SCHEMA = "iokeep.handover-check-v1"
#: include/uapi/linux/fcntl.h
SEALS = {
    1: "F_SEAL_SEAL",
    2: "F_SEAL_SHRINK",
    4: "F_SEAL_GROW",
    8: "F_SEAL_WRITE",
    16: "F_SEAL_FUTURE_WRITE",
    32: "F_SEAL_EXEC",
}
#: extents of a file that the text shows unless all are asked for
SHOWN_EXTENTS = 4


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``handover`` with its verbs."""
    parser = subparsers.add_parser(
        "handover",
        help="what lies in memory between two kernels: show, check",
        description="Decode and check what a kernel left for its successor: KHO, LUO, memfds, our records.",
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    show = verbs.add_parser(
        "show",
        help="sessions, files, extents, preserved frames and problems",
        description="Print the handover. Exit code 1 where anything would break the next kernel.",
    )
    _source(show)
    show.add_argument("--extents", action="store_true", help="list every extent of every file")
    show.set_defaults(run=run_show, schema=SHOW_SCHEMA)
    check = verbs.add_parser(
        "check",
        help="would that kernel take it?",
        description="List what would break the kernel that PROFILE names. Exit code 1 where anything would.",
    )
    _source(check)
    check.add_argument(
        "--to",
        metavar="PROFILE",
        default="linux-7.3",
        help="linux-7.3 (the default), or a kernel of the software host: soft-7.3, soft-7.4, ...",
        dest="profile",
    )
    check.set_defaults(run=run_check, schema=CHECK_SCHEMA)


def _source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", type=Path, help="capture directory with kho_fdt_pa")
    parser.add_argument("-j", "--json", action="store_true", help="one JSON document on stdout")


def _pa(value: object, where: str) -> int:
    if not isinstance(value, str) or not re.fullmatch(r"0x[0-9a-fA-F]{1,16}", value):
        raise InputError(f'{where} is {str(value)[:40]!r}, not a "0x..." value of at most 64 bits')
    return int(value, 16)


def _load(source: Path) -> tuple[Memory, int, tuple[Scratch, ...] | None]:
    """Memory, pa of the KHO FDT, and the scratch areas where the source holds them."""
    from iokeep.handover.metadata import read_scratch
    from iokeep.mem.capture import PageMemory, read_pages

    # Not Capture.load(): a handover need not hold a table, and then has no format and no root_pa.
    meta, pas, data = read_pages(source)
    memory = PageMemory(pas, data)
    if "kho_fdt_pa" not in meta:
        raise InputError(
            f"{source}: meta.json has no kho_fdt_pa",
            "this capture holds page tables, see `iokeep table`; a handover needs the pa of the KHO FDT",
        )
    fdt_pa = _pa(meta["kho_fdt_pa"], f"{source}: kho_fdt_pa")
    array = meta.get("scratch_array")
    if array is None:
        return memory, fdt_pa, None
    if not isinstance(array, dict) or type(array.get("size")) is not int:
        raise InputError(f"{source}: scratch_array is not an object with pa and size")
    try:
        scratch = read_scratch(memory, _pa(array.get("pa"), f"{source}: scratch_array"), array["size"])
    except MemoryAbsent:
        return memory, fdt_pa, None  # only named, not captured: nothing to check against
    return memory, fdt_pa, scratch


def _file(file: File) -> dict[str, Any]:
    memfd = file.memfd
    return {
        "token": f"{file.token:#x}",
        "kind": file.kind,
        "compatible": file.compatible,
        "data_pa": f"{file.data_pa:#x}",
        "size": memfd.size if memfd else None,
        "pos": memfd.pos if memfd else None,
        "seals": memfd.seals if memfd else None,
        "extents": [list(row) for row in zip(*(a.tolist() for a in file.extents()), strict=True)],
    }


def show_document(handover: Handover, scratch: tuple[Scratch, ...] | None) -> dict[str, Any]:
    """The body of ``handover show --json``: pas, tokens and u64 data as "0x...", all else as numbers."""
    from iokeep.handover.check import check, notes

    meta = handover.metadata
    return {
        "kho": {"compatible": handover.compatible, "fdt_pa": f"{handover.fdt_pa:#x}"},
        "luo": {"compatible": handover.luo.compatible} if handover.luo else None,
        "liveupdate_num": handover.liveupdate_num,
        "previous_release": meta.previous_release if meta else None,
        "kexec_count": meta.kexec_count if meta else None,
        "sessions": [{"name": s.name, "files": [_file(f) for f in s.files]} for s in handover.sessions],
        "flbs": [{"name": f.name, "data": f"{f.data:#x}", "count": f.count} for f in handover.flbs],
        "subtrees": [
            {"name": s.name, "data_pa": f"{s.data_pa:#x}", "size": s.size} for s in handover.subnodes.values()
        ],
        "reserved_mem": [
            {"name": r.name, "start": f"{r.start:#x}", "size": r.size} for r in handover.reserved_mem
        ],
        "scratch": None if scratch is None else [{"pa": f"{s.pa:#x}", "size": s.size} for s in scratch],
        "iommu": _iommu(handover.iommu) if handover.iommu else None,
        "preserved": {
            "pages": handover.preserved.pages,
            "by_order": {str(order): n for order, n in handover.preserved.by_order.items()},
        },
        "notes": notes(handover),
        "problems": check(handover, scratch=scratch or ()),
    }


def _seals(value: int) -> str:
    names = [name for bit, name in SEALS.items() if value & bit]
    unknown = value & ~sum(SEALS)
    return "|".join(names + ([f"{unknown:#x}"] if unknown else [])) or "none"


def _plain(text: str) -> str:
    """Text from another kernel's memory, safe for a terminal."""
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def _one_or_more(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def show_text(body: dict[str, Any], handover: Handover, *, all_extents: bool) -> list[str]:
    """The lines that a person reads; ``body`` as from :func:`show_document`."""
    from iokeep.report.text import size, table

    kho, luo = body["kho"], body["luo"]
    lines = [f"KHO        {_plain(kho['compatible'])}, FDT at {kho['fdt_pa']} ({handover.fdt_size} bytes)"]
    if handover.root_pa:
        lines[0] += f", radix tree at {handover.root_pa:#x}"
    if body["previous_release"] is not None:
        lines.append(
            f"from       Linux {_plain(body['previous_release'])}, kexec number {body['kexec_count']}"
        )
    if luo:
        lines.append(f"LUO        {_plain(luo['compatible'])}, live update number {body['liveupdate_num']}")
    rows = [["subtree", s["name"], f"at {s['data_pa']}", f"{s['size']} bytes"] for s in body["subtrees"]]
    rows += [["reserved", r["name"], f"at {r['start']}", size(r["size"])] for r in body["reserved_mem"]]
    rows += [["scratch", "", f"at {s['pa']}", size(s["size"])] for s in body["scratch"] or ()]
    rows += [["FLB", f["name"], f"data {f['data']}", _one_or_more(f["count"], "user")] for f in body["flbs"]]
    lines += table([[row[0].ljust(9), *map(_plain, row[1:])] for row in rows])
    tree = handover.preserved
    counts = ", ".join(f"{n} of order {order}" for order, n in body["preserved"]["by_order"].items())
    lines.append(
        f"preserved  {body['preserved']['pages']} pages ({size(tree.pages << 12)}): {counts or 'nothing'}"
    )
    metadata = sum(what != "radix node" for what in handover.pages.values())
    content = sum(
        int((1 << f.memfd.order[f.memfd.pfn != 0].astype(object)).sum())
        for s in handover.sessions
        for f in s.files
        if f.memfd and len(f.memfd.pfn)
    )
    rest = max(0, tree.pages - content - metadata)  # a damaged record may claim more than is preserved
    lines.append(f"           {content} of files, {metadata} of records, {rest} of others")
    for session, decoded in zip(body["sessions"], handover.sessions, strict=True):
        lines.append(f"session {_plain(session['name'])}: {_one_or_more(len(session['files']), 'file')}")
        for row, file in zip(session["files"], decoded.files, strict=True):
            lines += _file_text(row, file, size, all_extents)
    if body["iommu"] is not None:
        lines += _iommu_text(body["iommu"], size)
    for note in body["notes"]:
        lines.append(f"note: {note}")
    for problem in body["problems"]:
        lines.append(f"problem: {problem}")
    lines.append(_one_or_more(len(body["problems"]), "problem") if body["problems"] else "no problems")
    return lines


def _file_text(row: dict[str, Any], file: File, size: Any, all_extents: bool) -> list[str]:
    from iokeep.handover.iommu import IommufdRecord, VfioRecord

    head = f"  {row['token']}  {_plain(row['compatible'])}"
    if isinstance(file.record, IommufdRecord):
        areas = sum(len(i.iova) for i in file.record.ioases)
        hwpts = _one_or_more(len(file.record.hwpts), "HWPT")
        return [f"{head}  {hwpts}, {len(file.record.ioases)} IOAS, {_one_or_more(areas, 'area')}"]
    if isinstance(file.record, VfioRecord):
        r = file.record
        return [f"{head}  {_bdf(r.segment, r.bdf)}, iommufd token {r.iommufd_token:#x}"]
    if file.memfd is None:
        return [f"{head}  data {row['data_pa']}, not decoded"]
    orders = ", ".join(f"{n} of order {o}" for o, n in sorted(_orders(file).items()))
    extents = row["extents"]
    lines = [
        f"{head}  {size(row['size'])} ({row['size']} bytes), pos {row['pos']}, seals {_seals(row['seals'])}",
        f"       folios: {orders or 'none'}; {_one_or_more(len(extents), 'extent')}",
    ]
    shown = extents if all_extents or len(extents) <= SHOWN_EXTENTS + 1 else extents[:SHOWN_EXTENTS]
    for index, pfn, count in shown:
        lines.append(f"       index {index:<8} pfn {pfn:#010x}  {_one_or_more(count, 'page')}")
    if len(shown) < len(extents):
        lines.append(f"       ... {len(extents) - len(shown)} more, see --extents")
    return lines


def _orders(file: File) -> dict[int, int]:
    out: dict[int, int] = {}
    for order in file.memfd.order.tolist() if file.memfd else ():
        out[order] = out.get(order, 0) + 1
    return out


def _iommu(record: IommuRecord) -> dict[str, Any]:
    return {
        "domains": [
            {
                "index": d.index,
                "format": d.format,
                "config": dict(d.config),
                "features": list(d.features),
                "root_pa": f"{d.root_pa:#x}",
                "domain_id": d.domain_id,
                "top_level": d.top_level,
                "table_pages": d.n_table_pages,
                "mapped_bytes": d.mapped_bytes,
                "extents": d.extents_count,
                "digest": d.digest.hex(),
            }
            for d in record.domains
        ],
        "devices": [
            {
                "index": v.index,
                "token": f"{v.token:#x}",
                "bdf": _bdf(v.segment, v.bdf),
                "domain_index": v.domain_index,
                "mode": v.mode,
            }
            for v in record.devices
        ],
        "iommus": [
            {
                "register_base": f"{i.register_base:#x}",
                "root_table": f"{i.root_table:#x}",
                "mode": i.mode,
                "version": f"{i.version:#x}",
                "structure_pages": len(i.structure_pages),
            }
            for i in record.iommus
        ],
    }


def _iommu_text(body: dict[str, Any], size: Any) -> list[str]:
    lines = []
    for d in body["domains"]:
        lines.append(
            f"domain {d['index']}: {_plain(d['format'])}, root at {d['root_pa']}, "
            f"domain id {d['domain_id']}, {_one_or_more(d['table_pages'], 'table page')}, "
            f"{size(d['mapped_bytes'])} in "
            f"{_one_or_more(d['extents'], 'extent')}"
        )
    for v in body["devices"]:
        lines.append(f"device {v['bdf']}: domain {v['domain_index']}, {v['mode']}, token {v['token']}")
    for i in body["iommus"]:
        lines.append(
            f"IOMMU at {i['register_base']}: {i['mode']}, root table {i['root_table']}, "
            f"{_one_or_more(i['structure_pages'], 'structure page')}"
        )
    return lines


def _bdf(segment: int, bdf: int) -> str:
    return f"{segment:04x}:{bdf >> 8:02x}:{bdf >> 3 & 31:02x}.{bdf & 7}"


def run_show(args: argparse.Namespace) -> int:
    """``iokeep handover show SOURCE``: 0, or 1 where there are problems."""
    from iokeep.handover.reader import read_handover
    from iokeep.report.json import document

    memory, fdt_pa, scratch = _load(args.source)
    handover = read_handover(memory, fdt_pa)
    body = show_document(handover, scratch)
    if args.json:
        sys.stdout.write(document(SHOW_SCHEMA, body))
    else:
        sys.stdout.write("\n".join(show_text(body, handover, all_extents=args.extents)) + "\n")
    return 1 if body["problems"] else 0


def run_check(args: argparse.Namespace) -> int:
    """``iokeep handover check SOURCE --to PROFILE``: 0, or 1 where there are problems."""
    from iokeep.handover.check import Profile, check
    from iokeep.handover.reader import read_handover
    from iokeep.report.json import document
    from iokeep.soft.kernel.profiles import profile_of

    kernel = profile_of(args.profile)
    known = frozenset(kernel.reads)
    profile = Profile(
        kernel.name,
        files=known,
        flbs=known,
        formats=kernel.formats if kernel.liveupdate else None,
    )
    memory, fdt_pa, scratch = _load(args.source)
    problems = check(read_handover(memory, fdt_pa), profile, scratch or ())
    if args.json:
        sys.stdout.write(document(CHECK_SCHEMA, {"to": profile.name, "problems": problems}))
    else:
        for problem in problems:
            print(f"problem: {problem}")
        print(f"{profile.name}: " + (_one_or_more(len(problems), "problem") if problems else "takes it"))
    return 1 if problems else 0
