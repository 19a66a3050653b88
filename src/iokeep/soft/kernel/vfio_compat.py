# SPDX-License-Identifier: Apache-2.0
"""VFIO's older interface on /dev/iommu: a container whose IOMMU is of type 1 (drivers/iommu/iommufd/
vfio_compat.c of Linux 7.3).

It has no ids: all of it acts on the compat IOAS, which IOMMU_VFIO_IOAS names. Structures are taken by VFIO's
rule: argsz below what the first version had is EINVAL, what lies behind the known fields is not looked at.
There are no groups on this host: VFIO_GROUP_* is ENOTTY, as every number here that is not in the table.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from iokeep.pt.extents import PROT_R, PROT_W
from iokeep.soft.kernel.files import Ioctl
from iokeep.soft.kernel.frames import FRAME_BYTES
from iokeep.soft.kernel.ioas import Ioas, unmap_last
from iokeep.soft.kernel.pages import ULONG_MAX
from iokeep.soft.kernel.syserror import SysError
from iokeep.uapi import vfio
from iokeep.uapi.copy_struct import end_of

if TYPE_CHECKING:
    from iokeep.soft.kernel.iommufd import Iommufd

_Struct = TypeVar("_Struct", bound=ctypes.Structure)

#: VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL: iommufd counts no mappings (U32_MAX)
_DMA_AVAIL = 2**32 - 1
_HEADER = vfio.vfio_info_cap_header


def _compat_ioas(ictx: Iommufd) -> Ioas:
    """get_compat_ioas."""
    if ictx.vfio_ioas is None:
        raise SysError(errno.ENODEV, "no compat IOAS: IOMMU_VFIO_IOAS names one")
    return ictx.vfio_ioas


def _number(call: Ioctl) -> int:
    """An argument that is a number and no pointer: the transport sends it in eight bytes."""
    return int.from_bytes(call.raw, "little") if len(call.raw) == 8 else ULONG_MAX


def _taken(call: Ioctl, struct: type[_Struct], last: str) -> tuple[_Struct, int]:
    """The structure up to its field ``last``, and how many bytes that are.

    :raises SysError: EFAULT, EINVAL.
    """
    least = end_of(struct, last)
    if len(call.raw) < least:
        raise SysError(errno.EFAULT, f"{struct.__name__}: {len(call.raw)} of {least} bytes are there")
    out = struct()
    ctypes.memmove(ctypes.addressof(out), call.raw, least)
    argsz = int.from_bytes(call.raw[:4], "little")
    if argsz < least:
        raise SysError(errno.EINVAL, f"{struct.__name__}: argsz {argsz} is below {least}")
    return out, least


def _api_version(ictx: Iommufd, call: Ioctl) -> int:
    return vfio.VFIO_API_VERSION


def _check_extension(ictx: Iommufd, call: Ioctl) -> int:
    """iommufd_vfio_check_extension."""
    kind = _number(call)
    if kind == vfio.VFIO_DMA_CC_IOMMU:
        return int(all(hwpt.domain.enforces_coherency for hwpt in _compat_ioas(ictx).hwpts))
    # VFIO_NOIOMMU_IOMMU: built in, as IOMMU_IOAS_NOIOMMU_GET_PA is
    known = (vfio.VFIO_TYPE1_IOMMU, vfio.VFIO_TYPE1v2_IOMMU, vfio.VFIO_UNMAP_ALL, vfio.VFIO_NOIOMMU_IOMMU)
    return int(kind in known)


def _set_iommu(ictx: Iommufd, call: Ioctl) -> int:
    """iommufd_vfio_set_iommu: type 1 of old can unmap parts of a mapping, so it gets no huge pages."""
    kind = _number(call)
    if kind not in (vfio.VFIO_TYPE1_IOMMU, vfio.VFIO_TYPE1v2_IOMMU):
        raise SysError(errno.EINVAL, f"an IOMMU of type {kind}: 1 and 3 are there")
    ioas = _compat_ioas(ictx)
    if kind == vfio.VFIO_TYPE1_IOMMU:
        ioas.set_huge_pages(False)
    return 0


def _map_dma(ictx: Iommufd, call: Ioctl) -> int:
    """iommufd_vfio_map_dma."""
    cmd, _ = _taken(call, vfio.vfio_iommu_type1_dma_map, "size")
    if cmd.flags & ~(vfio.VFIO_DMA_MAP_FLAG_READ | vfio.VFIO_DMA_MAP_FLAG_WRITE):
        raise SysError(errno.EINVAL, f"MAP_DMA flags {cmd.flags:#x}")
    prot = PROT_R if cmd.flags & vfio.VFIO_DMA_MAP_FLAG_READ else 0
    prot |= PROT_W if cmd.flags & vfio.VFIO_DMA_MAP_FLAG_WRITE else 0
    _compat_ioas(ictx).map_user(call.process, cmd.vaddr, cmd.size, cmd.iova, prot)
    return 0


def _unmap_dma(ictx: Iommufd, call: Ioctl) -> int:
    """iommufd_vfio_unmap_dma: what was unmapped is said also where that failed in its middle."""
    cmd, size = _taken(call, vfio.vfio_iommu_type1_dma_unmap, "size")
    if cmd.flags & ~vfio.VFIO_DMA_UNMAP_FLAG_ALL:
        raise SysError(errno.EINVAL, f"UNMAP_DMA flags {cmd.flags:#x}")
    ioas = _compat_ioas(ictx)
    first, last = cmd.iova, ULONG_MAX
    error: SysError | None = None
    if cmd.flags & vfio.VFIO_DMA_UNMAP_FLAG_ALL:
        if cmd.iova or cmd.size:
            raise SysError(errno.EINVAL, "UNMAP_DMA of all takes neither iova nor size")
    else:
        if ioas.disable_large_pages:
            ioas.cut((cmd.iova + cmd.size - 1) & ULONG_MAX)
            if cmd.iova:
                ioas.cut(cmd.iova - 1)
        try:
            last = unmap_last(cmd.iova, cmd.size)
        except SysError as refusal:
            error = refusal
    cmd.size = 0
    if error is None:
        cmd.size, error = ioas.unmap(first, last)
    call.respond(bytes(cmd)[:size])
    if error is not None:
        raise SysError(error.errno, error.why, respond=True)
    return 0


def _page_sizes(ioas: Ioas) -> int:
    """iommufd_get_pagesizes: bit n: leaves of 2**n bytes in every domain; those below a page count as a
    page.
    """
    sizes = ULONG_MAX
    for domain in ioas.domains:
        sizes &= domain.page_sizes
    if sizes & (FRAME_BYTES - 1):
        sizes = sizes & ~(FRAME_BYTES - 1) | FRAME_BYTES
    return max(sizes, ioas.iova_alignment)


class _Reply:
    """The caller's buffer of ``argsz`` bytes, which a chain of capabilities is written into."""

    def __init__(self, raw: bytes, argsz: int) -> None:
        self.bytes = bytearray(raw)
        self.argsz = argsz

    def store(self, at: int, data: bytes) -> None:
        """copy_to_user. :raises SysError: EFAULT: argsz says more than there is."""
        if at + len(data) > len(self.bytes):
            raise SysError(
                errno.EFAULT, f"GET_INFO: argsz {self.argsz}, but {len(self.bytes)} bytes are there"
            )
        self.bytes[at : at + len(data)] = data


