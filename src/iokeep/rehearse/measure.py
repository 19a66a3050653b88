# SPDX-License-Identifier: Apache-2.0
"""The measuring host: it may look everywhere, and takes no part.

It reads registers, tables and memory of the software host directly, times the steps, and sums the devices'
counters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iokeep.mem.memory import Memory
from iokeep.pt.formats.base import Format
from iokeep.pt.leaves import Leaves, leaves
from iokeep.pt.tables import TableMemory, descend, raise_unreadable
from iokeep.rehearse.scenario import Expected
from iokeep.soft.hardware import bar
from iokeep.soft.hardware.bar import StepStats
from iokeep.soft.hardware.platform import Platform
from iokeep.soft.kernel.iommu import root_of

__all__ = ["Clock", "Table", "compare_leaves", "device_table", "dma_of", "guest_words"]

U64 = NDArray[np.uint64]
FRAME = 0x1000


@dataclass(frozen=True, slots=True)
class Table:
    """The table that a device's DMA goes through, as the hardware's registers and entries say."""

    fmt: Format
    root_pa: int


def device_table(platform: Platform, index: int = 0) -> Table:
    """Follow the registers to the table of device ``index``. :raises InputError: they lead nowhere."""
    found = root_of(platform, platform.bdf(index))
    return Table(found.fmt, found.root_pa)


def table_frames(fmt: Format, mem: Memory, root_pa: int) -> U64:
    """pas of all pages of 4 KiB that tables are in, sorted.

    :raises MemoryAbsent, InputError: a table is absent or in a loop.
    """
    upper = descend(TableMemory(fmt, mem), root_pa)
    raise_unreadable(fmt, upper.problems)
    parts = []
    for level, pas in zip(range(fmt.top_level, -1, -1), upper.pages, strict=True):
        size = max(fmt.bytes_of(level), FRAME)
        step = np.arange(0, size, FRAME, dtype=np.uint64)
        parts.append(((pas & ~np.uint64(FRAME - 1))[:, None] + step).reshape(-1))
    frames: U64 = np.unique(np.concatenate(parts))
    return frames


def table_leaves(platform: Platform, table: Table) -> Leaves:
    """All leaves of a table in physical memory."""
    return leaves(table.fmt, platform.ram, table.root_pa)


def count_table_pages(platform: Platform, table: Table) -> int:
    """Table pages of 4 KiB, the root included."""
    return len(table_frames(table.fmt, platform.ram, table.root_pa))


def compare_leaves(found: Leaves, expected: Expected) -> str:
    """ "" where the leaves are the expected ones one by one (iova, size, pa, prot), else the first
    difference."""
    n = min(len(found), len(expected.iova))
    for name in ("iova", "lg2", "pa", "prot"):
        ours, theirs = getattr(found, name)[:n], getattr(expected, name)[:n]
        bad = np.flatnonzero(ours != theirs)
        if len(bad):
            i = int(bad[0])
            return (
                f"leaf {i} at iova {int(expected.iova[i]):#x}: {name} is {int(ours[i]):#x}, "
                f"the capture has {int(theirs[i]):#x}"
            )
    if len(found) != len(expected.iova):
        return f"{len(found)} leaves, the capture has {len(expected.iova)}"
    return ""


def guest_words(platform: Platform, pas: U64) -> U64:
    """The 64-bit word at each pa (8-byte aligned), straight from physical memory."""
    words: U64 = platform.ram.words[(pas >> np.uint64(3)).astype(np.int64)]
    return words


@dataclass(slots=True)
class Lap:
    """One step: when it began (ns, CLOCK_MONOTONIC; the first time) and how long it took in all (ns)."""

    name: str
    start: int
    ns: int = 0


@dataclass(slots=True)
class Clock:
    """Times the steps and makes the devices count under them.

    :param set_step: told the number of each step. :param names: the steps; their index is their number.
    """

    set_step: Callable[[int], None]
    names: Sequence[str]
    say: Callable[[str], None]
    laps: list[Lap] = field(default_factory=list)
    _now: Lap | None = None
    _since: int = 0

    def begin(self, name: str) -> None:
        """The step ``name`` begins, and the one before ends. A step that comes again goes on."""
        self.end()
        lap = next((x for x in self.laps if x.name == name), None)
        now = time.monotonic_ns()
        if lap is None:
            lap = Lap(name, now)
            self.laps.append(lap)
        self._now, self._since = lap, now
        self.set_step(self.names.index(name))
        self.say(name)

    def end(self) -> None:
        """The step ends."""
        if self._now is not None:
            self._now.ns += time.monotonic_ns() - self._since
            self._now = None


def dma_of(platform: Platform) -> tuple[list[StepStats], StepStats]:
    """Counters of all devices together: per step, and the sum of all."""
    every = [bar.decode_stats(platform.bars[i]) for i in range(platform.n_devices)]
    steps = [sum((s.steps[n] for s in every), StepStats()) for n in range(bar.STEPS)]
    return steps, sum((s.total for s in every), StepStats())


def transactions(platform: Platform) -> int:
    """DMA transactions of all devices so far."""
    return sum(bar.decode_stats(platform.bars[i]).total.transactions for i in range(platform.n_devices))


def incidents(platform: Platform, limit: int = 8) -> list[dict[str, Any]]:
    """The first incidents of each device, for the report."""
    out = []
    for i in range(platform.n_devices):
        for one in bar.read_incidents(platform.bars[i])[:limit]:
            text = one.text(platform.iommu.fault_text)
            out.append({"device": i, "step": one.step, "iova": f"{one.iova:#x}", "text": text})
    return out
