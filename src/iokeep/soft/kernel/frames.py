# SPDX-License-Identifier: Apache-2.0
"""The page allocator: who owns each 4 KiB frame, how often it is held and pinned, and what went wrong with
it.

A frame's ``ref`` is what the allocator believes; it is freed when ``ref`` reaches 0, whoever asked for it. A
wrong unpin therefore does its damage for real, as in Linux: it drops a reference that somebody else took, and
the frame can be freed under its owner. ``hold`` and ``pin`` count what was really taken, so that such frees
can be counted.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from iokeep.mem.ram import Ram

I64 = NDArray[np.int64]
I32 = NDArray[np.int32]
U64 = NDArray[np.uint64]
U32 = NDArray[np.uint32]
BOOL = NDArray[np.bool_]

FRAME_SHIFT = 12
FRAME_BYTES = 1 << FRAME_SHIFT
#: frames of a 2 MiB block
BLOCK = 512
#: frames 0 ... FIRMWARE_FRAMES - 1 belong to the firmware and are never free, so that "PFN 0" is somebody's
#: frame
FIRMWARE_FRAMES = 256
#: byte that fills freed frames. Four of them are no sensible item of any table format, address or counter.
POISON = 0x5F
#: runs of so many frames are worked on one by one, shorter ones frame by frame
_LONG_RUN = 64
#: free frames that a refill of the kernel's own pool looks through at a time
_POOL_SCAN = 65536


class Kind(enum.IntEnum):
    """What a frame is used for."""

    FREE = 0
    FIRMWARE = 1  #: never free
    KERNEL = 2  #: structures of the kernel and of the IOMMU: root, context and PASID tables, queues
    PGTABLE = 3  #: IO page tables
    MEMFD = 4
    ANON = 5
    HANDOVER = 6  #: what crosses the kexec: records, tree nodes, FDT
    RESERVED = 7  #: came over the kexec, and nobody of this boot owns it yet


#: owner tags below the first inode number
TAG_FREE = 0
TAG_FIRMWARE = 1
TAG_KERNEL = 2
FIRST_INO = 16


class OutOfMemory(Exception):
    """No frames left of the sort that was asked for; a system call makes ENOMEM of it."""


class FramesPlatform(Protocol):
    """What the allocator needs of the platform."""

    @property
    def ram(self) -> Ram:
        """Physical memory."""
        ...

    @property
    def tags(self) -> U32:
        """Owner tag of each frame, uint32[n_frames]."""
        ...


@dataclass(frozen=True, slots=True)
class Claim:
    """What a live object says of the frames that it holds.

    :param who: the object, for messages. :param tag: the owner tag that these frames must carry, or None
        where this object is not their owner (a mapping, a pin). :param pfns: int64[n]. :param refs:
        references held on each.
    :param pins: of these references, how many are pins (0 or ``refs``).
    """

    who: str
    pfns: I64
    tag: int | None = None
    refs: int = 1
    pins: int = 0


@dataclass(slots=True)
class Audit:
    """The allocator's state compared with what live objects claim."""

    allocated: int = 0
    free: int = 0
    leaked: int = 0
    wrongly_freed: int = 0
    bad_unpins: int = 0
    bad_puts: int = 0
    by_kind: dict[str, int] = field(default_factory=dict)
    leaked_pfns: list[int] = field(default_factory=list)
    wrongly_freed_pfns: list[int] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The counters, and the first few frames of each sort as "0x..." strings."""
        return {
            "schema": "iokeep.audit-v1",
            "allocated": self.allocated,
            "free": self.free,
            "leaked": self.leaked,
            "wrongly_freed": self.wrongly_freed,
            "bad_unpins": self.bad_unpins,
            "bad_puts": self.bad_puts,
            "by_kind": self.by_kind,
            "leaked_pfns": [f"{p:#x}" for p in self.leaked_pfns],
            "wrongly_freed_pfns": [f"{p:#x}" for p in self.wrongly_freed_pfns],
        }


def pas_of(pfns: I64) -> U64:
    """Physical addresses (uint64) of frame numbers."""
    return pfns.astype(np.uint64) << np.uint64(FRAME_SHIFT)


def pfns_of(pas: U64) -> I64:
    """Frame numbers (int64) of physical addresses."""
    return (pas >> np.uint64(FRAME_SHIFT)).astype(np.int64)


@dataclass(frozen=True, slots=True)
class FrameRuns:
    """Frames in the order of what shows them, as runs of consecutive ones: pfn ``first`` int64[n] and
    ``count`` int64[n] of each, at least 1.
    """

    first: I64
    count: I64

    @classmethod
    def of(cls, pfns: I64) -> FrameRuns:
        """The longest runs of frames that are listed one by one."""
        at = np.flatnonzero(np.diff(pfns, prepend=pfns[:1] - 2) != 1)
        return cls(pfns[at], np.diff(at, append=len(pfns)))

    @classmethod
    def join(cls, parts: list[FrameRuns]) -> FrameRuns:
        """One after the other; neighbours are not joined."""
        if len(parts) == 1:
            return parts[0]
        none = [np.zeros(0, np.int64)]
        return cls(
            np.concatenate(none + [p.first for p in parts]), np.concatenate(none + [p.count for p in parts])
        )

    @property
    def total(self) -> int:
        """Number of frames."""
        return int(self.count.sum())

    def pfns(self) -> I64:
        """The frames one by one."""
        if len(self.first) == 1:
            return np.arange(int(self.first[0]), int(self.first[0] + self.count[0]), dtype=np.int64)
        end = np.cumsum(self.count)
        pfns: I64 = np.repeat(self.first - (end - self.count), self.count)
        pfns += np.arange(len(pfns))
        return pfns


class FrameAllocator:
    """All frames of the platform's physical memory.

    ``ref``, ``pin``, ``hold`` int32[n]; ``kind`` uint8[n] of :class:`Kind`; ``platform.tags`` carries the
    owner. A new allocator believes every frame but the firmware's free: at boot after a kexec, ``claim`` what
    was preserved before anything is allocated.

    :param seed: of the random placements.
    """

    def __init__(self, platform: FramesPlatform, *, seed: int = 0) -> None:
        self.ram = platform.ram
        self.tags = platform.tags
        self.n_frames = self.ram.size >> FRAME_SHIFT
        if len(self.tags) < self.n_frames:
            raise ValueError(f"{len(self.tags)} tags for {self.n_frames} frames")
        if self.n_frames <= FIRMWARE_FRAMES:
            raise ValueError(f"{self.n_frames} frames: the firmware alone has {FIRMWARE_FRAMES}")
        self.words = self.ram.words[: self.n_frames * (FRAME_BYTES // 8)].reshape(
            self.n_frames, FRAME_BYTES // 8
        )
        self.ref: I32 = np.zeros(self.n_frames, np.int32)
        self.pin_count: I32 = np.zeros(self.n_frames, np.int32)
        self.hold: I32 = np.zeros(self.n_frames, np.int32)
        self.kind: NDArray[np.uint8] = np.zeros(self.n_frames, np.uint8)
        #: free frames that a file means to use: others take them only when nothing else is left
        self.planned: BOOL = np.zeros(self.n_frames, np.bool_)
        self.rng = np.random.default_rng(seed)
        self.bad_unpins = 0
        self.bad_puts = 0
        self._freed_wrongly: BOOL = np.zeros(self.n_frames, np.bool_)
        self._pool: list[int] = []
        self._short_of_unplanned = False
        self._cursor = FIRMWARE_FRAMES
        self.claim(np.arange(FIRMWARE_FRAMES, dtype=np.int64), TAG_FIRMWARE, Kind.FIRMWARE)
        self._next_ino = max(FIRST_INO, int(self.tags[: self.n_frames].max(initial=0)) + 1)

    # ---- owners

    def new_ino(self) -> int:
        """An inode number = owner tag that no frame ever carried in the life of this host."""
        ino = self._next_ino
        self._next_ino += 1
        return ino

    def saw_ino(self, ino: int) -> None:
        """``ino`` is in use already (it came over the kexec): never hand it out again."""
        self._next_ino = max(self._next_ino, ino + 1)

    # ---- allocation

    @property
    def n_free(self) -> int:
        """Number of free frames."""
        return int(np.count_nonzero(self.kind == Kind.FREE))

    def alloc(self, n: int, owner_tag: int, kind: Kind, *, order: int = 0, zero: bool = True) -> I64:
        """``n`` blocks of ``2**order`` frames each, naturally aligned; the pfns of the first frame of each
        block.

        Each frame starts with one reference. :raises OutOfMemory: nothing was allocated.
        """
        if n < 0 or order < 0:
            raise ValueError(f"alloc of {n} blocks of order {order}")
        if order == 0:
            firsts = self._take_singles(n)
            frames = firsts
        else:
            firsts = self._find_blocks(n, order)
            frames = (firsts[:, None] + np.arange(1 << order, dtype=np.int64)[None, :]).reshape(-1)
        self.claim(frames, owner_tag, kind)
        if zero:
            self.words[frames] = 0
        return firsts

    def alloc_run(self, n: int, owner_tag: int, kind: Kind, *, zero: bool = True) -> int:
        """``n`` contiguous frames, not aligned; the first pfn. :raises OutOfMemory: no such run."""
        first = self.find_run(n)
        if first is None:
            raise OutOfMemory(f"no {n} contiguous free frames")
        frames = np.arange(first, first + n, dtype=np.int64)
        self.claim(frames, owner_tag, kind)
        if zero:
            self.words[frames] = 0
        return first

    def claim(self, pfns: I64, owner_tag: int | None, kind: Kind) -> None:
        """Take exactly these free frames, each with one reference; their content stays.

        :param owner_tag: None leaves the tags as they are: at boot, frames that devices are using keep their
            owner.
        :raises OutOfMemory: one of them is not free, or not in this memory; nothing was taken.
        """
        if not len(pfns):
            return
        if int(pfns.min()) < 0 or int(pfns.max()) >= self.n_frames:
            raise OutOfMemory(f"frame {int(pfns.max()):#x} is not in memory of {self.n_frames:#x} frames")
        busy = self.kind[pfns] != Kind.FREE
        if busy.any():
            first = int(pfns[np.flatnonzero(busy)[0]])
            raise OutOfMemory(f"frame {first:#x} is not free: {Kind(int(self.kind[first])).name}")
        self.kind[pfns] = kind
        self.ref[pfns] = 1
        self.hold[pfns] = 1
        self.pin_count[pfns] = 0
        self.planned[pfns] = False
        if owner_tag is not None:
            self.tags[pfns] = owner_tag

    def give(self, pfns: I64, owner_tag: int, kind: Kind) -> None:
        """Pass frames on to another owner with the reference that they have (RESERVED ones to their new
        owner).
        """
        self.kind[pfns] = kind
        self.tags[pfns] = owner_tag

    def _take_singles(self, n: int) -> I64:
        if n <= 64:
            out: list[int] = []
            while len(out) < n:
                if not self._pool and not self._refill():
                    self._pool.extend(out)
                    raise OutOfMemory(f"no {n} free frames")
                pfn = self._pool.pop()
                if self.kind[pfn] == Kind.FREE and (not self.planned[pfn] or self._short_of_unplanned):
                    out.append(pfn)
            return np.array(out, np.int64)
        free = self._free_frames(n)
        return free[:n]

    def _refill(self) -> bool:
        """Find more single frames for the kernel, in ascending order from where the last look ended."""
        self._short_of_unplanned = False
        for allow_planned in (False, True):
            looked = 0
            while looked < self.n_frames:
                first = self._cursor
                last = min(first + _POOL_SCAN, self.n_frames)
                usable = self.kind[first:last] == Kind.FREE
                if not allow_planned:
                    usable &= ~self.planned[first:last]
                found = np.flatnonzero(usable)[:1024]
                looked += last - first
                if len(found):
                    self._cursor = first + int(found[-1]) + 1
                    if self._cursor >= self.n_frames:
                        self._cursor = FIRMWARE_FRAMES
                    self._pool = (found[::-1] + first).tolist()
                    self._short_of_unplanned = allow_planned
                    return True
                self._cursor = last if last < self.n_frames else FIRMWARE_FRAMES
        return False

    def _free_frames(self, n: int) -> I64:
        """At least ``n`` free frames, those that nobody plans to use first, ascending."""
        free = np.flatnonzero((self.kind == Kind.FREE) & ~self.planned)
        if len(free) < n:
            free = np.concatenate((free, np.flatnonzero((self.kind == Kind.FREE) & self.planned)))
        if len(free) < n:
            raise OutOfMemory(f"{n} frames wanted, {len(free)} are free")
        return free

    def _find_blocks(self, n: int, order: int) -> I64:
        span = 1 << order
        whole = self.n_frames // span * span
        free = self.kind[:whole] == Kind.FREE
        unplanned = np.flatnonzero((free & ~self.planned[:whole]).reshape(-1, span).all(axis=1))
        if len(unplanned) < n:
            every = np.flatnonzero(free.reshape(-1, span).all(axis=1))
            if len(every) < n:
                raise OutOfMemory(f"{n} blocks of order {order} wanted, {len(every)} are free")
            unplanned = np.concatenate((unplanned, np.setdiff1d(every, unplanned)))
        return unplanned[:n].astype(np.int64) * span

    def find_run(self, n: int, align: int = 1) -> int | None:
        """First pfn of ``n`` contiguous frames that are free and unplanned (or just free), else None."""
        for also_planned in (False, True):
            for first in range(0, self.n_frames, _POOL_SCAN):  # the first part has one, most of the time
                part = slice(first, first + _POOL_SCAN + n + align)
                usable = self.kind[part] == Kind.FREE
                if not also_planned:
                    usable &= ~self.planned[part]
                edges = np.diff(usable.astype(np.int8), prepend=0, append=0)
                starts, ends = np.flatnonzero(edges == 1) + first, np.flatnonzero(edges == -1) + first
                starts = (starts + align - 1) // align * align
                fits = np.flatnonzero(ends - starts >= n)
                if len(fits):
                    return int(starts[fits[0]])
        return None

    # ---- references

    def get(self, pfns: I64) -> None:
        """One more reference on each frame."""
        np.add.at(self.ref, pfns, 1)
        np.add.at(self.hold, pfns, 1)

    def put(self, pfns: I64) -> None:
        """One reference less on each; frames that lose their last one are freed."""
        if not len(pfns):
            return
        np.subtract.at(self.hold, pfns, 1)
        self._drop(pfns, unpin=False)

    def pin(self, pfns: I64) -> None:
        """Pin each frame for DMA: one pin, which is a reference too."""
        np.add.at(self.ref, pfns, 1)
        np.add.at(self.pin_count, pfns, 1)

    def pin_runs(self, runs: FrameRuns) -> None:
        """:meth:`pin` of frames of which none is there twice, as those of one file."""
        if runs.total < _LONG_RUN * len(runs.first):
            pfns = runs.pfns()
            self.ref[pfns] += 1
            self.pin_count[pfns] += 1
            return
        for first, count in zip(runs.first.tolist(), runs.count.tolist(), strict=True):
            self.ref[first : first + count] += 1
            self.pin_count[first : first + count] += 1

    def unpin(self, pfns: I64) -> None:
        """Undo one pin on each frame, without asking whether it is right.

        A frame that is not pinned is counted in ``bad_unpins`` and loses a reference all the same; so does
        PFN 0.
        """
        if not len(pfns):
            return
        inside = (pfns >= 0) & (pfns < self.n_frames)
        if not inside.all():
            self.bad_unpins += int(np.count_nonzero(~inside))
            pfns = pfns[inside]
        np.subtract.at(self.pin_count, pfns, 1)
        if (self.pin_count[pfns] < 0).any():
            below = np.unique(pfns[self.pin_count[pfns] < 0])
            self.bad_unpins += int(-self.pin_count[below].sum())
            self.pin_count[below] = 0
        self._drop(pfns, unpin=True)

    def _drop(self, pfns: I64, *, unpin: bool) -> None:
        np.subtract.at(self.ref, pfns, 1)
        left = self.ref[pfns]
        if (left > 0).all():
            return
        gone = np.unique(pfns[left <= 0])
        under = self.ref[gone]
        if (under < 0).any() or (self.kind[gone] == Kind.FREE).any():
            # References that nobody had: the frame was free already, or several holders dropped the same one.
            self.bad_puts += int(-under[under < 0].sum())
            self.ref[gone] = 0
            self.hold[gone] = np.maximum(self.hold[gone], 0)
            gone = gone[self.kind[gone] != Kind.FREE]
        if len(gone):
            self._free(gone)

    def _free(self, pfns: I64) -> None:
        wrong = pfns[(self.hold[pfns] > 0) | (self.pin_count[pfns] > 0)]
        self._freed_wrongly[wrong] = True
        self.hold[pfns] = 0
        self.pin_count[pfns] = 0
        self.ref[pfns] = 0
        self.kind[pfns] = Kind.FREE
        self.tags[pfns] = TAG_FREE
        self.poison(pfns)

    def poison(self, pfns: I64) -> None:
        """Fill frames with the poison byte, so that nothing survives in free memory by luck."""
        self.words[pfns] = np.uint64(int.from_bytes(bytes([POISON]) * 8, "little"))

    def poison_free(self) -> int:
        """At boot: poison what is free now and was somebody's before, and clear its tag; the number of
        frames.

        Frames that carried no tag were free in the old kernel too: poisoned then, or never touched.
        """
        left = np.flatnonzero((self.kind == Kind.FREE) & (self.tags[: self.n_frames] != TAG_FREE))
        for at in range(0, len(left), 65536):
            self.poison(left[at : at + 65536])
        self.tags[left] = TAG_FREE
        return len(left)

    # ---- content

    def read(self, pfns: I64, skip: int, length: int) -> bytes:
        """``length`` bytes of consecutive pages in these frames, from byte ``skip`` of the first one on."""
        rows = self.words[pfns]
        return rows.reshape(-1).view(np.uint8)[skip : skip + length].tobytes()

    def write(self, pfns: I64, skip: int, data: bytes) -> None:
        """Store bytes as :meth:`read` finds them; not a byte beside them is touched."""
        ram = self.ram.bytes
        source = np.frombuffer(data, np.uint8)
        head = min(len(data), FRAME_BYTES - skip)
        at = int(pfns[0]) * FRAME_BYTES + skip
        ram[at : at + head] = source[:head]
        whole = (len(data) - head) // FRAME_BYTES
        if whole:
            body = source[head : head + whole * FRAME_BYTES].reshape(whole, FRAME_BYTES)
            self.words.view(np.uint8)[pfns[1 : 1 + whole]] = body
        tail = len(data) - head - whole * FRAME_BYTES
        if tail:
            at = int(pfns[-1]) * FRAME_BYTES
            ram[at : at + tail] = source[-tail:]

    # ---- audit

    def audit(self, claims: Iterable[Claim]) -> Audit:
        """Compare the counts with what live objects claim; the firmware's frames need no claim.

        A frame is *leaked* where it is allocated and has more references or pins than the claims explain, and
        *wrongly freed* where it was freed although somebody held it, or where its claimed owner is not its
        owner.
        """
        refs = np.zeros(self.n_frames, np.int64)
        pins = np.zeros(self.n_frames, np.int64)
        refs[:FIRMWARE_FRAMES] = 1
        lost = self._freed_wrongly.copy()
        for claim in claims:
            pfns = claim.pfns[(claim.pfns >= 0) & (claim.pfns < self.n_frames)]
            np.add.at(refs, pfns, claim.refs)
            np.add.at(pins, pfns, claim.pins)
            if claim.tag is not None:
                lost[pfns[(self.kind[pfns] == Kind.FREE) | (self.tags[pfns] != claim.tag)]] = True
        allocated = self.kind != Kind.FREE
        leaked = np.flatnonzero(allocated & ((self.ref > refs) | (self.pin_count > pins)))
        wrong = np.flatnonzero(lost)
        counts = np.bincount(self.kind, minlength=len(Kind))
        return Audit(
            allocated=int(np.count_nonzero(allocated)),
            free=self.n_frames - int(np.count_nonzero(allocated)),
            leaked=len(leaked),
            wrongly_freed=len(wrong),
            bad_unpins=self.bad_unpins,
            bad_puts=self.bad_puts,
            by_kind={kind.name.lower(): int(counts[kind]) for kind in Kind if counts[kind]},
            leaked_pfns=leaked[:16].tolist(),
            wrongly_freed_pfns=wrong[:16].tolist(),
        )
