# SPDX-License-Identifier: Apache-2.0
"""Roots of every shape go over the kexec, and a table is proved in the shape that hardware reads it in."""

import errno

import pytest
from liveupdate_support import HWPT_TOKEN, Guest, check_audit, clean, fails, nothing_left

from iokeep.iommufd.client import NotEqual
from iokeep.pt.roots import amd, vtd
from iokeep.pt.roots.find import find_root_of

#: kind, parameters of the kernel, bytes of the root
ROOTS = [
    ("smmuv3", {"iommu": "stage-2", "input_bits": 40, "output_bits": 40, "start_level": 1}, 0x2000),
    ("smmuv3", {"iommu": "stage-2", "input_bits": 43, "output_bits": 44, "start_level": 1}, 0x1_0000),
    ("smmuv3", {"iommu": "stage-1", "input_bits": 40}, 16),
    ("riscv", {"iommu": "second-stage", "levels": 3}, 0x4000),
    ("riscv", {"iommu": "second-stage", "levels": 5}, 0x4000),
    ("amd", {"levels": 1}, 0x1000),
]


@pytest.mark.parametrize("policy", ["adopt", "rebuild"])
@pytest.mark.parametrize(("kind", "params", "root_bytes"), ROOTS)
def test_a_root_of_any_size_is_carried_and_proved(hosts, kind, params, root_bytes, policy):
    host = hosts(iommu=kind, params=params)
    guest = Guest(host).start()
    (domain,) = host.kernel.iommu.domains.values()
    assert domain.fmt.root_bytes == root_bytes
    after = guest.preserve().kexec(params=params).retrieve()
    result = after.adopt() if policy == "adopt" else after.rebuild()
    assert result.layout_differences == 0
    after.session.finish()
    host.run()
    clean(host)
    host.stop_device(0)
    after.ioas.unmap_all()
    after.exit()
    nothing_left(host)


@pytest.mark.parametrize(("kind", "params", "root_bytes"), [ROOTS[0], ROOTS[3]])
def test_a_root_that_is_preserved_only_in_part_is_refused(hosts, monkeypatch, kind, params, root_bytes):
    host = hosts(iommu=kind, params=params)
    guest = Guest(host).start()
    (domain,) = host.kernel.iommu.domains.values()
    assert domain.fmt.root_bytes == root_bytes
    last = domain.root_pa + root_bytes - 0x1000
    whole = type(domain).table_pages
    monkeypatch.setattr(
        type(domain), "table_pages", property(lambda self: (p := whole.fget(self))[p != last])
    )
    guest.preserve()
    monkeypatch.undo()
    after = guest.kexec(params=params).retrieve()
    after.device.bind(after.iommufd)
    after.replay()
    with fails(errno.EUCLEAN):
        after.iommufd.adopt(after.ioas.id, HWPT_TOKEN)


def test_a_stale_root_of_several_pages_is_refused_as_such(hosts):
    kind, params, _ = ROOTS[1]
    host = hosts(iommu=kind, params={**params, "stale_root": 1})
    after = Guest(host).start().preserve().kexec(params=params).retrieve()
    after.device.bind(after.iommufd)
    after.replay()
    with fails(errno.EINVAL, NotEqual) as caught:
        after.iommufd.adopt(after.ioas.id, HWPT_TOKEN)
    assert caught.value.mismatches[0].reason == "root"
    host.run()
    clean(host)


def test_an_iommu_page_that_is_larger_than_the_kernels_is_refused(hosts):
    host = hosts(iommu="smmuv3", params={"granule": "16K"}, devices=False)
    with fails(errno.EINVAL):
        Guest(host).start()
    check_audit(host)


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
