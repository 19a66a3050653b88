# SPDX-License-Identifier: Apache-2.0
"""What the README shows is what there is: its code, its commands, its links, its example."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^(iokeep .*?)(?:\s+#.*)?$", README, re.MULTILINE)


def test_code_blocks_are_the_files() -> None:
    done = subprocess.run([sys.executable, ROOT / "tools" / "readme.py", "--check"], check=False)
    assert done.returncode == 0


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == (1 if " diff " in command else 0), done.stderr
    assert done.stdout


def test_the_example_runs() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "live_update.py"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "restored: 4096 pages proved; nothing differs",
        "the guest's own bytes",
    ]
