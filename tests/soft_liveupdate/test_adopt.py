# SPDX-License-Identifier: Apache-2.0
"""ADOPT and COMPARE: what they prove, what they refuse, and what a restored device may do meanwhile."""

import errno
from dataclasses import replace

import pytest
from liveupdate_support import (
    AREAS,
    HWPT_TOKEN,
    MIB,
    Guest,
    check_audit,
    clean,
    fails,
    nothing_left,
)

from iokeep.iommufd.client import Iommufd, NotEqual, VfioDevice
from iokeep.pt.walk import walk
from iokeep.soft.kernel import boot
from iokeep.soft.kernel.freeze import Freeze
from iokeep.soft.kernel.profiles import profile_of


@pytest.fixture
def after(host):
    """The new VMM, with everything retrieved and bound."""
    guest = Guest(host).start().preserve().kexec().retrieve()
    guest.dev_id = guest.device.bind(guest.iommufd)
    return guest


def refused(guest, reason, iova, **kw):
    """ADOPT names this range first, and nothing has changed: the right replay is then adopted."""
    with fails(errno.EINVAL, NotEqual) as caught:
        guest.iommufd.adopt(guest.ioas.id, HWPT_TOKEN, **kw)
    error = caught.value
    assert error.total >= 1
    first = error.mismatches[0]
    assert (first.reason, first.iova) == (reason, iova), [str(m) for m in error.mismatches]
    guest.host.run()
    clean(guest.host)
    return error


def accepted(guest):
    guest.ioas.unmap_all()
    guest.ioas.destroy()
    guest.replay()
    guest.hwpt = guest.iommufd.adopt(guest.ioas.id, HWPT_TOKEN).hwpt_id
    guest.device.attach(guest.hwpt)
    guest.session.finish()
    guest.host.run()
    clean(guest.host)
    guest.exit()
    nothing_left(guest.host)


@pytest.mark.parametrize(
    ("areas", "reason", "iova"),
    [
        (AREAS[:1] + AREAS[2:], "extra", AREAS[1][0]),
        ((*AREAS, (0x3000_0000, 0x2000, 0, 3)), "missing", 0x3000_0000),
        ((*AREAS[:2], (0x2000_0000, 0x11000, 6 * MIB, 3), AREAS[3]), "prot", 0x2000_0000),
        ((*AREAS[:3], (0x40_0000_0000, 0x3000, 6 * MIB + 0x21000, 3)), "pa", 0x40_0000_0000),
        ((*AREAS[:3], (0x40_0000_0000, 0x2000, 6 * MIB + 0x20000, 3)), "extra", 0x40_0000_2000),
    ],
    ids=["dropped", "extra", "prot", "offset", "short"],
)
def test_a_wrong_replay_is_named(after, areas, reason, iova):
    after.replay(areas)
    refused(after, reason, iova)
    accepted(after)


def test_another_file_is_named(after):
    t = after.transport
    wrong = t.memfd_create("wrong", 2)
    t.ftruncate(wrong, after.file_bytes)
    after.replay(AREAS[:3])
    iova, length, offset, prot = AREAS[3]
    after.ioas.map_file(wrong, offset, length, iova=iova, prot=prot)
    refused(after, "pa", iova)
    accepted(after)


def damage(after, iova, change, level=0):
    """Change the item that translates ``iova`` in the prior tables; undone by calling the result."""
    prior = next(iter(after.host.carrier.priors.domains.values()))
    steps = walk(prior.fmt, after.host.platform.ram, prior.record.root_pa, iova).steps
    item_pa = steps[-1][1]
    ram = after.host.platform.ram
    old = ram.load64(item_pa)
    ram.store64(item_pa, change(old))
    return lambda: ram.store64(item_pa, old)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda item: item ^ 0x5000, "pa"),
        (lambda item: item & ~2, "prot"),
        (lambda item: 0, "missing"),
        (lambda item: item | 1 << 9, None),
        (lambda item: item | 1 << 57, None),
    ],
    ids=["pa", "prot", "cleared", "bit-9", "bit-57"],
)
def test_a_changed_item_is_found_with_its_iova(after, change, reason):
    iova = AREAS[3][0] + 0x1000
    after.host.stop_device(0)
    undo = damage(after, iova, change)
    after.replay()
    with_reason = None
    try:
        after.iommufd.adopt(after.ioas.id, HWPT_TOKEN)
    except NotEqual as error:
        with_reason = error.mismatches[0]
    if reason is not None:
        assert with_reason is not None
        assert (with_reason.reason, with_reason.iova, with_reason.last) == (reason, iova, iova + 0xFFF)
    elif with_reason is not None:
        assert with_reason.reason in ("reserved", "attrs")
        assert with_reason.iova <= iova <= with_reason.last
    undo()
    if with_reason is not None:
        accepted(after)


