# SPDX-License-Identifier: Apache-2.0
"""The guest of a rehearsal: its files, where their frames lie, its areas, and where its devices may work.

A scenario is either a PC of a given size (:func:`pc`) or the guest behind a real table (:func:`like`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from iokeep.errors import CapabilityError, UsageError
from iokeep.mem.ranges import Range, merge, subtract
from iokeep.pt.extents import PROT_R, PROT_W
from iokeep.pt.formats.base import Format
from iokeep.pt.registry import open_format
from iokeep.rehearse.machine import captured, machine_of

__all__ = [
    "GuestArea",
    "GuestFile",
    "Scenario",
    "parse_size",
    "pc",
    "like",
]

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]

FRAME = 0x1000
MIB2 = 0x20_0000
GIB = 1 << 30
RW = PROT_R | PROT_W
#: end of the guest's low RAM, at most (the PCI hole begins at 3 GiB)
LOW_LIMIT = 3 * GIB
HIGH_RAM = 4 * GIB
#: what lies above the RAM begins at a multiple of this
ABOVE = 64 * GIB
#: of the alias in it: odd in 2 MiB, so that the alias has other leaves than the RAM it shows
ALIAS_OFFSET = 0x1000
RING_IOVA = 0xFD00_0000
ROM_IOVA = 0xC_0000
ROM_TOP_IOVA = 0xFFFC_0000
ROM_BYTES = 0x4_0000
RING_BYTES = 0x1_0000
MIN_MEMORY = 16 * 1024 * 1024
#: RAM of the software host besides the guest's: kernels, tables, records
HOST_BYTES = 192 * 1024 * 1024
PAGE_SIZES = ("4K", "2M", "1G", "mixed")

_SUFFIX = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"(0x[0-9a-fA-F]{1,16}|[0-9]{1,20})([KMGT]?)")


def parse_size(text: str, what: str = "size") -> int:
    """Bytes from ``4096``, ``0x1000``, ``4K``, ``512M``, ``1G`` ... :raises UsageError: anything else."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[1].startswith("0x") and match[2]):
        raise UsageError(f"{what} {text!r} is not a size", "write for example 4K, 2M, 1G or 0x40000000")
    value = int(match[1], 0 if match[1].startswith("0x") else 10) * _SUFFIX[match[2]]
    if not 0 < value < 1 << 63:
        raise UsageError(f"{what} {text!r} is out of range")
    return value


@dataclass(frozen=True, slots=True)
class GuestFile:
    """One memfd.

    :param name: its name, by which the software kernel finds ``placement``.
    :param size: bytes. :param placement: where its frames lie: a profile of the software kernel, or "listed".
    :param pfns: int64[size / 4096] for "listed", else None.
    """

    name: str
    size: int
    placement: str
    pfns: I64 | None = None


@dataclass(frozen=True, slots=True)
class GuestArea:
    """One area: [iova, last] shows ``file`` (index) from ``offset`` bytes on; ``role`` is for people."""

    iova: int
    last: int
    file: int
    offset: int
    prot: int
    role: str = "ram"

    @property
    def length(self) -> int:
        """Bytes."""
        return self.last - self.iova + 1


@dataclass(frozen=True, slots=True)
class Expected:
    """The leaves that the guest's table must have, sorted by iova: uint64 iova, pa and uint8 lg2, prot."""

    iova: U64
    pa: U64
    lg2: U8
    prot: U8


@dataclass(frozen=True)
class Scenario:
    """A guest and the host that it runs on.

    :param format: of the IO page tables. :param iommu: kind of the host's IOMMU. :param mode: how it runs.
    :param params: what else the kernels are told. :param quiet: ranges where no device works until a restore
        has decided.
    :param unplugged: areas that are mapped and unmapped again before the update: their emptied tables stay
    linked.
    :param ram_bytes: physical memory of the host. :param expected: leaves that must come out (``like``).
    """

    name: str
    format: str
    iommu: str
    mode: str
    params: Mapping[str, int]
    files: tuple[GuestFile, ...]
    areas: tuple[GuestArea, ...]
    quiet: tuple[Range, ...]
    unplugged: tuple[GuestArea, ...]
    ram_bytes: int
    page_size: str
    expected: Expected | None = None
    source: Mapping[str, object] = field(default_factory=dict)

    @property
    def memory(self) -> int:
        """Bytes of the guest's files."""
        return sum(f.size for f in self.files)

    @property
    def ram(self) -> int:
        """Bytes of the guest's RAM files."""
        return sum(f.size for f in self.files if f.name.startswith("ram"))

    @property
    def mapped(self) -> int:
        """Bytes that all areas map; aliases count each time."""
        return sum(a.length for a in self.areas)

    def slot_base(self, file: int) -> int:
        """Number of the file's first page among all pages of all files: the key of a DMA payload."""
        return sum(f.size // FRAME for f in self.files[:file])


def machine_memory(root: Path = Path("/")) -> int:
    """Bytes that this machine could give now (MemAvailable, and the cgroup's limit where there is one)."""
    available = 1 << 62
    try:
        text = (root / "proc/meminfo").read_text()
        found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.M)
        if found:
            available = int(found[1]) * 1024
        limit = (root / "sys/fs/cgroup/memory.max").read_text().strip()
        used = (root / "sys/fs/cgroup/memory.current").read_text().strip()
        if limit.isdigit() and used.isdigit():
            available = min(available, max(0, int(limit) - int(used)))
    except OSError:
        pass
    return available


