# SPDX-License-Identifier: Apache-2.0
"""ADOPT with DEFERRED: proved before first use at every point where PFNs are read back, and every way out."""

import errno
import time

import pytest
from liveupdate_support import (
    AREAS,
    HWPT_TOKEN,
    MIB,
    STILL,
    TOTAL,
    Guest,
    arrive,
    check_audit,
    clean,
    fails,
    nothing_left,
)

from iokeep.iommufd.client import Iommufd, NotEqual, VfioDevice
from iokeep.luo.client import LiveUpdate
from iokeep.pt.walk import walk
from iokeep.soft.kernel.access import Access
from iokeep.soft.kernel.iommufd import Iommufd as KernelIommufd
from iokeep.soft.kernel.syserror import SysError

#: in the last area, 4 KiB leaves
BAD = AREAS[3][0] + 0x1000
#: nothing is mapped there
HOLE = 0x5000_0000


@pytest.fixture
def after(host):
    return arrive(host)


def item_at(guest, iova):
    prior = next(iter(guest.host.carrier.priors.domains.values()))
    return walk(prior.fmt, guest.host.platform.ram, prior.record.root_pa, iova).steps[-1][1]


def damage(guest, iova=BAD, change=lambda item: item ^ 0x5000):
    """Change the item that translates ``iova`` in the prior tables, where no device works any more."""
    guest.host.stop_device(0)
    at, ram = item_at(guest, iova), guest.host.platform.ram
    ram.store64(at, change(ram.load64(at)))
    return at


def adopt(guest, areas=None):
    """Adopt deferred and attach; the device, at work until now, rests from here on."""
    guest.replay(areas)
    found = guest.iommufd.adopt(guest.ioas.id, HWPT_TOKEN, deferred=True)
    assert (found.pages, found.table_bytes) == (0, 0)
    guest.hwpt = found.hwpt_id
    guest.device.attach(guest.hwpt)
    clean(guest.host, transactions=False)
    guest.host.stop_device(0)
    return guest


def progress(guest, **kw):
    p = guest.iommufd.progress(guest.hwpt, **kw)
    return p.state, p.validated, p.unknown, p.quarantined


def frames(guest):
    guest.host.run()
    clean(guest.host, transactions=False)


def leave(guest):
    guest.exit()
    nothing_left(guest.host)


def pins(host):
    return int(host.kernel.frames.pin_count.sum())


def test_adopts_without_a_look_at_a_page(after):
    asked = pins(after.host)
    adopt(after)
    assert pins(after.host) == asked
    assert progress(after) == ("validating", 0, TOTAL, 0)
    after.session.finish()
    frames(after)
    assert progress(after) == ("validating", 0, TOTAL, 0)
    after.ioas.unmap(*AREAS[3][:2])
    frames(after)
    assert progress(after) == ("validating", 0, TOTAL - AREAS[3][1], 0)
    assert progress(after, sweep=True) == ("validated", TOTAL - AREAS[3][1], 0, 0)
    assert pins(after.host) == asked + (TOTAL - AREAS[3][1]) // 4096
    frames(after)
    assert "all proved" in after.host.log()
    after.ioas.unmap_all()
    frames(after)
    leave(after)


def test_swept_in_the_background(host):
    guest = Guest(host).start().preserve()
    guest = guest.kexec("soft-7.4", {"sweep_rate": 1 << 20, "sweep_tick": 4096}).retrieve()
    guest.device.bind(guest.iommufd)
    adopt(guest)
    end = time.monotonic() + 60
    while guest.iommufd.progress(guest.hwpt).state != "validated":
        assert time.monotonic() < end
        time.sleep(0.005)
    guest.session.finish()
    guest.work()
    guest.host.run()
    clean(host)
    leave(guest)


def test_a_tick_is_as_small_as_it_is_told(after):
    adopt(after)
    proof = after.host.carrier.priors.adoptions[0]
    sizes = []
    while read := proof.tick(4096):
        sizes.append(read)
    assert len(sizes) > 4
    assert max(sizes) <= 8 * 4096
    assert progress(after)[0] == "validated"


# ---- every point where a PFN is read back


