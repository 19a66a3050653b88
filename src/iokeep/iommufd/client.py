# SPDX-License-Identifier: Apache-2.0
"""/dev/iommu and VFIO devices: IOAS, HWPT, device, and the proposed live-update calls, on any transport.

Ranges are closed, [start, last]; iova, hva, start and length are bytes. An object here owns its descriptor,
which close() or the end of a with block gives back; ids of kernel objects are plain ints.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from iokeep.uapi import iommufd as uapi
from iokeep.uapi import proposal, vfio
from iokeep.uapi.copy_struct import end_of
from iokeep.uapi.errnos import IoctlRefused, checked_ioctl, open_node
from iokeep.uapi.owner import FdOwner
from iokeep.uapi.transport import Mapping, Transport

# include/linux/iommu.h: IOMMU_READ and IOMMU_WRITE, what a device may do.
READ = 1
WRITE = 2

_U64_MAX = (1 << 64) - 1
_MAX_RANGES = 1 << 20
_MAX_MISMATCHES = 1 << 16
_MAX_DIRTY_PAGES = 1 << 28


class IommufdError(IoctlRefused):
    """A call on /dev/iommu or on a VFIO device was refused; see :class:`iokeep.uapi.errnos.IoctlRefused`."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One range [iova, last] where tables are not what is expected; None where there is nothing.

    :param expected_pa, found_pa: pa of the first byte.
    :param expected_prot, found_prot: READ | WRITE.
    :param reason: missing, extra, pa, prot, reserved, loop, root, absent, attrs, contig or digest.
    :param level: table level, 0 = leaf; None when it is not at one level.
    """

    iova: int
    last: int
    expected_pa: int | None
    expected_prot: int | None
    found_pa: int | None
    found_prot: int | None
    reason: str
    level: int | None

    def __str__(self) -> str:
        def side(pa: int | None, prot: int | None) -> str:
            if pa is None:
                return "nothing"
            return f"pa {pa:#x} {'r' if (prot or 0) & READ else '-'}{'w' if (prot or 0) & WRITE else '-'}"

        if self.reason == "digest":
            return "digest: the areas are not those whose translations were sealed"
        if self.reason == "span":
            return (
                f"iova {self.iova:#x}-{self.last:#x}: span: one leaf crosses the edge of an area: "
                "map the areas as they were mapped before the kexec, or rebuild"
            )
        where = "" if self.level is None else f" at level {self.level}"
        if self.expected_pa is None and self.found_pa is None:
            return f"iova {self.iova:#x}-{self.last:#x}: {self.reason}{where}"
        expected = side(self.expected_pa, self.expected_prot)
        found = side(self.found_pa, self.found_prot)
        return f"iova {self.iova:#x}-{self.last:#x}: {self.reason}{where}: expected {expected}, found {found}"


class NotEqual(IommufdError):
    """A validation or comparison ran and found differences; nothing was changed.

    :param mismatches: the first of them, in IOVA order.
    :param total: how many ranges differ, at least as many as are listed.
    """

    exit_code = 1
    kind = "not-equal"

    def __init__(
        self,
        operation: str,
        number: int,
        objects: dict[str, object],
        mismatches: Sequence[Mismatch],
        total: int,
    ) -> None:
        first = f"; the first: {mismatches[0]}" if mismatches else ""
        super().__init__(operation, number, objects, f"{total} ranges are not as expected{first}")
        self.mismatches = list(mismatches)
        self.total = total


@dataclass(frozen=True, slots=True)
class AdoptResult:
    """A validated, and unless only validated also adopted, prior domain.

    :param hwpt_id: the HWPT that it is now; 0 when it was only validated.
    :param pages: 4 KiB pages proved; 0 for trust.
    :param table_bytes: bytes of tables read.
    :param validate_ns: CPU time of the proof in nanoseconds.
    :param layout_differences: ranges whose leaf sizes are not those that this kernel would choose.
    """

    hwpt_id: int
    pages: int
    table_bytes: int
    validate_ns: int
    layout_differences: int


@dataclass(frozen=True, slots=True)
class CompareResult:
    """An HWPT proved to translate exactly as a prior domain.

    :param pages: 4 KiB pages proved.
    :param table_bytes: bytes of tables read, both sides.
    :param compare_ns: CPU time of the proof in nanoseconds.
    :param layout_differences: ranges with other leaf sizes: a break-before-make matter, not a translation's.
    """

    pages: int
    table_bytes: int
    compare_ns: int
    layout_differences: int


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the proof of an adopted HWPT is.

    :param state: "validating" (something is unknown), "validated", or "quarantined" (all is known, and
        something is wrong).
    :param validated, unknown, quarantined: bytes of the IOAS's areas.
    :param table_bytes: bytes of tables read so far. :param validate_ns: CPU time of the proof so far.
    :param total: mismatches found; ``mismatches``: the first of them.
    """

    state: str
    validated: int
    unknown: int
    quarantined: int
    table_bytes: int
    validate_ns: int
    total: int
    mismatches: list[Mismatch]