def check_memory(ram_bytes: int, what: str, available: int | None = None) -> None:
    """:raises CapabilityError: this machine cannot give ``ram_bytes`` for a software host."""
    have = machine_memory() if available is None else available
    if ram_bytes > have * 9 // 10:
        raise CapabilityError(
            f"{what} needs {ram_bytes >> 20} MiB for the software host; {have >> 20} MiB are available",
            "choose a smaller --memory",
        )


def host_bytes(guest: int) -> int:
    """Physical memory of a host for a guest of so many bytes: room for tables twice, records and the
    kernels."""
    return -(-(guest + guest // 64 + HOST_BYTES) // MIB2) * MIB2


def _between(fmt: Format) -> bool:
    """The format has leaves larger than 2 MiB and smaller than 1 GiB."""
    return any(21 < lg2 < 30 for lg2 in fmt.leaf_lg2s)


def pc(memory: int, page_size: str = "mixed", format_name: str = "vtdss", seed: int = 0) -> Scenario:
    """A PC or its like: low RAM, the PCI hole with a ring and the firmware, RAM above 4 GiB, an alias. A PC
    has a hole in its low RAM; the RAM of Arm and RISC-V begins higher.

    :param memory: bytes of RAM, a multiple of 2 MiB, 16 MiB or more. :param page_size: "4K" (random
    frames), "2M"
        (blocks), "1G" or "mixed" (half in blocks, half in random frames). :param format_name: of
        :data:`iokeep.rehearse.machine.MACHINES`.
    :raises UsageError: a size that cannot be, a format without an IOMMU.
    """
    if page_size not in PAGE_SIZES:
        raise UsageError(f"page size {page_size!r}: must be one of {', '.join(PAGE_SIZES)}")
    machine = machine_of(format_name)
    fmt = open_format(format_name, {})
    unit = GIB if page_size == "1G" else MIB2
    if memory < MIN_MEMORY or memory % unit:
        raise UsageError(
            f"memory of {memory:#x} bytes: must be 16 MiB or more in units of {unit >> 20} MiB"
            f" for pages of {page_size}"
        )
    if memory > 1 << 44:
        raise UsageError(f"memory of {memory:#x} bytes: 16 TiB at most")
    low = min(memory // 2 // unit * unit, LOW_LIMIT - machine.ram)
    if page_size == "mixed":
        cut = memory // 2 // MIB2 * MIB2
        sizes = [("ram0", cut, f"2m-scattered:{seed}"), ("ram1", memory - cut, f"4k-random:{seed}")]
    elif page_size == "1G":
        sizes = [("ram0", memory, "listed")]
    else:
        sizes = [("ram0", memory, f"{'4k-random' if page_size == '4K' else '2m-scattered'}:{seed}")]
    ram_bytes = host_bytes(memory)
    files = []
    for name, size, placement in sizes:
        pfns = None
        if placement == "listed":
            # One gigabyte in the way at pa 0 is the kernel's; the guest's follow, in an order of their own.
            blocks = 1 + np.random.default_rng(seed).permutation(size // GIB)
            pfns = (blocks[:, None] * (GIB // FRAME) + np.arange(GIB // FRAME)[None, :]).reshape(-1)
            ram_bytes = size + GIB + MIB2 * 32
        files.append(GuestFile(name, size, placement, pfns.astype(np.int64) if pfns is not None else None))
    rom, ring = len(files), len(files) + 1
    files += [
        GuestFile("rom", ROM_BYTES, f"4k-random:{seed}"),
        GuestFile("ring", RING_BYTES, f"4k-random:{seed}"),
    ]

    areas: list[GuestArea] = []

    def ram(gpa: int, last: int, at: int, role: str) -> None:
        """RAM [gpa, last], whose byte ``at`` of all RAM is the first: one area in each file that it
        touches."""
        base = 0
        for index, (_, size, _) in enumerate(sizes):
            first, end = max(at, base), min(at + last - gpa, base + size - 1)
            if first <= end:
                areas.append(GuestArea(gpa + first - at, gpa + end - at, index, first - base, RW, role))
            base += size

    hole = machine.hole
    if low and hole is not None:
        ram(0, hole.start - 1, 0, "low RAM")
        ram(hole.last + 1, low - 1, hole.last + 1, "low RAM")
    elif low:
        ram(machine.ram, machine.ram + low - 1, 0, "low RAM")
    ram(HIGH_RAM, HIGH_RAM + memory - low - 1, low, "high RAM")
    areas.append(GuestArea(ROM_IOVA, ROM_IOVA + ROM_BYTES - 1, rom, 0, PROT_R, "ROM"))
    areas.append(GuestArea(ROM_TOP_IOVA, ROM_TOP_IOVA + ROM_BYTES - 1, rom, 0, PROT_R, "ROM again"))
    ring_prot = PROT_W if fmt.write_only else RW
    areas.append(GuestArea(RING_IOVA, RING_IOVA + RING_BYTES - 1, ring, 0, ring_prot, "ring"))
    top = max((a for a in areas if a.role == "high RAM"), key=lambda a: a.iova)
    above = max(machine.above, -(-(top.last + 1) // ABOVE) * ABOVE)
    alias, unplugged = above + ALIAS_OFFSET, above + ABOVE
    areas.append(GuestArea(alias, alias + MIB2 - 1, top.file, top.offset, RW, "alias"))

    # Where faults will sit: the end of each RAM area above 1 MiB, whole 2 MiB of it.
    quiet = []
    for area in areas:
        if area.role.endswith("RAM") and area.length >= 4 * MIB2:
            quiet.append(Range(area.last + 1 - MIB2, area.last))
    if _between(fmt):
        # An area by itself, so that no leaf reaches into it from where devices are at work.
        areas = [piece for area in areas for piece in _cut(area, [r.start for r in quiet])]
    return Scenario(
        name=f"{machine.guest} {memory >> 20} MiB",
        format=format_name,
        iommu=machine.iommu,
        mode=machine.mode,
        params={},
        files=tuple(files),
        areas=tuple(sorted(areas, key=lambda a: a.iova)),
        quiet=tuple(quiet),
        unplugged=(GuestArea(unplugged, unplugged + RING_BYTES - 1, ring, 0, RW, "unplugged"),),
        ram_bytes=ram_bytes,
        page_size=page_size,
    )


def _cut(area: GuestArea, at: Iterable[int]) -> list[GuestArea]:
    """The area in pieces that begin at the iovas ``at``, of those that are in it."""
    starts = sorted({area.iova, *(iova for iova in at if area.iova < iova <= area.last)})
    return [
        replace(area, iova=iova, last=end - 1, offset=area.offset + iova - area.iova)
        for iova, end in pairwise([*starts, area.last + 1])
    ]


def renumber(pa: U64, lg2: U8) -> tuple[U64, int]:
    """Move physical regions together: regions keep their order, and a gap stays between those that did not
    touch.

    A region is 2 MiB, or as large as a leaf in it. Regions that touch stay together, at a pa that is the old
    one modulo the largest of them: contiguity and alignment of every leaf survive.

    :param pa: uint64[n] OA of each leaf. :param lg2: uint8[n] log2 of its bytes.
    :return: the new OA of each leaf, and the first pa behind the last region.
    """
    if not len(pa):
        return pa.copy(), 0
    size = np.uint64(1) << np.maximum(lg2, 21).astype(np.uint64)
    start = pa & ~(size - np.uint64(1))
    order = np.argsort(start, kind="stable")
    ends = np.maximum.accumulate((start + size)[order])
    first = np.flatnonzero(np.concatenate((np.ones(1, np.bool_), start[order][1:] > ends[:-1])))
    bases, lasts = start[order][first].tolist(), ends[np.append(first[1:], len(order)) - 1].tolist()
    aligns = np.maximum.reduceat(size[order], first).tolist()
    moved_to, at = [], 0
    for base, end, align in zip(bases, lasts, aligns, strict=True):
        at += MIB2  # the first one is the kernel's
        at += (base - at) % align
        moved_to.append(at)
        at += end - base
    run = np.searchsorted(np.array(bases, np.uint64), pa, side="right") - 1
    moved: U64 = pa - np.array(bases, np.uint64)[run] + np.array(moved_to, np.uint64)[run]
    return moved, at


def file_pages(pa: U64, lg2: U8) -> tuple[I64, I64]:
    """Give every distinct frame a page of one file, in order of first use; a big leaf's frames stay together.

    :param pa: uint64[n] OA of each leaf in iova order. :param lg2: uint8[n].
    :return: (page int64[n] of each leaf's first frame, pfns int64[m]: the frame of each file page).
    """
    frames = np.left_shift(np.int64(1), lg2.astype(np.int64) - 12)
    first = (pa >> np.uint64(12)).astype(np.int64)
    ends = np.cumsum(frames)
    inside = np.arange(int(ends[-1]) if len(ends) else 0, dtype=np.int64) - np.repeat(ends - frames, frames)
    pfns = np.repeat(first, frames) + inside
    # The unit of each frame is the biggest aligned leaf that covers it anywhere in the table.
    unit = pfns.copy()
    for size in sorted(set(lg2.tolist()) - {12}):
        span = 1 << (int(size) - 12)
        blocks = np.unique(first[lg2 == size])
        at = np.searchsorted(blocks, pfns // span * span)
        hit = (at < len(blocks)) & (blocks[np.minimum(at, len(blocks) - 1)] == pfns // span * span)
        unit[hit] = pfns[hit] // span * span
    names, seen = np.unique(unit, return_index=True)
    order = names[np.argsort(seen, kind="stable")]
    size_of = np.ones(len(order), np.int64)
    for size in sorted(set(lg2.tolist()) - {12}):
        span = 1 << (int(size) - 12)
        size_of[np.isin(order, np.unique(first[lg2 == size]))] = span
    starts = np.concatenate((np.zeros(1, np.int64), np.cumsum(size_of)))
    total = int(starts[-1])
    listed = np.repeat(order - starts[:-1], size_of) + np.arange(total, dtype=np.int64)
    sorter = np.argsort(order, kind="stable")
    leaf_unit = unit[ends - frames] if len(ends) else unit
    position = sorter[np.searchsorted(order[sorter], leaf_unit)]
    page = starts[position] + first - order[position]
    return page, listed


def areas_of(iova: U64, pa: U64, lg2: U8, prot: U8, page: I64, sizes: Iterable[int]) -> list[GuestArea]:
    """Areas that give these leaves back: maximal runs of iova, file page and prot, cut where a bigger leaf
    would fit.

    The kernel's iommu_map takes the biggest size that divides iova and pa and still fits
    (drivers/iommu/iommu.c, iommu_pgsize), within one area. Where the table shows a smaller leaf, the area
    must end inside that block.

    :param sizes: log2 of the leaf sizes that the format has.
    """
    n = len(iova)
    if not n:
        return []
    one = np.uint64(1)
    span = np.left_shift(one, lg2.astype(np.uint64))
    offset = page.astype(np.uint64) << np.uint64(12)
    new_area = np.ones(n, np.bool_)
    new_area[1:] = (
        (iova[1:] != iova[:-1] + span[:-1])
        | (offset[1:] != offset[:-1] + span[:-1])
        | (prot[1:] != prot[:-1])
    )
    # Runs in which pa goes along with iova; only inside of one can a bigger leaf be chosen.
    new_run = new_area.copy()
    new_run[1:] |= pa[1:] != pa[:-1] + span[:-1]
    for size in sorted(s for s in sizes if s > 12):
        block = np.uint64((1 << size) - 1)
        start = np.flatnonzero(((iova & block) == 0) & ((pa & block) == 0) & (lg2 < size))
        if not len(start):
            continue
        # Leaves of the block that begins here: all those up to iova + block.
        end = np.searchsorted(iova, iova[start] + block, side="right")
        runs = np.cumsum(new_run)
        whole = (runs[start] == runs[end - 1]) & (
            iova[end - 1] + (span[end - 1] - one) == iova[start] + block
        )
        whole &= end - start > 1
        # An earlier cut inside of the block (for a smaller size) already keeps it apart.
        cuts = np.concatenate(([0], np.cumsum(new_area)))
        whole &= cuts[end] == cuts[start + 1]
        new_area[start[whole] + 1] = True
        new_run[start[whole] + 1] = True
    firsts = np.flatnonzero(new_area)
    lasts = np.concatenate((firsts[1:] - 1, [n - 1]))
    return [
        GuestArea(int(iova[a]), int(iova[b] + (span[b] - one)), 0, int(offset[a]), int(prot[a]), "captured")
        for a, b in zip(firsts.tolist(), lasts.tolist(), strict=True)
    ]


def _quiet_of(iova: U64, lg2: U8) -> list[Range]:
    """Quiet ranges of a captured guest: the last small leaves and the last two big ones, if more are left."""
    out: list[Range] = []
    for size in sorted(set(lg2.tolist())):
        at = np.flatnonzero(lg2 == size)
        keep = min(64, len(at) // 4) if size == 12 else min(2, len(at) // 2)
        for i in at[len(at) - keep :].tolist():
            out.append(Range(int(iova[i]), int(iova[i]) + (1 << int(size)) - 1))
    return merge(out)


def _unplugged_of(areas: list[GuestArea], fmt: Format, reserved: Sequence[Range]) -> tuple[GuestArea, ...]:
    """An area of one page in a 2 MiB of IOVA where the captured guest has nothing, if there is one."""
    top = 1 << (fmt.input_lg2 - fmt.sign_extend)
    used = [Range(a.iova // MIB2 * MIB2, a.last | (MIB2 - 1)) for a in areas]
    holes = subtract([Range(MIB2, top - 1)], sorted([*used, *reserved]))
    wide = [h for h in holes if h.size >= MIB2]
    if not wide:
        return ()
    start = wide[-1].start
    return (GuestArea(start, start + FRAME - 1, 0, 0, RW, "unplugged"),)


def like(
    name: str,
    format_name: str,
    config: Mapping[str, object],
    mode: str,
    leaves: tuple[U64, U64, U8, U8],
    source: Mapping[str, object] | None = None,
) -> Scenario:
    """The guest behind a real table: the same leaf sizes, scatter, holes and permissions.

    Leaves in IOVAs that the kernel keeps for itself (MSI doorbells) are none of the guest's, and left out.

    :param config: of the table. :param leaves: (iova, pa, lg2, prot) arrays sorted by iova. :param mode: the
        capture's IOMMU mode: VT-d's "legacy" or "scalable", or what other captures say.
    :raises CapabilityError: a table that no IOMMU of the software host walks, or too much memory.
    """
    machine, own_mode, params = captured(name, format_name, config, mode)
    fmt = open_format(format_name, config)
    guests = np.ones(len(leaves[0]), np.bool_)
    for r in machine.reserved:
        guests &= (leaves[0] < np.uint64(r.start)) | (leaves[0] > np.uint64(r.last))
    iova, pa = leaves[0][guests], leaves[1][guests]
    lg2, prot = leaves[2][guests], leaves[3][guests]
    if fmt.sign_extend and bool((iova >> np.uint64(fmt.input_lg2 - 1)).any()):
        raise CapabilityError(
            f"{name}: maps IOVAs of the upper half, which no IOAS has (an HWPT maps the lower half only)"
        )
    if not len(iova):
        raise CapabilityError(f"{name}: the table maps nothing, so there is no guest to rehearse")
    if int(np.left_shift(np.int64(1), lg2.astype(np.int64) - 12).sum()) > 1 << 28:
        raise CapabilityError(f"{name}: maps more than 1 TiB")
    moved, end = renumber(pa, lg2)
    page, pfns = file_pages(moved, lg2)
    areas = areas_of(iova, moved, lg2, prot, page, fmt.leaf_lg2s)
    ram_bytes = -(-(end + HOST_BYTES + (len(pfns) * FRAME) // 32) // MIB2) * MIB2
    return Scenario(
        name=f"like {name}",
        format=format_name,
        iommu=machine.iommu,
        mode=own_mode,
        params=params,
        # The second file is mapped nowhere: something that a mistaken replay can show instead.
        files=(
            GuestFile("ram0", len(pfns) * FRAME, "listed", pfns),
            GuestFile("other", RING_BYTES, "4k-random"),
        ),
        areas=tuple(areas),
        quiet=tuple(_quiet_of(iova, lg2)),
        unplugged=_unplugged_of(areas, fmt, machine.reserved),
        ram_bytes=ram_bytes,
        page_size="captured",
        expected=Expected(iova, moved, lg2, prot),
        source={**(source or {}), "left_out": int(np.count_nonzero(~guests))},
    )
