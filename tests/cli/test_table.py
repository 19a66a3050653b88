# SPDX-License-Identifier: Apache-2.0
"""``iokeep table`` as a user runs it: text, JSON, exit codes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from iokeep.cli import main as main_module
from iokeep.cli.main import main
from iokeep.mem.capture import Capture

DATA = Path(__file__).parents[1] / "data" / "captures"
SMALL = str(DATA / "vtd-legacy-small")
BEFORE, AFTER = str(DATA / "luo-vtd-before"), str(DATA / "luo-vtd-after")
NEG, BAD = str(DATA / "luo-vtd-neg-before"), str(DATA / "luo-vtd-neg-after-bad")
NAMES = sorted(p.name for p in DATA.iterdir() if p.is_dir())


@pytest.fixture
def run(capsys):
    def call(*words):
        code = main(["table", *map(str, words)])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture
def damaged(tmp_path):
    """A copy of SMALL with one item changed by a function."""

    def make(iova, change):
        from iokeep.pt.registry import open_format
        from iokeep.pt.walk import walk

        capture = Capture.load(SMALL)
        fmt = open_format(capture.format, capture.config)
        at = walk(fmt, capture.memory, capture.root_pa, iova).steps[-1][1]
        rows = capture.memory.rows(4096)
        data = rows.data.copy()
        row = int(rows.index(np.array([at], np.uint64))[0])
        words = data[row].view(np.uint64)
        words[(at & 4095) // 8] = np.uint64(change(int(words[(at & 4095) // 8])))
        Capture(capture.meta, rows.pas, data).save(tmp_path / "damaged", capture.truth())
        return str(tmp_path / "damaged")

    return make


@pytest.mark.parametrize("name", NAMES)
def test_extents_tsv_is_the_truth_byte_for_byte(run, name):
    code, out, err = run("extents", DATA / name, "--tsv")
    assert (code, err) == (0, "")
    assert out.encode() == (DATA / name / "truth.tsv").read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_verify(run, name):
    code, out, _ = run("verify", DATA / name)
    assert code == 0
    assert out.startswith("equal: ")
    code, out, _ = run("verify", DATA / name, "--json")
    document = json.loads(out)
    assert code == 0
    assert document["schema"] == "iokeep.table-verify-v1"
    assert document["equal"] is True
    assert document["total"] == 0
    assert document["pages"] * 4096 == json.loads((DATA / name / "meta.json").read_text())["mapped_bytes"]


def test_verify_against_something_else(run):
    code, out, _ = run("verify", BAD, "--against", NEG + "/truth.tsv", "--limit", 2, "-j")
    document = json.loads(out)
    assert code == 1
    assert document["equal"] is False
    assert document["total"] == 2317
    assert document["mismatches"][0] == {
        "iova": "0x10000000", "last": "0x10000fff", "reason": "pa",
        "expected_pa": "0xb1ee000", "expected_prot": "rw",
        "found_pa": "0xc3cf000", "found_prot": "rw", "level": 0,
        "text": "iova 0x10000000-0x10000fff: pa: expected pa 0xb1ee000 rw, found pa 0xc3cf000 rw",
    }  # fmt: skip
    code, out, _ = run("verify", BAD, "--against", NEG + "/truth.tsv", "--limit", 2)
    assert code == 1
    assert out.splitlines()[0].startswith("different: 2317 ranges")
    assert out.splitlines()[-1] == "  and 2315 more"


def test_verify_without_truth(run, tmp_path):
    shutil.copytree(SMALL, tmp_path / "c")
    (tmp_path / "c" / "truth.tsv").unlink()
    code, out, err = run("verify", tmp_path / "c")
    assert (code, out) == (3, "")
    assert "truth.tsv" in err
    assert "--against" in err


def test_diff(run):
    code, out, _ = run("diff", BEFORE, AFTER)
    assert (code, out.splitlines()[1]) == (0, "layout equal")
    code, out, _ = run("diff", NEG, BAD, "-j")
    document = json.loads(out)
    assert code == 1
    assert document["schema"] == "iokeep.table-diff-v1"
    assert (document["total"], document["layout_equal"]) == (2317, True)


def test_diff_layout_counts_only_when_asked(run, tmp_path):
    from iokeep.mem.ram import Ram
    from iokeep.pt.build import Table
    from iokeep.pt.extents import Extents
    from iokeep.pt.registry import open_format

    fmt = open_format("vtdss", {"levels": 3})
    for name, lg2 in (("large", 21), ("small", 12)):
        ram, given = Ram.of(1 << 16), []

        def alloc(n, given=given):
            pas = [0x1000 * (len(given) + 1 + i) for i in range(n)]
            given.extend(pas)
            return np.array(pas, np.uint64)

        table = Table.create(fmt, ram, alloc, lambda pas: None)
        table.map(Extents.of([(0, 0x1FFFFF, 0x200000, 3)]), max_lg2=lg2)
        pas = table.pages()
        meta = {"format": "vtdss", "config": {"levels": 3}, "root_pa": hex(table.root_pa)}
        Capture(meta, pas, ram.rows(4096).data[(pas >> np.uint64(12)).astype(np.int64)]).save(tmp_path / name)
    a, b = tmp_path / "large", tmp_path / "small"
    code, out, _ = run("diff", a, b)
    assert code == 0
    assert "iova 0x0-0x1fffff: leaves of 2M and 4K" in out
    assert run("diff", a, b, "--layout")[0] == 1
    code, out, _ = run("diff", a, b, "--layout", "-j")
    assert json.loads(out)["layout"] == [
        {"iova": "0x0", "last": "0x1fffff", "leaf_bytes_a": 2097152, "leaf_bytes_b": 4096}
    ]
    keys = ["digest", "--key", "00" * 16, "-j"]
    digests = [json.loads(run(*keys, path)[1])["digest"] for path in (a, b)]
    assert digests[0] == digests[1]


def test_walk(run):
    code, out, _ = run("walk", SMALL, "0x10000", "0x10fff", "-j")
    document = json.loads(out)
    assert code == 0
    assert [w["pa"] for w in document["walks"]] == ["0x3058000", "0x3058fff"]
    assert [s["level"] for s in document["walks"][0]["steps"]] == [3, 2, 1, 0]
    code, out, _ = run("walk", SMALL, "4096")
    assert code == 0
    assert "0x1000: no translation: not present at level 0" in out
    for bad in ("nonsense", "0x10000000000000000", "-5x"):
        code, _, err = run("walk", SMALL, "--", bad)
        assert code == 2
        assert "IOVA" in err


def test_show(run):
    code, out, _ = run("show", DATA / "vtd-legacy-huge2m")
    assert code == 0
    for part in ("Linux 7.3.4", "vtdss (levels 4", "2304 x 4K, 32 x 2M, 0 x 1G", "73 MiB", "9 pages"):
        assert part in out
    code, out, _ = run("show", DATA / "vtd-legacy-huge2m", "--json")
    document = json.loads(out)
    assert document["leaves"] == {"4K": 2304, "2M": 32, "1G": 0}
    assert document["mapped_bytes"] == 76546048
    assert document["table_pages"] == 9
    assert document["bad_items"] == 0


def test_digest(run):
    key = "000102030405060708090a0b0c0d0e0f"
    outs = [run("digest", path, "--key", key)[1] for path in (BEFORE, AFTER, NEG)]
    assert outs[0] == outs[1] != outs[2]
    assert run("digest", BEFORE)[1] != run("digest", BEFORE)[1]  # a fresh key each time
    for bad in ("00", "zz" * 16, "00" * 17):
        assert run("digest", BEFORE, "--key", bad)[0] == 2


def test_an_item_that_is_not_present_is_missing(run, damaged):
    path = damaged(0x10000, lambda item: item & ~0x3)
    code, out, _ = run("verify", path)
    assert code == 1
    assert "missing" in out
    code, out, err = run("extents", path, "--tsv")
    assert (code, err) == (0, "")


def test_a_bad_item_is_named(run, damaged):
    path = damaged(0x10000, lambda item: item | 1 << 62)
    code, _, err = run("extents", path, "--tsv")
    assert code == 1
    assert "warning: iova 0x10000: attrs: item 0x4000000003058003" in err
    code, out, _ = run("show", path, "-j")
    assert code == 1
    assert json.loads(out)["bad_items"] == 1
    code, out, _ = run("verify", path, "-j")
    assert code == 1
    assert [m["reason"] for m in json.loads(out)["mismatches"]] == ["attrs"]


def test_absent_tables(run, tmp_path):
    capture = Capture.load(SMALL)
    rows = capture.memory.rows(4096)
    keep = rows.pas == np.uint64(capture.root_pa)
    Capture(capture.meta, rows.pas[keep], rows.data[keep]).save(tmp_path / "root-only", capture.truth())
    path = tmp_path / "root-only"
    for words in (
        ("walk", path, "0x10000"),
        ("extents", path),
        ("show", path),
        ("digest", path),
        ("diff", path, SMALL),
    ):
        code, out, err = run(*words)
        assert code == 3
        assert "not in this source" in err
    code, out, _ = run("verify", path, "-j")
    assert code == 1
    assert {m["reason"] for m in json.loads(out)["mismatches"]} == {"absent"}
    assert run("diff", SMALL, path)[0] == 1
    Capture({**capture.meta, "root_pa": "0xdead000"}, rows.pas, rows.data).save(
        tmp_path / "no-root", capture.truth()
    )
    code, _, err = run("verify", tmp_path / "no-root")
    assert code == 3
    assert "0xdead000" in err


def test_errors_are_json_too(run, tmp_path):
    code, out, err = run("verify", tmp_path / "nothing", "--json")
    document = json.loads(out)
    assert code == 3
    assert document["schema"] == "iokeep.table-verify-v1"
    assert document["error"]["kind"] == "input"
    assert "no such directory" in document["error"]["message"]
    assert err.startswith("error: ")


def test_formats_that_are_not_built(run, tmp_path):
    capture = Capture.load(SMALL)
    rows = capture.memory.rows(4096)
    Capture({**capture.meta, "format": "sv32"}, rows.pas, rows.data).save(tmp_path / "sv32")
    code, _, err = run("show", tmp_path / "sv32")
    assert code == 3
    assert "sv32" in err
    assert "vtdss, x86_64" in err


def test_usage(run, capsys):
    assert main([]) == 2
    assert main(["table"]) == 2
    assert main(["nonsense"]) == 2
    assert main(["table", "verify"]) == 2
    assert run("extents", SMALL, "--tsv", "--json")[0] == 2
    assert run("verify", SMALL, "--limit", "-1")[0] == 2
    capsys.readouterr()
    assert main(["--help"]) == 0
    help_text = capsys.readouterr().out
    assert "table" in help_text
    assert "Exit codes" in help_text
    assert main(["table", "--help"]) == 0
    assert "verify" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("iokeep ")


def test_last_lines_of_defence(monkeypatch, capsys):
    def broken(error):
        def build(chosen=None):
            raise error

        return build

    monkeypatch.setattr(main_module, "build_parser", broken(RuntimeError("boom")))
    assert main(["table"]) == 70
    err = capsys.readouterr().err
    assert "internal error: RuntimeError: boom" in err
    assert "Traceback" not in err
    assert main(["--debug", "table"]) == 70
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setattr(main_module, "build_parser", broken(KeyboardInterrupt()))
    assert main(["table"]) == 130


def test_a_reader_that_leaves_is_no_error():
    command = f"{sys.executable} -m iokeep table extents {DATA / 'vtd-smfs-mixed'} --tsv | head -1"
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout == "iova\tpa\tlength\tprot\n"
    assert done.stderr == ""


def test_a_table_that_loops_is_bad_input(tmp_path, capsys):
    """One level's items point back to the root: no walk of it means anything, so it is refused as input."""
    source = DATA / "vtd-legacy-small"
    looping = tmp_path / "looping"
    shutil.copytree(source, looping)
    with np.load(source / "tables.npz") as tables:
        pa, data = tables["pa"], tables["data"].copy()
    root = int(json.loads((source / "meta.json").read_text())["root_pa"], 16)
    data[pa.tolist().index(root)].view("<u8")[:] = root | 3
    np.savez(looping / "tables.npz", pa=pa, data=data)
    for verb in (["verify", str(looping)], ["diff", str(source), str(looping)], ["extents", str(looping)]):
        assert main(["table", *verb]) == 3
        out = capsys.readouterr()
        assert out.err.startswith("error: ")
        assert "level" in out.err
        assert out.out == ""
