# SPDX-License-Identifier: Apache-2.0
"""AMD-Vi: registers, commands, the event log, and front-ends whose caches are stale until invalidated."""

import numpy as np
import pytest
from front_ends import detached

from iokeep.pt.build import Table
from iokeep.pt.extents import Extents
from iokeep.pt.registry import open_format
from iokeep.pt.roots import amd
from iokeep.pt.roots.amd import FaultReason
from iokeep.soft.hardware import engine
from iokeep.soft.hardware.iommu import FrontEnd
from iokeep.soft.hardware.platform import Platform
from iokeep.soft.hardware.unit import FE_OVERFLOW
from iokeep.soft.hardware.units import amd as r

IOVA = 1 << 30
LEN_256 = 8 << r.BUF_LEN_SHIFT
ON = r.CONTROL_IOMMU_EN | r.CONTROL_CMDBUF_EN | r.CONTROL_EVT_LOG_EN
EVT_INT, EVT_RUN, CMD_RUN = r.STATUS_EVT_INT, r.STATUS_EVT_RUN, r.STATUS_CMDBUF_RUN


class Machine:
    """A platform with one domain for all devices, a command buffer and an event log of 256 entries."""

    def __init__(self, devices=1, levels=3, control=ON, ram_bytes=16 << 20):
        self.platform = Platform.create(ram_bytes, devices, iommu="amd")
        self.ram, self.regs = self.platform.ram, self.platform.iommu
        self.next, self.did = 16 << 12, 5
        self.fmt = open_format("amdv1", {"levels": levels})
        self.table = self.new_table()
        self.devtab, self.commands, self.log, self.status = (self.page() for _ in range(4))
        for index in range(devices):
            self.attach(index)
        self.regs.write64(r.MMIO_DEV_TABLE, amd.device_table_register(self.devtab, 4096))
        self.regs.write64(r.MMIO_CMD_BUF, self.commands | LEN_256)
        self.regs.write64(r.MMIO_EVT_BUF, self.log | LEN_256)
        self.regs.write64(r.MMIO_CONTROL, control)
        self.tail = self.sequence = 0

    def page(self):
        pa, self.next = self.next, self.next + 4096
        assert self.next <= self.ram.size
        return pa

    def new_table(self, fmt=None):
        alloc = lambda n, *_: np.array([self.page() for _ in range(n)], np.uint64)  # noqa: E731
        return Table.create(fmt or self.fmt, self.ram, alloc, lambda *_: None)

    def entry(self, index, words, devtab=None):
        pa = (devtab or self.devtab) + self.platform.bdf(index) * 32
        for i, word in enumerate(words):
            self.ram.store64(pa + 8 * i, word)

    def attach(self, index, table=None, did=None, devtab=None, prot=3):
        table = table or self.table
        dte = amd.dte_host(table.root_pa, len(table.fmt.levels), did or self.did, prot=prot)
        self.entry(index, dte, devtab)

    def map(self, iova, pa, pages, prot=3, table=None):
        (table or self.table).map(Extents.of([(iova, iova + (pages << 12) - 1, pa, prot)]))

    def put(self, *commands):
        """Commands into the buffer; the tail register is written."""
        for command in commands:
            for i, word in enumerate(command):
                self.ram.store64(self.commands + self.tail + 8 * i, word)
            self.tail = (self.tail + 16) % 4096
        self.regs.write32(r.MMIO_CMD_TAIL, self.tail)

    def submit(self, *commands):
        """Commands and a COMPLETION_WAIT; the number that it stores."""
        self.sequence += 1 << 40  # 64 bits are stored
        self.put(*commands, amd.completion_wait(self.status, self.sequence))
        return self.sequence

    def done(self, sequence):
        return self.ram.load64(self.status) == sequence

    def stat(self):
        return self.regs.read32(r.MMIO_STATUS)

    def events(self):
        """The entries from head to tail, which are taken out of the log."""
        head, tail = self.regs.read32(r.MMIO_EVT_HEAD), self.regs.read32(r.MMIO_EVT_TAIL)
        out = []
        while head != tail:
            out.append(
                amd.decode_event((self.ram.load64(self.log + head), self.ram.load64(self.log + head + 8)))
            )
            head = (head + 16) % 4096
        self.regs.write32(r.MMIO_EVT_HEAD, head)
        return out


