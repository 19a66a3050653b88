# SPDX-License-Identifier: Apache-2.0
"""Would these files be preserved in a live-update session? Every reason, before the kernel's bare errno.

Looks at another process through /proc and changes nothing there. The rules are those of Linux 7.3.4
(kernel/liveupdate/luo_file.c, mm/memfd_luo.c); what an iommufd or a device needs is from the proposal, and
only asked where the kernel knows its calls. vmtest holds every rule against that kernel's own answer.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from iokeep.errors import CapabilityError
from iokeep.handover.abi import MEMFD_LUO_ALL_SEALS
from iokeep.uapi import liveupdate as luo
from iokeep.uapi.kernel import KernelTransport

F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE, F_SEAL_EXEC = 1, 2, 4, 8, 32
_FIXED_SIZE = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW
_SEALS = {1: "SEAL", 2: "SHRINK", 4: "GROW", 8: "WRITE", 16: "FUTURE_WRITE", 32: "EXEC"}
_PAGE = 4096
_UINT_MAX = 2**32 - 1
#: pages of the largest file whose array of folio pointers kvmalloc() gives (mm/slub.c: INT_MAX bytes)
_MOST_PAGES = (2**31 - 1) // 8
# include/uapi/linux/magic.h
_TMPFS, _HUGETLBFS = 0x01021994, 0x958458F6
#: in the order of the kernel's checks: the first is its answer
_ERRNOS = ("EEXIST", "EBADF", "ENOENT", "EBUSY", "EOPNOTSUPP", "EFBIG", "ENOMEM")
#: struct luo_session_ser records in a block: a duplicate name at a multiple of it breaks the next boot
SESSIONS_PER_BLOCK = 51
_SESSION_LINK = re.compile(r"anon_inode:\[luo_session\] (.*)", re.DOTALL)

REFUSED, WARNING = "refused", "warning"


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a file, or the session, would not come over as it is.

    :param severity: "refused": the kernel says no; "warning": it says yes, and something is lost or costs.
    :param errno: the C name that the kernel answers with, or "" for a warning.
    :param why: the reason. :param hint: what to do.
    """

    severity: str
    errno: str
    why: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What one descriptor is.

    :param link: what /proc/PID/fd/N leads to. :param kind: memfd, hugetlb, shmem (a file of a tmpfs that has
        no name), file, iommufd, vfio, session, path (opened with O_PATH), or what the link says ("pipe",
        "socket", "eventfd").
    :param inode: (st_dev, st_ino). :param size: bytes. :param allocated: bytes that have pages.
    :param seals: F_SEAL_*, or None: it has none, or they cannot be read.
    """

    link: str
    kind: str
    inode: tuple[int, int]
    size: int = 0
    allocated: int = 0
    seals: int | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """One descriptor that is to be preserved, in the order of preservation. :param token: or None: any."""

    pid: int
    fd: int
    token: int | None = None


@dataclass(slots=True)
class FileVerdict:
    """A descriptor and what stands against it; ``facts`` None: it is not open."""

    wanted: Wanted
    facts: FileFacts | None
    problems: list[Problem] = field(default_factory=list)


@dataclass(slots=True)
class Verdict:
    """Whether a session of these files, in this order, would be preserved.

    :param problems: of the session as a whole: its name, its order, what is left out.
    """

    files: list[FileVerdict]
    problems: list[Problem]
    name: str | None = None

    def all_problems(self) -> list[Problem]:
        """Of the session and of every file."""
        return [*self.problems, *(problem for file in self.files for problem in file.problems)]

    @property
    def preserves(self) -> bool:
        """There is something to preserve, and nothing would be refused."""
        return bool(self.files) and not any(problem.severity == REFUSED for problem in self.all_problems())


class Processes(Protocol):
    """What preflight asks of the processes of a host."""

    def descriptors(self, pid: int) -> list[int]:
        """Open descriptors. :raises CapabilityError: no such process, or it may not be looked at."""
        ...

    def facts(self, pid: int, fd: int) -> FileFacts | None:
        """What a descriptor is; None: it is not open. :raises CapabilityError: as descriptors."""
        ...

    def mapped(self, pid: int) -> set[tuple[int, int]]:
        """Inodes (st_dev, st_ino) of memfds that the process has mapped."""
        ...

    def session_names(self) -> list[str]:
        """Names of the sessions for the next kexec that are open on this host, as far as they can be seen."""
        ...

    def available(self) -> int | None:
        """Bytes of memory that can be pinned, about; None: it is not known."""
        ...


class ProcFs:
    """Processes by /proc.

    :param root: where /proc is; another directory in tests, whose links lead nowhere.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._proc = root / "proc"
        self._live = root == Path("/")

    def _directory(self, pid: int, what: str) -> Path:
        return self._proc / str(pid) / what

    def descriptors(self, pid: int) -> list[int]:
        """See :class:`Processes`."""
        try:
            return sorted(int(each.name) for each in self._directory(pid, "fd").iterdir())
        except FileNotFoundError as error:
            raise CapabilityError(
                f"there is no process {pid}", "see ps; in a container pids differ"
            ) from error
        except PermissionError as error:
            raise CapabilityError(
                f"process {pid} may not be looked at: {error.strerror}", "run as its user, or as root"
            ) from error

    def facts(self, pid: int, fd: int) -> FileFacts | None:
        """See :class:`Processes`."""
        path = self._directory(pid, "fd") / str(fd)
        try:
            link = os.readlink(path)  # noqa: PTH115  (what it says is no path)
        except FileNotFoundError:
            self.descriptors(pid)
            return None
        except PermissionError as error:
            raise CapabilityError(
                f"process {pid} may not be looked at: {error.strerror}", "run as its user, or as root"
            ) from error
        try:
            stat = path.stat()
        except OSError:
            return FileFacts(link, kind_of(link), (0, 0))
        kind = kind_of(link, nlink=stat.st_nlink, filesystem=_filesystem(path))
        if self._flags(pid, fd) & os.O_PATH:
            kind = "path"
        seals = self._seals(path) if kind in ("memfd", "hugetlb", "shmem") else None
        return FileFacts(link, kind, (stat.st_dev, stat.st_ino), stat.st_size, stat.st_blocks * 512, seals)

    def _flags(self, pid: int, fd: int) -> int:
        """Flags of open(2), of another process's descriptor."""
        try:
            text = (self._directory(pid, "fdinfo") / str(fd)).read_text()
        except OSError:
            return 0
        found = re.search(r"^flags:\s*([0-7]+)$", text, re.MULTILINE)
        return int(found[1], 8) if found else 0

    @staticmethod
    def _seals(path: Path) -> int | None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            return fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError:
            return None
        finally:
            os.close(fd)

    def mapped(self, pid: int) -> set[tuple[int, int]]:
        """See :class:`Processes`."""
        try:
            text = self._directory(pid, "maps").read_text(errors="replace")
        except OSError:
            return set()
        out = set()
        for line in text.splitlines():
            words = line.split(maxsplit=5)
            if len(words) == 6 and words[5].startswith("/memfd:"):
                major, minor = (int(part, 16) for part in words[3].split(":"))
                out.add((os.makedev(major, minor), int(words[4])))
        return out

    def session_names(self) -> list[str]:
        """See :class:`Processes`."""
        names: set[str] = set()
        for directory in self._proc.glob("[0-9]*/fd"):
            with contextlib.suppress(OSError):  # it may not be looked at, or has ended
                for each in directory.iterdir():
                    name = self._session_name(each)
                    if name is not None:
                        names.add(name)
        return sorted(names)

    def _session_name(self, path: Path) -> str | None:
        """The name of a session for the next kexec; None: the descriptor is none, or was closed just now."""
        try:
            found = _SESSION_LINK.fullmatch(os.readlink(path))  # noqa: PTH115
        except OSError:
            return None
        if found is None or (self._live and is_incoming(int(path.parts[-3]), int(path.name))):
            return None
        return found[1]

    def available(self) -> int | None:
        """See :class:`Processes`. Without what lies in CMA (KHO's scratch areas): no page is pinned there."""
        try:
            text = (self._proc / "meminfo").read_text()
        except OSError:
            return None
        found = {
            key: int(value) << 10 for key, value in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)
        }
        if "MemAvailable" not in found:
            return None
        return max(0, found["MemAvailable"] - found.get("CmaFree", 0))


