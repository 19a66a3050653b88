# SPDX-License-Identifier: Apache-2.0
"""The machine: shared memfds, registers, boot page, refusal of what is no platform."""

import os

import numpy as np
import pytest

from iokeep.errors import InputError
from iokeep.soft.hardware import bar
from iokeep.soft.hardware.platform import Platform
from iokeep.soft.hardware.unit import FE_OVERFLOW
from iokeep.soft.hardware.units import vtd as r


def again(p):
    return Platform.from_fds(os.dup(p.fds.ram), os.dup(p.fds.regs), os.dup(p.fds.tags))


def test_two_views_of_one_machine():
    with Platform.create(1 << 20, 3) as a, again(a) as b:
        a.ram.store64(0x1000, 2**63 + 5)
        assert b.ram.load64(0x1000) == 2**63 + 5
        a.tags[7] = 0xDEADBEEF
        assert b.tags[7] == 0xDEADBEEF
        assert len(b.tags) == 256
        b.boot.fdt_addr = 0x123000
        assert a.boot.fdt_addr == 0x123000
        b.boot.clear()
        assert a.boot.fdt_addr == 0
        bar.set_step(b.bars[2], 9)
        assert bar.read_register(a.bars[2], bar.STEP) == 9
        assert bar.read_register(a.bars[1], bar.STEP) == 0
        start, length = a.bar_extent(2)
        assert os.pread(a.fds.regs, 8, start + bar.STEP) == (9).to_bytes(8, "little")
        assert start + length == a.regs_bytes
        assert [a.index_of(a.bdf(i)) for i in range(3)] == [0, 1, 2]
        with pytest.raises(KeyError):
            a.index_of(0xFFFF)
    a.close()  # idempotent


def test_requester_ids_are_distinct():
    with Platform.create(1 << 20, 64, 0x5000) as p:
        assert len({p.bdf(i) for i in range(64)}) == 64
        assert any(p.bdf(i) & 0x80 for i in range(64))  # both halves of a scalable root entry
        assert p.bdf(63) >> 8 == 2


@pytest.mark.parametrize("shape", [(0, 1, 0x8000), (4097, 1, 0x8000), (4096, 0, 0x8000), (4096, 65, 0x8000),
                                   (4096, 1, 0x4000), (4096, 1, 0x8001)])  # fmt: skip
def test_impossible_shapes(shape):
    with pytest.raises(ValueError):
        Platform.create(*shape)


def test_not_a_platform():
    with Platform.create(1 << 20) as p:
        with pytest.raises(InputError, match="does not describe"):
            Platform.from_fds(os.dup(p.fds.ram), os.dup(p.fds.ram), os.dup(p.fds.tags))
        other = os.memfd_create("other")
        os.ftruncate(other, 1 << 19)
        with pytest.raises(InputError, match="size"):
            Platform.from_fds(other, os.dup(p.fds.regs), os.dup(p.fds.tags))


def test_capabilities_are_what_is_modelled():
    with Platform.create(1 << 20, 5) as p:
        cap, ecap = p.iommu.read64(r.DMAR_CAP_REG), p.iommu.read64(r.DMAR_ECAP_REG)
        assert p.iommu.read32(r.DMAR_VER_REG) == 0x40
        assert cap >> 8 & 0x1F == 0b01110
        assert (cap >> 16 & 0x3F) + 1 == 57
        assert (cap >> 24 & 0x3FF) * 16 == r.DMAR_FRCD_REG
        assert (cap >> 40 & 0xFF) + 1 == 5
        assert cap >> 48 & 0x3F == r.MAMV
        assert cap >> 7 & 1 == 0  # CM: nothing that is not present is cached
        assert ecap >> 1 & 1  # QI
        for absent in (2, 3, 6, 26):  # device-TLB, interrupt remapping, pass-through, nesting
            assert ecap >> absent & 1 == 0


def test_command_and_status_registers():
    with Platform.create(1 << 20, 2) as p:
        regs = p.iommu
        regs.write64(r.DMAR_RTADDR_REG, 0x5000)
        assert regs.hidden[r.HIDDEN_ROOT] == 0  # not latched yet
        regs.write32(r.DMAR_GCMD_REG, r.DMA_GCMD_SRTP)
        assert regs.hidden[r.HIDDEN_ROOT] == 0x5000
        assert regs.read32(r.DMAR_GSTS_REG) == r.DMA_GSTS_RTPS
        regs.write32(r.DMAR_GCMD_REG, r.DMA_GCMD_TE)
        assert regs.read32(r.DMAR_GSTS_REG) == r.DMA_GSTS_RTPS | r.DMA_GSTS_TES
        regs.write32(r.DMAR_GCMD_REG, r.DMA_GCMD_TE | r.DMA_GCMD_QIE)
        assert regs.read32(r.DMAR_GSTS_REG) == r.DMA_GSTS_RTPS | r.DMA_GSTS_TES | r.DMA_GSTS_QIES
        assert regs.read64(0x18) >> 32 == regs.read32(r.DMAR_GSTS_REG)
        regs.write32(r.DMAR_GCMD_REG, 0)
        assert regs.read32(r.DMAR_GSTS_REG) == r.DMA_GSTS_RTPS
        assert regs.read32(r.DMAR_GCMD_REG) == 0


