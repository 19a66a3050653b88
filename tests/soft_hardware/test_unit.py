# SPDX-License-Identifier: Apache-2.0
"""What is common to all units: contexts, page sizes in the IOTLB, pending faults, queues with a wrap bit."""

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iokeep.errors import InputError
from iokeep.pt.build import Table
from iokeep.pt.extents import Extents
from iokeep.pt.registry import open_format
from iokeep.pt.roots.base import TableRoot
from iokeep.pt.roots.vtd import FaultReason, RootFault
from iokeep.soft.hardware import bar, engine, platform, units
from iokeep.soft.hardware.dma import DmaEngine
from iokeep.soft.hardware.iommu import FrontEnd
from iokeep.soft.hardware.platform import Platform
from iokeep.soft.hardware.unit import (
    ANY,
    EVERYWHERE,
    FE_FAULTS,
    FE_HITS,
    OUTCOMES,
    Context,
    Invalidation,
    Match,
    Ring,
    Unit,
)

#: outcome n of a read is fault 10 + n, of a write 20 + n
CODES = (tuple(range(11, 11 + OUTCOMES)), tuple(range(21, 21 + OUTCOMES)))
QUEUE, SIZE = 0x10000, 256
HEAD, TAIL = 0, 1
#: commands: 1 = nothing, 2 = forget contexts of owner n, 3 = forget [n, m] of every owner, 4 = 64-bit status
COMMAND = 32


class PlainUnit(Unit):
    """As simple as a unit can be: what it looks up is in Python, its queue has a wrap bit."""

    KIND = "plain"

    def power_on(self):
        self.translating = True
        self.context = None
        self.recorded = []
        self.failures = []
        self.mute = False

    def read64(self, offset):
        return int(self.bank[offset >> 3])

    def write64(self, offset, value):
        self.bank[TAIL] = value
        self.queue.kick()

    read32 = write32 = None

    def hw(self):
        return {}

    def fault_text(self, code):
        return f"number {code}"

    def look_up(self, device_id):
        if self.context is None:
            raise RootFault(FaultReason.ROOT_NOT_PRESENT, "nowhere", ())
        return self.context

    def silent(self, fault):
        return self.mute

    def record_faults(self, index, faults, dropped):
        self.recorded += [*map(tuple, faults), *(["dropped", dropped] if dropped else [])]

    def ring(self):
        return Ring(QUEUE, SIZE, COMMAND, 2 * SIZE)

    @property
    def queue_head(self):
        return int(self.bank[HEAD])

    @queue_head.setter
    def queue_head(self, head):
        self.bank[HEAD] = head

    @property
    def queue_tail(self):
        return int(self.bank[TAIL])

    def decode(self, words):
        kind, a, b, _ = words
        if kind == 2:
            return Invalidation(context=(ANY, Match(2**48 - 1, a)))
        if kind == 3:
            return Invalidation(tlb=(ANY, a, b))
        if kind == 4:
            return Invalidation(status=(a, b, 8))
        return Invalidation() if kind == 1 else None

    def queue_failed(self, words):
        self.failures.append((self.queue_head, words))


class Host:
    def __init__(self, devices=1):
        self.platform = Platform.create(8 << 20, devices, iommu="plain")
        self.unit, self.ram = self.platform.iommu, self.platform.ram
        self.next = 0x20000
        self.unit.queue.set_enabled(True)

    def alloc(self, n, size=4096):
        self.next = (self.next + size - 1) & -size
        pas = np.arange(self.next, self.next + n * size, size, dtype=np.uint64)
        self.next += n * size
        return pas

    def table(self, name, config, *maps):
        fmt = open_format(name, config)
        table = Table.create(fmt, self.ram, self.alloc, lambda *_: None)
        table.map(Extents.of([(iova, iova + size - 1, pa, 3) for iova, size, pa in maps]))
        return TableRoot(name, config, table.root_pa), table

    def command(self, *words):
        tail = self.unit.queue_tail
        for i, word in enumerate((*words, 0, 0, 0, 0)[:4]):
            self.ram.store64(QUEUE + tail % SIZE + 8 * i, word)
        self.unit.write64(0, (tail + COMMAND) % (2 * SIZE))


@pytest.fixture
def host(monkeypatch):
    made = []
    monkeypatch.setattr(
        platform, "unit_class", lambda kind: PlainUnit if kind == "plain" else units.unit_class(kind)
    )

    def make(*args):
        made.append(Host(*args))
        return made[-1]

    yield make
    for one in made:
        one.platform.close()


