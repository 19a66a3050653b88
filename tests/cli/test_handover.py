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
    assert main(["handover", "check", str(DATA / name), "--to", "soft-7.4"]) == code
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
    document = json.loads(out)
    assert document["schema"] == "iokeep.handover-show-v1"
    assert document["error"]["kind"] == "memory-absent"
    assert f"{pa:#x}" in document["error"]["message"]


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


@pytest.fixture
def soft_capture(tmp_path):
    """A handover as the software kernel writes it, with iokeep's own records, as a capture directory."""
    from iokeep.handover.iommu import (
        DeviceRecord,
        DomainRecord,
        HwptRecord,
        IoasRecord,
        IommufdRecord,
        IommuHwRecord,
        IommuRecord,
        VfioRecord,
    )
    from iokeep.handover.radix import PreservedTree
    from iokeep.handover.writer import FileOut, FlbOut, MemfdOut, SessionOut, write_handover, write_memfd
    from iokeep.mem.ram import Ram

    ram = Ram.of(1 << 20)
    preserved, end = [], [0x1000]

    def alloc(npages, keep):
        pa = end[0]
        end[0] += npages << 12
        if keep:
            preserved.append((pa >> 12, npages))
        return pa

    def array(*values):
        return np.array(values, np.uint64)

    frames = array(0x10000, 0x10001)
    memfd = write_memfd(ram, alloc, MemfdOut(0, 0x2000, 7, frames, array(0, 1)))
    flags = np.zeros(1, np.uint8)
    ioas = IoasRecord(3, array(0x10000), array(0x11FFF), array(1), array(0), flags + np.uint8(3), flags)
    iommufd = IommufdRecord((HwptRecord(5, 0, 3),), (ioas,)).write(ram, alloc)
    vfio = VfioRecord(0, 0x20, 0, 7).write(ram, alloc)
    table, context = 0x7000000, 0x7001000
    domain = DomainRecord(
        0, "vtdss", {"levels": 4}, (), table, 2, 3, array(table), bytes(32), bytes(16), 0x2000, 1
    )
    hw = IommuHwRecord(0xFED90000, context, "legacy", 0x10, array(context))
    flb = IommuRecord((domain,), (DeviceRecord(0, 8, 0, 0x20, 0, "legacy"),), (hw,)).write(ram, alloc)
    runs = np.array(preserved, np.uint64).T
    fdt_pa = write_handover(
        ram,
        alloc,
        sessions=[
            SessionOut(
                "vm",
                [
                    FileOut("memfd-v2", memfd, 1),
                    FileOut(IommufdRecord.COMPATIBLE, iommufd, 7),
                    FileOut(VfioRecord.COMPATIBLE, vfio, 8),
                ],
            )
        ],
        flbs=[FlbOut(IommuRecord.COMPATIBLE, flb, 2)],
        preserved=PreservedTree.of_ranges(runs[0], runs[1]).union(
            PreservedTree.of(np.concatenate((frames, array(table >> 12, context >> 12))))
        ),
        liveupdate_num=4,
        previous_release="7.3.4-iokeep",
        kexec_count=4,
    )
    source = tmp_path / "soft"
    source.mkdir()
    (source / "meta.json").write_text(
        json.dumps({"schema": "iokeep.capture-v1", "kho_fdt_pa": f"{fdt_pa:#x}"})
    )
    pas = np.arange(0x1000, end[0], 4096, dtype=np.uint64)
    np.savez(source / "tables.npz", pa=pas, data=ram.rows(4096).data[1 : 1 + len(pas)])
    return str(source)


def test_our_records_in_text_and_json(soft_capture, capsys):
    assert main(["handover", "show", soft_capture]) == 0
    out = capsys.readouterr().out
    for want in (
        "0x7  iokeep-iommufd-v1  1 HWPT, 1 IOAS, 1 area",
        "0x8  iokeep-vfio-pci-v1  0000:00:04.0, iommufd token 0x7",
        "domain 0: vtdss, root at 0x7000000, domain id 2, 1 table page, 8 KiB in 1 extent",
        "device 0000:00:04.0: domain 0, legacy, token 0x8",
        "IOMMU at 0xfed90000: legacy, root table 0x7001000, 1 structure page",
        "no problems",
    ):
        assert want in out
    assert main(["handover", "show", soft_capture, "-j"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [f["kind"] for f in document["sessions"][0]["files"]] == ["memfd", "iommufd", "vfio-pci"]
    assert [f["size"] for f in document["sessions"][0]["files"]] == [0x2000, None, None]
    assert document["iommu"]["domains"][0]["root_pa"] == "0x7000000"
    assert document["iommu"]["devices"][0]["bdf"] == "0000:00:04.0"
    assert document["liveupdate_num"] == 4


@pytest.mark.parametrize(
    ("kernel", "code"), [("soft-7.3", 0), ("soft-7.4", 0), ("soft-7.2", 1), ("linux-7.3", 1)]
)
def test_which_kernel_takes_our_records(soft_capture, kernel, code, capsys):
    assert main(["handover", "check", soft_capture, "--to", kernel, "-j"]) == code
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert len(problems) == (3 if code else 0)  # two files, one FLB
    assert all("iokeep-" in p and kernel in p for p in problems)
