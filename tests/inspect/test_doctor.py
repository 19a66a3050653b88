# SPDX-License-Identifier: Apache-2.0
"""What the doctor says of machines that are trees of files."""

import gzip
import os

import pytest

from iokeep.inspect.doctor import ABSENT, CONFIG, MISSING, OK, UNKNOWN, WARNING, examine, kernel_config
from iokeep.iommufd.client import Iommufd
from iokeep.soft.testing import LocalHost
from iokeep.uapi.copy_struct import IOMMU_IOCTLS

EVERYTHING = [option for options in CONFIG.values() for option in options]


class Tree:
    """A machine."""

    def __init__(self, root):
        self.root = root
        self.put("proc/sys/kernel/osrelease", "7.3.4-test\n")
        self.put("proc/cpuinfo", "processor\t: 0\nvendor_id\t: GenuineIntel\n")
        self.put("proc/cmdline", "quiet\n")

    def put(self, path, text=""):
        path = self.root / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def config(self, *options):
        path = self.root / "proc/config.gz"
        lines = "".join(f"CONFIG_{name}=y\n" for name in options) + "# CONFIG_OTHER is not set\n"
        path.write_bytes(gzip.compress(lines.encode()))

    def whole(self):
        """All that a live update of Linux 7.3 wants."""
        self.config(*EVERYTHING, "INTEL_IOMMU")
        self.put("proc/cmdline", "kho=on liveupdate=on intel_iommu=on\n")
        for node in ("dev/iommu", "dev/liveupdate", "dev/vfio/devices/vfio0"):
            self.put(node)
        self.put("sys/class/iommu/dmar0/devices/0000:00:04.0")
        self.put("sys/kernel/iommu_groups/0/type")
        self.put("sys/bus/pci/drivers/vfio-pci/bind")
        self.put("sys/kernel/kexec_loaded", "0\n")
        self.put("sys/kernel/debug/kho/out/fdt")
        return self

    def checks(self):
        return {check.name: check for check in examine(self.root).checks}


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


def test_a_host_with_everything(tree):
    report = examine(tree.whole().root)
    assert report.release == "7.3.4-test"
    assert report.missing == []
    assert report.abilities == {
        "rehearse": True,
        "map": True,
        "carry_memory": True,
        "keep_translations": False,
    }
    states = {check.name: check.state for check in report.checks}
    assert states["IOMMU"] == states["iommufd"] == states["VFIO devices"] == states["KHO"] == OK
    assert states["session names"] == WARNING


def test_a_host_with_nothing(tree):
    tree.config()
    report = examine(tree.root)
    assert [check.name for check in report.missing] == [
        "IOMMU", "iommufd", "vfio-pci", "kexec", "KHO", "LUO",
    ]  # fmt: skip
    checks = {check.name: check for check in report.checks}
    assert "no ACPI table DMAR" in checks["IOMMU"].found
    assert "firmware set-up" in checks["IOMMU"].hint
    assert "rehearse" in checks["IOMMU"].hint
    assert "CONFIG_IOMMUFD=y" in checks["iommufd"].hint
    assert "CONFIG_LIVEUPDATE=y CONFIG_LIVEUPDATE_MEMFD=y" in checks["LUO"].hint
    assert "kho=on liveupdate=on" in checks["LUO"].hint
    assert checks["translations"].state == ABSENT
    assert report.abilities == {
        "rehearse": True, "map": False, "carry_memory": False, "keep_translations": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("table", "hint"),
    [
        ("DMAR", "boot with intel_iommu=on"),
        ("IVRS", "boot without amd_iommu=off and iommu=off"),
        ("IORT", "load the driver (CONFIG_ARM_SMMU_V3)"),
        ("RIMT", "load the driver (CONFIG_RISCV_IOMMU)"),
    ],
)
def test_an_iommu_that_is_off(tree, table, hint):
    tree.put(f"sys/firmware/acpi/tables/{table}")
    check = tree.checks()["IOMMU"]
    assert (check.state, check.hint) == (MISSING, hint)
    tree.config("IOMMUFD")
    assert tree.checks()["IOMMU"].hint.startswith("a kernel with CONFIG_")


def test_an_iommu_without_devices(tree):
    tree.put("sys/class/iommu/dmar0/devices/x")
    check = tree.checks()["IOMMU"]
    assert (check.state, "no device" in check.found) == (MISSING, True)


def test_built_in_but_not_switched_on(tree):
    tree.config(*EVERYTHING)
    checks = tree.checks()
    assert checks["LUO"].hint == "boot with kho=on liveupdate=on"
    assert checks["KHO"].hint == "boot with kho=on"
    assert checks["iommufd"].hint == "modprobe iommufd"


def test_without_a_configuration(tree):
    checks = tree.checks()
    assert checks["configuration"].state == UNKNOWN
    assert checks["iommufd"].hint == "a kernel with CONFIG_IOMMUFD=y; modprobe iommufd"
    assert kernel_config(tree.root) is None
    tree.put("boot/config-7.3.4-test", 'CONFIG_IOMMUFD=m\nCONFIG_NAME="x"\n')
    assert kernel_config(tree.root) == {"IOMMUFD": "m", "NAME": "x"}


def test_a_damaged_configuration(tree):
    (tree.root / "proc/config.gz").write_bytes(gzip.compress(b"CONFIG_IOMMUFD=y\n" * 100)[:20])
    assert kernel_config(tree.root) is None
    tree.put("proc/sys/kernel/osrelease", "../../etc\n")
    assert kernel_config(tree.root) is None


