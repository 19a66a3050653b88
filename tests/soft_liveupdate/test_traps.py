# SPDX-License-Identifier: Apache-2.0
"""Prior tables that translate what the IOAS says, and of which iommufd must not become the owner all the
same; areas that are cut otherwise than before; files that lose pages before the areas are back.
"""

import errno
from dataclasses import replace

import numpy as np
import pytest
from liveupdate_support import (
    AREAS,
    HWPT_TOKEN,
    MIB,
    RAM_TOKEN,
    STILL,
    Guest,
    check_audit,
    clean,
    fails,
    nothing_left,
)

from iokeep.iommufd.client import NotEqual
from iokeep.pt.walk import walk
from iokeep.soft.kernel.freeze import Freeze

#: the first area in two, cut inside of its first 2 MiB
CUT = 0x10_0000
SPLIT = ((0x0, CUT, 0, 3), (CUT, 4 * MIB - CUT, CUT, 3), *AREAS[1:])
WAYS = {
    "adopt": {},
    "only": {"validate_only": True},
    "deferred": {"deferred": True},
    "sealed": {"sealed": True},
    "sealed-only": {"sealed": True, "validate_only": True},
}
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2


def arrive(hosts, iommu="vtd", params=None, **kw):
    """The new VMM, everything retrieved and bound, on a host whose tables have large leaves."""
    host = hosts(params={"placement": "contiguous", **(params or {})}, iommu=iommu)
    guest = Guest(host, **kw).start().preserve()
    guest = guest.kexec("soft-7.4", {**STILL, **(params or {})}).retrieve()
    guest.dev_id = guest.device.bind(guest.iommufd)
    return guest


def table_of(guest):
    prior = next(iter(guest.host.carrier.priors.domains.values()))
    return prior, guest.host.platform.ram


def path(guest, iova):
    prior, ram = table_of(guest)
    return walk(prior.fmt, ram, prior.record.root_pa, iova).steps


def accepted(guest, areas=None, **kw):
    """The right replay is adopted after all, nothing was changed or lost."""
    guest.ioas.unmap_all()
    guest.ioas.destroy()
    guest.replay(areas)
    guest.hwpt = guest.iommufd.adopt(guest.ioas.id, HWPT_TOKEN, **kw).hwpt_id
    guest.device.attach(guest.hwpt)
    guest.session.finish()
    guest.host.run()
    clean(guest.host)
    guest.host.stop_device(0)
    for iova, length, _, _ in guest.areas if areas is None else areas:
        guest.ioas.unmap(iova, length)
    clean(guest.host, transactions=False)
    guest.exit()
    nothing_left(guest.host)


# ---- areas that are cut inside of a leaf


@pytest.mark.parametrize("iommu", ["vtd", "amd", "smmuv3", "riscv"])
@pytest.mark.parametrize("way", WAYS)
def test_an_edge_inside_of_a_leaf_is_refused(hosts, iommu, way):
    guest = arrive(hosts, iommu)
    guest.replay(SPLIT)
    with fails(errno.EINVAL, NotEqual) as caught:
        guest.iommufd.adopt(guest.ioas.id, HWPT_TOKEN, **WAYS[way])
    assert caught.value.total == 1
    (row,) = caught.value.mismatches
    assert row.reason == "span"
    assert row.iova < CUT <= row.last
    assert row.expected_pa is None
    assert row.found_pa is not None
    assert "map the areas as they were" in guest.host.log()
    assert "map the areas as they were" in str(row)
    guest.host.run()
    clean(guest.host)
    accepted(guest, **{k: v for k, v in WAYS[way].items() if k != "validate_only"})


def test_edges_between_leaves_are_none(hosts):
    """Areas may be cut otherwise than before wherever no leaf is in the way, and each goes by its own."""
    guest = arrive(hosts)
    areas = ((0x0, 2 * MIB, 0, 3), (2 * MIB, 2 * MIB, 2 * MIB, 3), *AREAS[1:])
    guest.replay()
    accepted(guest, areas)


def test_an_area_that_ends_inside_of_a_leaf(hosts):
    """Beyond it nothing is expected: a mismatch at once, or before the area is adopted unseen."""
    guest = arrive(hosts)
    guest.replay(((0x0, 3 * MIB, 0, 3), *AREAS[1:]))
    with fails(errno.EINVAL, NotEqual) as caught:
        guest.iommufd.adopt(guest.ioas.id, HWPT_TOKEN)
    assert caught.value.mismatches[0].reason == "extra"
    with fails(errno.EINVAL, NotEqual) as caught:
        guest.iommufd.adopt(guest.ioas.id, HWPT_TOKEN, deferred=True)
    assert [(m.reason, m.iova) for m in caught.value.mismatches] == [("span", 2 * MIB)]
    accepted(guest)