# -- registers ---------------------------------------------------------------------------------------------
def test_reset_values():
    with Platform.create(1 << 20, 1, iommu="amd") as platform:
        regs = platform.iommu
        assert regs.read64(r.MMIO_EXT_FEATURES) == 1 << 6 | 2 << 10  # IASup, HATS: 6 levels
        assert regs.read64(r.MMIO_EXT_FEATURES2) == 0
        assert regs.read64(r.MMIO_CMD_BUF) == regs.read64(r.MMIO_EVT_BUF) == LEN_256
        assert regs.read32(r.MMIO_CMD_BUF + 4) == 8 << 24
        for offset in (r.MMIO_DEV_TABLE, r.MMIO_CONTROL, r.MMIO_STATUS, r.MMIO_CMD_HEAD, r.MMIO_EVT_TAIL):
            assert regs.read64(offset) == 0
        assert not regs.translating
        assert platform.iommu.KIND == "amd"


def test_registers_that_are_not_there(machine):
    regs = machine().regs
    for call in (
        lambda: regs.read64(0x20),  # exclusion range: EFR says nothing of it, Linux needs none
        lambda: regs.read32(0x2030),
        lambda: regs.read64(4),
        lambda: regs.write64(r.MMIO_EXT_FEATURES, 0),
        lambda: regs.write32(r.MMIO_CONTROL, 1),
        lambda: regs.write64(r.MMIO_CONTROL, ON | 1 << 13),  # PPRLogEn: EFR.PPRSup is 0
        lambda: regs.write64(r.MMIO_DEV_TABLE, 1 << 64),
        lambda: regs.write32(r.MMIO_CMD_TAIL, 8),
        lambda: regs.write32(r.MMIO_CMD_TAIL, 4096),
        lambda: regs.write32(r.MMIO_EVT_HEAD, 4096),
        lambda: regs.write64(r.MMIO_CMD_BUF, LEN_256),  # CmdBufRun is 1
        lambda: regs.write64(r.MMIO_EVT_BUF, LEN_256),  # EventLogRun is 1
        lambda: regs.write32(r.MMIO_CMD_HEAD, 0),
        lambda: regs.write32(r.MMIO_EVT_TAIL, 0),
    ):
        with pytest.raises(ValueError):
            call()
    regs.write64(r.MMIO_CONTROL, r.CONTROL_IOMMU_EN)
    with pytest.raises(ValueError, match="least"):
        regs.write64(r.MMIO_CMD_BUF, 7 << r.BUF_LEN_SHIFT)


def test_what_runs_follows_the_control_register(machine):
    m = machine(control=0)
    for control, status, translating in (
        (r.CONTROL_CMDBUF_EN | r.CONTROL_EVT_LOG_EN, 0, False),
        (r.CONTROL_IOMMU_EN, 0, True),
        (ON, EVT_RUN | CMD_RUN, True),
        (ON & ~r.CONTROL_EVT_LOG_EN | r.CONTROL_COHERENT_EN, CMD_RUN, True),
        (r.CONTROL_CMDBUF_EN, 0, False),
    ):
        m.regs.write64(r.MMIO_CONTROL, control)
        assert (m.stat(), m.regs.translating) == (status, translating)
        assert m.regs.read64(r.MMIO_CONTROL) == control


def test_a_base_register_resets_its_pointers(machine):
    m = machine()
    m.submit(amd.invalidate_iommu_all())
    assert m.regs.read32(r.MMIO_CMD_HEAD) == m.regs.read32(r.MMIO_CMD_TAIL) == 32
    m.regs.write64(r.MMIO_CONTROL, r.CONTROL_IOMMU_EN)
    m.regs.write64(r.MMIO_CMD_BUF, m.commands | 9 << r.BUF_LEN_SHIFT)
    assert m.regs.read32(r.MMIO_CMD_HEAD) == m.regs.read32(r.MMIO_CMD_TAIL) == 0
    m.regs.write32(r.MMIO_CMD_TAIL, 8176)  # 512 entries
    m.regs.write64(r.MMIO_DEV_TABLE, 2**64 - 1)
    assert m.regs.read64(r.MMIO_DEV_TABLE) == 0x000F_FFFF_FFFF_F1FF


