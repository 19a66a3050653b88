# SPDX-License-Identifier: Apache-2.0
"""Open files: what every file can do, and memory files (memfd and anonymous memory) with their frames.

Rules of memfd follow mm/shmem.c and mm/memfd.c of Linux.
"""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from iokeep.soft.kernel.frames import BLOCK, FRAME_BYTES, I64, Claim, FrameRuns, Kind, OutOfMemory
from iokeep.soft.kernel.placement import Placement
from iokeep.soft.kernel.process import Backing, Process, Vma, backing_of
from iokeep.soft.kernel.syserror import SysError

if TYPE_CHECKING:
    from iokeep.soft.kernel.kernel import Kernel

# include/uapi/linux/fcntl.h
F_SEAL_SEAL = 0x0001
F_SEAL_SHRINK = 0x0002
F_SEAL_GROW = 0x0004
F_SEAL_WRITE = 0x0008
F_SEAL_FUTURE_WRITE = 0x0010
F_SEAL_EXEC = 0x0020
F_ALL_SEALS = 0x003F
# include/uapi/linux/memfd.h
MFD_CLOEXEC = 0x0001
MFD_ALLOW_SEALING = 0x0002
MFD_NOEXEC_SEAL = 0x0008
MFD_EXEC = 0x0010
MFD_KNOWN = MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL | MFD_EXEC
#: mm/memfd.c MFD_NAME_MAX_LEN = NAME_MAX - strlen("memfd:"), without the NUL
MFD_NAME_MAX = 249
# include/uapi/linux/falloc.h
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
#: MAX_LFS_FILESIZE on 64 bit
MAX_FILE_BYTES = 2**63 - 1
#: runs of consecutive frames are found for the whole file where more than one of so many pages is asked for
_SHARE = 8
#: bytes that one pread or pwrite moves (MAX_RW_COUNT)
MAX_RW_BYTES = 0x7FFFF000


@dataclass(slots=True)
class Ioctl:
    """One ioctl on its way through a file.

    :param raw: the argument structure as the process sent it. ``response`` is what is copied back into it.
    """

    process: Process
    request: int
    raw: bytes
    response: bytes = field(default=b"")

    @property
    def kernel(self) -> Kernel:
        """The kernel that serves the call."""
        return self.process.kernel

    def respond(self, struct: object) -> None:
        """Copy a ctypes structure (or bytes) out into the caller's argument."""
        data = bytes(struct)  # type: ignore[call-overload]
        self.response = data[: len(self.raw)]


class File:
    """An open file: shared by every descriptor that was duplicated from it, and by whoever holds a reference.

    Subclasses override what they can do; the defaults are the errnos of a file that cannot.
    """

    #: for messages and fstat: what sort of file this is
    kind_name: ClassVar[str] = "file"

    def __init__(self, kernel: Kernel, name: str) -> None:
        self.kernel = kernel
        self.name = name
        self.ino = kernel.frames.new_ino()
        self.pos = 0
        self._references = 1
        kernel.files[self.ino] = self

    @property
    def references(self) -> int:
        """References from descriptors, mappings, iommufd pages, sessions."""
        return self._references

    def get(self) -> File:
        """One more reference."""
        if self._references <= 0:
            raise AssertionError(f"{self.name}: a reference on a released file")
        self._references += 1
        return self

    def put(self) -> None:
        """One reference less; the last one releases the file."""
        if self._references <= 0:
            raise AssertionError(f"{self.name}: released twice")
        self._references -= 1
        if self._references == 0:
            self.release()
            del self.kernel.files[self.ino]

    def flush(self, process: Process) -> None:
        """A descriptor of ``process`` is closed (f_op->flush)."""

    def release(self) -> None:
        """The last reference is gone (f_op->release)."""

    def claims(self) -> Iterable[Claim]:
        """The frames that this file holds."""
        return ()

    def page_file(self) -> PageFile | None:
        """The memory behind a mapping of this file, where its pages can be pinned."""
        return None

    @property
    def size(self) -> int:
        """st_size."""
        return 0

    def ioctl(self, call: Ioctl) -> int:
        """ioctl(2)."""
        raise SysError(errno.ENOTTY, f"{self.kind_name} has no ioctl {call.request:#x}")

    def pread(self, length: int, offset: int) -> bytes:
        """pread(2)."""
        raise SysError(errno.EINVAL, f"{self.kind_name} cannot be read")

    def pwrite(self, data: bytes, offset: int) -> int:
        """pwrite(2)."""
        raise SysError(errno.EINVAL, f"{self.kind_name} cannot be written")

    def read(self, length: int) -> bytes:
        """read(2): from the position on, which moves."""
        data = self.pread(length, self.pos)
        self.pos += len(data)
        return data

    def write(self, data: bytes) -> int:
        """write(2): to the position on, which moves."""
        done = self.pwrite(data, self.pos)
        self.pos += done
        return done

    def poll(self) -> int:
        """What is ready, as poll(2) says it (POLL*); a file that has no poll of its own always is."""
        return select.POLLIN | select.POLLOUT | select.POLLRDNORM | select.POLLWRNORM

    def lseek(self, offset: int, whence: int) -> int:
        """lseek(2)."""
        raise SysError(errno.ESPIPE, f"{self.kind_name} has no position")

    def ftruncate(self, length: int) -> None:
        """ftruncate(2)."""
        raise SysError(errno.EINVAL, f"{self.kind_name} has no size")

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        """fallocate(2)."""
        raise SysError(errno.ENODEV, f"{self.kind_name} has no blocks")

    def add_seals(self, seals: int) -> None:
        """fcntl(F_ADD_SEALS)."""
        raise SysError(errno.EINVAL, f"{self.kind_name} has no seals")

    def get_seals(self) -> int:
        """fcntl(F_GET_SEALS)."""
        raise SysError(errno.EINVAL, f"{self.kind_name} has no seals")

    def map_pages(self, offset: int, length: int, *, writable: bool) -> tuple[I64 | None, Backing]:
        """Frames (each with a new reference) and backing of a new mapping."""
        raise SysError(errno.ENODEV, f"{self.kind_name} cannot be mapped")

    def unmapped(self, vma: Vma) -> None:
        """A mapping of this file is gone; its frames were put already."""


