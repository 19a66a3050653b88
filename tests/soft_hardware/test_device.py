# SPDX-License-Identifier: Apache-2.0
"""The device process: starts, works, answers invalidations, outlives kernels, ends with its host."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from iokeep.pt.roots import vtd
from iokeep.soft.hardware import bar, device
from iokeep.soft.hardware.bar import RangeRow
from iokeep.soft.hardware.unit import FE_INVALIDATIONS, FE_ONLINE
from iokeep.soft.hardware.units import vtd as r

IOVA, PA, PAGES, TAG = 1 << 30, 0x400000, 64, 9


@pytest.fixture
def started(machine):
    processes = []

    def start(m, index=0):
        argv, fds = device.spawn_arguments(m.platform, index)
        processes.append(subprocess.Popen(argv, pass_fds=fds))
        bar.wait_ready(m.platform.bars[index])
        return processes[-1]

    yield start
    for p in processes:
        if p.poll() is None:
            p.kill()
        p.wait()


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.001)


def owned(machine, **kwargs):
    m = machine(**kwargs)
    m.map(IOVA, PA, PAGES)
    m.platform.tags[PA >> 12 : (PA >> 12) + PAGES] = TAG
    return m


def go(m, index=0, rate=200_000):
    w = m.platform.bars[index]
    bar.write_register(w, bar.RATE, rate)
    bar.write_ranges(w, [RangeRow(IOVA, IOVA + (PAGES << 12) - 1, 0, TAG)])
    bar.enable(w)
    return w


def count(m, index=0):
    return bar.read_stats(m.platform, index).total.transactions


def test_devices_work_in_parallel_and_wait_for_each_other(machine, started):
    m = owned(machine, devices=2, mode="scalable-fs")
    processes = [started(m, 0), started(m, 1)]
    windows = [go(m, 0), go(m, 1)]
    until(lambda: count(m, 0) > 1000 and count(m, 1) > 1000)
    for _ in range(50):
        sequence = m.submit(vtd.inv_piotlb_pasid(m.did))
        until(lambda s=sequence: m.done(s))
    assert (m.platform.front_ends[:, FE_INVALIDATIONS] >= 50).all()
    # Unmap: after the wait neither device touches the pages, however fast it is.
    sequence = m.unmap(IOVA, IOVA + (PAGES << 12) - 1)
    until(lambda: m.done(sequence))
    m.platform.tags[:] = 0
    time.sleep(0.05)
    for index, w in enumerate(windows):
        total = bar.read_stats(m.platform, index).total
        assert total.misdirected == total.lost == 0
        assert total.faults > 0
        bar.enable(w, False)
    for p in processes:
        p.send_signal(signal.SIGTERM)
        assert p.wait(20) == 0
    assert {bar.read_status(w).state for w in windows} == {bar.STATE_ENDED}
    assert not m.platform.front_ends[:, FE_ONLINE].any()


def test_a_new_kernel_changes_everything_under_a_working_device(machine, started):
    """New root table, new context, new page table, same frames: no DMA fails and none goes astray."""
    m = owned(machine)
    started(m)
    go(m)
    until(lambda: count(m) > 1000)
    m.regs.write32(r.DMAR_GCMD_REG, r.DMA_GCMD_TE)  # the old kernel's queue is stopped
    until(lambda: not m.regs.read32(r.DMAR_GSTS_REG) & r.DMA_GSTS_QIES)
    before = count(m)
    until(lambda: count(m) > before + 1000)
    m.queue, m.tail = m.page(), 0
    m.regs.write64(r.DMAR_IQT_REG, 0)
    m.regs.write64(r.DMAR_IQA_REG, m.queue)
    m.regs.write32(r.DMAR_GCMD_REG, r.DMA_GCMD_TE | r.DMA_GCMD_QIE)
    m.root_table, m.contexts, m.did = m.page(), m.page(), 77
    m.table = type(m.table).create(m.fmt, m.ram, m.alloc, lambda pas: None)
    m.map(IOVA, PA, PAGES)
    m.attach(0)
    m.regs.write64(r.DMAR_RTADDR_REG, m.root_table)
    m.regs.write32(r.DMAR_GCMD_REG, r.DMA_GCMD_TE | r.DMA_GCMD_QIE | r.DMA_GCMD_SRTP)
    sequence = m.submit(vtd.inv_context_global(), vtd.inv_iotlb_global())
    until(lambda: m.done(sequence))
    before = count(m)
    until(lambda: count(m) > before + 1000)
    bar.command(m.platform.bars[0], bar.CMD_VERIFY_ALL)
    total = bar.read_stats(m.platform, 0).total
    assert (total.faults, total.lost, total.misdirected, total.untranslated) == (0, 0, 0, 0)
    assert bar.read_status(m.platform.bars[0]).verify_unreached == 0


def test_a_killed_device_can_be_replaced(machine, started):
    m = owned(machine)
    first = started(m)
    w = go(m)
    until(lambda: m.platform.front_ends[0, FE_ONLINE])
    first.kill()
    first.wait()
    sequence = m.submit(vtd.inv_iotlb_global())
    time.sleep(0.05)
    assert not m.done(sequence)
    m.regs.queue.leave(0)  # what a host does when it finds the process dead
    assert m.done(sequence)
    bar.write_register(w, bar.STATE, bar.STATE_OFF)
    bar.enable(w, False, timeout=0)
    started(m)
    go(m)
    before = count(m)
    until(lambda: count(m) > before + 1000)
    assert bar.read_stats(m.platform, 0).total.misdirected == 0


def test_ends_with_its_parent(machine):
    m = owned(machine)
    argv, fds = device.spawn_arguments(m.platform, 0)
    program = (
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen({argv!r}, pass_fds={fds!r})\n"
        "print(p.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    host = subprocess.Popen([sys.executable, "-c", program], pass_fds=fds, stdout=subprocess.PIPE, text=True)
    pid = int(host.stdout.readline())
    until(lambda: bar.read_status(m.platform.bars[0]).state == bar.STATE_QUIESCED, 60)
    assert bar.read_status(m.platform.bars[0]).pid == pid
    host.kill()
    host.wait()
    host.stdout.close()
    until(lambda: bar.read_status(m.platform.bars[0]).state == bar.STATE_ENDED)
    assert not m.platform.front_ends[0, FE_ONLINE]


def test_starts_for_nobody(machine):
    """A parent that is gone before the device looks: it leaves at once."""
    assert device._die_with_parent(os.getppid() + 1) is False


def test_numba_is_not_needed_to_look_at_a_machine():
    program = (
        "import sys\n"
        "import iokeep.soft.hardware.platform, iokeep.soft.hardware.bar, iokeep.soft.hardware.units.vtd\n"
        "import iokeep.soft.hardware.device, iokeep.soft.hardware.iommu, iokeep.soft.hardware.dma\n"
        "sys.exit('numba' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_everything_without_compilation():
    """The suite of this package passes as plain Python, too."""
    if os.environ.get("NUMBA_DISABLE_JIT"):
        pytest.skip("this is that run")
    names = ("engine", "walker", "unit", "iommu", "dma")
    files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    env = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    out = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stdout[-3000:]