# -- commands ----------------------------------------------------------------------------------------------
def test_completion_wait_stores_64_bits_once_and_the_ring_wraps(machine):
    m = machine()
    for _ in range(300):
        assert m.done(m.submit(amd.invalidate_iommu_pages(1)))
    assert m.regs.read32(r.MMIO_CMD_HEAD) == m.tail == 600 * 16 % 4096
    m.put((1 << 60, 0))  # without S nothing is stored
    assert m.ram.load64(m.status) == m.sequence


@pytest.mark.parametrize("online", [False, True])
def test_an_illegal_command_stops_the_buffer(machine, online):
    m = machine()
    fe = detached(m)
    if online:
        assert fe.translate(IOVA, False)[0] is None
        m.events()
    bad = m.tail
    sequence = m.submit((0xF << 60, 0))
    fe.service()
    assert not m.done(sequence)
    assert m.stat() == EVT_INT | EVT_RUN
    assert m.regs.read32(r.MMIO_CMD_HEAD) == bad
    assert m.events() == [amd.Event(FaultReason.ILLEGAL_COMMAND_ERROR, address=m.commands + bad)]
    fe.service()
    assert m.events() == []
    # Linux, amd_iommu_reset_cmd_buffer(): off, the pointers, on.
    m.regs.write64(r.MMIO_CONTROL, ON & ~r.CONTROL_CMDBUF_EN)
    fe.service()
    assert not m.stat() & CMD_RUN
    m.tail = 0
    m.regs.write32(r.MMIO_CMD_HEAD, 0)
    m.regs.write32(r.MMIO_CMD_TAIL, 0)
    m.regs.write64(r.MMIO_CONTROL, ON)
    assert m.stat() & CMD_RUN
    sequence = m.submit(amd.invalidate_iommu_all())
    fe.service()
    assert m.done(sequence)


def test_commands_that_are_not_in_memory(machine):
    m = machine()
    at = m.tail
    m.put(amd.completion_wait(1 << 40, 1))
    error = FaultReason.COMMAND_HARDWARE_ERROR
    assert m.events() == [amd.Event(error, flags=amd.EVENT_TARGET_ABORT, address=1 << 40)]
    assert m.regs.read32(r.MMIO_CMD_HEAD) == at
    m.regs.write64(r.MMIO_CONTROL, ON & ~r.CONTROL_CMDBUF_EN)
    m.regs.write64(r.MMIO_CMD_BUF, 1 << 41 | LEN_256)
    m.regs.write64(r.MMIO_CONTROL, ON)
    m.regs.write32(r.MMIO_CMD_TAIL, 16)
    assert m.events() == [amd.Event(error, flags=amd.EVENT_TARGET_ABORT, address=1 << 41)]


def test_a_new_kernel_takes_the_buffer_over(machine):
    m = machine()
    m.map(IOVA, 0x200000, 1)
    fe = detached(m)
    fe.translate(IOVA, False)
    m.submit(amd.invalidate_iommu_all())
    m.regs.write64(r.MMIO_CONTROL, r.CONTROL_IOMMU_EN)
    assert m.stat() & CMD_RUN  # the front-end has not seen it yet
    fe.service()
    assert not m.stat() & CMD_RUN
    assert m.ram.load64(m.status) == 0  # what was not done yet is not done any more
    assert fe.translate(IOVA, False)[1] == 0
    m.commands, m.tail = m.page(), 0
    m.regs.write64(r.MMIO_CMD_BUF, m.commands | LEN_256)
    m.regs.write64(r.MMIO_CONTROL, ON)
    sequence = m.submit(amd.invalidate_iommu_all())
    assert not m.done(sequence)
    fe.service()
    assert m.done(sequence)


