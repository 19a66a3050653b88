# SPDX-License-Identifier: Apache-2.0
"""KernelTransport on the kernel that runs the tests."""

import ctypes
import errno
import os
import select
from pathlib import Path

import numpy as np
import pytest

from iokeep.errors import CapabilityError
from iokeep.uapi.kernel import KernelTransport
from iokeep.uapi.transport import Mapping
from iokeep.uapi.usermem import OwnMemory

MFD_CLOEXEC, MFD_ALLOW_SEALING = 1, 2
F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW = 1, 2, 4


@pytest.fixture
def kernel():
    return KernelTransport()


@pytest.fixture
def memfd(kernel):
    fd = kernel.memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING)
    kernel.ftruncate(fd, 3 * 4096)
    yield fd
    kernel.close(fd)


def fails(number, call, *args):
    with pytest.raises(OSError) as caught:
        call(*args)
    assert caught.value.errno == number


def test_files(kernel, memfd):
    assert kernel.name == "kernel"
    assert kernel.getpid() == os.getpid()
    assert kernel.fstat(memfd).st_size == 3 * 4096
    assert kernel.fstat(memfd).st_ino == os.fstat(memfd).st_ino
    assert kernel.pwrite(memfd, b"hello", 4094) == 5
    assert kernel.pread(memfd, 7, 4093) == b"\0hello\0"
    assert kernel.pread(memfd, 100, 3 * 4096 - 2) == b"\0\0"
    kernel.fallocate(memfd, 3, 4096, 4096)  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    assert kernel.pread(memfd, 5, 4094) == b"he\0\0\0"
    assert kernel.lseek(memfd, 77, os.SEEK_SET) == 77
    kernel.add_seals(memfd, F_SEAL_SHRINK | F_SEAL_GROW)
    assert kernel.get_seals(memfd) == F_SEAL_SHRINK | F_SEAL_GROW
    fails(errno.EPERM, kernel.ftruncate, memfd, 4096)
    fails(errno.EINVAL, kernel.fallocate, memfd, 0, 0, 0)
    fails(errno.EBADF, kernel.close, 1 << 20)


def test_queues(kernel, memfd):
    out, into = os.pipe()
    try:
        assert kernel.poll(out, select.POLLIN) == 0
        assert kernel.write(into, b"one, two") == 8
        assert kernel.poll(out, select.POLLIN | select.POLLOUT) == select.POLLIN
        assert [kernel.read(out, 5), kernel.read(out, 9)] == [b"one, ", b"two"]
    finally:
        os.close(out)
        os.close(into)
    assert kernel.poll(1 << 20, select.POLLIN) == select.POLLNVAL
    fails(errno.EBADF, kernel.read, 1 << 20, 1)
    assert kernel.write(memfd, b"x") == 1
    assert kernel.pread(memfd, 1, 0) == b"x"


def test_mapping(kernel, memfd):
    mapping = kernel.mmap(memfd, 2 * 4096, 4096)
    assert isinstance(mapping, Mapping)
    mapping.write(4090, b"0123456789")
    assert kernel.pread(memfd, 10, 4096 + 4090) == b"0123456789"
    assert ctypes.string_at(mapping.hva + 4090, 10) == b"0123456789"
    assert mapping.read(4092, 3) == b"234"
    offsets = np.array([0, 4096, 8184], dtype=np.uint64)
    mapping.scatter64(offsets, np.array([1, 2**64 - 1, 3], dtype=np.uint64))
    assert mapping.gather64(offsets).tolist() == [1, 2**64 - 1, 3]
    assert mapping.read(8184, 8) == (3).to_bytes(8, "little")
    mapping.write(0, np.array([9, 8], dtype=np.uint8))
    view = mapping.numpy()
    assert view[:2].tolist() == [9, 8]
    for offset, length in [(-1, 1), (0, 8193), (8192, 1)]:
        with pytest.raises(ValueError, match="outside"):
            mapping.read(offset, length)
    for bad in (4, 8192):
        with pytest.raises(ValueError, match="aligned"):
            mapping.gather64(np.array([bad], dtype=np.uint64))
    # Closing with a view alive is fine: the view keeps the memory.
    mapping.close()
    mapping.close()
    view[0] = 7
    assert kernel.pread(memfd, 1, 4096) == b"\7"
    with pytest.raises(ValueError, match="closed"):
        mapping.read(0, 1)


def test_anonymous_mapping(kernel):
    mapping = kernel.mmap(-1, 4096)
    mapping.write(0, b"x")
    assert mapping.read(0, 2) == b"x\0"
    assert ctypes.string_at(mapping.hva, 1) == b"x"
    mapping.close()
    fails(errno.EINVAL, kernel.mmap, -1, 0)


def test_getfd(kernel, memfd):
    try:
        got = kernel.getfd(os.getpid(), memfd)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EPERM):
            pytest.skip(f"pidfd_getfd is not allowed here: {error}")
        raise
    assert kernel.fstat(got) == kernel.fstat(memfd)
    kernel.close(got)
    fails(errno.EBADF, kernel.getfd, os.getpid(), 1 << 20)


def test_ioctl(kernel):
    class winsize(ctypes.Structure):
        _fields_ = [(name, ctypes.c_ushort) for name in ("rows", "columns", "x", "y")]

    leader, follower = os.openpty()
    try:
        assert kernel.ioctl(leader, 0x5414, winsize(24, 80)) == 0  # TIOCSWINSZ
        got = winsize()
        kernel.ioctl(follower, 0x5413, got)  # TIOCGWINSZ
        assert (got.rows, got.columns) == (24, 80)
        fails(errno.ENOTTY, kernel.ioctl, leader, 0x3B80, got)
    finally:
        os.close(leader)
        os.close(follower)


@pytest.mark.parametrize("node", ["/dev/iommu", "/dev/liveupdate", "/dev/vfio/devices/vfio12345"])
def test_missing_nodes_say_what_is_missing(kernel, node):
    if Path(node).exists():
        pytest.skip(f"{node} is there")
    with pytest.raises(CapabilityError) as caught:
        kernel.open(node)
    assert node in caught.value.what
    assert "CONFIG_" in caught.value.what
    assert caught.value.hint


def test_other_paths_fail_as_usual(kernel, tmp_path):
    with pytest.raises(FileNotFoundError):
        kernel.open(str(tmp_path / "none"))


@pytest.mark.parametrize("proc_mem", [False, True])
def test_own_memory(proc_mem):
    memory = OwnMemory()
    memory._proc_mem = memory._proc_mem or proc_mem
    buffer = ctypes.create_string_buffer(b"0123456789", 10)
    at = ctypes.addressof(buffer)
    assert memory.copy_from(at + 2, 3) == b"234"
    memory.copy_to(at + 1, b"ab\0c")
    assert buffer.raw == b"0ab\0c56789"
    assert memory.copy_from(0, 0) == b""
    memory.copy_to(0, b"")
    for bad in (0, 4096, 2**47, 2**63 - 8, 2**63, 2**64 - 8, -8):
        fails(errno.EFAULT, memory.copy_from, bad, 8)
        fails(errno.EFAULT, memory.copy_to, bad, bytes(8))
