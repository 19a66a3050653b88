# SPDX-License-Identifier: Apache-2.0
"""System calls of a software-host process as frames on a Unix stream socket; both sides read them here.

Frame, little-endian: magic u32, call u16, flags u16, fd s32, nargs u32, payload length u64, then nargs x
u64, then the payload. A request is one frame; its ``fd`` is the descriptor that the call is about (-1:
none). The answer is one or more RETURN frames: ``fd`` holds the errno (0: success), argument 0 the value
(two's complement), the payload what the call returns; FLAG_MORE says that the payload goes on in the next
RETURN frame. While the kernel serves an ioctl it may send COPY_FROM_USER{uptr, length} and
COPY_TO_USER{uptr}+bytes, each of which the client answers with one COPY_DONE frame (``fd``: errno). File
descriptors travel by SCM_RIGHTS in the HELLO answer only.

Requests (arguments; payload -> value; payload of the answer):

======================  ======================================  =======================================
HELLO                   version                                 pid; bytes of each memfd, u64 x n (+ fds)
OPEN                    -; path, UTF-8                          fd
CLOSE                   fd                                      0
IOCTL                   fd, request; the structure, or u64      value; the structure's bytes to copy back
MEMFD_CREATE            flags; name, UTF-8                      fd
FTRUNCATE               fd, length                              0
FALLOCATE               fd, mode, offset, length                0
ADD_SEALS, GET_SEALS    fd, seals; fd                           0; the seals
FSTAT                   fd                                      0; ino u64, size u64
LSEEK                   fd, offset (s64), whence                position
PREAD                   fd, offset, length                      0; bytes
PWRITE                  fd, offset; bytes                       bytes written
READ                    fd, length                              0; bytes
WRITE                   fd; bytes                               bytes written
POLL                    fd, events (POLL*)                      events that are there now
MMAP                    fd (-1: anonymous), offset, length, hva VMA id; extents (:data:`EXTENT`)
MUNMAP                  VMA id                                  0
GETFD                   fd (of the other process), pid          fd
GETPID                  -                                       pid
REBOOT_KEXEC            -                                       0, then the kernel process ends
======================  ======================================  =======================================

Nothing that arrives is trusted: every length has a bound before memory is taken for it, a frame that has
begun must arrive in time, and what breaks a rule is a :class:`WireError` that ends the connection, never a
crash or a hang.
"""

from __future__ import annotations

import array
import enum
import errno
import os
import select
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from iokeep.uapi.usermem import UserMemory

MAGIC = 0x50454B49  # "IKEP"
VERSION = 1
HEADER = struct.Struct("<IHHiIQ")
MAX_PAYLOAD = 16 << 20
MAX_ARGS = 8
MAX_FDS = 8
FLAG_MORE = 1
PAGE = 4096

# One piece of a mapping's backing: target u32, reserved u32, start u64, length u64. Both are bytes in whole
# 4 KiB pages; start is the offset in the target's memfd, which for physical memory is the pa.
EXTENT = struct.Struct("<IIQQ")
#: sockaddr_un.sun_path
_SUN_PATH_BYTES = 108
TARGET_RAM = 0
TARGET_REGISTERS = 1

_U64 = (1 << 64) - 1


class Call(enum.IntEnum):
    """Kinds of frames."""

    HELLO = 1
    OPEN = 2
    CLOSE = 3
    IOCTL = 4
    MEMFD_CREATE = 5
    FTRUNCATE = 6
    FALLOCATE = 7
    ADD_SEALS = 8
    GET_SEALS = 9
    FSTAT = 10
    LSEEK = 11
    PREAD = 12
    PWRITE = 13
    MMAP = 14
    MUNMAP = 15
    GETFD = 16
    GETPID = 17
    REBOOT_KEXEC = 18
    READ = 19
    WRITE = 20
    POLL = 21
    RETURN = 0x100
    COPY_FROM_USER = 0x101
    COPY_TO_USER = 0x102
    COPY_DONE = 0x103


