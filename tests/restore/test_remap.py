# SPDX-License-Identifier: Apache-2.0
"""What a kernel without preserved domains can do, on the software host: RAM survives, tables are made anew
and proved.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from restore_support import AREAS, MANIFEST, Vmm

from iokeep.errors import KernelRefused, UsageError
from iokeep.iommufd.client import VfioDevice
from iokeep.pt.extents import Extents
from iokeep.pt.registry import open_format
from iokeep.pt.roots.find import find_root_of
from iokeep.restore.manifest import HwptEntry
from iokeep.restore.proof import Table, expected_extents, prove, seal_of
from iokeep.restore.remap import carries_domains, remap, save_files


def table_of(vmm, device):
    platform = vmm.host.platform
    index = [d.token for d in MANIFEST.devices].index(device.token)
    found = find_root_of(platform.iommu.hw(), platform.ram, platform.bdf(index), iommu=platform.iommu.KIND)
    return Table(open_format(found.table.format, found.table.config), platform.ram, found.table.root_pa)


@pytest.fixture
def vmm():
    made = Vmm()
    yield made
    made.host.stop()


@pytest.fixture
def carried(vmm):
    """Quiet devices, files and manifest preserved, over the kexec."""
    seal = seal_of(table_of(vmm, MANIFEST.devices[0]).extents())
    for device in vmm.devices.values():
        device.close()
    vmm.iommufd.close()
    save_files(
        vmm.transport, vmm.luo.create("vm-1"), replace(MANIFEST, hwpts=(HwptEntry(0x20, 0, seal),)), vmm.files
    )
    vmm.kexec()
    return vmm


def attempt(vmm, **kw):
    devices = {d.token: VfioDevice(vmm.transport, d.path) for d in MANIFEST.devices}
    given = {"devices": devices, "find": lambda device: table_of(vmm, device), **kw}
    return remap(vmm.transport, vmm.session, **given), devices


def test_the_translations_are_those_before(carried):
    result, devices = attempt(carried)
    assert (result.outcome, result.reason) == ("restored", "")
    assert result.proofs[0x20].pages == sum(a.length for a in AREAS) // 4096
    assert all(device.fd >= 0 for device in devices.values())
    result.live.close()


@pytest.mark.parametrize(
    "areas",
    [
        (*AREAS[:2], replace(AREAS[2], offset=0)),
        (replace(AREAS[0], prot=1), *AREAS[1:]),
        AREAS[:2],
        (*AREAS, replace(AREAS[1], iova=0x5000_0000, last=0x5000_FFFF)),
    ],
    ids=["offset", "prot", "missing", "extra"],
)
def test_anything_else_is_refused_and_may_be_tried_again(carried, areas):
    result, devices = attempt(carried, areas=areas)
    assert result.outcome == "refused"
    assert "digest" in result.reason
    assert all(device.fd == -1 for device in devices.values())
    assert attempt(carried)[0].outcome == "restored"


def test_frames_name_what_differs(carried):
    """Here the frames are those that the first kernel's table shows; on a real host pagemap says them."""
    good, _ = attempt(carried)
    table = table_of(carried, MANIFEST.devices[0])
    found = table.extents()
    shifted = Extents(
        found.iova, found.last, found.pa, np.where(found.prot == 1, 3, found.prot).astype(np.uint8)
    )
    proof = prove(table, b"", shifted)
    assert not proof.equal
    assert proof.mismatches[0].reason == "prot"
    assert prove(table, b"", found).equal
    assert "nothing to prove it by" in prove(table, b"").reason
    good.live.close()


def test_expected_extents_follow_the_frames():
    frames = {
        1: np.arange(2048, dtype=np.uint64)[::-1] * np.uint64(4096),
        2: np.arange(16, dtype=np.uint64) * np.uint64(4096),
    }
    found = expected_extents(AREAS, frames)
    assert found.mapped_bytes == sum(a.length for a in AREAS)
    assert int(found.pa[found.iova == 0][0]) == 2047 * 4096
    assert len(expected_extents((), frames)) == 0


def test_a_device_that_is_not_given_is_said_before_anything_is_made(carried):
    with pytest.raises(UsageError, match="no file was given for device"):
        attempt(carried, devices={})


def test_a_kernel_is_asked_what_it_can(vmm):
    assert carries_domains(vmm.transport)


def test_a_file_that_is_not_as_the_manifest_says_is_not_saved(vmm):
    with pytest.raises(UsageError, match="no descriptor was given"):
        save_files(vmm.transport, vmm.luo.create("vm-1"), MANIFEST, {1: vmm.files[1]})


def test_a_kernel_that_says_no_ends_the_session(vmm):
    vmm.luo.create("other").preserve(vmm.files[2], 1)
    session = vmm.luo.create("vm-1")
    with pytest.raises(KernelRefused, match="nothing is preserved"):
        save_files(vmm.transport, session, MANIFEST, vmm.files)
    assert session.fd < 0
    vmm.luo.create("vm-1").close()  # the kernel has forgotten it: the name is free
