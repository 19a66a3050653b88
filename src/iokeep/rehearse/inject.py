# SPDX-License-Identifier: Apache-2.0
"""Faults: which there are, and how each is put in its place.

* *table* faults change the prior tables in physical memory between the kernels; the measuring host does it.
* *replay* faults make the VMM of the second kernel set up something else than it had before.
* *record* faults make the first kernel write records that the second must not believe.
* ``kill-at=STEP`` kills the VMM in that step; it is started again and carries on.

Table faults sit in quiet ranges, where no device works until the restore has decided. Which bits they
change comes from the format (:mod:`iokeep.pt.formats`); nothing here knows a bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from iokeep.errors import UsageError
from iokeep.mem.memory import WritableMemory
from iokeep.mem.ranges import Range
from iokeep.pt.formats.base import Format
from iokeep.pt.leaves import leaf_items
from iokeep.pt.tables import Items, TableMemory
from iokeep.pt.walk import walk
from iokeep.restore.manifest import Area, FileEntry

__all__ = [
    "KILL_STEPS",
    "NAMES",
    "RECORD_FAULTS",
    "REPLAY_FAULTS",
    "STEPS",
    "TABLE_FAULTS",
    "Fault",
    "Injected",
    "change_replay",
    "change_tables",
    "parse_fault",
]

U64 = NDArray[np.uint64]
FRAME = 0x1000

#: the steps of a rehearsal, in order; devices count per step by this number
STEPS = (
    "setup",
    "preserve",
    "freeze",
    "kexec",
    "boot",
    "retrieve",
    "replay",
    "validate",
    "adopt",
    "finish",
    "after",
    "teardown",
)
TABLE_FAULTS = ("pte-bit", "pte-swap", "leaf-size", "unknown-bit")
REPLAY_FAULTS = ("drop-area", "extra-area", "wrong-prot", "wrong-file", "wrong-offset")
RECORD_FAULTS = ("stale-root", "truncate-records", "version-skew")
NAMES = (*TABLE_FAULTS, *REPLAY_FAULTS, *RECORD_FAULTS, "kill-at=STEP")
#: steps in which a VMM lives or is started, and can be killed ("switch" is what rebuild does instead of
#: "adopt")
KILL_STEPS = (*STEPS, "switch")


@dataclass(frozen=True, slots=True)
class Fault:
    """One ``--inject``: its name, and the step of ``kill-at``."""

    name: str
    step: str = ""

    @property
    def text(self) -> str:
        """As on the command line."""
        return f"{self.name}={self.step}" if self.step else self.name


@dataclass(frozen=True, slots=True)
class Injected:
    """What was really changed, for the report."""

    fault: str
    what: str
    iova: int | None = None


def parse_fault(text: str) -> Fault:
    """:raises UsageError: no such fault; the message lists all."""
    name, sep, step = text.partition("=")
    if name == "kill-at":
        if step not in KILL_STEPS:
            raise UsageError(
                f"--inject {text}: no step {step!r}", f"kill-at=STEP with one of: {', '.join(KILL_STEPS)}"
            )
        return Fault(name, step)
    if sep or name not in (*TABLE_FAULTS, *REPLAY_FAULTS, *RECORD_FAULTS):
        raise UsageError(f"--inject {text}: no such fault", f"choose from: {', '.join(NAMES)}")
    return Fault(name)


# ---- replay faults


def _place(areas: Sequence[Area], quiet: Sequence[Range], lengths: int = FRAME) -> tuple[int, Range]:
    """An area with a quiet range, and that range: where a replay fault goes. The last such one."""
    for r in reversed(quiet):
        for i, a in enumerate(areas):
            if a.iova <= r.start and r.last <= a.last and r.size >= lengths:
                return i, r
    raise UsageError("this guest has no quiet range to put a replay fault in", "use a bigger --memory")


def _cut(area: Area, r: Range) -> tuple[list[Area], Area]:
    """``area`` without [r.start, r.last] (0 ... 2 areas), and the piece in that range."""
    rest = []
    if area.iova < r.start:
        rest.append(replace(area, last=r.start - 1))
    if r.last < area.last:
        rest.append(replace(area, iova=r.last + 1, offset=area.offset + r.last + 1 - area.iova))
    return rest, replace(area, iova=r.start, last=r.last, offset=area.offset + r.start - area.iova)


def change_replay(
    name: str,
    areas: Sequence[Area],
    files: Sequence[FileEntry],
    quiet: Sequence[Range],
    limits: Sequence[Range],
) -> tuple[list[Area], Injected]:
    """The areas that a mistaken VMM replays instead of ``areas``.

    The mistake is in the last quiet range: that piece of its area is dropped, shown by another file, and so
    on.

    :param quiet: ranges where no device works yet. :param limits: IOVAs that the IOAS allows.
    :raises UsageError: this guest has no place for the fault.
    """
    out = sorted(areas, key=lambda a: a.iova)
    if name == "extra-area":
        source = next((a for a in out if a.prot == 3), out[0])
        length = min(source.length, 0x1_0000)
        top = max(a.last for a in out if a.last < min(1 << 46, limits[-1].last)) + 1
        iova = -(-top // 0x20_0000) * 0x20_0000 + 0x4000_0000
        if not any(r.start <= iova and iova + length - 1 <= r.last for r in limits):
            iova = _hole(out, length, limits)
        extra = Area(iova, iova + length - 1, source.file, source.offset, source.prot, source.ioas)
        out.append(extra)
        return sorted(out), Injected(name, f"an area that was not there: {_text(extra)}", iova)
    index, r = _place(out, quiet)
    area = out.pop(index)
    rest, piece = _cut(area, r)
    out += rest
    if name == "drop-area":
        what = f"left out: {_text(piece)}"
    elif name == "wrong-prot":
        new = replace(piece, prot=1 if piece.prot != 1 else 3)
        out.append(new)
        what = f"{_text(piece)} replayed as prot {new.prot}"
    elif name == "wrong-offset":
        size = next(f.size for f in files if f.token == piece.file)
        moved = piece.offset + FRAME if piece.offset + piece.length + FRAME <= size else piece.offset - FRAME
        if moved < 0:
            raise UsageError(f"file token {piece.file:#x} is too small for a wrong offset")
        new = replace(piece, offset=moved)
        out.append(new)
        what = f"{_text(piece)} replayed from offset {new.offset:#x}"
    elif name == "wrong-file":
        others = [f for f in files if f.token != piece.file and f.size >= FRAME]
        if not others:
            raise UsageError("this guest has one file only: there is no wrong one", "choose wrong-offset")
        other = max(others, key=lambda f: f.size)
        length = min(piece.length, other.size // FRAME * FRAME)
        head, tail = _cut(piece, Range(piece.iova, piece.iova + length - 1))
        out += head
        new = replace(tail, file=other.token, offset=0)
        out.append(new)
        what = f"{_text(tail)} replayed from file token {other.token:#x} ({other.name})"
    else:
        raise ValueError(name)
    return sorted(out), Injected(name, what, piece.iova)


def _hole(areas: Sequence[Area], length: int, limits: Sequence[Range]) -> int:
    """An IOVA with ``length`` free bytes, the highest below 2**46."""
    taken = sorted((a.iova, a.last) for a in areas)
    for limit in reversed(limits):
        end = min(limit.last, (1 << 46) - 1)
        for iova, last in reversed(taken):
            if last < end and end - last >= length + FRAME and last + 1 >= limit.start:
                return -(-(last + 1) // FRAME) * FRAME
            if iova <= end:
                end = iova - 1
        if end - limit.start + 1 >= length:
            return limit.start
    raise UsageError("no IOVA is free for an extra area")


def _text(a: Area) -> str:
    return f"iova {a.iova:#x}-{a.last:#x} file {a.file:#x} offset {a.offset:#x} prot {a.prot}"


# ---- table faults


def _quiet_leaves(fmt: Format, mem: WritableMemory, root_pa: int, quiet: Sequence[Range]) -> Items:
    """Leaves that are wholly in the quiet ranges; a contiguous entry is one of them."""
    parts: list[Items] = []
    for r in quiet:
        items, _ = leaf_items(TableMemory(fmt, mem), root_pa, r.start, r.last)
        # Not a leaf that only reaches into the range: devices may be at work in its other part.
        sizes = (np.uint64(1) << items.lg2.astype(np.uint64)) - np.uint64(1)
        parts.append(
            items.take((items.iova >= np.uint64(r.start)) & (items.iova + sizes <= np.uint64(r.last)))
        )
    if not parts:
        raise UsageError("this guest has no quiet range to put a table fault in")
    return Items.join(parts)


def _store(fmt: Format, mem: WritableMemory, item_pa: int, item: int) -> None:
    """Write one item as it lies in memory (``item`` is after ``invert``)."""
    order = "little" if fmt.byte_order == "<" else "big"
    mem.write(item_pa, (item ^ fmt.invert).to_bytes(fmt.item_bytes, order))  # type: ignore[arg-type]


def _move(fmt: Format, mem: WritableMemory, found: Items, i: int, pa: int) -> None:
    """Make leaf ``i`` show ``pa``: its item, or all items of a contiguous entry."""
    spec, item = fmt.levels[int(found.level[i])], int(found.item[i])
    lg2 = int(found.lg2[i])
    run = spec.contig_of(item) if lg2 > spec.shift else None
    address = spec.pa_word(2**64 - 1)
    equal = run is not None and run.replicated
    coded = run.value & address if run is not None and run.replicated else 0
    for n in range(1 << (lg2 - spec.shift)):
        own = pa if equal else pa + (n << spec.shift)
        there = int(found.at[i]) + n * fmt.item_bytes
        _store(fmt, mem, there, (item & ~address) | spec.pa_word(own) | coded)


def change_tables(
    name: str,
    fmt: Format,
    mem: WritableMemory,
    root_pa: int,
    quiet: Sequence[Range],
    tags: NDArray[np.uint32],
    unplugged: Sequence[Range],
) -> Injected:
    """Put the table fault ``name`` into the prior table.

    :param quiet: where no device works. :param tags: uint32[n_frames], the owner of each frame. :param
    unplugged: ranges
        whose emptied tables are still linked.
    :raises UsageError: this table has no place for the fault.
    """
    found = _quiet_leaves(fmt, mem, root_pa, quiet)
    if name == "pte-bit":
        return _pte_bit(fmt, mem, found, tags)
    if name == "pte-swap":
        return _pte_swap(fmt, mem, found)
    if name == "unknown-bit":
        return _unknown_bit(fmt, mem, root_pa, found, quiet)
    if name == "leaf-size":
        return _leaf_size(fmt, mem, root_pa, found, unplugged)
    raise ValueError(name)


def _pte_swap(fmt: Format, mem: WritableMemory, found: Items) -> Injected:
    """Let two leaves of one size, the smallest there is twice, show each other's frames."""
    sizes, counts = np.unique(found.lg2, return_counts=True)
    for lg2 in sizes[counts >= 2].tolist():
        at = np.flatnonzero(found.lg2 == lg2)
        a, b = int(at[0]), int(at[-1])
        if found.level[a] == found.level[b] and found.pa[a] != found.pa[b]:
            _move(fmt, mem, found, a, int(found.pa[b]))
            _move(fmt, mem, found, b, int(found.pa[a]))
            what = f"leaves of iova {int(found.iova[a]):#x} and {int(found.iova[b]):#x} swapped"
            return Injected("pte-swap", what, int(found.iova[a]))
    raise UsageError("pte-swap needs two leaves of one size in the quiet ranges")


