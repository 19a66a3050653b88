# SPDX-License-Identifier: Apache-2.0
"""Software RAM: one flat, shared buffer that starts at physical address 0."""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import numpy as np

from iokeep.errors import MemoryAbsent
from iokeep.mem.memory import I64, U8, U64


@dataclass(frozen=True, slots=True)
class RamRows:
    """Rows view of :class:`Ram`: row number = pa / row_bytes."""

    data: U8
    row_bytes: int

    @property
    def linear(self) -> bool:
        """See :attr:`iokeep.mem.memory.Rows.linear`."""
        return True

    def index(self, pas: U64) -> I64:
        """See :meth:`iokeep.mem.memory.Rows.index`."""
        rows: I64 = (pas >> np.uint64(self.row_bytes.bit_length() - 1)).view(np.int64)
        if len(rows) and int(rows.max()) >= len(self.data):
            rows[rows >= len(self.data)] = -1
        return rows


class Ram:
    """RAM of ``len(buffer)`` bytes at pa 0; the buffer is usually the mapping of a shared memfd.

    :param buffer: a writable buffer whose length is a multiple of 4096 bytes.
    """

    def __init__(self, buffer: mmap.mmap | bytearray | U8) -> None:
        self.bytes: U8 = np.frombuffer(buffer, dtype=np.uint8)
        if self.bytes.size % 4096:
            raise ValueError(f"RAM of {self.bytes.size:#x} bytes is not whole 4096-byte frames")
        self.words: U64 = self.bytes.view(np.uint64)
        self.size = int(self.bytes.size)

    @classmethod
    def of(cls, size: int) -> Ram:
        """Private, zeroed RAM of ``size`` bytes."""
        return cls(mmap.mmap(-1, size))

    @classmethod
    def shared(cls, fd: int) -> Ram:
        """RAM behind a memfd that other processes map too."""
        return cls(mmap.mmap(fd, 0))

    def _check(self, pa: int, length: int) -> None:
        if pa < 0 or length < 0 or pa + length > self.size:
            raise MemoryAbsent(max(pa, self.size), length, f"RAM ends at {self.size - 1:#x}")

    def read(self, pa: int, length: int) -> bytes:
        """See :meth:`iokeep.mem.memory.Memory.read`."""
        self._check(pa, length)
        return self.bytes[pa : pa + length].tobytes()

    def write(self, pa: int, data: bytes | bytearray | memoryview) -> None:
        """See :meth:`iokeep.mem.memory.WritableMemory.write`."""
        self._check(pa, len(data))
        self.bytes[pa : pa + len(data)] = np.frombuffer(data, dtype=np.uint8)

    def store64(self, pa: int, value: int) -> None:
        """One aligned 64-bit store, which other processes see whole."""
        self._check(pa, 8)
        self.words[pa >> 3] = value

    def load64(self, pa: int) -> int:
        """One aligned 64-bit load."""
        self._check(pa, 8)
        return int(self.words[pa >> 3])

    def rows(self, row_bytes: int) -> RamRows:
        """See :meth:`iokeep.mem.memory.Memory.rows`."""
        whole = self.size // row_bytes
        return RamRows(self.bytes[: whole * row_bytes].reshape(whole, row_bytes), row_bytes)
