# SPDX-License-Identifier: Apache-2.0
"""PCI devices in sysfs: which driver has them, how to give them to vfio-pci and back, and their VFIO cdev.

Follows Documentation/ABI/testing/sysfs-bus-pci (driver_override, unbind, drivers_probe),
sysfs-kernel-iommu_groups (reserved_regions) and Documentation/driver-api/vfio.rst (vfio-dev). Every function
takes the root of the file system, so that tests can have their own.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from iokeep.errors import CapabilityError, UsageError

VFIO_DRIVER = "vfio-pci"
#: seconds that a driver may take to bind, and udev to make a node
_PATIENCE = 5.0
_ADDRESS = re.compile(r"(?:(?P<domain>[0-9a-f]{4,8}):)?(?P<rest>[0-9a-f]{2}:[0-1][0-9a-f]\.[0-7])")


@dataclass(frozen=True, slots=True)
class PciFunction:
    """One PCI function as sysfs shows it.

    :param address: DDDD:BB:DD.F. :param vendor, device: ids. :param driver: name, or None: none has it.
    :param group: its IOMMU group, or None: no IOMMU translates for it.
    :param cdev: path of its VFIO node, or None: vfio-pci does not have it, or the kernel has no cdev.
    """

    address: str
    vendor: int
    device: int
    driver: str | None
    group: int | None
    cdev: str | None


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _link(path: Path) -> str | None:
    try:
        return path.readlink().name
    except OSError:
        return None


def full_address(text: str) -> str:
    """DDDD:BB:DD.F of an address that may lack its domain. :raises UsageError: it is none."""
    found = _ADDRESS.fullmatch(text.strip().lower())
    if found is None:
        raise UsageError(f"{text!r} is no PCI address", "write it as 0000:01:00.0 (lspci -D shows it)")
    return f"{found['domain'] or '0000'}:{found['rest']}"


def _directory(address: str, root: Path) -> Path:
    return root / "sys/bus/pci/devices" / full_address(address)


def pci_function(address: str, root: Path = Path("/")) -> PciFunction:
    """One function. :raises CapabilityError: there is no such device."""
    base = _directory(address, root)
    vendor = _read(base / "vendor")
    if vendor is None:
        raise CapabilityError(f"there is no PCI device {full_address(address)}", "lspci -D lists them")
    group = _link(base / "iommu_group")
    return PciFunction(
        base.name,
        int(vendor, 16),
        int(_read(base / "device") or "0", 16),
        _link(base / "driver"),
        int(group) if group is not None and group.isdigit() else None,
        cdev_of(address, root),
    )


def pci_functions(root: Path = Path("/")) -> list[PciFunction]:
    """All functions, by address."""
    try:
        names = sorted(each.name for each in (root / "sys/bus/pci/devices").iterdir())
    except OSError:
        return []
    return [pci_function(name, root) for name in names]


def cdev_of(address: str, root: Path = Path("/")) -> str | None:
    """Path of a function's VFIO node, /dev/vfio/devices/vfioN; None where it has none."""
    try:
        names = [each.name for each in (_directory(address, root) / "vfio-dev").iterdir()]
    except OSError:
        return None
    return f"/dev/vfio/devices/{names[0]}" if names else None


def address_of(cdev: str, root: Path = Path("/")) -> str | None:
    """The PCI address behind a VFIO node; None where sysfs does not say."""
    return _link(root / "sys/class/vfio-dev" / Path(cdev).name / "device")


def group_of(address: str, root: Path = Path("/")) -> list[str]:
    """All devices of the function's IOMMU group, which can only change owners together; [] without one."""
    try:
        return sorted(each.name for each in (_directory(address, root) / "iommu_group/devices").iterdir())
    except OSError:
        return []


def reserved_regions(address: str, root: Path = Path("/")) -> list[tuple[int, int, str]]:
    """IOVAs that no area may have: (start, last, type as the kernel names it: msi, direct, reserved)."""
    out = []
    for line in (_read(_directory(address, root) / "iommu_group/reserved_regions") or "").splitlines():
        words = line.split()
        if len(words) == 3:
            out.append((int(words[0], 16), int(words[1], 16), words[2]))
    return out


