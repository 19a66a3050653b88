# SPDX-License-Identifier: Apache-2.0
"""HWPTs: a domain that shows one IOAS (drivers/iommu/iommufd/hw_pagetable.c)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from iokeep.soft.kernel.objects import IommufdObject
from iokeep.soft.kernel.syserror import SysError
from iokeep.uapi import iommufd as uapi

if TYPE_CHECKING:
    from iokeep.soft.kernel.device import IommufdDevice
    from iokeep.soft.kernel.ioas import Ioas
    from iokeep.soft.kernel.iommu import Domain
    from iokeep.soft.kernel.iommufd import Iommufd

_VALID_FLAGS = (
    uapi.IOMMU_HWPT_ALLOC_NEST_PARENT
    | uapi.IOMMU_HWPT_ALLOC_DIRTY_TRACKING
    | uapi.IOMMU_HWPT_FAULT_ID_VALID
    | uapi.IOMMU_HWPT_ALLOC_PASID
)


class HwptPaging(IommufdObject):
    """A paging HWPT. It holds a user of its IOAS; each attached device holds a user of it.

    :param auto_domain: made by an attach to an IOAS; it goes with its last device.
    :param domain: its table; ``adopted`` says that the table holds the areas already.
    """

    type_name = "hwpt"

    def __init__(self, iommufd: Iommufd, ioas: Ioas, domain: Domain, *, auto_domain: bool = False) -> None:
        super().__init__(iommufd)
        self.ioas = ioas
        self.domain = domain
        self.auto_domain = auto_domain
        self.devices: list[IommufdDevice] = []
        self.fault: IommufdObject | None = None
        #: made with IOMMU_HWPT_ALLOC_PASID: a PASID may be attached to it, and beside it
        self.pasid_compat = False
        ioas.users += 1

    @classmethod
    def alloc(
        cls, ioas: Ioas, idev: IommufdDevice, flags: int, *, data_type: int, immediate: bool
    ) -> HwptPaging:
        """iommufd_hwpt_paging_alloc: a domain for the device's IOMMU, filled with the areas of ``ioas``; it
        is listed.

        :param immediate: an automatic domain: the device is attached before it is filled.
        :raises SysError: EOPNOTSUPP; what attach and fill refuse.
        """
        iommufd = ioas.iommufd
        if flags & ~_VALID_FLAGS:
            raise SysError(errno.EOPNOTSUPP, f"HWPT_ALLOC flags {flags:#x}")
        dirty = bool(flags & uapi.IOMMU_HWPT_ALLOC_DIRTY_TRACKING)
        if dirty and not idev.iommu.tracks_dirty(idev.dev):
            raise SysError(errno.EOPNOTSUPP, "this IOMMU has no dirty tracking")
        if flags & uapi.IOMMU_HWPT_FAULT_ID_VALID and flags & uapi.IOMMU_HWPT_ALLOC_NEST_PARENT:
            raise SysError(errno.EOPNOTSUPP, "a nesting parent cannot have a fault queue")
        # intel_iommu_domain_alloc_paging_flags; no driver here has nested domains
        if flags & uapi.IOMMU_HWPT_ALLOC_NEST_PARENT:
            raise SysError(errno.EOPNOTSUPP, "this IOMMU has no nested translation")
        if data_type != uapi.IOMMU_HWPT_DATA_NONE:
            raise SysError(errno.EOPNOTSUPP, f"HWPT_ALLOC of a paging domain with data of type {data_type}")
        hwpt = cls(iommufd, ioas, idev.iommu.alloc_domain(dirty=dirty), auto_domain=immediate)
        # the id is taken before anything can be given back: a replace lets the old HWPT go later
        iommufd.add(hwpt)
        hwpt.pasid_compat = bool(flags & uapi.IOMMU_HWPT_ALLOC_PASID)
        attached = False
        try:
            if immediate:
                idev.attach_hwpt(hwpt)
                attached = True
            ioas.add_domain(hwpt.domain)
        except SysError:
            if attached:
                idev.detach_hwpt()
            hwpt.abort()
            raise
        ioas.hwpts.append(hwpt)
        return hwpt

    def abort(self) -> None:
        """Undo an allocation that was not finished."""
        self.iommufd.unlist(self)
        self.domain.free()
        self.ioas.users -= 1

    def destroy(self) -> None:
        """iommufd_hwpt_paging_destroy: take the areas out of the domain, free it, let the IOAS go."""
        if self.devices:
            raise AssertionError(f"HWPT {self.id} destroyed with devices attached")
        self.ioas.hwpts.remove(self)
        self.ioas.remove_domain(self.domain)
        self.domain.free()
        self.ioas.users -= 1
        if self.fault is not None:
            self.fault.users -= 1
