# SPDX-License-Identifier: Apache-2.0
"""Tables of leaves as runs, compiled; imported only for big tables. ``extents``, ``digest`` and ``diff`` use
it.

Most tables hold one run: items that grant the same and whose OAs follow each other. What such a table
translates is known from its first item; reading the rest, in the order in which tables lie in memory, only
proves it. What an item *means* is not said here: the general code (``tables.leaves_of``) reads one table of
every sort, and all tables whose items differ from that one's in nothing but the OA mean the same.
A table that is no run but whose items grant the same is a table of *pages*; any other is left to the general
code.

Masks are arguments, so that one set of kernels serves every format with 64-bit little-endian items and the OA
in one piece. For the arithmetic see ``sweep``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from iokeep.mem.memory import I64, U8, U64
from iokeep.pt.attributes import Attributes, Traits
from iokeep.pt.extents import Extents
from iokeep.pt.formats.base import LevelSpec
from iokeep.pt.kernels import compiled, in_memory_order, over_threads
from iokeep.pt.tables import TableMemory, Tables, leaves_of

_ZERO = np.uint64(0)
_ONE = np.uint64(1)
_MAX = 2**64 - 1
_ALL = np.uint64(_MAX)
#: a cache line of items: most tables that are no run show it there
_LINE = np.uint64(8)
#: states of a table
OTHER, RUN, EMPTY, PAGES = 0, 1, 2, 3
#: tables of more sorts than these are left to the general code
_SORTS = 256
#: where columns of output begin, in items: those that begin at one place of a page disturb each other
_STAGGER = 64


@compiled
def _runs(items: U64, row: I64, sized: U64, masks: U64, place: I64, head: U64, state: U8) -> None:
    """``state[place[t]]`` = RUN, EMPTY or OTHER; ``head`` the first item.

    :param sized: uint64[c, 3]: an item where (item & [0]) == [1] is one of [2] equal ones, given as a mask of
        the index. :param masks: step, bits that matter, valid.
    """
    step, full, valid = masks[0], masks[1], masks[2]
    size = np.uint64(items.shape[1])
    line = min(size, _LINE)
    for t in range(len(row)):
        table = items[row[t]]
        first = table[_ZERO]
        group = _ALL
        for c in range(len(sized)):
            if first & sized[c, 0] == sized[c, 1]:
                group = sized[c, 2]
                break
        wrong = _ZERO
        said = OTHER
        if first & valid == _ZERO:
            for i in range(line):
                wrong |= table[i] & valid
            if wrong == _ZERO:
                for i in range(size):
                    wrong |= table[i] & valid
                if wrong == _ZERO:
                    said = EMPTY
        else:
            for i in range(line):
                wrong |= (table[i] ^ (first + (i & group) * step)) & full
            if wrong == _ZERO:
                if group == _ALL:
                    for i in range(size):
                        wrong |= (table[i] ^ (first + i * step)) & full
                else:
                    for i in range(size):
                        wrong |= (table[i] ^ (first + (i & group) * step)) & full
                if wrong == _ZERO:
                    said = RUN
        head[place[t]] = first
        state[place[t]] = said


@compiled
def _pages(
    items: U64, row: I64, masks: U64, place: I64, head: U64, tail: U64, slots: I64, pieces: I64, odd: U64
) -> None:
    """Tables that are no run: ``head`` and ``tail`` are the first and the last item that are there, ``slots``
    int64[n, 2] their numbers; ``pieces`` counts the runs, ``odd`` has the bits that matter, the OA's aside,
    in which any item that is there differs from ``head``.
    """
    step, same, valid, pa_mask = masks[0], masks[1], masks[2], masks[3]
    size = np.uint64(items.shape[1])
    for t in range(len(row)):
        table = items[row[t]]
        here = place[t]
        begin, end = _ZERO, size
        while begin < size and table[begin] & valid == _ZERO:
            begin += _ONE
        while end > begin and table[end - _ONE] & valid == _ZERO:
            end -= _ONE
        differ, number = _ZERO, _ZERO
        if begin < end:
            first = table[begin]
            number = _ONE
            for i in range(begin + _ONE, end):
                item = table[i]
                prior = table[i - _ONE]
                there = _ONE if item & valid != _ZERO else _ZERO
                follows = (_ONE if prior & valid != _ZERO else _ZERO) & (
                    _ONE if (prior & pa_mask) + step == item & pa_mask else _ZERO
                )
                differ |= (item ^ first) & (_ZERO - there)
                number += there & ~follows
            head[here] = first
            tail[here] = table[end - _ONE]
        slots[here, 0] = np.int64(begin)
        slots[here, 1] = np.int64(end) - 1
        pieces[here] = np.int64(number)
        odd[here] = differ & same


@compiled
def _write(
    items: U64, row: I64, base: U64, prot: U8, first: I64, pieces: I64, joins: U8, masks: U64,
    iova: U64, last: U64, pa: U64, grants: U8,
) -> None:  # fmt: skip
    """The extents of tables of pages, from ``first[t]`` on.

    :param joins: bit 0: the first one goes on from the table before, bit 1: the last one goes on in the next.
    """
    step, valid, pa_mask, shift, pa_shift = masks[0], masks[2], masks[3], masks[4], masks[5]
    size = np.uint64(items.shape[1])
    page = (_ONE << shift) - _ONE
    for t in range(len(row)):
        table = items[row[t]]
        start, grant, index = base[t], prot[t], first[t]
        if joins[t] == 0 and pieces[t] == items.shape[1]:
            # An extent an item: columns one after the other, without a branch.
            i_out, l_out = iova[index : index + pieces[t]], last[index : index + pieces[t]]
            p_out, g_out = pa[index : index + pieces[t]], grants[index : index + pieces[t]]
            for i in range(size):
                i_out[i] = start + (i << shift)
            for i in range(size):
                l_out[i] = start + (i << shift) + page
            for i in range(size):
                p_out[i] = (table[i] & pa_mask) << pa_shift
            for i in range(size):
                g_out[i] = grant
            continue
        index -= 1
        inside, expect, end = False, _ZERO, _ZERO
        fresh = joins[t] & 1
        begun = 0
        for i in range(size):
            item = table[i]
            if item & valid == _ZERO:
                inside = False
                continue
            word = item & pa_mask
            if not inside or word != expect:
                if begun > 0:
                    last[index] = end
                index += 1
                if begun > 0 or fresh == 0:
                    iova[index] = start + (i << shift)
                    pa[index] = word << pa_shift
                    grants[index] = grant
                begun += 1
            inside = True
            expect = word + step
            end = start + (i << shift) + page
        if begun > 0 and joins[t] & 2 == 0:
            last[index] = end


@compiled
def _pairs(
    items: U64, row: I64, others: U64, other_row: I64, masks: U64, head: U64, odd: U64, pages: I64
) -> None:
    """Tables side by side: ``odd`` has the bits that matter in which they differ, and those, the OA's aside,
    in which an item that is there differs from ``head``, the first such; ``pages`` counts them.
    """
    same, valid, full = masks[1], masks[2], masks[6]
    size = np.uint64(items.shape[1])
    for t in range(len(row)):
        table, other = items[row[t]], others[other_row[t]]
        first = table[_ZERO]
        if first & valid == _ZERO:
            for i in range(size):
                if table[i] & valid != _ZERO:
                    first = table[i]
                    break
        wrong, number = _ZERO, _ZERO
        for i in range(size):
            item = table[i]
            there = _ONE if item & valid != _ZERO else _ZERO
            to = other[i]
            wrong |= ((item ^ to) & full | (item ^ first) & same) & (_ZERO - there)
            wrong |= to & valid & (there - _ONE)
            number += there
        head[t] = first
        odd[t] = wrong
        pages[t] = np.int64(number)


def readable(tm: TableMemory, level: int = 0) -> bool:
    """Whether the tables of this level can be read as runs."""
    spec = tm.fmt.levels[level]
    pa = spec.leaf_pa_mask
    plain = tm.plains[level] and tm.parts[level] == 1 and not spec.pa_pieces and not tm.linux
    bad = any(mask & pa for mask, _ in spec.leaf_bad)
    return plain and not bad and all(contig.mask & ~pa for contig in spec.contig)


def _same(spec: LevelSpec) -> int:
    """Bits that matter, the OA's aside: also attributes that may have any value, and the marks of contiguous
    entries.
    """
    same = ~spec.leaf_ignored | spec.keep_bit | spec.r_mask | spec.w_mask
    for fields in (spec.memory, *(contig.memory or () for contig in spec.contig)):
        for _, mask in fields:
            same |= mask
    for contig in spec.contig:
        same |= contig.mask
    return same & ~spec.leaf_pa_mask & _MAX


def _masks(spec: LevelSpec) -> U64:
    same = _same(spec)
    step = (1 << spec.shift) >> spec.pa_shift
    full = same | spec.leaf_pa_mask
    return np.array(
        [step, same, spec.valid_mask, spec.leaf_pa_mask, spec.shift, spec.pa_shift, full], np.uint64
    )


@dataclass(slots=True)
class Means:
    """What items mean, by sort: ``sort`` int16[n] a table each; of each sort ``sound``, a bool: else nothing
    is said; ``lg2``, ``prot`` uint8 of the leaves; ``word``, ``said`` uint64 of
    :class:`~iokeep.pt.attributes.Attributes`; ``keep`` uint8. Sort 0 is not sound.
    """

    sort: NDArray[np.int16]
    sound: NDArray[np.bool_]
    lg2: U8
    prot: U8
    word: U64
    said: U64
    keep: U8


#: a sort: sound, lg2, prot, word, said, keep
_Mean = tuple[bool, int, int, int, int, int]
_NOTHING: _Mean = (False, 0, 0, 0, 0, 0)


def _mean_one(tm: TableMemory, level: int, head: int, above: int, run: bool) -> _Mean:
    """What one item means, as the general code has it: of a table that is one run, or by itself."""
    spec = tm.fmt.levels[level]
    n = spec.items if run else 1
    index = np.arange(n, dtype=np.uint64)
    low = next((m for mask, value, m in _sized(spec).tolist() if head & mask == value), _MAX)
    items = np.uint64(head) + (index & np.uint64(low)) * _masks(spec)[0]
    if len(tm.places(level, items)) != n or not spec.are_leaves(items).all():
        return _NOTHING
    iova = index << np.uint64(spec.shift)
    leaves, problems = leaves_of(tm, level, iova, items, iova, np.full(n, above, np.uint8))
    if len(problems) or not len(leaves) or len(leaves) << int(leaves.lg2[0]) != n << spec.shift:
        return _NOTHING
    word, said = Attributes(tm.fmt).words(leaves)
    kept = (leaves.item & np.uint64(spec.keep_bit)) != 0
    columns = (leaves.lg2, leaves.prot, word, said, kept)
    if any(bool((column != column[0]).any()) for column in columns):
        return _NOTHING
    return True, int(leaves.lg2[0]), int(leaves.prot[0]), int(word[0]), int(said[0]), int(kept[0])


def means(
    tm: TableMemory, head: U64, above: U8, chosen: I64 | None = None, *, run: bool, level: int = 0
) -> Means:
    """What tables of a level mean, by their first items; a sort of table is read once.

    :param above: what the items above grant. :param chosen: only these have a meaning.
    :param run: tables of one run; else of pages.
    """
    spec = tm.fmt.levels[level]
    sort = np.zeros(len(head), np.int16)
    sorts: list[_Mean] = [_NOTHING]
    if chosen is not None:
        head, above = head[chosen], above[chosen]
    same = np.uint64(_same(spec))
    key = head & same
    if run and spec.contig:  # the place in a contiguous entry matters to items that may be part of one
        largest = spec.shift + max(contig.lg2 for contig in spec.contig)
        inner = np.uint64(((1 << largest) - 1) >> spec.pa_shift & spec.leaf_pa_mask)
        marked = np.zeros(len(head), np.bool_)
        for contig in spec.contig:
            mask = contig.mask & ~spec.leaf_pa_mask
            marked |= (head & np.uint64(mask)) == np.uint64(contig.value & mask)
        if marked.any():
            key = np.where(marked, head & (same | inner), key).astype(np.uint64)
    for grants in range(4) if len(head) else ():
        of = above == grants
        mine = None if bool(of.all()) else np.flatnonzero(of)
        if mine is not None and not len(mine):
            continue
        keys, heads = (key, head) if mine is None else (key[mine], head[mine])
        sample, which = np.zeros(1, np.intp), None
        if not bool((keys == keys[0]).all()):
            _, sample, which = np.unique(keys, return_index=True, return_inverse=True)
            if len(sample) > _SORTS:
                continue
        number = np.int16(len(sorts)) + (np.int16(0) if which is None else which.astype(np.int16))
        sorts += [_mean_one(tm, level, int(heads[at]), grants, run) for at in sample.tolist()]
        place: NDArray[np.intp] | I64 | slice = slice(None) if mine is None else mine
        if chosen is not None:
            place = chosen[place]
        sort[place] = number
    sound, lg2, prot, word, said, keep = zip(*sorts, strict=True)
    return Means(
        sort,
        np.array(sound, np.bool_),
        np.array(lg2, np.uint8),
        np.array(prot, np.uint8),
        np.array(word, np.uint64),
        np.array(said, np.uint64),
        np.array(keep, np.uint8),
    )


def _sized(spec: LevelSpec) -> U64:
    rows = [
        (c.mask, c.value, ~((1 << c.lg2) - 1) & _MAX)
        for c in spec.contig
        if c.replicated and c.lg2 <= spec.index_bits
    ]
    return np.array(rows, np.uint64).reshape(-1, 3)


@dataclass(slots=True)
class Runs:
    """Tables of a level: ``state`` uint8[n]; of those that are RUN ``pa`` uint64[n] and what they ``mean``;
    ``base`` uint64[n] the IOVA of each.
    """

    level: int
    state: U8
    base: U64
    pa: U64
    mean: Means

    @property
    def prot(self) -> U8:
        """What each that is RUN grants."""
        return self.mean.prot[self.mean.sort]

    def extents(self, spec: LevelSpec) -> Extents:
        """The canonical extents of those that are RUN and let something pass."""
        prot, base, pa = self.prot, self.base, self.pa
        some = (self.state == RUN) & (prot != 0)
        if not some.all():
            base, pa, prot = base[some], pa[some], prot[some]
        span = np.uint64(spec.items << spec.shift)
        begin, end = _ends(base, span, prot, pa)
        return Extents(base[begin], base[end] + (span - _ONE), pa[begin], prot[begin]).canonical()

    def traits(self, spec: LevelSpec) -> Traits:
        """The traits of those that are RUN."""
        m, base, sort = self.mean, self.base, self.mean.sort
        some = self.state == RUN
        if not some.all():
            base, sort = base[some], sort[some]
        span = np.uint64(spec.items << spec.shift)
        begin, end = _ends(base, span, sort)
        kind = sort[begin]
        level = np.full(len(begin), self.level, np.uint8)
        alive = (m.prot[kind] != 0).view(np.uint8)
        columns = (m.lg2[kind], level, m.word[kind], m.said[kind], alive, m.keep[kind])
        return Traits.join([Traits(base[begin], base[end] + (span - _ONE), *columns)])


def _ends(
    base: U64, span: np.uint64, kind: U8 | NDArray[np.int16], pa: U64 | None = None
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The first and the last table of each range of neighbours of one kind (and of OAs in a row)."""
    if not len(base):
        none = np.zeros(0, np.intp)
        return none, none
    cut = base[1:] - base[:-1] != span
    cut |= kind[1:] != kind[:-1]
    if pa is not None:
        cut |= pa[1:] - pa[:-1] != span
    inner = np.flatnonzero(cut)
    return np.concatenate((np.zeros(1, np.intp), inner + 1)), np.append(inner, len(base) - 1)


