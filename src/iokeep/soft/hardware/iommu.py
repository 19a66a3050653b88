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
from iokeep.pt.roots import vtd
from iokeep.soft.hardware.platform import Platform
from iokeep.soft.hardware.units import vtd as registers
from iokeep.soft.hardware.units.vtd import FE_EPOCH, FE_HEAD, FE_INVALIDATIONS, FE_IQE, FE_ONLINE

#: bits of the function number that CC_DESC.FM takes out of the comparison (specification 6.5.2.1)
_FUNCTION_MASK = (0, 4, 6, 7)


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
            page, queue = self.page, self._queue
            if not page[FE_ONLINE]:
                return 0
            epoch = self.bank[registers.HIDDEN_EPOCH >> 3]
            if page[FE_EPOCH] != epoch:
                page[FE_HEAD] = np.uint64(0)
                page[FE_EPOCH] = epoch
            tail = int(self.bank[registers.DMAR_IQT_REG >> 3])
            head = int(page[FE_HEAD])
            if head == tail or not int(epoch) & 1 or page[FE_IQE]:
                if self._behind:
                    self._behind = not queue.try_complete()
                return 0
            size, step, done = queue.size, queue.step, 0
            while head != tail:
                item = queue.fetch(head)
                if item is None:
                    page[FE_IQE] = np.uint64(1)
                    break
                self.invalidate(item)
                head = (head + step) % size
                done += 1
            page[FE_INVALIDATIONS] += np.uint64(done)
            page[FE_HEAD] = np.uint64(head)
            self._behind = not queue.try_complete()
            return done

    def invalidate(self, item: vtd.Invalidation) -> None:
        """Carry out one descriptor on the caches of this front-end."""
        if item.kind in (vtd.INV_CONTEXT, vtd.INV_PASID_CACHE):
            self._invalidate_context(item)
        elif item.kind in (vtd.INV_IOTLB, vtd.INV_PASID_IOTLB):
            self._invalidate_tlb(item)

    def _invalidate_context(self, item: vtd.Invalidation) -> None:
        unit, e = self.unit, self._engine
        same_domain = int(unit[e.C_DID]) == item.domain_id
        if item.kind == vtd.INV_PASID_CACHE:
            hit = item.granularity == vtd.PC_GLOBAL or (
                same_domain and (item.granularity == vtd.PC_DOMAIN or int(unit[e.C_PASID]) == item.pasid)
            )
        elif item.granularity == vtd.G_DEVICE:
            different = (int(unit[e.C_BDF]) ^ item.source_id) & ~_FUNCTION_MASK[item.function_mask]
            # DID is that of the cached entry: a driver that passes the new one leaves the old one cached.
            hit = same_domain and not different
        else:
            hit = item.granularity == vtd.G_GLOBAL or same_domain
        if hit:
            unit[e.C_VALID] = np.uint64(0)

    def _invalidate_tlb(self, item: vtd.Invalidation) -> None:
        e, tlb = self._engine, self.tlb
        if item.kind == vtd.INV_IOTLB and item.granularity == vtd.G_GLOBAL:
            tlb[0] = np.uint64(0)
        else:
            owner = tlb[2]
            if item.kind == vtd.INV_PASID_IOTLB:
                # First stage only: domain, PASID and stage must be equal.
                hit = owner == np.uint64(item.domain_id | item.pasid << 16 | e.OWNER_FIRST)
            else:
                hit = (owner & np.uint64(vtd.DID_MASK)) == np.uint64(item.domain_id)
                if item.granularity == vtd.G_PAGES:
                    hit &= owner < np.uint64(e.OWNER_FIRST)
            if item.granularity == vtd.G_PAGES:
                # Both page-selective granularities are 3. An entry goes if any of its page is in the range.
                first = tlb[0] & np.uint64(2**64 - 4096)
                last = first + ((np.uint64(1) << tlb[3]) - np.uint64(1))
                hit &= (first <= np.uint64(item.last)) & (last >= np.uint64(item.start))
            tlb[0, hit] = np.uint64(0)
        if not tlb[0].any():
            self.unit[e.T_LEVELS] = np.uint64(0)
