# SPDX-License-Identifier: Apache-2.0
"""SMMUv3: the way from the stream table base register to a page table; commands and event records.

Source: Arm System Memory Management Unit Architecture Specification, SMMU architecture version 3 (IHI 0070,
"the specification" below): stream table (5.2 for its entry), context descriptors, registers, commands
(chapter 4), event records (7.3). Checked against Linux drivers/iommu/arm/arm-smmu-v3/arm-smmu-v3.h (field
positions), QEMU hw/arm/smmuv3.c (what makes an entry bad), and captures of running kernels (the values that
Linux writes).

Entries are plain ints, one per 64-bit word, lowest word first. Little-endian AArch64 tables of the
Non-secure world; AArch32, 128-bit descriptors, and 52-bit addresses with 4K and 16K granules are refused.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from iokeep.mem.memory import Memory
from iokeep.pt.roots import base
from iokeep.pt.roots.base import Path, TableRoot, bits, number_field, pa_field, read_step, refuse

# -- registers ------------------------------------------------------------------------
STRTAB_BASE_RA = 1 << 62
STRTAB_ADDR = bits(51, 6)
CFG_LOG2SIZE = bits(5, 0)
CFG_SPLIT_SHIFT = 6
CFG_FMT_SHIFT = 16
FMT_LINEAR, FMT_2LVL = 0, 1
SPLITS = (6, 8, 10)
CR0_SMMUEN = 1 << 0
CR2_E2H = 1 << 0
IDR1_SIDSIZE = bits(5, 0)
IDR1_SSIDSIZE_SHIFT = 6
IDR3_STT = 1 << 9
IDR5_OAS = bits(2, 0)
IDR5_VAX_SHIFT = 10
#: address size codes of IPS, S2PS and IDR5.OAS; 7 (56 bits) needs 128-bit descriptors
ADDRESS_BITS = {0: 32, 1: 36, 2: 40, 3: 42, 4: 44, 5: 48, 6: 52}
_PS_OF_BITS = {size: code for code, size in ADDRESS_BITS.items()}

# -- level 1 stream table descriptor ------------------------------------------------------------
L1_SPAN = bits(4, 0)
L1_L2PTR = bits(51, 6)

# -- stream table entry, specification 5.2: 8 words ----------------------------------------------------
STE_WORDS = 8
STE_BYTES = 64
STE_V = 1 << 0
CONFIG_SHIFT = 1
CONFIG_ABORT, CONFIG_BYPASS, CONFIG_S1, CONFIG_S2, CONFIG_NESTED = 0, 4, 5, 6, 7
S1FMT_SHIFT = 4
S1FMT_LINEAR, S1FMT_4K_L2, S1FMT_64K_L2 = 0, 1, 2
#: context descriptors in a second-level table, as a power of two
_SSID_L2_BITS = {S1FMT_4K_L2: 6, S1FMT_64K_L2: 10}
S1CONTEXTPTR = bits(51, 6)
S1CDMAX_SHIFT = 59
S1DSS = 3
S1DSS_TERMINATE, S1DSS_BYPASS, S1DSS_SSID0 = 0, 1, 2
STRW_SHIFT = 30
STRW_NSEL1, STRW_EL2 = 0, 2
S2FWB, S1STALLD = 1 << 25, 1 << 27
EATS_SHIFT = 28
SHCFG_INCOMING = 1 << 44
S2VMID = bits(15, 0)
# stage-2 fields of word 2: positions in the word
S2T0SZ_SHIFT, S2SL0_SHIFT, S2IR0_SHIFT, S2OR0_SHIFT, S2SH0_SHIFT = 32, 38, 40, 42, 44
S2TG_SHIFT, S2PS_SHIFT = 46, 48
S2AA64, S2ENDI, S2AFFD, S2PTW = 1 << 51, 1 << 52, 1 << 53, 1 << 54
S2HD, S2HA, S2S, S2R = 1 << 55, 1 << 56, 1 << 57, 1 << 58
S2TTB = bits(51, 4)

# -- context descriptors -------------------------------------------------------------------
L1CD_V = 1 << 0
L1CD_L2PTR = bits(51, 12)
CD_WORDS = 8
CD_BYTES = 64
CD_V = 1 << 31
CD_ENDI = 1 << 15
CD_AA64 = 1 << 41
CD_AFFD, CD_HD, CD_HA, CD_S = 1 << 35, 1 << 42, 1 << 43, 1 << 44
CD_R, CD_A, CD_ASET = 1 << 45, 1 << 46, 1 << 47
CD_IPS_SHIFT, CD_ASID_SHIFT = 32, 48
CD_TTB = bits(51, 4)
#: the fields of TTB1 lie 16 bits above those of TTB0
CD_TTB1_SHIFT = 16
TSZ, TG_SHIFT, IR_SHIFT, OR_SHIFT, SH_SHIFT, EPD_SHIFT = bits(5, 0), 6, 8, 10, 12, 14
#: granules by TG0 and S2TG, and by TG1: the codes differ
GRANULE_OF_TG0 = {0: 4096, 1: 65536, 2: 16384}
GRANULE_OF_TG1 = {2: 4096, 3: 65536, 1: 16384}
_TG0_OF = {granule: code for code, granule in GRANULE_OF_TG0.items()}
_TG1_OF = {granule: code for code, granule in GRANULE_OF_TG1.items()}
#: start level by S2SL0; another meaning for each granule (3: only with small tables, not read)
START_OF_SL0 = {4096: {0: 2, 1: 1, 2: 0}, 16384: {0: 3, 1: 2, 2: 1}, 65536: {0: 3, 1: 2, 2: 1}}
MAX_CONCATENATED = 16
_WBWA, _ISH = 1, 3  # cacheability and shareability, as Linux writes them
#: MAIR that Linux programs: 0x44 non-cacheable, 0xff write-back, 0x04 device, 0xf4 ... (io-pgtable-arm.c)
LINUX_MAIR = 0xFFFFFFFFF404FF44


class FaultReason(base.FaultCode):
    """Events by their number (QEMU hw/arm/smmuv3-internal.h)."""

    #: ours, above the 8 bits of an event's number
    ABORTED = 0x200, "the stream is configured to be aborted, which records no event"
    C_BAD_STREAMID = 0x02, "the stream id is beyond the stream table"
    F_STE_FETCH = 0x03, "a stream table entry is not in memory"
    C_BAD_STE = 0x04, "the stream table entry is programmed wrongly"
    F_STREAM_DISABLED = 0x06, "requests without, or with this, substream id are disabled"
    C_BAD_SUBSTREAMID = 0x08, "the substream id is beyond the context descriptors"
    F_CD_FETCH = 0x09, "a context descriptor is not in memory"
    C_BAD_CD = 0x0A, "the context descriptor is programmed wrongly"
    F_WALK_EABT = 0x0B, "a table of the walk is not in memory"
    F_TRANSLATION = 0x10, "the request has no translation"
    F_ADDR_SIZE = 0x11, "an address is beyond the output size"
    F_ACCESS = 0x12, "the access flag of the leaf is 0"
    F_PERMISSION = 0x13, "the leaf does not permit the request"


class RootFault(base.RootFault):
    """No page table; ``reason`` is a :class:`FaultReason`."""

    kind = "smmu-root"
    record = "SMMUv3 event"


class Aborted(RootFault):
    """The stream is configured to be aborted."""


@dataclass(frozen=True, slots=True)
class Registers:
    """The registers that the way depends on; None where one is not known."""

    strtab_base: int
    strtab_base_cfg: int
    cr0: int = CR0_SMMUEN
    cr2: int | None = None
    idr1: int | None = None
    idr3: int | None = None
    idr5: int | None = None

    @property
    def output_bits(self) -> int:
        """OAS in bits; 52 where it is not known."""
        return 52 if self.idr5 is None else ADDRESS_BITS.get(self.idr5 & IDR5_OAS, 52)

    @property
    def split(self) -> int | None:
        """SPLIT of a two-level stream table, None: linear. :raises RootFault: a reserved FMT or SPLIT."""
        form = self.strtab_base_cfg >> CFG_FMT_SHIFT & 3
        if form == FMT_LINEAR:
            return None
        split = self.strtab_base_cfg >> CFG_SPLIT_SHIFT & 0x1F
        if form != FMT_2LVL or split not in SPLITS:
            where = f"STRTAB_BASE_CFG {self.strtab_base_cfg:#x}"
            raise RootFault(FaultReason.C_BAD_STREAMID, where, (), "a reserved FMT or SPLIT")
        return split

    @property
    def log2size(self) -> int:
        """Stream ids are below 2**log2size."""
        size = self.strtab_base_cfg & CFG_LOG2SIZE
        return size if self.idr1 is None else min(size, self.idr1 & IDR1_SIDSIZE)


@dataclass(frozen=True, slots=True, kw_only=True)
class RootInfo(base.RootInfo):
    """What the stream table says about one stream.

    ``domain_id`` is the ASID of a first stage, the VMID of a second stage or of "nested".

    :param upper: a first stage with both halves: ``table`` is that of TTB0, this that of TTB1.
    :param mair: attributes that the AttrIndx of first-stage leaves select.
    :param context_ipa: "nested": where the context descriptors are in guest physical memory; not followed.
    """

    asid: int = 0
    vmid: int = 0
    upper: TableRoot | None = None
    mair: int = 0
    context_ipa: int | None = None


# -- finding the table -----------------------------------------------------------------------------------
def find_root(mem: Memory, regs: Registers, sid: int, ssid: int | None = None) -> RootInfo:
    """Follow STRTAB_BASE to the page table that translates requests of stream ``sid``.

    :param ssid: substream id (20 bits); None = a request without.
    :raises RootFault: an entry is absent or programmed wrongly, or requests are aborted (:class:`Aborted`).
    """
    number_field("stream id", sid, 32)
    if not regs.cr0 & CR0_SMMUEN:
        return RootInfo(translation="pass-through", table=None, domain_id=0, pasid=None, path=())
    where = f"STRTAB_BASE {regs.strtab_base:#x}"
    if sid >> regs.log2size:
        why = f"stream id {sid:#x} is beyond the stream table of 2**{regs.log2size} entries"
        raise RootFault(FaultReason.C_BAD_STREAMID, where, (), why)
    split = regs.split
    size = regs.strtab_base_cfg & CFG_LOG2SIZE
    path: Path = ()
    if split is None:
        table, index = _aligned(regs.strtab_base & STRTAB_ADDR, size + 6), sid
    else:
        table = _aligned(regs.strtab_base & STRTAB_ADDR, max(size - split + 3, 6))
        path = _read(mem, "l1std", table + (sid >> split) * 8, 1, (), FaultReason.F_STE_FETCH)
        span = path[-1].words[0] & L1_SPAN
        index = sid & ((1 << split) - 1)
        # A span of n serves 2**(n - 1) entries; 0: none; beyond SPLIT + 1: reserved.
        if not span or span > split + 1 or index >> (span - 1):
            raise refuse(RootFault, FaultReason.C_BAD_STREAMID, path, f"span {span} does not hold {sid:#x}")
        table = _aligned(path[-1].words[0] & L1_L2PTR, span - 1 + 6)
    path = _read(mem, "ste", table + index * STE_BYTES, STE_WORDS, path, FaultReason.F_STE_FETCH)
    return of_stream_entry(mem, regs, path, ssid)


def _aligned(pa: int, lg2: int) -> int:
    # Hardware ignores address bits below the size of the table (QEMU smmu_find_ste()).
    return pa >> lg2 << lg2


def _read(mem: Memory, name: str, pa: int, words: int, path: Path, absent: FaultReason) -> Path:
    return read_step(mem, name, pa, words, path, RootFault, absent)


def of_stream_entry(mem: Memory, regs: Registers, path: Path, ssid: int | None = None) -> RootInfo:
    """Go on from a stream table entry, the last of ``path``."""
    w = path[-1].words
    if not w[0] & STE_V:
        raise refuse(RootFault, FaultReason.C_BAD_STE, path, "not valid")
    config = w[0] >> CONFIG_SHIFT & 7
    if not config & CONFIG_BYPASS:
        raise refuse(Aborted, FaultReason.ABORTED, path)
    if config == CONFIG_BYPASS:
        return RootInfo(translation="pass-through", table=None, domain_id=0, pasid=None, path=path)
    second = _stage2(regs, path) if config & 2 else None
    vmid = w[2] & S2VMID
    if config == CONFIG_S2:
        return RootInfo(
            translation="second-stage", table=second, domain_id=vmid, pasid=None, path=path, vmid=vmid
        )
    ssid = _substream(regs, path, ssid)
    if second is not None:
        return RootInfo(
            translation="nested", table=second, domain_id=vmid, pasid=ssid, path=path,
            vmid=vmid, context_ipa=w[0] & S1CONTEXTPTR,
        )  # fmt: skip
    if ssid is None and w[0] >> S1CDMAX_SHIFT and w[1] & S1DSS == S1DSS_BYPASS:
        return RootInfo(translation="pass-through", table=None, domain_id=0, pasid=None, path=path)
    path = _context(mem, path, ssid or 0)
    return _of_context(regs, path, ssid, w[1] >> STRW_SHIFT & 3)


def first_stage_of(guest: Memory, regs: Registers, info: RootInfo) -> RootInfo | None:
    """The first stage of a "nested" stream; its tables' roots are guest physical. None: requests bypass it.

    :param guest: guest physical memory, where the context descriptors are. :raises RootFault: as
        :func:`find_root`.
    """
    at = next(n for n, step in enumerate(info.path) if step.name == "ste")
    path = info.path[: at + 1]
    w = path[-1].words
    if info.pasid is None and w[0] >> S1CDMAX_SHIFT and w[1] & S1DSS == S1DSS_BYPASS:
        return None
    path = _context(guest, path, info.pasid or 0)
    return _of_context(regs, path, info.pasid, w[1] >> STRW_SHIFT & 3)


def _substream(regs: Registers, path: Path, ssid: int | None) -> int | None:
    """Check the substream id against S1CDMax and S1DSS; None: without. (Specification 5.2)"""
    w = path[-1].words
    width = w[0] >> S1CDMAX_SHIFT
    if width and (width > 20 or (regs.idr1 is not None and width > regs.idr1 >> IDR1_SSIDSIZE_SHIFT & 0x1F)):
        raise refuse(RootFault, FaultReason.C_BAD_STE, path, f"S1CDMax {width} is beyond SSIDSIZE")
    dss = w[1] & S1DSS
    if ssid is None:
        if width and dss not in (S1DSS_BYPASS, S1DSS_SSID0):
            reason = FaultReason.F_STREAM_DISABLED if dss == S1DSS_TERMINATE else FaultReason.C_BAD_STE
            raise refuse(RootFault, reason, path, f"S1DSS {dss}")
        return None
    if ssid < 0 or not width or ssid >> width:
        why = f"substream id {ssid:#x} with S1CDMax {width}"
        raise refuse(RootFault, FaultReason.C_BAD_SUBSTREAMID, path, why)
    if ssid == 0 and dss == S1DSS_SSID0:
        raise refuse(RootFault, FaultReason.F_STREAM_DISABLED, path, "substream id 0 with S1DSS 2")
    return ssid


def _context(mem: Memory, path: Path, ssid: int) -> Path:
    w = path[-1].words
    width = w[0] >> S1CDMAX_SHIFT
    form = w[0] >> S1FMT_SHIFT & 3
    # S1Fmt counts only where there are substreams: without, S1ContextPtr is the descriptor itself.
    if not width or form == S1FMT_LINEAR:
        table, index = _aligned(w[0] & S1CONTEXTPTR, width + 6), ssid
    elif form in _SSID_L2_BITS:
        low = _SSID_L2_BITS[form]
        table = _aligned(w[0] & S1CONTEXTPTR, max(width - low + 3, 6))
        path = _read(mem, "l1cd", table + (ssid >> low) * 8, 1, path, FaultReason.F_CD_FETCH)
        entry = path[-1].words[0]
        if not entry & L1CD_V:
            raise refuse(RootFault, FaultReason.C_BAD_SUBSTREAMID, path, "not valid")
        table, index = _aligned(entry & L1CD_L2PTR, low + 6), ssid & ((1 << low) - 1)
    else:
        raise refuse(RootFault, FaultReason.C_BAD_STE, path, f"S1Fmt {form} is reserved")
    return _read(mem, "cd", table + index * CD_BYTES, CD_WORDS, path, FaultReason.F_CD_FETCH)


def _of_context(regs: Registers, path: Path, ssid: int | None, strw: int) -> RootInfo:
    w = path[-1].words
    if not w[0] & CD_V:
        raise refuse(RootFault, FaultReason.C_BAD_CD, path, "not valid")
    if not w[0] & CD_AA64:
        raise refuse(RootFault, FaultReason.C_BAD_CD, path, "AArch32 tables (AA64 = 0) are not read")
    if w[0] & CD_ENDI:
        raise refuse(RootFault, FaultReason.C_BAD_CD, path, "big-endian tables (ENDI = 1) are not read")
    lower = _stage1(regs, path, 0)
    # EL2 without E2H has one half only (STE.STRW).
    one_half = strw == STRW_EL2 and regs.cr2 is not None and not regs.cr2 & CR2_E2H
    upper = None if one_half else _stage1(regs, path, 1)
    table = lower or upper
    if table is None:
        raise refuse(RootFault, FaultReason.C_BAD_CD, path, "EPD0 and EPD1 disable both tables")
    asid = w[0] >> CD_ASID_SHIFT
    return RootInfo(
        translation="first-stage", table=table, domain_id=asid, pasid=ssid, path=path,
        asid=asid, upper=upper if lower else None, mair=w[3],
    )  # fmt: skip


def _sizes(
    regs: Registers, path: Path, reason: FaultReason, granule: int | None, tsz: int, ps: int, stage: int
) -> tuple[int, int, int]:
    """(granule, input bits, output bits), checked (S2T0SZ and S2PS, T0SZ and IPS)."""
    if granule is None or ps not in ADDRESS_BITS:
        raise refuse(RootFault, reason, path, "a reserved granule or address size")
    large = granule == 65536
    output = min(ADDRESS_BITS[ps], regs.output_bits)
    if not large:
        output = min(output, 48)
    vax = large and (regs.idr5 is None or regs.idr5 >> IDR5_VAX_SHIFT & 3 == 1)
    # Second stage: IAS, which is OAS, and 40 at least where there are AArch32 tables.
    widest = max(regs.output_bits if large else min(regs.output_bits, 48), 40)
    if stage == 1:
        widest = 52 if vax else 48
    small = regs.idr3 is not None and regs.idr3 & IDR3_STT
    narrowest = 64 - ((47 if large else 48) if small else 39)
    if not narrowest <= 64 - tsz <= widest:
        why = f"stage {stage}: an input size of {64 - tsz} bits is not within {narrowest} and {widest}"
        raise refuse(RootFault, reason, path, why)
    return granule, 64 - tsz, output


def level_shift(granule: int, level: int) -> int:
    """Lowest IOVA bit that level ``level`` (3 = pages) indexes: each level below has granule / 8 entries."""
    page = granule.bit_length() - 1
    return page + (3 - level) * (page - 3)


def _config(granule: int, input_bits: int, output_bits: int, start_level: int) -> dict[str, object]:
    return {
        "granule": granule,
        "input_bits": input_bits,
        "output_bits": output_bits,
        "start_level": start_level,
        "root_entries": 1 << (input_bits - level_shift(granule, start_level)),
    }


def stage1_config(granule: int, input_bits: int, output_bits: int, ttbr: int = 0) -> dict[str, object]:
    """Configuration of format arm_lpae_s1; the start level follows from the input size."""
    page = granule.bit_length() - 1
    levels = -((page - input_bits) // (page - 3))
    config = _config(granule, input_bits, output_bits, 4 - levels)
    return {**config, "ttbr": 1} if ttbr else config


def stage2_config(granule: int, input_bits: int, output_bits: int, start_level: int) -> dict[str, object]:
    """Configuration of format arm_lpae_s2; a root of up to 16 concatenated tables saves a level.

    :raises ValueError: a start level that does not fit the input size.
    """
    page = granule.bit_length() - 1
    entries = input_bits - level_shift(granule, start_level)
    if not 1 <= entries <= page - 3 + MAX_CONCATENATED.bit_length() - 1:
        raise ValueError(f"start level {start_level} does not fit an input size of {input_bits} bits")
    return _config(granule, input_bits, output_bits, start_level)


def _root_of(name: str, config: dict[str, object], ttb: int, path: Path, reason: FaultReason) -> TableRoot:
    entries, output = config["root_entries"], config["output_bits"]
    assert isinstance(entries, int)
    assert isinstance(output, int)
    # A root of 52-bit addresses has 64 bytes at least, so that TTB[5:4] have no meaning of their own.
    size = max(entries * 8, 64 if output > 48 else 16)
    if ttb & (size - 1) or ttb >> output:
        why = f"root {ttb:#x} is not aligned to its {size:#x} bytes, or beyond {output} bits"
        raise refuse(RootFault, reason, path, why)
    return TableRoot(name, config, ttb)


def _stage1(regs: Registers, path: Path, half: int) -> TableRoot | None:
    w = path[-1].words
    tcr = w[0] >> (CD_TTB1_SHIFT * half)
    if tcr >> EPD_SHIFT & 1:
        return None
    granule = (GRANULE_OF_TG1 if half else GRANULE_OF_TG0).get(tcr >> TG_SHIFT & 3)
    sizes = _sizes(regs, path, FaultReason.C_BAD_CD, granule, tcr & TSZ, w[0] >> CD_IPS_SHIFT & 7, 1)
    config = stage1_config(*sizes, half) | _hardware(w[0], CD_HA, CD_HD, CD_AFFD)
    return _root_of("arm_lpae_s1", config, w[1 + half] & CD_TTB, path, FaultReason.C_BAD_CD)


def _hardware(word: int, access: int, dirty: int, no_fault: int) -> dict[str, object]:
    """``hw_access`` and ``hw_dirty`` of a table: HA and HD; AFFD lets AF = 0 pass as HA does."""
    if word & access and word & dirty:
        return {"hw_access": 1, "hw_dirty": 1}
    return {"hw_access": 1} if word & (access | no_fault) else {}


def _stage2(regs: Registers, path: Path) -> TableRoot:
    w = path[-1].words
    bad = FaultReason.C_BAD_STE
    if not w[2] & S2AA64:
        raise refuse(RootFault, bad, path, "AArch32 tables (S2AA64 = 0) are not read")
    if w[2] & S2ENDI:
        raise refuse(RootFault, bad, path, "big-endian tables (S2ENDI = 1) are not read")
    granule = GRANULE_OF_TG0.get(w[2] >> S2TG_SHIFT & 3)
    tsz, ps = w[2] >> S2T0SZ_SHIFT & TSZ, w[2] >> S2PS_SHIFT & 7
    granule, input_bits, output = _sizes(regs, path, bad, granule, tsz, ps, 2)
    start = START_OF_SL0[granule].get(w[2] >> S2SL0_SHIFT & 3)
    if start is None:
        raise refuse(RootFault, bad, path, "S2SL0 3 is not read")
    try:
        config = stage2_config(granule, input_bits, output, start)
    except ValueError as e:
        raise refuse(RootFault, bad, path, str(e)) from e
    config |= _hardware(w[2], S2HA, S2HD, S2AFFD)
    return _root_of("arm_lpae_s2", config, w[3] & S2TTB, path, bad)


# -- encoders, as Linux fills the fields -------------------------------------------------------------------
Words8 = tuple[int, int, int, int, int, int, int, int]


def strtab_base(table_pa: int) -> int:
    """STRTAB_BASE, with read-allocate."""
    return pa_field("stream table", table_pa, STRTAB_ADDR) | STRTAB_BASE_RA


def strtab_base_cfg(log2size: int, split: int | None = None) -> int:
    """STRTAB_BASE_CFG for 2**log2size stream ids; ``split`` None: a linear table."""
    number_field("LOG2SIZE", log2size, 6)
    if split is None:
        return log2size
    if split not in SPLITS:
        raise ValueError(f"SPLIT {split} does not exist (6, 8 or 10)")
    return FMT_2LVL << CFG_FMT_SHIFT | split << CFG_SPLIT_SHIFT | log2size


def l1_stream_descriptor(l2_pa: int, span: int) -> int:
    """Level 1 descriptor of a second-level table with 2**(span - 1) entries."""
    return pa_field("stream table", l2_pa, L1_L2PTR) | number_field("span", span, 5)


def ste_abort() -> Words8:
    """Stream table entry that aborts."""
    return STE_V, 0, 0, 0, 0, 0, 0, 0


def ste_bypass() -> Words8:
    """Stream table entry without translation, attributes as they come in."""
    return STE_V | CONFIG_BYPASS << CONFIG_SHIFT, SHCFG_INCOMING, 0, 0, 0, 0, 0, 0


def ste_stage1(
    context_pa: int, *, cdmax: int = 0, s1fmt: int = S1FMT_LINEAR, dss: int = S1DSS_SSID0
) -> Words8:
    """Stream table entry for the first stage; ``cdmax`` 0: one context descriptor at ``context_pa``."""
    word = STE_V | CONFIG_S1 << CONFIG_SHIFT | number_field("S1Fmt", s1fmt, 2) << S1FMT_SHIFT
    word |= pa_field("context descriptor", context_pa, S1CONTEXTPTR)
    word |= number_field("S1CDMax", cdmax, 5) << S1CDMAX_SHIFT
    attributes = _WBWA << 2 | _WBWA << 4 | _ISH << 6  # S1CIR, S1COR, S1CSH
    return word, number_field("S1DSS", dss, 2) | attributes, 0, 0, 0, 0, 0, 0


def ste_stage2(root: TableRoot, vmid: int) -> Words8:
    """Stream table entry for a second-stage table (format arm_lpae_s2)."""
    c = _numbers(root)
    start = {level: code for code, level in START_OF_SL0[c["granule"]].items()}
    word = number_field("VMID", vmid, 16) | S2AA64 | S2PTW | S2R
    word |= (64 - c["input_bits"]) << S2T0SZ_SHIFT | start[c["start_level"]] << S2SL0_SHIFT
    word |= _WBWA << S2IR0_SHIFT | _WBWA << S2OR0_SHIFT | _ISH << S2SH0_SHIFT
    word |= _TG0_OF[c["granule"]] << S2TG_SHIFT | _PS_OF_BITS[c["output_bits"]] << S2PS_SHIFT
    ttb = pa_field("second-stage root", root.root_pa, S2TTB)
    return STE_V | CONFIG_S2 << CONFIG_SHIFT, 0, word, ttb, 0, 0, 0, 0


def l1_context_descriptor(l2_pa: int) -> int:
    """Level 1 context descriptor."""
    return pa_field("context descriptors", l2_pa, L1CD_L2PTR) | L1CD_V


def context_descriptor(
    lower: TableRoot | None, upper: TableRoot | None = None, *, asid: int, mair: int = LINUX_MAIR
) -> Words8:
    """Context descriptor for first-stage tables (format arm_lpae_s1) below TTB0 and TTB1; None: disabled."""
    word = CD_V | CD_AA64 | CD_R | CD_A | CD_ASET | number_field("ASID", asid, 16) << CD_ASID_SHIFT
    ttbs = [0, 0]
    output = 0
    for half, root in enumerate((lower, upper)):
        if root is None:
            word |= 1 << (EPD_SHIFT + CD_TTB1_SHIFT * half)
            continue
        c = _numbers(root)
        tcr = (64 - c["input_bits"]) | (_TG1_OF if half else _TG0_OF)[c["granule"]] << TG_SHIFT
        tcr |= _WBWA << IR_SHIFT | _WBWA << OR_SHIFT | _ISH << SH_SHIFT
        word |= tcr << (CD_TTB1_SHIFT * half)
        ttbs[half] = pa_field("first-stage root", root.root_pa, CD_TTB)
        output = max(output, c["output_bits"])
    if not output:
        raise ValueError("a context descriptor without a table")
    return word | _PS_OF_BITS[output] << CD_IPS_SHIFT, ttbs[0], ttbs[1], mair, 0, 0, 0, 0


def _numbers(root: TableRoot) -> Mapping[str, int]:
    numbers = {key: value for key, value in root.config.items() if isinstance(value, int)}
    if numbers.get("granule") not in _TG0_OF or numbers.get("output_bits") not in _PS_OF_BITS:
        raise ValueError(f"a granule or output size that the SMMU does not have: {dict(root.config)}")
    return numbers


# -- commands, specification chapter 4: two words ----------------------------------------------------------
Words2 = tuple[int, int]
COMMAND_BYTES = 16


class Op(enum.IntEnum):
    """Opcodes of the Non-secure queue; those that an SMMU without EL2, ATS, PRI and stall takes."""

    PREFETCH_CONFIG = 0x01
    PREFETCH_ADDR = 0x02
    CFGI_STE = 0x03
    #: CFGI_ALL with a Range of 31
    CFGI_STE_RANGE = 0x04
    CFGI_CD = 0x05
    CFGI_CD_ALL = 0x06
    TLBI_NH_ALL = 0x10
    TLBI_NH_ASID = 0x11
    TLBI_NH_VA = 0x12
    TLBI_NH_VAA = 0x13
    TLBI_S12_VMALL = 0x28
    TLBI_S2_IPA = 0x2A
    TLBI_NSNH_ALL = 0x30
    SYNC = 0x46


CMD_OP = bits(7, 0)
CMD_SSV = 1 << 11
CMD_SSID_SHIFT, CMD_SSID = 12, bits(31, 12)
CMD_SID_SHIFT, CMD_SID = 32, bits(63, 32)
CMD_LEAF = 1 << 0
CFGI_RANGE = bits(4, 0)
CFGI_RANGE_ALL = 31
TLBI_NUM_SHIFT, TLBI_NUM = 12, bits(16, 12)
TLBI_SCALE_SHIFT, TLBI_SCALE = 20, bits(24, 20)
TLBI_VMID_SHIFT, TLBI_VMID = 32, bits(47, 32)
TLBI_ASID_SHIFT, TLBI_ASID = 48, bits(63, 48)
TLBI_TTL_SHIFT, TLBI_TTL = 8, bits(9, 8)
TLBI_TG_SHIFT, TLBI_TG = 10, bits(11, 10)
TLBI_VA, TLBI_IPA = bits(63, 12), bits(51, 12)
#: most chunks of 2**SCALE granules that NUM can say
RANGE_MAX = 32
SCALE_MAX = 31
PREFETCH_SIZE = bits(4, 0)
SYNC_CS_SHIFT, SYNC_CS = 12, bits(13, 12)
SYNC_NONE, SYNC_IRQ, SYNC_SEV = 0, 1, 2
#: MSH, MSIAttr, MSIData and MSIAddress of SYNC_IRQ; with another CS they are ignored
SYNC_MSI = (bits(23, 22) | bits(27, 24) | bits(63, 32), bits(51, 2))
_RIL = (TLBI_NUM | TLBI_SCALE, TLBI_TTL | TLBI_TG)
#: the fields of each command; every other bit is RES0
_FIELDS = {
    Op.PREFETCH_CONFIG: (CMD_SSV | CMD_SSID | CMD_SID, 0),
    Op.PREFETCH_ADDR: (CMD_SSV | CMD_SSID | CMD_SID | _RIL[0], bits(63, 12) | _RIL[1] | PREFETCH_SIZE),
    Op.CFGI_STE: (CMD_SID, CMD_LEAF),
    Op.CFGI_STE_RANGE: (CMD_SID, CFGI_RANGE),
    Op.CFGI_CD: (CMD_SSID | CMD_SID, CMD_LEAF),
    Op.CFGI_CD_ALL: (CMD_SID, 0),
    Op.TLBI_NH_ALL: (TLBI_VMID, 0),
    Op.TLBI_NH_ASID: (TLBI_VMID | TLBI_ASID, 0),
    Op.TLBI_NH_VA: (TLBI_VMID | TLBI_ASID | _RIL[0], TLBI_VA | CMD_LEAF | _RIL[1]),
    Op.TLBI_NH_VAA: (TLBI_VMID | _RIL[0], TLBI_VA | CMD_LEAF | _RIL[1]),
    Op.TLBI_S12_VMALL: (TLBI_VMID, 0),
    Op.TLBI_S2_IPA: (TLBI_VMID | _RIL[0], TLBI_IPA | CMD_LEAF | _RIL[1]),
    Op.TLBI_NSNH_ALL: (0, 0),
    Op.SYNC: (SYNC_CS | SYNC_MSI[0], SYNC_MSI[1]),
}
_BY_ADDRESS = (Op.TLBI_NH_VA, Op.TLBI_NH_VAA, Op.TLBI_S2_IPA)


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A decoded command; each field holds what the command of this ``op`` says.

    :param sid: of CFGI_STE_RANGE the lowest of 2**sid_lg2 stream ids. :param start: of the invalidated
        range, iova or ipa, closed; everything where the command has no address.
    :param leaf: what led to the last level stays valid. :param ttl: Arm's level + 1 ... of the leaf, 0:
        unknown. :param cs: completion signal of SYNC.
    """

    op: Op
    sid: int = 0
    sid_lg2: int = 0
    ssid: int = 0
    vmid: int = 0
    asid: int = 0
    start: int = 0
    last: int = (1 << 64) - 1
    leaf: bool = False
    ttl: int = 0
    cs: int = SYNC_NONE


