# SPDX-License-Identifier: Apache-2.0
"""The one face under the client libraries: system calls, on the real kernel or on the software host.

Every method fails with OSError(errno, strerror), as the system call of its name does; nothing here knows an
ioctl.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import ctypes

    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class FileStat:
    """What fstat(2) says, as far as a client needs it.

    :param st_ino: inode number.
    :param st_size: size in bytes.
    """

    st_ino: int
    st_size: int


@runtime_checkable
class Mapping(Protocol):
    """A shared mapping of a file or of anonymous memory.

    ``hva`` is what the kernel of this transport takes as a user virtual address (IOMMU_IOAS_MAP); on the
    software host nothing can be read there directly: use read and write. Offsets and lengths are bytes.
    """

    @property
    def hva(self) -> int:
        """First user virtual address."""
        ...

    @property
    def length(self) -> int:
        """Length in bytes."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Copy bytes out; ValueError outside of the mapping."""
        ...

    def write(self, offset: int, data: bytes | bytearray | memoryview | NDArray[np.uint8]) -> None:
        """Copy bytes in; ValueError outside of the mapping."""
        ...

    def numpy(self) -> NDArray[np.uint8] | None:
        """A writable view of all bytes when they lie in one piece, else None (then use read, write)."""
        ...

    def gather64(self, offsets: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """64-bit words at 8-byte aligned byte offsets, uint64[n] -> uint64[n]; ValueError otherwise."""
        ...

    def scatter64(self, offsets: NDArray[np.uint64], values: NDArray[np.uint64]) -> None:
        """Store 64-bit words at 8-byte aligned byte offsets, as gather64 reads them."""
        ...

    def close(self) -> None:
        """Unmap; idempotent."""
        ...


class Transport(Protocol):
    """System calls of one process.

    The software host implements the same calls with the same errno for the same cause.
    """

    @property
    def name(self) -> str:
        """Where the calls go, for messages: "kernel" or "soft:PATH"."""
        ...

    def open(self, path: str) -> int:
        """open(2) with O_RDWR | O_CLOEXEC."""
        ...

    def close(self, fd: int) -> None:
        """close(2)."""
        ...

    def ioctl(self, fd: int, request: int, arg: ctypes.Structure | int) -> int:
        """ioctl(2); *arg* is changed where the kernel writes it, for some requests also on an error.

        A number is passed by value, as VFIO_CHECK_EXTENSION takes it.
        """
        ...

    def memfd_create(self, name: str, flags: int = 0) -> int:
        """memfd_create(2)."""
        ...

    def ftruncate(self, fd: int, length: int) -> None:
        """ftruncate(2), bytes."""
        ...

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        """fallocate(2), bytes; *mode* as FALLOC_FL_*."""
        ...

    def add_seals(self, fd: int, seals: int) -> None:
        """fcntl(2) F_ADD_SEALS."""
        ...

    def get_seals(self, fd: int) -> int:
        """fcntl(2) F_GET_SEALS."""
        ...

    def fstat(self, fd: int) -> FileStat:
        """fstat(2)."""
        ...

    def lseek(self, fd: int, offset: int, whence: int) -> int:
        """lseek(2)."""
        ...

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        """pread(2) until *length* bytes or the end of the file."""
        ...

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        """pwrite(2) of all bytes; the number written."""
        ...

    def read(self, fd: int, length: int) -> bytes:
        """One read(2) of at most *length* bytes, at the file's position or of what a queue has."""
        ...

    def write(self, fd: int, data: bytes) -> int:
        """One write(2) of *data*, less than 16 MiB; the number of bytes that it took."""
        ...

    def poll(self, fd: int, events: int) -> int:
        """Which of *events* (select.POLL*) are there now: poll(2) that does not wait; POLLNVAL of no file."""
        ...

    def mmap(self, fd: int, length: int, offset: int = 0) -> Mapping:
        """mmap(2), MAP_SHARED, read and write; *fd* -1 is anonymous memory."""
        ...

    def getfd(self, pid: int, fd: int) -> int:
        """pidfd_getfd(2): a duplicate of another process's descriptor; *pid* is what its getpid() says."""
        ...

    def getpid(self) -> int:
        """This process as other processes of the same kernel name it."""
        ...

    def reboot_kexec(self) -> None:
        """reboot(2) with LINUX_REBOOT_CMD_KEXEC; returns only where the caller outlives the old kernel."""
        ...
