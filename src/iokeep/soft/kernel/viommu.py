# SPDX-License-Identifier: Apache-2.0
"""vIOMMUs: a slice of an IOMMU for one guest, its devices and queues (drivers/iommu/iommufd/viommu.c)."""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np

from iokeep.soft.kernel.access import Access
from iokeep.soft.kernel.files import Ioctl
from iokeep.soft.kernel.frames import FRAME_BYTES
from iokeep.soft.kernel.objects import IommufdObject
from iokeep.soft.kernel.pages import ULONG_MAX
from iokeep.soft.kernel.syserror import SysError
from iokeep.soft.kernel.userdata import UserArray, UserData
from iokeep.uapi import iommufd as uapi

if TYPE_CHECKING:
    from iokeep.soft.kernel.device import IommufdDevice
    from iokeep.soft.kernel.eventq import VeventQueue
    from iokeep.soft.kernel.hwpt import HwptPaging
    from iokeep.soft.kernel.iommu import Iommu, PciDevice
    from iokeep.soft.kernel.iommufd import Iommufd
    from iokeep.soft.kernel.nesting import NestedDomain


_INT_MAX = 2**31 - 1


class Viommu(IommufdObject, ABC):
    """A vIOMMU (struct iommufd_viommu), which a driver makes its own by a class of its own (struct
    iommufd_viommu_ops): what that class leaves out is refused. It is a user of its nesting parent.

    :ivar vdevices: the guest's devices by the guest's numbers. :ivar event_queues: by type.
    """

    type_name = "viommu"

    def __init__(self, iommu: Iommu, parent: HwptPaging) -> None:
        super().__init__(parent.iommufd)
        self.iommu = iommu
        self.parent = parent
        self.vdevices: dict[int, Vdevice] = {}
        self.event_queues: dict[int, VeventQueue] = {}
        parent.users += 1

    @abstractmethod
    def init(self, data: UserData | None) -> None:
        """The driver's part of making it (viommu_init). :param data: what it is told, and may answer in.

        :raises SysError: there is no vIOMMU then, and :meth:`release` is not called.
        """

    def alloc_nested(self, flags: int, data: UserData) -> NestedDomain:
        """A guest's translation for devices of this vIOMMU. :raises SysError: EOPNOTSUPP; the driver's."""
        raise SysError(errno.EOPNOTSUPP, f"vIOMMU {self.id} has no nested HWPTs")

    def cache_invalidate(self, array: UserArray) -> None:
        """Forget what is cached for the guest.

        :raises SysError: EOPNOTSUPP; what the driver refuses, with ``array.done`` set.
        """
        raise SysError(errno.EOPNOTSUPP, f"vIOMMU {self.id} has no caches that a guest may flush")

    def hw_queue_class(self, queue_type: int) -> type[HwQueue] | None:
        """What a hardware queue of this type is (get_hw_queue_size); None: there is none."""
        return None

    def release(self) -> None:
        """It goes: give back what the driver took."""

    def virt_id(self, dev: PciDevice) -> int:
        """What the guest calls a device (iommufd_viommu_get_vdev_id). :raises SysError: ENOENT."""
        for virt_id, vdevice in sorted(self.vdevices.items()):
            if vdevice.idev.dev is dev:
                return virt_id
        raise SysError(errno.ENOENT, f"vIOMMU {self.id} has no such device")

    def report_event(self, event_type: int, data: bytes) -> None:
        """iommufd_viommu_report_event. :raises SysError: EOPNOTSUPP: nobody asked for events of this type."""
        queue = self.event_queues.get(event_type)
        if queue is None:
            raise SysError(
                errno.EOPNOTSUPP, f"vIOMMU {self.id} has no queue for events of type {event_type:#x}"
            )
        queue.add(data)

    def destroy(self) -> None:
        """iommufd_viommu_destroy."""
        self.release()
        self.parent.users -= 1


class Vdevice(IommufdObject):
    """A device as a guest knows it (struct iommufd_vdevice): a user of its vIOMMU. Goes with its device."""

    type_name = "vdevice"

    def __init__(self, viommu: Viommu, idev: IommufdDevice, virt_id: int) -> None:
        super().__init__(viommu.iommufd)
        self.viommu = viommu
        self.idev = idev
        self.virt_id = virt_id
        viommu.users += 1
        viommu.vdevices[virt_id] = self
        idev.vdevice = self

    def destroy(self) -> None:
        """iommufd_vdevice_destroy."""
        del self.viommu.vdevices[self.virt_id]
        self.idev.vdevice = None
        self.viommu.users -= 1


