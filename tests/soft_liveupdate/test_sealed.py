# SPDX-License-Identifier: Apache-2.0
"""ADOPT with SEALED: the digest of the set-up at once, the tables range by range as by DEFERRED."""

import errno

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

from iokeep.iommufd.client import NotEqual
from iokeep.pt.table_digest import digest
from iokeep.pt.walk import walk
from iokeep.soft.kernel import adopt as adopt_module
from iokeep.soft.kernel.files import PageFile
from iokeep.soft.kernel.frames import FrameRuns


@pytest.fixture
def after(host):
    return arrive(host)


@pytest.mark.parametrize("placement", ["contiguous", "2m-scattered", "4k-random"])
@pytest.mark.parametrize("mode", ["legacy", "scalable-fs"])
def test_whatever_the_leaves_are(hosts, placement, mode, monkeypatch):
    params = {"placement": placement, "iommu": mode}
    after = arrive(hosts(params=params), **params)
    after.replay()

    def never(*args, **kw):
        raise AssertionError("a table is read, or a page is looked at")

    with monkeypatch.context() as patch:
        patch.setattr(adopt_module, "verify", never)
        patch.setattr(PageFile, "fault", never)
        patch.setattr(FrameRuns, "pfns", never)
        patch.setattr(FrameRuns, "of", never)
        found = after.iommufd.adopt(after.ioas.id, HWPT_TOKEN, sealed=True, validate_only=True)
        assert (found.hwpt_id, found.pages, found.table_bytes) == (0, TOTAL >> 12, 0)
        after.hwpt = after.iommufd.adopt(after.ioas.id, HWPT_TOKEN, sealed=True).hwpt_id
    after.device.attach(after.hwpt)
    assert after.iommufd.progress(after.hwpt).unknown == TOTAL
    after.session.finish()
    assert after.iommufd.progress(after.hwpt, sweep=True).state == "validated"
    after.host.run()
    clean(after.host)
    after.exit()
    nothing_left(after.host)


@pytest.mark.parametrize(
    "areas",
    [
        AREAS[:3],
        (*AREAS, (0x3000_0000, 0x2000, 0, 3)),
        (*AREAS[:2], (0x2000_0000, 0x11000, 6 * MIB, 3), AREAS[3]),
        (*AREAS[:3], (0x40_0000_0000, 0x3000, 6 * MIB + 0x21000, 3)),
        (*AREAS[:3], (0x40_0000_1000, 0x3000, 6 * MIB + 0x20000, 3)),
    ],
    ids=["dropped", "extra", "prot", "offset", "iova"],
)
def test_another_set_up_is_refused_at_once(after, areas):
    after.replay(areas)
    with fails(errno.EINVAL, NotEqual) as caught:
        after.iommufd.adopt(after.ioas.id, HWPT_TOKEN, sealed=True)
    assert [m.reason for m in caught.value.mismatches] == ["digest"]
    assert "sealed" in str(caught.value.mismatches[0])
    assert [h.reclaimed for h in after.iommufd.liveupdate_info()] == [False]
    after.host.run()
    clean(after.host)


def test_a_cut_of_the_areas_does_not_count(after):
    half = AREAS[0][1] // 2
    after.replay(((0, half, 0, 3), (half, half, half, 3), *AREAS[1:]))
    after.iommufd.adopt(after.ioas.id, HWPT_TOKEN, sealed=True)


def test_a_wrong_table_under_the_right_seal_is_contained(after):
    after.host.stop_device(0)
    prior = next(iter(after.host.carrier.priors.domains.values()))
    bad = AREAS[3][0] + 0x1000
    ram = after.host.platform.ram
    at = walk(prior.fmt, ram, prior.record.root_pa, bad).steps[-1][1]
    ram.store64(at, ram.load64(at) ^ 0x5000)
    after.replay()
    after.hwpt = after.iommufd.adopt(after.ioas.id, HWPT_TOKEN, sealed=True).hwpt_id
    after.device.attach(after.hwpt)
    with fails(errno.EUCLEAN):
        after.ioas.unmap(*AREAS[3][:2])
    after.session.finish()
    check_audit(after.host)
    after.exit()
    nothing_left(after.host)


def test_the_wrong_root_comes_first(hosts):
    host = hosts(params={"stale_root": 1})
    after = arrive(host)
    after.replay()
    with fails(errno.EINVAL, NotEqual) as caught:
        after.iommufd.adopt(after.ioas.id, HWPT_TOKEN, sealed=True)
    assert caught.value.mismatches[0].reason == "root"


def test_a_fresh_key_each_time(host):
    guest = Guest(host).start()
    keys = set()
    for number in range(3):
        guest.preserve(f"vm-{number}")
        (held,) = host.carrier.iommufds.held
        (record,) = held.domains.values()
        keys.add(record.digest_key)
        guest.session.close()
        guest.luo.close()
    assert len(keys) == 3


def test_the_seal_follows_what_is_mapped_and_unmapped(host):
    """From the mark on: what is written at preserve is the digest of what is mapped then."""
    guest = Guest(host).start()
    guest.iommufd.mark_preserve(guest.hwpt, HWPT_TOKEN)
    host.stop_device(0)
    domain = next(iter(host.kernel.iommu.domains.values()))
    key = domain.seal.key
    guest.ioas.unmap(*AREAS[1][:2])
    guest.ioas.map_file(guest.memfd, 0x3000, 0x5000, iova=0x7000_0000, prot=1)
    guest.ioas.map_file(guest.memfd, 2 * MIB, 2 * MIB, iova=0x8000_0000)
    guest.ioas.unmap(0x7000_0000, 0x5000)
    guest.preserve(mark=False)
    (held,) = host.carrier.iommufds.held
    (record,) = held.domains.values()
    assert record.digest_key == key
    assert record.digest == digest(domain.fmt, host.platform.ram, domain.root_pa, key)
    areas = (AREAS[0], *AREAS[2:], (0x8000_0000, 2 * MIB, 2 * MIB, 3))
    after = guest.kexec("soft-7.4", STILL).retrieve()
    after.device.bind(after.iommufd)
    after.replay(areas)
    after.iommufd.adopt(after.ioas.id, HWPT_TOKEN, sealed=True)
