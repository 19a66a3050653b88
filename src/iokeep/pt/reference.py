# SPDX-License-Identifier: Apache-2.0
"""The obvious implementation: plain Python, one item at a time. Property tests hold the engine equal to it.

It shares nothing with the engine but the format's geometry (levels, shifts, sizes of tables): not its masks,
not its array code.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from iokeep.errors import InputError, MemoryAbsent
from iokeep.mem.memory import Memory
from iokeep.pt.formats.base import Format
from iokeep.pt.formats.plain import DECODERS, Entry

#: (level, iova, pa, prot)
Leaf = tuple[int, int, int, int]


@dataclass(slots=True)
class Tree:
    """What a tree of tables says.

    ``leaves``: sound ones by IOVA; a contiguous entry whose items agree is one. ``lg2``: IOVA of a leaf ->
    log2 of its bytes. ``bad``: (iova, last, reason) of items with reserved bits or attributes, of contiguous
    entries that disagree, of loops and of absent tables. ``pages``: pas of the tables.
    """

    leaves: list[Leaf] = field(default_factory=list)
    lg2: dict[int, int] = field(default_factory=dict)
    bad: list[tuple[int, int, str]] = field(default_factory=list)
    pages: set[int] = field(default_factory=set)


def decode(fmt: Format, item: int, level: int) -> Entry | None:
    """One item, as it lies in memory, in plain words."""
    config = {key: int(value) for key, value in fmt.config.items()}
    return DECODERS[fmt.name](item, level, config)


def _extended(fmt: Format, raw: int) -> int:
    if fmt.sign_extend and raw >> (fmt.input_lg2 - 1):
        return raw + 2**64 - (1 << fmt.input_lg2)
    return raw + fmt.iova_base


def _table(fmt: Format, mem: Memory, pa: int, level: int) -> list[int]:
    raw, n = mem.read(pa, fmt.bytes_of(level)), fmt.item_bytes
    order = "little" if fmt.byte_order == "<" else "big"
    return [int.from_bytes(raw[i : i + n], order) for i in range(0, len(raw), n)]  # type: ignore[arg-type]


def _units(fmt: Format, pa: int, level: int) -> set[int]:
    """What memory a table covers, in units of the smallest table below the root."""
    unit = min(fmt.bytes_of(n) for n in range(max(fmt.top_level, 1)))
    return {at // unit for at in range(pa, pa + fmt.bytes_of(level), min(unit, fmt.bytes_of(level)))}


def tree(fmt: Format, mem: Memory, root_pa: int) -> Tree:
    """Everything under ``root_pa``, level by level. :raises MemoryAbsent: the root is absent."""
    out = Tree(pages={root_pa})
    mem.read(root_pa, fmt.root_bytes)
    # level -> pa, raw iova, what is granted, and the range that the table covers
    waiting: dict[int, list[tuple[int, int, int, tuple[int, int]]]] = {n: [] for n in range(len(fmt.levels))}
    waiting[fmt.top_level] = [(root_pa, 0, 3, (0, 0))]
    covered: set[int] = set()
    for level in range(fmt.top_level, -1, -1):
        size = fmt.levels[level].shift
        mine: set[int] = set()
        for pa, base, granted, (first, end) in waiting[level]:
            if _units(fmt, pa, level) & covered:
                out.bad.append((first, end, "loop"))
                continue
            try:
                items = _table(fmt, mem, pa, level)
            except MemoryAbsent:
                out.bad.append((first, end, "absent"))
                continue
            out.pages.add(pa)
            mine |= _units(fmt, pa, level)
            entries = [decode(fmt, item, level) for item in items]
            runs: set[int] = set()
            for index, entry in enumerate(entries):
                if entry is None:
                    continue
                raw = base + (index << size)
                iova, last = _extended(fmt, raw), _extended(fmt, raw + (1 << size) - 1)
                prot = granted & (int(entry.read) | int(entry.write) << 1)
                if entry.reserved:
                    out.bad.append((iova, last, "reserved"))
                    continue
                if entry.attrs:
                    out.bad.append((iova, last, "attrs"))
                if not entry.leaf:
                    below = level - 1 if entry.below is None else entry.below
                    # A table that skips levels covers less than the item that leads to it.
                    covers = min(1 << size, fmt.levels[below].items << fmt.levels[below].shift)
                    end_iova = _extended(fmt, raw + covers - 1)
                    waiting[below].append((entry.pa, raw, prot, (iova, end_iova)))
                    continue
                if entry.lg2 is None:
                    out.leaves.append((level, iova, entry.pa, prot))
                    out.lg2[iova] = size
                    continue
                count = 1 << (entry.lg2 - size)
                start = index - index % count
                if entries[start : start + count] == [entry] * count:
                    if index == start:
                        out.leaves.append((level, iova, entry.pa, prot))
                        out.lg2[iova] = entry.lg2
                    continue
                # Each item translates by itself; the entry as a whole is wrong.
                out.leaves.append((level, iova, entry.pa + ((index - start) << size), prot))
                out.lg2[iova] = size
                runs.add(start << 8 | entry.lg2)
            for run in sorted(runs):
                raw, lg2 = base + (run >> 8 << size), run & 255
                out.bad.append((_extended(fmt, raw), _extended(fmt, raw + (1 << lg2) - 1), "contig"))
        covered |= mine
    out.leaves.sort(key=lambda leaf: leaf[1])
    out.bad.sort()
    return out


def walk(fmt: Format, mem: Memory, root_pa: int, iova: int) -> tuple[int, int] | None:
    """(pa, prot) of one IOVA, None where nothing translates."""
    raw = iova & ((1 << fmt.input_lg2) - 1)
    if _extended(fmt, raw) != iova:
        return None
    pa, prot, level = root_pa, 3, fmt.top_level
    rest = raw
    while level >= 0:
        size, n = fmt.levels[level].shift, fmt.item_bytes
        index, rest = rest >> size, rest & ((1 << size) - 1)
        if index >= fmt.levels[level].items:
            return None  # bits of a level that was skipped
        order = "little" if fmt.byte_order == "<" else "big"
        item = int.from_bytes(mem.read(pa + index * n, n), order)  # type: ignore[arg-type]
        entry = decode(fmt, item, level)
        if entry is None or entry.reserved:
            return None
        prot &= int(entry.read) | int(entry.write) << 1
        if entry.leaf:
            inner = raw & ((1 << (entry.lg2 or size)) - 1)
            return (entry.pa | inner, prot) if prot else None
        pa, level = entry.pa, level - 1 if entry.below is None else entry.below
    raise InputError("level 0 has only leaves")


def pages(found: Tree) -> dict[int, tuple[int, int]]:
    """IOVA of each mapped 4096-byte page -> (pa, prot); prot 0 = present, but nothing may pass."""
    out = {}
    for _, iova, pa, prot in found.leaves:
        for offset in range(0, 1 << found.lg2[iova], 4096):
            out[iova + offset] = (pa + offset, prot)
    return out


def extents(found: Tree) -> list[tuple[int, int, int, int]]:
    """Maximal runs (iova, last, pa, prot) of what translates."""
    out: list[tuple[int, int, int, int]] = []
    for _, iova, pa, prot in found.leaves:
        last = iova + (1 << found.lg2[iova]) - 1
        if not prot:
            continue
        if out:
            a, z, p, q = out[-1]
            if z + 1 == iova and p + (iova - a) == pa and q == prot:
                out[-1] = (a, last, p, q)
                continue
        out.append((iova, last, pa, prot))
    return out


def verify(
    fmt: Format, mem: Memory, root_pa: int, expected: dict[int, tuple[int, int]]
) -> tuple[dict[int, str], set[tuple[int, int, str]]]:
    """Compare page by page.

    :param expected: IOVA of each page -> (pa, prot).
    :return: page -> reason of what differs there, and the bad ranges (reserved, loop, absent, attrs, contig).
    """
    found = tree(fmt, mem, root_pa)
    there = pages(found)
    opaque = [b for b in found.bad if b[2] not in ("attrs", "contig")]
    wrong: dict[int, str] = {}
    for iova in sorted(set(expected) | set(there)):
        if any(a <= iova <= z for a, z, _ in opaque):
            continue
        want, got = expected.get(iova), there.get(iova)
        if want is not None and not fmt.write_only and want[1] == 2:
            want = (want[0], 3)
        if want is None:
            wrong[iova] = "extra"
        elif got is None:
            wrong[iova] = "missing"
        elif want[0] != got[0]:
            wrong[iova] = "pa"
        elif want[1] != got[1]:
            wrong[iova] = "prot"
    return wrong, set(found.bad)
