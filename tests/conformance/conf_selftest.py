# SPDX-License-Identifier: Apache-2.0
"""IOMMU_TEST_CMD: the mock IOMMU that a kernel with CONFIG_IOMMUFD_TEST has, for tests that need no hardware.

From drivers/iommu/iommufd/iommufd_test.h of Linux 7.3.4 (no uAPI, so it is not in the generated headers);
the parts that this suite uses.
"""

import ctypes

from iokeep.uapi import iommufd as uapi

# _IO(IOMMUFD_TYPE, IOMMUFD_CMD_BASE + 32)
IOMMU_TEST_CMD = uapi.IOMMU_DESTROY + 32

IOMMU_TEST_OP_ADD_RESERVED = 1
IOMMU_TEST_OP_MOCK_DOMAIN = 2
IOMMU_TEST_OP_MD_CHECK_MAP = 3
IOMMU_TEST_OP_MD_CHECK_REFS = 4
IOMMU_TEST_OP_CREATE_ACCESS = 5
IOMMU_TEST_OP_DESTROY_ACCESS_PAGES = 6
IOMMU_TEST_OP_ACCESS_PAGES = 7
IOMMU_TEST_OP_ACCESS_RW = 8
IOMMU_TEST_OP_SET_TEMP_MEMORY_LIMIT = 9
IOMMU_TEST_OP_MOCK_DOMAIN_REPLACE = 10
IOMMU_TEST_OP_ACCESS_REPLACE_IOAS = 11
IOMMU_TEST_OP_MOCK_DOMAIN_FLAGS = 12
IOMMU_TEST_OP_DIRTY = 13
IOMMU_TEST_OP_MD_CHECK_IOTLB = 14
IOMMU_TEST_OP_TRIGGER_IOPF = 15
IOMMU_TEST_OP_DEV_CHECK_CACHE = 16
IOMMU_TEST_OP_TRIGGER_VEVENT = 17
IOMMU_TEST_OP_PASID_ATTACH = 18
IOMMU_TEST_OP_PASID_REPLACE = 19
IOMMU_TEST_OP_PASID_DETACH = 20
IOMMU_TEST_OP_PASID_CHECK_HWPT = 21

MOCK_FLAGS_ACCESS_WRITE = 1
MOCK_FLAGS_ACCESS_SYZ = 1 << 16
MOCK_ACCESS_RW_WRITE = 1
MOCK_ACCESS_RW_SLOW_PATH = 4
MOCK_FLAGS_ACCESS_CREATE_NEEDS_PIN_PAGES = 1
MOCK_FLAGS_DEVICE_NO_DIRTY = 1
MOCK_FLAGS_DEVICE_PASID = 4
MOCK_PASID_WIDTH = 20
MOCK_APERTURE_START = 1 << 24
MOCK_APERTURE_LAST = (1 << 31) - 1
MOCK_PAGE_SIZE = 2048
MOCK_IOMMUPT_DEFAULT, MOCK_IOMMUPT_HUGE = 0, 1
MOCK_IOTLB_NUM = 4
IOMMU_HWPT_DATA_SELFTEST = 0xDEAD
IOMMU_HWPT_INVALIDATE_DATA_SELFTEST = 0xDEADBEEF
IOMMU_TEST_INVALIDATE_FLAG_ALL = 1
IOMMU_TEST_IOTLB_DEFAULT = 0xBADBEEF
MOCK_DEV_CACHE_NUM = 4
IOMMU_TEST_DEV_CACHE_DEFAULT = 0xBADDAD
IOMMU_VIOMMU_TYPE_SELFTEST = 0xDEADBEEF
IOMMU_VIOMMU_INVALIDATE_DATA_SELFTEST = 0xDEADBEEF
IOMMU_VEVENTQ_TYPE_SELFTEST = 0xBEEFBEEF
IOMMU_HW_QUEUE_TYPE_SELFTEST = 0xDEADBEEF
IOMMU_TEST_HW_QUEUE_MAX = 2
IOMMU_HW_INFO_TYPE_SELFTEST = 0xFEEDBEEF
IOMMU_HW_INFO_SELFTEST_REGVAL = 0xDEADBEEF

U32, U64 = ctypes.c_uint32, ctypes.c_uint64


class AddReserved(ctypes.Structure):
    _fields_ = [("start", U64), ("length", U64)]


class MockDomain(ctypes.Structure):
    _fields_ = [
        ("out_stdev_id", U32),
        ("out_hwpt_id", U32),
        ("out_idev_id", U32),
        ("dev_flags", U32),
    ]


