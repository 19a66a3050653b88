# SPDX-License-Identifier: Apache-2.0
"""Every fault under DEFERRED and SEALED: found at the latest where the range is first used, never after.

What is wrong is worked out before, from the whole table and the whole replay. Then the guest uses ranges in
every way there is, and a spy sees that no PFN is read back from what is wrong, that nothing is mapped or
unmapped there, and that nothing is unpinned but the pages of the guest's own files.
"""

import errno
from dataclasses import dataclass, field

import numpy as np
import pytest
from liveupdate_support import (
    AREAS,
    FILE_BYTES,
    HWPT_TOKEN,
    MFD_ALLOW_SEALING,
    RAM_TOKEN,
    SEALS,
    STILL,
    Guest,
    check_audit,
    clean,
    fails,
    nothing_left,
)

from iokeep.iommufd.client import NotEqual
from iokeep.mem.ranges import Range, merge, subtract
from iokeep.pt.verify import verify
from iokeep.rehearse.inject import RECORD_FAULTS, REPLAY_FAULTS, TABLE_FAULTS, change_replay, change_tables
from iokeep.restore.manifest import Area, FileEntry
from iokeep.soft.kernel.deferred import expected_extents
from iokeep.soft.kernel.frames import FrameAllocator
from iokeep.soft.kernel.iommu import Domain

SPARE_TOKEN = 0x11
#: an IOVA whose table was emptied, and is linked still
UNPLUGGED = 0x60_0000_0000
KINDS = {
    "vtdss": ("vtd", {}),
    "arm_lpae_s2": ("smmuv3", {"iommu": "stage-2"}),
    "amdv1": ("amd", {}),
    "riscv64": ("riscv", {}),
}
POLICIES = ("deferred", "sealed")
every_kind = pytest.mark.parametrize("kind", KINDS)
every_policy = pytest.mark.parametrize("policy", POLICIES)
ORIGINAL = [Area(iova, iova + length - 1, RAM_TOKEN, at, prot) for iova, length, at, prot in AREAS]
FILES = [FileEntry(RAM_TOKEN, FILE_BYTES, "ram"), FileEntry(SPARE_TOKEN, FILE_BYTES, "spare")]
#: where no device works: leaves of 2 MiB and of 4 KiB
QUIET = [Range(AREAS[n][0], AREAS[n][0] + AREAS[n][1] - 1) for n in (1, 2, 3)]


@dataclass
class Watch:
    """What the kernel does with one domain, and which frames it unpins."""

    wrong: list[Range] = field(default_factory=list)
    domain: Domain | None = None
    used: list[str] = field(default_factory=list)
    own: set[int] = field(default_factory=set)
    foreign: list[int] = field(default_factory=list)

    def look(self, what, domain, start, last):
        if domain is self.domain and any(r.overlaps(Range(start, last)) for r in self.wrong):
            self.used.append(f"{what} {start:#x} ... {last:#x}")

    def nothing_wrong_was_used(self):
        assert not self.used
        assert not self.foreign


@pytest.fixture
def watch(monkeypatch):
    w = Watch()
    read, unmap, enter = Domain.iova_to_phys, Domain.unmap, Domain.map
    unpin = FrameAllocator.unpin

    def read_spy(domain, iovas):
        for start in iovas.tolist():
            w.look("read", domain, start, start | 0xFFF)
        return read(domain, iovas)

    def unmap_spy(domain, iova, last):
        w.look("unmap", domain, iova, last)
        return unmap(domain, iova, last)

    def map_spy(domain, extents, max_lg2=None):
        for start, last in zip(extents.iova.tolist(), extents.last.tolist(), strict=True):
            w.look("map", domain, start, last)
        return enter(domain, extents, max_lg2)

    def unpin_spy(frames, pfns):
        if w.domain is not None:
            w.foreign += sorted(set(pfns.tolist()) - w.own)
        return unpin(frames, pfns)

    monkeypatch.setattr(Domain, "iova_to_phys", read_spy)
    monkeypatch.setattr(Domain, "unmap", unmap_spy)
    monkeypatch.setattr(Domain, "map", map_spy)
    monkeypatch.setattr(FrameAllocator, "unpin", unpin_spy)
    return w


