# SPDX-License-Identifier: Apache-2.0
"""The DMA engine of a device: takes orders from its BAR, does bursts of DMA, keeps the counters.

One round (:meth:`DmaEngine.pump`): look at the control registers; take a new range table, a command, a
change of ENABLE; consume the invalidation queue; do one burst. So everything that must not happen in the
middle of a DMA happens between two bursts, and a burst is short (:data:`BURST_NS`).
"""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from iokeep.mem.memory import U64
from iokeep.soft.hardware import bar
from iokeep.soft.hardware.bar import ArrayWindow
from iokeep.soft.hardware.iommu import FrontEnd

#: a burst is sized to take this long (ns)
BURST_NS = 40_000
MIN_BURST, MAX_BURST = 16, 4096
#: gaps longer than this (ns) are compared with the time spent waiting for a CPU
LONG_GAP_NS = 200_000
#: the statistics are read within this time (ns), unless the CPU was lost meanwhile
_SAMPLE_NS = 50_000
_IDLE_S = 0.0005
_MAX_PAGES = 1 << 32
#: probes of ranges that must fault take at most one transaction in PROBE_SHARE, where there are others
PROBE_SHARE = 8


class RunDelay:
    """Time that this process waited for a CPU although it could run (ns), from /proc/self/schedstat.

    Documentation/scheduler/sched-stats.rst: time on the CPU, time waiting on a run queue, timeslices. Where
    the kernel has no such statistics it stays 0 and gaps count in full.
    """

    def __init__(self) -> None:
        self._fd = -1
        if Path("/proc/self/schedstat").exists():
            self._fd = os.open("/proc/self/schedstat", os.O_RDONLY | os.O_CLOEXEC)

    def read(self) -> int:
        """The sum so far."""
        if self._fd < 0:
            return 0
        words = os.pread(self._fd, 128, 0).split()
        return int(words[1]) if len(words) >= 2 else 0

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class DmaEngine:
    """One device.

    :param window: its BAR, in the memory of the platform.

    :ivar shadow: uint64[MAX_SLOTS]: sequence last written to each slot, 0 = never. Private: memory cannot
        make the device believe that something else was written.
    """

    def __init__(self, frontend: FrontEnd, window: ArrayWindow) -> None:
        from iokeep.soft.hardware import engine

        self._engine = engine
        self.frontend = frontend
        self.words = window.words
        self.window = window
        self.capacity = (window.bytes.size - bar.RANGES) // bar.RANGE_BYTES
        first, count = bar.STATS >> 3, bar.STEPS * bar.STATS_WORDS
        self.rows = self.words[first : first + count].reshape(bar.STEPS, bar.STATS_WORDS)
        first = bar.LOG >> 3
        self.log = self.words[first : first + bar.LOG_ROWS * bar.LOG_WORDS].reshape(-1, bar.LOG_WORDS)
        self.shadow: U64 = np.zeros(bar.MAX_SLOTS, np.uint64)
        self.ranges: U64 = np.zeros((0, engine.RANGE_WORDS), np.uint64)
        self.dma: U64 = np.zeros(engine.DMA_WORDS, np.uint64)
        self.dma[engine.D_STAMP] = engine.STAMP_MAGIC ^ frontend.index
        self.dma[engine.D_LINE] = bar.LINE_BYTES * frontend.index
        self.dma[engine.D_RNG] = self._seeded(0)
        self._generation = int(self.words[bar.GENERATION_ACK >> 3])
        self._command = int(self.words[bar.COMMAND_ACK >> 3])
        self._burst = 64
        self._last_end = 0  # end of the last burst with a completed DMA (perf_counter_ns), 0 = none yet
        self._planned = 0  # ns slept on purpose since then
        self._next = 0  # when the throttle lets the next burst start
        self._delay = RunDelay()
        self._last_delay = 0
        self._put(bar.ENABLE_ACK, 0)
        self._put(bar.PID, os.getpid())
        self._put(bar.STATE, bar.STATE_QUIESCED)

    def _put(self, offset: int, value: int) -> None:
        self.words[offset >> 3] = np.uint64(value)

    def _seeded(self, seed: int) -> np.uint64:
        # xorshift must not start at 0; devices with one seed take different orders.
        mixed = (seed ^ (self.frontend.index + 1) * 0x9E3779B97F4A7C15) & (2**64 - 1)
        return np.uint64(mixed or 1)

    @property
    def pages(self) -> int:
        """Tickets in the working set: pages of the plain ranges, and some for the probed ones."""
        return int(self.dma[self._engine.D_PAGES])

    # -- orders -----------------------------------------------------------------------------------------
    def load_ranges(self) -> int:
        """Take the range table of the BAR; 0, or 1 + number of the row that is refused (nothing taken)."""
        e = self._engine
        count = int(self.words[bar.NRANGES >> 3])
        if count > self.capacity:
            return 1 + self.capacity
        first = bar.RANGES >> 3
        table = self.words[first : first + 4 * count].reshape(count, 4).copy()
        tag = table[:, 3] & np.uint64(2**32 - 1)
        flags = table[:, 3] >> np.uint64(32)
        pages = np.zeros(count, np.int64)
        plain = np.zeros(count, bool)
        for i, (iova, last, slot, _) in enumerate(table.tolist()):
            n = (last - iova + 1) >> 12
            probe = bool(flags[i] & np.uint64(bar.RANGE_EXPECT_FAULT))
            if iova & 0xFFF or (last + 1) & 0xFFF or not 0 < n < _MAX_PAGES:
                return 1 + i
            if not probe and (slot >= bar.MAX_SLOTS or n > bar.MAX_SLOTS - slot):
                return 1 + i
            if int(flags[i]) >> 4 or not int(flags[i]) & 3:
                return 1 + i
            pages[i] = n
            plain[i] = not probe
        live = (flags & np.uint64(bar.RANGE_DISABLED)) == 0
        normal = int(pages[plain & live].sum())
        probes = int((~plain & live).sum())
        most = max(1, normal // (PROBE_SHARE * probes)) if normal and probes else 4096
        tickets = np.where(plain, pages, np.minimum(pages, most))[live]
        total = int(tickets.sum())
        if total >= _MAX_PAGES:
            return 1 + count
        out = np.zeros((int(live.sum()), e.RANGE_WORDS), np.uint64)
        out[:, e.G_IOVA] = table[live, 0]
        out[:, e.G_SLOT] = np.where(plain[live], table[live, 2], np.uint64(0))
        out[:, e.G_TAG] = tag[live]
        out[:, e.G_FLAGS] = flags[live]
        out[:, e.G_FIRST] = np.concatenate(([0], np.cumsum(tickets)[:-1])) if len(tickets) else 0
        out[:, e.G_PAGES] = pages[live].astype(np.uint64)
        self.ranges = out
        self.dma[e.D_PAGES] = total
        self.dma[e.D_RNG] = self._seeded(int(self.words[bar.SEED >> 3]))
        self._put(bar.WORKING_SET, int(pages[live].sum()))
        return 0

    def quiesce(self) -> None:
        """Stop between two bursts; afterwards nothing is cached and no DMA is in flight."""
        self.frontend.leave()
        self._last_end = 0
        self._put(bar.STATE, bar.STATE_QUIESCED)
        self._put(bar.ENABLE_ACK, 0)

    def reset(self) -> None:
        """Function-level reset: also forgets ranges and slots."""
        self._put(bar.ENABLE, 0)
        self.quiesce()
        self.shadow = np.zeros(bar.MAX_SLOTS, np.uint64)
        self.ranges = self.ranges[:0]
        self.dma[self._engine.D_PAGES] = 0
        self._put(bar.NRANGES, 0)
        self._put(bar.WORKING_SET, 0)

    def verify_all(self) -> None:
        """Read every written slot back through the IOMMU; results in the status page and in the counters."""
        e = self._engine
        row = np.zeros(bar.STATS_WORDS, np.uint64)
        if self.pages:
            self.dma[e.D_SWEEP], self.dma[e.D_CURSOR] = 1, 0
            self.frontend.enter()
            while int(self.dma[e.D_CURSOR]) < self.pages:
                self.frontend.service()
                self._call(MAX_BURST, row)
            self.dma[e.D_SWEEP] = 0
            if not self.words[bar.ENABLE_ACK >> 3]:
                self.frontend.leave()
        step = self._row()
        step += row
        step[bar.BURSTS] += np.uint64(1)
        reached = np.zeros(len(self.shadow), bool)
        for r in self.ranges:
            flags = int(r[e.G_FLAGS])
            if flags & bar.RANGE_READ and not flags & bar.RANGE_EXPECT_FAULT:
                first = int(r[e.G_SLOT])
                reached[first : first + int(r[e.G_PAGES])] = True
        for offset, value in (
            (bar.VERIFY_CHECKED, row[bar.READS]),
            (bar.VERIFY_LOST, row[bar.LOST]),
            (bar.VERIFY_MISDIRECTED, row[bar.MISDIRECTED]),
            (bar.VERIFY_FAULTS, row[bar.FAULTS]),
            (bar.VERIFY_UNREACHED, np.count_nonzero((self.shadow != 0) & ~reached)),
        ):
            self._put(offset, int(value))

    # -- work -------------------------------------------------------------------------------------------
    def _row(self) -> U64:
        step = int(self.words[bar.STEP >> 3]) % bar.STEPS
        self.dma[self._engine.D_STEP] = step
        row: U64 = self.rows[step]
        return row

    def _call(self, count: int, row: U64) -> int:
        f, p = self.frontend, self.frontend.platform
        # Wrapping multiplications are meant; NumPy scalars warn of them.
        quiet = nullcontext() if self._engine.COMPILED else np.errstate(over="ignore")
        with f.busy, quiet:
            f.prepare()
            tried = self._engine.burst(
                p.ram.words, p.tags, f.hidden, f.page, f.unit, f.tlb, f.pending, f.walker, self.ranges,
                self.shadow, self.dma, row, self.log, count,
            )  # fmt: skip
            f.record()
        self._put(bar.LOGGED, int(self.dma[self._engine.D_LOGGED]))
        return int(tried)

    def run_burst(self, count: int) -> int:
        """Do up to ``count`` transactions now; returns how many were tried (0 without ranges).

        A request whose context cannot be looked up is the last: the next burst looks again.
        """
        if not self.pages:
            return 0
        self.frontend.enter()
        row = self._row()
        begin = time.perf_counter_ns()
        tried = self._call(count, row)
        end = time.perf_counter_ns()
        self._account(row, begin, end, tried)
        return tried

    def _account(self, row: U64, begin: int, end: int, tried: int) -> None:
        e = self._engine
        if not row[bar.BURSTS]:
            row[bar.FIRST_NS] = begin
        row[bar.BURSTS] += np.uint64(1)
        row[bar.LAST_NS] = end
        self._put(bar.BURST_NS_LAST, end - begin)
        self._put(bar.BURST_N_LAST, tried)
        if row[bar.FAULTS]:
            self._put(bar.LAST_REASON, int(self.dma[e.D_REASON]))
            self._put(bar.LAST_IOVA, int(self.dma[e.D_IOVA]))
        if not self.dma[e.D_DONE]:
            return  # nothing was completed: the gap goes on
        delay = self._delay.read()
        late = time.perf_counter_ns() - end
        if late > _SAMPLE_NS:
            # The CPU was lost between the end of the burst and this look: that wait belongs to the next gap.
            delay = max(self._last_delay, delay - late)
        if self._last_end:
            gap = max(0, end - self._last_end - self._planned)
            if gap > int(row[bar.MAX_GAP_NS]):
                row[bar.MAX_GAP_NS] = gap
            on_cpu = gap
            if gap > LONG_GAP_NS:
                on_cpu = max(0, gap - (delay - self._last_delay))
            if on_cpu > int(row[bar.MAX_GAP_ON_CPU_NS]):
                row[bar.MAX_GAP_ON_CPU_NS] = on_cpu
        self._last_end = end
        self._last_delay = delay
        self._planned = 0

    def pump(self) -> float:
        """One round; returns the seconds that may pass until the next (0: at once)."""
        control = self.words[: bar.CONTROL_WORDS].tolist()
        self.words[bar.HEARTBEAT >> 3] += np.uint64(1)
        order = control[bar.COMMAND >> 3]
        if order != self._command:
            self._obey(order)
            return 0.0
        generation = control[bar.GENERATION >> 3]
        if generation != self._generation:
            self._put(bar.GENERATION_ERROR, self.load_ranges())
            self._generation = generation
            self._put(bar.GENERATION_ACK, generation)
        if not control[bar.ENABLE >> 3]:
            if self.words[bar.ENABLE_ACK >> 3] or self.frontend.online:
                self.quiesce()
            return _IDLE_S
        if not self.words[bar.ENABLE_ACK >> 3]:
            self._put(bar.STATE, bar.STATE_RUNNING)
            self._put(bar.ENABLE_ACK, 1)
        if not self.pages:
            self.frontend.leave()
            self._last_end = 0
            return _IDLE_S
        self.frontend.service()
        return self._work(control[bar.BURST >> 3], control[bar.RATE >> 3])

    def _obey(self, order: int) -> None:
        command = order & 0xFF
        if command == bar.CMD_VERIFY_ALL:
            self.verify_all()
        elif command == bar.CMD_FLR:
            self.reset()
        self._command = order
        self._last_end = 0  # a command is no gap
        self._put(bar.COMMAND_ACK, order)

    def _work(self, fixed: int, rate: int) -> float:
        if rate:
            now = time.perf_counter_ns()
            if now < self._next:
                # Short sleeps: the invalidation queue and the control registers still want an answer.
                pause = min(self._next - now, 500_000)
                self._planned += pause
                return pause / 1e9
        count = min(max(fixed, 1), MAX_BURST) if fixed else self._burst
        if rate and not fixed:
            count = max(1, min(count, rate // 200))
        begin = time.perf_counter_ns()
        tried = self.run_burst(count)
        took = max(1, time.perf_counter_ns() - begin)
        if rate:
            # A device that fell behind does not catch up by more than 10 ms.
            self._next = max(self._next, begin - 10_000_000) + tried * 1_000_000_000 // rate
        if not fixed and took < 50 * BURST_NS:
            # (a longer one was interrupted, which says nothing about speed)
            wanted = tried * BURST_NS // took
            self._burst = min(max(wanted, self._burst // 2, MIN_BURST), self._burst * 2, MAX_BURST)
        return 0.0

    def close(self) -> None:
        """Stop for good."""
        self.quiesce()
        self._put(bar.STATE, bar.STATE_ENDED)
        self._delay.close()
