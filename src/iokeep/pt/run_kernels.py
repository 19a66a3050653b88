# SPDX-License-Identifier: Apache-2.0
"""The loops of ``runs``, compiled; imported only for big tables.

Masks are arguments, so that one set of kernels serves every format with 64-bit little-endian items and the OA
in one piece. For the arithmetic see ``sweep``.
"""

from __future__ import annotations

import numpy as np

from iokeep.mem.memory import I64, U8, U64
from iokeep.pt.cache import ahead
from iokeep.pt.kernels import compiled
from iokeep.pt.states import EMPTY, OTHER, RUN

_ZERO = np.uint64(0)
_ONE = np.uint64(1)
_ALL = np.uint64(2**64 - 1)
#: a cache line of items: most tables that are no run show it there
_LINE = np.uint64(8)


@compiled
def read_runs(items: U64, row: I64, sized: U64, masks: U64, head: U64, state: U8) -> None:
    """``state[t]`` = RUN, EMPTY or OTHER; ``head`` the first item.

    :param sized: uint64[c, 3]: an item where (item & [0]) == [1] is one of [2] equal ones, given as a mask of
        the index. :param masks: step, bits that matter, valid.
    """
    step, full, valid = masks[0], masks[1], masks[2]
    size = np.uint64(items.shape[1])
    line = min(size, _LINE)
    for t in range(len(row)):
        table = items[row[t]]
        first = table[_ZERO]
        group = _ALL
        for c in range(len(sized)):
            if first & sized[c, 0] == sized[c, 1]:
                group = sized[c, 2]
                break
        wrong = _ZERO
        said = OTHER
        if first & valid == _ZERO:
            for i in range(line):
                wrong |= table[i] & valid
            if wrong == _ZERO:
                for i in range(size):
                    wrong |= table[i] & valid
                if wrong == _ZERO:
                    said = EMPTY
        else:
            for i in range(line):
                wrong |= table[i] ^ (first + (i & group) * step)
            if wrong & full == _ZERO:
                if group == _ALL:
                    for i in range(size):
                        wrong |= table[i] ^ (first + i * step)
                else:
                    for i in range(size):
                        wrong |= table[i] ^ (first + (i & group) * step)
                if wrong & full == _ZERO:
                    said = RUN
        head[t] = first
        state[t] = said


@compiled
def read_pages(
    items: U64, row: I64, masks: U64, place: I64, head: U64, tail: U64, slots: I64, pieces: I64, odd: U64
) -> None:
    """Tables that are no run: ``head`` and ``tail`` are the first and the last item that are there, ``slots``
    int64[n, 2] their numbers; ``pieces`` counts the runs, ``odd`` has the bits that matter, the OA's aside,
    in which any item that is there differs from ``head``.
    """
    step, same, valid, pa_mask = masks[0], masks[1], masks[2], masks[3]
    size = np.uint64(items.shape[1])
    for t in range(len(row)):
        table = items[row[t]]
        here = place[t]
        begin, end = _ZERO, size
        while begin < size and table[begin] & valid == _ZERO:
            begin += _ONE
        while end > begin and table[end - _ONE] & valid == _ZERO:
            end -= _ONE
        differ, number = _ZERO, _ZERO
        if begin < end:
            first = table[begin]
            number = _ONE
            for i in range(begin + _ONE, end):
                item = table[i]
                prior = table[i - _ONE]
                there = _ONE if item & valid != _ZERO else _ZERO
                follows = (_ONE if prior & valid != _ZERO else _ZERO) & (
                    _ONE if (prior & pa_mask) + step == item & pa_mask else _ZERO
                )
                differ |= (item ^ first) & (_ZERO - there)
                number += there & ~follows
            head[here] = first
            tail[here] = table[end - _ONE]
        slots[here, 0] = np.int64(begin)
        slots[here, 1] = np.int64(end) - 1
        pieces[here] = np.int64(number)
        odd[here] = differ & same


@compiled
def write_pages(
    items: U64, row: I64, base: U64, prot: U8, first: I64, pieces: I64, joins: U8, masks: U64,
    iova: U64, last: U64, pa: U64, grants: U8,
) -> None:  # fmt: skip
    """The extents of tables of pages, from ``first[t]`` on.

    :param joins: bit 0: the first one goes on from the table before, bit 1: the last one goes on in the next.
    """
    step, valid, pa_mask, shift, pa_shift = masks[0], masks[2], masks[3], masks[4], masks[5]
    size = np.uint64(items.shape[1])
    page = (_ONE << shift) - _ONE
    after = len(row) - 1
    for t in range(len(row)):
        table = items[row[t]]
        ahead(items[row[min(t + 1, after)]])
        start, grant, index = base[t], prot[t], first[t]
        if joins[t] == 0 and pieces[t] == items.shape[1]:
            # An extent an item: columns one after the other, without a branch.
            i_out, l_out = iova[index : index + pieces[t]], last[index : index + pieces[t]]
            p_out, g_out = pa[index : index + pieces[t]], grants[index : index + pieces[t]]
            for i in range(size):
                i_out[i] = start + (i << shift)
            for i in range(size):
                l_out[i] = start + (i << shift) + page
            for i in range(size):
                p_out[i] = (table[i] & pa_mask) << pa_shift
            for i in range(size):
                g_out[i] = grant
            continue
        index -= 1
        inside, expect, end = False, _ZERO, _ZERO
        fresh = joins[t] & 1
        begun = 0
        for i in range(size):
            item = table[i]
            if item & valid == _ZERO:
                inside = False
                continue
            word = item & pa_mask
            if not inside or word != expect:
                if begun > 0:
                    last[index] = end
                index += 1
                if begun > 0 or fresh == 0:
                    iova[index] = start + (i << shift)
                    pa[index] = word << pa_shift
                    grants[index] = grant
                begun += 1
            inside = True
            expect = word + step
            end = start + (i << shift) + page
        if begun > 0 and joins[t] & 2 == 0:
            last[index] = end


