# SPDX-License-Identifier: Apache-2.0
"""HWPTs: a domain that shows an IOAS, or a guest's own on top (drivers/iommu/iommufd/hw_pagetable.c)."""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING

from iokeep.soft.kernel.eventq import FaultQueue
from iokeep.soft.kernel.files import Ioctl
from iokeep.soft.kernel.frames import FRAME_BYTES
from iokeep.soft.kernel.ioas import Ioas
from iokeep.soft.kernel.objects import IommufdObject
from iokeep.soft.kernel.pages import ULONG_MAX
from iokeep.soft.kernel.syserror import SysError
from iokeep.soft.kernel.userdata import UserArray, UserData
from iokeep.soft.kernel.viommu import Viommu
from iokeep.uapi import iommufd as uapi

if TYPE_CHECKING:
    from iokeep.soft.kernel.device import IommufdDevice
    from iokeep.soft.kernel.iommu import Domain
    from iokeep.soft.kernel.iommufd import Iommufd
    from iokeep.soft.kernel.nesting import NestedDomain
    from iokeep.soft.kernel.process import Process

_VALID_FLAGS = (
    uapi.IOMMU_HWPT_ALLOC_NEST_PARENT
    | uapi.IOMMU_HWPT_ALLOC_DIRTY_TRACKING
    | uapi.IOMMU_HWPT_FAULT_ID_VALID
    | uapi.IOMMU_HWPT_ALLOC_PASID
)
_NESTED_FLAGS = uapi.IOMMU_HWPT_FAULT_ID_VALID | uapi.IOMMU_HWPT_ALLOC_PASID
#: IOMMU_HWPT_INVALIDATE_ENTRY_NUM_MAX
_MAX_INVALIDATIONS = 1 << 19


class Hwpt(IommufdObject):
    """What a device can be attached to (struct iommufd_hw_pagetable); each attached device is a user of it.

    ``domain``: what translates. ``fault``: where its IO page faults go. ``pasid_compat``: made with
    IOMMU_HWPT_ALLOC_PASID: a PASID may be attached to it, and beside it.
    """

    type_name = "hwpt"
    domain: Domain | NestedDomain

    def __init__(self, iommufd: Iommufd, *, pasid_compat: bool = False) -> None:
        super().__init__(iommufd)
        self.devices: list[IommufdDevice] = []
        self.fault: FaultQueue | None = None
        self.pasid_compat = pasid_compat

    @property
    def paging(self) -> HwptPaging:
        """The HWPT whose IOAS its DMA reaches in the end (find_hwpt_paging)."""
        raise NotImplementedError

    def attach_dev(self, idev: IommufdDevice) -> None:
        """The domain translates for the device from now on. :raises SysError: nothing changed."""
        raise NotImplementedError

    def set_fault(self, fault: FaultQueue) -> None:
        """Its faults go to this queue, which it is a user of."""
        fault.users += 1
        self.fault = fault

    def _free(self) -> None:
        """__iommufd_hwpt_destroy."""
        if self.devices:
            raise AssertionError(f"HWPT {self.id} destroyed with devices attached")
        self.domain.free()
        if self.fault is not None:
            self.fault.users -= 1


