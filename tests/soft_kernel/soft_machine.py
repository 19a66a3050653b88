# SPDX-License-Identifier: Apache-2.0
"""A kernel in the test's own process: no sockets, no devices, a caller whose memory is a dict."""

from __future__ import annotations

import ctypes
import errno
import gc
import itertools
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from iokeep.soft.hardware.platform import Platform
from iokeep.soft.kernel.builtin import install
from iokeep.soft.kernel.kernel import Kernel
from iokeep.soft.kernel.klog import Klog
from iokeep.soft.kernel.params import Params
from iokeep.soft.kernel.process import Process
from iokeep.soft.kernel.syserror import SysError
from iokeep.uapi import iommufd as uapi
from iokeep.uapi import vfio
from iokeep.uapi.wire import EXTENT, Call, Request, signed

MIB = 1 << 20
R, W = uapi.IOMMU_IOAS_MAP_READABLE, uapi.IOMMU_IOAS_MAP_WRITEABLE
FIXED = uapi.IOMMU_IOAS_MAP_FIXED_IOVA
RW = R | W


@dataclass
class UserBuffers:
    """User memory: buffers at made-up hvas; everything else faults."""

    buffers: dict[int, bytearray] = field(default_factory=dict)
    next_hva: int = 0x7F00_0000_0000

    def put(self, data: bytes | int) -> int:
        hva = self.next_hva
        self.buffers[hva] = bytearray(data)
        self.next_hva += 0x1000 + len(self.buffers[hva]) // 0x1000 * 0x1000
        return hva

    def _find(self, uptr: int, n: int) -> tuple[bytearray, int]:
        for hva, buffer in self.buffers.items():
            if hva <= uptr and uptr + n <= hva + len(buffer):
                return buffer, uptr - hva
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))

    def copy_from_user(self, uptr: int, n: int) -> bytes:
        buffer, at = self._find(uptr, n)
        return bytes(buffer[at : at + n])

    def copy_to_user(self, uptr: int, data: bytes) -> None:
        buffer, at = self._find(uptr, len(data))
        buffer[at : at + len(data)] = data