def _write(path: Path, text: str) -> None:
    # sysfs takes a value in one write(2)
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _store(write: Callable[[Path, str], None], path: Path, text: str, address: str) -> None:
    try:
        write(path, text)
    except PermissionError as error:
        raise CapabilityError(
            f"{path}: {error.strerror}: this process may not change the driver of {address}", "run as root"
        ) from error
    except OSError as error:
        hint = "see the kernel log (dmesg)"
        if error.errno == errno.EBUSY:
            hint = "close what uses the device, and its other users in the IOMMU group"
        raise CapabilityError(f"{path}: {error.strerror} on writing {text.strip()!r}", hint) from error


def set_driver(
    address: str,
    driver: str | None,
    root: Path = Path("/"),
    *,
    write: Callable[[Path, str], None] = _write,
    patience: float = _PATIENCE,
) -> None:
    """Give a function to a driver by driver_override, whatever ids that driver knows.

    :param driver: its name; None: no override: the driver that the kernel finds by the ids.
    :param patience: seconds to wait until the driver has it.
    :raises CapabilityError: no such device or driver, no permission, or the driver does not take it.
    """
    function = pci_function(address, root)
    base = _directory(address, root)
    if driver is not None and not (root / "sys/bus/pci/drivers" / driver).is_dir():
        raise CapabilityError(
            f"there is no PCI driver {driver} in this kernel",
            f"load its module (modprobe {driver}; CONFIG_VFIO_PCI for vfio-pci)",
        )
    if driver is not None and function.driver == driver:
        return
    _store(write, base / "driver_override", f"{driver or ''}\n", function.address)
    if function.driver is not None:
        _store(write, base / "driver/unbind", function.address, function.address)
    _store(write, root / "sys/bus/pci/drivers_probe", function.address, function.address)
    if driver is None:
        return
    end = time.monotonic() + patience
    while _link(base / "driver") != driver:
        if time.monotonic() > end:
            raise CapabilityError(
                f"{function.address}: {driver} did not take the device in {patience:.0f} s",
                "see the kernel log (dmesg)",
            )
        time.sleep(0.01)


def why_not_vfio(address: str, root: Path = Path("/")) -> list[str]:
    """What keeps a function from being used through its VFIO node with DMA translated; [] where nothing
    does.
    """
    function = pci_function(address, root)
    out = []
    if not (root / "sys/bus/pci/drivers" / VFIO_DRIVER).is_dir():
        out.append("vfio-pci is not loaded (CONFIG_VFIO_PCI, modprobe vfio-pci)")
    if function.group is None:
        out.append("no IOMMU translates for it: enable one in the firmware and on the command line")
    for other in group_of(address, root):
        if other == function.address:
            continue
        driver = pci_function(other, root).driver
        if driver not in (None, VFIO_DRIVER, "pcieport", "pci-stub"):
            out.append(f"{other} of the same IOMMU group {function.group} is in use by {driver}")
    return out


@contextmanager
def bound_to_vfio(
    address: str,
    root: Path = Path("/"),
    *,
    write: Callable[[Path, str], None] = _write,
    patience: float = _PATIENCE,
) -> Iterator[str]:
    """Have a function at vfio-pci, and give it back to the driver that had it.

    :returns: the path of its VFIO node, which exists.
    :raises CapabilityError: it cannot be had; the driver is then the one before.
    """
    before = pci_function(address, root)
    if why := why_not_vfio(address, root):
        raise CapabilityError(
            f"{before.address} cannot go to vfio-pci: {why[0]}", "iokeep host doctor says more"
        )
    try:
        set_driver(address, VFIO_DRIVER, root, write=write, patience=patience)
        yield _wait_for_node(before.address, root, patience)
    finally:
        if before.driver != VFIO_DRIVER:
            set_driver(address, None, root, write=write, patience=patience)


def _wait_for_node(address: str, root: Path, patience: float) -> str:
    end = time.monotonic() + patience
    while True:
        cdev = cdev_of(address, root)
        if cdev is not None and (root / cdev.lstrip("/")).exists():
            return cdev
        if time.monotonic() > end:
            if cdev is None:
                raise CapabilityError(
                    f"{address} is at vfio-pci and has no VFIO cdev",
                    "a kernel with CONFIG_VFIO_DEVICE_CDEV and CONFIG_IOMMUFD",
                )
            raise CapabilityError(f"{cdev} does not appear", "is devtmpfs on /dev, or udev running?")
        time.sleep(0.01)
