# SPDX-License-Identifier: Apache-2.0
"""What only some IOMMU drivers do: a guest's own translation on top of a paging domain, PASIDs, page faults.

Follows include/linux/iommu.h of Linux 7.3 (IOMMU_DOMAIN_NESTED; optional members of struct iommu_ops). No
IOMMU of the software host does any of it: its drivers refuse, and modules bring drivers that do.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from iokeep.soft.kernel.syserror import SysError
from iokeep.soft.kernel.userdata import UserArray, UserData

if TYPE_CHECKING:
    from iokeep.soft.kernel.iommu import Domain, PciDevice
    from iokeep.soft.kernel.viommu import Viommu


class NestedDomain(ABC):
    """A guest's tables, in the guest's memory, on top of a paging domain: iommufd maps nothing in it."""

    @abstractmethod
    def attach_dev(self, dev: PciDevice) -> None:
        """It translates for ``dev`` from now on. :raises SysError: nothing changed."""

    @abstractmethod
    def free(self) -> None:
        """No device is on it any more."""

    def cache_invalidate(self, array: UserArray) -> None:
        """Forget what hardware has cached of the guest's tables (cache_invalidate_user), where a driver can.

        :raises SysError: EOPNOTSUPP; what the driver refuses, with ``array.done`` set.
        """
        raise SysError(errno.EOPNOTSUPP, "this driver has no caches that a guest may flush")


class GuestOps:
    """The part of a driver that guests and their devices ask for; as it stands here, of one that has none."""

    #: Linux's driver of it has domain_alloc_nested: the parent is what an HWPT on an HWPT is refused for
    HAS_NESTED_DOMAINS: ClassVar[bool] = False
    #: guests keep the PASID table of a device that is on a nested HWPT (user_pasid_table)
    USER_PASID_TABLE: ClassVar[bool] = False

    def alloc_nested(self, dev: PciDevice, parent: Domain, flags: int, data: UserData) -> NestedDomain:
        """A guest's translation on top of ``parent`` (domain_alloc_nested), where ``HAS_NESTED_DOMAINS``.

        :raises SysError: what the driver refuses.
        """
        raise AssertionError(f"{dev.name}: no domain of its IOMMU is a nesting parent")

    def viommu_class(self, dev: PciDevice, viommu_type: int) -> type[Viommu] | None:
        """What a vIOMMU of this type is, for ``dev`` (get_viommu_size); None: there is none."""
        return None

    def set_pasid(self, dev: PciDevice, pasid: int, domain: Domain | NestedDomain | None) -> None:
        """What translates DMA of ``dev`` with a PASID below its ``max_pasids``; None blocks it.

        :raises SysError: what the driver refuses; nothing changed.
        """
        raise AssertionError(f"{dev.name}: no device of a platform has PASIDs")

    def enable_iopf(self, dev: PciDevice) -> None:
        """Before ``dev`` gets a domain with a fault queue.

        :raises SysError: ENODEV: no device of a platform has PRI (intel_iommu_enable_iopf).
        """
        raise SysError(errno.ENODEV, f"{dev.name} has no PRI")

    def page_response(self, dev: PciDevice, pasid: int, grpid: int, code: int) -> None:
        """The answer to a page request of ``dev`` (IOMMUFD_PAGE_RESP_*)."""
        raise AssertionError(f"{dev.name} has no PRI, and no page request to answer")
