# SPDX-License-Identifier: Apache-2.0
"""Mock devices for the software kernel: objects that hold them, and what IOMMU_TEST_CMD does with them."""

import errno

from conf_mock_iommu import MockPciDevice
from conf_selftest import (
    IOMMU_TEST_OP_DEV_CHECK_CACHE,
    IOMMU_TEST_OP_MOCK_DOMAIN,
    IOMMU_TEST_OP_MOCK_DOMAIN_FLAGS,
    IOMMU_TEST_OP_MOCK_DOMAIN_REPLACE,
    IOMMU_TEST_OP_PASID_ATTACH,
    IOMMU_TEST_OP_PASID_CHECK_HWPT,
    IOMMU_TEST_OP_PASID_DETACH,
    IOMMU_TEST_OP_PASID_REPLACE,
    IOMMU_TEST_OP_TRIGGER_IOPF,
    IOMMU_TEST_OP_TRIGGER_VEVENT,
    IOMMU_VEVENTQ_TYPE_SELFTEST,
    MOCK_DEV_CACHE_NUM,
    MOCK_FLAGS_DEVICE_NO_DIRTY,
    MOCK_FLAGS_DEVICE_PASID,
)

from iokeep.soft.kernel.device import IommufdDevice
from iokeep.soft.kernel.hwpt import Hwpt
from iokeep.soft.kernel.iopf import report_fault
from iokeep.soft.kernel.objects import IommufdObject
from iokeep.soft.kernel.syserror import SysError

#: first requester id of mock devices: no device of a platform has one so high
_FIRST_BDF = 0xF000


class MockDevice(IommufdDevice):
    """A mock device as iommufd has it. It holds no reference on the iommufd, which may be closed first."""

    @property
    def iommu(self):
        return self.iommufd.kernel.mock_iommu

    @classmethod
    def bind(cls, iommufd, dev):
        idev = cls(iommufd, dev)
        dev.owner = iommufd
        idev.users += 1
        iommufd.add(idev)
        return idev

    def unbind(self):
        self.pre_destroy()
        self.users -= 1
        self.iommufd.remove(self.id)


class Selftest(IommufdObject):
    """Holds a mock device; destroying it detaches and unbinds that (TYPE_IDEV)."""

    type_name = "selftest"

    def __init__(self, iommufd):
        super().__init__(iommufd)
        self.idev = None

    def destroy(self):
        if self.idev is not None:
            self.idev.detach()
            self.idev.unbind()


class _Numbers:
    next_bdf = _FIRST_BDF


def _mock_domain(ictx, call, cmd):
    flags = cmd.mock_domain.dev_flags if cmd.op == IOMMU_TEST_OP_MOCK_DOMAIN_FLAGS else 0
    stdev = Selftest(ictx)
    ictx.add(stdev)
    try:
        if flags & ~(MOCK_FLAGS_DEVICE_NO_DIRTY | MOCK_FLAGS_DEVICE_PASID):
            raise SysError(errno.EINVAL, f"mock device flags {flags:#x}")
        _Numbers.next_bdf += 1
        idev = MockDevice.bind(ictx, MockPciDevice(0, _Numbers.next_bdf, flags=flags))
        try:
            hwpt = idev.attach(cmd.id)
        except SysError:
            idev.unbind()
            raise
    except SysError:
        ictx.unlist(stdev)
        raise
    stdev.idev = idev
    cmd.mock_domain.out_stdev_id = stdev.id
    cmd.mock_domain.out_hwpt_id = hwpt
    cmd.mock_domain.out_idev_id = idev.id
    call.respond(cmd)


def _stdev(ictx, number):
    stdev = ictx.find(number)
    if not isinstance(stdev, Selftest):
        raise SysError(errno.ENOENT, "no selftest object")
    return stdev


def _attached(idev, pasid):
    """What a PASID is on, or the device itself for PASID 0."""
    return idev.pasids.get(pasid) if pasid else idev.hwpt


