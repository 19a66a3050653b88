# SPDX-License-Identifier: Apache-2.0
"""A front-end behind the RISC-V IOMMU: both stages, Svnapot, caches stale until the right command."""

import numpy as np
import pytest
from front_ends import detached
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from riscv_machine import RECORDS, STAGES, Machine

from iokeep.pt.formats import riscv64
from iokeep.pt.roots import riscv
from iokeep.pt.roots.riscv import FaultReason, FaultRecord, Ttyp
from iokeep.pt.walk import walk
from iokeep.soft.hardware import engine
from iokeep.soft.hardware.iommu import FrontEnd
from iokeep.soft.hardware.units import riscv as r

IOVA = 1 << 30
READ_FAULT = {1: FaultReason.READ_PAGE_FAULT, 2: FaultReason.READ_GUEST_FAULT}
WRITE_FAULT = {1: FaultReason.WRITE_PAGE_FAULT, 2: FaultReason.WRITE_GUEST_FAULT}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("levels", [3, 4, 5])
@pytest.mark.parametrize("directory", [1, 2, 3])
def test_translates_and_faults(machine, stage, levels, directory):
    m = machine(stage=stage, levels=levels, directory=directory)
    pa = m.pages(8)
    m.map(IOVA, pa, 3)
    m.map(IOVA + 0x10000, pa + 0x4000, 1, prot=1)
    m.map(4 << 30, 0x200000, 512)  # one 2M leaf
    fe = FrontEnd(m.platform, 0)
    assert fe.translate(IOVA + 0x2FFF, True) == (pa + 0x2FFF, 0)
    assert fe.translate((4 << 30) + 0x123456, True) == (0x323456, 0)
    assert fe.translate(IOVA + 0x10008, False) == (pa + 0x4008, 0)
    faults = [(IOVA + 0x10008, True), (IOVA + 0x3004, False), (1 << 60, True)]
    for number, (iova, write) in enumerate(faults):
        code = (WRITE_FAULT if write else READ_FAULT)[stage]
        assert fe.translate(iova, write) == (None, code)
        assert m.record(number) == FaultRecord(
            cause=code,
            ttyp=Ttyp.WRITE if write else Ttyp.READ,
            device_id=m.platform.bdf(0),
            iotval=iova,
            iotval2=iova & ~3 if stage == 2 else 0,
        )
    assert m.regs.read32(r.FQT) == RECORDS - 1
    fe.translate(0, False)
    assert m.regs.read32(r.FQCSR) & r.FQOF


def test_where_the_address_space_ends(machine):
    """The first stage is sign extended; the second has two bits more and is not."""
    m = machine(stage=1, levels=3)
    top = 2**64 - 0x1000
    m.map(top, 0x200000, 1)
    fe = FrontEnd(m.platform, 0)
    assert fe.translate(top + 5, True) == (0x200005, 0)
    for iova in (1 << 38, 2**64 - (1 << 38) - 1, (1 << 39) - 0x1000):
        assert fe.translate(iova, False) == (None, FaultReason.READ_PAGE_FAULT)
    m = machine(stage=2, levels=3)
    m.map((1 << 41) - 0x1000, 0x200000, 1)
    fe = FrontEnd(m.platform, 0)
    assert fe.translate((1 << 41) - 1, True) == (0x200FFF, 0)
    for iova in (1 << 41, top):
        assert fe.translate(iova, True) == (None, FaultReason.WRITE_GUEST_FAULT)


def test_faults_of_the_directory(machine):
    m = machine(devices=2)
    m.map(IOVA, 0x200000, 1)
    fe = FrontEnd(m.platform, 1)
    word = m.ram.load64(m.dc_pa(1))
    m.ram.store64(m.dc_pa(1), 0)
    assert fe.translate(IOVA, True) == (None, FaultReason.DDT_INVALID)
    m.ram.store64(m.dc_pa(1), word | riscv.TC_SXL)
    assert fe.translate(IOVA, False) == (None, FaultReason.DDT_MISCONFIGURED)
    # What faults is not cached: once the context is right no command is needed.
    m.ram.store64(m.dc_pa(1), word)
    assert fe.translate(IOVA, True) == (0x200000, 0)
    assert [m.record(n).cause for n in range(2)] == [258, 259]
    assert m.record(0).device_id == m.platform.bdf(1)
    m.regs.write64(r.DDTP, riscv.MODE_OFF)
    assert fe.translate(IOVA, True) == (None, engine.UNTRANSLATED)


def test_table_outside_of_memory(machine):
    m = machine()
    m.map(IOVA, 0x200000, 1)
    m.attach(0, type("Table", (), {"root_pa": 1 << 40}))
    fe = FrontEnd(m.platform, 0)
    assert fe.translate(IOVA, False) == (None, FaultReason.READ_ACCESS_FAULT)
    assert fe.translate(IOVA, True) == (None, FaultReason.WRITE_ACCESS_FAULT)


