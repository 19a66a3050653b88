# SPDX-License-Identifier: Apache-2.0
"""What a rehearsal leaves for the tools: the same reader that decodes a real kernel's memory decodes ours."""

import json

import pytest

from iokeep.cli.main import main
from iokeep.mem.capture import Capture
from iokeep.pt.roots.vtd import find_root


@pytest.fixture
def rehearsed(tmp_path, capsys):
    def run(*words):
        there = tmp_path / "between"
        code = main(["rehearse", "--memory", "16M", "--capture", str(there), "--json", *words])
        return there, code, json.loads(capsys.readouterr().out)

    return run


def test_the_tools_read_what_lies_between_the_kernels(rehearsed, capsys):
    there, code, _ = rehearsed()
    assert code == 0
    assert main(["table", "verify", str(there / "table")]) == 0
    capsys.readouterr()
    assert main(["handover", "show", str(there / "handover"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["kho"]["compatible"] == "kho-v4"
    assert shown["problems"] == []
    (session,) = shown["sessions"]
    assert session["name"] == "vm-1"
    kinds = [f["compatible"] for f in session["files"]]
    # the order that a preserve must have: files, then the iommufd, then its devices
    assert kinds == sorted(kinds, key=["memfd-v2", "iokeep-iommufd-v1", "iokeep-vfio-pci-v1"].index)
    assert set(kinds) == {"memfd-v2", "iokeep-iommufd-v1", "iokeep-vfio-pci-v1"}
    capture = Capture.load(there / "table")
    info = find_root(capture.memory, int(capture.meta["hw"]["root_register"], 16), 4 << 3)
    assert info.root_pa == capture.root_pa


def test_an_injected_fault_is_in_the_capture(rehearsed, capsys):
    there, code, document = rehearsed("--inject", "pte-bit")
    assert code == 1
    assert main(["table", "verify", str(there / "table"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["differ"] == {"pa": 1}
    assert found["mismatches"][0]["iova"] == document["injected"][0]["iova"]


def test_nothing_is_overwritten(tmp_path, capsys):
    assert main(["rehearse", "--memory", "16M", "--capture", str(tmp_path)]) == 2
    assert "something is there already" in capsys.readouterr().err
