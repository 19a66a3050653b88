# SPDX-License-Identifier: Apache-2.0
"""Errors name the call, the objects, the errno, its meaning there and the next thing to do."""

import errno

import pytest

from iokeep.errors import CapabilityError, KernelRefused
from iokeep.uapi import errnos
from iokeep.uapi.copy_struct import IOMMU_IOCTLS, LIVEUPDATE_IOCTLS, PROPOSED_IOCTLS, VFIO_IOCTLS
from iokeep.uapi.iommufd import iommu_destroy
from iokeep.uapi.wire import WireError


def test_names():
    assert errnos.name(errno.EINVAL) == "EINVAL"
    # One number, two names in C: the kernel's documentation uses the first.
    assert errnos.name(errno.EOPNOTSUPP) == "EOPNOTSUPP"
    assert errnos.name(errno.EDEADLK) == "EDEADLK"
    assert errnos.name(4095) == "errno 4095"


def test_tables_speak_of_real_calls_and_errnos():
    tables = (IOMMU_IOCTLS, PROPOSED_IOCTLS, LIVEUPDATE_IOCTLS, VFIO_IOCTLS)
    calls = {op.name for table in tables for op in table.values()} | {"open", "reboot_kexec"}
    calls |= {"VFIO_DEVICE_RESET"}  # takes no structure
    assert set(errnos.MEANINGS) <= calls
    for operation, table in errnos.MEANINGS.items():
        for short, (text, hint) in table.items():
            assert hasattr(errno, short), (operation, short)
            for each in (text, hint):
                assert each, (operation, short)
                assert not each.endswith("."), each


def test_every_upstream_errno_of_map_and_unmap_has_a_meaning():
    for short in (
        "EEXIST",
        "ENOSPC",
        "EOVERFLOW",
        "EINVAL",
        "EOPNOTSUPP",
        "EPERM",
        "ENOENT",
        "EFAULT",
        "EBADF",
    ):
        assert short in errnos.MEANINGS["IOMMU_IOAS_MAP_FILE"], short
    for short in ("ENOENT", "EBUSY", "EDEADLK"):
        assert short in errnos.MEANINGS["IOMMU_IOAS_UNMAP"], short


def test_meaning_falls_back():
    assert (
        errnos.meaning("IOMMU_IOAS_MAP_FILE", errno.EEXIST)[0] == "part of the IOVA range is mapped already"
    )
    assert "newer fields" in errnos.meaning("IOMMU_IOAS_MAP_FILE", errno.E2BIG)[1]
    assert errnos.meaning("IOMMU_IOAS_MAP_FILE", errno.EXDEV) == ("Invalid cross-device link", "")
    assert errnos.meaning("no such call", errno.EINTR)[1] == "try again"


def test_refusal():
    error = errnos.IoctlRefused("IOMMU_IOAS_MAP_FILE", errno.EEXIST, {"ioas": 3, "iova": "0x1000"})
    assert isinstance(error, KernelRefused)
    assert error.what == (
        "IOMMU_IOAS_MAP_FILE(ioas 3, iova 0x1000): EEXIST: part of the IOVA range is mapped already"
    )
    assert error.hint == "unmap it first, or choose another iova"
    assert (error.errno, error.errno_name, error.exit_code) == (errno.EEXIST, "EEXIST", 5)


class Refusing:
    def __init__(self, error):
        self.error = error

    def open(self, path):
        raise self.error

    def close(self, fd):
        raise self.error

    def ioctl(self, fd, request, arg):
        raise self.error


def test_open_node():
    with pytest.raises(CapabilityError):
        errnos.open_node(Refusing(OSError(errno.EACCES, "no")), "/dev/iommu", errnos.IoctlRefused)
    with pytest.raises(errnos.IoctlRefused) as caught:
        errnos.open_node(Refusing(OSError(errno.EBUSY, "no")), "/dev/liveupdate", errnos.IoctlRefused)
    assert caught.value.errno == errno.EBUSY
    assert "one user at a time" in caught.value.what


def test_a_kernel_that_is_gone_is_no_refusal():
    gone = Refusing(WireError(errno.ECONNRESET, "gone"))
    with pytest.raises(WireError):
        errnos.open_node(gone, "/dev/iommu", errnos.IoctlRefused)
    with pytest.raises(WireError):
        errnos.checked_ioctl(gone, 3, "IOMMU_DESTROY", 1, iommu_destroy(), {}, errnos.IoctlRefused)
    errnos.close_fd(gone, 3)
    with pytest.raises(OSError):
        errnos.close_fd(Refusing(OSError(errno.EBADF, "bad")), 3)
