# SPDX-License-Identifier: Apache-2.0
"""RISC-V IOMMU registers: the queues' switches and errors, the directory pointer, fault records in memory."""

import pytest
from riscv_machine import COMMANDS, RECORDS, Machine

from iokeep.pt.roots import riscv
from iokeep.pt.roots.riscv import FaultReason, FaultRecord, Registers, Ttyp
from iokeep.soft.hardware.platform import Platform
from iokeep.soft.hardware.unit import Fault
from iokeep.soft.hardware.units import riscv as r


@pytest.fixture
def m():
    machine = Machine(devices=2)
    yield machine
    machine.platform.close()


@pytest.fixture
def fresh():
    with Platform.create(1 << 20, 1, iommu="riscv") as platform:
        yield platform.iommu


def test_reset(fresh):
    caps = fresh.read64(r.CAPABILITIES)
    # iommu-bits.h: VERSION [7:0], SV39 9 ... SV57 11, SVPBMT 15, SV39X4 17 ... SV57X4 19, IGS [29:28], PAS
    # [37:32]; no MSI_FLAT 22, AMO_HWAD 24, ATS 25, HPM 30, DBG 31, PD8 38 ...
    assert caps == 0x10 | 7 << 9 | 1 << 15 | 7 << 17 | 1 << 28 | 56 << 32
    assert fresh.read32(r.FCTL) == 2  # WSI
    assert fresh.read64(r.DDTP) == 0  # Off
    assert not fresh.translating
    for offset in (r.CQH, r.CQT, r.FQH, r.FQT, r.CQCSR, r.FQCSR, r.PQCSR, r.IPSR):
        assert fresh.read32(offset) == 0
    assert fresh.hw() == {"ddtp": "0x0", "caps": f"{caps:#x}", "fctl": "0x2"}
    assert fresh.fault_text(258) == FaultReason.DDT_INVALID.text
    assert fresh.fault_text(999) == "cause 999"


def test_offsets_are_those_of_linux():
    """drivers/iommu/riscv/iommu-bits.h."""
    assert (r.CAPABILITIES, r.FCTL, r.DDTP) == (0x0, 0x8, 0x10)
    assert (r.CQB, r.CQH, r.CQT, r.FQB, r.FQH, r.FQT) == (0x18, 0x20, 0x24, 0x28, 0x30, 0x34)
    assert (r.PQB, r.PQH, r.PQT, r.CQCSR, r.FQCSR, r.PQCSR) == (0x38, 0x40, 0x44, 0x48, 0x4C, 0x50)
    assert (r.IPSR, r.ICVEC) == (0x54, 0x2F8)
    assert (r.QUEUE_EN, r.QUEUE_IE, r.QUEUE_MF, r.QUEUE_ON, r.QUEUE_BUSY) == (1, 2, 256, 1 << 16, 1 << 17)
    assert (r.CMD_TO, r.CMD_ILL, r.FENCE_W_IP, r.FQOF) == (512, 1024, 2048, 512)


def test_accesses_that_no_driver_makes(fresh):
    for call in (
        lambda: fresh.read32(r.DDTP),
        lambda: fresh.read64(r.CQH),
        lambda: fresh.read32(0x58),
        lambda: fresh.read64(0x300),
        lambda: fresh.write64(r.CAPABILITIES, 0),
        lambda: fresh.write64(r.PQB, 0),
        lambda: fresh.write32(r.CQH, 0),
        lambda: fresh.write32(r.FQT, 0),
        lambda: fresh.write32(r.FCTL, 0),
        lambda: r.queue_base(0x1000, 0),
        lambda: r.queue_base(0x1001, 8),
    ):
        with pytest.raises(ValueError):
            call()


def test_ddtp_modes(fresh):
    """Off and Bare to anything, a directory to Off and Bare only, no illegal mode."""
    for mode, translating in ((1, False), (2, True), (0, False), (4, True), (1, False), (3, True)):
        fresh.write64(r.DDTP, 0x1000 >> 2 | mode)
        assert fresh.read64(r.DDTP) == 0x400 | mode
        assert fresh.translating == translating
    for other in (2, 3, 4, 5, 15):
        fresh.write64(r.DDTP, 0x2000 >> 2 | other)
        assert fresh.read64(r.DDTP) == 0x403
    fresh.write64(r.DDTP, 1 << 63 | riscv.DDTP_BUSY)
    assert fresh.read64(r.DDTP) == 0


def test_queue_bases_stay_while_the_queues_are_on(m):
    assert m.regs.read32(r.CQCSR) == r.QUEUE_EN | r.QUEUE_ON
    assert m.regs.read32(r.FQCSR) == r.QUEUE_EN | r.QUEUE_ON
    for base, csr in ((r.CQB, r.CQCSR), (r.FQB, r.FQCSR)):
        with pytest.raises(ValueError, match="while its queue is on"):
            m.regs.write64(base, 0)
        m.regs.write32(csr, 0)
        assert m.regs.read32(csr) == 0
        m.regs.write64(base, r.queue_base(0x3000, 3))
        assert m.regs.read64(base) == 0x3000 >> 2 | 2


