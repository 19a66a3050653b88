# SPDX-License-Identifier: Apache-2.0
"""A process's way into the software host: system calls over a socket, its memory through a modelled MMU.

The physical memory and the device registers of the host are memfds that arrive at connect time; a mapping
is a list of frames in one of them, which the software kernel gives. NumPy does the MMU's work on whole
arrays; it is imported when the first mapping is made.
"""

from __future__ import annotations

import ctypes
import errno
import io
import mmap
import os
import socket
import struct
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from iokeep.uapi import wire
from iokeep.uapi.transport import FileStat
from iokeep.uapi.usermem import OwnMemory
from iokeep.uapi.wire import Call, ClientConnection, WireError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PAGE = wire.PAGE
_CHUNK_PAGES = 256
_PROT_NONE = 0
_MAP_PRIVATE = 0x02
_MAP_ANONYMOUS = 0x20
_MAP_NORESERVE = 0x4000


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    ]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


class _Reservation:
    """User virtual addresses that nothing else gets: PROT_NONE, so that a stray pointer faults."""

    def __init__(self, length: int) -> None:
        self._libc = _libc()
        self.length = length
        flags = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE
        hva = self._libc.mmap(None, length, _PROT_NONE, flags, -1, 0)
        if hva is None or hva == ctypes.c_void_p(-1).value:
            number = ctypes.get_errno()
            raise OSError(number, f"{os.strerror(number)}: reserving {length:#x} bytes of user memory")
        self.hva = int(hva)

    def close(self) -> None:
        if self.length:
            self._libc.munmap(self.hva, self.length)
            self.length = 0