def test_a_loop_in_the_tables_is_found(after):
    after.host.stop_device(0)
    prior = next(iter(after.host.carrier.priors.domains.values()))
    ram = after.host.platform.ram
    steps = walk(prior.fmt, ram, prior.record.root_pa, AREAS[3][0]).steps
    item_pa = steps[1][1]
    old = ram.load64(item_pa)
    ram.store64(item_pa, prior.record.root_pa | (old & 0xFFF))
    after.replay()
    with fails(errno.EINVAL, NotEqual) as caught:
        after.iommufd.adopt(after.ioas.id, HWPT_TOKEN)
    assert caught.value.mismatches
    ram.store64(item_pa, old)
    accepted(after)


def test_errnos_of_adopt(after):
    after.replay()
    with fails(errno.ENOENT):
        after.iommufd.adopt(after.ioas.id, HWPT_TOKEN + 1)
    with fails(errno.ENOENT):
        after.iommufd.adopt(999, HWPT_TOKEN)
    with fails(errno.EPERM):
        after.iommufd.adopt(after.ioas.id, HWPT_TOKEN, trust=True)
    other = Iommufd(after.transport)
    with fails(errno.ENOENT):
        other.adopt(other.ioas_alloc().id, HWPT_TOKEN)
    proved = after.iommufd.adopt(after.ioas.id, HWPT_TOKEN, validate_only=True)
    assert proved.pages
    assert not proved.hwpt_id
    assert [(h.token, h.reclaimed) for h in after.iommufd.liveupdate_info()] == [(HWPT_TOKEN, False)]
    after.hwpt = after.iommufd.adopt(after.ioas.id, HWPT_TOKEN).hwpt_id
    with fails(errno.EBUSY):
        after.iommufd.adopt(after.ioas.id, HWPT_TOKEN)
    info = after.iommufd.liveupdate_info()
    assert [(h.token, h.reclaimed) for h in info] == [(HWPT_TOKEN, True)]
    assert info[0].mapped_bytes == sum(length for _, length, _, _ in AREAS)
    assert other.liveupdate_info() == []


def cannot_be_used(after, number):
    after.dev_id = after.device.bind(after.iommufd)
    after.replay()
    with fails(number):
        after.iommufd.adopt(after.ioas.id, HWPT_TOKEN)
    hwpt = after.iommufd.hwpt_alloc(after.dev_id, after.ioas.id)
    with fails(number):
        after.iommufd.compare(hwpt, HWPT_TOKEN)
    with fails(errno.EPERM):
        after.device.attach(hwpt)
    with fails(errno.EBUSY):
        after.session.finish()
    after.host.run()
    clean(after.host)


@pytest.mark.parametrize("formats", [{}, {"x86_64": frozenset()}], ids=["format", "feature"])
def test_what_is_not_in_the_tested_set(hosts, monkeypatch, formats):
    params = {"iommu": "scalable-fs"}  # x86_64 with the feature sign_extend
    host = hosts(params=params)
    guest = Guest(host).start().preserve()
    monkeypatch.setattr(boot, "profile_of", lambda name: replace(profile_of(name), formats=formats))
    cannot_be_used(guest.kexec("soft-7.4", params).retrieve(), errno.EOPNOTSUPP)


@pytest.mark.parametrize("change", [{"top_level": 9}, {"root_pa": 0x1000}], ids=["level", "root"])
def test_a_record_that_contradicts_itself(host, monkeypatch, change):
    guest = Guest(host).start().preserve()
    add_domain = Freeze.add_domain

    def wrong(self, domain):
        index = add_domain(self, domain)
        self.domains[index] = replace(self.domains[index], **change)
        return index

    monkeypatch.setattr(Freeze, "add_domain", wrong)
    cannot_be_used(guest.kexec().retrieve(), errno.EUCLEAN)


def test_adopt_can_be_undone(after):
    for _ in range(2):
        after.replay()
        hwpt = after.iommufd.adopt(after.ioas.id, HWPT_TOKEN).hwpt_id
        check_audit(after.host)
        after.iommufd.destroy(hwpt)
        after.ioas.destroy()
        after.host.run()
        clean(after.host)
    after.replay()
    accepted(after)


