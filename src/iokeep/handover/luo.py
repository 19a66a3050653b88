# SPDX-License-Identifier: Apache-2.0
"""The live update orchestrator's records: sessions, their files, FLBs (``include/linux/kho/abi/luo.h``)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from iokeep.errors import InputError, MemoryAbsent
from iokeep.handover import abi
from iokeep.handover.blocks import read_blocks
from iokeep.handover.iommu import FILE_RECORDS, IommufdRecord, VfioRecord
from iokeep.handover.memfd import Memfd, read_memfd
from iokeep.handover.radix import PreservedTree
from iokeep.handover.records import record_pages
from iokeep.handover.trail import Trail
from iokeep.mem.memory import U64
from iokeep.uapi import kho

PANIC = "the next kernel panics at boot (luo_restore_fail)"
EIO = "the next kernel's /dev/liveupdate fails with EIO for good"


@dataclass(frozen=True, slots=True)
class File:
    """A preserved file: user's ``token``, handler's ``compatible``, ``data_pa`` = the u64 that the handler
    stored.

    ``kind``: "memfd", "iommufd", "vfio-pci" or "unknown". ``memfd``: for memfd-v2; ``record``: for iokeep's
    own.
    """

    token: int
    compatible: str
    kind: str
    data_pa: int
    memfd: Memfd | None = None
    record: IommufdRecord | VfioRecord | None = None

    def extents(self) -> tuple[U64, U64, U64]:
        """(index, pfn, count) of a memfd, empty for other files; see :meth:`Memfd.extents`."""
        if self.memfd is None:
            empty = np.zeros(0, np.uint64)
            return empty, empty, empty
        return self.memfd.extents()


@dataclass(frozen=True, slots=True)
class Session:
    """A session and its files, in the order of their preservation."""

    name: str
    files: tuple[File, ...] = ()


@dataclass(frozen=True, slots=True)
class Flb:
    """File-lifecycle-bound data: ``count`` files use it; ``data`` is the owner's u64."""

    name: str
    data: int
    count: int


@dataclass(frozen=True, slots=True)
class Luo:
    """LUO's root record. ``supported``: its version is the one that this reader decodes;
    where not, nothing else is.
    """

    pa: int
    compatible: str
    supported: bool
    liveupdate_num: int = 0
    sessions: tuple[Session, ...] = ()
    flbs: tuple[Flb, ...] = field(default_factory=tuple)


def fixed_text(raw: bytes, room: int) -> tuple[str, bool]:
    """A char[room] member: its text, and whether it is a proper C string (ended, printable UTF-8)."""
    # NumPy strips trailing NULs of "S" members, so a text of full length has no terminator
    head, nul, _ = raw.partition(b"\0")
    text = head.decode("utf-8", "backslashreplace")
    proper = len(head) < room and "\\x" not in text and text.isprintable() and not nul
    return text, proper


def read_luo(trail: Trail, pa: int, blob_size: int, tree: PreservedTree) -> Luo | None:
    """LUO's records from ``luo_ser`` at ``pa`` on; None, and a problem, where none can be.

    :param blob_size: ``blob-size`` of the FDT node, bytes.
    :raises MemoryAbsent: a page of the records is not in this source.
    """
    if blob_size < abi.luo_ser.itemsize:
        trail.problem(f"LUO blob at {pa:#x} has {blob_size} bytes, luo_ser {abi.luo_ser.itemsize}: {PANIC}")
        return None
    if not trail.claim(pa, "luo_ser"):
        return None
    head = np.frombuffer(trail.page(pa), abi.luo_ser, 1)[0]
    compatible, _ = fixed_text(bytes(head["compatible"]), 9)
    if compatible != kho.LUO_ABI_COMPATIBLE:
        trail.problem(
            f"luo_ser at {pa:#x} is {compatible!r}, supported is {kho.LUO_ABI_COMPATIBLE!r}: not decoded; "
            f"{PANIC}"
        )
        return Luo(pa, compatible, False)
    sessions = _sessions(trail, int(head["sessions_pa"]), tree)
    flbs = _flbs(trail, int(head["flbs_pa"]))
    return Luo(pa, compatible, True, int(head["liveupdate_num"]), sessions, flbs)


