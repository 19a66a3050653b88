# SPDX-License-Identifier: Apache-2.0
"""What the stages of VMSAv8-64 share: geometry, where the OA lies, block sizes, the contiguous hint.

Sources: Arm Architecture Reference Manual for A-profile (DDI 0487), chapter D8 "The AArch64 Virtual Memory
System Architecture", its pseudocode (AArch64.S1StartLevel, AArch64.S2StartLevel, AArch64.S2InconsistentSL,
AArch64.DecodeDescriptorType, AArch64.BlockDescSupported, StageOA, ContiguousSize) and rules R_DXBSH, R_SRKBC
as drivers/iommu/io-pgtable-arm.c quotes them (``arm_lpae_concat_mandatory()``); what Linux writes:
drivers/iommu/io-pgtable-arm.c.

Levels: Arm counts from the root, -1 ... 3; here level 0 holds the smallest leaves, so Arm's
level is 3 - level.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from iokeep.errors import InputError
from iokeep.pt.formats.base import Bits, Contig, LevelSpec, Pairs
from iokeep.pt.formats.config import integers

#: granule -> log2 of it
GRANULES = {4096: 12, 16384: 14, 65536: 16}
#: TCR.IPS, VTCR.PS, SMMU_IDR5.OAS: the output sizes that hardware has
OUTPUT_BITS = (32, 36, 40, 42, 44, 48, 52)
#: stage 2 may concatenate so many tables at its start level (D8, "Concatenated translation tables")
MAX_CONCATENATED_LG2 = 4

#: enum io_pgtable_quirks (include/linux/io-pgtable.h) as ``quirks`` of a capture states them
QUIRK_NS, QUIRK_NO_PERMS, QUIRK_MTK_EXT, QUIRK_MTK_TTBR_EXT = 1 << 0, 1 << 1, 1 << 3, 1 << 4
QUIRK_TTBR1, QUIRK_OUTER_WBWA, QUIRK_HD = 1 << 5, 1 << 6, 1 << 7
QUIRK_S2FWB, QUIRK_NO_WARN = 1 << 8, 1 << 9


def bits(high: int, low: int) -> int:
    """Mask of the bits high ... low; none where high < low."""
    return (1 << (high + 1)) - (1 << low) if high >= low else 0


#: the fields that both stages have in the same place
VALID, NOT_BLOCK = 1 << 0, 1 << 1
SH, AF = bits(9, 8), 1 << 10
NT, DBM, CONTIGUOUS = 1 << 16, 1 << 51, 1 << 52
#: hw_access: hardware sets AF, or does not look at it (CD.HA, STE.S2HA; CD.AFFD, STE.S2AFFD = 1); hw_dirty:
#: hardware manages the dirty state (CD.HD, STE.S2HD), which is so with HA = 1 only. DDI 0487, chapter D8,
#: "Hardware management of the Access flag" and "... of the dirty state".
HARDWARE = {"hw_access": (0, (0, 1)), "hw_dirty": (0, (0, 1))}
SOFTWARE, PBHA = bits(58, 55), bits(62, 59)
#: software bit of a table item: Linux has made it visible to hardware (ARM_LPAE_PTE_SW_SYNC)
SYNCED = 1 << 55
LEAF_NAMES = (("accessed", AF), ("dbm", DBM), ("software", SOFTWARE), ("pbha", PBHA))


@dataclass(frozen=True, slots=True)
class Geometry:
    """A translation table in one configuration, all derived from TxSZ, TG, PS, SL0 and DS.

    :param page: log2 of the granule. :param root_bits: IOVA bits that index the root.
    :param levels: number of levels. :param lpa2: DS = 1, 52-bit descriptors with 4K or 16K granule.
    """

    page: int
    input_bits: int
    output_bits: int
    levels: int
    root_bits: int
    lpa2: bool

    @property
    def stride(self) -> int:
        """IOVA bits that index a whole table of 8-byte items."""
        return self.page - 3

    @property
    def start_level(self) -> int:
        """The root's level as Arm counts."""
        return 4 - self.levels

    def shift(self, level: int) -> int:
        """Log2 of the bytes that one item of ``level`` maps."""
        return self.page + level * self.stride

    def index_bits(self, level: int) -> int:
        """IOVA bits that index a table of ``level``."""
        return self.root_bits if level == self.levels - 1 else self.stride

    def may_leaf(self, level: int) -> bool:
        """Whether an item of ``level`` may be a page or block (AArch64.BlockDescSupported)."""
        arm = 3 - level
        if arm >= 2:
            return True
        if self.page == 12:
            return arm == 1 or (arm == 0 and self.lpa2)
        return arm == 1 and (self.lpa2 if self.page == 14 else self.output_bits == 52)

    def contiguous_lg2(self, level: int) -> int:
        """Log2 of how many items the contiguous hint joins (ContiguousSize); 0 = it has no meaning there."""
        arm = 3 - level
        if self.page == 12:
            return 4 if arm >= 1 else 0
        if self.page == 14:
            return {3: 7, 2: 5}.get(arm, 0)
        return 5 if arm >= 2 else 0

    @property
    def pieces(self) -> tuple[tuple[int, int], ...]:
        """Pieces of a pa that do not lie in place: (mask in the item, left shift to the pa).

        PA[51:48] in 15:12 with the 64K granule and 52-bit output; PA[51:50] in 9:8 with LPA2.
        """
        if self.output_bits <= 48:
            return ()
        if self.page == 16:
            return ((bits(self.output_bits - 49 + 12, 12), 36),)
        return ((bits(9, 8), 42),) if self.output_bits > 50 else ()

    def pa_mask(self, low: int) -> int:
        """The bits of an item that are pa bits in place, from bit ``low`` on."""
        return bits(min(self.output_bits, 50 if self.lpa2 else 48) - 1, low)

    def reserved(self, low: int) -> int:
        """The address bits of an item that must be zero: beyond the output size, and below the OA.

        Beyond it they are an address size fault (AArch64.OAOutOfRange), below it RES0.

        :param low: lowest bit of the OA, or of the next table's pa.
        """
        moved = 0
        for mask, _ in self.pieces:
            moved |= mask
        fields = bits(49, 12) | (SH if self.lpa2 else 0)
        return fields & ~self.pa_mask(low) & ~moved

    def level(
        self,
        number: int,
        *,
        memory: int,
        wanted: int,
        wrong: int,
        table_memory: int,
        table_ignored: int,
        base: int,
        read: tuple[int, int],
        write: Pairs,
        table_write: tuple[int, int],
        prot: tuple[int, int, int, int],
        fields: Bits,
        table_fields: Bits,
    ) -> LevelSpec:
        """One level; what differs between the stages is given.

        :param memory: memory attributes of a leaf, of any value. :param wanted: attributes that must be 0.
        :param wrong: reserved bits of a leaf. :param table_memory: attributes of a table item that must be 0.
        :param table_ignored: bits of it that do not count. :param base: what Linux sets in every leaf.
        :param read: (mask, value) of a leaf. :param write: likewise, any of them, the first as software
        does it. :param table_write: of a table item.
        :param fields: names of a leaf's memory attributes. :param table_fields: names in a table item.
        """
        shift, may_leaf = self.shift(number), self.may_leaf(number)
        page = number == 0
        joined = self.contiguous_lg2(number)
        if joined > self.index_bits(number):
            joined = 0  # larger than the table: AArch64.ContiguousBitFaults
        not_sh = ~SH if self.lpa2 else -1  # with DS = 1 SH is TCR's, and 9:8 are address
        nt = 0 if page else NT
        write_mask = 0
        for mask, _ in write:
            write_mask |= mask
        return LevelSpec(
            shift=shift,
            index_bits=self.index_bits(number),
            leaf=may_leaf,
            table=not page,
            valid_mask=VALID,
            # AArch64.DecodeDescriptorType: 0b01 is a block where blocks are, 0b11 a page at level 3.
            leaf_mask=0 if page or not may_leaf else NOT_BLOCK,
            leaf_value=0,
            leaf_bad=((NOT_BLOCK, 0),) if page else (),
            table_bad=() if page or may_leaf else ((NOT_BLOCK, 0),),
            table_pa_mask=0 if page else self.pa_mask(self.page),
            leaf_pa_mask=self.pa_mask(shift) if may_leaf else 0,
            pa_pieces=self.pieces,
            r_mask=read[0],
            r_value=read[1],
            w_mask=write_mask,
            w_value=write[0][1],
            w_values=write if len(write) > 1 else (),
            tr_mask=0,
            tr_value=0,
            tw_mask=0 if page else table_write[0],
            tw_value=table_write[1],
            leaf_reserved=(self.reserved(shift) & ~nt) | wrong | (0 if joined else CONTIGUOUS),
            table_reserved=0
            if page
            else self.reserved(self.page)
            | 1 << 50
            | (bits(63, 59) & ~(table_memory | table_ignored | table_write[0])),
            leaf_ignored=(memory & not_sh)
            | (AF & ~read[0])
            | (DBM & ~write_mask)
            | SOFTWARE
            | PBHA
            | 1 << 63,
            table_ignored=0 if page else (bits(11, 2) & not_sh) | bits(58, 51) | table_ignored,
            leaf_base=(base & not_sh) | VALID | (NOT_BLOCK if page else 0),
            table_base=0 if page else VALID | NOT_BLOCK,
            prot_bits=prot,
            leaf_attrs=wanted | nt,
            leaf_attrs_value=0,
            table_attrs=0 if page else table_memory,
            contig=(Contig(CONTIGUOUS, CONTIGUOUS, joined, replicated=False),) if joined else (),
            # With DS = 1 bits 9:8 are address.
            memory=tuple((n, m) for n, m in fields if m & not_sh) if may_leaf else (),
            named=LEAF_NAMES
            + ((("nt", nt),) if nt else ())
            + ((("contiguous", CONTIGUOUS),) if joined else ()),
            table_named=() if page else (("synced", SYNCED), *table_fields),
            keep_bit=nt,
            # Linux does not set the hint (io-pgtable-arm.c, arm_lpae_prot_to_pte()).
            build_lg2s=(shift,) if may_leaf else None,
        )


