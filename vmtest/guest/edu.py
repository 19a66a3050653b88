# SPDX-License-Identifier: Apache-2.0
"""QEMU's ``edu`` device on vfio-pci: find it, bind it, make it do DMA (docs/specs/edu.rst of QEMU)."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path

import numpy as np

from iokeep.iommufd.client import VfioDevice
from iokeep.iommufd.pci import cdev_of, set_driver
from iokeep.uapi.kernel import KernelTransport

ADDRESSES = ("0000:00:10.0", "0000:00:11.0")
#: in one go; its buffer has 4096, but QEMU's check of a transfer of all of them is off by one
_MOST = 2048
_ID = struct.pack("<HH", 0x1234, 0x11E8)
_SRC, _DST, _COUNT, _COMMAND, _BUFFER = 0x80, 0x88, 0x90, 0x98, 0x40000
_RUN, _TO_MEMORY = 1, 2
# include/uapi/linux/vfio.h, include/uapi/linux/pci_regs.h
_CONFIG_REGION = 7
_PCI_COMMAND, _PCI_COMMAND_MASTER = 4, 4


def bind() -> None:
    """Both devices to vfio-pci, for programs that take any VFIO device."""
    for bdf in ADDRESSES:
        assert (Path("/sys/bus/pci/devices") / bdf / "config").read_bytes()[:4] == _ID, f"{bdf} is no edu"
        set_driver(bdf, "vfio-pci")


class Edu:
    """One ``edu``. ``file``: its VFIO device, which :meth:`start` expects to be bound.

    :param fd: the device's descriptor, owned from here on; None opens its VFIO node.
    """

    def __init__(self, bdf: str, fd: int | None = None) -> None:
        self.bdf = bdf
        bind()
        node = cdev_of(bdf) if fd is None else fd
        assert node is not None
        self.file = VfioDevice(KernelTransport(), node)

    def start(self) -> None:
        """Bus mastering on, BAR mapped."""
        self.master(True)
        self._bar = self.file.map_region(0)

    def master(self, on: bool | None = None) -> bool:
        """Set, or with None ask, whether it may do DMA at all."""
        at = self.file.region_info(_CONFIG_REGION).offset + _PCI_COMMAND
        (command,) = struct.unpack("<H", os.pread(self.file.fd, 2, at))
        if on is not None:
            command = command | _PCI_COMMAND_MASTER if on else command & ~_PCI_COMMAND_MASTER
            os.pwrite(self.file.fd, struct.pack("<H", command), at)
        return bool(command & _PCI_COMMAND_MASTER)

    def _write(self, register: int, value: int) -> None:
        self._bar.scatter64(np.array([register], np.uint64), np.array([value], np.uint64))

    def _read(self, register: int) -> int:
        return int(self._bar.gather64(np.array([register], np.uint64))[0])

    def _dma(self, source: int, target: int, count: int, command: int) -> None:
        self._write(_SRC, source)
        self._write(_DST, target)
        self._write(_COUNT, count)
        self._write(_COMMAND, command | _RUN)
        end = time.monotonic() + 20
        while self._read(_COMMAND) & _RUN:
            assert time.monotonic() < end, "DMA does not end"
            time.sleep(0.01)

    def copy(self, source: int, target: int, count: int) -> None:
        """Read ``count`` bytes from one iova and write them to another, piece by piece; 0.1 s for each
        move.
        """
        for at in range(0, count, _MOST):
            size = min(_MOST, count - at)
            self._dma(source + at, _BUFFER, size, 0)
            self._dma(_BUFFER, target + at, size, _TO_MEMORY)
