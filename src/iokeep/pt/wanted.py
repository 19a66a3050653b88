# SPDX-License-Identifier: Apache-2.0
"""How an expectation is to be cut into leaves: as a kernel would, or as it says; and what a live switch from
a table to that would be (``bbm``).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from iokeep.errors import InputError
from iokeep.mem.memory import U8, Memory
from iokeep.pt.attributes import Common, Differences, table_traits
from iokeep.pt.bbm import judge
from iokeep.pt.compare import Verdict
from iokeep.pt.extents import Extents
from iokeep.pt.formats.base import Format
from iokeep.pt.segments import choose_leaves
from iokeep.pt.traits import Traits

_ONE = np.uint64(1)


def _traits(expected: Extents, at: np.ndarray[tuple[int], np.dtype[np.intp]], lg2: U8, level: U8) -> Traits:
    z, one = np.zeros(len(at), np.uint64), np.ones(len(at), np.uint8)
    e = expected
    return Traits(e.iova[at], e.last[at], lg2, level, z, z, one, np.zeros(len(at), np.uint8))


def wanted_traits(fmt: Format, expected: Extents, lg2: U8 | None = None, where: str = "expected") -> Traits:
    """The leaves that are wanted, as runs of one size; attributes are not stated.

    :param lg2: log2 of the leaf's bytes of each extent; None = what Linux makes (``iommu_pgsize()``) where
        each extent is mapped by one call, as far as the format can express the extent.
    :param where: what a bad ``lg2`` is blamed on.
    :raises InputError: a leaf size that the format does not have, or that an extent is no multiple of.
    """
    if lg2 is not None:
        return _stated(fmt, expected, lg2, where)
    small = np.uint64((1 << fmt.levels[0].shift) - 1)
    length = expected.last - expected.iova + _ONE
    fits = ((expected.iova | expected.pa | length) & small == 0) & (length != 0) & (expected.prot != 0)
    fits &= fmt.covers_array(expected.iova) & fmt.covers_array(expected.last)
    e = Extents(expected.iova[fits], expected.last[fits], expected.pa[fits], expected.prot[fits])
    parts = []
    raw = e.iova & np.uint64((1 << fmt.input_lg2) - 1)
    for run in choose_leaves(fmt, raw, length[fits], e.pa, e.prot, None) if len(e) else ():
        iova = fmt.extend(run.iova)
        last = iova + ((run.count.astype(np.uint64) << np.uint64(fmt.levels[run.level].shift)) - _ONE)
        whole = Extents(iova, last, run.pa, run.prot)
        sizes = np.full(len(iova), run.lg2, np.uint8), np.full(len(iova), run.level, np.uint8)
        parts.append(_traits(whole, np.arange(len(iova)), *sizes))
    return Traits.join(parts)


def _stated(fmt: Format, expected: Extents, lg2: U8, where: str) -> Traits:
    levels: dict[int, int] = {}
    for number, spec in enumerate(fmt.levels):
        for size in (spec.shift, *(spec.shift + c.lg2 for c in spec.contig)) if spec.leaf else ():
            levels.setdefault(size, number)
    known = np.isin(lg2, np.array(list(levels), np.uint8))
    mask = (_ONE << lg2.astype(np.uint64)) - _ONE
    length = expected.last - expected.iova + _ONE
    whole = ((expected.iova | expected.pa | length) & mask) == 0
    for i in np.flatnonzero(~known | ~whole)[:1].tolist():
        what = f"{where}: the extent at iova {int(expected.iova[i]):#x}: lg2 {int(lg2[i])}"
        if not known[i]:
            raise InputError(
                f"{what} is no leaf size of {fmt.name}", f"it has {', '.join(map(str, sorted(levels)))}"
            )
        raise InputError(
            f"{what}: iova, pa {int(expected.pa[i]):#x}, length {int(length[i]):#x} are no multiples of it",
            "split the extent into rows of one leaf size each",
        )
    level = np.array([levels.get(n, 0) for n in range(64)], np.uint8)[lg2]
    return Traits.join([_traits(expected, np.arange(len(expected)), lg2, level)])


def with_bbm(fmt: Format, mem: Memory, root_pa: int, wanted: Traits, verdict: Verdict, limit: int) -> Verdict:
    """``verdict`` with ``bbm``: may a live device be switched from the table to one that is as ``wanted``?

    None where the table cannot be read as a whole.
    """
    if any(reason in ("loop", "absent", "root") for reason in verdict.differ):
        return verdict
    z = np.zeros(0, np.uint64)
    none = Differences(Common.of_flags(()), z, z, z, z, z)
    bbm = judge(fmt, table_traits(fmt, mem, root_pa), fmt, wanted, verdict, none, 0, limit)
    return replace(verdict, bbm=bbm)
