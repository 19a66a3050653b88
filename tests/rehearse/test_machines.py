# SPDX-License-Identifier: Apache-2.0
"""Whole live updates behind every kind of IOMMU, and captures of its tables rehearsed leaf for leaf."""

import json
from pathlib import Path

import numpy as np
import pytest

from iokeep.cli.main import main
from iokeep.errors import CapabilityError
from iokeep.mem.capture import Capture
from iokeep.pt.roots.find import find_root_of
from iokeep.rehearse.inject import parse_fault
from iokeep.rehearse.machine import MACHINES
from iokeep.rehearse.run import Options, load_like, rehearse
from iokeep.rehearse.scenario import GIB, MIB2, like, pc

CAPTURES = Path(__file__).parents[1] / "data"
#: VT-d has its own tests
FORMATS = ["amdv1", "arm_lpae_s1", "arm_lpae_s2", "riscv64"]


def run(**kw):
    faults = tuple(parse_fault(f) for f in kw.pop("inject", ()))
    given = {"memory": 16 << 20, "devices": 1, "transactions": 50_000, "seed": 3}
    doc = rehearse(Options(**{**given, **kw}, inject=faults))
    assert doc["proof"]["problems"] == []
    return doc


def assert_unharmed(doc):
    dma, frames = doc["dma"], doc["frames"]
    assert (dma["lost"], dma["misdirected"], dma["faults"], dma["leaks"]) == (0, 0, 0, 0), dma["incidents"]
    kept = (frames["leaked"], frames["wrongly_freed"], frames["bad_unpins"], frames["bad_puts"])
    assert kept == (0, 0, 0, 0)
    assert doc["proof"]["guest_pages_damaged"] == 0


@pytest.mark.parametrize("format_name", FORMATS)
def test_adopted_and_what_lies_between_the_kernels_is_what_the_tools_read(format_name, tmp_path, capsys):
    there = tmp_path / "between"
    words = ["--format", format_name, "--memory", "16M", "--devices", "2", "--capture", str(there)]
    assert main(["rehearse", *words, "--json"]) == 0
    doc = json.loads(capsys.readouterr().out)
    assert_unharmed(doc)
    guest, machine = doc["guest"], MACHINES[format_name]
    assert (guest["format"], guest["iommu"], guest["mode"]) == (format_name, machine.iommu, machine.mode)
    if format_name == "amdv1":
        assert guest["levels"] == 4  # it began with three, and grew
    assert doc["restore"]["pages"] == guest["mapped"] // 4096
    assert doc["dma"]["denied"] > 0
    assert main(["table", "verify", str(there / "table")]) == 0
    capture = Capture.load(there / "table")
    assert capture.format == format_name
    found = find_root_of(capture.meta["hw"], capture.memory)
    assert found is not None
    assert found.iommu == machine.iommu
    assert found.table is not None
    assert found.table.root_pa == capture.root_pa


@pytest.mark.parametrize(
    ("format_name", "page_size"),
    [("amdv1", "2M"), ("arm_lpae_s1", "4K"), ("arm_lpae_s2", "mixed"), ("riscv64", "2M")],
)
def test_rebuilt(format_name, page_size):
    doc = run(policy="rebuild", format=format_name, page_size=page_size)
    assert doc["outcome"] == "restored"
    assert_unharmed(doc)


@pytest.mark.parametrize(
    ("format_name", "fault", "reasons"),
    [
        ("amdv1", "pte-swap", {"pa"}),
        ("arm_lpae_s1", "unknown-bit", {"reserved"}),
        ("arm_lpae_s2", "stale-root", {"root"}),
        ("riscv64", "pte-bit", {"pa"}),
    ],
)
def test_damage_is_refused(format_name, fault, reasons):
    doc = run(format=format_name, inject=(fault,))
    assert doc["outcome"] == "refused"
    assert_unharmed(doc)
    assert {m["reason"] for m in doc["restore"]["mismatches"]} == reasons