_STATES = {
    proposal.IOMMU_LIVEUPDATE_VALIDATING: "validating",
    proposal.IOMMU_LIVEUPDATE_VALIDATED: "validated",
    proposal.IOMMU_LIVEUPDATE_QUARANTINED: "quarantined",
}


@dataclass(frozen=True, slots=True)
class PriorHwpt:
    """One prior domain that a retrieved iommufd holds.

    :param token: its HWPT token from before the kexec.
    :param reclaimed: whether it is adopted or given up.
    :param digest_lo: first 8 bytes, little-endian, of the recorded digest of its translations.
    :param mapped_bytes: bytes that it maps.
    """

    token: int
    reclaimed: bool
    digest_lo: int
    mapped_bytes: int


@dataclass(frozen=True, slots=True)
class HwInfo:
    """What the IOMMU of a device says of itself.

    :param data_type: IOMMU_HW_INFO_TYPE_*.
    :param data: the structure of that type, raw.
    :param capabilities: IOMMU_HW_CAP_*.
    :param max_pasid_lg2: width of PASIDs in bits; 0: none.
    """

    data_type: int
    data: bytes
    capabilities: int
    max_pasid_lg2: int


def _mismatches(rows: Sequence[proposal.iommu_liveupdate_mismatch]) -> list[Mismatch]:
    def pa(value: int) -> int | None:
        return None if value == proposal.IOMMU_MISMATCH_NO_PA else value

    def prot(beside: int, value: int) -> int | None:
        return None if pa(beside) is None and not value else value

    return [
        Mismatch(
            row.iova,
            row.last,
            pa(row.expected_pa),
            prot(row.expected_pa, row.expected_prot),
            pa(row.found_pa),
            prot(row.found_pa, row.found_prot),
            proposal.MISMATCH_REASONS.get(row.reason, f"reason {row.reason}"),
            None if row.level == proposal.IOMMU_MISMATCH_NO_LEVEL else row.level,
        )
        for row in rows
    ]


def _map_flags(prot: int, iova: int | None) -> int:
    if not 0 <= prot <= READ | WRITE:
        raise ValueError(f"prot {prot:#x} is not made of READ (1) and WRITE (2)")
    flags = 0 if iova is None else uapi.IOMMU_IOAS_MAP_FIXED_IOVA
    if prot & READ:
        flags |= uapi.IOMMU_IOAS_MAP_READABLE
    if prot & WRITE:
        flags |= uapi.IOMMU_IOAS_MAP_WRITEABLE
    return flags


def _u64(value: int, what: str) -> int:
    """ctypes would cut a value that does not fit."""
    if not 0 <= value <= _U64_MAX:
        raise ValueError(f"{what} {value:#x} is not in [0, 2^64 - 1]")
    return value


def _pasid(value: int | None) -> None:
    """ctypes would cut it; how many bits a device has is the kernel's to say."""
    if value is not None and not 0 <= value < 1 << 32:
        raise ValueError(f"PASID {value:#x} is not in [0, 2^32 - 1]")


def _at(iova: int | None) -> str:
    return "any" if iova is None else f"{iova:#x}"


