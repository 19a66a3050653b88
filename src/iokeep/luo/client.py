# SPDX-License-Identifier: Apache-2.0
"""/dev/liveupdate: sessions, and files in them by token, on any transport.

Before a kexec: create a session, preserve files in it (memfds, then the iommufd, then devices), keep it
open. After it: retrieve the session once, retrieve its files, finish. Closing a session before the kexec
drops it; closing one that came over is an implicit finish. A client that dies closes: where its memory must
outlive it, on either side of the kexec, another process holds a duplicate of the session's descriptor.
"""

from __future__ import annotations

import ctypes

from iokeep.uapi import liveupdate as uapi
from iokeep.uapi.errnos import IoctlRefused, checked_ioctl, open_node
from iokeep.uapi.owner import FdOwner
from iokeep.uapi.transport import Transport


class LuoError(IoctlRefused):
    """A call on /dev/liveupdate or on a session was refused; see :class:`iokeep.uapi.errnos.IoctlRefused`."""


def _name(name: str) -> ctypes.Array[ctypes.c_uint8]:
    raw = name.encode()
    if len(raw) >= uapi.LIVEUPDATE_SESSION_NAME_LENGTH or b"\0" in raw:
        most = uapi.LIVEUPDATE_SESSION_NAME_LENGTH - 1
        raise ValueError(f"session name {name!r} is longer than {most} bytes or holds a NUL")
    return (ctypes.c_uint8 * uapi.LIVEUPDATE_SESSION_NAME_LENGTH)(*raw)


class LiveUpdate(FdOwner):
    """/dev/liveupdate, which one process at a time may have open. Sessions stay open when it is closed.

    :param fd: an open descriptor, owned from here on; None opens the node.
    :raises CapabilityError: the device node is missing or forbidden.
    :raises LuoError: EBUSY when another process has it, EIO when the old kernel's records are unreadable.
    """

    def __init__(self, transport: Transport, fd: int | None = None) -> None:
        super().__init__(transport, open_node(transport, "/dev/liveupdate", LuoError) if fd is None else fd)

    def create(self, name: str) -> Session:
        """A new session for the next kexec.

        :param name: 1 to 63 bytes, unique.
        """
        arg = uapi.liveupdate_ioctl_create_session(
            size=ctypes.sizeof(uapi.liveupdate_ioctl_create_session), fd=-1, name=_name(name)
        )
        operation = "LIVEUPDATE_IOCTL_CREATE_SESSION"
        request = uapi.LIVEUPDATE_IOCTL_CREATE_SESSION
        checked_ioctl(self.transport, self.fd, operation, request, arg, {"session": repr(name)}, LuoError)
        return Session(self.transport, arg.fd)

    def retrieve(self, name: str) -> Session:
        """A session that came over the kexec; each can be retrieved once per boot.

        Its name is free for :meth:`create` all the same: the kernel has a list for each direction.
        """
        arg = uapi.liveupdate_ioctl_retrieve_session(
            size=ctypes.sizeof(uapi.liveupdate_ioctl_retrieve_session), fd=-1, name=_name(name)
        )
        operation = "LIVEUPDATE_IOCTL_RETRIEVE_SESSION"
        request = uapi.LIVEUPDATE_IOCTL_RETRIEVE_SESSION
        checked_ioctl(self.transport, self.fd, operation, request, arg, {"session": repr(name)}, LuoError)
        return Session(self.transport, arg.fd)


class Session(FdOwner):
    """One session, by its descriptor. See the module's text for what the last close does."""

    def _ioctl(self, operation: str, request: int, arg: ctypes.Structure, **objects: object) -> int:
        objects = {"session": self.fd, **objects}
        return checked_ioctl(self.transport, self.fd, operation, request, arg, objects, LuoError)

    def preserve(self, fd: int, token: int) -> None:
        """Preserve a file over the kexec.

        :param token: its name after the kexec, unique in the session, u64.
        :raises LuoError: with the reason per errno; the session is as before.
        """
        if not 0 <= token < 1 << 64:
            raise ValueError(f"token {token:#x} is not in [0, 2^64 - 1]")
        arg = uapi.liveupdate_session_preserve_fd(
            size=ctypes.sizeof(uapi.liveupdate_session_preserve_fd), fd=fd, token=token
        )
        name = "LIVEUPDATE_SESSION_PRESERVE_FD"
        self._ioctl(name, uapi.LIVEUPDATE_SESSION_PRESERVE_FD, arg, fd=fd, token=f"{token:#x}")

    def retrieve(self, token: int) -> int:
        """A new descriptor of a file that came over the kexec; again and again for the same file."""
        if not 0 <= token < 1 << 64:
            raise ValueError(f"token {token:#x} is not in [0, 2^64 - 1]")
        arg = uapi.liveupdate_session_retrieve_fd(
            size=ctypes.sizeof(uapi.liveupdate_session_retrieve_fd), fd=-1, token=token
        )
        name = "LIVEUPDATE_SESSION_RETRIEVE_FD"
        self._ioctl(name, uapi.LIVEUPDATE_SESSION_RETRIEVE_FD, arg, token=f"{token:#x}")
        return int(arg.fd)

    def finish(self) -> None:
        """All is reclaimed: end the session; descriptors of its files stay.

        EBUSY while a prior domain or a device is not reclaimed, and then nothing is done. A memfd is no such
        thing: one that was not retrieved by now is dropped, with its content (mm/memfd_luo.c,
        memfd_luo_finish()).
        """
        arg = uapi.liveupdate_session_finish(size=ctypes.sizeof(uapi.liveupdate_session_finish))
        self._ioctl("LIVEUPDATE_SESSION_FINISH", uapi.LIVEUPDATE_SESSION_FINISH, arg)

    def name(self) -> str:
        """The session's name."""
        arg = uapi.liveupdate_session_get_name(size=ctypes.sizeof(uapi.liveupdate_session_get_name))
        self._ioctl("LIVEUPDATE_SESSION_GET_NAME", uapi.LIVEUPDATE_SESSION_GET_NAME, arg)
        return bytes(arg.name).split(b"\0", 1)[0].decode(errors="replace")
