# SPDX-License-Identifier: Apache-2.0
"""How a VFIO device crosses the kexec: it keeps working; its attachment is fixed from preserve to finish."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from iokeep.handover.iommu import VfioRecord
from iokeep.soft.kernel.adopt import Priors
from iokeep.soft.kernel.files import File, Ioctl
from iokeep.soft.kernel.hwpt import HwptPaging
from iokeep.soft.kernel.iommufd import Iommufd
from iokeep.soft.kernel.luo import FileHandler, LuoFile, Session
from iokeep.soft.kernel.preserve_iommufd import IommufdHandler, PreservedIommufd
from iokeep.soft.kernel.process import Process
from iokeep.soft.kernel.syserror import SysError
from iokeep.soft.kernel.vfio import VfioDeviceFile, node_path
from iokeep.uapi import vfio as uapi

if TYPE_CHECKING:
    from iokeep.soft.kernel.device import IommufdDevice
    from iokeep.soft.kernel.freeze import Freeze
    from iokeep.soft.kernel.iommu import PciDevice
    from iokeep.soft.kernel.kernel import Kernel


@dataclass(slots=True, eq=False)
class PreservedDevice:
    """What LUO holds of a preserved device."""

    idev: IommufdDevice
    iommufd: PreservedIommufd
    iommufd_token: int
    token: int


@dataclass(eq=False)
class VfioHandler(FileHandler):
    """LUO handler of VFIO cdevs. :param compatible: version of the record, of the kernel's profile."""

    kernel: Kernel
    priors: Priors
    iommufds: IommufdHandler
    compatible: str
    flb: tuple[str, ...]
    freeze_now: Callable[[], Freeze]
    incoming: dict[int, VfioRecord] = field(default_factory=dict)
    held: list[PreservedDevice] = field(default_factory=list)

    def can_preserve(self, file: File) -> bool:
        """A VFIO cdev."""
        return isinstance(file, VfioDeviceFile)

    # ---- in the old kernel

    def preserve(self, session: Session, file: File, token: int) -> PreservedDevice:
        """Check that what translates for the device is preserved in this session. :raises SysError:
        EINVAL.
        """
        assert isinstance(file, VfioDeviceFile)
        idev = file.idev
        if idev is None:
            raise SysError(errno.EINVAL, f"{file.name} is not bound to an iommufd")
        iommufd = next((p for p in self.iommufds.held if p.iommufd is idev.iommufd), None)
        if iommufd is None or iommufd.session is not session:
            raise SysError(
                errno.EINVAL, f"{file.name}: its iommufd is not preserved in session [{session.name}]"
            )
        if idev.hwpt is None:
            raise SysError(errno.EINVAL, f"{file.name} is not attached")
        if idev.hwpt not in [hwpt for hwpt, _ in iommufd.hwpts]:
            raise SysError(
                errno.EINVAL, f"{file.name} is attached to HWPT {idev.hwpt.id}, which is not marked"
            )
        iommufd_token = session.token_of(self.iommufds, idev.iommufd)
        assert iommufd_token is not None
        idev.preserved = True
        private = PreservedDevice(idev, iommufd, iommufd_token, token)
        self.held.append(private)
        return private

    def unpreserve(self, file: File, private: PreservedDevice) -> None:
        """Its attachment may change again."""
        private.idev.preserved = False
        self.held.remove(private)

    def freeze(self, file: File, private: PreservedDevice) -> int:
        """The device into the FLB, its record into preserved memory; its pa."""
        now = self.freeze_now()
        hwpt = private.idev.hwpt
        if not isinstance(hwpt, HwptPaging):
            raise SysError(errno.EINVAL, f"{file.name} is not attached any more")
        index = now.add_device(private.idev.dev, private.token, hwpt.domain)
        return now.write_vfio(VfioRecord(0, private.idev.dev.bdf, index, private.iommufd_token))

    # ---- in the new kernel

    def install(self) -> None:
        """Register the rules of bind and detach."""
        self.kernel.bind_checks.append(self.check_bind)
        detach = (VfioDeviceFile, uapi.VFIO_DEVICE_DETACH_IOMMUFD_PT)
        self.kernel.ioctl_extensions[detach] = self.detach

    def close_nodes(self) -> None:
        """After boot: only the session gives a restored device out."""

        def refuse(process: Process) -> File:
            raise SysError(errno.EBUSY, "the device came over the kexec: retrieve it from its session")

        for index in self.priors.devices:
            path = node_path(self.kernel.iommu.devices[index])
            self._nodes[index] = self.kernel.device_nodes[path]
            self.kernel.device_nodes[path] = refuse

    _nodes: dict[int, Callable[[Process], File]] = field(default_factory=dict)

    def check_bind(self, file: VfioDeviceFile, iommufd: Iommufd) -> None:
        """:raises SysError: EPERM, a restored device belongs to the iommufd that came with it."""
        prior = self.priors.devices.get(file.dev.index)
        if prior is None:
            return
        if not file.restored or prior not in self.priors.iommufds.get(iommufd, {}).values():
            raise SysError(errno.EPERM, f"{file.name} is restored: it belongs to the iommufd of its session")

    def detach(self, file: VfioDeviceFile, call: Ioctl) -> int:
        """DETACH of a restored device would leave nothing that translates its DMA. :raises SysError:
        EPERM.
        """
        prior = self.priors.devices.get(file.dev.index)
        if prior is not None and file.dev in prior.devices and file.idev is not None and file.idev.hwpt:
            raise SysError(errno.EPERM, f"{file.name} is restored and its session is not finished")
        return file.ioctl(call)

    def check_incoming(self, session: Session, entry: LuoFile) -> None:
        """Its record was read at boot, and its iommufd is in the same session."""
        record = self.incoming.get(entry.data)
        if record is None:
            raise SysError(errno.EIO, f"no device record at {entry.data:#x}")
        owner = session.by_token(record.iommufd_token)
        if owner is None or owner.handler is not self.iommufds:
            raise SysError(
                errno.EIO, f"device {record.bdf:#x}: its iommufd is not in session [{session.name}]"
            )

    def _device(self, entry: LuoFile) -> PciDevice:
        bdf = self.incoming[entry.data].bdf
        return next(dev for dev in self.kernel.iommu.devices if dev.bdf == bdf)

    def retrieve(self, session: Session, entry: LuoFile) -> File:
        """A cdev of the device, which goes on working."""
        file = VfioDeviceFile(self.kernel, self._device(entry))
        file.restored = True
        return file

    def can_finish(self, session: Session, entry: LuoFile) -> bool:
        """It was retrieved, bound and attached: somebody is responsible for its DMA."""
        file = entry.file
        if not isinstance(file, VfioDeviceFile) or file.idev is None or file.idev.hwpt is None:
            self.kernel.log(
                f"luo: session [{session.name}]: device {self._device(entry).name} is not attached"
            )
            return False
        return True

    def finish(self, session: Session, entry: LuoFile) -> None:
        """An ordinary device from now on."""
        dev = self._device(entry)
        prior = self.priors.devices.pop(dev.index, None)
        if prior is not None:
            prior.devices.discard(dev)
        self.kernel.device_nodes[node_path(dev)] = self._nodes.pop(dev.index)
        if isinstance(entry.file, VfioDeviceFile):
            entry.file.restored = False
