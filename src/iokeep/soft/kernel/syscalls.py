# SPDX-License-Identifier: Apache-2.0
"""System calls: one function for each request of the wire, on files of the calling process."""

from __future__ import annotations

import errno
import select
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from iokeep.soft.kernel.files import Anonymous, File, Ioctl, Memfd
from iokeep.soft.kernel.frames import FRAME_BYTES
from iokeep.soft.kernel.process import Process
from iokeep.soft.kernel.syserror import SysError
from iokeep.uapi import wire
from iokeep.uapi.wire import Call, Request, signed

if TYPE_CHECKING:
    from iokeep.soft.kernel.kernel import Kernel

_PATH_MAX = 4096


@dataclass(frozen=True, slots=True)
class Result:
    """What a system call returns: ``value``, and bytes that go back to the caller."""

    value: int = 0
    payload: bytes = b""


class SysErrorWithPayload(SysError):
    """A failed ioctl whose structure is copied out all the same."""

    def __init__(self, error: SysError, payload: bytes) -> None:
        super().__init__(error.errno, error.why, respond=True)
        self.payload = payload


def syscall(kernel: Kernel, process: Process, request: Request) -> Result:
    """Serve one request. :raises SysError: the errno that the caller gets."""
    handler = _CALLS.get(request.call)
    if handler is None:
        raise SysError(errno.ENOSYS, f"call {request.call.name}")
    return handler(kernel, process, request)


def _text(payload: bytes, limit: int) -> str:
    if len(payload) > limit or b"\0" in payload:
        raise SysError(errno.EINVAL, f"a name of {len(payload)} bytes")
    try:
        return payload.decode()
    except UnicodeDecodeError as error:
        raise SysError(errno.EINVAL, f"a name that is not UTF-8: {payload[:32]!r}") from error


def _open(kernel: Kernel, process: Process, request: Request) -> Result:
    if len(request.payload) >= _PATH_MAX:
        raise SysError(errno.ENAMETOOLONG, f"a path of {len(request.payload)} bytes")
    path = _text(request.payload, _PATH_MAX)
    node = kernel.device_nodes.get(path)
    if node is None:
        raise SysError(errno.ENOENT, path)
    return Result(process.install(node(process)))


def _close(kernel: Kernel, process: Process, request: Request) -> Result:
    process.close(request.fd)
    return Result()


def _ioctl(kernel: Kernel, process: Process, request: Request) -> Result:
    file = process.file(request.fd)
    call = Ioctl(process, request.args[0] & 0xFFFFFFFF, request.payload)
    handler = kernel.ioctl_handler(file, call.request)
    # The file stays while the call runs, as fdget keeps it, even if the call closes it.
    file.get()
    try:
        value = handler(file, call) if handler is not None else file.ioctl(call)
    except SysError as error:
        if error.respond:
            raise SysErrorWithPayload(error, call.response) from error
        raise
    finally:
        file.put()
    return Result(value, call.response)


def _memfd_create(kernel: Kernel, process: Process, request: Request) -> Result:
    name = _text(request.payload, _PATH_MAX)
    return Result(process.install(Memfd.create(kernel, name, request.args[0])))


def _ftruncate(kernel: Kernel, process: Process, request: Request) -> Result:
    process.file(request.fd).ftruncate(signed(request.args[0]))
    return Result()


def _fallocate(kernel: Kernel, process: Process, request: Request) -> Result:
    mode, offset, length = request.args
    process.file(request.fd).fallocate(mode, signed(offset), signed(length))
    return Result()


def _add_seals(kernel: Kernel, process: Process, request: Request) -> Result:
    process.file(request.fd).add_seals(request.args[0])
    return Result()


def _get_seals(kernel: Kernel, process: Process, request: Request) -> Result:
    return Result(process.file(request.fd).get_seals())


def _fstat(kernel: Kernel, process: Process, request: Request) -> Result:
    file = process.file(request.fd)
    return Result(0, struct.pack("<QQ", file.ino, file.size))