def decode_command(words: Sequence[int]) -> Command | None:
    """Decode the two words of a command; None where hardware reports CERROR_ILL (specification 4.1.3, 7.1).

    A reserved bit is an illegal command: the specification leaves it to the implementation. The fields of
    range invalidation exist (IDR3.RIL).
    """
    w0, w1 = words
    try:
        op = Op(w0 & CMD_OP)
    except ValueError:
        return None
    fields = _FIELDS[op]
    if w0 & ~(fields[0] | CMD_OP) or w1 & ~fields[1]:
        return None
    if op == Op.SYNC:
        cs = (w0 & SYNC_CS) >> SYNC_CS_SHIFT
        return None if cs > SYNC_SEV else Command(op=op, cs=cs)
    if op < Op.TLBI_NH_ALL:
        sid = w0 >> CMD_SID_SHIFT
        ssid = (w0 & fields[0] & CMD_SSID) >> CMD_SSID_SHIFT
        if op == Op.CFGI_STE_RANGE:
            lg2 = (w1 & CFGI_RANGE) + 1
            return Command(op=op, sid=sid >> lg2 << lg2, sid_lg2=lg2)
        return Command(op=op, sid=sid, ssid=ssid, leaf=bool(w1 & fields[1] & CMD_LEAF))
    vmid = (w0 & fields[0] & TLBI_VMID) >> TLBI_VMID_SHIFT
    asid = (w0 & fields[0] & TLBI_ASID) >> TLBI_ASID_SHIFT
    if op not in _BY_ADDRESS:
        return Command(op=op, vmid=vmid, asid=asid)
    start, size = w1 & TLBI_VA, 4096
    tg, ttl = (w1 & TLBI_TG) >> TLBI_TG_SHIFT, (w1 & TLBI_TTL) >> TLBI_TTL_SHIFT
    num, scale = (w0 & TLBI_NUM) >> TLBI_NUM_SHIFT, (w0 & TLBI_SCALE) >> TLBI_SCALE_SHIFT
    # 4.4.1.1: with the 16K granule there are no leaves of level 1. One granule without a level is reserved,
    # and without a granule there is neither range nor level.
    ttl = 0 if (tg, ttl) == (2, 1) else ttl
    if bool(tg) != bool(num or scale or ttl):
        return None
    if tg:
        granule = 2 * tg + 10
        start, size = start >> granule << granule, (num + 1) << scale << granule
    last = min(start + size, 1 << 64) - 1
    return Command(op=op, vmid=vmid, asid=asid, start=start, last=last, leaf=bool(w1 & CMD_LEAF), ttl=ttl)


