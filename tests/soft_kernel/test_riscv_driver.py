# SPDX-License-Identifier: Apache-2.0
"""The RISC-V IOMMU driver: device directory, contexts, hitless replace, what it flushes, takeover."""

import numpy as np
import pytest
from soft_machine import MIB, Caller, boot, settled

from iokeep.errors import IokeepError
from iokeep.pt.extents import Extents
from iokeep.pt.roots import riscv as codec
from iokeep.pt.roots.riscv import FaultReason, Kind, RootFault
from iokeep.soft.hardware.units import riscv as reg
from iokeep.soft.kernel.drivers.riscv import INVAL_LIMIT, RiscvIommu
from iokeep.soft.kernel.iommu import Inherited
from iokeep.uapi import iommufd as uapi

MODES = {"first-stage": 1, "second-stage": 2}


@pytest.fixture(params=MODES)
def kernel(request):
    kernel = boot(kind="riscv", iommu=request.param, devices=3)
    yield kernel
    settled(kernel)


@pytest.fixture
def stage(kernel):
    return MODES[kernel.iommu.mode]


@pytest.fixture
def commands(kernel, monkeypatch):
    """All commands that the driver submits, decoded."""
    queue, seen = kernel.iommu._queue, []
    real = queue.submit

    def submit(words):
        seen.extend(codec.decode_command(w, kernel.iommu._registers) for w in words)
        real(words)

    monkeypatch.setattr(queue, "submit", submit)
    return seen


def reason_of(kernel, dev):
    with pytest.raises(RootFault) as caught:
        kernel.iommu.root_of(dev)
    return caught.value.reason


def test_boot(kernel, stage):
    driver = kernel.iommu
    assert driver.root_register & codec.DDTP_MODE_MASK == codec.MODE_2LVL
    assert driver.structure_pages().tolist() == [codec.ppn_pa(driver.root_register)]
    assert driver.version == 0x10
    assert driver.hw_info() == (uapi.IOMMU_HW_INFO_TYPE_NONE, b"")
    assert driver.n_ids == (1 << 20 if stage == 1 else 1 << 16)
    assert driver.regs.read32(reg.CQCSR) == reg.QUEUE_EN | reg.QUEUE_ON
    assert driver.regs.read32(reg.FQCSR) == reg.QUEUE_EN | reg.QUEUE_ON
    assert all(reason_of(kernel, dev) == FaultReason.DDT_INVALID for dev in driver.devices)
    config = {"levels": 5, "stage": stage, "svnapot": 1, "svpbmt": 1, "hardware_ad": 0, "output_bits": 56}
    assert dict(driver.fmt.config) == config
    assert "riscv-iommu" in kernel.klog.text()


@pytest.mark.parametrize("mode", MODES)
def test_levels(mode):
    for levels in (3, 4, 5):
        kernel = boot(kind="riscv", iommu=mode, levels=str(levels))
        domain = kernel.iommu.alloc_domain()
        dev = kernel.iommu.devices[0]
        kernel.iommu.set_domain(dev, domain)
        assert len(kernel.iommu.root_of(dev).fmt.levels) == levels
        # x4: two bits more, and no sign
        bits = 12 + 9 * levels + (2 if mode == "second-stage" else -1)
        assert domain.aperture_last == (1 << bits) - 1
        kernel.iommu.set_domain(dev, None)
        domain.free()
        settled(kernel)
    for levels in (2, 6):
        with pytest.raises(IokeepError, match="tables of"):
            boot(kind="riscv", iommu=mode, levels=str(levels))


def test_the_largest_table_that_the_iommu_has(kernel, stage):
    unit = kernel.platform.iommu
    caps = unit.read64(reg.CAPABILITIES)
    sv57 = (codec.CAP_FIRST if stage == 1 else codec.CAP_SECOND)[10]
    unit.bank[reg.CAPABILITIES >> 3] = np.uint64(caps & ~sv57 & ~codec.CAP_SVPBMT)
    fmt = RiscvIommu(kernel).fmt
    assert (len(fmt.levels), fmt.config["svpbmt"]) == (4, 0)
    unit.bank[reg.CAPABILITIES >> 3] = np.uint64(caps)


def test_second_stage_roots_are_16k(kernel, stage):
    domain = kernel.iommu.alloc_domain()
    assert len(domain.table_pages) == (4 if stage == 2 else 1)
    assert domain.root_pa % (4096 if stage == 1 else 16384) == 0
    domain.map(Extents.of([(0, 4 * MIB - 1, 0, 3)]))
    domain.free()