class Replace(ctypes.Structure):
    _fields_ = [("pt_id", U32)]


class CheckMap(ctypes.Structure):
    _fields_ = [("iova", U64), ("length", U64), ("uptr", U64)]


class CheckRefs(ctypes.Structure):
    _fields_ = [("length", U64), ("uptr", U64), ("refs", U32)]


class CreateAccess(ctypes.Structure):
    _fields_ = [("out_access_fd", U32), ("flags", U32)]


class DestroyAccessPages(ctypes.Structure):
    _fields_ = [("access_pages_id", U32)]


class AccessPages(ctypes.Structure):
    _fields_ = [
        ("flags", U32),
        ("out_access_pages_id", U32),
        ("iova", U64),
        ("length", U64),
        ("uptr", U64),
    ]


class AccessRw(ctypes.Structure):
    _fields_ = [("iova", U64), ("length", U64), ("uptr", U64), ("flags", U32)]


class MemoryLimit(ctypes.Structure):
    _fields_ = [("limit", U32)]


class AccessReplaceIoas(ctypes.Structure):
    _fields_ = [("ioas_id", U32)]


class Pasid(ctypes.Structure):
    """pasid_attach, pasid_replace (pt_id), pasid_detach (none), pasid_check (hwpt_id)."""

    _fields_ = [("pasid", U32), ("pt_id", U32)]


class Dirty(ctypes.Structure):
    """The largest member, which gives the union its size."""

    _fields_ = [
        ("flags", U32),
        ("iova", U64),
        ("length", U64),
        ("page_size", U64),
        ("uptr", U64),
        ("out_nr_dirty", U64),
    ]


class CheckIotlb(ctypes.Structure):
    _fields_ = [("id", U32), ("iotlb", U32)]


class TriggerIopf(ctypes.Structure):
    _fields_ = [("dev_id", U32), ("pasid", U32), ("grpid", U32), ("perm", U32), ("addr", U64)]


class iommu_hwpt_selftest(ctypes.Structure):
    """What HWPT_ALLOC tells the mock driver (IOMMU_HWPT_DATA_SELFTEST)."""

    _fields_ = [("iotlb", U32), ("pagetable_type", U32)]


class iommu_hwpt_invalidate_selftest(ctypes.Structure):
    """One entry of HWPT_INVALIDATE (IOMMU_HWPT_INVALIDATE_DATA_SELFTEST)."""

    _fields_ = [("flags", U32), ("iotlb_id", U32)]


class iommu_viommu_selftest(ctypes.Structure):
    """What VIOMMU_ALLOC tells the mock driver, and its answer (IOMMU_VIOMMU_TYPE_SELFTEST)."""

    _fields_ = [("in_data", U32), ("out_data", U32), ("out_mmap_offset", U64), ("out_mmap_length", U64)]


class iommu_viommu_invalidate_selftest(ctypes.Structure):
    """One entry of HWPT_INVALIDATE on a vIOMMU (IOMMU_VIOMMU_INVALIDATE_DATA_SELFTEST)."""

    _fields_ = [("flags", U32), ("vdev_id", U32), ("cache_id", U32)]


class TriggerVevent(ctypes.Structure):
    _fields_ = [("dev_id", U32)]


class CheckCache(ctypes.Structure):
    _fields_ = [("id", U32), ("cache", U32)]


class _Union(ctypes.Union):
    _fields_ = [
        ("add_reserved", AddReserved),
        ("mock_domain", MockDomain),
        ("mock_domain_replace", Replace),
        ("check_map", CheckMap),
        ("check_refs", CheckRefs),
        ("create_access", CreateAccess),
        ("destroy_access_pages", DestroyAccessPages),
        ("access_pages", AccessPages),
        ("access_rw", AccessRw),
        ("memory_limit", MemoryLimit),
        ("access_replace_ioas", AccessReplaceIoas),
        ("dirty", Dirty),
        ("pasid", Pasid),
        ("check_iotlb", CheckIotlb),
        ("trigger_iopf", TriggerIopf),
        ("trigger_vevent", TriggerVevent),
        ("check_dev_cache", CheckCache),
    ]


class iommu_test_cmd(ctypes.Structure):
    _anonymous_ = ("u",)
    _fields_ = [
        ("size", U32),
        ("op", U32),
        ("id", U32),
        ("__reserved", U32),
        ("u", _Union),
        ("last", U32),
    ]


def command(op: int, number: int = 0) -> iommu_test_cmd:
    return iommu_test_cmd(size=ctypes.sizeof(iommu_test_cmd), op=op, id=number)
