# SPDX-License-Identifier: Apache-2.0
"""What vmtest itself promises: whose mirror, what the cache's key is, how a guest ends and where its logs
are.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from vmtest import kernel, vm
from vmtest.apt import ETC, KEYRING, Mirror, Missing, PrivateApt, mirror

BOOKWORM = {"ID": "debian", "VERSION_CODENAME": "bookworm"}
DEB822 = """Types: deb
# a remark
URIs: http://mirror.test/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: {keyring}
"""
SOMEBODY = "deb [arch=amd64 signed-by=/etc/apt/keyrings/some.asc] https://else.test/debian bookworm {}\n"


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    (tmp_path / "sources.list.d").mkdir()
    return tmp_path


def test_the_mirror_of_a_deb822_file(etc: Path) -> None:
    file = etc / "sources.list.d/debian.sources"
    file.write_text(DEB822.format(keyring="/usr/share/keyrings/debian-archive-bookworm.gpg"))
    wanted = Mirror("http://mirror.test/debian", "/usr/share/keyrings/debian-archive-bookworm.gpg")
    assert mirror(etc, BOOKWORM) == wanted
    file.write_text(DEB822.format(keyring="\n -----BEGIN PGP PUBLIC KEY BLOCK-----"))
    assert mirror(etc, BOOKWORM).signed_by == KEYRING
    file.write_text(DEB822.format(keyring=KEYRING) + "Enabled: no\n")
    with pytest.raises(Missing, match="bookworm"):
        mirror(etc, BOOKWORM)


@pytest.mark.parametrize("suite", ["bookworm", "stable", "sid"])
def test_the_mirror_of_a_line(etc: Path, suite: str) -> None:
    lines = f"# deb http://off.test/debian {suite} main\ndeb-src http://src.test/debian {suite} main\n"
    lines += f"deb cdrom:[Debian 12 _Bookworm_]/ {suite} main\ndeb http://mirror.test/debian {suite} main\n"
    (etc / "sources.list").write_text(lines)
    assert mirror(etc, BOOKWORM) == Mirror("http://mirror.test/debian", KEYRING)


def test_other_archives_of_the_same_suite_are_not_the_mirror(etc: Path) -> None:
    (etc / "sources.list.d/a.list").write_text(SOMEBODY.format("stable") + SOMEBODY.format("main"))
    (etc / "sources.list.d/b.list").write_text("deb http://mirror.test/debian bookworm main contrib\n")
    assert mirror(etc, BOOKWORM).uri == "http://mirror.test/debian"


@pytest.mark.parametrize("release", [{"ID": "ubuntu", "VERSION_CODENAME": "noble"}, {}])
def test_no_debian(etc: Path, release: dict[str, str]) -> None:
    with pytest.raises(Missing, match="no Debian"):
        mirror(etc, release)


def test_no_mirror_is_named_in_the_project() -> None:
    """It is the machine's own: the private apt's only source is what :func:`mirror` found."""
    assert mirror().uri in "".join(path.read_text() for path in ETC.rglob("*sources*") if path.is_file())
    for path in Path(__file__).parent.rglob("*.py"):
        if path != Path(__file__):
            assert not re.search(r"https?://", path.read_text()), path


def test_apt_verifies(tmp_path: Path) -> None:
    """An index that the machine's keyring has not signed is refused, by apt itself."""
    apt = PrivateApt(tmp_path / "apt")
    (tmp_path / "mirror/dists/stable-backports").mkdir(parents=True)
    release = "Origin: Debian\nCodename: x\nSuite: stable-backports\nSHA256:\n"
    (tmp_path / "mirror/dists/stable-backports/Release").write_text(release)
    apt._mirror = Mirror(f"file:{tmp_path}/mirror", KEYRING)
    with pytest.raises(Missing, match="not signed"):
        apt.update()


def test_every_option_says_what_it_is_for() -> None:
    lines = kernel.FRAGMENT.read_text().splitlines()
    given = [line for line in lines if re.match(r"(# )?CONFIG_", line)]
    assert len(given) == len(kernel.options(kernel.FRAGMENT.read_text())) > 100
    assert [line for line in given if not re.search(r"(=\S+|not set) +# \S", line)] == []


