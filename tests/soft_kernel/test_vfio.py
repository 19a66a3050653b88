# SPDX-License-Identifier: Apache-2.0
"""VFIO cdevs: bind, attach, replace, detach, regions; and the structures that hardware reads meanwhile."""

import errno

import pytest
from soft_machine import MIB, Caller, boot, refused, settled

from iokeep.pt.roots import vtd as codec
from iokeep.soft.hardware import bar
from iokeep.soft.kernel import queue
from iokeep.uapi import vfio

MODES = ("legacy", "scalable-fs", "scalable-ss")


@pytest.fixture(params=MODES)
def kernel(request):
    kernel = boot(iommu=request.param, devices=3)
    yield kernel
    settled(kernel)


def roots(kernel):
    out = []
    for dev in kernel.iommu.devices:
        try:
            out.append(kernel.iommu.root_of(dev).root_pa)
        except codec.RootFault:
            out.append(None)
    return out


def test_bind_refusals(kernel, c, fd):
    v = c.vfio()
    with refused(errno.EINVAL):
        c.attach(v, 1)  # not bound
    with refused(errno.EBADF):
        c.bind(v, 99)
    with refused(errno.EINVAL):
        c.bind(v, -1)
    with refused(errno.EBADFD):
        c.bind(v, c.memfd())
    with refused(errno.EINVAL):
        c.ioctl(v, vfio.VFIO_DEVICE_BIND_IOMMUFD, vfio.vfio_device_bind_iommufd(argsz=8, iommufd=fd))
    with refused(errno.EINVAL):
        c.ioctl(
            v, vfio.VFIO_DEVICE_BIND_IOMMUFD, vfio.vfio_device_bind_iommufd(argsz=16, flags=8, iommufd=fd)
        )
    assert c.bind(v, fd) == 1
    with refused(errno.EINVAL):
        c.bind(v, fd)
    again = c.vfio()
    with refused(errno.EINVAL):
        c.bind(again, fd)
    with refused(errno.ENOTTY):
        c.ioctl(v, vfio.VFIO_DEVICE_FEATURE, vfio.vfio_device_info(argsz=24))
    c.close(v)
    assert c.bind(again, c.iommu()) == 1


def test_bind_checks_can_refuse(kernel, c, fd):
    from iokeep.soft.kernel.syserror import SysError

    def no(file, iommufd):
        raise SysError(errno.EPERM, "for the test")

    kernel.bind_checks.append(no)
    v = c.vfio()
    with refused(errno.EPERM):
        c.bind(v, fd)
    kernel.bind_checks.clear()
    c.bind(v, fd)


def test_attach_refusals(c, fd):
    v = c.vfio()
    dev = c.bind(v, fd)
    with refused(errno.ENOENT):
        c.attach(v, 99)
    with refused(errno.EINVAL):
        c.attach(v, dev)
    for argsz, flags, number in ((8, 0, errno.EINVAL), (12, 8, errno.EINVAL), (12, 1, errno.EINVAL)):
        with refused(number):
            c.ioctl(
                v,
                vfio.VFIO_DEVICE_ATTACH_IOMMUFD_PT,
                vfio.vfio_device_attach_iommufd_pt(argsz=argsz, flags=flags),
            )
    c.detach(v)  # not attached: nothing happens
    with refused(errno.EINVAL):
        c.ioctl(v, vfio.VFIO_DEVICE_DETACH_IOMMUFD_PT, vfio.vfio_device_detach_iommufd_pt(argsz=8, flags=8))


def test_automatic_domains_are_shared_and_go_with_the_last_device(kernel, c, fd):
    ioas = c.ioas(fd)
    vs = [c.vfio(i) for i in range(3)]
    devs = [c.bind(v, fd) for v in vs]
    hwpts = {c.attach(v, ioas) for v in vs}
    assert len(hwpts) == 1
    assert len(set(roots(kernel))) == 1
    for v in vs:
        assert kernel.iommu.domains
        c.detach(v)
    assert kernel.iommu.domains == {}
    assert roots(kernel) == [None] * 3
    assert len(devs) == 3