def test_a_rebuild_takes_any_edges(hosts):
    """COMPARE: the new table has a leaf for each area, whatever the prior one has."""
    guest = arrive(hosts)
    guest.replay(SPLIT)
    guest.hwpt = guest.iommufd.hwpt_alloc(guest.dev_id, guest.ioas.id)
    assert guest.iommufd.compare(guest.hwpt, HWPT_TOKEN).layout_differences
    guest.device.attach(guest.hwpt)
    guest.session.finish()
    guest.host.run()
    clean(guest.host)
    guest.host.stop_device(0)
    guest.ioas.unmap(CUT, 4 * MIB - CUT)
    clean(guest.host, transactions=False)
    prior = guest.host.kernel.iommu.devices[0].domain
    assert walk(prior.fmt, guest.host.platform.ram, prior.root_pa, CUT).pa is None
    assert walk(prior.fmt, guest.host.platform.ram, prior.root_pa, 0).pa is not None
    guest.ioas.unmap_all()
    guest.exit()
    nothing_left(guest.host)


@pytest.mark.parametrize("deferred", [False, True])
def test_an_area_is_not_cut_inside_of_an_adopted_leaf(hosts, deferred):
    """An IOAS without huge pages can be cut (VFIO's type 1); a table that was adopted may have them."""
    guest = arrive(hosts)
    guest.ioas = guest.iommufd.ioas_alloc()
    guest.ioas.huge_pages(False)
    for iova, length, offset, prot in AREAS:
        guest.ioas.map_file(guest.memfd, offset, length, iova=iova, prot=prot)
    guest.hwpt = guest.iommufd.adopt(guest.ioas.id, HWPT_TOKEN, deferred=deferred).hwpt_id
    guest.device.attach(guest.hwpt)
    guest.session.finish()
    guest.host.stop_device(0)
    ioas = guest.host.carrier.kernel.iommu.devices[0].owner.objects[guest.ioas.id]
    with fails(errno.EINVAL, Exception):
        ioas.cut(CUT - 1)
    assert len(ioas.areas) == len(AREAS)
    ioas.cut(2 * MIB - 1)
    assert len(ioas.areas) == len(AREAS) + 1
    guest.ioas.unmap(2 * MIB, 2 * MIB)
    clean(guest.host, transactions=False)
    assert guest.host.kernel.iommu.devices[0].domain.leaf_across(1 * MIB)
    guest.ioas.unmap_all()
    clean(guest.host, transactions=False)
    guest.exit()
    nothing_left(guest.host)


def test_a_copy_of_a_part_of_a_leaf(hosts):
    """IOAS_COPY shows pages in another IOAS by leaves of its own; each side goes without the other."""
    guest = arrive(hosts)
    guest.replay()
    guest.hwpt = guest.iommufd.adopt(guest.ioas.id, HWPT_TOKEN).hwpt_id
    guest.device.attach(guest.hwpt)
    guest.session.finish()
    guest.host.stop_device(0)
    guest.ioas.copy(guest.ioas, CUT, 0x3000, iova=0x5000_0000)
    guest.ioas.unmap(0, 4 * MIB)
    clean(guest.host, transactions=False)
    domain = guest.host.kernel.iommu.devices[0].domain
    assert walk(domain.fmt, guest.host.platform.ram, domain.root_pa, 0x5000_0000).pa is not None
    guest.ioas.unmap_all()
    guest.exit()
    nothing_left(guest.host)


# ---- files that lose pages


def punch(guest, fd=None):
    guest.transport.fallocate(
        guest.memfd if fd is None else fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, 0x7000, 0x1000
    )


@pytest.mark.parametrize("policy", ["adopt", "deferred", "rebuild"])
def test_a_retrieved_memfd_keeps_its_pages(host, policy):
    """Devices write to them by the prior table from before the retrieve on, and nobody has pinned them."""
    guest = Guest(host).start().preserve().kexec("soft-7.4", STILL).retrieve()
    with fails(errno.EBUSY):
        punch(guest)
    host.run()
    clean(host)
    guest.dev_id = guest.device.bind(guest.iommufd)
    with fails(errno.EBUSY):
        punch(guest)
    guest.replay()
    if policy == "rebuild":
        guest.hwpt = guest.iommufd.hwpt_alloc(guest.dev_id, guest.ioas.id)
        guest.iommufd.compare(guest.hwpt, HWPT_TOKEN)
    else:
        guest.hwpt = guest.iommufd.adopt(guest.ioas.id, HWPT_TOKEN, deferred=policy == "deferred").hwpt_id
    guest.device.attach(guest.hwpt)
    with fails(errno.EBUSY):
        punch(guest)
    assert guest.transport.pwrite(guest.memfd, b"written", 7 * MIB) == 7
    guest.session.finish()
    host.run()
    clean(host)
    host.stop_device(0)
    if policy == "deferred":
        with fails(errno.EBUSY):
            punch(guest)
        assert guest.iommufd.progress(guest.hwpt, sweep=True).state == "validated"
    punch(guest)  # as in Linux: the areas have their pins
    assert guest.transport.pread(guest.memfd, 7, 0x7000) == bytes(7)
    guest.ioas.unmap_all()
    check_audit(host)
    guest.exit()
    nothing_left(host)


