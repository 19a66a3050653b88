# SPDX-License-Identifier: Apache-2.0
"""The benchmark's cases are built right and its methods agree; no test looks at a time."""

import json
import subprocess

import numpy as np
import pytest

from iokeep.bench import peers as peers_module
from iokeep.bench import policies
from iokeep.bench import run as run_module
from iokeep.bench.cases import (
    FORMATS,
    JOBS,
    LAYOUTS,
    LEAVES,
    METHODS,
    POLICIES,
    TABLES,
    build,
    cases,
    possible,
)
from iokeep.bench.peers import Peers, can_read, compile_peers
from iokeep.bench.policies import StartUp
from iokeep.bench.run import Options, run
from iokeep.cli.main import main
from iokeep.errors import CapabilityError
from iokeep.pt.leaves import leaves
from iokeep.pt.registry import open_format
from iokeep.pt.tables import TableMemory, descend
from iokeep.pt.verify import verify

SIZE = 16 << 20
KEYS = {
    "job", "format", "layout", "tables", "leaf", "mapped_bytes", "table_bytes", "method", "ms", "ns_per_page",
    "share_of_limit", "gib_per_s", "s_per_16_tib", "speedup", "areas", "ms_least", "ms_most", "split",
}  # fmt: skip


@pytest.fixture(scope="session")
def c_peers():
    found = compile_peers()
    assert isinstance(found, Peers), found
    return found


@pytest.fixture
def started(monkeypatch):
    """Start-up is measured with processes, some seconds each; one test does that."""
    monkeypatch.setattr(run_module, "start_up", lambda: StartUp(1.0, 2.0, 4.0, 8.0, 16.0))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("leaf", LEAVES)
def test_tables_are_what_the_case_says(fmt, leaf):
    size = 4 << 30 if leaf in ("1G", "mixed") else SIZE
    for case in cases(["verify"], [fmt], [], [], [leaf], size):
        built = build(case)
        assert verify(built.fmt, built.ram, built.root_pa, built.extents).equal
        lg2 = LEAVES[leaf]
        found = set(leaves(built.fmt, built.ram, built.root_pa).lg2.tolist())
        if lg2 is None:
            assert found >= {12, 21, 30}
        elif lg2 in built.fmt.leaf_lg2s:
            assert max(found) == lg2


def test_which_cases_are_possible():
    assert possible("contiguous", "mixed")
    assert not possible("random-4k", "2M")
    assert not possible("scattered-2m", "mixed")
    every = list(cases(list(JOBS), list(FORMATS), list(LAYOUTS), list(TABLES), list(LEAVES), SIZE))
    assert len(every) == len(set(every)) == len(JOBS) * len(FORMATS) * len(TABLES) * (4 + 2 + 1)


@pytest.mark.parametrize("fmt", ["vtdss", "arm_lpae_s2"])
def test_every_job_runs_and_is_right(fmt, started):
    """A method that gets it wrong raises."""
    chosen = list(cases(list(JOBS), [fmt], [], [], ["4K"], SIZE))
    body = run(chosen, Options(repeat=1))
    rows = body["results"]
    assert {(r["job"], r["layout"], r["tables"]) for r in rows} == {
        (c.job, c.layout, c.tables) for c in chosen
    }
    for row in rows:
        assert set(row) == KEYS
        assert row["mapped_bytes"] == SIZE
    methods = {r["method"] for r in rows if r["job"] == "verify"}
    assert methods == {"limit", "inputs", "iokeep", "sweep", "numpy", "c_walk", "c_table"}
    assert {r["method"] for r in rows} <= set(METHODS)
    methods = {r["method"] for r in rows if r["job"] == "build" and r["layout"] == "random-4k"}
    assert methods == {"limit", "zeros", "inputs", "frames", "iokeep", "numpy"}
    for row in rows:
        assert row["ms_least"] <= row["ms"] <= row["ms_most"]
        assert (row["split"] is None) == (row["job"] not in POLICIES or row["method"] == "limit")
    assert body["start_up_ms"]["compile"] == 16


def policy_rows(fmt="vtdss", leaf="4K", layout="contiguous", size=SIZE):
    chosen = list(cases(list(POLICIES), [fmt], [layout], ["shuffled"], [leaf], size))
    rows = run(chosen, Options(repeat=1, peers=False))["results"]
    return {(r["job"], r["method"]): r for r in rows}


