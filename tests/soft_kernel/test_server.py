# SPDX-License-Identifier: Apache-2.0
"""The kernel as a process of its own, and clients that use the public library over its socket."""

import contextlib
import ctypes
import errno
import json
import math
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from iokeep.iommufd.client import Iommufd, IommufdError, VfioDevice
from iokeep.soft.hardware.platform import Platform
from iokeep.soft.kernel.kernel import Kernel
from iokeep.soft.kernel.server import OOPS_STATUS, Oops, Server
from iokeep.uapi import iommufd as uapi
from iokeep.uapi import wire
from iokeep.uapi.soft import SoftTransport

MIB = 1 << 20
AUDIT = "/sys/kernel/debug/iokeep/audit"


class Machine:
    """A platform and one kernel process on it."""

    def __init__(self, directory, *params, ram=64 * MIB):
        self.platform = Platform.create(ram, 2)
        self.path = directory / "kernel.sock"
        fds = self.platform.fds
        words = [
            sys.executable, "-m", "iokeep.soft.kernel", "--ram-fd", str(fds.ram), "--regs-fd", str(fds.regs),
            "--tags-fd", str(fds.tags), "--socket", str(self.path),
        ]  # fmt: skip
        for param in params:
            words += ["--param", param]
        self.log = directory / "kernel.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(words, stderr=log, pass_fds=(fds.ram, fds.regs, fds.tags))
        end = time.monotonic() + 30
        while not self.path.exists():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end
            time.sleep(0.01)

    def transport(self):
        end = time.monotonic() + 10
        while True:
            try:
                return SoftTransport(self.path)
            except ConnectionRefusedError:
                assert time.monotonic() < end
                time.sleep(0.01)

    def audit(self):
        transport = self.transport()
        found = json.loads(transport.pread(transport.open(AUDIT), 1 << 20, 0))
        transport.disconnect()
        return found

    def clean(self):
        """Nothing leaked, nothing lost, no memory of a process left."""
        end = time.monotonic() + 5
        while True:
            found = self.audit()
            if not {"memfd", "anon", "pgtable"} & set(found["by_kind"]) or time.monotonic() > end:
                break
        assert not {"memfd", "anon", "pgtable"} & set(found["by_kind"]), found
        assert [found[k] for k in ("leaked", "wrongly_freed", "bad_unpins", "bad_puts")] == [0] * 4, found

    def stop(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        self.platform.close()


@pytest.fixture
def machine(tmp_path):
    machine = Machine(tmp_path, "placement=mixed:1")
    yield machine
    machine.stop()


def test_a_guest_comes_and_goes(machine):
    with machine.transport() as t:
        ram = t.memfd_create("guest", 2)
        t.ftruncate(ram, 16 * MIB)
        view = t.mmap(ram, 16 * MIB)
        view.write(5 * MIB - 3, b"abcdef")
        assert t.pread(ram, 6, 5 * MIB - 3) == b"abcdef"
        iommufd = Iommufd(t)
        device = VfioDevice(t, "/dev/vfio/devices/vfio0")
        dev = device.bind(iommufd)
        ioas = iommufd.ioas_alloc()
        ioas.map_file(ram, 0, 16 * MIB, 0x1000000)
        hwpt = device.attach(ioas.id)
        assert hwpt not in (ioas.id, dev)
        assert len(ioas.iova_ranges()) == 2
        user = t.mmap(-1, MIB)
        at = ioas.map(user.hva, MIB)
        assert ioas.unmap(at, MIB) == MIB
        with pytest.raises(IommufdError) as caught:
            ioas.map_file(ram, 0, 4096, 0x1000000)
        assert caught.value.errno == errno.EEXIST
        info = iommufd.hw_info(dev)
        assert machine.platform.iommu.read64(8).to_bytes(8, "little") in info.data
        region = device.map_region(0)
        assert region.read(0, 8) == b"iokeepDM"
    machine.clean()
    machine.process.send_signal(signal.SIGTERM)
    assert machine.process.wait(10) == 0
    assert not machine.path.exists()


def test_getfd_between_processes(machine):
    with machine.transport() as a, machine.transport() as b:
        fd = a.memfd_create("shared", 2)
        a.pwrite(fd, b"from a", 0)
        mine = b.getfd(a.getpid(), fd)
        assert b.pread(mine, 6, 0) == b"from a"
        assert b.fstat(mine).st_ino == a.fstat(fd).st_ino
    machine.clean()


def test_bad_pointers_are_efault(machine):
    with machine.transport() as t:
        iommufd = Iommufd(t)
        ioas = iommufd.ioas_alloc()
        cmd = uapi.iommu_ioas_allow_iovas(size=24, ioas_id=ioas.id, num_iovas=3, allowed_iovas=8)
        with pytest.raises(OSError) as caught:
            t.ioctl(iommufd.fd, uapi.IOMMU_IOAS_ALLOW_IOVAS, cmd)
        assert caught.value.errno == errno.EFAULT
        ranges = (uapi.iommu_iova_range * 2)((0x1000, 0x1FFF), (0x3000, 0x3FFF))
        cmd = uapi.iommu_ioas_allow_iovas(
            size=24, ioas_id=ioas.id, num_iovas=2, allowed_iovas=ctypes.addressof(ranges)
        )
        t.ioctl(iommufd.fd, uapi.IOMMU_IOAS_ALLOW_IOVAS, cmd)


CLIENT = textwrap.dedent("""
    import sys, ctypes
    from iokeep.uapi.soft import SoftTransport
    from iokeep.iommufd.client import Iommufd, VfioDevice
    t = SoftTransport(sys.argv[1])
    ram = t.memfd_create("guest", 2); t.ftruncate(ram, 8 << 20)
    view = t.mmap(ram, 8 << 20)
    iommufd = Iommufd(t); device = VfioDevice(t, "/dev/vfio/devices/vfio1"); device.bind(iommufd)
    ioas = iommufd.ioas_alloc(); device.attach(ioas.id); ioas.map_file(ram, 0, 8 << 20, 0)
    print("ready", flush=True)
    i = 0
    while True:
        ioas.map_file(ram, 0, 4096, 1 << 32); ioas.unmap(1 << 32, 4096)
""")


def test_a_killed_guest_leaves_nothing(machine):
    for _ in range(3):
        client = subprocess.Popen([sys.executable, "-c", CLIENT, str(machine.path)], stdout=subprocess.PIPE)
        assert client.stdout.readline() == b"ready\n"
        time.sleep(0.05)
        client.send_signal(signal.SIGKILL)
        client.wait(10)
        client.stdout.close()
        machine.clean()
    assert machine.process.poll() is None


def test_the_socket_takes_connections_as_soon_as_it_is_there(tmp_path, monkeypatch):
    """A name that is there before listen() refuses whoever waited for it."""
    path = tmp_path / "kernel.sock"
    seen = []
    listen = socket.socket.listen

    def watched(self, backlog):
        seen.append(path.exists())
        listen(self, backlog)

    monkeypatch.setattr(socket.socket, "listen", watched)
    kernel = Kernel(Platform.create(16 * MIB, 1))
    server = Server(kernel, path)
    assert seen == [False]
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(path))
    assert [p.name for p in tmp_path.iterdir()] == ["kernel.sock"]
    with pytest.raises(FileExistsError):
        Server(kernel, path)
    assert [p.name for p in tmp_path.iterdir()] == ["kernel.sock"]
    server.close()
    assert not path.exists()


