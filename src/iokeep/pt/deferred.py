# SPDX-License-Identifier: Apache-2.0
"""Prove a table piece by piece, each piece at the latest when it is first needed.

:class:`Deferred` is the state of one table that is in use before it was proved. It begins in O(1):
everything is *unknown*. :meth:`Deferred.need` proves what is unknown of a range, holes included (nothing
extra is there); :meth:`Deferred.sweep` goes through the rest, so many bytes of tables at a time. A range is
then *proved*, or *quarantined*: exactly the IOVAs where the table is not what is expected, as ``verify``
names them (for a bad item of an upper level: all that it spans of the range that was asked for). A range is
judged once. Whoever changes the table within proved ranges changes the expectation with it, and they stay
proved; a quarantined range must be left alone, and so must what is unknown.

The sweep goes in blocks (``block``): the way to the tables of a block and what they must hold is looked up
once, and then a tick costs little more than to read its tables.

A piece is judged by the items that translate it, from the root down, as hardware reads them. A page that
serves at two levels is therefore reported as a loop only where one piece sees it at both; seen at one level
at a time it is proved or not by what it translates there. Where the root itself is absent, or sub-trees
are shared without bound, nothing can be proved, and everything is quarantined.

Whoever is going to change the table says which pages are his (``owned``). Then, before the first piece is
judged, all that is above the tables of level 0 is looked through once (1/512 of the bytes where pages are
small) for what makes a change unsafe although every translation is right (``shape``), and such ranges are
quarantined at once: a table that is linked at two places shows in no piece alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from iokeep.errors import IokeepError
from iokeep.mem.memory import U64, Memory
from iokeep.mem.ranges import Range, RangeSet
from iokeep.pt.block import Block
from iokeep.pt.choice import jit, loaded
from iokeep.pt.compare import Mismatch, clip_extents
from iokeep.pt.extents import Extents
from iokeep.pt.formats.base import Format
from iokeep.pt.leaves import kernels_down, raw_ranges
from iokeep.pt.shape import only_leaves, unfit
from iokeep.pt.tables import TableMemory, descend
from iokeep.pt.verify import merged, verify

_MAX = 2**64 - 1
#: mismatches that are told apart in one piece; where there are more, the rest of the piece is quarantined
NAMED = 256
#: a subtree is not taken to have more bytes of tables than this
_HUGE = 1 << 49
#: bytes of tables that a sweep in the background reads at a time, unless told otherwise: nobody waits long
TICK = 256 << 10
#: bytes of tables that one piece of a sweep reads at most, whatever the budget
PIECE = 64 << 20
#: a block of the sweep is looked up for so many times the budget: its upper tables are an eighth of one then
_AHEAD = 64
#: and for less where it is expected in more extents than this
_EXTENTS = 1 << 16
#: a large leaf is as much work for a tick as so many bytes of tables, and so is the look-up of a block
_LEAF = 64
_LOOKUP = 128 << 10


@dataclass(frozen=True, slots=True)
class Quarantine:
    """A range that is not what was expected. :param mismatch: why; it may reach beyond the range."""

    range: Range
    mismatch: Mismatch


class Deferred:
    """A table under proof.

    :param expect: what must be there in [start, last]: sorted, disjoint extents, which may reach beyond.
        Asked for a piece when it is judged, or by the sweep some time before: it must not change where
        nothing is known yet. What it raises goes through, and nothing has changed then.
    :param owned: gives the pas of the 4096-byte pages that the tables may lie in, sorted; asked once. None:
        nobody will change the table.
    :param compiled: by Numba (True), by NumPy alone (False), or (None) as is faster: a range that is needed
        by the rule of ``verify``; the sweep by Numba where that is loaded, which it never does itself.
    :param proved: told each range that was proved, as soon as it is.
    :param condemned: told each quarantine likewise.
    """

    def __init__(
        self,
        fmt: Format,
        mem: Memory,
        root_pa: int,
        expect: Callable[[int, int], Extents],
        *,
        owned: Callable[[], U64] | None = None,
        compiled: bool | None = None,
        proved: Callable[[Range], None] = lambda r: None,
        condemned: Callable[[Quarantine], None] = lambda q: None,
    ) -> None:
        self.fmt = fmt
        self.mem = mem
        self.root_pa = root_pa
        self.validated = RangeSet()
        self.quarantined = RangeSet()
        #: the first :data:`NAMED` of ``total`` differences, in the order in which they were found
        self.mismatches: list[Mismatch] = []
        self.total = 0
        #: bytes of tables read so far; what is read twice counts twice
        self.table_bytes = 0
        self._expect = expect
        self._owned = owned
        self._compiled = compiled
        self._proved = proved
        self._condemned = condemned
        self._known = RangeSet()
        self._tm: TableMemory | None = None
        self._bounds: list[int] = []
        self._block: Block | None = None
        self._ahead = 1

    # ---- asking

    @property
    def done(self) -> bool:
        """Nothing is unknown any more."""
        return self._known.first_outside() is None

    @property
    def sound(self) -> bool:
        """Everything is proved."""
        return self.done and not self.quarantined

    def unknown(self, start: int, last: int) -> list[Range]:
        """What of [start, last] nobody has looked at."""
        return self._known.outside(start, last)

    def need(self, start: int, last: int) -> list[Range]:
        """Prove what is unknown of [start, last]; the ranges in it that are quarantined (none = use it)."""
        if self.unknown(start, last):
            self._look_at_shape()
        for r in self.unknown(start, last):
            self._judge(r.start, r.last)
        return self.quarantined.within(start, last)

    # ---- the sweep

    def sweep(self, budget: int) -> int:
        """Prove unknown ranges, lowest first, until about ``budget`` bytes of tables were read; how many.

        Goes on by a step at least, so that any budget makes progress; 0 where all is known.
        """
        before = self.table_bytes
        work = self._look_at_shape()
        if self.done:
            self._block = None
        while (not work or work < budget) and (self._block is not None or not self.done):
            work += max(self._step(budget, max(budget - work, 0)), 1)
        return max(self.table_bytes - before, min(work, 1))

    def _step(self, budget: int, left: int) -> int:
        """One step of the sweep, of about ``left`` bytes of tables; the work that it was, in such bytes."""
        block, before = self._block, self.table_bytes
        if block is None:
            self._begin(budget)
            return self.table_bytes - before + _LOOKUP
        elif block.left:
            self._compare(block, max(left // self.fmt.table_bytes, 1))
        else:
            self._block = None
            known = self._known.within(block.start, block.last)
            if known != [Range(block.start, block.last)]:
                self._settle(*block.rest(known, NAMED), block.start, block.last)
            return block.leaves * _LEAF
        return self.table_bytes - before

    def _begin(self, budget: int) -> None:
        """Look up the next block: so large that it is worth it, so small that it costs about a tick."""
        gap = self._known.first_outside()
        if gap is None:
            return
        start, tm = gap.start, self._memory()
        last = self.unknown(start, self._reach(start, min(budget * self._ahead, PIECE)))[-1].last
        want = clip_extents(self._expect(start, last), start, last)
        try:
            known = self._known.within(start, last)
            self._block = Block(tm, self.root_pa, start, last, want, known, compiled=self._by_kernels())
        except IokeepError:  # less of it may be sound
            self._judge(start, min(gap.last, self._reach(start, min(budget, PIECE))))
            return
        self.table_bytes += self._block.upper_bytes
        if len(want) <= _EXTENTS // 2:
            self._ahead = min(self._ahead * 2, _AHEAD)
        elif len(want) > _EXTENTS:
            self._ahead = max(self._ahead // 2, 1)

    def _by_kernels(self) -> bool:
        """Whether a block is compared by compiled code. The sweep never loads it: that holds the interpreter
        for longer than any tick, from another thread too, and NumPy is not that much slower.
        """
        if self._compiled is None:
            return loaded("sweep") and jit()
        return self._compiled

    def _compare(self, block: Block, n: int) -> None:
        """Prove the next tables of a block, or judge where they are something else."""
        base, same = block.compare(n)
        self.table_bytes += len(base) * self.fmt.table_bytes
        first, last = int(base[0]), int(base[-1]) + block.span - 1
        if same.all() and last - first + 1 == len(base) * block.span:
            for r in self.unknown(first, last):
                self._prove(r)
            return
        if not same.all():
            wrong = np.flatnonzero(~same)
            first, end = int(wrong[0]), int(wrong[-1])
            for r in self.unknown(int(base[first]), int(base[end]) + block.span - 1):
                self._judge(*r)
            same[first : end + 1] = False
        for at, last in zip(*(c.tolist() for c in merged(base[same], block.span)), strict=True):
            for r in self.unknown(at, last):
                self._prove(r)

    def _reach(self, start: int, budget: int) -> int:
        """Last IOVA of a piece that begins at ``start`` and reads about ``budget`` bytes at most."""
        fmt = self.fmt
        raws = raw_ranges(fmt, start, None)
        if not raws:
            return _MAX
        raw = raws[0][0]
        try:
            end = self._reach_raw(raw, budget)
        except IokeepError:
            return _MAX  # the root: judging says why
        if end >= (1 << fmt.input_lg2) - 1:
            return _MAX
        return int(fmt.extend(np.array([end], np.uint64))[0])

    def _reach_raw(self, start: int, budget: int) -> int:
        fmt, tm = self.fmt, self._memory()
        level, base, pa = fmt.top_level, 0, self.root_pa
        items, visited = tm.root(pa)[0], {pa}
        while True:
            spec = fmt.levels[level]
            table_last = base + (spec.items << spec.shift) - 1
            budget -= fmt.bytes_of(level)
            if level == 0:
                return table_last
            at = (start - base) >> spec.shift
            rest: U64 = items[at:]
            there = np.zeros(len(rest), np.bool_)
            there[tm.places(level, rest)] = True
            down = there & ~spec.are_leaves(rest)
            cost = np.cumsum(
                np.where(down, np.uint64(self._bounds[level - 1]), np.uint64(0)), dtype=np.uint64
            )
            fits = int(np.searchsorted(cost, np.uint64(max(budget, 0)), side="right"))
            if fits:
                return base + ((at + fits) << spec.shift) - 1
            item = int(rest[0])
            below, pa = spec.next_level(item, level), spec.table_pa(item)
            base += at << spec.shift
            row = tm.index(below, np.array([pa], np.uint64))
            inside = base + (fmt.levels[below].items << fmt.levels[below].shift) > start
            if pa in visited or int(row[0]) < 0 or not inside:
                return base + (1 << spec.shift) - 1
            visited.add(pa)
            items, level = tm.items(row, below)[0], below

    def _memory(self) -> TableMemory:
        if self._tm is None:
            self._tm = TableMemory(self.fmt, self.mem)
            size = 0
            for level, spec in enumerate(self.fmt.levels):
                size = min(self.fmt.bytes_of(level) + (size * spec.items if level else 0), _HUGE)
                self._bounds.append(size)
        return self._tm

    # ---- judging

    def _look_at_shape(self) -> int:
        """Quarantine what is unfit to be changed; once. Bytes of the tables read."""
        if self._owned is None:
            return 0
        owned = self._owned()
        try:
            tm = self._memory()
            straight = kernels_down(self._compiled)
            upper = descend(tm, self.root_pa, straight=straight, known=lambda tables: only_leaves(tm, tables))
            bad = unfit(tm, upper, owned)
        except IokeepError:
            self._owned = None
            return 0  # the root: judging says why
        self._owned = None
        read = upper.visited_bytes(self.fmt) - len(upper.base) * self.fmt.bytes_of(0)
        self.table_bytes += read
        self.total += len(bad)
        rows = bad.mismatches(min(max(NAMED - len(self.mismatches), 1), len(bad)))
        self.mismatches += rows
        for i, (iova, last) in enumerate(zip(bad.iova.tolist(), bad.last.tolist(), strict=True)):
            why = rows[min(i, len(rows) - 1)]
            for r in self.unknown(iova, last):
                self._condemn(Quarantine(r, why))
        return read

    def _judge(self, start: int, last: int) -> None:
        """Judge [start, last], all of which is unknown."""
        want = clip_extents(self._expect(start, last), start, last)
        try:
            args = self.fmt, self.mem, self.root_pa, want
            verdict = verify(*args, limit=NAMED, start=start, last=last, compiled=self._compiled)
        except IokeepError as error:
            why = Mismatch(0, _MAX, self.root_pa, None, None, None, "absent", None, error.what)
            self.total += 1
            self.mismatches.append(why)
            for r in self.unknown(0, _MAX):
                self._condemn(Quarantine(r, why))
            return
        self.table_bytes += verdict.table_bytes
        self._settle(verdict.mismatches, verdict.total, start, last)

    def _settle(self, found: list[Mismatch], total: int, start: int, last: int) -> None:
        """What is unknown of [start, last] is proved, but for the mismatches: the first of ``total``."""
        self.total += total
        self.mismatches += found[: max(NAMED - len(self.mismatches), 0)]
        at = start
        for m in found:
            a, b = max(m.iova, start), min(m.last, last)
            if m is found[-1] and total > len(found):
                b = last
            for r in self.unknown(at, a - 1):
                self._prove(r)
            for r in self.unknown(a, b):
                self._condemn(Quarantine(r, m))
            at = b + 1
        for r in self.unknown(at, last):
            self._prove(r)

    def _prove(self, r: Range) -> None:
        self._known.add(*r)
        self.validated.add(*r)
        self._proved(r)

    def _condemn(self, quarantine: Quarantine) -> None:
        self._known.add(*quarantine.range)
        self.quarantined.add(*quarantine.range)
        self._condemned(quarantine)
