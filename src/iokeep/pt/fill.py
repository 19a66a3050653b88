# SPDX-License-Identifier: Apache-2.0
"""Tables of level 0 written by compiled code; imported only for big maps. The arithmetic is that of
``sweep``.
"""

from __future__ import annotations

import numpy as np

from iokeep.mem.memory import I64, U64
from iokeep.pt.cache import done, stream
from iokeep.pt.extents import Extents
from iokeep.pt.formats.base import Contig, Format
from iokeep.pt.kernels import compiled, in_memory_order, over_threads

_ZERO = np.uint64(0)
_ONE = np.uint64(1)
_THREE = np.uint64(3)
_MAX = 2**64 - 1


@compiled
def _ramps(words: U64, row: I64, first: U64, ramp: U64) -> None:
    """Whole tables: item i is first[t] + ramp[i]."""
    size = np.uint64(words.shape[1])
    room = np.empty(words.shape[1], np.uint64)
    for t in range(len(row)):
        word = first[t]
        for i in range(size):
            room[i] = word + ramp[i]
        stream(words[row[t]], room)
    done()


@compiled
def link(words: U64, row: I64, key: U64, low: np.uint64, bits: np.uint64, items: U64) -> None:
    """Each table's item in the table above becomes items[k].

    :param words: uint64[rows, items]. :param row: of the tables above, whose keys are in a line from ``low``
        on. :param key: of each table; the last ``bits`` of it are the item's number.
    """
    for k in range(len(items)):
        up = key[k] >> bits
        words[row[up - low]][key[k] - (up << bits)] = items[k]


@compiled
def _run(words: U64, row: I64, place: I64, head: np.uint64, ramp: U64, ends: I64) -> None:
    """Tables of one run: item i of the table at ``place[k]`` of them is ``head`` + what the tables before it
    rise + ramp[i].

    :param ends: number of the last table; first item in the first; the one after the last, in the last.
    """
    final, opens, closes = ends[0], ends[1], ends[2]
    size = np.uint64(words.shape[1])
    rise = ramp[_ONE] * size
    room = np.empty(words.shape[1], np.uint64)
    for k in range(len(row)):
        word = head + np.uint64(place[k]) * rise
        for i in range(size):
            room[i] = word + ramp[i]
        low = opens if place[k] == 0 else 0
        high = closes if place[k] == final else len(room)
        stream(words[row[k]][low:high], room[low:high])
    done()


@compiled
def _pages(
    words: U64, row: I64, opens: I64, closes: I64, extent: I64, start: U64, e: tuple[U64, ...], masks: U64
) -> bool:
    """Tables of single pages that follow each other in IOVA: items opens[t] ... closes[t] - 1 are the extents
    from ``extent[t]`` on, the first of them at ``start[t]``. :return: all extents are such pages.

    :param e: columns iova, last, pa, prot. :param masks: log2 of a page, its bytes less 1, pa bits that
        cannot be said, shift of the pa; c, x, y: permission bits are c ^ (x where it reads) ^ (y where it
        writes).
    """
    shift, small, outside, pa_shift = masks[0], masks[1], masks[2], masks[3]
    always, reads, writes = masks[4], masks[5], masks[6]
    odd = _ZERO
    for t in range(len(row)):
        table = words[row[t]][opens[t] : closes[t]]
        n = closes[t] - opens[t]
        iova, last = e[0][extent[t] : extent[t] + n], e[1][extent[t] : extent[t] + n]
        pa, prot = e[2][extent[t] : extent[t] + n], e[3][extent[t] : extent[t] + n]
        at = start[t]
        for i in range(np.uint64(n)):
            p = np.uint64(prot[i])
            to = pa[i]
            want = at + (i << shift)
            odd |= (iova[i] ^ want) | (last[i] ^ (want + small)) | (to & (small | outside))
            odd |= (p & ~_THREE) | ((p - _ONE) >> shift)
            table[i] = (
                (to >> pa_shift) ^ always ^ (reads & (_ZERO - (p & _ONE))) ^ (writes & (_ZERO - (p >> _ONE)))
            )
        if odd != _ZERO:
            return False
    return True


@compiled
def _frames(words: U64, row: I64, opens: I64, closes: I64, frame: I64, pas: U64, masks: U64) -> bool:
    """Items opens[t] ... closes[t] - 1 of tables are the pages ``pas`` from ``frame[t]`` on. :return: all can
    be.

    :param masks: pa bits that cannot be said, shift of the pa, all other bits of an item.
    """
    outside, pa_shift, always = masks[0], masks[1], masks[2]
    odd = _ZERO
    room = np.empty(words.shape[1], np.uint64)
    for t in range(len(row)):
        n = closes[t] - opens[t]
        pa = pas[frame[t] : frame[t] + n]
        for i in range(np.uint64(n)):
            odd |= pa[i]
            room[i] = (pa[i] >> pa_shift) ^ always
        stream(words[row[t]][opens[t] : closes[t]], room)
        if odd & outside != _ZERO:
            return False
    done()
    return True


