# SPDX-License-Identifier: Apache-2.0
"""The compiled half of the IOMMU and of the DMA devices: walk tables, move payloads, check them.

It knows page tables of 64-bit little-endian items, as :mod:`iokeep.pt.formats.base` states them, and nothing
of what leads to them: which table translates a requester, Unit.look_up() finds.

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
from iokeep.soft.hardware import bar
from iokeep.soft.hardware import unit as words_of


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
_32 = u64(32)
_PAGE_MASK = u64(2**64 - 4096)
_ALL = u64(2**64 - 1)

# -- how a walk ends -------------------------------------------------------------------------------
_OK = u64(0)
_W_ACCESS = u64(words_of.W_ACCESS)
_W_NOT_PRESENT = u64(words_of.W_NOT_PRESENT)
_W_RESERVED = u64(words_of.W_RESERVED)
_W_DENIED = u64(words_of.W_DENIED)
_W_WIDTH = u64(words_of.W_WIDTH)
#: instead of a fault code: translation is disabled
UNTRANSLATED = 1 << 32
_UNTRANSLATED = u64(UNTRANSLATED)

# -- a walker, uint64[n]: all that a walk must know of the tables of a context ----------------------------
# Two heads (of the table, and of the upper one or none), then the rows of their levels, then rules. One flat
# array: what a compiled function costs to call grows with the arrays that it is given.
# An IOVA is the table's where (iova & X_COVER) is X_LOW or X_HIGH.
(X_TOP, X_ROOT, X_COVER, X_LOW, X_HIGH) = range(5)
HEAD_WORDS = 8
MAX_LEVELS = 6
#: columns of a row behind those of :meth:`Format.words`; L_RULES 0: none of the others is needed.
#: L_VALID ... L_END: words of the walker where each sort of rules begins; it ends where the next begins
_N = len(base.COLUMNS)
(
    L_RULES, L_INVERT, L_PA_SHIFT, L_SELECT_MASK, L_SELECT_VALUE,
    L_VALID, L_LEAF, L_LEAF_BAD, L_TABLE_BAD, L_NEXT, L_PIECES, L_WRITES, L_RUNS, L_END,
) = range(_N, _N + 14)  # fmt: skip
ROW_WORDS = _N + 14
ROWS_AT = 2 * HEAD_WORDS
RULES_AT = ROWS_AT + 2 * MAX_LEVELS * ROW_WORDS
# A rule: mask and value; of L_PIECES mask and shift; L_NEXT adds the level; L_RUNS adds log2 of the items,
# whether they are replicated, and the bits that are reserved.
(U_MASK, U_VALUE, U_MORE, U_REPLICATED, U_RESERVED) = range(5)
RULE_WORDS = 5

# -- state of a front-end, uint64[UNIT_WORDS] ------------------------------------------------------
# C_FAULT: code of the one request that a failed look-up makes fault, 0 = none
# C_CODES: fault codes by outcome, of reads, then of writes
# T_SIZES: which page sizes (log2) the IOTLB holds; T_COUNT: how many; T_FIRST ...: which, in order of arrival
# P_COUNT: faults in the pending buffer; P_DROPPED: that did not fit
(
    C_VALID, C_OWNER, C_PROT, C_SILENT, C_FAULT, C_LOOKUPS, T_SIZES, T_COUNT, T_VICTIM, P_COUNT, P_DROPPED,
) = range(11)  # fmt: skip
C_CODES = 16
T_FIRST = 32
UNIT_WORDS = T_FIRST + 64
OUTCOMES = words_of.OUTCOMES

# -- IOTLB, uint64[4, TLB_ENTRIES]: base | log2 of the page size, pa | rights, owner, log2 of the page size --
TLB_SETS = 256
TLB_WAYS = 4
TLB_ENTRIES = TLB_SETS * TLB_WAYS
_SET_MASK = u64(TLB_SETS - 1)
_WAYS = u64(TLB_WAYS)
_WAY_MASK = u64(TLB_WAYS - 1)

# -- pending faults, uint64[PENDING, 4]: code, IOVA, need, owner --------------------------------------
PENDING = 16
_PENDING = u64(PENDING)

H_TRANSLATING = words_of.H_TRANSLATING
FE_FAULTS = words_of.FE_FAULTS
FE_HITS = words_of.FE_HITS
FE_MISSES = words_of.FE_MISSES

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
def any_of(w, first, last, item):
    """1 where ``(item & mask) == value`` for any of the rules ``first`` ... ``last`` - 1, else 0."""
    for at in range(np.int64(first), np.int64(last), RULE_WORDS):
        if item & w[at + U_MASK] == w[at + U_VALUE]:
            return _1
    return _0


@_jit
def pa_of(w, f, item, mask):
    """The pa that an item says (LevelSpec.pa_shift and pa_pieces)."""
    pa = (item & mask) << w[f + L_PA_SHIFT]
    for at in range(np.int64(w[f + L_PIECES]), np.int64(w[f + L_WRITES]), RULE_WORDS):
        pa = pa | ((item & w[at + U_MASK]) << w[at + U_VALUE])
    return pa


@_jit
def ruled_leaf(w, f, item, iova):
    """A leaf of a level with rules: (outcome, pa, log2 of the page size); see LevelSpec.bad_leaf."""
    lg2 = w[f + base.SHIFT]
    reserved = w[f + base.LEAF_RESERVED]
    replicated = _0
    claimed = item & w[f + L_SELECT_MASK] == w[f + L_SELECT_VALUE]
    for at in range(np.int64(w[f + L_RUNS]), np.int64(w[f + L_END]), RULE_WORDS):
        if item & w[at + U_MASK] == w[at + U_VALUE]:
            lg2 = lg2 + w[at + U_MORE]
            replicated = w[at + U_REPLICATED]
            reserved = w[at + U_RESERVED]
            claimed = False
            break
    if claimed or item & reserved != _0 or any_of(w, w[f + L_LEAF_BAD], w[f + L_TABLE_BAD], item) != _0:
        return _W_RESERVED, _0, _0
    inner = (_1 << w[f + base.SHIFT]) - _1
    pa = pa_of(w, f, item, w[f + base.LEAF_PA_MASK])
    if replicated != _0:
        inner = (_1 << lg2) - _1
        pa = pa & ~inner
    return _OK, pa | (iova & inner), lg2


@_jit
def ruled_next(w, row, level, item, iova):
    """Where a table item of a level with rules leads: (outcome, level); see LevelSpec.bad_table."""
    f = ROWS_AT + (row + level) * ROW_WORDS
    if any_of(w, w[f + L_TABLE_BAD], w[f + L_NEXT], item) != _0:
        return _W_RESERVED, _0
    below = u64(level) - _1
    if w[f + L_NEXT] != w[f + L_PIECES]:
        below = _ALL
        for at in range(np.int64(w[f + L_NEXT]), np.int64(w[f + L_PIECES]), RULE_WORDS):
            if item & w[at + U_MASK] == w[at + U_VALUE]:
                below = w[at + U_MORE]
                break
        if below == _ALL:
            return _W_RESERVED, _0
    g = ROWS_AT + (row + np.int64(below)) * ROW_WORDS
    inner = ((w[g + base.INDEX_MASK] + _1) << w[g + base.SHIFT]) - _1
    if iova & ((_1 << w[f + base.SHIFT]) - _1) & ~inner != _0:
        return _W_NOT_PRESENT, _0
    return _OK, below


@_jit
def walk(ram, w, prot, iova, need):
    """Walk the table of a context: (outcome, pa, log2 of the page size, rights); all uint64.

    Does what :func:`iokeep.pt.walk.walk` does, with the array of :func:`walker`.

    :param prot: rights that are let through above the table. :param need: those that the request needs.
    """
    row = 0
    head = 0
    over = iova & w[X_COVER]
    if over != w[X_LOW] and over != w[X_HIGH]:
        row = MAX_LEVELS
        head = HEAD_WORDS
        over = iova & w[HEAD_WORDS + X_COVER]
        if over != w[HEAD_WORDS + X_LOW] and over != w[HEAD_WORDS + X_HIGH]:
            return _W_WIDTH, _0, _0, _0
    words = u64(ram.size)
    table = w[head + X_ROOT]
    rights = prot
    level = np.int64(w[head + X_TOP])
    while True:
        f = ROWS_AT + (row + level) * ROW_WORDS
        shift = w[f + base.SHIFT]
        at = (table >> _3) + ((iova >> shift) & w[f + base.INDEX_MASK])
        if at >= words:
            return _W_ACCESS, _0, _0, _0
        item = ram[at]
        ruled = w[f + L_RULES] != _0
        if ruled:
            item = item ^ w[f + L_INVERT]
            if w[f + L_VALID] != w[f + L_LEAF] and any_of(w, w[f + L_VALID], w[f + L_LEAF], item) == _0:
                return _W_NOT_PRESENT, _0, _0, _0
        if item & w[f + base.VALID_MASK] == _0:
            return _W_NOT_PRESENT, _0, _0, _0
        leaf = w[f + base.MAY_LEAF] != _0
        if leaf and w[f + base.MAY_TABLE] != _0:
            if ruled and w[f + L_LEAF] != w[f + L_LEAF_BAD]:
                leaf = any_of(w, w[f + L_LEAF], w[f + L_LEAF_BAD], item) != _0
            else:
                leaf = item & w[f + base.LEAF_MASK] == w[f + base.LEAF_VALUE]
        if leaf:
            if ruled:
                outcome, pa, lg2 = ruled_leaf(w, f, item, iova)
                if outcome != _OK:
                    return outcome, _0, _0, _0
            else:
                if item & w[f + base.LEAF_RESERVED] != _0:
                    return _W_RESERVED, _0, _0, _0
                lg2 = shift
                pa = (item & w[f + base.LEAF_PA_MASK]) | (iova & ((_1 << shift) - _1))
            if item & w[f + base.R_MASK] != w[f + base.R_VALUE]:
                rights = rights & _2
            if ruled and w[f + L_WRITES] != w[f + L_RUNS]:
                if any_of(w, w[f + L_WRITES], w[f + L_RUNS], item) == _0:
                    rights = rights & _1
            elif item & w[f + base.W_MASK] != w[f + base.W_VALUE]:
                rights = rights & _1
            if rights & need != need:
                return _W_DENIED, _0, lg2, rights
            return _OK, pa, lg2, rights
        if item & w[f + base.TABLE_RESERVED] != _0:
            return _W_RESERVED, _0, _0, _0
        if item & w[f + base.TR_MASK] != w[f + base.TR_VALUE]:
            rights = rights & _2
        if item & w[f + base.TW_MASK] != w[f + base.TW_VALUE]:
            rights = rights & _1
        if ruled:
            outcome, below = ruled_next(w, row, level, item, iova)
            if outcome != _OK:
                return outcome, _0, _0, _0
            table = pa_of(w, f, item, w[f + base.TABLE_PA_MASK])
            level = np.int64(below)
        else:
            table = item & w[f + base.TABLE_PA_MASK]
            level = level - 1


@_jit
def translate(ram, fe, unit, tlb, w, iova, need):
    """Translate one request as a front-end does, through its caches: (fault code, pa); 0 = fine.

    The context is valid, or a look-up has failed and this request takes its fault.
    """
    if unit[C_VALID] == _0:
        code = unit[C_FAULT]
        unit[C_FAULT] = _0
        return code, _0
    owner = unit[C_OWNER]
    for number in range(np.int64(unit[T_COUNT])):
        lg2 = unit[T_FIRST + number]
        tag = ((iova >> lg2) << lg2) | lg2
        at = np.int64(((iova >> lg2) & _SET_MASK) * _WAYS)
        for way in range(at, at + TLB_WAYS):
            if tlb[0, way] == tag and tlb[2, way] == owner:
                found = tlb[1, way]
                if found & need == need:
                    fe[FE_HITS] = fe[FE_HITS] + _1
                    return _OK, (found & _PAGE_MASK) | (iova & ((_1 << lg2) - _1))
                # Rights may have been added since, which needs no invalidation: look again.
                tlb[0, way] = _0
    fe[FE_MISSES] = fe[FE_MISSES] + _1
    outcome, pa, lg2, rights = walk(ram, w, unit[C_PROT], iova, need)
    if outcome != _OK:
        at = np.int64(outcome) - 1
        if need & _2 != _0:
            at += OUTCOMES
        return unit[C_CODES + at], _0
    if (pa ^ iova) & ((_1 << lg2) - _1) != _0:
        return _OK, pa  # items of one contiguous run that do not agree: nothing that one entry could say
    if (unit[T_SIZES] >> lg2) & _1 == _0:
        unit[T_SIZES] = unit[T_SIZES] | (_1 << lg2)
        unit[T_FIRST + np.int64(unit[T_COUNT])] = lg2
        unit[T_COUNT] = unit[T_COUNT] + _1
    victim = unit[T_VICTIM]
    unit[T_VICTIM] = victim + _1
    slot = np.int64(((iova >> lg2) & _SET_MASK) * _WAYS + (victim & _WAY_MASK))
    tlb[0, slot] = ((iova >> lg2) << lg2) | lg2
    tlb[1, slot] = ((pa >> lg2) << lg2) | rights
    tlb[2, slot] = owner
    tlb[3, slot] = lg2
    return _OK, pa


@_jit
def pend(fe, unit, pending, code, iova, need):
    """Keep a fault until the front-end has it recorded."""
    fe[FE_FAULTS] = fe[FE_FAULTS] + _1
    if unit[C_SILENT] != _0:
        return
    count = unit[P_COUNT]
    if count >= _PENDING:
        unit[P_DROPPED] = unit[P_DROPPED] + _1
        return
    unit[P_COUNT] = count + _1
    row = pending[np.int64(count)]
    row[0] = code
    row[1] = iova
    row[2] = need
    row[3] = unit[C_OWNER] if unit[C_VALID] != _0 else _0


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
def burst(ram, tags, hidden, fe, unit, tlb, pending, w, ranges, shadow, dma, row, log, count):
    """Do up to ``count`` (int64) DMA transactions; returns how many were tried.

    It ends early where the context must be looked up, that is also after the request that faulted because of
    a failed look-up.

    Normal mode: a random page of the working set each time. Sweep mode (``dma[D_SWEEP]``): every page from
    ``dma[D_CURSOR]`` on once, reads of written slots only.

    :param ram: uint64[:], physical memory. :param tags: uint32[:], owner of each frame.
    :param hidden: hidden state of the IOMMU. :param fe: hidden registers of the front-end.
    :param unit: its private state. :param tlb: uint64[4, TLB_ENTRIES]. :param pending: uint64[PENDING, 4].
    :param w: see :func:`walker`.
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
        translating = hidden[H_TRANSLATING] != _0
        if translating and unit[C_VALID] == _0 and unit[C_FAULT] == _0:
            break
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
        if not translating:
            untranslated = untranslated + _1
            misdirected = misdirected + _1
            note(log, dma, _I_UNTRANSLATED, iova, iova, r[G_TAG], _0, _UNTRANSLATED, slot, _0, _0)
            continue
        reason, pa = translate(ram, fe, unit, tlb, w, iova, need)
        if reason != _OK:
            pend(fe, unit, pending, reason, iova, need)
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
_T = types.Array(types.uint32, 1, "C")
#: the one signature of :func:`burst`; anything else fails to compile instead of turning into int64
BURST_SIGNATURE = (
    _A1, _T, _A1, _A1, _A1, _A2, _A2, _A1, _A2, _A1, _A1, _A1, _A2, types.int64
)  # fmt: skip