class _Longer(ctypes.Structure):
    """LIVEUPDATE_SESSION_RETRIEVE_FD of a program that is newer than any kernel."""

    head: luo.liveupdate_session_retrieve_fd
    tail: int
    _fields_ = [("head", luo.liveupdate_session_retrieve_fd), ("tail", ctypes.c_uint64)]


def is_incoming(pid: int, fd: int) -> bool:
    """Whether a session came over the last kexec: those have names of their own (luo_session.c: two lists).

    Asked by a call that every session refuses: one for the next kexec says first that it is one (EINVAL), one
    from the last that it does not know so long a structure (E2BIG). False where it cannot be asked.
    """
    kernel = KernelTransport()
    try:
        mine = kernel.getfd(pid, fd)
    except OSError:
        return False
    ask = _Longer(luo.liveupdate_session_retrieve_fd(size=ctypes.sizeof(_Longer)), 1)
    try:
        kernel.ioctl(mine, luo.LIVEUPDATE_SESSION_RETRIEVE_FD, ask)
    except OSError as refused:
        return refused.errno == errno.E2BIG
    finally:
        kernel.close(mine)
    return False


def _filesystem(path: Path) -> int | None:
    """f_type of statfs(2), the first member of the structure; None where it cannot be asked."""
    libc = ctypes.CDLL(None)
    room = (ctypes.c_long * 64)()  # 120 bytes on 64-bit machines
    if libc.statfs(os.fsencode(path), ctypes.byref(room)):
        return None
    return int(room[0])


