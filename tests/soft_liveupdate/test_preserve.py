# SPDX-License-Identifier: Apache-2.0
"""What may be preserved, in which order, and what stands still from then on."""

import errno
import os

import numpy as np
import pytest
from liveupdate_support import (
    AREAS,
    DEVICE_TOKEN,
    HWPT_TOKEN,
    IOMMUFD_TOKEN,
    MIB,
    RAM_TOKEN,
    Guest,
    check_audit,
    clean,
    fails,
    nothing_left,
)

from iokeep.handover.radix import PreservedTree
from iokeep.iommufd.client import Iommufd, VfioDevice
from iokeep.luo.client import LiveUpdate
from iokeep.soft.kernel import preserve_iommufd, preserve_memfd
from iokeep.soft.kernel.preserve_memfd import folios

PUNCH = 1 | 2


@pytest.fixture
def quiet(hosts):
    """A host without DMA engines."""
    return hosts(n_devices=2, devices=False)


@pytest.fixture
def guest(quiet):
    return Guest(quiet).start()


def session_of(guest, name="vm-1"):
    if guest.luo is None:
        guest.open_luo()
    return guest.luo.create(name)


def test_order(guest, quiet):
    session = session_of(guest)
    with fails(errno.EINVAL):
        session.preserve(guest.device.fd, DEVICE_TOKEN)  # the iommufd first
    guest.iommufd.mark_preserve(guest.hwpt, HWPT_TOKEN)
    with fails(errno.EINVAL):
        session.preserve(guest.iommufd.fd, IOMMUFD_TOKEN)  # the memfd first
    assert "is not preserved in session [vm-1]" in quiet.log()
    session.preserve(guest.memfd, RAM_TOKEN)
    session.preserve(guest.iommufd.fd, IOMMUFD_TOKEN)
    session.preserve(guest.device.fd, DEVICE_TOKEN)
    check_audit(quiet)


def test_tokens_and_files(guest):
    session = session_of(guest)
    session.preserve(guest.memfd, RAM_TOKEN)
    with fails(errno.EEXIST):
        session.preserve(guest.iommufd.fd, RAM_TOKEN)
    with fails(errno.EBUSY):
        session.preserve(guest.memfd, 2)
    with fails(errno.EBADF):
        session.preserve(999, 2)
    with fails(errno.ENOENT):
        session.preserve(session.fd, 2)
    with fails(errno.EINVAL):
        session.finish()
    with fails(errno.EINVAL):
        session.retrieve(RAM_TOKEN)
    assert session.name() == "vm-1"


def test_another_session_does_not_count(guest):
    guest.iommufd.mark_preserve(guest.hwpt, HWPT_TOKEN)
    session_of(guest, "a").preserve(guest.memfd, RAM_TOKEN)
    with fails(errno.EINVAL):
        session_of(guest, "b").preserve(guest.iommufd.fd, IOMMUFD_TOKEN)


@pytest.mark.parametrize("seals", [0, 1, 3, 5, 6])
def test_seals(quiet, seals):
    guest = Guest(quiet).start(seals=seals)
    session = session_of(guest)
    session.preserve(guest.memfd, RAM_TOKEN)
    guest.iommufd.mark_preserve(guest.hwpt, HWPT_TOKEN)
    with fails(errno.EINVAL):
        session.preserve(guest.iommufd.fd, IOMMUFD_TOKEN)
    assert "lacks the seals" in quiet.log()


def test_anonymous_memory_is_refused(guest, quiet):
    mapping = guest.transport.mmap(-1, 0x4000)
    guest.ioas.map(mapping.hva, 0x4000, iova=0x3000_0000)
    session = session_of(guest)
    session.preserve(guest.memfd, RAM_TOKEN)
    guest.iommufd.mark_preserve(guest.hwpt, HWPT_TOKEN)
    with fails(errno.EINVAL):
        session.preserve(guest.iommufd.fd, IOMMUFD_TOKEN)
    assert "not backed by a memfd" in quiet.log()