def test_commands_without_front_ends(m):
    for n in range(3 * COMMANDS):
        sequence = m.submit(riscv.iodir_inval_ddt(), riscv.iotinval_vma())
        assert m.done(sequence)
        assert m.regs.read32(r.CQH) == m.regs.read32(r.CQT) == 3 * (n + 1) % COMMANDS
    m.regs.write32(r.CQT, m.tail | COMMANDS)  # bits above the size are not there
    assert m.regs.read32(r.CQT) == m.tail


def test_no_command_is_done_while_the_queue_is_off(m):
    m.regs.write32(r.CQCSR, 0)
    sequence = m.submit()
    assert not m.done(sequence)
    m.regs.write32(r.CQCSR, r.QUEUE_EN)
    assert m.done(sequence)


@pytest.mark.parametrize("interrupt", [0, r.QUEUE_IE])
def test_illegal_command_stops_the_queue(m, interrupt):
    m.regs.write32(r.CQCSR, r.QUEUE_EN | interrupt)
    m.submit(riscv.iotinval_vma())
    at = m.tail
    sequence = m.submit((riscv.iotinval_vma()[0] | 1 << 34, 0))  # NL, which capabilities do not have
    assert not m.done(sequence)
    assert m.regs.read32(r.CQH) == at
    assert m.regs.read32(r.CQCSR) == r.QUEUE_EN | interrupt | r.QUEUE_ON | r.CMD_ILL
    assert m.regs.read32(r.IPSR) == (r.CIP if interrupt else 0)
    m.regs.write32(r.IPSR, r.CIP)  # what is still so pends again
    assert m.regs.read32(r.IPSR) == (r.CIP if interrupt else 0)
    m.put(m.queue + 16 * at, riscv.iotinval_vma())
    m.regs.write32(r.CQCSR, r.QUEUE_EN | interrupt | r.CMD_ILL)
    assert m.done(sequence)
    assert m.regs.read32(r.CQCSR) == r.QUEUE_EN | interrupt | r.QUEUE_ON
    m.regs.write32(r.IPSR, r.CIP)
    assert m.regs.read32(r.IPSR) == 0


def test_memory_faults_of_the_command_queue(m):
    at = m.tail
    m.put(m.queue + 16 * at, riscv.iofence_c((1 << 40, 1)))
    m.regs.write32(r.CQT, at + 1)
    assert m.regs.read32(r.CQCSR) & (r.QUEUE_MF | r.CMD_ILL) == r.QUEUE_MF
    assert m.regs.read32(r.CQH) == at
    # Enabling anew clears the error and begins at 0; a queue outside of memory fails as well.
    m.regs.write32(r.CQCSR, 0)
    m.regs.write64(r.CQB, r.queue_base(1 << 40, 4))
    m.regs.write32(r.CQCSR, r.QUEUE_EN)
    assert m.regs.read32(r.CQCSR) == r.QUEUE_EN | r.QUEUE_ON
    m.regs.write32(r.CQT, 1)
    assert m.regs.read32(r.CQCSR) & (r.QUEUE_MF | r.CMD_ILL) == r.QUEUE_MF


def test_fence_by_wire(m):
    m.regs.write32(r.CQCSR, r.QUEUE_EN | r.QUEUE_IE)
    sequence = m.submit(riscv.iofence_c(wsi=True))
    assert m.done(sequence)
    assert m.regs.read32(r.CQCSR) & r.FENCE_W_IP
    assert m.regs.read32(r.IPSR) == r.CIP
    assert m.done(m.submit())  # it is no error
    m.regs.write32(r.CQCSR, r.QUEUE_EN | r.QUEUE_IE | r.FENCE_W_IP)
    m.regs.write32(r.IPSR, r.CIP)
    assert (m.regs.read32(r.CQCSR) & r.FENCE_W_IP, m.regs.read32(r.IPSR)) == (0, 0)


def test_device_ids_wider_than_the_directory_are_illegal(m):
    m.submit(riscv.iodir_inval_ddt(1 << 16))
    assert m.regs.read32(r.CQCSR) & r.CMD_ILL


