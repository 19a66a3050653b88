# SPDX-License-Identifier: Apache-2.0
"""The new kernel's side of the handover: what is kept, what is freed, and what is never touched.

Runs before any frame is handed out. There are three ways to go on:

* *nothing*: no handover, or a KHO FDT of another version. Linux then boots as if there were none
  (kernel/liveupdate/kexec_handover.c, kho_populate(): a warning), and so does this kernel;
* *restored*: everything was read, every rule holds. What the tree preserves is reserved, the IOMMU goes on
  translating, prior domains are held;
* *held*: something is damaged or of a version that this kernel does not know. Every frame that has an
  owner stays as it is, and the IOMMU with it; /dev/liveupdate gives EIO. Devices and their memory go on.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from iokeep.errors import InputError
from iokeep.handover.abi import KHO_FDT_COMPATIBLE
from iokeep.handover.iommu import DomainRecord, IommufdRecord, IommuRecord, VfioRecord
from iokeep.handover.luo import File as FileRecord
from iokeep.handover.reader import Handover, read_handover
from iokeep.mem.memory import Memory
from iokeep.soft.kernel.frames import FIRMWARE_FRAMES, FRAME_SHIFT, I64, U32, pfns_of
from iokeep.soft.kernel.luo import IncomingFile, IncomingSession
from iokeep.soft.kernel.preserve_memfd import IncomingMemfd
from iokeep.soft.kernel.profiles import Profile


class Damaged(Exception):
    """The handover breaks a rule; the text says which. The kernel then holds everything."""


@dataclass(slots=True)
class Restored:
    """A handover that was read and checked.

    Frames (int64 pfns, sorted): ``preserved`` all of them; ``tables`` by domain index; ``structures`` of the
    IOMMUs; ``other``: what the tree has beyond these and the memfds (records, and anything that no
    record names). ``memfds`` and ``iommufds`` and ``vfios`` by the pa of their record.
    """

    liveupdate_num: int
    kexec_count: int
    sessions: list[IncomingSession]
    iommu: IommuRecord | None
    preserved: I64
    tables: dict[int, I64] = field(default_factory=dict)
    structures: I64 = field(default_factory=lambda: np.zeros(0, np.int64))
    other: I64 = field(default_factory=lambda: np.zeros(0, np.int64))
    memfds: dict[int, IncomingMemfd] = field(default_factory=dict)
    iommufds: dict[int, IommufdRecord] = field(default_factory=dict)
    vfios: dict[int, VfioRecord] = field(default_factory=dict)
    #: an IOMMU record is there, of a version that this kernel does not know: its name
    foreign_iommu: str = ""


def read_boot(mem: Memory, fdt_pa: int, tags: U32, profile: Profile) -> Restored | None:
    """Read the handover whose FDT is at ``fdt_pa``; None where it is of another KHO version.

    :param tags: owner tag of each frame.
    :raises Damaged: it cannot be used.
    """
    try:
        handover = read_handover(mem, fdt_pa)
    except InputError as error:
        raise Damaged(error.what) from error
    if handover.compatible != KHO_FDT_COMPATIBLE:
        return None
    if handover.problems:
        raise Damaged("; ".join(handover.problems[:8]))
    if handover.luo is None:
        raise Damaged("there is no LUO record")
    if not handover.luo.supported:
        raise Damaged(f"LUO record of version {handover.luo.compatible!r}")
    try:
        preserved = handover.preserved.frames().astype(np.int64)
    except InputError as error:
        raise Damaged(error.what) from error
    if len(preserved) and (int(preserved[0]) < FIRMWARE_FRAMES or int(preserved[-1]) >= len(tags)):
        raise Damaged(f"the tree preserves frames {int(preserved[0]):#x} ... {int(preserved[-1]):#x}")
    return _restored(handover, preserved, tags, profile)


def _restored(handover: Handover, preserved: I64, tags: U32, profile: Profile) -> Restored:
    assert handover.luo is not None
    flbs = {flb.name: flb for flb in handover.flbs if flb.count}
    foreign = [name for name in flbs if name != profile.iommu_record or not profile.liveupdate]
    iommu = handover.iommu if not foreign and profile.iommu_record in flbs else None
    if not foreign and flbs and iommu is None:
        raise Damaged(f"record {profile.iommu_record} cannot be read")
    out = Restored(
        liveupdate_num=handover.liveupdate_num,
        kexec_count=handover.metadata.kexec_count if handover.metadata else 0,
        sessions=[],
        iommu=iommu,
        preserved=preserved,
        foreign_iommu=foreign[0] if foreign else "",
    )
    owned: list[tuple[str, I64]] = []
    for session in handover.sessions:
        files = []
        for file in session.files:
            files.append(IncomingFile(file.token, file.compatible, file.data_pa))
            if file.memfd is not None:
                memfd = _memfd(file, tags)
                out.memfds[file.data_pa] = memfd
                owned.append((f"memfd token {file.token:#x} of session {session.name}", memfd.pfns))
            elif isinstance(file.record, IommufdRecord):
                out.iommufds[file.data_pa] = file.record
            elif isinstance(file.record, VfioRecord):
                out.vfios[file.data_pa] = file.record
        out.sessions.append(IncomingSession(session.name, tuple(files)))
    if iommu is not None:
        for domain in iommu.domains:
            out.tables[domain.index] = pfns_of(np.unique(domain.table_pages))
            owned.append((f"tables of domain {domain.index}", out.tables[domain.index]))
        pages = [hw.structure_pages for hw in iommu.iommus]
        out.structures = pfns_of(np.unique(np.concatenate(pages))) if pages else out.structures
        owned.append(("IOMMU structures", out.structures))
    metadata = np.array(sorted(pa >> FRAME_SHIFT for pa in handover.pages), np.int64)
    owned.append(("records", np.intersect1d(metadata, preserved)))
    _check_owners(owned, preserved)
    if iommu is not None:
        _check_references(iommu, out)
    everything = np.concatenate([pfns for what, pfns in owned if what != "records"])
    out.other = np.setdiff1d(preserved, everything)
    return out


def _memfd(file: FileRecord, tags: U32) -> IncomingMemfd:
    memfd = file.memfd
    assert memfd is not None
    pages, frames = memfd.frames()
    pfns = frames.astype(np.int64)
    if len(pfns) and int(pfns.max()) >= len(tags):
        raise Damaged(f"memfd token {file.token:#x}: frame {int(pfns.max()):#x} is not in this memory")
    owners = np.unique(tags[pfns])
    if len(owners) > 1:
        raise Damaged(f"memfd token {file.token:#x}: its frames have {len(owners)} owners")
    tag = int(owners[0]) if len(owners) else 0
    return IncomingMemfd(file.token, memfd.pos, memfd.size, memfd.seals, pages.astype(np.int64), pfns, tag)


def _check_owners(owned: list[tuple[str, I64]], preserved: I64) -> None:
    """Every frame that a record names is preserved, and none has two owners."""
    for what, pfns in owned:
        lost = pfns[~np.isin(pfns, preserved)]
        if len(lost):
            raise Damaged(f"{what}: frame {int(lost[0]):#x} is not preserved ({len(lost)} such frames)")
    every = np.concatenate([pfns for _, pfns in owned])
    values, counts = np.unique(every, return_counts=True)
    twice = values[counts > 1]
    if len(twice):
        pfn = int(twice[0])
        names = " and ".join(what for what, pfns in owned if pfn in pfns)
        raise Damaged(f"frame {pfn:#x} belongs to {names}")


def _check_references(iommu: IommuRecord, out: Restored) -> None:
    """What records say of each other must fit."""
    domains = {d.index for d in iommu.domains}
    devices = {(d.segment, d.bdf): d for d in iommu.devices}
    tokens: set[tuple[int, int]] = set()
    for record in out.iommufds.values():
        for hwpt in record.hwpts:
            if hwpt.domain_index not in domains:
                raise Damaged(
                    f"HWPT token {hwpt.token:#x} refers to domain {hwpt.domain_index}, which is not there"
                )
            tokens.add((id(record), hwpt.domain_index))
    if len({index for _, index in tokens}) != len(tokens):
        raise Damaged("two iommufds refer to the same domain")
    for vfio in out.vfios.values():
        device = devices.get((vfio.segment, vfio.bdf))
        if device is None or device.index != vfio.device_index:
            raise Damaged(f"device {vfio.bdf:#x} is not in the IOMMU record")


def domain_fault(record: DomainRecord, top_level: int) -> str:
    """Why a domain's record cannot be used although its digest is right, or "".

    :param top_level: of the format in the recorded configuration.
    """
    if not len(record.table_pages) or not bool((record.table_pages == np.uint64(record.root_pa)).any()):
        return f"root {record.root_pa:#x} is not among its {record.n_table_pages} table pages"
    if record.top_level != top_level:
        return f"top level {record.top_level}, the format has {top_level}"
    return ""


@dataclass(frozen=True, slots=True)
class Owned:
    """Frames that have an owner tag: what the *held* way keeps."""

    pfns: I64

    @classmethod
    def of(cls, tags: U32) -> Owned:
        """Every frame beyond the firmware's that anybody owned."""
        pfns = np.flatnonzero(tags != 0).astype(np.int64)
        return cls(pfns[pfns >= FIRMWARE_FRAMES])