def test_a_memfd_that_was_resized_under_its_mapping(quiet):
    guest = Guest(quiet)
    t = guest.transport = quiet.transport()
    guest.memfd = t.memfd_create("ram", 2)
    t.ftruncate(guest.memfd, guest.file_bytes)
    guest.iommufd = Iommufd(t)
    guest.device = VfioDevice(t, "/dev/vfio/devices/vfio0")
    guest.dev_id = guest.device.bind(guest.iommufd)
    guest.replay()
    guest.hwpt = guest.iommufd.hwpt_alloc(guest.dev_id, guest.ioas.id)
    t.ftruncate(guest.memfd, 0)  # the device keeps the old frames
    t.ftruncate(guest.memfd, guest.file_bytes)
    t.add_seals(guest.memfd, 7)
    session = session_of(guest)
    session.preserve(guest.memfd, RAM_TOKEN)
    guest.iommufd.mark_preserve(guest.hwpt, HWPT_TOKEN)
    with fails(errno.EINVAL):
        session.preserve(guest.iommufd.fd, IOMMUFD_TOKEN)
    assert "does not show the frames of its files" in quiet.log()


def test_marks(guest):
    with fails(errno.ENOENT):
        guest.iommufd.mark_preserve(999, HWPT_TOKEN)
    with fails(errno.ENOENT):
        guest.iommufd.mark_preserve(guest.ioas.id, HWPT_TOKEN)
    guest.iommufd.mark_preserve(guest.hwpt, HWPT_TOKEN)
    guest.iommufd.mark_preserve(guest.hwpt, HWPT_TOKEN)
    with fails(errno.EINVAL):
        guest.iommufd.mark_preserve(guest.hwpt, HWPT_TOKEN + 1)
    other = guest.iommufd.hwpt_alloc(guest.dev_id, guest.ioas.id)
    with fails(errno.EADDRINUSE):
        guest.iommufd.mark_preserve(other, HWPT_TOKEN)
    guest.iommufd.mark_preserve(other, HWPT_TOKEN + 1)
    guest.iommufd.destroy(other)
    third = guest.iommufd.hwpt_alloc(guest.dev_id, guest.ioas.id)
    guest.iommufd.mark_preserve(third, HWPT_TOKEN + 1)


def test_no_marked_hwpt(guest, quiet):
    session = session_of(guest)
    session.preserve(guest.memfd, RAM_TOKEN)
    with fails(errno.EINVAL):
        session.preserve(guest.iommufd.fd, IOMMUFD_TOKEN)
    assert "no HWPT is marked" in quiet.log()


def test_a_device_on_an_unmarked_hwpt(guest, quiet):
    marked = guest.iommufd.hwpt_alloc(guest.dev_id, guest.ioas.id)
    guest.iommufd.mark_preserve(marked, HWPT_TOKEN)
    session = session_of(guest)
    session.preserve(guest.memfd, RAM_TOKEN)
    session.preserve(guest.iommufd.fd, IOMMUFD_TOKEN)
    with fails(errno.EINVAL):
        session.preserve(guest.device.fd, DEVICE_TOKEN)
    assert "not marked" in quiet.log()


def test_a_device_that_is_not_bound_or_attached(guest):
    session = session_of(guest)
    unbound = VfioDevice(guest.transport, "/dev/vfio/devices/vfio1")
    with fails(errno.EINVAL):
        session.preserve(unbound.fd, 5)
    unbound.bind(guest.iommufd)
    session.preserve(guest.memfd, RAM_TOKEN)
    guest.iommufd.mark_preserve(guest.hwpt, HWPT_TOKEN)
    session.preserve(guest.iommufd.fd, IOMMUFD_TOKEN)
    with fails(errno.EINVAL):
        session.preserve(unbound.fd, 5)


def test_immutable_until_the_session_is_closed(guest, quiet):
    other_ioas = guest.iommufd.ioas_alloc()
    guest.preserve()
    t = guest.transport

    def changes():
        yield lambda: guest.ioas.map_file(guest.memfd, 0, 0x1000, iova=0x7000_0000)
        yield lambda: guest.ioas.unmap(AREAS[1][0], AREAS[1][1])
        yield lambda: guest.ioas.copy(guest.ioas, 0, 0x1000, iova=0x7000_0000)
        yield lambda: guest.iommufd.destroy(guest.hwpt)
        yield lambda: guest.device.detach()
        yield lambda: guest.device.attach(guest.hwpt)
        yield lambda: guest.iommufd.mark_preserve(guest.hwpt, HWPT_TOKEN)

    for change in changes():
        with fails(errno.EBUSY):
            change()
    for change in (
        lambda: t.ftruncate(guest.memfd, MIB),
        lambda: t.fallocate(guest.memfd, PUNCH, 0, 0x1000),
        lambda: t.pwrite(guest.memfd, b"x", guest.file_bytes),
    ):
        with fails(errno.EPERM):
            change()
    t.pwrite(guest.memfd, b"ordinary writes go on", 0x1000)
    assert t.pread(guest.memfd, 21, 0x1000) == b"ordinary writes go on"
    guest.session.close()
    guest.ioas.map_file(guest.memfd, 0, 0x1000, iova=0x7000_0000)
    guest.ioas.unmap(0x7000_0000, 0x1000)
    guest.device.detach()
    guest.device.attach(guest.hwpt)
    other_ioas.destroy()
    guest.session = guest.luo.create("vm-1")
    guest.session.preserve(guest.memfd, RAM_TOKEN)
    guest.session.preserve(guest.iommufd.fd, IOMMUFD_TOKEN)
    guest.session.preserve(guest.device.fd, DEVICE_TOKEN)
    check_audit(quiet)
    guest.exit()
    nothing_left(quiet)


