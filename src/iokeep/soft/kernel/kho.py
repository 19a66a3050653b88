# SPDX-License-Identifier: Apache-2.0
"""Kexec HandOver, the old kernel's side: frames for what is written, and the tree of what must survive.

Nothing is kept between reboots ("stateless KHO"): a :class:`KhoOut` is filled in one freeze and either
crosses the kexec or is thrown away whole.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence

import numpy as np

from iokeep.handover.radix import PreservedTree
from iokeep.handover.writer import FlbOut, SessionOut, write_handover
from iokeep.mem.memory import U64
from iokeep.soft.kernel.frames import (
    FRAME_BYTES,
    FRAME_SHIFT,
    I64,
    TAG_KERNEL,
    Claim,
    FrameAllocator,
    Kind,
    OutOfMemory,
)
from iokeep.soft.kernel.syserror import SysError


class KhoOut:
    """What one freeze writes and preserves."""

    def __init__(self, frames: FrameAllocator) -> None:
        self.frames = frames
        self._written: list[I64] = []
        self._blocks: list[tuple[U64, int]] = []
        self._runs: list[tuple[int, int]] = []

    def alloc(self, npages: int, preserved: bool) -> int:
        """``npages`` contiguous, zeroed frames for records; the pa. ``preserved``: they go into the tree.

        :raises SysError: ENOMEM.
        """
        try:
            if npages == 1:
                pfn = int(self.frames.alloc(1, TAG_KERNEL, Kind.HANDOVER)[0])
            else:
                pfn = self.frames.alloc_run(npages, TAG_KERNEL, Kind.HANDOVER)
        except OutOfMemory as error:
            raise SysError(errno.ENOMEM, f"live update records: {error}") from error
        self._written.append(np.arange(pfn, pfn + npages, dtype=np.int64))
        if preserved:
            self._runs.append((pfn, npages))
        return pfn << FRAME_SHIFT

    def alloc_tables(self, n: int, size: int) -> U64:
        """``n`` zeroed tables of ``size`` bytes, a power of two, aligned to it; they go into the tree. Their
        pas; one smaller than a frame has it to itself.

        :raises SysError: ENOMEM.
        """
        order = max(0, size.bit_length() - 1 - FRAME_SHIFT)
        try:
            pfns = self.frames.alloc(n, TAG_KERNEL, Kind.HANDOVER, order=order)
        except OutOfMemory as error:
            raise SysError(errno.ENOMEM, f"live update tables: {error}") from error
        self._written.append((pfns[:, None] + np.arange(1 << order, dtype=np.int64)).reshape(-1))
        self.preserve(pfns, order)
        return pfns.astype(np.uint64) << np.uint64(FRAME_SHIFT)

    def preserve(self, pfns: I64 | U64, order: int = 0) -> None:
        """Blocks of ``2**order`` frames whose first pfns these are must survive."""
        self._blocks.append((np.asarray(pfns).astype(np.uint64), order))

    def preserve_pas(self, pas: U64) -> None:
        """Single frames by pa must survive."""
        self.preserve(np.asarray(pas, np.uint64) >> np.uint64(FRAME_SHIFT))

    def tree(self) -> PreservedTree:
        """Everything preserved so far."""
        tree = PreservedTree.of_ranges(
            np.array([r[0] for r in self._runs], np.uint64), np.array([r[1] for r in self._runs], np.uint64)
        )
        if self._blocks:
            tree = tree.union(
                PreservedTree.of(
                    np.concatenate([b[0] for b in self._blocks]),
                    np.concatenate([np.full(len(b[0]), b[1], np.uint8) for b in self._blocks]),
                )
            )
        return tree

    def write(
        self,
        sessions: Sequence[SessionOut],
        flbs: Sequence[FlbOut],
        *,
        liveupdate_num: int,
        release: str,
        kexec_count: int,
    ) -> int:
        """Write LUO, the tree and the FDT; the pa of the FDT. :raises SysError: ENOMEM, EINVAL."""
        try:
            return write_handover(
                self.frames.ram,
                self.alloc,
                sessions=sessions,
                flbs=flbs,
                preserved=self.tree(),
                liveupdate_num=liveupdate_num,
                previous_release=release,
                kexec_count=kexec_count,
            )
        except ValueError as error:
            raise SysError(errno.EINVAL, f"KHO: {error}") from error

    def abort(self) -> None:
        """Free every record: the reboot failed."""
        for pfns in self._written:
            self.frames.put(pfns)
        self._written.clear()
        self._blocks.clear()
        self._runs.clear()

    def claims(self) -> Iterable[Claim]:
        """The frames that the records take."""
        if self._written:
            yield Claim("live update records", np.concatenate(self._written), tag=TAG_KERNEL)

    @property
    def written_bytes(self) -> int:
        """Bytes of all records, tree nodes included."""
        return sum(len(pfns) for pfns in self._written) * FRAME_BYTES
