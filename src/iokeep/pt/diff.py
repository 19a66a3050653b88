# SPDX-License-Identifier: Apache-2.0
"""Two tables: do they translate alike, and are they cut into the same leaves?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from iokeep.mem.memory import I64, Memory
from iokeep.pt.attributes import compare_tables, item_traits, judged, table_traits
from iokeep.pt.bbm import judge
from iokeep.pt.compare import Mismatch, Verdict
from iokeep.pt.extents import PROT_R, PROT_W, Extents
from iokeep.pt.formats.base import Format
from iokeep.pt.layout import Layout, compare_layouts
from iokeep.pt.leaves import LargeRuns, Leaves, by_kernels, extents, join_extents, kernels_down
from iokeep.pt.tables import (
    ATTRS,
    REASONS,
    Problems,
    TableMemory,
    Upper,
    descend,
    expand,
    raise_unreadable,
)
from iokeep.pt.traits import Traits
from iokeep.pt.verify import verify

if TYPE_CHECKING:
    from iokeep.pt.runs import OneRange, Runs

#: tables of both sides from so many bytes on are worth the start of compiled code: NumPy compares runs and
#: pages well, and what is neither is the general code's in any case
COMPILED_COLD = 512 << 20
#: so many tables are always worth the general code's look
_LEFT = 64


def diff(
    fmt_a: Format,
    mem_a: Memory,
    root_a: int,
    fmt_b: Format,
    mem_b: Memory,
    root_b: int,
    *,
    limit: int = 16,
    compiled: bool | None = None,
    threads: int | None = None,
) -> Verdict:
    """Compare the table B (found) with the table A (expected); formats may differ.

    Where B's format has no write-only, A's "-w" counts as "rw". Leaves that let nothing pass count for
    nothing on either side. A bad item of A (reserved bits, attributes) is a mismatch as one of B is. Memory
    attributes are compared as far as both formats can say them (``attributes.compare_tables``).

    The comparison is exact in every way: what is read as runs and pages is compared as such, not by a digest;
    where anything differs, or is not sound, the general code has the word.

    :param limit: so many mismatches and layout ranges are named; all are counted.
    :param compiled: by Numba (True), by NumPy alone (False), or by size (None). The result is the same.
    :param threads: of the compiled code; None = as ``kernels.thread_count`` says.
    :raises MemoryAbsent, InputError: a table of A, or the root of B, is absent; or no table at all.
    """
    a = _Side.of(fmt_a, mem_a, root_a, compiled)
    raise_unreadable(fmt_a, a.upper.problems)
    b = _Side.of(fmt_b, mem_b, root_b, compiled)
    size = len(a.upper.row) * fmt_a.table_bytes + len(b.upper.row) * fmt_b.table_bytes
    equal = _equal(a, b, limit, threads, compiled=by_kernels(size, compiled, COMPILED_COLD))
    if equal is not None:
        return equal
    expected, problems = extents(fmt_a, mem_a, root_a, compiled=compiled, threads=threads)
    traits_a, traits_b = table_traits(fmt_a, mem_a, root_a), table_traits(fmt_b, mem_b, root_b)
    attributes = compare_tables(fmt_a, traits_a, fmt_b, traits_b)
    problems = judged(fmt_a, problems)
    # What is bad in A is named as that.
    changed = attributes
    attributes = attributes.without(fmt_a.extend(problems.iova), fmt_a.extend(problems.last))
    verdict = verify(fmt_b, mem_b, root_b, expected, limit=limit, dead_leaves=False, attributes=attributes)
    bad = _of_a(fmt_a, problems, limit)
    kept = sorted(bad + verdict.mismatches, key=lambda m: m.iova)[:limit]
    verdict = replace(
        verdict, equal=verdict.equal and not bad, mismatches=kept, total=verdict.total + len(problems)
    )
    if any(m.reason in ("loop", "absent") for m in verdict.mismatches):
        return verdict  # B's layout cannot be said
    ranges, total = compare_layouts(traits_layout(traits_a), traits_layout(traits_b), limit)
    bad_items = int((problems.reason != ATTRS).sum())
    bbm = judge(fmt_a, traits_a, fmt_b, traits_b, verdict, changed, bad_items, limit)
    return replace(verdict, layout=ranges, layout_total=total, layout_equal=total == 0, bbm=bbm)


@dataclass(slots=True)
class _Side:
    """One of two tables, as far down as level 0."""

    tm: TableMemory
    upper: Upper
    large: LargeRuns

    @classmethod
    def of(cls, fmt: Format, mem: Memory, root_pa: int, compiled: bool | None) -> _Side:
        tm = TableMemory(fmt, mem)
        large = LargeRuns(tm, compiled, None)
        return cls(tm, descend(tm, root_pa, straight=kernels_down(compiled), known=large), large)

    def rest(self, runs: Runs | OneRange, left: I64) -> tuple[Extents, Traits] | None:
        """What the tables that are runs, those ``left`` and the leaves above say; None = some are unsound."""
        fmt, spec, upper = self.tm.fmt, self.tm.fmt.levels[0], self.upper
        pieces, traits = (
            [runs.extents(spec), *self.large.extents()],
            [runs.traits(spec), *self.large.traits()],
        )
        parts = [(upper.leaves, upper.problems)]
        tables = (upper.base[left], upper.pa[left], upper.row[left], upper.prot[left])
        for items, problems in (*parts, *expand(self.tm, *tables)):
            if len(problems):
                return None
            if len(items):
                pieces.append(Leaves.of(fmt, items).extents())
                traits.append(item_traits(fmt, items))
        return join_extents([p for p in pieces if len(p)]), Traits.join([t for t in traits if len(t)])


def _paired(runs_a: Runs | OneRange, runs_b: Runs | OneRange) -> tuple[I64, I64]:
    """Positions of the tables of both sides that are no runs and map the same IOVAs."""
    of_a, of_b = runs_a.others(), runs_b.others()
    base_a, base_b = runs_a.base[of_a], runs_b.base[of_b]
    if np.array_equal(base_a, base_b):
        return of_a, of_a if np.array_equal(of_a, of_b) else of_b
    _, at_a, at_b = np.intersect1d(base_a, base_b, assume_unique=True, return_indices=True)
    return of_a[at_a], of_b[at_b]


def _equal(a: _Side, b: _Side, limit: int, threads: int | None, *, compiled: bool) -> Verdict | None:
    """The verdict on tables that translate the same and are sound; None = they may not be."""
    from iokeep.pt import runs

    if len(a.upper.problems) or len(b.upper.problems):
        return None
    fmt_a, fmt_b = a.tm.fmt, b.tm.fmt
    if not runs.readable(a.tm) or not runs.readable(b.tm):
        return None
    of_a, of_b = a.upper.tables(fmt_a), b.upper.tables(fmt_b)
    if fmt_a == fmt_b and not runs.likely(a.tm, of_a) and not runs.likely(b.tm, of_b):
        runs_a: Runs | OneRange = runs.unread(of_a)
        runs_b: Runs | OneRange = runs.unread(of_b)  # pages, of which each is read once
    else:
        runs_a = runs.runs_of(a.tm, of_a, threads, compiled=compiled)
        runs_b = runs.runs_of(b.tm, of_b, threads, compiled=compiled)
    left_a, left_b = runs_a.others(), runs_b.others()
    pages = 0
    if fmt_a == fmt_b and len(left_a) and len(left_b):
        at_a, at_b = _paired(runs_a, runs_b)
        if len(at_a):
            pair = (a.tm, of_a, at_a, b.tm, of_b, at_b)
            same, pages = runs.same_pages(*pair, threads, compiled=compiled)
            if same.all() and len(same) == len(left_a) == len(left_b):
                left_a = left_b = left_a[:0]
            else:
                left_a = np.setdiff1d(left_a, at_a[same], assume_unique=True)
                left_b = np.setdiff1d(left_b, at_b[same], assume_unique=True)
    if len(left_a) + len(left_b) > _LEFT and len(left_a) + len(left_b) > len(runs_a.base) // 8:
        return None
    said_a, said_b = a.rest(runs_a, left_a), b.rest(runs_b, left_b)
    if said_a is None or said_b is None:
        return None
    want, found = normalised(said_a[0], fmt_b.write_only).canonical(), said_b[0]
    if not all(np.array_equal(getattr(want, c), getattr(found, c)) for c in ("iova", "last", "pa", "prot")):
        return None
    attributes = compare_tables(fmt_a, said_a[1], fmt_b, said_b[1])
    if len(attributes):
        return None
    verdict = Verdict(
        equal=True,
        mismatches=[],
        total=0,
        pages=(want.mapped_bytes + (pages << fmt_a.levels[0].shift)) >> 12,
        differ={},
        table_bytes=b.upper.visited_bytes(fmt_b),
        attrs_compared=attributes.common.compared,
        attrs_not_compared=attributes.common.not_compared,
    )
    ranges, total = compare_layouts(traits_layout(said_a[1]), traits_layout(said_b[1]), limit)
    bbm = judge(fmt_a, said_a[1], fmt_b, said_b[1], verdict, attributes, 0, limit)
    return replace(verdict, layout=ranges, layout_total=total, layout_equal=total == 0, bbm=bbm)


def traits_layout(traits: Traits) -> Layout:
    """The layout of a table from its traits."""
    return Layout.of(traits.iova, traits.last, traits.lg2)


def _of_a(fmt: Format, problems: Problems, limit: int) -> list[Mismatch]:
    out = []
    for i in range(min(len(problems), limit)):
        ends = fmt.extend(np.array([problems.iova[i], problems.last[i]], np.uint64))
        iova, last = int(ends[0]), int(ends[1])
        reason, level = REASONS[int(problems.reason[i])], int(problems.level[i])
        text = f"iova {iova:#x}-{last:#x}: {reason}: the first table has a bad item of level {level} there"
        out.append(Mismatch(iova, last, None, None, None, None, reason, level, text))
    return out


def normalised(extents_: Extents, write_only: bool) -> Extents:
    """With "-w" turned into "rw" where ``write_only`` is False."""
    if write_only:
        return extents_
    prot = np.where(extents_.prot == PROT_W, np.uint8(PROT_R | PROT_W), extents_.prot).astype(np.uint8)
    return Extents(extents_.iova, extents_.last, extents_.pa, prot)
