# SPDX-License-Identifier: Apache-2.0
"""Devices behind the RISC-V IOMMU work all the time while their domains are replaced, mapped and unmapped."""

import threading
import time

import pytest
from soft_machine import MIB, Caller, boot, settled

from iokeep.soft.hardware import bar
from iokeep.soft.hardware.dma import DmaEngine
from iokeep.soft.hardware.iommu import FrontEnd
from iokeep.soft.hardware.units import riscv as reg

IOVA, SIDE = 0x4000_0000, 0x8000_0000
RW = bar.RANGE_READ | bar.RANGE_WRITE


class Turning:
    """DMA engines of all devices, each in a thread of its own."""

    def __init__(self, kernel, rows):
        self.windows = kernel.platform.bars
        self.engines = [DmaEngine(FrontEnd(kernel.platform, i), w) for i, w in enumerate(self.windows)]
        self._stop = threading.Event()
        self._failed = []
        for engine, window in zip(self.engines, self.windows, strict=True):
            bar.write_ranges(window, rows, timeout=0)
            engine.pump()
            assert not bar.read_register(window, bar.GENERATION_ERROR)
            bar.enable(window, True, timeout=0)
        self._threads = [threading.Thread(target=self._turn, args=(e,), daemon=True) for e in self.engines]
        for thread in self._threads:
            thread.start()

    def _turn(self, engine):
        try:
            while not self._stop.is_set():
                engine.pump()
        except BaseException as error:
            self._failed.append(error)
            raise

    def transactions(self):
        return [bar.decode_stats(w).total.transactions for w in self.windows]

    def wait(self, before):
        """Until every device has done transactions after ``before``."""
        end = time.monotonic() + 20
        while any(now == then for now, then in zip(self.transactions(), before, strict=True)):
            assert time.monotonic() < end, self.transactions()
            time.sleep(0.001)

    def stop(self):
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
        assert not self._failed
        for engine in self.engines:
            engine.close()


@pytest.mark.parametrize("mode", ["first-stage", "second-stage"])
def test_no_transaction_is_lost_by_any_change(mode):
    kernel = boot(kind="riscv", iommu=mode, devices=2)
    c = Caller(kernel)
    fd = c.iommu()
    ioas = c.ioas(fd)
    m = c.memfd(size=4 * MIB)
    c.map_file(fd, ioas, m, 0, 3 * MIB, IOVA)
    vs = [c.vfio(i) for i in range(2)]
    devs = [c.bind(v, fd) for v in vs]
    hwpt = c.hwpt(fd, devs[0], ioas)
    for v in vs:
        c.attach(v, hwpt)
    row = bar.RangeRow(IOVA, IOVA + 3 * MIB - 1, 0, c.fstat(m)[0], RW)
    turning = Turning(kernel, [row])
    try:
        for _ in range(20):
            old, hwpt = hwpt, c.hwpt(fd, devs[0], ioas)
            for v in vs:
                c.attach(v, hwpt)
            c.destroy(fd, old)  # its tables are poisoned and used for something else
            before = turning.transactions()
            c.map_file(fd, ioas, m, 3 * MIB, 0x11000, SIDE)
            c.unmap(fd, ioas, SIDE, 0x11000)
            turning.wait(before)
    finally:
        turning.stop()
    for window in kernel.platform.bars:
        total = bar.decode_stats(window).total
        assert (total.faults, total.lost, total.misdirected) == (0, 0, 0), bar.read_incidents(window)
        assert total.transactions > 40
    assert kernel.platform.iommu.read32(reg.FQT) == 0
    settled(kernel)


@pytest.mark.parametrize("mode", ["first-stage", "second-stage"])
def test_after_every_store_of_a_replace_hardware_translates(mode, monkeypatch):
    """Even hardware that has nothing cached: it finds the old table or the new one."""
    kernel = boot(kind="riscv", iommu=mode, devices=1)
    c = Caller(kernel)
    fd = c.iommu()
    ioas = c.ioas(fd)
    m = c.memfd(size=MIB)
    c.map_file(fd, ioas, m, 0, MIB, IOVA)
    v = c.vfio()
    dev = c.bind(v, fd)
    old, new = c.hwpt(fd, dev, ioas), c.hwpt(fd, dev, ioas)
    c.attach(v, old)
    device = FrontEnd(kernel.platform, 0)
    want = device.translate(IOVA + 0x5008, True)
    ram, looks = kernel.platform.ram, []
    real64, real = type(ram).store64, type(ram).write

    def look():
        if looks[-1:] == [None]:
            return
        looks.append(None)  # a fault is recorded by a store too
        device.flush()
        looks[-1] = device.translate(IOVA + 0x5008, True)

    monkeypatch.setattr(type(ram), "store64", lambda self, pa, value: (real64(self, pa, value), look())[0])
    monkeypatch.setattr(type(ram), "write", lambda self, pa, data: (real(self, pa, data), look())[0])
    c.attach(v, new)
    monkeypatch.undo()
    assert len(looks) > 5
    assert set(looks) == {want}
    settled(kernel)


def test_unmapped_and_blocked_devices_fault():
    """When an unmap or a detach returns no DMA arrives any more; the fault queue says which device tried."""
    kernel = boot(kind="riscv", devices=1)
    c = Caller(kernel)
    fd = c.iommu()
    ioas = c.ioas(fd)
    m = c.memfd(size=MIB)
    c.map_file(fd, ioas, m, 0, MIB, IOVA)
    v = c.vfio()
    c.bind(v, fd)
    c.attach(v, ioas)
    device = FrontEnd(kernel.platform, 0)
    pa, _ = device.translate(IOVA + 0x5008, True)
    assert pa is not None
    c.unmap(fd, ioas, IOVA, MIB)
    assert device.translate(IOVA + 0x5008, True) == (None, 15)
    c.detach(v)
    assert device.translate(IOVA + 0x5008, True) == (None, 258)
    unit = kernel.platform.iommu
    assert unit.read32(reg.FQT) == 2
    settled(kernel)
