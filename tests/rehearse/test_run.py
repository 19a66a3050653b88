# SPDX-License-Identifier: Apache-2.0
"""Whole live updates with real processes: every policy, every fault, and a VMM that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from iokeep.errors import UsageError
from iokeep.rehearse.inject import parse_fault
from iokeep.rehearse.run import Options, rehearse
from iokeep.report import text

TABLE = ["pte-bit", "pte-swap", "unknown-bit"]
REPLAY = ["drop-area", "extra-area", "wrong-prot", "wrong-file", "wrong-offset"]


def run(policy="adopt", *faults, **kw):
    given = {"memory": 32 << 20, "devices": 1, "transactions": 200_000, "seed": 3}
    inject = tuple(parse_fault(f) for f in faults)
    doc = rehearse(Options(policy=policy, inject=inject, unsafe=policy == "trust", **{**given, **kw}))
    json.dumps(doc, allow_nan=False)
    assert text.rehearsal(doc)
    steps = [t["step"] for t in doc["timeline"]]
    assert len(set(steps)) == len(steps)
    assert doc["dma"]["during_kexec"] > 1000
    return doc


def assert_unharmed(doc):
    dma, frames = doc["dma"], doc["frames"]
    assert (dma["lost"], dma["misdirected"], dma["faults"], dma["leaks"]) == (0, 0, 0, 0), dma["incidents"]
    assert (frames["leaked"], frames["wrongly_freed"], frames["bad_unpins"], frames["bad_puts"]) == (
        0,
        0,
        0,
        0,
    )
    assert doc["proof"]["guest_pages_damaged"] == 0
    assert doc["proof"]["problems"] == []


def damage(doc):
    dma, frames = doc["dma"], doc["frames"]
    return (
        sum(dma[k] for k in ("lost", "misdirected", "faults", "leaks"))
        + frames["leaked"]
        + frames["wrongly_freed"]
    )


@pytest.mark.parametrize(
    ("policy", "format_name", "page_size"),
    [
        ("adopt", "vtdss", "mixed"),
        ("rebuild", "x86_64", "2M"),
        ("trust", "vtdss", "4K"),
        ("adopt", "x86_64", "4K"),
    ],
)
def test_a_sound_guest_is_restored(policy, format_name, page_size):
    doc = run(policy, format=format_name, page_size=page_size, devices=2)
    assert doc["outcome"] == "restored"
    assert doc["reason"] == ""
    assert_unharmed(doc)
    assert doc["dma"]["transactions"] >= 200_000
    assert doc["dma"]["denied"] > 0
    assert doc["dma"]["verified"] > 0
    assert doc["proof"]["guest_pages"] == doc["guest"]["memory"] // 4096
    assert doc["restore"]["areas"] == doc["guest"]["areas"]
    assert doc["restore"]["pages"] == (0 if policy == "trust" else doc["guest"]["mapped"] // 4096)
    assert {
        "setup",
        "preserve",
        "freeze",
        "kexec",
        "boot",
        "retrieve",
        "replay",
        "finish",
        "after",
        "teardown",
    } <= {t["step"] for t in doc["timeline"]}


@pytest.mark.parametrize("fault", [*TABLE, *REPLAY, "stale-root"])
def test_adopt_refuses_and_names_the_place(fault):
    doc = run("adopt", fault)
    assert doc["outcome"] == "refused"
    assert_unharmed(doc)
    found, injected = doc["restore"]["mismatches"], doc["injected"][0]
    assert found
    assert injected["fault"] == fault
    if fault == "stale-root":
        assert found[0]["reason"] == "root"
    else:
        assert injected["iova"] in {m["iova"] for m in found}
    assert "finish" not in {t["step"] for t in doc["timeline"]}


@pytest.mark.parametrize("fault", ["pte-bit", "wrong-file"])
def test_rebuild_refuses_too(fault):
    doc = run("rebuild", fault)
    assert doc["outcome"] == "refused"
    assert_unharmed(doc)
    assert doc["restore"]["mismatches"]


@pytest.mark.parametrize(
    "fault", ["pte-bit", "pte-swap", "unknown-bit", "drop-area", "extra-area", "wrong-file"]
)
def test_trust_does_the_damage(fault):
    doc = run("trust", fault)
    assert doc["outcome"] == "corrupted"
    assert damage(doc) > 0
    assert doc["reason"]


@pytest.mark.parametrize("policy", ["deferred", "sealed"])
def test_proved_later_and_sound(policy):
    doc = run(policy, devices=2)
    assert doc["outcome"] == "restored"
    assert_unharmed(doc)
    assert doc["restore"]["pages"] == doc["guest"]["mapped"] // 4096
    assert doc["restore"]["table_bytes"] > 0
    assert ("validate" in {t["step"] for t in doc["timeline"]}) == (policy == "sealed")


@pytest.mark.parametrize(
    ("policy", "fault"), [("deferred", f) for f in TABLE + REPLAY] + [("sealed", f) for f in TABLE]
)
def test_a_fault_is_contained(policy, fault):
    """Found when the range is first used or by the sweep, never after; nothing is freed or hit by it."""
    doc = run(policy, fault)
    assert doc["outcome"] == "contained"
    assert_unharmed(doc)
    assert doc["injected"][0]["iova"] in {m["iova"] for m in doc["restore"]["mismatches"]}
    assert doc["restore"]["pages"] > 0
    assert "finish" in {t["step"] for t in doc["timeline"]}


@pytest.mark.parametrize("fault", REPLAY)
def test_sealed_refuses_another_set_up_at_the_start(fault):
    doc = run("sealed", fault)
    assert doc["outcome"] == "refused"
    assert_unharmed(doc)
    assert [m["reason"] for m in doc["restore"]["mismatches"]] == ["digest"]
    assert "finish" not in {t["step"] for t in doc["timeline"]}


@pytest.mark.parametrize("policy", ["deferred", "sealed"])
@pytest.mark.parametrize("fault", ["stale-root", "truncate-records", "version-skew"])
def test_what_is_checked_at_once_is_refused_by_these_too(policy, fault):
    doc = run(policy, fault)
    assert doc["outcome"] == "refused"
    assert_unharmed(doc)


@pytest.mark.parametrize(
    ("policy", "step"),
    [
        *(("deferred", step) for step in ("retrieve", "replay", "adopt", "finish", "after", "teardown")),
        ("sealed", "adopt"),
        ("sealed", "after"),
    ],
)
def test_a_vmm_that_is_killed_before_the_proof_is_over(policy, step):
    doc = run(policy, f"kill-at={step}", "pte-bit")
    assert doc["outcome"] == "contained"
    assert doc["killed"] == [step]
    assert_unharmed(doc)


@pytest.mark.parametrize("policy", ["adopt", "rebuild", "deferred", "sealed"])
def test_another_leaf_size_is_no_difference_of_translation(policy):
    doc = run(policy, "leaf-size")
    assert doc["outcome"] == "restored"
    assert_unharmed(doc)
    assert doc["restore"]["layout_differences"] == (1 if policy in ("adopt", "rebuild") else 0)


@pytest.mark.parametrize(("policy", "fault"), [("adopt", "truncate-records"), ("trust", "version-skew")])
def test_records_that_cannot_be_read_are_refused(policy, fault):
    doc = run(policy, fault)
    assert doc["outcome"] == "refused"
    assert_unharmed(doc)
    assert "EIO" in doc["reason"]


def test_an_older_kernel_refuses_what_it_does_not_know():
    doc = run("adopt", kernel_to="soft-7.2")
    assert doc["outcome"] == "refused"
    assert_unharmed(doc)


@pytest.mark.parametrize(
    "step", ["setup", "preserve", "freeze", "boot", "replay", "adopt", "after", "teardown"]
)
def test_a_vmm_that_is_killed_carries_on(step):
    doc = run("rebuild" if step == "adopt" else "adopt", f"kill-at={step}", devices=2)
    assert doc["outcome"] == "restored"
    assert doc["killed"] == ["switch" if step == "adopt" else step]
    assert_unharmed(doc)
    assert doc["restore"]["pages"] > 0


def test_a_seed_gives_the_same_guest_again():
    a, b = run("adopt", "pte-bit"), run("adopt", "pte-bit")
    assert a["injected"] == b["injected"]
    assert a["restore"]["mismatches"] == b["restore"]["mismatches"]


def test_no_place_for_a_fault_is_a_usage_error():
    with pytest.raises(UsageError, match="2 MiB leaf"):
        run("adopt", "leaf-size", page_size="4K")


def children(mark):
    """Pids of all processes that were started with this mark in their environment."""
    out = []
    for p in Path("/proc").glob("[0-9]*"):
        try:
            words = (p / "environ").read_bytes()
        except OSError:
            continue
        if f"IOKEEP_TEST_MARK={mark}".encode() in words.split(b"\0"):
            out.append(int(p.name))
    return out


@pytest.mark.parametrize(("number", "event"), [(signal.SIGTERM, b"setup"), (signal.SIGINT, b"boot")])
def test_an_interrupt_leaves_nothing_behind(tmp_path, number, event):
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    tmp_path = tmp_path / ("deep" * 30)  # a socket in there has no name that fits into sockaddr_un
    tmp_path.mkdir()
    env = {**os.environ, "TMPDIR": str(tmp_path), "IOKEEP_TEST_MARK": mark, "PYTHONUNBUFFERED": "1"}
    code = (
        "import sys; from iokeep.report import text;"
        "text.Progress.say = lambda self, t: print(t, flush=True);"
        "from iokeep.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    words = [sys.executable, "-c", code, "rehearse", "--memory", "32M"]
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE) as process:
        for line in process.stdout:
            if line.startswith(event):
                break
        assert len(children(mark)) > 2
        process.send_signal(number)
        process.stdout.read()
        assert process.wait(30) == 130
    end = time.monotonic() + 10
    while children(mark) and time.monotonic() < end:
        time.sleep(0.02)
    assert children(mark) == []
    assert [p.name for p in tmp_path.iterdir()] == []
