# SPDX-License-Identifier: Apache-2.0
"""The DMA device's BAR: layout, and how a host or a guest driver reads and writes it.

All registers are 64-bit little-endian at 8-byte aligned offsets. Software writes page 0 and the range
table, the device the other pages:

    0x0000  control        0x1000  status        0x2000  counters, one row of 16 words per step
    0x3000  incident log   0x4000  range table, rows of 32 bytes

The functions work on a :class:`Window`: the mapping of a BAR through a transport, or :class:`ArrayWindow`
over the memory of the platform.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, Protocol

import numpy as np

from iokeep.mem.memory import U8, U64

BAR_MAGIC = int.from_bytes(b"iokeepDM", "little")
BAR_VERSION = 1
BAR_BYTES = 0x40000  # default size: 7680 ranges
PAGE = 4096

# -- page 0: control --------------------------------------------------------------------------------
ID = 0x000  # BAR_MAGIC, read-only
VERSION = 0x008  # read-only
INDEX = 0x010  # device index = number of the 64-byte line that it uses in each page; read-only
CAPACITY = 0x018  # rows that fit the range table; read-only
ENABLE = 0x020  # 1: run, 0: quiesce
GENERATION = 0x028  # bumped by software after the range table was written
NRANGES = 0x030  # rows in use
SEED = 0x038  # of the page order; taken with a new generation
BURST = 0x040  # transactions in a burst, 0 = the device aims at bursts of BURST_NS
STEP = 0x048  # number of the step that counters are kept for, 0 ... STEPS - 1; written by the measuring host
RATE = 0x050  # transactions per second, 0 = full speed
COMMAND = 0x058  # sequence << 8 | command; done when COMMAND_ACK says the same
CONTROL_WORDS = 12

CMD_VERIFY_ALL = 1  # read back every written slot that a range reaches
CMD_FLR = 2  # function-level reset: quiesce, forget ranges, slots and cached translations

# -- page 1: status ---------------------------------------------------------------------------------
STATUS = 0x1000
(
    HEARTBEAT,  # counts up while the process lives
    STATE,
    ENABLE_ACK,  # 0: quiesced, no DMA in flight, nothing cached
    GENERATION_ACK,
    GENERATION_ERROR,  # 0, or 1 + number of the row that was refused
    COMMAND_ACK,
    PID,
    WORKING_SET,  # 4 KiB pages in all enabled ranges
    LAST_REASON,  # of the last fault that was not expected
    LAST_IOVA,
    VERIFY_CHECKED,
    VERIFY_LOST,
    VERIFY_MISDIRECTED,
    VERIFY_FAULTS,
    VERIFY_UNREACHED,  # written slots that no enabled, readable range reaches
    COMPILE_NS,  # time to get the compiled engine
    BURST_NS_LAST,  # duration of the last burst
    BURST_N_LAST,  # transactions in it
    LOGGED,  # incidents since power-on; the first LOG_ROWS are in the log
) = (STATUS + 8 * i for i in range(19))
STATUS_WORDS = 19

STATE_OFF = 0
STATE_STARTING = 1  # the engine is being compiled or loaded
STATE_QUIESCED = 2
STATE_RUNNING = 3
STATE_ENDED = 4
STATE_TEXT = {0: "off", 1: "starting", 2: "quiesced", 3: "running", 4: "ended"}

# -- page 2: counters -------------------------------------------------------------------------------
STATS = 0x2000
STEPS = 32
STATS_WORDS = 16
(
    TRANSACTIONS, BYTES, READS, WRITES, FAULTS, LOST, MISDIRECTED, DENIED, LEAKS, UNTRANSLATED, MAX_GAP_NS,
    MAX_GAP_ON_CPU_NS, BURSTS, FIRST_NS, LAST_NS, _SPARE,
) = range(STATS_WORDS)  # fmt: skip

# -- page 3: incident log ---------------------------------------------------------------------------
LOG = 0x3000
LOG_ROWS = 64
LOG_WORDS = 8
INCIDENT_FAULT = 1
INCIDENT_LOST = 2
INCIDENT_TAG = 3
INCIDENT_CONTENT = 4
INCIDENT_LEAK = 5
INCIDENT_UNTRANSLATED = 6
INCIDENT_NO_MEMORY = 7
INCIDENT_TEXT = {
    INCIDENT_FAULT: "fault",
    INCIDENT_LOST: "an older own payload was read: a write was lost",
    INCIDENT_TAG: "the frame has another owner",
    INCIDENT_CONTENT: "a foreign payload was read",
    INCIDENT_LEAK: "an access went through that had to fault",
    INCIDENT_UNTRANSLATED: "translation is disabled",
    INCIDENT_NO_MEMORY: "the pa is beyond the memory",
}

# -- range table ------------------------------------------------------------------------------------
RANGES = 0x4000
RANGE_BYTES = 32
RANGE_READ = 1
RANGE_WRITE = 2
RANGE_EXPECT_FAULT = 4
RANGE_DISABLED = 8
#: slots 0 ... MAX_SLOTS - 1 exist: one per 4 KiB page of payload
MAX_SLOTS = 1 << 24
LINE_BYTES = 64


class Window(Protocol):
    """A mapped BAR: byte access at byte offsets."""

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes at ``offset``."""
        ...

    def write(self, offset: int, data: bytes) -> None:
        """Store ``data`` at ``offset``."""
        ...