def _pte_bit(fmt: Format, mem: WritableMemory, found: Items, tags: NDArray[np.uint32]) -> Injected:
    """Flip one OA bit so that the leaf points into a frame of somebody else, if any bit does that. Of a
    contiguous entry one item is changed, where there is nothing else.
    """
    best: tuple[int, int, int] | None = None
    shifts = np.array([spec.shift for spec in fmt.levels], np.uint8)
    joined = found.lg2 > shifts[found.level]
    for i in np.lexsort((found.level, joined))[:512].tolist():
        spec = fmt.levels[int(found.level[i])]
        own = tags[int(found.pa[i]) >> 12]
        for bit in range(int(found.lg2[i]), 56):
            if not spec.pa_word(1 << bit):
                continue
            pfn = (int(found.pa[i]) ^ 1 << bit) >> 12
            if pfn >= len(tags):
                continue
            rank = 2 if tags[pfn] >= 16 and tags[pfn] != own else 1 if tags[pfn] else 0
            if best is None or rank > best[0]:
                best = (rank, i, bit)
        if best is not None and best[0] == 2:
            break
    if best is None:
        raise UsageError("pte-bit: no leaf in the quiet ranges")
    _, i, bit = best
    word = fmt.levels[int(found.level[i])].pa_word(1 << bit)
    _store(fmt, mem, int(found.at[i]), int(found.item[i]) ^ word)
    iova = int(found.iova[i])
    what = f"bit {word.bit_length() - 1} of the leaf of iova {iova:#x} (pa {int(found.pa[i]):#x}) flipped"
    return Injected("pte-bit", what, iova)


