# SPDX-License-Identifier: Apache-2.0
"""Accesses: what a driver of an emulated device sees of an IOAS, without DMA.

For drivers inside of this kernel (there is no ioctl); follows drivers/iommu/iommufd/device.c from
iommufd_access_change_ioas on, and iopt_pages_rw_access of pages.c.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np

from iokeep.pt.extents import PROT_R, PROT_W
from iokeep.soft.kernel.frames import FRAME_BYTES, I64
from iokeep.soft.kernel.ioas import Ioas
from iokeep.soft.kernel.objects import IommufdObject
from iokeep.soft.kernel.pages import ULONG_MAX, Area
from iokeep.soft.kernel.syserror import SysError

if TYPE_CHECKING:
    from iokeep.soft.kernel.iommufd import Iommufd
    from iokeep.soft.kernel.process import Process


class AccessOps(Protocol):
    """What a driver gives with its access (struct iommufd_access_ops)."""

    @property
    def needs_pin_pages(self) -> bool:
        """Whether it pins pages: every area of its IOAS is then aligned to pages."""
        ...

    def unmap(self, iova: int, length: int) -> None:
        """[iova, iova + length) is about to go: whatever is pinned there must be unpinned before this
        returns.
        """
        ...


class Access(IommufdObject):
    """An emulated device's way into an IOAS (struct iommufd_access). The driver that made it is a user of it.

    ``ops`` None: of the iommufd itself (iommufd_access_create_internal); nobody is asked to unpin, and what
    it pins cannot be unmapped (EBUSY). ``ioas``: what it is attached to.
    """

    type_name = "access"

    def __init__(self, iommufd: Iommufd, ops: AccessOps | None) -> None:
        super().__init__(iommufd)
        self.ops = ops
        self.ioas: Ioas | None = None
        self.iova_alignment = FRAME_BYTES if ops is None or ops.needs_pin_pages else 1
        self._number = 0

    @classmethod
    def create(cls, iommufd: Iommufd, ops: AccessOps | None) -> Self:
        """iommufd_access_create: the access of a driver keeps the iommufd open."""
        access = cls(iommufd, ops)
        access.users += 1
        if ops is not None:
            iommufd.get()
        iommufd.add(access)
        return access

    def close(self) -> None:
        """iommufd_access_destroy: the driver has stopped using it; it is asked to unpin what it has left."""
        self.users -= 1
        self.iommufd.remove(self.id)

    def destroy(self) -> None:
        """iommufd_access_destroy_object."""
        self._change(None)
        if self.ops is not None:
            self.iommufd.put()

    # ---- attachment

    def attach(self, ioas_id: int) -> None:
        """iommufd_access_attach. :raises SysError: ENOENT; EADDRINUSE: areas there are not aligned."""
        self.attach_to(self.iommufd.ioas(ioas_id))

    def attach_to(self, ioas: Ioas) -> None:
        """iommufd_access_attach_internal. :raises SysError: EADDRINUSE."""
        if self.ioas is not None:
            self.iommufd.kernel.warn(f"access {self.id} is attached to IOAS {self.ioas.id} already")
            raise SysError(errno.EINVAL, f"access {self.id}: detach it first")
        self._change(ioas)

    def replace(self, ioas_id: int) -> None:
        """iommufd_access_replace: from one IOAS to another, with nothing pinned.

        :raises SysError: ENOENT: no such IOAS, or attached to none; EADDRINUSE. Nothing changed.
        """
        if self.ioas is None:
            raise SysError(errno.ENOENT, f"access {self.id} is attached to no IOAS")
        self._change(self.iommufd.ioas(ioas_id))

    def detach(self) -> None:
        """iommufd_access_detach."""
        self._change(None)

    def _change(self, new: Ioas | None) -> None:
        """iommufd_access_change_ioas."""
        old, number = self.ioas, self._number
        if old is new:
            return
        if new is not None:
            self._number = new.add_access(self)
            new.users += 1
        if old is not None:
            if self.ops is not None:
                self.ops.unmap(0, ULONG_MAX)
            old.remove_access(number)
            old.users -= 1
        self.ioas = new

    # ---- pages

    def _range(self, iova: int, length: int) -> tuple[Ioas, int]:
        """The IOAS, and the last IOVA of a range in it. :raises SysError: EINVAL, EOVERFLOW, ENOENT."""
        if not length:
            raise SysError(errno.EINVAL, "an access to nothing")
        if iova + length - 1 > ULONG_MAX:
            raise SysError(errno.EOVERFLOW, f"iova {iova:#x} + {length:#x}")
        if self.ioas is None:
            raise SysError(errno.ENOENT, f"access {self.id} is attached to no IOAS")
        return self.ioas, iova + length - 1

    @staticmethod
    def _may(area: Area, *, write: bool) -> None:
        """check_area_prot, and no area that is about to go. :raises SysError: EINVAL, EPERM."""
        if area.prevent_access:
            raise SysError(errno.EINVAL, f"the area at {area.iova:#x} is about to be unmapped")
        if not area.prot & (PROT_W if write else PROT_R):
            what = "written" if write else "read"
            raise SysError(errno.EPERM, f"the area at {area.iova:#x} is not mapped to be {what}")

    def pin_pages(self, iova: int, length: int, *, write: bool = False) -> I64:
        """Pin what is mapped at [iova, iova + length) (iommufd_access_pin_pages): the PFN of each page.

        :raises SysError: EINVAL: not in pages, or about to be unmapped; EOVERFLOW; ENOENT: a hole, or
            attached to nothing; EPERM; EFAULT, ENOMEM: no such memory. Nothing is pinned then.
        """
        if self.iova_alignment != FRAME_BYTES:
            self.iommufd.kernel.warn(f"access {self.id} was not made to pin pages")
            raise SysError(errno.EINVAL, f"access {self.id} was not made to pin pages: needs_pin_pages")
        ioas, last = self._range(iova, length)
        pfns: list[I64] = []
        held: list[tuple[Area, int, int]] = []
        try:
            for area, at, end in ioas.contiguous(iova, last):
                # iopt_area_contig_is_aligned: the range may begin and end inside of a page nowhere but at its
                # own end
                beyond = area.start_byte + area.length if end != last else 0
                if (area.start_byte + at - area.iova) % FRAME_BYTES or beyond % FRAME_BYTES:
                    raise SysError(errno.EINVAL, f"iova {at:#x} ... {end:#x} are not whole pages")
                self._may(area, write=write)
                pages = area.pages_in(at, end)
                pfns.append(area.pages.hold(*pages))
                area.accesses += 1
                area.locks += self.ops is None
                held.append((area, *pages))
        except SysError:
            for each in held:
                self._let_go(*each)
            raise
        return np.concatenate(pfns)

    def unpin_pages(self, iova: int, length: int) -> None:
        """Undo one :meth:`pin_pages` of exactly this range (iommufd_access_unpin_pages)."""
        if self.ioas is None or not length:
            self.iommufd.kernel.warn(
                f"access {self.id}: unpin of {iova:#x} + {length:#x}, attached to nothing"
            )
            return
        try:
            for area, at, end in self.ioas.contiguous(iova, iova + length - 1):
                self._let_go(area, *area.pages_in(at, end))
        except SysError as error:
            self.iommufd.kernel.warn(f"access {self.id}: unpin of {iova:#x} + {length:#x}: {error}")

    def _let_go(self, area: Area, first: int, last: int) -> None:
        """iopt_area_remove_access."""
        if not area.pages.let_go(first, last):
            self.iommufd.kernel.warn(f"access {self.id}: pages {first} ... {last} are not pinned")
            return
        area.accesses -= 1
        area.locks -= self.ops is None

    # ---- bytes

    def read(self, caller: Process, iova: int, length: int, *, slow: bool = False) -> bytes:
        """Bytes at [iova, iova + length) (iommufd_access_rw).

        :param caller: the process whose call this is: its own memory is read by hva, as any of its system
            calls does, that of others and of files page by page. :param slow: page by page in any case.
        :raises SysError: EINVAL: nothing, or about to be unmapped; EOVERFLOW; ENOENT: a hole, or attached to
            nothing; EPERM; EFAULT, ENOMEM: no such memory.
        """
        ioas, last = self._range(iova, length)
        out = []
        for area, at, end in ioas.contiguous(iova, last):
            self._may(area, write=False)
            out.append(area.pages.read(caller, area.start_byte + at - area.iova, end - at + 1, slow=slow))
        return b"".join(out)

    def write(self, caller: Process, iova: int, data: bytes, *, slow: bool = False) -> None:
        """Store bytes, as :meth:`read` finds them. Areas before one that refuses are written all the same."""
        ioas, last = self._range(iova, len(data))
        for area, at, end in ioas.contiguous(iova, last):
            self._may(area, write=True)
            part = data[at - iova : end - iova + 1]
            area.pages.write(caller, area.start_byte + at - area.iova, part, slow=slow)
