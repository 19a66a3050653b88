# SPDX-License-Identifier: Apache-2.0
"""Two stages on the command line: named stages, and the ways of four IOMMUs from their registers to both."""

import json

import numpy as np
import pytest

from iokeep.cli.main import main
from iokeep.mem.capture import Capture
from iokeep.mem.ram import Ram
from iokeep.pt.build import Table
from iokeep.pt.extents import Extents
from iokeep.pt.registry import open_format
from iokeep.pt.roots import amd, riscv, smmu, vtd
from iokeep.pt.roots.base import TableRoot

MB = 1 << 20
#: host memory: frames of the guest (reversed order), then stage 2's tables, then the IOMMU's structures
GUEST_PAGES, FRAMES, TWO, ROOTS = 64, 0x10_0000, 0x20_0000, 0x30_0000
#: gpas of the guest's own structures and tables; its data
CONTEXT, TABLES, DATA = 0x3000, 0x8000, 0x40_0000
#: iova, last, gpa, prot of stage 1; the second is read-only in stage 2
ONE = [(0x1000_0000, 0x1000_1FFF, DATA + 0x1000, 3), (0x1000_4000, 0x1000_4FFF, DATA + 0x8000, 3)]
TRUTH = "iova\tpa\tlength\tprot\n0x10000000\t0x700001000\t0x2000\trw\n0x10004000\t0x700008000\t0x1000\tr-\n"


def host_of(gpa):
    return FRAMES + (GUEST_PAGES - 1 - (gpa >> 12) << 12 | gpa & 0xFFF)


