# SPDX-License-Identifier: Apache-2.0
"""What the suite runs on: a software host, or the running kernel. Everything above talks system calls.

IOKEEP_MACHINE=soft (default): a software kernel in a thread, with its VFIO devices and the mock IOMMU of
conf_mock.py. IOKEEP_MACHINE=kernel: the running kernel, as root; mock devices where it has
CONFIG_IOMMUFD_TEST, and the VFIO devices that /dev/vfio/devices shows; IOKEEP_VFIO=ADDRESS,... gives PCI
devices to vfio-pci first. What a kernel does not have is not tested, and said at the end.
"""

import contextlib
import ctypes
import errno
import os
from pathlib import Path

from conf_selftest import IOMMU_TEST_CMD, iommu_test_cmd

from iokeep.errors import CapabilityError
from iokeep.iommufd.pci import set_driver
from iokeep.uapi import iommufd as uapi
from iokeep.uapi.kernel import KernelTransport

#: lines for the end of the run
NOTES = []
MIB = 1 << 20
#: names in /sys/class/iommu -> the software host's kind
_HARDWARE = {"dmar": "vtd", "ivhd": "amd"}
#: taint bit of a WARN (Documentation/admin-guide/tainted-kernels.rst), and of an oops
_TAINT_WARN, _TAINT_DIE = 1 << 9, 1 << 7


def machine_name():
    name = os.environ.get("IOKEEP_MACHINE", "soft")
    if name not in ("soft", "kernel"):
        raise SystemExit(f"IOKEEP_MACHINE={name}: neither soft nor kernel")
    return name


class SoftMachine:
    """A software kernel in a thread.

    :ivar transport: system calls of one process. ``mock``: IOMMU_TEST_CMD is there. ``vfio``: device nodes.
    ``luo``: /dev/liveupdate is there. ``noiommu``: IOMMU_IOAS_NOIOMMU_GET_PA is built in. ``iommu``: kind of
    the hardware. ``mode``: parameter ``iommu`` of the software kernel.
    """

    name = "soft"

    def __init__(self, iommu="vtd", mode=None):
        from conf_mock import install

        from iokeep.soft.testing import LocalHost

        self.host = LocalHost(
            64 * MIB, 2, params={"iommu": mode} if mode else None, devices=False, iommu=iommu
        )
        install(self.host.kernel)
        self.transport = self.host.transport()
        self.mock = self.luo = self.noiommu = True
        self.iommu = iommu
        self.vfio = ["/dev/vfio/devices/vfio0", "/dev/vfio/devices/vfio1"]

    def warnings(self):
        """Warnings that the kernel has logged so far."""
        self.host.check()
        return self.host.kernel.warnings

    def process(self):
        """A second process."""
        from conf_process import SoftProcess

        return SoftProcess(self.host)

    def close(self):
        self.transport.disconnect()
        audit = self.host.audit()
        self.host.stop()
        found = (audit.leaked, audit.wrongly_freed, audit.bad_unpins, audit.bad_puts)
        assert found == (0, 0, 0, 0), audit


class KernelMachine:
    """The running kernel."""

    name = "kernel"

    def __init__(self):
        self.transport = KernelTransport()
        for address in filter(None, os.environ.get("IOKEEP_VFIO", "").split(",")):
            set_driver(address, "vfio-pci")
        self.luo = Path("/dev/liveupdate").exists()
        hardware = sorted(each.name for each in Path("/sys/class/iommu").glob("*"))
        self.iommu = next(
            (kind for each in hardware if (kind := _HARDWARE.get(each.rstrip("0123456789")))), "vtd"
        )
        self.vfio = [str(each) for each in sorted(Path("/dev/vfio/devices").glob("vfio*"))]
        self.mock = self.noiommu = False
        fd = self.transport.open("/dev/iommu")
        try:
            # every op but the known ones is EOPNOTSUPP; a kernel without the test says ENOTTY
            self.mock = self._errno(
                fd, IOMMU_TEST_CMD, iommu_test_cmd(size=ctypes.sizeof(iommu_test_cmd))
            ) == (errno.EOPNOTSUPP)
            arg = uapi.iommu_ioas_noiommu_get_pa(size=ctypes.sizeof(uapi.iommu_ioas_noiommu_get_pa))
            self.noiommu = self._errno(fd, uapi.IOMMU_IOAS_NOIOMMU_GET_PA, arg) == errno.EINVAL
        finally:
            self.transport.close(fd)
        for what in ("luo", "mock", "vfio", "noiommu"):
            if not getattr(self, what):
                NOTES.append(f"this kernel has no {what}: cases that need it were not run")

    def _errno(self, fd, request, arg):
        try:
            self.transport.ioctl(fd, request, arg)
        except OSError as error:
            return error.errno
        return 0

    def warnings(self):
        """Taint bits of warnings and oopses."""
        with contextlib.suppress(OSError):
            return int(Path("/proc/sys/kernel/tainted").read_text()) & (_TAINT_WARN | _TAINT_DIE)
        return 0

    def process(self):
        """A second process."""
        from conf_process import ForkedProcess

        return ForkedProcess()

    def close(self):
        """Descriptors are closed by who opened them."""


_OPENED = {}


def open_machine():
    """The machine; opened once (cases ask at collection what it has)."""
    name = machine_name()
    if name not in _OPENED:
        try:
            _OPENED[name] = SoftMachine() if name == "soft" else KernelMachine()
        except CapabilityError as error:
            raise SystemExit(f"IOKEEP_MACHINE={name}: {error.what}: {error.hint}") from error
    return _OPENED[name]


def device_kinds(machine):
    """What can show an IOAS: "mock", "vfio"."""
    return [kind for kind in ("mock", "vfio") if getattr(machine, kind)]
