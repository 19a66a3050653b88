# SPDX-License-Identifier: Apache-2.0
"""One IOVA through the tables, with the path, as hardware walks."""

from __future__ import annotations

from dataclasses import dataclass

from iokeep.mem.memory import Memory
from iokeep.pt.formats.base import Format


@dataclass(frozen=True, slots=True)
class Walk:
    """A walk.

    :param iova: what was walked. :param steps: (level, pa of the item, item), root first.
    :param pa: what it translates to, or None. :param prot: PROT_R | PROT_W granted along the path.
    :param leaf_lg2: log2 size of the leaf in bytes, or None. :param why: "" or why nothing translates.
    """

    iova: int
    steps: tuple[tuple[int, int, int], ...]
    pa: int | None
    prot: int
    leaf_lg2: int | None
    why: str


def load_item(fmt: Format, mem: Memory, at: int, level: int) -> int:
    """The item of a level at pa ``at``, after byte order and ``invert``. :raises MemoryAbsent: not there."""
    raw = mem.read(at, fmt.item_bytes)
    return int.from_bytes(raw, "little" if fmt.byte_order == "<" else "big") ^ fmt.levels[level].invert


def walk(fmt: Format, mem: Memory, root_pa: int, iova: int) -> Walk:
    """Translate ``iova``; reserved bits and missing permissions end the walk as hardware would.

    :raises MemoryAbsent: a table on the path is not in the memory.
    """
    steps: list[tuple[int, int, int]] = []

    def end(why: str, pa: int | None = None, prot: int = 0, lg2: int | None = None) -> Walk:
        return Walk(iova, tuple(steps), pa, prot, lg2, why)

    if not fmt.covers(iova):
        return end(f"iova {iova:#x} is beyond the {fmt.input_lg2}-bit input of this table")
    table, prot, level = root_pa, 3, fmt.top_level
    while True:
        spec = fmt.levels[level]
        at = table + ((iova >> spec.shift) & (spec.items - 1)) * fmt.item_bytes
        item = load_item(fmt, mem, at, level)
        steps.append((level, at, item))
        if not spec.is_present(item):
            return end(f"not present at level {level}")
        if spec.is_leaf(item):
            bad = spec.bad_leaf(item)
            if bad is not None:
                return end(f"reserved bits {bad:#x} in the leaf at level {level}")
            prot &= spec.leaf_prot(item)
            lg2, pa = spec.shift, spec.leaf_pa(item)
            run = spec.contig_of(item)
            if run is not None:
                lg2 += run.lg2
            if run is not None and run.replicated:
                pa = pa & -(1 << lg2) | iova & ((1 << lg2) - 1)
            else:
                pa |= iova & ((1 << spec.shift) - 1)
            if not prot:
                return end("no permission is left along the path", None, 0, lg2)
            return end("", pa, prot, lg2)
        bad = spec.bad_table(item)
        if bad is not None:
            return end(f"reserved bits {bad:#x} in the table item at level {level}")
        prot &= int(item & spec.tr_mask == spec.tr_value) | int(item & spec.tw_mask == spec.tw_value) << 1
        table, below = spec.table_pa(item), spec.next_level(item, level)
        low = fmt.levels[below].shift + fmt.levels[below].index_bits
        if (iova >> low) & ((1 << (spec.shift - low)) - 1):
            return end(f"level {level} leads to level {below}, and the IOVA bits between are not zero")
        level = below
