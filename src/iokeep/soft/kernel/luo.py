# SPDX-License-Identifier: Apache-2.0
"""The Live Update Orchestrator: /dev/liveupdate, sessions, tokens, file handlers.

Behaviour and errnos follow kernel/liveupdate/luo_core.c, luo_session.c and luo_file.c of Linux 7.3.4:

* one opener at a time (EBUSY); what the previous kernel handed over is read at the first open, and when that
  fails the device gives EIO for good;
* sessions that were made here are *outgoing*, sessions that came over the kexec are *incoming*;
* closing an outgoing session unpreserves its files in reverse order; closing an incoming one is an implicit
  finish, and where that fails the session stays listed, marked retrieved: nobody can retrieve it again.

What a kind of file needs to survive is in its :class:`FileHandler`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from iokeep.soft.kernel.syserror import SysError

if TYPE_CHECKING:
    from iokeep.soft.kernel.files import File

#: LIVEUPDATE_SESSION_NAME_LENGTH of include/uapi/linux/liveupdate.h, terminator included
NAME_BYTES = 64
#: kho_block sets: at most 10000 blocks (kernel/liveupdate/kho_block.c), 51 sessions or 63 files in each
SESSIONS_MAX = 10000 * 51
FILES_MAX = 10000 * 63


class FileHandler:
    """What LUO calls for one kind of file (struct liveupdate_file_ops).

    Every method may raise SysError, whose errno the ioctl then returns.

    :cvar compatible: the string in the records, "<thing>-v<n>"; the next kernel looks its handler up by it.
    :cvar flb: names of the file-lifecycle-bound objects that live while a file of this kind is preserved.
    """

    compatible: str
    flb: tuple[str, ...]

    def can_preserve(self, file: File) -> bool:
        """True where this handler is the one for ``file``; the first that says so is taken."""
        raise NotImplementedError

    def get_id(self, file: File) -> Hashable:
        """What must not be preserved twice; the file itself by default, the inode for memfds."""
        return id(file)

    def preserve(self, session: Session, file: File, token: int) -> Any:
        """Check and fix the state of ``file``; the return value comes back as ``private``."""
        raise NotImplementedError

    def unpreserve(self, file: File, private: Any) -> None:
        """Undo :meth:`preserve`."""
        raise NotImplementedError

    def freeze(self, file: File, private: Any) -> int:
        """Write the last state into preserved memory; returns the u64 for the next kernel (a pa)."""
        raise NotImplementedError

    def unfreeze(self, file: File, private: Any) -> None:
        """Undo :meth:`freeze` when the reboot fails."""

    def check_incoming(self, session: Session, entry: LuoFile) -> None:
        """Read what came over the kexec, at deserialisation. Raises SysError where it cannot be used."""

    def retrieve(self, session: Session, entry: LuoFile) -> File:
        """Make the file again in the new kernel; the caller owns one reference."""
        raise NotImplementedError

    def can_finish(self, session: Session, entry: LuoFile) -> bool:
        """False keeps the whole session from finishing (EBUSY)."""
        return True

    def finish(self, session: Session, entry: LuoFile) -> None:
        """Let go of what was preserved; what nobody retrieved is freed here."""
        raise NotImplementedError


@dataclass(slots=True, eq=False)
class LuoFile:
    """One preserved file of a session (struct luo_file).

    ``retrieve_status``: 0 = not tried, 1 = retrieved, negative = the errno of the attempt, for good.
    """

    handler: FileHandler
    token: int
    file: File | None = None
    data: int = 0
    private: Any = None
    retrieve_status: int = 0


@dataclass(slots=True, eq=False)
class Session:
    """A named set of preserved files. ``incoming``: it came over the kexec."""

    name: str
    incoming: bool = False
    retrieved: bool = False
    finished: bool = False
    files: list[LuoFile] = field(default_factory=list)

    def by_token(self, token: int) -> LuoFile | None:
        """The file with this token, or None."""
        return next((entry for entry in self.files if entry.token == token), None)

    def token_of(self, handler: FileHandler, file: File) -> int | None:
        """liveupdate_get_token_outgoing: the token under which ``file`` is preserved in this session."""
        wanted = handler.get_id(file)
        for entry in self.files:
            if entry.handler is handler and entry.file is not None and handler.get_id(entry.file) == wanted:
                return entry.token
        return None


@dataclass(frozen=True, slots=True)
class IncomingFile:
    """A file as the previous kernel's records name it."""

    token: int
    compatible: str
    data: int


@dataclass(frozen=True, slots=True)
class IncomingSession:
    """A session as the previous kernel's records name it."""

    name: str
    files: tuple[IncomingFile, ...]


