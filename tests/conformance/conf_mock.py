# SPDX-License-Identifier: Apache-2.0
"""The mock IOMMU of CONFIG_IOMMUFD_TEST for the software kernel: a module that only tests load.

Same geometry as the kernel's: pages of 2 KiB, IOVAs from 16 MiB to 2 GiB - 1. Only the driver is a mock: the
iommufd in front of it is the software kernel's own.
"""

import ctypes
import errno

import numpy as np
from conf_selftest import (
    IOMMU_HW_INFO_SELFTEST_REGVAL,
    IOMMU_HW_INFO_TYPE_SELFTEST,
    IOMMU_TEST_CMD,
    IOMMU_TEST_OP_ADD_RESERVED,
    IOMMU_TEST_OP_MD_CHECK_MAP,
    IOMMU_TEST_OP_MOCK_DOMAIN,
    IOMMU_TEST_OP_MOCK_DOMAIN_FLAGS,
    IOMMU_TEST_OP_MOCK_DOMAIN_REPLACE,
    MOCK_APERTURE_LAST,
    MOCK_APERTURE_START,
    MOCK_PAGE_SIZE,
    iommu_test_cmd,
)

from iokeep.mem.ranges import Range
from iokeep.soft.kernel.device import IommufdDevice
from iokeep.soft.kernel.frames import FRAME_BYTES
from iokeep.soft.kernel.hwpt import HwptPaging
from iokeep.soft.kernel.iommu import PciDevice
from iokeep.soft.kernel.iommufd import Iommufd
from iokeep.soft.kernel.objects import IommufdObject
from iokeep.soft.kernel.pages import ULONG_MAX
from iokeep.soft.kernel.syserror import SysError

#: first requester id of mock devices: no device of a platform has one so high
_FIRST_BDF = 0xF000


class MockDomain:
    """What a Domain does for iommufd, in a dict of 2 KiB pages."""

    page_bytes = MOCK_PAGE_SIZE
    aperture_start = MOCK_APERTURE_START
    aperture_last = MOCK_APERTURE_LAST
    proof = None

    def __init__(self, kernel):
        self.kernel = kernel
        self.devices = set()
        self.pages = {}

    def need(self, iova, last):
        """Nothing is adopted here."""

    def map(self, extents, max_lg2=None):
        for i in range(len(extents)):
            start, last, pa = int(extents.iova[i]), int(extents.last[i]), int(extents.pa[i])
            if start % MOCK_PAGE_SIZE or (last + 1) % MOCK_PAGE_SIZE or pa % MOCK_PAGE_SIZE:
                raise AssertionError(f"{start:#x} ... {last:#x} -> {pa:#x} is not in pages")
            for at in range(start, last + 1, MOCK_PAGE_SIZE):
                if at in self.pages:
                    raise AssertionError(f"{at:#x} is mapped already")
                self.pages[at] = pa + at - start

    def unmap(self, iova, last):
        for at in range(iova, last + 1, MOCK_PAGE_SIZE):
            if self.pages.pop(at, None) is None:
                self.kernel.warn(f"mock: {at:#x} is not mapped")

    def iova_to_phys(self, iovas):
        def one(iova):
            page = iova // MOCK_PAGE_SIZE * MOCK_PAGE_SIZE
            return self.pages[page] + iova - page if page in self.pages else 0

        return np.array([one(int(iova)) for iova in iovas], np.uint64)

    def free(self):
        if self.devices:
            raise AssertionError("a mock domain is freed under devices")


class MockIommu:
    """What an IOMMU driver does for iommufd."""

    RESERVED = ()

    def __init__(self, kernel):
        self.kernel = kernel

    def alloc_domain(self):
        return MockDomain(self.kernel)

    def set_domain(self, dev, domain):
        if dev.domain is not None:
            dev.domain.devices.discard(dev)
        dev.domain = domain
        if domain is not None:
            domain.devices.add(dev)

    def hw_info(self):
        return IOMMU_HW_INFO_TYPE_SELFTEST, bytes(4) + IOMMU_HW_INFO_SELFTEST_REGVAL.to_bytes(4, "little")


