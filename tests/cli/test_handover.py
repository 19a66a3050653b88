# SPDX-License-Identifier: Apache-2.0
"""``iokeep handover`` from the command line, on captures of a real Linux 7.3.4."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from iokeep.cli.main import main

DATA = Path(__file__).parent.parent / "data" / "kho"


def sources():
    more = os.environ.get("IOKEEP_CAPTURES")
    dirs = [DATA] + ([Path(more) / "kho"] if more else [])
    return [p for d in dirs for p in sorted(d.iterdir()) if p.is_dir()]


@pytest.mark.parametrize("source", sources(), ids=lambda p: f"{p.parent.parent.name}-{p.name}")
def test_show_json_is_what_the_guest_knew(source, capsys):
    code = main(["handover", "show", str(source), "--json"])
    out, err = capsys.readouterr()
    assert err == ""
    document = json.loads(out)
    truth = json.loads((source / "truth.json").read_text())
    meta = json.loads((source / "meta.json").read_text())
    assert document["schema"] == "iokeep.handover-show-v1"
    assert document["kho"] == {"compatible": "kho-v4", "fdt_pa": meta["kho_fdt_pa"]}
    assert document["liveupdate_num"] == 1
    assert document["preserved"]["pages"] == meta["preserved_pages"]
    assert (
        sum(n << int(order) for order, n in document["preserved"]["by_order"].items())
        == meta["preserved_pages"]
    )
    assert [[int(s["pa"], 16), s["size"]] for s in document["scratch"]] == truth["scratch"]
    keys = ("token", "kind", "size", "pos", "seals", "extents")
    got = [
        {"name": s["name"], "files": [{k: f[k] for k in keys} for f in s["files"]]}
        for s in document["sessions"]
    ]
    assert got == [
        {"name": s["name"], "files": [{k: f[k] for k in keys} for f in s["files"]]} for s in truth["sessions"]
    ]
    assert {f["compatible"] for s in document["sessions"] for f in s["files"]} <= {"memfd-v2"}
    if source.name == "s6-51dup-F":
        assert code == 1
        assert "count 0" in document["problems"][0]
    else:
        assert code == 0
        assert document["problems"] == []


def test_show_text(capsys):
    assert main(["handover", "show", str(DATA / "s2-sessions-F")]) == 0
    out = capsys.readouterr().out
    for want in (
        "KHO        kho-v4, FDT at 0x1003ec000 (345 bytes), radix tree at 0x1003eb000",
        "LUO        luo-v5, live update number 1",
        "from       Linux 7.3.4-lab2, kexec number 1",
        "26221 pages (102.4 MiB): 8557 of order 0, 1 of order 8, 34 of order 9",
        "25884 of files, 81 of records, 256 of others",
        "session empty-session: 0 files",
        "0xffffffffffffffff  memfd-v2  12 KiB (12288 bytes), pos 0, seals none",
        "seals F_SEAL_SEAL|F_SEAL_SHRINK|F_SEAL_GROW|F_SEAL_WRITE",
        "folios: 32 of order 9; 1 extent",
        "index 52       pfn 0x00100b90  8140 pages",
        "labmem",
        "note: ",
        "no problems",
    ):
        assert want in out


def test_show_text_cuts_long_lists_and_lists_all_on_request(capsys):
    source = str(DATA / "s8-orders-F")
    assert main(["handover", "show", source]) == 0
    assert "more, see --extents" in capsys.readouterr().out
    assert main(["handover", "show", source, "--extents"]) == 0
    out = capsys.readouterr().out
    assert "more, see" not in out
    assert "index 1574     pfn 0x00002c93  474 pages" in out


def test_show_text_lists_problems(capsys):
    assert main(["handover", "show", str(DATA / "s6-51dup-F")]) == 1
    out = capsys.readouterr().out
    assert "problem: sessions: block 1 at 0xc8a000 has count 0" in out
    assert out.endswith("1 problem\n")


@pytest.mark.parametrize(("name", "code"), [("s1-vm1-F", 0), ("s6-51dup-F", 1)])
def test_check(name, code, capsys):
    assert main(["handover", "check", str(DATA / name), "--to", "soft-7.3"]) == code
    assert ("takes it" in capsys.readouterr().out) == (code == 0)
    assert main(["handover", "check", str(DATA / name), "--json"]) == code
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "iokeep.handover-check-v1"
    assert document["to"] == "linux-7.3"
    assert len(document["problems"]) == code


def test_check_of_an_unknown_profile_is_usage(capsys):
    assert main(["handover", "check", str(DATA / "s1-vm1-F"), "--to", "minix"]) == 2
    assert "linux-7.3" in capsys.readouterr().err


@pytest.fixture
def copy(tmp_path):
    def make(name="s1-vm1-F", drop=(), **meta):
        target = tmp_path / name
        shutil.copytree(DATA / name, target)
        old = json.loads((target / "meta.json").read_text())
        old.update(meta)
        (target / "meta.json").write_text(json.dumps({k: v for k, v in old.items() if v is not None}))
        with np.load(target / "tables.npz") as tables:
            keep = ~np.isin(tables["pa"], np.array(drop, np.uint64))
            pa, data = tables["pa"][keep], tables["data"][keep]
        np.savez(target / "tables.npz", pa=pa, data=data)
        return str(target)

    return make


@pytest.mark.parametrize(
    "pa", [0x6B4000, 0x6B3000, 0xCC4000, 0xD23000, 0xCCB000, 0x6CF000, 0xD2B000, 0xE43000]
)
def test_absent_metadata_is_exit_3_with_its_pa(copy, capsys, pa):
    assert main(["handover", "show", copy(drop=[pa]), "--json"]) == 3
    out, err = capsys.readouterr()
    assert f"{pa:#x}" in err
    assert "session" not in out


def test_an_absent_scratch_array_is_no_error(copy, capsys):
    assert main(["handover", "show", copy(drop=[0xCE5000]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scratch"] is None


@pytest.mark.parametrize(
    ("meta", "why"),
    [
        ({"kho_fdt_pa": None}, "no kho_fdt_pa"),
        ({"kho_fdt_pa": 5}, 'no "0x..." value|not a'),
        ({"kho_fdt_pa": "0x6b3000"}, "magic"),
        ({"kho_fdt_pa": "0x6b4004"}, "not the pa of a page"),
        ({"kho_fdt_pa": "0x" + "f" * 17}, "not a"),
        ({"scratch_array": 5}, "scratch_array"),
        ({"scratch_array": {"pa": "0xce5000", "size": 47}}, "scratch array"),
        ({"scratch_array": {"pa": "0xce5000", "size": 1 << 40}}, "scratch array"),
        ({"schema": "other"}, "schema"),
    ],
)
def test_bad_meta_is_exit_3(copy, capsys, meta, why):
    import re

    assert main(["handover", "show", copy(**meta)]) == 3
    assert re.search(why, capsys.readouterr().err)


def test_no_such_source(tmp_path, capsys):
    assert main(["handover", "show", str(tmp_path / "nothing")]) == 3
    assert "no such directory" in capsys.readouterr().err


def test_a_capture_of_another_kernel_is_shown_but_not_decoded(copy, capsys):
    source = copy()
    with np.load(Path(source) / "tables.npz") as tables:
        pa, data = tables["pa"], tables["data"].copy()
    row = data[pa == 0x6B4000][0].tobytes().replace(b"kho-v4\0", b"kho-v\x1b\0")
    data[pa == 0x6B4000] = np.frombuffer(row, np.uint8)
    np.savez(Path(source) / "tables.npz", pa=pa, data=data)
    assert main(["handover", "show", source]) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out  # nothing from memory reaches the terminal raw
    assert "boots with nothing reserved" in out