def test_the_cache_goes_by_options_not_by_remarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, key = kernel.FRAGMENT.read_text(), kernel._key()
    monkeypatch.setattr(kernel, "FRAGMENT", tmp_path / "linux.config")
    for changed, same in (
        (text.replace("# x86-64", "# sixty-four"), True),
        (text + "\n# the end\n", True),
        (text + "CONFIG_IKCONFIG=y\n", False),
        (text.replace("CONFIG_NR_CPUS=4", "CONFIG_NR_CPUS=8"), False),
        (text.replace("# CONFIG_VT is not set", "CONFIG_VT=y"), False),
    ):
        kernel.FRAGMENT.write_text(changed)
        assert (kernel._key() == key) == same


def test_of_the_source_its_parts_are_kept_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "cache", lambda: tmp_path)
    for name in (
        "Makefile",
        "COPYING",
        "drivers/iommu/iommu.c",
        "drivers/ata/ahci.c",
        "include/linux/iommu.h",
    ):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text(name)
    (tmp_path / "source-1.part/drivers/net").mkdir(parents=True)  # of a run that was cut off
    assert kernel._sources() == []
    kernel._keep(tmp_path / "tree", tmp_path / "source-1")
    (kept,) = kernel._sources()
    files = {path.relative_to(kept).as_posix() for path in kept.rglob("*") if path.is_file()}
    assert files == {"Makefile", "COPYING", "drivers/iommu/iommu.c", "include/linux/iommu.h"}


@pytest.fixture(scope="module")
def bare() -> tuple[Path, int | None, str]:
    """A machine with all switched off that a live update needs, and a program that fails: the run's
    directory, its exit status, the error.
    """
    program = ["sh", "-c", f"{sys.executable} -m iokeep host doctor; echo '{{\"exit\": 0}}'; exit 7"]
    machine, off = vm.machines()["vtd-legacy"], "kho=off liveupdate=off intel_iommu=off"
    with vm.boot(machine, program, name="harness-exit", cmdline=off) as guest:
        guest.wait()
        with pytest.raises(vm.GuestError) as caught:
            guest.check_status()
    return guest.directory, guest.status, str(caught.value)


def test_the_exit_status_has_a_channel_of_its_own(bare: tuple[Path, int | None, str]) -> None:
    """Whatever the program prints."""
    directory, status, error = bare
    assert status == 7
    assert error.startswith("exit status 7\n")
    assert error.endswith(f'{{"exit": 0}}\n\nlogs: {directory}')
    for log in ("console.log", "output.log", "qemu.sh", "cmdline"):
        assert (directory / log).stat().st_size, log


def test_doctor_names_what_is_off(bare: tuple[Path, int | None, str]) -> None:
    """By what turns it on."""
    text = (bare[0] / "output.log").read_text()
    found = dict(re.findall(r"^MISSING +(.*?)  .*\n +-> (.*)$", text, re.MULTILINE))
    assert found["IOMMU"] == "boot with intel_iommu=on"
    assert "kho=on" in found["KHO"]
    assert "kho=on liveupdate=on" in found["LUO"]
    assert "driver_override" in found["VFIO devices"]
    assert re.findall(r"^cannot +(.*)$", text, re.MULTILINE) == [
        "give a device an IO address space (iommufd, VFIO)",
        "carry memfds over a kexec",
        "keep devices translating over a kexec",
    ]


def test_a_panic_ends_the_run() -> None:
    """The kernel finds no root: it does not wait for a key, QEMU ends, and the log's end is in the error."""
    nowhere = "root=/dev/nowhere rootfstype=ext4"
    with (
        vm.boot(vm.machines()["vtd-legacy"], ["true"], name="harness-panic", cmdline=nowhere) as guest,
        pytest.raises(vm.GuestError, match="stopped with no exit status") as caught,
    ):
        guest.wait()
    assert "Kernel panic" in str(caught.value)
    assert f"logs: {guest.directory}" in str(caught.value)
    assert guest.kernel_complaints()


def test_a_guest_that_hangs_is_ended() -> None:
    with (
        vm.boot(vm.machines()["vtd-legacy"], ["true"], name="harness-hang", seconds=0.5) as guest,
        pytest.raises(vm.GuestError, match="no end after"),
    ):
        guest.wait()
    assert guest.process.returncode is not None