def _cap_dma_avail(ioas: Ioas, reply: _Reply, at: int, room: int) -> int:
    cap = vfio.vfio_iommu_type1_info_dma_avail(
        header=_HEADER(id=vfio.VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, version=1), avail=_DMA_AVAIL
    )
    if room >= ctypes.sizeof(cap):
        reply.store(at, bytes(cap))
    return ctypes.sizeof(cap)


def _cap_iova_range(ioas: Ioas, reply: _Reply, at: int, room: int) -> int:
    """iommufd_fill_cap_iova: ranges as long as there is room, their number when all are in."""
    cap = vfio.vfio_iommu_type1_info_cap_iova_range(
        header=_HEADER(id=vfio.VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, version=1)
    )
    size = ctypes.sizeof(cap)
    for hole in ioas.holes():
        row = bytes(vfio.vfio_iova_range(start=hole.start, end=hole.last))
        if room >= size + len(row):
            reply.store(at + size, row)
        size += len(row)
        cap.nr_iovas += 1
    if room >= size:
        reply.store(at, bytes(cap))
    return size


def _get_info(ictx: Iommufd, call: Ioctl) -> int:
    """iommufd_vfio_iommu_get_info."""
    info, _ = _taken(call, vfio.vfio_iommu_type1_info, "iova_pgsizes")
    ioas = _compat_ioas(ictx)
    reply = _Reply(call.raw, info.argsz)
    total = size = ctypes.sizeof(info)
    before = 0
    for fill in (_cap_dma_avail, _cap_iova_range):
        used = -(-fill(ioas, reply, total, max(0, info.argsz - total)) // 8) * 8
        if before and info.argsz >= total:
            reply.store(before + end_of(_HEADER, "version"), total.to_bytes(4, "little"))  # its field next
        before, total = total, total + used
    taken = min(info.argsz, size)
    info.flags = vfio.VFIO_IOMMU_INFO_PGSIZES | vfio.VFIO_IOMMU_INFO_CAPS
    info.iova_pgsizes = _page_sizes(ioas)
    info.cap_offset = size if info.argsz >= total else 0
    info.argsz = total
    reply.store(0, bytes(info)[:taken])
    call.respond(reply.bytes)
    return 0


_HANDLERS: dict[int, Callable[[Iommufd, Ioctl], int]] = {
    vfio.VFIO_GET_API_VERSION: _api_version,
    vfio.VFIO_CHECK_EXTENSION: _check_extension,
    vfio.VFIO_SET_IOMMU: _set_iommu,
    vfio.VFIO_IOMMU_GET_INFO: _get_info,
    vfio.VFIO_IOMMU_MAP_DMA: _map_dma,
    vfio.VFIO_IOMMU_UNMAP_DMA: _unmap_dma,
}


def vfio_ioctl(ictx: Iommufd, call: Ioctl) -> int:
    """iommufd_vfio_ioctl: what the table of /dev/iommu itself does not know. :raises SysError: ENOTTY."""
    handler = _HANDLERS.get(call.request)
    if handler is None:
        raise SysError(errno.ENOTTY, f"/dev/iommu has no ioctl {call.request:#x}")
    return handler(ictx, call)