def test_an_adopted_ioas_is_an_ordinary_one(after):
    after.replay()
    after.hwpt = after.iommufd.adopt(after.ioas.id, HWPT_TOKEN).hwpt_id
    after.device.attach(after.hwpt)
    after.session.finish()
    after.ioas.map_file(after.memfd, 0, 0x4000, iova=0x5000_0000)
    after.ioas.unmap(AREAS[3][0], AREAS[3][1])
    after.work((*AREAS[:3], (0x5000_0000, 0x4000, 0, 3)))
    after.host.run()
    clean(after.host)
    after.device.detach()
    after.iommufd.destroy(after.hwpt)
    clean(after.host)
    after.exit()
    nothing_left(after.host)


def test_compare_finds_a_difference(after):
    after.replay((*AREAS[:3], (0x40_0000_0000, 0x3000, 6 * MIB + 0x21000, 3)))
    hwpt = after.iommufd.hwpt_alloc(after.dev_id, after.ioas.id)
    with fails(errno.EINVAL, NotEqual) as caught:
        after.iommufd.compare(hwpt, HWPT_TOKEN)
    assert caught.value.mismatches[0].iova == 0x40_0000_0000
    with fails(errno.EPERM):
        after.device.attach(hwpt)
    after.host.run()
    clean(after.host)


def test_a_proof_holds_until_the_mappings_change(after):
    after.replay()
    hwpt = after.iommufd.hwpt_alloc(after.dev_id, after.ioas.id)
    with fails(errno.EPERM):
        after.device.attach(hwpt)
    with fails(errno.EPERM):
        after.device.attach(after.ioas.id)
    after.iommufd.compare(hwpt, HWPT_TOKEN)
    after.ioas.map_file(after.memfd, 0, 0x1000, iova=0x5000_0000)
    with fails(errno.EPERM):
        after.device.attach(hwpt)
    after.ioas.unmap(0x5000_0000, 0x1000)
    after.iommufd.compare(hwpt, HWPT_TOKEN)
    with fails(errno.ENOENT):
        after.iommufd.compare(999, HWPT_TOKEN)
    with fails(errno.ENOENT):
        after.iommufd.compare(hwpt, 5)
    after.device.attach(hwpt)
    with fails(errno.EBUSY):
        after.iommufd.compare(hwpt, HWPT_TOKEN)
    after.host.run()
    clean(after.host)
    after.session.finish()
    after.exit()
    nothing_left(after.host)


def test_layout_differences_are_counted(hosts):
    host = hosts(params={"placement": "contiguous"})
    after = Guest(host).start().preserve().kexec().retrieve()
    after.dev_id = after.device.bind(after.iommufd)
    after.ioas = after.iommufd.ioas_alloc()
    after.ioas.huge_pages(False)
    for iova, length, offset, prot in AREAS:
        after.ioas.map_file(after.memfd, offset, length, iova=iova, prot=prot)
    assert after.iommufd.adopt(after.ioas.id, HWPT_TOKEN, validate_only=True).layout_differences
    after.hwpt = after.iommufd.hwpt_alloc(after.dev_id, after.ioas.id)
    assert after.iommufd.compare(after.hwpt, HWPT_TOKEN).layout_differences
    after.device.attach(after.hwpt)
    after.session.finish()
    host.run()
    clean(host)


def test_a_restored_device_is_closed_to_others(host):
    after = Guest(host).start().preserve().kexec().retrieve()
    with fails(errno.EBUSY):
        VfioDevice(after.transport, "/dev/vfio/devices/vfio0")
    other = Iommufd(after.transport)
    with fails(errno.EPERM):
        after.device.bind(other)
    after.device.bind(after.iommufd)
    with fails(errno.EINVAL):
        after.device.bind(after.iommufd)
    host.run()
    clean(host)
    after.device.detach()  # not attached by this kernel's user space: nothing happens
    host.run()
    after.replay()
    after.hwpt = after.iommufd.adopt(after.ioas.id, HWPT_TOKEN).hwpt_id
    after.device.attach(after.hwpt)
    with fails(errno.EPERM):
        after.device.detach()
    host.run()
    clean(host)
    after.session.finish()
    after.device.detach()
    host.run()
    check_audit(host)
    after.exit()
    again = VfioDevice(host.transport(), "/dev/vfio/devices/vfio0")
    again.close()


def test_finish_waits_for_everything(host):
    after = Guest(host).start().preserve().kexec()
    after.transport = host.transport()
    after.session = after.open_luo().retrieve("vm-1")
    with fails(errno.EBUSY):
        after.session.finish()
    after.retrieve_files()
    with fails(errno.EBUSY):
        after.session.finish()
    after.dev_id = after.device.bind(after.iommufd)
    with fails(errno.EBUSY):
        after.session.finish()
    after.replay()
    after.hwpt = after.iommufd.adopt(after.ioas.id, HWPT_TOKEN).hwpt_id
    with fails(errno.EBUSY):
        after.session.finish()
    after.device.attach(after.hwpt)
    after.session.finish()
    after.session.finish()
    host.run()
    clean(host)


