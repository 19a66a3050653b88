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
I32 = NDArray[np.int32]
#: tables lie close together where so many times their memory holds them all
_CLOSE = 4
#: bytes of tables that are worth another thread, and the most threads that memory feeds
_THREAD_BYTES = 128 << 20
_MOST_THREADS = 4
# glibc takes memory for an array of 128 KiB or more from the system and gives it back at once, so that each
# of its pages costs a fault, every time. Where a larger one was given back before, it keeps it (mallopt(3),
# M_MMAP_THRESHOLD: up to 32 MiB). This one is never touched, so it costs nothing.
np.empty(31 << 20, np.uint8)


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
def _owners(row: I64, low: int, owner: I32, place: I64, rows: I64) -> bool:
    """``place`` gets the positions of ``row`` in the order of their rows; ``rows`` their rows.

    :param owner: one for each row from ``low`` on, all -1. :return: False = two positions have one row.
    """
    for t in range(len(row)):
        index = row[t] - low
        if owner[index] >= 0:
            return False
        owner[index] = t
    n = 0
    for index in range(len(owner)):
        t = owner[index]
        if t >= 0:
            place[n] = t
            rows[n] = index + low
            n += 1
    return True


@compiled
def _count(row: I64, low: int, shift: int, counts: I64, place: I64, rows: I64) -> None:
    """Sort by counting: ``place`` gets the positions of ``row`` in the order of their rows, as far as buckets
    of 2**shift rows tell them apart; ``rows`` their rows.
    """
    for t in range(len(row)):
        counts[(row[t] - low) >> shift] += 1
    before = 0
    for bucket in range(len(counts)):
        n = counts[bucket]
        counts[bucket] = before
        before += n
    for t in range(len(row)):
        bucket = (row[t] - low) >> shift
        index = counts[bucket]
        counts[bucket] = index + 1
        place[index] = t
        rows[index] = row[t]


@compiled
def _order(rows: I64) -> tuple[int, int, int]:
    """How many are less than the one before; the least and the greatest."""
    down, low, high, before = 0, rows[0], rows[0], rows[0]
    for row in rows:
        down += 1 if row < before else 0
        low, high, before = min(low, row), max(high, row), row
    return down, low, high


def in_memory_order(row: I64, chosen: I64 | None = None) -> tuple[I64, I64]:
    """Positions of ``row`` (all, or those ``chosen``) in the order in which tables lie in memory, and their
    rows.

    A table that is read out of order by a few places costs twice what it costs in order. Tables that lie
    close together are put in order by a look at each row of memory, which is half of what sorting costs.

    :param row: int64[n], each at least 0. Positions stay in order where they nearly are.
    """
    rows = row if chosen is None else row[chosen]
    n = len(rows)
    down, low, high = _order(rows) if n else (0, 0, 0)
    if down * 16 <= n:
        return np.arange(n) if chosen is None else chosen, rows
    place, ordered = np.empty(n, np.int64), np.empty(n, np.int64)
    close = high - low < _CLOSE * n and n <= np.iinfo(np.int32).max
    if not close or not _owners(rows, low, np.full(high - low + 1, -1, np.int32), place, ordered):
        shift = max((high - low).bit_length() - n.bit_length() - 1, 0)
        _count(rows, low, shift, np.zeros(((high - low) >> shift) + 1, np.int64), place, ordered)
    return (place if chosen is None else chosen[place]), ordered


@compiled
def visit_once(pa: U64, prot: U8, first: np.uint64, state: U8) -> bool:
    """Whether all of these tables, of a page each, grant all and are in pages that are owned and not visited
    yet; they are visited then.

    :param first: pa of the first page of ``state``: 1 = is owned, 2 = was visited, else neither.
    """
    size = np.uint64(len(state))
    for i in range(len(pa)):
        index = (pa[i] - first) >> _PAGE
        if index >= size or state[index] != 1 or prot[i] != 3:
            return False
        state[index] = 2
    return True


@compiled
def any_hidden(items: U64, row: I64, present: np.uint64, occupied: np.uint64) -> bool:
    """Whether an item of the tables in ``row`` has none of the bits ``present``, and some that are
    ``occupied``.
    """
    size = np.uint64(items.shape[1])
    hidden = _ZERO
    for t in range(len(row)):
        table = items[row[t]]
        for i in range(size):
            item = table[i]
            hidden |= item & occupied if item & present == _ZERO else _ZERO
    return bool(hidden != _ZERO)


@compiled
def only_such(
    items: U64, row: I64, present: np.uint64, mask: np.uint64, value: np.uint64, out: NDArray[np.bool_]
) -> None:
    """out[t] = all items of the table row[t] that have any of the bits ``present`` are ``value`` under
    ``mask``.
    """
    size = np.uint64(items.shape[1])
    for t in range(len(row)):
        table = items[row[t]]
        other = _ZERO
        for i in range(size):
            item = table[i]
            other |= (item & mask) ^ value if item & present != _ZERO else _ZERO
        out[t] = other == _ZERO


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