# -- translation and caches --------------------------------------------------------------------------------
@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5, 6])
def test_translates(machine, levels):
    m = machine(levels=levels)
    top = min(64, 12 + 9 * levels)
    iova = (1 << top) - (1 << 16)
    m.map(iova, 0x10_0000, 16)  # one contiguous run of 64K
    m.map(0x3000, 0x20_3000, 1, prot=1)
    fe = FrontEnd(m.platform, 0)
    assert fe.translate(iova + 0xABCD, True) == (0x10_ABCD, 0)
    assert fe.translate(iova + 0x1234, False) == (0x10_1234, 0)
    assert fe.translate(0x3008, False) == (0x20_3008, 0)
    assert m.events() == []
    assert fe.translate(0x3008, True)[0] is None
    assert fe.translate(0x5000, False)[0] is None
    flags = amd.EVENT_PR | amd.EVENT_PE | amd.EVENT_RW
    bdf = m.platform.bdf(0)
    assert m.events() == [
        amd.Event(FaultReason.IO_PAGE_FAULT, bdf, m.did, flags, 0x3008),
        amd.Event(FaultReason.IO_PAGE_FAULT, bdf, m.did, 0, 0x5000),
    ]
    if top < 64:
        assert fe.translate(1 << top, False)[0] is None
        (event,) = m.events()
        assert (event.flags, event.address) == (amd.EVENT_PR, 1 << top)


@pytest.mark.parametrize(("pages", "inside"), [(1, 0), (16, 0xF000), (512, 0x1FF000), (1024, 0x3FF000)])
def test_stale_until_invalidated(machine, pages, inside):
    """Leaves of 4K, 64K, 2M and 4M: any page of one takes all of it out of the cache; others do not."""
    m = machine()
    m.map(IOVA, 0x40_0000, pages)
    fe = detached(m)
    assert fe.translate(IOVA, True)[0] == 0x40_0000
    m.table.unmap(IOVA, IOVA + (pages << 12) - 1)
    assert fe.translate(IOVA + inside, True)[0] == 0x40_0000 + inside  # the IOTLB does not know yet
    m.map(IOVA, 0x80_0000, pages)
    beyond = IOVA + (pages << 12)
    for command in (
        amd.invalidate_iommu_pages(m.did + 1, IOVA, IOVA),
        amd.invalidate_iommu_pages(m.did, beyond, beyond),
        amd.invalidate_devtab_entry(m.platform.bdf(0)),
    ):
        m.submit(command)
        fe.service()
        assert fe.translate(IOVA, True)[0] == 0x40_0000, command
    sequence = m.submit(amd.invalidate_iommu_pages(m.did, IOVA + inside, IOVA + inside))
    assert not m.done(sequence)
    assert fe.service() == 2
    assert m.done(sequence)
    assert fe.translate(IOVA, True)[0] == 0x80_0000


def test_granularities(machine):
    m = machine()
    fe = detached(m)
    for number, (command, goes) in enumerate(
        [
            (amd.invalidate_iommu_all(), True),
            (amd.invalidate_iommu_pages(m.did), True),
            (amd.invalidate_iommu_pages(m.did + 1), False),
            (amd.invalidate_iommu_pages(m.did, 0, (10 << 21) - 1), True),
            (amd.invalidate_devtab_entry(m.platform.bdf(0)), False),
            ((5 << 60 | m.platform.bdf(0), 0), False),  # INVALIDATE_INTERRUPT_TABLE
        ]
    ):
        iova = (number + 1) << 21
        m.map(iova, 0x20_0000, 1)
        assert fe.translate(iova, False)[0] == 0x20_0000
        m.table.unmap(iova, iova + 0xFFF)
        m.submit(command)
        fe.service()
        assert (fe.translate(iova, False)[0] is None) == goes, command
        m.submit(amd.invalidate_iommu_all())
        fe.service()


