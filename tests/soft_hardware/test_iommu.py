# SPDX-License-Identifier: Apache-2.0
"""A front-end: translation, caches that are stale until invalidated, a queue with several heads, faults."""

import numpy as np
import pytest
from front_ends import detached
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iokeep.pt.build import Table
from iokeep.pt.extents import Extents
from iokeep.pt.roots import vtd
from iokeep.pt.roots.vtd import FaultReason
from iokeep.soft.hardware import engine
from iokeep.soft.hardware.iommu import FrontEnd
from iokeep.soft.hardware.unit import FE_FAULTS, FE_INVALIDATIONS
from iokeep.soft.hardware.units import vtd as r

MODES = ("legacy", "scalable-ss", "scalable-fs")
IOVA = 1 << 30


@pytest.mark.parametrize("mode", MODES)
def test_translates_and_faults(machine, mode):
    m = machine(mode=mode)
    pa = m.pages(600)
    m.map(IOVA, pa, 3)
    m.map(IOVA + 0x10000, pa + 0x10000, 1, prot=1)
    m.map(4 << 30, 0x200000, 512)  # one 2M leaf
    fe = FrontEnd(m.platform, 0)
    assert fe.translate(IOVA + 0x2FFF, False) == (pa + 0x2FFF, 0)
    assert fe.translate(IOVA + 0x2FFF, True) == (pa + 0x2FFF, 0)
    assert fe.translate((4 << 30) + 0x123456, True) == (0x323456, 0)
    denied = FaultReason.NO_WRITE if mode == "legacy" else FaultReason.SM_NO_WRITE
    assert fe.translate(IOVA + 0x10008, True) == (None, denied)
    assert fe.translate(IOVA + 0x10008, False) == (pa + 0x10008, 0)
    missing = {
        "legacy": FaultReason.NO_READ,
        "scalable-ss": FaultReason.SM_NO_READ,
        "scalable-fs": FaultReason.SM_FIRST_NOT_PRESENT,
    }[mode]
    assert fe.translate(IOVA + 0x3000, False) == (None, missing)
    beyond = {
        "legacy": FaultReason.BEYOND_WIDTH,
        "scalable-ss": FaultReason.SM_SECOND_BEYOND_WIDTH,
        "scalable-fs": FaultReason.SM_NOT_CANONICAL,
    }[mode]
    assert fe.translate(1 << 50, False) == (None, beyond)


def test_write_only_pages(machine):
    m = machine()
    m.map(IOVA, 0x200000, 1, prot=2)
    fe = FrontEnd(m.platform, 0)
    assert fe.translate(IOVA, True)[1] == 0
    assert fe.translate(IOVA, False) == (None, FaultReason.NO_READ)


def test_fault_record_and_overflow(machine):
    m = machine(devices=2)
    fe = FrontEnd(m.platform, 1)
    fe.translate(0x7654321, True)
    low, high = m.regs.fault_record(1)
    assert low == 0x7654000
    assert high >> 63 == 1
    assert high & r.FRCD_READ == 0
    assert high >> 32 & 0xFF == FaultReason.NO_WRITE
    assert high & 0xFFFF == m.platform.bdf(1)
    assert m.regs.read32(r.DMAR_FSTS_REG) == r.DMA_FSTS_PPF | 1 << 8
    fe.translate(0x1000, False)
    assert m.regs.read32(r.DMAR_FSTS_REG) & r.DMA_FSTS_PFO
    assert m.regs.fault_record(1)[0] == 0x7654000  # the first stays
    assert m.platform.front_ends[1, FE_FAULTS] == 2
    m.regs.write64(r.DMAR_FRCD_REG + 16 + 8, r.FRCD_F)
    m.regs.write32(r.DMAR_FSTS_REG, r.DMA_FSTS_PFO)
    fe.translate(0x2000, False)
    assert m.regs.fault_record(1)[0] == 0x2000
    assert m.regs.fault_record(1)[1] & r.FRCD_READ


def test_fault_processing_disable(machine):
    m = machine()
    at = vtd.context_entry_pa(m.contexts, m.platform.bdf(0), scalable=False)
    m.ram.store64(at, m.ram.load64(at) | vtd.FPD)
    fe = FrontEnd(m.platform, 0)
    assert fe.translate(0x1000, False) == (None, FaultReason.NO_READ)
    assert m.regs.fault_record(0) == (0, 0)
    assert m.platform.front_ends[0, FE_FAULTS] == 1


