# SPDX-License-Identifier: Apache-2.0
"""VT-d: the way from the root table register to a page table, and the descriptors of the invalidation queue.

Source: Intel Virtualization Technology for Directed I/O, architecture specification, revision 4.x ("the
specification" below): root entry 9.1 and 9.2, context entry 9.3 and 9.4, PASID directory entry 9.5, PASID
table entry 9.6, queued invalidation 6.5.2, fault reasons 7.1.3, registers chapter 11. Checked against Linux
drivers/iommu/intel/{iommu.h,pasid.h,dmar.c} and against captures of running kernels.

Entries are plain ints, one per 64-bit word, lowest word first. All pas are bytes; every table is 4096 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from iokeep.errors import MemoryAbsent
from iokeep.mem.memory import Memory
from iokeep.pt.roots import base
from iokeep.pt.roots.base import PathStep

TABLE_BYTES = 4096
#: Host address width (bits) that entries are checked against; bits above are reserved.
HAW = 52
PA_MASK = ((1 << HAW) - 1) & ~0xFFF
_WORD = (1 << 64) - 1
_ABOVE_HAW = _WORD & ~((1 << HAW) - 1)

# -- RTADDR_REG, specification chapter 11 --------------------------------------------------------------
RTADDR_TTM_SHIFT = 10
RTADDR_TTM_MASK = 3 << RTADDR_TTM_SHIFT
TTM_LEGACY = 0
TTM_SCALABLE = 1
TTM_ABORT = 3

# -- root entry, specification 9.1 (legacy) and 9.2 (scalable) -------------------------------------
ROOT_ENTRY_BYTES = 16
PRESENT = 1
#: everything of a present half but P and CTP
ROOT_RESERVED = 0xFFE | _ABOVE_HAW

# -- legacy context entry, specification 9.3 -------------------------------------------------------
CONTEXT_ENTRY_BYTES = 16
FPD = 1 << 1  # fault processing disable: context, PASID directory and PASID table entries
CONTEXT_TT_SHIFT = 2
CONTEXT_TT_MASK = 3 << CONTEXT_TT_SHIFT
TT_UNTRANSLATED = 0  # untranslated requests only (CONTEXT_TT_MULTI_LEVEL)
TT_DEVICE_TLB = 1
TT_PASS_THROUGH = 2
CONTEXT_LO_RESERVED = 0xFF0 | _ABOVE_HAW
CONTEXT_AW_MASK = 7
CONTEXT_DID_SHIFT = 8
DID_MASK = 0xFFFF
#: bits [7] and [127:88]; [6:3] are ignored by hardware
CONTEXT_HI_RESERVED = _WORD & ~((DID_MASK << CONTEXT_DID_SHIFT) | 0x7F)

# -- scalable context entry, specification 9.4: 256 bits -------------------------------------------
SM_CONTEXT_ENTRY_BYTES = 32
SM_CONTEXT_DTE = 1 << 2
SM_CONTEXT_PASIDE = 1 << 3
SM_CONTEXT_PRE = 1 << 4
SM_CONTEXT_PDTS_SHIFT = 9
SM_CONTEXT_PDTS_MASK = 7 << SM_CONTEXT_PDTS_SHIFT
SM_CONTEXT_LO_RESERVED = 0x1E0 | _ABOVE_HAW
RID_PASID_MASK = 0xFFFFF
SM_CONTEXT_RID_PRIV = 1 << 20
SM_CONTEXT_HI_RESERVED = _WORD & ~(RID_PASID_MASK | SM_CONTEXT_RID_PRIV)

# -- PASID directory and table, specification 9.5 and 9.6 ------------------------------------------
PASID_DIR_ENTRY_BYTES = 8
PASID_ENTRY_BYTES = 64
PASID_TABLE_BITS = 6  # a PASID table holds 64 entries; the directory is indexed by PASID[19:6]
PASID_DIR_RESERVED = 0xFFC | _ABOVE_HAW
PASID_AW_SHIFT = 2
PASID_AW_MASK = 7 << PASID_AW_SHIFT
PASID_PGTT_SHIFT = 6
PASID_PGTT_MASK = 7 << PASID_PGTT_SHIFT
PGTT_FIRST_STAGE = 1
PGTT_SECOND_STAGE = 2
PGTT_NESTED = 3
PGTT_PASS_THROUGH = 4
PASID_SSADE = 1 << 9
PASID_0_RESERVED = (1 << 5) | (3 << 10) | _ABOVE_HAW
PASID_1_RESERVED = 0x7F << 16  # bits [86:80]
PASID_FSPM_SHIFT = 2
PASID_FSPM_MASK = 3 << PASID_FSPM_SHIFT
PASID_2_RESERVED = (0xF << 8) | _ABOVE_HAW  # bits [139:136]

#: levels of a second-stage table by the AW field (specification 9.3, 9.6); other codes are reserved
LEVELS_OF_AW = {1: 3, 2: 4, 3: 5}
AW_OF_LEVELS = {levels: aw for aw, levels in LEVELS_OF_AW.items()}
#: levels of a first-stage table by the FSPM field (specification 9.6)
LEVELS_OF_FSPM = {0: 4, 1: 5}
FSPM_OF_LEVELS = {levels: fspm for fspm, levels in LEVELS_OF_FSPM.items()}


class FaultReason(base.FaultCode):
    """Fault reasons of DMA remapping: specification 7.1.3; numbered as in Linux intel/dmar.c."""

    NONE = 0x00, "no fault"
    ROOT_NOT_PRESENT = 0x01, "the root entry is not present"
    CONTEXT_NOT_PRESENT = 0x02, "the context entry is not present"
    CONTEXT_INVALID = 0x03, "the context entry is programmed wrongly"
    BEYOND_WIDTH = 0x04, "the IOVA is beyond the width of the context entry"
    NO_WRITE = 0x05, "no write permission"
    NO_READ = 0x06, "no read permission"
    PAGING_ACCESS = 0x07, "a page table is not in memory"
    ROOT_ACCESS = 0x08, "the root table is not in memory"
    CONTEXT_ACCESS = 0x09, "the context table is not in memory"
    ROOT_RESERVED = 0x0A, "a reserved bit is set in the root entry"
    CONTEXT_RESERVED = 0x0B, "a reserved bit is set in the context entry"
    PAGING_RESERVED = 0x0C, "a reserved bit is set in a paging entry"
    CONTEXT_BLOCKED = 0x0D, "the translation type of the context entry blocks the request"
    SM_ROOT_TABLE_INVALID = 0x30, "the root table register has an invalid translation table mode"
    SM_ROOT_ACCESS = 0x38, "the root table is not in memory"
    SM_ROOT_NOT_PRESENT = 0x39, "the root entry is not present"
    SM_ROOT_RESERVED = 0x3A, "a reserved bit is set in the root entry"
    SM_CONTEXT_ACCESS = 0x40, "the context table is not in memory"
    SM_CONTEXT_NOT_PRESENT = 0x41, "the context entry is not present"
    SM_CONTEXT_RESERVED = 0x42, "a reserved bit is set in the context entry"
    SM_CONTEXT_INVALID = 0x43, "the context entry is programmed wrongly"
    SM_PASID_TOO_LARGE = 0x46, "the PASID is beyond the PASID directory"
    SM_RID_PASID_TOO_LARGE = 0x48, "RID_PASID is beyond the PASID directory"
    SM_PASID_DIR_ACCESS = 0x50, "the PASID directory is not in memory"
    SM_PASID_DIR_NOT_PRESENT = 0x51, "the PASID directory entry is not present"
    SM_PASID_DIR_RESERVED = 0x52, "a reserved bit is set in the PASID directory entry"
    SM_PASID_ACCESS = 0x58, "the PASID table is not in memory"
    SM_PASID_NOT_PRESENT = 0x59, "the PASID table entry is not present"
    SM_PASID_RESERVED = 0x5A, "a reserved bit is set in the PASID table entry"
    SM_PASID_INVALID = 0x5B, "the PASID table entry is programmed wrongly"
    SM_FIRST_ACCESS = 0x70, "a first-stage table is not in memory"
    SM_FIRST_NOT_PRESENT = 0x71, "a first-stage entry is not present"
    SM_FIRST_RESERVED = 0x72, "a reserved bit is set in a first-stage entry"
    SM_SECOND_ACCESS = 0x78, "a second-stage table is not in memory"
    SM_SECOND_RESERVED = 0x7A, "a reserved bit is set in a second-stage entry"
    SM_NOT_CANONICAL = 0x80, "the IOVA is not canonical"
    SM_SECOND_BEYOND_WIDTH = 0x84, "the IOVA is beyond the width of the second stage"
    SM_NO_WRITE = 0x85, "no write permission"
    SM_NO_READ = 0x86, "no read permission"


# -- finding the table -----------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class RootInfo:
    """What the IOMMU's structures say about one requester.

    :param mode: "legacy" or "scalable" (RTADDR_REG.TTM).
    :param translation: "second-stage", "first-stage", "nested" or "pass-through".
    :param format: page-table format of the table at ``root_pa``: "vtdss", "x86_64" (first stage, also that of
        "nested"), or None for "pass-through".
    :param levels: levels of that table, 0 for "pass-through". :param root_pa: its root, 0 for "pass-through".
    :param domain_id: DID that tags the caches. :param pasid: the PASID used in scalable mode, else None.
    :param path: the entries read, in order.
    :param second: (levels, root_pa) of the second stage of "nested", else None.
    """

    mode: str
    translation: str
    format: str | None
    levels: int
    root_pa: int
    domain_id: int
    pasid: int | None
    path: tuple[PathStep, ...]
    second: tuple[int, int] | None = None


class RootFault(base.RootFault):
    """No page table; ``reason`` is a :class:`FaultReason`."""

    kind = "vtd-root"
    record = "VT-d fault reason"


def bdf_text(bdf: int, segment: int = 0) -> str:
    """``0000:00:04.0`` of a 16-bit requester id."""
    return f"{segment:04x}:{bdf >> 8 & 0xFF:02x}:{bdf >> 3 & 0x1F:02x}.{bdf & 7:x}"


def parse_bdf(text: str) -> int:
    """16-bit requester id of ``DDDD:BB:DD.F`` or ``BB:DD.F``; the segment is dropped. :raises ValueError:"""
    bus, rest = text.split(":")[-2:]
    dev, fn = rest.split(".")
    b, d, f = int(bus, 16), int(dev, 16), int(fn, 16)
    if not (0 <= b < 256 and 0 <= d < 32 and 0 <= f < 8):
        raise ValueError(f"{text!r} is not a PCI device (DDDD:BB:DD.F)")
    return b << 8 | d << 3 | f


def root_entry_pa(rtaddr: int, bdf: int) -> int:
    """pa of the 16-byte root entry of the bus of ``bdf`` (specification 9.1)."""
    return (rtaddr & PA_MASK) + (bdf >> 8) * ROOT_ENTRY_BYTES


def context_entry_pa(context_pa: int, bdf: int, *, scalable: bool) -> int:
    """pa of the context entry of ``bdf`` in its context table (256 of 16 bytes; scalable: 128 of 32)."""
    if scalable:
        return context_pa + (bdf & 0x7F) * SM_CONTEXT_ENTRY_BYTES
    return context_pa + (bdf & 0xFF) * CONTEXT_ENTRY_BYTES


def find_root(mem: Memory, rtaddr: int, bdf: int, pasid: int | None = None) -> RootInfo:
    """Follow RTADDR_REG to the page table that translates requests of ``bdf``, as hardware does.

    :param rtaddr: the value of RTADDR_REG (u64), with the mode in its TTM field.
    :param bdf: requester id (u16): bus << 8 | device << 3 | function.
    :param pasid: scalable mode only: the PASID of the request; None = a request without PASID, which uses the
        RID_PASID of the context entry.
    :raises RootFault: an entry is absent, not present, reserved or programmed wrongly.
    """
    if not 0 <= bdf <= 0xFFFF:
        raise ValueError(f"requester id {bdf:#x} is not 16 bits")
    ttm = (rtaddr & RTADDR_TTM_MASK) >> RTADDR_TTM_SHIFT
    if ttm == TTM_LEGACY:
        return _find_legacy(mem, rtaddr, bdf)
    if ttm == TTM_SCALABLE:
        return _find_scalable(mem, rtaddr, bdf, pasid)
    raise RootFault(FaultReason.SM_ROOT_TABLE_INVALID, f"RTADDR_REG {rtaddr:#x}", ())


def _step(
    mem: Memory, name: str, pa: int, words: int, path: tuple[PathStep, ...], absent: FaultReason
) -> tuple[PathStep, ...]:
    try:
        raw = mem.read(pa, words * 8)
    except MemoryAbsent as e:
        raise RootFault(absent, f"{name} entry at pa {pa:#x}", path) from e
    values = tuple(int.from_bytes(raw[i : i + 8], "little") for i in range(0, len(raw), 8))
    return (*path, PathStep(name, pa, values))


def _refuse(reason: FaultReason, path: tuple[PathStep, ...]) -> RootFault:
    last = path[-1]
    words = " ".join(f"{w:#x}" for w in last.words)
    return RootFault(reason, f"{last.name} entry at pa {last.pa:#x} ({words})", path)


def _find_legacy(mem: Memory, rtaddr: int, bdf: int) -> RootInfo:
    path = _step(mem, "root", root_entry_pa(rtaddr, bdf), 2, (), FaultReason.ROOT_ACCESS)
    lo, hi = path[-1].words
    if not lo & PRESENT:
        raise _refuse(FaultReason.ROOT_NOT_PRESENT, path)
    if lo & ROOT_RESERVED or hi:
        raise _refuse(FaultReason.ROOT_RESERVED, path)
    pa = context_entry_pa(lo & PA_MASK, bdf, scalable=False)
    path = _step(mem, "context", pa, 2, path, FaultReason.CONTEXT_ACCESS)
    lo, hi = path[-1].words
    if not lo & PRESENT:
        raise _refuse(FaultReason.CONTEXT_NOT_PRESENT, path)
    if lo & CONTEXT_LO_RESERVED or hi & CONTEXT_HI_RESERVED:
        raise _refuse(FaultReason.CONTEXT_RESERVED, path)
    did = hi >> CONTEXT_DID_SHIFT & DID_MASK
    tt = (lo & CONTEXT_TT_MASK) >> CONTEXT_TT_SHIFT
    if tt == TT_PASS_THROUGH:
        return RootInfo("legacy", "pass-through", None, 0, 0, did, None, path)
    levels = LEVELS_OF_AW.get(hi & CONTEXT_AW_MASK)
    if tt not in (TT_UNTRANSLATED, TT_DEVICE_TLB) or levels is None:
        raise _refuse(FaultReason.CONTEXT_INVALID, path)
    return RootInfo("legacy", "second-stage", "vtdss", levels, lo & PA_MASK, did, None, path)


def _find_scalable(mem: Memory, rtaddr: int, bdf: int, pasid: int | None) -> RootInfo:
    path = _step(mem, "root", root_entry_pa(rtaddr, bdf), 2, (), FaultReason.SM_ROOT_ACCESS)
    # Specification 9.2: the low half serves devfn 0..0x7f, the high half 0x80..0xff.
    half = path[-1].words[bdf >> 7 & 1]
    if not half & PRESENT:
        raise _refuse(FaultReason.SM_ROOT_NOT_PRESENT, path)
    if half & ROOT_RESERVED:
        raise _refuse(FaultReason.SM_ROOT_RESERVED, path)
    pa = context_entry_pa(half & PA_MASK, bdf, scalable=True)
    path = _step(mem, "context", pa, 4, path, FaultReason.SM_CONTEXT_ACCESS)
    w = path[-1].words
    if not w[0] & PRESENT:
        raise _refuse(FaultReason.SM_CONTEXT_NOT_PRESENT, path)
    if w[0] & SM_CONTEXT_LO_RESERVED or w[1] & SM_CONTEXT_HI_RESERVED or w[2] or w[3]:
        raise _refuse(FaultReason.SM_CONTEXT_RESERVED, path)
    entries = 1 << (((w[0] & SM_CONTEXT_PDTS_MASK) >> SM_CONTEXT_PDTS_SHIFT) + 7)
    number = w[1] & RID_PASID_MASK if pasid is None else pasid
    if number < 0 or number >> PASID_TABLE_BITS >= entries:
        reason = FaultReason.SM_RID_PASID_TOO_LARGE if pasid is None else FaultReason.SM_PASID_TOO_LARGE
        raise _refuse(reason, path)
    pa = (w[0] & PA_MASK) + (number >> PASID_TABLE_BITS) * PASID_DIR_ENTRY_BYTES
    path = _step(mem, "pasid-dir", pa, 1, path, FaultReason.SM_PASID_DIR_ACCESS)
    entry = path[-1].words[0]
    if not entry & PRESENT:
        raise _refuse(FaultReason.SM_PASID_DIR_NOT_PRESENT, path)
    if entry & PASID_DIR_RESERVED:
        raise _refuse(FaultReason.SM_PASID_DIR_RESERVED, path)
    pa = (entry & PA_MASK) + (number & ((1 << PASID_TABLE_BITS) - 1)) * PASID_ENTRY_BYTES
    path = _step(mem, "pasid", pa, 8, path, FaultReason.SM_PASID_ACCESS)
    return _pasid_root(path, number)


def _pasid_root(path: tuple[PathStep, ...], pasid: int) -> RootInfo:
    w = path[-1].words
    if not w[0] & PRESENT:
        raise _refuse(FaultReason.SM_PASID_NOT_PRESENT, path)
    if w[0] & PASID_0_RESERVED or w[1] & PASID_1_RESERVED or w[2] & PASID_2_RESERVED or any(w[3:]):
        raise _refuse(FaultReason.SM_PASID_RESERVED, path)
    did = w[1] & DID_MASK
    pgtt = (w[0] & PASID_PGTT_MASK) >> PASID_PGTT_SHIFT
    second = LEVELS_OF_AW.get((w[0] & PASID_AW_MASK) >> PASID_AW_SHIFT)
    first = LEVELS_OF_FSPM.get((w[2] & PASID_FSPM_MASK) >> PASID_FSPM_SHIFT)
    if pgtt == PGTT_PASS_THROUGH:
        return RootInfo("scalable", "pass-through", None, 0, 0, did, pasid, path)
    if pgtt == PGTT_SECOND_STAGE and second is not None:
        return RootInfo("scalable", "second-stage", "vtdss", second, w[0] & PA_MASK, did, pasid, path)
    if pgtt == PGTT_FIRST_STAGE and first is not None:
        return RootInfo("scalable", "first-stage", "x86_64", first, w[2] & PA_MASK, did, pasid, path)
    if pgtt == PGTT_NESTED and first is not None and second is not None:
        nested = (second, w[0] & PA_MASK)
        return RootInfo("scalable", "nested", "x86_64", first, w[2] & PA_MASK, did, pasid, path, nested)
    raise _refuse(FaultReason.SM_PASID_INVALID, path)


# -- encoders --------------------------------------------------------------------------------------
def _pa_field(what: str, pa: int) -> int:
    if pa & ~PA_MASK:
        raise ValueError(f"{what} pa {pa:#x} is not a 4096-byte aligned pa below 2**{HAW}")
    return pa


def _did_field(domain_id: int) -> int:
    if not 0 <= domain_id <= DID_MASK:
        raise ValueError(f"domain id {domain_id:#x} is not 16 bits")
    return domain_id


def rtaddr_value(root_table_pa: int, *, scalable: bool) -> int:
    """RTADDR_REG value for a root table."""
    return (
        _pa_field("root table", root_table_pa)
        | (TTM_SCALABLE if scalable else TTM_LEGACY) << RTADDR_TTM_SHIFT
    )


def root_entry(context_pa: int) -> tuple[int, int]:
    """Legacy root entry (lo, hi) for the context table of a bus (specification 9.1)."""
    return _pa_field("context table", context_pa) | PRESENT, 0


def sm_root_entry(lower_pa: int | None, upper_pa: int | None) -> tuple[int, int]:
    """Scalable root entry (lo, hi): context tables of devfn 0..0x7f and 0x80..0xff, None: absent (9.2)."""
    return (
        0 if lower_pa is None else _pa_field("lower context table", lower_pa) | PRESENT,
        0 if upper_pa is None else _pa_field("upper context table", upper_pa) | PRESENT,
    )


def context_entry(root_pa: int, levels: int, domain_id: int, tt: int = TT_UNTRANSLATED) -> tuple[int, int]:
    """Legacy context entry (lo, hi) for a second-stage table of 3, 4 or 5 ``levels`` (specification 9.3)."""
    if levels not in AW_OF_LEVELS:
        raise ValueError(f"a second-stage table of {levels} levels does not exist (3, 4 or 5)")
    lo = _pa_field("second-stage root", root_pa) | tt << CONTEXT_TT_SHIFT | PRESENT
    return lo, _did_field(domain_id) << CONTEXT_DID_SHIFT | AW_OF_LEVELS[levels]


def sm_context_entry(pasid_dir_pa: int, pdts: int, rid_pasid: int = 0) -> tuple[int, int, int, int]:
    """Scalable context entry (specification 9.4).

    :param pdts: the directory has 2**(pdts + 7) entries, so 0 serves 8192 PASIDs in 1024 bytes.
    """
    if not 0 <= pdts <= 7 or not 0 <= rid_pasid <= RID_PASID_MASK:
        raise ValueError(f"PDTS {pdts} or RID_PASID {rid_pasid:#x} does not fit its field")
    lo = _pa_field("PASID directory", pasid_dir_pa) | pdts << SM_CONTEXT_PDTS_SHIFT | PRESENT
    return lo, rid_pasid, 0, 0


def pasid_dir_entry(table_pa: int) -> int:
    """PASID directory entry (specification 9.5)."""
    return _pa_field("PASID table", table_pa) | PRESENT


def pasid_entry_second_stage(root_pa: int, levels: int, domain_id: int) -> tuple[int, ...]:
    """PASID table entry, 8 words, for second-stage translation (specification 9.6, PGTT 010b)."""
    if levels not in AW_OF_LEVELS:
        raise ValueError(f"a second-stage table of {levels} levels does not exist (3, 4 or 5)")
    w0 = _pa_field("second-stage root", root_pa) | PGTT_SECOND_STAGE << PASID_PGTT_SHIFT | PRESENT
    return w0 | AW_OF_LEVELS[levels] << PASID_AW_SHIFT, _did_field(domain_id), 0, 0, 0, 0, 0, 0


def pasid_entry_first_stage(root_pa: int, levels: int, domain_id: int) -> tuple[int, ...]:
    """PASID table entry, 8 words, for first-stage translation (specification 9.6, PGTT 001b).

    AW has no meaning here; Linux 7.3 writes the width of the IOMMU into it all the same, and so does this.
    """
    if levels not in FSPM_OF_LEVELS:
        raise ValueError(f"a first-stage table of {levels} levels does not exist (4 or 5)")
    w0 = AW_OF_LEVELS[levels] << PASID_AW_SHIFT | PGTT_FIRST_STAGE << PASID_PGTT_SHIFT | PRESENT
    w2 = _pa_field("first-stage root", root_pa) | FSPM_OF_LEVELS[levels] << PASID_FSPM_SHIFT
    return w0, _did_field(domain_id), w2, 0, 0, 0, 0, 0


# -- invalidation descriptors, specification 6.5.2 -------------------------------------------------
Descriptor = tuple[int, int, int, int]

INV_CONTEXT = 0x1
INV_IOTLB = 0x2
INV_WAIT = 0x5
INV_PASID_IOTLB = 0x6
INV_PASID_CACHE = 0x7
INV_G_SHIFT = 4
G_GLOBAL = 1  # context cache, IOTLB
G_DOMAIN = 2
G_DEVICE = 3  # context cache
G_PAGES = 3  # IOTLB
PC_DOMAIN = 0  # PASID cache
PC_PASID = 1
PC_GLOBAL = 3
PIOTLB_PASID = 2
PIOTLB_PAGES = 3
INV_DID_SHIFT = 16
INV_SID_SHIFT = 32
INV_FM_SHIFT = 48
INV_PASID_SHIFT = 32
INV_AM_MASK = 0x3F
INV_IH = 1 << 6
IOTLB_DRAIN_WRITES = 1 << 6
IOTLB_DRAIN_READS = 1 << 7
WAIT_IF = 1 << 4
WAIT_SW = 1 << 5
WAIT_FN = 1 << 6
WAIT_DATA_SHIFT = 32
_DRAIN = IOTLB_DRAIN_WRITES | IOTLB_DRAIN_READS


def inv_context_global() -> Descriptor:
    """Context-cache invalidate, global (6.5.2.1)."""
    return INV_CONTEXT | G_GLOBAL << INV_G_SHIFT, 0, 0, 0


def inv_context_domain(domain_id: int) -> Descriptor:
    """Context-cache invalidate, domain-selective (6.5.2.1)."""
    return INV_CONTEXT | G_DOMAIN << INV_G_SHIFT | _did_field(domain_id) << INV_DID_SHIFT, 0, 0, 0


def inv_context_device(domain_id: int, bdf: int, fm: int = 0) -> Descriptor:
    """Context-cache invalidate, device-selective (6.5.2.1); ``fm`` masks the low function bits, 0 = none."""
    if not 0 <= bdf <= 0xFFFF or not 0 <= fm <= 3:
        raise ValueError(f"source id {bdf:#x} or function mask {fm} does not fit its field")
    w = INV_CONTEXT | G_DEVICE << INV_G_SHIFT | _did_field(domain_id) << INV_DID_SHIFT
    return w | bdf << INV_SID_SHIFT | fm << INV_FM_SHIFT, 0, 0, 0


def inv_pasid_cache(domain_id: int, granularity: int = PC_DOMAIN, pasid: int = 0) -> Descriptor:
    """PASID-cache invalidate: PC_DOMAIN, PC_PASID or PC_GLOBAL (6.5.2.2)."""
    w = INV_PASID_CACHE | granularity << INV_G_SHIFT | _did_field(domain_id) << INV_DID_SHIFT
    return w | (pasid & RID_PASID_MASK) << INV_PASID_SHIFT, 0, 0, 0


def inv_iotlb_global() -> Descriptor:
    """IOTLB invalidate, global, reads and writes drained (6.5.2.3)."""
    return INV_IOTLB | G_GLOBAL << INV_G_SHIFT | _DRAIN, 0, 0, 0


def inv_iotlb_domain(domain_id: int) -> Descriptor:
    """IOTLB invalidate, domain-selective, reads and writes drained (6.5.2.3)."""
    return INV_IOTLB | G_DOMAIN << INV_G_SHIFT | _DRAIN | _did_field(domain_id) << INV_DID_SHIFT, 0, 0, 0


def inv_iotlb_pages(domain_id: int, iova: int, am: int, *, ih: bool = False) -> Descriptor:
    """IOTLB invalidate, page-selective within a domain, reads and writes drained (6.5.2.3).

    :param iova: aligned to the 2**am pages of 4096 bytes.
    :param ih: invalidation hint: only leaves have changed, no item that points to a table.
    """
    lo = INV_IOTLB | G_PAGES << INV_G_SHIFT | _DRAIN | _did_field(domain_id) << INV_DID_SHIFT
    return lo, _pages_word(iova, am, ih), 0, 0


def inv_piotlb_pasid(domain_id: int, pasid: int = 0) -> Descriptor:
    """PASID-based IOTLB invalidate of all of a PASID (6.5.2.4): first stage, scalable mode."""
    w = INV_PASID_IOTLB | PIOTLB_PASID << INV_G_SHIFT | _did_field(domain_id) << INV_DID_SHIFT
    return w | (pasid & RID_PASID_MASK) << INV_PASID_SHIFT, 0, 0, 0


def inv_piotlb_pages(domain_id: int, iova: int, am: int, pasid: int = 0, *, ih: bool = False) -> Descriptor:
    """PASID-based IOTLB invalidate, page-selective within a PASID (6.5.2.4)."""
    w = INV_PASID_IOTLB | PIOTLB_PAGES << INV_G_SHIFT | _did_field(domain_id) << INV_DID_SHIFT
    return w | (pasid & RID_PASID_MASK) << INV_PASID_SHIFT, _pages_word(iova, am, ih), 0, 0


def inv_wait(status_pa: int, status_data: int, *, fence: bool = False) -> Descriptor:
    """Invalidation wait (6.5.2.8): u32 ``status_data`` is stored at the 4-byte aligned ``status_pa``."""
    if status_pa & 3 or not 0 <= status_pa < 1 << HAW or not 0 <= status_data < 1 << 32:
        raise ValueError(f"wait status pa {status_pa:#x} or data {status_data:#x} does not fit its field")
    return INV_WAIT | WAIT_SW | (WAIT_FN if fence else 0) | status_data << WAIT_DATA_SHIFT, status_pa, 0, 0


def _pages_word(iova: int, am: int, ih: bool) -> int:
    if not 0 <= am <= INV_AM_MASK or iova & ((4096 << am) - 1) or not 0 <= iova <= _WORD:
        raise ValueError(f"iova {iova:#x} is not aligned to 2**{am} pages")
    return iova | (INV_IH if ih else 0) | am


def page_mask(start: int, last: int, max_am: int) -> tuple[int, int] | None:
    """Smallest aligned block of 2**am pages that covers the closed range: (iova, am); None: more than max_am.

    None means that a domain-selective invalidation is the right one (CAP_REG.MAMV, specification chapter 11).
    """
    am = ((start >> 12) ^ (last >> 12)).bit_length()
    if am > max_am:
        return None
    return start >> 12 >> am << am << 12, am


def descriptor_bytes(descriptor: Descriptor, *, wide: bool) -> bytes:
    """As stored in the queue: 32 bytes with IQA_REG.DW (``wide``), else 16 bytes.

    :raises ValueError: a descriptor with a third or fourth word in a narrow queue.
    """
    if not wide and any(descriptor[2:]):
        raise ValueError("a 128-bit descriptor has no third and fourth word")
    return b"".join(w.to_bytes(8, "little") for w in (descriptor if wide else descriptor[:2]))


@dataclass(frozen=True, slots=True)
class Invalidation:
    """A decoded descriptor.

    ``kind`` is the type field; ``granularity``, ``domain_id``, ``source_id``, ``function_mask``, ``pasid``,
    ``start`` and ``last`` (iova, closed) hold what that type says. ``status_pa``: None if nothing is written.
    """

    kind: int
    granularity: int = 0
    domain_id: int = 0
    source_id: int = 0
    function_mask: int = 0
    pasid: int = 0
    start: int = 0
    last: int = _WORD
    status_pa: int | None = None
    status_data: int = 0


@dataclass(frozen=True, slots=True)
class _Rule:
    """Reserved bits of word 0 and word 1, and the legal granularities, of a descriptor type."""

    reserved: tuple[int, int]
    granularities: tuple[int, ...] = field(default=())


def _bits(*ranges: tuple[int, int]) -> int:
    return sum(((1 << (high - low + 1)) - 1) << low for high, low in ranges)


# Bits [11:9] extend the type (specification 6.5.2); no known type uses them here, so they count as reserved.
_RULES = {
    INV_CONTEXT: _Rule((_bits((63, 50), (15, 6)), _WORD), (G_GLOBAL, G_DOMAIN, G_DEVICE)),
    INV_IOTLB: _Rule((_bits((63, 32), (15, 8)), _bits((11, 7))), (G_GLOBAL, G_DOMAIN, G_PAGES)),
    INV_WAIT: _Rule((_bits((31, 8)), 3)),
    INV_PASID_IOTLB: _Rule((_bits((63, 52), (15, 6)), _bits((11, 7))), (PIOTLB_PASID, PIOTLB_PAGES)),
    INV_PASID_CACHE: _Rule((_bits((63, 52), (15, 6)), _WORD), (PC_DOMAIN, PC_PASID, PC_GLOBAL)),
}


def decode_descriptor(words: tuple[int, ...]) -> Invalidation | None:
    """Decode 2 or 4 words from the queue; None where hardware reports an invalidation queue error (6.5.2)."""
    w0, w1 = words[0], words[1]
    kind = w0 & 0xF
    rule = _RULES.get(kind)
    if rule is None or w0 & rule.reserved[0] or w1 & rule.reserved[1] or any(words[2:]):
        return None
    if kind == INV_WAIT:
        if not w0 & WAIT_SW:
            return Invalidation(kind)
        return Invalidation(kind, status_pa=w1, status_data=w0 >> WAIT_DATA_SHIFT)
    granularity = w0 >> INV_G_SHIFT & 3
    if granularity not in rule.granularities:
        return None
    did = w0 >> INV_DID_SHIFT & DID_MASK
    if kind == INV_CONTEXT:
        sid, fm = w0 >> INV_SID_SHIFT & 0xFFFF, w0 >> INV_FM_SHIFT & 3
        return Invalidation(kind, granularity, did, source_id=sid, function_mask=fm)
    pasid = w0 >> INV_PASID_SHIFT & RID_PASID_MASK if kind != INV_IOTLB else 0
    if kind == INV_PASID_CACHE or granularity != G_PAGES:
        return Invalidation(kind, granularity, did, pasid=pasid)
    span = 4096 << (w1 & INV_AM_MASK)
    start = w1 & ~0xFFF & ~(span - 1)
    return Invalidation(kind, granularity, did, pasid=pasid, start=start, last=min(start + span - 1, _WORD))