@pytest.mark.parametrize(
    ("value", "state"),
    [(v, UNKNOWN) for v in ("kho=on", "kho=1", "kho=Yes", "kho=true", "kho=enable", "kho=off kho=on")]
    + [
        (v, MISSING) for v in ("kho=off", "kho=0", "kho", "kho=", "kho=of", "kho=maybe", "kho=on kho=off", "")
    ],
)
def test_kho_on_the_command_line(tree, value, state):
    tree.whole()
    for gone in ("sys/kernel/debug/kho/out/fdt", "dev/liveupdate"):
        (tree.root / gone).unlink()
    tree.put("proc/cmdline", f"{value}\n")
    assert tree.checks()["KHO"].state == state


@pytest.mark.parametrize(
    ("value", "state"), [("quiet", UNKNOWN), ("kho=maybe", UNKNOWN), ("kho=off", MISSING)]
)
def test_kho_that_is_on_by_itself(tree, value, state):
    tree.whole().config(*EVERYTHING, "KEXEC_HANDOVER_ENABLE_DEFAULT")
    for gone in ("sys/kernel/debug/kho/out/fdt", "dev/liveupdate"):
        (tree.root / gone).unlink()
    tree.put("proc/cmdline", f"{value}\n")
    assert tree.checks()["KHO"].state == state


def test_luo_means_kho(tree):
    tree.whole()
    (tree.root / "sys/kernel/debug/kho/out/fdt").unlink()
    assert tree.checks()["KHO"].state == OK


def test_luo_that_turned_itself_off(tree):
    tree.whole()
    (tree.root / "dev/liveupdate").unlink()
    assert "dmesg" in tree.checks()["LUO"].hint


def test_vfio_without_a_device_and_without_a_cdev(tree):
    tree.whole()
    (tree.root / "dev/vfio/devices/vfio0").unlink()
    assert "driver_override" in tree.checks()["VFIO devices"].hint
    base = tree.root / "sys/bus/pci/devices/0000:00:04.0"
    tree.put("sys/bus/pci/devices/0000:00:04.0/vendor", "0x1234\n")
    (base / "driver").symlink_to(tree.root / "sys/bus/pci/drivers/vfio-pci")
    assert "CONFIG_VFIO_DEVICE_CDEV" in tree.checks()["VFIO devices"].hint


def test_pitfalls(tree):
    tree.whole()
    tree.put("proc/sys/vm/memfd_noexec", "1\n")
    tree.put("proc/sys/vm/nr_hugepages", "64\n")
    tree.put("proc/sys/kernel/kexec_load_disabled", "1\n")
    tree.put("sys/kernel/security/lockdown", "none [integrity] confidentiality\n")
    tree.put("sys/module/iommufd/parameters/allow_unsafe_interrupts", "Y\n")
    checks = tree.checks()
    for name in ("memfd_noexec", "hugetlb", "lockdown", "interrupts"):
        assert checks[name].state == WARNING
    assert checks["kexec"].state == MISSING
    assert not examine(tree.root).abilities["carry_memory"]


def test_whether_tables_can_be_read(tree):
    assert "table proof" not in tree.checks()
    tree.whole()
    assert "cannot be proved" in tree.checks()["table proof"].found
    tree.put("proc/kcore")
    check = tree.checks()["table proof"]
    assert (check.state, "CONFIG_INTEL_IOMMU_DEBUGFS=y" in check.hint) == (WARNING, True)
    tree.put("sys/kernel/debug/iommu/intel/iommu_regset")
    check = tree.checks()["table proof"]
    assert (check.state, "/proc/kcore" in check.found, "iommu_regset" in check.found) == (OK, True, True)


def test_a_liveupdate_that_cannot_keep_memfds(tree):
    tree.whole()
    tree.config(*(set(EVERYTHING) - {"LIVEUPDATE_MEMFD"}))
    assert tree.checks()["LUO memfds"].hint == "a kernel with CONFIG_LIVEUPDATE_MEMFD=y"
    assert not examine(tree.root).abilities["carry_memory"]


def test_nodes_that_may_not_be_opened(tree, monkeypatch):
    tree.whole()
    monkeypatch.setattr(os, "access", lambda *a, **k: False)
    checks = tree.checks()
    assert checks["iommufd"].state == checks["LUO"].state == MISSING
    assert "run as root" in checks["iommufd"].hint


def test_what_the_ioctls_say(tree):
    """The software host is asked: it knows every call of 7.3, and those that are proposed."""
    tree.whole()
    with LocalHost(16 << 20, devices=False) as host:
        transport = host.transport()
        report = examine(tree.root, transport)
        states = {check.name: check for check in report.checks}
        assert states["iommufd calls"].found == f"all {len(IOMMU_IOCTLS)} of Linux 7.3"
        assert states["translations"].state == OK
        assert report.abilities["keep_translations"]
        Iommufd(transport).close()


def test_an_old_kernel(tree):
    class Old:
        def open(self, path):
            return 3

        def close(self, fd):
            pass

        def ioctl(self, fd, request, arg):
            raise OSError(25 if type(arg).__name__ == "iommu_ioas_map_file" else 22, "no")

    tree.whole()
    states = {check.name: check for check in examine(tree.root, Old()).checks}
    assert states["map by file"].state == MISSING
    assert "IOMMU_IOAS_MAP_FILE" in states["iommufd calls"].found


def test_this_machine():
    report = examine()
    assert report.abilities["rehearse"]
    for check in report.missing:
        assert check.found
        assert check.hint
