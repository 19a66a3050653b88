# SPDX-License-Identifier: Apache-2.0
"""Physical memory of the running kernel: /proc/kcore where it says where RAM is, else /dev/mem.

Both need CAP_SYS_RAWIO. /proc/kcore is an ELF core whose segments of RAM carry their physical address
(``p_paddr``, fs/proc/kcore.c); a kernel under lockdown has neither. /dev/mem holds RAM only without
CONFIG_STRICT_DEVMEM.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Self

from iokeep.errors import CapabilityError, InputError, MemoryAbsent

# ELF-64, System V ABI: e_phoff at 32, e_phentsize and e_phnum at 54; PT_LOAD
_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_PT_LOAD = 1
_ET_CORE = 4
_NO_PA = 2**64 - 1
_MAX_SEGMENTS = 1 << 16


class LiveMemory:
    """The running kernel's memory, read-only. A context manager.

    :param path: "/proc/kcore", "/dev/mem", or a file of either form.
    :raises CapabilityError: it may not be opened, or is not there. :raises InputError: it is no such file.
    """

    def __init__(self, path: str | Path = "/proc/kcore") -> None:
        self.path = str(path)
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CapabilityError(
                f"{path}: {error.strerror}: physical memory cannot be read",
                "run as root, with CONFIG_PROC_KCORE and no kernel lockdown",
            ) from error
        #: (first pa, bytes, offset in the file); None = the offset is the pa
        self._segments: list[tuple[int, int, int]] | None = None
        try:
            head = os.pread(self._fd, _EHDR.size, 0)
            if head[:4] == b"\x7fELF":
                self._segments = self._core(head)
        except BaseException:
            self.close()
            raise

    def _core(self, head: bytes) -> list[tuple[int, int, int]]:
        fields = _EHDR.unpack(head)
        kind, phoff, size, count = fields[1], fields[5], fields[9], fields[10]
        if head[4:6] != b"\x02\x01" or kind != _ET_CORE or size != _PHDR.size or count > _MAX_SEGMENTS:
            raise InputError(f"{self.path}: no little-endian ELF-64 core")
        raw = os.pread(self._fd, size * count, phoff)
        out = []
        for at in range(0, len(raw) - size + 1, size):
            p_type, _, offset, _, pa, length, _, _ = _PHDR.unpack_from(raw, at)
            if p_type == _PT_LOAD and pa != _NO_PA and length:
                out.append((pa, length, offset))
        if not out:
            raise InputError(f"{self.path}: no segment says its physical address")
        return out

    def read(self, pa: int, length: int) -> bytes:
        """See :meth:`iokeep.mem.memory.Memory.read`."""
        offset = pa
        if self._segments is not None:
            # Few, and they overlap: the kernel's text lies in RAM.
            for first, size, start in self._segments:
                if first <= pa and pa + length <= first + size:
                    offset = start + pa - first
                    break
            else:
                raise MemoryAbsent(pa, length, f"no segment of {self.path} has it")
        try:
            raw = os.pread(self._fd, length, offset)
        except (OSError, OverflowError) as error:
            raise MemoryAbsent(pa, length, f"{self.path}: {error}") from error
        if len(raw) != length:
            raise MemoryAbsent(pa, length, f"{self.path} ends there")
        return raw

    def close(self) -> None:
        """Close the file; idempotent."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()
