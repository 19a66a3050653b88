# SPDX-License-Identifier: Apache-2.0
"""Arm VMSAv8-64 stage 2, as SMMUv2 and SMMUv3 walk it through a stream table entry; concatenated roots.

Sources: Arm Architecture Reference Manual for A-profile (DDI 0487), chapter D8, "VMSAv8-64 translation table
format descriptors", its stage 2 memory attribute fields and concatenated translation tables; SMMUv3
architecture (IHI 0070), STE.{S2T0SZ, S2SL0, S2TG, S2PS, S2DS, S2HA, S2AFFD, S2FWB}; what Linux writes:
drivers/iommu/io-pgtable-arm.c (ARM_64_LPAE_S2). ARM_32_LPAE_S2 is the same with the 4K granule and 40 output
bits.

Bit by bit, for 48-bit descriptors; ``arm_lpae.Geometry`` says what 52 bits move:

====== ============================ ============================ =============================================
bits   leaf                         table item                   here
====== ============================ ============================ =============================================
0      valid                        valid                        present
1      block 0, page 1              1                            leaf or table; reserved where no block is
5:2    MemAttr (meaning by FWB)     ignored                      memory attribute
6, 7   S2AP: read, write            ignored                      permission
9:8    SH (LPA2: PA[51:50])         ignored (same)               memory attribute (translation)
10     AF                           ignored                      permission, as at stage 1
11     FnXS, else RES0              ignored                      leaf: attribute (Linux writes 0)
15:12  64K, 52 bits: PA[51:48]      same                         translation; else reserved
16     nT in a block                --                           attribute (Linux writes 0)
47:n   OA                           pa of the next table         translation; else reserved
49:48  RES0 (LPA2: PA)              RES0 (LPA2: PA)              reserved (translation)
50     RES0                         RES0                         reserved
51     DBM                          ignored                      ignored; ``hw_dirty``: permission to write
52     contiguous                   ignored                      contiguous entry, a hint
54:53  XN                           ignored                      memory attribute: IOMMU_NOEXEC sets both
58:55  software                     ignored                      ignored; Linux: 55 = table item is synced
62:59  PBHA                         RES0                         leaf: ignored; table: reserved
63     ignored                      RES0                         leaf: ignored; table: reserved
====== ============================ ============================ =============================================

``hw_access`` and ``hw_dirty`` are STE.S2HA and STE.S2HD. With the latter a leaf with DBM = 1 and S2AP[1] = 0
is "writable-clean": a write is granted and sets S2AP[1] (DDI 0487, chapter D8, "Hardware management of the
dirty state"). Linux sets neither (``arm_lpae_prot_to_pte()`` has DBM at stage 1 only).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from iokeep.pt.formats.arm_lpae import (
    AF,
    DBM,
    HARDWARE,
    QUIRK_NO_WARN,
    QUIRK_S2FWB,
    SH,
    Geometry,
    bits,
    quirks_of,
    read_config,
)
from iokeep.pt.formats.base import CACHE, MMIO, NOEXEC, Format, LevelSpec

SPEC = "Arm Architecture Reference Manual (DDI 0487), chapter D8, stage 2; SMMUv3 (IHI 0070)"

#: key -> (default, values), besides those of ``arm_lpae.read_config``: fwb = STE.S2FWB, the meaning of
#: MemAttr; hw_access, hw_dirty = STE.S2HA, STE.S2HD.
CONFIG = {"fwb": (0, (0, 1)), **HARDWARE}

MEM_ATTR, READ, WRITE, FNXS = bits(5, 2), 1 << 6, 1 << 7, 1 << 11
XN = bits(54, 53)
#: normal memory, write-back: MemAttr 0b1111 (ARM_LPAE_PTE_MEMATTR_OIWB), with FWB 0b0110
#: (ARM_LPAE_PTE_MEMATTR_FWB_WB)
WRITE_BACK = {0: 0xF << 2, 1: 0x6 << 2}
#: by ``fwb``; device memory is MemAttr 0b0001 either way (ARM_LPAE_PTE_MEMATTR_DEV), XN is both bits
TERMS = {
    0: ((CACHE, "memattr", (0xF,)), (MMIO, "memattr", (1,)), (NOEXEC, "xn", (3,))),
    1: ((CACHE, "memattr_fwb", (6,)), (MMIO, "memattr_fwb", (1,)), (NOEXEC, "xn", (3,))),
}
#: memory attributes of a leaf at every level, any value of which hardware takes
MEMORY = MEM_ATTR | SH | XN


def _level(number: int, geometry: Geometry, config: Mapping[str, int]) -> LevelSpec:
    af = 0 if config["hw_access"] else AF
    return geometry.level(
        number,
        memory=MEMORY,
        wanted=FNXS,
        wrong=1 << 50,
        table_memory=0,
        table_ignored=0,
        # As for IOMMU_CACHE, which VFIO and iommufd always give (arm_lpae_prot_to_pte()).
        base=AF | SH | WRITE_BACK[config["fwb"]],
        read=(af | READ, af | READ),
        write=((WRITE, WRITE), (DBM, DBM)) if config["hw_dirty"] else ((af | WRITE, af | WRITE),),
        table_write=(0, 0),
        prot=(0, READ, WRITE, READ | WRITE),
        # With FWB the same bits mean something else.
        fields=(
            ("memattr_fwb" if config["fwb"] else "memattr", MEM_ATTR),
            ("sh", SH),
            ("fnxs", FNXS),
            ("xn", XN),
        ),
        table_fields=(),
    )


def open_format(config: Mapping[str, object]) -> Format:
    """The format in one configuration. :raises InputError: a configuration that hardware does not have."""
    if quirks_of("arm_lpae_s2", config, QUIRK_S2FWB | QUIRK_NO_WARN) & QUIRK_S2FWB:
        config = {"fwb": 1, **config}
    full, geometry = read_config("arm_lpae_s2", config, CONFIG, stage=2)
    return Format(
        name="arm_lpae_s2",
        config=MappingProxyType(dict(full)),
        spec=SPEC,
        levels=tuple(_level(number, geometry, full) for number in range(geometry.levels)),
        table_bytes=full["granule"],
        terms=TERMS[full["fwb"]],
        # With FWB stage 2 decides, but for 0b0111, which takes stage 1's type (DDI 0487, chapter D8, "Stage 2
        # memory type and Cacheability attributes when FEAT_S2FWB"); without, the types combine.
        outranks=("memattr_fwb", (7,)) if full["fwb"] else None,
        features=MappingProxyType({"lpa2": geometry.lpa2, "fwb": bool(full["fwb"])}),
    )
