# SPDX-License-Identifier: Apache-2.0
"""Two tables: do they translate alike, and are they cut into the same leaves?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from iokeep.mem.memory import Memory
from iokeep.pt.attributes import Traits, compare_tables, judged, table_traits
from iokeep.pt.bbm import judge
from iokeep.pt.compare import Mismatch, Verdict
from iokeep.pt.extents import PROT_R, PROT_W, Extents
from iokeep.pt.formats.base import Format
from iokeep.pt.layout import Layout, compare_layouts
from iokeep.pt.leaves import extents
from iokeep.pt.tables import ATTRS, REASONS, Problems
from iokeep.pt.verify import verify


def diff(
    fmt_a: Format,
    mem_a: Memory,
    root_a: int,
    fmt_b: Format,
    mem_b: Memory,
    root_b: int,
    *,
    limit: int = 16,
) -> Verdict:
    """Compare the table B (found) with the table A (expected); formats may differ.

    Where B's format has no write-only, A's "-w" counts as "rw". Leaves that let nothing pass count for
    nothing on either side. A bad item of A (reserved bits, attributes) is a mismatch as one of B is. Memory
    attributes are compared as far as both formats can say them (``attributes.compare_tables``).

    :param limit: so many mismatches and layout ranges are named; all are counted.
    :raises MemoryAbsent, InputError: a table of A, or the root of B, is absent; or no table at all.
    """
    expected, problems = extents(fmt_a, mem_a, root_a)
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
