# SPDX-License-Identifier: Apache-2.0
"""One front-end of the IOMMU: context cache, IOTLB, pending faults, and its way through the command queue.

The same for every kind of IOMMU: what is particular is behind :class:`iokeep.soft.hardware.unit.Unit`. The
translation itself is compiled: :mod:`iokeep.soft.hardware.engine`, imported when a front-end is made.

A front-end is *online* from its first request on, until :meth:`FrontEnd.leave`. Offline it holds nothing
that an invalidation could concern, so that the queue does not wait for it.
"""

from __future__ import annotations

import threading
import time

import numpy as np

from iokeep.mem.memory import U64
from iokeep.pt.registry import open_format
from iokeep.pt.roots.base import RootFault
from iokeep.soft.hardware.platform import Platform
from iokeep.soft.hardware.unit import (
    ANY,
    EVERYWHERE,
    FE_EPOCH,
    FE_HEAD,
    FE_INVALIDATIONS,
    FE_ONLINE,
    FE_STOPPED,
    H_EPOCH,
    H_START,
    H_TRANSLATING,
    Context,
    Fault,
    Invalidation,
    Match,
)

#: bursts have their faults recorded no more often than this (ns): a device may fault at full speed
RECORD_NS = 1_000_000
#: walkers kept by a front-end for tables that it has used
_WALKERS = 64