def quarantined(guest, action, iova=BAD):
    """The action fails, nothing is changed, and the page is quarantined."""
    before = check_audit(guest.host).allocated
    with fails(errno.EUCLEAN):
        action()
    found = guest.iommufd.progress(guest.hwpt)
    assert found.quarantined == 0x1000
    assert [(m.reason, m.iova, m.last) for m in found.mismatches] == [("pa", iova, iova + 0xFFF)]
    assert "is quarantined, its DMA is left as it is" in guest.host.log()
    assert check_audit(guest.host).allocated == before
    frames(guest)


def test_unmap_of_a_wrong_range(after):
    damage(after)
    adopt(after)
    quarantined(after, lambda: after.ioas.unmap(*AREAS[3][:2]))
    with fails(errno.EUCLEAN):
        after.ioas.unmap_all()
    with fails(errno.EUCLEAN):
        after.ioas.unmap(AREAS[2][0], AREAS[3][0] + AREAS[3][1] - AREAS[2][0])
    for iova, length, _, _ in AREAS[:3]:  # nothing of the larger range had gone
        assert after.ioas.unmap(iova, length) == length
    after.session.finish()
    frames(after)
    assert progress(after, sweep=True) == ("quarantined", 0x2000, 0, 0x1000)
    leave(after)
    assert after.host.kernel.warnings == 0


def test_copy_of_a_wrong_range(after):
    damage(after)
    adopt(after)
    other = after.iommufd.ioas_alloc()
    first = AREAS[3][0]
    other.copy(after.ioas, first, 0x1000, iova=0)
    quarantined(after, lambda: other.copy(after.ioas, first, 0x3000, iova=0x10000))
    other.copy(after.ioas, first + 0x2000, 0x1000, iova=0x20000)
    after.session.finish()
    frames(after)
    leave(after)


def test_a_second_domain_reads_all_back(after):
    damage(after)
    adopt(after)
    quarantined(after, lambda: after.iommufd.hwpt_alloc(after.dev_id, after.ioas.id))
    after.session.finish()
    leave(after)


def test_an_access_reads_what_is_proved(after):
    """An emulated device: its bytes and pins are of frames that the adopted table names."""
    damage(after)
    adopt(after)
    file = next(each for each in after.host.kernel.files.values() if isinstance(each, KernelIommufd))
    process = next(iter(after.host.kernel.processes.values()))
    access = Access.create(file, None)
    access.attach(after.ioas.id)
    before = pins(after.host)

    def refused(action):
        with pytest.raises(SysError) as caught:
            action()
        raise OSError(caught.value.errno, str(caught.value))

    quarantined(after, lambda: refused(lambda: access.read(process, BAD, 8)))
    with fails(errno.EUCLEAN):
        refused(lambda: access.pin_pages(BAD - 0x1000, 0x2000))
    # the page beside the wrong one was proved, and so pinned; the access itself has pinned nothing
    assert pins(after.host) == before + progress(after)[1] // 0x1000 == before + 1
    first = AREAS[0][0]
    assert access.read(process, first, 0x1000) == after.transport.pread(after.memfd, 0x1000, AREAS[0][2])
    access.pin_pages(first, 0x2000)
    assert progress(after)[1] // 0x1000 == pins(after.host) - before > 1
    frames(after)
    access.unpin_pages(first, 0x2000)
    access.detach()
    access.close()
    after.session.finish()
    leave(after)


