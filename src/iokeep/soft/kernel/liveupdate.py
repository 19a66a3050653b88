# SPDX-License-Identifier: Apache-2.0
"""/dev/liveupdate and its session files: the ioctls in front of :mod:`iokeep.soft.kernel.luo`.

Order of the checks as in luo_ioctl() and luo_session_ioctl() of Linux 7.3.4: an unknown number is EINVAL (not
ENOTTY), a known number with another type or direction ENOTTY, then the size, then the structure's tail.
"""

from __future__ import annotations

import errno

from iokeep.soft.kernel.files import File, Ioctl
from iokeep.soft.kernel.kernel import Kernel
from iokeep.soft.kernel.luo import NAME_BYTES, Luo, Session
from iokeep.soft.kernel.process import Process
from iokeep.soft.kernel.syserror import SysError
from iokeep.uapi import liveupdate as uapi
from iokeep.uapi.copy_struct import copy_struct_in

_DEVICE = (uapi.LIVEUPDATE_IOCTL_CREATE_SESSION, uapi.LIVEUPDATE_IOCTL_RETRIEVE_SESSION)
_SESSION = (
    uapi.LIVEUPDATE_SESSION_PRESERVE_FD,
    uapi.LIVEUPDATE_SESSION_RETRIEVE_FD,
    uapi.LIVEUPDATE_SESSION_FINISH,
    uapi.LIVEUPDATE_SESSION_GET_NAME,
)

#: the direction is checked before the size (luo_ioctl_type_valid)
_OUTGOING = (uapi.LIVEUPDATE_SESSION_PRESERVE_FD,)
_INCOMING = (uapi.LIVEUPDATE_SESSION_RETRIEVE_FD, uapi.LIVEUPDATE_SESSION_FINISH)


def _check_number(request: int, known: tuple[int, ...]) -> None:
    if request & 0xFF not in {k & 0xFF for k in known}:
        raise SysError(errno.EINVAL, f"ioctl {request:#x} is no live update command here")
    if request not in known:
        raise SysError(errno.ENOTTY, f"ioctl {request:#x}")


class LiveUpdateDevice(File):
    """/dev/liveupdate, open at most once."""

    kind_name = "/dev/liveupdate"

    def __init__(self, kernel: Kernel, luo: Luo) -> None:
        luo.open_device()
        super().__init__(kernel, "liveupdate")
        self.luo = luo

    def release(self) -> None:
        """The next one may open it."""
        self.luo.release_device()

    def ioctl(self, call: Ioctl) -> int:
        """CREATE_SESSION and RETRIEVE_SESSION."""
        _check_number(call.request, _DEVICE)
        try:
            if call.request == uapi.LIVEUPDATE_IOCTL_CREATE_SESSION:
                create = copy_struct_in(uapi.liveupdate_ioctl_create_session, call.raw)
                name = self.luo.name_of(bytes(create.name))
                create.fd = self._install(call.process, self.luo.create(name))
                call.respond(create)
            else:
                retrieve = copy_struct_in(uapi.liveupdate_ioctl_retrieve_session, call.raw)
                session = self.luo.retrieve_session(self.luo.wanted_name(bytes(retrieve.name)))
                retrieve.fd = self._install(call.process, session)
                call.respond(retrieve)
        except OSError as error:
            raise SysError(error.errno or errno.EIO, str(error)) from error
        return 0

    def _install(self, process: Process, session: Session) -> int:
        return process.install(SessionFile(self.kernel, self.luo, session))


class SessionFile(File):
    """[luo_session] NAME: the last close unpreserves an outgoing session and finishes an incoming one."""

    kind_name = "live update session"

    def __init__(self, kernel: Kernel, luo: Luo, session: Session) -> None:
        super().__init__(kernel, f"[luo_session] {session.name}")
        self.luo = luo
        self.session = session

    def release(self) -> None:
        """luo_session_release()."""
        self.luo.release_session(self.session)

    def ioctl(self, call: Ioctl) -> int:
        """PRESERVE_FD, RETRIEVE_FD, FINISH, GET_NAME."""
        _check_number(call.request, _SESSION)
        if call.request in _OUTGOING and self.session.incoming:
            raise SysError(errno.EINVAL, "not on an incoming session")
        if call.request in _INCOMING and not self.session.incoming:
            raise SysError(errno.EINVAL, "not on an outgoing session")
        try:
            self._ioctl(call)
        except OSError as error:
            raise SysError(error.errno or errno.EIO, str(error)) from error
        return 0

    def _ioctl(self, call: Ioctl) -> None:
        if call.request == uapi.LIVEUPDATE_SESSION_PRESERVE_FD:
            preserve = copy_struct_in(uapi.liveupdate_session_preserve_fd, call.raw)
            self.luo.preserve(self.session, preserve.token, call.process.fds.get(preserve.fd))
            call.respond(preserve)
        elif call.request == uapi.LIVEUPDATE_SESSION_RETRIEVE_FD:
            retrieve = copy_struct_in(uapi.liveupdate_session_retrieve_fd, call.raw)
            retrieve.fd = call.process.install(self.luo.retrieve(self.session, retrieve.token))
            call.respond(retrieve)
        elif call.request == uapi.LIVEUPDATE_SESSION_FINISH:
            finish = copy_struct_in(uapi.liveupdate_session_finish, call.raw)
            if finish.reserved:
                raise SysError(errno.EINVAL, "FINISH: reserved is not 0")
            self.luo.finish(self.session)
            call.respond(finish)
        else:
            name = copy_struct_in(uapi.liveupdate_session_get_name, call.raw)
            if name.reserved:
                raise SysError(errno.EINVAL, "GET_NAME: reserved is not 0")
            raw = self.session.name.encode()
            for at, byte in enumerate(raw.ljust(NAME_BYTES, b"\0")):
                name.name[at] = byte
            call.respond(name)