def build(one, two):
    """Memory with both stages; (ram, root gpa of stage 1, root pa of stage 2)."""
    ram, guest = Ram.of(4 * MB), Ram.of(GUEST_PAGES << 12)

    def allocator(base):
        place = [base]

        def alloc(n, size=4096):
            start = -(-place[0] // size) * size
            place[0] = start + n * size
            return np.uint64(start) + np.arange(n, dtype=np.uint64) * np.uint64(size)

        return alloc

    first = Table.create(one, guest, allocator(TABLES), lambda *_: None)
    first.map(Extents.of(ONE))
    second = Table.create(two, ram, allocator(TWO), lambda *_: None)
    rows = [(g << 12, (g << 12) + 4095, host_of(g << 12), 3) for g in range(GUEST_PAGES)]
    rows += [(DATA, DATA + 0x7FFF, 0x7_0000_0000, 3), (DATA + 0x8000, DATA + 0x8FFF, 0x7_0000_8000, 1)]
    second.map(Extents.of(rows))
    for page in range(GUEST_PAGES):
        at = host_of(page << 12)
        ram.bytes[at : at + 4096] = guest.bytes[page << 12 : (page + 1) << 12]
    return ram, first.root_pa, second.root_pa


def put(ram, pa, words):
    for n, word in enumerate(words):
        ram.store64(pa + 8 * n, word)


def save(path, ram, fmt, root, **meta):
    pas = np.arange(0, ram.size, 4096, dtype=np.uint64)
    said = {"format": fmt.name, "config": dict(fmt.config), "root_pa": hex(root), **meta}
    Capture(said, pas, ram.rows(4096).data.copy()).save(path)
    (path / "truth.tsv").write_text(TRUTH)
    return path


def vtd_capture(path):
    one, two = open_format("x86_64", {}), open_format("vtdss", {})
    ram, gpa, pa = build(one, two)
    root, context, directory, table = (ROOTS + 0x1000 * n for n in range(4))
    put(ram, root, vtd.sm_root_entry(context, None))
    put(ram, vtd.context_entry_pa(context, 0x20, scalable=True), vtd.sm_context_entry(directory, 0))
    put(ram, directory, [vtd.pasid_dir_entry(table)])
    words = list(vtd.pasid_entry_second_stage(pa, 4, 5))
    words[0] = words[0] & ~vtd.PASID_PGTT_MASK | vtd.PGTT_NESTED << vtd.PASID_PGTT_SHIFT
    words[2] = gpa
    put(ram, table, words)
    hw = {"root_register": hex(vtd.rtaddr_value(root, scalable=True)), "bdf": "0000:00:04.0"}
    return save(path, ram, two, pa, hw=hw)


def amd_capture(path):
    one, two = open_format("x86_64", {"sign_extend": 0}), open_format("amdv1", {"levels": 3})
    ram, gpa, pa = build(one, two)
    put(ram, host_of(CONTEXT), [amd.gcr3_entry(gpa)])
    host, guest = amd.dte_host(pa, 3, 7), amd.dte_guest(CONTEXT, 0, 4, 7)
    dte = [a | b for a, b in zip(host, guest, strict=True)]
    put(ram, ROOTS + 0x20 * amd.DTE_BYTES, dte)
    hw = {"root_register": hex(amd.device_table_register(ROOTS, 8192)), "bdf": "0000:00:04.0"}
    return save(path, ram, two, pa, hw={**hw, "dte": [hex(w) for w in dte]})


def smmu_capture(path):
    sizes = smmu.stage1_config(4096, 39, 40)
    one, two = (
        open_format("arm_lpae_s1", sizes),
        open_format("arm_lpae_s2", smmu.stage2_config(4096, 40, 40, 1)),
    )
    ram, gpa, pa = build(one, two)
    put(ram, host_of(CONTEXT), smmu.context_descriptor(TableRoot("arm_lpae_s1", sizes, gpa), asid=3))
    first = smmu.ste_stage1(CONTEXT)
    second = smmu.ste_stage2(TableRoot("arm_lpae_s2", dict(two.config), pa), 9)
    ste = [a | b for a, b in zip(first, second, strict=True)]
    ste[0] |= smmu.CONFIG_NESTED << smmu.CONFIG_SHIFT
    put(ram, ROOTS + 24 * smmu.STE_BYTES, ste)
    regs = {"STRTAB_BASE": hex(smmu.strtab_base(ROOTS)), "STRTAB_BASE_CFG": hex(smmu.strtab_base_cfg(6))}
    return save(path, ram, two, pa, hw={"smmu_regs": regs, "sid": 24})


def riscv_capture(path, *, process=False):
    one, two = open_format("riscv64", {"levels": 3}), open_format("riscv64", {"levels": 3, "stage": 2})
    ram, gpa, pa = build(one, two)
    first, second = riscv.Stage(gpa, 3, 1), riscv.Stage(pa, 3, 2)
    dc = list(riscv.device_context(first, second, extended=False))
    if process:
        put(ram, host_of(CONTEXT) + 16 * 5, riscv.process_context(first))
        dc[0] |= riscv.TC_PDTV
        dc[3] = riscv.pdtp(CONTEXT, 1)
    put(ram, ROOTS + 32 * 24, dc)
    caps = 0x7 << 9 | 0x7 << 17 | 0x7 << 38 | 56 << 32 | 1 << 15
    hw = {"ddtp": hex(riscv.ddtp_value(ROOTS, 1)), "caps": hex(caps), "device_id": 24}
    return save(path, ram, two, pa, hw=hw)


CASES = {
    "vtd": (vtd_capture, []),
    "amd": (amd_capture, []),
    "smmu": (smmu_capture, []),
    "riscv": (riscv_capture, []),
    "riscv-process": (lambda path: riscv_capture(path, process=True), ["--pasid", "5"]),
}


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    make, options = CASES[request.param]
    return make(tmp_path / "nested"), ["--nested", *options]


def run(capsys, *words):
    code = main(["table", *map(str, words)])
    return (code, *capsys.readouterr())


def test_from_the_registers_to_both_stages(case, capsys):
    path, options = case
    code, out, err = run(capsys, "extents", path, *options, "--tsv")
    assert (code, out, err) == (0, TRUTH, "")
    code, out, _ = run(capsys, "verify", path, *options)
    assert code == 0
    assert out.startswith("equal: 3 pages (12 KiB) proved")
    code, out, _ = run(capsys, "walk", path, "0x10001234", "0x10002000", *options, "-j")
    document = json.loads(out)
    assert (code, document["schema"], document["stage1"]["from"]) == (
        0,
        "iokeep.table-walk-v1",
        "meta.json, hw",
    )
    hit, miss = document["walks"]
    assert (hit["gpa"], hit["pa"], hit["prot"], hit["stage"]) == ("0x402234", "0x700002234", "rw", None)
    assert [step["item_pa"] for step in hit["steps"]] == [
        hex(host_of(int(step["item_gpa"], 16))) for step in hit["steps"]
    ]
    assert all(step["fetch"] for step in hit["steps"])
    assert hit["output"]
    assert (miss["pa"], miss["stage"]) == (None, 1)
    code, out, _ = run(capsys, "show", path, *options)
    assert code == 0
    assert "mapped  12 KiB in 0x10000000-0x10004fff, 2 extents iova -> pa" in out


def test_walk_for_people_shows_both_dimensions(tmp_path, capsys):
    path = vtd_capture(tmp_path / "c")
    _, out, _ = run(capsys, "walk", path, "0x10004010", "--nested")
    lines = out.splitlines()
    assert sum("stage 1 level" in line for line in lines) == 4
    assert sum("stage 2 level" in line for line in lines) == 4 * 5
    assert lines[-1] == "0x10004010: gpa 0x408010, pa 0x700008010 r-, 0x1000 bytes in one piece"


def test_a_plain_pair(tmp_path, capsys):
    one, two = open_format("x86_64", {}), open_format("vtdss", {})
    ram, gpa, pa = build(one, two)
    path = save(tmp_path / "pair", ram, two, pa)
    options = [
        "--stage1",
        "x86_64",
        "--stage1-config",
        "levels=4,output_bits=0x34",
        "--stage1-root",
        hex(gpa),
    ]
    assert run(capsys, "extents", path, *options, "--tsv")[:2] == (0, TRUTH)
    assert run(capsys, "verify", path, *options)[0] == 0
    stated = {"format": "x86_64", "config": {"levels": 4}, "root_gpa": hex(gpa)}
    path = save(tmp_path / "stated", ram, two, pa, stage1=stated)
    assert run(capsys, "extents", path, "--nested", "--tsv")[:2] == (0, TRUTH)
    (path / "truth.tsv").write_text(TRUTH.replace("r-", "rw").replace("0x700001000", "0x700002000"))
    code, out, _ = run(capsys, "verify", path, "--nested", "-j")
    document = json.loads(out)
    assert (code, document["differ"]) == (1, {"pa": 2, "prot": 1})


def test_attributes_of_both_stages(tmp_path, capsys):
    path = smmu_capture(tmp_path / "c")
    _, out, _ = run(capsys, "extents", path, "--nested", "--attrs", "--tsv")
    assert out.splitlines()[0] == "iova\tpa\tlength\tprot\tattrs"
    assert out.splitlines()[1].endswith("\trw\tcache")
    (path / "truth.tsv").write_text(out)
    assert run(capsys, "verify", path, "--nested")[0] == 0
    (path / "truth.tsv").write_text(out.replace("cache", "mmio"))
    code, out, _ = run(capsys, "verify", path, "--nested", "-j")
    assert (code, json.loads(out)["differ"]) == (1, {"attrs": 3})


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--stage1", "x86_64"], 2, "--stage1-root"),
        (["--stage1", "x86_64", "--stage1-root", "0x8001"], 3, "0x8001"),
        (["--stage1", "nonsense", "--stage1-root", "0"], 3, "nonsense"),
        (["--stage1", "x86_64", "--stage1-root", "0x8000", "--stage1-config", "levels"], 2, "levels"),
        (["--stage1", "x86_64", "--stage1-root", "0x900000"], 3, "0x900000"),
        (["--nested", "--device", "nonsense"], 2, "nonsense"),
        (["--nested", "--device", "00:09.0"], 3, "SM_CONTEXT_NOT_PRESENT"),
        (["--pasid", "1"], 2, "--nested"),
    ],
)
def test_what_bad_options_get(tmp_path, capsys, options, code, words):
    path = vtd_capture(tmp_path / "c")
    got, out, err = run(capsys, "extents", path, *options)
    assert (got, out) == (code, ""), err
    assert words in err


