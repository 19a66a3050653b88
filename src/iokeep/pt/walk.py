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


def load_item(fmt: Format, mem: Memory, at: int) -> int:
    """The item at pa ``at``, after byte order and ``invert``. :raises MemoryAbsent: it is absent."""
    order = "little" if fmt.byte_order == "<" else "big"
    return int.from_bytes(mem.read(at, fmt.item_bytes), order) ^ fmt.invert  # type: ignore[arg-type]


def walk(fmt: Format, mem: Memory, root_pa: int, iova: int) -> Walk:
    """Translate ``iova``; reserved bits and missing permissions end the walk as hardware would.

    :raises MemoryAbsent: a table on the path is not in the memory.
    """
    steps: list[tuple[int, int, int]] = []

    def end(why: str, pa: int | None = None, prot: int = 0, lg2: int | None = None) -> Walk:
        return Walk(iova, tuple(steps), pa, prot, lg2, why)

    if not fmt.covers(iova):
        return end(f"iova {iova:#x} is beyond the {fmt.input_lg2}-bit input of this table")
    table, prot = root_pa, 3
    for level in range(fmt.top_level, -1, -1):
        spec = fmt.levels[level]
        at = table + ((iova >> spec.shift) & (spec.items - 1)) * fmt.item_bytes
        item = load_item(fmt, mem, at)
        steps.append((level, at, item))
        if not item & spec.valid_mask:
            return end(f"not present at level {level}")
        if spec.leaf and (not spec.table or item & spec.leaf_mask == spec.leaf_value):
            if item & spec.leaf_reserved:
                return end(f"reserved bits {item & spec.leaf_reserved:#x} in the leaf at level {level}")
            prot &= int(item & spec.r_mask == spec.r_value) | int(item & spec.w_mask == spec.w_value) << 1
            pa = (item & spec.leaf_pa_mask) | (iova & ((1 << spec.shift) - 1))
            if not prot:
                return end("no permission is left along the path", None, 0, spec.shift)
            return end("", pa, prot, spec.shift)
        if item & spec.table_reserved:
            return end(f"reserved bits {item & spec.table_reserved:#x} in the table item at level {level}")
        prot &= int(item & spec.tr_mask == spec.tr_value) | int(item & spec.tw_mask == spec.tw_value) << 1
        table = item & spec.table_pa_mask
    return end("no leaf at level 0")
