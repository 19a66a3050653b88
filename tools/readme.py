#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Runs the commands that README.md shows and puts in what they print.

A line ``<!-- output: COMMAND -->`` (or ``<!-- file: PATH FROM TO -->``) names what the block behind it holds.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- (output|file): (.*?) -->\n+```\w*\n)(.*?)(```\n)", re.DOTALL)


def output(command: str) -> str:
    """What an iokeep command prints, whatever it returns."""
    words = shlex.split(command)
    if words[0] != "iokeep":
        sys.exit(f"README.md: not a command of ours: {command}")
    print(command, file=sys.stderr)
    run = [sys.executable, "-m", *words]
    done = subprocess.run(
        run, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False
    )
    if done.returncode not in (0, 1) or not done.stdout:
        sys.exit(f"README.md: {command} returned {done.returncode} and {len(done.stdout)} characters")
    return done.stdout


def part(where: str) -> str:
    """Lines of a file, from the one that starts with FROM to before the one that starts with TO."""
    path, start, end = shlex.split(where)
    lines = [line.removeprefix("    ") for line in (ROOT / path).read_text().splitlines()]
    first = next(i for i, line in enumerate(lines) if line.startswith(start))
    last = next((i for i, line in enumerate(lines) if i > first and line.startswith(end)), len(lines))
    return "\n".join(lines[first:last]).rstrip() + "\n"


def filled(text: str, *, commands: bool) -> str:
    """README.md with its blocks made anew; the outputs of commands only on request."""

    def block(found: re.Match[str]) -> str:
        head, kind, what, body, tail = found.groups()
        if kind == "file":
            body = part(what)
        elif commands:
            body = output(what)
        return head + body + tail

    return BLOCK.sub(block, text)


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        text = README.read_text()
        sys.exit(0 if text == filled(text, commands=False) else f"{README} shows old code: run {sys.argv[0]}")
    README.write_text(filled(README.read_text(), commands=True))
