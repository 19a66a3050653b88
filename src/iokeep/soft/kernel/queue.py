# SPDX-License-Identifier: Apache-2.0
"""The driver's side of an IOMMU's command queue: a ring in frames, and a wait behind what was queued.

What a command looks like, how its tail register is written and how the end of a wait shows, each driver
says: VT-d's invalidation queue (drivers/iommu/intel/dmar.c, qi_submit_sync), AMD's command buffer
(drivers/iommu/amd/iommu.c, iommu_queue_command_sync), SMMUv3's command queue (arm-smmu-v3.c,
arm_smmu_cmdq_issue_cmdlist), RISC-V's (drivers/iommu/riscv/iommu.c, riscv_iommu_queue_send).
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from iokeep.soft.hardware.unit import FE_HEAD, FE_ONLINE, FE_PID
from iokeep.soft.kernel.frames import FRAME_BYTES, FRAME_SHIFT, I64, TAG_KERNEL, FrameAllocator, Kind

if TYPE_CHECKING:
    from iokeep.soft.hardware.unit import Unit

#: seconds after which hardware that does not answer is given up
TIMEOUT = 10.0
#: turns of the wait loop that do not sleep
_SPIN = 64

#: 64-bit words, lowest first; missing ones are 0
Command = tuple[int, ...]


class HardwareTimeout(Exception):
    """The IOMMU does not answer: the kernel cannot go on (it would be an oops on a real machine)."""


class CommandQueue(ABC):
    """A ring of commands, and a page where hardware stores the ends of waits.

    :param name: what messages begin with. :param unit: the hardware.
    :param frames: where the ring comes from.
    :param command_bytes: of one command, a power of two. :param order: the ring has 2**order frames.
    :param pump: lets hardware in this very process make progress; called in the wait loop.
    """

    def __init__(
        self,
        name: str,
        unit: Unit,
        frames: FrameAllocator,
        *,
        command_bytes: int,
        order: int = 0,
        pump: Callable[[], None] | None = None,
    ) -> None:
        self.name = name
        self.command_bytes = command_bytes
        self.order = order
        #: pa of the ring, and of the page for the ends of waits; 0 until :meth:`allocate`
        self.pa = 0
        self.status_pa = 0
        self.unit = unit
        self._frames = frames
        self._pump = pump
        #: number of the next command, modulo twice the ring: its highest bit is the wrap bit of SMMU
        self._next = 0
        self._sequence = 0
        self._words32 = frames.ram.bytes.view(np.uint32)

    @property
    def entries(self) -> int:
        """Commands that the ring has room for, one more than can wait in it."""
        return (FRAME_BYTES << self.order) // self.command_bytes

    @property
    def pfns(self) -> I64:
        """Frames of the ring and of the status page; none before :meth:`allocate`."""
        if not self.pa:
            return np.zeros(0, np.int64)
        first = self.pa >> FRAME_SHIFT
        ring = np.arange(first, first + (1 << self.order), dtype=np.int64)
        return np.append(ring, np.int64(self.status_pa >> FRAME_SHIFT))

    def allocate(self) -> None:
        """The ring and the status page in fresh, zeroed frames; the next command is the first one.

        :raises OutOfMemory: at boot, where nothing can go on without it.
        """
        ring = self._frames.alloc(1, TAG_KERNEL, Kind.KERNEL, order=self.order)
        status = self._frames.alloc(1, TAG_KERNEL, Kind.KERNEL)
        self.pa, self.status_pa = int(ring[0]) << FRAME_SHIFT, int(status[0]) << FRAME_SHIFT
        self._next = 0

    def submit(self, commands: Sequence[Command]) -> None:
        """Queue commands and a wait, and return when every front-end has done them, with DMA drained.

        More than the ring has room for go in several parts.

        :raises HardwareTimeout: after :data:`TIMEOUT` seconds, or where hardware reports an error.
        """
        room = self.entries - 2
        for at in range(0, max(len(commands), 1), room):
            self._sequence = self._sequence % 0xFFFFFFFF + 1
            for command in (*commands[at : at + room], self._wait(self._sequence)):
                self._put(command)
            self._ring(self._next)
            self.until(partial(self._done, self._next, self._sequence), "wait")

    def _put(self, command: Command) -> None:
        raw = self._encode(command)
        if len(raw) != self.command_bytes:
            raise ValueError(f"a command of {len(raw)} bytes in a queue of {self.command_bytes}")
        self._frames.ram.write(self.pa + self._next % self.entries * self.command_bytes, raw)
        self._next = (self._next + 1) % (2 * self.entries)

    # ---- what the driver says

    def _encode(self, command: Command) -> bytes:
        """A command as it lies in memory; missing words are 0."""
        return b"".join(word.to_bytes(8, "little") for word in command).ljust(self.command_bytes, b"\0")

    @abstractmethod
    def _wait(self, sequence: int) -> Command:
        """A wait, number ``sequence`` (u32, never 0), that all commands before it are done at."""

    @abstractmethod
    def _ring(self, tail: int) -> None:
        """Write the tail register. ``tail``: number of the next command, modulo twice :attr:`entries`."""

    def _done(self, tail: int, sequence: int) -> bool:
        """The wait is over: hardware has stored ``sequence`` as u32 in the status page, where a driver does
        not say otherwise. ``tail`` as it was written.
        """
        return self.stored == sequence

    @property
    def stored(self) -> int:
        """The first u32 of the status page."""
        return int(self._words32[self.status_pa >> 2])

    def _error(self) -> str:
        """The error that hardware reports for the queue, "" = none."""
        return ""

    def _state(self) -> str:
        """For messages: how far hardware has come."""
        online = [
            f"device {i} (pid {int(p[FE_PID])}, head {int(p[FE_HEAD]):#x})"
            for i, p in enumerate(self.unit.front_ends)
            if p[FE_ONLINE]
        ]
        return f"next command {self._next:#x}, front-ends online: {', '.join(online) or 'none'}"

    # ---- waiting

    def until(self, done: Callable[[], bool], what: str) -> None:
        """Return when ``done``. :raises HardwareTimeout: see :meth:`submit`."""
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
                if error := self._error():
                    raise HardwareTimeout(f"{self.name}: {what}: {error}, {self._state()}")
                if time.monotonic() > end:
                    raise HardwareTimeout(
                        f"{self.name}: {what}: no answer in {TIMEOUT:.0f} s, {self._state()}"
                    )
