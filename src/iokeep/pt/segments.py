# SPDX-License-Identifier: Apache-2.0
"""What a map writes: extents as runs of leaves of each size, cut where one table ends and the next begins.

Source of the sizes: drivers/iommu/iommu.c (``iommu_pgsize()``, 7.3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from iokeep.mem.memory import I64, U8, U64
from iokeep.pt.formats.base import Contig, Format

#: items written at once: their intermediates stay in the cache
_BATCH = 1 << 16


@dataclass(slots=True)
class Runs:
    """Leaves of one size: ``iova`` (raw), ``pa`` uint64[n], ``count`` int64[n] of items, ``prot`` uint8[n];
    sorted. ``lg2`` of the leaves; ``contig`` where each is so many items.
    """

    level: int
    lg2: int
    contig: Contig | None
    iova: U64
    count: I64
    pa: U64
    prot: U8


@dataclass(slots=True)
class Segments:
    """Runs cut at tables: ``key`` uint64[s] = iova >> bits of one table, ``index`` int64[s] of the first
    item.
    """

    level: int
    contig: Contig | None
    key: U64
    index: I64
    count: I64
    pa: U64
    prot: U8
    unique: U64
    table: I64


def sizes_of(fmt: Format, max_lg2: int | None) -> list[tuple[int, int, Contig | None]]:
    """(level, log2 size, contiguous entry) of the leaves that Linux makes, from large to small."""
    out: list[tuple[int, int, Contig | None]] = []
    for level, spec in enumerate(fmt.levels):
        runs = {spec.shift + c.lg2: c for c in spec.contig}
        for lg2 in spec.lg2s:
            if max_lg2 is None or lg2 <= max_lg2:
                out.append((level, lg2, None if lg2 == spec.shift else runs[lg2]))
    if not out:
        raise ValueError(f"{fmt.name} has no leaf of at most 2**{max_lg2} bytes")
    return out[::-1]


def firsts(values: U64) -> NDArray[np.intp]:
    """Positions where a value differs from the one before."""
    if not len(values):
        return np.zeros(0, np.intp)
    return np.concatenate((np.zeros(1, np.intp), np.flatnonzero(values[1:] != values[:-1]) + 1))


def choose_leaves(fmt: Format, iova: U64, length: U64, pa: U64, prot: U8, max_lg2: int | None) -> list[Runs]:
    """Leaf sizes as ``iommu_pgsize()`` takes them: runs per level, from large to small. ``iova`` is raw."""
    sizes = sizes_of(fmt, max_lg2)
    out = []
    # In pages of the smallest level: the end of a space of 64 bits is no uint64 of bytes.
    page = fmt.levels[0].shift
    unit = np.uint64(page)
    first, pages = iova >> unit, length >> unit
    for level, lg2, contig in sizes[:-1]:
        mask = np.uint64((1 << (lg2 - page)) - 1)
        begin, end = (first + mask) & ~mask, (first + pages) & ~mask
        fits = (((first ^ (pa >> unit)) & mask) == 0) & (end > begin)
        if not fits.any():
            continue
        b, e, i, n = begin[fits], end[fits], first[fits], pages[fits]
        count = ((e - b) >> np.uint64(fmt.levels[level].shift - page)).astype(np.int64)
        start = pa[fits] + ((b - i) << unit)
        out.append(_sorted(Runs(level, lg2, contig, b << unit, count, start, prot[fits])))
        rest = ~fits
        head, tail = b > i, i + n > e
        first, pages, pa, prot = (
            np.concatenate((first[rest], i[head], e[tail])),
            np.concatenate((pages[rest], (b - i)[head], (i + n - e)[tail])),
            np.concatenate((pa[rest], pa[fits][head], (pa[fits] + ((e - i) << unit))[tail])),
            np.concatenate((prot[rest], prot[fits][head], prot[fits][tail])),
        )
    level, lg2, contig = sizes[-1]
    if len(first):
        count = (pages >> np.uint64(fmt.levels[level].shift - page)).astype(np.int64)
        out.append(_sorted(Runs(level, lg2, contig, first << unit, count, pa, prot)))
    return out


def _sorted(runs: Runs) -> Runs:
    if bool((runs.iova[1:] > runs.iova[:-1]).all()):
        return runs
    order = np.argsort(runs.iova, kind="stable")
    return Runs(
        runs.level,
        runs.lg2,
        runs.contig,
        runs.iova[order],
        runs.count[order],
        runs.pa[order],
        runs.prot[order],
    )


def cut(fmt: Format, runs: Runs) -> Segments:
    """Runs cut where one table ends and the next begins."""
    spec = fmt.levels[runs.level]
    shift, bits, one = np.uint64(spec.shift), np.uint64(spec.index_bits), np.uint64(1)
    start = runs.iova >> shift  # in items
    key = start >> bits
    last_key = (start + runs.count.view(np.uint64) - one) >> bits
    index = (start & np.uint64(spec.items - 1)).view(np.int64)
    pa, prot, count = runs.pa, runs.prot, runs.count
    if len(key) == 1:  # as a large map mostly is: each column is a ramp
        total = int(last_key[0] - key[0]) + 1
        key = key[0] + np.arange(total, dtype=np.uint64)
        skip, index, count = int(index[0]), np.zeros(total, np.int64), np.full(total, spec.items)
        index[0], count[0] = skip, spec.items - skip
        count[-1] -= (total << spec.index_bits) - skip - int(runs.count[0])
        pa = pa[0] + (np.arange(total, dtype=np.uint64) << (bits + shift)) - (np.uint64(skip) << shift)
        pa[0] = runs.pa[0]
        return Segments(
            runs.level, runs.contig, key, index, count, pa, np.full(total, prot[0]), key, np.arange(total)
        )
    if bool((last_key != key).any()):
        parts = (last_key - key).astype(np.int64) + 1
        after = np.cumsum(parts)
        head = after - parts
        inner, total = index, int(after[-1])
        key = np.arange(total, dtype=np.uint64) + np.repeat(key - head.view(np.uint64), parts)
        # All but the first and the last piece of a run are whole tables.
        index, count = np.zeros(total, np.int64), np.full(total, spec.items)
        index[head], count[head] = inner, spec.items - inner
        tail = after - 1
        count[tail] = inner + runs.count - (((parts - 1) << spec.index_bits) + index[tail])
        begin = np.repeat(pa - (start << shift), parts)
        pa = begin + (((key << bits) + index.view(np.uint64)) << shift)
        prot = np.repeat(prot, parts)
    first = firsts(key)
    if len(first) == len(key):
        return Segments(runs.level, runs.contig, key, index, count, pa, prot, key, np.arange(len(key)))
    step = np.zeros(len(key), np.int64)
    step[first[1:]] = 1
    return Segments(runs.level, runs.contig, key, index, count, pa, prot, key[first], np.cumsum(step))


def batches(count: I64) -> list[slice]:
    """Slices of segments of about _BATCH items each; a segment is never cut."""
    ends = np.cumsum(count)
    cuts = np.searchsorted(ends, np.arange(_BATCH, int(ends[-1]) + _BATCH, _BATCH), side="left") + 1
    bounds = np.unique(np.concatenate((np.zeros(1, np.int64), np.minimum(cuts, len(ends)))))
    return [slice(lo, hi) for lo, hi in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]


def places(seg: Segments, rows: I64, part: slice, items: int) -> tuple[I64, I64 | None, I64 | None]:
    """Flat item numbers in memory of the segments ``part``; which segment owns each, and its place therein.

    Owner and place are None where every segment is one item.
    """
    base = rows[seg.table[part]] * items + seg.index[part]
    count = seg.count[part]
    total = int(count.sum())
    if total == len(count):
        return base, None, None
    owner = np.repeat(np.arange(len(count)), count)
    inner = np.arange(total) - np.repeat(np.cumsum(count) - count, count)
    return base[owner] + inner, owner, inner
