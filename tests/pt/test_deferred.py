# SPDX-License-Identifier: Apache-2.0
"""Deferred proof: the verdict of a whole verify, whatever is needed in which order, at a bounded cost."""

import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iokeep.mem.ranges import Range, RangeSet, merge
from iokeep.pt.deferred import NAMED, Deferred
from iokeep.pt.extents import Extents
from iokeep.pt.registry import open_format
from iokeep.pt.verify import verify
from iokeep.pt.walk import walk

ALL = 2**64 - 1
CONFIGS = [
    ("vtdss", {"levels": 3}),
    ("vtdss", {"levels": 4}),
    ("x86_64", {"levels": 4}),
    ("x86_64", {"levels": 5}),
    ("amdv1", {"levels": 4}),
    ("riscv64", {"levels": 3, "stage": 1}),
    ("arm_lpae_s1", {"granule": 4096, "input_bits": 39, "output_bits": 40, "ttbr": 1}),
    ("arm_lpae_s2", {"granule": 4096, "input_bits": 44, "output_bits": 44}),
    ("s390_zpci", {"levels": 3}),
]
FORMATS = [open_format(*config) for config in CONFIGS]
ids = [f"{fmt.name}-{fmt.config.get('levels', fmt.config.get('input_bits'))}" for fmt in FORMATS]
every = pytest.mark.parametrize("fmt", FORMATS, ids=ids)


def base_of(fmt):
    """The first IOVA of the format's space."""
    return int(fmt.extend(np.zeros(1, np.uint64))[0])


def shifted(rows, by):
    return [(a + by, b + by, pa, prot) for a, b, pa, prot in rows]


def differing(fmt, built, want):
    """What a whole verify calls different, as ranges; and its mismatches."""
    verdict = verify(*built.args, want, limit=1 << 20)
    return merge([Range(m.iova, m.last) for m in verdict.mismatches]), verdict


def of(built, want, **kw):
    return Deferred(*built.args, lambda start, last: want, **kw)


@st.composite
def layouts(draw):
    """Disjoint ranges of pages in the first 3 GiB, contiguous or not, large leaves or small."""
    rows, iova = [], draw(st.integers(0, 600)) << 12
    for _ in range(draw(st.integers(1, 8))):
        pages = draw(st.sampled_from([1, 2, 3, 16, 511, 512, 513, 1024]))
        if draw(st.booleans()):
            iova = (iova + 0x1FFFFF) & ~0x1FFFFF
        pa = draw(st.integers(0, 1 << 19)) << 12
        if draw(st.booleans()):
            pa = (pa & ~0x1FFFFF) | (iova & 0x1FFFFF)
        rows.append((iova, iova + (pages << 12) - 1, pa, draw(st.sampled_from([3, 3, 1, 2]))))
        iova += (pages + draw(st.sampled_from([0, 1, 5, 512, 1 << 17]))) << 12
    return rows


@settings(max_examples=150)
@given(
    fmt=st.sampled_from(FORMATS),
    rows=layouts(),
    small=st.booleans(),
    faults=st.integers(0, 3),
    replay=st.booleans(),
    compiled=st.booleans(),
    order=st.integers(0, 1 << 30),
)
def test_the_same_as_a_whole_verify(new_table, fmt, rows, small, faults, replay, compiled, order):
    rng = random.Random(order)
    base = base_of(fmt)
    want = Extents.of(shifted(rows, base))
    built = new_table(fmt, size=2 << 20, seed=1)
    built.table.map(want, max_lg2=12 if small else None)
    items = []
    for _ in range(faults):
        row = rng.choice(rows)
        iova = base + row[0] + (rng.randrange(((row[1] - row[0]) >> 12) + 1) << 12)
        items.append(rng.choice(walk(*built.args, iova).steps)[1])
    for at in items:
        built.ram.write(at, (built.ram.load64(at) ^ 1 << rng.randrange(64)).to_bytes(8, "little"))
    if replay:  # what was replayed is not what was mapped
        wrong = [r for r in shifted(rows, base) if rng.random() < 0.5]
        want = Extents.of(wrong) if wrong else Extents.empty()
    bad, verdict = differing(fmt, built, want)
    proved, condemned = RangeSet(), []
    state = of(built, want, compiled=compiled, proved=lambda r: proved.add(*r), condemned=condemned.append)
    top = rows[-1][1] + (1 << 22)
    while not state.done:
        if rng.random() < 0.5:
            state.sweep(rng.choice([1, 4096, 1 << 15, 1 << 20]))
        else:
            a = rng.randrange((top >> 12) + 1) << 12
            b = rng.choice([a + 0xFFF, a + 0x1FFFFF, a + (1 << 30) - 1, ALL - base])
            found = state.need(base + a, base + b)
            hit = any(r.overlaps(Range(base + a, base + b)) for r in bad)
            if not any(m.reason == "loop" for m in verdict.mismatches):
                assert bool(found) == hit if verdict.total <= NAMED else bool(found) >= hit
    assert list(proved) == list(state.validated)
    assert merge([q.range for q in condemned]) == list(state.quarantined)
    assert not any(state.validated.touches(*r) for r in state.quarantined)
    assert state.validated.size + state.quarantined.size == 1 << 64
    assert state.sound == (not condemned)
    if any(m.reason == "loop" for m in verdict.mismatches):
        assert verdict.total  # a page at two levels: each piece is judged by what it translates
    elif verdict.total > NAMED:
        # Too many to be told apart (s390: zeroes are valid): the rest of a piece is quarantined with them.
        assert not any(state.validated.touches(*r) for r in bad)
    else:
        assert list(state.quarantined) == bad


