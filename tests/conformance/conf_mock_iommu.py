# SPDX-License-Identifier: Apache-2.0
"""The mock IOMMU's driver for the software kernel, as drivers/iommu/iommufd/selftest.c of Linux 7.3.4 has it.

Pages of 2 KiB, IOVAs from 16 MiB to 2 GiB - 1. It nests: a guest's domain is four IOTLB entries.
"""

import errno
from dataclasses import dataclass, field

import numpy as np
from conf_selftest import (
    IOMMU_HW_INFO_SELFTEST_REGVAL,
    IOMMU_HW_INFO_TYPE_SELFTEST,
    IOMMU_HW_QUEUE_TYPE_SELFTEST,
    IOMMU_HWPT_DATA_SELFTEST,
    IOMMU_HWPT_INVALIDATE_DATA_SELFTEST,
    IOMMU_TEST_DEV_CACHE_DEFAULT,
    IOMMU_TEST_HW_QUEUE_MAX,
    IOMMU_TEST_INVALIDATE_FLAG_ALL,
    IOMMU_VIOMMU_INVALIDATE_DATA_SELFTEST,
    IOMMU_VIOMMU_TYPE_SELFTEST,
    MOCK_APERTURE_LAST,
    MOCK_APERTURE_START,
    MOCK_DEV_CACHE_NUM,
    MOCK_FLAGS_DEVICE_NO_DIRTY,
    MOCK_FLAGS_DEVICE_PASID,
    MOCK_IOMMUPT_DEFAULT,
    MOCK_IOMMUPT_HUGE,
    MOCK_IOTLB_NUM,
    MOCK_PAGE_SIZE,
    MOCK_PASID_WIDTH,
    iommu_hwpt_invalidate_selftest,
    iommu_hwpt_selftest,
    iommu_viommu_invalidate_selftest,
    iommu_viommu_selftest,
)

from iokeep.mem.ranges import Range
from iokeep.soft.kernel.frames import FRAME_BYTES, TAG_KERNEL, Claim, Kind
from iokeep.soft.kernel.iommu import PciDevice
from iokeep.soft.kernel.nesting import NestedDomain
from iokeep.soft.kernel.syserror import SysError
from iokeep.soft.kernel.viommu import HwQueue, Viommu
from iokeep.uapi import iommufd as uapi

_APERTURE = (MOCK_APERTURE_START, MOCK_APERTURE_LAST)
#: three levels above pages of 2 KiB (starting_level of mock_domain_alloc_pgtable)
_HUGE_LAST = (1 << 11 + 3 * 9) - 1
#: IOMMU_TEST_PASID_RESERVED
_FAILING_PASID = 1024


@dataclass(eq=False)
class MockPciDevice(PciDevice):
    """``flags``: MOCK_FLAGS_DEVICE_*. ``armed``: the next change of PASID 1024 fails. ``viommu``: of the
    nested domain that it is on, and as what (``vdev_id``). ``cache``: what its vIOMMU invalidates.
    """

    flags: int = 0
    armed: bool = False
    viommu: Viommu | None = None
    vdev_id: int = 0
    cache: list = field(default_factory=lambda: [IOMMU_TEST_DEV_CACHE_DEFAULT] * MOCK_DEV_CACHE_NUM)

    def __post_init__(self):
        # PASID 0 is the device itself
        self.max_pasids = 1 << (MOCK_PASID_WIDTH if self.flags & MOCK_FLAGS_DEVICE_PASID else 0)


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

    enforces_coherency = False
    proof = None

    def __init__(self, iommu, *, dirty=False, huge=False):
        self.iommu = iommu
        self.kernel = iommu.kernel
        # MOCK_IOMMUPT_HUGE: pages of 4 KiB and 1 MiB, and all that the table reaches
        self.page_bytes = FRAME_BYTES if huge else MOCK_PAGE_SIZE
        self.aperture_start, self.aperture_last = (0, _HUGE_LAST) if huge else _APERTURE
        # else AMD's format with tables of 512 items: every power of two below half of what three levels reach
        self.page_sizes = FRAME_BYTES | 1 << 20 if huge else (1 << 11 + 3 * 9 - 1) - MOCK_PAGE_SIZE
        self.devices = set()
        self.pages = {}
        self.dirty = MockDirty(self) if dirty else None

    def need(self, iova, last):
        """Nothing is adopted here."""

    def leaf_across(self, iova):
        """Every page is a leaf of its own."""
        return False

    def map(self, extents, max_lg2=None):
        if not extents.prot.all():
            raise SysError(errno.EINVAL, "neither to be read nor written")
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


