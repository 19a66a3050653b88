# SPDX-License-Identifier: Apache-2.0
"""Every --json document has the shape that docs/schemas states; a document that has not is found."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

ROOT = Path(__file__).parent.parent
SCHEMAS = ROOT / "docs" / "schemas"
CAPTURES = ROOT / "tests" / "data" / "captures"
KHO = ROOT / "tests" / "data" / "kho"

CASES = {
    "verify": (0, ["table", "verify", CAPTURES / "vtd-smss-small"]),
    "diff": (1, ["table", "diff", CAPTURES / "luo-vtd-neg-before", CAPTURES / "luo-vtd-neg-after-bad"]),
    "extents": (0, ["table", "extents", CAPTURES / "vtd-smfs-small"]),
    "handover": (0, ["handover", "show", KHO / "s2-sessions-F"]),
    "handover with a problem": (1, ["handover", "show", KHO / "s6-51dup-F"]),
    "bench list": (0, ["bench", "list"]),
    "bench run": (0, ["bench", "run", "--size", "8M", "--repeat", "1", "--no-peers", "--format", "vtdss"]),
    "no such capture": (3, ["table", "verify", CAPTURES / "not-there"]),
    "refused": (1, ["rehearse", "--memory", "16M", "--inject", "pte-bit"]),
}


def run(arguments: list[object]) -> tuple[int, dict[str, object]]:
    done = subprocess.run(
        [sys.executable, "-m", "iokeep", *map(str, arguments), "--json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return done.returncode, json.loads(done.stdout)


@pytest.mark.parametrize("name", CASES)
def test_the_document_has_its_shape(name: str) -> None:
    code, arguments = CASES[name]
    returned, document = run(arguments)
    assert returned == code
    file = "error" if "error" in document else document["schema"]
    schema = json.loads((SCHEMAS / f"{file}.json").read_text())
    check = jsonschema.Draft202012Validator(schema)
    check.validate(document)
    for key in schema["required"]:
        broken = copy.deepcopy(document)
        del broken[key]
        with pytest.raises(jsonschema.ValidationError):
            check.validate(broken)


def test_a_wrong_replay_is_counted_by_kind() -> None:
    """The kernel developer's question: how many pages differ, and how (captures README: a wrong replay)."""
    _, document = run(CASES["diff"][1])
    assert document["differ"] == {"missing": 2, "extra": 3, "pa": 2056, "prot": 256}
    assert document["total"] == 2317
