# SPDX-License-Identifier: Apache-2.0
"""Hardware's access and dirty state: where it changes what a leaf grants, and where it does not."""

import numpy as np
import pytest

from iokeep.errors import InputError
from iokeep.pt import verify as verify_module
from iokeep.pt.extents import Extents
from iokeep.pt.formats.plain_arm import DECODERS
from iokeep.pt.leaves import extents
from iokeep.pt.registry import open_format
from iokeep.pt.roots import smmu
from iokeep.pt.roots.base import PathStep
from iokeep.pt.verify import verify
from iokeep.pt.walk import walk

DBM, AP2, S2W = 1 << 51, 1 << 7, 1 << 7
S1 = {"granule": 4096, "input_bits": 39, "output_bits": 40}
RUN = Extents.of([(0x40_0000, 0x7F_FFFF, 0x4000_1000, 3)])


def words(built, level=0):
    """The items of the level-0 tables under RUN, as a view of memory."""
    at = walk(*built.args, 0x40_0000).steps[-1][1]
    assert at & 0xFFF == 0
    other = walk(*built.args, 0x60_0000).steps[-1][1]
    rows = built.ram.rows(4096).data.view(np.uint64)
    return rows[at >> 12], rows[other >> 12]


@pytest.fixture
def no_judge(monkeypatch):
    """Only the sweep may prove."""

    def fail(*args):
        raise AssertionError("a table was left to the judge")

    monkeypatch.setattr(verify_module, "_judge_rest", fail)


@pytest.mark.parametrize("name", ["arm_lpae_s1", "arm_lpae_s2"])
def test_dirty_and_clean_leaves_are_both_writable(name, new_table, no_judge):
    fmt = open_format(name, {**S1, "hw_dirty": 1})
    built = new_table(fmt)
    built.table.map(RUN)
    for number, table in enumerate(words(built)):
        if name == "arm_lpae_s1":
            assert bool((table & np.uint64(DBM)).all())  # arm_lpae_prot_to_pte(), IO_PGTABLE_QUIRK_ARM_HD
            table[number::3] |= np.uint64(AP2)  # arm_lpae_read_and_clear_dirty(): writable-clean
        else:
            table[number::3] |= np.uint64(DBM)
            table[number::3] &= np.uint64(2**64 - 1 - S2W)
    assert verify(*built.args, RUN, compiled=False).equal
    assert walk(*built.args, 0x40_0000).prot == 3
    for n in (0, 1):
        entry = DECODERS[name](int(words(built)[0][n]), 0, fmt.config)
        assert (entry.read, entry.write) == (True, True)
    found, bad = extents(*built.args)
    assert (len(found), len(bad), int(found.prot[0])) == (1, 0, 3)


@pytest.mark.parametrize("name", ["arm_lpae_s1", "arm_lpae_s2"])
def test_without_hardware_the_bit_grants_nothing(name, new_table):
    fmt = open_format(name, S1)
    built = new_table(fmt)
    built.table.map(RUN)
    clean = AP2 if name == "arm_lpae_s1" else 0
    for table in words(built):
        table |= np.uint64(DBM)
        table &= np.uint64(2**64 - 1 - S2W)
        table |= np.uint64(clean)
    verdict = verify(*built.args, RUN)
    assert verdict.differ == {"prot": 1024}
    read_only = Extents.of([(0x40_0000, 0x7F_FFFF, 0x4000_1000, 1)])
    assert verify(*built.args, read_only).equal
    with_hardware = open_format(name, {**S1, "hw_dirty": 1})
    assert verify(with_hardware, built.ram, built.table.root_pa, RUN).equal
    assert not verify(with_hardware, built.ram, built.table.root_pa, read_only).equal


def test_read_only_stays_read_only(new_table):
    built = new_table(open_format("arm_lpae_s1", {**S1, "quirks": 0x80}))
    read_only = Extents.of([(0x40_0000, 0x7F_FFFF, 0x4000_1000, 1)])
    built.table.map(read_only)
    assert not bool((words(built)[0] & np.uint64(DBM)).any())
    assert verify(*built.args, read_only).equal
    assert verify(*built.args, RUN).differ == {"prot": 1024}


