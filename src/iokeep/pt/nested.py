# SPDX-License-Identifier: Apache-2.0
"""Two-dimensional translation: a stage 1 whose tables and outputs lie in guest-physical space, and stage 2.

iova --stage 1--> gpa --stage 2--> pa, and every item that stage 1 fetches lies at a gpa, which stage 2
translates too. Any format may be either stage. Rules (VT-d specification, section 3.8 "Nested Translation";
Arm Architecture Reference Manual DDI 0487, chapter D8; RISC-V Privileged Architecture, "Two-Stage Address
Translation"):

* A device may do what both stages let it do.
* Memory attributes combine: never executable where either stage says so, privileged where stage 1 says so,
  and of the memory types the weaker (device before normal, not cacheable before cacheable), unless a format
  says that one stage decides (``Format.outranks``: Arm's FWB, RISC-V's PBMT).
* Stage 2 must let each item of stage 1 be read. (Hardware that sets accessed and dirty bits in stage 1 needs
  writes as well; that depends on its configuration, and is not asked for here.)
* Tables of stage 1 need not be contiguous in memory: a table larger than stage 2's pages is put together.

Nothing is trusted. A page that serves at two levels of stage 1 by whatever gpas, or in both stages, is a
loop: reported, not followed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from iokeep.errors import InputError, MemoryAbsent
from iokeep.mem.arrays import unique
from iokeep.mem.capture import PageMemory
from iokeep.mem.memory import I64, U8, U64, Memory, Rows
from iokeep.pt.attributes import (
    Common,
    Differences,
    compare_said,
    flags_of,
    join_attributed,
    judged,
)
from iokeep.pt.compare import Comparison, Found, Mismatch, Spans, Verdict, find
from iokeep.pt.diff import normalised
from iokeep.pt.extents import PROT_R, PROT_TEXT, Extents
from iokeep.pt.formats.base import CACHE, MMIO, NOEXEC, PRIV, Format
from iokeep.pt.leaves import Leaves, join_extents
from iokeep.pt.tables import (
    ABSENT,
    LOOP,
    SHARED_LIMIT,
    SOFT,
    Problems,
    TableMemory,
    Upper,
    descend,
    expand,
    units_of,
)
from iokeep.pt.traits import Attributes
from iokeep.pt.walk import Walk
from iokeep.pt.walk import walk as walk_stage

#: the composed translation may be in so many pieces more than both stages are: beyond it stage 1 maps the
#: same gpas over and over
ALIAS_LIMIT = 1 << 24
#: bytes of a page that is fetched through stage 2; no stage has smaller pages
_PAGE = 4096
_MAX = 2**64 - 1
_NO_LEVEL = 255


class StageTwoFault(InputError):
    """Stage 2 does not translate a gpa that stage 1 needs.

    :param gpa: the first such gpa.
    """

    kind = "stage-2-fault"

    def __init__(self, gpa: int, what: str, hint: str = "") -> None:
        super().__init__(what, hint)
        self.gpa = gpa


@dataclass(frozen=True, slots=True)
class NestedStep:
    """One item of stage 1.

    :param level: of stage 1. :param gpa: of the item. :param item: its value, None = it could not be fetched.
    :param fetch: the walk of stage 2 that fetched it.
    """

    level: int
    gpa: int
    item: int | None
    fetch: Walk


@dataclass(frozen=True, slots=True)
class NestedWalk:
    """A walk through both stages.

    :param iova: what was walked. :param steps: the items of stage 1, root first, each with its own walk.
    :param gpa: what stage 1 translates to, or None. :param output: the walk of stage 2 for ``gpa``, or None.
    :param pa: what both translate to, or None. :param prot: what both grant.
    :param leaf_lg2: log2 of the smaller of both leaves in bytes, or None.
    :param stage: 1 or 2, the stage that ends the walk; 0 = it translates. :param level: of that stage's item,
        None where it has none. :param why: "" or why nothing translates, naming stage, level, iova and gpa.
    """

    iova: int
    steps: tuple[NestedStep, ...]
    gpa: int | None
    output: Walk | None
    pa: int | None
    prot: int
    leaf_lg2: int | None
    stage: int
    level: int | None
    why: str


@dataclass(frozen=True, slots=True)
class NestedProblems:
    """What is wrong in the tables of both stages, by IOVA; arrays of equal length, sorted.

    ``iova``, ``last`` uint64[n] closed; ``reason`` uint8[n] of ``tables.REASONS``; ``stage`` uint8[n] 1 or 2;
    ``level`` uint8[n] of that stage.
    """

    iova: U64
    last: U64
    reason: U8
    stage: U8
    level: U8

    def __len__(self) -> int:
        return len(self.iova)

    @classmethod
    def join(cls, parts: list[NestedProblems]) -> NestedProblems:
        """All of them, sorted by iova."""
        if not parts:
            z64, z8 = np.zeros(0, np.uint64), np.zeros(0, np.uint8)
            return cls(z64, z64, z8, z8, z8)
        order = np.argsort(np.concatenate([p.iova for p in parts]), kind="stable")
        columns = ("iova", "last", "reason", "stage", "level")
        return cls(*(np.concatenate([getattr(p, c) for p in parts])[order] for c in columns))

    def of(self, *, soft: bool) -> NestedProblems:
        """Those that translate all the same (``SOFT``), or all others; disjoint."""
        mine = np.isin(self.reason, SOFT) == soft
        iova, last = self.iova[mine], self.last[mine]
        if not len(iova):
            return NestedProblems.join([])
        top = np.maximum.accumulate(last)
        first = np.flatnonzero(np.concatenate((np.ones(1, np.bool_), iova[1:] > top[:-1])))
        end = top[np.concatenate((first[1:] - 1, np.array([len(top) - 1])))]
        rest = (c[mine][first] for c in (self.reason, self.stage, self.level))
        return NestedProblems(iova[first], end, *rest)

    def spans(self) -> Spans:
        """As a comparison takes them."""
        number = np.arange(len(self.iova), dtype=np.int64)
        return Spans(self.iova, self.last, self.reason, self.level, number)


@dataclass(frozen=True, slots=True)
class GuestRows:
    """Rows view of :class:`StageTwoMemory`: the rows of the memory below, found by gpa.

    ``banned`` uint64[n] gpas of tables that are not followed.
    """

    below: Rows
    stage_two: StageTwoMemory
    banned: U64

    @property
    def data(self) -> U8:
        """See :class:`iokeep.mem.memory.Rows`."""
        return self.below.data

    @property
    def linear(self) -> bool:
        """See :attr:`iokeep.mem.memory.Rows.linear`."""
        return False

    def index(self, pas: U64) -> I64:
        """See :meth:`iokeep.mem.memory.Rows.index`; ``pas`` are gpas. -1 also where stage 2 denies it."""
        if self.stage_two.gathered is None:
            hosts, ok = self.stage_two.translate(pas)
            rows = np.where(ok, self.below.index(hosts), -1)
        else:
            rows = self.below.index(pas)
        if len(self.banned):
            rows = np.where(np.isin(pas, self.banned), -1, rows)
        return rows


class StageTwoMemory:
    """Guest-physical memory: what stage 2 makes of memory below, for reading.

    :param mem: memory by pa. :param mapped: what stage 2 translates.
    :param page: bytes of stage 2's smallest page: rows up to that size are rows of ``mem``.
    """

    def __init__(self, mem: Memory, mapped: Extents, page: int) -> None:
        self.mem = mem
        self.mapped = mapped
        self.page = page
        #: copies of the pages that tables are in, by gpa, where tables are larger than stage 2's pages
        self.gathered: PageMemory | None = None
        #: gpas of tables that are not followed
        self.banned: U64 = np.zeros(0, np.uint64)

    def translate(self, gpas: U64) -> tuple[U64, NDArray[np.bool_]]:
        """Pa of each gpa, and whether stage 2 lets it be read (the pa is 0 where not)."""
        at, inside = find(self.mapped.iova, self.mapped.last, gpas)
        if not len(self.mapped):
            return np.zeros(len(gpas), np.uint64), inside
        ok = inside & ((self.mapped.prot[at] & np.uint8(PROT_R)) != 0)
        pas = self.mapped.pa[at] + (gpas - self.mapped.iova[at])
        return np.where(ok, pas, np.uint64(0)).astype(np.uint64), ok

    def read(self, pa: int, length: int) -> bytes:
        """``length`` bytes from the gpa ``pa``. :raises StageTwoFault, MemoryAbsent: any is not there."""
        out = []
        while length > 0:
            n = min(length, self.page - pa % self.page)
            hosts, ok = self.translate(np.array([pa], np.uint64)) if pa >> 64 == 0 else (None, (False,))
            if hosts is None or not ok[0]:
                raise StageTwoFault(pa, f"stage 2 does not let gpa {pa:#x} be read")
            out.append(self.mem.read(int(hosts[0]), n))
            pa, length = pa + n, length - n
        return b"".join(out)

    def rows(self, row_bytes: int) -> GuestRows:
        """See :meth:`iokeep.mem.memory.Memory.rows`."""
        if self.gathered is not None:
            return GuestRows(self.gathered.rows(row_bytes), self, self.banned)
        if row_bytes > self.page:
            raise ValueError(f"rows of {row_bytes} bytes are not within pages of {self.page}: gather first")
        return GuestRows(self.mem.rows(row_bytes), self, self.banned)

    def gather(self, gpas: U64) -> int:
        """Add copies of the pages at ``gpas`` (multiples of 4096); the number that were there.

        :raises InputError: more pages than memory has: one page is there by very many gpas.
        """
        gpas = unique(gpas)
        hosts, ok = self.translate(gpas)
        rows = self.mem.rows(_PAGE)
        at = np.where(ok, rows.index(hosts), -1)
        gpas, at = gpas[at >= 0], at[at >= 0]
        if self.gathered is None:
            self.gathered = PageMemory(gpas, np.take(rows.data, at, axis=0))
            return len(gpas)
        have = self.gathered.rows(_PAGE)
        if len(gpas) + len(have.pas) > len(rows.data) + SHARED_LIMIT // 16:
            raise InputError(
                f"tables of stage 1 are at more gpas than there are pages ({len(rows.data)}): this is "
                "no page table",
                "check the stage-1 root and both configurations",
            )
        fresh = have.index(gpas) < 0
        pas = np.concatenate((have.pas, gpas[fresh]))
        self.gathered = PageMemory(pas, np.concatenate((have.data, np.take(rows.data, at[fresh], axis=0))))
        return int(fresh.sum())


class _Fetches:
    """Memory that one walk of stage 1 reads: notes every walk of stage 2."""

    def __init__(self, nested: Nested, iova: int) -> None:
        self.nested, self.iova = nested, iova
        self.done: list[tuple[int, bytes | None, Walk]] = []

    def read(self, pa: int, length: int) -> bytes:
        path = self.nested.walk_two(pa, self.iova)
        if path.pa is None or not path.prot & PROT_R:
            self.done.append((pa, None, path))
            raise StageTwoFault(pa, "")
        try:
            raw = self.nested.mem.read(path.pa, length)
        except MemoryAbsent as error:
            why = f"the stage-1 item at gpa {pa:#x} for iova {self.iova:#x}"
            raise MemoryAbsent(error.pa, error.length, why) from error
        self.done.append((pa, raw, path))
        return raw

    def rows(self, row_bytes: int) -> Rows:
        raise NotImplementedError("a walk reads items")


class Nested:
    """Stage 1 under stage 2.

    :param fmt: format of stage 1. :param root_gpa: gpa of its root table.
    :param fmt_two: format of stage 2. :param root_pa: pa of its root table. :param mem: memory by pa.
    :param prot: what the entries above both tables let through.
    :raises InputError: a root that is not aligned, or a stage 2 that is no table.
    :raises MemoryAbsent: the root of stage 2 is absent.
    """

    def __init__(
        self, fmt: Format, root_gpa: int, fmt_two: Format, root_pa: int, mem: Memory, prot: int = 3
    ) -> None:
        if root_gpa % fmt.root_align or root_gpa >> 64 or root_gpa < 0:
            raise InputError(f"stage 1: root_gpa {root_gpa:#x} is not a multiple of {fmt.root_align:#x}")
        self.fmt, self.root_gpa = fmt, root_gpa
        self.fmt_two, self.root_pa = fmt_two, root_pa
        self.mem = mem
        self.prot = prot
        tm = TableMemory(fmt_two, mem)
        upper = descend(tm, root_pa)
        parts, problems = [Leaves.of(fmt_two, upper.leaves).extents()], [upper.problems]
        for found, bad in expand(tm, upper.base, upper.pa, upper.row, upper.prot):
            parts.append(Leaves.of(fmt_two, found).extents())
            problems.append(bad)
        #: what stage 2 translates, by gpa
        self.mapped = join_extents(parts)
        self._problems_two = Problems.join(problems)
        self._bad_two = _by_address(fmt_two, self._problems_two, 2)
        self._upper_two = upper
        self._bytes = upper.visited_bytes(fmt_two)
        self._tables_two = _ranges(fmt_two, upper)
        #: guest-physical memory
        self.guest = StageTwoMemory(mem, self.mapped, 1 << fmt_two.levels[0].shift)

    # -- one IOVA --------------------------------------------------------------------------------------

    def walk_two(self, gpa: int, iova: int) -> Walk:
        """One gpa through stage 2. :raises MemoryAbsent: a table of stage 2 is not in the memory."""
        try:
            return walk_stage(self.fmt_two, self.mem, self.root_pa, gpa)
        except MemoryAbsent as error:
            why = f"a stage-2 item for gpa {gpa:#x}, which stage 1 needs for iova {iova:#x}"
            raise MemoryAbsent(error.pa, error.length, why) from error

    def walk(self, iova: int) -> NestedWalk:
        """Translate ``iova`` with the whole path.

        :raises MemoryAbsent: a table on the path, of either stage, is not in the memory.
        """
        fetches = _Fetches(self, iova)
        one: Walk | None = None
        with contextlib.suppress(StageTwoFault):
            one = walk_stage(self.fmt, fetches, self.root_gpa, iova)
        steps: list[NestedStep] = []
        level = self.fmt.top_level
        for gpa, raw, path in fetches.done:
            item = None
            if raw is not None:
                order = "little" if self.fmt.byte_order == "<" else "big"
                item = int.from_bytes(raw, order) ^ self.fmt.levels[level].invert  # type: ignore[arg-type]
            steps.append(NestedStep(level, gpa, item, path))
            level = level if item is None else self.fmt.levels[level].next_level(item, level)
        path_one = tuple(steps)

        def end(stage: int, at: int | None, why: str, gpa: int | None, output: Walk | None) -> NestedWalk:
            return NestedWalk(iova, path_one, gpa, output, None, 0, None, stage, at, why)

        if one is None:
            last = steps[-1]
            why = last.fetch.why or "it may not be read"
            what = f"the stage-1 item of level {last.level} at gpa {last.gpa:#x} for iova {iova:#x}"
            return end(2, _level(last.fetch), f"stage 2: {what}: {why}", None, None)
        if one.pa is None:
            at = steps[-1].level if steps else None
            return end(1, at, f"stage 1: iova {iova:#x}: {one.why}", None, None)
        two = self.walk_two(one.pa, iova)
        if two.pa is None:
            why = f"stage 2: gpa {one.pa:#x}, to which stage 1 translates iova {iova:#x}: {two.why}"
            return end(2, _level(two), why, one.pa, two)
        prot = one.prot & two.prot & self.prot
        if not prot:
            why = (
                f"stage 2: gpa {one.pa:#x} for iova {iova:#x}: stage 1 grants {PROT_TEXT[one.prot]}, stage 2 "
                f"{PROT_TEXT[two.prot]}: no permission is left"
            )
            return end(2, _level(two), why, one.pa, two)
        lg2 = min(one.leaf_lg2 or 0, two.leaf_lg2 or 0)
        return NestedWalk(iova, path_one, one.pa, two, two.pa, prot, lg2, 0, None, "")

    # -- the whole translation -------------------------------------------------------------------------

    def extents(self) -> tuple[Extents, NestedProblems]:
        """The canonical extents iova -> pa of both stages, and what is wrong in the tables (reserved bits,
        attributes).

        :raises StageTwoFault: stage 2 does not let a table of stage 1 be read.
        :raises MemoryAbsent, InputError: a table of either stage that is needed is absent or in a loop.
        """
        found, problems, _ = self._compose()
        for reason in (LOOP, ABSENT):
            for i in np.flatnonzero(problems.reason == reason)[:1]:
                iova, stage = int(problems.iova[i]), int(problems.stage[i])
                why = f"stage {stage}: iova {iova:#x}: " + _LOOP_TEXT.format(level=int(problems.level[i]))
                if reason == LOOP:
                    raise InputError(why)
                raise StageTwoFault(*self._absent(iova))
        return found, problems

    def verify(self, expected: Extents, *, limit: int = 16) -> Verdict:
        """Compare the composed translation with ``expected`` (sorted, disjoint; need not be canonical).

        What is translated with no permission left by both stages counts as nothing. "-w" counts as "rw"
        where neither format has write-only. An absent or looping table of either stage is a mismatch.
        Where ``expected`` has ``attrs``, the IOMMU_* flags that either stage can say are compared as both
        stages make them together; elsewhere only values that a format has one of count.

        :param limit: so many mismatches are named; all are counted.
        :raises StageTwoFault, MemoryAbsent: the root of stage 1 is not there.
        """
        stated = expected.attrs is not None
        found, problems, upper = self._compose(attributes=stated)
        differences: Differences | None = None
        if stated:
            common = Common.of_flags(self.said)
            differences = compare_said(common, expected, self.attributed())
        expected = normalised(expected, self.fmt.write_only or self.fmt_two.write_only)
        hard, soft = problems.of(soft=False), problems.of(soft=True)
        comparison = Comparison(limit)
        if differences is not None and len(differences):
            comparison = Comparison(limit, differences.spans(), differences.texts)
        levels = np.full(len(found), _NO_LEVEL, np.uint8)
        comparison.window(
            0, _MAX, expected, Found(found.iova, found.last, found.pa, found.prot, levels),
            hard.spans(), soft.spans(),
        )  # fmt: skip
        mismatches = [self._named(m, hard, soft) for m in comparison.mismatches()]
        return Verdict(
            equal=comparison.total == 0,
            mismatches=mismatches,
            total=comparison.total,
            pages=(expected.mapped_bytes - comparison.failed_bytes) >> 12,
            differ=comparison.differ(),
            table_bytes=upper.visited_bytes(self.fmt) + self._bytes,
            attrs_compared=None if differences is None else differences.common.compared,
            attrs_not_compared=() if differences is None else differences.common.not_compared,
        )

    def _named(self, m: Mismatch, hard: NestedProblems, soft: NestedProblems) -> Mismatch:
        """With a text that says which stage, level and gpa."""
        where = f"iova {m.iova:#x}-{m.last:#x}: {m.reason}"
        here = hard if m.reason in ("reserved", "loop", "absent") else soft
        at, inside = find(here.iova, here.last, np.array([m.iova], np.uint64))
        stage = int(here.stage[at[0]]) if inside[0] else 0
        if m.reason == "loop":
            text = _LOOP_TEXT.format(level=m.level)
            return replace(m, text=f"{where}: stage {stage}: {text}")
        if m.reason in ("attrs", "contig"):
            return replace(m, text=f"{m.text} (stage {stage})")
        if m.reason not in ("missing", "absent", "reserved"):
            return m
        try:
            if m.reason == "absent":
                return replace(m, text=f"{where}: {self._absent(m.iova)[1]}")
            why = self.walk(m.iova).why
        except MemoryAbsent as error:
            return replace(m, text=f"{where}: {error.what}")
        return replace(m, text=f"{m.text}: {why}" if m.reason == "missing" else f"{where}: {why}")

    def _absent(self, iova: int) -> tuple[int, str]:
        """The gpa that stage 2 does not let be read, of stage 1's tables for ``iova``, and why.

        :raises MemoryAbsent: stage 2 does, but a table of either stage is not in the memory.
        """
        path = self.walk(iova)
        if path.steps and path.steps[-1].item is None:
            return path.steps[-1].gpa, path.why
        # The item for this IOVA is there: another part of its table is not.
        gpa = path.steps[-1].gpa if path.steps else self.root_gpa
        level = path.steps[-1].level if path.steps else self.fmt.top_level
        table = gpa & -min(self.fmt.bytes_of(level), self.fmt.table_align)
        for at in range(table, table + self.fmt.bytes_of(level), _PAGE):
            two = self.walk_two(at, iova)
            if two.pa is None or not two.prot & PROT_R:
                what = f"stage 2: the stage-1 table of level {level} at gpa {table:#x} for iova {iova:#x}"
                return at, f"{what}: gpa {at:#x}: {two.why or 'it may not be read'}"
            try:
                self.mem.read(two.pa, min(_PAGE, self.fmt.bytes_of(level)))
            except MemoryAbsent as error:
                why = f"gpa {at:#x} of the stage-1 table of level {level} for iova {iova:#x}"
                raise MemoryAbsent(error.pa, error.length, why) from error
        return gpa, f"stage 1: the table of level {level} for iova {iova:#x} is not there whole"

    # -- inside ----------------------------------------------------------------------------------------

    def _descend(self) -> tuple[TableMemory, Upper]:
        """Everything above stage 1's tables of level 0; loops through stage 2 are not followed."""
        guest = self.guest
        try:
            guest.read(self.root_gpa, self.fmt.root_bytes)
        except StageTwoFault as error:
            why = walk_stage(self.fmt_two, self.mem, self.root_pa, error.gpa).why or "it may not be read"
            text = f"stage 2: the stage-1 root table at gpa {self.root_gpa:#x}: gpa {error.gpa:#x}: {why}"
            hint = "check the stage-1 root and both configurations"
            raise StageTwoFault(error.gpa, text, hint) from error
        except MemoryAbsent as error:
            why = f"the stage-1 root table at gpa {self.root_gpa:#x}"
            raise MemoryAbsent(error.pa, error.length, why) from error
        sizes = [self.fmt.bytes_of(n) for n in range(self.fmt.top_level + 1)]
        gather = any(min(size, self.fmt.table_align) > guest.page for size in sizes) or any(
            size > self.fmt.table_align for size in sizes
        )
        if gather and guest.gathered is None:
            guest.gather(_pages(np.array([self.root_gpa], np.uint64), self.fmt.root_bytes))
            for _ in range(self.fmt.top_level):
                upper = descend(TableMemory(self.fmt, guest), self.root_gpa)
                gpas, levels = self._absent_tables(upper.problems)
                wanted = [_pages(gpas[levels == n], sizes[n]) for n in np.unique(levels).tolist()]
                if not wanted or not guest.gather(np.concatenate(wanted)):
                    break
        while True:
            tm = TableMemory(self.fmt, guest)
            upper = descend(tm, self.root_gpa)
            twice = self._twice(tm, upper)
            if not len(twice):
                return tm, upper
            guest.banned = unique(guest.banned, twice)

    def _absent_tables(self, problems: Problems) -> tuple[U64, U8]:
        """Gpas and levels of the tables that are said to be absent."""
        gpas: list[U64] = [np.zeros(0, np.uint64)]
        levels: list[U8] = [np.zeros(0, np.uint8)]
        for level, spec in enumerate(self.fmt.levels):
            items = problems.item[(problems.reason == ABSENT) & (problems.level == level)]
            if not len(items):
                continue
            gpas.append(spec.table_pas(items))
            below = np.full(len(items), max(level - 1, 0), np.uint8)
            for mask, value, number in spec.next_levels:
                below[(items & np.uint64(mask)) == np.uint64(value)] = number
            levels.append(below)
        return np.concatenate(gpas), np.concatenate(levels)

    def _twice(self, tm: TableMemory, upper: Upper) -> U64:
        """Gpas of stage 1's tables, of the highest level that has such, whose memory serves at a higher level
        too or is a table of stage 2.
        """
        first, last = self._tables_two
        unit = np.uint64(min(self.fmt.bytes_of(n) for n in range(max(self.fmt.top_level, 1))) - 1)
        seen: U64 = np.zeros(0, np.uint64)
        for n, gpas in enumerate(upper.pages):
            if not len(gpas):
                continue
            gpas = unique(gpas)
            hosts, _ = self.guest.translate(units_of(tm, self.fmt.top_level - n, gpas))
            at = np.searchsorted(last, hosts)
            hit = (at < len(first)) & (first[np.minimum(at, len(first) - 1)] <= hosts + unit)
            if n == 0 and hit.any():
                raise InputError(
                    f"stage 1: the root table at gpa {self.root_gpa:#x} is at pa {int(hosts[0]):#x}, which "
                    "is a table of stage 2"
                )
            if n:
                hit |= np.isin(hosts, seen)
            if hit.any():
                return gpas[hit.reshape(len(gpas), -1).any(axis=1)]
            seen = unique(seen, hosts)
        return np.zeros(0, np.uint64)

    def _compose(self, *, attributes: bool = False) -> tuple[Extents, NestedProblems, Upper]:
        """What both stages translate, what is wrong, and the upper levels of stage 1.

        :param attributes: attributes that flags state are compared by the caller, and so are no problems.
        """
        fmt = self.fmt
        tm, upper = self._descend()
        bad_two = self._bad_two
        if attributes:
            bad_two = _by_address(self.fmt_two, judged(self.fmt_two, self._problems_two), 2)
            upper.problems = judged(fmt, upper.problems)
        above = upper.problems
        if len(self.guest.banned) and len(above):
            absent = np.flatnonzero(above.reason == ABSENT)
            for level, spec in enumerate(fmt.levels):
                mine = absent[above.level[absent] == level]
                loops = np.isin(spec.table_pas(above.item[mine]), self.guest.banned)
                above.reason[mine[loops]] = LOOP
        bad = [_by_address(fmt, above, 1)]
        parts: list[Extents] = []
        left = ALIAS_LIMIT + len(self.mapped) + len(bad_two)
        hard, soft = bad_two.of(soft=False), bad_two.of(soft=True)

        def through(found: Leaves) -> None:
            nonlocal left
            one = _unwrapped(found.extents())
            owner, other, first, end = _cut(one, self.mapped.iova, self.mapped.last, left + len(one))
            left -= max(len(owner) - len(one), 0)
            iova = one.iova[owner] + (first - one.pa[owner])
            prot = one.prot[owner] & self.mapped.prot[other] & np.uint8(self.prot)
            pa = self.mapped.pa[other] + (first - self.mapped.iova[other])
            keep = prot != 0
            last = iova + (end - first)
            parts.append(Extents(iova[keep], last[keep], pa[keep], prot[keep]).canonical())
            for kind in (hard, soft):
                if not len(kind):
                    continue
                owner, other, first, end = _cut(one, kind.iova, kind.last, left + len(one))
                left -= max(len(owner) - len(one), 0)
                iova = one.iova[owner] + (first - one.pa[owner])
                columns = (c[other] for c in (kind.reason, kind.stage, kind.level))
                bad.append(NestedProblems(iova, iova + (end - first), *columns))

        if len(upper.leaves):
            through(Leaves.of(fmt, upper.leaves))
        for items, wrong in expand(tm, upper.base, upper.pa, upper.row, upper.prot):
            if attributes:
                wrong = judged(fmt, wrong)
            if len(wrong):
                bad.append(_by_address(fmt, wrong, 1))
            through(Leaves.of(fmt, items))
        return join_extents(parts), NestedProblems.join(bad), upper

    # -- memory attributes -----------------------------------------------------------------------------

    @property
    def said(self) -> frozenset[int]:
        """The IOMMU_* flags that both stages together can say; IOMMU_PRIV is stage 1's alone."""
        two = {flag for flag, _, _ in self.fmt_two.terms} - {PRIV}
        return frozenset({flag for flag, _, _ in self.fmt.terms} | two)

    def attributed(self) -> Extents:
        """The canonical extents of :meth:`extents` with the IOMMU_* flags of both stages in ``attrs``.

        :raises StageTwoFault, MemoryAbsent, InputError: as :meth:`extents`.
        """
        two = _Typed.join(_typed(self.fmt_two, TableMemory(self.fmt_two, self.mem), self._upper_two))
        tm, upper = self._descend()
        one_says, two_says = ({flag for flag, _, _ in fmt.terms} for fmt in (self.fmt, self.fmt_two))
        left = ALIAS_LIMIT + len(two.extents)
        parts: list[Extents] = []
        for one in _typed(self.fmt, tm, upper):
            e, t = one.extents, two.extents
            owner, other, first, end = _cut(e, t.iova, t.last, left + len(e))
            left -= max(len(owner) - len(e), 0)
            iova = e.iova[owner] + (first - e.pa[owner])
            prot = e.prot[owner] & t.prot[other] & np.uint8(self.prot)
            flags = _combined(
                (one.flags[owner], one.rank[owner], one_says), (two.flags[other], two.rank[other], two_says)
            )
            keep = prot != 0
            pa, last = t.pa[other] + (first - t.iova[other]), iova + (end - first)
            parts.append(Extents(iova[keep], last[keep], pa[keep], prot[keep], flags[keep]))
        return join_attributed(parts)


