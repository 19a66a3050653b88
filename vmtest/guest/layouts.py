# SPDX-License-Identifier: Apache-2.0
"""Mappings of every shape that a real kernel turns into tables: (iova, length, prot, memory, offset) rows."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from iokeep.iommufd.client import READ, WRITE
from iokeep.uapi.kernel import KernelTransport
from vmtest.guest.truth import frames_of

#: this kernel's page, what a table of the lowest level has entries for, and what it maps: 2M of 4K pages
PAGE = mmap.PAGESIZE
ENTRIES = PAGE // 8
HUGE = ENTRIES * PAGE
RW = READ | WRITE
Row = tuple[int, int, int, int]


class Space(Protocol):
    """What maps: an IOAS, or a container of VFIO's older interface."""

    def map(self, hva: int, length: int, *, iova: int, prot: int) -> object:
        """Memory of this process."""

    def map_file(self, fd: int, start: int, length: int, *, iova: int, prot: int) -> object:
        """A range of a file."""

    def unmap(self, iova: int, length: int) -> object:
        """Whole areas."""

    def iova_ranges(self) -> list[tuple[int, int]]:
        """What may be mapped."""


@dataclass
class Guest:
    """What is mapped: memory, and ``rows`` (iova, last, pa, prot), one page each."""

    ioas: Space
    kernel: KernelTransport = field(default_factory=KernelTransport)
    rows: dict[int, Row] = field(default_factory=dict)
    keep: list[object] = field(default_factory=list)

    def memfd(self, size: int, huge: bool = False) -> tuple[int, int]:
        """A memfd with every page there: (descriptor, hva)."""
        fd = os.memfd_create("guest", os.MFD_HUGETLB if huge else 0)
        os.ftruncate(fd, size)
        mapping = self.kernel.mmap(fd, size)
        for at in range(0, size, PAGE):
            mapping.write(at, at.to_bytes(8, "little"))
        self.keep.append(mapping)
        return fd, mapping.hva

    def file(self, ram: tuple[int, int], iova: int, offset: int, length: int, prot: int = RW) -> None:
        """Map a range of a file at an iova. Only then its frames are final: pages in KHO's scratch areas,
        which are CMA, move when they are pinned.
        """
        fd, hva = ram
        self.ioas.map_file(fd, offset, length, iova=iova, prot=prot)
        self._note(iova, frames_of(hva + offset, length), prot)

    def memory(self, iova: int, length: int, prot: int = RW) -> None:
        """Map anonymous memory of this process."""
        mapping = self.kernel.mmap(-1, length)
        for at in range(0, length, PAGE):
            mapping.write(at, b"\1")
        self.keep.append(mapping)
        self.ioas.map(mapping.hva, length, iova=iova, prot=prot)
        self._note(iova, frames_of(mapping.hva, length), prot)

    def _note(self, iova: int, frames: Iterable[int], prot: int) -> None:
        for n, pa in enumerate(frames):
            self.rows[iova + n * PAGE] = (iova + n * PAGE, iova + n * PAGE + PAGE - 1, pa, prot)

    def unmap(self, iova: int, length: int) -> None:
        """Unmap whole areas."""
        self.ioas.unmap(iova, length)
        for at in range(iova, iova + length, PAGE):
            self.rows.pop(at, None)


def scattered(guest: Guest) -> None:
    """Pages in random order, with holes, and all three permissions."""
    ram = guest.memfd(256 * PAGE)
    order = list(range(256))
    random.Random(5).shuffle(order)
    for n, page in enumerate(order):
        if n % 7 != 3:
            guest.file(ram, 0x10000000 + n * PAGE, page * PAGE, PAGE, (RW, READ, WRITE)[n % 3])


def huge(guest: Guest) -> None:
    """Huge pages: aligned, so that leaves are large; read-only; and two not aligned, which fall to small
    ones.
    """
    ram = guest.memfd(6 * HUGE, huge=True)
    guest.file(ram, 0x40000000, 0, 3 * HUGE)
    guest.file(ram, 0x80000000, 3 * HUGE, HUGE, READ)
    guest.file(ram, 0xC0000000 + PAGE, 4 * HUGE, HUGE)
    guest.file(ram, 0x100000000 + HUGE - 16 * PAGE, 5 * HUGE, HUGE)


def edges(guest: Guest) -> None:
    """The first page, both sides of each window that is out (that of MSIs), the sides of a 512 GiB border,
    and the last page allowed.
    """
    ranges = guest.ioas.iova_ranges()
    places = [0, (1 << 39) - PAGE, 1 << 39, ranges[-1][1] + 1 - PAGE]
    for (_, last), (start, _) in pairwise(ranges):
        places += [last + 1 - PAGE, start]
    ram = guest.memfd(len(places) * PAGE)
    for n, iova in enumerate(places):
        guest.file(ram, iova, n * PAGE, PAGE)


def process_memory(guest: Guest) -> None:
    """Anonymous memory of the process by IOAS_MAP, beside a file, touching it."""
    ram = guest.memfd(64 * PAGE)
    guest.memory(0x20000000, 100 * PAGE)
    guest.file(ram, 0x20000000 + 100 * PAGE, 0, 64 * PAGE)
    guest.memory(0x30000000, 16 * PAGE, READ)


def contiguous(guest: Guest) -> None:
    """Runs of every power of two pages out of one huge page: sizes that AMD v1 has entries for."""
    ram = guest.memfd(2 * HUGE, huge=True)
    for lg2 in range(ENTRIES.bit_length() - 1):
        size = PAGE << lg2
        guest.file(ram, 0x50000000 + 4 * size, size, size)
    guest.file(ram, 0x60000000, HUGE, HUGE)


def emptied(guest: Guest) -> None:
    """Mapped and unmapped again, in parts: tables without an entry stay linked."""
    ram = guest.memfd((ENTRIES + 88) * PAGE)
    for n in range(ENTRIES + 88):
        guest.file(ram, 0x70000000 + n * PAGE, n * PAGE, PAGE)
    guest.unmap(0x70000000, ENTRIES * PAGE)
    guest.unmap(0x70000000 + (ENTRIES + 38) * PAGE, 20 * PAGE)


LAYOUTS: dict[str, Callable[[Guest], None]] = {
    each.__name__.replace("_", "-"): each
    for each in (scattered, huge, edges, process_memory, contiguous, emptied)
}


def reserve_huge_pages() -> None:
    """Room for the huge memfds."""
    Path("/proc/sys/vm/nr_hugepages").write_text("16")
