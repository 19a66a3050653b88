# SPDX-License-Identifier: Apache-2.0
"""The driver's side of VT-d queued invalidation (specification 6.5.2; drivers/iommu/intel/dmar.c
qi_submit_sync).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from iokeep.pt.roots import vtd as codec
from iokeep.soft.hardware.unit import FE_HEAD, FE_ONLINE, FE_PID
from iokeep.soft.hardware.units import vtd as reg
from iokeep.soft.kernel.frames import FRAME_BYTES, FRAME_SHIFT, I64, TAG_KERNEL, FrameAllocator, Kind

if TYPE_CHECKING:
    from iokeep.soft.hardware.unit import Unit

#: seconds after which hardware that does not answer is given up
TIMEOUT = 10.0
#: turns of the wait loop that do not sleep
_SPIN = 64


class HardwareTimeout(Exception):
    """The IOMMU does not answer: the kernel cannot go on (it would be an oops on a real machine)."""


class InvalidationQueue:
    """A queue of 256 descriptors and a page for the status of waits.

    :param wide: descriptors of 256 bits, as scalable mode has them. :param pump: lets hardware in this very
        process make progress; called in the wait loop.
    """

    def __init__(
        self, regs: Unit, frames: FrameAllocator, *, wide: bool, pump: Callable[[], None] | None
    ) -> None:
        self._regs = regs
        self._frames = frames
        self._pump = pump
        self._wide = wide
        self._step = 32 if wide else 16
        self._order = 1 if wide else 0
        self._pa = 0
        self._status_pa = 0
        self._tail = 0
        self._sequence = 0
        self._words32 = frames.ram.bytes.view(np.uint32)

    @property
    def pfns(self) -> I64:
        """Frames of the queue and of the status page."""
        first = self._pa >> FRAME_SHIFT
        queue = np.arange(first, first + (1 << self._order), dtype=np.int64)
        return np.append(queue, np.int64(self._status_pa >> FRAME_SHIFT))

    def start(self, command: int) -> int:
        """Set the queue up in fresh frames and enable it (dmar_enable_qi); GCMD's value with QIE.

        A queue that an earlier kernel left enabled is stopped first: its memory is not ours.

        :param command: the GCMD bits that stay as they are.
        """
        regs = self._regs
        regs.write32(reg.DMAR_GCMD_REG, command & ~reg.DMA_GCMD_QIE)
        self._until(lambda: not regs.read32(reg.DMAR_GSTS_REG) & reg.DMA_GSTS_QIES, "queue disable")
        pfn = int(self._frames.alloc(1, TAG_KERNEL, Kind.KERNEL, order=self._order)[0])
        self._pa = pfn << FRAME_SHIFT
        self._status_pa = int(self._frames.alloc(1, TAG_KERNEL, Kind.KERNEL)[0]) << FRAME_SHIFT
        regs.write64(reg.DMAR_IQA_REG, self._pa | self._order | (reg.IQA_DW if self._wide else 0))
        regs.write64(reg.DMAR_IQT_REG, 0)
        self._tail = 0
        command |= reg.DMA_GCMD_QIE
        regs.write32(reg.DMAR_GCMD_REG, command)
        self._until(lambda: bool(regs.read32(reg.DMAR_GSTS_REG) & reg.DMA_GSTS_QIES), "queue enable")
        return command

    def submit(self, descriptors: Sequence[codec.Descriptor]) -> None:
        """Queue descriptors and a wait, and return when every front-end has done them, with DMA drained.

        :raises HardwareTimeout: after :data:`TIMEOUT` seconds, or at an invalidation queue error.
        """
        self._sequence = self._sequence % 0xFFFFFFFF + 1
        wait = codec.inv_wait(self._status_pa, self._sequence)
        room = (FRAME_BYTES << self._order) // self._step
        if len(descriptors) + 2 > room:
            raise ValueError(f"{len(descriptors)} descriptors for a queue of {room}")
        ram = self._frames.ram
        for descriptor in (*descriptors, wait):
            ram.write(self._pa + self._tail, codec.descriptor_bytes(descriptor, wide=self._wide))
            self._tail = (self._tail + self._step) % (FRAME_BYTES << self._order)
        self._regs.write64(reg.DMAR_IQT_REG, self._tail)
        at = self._status_pa >> 2
        self._until(lambda: int(self._words32[at]) == self._sequence, "invalidation wait")

    def _until(self, done: Callable[[], bool], what: str) -> None:
        if done():
            return
        end = time.monotonic() + TIMEOUT
        turn = 0
        while True:
            if self._pump is not None:
                self._pump()
            if done():
                return
            turn += 1
            if turn < _SPIN:
                time.sleep(0)
                continue
            time.sleep(0.00002 if turn < 2000 else 0.001)
            if turn % 64 == 0:
                if self._regs.read32(reg.DMAR_FSTS_REG) & reg.DMA_FSTS_IQE:
                    raise HardwareTimeout(f"DMAR: {what}: invalidation queue error, {self._state()}")
                if time.monotonic() > end:
                    raise HardwareTimeout(f"DMAR: {what}: no answer in {TIMEOUT:.0f} s, {self._state()}")

    def _state(self) -> str:
        pages = self._regs.front_ends
        online = [
            f"device {i} (pid {int(p[FE_PID])}, head {int(p[FE_HEAD]):#x})"
            for i, p in enumerate(pages)
            if p[FE_ONLINE]
        ]
        return f"tail {self._tail:#x}, front-ends online: {', '.join(online) or 'none'}"