def _sessions(trail: Trail, first_pa: int, tree: PreservedTree) -> tuple[Session, ...]:
    sessions = []
    seen: set[str] = set()
    for row in read_blocks(trail, first_pa, abi.luo_session_ser, "sessions", PANIC):
        name, proper = fixed_text(bytes(row["name"]), 64)
        what = f"session {name!r}"
        if not name or not proper:
            trail.problem(f"{what}: name[64] is not a terminated text of 1 ... 63 bytes")
        if name in seen:
            trail.problem(f"{what} is there twice: {EIO}")
        seen.add(name)
        sessions.append(Session(name, _files(trail, row["file_set_ser"], tree, what)))
    return tuple(sessions)


def _files(trail: Trail, file_set: np.void, tree: PreservedTree, what: str) -> tuple[File, ...]:
    first_pa, count = int(file_set["files"]), int(file_set["count"])
    rows = read_blocks(trail, first_pa, abi.luo_file_ser, f"{what} files", EIO)
    if len(rows) != count:
        trail.problem(
            f"{what}: file_set_ser.count is {count}, its blocks at {first_pa:#x} hold {len(rows)}: {EIO}"
        )
    files = []
    tokens: set[int] = set()
    for row in rows:
        token = int(row["token"])
        if token in tokens:
            trail.problem(f"{what}: token {token:#x} is there twice: {EIO}")
        tokens.add(token)
        files.append(_file(trail, row, tree, f"{what} token {token:#x}"))
    return tuple(files)


def _file(trail: Trail, row: np.void, tree: PreservedTree, what: str) -> File:
    compatible, _ = fixed_text(bytes(row["compatible"]), 48)
    token, data = int(row["token"]), int(row["data"])
    if compatible == kho.MEMFD_LUO_FH_COMPATIBLE:
        return File(token, compatible, "memfd", data, memfd=read_memfd(trail, data, tree, what))
    if compatible in FILE_RECORDS:
        kind, read = FILE_RECORDS[compatible]
        if not claim_record(trail, data, f"{what} {kind} record"):
            return File(token, compatible, kind, data)
        try:
            return File(token, compatible, kind, data, record=read(trail.mem, data))
        except MemoryAbsent:
            raise
        except InputError as error:
            trail.problem(f"{what}: {error.what}")
            return File(token, compatible, kind, data)
    return File(token, compatible, "unknown", data)


def claim_record(trail: Trail, pa: int, what: str) -> bool:
    """Claim every page of one of iokeep's records, whose length is believed only as far as memory reaches."""
    if not trail.claim(pa, what):
        return False
    try:
        pages = record_pages(trail.mem, pa)
    except MemoryAbsent:
        raise
    except InputError as error:
        trail.problem(f"{what}: {error.what}")
        return False
    return all(trail.claim(pa + number * abi.PAGE_SIZE, what) for number in range(1, pages))


def _flbs(trail: Trail, pa: int) -> tuple[Flb, ...]:
    if not pa or not trail.claim(pa, "FLB page"):
        return ()
    page = trail.page(pa)
    header = np.frombuffer(page, abi.luo_flb_header_ser, 1)[0]
    count = int(header["count"])
    if int(header["pgcnt"]) != 1:
        trail.problem(f"FLB page {pa:#x} has pgcnt {int(header['pgcnt'])}, must be 1")
    if count > abi.FLBS_PER_PAGE:
        trail.problem(f"FLB page {pa:#x} has count {count}, at most {abi.FLBS_PER_PAGE} fit")
        count = 0
    flbs: list[Flb] = []
    for row in np.frombuffer(page, abi.luo_flb_ser, count, abi.luo_flb_header_ser.itemsize):
        name, proper = fixed_text(bytes(row["name"]), 48)
        if not name or not proper:
            trail.problem(f"FLB page {pa:#x}: name {name!r} is not a terminated text of 1 ... 47 bytes")
        if any(name == flb.name for flb in flbs):
            trail.problem(f"FLB page {pa:#x}: {name!r} is there twice")
        flbs.append(Flb(name, int(row["data"]), int(row["count"])))
    return tuple(flbs)