def test_a_socket_in_a_deep_directory(tmp_path):
    """A path of more bytes than sockaddr_un has: as TMPDIR may be."""
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    path = deep / "kernel.sock"
    kernel = Kernel(Platform.create(16 * MIB, 1))
    fds = len(list(Path("/proc/self/fd").iterdir()))
    server = Server(kernel, path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client, wire.socket_address(path) as address:
        assert len(address) < 108
        client.connect(address)
    assert [p.name for p in deep.iterdir()] == ["kernel.sock"]
    server.close()
    assert not path.exists()
    assert len(list(Path("/proc/self/fd").iterdir())) <= fds
    with wire.socket_address(tmp_path / "short") as address:
        assert address == str(tmp_path / "short") or len(str(tmp_path)) > 100


def raw_client(machine):
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(str(machine.path))
    channel = wire.Channel(sock, 5.0)
    channel.send(wire.Call.HELLO, -1, (wire.VERSION,))
    fds = []
    answer = channel.receive(5.0, fds)
    for fd in fds:
        os.close(fd)
    return channel, answer


def test_killed_while_the_kernel_reads_its_memory(machine):
    channel, _ = raw_client(machine)
    channel.send(wire.Call.OPEN, -1, (), b"/dev/iommu")
    fd = channel.receive(5.0).args[0]
    channel.send(wire.Call.IOCTL, fd, (uapi.IOMMU_IOAS_ALLOC,), bytes(uapi.iommu_ioas_alloc(size=12)))
    channel.receive(5.0)
    cmd = uapi.iommu_ioas_allow_iovas(size=24, ioas_id=1, num_iovas=1, allowed_iovas=0x1000)
    channel.send(wire.Call.IOCTL, fd, (uapi.IOMMU_IOAS_ALLOW_IOVAS,), bytes(cmd))
    assert channel.receive(5.0).call == wire.Call.COPY_FROM_USER
    channel.close()
    machine.clean()


def test_garbage_ends_only_its_own_connection(machine):
    for data in (b"x" * 64, b"\0" * 200, os.urandom(300)):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(str(machine.path))
        sock.sendall(data)
        sock.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            while sock.recv(4096):
                pass
        sock.close()
    channel, answer = raw_client(machine)
    assert answer.fd == 0
    channel.close()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(str(machine.path))
    early = wire.Channel(sock, 5.0)
    early.send(wire.Call.GETPID)
    assert early.receive(5.0).fd == errno.EPROTO
    early.close()
    machine.clean()


def test_background_work_is_done_between_calls(tmp_path):
    with contextlib.closing(Platform.create(16 * MIB, 1)) as platform:
        kernel = Kernel(platform)
        kernel.boot()
        done, left = [], [0.0, 0.0, 0.001, math.inf]

        def work():
            done.append(time.monotonic())
            if not left[1:]:
                server.stop()
            return left.pop(0) if len(left) > 1 else left[0]

        assert kernel.work() == math.inf
        kernel.background.append(work)
        server = Server(kernel, tmp_path / "s")
        server.run()
        server.close()
    assert len(done) == 4
    assert done[-1] - done[0] < 5


def test_a_bug_in_background_work_is_an_oops(tmp_path):
    def work():
        raise KeyError("a bug")

    with contextlib.closing(Platform.create(16 * MIB, 1)) as platform:
        kernel = Kernel(platform)
        kernel.boot()
        kernel.background.append(work)
        server = Server(kernel, tmp_path / "s")
        with pytest.raises(Oops):
            server.run()
        server.close()
        assert "background work" in kernel.klog.text()


def test_an_oops_ends_the_kernel_with_its_own_status(machine):
    t = machine.transport()
    fd = t.open("/proc/sysrq-trigger")
    with pytest.raises(wire.WireError):
        t.pwrite(fd, b"c", 0)
    assert machine.process.wait(10) == OOPS_STATUS
    log = machine.log.read_text()
    assert "Oops" in log
    assert "SysrqCrash" in log
    t.disconnect()


def test_a_kernel_that_cannot_boot_says_why(tmp_path):
    with pytest.raises(AssertionError, match="must be one of legacy"):
        Machine(tmp_path, "iommu=sideways")


def test_kmsg_has_the_reasons(machine):
    with machine.transport() as t:
        iommufd = Iommufd(t)
        with pytest.raises(IommufdError):
            iommufd.destroy(77)
        text = t.pread(t.open("/dev/kmsg"), 1 << 20, 0).decode()
        assert "iommufd has no object 77" in text


def test_many_areas(machine):
    with machine.transport() as t:
        ram = t.memfd_create("guest", 2)
        t.ftruncate(ram, 8 * MIB)
        iommufd = Iommufd(t)
        device = VfioDevice(t, "/dev/vfio/devices/vfio0")
        device.bind(iommufd)
        ioas = iommufd.ioas_alloc()
        device.attach(ioas.id)
        for i in range(2_000):
            ioas.map_file(ram, i % 2048 * 4096, 4096, 0x10_0000_0000 + i * 8192)
        assert ioas.unmap_all() == 2_000 * 4096
    machine.clean()


def test_reboot_ends_the_kernel_and_leaves_memory(machine):
    t = machine.transport()
    ram = t.memfd_create("guest", 2)
    t.ftruncate(ram, MIB)
    t.pwrite(ram, b"still there", 0)
    ino = t.fstat(ram).st_ino
    t.reboot_kexec()
    assert machine.process.wait(10) == 0
    mine = np.flatnonzero(machine.platform.tags == ino)
    assert len(mine) >= 1
    assert any(machine.platform.ram.read(int(p) * 4096, 11) == b"still there" for p in mine)
    t.disconnect()


def test_the_kernel_does_not_load_a_compiler():
    code = "import sys, iokeep.soft.kernel.__main__; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
