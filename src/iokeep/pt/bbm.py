# SPDX-License-Identifier: Apache-2.0
"""May a live device be switched from one table to the other without break-before-make?

An IOMMU that has cached a translation and then reads another one for the same IOVA may mix the two. Software
therefore unmaps, invalidates and only then maps anew (break-before-make) - which is a DMA fault - unless the
hardware tells that it needs not. Only *cached translations* count: tables may move freely as long as every
leaf stays as large as it was (Gunthorpe, 20241007150138.GM2456194@ziepe.ca), and the same translation at
another size is what breaks (Gowans' answer of 9 October 2024).

The level is SMMU_IDR3.BBML (SMMUv3, IHI 0070, chapter 6), which means what FEAT_BBM means in the Arm
Architecture Reference Manual (DDI 0487), chapter D8:

* 0: leaf sizes and contiguous runs must not change;
* 1: a leaf may change its size where the larger one has nT set, so that it is in no cache;
* 2: leaf sizes and contiguous runs may change.

At no level may the OA or a memory attribute change; a permission may, and so may what is mapped on one side
only. Where level 1 leaves room (a contiguous run of blocks with nT), the answer here is no. For formats other
than Arm's, which have no nT, read the level as what the hardware promises: 0 = nothing, 2 = any size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from iokeep.pt.attributes import Differences, overlaps
from iokeep.pt.compare import Bbm, BbmRange, Verdict
from iokeep.pt.formats.base import Format
from iokeep.pt.traits import Traits

LEVELS = (0, 1, 2)
#: reasons of mismatches that no level allows (a bad item: nobody can say what hardware has cached)
NEVER = ("pa", "contig", "reserved", "loop", "absent", "root")
_ONE = np.uint64(1)


def _sizes(fmt_a: Format, a: Traits, fmt_b: Format, b: Traits) -> list[tuple[NDArray[Any], ...]]:
    """Pieces of different size: first, last, lg2_a, lg2_b, contiguous only, lowest level."""
    shift_a = np.array([s.shift for s in fmt_a.levels], np.uint8)
    shift_b = np.array([s.shift for s in fmt_b.levels], np.uint8)
    out = []
    for first, last, ia, ib in overlaps(a.iova, a.last, b.iova, b.last):
        item_a, item_b = shift_a[a.level[ia]], shift_b[b.level[ib]]
        size_a, size_b = a.lg2[ia], b.lg2[ib]
        differ = (size_a != size_b) | (item_a != item_b)
        larger = np.where(item_a > item_b, a.keep[ia], b.keep[ib])
        contiguous = item_a == item_b
        # An item of the other side that is larger, and the contiguous run that it may be in as well.
        runs = (size_a != item_a) | (size_b != item_b)
        level = np.where(~contiguous & ~runs & (larger != 0), np.uint8(1), np.uint8(2))
        columns = (first, last, size_a, size_b, contiguous, level)
        out.append(tuple(c[differ] for c in columns))
    return out


def judge(
    fmt_a: Format,
    a: Traits,
    fmt_b: Format,
    b: Traits,
    verdict: Verdict,
    attributes: Differences,
    bad_items: int,
    limit: int,
) -> Bbm:
    """The verdict on a switch from the table a to the table b.

    :param verdict: of their translations, with its first mismatches. :param attributes: where they differ;
        nT is none of them. :param bad_items: of a, attributes aside. :param limit: so many ranges are named
        for each level.
    """
    named = [
        BbmRange(m.iova, m.last, m.reason, None, None, None) for m in verdict.mismatches if m.reason in NEVER
    ]
    # Mismatches beyond those that have a name are known by kind, not by number: one is enough to forbid.
    unnamed = not named and (bad_items > 0 or any(reason in NEVER for reason in verdict.differ))
    blocked = [len(named) + int(unnamed) + len(attributes)] * 3
    ends_of = zip(attributes.iova[:limit].tolist(), attributes.last[:limit].tolist(), strict=True)
    named += [BbmRange(first, last, "attrs", None, None, None) for first, last in ends_of]
    kept: tuple[list[BbmRange], list[BbmRange], list[BbmRange]] = ([], [], [])
    before: tuple[int, ...] | None = None
    for first, last, lg2_a, lg2_b, contiguous, level in _sizes(fmt_a, a, fmt_b, b):
        if not len(first):
            continue
        joins = first[1:] == last[:-1] + _ONE
        for column in (lg2_a, lg2_b, contiguous, level):
            joins &= column[1:] == column[:-1]
        starts = np.flatnonzero(np.concatenate((np.ones(1, np.bool_), ~joins)))
        ends = np.concatenate((starts[1:] - 1, np.array([len(joins)])))
        edge = (int(first[0]), int(lg2_a[0]), int(lg2_b[0]), int(contiguous[0]), int(level[0]))
        joined = before == edge
        for at in (0, 1):
            counts = np.ones(len(starts), np.bool_) if at == 0 else level[starts] > 1
            here = int(counts.sum()) - int(joined and bool(counts[0]))
            blocked[at] += here
            if joined and bool(counts[0]) and kept[at] and kept[at][-1].last + 1 == edge[0]:
                whole = kept[at][-1]
                kept[at][-1] = BbmRange(
                    whole.iova, int(last[ends[0]]), whole.kind, whole.lg2_a, whole.lg2_b, whole.level
                )
            for i in np.flatnonzero(counts)[: max(limit - len(kept[at]), 0) + 1].tolist():
                if (joined and i == 0) or len(kept[at]) >= limit:
                    continue
                s, e = starts[i], ends[i]
                kind = "contiguous" if contiguous[s] else "size"
                kept[at].append(
                    BbmRange(int(first[s]), int(last[e]), kind, int(lg2_a[s]), int(lg2_b[s]), int(level[s]))
                )
        before = (
            int(last[-1]) + 1, int(lg2_a[-1]), int(lg2_b[-1]), int(contiguous[-1]), int(level[-1]),
        )  # fmt: skip
    for at in range(3):
        kept[at].extend(named)
        kept[at].sort(key=lambda r: r.iova)
        del kept[at][limit:]
    return Bbm((blocked[0], blocked[1], blocked[2]), kept)
