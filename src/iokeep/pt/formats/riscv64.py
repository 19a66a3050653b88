# SPDX-License-Identifier: Apache-2.0
"""RISC-V page tables: Sv39, Sv48, Sv57, and as second stage Sv39x4, Sv48x4, Sv57x4.

Sources: "The RISC-V Instruction Set Manual, Volume II: Privileged Architecture", sections "Sv39: Page-Based
39-bit Virtual-Memory System", "Sv48 ...", "Sv57 ...", "Svnapot Extension for NAPOT Translation Contiguity",
"Svpbmt Extension for Page-Based Memory Types", and "Two-Stage Address Translation" of the hypervisor
extension (the x4 schemes); "RISC-V IOMMU Architecture Specification", which takes the formats over; what
Linux writes: drivers/iommu/generic_pt/fmt/riscv.h (7.2, first stage). QEMU raises the same faults
(target/riscv/tcg/cpu_helper.c, get_physical_address()).

Bit by bit:

====== ============================= ============================ =======================================
bits   leaf                          table item                   here
====== ============================= ============================ =======================================
0      V                             V                            present
1, 2   R, W; W without R: reserved   0, 0                         permission; leaf where R, W or X
3      X                             0                            leaf where R, W or X; else ignored: DMA
4      U                             reserved                     permission: DMA is a user's
5      G                             G                            attribute (Linux writes 0)
6, 7   A, D                          reserved                     ignored, or permission (``hardware_ad``)
9:8    RSW                           RSW                          ignored
53:10  PPN                           PPN                          pa >> 12; below a large leaf: reserved
60:54  reserved                      reserved                     reserved
62:61  PBMT: 0, NC, IO; 3: reserved  reserved                     leaf: attribute (Linux writes 0)
63     N                             reserved                     level 0: NAPOT; else reserved
====== ============================= ============================ =======================================

Every level has leaves. Svnapot: 16 items, aligned and equal, with N and PPN[3:0] = 0b1000 are one leaf of
64K. IOVAs of the first stage are sign extended; those of the second stage have two bits more than a CPU's,
which index a root of 16 KiB, and are not. There is no write-only.

A and D: "RISC-V IOMMU Architecture Specification", tc.SADE and tc.GADE. Where 0 (what Linux writes:
drivers/iommu/riscv/iommu.c), hardware updates nothing, as with Svade: an access through a leaf with A = 0 is
a page fault, and so is a write where D = 0, whatever W says. Where 1, as with Svadu: hardware sets them, and
neither takes a permission away (``hardware_ad`` = 1). Linux writes A always, and D with W
(``riscvpt_iommu_set_prot()``), so that its tables translate alike either way.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from iokeep.pt.formats.base import CACHE, MMIO, NOEXEC, Contig, Format, LevelSpec
from iokeep.pt.formats.config import integers

SPEC = "RISC-V Privileged Architecture (Sv39, Sv48, Sv57, Svnapot, Svpbmt, Sv39x4, Sv48x4, Sv57x4)"

#: key -> (default, values): levels 3, 4, 5 = Sv39, Sv48, Sv57; stage 2 = the x4 schemes; output_bits = the
#: platform's physical address size; svnapot, svpbmt = capabilities of the IOMMU; hardware_ad = tc.SADE (first
#: stage) or tc.GADE (second stage) of the device context.
CONFIG = {
    "levels": (3, (3, 4, 5)),
    "stage": (1, (1, 2)),
    "output_bits": (56, tuple(range(34, 57))),
    "svnapot": (1, (0, 1)),
    "svpbmt": (1, (0, 1)),
    "hardware_ad": (0, (0, 1)),
}


def _bits(high: int, low: int) -> int:
    return (1 << (high + 1)) - (1 << low) if high >= low else 0


V, R, W, X, U, G, A, D = (1 << n for n in range(8))
RSW = _bits(9, 8)
#: pa = PPN << 12, and PPN begins at bit 10
PA_SHIFT = 2
RESERVED = _bits(60, 54)
PBMT, N = _bits(62, 61), 1 << 63
#: PMA, NC, IO: riscvpt_iommu_set_prot() writes IO for IOMMU_MMIO, else NC without IOMMU_CACHE
PBMT_TERMS = ((CACHE, "pbmt", (0,)), (MMIO, "pbmt", (2,)))
NAPOT_MASK, NAPOT = _bits(13, 10), 1 << 13


def _level(number: int, config: Mapping[str, int]) -> LevelSpec:
    shift = 12 + 9 * number
    top = number == config["levels"] - 1
    output = config["output_bits"]
    above = _bits(53, output - PA_SHIFT)
    napot = bool(config["svnapot"]) and number == 0
    pbmt = PBMT if config["svpbmt"] else 0
    read, write = (R | U, R | W | U) if config["hardware_ad"] else (R | U | A, R | W | U | A | D)
    ad = A | D if config["hardware_ad"] else 0
    return LevelSpec(
        shift=shift,
        index_bits=11 if top and config["stage"] == 2 else 9,
        leaf=True,
        table=number > 0,
        valid_mask=V,
        leaf_mask=R | W | X,
        leaf_value=0,
        leaf_values=((R, R), (W, W), (X, X)),
        # At level 0 an item without R, W and X would be a pointer to nowhere.
        leaf_bad=(
            (R | W, W),
            *(((PBMT, PBMT),) if pbmt else ()),
            *(((R | W | X, 0),) if number == 0 else ()),
        ),
        table_pa_mask=_bits(output - 1 - PA_SHIFT, 10) if number > 0 else 0,
        leaf_pa_mask=_bits(output - 1 - PA_SHIFT, shift - PA_SHIFT),
        pa_shift=PA_SHIFT,
        contig=(Contig(mask=N | NAPOT_MASK, value=N | NAPOT, lg2=4),) if napot else (),
        contig_select=(N, N) if napot else None,
        r_mask=read,
        r_value=read,
        w_mask=write,
        w_value=write,
        tr_mask=0,
        tr_value=0,
        tw_mask=0,
        tw_value=0,
        leaf_reserved=RESERVED
        | above
        | _bits(shift - PA_SHIFT - 1, 10)
        | (PBMT & ~pbmt)
        | (0 if napot else N),
        table_reserved=RESERVED | above | U | A | D | PBMT | N,
        leaf_ignored=X | RSW | ad,
        table_ignored=RSW,
        # riscvpt_iommu_set_prot(): A and U always, D with W, X where IOMMU_NOEXEC is not asked for.
        leaf_base=V | X | U | A,
        table_base=V,
        prot_bits=(0, R, R | W | D, R | W | D),
        leaf_attrs=G | pbmt,
        leaf_attrs_value=0,
        table_attrs=G,
        memory=(("x", X), ("global", G), *((("pbmt", pbmt),) if pbmt else ())),
        named=(("accessed", A), ("dirty", D), ("software", RSW), *((("napot", N),) if napot else ())),
        table_named=(("global", G), ("software", RSW)),
    )


def open_format(config: Mapping[str, object]) -> Format:
    """The format in one configuration. :raises InputError: a configuration that hardware does not have."""
    full = integers("riscv64", config, CONFIG)
    first = full["stage"] == 1
    return Format(
        name="riscv64",
        config=MappingProxyType(dict(full)),
        spec=SPEC,
        levels=tuple(_level(number, full) for number in range(full["levels"])),
        sign_extend=first,
        write_only=False,
        # riscvpt_load_entry_raw() looks at V alone.
        occupied_mask=V,
        terms=((NOEXEC, "x", (0,)), *PBMT_TERMS) if full["svpbmt"] else ((NOEXEC, "x", (0,)),),
        # Svpbmt with two stages: the first stage's type overrides the second's where it is not PMA.
        outranks=("pbmt", (0,)) if first and full["svpbmt"] else None,
        features=MappingProxyType({"svnapot": bool(full["svnapot"]), "sign_extend": first}),
    )
