# SPDX-License-Identifier: Apache-2.0
"""The loops of ``sums``, compiled; imported only for big tables. For the arithmetic see ``sweep``."""

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
