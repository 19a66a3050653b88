#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draws docs/house.svg: rooms, floors and the imports between them, measured from the code.

Run it without arguments after moving a room; a test holds the picture against the code.
"""

from __future__ import annotations

import ast
import sys
from html import escape
from pathlib import Path
from textwrap import wrap

ROOT = Path(__file__).resolve().parent.parent
SRC = ROOT / "src" / "iokeep"
OUT = ROOT / "docs" / "house.svg"
FLOORS = [
    ["cli"],
    ["rehearse", "agent"],
    ["soft", "inspect", "restore", "bench"],
    ["pt", "handover", "iommufd", "luo"],
    ["uapi", "mem"],
]
BESIDE = "report"
WIDTH, BOX_H, GAP, LEFT = 1000, 74, 56, 20


def rooms() -> dict[str, str]:
    """Room -> the first line of its docstring."""
    found = {}
    for init in sorted(SRC.glob("*/__init__.py")):
        found[init.parent.name] = (ast.get_docstring(ast.parse(init.read_text())) or "").splitlines()[0]
    return found


def arrows() -> set[tuple[str, str]]:
    """(importer, imported) pairs of rooms, as the code has them."""
    found = set()
    for path in SRC.rglob("*.py"):
        room = path.relative_to(SRC).parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            for name in names:
                parts = name.split(".")
                if parts[0] == "iokeep" and len(parts) > 1 and (SRC / parts[1]).is_dir() and parts[1] != room:
                    found.add((room, parts[1]))
    return {(a, b) for a, b in found if (SRC / a).is_dir()}


def draw() -> str:
    """The SVG text."""
    have, place, boxes = rooms(), {}, []
    for floor, names in enumerate(FLOORS):
        names = [n for n in names if n in have]
        span = WIDTH - 2 * LEFT - (200 if floor == 0 else 0)
        width = (span - GAP * (len(names) - 1)) / len(names)
        for i, name in enumerate(names):
            place[name] = (LEFT + i * (width + GAP), LEFT + floor * (BOX_H + GAP), width)
    place[BESIDE] = (WIDTH - LEFT - 160, LEFT, 160)
    for name, (x, y, width) in place.items():
        lines = wrap(have[name], int(width / 6.6))[:3]
        boxes.append(f'<rect x="{x:.0f}" y="{y}" width="{width:.0f}" height="{BOX_H}" rx="6" class="room"/>')
        boxes.append(f'<text x="{x + 10:.0f}" y="{y + 20}" class="name">{name}/</text>')
        boxes += [
            f'<text x="{x + 10:.0f}" y="{y + 38 + 14 * i}" class="what">{escape(line)}</text>'
            for i, line in enumerate(lines)
        ]
    lines = []
    for a, b in sorted(arrows()):
        (xa, ya, wa), (xb, yb, wb) = place[a], place[b]
        x1, x2 = xa + wa / 2, xb + wb / 2
        if ya == yb:  # beside, on the top floor
            middle = ya + BOX_H // 2
            lines.append(f'<line x1="{xa + wa:.0f}" y1="{middle}" x2="{xb:.0f}" y2="{middle}"/>')
        else:
            start = min(max(x1 + (x2 - x1) * 0.22, xa + 12), xa + wa - 12)
            end = min(max(x2 - (x2 - x1) * 0.22, xb + 12), xb + wb - 12)
            lines.append(f'<line x1="{start:.0f}" y1="{ya + BOX_H}" x2="{end:.0f}" y2="{yb}"/>')
    height = 2 * LEFT + len(FLOORS) * BOX_H + (len(FLOORS) - 1) * GAP
    style = (
        ".room{fill:#f6f8fa;stroke:#57606a}.name{font:bold 14px monospace;fill:#0a3069}"
        ".what{font:11.5px sans-serif;fill:#24292f}line{stroke:#57606a;stroke-width:1.1;marker-end:url(#tip)}"
    )
    tip = (
        '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#57606a"/></marker>'
    )
    body = "\n".join(lines + boxes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}">\n'
        f"<style>{style}</style>\n<defs>{tip}</defs>\n"
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(0 if OUT.read_text() == draw() else f"{OUT} is not what the code says: run {sys.argv[0]}")
    OUT.write_text(draw())
    print(OUT)
