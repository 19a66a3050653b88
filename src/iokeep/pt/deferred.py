# SPDX-License-Identifier: Apache-2.0
"""Prove a table piece by piece, each piece at the latest when it is first needed.

:class:`Deferred` is the state of one table that is in use before it was proved. It begins in O(1):
everything is *unknown*. :meth:`Deferred.need` proves what is unknown of a range, holes included (nothing
extra is there); :meth:`Deferred.sweep` goes through the rest, so many bytes of tables at a time. A range is
then *proved*, or *quarantined*: exactly the IOVAs where the table is not what is expected, as ``verify``
names them (for a bad item of an upper level: all that it spans of the range that was asked for). A range is
judged once. Whoever changes the table within proved ranges changes the expectation with it, and they stay
proved; a quarantined range must be left alone.

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
from iokeep.pt.compare import Mismatch, clip_extents
from iokeep.pt.extents import Extents
from iokeep.pt.formats.base import Format
from iokeep.pt.leaves import raw_ranges
from iokeep.pt.shape import unfit
from iokeep.pt.tables import TableMemory, descend
from iokeep.pt.verify import verify

_MAX = 2**64 - 1
#: mismatches that are told apart in one piece; where there are more, the rest of the piece is quarantined
NAMED = 256
#: a subtree is not taken to have more bytes of tables than this
_HUGE = 1 << 49
#: bytes of tables that one piece of a sweep reads at most, whatever the budget
PIECE = 64 << 20


@dataclass(frozen=True, slots=True)
class Quarantine:
    """A range that is not what was expected. :param mismatch: why; it may reach beyond the range."""

    range: Range
    mismatch: Mismatch


class Deferred:
    """A table under proof.

    :param expect: what must be there in [start, last]: sorted, disjoint extents, which may reach beyond.
        Asked for each piece, when it is judged; what it raises goes through, and nothing has changed then.
    :param owned: gives the pas of the 4096-byte pages that the tables may lie in, sorted; asked once. None:
        nobody will change the table.
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
        self._proved = proved
        self._condemned = condemned
        self._known = RangeSet()
        self._tm: TableMemory | None = None
        self._bounds: list[int] = []

    # ---- asking

    @property
    def done(self) -> bool:
        """Nothing is unknown any more."""
        return not self.unknown(0, _MAX)

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

        At least one piece is proved, so that any budget makes progress; 0 where all is known.
        """
        read = self._look_at_shape()
        while (left := self.unknown(0, _MAX)) and (not read or read < budget):
            r = left[0]
            last = min(r.last, self._reach(r.start, min(max(budget - read, 0), PIECE)))
            before = self.table_bytes
            self._judge(r.start, last)
            read += max(self.table_bytes - before, 1)
        return read

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
            upper = descend(tm, self.root_pa)
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
            verdict = verify(
                self.fmt, self.mem, self.root_pa, want, limit=NAMED, start=start, last=last, compiled=False
            )
        except IokeepError as error:
            why = Mismatch(0, _MAX, self.root_pa, None, None, None, "absent", None, error.what)
            self.total += 1
            self.mismatches.append(why)
            for r in self.unknown(0, _MAX):
                self._condemn(Quarantine(r, why))
            return
        found, total = verdict.mismatches, verdict.total
        self.table_bytes += verdict.table_bytes
        self.total += total
        self.mismatches += found[: max(NAMED - len(self.mismatches), 0)]
        at = start
        for m in found:
            a, b = max(m.iova, start), min(m.last, last)
            if m is found[-1] and total > len(found):
                b = last
            if at < a:
                self._prove(Range(at, a - 1))
            self._condemn(Quarantine(Range(a, b), m))
            at = b + 1
        if at <= last:
            self._prove(Range(at, last))

    def _prove(self, r: Range) -> None:
        self._known.add(*r)
        self.validated.add(*r)
        self._proved(r)

    def _condemn(self, quarantine: Quarantine) -> None:
        self._known.add(*quarantine.range)
        self.quarantined.add(*quarantine.range)
        self._condemned(quarantine)