class HwptPaging(Hwpt):
    """A paging HWPT. It holds a user of its IOAS.

    :param auto_domain: made by an attach to an IOAS; it goes with its last device.
    :param domain: its table; ``adopted`` says that the table holds the areas already.
    """

    domain: Domain

    def __init__(self, iommufd: Iommufd, ioas: Ioas, domain: Domain, *, auto_domain: bool = False) -> None:
        super().__init__(iommufd)
        self.ioas = ioas
        self.domain = domain
        self.auto_domain = auto_domain
        #: made with IOMMU_HWPT_ALLOC_NEST_PARENT: nested HWPTs and vIOMMUs may stand on it
        self.nest_parent = False
        ioas.users += 1

    @property
    def paging(self) -> HwptPaging:
        """See :class:`Hwpt`."""
        return self

    @classmethod
    def alloc(
        cls, ioas: Ioas, idev: IommufdDevice, flags: int, *, data: UserData | None, immediate: bool
    ) -> HwptPaging:
        """iommufd_hwpt_paging_alloc: a domain for the device's IOMMU, filled with the areas of ``ioas``; it
        is listed.

        :param data: what its driver is told about it.
        :param immediate: an automatic domain: the device is attached before it is filled.
        :raises SysError: EOPNOTSUPP; what the driver, attach and fill refuse.
        """
        iommufd = ioas.iommufd
        if flags & ~_VALID_FLAGS:
            raise SysError(errno.EOPNOTSUPP, f"HWPT_ALLOC flags {flags:#x}")
        if flags & uapi.IOMMU_HWPT_ALLOC_DIRTY_TRACKING and not idev.iommu.tracks_dirty(idev.dev):
            raise SysError(errno.EOPNOTSUPP, "this IOMMU has no dirty tracking")
        if flags & uapi.IOMMU_HWPT_FAULT_ID_VALID and flags & uapi.IOMMU_HWPT_ALLOC_NEST_PARENT:
            raise SysError(errno.EOPNOTSUPP, "a nesting parent cannot have a fault queue")
        domain = idev.iommu.alloc_paging(idev.dev, flags & ~uapi.IOMMU_HWPT_FAULT_ID_VALID, data)
        hwpt = cls(iommufd, ioas, domain, auto_domain=immediate)
        # the id is taken before anything can be given back: a replace lets the old HWPT go later
        iommufd.add(hwpt)
        hwpt.pasid_compat = bool(flags & uapi.IOMMU_HWPT_ALLOC_PASID)
        hwpt.nest_parent = bool(flags & uapi.IOMMU_HWPT_ALLOC_NEST_PARENT)
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

    def attach_dev(self, idev: IommufdDevice) -> None:
        """See :class:`Hwpt`."""
        idev.iommu.set_domain(idev.dev, self.domain)

    def abort(self) -> None:
        """Undo an allocation that was not finished."""
        self.iommufd.unlist(self)
        self.domain.free()
        self.ioas.users -= 1

    def destroy(self) -> None:
        """iommufd_hwpt_paging_destroy: take the areas out of the domain, free it, let the IOAS go."""
        self.ioas.hwpts.remove(self)
        self.ioas.remove_domain(self.domain)
        self._free()
        self.ioas.users -= 1


class HwptNested(Hwpt):
    """A guest's translation on top of a nesting parent. It is a user of the parent, or of the vIOMMU by which
    it was made.
    """

    domain: NestedDomain

    def __init__(self, base: HwptPaging | Viommu, domain: NestedDomain, *, pasid_compat: bool) -> None:
        super().__init__(base.iommufd, pasid_compat=pasid_compat)
        self._base = base
        self.parent = base.parent if isinstance(base, Viommu) else base
        self.domain = domain
        base.users += 1
        base.iommufd.add(self)

    @property
    def paging(self) -> HwptPaging:
        """See :class:`Hwpt`."""
        return self.parent

    @classmethod
    def alloc(cls, parent: HwptPaging, idev: IommufdDevice, flags: int, data: UserData) -> HwptNested:
        """iommufd_hwpt_nested_alloc; it is listed.

        :raises SysError: EOPNOTSUPP; EINVAL: the parent was not made for it; what the driver refuses.
        """
        iommu = idev.iommu
        if flags & ~_NESTED_FLAGS or not data.length or not iommu.HAS_NESTED_DOMAINS:
            raise SysError(errno.EOPNOTSUPP, f"nested HWPT: flags {flags:#x}, {data.length} bytes of data")
        if parent.auto_domain or not parent.nest_parent or not iommu.owns(parent.domain):
            raise SysError(errno.EINVAL, f"HWPT {parent.id} is no nesting parent for {idev.dev.name}")
        domain = iommu.alloc_nested(idev.dev, parent.domain, flags & ~uapi.IOMMU_HWPT_FAULT_ID_VALID, data)
        return cls(parent, domain, pasid_compat=bool(flags & uapi.IOMMU_HWPT_ALLOC_PASID))

    @classmethod
    def alloc_on_viommu(cls, viommu: Viommu, idev: IommufdDevice, flags: int, data: UserData) -> HwptNested:
        """iommufd_viommu_alloc_hwpt_nested; it is listed.

        :raises SysError: EINVAL: the device is behind another IOMMU; EOPNOTSUPP; what the driver refuses.
        """
        if idev.iommu is not viommu.iommu:
            raise SysError(errno.EINVAL, f"{idev.dev.name} is behind another IOMMU than vIOMMU {viommu.id}")
        if flags & ~_NESTED_FLAGS or not data.length:
            raise SysError(errno.EOPNOTSUPP, f"nested HWPT: flags {flags:#x}, {data.length} bytes of data")
        domain = viommu.alloc_nested(flags & ~uapi.IOMMU_HWPT_FAULT_ID_VALID, data)
        return cls(viommu, domain, pasid_compat=bool(flags & uapi.IOMMU_HWPT_ALLOC_PASID))

    def attach_dev(self, idev: IommufdDevice) -> None:
        """See :class:`Hwpt`."""
        self.domain.attach_dev(idev.dev)

    def destroy(self) -> None:
        """iommufd_hwpt_nested_destroy."""
        self._free()
        self._base.users -= 1


