# SPDX-License-Identifier: Apache-2.0
"""The DMA engine: counts what happened, finds every kind of damage, takes orders between bursts."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iokeep.pt.roots import vtd
from iokeep.soft.hardware import bar, engine
from iokeep.soft.hardware.bar import RangeRow
from iokeep.soft.hardware.dma import DmaEngine
from iokeep.soft.hardware.iommu import FrontEnd
from iokeep.soft.hardware.units import vtd as r

IOVA, PA, PAGES, TAG = 1 << 30, 0x400000, 32, 0x70001
RW, R, W, PROBE = 3, 1, 2, 7


class Rig:
    """A machine with one mapped, owned range and a device on it."""

    def __init__(self, m, index=0, prot=3):
        self.m, self.platform = m, m.platform
        if not len(m.table.leaves().iova):
            m.map(IOVA, PA, PAGES, prot)
        m.platform.tags[PA >> 12 : (PA >> 12) + PAGES] = TAG
        self.window = m.platform.bars[index]
        self.device = DmaEngine(FrontEnd(m.platform, index), self.window)

    def ranges(self, *rows):
        bar.write_ranges(self.window, rows, timeout=0)
        self.device.pump()
        return bar.read_status(self.window).generation_error

    def default(self, flags=RW, slot=0):
        return RangeRow(IOVA, IOVA + (PAGES << 12) - 1, slot, TAG, flags)

    def run(self, n=500):
        before = self.total
        self.device.run_burst(n)
        after = self.total
        return {
            name: getattr(after, name) - getattr(before, name)
            for name in (
                "transactions",
                "reads",
                "writes",
                "faults",
                "lost",
                "misdirected",
                "denied",
                "leaks",
            )
        }

    @property
    def total(self):
        return bar.read_stats(self.platform, 0).total

    def incidents(self):
        return {i.kind for i in bar.read_incidents(self.window)}


@pytest.fixture
def rig(machine):
    return lambda *args, **kwargs: Rig(machine(*args, **kwargs))


@pytest.mark.parametrize("mode", ["legacy", "scalable-ss", "scalable-fs"])
def test_clean_run(rig, mode):
    x = rig(mode=mode)
    assert x.ranges(x.default()) == 0
    got = x.run(4000)
    assert got["transactions"] == got["reads"] + got["writes"] == 4000
    assert 1500 < got["reads"] < 2500
    assert not any(got[k] for k in ("faults", "lost", "misdirected", "denied", "leaks"))
    assert x.total.bytes == 4000 * 64
    assert np.count_nonzero(x.device.shadow) == PAGES
    x.device.verify_all()
    s = bar.read_status(x.window)
    assert (s.verify_checked, s.verify_lost, s.verify_misdirected, s.verify_unreached) == (PAGES, 0, 0, 0)
    assert bar.read_incidents(x.window) == []


def test_payload_is_one_line_per_device(machine):
    m = machine(devices=2)
    rigs = [Rig(m, 0), Rig(m, 1)]
    for x in rigs:
        x.ranges(x.default(W))
        x.device.run_burst(2000)
    frame = m.ram.words[PA >> 3 : (PA >> 3) + 512].reshape(64, 8)
    assert np.flatnonzero(frame.any(axis=1)).tolist() == [0, 1]
    assert int(frame[1, 0]) == engine.STAMP_MAGIC ^ 1
    assert int(frame[1, 1]) == 0  # slot
    assert int(frame[1, 2]) == int(rigs[1].device.shadow[0])
    for x in rigs:
        x.device.verify_all()
        assert bar.read_status(x.window).verify_misdirected == 0


def test_read_only_and_write_only(rig):
    x = rig()
    x.ranges(x.default(R))
    got = x.run()
    assert got["reads"] == 500
    assert not x.device.shadow.any()
    x.ranges(x.default(W))
    assert x.run()["writes"] == 500


def test_permission_faults_are_counted(machine):
    x = Rig(machine(), prot=1)
    x.ranges(x.default(RW))
    got = x.run()
    assert got["faults"] == 500 - got["reads"]
    assert got["writes"] == 0
    assert got["transactions"] == got["reads"]
    s = bar.read_status(x.window)
    assert s.last_reason == vtd.FaultReason.NO_WRITE
    assert IOVA <= s.last_iova < IOVA + (PAGES << 12)
    assert x.incidents() == {bar.INCIDENT_FAULT}


def test_two_ranges_over_one_file_page_share_the_slot(rig):
    x = rig()
    x.m.map(IOVA + (1 << 30), PA, PAGES)
    alias = RangeRow(IOVA + (1 << 30), IOVA + (1 << 30) + (PAGES << 12) - 1, 0, TAG)
    x.ranges(x.default(), alias)
    got = x.run(3000)
    assert got["lost"] == got["misdirected"] == 0


def test_a_lost_write_is_found(rig):
    x = rig()
    x.ranges(x.default(W))
    x.run()
    old = x.m.ram.read(PA, PAGES << 12)
    x.run()
    x.m.ram.write(PA, old)  # as if the last writes had never arrived
    x.ranges(x.default(R))
    got = x.run()
    assert got["lost"] > 400
    assert got["misdirected"] == 0
    assert bar.INCIDENT_LOST in x.incidents()
    x.device.verify_all()
    assert bar.read_status(x.window).verify_lost > 0


@pytest.mark.parametrize("damage", ["zero", "poison", "other-slot", "newer", "torn"])
def test_foreign_content_is_found(rig, damage):
    x = rig()
    x.ranges(x.default(W))
    x.run(1000)
    x.ranges(x.default(R))
    line = x.m.ram.read(PA, 64)
    assert x.device.shadow[0]
    if damage == "zero":
        x.m.ram.write(PA, bytes(64))
    elif damage == "poison":
        x.m.ram.write(PA, b"\xaa" * 64)
    elif damage == "other-slot":
        x.m.ram.write(PA, x.m.ram.read(PA + 4096, 64))
    elif damage == "newer":
        x.m.ram.store64(PA + 16, 1 << 60)
    else:
        x.m.ram.write(PA + 56, bytes(8))
    x.device.verify_all()
    s = bar.read_status(x.window)
    assert (s.verify_misdirected, s.verify_lost) == (1, 0)
    x.m.ram.write(PA, line)
    x.device.verify_all()
    assert bar.read_status(x.window).verify_misdirected == 0


def test_wrong_owner_is_misdirected_and_the_damage_is_done(rig):
    x = rig()
    victim = 0x600000
    x.platform.tags[victim >> 12 : (victim >> 12) + PAGES] = 0x99
    x.m.unmap(IOVA, IOVA + (PAGES << 12) - 1)
    x.m.map(IOVA, victim, PAGES)
    x.ranges(x.default())
    got = x.run()
    assert got["misdirected"] == got["transactions"] == 500
    assert x.m.ram.read(victim, PAGES << 12).count(engine.STAMP_MAGIC.to_bytes(8, "little")) > 0
    i = bar.read_incidents(x.window)[0]
    assert (i.kind, i.expected_tag, i.found_tag) == (bar.INCIDENT_TAG, TAG, 0x99)
    assert f"{i.pa:#x}" in i.text(x.m.regs.fault_text)


def test_freed_frame_is_misdirected(rig):
    x = rig()
    x.ranges(x.default())
    x.run()
    x.platform.tags[PA >> 12] = 0
    assert 1 <= x.run(2000)["misdirected"] < 200


def test_pa_beyond_the_memory(rig):
    x = rig()
    x.m.unmap(IOVA, IOVA + (PAGES << 12) - 1)
    x.m.map(IOVA, 1 << 40, PAGES)
    x.ranges(x.default())
    got = x.run()
    assert got["misdirected"] == 500
    assert got["transactions"] == 0
    assert x.incidents() == {bar.INCIDENT_NO_MEMORY}


def test_probes(rig):
    x = rig()
    hole = RangeRow(IOVA + (1 << 32), IOVA + (1 << 33) - 1, 0, TAG, PROBE)
    x.ranges(x.default(), hole)
    got = x.run(4000)
    assert 0 < got["denied"] < 4000 // 4  # a hole of 4 GiB does not crowd out 32 pages
    assert got["denied"] + got["transactions"] == 4000
    assert got["faults"] == got["leaks"] == 0
    x.ranges(hole)
    assert x.run()["denied"] == 500
    # What is mapped by mistake is found, in both directions, and a write through it does damage.
    stray = RangeRow(IOVA, IOVA + (PAGES << 12) - 1, 0, TAG, PROBE)
    x.ranges(stray)
    before = x.m.ram.read(PA, PAGES << 12)
    got = x.run()
    assert got["leaks"] == got["misdirected"] == 500
    assert x.m.ram.read(PA, PAGES << 12) != before
    x.ranges(x.default(R))
    assert x.run()["misdirected"] > 0  # and the victim notices


def test_read_probe_of_a_write_only_page(machine):
    x = Rig(machine(), prot=2)
    x.ranges(x.default(R | 4))
    assert x.run()["denied"] == 500


def test_translation_disabled(rig):
    x = rig()
    x.ranges(x.default())
    before = x.m.ram.words.copy()
    x.m.regs.write32(r.DMAR_GCMD_REG, r.DMA_GCMD_QIE)
    got = x.run()
    assert x.total.untranslated == 500
    assert got["misdirected"] == 500
    assert got["transactions"] == got["faults"] == 0
    assert (x.m.ram.words == before).all()
    assert x.incidents() == {bar.INCIDENT_UNTRANSLATED}


def test_stale_iotlb_is_what_a_driver_bug_looks_like(rig):
    """Unmap, free, no invalidation: the device goes on hitting the old frame, and it shows."""
    x = rig()
    x.m.regs.local_front_ends.clear()
    x.ranges(x.default())
    x.run()
    x.m.table.unmap(IOVA, IOVA + (PAGES << 12) - 1)
    x.platform.tags[PA >> 12 : (PA >> 12) + PAGES] = 0
    assert x.run()["misdirected"] == 500
    x.m.submit(vtd.inv_iotlb_domain(x.m.did))
    x.device.frontend.service()
    assert x.run()["faults"] == 500


def test_ranges_that_are_refused(rig):
    x = rig()
    good = x.default()
    assert x.ranges(good) == 0
    last = bar.MAX_SLOTS - PAGES
    assert x.ranges(good._replace(slot_base=last)) == 0
    assert x.ranges(good, good._replace(slot_base=last + 1)) == 2
    assert x.ranges(good._replace(flags=0)) == 1
    assert x.ranges(good._replace(flags=16 | 3)) == 1
    assert x.ranges(RangeRow(0, 2**64 - 1, 0, TAG, PROBE)) == 1
    assert x.run()["transactions"] == 500  # the last good table is still in force
    bar.write_register(x.window, bar.NRANGES, 1 << 60)
    bar.write_register(x.window, bar.GENERATION, 99)
    x.device.pump()
    assert bar.read_status(x.window).generation_error == 1 + x.device.capacity
    # A raw row that the encoder would not make.
    x.window.words[bar.RANGES >> 3] = 0x123
    bar.write_register(x.window, bar.NRANGES, 1)
    bar.write_register(x.window, bar.GENERATION, 100)
    x.device.pump()
    assert bar.read_status(x.window).generation_error == 1


def test_disabled_ranges_and_generations(rig):
    x = rig()
    x.ranges(x.default(RW | bar.RANGE_DISABLED))
    assert x.run()["transactions"] == 0
    assert bar.read_status(x.window).working_set == 0
    bar.write_ranges(x.window, [x.default()], timeout=0)
    assert x.run()["transactions"] == 0  # not taken before the next round
    x.device.pump()
    assert bar.read_status(x.window).generation_ack == 2
    assert x.run()["transactions"] == 500


def test_counters_per_step(rig):
    x = rig()
    x.ranges(x.default())
    for step, n in ((0, 10), (3, 20), (31, 30)):
        bar.set_step(x.window, step)
        x.device.run_burst(n)
    steps = bar.read_stats(x.platform, 0).steps
    assert [steps[i].transactions for i in (0, 1, 3, 31)] == [10, 0, 20, 30]
    assert bar.decode_stats(x.window).total.transactions == 60
    assert steps[3].first_ns >= steps[0].last_ns > 0
    assert steps[3].max_gap_ns > 0
    assert steps[3].max_gap_on_cpu_ns <= steps[3].max_gap_ns


def test_enable_quiesce_reset(rig):
    x = rig()
    bar.write_ranges(x.window, [x.default()], timeout=0)
    bar.enable(x.window, timeout=0)
    x.device.pump()
    s = bar.read_status(x.window)
    assert (s.enable_ack, s.state, s.generation_ack) == (1, bar.STATE_RUNNING, 1)
    assert x.total.transactions > 0
    assert x.device.frontend.online
    bar.enable(x.window, False, timeout=0)
    x.device.pump()
    s = bar.read_status(x.window)
    assert (s.enable_ack, s.state) == (0, bar.STATE_QUIESCED)
    assert not x.device.frontend.online
    assert not x.device.frontend.tlb[0].any()
    n = x.total.transactions
    x.device.pump()
    assert x.total.transactions == n
    bar.enable(x.window, timeout=0)
    x.device.pump()
    bar.command(x.window, bar.CMD_FLR, timeout=0)
    x.device.pump()
    s = bar.read_status(x.window)
    assert (s.enable_ack, s.working_set, s.command_ack) == (0, 0, 1 << 8 | bar.CMD_FLR)
    assert not x.device.shadow.any()
    assert bar.read_register(x.window, bar.ENABLE) == 0


def test_verify_all_by_command(rig):
    x = rig()
    x.ranges(x.default())
    x.run()
    half = x.default()._replace(last=IOVA + (PAGES << 11) - 1)
    x.ranges(half)
    bar.command(x.window, bar.CMD_VERIFY_ALL, timeout=0)
    x.device.pump()
    s = bar.read_status(x.window)
    assert (s.verify_checked, s.verify_unreached) == (PAGES // 2, PAGES // 2)
    assert s.command_ack >> 8 == 1
    # Written slots that fault are no silent success either.
    x.m.unmap(IOVA, IOVA + (PAGES << 12) - 1)
    bar.command(x.window, bar.CMD_VERIFY_ALL, timeout=0)
    x.device.pump()
    s = bar.read_status(x.window)
    assert (s.verify_checked, s.verify_faults) == (0, PAGES // 2)


def test_throttle(rig):
    x = rig()
    bar.write_ranges(x.window, [x.default()], timeout=0)
    bar.write_register(x.window, bar.RATE, 1000)
    bar.enable(x.window, timeout=0)
    pauses = [x.device.pump() for _ in range(50)]
    assert max(pauses) <= 0.0005
    assert sum(p > 0 for p in pauses) > 25
    assert x.total.transactions < 100


def test_log_is_bounded(rig):
    x = rig()
    x.platform.tags[:] = 0
    x.ranges(x.default())
    x.run(1000)
    assert len(bar.read_incidents(x.window)) == bar.LOG_ROWS
    assert bar.read_status(x.window).logged == 1000


def test_same_seed_same_order(machine):
    orders = []
    for seed in (1, 1, 2):
        m = machine()
        x = Rig(m)
        bar.write_register(x.window, bar.SEED, seed)
        x.ranges(x.default(W))
        x.run(300)
        orders.append(m.ram.read(PA, PAGES << 12))
    assert orders[0] == orders[1] != orders[2]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.integers(0, 15), st.integers(1, 8), st.sampled_from([R, W, RW, PROBE])),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 2**64 - 1),
)
def test_every_transaction_is_counted_once(machine, pieces, seed):
    """Ranges in any order and overlap, some mapped and some not: the counters add up and nothing is amiss."""
    x = Rig(machine())
    bar.write_register(x.window, bar.SEED, seed)
    hole = IOVA + (1 << 34)
    rows = []
    for start, pages, flags in pieces:
        first = (hole if flags == PROBE else IOVA) + (start << 12)
        rows.append(RangeRow(first, first + (pages << 12) - 1, start, TAG, flags))
    assert x.ranges(*rows) == 0
    got = x.run(400)
    assert got["reads"] + got["writes"] + got["denied"] == 400
    assert got["transactions"] == got["reads"] + got["writes"]
    assert [got[k] for k in ("faults", "lost", "misdirected", "leaks")] == [0, 0, 0, 0]
    if not any(flags & W and flags != PROBE for _, _, flags in pieces):
        assert not x.device.shadow.any()
    x.device.verify_all()
    s = bar.read_status(x.window)
    assert (s.verify_lost, s.verify_misdirected, s.verify_faults) == (0, 0, 0)
