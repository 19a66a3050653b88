# SPDX-License-Identifier: Apache-2.0
"""What every source of physical memory can do: bytes by address, and whole tables as rows of one array."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
U8 = NDArray[np.uint8]
I64 = NDArray[np.int64]


class Rows(Protocol):
    """Memory seen as rows of ``row_bytes`` bytes, so that whole tables are array work.

    ``data`` is uint8[n, row_bytes]; row r holds memory from a pa that is a multiple of ``row_bytes``.
    """

    @property
    def data(self) -> U8:
        """The rows; shared with the memory."""
        ...

    @property
    def linear(self) -> bool:
        """Row r holds memory from r * ``row_bytes``, and all of them are there."""
        ...

    def index(self, pas: U64) -> I64:
        """Row of each pa (uint64[k], rounded down to ``row_bytes``); -1 where the memory is absent."""
        ...


class Memory(Protocol):
    """Physical memory that can be read."""

    def read(self, pa: int, length: int) -> bytes:
        """``length`` bytes from ``pa``. :raises MemoryAbsent: any of them is not in this source."""
        ...

    def rows(self, row_bytes: int) -> Rows:
        """The rows view for tables of ``row_bytes`` bytes (a power of two, 4096 ... 65536)."""
        ...


class WritableMemory(Memory, Protocol):
    """Physical memory that can be written; ``rows(...).data`` is then writable and shared."""

    def write(self, pa: int, data: bytes | bytearray | memoryview) -> None:
        """Store ``data`` at ``pa``. :raises MemoryAbsent: outside of this memory."""
        ...