def test_hitless_replace_by_the_base_register(machine):
    """A copy of the device table; it counts for a device once its cached entry is invalidated."""
    m = machine(devices=2)
    m.map(IOVA, 0x20_0000, 2)
    other = m.new_table()
    m.map(IOVA, 0x40_0000, 2, table=other)
    a, b = detached(m, 0), detached(m, 1)
    for fe in (a, b):
        assert fe.translate(IOVA, False)[0] == 0x20_0000
    aside = m.page()
    m.ram.write(aside, m.ram.read(m.devtab, 4096))
    m.attach(0, other, m.did + 1, aside)
    m.regs.write64(r.MMIO_DEV_TABLE, amd.device_table_register(aside, 4096))
    assert a.translate(IOVA + 0x1000, False)[0] == 0x20_1000
    m.submit(amd.invalidate_devtab_entry(m.platform.bdf(1)))
    a.service(), b.service()
    assert a.translate(IOVA + 0x1000, False)[0] == 0x20_1000
    m.submit(amd.invalidate_devtab_entry(m.platform.bdf(0)))
    a.service(), b.service()
    # Entries of the old domain are tagged with its id, so they cannot hit any more.
    assert a.translate(IOVA + 0x1000, False)[0] == 0x40_1000
    assert a.translate(IOVA, False)[0] == 0x40_0000
    assert b.translate(IOVA, False)[0] == 0x20_0000


def test_growth_counts_once_the_cached_entry_is_invalidated(machine):
    m = machine()
    m.map(IOVA, 0x20_0000, 1)
    fe = detached(m)
    assert fe.translate(IOVA, False)[0] == 0x20_0000
    grown = m.table.grown(open_format("amdv1", {"levels": 4}))
    m.map(1 << 40, 0x40_0000, 1, table=grown)
    word = amd.dte_host(grown.root_pa, 4, m.did)[0]
    m.ram.store64(m.devtab + m.platform.bdf(0) * 32, word)
    assert fe.translate(1 << 40, False)[0] is None  # beyond the three levels of the cached entry
    m.submit(amd.invalidate_devtab_entry(m.platform.bdf(0)))
    fe.service()
    assert fe.translate(1 << 40, False)[0] == 0x40_0000
    assert fe.translate(IOVA, False)[0] == 0x20_0000


def test_two_devices_one_after_the_other(machine):
    m = machine(devices=2)
    m.map(IOVA, 0x20_0000, 1)
    a, b = detached(m, 0), detached(m, 1)
    a.translate(IOVA, False), b.translate(IOVA, False)
    m.table.unmap(IOVA, IOVA + 0xFFF)
    sequence = m.submit(amd.invalidate_iommu_pages(m.did, IOVA, IOVA + 0xFFF))
    a.service()
    assert not m.done(sequence)
    assert m.regs.read32(r.MMIO_CMD_HEAD) == 0
    assert (a.translate(IOVA, False)[0], b.translate(IOVA, False)[0]) == (None, 0x20_0000)
    b.service()
    assert m.done(sequence)
    assert b.translate(IOVA, False)[0] is None


def test_rights_of_the_device_table_entry(machine):
    m = machine()
    m.map(IOVA, 0x20_0000, 1)
    m.attach(0, prot=1)
    fe = FrontEnd(m.platform, 0)
    assert fe.translate(IOVA, False)[0] == 0x20_0000
    assert fe.translate(IOVA, True)[0] is None
    assert m.events()[0].flags == amd.EVENT_PR | amd.EVENT_PE | amd.EVENT_RW


# -- events ------------------------------------------------------------------------------------------------
def test_faults_of_the_way_to_the_table(machine):
    m = machine()
    bdf = m.platform.bdf(0)
    fe = FrontEnd(m.platform, 0)
    good = amd.dte_host(m.table.root_pa, 3, m.did)
    illegal = FaultReason.ILLEGAL_DEV_TABLE_ENTRY
    for words, event in (
        (amd.dte_blocked(), amd.Event(FaultReason.IO_PAGE_FAULT, bdf, 0, 0, IOVA + 8)),
        ((good[0] | 4, *good[1:]), amd.Event(illegal, bdf, 0, amd.EVENT_RZ, IOVA + 8)),
        ((good[0] | 7 << 9, *good[1:]), amd.Event(illegal, bdf, 0, 0, IOVA + 8)),
    ):
        m.entry(0, words)
        pa, code = fe.translate(IOVA + 8, False)
        assert pa is None
        assert m.regs.fault_text(code) == event.code.text
        assert m.events() == [event]
    # A faulting entry is not cached.
    m.entry(0, good)
    m.map(IOVA, 0x20_0000, 1)
    assert fe.translate(IOVA, False)[0] == 0x20_0000
    m.submit(amd.invalidate_iommu_all())
    m.regs.write64(r.MMIO_DEV_TABLE, amd.device_table_register(1 << 40, 4096))
    assert fe.translate(IOVA, True)[0] is None
    flags = amd.EVENT_RW | amd.EVENT_TARGET_ABORT
    assert m.events() == [amd.Event(FaultReason.DEV_TAB_HARDWARE_ERROR, bdf, 0, flags, (1 << 40) + bdf * 32)]