@dataclass(frozen=True, slots=True)
class _Typed:
    """Extents of one stage with the flags and the rank (``attributes.flags_of``) of each."""

    extents: Extents
    flags: U8
    rank: U8

    @classmethod
    def join(cls, parts: Iterable[_Typed]) -> _Typed:
        some = list(parts)
        if not some:
            none = np.zeros(0, np.uint8)
            return cls(Extents.empty(), none, none)
        names = ("iova", "last", "pa", "prot")
        columns = [np.concatenate([getattr(p.extents, c) for p in some]) for c in names]
        order = np.argsort(columns[0], kind="stable")
        flags, rank = (np.concatenate([getattr(p, c) for p in some])[order] for c in ("flags", "rank"))
        return cls(Extents(*(c[order] for c in columns)), flags, rank)


def _typed(fmt: Format, tm: TableMemory, upper: Upper) -> Iterator[_Typed]:
    """The leaves of a stage that let anything pass, in runs that are alike."""
    attributes = Attributes(fmt)
    lower = (items for items, _ in expand(tm, upper.base, upper.pa, upper.row, upper.prot))
    for items in (upper.leaves, *lower) if len(upper.leaves) else lower:
        flags, rank = flags_of(attributes, items)
        leaves = Leaves.of(fmt, items)
        alive = leaves.prot != 0
        iova, last, pa, prot = (c[alive] for c in (leaves.iova, leaves.last, leaves.pa, leaves.prot))
        runs = _unwrapped(Extents(iova, last, pa, prot, flags[alive] | rank[alive]).canonical())
        both = np.zeros(0, np.uint8) if runs.attrs is None else runs.attrs
        bare = Extents(runs.iova, runs.last, runs.pa, runs.prot)
        yield _Typed(bare, both & np.uint8(0xFC), both & np.uint8(3))