class ArrayWindow:
    """A BAR in the memory of the platform.

    :ivar bytes: uint8[n]. :ivar words: uint64[n / 8], the same memory.
    """

    def __init__(self, array: U8) -> None:
        self.bytes = array
        self.words: U64 = array.view(np.uint64)

    def read(self, offset: int, length: int) -> bytes:
        """See :meth:`Window.read`."""
        return self.bytes[offset : offset + length].tobytes()

    def write(self, offset: int, data: bytes) -> None:
        """See :meth:`Window.write`; an aligned register is one store."""
        if len(data) == 8 and not offset & 7:
            self.words[offset >> 3] = np.uint64(int.from_bytes(data, "little"))
        else:
            self.bytes[offset : offset + len(data)] = np.frombuffer(data, np.uint8)


class RangeRow(NamedTuple):
    """One row of the range table.

    :param iova: first IOVA, :param last: last IOVA (closed); whole 4096-byte pages.
    :param slot_base: slot of the first page; a slot stands for one page of the *file* behind it, so that two
        ranges over the same file page share it. :param tag: owner tag that every frame of the range must
        have.
    :param flags: of RANGE_*.
    """

    iova: int
    last: int
    slot_base: int
    tag: int
    flags: int = RANGE_READ | RANGE_WRITE


@dataclass(frozen=True, slots=True)
class StepStats:
    """Counters of one step, or their sum. Times in ns, of ``time.perf_counter_ns``."""

    transactions: int = 0
    bytes: int = 0
    reads: int = 0
    writes: int = 0
    faults: int = 0  # that were not expected
    lost: int = 0
    misdirected: int = 0
    denied: int = 0  # expected faults that came
    leaks: int = 0  # accesses that had to fault and went through; also in misdirected
    untranslated: int = 0  # requests while translation was disabled; also in misdirected
    max_gap_ns: int = 0
    max_gap_on_cpu_ns: int = 0  # without the time that the device waited for a CPU
    bursts: int = 0
    first_ns: int = 0
    last_ns: int = 0

    def __add__(self, other: StepStats) -> StepStats:
        if not other.bursts:
            return self
        if not self.bursts:
            return other
        values = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        for name in ("max_gap_ns", "max_gap_on_cpu_ns", "last_ns"):
            values[name] = max(getattr(self, name), getattr(other, name))
        values["first_ns"] = min(self.first_ns, other.first_ns)
        return StepStats(**values)


@dataclass(frozen=True, slots=True)
class Stats:
    """Counters of a device: ``steps[i]`` for each step number, ``total`` of all."""

    steps: tuple[StepStats, ...]
    total: StepStats


