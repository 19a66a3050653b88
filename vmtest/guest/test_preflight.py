# SPDX-License-Identifier: Apache-2.0
"""What preflight says of files and names, and what the kernel then does with them. Runs in the guest.

Every case that can be provoked: preflight is asked first, then a session takes the same files in the same
order, and the two must agree, file for file and errno for errno.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from iokeep.cli.main import main
from iokeep.inspect.preflight import REFUSED, Problem, ProcFs, Wanted, is_incoming, preflight
from iokeep.iommufd.client import Iommufd
from iokeep.luo.client import LiveUpdate, LuoError, Session
from iokeep.uapi.kernel import KernelTransport
from vmtest.guest.edu import ADDRESSES, Edu

PAGE, MIB = 4096, 1 << 20
KERNEL = KernelTransport()
SHM = Path("/dev/shm")
SEALED = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
MFD_NOEXEC_SEAL = 8
Files = list[tuple[int, int]]


@pytest.fixture
def device() -> Iterator[LiveUpdate]:
    with LiveUpdate(KERNEL) as opened:
        yield opened


@pytest.fixture
def session(device: LiveUpdate) -> Iterator[Session]:
    with device.create("preflight") as made:
        yield made


def memfd(size: int = PAGE, flags: int = os.MFD_ALLOW_SEALING, seals: int = 0) -> int:
    fd = os.memfd_create("preflight", flags)
    os.ftruncate(fd, size)
    if 0 < size <= MIB:
        os.pwrite(fd, b"x" * size, 0)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def tmpfs_file(*, name: bool) -> int:
    fd = os.open(SHM / "preflight", os.O_CREAT | os.O_RDWR)
    os.write(fd, b"x")
    if not name:
        (SHM / "preflight").unlink()
    return fd


def again(fd: int, flags: int) -> int:
    """The same file, opened once more."""
    return os.open(f"/proc/self/fd/{fd}", flags)


def same_file_twice() -> Files:
    fd = memfd()
    return [(fd, 1), (os.dup(fd), 2), (again(fd, os.O_RDONLY), 3)]


#: name -> files and their tokens, in the order of preservation
CASES: dict[str, Callable[[], Files]] = {
    "sealed": lambda: [(memfd(seals=SEALED), 1)],
    "not sealed": lambda: [(memfd(), 1)],
    "cannot be sealed": lambda: [(memfd(flags=0), 1)],
    "every seal": lambda: [(memfd(seals=63), 1)],
    "sealed against execution": lambda: [(memfd(flags=MFD_NOEXEC_SEAL), 1)],
    "size 0": lambda: [(memfd(0), 1)],
    "no whole page": lambda: [(memfd(5), 1)],
    "a hole": lambda: [(memfd(64 * MIB), 1)],
    "1 TiB": lambda: [(memfd(1 << 40), 1)],
    "16 TiB": lambda: [(memfd(1 << 44), 1)],
    "16 TiB less a page": lambda: [(memfd((1 << 44) - PAGE), 1)],
    "hugetlb": lambda: [(memfd(0, os.MFD_HUGETLB), 1)],
    "opened to be read": lambda: [(again(memfd(), os.O_RDONLY), 1)],
    "opened as a path": lambda: [(again(memfd(), os.O_PATH), 1)],
    "closed": lambda: [(1023, 1)],
    "a pipe": lambda: [(os.pipe()[0], 1)],
    "a socket": lambda: [(socket.socketpair()[0].detach(), 1)],
    "an eventfd": lambda: [(os.eventfd(0), 1)],
    "a directory": lambda: [(os.open("/", os.O_RDONLY), 1)],
    "/dev/null": lambda: [(os.open("/dev/null", os.O_RDWR), 1)],
    "a file of a disk": lambda: [(os.open("/etc/passwd", os.O_RDONLY), 1)],
    "a file of a tmpfs with a name": lambda: [(tmpfs_file(name=True), 1)],
    "a file of a tmpfs whose name is gone": lambda: [(tmpfs_file(name=False), 1)],
    "a file of a tmpfs that never had a name": lambda: [(os.open(SHM, os.O_TMPFILE | os.O_RDWR), 1)],
    "an iommufd": lambda: [(Iommufd(KERNEL).fd, 1)],
    "a VFIO device": lambda: [(Edu(ADDRESSES[1]).file.fd, 1)],
    "an iommufd before memfds": lambda: [(Iommufd(KERNEL).fd, 1), (memfd(), 2)],
    "the same file": same_file_twice,
    "a token twice": lambda: [(memfd(), 7), (memfd(), 7), (memfd(), 8)],
    "a token twice, of a pipe": lambda: [(memfd(), 7), (os.pipe()[0], 7)],
    "a token twice, closed": lambda: [(memfd(), 7), (1023, 7)],
    "the widest tokens": lambda: [(memfd(), 0), (memfd(), (1 << 64) - 1)],
}


MORE_THAN_MEMORY = ("1 TiB", "16 TiB", "16 TiB less a page")


def first_refusal(problems: list[Problem]) -> str:
    return next((each.errno for each in problems if each.severity == REFUSED), "")


def kernels_answer(session: Session, fd: int, token: int) -> str:
    try:
        session.preserve(fd, token)
    except LuoError as refused:
        return refused.errno_name
    return ""


def name_answer(device: LiveUpdate, name: str) -> str:
    try:
        device.create(name).close()
    except LuoError as refused:
        return refused.errno_name
    except ValueError:  # the client lets no name through that the kernel could only cut
        return "EINVAL"
    return ""


@pytest.mark.parametrize("case", CASES)
def test_files(session: Session, case: str) -> None:
    files = CASES[case]()
    try:
        found = preflight(ProcFs(), [Wanted(os.getpid(), fd, token) for fd, token in files])
        assert bool(found.problems) == (case in MORE_THAN_MEMORY)
        said = [first_refusal(file.problems) for file in found.files]
        assert said == [kernels_answer(session, fd, token) for fd, token in files]
        assert found.preserves == (set(said) == {""})
    finally:
        for fd, _ in files:
            with contextlib.suppress(OSError):
                os.close(fd)
        (SHM / "preflight").unlink(missing_ok=True)


def test_holes_that_memory_cannot_fill() -> None:
    """The kernel's answer would be the out-of-memory killer's: only preflight is asked."""
    fd = memfd(8 << 30)
    found = preflight(ProcFs(), [Wanted(os.getpid(), fd)])
    assert [each.errno for each in found.problems] == ["ENOMEM"]
    os.close(fd)


@pytest.mark.parametrize(
    "name", ["", "x", "x" * 63, "x" * 64, "\u00e9" * 31, "\u00e9" * 32, "preflight", "a b\n"]
)
def test_names(device: LiveUpdate, session: Session, name: str) -> None:
    said = first_refusal(preflight(ProcFs(), [], name=name).problems)
    assert said == name_answer(device, name)


def test_sessions_of_others_are_seen(device: LiveUpdate) -> None:
    """Of another process that holds a session by now, with a name of its own choice."""
    with device.create("other's \x1b[2J") as made:
        child = subprocess.Popen(["sleep", "60"], pass_fds=[made.fd])
        number = made.fd
    try:
        assert "other's \x1b[2J" in ProcFs().session_names()
        assert not is_incoming(child.pid, number)
    finally:
        child.kill()
        child.wait()
    assert "other's \x1b[2J" not in ProcFs().session_names()


def test_the_command_looks_at_another_process(capsys: pytest.CaptureFixture[str]) -> None:
    """``iokeep host preflight --pid`` at a process with a good memfd, and with an iommufd beside it."""
    ram = memfd(seals=SEALED)
    with Iommufd(KERNEL) as iommufd:
        for fds, code in (([ram], 0), ([ram, iommufd.fd], 1)):
            child = subprocess.Popen(["sleep", "60"], pass_fds=fds)
            done = main(["host", "preflight", "--json", "--pid", str(child.pid)])
            child.kill()
            child.wait()
            assert done == code
            kinds = [file["kind"] for file in json.loads(capsys.readouterr().out)["files"]]
            assert kinds == ["memfd", "iommufd"][: len(fds)]
    os.close(ram)