class DebugFile(File):
    """A read-only file whose content is made at open, as a seq_file's is."""

    kind_name = "debug file"

    def __init__(self, kernel: Kernel, name: str, content: Callable[[], bytes]) -> None:
        super().__init__(kernel, name)
        self._content = content()

    @property
    def size(self) -> int:
        """Bytes of the content."""
        return len(self._content)

    def pread(self, length: int, offset: int) -> bytes:
        """pread(2)."""
        if length < 0 or offset < 0:
            raise SysError(errno.EINVAL, f"pread of {length} bytes at {offset}")
        return self._content[offset : offset + length]

    def lseek(self, offset: int, whence: int) -> int:
        """lseek(2)."""
        return _seek(self, offset, whence)


class SysrqCrash(Exception):
    """Somebody wrote "c" to /proc/sysrq-trigger."""


class SysrqFile(File):
    """/proc/sysrq-trigger, one command: "c" crashes the kernel (drivers/tty/sysrq.c, sysrq_handle_crash)."""

    kind_name = "sysrq-trigger"

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel, "sysrq-trigger")

    def pwrite(self, data: bytes, offset: int) -> int:
        """Crash at "c". Other commands do nothing here."""
        if data[:1] == b"c":
            raise SysrqCrash("sysrq triggered crash")
        return len(data)


def _seek(file: File, offset: int, whence: int) -> int:
    if whence == os.SEEK_SET:
        at = offset
    elif whence == os.SEEK_CUR:
        at = file.pos + offset
    elif whence == os.SEEK_END:
        at = file.size + offset
    else:
        raise SysError(errno.EINVAL, f"lseek whence {whence}")
    if not 0 <= at <= MAX_FILE_BYTES:
        raise SysError(errno.EINVAL, f"lseek to {at:#x}")
    file.pos = at
    return at