def test_a_memfd_alone_is_an_ordinary_file_at_once(host):
    """No prior domain in its session: as Linux does it."""
    t = host.transport()
    fd = t.memfd_create("alone", 2)
    t.ftruncate(fd, 1 * MIB)
    guest = Guest(host)
    guest.transport = t
    session = guest.open_luo().create("vm-1")
    session.preserve(fd, RAM_TOKEN)
    with fails(errno.EPERM):
        punch(guest, fd)
    t.reboot_kexec()
    host.kexec("soft-7.4", STILL)
    guest.transport = host.transport()
    session = guest.open_luo().retrieve("vm-1")
    fd = session.retrieve(RAM_TOKEN)
    punch(guest, fd)
    guest.transport.ftruncate(fd, 0x1000)
    session.finish()
    guest.exit()
    nothing_left(host)


def test_a_vmm_that_dies_leaves_the_file_held(host):
    guest = Guest(host).start().preserve().kexec("soft-7.4", STILL).retrieve()
    guest.luo.close()
    other = host.transport()
    fd = other.getfd(guest.transport.getpid(), guest.memfd)
    guest.transport.disconnect()
    host.settle()
    with fails(errno.EBUSY):
        other.fallocate(fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, 0, 0x1000)
    host.run()
    clean(host)


# ---- tables that translate what they should


#: two areas that show the same pages of the file
TWICE = (*AREAS, (0x6000_0000, 0x2000, 6 * MIB, 3), (0x7000_0000, 0x2000, 6 * MIB, 3))
#: there was an area, whose tables are empty now; nothing was ever near the other
EMPTIED, NOWHERE = 0x8000_0000, 0x9000_0000


def item_pa(guest, iova, level):
    """pa of the item of a level on the path to ``iova``, also where the path ends there."""
    return next(at for n, at, _ in path(guest, iova) if n == level)


def link_empty(guest, ram):
    ram.store64(item_pa(guest, NOWHERE, 1), ram.load64(item_pa(guest, EMPTIED, 1)))
    return "loop", EMPTIED, NOWHERE


def link_alike(guest, ram):
    ram.store64(item_pa(guest, TWICE[-1][0], 1), ram.load64(item_pa(guest, TWICE[-2][0], 1)))
    return "loop", TWICE[-2][0], TWICE[-1][0]


def link_guest_memory(guest, ram):
    """A table that the guest can write: it would map itself what it likes."""
    memfd = next(f for f in guest.host.kernel.files.values() if f.size == guest.file_bytes)
    pfn = int(memfd.pfns[7 * MIB >> 12])
    ram.store64(item_pa(guest, NOWHERE, 1), ram.load64(item_pa(guest, EMPTIED, 1)) & 0xFFF | pfn << 12)
    return "absent", NOWHERE, NOWHERE


def link_absent(guest, ram):
    """R = W = 0: nothing for hardware, a table for Linux, which would write PFNs to the guest's memory."""
    reason, _, _ = link_guest_memory(guest, ram)
    at = item_pa(guest, NOWHERE, 1)
    ram.store64(at, ram.load64(at) & ~3)
    assert reason == "absent"
    return "reserved", NOWHERE, NOWHERE


def take_writes_away(guest, ram):
    at = item_pa(guest, AREAS[2][0], 1)
    ram.store64(at, ram.load64(at) & ~2)
    return "prot", AREAS[2][0], AREAS[2][0]


TRAPS = [link_empty, link_alike, link_guest_memory, link_absent, take_writes_away]


