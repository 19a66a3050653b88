# SPDX-License-Identifier: Apache-2.0
"""How a kernel takes a structure from user space: the size first, an unknown tail must be zero.

Rules and their sources:

* /dev/iommu (drivers/iommu/iommufd/main.c, iommufd_fops_ioctl): size < min_size is EINVAL; then
  copy_struct_from_user (include/linux/uaccess.h): a shorter structure is filled up with zeros, a longer one
  is E2BIG unless all bytes that this kernel does not know are zero. min_size is the end of the last field
  that the first version of the structure had.
* /dev/liveupdate (kernel/liveupdate/luo_core.c, luo_session.c): the same rule, other numbers.
* /dev/vfio/devices (drivers/vfio/device_cdev.c): argsz < minsz is EINVAL, bytes after the known ones are
  ignored, except for VFIO_DEVICE_BIND_IOMMUFD, which uses copy_struct_from_user since it takes a token.
"""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass
from types import ModuleType
from typing import TypeVar

from iokeep.uapi import iommufd, proposal, vfio
from iokeep.uapi import liveupdate as luo

_Struct = TypeVar("_Struct", bound=ctypes.Structure)


@dataclass(frozen=True, slots=True)
class IoctlOp:
    """One ioctl as a kernel lists it.

    :param request: full request number.
    :param name: its C name.
    :param struct: the structure of its argument.
    :param min_size: least size in bytes that a caller may give.
    :param strict: whether an unknown tail must be zero (copy_struct_from_user).
    """

    request: int
    name: str
    struct: type[ctypes.Structure]
    min_size: int
    strict: bool = True


def end_of(struct: type[ctypes.Structure], field: str) -> int:
    """Bytes up to the end of a field: the kernel's offsetofend()."""
    item = getattr(struct, field)
    return int(item.offset + item.size)


def _op(
    header: ModuleType, name: str, struct: type[ctypes.Structure], last: str, *, strict: bool = True
) -> tuple[int, IoctlOp]:
    request = int(getattr(header, name))
    return request, IoctlOp(request, name, struct, end_of(struct, last), strict)


# drivers/iommu/iommufd/main.c, iommufd_ioctl_ops[]: the last field of each structure's first version.
IOMMU_IOCTLS: dict[int, IoctlOp] = dict(
    [
        _op(iommufd, "IOMMU_DESTROY", iommufd.iommu_destroy, "id"),
        _op(iommufd, "IOMMU_IOAS_ALLOC", iommufd.iommu_ioas_alloc, "out_ioas_id"),
        _op(iommufd, "IOMMU_IOAS_ALLOW_IOVAS", iommufd.iommu_ioas_allow_iovas, "allowed_iovas"),
        _op(iommufd, "IOMMU_IOAS_COPY", iommufd.iommu_ioas_copy, "src_iova"),
        _op(iommufd, "IOMMU_IOAS_IOVA_RANGES", iommufd.iommu_ioas_iova_ranges, "out_iova_alignment"),
        _op(iommufd, "IOMMU_IOAS_MAP", iommufd.iommu_ioas_map, "iova"),
        _op(iommufd, "IOMMU_IOAS_UNMAP", iommufd.iommu_ioas_unmap, "length"),
        _op(iommufd, "IOMMU_OPTION", iommufd.iommu_option, "val64"),
        _op(iommufd, "IOMMU_VFIO_IOAS", iommufd.iommu_vfio_ioas, "__reserved"),
        _op(iommufd, "IOMMU_HWPT_ALLOC", iommufd.iommu_hwpt_alloc, "__reserved"),
        _op(iommufd, "IOMMU_GET_HW_INFO", iommufd.iommu_hw_info, "__reserved"),
        _op(iommufd, "IOMMU_HWPT_SET_DIRTY_TRACKING", iommufd.iommu_hwpt_set_dirty_tracking, "__reserved"),
        _op(iommufd, "IOMMU_HWPT_GET_DIRTY_BITMAP", iommufd.iommu_hwpt_get_dirty_bitmap, "data"),
        _op(iommufd, "IOMMU_HWPT_INVALIDATE", iommufd.iommu_hwpt_invalidate, "__reserved"),
        _op(iommufd, "IOMMU_FAULT_QUEUE_ALLOC", iommufd.iommu_fault_alloc, "out_fault_fd"),
        _op(iommufd, "IOMMU_IOAS_MAP_FILE", iommufd.iommu_ioas_map_file, "iova"),
        _op(iommufd, "IOMMU_VIOMMU_ALLOC", iommufd.iommu_viommu_alloc, "out_viommu_id"),
        _op(iommufd, "IOMMU_VDEVICE_ALLOC", iommufd.iommu_vdevice_alloc, "virt_id"),
        _op(iommufd, "IOMMU_IOAS_CHANGE_PROCESS", iommufd.iommu_ioas_change_process, "__reserved"),
        _op(iommufd, "IOMMU_VEVENTQ_ALLOC", iommufd.iommu_veventq_alloc, "out_veventq_fd"),
        _op(iommufd, "IOMMU_HW_QUEUE_ALLOC", iommufd.iommu_hw_queue_alloc, "length"),
        _op(iommufd, "IOMMU_IOAS_NOIOMMU_GET_PA", iommufd.iommu_ioas_noiommu_get_pa, "out_phys"),
    ]
)