def test_fault_records_and_overflow(m):
    m.regs.write32(r.FQCSR, r.QUEUE_EN | r.QUEUE_IE)
    faults = [Fault(13, 0x1234, 1, 0), Fault(23, 0x2347, 2, 0), Fault(258, 5, 3, 0), Fault(15, 6, 2, 0)]
    with m.platform.lock.held():
        m.regs.record_faults(1, faults[:2], 0)
    device = m.platform.bdf(1)
    assert m.record(0) == FaultRecord(cause=13, ttyp=Ttyp.READ, device_id=device, iotval=0x1234)
    second = FaultRecord(cause=23, ttyp=Ttyp.WRITE, device_id=device, iotval=0x2347, iotval2=0x2344)
    assert m.record(1) == second
    assert (m.regs.read32(r.FQT), m.regs.read32(r.IPSR)) == (2, r.FIP)
    m.regs.write32(r.IPSR, r.FIP)
    assert m.regs.read32(r.IPSR) == 0
    m.regs.record_faults(0, faults[2:], 0)  # one has room, then the queue is full
    assert m.regs.read32(r.FQT) == RECORDS - 1
    assert m.record(2).cause == 258
    assert m.regs.read32(r.FQCSR) & r.FQOF
    assert m.regs.read32(r.IPSR) == r.FIP
    m.regs.write32(r.FQH, 3)
    m.regs.record_faults(0, faults[:1], 0)  # dropped until software clears the bit
    assert m.regs.read32(r.FQT) == 3
    m.regs.write32(r.FQCSR, r.QUEUE_EN | r.FQOF)
    m.regs.record_faults(0, faults[:1], 3)  # wraps; others were lost on the way
    assert m.regs.read32(r.FQT) == 0
    assert m.record(3).iotval == 0x1234
    assert m.regs.read32(r.FQCSR) == r.QUEUE_EN | r.QUEUE_ON | r.FQOF


def test_fault_queue_off_or_outside_of_memory(m):
    m.regs.write32(r.FQCSR, 0)
    m.regs.record_faults(0, [Fault(13, 0, 1, 0)], 1)
    assert (m.regs.read32(r.FQT), m.regs.read32(r.FQCSR)) == (0, 0)
    m.regs.write64(r.FQB, r.queue_base(1 << 40, 2))
    m.regs.write32(r.FQCSR, r.QUEUE_EN | r.QUEUE_IE)
    m.regs.record_faults(0, [Fault(13, 0, 1, 0)], 0)
    assert m.regs.read32(r.FQCSR) & r.QUEUE_MF
    assert m.regs.read32(r.IPSR) == r.FIP
    m.regs.write32(r.FQCSR, 0)
    m.regs.write32(r.FQCSR, r.QUEUE_EN)
    assert m.regs.read32(r.FQCSR) == r.QUEUE_EN | r.QUEUE_ON


@pytest.mark.parametrize("directory", [1, 2, 3])
@pytest.mark.parametrize("stage", [1, 2])
def test_look_up(directory, stage):
    m = Machine(devices=2, stage=stage, directory=directory, levels=3)
    with m.platform:
        context = m.regs.look_up(m.platform.bdf(1))
        assert (context.table.format, context.table.root_pa) == ("riscv64", m.table.root_pa)
        assert context.table.config["stage"] == stage
        assert context.owner == (r.owner_of(pscid=5) if stage == 1 else r.owner_of(gscid=5))
        assert context.owner < 1 << 48
        page = {1: (13, 15), 2: (21, 23)}[stage]
        assert context.codes == ((5, *[page[0]] * 4), (7, *[page[1]] * 4))
        assert not context.silent
        with pytest.raises(riscv.RootFault, match="DDT_INVALID"):
            m.regs.look_up(m.platform.bdf(0) + 1)


def test_look_up_refuses_what_the_model_cannot_do(m):
    stage = riscv.Stage(0x4000, 3, 1)
    for dc in (
        riscv.device_context(extended=False),
        riscv.device_context(stage, stage, extended=False),
        riscv.device_context(stage, extended=False, tc=riscv.TC_SADE),
        riscv.device_context(stage, extended=False, tc=riscv.TC_PDTV),
    ):
        m.put(m.dc_pa(0), dc)
        with pytest.raises(riscv.RootFault) as caught:
            m.regs.look_up(m.platform.bdf(0))
        assert caught.value.reason == FaultReason.DDT_MISCONFIGURED
    m.regs.write64(r.DDTP, riscv.MODE_BARE)
    with pytest.raises(riscv.RootFault):
        m.regs.look_up(m.platform.bdf(0))


def test_disabled_fault_reporting(m):
    """tc.DTF silences page faults, not those of the directory."""
    stage = riscv.Stage(m.table.root_pa, 4, 5)
    m.put(m.dc_pa(0), riscv.device_context(stage, extended=False, tc=riscv.TC_DTF))
    assert m.regs.look_up(m.platform.bdf(0)).silent
    registers = Registers(m.regs.read64(r.DDTP), m.regs.read64(r.CAPABILITIES))
    with pytest.raises(riscv.RootFault) as caught:
        riscv.find_root(m.ram, registers, m.platform.bdf(0), 1)
    assert caught.value.reason == FaultReason.TTYP_BLOCKED
    assert m.regs.silent(caught.value)
    m.ram.store64(m.dc_pa(0), riscv.V | riscv.TC_DTF | riscv.TC_SXL)
    with pytest.raises(riscv.RootFault) as caught:
        m.regs.look_up(m.platform.bdf(0))
    assert not m.regs.silent(caught.value)