def test_kinds():
    assert units.unit_class("vtd").KIND == "vtd"
    for kind in units.UNITS:
        with Platform.create(1 << 20, iommu=kind) as a:
            assert kind == a.iommu.KIND
            with Platform.from_fds(*(os.dup(fd) for fd in (a.fds.ram, a.fds.regs, a.fds.tags))) as b:
                assert type(b.iommu) is type(a.iommu)
            os.pwrite(a.fds.regs, b"nothing\0", platform.INFO_PAGE * 4096 + 8 * 5)
            with pytest.raises(InputError, match="nothing"):
                Platform.from_fds(*(os.dup(fd) for fd in (a.fds.ram, a.fds.regs, a.fds.tags)))
    with pytest.raises(ValueError, match="cisco"):
        Platform.create(1 << 20, iommu="cisco")


def test_a_failed_look_up_is_the_fault_of_one_request(host):
    h = host()
    fe = FrontEnd(h.platform, 0)
    for n in range(1, 4):
        assert fe.translate(0x1000 * n, n == 2) == (None, FaultReason.ROOT_NOT_PRESENT)
        assert fe.unit[engine.C_LOOKUPS] == n  # faults are not cached
    code = int(FaultReason.ROOT_NOT_PRESENT)
    assert h.unit.recorded == [(code, 0x1000, 1, 0), (code, 0x2000, 2, 0), (code, 0x3000, 1, 0)]
    h.unit.mute = True
    fe.translate(0x4000, False)
    assert len(h.unit.recorded) == 3
    assert h.platform.front_ends[0, FE_FAULTS] == 4
    root, _ = h.table("riscv64", {"levels": 3}, (0x1000, 4096, 0x200000))
    h.unit.context = Context(root, 77, CODES)
    assert fe.translate(0x1008, False) == (0x200008, 0)
    assert fe.translate(0x1008, False) == (0x200008, 0)
    assert fe.unit[engine.C_LOOKUPS] == 5
    assert fe.translate(0x2000, True) == (None, 22)
    assert h.unit.recorded[-1] == (22, 0x2000, 2, 77)
    h.unit.translating = False
    assert fe.translate(0x1008, False) == (None, engine.UNTRANSLATED)


def test_a_burst_ends_where_the_context_is_missing(host):
    h = host()
    window = h.platform.bars[0]
    device = DmaEngine(FrontEnd(h.platform, 0), window)
    bar.write_ranges(window, [bar.RangeRow(0x1000, 0x1FFF, 0, 7)], timeout=0)
    assert device.load_ranges() == 0
    h.platform.tags[0x200] = 7
    assert [device.run_burst(100) for _ in range(3)] == [1, 1, 1]
    stats = bar.read_stats(h.platform, 0).total
    assert (stats.faults, stats.transactions) == (3, 0)
    text = bar.read_incidents(window)[0].text(h.unit.fault_text)
    assert "fault 0x1 (number 1): iova 0x1000" in text
    root, _ = h.table("amdv1", {"levels": 3}, (0x1000, 4096, 0x200000))
    h.unit.context = Context(root, 1, CODES)
    assert device.run_burst(100) == 100
    assert bar.read_stats(h.platform, 0).total.transactions == 100
    h.unit.translating = False
    assert device.run_burst(5) == 5
    assert bar.read_stats(h.platform, 0).total.untranslated == 5


def test_pending_faults_are_bounded_and_kept_while_the_lock_is_taken(host):
    h = host()
    root, _ = h.table("vtdss", {"levels": 3}, (0, 4096, 0x200000))
    h.unit.context = Context(root, 5, CODES)
    window = h.platform.bars[0]
    device = DmaEngine(FrontEnd(h.platform, 0), window)
    bar.write_ranges(window, [bar.RangeRow(0x100000, 0x1FFFFF, 0, 7, bar.RANGE_READ)], timeout=0)
    assert device.load_ranges() == 0
    assert device.run_burst(3) == 3
    assert [fault[0] for fault in h.unit.recorded] == [12] * 3
    assert all(fault[3] == 5 for fault in h.unit.recorded)
    child, wait = os.pipe(), os.pipe()
    if not (pid := os.fork()):
        with h.platform.lock.held():
            os.write(child[1], b"x")
            os.read(wait[0], 1)
        os._exit(0)
    os.read(child[0], 1)
    assert device.run_burst(10) == 10  # a device never blocks
    assert device.run_burst(10) == 10
    assert len(h.unit.recorded) == 3
    os.write(wait[1], b"x")
    os.waitpid(pid, 0)
    device.quiesce()
    assert len(h.unit.recorded) == 3 + engine.PENDING + 2
    assert h.unit.recorded[-2:] == ["dropped", 20 - engine.PENDING]
    h.unit.context = Context(root, 5, CODES, silent=True)
    assert device.run_burst(10) == 10
    assert len(h.unit.recorded) == 3 + engine.PENDING + 2
    for fd in (*child, *wait):
        os.close(fd)


