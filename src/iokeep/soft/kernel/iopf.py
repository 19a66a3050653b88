# SPDX-License-Identifier: Apache-2.0
"""IO page faults of devices on their way to who handles them (drivers/iommu/io-pgfault.c)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iokeep.soft.kernel.eventq import Fault
from iokeep.soft.kernel.hwpt import HwptNested
from iokeep.uapi import iommufd as uapi

if TYPE_CHECKING:
    from iokeep.soft.kernel.device import IommufdDevice
    from iokeep.soft.kernel.hwpt import Hwpt


def _handler(idev: IommufdDevice, pasid: int) -> tuple[int, Hwpt | None]:
    """find_fault_handler: (the PASID whose attachment takes the fault, its HWPT).

    Where a guest keeps the PASID table, faults of all its PASIDs go to the nested HWPT of the device itself.
    """
    if pasid and pasid in idev.pasids:
        return pasid, idev.pasids[pasid]
    if pasid and not (idev.iommu.USER_PASID_TABLE and isinstance(idev.hwpt, HwptNested)):
        return pasid, None
    return 0, idev.hwpt


def report_fault(idev: IommufdDevice, pasid: int, grpid: int, perm: int, iova: int) -> None:
    """iommu_report_device_fault of the last page request of a group; where nobody handles it, the device is
    told so at once.

    :param pasid: 0: a request without. :param perm: IOMMU_PGFAULT_PERM_*.
    """
    handle, hwpt = _handler(idev, pasid)
    flags = uapi.IOMMU_PGFAULT_FLAGS_LAST_PAGE | (uapi.IOMMU_PGFAULT_FLAGS_PASID_VALID if pasid else 0)
    message = uapi.iommu_hwpt_pgfault(
        flags=flags, dev_id=idev.id, pasid=pasid, grpid=grpid, perm=perm, addr=iova
    )
    fault = Fault(idev, handle, message)
    if hwpt is None or hwpt.fault is None:
        fault.respond(uapi.IOMMUFD_PAGE_RESP_INVALID)
    else:
        hwpt.fault.add(fault)
