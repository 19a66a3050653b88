# SPDX-License-Identifier: Apache-2.0
"""Sessions over a kexec: what a client finds on the other side, also when things went wrong on this one.

The same cases on both kernels: :func:`before` and :func:`after` run on any transport and say what each call
answered; WANTED says what it has to be. Run as a program it is the real kernel's part (as root, in a machine
that may be rebooted): it loads the kernel IMAGE by kexec_file_load(), jumps, and goes on when it is started
again there. The cases are those of the kernel's tools/testing/selftests/liveupdate/luo_*.c, and more.
"""

import ctypes
import json
import os
import resource
import signal
import sys
from pathlib import Path

from iokeep.errors import KernelRefused
from iokeep.handover.abi import SESSIONS_PER_BLOCK
from iokeep.luo.client import LiveUpdate, LuoError, Session
from iokeep.uapi import kexec
from iokeep.uapi import liveupdate as uapi
from iokeep.uapi.kernel import KernelTransport

PAGE = 4096
SEALED = 7
MFD_ALLOW_SEALING, MFD_NOEXEC_SEAL = 2, 8
#: SHRINK | GROW | WRITE | FUTURE_WRITE: what MFD_NOEXEC_SEAL brings along by mistake
F_SEAL_ALL_WRITES = 30
#: as luo_stress_sessions.c and luo_stress_files.c: several blocks of 51 sessions, of 63 files
MANY_SESSIONS, MANY_FILES = 2000, 500
#: row -> answer, for both kernels
WANTED = {
    # before the kexec
    "no kernel is loaded": "EINVAL",
    "the session after that": "ok",
    "the name of a killed client's session": "ok",
    "the name of a killed client's session whose descriptor lives on": "EEXIST",
    "a name that is there, when sessions fill their blocks": "EEXIST",
    # behind it: names
    "a name that nobody gave": "ENOENT",
    "no name": "ENOENT",
    "a name without an end": "ENOENT",
    "the session of a killed client": "ENOENT",
    "the session of a killed client whose descriptor lives on": "what the client wrote",
    "a session that was closed before the kexec": "ENOENT",
    "the session of a client that was killed behind the kexec": "ENOENT",
    "the same, whose descriptor lives on": "what the client wrote",
    "a session twice": "EINVAL",
    "a new session of an incoming one's name": "ok",
    # sessions without files
    "a token of an empty session": "ENOENT",
    "finish of an empty session": "ok",
    "finish of it again": "ok",
    # files
    "files of two sessions": "first, second, third",
    "a wrong token": "ENOENT",
    "a token of another session": "ENOENT",
    "a file twice": "the same file, by two descriptors",
    "a file whose descriptor was closed, again": "the same file",
    "size, position, seals of a sealed file": "0x3000, 0x123, 0x7",
    "an empty file": "0x0 bytes",
    "a file that can be resized again": "ok",
    "a deleted file of a tmpfs": "of a tmpfs",
    "preserve in an incoming session": "EINVAL",
    "preserve again before finish": "EBUSY",
    "preserve again after finish": "ok",
    # the end of a session
    "finish of a session made in this boot": "EINVAL",
    "finish before a file was retrieved": "ok",
    "that file after it": "ENOENT",
    "a retrieved file after finish": "first",
    "a session that was closed unfinished": "ENOENT",
    # many
    "many files": f"{MANY_FILES} right",
    "many sessions": f"{MANY_SESSIONS} right",
}
#: what only a real kernel has: a kernel that is loaded, tmpfs, and the bug of 7.3 with MFD_NOEXEC_SEAL
REAL_ONLY = {
    "no kernel is loaded": WANTED["no kernel is loaded"],
    "the session after that": WANTED["the session after that"],
    "a deleted file of a tmpfs": WANTED["a deleted file of a tmpfs"],
}
REAL = WANTED | {"a memfd made with MFD_NOEXEC_SEAL": "sealed against writes"}


def answer(call, *args):
    """ "ok", a text that the call returned, or the errno's name."""
    try:
        found = call(*args)
    except KernelRefused as refused:
        return refused.errno_name
    return found if isinstance(found, str) else "ok"


def memfd(t, data=b"", flags=MFD_ALLOW_SEALING):
    fd = t.memfd_create("kexec", flags)
    if data:
        t.ftruncate(fd, PAGE)
        t.pwrite(fd, data, 0)
    return fd


def text(t, fd):
    return t.pread(fd, PAGE, 0).rstrip(b"\0").decode()


