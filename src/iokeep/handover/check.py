# SPDX-License-Identifier: Apache-2.0
"""Would the next kernel take this handover? Checked against a profile: the version strings that it knows.

Mainline compares each string exactly and never negotiates (Linux 7.3
``kernel/liveupdate/{kexec_handover,luo_core, luo_file}.c``), and what it does with a string that it does
not know differs badly: it boots as if nothing had been handed over, panics, or fails every open of
/dev/liveupdate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from iokeep.handover.abi import PAGE_SHIFT, PAGE_SIZE
from iokeep.handover.iommu import IoasRecord, IommufdRecord, IommuRecord, VfioRecord
from iokeep.handover.luo import EIO, PANIC, File
from iokeep.handover.metadata import Scratch
from iokeep.handover.reader import Handover
from iokeep.mem.memory import U64
from iokeep.uapi import kho as strings

#: include/uapi/linux/fcntl.h: F_SEAL_EXEC; and F_SEAL_SHRINK | GROW | WRITE | FUTURE_WRITE
F_SEAL_EXEC = 0x20
F_WRITE_SEALS = 0x1E
#: biggest block that kho_preserved_memory_reserve() can size: it shifts an int
MAX_RUN_ORDER = 18


@dataclass(frozen=True, slots=True)
class Profile:
    """What one kernel can take over: the exact strings that it knows.

    ``files``: LUO file handlers. ``flbs``: FLBs; one that is in use and not known is never released.
    ``formats``: table formats that it is tested to adopt -> the features that it knows; None = not checked.
    """

    name: str
    kho: str = strings.KHO_FDT_COMPATIBLE
    luo: str = strings.LUO_ABI_COMPATIBLE
    files: frozenset[str] = frozenset({strings.MEMFD_LUO_FH_COMPATIBLE})
    flbs: frozenset[str] = frozenset()
    formats: Mapping[str, frozenset[str]] | None = None


LINUX_7_3 = Profile("linux-7.3")
SOFT_7_3 = Profile(
    "soft-7.3",
    files=LINUX_7_3.files | {IommufdRecord.COMPATIBLE, VfioRecord.COMPATIBLE},
    flbs=frozenset({IommuRecord.COMPATIBLE}),
)


def check(handover: Handover, supported: Profile = SOFT_7_3, scratch: tuple[Scratch, ...] = ()) -> list[str]:
    """One line per thing that would break the next kernel, the reader's own findings first.

    :param scratch: the scratch areas, where known; the next kernel boots there.
    """

    problems = list(handover.problems)
    if handover.compatible != supported.kho and handover.compatible == strings.KHO_FDT_COMPATIBLE:
        problems.append(
            f"KHO FDT at {handover.fdt_pa:#x} is {handover.compatible!r}, {supported.name} takes "
            f"{supported.kho!r}: it boots with nothing reserved"
        )
    luo = handover.luo
    if luo is not None and luo.supported and luo.compatible != supported.luo:
        problems.append(
            f"luo_ser at {luo.pa:#x} is {luo.compatible!r}, {supported.name} takes {supported.luo!r}: {PANIC}"
        )
    for session in handover.sessions:
        for file in session.files:
            if file.compatible not in supported.files:
                problems.append(
                    f"session {session.name!r} token {file.token:#x}: no handler for {file.compatible!r} in "
                    f"{supported.name}: {EIO}"
                )
    for flb in handover.flbs:
        ours = flb.name.startswith("iokeep-")
        if ours and flb.count and flb.name not in supported.flbs:
            problems.append(f"FLB {flb.name!r} is in use, {supported.name} does not know it")
    problems += _records(handover, supported)
    problems += _tree(handover, scratch)
    problems += _owners(handover)
    return problems


def _records(handover: Handover, supported: Profile) -> list[str]:
    """iokeep's records refer to each other, to files of their session, and to preserved pages."""
    out: list[str] = []
    iommu = handover.iommu
    domains = {d.index: d for d in iommu.domains} if iommu else {}
    devices = {d.index for d in iommu.devices} if iommu else set()
    for session in handover.sessions:
        tokens = {f.token: f for f in session.files}
        for file in session.files:
            what = f"session {session.name!r} token {file.token:#x}"
            if isinstance(file.record, IommufdRecord):
                for hwpt in file.record.hwpts:
                    if hwpt.domain_index not in domains:
                        out.append(
                            f"{what}: HWPT {hwpt.token:#x} lacks domain {hwpt.domain_index} in the FLB"
                        )
                for ioas in file.record.ioases:
                    out += _areas(ioas, tokens, what)
            if isinstance(file.record, VfioRecord):
                if file.record.device_index not in devices:
                    out.append(f"{what}: device {file.record.device_index} is not in the FLB")
                other = tokens.get(file.record.iommufd_token)
                if other is None or other.kind != "iommufd":
                    out.append(f"{what}: token {file.record.iommufd_token:#x} is no iommufd of this session")
    if iommu is None:
        return out
    lists = [(f"domain {d.index} table page", d.table_pages) for d in iommu.domains]
    lists += [(f"IOMMU {i.register_base:#x} structure page", i.structure_pages) for i in iommu.iommus]
    for what, pages in lists:
        lost = pages[~handover.preserved.contains(pages >> np.uint64(PAGE_SHIFT))]
        if len(lost):
            out.append(
                f"{what} at pa {int(lost[0]):#x} is not preserved ({len(lost)} of {len(pages)}): devices "
                "would translate through memory of others"
            )
    for domain in iommu.domains:
        if supported.formats is not None and domain.format not in supported.formats:
            out.append(
                f"domain {domain.index}: {supported.name} was not tested with format {domain.format!r}"
            )
        elif supported.formats is not None:
            for feature in sorted(set(domain.features) - supported.formats[domain.format]):
                out.append(f"domain {domain.index}: {supported.name} does not know feature {feature!r}")
    return out