def _combined(one: tuple[U8, U8, set[int]], two: tuple[U8, U8, set[int]]) -> U8:
    """Flags of both stages together; each side: flags, rank, and what its format can say."""
    f1, f2 = one[0], two[0]
    out = (f1 | f2) & np.uint8(NOEXEC) | f1 & np.uint8(PRIV)
    kind = np.uint8(CACHE | MMIO)

    def side(flags: U8, rank: U8, says: set[int]) -> U8:
        # A stage that cannot say it, or leaves it to the other, changes nothing: as if cacheable.
        plain = flags | np.uint8(0 if CACHE in says else CACHE)
        return np.where(rank == 1, np.uint8(CACHE), plain).astype(np.uint8)

    a, b = side(*one), side(*two)
    device = (a | b) & np.uint8(MMIO)
    weaker = np.where(device != 0, device, a & b & np.uint8(CACHE))
    typed = np.where(two[1] == 2, f2 & kind, np.where(one[1] == 2, f1 & kind, weaker)).astype(np.uint8)
    if CACHE not in one[2] | two[2]:
        typed &= np.uint8(~CACHE & 0xFF)
    return (out | typed).astype(np.uint8)


_LOOP_TEXT = (
    "the memory of a table that an item of level {level} points to serves at a higher level, or in the other "
    "stage, too"
)


