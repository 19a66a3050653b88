# SPDX-License-Identifier: Apache-2.0
"""What the running kernel offers, found by looking and asking, never by its version.

A read-only look at device nodes, sysfs and the command line; with a transport also a question per ioctl: a
call with size 0 is refused with EINVAL where the kernel knows it and with ENOTTY where it does not, and
changes nothing. /dev/liveupdate is not opened: it has one user at a time, and the first open reads the old
kernel's records.
"""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass
from pathlib import Path

from iokeep.errors import CapabilityError
from iokeep.uapi.copy_struct import IOMMU_IOCTLS, PROPOSED_IOCTLS
from iokeep.uapi.transport import Transport

_TEXT_LIMIT = 1 << 16


@dataclass(frozen=True, slots=True)
class IommuHardware:
    """One IOMMU in /sys/class/iommu.

    :param name: "dmar0", "ivhd0", "smmu3.0x…".
    :param registers: its registers that sysfs shows, by file name, as text ("cap" and "ecap" on VT-d).
    :param devices: devices behind it, as DDDD:BB:DD.F.
    """

    name: str
    registers: dict[str, str]
    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Features:
    """What a kernel offers; None where it cannot be told (no permission, or not asked).

    :param iommu_node: /dev/iommu is there; ``iommu_usable``: and this process may open it.
    :param liveupdate_node, liveupdate_usable: the same for /dev/liveupdate.
    :param vfio_devices: VFIO device nodes (cdev).
    :param ioctls: C names of the /dev/iommu ioctls that the kernel knows.
    :param cmdline_kho, cmdline_liveupdate: the options as booted with, or None when not given.
    :param kho_out, kho_in: debugfs shows a KHO tree for the next kernel, from the previous one.
    :param kexec_loaded: a kernel is loaded for kexec.
    :param hardware: the IOMMUs.
    :param iommu_groups: number of IOMMU groups.
    """

    iommu_node: bool
    iommu_usable: bool
    liveupdate_node: bool
    liveupdate_usable: bool
    vfio_devices: tuple[str, ...]
    ioctls: frozenset[str] | None
    cmdline_kho: str | None
    cmdline_liveupdate: str | None
    kho_out: bool | None
    kho_in: bool | None
    kexec_loaded: bool | None
    hardware: tuple[IommuHardware, ...]
    iommu_groups: int

    def missing(self) -> list[tuple[str, str]]:
        """What stands between this kernel and a live update: (what is missing, what to do)."""
        out: list[tuple[str, str]] = []
        if not self.iommu_node:
            out.append(("/dev/iommu is not there", "a kernel with CONFIG_IOMMUFD (module iommufd)"))
        elif not self.iommu_usable:
            out.append(("/dev/iommu may not be opened", "run as a user that may read and write it"))
        if not self.liveupdate_node:
            out.append(
                ("/dev/liveupdate is not there", "CONFIG_LIVEUPDATE, booted with kho=on liveupdate=on")
            )
        elif not self.liveupdate_usable:
            out.append(("/dev/liveupdate may not be opened", "run as a user that may read and write it"))
        if not self.vfio_devices:
            out.append(("no VFIO device node", "CONFIG_VFIO_DEVICE_CDEV, and a device bound to vfio-pci"))
        if not self.hardware:
            out.append(("no IOMMU", "enable it in the firmware and on the command line (intel_iommu=on)"))
        if self.ioctls is not None:
            lacking = sorted(op.name for op in PROPOSED_IOCTLS.values() if op.name not in self.ioctls)
            if lacking:
                out.append(
                    (f"the kernel does not know {', '.join(lacking)}", "rehearse on the software host")
                )
        return out


def _text(path: Path) -> str | None:
    """A small text file; None when it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(_TEXT_LIMIT).decode(errors="replace").strip()
    except OSError:
        return None


def _names(path: Path) -> tuple[str, ...]:
    try:
        return tuple(sorted(each.name for each in path.iterdir()))
    except OSError:
        return ()


def _there(path: Path) -> bool | None:
    """Whether a path is there; None when its directory may not be looked into."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    except OSError:
        return None
    return True


def _hardware(root: Path) -> tuple[IommuHardware, ...]:
    out = []
    base = root / "sys/class/iommu"
    for name in _names(base):
        # no hardware: CONFIG_IOMMUFD_TEST's mock (drivers/iommu/iommufd/selftest.c iommufd_test_init())
        if name.startswith("iommufd_selftest_iommu"):
            continue
        registers = {}
        for group in ("intel-iommu", "amd-iommu"):
            for each in _names(base / name / group):
                text = _text(base / name / group / each)
                if text is not None:
                    registers[each] = text
        out.append(IommuHardware(name, registers, _names(base / name / "devices")))
    return tuple(out)


def known_ioctls(transport: Transport) -> frozenset[str] | None:
    """C names of the /dev/iommu ioctls that a kernel knows; None when the node cannot be opened."""
    known = set()
    try:
        fd = transport.open("/dev/iommu")
    except (OSError, CapabilityError):
        return None
    try:
        for request, op in {**IOMMU_IOCTLS, **PROPOSED_IOCTLS}.items():
            arg = op.struct()
            try:
                transport.ioctl(fd, request, arg)
            except ConnectionError:
                raise
            except OSError as refused:
                if refused.errno != errno.ENOTTY:
                    known.add(op.name)
            else:
                known.add(op.name)
    finally:
        with contextlib.suppress(ConnectionError):
            transport.close(fd)
    return frozenset(known)


def probe(root: Path = Path("/"), transport: Transport | None = None) -> Features:
    """Look at a host; changes nothing.

    :param root: where /dev, /sys and /proc are; another directory in tests.
    :param transport: asks its /dev/iommu which ioctls it knows; None does not ask.
    """
    options = {}
    for word in (_text(root / "proc/cmdline") or "").split():
        key, _, value = word.partition("=")
        options[key] = value
    loaded = _text(root / "sys/kernel/kexec_loaded")
    iommu, luo = root / "dev/iommu", root / "dev/liveupdate"
    debug = root / "sys/kernel/debug/kho"
    return Features(
        iommu_node=bool(_there(iommu)),
        iommu_usable=os.access(iommu, os.R_OK | os.W_OK),
        liveupdate_node=bool(_there(luo)),
        liveupdate_usable=os.access(luo, os.R_OK | os.W_OK),
        vfio_devices=_names(root / "dev/vfio/devices"),
        ioctls=None if transport is None else known_ioctls(transport),
        cmdline_kho=options.get("kho"),
        cmdline_liveupdate=options.get("liveupdate"),
        kho_out=_there(debug / "out/fdt"),
        kho_in=_there(debug / "in/fdt"),
        kexec_loaded=None if loaded is None else loaded == "1",
        hardware=_hardware(root),
        iommu_groups=len(_names(root / "sys/kernel/iommu_groups")),
    )