def test_translation_disabled_is_its_own_reason(machine):
    m = machine()
    m.map(IOVA, 0x200000, 1)
    fe = FrontEnd(m.platform, 0)
    m.regs.write32(r.DMAR_GCMD_REG, r.DMA_GCMD_QIE)
    assert fe.translate(IOVA, False) == (None, engine.UNTRANSLATED)
    assert m.regs.fault_record(0) == (0, 0)
    m.regs.write32(r.DMAR_GCMD_REG, r.DMA_GCMD_QIE | r.DMA_GCMD_TE)
    assert fe.translate(IOVA, False)[1] == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("large", [False, True])
def test_stale_until_invalidated(machine, mode, large):
    m = machine(mode=mode)
    pages = 512 if large else 1
    m.map(IOVA, 0x200000, pages)
    fe = detached(m)
    assert fe.translate(IOVA, True)[0] == 0x200000
    m.table.unmap(IOVA, IOVA + (pages << 12) - 1)
    assert fe.translate(IOVA, True)[0] == 0x200000  # the IOTLB does not know yet
    m.map(IOVA, 0x400000, pages)
    inv = vtd.inv_piotlb_pages if mode == "scalable-fs" else vtd.inv_iotlb_pages
    # Any page of a large leaf takes the whole leaf with it; others do not.
    for did, iova in ((m.did + 1, IOVA), (m.did, IOVA + (pages << 12))):
        m.submit(inv(did, iova, 0))
        fe.service()
        assert fe.translate(IOVA, True)[0] == 0x200000
    sequence = m.submit(inv(m.did, IOVA + ((pages - 1) << 12), 0))
    assert not m.done(sequence)
    assert fe.service() == 2
    assert m.done(sequence)
    assert fe.translate(IOVA, True)[0] == 0x400000


@pytest.mark.parametrize("mode", MODES)
def test_granularities(machine, mode):
    m = machine(mode=mode)
    fe = detached(m)
    for number, (descriptor, goes) in enumerate(
        [
            (vtd.inv_iotlb_global(), True),
            (vtd.inv_iotlb_domain(m.did), True),
            (vtd.inv_iotlb_domain(m.did + 1), False),
            (vtd.inv_piotlb_pasid(m.did), mode == "scalable-fs"),
            (vtd.inv_piotlb_pasid(m.did, 1), False),
            (vtd.inv_iotlb_pages(m.did, 0, 18), mode != "scalable-fs"),
            (vtd.inv_context_global(), False),
        ]
    ):
        iova = (number + 1) << 21
        m.map(iova, 0x200000, 1)
        assert fe.translate(iova, False)[0] == 0x200000
        m.table.unmap(iova, iova + 0xFFF)
        m.submit(descriptor)
        fe.service()
        assert (fe.translate(iova, False)[0] is None) == goes, descriptor
        m.submit(vtd.inv_iotlb_global())
        fe.service()


@pytest.mark.parametrize("mode", MODES)
def test_hitless_replace(machine, mode):
    """A new table is switched in by the context entry; it counts once the cached one is invalidated."""
    m = machine(mode=mode)
    m.map(IOVA, 0x200000, 2)
    other = Table.create(m.fmt, m.ram, m.alloc, lambda pas: None)
    other.map(Extents.of([(IOVA, IOVA + 0x1FFF, 0x400000, 3)]))
    fe = detached(m)
    assert fe.translate(IOVA, False)[0] == 0x200000
    m.attach(0, other, did=m.did + 1)
    assert fe.translate(IOVA + 0x1000, False)[0] == 0x201000  # the context cache still has the old one
    bdf = m.platform.bdf(0)
    m.submit(vtd.inv_context_device(m.did + 1, bdf))  # not the DID that is cached
    fe.service()
    assert fe.translate(IOVA + 0x1000, False)[0] == 0x201000
    m.submit(vtd.inv_context_device(m.did, bdf + 8))  # another device
    fe.service()
    assert fe.translate(IOVA + 0x1000, False)[0] == 0x201000
    if mode == "legacy":
        m.submit(vtd.inv_context_device(m.did, bdf))
    else:
        m.submit(vtd.inv_pasid_cache(m.did, vtd.PC_PASID, 0))
    fe.service()
    # Entries of the old domain are tagged with its id, so they cannot hit any more.
    assert fe.translate(IOVA + 0x1000, False)[0] == 0x401000
    assert fe.translate(IOVA, False)[0] == 0x400000


