# SPDX-License-Identifier: Apache-2.0
"""The way down where nothing is out of the ordinary, compiled; imported only where Numba is.

:func:`straight` goes down from the root as long as all items of a level are zero or as Linux writes those
that point to a table one level below: mostly to level 0. ``tables.descend`` goes on from there.
"""

from __future__ import annotations

import numpy as np

from iokeep.mem.memory import I64, U64
from iokeep.pt.formats.base import Format
from iokeep.pt.kernels import compiled
from iokeep.pt.memo import Memo
from iokeep.pt.tables import SHARED_LIMIT, Down, TableMemory, distinct

_ZERO = np.uint64(0)
_ONE = np.uint64(1)
#: multiplier of hashes: 2**64 / golden ratio, odd
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_32 = np.uint64(32)
#: an empty place
_NONE = np.uint64(2**64 - 1)
_MAX = 2**64 - 1


@compiled
def _below(
    data: U64, row: I64, base: U64, masks: U64, seen: U64, most: int, rows: int
) -> tuple[int, U64, U64, I64]:
    """IOVAs, pas and rows of the tables to which the items of some tables point, in order.

    :param row: :param base: of these tables. :param masks: bits of an item that are as in any, their value;
        bits of the pa, its shift; log2 of what an item maps, and of the bytes of a table.
    :param seen: numbers of the tables that serve above, as :func:`_note` puts them.
    :param most: so many at most. :param rows: row n holds the table at n times its size, for so many rows;
        0 = it does not, and no row is said.
    :return: their number and these; -1 = an item is another, or a table is absent, or serves above.
    """
    same, want, pa_mask, pa_shift, shift, lg2 = masks[0], masks[1], masks[2], masks[3], masks[4], masks[5]
    size = np.uint64(data.shape[1])
    odd, total = _ZERO, _ZERO
    for t in range(len(row)):
        table = data[row[t]]
        count = _ZERO
        for i in range(size):
            item = table[i]
            there = _ONE if item != _ZERO else _ZERO
            count += there
            odd |= (item ^ want) & (_ZERO - there)
        total += count
        if odd & same != _ZERO:
            break
    n = int(np.int64(total))
    if odd & same != _ZERO or n > most:
        return -1, np.empty(0, np.uint64), np.empty(0, np.uint64), np.empty(0, np.int64)
    iovas, pas, found = np.empty(n, np.uint64), np.empty(n, np.uint64), np.empty(n if rows else 0, np.int64)
    filled = 0
    for t in range(len(row)):
        table, start = data[row[t]], base[t]
        holes = _ZERO
        if filled + len(table) <= n:  # no hole, most likely: without a branch
            i_out, p_out = iovas[filled : filled + len(table)], pas[filled : filled + len(table)]
            for i in range(size):
                item = table[i]
                holes |= _ONE if item == _ZERO else _ZERO
                i_out[i] = start + (i << shift)
                p_out[i] = (item & pa_mask) << pa_shift
            if holes == _ZERO:
                filled += len(table)
                continue
        for i in range(size):
            item = table[i]
            if item != _ZERO and filled < n:  # more than were counted: somebody writes
                iovas[filled] = start + (i << shift)
                pas[filled] = (item & pa_mask) << pa_shift
                filled += 1
    unsound = filled != n
    spread = np.uint64(len(seen) - 1)
    for k in range(n):
        number = pas[k] >> lg2
        place = ((number * _SPREAD) >> _32) & spread
        while seen[place] != _NONE:
            unsound |= seen[place] == number
            place = (place + _ONE) & spread
    if rows:
        for k in range(n):
            number = pas[k] >> lg2
            unsound |= number >= np.uint64(rows)
            found[k] = np.int64(number)
    return (-1 if unsound else n), iovas, pas, found


@compiled
def _note(numbers: U64, seen: U64) -> None:
    """Put numbers of tables where :func:`_below` looks for them."""
    spread = np.uint64(len(seen) - 1)
    for number in numbers:
        place = ((number * _SPREAD) >> _32) & spread
        while seen[place] != _NONE:
            place = (place + _ONE) & spread
        seen[place] = number


def _levels(fmt: Format) -> list[U64] | None:
    """``masks`` of :func:`_below` for each level, that of level 0 left empty; None = not such a format."""
    size = fmt.table_bytes
    if fmt.top_level == 0 or any(fmt.bytes_of(level) != size for level in range(fmt.top_level)):
        return None
    out = [np.zeros(0, np.uint64)]
    for level, spec in enumerate(fmt.levels[1:], 1):
        if spec.pa_pieces or spec.invert:
            return None
        same = ~(spec.table_pa_mask | spec.table_ignored) & _MAX
        want = int(fmt.table_items(level, np.zeros(1, np.uint64))[0])
        sound = spec.bad_table(want) is None and spec.next_level(want, level) == level - 1
        grants = want & spec.tr_mask == spec.tr_value and want & spec.tw_mask == spec.tw_value
        if not sound or not grants or spec.is_leaf(want) or not spec.is_present(want):
            return None
        row = (same, want & same, spec.table_pa_mask, spec.pa_shift, spec.shift, size.bit_length() - 1)
        out.append(np.array(row, np.uint64))
    return out


_LEVELS: Memo[list[U64] | None] = Memo(64)


def straight(tm: TableMemory, root_pa: int) -> Down | None:
    """As far down as the tree is so; None = its format is none for this.

    :raises MemoryAbsent, InputError: the root is absent, or not aligned.
    """
    fmt = tm.fmt
    levels = _LEVELS.get(fmt, "levels", lambda: _levels(fmt))
    if levels is None or not all(tm.plains) or any(parts > 1 for parts in tm.parts[:-1]):
        return None
    top, size = fmt.top_level, fmt.table_bytes
    tm.root(root_pa)
    root = tm.view(top)
    data = root.data.view(np.uint64)
    parts = tm.parts[top]
    first = root_pa // root.data.shape[1]
    if not root.linear:
        first = int(tm.index(top, np.array([root_pa], np.uint64))[0])
    row = np.arange(first, first + parts)
    base = np.zeros(1, np.uint64)
    if parts > 1:
        base = np.arange(parts, dtype=np.uint64) * np.uint64(data.shape[1] << fmt.levels[top].shift)
    number = root_pa // size
    numbers = [np.arange(number, number + max(fmt.root_bytes // size, 1), dtype=np.uint64)]
    down = Down(top, row[:1], [np.array([root_pa], np.uint64)], [base[:1]], [np.full(1, 3, np.uint8)])
    most = tm.capacity + SHARED_LIMIT
    for level in range(top, 0, -1):
        served = sum(len(some) for some in numbers)
        seen = np.full(1 << (4 * served).bit_length(), _NONE)
        for some in numbers:
            _note(some, seen)
        rows = len(tm.rows.data) if tm.rows.linear else 0
        n, base, pa, row = _below(data, row, base, levels[level], seen, most, rows)
        if n < 0:
            break
        if not rows:
            row = tm.index(level - 1, pa)
            if bool((row < 0).any()):
                break
        if n > SHARED_LIMIT and n - distinct(row) > SHARED_LIMIT:
            break
        data = tm.rows.data.view(np.uint64)
        if level > 1:
            numbers.append(pa >> levels[level][5])
        down.level, down.row = level - 1, row
        down.pages.append(pa)
        down.bases.append(base)
        down.prots.append(np.full(n, 3, np.uint8))
    return down
