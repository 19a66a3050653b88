# SPDX-License-Identifier: Apache-2.0
"""What iommufd needs of an IOMMU driver that puts a guest's own translation on top of a paging domain.

Follows include/linux/iommu.h of Linux 7.3 (a domain of type IOMMU_DOMAIN_NESTED). No IOMMU of the software
host nests: its drivers refuse, and modules bring drivers that do.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from iokeep.soft.kernel.syserror import SysError
from iokeep.soft.kernel.userdata import UserArray

if TYPE_CHECKING:
    from iokeep.soft.kernel.iommu import PciDevice


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