class MockNested(NestedDomain):
    """struct mock_iommu_domain_nested; ``viommu``: what it was made by."""

    dirty = None

    def __init__(self, iommu, data, viommu=None):
        if data.data_type != IOMMU_HWPT_DATA_SELFTEST:
            raise SysError(errno.EOPNOTSUPP, f"nested domain with data of type {data.data_type:#x}")
        given = data.read(iommu_hwpt_selftest, IOMMU_HWPT_DATA_SELFTEST, "iotlb")
        self.iommu = iommu
        self.viommu = viommu
        self.devices = set()
        self.iotlb = [given.iotlb] * MOCK_IOTLB_NUM

    def attach_dev(self, dev):
        self.iommu.set_domain(dev, self)

    def free(self):
        if self.devices:
            raise AssertionError("a nested mock domain is freed under devices")

    def cache_invalidate(self, array):
        """mock_domain_cache_invalidate_user: what is done before one that fails stays so."""
        if array.data_type != IOMMU_HWPT_INVALIDATE_DATA_SELFTEST:
            raise SysError(errno.EINVAL, f"invalidation of type {array.data_type:#x}")
        for i in range(array.entry_num):
            entry = array.entry(
                i, iommu_hwpt_invalidate_selftest, IOMMU_HWPT_INVALIDATE_DATA_SELFTEST, "iotlb_id"
            )
            if entry.flags & ~IOMMU_TEST_INVALIDATE_FLAG_ALL:
                raise SysError(errno.EOPNOTSUPP, f"invalidation flags {entry.flags:#x}")
            if entry.iotlb_id >= MOCK_IOTLB_NUM:
                raise SysError(errno.EINVAL, f"no IOTLB entry {entry.iotlb_id}")
            if entry.flags & IOMMU_TEST_INVALIDATE_FLAG_ALL:
                self.iotlb = [0] * MOCK_IOTLB_NUM
            else:
                self.iotlb[entry.iotlb_id] = 0
            array.done += 1


class MockViommu(Viommu):
    """struct mock_viommu: where it is told something, it says that again on a page that can be mapped."""

    pfns = np.zeros(0, np.int64)
    offset = 0

    def __init__(self, iommu, parent):
        super().__init__(iommu, parent)
        self.queues = {}

    def hw_queue_class(self, queue_type):
        """mock_viommu_get_hw_queue_size."""
        return MockHwQueue if queue_type == IOMMU_HW_QUEUE_TYPE_SELFTEST else None

    def init(self, data):
        if data is None:
            return
        given = data.read(iommu_viommu_selftest, IOMMU_VIOMMU_TYPE_SELFTEST, "out_data")
        frames = self.iommufd.kernel.frames
        first = int(frames.alloc(1, TAG_KERNEL, Kind.KERNEL, order=1)[0])
        pfns = np.array([first, first + 1], np.int64)
        frames.words[first, 0] = given.in_data
        given.out_data = given.in_data
        given.out_mmap_offset = self.iommufd.mmaps.add(self, pfns)
        given.out_mmap_length = 2 * FRAME_BYTES
        self.pfns, self.offset = pfns, given.out_mmap_offset
        try:
            data.write(given)
        except SysError:
            self.release()
            raise

    def release(self):
        if len(self.pfns):
            self.iommufd.mmaps.remove(self.offset)
            self.iommufd.kernel.frames.put(self.pfns)

    def claims(self):
        return [Claim(f"mock vIOMMU {self.id}", self.pfns, tag=TAG_KERNEL)]

    def alloc_nested(self, flags, data):
        return MockNested(self.iommu, data, self)

    def cache_invalidate(self, array):
        """mock_viommu_cache_invalidate: what is done before one that fails stays so."""
        if array.entry_num == 0 and array.data_type == IOMMU_VIOMMU_INVALIDATE_DATA_SELFTEST:
            return
        for entry in array.whole(iommu_viommu_invalidate_selftest, IOMMU_VIOMMU_INVALIDATE_DATA_SELFTEST):
            if entry.flags & ~IOMMU_TEST_INVALIDATE_FLAG_ALL:
                raise SysError(errno.EOPNOTSUPP, f"invalidation flags {entry.flags:#x}")
            if entry.cache_id >= MOCK_DEV_CACHE_NUM or entry.vdev_id not in self.vdevices:
                raise SysError(errno.EINVAL, f"no cache {entry.cache_id} of device {entry.vdev_id:#x}")
            cache = self.vdevices[entry.vdev_id].idev.dev.cache
            if entry.flags & IOMMU_TEST_INVALIDATE_FLAG_ALL:
                cache[:] = [0] * MOCK_DEV_CACHE_NUM
            else:
                cache[entry.cache_id] = 0
            array.done += 1


