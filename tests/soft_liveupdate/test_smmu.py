# SPDX-License-Identifier: Apache-2.0
"""Whole live updates on a software host whose IOMMU is an SMMUv3."""

import pytest
from liveupdate_support import Guest, check_audit, clean, nothing_left

from iokeep.pt.roots import smmu as codec
from iokeep.soft.hardware.units import smmu as reg

STAGES = (
    {},
    {"iommu": "stage-2"},
    {"iommu": "stage-2", "input_bits": 40, "output_bits": 40},
    {"iommu": "stage-2", "input_bits": 44, "output_bits": 44},
)


@pytest.mark.parametrize("params", STAGES)
@pytest.mark.parametrize("policy", ["adopt", "rebuild"])
def test_live_update(hosts, params, policy):
    host = hosts(params=params, iommu="smmuv3")
    regs = host.platform.iommu
    before = Guest(host).start().preserve()
    host.run()
    root = regs.read64(reg.STRTAB_BASE)
    after = before.kexec("soft-7.4", params)
    assert regs.read64(reg.STRTAB_BASE) == root
    after.retrieve()
    result = getattr(after, policy)()
    assert result.pages == sum(length for _, length, _, _ in after.areas) >> 12
    assert result.layout_differences == 0
    host.run()
    clean(host)
    assert not regs.read32(reg.EVENTQ_PROD)
    after.session.finish()
    host.run()
    clean(host)
    after.exit()
    nothing_left(host)


def test_from_one_stage_to_the_other(hosts):
    """A kernel that makes domains of the other stage replaces the prior domain by one of its own."""
    host = hosts(params={"iommu": "stage-1"}, iommu="smmuv3")
    before = Guest(host).start().preserve()
    after = before.kexec("soft-7.4", {"iommu": "stage-2"}).retrieve()
    assert host.kernel.iommu.root_of(host.kernel.iommu.devices[0]).format == "arm_lpae_s1"
    after.rebuild()
    assert host.kernel.iommu.root_of(host.kernel.iommu.devices[0]).format == "arm_lpae_s2"
    host.run()
    clean(host)
    after.session.finish()
    after.exit()
    nothing_left(host)


@pytest.mark.parametrize("params", STAGES[:2])
def test_records_that_are_not_known(hosts, params):
    """Held: the device goes on by structures that were found from the registers."""
    host = hosts(params=params, iommu="smmuv3")
    before = Guest(host).start().preserve()
    before.kexec("soft-7.2", params)
    host.run()
    assert host.stats(0).transactions
    assert (host.stats(0).faults, host.stats(0).misdirected) == (0, 0)
    check_audit(host)


def test_what_a_device_does_not_reach_is_in_the_event_queue(hosts):
    host = hosts(iommu="smmuv3", n_devices=2)
    guest = Guest(host, device_index=1).start()
    host.run()
    guest.device.detach()
    host.run()
    regs, ram = host.platform.iommu, host.platform.ram
    assert regs.read32(reg.EVENTQ_PROD) == 0  # an aborting entry records nothing
    guest.device.attach(guest.hwpt)
    guest.ioas.unmap(guest.areas[1][0], guest.areas[1][1])
    host.run()
    assert regs.read32(reg.EVENTQ_PROD)
    at = regs.read64(reg.EVENTQ_BASE) & reg.QUEUE_ADDR
    event = codec.decode_event([ram.load64(at + 8 * i) for i in range(4)])
    assert (event.code, event.sid) == (codec.FaultReason.F_TRANSLATION, host.platform.bdf(1))
    iova, length, _, _ = guest.areas[1]
    assert iova <= event.iova < iova + length