# How many arguments each request has.
NARGS: dict[int, int] = {
    Call.HELLO: 1,
    Call.OPEN: 0,
    Call.CLOSE: 0,
    Call.IOCTL: 1,
    Call.MEMFD_CREATE: 1,
    Call.FTRUNCATE: 1,
    Call.FALLOCATE: 3,
    Call.ADD_SEALS: 1,
    Call.GET_SEALS: 0,
    Call.FSTAT: 0,
    Call.LSEEK: 2,
    Call.PREAD: 2,
    Call.PWRITE: 1,
    Call.MMAP: 3,
    Call.MUNMAP: 1,
    Call.GETFD: 1,
    Call.GETPID: 0,
    Call.REBOOT_KEXEC: 0,
    Call.READ: 1,
    Call.WRITE: 0,
    Call.POLL: 1,
}
# Requests that carry a payload; any other must have none.
WITH_PAYLOAD = frozenset({Call.OPEN, Call.IOCTL, Call.MEMFD_CREATE, Call.PWRITE, Call.WRITE})


class WireError(ConnectionError):
    """The peer is gone (ECONNRESET), too slow (ETIMEDOUT), or sent what is no frame (EPROTO)."""


def _gone(what: str) -> WireError:
    return WireError(errno.ECONNRESET, f"{os.strerror(errno.ECONNRESET)}: {what}")


def _late(what: str) -> WireError:
    return WireError(errno.ETIMEDOUT, f"{os.strerror(errno.ETIMEDOUT)}: {what}")


def _garbage(what: str) -> WireError:
    return WireError(errno.EPROTO, f"{os.strerror(errno.EPROTO)}: {what}")


def signed(value: int) -> int:
    """A u64 argument as the s64 that it stands for."""
    return value - (1 << 64) if value >> 63 else value


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame; fields as in the module's text."""

    call: int
    flags: int
    fd: int
    args: tuple[int, ...]
    payload: bytes


@dataclass(frozen=True, slots=True)
class Request:
    """One system call as the kernel gets it.

    :param call: a :class:`Call`.
    :param fd: the descriptor in the caller's table, or -1.
    :param args: u64 arguments, as many as :data:`NARGS` says (:func:`signed` for an s64).
    :param payload: bytes, at most MAX_PAYLOAD.
    """

    call: Call
    fd: int
    args: tuple[int, ...]
    payload: bytes


