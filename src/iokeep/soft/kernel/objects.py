# SPDX-License-Identifier: Apache-2.0
"""Objects of an iommufd: ids, users, and the order in which they may go (drivers/iommu/iommufd/main.c)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from iokeep.soft.kernel.frames import Claim
    from iokeep.soft.kernel.iommufd import Iommufd


class IommufdObject:
    """One object of an iommufd (struct iommufd_object).

    ``users`` counts who needs it, the table of objects itself included: 1 = nobody else. ``id`` is 0 until
    the iommufd lists it.
    """

    type_name: ClassVar[str] = "object"

    def __init__(self, iommufd: Iommufd) -> None:
        self.iommufd = iommufd
        self.id = 0
        self.users = 1

    def destroy(self) -> None:
        """Undo everything; called when it is out of the table and has no users."""
        raise NotImplementedError

    def claims(self) -> Iterable[Claim]:
        """Frames that it holds."""
        return ()