class SoftMapping:
    """See :class:`iokeep.uapi.transport.Mapping`; made by :meth:`SoftTransport.mmap`."""

    def __init__(
        self,
        transport: SoftTransport,
        vma: int,
        reservation: _Reservation,
        length: int,
        memory: NDArray[np.uint8],
        frames: NDArray[np.intp],
    ) -> None:
        import numpy as np

        self._transport = transport
        self._vma = vma
        self._reservation = reservation
        self._hva = reservation.hva
        self._length = length
        self._rows = memory[: memory.size // PAGE * PAGE].reshape(-1, PAGE)
        self._words = self._rows.reshape(-1).view(np.uint64)
        self._frames = frames
        steps = np.diff(frames)
        # One run of frames is one slice of the memory, which needs no gathering.
        self._flat: NDArray[np.uint8] | None = None
        if frames.size and bool(np.all(steps == 1)):
            start = int(frames[0]) * PAGE
            self._flat = memory[start : start + length]
        self._open = True

    @property
    def hva(self) -> int:
        """First user virtual address."""
        return self._hva

    @property
    def length(self) -> int:
        """Length in bytes."""
        return self._length

    def _check(self, offset: int, length: int) -> None:
        if not self._open:
            raise ValueError(f"mapping at hva {self._hva:#x} is closed")
        if offset < 0 or length < 0 or offset + length > self._length:
            raise ValueError(
                f"[{offset:#x}, +{length:#x}] is outside of a mapping of {self._length:#x} bytes"
            )

    def read(self, offset: int, length: int) -> bytes:
        """See :meth:`iokeep.uapi.transport.Mapping.read`."""
        import numpy as np

        self._check(offset, length)
        if self._flat is not None or not length:
            return b"" if self._flat is None else self._flat[offset : offset + length].tobytes()
        first, end = offset // PAGE, (offset + length - 1) // PAGE + 1
        # Through one buffer that stays in the cache into one result: fresh memory costs more than the copy.
        buffer = np.empty((min(end - first, _CHUNK_PAGES), PAGE), dtype=np.uint8)
        result = io.BytesIO()
        for at in range(first, end, _CHUNK_PAGES):
            part = buffer[: min(end - at, _CHUNK_PAGES)]
            # mode="clip" lets take() write straight into it; frames were checked when the mapping was made.
            np.take(self._rows, self._frames[at : at + len(part)], axis=0, out=part, mode="clip")
            start = offset - at * PAGE if at == first else 0
            result.write(part.reshape(-1)[start : offset + length - at * PAGE].data)
        return result.getvalue()

    def write(self, offset: int, data: bytes | bytearray | memoryview | NDArray[np.uint8]) -> None:
        """See :meth:`iokeep.uapi.transport.Mapping.write`."""
        import numpy as np

        source = np.frombuffer(data, dtype=np.uint8)
        length = source.size
        self._check(offset, length)
        if not length:
            return
        if self._flat is not None:
            self._flat[offset : offset + length] = source
            return
        at = 0
        if offset % PAGE:
            at = min(length, PAGE - offset % PAGE)
            self._part(offset, source[:at])
        whole = (length - at) // PAGE
        if whole:
            first = (offset + at) // PAGE
            self._rows[self._frames[first : first + whole]] = source[at : at + whole * PAGE].reshape(-1, PAGE)
            at += whole * PAGE
        if at < length:
            self._part(offset + at, source[at:])

    def _part(self, offset: int, source: NDArray[np.uint8]) -> None:
        """Bytes within one page."""
        start = offset % PAGE
        self._rows[self._frames[offset // PAGE], start : start + source.size] = source

    def numpy(self) -> NDArray[np.uint8] | None:
        """See :meth:`iokeep.uapi.transport.Mapping.numpy`."""
        self._check(0, 0)
        return self._flat

    def _places(self, offsets: NDArray[np.uint64]) -> NDArray[np.intp]:
        """Indices into the words of the memory."""
        import numpy as np

        self._check(0, 0)
        wanted = np.asarray(offsets, dtype=np.uint64)
        if wanted.size and (
            int(np.bitwise_or.reduce(wanted)) & 7 or int(wanted.max()) + 8 > self._length // 8 * 8
        ):
            raise ValueError(f"offsets must be 8-byte aligned and inside of {self._length:#x} bytes")
        places = wanted.astype(np.intp)
        frames = self._frames[places >> 12]
        places &= PAGE - 1
        places >>= 3
        return np.asarray((frames << 9) + places, dtype=np.intp)

    def gather64(self, offsets: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """See :meth:`iokeep.uapi.transport.Mapping.gather64`."""
        return self._words[self._places(offsets)]

    def scatter64(self, offsets: NDArray[np.uint64], values: NDArray[np.uint64]) -> None:
        """See :meth:`iokeep.uapi.transport.Mapping.scatter64`."""
        self._words[self._places(offsets)] = values

    def close(self) -> None:
        """Unmap; idempotent, and quiet when the kernel is gone."""
        if not self._open:
            return
        self._open = False
        self._flat = None
        self._transport._unmapped(self._hva, self._vma)
        self._reservation.close()


class _Memory:
    """User memory as the kernel reaches it: modelled mappings first, then the process's own."""

    def __init__(self) -> None:
        self._own = OwnMemory()
        self.mappings: dict[int, SoftMapping] = {}

    def _find(self, uptr: int, length: int) -> SoftMapping | None:
        for hva, mapping in self.mappings.items():
            if uptr < hva + mapping.length and uptr + length > hva:
                if hva <= uptr and uptr + length <= hva + mapping.length:
                    return mapping
                raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
        return None

    def copy_from(self, uptr: int, length: int) -> bytes:
        found = self._find(uptr, length)
        return self._own.copy_from(uptr, length) if found is None else found.read(uptr - found.hva, length)

    def copy_to(self, uptr: int, data: bytes) -> None:
        found = self._find(uptr, len(data))
        if found is None:
            self._own.copy_to(uptr, data)
        else:
            found.write(uptr - found.hva, data)


class SoftTransport:
    """System calls of one process of a software host; implements :class:`iokeep.uapi.transport.Transport`.

    When the kernel process ends (kexec, crash), the call under way and every later one raise
    :class:`iokeep.uapi.wire.WireError`, a ConnectionError with an errno. Mappings stay readable: the memory
    stays. Calls of several threads take turns.

    :param path: the kernel's Unix socket, or a connected socket.
    :param timeout: seconds that one call may take.
    """

    def __init__(self, path: str | Path | socket.socket, timeout: float = 300.0) -> None:
        if isinstance(path, socket.socket):
            sock = path
            self._name = "soft"
        else:
            self._name = f"soft:{path}"
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                with wire.socket_address(Path(path)) as address:
                    sock.connect(address)
            except OSError:
                sock.close()
                raise
        self._connection = ClientConnection(sock, timeout)
        self._lock = threading.RLock()
        self._memory = _Memory()
        self._targets: list[NDArray[np.uint8] | mmap.mmap] = []
        try:
            self._hello()
        except BaseException:
            self._connection.close()
            raise

    def _hello(self) -> None:
        fds: list[int] = []
        try:
            frame = self._connection.call(Call.HELLO, -1, (wire.VERSION,), fds=fds, most=8 * wire.MAX_FDS)
            if frame.fd:
                raise OSError(frame.fd, f"{os.strerror(frame.fd)}: the kernel refused a process")
            sizes = struct.unpack(
                f"<{len(frame.payload) // 8}Q", frame.payload[: len(frame.payload) // 8 * 8]
            )
            if len(fds) != len(sizes) or len(frame.payload) % 8:
                text = f"HELLO with {len(fds)} descriptors for {len(frame.payload)} bytes of sizes"
                raise WireError(errno.EPROTO, text)
            self._pid = wire.signed(frame.args[0])
            for fd, size in zip(fds, sizes, strict=True):
                if not 0 < size <= os.fstat(fd).st_size:
                    raise WireError(errno.EPROTO, f"HELLO: a memfd of {size:#x} bytes is not that long")
                self._targets.append(mmap.mmap(fd, size))
        finally:
            for fd in fds:
                os.close(fd)

    @property
    def name(self) -> str:
        """Where the calls go."""
        return self._name

    def __enter__(self) -> SoftTransport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.disconnect()

    def disconnect(self) -> None:
        """End this process as far as the kernel is concerned: its descriptors and mappings go; idempotent."""
        with self._lock:
            self._connection.close()
            for mapping in list(self._memory.mappings.values()):
                mapping.close()

    def _call(
        self,
        call: Call,
        fd: int = -1,
        args: Sequence[int] = (),
        payload: bytes | memoryview = b"",
        *,
        most: int = 0,
    ) -> wire.Frame:
        with self._lock:
            frame = self._connection.call(call, fd, args, payload, memory=self._memory, most=most)
        if frame.fd:
            raise OSError(frame.fd, os.strerror(frame.fd))
        return frame

    def _value(
        self, call: Call, fd: int = -1, args: Sequence[int] = (), payload: bytes | memoryview = b""
    ) -> int:
        return wire.signed(self._call(call, fd, args, payload).args[0])

    def open(self, path: str) -> int:
        """See :meth:`iokeep.uapi.transport.Transport.open`."""
        return self._value(Call.OPEN, -1, (), os.fsencode(path))

    def close(self, fd: int) -> None:
        """See :meth:`iokeep.uapi.transport.Transport.close`."""
        self._call(Call.CLOSE, fd)

    def ioctl(self, fd: int, request: int, arg: ctypes.Structure | int) -> int:
        """See :meth:`iokeep.uapi.transport.Transport.ioctl`."""
        raw = arg.to_bytes(8, "little") if isinstance(arg, int) else bytes(arg)
        with self._lock:
            frame = self._connection.call(Call.IOCTL, fd, (request,), raw, memory=self._memory, most=len(raw))
        if not isinstance(arg, int):
            ctypes.memmove(ctypes.addressof(arg), frame.payload, len(frame.payload))
        if frame.fd:
            raise OSError(frame.fd, os.strerror(frame.fd))
        return wire.signed(frame.args[0])

    def memfd_create(self, name: str, flags: int = 0) -> int:
        """See :meth:`iokeep.uapi.transport.Transport.memfd_create`."""
        return self._value(Call.MEMFD_CREATE, -1, (flags,), os.fsencode(name))

    def ftruncate(self, fd: int, length: int) -> None:
        """See :meth:`iokeep.uapi.transport.Transport.ftruncate`."""
        self._call(Call.FTRUNCATE, fd, (length,))

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        """See :meth:`iokeep.uapi.transport.Transport.fallocate`."""
        self._call(Call.FALLOCATE, fd, (mode, offset, length))

    def add_seals(self, fd: int, seals: int) -> None:
        """See :meth:`iokeep.uapi.transport.Transport.add_seals`."""
        self._call(Call.ADD_SEALS, fd, (seals,))

    def get_seals(self, fd: int) -> int:
        """See :meth:`iokeep.uapi.transport.Transport.get_seals`."""
        return self._value(Call.GET_SEALS, fd)

    def fstat(self, fd: int) -> FileStat:
        """See :meth:`iokeep.uapi.transport.Transport.fstat`."""
        payload = self._call(Call.FSTAT, fd, most=16).payload
        if len(payload) != 16:
            raise WireError(errno.EPROTO, f"FSTAT answered with {len(payload)} bytes, not 16")
        ino, size = struct.unpack("<QQ", payload)
        return FileStat(ino, size)

    def lseek(self, fd: int, offset: int, whence: int) -> int:
        """See :meth:`iokeep.uapi.transport.Transport.lseek`."""
        return self._value(Call.LSEEK, fd, (offset, whence))

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        """See :meth:`iokeep.uapi.transport.Transport.pread`."""
        parts: list[bytes] = []
        at = 0
        while True:
            now = min(length - at, wire.MAX_PAYLOAD)
            data = self._call(Call.PREAD, fd, (offset + at, now), most=max(now, 0)).payload
            parts.append(data)
            at += len(data)
            if len(data) < now or at >= length:
                return parts[0] if len(parts) == 1 else b"".join(parts)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        """See :meth:`iokeep.uapi.transport.Transport.pwrite`."""
        view = memoryview(data).cast("B")
        at = 0
        while True:
            part = view[at : at + wire.MAX_PAYLOAD]
            done = self._value(Call.PWRITE, fd, (offset + at,), part)
            if not 0 <= done <= len(part):
                raise WireError(errno.EPROTO, f"PWRITE of {len(part)} bytes says that it wrote {done}")
            at += done
            if done < len(part) or at == len(view):
                return at

    def read(self, fd: int, length: int) -> bytes:
        """See :meth:`iokeep.uapi.transport.Transport.read`."""
        most = min(length, wire.MAX_PAYLOAD)
        return bytes(self._call(Call.READ, fd, (most,), most=most).payload)

    def write(self, fd: int, data: bytes) -> int:
        """See :meth:`iokeep.uapi.transport.Transport.write`."""
        done = self._value(Call.WRITE, fd, (), data)
        if not 0 <= done <= len(data):
            raise WireError(errno.EPROTO, f"WRITE of {len(data)} bytes says that it wrote {done}")
        return done

    def poll(self, fd: int, events: int) -> int:
        """See :meth:`iokeep.uapi.transport.Transport.poll`."""
        return self._value(Call.POLL, fd, (events,))

    def mmap(self, fd: int, length: int, offset: int = 0) -> SoftMapping:
        """See :meth:`iokeep.uapi.transport.Transport.mmap`; *offset* must be a multiple of 4096."""
        if length <= 0 or offset < 0 or offset % PAGE:
            raise OSError(
                errno.EINVAL, f"{os.strerror(errno.EINVAL)}: mmap of {length:#x} bytes at {offset:#x}"
            )
        pages = -(-length // PAGE)
        reservation = _Reservation(pages * PAGE)
        try:
            frame = self._call(
                Call.MMAP, fd, (offset, length, reservation.hva), most=pages * wire.EXTENT.size
            )
            vma = frame.args[0]
            try:
                target, frames = self._extents(frame.payload, pages)
                mapping = SoftMapping(self, vma, reservation, length, self._target(target), frames)
            except WireError:
                self._call(Call.MUNMAP, -1, (vma,))
                raise
        except BaseException:
            reservation.close()
            raise
        self._memory.mappings[mapping.hva] = mapping
        return mapping

    def _target(self, target: int) -> NDArray[np.uint8]:
        """The whole memfd of a target; mapped once for all mappings."""
        import numpy as np

        found = self._targets[target]
        if isinstance(found, mmap.mmap):
            found = self._targets[target] = np.frombuffer(found, dtype=np.uint8)
        return found

    def _extents(self, raw: bytes, pages: int) -> tuple[int, NDArray[np.intp]]:
        """Backing extents as (target, frame number of each page).

        :raises WireError: extents that do not lie in one target, or are not *pages* pages.
        """
        import numpy as np

        if not raw or len(raw) % wire.EXTENT.size:
            raise WireError(errno.EPROTO, f"MMAP answered with {len(raw)} bytes of extents")
        layout = np.dtype([("target", "<u4"), ("reserved", "<u4"), ("start", "<u8"), ("length", "<u8")])
        table = np.frombuffer(raw, dtype=layout)
        target = int(table["target"][0])
        if target >= len(self._targets) or bool(np.any(table["target"] != target)):
            raise WireError(
                errno.EPROTO, "MMAP answered with extents of several targets, or of an unknown one"
            )
        size = self._target(target).size
        start, length = table["start"], table["length"]
        page = np.uint64(PAGE - 1)
        limit = np.uint64(size)
        if (
            bool(np.any((start | length) & page))
            or bool(np.any(length == 0))
            or bool(np.any(length > limit))
            or bool(np.any(start > limit - length))
        ):
            raise WireError(
                errno.EPROTO, f"MMAP answered with an extent outside of target {target} or not in pages"
            )
        counts = (length >> np.uint64(12)).astype(np.int64)
        if int(counts.sum()) != pages:
            raise WireError(errno.EPROTO, f"MMAP answered with extents of {counts.sum()} pages, not {pages}")
        ends = np.cumsum(counts)
        first = (start >> np.uint64(12)).astype(np.int64) - (ends - counts)
        frames = np.repeat(first, counts) + np.arange(pages, dtype=np.int64)
        return target, frames.astype(np.intp, copy=False)

    def _unmapped(self, hva: int, vma: int) -> None:
        self._memory.mappings.pop(hva, None)
        if self._connection.broken is None:
            try:
                self._call(Call.MUNMAP, -1, (vma,))
            except OSError:
                # The kernel is gone, or never knew the VMA: unmapping is done either way.
                return

    def getfd(self, pid: int, fd: int) -> int:
        """See :meth:`iokeep.uapi.transport.Transport.getfd`."""
        return self._value(Call.GETFD, fd, (pid,))

    def getpid(self) -> int:
        """See :meth:`iokeep.uapi.transport.Transport.getpid`."""
        return self._pid

    def reboot_kexec(self) -> None:
        """See :meth:`iokeep.uapi.transport.Transport.reboot_kexec`; later calls raise WireError."""
        self._call(Call.REBOOT_KEXEC)