def _lseek(kernel: Kernel, process: Process, request: Request) -> Result:
    offset, whence = request.args
    return Result(process.file(request.fd).lseek(signed(offset), whence))


def _pread(kernel: Kernel, process: Process, request: Request) -> Result:
    offset, length = request.args
    # A longer read is short, as one past MAX_RW_COUNT is.
    return Result(0, process.file(request.fd).pread(min(length, wire.MAX_PAYLOAD), signed(offset)))


def _pwrite(kernel: Kernel, process: Process, request: Request) -> Result:
    return Result(process.file(request.fd).pwrite(request.payload, signed(request.args[0])))


def _read(kernel: Kernel, process: Process, request: Request) -> Result:
    return Result(0, process.file(request.fd).read(min(request.args[0], wire.MAX_PAYLOAD)))


def _write(kernel: Kernel, process: Process, request: Request) -> Result:
    return Result(process.file(request.fd).write(request.payload))


def _poll(kernel: Kernel, process: Process, request: Request) -> Result:
    file = process.fds.get(request.fd)
    return Result(select.POLLNVAL if file is None else file.poll() & request.args[0])


def _mmap(kernel: Kernel, process: Process, request: Request) -> Result:
    offset, length, hva = request.args
    length = -(-length // FRAME_BYTES) * FRAME_BYTES
    if not 0 < length <= kernel.frames.ram.size + kernel.platform.regs_bytes:
        raise SysError(errno.ENOMEM if length else errno.EINVAL, f"mmap of {length:#x} bytes")
    file: File
    if request.fd == -1:
        file, offset = Anonymous(kernel, length), 0
        try:
            vma = process.add_vma(hva, length, file, 0)
        finally:
            file.put()  # the mapping alone keeps it
    else:
        vma = process.add_vma(hva, length, process.file(request.fd), offset)
    return Result(vma.vma_id, vma.backing.tobytes())


def _munmap(kernel: Kernel, process: Process, request: Request) -> Result:
    process.drop_vma(request.args[0])
    return Result()


def _getfd(kernel: Kernel, process: Process, request: Request) -> Result:
    """pidfd_open(2) and pidfd_getfd(2)."""
    if not process.privileged:
        raise SysError(errno.EPERM, "pidfd_getfd needs PTRACE_MODE_ATTACH_REALCREDS")
    other = kernel.processes.get(request.args[0])
    if other is None:
        raise SysError(errno.ESRCH, f"no process {request.args[0]}")
    return Result(process.install(other.file(request.fd).get()))


def _getpid(kernel: Kernel, process: Process, request: Request) -> Result:
    return Result(process.pid)


def _reboot_kexec(kernel: Kernel, process: Process, request: Request) -> Result:
    if not process.privileged:
        raise SysError(errno.EPERM, "reboot needs CAP_SYS_BOOT")
    kernel.reboot_kexec()
    return Result()


_CALLS: dict[Call, Callable[[Kernel, Process, Request], Result]] = {
    Call.OPEN: _open,
    Call.CLOSE: _close,
    Call.IOCTL: _ioctl,
    Call.MEMFD_CREATE: _memfd_create,
    Call.FTRUNCATE: _ftruncate,
    Call.FALLOCATE: _fallocate,
    Call.ADD_SEALS: _add_seals,
    Call.GET_SEALS: _get_seals,
    Call.FSTAT: _fstat,
    Call.LSEEK: _lseek,
    Call.PREAD: _pread,
    Call.PWRITE: _pwrite,
    Call.READ: _read,
    Call.WRITE: _write,
    Call.POLL: _poll,
    Call.MMAP: _mmap,
    Call.MUNMAP: _munmap,
    Call.GETFD: _getfd,
    Call.GETPID: _getpid,
    Call.REBOOT_KEXEC: _reboot_kexec,
}