@dataclass(frozen=True, slots=True)
class Status:
    """The status page."""

    heartbeat: int
    state: int
    enable_ack: int
    generation_ack: int
    generation_error: int
    command_ack: int
    pid: int
    working_set: int
    last_reason: int
    last_iova: int
    verify_checked: int
    verify_lost: int
    verify_misdirected: int
    verify_faults: int
    verify_unreached: int
    compile_ns: int
    burst_ns_last: int
    burst_n_last: int
    logged: int


@dataclass(frozen=True, slots=True)
class Incident:
    """One row of the incident log; ``kind`` of INCIDENT_*; sequences are 0 where they do not apply."""

    kind: int
    step: int
    iova: int
    pa: int
    expected_tag: int
    found_tag: int
    reason: int
    slot: int
    expected_sequence: int
    found_sequence: int

    def text(self, fault_text: Callable[[int], str]) -> str:
        """One line for a person; ``fault_text`` is that of the IOMMU."""
        what = INCIDENT_TEXT.get(self.kind, f"incident {self.kind}")
        where = (
            f"iova {self.iova:#x} -> pa {self.pa:#x}"
            if self.kind != INCIDENT_FAULT
            else f"iova {self.iova:#x}"
        )
        if self.kind == INCIDENT_FAULT:
            what += f" {self.reason:#x} ({fault_text(self.reason)})"
        return f"step {self.step}: {what}: {where}, tag {self.found_tag:#x}, " + (
            f"expected {self.expected_tag:#x}, slot {self.slot}, sequence {self.found_sequence}, "
            f"expected {self.expected_sequence}"
        )


class HasBars(Protocol):
    """What has one BAR per device: the platform."""

    bars: Sequence[ArrayWindow]


def read_register(window: Window, offset: int) -> int:
    """One 64-bit register."""
    return int.from_bytes(window.read(offset, 8), "little")


def write_register(window: Window, offset: int, value: int) -> None:
    """Write one 64-bit register."""
    window.write(offset, value.to_bytes(8, "little"))


