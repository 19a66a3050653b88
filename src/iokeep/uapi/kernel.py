# SPDX-License-Identifier: Apache-2.0
"""System calls of the running kernel."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import select
from typing import TYPE_CHECKING

from iokeep.uapi.errnos import missing_node
from iokeep.uapi.transport import FileStat

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# include/uapi/linux/reboot.h
_LINUX_REBOOT_CMD_KEXEC = 0x45584543
# include/uapi/asm-generic/unistd.h; Python 3.11 has no wrapper
_NR_PIDFD_GETFD = 438


class KernelMapping:
    """See :class:`iokeep.uapi.transport.Mapping`; real memory of this process."""

    def __init__(self, fd: int, length: int, offset: int) -> None:
        self._map: mmap.mmap | None = mmap.mmap(fd, length, offset=offset)
        self._length = length
        self._hva = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    @property
    def hva(self) -> int:
        """First user virtual address."""
        return self._hva

    @property
    def length(self) -> int:
        """Length in bytes."""
        return self._length

    def _check(self, offset: int, length: int) -> mmap.mmap:
        if self._map is None:
            raise ValueError(f"mapping at hva {self._hva:#x} is closed")
        if offset < 0 or length < 0 or offset + length > self._length:
            raise ValueError(
                f"[{offset:#x}, +{length:#x}] is outside of a mapping of {self._length:#x} bytes"
            )
        return self._map

    def read(self, offset: int, length: int) -> bytes:
        """See :meth:`iokeep.uapi.transport.Mapping.read`."""
        return self._check(offset, length)[offset : offset + length]

    def write(self, offset: int, data: bytes | bytearray | memoryview | NDArray[np.uint8]) -> None:
        """See :meth:`iokeep.uapi.transport.Mapping.write`."""
        raw = data if isinstance(data, bytes | bytearray | memoryview) else data.tobytes()
        view = memoryview(raw).cast("B")
        self._check(offset, len(view))[offset : offset + len(view)] = view

    def numpy(self) -> NDArray[np.uint8] | None:
        """See :meth:`iokeep.uapi.transport.Mapping.numpy`."""
        import numpy as np

        return np.frombuffer(self._check(0, 0), dtype=np.uint8)

    def _words(self, offsets: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.intp]]:
        import numpy as np

        buffer = self._check(0, 0)
        wanted = np.asarray(offsets, dtype=np.uint64)
        whole = self._length // 8 * 8
        if wanted.size and (int(np.bitwise_or.reduce(wanted)) & 7 or int(wanted.max()) + 8 > whole):
            raise ValueError(f"offsets must be 8-byte aligned and inside of {self._length:#x} bytes")
        return np.frombuffer(buffer, dtype=np.uint64, count=whole // 8), wanted.astype(np.intp) >> 3

    def gather64(self, offsets: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """See :meth:`iokeep.uapi.transport.Mapping.gather64`."""
        words, places = self._words(offsets)
        return words[places]

    def scatter64(self, offsets: NDArray[np.uint64], values: NDArray[np.uint64]) -> None:
        """See :meth:`iokeep.uapi.transport.Mapping.scatter64`."""
        words, places = self._words(offsets)
        words[places] = values

    def close(self) -> None:
        """Unmap, at the latest when the last array of numpy() is gone; idempotent."""
        if self._map is not None:
            try:
                self._map.close()
            except BufferError:
                # An array still looks at it: the memory is freed with the last one.
                self._map = None
            self._map = None


class KernelTransport:
    """System calls of the running kernel; implements :class:`iokeep.uapi.transport.Transport`."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
        self._libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong]
        self._libc.syscall.restype = ctypes.c_long

    @property
    def name(self) -> str:
        """Where the calls go."""
        return "kernel"

    @staticmethod
    def _failed(what: str) -> OSError:
        number = ctypes.get_errno()
        return OSError(number, f"{os.strerror(number)}: {what}")

    def open(self, path: str) -> int:
        """See :meth:`iokeep.uapi.transport.Transport.open`.

        :raises CapabilityError: for a device node of iommufd, LUO or VFIO that is missing or forbidden.
        """
        try:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            missing = missing_node(path, error.errno or 0)
            if missing is not None:
                raise missing from error
            raise

    def close(self, fd: int) -> None:
        """See :meth:`iokeep.uapi.transport.Transport.close`."""
        os.close(fd)

    def ioctl(self, fd: int, request: int, arg: ctypes.Structure | int) -> int:
        """See :meth:`iokeep.uapi.transport.Transport.ioctl`.

        libc directly: fcntl.ioctl() copies through a buffer of its own, and what the kernel wrote in spite of
        an error must not depend on that.
        """
        value = self._libc.ioctl(fd, request, arg if isinstance(arg, int) else ctypes.addressof(arg))
        if value < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return int(value)

    def memfd_create(self, name: str, flags: int = 0) -> int:
        """See :meth:`iokeep.uapi.transport.Transport.memfd_create`."""
        return os.memfd_create(name, flags)

    def ftruncate(self, fd: int, length: int) -> None:
        """See :meth:`iokeep.uapi.transport.Transport.ftruncate`."""
        os.ftruncate(fd, length)

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        """See :meth:`iokeep.uapi.transport.Transport.fallocate`."""
        if self._libc.fallocate(fd, mode, offset, length) < 0:
            raise self._failed(f"fallocate of [{offset:#x}, +{length:#x}]")

    def add_seals(self, fd: int, seals: int) -> None:
        """See :meth:`iokeep.uapi.transport.Transport.add_seals`."""
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)

    def get_seals(self, fd: int) -> int:
        """See :meth:`iokeep.uapi.transport.Transport.get_seals`."""
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS)

    def fstat(self, fd: int) -> FileStat:
        """See :meth:`iokeep.uapi.transport.Transport.fstat`."""
        stat = os.fstat(fd)
        return FileStat(stat.st_ino, stat.st_size)

    def lseek(self, fd: int, offset: int, whence: int) -> int:
        """See :meth:`iokeep.uapi.transport.Transport.lseek`."""
        return os.lseek(fd, offset, whence)

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        """See :meth:`iokeep.uapi.transport.Transport.pread`."""
        parts: list[bytes] = []
        at = 0
        while True:
            data = os.pread(fd, length - at, offset + at)
            parts.append(data)
            at += len(data)
            if not data or at >= length:
                return b"".join(parts)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        """See :meth:`iokeep.uapi.transport.Transport.pwrite`."""
        view = memoryview(data)
        at = 0
        while True:
            at += os.pwrite(fd, view[at:], offset + at)
            if at >= len(view):
                return at

    def read(self, fd: int, length: int) -> bytes:
        """See :meth:`iokeep.uapi.transport.Transport.read`."""
        return os.read(fd, length)

    def write(self, fd: int, data: bytes) -> int:
        """See :meth:`iokeep.uapi.transport.Transport.write`."""
        return os.write(fd, data)

    def poll(self, fd: int, events: int) -> int:
        """See :meth:`iokeep.uapi.transport.Transport.poll`."""
        poll = select.poll()
        poll.register(fd, events)
        return next((found for _, found in poll.poll(0)), 0)

    def mmap(self, fd: int, length: int, offset: int = 0) -> KernelMapping:
        """See :meth:`iokeep.uapi.transport.Transport.mmap`."""
        if length <= 0:
            raise OSError(errno.EINVAL, f"{os.strerror(errno.EINVAL)}: mmap of {length:#x} bytes")
        return KernelMapping(fd, length, offset)

    def getfd(self, pid: int, fd: int) -> int:
        """See :meth:`iokeep.uapi.transport.Transport.getfd`."""
        pidfd = os.pidfd_open(pid)
        try:
            got = self._libc.syscall(
                ctypes.c_long(_NR_PIDFD_GETFD), ctypes.c_long(pidfd), ctypes.c_long(fd), ctypes.c_long(0)
            )
            if got < 0:
                raise self._failed(f"pidfd_getfd of descriptor {fd} of process {pid}")
            return int(got)
        finally:
            os.close(pidfd)

    def getpid(self) -> int:
        """See :meth:`iokeep.uapi.transport.Transport.getpid`."""
        return os.getpid()

    def reboot_kexec(self) -> None:
        """Jump into the loaded kernel now, with no shutdown of user space; needs CAP_SYS_BOOT."""
        os.sync()
        if self._libc.reboot(_LINUX_REBOOT_CMD_KEXEC) < 0:
            raise self._failed("reboot(LINUX_REBOOT_CMD_KEXEC)")
