# SPDX-License-Identifier: Apache-2.0
"""docs/validation-cost.md is what a benchmark printed: tables, figures, and every number in its prose."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import jsonschema
import pytest

from iokeep.cli.main import main

ROOT = Path(__file__).parent.parent
TOOL = ROOT / "tools" / "validation_cost.py"
PAGE = (ROOT / "docs" / "validation-cost.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("validation_cost", TOOL)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_page_and_figures_are_what_the_data_say() -> None:
    done = subprocess.run([sys.executable, TOOL, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_was_measured_is_what_the_tool_measures(tool: ModuleType) -> None:
    assert [run["command"] for run in tool.Measured.load().runs] == list(tool.COMMANDS)
    assert tool.Measured.load().walk["command"] == tool.WALK


def test_rows_are_those_of_the_schema(tool: ModuleType) -> None:
    """Without the columns that are left out."""
    schema = json.loads((ROOT / "docs/schemas/iokeep.bench-v1.json").read_text(encoding="utf-8"))
    row = schema["properties"]["results"]["items"]
    row["required"] = [key for key in row["required"] if key not in tool._UNUSED]
    for run in [*tool.Measured.load().runs, tool.Measured.load().walk]:
        jsonschema.validate(run, schema)


def test_every_block_and_figure_is_on_the_page(tool: ModuleType) -> None:
    assert [found[2] for found in tool.BLOCK.finditer(PAGE)] == list(dict.fromkeys(
        re.findall(r"<!-- made: (\S+) -->", PAGE)
    ))  # fmt: skip
    assert set(re.findall(r"<!-- made: (\S+) -->", PAGE)) == set(tool.MADE)
    shown = set(re.findall(r"\]\((validation-cost-\S+\.svg)\)", PAGE))
    assert shown == {tool.figure_path(name).name for name in tool.FIGURES}


def test_no_figure_stands_in_prose(tool: ModuleType) -> None:
    """Times, shares and factors outside of the made blocks would be nobody's."""
    prose = tool.BLOCK.sub("", PAGE)
    assert not re.findall(r"\d[\d.]*\s?(?:%|us|ms|ns|s|times|x)\b", prose)


def test_the_commands_are_commands(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is understood; what they would run is too much for a test."""
    for command in (*tool.COMMANDS, tool.WALK):
        words = shlex.split(command)
        assert words[0] == "iokeep"
        assert main([*words[1:], "--repeat", "0"]) == 2
        assert "--repeat" in capsys.readouterr().out


def test_an_edited_page_is_noticed(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "page.md"
    copy.write_text(re.sub(r"\d GiB \|", "7 GiB |", PAGE, count=1), encoding="utf-8")
    monkeypatch.setattr(tool, "PAGE", copy)
    assert tool.main(["--check"]) == 1
    assert "is not what" in capsys.readouterr().err


def test_one_part_is_measured_without_the_others(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where the source tree lies is nobody's business."""
    old = tool._stored()
    monkeypatch.setattr(tool, "DATA", tmp_path / "data.json")
    tool._save(old["runs"], old["iova_to_phys"])
    ran: list[list[str]] = []

    def run(words: list[str], **how: object) -> subprocess.CompletedProcess[str]:
        ran.append(words[2:])
        source = old["iova_to_phys"]["kernel_source"]
        empty = {"schema": "iokeep.bench-v1", "kernel_source": source, "results": []}
        return subprocess.CompletedProcess(words, 0, json.dumps(empty))

    monkeypatch.setattr(tool.subprocess, "run", run)
    assert tool.main(["measure", "iova_to_phys", "/some where"]) == 0
    assert ran == [[*shlex.split(tool.WALK)[:-1], "/some where"]]
    assert tool._stored()["runs"] == old["runs"]
    assert tool._stored()["iova_to_phys"]["results"] == []
    assert "some where" not in tool.DATA.read_text(encoding="utf-8")
    tool._save(old["runs"], old["iova_to_phys"])
    assert tool.main(["measure", "1"]) == 0
    assert tool._stored()["iova_to_phys"] == old["iova_to_phys"]
    assert tool._stored()["runs"][1]["results"] == []
    assert tool._stored()["runs"][2:] == old["runs"][2:]
