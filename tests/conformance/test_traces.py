# SPDX-License-Identifier: Apache-2.0
"""Random traces against the model of areas; on a real kernel also against a software machine beside it.

IOKEEP_TRACES: how many for each kind of device (40); IOKEEP_SEED: the first seed (0);
IOKEEP_TRACE_LENGTH: operations in each (40); IOKEEP_ANSWERS: a file that conf_answers.py has written;
IOKEEP_BESIDE: parameter ``iommu`` of the software kernel beside a real one.
A failure prints its kind and the shrunk trace as JSON: IOKEEP_TRACE=FILE and IOKEEP_TRACE_KIND run it again.
"""

import json
import os
from pathlib import Path

import pytest
from conf_answers import plain
from conf_env import PAGE, RW, Env, outcome
from conf_machine import NOTES, SoftMachine, device_kinds, open_machine
from conf_rows import BASE
from conf_trace_objects import ObjectRun
from conf_traces import MEMORY_LIMIT, Area, Impossible, Run, Shadow, difference, generate, judge, run, shrink

TRACES = int(os.environ.get("IOKEEP_TRACES", "40"))
SEED = int(os.environ.get("IOKEEP_SEED", "0"))
LENGTH = int(os.environ.get("IOKEEP_TRACE_LENGTH", "40"))
BATCH = 20
KINDS = [None, *device_kinds(open_machine())]
KINDS += ["objects"] if "mock" in KINDS else []

ANSWERS = os.environ.get("IOKEEP_ANSWERS")


class Beside:
    """A software machine beside a real kernel, made when it is needed. A software machine is alone, and its
    own judge.
    """

    def __init__(self, machine):
        self.machine = machine
        self.made = None
        self.answers = json.loads(Path(ANSWERS).read_text()) if ANSWERS else {}

    def get(self):
        if self.machine.name == "soft":
            return None
        self.made = self.made or SoftMachine(self.machine.iommu, os.environ.get("IOKEEP_BESIDE") or None)
        return self.made

    def close(self):
        if self.made is not None:
            self.made.close()


@pytest.fixture(scope="module")
def beside(machine):
    made = Beside(machine)
    yield made
    made.close()


def batches():
    return [
        pytest.param(kind, first, min(BATCH, SEED + TRACES - first), id=f"{kind or 'alone'}-{first}")
        for kind in KINDS
        for first in range(SEED, SEED + TRACES, BATCH)
    ]


def check(machine, other, trace, kind):
    wrong = judge(machine, trace, kind, other)
    if wrong is None:
        return
    shrunk = shrink(trace, lambda each: judge(machine, each, kind, other))
    answer = judge(machine, shrunk, kind, other)
    pytest.fail(f"{kind}: {answer or f'not again: {wrong}'}\n{json.dumps(shrunk if answer else trace)}")


@pytest.mark.parametrize(("kind", "first", "count"), batches())
def test_traces(machine, beside, kind, first, count):
    for seed in range(first, first + count):
        trace = generate(seed, LENGTH, kind)
        if ANSWERS:
            answers, wrong = run(machine, trace, kind)
            if wrong is None and plain(answers) == beside.answers[str(kind)][str(seed)]:
                continue
        check(machine, beside.get(), trace, kind)


def test_the_trace_of_a_file(machine, beside):
    """IOKEEP_TRACE; without it, one that has been written down."""
    given = os.environ.get("IOKEEP_TRACE")
    text = Path(given).read_text() if given else json.dumps(generate(1, 5, "mock"))
    kind = os.environ.get("IOKEEP_TRACE_KIND", "mock") if "mock" in KINDS else None
    check(machine, beside.get() if given else None, json.loads(text), kind)


def test_count(machine):
    kinds = ", ".join(str(kind or "no device") for kind in KINDS)
    NOTES.append(
        f"{machine.name}: {TRACES} random traces of {LENGTH} operations each with {kinds}, from seed {SEED}"
    )
    assert TRACES > 0


# ---- the judges themselves


def test_a_trace_is_made_again_from_its_seed():
    assert generate(3, 30, "mock") == generate(3, 30, "mock") != generate(4, 30, "mock")
    assert json.loads(json.dumps(generate(3, 30, "mock"))) == generate(3, 30, "mock")


def test_the_model_sees_what_cannot_be():
    shadow = Shadow({1: [Area(BASE, 4 * PAGE, 0, 0, True)]})
    with pytest.raises(Impossible, match="over"):
        shadow.mapped(1, [Area(BASE + PAGE, PAGE, 0, 0, True)])
    with pytest.raises(Impossible, match="cut"):
        shadow.unmap(1, BASE, BASE + PAGE - 1, PAGE)
    with pytest.raises(Impossible, match="says"):
        shadow.unmap(1, 0, 2 * BASE, PAGE)
    with pytest.raises(Impossible, match="ENOENT with"):
        shadow.unmap(1, 0, 2 * BASE, "ENOENT")
    assert shadow.source(1, BASE, 5 * PAGE) is None
    shadow.unmap(1, 0, 2 * BASE, 4 * PAGE)
    assert shadow.areas == {1: []}


def test_a_wrong_page_is_seen(machine):
    if "mock" not in KINDS:
        return
    with Run(machine, "mock") as running:
        running.step(["ioas"])
        running.step(["attach", 0, 0])
        running.step(["map_file", 0, 0, 0, 4 * PAGE, BASE, RW])
        running.step(["check"])
        running.shadow.areas[1][0].start += PAGE
        with pytest.raises(Impossible, match="does not show"):
            running.step(["check"])


def test_a_wrong_user_is_seen(machine):
    if "mock" not in KINDS:
        return
    with ObjectRun(machine) as running:
        for step in (["ioas"], ["device", ["ioas", 0]], ["hwpt", 0, ["ioas", 0], 1, ["any", 0]]):
            running.step(step)
        running.step(["viommu", 0, ["parent", 0]])
        assert running.step(["destroy", ["parent", 0]]) == "EBUSY"
        viommu = next(number for number, thing in running.things.items() if thing.kind == "viommu")
        running.things[viommu].uses.clear()
        with pytest.raises(Impossible, match="not used"):
            running.step(["destroy", ["parent", 0]])


def test_a_batch_has_room_for_a_page(machine):
    if not machine.mock:
        return
    with Env(machine) as env:
        fd = env.iommu()
        assert outcome(env.memory_limit, fd, 11) == "EINVAL"
        assert outcome(env.memory_limit, fd, MEMORY_LIMIT) is None


def test_shrinking():
    trace = [["a"], ["b"], ["c"], ["d"], ["e"]]
    assert shrink(trace, lambda t: ["b"] in t and ["e"] in t) == [["b"], ["e"]]


def test_a_difference_is_named():
    assert difference([["ioas"]], [1], [1]) is None
    assert difference([["ioas"], ["check"]], [1, "EINVAL"], [1, 0]) == "['check']: EINVAL here, 0 there"


def test_two_runs_give_the_same_answers(machine):
    kind = "mock" if "mock" in KINDS else None
    trace = generate(SEED, LENGTH, kind)
    assert run(machine, trace, kind) == run(machine, trace, kind)