@dataclass
class Case:
    """A guest that has come over the kexec, with a fault in its tables or in what it replays."""

    guest: Guest
    areas: list[Area]
    files: dict[int, int]
    watch: Watch

    @property
    def prior(self):
        return next(iter(self.guest.host.carrier.priors.domains.values()))

    def replay(self):
        self.guest.ioas = self.guest.iommufd.ioas_alloc()
        for a in self.areas:
            self.guest.ioas.map_file(self.files[a.file], a.offset, a.length, iova=a.iova, prot=a.prot)

    def adopt(self, policy):
        guest, kernel = self.guest, self.guest.host.kernel
        self.replay()
        prior, ioas = self.prior, next(i for i in _ioases(kernel) if i.areas)
        verdict = verify(
            prior.fmt, kernel.frames.ram, prior.record.root_pa, expected_extents(ioas), limit=1 << 16
        )
        self.watch.wrong = merge([Range(m.iova, m.last) for m in verdict.mismatches])
        self.watch.domain = prior.domain
        for fd in self.files.values():
            file = next(p for p in kernel.processes.values() if fd in p.fds).file(fd)
            self.watch.own |= set(file.pfns.tolist())
        found = guest.iommufd.adopt(guest.ioas.id, HWPT_TOKEN, **{policy: True})
        guest.hwpt = found.hwpt_id
        guest.device.attach(guest.hwpt)
        return self

    @property
    def wrong(self):
        return self.watch.wrong

    def is_wrong(self, a):
        return any(r.overlaps(Range(a.iova, a.last)) for r in self.wrong)

    def holes(self):
        """What is wrong where no area is."""
        return subtract(self.wrong, sorted(Range(a.iova, a.last) for a in self.areas))


def _ioases(kernel):
    for file in kernel.files.values():
        for thing in getattr(file, "objects", {}).values():
            if getattr(thing, "type_name", "") == "ioas":
                yield thing


def arrive(hosts, watch, kind, fault, **params):
    """Over the kexec, with the fault in place. A fault of the records is a parameter of the old kernel."""
    iommu, own = KINDS[kind]
    host = hosts(params={**own, **params}, iommu=iommu)
    guest = Guest(host).start()
    t = guest.transport
    guest.ioas.map_file(guest.memfd, 0, 0x1000, iova=UNPLUGGED)
    guest.ioas.unmap(UNPLUGGED, 0x1000)
    spare = t.memfd_create("spare", MFD_ALLOW_SEALING)
    t.ftruncate(spare, FILE_BYTES)
    t.add_seals(spare, SEALS)
    guest.preserve()
    guest.session.preserve(spare, SPARE_TOKEN)
    guest = guest.kexec("soft-7.4", {**STILL, **own}).retrieve()
    files = {RAM_TOKEN: guest.memfd, SPARE_TOKEN: guest.session.retrieve(SPARE_TOKEN)}
    guest.dev_id = guest.device.bind(guest.iommufd)
    host.stop_device(0)
    case = Case(guest, list(ORIGINAL), files, watch)
    prior = case.prior
    assert prior.fmt.name == kind
    if fault in REPLAY_FAULTS:
        top = (1 << prior.fmt.input_lg2) - 1
        case.areas, _ = change_replay(fault, ORIGINAL, FILES, QUIET, [Range(0, min(top, (1 << 38) - 1))])
    elif fault in TABLE_FAULTS:
        unplugged = [Range(UNPLUGGED, UNPLUGGED + 0xFFF)]
        ram, tags = host.platform.ram, np.asarray(host.platform.tags)
        change_tables(fault, prior.fmt, ram, prior.record.root_pa, QUIET, tags, unplugged)
    return case


