# SPDX-License-Identifier: Apache-2.0
"""Prove that a table translates exactly what is expected: nothing else, nothing more, nothing less.

Equal means: every IOVA translates to the expected pa with the expected permissions and memory attributes,
nothing is missing, nothing is extra, no reserved bit is set anywhere. Accessed and dirty bits and bits that
the format ignores do not count; how the mapping is cut into leaves does not count either (see ``layout``).

Two steps. The *sweep* compares each table of leaves, of any level, with the items that the expectation would
write there, masked: that proves a table at memory speed, or leaves it unproved. There is more than one way to
write the same translation: leaves of the contiguous sizes that Linux chooses are tried first where the format
has such, then single items, then what hardware may have made of them (a hint of contiguity, a dirty state).
Where a table above level 0 holds leaves beside tables, each leaf is compared with the extent that holds it.
What is unproved is then *judged* range by range (``compare``), which is exact and says why.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from iokeep.mem.arrays import unique
from iokeep.mem.memory import I64, U8, U64, Memory
from iokeep.pt.attributes import Differences, compare_flags, judged, table_traits
from iokeep.pt.choice import worth_compiled
from iokeep.pt.compare import Comparison, Found, LayoutRange, Spans, Verdict, clip_extents, find
from iokeep.pt.extents import PROT_R, PROT_W, Extents
from iokeep.pt.formats.base import Contig, Format, LevelSpec
from iokeep.pt.layout import Layout, compare_layouts, table_layout
from iokeep.pt.leaves import Leaves, kernels_down, upper_within
from iokeep.pt.segments import choose_leaves
from iokeep.pt.shape import unfit
from iokeep.pt.tables import (
    ABSENT,
    CHUNK,
    LOOP,
    SOFT,
    Items,
    Problems,
    TableMemory,
    Tables,
    Upper,
    descend,
    expand,
)

#: tables of level 0 from so many bytes on are swept by compiled code, where it is loaded and where it is not:
#: below, NumPy is done before Numba has started
COMPILED_WARM = 1 << 20
COMPILED_COLD = 1 << 30
#: proves tables: memory, rows, kinds, words, IOVAs, first extents, extents after the last, expectation
Way = Callable[..., NDArray[np.bool_]]
#: a window of the judge holds at most so many unproved tables and expected extents
_WINDOW_TABLES = 256
_WINDOW_EXTENTS = 1 << 17
#: extents worked on at once
_BLOCK = 1 << 16
_MAX = 2**64 - 1


def _as_said(fmt: Format, extents: Extents) -> Extents:
    """With "-w" as "rw" where the format has no write-only; without memory attributes."""
    prot = extents.prot
    if not fmt.write_only:
        prot = np.where(prot == PROT_W, np.uint8(PROT_R | PROT_W), prot).astype(np.uint8)
    return Extents(extents.iova, extents.last, extents.pa, prot)


class Expectation:
    """Expected extents, prepared for the sweep of tables of one level.

    :param fmt: the format. :param extents: sorted, disjoint, in any cut.
    """

    def __init__(self, fmt: Format, extents: Extents, level: int = 0) -> None:
        spec = fmt.levels[level]
        self.level = level
        small = np.uint64((1 << spec.shift) - 1)
        prot = extents.prot
        if len(extents) and (
            bool((extents.last < extents.iova).any() or (extents.iova[1:] <= extents.last[:-1]).any())
            or int(prot.max()) > (PROT_R | PROT_W)
        ):
            raise ValueError("expected extents are not sorted and disjoint, or a prot is beyond rw")
        self.extents = _as_said(fmt, extents)
        prot = self.extents.prot
        #: permission and constant bits of an item by prot, as masks see it
        self.perms: U64 = np.array(spec.prot_bits, np.uint64) | np.uint64(spec.leaf_base)
        self.spec = spec
        #: the word of the next page is larger by this
        self.step = (1 << spec.shift) >> spec.pa_shift
        self.sound = np.empty(len(extents), np.bool_)
        outside = np.uint64(~spec.leaf_pa(_MAX) & _MAX) & ~small
        pieces = np.uint64(0)
        for mask, shift in spec.pa_pieces:
            pieces |= np.uint64(mask << shift & _MAX)
        for lo in range(0, len(extents), _BLOCK):  # temporaries of whole columns cost more than the work
            part = slice(lo, lo + _BLOCK)
            iova, last, pa = extents.iova[part], extents.last[part], extents.pa[part]
            end = pa + (last - iova)
            # What has no item of its own in this format is left to the judge.
            self.sound[part] = (
                (((iova | pa | (last + np.uint64(1))) & small) == 0)
                & (((pa | end) & outside) == 0)
                & (end >= pa)
                & (prot[part] > 0)
            )
            if pieces:  # words of such a run are no ramp
                self.sound[part] &= ((pa ^ end) & pieces) == 0
        self.all_sound = bool(self.sound.all())
        #: contiguous entries that Linux writes instead of single items, small to large, and their ``perms``;
        #: those with masks of their own (Armv7s) are left to the judge
        self.runs = entries_of(fmt, level)
        if not len(extents) or int((extents.last - extents.iova).max()) >> spec.shift == 0:
            self.runs = {}  # single items are what Linux writes
        #: memory attributes that do not count, but in which the items of one entry must agree
        self.alike = np.uint64(0)
        for c in spec.contig:
            for _, mask in spec.memory if c.memory is None else c.memory:
                self.alike |= np.uint64(mask & spec.leaf_ignored)

    def word(self, at: NDArray[np.intp]) -> U64:
        """Items of the first pages of the extents ``at``, as masks see them."""
        return self.spec.pa_words(self.extents.pa[at]) | self.perms[self.extents.prot[at]]

    def steps(self, offset: U64) -> U64:
        """How much larger words are ``offset`` bytes on."""
        return offset >> np.uint64(self.spec.pa_shift) if self.spec.pa_shift else offset


def entries_of(fmt: Format, level: int) -> dict[int, tuple[Contig, U64]]:
    """Contiguous entries of a level that Linux writes instead of single items: log2 of their items, from
    small to large -> the entry, and permission and constant bits of an item by prot, as masks see it.
    """
    spec = fmt.levels[level]
    if spec.shift not in spec.lg2s:  # what is between the entries is not of this level
        return {}
    return {
        c.lg2: (c, np.array([fmt.leaf_bits(level, p, c) ^ spec.invert for p in range(4)], np.uint64))
        for c in sorted(spec.contig, key=lambda c: c.lg2)
        if c.replicated and spec.shift + c.lg2 in spec.lg2s and c.lg2 <= spec.index_bits and _as_items(c)
    }


def _as_items(contig: Contig) -> bool:
    """The masks of single items hold for its items too."""
    return contig.reserved is None and contig.attrs is None and contig.memory is None


def sweepable(tm: TableMemory, level: int) -> bool:
    """Whether compiled code can compare the tables of a level (``sweep``)."""
    return tm.plains[level] and tm.parts[level] == 1 and not tm.fmt.levels[level].pa_pieces


def _compiled(tm: TableMemory, level: int, n: int, asked: bool | None) -> bool:
    """Whether ``n`` tables of a level are swept by compiled code; see :func:`verify`."""
    size = n * tm.fmt.bytes_of(level)
    return worth_compiled(asked, "sweep", size, COMPILED_WARM, COMPILED_COLD) and sweepable(tm, level)


class Plan:
    """How tables are proved by NumPy: what each must hold, found once. :param want: for their level."""

    def __init__(self, tm: TableMemory, tables: Tables, want: Expectation) -> None:
        spec, base = want.spec, tables.base
        e = want.extents
        last = base + np.uint64((1 << (spec.shift + spec.index_bits)) - 1)
        a = np.searchsorted(e.last, base, side="left")
        b = np.searchsorted(e.iova, last, side="right")
        count = b - a
        ok = tables.above == 3  # where the items above take permissions away the judge has the word
        single = count == 1
        at = np.minimum(a, max(len(e) - 1, 0))
        if len(e):
            single &= (e.iova[at] <= base) & (e.last[at] >= last) & want.sound[at]
            if not want.all_sound:
                unsound = np.concatenate((np.zeros(1, np.int64), np.cumsum(~want.sound)))
                ok &= unsound[b] == unsound[a]
        word = np.zeros(len(base), np.uint64)
        # kind 0: nothing expected, 1: one run over the whole table, 2: anything else
        kind = np.where(single, np.uint8(1), np.where(count == 0, np.uint8(0), np.uint8(2))).astype(np.uint8)
        if single.any():
            word[single] = want.word(at[single]) + want.steps(base[single] - e.iova[at[single]])
        self.want = want
        self._tm = tm
        self._ok = ok
        self._columns = tables.row, kind, word, base, a, b

    def proved(self, chosen: I64, tries: tuple[Way, ...]) -> NDArray[np.bool_]:
        """Which of the tables ``chosen`` (positions) hold exactly what is expected. False = not proved here.

        :param tries: ways to prove them.
        """
        want = self.want
        ok, done = self._ok[chosen], np.zeros(len(chosen), np.bool_)
        for way in tries if not want.runs else (_in_runs, *(t for t in tries if t is not _in_runs)):
            left = np.flatnonzero(ok & ~done)
            if not len(left):
                break
            if not _applies(way, want):
                continue
            for lo in range(0, len(left), CHUNK):
                part = left[lo : lo + CHUNK]
                at = chosen[part]
                row, kind, word, base, a, b = self._columns
                done[part] = way(self._tm, row[at], kind[at], word[at], base[at], a[at], b[at], want)
        return done


def _proved(tm: TableMemory, tables: Tables, want: Expectation, tries: tuple[Way, ...]) -> NDArray[np.bool_]:
    """Which tables hold exactly what is expected, by NumPy; see :class:`Plan`."""
    return Plan(tm, tables, want).proved(np.arange(len(tables)), tries)


def _sweep(
    tm: TableMemory,
    row: I64,
    kind: U8,
    word: U64,
    base: U64,
    a: I64,
    b: I64,
    want: Expectation,
    items: U64 | None = None,
) -> NDArray[np.bool_]:
    """One chunk of the sweep by NumPy, of single items. :param items: of the tables, if they are at hand."""
    spec = want.spec
    care = np.uint64(~spec.leaf_ignored & _MAX)
    if items is None:
        items = tm.items(row, want.level)
    if bool((kind == 1).all()):
        ramp = np.arange(spec.items, dtype=np.uint64) * np.uint64(want.step)
        buffer = word[:, None] + ramp
        np.bitwise_xor(buffer, items, out=buffer)
        np.bitwise_and(buffer, care, out=buffer)
        same: NDArray[np.bool_] = np.logical_not(np.any(buffer, axis=1))
        return same
    wanted = np.zeros((len(row), spec.items), np.uint64)
    one = kind == 1
    if one.any():
        ramp = np.arange(spec.items, dtype=np.uint64) * np.uint64(want.step)
        wanted[one] = word[one][:, None] + ramp
    mixed = np.flatnonzero(kind == 2)
    if len(mixed):
        _fill(wanted, mixed, base, a, b, want)
    mask = np.where(wanted != 0, care, np.uint64(spec.valid_mask))
    np.bitwise_xor(wanted, items, out=wanted)
    np.bitwise_and(wanted, mask, out=wanted)
    equal: NDArray[np.bool_] = np.logical_not(np.any(wanted, axis=1))
    return equal


def _in_runs(
    tm: TableMemory, row: I64, kind: U8, word: U64, base: U64, a: I64, b: I64, want: Expectation
) -> NDArray[np.bool_]:
    """One chunk by NumPy, as Linux writes it: the largest contiguous entry wherever one fits."""
    spec, e = want.spec, want.extents
    care = np.uint64(~spec.leaf_ignored & _MAX) | want.alike
    items = tm.items(row, want.level)
    wanted = np.zeros((len(row), spec.items), np.uint64)
    one = np.flatnonzero(kind == 1)
    if len(one):
        at = a[one]
        slide = (e.iova[at] ^ e.pa[at]) >> np.uint64(spec.shift)
        lg2 = np.zeros(len(one), np.intp)
        first = word[one]
        for n, (_, perms) in want.runs.items():
            fits = (slide & np.uint64((1 << n) - 1)) == 0
            lg2[fits] = n
            pa = e.pa[at[fits]] + (base[one[fits]] - e.iova[at[fits]])
            first[fits] = spec.pa_words(pa) | perms[e.prot[at[fits]]]
        number = np.arange(spec.items, dtype=np.uint64)
        for n in np.unique(lg2).tolist():
            ramp = (number >> np.uint64(n) << np.uint64(n)) * np.uint64(want.step)
            mine = lg2 == n
            if mine.all() and len(one) == len(row):
                np.add(first[:, None], ramp, out=wanted)
            else:
                wanted[one[mine]] = first[mine][:, None] + ramp
    mixed = np.flatnonzero(kind == 2)
    if len(mixed):
        _fill_runs(tm.fmt, wanted, mixed, base, a, b, want)
    if len(one) == len(row) and not want.alike:
        np.bitwise_xor(wanted, items, out=wanted)
        np.bitwise_and(wanted, care, out=wanted)
        alone: NDArray[np.bool_] = np.logical_not(np.any(wanted, axis=1))
        return alone
    there = wanted != 0
    mask = np.where(there, care, np.uint64(spec.valid_mask))
    if want.alike:
        # One value in the whole table is not asked for, but is enough.
        some = np.take_along_axis(items, there.argmax(axis=1)[:, None], axis=1) & want.alike
        wanted &= ~want.alike
        wanted |= np.where(there, some, np.uint64(0))
    np.bitwise_xor(wanted, items, out=wanted)
    np.bitwise_and(wanted, mask, out=wanted)
    equal: NDArray[np.bool_] = np.logical_not(np.any(wanted, axis=1))
    return equal


def _fill_runs(fmt: Format, wanted: U64, mixed: I64, base: U64, a: I64, b: I64, want: Expectation) -> None:
    """As :func:`_fill`, in the sizes that Linux chooses."""
    spec, e = want.spec, want.extents
    shift = np.uint64(spec.shift)
    owner, at = _pieces(mixed, a, b)
    start = np.maximum(e.iova[at], base[owner])
    end = np.minimum(e.last[at], base[owner] + np.uint64((spec.items << spec.shift) - 1))
    if int((end - start).max()) >> spec.shift == 0:
        _fill(wanted, mixed, base, a, b, want)
        return
    raw: U64 = (owner.astype(np.uint64) << np.uint64(spec.shift + spec.index_bits)) | (start - base[owner])
    pa = (e.pa[at] + (start - e.iova[at])).astype(np.uint64, copy=False)
    prot = e.prot[at]
    flat = wanted.reshape(-1)
    largest = spec.shift + spec.index_bits - 1
    for run in choose_leaves(fmt, raw, end - start + np.uint64(1), pa, prot, largest):
        lg2 = 0 if run.contig is None else run.contig.lg2
        perms = want.perms if lg2 == 0 else want.runs[lg2][1]
        slot = (run.iova >> shift).astype(np.int64)
        first = spec.pa_words(run.pa) | perms[run.prot]
        piece = np.repeat(np.arange(len(slot)), run.count)
        inner = np.arange(len(piece)) - np.repeat(np.cumsum(run.count) - run.count, run.count)
        place = slot[piece] + inner
        inner = inner >> lg2 << lg2 if lg2 else inner
        flat[place] = first[piece] + inner.astype(np.uint64) * np.uint64(want.step)


def _marked(
    tm: TableMemory, row: I64, kind: U8, word: U64, base: U64, a: I64, b: I64, want: Expectation
) -> NDArray[np.bool_]:
    """One chunk by NumPy, of single items that carry a hint of contiguity or hardware's dirty state."""
    spec = want.spec
    items = spec.one_writable(tm.items(row, want.level))
    sound = np.ones(len(row), np.bool_)
    ramp = np.arange(spec.items, dtype=np.uint64)
    pages = (items & np.uint64(spec.leaf_pa_mask)) >> np.uint64(spec.shift - spec.pa_shift)
    for c in spec.contig:
        if c.replicated or spec.pa_pieces:
            continue
        # Hardware may take a whole run from any item of it: one that is not valid tears it, whatever it says.
        part = (items & np.uint64(c.mask)) == np.uint64(c.value)
        part &= (items & np.uint64(spec.valid_mask)) != 0
        if not part.any():
            continue
        if c.lg2 > spec.index_bits:  # a root may be smaller than such an entry
            sound &= ~part.any(axis=1)
            continue
        shape = (len(row), spec.items >> c.lg2, 1 << c.lg2)
        mine, inner = part.reshape(shape), ramp[: 1 << c.lg2]
        whole = mine.all(axis=2)
        page = pages.reshape(shape)
        first = page[:, :, :1]
        in_line = ((page - first) == inner).all(axis=2) & ((first[:, :, 0] & inner[-1]) == 0)
        alike = items.reshape(shape) & want.alike
        in_line &= (alike == alike[:, :, :1]).all(axis=2)
        sound &= (in_line & whole | ~mine.any(axis=2)).all(axis=1)
        items = np.where(part, items & np.uint64(~c.mask & _MAX), items)
    return _sweep(tm, row, kind, word, base, a, b, want, items) & sound