def kind_of(link: str, *, nlink: int = 0, filesystem: int | None = None) -> str:
    """What a descriptor is, by the text of its link, the number of its names and its file system's type."""
    if _SESSION_LINK.fullmatch(link):
        return "session"
    if link == "/dev/iommu":
        return "iommufd"
    if link.startswith("/dev/vfio/devices/"):
        return "vfio"
    if link.startswith("/memfd:"):
        return "hugetlb" if filesystem == _HUGETLBFS else "memfd"
    found = re.fullmatch(r"anon_inode:\[?([\w-]+)\]?.*", link)
    if found:
        return found[1]
    found = re.fullmatch(r"(\w+):\[\d+\]", link)
    if found:
        return found[1]
    # mm/memfd_luo.c memfd_luo_can_preserve(): any file of a tmpfs that has no name
    return "shmem" if filesystem == _TMPFS and not nlink else "file"


def seal_names(seals: int) -> str:
    """``SEAL|SHRINK|GROW``, unknown bits as hex; ``none``."""
    names = [name for bit, name in _SEALS.items() if seals & bit]
    rest = seals & ~sum(_SEALS)
    return "|".join(names + ([f"{rest:#x}"] if rest else [])) or "none"


def _memory(facts: FileFacts) -> Iterable[Problem]:
    if facts.size > _UINT_MAX * _PAGE:
        yield Problem(REFUSED, "EFBIG", f"{facts.size >> 40} TiB are more pages than the record can count",
                      "split it over several memfds")  # fmt: skip
    elif facts.size > _MOST_PAGES * _PAGE:
        yield Problem(
            REFUSED,
            "ENOMEM",
            f"a file of {facts.size >> 30} GiB: Linux 7.3 cannot list the pages of a file of 1 TiB or more, "
            "and the attempt logs a warning (a panic where panic_on_warn is set)",
            "split it over several memfds, each smaller than 1 TiB",
        )
    if facts.allocated < facts.size:
        hole = (facts.size - facts.allocated) >> 20
        yield Problem(WARNING, "", f"{hole} MiB of it are holes, and preserve fills them with pages",
                      "have that much memory free")  # fmt: skip
    if facts.seals is None:
        yield Problem(WARNING, "", "its seals cannot be read", "run as the user of the process, or as root")
        return
    if unknown := facts.seals & ~MEMFD_LUO_ALL_SEALS:
        yield Problem(REFUSED, "EOPNOTSUPP", f"seals {seal_names(unknown)} cannot be carried", "")
    if facts.seals & F_SEAL_EXEC and not facts.seals & F_SEAL_WRITE:
        yield Problem(
            WARNING,
            "",
            "it is sealed against execution (MFD_NOEXEC_SEAL), and Linux 7.3 brings such a memfd back sealed "
            "against writes too: the guest's memory is then read-only",
            "create it with MFD_EXEC | MFD_ALLOW_SEALING (see vm.memfd_noexec)",
        )
    if facts.seals & _FIXED_SIZE != _FIXED_SIZE:
        lacking = seal_names(_FIXED_SIZE & ~facts.seals)
        yield Problem(
            WARNING,
            "",
            f"it is not sealed {lacking}: if it shrinks after it was mapped, devices go on with pages that "
            "the file has lost, and a kernel that preserves iommufds refuses its areas",
            "fcntl(F_ADD_SEALS) before it is mapped",
        )


