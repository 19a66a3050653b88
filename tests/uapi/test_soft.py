# SPDX-License-Identifier: Apache-2.0
"""SoftTransport against a small kernel at the other end of a socket: calls, mappings, copies, its end."""

import ctypes
import errno
import gc
import mmap
import os
import random
import select
import socket
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iokeep.uapi import iommufd, wire
from iokeep.uapi.soft import SoftTransport
from iokeep.uapi.transport import FileStat, Mapping
from iokeep.uapi.wire import EXTENT, TARGET_RAM, TARGET_REGISTERS, Call, ServerConnection, WireError

PAGE = 4096
RAM = 256 * PAGE
REGISTERS = 4 * PAGE


class TinyKernel:
    """Serves one connection: files are byte arrays, ioctls do what the test hands in, extents too."""

    def __init__(self):
        here, there = socket.socketpair()
        self.client_socket = here
        self.connection = ServerConnection(there, 2)
        self.memfds = []
        for name, size in (("ram", RAM), ("registers", REGISTERS)):
            fd = os.memfd_create(name)
            os.ftruncate(fd, size)
            self.memfds.append(fd)
        self.ram = np.frombuffer(mmap.mmap(self.memfds[0], 0), dtype=np.uint8)
        self.sizes = [RAM, REGISTERS]
        self.files = {}
        self.seals = {}
        self.positions = {}
        self.short = 0
        self.requests = []
        self.ioctl = lambda request, connection: (0, request.payload)
        self.extents = lambda length: EXTENT.pack(TARGET_RAM, 0, 0, -(-length // PAGE) * PAGE)
        self.reboot = None
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self):
        try:
            while (request := self.connection.recv(10)) is not None:
                self.requests.append(request)
                try:
                    self.one(request)
                except OSError as error:
                    self.connection.error(error.errno)
                if request.call == Call.REBOOT_KEXEC and not self.reboot:
                    return
        finally:
            self.connection.close()

    def file(self, fd):
        if fd not in self.files:
            raise OSError(errno.EBADF, "no such file")
        return self.files[fd]

    def one(self, request):
        c, fd, args = self.connection, request.fd, request.args
        match request.call:
            case Call.HELLO:
                c.reply(41, struct.pack(f"<{len(self.sizes)}Q", *self.sizes), self.memfds)
            case Call.OPEN:
                raise OSError(errno.ENOENT, request.payload.decode())
            case Call.MEMFD_CREATE:
                fd = 3 + len(self.files)
                self.files[fd] = bytearray()
                self.seals[fd] = 0
                c.reply(fd)
            case Call.CLOSE:
                self.file(fd)
                del self.files[fd]
                c.reply()
            case Call.FTRUNCATE:
                file = self.file(fd)
                del file[args[0] :]
                file.extend(bytes(args[0] - len(file)))
                c.reply()
            case Call.FALLOCATE:
                mode, offset, length = args
                file = self.file(fd)
                if mode & 2:
                    file[offset : offset + length] = bytes(length)
                c.reply()
            case Call.ADD_SEALS:
                self.seals[fd] |= args[0]
                c.reply()
            case Call.GET_SEALS:
                c.reply(self.seals[fd])
            case Call.FSTAT:
                c.reply(0, struct.pack("<QQ", 1000 + fd, len(self.file(fd))))
            case Call.LSEEK:
                self.positions[fd] = wire.signed(args[0])
                if self.positions[fd] < 0:
                    raise OSError(errno.EINVAL, "negative")
                c.reply(self.positions[fd])
            case Call.PREAD:
                c.reply(0, bytes(self.file(fd)[args[0] : args[0] + args[1]]))
            case Call.PWRITE:
                file = self.file(fd)
                file.extend(bytes(max(0, args[0] + len(request.payload) - len(file))))
                file[args[0] : args[0] + len(request.payload)] = request.payload
                c.reply(len(request.payload))
            case Call.READ:
                at = self.positions.get(fd, 0)
                data = bytes(self.file(fd)[at : at + args[0]])
                self.positions[fd] = at + len(data)
                c.reply(0, data)
            case Call.WRITE:
                c.reply(len(request.payload) - self.short)
            case Call.POLL:
                c.reply(args[0] & select.POLLIN)
            case Call.MMAP:
                c.reply(77, self.extents(args[1]))
            case Call.MUNMAP:
                c.reply()
            case Call.GETFD:
                c.reply(1000 + fd + args[0])
            case Call.GETPID:
                c.reply(41)
            case Call.REBOOT_KEXEC:
                if self.reboot:
                    raise OSError(self.reboot, "freeze refused")
                c.reply()
            case Call.IOCTL:
                value, payload = self.ioctl(request, c)
                if value < 0:
                    c.error(-value, payload)
                else:
                    c.reply(value, payload)


@pytest.fixture
def kernel():
    kernel = TinyKernel()
    yield kernel
    kernel.client_socket.close()
    kernel.thread.join(10)
    assert not kernel.thread.is_alive()
    for fd in kernel.memfds:
        os.close(fd)


@pytest.fixture
def soft(kernel):
    with SoftTransport(kernel.client_socket, timeout=10) as transport:
        yield transport


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def fails(number, call, *args):
    with pytest.raises(OSError) as caught:
        call(*args)
    assert caught.value.errno == number
    return caught.value


def test_every_file_call(kernel, soft):
    assert soft.name == "soft"
    assert soft.getpid() == 41
    fails(errno.ENOENT, soft.open, "/dev/iommu")
    assert kernel.requests[-1].payload == b"/dev/iommu"
    fd = soft.memfd_create("ram-0", 3)
    assert (kernel.requests[-1].payload, kernel.requests[-1].args) == (b"ram-0", (3,))
    soft.ftruncate(fd, 10000)
    assert soft.fstat(fd) == FileStat(1000 + fd, 10000)
    assert soft.pwrite(fd, b"hello", 9990) == 5
    assert soft.pread(fd, 100, 9988) == b"\0\0hello" + bytes(5)
    soft.fallocate(fd, 3, 9990, 2)
    assert soft.pread(fd, 5, 9990) == b"\0\0llo"
    assert soft.pread(fd, 0, 0) == b""
    assert soft.pwrite(fd, b"", 0) == 0
    soft.add_seals(fd, 6)
    soft.add_seals(fd, 1)
    assert soft.get_seals(fd) == 7
    assert soft.lseek(fd, 55, os.SEEK_SET) == 55
    fails(errno.EINVAL, soft.lseek, fd, -1, os.SEEK_SET)
    assert soft.getfd(5, fd) == 1005 + fd
    soft.close(fd)
    fails(errno.EBADF, soft.close, fd)
    fails(errno.EBADF, soft.pread, fd, 1, 0)


def test_queues(kernel, soft):
    fd = soft.memfd_create("queue")
    soft.pwrite(fd, b"one, two", 0)
    assert [soft.read(fd, 5), soft.read(fd, 9), soft.read(fd, 1)] == [b"one, ", b"two", b""]
    assert soft.write(fd, b"answer") == 6
    kernel.short = 2
    assert soft.write(fd, b"answer") == 4
    kernel.short = 7
    fails(errno.EPROTO, soft.write, fd, b"answer")
    assert soft.poll(fd, select.POLLIN | select.POLLOUT) == select.POLLIN
    assert soft.poll(fd, select.POLLOUT) == 0
    soft.read(fd, wire.MAX_PAYLOAD + 5)
    assert kernel.requests[-1].args == (wire.MAX_PAYLOAD,)


def test_long_reads_and_writes_are_cut_to_the_bound(kernel, soft):
    fd = soft.memfd_create("big")
    data = os.urandom(1 << 16) * (3 * wire.MAX_PAYLOAD // (1 << 16) // 2) + b"tail"
    assert soft.pwrite(fd, data, 3) == len(data)
    assert bytes(kernel.files[fd]) == bytes(3) + data
    assert soft.pread(fd, len(data) + 100, 3) == data
    assert max(len(each.payload) for each in kernel.requests) == wire.MAX_PAYLOAD


def test_ioctl_copies_back_also_on_an_error(kernel, soft):
    arg = iommufd.iommu_ioas_alloc(size=12)

    def answer(request, connection):
        assert request.args == (iommufd.IOMMU_IOAS_ALLOC,)
        got = iommufd.iommu_ioas_alloc.from_buffer_copy(request.payload)
        got.out_ioas_id = 9
        return -errno.EMSGSIZE, bytes(got)

    kernel.ioctl = answer
    fails(errno.EMSGSIZE, soft.ioctl, 3, iommufd.IOMMU_IOAS_ALLOC, arg)
    assert arg.out_ioas_id == 9
    kernel.ioctl = lambda request, connection: (123, b"")
    assert soft.ioctl(3, iommufd.IOMMU_IOAS_ALLOC, arg) == 123
    assert arg.out_ioas_id == 9


def test_ioctl_answer_longer_than_the_structure(kernel, soft):
    kernel.ioctl = lambda request, connection: (0, bytes(13))
    fails(errno.EPROTO, soft.ioctl, 3, 1, iommufd.iommu_ioas_alloc(size=12))


def swap(request, connection):
    """Reverse user memory at [iova, +length] of a struct iommu_ioas_unmap."""
    arg = iommufd.iommu_ioas_unmap.from_buffer_copy(request.payload)
    data = connection.copy_from_user(arg.iova, arg.length)
    connection.copy_to_user(arg.iova, data[::-1])
    return 0, b""


def test_user_memory(kernel, soft):
    kernel.ioctl = swap
    buffer = ctypes.create_string_buffer(b"0123456789", 10)
    arg = iommufd.iommu_ioas_unmap(size=24, iova=ctypes.addressof(buffer), length=10)
    soft.ioctl(3, 1, arg)
    assert buffer.raw == b"9876543210"


def test_bad_user_pointers(kernel, soft):
    kernel.ioctl = swap
    hole = mmap.mmap(-1, 2 * PAGE)
    at = ctypes.addressof(ctypes.c_char.from_buffer(hole))
    libc = ctypes.CDLL(None)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert libc.mprotect(at + PAGE, PAGE, 0) == 0
    for uptr, length in [(0, 8), (8, 8), (2**63, 8), (2**64 - 8, 8), (at + PAGE, 1), (at + PAGE - 4, 8)]:
        fails(errno.EFAULT, soft.ioctl, 3, 1, iommufd.iommu_ioas_unmap(size=24, iova=uptr, length=length))
    # Read-only memory can be read, not written.
    assert libc.mprotect(at + PAGE, PAGE, 1) == 0
    fails(errno.EFAULT, soft.ioctl, 3, 1, iommufd.iommu_ioas_unmap(size=24, iova=at + PAGE, length=8))
    assert libc.mprotect(at + PAGE, PAGE, 3) == 0
    soft.ioctl(3, 1, iommufd.iommu_ioas_unmap(size=24, iova=at + PAGE, length=8))


def test_user_memory_in_a_mapping_goes_through_its_frames(kernel, soft):
    kernel.ioctl = swap
    kernel.extents = scattered([7, 3])
    with_frames = soft.mmap(3, 2 * PAGE)
    with_frames.write(PAGE - 2, b"abcd")
    soft.ioctl(3, 1, iommufd.iommu_ioas_unmap(size=24, iova=with_frames.hva + PAGE - 2, length=4))
    assert with_frames.read(PAGE - 2, 4) == b"dcba"
    assert bytes(kernel.ram[8 * PAGE - 2 : 8 * PAGE]) == b"dc"
    # Half outside of the mapping, and the addresses of a closed one, are faults.
    arg = iommufd.iommu_ioas_unmap(size=24, iova=with_frames.hva + 2 * PAGE - 4, length=8)
    fails(errno.EFAULT, soft.ioctl, 3, 1, arg)
    with_frames.close()
    fails(errno.EFAULT, soft.ioctl, 3, 1, iommufd.iommu_ioas_unmap(size=24, iova=with_frames.hva, length=4))


def scattered(frames, target=TARGET_RAM):
    return lambda length: b"".join(EXTENT.pack(target, 0, frame * PAGE, PAGE) for frame in frames)


def test_contiguous_mapping(kernel, soft):
    mapping = soft.mmap(5, 3 * PAGE - 100, 8 * PAGE)
    assert isinstance(mapping, Mapping)
    request = next(each for each in kernel.requests if each.call == Call.MMAP)
    assert (request.fd, request.args) == (5, (8 * PAGE, 3 * PAGE - 100, mapping.hva))
    assert mapping.hva % PAGE == 0
    assert mapping.length == 3 * PAGE - 100
    view = mapping.numpy()
    assert view is not None
    view[5000:5003] = [1, 2, 3]
    assert mapping.read(4999, 5) == b"\0\1\2\3\0"
    assert bytes(kernel.ram[5000:5003]) == b"\1\2\3"
    mapping.close()
    mapping.close()
    assert [each.args for each in kernel.requests if each.call == Call.MUNMAP] == [(77,)]
    with pytest.raises(ValueError, match="closed"):
        mapping.read(0, 1)


def test_registers_are_another_target(kernel, soft):
    kernel.extents = scattered([2], TARGET_REGISTERS)
    mapping = soft.mmap(5, PAGE)
    mapping.write(16, b"BAR!")
    assert os.pread(kernel.memfds[1], 4, 2 * PAGE + 16) == b"BAR!"
    assert not kernel.ram.any()


@given(st.data())
@settings(max_examples=60)
def test_scattered_mapping_is_like_flat_memory(data):
    """Reads and writes at any place equal those on plain bytes, and land in the right frames."""
    kernel = TinyKernel()
    pages = data.draw(st.integers(1, 12))
    frames = data.draw(st.permutations(range(RAM // PAGE)))[:pages]
    # Runs of frames may come as one extent.
    extents, at = [], 0
    while at < pages:
        run = 1
        while at + run < pages and frames[at + run] == frames[at] + run:
            run += 1
        extents.append(EXTENT.pack(TARGET_RAM, 0, frames[at] * PAGE, run * PAGE))
        at += run
    kernel.extents = lambda length: b"".join(extents)
    with SoftTransport(kernel.client_socket, timeout=10) as soft:
        length = pages * PAGE - data.draw(st.integers(0, PAGE - 1))
        mapping = soft.mmap(3, length)
        model = bytearray(length)
        for _ in range(data.draw(st.integers(1, 8))):
            offset = data.draw(st.integers(0, length))
            chunk = os.urandom(data.draw(st.integers(0, length - offset)))
            mapping.write(offset, chunk)
            model[offset : offset + len(chunk)] = chunk
        assert mapping.read(0, length) == model
        offset = data.draw(st.integers(0, length))
        size = data.draw(st.integers(0, length - offset))
        assert mapping.read(offset, size) == model[offset : offset + size]
        for n, frame in enumerate(frames):
            part = model[n * PAGE : (n + 1) * PAGE]
            assert bytes(kernel.ram[frame * PAGE : frame * PAGE + len(part)]) == part
        whole = length // 8
        offsets = np.array(
            random.Random(1).sample(range(whole), min(whole, 50)), dtype=np.uint64
        ) * np.uint64(8)
        words = np.frombuffer(bytes(model[: whole * 8]), dtype=np.uint64)
        assert np.array_equal(mapping.gather64(offsets), words[(offsets // np.uint64(8)).astype(np.intp)])
        values = offsets * np.uint64(0x9E3779B97F4A7C15)
        mapping.scatter64(offsets, values)
        assert np.array_equal(mapping.gather64(offsets), values)
        for offset, value in zip(offsets.tolist(), values.tolist(), strict=True):
            assert mapping.read(offset, 8) == value.to_bytes(8, "little")
    kernel.thread.join(10)
    for fd in kernel.memfds:
        os.close(fd)


def test_mapping_bounds(kernel, soft):
    kernel.extents = scattered([9, 4])
    mapping = soft.mmap(3, PAGE + 12)
    for offset, length in [(-1, 1), (0, PAGE + 13), (PAGE + 12, 1), (0, -1)]:
        with pytest.raises(ValueError, match="outside"):
            mapping.read(offset, length)
    with pytest.raises(ValueError, match="outside"):
        mapping.write(PAGE + 10, b"abc")
    assert mapping.read(PAGE + 12, 0) == b""
    # PAGE + 8 .. PAGE + 15 is not all inside.
    for bad in ([4], [PAGE + 8], [2**64 - 8]):
        with pytest.raises(ValueError, match="aligned"):
            mapping.gather64(np.array(bad, dtype=np.uint64))
        with pytest.raises(ValueError, match="aligned"):
            mapping.scatter64(np.array(bad, dtype=np.uint64), np.zeros(1, dtype=np.uint64))
    assert mapping.gather64(np.array([], dtype=np.uint64)).size == 0
    assert mapping.numpy() is None


@pytest.mark.parametrize(
    "extents",
    [
        b"",
        b"x",
        EXTENT.pack(2, 0, 0, 2 * PAGE),
        EXTENT.pack(TARGET_RAM, 0, RAM - PAGE, 2 * PAGE),
        EXTENT.pack(TARGET_RAM, 0, 2**64 - PAGE, 2 * PAGE),
        EXTENT.pack(TARGET_RAM, 0, 8, 2 * PAGE),
        EXTENT.pack(TARGET_RAM, 0, 0, PAGE),
        EXTENT.pack(TARGET_RAM, 0, 0, 0) + EXTENT.pack(TARGET_RAM, 0, 0, 2 * PAGE),
        EXTENT.pack(TARGET_RAM, 0, 0, 2**64 - PAGE) + EXTENT.pack(TARGET_RAM, 0, 0, 3 * PAGE),
        EXTENT.pack(TARGET_RAM, 0, 0, PAGE) + EXTENT.pack(TARGET_REGISTERS, 0, 0, PAGE),
        EXTENT.pack(TARGET_RAM, 0, 0, PAGE) * 3,
    ],
)
def test_extents_are_not_trusted(kernel, soft, extents):
    kernel.extents = lambda length: extents
    fails(errno.EPROTO, soft.mmap, 3, 2 * PAGE)


def test_mmap_arguments(kernel, soft):
    for length, offset in [(0, 0), (-1, 0), (PAGE, 1), (PAGE, -PAGE)]:
        fails(errno.EINVAL, soft.mmap, 3, length, offset)


def test_kexec_ends_the_kernel_and_memory_stays(kernel, soft):
    kernel.extents = scattered([200, 100])
    mapping = soft.mmap(3, 2 * PAGE)
    mapping.write(0, b"kept")
    soft.reboot_kexec()
    kernel.thread.join(10)
    for _ in range(2):
        with pytest.raises(ConnectionError) as caught:
            soft.fstat(3)
        assert isinstance(caught.value, WireError)
        assert caught.value.errno == errno.ECONNRESET
    assert mapping.read(0, 4) == b"kept"
    mapping.close()


def test_refused_kexec(kernel, soft):
    kernel.reboot = errno.EBUSY
    fails(errno.EBUSY, soft.reboot_kexec)
    assert soft.getfd(1, 2) == 1003


def test_kernel_that_dies_in_a_call(kernel, soft):
    def die(request, connection):
        connection.close()
        raise OSError(errno.EIO, "dead")

    kernel.ioctl = die
    with pytest.raises(ConnectionError):
        soft.ioctl(3, 1, iommufd.iommu_ioas_alloc(size=12))


def test_interrupted_call_breaks_the_connection(kernel, soft):
    """After Ctrl-C in the middle of a call an old answer must not be taken for the next one's."""

    class Stop(BaseException):
        pass

    class Interrupting:
        def copy_from(self, uptr, length):
            raise Stop

        copy_to = copy_from

    kernel.ioctl = swap
    soft._memory = Interrupting()
    with pytest.raises(Stop):
        soft.ioctl(3, 1, iommufd.iommu_ioas_unmap(size=24, iova=1, length=1))
    with pytest.raises(ConnectionError):
        soft.getfd(1, 1)
    soft._memory = type("Empty", (), {"mappings": {}})()


@pytest.mark.parametrize("sizes", [[RAM], [RAM, REGISTERS, 1], [RAM, 2**40], [0, REGISTERS]])
def test_hello_is_not_trusted(sizes):
    kernel = TinyKernel()
    kernel.sizes = sizes
    gc.collect()
    before = open_files()
    with pytest.raises(WireError):
        SoftTransport(kernel.client_socket, timeout=5)
    kernel.thread.join(10)
    # Both ends are closed, and no descriptor that came along is left.
    assert open_files() == before - 2
    for fd in kernel.memfds:
        os.close(fd)


def test_no_such_socket(tmp_path):
    with pytest.raises(FileNotFoundError):
        SoftTransport(tmp_path / "none")


def test_threads_take_turns(kernel, soft):
    fd = soft.memfd_create("x")
    soft.ftruncate(fd, 8 * 1000)
    errors = []

    def work(n):
        try:
            for at in range(50):
                soft.pwrite(fd, n.to_bytes(8, "little"), 8 * (n * 50 + at))
                assert soft.pread(fd, 8, 8 * (n * 50 + at)) == n.to_bytes(8, "little")
        except (OSError, AssertionError) as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not errors
