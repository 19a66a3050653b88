# SPDX-License-Identifier: Apache-2.0
"""The wire: what one side says the other hears, and garbage is an error, never a crash or a hang."""

import errno
import gc
import os
import socket
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iokeep.uapi import wire
from iokeep.uapi.wire import Call, ClientConnection, ServerConnection, WireError


def pair(timeout=2.0, frame_timeout=0.2):
    here, there = socket.socketpair()
    return ClientConnection(here, timeout, frame_timeout), ServerConnection(there, frame_timeout)


def raw_client(frame_timeout=0.2):
    """A server under test, and the bare socket of a client that says what it likes."""
    here, there = socket.socketpair()
    return here, ServerConnection(there, frame_timeout)


def raw_server(timeout=0.5, frame_timeout=0.2):
    here, there = socket.socketpair()
    return ClientConnection(here, timeout, frame_timeout), there


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def run(target):
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread


def head(call, nargs=0, length=0, magic=wire.MAGIC, flags=0, fd=0):
    return wire.HEADER.pack(magic, call, flags, fd, nargs, length)


u64 = st.integers(0, 2**64 - 1)


@given(
    st.sampled_from(sorted(wire.NARGS)), st.integers(-(2**31), 2**31 - 1), st.binary(max_size=5000), st.data()
)
def test_a_request_arrives_as_it_was_sent(call, fd, payload, data):
    client, server = pair()
    args = tuple(data.draw(st.lists(u64, min_size=wire.NARGS[call], max_size=wire.NARGS[call])))
    payload = payload if call in wire.WITH_PAYLOAD else b""
    value = data.draw(st.integers(-(2**63), 2**63 - 1))
    got = []

    def serve():
        got.append(server.recv(2))
        server.reply(value, payload[::-1])

    thread = run(serve)
    frame = client.call(Call(call), fd, args, payload)
    thread.join(5)
    assert got == [wire.Request(Call(call), fd, args, payload)]
    assert (frame.fd, wire.signed(frame.args[0]), frame.payload) == (0, value, payload[::-1])
    client.close()
    server.close()


def test_long_answers_come_in_pieces():
    client, server = pair(20, 10)
    data = os.urandom(1 << 20) * 35
    run(lambda: (server.recv(2), server.reply(0, data)))
    assert client.call(Call.PREAD, 3, (0, len(data)), most=len(data)).payload == data


def test_an_answer_longer_than_asked_for_is_refused():
    client, server = pair()
    run(lambda: (server.recv(2), server.reply(0, b"12345")))
    with pytest.raises(WireError) as caught:
        client.call(Call.PREAD, 3, (0, 4), most=4)
    assert caught.value.errno == errno.EPROTO


def test_errno_with_payload():
    client, server = pair()
    run(lambda: (server.recv(2), server.error(errno.EINVAL, b"back")))
    frame = client.call(Call.IOCTL, 3, (0x3B97,), b"1234")
    assert (frame.fd, frame.payload) == (errno.EINVAL, b"back")
    with pytest.raises(ValueError, match="not an error"):
        server.error(0)


def test_end_of_stream_between_and_inside_frames():
    for sent in (b"", head(Call.CLOSE)[:7], head(Call.OPEN, 0, 10) + b"abc"):
        sock, server = raw_client()
        sock.sendall(sent)
        sock.close()
        assert server.recv(1) is None
        assert server.broken is not None
        assert server.broken.errno == errno.ECONNRESET
        assert server.recv(1) is None


@pytest.mark.parametrize(
    "sent",
    [
        head(Call.CLOSE, magic=1),
        head(0),
        head(99),
        head(Call.RETURN, 1) + bytes(8),
        head(Call.CLOSE, 1) + bytes(8),
        head(Call.CLOSE, 0, 1) + b"x",
        head(Call.CLOSE, flags=1),
        head(Call.OPEN, 0, wire.MAX_PAYLOAD + 1),
        head(Call.OPEN, 0, 2**64 - 1),
        head(Call.OPEN, wire.MAX_ARGS + 1),
        head(Call.OPEN, 2**32 - 1),
    ],
)
def test_what_is_no_request_ends_the_connection(sent):
    sock, server = raw_client()
    sock.sendall(sent)
    assert server.recv(1) is None
    assert server.broken.errno == errno.EPROTO
    # A handler that goes on regardless does no harm.
    server.reply(0)
    server.error(errno.EIO)
    with pytest.raises(OSError) as caught:
        server.copy_from_user(0x1000, 4)
    assert caught.value.errno == errno.EFAULT