#: what no released kernel preserves, in words
_ARTICLES = {"iommufd": "an iommufd", "vfio": "a VFIO device"}


def _kind(facts: FileFacts, preserves_iommufd: bool) -> Iterable[Problem]:
    kind = facts.kind
    if kind in ("memfd", "shmem"):
        yield from _memory(facts)
    elif kind == "hugetlb":
        yield Problem(
            REFUSED,
            "ENOENT",
            "a hugetlb memfd: no kernel preserves those yet",
            "a plain memfd; transparent huge pages give it large folios (shmem_enabled=advise, madvise)",
        )
    elif kind in _ARTICLES:
        if not preserves_iommufd:
            yield Problem(
                REFUSED,
                "ENOENT",
                f"{_ARTICLES[kind]}: this kernel has no handler for it",
                "leave it out: stop the device, close it, and map the areas again after the kexec",
            )
    elif kind == "path":
        yield Problem(REFUSED, "EBADF", "it was opened with O_PATH", "a descriptor for reading or writing")
    elif kind == "session":
        yield Problem(REFUSED, "ENOENT", "a live-update session is not a file to preserve", "leave it out")
    else:
        yield Problem(
            REFUSED,
            "ENOENT",
            f"a {kind}: only memfds can be preserved, and files of a tmpfs that have no name",
            "hand it to the next process in another way, or write its content to a memfd",
        )


def _order(files: Sequence[FileVerdict]) -> None:
    """Memfds, then the iommufd, then its devices: what comes too late is refused (EINVAL)."""
    ranks = {"memfd": 0, "shmem": 0, "iommufd": 1, "vfio": 2}
    for i, file in enumerate(files):
        rank = ranks.get(file.facts.kind, 0) if file.facts else 0
        later = [
            other.facts.kind
            for other in files[i + 1 :]
            if other.facts and ranks.get(other.facts.kind, 9) < rank
        ]
        if later:
            file.problems.append(
                Problem(
                    REFUSED,
                    "EINVAL",
                    f"it comes before {_ARTICLES.get(later[0], f'a {later[0]}')}, which it may need",
                    "preserve memfds first, then the iommufd, then devices",
                )
            )


def _twice(files: Sequence[FileVerdict]) -> None:
    tokens: dict[int, Wanted] = {}
    inodes: dict[tuple[int, int], Wanted] = {}
    for file in files:
        wanted, facts = file.wanted, file.facts
        if wanted.token is not None:
            first = tokens.setdefault(wanted.token, wanted)
            if first is not wanted:
                file.problems.append(
                    Problem(
                        REFUSED,
                        "EEXIST",
                        f"token {wanted.token:#x} is already that of descriptor {first.pid}:{first.fd}",
                        "choose another token",
                    )
                )
        if facts is not None and facts.inode != (0, 0) and facts.kind in ("memfd", "shmem", "hugetlb"):
            first = inodes.setdefault(facts.inode, wanted)
            if first is not wanted:
                file.problems.append(
                    Problem(
                        REFUSED,
                        "EBUSY",
                        f"it is the same file as descriptor {first.pid}:{first.fd}",
                        "preserve it once; a session gives any number of descriptors back",
                    )
                )


def _rank(problem: Problem) -> int:
    """What the kernel would say first comes first; warnings come last."""
    return _ERRNOS.index(problem.errno) if problem.errno in _ERRNOS else len(_ERRNOS)


