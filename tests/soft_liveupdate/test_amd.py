# SPDX-License-Identifier: Apache-2.0
"""A live update behind AMD-Vi, with devices at work: tables that grew and go on growing, two devices."""

import numpy as np
import pytest
from liveupdate_support import (
    AREAS,
    DEVICE_TOKEN_2,
    HWPT_TOKEN,
    MIB,
    Guest,
    clean,
    nothing_left,
    second,
)

from iokeep.iommufd.client import NotEqual, VfioDevice
from iokeep.pt.roots import amd
from iokeep.soft.hardware import bar
from iokeep.soft.hardware.units import amd as r

TIB = 1 << 40
#: beyond three levels: the table has four before the kexec
GROWN = (*AREAS, (TIB, 2 * MIB, 4 * MIB, 3))


@pytest.fixture
def host(hosts):
    return hosts(n_devices=2, iommu="amd")


def entries(host):
    """(mode, root, domain id) of each device, from the base register on."""
    table = amd.device_table_pa(host.platform.iommu.read64(r.MMIO_DEV_TABLE))
    out = []
    for index in range(host.platform.n_devices):
        at = table + host.platform.bdf(index) * amd.DTE_BYTES
        low, high = host.platform.ram.load64(at), host.platform.ram.load64(at + 8)
        out.append(((low & amd.MODE_MASK) >> amd.MODE_SHIFT, low & amd.PA_MASK, high & amd.DOMAIN_MASK))
    return out


@pytest.mark.parametrize("levels", [1, 3])
def test_growth_while_devices_work(hosts, levels):
    host = hosts(n_devices=2, iommu="amd", params={"levels": levels})
    guest = Guest(host, areas=AREAS[:1] if levels == 1 else AREAS).start()
    other = second(guest)
    (mode, root, did), copy = entries(host)
    assert mode == max(levels, 2)  # 4 MiB need two
    assert copy == (mode, root, did)
    host.run(20)
    for iova, want in ((TIB, 4), (1 << 50, 5), (1 << 62, 6)):
        guest.ioas.map_file(guest.memfd, 4 * MIB, 2 * MIB, iova=iova)
        tables = entries(host)
        assert [t[0] for t in tables] == [want, want]
        assert tables[0] == tables[1]
        guest.areas = (*guest.areas, (iova, 2 * MIB, 4 * MIB, 3))
        guest.work()
        host.set_ranges(1, guest.rows)
        host.run(20)
    clean(host)
    for index in (0, 1):
        host.stop_device(index)
    other.detach()
    guest.exit()
    nothing_left(host)


def test_hitless_replace_while_devices_work(host):
    guest = Guest(host).start()
    second(guest)
    before = entries(host)
    hwpts = [guest.hwpt, guest.iommufd.hwpt_alloc(guest.dev_id, guest.ioas.id)]
    for turn in range(6):
        host.run(3)
        guest.device.attach(hwpts[(turn + 1) % 2])
        host.run(3)
    now = entries(host)
    assert now == before  # back, by six copies of the table
    guest.device.attach(hwpts[1])
    assert entries(host)[0][1:] != before[0][1:]
    assert entries(host)[1] == before[1]
    host.run(3)
    clean(host)
    assert host.stats(1).transactions
    guest.exit()
    nothing_left(host)


@pytest.mark.parametrize("way", ["adopt", "rebuild"])
def test_live_update_of_a_table_that_has_grown(host, way):
    guest = Guest(host, areas=GROWN).start()
    second(guest)
    register = host.platform.iommu.read64(r.MMIO_DEV_TABLE)
    tables = entries(host)
    assert [t[0] for t in tables] == [4, 4]
    guest.preserve()
    # The other device stays behind: it is stopped and blocked.
    new = guest.kexec(params={"levels": 3})
    assert host.platform.iommu.read64(r.MMIO_DEV_TABLE) == register
    assert entries(host)[0] == tables[0]
    assert entries(host)[1] == (0, 0, 0)
    new.retrieve()
    getattr(new, way)()
    new.session.finish()
    host.run()
    clean(host)
    assert (entries(host)[0] == tables[0]) == (way == "adopt")
    assert entries(host)[0][0] == 4
    # It goes on growing, and shrinks by what is unmapped.
    new.ioas.map_file(new.memfd, 0, 2 * MIB, iova=1 << 55)
    assert entries(host)[0][0] == 5
    new.areas = (*GROWN, (1 << 55, 2 * MIB, 0, 3))
    new.work()
    host.run()
    clean(host)
    host.stop_device(0)
    new.ioas.unmap(TIB, 2 * MIB)
    gone = [bar.RangeRow(TIB, TIB + 2 * MIB - 1, 0, 0, bar.RANGE_READ | bar.RANGE_EXPECT_FAULT)]
    host.set_ranges(0, gone)
    host.run()
    stats = host.stats()
    assert stats.denied
    assert stats.leaks == 0
    host.stop_device(0)
    new.exit()
    nothing_left(host)


