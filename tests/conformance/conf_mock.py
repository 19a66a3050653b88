# SPDX-License-Identifier: Apache-2.0
"""The mock IOMMU of CONFIG_IOMMUFD_TEST for the software kernel: a module that only tests load.

Only driver and devices are mocks: the iommufd in front of them is the software kernel's own.
"""

import ctypes
import errno

import conf_access
import conf_mock_devices
from conf_mock_iommu import MockDomain, MockIommu
from conf_selftest import (
    IOMMU_TEST_CMD,
    IOMMU_TEST_OP_ADD_RESERVED,
    IOMMU_TEST_OP_DIRTY,
    IOMMU_TEST_OP_MD_CHECK_IOTLB,
    IOMMU_TEST_OP_MD_CHECK_MAP,
    IOMMU_TEST_OP_SET_TEMP_MEMORY_LIMIT,
    MOCK_IOTLB_NUM,
    MOCK_PAGE_SIZE,
    iommu_test_cmd,
)

from iokeep.mem.ranges import Range
from iokeep.soft.kernel.frames import FRAME_BYTES
from iokeep.soft.kernel.hwpt import HwptNested, HwptPaging
from iokeep.soft.kernel.iommufd import Iommufd
from iokeep.soft.kernel.pages import ULONG_MAX
from iokeep.soft.kernel.syserror import SysError


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
    page = hwpt.domain.page_bytes
    if iova % page or length % page or uptr % page:
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


def _check_iotlb(ictx, call, cmd):
    hwpt = ictx.find(cmd.id)
    if not isinstance(hwpt, HwptNested):
        raise SysError(errno.ENOENT, "no nested HWPT")
    number = cmd.check_iotlb.id
    if number >= MOCK_IOTLB_NUM or hwpt.domain.iotlb[number] != cmd.check_iotlb.iotlb:
        raise SysError(errno.EINVAL, f"IOTLB entry {number} is not {cmd.check_iotlb.iotlb:#x}")


def _memory_limit(ictx, call, cmd):
    """How much memory a real kernel takes for a batch of pages at most; nothing is done in batches here."""
    if cmd.memory_limit.limit < 12:
        raise SysError(errno.EINVAL, "less than one element")


_OPS = {
    IOMMU_TEST_OP_ADD_RESERVED: _add_reserved,
    IOMMU_TEST_OP_MD_CHECK_MAP: _check_map,
    IOMMU_TEST_OP_DIRTY: _dirty,
    IOMMU_TEST_OP_MD_CHECK_IOTLB: _check_iotlb,
    IOMMU_TEST_OP_SET_TEMP_MEMORY_LIMIT: _memory_limit,
    **conf_mock_devices.OPS,
    **conf_access.OPS,
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
    kernel.mock_iommu = MockIommu(kernel)
    kernel.ioctl_extensions[(Iommufd, IOMMU_TEST_CMD)] = _test_cmd
