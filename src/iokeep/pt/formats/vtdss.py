# SPDX-License-Identifier: Apache-2.0
"""Intel VT-d second-stage page tables (3, 4 and 5 levels).

Sources: "Intel Virtualization Technology for Directed I/O, Architecture Specification" (D51397, rev. 4.1),
section 3.7 "Second-Stage Translation" and section 9.8 "Second-Stage Paging Entries" (SS-PML5E, SS-PML4E,
SS-PDPTE, SS-PDE, SS-PTE); what Linux writes: drivers/iommu/generic_pt/fmt/vtdss.h (7.3). QEMU checks the same
reserved bits (hw/i386/intel_iommu_internal.h, VTD_SPTE_*_RSVD_MASK).

Bit by bit, section 9.8 (HAW = host address width = ``output_bits``):

====== ============================ ============================ ========================================
bits   leaf                         table item                   here
====== ============================ ============================ ========================================
0, 1   R, W                         R, W                         permission; R = W = 0 is "not present"
2      X, ignored without execute   same                         ignored: no Linux domain enables it
5:3    EMT                          ignored                      leaf: attribute (Linux writes 0)
6      IPAT                         ignored                      leaf: attribute (Linux writes 0)
7      PS = 1; SS-PTE: ignored      PS = 0; PML4E, 5E: reserved  leaf or table
8, 9   A, D (or ignored)            A, ignored                   ignored: hardware writes them
10     ignored                      ignored                      Linux: "cache flush done" in table items
11     SNP                          reserved                     leaf: attribute, wanted value = ``snoop``
x:12   reserved below the leaf size --                           reserved
HAW-1: OA                           pa of the next table         translation
51:HAW reserved                     reserved                     reserved
61:52  ignored                      ignored                      ignored
62     TM                           reserved                     leaf: attribute (Linux writes 0)
63     ignored                      ignored                      ignored
====== ============================ ============================ ========================================

A and D take no permission away: with SSADE = 0 (9.6) they are ignored, with SSADE = 1 hardware sets them and
goes on (section 3.7.2 "Accessed and Dirty Flags"); R and W alone decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from iokeep.pt.formats.base import Format, LevelSpec
from iokeep.pt.formats.config import integers

SPEC = "Intel VT-d Architecture Specification rev. 4.1 (D51397), sections 3.7 and 9.8"

#: key -> (default, values): levels = AW + 2 (section 9.3, 30/39/48/57-bit AGAW; Linux uses 3, 4 and 5
#: levels); output_bits = HAW; max_leaf_lg2 from CAP_REG.SSLPS (section 11.4.2); snoop = leaves carry SNP
#: (PT_FEAT_VTDSS_FORCE_COHERENCE).
CONFIG = {
    "levels": (4, (3, 4, 5)),
    "output_bits": (52, tuple(range(36, 53))),
    "max_leaf_lg2": (30, (12, 21, 30)),
    "snoop": (0, (0, 1)),
}


def _bits(high: int, low: int) -> int:
    return (1 << (high + 1)) - (1 << low) if high >= low else 0


R, W, X = 1 << 0, 1 << 1, 1 << 2
EMT, IPAT, PS = _bits(5, 3), 1 << 6, 1 << 7
A, D, SW = 1 << 8, 1 << 9, 1 << 10
SNP, TM = 1 << 11, 1 << 62
IGNORED_HIGH = _bits(61, 52) | 1 << 63


def _level(number: int, config: Mapping[str, int]) -> LevelSpec:
    shift = 12 + 9 * number
    output = config["output_bits"]
    may_leaf = shift <= config["max_leaf_lg2"]
    return LevelSpec(
        shift=shift,
        index_bits=9,
        leaf=may_leaf,
        table=number > 0,
        valid_mask=R | W,
        # An SS-PTE is always a leaf; SS-PDE and SS-PDPTE by PS (9.8).
        leaf_mask=PS if number > 0 and may_leaf else 0,
        leaf_value=PS if number > 0 and may_leaf else 0,
        table_pa_mask=_bits(output - 1, 12) if number > 0 else 0,
        leaf_pa_mask=_bits(output - 1, shift),
        r_mask=R,
        r_value=R,
        w_mask=W,
        w_value=W,
        tr_mask=R,
        tr_value=R,
        tw_mask=W,
        tw_value=W,
        leaf_reserved=_bits(51, output) | _bits(shift - 1, 12),
        # PS is reserved where the level, or this hardware (SSLPS), has no leaf of that size.
        table_reserved=_bits(51, output) | SNP | TM | (0 if may_leaf else PS),
        leaf_ignored=X | A | D | SW | IGNORED_HIGH | (PS if number == 0 else 0),
        table_ignored=X | EMT | IPAT | A | D | SW | IGNORED_HIGH,
        leaf_base=(PS if number > 0 else 0) | (SNP if config["snoop"] else 0),
        # Linux marks a table whose cache flush is done (pt_sw_bit(0) = bit 10) on non-coherent IOMMUs.
        table_base=R | W | SW,
        prot_bits=(0, R, W, R | W),
        leaf_attrs=EMT | IPAT | SNP | TM,
        leaf_attrs_value=SNP if config["snoop"] else 0,
        table_attrs=0,
        # vtdss_pt_iommu_set_prot() has no use for IOMMU_CACHE, NOEXEC, MMIO and PRIV: there are no terms.
        memory=(("emt", EMT), ("ipat", IPAT), ("snp", SNP), ("tm", TM)),
        named=(("accessed", A), ("dirty", D)),
        table_named=(("accessed", A), ("flushed", SW)),
    )


def open_format(config: Mapping[str, object]) -> Format:
    """The format in one configuration. :raises InputError: a configuration that hardware does not have."""
    full = integers("vtdss", config, CONFIG)
    return Format(
        name="vtdss",
        config=MappingProxyType(dict(full)),
        spec=SPEC,
        levels=tuple(_level(number, full) for number in range(full["levels"])),
        features=MappingProxyType({"snoop": bool(full["snoop"])}),
    )