class Luo:
    """State of the orchestrator in one kernel.

    :param log: the kernel log.
    :param handlers: the kinds of file that this kernel can carry, in order of registration.
    :param incoming: what the previous kernel handed over; None where there was nothing.
    :param incoming_error: text of why the handover cannot be read; the device then gives EIO for good.
    """

    def __init__(
        self,
        log: Callable[[str], None],
        handlers: list[FileHandler],
        incoming: list[IncomingSession] | None = None,
        incoming_error: str = "",
    ) -> None:
        self.log = log
        self.handlers = handlers
        self.outgoing: list[Session] = []
        self.incoming: list[Session] = []
        self.preserved: dict[Hashable, File] = {}
        self.flb_count: dict[str, int] = {}
        #: called with the FLB's name when its last incoming user has finished (luo_flb_file_finish)
        self.flb_finished: Callable[[str], None] = lambda name: None
        #: called when the last incoming session is finished
        self.all_finished: Callable[[], None] = lambda: None
        self.device_open = False
        self.frozen = False
        self._handed_over = incoming or []
        self._incoming_error = incoming_error
        self._deserialised = False
        self._error = 0
        self._frozen_files: list[tuple[Session, LuoFile]] = []

    # ---- the device

    def open_device(self) -> None:
        """luo_open(): a singleton; reads the handover at the first open.

        :raises SysError: EBUSY another opener; EIO what was handed over cannot be used, on every open.
        """
        if self.device_open:
            raise SysError(errno.EBUSY)
        self.deserialise()
        self.device_open = True

    def release_device(self) -> None:
        """The opener closed its last fd."""
        self.device_open = False

    def deserialise(self) -> None:
        """luo_session_deserialize(): once; a failure is kept for good."""
        if self._deserialised:
            if self._error:
                raise SysError(self._error)
            return
        self._deserialised = True
        if self._incoming_error:
            self._error = errno.EIO
            self.log(f"luo: cannot restore sessions: {self._incoming_error}")
            raise SysError(self._error)
        try:
            for handed in self._handed_over:
                self._deserialise_session(handed)
        except SysError as error:
            self._error = errno.EIO
            self.log(f"luo: deserialisation failed: {error.why}; /dev/liveupdate stays closed in this boot")
            raise SysError(self._error) from error

    def _deserialise_session(self, handed: IncomingSession) -> None:
        if any(s.name == handed.name for s in self.incoming):
            raise SysError(errno.EEXIST, f"two sessions are named [{handed.name}]")
        session = Session(handed.name, incoming=True)
        self.incoming.append(session)
        for record in handed.files:
            handler = next((h for h in self.handlers if h.compatible == record.compatible), None)
            if handler is None:
                raise SysError(errno.ENOENT, f"no registered handler for compatible '{record.compatible}'")
            if session.by_token(record.token) is not None:
                raise SysError(errno.EEXIST, f"session [{handed.name}] has token {record.token:#x} twice")
            session.files.append(LuoFile(handler, record.token, data=record.data))
        for entry in session.files:
            entry.handler.check_incoming(session, entry)
        for entry in session.files:
            for name in entry.handler.flb:
                self.flb_count[name] = self.flb_count.get(name, 0) + 1

    # ---- sessions

    @staticmethod
    def name_of(raw: bytes) -> str:
        """The name in a 64-byte field. :raises SysError: EINVAL empty or not terminated."""
        end = raw.find(b"\0")
        if end <= 0:
            raise SysError(errno.EINVAL)
        try:
            return raw[:end].decode()
        except UnicodeDecodeError:
            # Linux takes any bytes; the handover library of this project wants text.
            raise SysError(errno.EINVAL, f"session name {raw[:end]!r} is not UTF-8") from None

    @staticmethod
    def wanted_name(raw: bytes) -> str | None:
        """The name of a session to retrieve; None where none can have it: empty, or not terminated."""
        end = raw.find(b"\0")
        try:
            return raw[:end].decode() if end > 0 else None
        except UnicodeDecodeError:
            return None

    def create(self, name: str) -> Session:
        """luo_session_create(). :raises SysError: EEXIST; ENOMEM too many; EBUSY the reboot has begun."""
        if self.frozen:
            raise SysError(errno.EBUSY)
        if any(s.name == name for s in self.outgoing):
            raise SysError(errno.EEXIST)
        if len(self.outgoing) >= SESSIONS_MAX:
            raise SysError(errno.ENOMEM)
        session = Session(name)
        self.outgoing.append(session)
        return session

    def retrieve_session(self, name: str | None) -> Session:
        """luo_session_retrieve(). :raises SysError: ENOENT unknown; EINVAL it was retrieved before."""
        session = next((s for s in self.incoming if s.name == name), None)
        if session is None:
            raise SysError(errno.ENOENT)
        if session.retrieved:
            raise SysError(errno.EINVAL, f"session [{name}] was retrieved before")
        session.retrieved = True
        return session

    def release_session(self, session: Session) -> None:
        """luo_session_release(): the last fd is gone."""
        if not session.incoming:
            self.unpreserve_files(session)
            self.outgoing.remove(session)
            return
        if session not in self.incoming:
            return
        try:
            self.finish(session)
        except SysError as error:
            # luo_session.c: the session stays listed and marked retrieved: held until the next boot.
            self.log(
                f"luo: session [{session.name}]: implicit finish failed: {error.why}; its files are held"
            )
            return
        self.incoming.remove(session)

    # ---- files

    def preserve(self, session: Session, token: int, file: File | None) -> None:
        """luo_preserve_file(). ``file``: None for a bad fd.

        :raises SysError: EINVAL incoming session; EEXIST token; ENOSPC; EBADF; ENOENT no handler takes such a
            file; EBUSY preserved already; what the handler says.
        """
        if session.incoming:
            raise SysError(errno.EINVAL, "PRESERVE_FD on an incoming session")
        if self.frozen:
            raise SysError(errno.EBUSY)
        if session.by_token(token) is not None:
            raise SysError(errno.EEXIST)
        if len(session.files) >= FILES_MAX:
            raise SysError(errno.ENOSPC)
        if file is None:
            raise SysError(errno.EBADF)
        handler = next((h for h in self.handlers if h.can_preserve(file)), None)
        if handler is None:
            raise SysError(errno.ENOENT, "no handler can preserve such a file")
        key = handler.get_id(file)
        if key in self.preserved:
            raise SysError(errno.EBUSY, "the file is preserved already")
        entry = LuoFile(handler, token)
        entry.private = handler.preserve(session, file, token)
        file.get()
        entry.file = file
        self.preserved[key] = file
        session.files.append(entry)
        for name in handler.flb:
            self.flb_count[name] = self.flb_count.get(name, 0) + 1

    def unpreserve_files(self, session: Session) -> None:
        """luo_file_unpreserve_files(): last preserved first."""
        while session.files:
            entry = session.files[-1]
            file = entry.file
            assert file is not None
            entry.handler.unpreserve(file, entry.private)
            self._forget(entry)
            session.files.pop()
            for name in entry.handler.flb:
                self.flb_count[name] -= 1
            file.put()

    def retrieve(self, session: Session, token: int) -> File:
        """luo_retrieve_file(): any order, any number of times; the caller owns one reference.

        :raises SysError: EINVAL outgoing session; ENOENT token; what the handler said, for ever after.
        """
        if not session.incoming:
            raise SysError(errno.EINVAL, "RETRIEVE_FD on an outgoing session")
        entry = session.by_token(token)
        if entry is None:
            raise SysError(errno.ENOENT)
        if entry.retrieve_status < 0:
            raise SysError(-entry.retrieve_status, "an earlier retrieve of this file failed")
        if entry.retrieve_status == 0:
            try:
                entry.file = entry.handler.retrieve(session, entry)
            except SysError as error:
                entry.retrieve_status = -error.errno
                raise
            entry.retrieve_status = 1
            self.preserved[entry.handler.get_id(entry.file)] = entry.file
        assert entry.file is not None
        entry.file.get()
        return entry.file

    def finish(self, session: Session) -> None:
        """luo_file_finish(): all or nothing, last file first.

        :raises SysError: EINVAL outgoing session; EBUSY a handler is not ready, and nothing was done.
        """
        if not session.incoming:
            raise SysError(errno.EINVAL, "FINISH on an outgoing session")
        for entry in session.files:
            if not entry.handler.can_finish(session, entry):
                raise SysError(
                    errno.EBUSY, f"token {entry.token:#x} ({entry.handler.compatible}) is not reclaimed"
                )
        first_time = not session.finished
        while session.files:
            entry = session.files[-1]
            entry.handler.finish(session, entry)
            if entry.file is not None:
                self._forget(entry)
                entry.file.put()
            session.files.pop()
            for name in entry.handler.flb:
                self.flb_count[name] -= 1
                if self.flb_count[name] == 0:
                    self.flb_finished(name)
        session.finished = True
        if first_time and all(s.finished for s in self.incoming):
            self.all_finished()

    def _forget(self, entry: LuoFile) -> None:
        assert entry.file is not None
        self.preserved.pop(entry.handler.get_id(entry.file), None)

    # ---- reboot

    def freeze(self) -> list[IncomingSession]:
        """liveupdate_reboot(): freeze every file of every outgoing session, first preserved first.

        On success the lists stay locked for ever (nothing can be created or preserved any more); a failure
        unfreezes what was frozen and the errno makes the reboot fail.
        """
        frozen: list[tuple[Session, LuoFile]] = []
        out: list[IncomingSession] = []
        self.frozen = True
        try:
            for session in self.outgoing:
                files = []
                for entry in session.files:
                    assert entry.file is not None
                    entry.data = entry.handler.freeze(entry.file, entry.private)
                    frozen.append((session, entry))
                    files.append(IncomingFile(entry.token, entry.handler.compatible, entry.data))
                out.append(IncomingSession(session.name, tuple(files)))
        except Exception:
            self._thaw(frozen)
            raise
        self._frozen_files = frozen
        return out

    def unfreeze(self) -> None:
        """Undo :meth:`freeze` after a later step of the reboot failed."""
        self._thaw(self._frozen_files)

    def _thaw(self, frozen: list[tuple[Session, LuoFile]]) -> None:
        for _, entry in frozen:
            assert entry.file is not None
            entry.handler.unfreeze(entry.file, entry.private)
        self._frozen_files = []
        self.frozen = False