def test_a_limit_of_locked_memory(after):
    """RLIMIT_MEMLOCK: a table that is proved at once is not adopted above it; what is proved later counts,
    and is not refused: devices work on it already.
    """
    process = after.host.kernel.processes[after.transport.getpid()]
    process.ipc_lock, process.memlock_bytes = False, 4 * MIB
    before = pins(after.host)
    after.replay()
    with fails(errno.ENOMEM):
        after.iommufd.adopt(after.ioas.id, HWPT_TOKEN)
    assert (pins(after.host), process.pinned_pages, after.host.kernel.locked_pages) == (before, 0, 0)
    after.hwpt = after.iommufd.adopt(after.ioas.id, HWPT_TOKEN, deferred=True).hwpt_id
    after.device.attach(after.hwpt)
    assert (pins(after.host), process.pinned_pages) == (before, 0)
    assert progress(after, sweep=True) == ("validated", TOTAL, 0, 0)
    assert (pins(after.host), process.pinned_pages) == (before + TOTAL // 4096, TOTAL // 4096)
    assert after.host.kernel.locked_pages == TOTAL // 4096
    after.session.finish()
    leave(after)
    assert (process.pinned_pages, after.host.kernel.locked_pages) == (0, 0)


def test_a_second_domain_of_a_sound_table(after):
    adopt(after)
    second = after.iommufd.hwpt_alloc(after.dev_id, after.ioas.id)
    assert after.iommufd.progress(after.hwpt).unknown == 0
    frames(after)
    after.session.finish()
    after.device.attach(second)
    after.iommufd.destroy(after.hwpt)  # holes were not proved: the table goes as it is
    frames(after)
    after.ioas.unmap_all()
    frames(after)
    leave(after)


def test_storage_moves_to_a_table_that_is_not_proved(after):
    """An ordinary domain had the pins; when it goes they pass to the adopted one, unproved as it is."""
    damage(after)
    after.replay()
    ordinary = after.iommufd.hwpt_alloc(after.dev_id, after.ioas.id)
    after.hwpt = after.iommufd.adopt(after.ioas.id, HWPT_TOKEN, deferred=True).hwpt_id
    after.device.attach(after.hwpt)
    frames(after)
    after.iommufd.destroy(ordinary)
    frames(after)
    with fails(errno.EUCLEAN):
        after.ioas.unmap(*AREAS[3][:2])
    after.ioas.unmap(*AREAS[2][:2])
    after.session.finish()
    frames(after)
    leave(after)


def test_a_map_into_a_hole_proves_the_hole(after):
    at = item_at(after, AREAS[3][0] + AREAS[3][1] - 0x1000) + 8
    extra = AREAS[3][0] + AREAS[3][1]
    ram = after.host.platform.ram
    ram.store64(at, ram.load64(at - 8) + 0x3000)
    adopt(after)
    with fails(errno.EUCLEAN):
        after.ioas.map_file(after.memfd, 0, 0x1000, iova=extra)
    assert [(m.reason, m.iova) for m in after.iommufd.progress(after.hwpt).mismatches] == [("extra", extra)]
    after.ioas.map_file(after.memfd, 0, 0x1000, iova=extra + 0x1000)
    after.ioas.map_file(after.memfd, 0x1000, 2 * MIB, iova=HOLE)
    frames(after)
    after.ioas.unmap(extra + 0x1000, 0x1000)
    after.ioas.unmap(HOLE, 2 * MIB)
    after.ioas.map_file(after.memfd, 0, 0x4000, iova=HOLE)
    assert progress(after, sweep=True) == ("quarantined", TOTAL + 0x4000, 0, 0)
    after.session.finish()
    frames(after)
    leave(after)


def test_compare_with_a_table_that_is_not_proved(hosts):
    host = hosts(n_devices=2)
    guest = Guest(host).start()
    second = VfioDevice(guest.transport, "/dev/vfio/devices/vfio1")
    number = second.bind(guest.iommufd)
    other = guest.iommufd.hwpt_alloc(number, guest.ioas.id)
    second.attach(other)
    guest.iommufd.mark_preserve(other, HWPT_TOKEN + 1)
    guest.preserve()
    guest.session.preserve(second.fd, 0x31)
    guest = guest.kexec("soft-7.4", STILL).retrieve()
    guest.device.bind(guest.iommufd)
    second = VfioDevice(guest.transport, guest.session.retrieve(0x31))
    second.bind(guest.iommufd)
    damage(guest)
    adopt(guest)
    with fails(errno.EUCLEAN):  # both came over the kexec: one does not prove the other
        guest.iommufd.compare(guest.hwpt, HWPT_TOKEN + 1)
    with fails(errno.EPERM):
        second.attach(guest.hwpt)
    frames(guest)


def test_two_adopted_tables_of_one_ioas(hosts):
    host = hosts(n_devices=2)
    guest = Guest(host).start()
    second = VfioDevice(guest.transport, "/dev/vfio/devices/vfio1")
    number = second.bind(guest.iommufd)
    other = guest.iommufd.hwpt_alloc(number, guest.ioas.id)
    second.attach(other)
    guest.iommufd.mark_preserve(other, HWPT_TOKEN + 1)
    guest.preserve()
    guest.session.preserve(second.fd, 0x31)
    guest = guest.kexec("soft-7.4", STILL).retrieve()
    guest.device.bind(guest.iommufd)
    second = VfioDevice(guest.transport, guest.session.retrieve(0x31))
    second.bind(guest.iommufd)
    adopt(guest)
    number = guest.iommufd.adopt(guest.ioas.id, HWPT_TOKEN + 1, deferred=True).hwpt_id
    second.attach(number)
    guest.session.finish()
    frames(guest)
    guest.device.detach()
    guest.iommufd.destroy(guest.hwpt)  # the other one stores the PFNs now, unproved
    frames(guest)
    guest.ioas.unmap(*AREAS[3][:2])
    frames(guest)
    assert guest.iommufd.progress(number, sweep=True).state == "validated"
    frames(guest)
    leave(guest)


def test_preserving_again_sweeps_first(after):
    adopt(after)
    after.session.finish()
    after.session.close()
    after.luo.close()
    after.work()
    again = after.preserve("vm-2").kexec("soft-7.3", STILL).retrieve("vm-2")
    assert again.host.log(1).count("all proved") == 1
    again.adopt(deferred=True)
    again.session.finish()
    again.host.run()
    clean(again.host)
    leave(again)


def test_a_quarantined_table_is_not_carried_again(after):
    damage(after)
    adopt(after)
    after.session.finish()
    after.session.close()
    after.luo.close()
    with fails(errno.EUCLEAN):
        after.preserve("vm-2")
    after.session.close()
    frames(after)
    leave(after)


# ---- quarantine


def test_dma_goes_on_as_it_was(after):
    damage(after, change=lambda item: item ^ 1 << 62 if item >> 62 & 1 else item | 1 << 9)
    adopt(after)
    assert progress(after, sweep=True)[0] == "validated"  # bits that hardware ignores do not count
    after.work()
    after.session.finish()
    after.host.run()
    clean(after.host)


def test_no_other_device_gets_to_a_wrong_table(hosts):
    host = hosts(n_devices=2)
    after = arrive(host)
    damage(after)
    adopt(after)
    after.session.finish()
    other = VfioDevice(after.transport, "/dev/vfio/devices/vfio1")
    other.bind(after.iommufd)
    other.attach(after.hwpt)  # nothing is known to be wrong yet
    other.detach()
    assert progress(after, sweep=True)[0] == "quarantined"
    with fails(errno.EUCLEAN):
        other.attach(after.hwpt)
    frames(after)
    other.close()
    leave(after)


def test_files_keep_their_pages_until_all_is_proved(after):
    t = after.transport
    adopt(after)
    after.session.finish()
    with fails(errno.EBUSY):
        t.fallocate(after.memfd, 3, 0, 0x10000)
    assert progress(after, sweep=True)[0] == "validated"
    t.fallocate(after.memfd, 3, 7 * MIB, 0x1000)
    frames(after)
    leave(after)


def test_an_area_without_a_memfd_cannot_wait(after):
    t = after.transport
    after.replay(AREAS[:1])
    memory = t.mmap(after.memfd, 0x4000)
    after.ioas.map(memory.hva, 0x4000, iova=HOLE)
    with fails(errno.EINVAL):
        after.iommufd.adopt(after.ioas.id, HWPT_TOKEN, deferred=True)
    frames(after)
    assert [h.reclaimed for h in after.iommufd.liveupdate_info()] == [False]


def test_a_wrong_replay_is_contained(after):
    adopt(
        after, (AREAS[0], AREAS[1], (0x2000_0000, 0x11000, 6 * MIB, 3), (*AREAS[3][:2], 6 * MIB + 0x21000, 3))
    )
    state = progress(after, sweep=True)
    assert state == ("quarantined", 6 * MIB, 0, 0x14000)
    assert {m.reason for m in after.iommufd.progress(after.hwpt).mismatches} == {"prot", "pa"}
    after.session.finish()
    after.ioas.unmap(*AREAS[0][:2])
    frames(after)
    leave(after)


def test_the_wrong_root_is_refused_at_once(hosts):
    host = hosts(params={"stale_root": 1})
    after = arrive(host)
    after.replay()
    with fails(errno.EINVAL, NotEqual) as caught:
        after.iommufd.adopt(after.ioas.id, HWPT_TOKEN, deferred=True)
    assert caught.value.mismatches[0].reason == "root"
    host.run()
    clean(host)


def test_flags_that_do_not_go_together(after):
    after.replay()
    for flags in ({"deferred": True, "validate_only": True}, {"deferred": True, "sealed": True}):
        with fails(errno.EOPNOTSUPP):
            after.iommufd.adopt(after.ioas.id, HWPT_TOKEN, **flags)
    hwpt = after.iommufd.adopt(after.ioas.id, HWPT_TOKEN).hwpt_id
    p = after.iommufd.progress(hwpt)
    assert (p.state, p.validated, p.unknown) == ("validated", TOTAL, 0)
    with fails(errno.ENOENT):
        after.iommufd.progress(999)


# ---- ways out


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("swept", [False, True])
@pytest.mark.parametrize("finished", [False, True])
def test_the_vmm_dies(after, bad, swept, finished):
    """Before, while (a part is known) and after the sweep; before and after finish."""
    if bad:
        damage(after)
    adopt(after)
    after.iommufd.progress(after.hwpt, sweep=swept)
    if not swept:
        after.host.carrier.priors.adoptions[0].tick(8192)
    if finished:
        after.session.finish()
        after.session.close()
    check_audit(after.host)
    leave(after)
    assert after.host.kernel.warnings == 0, after.host.log()


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("swept", [False, True])
def test_adopt_can_be_undone(after, bad, swept):
    if bad:
        damage(after)
    for _ in range(2):
        after.replay()
        after.hwpt = after.iommufd.adopt(after.ioas.id, HWPT_TOKEN, deferred=True).hwpt_id
        after.iommufd.progress(after.hwpt, sweep=swept)
        after.iommufd.destroy(after.hwpt)
        assert not after.host.carrier.priors.adoptions
        frames(after)
        after.ioas.unmap_all()
        after.ioas.destroy()
        frames(after)
    if not bad:
        after.replay()
        after.hwpt = after.iommufd.adopt(after.ioas.id, HWPT_TOKEN).hwpt_id
        after.device.attach(after.hwpt)
        after.session.finish()
        leave(after)


def test_the_kernel_goes_again_before_the_sweep(after):
    adopt(after)
    after.session.finish()
    after.work()
    after.transport.reboot_kexec()  # nothing is preserved: an ordinary reboot
    after.host.kexec("soft-7.3")
    check_audit(after.host)


def test_what_nobody_claimed_waits_for_the_sweep(host):
    """A wrong table may lead to preserved memory: it is not given to anybody else before all is proved."""
    guest = Guest(host).start()
    spare = guest.transport.memfd_create("spare", 2)
    guest.transport.ftruncate(spare, 64 << 10)
    guest.transport.pwrite(spare, b"x" * (64 << 10), 0)
    guest.preserve()
    guest.session.preserve(spare, 0x99)
    guest = guest.kexec("soft-7.4", STILL).retrieve()
    guest.device.bind(guest.iommufd)
    adopt(guest)
    guest.session.finish()
    reserved = check_audit(host).by_kind["reserved"]
    assert reserved >= 16
    guest.iommufd.progress(guest.hwpt, sweep=True)
    assert "reserved" not in check_audit(host).by_kind
    leave(guest)


def test_what_nobody_claimed_waits_for_the_end_of_a_quarantine(host):
    guest = Guest(host).start().preserve().kexec("soft-7.4", STILL).retrieve()
    guest.device.bind(guest.iommufd)
    damage(guest)
    adopt(guest)
    guest.session.finish()
    guest.iommufd.progress(guest.hwpt, sweep=True)
    assert check_audit(host).by_kind["reserved"]
    leave(guest)


def test_another_vmm_goes_on(after):
    """The descriptors live in the session: whoever has it sees the proof where it stands."""
    damage(after)
    adopt(after)
    assert progress(after, sweep=True)[0] == "quarantined"
    number, session = after.hwpt, after.session
    iommufd = Iommufd(after.transport, session.retrieve(0x20))
    assert iommufd.progress(number).quarantined == 0x1000
    assert isinstance(after.luo, LiveUpdate)