#: ways to prove a table, in the order in which they are tried; what Linux writes comes first (``_in_runs``)
TRIES: tuple[Way, ...] = (_sweep, _in_runs, _marked)


def _applies(way: Way, want: Expectation) -> bool:
    if way is _in_runs:
        return bool(want.runs)
    if way is _marked:
        return bool(want.spec.w_values) or any(not c.replicated for c in want.spec.contig)
    return True


def _other_ways(tm: TableMemory, tables: Tables, e: Extents, done: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """``done``, and what of the rest can be proved in another way than by single items."""
    spec = tm.fmt.levels[tables.level]
    if not (spec.contig or spec.w_values) or bool(done.all()):
        return done
    left = np.flatnonzero(~done)
    rest = tables.take(left)
    want = Expectation(tm.fmt, _touched(e, rest.base, spec), tables.level)
    done[left] = _proved(tm, rest, want, TRIES[1:])
    return done


def _touched(e: Extents, base: U64, spec: LevelSpec) -> Extents:
    """The extents that touch one of the tables at ``base`` (sorted), and perhaps others between them."""
    span = np.uint64((spec.items << spec.shift) - 1)
    a = np.searchsorted(e.last, base, side="left")
    b = np.searchsorted(e.iova, base + span, side="right")
    a = np.maximum(a, np.append(0, b[:-1]))  # one that goes on from table to table counts once
    lo, hi = (int(a[0]), int(b[-1])) if len(base) else (0, 0)
    part: slice | I64 = slice(lo, hi)
    if int(np.maximum(b - a, 0).sum()) * 2 < hi - lo:
        part = _pieces(np.arange(len(base)), a, np.maximum(a, b))[1]
    return Extents(e.iova[part], e.last[part], e.pa[part], e.prot[part])


class _Above:
    """Proves tables of leaves above level 0 as ``descend`` meets them: see ``tables.Known``.

    :param e: the expectation, checked later. After the descent ``first`` and ``last`` are the closed ranges
        that were proved.
    """

    def __init__(self, tm: TableMemory, e: Extents, compiled: bool | None, threads: int | None) -> None:
        self.tm, self.e, self.compiled, self.threads = tm, e, compiled, threads
        self.first: list[U64] = []
        self.last: list[U64] = []

    def __call__(self, tables: Tables) -> NDArray[np.bool_]:
        """Which tables hold exactly what is expected."""
        tm, e, level = self.tm, self.e, tables.level
        spec, done = tm.fmt.levels[level], np.zeros(len(tables), np.bool_)
        span = np.uint64((spec.items << spec.shift) - 1)
        count = np.searchsorted(e.iova, tables.base + span, side="right")
        count -= np.searchsorted(e.last, tables.base, side="left")
        at = np.flatnonzero(count <= spec.items)  # of more extents some are smaller than an item
        if not len(at):
            return done
        some = tables.take(at)
        if _compiled(tm, level, len(at), self.compiled):
            from iokeep.pt import sweep

            good = sweep.proved(tm, some, e, entries_of(tm.fmt, level), self.threads).proved
            good = _other_ways(tm, some, e, good)
        else:
            good = _proved(tm, some, Expectation(tm.fmt, _touched(e, some.base, spec), level), TRIES)
        done[at[good]] = True
        self.first.append(some.base[good])
        self.last.append(some.base[good] + span)
        return done


def _pieces(mixed: I64, a: I64, b: I64) -> tuple[I64, I64]:
    """Table and extent of each piece of the tables ``mixed``, which the extents a ... b - 1 touch."""
    count = (b - a)[mixed]
    owner = np.repeat(mixed, count)
    nth = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
    return owner, np.repeat(a[mixed], count) + nth


def _fill(wanted: U64, mixed: I64, base: U64, a: I64, b: I64, want: Expectation) -> None:
    """Write the expected items of the tables ``mixed``, which meet several extents or part of one."""
    spec, e = want.spec, want.extents
    shift = np.uint64(spec.shift)
    owner, at = _pieces(mixed, a, b)
    first = e.iova[at]
    start = np.maximum(first, base[owner])
    end = np.minimum(e.last[at], base[owner] + np.uint64((spec.items << spec.shift) - 1))
    pages = ((end - start) >> shift).astype(np.int64) + 1
    slot = owner * spec.items + ((start - base[owner]) >> shift).astype(np.int64)
    word = want.word(at) + want.steps(start - first)
    flat = wanted.reshape(-1)
    if int(pages.max()) == 1:
        flat[slot] = word
        return
    piece = np.repeat(np.arange(len(pages)), pages)
    inner = np.arange(len(piece)) - np.repeat(np.cumsum(pages) - pages, pages)
    flat[slot[piece] + inner] = word[piece] + inner.astype(np.uint64) * np.uint64(want.step)


def merged(base: U64, span: int) -> tuple[U64, U64]:
    """Maximal closed ranges of sorted, disjoint blocks of ``span`` bytes."""
    if not len(base):
        return base, base
    step = np.uint64(span)
    if int(base[-1]) - int(base[0]) == (len(base) - 1) * span:  # without a hole, as most are
        return base[:1], base[-1:] + (step - np.uint64(1))
    first = np.flatnonzero(np.concatenate((np.ones(1, np.bool_), base[1:] != base[:-1] + step)))
    end = np.concatenate((first[1:] - 1, np.array([len(base) - 1])))
    return base[first], base[end] + (step - np.uint64(1))


def _united(first: list[U64], last: list[U64]) -> tuple[U64, U64]:
    """Maximal closed ranges of all the ranges given, in any order."""
    a, z = np.concatenate(first), np.concatenate(last)
    if not len(a):
        return a, z
    order = np.argsort(a, kind="stable")
    a, z = a[order], np.maximum.accumulate(z[order])
    cut = np.flatnonzero((a[1:] > z[:-1]) & (a[1:] - np.uint64(1) != z[:-1]))
    return a[np.append(0, cut + 1)], z[np.append(cut, len(z) - 1)]


def _as_expected(found: Found, e: Extents, others: list[tuple[U64, U64]]) -> NDArray[np.bool_]:
    """Which leaves lie in one extent each and translate as it says.

    :param e: sorted and disjoint. :param others: sorted, disjoint closed ranges that are to be judged: leaves
        that touch one do not count.
    """
    if not len(e) or not len(found):
        return np.zeros(len(found), np.bool_)
    at = np.searchsorted(e.iova, found.iova, side="right") - 1
    inside = at >= 0
    at = np.maximum(at, 0)
    good: NDArray[np.bool_] = inside & (e.last[at] >= found.last)
    good &= (found.prot == e.prot[at]) & (found.prot != 0)
    good &= e.pa[at] + (found.iova - e.iova[at]) == found.pa
    for first, last in others:
        if len(first):
            near = np.searchsorted(last, found.iova, side="left")
            there = near < len(first)
            good &= ~(there & (first[np.minimum(near, len(first) - 1)] <= found.last))
    return good


def _without(e: Extents, first: U64, last: U64) -> Extents:
    """``e`` less the extents that lie wholly within one of the sorted, disjoint ranges [first, last]."""
    if not len(e) or not len(first):
        return e
    a = np.searchsorted(e.iova, first, side="left")
    b = np.maximum(np.searchsorted(e.last, last, side="right"), a)
    if int((b - a).sum()) == len(e):
        return Extents.empty()
    edge = np.zeros(len(e) + 1, np.int64)
    np.add.at(edge, a, 1)
    np.add.at(edge, b, -1)
    keep = np.cumsum(edge[:-1]) == 0
    return Extents(e.iova[keep], e.last[keep], e.pa[keep], e.prot[keep])


def spans(fmt: Format, problems: Problems, attrs: bool) -> Spans:
    """Problems as spans of IOVAs: what translates all the same (``SOFT``), or all others."""
    p = problems.take(np.isin(problems.reason, SOFT) == attrs)
    iova, last, level, reason = fmt.extend(p.iova), fmt.extend(p.last), p.level, p.reason
    if attrs and len(p) > 1:  # an item's span holds those of the items below
        top = np.maximum.accumulate(last)
        fresh = np.concatenate((np.ones(1, np.bool_), iova[1:] > top[:-1]))
        first = np.flatnonzero(fresh)
        iova, level, reason = iova[first], level[first], reason[first]
        last = top[np.concatenate((first[1:] - 1, np.array([len(top) - 1])))]
    return Spans(iova, last, reason, level, np.arange(len(iova), dtype=np.int64))


def _found(fmt: Format, items: Items) -> Found:
    leaves = Leaves.of(fmt, items)
    return Found(leaves.iova, leaves.last, leaves.pa, leaves.prot, items.level)


def _touching(e: Extents, start: int, last: int, base: U64, span: int) -> Extents:
    """The extents that touch [start, last], or a table of ``span`` + 1 bytes at ``base`` (sorted)."""
    if len(base):
        start, last = min(start, int(base[0])), max(last, int(base[-1]) + span)
    part = slice(
        int(np.searchsorted(e.last, np.uint64(start), side="left")),
        int(np.searchsorted(e.iova, np.uint64(last), side="right")),
    )
    attrs = None if e.attrs is None else e.attrs[part]
    return Extents(e.iova[part], e.last[part], e.pa[part], e.prot[part], attrs)


def verify(
    fmt: Format,
    mem: Memory,
    root_pa: int,
    expected: Extents,
    *,
    limit: int = 16,
    dead_leaves: bool = True,
    layout: Layout | None = None,
    compiled: bool | None = None,
    attributes: Differences | None = None,
    start: int = 0,
    last: int | None = None,
    threads: int | None = None,
    owned: U64 | None = None,
) -> Verdict:
    """Compare the table under ``root_pa`` with ``expected``, within the IOVAs [start, last].

    :param expected: sorted, disjoint; need not be canonical. Where it has ``attrs``, the IOMMU_* flags that
        the format can say are compared too. "-w" counts as "rw" where the format has no write-only.
    :param limit: so many mismatches are named; all are counted.
    :param dead_leaves: a leaf that is present but lets nothing pass is a mismatch.
    :param layout: expected leaf sizes (``layout.kernel_layout``, ``layout.table_layout``): the verdict then
        says whether the leaves are cut alike, apart from whether they translate alike.
    :param compiled: sweep with Numba (True), with NumPy alone (False), or by size (None). The result is the
    same.
    :param attributes: ranges of different memory attributes, if they are known already (``diff``).
    :param start: :param last: only these IOVAs (None = to the end of the space), at a cost that grows with
        them and not with the table: what the whole comparison says, cut to the range. Not together with
        ``layout``.
    :param threads: of the compiled sweep; None = as ``kernels.thread_count`` says.
    :param owned: pas of 4096-byte pages, sorted: whoever has them is to change the table from here on. Where
        all translations are equal, what makes that unsafe is a mismatch too (``shape.unfit``). Only of a
        whole table.
    :raises MemoryAbsent: the root is absent. (Absent tables below are mismatches.)
    :raises InputError: no table at all: sub-trees are shared without bound, or ``root_pa`` is not aligned.
    """
    tm = TableMemory(fmt, mem)
    whole, end = start == 0 and last is None, _MAX if last is None else last
    if owned is not None and not whole:
        raise ValueError("owned goes with a whole table")
    above = _Above(tm, expected, compiled, threads)
    if whole:
        plain = attributes is None and expected.attrs is None  # else every leaf is looked at
        upper = descend(tm, root_pa, straight=kernels_down(compiled), known=above if plain else None)
    else:
        if not 0 <= start <= end <= _MAX or layout is not None:
            raise ValueError(f"[{start:#x}, {end:#x}] is no range, or has a layout to compare")
        upper = upper_within(tm, root_pa, start, end)
    tables = upper.tables(fmt)
    base = tables.base
    spec = fmt.levels[0]
    table_span = spec.items << spec.shift
    if not whole:
        expected = _touching(expected, start, end, base, table_span - 1)
    if _compiled(tm, 0, len(base), compiled):
        from iokeep.pt import sweep

        swept = sweep.proved(tm, tables, expected, entries_of(fmt, 0), threads)
        proved, mapped = _other_ways(tm, tables, expected, swept.proved), swept.mapped
    else:
        want = Expectation(fmt, expected)
        proved, mapped = _proved(tm, tables, want, TRIES), want.extents.mapped_bytes
    if not whole:
        mapped = clip_extents(expected, start, end).mapped_bytes
    if attributes is None and expected.attrs is not None:
        attributes = compare_flags(expected, fmt, table_traits(fmt, mem, root_pa, start, last))
    if attributes is not None:
        upper.problems = judged(fmt, upper.problems)
    if len(upper.problems):
        # An attribute of an item above is no difference that the sweep could see.
        soft = spans(fmt, upper.problems, True)
        proved &= ~find(soft.iova, soft.last, base)[1]
    if attributes is not None and len(attributes):
        at = np.searchsorted(attributes.last, base, side="left")
        some = at < len(attributes)
        touched = attributes.iova[np.minimum(at, len(attributes) - 1)] <= base + np.uint64(table_span - 1)
        proved &= ~(some & touched)
    good = merged(base if bool(proved.all()) else base[proved], table_span)
    if above.first:
        good = _united([good[0], *above.first], [good[1], *above.last])
    comparison = Comparison(limit)
    if attributes is not None and len(attributes):
        comparison = Comparison(limit, attributes.spans(), attributes.texts)
    judge_rest(
        tm, upper, base, ~proved, expected, good, comparison, start, end,
        dead_leaves=dead_leaves, attributes=attributes,
    )  # fmt: skip
    mismatches = comparison.mismatches()
    total = comparison.total
    if not total and owned is not None:
        traps = unfit(tm, upper, owned)
        mismatches, total = traps.mismatches(limit), len(traps)
    ranges: list[LayoutRange] = []
    differing, cut_alike = 0, None
    if layout is not None and not bool(np.isin(upper.problems.reason, (LOOP, ABSENT)).any()):
        ranges, differing = compare_layouts(layout, table_layout(fmt, mem, root_pa), limit)
        cut_alike = differing == 0
    return Verdict(
        layout=ranges,
        layout_total=differing,
        layout_equal=cut_alike,
        equal=total == 0,
        mismatches=mismatches,
        total=total,
        pages=(mapped - comparison.failed_bytes) >> 12,
        differ=comparison.differ(),
        table_bytes=upper.visited_bytes(fmt),
        attrs_compared=None if attributes is None else attributes.common.compared,
        attrs_not_compared=() if attributes is None else attributes.common.not_compared,
    )


def judge_rest(
    tm: TableMemory,
    upper: Upper,
    base: U64,
    todo: NDArray[np.bool_],
    expected: Extents,
    good: tuple[U64, U64],
    comparison: Comparison,
    start: int,
    last: int,
    *,
    dead_leaves: bool = True,
    attributes: Differences | None = None,
) -> None:
    """Judge all IOVAs of [start, last] but for the sorted, disjoint ranges ``good``, if anything is there.

    :param todo: the tables of level 0 that are not wholly in such ranges. :param base: IOVA of each table.
    """
    fmt, large = tm.fmt, _found(tm.fmt, upper.leaves)
    if len(large):
        others = [(s.iova, s.last) for s in (spans(fmt, upper.problems, soft) for soft in (False, True))]
        if attributes is not None:
            others.append((attributes.iova, attributes.last))
        same = _as_expected(large, _as_said(fmt, expected), others)
        if same.any():
            good = _united([good[0], large.iova[same]], [good[1], large.last[same]])
            large = Found(*(getattr(large, c)[~same] for c in ("iova", "last", "pa", "prot", "level")))
    e = _as_said(fmt, _without(expected, *good))
    if len(e) or todo.any() or len(large) or len(upper.problems):
        _judge_rest(tm, upper, large, base, todo, e, good, comparison, dead_leaves, attributes, start, last)


def _judge_rest(
    tm: TableMemory,
    upper: Upper,
    large: Found,
    base: U64,
    todo: NDArray[np.bool_],
    e: Extents,
    good: tuple[U64, U64],
    comparison: Comparison,
    dead_leaves: bool,
    attributes: Differences | None,
    begin: int,
    end: int,
) -> None:
    """Judge all IOVAs of [begin, end] outside the proved tables, window by window."""
    fmt, spec = tm.fmt, tm.fmt.levels[0]
    span = spec.items << spec.shift
    t_base, t_raw, t_pa, t_row, t_prot = (
        base[todo], upper.base[todo], upper.pa[todo], upper.row[todo], upper.prot[todo],
    )  # fmt: skip
    opaque, attrs = spans(fmt, upper.problems, False), spans(fmt, upper.problems, True)
    # Windows begin at every _WINDOW_TABLES-th unproved table and every _WINDOW_EXTENTS-th extent, and skip
    # what is proved: a proved range may be touched by extents that go beyond it.
    cuts = unique(t_base[::_WINDOW_TABLES], e.iova[::_WINDOW_EXTENTS] & ~np.uint64(span - 1))
    starts = [begin, *(cut for cut in cuts.tolist() if begin < cut <= end)]
    for start, after in zip(starts, [*starts[1:], end + 1], strict=True):
        last = after - 1
        lo = int(np.searchsorted(t_base, np.uint64(start & -span), side="left"))
        hi = int(np.searchsorted(t_base, np.uint64(last), side="right"))
        found, problems = large, [Problems()]
        if hi > lo:
            parts = []
            for items, bad in expand(tm, t_raw[lo:hi], t_pa[lo:hi], t_row[lo:hi], t_prot[lo:hi]):
                parts.append(items)
                problems.append(bad)
            small = _found(fmt, Items.join(parts))
            found = _joined(large, small, start, last)
        if not dead_leaves:
            alive = found.prot != 0
            found = Found(*(getattr(found, c)[alive] for c in ("iova", "last", "pa", "prot", "level")))
        more = Problems.join(problems)
        if attributes is not None:
            more = judged(fmt, more)
        o, a = opaque, attrs
        if len(more):
            everything = Problems.join([upper.problems, more])
            o, a = spans(fmt, everything, False), spans(fmt, everything, True)
        comparison.window(start, last, e, found, o, a, good)


def _joined(large: Found, small: Found, start: int, last: int) -> Found:
    """Large and small leaves of a window, sorted."""
    a, b = (
        np.searchsorted(large.last, np.uint64(start)),
        np.searchsorted(large.iova, np.uint64(last), side="right"),
    )
    if a == b:
        return small
    columns = [
        np.concatenate((getattr(large, c)[a:b], getattr(small, c)))
        for c in ("iova", "last", "pa", "prot", "level")
    ]
    order = np.argsort(columns[0], kind="stable")
    return Found(*(c[order] for c in columns))
