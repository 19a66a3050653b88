# SPDX-License-Identifier: Apache-2.0
"""AMD I/O page tables for host translations ("v1"): 1 to 6 levels, every power-of-two leaf size.

Sources: "AMD I/O Virtualization Technology (IOMMU) Specification" (48882), section 2.2.3 "I/O Page Tables for
Host Translations" with its tables "Page Table Level Parameters" and "Example Page Size Encodings", as
drivers/iommu/generic_pt/fmt/amdv1.h (7.3) cites and implements them; that a leaf of a level's default size
has next level 0, never 7: Linux commit d4b036648402 ("iommu/amd: Correctly encode huge pages in iommu page
tables").

Bit by bit; "mode" n of the specification is level n - 1 here:

====== ============================= ============================ =======================================
bits   leaf (PTE)                    table item (PDE)             here
====== ============================= ============================ =======================================
0      PR                            PR                           present
4:1    ignored                       ignored                      ignored
5      A                             A                            ignored: hardware writes it
6      D                             ignored                      ignored: hardware writes it
8:7    ignored                       ignored                      ignored
11:9   next level: 0, 7              next level: 1 ... own - 1    leaf or table, and which table
51:12  OA; 7: and the size           pa of the next table         translation
58:52  reserved                      reserved                     reserved
59     U                             reserved                     leaf: attribute (Linux writes 0)
60     FC                            reserved                     leaf: attribute, ``force_coherence``
61, 62 IR, IW                        IR, IW                       permission, anded along the path
63     ignored                       ignored                      ignored
====== ============================= ============================ =======================================

Next level 0 is a leaf of the level's default size. Next level 7 is a larger one, which fills 2, 4 ... 256
items that are all equal: its size is 2**(n + 1) bytes where bit n is the lowest 0 of the address from bit 12
on. A table item may skip levels; the IOVA bits of the levels skipped must be 0. The sixth level translates
IOVA bits 63:57 and has no leaves. The table grows by a new root above the old one: ``levels`` is what the
device table entry's mode says now. A and D take no permission away: hardware sets them where the device table
entry's HAD says so and goes on, and ignores them elsewhere; IR and IW alone decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from iokeep.pt.formats.base import MMIO, Contig, Format, LevelSpec
from iokeep.pt.formats.config import integers

SPEC = "AMD I/O Virtualization Technology (IOMMU) Specification (48882), section 2.2.3"

#: key -> (default, values): levels = the device table entry's mode; output_bits = IOMMU's physical address
#: size; force_coherence = leaves carry FC (PT_FEAT_AMDV1_FORCE_COHERENCE; Linux always does);
#: c_bit = number of the memory encryption bit (PT_FEAT_AMDV1_ENCRYPT_TABLES), 0 = none.
CONFIG = {
    "levels": (3, (1, 2, 3, 4, 5, 6)),
    "output_bits": (52, tuple(range(36, 53))),
    "force_coherence": (1, (0, 1)),
    "c_bit": (0, (0, *range(43, 52))),
}


def _bits(high: int, low: int) -> int:
    return (1 << (high + 1)) - (1 << low) if high >= low else 0


PR, A, D = 1 << 0, 1 << 5, 1 << 6
IGNORED = _bits(4, 1) | _bits(8, 7) | 1 << 63
NEXT = _bits(11, 9)
SIZED = 7 << 9
RESERVED = _bits(58, 52)
U, FC, IR, IW = 1 << 59, 1 << 60, 1 << 61, 1 << 62
#: the specification encodes sizes in address bits up to 51; Linux makes no 512G leaf ("a hardware bug")
MAX_LEAF_LG2, NOT_BUILT_LG2 = 51, 39
TOP_LEVEL = 5


def _contig(shift: int, lg2: int) -> Contig:
    """``2**lg2`` items of ``2**shift`` bytes: ones from bit 12 on say the size."""
    size = shift + lg2
    return Contig(mask=NEXT | _bits(size - 1, 12), value=SIZED | _bits(size - 2, 12), lg2=lg2)


def _level(number: int, config: Mapping[str, int]) -> LevelSpec:
    shift = 12 + 9 * number
    top = number == TOP_LEVEL
    may_leaf = not top
    encrypted = 1 << config["c_bit"] if config["c_bit"] else 0
    above = _bits(51, config["output_bits"]) & ~encrypted
    address = _bits(config["output_bits"] - 1, 12) & ~encrypted
    coherent = FC if config["force_coherence"] else 0
    # A size is no larger than what lies below the encryption bit.
    largest = min(MAX_LEAF_LG2, config["c_bit"] or MAX_LEAF_LG2)
    runs = tuple(_contig(shift, n) for n in range(1, 9) if shift + n <= largest) if may_leaf else ()
    return LevelSpec(
        shift=shift,
        index_bits=7 if top else 9,
        leaf=may_leaf,
        table=number > 0,
        valid_mask=PR,
        leaf_mask=NEXT if may_leaf else 0,
        leaf_value=0,
        leaf_values=((NEXT, 0), (NEXT, SIZED)),
        # Where all items are leaves, a next level between is none that could be.
        leaf_bad=tuple((NEXT, n << 9) for n in range(1, 7)) if number == 0 else (),
        # One level down first: it is what Linux writes.
        next_levels=tuple((NEXT, n << 9, n - 1) for n in range(number, 0, -1)),
        contig=runs,
        contig_select=(NEXT, SIZED),
        table_pa_mask=address if number > 0 else 0,
        leaf_pa_mask=address & ~_bits(shift - 1, 12) if may_leaf else 0,
        r_mask=IR,
        r_value=IR,
        w_mask=IW,
        w_value=IW,
        tr_mask=IR,
        tr_value=IR,
        tw_mask=IW,
        tw_value=IW,
        leaf_reserved=RESERVED | above | (_bits(shift - 1, 12) & ~encrypted),
        table_reserved=RESERVED | above | U | FC,
        leaf_ignored=A | D | IGNORED,
        table_ignored=A | D | IGNORED,
        leaf_base=PR | coherent | encrypted,
        # IR and IW: permissions are the leaf's (amdv1pt_install_table()).
        table_base=PR | number << 9 | IR | IW | encrypted,
        prot_bits=(0, IR, IW, IR | IW),
        leaf_attrs=U | FC | encrypted,
        leaf_attrs_value=coherent | encrypted,
        table_attrs=encrypted,
        table_attrs_value=encrypted,
        # amdv1pt_iommu_set_prot(): IOMMU_MMIO means "not encrypted"; the others it has no use for.
        memory=(("u", U), ("fc", FC), *((("encrypted", encrypted),) if encrypted else ())),
        named=(("accessed", A), ("dirty", D)),
        table_named=(("accessed", A), *((("encrypted", encrypted),) if encrypted else ())),
        build_lg2s=tuple(
            n for n in (shift, *(shift + c.lg2 for c in runs)) if n != NOT_BUILT_LG2 and n <= largest
        ),
    )


def open_format(config: Mapping[str, object]) -> Format:
    """The format in one configuration. :raises InputError: a configuration that hardware does not have."""
    full = integers("amdv1", config, CONFIG)
    return Format(
        name="amdv1",
        config=MappingProxyType(dict(full)),
        spec=SPEC,
        levels=tuple(_level(number, full) for number in range(full["levels"])),
        # amdv1pt_load_entry_raw() looks at PR alone.
        occupied_mask=PR,
        terms=((MMIO, "encrypted", (0,)),) if full["c_bit"] else (),
        features=MappingProxyType({"force_coherence": bool(full["force_coherence"])}),
    )
