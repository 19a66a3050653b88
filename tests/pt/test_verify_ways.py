# SPDX-License-Identifier: Apache-2.0
"""The ways by which the sweep of verify proves a table: none proves a damaged one, each proves its own."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iokeep.errors import InputError, MemoryAbsent
from iokeep.pt import sweep
from iokeep.pt import verify as verify_module
from iokeep.pt.diff import diff
from iokeep.pt.extents import Extents
from iokeep.pt.leaves import extents
from iokeep.pt.registry import open_format
from iokeep.pt.table_digest import digest
from iokeep.pt.tables import TableMemory, descend
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
    kept = verify_module._proved, verify_module._as_expected
    verify_module._proved = lambda tm, tables, *rest: np.zeros(len(tables), np.bool_)
    verify_module._as_expected = lambda found, *rest: np.zeros(len(found), np.bool_)
    try:
        return verify(*built.args, truth, compiled=False)
    finally:
        verify_module._proved, verify_module._as_expected = kept


@pytest.mark.parametrize("config", FORMATS, ids=lambda c: "-".join([c[0], *map(str, c[1].values())]))
@pytest.mark.parametrize("small", [False, True])
def test_whole_tables_of_runs_are_left_to_no_one_else(config, small, new_table):
    """Whether in contiguous entries of any size or in single items, compiled code proves them by itself."""
    fmt = open_format(*config)
    page, items = 1 << fmt.levels[0].shift, fmt.levels[0].items
    built, rows = new_table(fmt, seed=1), []
    for n, slide in enumerate((0, 1, 2, 4, 8, 16, 32, 64)):
        at = BASE + n * 2 * items * page
        at &= -items * page
        rows.append((at, at + items * page - 1, 0x8000_0000 + at + slide * page & -page, 1 + n % 3))
    truth = Extents.of(rows)
    built.table.map(truth, fmt.levels[0].shift if small else fmt.levels[1].shift - 1)
    tm = TableMemory(fmt, built.ram)
    tables = descend(tm, built.table.root_pa).tables(fmt)
    done = sweep.proved(tm, tables, truth, verify_module.entries_of(fmt, 0)).proved
    assert len(done) == 8
    assert done.all()
    assert verify(*built.args, truth, compiled=True).equal


LARGE = [
    ("vtdss", {}),
    ("vtdss", {"levels": 3}),  # leaves of 1 GiB in the root
    ("x86_64", {}),
    ("arm_lpae_s1", {}),
    ("arm_lpae_s2", {"granule": 16384}),
    ("riscv64", {}),
    ("amdv1", {}),
    ("arm_v7s", {}),
]


@st.composite
def large_layouts(draw, fmt):
    """Tables of large leaves: whole ones, holes, runs, scattered ones, beside tables of small leaves."""
    level = draw(st.sampled_from([n for n, spec in enumerate(fmt.levels) if spec.leaf and n] or [0]))
    spec, small = fmt.levels[level], 1 << fmt.levels[0].shift
    page, items = 1 << spec.shift, spec.items
    top = 1 << (fmt.input_lg2 - fmt.sign_extend)
    limit = min(top, 4 * items * page)
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    rows, at = [], draw(st.sampled_from([0, 0, page]))
    for kind in draw(
        st.lists(st.sampled_from(["run", "whole", "pages", "small", "hole"]), min_size=1, max_size=5)
    ):
        prot, frame = draw(st.sampled_from([3, 3, 1, 2])), draw(st.integers(0, 3)) * items * page
        frame += draw(st.sampled_from([0, 0, page]))
        if kind == "hole":
            at += draw(st.integers(1, items)) * page
        elif kind == "whole":
            at = -(-at // (items * page)) * items * page
            rows.append((at, items * page, frame, prot))
        elif kind == "run":
            rows.append((at, draw(st.integers(1, items)) * page, frame, prot))
        elif kind == "small":
            rows.append((at, draw(st.integers(1, 20)) * small, frame, prot))
            at += page
            continue
        else:
            n = draw(st.sampled_from([3, min(items, 512)]))
            rows += [(at + i * page, page, int(to) * page, prot) for i, to in enumerate(rng.permutation(n))]
        if kind != "hole":
            at = rows[-1][0] + rows[-1][1]
    out = 1 << (fmt.levels[0].leaf_pa_mask << fmt.levels[0].pa_shift).bit_length()
    rows = [r for r in rows if r[0] + r[1] <= limit and r[2] + r[1] <= min(out, 1 << 47)]
    return level, Extents.of([(i, i + n - 1, pa, q) for i, n, pa, q in rows or [(0, small, 0, 3)]])


@pytest.mark.parametrize("config", LARGE, ids=lambda c: "-".join([c[0], *map(str, c[1].values())]))
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_large_leaves(config, data, new_table):
    """Compiled, by NumPy, and the judge alone: one verdict, whatever is damaged; so say all other readers."""
    fmt = open_format(*config)
    level, truth = data.draw(large_layouts(fmt))
    lg2s = [lg2 for lg2 in fmt.leaf_lg2s if lg2 >= fmt.levels[level].shift]
    largest = data.draw(st.sampled_from([None, fmt.levels[level].shift, *lg2s]))
    built = new_table(fmt, size=1 << 20, seed=data.draw(st.sampled_from([None, 1])))
    try:
        built.table.map(truth, largest)
    except AssertionError:
        return  # too many tables of small leaves for this RAM
    assert verify(*built.args, truth, compiled=True).equal
    want = truth
    some = data.draw(st.lists(st.integers(0, len(truth) - 1), max_size=3))
    for steps in [walk(*built.args, int(truth.iova[n])).steps for n in some]:
        _, at, _ = steps[data.draw(st.sampled_from([-1, -1, -1, -2])) % len(steps)]
        bit = 1 << data.draw(st.integers(0, 8 * fmt.item_bytes - 1))
        item = int.from_bytes(built.ram.read(at, fmt.item_bytes), "little") ^ bit
        built.ram.write(at, item.to_bytes(fmt.item_bytes, "little"))
    if data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(truth) - 1))
        pa, prot = truth.pa.copy(), truth.prot.copy()
        if data.draw(st.booleans()):
            pa[place] ^= np.uint64(1 << data.draw(st.sampled_from([12, 21, 30])))
        else:
            prot[place] ^= 2 if prot[place] != 2 else 1
        want = Extents(truth.iova, truth.last, pa, prot)
    alone = verify_alone(built, want)
    for compiled in (False, True):
        assert verify(*built.args, want, compiled=compiled) == alone
    other = new_table(fmt, size=1 << 20, seed=3)
    other.table.map(truth, data.draw(st.sampled_from([None, largest])))
    said = [readers(built, other, compiled) for compiled in (False, True)]
    assert said[0] == said[1]


def readers(built, other, compiled):
    """What extents, digest and diff say, or what they raise."""

    def columns(e):
        names = ("iova", "last", "pa", "prot")
        found, problems = e
        bad = zip(*(getattr(problems, c).tolist() for c in ("iova", "last", "reason", "at")), strict=True)
        return [getattr(found, c).tolist() for c in names], sorted(bad)

    jobs = (
        lambda: columns(extents(*built.args, compiled=compiled)),
        lambda: digest(*built.args, bytes(16), compiled=compiled),
        lambda: diff(*built.args, *other.args, compiled=compiled),
        lambda: diff(*other.args, *built.args, compiled=compiled),
    )
    out = []
    for job in jobs:
        try:
            out.append(job())
        except (InputError, MemoryAbsent, ValueError) as error:
            out.append((type(error), str(error)))
    return out


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("config", LARGE[:7], ids=lambda c: "-".join([c[0], *map(str, c[1].values())]))
def test_tables_of_large_leaves_need_no_judge(config, compiled, new_table, monkeypatch):
    """Nor does ``descend`` name their leaves."""
    fmt = open_format(*config)
    level = 2 if config[1].get("levels") == 3 else 1
    spec = fmt.levels[level]
    size = spec.items << spec.shift
    span = min(2 * size, 1 << (fmt.input_lg2 - 1))
    base = 0 if config[0] != "vtdss" else 4 * size if level == 1 else 0
    order = np.random.default_rng(1).permutation(spec.items).tolist()
    page = 1 << spec.shift
    lone = [
        (base + span + i * page, base + span + (i + 1) * page - 1, n * page, 1) for i, n in enumerate(order)
    ]
    seen = []
    known = verify_module._Above.__call__

    def ask(self, tables):
        done = known(self, tables)
        seen.append((tables.level, done.tolist()))
        return done

    rows = [(base, base + span - 1, page, 3)]
    if level == 1:
        rows += lone[::2]
    built, truth = new_table(fmt), Extents.of(rows)
    built.table.map(truth, spec.shift)
    monkeypatch.setattr(verify_module._Above, "__call__", ask)
    monkeypatch.setattr(verify_module, "_judge_rest", None)
    assert verify(*built.args, truth, compiled=compiled).equal
    assert all(all(done) for number, done in seen if number == level)
    assert any(done for number, done in seen if number == level)
