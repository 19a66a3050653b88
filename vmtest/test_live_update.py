# SPDX-License-Identifier: Apache-2.0
"""A real live update: a VMM is carried over a kexec of the real kernel, and everything is proved
afterwards.
"""

from __future__ import annotations

import numpy as np
import pytest

from vmtest import vm
from vmtest.visits import visit


@pytest.fixture(params=[visit.case(mode) for mode in vm.machines()])
def mode(request: pytest.FixtureRequest) -> str:
    """Every IOMMU."""
    return str(request.param)


def test_a_guest_is_restored_over_a_real_kexec(mode: str) -> None:
    one = visit(mode)
    assert one.steps["restored"]["outcome"] == "restored", one.text
    assert one.steps["restored"]["content"]
    assert "DMA works" in one.text.partition("the second one")[2]


def test_every_iova_leads_where_it_led(mode: str) -> None:
    """Read from outside of the machine, before and after: IOVA -> PA and permissions."""
    before, after = visit(mode).tables["before"], visit(mode).tables["restored"]
    for a, b in ((before.iova, after.iova), (before.last, after.last), (before.pa, after.pa)):
        assert np.array_equal(a, b)
    assert np.array_equal(before.prot, after.prot)
    assert before.mapped_bytes > 8 << 20


def test_a_wrong_replay_is_refused_and_named(mode: str) -> None:
    """Four mistakes, of a page each: all are named, and nothing else."""
    steps = visit(mode).steps
    assert steps["refused"]["outcome"] == "refused"
    reasons = [each["reason"] for each in steps["refused"]["mismatches"]]
    assert sorted(reasons) == ["extra", "missing", "pa", "prot"]


def test_the_kernel_says_that_it_carries_no_domains(mode: str) -> None:
    """When this fails, a kernel can: then it is time to use save() and restore() here."""
    assert "carries domains over a kexec: no" in visit(mode).text
