# SPDX-License-Identifier: Apache-2.0
"""VT-d register bank: offsets, fields, capabilities, and what a write does.

Source: VT-d specification revision 4.x, chapter 11 (register descriptions) and 6.5.2 (queued invalidation);
offsets checked against Linux drivers/iommu/intel/iommu.h.

The bank is a page of shared memory with no process behind it: the logic of a register runs in whoever
accesses it through :class:`Registers`, and what must be atomic between processes is done under a lock. The
IOMMU has one *front-end* per device (its own context cache, IOTLB and fault record); each has a page of
hidden registers, see ``FE_*``.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from iokeep.errors import MemoryAbsent
from iokeep.mem.memory import U64
from iokeep.mem.ram import Ram
from iokeep.pt.roots import vtd

PAGE = 4096
BANK_WORDS = PAGE // 8
MAX_DEVICES = 64

# -- offsets (bytes), specification chapter 11 -----------------------------------------------------
DMAR_VER_REG = 0x00
DMAR_CAP_REG = 0x08
DMAR_ECAP_REG = 0x10
DMAR_GCMD_REG = 0x18
DMAR_GSTS_REG = 0x1C
DMAR_RTADDR_REG = 0x20
DMAR_FSTS_REG = 0x34
DMAR_IQH_REG = 0x80
DMAR_IQT_REG = 0x88
DMAR_IQA_REG = 0x90
DMAR_FRCD_REG = 0x220  # CAP_REG.FRO * 16; one record of 16 bytes per front-end

# -- GCMD_REG and GSTS_REG ---------------------------------------------------------------------------
DMA_GCMD_TE = 1 << 31
DMA_GCMD_SRTP = 1 << 30
DMA_GCMD_QIE = 1 << 26
DMA_GSTS_TES = 1 << 31
DMA_GSTS_RTPS = 1 << 30
DMA_GSTS_QIES = 1 << 26

# -- FSTS_REG ----------------------------------------------------------------------------------------
DMA_FSTS_PFO = 1 << 0
DMA_FSTS_PPF = 1 << 1
DMA_FSTS_IQE = 1 << 4
DMA_FSTS_FRI_SHIFT = 8

# -- FRCD_REG, second word ---------------------------------------------------------------------------
FRCD_F = 1 << 63
FRCD_READ = 1 << 62  # T1: 1 = read request, 0 = write request
FRCD_REASON_SHIFT = 32

# -- IQA_REG, IQT_REG --------------------------------------------------------------------------------
IQA_QS_MASK = 7  # the queue is 4096 << QS bytes
IQA_DW = 1 << 11  # descriptors of 256 bits
IQT_MASK = 0x7FFF0

# -- hidden state of the model, behind the last register that this IOMMU has --------------------------
HIDDEN_ROOT = 0xF00  # RTADDR_REG as latched by GCMD_REG.SRTP
HIDDEN_EPOCH = 0xF08  # bumped at each change of GCMD_REG.QIE: odd = enabled
HIDDEN_IQE = 0xF10  # invalidation queue error found while no front-end was online

# -- hidden registers of a front-end: words of its page ----------------------------------------------
(
    FE_ONLINE,  # 1: it may hold cached entries or DMA in flight, so that the queue must wait for it
    FE_HEAD,  # byte offset into the queue of the next descriptor
    FE_EPOCH,  # epoch in which FE_HEAD counts
    FE_IQE,  # it stopped at a bad descriptor
    FE_PFO,  # a fault came while its fault record was full
    FE_FAULTS,  # faults since power-on
    FE_INVALIDATIONS,  # descriptors consumed since power-on
    FE_HITS,  # IOTLB hits
    FE_MISSES,  # IOTLB misses
    FE_PID,  # process that runs it
) = range(10)

MAMV = 18  # page-selective invalidation of up to 2**18 pages


def capabilities(n_devices: int) -> tuple[int, int, int]:
    """(VER_REG, CAP_REG, ECAP_REG) of this IOMMU: what the model does, and nothing that it does not do."""
    cap = (
        6  # ND: 16-bit domain ids
        | 0b01110 << 8  # SAGAW: 3, 4 and 5 levels
        | (57 - 1) << 16  # MGAW
        | (DMAR_FRCD_REG // 16) << 24  # FRO
        | 0b0011 << 34  # SSLPS: 2M and 1G
        | 1 << 39  # PSI: page-selective invalidation
        | (n_devices - 1) << 40  # NFR
        | MAMV << 48
        | 3 << 54  # DWD, DRD: writes and reads are drained
        | 1 << 56  # FS1GP
        | 1 << 60  # FS5LP
    )
    ecap = (
        1  # C: page walks are coherent
        | 1 << 1  # QI
        | 0xF << 8  # IRO: where the register-based interface would be; only the queue is modelled
        | 1 << 43  # SMTS
        | 1 << 46  # SSTS
        | 1 << 47  # FSTS
        | 1 << 48  # SMPWCS
    )
    return 0x40, cap, ecap


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


class Queue:
    """The invalidation queue as the hardware side sees it (specification 6.5.2).

    Every front-end that is online consumes the queue with a head of its own. ``IQH_REG`` follows the slowest;
    the status of a wait descriptor is written when all have passed it, that is, with their DMA drained and
    their caches invalidated. While no front-end is online nothing is cached, and whoever writes the tail
    completes the queue.
    """

    def __init__(self, bank: U64, front_ends: U64, ram: Ram, lock: HardwareLock) -> None:
        self._bank = bank
        self._fe = front_ends
        self._ram = ram
        self._ram32 = ram.bytes.view(np.uint32)
        self._lock = lock

    def _get(self, offset: int) -> int:
        return int(self._bank[offset >> 3])

    @property
    def epoch(self) -> int:
        """Number of changes of GCMD_REG.QIE; odd while the queue is enabled."""
        return self._get(HIDDEN_EPOCH)

    @property
    def size(self) -> int:
        """Bytes of the queue."""
        return PAGE << (self._get(DMAR_IQA_REG) & IQA_QS_MASK)

    @property
    def step(self) -> int:
        """Bytes of one descriptor: 16 or 32."""
        return 32 if self._get(DMAR_IQA_REG) & IQA_DW else 16

    def fetch(self, offset: int) -> vtd.Invalidation | None:
        """The descriptor at a byte offset of the queue; None if it is bad or not in memory."""
        pa = (self._get(DMAR_IQA_REG) & vtd.PA_MASK) + offset
        try:
            raw = self._ram.read(pa, self.step)
        except MemoryAbsent:
            return None
        return vtd.decode_descriptor(tuple(int(w) for w in np.frombuffer(raw, np.uint64)))

    def head(self, index: int) -> int:
        """Head of a front-end in the present epoch (byte offset)."""
        page = self._fe[index]
        return int(page[FE_HEAD]) if int(page[FE_EPOCH]) == self.epoch else 0

    def complete(self) -> None:
        """Move IQH_REG up to the slowest head, writing the status of the wait descriptors passed."""
        with self._lock.held():
            epoch = self.epoch
            if not epoch & 1:
                return
            size, step = self.size, self.step
            at = self._get(DMAR_IQH_REG)
            online = [i for i in range(len(self._fe)) if self._fe[i, FE_ONLINE]]
            heads = [self.head(i) for i in online] or [self._get(DMAR_IQT_REG)]
            left = min((head - at) % size for head in heads)
            if not online and self._get(HIDDEN_IQE):
                return
            while left > 0:
                item = self.fetch(at)
                if item is None:
                    self._bank[HIDDEN_IQE >> 3] = np.uint64(1)
                    return
                if item.status_pa is not None and item.status_pa >> 2 < self._ram32.size:
                    self._ram32[item.status_pa >> 2] = np.uint32(item.status_data)
                at = (at + step) % size
                left -= step
                self._bank[DMAR_IQH_REG >> 3] = np.uint64(at)

    def try_complete(self) -> bool:
        """:meth:`complete`, unless somebody else holds the lock; False: call again later.

        A device must not stop because the process of a kernel was descheduled with the lock held.
        """
        with self._lock.tried() as held:
            if held:
                self.complete()
            return held

    def enter(self, index: int) -> None:
        """A front-end with empty caches goes online: what is in the queue so far does not concern it."""
        with self._lock.held():
            page = self._fe[index]
            page[FE_HEAD] = self._bank[DMAR_IQT_REG >> 3]
            page[FE_EPOCH] = self._bank[HIDDEN_EPOCH >> 3]
            page[FE_IQE] = np.uint64(0)
            page[FE_PID] = np.uint64(os.getpid())
            page[FE_ONLINE] = np.uint64(1)
            self.complete()

    def leave(self, index: int) -> None:
        """A front-end goes offline: its caches are empty and its DMA is drained (or its process is dead)."""
        with self._lock.held():
            self._fe[index, FE_ONLINE] = np.uint64(0)
            self._fe[index, FE_IQE] = np.uint64(0)
            self.complete()

    def set_enabled(self, on: bool) -> None:
        """GCMD_REG.QIE changed."""
        with self._lock.held():
            if on == bool(self.epoch & 1):
                return
            if on:
                self._bank[DMAR_IQH_REG >> 3] = np.uint64(0)
                self._bank[HIDDEN_IQE >> 3] = np.uint64(0)
            self._bank[HIDDEN_EPOCH >> 3] += np.uint64(1)
            if on:
                self.complete()

    def stopped(self) -> bool:
        """After GCMD_REG.QIE = 0: no front-end reads the queue any more."""
        epoch = self.epoch
        return not any(p[FE_ONLINE] and int(p[FE_EPOCH]) != epoch for p in self._fe)


class Registers:
    """The VT-d registers as software sees them.

    :param bank: uint64[512], the shared register page.
    :param front_ends: uint64[n, 512], the pages of the front-ends.

    :ivar queue: the hardware side of the invalidation queue.
    """

    def __init__(self, bank: U64, front_ends: U64, ram: Ram, lock: HardwareLock) -> None:
        self.bank = bank
        self.front_ends = front_ends
        self._bank32 = bank.view(np.uint32)
        self._lock = lock
        self.queue = Queue(bank, front_ends, ram, lock)
        #: ``service`` of the front-ends that run in this very process, by index: they answer at once
        self.local_front_ends: dict[int, Callable[[], int]] = {}

    #: the kind of IOMMU, as :func:`iokeep.pt.roots.find.find_root_of` calls it
    KIND = "vtd"

    def hw(self) -> dict[str, object]:
        """The registers that lead to the tables, as the ``hw`` part of a capture has them."""
        return {"root_register": f"{self.read64(DMAR_RTADDR_REG):#x}"}

    def power_on(self) -> None:
        """Reset values of a new platform."""
        self.bank[:] = np.uint64(0)
        ver, cap, ecap = capabilities(len(self.front_ends))
        self._bank32[DMAR_VER_REG >> 2] = np.uint32(ver)
        self.bank[DMAR_CAP_REG >> 3] = np.uint64(cap)
        self.bank[DMAR_ECAP_REG >> 3] = np.uint64(ecap)

    def read64(self, offset: int) -> int:
        """Read a 64-bit register (8-byte aligned byte offset)."""
        if offset & 7 or not 0 <= offset < PAGE:
            raise ValueError(f"no 64-bit register at offset {offset:#x}")
        return (
            self.read32(offset) | self.read32(offset + 4) << 32
            if offset < 0x40
            else int(self.bank[offset >> 3])
        )

    def read32(self, offset: int) -> int:
        """Read a 32-bit register (4-byte aligned byte offset)."""
        if offset & 3 or not 0 <= offset < PAGE:
            raise ValueError(f"no 32-bit register at offset {offset:#x}")
        if offset == DMAR_GCMD_REG:
            return 0  # write-only
        if offset == DMAR_FSTS_REG:
            return self._fsts()
        value = int(self._bank32[offset >> 2])
        if offset == DMAR_GSTS_REG and (self.queue.epoch & 1 or not self.queue.stopped()):
            value |= DMA_GSTS_QIES
        return value

    def write64(self, offset: int, value: int) -> None:
        """Write a 64-bit register. :raises ValueError: it does not exist here or is read-only."""
        if offset == DMAR_RTADDR_REG:
            self.bank[offset >> 3] = np.uint64(value)
        elif offset == DMAR_IQA_REG:
            if self.queue.epoch & 1:
                raise ValueError("IQA_REG is written while the invalidation queue is enabled")
            self.bank[offset >> 3] = np.uint64(value)
        elif offset == DMAR_IQT_REG:
            tail = value & IQT_MASK
            if tail != value or tail % self.queue.step or tail >= self.queue.size:
                raise ValueError(
                    f"IQT_REG {value:#x} is no descriptor of a queue of {self.queue.size:#x} bytes"
                )
            self.bank[offset >> 3] = np.uint64(tail)
            # Front-ends that are online complete the queue themselves, between two bursts. The lock orders
            # this store and that look against a front-end that leaves.
            with self._lock.held():
                if not self.front_ends[:, FE_ONLINE].any():
                    self.queue.complete()
            for service in self.local_front_ends.values():
                service()
        elif self._is_fault_record(offset):
            self._clear_fault(offset, value)
        else:
            raise ValueError(f"no writable 64-bit register at offset {offset:#x}")

    def write32(self, offset: int, value: int) -> None:
        """Write a 32-bit register. :raises ValueError: it does not exist here or is read-only."""
        if offset == DMAR_GCMD_REG:
            self._command(value)
        elif offset == DMAR_FSTS_REG:
            self._clear_status(value)
        elif offset % 16 == 12 and self._is_fault_record(offset - 4):
            self._clear_fault(offset - 4, value << 32)
        else:
            raise ValueError(f"no writable 32-bit register at offset {offset:#x}")

    def _command(self, value: int) -> None:
        with self._lock.held():
            status = int(self._bank32[DMAR_GSTS_REG >> 2])
            if value & DMA_GCMD_SRTP:
                self.bank[HIDDEN_ROOT >> 3] = self.bank[DMAR_RTADDR_REG >> 3]
                status |= DMA_GSTS_RTPS
            status = status & ~DMA_GSTS_TES | (DMA_GSTS_TES if value & DMA_GCMD_TE else 0)
            self._bank32[DMAR_GSTS_REG >> 2] = np.uint32(status)
            self.queue.set_enabled(bool(value & DMA_GCMD_QIE))

    def _is_fault_record(self, offset: int) -> bool:
        first = DMAR_FRCD_REG
        return first <= offset < first + 16 * len(self.front_ends) and offset % 16 == 8

    def _clear_fault(self, offset: int, value: int) -> None:
        if value & FRCD_F:  # write 1 to clear; the rest is read-only
            self.bank[offset >> 3] &= np.uint64(FRCD_F - 1)

    def fault_record(self, index: int) -> tuple[int, int]:
        """FRCD_REG of front-end ``index``: (low, high) words."""
        at = (DMAR_FRCD_REG >> 3) + 2 * index
        return int(self.bank[at]), int(self.bank[at + 1])

    def _fsts(self) -> int:
        value = DMA_FSTS_PFO if self.front_ends[:, FE_PFO].any() else 0
        pending = [i for i in range(len(self.front_ends)) if self.fault_record(i)[1] & FRCD_F]
        if pending:
            value |= DMA_FSTS_PPF | pending[0] << DMA_FSTS_FRI_SHIFT
        if self.front_ends[:, FE_IQE].any() or self.bank[HIDDEN_IQE >> 3]:
            value |= DMA_FSTS_IQE
        return value

    def _clear_status(self, value: int) -> None:
        if value & DMA_FSTS_PFO:
            self.front_ends[:, FE_PFO] = np.uint64(0)
        if value & DMA_FSTS_IQE:
            self.front_ends[:, FE_IQE] = np.uint64(0)
            self.bank[HIDDEN_IQE >> 3] = np.uint64(0)
            if not self.front_ends[:, FE_ONLINE].any():
                self.queue.complete()
            for service in self.local_front_ends.values():
                service()