def test_rights_above_the_table(host):
    h = host()
    root, _ = h.table("amdv1", {"levels": 4}, (0x1000, 4096, 0x200000))
    fe = FrontEnd(h.platform, 0)
    for prot, read, write in ((1, 0, 24), (2, 14, 0), (0, 14, 24)):
        h.unit.context = Context(root, prot + 1, CODES, prot=prot)
        fe.flush()
        assert fe.translate(0x1000, False)[1] == read
        assert fe.translate(0x1000, True)[1] == write


LARGE = [
    ("amdv1", {"levels": 3}, 0x40000, 18),  # 64 items of one entry
    ("amdv1", {"levels": 5}, 0x40000, 18),
    ("riscv64", {"levels": 3, "stage": 2}, 0x200000, 21),
    ("vtdss", {"levels": 4}, 0x1000, 12),
    ("arm_lpae_s2", {"granule": 16384, "input_bits": 40, "output_bits": 40}, 0x4000, 14),
]


@pytest.mark.parametrize(("name", "config", "size", "lg2"), LARGE, ids=str)
def test_an_entry_of_the_cache_is_a_page_as_large_as_it_is(host, name, config, size, lg2):
    h = host()
    iova = 5 << 30
    root, table = h.table(name, config, (iova, size, 0x400000))
    h.unit.context = Context(root, 9, CODES)
    fe = FrontEnd(h.platform, 0)
    assert fe.translate(iova, False) == (0x400000, 0)
    hits = int(fe.page[FE_HITS])
    assert fe.translate(iova + size - 1, True) == (0x400000 + size - 1, 0)
    assert fe.page[FE_HITS] == hits + 1
    assert set(fe.tlb[3][fe.tlb[0] != 0].tolist()) == {lg2}
    table.unmap(iova, iova + size - 1)
    assert fe.translate(iova + 8, False) == (0x400008, 0)  # stale until it is invalidated
    h.command(3, iova + size, iova + size + 0xFFF)
    assert fe.translate(iova + 8, False) == (0x400008, 0)
    h.command(3, iova + size - 1, iova + size - 1)  # any byte of the page takes it
    assert fe.translate(iova + 8, False)[0] is None
    assert fe.unit[engine.T_COUNT] == 0


def test_runs_that_do_not_agree_are_not_cached_as_one(host):
    h = host()
    root, table = h.table("arm_lpae_s2", {"input_bits": 40, "output_bits": 40}, (0, 0x10000, 0x400000))
    spec = table.fmt.levels[0]
    run = spec.contig[0]
    first = next(n for n in range(h.next // 8) if h.ram.words[n] & 0xFFFFFF000 == 0x400000)
    for n in range(16):  # 64K of items with the hint, each turned around
        h.ram.words[first + n] = np.uint64(
            int(h.ram.words[first + n]) & ~0xFFFFF000 | run.value | 0x400000 + (15 - n << 12)
        )
    h.unit.context = Context(root, 9, CODES)
    fe = FrontEnd(h.platform, 0)
    for n in (0, 1, 15, 3):
        assert fe.translate(n << 12, False) == (0x400000 + (15 - n << 12), 0)


def test_two_tables_of_a_context(host):
    h = host()
    config = {"granule": 4096, "input_bits": 39, "output_bits": 40}
    high = {**config, "ttbr": 1}
    iova = 2**64 - (1 << 39)
    low_root, _ = h.table("arm_lpae_s1", config, (0x1000, 4096, 0x400000))
    high_root, _ = h.table("arm_lpae_s1", high, (iova, 4096, 0x500000))
    h.unit.context = Context(low_root, 9, CODES, upper=high_root)
    fe = FrontEnd(h.platform, 0)
    assert fe.translate(0x1000, False) == (0x400000, 0)
    assert fe.translate(iova + 8, True) == (0x500008, 0)
    assert fe.translate(1 << 40, True) == (None, 25)


def test_a_context_goes_by_requester_and_owner(host):
    h = host(2)
    root, _ = h.table("vtdss", {"levels": 3}, (0, 4096, 0x200000))
    h.unit.context = Context(root, 5, CODES)
    fe = FrontEnd(h.platform, 1)
    bdf = h.platform.bdf(1)
    for requester, owner, goes in (
        (ANY, ANY, True),
        (Match(0xFFFF, bdf), ANY, True),
        (Match(0xFFFF, bdf ^ 8), ANY, False),
        (Match(0xFF00, bdf & 0xFF00), Match(1, 1), True),
        (ANY, Match(3, 2), False),
    ):
        fe.translate(0, False)
        fe.invalidate(Invalidation(context=(requester, owner)))
        assert (fe.unit[engine.C_VALID] == 0) == goes
    fe.invalidate(Invalidation(tlb=(Match(1, 0), *EVERYWHERE)))
    assert fe.tlb[0].any()
    fe.invalidate(Invalidation(tlb=(Match(1, 1), *EVERYWHERE)))
    assert not fe.tlb[0].any()


def test_a_new_context_has_the_table_that_it_says(host):
    """More tables than a front-end keeps walkers for, and back again."""
    h = host()
    roots = [h.table("amdv1", {"levels": 2}, (0, 4096, (0x200 + n) << 12))[0] for n in range(70)]
    fe = FrontEnd(h.platform, 0)
    for n in (*range(70), 3, 69):
        h.unit.context = Context(roots[n], n + 1, CODES)
        fe.invalidate(Invalidation(context=(ANY, ANY)))
        assert fe.translate(0, False) == ((0x200 + n) << 12, 0)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from("csu01e"), min_size=1, max_size=80))
