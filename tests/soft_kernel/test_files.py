# SPDX-License-Identifier: Apache-2.0
"""memfds and mappings: sizes, seals, holes, and what happens to the frames."""

import errno
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from soft_machine import MIB, RW, Caller, boot, refused, settled

from iokeep.soft.kernel.files import (
    F_SEAL_GROW,
    F_SEAL_SEAL,
    F_SEAL_SHRINK,
    F_SEAL_WRITE,
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
)

PUNCH = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE


@pytest.fixture
def kernel():
    kernel = boot(placement="4k-random")
    yield kernel
    settled(kernel)


def allocated(kernel):
    return kernel.audit().by_kind.get("memfd", 0)


def test_content_sparse_and_size(kernel, c):
    m = c.memfd(size=10 * 4096 + 100)
    assert c.fstat(m)[1] == 10 * 4096 + 100
    assert allocated(kernel) == 0
    assert c.pread(m, 50, 4090) == bytes(50)
    assert allocated(kernel) == 0
    data = os.urandom(3 * 4096)
    assert c.pwrite(m, data, 1000) == len(data)
    assert allocated(kernel) == 4
    assert c.pread(m, len(data), 1000) == data
    assert c.pread(m, 8192, 10 * 4096) == bytes(100)
    assert c.pread(m, 10, 2**40) == b""


def test_write_past_the_end_grows(c):
    m = c.memfd()
    assert c.pwrite(m, b"abc", 5000) == 3
    assert c.fstat(m)[1] == 5003
    assert c.pread(m, 10, 4998) == b"\0\0abc"


def test_truncate_frees_and_zeroes_the_tail(kernel, c):
    m = c.memfd(size=8 * 4096)
    c.pwrite(m, b"\xff" * 8 * 4096)
    c.ftruncate(m, 4096 + 10)
    assert allocated(kernel) == 2
    c.ftruncate(m, 8 * 4096)
    assert c.pread(m, 8 * 4096) == b"\xff" * 4106 + bytes(8 * 4096 - 4106)


def test_punch(kernel, c):
    m = c.memfd(size=8 * 4096)
    c.pwrite(m, b"\xff" * 8 * 4096)
    c.fallocate(m, PUNCH, 4096 + 10, 2 * 4096)
    assert allocated(kernel) == 7
    want = bytearray(b"\xff" * 8 * 4096)
    want[4096 + 10 : 3 * 4096 + 10] = bytes(2 * 4096)
    assert c.pread(m, 8 * 4096) == bytes(want)
    c.fallocate(m, PUNCH, 0, 2**40)
    assert allocated(kernel) == 0
    assert c.fstat(m)[1] == 8 * 4096


def test_punch_inside_one_page(c):
    m = c.memfd(size=4096)
    c.pwrite(m, b"x" * 4096)
    c.fallocate(m, PUNCH, 10, 20)
    assert c.pread(m, 40) == b"x" * 10 + bytes(20) + b"x" * 10


def test_fallocate_fills_and_grows(kernel, c):
    m = c.memfd()
    c.fallocate(m, 0, 0, 5 * 4096)
    assert allocated(kernel) == 5
    assert c.fstat(m)[1] == 5 * 4096
    c.fallocate(m, FALLOC_FL_KEEP_SIZE, 0, 50 * 4096)
    assert c.fstat(m)[1] == 5 * 4096


@pytest.mark.parametrize(
    ("mode", "offset", "length", "number"),
    [
        (0, -1, 10, errno.EINVAL),
        (0, 0, 0, errno.EINVAL),
        (4, 0, 10, errno.EOPNOTSUPP),
        (FALLOC_FL_PUNCH_HOLE, 0, 10, errno.EOPNOTSUPP),
        (0, 0, 2**63 - 1, errno.EFBIG),
    ],
)
def test_fallocate_refusals(c, mode, offset, length, number):
    m = c.memfd(size=4096)
    with refused(number):
        c.fallocate(m, mode, offset, length)


