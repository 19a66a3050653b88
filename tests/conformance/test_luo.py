# SPDX-License-Identifier: Apache-2.0
"""/dev/liveupdate before a kexec: sessions, tokens, preserved memfds (kernel/liveupdate, mm/memfd_luo.c).

What comes after a kexec needs one: that is the live-update test's.
"""

import ctypes
import os

import pytest
from conf_env import PAGE, REQUESTS, Extended, luo, outcome
from conf_marks import MACHINE

from iokeep.uapi.copy_struct import LIVEUPDATE_IOCTLS

pytestmark = pytest.mark.skipif(not MACHINE.luo, reason="this machine has no /dev/liveupdate")
SEAL, SHRINK, GROW, WRITE = 1, 2, 4, 8
PUNCH = 3
CREATE, RETRIEVE = "LIVEUPDATE_IOCTL_CREATE_SESSION", "LIVEUPDATE_IOCTL_RETRIEVE_SESSION"
PRESERVE, GET = "LIVEUPDATE_SESSION_PRESERVE_FD", "LIVEUPDATE_SESSION_RETRIEVE_FD"
FINISH, NAME = "LIVEUPDATE_SESSION_FINISH", "LIVEUPDATE_SESSION_GET_NAME"


@pytest.fixture
def env(env):
    env.device = env.open("/dev/liveupdate")
    return env


def create(env, name):
    found = outcome(env.call, env.device, CREATE, fd=-1, name=name)
    return found if isinstance(found, str) else env.owned(found.fd)


def preserve(env, session, fd, token):
    found = outcome(env.call, session, PRESERVE, fd=fd, token=token)
    return found if isinstance(found, str) else 0


def test_one_opener(env):
    assert outcome(env.open, "/dev/liveupdate") == "EBUSY"
    env.close(env.device)
    env.device = env.open("/dev/liveupdate")


def test_sessions_outlive_the_device(env):
    session = create(env, b"conformance")
    env.close(env.device)
    env.device = env.open("/dev/liveupdate")
    assert create(env, b"conformance") == "EEXIST"
    assert bytes(env.call(session, NAME).name).rstrip(b"\0") == b"conformance"


@pytest.mark.parametrize(
    ("name", "answer"), [(b"", "EINVAL"), (b"x" * 64, "EINVAL"), (b"\0x", "EINVAL"), (b"x" * 63, None)]
)
def test_names(env, name, answer):
    made = create(env, name)
    if answer:
        assert made == answer
    else:
        assert bytes(env.call(made, NAME).name).rstrip(b"\0") == name


def test_names_are_unique_while_open(env):
    # one session beside: a duplicate when their number is a multiple of 51 (0 too) poisons the next boot
    create(env, b"beside")
    session = create(env, b"conformance")
    assert create(env, b"conformance") == "EEXIST"
    env.close(session)
    assert not isinstance(create(env, b"conformance"), str)


@pytest.mark.parametrize("name", [b"nobody", b"", b"x" * 64])
def test_retrieve_unknown(env, name):
    assert outcome(env.call, env.device, RETRIEVE, fd=-1, name=name) == "ENOENT"


def test_an_outgoing_session_cannot_be_retrieved(env):
    create(env, b"conformance")
    assert outcome(env.call, env.device, RETRIEVE, fd=-1, name=b"conformance") == "ENOENT"


def test_numbers(env):
    """An unknown number is EINVAL, a known one with another direction ENOTTY."""
    session = create(env, b"conformance")
    arg = luo.liveupdate_session_finish(size=8)
    for fd, request, answer in (
        (env.device, 0xBA02, "EINVAL"),
        (env.device, luo.LIVEUPDATE_SESSION_FINISH, "EINVAL"),
        (env.device, luo.LIVEUPDATE_IOCTL_CREATE_SESSION | 0x4008_0000, "ENOTTY"),
        (env.device, 0x3B00, "ENOTTY"),
        (session, luo.LIVEUPDATE_IOCTL_CREATE_SESSION, "EINVAL"),
        (session, 0xBA44, "EINVAL"),
        (session, luo.LIVEUPDATE_SESSION_GET_NAME | 0x4008_0000, "ENOTTY"),
    ):
        assert outcome(env.ioctl, fd, request, arg) == answer, hex(request)


@pytest.mark.parametrize("op", LIVEUPDATE_IOCTLS.values(), ids=lambda op: op.name)
def test_sizes_and_tails(env, op):
    session = create(env, b"conformance")
    fd = env.device if "IOCTL" in op.name else session
    full = ctypes.sizeof(op.struct)
    for size in (0, 1, op.min_size - 1):
        assert outcome(env.call, fd, op.name, size=size) == "EINVAL"
    longer = Extended.of(op.struct, {"size": full + 8}, 1)
    # an outgoing session says first that it is one
    wanted = "EINVAL" if op.name in (GET, FINISH) else "E2BIG"
    assert outcome(env.ioctl, fd, op.request, longer) == wanted