@every
def test_starts_with_nothing_and_proves_what_is_needed(fmt, new_table):
    base = base_of(fmt)
    want = Extents.of(shifted([(0, (64 << 20) - 1, 0, 3), (1 << 30, (1 << 30) + 0x1FFF, 0x5000, 1)], base))
    built = new_table(fmt, size=2 << 20)
    built.table.map(want, max_lg2=12)
    asked = []

    def expect(start, last):
        asked.append((start, last))
        return want

    state = Deferred(*built.args, expect)
    assert (len(state.validated), len(state.quarantined), state.table_bytes, state.done) == (0, 0, 0, False)
    assert state.need(base + 0x3000, base + 0x3FFF) == []
    assert asked == [(base + 0x3000, base + 0x3FFF)]
    assert list(state.validated) == [Range(base + 0x3000, base + 0x3FFF)]
    path = sum(fmt.bytes_of(level) for level in range(len(fmt.levels)))
    assert state.table_bytes <= path
    assert state.need(base + 0x2000, base + 0x4FFF) == []
    assert asked[1:] == [(base + 0x2000, base + 0x2FFF), (base + 0x4000, base + 0x4FFF)]
    assert state.need(base + 0x2000, base + 0x4FFF) == []
    assert len(asked) == 3
    pieces = 0
    while state.sweep(fmt.bytes_of(0)):
        pieces += 1
    assert state.sound
    assert pieces > 8  # a small budget: many small pieces
    assert state.sweep(1 << 20) == 0


class Owner:
    """Changes a table as iommufd does: only what is proved, and what is expected with it."""

    def __init__(self, built, rows, **kw):
        self.built, self.rows = built, list(rows)
        built.table.map(Extents.of(rows), max_lg2=12)
        self.state = Deferred(*built.args, self.expect, **kw)

    def expect(self, start, last):
        return Extents.of(self.rows) if self.rows else Extents.empty()

    def unmap(self, row):
        """As ``IOAS_UNMAP`` of an area. :return: whether it was sound."""
        if self.state.need(row[0], row[1]):
            return False
        self.built.table.unmap(row[0], row[1])
        self.rows.remove(row)
        return True

    def map(self, row):
        """As ``IOAS_MAP`` into a hole; ``expect`` does not know it before it is there."""
        if self.state.need(row[0], row[1]):
            return False
        self.built.table.map(Extents.of([row]), max_lg2=12)
        self.rows.append(row)
        return True


