# SPDX-License-Identifier: Apache-2.0
"""The kernel under test: Debian's newest linux-source, configured by linux.config, built once and cached.

The cache is ``${XDG_CACHE_HOME:-~/.cache}/iokeep/vmtest/<version>-<hash of the options>/`` with ``bzImage``,
``config``, ``selftests/`` and ``build.log``. A build that is there is used as it is, with no network;
``IOKEEP_VM_REFRESH=1`` asks the mirror for a newer version first. ``source-<version>/`` beside it is what
``iokeep bench run --kernel-source`` takes; ``python -m vmtest source`` says where, and fetches it if need be.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vmtest.apt import Missing, PrivateApt, need

HERE = Path(__file__).parent
FRAGMENT = HERE / "linux.config"
#: what a build needs: program or file -> Debian package
TOOLS = {
    "gcc": "gcc",
    "make": "make",
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "xz": "xz-utils",
    "/usr/include/libelf.h": "libelf-dev",  # objtool
    "/usr/include/sys/capability.h": "libcap-dev",  # the kernel's selftests
}
#: what is kept of the source
PARTS = ("COPYING", "Makefile", "drivers/iommu", "include")
#: the kernel's own tests of what we use: directory -> sources, each with what it is linked with
SELFTESTS = {
    "iommu": {"iommufd": ["-lcap"], "iommufd_fail_nth": ["-lcap"]},
    "liveupdate": {"liveupdate": ["lib/lu_utils.c", "-Ilib/include"]},
}


@dataclass(frozen=True, slots=True)
class Kernel:
    """One build. ``version`` is that of the Debian package."""

    path: Path

    @property
    def version(self) -> str:
        """Version of the package that it was built from."""
        return self.path.name.rpartition("-")[0]

    @property
    def image(self) -> Path:
        """The bzImage."""
        return self.path / "bzImage"

    @property
    def selftests(self) -> Path:
        """Programs of the kernel's tools/testing/selftests, one directory each."""
        return self.path / "selftests"


def options(text: str) -> dict[str, str]:
    """CONFIG_X -> value ("n" where it is not set) of a .config or a fragment, comments left out."""
    found = {}
    for line in text.splitlines():
        off = re.match(r"# (CONFIG_\w+) is not set", line)
        on = re.match(r"(CONFIG_\w+)=(\S+|\"[^\"]*\")", line)
        if off:
            found[off[1]] = "n"
        elif on:
            found[on[1]] = on[2]
    return found