def test_holes_are_filled_and_the_position_kept(quiet):
    t = quiet.transport()
    guest = Guest(quiet, transport=t)
    fd = t.memfd_create("sparse", 2)
    t.ftruncate(fd, 5 * MIB + 123)
    t.pwrite(fd, b"tail", 5 * MIB + 100)
    session = session_of(guest)
    session.preserve(fd, 1)
    t.lseek(fd, 4242, os.SEEK_SET)
    empty = t.memfd_create("empty", 0)
    session.preserve(empty, 2)
    after = guest.kexec()
    t = after.transport = quiet.transport()
    session = after.open_luo().retrieve("vm-1")
    fd, empty = session.retrieve(1), session.retrieve(2)
    assert t.fstat(fd).st_size == 5 * MIB + 123
    assert t.lseek(fd, 0, os.SEEK_CUR) == 4242
    assert t.pread(fd, 30, 5 * MIB + 95) == b"\0" * 5 + b"tail" + b"\0" * 19
    assert t.fstat(empty).st_size == 0
    assert t.get_seals(fd) == 0
    assert t.get_seals(empty) == 1
    t.ftruncate(fd, MIB)  # ordinary again
    check_audit(quiet)
    session.finish()
    check_audit(quiet)
    after.exit()
    nothing_left(quiet)


def test_what_nobody_retrieves_is_freed_at_finish(quiet):
    t = quiet.transport()
    guest = Guest(quiet, transport=t)
    fds = [t.memfd_create(f"m{i}", 2) for i in range(3)]
    session = session_of(guest)
    for token, fd in enumerate(fds):
        t.ftruncate(fd, MIB)
        session.preserve(fd, token)
    after = guest.kexec()
    after.transport = quiet.transport()
    assert check_audit(quiet).by_kind["reserved"] >= 3 * 256
    session = after.open_luo().retrieve("vm-1")
    session.retrieve(1)
    session.finish()
    audit = check_audit(quiet)
    assert "reserved" not in audit.by_kind
    assert audit.by_kind["memfd"] == 256
    after.exit()
    nothing_left(quiet)


def test_folios():
    pfns = np.concatenate(
        [np.arange(512) + 1024, np.arange(512) + 5, np.arange(512) + 4096, np.arange(20) + 8192]
    ).astype(np.int64)
    first, index, order = folios(pfns)
    assert [(int(f), int(i)) for f, i, o in zip(first, index, order, strict=True) if o] == [
        (1024, 0),
        (4096, 1024),
    ]
    assert int((np.int64(1) << order).sum()) == len(pfns)
    assert len(first) == 2 + 512 + 20


def test_mainline_preserves_memfds_only(hosts):
    host = hosts(profile="linux-7.3", devices=False)
    guest = Guest(host).start()
    session = session_of(guest)
    session.preserve(guest.memfd, RAM_TOKEN)
    with fails(errno.ENOENT):
        session.preserve(guest.iommufd.fd, IOMMUFD_TOKEN)
    with fails(errno.ENOENT):
        session.preserve(guest.device.fd, DEVICE_TOKEN)
    with fails(errno.ENOTTY):
        guest.iommufd.mark_preserve(guest.hwpt, HWPT_TOKEN)