def runs_of(tm: TableMemory, tables: Tables, threads: int | None = None) -> Runs:
    """Read tables once, in the order in which they lie in memory, as far as they are runs of leaves."""
    level, n = tables.level, len(tables)
    spec = tm.fmt.levels[level]
    items = tm.view(level).data.view(np.uint64)
    masks, sized = _masks(spec), _sized(spec)
    kernel_masks = np.array([masks[0], masks[6], masks[2]], np.uint64)
    place, rows = in_memory_order(tables.row)
    head, state = np.zeros(n, np.uint64), np.zeros(n, np.uint8)

    def work(a: int, b: int) -> None:
        _runs(items, rows[a:b], sized, kernel_masks, place[a:b], head, state)

    over_threads(work, n, tm.fmt.bytes_of(level), threads)
    one = state == RUN
    chosen = None if bool(one.all()) else np.flatnonzero(one)
    mean = means(tm, head, tables.above, chosen, run=True, level=level)
    pa = spec.leaf_pas(head)
    if spec.contig:  # with its size as it is coded
        pa &= (~((_ONE << mean.lg2.astype(np.uint64)) - _ONE))[mean.sort]
    top = pa + np.uint64((spec.items << spec.shift) - 1)
    outside = np.uint64(~spec.leaf_pa(_MAX) & ~((1 << spec.shift) - 1) & _MAX)
    state[one & ~(mean.sound[mean.sort] & (top >= pa) & ((top & outside) == _ZERO))] = OTHER
    return Runs(level, state, tables.base, pa, mean)


