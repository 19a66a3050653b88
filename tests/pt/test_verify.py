# SPDX-License-Identifier: Apache-2.0
"""verify: each bit that matters is found, none that does not; ranges are maximal; both sweeps agree."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iokeep.pt.diff import diff
from iokeep.pt.extents import Extents
from iokeep.pt.layout import kernel_layout, table_layout
from iokeep.pt.leaves import extents
from iokeep.pt.registry import open_format
from iokeep.pt.verify import verify
from iokeep.pt.walk import walk


def _flips(spec, leaf):
    """Bit -> whether a flip must be found: all but those that hardware ignores or writes itself."""
    ignored = spec.leaf_ignored if leaf else spec.table_ignored
    return {bit: not ignored >> bit & 1 for bit in range(64)}


def test_every_bit_of_a_leaf(fmt, new_table):
    for level, spec in enumerate(fmt.levels):
        if not spec.leaf:
            continue
        built = new_table(fmt)
        size = 1 << spec.shift
        truth = Extents.of([(size, 2 * size - 1, size, 3)])
        built.table.map(truth)
        found_level, at, item = walk(*built.args, size).steps[-1]
        assert found_level == level
        for bit, matters in _flips(spec, True).items():
            built.ram.store64(at, item ^ 1 << bit)
            for compiled in (False, True):
                verdict = verify(*built.args, truth, compiled=compiled)
                assert verdict.equal == (not matters), (level, bit, verdict.mismatches)
                assert (verdict.total == 0) == verdict.equal
        built.ram.store64(at, item)
        assert verify(*built.args, truth).equal


def test_every_bit_of_every_table_item(fmt, new_table):
    built = new_table(fmt)
    truth = Extents.of([(0x5000, 0x5FFF, 0x9000, 3)])
    built.table.map(truth)
    for level, at, item in walk(*built.args, 0x5000).steps[:-1]:
        for bit, matters in _flips(fmt.levels[level], False).items():
            built.ram.store64(at, item ^ 1 << bit)
            verdict = verify(*built.args, truth)
            assert verdict.equal == (not matters), (level, bit, verdict.mismatches)
        built.ram.store64(at, item)


def test_bits_of_an_item_that_is_not_present_do_not_count(fmt, new_table):
    """Hardware ignores them (VT-d 9.8, SDM 4.5): R = W = 0, P = 0."""
    built = new_table(fmt)
    truth = Extents.of([(0x5000, 0x5FFF, 0x9000, 3)])
    built.table.map(truth)
    at = walk(*built.args, 0x5000).steps[-1][1] + 8
    spec = fmt.levels[0]
    for bit in range(64):
        built.ram.store64(at, 1 << bit)
        verdict = verify(*built.args, truth)
        assert verdict.equal == (not spec.valid_mask >> bit & 1)


def test_reasons(new_table, formats):
    fmt = formats[1]
    built = new_table(fmt)
    rows = [(n << 12, (n << 12) + 0xFFF, 0x100000 + (n << 12), 3) for n in range(16, 24)]
    built.table.map(Extents.of(rows))
    base = walk(*built.args, 16 << 12).steps[-1][1]
    word = built.ram.load64(base)
    built.ram.store64(base + 8, word + 0x1000 ^ 0x4000)  # pa
    built.ram.store64(base + 16, built.ram.load64(base + 16) & ~2)  # prot
    built.ram.store64(base + 24, 0)  # missing
    built.ram.store64(base + 64, 0x777003)  # extra
    built.ram.store64(base + 32, built.ram.load64(base + 32) | 1 << 11)  # snoop
    verdict = verify(*built.args, Extents.of(rows))
    assert [(m.iova >> 12, m.reason) for m in verdict.mismatches] == [
        (17, "pa"), (18, "prot"), (19, "missing"), (20, "attrs"), (24, "extra"),
    ]  # fmt: skip
    pa, prot, missing, _, extra = verdict.mismatches
    assert (pa.expected_pa, pa.found_pa) == (0x111000, 0x115000)
    assert (prot.expected_prot, prot.found_prot) == (3, 1)
    assert (missing.found_pa, missing.level) == (None, None)
    assert (extra.expected_pa, extra.found_pa, extra.level) == (None, 0x777000, 0)
    assert verdict.pages == 4
    assert "0x11000-0x11fff" in pa.text


def test_ranges_are_maximal_and_limited(new_table, fmt):
    built = new_table(fmt)
    built.table.map(Extents.of([(0, (1 << 24) - 1, 1 << 24, 3)]), max_lg2=12)
    shifted = Extents.of([(0, (1 << 24) - 1, 1 << 25, 3)])
    verdict = verify(*built.args, shifted)
    assert verdict.total == 1
    (only,) = verdict.mismatches
    assert (only.iova, only.last, only.expected_pa, only.found_pa) == (0, (1 << 24) - 1, 1 << 25, 1 << 24)
    every_other = Extents.of([(n << 13, (n << 13) + 0xFFF, 1 << 24, 3) for n in range(1 << 11)])
    verdict = verify(*built.args, every_other, limit=5)
    assert len(verdict.mismatches) == 5
    assert verdict.total == 4096 - 1  # the first page is right
    assert verdict.pages == 1
    nothing = verify(*built.args, Extents.empty(), limit=0)
    assert (nothing.total, nothing.mismatches, nothing.equal) == (1, [], False)


def test_a_permission_taken_away_above_counts(new_table, fmt):
    built = new_table(fmt)
    truth = Extents.of([(0, 0x1FFFFF, 1 << 30, 3)])
    built.table.map(truth, max_lg2=12)
    level, at, item = walk(*built.args, 0).steps[-2]
    built.ram.store64(
        at, item & ~fmt.levels[level].tw_mask | fmt.levels[level].tr_value | fmt.levels[level].valid_mask & 1
    )
    verdict = verify(*built.args, truth)
    assert [(m.reason, m.found_prot, m.iova, m.last) for m in verdict.mismatches] == [
        ("prot", 1, 0, 0x1FFFFF)
    ]
    assert verify(*built.args, Extents.of([(0, 0x1FFFFF, 1 << 30, 1)])).equal


def test_write_only_counts_as_rw_where_it_cannot_be_said(new_table, fmt):
    built = new_table(fmt)
    want = Extents.of([(0x1000, 0x1FFF, 0x1000, 2), (0x200000, 0x3FFFFF, 0x200000, 2)])
    built.table.map(want)
    assert verify(*built.args, want).equal
    rw = Extents(want.iova, want.last, want.pa, np.full(2, 3, np.uint8))
    assert verify(*built.args, rw).equal == (not fmt.write_only)


def test_expectation_in_any_cut(new_table, fmt):
    built = new_table(fmt)
    built.table.map(Extents.of([(0, (1 << 23) - 1, 1 << 23, 3)]))
    cut = Extents.of([(n << 12, (n << 12) + 0xFFF, (1 << 23) + (n << 12), 3) for n in range(2048)])
    assert verify(*built.args, cut).equal
    odd = Extents.of([(0, 0x10, 1 << 23, 3), (0x11, (1 << 23) - 1, (1 << 23) + 0x11, 3)])
    assert verify(*built.args, odd).equal
    wrong = Extents.of([(0, 0x10, 1 << 23, 3), (0x11, (1 << 23) - 1, (1 << 23) + 0x12, 3)])
    assert [m.iova for m in verify(*built.args, wrong).mismatches] == [0x11]


@pytest.mark.parametrize("rows", [[(0, 5, 0, 3), (5, 9, 0, 3)], [(9, 0, 0, 3)], [(0, 4095, 0, 4)]])
def test_nonsense_expectations_are_refused(new_table, formats, rows):
    built = new_table(formats[0])
    with pytest.raises(ValueError, match="expected"):
        verify(*built.args, Extents.of(rows))


@st.composite
def mappings(draw):
    """Disjoint page ranges in 64 MiB, some 2M-aligned, some contiguous; with prot."""
    rows, iova = [], draw(st.integers(0, 600)) << 12
    for _ in range(draw(st.integers(1, 12))):
        pages = draw(st.sampled_from([1, 1, 2, 3, 511, 512, 513, 1024]))
        kind = draw(st.integers(0, 2))
        if kind == 0:
            iova = (iova + 0x1FFFFF) & ~0x1FFFFF
        pa = draw(st.integers(0, 1 << 20)) << 12
        if kind != 1:
            pa = (pa & ~0x1FFFFF) | (iova & 0x1FFFFF)
        rows.append((iova, iova + (pages << 12) - 1, pa, draw(st.sampled_from([3, 3, 1, 2]))))
        iova += (pages + draw(st.integers(0, 3))) << 12
    return Extents.of(rows)


@settings(max_examples=60)
@given(data=st.data(), want=mappings(), seed=st.integers(0, 3), small=st.booleans())
def test_both_sweeps_and_a_damaged_item(formats, new_table, data, want, seed, small):
    fmt = data.draw(st.sampled_from(formats))
    built = new_table(fmt, size=1 << 20, seed=seed)
    built.table.map(want, max_lg2=12 if small else None)
    for compiled in (False, True):
        assert verify(*built.args, want, compiled=compiled).equal
    row = data.draw(st.integers(0, len(want) - 1))
    page = data.draw(st.integers(0, (int(want.last[row]) - int(want.iova[row])) >> 12))
    iova = int(want.iova[row]) + (page << 12)
    level, at, item = walk(*built.args, iova).steps[-1]
    bit = data.draw(st.integers(0, 63))
    built.ram.store64(at, item ^ 1 << bit)
    verdicts = [verify(*built.args, want, limit=100, compiled=c) for c in (False, True)]
    assert verdicts[0] == verdicts[1]
    assert verdicts[0].equal == bool(fmt.levels[level].leaf_ignored >> bit & 1)
    for m in verdicts[0].mismatches:
        assert m.iova <= iova <= m.last or fmt.levels[level].shift > 12


def test_diff_translation_and_layout_apart(new_table, fmt):
    truth = Extents.of([(0, (1 << 22) - 1, 1 << 22, 3), (1 << 30, (1 << 30) + 0xFFF, 0x1000, 1)])
    large, small, other = new_table(fmt, seed=1), new_table(fmt, seed=2), new_table(fmt, seed=3)
    large.table.map(truth)
    small.table.map(truth, max_lg2=12)
    same = diff(*large.args, *small.args)
    assert same.equal
    big_leaves = 21 in fmt.leaf_lg2s
    assert same.layout_equal == (not big_leaves)
    if big_leaves:
        assert [(r.iova, r.last, r.lg2_a, r.lg2_b) for r in same.layout] == [(0, (1 << 22) - 1, 21, 12)]
    other.table.map(Extents.of([(0, (1 << 22) - 1, 1 << 22, 3)]))
    verdict = diff(*large.args, *other.args)
    assert [(m.reason, m.iova) for m in verdict.mismatches] == [("missing", 1 << 30)]
    assert diff(*other.args, *large.args).mismatches[0].reason == "extra"


def test_diff_names_bad_items_of_either_side(new_table, formats):
    fmt = formats[6]  # output_bits 46: bits 51:46 are reserved
    truth = Extents.of([(0, 0xFFF, 0x1000, 3), (0x2000, 0x2FFF, 0x5000, 3)])
    a, b = new_table(fmt), new_table(fmt)
    a.table.map(truth)
    b.table.map(truth)
    at = walk(*a.args, 0).steps[-1][1]
    a.ram.store64(at, a.ram.load64(at) | 1 << 50)
    assert {m.reason for m in diff(*a.args, *b.args).mismatches} == {"reserved", "extra"}
    assert {m.reason for m in diff(*b.args, *a.args).mismatches} == {"reserved"}


def test_layout_of_a_table_is_what_the_kernel_chooses(new_table, fmt):
    areas = Extents.of([(0x1FF000, 0x7FFFFF, 0x1FF000, 3), (1 << 30, (3 << 30) - 1, 1 << 32, 3)])
    built = new_table(fmt, size=16 << 20)
    built.table.map(areas)
    found, want = table_layout(*built.args), kernel_layout(fmt, areas)
    for a, b in ((found.iova, want.iova), (found.last, want.last), (found.lg2, want.lg2)):
        assert a.tolist() == b.tolist()
    assert extents(*built.args)[0].iova.tolist() == areas.canonical().iova.tolist()


def test_an_absent_table_that_skips_levels_spans_what_it_would_cover(new_table):
    """The whole comparison and that of a range name the same IOVAs: beyond it nothing translates anyway."""
    fmt = open_format("amdv1", {"levels": 4})
    built = new_table(fmt)
    far = 4 << 20
    want = Extents.of([(0, 0xFFF, 0x5000, 3), (far, far + 0xFFF, 0x6000, 3)])
    built.table.map(want)
    _, at, item = walk(*built.args, 0).steps[0]
    spec = fmt.levels[fmt.top_level]
    mask, value = next((m, v) for m, v, level in spec.next_levels if level == 0)
    lost = built.ram.size * 2
    built.ram.store64(at, item & ~(mask | spec.table_pa_mask) | value | lost)
    whole = verify(*built.args, want).mismatches
    assert [(m.iova, m.last, m.reason) for m in whole] == [
        (0, (2 << 20) - 1, "absent"),
        (far, far + 0xFFF, "missing"),
    ]
    assert verify(*built.args, want, start=2 << 20, last=far - 1).equal
    assert not verify(*built.args, want, start=0, last=0xFFF).equal