class PageFile(File):
    """Memory by page: frames are taken when a page is first touched, from the places that its placement
    chose.

    ``pfns`` int64[pages of the size, rounded up] holds the frame of each page, -1 = hole.
    """

    frame_kind: ClassVar[Kind] = Kind.ANON

    def __init__(self, kernel: Kernel, name: str, placement: Placement) -> None:
        super().__init__(kernel, name)
        self.placement = placement
        self.pfns: I64 = np.zeros(0, np.int64)
        self._plan: I64 = np.zeros(0, np.int64)
        #: where runs of pages with consecutive frames begin, and their first frames; None = to be found
        self._runs: tuple[I64, I64] | None = None
        self._size = 0

    @property
    def tag(self) -> int:
        """Owner tag of the frames."""
        return self.ino

    @property
    def size(self) -> int:
        """st_size."""
        return self._size

    @property
    def n_pages(self) -> int:
        """Pages that the size spans."""
        return len(self.pfns)

    def page_file(self) -> PageFile | None:
        """Its pages can be pinned."""
        return self

    def claims(self) -> Iterable[Claim]:
        """One reference on each present page, as the page cache has."""
        yield Claim(f"{self.kind_name} {self.name}", self.pfns[self.pfns >= 0], tag=self.tag)

    def release(self) -> None:
        """The pages go back."""
        self._resize(0)

    def fault(self, first: int, last: int) -> I64:
        """Frames of the pages ``first`` ... ``last`` (closed), holes filled with zeroed frames.

        :raises SysError: ENOMEM; EFAULT past the end of the file (a mapping's SIGBUS).
        """
        if first < 0 or last >= len(self.pfns) or first > last:
            raise SysError(errno.EFAULT, f"{self.name}: pages {first} ... {last} of {len(self.pfns)}")
        view = self.pfns[first : last + 1]
        holes = np.flatnonzero(view < 0)
        if len(holes):
            self._fill(holes + first)
        return self.pfns[first : last + 1].copy()

    def runs(self, first: int, last: int) -> FrameRuns:
        """As :meth:`fault`, as runs of frames. O(runs), not O(pages), while no page comes or goes.

        :raises SysError: as :meth:`fault`.
        """
        if first < 0 or last >= len(self.pfns) or first > last:
            raise SysError(errno.EFAULT, f"{self.name}: pages {first} ... {last} of {len(self.pfns)}")
        if self._runs is None and (last - first + 1) * _SHARE < len(self.pfns):
            return FrameRuns.of(self.fault(first, last))  # less work than to go through the file
        starts, pfns = self._run_index()
        a = int(np.searchsorted(starts, first, side="right")) - 1
        b = int(np.searchsorted(starts, last, side="right"))
        if int(pfns[a:b].min()) < 0:
            return FrameRuns.of(self.fault(first, last))
        begin, pfn = starts[a:b].copy(), pfns[a:b].copy()
        pfn[0] += first - int(begin[0])
        begin[0] = first
        return FrameRuns(pfn, np.diff(begin, append=last + 1))

    def _run_index(self) -> tuple[I64, I64]:
        if self._runs is None:
            # Pages of a run have one distance to their frames; holes have one that none has.
            distance = self.pfns - np.arange(len(self.pfns))
            distance[self.pfns < 0] = -(1 << 62)
            starts = np.flatnonzero(np.diff(distance, prepend=distance[:1] - 1))
            self._runs = starts, self.pfns[starts]
        return self._runs

    def _fill(self, pages: I64) -> None:
        frames = self.kernel.frames
        wanted = self._plan[pages]
        blocks = self._whole_blocks(pages, wanted)
        if blocks is not None:
            pages = blocks
            wanted = self._plan[pages]
        usable = wanted >= 0
        usable[usable] = frames.kind[wanted[usable]] == Kind.FREE
        try:
            if not usable.all():
                if self.placement.listed is not None:
                    page = int(pages[np.flatnonzero(~usable)[0]])
                    raise OutOfMemory(
                        f"the listed frame {int(self._plan[page]):#x} of page {page} is not free"
                    )
                mine = wanted[usable]
                frames.planned[mine] = True
                wanted[~usable] = frames.alloc(
                    int(np.count_nonzero(~usable)), self.tag, self.frame_kind, zero=False
                )
                frames.claim(mine, self.tag, self.frame_kind)
            else:
                frames.claim(wanted, self.tag, self.frame_kind)
        except OutOfMemory as error:
            raise SysError(errno.ENOMEM, f"{self.name}: {error}") from error
        frames.words[wanted] = 0
        self.pfns[pages] = wanted
        self._runs = None

    def _whole_blocks(self, pages: I64, wanted: I64) -> I64 | None:
        """Pages to fill at once: a 2 MiB block comes as one huge page, as with shmem's huge=within_size."""
        if len(pages) == 0 or len(self._plan) < BLOCK:
            return None
        numbers = np.unique(pages // BLOCK)
        numbers = numbers[(numbers + 1) * BLOCK <= len(self._plan)]
        if not len(numbers):
            return None
        plan = self._plan[: len(self._plan) // BLOCK * BLOCK].reshape(-1, BLOCK)[numbers]
        huge = (plan[:, 0] >= 0) & (plan[:, 0] % BLOCK == 0)
        huge &= (np.diff(plan, axis=1) == 1).all(axis=1)
        if not huge.any():
            return None
        more = (numbers[huge][:, None] * BLOCK + np.arange(BLOCK, dtype=np.int64)[None, :]).reshape(-1)
        more = more[self.pfns[more] < 0]
        return np.union1d(pages, more)

    def _resize(self, size: int) -> None:
        """Set the size: frees pages past the end, zeroes the tail of the last one, plans new ones."""
        frames = self.kernel.frames
        old, new = len(self.pfns), -(-size // FRAME_BYTES)
        self._runs = None
        if new > old:
            try:
                plan = self.placement.plan(frames, new - old, old)
            except OutOfMemory as error:
                raise SysError(errno.ENOMEM, f"{self.name}: {error}") from error
            self._plan = np.concatenate((self._plan, plan))
            self.pfns = np.concatenate((self.pfns, np.full(new - old, -1, np.int64)))
        elif new < old:
            gone = self.pfns[new:]
            holes = gone < 0
            frames.planned[self._plan[new:][holes]] = False
            self.pfns = self.pfns[:new].copy()
            self._plan = self._plan[:new].copy()
            frames.put(gone[~holes])
        if size < self._size and size % FRAME_BYTES and new and self.pfns[new - 1] >= 0:
            pa = int(self.pfns[new - 1]) * FRAME_BYTES
            frames.ram.bytes[pa + size % FRAME_BYTES : pa + FRAME_BYTES] = 0
        self._size = size

    def adopt_pages(self, size: int, pages: I64, pfns: I64) -> None:
        """Set size and pages of an empty file whose frames this file owns already (kind and tag set by the
        caller).

        Used where a file comes over the kexec: ``pages`` int64[n] are page numbers, ``pfns`` their frames.
        """
        n = -(-size // FRAME_BYTES)
        if len(self.pfns) or (len(pages) and not 0 <= int(pages.min()) <= int(pages.max()) < n):
            raise AssertionError(f"{self.name}: pages to adopt do not fit {n} pages")
        self.pfns = np.full(n, -1, np.int64)
        self.pfns[pages] = pfns
        self._plan = np.full(n, -1, np.int64)
        self._plan[pages] = pfns
        self._size = size
        self._runs = None
        self._run_index()  # now, and not when an IOAS is adopted

    def read_bytes(self, offset: int, length: int) -> bytes:
        """Bytes of the file (holes read as zeros), not past its end."""
        length = max(0, min(length, self._size - offset))
        if not length:
            return b""
        first, last = offset // FRAME_BYTES, (offset + length - 1) // FRAME_BYTES
        pfns = self.pfns[first : last + 1]
        out = np.zeros((len(pfns), FRAME_BYTES // 8), np.uint64)
        present = pfns >= 0
        out[present] = self.kernel.frames.words[pfns[present]]
        skip = offset - first * FRAME_BYTES
        return out.reshape(-1).view(np.uint8)[skip : skip + length].tobytes()

    def write_bytes(self, offset: int, data: bytes) -> None:
        """Store bytes inside the file's size; holes are filled. :raises SysError: ENOMEM."""
        if not data:
            return
        first, last = offset // FRAME_BYTES, (offset + len(data) - 1) // FRAME_BYTES
        self.kernel.frames.write(self.fault(first, last), offset - first * FRAME_BYTES, data)

    def map_pages(self, offset: int, length: int, *, writable: bool) -> tuple[I64 | None, Backing]:
        """A mapping: every page is filled in now.

        :raises SysError: EFAULT past the end (SIGBUS later, in Linux).
        """
        pfns = self.fault(offset // FRAME_BYTES, (offset + length - 1) // FRAME_BYTES)
        self.kernel.frames.get(pfns)
        return pfns, backing_of(pfns)


class Anonymous(PageFile):
    """Private anonymous memory behind one mapping."""

    kind_name = "anonymous memory"
    frame_kind = Kind.ANON

    def __init__(self, kernel: Kernel, length: int) -> None:
        super().__init__(kernel, "anon", kernel.placement)
        try:
            self._resize(length)
        except SysError:
            del kernel.files[self.ino]
            raise


class Memfd(PageFile):
    """A memfd: a shmem file without a name in any directory.

    ``preserved`` is set while a live update session holds it: its size and its pages are then frozen (EPERM).
    """

    kind_name = "memfd"
    frame_kind = Kind.MEMFD

    def __init__(self, kernel: Kernel, name: str, flags: int = 0) -> None:
        super().__init__(kernel, name, kernel.placement_of(name))
        self.flags = flags
        # mm/memfd.c alloc_file: without MFD_ALLOW_SEALING the file is sealed against seals
        self.seals = 0 if flags & (MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL) else F_SEAL_SEAL
        if flags & MFD_NOEXEC_SEAL:
            self.seals |= F_SEAL_EXEC
        self.preserved = False
        #: adopted tables that are not proved yet, and whose areas show this file: it keeps its pages (EBUSY)
        self.holders = 0
        #: mappings that may write, which F_SEAL_WRITE waits for (i_mmap_writable)
        self.writable_maps = 0

    @classmethod
    def create(cls, kernel: Kernel, name: str, flags: int) -> Memfd:
        """memfd_create(2). :raises SysError: EINVAL."""
        if flags & ~MFD_KNOWN or (flags & MFD_EXEC and flags & MFD_NOEXEC_SEAL):
            raise SysError(errno.EINVAL, f"memfd_create flags {flags:#x}")
        if len(name.encode()) > MFD_NAME_MAX or "\0" in name:
            raise SysError(errno.EINVAL, f"memfd name of {len(name.encode())} bytes")
        return cls(kernel, name, flags)

    # ---- size

    def ftruncate(self, length: int) -> None:
        """ftruncate(2); shmem_setattr. :raises SysError: EINVAL, EPERM, EFBIG, ENOMEM."""
        if length < 0:
            raise SysError(errno.EINVAL, f"ftruncate to {length}")
        if (length < self._size and self.seals & F_SEAL_SHRINK) or (
            length > self._size and self.seals & F_SEAL_GROW
        ):
            raise SysError(errno.EPERM, f"{self.name}: sealed, size {self._size:#x}, wanted {length:#x}")
        if self.preserved and length != self._size:
            raise SysError(errno.EPERM, f"{self.name}: preserved, its size is frozen")
        if length < self._size:
            self._check_held()
        self._check_fits(length)
        self._resize(length)

    def _check_held(self) -> None:
        if self.holders:
            raise SysError(errno.EBUSY, f"{self.name}: unproved IO page tables show its pages to devices")

    def _check_fits(self, length: int) -> None:
        # The plan costs memory per page, so a size that this machine cannot hold twice over is refused.
        if length > 2 * self.kernel.frames.n_frames * FRAME_BYTES:
            raise SysError(
                errno.EFBIG, f"{self.name}: {length:#x} bytes, RAM has {self.kernel.frames.ram.size:#x}"
            )

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        """fallocate(2); shmem_fallocate. :raises SysError: EINVAL, EOPNOTSUPP, EPERM, EFBIG, ENOMEM."""
        if offset < 0 or length <= 0:
            raise SysError(errno.EINVAL, f"fallocate of {length:#x} bytes at {offset:#x}")
        if mode & ~(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE):
            raise SysError(errno.EOPNOTSUPP, f"fallocate mode {mode:#x}")
        if mode & FALLOC_FL_PUNCH_HOLE and not mode & FALLOC_FL_KEEP_SIZE:
            raise SysError(errno.EOPNOTSUPP, "FALLOC_FL_PUNCH_HOLE needs FALLOC_FL_KEEP_SIZE")
        if offset + length > MAX_FILE_BYTES:
            raise SysError(errno.EFBIG, f"fallocate to {offset + length:#x}")
        if mode & FALLOC_FL_PUNCH_HOLE:
            self._punch(offset, min(offset + length, self._size))
            return
        end = offset + length
        if end > self._size:
            if mode & FALLOC_FL_KEEP_SIZE:
                end = self._size  # pages past the end would be freed at release anyway; none are kept here
            else:
                self._grow(end)
        if offset < end:
            self.fault(offset // FRAME_BYTES, (end - 1) // FRAME_BYTES)

    def _grow(self, size: int) -> None:
        if self.seals & F_SEAL_GROW:
            raise SysError(errno.EPERM, f"{self.name}: sealed against growing")
        if self.preserved:
            raise SysError(errno.EPERM, f"{self.name}: preserved, its size is frozen")
        self._check_fits(size)
        self._resize(size)

    def _punch(self, offset: int, end: int) -> None:
        if self.seals & (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE):
            raise SysError(errno.EPERM, f"{self.name}: sealed against writes")
        if self.preserved:
            raise SysError(errno.EPERM, f"{self.name}: preserved, its pages are frozen")
        if offset >= end:
            return
        self._check_held()
        first, last = -(-offset // FRAME_BYTES), end // FRAME_BYTES - 1
        if end == self._size:
            last = self.n_pages - 1  # the partial last page is wholly in the hole
        if first <= last:
            frames = self.kernel.frames
            gone = self.pfns[first : last + 1].copy()
            self.pfns[first : last + 1] = -1
            self._runs = None
            frames.put(gone[gone >= 0])
            plan = self._plan[first : last + 1]
            frames.planned[plan[frames.kind[plan] == Kind.FREE]] = True
        self._zero_edges(offset, end, first, last)

    def _zero_edges(self, offset: int, end: int, first: int, last: int) -> None:
        for start, stop in (
            (offset, min(end, first * FRAME_BYTES)),
            (max(offset, (last + 1) * FRAME_BYTES), end),
        ):
            if start < stop and self.pfns[start // FRAME_BYTES] >= 0:
                pa = int(self.pfns[start // FRAME_BYTES]) * FRAME_BYTES + start % FRAME_BYTES
                self.kernel.frames.ram.bytes[pa : pa + stop - start] = 0

    # ---- content

    def lseek(self, offset: int, whence: int) -> int:
        """lseek(2)."""
        return _seek(self, offset, whence)

    def pread(self, length: int, offset: int) -> bytes:
        """pread(2). :raises SysError: EINVAL."""
        if length < 0 or offset < 0:
            raise SysError(errno.EINVAL, f"pread of {length} bytes at {offset}")
        return self.read_bytes(offset, min(length, MAX_RW_BYTES))

    def pwrite(self, data: bytes, offset: int) -> int:
        """pwrite(2); shmem_write_begin. :raises SysError: EINVAL, EPERM, EFBIG, ENOMEM."""
        if offset < 0:
            raise SysError(errno.EINVAL, f"pwrite at {offset}")
        data = data[:MAX_RW_BYTES]
        if not data:
            return 0
        end = offset + len(data)
        if end > MAX_FILE_BYTES:
            raise SysError(errno.EFBIG, f"pwrite to {end:#x}")
        if self.seals & (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE):
            raise SysError(errno.EPERM, f"{self.name}: sealed against writes")
        if end > self._size:
            self._grow(end)
        self.write_bytes(offset, data)
        return len(data)

    # ---- seals

    def get_seals(self) -> int:
        """fcntl(F_GET_SEALS)."""
        return self.seals

    def add_seals(self, seals: int) -> None:
        """fcntl(F_ADD_SEALS); mm/memfd.c memfd_add_seals. :raises SysError: EINVAL, EPERM, EBUSY."""
        if seals & ~F_ALL_SEALS:
            raise SysError(errno.EINVAL, f"seals {seals:#x}")
        if self.seals & F_SEAL_SEAL:
            raise SysError(errno.EPERM, f"{self.name}: sealed against seals")
        if seals & F_SEAL_WRITE and not self.seals & F_SEAL_WRITE:
            if self.writable_maps:
                raise SysError(errno.EBUSY, f"{self.name}: {self.writable_maps} writable mappings")
            present = self.pfns[self.pfns >= 0]
            if (self.kernel.frames.pin_count[present] > 0).any():  # memfd_wait_for_pins
                raise SysError(errno.EBUSY, f"{self.name}: pages are pinned")
        self.seals |= seals

    def map_pages(self, offset: int, length: int, *, writable: bool) -> tuple[I64 | None, Backing]:
        """A shared mapping.

        :raises SysError: EPERM where writes are sealed; EINVAL past the end of the file.
        """
        if writable and self.seals & (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE):
            raise SysError(errno.EPERM, f"{self.name}: sealed against writes")
        if offset + length > self.n_pages * FRAME_BYTES:
            # Linux maps it and sends SIGBUS at the first touch; a mapping here is filled in at once.
            raise SysError(errno.EINVAL, f"{self.name}: mapping past its end at {self._size:#x}")
        pages = super().map_pages(offset, length, writable=writable)
        self.writable_maps += writable
        return pages

    def unmapped(self, vma: Vma) -> None:
        """A mapping of this file is gone."""
        self.writable_maps -= vma.writable
