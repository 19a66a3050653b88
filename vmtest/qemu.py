# SPDX-License-Identifier: Apache-2.0
"""QEMU: the machine's own, and for IOMMUs that it lacks a newer one from the same mirror.

The newer one is Debian's backport with every library that it needs, unpacked below the cache and run with
its own loader: nothing of it is installed. ``IOKEEP_VM_REFRESH=1`` asks the mirror for a newer version.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from vmtest.apt import Missing, PrivateApt, need, unpack
from vmtest.kernel import cache, say

_SUITES = ("stable", "stable-backports")
_LIBRARIES = "usr/lib/x86_64-linux-gnu"


@dataclass(frozen=True, slots=True)
class Program:
    """A QEMU by the name of its program. ``package``: that has it; ``cache``: directory of a newer one."""

    name: str
    package: str
    cache: str


X86 = Program("qemu-system-x86_64", "qemu-system-x86", "qemu")
ARM = Program("qemu-system-aarch64", "qemu-system-arm", "qemu-arm")


@dataclass(frozen=True, slots=True)
class Qemu:
    """One QEMU. ``command``: how it is called; ``name``: what it calls itself."""

    command: tuple[str, ...]
    name: str

    def has(self, device: str) -> bool:
        """Whether it knows the device and all properties of ``-device device``."""
        kind, *properties = device.split(",")
        found = _output(*self.command, "-device", f"{kind},help")
        known = {line.split("=")[0].strip() for line in found.splitlines()}
        return all(each.split("=")[0] in known for each in properties)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def _qemu(*command: str) -> Qemu:
    version = _output(*command, "--version").splitlines()
    if not version:
        raise Missing(f"{' '.join(command)} does not run")
    return Qemu(command, version[0].removeprefix("QEMU emulator version "))


@functools.cache
def installed(program: Program = X86) -> Qemu:
    """The machine's own. :raises Missing: there is none, and this user may not install it."""
    need({program.name: program.package})
    return _qemu(program.name)


@functools.cache
def newer(program: Program = X86) -> Qemu:
    """The backport, fetched when it is not in the cache. :raises Missing: the mirror has none."""
    root = cache() / program.cache
    if not (root / "usr").is_dir() or os.environ.get("IOKEEP_VM_REFRESH"):
        cache().mkdir(parents=True, exist_ok=True)
        with (cache() / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another run may be at it
            if not (root / "usr").is_dir() or os.environ.get("IOKEEP_VM_REFRESH"):
                _fetch(program, root)
    libraries = root / _LIBRARIES
    return _qemu(
        str(libraries / "ld-linux-x86-64.so.2"), "--library-path", str(libraries),
        str(root / "usr/bin" / program.name), "-L", str(root / "usr/share/qemu"),
        "-L", str(root / "usr/share/seabios"),
    )  # fmt: skip


def _fetch(program: Program, root: Path) -> None:
    say("fetching a newer QEMU, for the IOMMUs that the machine's has not")
    apt = PrivateApt(cache() / "apt-qemu", _SUITES)
    apt.update()
    part = root.with_name(f"{root.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for package in apt.download_all(program.package, suite=_SUITES[-1]):
        unpack(package, part)
    apt.clean()
    shutil.rmtree(root, ignore_errors=True)
    part.rename(root)