def put(t, session, token, data):
    """Preserve a new memfd; the session keeps it."""
    fd = memfd(t, data)
    session.preserve(fd, token)
    t.close(fd)


def killed(t):
    """What a client does that will be killed: its session's descriptor."""
    device = LiveUpdate(t)
    session = device.create("killed")
    put(t, session, 1, b"what the client wrote")
    return session.fd


def held(t):
    device = LiveUpdate(t)
    session = device.create("held")
    put(t, session, 1, b"what the client wrote")
    return session.fd


def killed_behind(t):
    return LiveUpdate(t).retrieve("orphan").fd


def held_behind(t):
    return LiveUpdate(t).retrieve("held-behind").fd


def before(t, client, *, real):
    """Everything up to the jump: rows of (case, answer). The sessions stay open in this process.

    :param client: runs a function in another client, and has ``pid``, ``fd`` (what it returned) and
        ``kill()``.
    """
    other = client(killed)
    other.kill()
    other = client(held)
    Session(t, t.getfd(other.pid, other.fd))  # a custodian's
    other.kill()
    device = LiveUpdate(t)

    sessions = 1  # a custodian's

    def new(name):
        nonlocal sessions
        sessions += 1
        return device.create(name)

    first = new("first")
    if real:
        yield "no kernel is loaded", answer(kexec.jump, t)
        yield "the session after that", answer(put, t, first, 99, b"late")
    with device.create("beside"):  # a duplicate when there is no or the 51st session breaks the next boot
        yield "the name of a killed client's session", answer(lambda: device.create("killed").close())
        yield (
            "the name of a killed client's session whose descriptor lives on",
            answer(device.create, "held"),
        )
    put(t, first, 1, b"first")
    second = new("second")
    put(t, second, 0x2002, b"second")
    put(t, second, (1 << 64) - 1, b"third")
    for name in ("empty-1", "empty-2"):
        new(name)
    with device.create("closed"):
        pass

    odd = new("odd")
    sealed = memfd(t)
    t.ftruncate(sealed, 3 * PAGE)
    t.add_seals(sealed, SEALED)
    t.lseek(sealed, 0x123, os.SEEK_SET)
    odd.preserve(sealed, 1)
    odd.preserve(memfd(t), 2)
    if real:
        odd.preserve(memfd(t, b"noexec", MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL), 3)
        fd = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR)
        os.write(fd, b"of a tmpfs")
        odd.preserve(fd, 4)

    for name in ("unretrieved", "unfinished", "orphan"):
        put(t, new(name), 1, b"lost")
    put(t, new("held-behind"), 1, b"what the client wrote")
    files = new("many-files")
    for n in range(MANY_FILES):
        put(t, files, n, f"file-{n}".encode())
    for n in range(MANY_SESSIONS):
        new(f"many-{n}")
    for n in range(-sessions % SESSIONS_PER_BLOCK):
        new(f"fill-{n}")
    # Linux 7.3 leaves an empty block now, at which the next kernel panics, unless one more session fills it
    yield "a name that is there, when sessions fill their blocks", answer(device.create, "first")
    new("one more")
    device.close()


def after(t, client, *, real):
    """Everything behind it. ``client``: as for :func:`before`."""
    client(killed_behind).kill()
    other = client(held_behind)
    kept = Session(t, t.getfd(other.pid, other.fd))
    other.kill()
    device = LiveUpdate(t)
    yield "the session of a client that was killed behind the kexec", answer(device.retrieve, "orphan")
    yield "the same, whose descriptor lives on", text(t, kept.retrieve(1))
    kept.close()

    def one(name, token=1):
        return text(t, device.retrieve(name).retrieve(token))

    yield "a name that nobody gave", answer(device.retrieve, "nobody")
    yield "no name", answer(device.retrieve, "")
    yield "a name without an end", answer(_endless, device)
    yield "the session of a killed client", answer(device.retrieve, "killed")
    yield "the session of a killed client whose descriptor lives on", answer(one, "held")
    yield "a session that was closed before the kexec", answer(device.retrieve, "closed")
    yield from _two_sessions(t, device)
    yield from _odd_files(t, device, real=real)

    with device.retrieve("unretrieved") as session:
        yield "finish before a file was retrieved", answer(session.finish)
        yield "that file after it", answer(session.retrieve, 1)
    device.retrieve("unfinished").close()
    yield "a session that was closed unfinished", answer(device.retrieve, "unfinished")

    with device.retrieve("many-files") as session:
        right = sum(_content(t, session, n) == f"file-{n}" for n in range(MANY_FILES))
        yield "many files", f"{right} right"
        session.finish()
    right = 0
    for n in range(MANY_SESSIONS):
        with device.retrieve(f"many-{n}") as session:
            right += session.name() == f"many-{n}"
            session.finish()
    yield "many sessions", f"{right} right"
    device.close()


