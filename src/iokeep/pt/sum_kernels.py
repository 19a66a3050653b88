# SPDX-License-Identifier: Apache-2.0
"""The loops of ``sums`` and ``digest``, compiled; imported only for big tables. For the arithmetic see
``sweep``.
"""

from __future__ import annotations

import numpy as np

from iokeep.mem.memory import I64, U8, U64
from iokeep.pt.kernels import compiled

_ZERO = np.uint64(0)
_ONE = np.uint64(1)
_FOLD = np.uint64(20)
_LOW = np.uint64((1 << 20) - 1)
_NINE = np.uint64(9)
_SLOT = np.uint64(511)
_FOUR = np.uint64(4)
_30 = np.uint64(30)
_27 = np.uint64(27)
_31 = np.uint64(31)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_PAGE = np.uint64(12)
_SMALL = np.uint64(4095)
_THREE = np.uint64(3)
_BLOCK = np.uint64(18)
_INNER = np.uint64((1 << 18) - 1)
_FRAMES = np.uint64(1 << 20)


@compiled
def sum_alike(items: U64, row: I64, k: U64, m: U64, masks: U64, head: U64, odd: U64, x: U64, y: U64) -> None:
    """Sums of the frame numbers of whole tables: ``x`` by k, ``y`` folded by m; ``head`` is the first item,
    and ``odd`` the bits that matter in which another differs.
    """
    pa_mask, down, same = masks[0], masks[1], masks[2]
    size = np.uint64(items.shape[1])
    for t in range(len(row)):
        table = items[row[t]]
        first = table[_ZERO]
        sum_x, sum_y, differ = _ZERO, _ZERO, _ZERO
        for i in range(size):
            item = table[i]
            n = (item & pa_mask) >> down
            differ |= item ^ first
            sum_x += k[i] * n
            sum_y += m[i] * (((n & _LOW) << _FOLD) + (n >> _FOLD))
        head[t] = first
        odd[t] = differ & same
        x[t] = sum_x
        y[t] = sum_y


@compiled
def sum_holed(
    items: U64,
    row: I64,
    k: U64,
    m: U64,
    masks: U64,
    head: U64,
    odd: U64,
    x: U64,
    y: U64,
    kx: U64,
    ly: U64,
    pages: U64,
) -> None:
    """As :func:`sum_alike` for tables with absent items: ``head`` is the first that is there; ``kx``, ``ly``
    the sums of k and m over those that are there, ``pages`` their number.
    """
    pa_mask, down, same, valid = masks[0], masks[1], masks[2], masks[3]
    size = np.uint64(items.shape[1])
    for t in range(len(row)):
        table = items[row[t]]
        first = _ZERO
        for i in range(size):
            if table[i] & valid != _ZERO:
                first = table[i]
                break
        sum_x, sum_y, sum_k, sum_l, number, differ = _ZERO, _ZERO, _ZERO, _ZERO, _ZERO, _ZERO
        for i in range(size):
            item = table[i]
            there = _ONE if item & valid != _ZERO else _ZERO
            n = ((item & pa_mask) >> down) * there
            differ |= (item ^ first) * there
            sum_x += k[i] * n
            sum_y += m[i] * (((n & _LOW) << _FOLD) + (n >> _FOLD))
            sum_k += k[i] * there
            sum_l += m[i] * there
            number += there
        head[t] = first
        odd[t] = differ & same
        x[t] = sum_x
        y[t] = sum_y
        kx[t] = sum_k
        ly[t] = sum_l
        pages[t] = number