def test_replace_moves_one_device_and_leaves_its_neighbours(kernel, c, fd):
    ioas, other = c.ioas(fd), c.ioas(fd)
    m = c.memfd(size=4 * MIB)
    c.map_file(fd, ioas, m, 0, MIB, 0)
    c.map_file(fd, other, m, MIB, MIB, 0)
    vs = [c.vfio(i) for i in range(3)]
    for v in vs:
        c.bind(v, fd)
        c.attach(v, ioas)
    before = roots(kernel)
    pages = set(kernel.iommu.structure_pages().tolist())
    moved = c.attach(vs[1], other)
    after = roots(kernel)
    assert after[0] == before[0] == after[2]
    assert after[1] not in before
    assert after[1] == c.process.file(fd).hwpt(moved).domain.root_pa
    # one table was exchanged for a copy, nothing else moved
    assert len(set(kernel.iommu.structure_pages().tolist()) - pages) == 1
    assert len(pages - set(kernel.iommu.structure_pages().tolist())) == 1
    assert kernel.audit().leaked == 0
    assert c.ranges(fd, other)[0][0] == (0, 0xFEDFFFFF)
    c.attach(vs[1], ioas)
    assert roots(kernel)[1] == before[0]
    assert c.ranges(fd, other)[0] == [(0, 2**64 - 1)]


def test_replace_between_hwpts_of_one_ioas(kernel, c, fd):
    ioas = c.ioas(fd)
    m = c.memfd(size=MIB)
    c.map_file(fd, ioas, m, 0, MIB, 0)
    v = c.vfio()
    dev = c.bind(v, fd)
    a, b = c.hwpt(fd, dev, ioas), c.hwpt(fd, dev, ioas)
    assert c.attach(v, a) == a
    pins = int(kernel.frames.pin_count.sum())
    assert c.attach(v, b) == b
    assert c.attach(v, b) == b
    assert int(kernel.frames.pin_count.sum()) == pins
    c.destroy(fd, a)
    with refused(errno.EBUSY):
        c.destroy(fd, b)
    assert int(kernel.frames.pin_count.sum()) == pins


def test_hardware_never_sees_a_gap_at_replace(kernel, c, fd, monkeypatch):
    """After each single store of a replace the walk from the register gives the old table or the new one."""
    ioas, other = c.ioas(fd), c.ioas(fd)
    v = c.vfio()
    dev = c.bind(v, fd)
    old, new = c.hwpt(fd, dev, ioas), c.hwpt(fd, dev, other)
    c.attach(v, old)
    ictx = c.process.file(fd)
    allowed = [ictx.hwpt(old).domain.root_pa, ictx.hwpt(new).domain.root_pa]
    seen = []
    ram = kernel.platform.ram
    real64, real = type(ram).store64, type(ram).write

    def look():
        seen.append(kernel.iommu.root_of(kernel.iommu.devices[0]).root_pa)

    monkeypatch.setattr(type(ram), "store64", lambda self, pa, value: (real64(self, pa, value), look())[0])
    monkeypatch.setattr(type(ram), "write", lambda self, pa, data: (real(self, pa, data), look())[0])
    c.attach(v, new)
    monkeypatch.undo()
    assert set(seen) == set(allowed)
    switch = seen.index(allowed[1])
    assert seen == [allowed[0]] * switch + [allowed[1]] * (len(seen) - switch)


def test_attach_to_a_busy_range_changes_nothing(kernel, c, fd):
    good, bad = c.ioas(fd), c.ioas(fd)
    m = c.memfd(size=MIB)
    c.map_file(fd, bad, m, 0, 4096, 0xFEE00000)
    v = c.vfio()
    dev = c.bind(v, fd)
    hwpt = c.hwpt(fd, dev, bad)
    c.attach(v, good)
    before = roots(kernel)
    with refused(errno.EADDRINUSE):
        c.attach(v, hwpt)
    with refused(errno.EADDRINUSE):
        c.attach(v, bad)
    assert roots(kernel) == before
    c.map_file(fd, good, m, 0, 4096, 0)


def test_preserved_device_keeps_its_attachment(c, fd):
    ioas, other = c.ioas(fd), c.ioas(fd)
    v = c.vfio()
    dev = c.bind(v, fd)
    c.attach(v, ioas)
    c.process.file(fd).device(dev).preserved = True
    with refused(errno.EBUSY):
        c.attach(v, other)
    with refused(errno.EBUSY):
        c.detach(v)
    c.close(v)  # the end of its process is stronger