def lure(hosts, trap):
    host = hosts()
    guest = Guest(host, TWICE).start()
    guest.ioas.map_file(guest.memfd, 0, 0x1000, iova=EMPTIED)
    guest.ioas.unmap(EMPTIED, 0x1000)
    guest = guest.preserve().kexec("soft-7.4", STILL).retrieve()
    guest.dev_id = guest.device.bind(guest.iommufd)
    host.stop_device(0)
    prior, ram = table_of(guest)
    before = {pa: ram.read(pa, 4096) for pa in prior.record.table_pages.tolist()}
    return guest, trap(guest, ram), before


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("way", ["adopt", "only"])
def test_a_trap_is_refused(hosts, trap, way):
    guest, (reason, *where), before = lure(hosts, trap)
    guest.replay()
    with fails(errno.EINVAL, NotEqual) as caught:
        guest.iommufd.adopt(guest.ioas.id, HWPT_TOKEN, **WAYS[way])
    rows = caught.value.mismatches
    assert {m.reason for m in rows} == {reason}
    assert {m.level for m in rows} == {1}
    assert all(str(m).endswith(f"{reason} at level 1") for m in rows)
    for iova in where:
        assert any(m.iova <= iova <= m.last for m in rows), [str(m) for m in rows]
    for pa, data in before.items():
        guest.host.platform.ram.write(pa, data)
    guest.work()
    accepted(guest)


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_is_found_before_anything_is_changed(hosts, trap):
    """Deferred: whatever is needed first, the places where a change would do harm are quarantined with it."""
    guest, (reason, *where), _ = lure(hosts, trap)
    guest.replay()
    guest.hwpt = guest.iommufd.adopt(guest.ioas.id, HWPT_TOKEN, deferred=True).hwpt_id
    guest.device.attach(guest.hwpt)
    guest.session.finish()
    victim = guest.transport.pread(guest.memfd, 4096, 7 * MIB)
    guest.ioas.unmap(*AREAS[3][:2])
    assert {m.reason for m in guest.iommufd.progress(guest.hwpt).mismatches} == {reason}
    used = {iova for iova, *_ in TWICE}
    for iova in where:
        with fails(errno.EUCLEAN):
            if iova in used:
                guest.ioas.unmap(iova, next(n for i, n, *_ in TWICE if i == iova))
            else:
                guest.ioas.map_file(guest.memfd, 0, 0x1000, iova=iova)
    with fails(errno.EUCLEAN):
        if where[0] in used:
            guest.ioas.copy(guest.ioas, where[0], 0x1000, iova=0xA000_0000)
        else:
            guest.ioas.map_file(guest.memfd, 0, 0x1000, iova=where[0] + 0x10000)
    assert guest.iommufd.progress(guest.hwpt, sweep=True).state == "quarantined"
    assert guest.transport.pread(guest.memfd, 4096, 7 * MIB) == victim
    clean(guest.host, transactions=False)
    guest.exit()
    nothing_left(guest.host)


def test_a_table_page_that_the_record_does_not_have(hosts, monkeypatch):
    """It is nobody's: freed with what nobody claimed while hardware walks it."""
    add_domain = Freeze.add_domain

    def wrong(self, domain):
        index = add_domain(self, domain)
        pages = self.domains[index].table_pages
        self.domains[index] = replace(self.domains[index], table_pages=pages[pages != np.uint64(lost[0])])
        return index

    host = hosts()
    guest = Guest(host).start()
    domain = host.kernel.iommu.devices[0].domain
    step = walk(domain.fmt, host.platform.ram, domain.root_pa, AREAS[3][0]).steps[-1]
    lost = [step[1] & -4096]
    monkeypatch.setattr(Freeze, "add_domain", wrong)
    guest = guest.preserve().kexec("soft-7.4", STILL).retrieve()
    guest.dev_id = guest.device.bind(guest.iommufd)
    guest.replay()
    with fails(errno.EINVAL, NotEqual) as caught:
        guest.iommufd.adopt(guest.ioas.id, HWPT_TOKEN)
    assert [(m.reason, m.iova) for m in caught.value.mismatches] == [("absent", AREAS[3][0])]
    host.run()
    clean(host)
    guest.hwpt = guest.iommufd.adopt(guest.ioas.id, HWPT_TOKEN, deferred=True).hwpt_id
    guest.device.attach(guest.hwpt)
    guest.session.finish()
    host.run()
    clean(host)  # the page waits, as all that nobody claimed does
    with fails(errno.EUCLEAN):
        guest.ioas.unmap(*AREAS[3][:2])
    assert guest.iommufd.progress(guest.hwpt, sweep=True).state == "quarantined"
    host.run()
    clean(host)
    guest.exit()
    nothing_left(host)


def test_a_trap_is_not_preserved(hosts):
    """The old kernel refuses what the new one would."""
    host = hosts()
    guest = Guest(host, TWICE).start()
    domain = host.kernel.iommu.devices[0].domain
    ram = host.platform.ram
    steps = [walk(domain.fmt, ram, domain.root_pa, iova).steps[-2] for iova, *_ in TWICE[-2:]]
    ram.store64(steps[1][1], steps[0][2])
    guest.iommufd.mark_preserve(guest.hwpt, HWPT_TOKEN)
    session = guest.open_luo().create("vm-1")
    session.preserve(guest.memfd, RAM_TOKEN)
    with fails(errno.EINVAL):
        session.preserve(guest.iommufd.fd, 0x20)
    assert "reached at another place" in host.log()
    ram.store64(steps[1][1], steps[1][2])
    session.preserve(guest.iommufd.fd, 0x20)
