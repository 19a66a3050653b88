# SPDX-License-Identifier: Apache-2.0
"""A block of the sweep of ``deferred``: looked up once, proved a few tables at a time.

Most of what a proof of a few tables costs is the way down to them and the look-up of what they must hold. A
:class:`Block` does that for all tables of a range at once; :meth:`Block.compare` then costs little more than
reading the tables. :meth:`Block.rest` judges what is no table of level 0: large leaves, holes, and what is
wrong with the items above.

The items above level 0 are read when the block is made, the tables when they are compared. In between the
table may change where it is *known*, and only there: what a block says of such ranges is not to be used.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from iokeep.mem.memory import U64
from iokeep.mem.ranges import Range
from iokeep.pt import verify
from iokeep.pt.compare import Comparison, Mismatch, find
from iokeep.pt.extents import Extents
from iokeep.pt.leaves import upper_within
from iokeep.pt.tables import TableMemory


class Block:
    """What a table must hold in [start, last], and the tables that are to be proved there.

    :param want: expected extents, cut to the range. :param known: what of the range nobody asks about, sorted
        and disjoint. :param compiled: compare by Numba, which is then imported.
    :raises IokeepError: as ``tables.descend``.
    """

    def __init__(
        self,
        tm: TableMemory,
        root_pa: int,
        start: int,
        last: int,
        want: Extents,
        known: list[Range],
        *,
        compiled: bool,
    ) -> None:
        fmt, spec = tm.fmt, tm.fmt.levels[0]
        self.start, self.last = start, last
        #: bytes of IOVAs that a table maps
        self.span = spec.items << spec.shift
        self._tm, self._want = tm, want
        self._all = upper = upper_within(tm, root_pa, start, last)
        tables = upper.tables(fmt)
        self._bases = tables.base
        ends = self._bases + np.uint64(self.span - 1)
        chosen = (
            (self._bases >= np.uint64(start)) & (ends <= np.uint64(last)) & ~within(self._bases, ends, known)
        )
        if len(upper.problems):
            above = verify.spans(fmt, upper.problems, True)
            chosen &= ~find(above.iova, above.last, self._bases)[1]
        at = slice(None) if chosen.all() else np.flatnonzero(chosen)
        self._tables = tables.take(at)
        #: IOVAs of the tables that are to be compared
        self.base = self._tables.base
        #: bytes of the tables above level 0
        self.upper_bytes = upper.visited_bytes(fmt) - len(upper.base) * fmt.bytes_of(0)
        #: leaves above level 0
        self.leaves = len(upper.leaves)
        self._plan: verify.Plan | None = None
        self._part = None
        if compiled and len(self.base) and verify.sweepable(tm, 0):
            from iokeep.pt import sweep

            self._part = sweep.Plan(tm, self._tables, want, verify.entries_of(fmt, 0)).part
        #: tables before this one are compared
        self.at = 0

    @property
    def left(self) -> int:
        """Tables that are still to be compared."""
        return len(self.base) - self.at

    def compare(self, n: int) -> tuple[U64, NDArray[np.bool_]]:
        """The next ``n`` tables or less: their IOVAs, and which hold exactly what is expected.

        :raises ValueError: the expectation is not sorted and disjoint.
        """
        lo, hi = self.at, min(self.at + n, len(self.base))
        tries = verify.TRIES
        if self._part is not None:
            done, tries = self._part(lo, hi), tries[1:]
        else:
            done = np.zeros(hi - lo, np.bool_)
        left = np.flatnonzero(~done)
        if len(left):
            if self._plan is None:
                want = verify.Expectation(self._tm.fmt, self._want)
                self._plan = verify.Plan(self._tm, self._tables, want)
            done[left] = self._plan.proved(left + lo, tries)
        self.at = hi
        return self.base[lo:hi], done

    def rest(self, known: list[Range], limit: int) -> tuple[list[Mismatch], int]:
        """What differs outside of ``known`` (sorted, disjoint): the first ``limit`` of it, and how much.

        :raises IokeepError: as ``verify``.
        """
        tm, upper, base, good = self._tm, self._all, self._bases, arrays(known)
        todo = ~within(base, base + np.uint64(self.span - 1), known)
        comparison = Comparison(limit)
        verify.judge_rest(tm, upper, base, todo, self._want, good, comparison, self.start, self.last)
        return comparison.mismatches(), comparison.total


def arrays(ranges: list[Range]) -> tuple[U64, U64]:
    """The starts and the lasts of ranges."""
    return np.array([r.start for r in ranges], np.uint64), np.array([r.last for r in ranges], np.uint64)


def within(first: U64, last: U64, ranges: list[Range]) -> NDArray[np.bool_]:
    """Which of [first, last] lie wholly in one of the sorted, disjoint ``ranges``."""
    starts, lasts = arrays(ranges)
    at, inside = find(starts, lasts, first)
    return inside & (lasts[at] >= last) if len(lasts) else inside
