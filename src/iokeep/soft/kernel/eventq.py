# SPDX-License-Identifier: Apache-2.0
"""Queues of events that user space reads from a descriptor (drivers/iommu/iommufd/eventq.c): page faults."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from iokeep.soft.kernel.files import File, Ioctl
from iokeep.soft.kernel.objects import IommufdObject
from iokeep.soft.kernel.syserror import SysError
from iokeep.uapi import iommufd as uapi

if TYPE_CHECKING:
    from iokeep.soft.kernel.iommufd import Iommufd
    from iokeep.soft.kernel.kernel import Kernel


class FaultQueue(IommufdObject):
    """A fault object; no device of this platform has PRI, so it stays empty."""

    type_name = "fault"

    def __init__(self, iommufd: Iommufd) -> None:
        super().__init__(iommufd)

    def destroy(self) -> None:
        """Nothing is in it."""


class FaultFile(File):
    """The descriptor of a fault queue: reads give nothing, since no fault ever comes."""

    kind_name = "iommufd fault queue"

    def __init__(self, kernel: Kernel, queue: FaultQueue) -> None:
        super().__init__(kernel, "[iommufd-pgfault]")
        self._queue = queue
        queue.users += 1
        queue.iommufd.get()

    def release(self) -> None:
        """Lets the object go."""
        self._queue.users -= 1
        self._queue.iommufd.put()


def iommufd_fault_alloc(ictx: Iommufd, call: Ioctl, cmd: uapi.iommu_fault_alloc) -> None:
    """IOMMU_FAULT_QUEUE_ALLOC."""
    if cmd.flags:
        raise SysError(errno.EOPNOTSUPP, f"fault queue flags {cmd.flags:#x}")
    queue = FaultQueue(ictx)
    cmd.out_fault_fd = call.process.install(FaultFile(ictx.kernel, queue))
    cmd.out_fault_id = ictx.add(queue)
    call.respond(cmd)