def test_function_mask(machine):
    m = machine()
    m.map(IOVA, 0x200000, 1)
    fe = detached(m)
    bdf = m.platform.bdf(0)
    for fm, sid, goes in ((0, bdf | 1, False), (1, bdf | 4, True), (2, bdf | 1, False), (3, bdf | 7, True)):
        fe.translate(IOVA, False)
        assert fe.unit[engine.C_VALID] == 1
        fe.invalidate(m.regs.decode(vtd.inv_context_device(m.did, sid, fm)))
        assert (fe.unit[engine.C_VALID] == 0) == goes


def test_rights_added_need_no_invalidation(machine):
    m = machine()
    m.map(IOVA, 0x200000, 1, prot=1)
    fe = FrontEnd(m.platform, 0)
    assert fe.translate(IOVA, False)[1] == 0
    m.table.unmap(IOVA, IOVA + 0xFFF)
    m.map(IOVA, 0x200000, 1, prot=3)
    assert fe.translate(IOVA, True) == (0x200000, 0)


def test_slowest_head_counts(machine):
    m = machine(devices=3)
    m.map(IOVA, 0x200000, 1)
    a, b = detached(m, 0), detached(m, 1)
    a.translate(IOVA, False)
    b.translate(IOVA, False)  # device 2 never did anything: it is not waited for
    sequence = m.unmap(IOVA, IOVA + 0xFFF)
    a.service()
    assert not m.done(sequence)
    assert m.regs.read64(r.DMAR_IQH_REG) == 0
    b.service()
    assert m.done(sequence)
    assert m.regs.read64(r.DMAR_IQH_REG) == m.tail
    assert a.translate(IOVA, False)[0] is None
    assert b.translate(IOVA, False)[0] is None
    # One that leaves is not waited for either, and completes what only waited for it.
    sequence = m.submit(vtd.inv_iotlb_global())
    a.service()
    assert not m.done(sequence)
    b.leave()
    assert m.done(sequence)


def test_a_dead_front_end_is_forced_offline(machine):
    m = machine()
    m.map(IOVA, 0x200000, 1)
    detached(m).translate(IOVA, False)
    sequence = m.submit(vtd.inv_iotlb_global())
    assert not m.done(sequence)
    m.regs.queue.leave(0)
    assert m.done(sequence)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_interleaving_completes_in_order(machine, data):
    m = machine(devices=3)
    fes = [detached(m, i) for i in range(3)]
    m.map(IOVA, 0x200000, 1)
    pending = []
    for _ in range(data.draw(st.integers(1, 40))):
        what = data.draw(st.integers(0, 7))
        if what < 3:
            fes[what].service()
        elif what == 3 and (m.tail + 64) % 4096 != m.regs.read64(r.DMAR_IQH_REG) // 64 * 64:
            if len(pending) < 50:
                pending.append(m.submit(vtd.inv_iotlb_global()))
        elif what < 7:
            fe = fes[what - 4]
            fe.leave() if fe.online else fe.translate(IOVA, False)
        reached = m.ram.load64(m.status)
        head = m.regs.read64(r.DMAR_IQH_REG)
        heads = [m.regs.queue.head(i) for i in range(3) if fes[i].online]
        ahead = (m.tail - head) % 4096
        assert all((h - head) % 4096 <= ahead for h in heads)
        if pending:
            # Exactly the waits that every online front-end has passed are done.
            assert pending[-1] - reached == ahead // 32
    for fe in fes:
        fe.service()
    assert m.regs.read64(r.DMAR_IQH_REG) == m.tail
    assert not pending or m.done(pending[-1])


def test_bad_descriptor_stops_the_queue(machine):
    m = machine()
    m.map(IOVA, 0x200000, 1)
    fe = detached(m)
    fe.translate(IOVA, False)
    bad_at = m.tail
    sequence = m.submit((0xF, 0, 0, 0))
    fe.service()
    assert not m.done(sequence)
    assert m.regs.read32(r.DMAR_FSTS_REG) & r.DMA_FSTS_IQE
    assert m.regs.read64(r.DMAR_IQH_REG) == bad_at
    assert fe.service() == 0
    m.ram.write(m.queue + bad_at, vtd.descriptor_bytes(vtd.inv_iotlb_global(), wide=False))
    m.regs.write32(r.DMAR_FSTS_REG, r.DMA_FSTS_IQE)
    fe.service()
    assert m.done(sequence)
    assert m.regs.read32(r.DMAR_FSTS_REG) & r.DMA_FSTS_IQE == 0


