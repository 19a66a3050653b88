# SPDX-License-Identifier: Apache-2.0
"""From the registers of every capture to its table; contradictions; nonsense."""

import contextlib
import copy
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iokeep.errors import InputError, MemoryAbsent
from iokeep.mem.capture import Capture
from iokeep.pt.roots import amd, riscv, s390, smmu
from iokeep.pt.roots.base import RootFault, TableRoot
from iokeep.pt.roots.find import find_root_of

PLACES = [
    Path(os.environ["IOKEEP_CAPTURES"]) if "IOKEEP_CAPTURES" in os.environ else None,
    Path(__file__).parents[1] / "data" / "captures",
]
CAPTURES = {
    path.parent.name: path.parent
    for place in PLACES
    if place is not None
    for path in sorted(place.glob("*/meta.json"))
}
#: the way that a capture of this kind shows; a capture may lack the memory of the upper entries
WAYS = {
    "vtd": [("root", "context"), ("root", "context", "pasid-dir", "pasid")],
    "amd": [("dte",)],
    "smmuv3": [("l1std", "ste", "cd"), ("l1std", "ste"), ("ste",), ("ste", "cd")],
    "riscv": [("ddte",) * n + ("dc",) for n in range(3)],
    "s390": [()],
}


@pytest.mark.skipif(not CAPTURES, reason="no captures: set IOKEEP_CAPTURES")
@pytest.mark.parametrize("name", sorted(CAPTURES))
def test_every_capture(name):
    hw = json.loads((CAPTURES[name] / "meta.json").read_text()).get("hw") or {}
    capture = Capture.load(CAPTURES[name])
    found = find_root_of(hw, capture.memory)
    if not hw:
        assert found is None
        return
    assert found.table.format == capture.format
    assert dict(capture.config).items() <= dict(found.table.config).items()
    assert found.table.root_pa == capture.root_pa
    assert tuple(step.name for step in found.path) in WAYS[found.iommu]
    if "domain_id" in hw:
        assert found.domain_id == hw["domain_id"]
    # Our encoders say what the kernel wrote, bit for bit.
    last = found.path[-1].words if found.path else None
    if found.iommu == "amd":
        assert amd.dte_host(found.table.root_pa, found.table.config["levels"], found.domain_id) == last
    elif found.iommu == "riscv":
        stage = riscv.Stage(found.table.root_pa, found.table.config["levels"], found.domain_id)
        assert riscv.device_context(stage, extended=len(last) == 8) == last
    elif found.iommu == "s390":
        assert s390.iota_value(found.table.root_pa, 3) == int(hw["iota"], 16)
    elif found.iommu == "smmuv3" and found.translation == "second-stage":
        assert smmu.ste_stage2(found.table, found.domain_id) == last
    elif found.iommu == "smmuv3":
        assert smmu.ste_stage1(found.path[-1].pa) == found.path[-2].words
        assert smmu.context_descriptor(found.table, asid=found.domain_id) == last


class Nothing:
    """Memory without a byte: the recorded entries stand in where their place is known."""

    def read(self, pa, length):
        raise MemoryAbsent(pa, length)

    def rows(self, row_bytes):
        raise AssertionError("no table is walked here")


AMD = {
    "root_register": "0x422001",
    "bdf": "0000:00:04.0",
    "domain_id": 8,
    "dte": ["0x600000000a5e3803", "0x8", "0x0", "0x0"],
}
SMMU = {
    "smmu_regs": {
        "STRTAB_BASE": "0x4000000044be8000", "STRTAB_BASE_CFG": "0x10210", "CR0": "0xd",
        "IDR": {"IDR1": "0x2730010", "IDR3": "0x1414", "IDR5": "0x74"},
    },
    "ste_pa": "0xfb880600",
    "ste": ["0x4492400b", "0xd6", "0x0", "0x0", "0x0", "0x0", "0x0", "0x0"],
    "cd_pa": "0x44924000",
    "cd": ["0x5e204c0003510", "0x48b85000", "0x0", "0xfffffffff404ff44", "0x0", "0x0", "0x0", "0x0"],
    "bdf": "0000:00:03.0",
    "sid": 24,
}  # fmt: skip
RISCV = {
    "ddtp": "0x20e75c04", "device_id": 24, "caps": "0x78e2cf4f10",
    "dc": {
        "tc": "0x1", "iohgatp": "0x0", "ta": "0x1000", "fsc": "0x8000000000087791",
        "msiptp": "0x0", "msi_addr_mask": "0x0", "msi_addr_pattern": "0x0", "rsvd": "0x0",
    },
}  # fmt: skip
S390 = {"iota": "0x2d4c804"}


@pytest.mark.parametrize(
    ("hw", "iommu", "root_pa"),
    [
        (AMD, "amd", 0xA5E3000),
        (SMMU, "smmuv3", 0x48B85000),
        (RISCV, "riscv", 0x87791000),
        (S390, "s390", 0x2D4C000),
    ],
)
def test_recorded_entries_stand_in(hw, iommu, root_pa):
    found = find_root_of(hw, Nothing())
    assert (found.iommu, found.table.root_pa) == (iommu, root_pa)