def power_on(window: Window, index: int, bar_bytes: int) -> None:
    """Reset values of a new BAR."""
    write_register(window, ID, BAR_MAGIC)
    write_register(window, VERSION, BAR_VERSION)
    write_register(window, INDEX, index)
    write_register(window, CAPACITY, (bar_bytes - RANGES) // RANGE_BYTES)


def wait_register(window: Window, offset: int, value: int, timeout: float, what: str) -> None:
    """Poll a register until it equals ``value``. :raises TimeoutError: after ``timeout`` seconds."""
    end = time.monotonic() + timeout
    while (found := read_register(window, offset)) != value:
        if time.monotonic() > end:
            state = STATE_TEXT.get(read_register(window, STATE), "?")
            raise TimeoutError(f"device ({state}): {what}: {found} instead of {value} after {timeout} s")
        time.sleep(0.0002)


def wait_ready(window: Window, *, timeout: float = 60.0) -> None:
    """Wait until the device's process takes orders; its first start ever compiles for some seconds.

    :raises TimeoutError: it does not, or it has ended.
    """
    end = time.monotonic() + timeout
    while (state := read_register(window, STATE)) not in (STATE_QUIESCED, STATE_RUNNING):
        if time.monotonic() > end:
            raise TimeoutError(f"device: {STATE_TEXT.get(state, state)} after {timeout} s")
        time.sleep(0.002)


def enable(window: Window, on: bool = True, *, timeout: float = 10.0) -> None:
    """Start the device, or quiesce it; returns when it has done so. ``timeout`` 0 does not wait."""
    write_register(window, ENABLE, int(on))
    if timeout:
        wait_register(window, ENABLE_ACK, int(on), timeout, "enable" if on else "quiesce")


def encode_ranges(rows: Iterable[RangeRow]) -> bytes:
    """The range table as bytes."""
    rows = list(rows)
    words = np.zeros((len(rows), RANGE_BYTES // 8), np.uint64)
    for i, row in enumerate(rows):
        if row.iova & 0xFFF or (row.last + 1) & 0xFFF or not 0 <= row.iova < row.last < 1 << 64:
            raise ValueError(f"range [{row.iova:#x}, {row.last:#x}] is not whole 4096-byte pages")
        words[i] = (row.iova, row.last, row.slot_base, row.flags << 32 | row.tag)
    return words.tobytes()


def decode_ranges(window: Window) -> list[RangeRow]:
    """The range table in force or about to be."""
    count = min(read_register(window, NRANGES), read_register(window, CAPACITY))
    words = np.frombuffer(window.read(RANGES, count * RANGE_BYTES), np.uint64).reshape(count, 4)
    return [RangeRow(a, b, c, d & 0xFFFFFFFF, d >> 32) for a, b, c, d in words.tolist()]


def write_ranges(window: Window, rows: Iterable[RangeRow], *, timeout: float = 10.0) -> int:
    """Give the device a new range table; returns its generation.

    The device copies the table between two bursts and acknowledges the generation, so the table is written
    only while the last one is acknowledged. ``timeout`` 0: neither that is awaited nor the acknowledgement.

    :raises ValueError: a row is malformed, there are too many, or the device refused a row.
    :raises TimeoutError: the device does not answer.
    """
    raw = encode_ranges(rows)
    count, capacity = len(raw) // RANGE_BYTES, read_register(window, CAPACITY)
    if count > capacity:
        raise ValueError(f"{count} ranges, but the table of this BAR holds {capacity}")
    generation = read_register(window, GENERATION)
    if timeout:
        wait_register(window, GENERATION_ACK, generation, timeout, "the last range table is not taken")
    if raw:
        window.write(RANGES, raw)
    write_register(window, NRANGES, count)
    write_register(window, GENERATION, generation + 1)
    if timeout:
        wait_register(window, GENERATION_ACK, generation + 1, timeout, "the range table is not taken")
        error = read_register(window, GENERATION_ERROR)
        if error:
            raise ValueError(f"the device refused row {error - 1} of the range table")
    return generation + 1


def command(window: Window, number: int, *, timeout: float = 60.0) -> None:
    """Run CMD_VERIFY_ALL or CMD_FLR and wait for it; ``timeout`` 0 does not wait."""
    sequence = (read_register(window, COMMAND) >> 8) + 1
    write_register(window, COMMAND, sequence << 8 | number)
    if timeout:
        wait_register(window, COMMAND_ACK, sequence << 8 | number, timeout, f"command {number}")


def set_step(window: Window, step: int) -> None:
    """Counters go to this step from the next burst on."""
    if not 0 <= step < STEPS:
        raise ValueError(f"step {step} is not 0 ... {STEPS - 1}")
    write_register(window, STEP, step)


def read_status(window: Window) -> Status:
    """The status page."""
    return Status(*np.frombuffer(window.read(STATUS, STATUS_WORDS * 8), np.uint64).tolist())


def decode_stats(window: Window) -> Stats:
    """The counters, through any window."""
    rows = np.frombuffer(window.read(STATS, STEPS * STATS_WORDS * 8), np.uint64).reshape(STEPS, STATS_WORDS)
    steps = tuple(StepStats(*row[:_SPARE]) for row in rows.tolist())
    return Stats(steps, sum(steps, StepStats()))


def read_stats(platform: HasBars, index: int) -> Stats:
    """The counters of device ``index``."""
    return decode_stats(platform.bars[index])


def read_incidents(window: Window) -> list[Incident]:
    """The first LOG_ROWS incidents since power-on."""
    count = min(read_register(window, LOGGED), LOG_ROWS)
    rows = np.frombuffer(window.read(LOG, count * LOG_WORDS * 8), np.uint64).reshape(count, LOG_WORDS)
    low = 0xFFFFFFFF
    return [
        Incident(r[0] & 0xFF, r[0] >> 8, r[1], r[2], r[3] & low, r[3] >> 32, r[4], r[5], r[6], r[7])
        for r in rows.tolist()
    ]