def extents_of(tm: TableMemory, tables: Tables, threads: int | None = None) -> tuple[Extents, I64]:
    """The canonical extents of tables of level 0 that are runs or pages, and the positions of the others."""
    fmt, spec = tm.fmt, tm.fmt.levels[0]
    runs = runs_of(tm, tables, threads)
    other = np.flatnonzero(runs.state == OTHER)
    if not len(other):
        return runs.extents(spec), other
    n, masks = len(tables), _masks(spec)
    items = tm.rows.data.view(np.uint64)
    base, pa, prot = runs.base, runs.pa, runs.prot
    head, tail, odd = np.zeros(n, np.uint64), np.zeros(n, np.uint64), np.zeros(n, np.uint64)
    slots, pieces = np.zeros((n, 2), np.int64), np.zeros(n, np.int64)
    place, rows = in_memory_order(tables.row, other)

    def look(a: int, b: int) -> None:
        _pages(items, rows[a:b], masks, place[a:b], head, tail, slots, pieces, odd)

    over_threads(look, len(rows), fmt.table_bytes, threads)
    mean = means(tm, head, tables.above, other, run=False)
    at = other[mean.sound[mean.sort[other]] & (odd[other] == _ZERO)]
    runs.state[at] = PAGES
    prot[at] = mean.prot[mean.sort[at]]
    one = runs.state == RUN
    pieces[one], slots[one, 1] = 1, spec.items - 1
    end = pa + np.uint64((spec.items - 1) << spec.shift)  # pa of the last page
    pa[at], end[at] = spec.leaf_pas(head[at]), spec.leaf_pas(tail[at])
    counts = (one | (runs.state == PAGES)) & (prot != 0)
    pieces[~counts] = 0
    goes_on = np.zeros(n + 1, np.bool_)  # the first extent of t is the last one of t - 1
    goes_on[1:n] = (
        counts[1:] & counts[:-1] & (slots[1:, 0] == 0) & (slots[:-1, 1] == spec.items - 1)
        & (base[1:] == base[:-1] + np.uint64(spec.items << spec.shift))
        & (pa[1:] == end[:-1] + np.uint64(1 << spec.shift)) & (prot[1:] == prot[:-1])
    )  # fmt: skip
    own = pieces - goes_on[:n]
    after = np.cumsum(own)
    first = after - pieces  # where the first piece of each is
    total = int(after[-1])
    out = _columns(total)
    simple = np.flatnonzero(one & counts)
    starts = simple[~goes_on[:n][simple]]
    out.iova[first[starts]], out.pa[first[starts]] = base[starts], pa[starts]
    out.prot[first[starts]] = prot[starts]
    ends = simple[~goes_on[1:][simple]]
    out.last[first[ends]] = base[ends] + np.uint64((spec.items << spec.shift) - 1)
    place, rows = in_memory_order(tables.row, at[counts[at]])
    joins = (goes_on[:n].view(np.uint8) | (goes_on[1:].view(np.uint8) << np.uint8(1)))[place]
    bases, grants, firsts, number = base[place], prot[place], first[place], pieces[place]

    def write(a: int, b: int) -> None:
        _write(
            items, rows[a:b], bases[a:b], grants[a:b], firsts[a:b], number[a:b], joins[a:b], masks,
            out.iova, out.last, out.pa, out.prot,
        )  # fmt: skip

    over_threads(write, len(rows), fmt.table_bytes * 4, threads)
    return out, np.flatnonzero(runs.state == OTHER)