class MockHwQueue(HwQueue):
    """struct mock_hw_queue: made in the order of their indices, each needs the one before (``prev``).

    Linux 7.3.4 never sets its index, so that every one that goes frees the place of queue 0, and no other.
    """

    prev = None

    def init(self, index, base_pa):
        """mock_hw_queue_init_phys."""
        queues = self.viommu.queues
        if index >= IOMMU_TEST_HW_QUEUE_MAX:
            raise SysError(errno.EINVAL, f"queue {index}")
        if index in queues:
            raise SysError(errno.EEXIST, f"queue {index} is there")
        prev = queues.get(index - 1) if index else None
        if index and prev is None:
            raise SysError(errno.EIO, f"there is no queue {index - 1}")
        shown = self.viommu.parent.domain.iova_to_phys(np.array([self.iova], np.uint64))
        if base_pa != int(shown[0]):
            raise SysError(errno.EFAULT, f"{base_pa:#x} is not what is at {self.iova:#x}")
        if prev is not None:
            prev.users += 1
        self.prev = prev
        queues[index] = self

    def release(self):
        """mock_hw_queue_destroy."""
        self.viommu.queues.pop(0, None)
        if self.prev is not None:
            self.prev.users -= 1


class MockIommu:
    """What an IOMMU driver does for iommufd (mock_ops)."""

    RESERVED = ()
    HAS_NESTED_DOMAINS = True
    USER_PASID_TABLE = True
    _PAGING_FLAGS = (
        uapi.IOMMU_HWPT_ALLOC_DIRTY_TRACKING | uapi.IOMMU_HWPT_ALLOC_NEST_PARENT | uapi.IOMMU_HWPT_ALLOC_PASID
    )

    def __init__(self, kernel):
        self.kernel = kernel

    def tracks_dirty(self, dev):
        return not dev.flags & MOCK_FLAGS_DEVICE_NO_DIRTY

    def alloc_paging(self, dev, flags, data):
        """mock_domain_alloc_paging_flags."""
        if flags & ~self._PAGING_FLAGS:
            raise SysError(errno.EOPNOTSUPP, f"domain flags {flags:#x}")
        huge = False
        if data is not None:
            if data.data_type != IOMMU_HWPT_DATA_SELFTEST:
                raise SysError(errno.EOPNOTSUPP, f"data of type {data.data_type:#x}")
            given = data.read(iommu_hwpt_selftest, IOMMU_HWPT_DATA_SELFTEST, "iotlb")
            if given.pagetable_type not in (MOCK_IOMMUPT_DEFAULT, MOCK_IOMMUPT_HUGE):
                raise SysError(errno.EOPNOTSUPP, f"page table type {given.pagetable_type}")
            huge = given.pagetable_type == MOCK_IOMMUPT_HUGE
        return MockDomain(self, dirty=bool(flags & uapi.IOMMU_HWPT_ALLOC_DIRTY_TRACKING), huge=huge)

    def alloc_nested(self, dev, parent, flags, data):
        return MockNested(self, data)

    def owns(self, domain):
        return domain.iommu is self

    def viommu_class(self, dev, viommu_type):
        """mock_get_viommu_size."""
        return MockViommu if viommu_type == IOMMU_VIOMMU_TYPE_SELFTEST else None

    def enable_iopf(self, dev):
        """Every mock device can fault."""

    def page_response(self, dev, pasid, grpid, code):
        """mock_domain_page_response: nothing waits for it."""

    def set_domain(self, dev, domain):
        """mock_domain_nop_attach; None: the blocking domain."""
        if domain is not None and domain.dirty is not None and not self.tracks_dirty(dev):
            raise SysError(errno.EINVAL, "a domain with dirty tracking, a device without")
        viommu, virt_id = getattr(domain, "viommu", None), 0
        if viommu is not None:
            virt_id = viommu.virt_id(dev)
        if viommu is not dev.viommu:  # a new number in the same vIOMMU goes unseen, as in Linux
            dev.viommu, dev.vdev_id = viommu, virt_id
        if dev.domain is not None:
            dev.domain.devices.discard(dev)
        dev.domain = domain
        if domain is not None:
            domain.devices.add(dev)

    def set_pasid(self, dev, pasid, domain):
        """mock_domain_set_dev_pasid_nop: every second change of PASID 1024 fails, to see what is undone."""
        if pasid != _FAILING_PASID:
            return
        dev.armed = domain is not None and not dev.armed
        if domain is not None and not dev.armed:
            raise SysError(errno.ENOMEM, "asked for")

    def hw_info(self):
        return IOMMU_HW_INFO_TYPE_SELFTEST, bytes(4) + IOMMU_HW_INFO_SELFTEST_REGVAL.to_bytes(4, "little")
