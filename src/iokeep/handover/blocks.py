# SPDX-License-Identifier: Apache-2.0
"""Chains of page-sized blocks: {next pa, count} and the entries (``include/linux/kho/abi/block.h``).

``kho_block_set_restore()`` of 7.3 refuses a whole set for a cycle, a block with no entry, or a count beyond
the capacity of a page. The reader goes on where that is safe and reports each.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from iokeep.handover import abi
from iokeep.handover.abi import PAGE_SIZE
from iokeep.handover.trail import Trail


def read_blocks(
    trail: Trail, first_pa: int, dtype: np.dtype[np.void], what: str, breaks: str
) -> NDArray[np.void]:
    """All entries of the chain at ``first_pa`` (0 = none), in order.

    :param what: how the chain is called in problems.
    :param breaks: what the next kernel does with a broken one.
    :raises MemoryAbsent: a block is not in this source.
    """
    header_bytes = abi.kho_block_header_ser.itemsize
    capacity = (PAGE_SIZE - header_bytes) // dtype.itemsize
    parts: list[NDArray[np.void]] = []
    pa, number = first_pa, 0
    while pa:
        if number == abi.KHO_BLOCK_MAX_BLOCKS:
            trail.problem(f"{what}: more than {abi.KHO_BLOCK_MAX_BLOCKS} blocks at {pa:#x}: {breaks}")
            break
        if not trail.claim(pa, f"{what} block {number}"):
            trail.problem(f"{what}: the chain breaks off after {number} blocks: {breaks}")
            break
        page = trail.page(pa)
        header = np.frombuffer(page, abi.kho_block_header_ser, 1)[0]
        count = int(header["count"])
        where = f"{what}: block {number} at {pa:#x}"
        if count == 0:
            trail.problem(f"{where} has count 0, a block must hold an entry: {breaks}")
        if count > capacity:
            trail.problem(f"{where} has count {count}, at most {capacity} fit: {breaks}")
            break
        parts.append(np.frombuffer(page, dtype, count, header_bytes))
        pa, number = int(header["next"]), number + 1
    return np.concatenate(parts) if parts else np.zeros(0, dtype)