@compiled
def weigh(block: U64, frames: U64, grants: U8, keys: U64, table: U64, salt: np.uint64) -> np.uint64:
    """The sum over whole tables of (mix(g ^ salt) | 1) * table[j] * (4 * frames + grant * keys): see
    ``digest``.

    :param block: number of the 2 MiB of each. :param frames: its sum of frame numbers, by the page keys.
    :param keys: the sum of those that are there; one number = of all.
    """
    total, factor, prior = _ZERO, _ZERO, _ZERO
    constant = len(keys) == 1
    for t in range(len(block)):
        g = block[t] >> _NINE
        if t == 0 or g != prior:
            prior = g
            z = g ^ salt
            z = (z ^ (z >> _30)) * _MIX_1
            z = (z ^ (z >> _27)) * _MIX_2
            factor = (z ^ (z >> _31)) | _ONE
        key = keys[0] if constant else keys[t]
        total += factor * table[block[t] & _SLOT] * (_FOUR * frames[t] + np.uint64(grants[t]) * key)
    return total


#: what :func:`sum_extents` says
SUMMED, UNEVEN, NO_PROT, TOO_MANY = 0, 1, 2, 3


@compiled
def sum_extents(
    iova: U64, last: U64, pa: U64, prot: U8, page: U64, table: U64, below: U64, salt: U64, most: int, out: U64
) -> int:
    """Add X, Y and the number of pages of extents to ``out``: see ``digest``, whose prefix sums are
    ``below``.

    :param page: uint64[2, 512]. :param table: uint64[2, 513]. :param below: uint64[4, 2, 513]: over pages,
        pages times their numbers, tables, tables times theirs. :param most: blocks that extents may be cut
        into.
    :return: SUMMED; UNEVEN = one is not a multiple of 4096 bytes, NO_PROT = it has none, TOO_MANY blocks:
        ``out`` then means nothing.
    """
    room = np.uint64(most)
    factors = np.zeros(2, np.uint64)
    prior = _ZERO
    for e in range(len(iova)):
        f, z, p = iova[e] >> _PAGE, last[e] >> _PAGE, np.uint64(prot[e])
        n = pa[e] >> _PAGE
        if (iova[e] | pa[e] | (last[e] + _ONE)) & _SMALL != _ZERO:
            return UNEVEN
        if p - _ONE >= _THREE:
            return NO_PROT
        if f >> _BLOCK != z >> _BLOCK:
            blocks = (z >> _BLOCK) - (f >> _BLOCK) + _ONE
            if blocks > room:
                return TOO_MANY
            room -= blocks
        while f <= z:
            g, q = f >> _BLOCK, f & _INNER
            if factors[0] == _ZERO or g != prior:
                prior = g
                for lane in range(2):
                    mixed = g ^ salt[lane]
                    mixed = (mixed ^ (mixed >> _30)) * _MIX_1
                    mixed = (mixed ^ (mixed >> _27)) * _MIX_2
                    factors[lane] = (mixed ^ (mixed >> _31)) | _ONE
            length = min(z - f + _ONE, _FRAMES - (n & _LOW), _INNER + _ONE - q)
            word, step = _FOUR * n + p, _FOUR
            j, i = q >> _NINE, q & _SLOT
            for lane in range(2):
                if length == _ONE:
                    total = word * page[lane, i] * table[lane, j]
                else:
                    end = q + length
                    k, m = end >> _NINE, end & _SLOT
                    whole, numbers = below[0, lane, _SLOT + _ONE], below[1, lane, _SLOT + _ONE]
                    plain = below[2, lane, k] * whole + table[lane, k] * below[0, lane, m]
                    plain -= below[2, lane, j] * whole + table[lane, j] * below[0, lane, i]
                    inner = (k << _NINE) * below[0, lane, m] + below[1, lane, m]
                    numbered = (below[3, lane, k] << _NINE) * whole + below[2, lane, k] * numbers
                    numbered += table[lane, k] * inner
                    inner = (j << _NINE) * below[0, lane, i] + below[1, lane, i]
                    numbered -= (below[3, lane, j] << _NINE) * whole + below[2, lane, j] * numbers
                    numbered -= table[lane, j] * inner
                    total = (word - step * q) * plain + step * numbered
                out[lane] += total * factors[lane]
                word = _FOUR * (((n & _LOW) << _FOLD) + (n >> _FOLD)) + p
                step = _FOUR << _FOLD
            out[2] += length
            f += length
            n += length
    return SUMMED
