# SPDX-License-Identifier: Apache-2.0
"""The obvious implementation: plain Python, one item at a time. Property tests hold the engine equal to it.

It shares nothing with the engine but the format's geometry (levels, shifts): not its masks, not its array
code.
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

    ``leaves``: sound ones by IOVA. ``bad``: (iova, last, reason) of items with reserved bits or attributes,
    of loops and of absent tables. ``pages``: pas of the tables.
    """

    leaves: list[Leaf] = field(default_factory=list)
    bad: list[tuple[int, int, str]] = field(default_factory=list)
    pages: set[int] = field(default_factory=set)


def decode(fmt: Format, item: int, level: int) -> Entry | None:
    """One item in plain words."""
    config = {key: int(value) for key, value in fmt.config.items()}
    return DECODERS[fmt.name](item, level, config)


def _extended(fmt: Format, raw: int) -> int:
    if fmt.sign_extend and raw >> (fmt.input_lg2 - 1):
        return raw + 2**64 - (1 << fmt.input_lg2)
    return raw


def _table(mem: Memory, pa: int) -> list[int]:
    raw = mem.read(pa, 4096)
    return [int.from_bytes(raw[n : n + 8], "little") for n in range(0, 4096, 8)]


def tree(fmt: Format, mem: Memory, root_pa: int) -> Tree:
    """Everything under ``root_pa``, level by level. :raises MemoryAbsent: the root is absent."""
    out = Tree(pages={root_pa})
    visits = [(root_pa, 0, 3)]
    for level in range(fmt.top_level, -1, -1):
        size = 12 + 9 * level
        below: list[tuple[int, int, int]] = []
        higher = set(out.pages)
        for pa, base, granted in visits:
            for index, item in enumerate(_table(mem, pa)):
                entry = decode(fmt, item, level)
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
                if entry.leaf:
                    out.leaves.append((level, iova, entry.pa, prot))
                elif entry.pa in higher:
                    out.bad.append((iova, last, "loop"))
                else:
                    try:
                        mem.read(entry.pa, 4096)
                    except MemoryAbsent:
                        out.bad.append((iova, last, "absent"))
                        continue
                    out.pages.add(entry.pa)
                    below.append((entry.pa, raw, prot))
        visits = below
    out.leaves.sort(key=lambda leaf: leaf[1])
    out.bad.sort()
    return out


def walk(fmt: Format, mem: Memory, root_pa: int, iova: int) -> tuple[int, int] | None:
    """(pa, prot) of one IOVA, None where nothing translates."""
    raw = iova & ((1 << fmt.input_lg2) - 1)
    if _extended(fmt, raw) != iova:
        return None
    pa, prot = root_pa, 3
    for level in range(fmt.top_level, -1, -1):
        size = 12 + 9 * level
        item = int.from_bytes(mem.read(pa + (raw >> size & 511) * 8, 8), "little")
        entry = decode(fmt, item, level)
        if entry is None or entry.reserved:
            return None
        prot &= int(entry.read) | int(entry.write) << 1
        if entry.leaf:
            return (entry.pa | raw & ((1 << size) - 1), prot) if prot else None
        pa = entry.pa
    raise InputError("level 0 has only leaves")


def pages(fmt: Format, found: Tree) -> dict[int, tuple[int, int]]:
    """IOVA of each mapped 4096-byte page -> (pa, prot); prot 0 = present, but nothing may pass."""
    out = {}
    for level, iova, pa, prot in found.leaves:
        for offset in range(0, 1 << (12 + 9 * level), 4096):
            out[iova + offset] = (pa + offset, prot)
    return out


def extents(found: Tree) -> list[tuple[int, int, int, int]]:
    """Maximal runs (iova, last, pa, prot) of what translates."""
    out: list[tuple[int, int, int, int]] = []
    for level, iova, pa, prot in found.leaves:
        last = iova + (1 << (12 + 9 * level)) - 1
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
    :return: page -> reason of what differs there, and the bad ranges (reserved, loop, absent, attrs).
    """
    found = tree(fmt, mem, root_pa)
    there = pages(fmt, found)
    opaque = [b for b in found.bad if b[2] != "attrs"]
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
