# SPDX-License-Identifier: Apache-2.0
"""The host with real processes: the kernel ends and begins while a device works."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from liveupdate_support import AREAS, DEVICE_TOKEN, HWPT_TOKEN, IOMMUFD_TOKEN, RAM_TOKEN, Guest

from iokeep.iommufd.client import Iommufd, VfioDevice
from iokeep.luo.client import LiveUpdate
from iokeep.soft.hardware import bar
from iokeep.soft.host import HostError, SoftHost


class _Adapter:
    """What Guest wants of a host."""

    engines = ()

    def __init__(self, host):
        self.host = host

    def transport(self):
        return self.host.transport()


def _wait(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture
def host():
    with SoftHost.create(64 << 20, 2, "soft-7.3") as host:
        yield host


def test_a_device_works_through_the_kexec(host):
    guest = Guest(_Adapter(host)).start()
    windows = host.platform.bars
    guest.work()
    bar.write_ranges(windows[0], guest.rows)
    bar.enable(windows[0])
    _wait(lambda: bar.decode_stats(windows[0]).total.transactions > 1000)
    guest.preserve()
    host.set_step(1)
    guest.transport.reboot_kexec()
    times = host.kexec("soft-7.4")
    assert times.ready >= times.ended
    _wait(lambda: bar.decode_stats(windows[0]).steps[1].transactions > 1000)
    host.set_step(2)
    t = host.transport()
    session = LiveUpdate(t).retrieve("vm-1")
    memfd = session.retrieve(RAM_TOKEN)
    iommufd = Iommufd(t, session.retrieve(IOMMUFD_TOKEN))
    device = VfioDevice(t, session.retrieve(DEVICE_TOKEN))
    device.bind(iommufd)
    ioas = iommufd.ioas_alloc()
    for iova, length, offset, prot in AREAS:
        ioas.map_file(memfd, offset, length, iova=iova, prot=prot)
    device.attach(iommufd.adopt(ioas.id, HWPT_TOKEN).hwpt_id)
    session.finish()
    _wait(lambda: bar.decode_stats(windows[0]).steps[2].transactions > 1000)
    bar.enable(windows[0], False)
    bar.command(windows[0], bar.CMD_VERIFY_ALL)
    total = bar.decode_stats(windows[0]).total
    assert (total.faults, total.lost, total.misdirected) == (0, 0, 0), bar.read_incidents(windows[0])
    status = bar.read_status(windows[0])
    assert status.verify_checked
    assert (status.verify_lost, status.verify_misdirected, status.verify_faults) == (0, 0, 0)
    audit = host.audit()
    assert (audit["leaked"], audit["wrongly_freed"]) == (0, 0)
    t.disconnect()
    _wait(lambda: "memfd" not in host.audit()["by_kind"])
    host.check()
    assert "kexec" in host.kernel_log(0)
    assert "live update 1" in host.kernel_log(1)


def test_the_old_kernel_must_end_first(host):
    with pytest.raises(HostError, match="reboot_kexec"):
        host.kexec("soft-7.4", timeout=0.1)


def test_a_kernel_that_does_not_boot_is_reported():
    with pytest.raises(HostError, match="no kernel profile"):
        SoftHost.create(64 << 20, 1, "soft-9.9")


def test_stop_leaves_nothing(host):
    pids = [child.process.pid for child in (*host.kernels, *host.devices)]
    directory = host.directory
    host.stop()
    host.stop()
    assert not directory.exists()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


_PARENT = """
import sys, time
from iokeep.soft.host import SoftHost
host = SoftHost.create(64 << 20, 1)
print(*[c.process.pid for c in (*host.kernels, *host.devices)], host.directory, flush=True)
time.sleep(60)
"""


def _alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_children_end_with_their_parent(number):
    parent = subprocess.Popen([sys.executable, "-c", _PARENT], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    *pids, directory = parent.stdout.readline().split()
    assert len(pids) == 2
    parent.send_signal(number)
    parent.communicate(timeout=30)
    _wait(lambda: not any(_alive(int(pid)) for pid in pids))
    if number == signal.SIGINT:  # it could still tidy up
        assert not Path(directory.decode()).exists()
    shutil.rmtree(directory.decode(), ignore_errors=True)