# ---- ways to use a range first


def unmap_each(case):
    for a in case.areas:
        if case.is_wrong(a):
            with fails(errno.EUCLEAN):
                case.guest.ioas.unmap(a.iova, a.length)
        else:
            assert case.guest.ioas.unmap(a.iova, a.length) == a.length
    map_holes(case)


def map_holes(case):
    for r in case.holes():
        with fails(errno.EUCLEAN):
            case.guest.ioas.map_file(case.guest.memfd, 0, 0x1000, iova=r.start & -0x1000)


def unmap_all(case):
    if any(case.is_wrong(a) for a in case.areas):
        with fails(errno.EUCLEAN):
            case.guest.ioas.unmap_all()
        assert case.guest.ioas.unmap(AREAS[0][0], AREAS[0][1]), "nothing had gone"
    else:
        case.guest.ioas.unmap_all()
    map_holes(case)


def copy_each(case):
    other = case.guest.iommufd.ioas_alloc()
    for a in case.areas:
        if case.is_wrong(a):
            with fails(errno.EUCLEAN):
                other.copy(case.guest.ioas, a.iova, a.length, iova=a.iova, prot=a.prot)
        else:
            other.copy(case.guest.ioas, a.iova, a.length, iova=a.iova, prot=a.prot)
    map_holes(case)


def second_domain(case):
    guest = case.guest
    if any(case.is_wrong(a) for a in case.areas):
        with fails(errno.EUCLEAN):
            guest.iommufd.hwpt_alloc(guest.dev_id, guest.ioas.id)
    else:
        guest.iommufd.destroy(guest.iommufd.hwpt_alloc(guest.dev_id, guest.ioas.id))
    map_holes(case)


def preserve_again(case):
    guest = case.guest
    guest.session.finish()
    guest.session.close()
    guest.luo.close()
    guest.open_luo()
    guest.session = guest.luo.create("vm-2")
    for token, fd in case.files.items():
        guest.session.preserve(fd, token)
    guest.iommufd.mark_preserve(guest.hwpt, HWPT_TOKEN)
    with fails(errno.EUCLEAN):
        guest.session.preserve(guest.iommufd.fd, 0x20)
    guest.session.close()


def sweep_by_ticks(case):
    proof = case.guest.host.carrier.priors.adoptions[0]
    while proof.tick(4096):
        pass
    unmap_each(case)


def sweep_at_once(case):
    found = case.guest.iommufd.progress(case.guest.hwpt, sweep=True)
    assert found.state == "quarantined"
    assert found.unknown == 0
    unmap_each(case)


def finish_then_unmap(case):
    case.guest.session.finish()
    case.guest.session.close()
    unmap_each(case)


def only_leave(case):
    pass


def destroy(case):
    """The HWPT goes before anything was used: its table goes as a whole."""
    guest = case.guest
    guest.session.finish()
    guest.device.detach()
    guest.iommufd.destroy(guest.hwpt)
    guest.ioas.unmap_all()


USES = (
    unmap_each, unmap_all, copy_each, second_domain, preserve_again, sweep_by_ticks, sweep_at_once,
    finish_then_unmap, only_leave, destroy,
)  # fmt: skip
FAULTS = [
    *((policy, fault) for policy in POLICIES for fault in TABLE_FAULTS if fault != "leaf-size"),
    *(("deferred", fault) for fault in REPLAY_FAULTS),
]


