# SPDX-License-Identifier: Apache-2.0
"""Probing looks at what is there; it never asks for the version and changes nothing."""

import ctypes
import errno
from pathlib import Path

from iokeep.errors import CapabilityError
from iokeep.uapi.copy_struct import IOMMU_IOCTLS, PROPOSED_IOCTLS
from iokeep.uapi.probe import IommuHardware, known_ioctls, probe


def host(root: Path) -> Path:
    for name, text in {
        "dev/iommu": "",
        "dev/liveupdate": "",
        "dev/vfio/devices/vfio0": "",
        "dev/vfio/devices/vfio1": "",
        "proc/cmdline": "root=/dev/sda kho=on liveupdate=on quiet\n",
        "sys/kernel/kexec_loaded": "1\n",
        "sys/kernel/debug/kho/out/fdt": "",
        "sys/class/iommu/dmar0/intel-iommu/cap": "d2008c40660462\n",
        "sys/class/iommu/dmar0/devices/0000:00:03.0": "",
        "sys/class/iommu/iommufd_selftest_iommu.0/devices/x": "",  # a mock, no hardware
        "sys/kernel/iommu_groups/0/type": "",
        "sys/kernel/iommu_groups/1/type": "",
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


class Node:
    """/dev/iommu that knows some requests, by the kernel's rule for a size of 0."""

    def __init__(self, known, error=None):
        self.known, self.error, self.open_fds = known, error, set()

    def open(self, path):
        assert path == "/dev/iommu"
        if self.error:
            raise self.error
        self.open_fds.add(3)
        return 3

    def close(self, fd):
        self.open_fds.remove(fd)

    def ioctl(self, fd, request, arg):
        assert not any(bytes(arg)), "a probe may not ask for anything"
        assert ctypes.sizeof(arg) >= 4
        number = errno.EINVAL if request in self.known else errno.ENOTTY
        raise OSError(number, "")


def test_a_ready_host(tmp_path):
    node = Node({**IOMMU_IOCTLS, **PROPOSED_IOCTLS})
    found = probe(host(tmp_path), node)
    assert found.iommu_node
    assert found.iommu_usable
    assert found.liveupdate_usable
    assert found.vfio_devices == ("vfio0", "vfio1")
    assert (found.cmdline_kho, found.cmdline_liveupdate) == ("on", "on")
    assert (found.kho_out, found.kho_in, found.kexec_loaded) == (True, False, True)
    assert found.hardware == (IommuHardware("dmar0", {"cap": "d2008c40660462"}, ("0000:00:03.0",)),)
    assert found.iommu_groups == 2
    assert found.missing() == []
    assert not node.open_fds


def test_an_empty_host(tmp_path):
    found = probe(tmp_path)
    assert not found.iommu_node
    assert found.ioctls is None
    assert (found.kexec_loaded, found.cmdline_kho) == (None, None)
    whats = [what for what, _ in found.missing()]
    assert whats == [
        "/dev/iommu is not there",
        "/dev/liveupdate is not there",
        "no VFIO device node",
        "no IOMMU",
    ]


def test_a_stock_kernel_lacks_the_proposal(tmp_path):
    found = probe(host(tmp_path), Node(IOMMU_IOCTLS))
    assert found.ioctls == {op.name for op in IOMMU_IOCTLS.values()}
    [(what, _)] = found.missing()
    assert "IOMMU_HWPT_LIVEUPDATE_ADOPT" in what


def test_nodes_that_do_not_open():
    assert known_ioctls(Node({}, OSError(errno.EACCES, ""))) is None
    assert known_ioctls(Node({}, CapabilityError("no node"))) is None


def test_this_host():
    """Whatever this host is, looking works and agrees with the file system."""
    found = probe()
    assert found.iommu_node == Path("/dev/iommu").exists()
    assert found.liveupdate_node == Path("/dev/liveupdate").exists()
