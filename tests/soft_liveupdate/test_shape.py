# SPDX-License-Identifier: Apache-2.0
"""A table is proved in the shape that hardware reads it in: what the structures state must be recorded."""

import errno

import pytest
from liveupdate_support import HWPT_TOKEN, Guest, fails

from iokeep.iommufd.client import NotEqual
from iokeep.pt.roots import amd, vtd
from iokeep.pt.roots.find import find_root_of


def entry_of(host):
    """The entry that names the table of device 0, and what it names."""
    unit = host.platform.iommu
    found = find_root_of(unit.hw(), host.platform.ram, host.platform.bdf(0), iommu=unit.KIND)
    return found.path[-1], found


def more_levels(host):
    """Make the entry of device 0 say one level more for the same root; the number of levels."""
    step, found = entry_of(host)
    levels = found.table.config["levels"] + 1
    encode = amd.dte_host if host.platform.iommu.KIND == "amd" else vtd.context_entry
    for i, word in enumerate(encode(found.table.root_pa, levels, found.domain_id)):
        host.platform.ram.store64(step.pa + 8 * i, word)
    return levels


@pytest.mark.parametrize("kind", ["vtd", "amd"])
def test_adopt_and_compare_refuse_another_number_of_levels(hosts, kind):
    host = hosts(devices=False, iommu=kind)
    guest = Guest(host).start().preserve()
    after = guest.kexec().retrieve()
    levels = more_levels(host)
    after.device.bind(after.iommufd)
    after.replay()
    with fails(errno.EINVAL, NotEqual) as caught:
        after.iommufd.adopt(after.ioas.id, HWPT_TOKEN)
    (found,) = caught.value.mismatches
    assert found.reason == "root"
    assert found.expected_pa == found.found_pa
    assert f"levels {levels}, domain id" in host.log()
    assert f"levels {levels - 1}, domain id" in host.log()
    hwpt = after.iommufd.hwpt_alloc(1, after.ioas.id)
    with fails(errno.EINVAL, NotEqual) as caught:
        after.iommufd.compare(hwpt, HWPT_TOKEN)
    assert caught.value.mismatches[0].reason == "root"