def cfgi_ste(sid: int, *, leaf: bool = False) -> Words2:
    """CMD_CFGI_STE: forget the entry of a stream; unless ``leaf`` the level 1 descriptor too (4.3.1)."""
    return Op.CFGI_STE | number_field("stream id", sid, 32) << CMD_SID_SHIFT, int(leaf)


def cfgi_ste_range(sid: int, lg2: int) -> Words2:
    """CMD_CFGI_STE_RANGE: forget the entries of the 2**lg2 (lg2: 1 ... 32) streams around ``sid`` (4.3.2)."""
    word = Op.CFGI_STE_RANGE | number_field("stream id", sid, 32) << CMD_SID_SHIFT
    return word, number_field("Range", lg2 - 1, 5)


def cfgi_all() -> Words2:
    """CMD_CFGI_ALL: forget every stream table entry and context descriptor (4.3.6)."""
    return cfgi_ste_range(0, CFGI_RANGE_ALL + 1)


def cfgi_cd(sid: int, ssid: int = 0, *, leaf: bool = True) -> Words2:
    """CMD_CFGI_CD: forget a context descriptor; unless ``leaf`` its level 1 descriptor too (4.3.3)."""
    word = Op.CFGI_CD | number_field("stream id", sid, 32) << CMD_SID_SHIFT
    return word | number_field("substream id", ssid, 20) << CMD_SSID_SHIFT, int(leaf)


