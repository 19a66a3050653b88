# SPDX-License-Identifier: Apache-2.0
"""What starts quickly stays so: no Numba for small work, a cache of compiled code where one is possible."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from iokeep.soft import host

ROOT = Path(__file__).parent.parent
#: proves tables by compiled code
COMPILED = """
import sys
from iokeep.bench.cases import Case, build
from iokeep.pt.verify import verify
b = build(Case("verify", "vtdss", "random-4k", "shuffled", "4K", 1 << 26))
assert verify(b.fmt, b.ram, b.root_pa, b.extents, compiled=True).equal
b.extents.pa[7] += 4096
assert not verify(b.fmt, b.ram, b.root_pa, b.extents, compiled=True).equal
assert "numba" in sys.modules
"""


def python(code: str, source: Path = ROOT / "src", **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("NUMBA_CACHE_DIR", "NUMBA_DISABLE_JIT")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, "PYTHONPATH": str(source), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("verb", ["verify", "show", "digest", "extents"])
def test_small_tables_need_no_numba(verb: str) -> None:
    capture = ROOT / "tests/data/captures/luo-vtd-before"
    done = python(
        "import sys\n"
        "from iokeep.cli.main import main\n"
        f"status = main(['table', {verb!r}, {str(capture)!r}, '--json'])\n"
        "slow = {'numba', 'llvmlite'} & set(sys.modules)\n"
        "sys.exit(f'imported {slow}' if slow else status)\n"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["schema"] == f"iokeep.table-{verb}-v1"


def test_no_place_for_the_cache(tmp_path: Path) -> None:
    """Beside the source, in the user's cache: a file stands where the directory would be."""
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "src/iokeep/pt/__pycache__").write_text("no directory")
    done = python(COMPILED, tmp_path / "src", HOME="/dev/null", XDG_CACHE_HOME="/dev/null/cache")
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*.nbi"))


def test_no_room_for_the_cache(tmp_path: Path) -> None:
    """The directory is there, but what was compiled cannot be saved."""
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
    fill = COMPILED.replace("\nb = build", f"\n{limit}b = build")
    assert limit in fill
    done = python(fill, NUMBA_CACHE_DIR=str(tmp_path), PYTHONDONTWRITEBYTECODE="1")
    assert done.returncode == 0, done.stderr
    assert not [path for path in tmp_path.rglob("*.nb?") if path.stat().st_size]


def test_the_cache_is_used(tmp_path: Path) -> None:
    times = []
    for _ in range(2):
        done = python(COMPILED, NUMBA_CACHE_DIR=str(tmp_path))
        assert done.returncode == 0, done.stderr
        times.append({path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nbc")})
    assert times[0] == times[1] != {}


def test_a_compile_is_announced_only_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NUMBA_DISABLE_JIT", raising=False)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "own"))
    assert not host.engine_is_compiled()
    (tmp_path / "own/numba").mkdir(parents=True)
    (tmp_path / "own/numba/engine.burst-1.py311.nbi").touch()
    assert host.engine_is_compiled()
    # Where the package cannot be written: the user's cache.
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    assert host.engine_is_compiled()