def test_both_devices_go_over(host):
    guest = Guest(host, areas=GROWN).start()
    other = second(guest)
    guest.preserve()
    guest.session.preserve(other.fd, DEVICE_TOKEN_2)
    tables = entries(host)
    new = guest.kexec()
    assert entries(host) == tables
    new.retrieve()
    other = VfioDevice(new.transport, new.session.retrieve(DEVICE_TOKEN_2))
    new.dev_id = new.device.bind(new.iommufd)
    other.bind(new.iommufd)
    new.replay()
    new.hwpt = new.iommufd.adopt(new.ioas.id, HWPT_TOKEN).hwpt_id
    new.device.attach(new.hwpt)
    other.attach(new.hwpt)
    new.session.finish()
    host.run()
    clean(host)
    assert host.stats(1).transactions
    assert entries(host) == tables
    new.exit()
    nothing_left(host)


def test_damage_is_named_and_the_device_goes_on(host):
    guest = Guest(host).start().preserve().kexec().retrieve()
    prior = next(iter(host.carrier.priors.domains.values()))
    assert (prior.record.format, dict(prior.record.config)["levels"]) == ("amdv1", 3)
    guest.dev_id = guest.device.bind(guest.iommufd)
    guest.replay((*AREAS[:3], (0x40_0000_0000, 0x3000, 6 * MIB + 0x21000, 3)))
    with pytest.raises(NotEqual) as caught:
        guest.iommufd.adopt(guest.ioas.id, HWPT_TOKEN)
    assert caught.value.mismatches[0].iova == 0x40_0000_0000
    host.run()
    clean(host, transactions=False)
    assert host.stats().transactions


def test_held_where_no_record_can_be_believed(host):
    guest = Guest(host).start().preserve()
    guest.transport.reboot_kexec()
    register, tables = host.platform.iommu.read64(r.MMIO_DEV_TABLE), entries(host)
    fdt = host.platform.boot.fdt_addr
    # The records are those of nobody: what hardware uses is kept as it is.
    host.platform.ram.write(fdt + 0x40, bytes(0x200))
    host.kexec("soft-7.4")
    host.run()
    assert "everything is kept as it is" in host.log(), host.log()
    assert (host.platform.iommu.read64(r.MMIO_DEV_TABLE), entries(host)) == (register, tables)
    stats = host.stats()
    assert (stats.faults, stats.lost, stats.misdirected, stats.untranslated) == (0, 0, 0, 0)
    pages = host.kernel.iommu.structure_pages()
    assert int(pages[0]) == amd.device_table_pa(register)
    assert np.all(host.kernel.frames.tags[(pages >> np.uint64(12)).astype(np.int64)] != 0)


@pytest.mark.parametrize("swept", [False, True])
def test_growth_of_a_table_that_is_not_proved_yet(host, swept):
    guest = Guest(host).start().preserve()
    new = guest.kexec(params={"sweep_rate": 0}).retrieve()
    new.adopt(deferred=True)
    proof = next(d for d in host.kernel.iommu.domains.values() if d.proof).proof
    new.ioas.map_file(new.memfd, 0, 2 * MIB, iova=TIB)
    assert proof.pending
    assert entries(host)[0][0] == 4
    new.areas = (*AREAS, (TIB, 2 * MIB, 0, 3))
    new.work()
    host.run()
    clean(host, transactions=False)
    if swept:
        while proof.tick(1 << 16):
            pass
        assert not proof.pending
    host.stop_device(0)
    assert new.ioas.unmap(TIB, 2 * MIB) == 2 * MIB
    assert not proof.quarantined
    new.session.finish()
    new.exit()
    nothing_left(host)
    assert host.kernel.warnings == 0