class Caller:
    """A process that makes system calls. What fails raises SysError, as :meth:`Kernel.syscall` does."""

    def __init__(self, kernel: Kernel, *, privileged: bool = True) -> None:
        self.kernel = kernel
        self.user = UserBuffers()
        self.process: Process = kernel.spawn(self.user, privileged=privileged)
        self.next_hva = 0x1000_0000_0000

    def call(
        self, call: Call, fd: int = -1, args: tuple[int, ...] = (), payload: bytes = b""
    ) -> tuple[int, bytes]:
        args = tuple(a & (2**64 - 1) for a in args)
        result = self.kernel.syscall(self.process, Request(call, fd, args, payload))
        return result.value, result.payload

    def open(self, path: str) -> int:
        return self.call(Call.OPEN, payload=path.encode())[0]

    def close(self, fd: int) -> None:
        self.call(Call.CLOSE, fd)

    def ioctl(self, fd: int, request: int, arg: ctypes.Structure) -> int:
        try:
            value, out = self.call(Call.IOCTL, fd, (request,), bytes(arg))
        except SysError as error:
            payload = getattr(error, "payload", b"")
            ctypes.memmove(ctypes.addressof(arg), payload, len(payload))
            raise
        ctypes.memmove(ctypes.addressof(arg), out, len(out))
        return value

    def memfd(self, name: str = "m", size: int = 0, flags: int = 2) -> int:
        fd = self.call(Call.MEMFD_CREATE, args=(flags,), payload=name.encode())[0]
        if size:
            self.ftruncate(fd, size)
        return fd

    def ftruncate(self, fd: int, length: int) -> None:
        self.call(Call.FTRUNCATE, fd, (length,))

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        self.call(Call.FALLOCATE, fd, (mode, offset, length))

    def add_seals(self, fd: int, seals: int) -> None:
        self.call(Call.ADD_SEALS, fd, (seals,))

    def get_seals(self, fd: int) -> int:
        return self.call(Call.GET_SEALS, fd)[0]

    def fstat(self, fd: int) -> tuple[int, int]:
        ino, size = struct.unpack("<QQ", self.call(Call.FSTAT, fd)[1])
        return ino, size

    def pread(self, fd: int, length: int, offset: int = 0) -> bytes:
        return self.call(Call.PREAD, fd, (offset, length))[1]

    def pwrite(self, fd: int, data: bytes, offset: int = 0) -> int:
        return self.call(Call.PWRITE, fd, (offset,), data)[0]

    def lseek(self, fd: int, offset: int, whence: int = 0) -> int:
        return signed(self.call(Call.LSEEK, fd, (offset, whence))[0])

    def mmap(self, fd: int, length: int, offset: int = 0) -> tuple[int, int, list[tuple[int, int, int]]]:
        """(hva, VMA id, [(target, start, length)])."""
        hva = self.next_hva
        self.next_hva += -(-length // 4096) * 4096 + 0x10000
        vma, raw = self.call(Call.MMAP, fd, (offset, length, hva))
        return hva, vma, [(t, s, n) for t, _, s, n in EXTENT.iter_unpack(raw)]

    def munmap(self, vma: int) -> None:
        self.call(Call.MUNMAP, args=(vma,))

    def getfd(self, pid: int, fd: int) -> int:
        return self.call(Call.GETFD, fd, (pid,))[0]

    def exit(self) -> None:
        self.kernel.exit_process(self.process.pid)

    # ---- iommufd

    def iommu(self) -> int:
        return self.open("/dev/iommu")

    def ioas(self, fd: int) -> int:
        cmd = uapi.iommu_ioas_alloc(size=ctypes.sizeof(uapi.iommu_ioas_alloc))
        self.ioctl(fd, uapi.IOMMU_IOAS_ALLOC, cmd)
        return cmd.out_ioas_id

    def map_file(
        self, fd: int, ioas: int, file: int, start: int, length: int, iova: int | None = None, prot: int = RW
    ) -> int:
        cmd = uapi.iommu_ioas_map_file(
            size=40, flags=prot | (0 if iova is None else FIXED), ioas_id=ioas, fd=file, start=start,
            length=length, iova=iova or 0,
        )  # fmt: skip
        self.ioctl(fd, uapi.IOMMU_IOAS_MAP_FILE, cmd)
        return cmd.iova

    def map(self, fd: int, ioas: int, hva: int, length: int, iova: int | None = None, prot: int = RW) -> int:
        cmd = uapi.iommu_ioas_map(
            size=40, flags=prot | (0 if iova is None else FIXED), ioas_id=ioas, user_va=hva, length=length,
            iova=iova or 0,
        )  # fmt: skip
        self.ioctl(fd, uapi.IOMMU_IOAS_MAP, cmd)
        return cmd.iova

    def copy(
        self, fd: int, dst: int, src: int, src_iova: int, length: int, iova: int | None = None, prot: int = RW
    ) -> int:
        cmd = uapi.iommu_ioas_copy(
            size=40, flags=prot | (0 if iova is None else FIXED), dst_ioas_id=dst, src_ioas_id=src,
            length=length, dst_iova=iova or 0, src_iova=src_iova,
        )  # fmt: skip
        self.ioctl(fd, uapi.IOMMU_IOAS_COPY, cmd)
        return cmd.dst_iova

    def unmap(self, fd: int, ioas: int, iova: int = 0, length: int = 2**64 - 1) -> int:
        cmd = uapi.iommu_ioas_unmap(size=24, ioas_id=ioas, iova=iova, length=length)
        self.ioctl(fd, uapi.IOMMU_IOAS_UNMAP, cmd)
        return cmd.length

    def destroy(self, fd: int, number: int) -> None:
        self.ioctl(fd, uapi.IOMMU_DESTROY, uapi.iommu_destroy(size=8, id=number))

    def option(self, fd: int, option: int, op: int, number: int = 0, value: int = 0) -> int:
        cmd = uapi.iommu_option(size=24, option_id=option, op=op, object_id=number, val64=value)
        self.ioctl(fd, uapi.IOMMU_OPTION, cmd)
        return cmd.val64

    def ranges(self, fd: int, ioas: int, room: int = 16) -> tuple[list[tuple[int, int]], int]:
        hva = self.user.put(16 * room)
        cmd = uapi.iommu_ioas_iova_ranges(size=32, ioas_id=ioas, num_iovas=room, allowed_iovas=hva)
        self.ioctl(fd, uapi.IOMMU_IOAS_IOVA_RANGES, cmd)
        rows = struct.iter_unpack("<QQ", bytes(self.user.buffers[hva][: 16 * cmd.num_iovas]))
        return list(rows), cmd.out_iova_alignment

    def allow(self, fd: int, ioas: int, ranges: list[tuple[int, int]]) -> None:
        hva = self.user.put(b"".join(struct.pack("<QQ", *r) for r in ranges) or b"\0")
        cmd = uapi.iommu_ioas_allow_iovas(size=24, ioas_id=ioas, num_iovas=len(ranges), allowed_iovas=hva)
        self.ioctl(fd, uapi.IOMMU_IOAS_ALLOW_IOVAS, cmd)

    def hwpt(self, fd: int, dev: int, pt: int, flags: int = 0) -> int:
        cmd = uapi.iommu_hwpt_alloc(size=48, flags=flags, dev_id=dev, pt_id=pt)
        self.ioctl(fd, uapi.IOMMU_HWPT_ALLOC, cmd)
        return cmd.out_hwpt_id

    # ---- VFIO

    def vfio(self, index: int = 0) -> int:
        return self.open(f"/dev/vfio/devices/vfio{index}")

    def bind(self, fd: int, iommufd: int) -> int:
        cmd = vfio.vfio_device_bind_iommufd(argsz=16, iommufd=iommufd)
        self.ioctl(fd, vfio.VFIO_DEVICE_BIND_IOMMUFD, cmd)
        return cmd.out_devid

    def attach(self, fd: int, pt: int) -> int:
        cmd = vfio.vfio_device_attach_iommufd_pt(argsz=12, pt_id=pt)
        self.ioctl(fd, vfio.VFIO_DEVICE_ATTACH_IOMMUFD_PT, cmd)
        return cmd.pt_id

    def detach(self, fd: int) -> None:
        cmd = vfio.vfio_device_detach_iommufd_pt(argsz=8)
        self.ioctl(fd, vfio.VFIO_DEVICE_DETACH_IOMMUFD_PT, cmd)


_boots = itertools.count()


def boot(ram: int = 32 * MIB, devices: int = 2, kind: str = "vtd", **params: str) -> Kernel:
    """A booted kernel on a new platform with an IOMMU of a ``kind``; ``__`` in a parameter's name stands for
    a dot.
    """
    if next(_boots) % 32 == 0:
        gc.collect()  # a kernel and its modules refer to each other: its mapped memfds go with the collector
    platform = Platform.create(ram, devices, iommu=kind)
    words = Params({key.replace("__", "."): value for key, value in params.items()})
    kernel = Kernel(platform, "soft-7.3", words, Klog(None))
    install(kernel)
    kernel.boot()
    return kernel


def settled(kernel: Kernel) -> None:
    """End all processes; nothing may be left, lost or warned of. The machine is switched off."""
    kernel.shutdown()
    audit = kernel.audit()
    assert (audit.leaked, audit.wrongly_freed, audit.bad_unpins, audit.bad_puts) == (0, 0, 0, 0), audit
    assert (
        audit.by_kind.get("memfd", 0) == audit.by_kind.get("anon", 0) == audit.by_kind.get("pgtable", 0) == 0
    )
    assert kernel.files == {}
    assert kernel.warnings == 0, kernel.klog.text()
    kernel.platform.close()


@contextmanager
def refused(number: int) -> Iterator[None]:
    """The calls inside must fail with this errno."""
    with pytest.raises(SysError) as caught:
        yield
    assert caught.value.errno == number, str(caught.value)
