# SPDX-License-Identifier: Apache-2.0
"""IOMMU drivers of the software kernel, one module per kind of IOMMU."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from iokeep.soft.kernel.iommu import Iommu
    from iokeep.soft.kernel.kernel import Kernel

#: kind of the platform's IOMMU -> (module, class) of its driver
DRIVERS = {
    "amd": ("amd", "AmdVi"),
    "riscv": ("riscv", "RiscvIommu"),
    "smmuv3": ("smmu", "Smmu"),
    "vtd": ("vtd", "Vtd"),
}


def driver_of(kernel: Kernel) -> Iommu:
    """The driver for the IOMMU of the kernel's platform."""
    module, name = DRIVERS[kernel.platform.iommu.KIND]
    return cast("Iommu", getattr(import_module(f"{__name__}.{module}"), name)(kernel))