@compiled
def compare_pages(
    items: U64, row: I64, others: U64, other_row: I64, masks: U64, head: U64, odd: U64, pages: I64
) -> None:
    """Tables side by side: ``odd`` has the bits that matter in which they differ, and those, the OA's aside,
    in which an item that is there differs from ``head``, the first such; ``pages`` counts them.
    """
    same, valid, full = masks[1], masks[2], masks[6]
    size = np.uint64(items.shape[1])
    after = len(row) - 1
    for t in range(len(row)):
        table, other = items[row[t]], others[other_row[t]]
        ahead(items[row[min(t + 1, after)]])
        ahead(others[other_row[min(t + 1, after)]])
        first = table[_ZERO]
        differ, wrong, number = _ZERO, _ZERO, _ZERO
        for i in range(size):  # without a hole, most likely
            item = table[i]
            differ |= item ^ other[i]
            wrong |= item ^ first
            number += _ONE if item & valid != _ZERO else _ZERO
        wrong = (wrong & same) | (differ & full)
        if number != size:
            for i in range(size):
                if table[i] & valid != _ZERO:
                    first = table[i]
                    break
            wrong = _ZERO
            for i in range(size):
                item = table[i]
                there = _ONE if item & valid != _ZERO else _ZERO
                to = other[i]
                wrong |= ((item ^ to) & full | (item ^ first) & same) & (_ZERO - there)
                wrong |= to & valid & (there - _ONE)
        head[t] = first
        odd[t] = wrong
        pages[t] = np.int64(number)


@compiled
def all_in_line(place: I64, head: U64, state: U8, above: U8, full: np.uint64, rise: np.uint64) -> bool:
    """All tables are RUN and are granted the same, and of their first items each is larger by ``rise`` than
    that of the table before, in the bits ``full``.

    :param place: of each, among all of them. :param above: in any order.
    """
    first, grant = _ZERO, above[0]
    for k in range(len(place)):
        if place[k] == 0:
            first = head[k]
            break
    wrong, other = _ZERO, False
    for k in range(len(place)):
        wrong |= head[k] ^ (first + np.uint64(place[k]) * rise)
        other |= (state[k] != RUN) | (above[k] != grant)
    return wrong & full == _ZERO and not other


@compiled
def in_place(place: I64, head: U64, state: U8, all_heads: U64, all_states: U8) -> None:
    """What was read in the order of memory, put where it belongs. A loop that reads tables would do so
    slowly: they drive the columns out of the caches.
    """
    for t in range(len(place)):
        all_heads[place[t]] = head[t]
        all_states[place[t]] = state[t]


@compiled
def join_runs(
    base: U64, head: U64, above: U8, state: U8, grant: U8, masks: U64, iova: U64, last: U64, pa: U64
) -> int:
    """The ranges of neighbouring tables that are RUN and whose OAs follow each other.

    :param grant: uint8[1]: of all of them, ``above``.
    :param masks: bits that say of which sort a head is, and their value; bits of the OA, its shift, its bits
        that count; bytes of a table less 1; bits that are set in no pa.
    :return: how many, also where there is no room for them; -1 = they are of several sorts, or one is beyond
        what the format can say.
    """
    sort, want, pa_mask, pa_shift = masks[0], masks[1], masks[2], masks[3]
    whole, span, outside = masks[4], masks[5], masks[6]
    count = 0
    next_iova, next_pa = _ZERO, _ZERO
    for t in range(len(base)):
        if state[t] == RUN:
            word = head[t]
            to = ((word & pa_mask) << pa_shift) & whole
            top = to + span
            if (word ^ want) & sort != _ZERO or above[t] != grant[0] or top < to or top & outside != _ZERO:
                return -1
            start = base[t]
            if count == 0 or start != next_iova or to != next_pa:
                if count < len(iova):
                    iova[count] = start
                    pa[count] = to
                count += 1
            if count <= len(iova):
                last[count - 1] = start + span
            next_iova, next_pa = start + span + _ONE, top + _ONE
    return count