PROPOSED_IOCTLS: dict[int, IoctlOp] = dict(
    [
        _op(
            proposal,
            "IOMMU_HWPT_LIVEUPDATE_MARK_PRESERVE",
            proposal.iommu_hwpt_liveupdate_mark_preserve,
            "hwpt_token",
        ),
        _op(proposal, "IOMMU_HWPT_LIVEUPDATE_ADOPT", proposal.iommu_hwpt_liveupdate_adopt, "__reserved"),
        _op(proposal, "IOMMU_HWPT_LIVEUPDATE_COMPARE", proposal.iommu_hwpt_liveupdate_compare, "__reserved2"),
        _op(proposal, "IOMMU_LIVEUPDATE_GET_INFO", proposal.iommu_liveupdate_info, "hwpt_uptr"),
        _op(
            proposal,
            "IOMMU_HWPT_LIVEUPDATE_PROGRESS",
            proposal.iommu_hwpt_liveupdate_progress,
            "mismatch_uptr",
        ),
    ]
)

# kernel/liveupdate/luo_core.c (device) and luo_session.c (session).
LIVEUPDATE_IOCTLS: dict[int, IoctlOp] = dict(
    [
        _op(luo, "LIVEUPDATE_IOCTL_CREATE_SESSION", luo.liveupdate_ioctl_create_session, "name"),
        _op(luo, "LIVEUPDATE_IOCTL_RETRIEVE_SESSION", luo.liveupdate_ioctl_retrieve_session, "name"),
        _op(luo, "LIVEUPDATE_SESSION_PRESERVE_FD", luo.liveupdate_session_preserve_fd, "token"),
        _op(luo, "LIVEUPDATE_SESSION_RETRIEVE_FD", luo.liveupdate_session_retrieve_fd, "token"),
        _op(luo, "LIVEUPDATE_SESSION_FINISH", luo.liveupdate_session_finish, "reserved"),
        _op(luo, "LIVEUPDATE_SESSION_GET_NAME", luo.liveupdate_session_get_name, "name"),
    ]
)

# drivers/vfio/device_cdev.c and drivers/vfio/pci/vfio_pci_core.c; a pasid counts only with its flag.
VFIO_IOCTLS: dict[int, IoctlOp] = dict(
    [
        _op(vfio, "VFIO_DEVICE_BIND_IOMMUFD", vfio.vfio_device_bind_iommufd, "out_devid"),
        _op(vfio, "VFIO_DEVICE_ATTACH_IOMMUFD_PT", vfio.vfio_device_attach_iommufd_pt, "pt_id", strict=False),
        _op(vfio, "VFIO_DEVICE_DETACH_IOMMUFD_PT", vfio.vfio_device_detach_iommufd_pt, "flags", strict=False),
        _op(vfio, "VFIO_DEVICE_GET_INFO", vfio.vfio_device_info, "num_irqs", strict=False),
        _op(vfio, "VFIO_DEVICE_GET_REGION_INFO", vfio.vfio_region_info, "offset", strict=False),
    ]
)

_BY_STRUCT: dict[type[ctypes.Structure], IoctlOp] = {
    op.struct: op
    for table in (IOMMU_IOCTLS, PROPOSED_IOCTLS, LIVEUPDATE_IOCTLS, VFIO_IOCTLS)
    for op in table.values()
}


def _refuse(number: int, why: str) -> OSError:
    return OSError(number, f"{os.strerror(number)}: {why}")


def copy_struct_in(struct: type[_Struct], raw: bytes | bytearray | memoryview) -> _Struct:
    """A structure as the kernel takes it from user space.

    :param struct: a structure of the tables above; its first field is the caller's size (size or argsz).
    :param raw: the caller's memory from the structure on; the caller's size says how much of it counts.
    :raises OSError: EFAULT when raw ends before the caller's size, EINVAL below the least size, E2BIG for a
        non-zero byte that this kernel does not know.
    :raises KeyError: when no table has the structure.
    """
    op = _BY_STRUCT[struct]
    if len(raw) < 4:
        raise _refuse(errno.EFAULT, f"{op.name}: no size field")
    user_size = int.from_bytes(raw[:4], "little")
    if user_size < op.min_size:
        raise _refuse(errno.EINVAL, f"{op.name}: size {user_size} is below {op.min_size}")
    known = ctypes.sizeof(struct)
    taken = min(user_size, known)
    if len(raw) < (user_size if op.strict else taken):
        raise _refuse(errno.EFAULT, f"{op.name}: size {user_size}, but only {len(raw)} bytes are there")
    if op.strict and any(raw[known:user_size]):
        raise _refuse(errno.E2BIG, f"{op.name}: size {user_size} with bytes after {known} that are not zero")
    out = struct()
    ctypes.memmove(ctypes.addressof(out), bytes(raw[:taken]), taken)
    return out


def copy_struct_out(value: ctypes.Structure) -> bytes:
    """What the kernel writes back: as many bytes as the caller's own size covers (iommufd_ucmd_respond)."""
    raw = bytes(value)
    return raw[: min(int.from_bytes(raw[:4], "little"), len(raw))]