def _pasid_attach(ictx, call, cmd):
    idev, pasid = _stdev(ictx, cmd.id).idev, cmd.pasid.pasid
    idev.target(cmd.pasid.pt_id)
    if _attached(idev, pasid) is not None:
        raise SysError(errno.EBUSY, "attached already")
    cmd.pasid.pt_id = idev.attach_pasid(pasid, cmd.pasid.pt_id) if pasid else idev.attach(cmd.pasid.pt_id)
    call.respond(cmd)


def _pasid_replace(ictx, call, cmd):
    idev, pasid = _stdev(ictx, cmd.id).idev, cmd.pasid.pasid
    cmd.pasid.pt_id = _change(idev, pasid, cmd.pasid.pt_id)
    call.respond(cmd)


def _change(idev, pasid, pt_id):
    """iommufd_device_replace."""
    idev.target(pt_id)
    if _attached(idev, pasid) is None:
        raise SysError(errno.EINVAL, "not attached")
    return idev.attach_pasid(pasid, pt_id) if pasid else idev.attach(pt_id)


def _pasid_detach(ictx, call, cmd):
    idev, pasid = _stdev(ictx, cmd.id).idev, cmd.pasid.pasid
    if pasid:
        idev.detach_pasid(pasid)
    else:
        idev.detach()


def _pasid_check(ictx, call, cmd):
    """Which HWPT a PASID is on; 0: none."""
    idev = _stdev(ictx, cmd.id).idev
    hwpt = None
    if cmd.pasid.pt_id:
        hwpt = ictx.find(cmd.pasid.pt_id)
        if not isinstance(hwpt, Hwpt):
            raise SysError(errno.EINVAL, "no HWPT")
    if _attached(idev, cmd.pasid.pasid) is not hwpt:
        raise SysError(errno.EINVAL, "another HWPT")


def _replace(ictx, call, cmd):
    idev = _stdev(ictx, cmd.id).idev
    cmd.mock_domain_replace.pt_id = _change(idev, 0, cmd.mock_domain_replace.pt_id)
    call.respond(cmd)


def _trigger_iopf(ictx, call, cmd):
    idev = ictx.device(cmd.trigger_iopf.dev_id)
    if not isinstance(idev, MockDevice):
        raise SysError(errno.EINVAL, "no mock device")
    report_fault(idev, *(getattr(cmd.trigger_iopf, each) for each in ("pasid", "grpid", "perm", "addr")))


def _trigger_vevent(ictx, call, cmd):
    dev = ictx.device(cmd.trigger_vevent.dev_id).dev
    if dev.viommu is None or not dev.vdev_id:
        raise SysError(errno.ENOENT, "no guest knows it")
    dev.viommu.report_event(IOMMU_VEVENTQ_TYPE_SELFTEST, dev.vdev_id.to_bytes(8, "little")[:4])


def _check_cache(ictx, call, cmd):
    dev, number = ictx.device(cmd.id).dev, cmd.check_dev_cache.id
    if number >= MOCK_DEV_CACHE_NUM or dev.cache[number] != cmd.check_dev_cache.cache:
        raise SysError(errno.EINVAL, f"cache {number} is not {cmd.check_dev_cache.cache:#x}")


OPS = {
    IOMMU_TEST_OP_MOCK_DOMAIN: _mock_domain,
    IOMMU_TEST_OP_MOCK_DOMAIN_FLAGS: _mock_domain,
    IOMMU_TEST_OP_MOCK_DOMAIN_REPLACE: _replace,
    IOMMU_TEST_OP_TRIGGER_IOPF: _trigger_iopf,
    IOMMU_TEST_OP_TRIGGER_VEVENT: _trigger_vevent,
    IOMMU_TEST_OP_DEV_CHECK_CACHE: _check_cache,
    IOMMU_TEST_OP_PASID_ATTACH: _pasid_attach,
    IOMMU_TEST_OP_PASID_REPLACE: _pasid_replace,
    IOMMU_TEST_OP_PASID_DETACH: _pasid_detach,
    IOMMU_TEST_OP_PASID_CHECK_HWPT: _pasid_check,
}
