# SPDX-License-Identifier: Apache-2.0
"""What user space may map of an iommufd: pages that a driver gives out (iommufd/driver.c and main.c)."""

from __future__ import annotations

import errno
from dataclasses import dataclass

from iokeep.soft.kernel.frames import FRAME_BYTES, I64
from iokeep.soft.kernel.objects import IommufdObject
from iokeep.soft.kernel.syserror import SysError


@dataclass(frozen=True, slots=True)
class _Mmap:
    owner: IommufdObject
    pfns: I64


class Mmaps:
    """The pages of one iommufd that can be mapped, by the offset that stands for them in mmap(2)."""

    def __init__(self) -> None:
        self._mmaps: dict[int, _Mmap] = {}

    def add(self, owner: IommufdObject, pfns: I64) -> int:
        """The offset for these frames, int64[n], which ``owner`` keeps (_iommufd_alloc_mmap): the lowest that
        is free, never 0. Each mapping is a user of the owner.
        """
        at = FRAME_BYTES
        for offset, mmap in sorted(self._mmaps.items()):
            if at + len(pfns) * FRAME_BYTES <= offset:
                break
            at = offset + len(mmap.pfns) * FRAME_BYTES
        self._mmaps[at] = _Mmap(owner, pfns)
        return at

    def remove(self, offset: int) -> None:
        """_iommufd_destroy_mmap; nobody maps it any more."""
        del self._mmaps[offset]

    def map(self, offset: int, length: int) -> I64:
        """iommufd_fops_mmap: the frames. :raises SysError: ENXIO: not exactly what was given out."""
        mmap = self._mmaps.get(offset)
        if mmap is None or length != len(mmap.pfns) * FRAME_BYTES:
            raise SysError(errno.ENXIO, f"an iommufd has no {length:#x} bytes to map at {offset:#x}")
        mmap.owner.users += 1
        return mmap.pfns

    def unmapped(self, offset: int) -> None:
        """One mapping less (iommufd_fops_vma_close)."""
        self._mmaps[offset].owner.users -= 1