def test_iommufd_lives_as_long_as_a_bound_device(kernel, c, fd):
    ioas = c.ioas(fd)
    m = c.memfd(size=MIB)
    v = c.vfio()
    c.bind(v, fd)
    c.attach(v, ioas)
    c.map_file(fd, ioas, m, 0, MIB, 0)
    c.close(fd)
    c.close(m)
    assert roots(kernel)[0] is not None
    assert kernel.audit().by_kind["memfd"] == 256
    c.close(v)
    assert roots(kernel)[0] is None
    assert "memfd" not in kernel.audit().by_kind


def test_regions(kernel, c, fd):
    v = c.vfio(1)
    with refused(errno.EINVAL):
        c.pread(v, 8, bar.INDEX)
    c.bind(v, fd)
    info = vfio.vfio_device_info(argsz=24)
    c.ioctl(v, vfio.VFIO_DEVICE_GET_INFO, info)
    assert info.num_regions == 9
    region = vfio.vfio_region_info(argsz=32, index=0)
    c.ioctl(v, vfio.VFIO_DEVICE_GET_REGION_INFO, region)
    assert (region.size, region.offset) == (kernel.platform.bar_bytes, 0)
    with refused(errno.EINVAL):
        c.ioctl(v, vfio.VFIO_DEVICE_GET_REGION_INFO, vfio.vfio_region_info(argsz=32, index=9))
    assert int.from_bytes(c.pread(v, 8, bar.INDEX), "little") == 1
    c.pwrite(v, (7).to_bytes(8, "little"), bar.STEP)
    assert bar.read_register(kernel.platform.bars[1], bar.STEP) == 7
    _, vma, extents = c.mmap(v, 8192, 4096)
    start, _ = kernel.platform.bar_extent(1)
    assert extents == [(1, start + 4096, 8192)]
    c.munmap(vma)
    with refused(errno.EINVAL):
        c.mmap(v, kernel.platform.bar_bytes + 4096)
    with refused(errno.EINVAL):
        c.pread(v, 8, 1 << 40)


def test_close_stops_the_device(kernel, c, fd):
    v = c.vfio()
    c.bind(v, fd)
    bar.write_register(kernel.platform.bars[0], bar.ENABLE, 1)
    c.exit()
    assert bar.read_register(kernel.platform.bars[0], bar.ENABLE) == 0


def test_levels(monkeypatch):
    for mode, levels in (("legacy", 3), ("legacy", 5), ("scalable-fs", 5), ("scalable-ss", 3)):
        kernel = boot(iommu=mode, levels=str(levels))
        c = Caller(kernel)
        fd = c.iommu()
        v = c.vfio()
        c.bind(v, fd)
        c.attach(v, c.ioas(fd))
        info = kernel.iommu.root_of(kernel.iommu.devices[0])
        assert len(info.fmt.levels) == levels
        settled(kernel)


def test_buses_beyond_the_first():
    kernel = boot(devices=40)
    c = Caller(kernel)
    fd = c.iommu()
    ioas = c.ioas(fd)
    for i in (0, 30, 39):
        v = c.vfio(i)
        c.bind(v, fd)
        c.attach(v, ioas)
    assert sum(r is not None for r in roots(kernel)) == 3
    settled(kernel)


def test_hardware_that_does_not_answer_stops_the_kernel(monkeypatch):
    from iokeep.soft.hardware.unit import FE_ONLINE

    kernel = boot()
    c = Caller(kernel)
    fd = c.iommu()
    v = c.vfio()
    c.bind(v, fd)
    c.attach(v, c.ioas(fd))
    kernel.platform.front_ends[0, FE_ONLINE] = 1
    monkeypatch.setattr(queue, "TIMEOUT", 0.05)
    with pytest.raises(queue.HardwareTimeout, match="device 0"):
        c.detach(v)


def test_pump_lets_hardware_in_this_process_go_on():
    from iokeep.soft.hardware.unit import FE_ONLINE

    kernel = boot()
    turns = []

    def pump():
        turns.append(1)
        if len(turns) == 3:
            kernel.platform.iommu.queue.leave(0)

    kernel.platform.front_ends[0, FE_ONLINE] = 1
    kernel.pump = pump
    c = Caller(kernel)
    fd = c.iommu()
    v = c.vfio()
    c.bind(v, fd)
    c.attach(v, c.ioas(fd))
    c.detach(v)
    assert len(turns) == 3
    settled(kernel)
