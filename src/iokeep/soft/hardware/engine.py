# SPDX-License-Identifier: Apache-2.0
"""The compiled half of the IOMMU and of the DMA devices: find the table, walk it, move payloads, check them.

The only module of this package that imports Numba. Every value that is a pa, an IOVA, an entry or a counter
is uint64, literals included: Numba silently turns uint64 mixed with a signed integer into int64 or float64.
Plain ints only index. All of it also runs as plain Python (``NUMBA_DISABLE_JIT=1``), where the caller
silences NumPy's warnings about wrapping multiplications.

Physical memory is shared with a kernel that writes to it at the same time. One item is loaded by one aligned
64-bit load, which the machine does in one piece, and is used from a local after that; it is never loaded
twice.
"""

# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"
# Compiled functions: their types are those of BURST_SIGNATURE and what follows from it.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types

from iokeep.mem.memory import U64
from iokeep.pt.formats import base
from iokeep.pt.roots import vtd
from iokeep.pt.roots.vtd import FaultReason
from iokeep.soft.hardware import bar
from iokeep.soft.hardware import unit as unit_words
from iokeep.soft.hardware.units import vtd as registers


def _jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile with an on-disk cache; without one where no place for it can be written."""
    compiled: Any
    try:
        compiled = numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # "cannot cache function: no locator available"
        compiled = numba.njit(nogil=True)(function)
    return compiled  # type: ignore[no-any-return]


u64 = np.uint64

_0 = u64(0)
_1 = u64(1)
_2 = u64(2)
_3 = u64(3)
_4 = u64(4)
_5 = u64(5)
_6 = u64(6)
_7 = u64(7)
_8 = u64(8)
_12 = u64(12)
_16 = u64(16)
_32 = u64(32)
_40 = u64(40)
_52 = u64(52)
_63 = u64(63)
_PAGE_OFFSET = u64(0xFFF)
_PAGE_MASK = u64(2**64 - 4096)
_LOW32 = u64(2**32 - 1)

# -- fields of the structures, from pt.roots.vtd ---------------------------------------------------
_PA = u64(vtd.PA_MASK)
_PRESENT = u64(vtd.PRESENT)
_ROOT_RESERVED = u64(vtd.ROOT_RESERVED)
_FPD = u64(vtd.FPD)
_TT_MASK = u64(vtd.CONTEXT_TT_MASK)
_CTX_LO_RESERVED = u64(vtd.CONTEXT_LO_RESERVED)
_CTX_HI_RESERVED = u64(vtd.CONTEXT_HI_RESERVED)
_CTX_AW = u64(vtd.CONTEXT_AW_MASK)
_CTX_DID_SHIFT = u64(vtd.CONTEXT_DID_SHIFT)
_DID = u64(vtd.DID_MASK)
_SM_LO_RESERVED = u64(vtd.SM_CONTEXT_LO_RESERVED)
_SM_HI_RESERVED = u64(vtd.SM_CONTEXT_HI_RESERVED)
_SM_DTE = u64(vtd.SM_CONTEXT_DTE)
_PDTS_MASK = u64(vtd.SM_CONTEXT_PDTS_MASK)
_PDTS_SHIFT = u64(vtd.SM_CONTEXT_PDTS_SHIFT)
_RID_PASID = u64(vtd.RID_PASID_MASK)
_DIR_RESERVED = u64(vtd.PASID_DIR_RESERVED)
_PASID_0_RESERVED = u64(vtd.PASID_0_RESERVED)
_PASID_1_RESERVED = u64(vtd.PASID_1_RESERVED)
_PASID_2_RESERVED = u64(vtd.PASID_2_RESERVED)
_PGTT_MASK = u64(vtd.PASID_PGTT_MASK)
_PGTT_FIRST = u64(vtd.PGTT_FIRST_STAGE << vtd.PASID_PGTT_SHIFT)
_PGTT_SECOND = u64(vtd.PGTT_SECOND_STAGE << vtd.PASID_PGTT_SHIFT)
_PASID_AW_MASK = u64(vtd.PASID_AW_MASK)
_PASID_AW_SHIFT = u64(vtd.PASID_AW_SHIFT)
_FSPM_MASK = u64(vtd.PASID_FSPM_MASK)
_FSPM_SHIFT = u64(vtd.PASID_FSPM_SHIFT)
_TTM_MASK = u64(vtd.RTADDR_TTM_MASK)
_TTM_LEGACY = u64(vtd.TTM_LEGACY << vtd.RTADDR_TTM_SHIFT)
_TTM_SCALABLE = u64(vtd.TTM_SCALABLE << vtd.RTADDR_TTM_SHIFT)

# -- fault reasons ---------------------------------------------------------------------------------
_R_UNTRANSLATED = u64(0x100)  # ours, above the 8 bits of FRCD_REG.FR: translation is disabled
UNTRANSLATED = 0x100
_R = {reason.name: u64(int(reason)) for reason in FaultReason}
_R_ROOT_P = _R["ROOT_NOT_PRESENT"]
_R_CTX_P = _R["CONTEXT_NOT_PRESENT"]
_R_CTX_INVALID = _R["CONTEXT_INVALID"]
_R_WIDTH = _R["BEYOND_WIDTH"]
_R_NO_WRITE = _R["NO_WRITE"]
_R_NO_READ = _R["NO_READ"]
_R_PAGING_ACCESS = _R["PAGING_ACCESS"]
_R_ROOT_ACCESS = _R["ROOT_ACCESS"]
_R_CTX_ACCESS = _R["CONTEXT_ACCESS"]
_R_ROOT_RSVD = _R["ROOT_RESERVED"]
_R_CTX_RSVD = _R["CONTEXT_RESERVED"]
_R_PAGING_RSVD = _R["PAGING_RESERVED"]
_R_SM_TABLE = _R["SM_ROOT_TABLE_INVALID"]
_R_SM_ROOT_ACCESS = _R["SM_ROOT_ACCESS"]
_R_SM_ROOT_P = _R["SM_ROOT_NOT_PRESENT"]
_R_SM_ROOT_RSVD = _R["SM_ROOT_RESERVED"]
_R_SM_CTX_ACCESS = _R["SM_CONTEXT_ACCESS"]
_R_SM_CTX_P = _R["SM_CONTEXT_NOT_PRESENT"]
_R_SM_CTX_RSVD = _R["SM_CONTEXT_RESERVED"]
_R_SM_CTX_INVALID = _R["SM_CONTEXT_INVALID"]
_R_SM_RID_PASID = _R["SM_RID_PASID_TOO_LARGE"]
_R_SM_DIR_ACCESS = _R["SM_PASID_DIR_ACCESS"]
_R_SM_DIR_P = _R["SM_PASID_DIR_NOT_PRESENT"]
_R_SM_DIR_RSVD = _R["SM_PASID_DIR_RESERVED"]
_R_SM_PASID_ACCESS = _R["SM_PASID_ACCESS"]
_R_SM_PASID_P = _R["SM_PASID_NOT_PRESENT"]
_R_SM_PASID_RSVD = _R["SM_PASID_RESERVED"]
_R_SM_PASID_INVALID = _R["SM_PASID_INVALID"]
_R_SM_FIRST_ACCESS = _R["SM_FIRST_ACCESS"]
_R_SM_FIRST_P = _R["SM_FIRST_NOT_PRESENT"]
_R_SM_FIRST_RSVD = _R["SM_FIRST_RESERVED"]
_R_SM_SECOND_ACCESS = _R["SM_SECOND_ACCESS"]
_R_SM_SECOND_RSVD = _R["SM_SECOND_RESERVED"]
_R_SM_CANONICAL = _R["SM_NOT_CANONICAL"]
_R_SM_WIDTH = _R["SM_SECOND_BEYOND_WIDTH"]
_R_SM_NO_WRITE = _R["SM_NO_WRITE"]
_R_SM_NO_READ = _R["SM_NO_READ"]

# -- what went wrong in a walk, before it becomes a reason -----------------------------------------
_OK = u64(0)
_W_ACCESS = u64(1)
_W_NOT_PRESENT = u64(2)
_W_RESERVED = u64(3)
_W_DENIED = u64(4)
_W_WIDTH = _5

# -- format table: row = kind ----------------------------------------------------------------------
#: second stage of 3, 4, 5 levels, then first stage of 4, 5 levels
KINDS = (("vtdss", 3), ("vtdss", 4), ("vtdss", 5), ("x86_64", 4), ("x86_64", 5))
_FIRST_KIND = u64(3)  # rows from here on are first stage
_NO_KIND = u64(99)
MAX_LEVELS = 6
#: columns of the kind table
(K_LEVELS, K_INPUT_LG2, K_SIGN_EXTEND) = range(3)
KIND_WORDS = 4

# -- state of a front-end, uint64[UNIT_WORDS] ------------------------------------------------------
(
    C_VALID, C_KIND, C_ROOT, C_DID, C_PASID, C_FPD, C_SCALABLE, C_BDF, C_INDEX, T_LEVELS, T_VICTIM, C_LOOKUPS,
) = range(12)  # fmt: skip
UNIT_WORDS = 16

# -- IOTLB, uint64[4, TLB_ENTRIES]: tag, pa | rights, owner, log2 of the page size -----------------
# owner: domain id | pasid << 16 | OWNER_FIRST where a first-stage table translated
OWNER_FIRST = 1 << 40
TLB_SETS = 256
TLB_WAYS = 4
TLB_ENTRIES = TLB_SETS * TLB_WAYS
_OWNER_FIRST = u64(OWNER_FIRST)
_SET_MASK = u64(TLB_SETS - 1)
_WAYS = u64(TLB_WAYS)
_WAY_MASK = u64(TLB_WAYS - 1)
_LEVEL_SHIFT = u64(1)  # tag: base | level << 1 | 1

# -- words of the register bank --------------------------------------------------------------------
_ROOT_WORD = registers.HIDDEN_ROOT >> 3
_GSTS_WORD = registers.DMAR_GSTS_REG >> 3
_TES = u64(registers.DMA_GSTS_TES << 32)  # GSTS_REG is the high half of its word
_FRCD_WORD = registers.DMAR_FRCD_REG >> 3
_FRCD_F = u64(registers.FRCD_F)
_FRCD_READ = u64(registers.FRCD_READ)
_REASON_SHIFT = u64(registers.FRCD_REASON_SHIFT)
FE_PFO = unit_words.FE_OVERFLOW
FE_FAULTS = unit_words.FE_FAULTS
FE_HITS = unit_words.FE_HITS
FE_MISSES = unit_words.FE_MISSES

# -- state of a DMA engine, uint64[DMA_WORDS] ------------------------------------------------------
(
    D_RNG, D_SEQUENCE, D_SWEEP, D_CURSOR, D_PAGES, D_STAMP, D_LINE, D_STEP, D_LOGGED, D_REASON, D_IOVA,
    D_DONE,
) = range(12)  # fmt: skip
DMA_WORDS = 16

# -- private range table, uint64[n, RANGE_WORDS] ---------------------------------------------------
# G_FIRST: number of the first ticket; a plain range has one ticket per page, a probed one may have fewer
(G_IOVA, G_SLOT, G_TAG, G_FLAGS, G_FIRST, G_PAGES) = range(6)
RANGE_WORDS = 6
_READ = u64(bar.RANGE_READ)
_WRITE = u64(bar.RANGE_WRITE)
_EXPECT = u64(bar.RANGE_EXPECT_FAULT)
_LOG_ROWS = u64(bar.LOG_ROWS)
_I_FAULT = u64(bar.INCIDENT_FAULT)
_I_LOST = u64(bar.INCIDENT_LOST)
_I_TAG = u64(bar.INCIDENT_TAG)
_I_CONTENT = u64(bar.INCIDENT_CONTENT)
_I_LEAK = u64(bar.INCIDENT_LEAK)
_I_UNTRANSLATED = u64(bar.INCIDENT_UNTRANSLATED)
_I_NO_MEMORY = u64(bar.INCIDENT_NO_MEMORY)

#: first word of a payload, xor-ed with the device index
STAMP_MAGIC = int.from_bytes(b"iokeepPL", "little")
_PROBE = u64(1 << 63)  # in the slot word of what a probe wrote that had to fault
_MIX_1 = u64(0x9E3779B97F4A7C15)
_MIX_2 = u64(0xBF58476D1CE4E5B9)
_27 = u64(27)
_31 = u64(31)
_13 = u64(13)
_17 = u64(17)
_LINE = u64(bar.LINE_BYTES)


@_jit
def mix(x):
    """A bijection of 64-bit words that scatters them (a step of splitmix64)."""
    x = (x ^ (x >> _31)) * _MIX_1
    x = (x ^ (x >> _27)) * _MIX_2
    return x ^ (x >> _31)


@_jit
def second_stage_kind(aw):
    """Row of KINDS of an AW code: 1, 2, 3 are 3, 4, 5 levels (specification 9.3)."""
    if aw == _0 or aw > _3:
        return _NO_KIND
    return aw - _1


@_jit
def resolve(ram, bank, unit):
    """Fill the context cache from the latched root table; returns the fault reason, 0 = fine.

    The same rules as :func:`iokeep.pt.roots.vtd.find_root`, for an IOMMU without pass-through, nesting and
    device-TLBs (ECAP_REG.PT, NEST, DT are 0), which makes those programmings invalid.
    """
    words = u64(ram.size)
    bdf = unit[C_BDF]
    unit[C_LOOKUPS] = unit[C_LOOKUPS] + _1
    unit[C_FPD] = _0
    rtaddr = bank[_ROOT_WORD]
    ttm = rtaddr & _TTM_MASK
    if ttm != _TTM_LEGACY and ttm != _TTM_SCALABLE:
        return _R_SM_TABLE
    at = ((rtaddr & _PA) >> _3) + (bdf >> _8) * _2
    if at + _1 >= words:
        return _R_ROOT_ACCESS if ttm == _TTM_LEGACY else _R_SM_ROOT_ACCESS
    if ttm == _TTM_LEGACY:
        unit[C_SCALABLE] = _0
        lo = ram[at]
        hi = ram[at + _1]
        if lo & _PRESENT == _0:
            return _R_ROOT_P
        if lo & _ROOT_RESERVED != _0 or hi != _0:
            return _R_ROOT_RSVD
        at = ((lo & _PA) >> _3) + (bdf & u64(0xFF)) * _2
        if at + _1 >= words:
            return _R_CTX_ACCESS
        lo = ram[at]
        hi = ram[at + _1]
        unit[C_FPD] = lo & _FPD
        if lo & _PRESENT == _0:
            return _R_CTX_P
        if lo & _CTX_LO_RESERVED != _0 or hi & _CTX_HI_RESERVED != _0:
            return _R_CTX_RSVD
        kind = second_stage_kind(hi & _CTX_AW)
        if lo & _TT_MASK != _0 or kind == _NO_KIND:
            return _R_CTX_INVALID
        unit[C_KIND] = kind
        unit[C_ROOT] = lo & _PA
        unit[C_DID] = (hi >> _CTX_DID_SHIFT) & _DID
        unit[C_PASID] = _0
        unit[C_VALID] = _1
        return _OK
    unit[C_SCALABLE] = _1
    half = ram[at + ((bdf >> _7) & _1)]
    if half & _PRESENT == _0:
        return _R_SM_ROOT_P
    if half & _ROOT_RESERVED != _0:
        return _R_SM_ROOT_RSVD
    at = ((half & _PA) >> _3) + (bdf & u64(0x7F)) * _4
    if at + _3 >= words:
        return _R_SM_CTX_ACCESS
    w0 = ram[at]
    w1 = ram[at + _1]
    unit[C_FPD] = w0 & _FPD
    if w0 & _PRESENT == _0:
        return _R_SM_CTX_P
    if w0 & _SM_LO_RESERVED != _0 or w1 & _SM_HI_RESERVED != _0 or (ram[at + _2] | ram[at + _3]) != _0:
        return _R_SM_CTX_RSVD
    if w0 & _SM_DTE != _0:
        return _R_SM_CTX_INVALID
    pasid = w1 & _RID_PASID
    entries = _1 << (((w0 & _PDTS_MASK) >> _PDTS_SHIFT) + _7)
    if (pasid >> _6) >= entries:
        return _R_SM_RID_PASID
    at = ((w0 & _PA) >> _3) + (pasid >> _6)
    if at >= words:
        return _R_SM_DIR_ACCESS
    entry = ram[at]
    unit[C_FPD] = unit[C_FPD] | (entry & _FPD)
    if entry & _PRESENT == _0:
        return _R_SM_DIR_P
    if entry & _DIR_RESERVED != _0:
        return _R_SM_DIR_RSVD
    at = ((entry & _PA) >> _3) + (pasid & _63) * _8
    if at + _7 >= words:
        return _R_SM_PASID_ACCESS
    w0 = ram[at]
    w1 = ram[at + _1]
    w2 = ram[at + _2]
    rest = ram[at + _3] | ram[at + _4] | ram[at + _5] | ram[at + _6] | ram[at + _7]
    unit[C_FPD] = unit[C_FPD] | (w0 & _FPD)
    if w0 & _PRESENT == _0:
        return _R_SM_PASID_P
    if (w0 & _PASID_0_RESERVED) | (w1 & _PASID_1_RESERVED) | (w2 & _PASID_2_RESERVED) | rest != _0:
        return _R_SM_PASID_RSVD
    pgtt = w0 & _PGTT_MASK
    if pgtt == _PGTT_SECOND:
        kind = second_stage_kind((w0 & _PASID_AW_MASK) >> _PASID_AW_SHIFT)
        root = w0 & _PA
    elif pgtt == _PGTT_FIRST:
        kind = _FIRST_KIND + ((w2 & _FSPM_MASK) >> _FSPM_SHIFT)
        if kind > _FIRST_KIND + _1:
            kind = _NO_KIND
        root = w2 & _PA
    else:
        kind = _NO_KIND
        root = _0
    if kind == _NO_KIND:
        return _R_SM_PASID_INVALID
    unit[C_KIND] = kind
    unit[C_ROOT] = root
    unit[C_DID] = w1 & _DID
    unit[C_PASID] = pasid
    unit[C_VALID] = _1
    return _OK


@_jit
def walk(ram, formats, kinds, kind, root, iova, need):
    """Walk a table: (outcome, pa, level, rights); all uint64.

    :param formats: uint64[kinds, MAX_LEVELS, columns], :meth:`Format.words` of each kind.
    :param need: rights that the request needs: 1 read, 2 write.
    """
    row = np.int64(kind)
    bits = kinds[row, K_INPUT_LG2]
    if kinds[row, K_SIGN_EXTEND] != _0:
        # Specification 3.6 (first stage): the bits above the input equal its top bit.
        top = iova >> (bits - _1)
        if top != _0 and top != (u64(2**64 - 1) >> (bits - _1)):
            return _W_WIDTH, _0, _0, _0
    elif (iova >> bits) != _0:
        return _W_WIDTH, _0, _0, _0
    words = u64(ram.size)
    table = root
    rights = _3
    level = np.int64(kinds[row, K_LEVELS])
    while level > 0:
        level -= 1
        f = formats[row, level]
        shift = f[base.SHIFT]
        at = (table >> _3) + ((iova >> shift) & f[base.INDEX_MASK])
        if at >= words:
            return _W_ACCESS, _0, u64(level), _0
        item = ram[at]
        if item & f[base.VALID_MASK] == _0:
            return _W_NOT_PRESENT, _0, u64(level), _0
        if f[base.MAY_LEAF] != _0 and (
            f[base.MAY_TABLE] == _0 or item & f[base.LEAF_MASK] == f[base.LEAF_VALUE]
        ):
            if item & f[base.LEAF_RESERVED] != _0:
                return _W_RESERVED, _0, u64(level), _0
            if item & f[base.R_MASK] != f[base.R_VALUE]:
                rights = rights & _2
            if item & f[base.W_MASK] != f[base.W_VALUE]:
                rights = rights & _1
            if rights & need != need:
                return _W_DENIED, _0, u64(level), rights
            pa = (item & f[base.LEAF_PA_MASK]) | (iova & ((_1 << shift) - _1))
            return _OK, pa, u64(level), rights
        if f[base.MAY_TABLE] == _0 or item & f[base.TABLE_RESERVED] != _0:
            return _W_RESERVED, _0, u64(level), _0
        if item & f[base.TR_MASK] != f[base.TR_VALUE]:
            rights = rights & _2
        if item & f[base.TW_MASK] != f[base.TW_VALUE]:
            rights = rights & _1
        table = item & f[base.TABLE_PA_MASK]
    return _W_RESERVED, _0, _0, _0


@_jit
def fault_reason(outcome, kind, scalable, need):
    """Fault reason of a walk's outcome (specification 7.1.3)."""
    write = need & _2 != _0
    if scalable == _0:
        if outcome == _W_ACCESS:
            return _R_PAGING_ACCESS
        if outcome == _W_RESERVED:
            return _R_PAGING_RSVD
        if outcome == _W_WIDTH:
            return _R_WIDTH
        return _R_NO_WRITE if write else _R_NO_READ
    first = kind >= _FIRST_KIND
    if outcome == _W_ACCESS:
        return _R_SM_FIRST_ACCESS if first else _R_SM_SECOND_ACCESS
    if outcome == _W_RESERVED:
        return _R_SM_FIRST_RSVD if first else _R_SM_SECOND_RSVD
    if outcome == _W_WIDTH:
        return _R_SM_CANONICAL if first else _R_SM_WIDTH
    if outcome == _W_NOT_PRESENT and first:
        return _R_SM_FIRST_P
    return _R_SM_NO_WRITE if write else _R_SM_NO_READ