def test_dirty_state_does_not_tear_a_contiguous_run(new_table, no_judge):
    built = new_table(open_format("arm_lpae_s1", {**S1, "hw_dirty": 1}))
    run = Extents.of([(0x40_0000, 0x7F_FFFF, 0x4001_0000, 3)])
    built.table.map(run)
    for table in words(built):
        table[:32] |= np.uint64(1 << 52)
        table[::5] |= np.uint64(AP2)
    assert verify(*built.args, run, compiled=False).equal
    _, bad = extents(*built.args)
    assert len(bad) == 0
    words(built)[0][3] &= np.uint64(2**64 - 1 - (1 << 52))
    with pytest.raises(AssertionError, match="judge"):
        verify(*built.args, run, compiled=False)


def test_dirty_needs_access():
    with pytest.raises(InputError, match="hw_dirty without hw_access"):
        open_format("arm_lpae_s1", {**S1, "hw_dirty": 1, "hw_access": 0})


@pytest.mark.parametrize(
    ("bits", "keys"),
    [
        (0, {}),
        (smmu.CD_HA, {"hw_access": 1}),
        (smmu.CD_AFFD, {"hw_access": 1}),
        (smmu.CD_HD, {}),
        (smmu.CD_HA | smmu.CD_HD, {"hw_access": 1, "hw_dirty": 1}),
    ],
)
def test_a_context_descriptor_says_who_manages_dirty_state(bits, keys):
    table = smmu.TableRoot("arm_lpae_s1", smmu.stage1_config(4096, 39, 40), 0x8000_0000)
    cd = smmu.context_descriptor(table, asid=5)
    path = (PathStep("cd", 0x1000, (cd[0] | bits, *cd[1:])),)
    info = smmu._of_context(smmu.Registers(0, 0), path, None, 0)
    assert info.config == {**smmu.stage1_config(4096, 39, 40), **keys}
    open_format(info.format, info.config)


@pytest.mark.parametrize(("stage", "ad"), [(1, 0), (1, 1), (2, 0), (2, 1)])
def test_riscv_without_hardware_updates(stage, ad, new_table):
    """Svade: A = 0 faults, D = 0 with W = 1 faults on a write. (The kernel's tables have A, and D with W.)"""
    fmt = open_format("riscv64", {"levels": 3, "stage": stage, "hardware_ad": ad})
    built = new_table(fmt)
    built.table.map(Extents.of([(0x1000, 0x1FFF, 0x5000, 3), (0x2000, 0x2FFF, 0x8000, 3)]))
    for iova, bit, prot in ((0x1000, 1 << 7, 1), (0x2000, 1 << 6, 0)):
        _, at, item = walk(*built.args, iova).steps[-1]
        assert item & bit
        built.ram.store64(at, item & ~bit)
        assert walk(*built.args, iova).prot == (3 if ad else prot)
    wanted = (
        [(0x1000, 0x1FFF, 0x5000, 3), (0x2000, 0x2FFF, 0x8000, 3)] if ad else [(0x1000, 0x1FFF, 0x5000, 1)]
    )
    verdict = verify(*built.args, Extents.of(wanted), dead_leaves=False)
    assert verdict.equal, verdict.mismatches


@pytest.mark.parametrize(
    ("name", "config", "bits"), [("vtdss", {}, 3 << 8), ("x86_64", {}, 3 << 5), ("amdv1", {}, 3 << 5)]
)
def test_dirty_bits_that_take_nothing_away(name, config, bits, new_table):
    built = new_table(open_format(name, config))
    built.table.map(Extents.of([(0x1000, 0x1FFF, 0x5000, 3)]))
    _, at, item = walk(*built.args, 0x1000).steps[-1]
    for value in (0, bits, bits & -bits, bits & ~(bits & -bits)):
        built.ram.store64(at, item & ~bits | value)
        assert walk(*built.args, 0x1000).prot == 3
        assert verify(*built.args, Extents.of([(0x1000, 0x1FFF, 0x5000, 3)])).equal
