# SPDX-License-Identifier: Apache-2.0
"""The sweep of ``verify`` compiled; imported only for big tables: Numba takes longer to start than small
ones to read.

One set of kernels serves every format whose items of level 0 are 64-bit little-endian words with the OA in
one piece: masks are arguments. Each table of level 0 gets a *plan* (which expected extents meet it, and the
word that its first item must be); the plans are put in the order in which the tables lie in memory, and then
the tables are swept: scattered tables cost three times as much in the order of their IOVAs.

Every value is uint64 by construction (module constants, typed arrays): uint64 mixed with any signed integer
silently becomes float64 or int64 in Numba. Loop indices are int64 and only index. ``NUMBA_DISABLE_JIT=1``
runs the same code as plain Python.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from iokeep.mem.memory import I64, U8, U64
from iokeep.pt.cache import ahead
from iokeep.pt.extents import Extents
from iokeep.pt.formats.base import Contig, LevelSpec
from iokeep.pt.kernels import compiled, in_memory_order, over_threads
from iokeep.pt.tables import TableMemory, Tables

#: log2 of the items of contiguous entries -> the entry, and permission and constant bits of an item by prot
Entries = dict[int, tuple[Contig, U64]]
_ZERO = np.uint64(0)
_ONE = np.uint64(1)
_THREE = np.uint64(3)
_32, _HALF = np.uint64(32), np.uint64(2**32 - 1)
_MAX = 2**64 - 1
#: bytes of an extent
_COLUMNS = 25
#: kind of a table of contiguous entries, log2 of their items << GROUP_SHIFT | 1: at least GROUPED
GROUP_SHIFT, GROUPED = 4, 16


@compiled
def _plan(
    base: U64,
    above: U8,
    span: np.uint64,
    e_iova: U64,
    e_last: U64,
    e_pa: U64,
    e_prot: U8,
    perms: U64,
    small: np.uint64,
    outside: np.uint64,
    lg2: np.uint64,
    pa_shift: np.uint64,
    first: I64,
    after: I64,
    kind: U8,
    word: U64,
    counts: I64,
) -> None:
    """Per table, in order of IOVA: the extents ``first`` ... ``after`` - 1 meet it; ``kind`` 0 none does, 1
    one run that begins with ``word`` fills it, 2 anything else, 3 not for the sweep.

    :param above: what the items above grant. :param span: bytes of a table, less 1.
    :param lg2: log2 of an item's bytes. :param counts: of
        each kind.
    """
    n = len(e_iova)
    size = int((span + _ONE) >> lg2)
    cursor = 0
    for t in range(len(base)):
        start = base[t]
        end = start + span
        # The first extent that ends at or after the table: twice as far each time, then halves.
        if cursor < n and e_last[cursor] < start:
            step = 1
            while cursor + step < n and e_last[cursor + step] < start:
                cursor += step
                step *= 2
            low, high = cursor + 1, min(cursor + step, n)
            while low < high:
                middle = (low + high) // 2
                if e_last[middle] < start:
                    low = middle + 1
                else:
                    high = middle
            cursor = low
        a = cursor
        full = a + size  # an extent an item, most likely
        if full < n and e_iova[full - 1] <= end and e_iova[full] > end:
            cursor = full
        elif a < n and e_iova[a] <= end:
            step = 1
            low = a
            while low + step < n and e_iova[low + step] <= end:
                low += step
                step *= 2
            high = min(low + step, n)
            low += 1
            while low < high:
                middle = (low + high) // 2
                if e_iova[middle] <= end:
                    low = middle + 1
                else:
                    high = middle
            cursor = low
        b = max(cursor, a)
        first[t] = a
        after[t] = b
        kind[t] = 0
        word[t] = _ZERO
        if b > a:
            kind[t] = 2
            if b == a + 1 and e_iova[a] <= start and e_last[a] >= end:
                pa = e_pa[a] + (start - e_iova[a])
                top = pa + span
                prot = np.uint64(e_prot[a])
                kind[t] = 3
                if (pa & small) | ((pa | top) & outside) == _ZERO and top >= pa and prot - _ONE < _THREE:
                    kind[t] = 1
                    word[t] = (pa >> pa_shift) | perms[prot]
            cursor = b - 1  # the last one may go on in the next table
        if above[t] != 3:
            kind[t] = 3
        counts[kind[t]] += 1


@compiled
def _runs(
    items: U64,
    row: I64,
    kind: U8,
    word: U64,
    entry: U64,
    step: np.uint64,
    care: np.uint64,
    valid: np.uint64,
    hint: np.uint64,
    hint_pa: np.uint64,
    agree: np.uint64,
    scattered: bool,
    out: U8,
) -> None:
    """Tables of kind 0, 1 and GROUPED: out[t] = 1 where proved.

    :param word: the first item; ``entry`` that of a GROUPED table, where it holds contiguous entries.
    :param hint: bits that say "contiguous" in all items of an aligned run or in none, and never matter else;
        ``hint_pa``: bits of the first word that are zero where the run is aligned so; ``agree``: bits
        that never matter else, but must not differ among such items.
    :param scattered: the tables do not come in the order of memory.
    """
    size = np.uint64(items.shape[1])
    last = len(row) - 1
    for t in range(len(row)):
        table = items[row[t]]
        if scattered:
            ahead(items[row[min(t + 1, last)]])
        wrong = _ZERO
        if kind[t] >= GROUPED:
            first, model = entry[t], table[_ZERO]
            group = ~((_ONE << np.uint64(kind[t] >> GROUP_SHIFT)) - _ONE)
            if (model ^ first) & care == _ZERO:  # else its items are single ones, most likely
                for i in range(size):
                    wrong |= ((table[i] ^ (first + (i & group) * step)) & care) | ((table[i] ^ model) & agree)
                if wrong == _ZERO:
                    out[t] = 1
                    continue
            wrong = _ZERO
        if kind[t] != 0:
            first = word[t]
            for i in range(size):  # unsigned: no check for negative indices, and it vectorises
                wrong |= (table[i] ^ (first + i * step)) & care
            if wrong != _ZERO and wrong == hint and first & hint_pa == _ZERO:
                first |= hint
                wrong = _ZERO
                model = table[_ZERO]
                for i in range(size):
                    wrong |= ((table[i] ^ (first + i * step)) & care) | ((table[i] ^ model) & agree)
        else:
            for i in range(size):
                wrong |= table[i] & valid
        out[t] = 1 if wrong == _ZERO else 0


@compiled
def _mixed(
    items: U64,
    row: I64,
    base: U64,
    first: I64,
    after: I64,
    e_iova: U64,
    e_last: U64,
    e_pa: U64,
    e_prot: U8,
    perm: U64,
    masks: U64,
    out: U8,
    sums: U64,
) -> None:
    """Tables of kind 2: out[t] = 1 where proved.

    :param perm: c, x, y: the permission bits of prot are c ^ (x where it reads) ^ (y where it writes).
    :param masks: shift, step, care, valid, small, outside, pa_shift. :param sums: sums[0] += bytes of the
        extents that begin in these tables; sums[1] |= 1 where such an extent is not sorted, disjoint, rw.
    """
    shift, step, care, valid = masks[0], masks[1], masks[2], masks[3]
    small, outside, pa_shift = masks[4], masks[5], masks[6]
    always, reads, writes = perm[0], perm[1], perm[2]
    n = len(e_iova)
    size = np.uint64(items.shape[1])
    page = _ONE << shift
    total, bad = _ZERO, _ZERO
    final = len(row) - 1
    for t in range(len(row)):
        table = items[row[t]]
        ahead(items[row[min(t + 1, final)]])
        start = base[t]
        a, b = first[t], after[t]
        wrong = _ZERO
        if np.uint64(b - a) == size and e_iova[a] == start:
            # One extent an item, most likely: all in one loop without a branch.
            iova, last, pa, prot = e_iova[a:b], e_last[a:b], e_pa[a:b], e_prot[a:b]
            odd = _ZERO
            for i in range(size):
                at = start + i * page
                p = np.uint64(prot[i])
                odd |= (iova[i] ^ at) | (last[i] ^ (at + small)) | (p & ~_THREE)
                want = (
                    (pa[i] >> pa_shift)
                    ^ always
                    ^ (reads & (_ZERO - (p & _ONE)))
                    ^ (writes & (_ZERO - (p >> _ONE)))
                )
                wrong |= ((table[i] ^ want) & care) | (pa[i] & (small | outside)) | ((p - _ONE) >> shift)
            if odd == _ZERO:
                total += size * page
                if b < n and e_iova[b] <= e_last[b - 1]:
                    bad = _ONE
                out[t] = 1 if wrong == _ZERO else 0
                continue
            wrong = _ZERO
        end = start + ((size << shift) - _ONE)
        slot = _ZERO
        for e in range(a, b):
            f, z, pa0, p = e_iova[e], e_last[e], e_pa[e], np.uint64(e_prot[e])
            if f >= start:  # an extent is accounted for in the table that it begins in
                total += z - f + _ONE
                if z < f or (e + 1 < n and e_iova[e + 1] <= z):
                    bad = _ONE
            elif e > a:
                bad = _ONE
            if p > _THREE:
                bad = _ONE
                continue
            top = pa0 + (z - f)
            if ((f | pa0 | (z + _ONE)) & small) | ((pa0 | top) & outside) != _ZERO or top < pa0 or p == _ZERO:
                wrong = _ONE
                continue
            lo, hi = max(f, start), min(z, end)
            begin, stop = (lo - start) >> shift, ((hi - start) >> shift) + _ONE
            if lo > hi or stop > size or begin < slot:
                wrong = _ONE
                continue
            for i in range(slot, begin):
                wrong |= table[i] & valid
            want = ((pa0 + (lo - f)) >> pa_shift) ^ always
            want ^= (reads & (_ZERO - (p & _ONE))) ^ (writes & (_ZERO - (p >> _ONE)))
            for i in range(begin, stop):
                wrong |= (table[i] ^ (want + (i - begin) * step)) & care
            slot = stop
        for i in range(slot, size):
            wrong |= table[i] & valid
        out[t] = 1 if wrong == _ZERO else 0
    sums[0] += total
    sums[1] |= bad


@dataclass(frozen=True, slots=True)
class Swept:
    """What the sweep says. ``proved`` bool[n], a table each; ``mapped`` bytes of all extents, if the tables
    are of level 0.
    """

    proved: NDArray[np.bool_]
    mapped: int


def hint_bits(spec: LevelSpec) -> tuple[int, int, int]:
    """Bits that mark items of an aligned run as contiguous and have no other meaning, the bits of the first
    item's word that are zero where the run is aligned, and those in which the items of a run agree; all 0 =
    there are none.
    """
    if len(spec.contig) != 1 or spec.pa_shift:
        return 0, 0, 0
    only = spec.contig[0]
    special = (only.reserved, only.attrs, only.base)
    if only.replicated or only.value != only.mask or only.lg2 > spec.index_bits or special != (None,) * 3:
        return 0, 0, 0
    agree = 0
    for _, mask in spec.memory if only.memory is None else only.memory:
        agree |= mask & spec.leaf_ignored
    return only.mask, (1 << (spec.shift + only.lg2)) - (1 << spec.shift), agree


class Plan:
    """What each of some tables must hold, found once: leaves, and nothing else.

    :param e: the expectation, not checked yet. :param entries: contiguous entries that Linux writes where
        they fit (``verify.entries_of``).
    """

    def __init__(self, tm: TableMemory, tables: Tables, e: Extents, entries: Entries | None = None) -> None:
        spec = tm.fmt.levels[tables.level]
        n, base = len(tables), tables.base
        self._items = tm.view(tables.level).data.view(np.uint64)
        small = (1 << spec.shift) - 1
        outside = ~spec.leaf_pa(_MAX) & _MAX & ~small
        bits = [value | spec.leaf_base for value in spec.prot_bits]
        self.row, self.base, self.e = tables.row, base, e
        self.first, self.after = np.empty(n, np.int64), np.empty(n, np.int64)
        self.kind, self.word = np.empty(n, np.uint8), np.empty(n, np.uint64)
        self.counts = np.zeros(4, np.int64)
        span = (spec.items << spec.shift) - 1
        _plan(
            base, tables.above, np.uint64(span), e.iova, e.last, e.pa, e.prot, np.array(bits, np.uint64),
            np.uint64(small), np.uint64(outside), np.uint64(spec.shift), np.uint64(spec.pa_shift),
            self.first, self.after, self.kind, self.word, self.counts,
        )  # fmt: skip
        care = ~spec.leaf_ignored & _MAX
        step = (1 << spec.shift) >> spec.pa_shift
        self.entry = self.word
        hint, hint_pa, agree = hint_bits(spec)
        if entries and self.counts[1]:
            self._group(spec, entries)
            for _, mask in spec.memory:
                agree |= mask & spec.leaf_ignored
        self._run = [np.uint64(value) for value in (step, care, spec.valid_mask, hint, hint_pa, agree)]
        self._perm = np.array([bits[1] ^ bits[2] ^ bits[3], bits[3] ^ bits[2], bits[3] ^ bits[1]], np.uint64)
        self._masks = np.array(
            [spec.shift, step, care, spec.valid_mask, small, outside, spec.pa_shift], np.uint64
        )

    def _group(self, spec: LevelSpec, entries: Entries) -> None:
        """Tables of one run may be in the largest contiguous entries that fit."""
        self.entry = self.word.copy()
        lg2s, e = sorted(entries), self.e
        #: number of the largest entry by the number of zero bits at the end of (iova ^ pa) / item, 0 = none
        largest = np.searchsorted(lg2s, np.arange(65), side="right")
        kinds = np.array([1, *(lg2 << GROUP_SHIFT | 1 for lg2 in lg2s)], np.uint8)
        plain = np.array([value | spec.leaf_base for value in spec.prot_bits], np.uint64)
        change = np.array([plain ^ plain, *(plain ^ entries[lg2][1] for lg2 in lg2s)], np.uint64)
        slide = (e.iova ^ e.pa) >> np.uint64(spec.shift)
        number = largest[np.bitwise_count((slide & -slide) - _ONE)]  # of each extent
        kind, word = kinds[number], change[number, e.prot & np.uint8(3)]
        one = self.kind == 1
        if len(e) == 1:
            self.entry = self.word ^ word[0]
            self.kind[one] = kind[0]
            return
        at = self.first[one]
        self.entry = self.word.copy()
        self.entry[one] ^= word[at]
        self.kind[one] = kind[at]

    def runs(
        self, rows: I64, kinds: U8, words: U64, entries: U64, out: U8, *, scattered: bool = False
    ) -> None:
        """Prove tables that :func:`_runs` can."""
        _runs(self._items, rows, kinds, words, entries, *self._run, scattered, out)

    def mixed(self, rows: I64, bases: U64, firsts: I64, afters: I64, out: U8) -> U64:
        """Prove tables of kind 2. :return: the sums of :func:`_mixed`."""
        sums, e = np.zeros(2, np.uint64), self.e
        _mixed(
            self._items, rows, bases, firsts, afters, e.iova, e.last, e.pa, e.prot,
            self._perm, self._masks, out, sums,
        )  # fmt: skip
        return sums

    def part(self, lo: int, hi: int) -> NDArray[np.bool_]:
        """Which of the tables lo ... hi - 1 hold exactly what is expected, in the order of their IOVAs.

        :raises ValueError: the expectation is not sorted and disjoint there, or a prot is beyond rw.
        """
        here, out = slice(lo, hi), np.zeros(hi - lo, np.uint8)
        kind = self.kind[here]
        if not (self.counts[2] or self.counts[3]):
            self.runs(self.row[here], kind, self.word[here], self.entry[here], out, scattered=True)
            return out.view(np.bool_)
        plain, mixed = np.flatnonzero(_is_run(kind)), np.flatnonzero(kind == 2)
        if len(plain):
            at, found = plain + lo, np.empty(len(plain), np.uint8)
            self.runs(self.row[at], kind[plain], self.word[at], self.entry[at], found, scattered=True)
            out[plain] = found
        if len(mixed):
            at, found = mixed + lo, np.empty(len(mixed), np.uint8)
            sums = self.mixed(self.row[at], self.base[at], self.first[at], self.after[at], found)
            if int(sums[1]):
                raise unsorted()
            out[mixed] = found
        return out.view(np.bool_)


def _is_run(kind: U8) -> NDArray[np.bool_]:
    return (kind & np.uint8(GROUPED - 1)) <= 1


def proved(
    tm: TableMemory, tables: Tables, e: Extents, entries: Entries | None = None, threads: int | None = None
) -> Swept:
    """Which tables hold exactly what is expected: leaves, and nothing else.

    :param e: the expectation, not checked yet. :param entries: see :class:`Plan`.
    :raises ValueError: it is not sorted and disjoint, or a prot is beyond rw. Above level 0 only what is
        looked at is checked.
    """
    plan = Plan(tm, tables, e, entries)
    size, base, row, kind, counts = tm.fmt.bytes_of(tables.level), plan.base, plan.row, plan.kind, plan.counts
    n = len(base)
    out = np.zeros(n, np.uint8)
    if counts[0] + counts[1]:
        chosen = None if counts[0] + counts[1] == n else np.flatnonzero(_is_run(kind))
        place, rows = in_memory_order(row, chosen)
        kinds, words, entry = kind, plan.word, plan.entry
        if rows is not row:
            kinds, words = np.take(kinds, place), np.take(words, place)
            entry = words if plan.entry is plan.word else np.take(entry, place)
        found = np.empty(len(rows), np.uint8)

        def runs(a: int, b: int) -> None:
            plan.runs(rows[a:b], kinds[a:b], words[a:b], entry[a:b], found[a:b])

        over_threads(runs, len(rows), size, threads)
        _put(out, place, found)
    mapped, unsound = 0, False
    owned: tuple[I64, I64] = np.zeros(0, np.int64), np.zeros(0, np.int64)
    if counts[2]:
        mixed = None if counts[2] == n else np.flatnonzero(kind == 2)
        a, b = plan.first, plan.after
        begins = base
        if mixed is not None:
            a, b, begins = a[mixed], b[mixed], base[mixed]
        owned = a + (e.iova[a] < begins), b
        # Where an extent is a page the expectation is three times the tables: it is what must stream.
        few = int((b - a).sum()) * _COLUMNS <= len(a) * size
        if few:
            place, rows = in_memory_order(row, mixed)
            begins, a, b = base[place], plan.first[place], plan.after[place]
        elif mixed is not None:
            place, rows = mixed, row[mixed]
        else:
            place, rows = np.arange(n), row
        found = np.empty(len(rows), np.uint8)
        totals: list[U64] = []

        def mix(lo: int, hi: int) -> None:
            totals.append(plan.mixed(rows[lo:hi], begins[lo:hi], a[lo:hi], b[lo:hi], found[lo:hi]))

        over_threads(mix, len(rows), size * 4, threads)
        _put(out, place, found)
        mapped = sum(int(sums[0]) for sums in totals)
        unsound = any(int(sums[1]) for sums in totals)
    if unsound:
        raise unsorted()
    return Swept(out.view(np.bool_), mapped if tables.level else _check_others(e, *owned, mapped))


def _put(out: U8, place: I64, found: U8) -> None:
    """out[place] = found: each table's result at its place. Mostly all are the same, and ``place`` is all."""
    if len(found) == len(out) and bool(found.view(np.bool_).all()):
        out.fill(1)
    else:
        out[place] = found