def _level(path: Walk) -> int | None:
    return path.steps[-1][0] if path.steps else None


def _by_address(fmt: Format, p: Problems, stage: int) -> NestedProblems:
    """Problems of one stage by its own input addresses, sorted."""
    iova, last = fmt.extend(p.iova), fmt.extend(p.last)
    out = NestedProblems(iova, last, p.reason, np.full(len(p), stage, np.uint8), p.level)
    return NestedProblems.join([out])


def _ranges(fmt: Format, upper: Upper) -> tuple[U64, U64]:
    """Memory that tables are in: closed ranges, sorted by both ends."""
    first, last = [], []
    for n, pas in enumerate(upper.pages):
        first.append(unique(pas))
        last.append(first[-1] + np.uint64(fmt.bytes_of(fmt.top_level - n) - 1))
    return np.sort(np.concatenate(first)), np.sort(np.concatenate(last))


def _pages(gpas: U64, size: int) -> U64:
    """The pages that tables of ``size`` bytes at ``gpas`` touch."""
    first = gpas & ~np.uint64(_PAGE - 1)
    steps = np.arange(max(size // _PAGE, 1), dtype=np.uint64) * np.uint64(_PAGE)
    pages: U64 = (first[:, None] + steps).reshape(-1)
    return unique(pages)


def _unwrapped(e: Extents) -> Extents:
    """With every extent whose pa goes beyond 2**64 - 1 in two."""
    wraps = np.flatnonzero(e.pa + (e.last - e.iova) < e.pa)
    if not len(wraps):
        return e
    cut = e.iova[wraps] + (np.uint64(_MAX) - e.pa[wraps])
    last = e.last.copy()
    last[wraps] = cut
    zero = np.zeros(len(wraps), np.uint64)
    tail = Extents(cut + np.uint64(1), e.last[wraps], zero, e.prot[wraps])
    iova = np.concatenate((e.iova, tail.iova))
    order = np.argsort(iova, kind="stable")
    return Extents(
        iova[order],
        np.concatenate((last, tail.last))[order],
        np.concatenate((e.pa, tail.pa))[order],
        np.concatenate((e.prot, tail.prot))[order],
        None if e.attrs is None else np.concatenate((e.attrs, e.attrs[wraps]))[order],
    )


def _cut(
    one: Extents, starts: U64, lasts: U64, limit: int
) -> tuple[NDArray[np.intp], NDArray[np.intp], U64, U64]:
    """Every piece of gpas that an extent of ``one`` and a range [starts, lasts] (sorted, disjoint) share:
    number of the extent, number of the range, first and last gpa. :raises InputError: more than ``limit``.
    """
    g_last = one.pa + (one.last - one.iova)
    a = np.searchsorted(lasts, one.pa, side="left")
    count = np.maximum(np.searchsorted(starts, g_last, side="right") - a, 0)
    total = int(count.sum())
    if total > limit:
        raise InputError(
            f"stage 1 maps the same gpas so often that the translation is in more than {limit} pieces",
            "check the stage-1 root and both configurations",
        )
    owner = np.repeat(np.arange(len(one)), count)
    nth = np.arange(total) - np.repeat(np.cumsum(count) - count, count)
    other = np.repeat(a, count) + nth
    return owner, other, np.maximum(one.pa[owner], starts[other]), np.minimum(g_last[owner], lasts[other])