def _holes(files: Sequence[FileVerdict], available: int | None) -> Iterable[Problem]:
    """mm/memfd_luo.c memfd_luo_preserve_folios() has a page made for every hole, and pins it."""
    facts = [file.facts for file in files if file.facts and file.facts.kind in ("memfd", "shmem")]
    missing = sum({each.inode: max(0, each.size - each.allocated) for each in facts}.values())
    if available is not None and missing > available:
        yield Problem(
            REFUSED,
            "ENOMEM",
            f"{missing >> 20} MiB of these files are holes, which preserve fills, and {available >> 20} MiB "
            "of memory are free for it: out of memory, or a process is killed to make room, this one first",
            "punch nothing out of guest RAM before the update, or free memory",
        )


def check_name(name: str, sessions: Sequence[str]) -> list[Problem]:
    """Whether a session could be created under this name. :param sessions: names of those that are open."""
    raw = os.fsencode(name)
    if not raw or len(raw) >= luo.LIVEUPDATE_SESSION_NAME_LENGTH or b"\0" in raw:
        return [Problem(REFUSED, "EINVAL", "a session name has 1 to 63 bytes, and no NUL", "choose another")]
    if name not in sessions:
        return []
    problem = Problem(REFUSED, "EEXIST", f"a session {name!r} is open", "close it, or choose another name")
    if len(sessions) % SESSIONS_PER_BLOCK:
        return [problem]
    return [
        problem,
        Problem(
            WARNING,
            "",
            f"{len(sessions)} sessions are open, a multiple of {SESSIONS_PER_BLOCK}: on Linux 7.3 the "
            "attempt alone leaves an empty block in the records, and the next kernel panics at boot",
            "do not try it; if it was tried, create one more session before the kexec, which fills the block",
        ),
    ]


def candidates(processes: Processes, pid: int) -> list[Wanted]:
    """What of a process a live update is about: memfds, then iommufds, then VFIO devices."""
    ranks = {"memfd": 0, "hugetlb": 0, "shmem": 0, "iommufd": 1, "vfio": 2}
    found = []
    seen: set[tuple[int, int]] = set()
    for fd in processes.descriptors(pid):
        facts = processes.facts(pid, fd)
        if facts is None or facts.kind not in ranks:
            continue
        if facts.kind in ("memfd", "hugetlb", "shmem") and facts.inode in seen:
            continue  # another descriptor of the same file
        seen.add(facts.inode)
        found.append((ranks[facts.kind], fd))
    return [Wanted(pid, fd) for _, fd in sorted(found)]


def preflight(
    processes: Processes,
    wanted: Sequence[Wanted],
    *,
    name: str | None = None,
    preserves_iommufd: bool = False,
) -> Verdict:
    """Would a session of these files be preserved, in this order?

    :param name: of the session, checked against those that are open.
    :param preserves_iommufd: the kernel knows IOMMU_HWPT_LIVEUPDATE_MARK_PRESERVE.
    :raises CapabilityError: a process is not there, or may not be looked at.
    """
    files = [FileVerdict(each, processes.facts(each.pid, each.fd)) for each in wanted]
    for file in files:
        if file.facts is None:
            why = f"descriptor {file.wanted.fd} of process {file.wanted.pid} is not open"
            file.problems.append(Problem(REFUSED, "EBADF", why, "ls -l /proc/PID/fd shows what is"))
        else:
            file.problems += _kind(file.facts, preserves_iommufd)
    _twice(files)
    if preserves_iommufd:
        _order(files)
    for file in files:
        file.problems.sort(key=_rank)
    problems = []
    if not files:
        problems.append(Problem(WARNING, "", "nothing to preserve was found", "name descriptors with --fd"))
    kept = {file.facts.inode for file in files if file.facts}
    for pid in sorted({each.pid for each in wanted}):
        left = processes.mapped(pid) - kept
        if left:
            problems.append(
                Problem(
                    WARNING,
                    "",
                    f"process {pid} has {len(left)} more memfds mapped that are not in the session: their "
                    "content is lost, and a kernel that preserves iommufds refuses areas of them",
                    "add them with --fd",
                )
            )
    problems += _holes(files, processes.available())
    if name is not None:
        problems += check_name(name, processes.session_names())
    return Verdict(files, problems, name)
