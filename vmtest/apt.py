# SPDX-License-Identifier: Apache-2.0
"""Debian packages, from the mirror that this machine's apt uses, verified as apt verifies.

The kernel's source may be of a newer suite than the machine's: then a private apt (its own sources, lists and
cache) fetches it with the machine's keyring. Nothing of the machine's own apt state is changed by that.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ETC = Path("/etc/apt")
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
#: suites that may have a newer kernel than the machine's own; release candidates (experimental) are left out
SUITES = ("stable-backports", "unstable")


class Missing(RuntimeError):
    """Something that this machine lacks, and what to do about it."""


@dataclass(frozen=True, slots=True)
class Mirror:
    """Where the machine's apt gets Debian from: ``uri``, and ``signed_by``, a keyring file."""

    uri: str
    signed_by: str


def _release() -> dict[str, str]:
    fields = {}
    for line in Path("/etc/os-release").read_text().splitlines():
        key, _, value = line.partition("=")
        fields[key] = value.strip('"')
    return fields


def _stanzas(text: str) -> list[dict[str, str]]:
    """The stanzas of a deb822 file (sources.list(5))."""
    out: list[dict[str, str]] = [{}]
    key = ""
    for line in text.splitlines():
        if not line.strip():
            out.append({})
        elif line.startswith("#"):
            continue
        elif line[0].isspace():
            out[-1][key] += "\n" + line.strip()
        else:
            key, _, value = line.partition(":")
            key = key.lower()
            out[-1][key] = value.strip()
    return [stanza for stanza in out if stanza]


def _entries(etc: Path) -> list[tuple[str, list[str], str]]:
    """All sources that have the component main: (URI, suites, keyring file or "")."""
    out = []
    for path in sorted(etc.glob("sources.list.d/*.sources")):
        for stanza in _stanzas(path.read_text()):
            if "deb" not in stanza.get("types", "").split() or stanza.get("enabled", "yes") == "no":
                continue
            if "main" not in stanza.get("components", "").split():
                continue
            signed = stanza.get("signed-by", "")
            for uri in stanza.get("uris", "").split():
                out.append((uri, stanza.get("suites", "").split(), signed if signed[:1] == "/" else ""))
    line = re.compile(
        r"^deb[ \t]+(?:\[(?P<options>[^\]]*)\][ \t]+)?(?P<uri>\S+)[ \t]+(?P<suite>\S+)(?P<components>.*)$",
        re.MULTILINE,
    )
    for path in [etc / "sources.list", *sorted(etc.glob("sources.list.d/*.list"))]:
        for found in line.finditer(path.read_text() if path.exists() else ""):
            option = re.search(r"signed-by=(\S+)", found["options"] or "")
            if "main" in found["components"].partition("#")[0].split():
                out.append((found["uri"], [found["suite"]], option[1] if option else ""))
    return out


def mirror(etc: Path = ETC, release: Mapping[str, str] | None = None) -> Mirror:
    """The mirror of the machine's own release. Sources that are signed by Debian's keys, or by none of their
    own, come first: others that name the same suite are archives of somebody else's packages.

    :param release: /etc/os-release, in tests. :raises Missing: the machine has none, or is no Debian.
    """
    release = _release() if release is None else release
    codename = release.get("VERSION_CODENAME", "")
    if release.get("ID") != "debian":
        raise Missing("the kernel's source comes from a Debian mirror, and this machine is no Debian")
    # a machine may follow a suite by its role
    names = {codename, "stable", "oldstable", "testing", "unstable", "sid"}
    found = [Mirror(uri, signed or KEYRING) for uri, suites, signed in _entries(etc) if names & set(suites)]
    if not found:
        raise Missing(f"no entry of {etc} names the suite {codename!r}")
    return min(found, key=lambda each: not Path(each.signed_by).name.startswith("debian-"))