def test_no_reports_from_a_context_with_dtf(machine):
    m = machine(tc=riscv.TC_DTF)
    fe = FrontEnd(m.platform, 0)
    assert fe.translate(IOVA, False) == (None, FaultReason.READ_PAGE_FAULT)
    assert m.regs.read32(r.FQT) == 0
    m.ram.store64(m.dc_pa(0), riscv.TC_DTF)
    m.submit(riscv.iodir_inval_ddt())
    assert fe.translate(IOVA, False) == (None, FaultReason.DDT_INVALID)
    assert m.regs.read32(r.FQT) == 1


def item_pa(m, iova):
    return walk(m.fmt, m.ram, m.table.root_pa, iova).steps[-1][1]


@pytest.mark.parametrize("stage", STAGES)
def test_items_that_hardware_takes_no_translation_from(machine, stage):
    """tc.SADE and tc.GADE are 0: A and D are software's; reserved encodings fault."""
    m = machine(stage=stage)
    m.map(IOVA, 0x200000, 1)
    at = item_pa(m, IOVA)
    item = m.ram.load64(at)
    fe = FrontEnd(m.platform, 0)
    read, write = READ_FAULT[stage], WRITE_FAULT[stage]
    for value, reads, writes in (
        (item, 0, 0),
        (item & ~riscv64.A, read, write),
        (item & ~riscv64.D, 0, write),
        (item & ~riscv64.U, read, write),
        (item & ~riscv64.R, read, write),  # W without R is reserved
        (item | riscv64.PBMT, read, write),
        (item | 1 << 61, 0, 0),
        (item | 1 << 54, read, write),
        (item & ~riscv64.V, read, write),
    ):
        m.ram.store64(at, value)
        m.submit(m.inval())
        assert fe.translate(IOVA, True) == ((0x200000, 0) if not writes else (None, writes)), hex(value)
        m.submit(m.inval())
        assert fe.translate(IOVA, False) == ((0x200000, 0) if not reads else (None, reads)), hex(value)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("pages", [1, 16, 512], ids=["4K", "64K", "2M"])
def test_stale_until_invalidated(machine, stage, pages):
    m = machine(stage=stage)
    size = pages << 12
    m.map(IOVA, 0x200000, pages)
    assert bool(m.ram.load64(item_pa(m, IOVA)) & riscv64.N) == (pages == 16)
    fe = detached(m)
    assert fe.translate(IOVA, True)[0] == 0x200000
    m.table.unmap(IOVA, IOVA + size - 1)
    m.map(IOVA, 0x400000, pages)
    # Another tag, the page behind, the other stage, another VM: all of these leave it cached.
    other = riscv.iotinval_gvma() if stage == 1 else riscv.iotinval_vma()
    vm = riscv.iotinval_vma(gscid=m.tag) if stage == 1 else riscv.iotinval_gvma(gscid=m.tag + 1)
    for command in (
        m.inval(IOVA, m.tag + 1),
        m.inval(IOVA + size),
        m.inval(IOVA - 0x1000),
        m.inval(None, m.tag + 1),
        other,
        vm,
        riscv.iodir_inval_ddt(),
        riscv.iodir_inval_pdt(m.platform.bdf(0), 0),
    ):
        m.submit(command)
        fe.service()
        assert fe.translate(IOVA + size - 1, True)[0] == 0x200000 + size - 1, command
    # Any page of a large leaf or of a NAPOT run takes all of it.
    sequence = m.submit(m.inval(IOVA + size - 0x1000))
    assert not m.done(sequence)
    assert fe.service() == 2
    assert m.done(sequence)
    assert fe.translate(IOVA, True)[0] == 0x400000


@pytest.mark.parametrize("stage", STAGES)
def test_granularities(machine, stage):
    m = machine(stage=stage)
    fe = detached(m)
    for number, (command, goes) in enumerate(
        [
            (riscv.iotinval_vma(), stage == 1),
            (riscv.iotinval_vma(pscid=m.tag), stage == 1),
            (riscv.iotinval_vma(pscid=m.tag, gscid=m.tag), False),
            (riscv.iotinval_gvma(), stage == 2),
            (riscv.iotinval_gvma(gscid=m.tag), stage == 2),
            (riscv.iofence_c(), False),
        ]
    ):
        iova = (number + 1) << 21
        m.map(iova, 0x200000, 1)
        assert fe.translate(iova, False)[0] == 0x200000
        m.table.unmap(iova, iova + 0xFFF)
        m.submit(command)
        fe.service()
        assert (fe.translate(iova, False)[0] is None) == goes, command
        m.submit(m.inval())
        fe.service()


