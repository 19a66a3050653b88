# SPDX-License-Identifier: Apache-2.0
"""s390 zPCI I/O translation tables: region, segment and page tables, big endian.

The I/O form of them is in no public specification; sources: arch/s390/include/asm/pci_dma.h and
drivers/iommu/s390-iommu.c (what Linux writes and reads), and for the CPU's tables, which they follow,
"z/Architecture Principles of Operation" (SA22-7832), chapter 3, "Dynamic Address Translation": region-table,
segment-table and page-table entries.

Bit by bit, counted from the right as everywhere here (IBM counts from the left):

====== ============================= ============================ =======================================
bits   page table entry              region, segment table entry  here
====== ============================= ============================ =======================================
1:0    0                             TL: table length (region)    leaf: attribute; table: wanted full
3:2    0                             TT: type of this table       leaf: attribute; table: must match
4      0                             CR, common segment           attribute (Linux writes 0)
5      0                             I: invalid                   table: present where 0
7:6    0                             TF: table offset (region)    attribute (Linux writes 0)
8      0                             unknown                      attribute (Linux writes 0)
9      P: protected                  P                            no writes where set
10     I: invalid                    FC (segment); origin         leaf: present where 0; segment: attribute
11     0                             origin of the next table     leaf: attribute
63:12  OA                            origin: 2K or 16K aligned    translation
====== ============================= ============================ =======================================

An item of 0 is valid: tables are empty where the invalid bit is *set*, so that bit is inverted here. Region
and segment tables have 2048 items in 16 KiB, page tables 256 in 2 KiB, two of them to a frame. Linux leaves
the OA in place when it unmaps. Everything is readable: there is no write-only.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from iokeep.errors import InputError
from iokeep.pt.formats.base import Format, LevelSpec

SPEC = "arch/s390/include/asm/pci_dma.h; z/Architecture Principles of Operation (SA22-7832), chapter 3"


def _bits(high: int, low: int) -> int:
    return (1 << (high + 1)) - (1 << low) if high >= low else 0


PROTECTED, PAGE_INVALID, TABLE_INVALID = 1 << 9, 1 << 10, 1 << 5
TYPE, LENGTH = _bits(3, 2), _bits(1, 0)
#: designation type of the I/O translation anchor (enum zpci_ioat_dtype) -> levels
ANCHOR_TYPE, ANCHOR_ENABLED = _bits(4, 2), 1 << 11
LEVELS = {7: 1, 0: 2, 1: 3, 2: 4, 3: 5}
PAGE_BITS, TABLE_BITS = 8, 11


def _page() -> LevelSpec:
    return LevelSpec(
        shift=12,
        index_bits=PAGE_BITS,
        leaf=True,
        table=False,
        valid_mask=PAGE_INVALID,
        invert=PAGE_INVALID,
        leaf_mask=0,
        leaf_value=0,
        table_pa_mask=0,
        leaf_pa_mask=_bits(63, 12),
        r_mask=0,
        r_value=0,
        w_mask=PROTECTED,
        w_value=0,
        tr_mask=0,
        tr_value=0,
        tw_mask=0,
        tw_value=0,
        leaf_reserved=0,
        table_reserved=0,
        leaf_ignored=0,
        table_ignored=0,
        leaf_base=PAGE_INVALID,
        table_base=0,
        prot_bits=(0, PROTECTED, 0, 0),
        leaf_attrs=_bits(8, 0) | 1 << 11,
        memory=(("low", _bits(8, 0)), ("bit11", 1 << 11)),
        occupied_mask=PAGE_INVALID,
    )


def _table(number: int) -> LevelSpec:
    segment = number == 1
    # TT: segment 0, region third 1, second 2, first 3
    own = (number - 1) << 2
    origin = _bits(63, 11) if segment else _bits(63, 12)
    length = 0 if segment else LENGTH
    return LevelSpec(
        shift=12 + PAGE_BITS + TABLE_BITS * (number - 1),
        index_bits=TABLE_BITS,
        leaf=False,
        table=True,
        valid_mask=TABLE_INVALID,
        invert=TABLE_INVALID,
        leaf_mask=0,
        leaf_value=0,
        table_bad=tuple((TYPE, n << 2) for n in range(4) if n << 2 != own),
        table_pa_mask=origin,
        leaf_pa_mask=0,
        r_mask=0,
        r_value=0,
        w_mask=0,
        w_value=0,
        tr_mask=0,
        tr_value=0,
        tw_mask=PROTECTED,
        tw_value=0,
        leaf_reserved=0,
        table_reserved=0,
        leaf_ignored=0,
        table_ignored=0,
        leaf_base=0,
        table_base=TABLE_INVALID | own | length,
        prot_bits=(0, 0, 0, 0),
        # A region table that is not whole (TL, TF) is one that Linux never makes.
        table_attrs=_bits(10, 0) & ~(TYPE | PROTECTED | TABLE_INVALID) | (0 if segment else 1 << 11),
        table_attrs_value=length,
        table_named=(("type", TYPE), *((("length", LENGTH),) if length else ())),
        occupied_mask=TABLE_INVALID,
    )


def open_format(config: Mapping[str, object]) -> Format:
    """The format as the I/O translation anchor says it.

    :param config: ``iota``, the anchor as an int or "0x..."; or ``levels``, 1 ... 5 (default 3, region third
        table). The anchor's origin is not looked at.
    :raises InputError: an anchor that is not enabled or of another type.
    """
    for key in config:
        if key not in ("iota", "levels"):
            raise InputError(
                f"format s390_zpci: unknown configuration key {str(key)[:64]!r}", "known: iota, levels"
            )
    levels = config.get("levels", 3)
    if isinstance(levels, bool) or not isinstance(levels, int) or levels not in LEVELS.values():
        raise InputError(
            f"format s390_zpci: configuration levels = {str(levels)[:64]!r} is not one that hardware has",
            "levels: 1, 2, 3, 4, 5",
        )
    if "iota" in config:
        anchored = _anchored(config["iota"])
        if "levels" in config and levels != anchored:
            raise InputError(f"format s390_zpci: iota says {anchored} levels, levels says {levels}")
        levels = anchored
    return Format(
        name="s390_zpci",
        config=MappingProxyType({"levels": levels}),
        spec=SPEC,
        levels=(_page(), *(_table(number) for number in range(1, levels))),
        byte_order=">",
        table_bytes=8 << PAGE_BITS,
        table_align=4096,
        write_only=False,
    )


def _anchored(iota: object) -> int:
    """Levels that an I/O translation anchor designates."""
    value = iota
    if isinstance(iota, str):
        try:
            value = int(iota, 16)
        except ValueError:
            value = None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 64:
        raise InputError(f"format s390_zpci: configuration iota = {str(iota)[:64]!r} is no 64-bit value")
    kind = (value & ANCHOR_TYPE) >> 2
    if not value & ANCHOR_ENABLED or kind not in LEVELS:
        raise InputError(
            f"format s390_zpci: iota {value:#x} is not enabled or designates no table (type {kind})",
            f"types with a table: {', '.join(map(str, LEVELS))}",
        )
    return LEVELS[kind]