def quirks_of(name: str, config: Mapping[str, object], allowed: int) -> int:
    """``quirks`` of a configuration: a number, or a string like "0x20".

    :raises InputError: it is no number, or has a bit beyond ``allowed``.
    """
    value = config.get("quirks", 0)
    if isinstance(value, str):
        try:
            value = int(value, 0)
        except ValueError:
            value = -1
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InputError(f"format {name}: configuration quirks = {str(config['quirks'])[:64]!r} is no number")
    if value & ~allowed:
        raise InputError(
            f"format {name}: quirks {value & ~allowed:#x} change the table in a way that is not built",
            "quirks are bits of enum io_pgtable_quirks (include/linux/io-pgtable.h)",
        )
    return value


def read_config(
    name: str, config: Mapping[str, object], extra: Mapping[str, tuple[int, tuple[int, ...]]], *, stage: int
) -> tuple[dict[str, int], Geometry]:
    """The complete configuration and its geometry.

    ``granule``, ``input_bits`` (64 - TxSZ), ``output_bits`` (PS), ``lpa2`` (DS), ``start_level`` (SL0, Arm's
    count) and ``root_entries``; the last two follow from the others where they are not given, and must agree
    with them where they are.

    :param extra: what else this format reads, as for :func:`integers`.
    :raises InputError: a configuration that hardware does not have.
    """
    allowed: dict[str, tuple[int, tuple[int, ...]]] = {
        "granule": (4096, tuple(GRANULES)),
        "input_bits": (48, tuple(range(16, 53))),
        "output_bits": (48, OUTPUT_BITS),
        # These two are computed where they are not given.
        "start_level": (0, tuple(range(-1, 4))),
        "root_entries": (2, tuple(1 << n for n in range(1, 18))),
        **extra,
    }
    large = config.get("granule") != 65536 and (
        config.get("output_bits") == 52 or config.get("input_bits") in range(49, 53)
    )
    allowed["lpa2"] = (int(large), (0, 1))
    given = {key: value for key, value in config.items() if key != "quirks"}
    if given.get("hw_dirty") == 1:
        given = {"hw_access": 1, **given}
    full = integers(name, given, allowed)
    if full.get("hw_dirty") and not full["hw_access"]:
        raise _no(name, "hw_dirty without hw_access", "TCR.HD, VTCR.HD have an effect with HA = 1 only")
    page, size, output = GRANULES[full["granule"]], full["input_bits"], full["output_bits"]
    if full["lpa2"] and page == 16:
        raise _no(name, "lpa2 with the 64K granule", "TCR.DS has a meaning for 4K and 16K only")
    if not full["lpa2"] and page < 16 and (size > 48 or output > 48):
        raise _no(name, "more than 48 bits without lpa2", "4K and 16K reach 52 bits with DS = 1")
    if size < (17 if page == 16 else 16):
        raise _no(name, f"{size} input bits", "TxSZ is at most 48, with the 64K granule 47")
    stride = page - 3
    levels = -(-(size - page) // stride)
    if stage == 2:
        levels = _stage2_levels(name, full, levels, given)
    start = 4 - levels
    if "start_level" in given and full["start_level"] != start:
        raise _no(name, f"start_level {full['start_level']}", f"these sizes start at level {start}")
    root_bits = size - page - stride * (levels - 1)
    if "root_entries" in given and full["root_entries"] != 1 << root_bits:
        raise _no(name, f"root_entries {full['root_entries']}", f"these sizes have {1 << root_bits}")
    full["start_level"], full["root_entries"] = start, 1 << root_bits
    return full, Geometry(page, size, output, levels, root_bits, bool(full["lpa2"]))


def _no(name: str, what: str, rule: str) -> InputError:
    return InputError(f"format {name}: {what} is not a configuration that hardware has", rule)


def _stage2_levels(name: str, full: Mapping[str, int], natural: int, given: Mapping[str, object]) -> int:
    """Levels of a stage-2 walk: SL0 says where it starts, within what AArch64.S2InconsistentSL allows."""
    page, size, output = GRANULES[full["granule"]], full["input_bits"], full["output_bits"]
    stride = page - 3
    if "start_level" in given:
        levels = 4 - full["start_level"]
    elif "root_entries" in given:
        root_bits = full["root_entries"].bit_length() - 1
        levels = (size - page - root_bits) // stride + 1
    else:
        # R_DXBSH, R_SRKBC: where concatenation is not a choice
        start = 4 - natural
        must = (
            (page == 14 and start == 0 and 48 in (size, output))
            or (page == 12 and start == 0 and output in (40, 42))
            or (page == 14 and start == 1 and output == 40)
        )
        levels = natural - must
        if size - page - stride * (levels - 1) > stride + MAX_CONCATENATED_LG2:
            levels = natural
    resolved = size - page - stride * (levels - 1)
    if not 1 <= levels <= 5 or not 1 <= resolved <= stride + MAX_CONCATENATED_LG2:
        raise _no(
            name,
            f"start_level {4 - levels} for {size} input bits",
            "the start level resolves at least 1 bit and at most 4 more than a table",
        )
    return levels