def test_two_updates_in_a_row(host):
    guest = Guest(host).start()
    for number in range(3):
        if guest.luo is not None:
            guest.luo.close()
        guest.preserve(f"vm-{number}")
        guest = guest.kexec(("soft-7.4", "soft-7.3")[number % 2]).retrieve(f"vm-{number}")
        if number % 2:
            guest.rebuild()
        else:
            guest.adopt()
        guest.session.finish()
        guest.session.close()
        host.run()
        clean(host)
    assert "live update 3" in host.log()
    guest.exit()
    nothing_left(host)


def test_two_guests_two_devices(hosts):
    host = hosts(n_devices=3)
    first = Guest(host).start("a")
    first.preserve("a")
    first.luo.close()
    other = Guest(host, ((0x10_0000, 2 * MIB, 0, 3),), 2 * MIB, 1).start("b")
    third = VfioDevice(other.transport, "/dev/vfio/devices/vfio2")
    third.bind(other.iommufd)
    third.attach(other.hwpt)
    host.set_ranges(2, other.rows)
    other.preserve("b")
    other.session.preserve(third.fd, 0x31)
    first_after = first.kexec().retrieve("a")
    first_after.luo.close()
    other_after = Guest(host, other.areas, other.file_bytes, 1, rows=other.rows).retrieve("b")
    first_after.adopt()
    with fails(errno.ENOENT):
        first_after.iommufd.adopt(first_after.ioas.id, HWPT_TOKEN + 3)
    third = VfioDevice(other_after.transport, other_after.session.retrieve(0x31))
    with fails(errno.EPERM):
        third.bind(Iommufd(other_after.transport))
    third.bind(other_after.iommufd)
    other_after.rebuild()
    with fails(errno.EBUSY):
        other_after.session.finish()  # the third device is still on the prior domain
    third.attach(other_after.hwpt)
    first_after.session.finish()
    host.run()
    clean(host)
    other_after.session.finish()
    host.run()
    clean(host)
    first_after.exit()
    other_after.exit()
    nothing_left(host)


def test_trust_takes_what_the_tables_say(hosts):
    """Adopted blindly, a wrong table makes the kernel unpin and free somebody else's frame."""
    host = hosts(profile="soft-7.3")
    after = Guest(host).start().preserve().kexec("soft-7.4", {"unsafe_adopt": 1}).retrieve()
    after.device.bind(after.iommufd)
    victim = after.transport.memfd_create("victim", 0)
    after.transport.ftruncate(victim, 0x1000)
    after.transport.pwrite(victim, b"precious", 0)
    pfn = next(f for f in host.kernel.files.values() if f.name == "victim").pfns[0]
    host.stop_device(0)
    damage(after, AREAS[3][0], lambda item: (item & 0xFFF) | int(pfn) << 12)
    after.replay()
    with fails(errno.EINVAL, NotEqual):
        after.iommufd.adopt(after.ioas.id, HWPT_TOKEN)
    assert after.transport.pread(victim, 8, 0) == b"precious"
    hwpt = after.iommufd.adopt(after.ioas.id, HWPT_TOKEN, trust=True).hwpt_id
    after.device.attach(hwpt)
    after.session.finish()
    after.ioas.unmap_all()
    audit = host.audit()
    assert audit.wrongly_freed == 1
    assert audit.bad_unpins == 1
    assert audit.leaked == 1  # the frame that the area did pin
    assert after.transport.pread(victim, 8, 0) != b"precious"


def test_stale_root(hosts):
    host = hosts(params={"stale_root": 1})
    after = Guest(host).start().preserve().kexec("soft-7.4", {"unsafe_adopt": 1}).retrieve()
    after.device.bind(after.iommufd)
    after.replay()
    with fails(errno.EINVAL, NotEqual) as caught:
        after.iommufd.adopt(after.ioas.id, HWPT_TOKEN)
    assert caught.value.mismatches[0].reason == "root"
    host.run()
    clean(host)
    hwpt = after.iommufd.hwpt_alloc(1, after.ioas.id)
    with fails(errno.EINVAL, NotEqual) as caught:
        after.iommufd.compare(hwpt, HWPT_TOKEN)
    assert caught.value.mismatches[0].reason == "root"
    after.iommufd.destroy(hwpt)
    host.stop_device(0)
    hwpt = after.iommufd.adopt(after.ioas.id, HWPT_TOKEN, trust=True).hwpt_id
    after.device.attach(hwpt)
    after.session.finish()
    after.ioas.unmap_all()
    audit = host.audit()
    assert audit.bad_unpins
    assert audit.wrongly_freed
    assert audit.leaked