def test_half_a_frame_does_not_hold_the_kernel_up():
    sock, server = raw_client(frame_timeout=0.1)
    sock.sendall(head(Call.OPEN, 0, 100) + b"abc")
    begin = time.monotonic()
    assert server.recv() is None
    assert time.monotonic() - begin < 5
    assert server.broken.errno == errno.ETIMEDOUT


def test_a_client_that_reads_nothing_does_not_hold_the_kernel_up():
    sock, server = raw_client(frame_timeout=0.1)
    sock.sendall(head(Call.GETPID))
    assert server.recv(1).call == Call.GETPID
    server.reply(0, bytes(8 << 20))
    assert server.broken.errno == errno.ETIMEDOUT


@given(st.binary(min_size=1, max_size=400), st.booleans())
@settings(max_examples=150)
def test_random_bytes_to_the_server(data, valid_magic):
    sock, server = raw_client(frame_timeout=0.02)
    if valid_magic:
        data = wire.MAGIC.to_bytes(4, "little") + data
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)
    for _ in range(100):
        if server.recv(0.5) is None:
            break
        server.reply(0)
    assert server.broken is not None
    server.close()
    sock.close()


@given(st.binary(min_size=1, max_size=400), st.booleans())
@settings(max_examples=150)
def test_random_bytes_to_the_client(data, valid_magic):
    client, sock = raw_server(timeout=0.1, frame_timeout=0.02)
    if valid_magic:
        data = wire.MAGIC.to_bytes(4, "little") + data
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)
    with pytest.raises(WireError):
        client.call(Call.GETPID, -1)
    # And for good: nobody knows where the next frame would begin.
    with pytest.raises(WireError):
        client.call(Call.GETPID, -1)
    sock.close()


@given(st.binary(min_size=24, max_size=120), st.integers(0, 119), st.integers(0, 255))
@settings(max_examples=150)
def test_one_damaged_byte_in_an_answer(payload, where, byte):
    """A damaged answer is another answer or a WireError; the client neither crashes nor waits for ever."""
    client, sock = raw_server(timeout=0.1, frame_timeout=0.02)
    frame = bytearray(head(Call.RETURN, 1, len(payload)) + bytes(8) + payload)
    frame[where % len(frame)] = byte
    sock.sendall(frame)
    sock.shutdown(socket.SHUT_WR)
    try:
        got = client.call(Call.PREAD, 3, (0, 120), most=120)
    except WireError:
        assert client.broken is not None
    else:
        assert len(got.payload) <= 120
    sock.close()


@pytest.mark.parametrize(
    "answer",
    [
        head(Call.RETURN),
        head(Call.RETURN, 2) + bytes(16),
        head(Call.RETURN, 1, fd=-1) + bytes(8),
        head(Call.RETURN, 1, flags=wire.FLAG_MORE) + bytes(8),
        head(Call.COPY_DONE),
        head(Call.CLOSE),
        head(Call.COPY_FROM_USER, 1) + bytes(8),
        head(Call.COPY_FROM_USER, 2) + bytes(8) + (wire.MAX_PAYLOAD + 1).to_bytes(8, "little"),
        head(Call.COPY_TO_USER),
    ],
)
def test_what_is_no_answer(answer):
    client, sock = raw_server()
    sock.sendall(answer)
    with pytest.raises(WireError) as caught:
        client.call(Call.GETPID)
    assert caught.value.errno == errno.EPROTO
    sock.close()


def test_a_kernel_that_asks_for_copies_for_ever():
    client, sock = raw_server(timeout=0.3)

    def ask():
        try:
            while True:
                sock.sendall(head(Call.COPY_FROM_USER, 2) + bytes(16))
                sock.recv(4096)
        except OSError:
            return

    thread = run(ask)
    begin = time.monotonic()
    with pytest.raises(WireError):
        client.call(Call.IOCTL, 3, (1,), b"x")
    assert time.monotonic() - begin < 5
    sock.close()
    thread.join(5)


def test_a_silent_kernel():
    client, sock = raw_server(timeout=0.1)
    with pytest.raises(WireError) as caught:
        client.call(Call.GETPID)
    assert caught.value.errno == errno.ETIMEDOUT
    sock.close()