class MockDevice(IommufdDevice):
    """A mock device as iommufd has it. It holds no reference on the iommufd, which may be closed first."""

    @property
    def iommu(self):
        return MockIommu(self.iommufd.kernel)

    @classmethod
    def bind(cls, iommufd, dev):
        idev = cls(iommufd, dev)
        dev.owner = iommufd
        idev.users += 1
        iommufd.add(idev)
        return idev

    def unbind(self):
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
    stdev = Selftest(ictx)
    ictx.add(stdev)
    try:
        _Numbers.next_bdf += 1
        idev = MockDevice.bind(ictx, PciDevice(0, _Numbers.next_bdf, has_ats=False))
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


def _replace(ictx, call, cmd):
    stdev = ictx.find(cmd.id)
    if not isinstance(stdev, Selftest):
        raise SysError(errno.ENOENT, "no selftest object")
    cmd.mock_domain_replace.pt_id = stdev.idev.attach(cmd.mock_domain_replace.pt_id)
    call.respond(cmd)


def _add_reserved(ictx, call, cmd):
    start, length = cmd.add_reserved.start, cmd.add_reserved.length
    if not length:
        raise SysError(errno.EINVAL, "nothing to reserve")
    if start + length - 1 > ULONG_MAX:
        raise SysError(errno.EOVERFLOW, f"{start:#x} + {length:#x}")
    ictx.ioas(cmd.id).reserve(Range(start, start + length - 1), None)


def _check_map(ictx, call, cmd):
    """iommufd_test_md_check_pa: the domain shows the pages behind a user mapping."""
    hwpt = ictx.find(cmd.id)
    if not isinstance(hwpt, HwptPaging) or not isinstance(hwpt.domain, MockDomain):
        raise SysError(errno.EINVAL if isinstance(hwpt, HwptPaging) else errno.ENOENT, "no mock HWPT")
    iova, length, uptr = cmd.check_map.iova, cmd.check_map.length, cmd.check_map.uptr
    if iova % MOCK_PAGE_SIZE or length % MOCK_PAGE_SIZE or uptr % MOCK_PAGE_SIZE:
        raise SysError(errno.EINVAL, "not aligned")
    base = uptr // FRAME_BYTES * FRAME_BYTES
    pages = -(-(uptr + length - base) // FRAME_BYTES)
    pfns = []
    for file, offset, part in call.process.resolve(base, pages * FRAME_BYTES, write=False):
        pfns += file.fault(offset // FRAME_BYTES, (offset + part - 1) // FRAME_BYTES).tolist()
    for at in range(0, length, MOCK_PAGE_SIZE):
        frame, inside = divmod(uptr + at - base, FRAME_BYTES)
        if hwpt.domain.pages.get(iova + at) != pfns[frame] * FRAME_BYTES + inside:
            raise SysError(errno.EINVAL, f"{iova + at:#x} shows something else")


_OPS = {
    IOMMU_TEST_OP_ADD_RESERVED: _add_reserved,
    IOMMU_TEST_OP_MOCK_DOMAIN: _mock_domain,
    IOMMU_TEST_OP_MOCK_DOMAIN_FLAGS: _mock_domain,
    IOMMU_TEST_OP_MOCK_DOMAIN_REPLACE: _replace,
    IOMMU_TEST_OP_MD_CHECK_MAP: _check_map,
}


def _test_cmd(ictx, call):
    cmd = iommu_test_cmd()
    ctypes.memmove(ctypes.addressof(cmd), call.raw, min(len(call.raw), ctypes.sizeof(cmd)))
    handler = _OPS.get(cmd.op)
    if handler is None:
        raise SysError(errno.EOPNOTSUPP, f"IOMMU_TEST_CMD op {cmd.op}")
    handler(ictx, call, cmd)
    return 0


def install(kernel):
    """Load the module."""
    kernel.ioctl_extensions[(Iommufd, IOMMU_TEST_CMD)] = _test_cmd