class Channel:
    """Frames over a connected stream socket.

    :param sock: AF_UNIX, SOCK_STREAM; owned from here on.
    :param frame_timeout: seconds in which a frame that has begun must be over, and an outgoing one be taken.
    """

    def __init__(self, sock: socket.socket, frame_timeout: float) -> None:
        self.sock = sock
        self.frame_timeout = frame_timeout
        sock.setblocking(False)

    def close(self) -> None:
        """Close the socket; idempotent."""
        self.sock.close()

    def _wait(self, write: bool, deadline: float | None, what: str) -> None:
        poll = select.poll()
        try:
            poll.register(self.sock, select.POLLOUT if write else select.POLLIN)
        except (OSError, ValueError) as error:
            raise _gone(f"{what}: the connection is closed") from error
        left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        if not poll.poll(left):
            raise _late(what)

    def send(
        self,
        call: int,
        fd: int = -1,
        args: Sequence[int] = (),
        payload: bytes | bytearray | memoryview = b"",
        *,
        flags: int = 0,
        fds: Sequence[int] = (),
    ) -> None:
        """Send one frame whole.

        :raises WireError: the peer is gone or does not take it in time.
        :raises ValueError: longer than the bounds.
        """
        if len(payload) > MAX_PAYLOAD or len(args) > MAX_ARGS or len(fds) > MAX_FDS:
            raise ValueError(
                f"frame of {len(payload)} bytes, {len(args)} arguments, {len(fds)} fds is too long"
            )
        head = HEADER.pack(MAGIC, call, flags, fd, len(args), len(payload))
        head += struct.pack(f"<{len(args)}Q", *(arg & _U64 for arg in args))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []
        parts = [memoryview(head), memoryview(payload).cast("B")]
        deadline = time.monotonic() + self.frame_timeout
        while parts:
            try:
                done = self.sock.sendmsg(parts, rights, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._wait(True, deadline, "the peer does not take a frame")
                continue
            except OSError as error:
                raise _gone(f"sending to the peer: {error.strerror}") from error
            rights = []
            while parts and done >= len(parts[0]):
                done -= len(parts[0])
                parts.pop(0)
            if parts:
                parts[0] = parts[0][done:]

    def _exactly(self, into: memoryview, deadline: float | None, fds: list[int] | None) -> float | None:
        """Fill *into*; the first byte may take until *deadline*, the rest frame_timeout more."""
        at = 0
        begun = False
        while at < len(into):
            try:
                if fds is None:
                    # Without a control buffer the kernel drops descriptors that a peer tries to push on us.
                    got = self.sock.recv_into(into[at:])
                else:
                    got = self._with_rights(into[at:], fds)
            except BlockingIOError:
                self._wait(False, deadline, "no frame from the peer" if not begun else "half a frame")
                continue
            except OSError as error:
                raise _gone(f"receiving from the peer: {error.strerror}") from error
            if got == 0:
                raise _gone("end of stream" if at == 0 else "end of stream in the middle of a frame")
            if not begun:
                begun = True
                deadline = time.monotonic() + self.frame_timeout
            at += got
        return deadline

    def _with_rights(self, into: memoryview, fds: list[int]) -> int:
        room = socket.CMSG_SPACE(MAX_FDS * 4)
        data, ancillary, _, _ = self.sock.recvmsg(len(into), room, socket.MSG_CMSG_CLOEXEC)
        for level, kind, raw in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                got = array.array("i")
                got.frombytes(raw[: len(raw) - len(raw) % got.itemsize])
                fds.extend(got)
        into[: len(data)] = data
        return len(data)

    def receive(self, timeout: float | None, fds: list[int] | None = None) -> Frame:
        """The next frame.

        :param timeout: seconds until its first byte must be there; None waits for ever.
        :param fds: a list that takes descriptors sent with it; without one they are dropped.
        :raises WireError: end of stream, silence, or garbage.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        head = bytearray(HEADER.size)
        deadline = self._exactly(memoryview(head), deadline, fds)
        magic, call, flags, fd, nargs, length = HEADER.unpack(head)
        if magic != MAGIC:
            raise _garbage(f"frame begins with {magic:#010x}, not {MAGIC:#010x}")
        if nargs > MAX_ARGS or length > MAX_PAYLOAD:
            raise _garbage(f"frame with {nargs} arguments and {length} bytes of payload is over the bounds")
        body = bytearray(nargs * 8 + length)
        view = memoryview(body)
        self._exactly(view, deadline, None)
        args = struct.unpack_from(f"<{nargs}Q", body)
        return Frame(call, flags, fd, args, bytes(view[nargs * 8 :]))


def check_request(frame: Frame) -> Request:
    """A frame as a request.

    :raises WireError: an unknown call, or arguments or payload that the call does not have.
    """
    nargs = NARGS.get(frame.call)
    if nargs is None:
        raise _garbage(f"call {frame.call:#x} is no request")
    call = Call(frame.call)
    if len(frame.args) != nargs:
        raise _garbage(f"{call.name} has {nargs} arguments, not {len(frame.args)}")
    if frame.flags or (frame.payload and call not in WITH_PAYLOAD):
        raise _garbage(f"{call.name} with flags {frame.flags:#x} and {len(frame.payload)} bytes of payload")
    return Request(call, frame.fd, frame.args, frame.payload)


@contextmanager
def socket_address(path: Path) -> Iterator[str]:
    """An address for bind() and connect() to ``path``: a name of 108 bytes and more does not fit into
    sockaddr_un (unix(7)), and is said relative to its directory.
    """
    if len(os.fsencode(path)) < _SUN_PATH_BYTES:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


class ServerConnection:
    """The kernel's side of one process's connection.

    Take a request with :meth:`recv`, then call exactly one of :meth:`reply` and :meth:`error`; in between
    :meth:`copy_from_user` and :meth:`copy_to_user`. A peer that breaks the protocol or is gone makes the
    connection ``broken``: copies fail with EFAULT, answers go nowhere, and recv returns None, so that a
    handler needs no case of its own for it.

    :param sock: connected AF_UNIX SOCK_STREAM socket; owned from here on.
    :param frame_timeout: seconds that a client may take for a frame that it has begun, for taking an answer
        and for serving a copy.
    """

    def __init__(self, sock: socket.socket, frame_timeout: float = 5.0) -> None:
        self._channel = Channel(sock, frame_timeout)
        self.broken: WireError | None = None

    def fileno(self) -> int:
        """For selectors."""
        return self._channel.sock.fileno()

    def _break(self, error: WireError) -> None:
        self.broken = self.broken or error

    def recv(self, timeout: float | None = None) -> Request | None:
        """The next request; None when the peer is gone or broke the protocol (``broken`` says how).

        :param timeout: seconds to wait for one; None waits for ever (a selector has said that it is there).
        """
        if self.broken is not None:
            return None
        try:
            return check_request(self._channel.receive(timeout))
        except WireError as error:
            self._break(error)
            return None

    def _send(
        self, call: int, fd: int, args: Sequence[int], payload: bytes | memoryview, flags: int = 0
    ) -> bool:
        if self.broken is not None:
            return False
        try:
            self._channel.send(call, fd, args, payload, flags=flags)
        except WireError as error:
            self._break(error)
            return False
        return True

    def _answer(self, number: int, value: int, payload: bytes, fds: Sequence[int]) -> None:
        if self.broken is not None:
            return
        view = memoryview(payload)
        try:
            while True:
                now, view = view[:MAX_PAYLOAD], view[MAX_PAYLOAD:]
                more = FLAG_MORE if len(view) else 0
                self._channel.send(Call.RETURN, number, (value,), now, flags=more, fds=fds)
                fds = ()
                if not more:
                    return
        except WireError as error:
            self._break(error)

    def reply(self, value: int = 0, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Answer with success.

        :param value: what the system call returns.
        :param payload: any length; what the client takes is bounded by the call.
        :param fds: descriptors of this process to pass, in the answer to HELLO only.
        """
        self._answer(0, value, payload, fds)

    def error(self, number: int, payload: bytes = b"") -> None:
        """Answer with an errno.

        :param payload: bytes to copy back into the ioctl's structure in spite of the error.
        """
        if number <= 0:
            raise ValueError(f"errno {number} is not an error")
        self._answer(number, -1, payload, ())

    def _copied(self) -> bytes:
        try:
            frame = self._channel.receive(self._channel.frame_timeout)
            if frame.call != Call.COPY_DONE:
                raise _garbage(f"frame {frame.call:#x} where COPY_DONE belongs")
        except WireError as error:
            self._break(error)
            raise OSError(errno.EFAULT, f"{os.strerror(errno.EFAULT)}: {error}") from error
        if frame.fd:
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
        return frame.payload

    def copy_from_user(self, uptr: int, length: int) -> bytes:
        """Bytes of the calling process's memory.

        :raises OSError: EFAULT, whatever the reason.
        """
        out = bytearray()
        while len(out) < length:
            now = min(length - len(out), MAX_PAYLOAD)
            at = uptr + len(out)
            if at < 0 or at + now > 1 << 64 or not self._send(Call.COPY_FROM_USER, -1, (at, now), b""):
                raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
            data = self._copied()
            if len(data) != now:
                self._break(_garbage(f"{len(data)} bytes of user memory where {now} were asked for"))
                raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
            out += data
        return bytes(out)

    def copy_to_user(self, uptr: int, data: bytes | bytearray | memoryview) -> None:
        """Write the calling process's memory.

        :raises OSError: EFAULT, whatever the reason; bytes before the bad one may be written.
        """
        view = memoryview(data).cast("B")
        for at in range(0, len(view), MAX_PAYLOAD):
            now = view[at : at + MAX_PAYLOAD]
            if uptr + at + len(now) > 1 << 64 or not self._send(Call.COPY_TO_USER, -1, (uptr + at,), now):
                raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
            self._copied()

    def close(self) -> None:
        """Close the socket; idempotent."""
        self._channel.close()


class ClientConnection:
    """A process's side.

    :param sock: connected AF_UNIX SOCK_STREAM socket; owned from here on.
    :param timeout: seconds that the kernel may take for a call, copies included.
    :param frame_timeout: seconds that a frame which has begun may take.
    """

    def __init__(self, sock: socket.socket, timeout: float = 300.0, frame_timeout: float = 30.0) -> None:
        self._channel = Channel(sock, frame_timeout)
        self.timeout = timeout
        self.broken: WireError | None = None

    def call(
        self,
        call: Call,
        fd: int = -1,
        args: Sequence[int] = (),
        payload: bytes | memoryview = b"",
        *,
        memory: UserMemory | None = None,
        most: int = MAX_PAYLOAD,
        fds: list[int] | None = None,
    ) -> Frame:
        """One system call: send it, serve copies, return the RETURN frame (its ``fd`` is the errno).

        :param memory: serves COPY_FROM_USER and COPY_TO_USER; without it they get EFAULT.
        :param most: bytes of payload that the answer may have.
        :param fds: takes descriptors of the answer.
        :raises WireError: the connection is broken, now and at every later call.
        """
        if self.broken is not None:
            raise type(self.broken)(*self.broken.args) from self.broken
        try:
            self._channel.send(call, fd, args, payload)
            return self._answer(call, memory, most, fds)
        except WireError as error:
            self.broken = error
            self._channel.close()
            raise
        except BaseException:
            # Interrupted in the middle of a frame: nobody can tell where the next one begins.
            self.broken = _gone(f"{call.name} was interrupted")
            self._channel.close()
            raise

    def _answer(self, call: Call, memory: UserMemory | None, most: int, fds: list[int] | None) -> Frame:
        parts: list[bytes] = []
        size = 0
        deadline = time.monotonic() + self.timeout
        while True:
            frame = self._channel.receive(deadline - time.monotonic(), fds)
            if frame.call == Call.COPY_FROM_USER and len(frame.args) == 2:
                self._copy_from(frame, memory)
                continue
            if frame.call == Call.COPY_TO_USER and len(frame.args) == 1:
                self._copy_to(frame, memory)
                continue
            if frame.call != Call.RETURN or len(frame.args) != 1 or frame.fd < 0:
                raise _garbage(f"frame {frame.call:#x} where the answer to {call.name} belongs")
            size += len(frame.payload)
            if size > most or (frame.flags & FLAG_MORE and not frame.payload):
                raise _garbage(f"{size} bytes answer {call.name}, which returns {most} at most")
            parts.append(frame.payload)
            if not frame.flags & FLAG_MORE:
                payload = parts[0] if len(parts) == 1 else b"".join(parts)
                return Frame(frame.call, frame.flags, frame.fd, frame.args, payload)

    def _copy_from(self, frame: Frame, memory: UserMemory | None) -> None:
        uptr, length = frame.args
        if length > MAX_PAYLOAD:
            raise _garbage(f"COPY_FROM_USER of {length} bytes")
        try:
            if memory is None:
                raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
            data = memory.copy_from(uptr, length)
        except OSError:
            self._channel.send(Call.COPY_DONE, errno.EFAULT)
        else:
            self._channel.send(Call.COPY_DONE, 0, (), data)

    def _copy_to(self, frame: Frame, memory: UserMemory | None) -> None:
        try:
            if memory is None:
                raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
            memory.copy_to(frame.args[0], frame.payload)
        except OSError:
            self._channel.send(Call.COPY_DONE, errno.EFAULT)
        else:
            self._channel.send(Call.COPY_DONE, 0)

    def close(self) -> None:
        """Close the socket; idempotent."""
        self.broken = self.broken or _gone("the connection was closed")
        self._channel.close()