@_jit
def translate(ram, bank, fe, unit, tlb, formats, kinds, iova, need):
    """Translate one request as a front-end does, through its caches: (fault reason, pa); reason 0 = fine."""
    if bank[_GSTS_WORD] & _TES == _0:
        return _R_UNTRANSLATED, _0
    if unit[C_VALID] == _0:
        reason = resolve(ram, bank, unit)
        if reason != _OK:
            return reason, _0
    kind = unit[C_KIND]
    owner = unit[C_DID] | (unit[C_PASID] << _16)
    if kind >= _FIRST_KIND:
        owner = owner | _OWNER_FIRST
    f = formats[np.int64(kind)]
    cached = unit[T_LEVELS]
    number = 0
    while cached != _0:
        if cached & _1 != _0:
            shift = f[number, base.SHIFT]
            tag = ((iova >> shift) << shift) | (u64(number) << _LEVEL_SHIFT) | _1
            at = np.int64(((iova >> shift) & _SET_MASK) * _WAYS)
            for way in range(at, at + TLB_WAYS):
                if tlb[0, way] == tag and tlb[2, way] == owner:
                    found = tlb[1, way]
                    if found & need == need:
                        fe[FE_HITS] = fe[FE_HITS] + _1
                        return _OK, (found & _PAGE_MASK) | (iova & ((_1 << shift) - _1))
                    # Rights may have been added since, which needs no invalidation: look again.
                    tlb[0, way] = _0
        cached = cached >> _1
        number += 1
    fe[FE_MISSES] = fe[FE_MISSES] + _1
    outcome, pa, level, rights = walk(ram, formats, kinds, kind, unit[C_ROOT], iova, need)
    if outcome != _OK:
        return fault_reason(outcome, kind, unit[C_SCALABLE], need), _0
    shift = f[np.int64(level), base.SHIFT]
    base_iova = (iova >> shift) << shift
    victim = unit[T_VICTIM]
    unit[T_VICTIM] = victim + _1
    slot = np.int64(((iova >> shift) & _SET_MASK) * _WAYS + (victim & _WAY_MASK))
    tlb[0, slot] = base_iova | (level << _LEVEL_SHIFT) | _1
    tlb[1, slot] = ((pa >> shift) << shift) | rights
    tlb[2, slot] = owner
    tlb[3, slot] = shift
    unit[T_LEVELS] = unit[T_LEVELS] | (_1 << level)
    return _OK, pa


