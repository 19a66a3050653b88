# SPDX-License-Identifier: Apache-2.0
"""An IOMMU, whatever its kind: registers, a queue of commands, the look-up of a requester's table.

A unit is pages of shared memory with no process behind them: the logic of a register runs in whoever
accesses it, and what must be atomic between processes is done under the :class:`HardwareLock`. The IOMMU has
one *front-end* per device (its own context cache, IOTLB and pending faults), which runs in the process of the
device: :mod:`iokeep.soft.hardware.iommu`. The kinds are in :mod:`iokeep.soft.hardware.units`.

What a kind must say about itself is abstract in :class:`Unit`. Its commands reach the front-ends in neutral
words (:class:`Invalidation`), and so does what it found for a requester (:class:`Context`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from iokeep.errors import MemoryAbsent
from iokeep.mem.memory import U64
from iokeep.mem.ram import Ram
from iokeep.pt.roots.base import RootFault, TableRoot
from iokeep.pt.roots.find import Found, find_root_of

PAGE = 4096
MAX_DEVICES = 64
#: the registers of every kind fit; one whose pages lie further apart folds the gap (SMMU: page 1 is at 64K)
BANK_PAGES = 4
_LAST = 2**64 - 1

# -- hidden state of a unit: words of a page that no register reaches ----------------------------------
(
    H_TRANSLATING,  # DMA is translated
    H_EPOCH,  # bumped at each change of the queue's enable bit: odd = enabled
    H_ERROR,  # the queue stopped at a bad command
    H_START,  # head of the queue when it was last enabled
) = range(4)
H_UNIT = 16  # from here on each kind has its own

# -- hidden registers of a front-end: words of its page ----------------------------------------------
(
    FE_ONLINE,  # 1: it may hold cached entries or DMA in flight, so that the queue must wait for it
    FE_HEAD,  # place in the queue of the next command
    FE_EPOCH,  # epoch in which FE_HEAD counts
    FE_STOPPED,  # it stopped at a bad command
    FE_OVERFLOW,  # a fault was lost because there was no room for its record
    FE_FAULTS,  # faults since power-on
    FE_INVALIDATIONS,  # commands consumed since power-on
    FE_HITS,  # IOTLB hits
    FE_MISSES,  # IOTLB misses
    FE_PID,  # process that runs it
) = range(10)

# -- how a walk ends without a translation; Context.codes is indexed by these, less 1 --------------------
W_ACCESS = 1  # a table is not in memory
W_NOT_PRESENT = 2  # an item is not present, or the IOVA bits of skipped levels are not 0
W_RESERVED = 3  # an item has reserved bits or a reserved value
W_DENIED = 4  # the path does not grant the access
W_WIDTH = 5  # the IOVA is outside of every table
OUTCOMES = 5


def requester_id(index: int) -> int:
    """Requester id of device ``index``: 00:04.0, 00:05.0, ... and on to the next bus."""
    slot = 4 + index
    return slot // 32 << 8 | slot % 32 << 3


@dataclass(frozen=True, slots=True)
class Context:
    """What the context cache holds for one requester after a look-up.

    :param table: its page table. :param owner: tag of its cached translations, below 2**48; each unit packs
        into it what its commands select by (domain id, PASID, ASID, VMID, stage).
    :param codes: fault codes for (reads, writes), each by outcome: W_ACCESS, ... W_WIDTH; below 2**32.
    :param prot: rights that the entries above the table let through (1 read, 2 write).
    :param upper: a second table for the IOVAs that ``table`` does not cover (SMMU: that of TTB1).
    :param silent: faults are not recorded.
    """

    table: TableRoot
    owner: int
    codes: tuple[tuple[int, ...], tuple[int, ...]]
    prot: int = 3
    upper: TableRoot | None = None
    silent: bool = False


@dataclass(frozen=True, slots=True)
class Match:
    """``value & mask == want``, of a requester id or of an owner tag."""

    mask: int
    want: int

    def __call__(self, value: int) -> bool:
        """It matches."""
        return value & self.mask == self.want


#: every value
ANY = Match(0, 0)


@dataclass(frozen=True, slots=True)
class Invalidation:
    """One command. With nothing set: a command (of any sort) that no cache has to do anything for.

    :param context: forget cached contexts whose (requester id, owner) both match.
    :param tlb: forget translations whose owner matches and of whose page any byte is in [start, last].
    :param status: (pa, data, bytes): store ``data`` in 4 or 8 ``bytes`` when all front-ends have passed.
    """

    context: tuple[Match, Match] | None = None
    tlb: tuple[Match, int, int] | None = None
    status: tuple[int, int, int] | None = None


#: all translations of an owner: ``Invalidation(tlb=(match, *EVERYWHERE))``
EVERYWHERE = (0, _LAST)


class Fault(NamedTuple):
    """One fault, to be recorded. ``need``: 1 read, 2 write. ``owner``: 0 where there was no context."""

    code: int
    iova: int
    need: int
    owner: int


@dataclass(frozen=True, slots=True)
class Ring:
    """Where the queue of commands lies, as the registers say.

    :param pa: of its memory. :param size: bytes of it. :param step: bytes of one command, a multiple of 8.
    :param span: heads and tails count bytes modulo ``span``: ``size``, or twice that where the registers have
        a wrap bit, so that a full queue differs from an empty one.
    """

    pa: int
    size: int
    step: int
    span: int


_process_lock = threading.RLock()


class HardwareLock:
    """Mutual exclusion between all processes (and threads) that share the registers memfd.

    POSIX record locks: the kernel drops the lock of a process that dies, so that a killed device never blocks
    the IOMMU.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._depth = 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock; re-entrant."""
        with _process_lock:
            if self._depth == 0:
                fcntl.lockf(self._fd, fcntl.LOCK_EX, 1, 0, os.SEEK_SET)
            with self._entered():
                yield

    @contextmanager
    def tried(self) -> Iterator[bool]:
        """Hold the lock if nobody else does; the value says whether."""
        if not _process_lock.acquire(blocking=False):
            yield False
            return
        try:
            if self._depth == 0:
                try:
                    fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0, os.SEEK_SET)
                except OSError as e:
                    if e.errno not in (errno.EACCES, errno.EAGAIN):
                        raise
                    yield False
                    return
            with self._entered():
                yield True
        finally:
            _process_lock.release()

    @contextmanager
    def _entered(self) -> Iterator[None]:
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, 0, os.SEEK_SET)


class CommandQueue:
    """The queue of commands as the hardware side sees it.

    Every front-end that is online consumes the queue with a head of its own. The head register follows the
    slowest; the status of a wait is written when all have passed it, that is, with their DMA drained and
    their caches invalidated. While no front-end is online nothing is cached, and whoever writes the tail
    completes the queue.
    """

    def __init__(self, unit: Unit) -> None:
        self._unit = unit
        self._hidden = unit.hidden
        self._fe = unit.front_ends
        self._ram = unit.ram
        self._ram32 = unit.ram.bytes.view(np.uint32)
        self._lock = unit.lock

    @property
    def epoch(self) -> int:
        """Number of changes of the enable bit; odd while the queue is enabled."""
        return int(self._hidden[H_EPOCH])

    @property
    def enabled(self) -> bool:
        """Commands are consumed."""
        return bool(self.epoch & 1)

    @property
    def failed(self) -> bool:
        """It stopped at a bad command."""
        return bool(self._hidden[H_ERROR])

    def _words(self, ring: Ring, at: int) -> tuple[int, ...] | None:
        try:
            raw = self._ram.read(ring.pa + at % ring.size, ring.step)
        except MemoryAbsent:
            return None
        return tuple(int.from_bytes(raw[i : i + 8], "little") for i in range(0, len(raw), 8))

    def fetch(self, ring: Ring, at: int) -> Invalidation | None:
        """The command at ``at``; None if it is bad or not in memory."""
        words = self._words(ring, at)
        return None if words is None else self._unit.decode(words)

    def head(self, index: int) -> int:
        """Head of a front-end in the present epoch."""
        page = self._fe[index]
        return int(page[FE_HEAD] if int(page[FE_EPOCH]) == self.epoch else self._hidden[H_START])

    def complete(self) -> None:
        """Move the head register up to the slowest head, writing the status of the waits passed."""
        with self._lock.held():
            unit, hidden = self._unit, self._hidden
            if not self.enabled:
                return
            online = [i for i in range(len(self._fe)) if self._fe[i, FE_ONLINE]]
            if not online and hidden[H_ERROR]:
                return
            ring, at = unit.ring(), unit.queue_head
            heads = [self.head(i) for i in online] or [unit.queue_tail]
            left = min((head - at) % ring.span for head in heads)
            while left > 0:
                item = self.fetch(ring, at)
                if item is None:
                    self._fail(ring, at)
                    return
                if item.status is not None:
                    self._store(*item.status)
                at = (at + ring.step) % ring.span
                left -= ring.step
                unit.queue_head = at
            if any(self._fe[i, FE_STOPPED] and self.head(i) == at for i in online):
                self._fail(ring, at)

    def _store(self, pa: int, data: int, size: int) -> None:
        if size == 4 and pa >> 2 < self._ram32.size:
            self._ram32[pa >> 2] = np.uint32(data)
        elif size == 8 and pa >> 3 < self._ram.words.size:
            self._ram.words[pa >> 3] = np.uint64(data)

    def _fail(self, ring: Ring, at: int) -> None:
        if not self._hidden[H_ERROR]:
            self._hidden[H_ERROR] = np.uint64(1)
            self._unit.queue_failed(self._words(ring, at))

    def try_complete(self) -> bool:
        """:meth:`complete`, unless somebody else holds the lock; False: call again later.

        A device must not stop because the process of a kernel was descheduled with the lock held.
        """
        with self._lock.tried() as held:
            if held:
                self.complete()
            return held

    def kick(self) -> None:
        """The tail moved.

        Front-ends that are online complete the queue themselves, between two bursts. The lock orders the
        store of the tail and this look against a front-end that leaves.
        """
        with self._lock.held():
            if not self._fe[:, FE_ONLINE].any():
                self.complete()
        for service in self._unit.local_front_ends.values():
            service()

    def enter(self, index: int) -> None:
        """A front-end with empty caches goes online: what is in the queue so far does not concern it."""
        with self._lock.held():
            page = self._fe[index]
            page[FE_HEAD] = np.uint64(self._unit.queue_tail)
            page[FE_EPOCH] = self._hidden[H_EPOCH]
            page[FE_STOPPED] = np.uint64(0)
            page[FE_PID] = np.uint64(os.getpid())
            page[FE_ONLINE] = np.uint64(1)
            self.complete()

    def leave(self, index: int) -> None:
        """A front-end goes offline: its caches are empty and its DMA is drained (or its process is dead)."""
        with self._lock.held():
            self._fe[index, FE_ONLINE] = np.uint64(0)
            self._fe[index, FE_STOPPED] = np.uint64(0)
            self.complete()

    def set_enabled(self, on: bool, head: int = 0) -> None:
        """The enable bit has this value now; a queue that becomes enabled begins at ``head``."""
        with self._lock.held():
            if on == self.enabled:
                return
            if on:
                self._unit.queue_head = head
                self._hidden[H_START] = np.uint64(head)
                self._hidden[H_ERROR] = np.uint64(0)
                self._fe[:, FE_STOPPED] = np.uint64(0)
            self._hidden[H_EPOCH] += np.uint64(1)
            if on:
                self.complete()

    def stopped(self) -> bool:
        """After it was disabled: no front-end reads the queue any more."""
        epoch = self.epoch
        return not any(p[FE_ONLINE] and int(p[FE_EPOCH]) != epoch for p in self._fe)

    def clear_error(self) -> None:
        """Software has mended the bad command: go on with it."""
        self._fe[:, FE_STOPPED] = np.uint64(0)
        self._hidden[H_ERROR] = np.uint64(0)
        self.kick()


class Unit(ABC):
    """The registers of an IOMMU as software sees them, and what its front-ends need of it.

    :param bank: uint64[BANK_PAGES * 512], registers. :param hidden: uint64[512], H_* and the kind's own.
    :param front_ends: uint64[n, 512], FE_* of each. All three are shared between processes.

    :ivar bank32: ``bank`` as uint32. :ivar queue: the hardware side of the command queue.
    """

    #: the kind, as :func:`iokeep.pt.roots.find.find_root_of` calls it
    KIND: ClassVar[str]

    def __init__(self, bank: U64, hidden: U64, front_ends: U64, ram: Ram, lock: HardwareLock) -> None:
        self.bank = bank
        self.bank32 = bank.view(np.uint32)
        self.hidden = hidden
        self.front_ends = front_ends
        self.ram = ram
        self.lock = lock
        self.queue = CommandQueue(self)
        #: ``service`` of the front-ends that run in this very process, by index: they answer at once
        self.local_front_ends: dict[int, Callable[[], int]] = {}

    # -- for software ------------------------------------------------------------------------------------
    @abstractmethod
    def power_on(self) -> None:
        """Reset values of a new platform, whose pages are zero."""

    @abstractmethod
    def read32(self, offset: int) -> int:
        """Read a 32-bit register at a byte offset. :raises ValueError: there is none."""

    @abstractmethod
    def read64(self, offset: int) -> int:
        """Read a 64-bit register at a byte offset. :raises ValueError: there is none."""

    @abstractmethod
    def write32(self, offset: int, value: int) -> None:
        """Write a 32-bit register. :raises ValueError: it does not exist here or is read-only."""

    @abstractmethod
    def write64(self, offset: int, value: int) -> None:
        """Write a 64-bit register. :raises ValueError: it does not exist here or is read-only."""

    @abstractmethod
    def hw(self) -> Mapping[str, object]:
        """The registers that lead to the tables, as the ``hw`` part of a capture's meta.json has them."""

    @abstractmethod
    def fault_text(self, code: int) -> str:
        """What a fault code says, for a person."""

    # -- for front-ends ----------------------------------------------------------------------------------
    @property
    def translating(self) -> bool:
        """DMA is translated."""
        return bool(self.hidden[H_TRANSLATING])

    @translating.setter
    def translating(self, on: bool) -> None:
        self.hidden[H_TRANSLATING] = np.uint64(on)

    @abstractmethod
    def look_up(self, device_id: int) -> Context:
        """Follow the registers through memory to the table of a requester.

        :raises RootFault: they lead to none that this hardware can walk.
        """

    def found(self, device_id: int, hw: Mapping[str, object] | None = None) -> Found:
        """:func:`~iokeep.pt.roots.find.find_root_of` for this unit's registers, or for ``hw``."""
        found = find_root_of(self.hw() if hw is None else hw, self.ram, device_id, iommu=self.KIND)
        if found is None:
            raise ValueError(f"{self.KIND}: no registers")
        return found

    def silent(self, _fault: RootFault) -> bool:
        """An entry on the way says that this fault of a look-up is not recorded."""
        return False

    @abstractmethod
    def record_faults(self, index: int, faults: Sequence[Fault], dropped: int) -> None:
        """Record faults of front-end ``index`` as software will find them; the lock is held.

        :param dropped: faults after these that were not kept.
        """

    # -- for the queue -----------------------------------------------------------------------------------
    @abstractmethod
    def ring(self) -> Ring:
        """Geometry of the command queue."""

    @property
    @abstractmethod
    def queue_head(self) -> int:
        """The head register, in bytes modulo ``ring().span``; set by the queue as commands complete."""

    @queue_head.setter
    @abstractmethod
    def queue_head(self, head: int) -> None: ...

    @property
    @abstractmethod
    def queue_tail(self) -> int:
        """The tail register, in bytes modulo ``ring().span``. Read before each burst: keep it quick."""

    @abstractmethod
    def decode(self, words: tuple[int, ...]) -> Invalidation | None:
        """A command of ``ring().step`` bytes; None where hardware stops with an error."""

    def queue_failed(self, words: tuple[int, ...] | None) -> None:  # noqa: B027 - nothing by default
        """The queue stopped at a bad command; the head register stands at it and the lock is held.

        :param words: the command, None: it is not in memory.
        """
