# SPDX-License-Identifier: Apache-2.0
"""A VMM that dies, at any step, before or after the kexec."""

import errno

import pytest
from liveupdate_support import (
    DEVICE_TOKEN,
    HWPT_TOKEN,
    IOMMUFD_TOKEN,
    RAM_TOKEN,
    Guest,
    check_audit,
    clean,
    fails,
    nothing_left,
)

from iokeep.luo.client import LiveUpdate, Session


def _steps_before(guest):
    yield "open"
    guest.open_luo()
    yield "create"
    guest.session = guest.luo.create("vm-1")
    yield "memfd"
    guest.session.preserve(guest.memfd, RAM_TOKEN)
    yield "mark"
    guest.iommufd.mark_preserve(guest.hwpt, HWPT_TOKEN)
    yield "iommufd"
    guest.session.preserve(guest.iommufd.fd, IOMMUFD_TOKEN)
    yield "device"
    guest.session.preserve(guest.device.fd, DEVICE_TOKEN)
    yield "done"


def _steps_after(guest, adopt):
    guest.dev_id = guest.device.bind(guest.iommufd)
    yield "bind"
    guest.replay()
    yield "replay"
    if adopt:
        guest.hwpt = guest.iommufd.adopt(guest.ioas.id, HWPT_TOKEN).hwpt_id
    else:
        guest.hwpt = guest.iommufd.hwpt_alloc(guest.dev_id, guest.ioas.id)
        yield "alloc"
        guest.iommufd.compare(guest.hwpt, HWPT_TOKEN)
    yield "prove"
    guest.device.attach(guest.hwpt)
    yield "attach"
    guest.session.finish()
    yield "finish"


@pytest.mark.parametrize("step", ["open", "create", "memfd", "mark", "iommufd", "device", "done"])
def test_before_the_kexec(host, step):
    """The session goes with the process: everything is given back."""
    guest = Guest(host).start()
    for reached in _steps_before(guest):
        if reached == step:
            break
    guest.exit()
    nothing_left(host)
    LiveUpdate(host.transport()).create("vm-1").close()


_COURSE = ("retrieve", "bind", "replay", "alloc", "prove", "attach", "finish")


@pytest.mark.parametrize(
    ("step", "adopt"),
    [(step, adopt) for adopt in (True, False) for step in _COURSE if not (adopt and step == "alloc")],
)
def test_after_the_kexec_with_a_custodian(host, step, adopt):
    """Somebody else holds the session: the files live on, the next VMM goes on from where this one was."""
    guest = Guest(host).start().preserve().kexec().retrieve()
    keeper = host.transport()
    kept = keeper.getfd(guest.transport.getpid(), guest.session.fd)
    reached = "retrieve"
    if step != "retrieve":
        for reached in _steps_after(guest, adopt):
            if reached == step:
                break
    guest.exit()
    host.run()
    if step == "finish":
        assert host.stats().faults == 0
        check_audit(host)
        return
    clean(host)
    next_guest = Guest(host, guest.areas, guest.file_bytes, rows=guest.rows)
    t = next_guest.transport = host.transport()
    next_guest.session = Session(t, t.getfd(keeper.getpid(), kept))
    next_guest.retrieve_files()
    known = {"retrieve": 0, "bind": 1, "replay": 2, "alloc": 3, "prove": 3, "attach": 4}[step]
    if known >= 1:
        with fails(errno.EINVAL):
            next_guest.device.bind(next_guest.iommufd)  # it is bound, as the file is the same
        next_guest.dev_id = guest.dev_id
    if known < 4:
        if known >= 3:
            next_guest.iommufd.destroy(guest.hwpt)
        if known >= 2:
            next_guest.iommufd.destroy(guest.ioas.id)
        host.run()
        clean(host)
        steps = _steps_after(next_guest, adopt)
        if known >= 1:
            next_guest.device.bind = lambda iommufd: guest.dev_id
        for _ in steps:
            pass
    else:
        next_guest.session.finish()
    host.run()
    clean(host)
    keeper.close(kept)
    next_guest.exit()
    nothing_left(host)


@pytest.mark.parametrize("step", ["nothing", "retrieve", "bind", "replay", "prove"])
def test_after_the_kexec_with_nobody(host, step):
    """The session is gone too: it stays listed, all is held, the device goes on."""
    guest = Guest(host).start().preserve().kexec()
    if step == "nothing":
        guest.transport = host.transport()
        guest.session = guest.open_luo().retrieve("vm-1")
    else:
        guest.retrieve()
        if step != "retrieve":
            for reached in _steps_after(guest, True):
                if reached == step:
                    break
    guest.exit()
    before = host.stats().transactions
    host.run()
    assert host.stats().transactions > before
    clean(host)
    with fails(errno.EINVAL):
        LiveUpdate(host.transport()).retrieve("vm-1")


def test_nobody_ever_comes(host):
    guest = Guest(host).start().preserve().kexec()
    before = host.stats().transactions
    for _ in range(4):
        host.run()
        clean(host)
    assert host.stats().transactions > before
    guest.retrieve().adopt()
    guest.session.finish()
    clean(host)


def test_closing_after_attach_is_an_implicit_finish(host):
    guest = Guest(host).start().preserve().kexec().retrieve()
    guest.adopt()
    guest.session.close()
    with fails(errno.ENOENT):
        guest.luo.retrieve("vm-1")
    host.run()
    clean(host)
    guest.device.detach()
    guest.exit()
    nothing_left(host)