def test_registers_that_are_not_there():
    with Platform.create(1 << 20) as p:
        regs = p.iommu
        for call in (
            lambda: regs.write64(r.DMAR_CAP_REG, 0),
            lambda: regs.write32(r.DMAR_GSTS_REG, 0),
            lambda: regs.write64(0x28, 1 << 63),  # CCMD_REG: only the queue is modelled
            lambda: regs.read64(4),
            lambda: regs.read32(4096),
            lambda: regs.write64(r.DMAR_IQT_REG, 8),
            lambda: regs.write64(r.DMAR_IQT_REG, 4096),
        ):
            with pytest.raises(ValueError):
                call()
        regs.write32(r.DMAR_GCMD_REG, r.DMA_GCMD_QIE)
        with pytest.raises(ValueError, match="while"):
            regs.write64(r.DMAR_IQA_REG, 0x1000)


def test_fault_records_are_write_one_to_clear():
    with Platform.create(1 << 20, 2) as p:
        regs = p.iommu
        at = (r.DMAR_FRCD_REG >> 3) + 2  # the record of front-end 1
        regs.bank[at] = 0x123000
        regs.bank[at + 1] = r.FRCD_F | 5 << 32 | 0x28
        p.front_ends[0, FE_OVERFLOW] = 1
        assert regs.read32(r.DMAR_FSTS_REG) == r.DMA_FSTS_PPF | r.DMA_FSTS_PFO | 1 << 8
        regs.write64(r.DMAR_FRCD_REG + 16 + 8, 0)
        assert regs.fault_record(1)[1] >> 63
        regs.write32(r.DMAR_FRCD_REG + 16 + 12, 1 << 31)
        assert regs.fault_record(1) == (0x123000, 5 << 32 | 0x28)
        regs.write32(r.DMAR_FSTS_REG, r.DMA_FSTS_PFO)
        assert regs.read32(r.DMAR_FSTS_REG) == 0


def test_bar_power_on_and_codecs():
    with Platform.create(1 << 20, 2) as p:
        w = p.bars[1]
        assert bar.read_register(w, bar.ID) == bar.BAR_MAGIC
        assert bar.read_register(w, bar.INDEX) == 1
        assert bar.read_register(w, bar.CAPACITY) == (bar.BAR_BYTES - 0x4000) // 32
        rows = [bar.RangeRow(2**63, 2**63 + 0xFFF, 9, 0xFFFFFFFF, 3), bar.RangeRow(0, 2**64 - 1, 0, 0, 4)]
        assert bar.write_ranges(w, rows, timeout=0) == 1
        assert bar.decode_ranges(w) == rows
        for bad in (
            bar.RangeRow(1, 0xFFF, 0, 0),
            bar.RangeRow(0, 0x1000, 0, 0),
            bar.RangeRow(0x1000, 0xFFF, 0, 0),
        ):
            with pytest.raises(ValueError, match="pages"):
                bar.write_ranges(w, [bad], timeout=0)
        with pytest.raises(ValueError, match="holds"):
            bar.write_ranges(w, [bar.RangeRow(0, 0xFFF, 0, 0)] * 8000, timeout=0)
        with pytest.raises(ValueError, match="31"):
            bar.set_step(w, 32)
        with pytest.raises(TimeoutError, match="off"):
            bar.wait_ready(w, timeout=0.01)
        with pytest.raises(TimeoutError, match="off"):
            bar.enable(w, timeout=0.01)
        with pytest.raises(TimeoutError, match="last range table"):
            bar.write_ranges(w, rows, timeout=0.01)


def test_step_sums():
    a = bar.StepStats(transactions=1, max_gap_ns=5, bursts=1, first_ns=10, last_ns=20)
    b = bar.StepStats(transactions=2, max_gap_ns=3, bursts=4, first_ns=30, last_ns=40)
    assert a + b == bar.StepStats(transactions=3, max_gap_ns=5, bursts=5, first_ns=10, last_ns=40)
    assert a + bar.StepStats() == a
    assert np.uint64(bar._SPARE) == len(bar.StepStats.__dataclass_fields__)
