# SPDX-License-Identifier: Apache-2.0
"""The sweep of ``verify`` compiled: the only module of this room that imports Numba, and only for big tables.

Every value is uint64 by construction (module constants, typed arrays): uint64 mixed with any signed integer
silently becomes float64 or int64 in Numba. Loop indices are int64 and only index. ``NUMBA_DISABLE_JIT=1``
runs the same code as plain Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from iokeep.mem.memory import I64, U8, U64
from iokeep.pt.extents import Extents
from iokeep.pt.tables import TableMemory

_ZERO = np.uint64(0)
_ONE = np.uint64(1)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """njit with an on-disk cache, or without one where no place is writable."""
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:
        return njit(nogil=True)(function)


@_compiled
def _plain_tables(
    items: U64, row: I64, kind: U8, word: U64, step: np.uint64, care: np.uint64, valid: np.uint64, out: U8
) -> None:
    """Tables of kind 0 (nothing expected) and 1 (one run): out[t] = 1 where proved."""
    size = np.uint64(items.shape[1])
    for t in range(len(row)):
        table = items[row[t]]
        wrong = _ZERO
        if kind[t] == 1:
            first = word[t]
            for i in range(size):  # unsigned: no check for negative indices, and it vectorises
                wrong |= (table[i] ^ (first + i * step)) & care
        elif kind[t] == 0:
            for i in range(size):
                wrong |= table[i] & valid
        else:
            continue
        out[t] = 1 if wrong == _ZERO else 0


@_compiled
def _mixed_tables(
    items: U64,
    row: I64,
    kind: U8,
    base: U64,
    first: I64,
    after: I64,
    e_iova: U64,
    e_last: U64,
    e_pa: U64,
    e_prot: U8,
    perms: U64,
    shift: np.uint64,
    care: np.uint64,
    valid: np.uint64,
    out: U8,
) -> None:
    """Tables of kind 2, which the extents first[t] ... after[t]-1 touch: out[t] = 1 where proved."""
    step = _ONE << shift
    for t in range(len(row)):
        if kind[t] != 2:
            continue
        table = items[row[t]]
        start = base[t]
        end = start + ((np.uint64(len(table)) << shift) - _ONE)
        wrong = _ZERO
        slot = np.int64(0)
        for e in range(first[t], after[t]):
            lo = max(e_iova[e], start)
            hi = min(e_last[e], end)
            begin = np.int64((lo - start) >> shift)
            stop = np.int64((hi - start) >> shift) + 1
            for i in range(slot, begin):
                wrong |= table[i] & valid
            want = (e_pa[e] | perms[e_prot[e]]) + (lo - e_iova[e])
            for i in range(begin, stop):
                wrong |= (table[i] ^ want) & care
                want = want + step
            slot = stop
        for i in range(slot, len(table)):
            wrong |= table[i] & valid
        out[t] = 1 if wrong == _ZERO else 0


def proved(
    tm: TableMemory, row: I64, kind: U8, word: U64, base: U64, first: I64, after: I64, e: Extents, perms: U64
) -> NDArray[np.bool_]:
    """As the NumPy sweep of ``verify``: which tables hold exactly what is expected.

    :param row: rows of the tables. :param kind: 0 nothing expected, 1 one run that starts with ``word``, 2
        the extents ``first`` ... ``after`` - 1. :param base: IOVA of each table. :param e_word: item of each
        extent's first page.
    """
    spec = tm.fmt.levels[0]
    items = tm.rows.data.view(np.uint64)
    care = np.uint64(~spec.leaf_ignored & (2**64 - 1))
    valid, step = np.uint64(spec.valid_mask), np.uint64(1 << spec.shift)
    out = np.zeros(len(row), np.uint8)
    # In physical order the tables stream; in IOVA order scattered tables cost three times as much.
    order = None
    if bool((row[1:] < row[:-1]).any()) and not bool((kind == 2).any()):
        order = np.argsort(row)
        row, kind, word = row[order], kind[order], word[order]
    _plain_tables(items, row, kind, word, step, care, valid, out)
    if bool((kind == 2).any()):
        a, b = first.astype(np.int64), after.astype(np.int64)
        shift = np.uint64(spec.shift)
        _mixed_tables(
            items, row, kind, base, a, b, e.iova, e.last, e.pa, e.prot, perms, shift, care, valid, out
        )
    result = out.view(np.bool_)
    if order is not None:
        back = np.empty_like(result)
        back[order] = result
        return back
    return result
