# SPDX-License-Identifier: Apache-2.0
"""A guest with a memfd, an IOAS and a device, before and after the kexec; used by every test here."""

import contextlib
import errno
from dataclasses import dataclass, field

import pytest

from iokeep.errors import IokeepError
from iokeep.iommufd.client import Iommufd, VfioDevice
from iokeep.luo.client import LiveUpdate, Session
from iokeep.soft.hardware import bar
from iokeep.soft.testing import LocalHost

MIB = 1 << 20
SEALS = 1 | 2 | 4  # F_SEAL_SEAL | SHRINK | GROW
MFD_ALLOW_SEALING = 2
RAM_TOKEN, IOMMUFD_TOKEN, HWPT_TOKEN, DEVICE_TOKEN, DEVICE_TOKEN_2 = 0x10, 0x20, 0x77, 0x30, 0x31

#: iova, length, file offset, prot
AREAS = (
    (0x0, 4 * MIB, 0, 3),
    (0x1000_0000, 2 * MIB, 4 * MIB, 3),
    (0x2000_0000, 0x11000, 6 * MIB, 1),
    (0x40_0000_0000, 0x3000, 6 * MIB + 0x20000, 3),
)
TOTAL = sum(length for _, length, _, _ in AREAS)
FILE_BYTES = 8 * MIB
#: for a kernel that does not sweep by itself: what is proved was needed
STILL = {"sweep_rate": 0}


@contextlib.contextmanager
def fails(number, kind=(OSError, IokeepError)):
    """The block fails with this errno."""
    with pytest.raises(kind) as caught:
        yield caught
    found = getattr(caught.value, "errno", None)
    assert found is not None, caught.value
    assert errno.errorcode[found] == errno.errorcode[number], str(caught.value)


@dataclass
class Guest:
    """One VMM process and what it has open."""

    host: LocalHost
    areas: tuple = AREAS
    file_bytes: int = FILE_BYTES
    device_index: int = 0
    transport: object = None
    memfd: int = -1
    iommufd: Iommufd = None
    device: VfioDevice = None
    dev_id: int = 0
    ioas: object = None
    hwpt: int = 0
    luo: LiveUpdate = None
    session: Session = None
    rows: list = field(default_factory=list)

    def start(self, name="ram", seals=SEALS):
        t = self.transport = self.host.transport()
        self.memfd = t.memfd_create(name, MFD_ALLOW_SEALING)
        t.ftruncate(self.memfd, self.file_bytes)
        t.pwrite(self.memfd, b"guest memory " * 100, 0x7000)
        t.add_seals(self.memfd, seals)
        self.iommufd = Iommufd(t)
        self.device = VfioDevice(t, f"/dev/vfio/devices/vfio{self.device_index}")
        self.dev_id = self.device.bind(self.iommufd)
        self.replay()
        self.hwpt = self.iommufd.hwpt_alloc(self.dev_id, self.ioas.id)
        self.device.attach(self.hwpt)
        self.work()
        return self

    def replay(self, areas=None):
        self.ioas = self.iommufd.ioas_alloc()
        for iova, length, offset, prot in self.areas if areas is None else areas:
            self.ioas.map_file(self.memfd, offset, length, iova=iova, prot=prot)
        return self.ioas

    def work(self, areas=None):
        """The device works in all areas from now on."""
        tag = self.transport.fstat(self.memfd).st_ino
        flags = {3: bar.RANGE_READ | bar.RANGE_WRITE, 1: bar.RANGE_READ, 2: bar.RANGE_WRITE}
        self.rows = [
            bar.RangeRow(iova, iova + length - 1, offset >> 12, tag, flags[prot])
            for iova, length, offset, prot in (self.areas if areas is None else areas)
        ]
        if self.host.engines:
            self.host.set_ranges(self.device_index, self.rows)

    def open_luo(self):
        self.luo = LiveUpdate(self.transport)
        return self.luo

    def preserve(self, name="vm-1", mark=True):
        self.open_luo()
        self.session = self.luo.create(name)
        self.session.preserve(self.memfd, RAM_TOKEN)
        if mark:
            self.iommufd.mark_preserve(self.hwpt, HWPT_TOKEN)
        self.session.preserve(self.iommufd.fd, IOMMUFD_TOKEN)
        self.session.preserve(self.device.fd, DEVICE_TOKEN)
        return self

    def kexec(self, profile="soft-7.4", params=None, **kw):
        self.transport.reboot_kexec()
        self.host.run(4)
        self.host.kexec(profile, params)
        self.host.run(4)
        return Guest(self.host, self.areas, self.file_bytes, self.device_index, rows=self.rows)

    # ---- after the kexec

    def retrieve(self, name="vm-1"):
        self.transport = self.host.transport()
        self.open_luo()
        self.session = self.luo.retrieve(name)
        return self.retrieve_files()

    def retrieve_files(self):
        self.memfd = self.session.retrieve(RAM_TOKEN)
        self.iommufd = Iommufd(self.transport, self.session.retrieve(IOMMUFD_TOKEN))
        self.device = VfioDevice(self.transport, self.session.retrieve(DEVICE_TOKEN))
        return self

    def adopt(self, **kw):
        self.dev_id = self.device.bind(self.iommufd)
        self.replay()
        result = self.iommufd.adopt(self.ioas.id, HWPT_TOKEN, **kw)
        self.hwpt = result.hwpt_id
        self.device.attach(self.hwpt)
        return result

    def rebuild(self):
        self.dev_id = self.device.bind(self.iommufd)
        self.replay()
        self.hwpt = self.iommufd.hwpt_alloc(self.dev_id, self.ioas.id)
        result = self.iommufd.compare(self.hwpt, HWPT_TOKEN)
        self.device.attach(self.hwpt)
        return result

    def exit(self):
        self.transport.disconnect()
        self.host.settle()


def arrive(host, **params):
    """The new VMM, with everything retrieved and bound, on a kernel that does not sweep."""
    guest = Guest(host).start().preserve().kexec("soft-7.4", {**STILL, **params}).retrieve()
    guest.dev_id = guest.device.bind(guest.iommufd)
    return guest


def second(guest):
    """The other device in the same domain."""
    device = VfioDevice(guest.transport, "/dev/vfio/devices/vfio1")
    device.bind(guest.iommufd)
    device.attach(guest.hwpt)
    guest.host.set_ranges(1, guest.rows)
    return device


def clean(host, *, transactions=True):
    """Nothing was lost, nothing went astray, nothing leaked."""
    host.check()
    for index in range(len(host.engines)):
        stats = host.stats(index)
        assert (stats.faults, stats.lost, stats.misdirected) == (0, 0, 0), bar.read_incidents(
            host.platform.bars[index]
        )
        assert not transactions or stats.transactions
    check_audit(host)
    assert host.kernel.warnings == 0, host.log()


def check_audit(host):
    audit = host.audit()
    assert (audit.leaked, audit.wrongly_freed, audit.bad_unpins, audit.bad_puts) == (0, 0, 0, 0), audit
    return audit


def nothing_left(host):
    """After teardown only the kernel's own frames are in use."""
    audit = check_audit(host)
    kinds = {k: n for k, n in audit.by_kind.items() if k not in ("free", "firmware", "kernel")}
    assert not kinds, (kinds, host.log())
