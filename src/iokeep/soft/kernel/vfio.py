# SPDX-License-Identifier: Apache-2.0
"""VFIO device files /dev/vfio/devices/vfioN (drivers/vfio/device_cdev.c, iommufd.c, pci/vfio_pci_core.c)."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from iokeep.soft.hardware import bar
from iokeep.soft.kernel.device import IommufdDevice
from iokeep.soft.kernel.files import File, Ioctl
from iokeep.soft.kernel.frames import FRAME_BYTES, I64
from iokeep.soft.kernel.iommufd import Iommufd
from iokeep.soft.kernel.process import BACKING, Backing
from iokeep.soft.kernel.syserror import SysError
from iokeep.uapi import vfio as uapi
from iokeep.uapi.copy_struct import copy_struct_in, end_of

if TYPE_CHECKING:
    import ctypes

    from iokeep.soft.kernel.iommu import PciDevice
    from iokeep.soft.kernel.kernel import Kernel
    from iokeep.soft.kernel.process import Process

    _Struct = TypeVar("_Struct", bound=ctypes.Structure)

#: VFIO_PCI_OFFSET_SHIFT: a region's index in the file offset
OFFSET_SHIFT = 40
#: the largest PASID that vdev->pasids, an ida, can hold
_INT_MAX = 2**31 - 1
#: seconds that a device may take to quiesce or reset
RESET_TIMEOUT = 10.0


class VfioDeviceFile(File):
    """An open VFIO cdev. Nothing but BIND works before it is bound (EINVAL).

    ``restored``: the device came over the kexec at work: it is not reset at bind.
    """

    kind_name = "vfio device"

    def __init__(self, kernel: Kernel, dev: PciDevice) -> None:
        super().__init__(kernel, f"vfio{dev.index}")
        self.dev = dev
        self.idev: IommufdDevice | None = None
        self.restored = False
        #: attached as PASID 0, which is the device itself and yet another attachment (vdev->pasids)
        self.as_pasid_0 = False

    # ---- life

    def release(self) -> None:
        """vfio_device_fops_release: quiesce and reset the device, then detach and unbind it."""
        idev = self.idev
        if idev is None and not self.restored:
            return
        reset(self.kernel, self.dev)
        if idev is not None:
            idev.preserved = False
            for pasid in list(idev.pasids):
                idev.detach_pasid(pasid)
            idev.detach()
            self.as_pasid_0 = False
            idev.unbind()
            self.idev = None
            self.kernel.vfio_bound.pop(self.dev.index, None)
        self.kernel.iommu.set_domain(self.dev, None)

    # ---- ioctl

    def ioctl(self, call: Ioctl) -> int:
        """vfio_device_fops_unl_ioctl."""
        if call.request == uapi.VFIO_DEVICE_BIND_IOMMUFD:
            self._bind(call)
            return 0
        if self.idev is None:
            raise SysError(errno.EINVAL, f"{self.name} is not bound to an iommufd")
        handler = _HANDLERS.get(call.request)
        if handler is None:
            raise SysError(errno.ENOTTY, f"vfio has no ioctl {call.request:#x}")
        handler(self, call, self.idev)
        return 0

    def _bind(self, call: Ioctl) -> None:
        """vfio_df_ioctl_bind_iommufd."""
        cmd = _take(uapi.vfio_device_bind_iommufd, call)
        if cmd.flags & ~uapi.VFIO_DEVICE_BIND_FLAG_TOKEN or cmd.iommufd < 0:
            raise SysError(errno.EINVAL, f"BIND_IOMMUFD flags {cmd.flags:#x}, iommufd {cmd.iommufd}")
        if self.idev is not None:
            raise SysError(errno.EINVAL, f"{self.name} is bound already")
        if cmd.flags & uapi.VFIO_DEVICE_BIND_FLAG_TOKEN:
            call.process.copy_from_user(cmd.token_uuid_ptr, 16)
            raise SysError(errno.EINVAL, f"{self.name} is no virtual function: it takes no token")
        iommufd = call.process.file(cmd.iommufd)
        if not isinstance(iommufd, Iommufd):
            raise SysError(errno.EBADFD, f"fd {cmd.iommufd} is a {iommufd.kind_name}, not an iommufd")
        if self.dev.index in self.kernel.vfio_bound:
            raise SysError(errno.EINVAL, f"{self.name} is open and bound through another file")
        for check in self.kernel.bind_checks:
            check(self, iommufd)
        self.idev = IommufdDevice.bind(iommufd, self.dev)
        self.kernel.vfio_bound[self.dev.index] = self
        if not self.restored:
            reset(self.kernel, self.dev)
        cmd.out_devid = self.idev.id
        call.respond(cmd)

    # ---- attachment (drivers/vfio/iommufd.c)

    def attach(self, idev: IommufdDevice, pt_id: int) -> int:
        """vfio_iommufd_physical_attach_ioas: attach, or replace where this call attached before."""
        if self.as_pasid_0:
            idev.target(pt_id)
            raise SysError(errno.EBUSY, f"{self.name} is attached as PASID 0")
        return idev.attach(pt_id)

    def attach_pasid(self, idev: IommufdDevice, pasid: int, pt_id: int) -> int:
        """vfio_iommufd_physical_pasid_attach_ioas."""
        if pasid > _INT_MAX:
            raise SysError(errno.ENOSPC, f"PASID {pasid:#x}")
        if pasid:
            return idev.attach_pasid(pasid, pt_id)
        if idev.hwpt is not None and not self.as_pasid_0:
            idev.target(pt_id)
            raise SysError(errno.EBUSY, f"{self.name} is attached already")
        hwpt = idev.attach(pt_id)
        self.as_pasid_0 = True
        return hwpt

    def detach_pasid(self, idev: IommufdDevice, pasid: int) -> None:
        """vfio_iommufd_physical_pasid_detach_ioas: nothing happens where the PASID is not attached."""
        if pasid:
            idev.detach_pasid(pasid)
        elif self.as_pasid_0:
            idev.detach()
            self.as_pasid_0 = False

    # ---- regions

    def _region(self, offset: int, length: int) -> int:
        """Offset inside of BAR 0, the only region that has bytes. :raises SysError: EINVAL."""
        index, at = offset >> OFFSET_SHIFT, offset & ((1 << OFFSET_SHIFT) - 1)
        if self.idev is None or index != 0 or at + length > self.kernel.platform.bar_bytes:
            raise SysError(
                errno.EINVAL, f"{self.name}: region {index} has no bytes at {at:#x} (+{length:#x})"
            )
        return at

    def pread(self, length: int, offset: int) -> bytes:
        """Read a region. :raises SysError: EINVAL."""
        at = self._region(offset, length)
        return self.kernel.platform.bars[self.dev.index].read(at, length)

    def pwrite(self, data: bytes, offset: int) -> int:
        """Write a region. :raises SysError: EINVAL."""
        at = self._region(offset, len(data))
        self.kernel.platform.bars[self.dev.index].write(at, data)
        return len(data)

    def map_pages(self, offset: int, length: int, *, writable: bool) -> tuple[I64 | None, Backing]:
        """mmap of BAR 0."""
        at = self._region(offset, length)
        if at % FRAME_BYTES:
            raise SysError(errno.EINVAL, f"{self.name}: offset {offset:#x} is not page-aligned")
        start, _ = self.kernel.platform.bar_extent(self.dev.index)
        return None, np.array([(1, 0, start + at, length)], BACKING)


def _take(struct: type[_Struct], call: Ioctl) -> _Struct:
    try:
        return copy_struct_in(struct, call.raw)
    except OSError as error:
        raise SysError(error.errno or errno.EFAULT, str(error)) from error


def _attach(file: VfioDeviceFile, call: Ioctl, idev: IommufdDevice) -> None:
    """vfio_df_ioctl_attach_pt: attach, or replace where the device is attached."""
    cmd = _take(uapi.vfio_device_attach_iommufd_pt, call)
    if cmd.flags & ~uapi.VFIO_DEVICE_ATTACH_PASID:
        raise SysError(errno.EINVAL, f"ATTACH flags {cmd.flags:#x}")
    if not cmd.flags & uapi.VFIO_DEVICE_ATTACH_PASID:
        cmd.pt_id = file.attach(idev, cmd.pt_id)
    elif cmd.argsz < end_of(uapi.vfio_device_attach_iommufd_pt, "pasid"):
        raise SysError(errno.EINVAL, f"ATTACH of a PASID with argsz {cmd.argsz}")
    else:
        cmd.pt_id = file.attach_pasid(idev, cmd.pasid, cmd.pt_id)
    call.respond(cmd)


def _detach(file: VfioDeviceFile, call: Ioctl, idev: IommufdDevice) -> None:
    """vfio_df_ioctl_detach_pt: nothing happens where the device is not attached."""
    cmd = _take(uapi.vfio_device_detach_iommufd_pt, call)
    if cmd.flags & ~uapi.VFIO_DEVICE_DETACH_PASID:
        raise SysError(errno.EINVAL, f"DETACH flags {cmd.flags:#x}")
    if not cmd.flags & uapi.VFIO_DEVICE_DETACH_PASID:
        if not file.as_pasid_0:
            idev.detach()
    elif cmd.argsz < end_of(uapi.vfio_device_detach_iommufd_pt, "pasid"):
        raise SysError(errno.EINVAL, f"DETACH of a PASID with argsz {cmd.argsz}")
    else:
        file.detach_pasid(idev, cmd.pasid)


def _get_info(file: VfioDeviceFile, call: Ioctl, idev: IommufdDevice) -> None:
    """vfio_pci_ioctl_get_info."""
    cmd = _take(uapi.vfio_device_info, call)
    cmd.flags = uapi.VFIO_DEVICE_FLAGS_PCI | uapi.VFIO_DEVICE_FLAGS_RESET
    cmd.num_regions = uapi.VFIO_PCI_NUM_REGIONS
    cmd.num_irqs = uapi.VFIO_PCI_NUM_IRQS
    cmd.cap_offset = 0
    call.respond(cmd)


def _get_region_info(file: VfioDeviceFile, call: Ioctl, idev: IommufdDevice) -> None:
    """vfio_pci_ioctl_get_region_info: BAR 0 is all that there is."""
    cmd = _take(uapi.vfio_region_info, call)
    if cmd.index >= uapi.VFIO_PCI_VGA_REGION_INDEX:  # no VGA here
        raise SysError(errno.EINVAL, f"{file.name} has no region {cmd.index}")
    cmd.offset = cmd.index << OFFSET_SHIFT
    cmd.cap_offset = 0
    cmd.flags, cmd.size = 0, 0
    if cmd.index == uapi.VFIO_PCI_BAR0_REGION_INDEX:
        cmd.size = file.kernel.platform.bar_bytes
        cmd.flags = (
            uapi.VFIO_REGION_INFO_FLAG_READ
            | uapi.VFIO_REGION_INFO_FLAG_WRITE
            | uapi.VFIO_REGION_INFO_FLAG_MMAP
        )
    call.respond(cmd)


def _reset(file: VfioDeviceFile, call: Ioctl, idev: IommufdDevice) -> None:
    """vfio_pci_ioctl_reset."""
    reset(file.kernel, file.dev)


_HANDLERS: dict[int, Callable[[VfioDeviceFile, Ioctl, IommufdDevice], None]] = {
    uapi.VFIO_DEVICE_ATTACH_IOMMUFD_PT: _attach,
    uapi.VFIO_DEVICE_DETACH_IOMMUFD_PT: _detach,
    uapi.VFIO_DEVICE_GET_INFO: _get_info,
    uapi.VFIO_DEVICE_GET_REGION_INFO: _get_region_info,
    uapi.VFIO_DEVICE_RESET: _reset,
}


def reset(kernel: Kernel, dev: PciDevice) -> None:
    """Function-level reset: the device stops, its DMA is over, it forgets ranges and cached translations.

    A device that does not answer is logged; detaching it then waits for the IOMMU.
    """
    window = kernel.platform.bars[dev.index]
    bar.write_register(window, bar.ENABLE, 0)
    if bar.read_register(window, bar.STATE) in (bar.STATE_OFF, bar.STATE_ENDED):
        return
    sequence = bar.read_register(window, bar.COMMAND) >> 8
    bar.command(window, bar.CMD_FLR, timeout=0)
    wanted = (sequence + 1) << 8 | bar.CMD_FLR
    end = time.monotonic() + RESET_TIMEOUT
    while bar.read_register(window, bar.COMMAND_ACK) != wanted:
        if kernel.pump is not None:
            kernel.pump()
        if time.monotonic() > end:
            kernel.warn(f"vfio-pci {dev.name}: no answer to a function-level reset in {RESET_TIMEOUT:.0f} s")
            return
        time.sleep(0.0002)


def opener(dev: PciDevice) -> Callable[[Process], File]:
    """The open function of this device's node."""
    return lambda process: VfioDeviceFile(process.kernel, dev)


def node_path(dev: PciDevice) -> str:
    """/dev/vfio/devices/vfioN"""
    return f"/dev/vfio/devices/vfio{dev.index}"
