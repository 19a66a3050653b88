# SPDX-License-Identifier: Apache-2.0
"""Debian's newest arm64 kernels as they are, and a small system around them: Python, numpy, busybox.

The cache is ``${XDG_CACHE_HOME:-~/.cache}/iokeep/vmtest/arm64/`` with ``<flavour>_<version>-<hash>/``
(``vmlinuz``, ``config``, ``modules.cpio``) and ``user-<hash>/`` (``user.cpio``, ``packages``). What is there
is used as it is, with no network; ``IOKEEP_VM_REFRESH=1`` asks the mirror for newer versions first.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import lzma
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vmtest.apt import SUITES, Missing, PrivateApt, unpack
from vmtest.kernel import cache, say

#: flavours of Debian's kernel: pages of 4K, and of 16K
FLAVOURS = ("arm64", "arm64-16k")
#: user space, of the stable suite; numpy brings Python
USERLAND = ("busybox-static", "python3-numpy")
#: what a stock kernel has as modules, in the order of loading; it has no iommufd
MODULES = ("vfio", "vfio_iommu_type1", "vfio-pci-core", "vfio-pci")
_SUITES = ("stable", *SUITES)
#: what of the packages goes into the guest, and what of that does not
_KEEP = ("bin/", "lib/", "sbin/", "usr/bin/", "usr/lib/", "usr/sbin/")
_DROP = ("gconv", "include", "tests", "test", "idlelib", "ensurepip", "pydoc_data", "f2py")
_LINKS = {"bin": "usr/bin", "lib": "usr/lib", "sbin": "usr/bin", "usr/sbin": "bin"}
_COMMANDS = ("sh", "mount", "insmod", "ln", "mkdir", "find", "cpio")


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel, as its packages have it."""

    path: Path

    @property
    def version(self) -> str:
        """Version of its package."""
        return self.path.name.partition("_")[2].rpartition("-")[0]

    @property
    def image(self) -> Path:
        """What boots."""
        return self.path / "vmlinuz"

    @property
    def modules(self) -> Path:
        """Its modules, a cpio archive (newc)."""
        return self.path / "modules.cpio"


def _base() -> Path:
    return cache() / "arm64"


def _key(*what: object) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:12]