def test_bad_descriptor_with_nobody_online(machine):
    m = machine()
    sequence = m.submit((0xF, 0, 0, 0))
    assert m.regs.read32(r.DMAR_FSTS_REG) & r.DMA_FSTS_IQE
    assert not m.done(sequence)
    m.ram.write(m.queue, vtd.descriptor_bytes(vtd.inv_iotlb_global(), wide=False))
    m.regs.write32(r.DMAR_FSTS_REG, r.DMA_FSTS_IQE)
    assert m.done(sequence)


def test_queue_outside_of_memory(machine):
    m = machine()
    m.regs.write32(r.DMAR_GCMD_REG, r.DMA_GCMD_TE)
    m.regs.write64(r.DMAR_IQA_REG, 1 << 40)
    m.regs.write32(r.DMAR_GCMD_REG, r.DMA_GCMD_TE | r.DMA_GCMD_QIE)
    m.regs.write64(r.DMAR_IQT_REG, 16)
    assert m.regs.read32(r.DMAR_FSTS_REG) & r.DMA_FSTS_IQE


def test_queue_wraps(machine):
    m = machine(mode="scalable-ss")
    m.map(IOVA, 0x200000, 1)
    fe = FrontEnd(m.platform, 0)  # pumped by the tail register
    fe.translate(IOVA, False)
    for _ in range(300):
        assert m.done(m.submit(vtd.inv_iotlb_global()))
    assert m.platform.front_ends[0, FE_INVALIDATIONS] == 600


def test_a_new_kernel_takes_the_queue_over(machine):
    """Disable, wait for QIES, new base, enable: heads start at 0 again, translation went on."""
    m = machine()
    m.map(IOVA, 0x200000, 1)
    fe = detached(m)
    fe.translate(IOVA, False)
    m.submit(vtd.inv_iotlb_global())
    fe.service()
    m.regs.write32(r.DMAR_GCMD_REG, r.DMA_GCMD_TE)
    assert m.regs.read32(r.DMAR_GSTS_REG) & r.DMA_GSTS_QIES  # the front-end has not seen it yet
    fe.service()
    assert not m.regs.read32(r.DMAR_GSTS_REG) & r.DMA_GSTS_QIES
    assert fe.translate(IOVA, False)[1] == 0
    m.queue, m.tail = m.page(), 0
    m.regs.write64(r.DMAR_IQT_REG, 0)
    m.regs.write64(r.DMAR_IQA_REG, m.queue)
    m.regs.write32(r.DMAR_GCMD_REG, r.DMA_GCMD_TE | r.DMA_GCMD_QIE)
    sequence = m.submit(vtd.inv_iotlb_global())
    assert not m.done(sequence)
    fe.service()
    assert m.done(sequence)


def test_table_outside_of_memory(machine):
    m = machine()
    m.map(IOVA, 0x200000, 1)
    fe = FrontEnd(m.platform, 0)
    top = m.table.root_pa
    m.ram.store64(top, 1 << 45 | 3)
    assert fe.translate(IOVA, False) == (None, FaultReason.PAGING_ACCESS)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 2**36 - 1), st.integers(0, 1500)), min_size=1, max_size=60),
    st.sampled_from(MODES),
)
def test_cached_translation_equals_iova_to_phys(machine, picks, mode):
    m = machine(mode=mode)
    fe = FrontEnd(m.platform, 0)
    for k, (page, _) in enumerate(picks[::2]):
        iova = (page & ~0x3FF) << 12
        if k % 3 == 0:
            iova = iova >> 21 << 21
        try:
            m.map(iova, 0x200000 + (k % 4 << 21), 512 if k % 3 == 0 else 7)
        except ValueError:
            continue  # overlaps an earlier one
    for page, offset in picks * 2:
        iova = ((page & ~0x3FF) + offset % 1024 << 12) + offset
        want = int(m.table.iova_to_phys(np.array([iova], np.uint64))[0])
        assert (fe.translate(iova, False)[0] or 0) == want