def test_descriptors_pushed_without_being_asked_for_are_dropped():
    sock, server = raw_client()
    gc.collect()
    before = open_files()
    with Path("/dev/null").open("rb") as file:
        socket.send_fds(sock, [head(Call.GETPID)], [file.fileno()] * 4)
    assert server.recv(1).call == Call.GETPID
    assert open_files() == before


class Memory:
    """User memory at 0x1000."""

    def __init__(self, size):
        self.data = bytearray(size)

    def _at(self, uptr, length):
        if uptr < 0x1000 or uptr + length > 0x1000 + len(self.data):
            raise OSError(errno.EFAULT, "bad")
        return uptr - 0x1000

    def copy_from(self, uptr, length):
        at = self._at(uptr, length)
        return bytes(self.data[at : at + length])

    def copy_to(self, uptr, data):
        at = self._at(uptr, len(data))
        self.data[at : at + len(data)] = data


def serve_copies(server, jobs, log):
    while (request := server.recv(5)) is not None:
        assert request.call == Call.IOCTL
        for job in jobs:
            try:
                log.append(job(server))
            except OSError as error:
                log.append(error.errno)
        server.reply(0)


def test_copies_longer_than_a_frame():
    client, server = pair(30, 20)
    memory = Memory(wire.MAX_PAYLOAD + 12345)
    memory.data[:] = os.urandom(1000) * (len(memory.data) // 1000) + bytes(len(memory.data) % 1000)
    before = bytes(memory.data)
    log = []
    jobs = [
        lambda s: s.copy_from_user(0x1000, len(before)),
        lambda s: s.copy_to_user(0x1000, before[::-1]),
        lambda s: s.copy_from_user(0x1000, 0),
    ]
    run(lambda: serve_copies(server, jobs, log))
    client.call(Call.IOCTL, 3, (1,), b"x", memory=memory)
    assert log == [before, None, b""]
    assert memory.data == before[::-1]


@pytest.mark.parametrize(
    ("uptr", "length"), [(0, 1), (0xFFF, 2), (0x1000, 101), (2**64 - 1, 2), (2**64 - 4096, 4096), (2**63, 8)]
)
def test_bad_pointers_are_faults(uptr, length):
    client, server = pair()
    log = []
    jobs = [
        lambda s: s.copy_from_user(uptr, length),
        lambda s: s.copy_to_user(uptr, bytes(length)),
        lambda s: s.copy_from_user(0x1000, 4),
    ]
    run(lambda: serve_copies(server, jobs, log))
    client.call(Call.IOCTL, 3, (1,), b"x", memory=Memory(100))
    # The connection lives on: the last copy is good.
    assert log == [errno.EFAULT, errno.EFAULT, bytes(4)]


def test_a_client_that_dies_in_the_middle_of_an_ioctl():
    sock, server = raw_client()
    sock.sendall(head(Call.IOCTL, 1, 4) + bytes(12))
    assert server.recv(1).call == Call.IOCTL
    sock.close()
    with pytest.raises(OSError) as caught:
        server.copy_from_user(0x1000, 8)
    assert caught.value.errno == errno.EFAULT
    server.reply(0)
    assert server.recv(1) is None


@pytest.mark.parametrize(
    "answer", [head(Call.CLOSE), head(Call.COPY_DONE, 0, 3) + b"abc", head(Call.COPY_DONE, 0, 9) + bytes(9)]
)
def test_a_client_that_answers_a_copy_wrongly(answer):
    sock, server = raw_client()
    sock.sendall(head(Call.IOCTL, 1, 4) + bytes(12))
    server.recv(1)
    sock.sendall(answer)
    with pytest.raises(OSError) as caught:
        server.copy_from_user(0x1000, 8)
    assert caught.value.errno == errno.EFAULT
    assert server.broken.errno == errno.EPROTO


def test_frames_over_the_bounds_are_never_sent():
    client, _server = pair()
    with pytest.raises(ValueError, match="too long"):
        client.call(Call.PWRITE, 3, (0,), bytes(wire.MAX_PAYLOAD + 1))


def test_wire_errors_are_connection_errors():
    error = WireError(errno.ECONNRESET, "gone")
    assert isinstance(error, ConnectionError)
    assert error.errno == errno.ECONNRESET


@given(st.integers(-(2**63), 2**63 - 1))
def test_signed(value):
    assert wire.signed(value & (2**64 - 1)) == value
