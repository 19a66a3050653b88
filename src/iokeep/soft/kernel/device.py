# SPDX-License-Identifier: Apache-2.0
"""Devices of an iommufd: bind, attach, replace, detach (drivers/iommu/iommufd/device.c).

Every device is the only one of its IOMMU group, as ACS makes it.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from iokeep.soft.kernel.hwpt import Hwpt, HwptPaging
from iokeep.soft.kernel.ioas import Ioas
from iokeep.soft.kernel.objects import IommufdObject
from iokeep.soft.kernel.syserror import SysError

if TYPE_CHECKING:
    from iokeep.soft.kernel.iommu import Domain, Iommu, PciDevice
    from iokeep.soft.kernel.iommufd import Iommufd
    from iokeep.soft.kernel.nesting import NestedDomain
    from iokeep.soft.kernel.viommu import Vdevice


class IommufdDevice(IommufdObject):
    """A device bound to an iommufd (struct iommufd_device). The driver that bound it is a user of it.

    ``preserved``: a live update session holds it, its attachment cannot change (EBUSY).
    """

    type_name = "device"

    def __init__(self, iommufd: Iommufd, dev: PciDevice) -> None:
        super().__init__(iommufd)
        self.dev = dev
        self.hwpt: Hwpt | None = None
        #: PASID -> HWPT
        self.pasids: dict[int, Hwpt] = {}
        self.preserved = False
        #: what a guest knows it as
        self.vdevice: Vdevice | None = None

    @property
    def iommu(self) -> Iommu:
        """The driver of the IOMMU that translates for the device."""
        return self.iommufd.kernel.iommu

    @classmethod
    def bind(cls, iommufd: Iommufd, dev: PciDevice) -> IommufdDevice:
        """iommufd_device_bind: the iommufd owns the device's DMA from now on. :raises SysError: EBUSY."""
        if dev.owner is not None:
            raise SysError(errno.EBUSY, f"{dev.name}: its DMA belongs to another iommufd")
        idev = cls(iommufd, dev)
        dev.owner = iommufd
        iommufd.get()
        idev.users += 1
        iommufd.add(idev)
        return idev

    def unbind(self) -> None:
        """iommufd_device_unbind."""
        iommufd = self.iommufd
        self.pre_destroy()
        self.users -= 1
        iommufd.remove(self.id)
        iommufd.put()

    def pre_destroy(self) -> None:
        """iommufd_device_pre_destroy: its vdevice goes first."""
        if self.vdevice is not None:
            self.iommufd.bury(self.vdevice.id)

    def destroy(self) -> None:
        """Give the DMA ownership back."""
        self.dev.owner = None

    # ---- attachment

    def attach(self, pt_id: int) -> int:
        """Attach to an HWPT, or to an IOAS (an automatic HWPT); the HWPT's id.

        A device that is attached already is moved without a gap (iommufd_device_replace).

        :raises SysError: ENOENT, EINVAL, EBUSY, what attach and fill refuse; nothing changed then.
        """
        target = self.target(pt_id)
        if isinstance(target, Hwpt):
            self._change(target)
            return target.id
        return self._auto_domain(target)

    def target(self, pt_id: int) -> Hwpt | Ioas:
        """What a device can be attached to. :raises SysError: ENOENT, EINVAL; EBUSY: nothing may change."""
        if self.preserved:
            raise SysError(errno.EBUSY, f"{self.dev.name} is preserved, its attachment cannot change")
        target = self.iommufd.find(pt_id)
        if not isinstance(target, Hwpt | Ioas):
            raise SysError(errno.EINVAL, f"{target.type_name} {pt_id} is neither an IOAS nor an HWPT")
        return target

    def attach_pasid(self, pasid: int, pt_id: int) -> int:
        """Attach a PASID above 0 to an HWPT made for PASIDs, or move it to another; the HWPT's id.

        :raises SysError: EINVAL: the HWPT, an automatic one, or that of the device itself takes no PASIDs, or
            the device has none so high; what the driver refuses. Nothing changed then.
        """
        hwpt = self.target(pt_id)
        old = self.pasids.get(pasid)
        if hwpt is old:
            return hwpt.id
        if not isinstance(hwpt, Hwpt) or not hwpt.pasid_compat:
            raise SysError(errno.EINVAL, f"{hwpt.type_name} {pt_id} was not made for PASIDs")
        if self.hwpt is not None and not self.hwpt.pasid_compat:
            raise SysError(errno.EINVAL, f"{self.dev.name} is on HWPT {self.hwpt.id}, not made for PASIDs")
        self._set_pasid(pasid, hwpt.domain)
        hwpt.users += 1
        self.users += 1
        self._leave_pasid(pasid)
        self.pasids[pasid] = hwpt
        return hwpt.id

    def detach_pasid(self, pasid: int) -> None:
        """Take a PASID off its HWPT; nothing happens where it is on none."""
        if pasid in self.pasids:
            self._set_pasid(pasid, None)
            self._leave_pasid(pasid)

    def _set_pasid(self, pasid: int, domain: Domain | NestedDomain | None) -> None:
        """__iommu_set_group_pasid: where a device has no PASIDs, the attachment is only noted."""
        if self.dev.max_pasids:
            if pasid >= self.dev.max_pasids:
                raise SysError(errno.EINVAL, f"{self.dev.name} has PASIDs below {self.dev.max_pasids:#x}")
            self.iommu.set_pasid(self.dev, pasid, domain)

    def _leave_pasid(self, pasid: int) -> None:
        hwpt = self.pasids.pop(pasid, None)
        if hwpt is not None:
            self._answer_faults(hwpt, pasid)
            hwpt.users -= 1
            self.users -= 1

    def _answer_faults(self, left: Hwpt, handle: int = 0) -> None:
        """Nobody answers what came by an attachment that has ended."""
        if left.fault is not None:
            left.fault.answer_all(self, handle)

    def _change(self, hwpt: Hwpt) -> None:
        if self.hwpt is None:
            self.attach_hwpt(hwpt)
        else:
            self._replace(hwpt)

    def _auto_domain(self, ioas: Ioas) -> int:
        """iommufd_device_auto_get_domain: any automatic domain of the IOAS will do, else a new one."""
        for hwpt in ioas.hwpts:
            if hwpt.auto_domain:
                self._change(hwpt)
                return hwpt.id
        immediate = self.hwpt is None
        hwpt = HwptPaging.alloc(ioas, self, 0, data=None, immediate=immediate)
        if not immediate:
            try:
                self._replace(hwpt)
            except SysError:
                self.iommufd.remove(hwpt.id)
                raise
            hwpt.auto_domain = True
        return hwpt.id

    def _check(self, hwpt: Hwpt) -> None:
        """:raises SysError: EINVAL: a PASID is attached, and the HWPT is not made for them; what the driver
        says of a fault queue; modules refuse too.
        """
        if self.pasids and not hwpt.pasid_compat:
            raise SysError(errno.EINVAL, f"{self.dev.name} has PASIDs: HWPT {hwpt.id} is not made for them")
        if hwpt.fault is not None:
            self.iommu.enable_iopf(self.dev)
        for check in self.iommufd.kernel.attach_checks:
            check(self, hwpt)

    def _reserve(self, ioas: Ioas) -> None:
        """iopt_table_enforce_dev_resv_regions. :raises SysError: nothing is reserved then."""
        for wanted in self.iommu.RESERVED:
            try:
                ioas.reserve(wanted, self)
            except SysError:
                ioas.unreserve(self)
                raise

    def attach_hwpt(self, hwpt: Hwpt) -> None:
        """iommufd_hw_pagetable_attach for a device that is not attached."""
        kernel = self.iommufd.kernel
        ioas = hwpt.paging.ioas
        self._reserve(ioas)
        before = self.dev.domain
        try:
            self._check(hwpt)
            hwpt.attach_dev(self)
        except SysError:
            ioas.unreserve(self)
            raise
        hwpt.users += 1
        hwpt.devices.append(self)
        self.hwpt = hwpt
        self.users += 1
        for hook in kernel.attached_hooks:
            hook(self, hwpt, before)

    def _replace(self, hwpt: Hwpt) -> None:
        """iommufd_device_do_replace: the new domain takes over at one instant."""
        old = self.hwpt
        if old is None:
            raise AssertionError("replace of a device that is not attached")
        if hwpt is old:
            return
        kernel = self.iommufd.kernel
        ioas, left = hwpt.paging.ioas, old.paging.ioas
        if ioas is not left:
            self._reserve(ioas)
        before = self.dev.domain
        try:
            self._check(hwpt)
            hwpt.attach_dev(self)
        except SysError:
            if ioas is not left:
                ioas.unreserve(self)
            raise
        if ioas is not left:
            left.unreserve(self)
        hwpt.users += 1
        hwpt.devices.append(self)
        self.hwpt = hwpt
        old.devices.remove(self)
        self._answer_faults(old)
        for hook in kernel.attached_hooks:
            hook(self, hwpt, before)
        self._put(old)

    def detach(self) -> None:
        """iommufd_device_detach: DMA is blocked from now on. :raises SysError: EBUSY."""
        if self.preserved:
            raise SysError(errno.EBUSY, f"{self.dev.name} is preserved, its attachment cannot change")
        hwpt = self.detach_hwpt()
        if hwpt is not None:
            self._put(hwpt, dropped=True)

    def detach_hwpt(self) -> Hwpt | None:
        """Take the device off its HWPT, which keeps existing; the HWPT, whose user is dropped already."""
        hwpt = self.hwpt
        if hwpt is None:
            return None
        self.iommu.set_domain(self.dev, None)
        hwpt.devices.remove(self)
        self._answer_faults(hwpt)
        hwpt.paging.ioas.unreserve(self)
        hwpt.users -= 1
        self.hwpt = None
        self.users -= 1
        return hwpt

    def _put(self, hwpt: Hwpt, *, dropped: bool = False) -> None:
        """iommufd_hw_pagetable_put: an automatic domain goes with its last device."""
        if not dropped:
            hwpt.users -= 1
        if isinstance(hwpt, HwptPaging) and hwpt.auto_domain and hwpt.users == 1:
            self.iommufd.remove(hwpt.id)
