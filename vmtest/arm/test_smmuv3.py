# SPDX-License-Identifier: Apache-2.0
"""Tables that a stock Debian arm64 kernel wrote for an SMMUv3, by every witness that such a kernel has: its
memory from outside and from inside, what was asked for with frames from pagemap, its trace events, and DMA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from iokeep.pt.extents import PROT_W
from vmtest.arm.machine import boot, machines
from vmtest.guest_programs import Boot
from vmtest.witnesses import Seen, look, rows, same, traced, without_prot

LAYOUTS = ("scattered", "huge", "edges", "process-memory", "contiguous", "emptied")
GRANULES = {"arm64": 4096, "arm64-16k": 16384}


@dataclass(frozen=True, slots=True)
class Visit:
    """One boot: layouts as they were, what is said of each when two frames are expected the other way round,
    and whether DMA went where the mappings say.
    """

    layouts: Mapping[str, Seen]
    exchanged: Mapping[str, str]
    moved: bool
    logs: Path


@Boot
def visit(mode: str) -> Visit:
    """Boot once for each machine."""
    layouts, wrong, moved = {}, {}, False
    command = ["python3", "-m", "vmtest.guest.smmuv3"]
    with boot(machines()[mode], command, seconds=400) as guest:
        ram = guest.memory()
        for told in guest.documents():
            if "moved" in told:
                moved = told["moved"]
                continue
            layouts[told["layout"]] = look(told, ram)
            wrong[told["layout"]] = look({**told, "asked": exchanged(told["asked"])}, ram).verdict
            guest.send(go="on")
        guest.check_status()
    assert not guest.kernel_complaints(), f"see {guest.directory}"
    return Visit(layouts, wrong, moved, guest.directory)


def exchanged(asked: list[list[int]]) -> list[list[int]]:
    """The first and the last page with each other's frame."""
    (iova, last, pa, prot), *between, (iova2, last2, pa2, prot2) = asked
    return [[iova, last, pa2, prot], *between, [iova2, last2, pa, prot2]]


CASES = [visit.case(mode, f"{mode}/{layout}") for mode in machines() for layout in LAYOUTS]
MODES = [visit.case(mode) for mode in machines()]


@pytest.fixture(params=CASES)
def one(request: pytest.FixtureRequest) -> Seen:
    """One layout on one machine."""
    mode, layout = request.param.split("/")
    return visit(mode).layouts[layout]


def test_the_table_is_what_was_asked_for(one: Seen) -> None:
    assert one.verdict == "equal"


def test_the_table_reads_the_same_from_inside(one: Seen) -> None:
    assert same(rows(one.told["kcore"]), one.table)


def test_the_trace_events_say_the_same(one: Seen) -> None:
    assert same(traced(one.told["trace"]), without_prot(one.table))


@pytest.mark.parametrize("mode", MODES)
def test_a_wrong_frame_is_seen(mode: str) -> None:
    for layout in LAYOUTS:
        asked, verdict = visit(mode).layouts[layout].told["asked"], visit(mode).exchanged[layout]
        for iova, *_ in (asked[0], asked[-1]):
            assert f"iova {iova:#x}-" in verdict


@pytest.mark.parametrize("mode", MODES)
def test_the_device_moves_data(mode: str) -> None:
    assert visit(mode).moved


@pytest.mark.parametrize("mode", MODES)
def test_stage_and_granule_are_those_of_the_machine(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    wanted, seen = machines()[mode].mode, visit(mode).layouts
    assert {(one.format, one.config["granule"]) for one in seen.values()} == {
        (wanted.format, GRANULES[wanted.flavour])
    }
    pages = {name: len(one.told["asked"]) for name, one in seen.items()}
    text = ", ".join(f"{name} {count}" for name, count in pages.items())
    config = next(iter(seen.values())).config
    with capsys.disabled():
        print(f"\n{mode}: {wanted.format} {dict(config)}: {sum(pages.values())} pages: {text}")
        print(f"logs: {visit(mode).logs}")


@pytest.mark.parametrize("mode", MODES)
def test_write_only_is_there_where_the_format_has_it(mode: str) -> None:
    """The first stage cannot say it: the kernel makes it rw."""
    one = visit(mode).layouts["scattered"]
    assert (PROT_W in one.table.prot) == (one.format == "arm_lpae_s2")
