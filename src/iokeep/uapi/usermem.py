# SPDX-License-Identifier: Apache-2.0
"""This process's own memory by virtual address, as a kernel's copy_from_user and copy_to_user reach it.

process_vm_readv(2) and process_vm_writev(2) on the own pid honour page protections and turn a bad pointer
into EFAULT instead of a signal. Where a sandbox forbids them, /proc/self/mem serves (it writes through
read-only pages).
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Protocol


class UserMemory(Protocol):
    """Memory of a process by user virtual address."""

    def copy_from(self, uptr: int, length: int) -> bytes:
        """Bytes at [uptr, uptr + length - 1]; OSError(EFAULT) unless all are readable."""
        ...

    def copy_to(self, uptr: int, data: bytes) -> None:
        """Write bytes at uptr; OSError(EFAULT) unless all are writable (a first part may be written)."""
        ...


class _Iovec(ctypes.Structure):
    _fields_ = [("iov_base", ctypes.c_void_p), ("iov_len", ctypes.c_size_t)]


def _fault(uptr: int, length: int) -> OSError:
    return OSError(errno.EFAULT, f"{os.strerror(errno.EFAULT)}: user memory at {uptr:#x} (+{length:#x})")


class OwnMemory:
    """Memory of this process."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._proc_mem = False
        for name in ("process_vm_readv", "process_vm_writev"):
            if not hasattr(self._libc, name):
                self._proc_mem = True
                continue
            function = getattr(self._libc, name)
            function.restype = ctypes.c_ssize_t
            one, count = ctypes.POINTER(_Iovec), ctypes.c_ulong
            function.argtypes = [ctypes.c_int, one, count, one, count, ctypes.c_ulong]

    def _move(self, name: str, local: int, uptr: int, length: int) -> bool:
        """Whether all bytes moved; raises PermissionError where the call itself is forbidden."""
        here, there = _Iovec(local, length), _Iovec(uptr, length)
        while True:
            done = getattr(self._libc, name)(os.getpid(), ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
            if done >= 0:
                return bool(done == length)
            number = ctypes.get_errno()
            if number in (errno.EPERM, errno.ENOSYS):
                raise PermissionError(number, os.strerror(number))
            if number != errno.EINTR:
                return False

    @staticmethod
    def _check(uptr: int, length: int) -> None:
        # pread(2) takes an s64; no user pointer of a 64-bit Linux has the top bit set.
        if uptr < 0 or uptr + length > 1 << 63:
            raise _fault(uptr, length)

    def copy_from(self, uptr: int, length: int) -> bytes:
        """See :meth:`UserMemory.copy_from`."""
        self._check(uptr, length)
        if not length:
            return b""
        if not self._proc_mem:
            into = ctypes.create_string_buffer(length)
            try:
                if not self._move("process_vm_readv", ctypes.addressof(into), uptr, length):
                    raise _fault(uptr, length)
            except PermissionError:
                self._proc_mem = True
            else:
                return into.raw
        fd = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.pread(fd, length, uptr)
        except OSError as error:
            raise _fault(uptr, length) from error
        finally:
            os.close(fd)
        if len(data) != length:
            raise _fault(uptr, length)
        return data

    def copy_to(self, uptr: int, data: bytes) -> None:
        """See :meth:`UserMemory.copy_to`."""
        self._check(uptr, len(data))
        if not data:
            return
        if not self._proc_mem:
            source = ctypes.c_char_p(data)
            local = ctypes.cast(source, ctypes.c_void_p).value
            assert local is not None
            try:
                if not self._move("process_vm_writev", local, uptr, len(data)):
                    raise _fault(uptr, len(data))
            except PermissionError:
                self._proc_mem = True
            else:
                return
        fd = os.open("/proc/self/mem", os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.pwrite(fd, data, uptr) != len(data):
                raise _fault(uptr, len(data))
        except OSError as error:
            raise _fault(uptr, len(data)) from error
        finally:
            os.close(fd)
