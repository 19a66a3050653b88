# SPDX-License-Identifier: Apache-2.0
"""A machine with just enough of a kernel to program its IOMMU."""

import sys
from pathlib import Path

import numpy as np
import pytest

from iokeep.pt.build import Table
from iokeep.pt.extents import Extents
from iokeep.pt.registry import open_format
from iokeep.pt.roots import vtd
from iokeep.soft.hardware.platform import Platform
from iokeep.soft.hardware.units import vtd as r

# The helpers of this directory become importable (tests have no packages).
sys.path.insert(0, str(Path(__file__).parent))


class Machine:
    """A platform, frames that are never freed, one domain for all devices, the invalidation queue."""

    def __init__(self, ram_bytes=8 << 20, devices=1, mode="legacy", levels=4, qs=0):
        self.platform = Platform.create(ram_bytes, devices)
        self.ram, self.regs = self.platform.ram, self.platform.iommu
        self.mode, self.levels, self.did, self.qs = mode, levels, 5, qs
        self.scalable = mode != "legacy"
        self.next = 16 << 12
        self.fmt = open_format("x86_64" if mode == "scalable-fs" else "vtdss", {"levels": levels})
        self.table = Table.create(self.fmt, self.ram, self.alloc, lambda pas: None)
        self.root_table, self.contexts, self.contexts_high = self.page(), self.page(), self.page()
        self.pasid_dir, self.pasid_table = self.page(), self.page()
        self.status, self.queue = self.page(), self.pages(1 << qs)
        if self.scalable:
            self.ram.store64(self.pasid_dir, vtd.pasid_dir_entry(self.pasid_table))
        for index in range(devices):
            self.attach(index)
        self.regs.write64(r.DMAR_RTADDR_REG, vtd.rtaddr_value(self.root_table, scalable=self.scalable))
        self.regs.write32(r.DMAR_GCMD_REG, r.DMA_GCMD_SRTP)
        self.regs.write64(r.DMAR_IQA_REG, self.queue | qs | (r.IQA_DW if self.scalable else 0))
        self.regs.write32(r.DMAR_GCMD_REG, r.DMA_GCMD_QIE)
        self.regs.write32(r.DMAR_GCMD_REG, r.DMA_GCMD_QIE | r.DMA_GCMD_TE)
        self.tail = self.sequence = 0

    def pages(self, n):
        pa, self.next = self.next, self.next + (n << 12)
        assert self.next <= self.ram.size
        return pa

    def page(self):
        return self.pages(1)

    def alloc(self, n):
        return np.array([self.page() for _ in range(n)], np.uint64)

    def put(self, pa, words):
        for i, word in enumerate(words):
            self.ram.store64(pa + 8 * i, word)

    def attach(self, index, table=None, did=None):
        bdf = self.platform.bdf(index)
        root, did = (table or self.table).root_pa, self.did if did is None else did
        at = vtd.root_entry_pa(self.root_table, bdf)
        if not self.scalable:
            self.put(at, vtd.root_entry(self.contexts))
            at = vtd.context_entry_pa(self.contexts, bdf, scalable=False)
            self.put(at, vtd.context_entry(root, self.levels, did))
            return
        self.put(at, vtd.sm_root_entry(self.contexts, self.contexts_high))
        encode = vtd.pasid_entry_first_stage if self.mode == "scalable-fs" else vtd.pasid_entry_second_stage
        self.put(self.pasid_table, encode(root, self.levels, did))
        table = self.contexts_high if bdf & 0x80 else self.contexts
        at = vtd.context_entry_pa(table, bdf, scalable=True)
        self.put(at, vtd.sm_context_entry(self.pasid_dir, 0))

    def map(self, iova, pa, pages, prot=3):
        self.table.map(Extents.of([(iova, iova + (pages << 12) - 1, pa, prot)]))

    def submit(self, *descriptors):
        """Put descriptors and a wait into the queue; returns (status pa, data) to look for."""
        self.sequence += 1
        wait = vtd.inv_wait(self.status, self.sequence)
        step = 32 if self.scalable else 16
        for d in (*descriptors, wait):
            self.ram.write(self.queue + self.tail, vtd.descriptor_bytes(d, wide=self.scalable))
            self.tail = (self.tail + step) % (4096 << self.qs)
        self.regs.write64(r.DMAR_IQT_REG, self.tail)
        return self.sequence

    def done(self, sequence):
        return self.ram.load64(self.status) & 0xFFFFFFFF == sequence

    def unmap(self, iova, last):
        """Unmap and invalidate; returns the sequence of the wait."""
        self.table.unmap(iova, last)
        block = vtd.page_mask(iova, last, r.MAMV)
        if self.mode == "scalable-fs":
            d = vtd.inv_piotlb_pages(self.did, *block) if block else vtd.inv_piotlb_pasid(self.did)
        else:
            d = vtd.inv_iotlb_pages(self.did, *block) if block else vtd.inv_iotlb_domain(self.did)
        return self.submit(d)


@pytest.fixture
def machine(request):
    """Makes machines: of the file's own kind ``Machine``, where it has one."""
    kind, made = getattr(request.module, "Machine", Machine), []

    def make(*args, **kwargs):
        made.append(kind(*args, **kwargs))
        return made[-1]

    yield make
    for m in made:
        m.platform.close()
