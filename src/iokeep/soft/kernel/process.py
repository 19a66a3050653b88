# SPDX-License-Identifier: Apache-2.0
"""A process as the kernel sees it: descriptors, mappings, and its memory across the system call boundary."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from iokeep.soft.kernel.frames import FRAME_BYTES, I64, Claim
from iokeep.soft.kernel.syserror import SysError

if TYPE_CHECKING:
    from iokeep.soft.kernel.files import File, PageFile
    from iokeep.soft.kernel.kernel import Kernel

#: descriptors a process may have (RLIMIT_NOFILE)
MAX_FDS = 65536
#: memory that a process may lock unless told otherwise (MLOCK_LIMIT of include/uapi/linux/resource.h)
MEMLOCK_BYTES = 8 << 20


class UserMemory(Protocol):
    """The memory of a process, as far as a system call may reach it."""

    def copy_from_user(self, uptr: int, n: int) -> bytes:
        """``n`` bytes at ``uptr``. :raises OSError: EFAULT."""
        ...

    def copy_to_user(self, uptr: int, data: bytes) -> None:
        """Store ``data`` at ``uptr``. :raises OSError: EFAULT."""
        ...


class NoUserMemory:
    """A process with no memory but its mappings: every pointer faults."""

    def copy_from_user(self, uptr: int, n: int) -> bytes:
        """See :class:`UserMemory`."""
        raise OSError(errno.EFAULT, "no user memory")

    def copy_to_user(self, uptr: int, data: bytes) -> None:
        """See :class:`UserMemory`."""
        raise OSError(errno.EFAULT, "no user memory")


#: Consecutive bytes behind a mapping, one row an extent, as the wire's ``EXTENT`` lays it out.
#: ``target`` 0 = physical memory, 1 = registers; ``start`` and ``length`` in bytes.
BACKING = np.dtype([("target", "<u4"), ("pad", "<u4"), ("start", "<u8"), ("length", "<u8")])
Backing = NDArray[np.void]


@dataclass(eq=False, slots=True)
class Vma:
    """A mapping: ``[hva, hva + length)`` shows ``file`` from byte ``offset``.

    Its pages are filled in at mmap, as with MAP_POPULATE, and it holds one reference on each frame as a PTE
    does.

    :param pfns: the frames, int64[pages], or None for registers.
    """

    vma_id: int
    hva: int
    length: int
    file: File
    offset: int
    writable: bool
    pfns: I64 | None
    backing: Backing

    @property
    def last(self) -> int:
        """Last hva of the mapping."""
        return self.hva + self.length - 1


class Process:
    """One client of the kernel.

    :param user: how its memory is reached. :param privileged: it has every capability.
    :ivar ipc_lock: it has CAP_IPC_LOCK. :ivar memlock_bytes: its RLIMIT_MEMLOCK, for one that has not.
    :ivar locked_pages: what is charged to it (VmLck). :ivar pinned_pages: what it has pinned (VmPin).
    """

    def __init__(self, kernel: Kernel, pid: int, user: UserMemory, *, privileged: bool = True) -> None:
        self.kernel = kernel
        self.pid = pid
        self.user = user
        self.privileged = privileged
        self.ipc_lock = privileged
        self.memlock_bytes = MEMLOCK_BYTES
        self.locked_pages = 0
        self.pinned_pages = 0
        self.fds: dict[int, File] = {}
        self.vmas: dict[int, Vma] = {}
        self._next_vma = 1
        self._lowest = 3  # 0, 1 and 2 are the standard streams, which live outside of this kernel

    # ---- descriptors

    def install(self, file: File) -> int:
        """The lowest free descriptor for ``file``; takes over the caller's reference.

        :raises SysError: EMFILE.
        """
        fd = self._lowest
        while fd in self.fds:
            fd += 1
        if fd >= MAX_FDS:
            file.put()
            raise SysError(errno.EMFILE, f"pid {self.pid} has {len(self.fds)} descriptors")
        self.fds[fd] = file
        self._lowest = fd + 1
        return fd

    def file(self, fd: int) -> File:
        """The open file behind ``fd``. :raises SysError: EBADF."""
        try:
            return self.fds[fd]
        except KeyError:
            raise SysError(errno.EBADF, f"fd {fd} is not open in pid {self.pid}") from None

    def close(self, fd: int) -> None:
        """close(2). :raises SysError: EBADF."""
        file = self.file(fd)
        del self.fds[fd]
        self._lowest = min(self._lowest, fd)
        file.flush(self)
        file.put()

    # ---- mappings

    def add_vma(self, hva: int, length: int, file: File, offset: int, *, writable: bool = True) -> Vma:
        """Map ``length`` bytes of ``file`` at ``hva``.

        :raises SysError: what the file refuses, EINVAL, EEXIST.
        """
        if length <= 0 or length % FRAME_BYTES or offset % FRAME_BYTES or hva % FRAME_BYTES or hva < 0:
            raise SysError(errno.EINVAL, f"mmap of {length:#x} bytes at hva {hva:#x}, offset {offset:#x}")
        if hva + length > 1 << 64:
            raise SysError(errno.EINVAL, "mmap past the end of the address space")
        for other in self.vmas.values():
            if hva <= other.last and other.hva <= hva + length - 1:
                raise SysError(errno.EEXIST, f"hva {hva:#x} is mapped already")
        pfns, backing = file.map_pages(offset, length, writable=writable)
        file.get()
        vma = Vma(self._next_vma, hva, length, file, offset, writable, pfns, backing)
        self._next_vma += 1
        self.vmas[vma.vma_id] = vma
        return vma

    def drop_vma(self, vma_id: int) -> None:
        """munmap(2) of one whole mapping. :raises SysError: EINVAL."""
        vma = self.vmas.pop(vma_id, None)
        if vma is None:
            raise SysError(errno.EINVAL, f"no mapping {vma_id} in pid {self.pid}")
        if vma.pfns is not None:
            self.kernel.frames.put(vma.pfns)
        vma.file.unmapped(vma)
        vma.file.put()

    def resolve(self, hva: int, length: int, *, write: bool) -> list[tuple[PageFile, int, int]]:
        """What stands behind user memory, for pinning: (file, byte offset in it, bytes) in order of hva.

        :raises SysError: EFAULT, where something is not mapped, not memory, or read-only and to be written.
        """
        out: list[tuple[PageFile, int, int]] = []
        by_hva = sorted(self.vmas.values(), key=lambda v: v.hva)
        at, end = hva, hva + length
        for vma in by_hva:
            if at >= end:
                break
            if vma.last < at:
                continue
            if vma.hva > at:
                break
            page_file = vma.file.page_file()
            if page_file is None or (write and not vma.writable):
                raise SysError(errno.EFAULT, f"hva {at:#x} is not memory that can be pinned")
            n = min(end, vma.last + 1) - at
            out.append((page_file, vma.offset + at - vma.hva, n))
            at += n
        if at < end:
            raise SysError(errno.EFAULT, f"hva {at:#x} is not mapped in pid {self.pid}")
        return out

    # ---- memory of the process

    def copy_from_user(self, uptr: int, n: int) -> bytes:
        """``n`` bytes of the process's memory. :raises SysError: EFAULT."""
        try:
            data = self.user.copy_from_user(uptr, n)
        except OSError as error:
            raise SysError(errno.EFAULT, f"read of {n} bytes at hva {uptr:#x}: {error}") from error
        if len(data) != n:
            raise SysError(errno.EFAULT, f"read of {n} bytes at hva {uptr:#x} gave {len(data)}")
        return data

    def copy_to_user(self, uptr: int, data: bytes) -> None:
        """Store into the process's memory. :raises SysError: EFAULT."""
        try:
            self.user.copy_to_user(uptr, data)
        except OSError as error:
            raise SysError(errno.EFAULT, f"write of {len(data)} bytes at hva {uptr:#x}: {error}") from error

    # ---- end

    def exit(self) -> None:
        """What do_exit does: drop the mappings (exit_mm), then close the descriptors (exit_files)."""
        for vma_id in list(self.vmas):
            self.drop_vma(vma_id)
        for fd in sorted(self.fds):
            file = self.fds.pop(fd)
            file.flush(self)
            file.put()
        self._lowest = 3

    def claims(self) -> list[Claim]:
        """The frames that the mappings hold."""
        return [
            Claim(f"pid {self.pid} mapping at {vma.hva:#x}", vma.pfns)
            for vma in self.vmas.values()
            if vma.pfns is not None
        ]


def backing_of(pfns: I64) -> Backing:
    """Extents of physical memory behind consecutive pages, adjacent frames joined."""
    if not len(pfns):
        return np.zeros(0, BACKING)
    first = np.flatnonzero(np.concatenate(([True], np.diff(pfns) != 1)))
    rows = np.zeros(len(first), BACKING)
    rows["start"] = pfns[first] * FRAME_BYTES
    rows["length"] = np.diff(np.append(first, len(pfns))) * FRAME_BYTES
    return rows
