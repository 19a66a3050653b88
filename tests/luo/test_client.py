# SPDX-License-Identifier: Apache-2.0
"""The /dev/liveupdate client against a small model of it, errno for errno as Linux 7.3.4 has them."""

import ctypes
import errno

import pytest

from iokeep.errors import CapabilityError, KernelRefused
from iokeep.luo.client import LiveUpdate, LuoError, Session
from iokeep.uapi import liveupdate as uapi
from iokeep.uapi.copy_struct import LIVEUPDATE_IOCTLS, copy_struct_in, copy_struct_out
from iokeep.uapi.wire import WireError


class Luo:
    """Sessions by name; files by token. Descriptors are numbers that tests choose or that count up."""

    name = "model"

    def __init__(self):
        self.next_fd = 100
        self.holders = 0
        self.sessions = {}
        self.by_fd = {}
        self.gone = False

    def fd(self):
        self.next_fd += 1
        return self.next_fd

    def open(self, path):
        assert path == "/dev/liveupdate"
        if self.holders:
            raise OSError(errno.EBUSY, path)
        self.holders += 1
        return self.fd()

    def close(self, fd):
        if self.gone:
            raise WireError(errno.ECONNRESET, "gone")
        if fd in self.by_fd:
            session = self.by_fd.pop(fd)
            self.sessions.pop(session["name"], None)
        else:
            self.holders -= 1

    def kexec(self):
        self.by_fd, self.holders = {}, 0
        for session in self.sessions.values():
            session.update(incoming=True, retrieved=False)

    def ioctl(self, fd, request, arg):
        op = LIVEUPDATE_IOCTLS[request]
        cmd = copy_struct_in(op.struct, bytes(arg))
        getattr(self, op.name)(fd, cmd)
        raw = copy_struct_out(cmd)
        ctypes.memmove(ctypes.addressof(arg), raw, len(raw))
        return 0

    @staticmethod
    def text(cmd):
        raw = bytes(cmd.name)
        if b"\0" not in raw or raw[0] == 0:
            raise OSError(errno.EINVAL, "name")
        return raw.split(b"\0")[0]

    def LIVEUPDATE_IOCTL_CREATE_SESSION(self, fd, cmd):
        name = self.text(cmd)
        if name in self.sessions:
            raise OSError(errno.EEXIST, "name")
        cmd.fd = self.fd()
        self.by_fd[cmd.fd] = self.sessions[name] = {
            "name": name,
            "files": {},
            "incoming": False,
            "busy": False,
        }

    def LIVEUPDATE_IOCTL_RETRIEVE_SESSION(self, fd, cmd):
        session = self.sessions.get(self.text(cmd))
        if session is None:
            raise OSError(errno.ENOENT, "name")
        if session.get("retrieved") or not session["incoming"]:
            raise OSError(errno.EINVAL, "retrieved")
        session["retrieved"] = True
        cmd.fd = self.fd()
        self.by_fd[cmd.fd] = session

    def LIVEUPDATE_SESSION_PRESERVE_FD(self, fd, cmd):
        session = self.by_fd[fd]
        if session["incoming"]:
            raise OSError(errno.EINVAL, "incoming")
        if cmd.token in session["files"]:
            raise OSError(errno.EEXIST, "token")
        if cmd.fd in session["files"].values():
            raise OSError(errno.EBUSY, "file")
        session["files"][cmd.token] = cmd.fd

    def LIVEUPDATE_SESSION_RETRIEVE_FD(self, fd, cmd):
        session = self.by_fd[fd]
        if not session["incoming"]:
            raise OSError(errno.EINVAL, "outgoing")
        if cmd.token not in session["files"]:
            raise OSError(errno.ENOENT, "token")
        cmd.fd = self.fd()

    def LIVEUPDATE_SESSION_FINISH(self, fd, cmd):
        assert cmd.reserved == 0
        if self.by_fd[fd]["busy"]:
            raise OSError(errno.EBUSY, "unclaimed")

    def LIVEUPDATE_SESSION_GET_NAME(self, fd, cmd):
        name = self.by_fd[fd]["name"]
        cmd.name[: len(name)] = name