def _unknown_bit(
    fmt: Format, mem: WritableMemory, root_pa: int, found: Items, quiet: Sequence[Range]
) -> Injected:
    """Set a bit that the specification reserves: in a leaf; else in the table item above, where everything
    behind it is quiet; else, where this format reserves none, an attribute bit that the kernel never sets.
    """
    for i in np.argsort(-found.level.astype(np.int64), kind="stable").tolist():
        spec, item = fmt.levels[int(found.level[i])], int(found.item[i])
        run = spec.contig_of(item)
        reserved = spec.leaf_reserved
        if run is not None:
            reserved = reserved & ~run.mask if run.reserved is None else run.reserved
        free = reserved & ~item
        if free:
            bit, iova = free.bit_length() - 1, int(found.iova[i])
            _store(fmt, mem, int(found.at[i]), item | 1 << bit)
            return Injected("unknown-bit", f"reserved bit {bit} of the leaf of iova {iova:#x} set", iova)
    for iova in found.iova.tolist():
        for level, item_pa, item in reversed(walk(fmt, mem, root_pa, iova).steps[:-1]):
            free = fmt.levels[level].table_reserved & ~item
            if not free:
                continue
            size = 1 << fmt.levels[level].shift
            behind, _ = leaf_items(TableMemory(fmt, mem), root_pa, iova & -size, iova | (size - 1))
            if not all(any(r.start <= at <= r.last for r in quiet) for at in behind.iova.tolist()):
                break
            bit = free.bit_length() - 1
            _store(fmt, mem, item_pa, item | 1 << bit)
            what = f"reserved bit {bit} of the level {level} item above iova {iova:#x} set"
            return Injected("unknown-bit", what, iova)
    for i in range(len(found.iova)):
        spec = fmt.levels[int(found.level[i])]
        free = spec.leaf_attrs & ~spec.leaf_base & ~int(found.item[i])
        if free:
            bit, iova = (free & -free).bit_length() - 1, int(found.iova[i])
            _store(fmt, mem, int(found.at[i]), int(found.item[i]) | 1 << bit)
            return Injected("unknown-bit", f"attribute bit {bit} of the leaf of iova {iova:#x} set", iova)
    raise UsageError("unknown-bit: no leaf in the quiet ranges has an unknown bit to set")


