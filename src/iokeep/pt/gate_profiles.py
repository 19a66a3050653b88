# SPDX-License-Identifier: Apache-2.0
"""What kernels are known to write, format by format: data for the format gate.

A named field that a profile does not list must be 0; a configuration key that it does not list may have any
value. ``linux-7.3`` is read from drivers/iommu/generic_pt/fmt/
{vtdss,x86_64,amdv1,riscv}.h (``*_iommu_set_prot``, ``*_install_table``, ``*_sw_bit``), io-pgtable-arm.c
(``arm_lpae_prot_to_pte``), io-pgtable-arm-v7s.c (``arm_v7s_prot_to_pte``) and s390's pci_dma.h; accessed and
dirty bits are what hardware adds. ``soft-*`` are the kernels of the software host: the formats that they
adopt, as their drivers make them. Profiles of other kernels are files: ``gate_file``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Allowed:
    """``config``: key -> values; ``leaf``, ``table``: named field -> values; ``sizes``: log2 of the bytes of
    leaves, None = all that Linux makes in this format.
    """

    config: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    leaf: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    table: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    sizes: tuple[int, ...] | None = None


ANY = (0, 1)
_HARDWARE = {"accessed": ANY, "dirty": ANY}

_LINUX: Mapping[str, Allowed] = {
    "vtdss": Allowed(leaf={**_HARDWARE, "snp": ANY}, table={"accessed": ANY, "flushed": ANY}),
    "x86_64": Allowed(
        leaf={**_HARDWARE, "extended_accessed": ANY, "encrypted": ANY},
        table={"accessed": ANY, "extended_accessed": ANY, "flushed": ANY, "encrypted": ANY},
    ),
    "amdv1": Allowed(
        leaf={**_HARDWARE, "fc": ANY, "encrypted": ANY}, table={"accessed": ANY, "encrypted": ANY}
    ),
    "riscv64": Allowed(
        config={"stage": (1,)},
        leaf={**_HARDWARE, "x": ANY, "pbmt": (0, 1, 2), "napot": ANY},
    ),
    "arm_lpae_s1": Allowed(
        config={"lpa2": (0,)},
        leaf={
            "accessed": (1,), "dbm": ANY, "attridx": (0, 1, 2), "ns": ANY, "unprivileged": ANY,
            "sh": (2, 3), "ng": (1,), "xn": (0, 3),
        },
        table={"synced": ANY, "ns_table": ANY},
    ),
    "arm_lpae_s2": Allowed(
        config={"lpa2": (0,)},
        leaf={
            "accessed": (1,), "memattr": (1, 5, 15), "memattr_fwb": (1, 5, 6), "sh": (2, 3), "xn": (0, 3),
        },
        table={"synced": ANY},
    ),
    "arm_mali_lpae": Allowed(
        leaf={"attridx": (0, 1, 2), "sh": (2, 3), "xn": (0, 3)}, table={"synced": ANY}
    ),
    "arm_v7s": Allowed(
        leaf={
            "access": ANY, "bc": (0, 1, 3), "xn": ANY, "unprivileged": ANY, "tex": ANY, "s": (1,),
            "ng": (1,), "ns": ANY, "supersection": ANY,
        },
        table={"ns": ANY},
    ),
    "s390_zpci": Allowed(table={"type": (0, 1, 2, 3), "length": (3,)}),
}  # fmt: skip

#: formats that the drivers of the software kernels build, with this project's own code, which writes what
#: Linux's does. Second stages of RISC-V are the same but for their size.
_SOFT = ("vtdss", "x86_64", "amdv1", "arm_lpae_s1", "arm_lpae_s2", "riscv64")
_SOFT_MORE: Mapping[str, Allowed] = {"riscv64": Allowed(leaf=_LINUX["riscv64"].leaf)}
_SOFT_ALL: Mapping[str, Allowed] = {name: _SOFT_MORE.get(name, _LINUX[name]) for name in _SOFT}

PROFILES: Mapping[str, Mapping[str, Allowed]] = {
    "linux-7.3": _LINUX,
    "soft-7.2": _SOFT_ALL,
    "soft-7.3": _SOFT_ALL,
    "soft-7.4": _SOFT_ALL,
}