def test_recorded_entries_are_those_of_one_device():
    for hw in (AMD, SMMU, RISCV):
        with pytest.raises(RootFault):
            find_root_of(hw, Nothing(), 0x28)
        assert find_root_of(hw, Nothing(), 0x20 if hw is AMD else 24).table is not None
    assert find_root_of(AMD, Nothing(), "0000:00:04.0").table is not None


def test_what_the_entries_above_the_table_say():
    read_only = [hex(w) for w in amd.dte_host(0xA5E3000, 4, 8, prot=1)]
    assert find_root_of({**AMD, "dte": read_only}, Nothing()).prot == 1
    assert find_root_of(AMD, Nothing()).prot == 3
    config = {"granule": 4096, "input_bits": 48, "output_bits": 44, "start_level": 0, "root_entries": 512}
    lower = TableRoot("arm_lpae_s1", config, 0x48B85000)
    upper = TableRoot("arm_lpae_s1", {**config, "ttbr": 1}, 0x48B86000)
    cd = [hex(w) for w in smmu.context_descriptor(lower, upper, asid=5)]
    found = find_root_of({**SMMU, "cd": cd}, Nothing())
    assert (found.table, found.upper, found.prot) == (lower, upper, 3)


def test_no_registers():
    assert find_root_of({}, Nothing()) is None


def test_the_iommu_can_be_named(new_ram):
    ram = new_ram(0x43_0000)
    ram.put(0x422000 + 0x20 * 32, amd.dte_host(0xA5E3000, 4, 8))
    hw = {key: value for key, value in AMD.items() if key != "dte"}
    assert find_root_of(hw, ram, iommu="amd").table.root_pa == 0xA5E3000
    with pytest.raises(InputError, match="VT-d"):
        find_root_of(hw, ram)
    with pytest.raises(InputError, match="ddtp"):
        find_root_of(hw, ram, iommu="riscv")
    with pytest.raises(ValueError, match="one of smmuv3"):
        find_root_of(hw, ram, iommu="apple")


def test_contradiction_with_memory(new_ram):
    ram = new_ram(0x43_0000)
    ram.put(0x422000 + 0x20 * 32, amd.dte_host(0xA5E4000, 4, 8))
    with pytest.raises(InputError, match="not the recorded one"):
        find_root_of(AMD, ram)


def test_stream_entry_at_another_place(new_ram):
    ram = new_ram(0x2_0000)
    ram.put(0x1000 + 24 * 64, [int(w, 16) for w in SMMU["ste"]])
    regs = {"STRTAB_BASE": "0x1000", "STRTAB_BASE_CFG": "0x6"}
    with pytest.raises(InputError, match="recorded 0xfb880600"):
        find_root_of({**SMMU, "smmu_regs": regs}, ram)


@pytest.mark.parametrize(
    ("hw", "key", "value"),
    [
        (AMD, "root_register", "422001"),
        (AMD, "root_register", True),
        (AMD, "root_register", "0x1" + "0" * 16),
        (AMD, "bdf", "nonsense"),
        (AMD, "bdf", None),
        (AMD, "dte", "0x1"),
        (AMD, "dte", ["0x1"]),
        (AMD, "dte", [None] * 4),
        (SMMU, "smmu_regs", []),
        (SMMU, "smmu_regs", {}),
        (SMMU, "sid", 1 << 32),
        (SMMU, "ste_pa", -1),
        (RISCV, "caps", None),
        (RISCV, "dc", 1),
        (RISCV, "device_id", 1 << 24),
        (S390, "iota", "0x4"),
    ],
)
def test_malformed(hw, key, value):
    with pytest.raises(InputError):
        find_root_of({**hw, key: value}, Nothing())


JSON = (
    st.none()
    | st.booleans()
    | st.integers(-1, 1 << 65)
    | st.text(max_size=8)
    | st.lists(st.integers(), max_size=8)
)


@given(st.sampled_from([AMD, SMMU, RISCV, S390]), st.data())
def test_nonsense_is_an_input_error(good, data):
    hw = copy.deepcopy(good)
    part = data.draw(st.sampled_from([hw, *(v for v in hw.values() if isinstance(v, dict))]))
    hexes = st.integers(0, (1 << 64) - 1).map(hex)
    part[data.draw(st.sampled_from(sorted(part)))] = data.draw(JSON | hexes)
    with contextlib.suppress(InputError):
        find_root_of(hw, Nothing())


def test_iota(reason_of):
    for levels in (2, 3, 4, 5):
        assert s390.find_root(s390.iota_value(0x1000, levels)).levels == levels
    for iota in (0x4, 0x810, 0x1000):
        assert reason_of(s390.RootFault, lambda i=iota: s390.find_root(i)) == s390.FaultReason.BAD_IOTA
    with pytest.raises(ValueError, match="levels"):
        s390.iota_value(0x1000, 6)
