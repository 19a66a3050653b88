# SPDX-License-Identifier: Apache-2.0
"""What a host offers for a live update, and for what is missing the option or parameter to set.

Looks at device nodes, sysfs, the kernel's configuration and its command line, and asks /dev/iommu which
ioctls it knows. Nothing is decided by a version: the release is only printed.
"""

from __future__ import annotations

import gzip
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from iokeep.iommufd.pci import VFIO_DRIVER, pci_functions
from iokeep.uapi.copy_struct import IOMMU_IOCTLS, PROPOSED_IOCTLS
from iokeep.uapi.probe import Features, probe
from iokeep.uapi.transport import Transport

#: bytes of a kernel configuration that are read at most (Debian's has 300 KiB)
_CONFIG_LIMIT = 8 << 20

OK, MISSING, WARNING, UNKNOWN, ABSENT = "ok", "missing", "warning", "unknown", "absent"

#: options of the kernel's configuration, by what needs them
CONFIG = {
    "iommufd": ("IOMMUFD",),
    "vfio": ("VFIO", "VFIO_PCI", "VFIO_DEVICE_CDEV"),
    "kexec": ("KEXEC_FILE", "KEXEC_HANDOVER"),
    "liveupdate": ("LIVEUPDATE", "LIVEUPDATE_MEMFD"),
}
#: ACPI table that describes an IOMMU -> its driver's option, and what may keep that driver from using it.
#: The CPU's vendor says nothing: QEMU has either IOMMU beside either CPU
_TABLES = {
    "DMAR": ("INTEL_IOMMU", "boot with intel_iommu=on"),
    "IVRS": ("AMD_IOMMU", "boot without amd_iommu=off and iommu=off"),
    "IORT": ("ARM_SMMU_V3", "load the driver (CONFIG_ARM_SMMU_V3)"),
    "RIMT": ("RISCV_IOMMU", "load the driver (CONFIG_RISCV_IOMMU)"),
}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    :param name: what, in one or two words. :param state: "ok"; "missing": a live update of memory and
        devices needs it, and it is not there; "warning": it is there, and something is to be known about it;
        "unknown": it cannot be told (no permission); "absent": no released kernel has it.
    :param found: what is there, in words. :param hint: what to set or do, or "".
    """

    name: str
    state: str
    found: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """What a host offers.

    :param release: of the kernel, as text. :param checks: in the order of a live update.
    :param abilities: what can be done here: "rehearse" on the software host; "map": give a device an IO
        address space; "carry_memory" over a kexec; "keep_translations" of devices over a kexec.
    """

    release: str
    checks: list[Check] = field(default_factory=list)
    abilities: dict[str, bool] = field(default_factory=dict)

    @property
    def missing(self) -> list[Check]:
        """What stands between this host and a live update that the kernel can do."""
        return [check for check in self.checks if check.state == MISSING]


def _text(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return file.read(1 << 16).decode(errors="replace").strip("\n\0 ")
    except OSError:
        return None


def kernel_config(root: Path = Path("/")) -> dict[str, str] | None:
    """The running kernel's configuration, option without CONFIG_ -> "y", "m" or its value; None: not
    published (/proc/config.gz, /boot/config-RELEASE, /lib/modules/RELEASE/config).
    """
    release = _text(root / "proc/sys/kernel/osrelease") or ""
    raw = b""
    try:
        with gzip.open(root / "proc/config.gz") as packed:
            raw = packed.read(_CONFIG_LIMIT)
    except (OSError, EOFError):
        if "/" in release or not release:
            return None
        for path in (root / f"boot/config-{release}", root / f"lib/modules/{release}/config"):
            try:
                with path.open("rb") as file:
                    raw = file.read(_CONFIG_LIMIT)
                break
            except OSError:
                continue
    if not raw:
        return None
    found = re.findall(r"^CONFIG_(\w+)=(.*)$", raw.decode(errors="replace"), re.MULTILINE)
    return {name: value.strip('"') for name, value in found}


def _wants(config: dict[str, str] | None, what: str) -> str:
    """Which options of ``what`` the configuration lacks, as text for a hint."""
    options = CONFIG[what]
    if config is None:
        return " ".join(f"CONFIG_{name}=y" for name in options)
    return " ".join(f"CONFIG_{name}=y" for name in options if config.get(name) not in ("y", "m"))


def _kernel_with(config: dict[str, str] | None, what: str, then: str) -> str:
    lacking = _wants(config, what)
    if lacking and config is not None:
        # what is built in needs no modprobe
        after = "" if then.startswith("modprobe") else f"; then {then}"
        return f"this kernel is built without: take one with {lacking}{after}"
    return f"a kernel with {lacking}; {then}" if lacking else then


def _hardware(features: Features, config: dict[str, str] | None, root: Path) -> Check:
    if features.hardware:
        behind = sum(len(each.devices) for each in features.hardware)
        names = ", ".join(each.name for each in features.hardware)
        if not features.iommu_groups:
            return Check("IOMMU", MISSING, f"{names}, no device behind them", "see the kernel log (dmesg)")
        return Check("IOMMU", OK, f"{names}: {behind} devices in {features.iommu_groups} groups")
    directory = root / "sys/firmware/acpi/tables"
    table = next((name for name in _TABLES if (directory / name).exists()), None)
    if table is not None:
        option, hint = _TABLES[table]
        if config is not None and config.get(option) not in ("y", "m"):
            hint = f"a kernel with CONFIG_{option}=y"
        found = f"the firmware describes one ({table}), the kernel uses none"
        return Check("IOMMU", MISSING, found, hint)
    return Check(
        "IOMMU",
        MISSING,
        f"none: the firmware describes none (no ACPI table {', '.join(_TABLES)})",
        "turn it on in the firmware set-up (VT-d, AMD-Vi, SMMU); in a virtual machine it must be given one: "
        "QEMU has -device intel-iommu,caching-mode=on and -device amd-iommu; no other part of this can work "
        "around it, but `iokeep rehearse` needs none",
    )


def _node(name: str, path: str, there: bool, usable: bool, remedy: str) -> Check:
    if not there:
        return Check(name, MISSING, f"{path} is not there", remedy)
    if not usable:
        return Check(
            name,
            MISSING,
            f"{path} may not be opened by this process",
            "run as root, or be given its descriptor",
        )
    return Check(name, OK, path)


def _ioctls(features: Features) -> Iterable[Check]:
    known = features.ioctls
    if known is None:
        return
    lacking = sorted(op.name for op in IOMMU_IOCTLS.values() if op.name not in known)
    if "IOMMU_IOAS_MAP_FILE" in lacking:
        yield Check(
            "map by file",
            MISSING,
            "no IOMMU_IOAS_MAP_FILE",
            "a newer kernel: guest RAM must be mapped by memfd",
        )
    if lacking:
        yield Check("iommufd calls", WARNING, f"this kernel lacks {', '.join(lacking)}")
    else:
        yield Check("iommufd calls", OK, f"all {len(IOMMU_IOCTLS)} of Linux 7.3")


def _vfio(features: Features, config: dict[str, str] | None, root: Path) -> Iterable[Check]:
    if not (root / "sys/bus/pci/drivers" / VFIO_DRIVER).is_dir():
        yield Check("vfio-pci", MISSING, "not loaded", _kernel_with(config, "vfio", "modprobe vfio-pci"))
        return
    if features.vfio_devices:
        yield Check("VFIO devices", OK, ", ".join(features.vfio_devices))
        return
    bound = [each.address for each in pci_functions(root) if each.driver == VFIO_DRIVER]
    if bound:
        yield Check(
            "VFIO devices",
            MISSING,
            f"{', '.join(bound)} at vfio-pci, without a cdev",
            "a kernel with CONFIG_VFIO_DEVICE_CDEV=y",
        )
    else:
        yield Check(
            "VFIO devices",
            MISSING,
            "vfio-pci has no device",
            "write vfio-pci to the device's driver_override in /sys/bus/pci/devices, unbind it from its "
            "driver, write its address to /sys/bus/pci/drivers_probe (iokeep.iommufd.pci does it)",
        )


def _unsafe_interrupts(root: Path) -> Iterable[Check]:
    value = _text(root / "sys/module/iommufd/parameters/allow_unsafe_interrupts")
    if value == "Y":
        yield Check(
            "interrupts",
            WARNING,
            "iommufd.allow_unsafe_interrupts is on: a guest may raise any interrupt of the host",
            "turn it off where the IOMMU remaps interrupts",
        )


def _kexec(features: Features, config: dict[str, str] | None, root: Path) -> Iterable[Check]:
    if (_text(root / "proc/sys/kernel/kexec_load_disabled") or "0") != "0":
        yield Check(
            "kexec",
            MISSING,
            "kernel.kexec_load_disabled is set; it stays so until the next boot",
            "boot again",
        )
    elif features.kexec_loaded is None:
        yield Check(
            "kexec", MISSING, "the kernel cannot", _kernel_with(config, "kexec", "kexec -s -l KERNEL")
        )
    else:
        yield Check("kexec", OK, "a kernel is loaded" if features.kexec_loaded else "no kernel is loaded yet")
    lockdown = re.search(r"\[(\w+)\]", _text(root / "sys/kernel/security/lockdown") or "")
    if lockdown and lockdown[1] != "none":
        yield Check(
            "lockdown",
            WARNING,
            f"{lockdown[1]}: only signed kernels can be loaded, and debugfs is closed",
            "sign the next kernel",
        )


def _on(value: str | None, otherwise: bool = False) -> bool:
    """What the kernel takes for yes in a boolean parameter (lib/kstrtox.c, kstrtobool()).

    :param otherwise: the default, which what it does not understand leaves as it is.
    """
    first = (value or "").lower()[:2]
    if first[:1] in ("1", "y", "t", "e") or first == "on":
        return True
    return otherwise and not (first[:1] in ("0", "n", "f", "d") or first == "of")


def _handover(features: Features, config: dict[str, str] | None) -> Iterable[Check]:
    default = config is not None and config.get("KEXEC_HANDOVER_ENABLE_DEFAULT") == "y"
    if features.kho_out:
        yield Check("KHO", OK, "the kernel writes a tree for the next one")
    elif features.liveupdate_node:
        yield Check("KHO", OK, "on: there is no LUO without it")
    elif not _on(features.cmdline_kho, default):
        then = "boot with kho=on"
        yield Check("KHO", MISSING, "kho=on is not on the command line", _kernel_with(config, "kexec", then))
    elif config is not None and _wants(config, "kexec"):
        yield Check("KHO", MISSING, "the kernel cannot", _kernel_with(config, "kexec", "boot with kho=on"))
    else:
        yield Check("KHO", UNKNOWN, "kho=on is given; debugfs would tell more", "run as root, mount debugfs")
    then = "boot with kho=on liveupdate=on"
    if _on(features.cmdline_kho, default) and _on(features.cmdline_liveupdate):
        # luo_core.c liveupdate_early_init(): what the old kernel left, in another version, turns it off
        then = (
            "the command line asks for it: the kernel log says why it is off (dmesg | grep -i -e luo -e kho)"
        )
    yield _node(
        "LUO",
        "/dev/liveupdate",
        features.liveupdate_node,
        features.liveupdate_usable,
        _kernel_with(config, "liveupdate", then),
    )
    if features.liveupdate_node and config is not None and _wants(config, "liveupdate"):
        lacking = _wants(config, "liveupdate")
        yield Check("LUO memfds", MISSING, "the kernel cannot preserve memfds", f"a kernel with {lacking}")


def _pitfalls(features: Features, root: Path) -> Iterable[Check]:
    if (_text(root / "proc/sys/vm/memfd_noexec") or "0") != "0":
        yield Check(
            "memfd_noexec",
            WARNING,
            "vm.memfd_noexec makes memfds that are sealed against execution: Linux 7.3 brings such a memfd "
            "back sealed against writes too",
            "create guest RAM with MFD_EXEC, or set vm.memfd_noexec=0",
        )
    if features.liveupdate_node:
        yield Check(
            "session names",
            WARNING,
            "on Linux 7.3 a CREATE_SESSION that fails with EEXIST while the number of sessions is a multiple "
            "of 51 makes the next kernel panic at boot",
            "never create a session to see whether it exists; iokeep host preflight --name NAME looks",
        )
    pages = _text(root / "proc/sys/vm/nr_hugepages")
    if pages and pages.isdigit() and int(pages):
        yield Check(
            "hugetlb",
            WARNING,
            f"{pages} huge pages are set aside: a hugetlb memfd cannot be preserved (ENOENT)",
            "guest RAM in plain memfds, with transparent huge pages "
            "(/sys/kernel/mm/transparent_hugepage/shmem_enabled)",
        )


#: where a driver shows its registers, by the IOMMU's name in sysfs, and the option that puts it there
_REGISTERS = {
    "dmar": ("sys/kernel/debug/iommu/intel/iommu_regset", "INTEL_IOMMU_DEBUGFS"),
    "ivhd": ("sys/kernel/debug/iommu/amd/iommu00/mmio", "AMD_IOMMU_DEBUGFS"),
}


def _proof(features: Features, root: Path) -> Iterable[Check]:
    """Whether tables can be read, to prove translations behind a kexec: memory, and where they begin."""
    if not features.hardware:
        return
    memory = next((path for path in ("/proc/kcore", "/dev/mem") if os.access(root / path[1:], os.R_OK)), None)
    if memory is None:
        yield Check(
            "table proof",
            WARNING,
            "physical memory cannot be read: what is mapped again after a kexec cannot be proved",
            "run as root, on a kernel with CONFIG_PROC_KCORE=y and no lockdown",
        )
        return
    kind = features.hardware[0].name.rstrip("0123456789")
    path, option = _REGISTERS.get(kind, ("dev/mem", "DEVMEM"))
    if os.access(root / path, os.R_OK):
        yield Check("table proof", OK, f"tables by {memory}, the root register by /{path}")
    else:
        yield Check(
            "table proof",
            WARNING,
            f"tables by {memory}, but not the root register that they begin at (/{path})",
            f"a kernel with CONFIG_{option}=y (not meant for production), debugfs mounted; or read the "
            "register of the unit through /dev/mem",
        )


def _future(features: Features) -> Check:
    known = features.ioctls
    names = [op.name for op in PROPOSED_IOCTLS.values()]
    if known is not None and all(name in known for name in names):
        return Check("translations", OK, "the kernel preserves and adopts IO page tables")
    if known is None and features.iommu_node:
        return Check("translations", UNKNOWN, "/dev/iommu was not asked", "run as root")
    return Check(
        "translations",
        ABSENT,
        "no released kernel keeps IO page tables over a kexec: translation stops, devices must be quiet, and "
        "the areas are mapped again afterwards",
        "iokeep rehearse shows a live update that keeps them, on the software host",
    )


def examine(root: Path = Path("/"), transport: Transport | None = None) -> Report:
    """Look at a host; changes nothing.

    :param root: where /dev, /sys, /proc and /boot are; another directory in tests.
    :param transport: asks its /dev/iommu which ioctls it knows; None does not ask.
    """
    features = probe(root, transport if (root / "dev/iommu").exists() else None)
    config = kernel_config(root)
    checks = [
        _hardware(features, config, root),
        _node(
            "iommufd",
            "/dev/iommu",
            features.iommu_node,
            features.iommu_usable,
            _kernel_with(config, "iommufd", "modprobe iommufd"),
        ),
        *_ioctls(features),
        *_vfio(features, config, root),
        *_unsafe_interrupts(root),
        *_kexec(features, config, root),
        *_handover(features, config),
        *_pitfalls(features, root),
        *_proof(features, root),
        _future(features),
    ]
    if config is None:
        checks.append(
            Check("configuration", UNKNOWN, "the kernel does not publish it", "CONFIG_IKCONFIG_PROC=y would")
        )
    state = {check.name: check.state for check in checks}
    fine = {name for name, value in state.items() if value == OK}
    carry = {"kexec", "LUO"} <= fine and state["KHO"] in (OK, UNKNOWN) and "LUO memfds" not in state
    return Report(
        _text(root / "proc/sys/kernel/osrelease") or os.uname().sysname,
        checks,
        {
            "rehearse": True,
            "map": {"IOMMU", "iommufd", "VFIO devices"} <= fine,
            "carry_memory": carry,
            "keep_translations": carry and "translations" in fine,
        },
    )
