# SPDX-License-Identifier: Apache-2.0
"""Proof by user space that tables are what they were, where the kernel gives none: read from physical memory.

Two witnesses, which share nothing: the *seal*, a keyed digest of what the prior domain translated, recorded
before the kexec; and the *frames* behind each area now, as /proc/self/pagemap says (CAP_SYS_ADMIN). The
first proves that nothing is different; the second says what is.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from iokeep.errors import CapabilityError, InputError
from iokeep.mem.memory import U64, Memory
from iokeep.pt.compare import Mismatch
from iokeep.pt.digest import KEY_BYTES, digest_extents
from iokeep.pt.extents import Extents
from iokeep.pt.formats.base import Format
from iokeep.pt.leaves import extents
from iokeep.pt.verify import verify
from iokeep.restore.manifest import Area
from iokeep.uapi.transport import Transport

__all__ = ["Frames", "Proof", "Table", "expected_extents", "pagemap_frames", "prove", "seal_of"]

_PAGE = 4096
# Documentation/admin-guide/mm/pagemap.rst: bits 0-54 PFN, 63 present
_PFN = (1 << 55) - 1
_PRESENT = 63

#: (file descriptor, size in bytes) -> pa of each 4 KiB page, uint64[size / 4096]
Frames = Callable[[int, int], U64]


@dataclass(frozen=True, slots=True)
class Table:
    """Where a domain's tables are now: format, a memory that holds them, and the pa of the root."""

    fmt: Format
    memory: Memory
    root_pa: int

    def extents(self) -> Extents:
        """All that it translates. :raises InputError: a table is absent, or in a loop, or malformed."""
        found, problems = extents(self.fmt, self.memory, self.root_pa)
        if len(problems):
            raise InputError(
                f"the table at root pa {self.root_pa:#x} has {len(problems)} malformed items; "
                f"the first at pa {int(problems.at[0]):#x}"
            )
        return found


@dataclass(slots=True)
class Proof:
    """What came out. ``equal``: IOVA -> pa and permissions are exactly as before.

    ``reason``: why not, in a line. ``mismatches``: the first ranges that differ, of ``total``; only frames
    can name them. ``pages``: of 4096 bytes, translated.
    """

    equal: bool
    reason: str = ""
    mismatches: list[Mismatch] = field(default_factory=list)
    total: int = 0
    pages: int = 0


def seal_of(found: Extents, key: bytes | None = None) -> bytes:
    """Key (16 bytes, random if None) and digest (32 bytes) of what a domain translates."""
    key = os.urandom(KEY_BYTES) if key is None else key
    return key + digest_extents(found, key)


def pagemap_frames(transport: Transport) -> Frames:
    """The frames of this process's files by /proc/self/pagemap; pages that were never touched are faulted in.

    :raises CapabilityError: (when called) PFNs are hidden from this process.
    """

    def frames(fd: int, size: int) -> U64:
        mapping = transport.mmap(fd, size)
        try:
            for offset in range(0, size, _PAGE):
                mapping.read(offset, 1)
            with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
                raw = os.pread(pagemap.fileno(), size // _PAGE * 8, mapping.hva // _PAGE * 8)
        finally:
            mapping.close()
        words = np.frombuffer(raw, "<u8").astype(np.uint64)
        pfns = words & np.uint64(_PFN)
        if len(words) != size // _PAGE or not bool((words >> np.uint64(_PRESENT)).all()):
            raise InputError(f"/proc/self/pagemap does not know every page of descriptor {fd}")
        if not bool(pfns.all()):
            raise CapabilityError("/proc/self/pagemap shows no PFNs", "run with CAP_SYS_ADMIN")
        return pfns * np.uint64(_PAGE)

    return frames


def expected_extents(areas: Iterable[Area], frames: Mapping[int, U64]) -> Extents:
    """What areas of one IOAS must translate to. ``frames``: file token -> pa of each 4 KiB page."""
    iova, pa, prot = [], [], []
    for area in sorted(areas, key=lambda a: a.iova):
        first, count = area.offset // _PAGE, area.length // _PAGE
        iova.append(np.uint64(area.iova) + np.arange(count, dtype=np.uint64) * np.uint64(_PAGE))
        pa.append(frames[area.file][first : first + count])
        prot.append(np.full(count, area.prot, np.uint8))
    if not iova:
        return Extents.empty()
    starts = np.concatenate(iova)
    every = Extents(starts, starts + np.uint64(_PAGE - 1), np.concatenate(pa), np.concatenate(prot))
    return every.canonical()


def prove(table: Table, seal: bytes, expected: Extents | None = None, limit: int = 16) -> Proof:
    """Is a domain exactly what it was?

    :param seal: of the prior domain; empty = not recorded, then ``expected`` alone decides.
    :param expected: what it must be by the frames, if known; it names what differs.
    """
    found = table.extents()
    out = Proof(True, pages=found.mapped_bytes // _PAGE)
    if expected is not None:
        verdict = verify(table.fmt, table.memory, table.root_pa, expected, limit=limit)
        out.mismatches, out.total = list(verdict.mismatches), verdict.total
        if not verdict.equal:
            first = f"; the first: {verdict.mismatches[0].text}" if verdict.mismatches else ""
            out.equal, out.reason = False, f"{verdict.total} ranges are not as expected{first}"
    if seal:
        key, digest = seal[:KEY_BYTES], seal[KEY_BYTES:]
        if not hmac.compare_digest(digest_extents(found, key), digest):
            out.equal = False
            out.reason = out.reason or "the digest of the translations is not that of the prior domain"
    elif expected is None:
        out.equal, out.reason = False, "nothing to prove it by: no seal was recorded, and no frames are known"
    return out
