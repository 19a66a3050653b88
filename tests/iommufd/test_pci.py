# SPDX-License-Identifier: Apache-2.0
"""PCI devices over trees like sysfs, with a kernel that answers to what is written."""

import errno

import pytest

from iokeep.errors import CapabilityError, UsageError
from iokeep.iommufd.pci import (
    address_of,
    bound_to_vfio,
    cdev_of,
    full_address,
    group_of,
    pci_function,
    pci_functions,
    reserved_regions,
    set_driver,
    why_not_vfio,
)

EDU = "0000:00:04.0"


class Sysfs:
    """A tree, and what the kernel does when a file is written."""

    def __init__(self, root):
        self.root = root
        self.bus = root / "sys/bus/pci"
        (self.bus / "devices").mkdir(parents=True)
        self.written = []
        self.cdevs = True
        self.nodes = True
        self.takes = True
        self.refuse = {}
        for name in ("vfio-pci", "e1000", "pcieport"):
            (self.bus / "drivers" / name).mkdir(parents=True)

    def device(self, address, group, vendor=0x1234, device=0x11E8, driver=None):
        base = self.bus / "devices" / address
        base.mkdir()
        (base / "vendor").write_text(f"{vendor:#06x}\n")
        (base / "device").write_text(f"{device:#06x}\n")
        (base / "driver_override").write_text("(null)\n")
        if group is not None:
            members = self.root / f"sys/kernel/iommu_groups/{group}/devices"
            members.mkdir(parents=True, exist_ok=True)
            (members / address).symlink_to(base)
            (base / "iommu_group").symlink_to(members.parent)
            (members.parent / "reserved_regions").write_text(
                "0x00000000fee00000 0x00000000feefffff msi\n0x0000000000000000 0x0000000000ffffff direct\n"
            )
        if driver:
            (base / "driver").symlink_to(self.bus / "drivers" / driver)
        self.ids = {address: driver}
        return base

    def write(self, path, text):
        self.written.append((path.relative_to(self.root).as_posix(), text.strip()))
        if path.name in self.refuse:
            raise OSError(self.refuse[path.name], "no")
        if path.name == "driver_override":
            path.write_text(text)
        elif path.name == "unbind":
            base = self.bus / "devices" / text
            (base / "driver").unlink()
            for each in (base / "vfio-dev").glob("*"):
                each.rmdir()
        elif path.name == "drivers_probe":
            self.probe(text)

    def probe(self, address):
        base = self.bus / "devices" / address
        wanted = (base / "driver_override").read_text().strip()
        driver = wanted if wanted not in ("", "(null)") else self.ids[address]
        if not driver or not self.takes:
            return
        (base / "driver").symlink_to(self.bus / "drivers" / driver)
        if driver == "vfio-pci" and self.cdevs:
            (base / "vfio-dev/vfio0").mkdir(parents=True)
            shown = self.root / "sys/class/vfio-dev/vfio0"
            shown.mkdir(parents=True, exist_ok=True)
            if not (shown / "device").is_symlink():
                (shown / "device").symlink_to(base)
            if self.nodes:
                (self.root / "dev/vfio/devices").mkdir(parents=True, exist_ok=True)
                (self.root / "dev/vfio/devices/vfio0").touch()


@pytest.fixture
def sysfs(tmp_path):
    return Sysfs(tmp_path)


def bound(sysfs, **options):
    return bound_to_vfio(EDU, sysfs.root, write=sysfs.write, patience=0.05, **options)


@pytest.mark.parametrize(
    ("text", "full"), [("00:04.0", EDU), (" 0000:00:04.0", EDU), ("0001:AF:1F.7", "0001:af:1f.7")]
)
def test_addresses(text, full):
    assert full_address(text) == full


@pytest.mark.parametrize("text", ["", "4", "00:04", "00:04.8", "00:24.0", "../../etc", "0000:00:04.0/.."])
def test_no_addresses(text):
    with pytest.raises(UsageError, match="no PCI address"):
        full_address(text)


