# SPDX-License-Identifier: Apache-2.0
"""Memory attributes of leaves, in named fields and in the kernel's IOMMU_* flags; and how leaves are cut.

What a format can say is data of its file (``LevelSpec.memory``, ``Format.terms``). Two tables of one format
are compared in every field that both state; tables of two formats in the flags that both can say. An
expectation states flags: where IOMMU_MMIO is expected, IOMMU_CACHE does not count (every ``prot_to_pte`` of
Linux looks at MMIO first).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from iokeep.mem.arrays import unique
from iokeep.mem.memory import I64, U8, U64, Memory
from iokeep.pt.compare import Spans, clip
from iokeep.pt.extents import Extents
from iokeep.pt.formats.base import CACHE, MMIO, TERMS, Format
from iokeep.pt.leaves import Leaves, upper_within
from iokeep.pt.tables import ATTRS, Items, Problems, TableMemory, descend, expand, raise_unreadable
from iokeep.pt.traits import Attributes, Traits

_ONE = np.uint64(1)
_MAX = np.uint64(2**64 - 1)
_WINDOW = 1 << 18


def item_traits(fmt: Format, items: Items) -> Traits:
    """The traits of leaves, which are sorted."""
    leaves = Leaves.of(fmt, items)
    word, said = Attributes(fmt).words(items)
    alive = (items.prot != 0).view(np.uint8)
    keep = np.array([spec.keep_bit for spec in fmt.levels], np.uint64)
    kept = ((items.item & keep[items.level]) != 0).view(np.uint8)
    return Traits.join([Traits(leaves.iova, leaves.last, items.lg2, items.level, word, said, alive, kept)])


def table_traits(fmt: Format, mem: Memory, root_pa: int, start: int = 0, last: int | None = None) -> Traits:
    """The traits of the tables that touch the IOVAs [start, last] (None = to the end of the space); what is
    absent or in a loop has none.

    :raises MemoryAbsent: the root is absent.
    """
    tm = TableMemory(fmt, mem)
    if start == 0 and last is None:
        upper = descend(tm, root_pa)
    else:
        upper = upper_within(tm, root_pa, start, 2**64 - 1 if last is None else last)
    parts = [item_traits(fmt, upper.leaves)] if len(upper.leaves) else []
    for items, _ in expand(tm, upper.base, upper.pa, upper.row, upper.prot):
        parts.append(item_traits(fmt, items))
    return Traits.join(parts)


def overlaps(
    a_iova: U64, a_last: U64, b_iova: U64, b_last: U64
) -> Iterator[tuple[U64, U64, NDArray[np.intp], NDArray[np.intp]]]:
    """Pieces that both of two sorted, disjoint lists of ranges hold: first, last, index in a, index in b."""
    bounds = [0, *a_iova[_WINDOW::_WINDOW].tolist(), 1 << 64]
    for start, after in pairwise(bounds):
        pa, a_first, a_end, _ = clip(start, after - 1, a_iova, a_last)
        pb, b_first, b_end, _ = clip(start, after - 1, b_iova, b_last)
        if not len(a_first) or not len(b_first):
            continue
        cuts = unique(a_first, b_first)
        ia = np.searchsorted(a_first, cuts, side="right") - 1
        ib = np.searchsorted(b_first, cuts, side="right") - 1
        some = (ia >= 0) & (ib >= 0)
        cuts, ia, ib = cuts[some], ia[some], ib[some]
        last = np.minimum(a_end[ia], b_end[ib])
        both = last >= cuts
        yield cuts[both], last[both], ia[both] + pa.start, ib[both] + pb.start


class Common:
    """What two formats, or a format and IOMMU_* flags, can both say: a third packing of words.

    ``compared``: names, flags first; ``not_compared``: what only one of the two can say.
    """

    def __init__(self, a: Attributes | None, b: Attributes) -> None:
        flags_a = {flag for flag, _, _ in a.fmt.terms} if a else set(TERMS.values())
        flags_b = {flag for flag, _, _ in b.fmt.terms}
        self.flags = [flag for flag in TERMS.values() if flag in flags_a & flags_b]
        self.fields: list[tuple[str, int]] = []
        if a is not None and a.fmt.name == b.fmt.name:
            self.fields = [
                (name, width)
                for name, (_, width) in a.places.items()
                if name in b.places and b.places[name][1] == width
            ]
        names = {flag: name for name, flag in TERMS.items()}
        raw = {name for name, _ in self.fields}
        self.compared = (*(names[f] for f in self.flags), *raw_order(self.fields))
        missing = [names[flag] for flag in TERMS.values() if a is None and flag not in flags_b]
        for side in (a, b) if a is not None else ():
            through = {field for flag, field, _ in side.fmt.terms if flag in self.flags}
            missing += [name for name in side.places if name not in raw | through]
            missing += [
                names[f] for f, field, _ in side.fmt.terms if f not in self.flags and field not in raw
            ]
        self.not_compared = tuple(dict.fromkeys(missing))
        self.names = [(name, 1) for name in self.compared[: len(self.flags)]] + self.fields

    @classmethod
    def of_flags(cls, flags: Collection[int]) -> Common:
        """Only these IOMMU_* flags are compared."""
        out = cls.__new__(cls)
        out.flags = [flag for flag in TERMS.values() if flag in flags]
        out.fields = []
        said = {flag: name for name, flag in TERMS.items()}
        out.compared = tuple(said[flag] for flag in out.flags)
        out.not_compared = tuple(name for name, flag in TERMS.items() if flag not in out.flags)
        out.names = [(name, 1) for name in out.compared]
        return out

    def project(self, side: Attributes, word: U64, said: U64) -> tuple[U64, U64]:
        """Words of one side in the common packing, and which bits they state."""
        out, stated = np.zeros(len(word), np.uint64), np.zeros(len(word), np.uint64)
        for at, flag in enumerate(self.flags):
            for _, field, values in (t for t in side.fmt.terms if t[0] == flag):
                shift, width = side.places[field]
                value = (word >> np.uint64(shift)) & np.uint64((1 << width) - 1)
                is_so = np.zeros(len(word), np.bool_)
                for one in values:
                    is_so |= value == np.uint64(one)
                out |= is_so.astype(np.uint64) << np.uint64(at)
                stated |= ((said >> np.uint64(shift)) & _ONE) << np.uint64(at)
        at = len(self.flags)
        for name, width in self.fields:
            low, mask = np.uint64(side.places[name][0]), np.uint64((1 << width) - 1)
            out |= ((word >> low) & mask) << np.uint64(at)
            stated |= ((said >> low) & mask) << np.uint64(at)
            at += width
        return out, stated

    def project_flags(self, flags: U8) -> tuple[U64, U64]:
        """IOMMU_* flags in the common packing, and which bits they state."""
        out = np.zeros(len(flags), np.uint64)
        stated = np.full(len(flags), (1 << len(self.flags)) - 1, np.uint64)
        mmio = (flags & np.uint8(MMIO)) != 0
        for at, flag in enumerate(self.flags):
            out |= ((flags & np.uint8(flag)) != 0).astype(np.uint64) << np.uint64(at)
            if flag == CACHE and MMIO in self.flags:
                stated[mmio] &= np.uint64(~(1 << at) & (2**64 - 1))
        return out, stated

    def text(self, word: int, stated: int) -> str:
        """Names of what is set: "cache,sh=0x3"; "-" where nothing is."""
        out = []
        at = 0
        for name, width in self.names:
            mask = (1 << width) - 1
            value = (word >> at) & (stated >> at) & mask
            if value:
                out.append(name if width == 1 else f"{name}={value:#x}")
            at += width
        return ",".join(out) or "-"


def raw_order(fields: list[tuple[str, int]]) -> tuple[str, ...]:
    """The names of fields, in their order."""
    return tuple(name for name, _ in fields)


def judged(fmt: Format, problems: Problems) -> Problems:
    """Problems without leaves that only hold another value in a field that flags decide.

    Where attributes are compared, the comparison has the word on those (RISC-V: Linux writes PBMT for
    IOMMU_MMIO; AMD: no encryption bit).
    """
    fields = {field for _, field, _ in fmt.terms}
    excused = np.zeros(len(problems), np.bool_)
    for level in np.unique(problems.level[problems.reason == ATTRS]).tolist():
        spec = fmt.levels[level]
        mask = sum(mask for name, mask in spec.memory if name in fields) & spec.leaf_attrs
        mine = (problems.level == level) & (problems.reason == ATTRS)
        mine[mine] = spec.are_leaves(problems.item[mine])
        item = problems.item[mine]
        wrong = (item ^ np.uint64(spec.leaf_attrs_value)) & np.uint64(spec.leaf_attrs)
        excused[mine] = (wrong & np.uint64(~mask & (2**64 - 1))) == 0
    return problems.take(~excused) if excused.any() else problems


@dataclass(slots=True)
class Differences:
    """Ranges of different attributes: ``iova``, ``last``, ``expected``, ``found``, ``stated`` uint64[n]."""

    common: Common
    iova: U64
    last: U64
    expected: U64
    found: U64
    stated: U64

    def __len__(self) -> int:
        return len(self.iova)

    def spans(self) -> Spans:
        """For :class:`iokeep.pt.compare.Comparison`: numbers are -2, -3 ..."""
        n = len(self)
        number: I64 = -2 - np.arange(n, dtype=np.int64)
        return Spans(self.iova, self.last, np.full(n, ATTRS, np.uint8), np.zeros(n, np.uint8), number)

    def texts(self, number: int) -> tuple[str, str]:
        """What was expected, and what was found, in the range of a number of :meth:`spans`."""
        i = -2 - number
        stated = int(self.stated[i])
        return (
            self.common.text(int(self.expected[i]), stated),
            self.common.text(int(self.found[i]), stated),
        )

    def without(self, iova: U64, last: U64) -> Differences:
        """Those that do not begin in one of the ranges, which may overlap each other."""
        if not len(iova) or not len(self):
            return self
        order = np.argsort(iova, kind="stable")
        first, top = iova[order], np.maximum.accumulate(last[order])
        at = np.searchsorted(first, self.iova, side="right") - 1
        free = (at < 0) | (top[np.maximum(at, 0)] < self.iova)
        columns = (self.iova, self.last, self.expected, self.found, self.stated)
        return Differences(self.common, *(c[free] for c in columns))


def _differences(common: Common, a: tuple[U64, U64, U64, U64], b: tuple[U64, U64, U64, U64]) -> Differences:
    """From (iova, last, word, stated) of both sides."""
    parts: list[tuple[U64, U64, U64, U64, U64]] = []
    for first, last, ia, ib in overlaps(a[0], a[1], b[0], b[1]):
        stated = a[3][ia] & b[3][ib]
        expected, found = a[2][ia] & stated, b[2][ib] & stated
        other = expected != found
        if other.any():
            parts.append((first[other], last[other], expected[other], found[other], stated[other]))
    if not parts:
        z = np.zeros(0, np.uint64)
        return Differences(common, z, z, z, z, z)
    iova, last, expected, found, stated = (np.concatenate([p[i] for p in parts]) for i in range(5))
    joins = (iova[1:] == last[:-1] + _ONE) & (last[:-1] != _MAX)
    for column in (expected, found, stated):
        joins &= column[1:] == column[:-1]
    at = np.flatnonzero(np.concatenate((np.ones(1, np.bool_), ~joins)))
    end = np.concatenate((at[1:] - 1, np.array([len(joins)])))
    return Differences(common, iova[at], last[end], expected[at], found[at], stated[at])


def _living(fmt: Format, common: Common, traits: Traits) -> tuple[U64, U64, U64, U64]:
    alive = traits.alive != 0
    word, stated = common.project(Attributes(fmt), traits.word[alive], traits.said[alive])
    return traits.iova[alive], traits.last[alive], word, stated


def compare_tables(fmt_a: Format, a: Traits, fmt_b: Format, b: Traits) -> Differences:
    """Where both tables let something pass and say different attributes; a is what is expected."""
    common = Common(Attributes(fmt_a), Attributes(fmt_b))
    return _differences(common, _living(fmt_a, common, a), _living(fmt_b, common, b))


def flags_of(attributes: Attributes, items: Items) -> tuple[U8, U8]:
    """The IOMMU_* flags of each leaf, and whether it leaves the memory type to the other stage of two (1),
    decides it alone (2), or neither (0): ``Format.outranks``.
    """
    fmt = attributes.fmt
    word, _ = attributes.words(items)
    flags = np.zeros(len(items), np.uint8)

    def has(field: str, values: tuple[int, ...]) -> NDArray[np.bool_]:
        shift, width = attributes.places[field]
        value = (word >> np.uint64(shift)) & np.uint64((1 << width) - 1)
        return np.isin(value, np.array(values, np.uint64))

    for flag, field, values in fmt.terms:
        flags[has(field, values)] |= np.uint8(flag)
    if fmt.outranks is None:
        return flags, np.zeros(len(items), np.uint8)
    return flags, np.where(has(*fmt.outranks), np.uint8(1), np.uint8(2)).astype(np.uint8)


def attributed(fmt: Format, mem: Memory, root_pa: int) -> Extents:
    """The canonical extents of a table with the IOMMU_* flags that the format can say in ``attrs``.

    :raises MemoryAbsent, InputError: as :func:`iokeep.pt.leaves.extents`.
    """
    tm = TableMemory(fmt, mem)
    upper = descend(tm, root_pa)
    raise_unreadable(fmt, upper.problems)
    attributes = Attributes(fmt)
    parts: list[Extents] = []
    lower = (items for items, _ in expand(tm, upper.base, upper.pa, upper.row, upper.prot))
    for items in (upper.leaves, *lower):
        alive = items.take(items.prot != 0)
        leaves = Leaves.of(fmt, alive)
        flags, _ = flags_of(attributes, alive)
        parts.append(Extents(leaves.iova, leaves.last, leaves.pa, leaves.prot, flags).canonical())
    return join_attributed(parts)


def join_attributed(parts: list[Extents]) -> Extents:
    """One canonical :class:`Extents` with ``attrs`` from disjoint parts in any order."""
    if not parts:
        none = np.zeros(0, np.uint64), np.zeros(0, np.uint8)
        return Extents(none[0], none[0], none[0], none[1], none[1])
    columns = [
        np.concatenate([getattr(p, c) for p in parts]) for c in ("iova", "last", "pa", "prot", "attrs")
    ]
    order = np.argsort(columns[0], kind="stable")
    return Extents(*(c[order] for c in columns)).canonical()


def compare_said(common: Common, expected: Extents, found: Extents) -> Differences:
    """Where extents with flags have others than expected, in the flags of ``common``."""
    sides = []
    for e in (expected, found):
        flags = np.zeros(len(e), np.uint8) if e.attrs is None else e.attrs
        sides.append((e.iova, e.last, *common.project_flags(flags)))
    return _differences(common, sides[0], sides[1])


def compare_flags(expected: Extents, fmt: Format, found: Traits) -> Differences:
    """Where a table has other attributes than the IOMMU_* flags that ``expected.attrs`` states."""
    common = Common(None, Attributes(fmt))
    flags = np.zeros(len(expected), np.uint8) if expected.attrs is None else expected.attrs
    word, stated = common.project_flags(flags)
    side = (expected.iova, expected.last, word, stated)
    return _differences(common, side, _living(fmt, common, found))
