# SPDX-License-Identifier: Apache-2.0
"""The Arm formats item by item in plain words, for the reference implementation and the tests only.

Written from the specifications, not from the masks of the formats beside it, so that one checks the other:
Arm Architecture Reference Manual (DDI 0487), chapter D8 "The AArch64 Virtual Memory System Architecture" with
the pseudocode AArch64.DecodeDescriptorType, AArch64.BlockDescSupported, StageOA and ContiguousSize; Arm
Architecture Reference Manual ARMv7-A (DDI 0406C), B3.5 "Short-descriptor translation table format"; for Mali,
drivers/iommu/io-pgtable-arm.c (ARM_MALI_LPAE), there is no public specification.

Levels are the engine's here: 0 = smallest leaves; Arm's level is 3 - level (VMSAv8) or 2 - level (short).
"""

from __future__ import annotations

from collections.abc import Mapping

from iokeep.pt.formats.plain import Entry


def _bit(item: int, number: int) -> bool:
    return bool(item >> number & 1)


def _field(item: int, high: int, low: int) -> int:
    return item >> low & ((1 << (high - low + 1)) - 1) if high >= low else 0


def _number(config: Mapping[str, object], key: str, default: int = 0) -> int:
    value = config.get(key, default)
    return int(value, 0) if isinstance(value, str) else int(value)  # type: ignore[call-overload]


def _size(level: int, granule: int) -> int:
    """Log2 of the bytes that an item of this level maps: each level resolves log2(granule) - 3 bits."""
    page = {4096: 12, 16384: 14, 65536: 16}[granule]
    return page + level * (page - 3)


def _block_allowed(level: int, granule: int, output_bits: int, lpa2: bool) -> bool:
    """AArch64.BlockDescSupported, by Arm's level."""
    arm = 3 - level
    if granule == 4096:
        return arm in (1, 2) or (arm == 0 and lpa2)
    if granule == 16384:
        return arm == 2 or (arm == 1 and lpa2)
    return arm == 2 or (arm == 1 and output_bits == 52)


def contiguous_items(level: int, granule: int) -> int:
    """ContiguousSize: how many items the contiguous bit joins at this level; 1 = the bit is reserved."""
    table = {
        (4096, 3): 16, (4096, 2): 16, (4096, 1): 16,
        (16384, 3): 128, (16384, 2): 32,
        (65536, 3): 32, (65536, 2): 32,
    }  # fmt: skip
    return table.get((granule, 3 - level), 1)


def _lpae(item: int, level: int, config: Mapping[str, object]) -> tuple[bool, int, bool] | None:
    """(leaf, pa, reserved bits are set) of a VMSAv8-64 item of either stage; None = invalid."""
    granule, out = _number(config, "granule", 4096), _number(config, "output_bits", 48)
    # DS only exists for 4K and 16K; it is what makes more than 48 bits possible there.
    lpa2 = granule != 65536 and bool(_number(config, "lpa2"))
    if not _bit(item, 0):
        return None
    page = {4096: 12, 16384: 14, 65536: 16}[granule]
    leaf = level == 0 or not _bit(item, 1)
    reserved = False
    if level == 0 and not _bit(item, 1):
        reserved = True  # the fourth type of level 3 is reserved
    if level > 0 and leaf and not _block_allowed(level, granule, out, lpa2):
        reserved = True
    low = _size(level, granule) if leaf else page
    # The pa: in place up to bit 47 (LPA2: 49), the rest in pieces.
    if lpa2:
        pa = _field(item, 49, low) << low | _field(item, 9, 8) << 50
        below_from = 12
        reserved |= _bit(item, 50) if not leaf else False
    elif granule == 65536:
        pa = _field(item, 47, low) << low | _field(item, 15, 12) << 48
        below_from = 16
        reserved |= _field(item, 49, 48) != 0 or (not leaf and _bit(item, 50))
    else:
        pa = _field(item, 47, low) << low
        below_from = 12
        reserved |= _field(item, 49, 48) != 0 or (not leaf and _bit(item, 50))
    if pa >> out:
        reserved = True  # address size fault
    # RES0 between the attributes and the OA, but for nT (bit 16) in a block
    between = _field(item, low - 1, below_from) << below_from
    if leaf and level > 0:
        between &= ~(1 << 16)
    if between:
        reserved = True
    if leaf and _bit(item, 52):
        items = contiguous_items(level, granule)
        if items == 1 or items << _size(level, granule) > 1 << _number(config, "input_bits", 48):
            reserved = True  # AArch64.ContiguousBitFaults
    pa &= (1 << out) - 1
    return leaf, pa, reserved