def _leaf_size(
    fmt: Format, mem: WritableMemory, root_pa: int, found: Items, unplugged: Sequence[Range]
) -> Injected:
    """Split one big leaf into a table of small ones, for which an emptied table that is still linked is
    used."""
    one, two = fmt.levels[0], fmt.levels[1]
    big = np.flatnonzero((found.level == 1) & (found.lg2 == two.shift))
    if not len(big):
        raise UsageError("leaf-size needs a 2 MiB leaf in a quiet range", "choose --page-size 2M or mixed")
    i = int(big[0])
    for r in unplugged:
        steps = walk(fmt, mem, root_pa, r.start).steps
        if steps and steps[-1][0] == 0:
            _, parent_pa, parent = steps[-2]
            spare = two.table_pa(parent)
            break
    else:
        raise UsageError("leaf-size needs an emptied table that is still linked; this guest has none")
    pa, prot = int(found.pa[i]), int(found.prot[i])
    count = one.items
    pas = np.uint64(pa) + (np.arange(count, dtype=np.uint64) << np.uint64(one.shift))
    words = fmt.leaf_items(0, pas, np.full(count, prot, np.uint8))
    mem.write(spare, words.astype(fmt.item_dtype).tobytes())
    _store(fmt, mem, parent_pa, 0)
    pointer = int(fmt.table_items(1, np.array([spare], np.uint64))[0]) ^ fmt.invert
    _store(fmt, mem, int(found.at[i]), pointer)
    iova = int(found.iova[i])
    return Injected("leaf-size", f"the 2 MiB leaf of iova {iova:#x} split into {count} leaves", iova)
