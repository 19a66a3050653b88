# SPDX-License-Identifier: Apache-2.0
"""The client libraries against /dev/iommu, /dev/liveupdate and a VFIO device of a real kernel. Runs in the
guest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from iokeep.errors import CapabilityError
from iokeep.iommufd.client import READ, Ioas, Iommufd, IommufdError
from iokeep.luo.client import LiveUpdate, LuoError
from iokeep.uapi import iommufd as uapi
from iokeep.uapi.kernel import KernelTransport
from iokeep.uapi.probe import probe
from vmtest.guest.edu import ADDRESSES, Edu

PAGE = 4096
KERNEL = KernelTransport()
MODE = os.environ["IOKEEP_VM_MODE"]
AMD = MODE == "amd"


@pytest.fixture
def iommufd() -> Iterator[Iommufd]:
    with Iommufd(KERNEL) as fd:
        yield fd


@pytest.fixture
def edu(iommufd: Iommufd) -> Iterator[Edu]:
    """Bound."""
    device = Edu(ADDRESSES[0])
    with device.file:
        device.file.bind(iommufd)
        yield device


@pytest.fixture
def ioas(iommufd: Iommufd, edu: Edu) -> Ioas:
    """With the device attached."""
    made = iommufd.ioas_alloc()
    edu.file.attach(made.id)
    return made


@pytest.fixture
def ram() -> Iterator[int]:
    fd = KERNEL.memfd_create("ram")
    KERNEL.ftruncate(fd, 64 * PAGE)
    yield fd
    os.close(fd)


def refused(name: str, call: Callable[..., object], *args: Any, **kw: Any) -> None:
    with pytest.raises((IommufdError, LuoError)) as caught:
        call(*args, **kw)
    assert caught.value.errno_name == name, caught.value


def test_probe_finds_everything() -> None:
    found = probe(transport=KERNEL)
    assert found.iommu_usable
    assert found.liveupdate_usable
    assert found.hardware
    assert found.ioctls is not None
    assert {"IOMMU_IOAS_MAP_FILE", "IOMMU_HWPT_ALLOC"} <= found.ioctls
    assert "IOMMU_HWPT_LIVEUPDATE_ADOPT" not in found.ioctls


def test_maps_are_seen_by_the_device(edu: Edu, ioas: Ioas, ram: int) -> None:
    ioas.map_file(ram, 0, 64 * PAGE, iova=0x100000)
    KERNEL.pwrite(ram, b"\xa5" * PAGE, 3 * PAGE)
    edu.start()
    edu.copy(0x100000 + 3 * PAGE, 0x100000 + 9 * PAGE, PAGE)
    assert KERNEL.pread(ram, PAGE, 9 * PAGE) == b"\xa5" * PAGE


def test_a_read_only_map_keeps_the_device_from_writing(edu: Edu, ioas: Ioas, ram: int) -> None:
    ioas.map_file(ram, 0, 2 * PAGE, iova=0x100000, prot=READ)
    KERNEL.pwrite(ram, b"\x5a" * PAGE, 0)
    edu.start()
    edu.copy(0x100000, 0x100000 + PAGE, PAGE)
    assert KERNEL.pread(ram, PAGE, PAGE) == bytes(PAGE)


def test_user_memory_and_copies(ioas: Ioas, iommufd: Iommufd) -> None:
    mapping = KERNEL.mmap(-1, 4 * PAGE)
    ioas.map(mapping.hva, 4 * PAGE, iova=0x200000)
    other = iommufd.ioas_alloc()
    assert other.copy(ioas, 0x200000, 4 * PAGE, iova=0x300000) == 0x300000
    assert other.unmap_all() == 4 * PAGE
    assert ioas.unmap(0, 1 << 40) == 4 * PAGE
    other.destroy()
    mapping.close()


def test_the_kernel_chooses_an_iova(ioas: Ioas, ram: int) -> None:
    iova = ioas.map_file(ram, 0, PAGE)
    assert any(first <= iova <= last for first, last in ioas.iova_ranges())


def test_ranges_spare_the_interrupts(ioas: Ioas) -> None:
    ranges = ioas.iova_ranges()
    assert not any(first <= 0xFEE00000 <= last for first, last in ranges)
    # a first stage is the CPU's format: the lower half of its canonical addresses
    assert ranges[-1][1] == 2 ** (47 if MODE == "vtd-first-stage" else 48) - 1
    assert ioas.iova_alignment() == PAGE


def test_refusals_of_maps(ioas: Ioas, ram: int) -> None:
    ioas.map_file(ram, 0, PAGE, iova=0x100000)
    refused("EEXIST", ioas.map_file, ram, PAGE, PAGE, iova=0x100000)
    refused("EINVAL", ioas.map_file, ram, 0, PAGE, iova=0x100001)
    refused("EINVAL", ioas.map_file, ram, 0, 0, iova=0x200000)
    refused("EINVAL", ioas.map_file, ram, 63 * PAGE, 2 * PAGE, iova=0x200000)
    refused("EINVAL", ioas.map_file, ram, 0, PAGE, iova=0xFEE00000)
    refused("EINVAL", ioas.map_file, ram, 0, PAGE, iova=0x200000, prot=0)
    refused("EBADF", ioas.map_file, 999, 0, PAGE, iova=0x200000)
    refused("EFAULT", ioas.map, 0x1000, PAGE, iova=0x200000)
    refused("ENOENT", ioas.unmap, 0x900000, PAGE)
    ioas.map_file(ram, 0, 4 * PAGE, iova=0x400000)
    refused("ENOENT", ioas.unmap, 0x400000, PAGE)


def test_refusals_of_objects(iommufd: Iommufd, edu: Edu, ioas: Ioas) -> None:
    refused("EBUSY", ioas.destroy)
    refused("ENOENT", iommufd.destroy, 999)
    refused("EINVAL", edu.file.bind, iommufd)
    refused("ENOENT", edu.file.attach, 999)
    edu.file.detach()
    ioas.destroy()


def test_hwpts(iommufd: Iommufd, edu: Edu) -> None:
    assert edu.file.dev_id is not None
    ioas = iommufd.ioas_alloc()
    hwpt = iommufd.hwpt_alloc(edu.file.dev_id, ioas.id)
    assert edu.file.attach(hwpt) == hwpt
    other = iommufd.hwpt_alloc(edu.file.dev_id, ioas.id)
    assert edu.file.attach(other) == other
    edu.file.detach()
    for each in (hwpt, other, ioas.id):
        iommufd.destroy(each)


def test_hardware_names_itself(iommufd: Iommufd, edu: Edu) -> None:
    assert edu.file.dev_id is not None
    kinds = {uapi.IOMMU_HW_INFO_TYPE_AMD if AMD else uapi.IOMMU_HW_INFO_TYPE_INTEL_VTD}
    assert iommufd.hw_info(edu.file.dev_id).data_type in kinds


def test_what_is_closed_is_closed_once(iommufd: Iommufd) -> None:
    iommufd.close()
    iommufd.close()
    with pytest.raises(CapabilityError):
        KERNEL.open("/dev/vfio/devices/vfio99")


def test_sessions() -> None:
    with LiveUpdate(KERNEL) as luo:
        refused("EBUSY", LiveUpdate, KERNEL)
        with luo.create("a") as session:
            assert session.name() == "a"
            refused("EEXIST", luo.create, "a")
            refused("EINVAL", luo.create, "")
            refused("ENOENT", luo.retrieve, "b")
            refused("EINVAL", session.finish)
        with luo.create("a"):
            pass


def test_what_a_session_takes(iommufd: Iommufd, edu: Edu, ram: int) -> None:
    with LiveUpdate(KERNEL) as luo, luo.create("b") as session:
        session.preserve(ram, 1)
        refused("EBUSY", session.preserve, ram, 2)
        with pytest.raises(OSError, match="not permitted"):
            KERNEL.ftruncate(ram, PAGE)
        other = KERNEL.memfd_create("other")
        refused("EEXIST", session.preserve, other, 1)
        for fd in (iommufd.fd, edu.file.fd):
            refused("ENOENT", session.preserve, fd, 3)
        os.close(other)
    KERNEL.ftruncate(ram, PAGE)
