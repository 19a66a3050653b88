# SPDX-License-Identifier: Apache-2.0
"""Arm VMSAv8-64 stage 1, as SMMUv2 and SMMUv3 walk it through a context descriptor: TTBR0 and TTBR1.

Sources: Arm Architecture Reference Manual for A-profile (DDI 0487), chapter D8, "VMSAv8-64 translation table
format descriptors" and its stage 1 memory attribute fields; SMMUv3 architecture (IHI 0070), CD.{T0SZ, TG0,
IPS, DS, HA, AFFD}; what Linux writes: drivers/iommu/io-pgtable-arm.c (ARM_64_LPAE_S1). ARM_32_LPAE_S1 is the
same with the 4K granule, 32 input bits and 40 output bits.

Bit by bit, for 48-bit descriptors; ``arm_lpae.Geometry`` says what 52 bits move:

====== ============================ ============================ =============================================
bits   leaf                         table item                   here
====== ============================ ============================ =============================================
0      valid                        valid                        present
1      block 0, page 1              1                            leaf or table; reserved where no block is
4:2    AttrIndx (of MAIR)           ignored                      memory attribute
5      NS                           ignored                      memory attribute (secure streams only)
6      AP[1], unprivileged          ignored                      memory attribute: IOMMU_PRIV clears it
7      AP[2], read-only             ignored                      permission to write
9:8    SH (LPA2: PA[51:50])         ignored (same)               memory attribute (translation)
10     AF                           ignored                      permission, see below
11     nG                           ignored                      memory attribute
15:12  64K, 52 bits: PA[51:48]      same                         translation; else reserved
16     nT in a block                --                           attribute (Linux writes 0)
47:n   OA                           pa of the next table         translation; else reserved
49:48  RES0 (LPA2: PA)              RES0 (LPA2: PA)              reserved (translation)
50     GP                           RES0                         attribute (Linux writes 0); table: reserved
51     DBM                          ignored                      ignored; ``hw_dirty``: permission to write
52     contiguous                   ignored                      contiguous entry, a hint
53, 54 PXN, UXN                     ignored                      memory attribute: IOMMU_NOEXEC sets both
58:55  software                     ignored                      ignored; Linux: 55 = table item is synced
59, 60 PBHA                         PXNTable, UXNTable           ignored; table: attribute (Linux writes 0)
61     PBHA                         APTable[0]                   ignored; table: attribute (Linux writes 0)
62     PBHA                         APTable[1]                   leaf: ignored; table: permission to write
63     ignored                      NSTable                      ignored (NSTable: secure streams only)
====== ============================ ============================ =============================================

There is no write-only. AF: with CD.HA = 0 and CD.AFFD = 0, as in the CDs that Linux wrote, a leaf with AF = 0
is an access flag fault at every access: it is present and lets nothing pass. ``hw_access`` = 1 (CD.HA) makes
hardware set it, and then it does not count.

DBM does not count where hardware does not manage the dirty state: AP[2] says what is granted. ``hw_dirty`` =
1 (CD.HD, IO_PGTABLE_QUIRK_ARM_HD) makes it do so: a leaf with DBM = AP[2] = 1 is then "writable-clean", a
write is granted and clears AP[2] (DDI 0487, chapter D8, "Hardware management of the dirty state"). Linux sets
DBM in every leaf that may be written, and AP[2] again when it reads the dirty state
(``arm_lpae_prot_to_pte()``, ``arm_lpae_read_and_clear_dirty()``).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from iokeep.pt.formats.arm_lpae import (
    AF,
    DBM,
    HARDWARE,
    QUIRK_HD,
    QUIRK_NO_WARN,
    QUIRK_NS,
    QUIRK_OUTER_WBWA,
    QUIRK_TTBR1,
    SH,
    Geometry,
    bits,
    quirks_of,
    read_config,
)
from iokeep.pt.formats.base import CACHE as CACHED
from iokeep.pt.formats.base import MMIO, NOEXEC, PRIV, Format, LevelSpec, Pairs

SPEC = "Arm Architecture Reference Manual (DDI 0487), chapter D8, stage 1; SMMUv3 (IHI 0070)"

#: key -> (default, values), besides those of ``arm_lpae.read_config``: ttbr 1 = the table of CD.TTB1, whose
#: IOVAs are all ones above the input size; hw_access, hw_dirty = CD.HA, CD.HD.
CONFIG = {"ttbr": (0, (0, 1)), **HARDWARE}

ATTR_INDEX, NS, AP_UNPRIVILEGED, AP_READ_ONLY, NG = bits(4, 2), 1 << 5, 1 << 6, 1 << 7, 1 << 11
GP, XN = 1 << 50, bits(54, 53)
XN_TABLE, AP_TABLE_PRIVILEGED, AP_TABLE_READ_ONLY, NS_TABLE = bits(60, 59), 1 << 61, 1 << 62, 1 << 63
#: of io-pgtable's quirks, those of stage 1: NS sets NS and NSTable, HD sets DBM, OUTER_WBWA is the TCR's
QUIRKS = QUIRK_NS | QUIRK_TTBR1 | QUIRK_OUTER_WBWA | QUIRK_HD | QUIRK_NO_WARN
#: MAIR index of normal write-back memory in Linux (ARM_LPAE_MAIR_ATTR_IDX_CACHE); SH inner shareable
CACHE = 1 << 2 | SH
#: memory attributes of a leaf at every level, any value of which hardware takes
MEMORY = ATTR_INDEX | NS | AP_UNPRIVILEGED | SH | NG | XN


def _level(number: int, geometry: Geometry, config: Mapping[str, int]) -> LevelSpec:
    af = 0 if config["hw_access"] else AF
    write: Pairs = ((af | AP_READ_ONLY, af),)
    writable = 0
    if config["hw_dirty"]:
        # As Linux writes it (writable-dirty), without DBM, and writable-clean.
        write = ((AP_READ_ONLY | DBM, DBM), (AP_READ_ONLY, 0), (DBM, DBM))
        writable = DBM
    return geometry.level(
        number,
        memory=MEMORY,
        wanted=GP,
        wrong=0,
        table_memory=XN_TABLE | AP_TABLE_PRIVILEGED,
        table_ignored=NS_TABLE,
        # As for IOMMU_CACHE, which VFIO and iommufd always give (arm_lpae_prot_to_pte()).
        base=NG | AP_UNPRIVILEGED | AF | CACHE,
        read=(af, af),
        write=write,
        table_write=(AP_TABLE_READ_ONLY, 0),
        prot=(AP_READ_ONLY, AP_READ_ONLY, writable, writable),
        fields=(
            ("attridx", ATTR_INDEX),
            ("ns", NS),
            ("unprivileged", AP_UNPRIVILEGED),
            ("sh", SH),
            ("ng", NG),
            ("xn", XN),
            ("gp", GP),
        ),
        table_fields=(
            ("xn_table", XN_TABLE),
            ("ap_table", AP_TABLE_PRIVILEGED | AP_TABLE_READ_ONLY),
            ("ns_table", NS_TABLE),
        ),
    )


def open_format(config: Mapping[str, object]) -> Format:
    """The format in one configuration. :raises InputError: a configuration that hardware does not have."""
    quirks = quirks_of("arm_lpae_s1", config, QUIRKS)
    if quirks & QUIRK_TTBR1:
        config = {"ttbr": 1, **config}
    if quirks & QUIRK_HD:  # arm_smmu_make_s1_cd() sets CD.HA and CD.HD for it
        config = {"hw_access": 1, "hw_dirty": 1, **config}
    full, geometry = read_config("arm_lpae_s1", config, CONFIG, stage=1)
    return Format(
        name="arm_lpae_s1",
        config=MappingProxyType(dict(full)),
        spec=SPEC,
        levels=tuple(_level(number, geometry, full) for number in range(geometry.levels)),
        table_bytes=full["granule"],
        iova_base=(1 << 64) - (1 << geometry.input_bits) if full["ttbr"] else 0,
        write_only=False,
        # ARM_LPAE_MAIR_ATTR_IDX_CACHE and _DEV; XN is both bits (arm_lpae_prot_to_pte())
        terms=(
            (CACHED, "attridx", (1,)),
            (MMIO, "attridx", (2,)),
            (NOEXEC, "xn", (3,)),
            (PRIV, "unprivileged", (0,)),
        ),
        features=MappingProxyType({"lpa2": geometry.lpa2, "ttbr1": bool(full["ttbr"])}),
    )
