# SPDX-License-Identifier: Apache-2.0
"""Mali page tables ("LPAE" address mode): like VMSAv8-64 with the 4K granule, but for the types.

There is no public specification. Source: drivers/iommu/io-pgtable-arm.c (ARM_MALI_LPAE: ``iopte_leaf()``,
``arm_lpae_prot_to_pte()``, ``arm_mali_lpae_alloc_pgtable()``). What it does not use is unknown, and
so reserved.

====== ============================ ============================ ===========================================
bits   leaf                         table item                   here
====== ============================ ============================ ===========================================
1:0    1, at every level            3                            present; leaf or table
4:2    attribute index (MEMATTR)    unknown                      leaf: memory attribute; table: reserved
6, 7   read, write                  unknown                      leaf: permission; table: reserved
9:8    shareability                 unknown                      leaf: memory attribute; table: reserved
10     access (Arm's own driver)    unknown                      leaf: ignored; table: reserved
n:12   OA                           pa of the next table         translation; reserved beyond 40 bits
54:53  never execute                unknown                      leaf: memory attribute; table: reserved
55     unknown                      Linux: item is synced        leaf: reserved; table: ignored
others unknown                      unknown                      reserved
====== ============================ ============================ ===========================================
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from iokeep.errors import InputError
from iokeep.pt.formats.arm_lpae import bits, quirks_of
from iokeep.pt.formats.base import CACHE as CACHED
from iokeep.pt.formats.base import MMIO, NOEXEC, Format, LevelSpec
from iokeep.pt.formats.config import integers

SPEC = "drivers/iommu/io-pgtable-arm.c, ARM_MALI_LPAE (there is no public specification)"

#: key -> (default, values). The start level is always 0, with one entry where 39 input bits or less need no
#: more (arm_mali_lpae_alloc_pgtable()).
CONFIG = {
    "granule": (4096, (4096,)),
    "input_bits": (48, tuple(range(16, 49))),
    "output_bits": (40, (32, 36, 40)),
    "start_level": (0, (0,)),
    "root_entries": (512, tuple(1 << n for n in range(10))),
}

LEAF, TABLE, TYPE = 1, 3, bits(1, 0)
ATTR_INDEX, READ, WRITE, SH, ACCESS = bits(4, 2), 1 << 6, 1 << 7, bits(9, 8), 1 << 10
XN, SYNCED = bits(54, 53), 1 << 55
#: ARM_LPAE_MAIR_ATTR_IDX_CACHE and ARM_LPAE_PTE_SH_OS, as for IOMMU_CACHE
CACHE = 1 << 2 | 2 << 8
ALL = bits(63, 0)
#: memory attributes of a leaf at every level, any value of which hardware takes
MEMORY = ATTR_INDEX | SH | XN


def _level(number: int, config: Mapping[str, int]) -> LevelSpec:
    shift, output, top = 12 + 9 * number, config["output_bits"], number == 3
    leaf, table = not top, number > 0
    oa, next_pa = bits(output - 1, shift), bits(output - 1, 12)
    return LevelSpec(
        shift=shift,
        index_bits=config["root_entries"].bit_length() - 1 if top else 9,
        leaf=leaf,
        table=table,
        valid_mask=1,
        leaf_mask=TYPE if leaf and table else 0,
        leaf_value=LEAF if leaf and table else 0,
        # Type 3 in the last level, type 1 in the first: neither exists.
        leaf_bad=() if table else ((TYPE, TABLE),),
        table_bad=() if leaf else ((TYPE, LEAF),),
        table_pa_mask=next_pa if table else 0,
        leaf_pa_mask=oa if leaf else 0,
        r_mask=READ,
        r_value=READ,
        w_mask=WRITE,
        w_value=WRITE,
        tr_mask=0,
        tr_value=0,
        tw_mask=0,
        tw_value=0,
        leaf_reserved=ALL & ~(TYPE | ATTR_INDEX | READ | WRITE | SH | ACCESS | oa | XN),
        table_reserved=ALL & ~(TYPE | next_pa | SYNCED),
        leaf_ignored=MEMORY | ACCESS,
        table_ignored=SYNCED,
        leaf_base=LEAF | CACHE,
        table_base=TABLE,
        prot_bits=(0, READ, WRITE, READ | WRITE),
        memory=(("attridx", ATTR_INDEX), ("sh", SH), ("xn", XN)),
        named=(("access", ACCESS),),
        table_named=(("synced", SYNCED),),
    )


def open_format(config: Mapping[str, object]) -> Format:
    """The format in one configuration. :raises InputError: a configuration that hardware does not have."""
    quirks_of("arm_mali_lpae", config, 0)
    given = {key: value for key, value in config.items() if key != "quirks"}
    full = integers("arm_mali_lpae", given, CONFIG)
    entries = 1 << max(full["input_bits"] - 39, 0)
    if "root_entries" in given and full["root_entries"] != entries:
        raise InputError(
            f"format arm_mali_lpae: root_entries {full['root_entries']} is not what hardware has",
            f"{full['input_bits']} input bits have {entries}",
        )
    full["root_entries"] = entries
    return Format(
        name="arm_mali_lpae",
        config=MappingProxyType(dict(full)),
        spec=SPEC,
        levels=tuple(_level(number, full) for number in range(4)),
        # ARM_LPAE_MAIR_ATTR_IDX_CACHE and _DEV; XN is both bits (arm_lpae_prot_to_pte())
        terms=((CACHED, "attridx", (1,)), (MMIO, "attridx", (2,)), (NOEXEC, "xn", (3,))),
    )