class FrontEnd:
    """The translation agent of one device.

    Calls are serialised: the writer of a tail register in the same process may call :meth:`service` while
    another thread runs bursts.

    :ivar unit: uint64, private state. :ivar tlb: uint64[4, entries]. :ivar page: the hidden registers (FE_*).
    :ivar walker: of the cached context.
    """

    def __init__(self, platform: Platform, index: int) -> None:
        from iokeep.soft.hardware import engine

        self._engine = engine
        self.platform = platform
        self.index = index
        self.iommu = platform.iommu
        self.hidden = platform.iommu.hidden
        self.page = platform.front_ends[index]
        self.bdf = platform.bdf(index)
        self._walkers: dict[tuple[object, ...], U64] = {}
        self.walker = engine.walker()
        self.unit = np.zeros(engine.UNIT_WORDS, np.uint64)
        self.pending = np.zeros((engine.PENDING, 4), np.uint64)
        self.tlb = np.zeros((4, engine.TLB_ENTRIES), np.uint64)
        self._record_next = 0
        self.busy = threading.RLock()
        self._queue = self.iommu.queue
        self._behind = False  # IQH_REG is still to be moved after descriptors consumed here
        self.iommu.local_front_ends[index] = self.service
        self._queue.leave(index)  # a dead predecessor may have left it online

    @property
    def online(self) -> bool:
        """The queue waits for it."""
        return bool(self.page[FE_ONLINE])

    def enter(self) -> None:
        """Go online. Idempotent."""
        with self.busy:
            if not self.online:
                self.flush()
                self._queue.enter(self.index)

    def leave(self) -> None:
        """Go offline with empty caches; no request may be in flight. Idempotent."""
        with self.busy:
            self.record(wait=True)
            self.flush()
            if self.online:
                self.service()
                self._queue.leave(self.index)

    def flush(self) -> None:
        """Forget everything cached."""
        e = self._engine
        for word in (e.C_VALID, e.C_FAULT, e.T_SIZES, e.T_COUNT):
            self.unit[word] = np.uint64(0)
        self.tlb[:] = np.uint64(0)

    def prepare(self) -> None:
        """Before requests: where translation is on and the context cache empty, look the context up.

        If there is none, the next request takes the fault.
        """
        e, unit = self._engine, self.unit
        if unit[e.C_VALID] or unit[e.C_FAULT] or not self.hidden[H_TRANSLATING]:
            return
        unit[e.C_LOOKUPS] += np.uint64(1)
        try:
            context = self.iommu.look_up(self.bdf)
        except RootFault as fault:
            unit[e.C_FAULT] = int(fault.reason)
            unit[e.C_SILENT] = int(self.iommu.silent(fault))
            return
        self.walker = self._walker_of(context)
        unit[e.C_OWNER] = context.owner
        unit[e.C_PROT] = context.prot
        unit[e.C_SILENT] = int(context.silent)
        read, write = context.codes
        unit[e.C_CODES : e.C_CODES + 2 * e.OUTCOMES] = (*read, *write)
        unit[e.C_VALID] = np.uint64(1)

    def _walker_of(self, context: Context) -> U64:
        tables = (context.table,) if context.upper is None else (context.table, context.upper)
        key = tuple((t.format, t.root_pa, *sorted(t.config.items())) for t in tables)
        made = self._walkers.get(key)
        if made is None:
            if len(self._walkers) >= _WALKERS:
                self._walkers.clear()
            made = self._engine.walker(*((open_format(t.format, t.config), t.root_pa) for t in tables))
            self._walkers[key] = made
        return made

    def record(self, *, wait: bool = False) -> None:
        """Have the pending faults recorded.

        Without ``wait`` they stay for a later call while somebody else holds the lock, or if the last were
        recorded less than RECORD_NS ago.
        """
        e, unit = self._engine, self.unit
        count, dropped = int(unit[e.P_COUNT]), int(unit[e.P_DROPPED])
        if not count and not dropped:
            return
        now = time.perf_counter_ns()
        if now < self._record_next and not wait:
            return
        with self.platform.lock.held() if wait else self.platform.lock.tried() as held:
            if held is False:
                return
            faults = [Fault(*row) for row in self.pending[:count].tolist()]
            self.iommu.record_faults(self.index, faults, dropped)
        unit[e.P_COUNT] = unit[e.P_DROPPED] = np.uint64(0)
        self._record_next = now + RECORD_NS

    def translate(self, iova: int, write: bool) -> tuple[int | None, int]:
        """Translate one request: (pa, 0), or (None, fault code); engine.UNTRANSLATED: translation is off.

        The fault is recorded as that of a DMA request would be.
        """
        e = self._engine
        with self.busy:
            self.enter()
            self.prepare()
            if not self.hidden[H_TRANSLATING]:
                return None, e.UNTRANSLATED
            at, need = np.uint64(iova), np.uint64(2 if write else 1)
            reason, pa = e.translate(
                self.platform.ram.words,
                self.page,
                self.unit,
                self.tlb,
                self.walker,
                at,
                need,
            )
            if not reason:
                return int(pa), 0
            e.pend(self.page, self.unit, self.pending, reason, at, need)
            self.record(wait=True)
            return None, int(reason)

    def service(self) -> int:
        """Consume the invalidation queue up to its tail; returns the number of descriptors.

        Between two bursts no DMA is in flight, which is the drain that the descriptors ask for.
        """
        with self.busy:
            self.record()
            page, queue, iommu = self.page, self._queue, self.iommu
            if not page[FE_ONLINE]:
                return 0
            epoch = iommu.hidden[H_EPOCH]
            if page[FE_EPOCH] != epoch:
                page[FE_HEAD] = iommu.hidden[H_START]
                page[FE_EPOCH] = epoch
            tail = iommu.queue_tail
            head = int(page[FE_HEAD])
            if head == tail or not int(epoch) & 1 or page[FE_STOPPED]:
                if self._behind:
                    self._behind = not queue.try_complete()
                return 0
            ring, done = iommu.ring(), 0
            while head != tail:
                item = queue.fetch(ring, head)
                if item is None:
                    page[FE_STOPPED] = np.uint64(1)
                    break
                self.invalidate(item)
                head = (head + ring.step) % ring.span
                done += 1
            page[FE_INVALIDATIONS] += np.uint64(done)
            page[FE_HEAD] = np.uint64(head)
            self._behind = not queue.try_complete()
            return done

    def invalidate(self, item: Invalidation) -> None:
        """Carry out one command on the caches of this front-end."""
        if item.context is not None:
            requester, owner = item.context
            if requester(self.bdf) and owner(int(self.unit[self._engine.C_OWNER])):
                self.unit[self._engine.C_VALID] = np.uint64(0)
        if item.tlb is not None:
            self._invalidate_tlb(*item.tlb)

    def _invalidate_tlb(self, owner: Match, start: int, last: int) -> None:
        tlb = self.tlb
        hit = tlb[0] != 0
        if owner is not ANY:
            hit &= (tlb[2] & np.uint64(owner.mask)) == np.uint64(owner.want)
        if (start, last) != EVERYWHERE:
            # An entry goes if any of its page is in the range.
            first = tlb[0] & np.uint64(2**64 - 4096)
            end = first + ((np.uint64(1) << tlb[3]) - np.uint64(1))
            hit &= (first <= np.uint64(last)) & (end >= np.uint64(start))
        tlb[0, hit] = np.uint64(0)
        if not tlb[0].any():
            self.unit[self._engine.T_SIZES] = self.unit[self._engine.T_COUNT] = np.uint64(0)