def cache() -> Path:
    """The directory of all builds."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "iokeep" / "vmtest"


def _key() -> str:
    lines = "\n".join(f"{k}={v}" for k, v in sorted(options(FRAGMENT.read_text()).items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:12]


def _built() -> list[Kernel]:
    """Complete builds of this configuration, the newest last."""
    found = [Kernel(path) for path in cache().glob(f"*-{_key()}") if (path / "bzImage").exists()]
    return sorted(found, key=lambda kernel: kernel.image.stat().st_mtime)


@functools.cache
def kernel() -> Kernel:
    """The kernel, from the cache or built now. :raises Missing: this machine cannot; the message says why."""
    found = _built()
    if found and not os.environ.get("IOKEEP_VM_REFRESH"):
        return found[-1]
    with _locked():
        found = _built()
        if found and not os.environ.get("IOKEEP_VM_REFRESH"):
            return found[-1]
        return _fetch_and_build()


@contextmanager
def _locked() -> Iterator[None]:
    """Another run may be at it."""
    cache().mkdir(parents=True, exist_ok=True)
    with (cache() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sources() -> list[Path]:
    found = [path for path in cache().glob("source-*") if path.suffix != ".part"]
    return sorted(found, key=lambda path: path.stat().st_mtime)


@functools.cache
def source() -> Path:
    """What ``iokeep bench run --kernel-source`` takes of a kernel's source, from the cache or fetched now.

    :raises Missing: as :func:`kernel`.
    """
    with _locked():
        found = _sources()
        if found and not os.environ.get("IOKEEP_VM_REFRESH"):
            return found[-1]
        need({"xz": TOOLS["xz"]})
        name, version, apt = _newest()
        kept = cache() / f"source-{version}"
        if not kept.exists():
            with _fetched(apt, name, version, PARTS) as tree:
                _keep(tree, kept)
        return kept


def _keep(tree: Path, kept: Path) -> None:
    part = kept.with_name(kept.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    for name in PARTS:
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (tree / name).is_dir() else shutil.copy
        copy(tree / name, part / name)
    part.rename(kept)


def _newest() -> tuple[str, str, PrivateApt]:
    say("looking for the newest linux-source")
    apt = PrivateApt(cache() / "apt")
    return *apt.newest(r"linux-source-[0-9.]+"), apt


@contextmanager
def _fetched(apt: PrivateApt, name: str, version: str, parts: Sequence[str] = ()) -> Iterator[Path]:
    """The unpacked source, while the context lasts. :param parts: without them all of it."""
    work = cache() / "build"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    say(f"fetching {name} {version}")
    package = apt.download(name, version, work)
    say("unpacking")
    members = " ".join(f"{name}/{part}" for part in parts)
    script = (
        f"dpkg-deb --fsys-tarfile {package} | tar -xO ./usr/src/{name}.tar.xz | xz -dc -T0 | "
        f"tar -x -C {work} --exclude={name}/drivers/gpu/drm/amd/include {members}"
    )
    subprocess.run(["bash", "-o", "pipefail", "-c", script], check=True)
    package.unlink()
    apt.clean()
    yield work / name
    shutil.rmtree(work)


def _fetch_and_build() -> Kernel:
    need(TOOLS)
    name, version, apt = _newest()
    done = Kernel(cache() / f"{version}-{_key()}")
    if done.image.exists():
        return done
    with _fetched(apt, name, version) as tree:
        kept = cache() / f"source-{version}"
        if not kept.exists():
            _keep(tree, kept)
        build(tree, done)
    return done


def build(tree: Path, done: Kernel) -> None:
    """Build an unpacked source tree into the cache. :raises Missing: it does not build; the log is kept."""
    log = cache() / "build.log"
    log.unlink(missing_ok=True)
    jobs = f"-j{(os.cpu_count() or 1) + 1}"
    objects = tree / "iokeep-build"
    objects.mkdir(exist_ok=True)
    fragment = FRAGMENT.read_text()
    _make(log, tree, objects, "tinyconfig")
    with (objects / ".config").open("a") as config:
        for key, value in options(fragment).items():  # the last one of a name counts
            config.write(f"# {key} is not set\n" if value == "n" else f"{key}={value}\n")
    _make(log, tree, objects, "olddefconfig")
    have = options((objects / ".config").read_text())
    lost = [f"{k}={v}" for k, v in options(fragment).items() if have.get(k, "n") != v]
    if lost:
        raise Missing(f"Kconfig of this kernel does not take: {', '.join(lost)}")
    say("building the kernel (about 9 minutes on two idle cores)")
    start = time.monotonic()
    _make(log, tree, objects, jobs, "bzImage")
    say(f"built in {time.monotonic() - start:.0f} s")
    part = done.path.with_name(done.path.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    _selftests(log, tree, objects, part / "selftests")
    shutil.copy(objects / "arch/x86/boot/bzImage", part / "bzImage")
    shutil.copy(objects / ".config", part / "config")
    shutil.copy(log, part / "build.log")
    shutil.rmtree(done.path, ignore_errors=True)  # of a build that was cut off
    part.rename(done.path)


def _selftests(log: Path, tree: Path, objects: Path, into: Path) -> None:
    _make(log, tree, objects, "headers")
    for directory, programs in SELFTESTS.items():
        source = tree / "tools/testing/selftests" / directory
        (into / directory).mkdir(parents=True)
        for name, extra in programs.items():
            command = ["gcc", "-O2", "-w", f"-I{objects / 'usr/include'}", "-I.", "-I..", "-D_GNU_SOURCE="]
            command += [f"{name}.c", *extra[::-1], "-o", str(into / directory / name)]
            _logged(log, command, source)


def _make(log: Path, tree: Path, objects: Path, *arguments: str) -> None:
    _logged(log, ["make", "-s", f"O={objects}", *arguments], tree)


def _logged(log: Path, command: list[str], cwd: Path) -> None:
    with log.open("a") as out:
        out.write(f"$ {' '.join(command)}\n")
        out.flush()
        done = subprocess.run(command, cwd=cwd, stdout=out, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise Missing(f"{' '.join(command[:3])} ...: exit {done.returncode}; see {log}")


def say(text: str) -> None:
    """Tell the user what takes so long."""
    print(f"vmtest: {text}", file=sys.stderr, flush=True)