@settings(max_examples=100)
@given(
    fmt=st.sampled_from(FORMATS),
    rows=layouts(),
    compiled=st.booleans(),
    bad=st.booleans(),
    order=st.integers(0, 1 << 30),
)
def test_the_table_changes_while_it_is_swept(new_table, fmt, rows, compiled, bad, order):
    """In the midst of a block too: whatever is changed was proved, and all that is left is found."""
    rng = random.Random(order)
    base = base_of(fmt)
    built = new_table(fmt, size=4 << 20, seed=1)
    owner = Owner(built, shifted([(*row[:3], row[3] | 1) for row in rows], base), compiled=compiled)
    state, broken = owner.state, []
    if bad:
        row = rng.choice(owner.rows)
        iova = row[0] + (rng.randrange(((row[1] - row[0]) >> 12) + 1) << 12)
        level, at, _ = walk(*built.args, iova).steps[-1]
        word = fmt.levels[level].pa_word(1 << 33)
        built.ram.write(at, (built.ram.load64(at) ^ word).to_bytes(8, "little"))
        broken = [Range(iova, iova + 0xFFF)]
    while not state.done:
        step = rng.random()
        if step < 0.7:
            state.sweep(rng.choice([1, 4096, 1 << 15]))
        elif step < 0.85 and owner.rows:
            row = rng.choice(owner.rows)
            hit = any(r.overlaps(Range(row[0], row[1])) for r in broken)
            assert owner.unmap(row) == (not hit)
        else:
            iova = base + (rng.randrange(1 << 20) << 12)
            row = (iova, iova + (rng.choice([1, 3, 600]) << 12) - 1, rng.randrange(1 << 18) << 12, 3)
            if not any(a <= row[1] and row[0] <= b for a, b, _, _ in owner.rows):
                assert owner.map(row)
    assert list(state.quarantined) == broken
    assert differing(fmt, built, owner.expect(0, ALL))[0] == broken


@pytest.mark.parametrize("compiled", [True, False])
def test_a_tick_costs_no_more_than_its_tables(compiled, new_table):
    """What is expected is asked, and the upper tables are read, once for many ticks."""
    fmt = FORMATS[1]
    want = Extents.of([(0, (2 << 30) - 1, 0, 3)])
    built = new_table(fmt, size=8 << 20, seed=1)
    built.table.map(want, max_lg2=12)
    asked = []

    def expect(start, last):
        asked.append((start, last))
        return want

    state = Deferred(*built.args, expect, compiled=compiled)
    ticks = 0
    while read := state.sweep(16384):
        assert read <= 2 * 16384
        ticks += 1
    assert state.sound
    assert ticks > 256
    assert len(asked) < 16
    size = verify(*built.args, want).table_bytes
    assert state.table_bytes < size * 1.1


def test_where_each_page_is_expected_apart_less_is_looked_up_ahead(new_table):
    fmt = FORMATS[1]
    pages = np.arange(1 << 18, dtype=np.uint64) << np.uint64(12)
    prot = np.full(len(pages), 3, np.uint8)
    want = Extents(pages, pages + np.uint64(0xFFF), pages[::-1].copy(), prot)
    built = new_table(fmt, size=4 << 20)
    built.table.map(want, max_lg2=12)
    asked = []

    def expect(start, last):
        lo, hi = start >> 12, min((last >> 12) + 1, 1 << 18)
        asked.append(max(hi - lo, 0))
        return Extents(want.iova[lo:hi], want.last[lo:hi], want.pa[lo:hi], want.prot[lo:hi])

    state = Deferred(*built.args, expect)
    while state.sweep(1 << 16):
        pass
    assert state.sound
    assert max(asked) <= 1 << 17