@pytest.mark.parametrize("option", [["--layout"], ["--bbm", "1"]])
def test_leaf_sizes_of_two_stages_are_not_compared(tmp_path, capsys, option):
    path = vtd_capture(tmp_path / "c")
    code, out, err = run(capsys, "verify", path, "--nested", *option)
    assert (code, out) == (2, "")
    assert "leaf sizes" in err


def test_leaf_sizes_stated_for_two_stages(tmp_path, capsys):
    path = vtd_capture(tmp_path / "c")
    rows = [line.split("\t") for line in TRUTH.splitlines()]
    stated = ["\t".join([*row, "lg2" if row[0] == "iova" else "12"]) for row in rows]
    (path / "truth.tsv").write_text("\n".join(stated) + "\n")
    code, out, err = run(capsys, "verify", path, "--nested")
    assert (code, out) == (2, "")
    assert "lg2" in err


def test_a_capture_without_a_way_to_stage_1(tmp_path, capsys):
    one, two = open_format("x86_64", {}), open_format("vtdss", {})
    ram, _, pa = build(one, two)
    path = save(tmp_path / "c", ram, two, pa)
    code, _, err = run(capsys, "walk", path, "0x1000", "--nested")
    assert code == 3
    assert "--stage1 FORMAT --stage1-root GPA" in err
    path = save(tmp_path / "d", ram, two, pa, stage1={"format": "x86_64", "root_gpa": 7})
    code, _, err = run(capsys, "walk", path, "0x1000", "--nested")
    assert code == 3
    assert "root_gpa" in err


def test_the_guest_context_is_not_mapped_by_stage_2(tmp_path, capsys):
    path = smmu_capture(tmp_path / "c")
    meta = json.loads((path / "meta.json").read_text())
    capture = Capture.load(path)
    rows = capture.memory.rows(4096)
    data = rows.data.copy()
    ste = data[ROOTS >> 12].view(np.uint64)
    ste[24 * 8] = int(ste[24 * 8]) & ~smmu.S1CONTEXTPTR | 0x90_0000
    Capture(meta, rows.pas, data).save(tmp_path / "bad")
    code, _, err = run(capsys, "extents", tmp_path / "bad", "--nested")
    assert code == 3
    assert "gpa 0x900000" in err
