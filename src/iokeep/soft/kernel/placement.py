# SPDX-License-Identifier: Apache-2.0
"""Where in physical memory a file's pages go: the frames that they get when they are first touched."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from iokeep.errors import UsageError
from iokeep.soft.kernel.frames import BLOCK, I64, FrameAllocator, Kind, OutOfMemory

PROFILES = ("contiguous", "2m-scattered", "4k-random", "mixed")


class Placement:
    """One placement: a profile with an optional seed (``mixed:7``), or the path of a ``.npy`` list of pfns.

    * ``contiguous``: one run of frames, 2 MiB aligned when it is that long.
    * ``2m-scattered``: aligned 2 MiB blocks in random order, as huge pages of shmem are; the tail in random
      frames.
    * ``4k-random``: random frames.
    * ``mixed``: each 2 MiB of the file is, by the seed, a block or 512 random frames.

    :raises UsageError: neither a profile nor a readable list.
    """

    def __init__(self, spec: str) -> None:
        name, _, seed = spec.partition(":")
        self.spec = spec
        self.profile = name
        self.seed: int | None = None
        self.listed: I64 | None = None
        if name in PROFILES:
            if seed:
                try:
                    self.seed = int(seed, 0)
                except ValueError as error:
                    raise UsageError(f"placement {spec!r}: the seed is not a number") from error
        elif spec.endswith(".npy"):
            self.listed = _load(Path(spec))
        else:
            raise UsageError(
                f"placement {spec!r}: must be one of {', '.join(PROFILES)} or a .npy list of pfns"
            )

    def plan(self, frames: FrameAllocator, n: int, start: int = 0) -> I64:
        """Frames for the file pages ``start`` ... ``start + n - 1`` (int64[n]), free now and marked as
        planned.

        :raises OutOfMemory: not enough free frames, or a listed frame is not free.
        """
        if self.listed is not None:
            pfns = self.listed[start : start + n]
            if len(pfns) < n:
                raise OutOfMemory(
                    f"the list {self.spec} has {len(self.listed)} frames, the file {start + n} pages"
                )
            _check_free(frames, pfns, self.spec)
        elif n == 0:
            pfns = np.zeros(0, np.int64)
        else:
            rng = frames.rng if self.seed is None else np.random.default_rng((self.seed, start))
            pfns = self._choose(frames, n, start, rng)
        frames.planned[pfns] = True
        return pfns

    def _choose(self, frames: FrameAllocator, n: int, start: int, rng: np.random.Generator) -> I64:
        usable = (frames.kind == Kind.FREE) & ~frames.planned
        if int(np.count_nonzero(usable)) < n:
            usable = frames.kind == Kind.FREE
        if int(np.count_nonzero(usable)) < n:
            raise OutOfMemory(f"{n} frames wanted, {int(np.count_nonzero(usable))} are free")
        if self.profile == "contiguous":
            first = frames.find_run(n, BLOCK if n >= BLOCK else 1)
            if first is None:
                first = frames.find_run(n)
            if first is not None:
                return np.arange(first, first + n, dtype=np.int64)
            return np.flatnonzero(usable)[:n]
        out = np.full(n, -1, np.int64)
        if self.profile in ("2m-scattered", "mixed"):
            self._choose_blocks(usable, out, start, rng)
        rest = np.flatnonzero(out < 0)
        if len(rest):
            free = np.flatnonzero(usable)
            out[rest] = rng.choice(free, size=len(rest), replace=False, shuffle=True)
        return out

    def _choose_blocks(self, usable: np.ndarray, out: I64, start: int, rng: np.random.Generator) -> None:
        """Fill whole 2 MiB of the file from aligned free blocks, and take these out of ``usable``."""
        first = -(-start // BLOCK)
        wanted = np.arange(first, (start + len(out)) // BLOCK, dtype=np.int64)
        if self.profile == "mixed":
            wanted = wanted[rng.random(len(wanted)) < 0.5]
        whole = len(usable) // BLOCK
        blocks = np.flatnonzero(usable[: whole * BLOCK].reshape(whole, BLOCK).all(axis=1))
        # The rest of the file must still find single frames: blocks only shrink by what they give.
        k = min(len(wanted), len(blocks))
        if not k:
            return
        taken = rng.choice(blocks, size=k, replace=False, shuffle=True) * BLOCK
        inside = np.arange(BLOCK, dtype=np.int64)
        frames = (taken[:, None] + inside[None, :]).reshape(-1)
        pages = ((wanted[:k] * BLOCK - start)[:, None] + inside[None, :]).reshape(-1)
        out[pages] = frames
        usable[frames] = False


def _load(path: Path) -> I64:
    try:
        raw = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"placement list {path}: {error}", "give a .npy file with one integer pfn per page"
        ) from error
    if raw.ndim != 1 or not np.issubdtype(raw.dtype, np.integer):
        raise UsageError(
            f"placement list {path}: must be one row of integers, is {raw.dtype}{list(raw.shape)}"
        )
    pfns: I64 = raw.astype(np.int64)
    if len(np.unique(pfns)) != len(pfns):
        raise UsageError(f"placement list {path}: a frame is listed twice")
    return pfns


def _check_free(frames: FrameAllocator, pfns: I64, what: str) -> None:
    outside = (pfns < 0) | (pfns >= frames.n_frames)
    if outside.any():
        raise OutOfMemory(f"{what}: frame {int(pfns[outside][0]):#x} is not in memory")
    busy = (frames.kind[pfns] != Kind.FREE) | frames.planned[pfns]
    if busy.any():
        raise OutOfMemory(f"{what}: frame {int(pfns[busy][0]):#x} is not free")
