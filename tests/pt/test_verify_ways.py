# SPDX-License-Identifier: Apache-2.0
"""The ways by which the sweep of verify proves a table: none proves a damaged one, each proves its own."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iokeep.pt import verify as verify_module
from iokeep.pt.extents import Extents
from iokeep.pt.registry import open_format
from iokeep.pt.verify import verify
from iokeep.pt.walk import walk

FORMATS = [
    ("amdv1", {"levels": 4}),
    ("amdv1", {"levels": 4, "c_bit": 47}),
    ("riscv64", {"levels": 3}),
    ("riscv64", {"levels": 3, "stage": 2, "svpbmt": 0}),
    ("arm_lpae_s1", {"input_bits": 39, "output_bits": 40}),
    ("arm_lpae_s2", {"granule": 16384, "input_bits": 40, "output_bits": 40}),
    ("vtdss", {}),
]
BASE = 0x4000_0000


def judged(built, truth, monkeypatch):
    """Whether anything was left to the judge."""
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(verify_module, "_judge_rest", lambda *args: seen.append(1))
        verify(*built.args, truth, compiled=False)
    return bool(seen)


def layouts(page):
    size = page << 9
    several = [(BASE, BASE + 37 * page - 1, 0x8000_0000 + 3 * page, 3)]
    several += [(BASE + 64 * page, BASE + 200 * page - 1, 0x9000_0000 + 64 * page, 1)]
    yield "one run", [(BASE, BASE + 2 * size - 1, 0x8000_0000 + 16 * page, 3)]
    yield "odd run", [(BASE, BASE + 2 * size - 1, 0x8000_0000 + page, 3)]
    yield "several", several
    scattered = ((n, 0x8000_0000 + (n * 7919 % 999) * page) for n in range(0, 300, 2))
    yield "scattered", [(BASE + n * page, BASE + n * page + page - 1, pa, 3) for n, pa in scattered]


@pytest.mark.parametrize("config", FORMATS, ids=lambda c: "-".join([c[0], *map(str, c[1].values())]))
@pytest.mark.parametrize("largest", [None, 0])
def test_what_a_kernel_writes_needs_no_judge(config, largest, new_table, monkeypatch):
    fmt = open_format(*config)
    page = 1 << fmt.levels[0].shift
    for name, rows in layouts(page):
        built, truth = new_table(fmt), Extents.of(rows)
        built.table.map(truth, None if largest is None else fmt.levels[0].shift)
        assert not judged(built, truth, monkeypatch), name


@pytest.mark.parametrize("config", FORMATS, ids=lambda c: "-".join([c[0], *map(str, c[1].values())]))
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_damaged_table_is_never_proved(config, data, new_table):
    """Any flip of any item: the sweep and the judge together say what the judge alone says."""
    fmt = open_format(*config)
    page = 1 << fmt.levels[0].shift
    for _, rows in layouts(page):
        truth = Extents.of(rows)
        built = new_table(fmt)
        built.table.map(truth)
        at = walk(*built.args, BASE).steps[-1][1] & -fmt.bytes_of(0)
        for _ in range(3):
            place = at + 8 * data.draw(st.integers(0, fmt.levels[0].items - 1))
            item = int.from_bytes(built.ram.read(place, 8), "little")
            built.ram.store64(place, item ^ 1 << data.draw(st.integers(0, 63)))
        mine = verify(*built.args, truth, compiled=False)
        alone = verify_alone(built, truth)
        assert (mine.equal, mine.total, mine.differ) == (alone.equal, alone.total, alone.differ)


def verify_alone(built, truth):
    """The judge alone."""
    kept = verify_module._proved
    verify_module._proved = lambda tm, upper, base, want, compiled: np.zeros(len(base), np.bool_)
    try:
        return verify(*built.args, truth, compiled=False)
    finally:
        verify_module._proved = kept