# ---- ioctls


def iommufd_hwpt_alloc(ictx: Iommufd, call: Ioctl, cmd: uapi.iommu_hwpt_alloc) -> None:
    """IOMMU_HWPT_ALLOC."""
    if getattr(cmd, "__reserved"):
        raise SysError(errno.EOPNOTSUPP, "HWPT_ALLOC: __reserved is not 0")
    if (cmd.data_type == uapi.IOMMU_HWPT_DATA_NONE) != (cmd.data_len == 0):
        raise SysError(errno.EINVAL, f"HWPT data type {cmd.data_type} with {cmd.data_len} bytes")
    idev = ictx.device(cmd.dev_id)
    target = ictx.objects.get(cmd.pt_id)
    data = UserData(call.process, cmd.data_type, cmd.data_uptr, cmd.data_len)
    hwpt: Hwpt
    if isinstance(target, Ioas):
        hwpt = HwptPaging.alloc(target, idev, cmd.flags, data=data if data.length else None, immediate=False)
    elif isinstance(target, HwptPaging):
        hwpt = HwptNested.alloc(target, idev, cmd.flags, data)
    elif isinstance(target, Viommu):
        hwpt = HwptNested.alloc_on_viommu(target, idev, cmd.flags, data)
    else:
        raise SysError(errno.EINVAL, f"object {cmd.pt_id} is no IOAS, paging HWPT or vIOMMU")
    if cmd.flags & uapi.IOMMU_HWPT_FAULT_ID_VALID:
        fault = ictx.objects.get(cmd.fault_id)
        if not isinstance(fault, FaultQueue):
            ictx.remove(hwpt.id)
            raise SysError(errno.ENOENT, f"object {cmd.fault_id} is no fault queue")
        hwpt.set_fault(fault)
    cmd.out_hwpt_id = hwpt.id
    call.respond(cmd)


def iommufd_hwpt_set_dirty_tracking(
    ictx: Iommufd, call: Ioctl, cmd: uapi.iommu_hwpt_set_dirty_tracking
) -> None:
    """IOMMU_HWPT_SET_DIRTY_TRACKING; what was written before it begins does not count."""
    if cmd.flags & ~uapi.IOMMU_HWPT_DIRTY_TRACKING_ENABLE:
        raise SysError(errno.EOPNOTSUPP, f"dirty tracking flags {cmd.flags:#x}")
    hwpt = ictx.hwpt(cmd.hwpt_id)
    dirty = hwpt.domain.dirty
    if dirty is None:
        raise SysError(errno.EOPNOTSUPP, f"HWPT {hwpt.id} was not made for dirty tracking")
    enable = bool(cmd.flags & uapi.IOMMU_HWPT_DIRTY_TRACKING_ENABLE)
    if enable:
        for area in hwpt.ioas.areas:
            dirty.read(area.iova, area.last, clear=True)
    dirty.track(enable)