def test_outgoing_only_or_incoming_only(env):
    session = create(env, b"conformance")
    assert outcome(env.call, session, GET, token=1) == "EINVAL"
    assert outcome(env.call, session, FINISH) == "EINVAL"
    assert outcome(env.call, session, FINISH, reserved=1) == "EINVAL"
    assert outcome(env.call, session, NAME, reserved=1) == "EINVAL"


def test_preserve(env):
    session = create(env, b"conformance")
    memfd = env.memfd(4 * PAGE)
    assert preserve(env, session, memfd, 7) == 0
    other = env.memfd(PAGE)
    assert preserve(env, session, other, 7) == "EEXIST"
    assert preserve(env, session, 0x3FF0, 7) == "EEXIST"
    assert preserve(env, session, 0x3FF0, 8) == "EBADF"
    assert preserve(env, session, -1, 8) == "EBADF"
    assert preserve(env, session, memfd, 8) == "EBUSY"
    assert preserve(env, session, other, 0) == 0
    assert preserve(env, session, env.memfd(0), (1 << 64) - 1) == 0
    beside = create(env, b"beside")
    assert preserve(env, beside, memfd, 1) == "EBUSY"
    assert preserve(env, beside, env.memfd(PAGE), 7) == 0  # tokens are a session's own


@pytest.mark.parametrize("what", ["/dev/kmsg", "device", "session"])
def test_files_of_another_kind(env, what):
    session = create(env, b"conformance")
    fds = {"device": env.device, "session": session}
    fd = fds.get(what)
    assert preserve(env, session, env.open(what) if fd is None else fd, 1) == "ENOENT"


@pytest.mark.parametrize("seals", [0, SHRINK | GROW, SEAL | SHRINK | GROW, WRITE, 0x10, 0x20])
def test_seals_that_are_carried(env, seals):
    memfd = env.memfd(PAGE)
    env.sys(env.t.add_seals, memfd, seals)
    assert preserve(env, create(env, b"conformance"), memfd, 1) == 0
    if not seals & SEAL:
        assert outcome(env.sys, env.t.add_seals, memfd, SHRINK) is None


def test_a_preserved_memfd_is_frozen(env):
    session = create(env, b"conformance")
    memfd = env.memfd(4 * PAGE)
    assert preserve(env, session, memfd, 1) == 0

    def changes():
        yield outcome(env.sys, env.t.ftruncate, memfd, 8 * PAGE)
        yield outcome(env.sys, env.t.ftruncate, memfd, PAGE)
        yield outcome(env.sys, env.t.fallocate, memfd, PUNCH, 0, PAGE)
        yield outcome(env.sys, env.t.pwrite, memfd, b"x" * 8, 8 * PAGE)

    assert list(changes()) == ["EPERM"] * 4
    assert env.t.fstat(memfd).st_size == 4 * PAGE
    assert env.t.pwrite(memfd, b"written", PAGE) == 7
    assert env.t.pread(memfd, 7, PAGE) == b"written"
    env.close(session)
    assert list(changes()) == [None, None, None, 8]


def test_closing_a_session_gives_its_files_back(env):
    session = create(env, b"conformance")
    memfd = env.memfd(PAGE)
    assert preserve(env, session, memfd, 1) == 0
    env.close(session)
    again = create(env, b"conformance")
    assert preserve(env, again, memfd, 1) == 0


def test_a_second_descriptor_is_the_same_file(env):
    session = create(env, b"conformance")
    memfd = env.memfd(PAGE)
    again = env.owned(env.sys(env.t.getfd, env.t.getpid(), memfd))
    assert preserve(env, session, memfd, 1) == 0
    assert preserve(env, session, again, 2) == "EBUSY"


def test_holes_are_filled_by_preserve(env):
    session = create(env, b"conformance")
    memfd = env.memfd(16 * PAGE)
    assert preserve(env, session, memfd, 1) == 0
    assert env.t.pread(memfd, 16 * PAGE, 0) == bytes(16 * PAGE)
    assert env.t.lseek(memfd, 8 * PAGE, os.SEEK_SET) == 8 * PAGE


def test_every_ioctl_is_named_here():
    assert {name for name in REQUESTS if name.startswith("LIVEUPDATE")} == {
        CREATE, RETRIEVE, PRESERVE, GET, FINISH, NAME,
    }  # fmt: skip
