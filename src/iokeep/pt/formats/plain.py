# SPDX-License-Identifier: Apache-2.0
"""The formats once more, item by item in plain words, for the reference implementation only.

Written from the specifications, not from the masks of the formats beside it, so that one checks the other:
Intel VT-d Architecture Specification rev. 4.1, sections 9.7 and 9.8; Intel SDM volume 3, section 4.5; AMD
IOMMU specification (48882), section 2.2.3; RISC-V Privileged Architecture, Sv39 to Sv57, Svnapot, Svpbmt; for
s390 arch/s390/include/asm/pci_dma.h.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Entry:
    """One item as hardware reads it. ``reserved``: a bit that must be zero is set. ``attrs``: a memory
    attribute is set.

    ``lg2``: log2 of the leaf where it is larger than its item; ``pa`` is that of the whole. ``below``: the
    level that a table item leads to, where it says so. ``memory``: all other bits that count, as they are.
    """

    leaf: bool
    pa: int
    read: bool
    write: bool
    reserved: bool
    attrs: bool
    lg2: int | None = None
    below: int | None = None
    memory: int = 0


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
    c_bit = config.get("c_bit", 0)
    plain = bool(c_bit) and not _bit(item, c_bit)
    if c_bit:
        item &= ~(1 << c_bit)
    above = haw < 52 and _field(item, 51, haw) != 0
    if leaf:
        pat = _bit(item, 7) if level == 0 else _bit(item, 12)
        below = size > 13 and _field(item, size - 1, 13) != 0
        attrs = cache or pat or _bit(item, 8) or execute_disable or plain
        pa = _field(item, haw - 1, size) << size
        return Entry(True, pa, user, user and writable, above or below, attrs)
    ps = _bit(item, 7) and not can_be_leaf
    pa = _field(item, haw - 1, 12) << 12
    return Entry(False, pa, user, user and writable, above or ps, cache or execute_disable or plain)


def amd_v1(item: int, level: int, config: dict[str, int]) -> Entry | None:
    """An AMD host PTE or PDE of level 0 ("mode 1") ... 5; None = not present."""
    haw, size, following = config["output_bits"], 12 + 9 * level, _field(item, 11, 9)
    if not _bit(item, 0):
        return None
    read, write = _bit(item, 61), _bit(item, 62)
    encrypted = _bit(item, config["c_bit"]) if config["c_bit"] else False
    address = _field(item, 51, 12) << 12
    if config["c_bit"]:
        address &= ~(1 << config["c_bit"])
    above = address >> haw != 0
    unencrypted = bool(config["c_bit"]) and not encrypted
    if level == 0 or (level < 5 and following in (0, 7)):
        reserved = _field(item, 58, 52) != 0 or above or 1 <= following <= 6
        lg2 = None
        if following == 7:
            zero = 12
            while _bit(address, zero):
                zero += 1
            lg2 = zero + 1
            if not size < lg2 <= min(size + 8, config["c_bit"] or 51):
                lg2, reserved = None, True
        elif address % (1 << size):
            reserved = True
        pa = address >> (lg2 or size) << (lg2 or size)
        attrs = _bit(item, 59) or _bit(item, 60) != bool(config["force_coherence"]) or unencrypted
        memory = _field(item, 60, 59) << 1 | encrypted
        return Entry(True, pa, read, write, reserved, attrs, lg2, None, memory)
    reserved = _field(item, 60, 52) != 0 or above or not 1 <= following <= level
    return Entry(False, address, read, write, reserved, unencrypted, None, following - 1)


def risc_v(item: int, level: int, config: dict[str, int]) -> Entry | None:
    """A RISC-V PTE of level 0 ... 4, of either stage, for a user's DMA; None = not valid."""
    size = 12 + 9 * level
    if not _bit(item, 0):
        return None
    r, w, x, user = (_bit(item, n) for n in (1, 2, 3, 4))
    accessed, dirty = _bit(item, 6), _bit(item, 7)
    pa, kind, napot = _field(item, 53, 10) << 12, _field(item, 62, 61), _bit(item, 63)
    reserved = _field(item, 60, 54) != 0 or pa >> config["output_bits"] != 0
    if not (r or w or x or level == 0):
        reserved = reserved or user or accessed or dirty or kind != 0 or napot
        return Entry(False, pa, True, True, reserved, _bit(item, 5))
    if (w and not r) or not (r or w or x):
        reserved = True
    if kind == 3 or (kind and not config["svpbmt"]):
        reserved = True
    lg2 = None
    if napot:
        if level == 0 and config["svnapot"] and _field(item, 13, 10) == 0b1000:
            lg2, pa = 16, pa >> 16 << 16
        else:
            reserved = True
    elif pa % (1 << size):
        reserved = True
    if not config["hardware_ad"]:
        r, w = r and accessed, w and accessed and dirty
    attrs, memory = _bit(item, 5) or kind != 0, kind << 8 | _field(item, 5, 4) << 4 | _field(item, 2, 1)
    if not config["hardware_ad"]:
        memory |= _field(item, 7, 6) << 6
    return Entry(True, pa, r and user, r and w and user, reserved, attrs, lg2, None, memory)


def s390(item: int, level: int, config: dict[str, int]) -> Entry | None:
    """An s390 zPCI page table entry (level 0), segment (1), region third, second, first (2 ... 4) table
    entry; None = invalid.
    """
    write = not _bit(item, 9)
    if level == 0:
        if _bit(item, 10):
            return None
        unknown = _field(item, 8, 0) | _bit(item, 11) << 11
        return Entry(True, item >> 12 << 12, True, write, False, unknown != 0, None, None, unknown)
    if _bit(item, 5):
        return None
    reserved = _field(item, 3, 2) != level - 1
    other = _bit(item, 4) or _field(item, 8, 6) != 0 or _bit(item, 10)
    if level == 1:  # a page table is 2 KiB: bit 11 is address
        attrs = _field(item, 1, 0) != 0 or other
        return Entry(False, item >> 11 << 11, True, write, reserved, attrs)
    attrs = _field(item, 1, 0) != 3 or other or _bit(item, 11)
    return Entry(False, item >> 12 << 12, True, write, reserved, attrs)


#: format name -> decoder of one item, as it lies in memory
DECODERS = {
    "vtdss": second_stage,
    "x86_64": first_stage,
    "amdv1": amd_v1,
    "riscv64": risc_v,
    "s390_zpci": s390,
}