def _run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Missing(f"{' '.join(command[:2])} ...: exit {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stdout


@functools.cmp_to_key
def _by_version(a: str, b: str) -> int:
    if a == b:
        return 0
    older = subprocess.run(["dpkg", "--compare-versions", a, "lt", b], check=False).returncode == 0
    return -1 if older else 1


class PrivateApt:
    """An apt with its own state below ``root``, of some suites of the machine's mirror.

    :param architecture: Debian's name of it; it need not be the machine's.
    """

    def __init__(self, root: Path, suites: Sequence[str] = SUITES, *, architecture: str = "amd64") -> None:
        self._mirror = mirror()
        self._root = root
        self._suites = suites
        self._architecture = architecture
        for each in ("lists/partial", "cache/archives/partial"):
            (root / each).mkdir(parents=True, exist_ok=True)
        options = {
            "Dir::Etc::sourcelist": root / "debian.sources",
            "Dir::Etc::sourceparts": "-",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "-",
            "Dir::State::lists": root / "lists",
            "Dir::State::status": "/dev/null",
            "Dir::Cache": root / "cache",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
            "APT::Architecture": architecture,
            "APT::Architectures": architecture,
            "APT::Sandbox::User": "root" if os.getuid() == 0 else "",
        }
        self._options = [f"-o{key}={value}" for key, value in options.items()]

    def _update(self, suites: Sequence[str], *more: str) -> None:
        (self._root / "debian.sources").write_text(
            f"Types: deb\nURIs: {self._mirror.uri}\nSuites: {' '.join(suites)}\nComponents: main\n"
            f"Architectures: {self._architecture}\nSigned-By: {self._mirror.signed_by}\n"
        )
        self._apt("apt-get", "-qq", *more, "update")

    def update(self) -> None:
        """Fetch the lists of packages."""
        self._update(self._codenames())

    def _codenames(self) -> list[str]:
        """The suites by their own names: of some mirrors only those are up to date."""
        self._update(self._suites, "-oAcquire::IndexTargets::deb::Packages::DefaultEnabled=false")
        found = []
        for path in sorted((self._root / "lists").glob("*Release")):
            name = re.search(r"^Codename: (\S+)$", path.read_text(), re.MULTILINE)
            found += [name[1]] if name else []
        return found

    def _apt(self, program: str, *arguments: str, cwd: Path | None = None) -> str:
        return _run(program, *self._options, *arguments, cwd=cwd)

    def newest(self, pattern: str) -> tuple[str, str]:
        """The package whose name matches and whose version is the highest: (name, version)."""
        self.update()
        names = [n for n in self._apt("apt-cache", "pkgnames").split() if re.fullmatch(pattern, n)]
        rows = []
        for line in self._apt("apt-cache", "madison", *names).splitlines() if names else ():
            name, version, _ = (part.strip() for part in line.split("|", 2))
            rows.append((name, version))
        if not rows:
            raise Missing(f"the mirror has no package {pattern} in {', '.join(self._suites)}")
        return max(rows, key=lambda row: _by_version(row[1]))

    def download(self, name: str, version: str, into: Path) -> Path:
        """Fetch one package file, checked by apt against the signed index."""
        into.mkdir(parents=True, exist_ok=True)
        self._apt("apt-get", "-qq", "download", f"{name}={version}", cwd=into)
        (found,) = into.glob(f"{name}_*.deb")
        return found

    def download_built_with(self, name: str, version: str, into: Path) -> list[Path]:
        """Fetch a package and those that it needs in exactly its own version: what one source has built."""
        names = [name]
        for each in names:
            shown = self._apt("apt-cache", "show", f"{each}={version}")
            depends = " ".join(re.findall(r"^(?:Pre-)?Depends: (.*)$", shown, re.MULTILINE))
            same = re.findall(rf"(\S+) \(= {re.escape(version)}\)", depends)
            names += [other for other in dict.fromkeys(same) if other not in names]
        into.mkdir(parents=True, exist_ok=True)
        self._apt("apt-get", "-qq", "download", *(f"{each}={version}" for each in names), cwd=into)
        return sorted(into.glob("*.deb"))

    def download_all(self, *names: str, suite: str) -> list[Path]:
        """Fetch packages of a suite with all that they depend on: this apt sees nothing installed.

        They stay in its cache until :meth:`clean`.
        """
        self._apt(
            "apt-get", "-qq", "-y", "--no-install-recommends", "--download-only",
            f"--target-release={suite}", "install", *names,
        )  # fmt: skip
        return sorted((self._root / "cache" / "archives").glob("*.deb"))

    def clean(self) -> None:
        """Forget the package files that were fetched."""
        shutil.rmtree(self._root / "cache", ignore_errors=True)


def unpack(package: Path, into: Path) -> None:
    """Unpack a package file below a directory, without running anything of it."""
    _run("dpkg-deb", "-x", str(package), str(into))


def need(programs: dict[str, str]) -> None:
    """See to it that programs are there. ``programs``: path or name -> the package that has it.

    :raises Missing: they are not, and this user may not install packages.
    """
    missing = sorted({package for what, package in programs.items() if not _there(what)})
    if not missing:
        return
    command = ["apt-get", "install", "-y", "--no-install-recommends", *missing]
    if os.getuid() != 0 or shutil.which("apt-get") is None:
        raise Missing(f"missing on this machine: run as root: {' '.join(command)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    print(f"set-up: apt-get install {' '.join(missing)}", flush=True)
    for arguments in (["apt-get", "-qq", "update"], command):
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Missing(f"{' '.join(command)}: exit {done.returncode}: {_tail(done.stdout, done.stderr)}")


def _there(what: str) -> bool:
    return Path(what).exists() if what.startswith("/") else shutil.which(what) is not None


def _tail(*texts: str) -> str:
    lines: Sequence[str] = "\n".join(texts).strip().splitlines()
    return "\n".join(lines[-8:])
