# SPDX-License-Identifier: Apache-2.0
"""The machine that stays when a kernel ends: memory, registers and the owner tags of frames, in three memfds.

Layout of the registers memfd, in pages of 4096 bytes: 0 the boot page, 1 the description of the platform, 2
the hidden state of the IOMMU, from 3 its registers, from 7 one page per IOMMU front-end, then the BARs.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from iokeep.errors import InputError
from iokeep.mem.memory import U64
from iokeep.mem.ram import Ram
from iokeep.soft.hardware import bar
from iokeep.soft.hardware.bar import ArrayWindow
from iokeep.soft.hardware.unit import BANK_PAGES, MAX_DEVICES, PAGE, HardwareLock, requester_id
from iokeep.soft.hardware.units import unit_class

U32 = NDArray[np.uint32]

PLATFORM_MAGIC = int.from_bytes(b"iokeepPF", "little")
PLATFORM_VERSION = 2
BOOT_PAGE, INFO_PAGE, HIDDEN_PAGE, BANK_PAGE = 0, 1, 2, 3
FRONT_END_PAGE = BANK_PAGE + BANK_PAGES
#: _IOMMU: the kind, up to 8 characters, the first in the lowest byte
_MAGIC, _VERSION, _RAM_BYTES, _N_DEVICES, _BAR_BYTES, _IOMMU = range(6)


class _Word:
    """One word of the boot page."""

    def __init__(self, index: int) -> None:
        self._index = index

    def __get__(self, page: Boot, _owner: type[Boot]) -> int:
        return int(page.words[self._index])

    def __set__(self, page: Boot, value: int) -> None:
        page.words[self._index] = np.uint64(value)


class Boot:
    """The 64-byte boot page: how one kernel tells the next where the handover is.

    The first four words are x86's ``struct kho_data`` in setup_data (arch/x86/include/uapi/asm/setup_data.h).

    :ivar words: uint64[8].
    """

    def __init__(self, words: U64) -> None:
        self.words = words

    fdt_addr = _Word(0)  # pa of the KHO FDT, 0 = none
    fdt_size = _Word(1)  # bytes of it
    scratch_addr = _Word(2)  # pa of the scratch array
    scratch_size = _Word(3)  # bytes of it
    boots = _Word(4)  # kernels booted on this platform so far

    def clear(self) -> None:
        """No handover."""
        self.words[:4] = np.uint64(0)


@dataclass(frozen=True, slots=True)
class Fds:
    """The three memfds, to be handed to another process."""

    ram: int
    regs: int
    tags: int


class Platform:
    """The machine as every process sees it.

    :ivar ram: physical memory. :ivar iommu: the IOMMU. :ivar bars: one BAR window per device.
    :ivar tags: uint32[n_frames]: the owner of each frame, 0 = free; not reachable by any pa.
    :ivar boot: the boot page. :ivar fds: the memfds, owned by this object.
    """

    def __init__(self, fds: Fds) -> None:
        self.fds = fds
        self._regs = mmap.mmap(fds.regs, 0)
        regs = np.frombuffer(self._regs, np.uint8)
        self.regs_bytes = regs.size
        info = regs[INFO_PAGE * PAGE : (INFO_PAGE + 1) * PAGE].view(np.uint64)
        if info[_MAGIC] != PLATFORM_MAGIC or info[_VERSION] != PLATFORM_VERSION:
            raise InputError("the registers memfd does not describe a platform of this version")
        self.ram = Ram.shared(fds.ram)
        self.n_devices = int(info[_N_DEVICES])
        self.bar_bytes = int(info[_BAR_BYTES])
        _check_shape(int(info[_RAM_BYTES]), self.n_devices, self.bar_bytes)
        if self.ram.size != int(info[_RAM_BYTES]) or regs.size != _regs_bytes(self.n_devices, self.bar_bytes):
            raise InputError("the memfds of the platform do not have the size that it says")
        self.tags: U32 = np.frombuffer(mmap.mmap(fds.tags, 0), np.uint32)[: self.ram.size // PAGE]
        if len(self.tags) != self.ram.size // PAGE:
            raise InputError("the tag memfd is too small for the memory")
        self.boot = Boot(regs[BOOT_PAGE * PAGE : BOOT_PAGE * PAGE + 64].view(np.uint64))
        pages = regs[FRONT_END_PAGE * PAGE : (FRONT_END_PAGE + self.n_devices) * PAGE]
        self.front_ends: U64 = pages.view(np.uint64).reshape(self.n_devices, PAGE // 8)
        hidden = regs[HIDDEN_PAGE * PAGE : (HIDDEN_PAGE + 1) * PAGE].view(np.uint64)
        bank = regs[BANK_PAGE * PAGE : (BANK_PAGE + BANK_PAGES) * PAGE].view(np.uint64)
        self.lock = HardwareLock(fds.regs)
        kind = int(info[_IOMMU]).to_bytes(8, "little").rstrip(b"\0").decode("ascii", "replace")
        try:
            unit = unit_class(kind)
        except ValueError as e:
            raise InputError(f"the platform: {e}") from e
        self.iommu = unit(bank, hidden, self.front_ends, self.ram, self.lock)
        self.bars = tuple(
            ArrayWindow(regs[start : start + self.bar_bytes])
            for start, _ in map(self.bar_extent, range(self.n_devices))
        )

    @classmethod
    def create(
        cls, ram_bytes: int, n_devices: int = 1, bar_bytes: int = bar.BAR_BYTES, iommu: str = "vtd"
    ) -> Platform:
        """A new machine with zeroed memory.

        :param ram_bytes: multiple of 4096. :param n_devices: 1 ... 64.
        :param bar_bytes: of each BAR, a multiple of 4096, more than 0x4000.
        :param iommu: its kind, of :data:`iokeep.soft.hardware.units.UNITS`.
        """
        unit_class(iommu)
        _check_shape(ram_bytes, n_devices, bar_bytes)
        fds = Fds(*(os.memfd_create(f"iokeep-{name}") for name in ("ram", "regs", "tags")))
        os.ftruncate(fds.ram, ram_bytes)
        os.ftruncate(fds.regs, _regs_bytes(n_devices, bar_bytes))
        os.ftruncate(fds.tags, -(-ram_bytes // PAGE * 4 // PAGE) * PAGE)
        info = [0] * 6
        info[_MAGIC], info[_VERSION] = PLATFORM_MAGIC, PLATFORM_VERSION
        info[_RAM_BYTES], info[_N_DEVICES], info[_BAR_BYTES] = ram_bytes, n_devices, bar_bytes
        info[_IOMMU] = int.from_bytes(iommu.encode("ascii"), "little")
        os.pwrite(fds.regs, b"".join(w.to_bytes(8, "little") for w in info), INFO_PAGE * PAGE)
        platform = cls(fds)
        platform.iommu.power_on()
        for index, window in enumerate(platform.bars):
            bar.power_on(window, index, bar_bytes)
        return platform

    @classmethod
    def from_fds(cls, ram_fd: int, regs_fd: int, tags_fd: int) -> Platform:
        """The machine behind inherited memfds, which this object owns from now on.

        :raises InputError: they do not describe a platform.
        """
        return cls(Fds(ram_fd, regs_fd, tags_fd))

    def bar_extent(self, index: int) -> tuple[int, int]:
        """(start, length) in bytes of a BAR in the registers memfd."""
        if not 0 <= index < self.n_devices:
            raise IndexError(f"device {index} of {self.n_devices}")
        return (FRONT_END_PAGE + self.n_devices) * PAGE + index * self.bar_bytes, self.bar_bytes

    def bdf(self, index: int) -> int:
        """Requester id of a device: 00:04.0, 00:05.0, ... and on to the next bus."""
        if not 0 <= index < self.n_devices:
            raise IndexError(f"device {index} of {self.n_devices}")
        return requester_id(index)

    def index_of(self, bdf: int) -> int:
        """Device index of a requester id. :raises KeyError: no such device."""
        for index in range(self.n_devices):
            if self.bdf(index) == bdf:
                return index
        raise KeyError(f"no device {bdf:#x}")

    def close(self) -> None:
        """Close the memfds; mappings go with the last array that uses them. Idempotent."""
        for fd in (self.fds.ram, self.fds.regs, self.fds.tags):
            if fd >= 0:
                os.close(fd)
        self.fds = Fds(-1, -1, -1)

    def __enter__(self) -> Platform:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _regs_bytes(n_devices: int, bar_bytes: int) -> int:
    return (FRONT_END_PAGE + n_devices) * PAGE + n_devices * bar_bytes


def _check_shape(ram_bytes: int, n_devices: int, bar_bytes: int) -> None:
    if ram_bytes <= 0 or ram_bytes % PAGE:
        raise ValueError(f"memory of {ram_bytes:#x} bytes is not whole frames")
    if not 1 <= n_devices <= MAX_DEVICES:
        raise ValueError(f"{n_devices} devices: 1 ... {MAX_DEVICES} are possible")
    if bar_bytes % PAGE or not bar.RANGES < bar_bytes <= 1 << 28:
        raise ValueError(f"a BAR of {bar_bytes:#x} bytes is not possible")