def _cached(pattern: str, make: Callable[[Path], Path]) -> Path:
    """The newest complete directory, or a new one; ``make`` gets a directory to work in, fills ``out`` in it,
    and returns what to move that to; leaving it empty says that what is there will do.
    """
    _base().mkdir(parents=True, exist_ok=True)
    with (_base() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run may be at it
        found = sorted(_base().glob(pattern), key=lambda path: path.stat().st_mtime)
        if found and not os.environ.get("IOKEEP_VM_REFRESH"):
            return found[-1]
        work = _base() / "work"
        shutil.rmtree(work, ignore_errors=True)
        (work / "out").mkdir(parents=True)
        done = make(work)
        if any((work / "out").iterdir()):
            shutil.rmtree(done, ignore_errors=True)
            (work / "out").rename(done)
        shutil.rmtree(work)
        return done


@functools.cache
def kernel(flavour: str) -> Kernel:
    """A kernel of :data:`FLAVOURS`, from the cache or fetched now.

    :raises Missing: this machine cannot; the message says why.
    """
    key = _key(MODULES)

    def make(work: Path) -> Path:
        name = f"linux-image-{flavour}"
        say(f"looking for the newest {name}")
        apt = PrivateApt(_base() / "apt", _SUITES, architecture="arm64")
        name, version = apt.newest(name)
        done = _base() / f"{flavour}_{version}-{key}"
        if done.exists():
            return done
        say(f"fetching {name} {version}")
        for package in apt.download_built_with(name, version, work):
            unpack(package, work / "root")
        shutil.copy(_one(work / "root", "vmlinuz"), work / "out/vmlinuz")
        shutil.copy(_one(work / "root", "config"), work / "out/config")
        write(work / "out/modules.cpio", _modules(work / "root"))
        return done

    return Kernel(_cached(f"{flavour}_*-{key}", make))


def userland(compiled: Callable[[Path], bytes]) -> Path:
    """User space, from the cache or fetched now, as a cpio archive that others may follow.

    :param compiled: boots what is in an archive, and returns one of the bytecode that its Python has
        written: without, each import takes the emulated CPU long.
    :raises Missing: this machine cannot; the message says why.
    """
    done = _base() / f"user-{_key(USERLAND, _KEEP, _DROP, _LINKS, _COMMANDS)}"

    def make(work: Path) -> Path:
        say(f"fetching {', '.join(USERLAND)} and what they need")
        apt = PrivateApt(_base() / "apt", _SUITES, architecture="arm64")
        apt.update()
        packages = apt.download_all(*USERLAND, suite="stable")
        names = "".join(f"{package.name}\n" for package in packages)
        known = done / "packages"
        if known.exists() and known.read_text() == names:
            apt.clean()
            return done
        for package in packages:
            unpack(package, work / "root")
        apt.clean()
        (work / "out/packages").write_text(names)
        archive = work / "out/user.cpio"
        write(archive, [*_skeleton(), *_files(work / "root")])
        say("compiling what the guest's Python imports, in the guest")
        code = compiled(archive)
        with archive.open("ab") as out:
            out.write(code)
        return done

    return _cached(done.name, make) / "user.cpio"


def _one(root: Path, stem: str) -> Path:
    """/boot/STEM-VERSION, or /usr/lib/modules/VERSION/STEM of newer packages."""
    found = [*root.glob(f"boot/{stem}-*"), *root.glob(f"usr/lib/modules/*/{stem}")]
    if len(found) != 1:
        raise Missing(f"the packages of the kernel have {len(found)} files {stem}, not one")
    return found[0]


# -- archives --------------------------------------------------------------------------------------------
#: name, mode, contents (of a link: its target)
Entry = tuple[str, int, bytes]


def directory(name: str) -> Entry:
    """A directory."""
    return name, stat.S_IFDIR | 0o755, b""


def program(name: str, data: bytes) -> Entry:
    """A file that may be run."""
    return name, stat.S_IFREG | 0o755, data


def _link(name: str, target: str) -> Entry:
    return name, stat.S_IFLNK | 0o777, target.encode()


def _skeleton() -> Iterator[Entry]:
    """Directories that the packages expect, and busybox's names."""
    for name in ("dev", "proc", "sys", "run", "tmp", "usr", "usr/bin", "usr/lib"):
        yield directory(name)
    for name, target in _LINKS.items():
        yield _link(name, target)
    for name in _COMMANDS:
        yield _link(f"usr/bin/{name}", "busybox")


def _files(root: Path) -> Iterator[Entry]:
    """What of unpacked packages is needed."""
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        text = name.as_posix()
        if any(part in _DROP for part in name.parts) or not text.startswith(_KEEP):
            continue
        first, _, rest = text.partition("/")
        if first in _LINKS:  # of a package that knows no merged /usr
            text = f"{_LINKS[first]}/{rest}"
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            yield _link(text, os.readlink(path))  # noqa: PTH115
        elif stat.S_ISDIR(mode):
            yield directory(text)
        else:
            yield text, mode, path.read_bytes()


def _modules(root: Path) -> Iterator[Entry]:
    yield directory("modules")
    for n, name in enumerate(MODULES):
        found = [path for path in root.rglob("*.ko*") if path.name.partition(".")[0] == name]
        if len(found) != 1:
            raise Missing(f"the kernel's packages have {len(found)} modules {name}, not one")
        data = found[0].read_bytes()
        if found[0].suffix == ".xz":
            data = lzma.decompress(data)
        yield program(f"modules/{n}-{name}.ko", data)


def sources(root: Path, parts: Iterable[str], into: str) -> Iterator[Entry]:
    """The Python files below some parts of a directory."""
    made = set()
    for part in parts:
        for path in sorted((root / part).rglob("*.py")):
            name = path.relative_to(root)
            for above in reversed(name.parents):
                where = (Path(into) / above).as_posix()
                if where not in made:
                    made.add(where)
                    yield directory(where)
            yield program(f"{into}/{name}", path.read_bytes())


def packed(entries: Iterable[Entry]) -> Iterator[bytes]:
    """A cpio archive in the form "newc" (Documentation/driver-api/early-userspace/buffer-format.rst): names,
    modes and contents; everything is root's and of 1970.
    """
    for n, (name, mode, data) in enumerate([*entries, ("TRAILER!!!", 0, b"")]):
        raw = name.encode() + b"\0"
        fields = (n + 1, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(raw), 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + raw
        yield head + bytes(-len(head) % 4)
        yield data + bytes(-len(data) % 4)


def write(path: Path, entries: Iterable[Entry]) -> None:
    """An archive as a file."""
    with path.open("wb") as out:
        out.writelines(packed(entries))