def _two_sessions(t, device):
    first, second = device.retrieve("first"), device.retrieve("second")
    yield "a session twice", answer(device.retrieve, "first")
    found = [text(t, s.retrieve(n)) for s, n in ((first, 1), (second, 0x2002), (second, (1 << 64) - 1))]
    yield "files of two sessions", ", ".join(found)
    yield "a wrong token", answer(first.retrieve, 2)
    yield "a token of another session", answer(first.retrieve, 0x2002)
    fd, again = first.retrieve(1), first.retrieve(1)
    same = fd != again and t.fstat(fd).st_ino == t.fstat(again).st_ino
    yield "a file twice", "the same file, by two descriptors" if same else "another file"
    inode = t.fstat(fd).st_ino
    for each in (fd, again):
        t.close(each)
    fd = first.retrieve(1)
    same = t.fstat(fd).st_ino == inode
    yield "a file whose descriptor was closed, again", "the same file" if same else "another file"
    yield "preserve in an incoming session", answer(first.preserve, memfd(t), 7)
    new = device.create("first")
    yield "a new session of an incoming one's name", answer(new.name) and "ok"
    yield "finish of a session made in this boot", answer(new.finish)
    yield "preserve again before finish", answer(new.preserve, fd, 1)
    first.finish()
    second.finish()
    yield "preserve again after finish", answer(new.preserve, fd, 1)
    yield "a retrieved file after finish", answer(text, t, fd)
    new.close()

    with device.retrieve("empty-1") as empty:
        yield "a token of an empty session", answer(empty.retrieve, 1)
        yield "finish of an empty session", answer(empty.finish)
        yield "finish of it again", answer(empty.finish)


def _odd_files(t, device, *, real):
    odd = device.retrieve("odd")
    fd = odd.retrieve(1)
    found = (t.fstat(fd).st_size, t.lseek(fd, 0, os.SEEK_CUR), t.get_seals(fd))
    yield "size, position, seals of a sealed file", ", ".join(map(hex, found))
    fd = odd.retrieve(2)
    yield "an empty file", f"{t.fstat(fd).st_size:#x} bytes"
    yield "a file that can be resized again", answer(t.ftruncate, fd, 2 * PAGE)
    if real:
        seals = t.get_seals(odd.retrieve(3))
        writes = "sealed against writes" if seals & F_SEAL_ALL_WRITES else "not sealed against writes"
        yield "a memfd made with MFD_NOEXEC_SEAL", writes
        yield "a deleted file of a tmpfs", text(t, odd.retrieve(4))
    odd.finish()


def _content(t, session, token):
    fd = session.retrieve(token)
    try:
        return text(t, fd)
    finally:
        t.close(fd)


def _endless(device):
    """RETRIEVE_SESSION with 64 bytes and no NUL, which the client does not let through."""
    arg = uapi.liveupdate_ioctl_retrieve_session(size=72, fd=-1, name=(ctypes.c_uint8 * 64)(*b"x" * 64))
    try:
        device.transport.ioctl(device.fd, uapi.LIVEUPDATE_IOCTL_RETRIEVE_SESSION, arg)
    except OSError as error:
        raise LuoError("LIVEUPDATE_IOCTL_RETRIEVE_SESSION", error.errno, {}) from error


# ---- the real kernel


class Child:
    """A client in a process of its own."""

    def __init__(self, work):
        read, write = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.write(write, str(work(KernelTransport())).encode())
            signal.pause()
        os.close(write)
        self.fd = int(os.read(read, 16))
        os.close(read)

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def main(image):
    """Say each row as a line ``row [case, answer]``; ends in the jump, or behind it."""
    cmdline = Path("/proc/cmdline").read_text().strip()
    resource.setrlimit(resource.RLIMIT_NOFILE, (8192, 8192))
    t = KernelTransport()
    second = "iokeep.stage=2" in cmdline
    for row in after(t, Child, real=True) if second else before(t, Child, real=True):
        print("row", json.dumps(row), flush=True)
    if not second:
        kexec.load(Path(image), f"{cmdline} iokeep.stage=2")
        kexec.jump(t)


if __name__ == "__main__":
    main(sys.argv[1])
