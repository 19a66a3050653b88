# SPDX-License-Identifier: Apache-2.0
"""docs/adding-a-format.md quotes the file that it explains, which is the smallest one."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "adding-a-format.md").read_text()


def test_every_block_is_in_the_file():
    source = (ROOT / "src" / "iokeep" / "pt" / "formats" / "vtdss.py").read_text()
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) >= 8
    for block in blocks:
        assert block in source, block


def test_what_it_names_is_there():
    for name in re.findall(r"`(tests/[\w/]+\.(?:py|md))`", PAGE):
        assert (ROOT / name).is_file(), name
    base = (ROOT / "src" / "iokeep" / "pt" / "formats" / "base.py").read_text()
    for name in re.findall(
        r"`(\w+_(?:mask|value|values|pieces|levels|bits|base|attrs|ignored|reserved))`", PAGE
    ):
        if name != "output_bits":
            assert f" {name}: " in base, name