class HwQueue(IommufdObject, ABC):
    """A queue in the memory of a guest that hardware reads by itself (struct iommufd_hw_queue): a user of its
    vIOMMU. Its pages stay pinned, and so mapped, as long as it is there.
    """

    type_name = "hw_queue"

    def __init__(self, viommu: Viommu, iova: int, length: int) -> None:
        super().__init__(viommu.iommufd)
        self.viommu = viommu
        self.iova = iova
        self._access: Access | None = None
        # in whole pages
        self._start = iova // FRAME_BYTES * FRAME_BYTES
        self._length = -(-(iova - self._start + length) // FRAME_BYTES) * FRAME_BYTES
        viommu.users += 1

    @abstractmethod
    def init(self, index: int, base_pa: int) -> None:
        """The driver's part of making it (hw_queue_init_phys): where it is in memory. :raises SysError: there
        is no queue then, and :meth:`release` is not called.
        """

    @abstractmethod
    def release(self) -> None:
        """Hardware stops reading it."""

    def pin(self) -> int:
        """iommufd_hw_queue_alloc_phys: pin its pages; the pa of the queue.

        :raises SysError: ERANGE, ENOMEM: too long; EADDRINUSE: its IOAS has areas that are no whole pages;
            ENOENT, EPERM: not mapped to be read; EFAULT: not in consecutive frames.
        """
        if self._length > ULONG_MAX:
            raise SysError(errno.ERANGE, f"hardware queue of {self._length:#x} bytes")
        # an array of pointers to the pages, which kvmalloc does not give beyond INT_MAX bytes
        if self._length // FRAME_BYTES * 8 > _INT_MAX:
            raise SysError(errno.ENOMEM, f"hardware queue of {self._length:#x} bytes")
        access = Access.create(self.iommufd, None)
        try:
            access.attach_to(self.viommu.parent.ioas)
            pfns = access.pin_pages(self._start, self._length)
        except SysError:
            access.close()
            raise
        self._access = access
        if (np.diff(pfns) != 1).any():
            raise SysError(errno.EFAULT, f"the frames at {self._start:#x} are not consecutive")
        return int(pfns[0]) * FRAME_BYTES + self.iova - self._start

    def unpin(self) -> None:
        """Let the pages and the vIOMMU go."""
        if self._access is not None:
            self._access.unpin_pages(self._start, self._length)
            self._access.close()
        self.viommu.users -= 1

    def destroy(self) -> None:
        """iommufd_hw_queue_destroy."""
        self.release()
        self.unpin()


def iommufd_viommu_alloc_ioctl(ictx: Iommufd, call: Ioctl, cmd: uapi.iommu_viommu_alloc) -> None:
    """IOMMU_VIOMMU_ALLOC."""
    if cmd.flags or cmd.type == uapi.IOMMU_VIOMMU_TYPE_DEFAULT:
        raise SysError(errno.EOPNOTSUPP, f"vIOMMU of type {cmd.type}, flags {cmd.flags:#x}")
    idev = ictx.device(cmd.dev_id)
    kind = idev.iommu.viommu_class(idev.dev, cmd.type)
    if kind is None:
        raise SysError(errno.EOPNOTSUPP, f"this IOMMU has no vIOMMU of type {cmd.type:#x}")
    parent = ictx.hwpt(cmd.hwpt_id)
    if not parent.nest_parent:
        raise SysError(errno.EINVAL, f"HWPT {parent.id} is no nesting parent")
    viommu = kind(idev.iommu, parent)
    ictx.add(viommu)
    data = UserData(call.process, cmd.type, cmd.data_uptr, cmd.data_len)
    try:
        viommu.init(data if data.length else None)
    except SysError:
        ictx.unlist(viommu)
        parent.users -= 1
        raise
    cmd.out_viommu_id = viommu.id
    call.respond(cmd)


def iommufd_vdevice_alloc_ioctl(ictx: Iommufd, call: Ioctl, cmd: uapi.iommu_vdevice_alloc) -> None:
    """IOMMU_VDEVICE_ALLOC."""
    viommu = ictx.viommu(cmd.viommu_id)
    idev = ictx.device(cmd.dev_id)
    if idev.iommu is not viommu.iommu:
        raise SysError(errno.EINVAL, f"{idev.dev.name} is behind another IOMMU than vIOMMU {viommu.id}")
    if idev.vdevice is not None:
        raise SysError(errno.EEXIST, f"{idev.dev.name} is vdevice {idev.vdevice.id} already")
    if cmd.virt_id in viommu.vdevices:
        raise SysError(errno.EEXIST, f"vIOMMU {viommu.id} has a device {cmd.virt_id:#x} already")
    cmd.out_vdevice_id = ictx.add(Vdevice(viommu, idev, cmd.virt_id))
    call.respond(cmd)


def iommufd_hw_queue_alloc_ioctl(ictx: Iommufd, call: Ioctl, cmd: uapi.iommu_hw_queue_alloc) -> None:
    """IOMMU_HW_QUEUE_ALLOC."""
    if cmd.flags or cmd.type == uapi.IOMMU_HW_QUEUE_TYPE_DEFAULT:
        raise SysError(errno.EOPNOTSUPP, f"hardware queue of type {cmd.type}, flags {cmd.flags:#x}")
    if not cmd.length:
        raise SysError(errno.EINVAL, "hardware queue of no length")
    if cmd.nesting_parent_iova + cmd.length - 1 > ULONG_MAX:
        raise SysError(errno.EOVERFLOW, f"iova {cmd.nesting_parent_iova:#x} + {cmd.length:#x}")
    viommu = ictx.viommu(cmd.viommu_id)
    kind = viommu.hw_queue_class(cmd.type)
    if kind is None:
        raise SysError(errno.EOPNOTSUPP, f"vIOMMU {viommu.id} has no hardware queues of type {cmd.type:#x}")
    queue = kind(viommu, cmd.nesting_parent_iova, cmd.length)
    ictx.add(queue)
    try:
        queue.init(cmd.index, queue.pin())
    except SysError:
        ictx.unlist(queue)
        queue.unpin()
        raise
    cmd.out_hw_queue_id = queue.id
    call.respond(cmd)
