# SPDX-License-Identifier: Apache-2.0
"""The house rules that code can check: imports run one way, start-up is light, kernels are probed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src" / "iokeep"

#: room -> the rooms it may import; errors.py and the package itself are below all.
FLOORS = [
    {"uapi", "mem"},
    {"pt", "handover", "iommufd", "luo"},
    {"soft", "inspect", "restore", "bench"},
    {"rehearse", "agent"},
    {"cli"},
]
STANDALONE = {"report"}
NUMBA_MODULES = {"pt/kernels.py", "pt/cache.py", "soft/hardware/engine.py"}


def room_of(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def allowed(room: str) -> set[str]:
    if room in STANDALONE:
        return {room}
    below: set[str] = set()
    for floor in FLOORS:
        if room in floor:
            return below | {room} | (STANDALONE if room == "cli" else set())
        below |= floor
    raise AssertionError(f"{room}/ is in no floor of the house")


def imports(tree: ast.AST) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import at line {node.lineno}"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


FILES = sorted(SRC.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_imports_run_one_way(path: Path) -> None:
    room = room_of(path)
    if room in {"__init__", "__main__", "errors"}:
        return
    for line, name in imports(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] != "iokeep" or len(parts) < 2 or parts[1] in {"errors", "__version__"}:
            continue
        assert parts[1] in allowed(room), f"{path.name}:{line}: {room}/ imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_numba_is_in_its_own_modules(path: Path) -> None:
    where = path.relative_to(SRC).as_posix()
    uses = [line for line, name in imports(ast.parse(path.read_text())) if name.split(".")[0] == "numba"]
    assert not uses or where in NUMBA_MODULES, f"{where} imports numba at line {uses}"


def test_every_room_is_in_the_house() -> None:
    rooms = {p.name for p in SRC.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert rooms <= set().union(*FLOORS) | STANDALONE


def test_source_has_its_licence() -> None:
    for path in FILES:
        assert path.read_text().startswith("# SPDX-License-Identifier: Apache-2.0\n"), path


def test_no_kernel_version_is_compared() -> None:
    """Features are probed; a release string is printed, never parsed (pyroute2 #885)."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Attribute) or node.attr != "release":
                continue
            of = ast.unparse(node.value)
            if of.endswith("uname()") or of == "platform":
                pytest.fail(f"{path}:{node.lineno} looks at {of}.release")


@pytest.mark.parametrize(
    "what", ["import iokeep", "import iokeep.cli.main; iokeep.cli.main.main(['--help'])"]
)
def test_start_up_imports_nothing_slow(what: str) -> None:
    code = (
        "import sys\n"
        f"try:\n    {what.replace('; ', chr(10) + '    ')}\n"
        "except SystemExit:\n    pass\n"
        "slow = {'numpy', 'numba', 'llvmlite', 'jsonschema'} & set(sys.modules)\n"
        "sys.exit(f'imported {slow}' if slow else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_picture_is_what_the_code_says() -> None:
    tool = SRC.parent.parent / "tools" / "draw_house.py"
    done = subprocess.run([sys.executable, tool, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_pte_masks_stay_in_the_formats() -> None:
    """An integer literal that is a page-table mask (a run of ones up to bit 39 ... 51 above 12 zero bits)."""
    masks = {((1 << top) - 1) & ~0xFFF for top in range(36, 53)}
    for path in FILES:
        where = path.relative_to(SRC).as_posix()
        if where.startswith(("pt/formats/", "pt/roots/")):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, int)
                and not isinstance(node.value, bool)
            ):
                assert node.value not in masks, f"{where}:{node.lineno}: {node.value:#x} is a PTE mask"
