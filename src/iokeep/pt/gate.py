# SPDX-License-Identifier: Apache-2.0
"""The format gate: exactly which configuration and features a table uses, and whether a kernel takes them.

The descriptor looks at every item of every table that is reached, not at leaves that were joined. A bit that
the format's file gives no name is unknown and named in hex; an item that is not present but not empty either
is counted by its bits. Nothing is ignored silently ("must be in the exact format and feature set that the new
side is tested for": Gunthorpe, 20241010153248.GH762027@ziepe.ca).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from iokeep.mem.arrays import unique
from iokeep.mem.memory import U64, Memory
from iokeep.pt.formats.base import Bits, Contig, Format, LevelSpec
from iokeep.pt.gate_profiles import PROFILES, Allowed
from iokeep.pt.tables import CHUNK, TableMemory, descend, raise_unreadable

_ALL = 2**64 - 1


@dataclass(slots=True)
class LevelBits:
    """Items of one level: how many, and the OR and AND of their bits (after ``invert``).

    ``absent_or``: of items that are not present.
    """

    level: int
    leaves: int = 0
    leaf_or: int = 0
    leaf_and: int = _ALL
    tables: int = 0
    table_or: int = 0
    table_and: int = _ALL
    absent_or: int = 0


@dataclass(slots=True)
class Descriptor:
    """What a table uses.

    ``sizes``: log2 of a leaf's bytes -> leaves; ``contiguous``: log2 of the items of an entry -> entries.
    ``leaf``, ``table``: named field -> values seen, sorted. ``unknown``: (level, "leaf" or "table", bits).
    ``stale``: bits of items that are not present, but that Linux would take for occupied.
    """

    name: str
    config: Mapping[str, int | str]
    levels: list[LevelBits]
    sizes: dict[int, int] = field(default_factory=dict)
    contiguous: dict[int, int] = field(default_factory=dict)
    leaf: dict[str, list[int]] = field(default_factory=dict)
    table: dict[str, list[int]] = field(default_factory=dict)
    unknown: list[tuple[int, str, int]] = field(default_factory=list)
    stale: list[tuple[int, int]] = field(default_factory=list)

    @property
    def features(self) -> tuple[str, ...]:
        """Named fields of leaves that are used, with their values where they have more than one bit."""
        return tuple(_said(name, values) for name, values in self.leaf.items() if values != [0])

    @property
    def table_features(self) -> tuple[str, ...]:
        """Likewise of table items."""
        return tuple(_said(name, values) for name, values in self.table.items() if values != [0])


def _said(name: str, values: list[int]) -> str:
    if values == [1]:
        return name
    if values == [0, 1]:
        return f"{name} (some)"
    return f"{name}=" + "|".join(f"{v:#x}" for v in values)


class _Seen:
    def __init__(self) -> None:
        self.values: dict[str, set[int]] = {}

    def add(self, items: U64, fields: Bits) -> None:
        for name, mask in fields:
            low = (mask & -mask).bit_length() - 1
            found = np.unique((items & np.uint64(mask)) >> np.uint64(low)).tolist()
            self.values.setdefault(name, set()).update(found)

    def sorted(self) -> dict[str, list[int]]:
        return {name: sorted(values) for name, values in self.values.items()}


def _masks(fields: Bits) -> int:
    out = 0
    for _, mask in fields:
        out |= mask
    return out


def _leaf_known(spec: LevelSpec, fields: Bits, run: Contig | None) -> int:
    known = spec.valid_mask | spec.leaf_mask | spec.leaf_pa_mask | spec.r_mask | spec.w_mask | _masks(fields)
    known |= _masks(tuple(("", m) for m, _ in (*spec.pa_pieces, *spec.valid_values, *spec.leaf_values)))
    # Bits that only say "this is a leaf" where there is nothing else (Arm's page, s390).
    known |= spec.leaf_base & ~(spec.leaf_ignored | spec.leaf_attrs | spec.leaf_reserved)
    return known | (run.mask if run is not None else 0)


def describe(fmt: Format, mem: Memory, root_pa: int) -> Descriptor:
    """The descriptor of a table. :raises MemoryAbsent, InputError: a table is absent or in a loop."""
    tm = TableMemory(fmt, mem)
    upper = descend(tm, root_pa)
    raise_unreadable(fmt, upper.problems)
    out = Descriptor(fmt.name, dict(fmt.config), [LevelBits(n) for n in range(len(fmt.levels))])
    leaf_seen, table_seen = _Seen(), _Seen()
    unknown: dict[tuple[int, str], int] = {}
    for depth, visited in enumerate(upper.pages):
        level = fmt.top_level - depth
        pas = unique(visited)
        for lo in range(0, len(pas), CHUNK):
            if depth == 0:
                flat = tm.root(root_pa).reshape(-1)
            else:
                flat = tm.items(tm.index(level, pas[lo : lo + CHUNK]), level).reshape(-1)
            _count(fmt, tm, level, flat, out, leaf_seen, table_seen, unknown)
    out.leaf, out.table = leaf_seen.sorted(), table_seen.sorted()
    out.unknown = [(level, kind, bits) for (level, kind), bits in sorted(unknown.items()) if bits]
    out.stale = [
        (b.level, b.absent_or & fmt.occupied(b.level))
        for b in out.levels
        if b.absent_or & fmt.occupied(b.level)
    ]
    out.sizes = dict(sorted(out.sizes.items()))
    return out


def _count(
    fmt: Format,
    tm: TableMemory,
    level: int,
    flat: U64,
    out: Descriptor,
    leaf_seen: _Seen,
    table_seen: _Seen,
    unknown: dict[tuple[int, str], int],
) -> None:
    spec, bits = fmt.levels[level], out.levels[level]
    here = tm.places(level, flat)
    absent = np.ones(len(flat), np.bool_)
    absent[here] = False
    bits.absent_or |= int(np.bitwise_or.reduce(flat[absent])) if absent.any() else 0
    items = flat[here]
    leaf = spec.are_leaves(items)
    leaves, tables = items[leaf], items[~leaf]
    if len(tables):
        bits.tables += len(tables)
        some = int(np.bitwise_or.reduce(tables))
        bits.table_or |= some
        bits.table_and &= int(np.bitwise_and.reduce(tables))
        table_seen.add(tables, spec.table_named)
        known = spec.valid_mask | spec.leaf_mask | spec.table_pa_mask | spec.tr_mask | spec.tw_mask
        known |= _masks(spec.table_named) | _masks(tuple(("", m) for m, _ in spec.pa_pieces))
        known |= _masks(tuple(("", m) for m, _ in spec.valid_values))
        known |= _masks(tuple(("", m) for m, _, _ in spec.next_levels))
        known |= spec.table_base & ~(spec.table_ignored | spec.table_attrs | spec.table_reserved)
        unknown[level, "table"] = unknown.get((level, "table"), 0) | (some & ~known)
    if not len(leaves):
        return
    bits.leaves += len(leaves)
    bits.leaf_or |= int(np.bitwise_or.reduce(leaves))
    bits.leaf_and &= int(np.bitwise_and.reduce(leaves))
    rest = np.ones(len(leaves), np.bool_)
    kinds: list[tuple[Contig | None, U64]] = []
    for run in spec.contig:
        mine = rest & ((leaves & np.uint64(run.mask)) == np.uint64(run.value))
        rest &= ~mine
        kinds.append((run, leaves[mine]))
    kinds.append((None, leaves[rest]))
    for kind, part in kinds:
        if not len(part):
            continue
        memory, named = spec.memory, spec.named
        lg2 = 0
        if kind is not None:
            lg2 = kind.lg2
            memory = memory if kind.memory is None else kind.memory
            named = named if kind.named is None else kind.named
            out.contiguous[lg2] = out.contiguous.get(lg2, 0) + (len(part) >> lg2)
        out.sizes[spec.shift + lg2] = out.sizes.get(spec.shift + lg2, 0) + max(len(part) >> lg2, 1)
        leaf_seen.add(part, memory + named)
        extra = int(np.bitwise_or.reduce(part)) & ~_leaf_known(spec, memory + named, kind)
        unknown[level, "leaf"] = unknown.get((level, "leaf"), 0) | extra


@dataclass(frozen=True, slots=True)
class Gate:
    """What one kernel takes, by format; from ``gate_profiles``, or from a file (``gate_file``)."""

    name: str
    formats: Mapping[str, Allowed]


def check(fmt: Format, found: Descriptor, gate: str | Gate) -> list[str]:
    """Every way in which a table is not what the kernel of a profile is known to make; [] = it passes.

    :param gate: a gate, or a name of ``gate_profiles.PROFILES``. :raises KeyError: there is none.
    """
    if isinstance(gate, str):
        gate = Gate(gate, PROFILES[gate])
    allowed, profile = gate.formats.get(found.name), gate.name
    if allowed is None:
        return [f"format {found.name}: {profile} does not make it"]
    out = []
    for key, values in allowed.config.items():
        if key in found.config and found.config[key] not in values:
            out.append(
                f"configuration {key} = {found.config[key]}: {profile} has {', '.join(map(str, values))}"
            )
    sizes = fmt.leaf_lg2s if allowed.sizes is None else allowed.sizes
    out += [f"leaves of 2**{lg2} bytes: {profile} makes none" for lg2 in found.sizes if lg2 not in sizes]
    for what, seen, named in (("leaf", found.leaf, allowed.leaf), ("table item", found.table, allowed.table)):
        for name, present in seen.items():
            wrong = [v for v in present if v not in named.get(name, (0,))]
            if wrong:
                out.append(f"{what} field {name}: {profile} never writes {', '.join(map(hex, wrong))}")
    out += [f"unknown bits {bits:#x} in a {kind} of level {level}" for level, kind, bits in found.unknown]
    out += [f"bits {bits:#x} in items of level {level} that are not present" for level, bits in found.stale]
    return out