def test_seals(c):
    m = c.memfd(size=8192)
    c.add_seals(m, F_SEAL_GROW | F_SEAL_SHRINK)
    assert c.get_seals(m) == F_SEAL_GROW | F_SEAL_SHRINK
    for length in (4096, 12288):
        with refused(errno.EPERM):
            c.ftruncate(m, length)
    c.ftruncate(m, 8192)
    with refused(errno.EPERM):
        c.pwrite(m, b"x", 8192)
    with refused(errno.EPERM):
        c.fallocate(m, 0, 0, 12288)
    c.pwrite(m, b"x", 8191)
    c.add_seals(m, F_SEAL_WRITE)
    with refused(errno.EPERM):
        c.pwrite(m, b"x", 0)
    with refused(errno.EPERM):
        c.fallocate(m, PUNCH, 0, 4096)
    with refused(errno.EPERM):
        c.mmap(m, 4096)
    c.add_seals(m, F_SEAL_SEAL)
    with refused(errno.EPERM):
        c.add_seals(m, F_SEAL_GROW)


def test_memfd_without_sealing_is_sealed(c):
    m = c.memfd(flags=0)
    assert c.get_seals(m) == F_SEAL_SEAL
    with refused(errno.EPERM):
        c.add_seals(m, F_SEAL_GROW)


def test_write_seal_waits_for_mappings_and_pins(c):
    m = c.memfd(size=8192)
    _, vma, _ = c.mmap(m, 4096)
    with refused(errno.EBUSY):
        c.add_seals(m, F_SEAL_WRITE)
    c.munmap(vma)
    fd = c.iommu()
    ioas = c.ioas(fd)
    v = c.vfio()
    c.bind(v, fd)
    c.attach(v, ioas)
    c.map_file(fd, ioas, m, 0, 4096, 0)
    with refused(errno.EBUSY):
        c.add_seals(m, F_SEAL_WRITE)
    c.unmap(fd, ioas)
    c.add_seals(m, F_SEAL_WRITE)
    c.map_file(fd, ioas, m, 0, 4096, 0, RW)  # a write-sealed file can be mapped for DMA writes


def test_preserved_file_is_frozen(kernel, c):
    m = c.memfd(size=8192)
    file = c.process.file(m)
    file.preserved = True
    for call in (
        lambda: c.ftruncate(m, 4096),
        lambda: c.fallocate(m, PUNCH, 0, 4096),
        lambda: c.pwrite(m, b"x", 8192),
        lambda: c.fallocate(m, 0, 0, 12288),
    ):
        with refused(errno.EPERM):
            call()
    c.pwrite(m, b"x", 0)
    c.ftruncate(m, 8192)
    file.preserved = False


def test_memfd_create_refusals(c):
    with refused(errno.EINVAL):
        c.memfd(flags=0x4)  # hugetlb is not what this kernel offers
    with refused(errno.EINVAL):
        c.memfd("n" * 250)


def test_sizes_beyond_the_machine(c):
    m = c.memfd()
    with refused(errno.EFBIG):
        c.ftruncate(m, 2**50)
    with refused(errno.EINVAL):
        c.ftruncate(m, -1)
    with refused(errno.ENOMEM):
        c.ftruncate(m, 33 * MIB)


def test_lseek(c):
    m = c.memfd(size=1000)
    assert c.lseek(m, 10) == 10
    assert c.lseek(m, 5, os.SEEK_CUR) == 15
    assert c.lseek(m, -1, os.SEEK_END) == 999
    with refused(errno.EINVAL):
        c.lseek(m, -1)
    with refused(errno.ESPIPE):
        c.lseek(c.iommu(), 0)


def test_mapping_shows_the_frames(kernel, c):
    m = c.memfd(size=4 * 4096)
    _, vma, extents = c.mmap(m, 3 * 4096, 4096)
    assert sum(n for _, _, n in extents) == 3 * 4096
    target, start, _ = extents[0]
    assert target == 0
    kernel.platform.ram.write(start, b"hello")
    assert c.pread(m, 5, 4096) == b"hello"
    c.close(m)
    assert allocated(kernel) == 3
    c.munmap(vma)
    assert allocated(kernel) == 0


def test_anonymous_memory_goes_with_its_mapping(kernel, c):
    _, vma, extents = c.mmap(-1, 10000)
    assert sum(n for _, _, n in extents) == 12288
    assert kernel.audit().by_kind["anon"] == 3
    c.munmap(vma)
    assert "anon" not in kernel.audit().by_kind
    with refused(errno.EINVAL):
        c.munmap(vma)


def test_truncated_pages_of_a_mapping_stay_until_munmap(kernel, c):
    m = c.memfd(size=4 * 4096)
    _, vma, _ = c.mmap(m, 4 * 4096)
    c.ftruncate(m, 0)
    assert allocated(kernel) == 4
    c.munmap(vma)
    assert allocated(kernel) == 0