@_jit
def record_fault(bank, fe, unit, reason, iova, need):
    """Primary fault logging (specification 7.2.1), in the record of this front-end."""
    fe[FE_FAULTS] = fe[FE_FAULTS] + _1
    if unit[C_FPD] != _0:
        return
    at = _FRCD_WORD + 2 * np.int64(unit[C_INDEX])
    if bank[at + 1] & _FRCD_F != _0:
        fe[FE_PFO] = _1
        return
    bank[at] = iova & _PAGE_MASK
    high = unit[C_BDF] | (reason << _REASON_SHIFT) | _FRCD_F
    if need & _2 == _0:
        high = high | _FRCD_READ
    bank[at + 1] = high


@_jit
def note(log, dma, kind, iova, pa, want_tag, has_tag, reason, slot, want_seq, has_seq):
    """Put an incident into the log of the BAR, as long as there is room."""
    number = dma[D_LOGGED]
    dma[D_LOGGED] = number + _1
    if number < _LOG_ROWS:
        row = log[np.int64(number)]
        row[0] = kind | (dma[D_STEP] << _8)
        row[1] = iova
        row[2] = pa
        row[3] = want_tag | (has_tag << _32)
        row[4] = reason
        row[5] = slot
        row[6] = want_seq
        row[7] = has_seq