@every_kind
@pytest.mark.parametrize(("policy", "fault"), FAULTS)
def test_found_at_first_use(hosts, watch, kind, policy, fault):
    uses = (unmap_each,)
    if kind in ("vtdss", "arm_lpae_s2"):
        uses = USES if fault in ("pte-bit", "drop-area") else (unmap_each, copy_each, sweep_by_ticks)
    for use in uses:
        watch.__init__()
        case = arrive(hosts, watch, kind, fault).adopt(policy)
        guest = case.guest
        assert case.wrong, "the fault is one"
        assert guest.iommufd.progress(guest.hwpt).quarantined == 0, "nobody has looked"
        use(case)
        watch.nothing_wrong_was_used()
        assert check_audit(guest.host)
        if use not in (destroy, only_leave):
            found = guest.iommufd.progress(guest.hwpt, sweep=True)
            assert found.state == "quarantined"
            assert found.mismatches
            for m in found.mismatches:
                assert any(r.overlaps(Range(m.iova, m.last)) for r in case.wrong)
            assert "is quarantined, its DMA is left as it is" in guest.host.log()
        guest.exit()
        watch.nothing_wrong_was_used()
        clean(guest.host, transactions=False)
        nothing_left(guest.host)
        guest.host.stop()


@every_kind
@pytest.mark.parametrize("fault", REPLAY_FAULTS)
def test_sealed_refuses_another_replay_at_once(hosts, watch, kind, fault):
    case = arrive(hosts, watch, kind, fault)
    with fails(errno.EINVAL, NotEqual) as caught:
        case.adopt("sealed")
    assert [m.reason for m in caught.value.mismatches] == ["digest"]
    assert case.wrong
    case.guest.exit()
    watch.nothing_wrong_was_used()
    check_audit(case.guest.host)


@every_kind
@every_policy
def test_another_leaf_size_is_no_fault(hosts, watch, kind, policy):
    case = arrive(hosts, watch, kind, "leaf-size").adopt(policy)
    guest = case.guest
    assert not case.wrong
    unmap_each(case)
    guest.session.finish()
    assert guest.iommufd.progress(guest.hwpt, sweep=True).state == "validated"
    guest.exit()
    nothing_left(guest.host)


RECORDS = {
    "stale-root": {"stale_root": 1},
    "truncate-records": {"truncate_records": 1},
    "version-skew": {"records_version": "iokeep-iommufd-v2"},
}


@every_kind
@every_policy
@pytest.mark.parametrize("fault", RECORD_FAULTS)
def test_what_the_records_say_wrongly_is_refused_at_once(hosts, kind, policy, fault):
    """No table of such a record becomes an HWPT: nothing is there to be used."""
    iommu, own = KINDS[kind]
    host = hosts(params={**own, **RECORDS[fault]}, iommu=iommu)
    guest = Guest(host).start().preserve().kexec("soft-7.4", {**STILL, **own})
    if fault == "stale-root":
        guest.retrieve()
        guest.device.bind(guest.iommufd)
        guest.replay()
        with fails(errno.EINVAL, NotEqual) as caught:
            guest.iommufd.adopt(guest.ioas.id, HWPT_TOKEN, **{policy: True})
        assert caught.value.mismatches[0].reason == "root"
    else:
        with fails(errno.EIO):
            guest.retrieve()
    assert not host.carrier.priors.adoptions
    host.run()
    clean(host)


@pytest.mark.parametrize("kind", ["vtdss", "arm_lpae_s2"])
@every_policy
@pytest.mark.parametrize("finished", [False, True])
def test_the_vmm_dies_at_any_tick(hosts, watch, kind, policy, finished):
    """Killed after so many ticks of the sweep: what is wrong is not used in the clean-up either."""
    ticks, over = 0, False
    while not over:
        watch.__init__()
        case = arrive(hosts, watch, kind, "pte-bit").adopt(policy)
        guest = case.guest
        proof = guest.host.carrier.priors.adoptions[0]
        over = not all(proof.tick(8192) for _ in range(ticks))
        if finished:
            guest.session.finish()
            guest.session.close()
        check_audit(guest.host)
        guest.exit()
        watch.nothing_wrong_was_used()
        nothing_left(guest.host)
        assert guest.host.kernel.warnings == 0, guest.host.log()
        guest.host.stop()
        ticks += 1
    assert ticks > 3