@pytest.fixture
def luo():
    return Luo()


def refused(number, call, *args):
    with pytest.raises(LuoError) as caught:
        call(*args)
    assert caught.value.errno == number
    assert isinstance(caught.value, KernelRefused)
    return caught.value


def test_a_whole_update(luo):
    with LiveUpdate(luo) as device:
        session = device.create("vm-1")
        session.preserve(5, 0x10)
        session.preserve(6, 2**64 - 1)
        assert session.name() == "vm-1"
    assert luo.holders == 0
    luo.kexec()
    with LiveUpdate(luo) as device:
        session = device.retrieve("vm-1")
        first, second = session.retrieve(0x10), session.retrieve(0x10)
        assert first != second
        session.retrieve(2**64 - 1)
        session.finish()
    session.close()
    session.close()
    assert not luo.sessions


def test_one_user_at_a_time(luo):
    device = LiveUpdate(luo)
    error = refused(errno.EBUSY, LiveUpdate, luo)
    assert "one user at a time" in error.what
    device.close()
    device.close()
    LiveUpdate(luo).close()


def test_node_missing():
    class None_(Luo):
        def open(self, path):
            raise OSError(errno.ENOENT, path)

    with pytest.raises(CapabilityError) as caught:
        LiveUpdate(None_())
    assert "CONFIG_LIVEUPDATE" in caught.value.what
    assert "kho=on" in caught.value.hint


@pytest.mark.parametrize("name", ["a", "x" * 63, "v\u00fcrm-1"])
def test_names(luo, name):
    with LiveUpdate(luo) as device, device.create(name) as session:
        assert session.name() == name
        assert isinstance(session, Session)


@pytest.mark.parametrize("name", ["x" * 64, "\u00fc" * 32, "a\0b"])
def test_names_that_do_not_fit(luo, name):
    with LiveUpdate(luo) as device, pytest.raises(ValueError, match="session name"):
        device.create(name)


def test_refusals_name_the_object_and_the_reason(luo):
    device = LiveUpdate(luo)
    refused(errno.EINVAL, device.create, "")
    session = device.create("vm-1")
    assert "'vm-1'" in refused(errno.EEXIST, device.create, "vm-1").what
    refused(errno.ENOENT, device.retrieve, "vm-2")
    session.preserve(5, 1)
    assert "token 0x1" in refused(errno.EEXIST, session.preserve, 6, 1).what
    assert "preserved already" in refused(errno.EBUSY, session.preserve, 5, 2).what
    assert "this boot" in refused(errno.EINVAL, session.retrieve, 1).what
    luo.kexec()
    session = LiveUpdate(luo).retrieve("vm-1")
    refused(errno.EINVAL, LiveUpdate(luo, 1).retrieve, "vm-1")
    refused(errno.ENOENT, session.retrieve, 7)
    refused(errno.EINVAL, session.preserve, 5, 3)
    luo.by_fd[session.fd]["busy"] = True
    assert "not reclaimed" in refused(errno.EBUSY, session.finish).what


@pytest.mark.parametrize("token", [-1, 2**64])
def test_tokens_that_do_not_fit(luo, token):
    session = LiveUpdate(luo).create("vm")
    for call in (lambda: session.preserve(5, token), lambda: session.retrieve(token)):
        with pytest.raises(ValueError, match="token"):
            call()


def test_close_when_the_kernel_is_gone(luo):
    device = LiveUpdate(luo)
    session = device.create("vm")
    luo.gone = True
    session.close()
    device.close()
    assert (session.fd, device.fd) == (-1, -1)


def test_structures_are_the_uapi_s():
    assert uapi.LIVEUPDATE_SESSION_NAME_LENGTH == 64
