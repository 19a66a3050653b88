# SPDX-License-Identifier: Apache-2.0
"""Tables of leaves as runs: ``extents``, ``digest`` and ``diff`` read them so. By compiled loops
(``run_kernels``) where tables are big, else by NumPy, a few tables at a time; no Numba is imported for that.

Most tables hold one run: items that grant the same and whose OAs follow each other. What such a table
translates is known from its first item; reading the rest, in the order in which tables lie in memory, only
proves it. What an item *means* is not said here: the general code (``tables.leaves_of``) reads one table of
every sort, and all tables whose items differ from that one's in nothing but the OA mean the same.
A table that is no run but whose items grant the same is a table of *pages*; any other is left to the general
code.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from iokeep.mem.memory import I64, U8, U64
from iokeep.pt.extents import Extents
from iokeep.pt.formats.base import LevelSpec
from iokeep.pt.memo import Memo
from iokeep.pt.states import EMPTY, OTHER, PAGES, RUN
from iokeep.pt.tables import TableMemory, Tables, leaves_of
from iokeep.pt.traits import Attributes, Traits

_ZERO = np.uint64(0)
_ONE = np.uint64(1)
_MAX = 2**64 - 1
#: a cache line of items: most tables that are no run show it there
_LINE = 8
#: so many tables are read at once by NumPy: they stay in the second cache with what is made of them
_FEW = 64
#: tables of more sorts than these are left to the general code
_SORTS = 256
#: where columns of output begin, in items: those that begin at one place of a page disturb each other
_STAGGER = 64
#: room for ranges of runs that most tables need
_RANGES = 1024


def readable(tm: TableMemory, level: int = 0) -> bool:
    """Whether the tables of this level can be read as runs."""
    spec = tm.fmt.levels[level]
    pa = spec.leaf_pa_mask
    plain = tm.plains[level] and tm.parts[level] == 1 and not spec.pa_pieces and not tm.linux
    bad = any(mask & pa for mask, _ in spec.leaf_bad)
    return plain and not bad and all(contig.mask & ~pa for contig in spec.contig)


def likely(tm: TableMemory, tables: Tables) -> bool:
    """Whether most of some tables, looked at here and there, may be runs."""
    spec = tm.fmt.levels[tables.level]
    rows = tables.row[:: max(-(-len(tables) // _FEW), 1)]
    items = tm.view(tables.level).data.view(np.uint64)[:, :2][rows]
    step = items[:, 1] - items[:, 0]
    step &= np.uint64(_same(spec) | spec.leaf_pa_mask)
    # Pages in a row, or equal items: of a contiguous entry, or absent.
    runs = (step == np.uint64((1 << spec.shift) >> spec.pa_shift)) | (step == _ZERO)
    return int(np.count_nonzero(runs)) * 2 >= len(rows)


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
    :class:`~iokeep.pt.traits.Attributes`; ``keep`` uint8. Sort 0 is not sound.
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


#: what sorts of items mean: by level and item, what is granted above, and whether it is a run
_KNOWN: Memo[_Mean] = Memo(4 * _SORTS)


def _mean_one(tm: TableMemory, level: int, key: int, above: int, run: bool) -> _Mean:
    """What items of one sort mean, as the general code has it: of a table that is one run, or by themselves.

    :param key: an item of this sort whose OA is 0, or its place in a contiguous entry.
    """
    return _KNOWN.get(tm.fmt, (level, key, above, run), lambda: _read_one(tm, level, key, above, run))


def _read_one(tm: TableMemory, level: int, head: int, above: int, run: bool) -> _Mean:
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


def _keys(spec: LevelSpec, head: U64, run: bool) -> U64:
    """Of which sort items are: without their OAs, but for the place in a contiguous entry, which matters to
    items that may begin a table of them.
    """
    same = np.uint64(_same(spec))
    marked = _marked(spec, head) if run and spec.contig else None
    if marked is None or not marked.any():
        return head & same
    return np.where(marked, head & (same | _inner(spec)), head & same).astype(np.uint64)


def _marked(spec: LevelSpec, head: U64) -> NDArray[np.bool_]:
    """Which items may be part of a contiguous entry: a matter of bits that are the same in all of a sort."""
    marked = np.zeros(len(head), np.bool_)
    for contig in spec.contig:
        mask = contig.mask & ~spec.leaf_pa_mask
        marked |= (head & np.uint64(mask)) == np.uint64(contig.value & mask)
    return marked


def _inner(spec: LevelSpec) -> np.uint64:
    """OA bits that are the place in the largest contiguous entry."""
    largest = spec.shift + max(contig.lg2 for contig in spec.contig)
    return np.uint64(((1 << largest) - 1) >> spec.pa_shift & spec.leaf_pa_mask)


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
    key = _keys(spec, head, run)
    few = range(int(above.min()), int(above.max()) + 1) if len(head) else range(0)
    for grants in few:
        mine = None if len(few) == 1 else np.flatnonzero(above == grants)
        if mine is not None and not len(mine):
            continue
        keys = key if mine is None else key[mine]
        sample, which = np.zeros(1, np.intp), None
        if not bool((keys == keys[0]).all()):
            _, sample, which = np.unique(keys, return_index=True, return_inverse=True)
            if len(sample) > _SORTS:
                continue
        number = np.int16(len(sorts)) + (np.int16(0) if which is None else which.astype(np.int16))
        sorts += [_mean_one(tm, level, int(keys[at]), grants, run) for at in sample.tolist()]
        place: NDArray[np.intp] | I64 | slice = slice(None) if mine is None else mine
        if chosen is not None:
            place = chosen[place]
        sort[place] = number
    return _means_of(sort, sorts)


def _means_of(sort: NDArray[np.int16], sorts: list[_Mean]) -> Means:
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
    """Tables of a level: ``state`` uint8[n]; of those that are RUN what they ``mean``; ``base`` uint64[n] the
    IOVA of each, ``head`` uint64[n] its first item.

    :param joined: iova, last, pa of the maximal ranges, where all that are RUN are of one sort.
    """

    level: int
    state: U8
    base: U64
    head: U64
    mean: Means
    joined: tuple[U64, U64, U64] | None = None

    def others(self) -> I64:
        """Positions of those that are something else."""
        return np.flatnonzero(self.state == OTHER)

    @property
    def prot(self) -> U8:
        """What each that is RUN grants."""
        return self.mean.prot[self.mean.sort]

    def pa(self, spec: LevelSpec) -> U64:
        """OA of the first byte of each that is RUN."""
        pa = spec.leaf_pas(self.head)
        if spec.contig:  # with its size as it is coded
            pa &= (~((_ONE << self.mean.lg2.astype(np.uint64)) - _ONE))[self.mean.sort]
        return pa

    def extents(self, spec: LevelSpec) -> Extents:
        """The canonical extents of those that are RUN and let something pass."""
        if self.joined is not None:
            iova, last, joined = self.joined
            grant = self.mean.prot[-1]
            return Extents(iova, last, joined, np.full(len(iova), grant)) if grant else Extents.empty()
        prot, base, pa = self.prot, self.base, self.pa(spec)
        some = (self.state == RUN) & (prot != 0)
        if not some.all():
            base, pa, prot = base[some], pa[some], prot[some]
        span = np.uint64(spec.items << spec.shift)
        begin, end = _ends(base, span, prot, pa)
        return Extents(base[begin], base[end] + (span - _ONE), pa[begin], prot[begin]).canonical()

    def traits(self, spec: LevelSpec) -> Traits:
        """The traits of those that are RUN."""
        m, base, sort = self.mean, self.base, self.mean.sort
        if self.joined is not None:
            iova, last, _ = self.joined
            kind = np.ones(len(iova), np.int16)
        else:
            some = self.state == RUN
            if not some.all():
                base, sort = base[some], sort[some]
            span = np.uint64(spec.items << spec.shift)
            begin, end = _ends(base, span, sort)
            kind, iova, last = sort[begin], base[begin], base[end] + (span - _ONE)
        level = np.full(len(kind), self.level, np.uint8)
        alive = (m.prot[kind] != 0).view(np.uint8)
        columns = (m.lg2[kind], level, m.word[kind], m.said[kind], alive, m.keep[kind])
        return Traits.join([Traits(iova, last, *columns)])


@dataclass(frozen=True, slots=True)
class OneRange:
    """As :class:`Runs`, where all tables are RUN and one range together.

    :param base: of each. :param first: :param last: :param pa: of the range. :param mean: what each means.
    """

    level: int
    base: U64
    first: int
    last: int
    pa: int
    mean: _Mean

    @property
    def state(self) -> U8:
        """RUN for each."""
        return np.full(len(self.base), RUN, np.uint8)

    def others(self) -> I64:
        """There are none."""
        return np.zeros(0, np.int64)

    def extents(self, spec: LevelSpec) -> Extents:
        """As :meth:`Runs.extents`."""
        prot = self.mean[2]
        return Extents.of([(self.first, self.last, self.pa, prot)] if prot else [])

    def traits(self, spec: LevelSpec) -> Traits:
        """As :meth:`Runs.traits`."""
        _, lg2, prot, word, said, keep = self.mean
        ends, said_of = (
            np.array([[self.first], [self.last]], np.uint64),
            np.array([[word], [said]], np.uint64),
        )
        small = np.array([[lg2], [self.level], [prot != 0], [keep]], np.uint8)
        return Traits(ends[0], ends[1], small[0], small[1], said_of[0], said_of[1], small[2], small[3])


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


def runs_of(
    tm: TableMemory, tables: Tables, threads: int | None = None, *, compiled: bool = True
) -> Runs | OneRange:
    """Read tables once, in the order in which they lie in memory, as far as they are runs of leaves.

    :param compiled: by Numba; else by NumPy, in the order of IOVAs. :param threads: of the former.
    """
    level, n = tables.level, len(tables)
    spec = tm.fmt.levels[level]
    items = tm.view(level).data.view(np.uint64)
    masks, sized = _masks(spec), _sized(spec)
    some_masks = np.array([masks[0], masks[6], masks[2]], np.uint64)
    head, state = np.empty(n, np.uint64), np.empty(n, np.uint8)
    if compiled:
        from iokeep.pt.kernels import in_memory_order, over_threads
        from iokeep.pt.run_kernels import in_place, read_runs

        place, rows = in_memory_order(tables.row)

        def work(a: int, b: int) -> None:
            read_runs(items, rows[a:b], sized, some_masks, head[a:b], state[a:b])

        over_threads(work, n, tm.fmt.bytes_of(level), threads)
        line = _one_range(tm, tables, place, head, state)
        if line is not None:
            return line
        if rows is not tables.row:
            read = head, state
            head, state = np.empty(n, np.uint64), np.empty(n, np.uint8)
            in_place(place, *read, head, state)
        joined = _all_joined(tm, tables, head, state)
        if joined is not None:
            return joined
    else:
        _read_plain(items, tables.row, sized, some_masks, head, state)
    one = state == RUN
    chosen = None if bool(one.all()) else np.flatnonzero(one)
    mean = means(tm, head, tables.above, chosen, run=True, level=level)
    found = Runs(level, state, tables.base, head, mean)
    pa = found.pa(spec)
    top = pa + np.uint64((spec.items << spec.shift) - 1)
    sound = mean.sound[mean.sort] & (top >= pa) & ((top & _outside(spec)) == _ZERO)
    state[one & ~sound] = OTHER
    return found


def unread(tables: Tables) -> Runs:
    """Tables of which none is taken for a run: all are OTHER."""
    n = len(tables)
    mean = _means_of(np.zeros(n, np.int16), [_NOTHING])
    return Runs(tables.level, np.zeros(n, np.uint8), tables.base, np.zeros(n, np.uint64), mean)


def _outside(spec: LevelSpec) -> np.uint64:
    """Bits that are set in no pa of a leaf."""
    return np.uint64(~spec.leaf_pa(_MAX) & ~((1 << spec.shift) - 1) & _MAX)


def _sort_of(tm: TableMemory, level: int, head: U64, above: int) -> tuple[int, int, _Mean]:
    """Of a table that is RUN, by its first item: bits that say of which sort it is, their value, and what it
    means.
    """
    spec = tm.fmt.levels[level]
    sort = _same(spec)
    if spec.contig and _marked(spec, head)[0]:
        sort |= int(_inner(spec))
    key = int(head[0]) & sort
    return sort, key, _mean_one(tm, level, key, above, run=True)


def _one_range(tm: TableMemory, tables: Tables, place: I64, head: U64, state: U8) -> OneRange | None:
    """Tables that are one range, as most are: found in the order of memory, as they were read. None = they
    are not.

    :param place: of what was read among the ``tables``.
    """
    from iokeep.pt.run_kernels import all_in_line

    level, n, spec = tables.level, len(tables), tm.fmt.levels[tables.level]
    span, outside = spec.items << spec.shift, int(_outside(spec))
    # Bits that no pa has must be all above some bit: else a range may have them inside.
    if (
        not n
        or int(tables.base[-1]) - int(tables.base[0]) != (n - 1) * span
        or outside & -outside != -outside % 2**64
    ):
        return None
    rise = span >> spec.pa_shift
    full = np.uint64(_same(spec) | spec.leaf_pa_mask)
    if not all_in_line(place, head, state, tables.above, full, np.uint64(rise)):
        return None
    first = tm.view(level).data.view(np.uint64)[tables.row[0], :1]
    sort, _, mean = _sort_of(tm, level, first, int(tables.above[0]))
    pa = spec.leaf_pa(int(first[0]))
    pa &= ~((1 << mean[1]) - 1)
    if (
        not mean[0]
        or sort & spec.leaf_pa_mask & -rise
        or (pa + n * span - 1) & outside
        or pa + n * span > 2**64
    ):
        return None
    return OneRange(level, tables.base, int(tables.base[0]), int(tables.base[-1]) + span - 1, pa, mean)


def _all_joined(tm: TableMemory, tables: Tables, head: U64, state: U8) -> Runs | None:
    """Tables that are all of one sort, as most are, in one loop; None = they are not."""
    from iokeep.pt.run_kernels import join_runs

    level, n = tables.level, len(tables)
    spec = tm.fmt.levels[level]
    at = int((state == RUN).argmax()) if n and state[0] != RUN else 0
    if not n or state[at] != RUN:
        return None
    grant = tables.above[at : at + 1]
    sort, key, mean = _sort_of(tm, level, head[at : at + 1], int(grant[0]))
    if not mean[0]:
        return None
    whole = ~((1 << mean[1]) - 1) & _MAX if spec.contig else _MAX
    span = (spec.items << spec.shift) - 1
    masks = [sort, key, spec.leaf_pa_mask, spec.pa_shift, whole, span, int(_outside(spec))]
    args = tables.base, head, tables.above, state, grant, np.array(masks, np.uint64)
    room = np.empty((3, _RANGES), np.uint64)
    count = join_runs(*args, *room)
    if count > _RANGES:
        room = np.empty((3, count), np.uint64)
        join_runs(*args, *room)
    if count < 0:
        return None
    iova, last, pa = room[:, :count].copy()
    mean_of = _means_of((state == RUN).astype(np.int16), [_NOTHING, mean])
    return Runs(level, state, tables.base, head, mean_of, (iova, last, pa))


def _read_plain(items: U64, row: I64, sized: U64, masks: U64, head: U64, state: U8) -> None:
    """``run_kernels.read_runs`` by NumPy, in the order of ``row``."""
    step, full, valid = masks
    index = np.arange(items.shape[1], dtype=np.uint64)
    widths = (_LINE, items.shape[1]) if items.shape[1] > _LINE else (items.shape[1],)
    for lo in range(0, len(row), _FEW):
        rows = row[lo : lo + _FEW]
        first = items[rows, 0]
        group = np.zeros(len(rows), np.int64)
        for number in range(len(sized), 0, -1):  # the first that fits
            group[(first & sized[number - 1, 0]) == sized[number - 1, 1]] = number
        group[(first & valid) == _ZERO] = -1
        said = np.zeros(len(rows), np.uint8)
        for number in np.unique(group).tolist():
            at = np.flatnonzero(group == number)
            places = index if number < 1 else index & sized[number - 1, 2]
            for width in widths:
                part = items[:, :width][rows[at]]
                if number < 0:
                    part &= valid
                else:
                    part ^= first[at, None] + places[:width] * step
                    part &= full
                at = at[np.bitwise_or.reduce(part, axis=1) == _ZERO]
                if not len(at):
                    break
            said[at] = EMPTY if number < 0 else RUN
        head[lo : lo + _FEW] = first
        state[lo : lo + _FEW] = said


def extents_of(
    tm: TableMemory, tables: Tables, threads: int | None = None, *, compiled: bool = True
) -> tuple[Extents, I64]:
    """The canonical extents of tables of level 0 that are runs or (compiled) pages, and the positions of the
    others.
    """
    fmt, spec = tm.fmt, tm.fmt.levels[0]
    runs = runs_of(tm, tables, threads, compiled=compiled)
    other = runs.others()
    if isinstance(runs, OneRange) or not len(other) or not compiled:
        return runs.extents(spec), other
    from iokeep.pt.kernels import in_memory_order, over_threads
    from iokeep.pt.run_kernels import read_pages, write_pages

    n, masks = len(tables), _masks(spec)
    items = tm.rows.data.view(np.uint64)
    base, pa, prot = runs.base, runs.pa(spec), runs.prot
    head, tail, odd = np.zeros(n, np.uint64), np.zeros(n, np.uint64), np.zeros(n, np.uint64)
    slots, pieces = np.zeros((n, 2), np.int64), np.zeros(n, np.int64)
    place, rows = in_memory_order(tables.row, other)

    def look(a: int, b: int) -> None:
        read_pages(items, rows[a:b], masks, place[a:b], head, tail, slots, pieces, odd)

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
    # In the order of IOVAs: three times as much is written as is read, most of it to fresh memory.
    place = at[counts[at]]
    rows = tables.row[place]
    joins = (goes_on[:n].view(np.uint8) | (goes_on[1:].view(np.uint8) << np.uint8(1)))[place]
    bases, grants, firsts, number = base[place], prot[place], first[place], pieces[place]

    def write(a: int, b: int) -> None:
        write_pages(
            items, rows[a:b], bases[a:b], grants[a:b], firsts[a:b], number[a:b], joins[a:b], masks,
            out.iova, out.last, out.pa, out.prot,
        )  # fmt: skip

    over_threads(write, len(rows), fmt.table_bytes * 4, threads)
    return out, runs.others()


def _columns(n: int) -> Extents:
    """Extents to be filled in."""
    whole = -(-n // (8 * _STAGGER)) * 8 * _STAGGER
    begin = [number * (whole + _STAGGER) for number in range(3)]
    room = np.empty(begin[2] + n, np.uint64)
    iova, last, pa = (room[at : at + n] for at in begin)
    return Extents(iova, last, pa, np.empty(n, np.uint8))


def same_pages(
    a: TableMemory,
    of_a: Tables,
    at_a: I64,
    b: TableMemory,
    of_b: Tables,
    at_b: I64,
    threads: int | None,
    *,
    compiled: bool = True,
) -> tuple[NDArray[np.bool_], int]:
    """Which pairs of tables of pages (positions, of one format) are sound and say the same; and the pages of
    those that do, where they let something pass.
    """
    spec = a.fmt.levels[0]
    items, others = a.rows.data.view(np.uint64), b.rows.data.view(np.uint64)
    n, masks = len(at_a), _masks(spec)
    head, odd, pages = np.empty(n, np.uint64), np.empty(n, np.uint64), np.empty(n, np.int64)
    if compiled:
        from iokeep.pt.kernels import in_memory_order, over_threads
        from iokeep.pt.run_kernels import compare_pages

        # In the order of one of both; the other is read as it comes.
        place, rows = in_memory_order(of_a.row, at_a)
        partner = place
        if at_a is not at_b:
            to = np.empty(len(of_a), np.int64)
            to[at_a] = at_b
            partner = to[place]
        other_rows = of_b.row[partner]

        def work(i: int, j: int) -> None:
            compare_pages(items, rows[i:j], others, other_rows[i:j], masks, head[i:j], odd[i:j], pages[i:j])

        over_threads(work, n, 2 * a.fmt.table_bytes, threads)
    else:
        place, partner = at_a, at_b
        _compare_plain(items, of_a.row[at_a], others, of_b.row[at_b], masks, head, odd, pages)
    mean = means(a, head, of_a.above[place], run=False)
    good = mean.sound[mean.sort] & (odd == _ZERO) & (of_a.above[place] == of_b.above[partner])
    out = np.zeros(len(of_a), np.bool_)
    out[place[good]] = True
    return out[at_a], int(pages[good & (mean.prot[mean.sort] != 0)].sum())


def _compare_plain(
    items: U64, row: I64, others: U64, other_row: I64, masks: U64, head: U64, odd: U64, pages: I64
) -> None:
    """``run_kernels.compare_pages`` by NumPy."""
    same, valid, full = masks[1], masks[2], masks[6]
    for lo in range(0, len(row), _FEW):
        part = slice(lo, lo + _FEW)
        mine, to = items[row[part]], others[other_row[part]]
        there = (mine & valid) != _ZERO
        first = mine[np.arange(len(mine)), there.argmax(axis=1)]
        differ = (mine ^ first[:, None]) & same
        differ |= (mine ^ to) & full
        if not there.all():
            differ[~there] = to[~there] & valid
        head[part], odd[part] = first, np.bitwise_or.reduce(differ, axis=1)
        pages[part] = np.count_nonzero(there, axis=1)