def test_a_device_and_its_group(sysfs):
    sysfs.device(EDU, 7)
    sysfs.device("0000:00:05.0", 7, driver="e1000")
    sysfs.device("0000:00:06.0", None)
    edu, net, alone = pci_functions(sysfs.root)
    assert (edu.address, edu.vendor, edu.device, edu.driver, edu.group, edu.cdev) == (
        EDU, 0x1234, 0x11E8, None, 7, None,
    )  # fmt: skip
    assert (net.driver, alone.group) == ("e1000", None)
    assert group_of(EDU, sysfs.root) == [EDU, "0000:00:05.0"]
    assert group_of("0000:00:06.0", sysfs.root) == []
    assert reserved_regions(EDU, sysfs.root) == [
        (0xFEE00000, 0xFEEFFFFF, "msi"), (0, 0xFFFFFF, "direct"),
    ]  # fmt: skip
    assert reserved_regions("0000:00:06.0", sysfs.root) == []


def test_no_devices(sysfs, tmp_path):
    assert pci_functions(tmp_path / "nothing") == []
    assert address_of("/dev/vfio/devices/vfio0", sysfs.root) is None
    with pytest.raises(CapabilityError, match="there is no PCI device"):
        pci_function(EDU, sysfs.root)


def test_to_vfio_and_back(sysfs):
    sysfs.device(EDU, 7, driver="e1000")
    with bound(sysfs) as cdev:
        assert cdev == "/dev/vfio/devices/vfio0"
        assert address_of(cdev, sysfs.root) == EDU
        assert cdev_of(EDU, sysfs.root) == cdev
        assert pci_function(EDU, sysfs.root).driver == "vfio-pci"
    assert pci_function(EDU, sysfs.root).driver == "e1000"
    assert [name.rsplit("/", 1)[1] for name, _ in sysfs.written] == [
        "driver_override", "unbind", "drivers_probe", "driver_override", "unbind", "drivers_probe",
    ]  # fmt: skip
    assert [text for name, text in sysfs.written if name.endswith("driver_override")] == ["vfio-pci", ""]


def test_a_device_that_is_there_already_stays(sysfs):
    sysfs.device(EDU, 7, driver="e1000")
    set_driver(EDU, "vfio-pci", sysfs.root, write=sysfs.write)
    before = len(sysfs.written)
    with bound(sysfs) as cdev:
        assert cdev == "/dev/vfio/devices/vfio0"
    assert len(sysfs.written) == before
    assert pci_function(EDU, sysfs.root).driver == "vfio-pci"


def test_what_keeps_a_device_from_vfio(sysfs):
    sysfs.device(EDU, 7)
    sysfs.device("0000:00:03.0", 7, driver="pcieport")
    sysfs.device("0000:00:05.0", 7, driver="e1000")
    assert why_not_vfio(EDU, sysfs.root) == ["0000:00:05.0 of the same IOMMU group 7 is in use by e1000"]
    with pytest.raises(CapabilityError, match="in use by e1000"), bound(sysfs):
        pass
    sysfs.device("0000:00:06.0", None)
    assert "no IOMMU translates" in why_not_vfio("0000:00:06.0", sysfs.root)[0]
    (sysfs.bus / "drivers/vfio-pci").rmdir()
    assert "vfio-pci is not loaded" in why_not_vfio(EDU, sysfs.root)[0]
    with pytest.raises(CapabilityError, match="no PCI driver vfio-pci"):
        set_driver(EDU, "vfio-pci", sysfs.root, write=sysfs.write)
    assert sysfs.written == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"takes": False}, "did not take the device"),
        ({"cdevs": False}, "has no VFIO cdev"),
        ({"nodes": False}, "does not appear"),
        ({"refuse": {"driver_override": errno.EACCES}}, "may not change the driver"),
        ({"refuse": {"unbind": errno.EBUSY}}, "on writing '0000:00:04.0'"),
    ],
)
def test_what_goes_wrong_on_the_way(sysfs, change, text):
    sysfs.device(EDU, 7, driver="e1000")
    for name, value in change.items():
        setattr(sysfs, name, value)
    with pytest.raises(CapabilityError, match=text), bound(sysfs):
        pass


def test_really_written(sysfs):
    """Without a stand-in the files themselves are written."""
    base = sysfs.device(EDU, 7)
    (sysfs.bus / "drivers_probe").touch()
    with pytest.raises(CapabilityError, match="did not take"):
        set_driver(EDU, "vfio-pci", sysfs.root, patience=0.02)
    assert (base / "driver_override").read_text().startswith("vfio-pci\n")
    assert (sysfs.bus / "drivers_probe").read_text() == EDU