@_jit
def burst(ram, tags, bank, fe, unit, tlb, formats, kinds, ranges, shadow, dma, row, log, count):
    """Do up to ``count`` (int64) DMA transactions; returns how many were tried.

    Normal mode: a random page of the working set each time. Sweep mode (``dma[D_SWEEP]``): every page from
    ``dma[D_CURSOR]`` on once, reads of written slots only.

    :param ram: uint64[:], physical memory. :param tags: uint32[:], owner of each frame.
    :param bank: VT-d registers. :param fe: hidden registers of the front-end. :param unit: its private state.
    :param tlb: uint64[4, TLB_ENTRIES]. :param formats: see :func:`walk`. :param kinds: uint64[:, KIND_WORDS].
    :param ranges: uint64[n, RANGE_WORDS], n > 0. :param shadow: uint64[:], sequence last written to each
        slot.
    :param dma: uint64[DMA_WORDS]. :param row: uint64[STATS_WORDS], the counters of this step.
    :param log: uint64[LOG_ROWS, LOG_WORDS].
    """
    words = u64(ram.size)
    pages = dma[D_PAGES]
    rng = dma[D_RNG]
    sequence = dma[D_SEQUENCE]
    stamp = dma[D_STAMP]
    line = dma[D_LINE]
    sweep = dma[D_SWEEP] != _0
    page = dma[D_CURSOR]
    reads = _0
    writes = _0
    faults = _0
    lost = _0
    misdirected = _0
    denied = _0
    leaks = _0
    untranslated = _0
    tried = 0
    while tried < count:
        if sweep:
            if page >= pages:
                break
        else:
            rng = rng ^ (rng << _13)
            rng = rng ^ (rng >> _7)
            rng = rng ^ (rng << _17)
            page = ((rng >> _32) * pages) >> _32
        tried += 1
        low = 0
        high = ranges.shape[0]
        while high - low > 1:
            middle = (low + high) >> 1
            if ranges[middle, G_FIRST] <= page:
                low = middle
            else:
                high = middle
        r = ranges[low]
        offset = page - r[G_FIRST]
        flags = r[G_FLAGS]
        expect = flags & _EXPECT != _0
        slot = r[G_SLOT] + offset
        if expect:
            slot = _0
            if not sweep:
                offset = ((mix(rng) >> _32) * r[G_PAGES]) >> _32
        iova = r[G_IOVA] + (offset << _12) + line
        need = flags & _3
        if sweep:
            page = page + _1
            if expect or need & _READ == _0 or shadow[slot] == _0:
                continue
            need = _READ
        elif need == _3:
            need = _1 + (rng & _1)
        reason, pa = translate(ram, bank, fe, unit, tlb, formats, kinds, iova, need)
        if reason != _OK:
            if reason == _R_UNTRANSLATED:
                untranslated = untranslated + _1
                misdirected = misdirected + _1
                note(log, dma, _I_UNTRANSLATED, iova, iova, r[G_TAG], _0, reason, slot, _0, _0)
                continue
            record_fault(bank, fe, unit, reason, iova, need)
            if expect:
                denied = denied + _1
            else:
                faults = faults + _1
                dma[D_REASON] = reason
                dma[D_IOVA] = iova
                note(log, dma, _I_FAULT, iova, _0, r[G_TAG], _0, reason, slot, _0, _0)
            continue
        at = pa >> _3
        if at + _7 >= words:
            misdirected = misdirected + _1
            note(log, dma, _I_NO_MEMORY, iova, pa, r[G_TAG], _0, _0, slot, _0, _0)
            continue
        owner = u64(tags[pa >> _12])
        wrong = _0
        if owner != r[G_TAG]:
            wrong = _I_TAG
        if expect:
            leaks = leaks + _1
            wrong = _I_LEAK
        if need == _2:
            sequence = sequence + _1
            mark = slot
            if expect:
                mark = slot | _PROBE
            else:
                shadow[slot] = sequence
            check = mix(stamp ^ mix(mark ^ mix(sequence)))
            # A DMA that is wrong is done all the same: that is the damage.
            ram[at] = stamp
            ram[at + _1] = mark
            ram[at + _2] = sequence
            ram[at + _3] = check
            ram[at + _4] = check + _1
            ram[at + _5] = check + _2
            ram[at + _6] = check + _3
            ram[at + _7] = check + _4
            writes = writes + _1
            if wrong != _0:
                misdirected = misdirected + _1
                note(log, dma, wrong, iova, pa, r[G_TAG], owner, _0, slot, sequence, _0)
            continue
        reads = reads + _1
        want = shadow[slot]
        if wrong == _0 and want != _0:
            check = mix(stamp ^ mix(slot ^ mix(want)))
            has = ram[at + _2]
            bad = (ram[at] ^ stamp) | (ram[at + _1] ^ slot) | (has ^ want)
            bad = bad | (ram[at + _3] ^ check) | (ram[at + _4] ^ (check + _1)) | (ram[at + _5] ^ (check + _2))
            bad = bad | (ram[at + _6] ^ (check + _3)) | (ram[at + _7] ^ (check + _4))
            if bad != _0:
                old = mix(stamp ^ mix(slot ^ mix(has)))
                if ram[at] == stamp and ram[at + _1] == slot and has < want and ram[at + _3] == old:
                    lost = lost + _1
                    note(log, dma, _I_LOST, iova, pa, r[G_TAG], owner, _0, slot, want, has)
                else:
                    misdirected = misdirected + _1
                    note(log, dma, _I_CONTENT, iova, pa, r[G_TAG], owner, _0, slot, want, has)
        elif wrong != _0:
            misdirected = misdirected + _1
            note(log, dma, wrong, iova, pa, r[G_TAG], owner, _0, slot, want, _0)
    dma[D_RNG] = rng
    dma[D_SEQUENCE] = sequence
    dma[D_DONE] = reads + writes
    if sweep:
        dma[D_CURSOR] = page
    row[bar.TRANSACTIONS] = row[bar.TRANSACTIONS] + reads + writes
    row[bar.BYTES] = row[bar.BYTES] + (reads + writes) * _LINE
    row[bar.READS] = row[bar.READS] + reads
    row[bar.WRITES] = row[bar.WRITES] + writes
    row[bar.FAULTS] = row[bar.FAULTS] + faults
    row[bar.LOST] = row[bar.LOST] + lost
    row[bar.MISDIRECTED] = row[bar.MISDIRECTED] + misdirected
    row[bar.DENIED] = row[bar.DENIED] + denied
    row[bar.LEAKS] = row[bar.LEAKS] + leaks
    row[bar.UNTRANSLATED] = row[bar.UNTRANSLATED] + untranslated
    return tried