def test_napot_runs_are_made(kernel):
    domain = kernel.iommu.alloc_domain()
    domain.map(Extents.of([(0x10000, 0x2FFFF, 0x40000, 3)]))
    item = codec_item(domain, 0x10000)
    assert item >> 63 == 1
    assert domain.iova_to_phys(np.array([0x23456], np.uint64)).tolist() == [0x53456]
    domain.free()


def codec_item(domain, iova):
    from iokeep.pt.walk import walk

    steps = walk(domain.fmt, domain.iommu.kernel.frames.ram, domain.root_pa, iova).steps
    return domain.iommu.kernel.frames.ram.load64(steps[-1][1])


def test_contexts_become_valid_at_their_last_store(kernel, monkeypatch):
    """Until then the device is blocked, and so it is from the first store of a detach on."""
    driver, dev = kernel.iommu, kernel.iommu.devices[1]
    domain, seen = driver.alloc_domain(), []
    ram = kernel.platform.ram
    real = type(ram).store64

    def store(self, pa, value):
        real(self, pa, value)
        try:
            seen.append(driver.root_of(dev).root_pa)
        except RootFault as error:
            seen.append(error.reason)

    monkeypatch.setattr(type(ram), "store64", store)
    driver.set_domain(dev, domain)
    assert seen == [FaultReason.DDT_INVALID] * (len(seen) - 1) + [domain.root_pa]
    seen.clear()
    driver.set_domain(dev, None)
    assert seen == [FaultReason.DDT_INVALID] * codec.DC_BASE_WORDS
    monkeypatch.undo()
    domain.free()


def test_replace_is_one_store_of_the_directory(kernel, monkeypatch):
    driver = kernel.iommu
    old, new = driver.alloc_domain(), driver.alloc_domain()
    for dev in driver.devices:
        driver.set_domain(dev, old)
    dev, others = driver.devices[1], (driver.devices[0], driver.devices[2])
    before, root = set(driver.structure_pages().tolist()), driver.root_register
    stores = []
    ram = kernel.platform.ram
    real64, real = type(ram).store64, type(ram).write

    def look():
        stores.append(driver.root_of(dev).root_pa)
        assert all(driver.root_of(d).root_pa == old.root_pa for d in others)

    monkeypatch.setattr(type(ram), "store64", lambda self, pa, value: (real64(self, pa, value), look())[0])
    monkeypatch.setattr(type(ram), "write", lambda self, pa, data: (real(self, pa, data), look())[0])
    driver.set_domain(dev, new)
    monkeypatch.undo()
    switch = stores.index(new.root_pa)
    assert stores == [old.root_pa] * switch + [new.root_pa] * (len(stores) - switch)
    after = set(driver.structure_pages().tolist())
    assert driver.root_register == root
    assert len(after - before) == len(before - after) == 1
    assert kernel.audit().leaked == 0
    for each in driver.devices:
        driver.set_domain(each, None)
    old.free()
    new.free()


def test_what_a_change_of_a_context_flushes(kernel, stage, commands):
    """Specification, "Changing device directory table entry"."""
    driver, dev = kernel.iommu, kernel.iommu.devices[0]
    old, new = driver.alloc_domain(), driver.alloc_domain()
    driver.set_domain(dev, old)
    assert commands == []  # contexts without V are not cached
    driver.set_domain(dev, new)
    replaced = list(commands)
    commands.clear()
    driver.set_domain(dev, None)
    blocked = list(commands)
    # A non-leaf entry changed: without DID. A context changed: with it.
    assert (replaced[0].kind, replaced[0].device_id) == (Kind.DDT, None)
    assert (blocked[0].kind, blocked[0].device_id) == (Kind.DDT, dev.bdf)
    for got, domain in ((replaced, old), (blocked, new)):
        tag = {"pscid": domain.domain_id} if stage == 1 else {"gscid": domain.domain_id}
        kind = Kind.VMA if stage == 1 else Kind.GVMA
        assert codec.Decoded(kind=kind, **tag) in got
    old.free()
    new.free()


def test_ranges_are_flushed_by_page_up_to_2m(kernel, stage, commands):
    """riscv_iommu_iotlb_inval(): end - start < RISCV_IOMMU_IOTLB_INVAL_LIMIT - 1."""
    driver, dev = kernel.iommu, kernel.iommu.devices[0]
    domain = driver.alloc_domain()
    driver.flush_range(domain, 0, 4095)
    driver.flush_domain(domain)
    assert commands == []  # no device uses it
    driver.set_domain(dev, domain)
    for iova, last, pages in (
        (0x5000, 0x5FFF, 1),
        (0x5000, 0x8FFF, 4),
        (0, INVAL_LIMIT - 0x1001, 511),
        (0, INVAL_LIMIT - 1, None),
        (0, domain.aperture_last, None),
    ):
        driver.flush_range(domain, iova, last)
        want = [None] if pages is None else [iova + 4096 * n for n in range(pages)]
        assert [c.iova for c in commands] == want
        assert {c.kind for c in commands} == {Kind.VMA if stage == 1 else Kind.GVMA}
        assert {c.pscid if stage == 1 else c.gscid for c in commands} == {domain.domain_id}
        commands.clear()
    driver.set_domain(dev, None)
    domain.free()