def cfgi_cd_all(sid: int) -> Words2:
    """CMD_CFGI_CD_ALL: forget all context descriptors of a stream (4.3.4)."""
    return Op.CFGI_CD_ALL | number_field("stream id", sid, 32) << CMD_SID_SHIFT, 0


def _vmid(op: Op, vmid: int) -> int:
    return op | number_field("VMID", vmid, 16) << TLBI_VMID_SHIFT


def tlbi_nh_all(vmid: int = 0) -> Words2:
    """CMD_TLBI_NH_ALL: stage 1 of a VMID (4.4.2)."""
    return _vmid(Op.TLBI_NH_ALL, vmid), 0


def tlbi_nh_asid(asid: int, vmid: int = 0) -> Words2:
    """CMD_TLBI_NH_ASID: stage 1 of an ASID (4.4.2)."""
    return _vmid(Op.TLBI_NH_ASID, vmid) | number_field("ASID", asid, 16) << TLBI_ASID_SHIFT, 0


def tlbi_s12_vmall(vmid: int) -> Words2:
    """CMD_TLBI_S12_VMALL: both stages of a VMID (4.4.3)."""
    return _vmid(Op.TLBI_S12_VMALL, vmid), 0


def tlbi_nsnh_all() -> Words2:
    """CMD_TLBI_NSNH_ALL: everything of the Non-secure world but EL2 (4.4.4)."""
    return Op.TLBI_NSNH_ALL, 0