def unsorted() -> ValueError:
    """The error for an expectation that is none."""
    return ValueError("expected extents are not sorted and disjoint, or a prot is beyond rw")


@compiled
def _add_up(iova: U64, last: U64, prot: U8, first: I64, after: I64, sums: U64) -> None:
    """The extents first[i] ... after[i] - 1: sums[0] += their number and the low halves of last - iova, which
    has 64 bits; sums[1] += the high halves; sums[2] |= 1 where they are not sorted, disjoint, at most rw.
    """
    total, upper, bad = _ZERO, _ZERO, _ZERO
    for i in range(len(first)):
        for n in range(first[i], after[i]):
            span = last[n] - iova[n]
            total += (span & _HALF) + _ONE
            upper += span >> _32
            if last[n] < iova[n] or np.uint64(prot[n]) > _THREE:
                bad = _ONE
            if n + 1 < len(iova) and iova[n + 1] <= last[n]:
                bad = _ONE
    sums[0] += total
    sums[1] += upper
    sums[2] |= bad


def _check_others(e: Extents, first: I64, after: I64, known: int) -> int:
    """Check the extents outside of the sorted, disjoint [first, after), which are checked and map ``known``
    bytes; the bytes of all. :raises ValueError: unsorted.
    """
    begin, end = np.concatenate((np.zeros(1, np.int64), after)), np.concatenate((first, [len(e)]))
    sums = np.zeros(3, np.uint64)
    _add_up(e.iova, e.last, e.prot, begin, end, sums)
    if int(sums[2]):
        raise unsorted()
    return known + int(sums[0]) + (int(sums[1]) << 32)