_A1 = types.Array(types.uint64, 1, "C")
_A2 = types.Array(types.uint64, 2, "C")
_A3 = types.Array(types.uint64, 3, "C")
_T = types.Array(types.uint32, 1, "C")
#: the one signature of :func:`burst`; anything else fails to compile instead of turning into int64
BURST_SIGNATURE = (_A1, _T, _A1, _A1, _A1, _A2, _A3, _A2, _A2, _A1, _A1, _A1, _A2, types.int64)


#: False with NUMBA_DISABLE_JIT=1, where everything here is plain Python
COMPILED = hasattr(burst, "py_func")


def compile_burst() -> None:
    """Compile or load :func:`burst` now; nothing to do where compilation is disabled."""
    if COMPILED:
        dispatcher: Any = burst
        dispatcher.compile(BURST_SIGNATURE)
        dispatcher.disable_compile()


def format_tables(formats: list[base.Format | None]) -> tuple[U64, U64]:
    """(formats, kinds) arrays for :func:`burst`, from one format per row of KINDS; None: it faults."""
    words = np.zeros((len(KINDS), MAX_LEVELS, len(base.COLUMNS)), np.uint64)
    kinds = np.zeros((len(KINDS), KIND_WORDS), np.uint64)
    for row, fmt in enumerate(formats):
        if fmt is None:
            kinds[row, K_INPUT_LG2] = _63
            continue
        if not fmt.in_words or len(fmt.levels) > MAX_LEVELS:
            raise ValueError(f"{fmt.name}: not a format of VT-d (64-bit little-endian items)")
        words[row, : len(fmt.levels)] = fmt.words()
        kinds[row, K_LEVELS] = len(fmt.levels)
        kinds[row, K_INPUT_LG2] = fmt.input_lg2
        kinds[row, K_SIGN_EXTEND] = int(fmt.sign_extend)
    return words, kinds
