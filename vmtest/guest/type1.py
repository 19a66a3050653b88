# SPDX-License-Identifier: Apache-2.0
"""VFIO's older interface, for kernels without iommufd: a container whose IOMMU is of type 1, and a group.

Sources: Documentation/driver-api/vfio.rst, include/uapi/linux/vfio.h, drivers/vfio/vfio_iommu_type1.c.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Self

from iokeep.uapi import vfio
from iokeep.uapi.kernel import KernelMapping, KernelTransport

_ROOM = 4096


class Container:
    """One container with one device in it: maps as :class:`iokeep.iommufd.client.Ioas` does. A context
    manager.

    :param address: PCI address of a device of vfio-pci, whose group it is alone in.
    """

    def __init__(self, address: str) -> None:
        self._kernel = KernelTransport()
        self._files: dict[int, KernelMapping] = {}
        group = (Path("/sys/bus/pci/devices") / address / "iommu_group").readlink().name
        self._fd = os.open("/dev/vfio/vfio", os.O_RDWR | os.O_CLOEXEC)
        self._group = os.open(f"/dev/vfio/{group}", os.O_RDWR | os.O_CLOEXEC)
        fcntl.ioctl(self._group, vfio.VFIO_GROUP_SET_CONTAINER, struct.pack("i", self._fd))
        fcntl.ioctl(self._fd, vfio.VFIO_SET_IOMMU, vfio.VFIO_TYPE1v2_IOMMU)
        #: descriptor of the device, whose owner is the caller
        name = bytearray(address.encode() + b"\0")
        self.device = fcntl.ioctl(self._group, vfio.VFIO_GROUP_GET_DEVICE_FD, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for fd in (self._group, self._fd):
            os.close(fd)

    def iova_ranges(self) -> list[tuple[int, int]]:
        """What may be mapped, closed ranges (start, last)."""
        raw = bytearray(_ROOM)
        struct.pack_into("I", raw, 0, _ROOM)
        fcntl.ioctl(self._fd, vfio.VFIO_IOMMU_GET_INFO, raw)
        at = vfio.vfio_iommu_type1_info.from_buffer_copy(raw).cap_offset
        while at:
            cap = vfio.vfio_iommu_type1_info_cap_iova_range.from_buffer_copy(raw, at)
            if cap.header.id == vfio.VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE:
                first = at + ctypes.sizeof(cap)
                words = struct.unpack_from(f"<{2 * cap.nr_iovas}Q", raw, first)
                return list(zip(words[::2], words[1::2], strict=True))
            at = cap.header.next
        raise LookupError("the container does not say which IOVAs it takes")

    def map(self, hva: int, length: int, *, iova: int, prot: int) -> None:
        """Map memory of this process; prot READ | WRITE, whose bits are those of the call."""
        arg = vfio.vfio_iommu_type1_dma_map(
            argsz=ctypes.sizeof(vfio.vfio_iommu_type1_dma_map),
            flags=prot, vaddr=hva, iova=iova, size=length,
        )  # fmt: skip
        fcntl.ioctl(self._fd, vfio.VFIO_IOMMU_MAP_DMA, arg)

    def map_file(self, fd: int, start: int, length: int, *, iova: int, prot: int) -> None:
        """Map a range of a file, by a mapping of all of it in this process, which stays."""
        if fd not in self._files:
            self._files[fd] = self._kernel.mmap(fd, os.fstat(fd).st_size)
        self.map(self._files[fd].hva + start, length, iova=iova, prot=prot)

    def unmap(self, iova: int, length: int) -> None:
        """Unmap whole areas."""
        arg = vfio.vfio_iommu_type1_dma_unmap(
            argsz=ctypes.sizeof(vfio.vfio_iommu_type1_dma_unmap), iova=iova, size=length
        )
        fcntl.ioctl(self._fd, vfio.VFIO_IOMMU_UNMAP_DMA, arg)
        if arg.size != length:
            raise OSError(f"unmapped {arg.size:#x} bytes from iova {iova:#x}, not {length:#x}")
