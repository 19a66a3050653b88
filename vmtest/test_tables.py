# SPDX-License-Identifier: Apache-2.0
"""Tables that a real kernel wrote, by every witness: read from outside of the machine and from inside, the
kernel's own
dump, its trace events, and what was asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from iokeep.mem.ram import Ram
from iokeep.pt.extents import PROT_R, PROT_W, Extents
from iokeep.pt.leaves import extents
from iokeep.pt.registry import open_format
from iokeep.pt.roots.find import find_root_of
from iokeep.pt.verify import verify
from vmtest import vm
from vmtest.guest_programs import Boot, counts, in_turn, module, pytest_of

LAYOUTS = ("scattered", "huge", "edges", "process-memory", "contiguous", "emptied")


@dataclass(frozen=True, slots=True)
class Seen:
    """One layout while it was mapped."""

    told: Mapping[str, Any]
    table: Extents
    verdict: str
    format: str


def rows(values: list[list[int]]) -> Extents:
    """Extents out of rows."""
    return Extents.of([tuple(row) for row in values]).canonical()  # type: ignore[misc]


def look(told: Mapping[str, Any], ram: Ram) -> Seen:
    """Read the device's table out of the machine's RAM."""
    found = find_root_of(told["hw"], ram, iommu=told["hw"]["iommu"])
    assert found is not None
    assert found.table is not None
    fmt = open_format(found.table.format, found.table.config)
    table, problems = extents(fmt, ram, found.table.root_pa)
    assert not len(problems)
    verdict = verify(fmt, ram, found.table.root_pa, rows(told["asked"]))
    text = "equal" if verdict.equal else "; ".join(each.text for each in verdict.mismatches)
    return Seen(told, table, text, fmt.name)


@Boot
def visit(mode: str) -> tuple[dict[str, Seen], dict[str, int]]:
    """Boot once for each IOMMU: every layout in it, and guest/test_client.py."""
    out = {}
    program = in_turn(module("tables"), pytest_of("--confcutdir=vmtest/guest", "vmtest/guest/test_client.py"))
    with vm.boot(vm.machines()[mode], program, name=mode, seconds=400) as guest:
        ram = guest.memory()
        for told in guest.documents():
            out[told["layout"]] = look(told, ram)
            guest.send(go="on")
        guest.check_status()
    assert not guest.kernel_complaints(), f"see {guest.directory}"
    return out, counts(guest.directory)


CASES = [visit.case(mode, f"{mode}/{layout}") for mode in vm.machines() for layout in LAYOUTS]


@pytest.fixture(params=CASES)
def one(request: pytest.FixtureRequest) -> Seen:
    """One layout behind one IOMMU."""
    mode, layout = request.param.split("/")
    return visit(mode)[0][layout]


def same(a: Extents, b: Extents) -> bool:
    """The same translations."""
    pairs = ((a.iova, b.iova), (a.last, b.last), (a.pa, b.pa), (a.prot, b.prot))
    return all(np.array_equal(x, y) for x, y in pairs)


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
    pages: dict[int, int] = {}
    for line in one.told["trace"]:
        fields = {k: int(v, 0) for k, v in re.findall(r"(iova|paddr|size)=(0x[0-9a-f]+|\d+)", line)}
        for at in range(0, fields["size"], 4096):
            if "paddr" in fields:
                pages[fields["iova"] + at] = fields["paddr"] + at
            else:
                pages.pop(fields["iova"] + at, None)
    traced = Extents.of([(iova, iova + 4095, pa, 3) for iova, pa in pages.items()]).canonical()
    table = one.table
    blind = Extents(table.iova, table.last, table.pa, np.full(len(table), 3, np.uint8)).canonical()
    assert same(traced, blind)


MODES = [visit.case(mode) for mode in vm.machines()]


@pytest.mark.parametrize("mode", MODES)
def test_write_only_is_there_where_the_format_has_it(mode: str) -> None:
    """First stage cannot say it: the kernel makes it rw."""
    one = visit(mode)[0]["scattered"]
    assert (PROT_W in one.table.prot) == (one.format != "x86_64")


@pytest.mark.parametrize("mode", MODES)
def test_the_format_is_that_of_the_iommu(mode: str) -> None:
    assert {one.format for one in visit(mode)[0].values()} == {vm.machines()[mode].mode.format}


@pytest.mark.parametrize("mode", MODES)
def test_the_clients_work(mode: str) -> None:
    """guest/test_client.py, in the guest."""
    ran = visit(mode)[1]
    assert ran["tests"] >= 13
    assert ran["failures"] == ran["errors"] == ran["skipped"] == 0