def test_a_queue_with_a_wrap_bit(host, steps):
    """It may be quite full; the head follows the slowest; a status is there once all have passed."""
    h = host(2)
    root, _ = h.table("vtdss", {"levels": 3}, (0, 4096, 0x200000))
    h.unit.context = Context(root, 5, CODES)
    fes = [FrontEnd(h.platform, n) for n in range(2)]
    h.unit.local_front_ends.clear()
    issued = 0

    def used():
        return (h.unit.queue_tail - h.unit.queue_head) % (2 * SIZE)

    for step in steps:
        if step in "cs" and used() < SIZE:
            issued += 1
            h.command(4, 0x8000, issued)
        elif step == "u":
            fes[0].leave() if fes[0].online else fes[0].translate(0, False)
        elif step == "e":
            fes[1].leave() if fes[1].online else fes[1].translate(0, False)
        elif step in "01":
            fes[int(step)].service()
        assert used() <= SIZE
        assert h.ram.load64(0x8000) == issued - used() // COMMAND
        if not any(fe.online for fe in fes):
            assert used() == 0
    for fe in fes:
        fe.service()
    assert used() == 0
    assert h.ram.load64(0x8000) == issued


def test_a_bad_command_fails_when_the_slowest_stands_at_it(host):
    h = host(2)
    root, _ = h.table("vtdss", {"levels": 3}, (0, 4096, 0x200000))
    h.unit.context = Context(root, 5, CODES)
    a, b = (FrontEnd(h.platform, n) for n in range(2))
    h.unit.local_front_ends.clear()
    a.translate(0, False)
    b.translate(0, False)
    h.command(1)
    h.command(99, 1, 2, 3)
    h.command(4, 0x8000, 5)
    a.service()
    assert not h.unit.queue.failed
    b.service()
    assert h.unit.queue.failed
    assert h.unit.failures == [(COMMAND, (99, 1, 2, 3))]
    a.service()
    h.unit.queue.complete()
    assert len(h.unit.failures) == 1
    assert h.unit.queue_head == COMMAND
    h.ram.store64(QUEUE + COMMAND, 1)
    h.unit.queue.clear_error()
    a.service()
    assert h.ram.load64(0x8000) == 0
    b.service()
    assert h.ram.load64(0x8000) == 5
    # Enabled again it begins where it is told to, and front-ends with it.
    h.unit.queue.set_enabled(False)
    assert not h.unit.queue.stopped()
    a.service()
    b.service()
    assert h.unit.queue.stopped()
    h.unit.bank[TAIL] = 64
    h.unit.queue.set_enabled(True, 64)
    assert h.unit.queue_head == 64
    h.command(4, 0x8000, 6)
    a.service()
    assert h.ram.load64(0x8000) == 5
    b.service()
    assert h.ram.load64(0x8000) == 6