@pytest.mark.parametrize("stage", STAGES)
def test_hitless_replace(machine, stage):
    """A copy of the page of contexts is switched in by one store; it counts once the cached one is gone."""
    m = machine(devices=2, stage=stage)
    m.map(IOVA, 0x200000, 2)
    other = m.other_table()
    m.map(IOVA, 0x400000, 2, table=other)
    fe, neighbour = detached(m), detached(m, 1)
    for each in (fe, neighbour):
        assert each.translate(IOVA, False)[0] == 0x200000
    aside = m.page()
    m.ram.write(aside, m.ram.read(m.ddt[0], 4096))
    m.attach(0, other, tag=m.tag + 1, page=aside)
    m.ram.store64(m.ddt[1], riscv.directory_entry(aside))
    assert fe.translate(IOVA + 0x1000, False)[0] == 0x201000  # the context cache still has the old one
    for command in (m.inval(tag=m.tag + 1), riscv.iodir_inval_ddt(m.platform.bdf(1))):
        m.submit(command)
        fe.service()
        assert fe.translate(IOVA + 0x1000, False)[0] == 0x201000
    m.submit(riscv.iodir_inval_ddt())
    fe.service()
    neighbour.service()
    # Entries of the old domain are tagged with its id, so they cannot hit any more.
    assert fe.translate(IOVA + 0x1000, False)[0] == 0x401000
    assert fe.translate(IOVA, False)[0] == 0x400000
    assert neighbour.translate(IOVA + 0x1000, False)[0] == 0x201000
    assert m.regs.read32(r.FQT) == 0


def test_stages_do_not_share_tags(machine):
    """PSCID 5 and GSCID 5 are two owners."""
    m = machine()
    m.map(IOVA, 0x200000, 1)
    fe = detached(m)
    fe.translate(IOVA, False)
    second = Machine(stage=2)
    assert m.regs.look_up(m.platform.bdf(0)).owner != second.regs.look_up(second.platform.bdf(0)).owner
    second.platform.close()


def test_the_slowest_front_end_counts(machine):
    m = machine(devices=3)
    m.map(IOVA, 0x200000, 1)
    a, b = detached(m, 0), detached(m, 1)
    a.translate(IOVA, False)
    b.translate(IOVA, False)  # device 2 never did anything: it is not waited for
    m.table.unmap(IOVA, IOVA + 0xFFF)
    sequence = m.submit(m.inval(IOVA))
    a.service()
    assert not m.done(sequence)
    assert m.regs.read32(r.CQH) == 0
    b.service()
    assert m.done(sequence)
    assert m.regs.read32(r.CQH) == m.tail
    assert a.translate(IOVA, False)[0] is None
    assert b.translate(IOVA, False)[0] is None


def test_an_illegal_command_stops_every_front_end(machine):
    m = machine()
    m.map(IOVA, 0x200000, 1)
    fe = detached(m)
    fe.translate(IOVA, False)
    at = m.tail
    sequence = m.submit((0x7F, 0), m.inval())
    fe.service()
    assert not m.done(sequence)
    assert m.regs.read32(r.CQCSR) & r.CMD_ILL
    assert m.regs.read32(r.CQH) == at
    assert fe.service() == 0
    m.put(m.queue + 16 * at, riscv.iofence_c())
    m.regs.write32(r.CQCSR, r.QUEUE_EN | r.CMD_ILL)
    fe.service()
    assert m.done(sequence)


def test_a_new_kernel_takes_the_queue_over(machine):
    """cqen 0, wait for cqon and busy, new base, enable: heads start at 0 again, translation went on."""
    m = machine()
    m.map(IOVA, 0x200000, 1)
    fe = detached(m)
    fe.translate(IOVA, False)
    m.submit(m.inval(0))
    fe.service()
    m.regs.write32(r.CQCSR, 0)
    assert m.regs.read32(r.CQCSR) == r.QUEUE_ON | r.QUEUE_BUSY  # the front-end has not seen it yet
    m.regs.write32(r.CQCSR, r.QUEUE_EN)  # ignored while busy
    with pytest.raises(ValueError):
        m.regs.write64(r.CQB, 0)
    fe.service()
    assert m.regs.read32(r.CQCSR) == 0
    assert fe.translate(IOVA, False)[1] == 0
    m.queue, m.tail = m.page(), 0
    m.regs.write64(r.CQB, r.queue_base(m.queue, 6))
    m.regs.write32(r.CQCSR, r.QUEUE_EN)
    sequence = m.submit(m.inval())
    assert not m.done(sequence)
    fe.service()
    assert m.done(sequence)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 2**25 - 1), st.integers(0, 1500)), min_size=1, max_size=60),
    st.sampled_from(STAGES),
    st.sampled_from([3, 4]),
)
def test_cached_translation_equals_iova_to_phys(machine, picks, stage, levels):
    m = machine(stage=stage, levels=levels)
    fe = FrontEnd(m.platform, 0)
    for k, (page, _) in enumerate(picks[::2]):
        iova = (page & ~0x3FF) << 12
        try:
            m.map(iova, 0x200000 + (k % 4 << 21), (7, 64, 512)[k % 3])
        except ValueError:
            continue  # overlaps an earlier one
    for page, offset in picks * 2:
        iova = ((page & ~0x3FF) + offset % 1024 << 12) + offset
        want = int(m.table.iova_to_phys(np.array([iova], np.uint64))[0])
        assert (fe.translate(iova, False)[0] or 0) == want
