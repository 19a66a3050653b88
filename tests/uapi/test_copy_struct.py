# SPDX-License-Identifier: Apache-2.0
"""The size-first, zero-tail rule, against the table of least sizes and an obvious model."""

import ctypes
import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iokeep.uapi import iommufd, proposal, vfio
from iokeep.uapi.copy_struct import (
    IOMMU_IOCTLS,
    LIVEUPDATE_IOCTLS,
    PROPOSED_IOCTLS,
    VFIO_IOCTLS,
    copy_struct_in,
    copy_struct_out,
    end_of,
)

# (size, least size) as compiled from Linux 7.3.4, drivers/iommu/iommufd/main.c and kernel/liveupdate.
SIZES = {
    "IOMMU_DESTROY": (8, 8),
    "IOMMU_IOAS_ALLOC": (12, 12),
    "IOMMU_IOAS_ALLOW_IOVAS": (24, 24),
    "IOMMU_IOAS_COPY": (40, 40),
    "IOMMU_IOAS_IOVA_RANGES": (32, 32),
    "IOMMU_IOAS_MAP": (40, 40),
    "IOMMU_IOAS_UNMAP": (24, 24),
    "IOMMU_OPTION": (24, 24),
    "IOMMU_VFIO_IOAS": (12, 12),
    "IOMMU_HWPT_ALLOC": (48, 24),
    "IOMMU_GET_HW_INFO": (40, 32),
    "IOMMU_HWPT_SET_DIRTY_TRACKING": (16, 16),
    "IOMMU_HWPT_GET_DIRTY_BITMAP": (48, 48),
    "IOMMU_HWPT_INVALIDATE": (32, 32),
    "IOMMU_FAULT_QUEUE_ALLOC": (16, 16),
    "IOMMU_IOAS_MAP_FILE": (40, 40),
    "IOMMU_VIOMMU_ALLOC": (40, 24),
    "IOMMU_VDEVICE_ALLOC": (24, 24),
    "IOMMU_IOAS_CHANGE_PROCESS": (8, 8),
    "IOMMU_VEVENTQ_ALLOC": (32, 28),
    "IOMMU_HW_QUEUE_ALLOC": (40, 40),
    "IOMMU_IOAS_NOIOMMU_GET_PA": (40, 40),
    "LIVEUPDATE_IOCTL_CREATE_SESSION": (72, 72),
    "LIVEUPDATE_IOCTL_RETRIEVE_SESSION": (72, 72),
    "LIVEUPDATE_SESSION_PRESERVE_FD": (16, 16),
    "LIVEUPDATE_SESSION_RETRIEVE_FD": (16, 16),
    "LIVEUPDATE_SESSION_FINISH": (8, 8),
    "LIVEUPDATE_SESSION_GET_NAME": (72, 72),
}
ALL = [*IOMMU_IOCTLS.values(), *PROPOSED_IOCTLS.values(), *LIVEUPDATE_IOCTLS.values(), *VFIO_IOCTLS.values()]


def test_least_sizes():
    found = {
        op.name: (ctypes.sizeof(op.struct), op.min_size)
        for op in (*IOMMU_IOCTLS.values(), *LIVEUPDATE_IOCTLS.values())
    }
    assert found == SIZES


def test_vfio_least_sizes():
    found = {op.name: op.min_size for op in VFIO_IOCTLS.values()}
    assert found["VFIO_DEVICE_BIND_IOMMUFD"] == 16
    assert found["VFIO_DEVICE_ATTACH_IOMMUFD_PT"] == 12
    assert found["VFIO_DEVICE_DETACH_IOMMUFD_PT"] == 8


@given(st.sampled_from(ALL), st.data())
def test_rule(op, data):
    size = data.draw(st.one_of(st.integers(0, 96), st.sampled_from([op.min_size, ctypes.sizeof(op.struct)])))
    body = data.draw(st.binary(min_size=100, max_size=100))
    if data.draw(st.booleans()):
        body = body[: ctypes.sizeof(op.struct)] + bytes(100 - ctypes.sizeof(op.struct))
    raw = size.to_bytes(4, "little") + body[4:]
    known = ctypes.sizeof(op.struct)
    if size < op.min_size:
        want = errno.EINVAL
    elif op.strict and any(raw[known:size]):
        want = errno.E2BIG
    else:
        want = 0
    if want:
        with pytest.raises(OSError) as caught:
            copy_struct_in(op.struct, raw)
        assert caught.value.errno == want
        assert op.name in str(caught.value)
    else:
        taken = raw[: min(size, known)]
        out = copy_struct_in(op.struct, raw)
        assert bytes(out) == taken + bytes(known - len(taken))
        assert copy_struct_out(out) == taken


@pytest.mark.parametrize("length", [0, 3, 4, 39])
def test_memory_that_ends_early_is_a_fault(length):
    raw = bytes(iommufd.iommu_ioas_map(size=40))[:length]
    with pytest.raises(OSError) as caught:
        copy_struct_in(iommufd.iommu_ioas_map, raw)
    assert caught.value.errno == errno.EFAULT


def test_vfio_ignores_what_it_does_not_know():
    raw = bytes(vfio.vfio_device_detach_iommufd_pt(argsz=64)) + b"\xff" * 52
    assert copy_struct_in(vfio.vfio_device_detach_iommufd_pt, raw).argsz == 64


def test_a_short_old_structure_is_filled_with_zeros():
    raw = bytes(iommufd.iommu_hwpt_alloc(size=24, dev_id=1, pt_id=2, data_len=99, fault_id=3))
    out = copy_struct_in(iommufd.iommu_hwpt_alloc, raw)
    assert (out.dev_id, out.pt_id, out.data_len, out.fault_id) == (1, 2, 0, 0)
    assert len(copy_struct_out(out)) == 24


def test_unknown_structure():
    with pytest.raises(KeyError):
        copy_struct_in(proposal.iommu_liveupdate_mismatch, bytes(48))


def test_end_of():
    assert end_of(iommufd.iommu_hwpt_alloc, "__reserved") == 24