def ramps(
    fmt: Format, words: U64, row: I64, first: U64, contig: Contig | None, threads: int | None = None
) -> None:
    """Write whole tables of level 0 that begin with ``first``, of single items or of contiguous entries.

    :param words: all memory, uint64[rows, items].
    """
    spec = fmt.levels[0]
    same = 1 if contig is None or not contig.replicated else 1 << contig.lg2
    place, rows = in_memory_order(row)
    heads = first[place]
    step, group = np.uint64((1 << spec.shift) >> spec.pa_shift), np.uint64(-same & _MAX)
    ramp = (np.arange(spec.items, dtype=np.uint64) & group) * step

    def work(a: int, b: int) -> None:
        _ramps(words, rows[a:b], heads[a:b], ramp)

    over_threads(work, len(rows), fmt.table_bytes, threads)


def run(
    fmt: Format, words: U64, row: I64, iova: int, pa: int, n: int, prot: int, threads: int | None = None
) -> None:
    """Write ``n`` single pages that follow each other, in IOVA and in pa, into fresh tables of level 0.

    :param row: of the tables, in order of IOVA.
    """
    spec = fmt.levels[0]
    step = (1 << spec.shift) >> spec.pa_shift
    begin = (iova >> spec.shift) & (spec.items - 1)
    ends = np.array([len(row) - 1, begin, begin + n - (len(row) - 1) * spec.items])
    first = int(fmt.leaf_items(0, np.array([pa], np.uint64), np.array([prot], np.uint8))[0])
    head = np.uint64((first - begin * step) & _MAX)
    place, rows = in_memory_order(row)
    ramp = np.arange(spec.items, dtype=np.uint64) * np.uint64(step)

    def work(a: int, b: int) -> None:
        _run(words, rows[a:b], place[a:b], head, ramp, ends)

    over_threads(work, len(rows), fmt.table_bytes, threads)


def in_line(fmt: Format, first: int, last: int, n: int) -> bool:
    """Whether ``n`` extents of the IOVAs [first, last] may be single pages in a row: see :func:`pages`."""
    shift = fmt.levels[0].shift
    covered = fmt.covers(first) and fmt.covers(last) and (first ^ last) >> 63 == 0
    return covered and first & ((1 << shift) - 1) == 0 and last - first == (n << shift) - 1


def pages(fmt: Format, words: U64, row: I64, e: Extents, threads: int | None = None) -> bool:
    """Write the items of extents for which :func:`in_line` holds into fresh tables of level 0.

    :param row: of the tables, in order of IOVA. :return: False = they are no such pages; the tables then
        hold anything.
    """
    spec = fmt.levels[0]
    small = (1 << spec.shift) - 1
    outside = ~spec.leaf_pa(_MAX) & _MAX & ~small
    bits = [value | spec.leaf_base for value in spec.prot_bits]
    perms = [bits[1] ^ bits[2] ^ bits[3], bits[3] ^ bits[2], bits[3] ^ bits[1]]
    masks = np.array([spec.shift, small, outside, spec.pa_shift, *perms], np.uint64)
    begin, stop, extent = _places(fmt, len(row), int(e.iova[0]), len(e))
    start = e.iova[0] + (extent.view(np.uint64) << np.uint64(spec.shift))
    columns = (e.iova, e.last, e.pa, e.prot)
    sound: list[bool] = []

    def work(a: int, b: int) -> None:
        part = (begin[a:b], stop[a:b], extent[a:b], start[a:b])
        sound.append(_pages(words, row[a:b], *part, columns, masks))

    over_threads(work, len(row), 4 * fmt.table_bytes, threads)
    return all(sound)


def frames(
    fmt: Format, words: U64, row: I64, iova: int, pas: U64, prot: int, threads: int | None = None
) -> bool:
    """As :func:`pages`, of pages from ``iova`` on that have one prot. :param pas: of each."""
    spec = fmt.levels[0]
    outside = ~spec.leaf_pa(_MAX) & _MAX | ((1 << spec.shift) - 1)
    masks = np.array([outside, spec.pa_shift, fmt.leaf_bits(0, prot)], np.uint64)
    begin, stop, frame = _places(fmt, len(row), iova, len(pas))
    sound: list[bool] = []

    def work(a: int, b: int) -> None:
        sound.append(_frames(words, row[a:b], begin[a:b], stop[a:b], frame[a:b], pas, masks))

    over_threads(work, len(row), 2 * fmt.table_bytes, threads)
    return all(sound)


def _places(fmt: Format, tables: int, iova: int, n: int) -> tuple[I64, I64, I64]:
    """Of pages in a row from ``iova`` on: the first item in each table, the one after the last, and the
    number of the first page.
    """
    spec = fmt.levels[0]
    offset = (iova >> spec.shift) & (spec.items - 1)
    page = np.maximum(np.arange(tables, dtype=np.int64) * spec.items - offset, 0)
    begin = np.zeros(tables, np.int64)
    begin[0] = offset
    return begin, begin + (np.append(page[1:], n) - page), page
