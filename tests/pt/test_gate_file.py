# SPDX-License-Identifier: Apache-2.0
"""Profiles of the format gate: the software kernels', and files; one host's table as another's gate."""

import json
from pathlib import Path

import jsonschema
import pytest

from iokeep.cli.main import main
from iokeep.errors import InputError, UsageError
from iokeep.pt.extents import Extents
from iokeep.pt.gate import check, describe
from iokeep.pt.gate_file import find_gate, load_gate, read_gate
from iokeep.pt.gate_profiles import PROFILES
from iokeep.pt.registry import FORMATS, open_format
from iokeep.soft.kernel.profiles import PROFILES as KERNELS

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data" / "captures"
VALID = {
    "schema": "iokeep.gate-v1",
    "name": "mine",
    "formats": {
        "vtdss": {
            "config": {"levels": [3, 4]},
            "leaf": {"accessed": [0, 1], "snp": ["0x0", "0x1"]},
            "table": {"flushed": [0, 1]},
            "leaf_bytes": [4096, 1 << 21],
        }
    },
}
TOML = """
schema = "iokeep.gate-v1"
name = "mine"
[formats.vtdss]
config = {levels = [3, 4]}
leaf = {accessed = [0, 1]}
table = {flushed = [0, 1]}
leaf_bytes = [4096, 2097152]
"""


def gate_schema():
    return jsonschema.Draft202012Validator(
        json.loads((ROOT / "docs/schemas/iokeep.gate-v1.json").read_text())
    )


@pytest.mark.parametrize("profile", [name for name in PROFILES if name.startswith("soft-")])
def test_a_software_kernel_passes_what_it_adopts(profile, new_table):
    assert set(PROFILES[profile]) == set(KERNELS[profile].formats)
    for name in FORMATS:
        fmt = open_format(name, {})
        built = new_table(fmt)
        built.table.map(Extents.of([(0x5000, 0x5FFF, 0x9000, 3)]))
        refused = check(fmt, describe(*built.args), profile)
        assert (refused == []) == (name in KERNELS[profile].formats), refused


@pytest.mark.parametrize(("suffix", "text"), [(".json", json.dumps(VALID)), (".toml", TOML)])
def test_a_file_says_what_a_kernel_is_tested_with(suffix, text, tmp_path, capsys):
    path = tmp_path / f"gate{suffix}"
    path.write_text(text)
    assert main(["table", "show", str(DATA / "vtd-smss-small"), "--gate", str(path)]) == 0
    assert "mine: passes" in capsys.readouterr().out
    assert main(["table", "show", str(DATA / "vtd-smfs-small"), "--gate", str(path), "-j"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["gate"] == {"profile": "mine", "violations": ["format x86_64: mine does not make it"]}
    gate_schema().validate(VALID)


def test_leaf_sizes_count(tmp_path, new_table):
    fmt = open_format("vtdss", {})
    built = new_table(fmt)
    built.table.map(Extents.of([(0, (1 << 30) - 1, 1 << 30, 3)]))
    refused = check(fmt, describe(*built.args), read_gate(VALID, "x"))
    assert refused == ["leaves of 2**30 bytes: mine makes none"]


@pytest.mark.parametrize("path", sorted(p for p in DATA.iterdir() if p.is_dir()), ids=lambda p: p.name)
def test_what_show_prints_is_a_gate(path, tmp_path, capsys):
    assert main(["table", "show", str(path), "--json"]) == 0
    out = capsys.readouterr().out
    document = json.loads(out)
    gate_schema().validate(document["descriptor"])
    (tmp_path / "whole.json").write_text(out)
    (tmp_path / "descriptor.json").write_text(json.dumps(document["descriptor"]))
    for name in ("whole.json", "descriptor.json"):
        assert main(["table", "show", str(path), "--gate", str(tmp_path / name)]) == 0
    other = DATA / ("amdv1-tr-small" if document["format"] == "vtdss" else "vtd-smss-small")
    assert main(["table", "show", str(other), "--gate", str(tmp_path / "whole.json")]) == 1


def broken(**changes):
    part = VALID["formats"]["vtdss"]
    return {**VALID, "formats": {"vtdss": {**part, **changes}}}


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ([], "no object"),
        ({}, "schema 'None'"),
        ({**VALID, "schema": "iokeep.gate-v2"}, "iokeep.gate-v2"),
        ({**VALID, "colour": "x"}, "unknown key 'colour'"),
        ({**VALID, "name": 7}, '"name" is missing'),
        ({**VALID, "formats": {}}, "formats is empty"),
        ({**VALID, "formats": {"vtd": {}}}, "formats.vtd: no such page-table format"),
        (broken(leafs={}), "unknown key 'leafs'"),
        (broken(config={"level": [3]}), "no configuration key 'level'"),
        (broken(leaf={"dbm": [0]}), "formats.vtdss.leaf: vtdss has no field 'dbm'"),
        (broken(leaf={"snp": 1}), "formats.vtdss.leaf.snp: no list of values"),
        (broken(leaf={"snp": ["yes"]}), "formats.vtdss.leaf.snp: 'yes' is no value"),
        (broken(leaf={"snp": [True]}), "'True' is no value"),
        (broken(leaf_bytes=[5000]), "5000 is no power of two"),
        ({"schema": "iokeep.table-show-v1", "error": {}}, "descriptor: missing"),
    ],
)
def test_a_file_that_is_no_profile(document, words):
    with pytest.raises(InputError) as caught:
        read_gate(document, "gate.json")
    assert words in caught.value.what
    assert caught.value.what.startswith("gate.json: ")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match="no profile"):
        find_gate("linux-9")
    with pytest.raises(InputError, match="No such file"):
        find_gate(str(tmp_path / "absent.json"))
    for name, raw, words in (
        ("a.json", b"{", "line 1"),
        ("b.json", b"\xff", "byte 0: not UTF-8"),
        ("c.toml", b"x = ", "c.toml: Invalid value"),
        ("d.json", b" " * (1 << 20) + b" ", "more than"),
        ("e.json", b"[" * 100_000, "e.json"),
    ):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(InputError) as caught:
            load_gate(tmp_path / name)
        assert words in caught.value.what
