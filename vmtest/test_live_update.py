# SPDX-License-Identifier: Apache-2.0
"""A real live update: a VMM is carried over a kexec of the real kernel, and everything is proved
afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from iokeep.pt.extents import Extents
from iokeep.pt.leaves import extents
from iokeep.pt.registry import open_format
from iokeep.pt.roots.find import find_root_of
from vmtest import vm
from vmtest.guest_programs import Boot, in_turn, module


def table_now(guest: vm.Guest, hw: Mapping[str, Any]) -> Extents:
    """The device's translations, read from outside of the machine."""
    ram = guest.memory()
    found = find_root_of(hw, ram, iommu=hw["iommu"])
    assert found is not None
    assert found.table is not None
    table, problems = extents(open_format(found.table.format, found.table.config), ram, found.table.root_pa)
    assert not len(problems)
    return table


@Boot
def update(mode: str) -> tuple[dict[str, dict[str, Any]], dict[str, Extents], str]:
    """One live update: what the guest said at each step, tables before and after, and its transcript."""
    steps, tables = {}, {}
    boot = vm.boot(
        vm.machines()[mode], in_turn(module("live_update")), name=f"live-update-{mode}", seconds=400
    )
    with boot as guest:
        for told in guest.documents():
            steps[told["step"]] = told
            if "hw" in told:
                tables[told["step"]] = table_now(guest, told["hw"])
            guest.send(go="on")
        guest.check_status()
        text = (guest.directory / "output.log").read_text()
        print(text, f"logs: {guest.directory}", sep="")
    return steps, tables, text


@pytest.fixture(params=[update.case(mode) for mode in vm.machines()])
def mode(request: pytest.FixtureRequest) -> str:
    """Every IOMMU."""
    return str(request.param)


def test_a_guest_is_restored_over_a_real_kexec(mode: str) -> None:
    steps, _, text = update(mode)
    assert steps["restored"]["outcome"] == "restored", text
    assert steps["restored"]["content"]
    assert "DMA works" in text.partition("the second one")[2]


def test_every_iova_leads_where_it_led(mode: str) -> None:
    """Read from outside of the machine, before and after: IOVA -> PA and permissions."""
    _, tables, _ = update(mode)
    before, after = tables["before"], tables["restored"]
    for a, b in ((before.iova, after.iova), (before.last, after.last), (before.pa, after.pa)):
        assert np.array_equal(a, b)
    assert np.array_equal(before.prot, after.prot)
    assert before.mapped_bytes > 8 << 20


def test_a_wrong_replay_is_refused_and_named(mode: str) -> None:
    """Four mistakes, of a page each: all are named, and nothing else."""
    steps, _, _ = update(mode)
    assert steps["refused"]["outcome"] == "refused"
    reasons = [each["reason"] for each in steps["refused"]["mismatches"]]
    assert sorted(reasons) == ["extra", "missing", "pa", "prot"]


def test_the_kernel_says_that_it_carries_no_domains(mode: str) -> None:
    """When this fails, a kernel can: then it is time to use save() and restore() here."""
    _, _, text = update(mode)
    assert "carries domains over a kexec: no" in text
