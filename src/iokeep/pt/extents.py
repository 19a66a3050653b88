# SPDX-License-Identifier: Apache-2.0
"""Extents: maximal runs (iova, pa, length, prot), the canonical form of what a table translates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
U8 = NDArray[np.uint8]

#: prot bits, as IOMMU_READ and IOMMU_WRITE (include/linux/iommu.h)
PROT_R = 1
PROT_W = 2
PROT_TEXT = {0: "--", PROT_R: "r-", PROT_W: "-w", PROT_R | PROT_W: "rw"}


@dataclass(frozen=True, slots=True)
class Extents:
    """Arrays of equal length n, sorted by iova, disjoint.

    ``iova`` uint64[n] first IOVA; ``last`` uint64[n] last IOVA (closed); ``pa`` uint64[n] OA of the first
    byte;
    ``prot`` uint8[n] of PROT_R | PROT_W; ``attrs`` uint8[n] of IOMMU_CACHE, NOEXEC, MMIO, PRIV
    (``formats.base.TERMS``), None = memory attributes are not stated.
    """

    iova: U64
    last: U64
    pa: U64
    prot: U8
    attrs: U8 | None = None

    @classmethod
    def empty(cls) -> Extents:
        """No extent at all."""
        z = np.zeros(0, np.uint64)
        return cls(z, z, z, np.zeros(0, np.uint8))

    @classmethod
    def of(cls, rows: list[tuple[int, int, int, int]]) -> Extents:
        """From (iova, last, pa, prot) tuples, sorted here."""
        rows = sorted(rows)
        return cls(
            np.array([r[0] for r in rows], np.uint64),
            np.array([r[1] for r in rows], np.uint64),
            np.array([r[2] for r in rows], np.uint64),
            np.array([r[3] for r in rows], np.uint8),
        )

    def __len__(self) -> int:
        return len(self.iova)

    @property
    def mapped_bytes(self) -> int:
        """Sum of the lengths in bytes, as an unbounded int."""
        total = 0
        for lo in range(0, len(self), 1 << 16):
            spans = self.last[lo : lo + (1 << 16)] - self.iova[lo : lo + (1 << 16)]
            high, low = spans >> np.uint64(32), spans & np.uint64(0xFFFFFFFF)
            total += (int(high.sum()) << 32) + int(low.sum()) + len(spans)
        return total

    def canonical(self) -> Extents:
        """Touching neighbours with contiguous pa and equal prot joined: maximal runs.

        The input is sorted and disjoint; a run never wraps past 2**64 - 1.
        """
        if len(self) < 2:
            return self
        one = np.uint64(1)
        joins = (
            (self.iova[1:] == self.last[:-1] + one)
            & (self.pa[1:] == self.pa[:-1] + (self.last[:-1] - self.iova[:-1]) + one)
            & (self.prot[1:] == self.prot[:-1])
            & (self.last[:-1] != np.uint64(2**64 - 1))
        )
        if self.attrs is not None:
            joins &= self.attrs[1:] == self.attrs[:-1]
        first = np.flatnonzero(np.concatenate(([True], ~joins)))
        end = np.concatenate((first[1:] - 1, [len(self) - 1]))
        attrs = None if self.attrs is None else self.attrs[first]
        return Extents(self.iova[first], self.last[end], self.pa[first], self.prot[first], attrs)