def test_devices_of_other_directory_pages():
    """32 devices: 16 a page of 128 device ids."""
    kernel = boot(kind="riscv", devices=40)
    driver = kernel.iommu
    a, b = driver.alloc_domain(), driver.alloc_domain()
    for dev in driver.devices:
        driver.set_domain(dev, a)
    pages = {dev.bdf >> 7 for dev in driver.devices}
    assert len(driver.structure_pages()) == 1 + len(pages)
    driver.set_domain(driver.devices[39], b)
    assert driver.root_of(driver.devices[39]).root_pa == b.root_pa
    assert driver.root_of(driver.devices[38]).root_pa == a.root_pa
    for dev in driver.devices:
        driver.set_domain(dev, None)
    a.free()
    b.free()
    settled(kernel)


def test_attachment_by_system_calls(kernel):
    c = Caller(kernel)
    fd = c.iommu()
    ioas, other = c.ioas(fd), c.ioas(fd)
    m = c.memfd(size=4 * MIB)
    c.map_file(fd, ioas, m, 0, 2 * MIB, 0)
    v = c.vfio()
    c.bind(v, fd)
    c.attach(v, ioas)
    c.map_file(fd, ioas, m, 2 * MIB, MIB, 4 * MIB)
    c.unmap(fd, ioas, 0, 2 * MIB)
    c.attach(v, other)
    c.detach(v)
    assert reason_of(kernel, kernel.iommu.devices[0]) == FaultReason.DDT_INVALID


def test_structures_are_adopted_as_they_are(kernel):
    """What a kernel inherits is what the one before had; pages that were not preserved are refused."""
    driver = kernel.iommu
    domain = driver.alloc_domain()
    for dev in driver.devices:
        driver.set_domain(dev, domain)
    pages, ddtp = driver.structure_pages(), driver.root_register
    heir = RiscvIommu(kernel)
    heir.inherit(Inherited(ddtp, pages))
    assert heir.structure_pages().tolist() == pages.tolist()
    for missing in range(len(pages)):
        with pytest.raises(IokeepError, match="not among the preserved"):
            RiscvIommu(kernel).inherit(Inherited(ddtp, np.delete(pages, missing)))
    with pytest.raises(IokeepError, match="no directory of 2 levels"):
        RiscvIommu(kernel).inherit(Inherited(ddtp + 1, pages))
    for dev in driver.devices:
        driver.set_domain(dev, None)
    domain.free()


def test_hold_takes_what_hardware_uses(kernel):
    driver = kernel.iommu
    domain = driver.alloc_domain()
    driver.set_domain(driver.devices[2], domain)
    for mode in MODES:
        other = RiscvIommu(kernel)
        other.mode = mode
        assert other.hold().tolist() == driver.structure_pages().tolist()
        assert other.mode == kernel.params.text("iommu")
    driver.set_domain(driver.devices[2], None)
    other = RiscvIommu(kernel)
    assert other._held_mode() == other.mode
    domain.free()


def test_an_unknown_device_is_blocked(kernel, stage, commands):
    driver, dev = kernel.iommu, kernel.iommu.devices[0]
    domain = driver.alloc_domain()
    driver.set_domain(dev, domain)
    dev.domain = None
    domain.devices.clear()
    driver.block_unknown(dev)
    assert reason_of(kernel, dev) == FaultReason.DDT_INVALID
    assert {c.pscid if stage == 1 else c.gscid for c in commands} >= {domain.domain_id}
    commands.clear()
    driver.block_unknown(dev)
    assert commands == []
    domain.free()


def test_a_directory_that_nobody_handed_over_is_not_used():
    """A kernel that inherits nothing turns the IOMMU off first, then uses a directory of its own."""
    kernel = boot(kind="riscv")
    unit = kernel.platform.iommu
    unit.write64(reg.DDTP, codec.MODE_OFF)
    unit.write64(reg.DDTP, codec.ddtp_value(0x7000, 3))
    driver = RiscvIommu(kernel)
    driver.start()
    assert driver.root_register == codec.ddtp_value(driver.structure_pages()[0].item(), 2)
    kernel.platform.close()