def test_faults_of_the_page_table(machine):
    m = machine()
    m.map(IOVA, 0x20_0000, 1)
    fe = FrontEnd(m.platform, 0)
    at = m.table.root_pa + (IOVA >> 30) * 8
    item = m.ram.load64(at)
    bdf = m.platform.bdf(0)
    m.ram.store64(at, item | 1 << 52)
    assert fe.translate(IOVA, False)[0] is None
    flags = amd.EVENT_PR | amd.EVENT_RZ
    assert m.events() == [amd.Event(FaultReason.IO_PAGE_FAULT, bdf, m.did, flags, IOVA)]
    m.ram.store64(at, item & ~amd.PA_MASK | 1 << 45)
    pa, code = fe.translate(IOVA, False)
    assert (pa, m.regs.fault_text(code)) == (None, FaultReason.PAGE_TAB_HARDWARE_ERROR.text)
    flags = amd.EVENT_TARGET_ABORT
    assert m.events() == [amd.Event(FaultReason.PAGE_TAB_HARDWARE_ERROR, bdf, m.did, flags, 1 << 45)]


def test_no_log_no_entry(machine):
    m = machine(control=ON & ~r.CONTROL_EVT_LOG_EN)
    assert FrontEnd(m.platform, 0).translate(IOVA, False)[0] is None
    assert m.regs.read32(r.MMIO_EVT_TAIL) == 0
    assert m.stat() == CMD_RUN


def test_the_log_wraps_and_overflows(machine):
    m = machine()
    fe = FrontEnd(m.platform, 0)
    for k in range(200):
        fe.translate(IOVA + (k << 12), False)
    assert len(m.events()) == 200
    for k in range(300):
        fe.translate(IOVA + (k << 12), False)
    # One entry stays free: a full log differs from an empty one.
    assert m.stat() == r.STATUS_EVT_OVERFLOW | EVT_INT | CMD_RUN
    assert m.platform.front_ends[0, FE_OVERFLOW]
    assert [e.address for e in m.events()] == [IOVA + (k << 12) for k in range(255)]
    fe.translate(IOVA, False)
    assert m.events() == []  # not before software has started it again
    # Linux, amd_iommu_restart_log()
    m.regs.write64(r.MMIO_CONTROL, ON & ~r.CONTROL_EVT_LOG_EN)
    m.regs.write32(r.MMIO_STATUS, r.STATUS_EVT_OVERFLOW | EVT_INT)
    assert m.stat() == CMD_RUN
    m.regs.write64(r.MMIO_CONTROL, ON)
    assert m.stat() == EVT_RUN | CMD_RUN
    fe.translate(IOVA + 0x5000, True)
    (event,) = m.events()
    assert (event.address, event.flags) == (IOVA + 0x5000, amd.EVENT_RW)


def test_translation_disabled_is_its_own_reason(machine):
    m = machine()
    m.map(IOVA, 0x20_0000, 1)
    fe = FrontEnd(m.platform, 0)
    m.regs.write64(r.MMIO_CONTROL, 0)
    assert fe.translate(IOVA, False) == (None, engine.UNTRANSLATED)
    m.regs.write64(r.MMIO_CONTROL, ON)
    assert fe.translate(IOVA, False)[1] == 0
    assert m.events() == []


def test_guest_translation_is_illegal(machine):
    m = machine()
    gcr3 = m.page()
    m.ram.store64(gcr3, amd.gcr3_entry(m.page()))
    m.entry(0, amd.dte_guest(gcr3, 0, 4, m.did))
    assert FrontEnd(m.platform, 0).translate(IOVA, False)[0] is None
    assert m.events()[0].code == FaultReason.ILLEGAL_DEV_TABLE_ENTRY