class Iommufd(FdOwner):
    """One iommufd. Its objects live on after ``close`` while devices hold them.

    :param fd: an open descriptor, owned from here on; None opens /dev/iommu.
    :raises CapabilityError: the device node is missing or forbidden.
    """

    def __init__(self, transport: Transport, fd: int | None = None) -> None:
        super().__init__(transport, open_node(transport, "/dev/iommu", IommufdError) if fd is None else fd)

    def _ioctl(self, operation: str, request: int, arg: ctypes.Structure, **objects: object) -> int:
        return checked_ioctl(self.transport, self.fd, operation, request, arg, objects, IommufdError)

    def ioas_alloc(self) -> Ioas:
        """A new, empty IOAS."""
        arg = uapi.iommu_ioas_alloc(size=ctypes.sizeof(uapi.iommu_ioas_alloc))
        self._ioctl("IOMMU_IOAS_ALLOC", uapi.IOMMU_IOAS_ALLOC, arg, iommufd=self.fd)
        return Ioas(self, arg.out_ioas_id)

    def ioas(self, ioas_id: int) -> Ioas:
        """An IOAS of this iommufd by its id, which is not checked."""
        return Ioas(self, ioas_id)

    def destroy(self, object_id: int) -> None:
        """Destroy an object by its id; EBUSY while something uses it."""
        arg = uapi.iommu_destroy(size=ctypes.sizeof(uapi.iommu_destroy), id=object_id)
        self._ioctl("IOMMU_DESTROY", uapi.IOMMU_DESTROY, arg, iommufd=self.fd, object=object_id)

    def hwpt_alloc(
        self,
        dev_id: int,
        pt_id: int,
        flags: int = 0,
        *,
        data_type: int = uapi.IOMMU_HWPT_DATA_NONE,
        data: bytes = b"",
        fault_id: int = 0,
    ) -> int:
        """A new HWPT for a device on an IOAS (or a nesting parent HWPT, or a vIOMMU).

        :param flags: IOMMU_HWPT_ALLOC_* and IOMMU_HWPT_FAULT_ID_VALID.
        :param data: the structure of *data_type*.
        :returns: its id.
        """
        buffer = ctypes.create_string_buffer(data, len(data)) if data else None
        arg = uapi.iommu_hwpt_alloc(
            size=ctypes.sizeof(uapi.iommu_hwpt_alloc),
            flags=flags,
            dev_id=dev_id,
            pt_id=pt_id,
            data_type=data_type,
            data_len=len(data),
            data_uptr=0 if buffer is None else ctypes.addressof(buffer),
            fault_id=fault_id,
        )
        self._ioctl(
            "IOMMU_HWPT_ALLOC", uapi.IOMMU_HWPT_ALLOC, arg, device=dev_id, pt=pt_id, flags=f"{flags:#x}"
        )
        return int(arg.out_hwpt_id)

    def hw_info(self, dev_id: int) -> HwInfo:
        """What the IOMMU of a bound device says of itself."""
        buffer = ctypes.create_string_buffer(256)
        arg = uapi.iommu_hw_info(
            size=ctypes.sizeof(uapi.iommu_hw_info),
            dev_id=dev_id,
            data_len=len(buffer),
            data_uptr=ctypes.addressof(buffer),
        )
        self._ioctl("IOMMU_GET_HW_INFO", uapi.IOMMU_GET_HW_INFO, arg, device=dev_id)
        # data_len comes back as the length that the kernel has, which may be more than it wrote.
        data = buffer.raw[: min(arg.data_len, len(buffer))]
        return HwInfo(arg.out_data_type, data, arg.out_capabilities, arg.out_max_pasid_log2)

    def charge_by_process(self, value: bool | None = None) -> bool:
        """IOMMU_OPTION_RLIMIT_MODE: whether pinned pages count for the process and not for its user.

        :param value: sets it, before the iommufd has its first object; needs CAP_SYS_RESOURCE.
        :returns: the mode now.
        """
        arg = uapi.iommu_option(
            size=ctypes.sizeof(uapi.iommu_option),
            option_id=uapi.IOMMU_OPTION_RLIMIT_MODE,
            op=uapi.IOMMU_OPTION_OP_GET if value is None else uapi.IOMMU_OPTION_OP_SET,
            val64=int(bool(value)),
        )
        self._ioctl("IOMMU_OPTION", uapi.IOMMU_OPTION, arg, option="RLIMIT_MODE", value=value)
        return bool(arg.val64)

    def compat_ioas(self, ioas_id: int | None = None, *, clear: bool = False) -> int:
        """IOMMU_VFIO_IOAS: the IOAS that old VFIO containers use: ask for it, set it, or clear it.

        :returns: its id; 0 after a clear. :raises IommufdError: ENODEV: there is none.
        """
        op = uapi.IOMMU_VFIO_IOAS_GET if ioas_id is None else uapi.IOMMU_VFIO_IOAS_SET
        op = uapi.IOMMU_VFIO_IOAS_CLEAR if clear else op
        arg = uapi.iommu_vfio_ioas(size=ctypes.sizeof(uapi.iommu_vfio_ioas), ioas_id=ioas_id or 0, op=op)
        self._ioctl("IOMMU_VFIO_IOAS", uapi.IOMMU_VFIO_IOAS, arg, op=op, ioas=ioas_id)
        return 0 if clear else int(arg.ioas_id)

    def set_dirty_tracking(self, hwpt_id: int, enable: bool) -> None:
        """Let the IOMMU note in the table which pages devices write, or stop that."""
        arg = uapi.iommu_hwpt_set_dirty_tracking(
            size=ctypes.sizeof(uapi.iommu_hwpt_set_dirty_tracking),
            flags=uapi.IOMMU_HWPT_DIRTY_TRACKING_ENABLE if enable else 0,
            hwpt_id=hwpt_id,
        )
        name = "IOMMU_HWPT_SET_DIRTY_TRACKING"
        self._ioctl(name, uapi.IOMMU_HWPT_SET_DIRTY_TRACKING, arg, hwpt=hwpt_id, enable=enable)

    def dirty_bitmap(
        self, hwpt_id: int, iova: int, length: int, page_size: int = 4096, *, clear: bool = True
    ) -> bytes:
        """Which pages of [iova, iova + length - 1] devices have written since they were last asked for.

        :param length: bytes, a multiple of *page_size*, at most 1 TiB of 4 KiB pages.
        :param clear: forget them.
        :returns: a bit for each page, the first page in bit 0 of the first byte.
        """
        if page_size <= 0 or page_size & (page_size - 1) or length <= 0 or length % page_size:
            raise ValueError(f"{length:#x} bytes are not pages of {page_size:#x}")
        pages = length // page_size
        if pages > _MAX_DIRTY_PAGES:
            raise ValueError(f"{pages} pages in one bitmap, more than {_MAX_DIRTY_PAGES}")
        bitmap = (ctypes.c_uint64 * (-(-pages // 64)))()
        arg = uapi.iommu_hwpt_get_dirty_bitmap(
            size=ctypes.sizeof(uapi.iommu_hwpt_get_dirty_bitmap),
            hwpt_id=hwpt_id,
            flags=0 if clear else uapi.IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR,
            iova=_u64(iova, "iova"),
            length=_u64(length, "length"),
            page_size=page_size,
            data=ctypes.addressof(bitmap),
        )
        name = "IOMMU_HWPT_GET_DIRTY_BITMAP"
        about: dict[str, object] = {"hwpt": hwpt_id, "iova": f"{iova:#x}", "length": f"{length:#x}"}
        self._ioctl(name, uapi.IOMMU_HWPT_GET_DIRTY_BITMAP, arg, **about)
        return bytes(bitmap)[: -(-pages // 8)]

    def noiommu_pa(self, ioas_id: int, iova: int, length: int) -> tuple[int, int]:
        """Where an IOAS without an IOMMU has its pages: (pa, bytes that are contiguous from there).

        Needs CAP_SYS_RAWIO; EOPNOTSUPP behind an IOMMU, and on a kernel without CONFIG_VFIO_NOIOMMU.
        """
        arg = uapi.iommu_ioas_noiommu_get_pa(
            size=ctypes.sizeof(uapi.iommu_ioas_noiommu_get_pa),
            ioas_id=ioas_id,
            iova=_u64(iova, "iova"),
            length=_u64(length, "length"),
        )
        name = "IOMMU_IOAS_NOIOMMU_GET_PA"
        self._ioctl(name, uapi.IOMMU_IOAS_NOIOMMU_GET_PA, arg, ioas=ioas_id, iova=f"{iova:#x}")
        return int(arg.out_phys), int(arg.length)

    def change_process(self) -> None:
        """Account all pinned pages to this process (after a change of the VMM's binary)."""
        arg = uapi.iommu_ioas_change_process(size=ctypes.sizeof(uapi.iommu_ioas_change_process))
        self._ioctl("IOMMU_IOAS_CHANGE_PROCESS", uapi.IOMMU_IOAS_CHANGE_PROCESS, arg, iommufd=self.fd)

    def mark_preserve(self, hwpt_id: int, token: int) -> None:
        """Mark an HWPT to be preserved with this iommufd; *token* names it after the kexec."""
        arg = proposal.iommu_hwpt_liveupdate_mark_preserve(
            size=ctypes.sizeof(proposal.iommu_hwpt_liveupdate_mark_preserve),
            hwpt_id=hwpt_id,
            hwpt_token=_u64(token, "token"),
        )
        request = proposal.IOMMU_HWPT_LIVEUPDATE_MARK_PRESERVE
        name = "IOMMU_HWPT_LIVEUPDATE_MARK_PRESERVE"
        self._ioctl(name, request, arg, hwpt=hwpt_id, token=f"{token:#x}")

    def adopt(
        self,
        ioas_id: int,
        token: int,
        *,
        validate_only: bool = False,
        trust: bool = False,
        deferred: bool = False,
        sealed: bool = False,
        capacity: int = 16,
    ) -> AdoptResult:
        """Prove that a prior domain holds exactly what an IOAS says, and make it an HWPT of that IOAS.

        :param token: the HWPT token from before the kexec.
        :param validate_only: prove, change nothing.
        :param trust: adopt unseen; EPERM unless the kernel was booted to allow it.
        :param deferred: adopt at once; each range is proved before its first use, the rest by and by
            (:meth:`progress`).
        :param sealed: as ``deferred``, after the digest of the record was found to be that of the IOAS.
        :param capacity: how many mismatches to fetch, at most 65536.
        :raises NotEqual: the tables are something else; nothing was changed.
        :raises IommufdError: another refusal.
        """
        found = self._room(capacity)
        flags = proposal.IOMMU_LIVEUPDATE_ADOPT_VALIDATE_ONLY if validate_only else 0
        flags |= proposal.IOMMU_LIVEUPDATE_ADOPT_TRUST if trust else 0
        flags |= proposal.IOMMU_LIVEUPDATE_ADOPT_DEFERRED if deferred else 0
        flags |= proposal.IOMMU_LIVEUPDATE_ADOPT_SEALED if sealed else 0
        arg = proposal.iommu_hwpt_liveupdate_adopt(
            size=ctypes.sizeof(proposal.iommu_hwpt_liveupdate_adopt),
            flags=flags,
            ioas_id=ioas_id,
            hwpt_token=_u64(token, "token"),
            mismatch_capacity=capacity,
            mismatch_uptr=ctypes.addressof(found) if capacity else 0,
        )
        objects: dict[str, object] = {"ioas": ioas_id, "token": f"{token:#x}", "flags": f"{flags:#x}"}
        name = "IOMMU_HWPT_LIVEUPDATE_ADOPT"
        try:
            self._ioctl(name, proposal.IOMMU_HWPT_LIVEUPDATE_ADOPT, arg, **objects)
        except IommufdError as error:
            self._not_equal(error, arg.out_mismatches, found)
            raise
        return AdoptResult(
            arg.out_hwpt_id,
            arg.out_pages,
            arg.out_table_bytes,
            arg.out_validate_ns,
            arg.out_layout_differences,
        )

    def compare(self, hwpt_id: int, token: int, capacity: int = 16) -> CompareResult:
        """Prove that an HWPT translates exactly as a prior domain; then it may replace that under devices.

        :param capacity: how many mismatches to fetch, at most 65536.
        :raises NotEqual: they differ.
        :raises IommufdError: another refusal.
        """
        found = self._room(capacity)
        arg = proposal.iommu_hwpt_liveupdate_compare(
            size=ctypes.sizeof(proposal.iommu_hwpt_liveupdate_compare),
            hwpt_id=hwpt_id,
            hwpt_token=_u64(token, "token"),
            mismatch_capacity=capacity,
            mismatch_uptr=ctypes.addressof(found) if capacity else 0,
        )
        name = "IOMMU_HWPT_LIVEUPDATE_COMPARE"
        try:
            self._ioctl(name, proposal.IOMMU_HWPT_LIVEUPDATE_COMPARE, arg, hwpt=hwpt_id, token=f"{token:#x}")
        except IommufdError as error:
            self._not_equal(error, arg.out_mismatches, found)
            raise
        return CompareResult(
            arg.out_pages, arg.out_table_bytes, arg.out_compare_ns, arg.out_layout_differences
        )

    @staticmethod
    def _room(capacity: int) -> ctypes.Array[proposal.iommu_liveupdate_mismatch]:
        if not 0 <= capacity <= _MAX_MISMATCHES:
            raise ValueError(f"capacity {capacity} is not in [0, {_MAX_MISMATCHES}]")
        return (proposal.iommu_liveupdate_mismatch * capacity)()

    @staticmethod
    def _not_equal(
        error: IommufdError, total: int, found: ctypes.Array[proposal.iommu_liveupdate_mismatch]
    ) -> None:
        """Raise NotEqual when the refusal was the verdict of a validation."""
        if error.errno != errno.EINVAL or not total:
            return
        mismatches = _mismatches(found[: min(total, len(found))])
        raise NotEqual(error.operation, error.errno, error.objects, mismatches, total) from error

    def progress(self, hwpt_id: int, *, sweep: bool = False, capacity: int = 16) -> Progress:
        """How far the proof of an HWPT is that was adopted deferred or sealed.

        :param sweep: prove what is left first; may take as long as a validation does.
        :param capacity: how many mismatches to fetch, at most 65536.
        """
        found = self._room(capacity)
        arg = proposal.iommu_hwpt_liveupdate_progress(
            size=ctypes.sizeof(proposal.iommu_hwpt_liveupdate_progress),
            flags=proposal.IOMMU_LIVEUPDATE_PROGRESS_SWEEP if sweep else 0,
            hwpt_id=hwpt_id,
            mismatch_capacity=capacity,
            mismatch_uptr=ctypes.addressof(found) if capacity else 0,
        )
        name = "IOMMU_HWPT_LIVEUPDATE_PROGRESS"
        self._ioctl(name, proposal.IOMMU_HWPT_LIVEUPDATE_PROGRESS, arg, hwpt=hwpt_id)
        return Progress(
            _STATES.get(arg.out_state, f"state {arg.out_state}"),
            arg.out_validated,
            arg.out_unknown,
            arg.out_quarantined,
            arg.out_table_bytes,
            arg.out_validate_ns,
            arg.out_mismatches,
            _mismatches(found[: min(arg.out_mismatches, len(found))]),
        )

    def liveupdate_info(self) -> list[PriorHwpt]:
        """The prior domains of a retrieved iommufd; empty on one that did not come over a kexec."""
        capacity = 64
        while True:
            rows = (proposal.iommu_liveupdate_hwpt * capacity)()
            arg = proposal.iommu_liveupdate_info(
                size=ctypes.sizeof(proposal.iommu_liveupdate_info),
                hwpt_capacity=capacity,
                hwpt_uptr=ctypes.addressof(rows),
            )
            name = "IOMMU_LIVEUPDATE_GET_INFO"
            self._ioctl(name, proposal.IOMMU_LIVEUPDATE_GET_INFO, arg, iommufd=self.fd)
            if arg.out_hwpts <= capacity:
                break
            if arg.out_hwpts > _MAX_RANGES:
                note = f"{arg.out_hwpts} prior domains are said to be there, more than {_MAX_RANGES}"
                raise IommufdError(name, errno.EMSGSIZE, {"iommufd": self.fd}, note)
            capacity = arg.out_hwpts
        return [
            PriorHwpt(
                row.token,
                bool(row.flags & proposal.IOMMU_LIVEUPDATE_HWPT_RECLAIMED),
                row.digest_lo,
                row.mapped_bytes,
            )
            for row in rows[: arg.out_hwpts]
        ]


class Ioas:
    """One IOAS of an iommufd, which owns it.

    :param ioas_id: its id there.
    """

    def __init__(self, iommufd: Iommufd, ioas_id: int) -> None:
        self.iommufd = iommufd
        self.id = ioas_id

    def _ioctl(self, operation: str, request: int, arg: ctypes.Structure, **objects: object) -> int:
        return self.iommufd._ioctl(operation, request, arg, ioas=self.id, **objects)

    def map_file(
        self, file_fd: int, start: int, length: int, iova: int | None = None, prot: int = READ | WRITE
    ) -> int:
        """Map a range of a file (a memfd, or a dma-buf of a device's BAR).

        :param start: first byte in the file.
        :param iova: where; None lets the kernel choose.
        :param prot: READ | WRITE, for devices.
        :returns: the iova.
        :raises IommufdError: with a meaning for each errno; nothing was mapped.
        """
        arg = uapi.iommu_ioas_map_file(
            size=ctypes.sizeof(uapi.iommu_ioas_map_file),
            flags=_map_flags(prot, iova),
            ioas_id=self.id,
            fd=file_fd,
            start=_u64(start, "start"),
            length=_u64(length, "length"),
            iova=_u64(iova or 0, "iova"),
        )
        self._ioctl(
            "IOMMU_IOAS_MAP_FILE",
            uapi.IOMMU_IOAS_MAP_FILE,
            arg,
            iova=_at(iova),
            length=f"{length:#x}",
            file=file_fd,
            start=f"{start:#x}",
        )
        return int(arg.iova)

    def map(self, hva: int, length: int, iova: int | None = None, prot: int = READ | WRITE) -> int:
        """Map user memory of this process; such an IOAS cannot be preserved (use map_file).

        :param hva: first user virtual address, as a transport's mmap() gives it.
        :returns: the iova.
        :raises IommufdError: nothing was mapped.
        """
        arg = uapi.iommu_ioas_map(
            size=ctypes.sizeof(uapi.iommu_ioas_map),
            flags=_map_flags(prot, iova),
            ioas_id=self.id,
            user_va=_u64(hva, "hva"),
            length=_u64(length, "length"),
            iova=_u64(iova or 0, "iova"),
        )
        self._ioctl(
            "IOMMU_IOAS_MAP",
            uapi.IOMMU_IOAS_MAP,
            arg,
            iova=_at(iova),
            length=f"{length:#x}",
            hva=f"{hva:#x}",
        )
        return int(arg.iova)

    def copy(
        self, source: Ioas, source_iova: int, length: int, iova: int | None = None, prot: int = READ | WRITE
    ) -> int:
        """Map here what another IOAS of this iommufd maps at [source_iova, source_iova + length - 1].

        :returns: the iova.
        """
        arg = uapi.iommu_ioas_copy(
            size=ctypes.sizeof(uapi.iommu_ioas_copy),
            flags=_map_flags(prot, iova),
            dst_ioas_id=self.id,
            src_ioas_id=source.id,
            length=_u64(length, "length"),
            dst_iova=_u64(iova or 0, "iova"),
            src_iova=_u64(source_iova, "source_iova"),
        )
        self._ioctl(
            "IOMMU_IOAS_COPY",
            uapi.IOMMU_IOAS_COPY,
            arg,
            iova=_at(iova),
            length=f"{length:#x}",
            source_ioas=source.id,
            source_iova=f"{source_iova:#x}",
        )
        return int(arg.dst_iova)

    def unmap(self, iova: int, length: int) -> int:
        """Unmap all whole areas in [iova, iova + length - 1].

        :returns: bytes unmapped.
        :raises IommufdError: ENOENT when nothing is there, or an area only in part; areas before that one are
            gone by then, and the kernel does not say how many bytes.
        """
        arg = uapi.iommu_ioas_unmap(
            size=ctypes.sizeof(uapi.iommu_ioas_unmap),
            ioas_id=self.id,
            iova=_u64(iova, "iova"),
            length=_u64(length, "length"),
        )
        self._ioctl("IOMMU_IOAS_UNMAP", uapi.IOMMU_IOAS_UNMAP, arg, iova=f"{iova:#x}", length=f"{length:#x}")
        return int(arg.length)

    def unmap_all(self) -> int:
        """Unmap everything; 0 when nothing was mapped. The number of bytes."""
        return self.unmap(0, _U64_MAX)

    def iova_ranges(self) -> list[tuple[int, int]]:
        """IOVAs that may be mapped, as [start, last], with what is attached now."""
        return self._ranges()[0]

    def iova_alignment(self) -> int:
        """Bytes that iova and length must be multiples of, with what is attached now."""
        return self._ranges()[1]

    def _ranges(self) -> tuple[list[tuple[int, int]], int]:
        capacity = 16
        while True:
            rows = (uapi.iommu_iova_range * capacity)()
            arg = uapi.iommu_ioas_iova_ranges(
                size=ctypes.sizeof(uapi.iommu_ioas_iova_ranges),
                ioas_id=self.id,
                num_iovas=capacity,
                allowed_iovas=ctypes.addressof(rows),
            )
            try:
                self._ioctl("IOMMU_IOAS_IOVA_RANGES", uapi.IOMMU_IOAS_IOVA_RANGES, arg)
            except IommufdError as error:
                # The kernel writes the number that it needs in spite of the error.
                if error.errno != errno.EMSGSIZE or not capacity < arg.num_iovas <= _MAX_RANGES:
                    raise
                capacity = arg.num_iovas
                continue
            count = min(arg.num_iovas, capacity)
            return [(row.start, row.last) for row in rows[:count]], int(arg.out_iova_alignment)

    def allow_iovas(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Promise to map only in these ranges, [start, last]: devices that reserve them are then refused."""
        wanted = list(ranges)
        rows = (uapi.iommu_iova_range * len(wanted))(*[uapi.iommu_iova_range(*pair) for pair in wanted])
        arg = uapi.iommu_ioas_allow_iovas(
            size=ctypes.sizeof(uapi.iommu_ioas_allow_iovas),
            ioas_id=self.id,
            num_iovas=len(wanted),
            allowed_iovas=ctypes.addressof(rows) if wanted else 0,
        )
        text = " ".join(f"{start:#x}-{last:#x}" for start, last in wanted[:4])
        self._ioctl("IOMMU_IOAS_ALLOW_IOVAS", uapi.IOMMU_IOAS_ALLOW_IOVAS, arg, ranges=text)

    def huge_pages(self, value: bool | None = None) -> bool:
        """IOMMU_OPTION_HUGE_PAGES: set it, or with None only ask; the value now."""
        op = uapi.IOMMU_OPTION_OP_GET if value is None else uapi.IOMMU_OPTION_OP_SET
        arg = uapi.iommu_option(
            size=ctypes.sizeof(uapi.iommu_option),
            option_id=uapi.IOMMU_OPTION_HUGE_PAGES,
            op=op,
            object_id=self.id,
            val64=int(bool(value)),
        )
        self._ioctl("IOMMU_OPTION", uapi.IOMMU_OPTION, arg, option="HUGE_PAGES", value=value)
        return bool(arg.val64)

    def destroy(self) -> None:
        """Destroy the IOAS; EBUSY while an HWPT is on it."""
        self.iommufd.destroy(self.id)


class VfioDevice(FdOwner):
    """One VFIO device file (cdev). Its last ``close`` detaches and resets the device.

    :param device: path of the node (/dev/vfio/devices/vfioN), or an open descriptor, owned from here on.
    :raises CapabilityError: the device node is missing or forbidden.
    """

    def __init__(self, transport: Transport, device: str | int) -> None:
        fd = open_node(transport, device, IommufdError) if isinstance(device, str) else device
        super().__init__(transport, fd)
        self.dev_id: int | None = None

    def _ioctl(self, operation: str, request: int, arg: ctypes.Structure, **objects: object) -> int:
        objects = {"vfio": self.fd, **objects}
        return checked_ioctl(self.transport, self.fd, operation, request, arg, objects, IommufdError)

    def bind(self, iommufd: Iommufd, token: bytes | None = None) -> int:
        """Bind to an iommufd, once per file.

        :param token: 16 bytes of the VF token (a UUID), for a virtual function.
        :returns: the device's id there, also in ``dev_id``.
        """
        if token is not None and len(token) != 16:
            raise ValueError(f"a VF token has 16 bytes, not {len(token)}")
        uuid = ctypes.create_string_buffer(token or b"", 16)
        arg = vfio.vfio_device_bind_iommufd(
            # Without a token the first version of the structure will do, on every kernel.
            argsz=end_of(vfio.vfio_device_bind_iommufd, "token_uuid_ptr" if token else "out_devid"),
            flags=vfio.VFIO_DEVICE_BIND_FLAG_TOKEN if token else 0,
            iommufd=iommufd.fd,
            token_uuid_ptr=ctypes.addressof(uuid) if token else 0,
        )
        self._ioctl("VFIO_DEVICE_BIND_IOMMUFD", vfio.VFIO_DEVICE_BIND_IOMMUFD, arg, iommufd=iommufd.fd)
        self.dev_id = int(arg.out_devid)
        return self.dev_id

    def attach(self, pt_id: int, pasid: int | None = None) -> int:
        """Attach to an HWPT, or to an IOAS (the kernel then finds or makes an HWPT); replaces the one before.

        :param pasid: only what the device does under this PASID; the HWPT, and the one that is attached
            without a PASID, must have been made with IOMMU_HWPT_ALLOC_PASID.
        :returns: the id of the HWPT.
        """
        _pasid(pasid)
        struct = vfio.vfio_device_attach_iommufd_pt
        arg = struct(
            argsz=end_of(struct, "pt_id" if pasid is None else "pasid"),
            flags=0 if pasid is None else vfio.VFIO_DEVICE_ATTACH_PASID,
            pt_id=pt_id,
            pasid=pasid or 0,
        )
        about: dict[str, object] = {"device": self.dev_id, "pt": pt_id}
        about |= {} if pasid is None else {"pasid": pasid}
        self._ioctl("VFIO_DEVICE_ATTACH_IOMMUFD_PT", vfio.VFIO_DEVICE_ATTACH_IOMMUFD_PT, arg, **about)
        return int(arg.pt_id)

    def detach(self, pasid: int | None = None) -> None:
        """Detach: the device's DMA (under a PASID) faults from here on; nothing where it is not attached."""
        _pasid(pasid)
        struct = vfio.vfio_device_detach_iommufd_pt
        arg = struct(
            argsz=end_of(struct, "flags" if pasid is None else "pasid"),
            flags=0 if pasid is None else vfio.VFIO_DEVICE_DETACH_PASID,
            pasid=pasid or 0,
        )
        name = "VFIO_DEVICE_DETACH_IOMMUFD_PT"
        self._ioctl(name, vfio.VFIO_DEVICE_DETACH_IOMMUFD_PT, arg, device=self.dev_id)

    def reset(self) -> None:
        """Reset the device's function; its DMA is over when this returns. EINVAL: it cannot be reset."""
        nothing = vfio.vfio_device_info()  # the call takes no argument
        self._ioctl("VFIO_DEVICE_RESET", vfio.VFIO_DEVICE_RESET, nothing, device=self.dev_id)

    def info(self) -> vfio.vfio_device_info:
        """VFIO_DEVICE_GET_INFO."""
        arg = vfio.vfio_device_info(argsz=end_of(vfio.vfio_device_info, "num_irqs"))
        self._ioctl("VFIO_DEVICE_GET_INFO", vfio.VFIO_DEVICE_GET_INFO, arg)
        return arg

    def region_info(self, index: int) -> vfio.vfio_region_info:
        """VFIO_DEVICE_GET_REGION_INFO; *index* as VFIO_PCI_BAR0_REGION_INDEX."""
        arg = vfio.vfio_region_info(argsz=ctypes.sizeof(vfio.vfio_region_info), index=index)
        self._ioctl("VFIO_DEVICE_GET_REGION_INFO", vfio.VFIO_DEVICE_GET_REGION_INFO, arg, region=index)
        return arg

    def map_region(self, index: int) -> Mapping:
        """Map a whole region (a BAR) into this process."""
        info = self.region_info(index)
        objects = {"vfio": self.fd, "region": index, "size": f"{info.size:#x}"}
        if not info.size or not info.flags & vfio.VFIO_REGION_INFO_FLAG_MMAP:
            note = "the region is empty or cannot be mapped"
            raise IommufdError("mmap", errno.EINVAL, objects, note)
        try:
            return self.transport.mmap(self.fd, info.size, info.offset)
        except ConnectionError:
            raise
        except OSError as cause:
            raise IommufdError("mmap", cause.errno or errno.EIO, objects) from cause
