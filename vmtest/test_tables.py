# SPDX-License-Identifier: Apache-2.0
"""Tables that a real kernel wrote, by every witness: read from outside of the machine and from inside, the
kernel's own
dump, its trace events, and what was asked for."""

from __future__ import annotations

import re

import pytest

from iokeep.pt.extents import PROT_R, PROT_W, Extents
from vmtest import vm
from vmtest.visits import visit
from vmtest.witnesses import Seen, rows, same, traced, without_prot

LAYOUTS = ("scattered", "huge", "edges", "process-memory", "contiguous", "emptied")


CASES = [visit.case(mode, f"{mode}/{layout}") for mode in vm.machines() for layout in LAYOUTS]


@pytest.fixture(params=CASES)
def one(request: pytest.FixtureRequest) -> Seen:
    """One layout behind one IOMMU."""
    mode, layout = request.param.split("/")
    return visit(mode).layouts[layout]


def test_the_table_is_what_was_asked_for(one: Seen) -> None:
    assert one.verdict == "equal"


def test_the_table_reads_the_same_from_inside(one: Seen) -> None:
    for path in ("kcore", "devmem"):
        assert same(rows(one.told[path]), one.table), path


def test_the_kernels_dump_says_the_same(one: Seen) -> None:
    """Only VT-d's driver has one. Entries are read here by plain arithmetic, not by our formats."""
    if one.format == "amdv1":
        assert not one.told["debugfs"]
        return
    found = []
    for line in one.told["debugfs"].splitlines():
        match = re.match(r"0x([0-9a-f]+) \|((?:\s+0x[0-9a-f]{16})+)$", line)
        if match:
            path = [int(word, 16) for word in match[2].split()]
            iova, entry, lg2 = int(match[1], 16) << 12, path[-1], 12 + 9 * (5 - len(path))
            prot = entry & 3 if one.format == "vtdss" else PROT_R | (entry & 2)
            found.append((iova, iova + (1 << lg2) - 1, entry & ((1 << 52) - 1) & -(1 << lg2), prot))
    assert same(Extents.of(found).canonical(), one.table)


def test_the_trace_events_say_the_same(one: Seen) -> None:
    assert same(traced(one.told["trace"]), without_prot(one.table))


MODES = [visit.case(mode) for mode in vm.machines()]


@pytest.mark.parametrize("mode", MODES)
def test_write_only_is_there_where_the_format_has_it(mode: str) -> None:
    """First stage cannot say it: the kernel makes it rw."""
    one = visit(mode).layouts["scattered"]
    assert (PROT_W in one.table.prot) == (one.format != "x86_64")


@pytest.mark.parametrize("mode", MODES)
def test_the_format_is_that_of_the_iommu(mode: str) -> None:
    assert {one.format for one in visit(mode).layouts.values()} == {vm.machines()[mode].mode.format}


@pytest.mark.parametrize("mode", MODES)
def test_the_clients_work(mode: str) -> None:
    """guest/test_client.py, in the guest."""
    ran = visit(mode).clients
    assert ran["tests"] >= 13
    assert ran["failures"] == ran["errors"] == ran["skipped"] == 0
