# SPDX-License-Identifier: Apache-2.0
"""Armv7 short-descriptor page tables: 32-bit items, a 16 KiB root, 1 KiB second-level tables.

Sources: Arm Architecture Reference Manual ARMv7-A and ARMv7-R (DDI 0406C), section B3.5 "Short-descriptor
translation table format" and B3.7 "Memory access control" (AP[2:1] model, SCTLR.AFE = 1); what Linux writes:
drivers/iommu/io-pgtable-arm-v7s.c.

First level, 1 MiB an item:

====== ============================ ============================ ===========================================
bits   section, supersection        page table                   here
====== ============================ ============================ ===========================================
0      PXN, else reserved           1                            section: attribute (Linux writes 0)
1      1                            0                            leaf or table
2, 3   B, C                         PXN or SBZ, NS               memory attribute; table: attribute, ignored
4      XN                           SBZ                          leaf: memory attribute; table: reserved
8:5    domain; supers.: PA[39:36]   domain                       attribute (Linux writes 0); supers.: reserved
9      implementation defined       same                         attribute (Linux writes 0)
10     AP[0] = access flag          pa of the next table         permission
11     AP[1], unprivileged          (31:10)                      memory attribute: IOMMU_PRIV clears it
14:12  TEX                                                       memory attribute
15     AP[2], read-only                                          permission
16, 17 S, nG                                                     memory attribute
18     1 = supersection                                          16 equal items are one leaf of 16 MiB
19     NS                                                        memory attribute
23:20  OA; supers.: PA[35:32]                                    translation; supersection: reserved
31:24  OA                                                        translation
====== ============================ ============================ ===========================================

Second level, 4 KiB an item:

====== ============================ ============================ ===========================================
bits   small page                   large page (16 equal items)  here
====== ============================ ============================ ===========================================
0      XN                           1                            small: memory attribute; large: type
1      1                            0                            type
2, 3   B, C                         B, C                         memory attribute
5:4    AP[1:0]                      AP[1:0]                      as above
8:6    TEX                          SBZ                          memory attribute; large: reserved
9 - 11 AP[2], S, nG                 AP[2], S, nG                 as above
14:12  OA                           TEX                          translation; large: memory attribute
15     OA                           XN                           translation; large: memory attribute
31:16  OA                           OA                           translation
====== ============================ ============================ ===========================================

There is no write-only. The access flag counts: Linux turns SCTLR.AFE on, and AP[0] = 0 would fault. With
IO_PGTABLE_QUIRK_NO_PERMS hardware has no permissions (MediaTek) and AP does not count.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from iokeep.pt.formats.arm_lpae import QUIRK_NO_PERMS, QUIRK_NO_WARN, QUIRK_NS, bits, quirks_of
from iokeep.pt.formats.base import CACHE, MMIO, NOEXEC, PRIV, Bits, Contig, Format, LevelSpec
from iokeep.pt.formats.config import integers

SPEC = "Arm Architecture Reference Manual ARMv7-A and ARMv7-R (DDI 0406C), section B3.5"

#: ``quirks``: bits of enum io_pgtable_quirks. Not built: ARM_MTK_EXT and ARM_MTK_TTBR_EXT, which put
#: PA[34:32] into bits 9, 4 and 5, or the root above 4 GiB.
QUIRKS = QUIRK_NS | QUIRK_NO_PERMS | QUIRK_NO_WARN
CONFIG = {"input_bits": (32, (32,)), "output_bits": (32, (32,))}

TYPE, B_C = bits(1, 0), bits(3, 2)
TABLE, LARGE, SMALL, SECTION = 1, 1, 2, 2
#: first level: leaf
PXN, XN1, DOMAIN, IMPLEMENTATION = 1 << 0, 1 << 4, bits(8, 5), 1 << 9
SUPERSECTION, NS, EXTENDED = 1 << 18, 1 << 19, bits(23, 20)
#: first level: table
TABLE_PXN, TABLE_NS, TABLE_SBZ = 1 << 2, 1 << 3, 1 << 4
#: second level
XN_SMALL, TEX_SMALL, TEX_LARGE, XN_LARGE = 1 << 0, bits(8, 6), bits(14, 12), 1 << 15
#: AP and S, nG: in the second level; the first has them 6 bits further up (ARM_V7S_ATTR_SHIFT)
AF, UNPRIVILEGED, READ_ONLY, S, NG = 1 << 4, 1 << 5, 1 << 9, 1 << 10, 1 << 11
#: as for IOMMU_CACHE (arm_v7s_prot_to_pte()): TEX = 1, C = B = 1
COMMON = AF | UNPRIVILEGED | S | NG


def _permissions(quirks: int, up: int) -> tuple[int, int]:
    """(mask, value) of a leaf that may be written; without AP[2], of one that may be read.

    :param up: the attributes lie so many bits further up.
    """
    return (0, 0) if quirks & QUIRK_NO_PERMS else ((AF | READ_ONLY) << up, AF << up)


def _memory(xn: int, tex: int, up: int, *, bare: bool) -> Bits:
    """Memory attributes that all leaves have; without permissions AP does not count."""
    privilege = () if bare else (("unprivileged", UNPRIVILEGED << up),)
    return (("bc", B_C), ("xn", xn), *privilege, ("tex", tex), ("s", S << up), ("ng", NG << up))


def _second(quirks: int) -> LevelSpec:
    write = _permissions(quirks, 0)
    bare = bool(quirks & QUIRK_NO_PERMS)
    base = COMMON & ~(AF | UNPRIVILEGED) if bare else COMMON
    read_only = 0 if bare else READ_ONLY
    unchecked = AF | READ_ONLY if bare else 0
    return LevelSpec(
        shift=12,
        index_bits=8,
        leaf=True,
        table=False,
        valid_mask=TYPE,
        leaf_mask=0,
        leaf_value=0,
        table_pa_mask=0,
        leaf_pa_mask=bits(31, 12),
        r_mask=write[1],
        r_value=write[1],
        w_mask=write[0],
        w_value=write[1],
        tr_mask=0,
        tr_value=0,
        tw_mask=0,
        tw_value=0,
        leaf_reserved=0,
        table_reserved=0,
        leaf_ignored=XN_SMALL | B_C | UNPRIVILEGED | TEX_SMALL | S | NG | unchecked,
        table_ignored=0,
        leaf_base=SMALL | B_C | 1 << 6 | base,
        table_base=0,
        prot_bits=(0, read_only, 0, 0),
        contig=(
            Contig(
                TYPE,
                LARGE,
                4,
                reserved=TEX_SMALL,
                base=LARGE | B_C | 1 << 12 | base,
                memory=_memory(XN_LARGE, TEX_LARGE, 0, bare=bare),
            ),
        ),
        memory=_memory(XN_SMALL, TEX_SMALL, 0, bare=bare),
        named=(("access", AF),),
    )


def _first(quirks: int) -> LevelSpec:
    write = _permissions(quirks, 6)
    bare = bool(quirks & QUIRK_NO_PERMS)
    base = SECTION | B_C | 1 << 12 | (COMMON & ~(AF | UNPRIVILEGED) if bare else COMMON) << 6
    ns = NS if quirks & QUIRK_NS else 0
    first = (
        *_memory(XN1, bits(14, 12), 6, bare=bare),
        ("ns", NS),
        ("pxn", PXN),
        ("implementation", IMPLEMENTATION),
        ("domain", DOMAIN),  # last: a supersection has none
    )
    unchecked = (AF | READ_ONLY) << 6 if bare else 0
    return LevelSpec(
        shift=20,
        index_bits=12,
        leaf=True,
        table=True,
        valid_mask=TYPE,
        leaf_mask=SECTION,
        leaf_value=SECTION,
        table_pa_mask=bits(31, 10),
        leaf_pa_mask=bits(31, 20),
        r_mask=write[1],
        r_value=write[1],
        w_mask=write[0],
        w_value=write[1],
        tr_mask=0,
        tr_value=0,
        tw_mask=0,
        tw_value=0,
        leaf_reserved=0,
        table_reserved=TABLE_SBZ,
        leaf_ignored=B_C | XN1 | (UNPRIVILEGED | S | NG) << 6 | bits(14, 12) | NS | unchecked,
        table_ignored=TABLE_NS,
        leaf_base=base | ns,
        table_base=TABLE | (TABLE_NS if quirks & QUIRK_NS else 0),
        prot_bits=(0, 0 if bare else READ_ONLY << 6, 0, 0),
        leaf_attrs=PXN | DOMAIN | IMPLEMENTATION,
        table_attrs=TABLE_PXN | DOMAIN | IMPLEMENTATION,
        contig=(
            Contig(
                SUPERSECTION,
                SUPERSECTION,
                4,
                reserved=EXTENDED | DOMAIN,  # PA[39:32]: beyond 32 output bits
                attrs=PXN | IMPLEMENTATION,
                attrs_value=0,
                memory=first[:-1],
            ),
        ),
        memory=first,
        named=(("access", AF << 6), ("supersection", SUPERSECTION)),
        table_named=(
            ("pxn", TABLE_PXN),
            ("ns", TABLE_NS),
            ("domain", DOMAIN),
            ("implementation", IMPLEMENTATION),
        ),
    )


def open_format(config: Mapping[str, object]) -> Format:
    """The format in one configuration. :raises InputError: a configuration that hardware does not have."""
    quirks = quirks_of("arm_v7s", config, QUIRKS)
    given = {key: value for key, value in config.items() if key != "quirks"}
    full = {**integers("arm_v7s", given, CONFIG), "quirks": quirks}
    return Format(
        name="arm_v7s",
        config=MappingProxyType(dict(full)),
        spec=SPEC,
        levels=(_second(quirks), _first(quirks)),
        item_bytes=4,
        table_bytes=1024,
        write_only=False,
        # arm_v7s_prot_to_pte(): TEX = 1 but for IOMMU_MMIO, B and C for IOMMU_CACHE
        terms=(
            (CACHE, "bc", (3,)),
            (MMIO, "tex", (0,)),
            (NOEXEC, "xn", (1,)),
            *(() if quirks & QUIRK_NO_PERMS else ((PRIV, "unprivileged", (0,)),)),
        ),
        features=MappingProxyType({"no_perms": bool(quirks & QUIRK_NO_PERMS)}),
    )