def test_a_sweep_does_not_start_numba():
    code = (
        "import sys\n"
        "from iokeep.bench.cases import Case, build\n"
        "from iokeep.pt.deferred import Deferred\n"
        "b = build(Case('adopt', 'vtdss', 'contiguous', 'shuffled', '4K', 1 << 28))\n"
        "state = Deferred(b.fmt, b.ram, b.root_pa, lambda start, last: b.extents)\n"
        "while state.sweep(1 << 16):\n    pass\n"
        "assert state.sound\n"
        "assert state.need(0, 1 << 20) == []\n"
        "sys.exit('numba' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@every
def test_a_budget_bounds_a_piece(fmt, new_table):
    base = base_of(fmt)
    want = Extents.of(shifted([(0, (256 << 20) - 1, 0, 3)], base))
    built = new_table(fmt, size=4 << 20)
    built.table.map(want, max_lg2=12)
    state = of(built, want)
    budget = 16 * fmt.bytes_of(0)
    upper = sum(fmt.bytes_of(level) for level in range(1, len(fmt.levels)))
    while read := state.sweep(budget):
        assert read <= 2 * budget + 2 * upper
    assert state.sound


def test_exactly_the_wrong_page_is_quarantined(new_table):
    fmt = FORMATS[1]
    want = Extents.of([(0, (4 << 20) - 1, 0, 3)])
    built = new_table(fmt)
    built.table.map(want, max_lg2=12)
    at = walk(*built.args, 0x7000).steps[-1][1]
    built.ram.store64(at, built.ram.load64(at) ^ 0x8000)
    state = of(built, want)
    assert state.need(0x6000, 0x8FFF) == [Range(0x7000, 0x7FFF)]
    (found,) = state.mismatches
    assert (found.iova, found.last, found.reason, found.expected_pa, found.found_pa) == (
        0x7000, 0x7FFF, "pa", 0x7000, 0xF000,
    )  # fmt: skip
    built.ram.store64(at, built.ram.load64(at) ^ 0x8000)
    assert state.need(0x7000, 0x7FFF), "judged once: what was found wrong stays so"
    state.sweep(1 << 30)
    assert state.done
    assert list(state.quarantined) == [Range(0x7000, 0x7FFF)]


def test_a_bad_upper_item_condemns_what_was_asked_of_its_span(new_table):
    fmt = FORMATS[1]
    want = Extents.of([(0, (8 << 20) - 1, 0, 3)])
    built = new_table(fmt)
    built.table.map(want, max_lg2=12)
    level, at, item = walk(*built.args, 0x20_0000).steps[-2]
    free = fmt.levels[level].table_reserved & ~item
    built.ram.store64(at, item | (free & -free))
    state = of(built, want)
    assert state.need(0x20_3000, 0x20_3FFF) == [Range(0x20_3000, 0x20_3FFF)]
    assert state.need(0x0, 0x1F_FFFF) == []
    state.sweep(1 << 30)
    assert list(state.quarantined) == [Range(0x20_0000, 0x3F_FFFF)]
    assert {m.reason for m in state.mismatches} == {"reserved"}


def test_more_differences_than_are_named(new_table):
    fmt = FORMATS[1]
    built = new_table(fmt)
    built.table.map(Extents.of([(0, (4 << 20) - 1, 0, 3)]), max_lg2=12)
    every_other = Extents.of([(n << 13, (n << 13) + 0xFFF, n << 13, 3) for n in range(1 << 9)])
    state = of(built, every_other)
    assert state.need(0, (4 << 20) - 1)
    assert len(state.mismatches) == NAMED
    assert state.total == 512
    assert list(state.quarantined)[-1].last == (4 << 20) - 1
    assert state.validated.touches(0, 0xFFF)
    assert not state.quarantined.touches(0, 0xFFF)


@pytest.mark.parametrize("root", [1 << 40, 0x1000])
def test_a_root_that_is_no_table_condemns_everything(new_table, root):
    fmt = FORMATS[1]
    built = new_table(fmt)
    want = Extents.of([(0, 0xFFF, 0, 3)])
    state = Deferred(
        fmt, built.ram, root if root > 1 << 32 else built.table.root_pa + 0x10, lambda a, b: want
    )
    assert state.need(1 << 30, (1 << 30) + 0xFFF)
    assert state.done
    assert list(state.quarantined) == [Range(0, ALL)]
    assert state.mismatches[0].reason == "absent"
    assert state.sweep(1 << 20) == 0


def test_what_the_expectation_raises_changes_nothing(new_table):
    fmt = FORMATS[1]
    built = new_table(fmt)

    def expect(start, last):
        raise KeyError(start)

    state = Deferred(*built.args, expect)
    with pytest.raises(KeyError):
        state.need(0, 0xFFF)
    with pytest.raises(KeyError):
        state.sweep(4096)
    assert state.unknown(0, ALL) == [Range(0, ALL)]


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 60), st.integers(0, 12)), max_size=25),
    st.integers(0, 70),
)
def test_range_set(steps, at):
    kept, model = RangeSet(), set()
    for add, start, n in steps:
        (kept.add if add else kept.discard)(start, start + n)
        values = range(start, start + n + 1)
        model = model | set(values) if add else model - set(values)
    assert {v for r in kept for v in range(r.start, r.last + 1)} == model
    assert kept.size == len(model)
    assert list(kept) == merge(list(kept))
    assert len(kept) == len(list(kept))
    inside = {v for r in kept.within(at, at + 5) for v in range(r.start, r.last + 1)}
    assert inside == {v for v in model if at <= v <= at + 5}
    outside = {v for r in kept.outside(at, at + 5) for v in range(r.start, r.last + 1)}
    assert outside == set(range(at, at + 6)) - inside
    assert kept.touches(at, at + 5) == bool(inside)
    gap = kept.first_outside(at)
    start = next(v for v in range(at, 200) if v not in model)
    assert gap == Range(start, min((v for v in model if v > start), default=ALL + 1) - 1)
    assert bool(kept) == bool(model)
    kept.add(at, ALL)
    assert kept.first_outside(at) is None