def test_a_failed_freeze_leaves_the_old_kernel_running(host):
    guest = Guest(host).start().preserve()
    frames = host.kernel.frames
    alloc, calls = frames.alloc, []

    def failing(*args, **kw):
        calls.append(args)
        if len(calls) == 9:
            from iokeep.soft.kernel.frames import OutOfMemory

            raise OutOfMemory("test")
        return alloc(*args, **kw)

    frames.alloc = failing
    with fails(errno.ENOMEM):
        guest.transport.reboot_kexec()
    frames.alloc = alloc
    check_audit(host)
    host.run()
    with fails(errno.EBUSY):
        guest.device.detach()  # the session is as before
    host.run()
    clean(host)
    after = guest.kexec().retrieve()
    after.adopt()
    after.session.finish()
    clean(host)


def test_a_device_that_is_not_preserved_stops(hosts):
    host = hosts(n_devices=2)
    guest = Guest(host).start()
    second = VfioDevice(guest.transport, "/dev/vfio/devices/vfio1")
    second.bind(guest.iommufd)
    second.attach(guest.hwpt)
    host.set_ranges(1, guest.rows[:1])
    host.run()
    guest.preserve()
    after = guest.kexec().retrieve()
    stopped = host.stats(1).transactions
    host.run()
    assert host.stats(1).transactions == stopped
    assert host.stats(0).transactions
    clean(host)
    fresh = VfioDevice(after.transport, "/dev/vfio/devices/vfio1")
    fresh.bind(after.iommufd)
    after.adopt()
    after.session.finish()
    fresh.attach(after.hwpt)
    host.set_ranges(1, after.rows[:1])
    host.run()
    assert host.stats(1).transactions > stopped
    clean(host)


def kinds(host):
    return check_audit(host).by_kind.get("handover", 0)


def test_what_is_preserved_is_in_the_tree_at_once_and_goes_again(host):
    guest = Guest(host).start()
    assert kinds(host) == 0
    guest.preserve()
    before = kinds(host)
    assert before > 6  # the tree, the memfd's record and folios
    guest.session.close()
    assert kinds(host) == 0
    guest.luo.close()
    guest.preserve("vm-2")
    assert kinds(host) == before
    tree = PreservedTree.read(host.platform.ram, host.carrier.kho.tree.root_pa)
    assert not tree.problems
    prior = next(iter(host.kernel.iommu.domains.values()))
    assert tree.contains(prior.table_pages >> np.uint64(12)).all()
    memfd = next(f for f in host.kernel.files.values() if f.name == "ram")
    assert tree.contains(memfd.pfns.astype(np.uint64)).all()


def test_the_freeze_does_nothing_that_grows_with_the_guest(hosts, monkeypatch):
    written = []
    for size in (8, 40):
        host = hosts(ram_bytes=128 * MIB, params={"placement": "4k-random"}, devices=False)
        guest = Guest(host, ((0, size * MIB, 0, 3),), size * MIB).start().preserve()

        def never(*args, **kw):
            raise AssertionError("work for each page at the freeze")

        with monkeypatch.context() as patch:
            for name in ("prepare_domain", "expected_extents", "verify"):
                patch.setattr(preserve_iommufd, name, never)
            patch.setattr(preserve_memfd, "folios", never)
            freeze = host.carrier
            guest.transport.reboot_kexec()
        written.append(freeze.freeze.out.written_bytes)
        host.kexec("soft-7.4")
        assert "1 prior domains" in host.log()
    assert written[0] == written[1]


def test_a_full_memory_preserves_nothing(hosts):
    host = hosts(ram_bytes=32 * MIB, devices=False)
    guest = Guest(host).start()
    guest.open_luo()
    session = guest.luo.create("vm-1")
    frames = host.kernel.frames
    hog = guest.transport.memfd_create("hog", 0)
    guest.transport.ftruncate(hog, (frames.n_free - 3) * 4096)
    guest.transport.fallocate(hog, 0, 0, (frames.n_free - 3) * 4096)
    with fails(errno.ENOMEM):
        session.preserve(guest.memfd, 1)
    check_audit(host)
    guest.transport.close(hog)
    session.preserve(guest.memfd, 1)
    check_audit(host)


def test_a_seal_after_preserve_is_carried(host):
    guest = Guest(host).start(seals=0)
    guest.open_luo()
    session = guest.luo.create("vm-1")
    session.preserve(guest.memfd, 1)
    guest.transport.add_seals(guest.memfd, 4)
    guest.transport.lseek(guest.memfd, 0x123, 0)
    after = guest.kexec()
    t = host.transport()
    memfd = LiveUpdate(t).retrieve("vm-1").retrieve(1)
    assert t.get_seals(memfd) == 4
    assert t.lseek(memfd, 0, 1) == 0x123
    assert after