@dataclass(frozen=True, slots=True)
class Range:
    """``num`` (1 ... 32) chunks of 2**scale granules from ``start`` on: IDR3.RIL, 4.4.1.1."""

    start: int
    num: int
    scale: int
    granule: int


def ranges_of(start: int, last: int, granule: int) -> list[Range]:
    """The closed range as ranges of which a command can name one each, as Linux does it
    (``__arm_smmu_tlb_inv_range()``): five bits of the number of granules at a time, lowest first.
    """
    lg2 = granule.bit_length() - 1
    start, pages = start >> lg2 << lg2, (last >> lg2) - (start >> lg2) + 1
    found = []
    # A single chunk of one granule without a level is reserved.
    if pages & (RANGE_MAX - 1) == 1:
        pages += 1
    while pages:
        scale = min((pages & -pages).bit_length() - 1, SCALE_MAX)
        num = pages >> scale & (RANGE_MAX - 1) or RANGE_MAX
        found.append(Range(start, num, scale, granule))
        start += num << scale << lg2
        pages -= num << scale
    return [r for r in found if r.start < 1 << 64]


def _by_address(op: Op, at: int | Range, mask: int, leaf: bool) -> Words2:
    if not isinstance(at, Range):
        return op, pa_field("iova", at, mask) | int(leaf)
    tg = (at.granule.bit_length() - 11) // 2
    word = op | number_field("NUM", at.num - 1, 5) << TLBI_NUM_SHIFT
    word |= number_field("SCALE", at.scale, 5) << TLBI_SCALE_SHIFT
    return word, pa_field("iova", at.start, mask) | tg << TLBI_TG_SHIFT | int(leaf)


