# SPDX-License-Identifier: Apache-2.0
"""/dev/iommu: what works, and which errno each refusal has (Linux 7.3, drivers/iommu/iommufd)."""

import ctypes
import errno
import struct

import numpy as np
import pytest
from soft_machine import FIXED, MIB, RW, Caller, R, boot, refused, settled

from iokeep.pt.extents import Extents
from iokeep.soft.kernel.ioas import HPAGE_BYTES
from iokeep.uapi import iommufd as uapi

MODES = ("legacy", "scalable-fs", "scalable-ss")
MAX = 2**64 - 1


@pytest.fixture(params=MODES)
def kernel(request):
    kernel = boot(iommu=request.param, placement="mixed:1")
    yield kernel
    settled(kernel)


@pytest.fixture
def ioas(c, fd):
    return c.ioas(fd)


@pytest.fixture
def m(c):
    return c.memfd("ram", 8 * MIB)


@pytest.fixture
def dev(c, fd):
    """A bound device: (cdev fd, dev id)."""
    v = c.vfio()
    return v, c.bind(v, fd)


def domain(kernel, index=0):
    return kernel.iommu.devices[index].domain


def translation(kernel, index=0):
    return domain(kernel, index).table.leaves().extents()


def want(c, m, areas):
    """Canonical extents of (iova, file offset, length, prot) areas, from the file's frames."""
    pfns = c.process.file(m).pfns
    rows = []
    for iova, offset, length, prot in areas:
        for page in range(length // 4096):
            at = iova + page * 4096
            rows.append((at, at + 4095, int(pfns[offset // 4096 + page]) * 4096, prot))
    return Extents.of(rows).canonical()


def same(a, b):
    return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("iova", "last", "pa", "prot"))


def pins(kernel):
    return int(kernel.frames.pin_count.sum())


# ---- mapping and what the table holds


def test_attach_fills_and_map_follows(kernel, c, fd, ioas, m, dev):
    c.map_file(fd, ioas, m, 0, 4 * MIB, 0x10000000)
    assert pins(kernel) == 0
    c.attach(dev[0], ioas)
    assert pins(kernel) == 1024
    c.map_file(fd, ioas, m, 4 * MIB, MIB, 0x40000000, R)
    areas = [(0x10000000, 0, 4 * MIB, 3), (0x40000000, 4 * MIB, MIB, 1)]
    assert same(translation(kernel), want(c, m, areas))
    assert c.unmap(fd, ioas, 0x10000000, 4 * MIB) == 4 * MIB
    assert same(translation(kernel), want(c, m, areas[1:]))
    assert pins(kernel) == 256


def test_hardware_finds_the_table(kernel, c, fd, ioas, dev):
    c.attach(dev[0], ioas)
    info = kernel.iommu.root_of(kernel.iommu.devices[0])
    assert (info.root_pa, info.domain_id) == (domain(kernel).root_pa, domain(kernel).domain_id)
    assert info.format == domain(kernel).fmt.name
    c.detach(dev[0])
    with pytest.raises(Exception, match="not present"):
        kernel.iommu.root_of(kernel.iommu.devices[0])


def test_huge_leaves_and_huge_pages_off(kernel, c, fd, dev):
    m = c.memfd("blocks", 4 * MIB)
    kernel.placement = type(kernel.placement)("contiguous")
    b = c.memfd("run", 4 * MIB)
    on, off = c.ioas(fd), c.ioas(fd)
    c.option(fd, uapi.IOMMU_OPTION_HUGE_PAGES, uapi.IOMMU_OPTION_OP_SET, off, 0)
    assert c.option(fd, uapi.IOMMU_OPTION_HUGE_PAGES, uapi.IOMMU_OPTION_OP_GET, off) == 0
    assert c.option(fd, uapi.IOMMU_OPTION_HUGE_PAGES, uapi.IOMMU_OPTION_OP_GET, on) == 1
    c.attach(dev[0], on)
    c.map_file(fd, on, b, 0, 4 * MIB, 0)
    assert set(domain(kernel).table.leaves().lg2.tolist()) == {21}
    c.attach(dev[0], off)
    c.map_file(fd, off, b, 0, 4 * MIB, 0)
    assert set(domain(kernel).table.leaves().lg2.tolist()) == {12}
    assert m


def test_one_call_with_scattered_pages_is_one_table_map(kernel, c, fd, ioas, dev, monkeypatch):
    from iokeep.pt.build import Table

    calls = []
    real = Table.map
    monkeypatch.setattr(Table, "map", lambda self, *a: calls.append(1) or real(self, *a))
    kernel.placement = type(kernel.placement)("4k-random")
    m = c.memfd("scattered", 8 * MIB)
    c.attach(dev[0], ioas)
    c.map_file(fd, ioas, m, 0, 8 * MIB, 0)
    assert len(calls) == 1
    assert len(domain(kernel).table.leaves()) == 2048


def test_user_memory(kernel, c, fd, ioas, m, dev):
    c.attach(dev[0], ioas)
    hva, _, _ = c.mmap(m, MIB, MIB)
    anon, vma, _ = c.mmap(-1, MIB)
    c.map(fd, ioas, hva + 0x4000, 0x8000, 0)
    c.map(fd, ioas, anon, MIB, MIB)
    below = kernel.iommu.devices[0].domain.table.leaves(0, MIB - 1).extents()
    assert same(below, want(c, m, [(0, MIB + 0x4000, 0x8000, 3)]))
    assert translation(kernel).mapped_bytes == MIB + 0x8000
    c.munmap(vma)
    assert kernel.audit().by_kind["anon"] == 256  # pinned still
    c.unmap(fd, ioas, MIB, MIB)
    assert "anon" not in kernel.audit().by_kind


def test_bad_user_memory_is_seen_when_it_is_pinned(kernel, c, fd, ioas, dev):
    c.map(fd, ioas, 0x7000_0000_0000, 4096, 0)
    with refused(errno.EFAULT):
        c.attach(dev[0], ioas)
    assert domain(kernel) is None
    c.unmap(fd, ioas)
    c.attach(dev[0], ioas)
    with refused(errno.EFAULT):
        c.map(fd, ioas, 0x7000_0000_0000, 4096, 0)
    hva, _, _ = c.mmap(-1, 8192)
    with refused(errno.EFAULT):
        c.map(fd, ioas, hva, 12288, 0)
    assert c.unmap(fd, ioas) == 0


def test_dead_process_has_no_user_memory(kernel, c, fd, ioas, dev):
    other = Caller(kernel)
    theirs = other.getfd(c.process.pid, fd)
    hva, _, _ = other.mmap(-1, 4096)
    other.map(theirs, ioas, hva, 4096, 0)
    other.exit()
    with refused(errno.EFAULT):
        c.attach(dev[0], ioas)


def test_read_only_user_memory(kernel, c, fd, ioas, dev):
    m = c.memfd(size=8192)
    c.add_seals(m, 0x10)  # future writes: only read-only mappings
    vma = c.process.add_vma(0x2000_0000_0000, 8192, c.process.file(m), 0, writable=False)
    c.attach(dev[0], ioas)
    with refused(errno.EFAULT):
        c.map(fd, ioas, vma.hva, 8192, 0, RW)
    c.map(fd, ioas, vma.hva, 8192, 0, R)


# ---- lazy pins of files


def test_any_fd_can_be_mapped_until_a_domain_wants_its_pages(kernel, c, fd, dev):
    ioas = c.ioas(fd)
    c.map_file(fd, ioas, fd, 0, 4096, 0)
    with refused(errno.EINVAL):
        c.attach(dev[0], ioas)
    c.unmap(fd, ioas)
    c.attach(dev[0], ioas)
    with refused(errno.EINVAL):
        c.map_file(fd, ioas, fd, 0, 4096, 0)
    # the iommufd held itself while it was mapped
    assert c.process.file(fd).references == 2  # descriptor and bound device


def test_past_the_end_of_the_file(kernel, c, fd, ioas, dev):
    m = c.memfd(size=6000)
    c.map_file(fd, ioas, m, 0, 8192, 0)
    with refused(errno.EINVAL):
        c.attach(dev[0], ioas)
    c.unmap(fd, ioas)
    c.attach(dev[0], ioas)
    with refused(errno.EINVAL):
        c.map_file(fd, ioas, m, 0, 8192, 0)
    c.map_file(fd, ioas, m, 0, 4096, 0)
    assert pins(kernel) == 1


def test_pinned_pages_survive_truncation(kernel, c, fd, ioas, m, dev):
    c.attach(dev[0], ioas)
    c.map_file(fd, ioas, m, 0, MIB, 0)
    before = translation(kernel)
    c.ftruncate(m, 0)
    c.ftruncate(m, MIB)
    c.pwrite(m, b"new", 0)
    assert same(translation(kernel), before)
    assert int(before.pa[0]) != int(c.process.file(m).pfns[0]) * 4096
    c.unmap(fd, ioas)


def test_unaligned_areas_need_4k_once_attached(c, fd, ioas, m, dev):
    assert c.ranges(fd, ioas)[1] == 1
    c.map_file(fd, ioas, m, 0x100, 0x200, 0x80)
    with refused(errno.EADDRINUSE):
        c.attach(dev[0], ioas)
    c.unmap(fd, ioas)
    c.attach(dev[0], ioas)
    assert c.ranges(fd, ioas)[1] == 4096
    for start, length, iova in ((0x100, 4096, 0), (0, 4095, 0), (0, 4096, 0x800)):
        with refused(errno.EINVAL):
            c.map_file(fd, ioas, m, start, length, iova)
    c.detach(dev[0])
    assert c.ranges(fd, ioas)[1] == 1


# ---- refusals of MAP, MAP_FILE


@pytest.mark.parametrize(
    ("changes", "number"),
    [
        ({"flags": FIXED | RW | 8}, errno.EOPNOTSUPP),
        ({"iova": MAX}, errno.EOVERFLOW),
        ({"length": MAX}, errno.EOVERFLOW),
        ({"flags": FIXED}, errno.EINVAL),
        ({"ioas_id": 99}, errno.ENOENT),
        ({"length": 0}, errno.EINVAL),
        ({"start": MAX, "length": 2}, errno.EOVERFLOW),
        ({"fd": 99}, errno.EBADF),
        ({"fd": -1}, errno.EBADF),
        ({"iova": MAX - 8191, "length": 16384}, errno.EOVERFLOW),
        # what wins where several are wrong
        ({"flags": 8, "iova": MAX}, errno.EOPNOTSUPP),
        ({"flags": FIXED, "iova": MAX}, errno.EOVERFLOW),
        ({"flags": FIXED, "ioas_id": 99}, errno.EINVAL),
        ({"ioas_id": 99, "length": 0}, errno.ENOENT),
        ({"length": 0, "fd": 99}, errno.EINVAL),
        ({"size": 39}, errno.EINVAL),
        ({"size": 8}, errno.EINVAL),
    ],
)
def test_map_file_refusals(c, fd, ioas, m, changes, number):
    fields = {"size": 40, "flags": FIXED | RW, "ioas_id": ioas, "fd": m, "length": 4096, "iova": 0, **changes}
    with refused(number):
        c.ioctl(fd, uapi.IOMMU_IOAS_MAP_FILE, uapi.iommu_ioas_map_file(**fields))
    assert c.unmap(fd, ioas) == 0
    assert c.process.file(m).references == 1


@pytest.mark.parametrize(
    ("changes", "number"),
    [
        ({"flags": 8}, errno.EOPNOTSUPP),
        ({"__reserved": 1}, errno.EOPNOTSUPP),
        ({"length": MAX}, errno.EOVERFLOW),
        ({"flags": 0}, errno.EINVAL),
        ({"ioas_id": 99}, errno.ENOENT),
        ({"user_va": MAX - 10, "length": 4096}, errno.EOVERFLOW),
        ({"length": 0}, errno.EINVAL),
    ],
)
def test_map_refusals(c, fd, ioas, changes, number):
    fields = {"size": 40, "flags": FIXED | RW, "ioas_id": ioas, "user_va": 0x1000, "length": 4096, **changes}
    with refused(number):
        c.ioctl(fd, uapi.IOMMU_IOAS_MAP, uapi.iommu_ioas_map(**fields))


def test_overlap_is_eexist(c, fd, ioas, m):
    c.map_file(fd, ioas, m, 0, 8192, 0x10000)
    for iova, length in ((0x10000, 8192), (0xF000, 8192), (0x11000, 4096), (0x0, 0x100000)):
        with refused(errno.EEXIST):
            c.map_file(fd, ioas, m, 0, length, iova)
    c.map_file(fd, ioas, m, 0, 4096, 0xF000)
    c.map_file(fd, ioas, m, 0, 4096, 0x12000)


def test_reserved_and_beyond_the_aperture(kernel, c, fd, ioas, m, dev):
    c.map_file(fd, ioas, m, 0, 4096, 0xFEE00000)
    with refused(errno.EADDRINUSE):
        c.attach(dev[0], ioas)
    c.unmap(fd, ioas)
    c.attach(dev[0], ioas)
    top = 1 << (47 if kernel.iommu.mode == "scalable-fs" else 48)
    for iova in (0xFEE00000, 0xFEEFF000, 0xFEDFF000, top, top - 4096, MAX - 4095 - 4096):
        with refused(errno.EINVAL):
            c.map_file(fd, ioas, m, 0, 8192, iova)
    c.map_file(fd, ioas, m, 0, 8192, top - 8192)
    c.map_file(fd, ioas, m, 0, 4096, 0xFEDFF000)
    assert c.ranges(fd, ioas) == ([(0, 0xFEDFFFFF), (0xFEF00000, top - 1)], 4096)
    c.detach(dev[0])
    assert c.ranges(fd, ioas) == ([(0, MAX)], 1)


def test_area_beyond_the_aperture_refuses_the_domain(c, fd, ioas, m, dev):
    c.map_file(fd, ioas, m, 0, 4096, 1 << 60)
    with refused(errno.EADDRINUSE):
        c.attach(dev[0], ioas)
    assert c.ranges(fd, ioas) == ([(0, MAX)], 1)


def test_iova_ranges_too_small_an_array(c, fd, ioas, dev):
    c.attach(dev[0], ioas)
    hva = c.user.put(16)
    cmd = uapi.iommu_ioas_iova_ranges(size=32, ioas_id=ioas, num_iovas=1, allowed_iovas=hva)
    with refused(errno.EMSGSIZE):
        c.ioctl(fd, uapi.IOMMU_IOAS_IOVA_RANGES, cmd)
    assert cmd.num_iovas == 2
    assert cmd.out_iova_alignment == 4096
    assert struct.unpack("<QQ", bytes(c.user.buffers[hva])) == (0, 0xFEDFFFFF)
    cmd = uapi.iommu_ioas_iova_ranges(size=32, ioas_id=ioas, num_iovas=4, allowed_iovas=0xDEAD000)
    with refused(errno.EFAULT):
        c.ioctl(fd, uapi.IOMMU_IOAS_IOVA_RANGES, cmd)
    cmd = uapi.iommu_ioas_iova_ranges(size=32, ioas_id=ioas, __reserved=1)
    with refused(errno.EOPNOTSUPP):
        c.ioctl(fd, uapi.IOMMU_IOAS_IOVA_RANGES, cmd)


# ---- automatic IOVA, allowed ranges


def test_automatic_iova(c, fd, ioas, m):
    assert c.map_file(fd, ioas, m, 0, 4096) == 4096  # never 0
    assert c.map_file(fd, ioas, m, 0, 4 * MIB) % HPAGE_BYTES == 0
    assert c.map_file(fd, ioas, m, 0x3000, 0x1000) == 0x2000
    assert c.map_file(fd, ioas, m, 0x2000, 0x2000) == 0x4000


def test_automatic_iova_fills_holes(c, fd, ioas, m):
    c.map_file(fd, ioas, m, 0, 4096, 0x2000)
    assert c.map_file(fd, ioas, m, 0, 4096) == 0x1000
    assert c.map_file(fd, ioas, m, 0, 4096) == 0x3000
    assert c.map_file(fd, ioas, m, 0x1000, 8192) == 0x4000


def test_allowed_ranges(c, fd, ioas, m, dev):
    c.allow(fd, ioas, [(0x100000, 0x101FFF), (0x200000, 0x2FFFFF)])
    assert c.map_file(fd, ioas, m, 0, 0x2000) == 0x100000
    assert c.map_file(fd, ioas, m, 0, 0x2000) == 0x200000
    with refused(errno.ENOSPC):
        c.map_file(fd, ioas, m, 0, 0x100000)
    c.map_file(fd, ioas, m, 0, 0x1000, 0x900000)  # a fixed IOVA need not be allowed
    c.allow(fd, ioas, [])
    assert c.map_file(fd, ioas, m, 0, 0x1000) == 0x1000
    for bad in ([(5, 5)], [(9, 3)], [(0, 10), (10, 20)]):
        with refused(errno.EINVAL):
            c.allow(fd, ioas, bad)
    c.allow(fd, ioas, [(0xFEE00000, 0xFEEFFFFF)])
    with refused(errno.EADDRINUSE):
        c.attach(dev[0], ioas)
    c.allow(fd, ioas, [])
    c.attach(dev[0], ioas)
    with refused(errno.EADDRINUSE):
        c.allow(fd, ioas, [(0xFEE00000, 0xFEEFFFFF)])
    cmd = uapi.iommu_ioas_allow_iovas(size=24, ioas_id=ioas, num_iovas=1, allowed_iovas=0xBAD000)
    with refused(errno.EFAULT):
        c.ioctl(fd, uapi.IOMMU_IOAS_ALLOW_IOVAS, cmd)


# ---- unmap


def test_unmap_rules(c, fd, ioas, m):
    assert c.unmap(fd, ioas) == 0
    with refused(errno.ENOENT):
        c.unmap(fd, ioas, 0, 4096)
    c.map_file(fd, ioas, m, 0, 8192, 0x10000)
    c.map_file(fd, ioas, m, 0, 8192, 0x20000)
    for iova, length, number in (
        (0x10000, 4096, errno.ENOENT),
        (0x11000, 4096, errno.ENOENT),
        (0x10000, 0, errno.EINVAL),
        (MAX, 4096, errno.EOVERFLOW),
        (0x10000, MAX, errno.EOVERFLOW),
        (MAX - 10, 4096, errno.EOVERFLOW),
        (0x30000, 4096, errno.ENOENT),
    ):
        with refused(number):
            c.unmap(fd, ioas, iova, length)
    assert c.unmap(fd, ioas, 0xF000, 0x10000) == 8192  # a superset
    assert c.unmap(fd, ioas) == 8192
    with refused(errno.ENOENT):
        c.unmap(fd, 99)


def test_unmap_is_not_atomic(kernel, c, fd, ioas, m, dev):
    c.attach(dev[0], ioas)
    for i in range(3):
        c.map_file(fd, ioas, m, i * 8192, 8192, i * 0x10000)
    with refused(errno.ENOENT):
        c.unmap(fd, ioas, 0, 0x21000)
    assert [a.iova for a in c.process.file(fd).ioas(ioas).areas] == [0x20000]
    assert pins(kernel) == 2


# ---- copy


def test_copies_share_pins(kernel, c, fd, ioas, m, dev):
    other = c.ioas(fd)
    c.attach(dev[0], ioas)
    c.map_file(fd, ioas, m, 0, MIB, 0)
    c.copy(fd, ioas, ioas, 0x10000, 0x20000, 0x1000000)
    assert pins(kernel) == 256
    v = c.vfio(1)
    c.bind(v, fd)
    c.attach(v, other)
    c.copy(fd, other, ioas, 0, MIB, 0x5000000, R)
    assert pins(kernel) == 256
    assert same(translation(kernel, 1), want(c, m, [(0x5000000, 0, MIB, 1)]))
    assert same(translation(kernel), want(c, m, [(0, 0, MIB, 3), (0x1000000, 0x10000, 0x20000, 3)]))
    c.unmap(fd, ioas, 0, MIB)
    assert pins(kernel) == 256  # the copy in the other IOAS has them all
    c.unmap(fd, other)
    assert pins(kernel) == 32  # and what is left is the part of the first copy
    c.unmap(fd, ioas)
    assert pins(kernel) == 0


def test_copy_of_neighbours_and_parts(kernel, c, fd, ioas, m, dev):
    c.map_file(fd, ioas, m, 0, 8192, 0)
    c.map_file(fd, ioas, m, MIB, 8192, 8192)
    dst = c.ioas(fd)
    c.attach(dev[0], dst)
    assert c.copy(fd, dst, ioas, 4096, 8192, 0x100000) == 0x100000
    assert same(translation(kernel), want(c, m, [(0x100000, 4096, 4096, 3), (0x101000, MIB, 4096, 3)]))
    c.unmap(fd, ioas)
    c.unmap(fd, dst)


@pytest.mark.parametrize(
    ("changes", "number"),
    [
        ({"flags": 8}, errno.EOPNOTSUPP),
        ({"flags": 0}, errno.EINVAL),
        ({"length": 0}, errno.EINVAL),
        ({"length": MAX}, errno.EOVERFLOW),
        ({"src_iova": MAX}, errno.EOVERFLOW),
        ({"dst_iova": MAX}, errno.EOVERFLOW),
        ({"src_ioas_id": 99}, errno.ENOENT),
        ({"dst_ioas_id": 99}, errno.ENOENT),
        ({"length": 16384}, errno.ENOENT),
        ({"src_iova": 0x50000}, errno.ENOENT),
        ({"dst_iova": 0}, errno.EEXIST),
        ({"src_iova": MAX - 10, "length": 4096}, errno.EOVERFLOW),
    ],
)
def test_copy_refusals(c, fd, ioas, m, changes, number):
    c.map_file(fd, ioas, m, 0, 8192, 0)
    fields = {
        "size": 40, "flags": FIXED | RW, "dst_ioas_id": ioas, "src_ioas_id": ioas, "length": 4096,
        "dst_iova": 0x100000, "src_iova": 0, **changes,
    }  # fmt: skip
    with refused(number):
        c.ioctl(fd, uapi.IOMMU_IOAS_COPY, uapi.iommu_ioas_copy(**fields))
    assert c.process.file(m).references == 2


def test_writable_copy_of_read_only_pages(c, fd, ioas, m):
    c.map_file(fd, ioas, m, 0, 8192, 0, R)
    with refused(errno.EPERM):
        c.copy(fd, ioas, ioas, 0, 8192, 0x10000, RW)
    c.copy(fd, ioas, ioas, 0, 8192, 0x10000, R)


# ---- objects


def test_destroy(c, fd, ioas, m, dev):
    with refused(errno.ENOENT):
        c.destroy(fd, 99)
    with refused(errno.EBUSY):
        c.destroy(fd, dev[1])
    auto = c.attach(dev[0], ioas)
    for number in (ioas, auto):
        with refused(errno.EBUSY):
            c.destroy(fd, number)
    c.detach(dev[0])
    with refused(errno.ENOENT):
        c.destroy(fd, auto)
    hwpt = c.hwpt(fd, dev[1], ioas)
    with refused(errno.EBUSY):
        c.destroy(fd, ioas)
    c.destroy(fd, hwpt)
    c.destroy(fd, ioas)
    with refused(errno.ENOENT):
        c.unmap(fd, ioas)


def test_ids_are_the_lowest_free(c, fd):
    assert [c.ioas(fd) for _ in range(3)] == [1, 2, 3]
    c.destroy(fd, 2)
    assert c.ioas(fd) == 2
    assert c.ioas(fd) == 4


def test_hwpt_without_a_device_holds_the_pins(kernel, c, fd, ioas, m, dev):
    c.map_file(fd, ioas, m, 0, MIB, 0)
    a = c.hwpt(fd, dev[1], ioas)
    assert pins(kernel) == 256
    b = c.hwpt(fd, dev[1], ioas)
    assert pins(kernel) == 256
    c.destroy(fd, a)
    assert pins(kernel) == 256
    c.map_file(fd, ioas, m, MIB, MIB, MIB)
    assert pins(kernel) == 512
    c.destroy(fd, b)
    assert pins(kernel) == 0


def test_hwpt_alloc_refusals(c, fd, ioas, dev):
    for changes, number in (
        ({"flags": uapi.IOMMU_HWPT_ALLOC_DIRTY_TRACKING}, errno.EOPNOTSUPP),
        ({"flags": uapi.IOMMU_HWPT_ALLOC_NEST_PARENT}, errno.EOPNOTSUPP),
        ({"flags": 1 << 20}, errno.EOPNOTSUPP),
        ({"__reserved": 1}, errno.EOPNOTSUPP),
        ({"data_len": 8}, errno.EINVAL),
        ({"data_type": 1}, errno.EINVAL),
        ({"data_type": 1, "data_len": 8}, errno.EOPNOTSUPP),
        ({"dev_id": 99}, errno.ENOENT),
        ({"dev_id": ioas}, errno.ENOENT),
        ({"pt_id": 99}, errno.EINVAL),
        ({"pt_id": dev[1]}, errno.EINVAL),
        ({"flags": uapi.IOMMU_HWPT_FAULT_ID_VALID, "fault_id": 99}, errno.ENOENT),
    ):
        fields = {"size": 48, "dev_id": dev[1], "pt_id": ioas, **changes}
        with refused(number):
            c.ioctl(fd, uapi.IOMMU_HWPT_ALLOC, uapi.iommu_hwpt_alloc(**fields))
    hwpt = c.hwpt(fd, dev[1], ioas, uapi.IOMMU_HWPT_ALLOC_PASID)
    with refused(errno.EOPNOTSUPP):
        c.hwpt(fd, dev[1], hwpt)
    short = uapi.iommu_hwpt_alloc(size=24, dev_id=dev[1], pt_id=ioas)
    c.ioctl(fd, uapi.IOMMU_HWPT_ALLOC, short)
    assert short.out_hwpt_id == hwpt + 1


def test_options(c, fd):
    option, get, put = uapi.IOMMU_OPTION_RLIMIT_MODE, uapi.IOMMU_OPTION_OP_GET, uapi.IOMMU_OPTION_OP_SET
    c.option(fd, option, put, value=1)
    assert c.option(fd, option, get) == 1
    with refused(errno.EINVAL):
        c.option(fd, option, put, value=2)
    with refused(errno.EOPNOTSUPP):
        c.option(fd, option, get, number=1)
    with refused(errno.EOPNOTSUPP):
        c.option(fd, option, 7)
    with refused(errno.EOPNOTSUPP):
        c.option(fd, 9, get)
    ioas = c.ioas(fd)
    with refused(errno.EBUSY):
        c.option(fd, option, put, value=0)
    poor = Caller(c.kernel, privileged=False)
    with refused(errno.EPERM):
        poor.option(poor.iommu(), option, put, value=1)
    with refused(errno.EINVAL):
        c.option(fd, uapi.IOMMU_OPTION_HUGE_PAGES, put, ioas, 2)
    with refused(errno.ENOENT):
        c.option(fd, uapi.IOMMU_OPTION_HUGE_PAGES, put, 99, 1)


def test_huge_pages_cannot_be_turned_off_under_mappings(c, fd, ioas, m, dev):
    c.attach(dev[0], ioas)
    c.map_file(fd, ioas, m, 0, 4096, 0)
    with refused(errno.EINVAL):
        c.option(fd, uapi.IOMMU_OPTION_HUGE_PAGES, uapi.IOMMU_OPTION_OP_SET, ioas, 0)
    c.unmap(fd, ioas)
    c.option(fd, uapi.IOMMU_OPTION_HUGE_PAGES, uapi.IOMMU_OPTION_OP_SET, ioas, 0)
    c.option(fd, uapi.IOMMU_OPTION_HUGE_PAGES, uapi.IOMMU_OPTION_OP_SET, ioas, 1)


def test_change_process(c, fd, ioas, m):
    cmd = uapi.iommu_ioas_change_process(size=8)
    c.map_file(fd, ioas, m, 0, 4096, 0)
    c.ioctl(fd, uapi.IOMMU_IOAS_CHANGE_PROCESS, cmd)
    hva, _, _ = c.mmap(-1, 4096)
    c.map(fd, ioas, hva, 4096, 4096)
    with refused(errno.EINVAL):
        c.ioctl(fd, uapi.IOMMU_IOAS_CHANGE_PROCESS, cmd)
    with refused(errno.EOPNOTSUPP):
        c.ioctl(fd, uapi.IOMMU_IOAS_CHANGE_PROCESS, uapi.iommu_ioas_change_process(size=8, __reserved=1))


def test_preserved_iommufd_is_immutable(kernel, c, fd, ioas, m, dev):
    c.attach(dev[0], ioas)
    c.map_file(fd, ioas, m, 0, 8192, 0)
    ictx = c.process.file(fd)
    ictx.preserved = True
    for call in (
        lambda: c.map_file(fd, ioas, m, 0, 4096, 0x10000),
        lambda: c.unmap(fd, ioas, 0, 8192),
        lambda: c.unmap(fd, ioas),
        lambda: c.copy(fd, ioas, ioas, 0, 4096, 0x10000),
        lambda: ictx.ioas(ioas).cut(4095),
    ):
        with refused(errno.EBUSY):
            call()
    ictx.preserved = False
    c.unmap(fd, ioas)


def test_cut(kernel, c, fd, ioas, m, dev):
    c.option(fd, uapi.IOMMU_OPTION_HUGE_PAGES, uapi.IOMMU_OPTION_OP_SET, ioas, 0)
    c.attach(dev[0], ioas)
    c.map_file(fd, ioas, m, 0, 16384, 0)
    table = c.process.file(fd).ioas(ioas)
    with refused(errno.EINVAL):
        table.cut(100)
    table.cut(8191)
    assert [(a.iova, a.last) for a in table.areas] == [(0, 8191), (8192, 16383)]
    assert c.unmap(fd, ioas, 0, 8192) == 8192
    assert pins(kernel) == 2
    big = c.ioas(fd)
    c.attach(dev[0], big)
    c.map_file(fd, big, m, 0, 16384, 0)
    with refused(errno.EINVAL):
        c.process.file(fd).ioas(big).cut(8191)


# ---- what this IOMMU does not have


def test_unknown_and_wrong_requests(c, fd):
    buffer = ctypes.create_string_buffer(64)
    struct.pack_into("<I", buffer, 0, 64)
    for request in (0x3B9B, 0x3BFF, 0x3B80 | 1 << 30, 0x3B67, 0x1281):
        with refused(errno.ENOTTY):
            c.ioctl(fd, request, buffer)


def test_sizes(c, fd):
    with refused(errno.EINVAL):
        c.ioctl(fd, uapi.IOMMU_IOAS_ALLOC, uapi.iommu_ioas_alloc(size=11))
    long = ctypes.create_string_buffer(20)
    struct.pack_into("<I", long, 0, 20)
    c.ioctl(fd, uapi.IOMMU_IOAS_ALLOC, long)
    assert struct.unpack_from("<I", long, 8) == (1,)
    long[19] = 1
    with refused(errno.E2BIG):
        c.ioctl(fd, uapi.IOMMU_IOAS_ALLOC, long)
    with refused(errno.EOPNOTSUPP):
        c.ioctl(fd, uapi.IOMMU_IOAS_ALLOC, uapi.iommu_ioas_alloc(size=12, flags=1))


def test_hw_info(kernel, c, fd, dev):
    hva = c.user.put(b"\xff" * 40)
    cmd = uapi.iommu_hw_info(size=40, dev_id=dev[1], data_len=40, data_uptr=hva)
    c.ioctl(fd, uapi.IOMMU_GET_HW_INFO, cmd)
    assert cmd.out_data_type == uapi.IOMMU_HW_INFO_TYPE_INTEL_VTD
    assert cmd.data_len == 24
    _, _, cap, ecap = struct.unpack("<IIQQ", bytes(c.user.buffers[hva])[:24])
    assert (cap, ecap) == (kernel.iommu.cap, kernel.iommu.ecap)
    assert bytes(c.user.buffers[hva])[24:] == bytes(16)
    c.ioctl(fd, uapi.IOMMU_GET_HW_INFO, uapi.iommu_hw_info(size=32, dev_id=dev[1]))
    for changes, number in (
        ({"flags": 8}, errno.EOPNOTSUPP),
        ({"dev_id": 99}, errno.ENOENT),
        ({"data_uptr": 0xBAD000}, errno.EFAULT),
        ({"data_uptr": 0}, errno.EFAULT),
        ({"flags": uapi.IOMMU_HW_INFO_FLAG_INPUT_TYPE, "in_data_type": 4}, errno.EOPNOTSUPP),
    ):
        fields = {"size": 40, "dev_id": dev[1], "data_len": 40, "data_uptr": hva, **changes}
        with refused(number):
            c.ioctl(fd, uapi.IOMMU_GET_HW_INFO, uapi.iommu_hw_info(**fields))


def test_what_this_iommu_does_not_offer(c, fd, ioas, dev):
    hwpt = c.hwpt(fd, dev[1], ioas)
    cases = [
        (uapi.IOMMU_HWPT_SET_DIRTY_TRACKING, uapi.iommu_hwpt_set_dirty_tracking(size=16, hwpt_id=hwpt), 95),
        (uapi.IOMMU_HWPT_SET_DIRTY_TRACKING, uapi.iommu_hwpt_set_dirty_tracking(size=16, hwpt_id=99), 2),
        (
            uapi.IOMMU_HWPT_GET_DIRTY_BITMAP,
            uapi.iommu_hwpt_get_dirty_bitmap(size=48, hwpt_id=hwpt, length=4096, page_size=4096),
            95,
        ),
        (
            uapi.IOMMU_HWPT_GET_DIRTY_BITMAP,
            uapi.iommu_hwpt_get_dirty_bitmap(size=48, hwpt_id=hwpt, length=100, page_size=4096),
            22,
        ),
        (uapi.IOMMU_HWPT_INVALIDATE, uapi.iommu_hwpt_invalidate(size=32, hwpt_id=hwpt), 22),
        (uapi.IOMMU_VIOMMU_ALLOC, uapi.iommu_viommu_alloc(size=40, type=1, dev_id=dev[1], hwpt_id=hwpt), 95),
        (uapi.IOMMU_VIOMMU_ALLOC, uapi.iommu_viommu_alloc(size=40, type=1, dev_id=99), 2),
        (uapi.IOMMU_VDEVICE_ALLOC, uapi.iommu_vdevice_alloc(size=24, viommu_id=5), 2),
        (uapi.IOMMU_VDEVICE_ALLOC, uapi.iommu_vdevice_alloc(size=24, virt_id=2**32), 2),
        (uapi.IOMMU_VEVENTQ_ALLOC, uapi.iommu_veventq_alloc(size=32, type=1, veventq_depth=1), 2),
        (uapi.IOMMU_VEVENTQ_ALLOC, uapi.iommu_veventq_alloc(size=32, type=1), 22),
        (uapi.IOMMU_HW_QUEUE_ALLOC, uapi.iommu_hw_queue_alloc(size=40, type=1, length=1), 2),
        (uapi.IOMMU_HW_QUEUE_ALLOC, uapi.iommu_hw_queue_alloc(size=40, length=1), 95),
        (uapi.IOMMU_IOAS_NOIOMMU_GET_PA, uapi.iommu_ioas_noiommu_get_pa(size=40, ioas_id=ioas), 22),
        (uapi.IOMMU_IOAS_NOIOMMU_GET_PA, uapi.iommu_ioas_noiommu_get_pa(size=40, ioas_id=ioas, length=1), 2),
        (uapi.IOMMU_VFIO_IOAS, uapi.iommu_vfio_ioas(size=12, op=uapi.IOMMU_VFIO_IOAS_GET), errno.ENODEV),
        (uapi.IOMMU_VFIO_IOAS, uapi.iommu_vfio_ioas(size=12, op=9), 95),
        (uapi.IOMMU_VFIO_IOAS, uapi.iommu_vfio_ioas(size=12, op=uapi.IOMMU_VFIO_IOAS_SET, ioas_id=99), 2),
    ]
    for request, cmd, number in cases:
        with refused(number):
            c.ioctl(fd, request, cmd)
    c.ioctl(
        fd, uapi.IOMMU_VFIO_IOAS, uapi.iommu_vfio_ioas(size=12, op=uapi.IOMMU_VFIO_IOAS_SET, ioas_id=ioas)
    )
    got = uapi.iommu_vfio_ioas(size=12, op=uapi.IOMMU_VFIO_IOAS_GET)
    c.ioctl(fd, uapi.IOMMU_VFIO_IOAS, got)
    assert got.ioas_id == ioas


def test_fault_queue(c, fd, ioas, dev):
    cmd = uapi.iommu_fault_alloc(size=16)
    c.ioctl(fd, uapi.IOMMU_FAULT_QUEUE_ALLOC, cmd)
    with refused(errno.EBUSY):
        c.destroy(fd, cmd.out_fault_id)  # its descriptor is open
    hwpt = uapi.iommu_hwpt_alloc(
        size=48, flags=uapi.IOMMU_HWPT_FAULT_ID_VALID, dev_id=dev[1], pt_id=ioas, fault_id=cmd.out_fault_id
    )
    c.ioctl(fd, uapi.IOMMU_HWPT_ALLOC, hwpt)
    with refused(errno.ENODEV):
        c.attach(dev[0], hwpt.out_hwpt_id)  # the device has no PRI
    c.close(cmd.out_fault_fd)
    with refused(errno.EBUSY):
        c.destroy(fd, cmd.out_fault_id)
    c.destroy(fd, hwpt.out_hwpt_id)
    c.destroy(fd, cmd.out_fault_id)


# ---- damage is real


def test_a_wrong_table_makes_wrong_unpins():
    kernel = boot(placement="contiguous")
    c = Caller(kernel)
    fd = c.iommu()
    ioas, m, victim = c.ioas(fd), c.memfd("a", 16384), c.memfd("b", 4096)
    c.option(fd, uapi.IOMMU_OPTION_HUGE_PAGES, uapi.IOMMU_OPTION_OP_SET, ioas, 0)
    c.fallocate(victim, 0, 0, 4096)
    v = c.vfio()
    c.bind(v, fd)
    c.attach(v, ioas)
    c.map_file(fd, ioas, m, 0, 16384, 0)
    leaves = kernel.iommu.devices[0].domain.table.leaves()
    ram = kernel.platform.ram
    root = kernel.iommu.devices[0].domain.root_pa
    table = root
    for _ in range(3):
        table = ram.load64(table) & 0xFFFFFFFFF000
    stolen = int(c.process.file(victim).pfns[0])
    assert ram.load64(table) & 0xFFFFFFFFF000 == int(leaves.pa[0])
    ram.store64(table, stolen << 12 | 3)  # page 0 shows somebody else's frame
    ram.store64(table + 8, 0)  # page 1 shows nothing
    c.unmap(fd, ioas)
    audit = kernel.audit()
    assert audit.bad_unpins == 2  # the victim's frame, and PFN 0
    assert audit.leaked == 2  # two pages of the mapping stay pinned for ever
    assert kernel.frames.kind[stolen] == 0
    assert stolen in audit.wrongly_freed_pfns
    assert audit.wrongly_freed == 2
