# SPDX-License-Identifier: Apache-2.0
"""The format gate: what real kernels wrote passes; any other bit has a name or is unknown, never ignored."""

import json
from pathlib import Path

import pytest

from iokeep.cli.main import main
from iokeep.mem.capture import Capture
from iokeep.pt.extents import Extents
from iokeep.pt.gate import check, describe
from iokeep.pt.registry import open_format
from iokeep.pt.walk import walk

DATA = Path(__file__).parents[1] / "data" / "captures"
FORMATS = ["vtdss", "x86_64", "amdv1", "riscv64", "arm_lpae_s1", "arm_lpae_s2", "arm_mali_lpae"]
PROFILE = "linux-7.3"


@pytest.mark.parametrize("path", sorted(p for p in DATA.iterdir() if p.is_dir()), ids=lambda p: p.name)
def test_real_tables_pass(path):
    capture = Capture.load(path)
    fmt = open_format(capture.format, capture.config)
    found = describe(fmt, capture.memory, capture.root_pa)
    assert found.unknown == []
    assert check(fmt, found, PROFILE) == []


@pytest.mark.parametrize("name", FORMATS)
def test_every_bit_is_named_or_unknown(name, new_table):
    """Each bit that no mask of translation or permission has, set in one leaf and in one table item."""
    fmt = open_format(name, {})
    built = new_table(fmt)
    built.table.map(Extents.of([(0x5000, 0x5FFF, 0x9000, 3)]))
    before = describe(*built.args)
    assert check(fmt, before, PROFILE) == []
    steps = walk(*built.args, 0x5000).steps
    for leaf, (level, at, item) in ((True, steps[-1]), (False, steps[0])):
        spec = fmt.levels[level]
        used = spec.valid_mask | spec.leaf_mask
        used |= spec.leaf_pa_mask | spec.r_mask | spec.w_mask if leaf else spec.table_pa_mask
        used |= 0 if leaf else spec.tr_mask | spec.tw_mask | sum(m for m, _, _ in spec.next_levels[:1])
        for contig in spec.contig if leaf else ():
            used |= contig.mask
        for bit in range(64):
            if used >> bit & 1 or (name.startswith("arm") and bit < 2):
                continue
            built.ram.store64(at, item ^ 1 << bit)
            found = describe(*built.args)
            assert (found.leaf, found.table, found.unknown) != (before.leaf, before.table, before.unknown), (
                bit
            )
            if leaf and spec.leaf_reserved >> bit & 1:
                assert check(fmt, found, PROFILE), bit
        built.ram.store64(at, item)
    assert describe(*built.args).unknown == []


def test_items_that_are_not_present_count(new_table):
    fmt = open_format("vtdss", {})
    built = new_table(fmt)
    built.table.map(Extents.of([(0x5000, 0x5FFF, 0x9000, 3)]))
    built.ram.store64(walk(*built.args, 0x5000).steps[-1][1] + 8, 0x7000)
    found = describe(*built.args)
    assert found.stale == [(0, 0x7000)]
    assert check(fmt, found, PROFILE) == ["bits 0x7000 in items of level 0 that are not present"]


def test_show_gate(capsys, tmp_path):
    small = DATA / "vtd-smss-small"
    assert main(["table", "show", str(small), "--gate", PROFILE]) == 0
    assert f"{PROFILE}: passes" in capsys.readouterr().out
    assert main(["table", "show", str(small), "--gate", "nonsense"]) == 2
    capture = Capture.load(small)
    rows = capture.memory.rows(4096)
    fmt = open_format(capture.format, capture.config)
    iova = int(capture.truth()[0][0])
    at = walk(fmt, capture.memory, capture.root_pa, iova).steps[-1][1]
    data = rows.data.copy()
    data[rows.pas.tolist().index(at & ~4095)].view("<u8")[(at & 4095) // 8] |= 1 << 55
    Capture(dict(capture.meta), rows.pas, data).save(tmp_path / "odd")
    capsys.readouterr()
    assert main(["table", "show", str(tmp_path / "odd"), "--gate", PROFILE, "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["gate"]["violations"] == ["unknown bits 0x80000000000000 in a leaf of level 0"]
    assert document["descriptor"]["unknown"] == [{"level": 0, "kind": "leaf", "bits": "0x80000000000000"}]