@pytest.mark.parametrize("leaf", ["2M", "1G", "mixed"])
def test_policies_at_every_leaf(leaf, started):
    rows = policy_rows("arm_lpae_s2", leaf, size=4 << 30)
    assert {job for job, _ in rows} == set(POLICIES)


def test_who_waits_for_what():
    """All of a policy's work is blackout, first use or background; what is not compiled starts sooner."""
    rows = policy_rows(layout="scattered-2m")
    steps = {name: set(row["split"]["steps_ms"]) for name, row in rows.items() if row["split"]}
    assert steps == {
        ("rebuild", "warm"): {"root", "build", "compare"},
        ("rebuild", "fresh"): {"root", "build", "compare"},
        ("rebuild", "diff"): {"root", "build", "compare"},
        ("adopt", "iokeep"): {"root", "validate"},
        ("adopt", "numpy"): {"root", "validate"},
        ("deferred-start", "plain"): {"root", "adopt"},
        ("sealed-start", "plain"): {"root", "digest", "adopt"},
        ("trust", "plain"): {"root"},
    }
    for (job, _), row in rows.items():
        if split := row["split"]:
            later = job in ("deferred-start", "sealed-start")
            assert (split["first_use_ms"] is not None) == later
            assert bool(split["background_ms"]) == later
            assert (split["longest_tick_ms"] is not None) == later
            if later:
                assert 0 < split["longest_tick_ms"] <= split["background_ms"]
            assert split["blackout_ms"] == pytest.approx(sum(split["steps_ms"].values()))
            assert row["areas"] == SIZE >> 21
    fast, slow = rows["adopt", "iokeep"]["split"], rows["adopt", "numpy"]["split"]
    assert fast["start_up_ms"] > slow["start_up_ms"]


@pytest.mark.parametrize("job", [job for job in POLICIES if job != "trust"])
def test_a_policy_that_proves_nothing_is_not_timed(job):
    (case,) = cases([job], ["vtdss"], ["contiguous"], ["sequential"], [], SIZE)
    built = build(case)
    rows = descend(TableMemory(built.fmt, built.ram), built.root_pa).row
    built.extents.pa[0] ^= np.uint64(1 << 30)
    with pytest.raises(AssertionError, match="wrong"):
        policies.play(case, built, rows, 1, 1)


def test_another_seal_is_not_timed():
    (case,) = cases(["sealed-start"], ["vtdss"], ["contiguous"], ["sequential"], [], SIZE)
    with pytest.raises(AssertionError, match="wrong"):
        policies._later(case, build(case), np.zeros(0, np.uint64), bytes(32))


def test_peers_find_what_is_wrong(c_peers):
    for name in ("vtdss", "arm_lpae_s2"):
        for case in cases(["verify"], [name], ["random-4k"], ["shuffled"], [], SIZE):
            built = build(case)
            args = (built.fmt, built.ram, built.root_pa)
            assert c_peers.walk_pages(*args, built.extents) == 0
            pa = built.extents.pa
            pa[7] ^= np.uint64(4096)
            assert c_peers.walk_pages(*args, built.extents) == 1
    assert can_read(built.fmt)
    assert not can_read(open_format("riscv64", {}))


def test_without_a_compiler_a_word_says_so(monkeypatch, capsys):
    monkeypatch.setattr(peers_module.shutil, "which", lambda name: None)
    assert (
        main(["bench", "run", "--size", "8M", "--repeat", "1", "--job", "verify", "--format", "vtdss"]) == 0
    )
    out = capsys.readouterr().out
    assert "no C compiler" in out
    assert "c_walk  " not in out.replace("c_walk, c_table, numpy", "")


def test_a_broken_compiler_is_no_error(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "peers.c:1: no\n")
    monkeypatch.setattr(peers_module.subprocess, "run", lambda *a, **k: failed)
    assert "failed" in compile_peers()


def test_words_that_are_not_known(capsys):
    for words in (["--job", "x"], ["--size", "7M"], ["--size", "1"], ["--repeat", "0"], ["--leaf", "3K"]):
        assert main(["bench", "run", *words]) == 2
    assert main(["bench", "run", "--layout", "random-4k", "--leaf", "1G"]) == 2
    capsys.readouterr()
    assert main(["bench", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == "iokeep.bench-list-v1"
    assert main(["bench", "list"]) == 0
    assert "random-4k" in capsys.readouterr().out


def test_too_large_is_refused_before_memory_is_taken():
    (case,) = cases(["verify"], ["vtdss"], ["random-4k"], ["sequential"], [], 16 << 40)
    with pytest.raises(CapabilityError, match="memory"):
        build(case)
