# SPDX-License-Identifier: Apache-2.0
"""The client libraries against /dev/iommu, /dev/liveupdate and a VFIO device of a real kernel. Runs in the
guest.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from iokeep.cli.main import main
from iokeep.errors import CapabilityError, KernelRefused
from iokeep.inspect.doctor import examine
from iokeep.iommufd.client import READ, Ioas, Iommufd, IommufdError, VfioDevice
from iokeep.iommufd.pci import bound_to_vfio, cdev_of, pci_function, reserved_regions, set_driver
from iokeep.iommufd.viommu import FaultQueue, Viommu, invalidate
from iokeep.luo.client import LiveUpdate, LuoError
from iokeep.uapi import iommufd as uapi
from iokeep.uapi import kexec
from iokeep.uapi.kernel import KernelTransport
from iokeep.uapi.probe import probe
from vmtest.guest.edu import ADDRESSES, Edu, bind

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


def test_interrupts_that_are_not_remapped(iommufd: Iommufd) -> None:
    """QEMU's AMD IOMMU remaps none of a device's, and this boot allows that on its command line."""
    allowed = Path("/sys/module/iommufd/parameters/allow_unsafe_interrupts")
    allowed.write_text("N")
    try:
        device = Edu(ADDRESSES[1]).file
        with device:
            if AMD:
                refused("EPERM", device.bind, iommufd)
            else:
                device.bind(iommufd)
    finally:
        allowed.write_text("Y")


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


def test_a_device_that_is_not_bound(edu: Edu) -> None:
    """The other edu: every call but bind says that it is not bound."""
    node = cdev_of(ADDRESSES[1])
    assert node is not None
    with VfioDevice(KERNEL, node) as device, Iommufd(KERNEL) as other:
        for call in (device.info, device.reset, device.detach, lambda: device.attach(1)):
            refused("EINVAL", call)
        with Iommufd(KERNEL, os.open("/dev/null", os.O_RDWR)) as wrong:
            refused("EBADFD", device.bind, wrong)
        other.close()
        refused("EINVAL", device.bind, other)


def test_pasids(edu: Edu, ioas: Ioas) -> None:
    """The kernel looks at the HWPT first, then at the device."""
    refused("EINVAL", edu.file.attach, ioas.id, 1)
    edu.file.detach(1)
    if AMD:
        return  # its driver makes no HWPT for PASIDs of this device
    edu.file.detach()
    hwpt = ioas.iommufd.hwpt_alloc(edu.file.dev_id or 0, ioas.id, uapi.IOMMU_HWPT_ALLOC_PASID)
    edu.file.attach(hwpt)
    # a device that can make no request with a PASID may be attached under one (drivers/iommu/iommu.c)
    assert edu.file.attach(hwpt, 1) == hwpt
    refused("EBUSY", ioas.iommufd.destroy, hwpt)
    edu.file.detach(1)
    refused("ENOSPC", edu.file.attach, hwpt, 1 << 31)
    with pytest.raises(ValueError, match="PASID"):
        edu.file.attach(hwpt, 1 << 32)


def test_the_other_calls(iommufd: Iommufd, edu: Edu, ioas: Ioas, ram: int) -> None:
    """All of the uAPI that the tests above leave out, by the client, on hardware that offers little of it."""
    assert edu.file.dev_id is not None
    refused("EBUSY", iommufd.charge_by_process, True)
    with Iommufd(KERNEL) as fresh:
        assert fresh.charge_by_process() is False
        assert fresh.charge_by_process(True) is True
        refused("ENODEV", fresh.compat_ioas)
        compat = fresh.ioas_alloc()
        assert fresh.compat_ioas(compat.id) == fresh.compat_ioas() == compat.id
        assert fresh.compat_ioas(clear=True) == 0
        assert compat.huge_pages() is True
        assert compat.huge_pages(False) is False
        compat.allow_iovas([(0, 0xFFFFFFFF)])
        assert compat.map_file(ram, 0, PAGE) <= 0xFFFFFFFF
        fresh.change_process()
    iova = ioas.map_file(ram, 0, PAGE)
    hwpt = iommufd.hwpt_alloc(edu.file.dev_id, ioas.id)
    refused("EOPNOTSUPP", iommufd.set_dirty_tracking, hwpt, True)
    refused("EOPNOTSUPP", iommufd.dirty_bitmap, hwpt, iova, PAGE)
    refused("EOPNOTSUPP", iommufd.noiommu_pa, ioas.id, iova, PAGE)
    refused("EOPNOTSUPP", iommufd.hwpt_alloc, edu.file.dev_id, ioas.id, uapi.IOMMU_HWPT_ALLOC_DIRTY_TRACKING)
    refused("EINVAL", invalidate, iommufd, hwpt, uapi.IOMMU_HWPT_INVALIDATE_DATA_VTD_S1, [])
    # AMD's driver has vIOMMUs and looks at the HWPT first; Intel's has none
    no = "EINVAL" if AMD else "EOPNOTSUPP"
    refused(no, Viommu, iommufd, edu.file.dev_id, hwpt, uapi.IOMMU_VIOMMU_TYPE_ARM_SMMUV3)
    with FaultQueue(iommufd) as queue:
        assert queue.id
    iommufd.destroy(queue.id)


def test_a_device_is_given_to_vfio_and_back() -> None:
    address = ADDRESSES[1]
    set_driver(address, None)
    assert pci_function(address).driver is None
    with bound_to_vfio(address) as cdev:
        assert pci_function(address).driver == "vfio-pci"
        assert pci_function(address).cdev == cdev
        with pytest.raises(CapabilityError, match="no PCI driver"):
            set_driver(address, "nonesuch")
    assert pci_function(address).driver is None
    assert cdev_of(address) is None
    assert (0xFEE00000, 0xFEEFFFFF, "msi") in reserved_regions(address)
    with pytest.raises(CapabilityError, match="no PCI device"), bound_to_vfio("0000:00:1f.7"):
        pass
    set_driver(address, "vfio-pci")


def test_the_example_of_the_documentation() -> None:
    """docs/real-host.md, section 2, as printed, with this machine's device."""
    text = Path("docs/real-host.md").read_text()
    code = re.search(r"^## 2\..*?```python\n(.*?)```", text, re.MULTILINE | re.DOTALL)
    assert code is not None
    assert "0000:01:00.0" in code[1]
    set_driver(ADDRESSES[1], None)
    found: dict[str, object] = {}
    exec(code[1].replace("0000:01:00.0", ADDRESSES[1]), found)
    assert isinstance(found["hwpt"], int)
    set_driver(ADDRESSES[1], "vfio-pci")


def test_doctor_finds_nothing_missing(capsys: pytest.CaptureFixture[str]) -> None:
    bind()
    report = examine(transport=KERNEL)
    assert report.missing == []
    assert report.abilities == {
        "rehearse": True,
        "map": True,
        "carry_memory": True,
        "keep_translations": False,
    }
    states = {check.name: check.state for check in report.checks}
    assert (states["IOMMU"], states["KHO"], states["translations"]) == ("ok", "ok", "absent")
    assert states["table proof"] == "ok"
    assert main(["host", "doctor"]) == 0
    assert "can      carry memfds over a kexec" in capsys.readouterr().out


def test_loading_the_next_kernel() -> None:
    loaded = Path("/sys/kernel/kexec_loaded")
    with pytest.raises(KernelRefused, match="ENOEXEC"):
        kexec.load(Path("/etc/passwd"), "quiet")
    kexec.load(Path(os.environ["IOKEEP_VM_KERNEL"]) / "bzImage", "quiet")
    assert loaded.read_text() == "1\n"
    kexec.unload()
    assert loaded.read_text() == "0\n"
    with pytest.raises(KernelRefused, match="no kernel is loaded"):
        kexec.jump(KERNEL)


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
