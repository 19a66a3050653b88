# SPDX-License-Identifier: Apache-2.0
"""The kinds of IOMMU that the machine can have, one module per kind."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from iokeep.soft.hardware.unit import Unit

#: kind -> (module, class) of its unit
UNITS = {
    "amd": ("amd", "AmdUnit"),
    "riscv": ("riscv", "RiscvUnit"),
    "smmuv3": ("smmu", "SmmuUnit"),
    "vtd": ("vtd", "VtdUnit"),
}


def unit_class(kind: str) -> type[Unit]:
    """The class of a kind's unit, imported now. :raises ValueError: there is no such kind."""
    if kind not in UNITS:
        raise ValueError(f"no IOMMU of kind {kind[:16]!r}: it is one of {', '.join(UNITS)}")
    module, name = UNITS[kind]
    return cast("type[Unit]", getattr(import_module(f"{__name__}.{module}"), name))
