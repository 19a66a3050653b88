# SPDX-License-Identifier: Apache-2.0
"""Tables read as runs, by compiled code and by NumPy: extents and diff say what the general code says, for
every format, damaged or not.
"""

from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from table_support import SHOWN, SWEPT, rows_of

from iokeep.errors import InputError, MemoryAbsent
from iokeep.pt import diff as diff_module
from iokeep.pt import leaves as leaves_module
from iokeep.pt import runs
from iokeep.pt.diff import diff
from iokeep.pt.extents import Extents
from iokeep.pt.leaves import extents
from iokeep.pt.tables import TableMemory, descend
from iokeep.pt.walk import walk


@st.composite
def layouts(draw, fmt):
    """Whole tables in one run, runs cut anywhere, pages in any order, holes; runs that go on beyond a
    table.
    """
    shift, items = fmt.levels[0].shift, fmt.levels[0].items
    top = 1 << (min(fmt.input_lg2, 40) - 1 - shift)  # of a space that may be in two halves
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    page = draw(st.sampled_from([0, items, top // 2 - 2 * items]))
    rows = []
    for kind in draw(
        st.lists(st.sampled_from(["table", "pages", "some", "run", "hole", "on"]), min_size=1, max_size=6)
    ):
        prot = draw(st.sampled_from([3, 3, 1, 2]))
        frame = draw(st.integers(1, 1 << 7)) * items + draw(st.sampled_from([0, 0, 1, 8]))
        if kind == "hole":
            page += draw(st.integers(1, 2 * items))
            continue
        if kind in ("table", "pages", "some"):
            page = -(-page // items) * items
        if kind == "table":
            rows.append((page, items * draw(st.integers(1, 3)), frame, prot))
        elif kind == "pages":
            rows += [(page + n, 1, frame + to, prot) for n, to in enumerate(rng.permutation(items).tolist())]
        elif kind == "some":
            some = np.flatnonzero(rng.integers(0, 2, items)).tolist() or [0]
            rows += [(page + n, 1, frame + (n if n & 4 else items - n), prot) for n in some]
        elif kind == "on" and rows:
            before = rows[-1]
            rows.append((page, draw(st.sampled_from([1, items])), before[2] + before[1], before[3]))
        else:
            rows.append((page, draw(st.integers(1, items + 9)), frame, prot))
        page = rows[-1][0] + rows[-1][1]
    rows = rows or [(page, 1, 7, 3)]
    return Extents.of([(i << shift, ((i + n) << shift) - 1, p << shift, q) for i, n, p, q in rows])


def damage(data, built, want, where=None):
    """Flip bits of items, or put other items there. :return: what was done, to do it elsewhere."""
    done = []
    item_bytes = built.fmt.item_bytes
    for _ in range(data.draw(st.sampled_from([0, 0, 1, 2]))):
        iova = int(want.iova[data.draw(st.integers(0, len(want) - 1))])
        bit = data.draw(st.integers(0, 8 * item_bytes - 1))
        done.append((iova, bit))
    flips = [(walk(*built.args, iova).steps[-1][1], bit) for iova, bit in (done if where is None else where)]
    for at, bit in flips:
        item = int.from_bytes(built.ram.read(at, item_bytes), "little") ^ 1 << bit
        built.ram.write(at, item.to_bytes(item_bytes, "little"))
    return done


@contextmanager
def general():
    """Nothing is read as runs."""
    with mock.patch.object(runs, "readable", return_value=False):
        yield


#: any number of tables is worth a look by NumPy
small = mock.patch.object(leaves_module, "PLAIN_TABLES", 1)


def every_way(job):
    """What a job says by the general code, by NumPy and compiled. :param job: takes ``compiled``."""
    with general():
        said = [outcome(lambda: job(False))]
    with small:
        return [*said, *(outcome(lambda c=c: job(c)) for c in (False, True))]


def outcome(job, *kinds):
    """What it returns, or what it raises."""
    try:
        return job()
    except (InputError, MemoryAbsent, *kinds) as error:
        return type(error), str(error)


@settings(max_examples=60)
@given(data=st.data(), which=st.integers(0, len(SHOWN) - 1), seed=st.sampled_from([None, 1]))
def test_extents(new_table, data, which, seed):
    fmt = SHOWN[which]
    want = data.draw(layouts(fmt))
    built = new_table(fmt, size=1 << 20, seed=seed)
    built.table.map(want, max_lg2=data.draw(st.sampled_from([None, fmt.levels[0].shift])))
    damage(data, built, want)
    said = []
    for found in every_way(lambda c: extents(*built.args, compiled=c, threads=2)):
        if isinstance(found[0], Extents):
            e, bad = found
            columns = ("iova", "last", "reason", "level", "at", "item")
            problems = sorted(zip(*(getattr(bad, c).tolist() for c in columns), strict=True))
            found = rows_of(e), problems
        said.append(found)
    assert said[0] == said[1] == said[2]


@settings(max_examples=80)
@given(data=st.data(), which=st.integers(0, len(SHOWN) - 1), seed=st.sampled_from([None, 1]))
def test_diff(new_table, data, which, seed):
    fmt = SHOWN[which]
    other = fmt if data.draw(st.booleans()) else SHOWN[data.draw(st.integers(0, 3))]
    if fmt.levels[0].shift != other.levels[0].shift:
        other = fmt
    want = data.draw(layouts(fmt))
    small = fmt.levels[0].shift
    a, b = new_table(fmt, size=1 << 20, seed=seed), new_table(other, size=1 << 20, seed=2)
    a.table.map(want, max_lg2=data.draw(st.sampled_from([None, small, small])))
    b.table.map(want, max_lg2=data.draw(st.sampled_from([None, small, small])))
    done = damage(data, a, want)
    damage(data, b, want, where=data.draw(st.sampled_from([done, None, []])))
    args = (*a.args, *b.args)
    said = every_way(lambda c: diff(*args, compiled=c, threads=2))
    assert said[0] == said[1] == said[2]


def test_equal_tables_need_no_general_code(new_table, monkeypatch):
    """Tables of one run and tables of pages are compared without the general code, exactly."""
    fmt = SHOWN[0]
    order = np.random.default_rng(1).permutation(1024).tolist()
    pages = [(n << 12, (n << 12) + 0xFFF, (1 << 30) + (to << 12), 3) for n, to in enumerate(order)]
    want = Extents.of([*pages, (1 << 30, (1 << 30) + (8 << 21) - 1, 1 << 33, 1)])
    a, b = new_table(fmt, seed=1), new_table(fmt, seed=2)
    for built in (a, b):
        built.table.map(want, max_lg2=12)

    def refuse(*args, **options):
        raise AssertionError("the general code was asked")

    with monkeypatch.context() as patch:
        patch.setattr(diff_module, "extents", refuse)
        verdict = diff(*a.args, *b.args, compiled=True)
        assert verdict == diff(*a.args, *b.args, compiled=False)
    assert verdict.equal
    assert verdict.pages == want.mapped_bytes >> 12
    with general():
        assert verdict == diff(*a.args, *b.args, compiled=True)
    # Every bit of every word counts.
    for iova in (5 << 12, 1 << 30, (1 << 30) + (7 << 21) + (511 << 12)):
        at = walk(*b.args, iova).steps[-1][1]
        item = b.ram.load64(at)
        for bit in range(64):
            b.ram.store64(at, item ^ 1 << bit)
            said = every_way(lambda c: diff(*a.args, *b.args, compiled=c))
            assert said[0] == said[1] == said[2], bit
        b.ram.store64(at, item)


@pytest.mark.parametrize("fmt", SWEPT, ids=lambda f: f.name)
def test_what_linux_writes_is_runs_and_pages(fmt, new_table):
    """Whole tables in one area, also in contiguous entries, and single pages are left to no one else."""
    spec = fmt.levels[0]
    span = spec.items << spec.shift
    page = 1 << spec.shift
    for first, count in ((8 * span, 3 * span), (8 * span + 16 * page, 2 * span), (8 * span + page, span)):
        built = new_table(fmt, seed=1)
        built.table.map(Extents.of([(4 * span, 4 * span + count - 1, first, 3)]))
        tm = TableMemory(fmt, built.ram)
        upper = descend(tm, built.table.root_pa)
        said, left = runs.extents_of(tm, upper.tables(fmt))
        assert not len(left)
        assert len(said) == (1 if len(upper.base) else 0)
        by_numpy, left = runs.extents_of(tm, upper.tables(fmt), compiled=False)
        assert not len(left)
        assert rows_of(by_numpy) == rows_of(said)
    built = new_table(fmt)
    built.table.map(Extents.of([(n * page, n * page + page - 1, (n ^ 3) * page, 1) for n in range(0, 90, 2)]))
    tm = TableMemory(fmt, built.ram)
    said, left = runs.extents_of(tm, descend(tm, built.table.root_pa).tables(fmt))
    assert not len(left)
    assert len(said) == 45


def content(built):
    """The tables level by level, whatever their places: addresses of tables are left out."""
    found = extents(*built.args)[0]
    return rows_of(found), [len(pas) for pas in descend(TableMemory(*built.args[:2]), built.args[2]).pages]


@settings(max_examples=40)
@given(data=st.data(), which=st.integers(0, len(SHOWN) - 1), seed=st.sampled_from([None, 1]))
def test_build(new_table, data, which, seed):
    """The same memory, byte for byte, from compiled code and from NumPy; also into tables that are there."""
    fmt = SHOWN[which]
    largest = data.draw(st.sampled_from([None, fmt.levels[0].shift]))
    wants = [data.draw(layouts(fmt)) for _ in range(data.draw(st.sampled_from([1, 1, 2])))]
    said = []
    for compiled in (False, True):
        built = new_table(fmt, size=1 << 20, seed=seed)
        done = [
            outcome(lambda b=built, w=w, c=compiled: b.table.map(w, largest, compiled=c), ValueError)
            for w in wants
        ]
        assert not built.freed
        said.append((done, built.ram.bytes.tobytes()))
    assert said[0] == said[1]


@pytest.mark.parametrize("fmt", SWEPT, ids=lambda f: f.name)
@pytest.mark.parametrize("where", [0, 700, 1400])
@pytest.mark.parametrize("what", ["nothing", "order", "length", "pa", "prot", "beyond", "taken"])
def test_build_of_pages(fmt, new_table, where, what):
    """Single pages in a row take a way of their own; what is none of them is refused, and nothing changed."""
    shift = fmt.levels[0].shift
    n = 1500
    iova = (np.arange(n, dtype=np.uint64) + np.uint64(77)) << np.uint64(shift)
    last = iova + np.uint64((1 << shift) - 1)
    pa = np.random.default_rng(1).permutation(n).astype(np.uint64) << np.uint64(shift)
    prot = np.random.default_rng(2).integers(1, 4, n).astype(np.uint8)
    if what == "order":
        iova[where], last[where] = iova[where + 1], last[where + 1]
    elif what == "length":
        last[where] -= np.uint64(4096)
    elif what == "pa":
        pa[where] += np.uint64(512)
    elif what == "prot":
        prot[where] = 4 * (where & 1)
    elif what == "beyond":
        pa[where] = np.uint64(1 << 60)
    said = []
    for compiled in (False, True):
        built = new_table(fmt, size=1 << 20, seed=1)
        if what == "taken":
            built.table.map(Extents(iova[where : where + 1], last[where : where + 1], pa[:1], prot[:1]))
        before = content(built)
        e = Extents(iova, last, pa, prot)
        done = outcome(lambda b=built, c=compiled, e=e: b.table.map(e, shift, compiled=c), ValueError)
        assert (done is None) == (what == "nothing")
        assert done is None or content(built) == before
        said.append((done, content(built)))
    assert said[0] == said[1]


@pytest.mark.parametrize("fmt", SHOWN, ids=lambda f: f.name)
@pytest.mark.parametrize("what", ["nothing", "pa", "beyond", "prot", "taken", "end", "few"])
def test_build_of_frames(fmt, new_table, what):
    """A list of pages is mapped as an extent for each of them is, or refused with the same words."""
    shift = fmt.levels[0].shift
    n = 9 if what == "few" else 1500
    iova = 77 << shift
    if what == "end":
        iova = (1 << (fmt.input_lg2 - fmt.sign_extend)) - (n // 2 << shift)
    pas = np.random.default_rng(1).permutation(n).astype(np.uint64) << np.uint64(shift)
    if what == "pa":
        pas[700] += np.uint64(512)
    elif what == "beyond":
        pas[700] = np.uint64(1 << 60)
    said = []
    for prot in (0,) if what == "prot" else (1, 2, 3):
        said.append([])
        for compiled in (False, True, None):
            built = new_table(fmt, size=1 << 20, seed=1)
            begin = np.uint64(iova) + (np.arange(n, dtype=np.uint64) << np.uint64(shift))
            e = Extents(begin, begin + np.uint64((1 << shift) - 1), pas, np.full(n, prot, np.uint8))
            if what == "taken":
                built.table.map(Extents(e.iova[7:8], e.last[7:8], pas[:1], np.full(1, 3, np.uint8)))
            before = content(built)
            if compiled is None:
                done = outcome(lambda b=built, e=e: b.table.map(e, shift, compiled=False), ValueError)
            else:
                done = outcome(
                    lambda b=built, c=compiled, p=prot: b.table.map_frames(iova, pas, p, compiled=c),
                    ValueError,
                )
            assert (done is None) == (what in ("nothing", "few"))
            assert done is None or content(built) == before
            said[-1].append((done, content(built)))
        assert said[-1][0] == said[-1][1] == said[-1][2]