def tlbi_nh_va(asid: int, at: int | Range, vmid: int = 0, *, leaf: bool = False) -> Words2:
    """CMD_TLBI_NH_VA: the page at an iova, or a range, of stage 1 of an ASID (4.4.2)."""
    w0, w1 = _by_address(Op.TLBI_NH_VA, at, TLBI_VA, leaf)
    return w0 | _vmid(Op.TLBI_NH_VA, vmid) | number_field("ASID", asid, 16) << TLBI_ASID_SHIFT, w1


def tlbi_nh_vaa(at: int | Range, vmid: int = 0, *, leaf: bool = False) -> Words2:
    """CMD_TLBI_NH_VAA: as :func:`tlbi_nh_va`, of every ASID (4.4.2)."""
    w0, w1 = _by_address(Op.TLBI_NH_VAA, at, TLBI_VA, leaf)
    return w0 | _vmid(Op.TLBI_NH_VAA, vmid), w1


def tlbi_s2_ipa(vmid: int, at: int | Range, *, leaf: bool = False) -> Words2:
    """CMD_TLBI_S2_IPA: the page at an ipa, or a range, of stage 2 of a VMID (4.4.3)."""
    w0, w1 = _by_address(Op.TLBI_S2_IPA, at, TLBI_IPA, leaf)
    return w0 | _vmid(Op.TLBI_S2_IPA, vmid), w1