#: False with NUMBA_DISABLE_JIT=1, where everything here is plain Python
COMPILED = hasattr(burst, "py_func")


def compile_burst() -> None:
    """Compile or load :func:`burst` now; nothing to do where compilation is disabled."""
    if COMPILED:
        dispatcher: Any = burst
        dispatcher.compile(BURST_SIGNATURE)
        dispatcher.disable_compile()


def _rules(number: int, spec: base.LevelSpec) -> list[list[tuple[int, ...]]]:
    """The rules of a level, in the order of L_VALID ... L_RUNS."""
    runs: list[tuple[int, ...]] = [
        (
            c.mask,
            c.value,
            c.lg2,
            int(c.replicated),
            spec.leaf_reserved & ~c.mask if c.reserved is None else c.reserved,
        )
        for c in spec.contig
    ]
    if any(not 0 <= below < number for _, _, below in spec.next_levels):
        raise ValueError(f"level {number} leads to {spec.next_levels}, which is not down")
    pairs = (
        spec.valid_values,
        spec.leaf_values,
        spec.leaf_bad,
        spec.table_bad,
        spec.next_levels,
        spec.pa_pieces,
        spec.w_values,
    )
    return [*([tuple(pair) for pair in some] for some in pairs), runs]


def walker(*tables: tuple[base.Format, int]) -> U64:
    """The array for :func:`walk`: of a table and, where there are two, of the upper one.

    :param tables: a format and the pa of a root, of each.
    :raises ValueError: a format that is not of 64-bit little-endian items, or too deep.
    """
    words = [0] * RULES_AT
    for table in range(2):  # no IOVA is theirs
        words[table * HEAD_WORDS + X_LOW] = words[table * HEAD_WORDS + X_HIGH] = 1
    for table, (fmt, root_pa) in enumerate(tables):
        if fmt.item_bytes != 8 or fmt.byte_order != "<" or len(fmt.levels) > MAX_LEVELS:
            raise ValueError(f"{fmt.name}: not a format of 64-bit little-endian items")
        cover = 2**64 - (1 << (fmt.input_lg2 - fmt.sign_extend))
        low, high = (0, cover) if fmt.sign_extend else (fmt.iova_base & cover,) * 2
        at = table * HEAD_WORDS
        words[at : at + X_HIGH + 1] = fmt.top_level, root_pa, cover, low, high
        inner = 0
        for number, (spec, row) in enumerate(zip(fmt.levels, fmt.words().tolist(), strict=True)):
            sorts = _rules(number, spec)
            select = spec.contig_select if spec.contig and spec.contig_select else (0, 1)
            ruled = any(sorts) or spec.pa_shift or spec.invert or (number > 0 and inner != spec.shift)
            starts = [len(words)]
            for some in sorts:
                for rule in some:
                    words += (*rule, 0, 0, 0)[:RULE_WORDS]
                starts.append(len(words))
            at = ROWS_AT + (table * MAX_LEVELS + number) * ROW_WORDS
            words[at : at + ROW_WORDS] = (
                *row,
                int(bool(ruled)),
                spec.invert,
                spec.pa_shift,
                *select,
                *starts,
            )
            inner = spec.shift + spec.index_bits
    return np.array(words, np.uint64)
