# SPDX-License-Identifier: Apache-2.0
"""The formats once more, item by item in plain words, for the reference implementation only.

Written from the specifications, not from the masks of the formats beside it, so that one checks the other:
Intel VT-d Architecture Specification rev. 4.1, sections 9.7 and 9.8; Intel SDM volume 3, section 4.5.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Entry:
    """One item as hardware reads it. ``reserved``: a bit that must be zero is set. ``attrs``: a memory
    attribute is set.
    """

    leaf: bool
    pa: int
    read: bool
    write: bool
    reserved: bool
    attrs: bool


def _bit(item: int, number: int) -> bool:
    return bool(item >> number & 1)


def _field(item: int, high: int, low: int) -> int:
    return item >> low & ((1 << (high - low + 1)) - 1)


def second_stage(item: int, level: int, config: dict[str, int]) -> Entry | None:
    """A VT-d second-stage item of level 0 (SS-PTE) ... 4 (SS-PML5E); None = not present."""
    haw, size = config["output_bits"], 12 + 9 * level
    read, write = _bit(item, 0), _bit(item, 1)
    if not read and not write:
        return None
    can_be_leaf = size <= config["max_leaf_lg2"]
    leaf = level == 0 or (can_be_leaf and _bit(item, 7))
    above = haw < 52 and _field(item, 51, haw) != 0
    if leaf:
        below = size > 12 and _field(item, size - 1, 12) != 0
        emt, ipat, snp, tm = _field(item, 5, 3), _bit(item, 6), _bit(item, 11), _bit(item, 62)
        attrs = emt != 0 or ipat or tm or snp != bool(config["snoop"])
        return Entry(True, _field(item, haw - 1, size) << size, read, write, above or below, attrs)
    ps = _bit(item, 7) and not can_be_leaf
    return Entry(
        False,
        _field(item, haw - 1, 12) << 12,
        read,
        write,
        above or ps or _bit(item, 11) or _bit(item, 62),
        False,
    )


def first_stage(item: int, level: int, config: dict[str, int]) -> Entry | None:
    """An x86-64 item of level 0 (PTE) ... 4 (PML5E), for user requests; None = not present."""
    haw, size = config["output_bits"], 12 + 9 * level
    if not _bit(item, 0):
        return None
    user, writable, execute_disable = _bit(item, 2), _bit(item, 1), _bit(item, 63)
    cache = _bit(item, 3) or _bit(item, 4)
    can_be_leaf = size <= config["max_leaf_lg2"]
    leaf = level == 0 or (can_be_leaf and _bit(item, 7))
    above = haw < 52 and _field(item, 51, haw) != 0
    if leaf:
        pat = _bit(item, 7) if level == 0 else _bit(item, 12)
        below = size > 13 and _field(item, size - 1, 13) != 0
        attrs = cache or pat or _bit(item, 8) or execute_disable
        pa = _field(item, haw - 1, size) << size
        return Entry(True, pa, user, user and writable, above or below, attrs)
    ps = _bit(item, 7) and not can_be_leaf
    pa = _field(item, haw - 1, 12) << 12
    return Entry(False, pa, user, user and writable, above or ps, cache or execute_disable)


#: format name -> decoder of one item
DECODERS = {"vtdss": second_stage, "x86_64": first_stage}