def _areas(ioas: IoasRecord, tokens: Mapping[int, File], what: str) -> list[str]:
    """Areas need the memfd that they map, and all of it that they map."""
    out: list[str] = []
    for token in np.unique(ioas.file_token).tolist():
        mine = ioas.file_token == np.uint64(token)
        end = int((ioas.offset[mine] + (ioas.last[mine] - ioas.iova[mine])).max())
        file = tokens.get(token)
        if file is None or file.memfd is None:
            first = int(ioas.iova[mine][0])
            out.append(f"{what}: area at iova {first:#x} maps token {token:#x}, no memfd of this session")
        elif end >= file.memfd.pages * PAGE_SIZE:
            out.append(
                f"{what}: an area maps token {token:#x} up to byte {end:#x}, the file has "
                f"{file.memfd.size:#x}"
            )
    return out


def _tree(handover: Handover, scratch: tuple[Scratch, ...]) -> list[str]:
    tree = handover.preserved
    out: list[str] = []
    if not len(tree):
        return out

    def block(at: int) -> str:
        return f"preserved block at pa {int(tree.pfn[at]) << PAGE_SHIFT:#x} of order {int(tree.order[at])}"

    one = np.uint64(1)
    last = tree.pfn + ((one << tree.order.astype(np.uint64)) - one)
    reach = np.maximum.accumulate(last)
    over = np.flatnonzero(tree.pfn[1:] <= reach[:-1])
    if len(over):
        out.append(f"{block(int(over[0]) + 1)} overlaps another ({len(over)} such blocks)")
    wide = np.flatnonzero(tree.order > MAX_RUN_ORDER)
    if len(wide):
        out.append(
            f"{block(int(wide[0]))}: 1 << (order + PAGE_SHIFT) overflows in kho_preserved_memory_reserve()"
        )
    start, end = tree.intervals()
    for area in scratch:
        if not area.size:
            continue
        first, final = area.pa >> PAGE_SHIFT, (area.pa + area.size - 1) >> PAGE_SHIFT
        hit = np.flatnonzero((start <= np.uint64(final)) & (end >= np.uint64(first)))
        if len(hit):
            pa = max(int(start[hit[0]]), first) << PAGE_SHIFT
            out.append(
                f"preserved frame at pa {pa:#x} lies in the scratch area [{area.pa:#x}, "
                f"{area.pa + area.size - 1:#x}]: the next kernel's boot overwrites it"
            )
    return out


def _owners(handover: Handover) -> list[str]:
    """Frames that two files, or a file and a metadata page, both claim."""
    starts: list[U64] = []
    ends: list[U64] = []
    names: list[str] = []
    owner: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
    for session in handover.sessions:
        for file in session.files:
            if file.memfd is None or not len(file.memfd.pfn):
                continue
            real = file.memfd.pfn != 0
            starts.append(file.memfd.pfn[real])
            ends.append(file.memfd.pfn[real] + (np.uint64(1) << file.memfd.order[real].astype(np.uint64)))
            owner.append(np.full(int(real.sum()), len(names), np.int64))
            names.append(f"session {session.name!r} token {file.token:#x}")
    pages = np.array(list(handover.pages), np.uint64) >> np.uint64(PAGE_SHIFT)
    starts.append(pages)
    ends.append(pages + np.uint64(1))
    owner.append(np.full(len(pages), -1, np.int64))
    start, end, whose = np.concatenate(starts), np.concatenate(ends), np.concatenate(owner)
    order = np.argsort(start, kind="stable")
    start, end, whose = start[order], end[order], whose[order]
    clash = np.flatnonzero(start[1:] < np.maximum.accumulate(end)[:-1]) + 1
    if not len(clash):
        return []
    at = int(clash[0])
    pa = int(start[at]) << PAGE_SHIFT
    before = int(np.flatnonzero(end[:at] > start[at])[-1])

    def name(number: int) -> str:
        return names[number] if number >= 0 else f"metadata ({handover.pages.get(pa, 'page')})"

    first, second = name(int(whose[before])), name(int(whose[at]))
    return [
        f"frame at pa {pa:#x} belongs to {first} and to {second} ({len(clash)} such frames): "
        "restoring the second fails"
    ]


def notes(handover: Handover) -> list[str]:
    """What the next kernel will take, but give back changed: worth knowing, no fault of the record."""
    out = []
    for session in handover.sessions:
        for file in session.files:
            seals = file.memfd.seals if file.memfd else 0
            if seals & F_SEAL_EXEC and seals & F_WRITE_SEALS != F_WRITE_SEALS:
                # memfd_add_seals() on the restored, executable inode: F_SEAL_EXEC implies the write seals
                # (mm/memfd.c)
                out.append(
                    f"session {session.name!r} token {file.token:#x}: seals {seals:#x} come back as "
                    f"{seals | F_WRITE_SEALS:#x} where F_SEAL_EXEC is from MFD_NOEXEC_SEAL: a 7.3.4 bug that "
                    "makes the file unwritable"
                )
    return out