def iommufd_hwpt_get_dirty_bitmap(ictx: Iommufd, call: Ioctl, cmd: uapi.iommu_hwpt_get_dirty_bitmap) -> None:
    """IOMMU_HWPT_GET_DIRTY_BITMAP: sets bits, and clears none. As in Linux 7.3 a hole ends it and a bitmap
    that is not there takes nothing, and both go unsaid.
    """
    if cmd.flags & ~uapi.IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR or getattr(cmd, "__reserved"):
        raise SysError(errno.EOPNOTSUPP, f"dirty bitmap flags {cmd.flags:#x}")
    hwpt = ictx.hwpt(cmd.hwpt_id)
    if not cmd.length:
        raise SysError(errno.EINVAL, "dirty bitmap of nothing")
    last = cmd.iova + cmd.length - 1
    if last > ULONG_MAX:
        raise SysError(errno.EOVERFLOW, f"iova {cmd.iova:#x} + {cmd.length:#x}")
    mask = hwpt.ioas.iova_alignment - 1
    if cmd.iova & mask or (last + 1) & mask or not cmd.page_size:
        raise SysError(errno.EINVAL, f"dirty bitmap of {cmd.iova:#x} ... {last:#x}")
    mask = cmd.page_size - 1
    if cmd.iova & mask or (last + 1) & mask:
        raise SysError(
            errno.EINVAL, f"dirty bitmap of {cmd.iova:#x} ... {last:#x} in pages of {cmd.page_size:#x}"
        )
    dirty = hwpt.domain.dirty
    if dirty is None:
        raise SysError(errno.EOPNOTSUPP, f"HWPT {hwpt.id} was not made for dirty tracking")
    clear = not cmd.flags & uapi.IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR
    page = cmd.page_size & -cmd.page_size
    at = cmd.iova
    while at <= last and (area := hwpt.ioas.area_at(at, at)) is not None:
        for found in dirty.read(at, min(last, area.last), clear=clear):
            first, end = ((each - cmd.iova) // page for each in (found.start, found.last))
            with contextlib.suppress(SysError):
                _set_bits(call.process, cmd.data, first, end)
        at = area.last + 1


def _set_bits(process: Process, address: int, first: int, last: int) -> None:
    """Set bits of a bitmap in user memory, the lowest bit of each byte first. :raises SysError: EFAULT."""
    start = first // 8
    size = last // 8 - start + 1
    ones = ((1 << (last - first + 1)) - 1) << (first - 8 * start)
    old = int.from_bytes(process.copy_from_user(address + start, size), "little")
    process.copy_to_user(address + start, (old | ones).to_bytes(size, "little"))


def iommufd_hwpt_invalidate(ictx: Iommufd, call: Ioctl, cmd: uapi.iommu_hwpt_invalidate) -> None:
    """IOMMU_HWPT_INVALIDATE: how many entries were done is copied out also where it fails."""
    array = UserArray(call.process, cmd.data_type, cmd.data_uptr, cmd.entry_len, cmd.entry_num)
    failure: SysError | None = None
    try:
        _invalidate(ictx, cmd, array)
    except SysError as error:
        failure = SysError(error.errno, error.why, respond=True)
    cmd.entry_num = array.done
    call.respond(cmd)
    if failure is not None:
        raise failure


def _invalidate(ictx: Iommufd, cmd: uapi.iommu_hwpt_invalidate, array: UserArray) -> None:
    if getattr(cmd, "__reserved"):
        raise SysError(errno.EOPNOTSUPP, "HWPT_INVALIDATE: __reserved is not 0")
    if array.entry_num and (
        not array.uptr or not 0 < array.entry_len <= FRAME_BYTES or array.entry_num > _MAX_INVALIDATIONS
    ):
        raise SysError(errno.EINVAL, f"{array.entry_num} entries of {array.entry_len} bytes")
    target = ictx.find(cmd.hwpt_id)
    if isinstance(target, HwptNested):
        target.domain.cache_invalidate(array)
    elif isinstance(target, Viommu):
        target.cache_invalidate(array)
    else:
        raise SysError(errno.EINVAL, f"{target.type_name} {cmd.hwpt_id} has no guest caches")