def _columns(n: int) -> Extents:
    """Extents to be filled in."""
    whole = -(-n // (8 * _STAGGER)) * 8 * _STAGGER
    begin = [number * (whole + _STAGGER) for number in range(3)]
    room = np.empty(begin[2] + n, np.uint64)
    iova, last, pa = (room[at : at + n] for at in begin)
    return Extents(iova, last, pa, np.empty(n, np.uint8))


def same_pages(
    a: TableMemory, of_a: Tables, at_a: I64, b: TableMemory, of_b: Tables, at_b: I64, threads: int | None
) -> tuple[NDArray[np.bool_], int]:
    """Which pairs of tables of pages (positions, of one format) are sound and say the same; and the pages of
    those that do, where they let something pass.
    """
    spec = a.fmt.levels[0]
    items, others = a.rows.data.view(np.uint64), b.rows.data.view(np.uint64)
    # In the order of one of both; the other is read as it comes.
    place, rows = in_memory_order(of_a.row, at_a)
    to = np.empty(len(of_a), np.int64)
    to[at_a] = at_b
    partner = to[place]
    other_rows = of_b.row[partner]
    n, masks = len(place), _masks(spec)
    head, odd, pages = np.empty(n, np.uint64), np.empty(n, np.uint64), np.empty(n, np.int64)

    def work(i: int, j: int) -> None:
        _pairs(items, rows[i:j], others, other_rows[i:j], masks, head[i:j], odd[i:j], pages[i:j])

    over_threads(work, n, 2 * a.fmt.table_bytes, threads)
    mean = means(a, head, of_a.above[place], run=False)
    good = mean.sound[mean.sort] & (odd == _ZERO) & (of_a.above[place] == of_b.above[partner])
    out = np.zeros(len(of_a), np.bool_)
    out[place[good]] = True
    return out[at_a], int(pages[good & (mean.prot[mean.sort] != 0)].sum())
