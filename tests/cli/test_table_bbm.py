# SPDX-License-Identifier: Apache-2.0
"""``table diff --bbm`` and attributes on the command line."""

import json
from pathlib import Path

from iokeep.cli.main import main

CAPTURES = Path(__file__).parents[1] / "data" / "captures"
BEFORE, AFTER = CAPTURES / "luo-vtd-neg-before", CAPTURES / "luo-vtd-neg-after-bad"


def test_diff_bbm(capsys):
    assert main(["table", "diff", str(BEFORE), str(BEFORE), "--bbm", "0"]) == 0
    assert "level 0 allows it" in capsys.readouterr().out
    assert main(["table", "diff", str(BEFORE), str(AFTER), "--bbm", "2", "--json", "--limit", "2"]) == 1
    bbm = json.loads(capsys.readouterr().out)["bbm"]
    assert (bbm["level"], bbm["allowed"], bbm["allowed_by_level"]) == (2, False, [False] * 3)
    assert bbm["ranges"][0]["kind"] == "pa"


def test_verify_attrs_that_a_format_cannot_say(capsys, tmp_path):
    truth = (CAPTURES / "vtd-smss-small" / "truth.tsv").read_text().splitlines()
    lines = [truth[0] + "\tattrs", *(line + "\tcache" for line in truth[1:])]
    path = tmp_path / "expected.tsv"
    path.write_text("\n".join(lines) + "\n")
    assert main(["table", "verify", str(CAPTURES / "vtd-smss-small"), "--against", str(path)]) == 0
    assert "attributes not compared (only one side can say them): cache" in capsys.readouterr().out
