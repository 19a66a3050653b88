# SPDX-License-Identifier: Apache-2.0
"""One front-end of the IOMMU: context cache, IOTLB, fault record, and its way through the invalidation queue.

Source: VT-d specification revision 4.x: caching 6.2, queued invalidation 6.5.2, fault logging 7.2.1. The
translation itself is compiled: :mod:`iokeep.soft.hardware.engine`, imported when a front-end is made.

A front-end is *online* from its first request on, until :meth:`FrontEnd.leave`. Offline it holds nothing
that an invalidation could concern, so that the queue does not wait for it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from iokeep.pt.formats.base import Format
from iokeep.pt.registry import open_format
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
    Invalidation,
    Match,
)


def hardware_formats() -> list[Format | None]:
    """The formats that the IOMMU walks, in the order of :data:`iokeep.soft.hardware.engine.KINDS`."""
    return [
        *(open_format("vtdss", {"levels": levels}) for levels in (3, 4, 5)),
        *(open_format("x86_64", {"levels": levels}) for levels in (4, 5)),
    ]


class FrontEnd:
    """The translation agent of one device.

    Calls are serialised: the writer of IQT_REG in the same process may call :meth:`service` while another
    thread runs bursts.

    :param formats: one per row of ``engine.KINDS``, None: all of them; a None in it makes the kind fault.

    :ivar unit: uint64, private state. :ivar tlb: uint64[4, entries]. :ivar page: the hidden registers (FE_*).
    """

    def __init__(
        self, platform: Platform, index: int, formats: Sequence[Format | None] | None = None
    ) -> None:
        from iokeep.soft.hardware import engine

        self._engine = engine
        self.platform = platform
        self.index = index
        self.bank = platform.iommu.bank
        self.page = platform.front_ends[index]
        self.formats, self.kinds = engine.format_tables(
            list(formats) if formats is not None else hardware_formats()
        )
        self.unit = np.zeros(engine.UNIT_WORDS, np.uint64)
        self.unit[engine.C_BDF] = platform.bdf(index)
        self.unit[engine.C_INDEX] = index
        self.tlb = np.zeros((4, engine.TLB_ENTRIES), np.uint64)
        self.busy = threading.RLock()
        self._queue = platform.iommu.queue
        self._behind = False  # IQH_REG is still to be moved after descriptors consumed here
        platform.iommu.local_front_ends[index] = self.service
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
            self.flush()
            if self.online:
                self.service()
                self._queue.leave(self.index)

    def flush(self) -> None:
        """Forget everything cached."""
        self.unit[self._engine.C_VALID] = np.uint64(0)
        self.unit[self._engine.T_LEVELS] = np.uint64(0)
        self.tlb[:] = np.uint64(0)

    def translate(self, iova: int, write: bool) -> tuple[int | None, int]:
        """Translate one request: (pa, 0), or (None, reason); reason: vtd.FaultReason or engine.UNTRANSLATED.

        The fault is recorded in FRCD_REG as that of a DMA request would be.
        """
        with self.busy:
            self.enter()
            need = np.uint64(2 if write else 1)
            reason, pa = self._engine.translate(
                self.platform.ram.words,
                self.bank,
                self.page,
                self.unit,
                self.tlb,
                self.formats,
                self.kinds,
                np.uint64(iova),
                need,
            )
            if not reason:
                return int(pa), 0
            if int(reason) != self._engine.UNTRANSLATED:
                self._engine.record_fault(self.bank, self.page, self.unit, reason, np.uint64(iova), need)
            return None, int(reason)

    def service(self) -> int:
        """Consume the invalidation queue up to its tail; returns the number of descriptors.

        Between two bursts no DMA is in flight, which is the drain that the descriptors ask for.
        """
        with self.busy:
            page, queue, iommu = self.page, self._queue, self.platform.iommu
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

    @property
    def _owner(self) -> int:
        unit, e = self.unit, self._engine
        owner = int(unit[e.C_DID]) | int(unit[e.C_PASID]) << 16
        return owner | e.OWNER_FIRST if int(unit[e.C_KIND]) >= 3 else owner

    def invalidate(self, item: Invalidation) -> None:
        """Carry out one command on the caches of this front-end."""
        if item.context is not None:
            requester, owner = item.context
            if requester(int(self.unit[self._engine.C_BDF])) and owner(self._owner):
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
            self.unit[self._engine.T_LEVELS] = np.uint64(0)
