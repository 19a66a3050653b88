# SPDX-License-Identifier: Apache-2.0
"""Kexec HandOver, the old kernel's side: frames for what is written, and the tree of what must survive.

The tree is in memory from the first preserved file on, and what a file needs is in it when the file is
preserved: each has a :class:`KhoPart`, which goes again when the file is unpreserved. The freeze is one part
more, which crosses the kexec with all others or is thrown away.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence

import numpy as np

from iokeep.handover.radix import LiveTree, PreservedTree
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
    """The tree of what must survive, and all parts that are in it."""

    def __init__(self, frames: FrameAllocator) -> None:
        self.frames = frames
        self.parts: list[KhoPart] = []
        self._tree: LiveTree | None = None
        self._nodes: list[int] = []

    def part(self) -> KhoPart:
        """A new part, empty."""
        part = KhoPart(self)
        self.parts.append(part)
        return part

    @property
    def tree(self) -> LiveTree:
        """The tree in memory. :raises SysError: ENOMEM."""
        if self._tree is None:
            self._tree = LiveTree(self.frames.ram, self._node)
        return self._tree

    def _node(self, npages: int, preserved: bool) -> int:
        try:
            pfn = int(self.frames.alloc(npages, TAG_KERNEL, Kind.HANDOVER)[0])
        except OutOfMemory as error:
            raise SysError(errno.ENOMEM, f"preserved-memory tree: {error}") from error
        self._nodes.append(pfn)
        return pfn << FRAME_SHIFT

    def discard(self, blocks: PreservedTree) -> None:
        """These blocks need not survive any more, if they are in the tree at all."""
        if self._tree is not None:
            self._tree.discard(blocks)

    def remove(self, part: KhoPart) -> None:
        """A part is gone; the tree goes with the last one."""
        self.parts.remove(part)
        if not self.parts:
            self.frames.put(np.array(self._nodes, np.int64))
            self._nodes.clear()
            self._tree = None

    def claims(self) -> Iterable[Claim]:
        """The frames of the tree and of all records."""
        if self._nodes:
            yield Claim("preserved-memory tree", np.array(self._nodes, np.int64), tag=TAG_KERNEL)
        for part in self.parts:
            yield from part.claims()


class KhoPart:
    """What one preserved file, or the freeze, writes and preserves."""

    def __init__(self, out: KhoOut) -> None:
        self.out = out
        self.frames = out.frames
        self._written: list[I64] = []
        self._blocks: list[tuple[U64, int]] = []
        self._runs: list[tuple[int, int]] = []
        #: what of these is in the tree
        self._flushed: list[PreservedTree] = []

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

    def flush(self) -> None:
        """Everything preserved so far is in the tree. :raises SysError: ENOMEM."""
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
        self._flushed.append(tree)
        self._blocks, self._runs = [], []
        self.out.tree.add(tree)

    def _root(self) -> int:
        self.flush()
        return self.out.tree.root_pa

    def write(
        self,
        sessions: Sequence[SessionOut],
        flbs: Sequence[FlbOut],
        *,
        liveupdate_num: int,
        release: str,
        kexec_count: int,
    ) -> int:
        """Write LUO, the rest of the tree and the FDT; the pa of the FDT.

        :raises SysError: ENOMEM, EINVAL.
        """
        try:
            return write_handover(
                self.frames.ram,
                self.alloc,
                sessions=sessions,
                flbs=flbs,
                preserved=self._root,
                liveupdate_num=liveupdate_num,
                previous_release=release,
                kexec_count=kexec_count,
            )
        except ValueError as error:
            raise SysError(errno.EINVAL, f"KHO: {error}") from error

    def drop(self) -> None:
        """The file is unpreserved, or the reboot failed: free every record, and preserve nothing of it."""
        for tree in self._flushed:
            self.out.discard(tree)
        for pfns in self._written:
            self.frames.put(pfns)
        self._written.clear()
        self.out.remove(self)

    def claims(self) -> Iterable[Claim]:
        """The frames that the records take."""
        if self._written:
            yield Claim("live update records", np.concatenate(self._written), tag=TAG_KERNEL)

    @property
    def written_bytes(self) -> int:
        """Bytes of all records, tree nodes included."""
        return sum(len(pfns) for pfns in self._written) * FRAME_BYTES