def stage1(item: int, level: int, config: Mapping[str, object]) -> Entry | None:
    """A stage-1 item; permissions are those of a privileged or unprivileged read and write alike."""
    found = _lpae(item, level, config)
    if found is None:
        return None
    leaf, pa, reserved = found
    if not leaf:
        read_only = _bit(item, 62)  # APTable[1]
        # APTable[0], UXNTable, PXNTable
        attrs = _bit(item, 61) or _bit(item, 60) or _bit(item, 59)
        return Entry(False, pa, True, not read_only, reserved, attrs)
    accessed = _bit(item, 10) or bool(_number(config, "hw_access"))
    # AP[2]; with hardware's dirty state DBM = 1 is writable-clean
    writable = not _bit(item, 7) or (bool(_number(config, "hw_dirty")) and _bit(item, 51))
    special = _bit(item, 50) or (level > 0 and _bit(item, 16))  # GP, nT
    return Entry(True, pa, accessed, accessed and writable, reserved, special)


def stage2(item: int, level: int, config: Mapping[str, object]) -> Entry | None:
    """A stage-2 item."""
    found = _lpae(item, level, config)
    if found is None:
        return None
    leaf, pa, reserved = found
    if not leaf:
        # There are no hierarchical permissions at stage 2: bits 63:59 are RES0.
        return Entry(False, pa, True, True, reserved or _field(item, 63, 59) != 0, False)
    accessed = _bit(item, 10) or bool(_number(config, "hw_access"))
    writable = _bit(item, 7) or (bool(_number(config, "hw_dirty")) and _bit(item, 51))
    reserved |= _bit(item, 50)
    special = _bit(item, 11) or (level > 0 and _bit(item, 16))  # FnXS, nT
    return Entry(True, pa, accessed and _bit(item, 6), accessed and writable, reserved, special)


def mali(item: int, level: int, config: Mapping[str, object]) -> Entry | None:
    """A Mali item: 4K granule, a leaf is type 1 at every level, a table type 3; permissions as at stage 2.

    Known in a leaf: 1:0 type, 4:2 memory attribute, 6 read, 7 write, 9:8 shareability, 10 access, 54:53
    never execute. In a table: type, and bit 55, Linux's own. Everything else is unknown and must be zero.
    """
    kind, size, out = _field(item, 1, 0), 12 + 9 * level, _number(config, "output_bits", 40)
    if not kind & 1:
        return None
    above = _field(item, 52, out) != 0
    if kind == 1:
        below = _field(item, size - 1, 12) != 0
        unknown = _bit(item, 5) or _bit(item, 11) or _field(item, 63, 55) != 0
        pa = _field(item, out - 1, size) << size
        return Entry(True, pa, _bit(item, 6), _bit(item, 7), above or below or unknown or level > 2, False)
    unknown = _field(item, 11, 2) != 0 or _field(item, 63, 53) & ~4 != 0
    return Entry(
        level == 0, _field(item, out - 1, 12) << 12, True, True, above or unknown or level == 0, False
    )


def short(item: int, level: int, config: Mapping[str, object]) -> Entry | None:
    """A short-descriptor item: level 1 = first-level table (1M each), level 0 = second-level table (4K each).

    A supersection or large page is 16 equal items; each is read as what it maps at its own index, so ``pa``
    has the bits above 16M or 64K only, and the rest comes from the IOVA.
    """
    kind = _field(item, 1, 0)
    if kind == 0:
        return None
    quirks = _number(config, "quirks")
    checked = not quirks >> 1 & 1  # IO_PGTABLE_QUIRK_NO_PERMS
    if level == 1 and kind == 1:
        # bit 2 PXN or SBZ, 4 SBZ, 8:5 domain, 9 implementation defined
        attrs = _bit(item, 2) or _field(item, 8, 5) != 0 or _bit(item, 9)
        return Entry(False, _field(item, 31, 10) << 10, True, True, _bit(item, 4), attrs)
    if level == 1:
        ap0, ap2 = _bit(item, 10), _bit(item, 15)
        attrs = kind == 3 or _bit(item, 9)  # PXN (or reserved), implementation defined
        if _bit(item, 18):
            # PA[39:32] in 23:20 and 8:5 need 40-bit output
            far = _field(item, 23, 20) != 0 or _field(item, 8, 5) != 0
            pa, reserved = _field(item, 31, 24) << 24, far
        else:
            pa, reserved = _field(item, 31, 20) << 20, False
            attrs = attrs or _field(item, 8, 5) != 0  # domain
    else:
        ap0, ap2, attrs, reserved = _bit(item, 4), _bit(item, 9), False, False
        if kind == 1:
            pa, reserved = _field(item, 31, 16) << 16, _field(item, 8, 6) != 0
        else:
            pa = _field(item, 31, 12) << 12
    read = ap0 or not checked  # AP[0] is the access flag
    return Entry(True, pa, read, read and (not ap2 or not checked), reserved, attrs)


#: format name -> decoder of one item
DECODERS = {"arm_lpae_s1": stage1, "arm_lpae_s2": stage2, "arm_mali_lpae": mali, "arm_v7s": short}