def sync(cs: int = SYNC_SEV) -> Words2:
    """CMD_SYNC: consumed when everything before it is done (4.7.3); Linux waits with SEV for CONS."""
    return Op.SYNC | number_field("CS", cs, 2) << SYNC_CS_SHIFT, 0


# -- event records, specification 7.3: four words ----------------------------------------------------------
Words4 = tuple[int, int, int, int]
EVENT_BYTES = 32
EVT_ID = bits(7, 0)
EVT_SSV = 1 << 11
EVT_SSID_SHIFT, EVT_SID_SHIFT = 12, 32
EVT_STAG = bits(15, 0)
EVT_STALL = 1 << 31
EVT_PNU, EVT_IND, EVT_RNW, EVT_S2 = 1 << 33, 1 << 34, 1 << 35, 1 << 39
EVT_CLASS_SHIFT = 40
#: what was being translated: a context descriptor, a table item, the input of the request
CLASS_CD, CLASS_TT, CLASS_IN = 0, 1, 2
EVT_IPA = bits(51, 12)
EVT_FETCH = bits(51, 3)
_REASONS = {int(reason): reason for reason in FaultReason if reason <= EVT_ID}
#: events of a walk: they say request, stage and class
_OF_WALK = frozenset(
    {
        FaultReason.F_WALK_EABT,
        FaultReason.F_TRANSLATION,
        FaultReason.F_ADDR_SIZE,
        FaultReason.F_ACCESS,
        FaultReason.F_PERMISSION,
    }
)
_OF_FETCH = frozenset({FaultReason.F_STE_FETCH, FaultReason.F_CD_FETCH, FaultReason.F_WALK_EABT})


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """An event record.

    :param ssid: None: the request had none. :param read: RnW. :param stage2: the fault is of stage 2.
    :param cls: CLASS_*. :param iova: InputAddr. :param ipa: of a stage 2 fault (whole 4096 bytes).
    :param fetch_pa: what could not be read, of F_STE_FETCH, F_CD_FETCH and F_WALK_EABT (8-byte aligned).
    """

    code: FaultReason
    sid: int
    ssid: int | None = None
    stag: int = 0
    stall: bool = False
    privileged: bool = False
    instruction: bool = False
    read: bool = False
    stage2: bool = False
    cls: int = CLASS_CD
    iova: int = 0
    ipa: int = 0
    fetch_pa: int = 0