def test_descriptors(kernel, c):
    a, b = c.memfd(), c.memfd()
    assert b == a + 1
    c.close(a)
    assert c.memfd() == a
    with refused(errno.EBADF):
        c.close(99)
    with refused(errno.ENOENT):
        c.open("/dev/null")
    with refused(errno.ENOTTY):
        c.ioctl(b, 0x1234, __import__("ctypes").create_string_buffer(8))


def test_getfd_shares_the_file(kernel, c):
    other = Caller(kernel)
    m = other.memfd(size=4096)
    mine = c.getfd(other.process.pid, m)
    other.pwrite(m, b"shared")
    other.exit()
    assert c.pread(mine, 6) == b"shared"
    with refused(errno.ESRCH):
        c.getfd(other.process.pid, m)
    with refused(errno.EBADF):
        c.getfd(c.process.pid, 77)
    with refused(errno.EPERM):
        Caller(kernel, privileged=False).getfd(c.process.pid, mine)


def test_exit_closes_everything(kernel, c):
    m = c.memfd(size=MIB)
    c.fallocate(m, 0, 0, MIB)
    c.mmap(m, MIB)
    c.mmap(-1, MIB)
    c.exit()
    assert kernel.files == {}
    assert allocated(kernel) == 0


def test_debug_files(kernel, c):
    audit = c.open("/sys/kernel/debug/iokeep/audit")
    found = json.loads(c.pread(audit, 1 << 20))
    assert found["schema"] == "iokeep.audit-v1"
    assert found["leaked"] == 0
    kernel.log("a line for the test")
    assert b"a line for the test\n" in c.pread(c.open("/dev/kmsg"), 1 << 20)
    with refused(errno.EINVAL):
        c.pwrite(audit, b"x")


def test_listed_placement_of_a_memfd(tmp_path):
    path = tmp_path / "ram.npy"
    wanted = np.array([4000, 3000, 3001, 5000])
    np.save(path, wanted)
    kernel = boot(placement__ram=str(path))
    c = Caller(kernel)
    m = c.memfd("ram", 4 * 4096)
    c.fallocate(m, 0, 0, 4 * 4096)
    assert c.process.file(m).pfns.tolist() == wanted.tolist()
    assert (kernel.platform.tags[wanted] == c.fstat(m)[0]).all()
    with refused(errno.ENOMEM):
        c.memfd("ram", 4096)
    c.fallocate(m, PUNCH, 0, 8192)
    c.fallocate(m, 0, 0, 8192)
    assert c.process.file(m).pfns.tolist() == wanted.tolist()
    settled(kernel)


@settings(max_examples=40)
@given(
    placement=st.sampled_from(["contiguous", "2m-scattered", "4k-random"]),
    steps=st.lists(
        st.tuples(
            st.sampled_from(["look", "write", "punch", "resize"]), st.integers(0, 700), st.integers(1, 700)
        ),
        max_size=12,
    ),
)
def test_runs_are_what_the_pages_are(placement, steps):
    """Whatever comes and goes: the runs of frames are those of the pages, holes filled."""
    kernel = boot(placement=placement)
    c = Caller(kernel)
    m = c.memfd(size=700 * 4096)
    file = c.process.file(m)
    for what, first, n in [*steps, ("look", 0, 700)]:
        last = min(first + n, file.n_pages) - 1
        if what == "look" and first <= last:
            runs = file.runs(first, last)
            assert runs.pfns().tolist() == file.pfns[first : last + 1].tolist()
            assert (file.pfns[first : last + 1] >= 0).all()
            joins = runs.first[1:] == (runs.first + runs.count)[:-1]
            assert not joins.any()
        elif what == "write" and first <= last:
            c.pwrite(m, b"x", first * 4096)
        elif what == "punch" and first <= last:
            c.fallocate(m, PUNCH, first * 4096, n * 4096)
        elif what == "resize":
            c.ftruncate(m, first * 4096)
    with refused(errno.EFAULT):
        file.runs(0, file.n_pages)
    settled(kernel)


def test_huge_pages_come_whole():
    kernel = boot(placement="2m-scattered")
    c = Caller(kernel)
    m = c.memfd(size=5 * MIB)
    c.pwrite(m, b"x", 3 * MIB)
    pfns = c.process.file(m).pfns
    assert (pfns[:512] < 0).all()
    assert (pfns[512:1024] >= 0).all()
    assert pfns[512] % 512 == 0
    assert (np.diff(pfns[512:1024]) == 1).all()
    settled(kernel)
