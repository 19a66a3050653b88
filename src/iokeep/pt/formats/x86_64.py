# SPDX-License-Identifier: Apache-2.0
"""x86-64 page tables as IOMMUs use them: VT-d first stage, AMD guest (v2) tables; 4 and 5 levels.

Sources: Intel SDM volume 3, section 4.5 "4-Level Paging and 5-Level Paging" (tables 4-14 ... 4-20); "Intel
Virtualization Technology for Directed I/O, Architecture Specification" (D51397, rev. 4.1), section 9.7
"First-Stage Paging Entries"; AMD I/O Virtualization Technology specification (48882), section 2.2.6; what
Linux writes: drivers/iommu/generic_pt/fmt/x86_64.h (7.3).

Bit by bit (HAW = host address width = ``output_bits``):

====== ============================ ============================ ========================================
bits   leaf                         table item                   here
====== ============================ ============================ ========================================
0      P                            P                            present
1      R/W                          R/W                          permission to write
2      U/S                          U/S                          permission: DMA is a user request
4:3    PCD, PWT                     PCD, PWT                     attribute (Linux writes 0)
5      A                            A                            ignored: hardware writes it
6      D                            ignored                      ignored: hardware writes it
7      PS = 1; PTE: PAT             PS = 0; PML4E/PML5E: rsvd    leaf or table; PTE: attribute
8      G                            ignored                      leaf: attribute (Linux writes 0)
9, 11  ignored                      ignored                      Linux: bit 9 "cache flush done" in tables
10     EA (VT-d) or ignored         same                         ignored: hardware writes it
12     large leaf: PAT              --                           attribute (Linux writes 0)
x:13   reserved below the leaf size --                           reserved
HAW-1: OA                           pa of the next table         translation
51:HAW reserved                     reserved                     reserved
62:52  ignored                      ignored                      ignored (protection keys are CPU only)
63     XD                           XD                           attribute (Linux writes 0)
====== ============================ ============================ ========================================

There is no write-only: a leaf that may be written may be read. A and D take no permission away: hardware sets
them and goes on (VT-d section 3.6.3 "Accessed and Dirty Flags"; AMD's guest tables likewise).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from iokeep.pt.formats.base import Format, LevelSpec
from iokeep.pt.formats.config import integers

SPEC = "Intel SDM volume 3, section 4.5; Intel VT-d Architecture Specification rev. 4.1 (D51397), section 9.7"

#: key -> (default, values). levels: 4, or 5 with FSPM (9.6) / CR4.LA57; output_bits = HAW; max_leaf_lg2 from
#: CAP_REG.FS1GP; c_bit = number of AMD's memory encryption bit (PT_FEAT_X86_64_AMD_ENCRYPT_TABLES), 0 = none;
#: sign_extend 0 = AMD's PASID 0 use without canonical IOVAs (x86_64.h, PT_FEAT_SIGN_EXTEND).
CONFIG = {
    "levels": (4, (4, 5)),
    "output_bits": (52, tuple(range(36, 53))),
    "max_leaf_lg2": (30, (12, 21, 30)),
    "sign_extend": (1, (0, 1)),
    "c_bit": (0, (0, *range(43, 52))),
}


def _bits(high: int, low: int) -> int:
    return (1 << (high + 1)) - (1 << low) if high >= low else 0


P, RW, US = 1 << 0, 1 << 1, 1 << 2
PWT, PCD, A, D = 1 << 3, 1 << 4, 1 << 5, 1 << 6
PS, PAT_SMALL, G, SW = 1 << 7, 1 << 7, 1 << 8, 1 << 9
EA, AVL11, PAT_LARGE = 1 << 10, 1 << 11, 1 << 12
IGNORED_HIGH, XD = _bits(62, 52), 1 << 63


def _level(number: int, config: Mapping[str, int]) -> LevelSpec:
    shift = 12 + 9 * number
    output = config["output_bits"]
    encrypted = 1 << config["c_bit"] if config["c_bit"] else 0
    above = _bits(51, output) & ~encrypted
    may_leaf = shift <= config["max_leaf_lg2"]
    large = number > 0
    return LevelSpec(
        shift=shift,
        index_bits=9,
        leaf=may_leaf,
        table=large,
        valid_mask=P,
        # A PTE is always a leaf; PDE and PDPTE by PS.
        leaf_mask=PS if large and may_leaf else 0,
        leaf_value=PS if large and may_leaf else 0,
        table_pa_mask=_bits(output - 1, 12) & ~encrypted if large else 0,
        leaf_pa_mask=_bits(output - 1, shift) & ~encrypted,
        r_mask=P | US,
        r_value=P | US,
        w_mask=P | US | RW,
        w_value=P | US | RW,
        tr_mask=US,
        tr_value=US,
        tw_mask=US | RW,
        tw_value=US | RW,
        leaf_reserved=above | _bits(shift - 1, 13),
        # PS is reserved where the level, or this hardware (FS1GP), has no leaf of that size.
        table_reserved=above | (0 if may_leaf else PS),
        leaf_ignored=A | D | SW | EA | AVL11 | IGNORED_HIGH,
        table_ignored=A | D | G | SW | EA | AVL11 | IGNORED_HIGH,
        # Linux presets A, and D where the leaf may be written (x86_64_pt_iommu_set_prot).
        leaf_base=P | US | A | (PS if large else 0) | encrypted,
        table_base=P | RW | US | A | SW | encrypted,
        prot_bits=(0, 0, RW | D, RW | D),
        leaf_attrs=PWT | PCD | G | XD | (PAT_LARGE if large else PAT_SMALL) | encrypted,
        leaf_attrs_value=encrypted,
        table_attrs=PWT | PCD | XD | encrypted,
        table_attrs_value=encrypted,
        # x86_64_pt_iommu_set_prot() has no use for IOMMU_CACHE, NOEXEC, MMIO and PRIV: there are no terms.
        memory=(
            ("pwt", PWT),
            ("pcd", PCD),
            ("pat", PAT_LARGE if large else PAT_SMALL),
            ("global", G),
            ("xd", XD),
            *((("encrypted", encrypted),) if encrypted else ()),
        ),
        named=(("accessed", A), ("dirty", D), ("extended_accessed", EA)),
        table_named=(
            ("accessed", A),
            ("extended_accessed", EA),
            ("flushed", SW),
            ("pwt", PWT),
            ("pcd", PCD),
            ("xd", XD),
            *((("encrypted", encrypted),) if encrypted else ()),
        ),
    )


def open_format(config: Mapping[str, object]) -> Format:
    """The format in one configuration. :raises InputError: a configuration that hardware does not have."""
    full = integers("x86_64", config, CONFIG)
    return Format(
        name="x86_64",
        config=MappingProxyType(dict(full)),
        spec=SPEC,
        levels=tuple(_level(number, full) for number in range(full["levels"])),
        sign_extend=bool(full["sign_extend"]),
        write_only=False,
        # x86_64_pt_load_entry_raw() looks at P alone; vtdss_pt_load_entry_raw() at the whole item.
        occupied_mask=P,
        features=MappingProxyType({"sign_extend": bool(full["sign_extend"])}),
    )