@pytest.mark.parametrize(
    ("format_name", "policy", "inject"),
    [
        ("amdv1", "deferred", ("wrong-prot",)),
        ("arm_lpae_s1", "sealed", ("pte-swap",)),
        ("arm_lpae_s2", "deferred", ("pte-bit", "kill-at=after")),
        ("riscv64", "sealed", ("unknown-bit",)),
    ],
)
def test_damage_is_contained(format_name, policy, inject):
    doc = run(policy=policy, format=format_name, inject=inject)
    assert doc["outcome"] == "contained"
    assert_unharmed(doc)
    assert doc["restore"]["mismatches"]


@pytest.mark.parametrize(("format_name", "fault"), [("amdv1", "pte-bit"), ("arm_lpae_s1", "wrong-file")])
def test_trust_does_the_damage(format_name, fault):
    doc = run(policy="trust", unsafe=True, format=format_name, inject=(fault,))
    assert doc["outcome"] == "corrupted"
    assert doc["dma"]["misdirected"] + doc["frames"]["wrongly_freed"] > 0


@pytest.mark.parametrize("name", ["captures/amdv1-contigmix", "captures/a64-dma-00_06.0"])
def test_a_captured_table_comes_out_leaf_for_leaf(name):
    doc = run(like=str(CAPTURES / name))
    assert doc["outcome"] == "restored"
    assert_unharmed(doc)
    assert doc["like"]["equal"], doc["like"]["why"]
    assert doc["like"]["left_out"] == 0


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("captures/a64-mod-v7s", "arm_v7s"),
        ("captures/rv-sv39-dev", "upper half"),
        ("captures-xz/a64-mod-s1-16k-ia48", "IOMMU pages of 16 KiB"),
    ],
)
def test_what_cannot_be_rehearsed_is_said_to_be_so(name, why):
    with pytest.raises(CapabilityError, match=why) as e:
        load_like(str(CAPTURES / name))
    assert e.value.exit_code == 4


def columns(*rows):
    iova, pa, lg2, prot = (np.array(c) for c in zip(*rows, strict=True))
    return iova.astype(np.uint64), pa.astype(np.uint64), lg2.astype(np.uint8), prot.astype(np.uint8)


def test_the_mode_and_the_kernels_parameters_come_from_the_capture():
    leaf = columns((GIB, 5 * GIB, 12, 3))
    assert like("x", "vtdss", {"levels": 3}, "scalable", leaf).mode == "scalable-ss"
    assert like("x", "riscv64", {"levels": 3, "stage": 2}, "", leaf).mode == "second-stage"
    arm = {"input_bits": 40, "output_bits": 40, "start_level": 1}
    assert like("x", "arm_lpae_s2", arm, "", leaf).params == arm
    with pytest.raises(CapabilityError, match="c_bit = 47"):
        like("x", "amdv1", {"levels": 4, "c_bit": 47}, "", leaf)
    with pytest.raises(CapabilityError, match="ttbr = 1"):
        like("x", "arm_lpae_s1", {"ttbr": 1}, "", leaf)


def test_doorbells_are_the_kernels_and_left_out():
    rows = columns((0x800_0000, 0x808_0000, 12, 2), (GIB, 5 * GIB, 12, 3))
    s = like("x", "arm_lpae_s1", {}, "", rows)
    assert [a.iova for a in s.areas] == [GIB]
    assert s.source["left_out"] == 1
    assert s.expected is not None
    assert len(s.expected.iova) == 1


def test_scattered_gigabyte_leaves_take_no_more_than_their_own_memory():
    rows = [(n * GIB, (100 * n + 7) * GIB, 30, 3) for n in range(3)]
    rows += [(8 * GIB + n * MIB2, 1000 * GIB + 50 * n * MIB2, 12, 3) for n in range(64)]
    s = like("x", "amdv1", {"levels": 3}, "", columns(*rows))
    assert s.ram_bytes < 7 * GIB


def test_no_leaf_reaches_into_a_quiet_range_where_leaves_have_all_sizes():
    s = pc(64 << 20, "2M", "amdv1")
    for quiet in s.quiet:
        assert any((a.iova, a.last) == (quiet.start, quiet.last) for a in s.areas)
