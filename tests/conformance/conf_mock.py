# SPDX-License-Identifier: Apache-2.0
"""The mock IOMMU of CONFIG_IOMMUFD_TEST for the software kernel: a module that only tests load.

Same geometry as the kernel's: pages of 2 KiB, IOVAs from 16 MiB to 2 GiB - 1. Only the driver is a mock: the
iommufd in front of it is the software kernel's own.
"""

import ctypes
import errno
from dataclasses import dataclass

import numpy as np
from conf_selftest import (
    IOMMU_HW_INFO_SELFTEST_REGVAL,
    IOMMU_HW_INFO_TYPE_SELFTEST,
    IOMMU_TEST_CMD,
    IOMMU_TEST_OP_ADD_RESERVED,
    IOMMU_TEST_OP_DIRTY,
    IOMMU_TEST_OP_MD_CHECK_MAP,
    IOMMU_TEST_OP_MOCK_DOMAIN,
    IOMMU_TEST_OP_MOCK_DOMAIN_FLAGS,
    IOMMU_TEST_OP_MOCK_DOMAIN_REPLACE,
    IOMMU_TEST_OP_PASID_ATTACH,
    IOMMU_TEST_OP_PASID_CHECK_HWPT,
    IOMMU_TEST_OP_PASID_DETACH,
    IOMMU_TEST_OP_PASID_REPLACE,
    MOCK_APERTURE_LAST,
    MOCK_APERTURE_START,
    MOCK_FLAGS_DEVICE_NO_DIRTY,
    MOCK_FLAGS_DEVICE_PASID,
    MOCK_PAGE_SIZE,
    MOCK_PASID_WIDTH,
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
#: IOMMU_TEST_PASID_RESERVED
_FAILING_PASID = 1024


class MockDirty:
    """Dirty tracking of a mock domain; its leaves are frames of 4 KiB, as where nothing is contiguous."""

    def __init__(self, domain):
        self.domain = domain
        self.on = False
        self.written = set()

    def track(self, enable):
        self.on = enable

    def write(self, iova):
        """What a device does. Pages that are not mapped stay so."""
        if iova // MOCK_PAGE_SIZE * MOCK_PAGE_SIZE in self.domain.pages:
            self.written.add(iova // FRAME_BYTES * FRAME_BYTES)

    def read(self, iova, last, *, clear):
        found = sorted(at for at in self.written if at <= last and at + FRAME_BYTES > iova)
        if clear:
            self.written.difference_update(found)
        return [Range(max(at, iova), min(at + FRAME_BYTES - 1, last)) for at in found]


class MockDomain:
    """What a Domain does for iommufd, in a dict of 2 KiB pages."""

    page_bytes = MOCK_PAGE_SIZE
    aperture_start = MOCK_APERTURE_START
    aperture_last = MOCK_APERTURE_LAST
    proof = None

    def __init__(self, kernel, *, dirty=False):
        self.kernel = kernel
        self.devices = set()
        self.pages = {}
        self.dirty = MockDirty(self) if dirty else None

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
            elif self.dirty is not None:
                self.dirty.written.discard(at)

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

    def max_pasid_log2(self, dev):
        return dev.pasids.bit_length() - 1

    def tracks_dirty(self, dev):
        return not dev.flags & MOCK_FLAGS_DEVICE_NO_DIRTY

    def alloc_domain(self, *, dirty=False):
        return MockDomain(self.kernel, dirty=dirty)

    def set_domain(self, dev, domain):
        if domain is not None and domain.dirty is not None and not self.tracks_dirty(dev):
            raise SysError(errno.EINVAL, "a domain with dirty tracking, a device without")
        if dev.domain is not None:
            dev.domain.devices.discard(dev)
        dev.domain = domain
        if domain is not None:
            domain.devices.add(dev)

    def hw_info(self):
        return IOMMU_HW_INFO_TYPE_SELFTEST, bytes(4) + IOMMU_HW_INFO_SELFTEST_REGVAL.to_bytes(4, "little")


@dataclass(eq=False)
class MockPciDevice(PciDevice):
    """``flags``: MOCK_FLAGS_DEVICE_*. ``armed``: the next change of PASID 1024 fails."""

    flags: int = 0
    armed: bool = False

    @property
    def pasids(self):
        """One more than the last PASID; PASID 0 is the device itself."""
        return 1 << (MOCK_PASID_WIDTH if self.flags & MOCK_FLAGS_DEVICE_PASID else 0)


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


def _set_pasid(idev, pasid):
    """mock_domain_set_dev_pasid_nop: every second change of PASID 1024 fails, to see what is undone."""
    if pasid == _FAILING_PASID:
        idev.dev.armed = not idev.dev.armed
        if not idev.dev.armed:
            raise SysError(errno.ENOMEM, "asked for")


def _change_pasid(idev, pasid, target):
    if not isinstance(target, HwptPaging) or not target.pasid_compat:
        raise SysError(errno.EINVAL, "not made for PASIDs")
    if idev.hwpt is not None and not idev.hwpt.pasid_compat:
        raise SysError(errno.EINVAL, "the device is on an HWPT that is not made for PASIDs")
    if pasid >= idev.dev.pasids:
        raise SysError(errno.EINVAL, "no such PASID")
    if idev.pasids.get(pasid) is not target:
        _set_pasid(idev, pasid)
    idev.attach_pasid(pasid, target.id)


def _pasid_attach(ictx, call, cmd):
    idev, pasid = _stdev(ictx, cmd.id).idev, cmd.pasid.pasid
    target = idev.target(cmd.pasid.pt_id)
    if pasid == 0 or pasid in idev.pasids:
        raise SysError(errno.EBUSY, "attached already")
    _change_pasid(idev, pasid, target)
    call.respond(cmd)


def _pasid_replace(ictx, call, cmd):
    idev, pasid = _stdev(ictx, cmd.id).idev, cmd.pasid.pasid
    target = idev.target(cmd.pasid.pt_id)
    if pasid not in idev.pasids:
        raise SysError(errno.EINVAL, "not attached")
    if idev.pasids[pasid] is not target:
        _change_pasid(idev, pasid, target)
    call.respond(cmd)


def _pasid_detach(ictx, call, cmd):
    idev = _stdev(ictx, cmd.id).idev
    if cmd.pasid.pasid in idev.pasids and cmd.pasid.pasid == _FAILING_PASID:
        idev.dev.armed = False
    idev.detach_pasid(cmd.pasid.pasid)


def _pasid_check(ictx, call, cmd):
    """Which HWPT a PASID is on; 0: none."""
    idev = _stdev(ictx, cmd.id).idev
    hwpt = None
    if cmd.pasid.pt_id:
        hwpt = ictx.find(cmd.pasid.pt_id)
        if not isinstance(hwpt, HwptPaging):
            raise SysError(errno.EINVAL, "no HWPT")
    if idev.pasids.get(cmd.pasid.pasid) is not hwpt:
        raise SysError(errno.EINVAL, "another HWPT")


def _replace(ictx, call, cmd):
    stdev = _stdev(ictx, cmd.id)
    cmd.mock_domain_replace.pt_id = stdev.idev.attach(cmd.mock_domain_replace.pt_id)
    call.respond(cmd)


def _add_reserved(ictx, call, cmd):
    start, length = cmd.add_reserved.start, cmd.add_reserved.length
    if not length:
        raise SysError(errno.EINVAL, "nothing to reserve")
    if start + length - 1 > ULONG_MAX:
        raise SysError(errno.EOVERFLOW, f"{start:#x} + {length:#x}")
    ictx.ioas(cmd.id).reserve(Range(start, start + length - 1), None)


def _mock_hwpt(ictx, number):
    """get_md_pagetable."""
    hwpt = ictx.find(number)
    if not isinstance(hwpt, HwptPaging):
        raise SysError(errno.ENOENT, "no HWPT")
    if not isinstance(hwpt.domain, MockDomain):
        raise SysError(errno.EINVAL, "no mock HWPT")
    return hwpt


def _dirty(ictx, call, cmd):
    """iommufd_test_dirty: a device writes to the pages whose bits are set."""
    iova, length, page, uptr = (getattr(cmd.dirty, each) for each in ("iova", "length", "page_size", "uptr"))
    if not page or not length or iova % page or length % page or not uptr:
        raise SysError(errno.EINVAL, "not in pages")
    dirty = _mock_hwpt(ictx, cmd.id).domain.dirty
    if dirty is None or not dirty.on:
        raise SysError(errno.EINVAL, "not tracked")
    n = length // page
    bits = int.from_bytes(call.process.copy_from_user(uptr, -(-n // 8)), "little")
    written = [i for i in range(n) if bits >> i & 1]
    for i in written:
        dirty.write(iova + i * page)
    cmd.dirty.out_nr_dirty = len(written)
    call.respond(cmd)


def _check_map(ictx, call, cmd):
    """iommufd_test_md_check_pa: the domain shows the pages behind a user mapping."""
    hwpt = _mock_hwpt(ictx, cmd.id)
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
    IOMMU_TEST_OP_DIRTY: _dirty,
    IOMMU_TEST_OP_PASID_ATTACH: _pasid_attach,
    IOMMU_TEST_OP_PASID_REPLACE: _pasid_replace,
    IOMMU_TEST_OP_PASID_DETACH: _pasid_detach,
    IOMMU_TEST_OP_PASID_CHECK_HWPT: _pasid_check,
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
