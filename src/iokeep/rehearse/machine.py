# SPDX-License-Identifier: Apache-2.0
"""Which machine a page-table format belongs to: its IOMMU, how that runs, and where guests have their RAM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from iokeep.errors import CapabilityError, UsageError
from iokeep.mem.ranges import Range

__all__ = ["FORMATS", "MACHINES", "Machine", "machine_of"]

GIB = 1 << 30
#: MSIs of x86: no IOAS may map it (intel_iommu_get_resv_regions, amd_iommu_get_resv_regions)
_X86_MSI = Range(0xFEE0_0000, 0xFEEF_FFFF)
#: HyperTransport's window, which AMD's driver reserves too (HT_RANGE_START ... HT_RANGE_END)
_AMD_HT = Range(0xFD_0000_0000, 0xFF_FFFF_FFFF)
#: where the kernel maps MSI doorbells on Arm (MSI_IOVA_BASE, MSI_IOVA_LENGTH)
_ARM_MSI = Range(0x800_0000, 0x80F_FFFF)
#: what a PC has below 1 MiB instead of RAM
_VGA_AND_ROM = Range(0xA_0000, 0xF_FFFF)


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine whose IOMMU walks one format.

    :param guest: what a guest of it is called. :param iommu: kind of the IOMMU. :param mode: the kernel's
        ``iommu`` parameter. :param ram: gpa of the guest's first byte of RAM, a multiple of 1 GiB.
    :param hole: what is no RAM behind it. :param reserved: IOVAs that no area may have.
    :param params: keys of the format's configuration that are parameters of the kernel too. :param above:
        where a guest has what lies above its RAM: on AMD more than the three levels that a table begins with
        reach, so that it grows.
    """

    guest: str
    iommu: str
    mode: str
    ram: int
    hole: Range | None
    reserved: tuple[Range, ...]
    params: tuple[str, ...] = ("levels",)
    above: int = 64 * GIB


_SIZES = ("input_bits", "output_bits")
#: format -> machine. RAM of QEMU's virt machines begins at 1 GiB (Arm) and 2 GiB (RISC-V).
MACHINES: Mapping[str, Machine] = MappingProxyType(
    {
        "vtdss": Machine("pc", "vtd", "legacy", 0, _VGA_AND_ROM, (_X86_MSI,)),
        "x86_64": Machine("pc", "vtd", "scalable-fs", 0, _VGA_AND_ROM, (_X86_MSI,)),
        "amdv1": Machine("pc", "amd", "v1", 0, _VGA_AND_ROM, (_X86_MSI, _AMD_HT), above=640 * GIB),
        "arm_lpae_s1": Machine("virt", "smmuv3", "stage-1", GIB, None, (_ARM_MSI,), _SIZES),
        "arm_lpae_s2": Machine("virt", "smmuv3", "stage-2", GIB, None, (_ARM_MSI,), (*_SIZES, "start_level")),
        "riscv64": Machine("virt", "riscv", "first-stage", 2 * GIB, None, ()),
    }
)
#: formats that can be rehearsed
FORMATS = tuple(MACHINES)
#: keys of a configuration that no software kernel sets up, and the value that it has
_FIXED = {"ttbr": 0, "lpa2": 0, "c_bit": 0}


def machine_of(format_name: str) -> Machine:
    """The machine of a format. :raises UsageError: the software host has no IOMMU for it."""
    machine = MACHINES.get(format_name)
    if machine is None:
        raise UsageError(
            f"format {format_name!r}: the software host has no IOMMU that walks it",
            f"choose one of: {', '.join(FORMATS)}",
        )
    return machine


def captured(
    name: str, format_name: str, config: Mapping[str, object], mode: str
) -> tuple[Machine, str, dict[str, int]]:
    """The machine for a captured table, its mode, and the parameters of its kernel.

    :param config: of the table. :param mode: the capture's own word for it; VT-d's "scalable" decides.
    :raises CapabilityError: no software host has such tables.
    """
    machine = MACHINES.get(format_name)
    if machine is None:
        raise CapabilityError(
            f"{name}: format {format_name}: the software host has no IOMMU that walks it",
            f"choose a capture of one of: {', '.join(FORMATS)}",
        )
    granule = config.get("granule", 4096)
    if isinstance(granule, int) and granule > 4096:
        raise CapabilityError(
            f"{name}: IOMMU pages of {granule >> 10} KiB: the page of the software kernel is 4 KiB, and no "
            "Linux takes an IOMMU page that is larger than its own",
            "choose a capture with 4 KiB pages",
        )
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            raise CapabilityError(
                f"{name}: {key} = {config[key]}: the software kernel sets up no such tables"
            )
    own = machine.mode
    if format_name == "vtdss" and mode == "scalable":
        own = "scalable-ss"
    elif format_name == "riscv64" and config.get("stage") == 2:
        own = "second-stage"
    params = {key: config[key] for key in machine.params if key in config}
    return machine, own, {key: value for key, value in params.items() if isinstance(value, int)}
