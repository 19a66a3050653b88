# SPDX-License-Identifier: Apache-2.0
"""A VMM on a host in one process: set up, saved, over the kexec, and processes that die at a chosen call."""

import contextlib

from iokeep.iommufd.client import Iommufd, VfioDevice
from iokeep.luo.client import LiveUpdate, Session
from iokeep.restore.manifest import Area, DeviceEntry, FileEntry, HwptEntry, Manifest
from iokeep.restore.save import SEALS_WANTED, save
from iokeep.soft.testing import LocalHost

MIB = 1 << 20
PATHS = ("/dev/vfio/devices/vfio0", "/dev/vfio/devices/vfio1")
AREAS = (
    Area(0, 4 * MIB - 1, 1, 0, 3),
    Area(0x1000_0000, 0x1000_FFFF, 2, 0, 1),
    Area(0x2000_1000, 0x2010_0FFF, 1, MIB, 3),
)
MANIFEST = Manifest(
    iommufd=0x10,
    files=(FileEntry(1, 8 * MIB, "ram"), FileEntry(2, 0x1_0000, "rom")),
    hwpts=(HwptEntry(0x20),),
    devices=tuple(DeviceEntry(0x30 + i, 0x20, p) for i, p in enumerate(PATHS)),
    areas=AREAS,
)


class Died(BaseException):
    """The process was killed: no handler of the library may catch this."""


class Dying:
    """A transport whose process dies at its n-th call that changes something, before or behind it."""

    def __init__(self, transport, at, behind):
        self._transport = transport
        self._left = at
        self._behind = behind
        self.calls = 0

    def __getattr__(self, name):
        real = getattr(self._transport, name)
        if name not in ("ioctl", "pwrite"):
            return real

        def call(*args):
            self.calls += 1
            self._left -= 1
            if self._left == 0 and not self._behind:
                raise Died
            try:
                return real(*args)
            finally:
                if self._left == 0 and self._behind:
                    raise Died

        return call


class Vmm:
    """One VMM and its custodian on a LocalHost."""

    def __init__(self, params=None, **kw):
        self.host = LocalHost(ram_bytes=32 * MIB, n_devices=2, params=params, devices=False, **kw)
        self.transport = self.host.transport()
        t = self.transport
        self.files = {}
        for f in MANIFEST.files:
            fd = t.memfd_create(f.name, 3)
            t.ftruncate(fd, f.size)
            t.fallocate(fd, 0, 0, f.size)
            t.add_seals(fd, SEALS_WANTED)
            self.files[f.token] = fd
        self.iommufd = Iommufd(t)
        self.ioas = self.iommufd.ioas_alloc()
        for a in AREAS:
            self.ioas.map_file(self.files[a.file], a.offset, a.length, iova=a.iova, prot=a.prot)
        self.devices = {d.token: VfioDevice(t, d.path) for d in MANIFEST.devices}
        ids = [d.bind(self.iommufd) for d in self.devices.values()]
        self.hwpts = {0x20: self.iommufd.hwpt_alloc(ids[0], self.ioas.id)}
        for d in self.devices.values():
            d.attach(self.hwpts[0x20])
        self.luo = LiveUpdate(t)

    def save(self, manifest=MANIFEST, session=None, **kw):
        given = {"files": self.files, "iommufd": self.iommufd, "hwpts": self.hwpts, "devices": self.devices}
        session = session or self.luo.create("vm-1")
        return save(self.transport, session, manifest, **{**given, **kw})

    def kexec(self, profile="soft-7.4", params=None):
        """Over to the next kernel; self.transport is then the custodian, which holds the session."""
        with contextlib.suppress(OSError):
            self.transport.reboot_kexec()
        self.host.kexec(profile, params)
        self.transport = self.host.transport()
        self.luo = LiveUpdate(self.transport)
        self.session = self.luo.retrieve("vm-1")

    def process(self, at=0, behind=False):
        """A new VMM process: its (transport, session). ``at``: it dies at that call."""
        real = self.host.transport()
        transport = Dying(real, at, behind) if at else real
        return transport, Session(transport, real.getfd(self.transport.getpid(), self.session.fd)), real

    def audit(self):
        return self.host.audit()
