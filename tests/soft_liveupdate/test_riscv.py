# SPDX-License-Identifier: Apache-2.0
"""A live update behind the RISC-V IOMMU, with devices at work: both stages, every size of table."""

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
from iokeep.pt.roots import riscv
from iokeep.pt.walk import walk
from iokeep.soft.hardware.units import riscv as r

MODES = ("first-stage", "second-stage")
#: within 38 bits, what Sv39 has for an address space that begins at 0
LOW_AREAS = (*AREAS[:3], (0x30_0000_0000, 0x33000, 6 * MIB + 0x20000, 3))


def contexts(host):
    """The device context of each device, from ddtp on; None: not valid."""
    unit = host.platform.iommu
    regs = riscv.Registers(unit.read64(r.DDTP), unit.read64(r.CAPABILITIES))
    out = []
    for index in range(host.platform.n_devices):
        try:
            out.append(riscv.find_root(host.platform.ram, regs, host.platform.bdf(index)).path[-1].words)
        except riscv.RootFault:
            out.append(None)
    return out


@pytest.mark.parametrize("way", ["adopt", "rebuild"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("levels", [3, 5])
def test_live_update(hosts, mode, levels, way):
    params = {"iommu": mode, "levels": levels}
    host = hosts(iommu="riscv", n_devices=2, params=params)
    guest = Guest(host, areas=LOW_AREAS).start()
    second(guest)
    ddtp, before = host.platform.iommu.read64(r.DDTP), contexts(host)
    assert before[0] == before[1]
    assert bool(before[0][3]) == (mode == "first-stage")
    assert bool(before[0][1]) == (mode == "second-stage")
    guest.preserve()
    # The other device stays behind: it is stopped and blocked.
    new = guest.kexec(params=params)
    assert host.platform.iommu.read64(r.DDTP) == ddtp
    assert contexts(host) == [before[0], None]
    new.retrieve()
    result = getattr(new, way)()
    assert result.layout_differences == 0
    host.run()
    clean(host)
    assert (contexts(host)[0] == before[0]) == (way == "adopt")
    new.session.finish()
    new.ioas.map_file(new.memfd, 0, MIB, iova=0x5000_0000)
    new.ioas.unmap(0x5000_0000, MIB)
    host.run()
    clean(host)
    assert host.platform.iommu.read32(r.FQT) == 0
    new.exit()
    nothing_left(host)


@pytest.mark.parametrize("mode", MODES)
def test_a_prior_table_of_the_other_stage(hosts, mode):
    """The stage is a matter of each context: a kernel for one stage carries a table of the other on, and
    replaces it.
    """
    other = MODES[1 - MODES.index(mode)]
    host = hosts(iommu="riscv", params={"iommu": mode})
    guest = Guest(host).start().preserve()
    before = contexts(host)
    new = guest.kexec(params={"iommu": other}).retrieve()
    assert contexts(host) == before
    new.adopt()
    new.session.finish()
    new.ioas.unmap(0x40_0000_0000, 0x3000)
    new.areas = AREAS[:3]
    new.work()
    host.run()
    clean(host)
    assert contexts(host) == before
    hwpt = new.iommufd.hwpt_alloc(new.dev_id, new.ioas.id)
    new.device.attach(hwpt)
    assert bool(contexts(host)[0][3]) == (other == "first-stage")
    host.run()
    clean(host)
    new.exit()
    nothing_left(host)


def test_both_devices_go_over(hosts):
    host = hosts(iommu="riscv", n_devices=2)
    guest = Guest(host).start()
    other = second(guest)
    guest.preserve()
    guest.session.preserve(other.fd, DEVICE_TOKEN_2)
    before = contexts(host)
    new = guest.kexec()
    assert contexts(host) == before
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
    assert contexts(host) == before
    new.exit()
    nothing_left(host)


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        (lambda item: item ^ 1 << 20, {"pa"}),
        (lambda item: item & ~(1 << 2), {"prot"}),  # W
        (lambda item: item & ~(1 << 6), {"prot", "missing"}),  # A, which hardware does not set for us
        (lambda item: item & ~(1 << 7), {"prot"}),  # D
        (lambda item: item | 1 << 54, {"reserved"}),
        (lambda item: 0, {"missing"}),
    ],
    ids=["pa", "w", "a", "d", "reserved", "cleared"],
)
def test_a_changed_item_is_found(hosts, change, reasons):
    host = hosts(iommu="riscv")
    guest = Guest(host).start().preserve().kexec().retrieve()
    prior = next(iter(host.carrier.priors.domains.values()))
    assert (prior.record.format, dict(prior.record.config)["hardware_ad"]) == ("riscv64", 0)
    iova = AREAS[3][0] + 0x1000
    host.stop_device(0)
    at = walk(prior.fmt, host.platform.ram, prior.record.root_pa, iova).steps[-1][1]
    item = host.platform.ram.load64(at)
    host.platform.ram.store64(at, change(item))
    guest.dev_id = guest.device.bind(guest.iommufd)
    guest.replay()
    with pytest.raises(NotEqual) as caught:
        guest.iommufd.adopt(guest.ioas.id, HWPT_TOKEN)
    first = caught.value.mismatches[0]
    assert first.reason in reasons
    assert first.iova == iova
    host.platform.ram.store64(at, item)
    guest.iommufd.adopt(guest.ioas.id, HWPT_TOKEN)
    host.run()
    clean(host)


def test_held_where_no_record_can_be_believed(hosts):
    host = hosts(iommu="riscv", params={"iommu": "second-stage"})
    guest = Guest(host).start().preserve()
    guest.transport.reboot_kexec()
    ddtp, before = host.platform.iommu.read64(r.DDTP), contexts(host)
    fdt = host.platform.boot.fdt_addr
    # The records are those of nobody: what hardware uses is kept as it is.
    host.platform.ram.write(fdt + 0x40, bytes(0x200))
    host.kexec("soft-7.4")
    host.run()
    assert "everything is kept as it is" in host.log(), host.log()
    assert (host.platform.iommu.read64(r.DDTP), contexts(host)) == (ddtp, before)
    stats = host.stats()
    assert (stats.faults, stats.lost, stats.misdirected, stats.untranslated) == (0, 0, 0, 0)
    assert host.kernel.iommu.mode == "second-stage"
    pages = host.kernel.iommu.structure_pages()
    assert riscv.ppn_pa(ddtp) in pages.tolist()
    assert np.all(host.kernel.frames.tags[(pages >> np.uint64(12)).astype(np.int64)] != 0)
