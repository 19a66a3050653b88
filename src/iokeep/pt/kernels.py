# SPDX-License-Identifier: Apache-2.0
"""What all compiled loops of this room share: how they are compiled, in which order tables are visited, and
over how many threads.

``IOKEEP_THREADS=N`` is the switch: so many threads at most, 1 = none besides the caller's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from itertools import pairwise
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from iokeep.mem.memory import I64, U8, U64
from iokeep.pt.choice import jit

_ZERO = np.uint64(0)
_PAGE = np.uint64(12)
#: bytes of tables that are worth another thread, and the most threads that memory feeds
_THREAD_BYTES = 128 << 20
_MOST_THREADS = 4


def _quiet(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any) -> Any:
        with np.errstate(over="ignore"):
            return function(*args)

    return call


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """njit with an on-disk cache; without one where no place for it is writable, or has room.

    With ``NUMBA_DISABLE_JIT=1`` the function as it is, without NumPy's warnings of what is meant: words wrap.
    """
    if not jit():
        return _quiet(function)
    try:
        cached: Callable[..., Any] = njit(cache=True, nogil=True)(function)
    except RuntimeError:  # "cannot cache function: no locator available"
        return njit(nogil=True)(function)

    @wraps(cached)
    def call(*args: Any) -> Any:
        try:
            return cached(*args)
        except OSError:  # what was compiled could not be saved, but is there now; the loops raise nothing
            return cached(*args)

    return call


@compiled
def _count(row: I64, low: int, shift: int, counts: I64, chosen: I64, place: I64, rows: I64) -> None:
    """Sort by counting: ``place`` gets ``chosen`` in the order of their rows, as far as buckets of 2**shift
    rows tell them apart; ``rows`` their rows.
    """
    for t in chosen:
        counts[(row[t] - low) >> shift] += 1
    before = 0
    for bucket in range(len(counts)):
        n = counts[bucket]
        counts[bucket] = before
        before += n
    for t in chosen:
        bucket = (row[t] - low) >> shift
        index = counts[bucket]
        counts[bucket] = index + 1
        place[index] = t
        rows[index] = row[t]


def in_memory_order(row: I64, chosen: I64 | None = None) -> tuple[I64, I64]:
    """Positions of ``row`` (all, or those ``chosen``) in the order in which tables lie in memory, and their
    rows.

    :param row: int64[n], each at least 0. Positions stay in order where they nearly are.
    """
    here = np.arange(len(row)) if chosen is None else chosen
    rows = row if chosen is None else row[chosen]
    if len(rows) < 2 or int(np.count_nonzero(rows[1:] < rows[:-1])) * 16 <= len(rows):
        return here, rows
    low, high = int(rows.min()), int(rows.max())
    shift = max((high - low).bit_length() - len(rows).bit_length() - 1, 0)
    counts = np.zeros(((high - low) >> shift) + 1, np.int64)
    place, ordered = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
    _count(row, low, shift, counts, here, place, ordered)
    return place, ordered


@compiled
def _alike(
    items: U64, base: U64, prot: U8, masks: U64, may: NDArray[np.bool_], iova: U64, pa: U64, grants: U8
) -> tuple[int, bool]:
    """See :func:`alike`. :return: how many, -1 = one differs; whether one may be in the filter."""
    ref, same, shift, pa_mask, pa_shift = masks[0], masks[1], masks[2], masks[3], masks[4]
    low = np.uint64(len(may) - 1)
    n = 0
    some = False
    size = np.uint64(items.shape[1])
    for t in range(len(base)):
        table = items[t]
        start, grant = base[t], prot[t]
        for i in range(size):
            word = table[i]
            if word != _ZERO:
                if (word ^ ref) & same != _ZERO:
                    return -1, False
                to = (word & pa_mask) << pa_shift
                some |= may[(to >> _PAGE) & low]
                iova[n] = start + (i << shift)
                pa[n] = to
                grants[n] = grant
                n += 1
    return n, some


def alike(
    items: U64, base: U64, prot: U8, ref: int, same: int, shift: int, pa_mask: int, pa_shift: int,
    may: NDArray[np.bool_],
) -> tuple[U64, U64, U8, bool] | None:  # fmt: skip
    """The tables that items point to, all of which agree with ``ref`` in the bits ``same``; see
    ``tables.Alike``.
    """
    iova, pa = np.empty(items.size, np.uint64), np.empty(items.size, np.uint64)
    grants = np.empty(items.size, np.uint8)
    masks = np.array([ref, same, shift, pa_mask, pa_shift], np.uint64)
    n, some = _alike(items, base, prot, masks, may, iova, pa, grants)
    return None if n < 0 else (iova[:n], pa[:n], grants[:n], bool(some))


def thread_count(size: int, threads: int | None = None) -> int:
    """Threads for ``size`` bytes of tables: as asked, as ``IOKEEP_THREADS`` says, or as many as help."""
    if threads is None:
        text = os.environ.get("IOKEEP_THREADS", "")
        most = int(text) if text.isdecimal() else _MOST_THREADS
        threads = min(most, len(os.sched_getaffinity(0)), size // _THREAD_BYTES)
    return max(threads, 1)


def over_threads(work: Callable[[int, int], None], n: int, unit: int, threads: int | None = None) -> None:
    """Call ``work(a, b)`` for parts of [0, n), each of about the same number.

    :param unit: bytes of one. :param threads: see :func:`thread_count`.
    """
    count = min(thread_count(n * unit, threads), max(n, 1))
    if count == 1:
        work(0, n)
        return
    cuts = [n * i // count for i in range(count + 1)]
    with ThreadPoolExecutor(count - 1) as pool:
        parts = [pool.submit(work, a, b) for a, b in pairwise(cuts[1:])]
        work(cuts[0], cuts[1])
        for part in parts:
            part.result()
