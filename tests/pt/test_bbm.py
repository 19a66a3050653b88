# SPDX-License-Identifier: Apache-2.0
"""Which break-before-make level allows a live switch, and the ranges where it does not."""

import pytest

from iokeep.pt.diff import diff
from iokeep.pt.extents import Extents
from iokeep.pt.registry import open_format
from iokeep.pt.walk import walk

TRUTH = Extents.of([(0, 0x3FFFFF, 1 << 30, 3), (1 << 30, (1 << 30) + 0xFFFF, 1 << 31, 3)])


def allowed(verdict):
    return [verdict.bbm.allowed(level) for level in range(3)]


@pytest.fixture
def pair(new_table):
    def make(max_a=None, max_b=None, truth=TRUTH, name="arm_lpae_s2"):
        out = []
        for size in (max_a, max_b):
            built = new_table(open_format(name, {}))
            built.table.map(truth, max_lg2=size)
            out.append(built)
        return out

    return make


def flip(built, iova, bits):
    _, at, item = walk(*built.args, iova).steps[-1]
    built.ram.store64(at, item ^ bits)


def test_the_same_cut_is_always_allowed(pair):
    a, b = pair()
    assert allowed(diff(*a.args, *b.args)) == [True, True, True]


def test_another_size_needs_level_2(pair):
    a, b = pair(None, 12)
    for verdict in (diff(*a.args, *b.args), diff(*b.args, *a.args)):
        assert verdict.equal
        assert allowed(verdict) == [False, False, True]
        (only,) = verdict.bbm.ranges[0]
        assert (only.iova, only.last, only.kind, only.level) == (0, 0x3FFFFF, "size", 2)
        assert verdict.bbm.blocked == (1, 1, 0)


def test_level_1_wants_nt_in_the_larger_leaf(pair):
    a, b = pair(None, 12)
    flip(a, 0, 1 << 16)
    flip(a, 0x200000, 1 << 16)
    bbm = diff(*a.args, *b.args).bbm
    assert [(r.kind, r.level) for r in bbm.ranges[0]] == [("size", 1)]
    assert bbm.blocked == (1, 0, 0)
    only_one = pair(None, 12)
    flip(only_one[0], 0, 1 << 16)
    bbm = diff(*only_one[0].args, *only_one[1].args).bbm
    assert [(r.iova, r.last, r.kind) for r in bbm.ranges[1]] == [(0x200000, 0x3FFFFF, "size")]


def test_the_contiguous_bit_alone(pair):
    a, b = pair(12, 12)
    for n in range(16):
        flip(b, (1 << 30) + (n << 12), 1 << 52)
    verdict = diff(*a.args, *b.args)
    assert verdict.equal
    assert verdict.layout_equal is False
    assert allowed(verdict) == [False, False, True]
    (only,) = verdict.bbm.ranges[1]
    assert (only.kind, only.lg2_a, only.lg2_b) == ("contiguous", 12, 16)
    assert (only.iova, only.last) == (1 << 30, (1 << 30) + 0xFFFF)


def test_no_level_allows_another_oa_or_attribute(pair):
    for bits, kind in ((1 << 20, "pa"), (1 << 4, "attrs")):
        a, b = pair(12, 12)
        flip(b, 1 << 30, bits)
        bbm = diff(*a.args, *b.args).bbm
        assert bbm.blocked == (1, 1, 1)
        assert [(r.iova, r.kind, r.level) for r in bbm.ranges[2]] == [(1 << 30, kind, None)]
        assert diff(*a.args, *b.args, limit=0).bbm.blocked == (1, 1, 1)


def test_a_permission_or_a_new_page_is_allowed(pair):
    a, b = pair(12, 12)
    flip(b, 1 << 30, 1 << 7)
    b.table.map(Extents.of([(2 << 30, (2 << 30) + 0xFFF, 0x1000, 3)]))
    verdict = diff(*a.args, *b.args)
    assert {m.reason for m in verdict.mismatches} == {"prot", "extra"}
    assert allowed(verdict) == [True, True, True]


def test_ranges_are_limited_and_counted(pair):
    truth = Extents.of([(n << 22, (n << 22) + 0x1FFFFF, 1 << 30, 3) for n in range(20)])
    a, b = pair(None, 12, truth, "vtdss")
    bbm = diff(*a.args, *b.args, limit=3).bbm
    assert bbm.blocked == (20, 20, 0)
    assert [r.iova >> 22 for r in bbm.ranges[0]] == [0, 1, 2]