def event_words(event: Event) -> Words4:
    """The record as the event queue has it. :raises ValueError: a field that this event does not have."""
    if event.code > EVT_ID:
        raise ValueError(f"{event.code.name} is recorded nowhere")
    w0 = event.code | number_field("stream id", event.sid, 32) << EVT_SID_SHIFT
    if event.ssid is not None:
        w0 |= EVT_SSV | number_field("substream id", event.ssid, 20) << EVT_SSID_SHIFT
    flags = (
        (event.stall, EVT_STALL),
        (event.privileged, EVT_PNU),
        (event.instruction, EVT_IND),
        (event.read, EVT_RNW),
        (event.stage2, EVT_S2),
    )
    w1 = number_field("STAG", event.stag, 16) | number_field("CLASS", event.cls, 2) << EVT_CLASS_SHIFT
    w1 |= sum(bit for on, bit in flags if on)
    w2 = number_field("iova", event.iova, 64)
    w3 = pa_field("ipa", event.ipa, EVT_IPA) | pa_field("fetch", event.fetch_pa, EVT_FETCH)
    if (w1 or w2 or event.ipa) and event.code not in _OF_WALK:
        raise ValueError(f"{event.code.name} does not say what was requested")
    if event.fetch_pa and (event.code not in _OF_FETCH or event.ipa):
        raise ValueError(f"{event.code.name} does not say what was fetched")
    return w0, w1, w2, w3


def decode_event(words: Sequence[int]) -> Event | None:
    """The record; None: an event that this model does not make."""
    w0, w1, w2, w3 = words
    code = _REASONS.get(w0 & EVT_ID)
    if code is None:
        return None
    sid, ssid = w0 >> EVT_SID_SHIFT, w0 >> EVT_SSID_SHIFT & 0xFFFFF if w0 & EVT_SSV else None
    fetch_pa = w3 & EVT_FETCH if code in _OF_FETCH else 0
    if code not in _OF_WALK:
        return Event(code=code, sid=sid, ssid=ssid, fetch_pa=fetch_pa)
    return Event(
        code=code,
        sid=sid,
        ssid=ssid,
        stag=w1 & EVT_STAG,
        stall=bool(w1 & EVT_STALL),
        privileged=bool(w1 & EVT_PNU),
        instruction=bool(w1 & EVT_IND),
        read=bool(w1 & EVT_RNW),
        stage2=bool(w1 & EVT_S2),
        cls=w1 >> EVT_CLASS_SHIFT & 3,
        iova=w2,
        ipa=0 if code in _OF_FETCH else w3 & EVT_IPA,
        fetch_pa=fetch_pa,
    )
