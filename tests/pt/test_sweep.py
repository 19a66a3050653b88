# SPDX-License-Identifier: Apache-2.0
"""The compiled sweep equals NumPy's, for every format it reads; verify of a range is the whole one, cut."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from table_support import SWEPT, format_id

from iokeep.mem.capture import PageMemory
from iokeep.mem.ram import Ram
from iokeep.pt import descent, fill, kernels, run_kernels, sum_kernels, sweep
from iokeep.pt.build import Table
from iokeep.pt.compare import clip_extents
from iokeep.pt.descent import straight
from iokeep.pt.diff import diff
from iokeep.pt.extents import Extents
from iokeep.pt.leaves import extents
from iokeep.pt.table_digest import digest
from iokeep.pt.tables import TableMemory, descend
from iokeep.pt.verify import verify
from iokeep.pt.walk import walk


def layout_of(fmt, seed):
    """Whole tables in one run, an extent an item, mixes and holes; in units of the smallest leaf."""
    rng = np.random.default_rng(seed)
    shift, items = fmt.levels[0].shift, fmt.levels[0].items
    rows, page = [], int(rng.integers(4)) * items
    for _ in range(int(rng.integers(1, 5))):
        kind = rng.choice(["table", "pages", "run", "hole"])
        prot = int(rng.choice([3, 3, 1, 2]))
        frame = int(rng.integers(1, 1 << 12)) * items + int(rng.integers(2))
        if kind == "table":
            page = -(-page // items) * items
            rows.append((page, items * int(rng.integers(1, 4)), frame, prot))
        elif kind == "pages":
            page = -(-page // items) * items
            rows += [(page + n, 1, frame + to, prot) for n, to in enumerate(rng.permutation(items).tolist())]
        elif kind == "run":
            rows.append((page, int(rng.integers(1, items + 9)), frame, prot))
        else:
            page += int(rng.integers(1, 2 * items))
            continue
        page = rows[-1][0] + rows[-1][1]
    rows = rows or [(page, 1, 7, 3)]
    return Extents.of([(i << shift, ((i + n) << shift) - 1, p << shift, q) for i, n, p, q in rows])


def _verdicts(args, want, **options):
    out = [verify(*args, want, limit=50, compiled=c, **options) for c in (False, True)]
    assert out[0] == out[1]
    return out[0]


@settings(max_examples=25)
@given(
    data=st.data(),
    which=st.integers(0, len(SWEPT) - 1),
    layout=st.integers(0, 10**6),
    seed=st.sampled_from([None, 1, 2]),
    threads=st.sampled_from([1, 3]),
)
def test_compiled_equals_numpy(new_table, data, which, layout, seed, threads):
    fmt = SWEPT[which]
    want = layout_of(fmt, layout)
    built = new_table(fmt, size=1 << 20, seed=seed)
    built.table.map(want, max_lg2=data.draw(st.sampled_from([None, fmt.levels[0].shift])))
    assert verify(*built.args, want, compiled=True, threads=threads).equal
    verdict = _verdicts(built.args, want)
    assert verdict.equal
    assert verdict.pages == want.mapped_bytes >> 12
    # One item, one bit; then an expectation that is wrong in one place.
    at = data.draw(st.integers(0, len(want) - 1))
    inside = data.draw(st.integers(0, int(want.last[at] - want.iova[at]))) & -4096
    iova = int(want.iova[at]) + inside
    _, where, item = walk(*built.args, iova).steps[-1]
    built.ram.store64(where, item ^ 1 << data.draw(st.integers(0, 63)))
    _verdicts(built.args, want)
    built.ram.store64(where, item)
    changed = want.pa.copy()
    changed[at] ^= np.uint64(1 << fmt.levels[0].shift)
    assert not _verdicts(built.args, Extents(want.iova, want.last, changed, want.prot)).equal
    fewer = np.arange(len(want)) != at
    less = Extents(*(getattr(want, c)[fewer] for c in ("iova", "last", "pa", "prot")))
    assert not _verdicts(built.args, less).equal


@settings(max_examples=25)
@given(data=st.data(), which=st.integers(0, len(SWEPT) - 1), layout=st.integers(0, 10**6))
def test_a_range_is_the_whole_cut(new_table, data, which, layout):
    fmt = SWEPT[which]
    want = layout_of(fmt, layout)
    built = new_table(fmt, size=1 << 20, seed=1)
    built.table.map(want, max_lg2=data.draw(st.sampled_from([None, fmt.levels[0].shift])))
    some = data.draw(st.lists(st.integers(0, len(want) - 1), max_size=3, unique=True))
    paths = [walk(*built.args, int(want.iova[at])).steps for at in some]
    for steps in paths:
        _, where, item = steps[data.draw(st.sampled_from([-1, -1, -1, -2]))]
        built.ram.store64(where, item ^ 1 << data.draw(st.integers(0, 63)))
    points = [0, 2**64 - 1, 1 << fmt.input_lg2, *want.iova.tolist(), *want.last.tolist()]
    ends = sorted(data.draw(st.sampled_from(points)) + data.draw(st.sampled_from([0, 1, 4096])) for _ in "ab")
    start, last = (min(end, 2**64 - 1) for end in ends)
    whole = verify(*built.args, want, limit=10**6)
    some = _verdicts(built.args, want, start=start, last=last)
    # Below a bad item it is left open what was expected.
    cut = [
        (max(m.iova, start), min(m.last, last), m.reason, m.found_prot)
        for m in whole.mismatches
        if m.iova <= last and m.last >= start
    ]
    assert [(m.iova, m.last, m.reason, m.found_prot) for m in some.mismatches] == cut[:50]
    assert some.total == len(cut)
    inside = clip_extents(want, start, last).mapped_bytes
    assert some.pages <= inside >> 12
    assert not some.equal or some.pages == inside >> 12


def test_a_range_reads_only_its_own_tables(new_table):
    fmt = SWEPT[0]
    built = new_table(fmt)
    want = Extents.of([(0x200000, 0x200FFF, 0x5000, 3), (1 << 30, (1 << 30) + 0xFFF, 0x6000, 3)])
    built.table.map(want)
    at = walk(*built.args, 0x200000).steps[-2][1]
    built.ram.store64(at, built.ram.load64(at) | 0x77_0000_0000)  # a table that is not there
    assert not verify(*built.args, want).equal
    assert verify(*built.args, want, start=1 << 30, last=(1 << 30) + 0xFFF).equal
    found = verify(*built.args, want, start=0x200000, last=0x2FFFFF).mismatches
    assert [(m.reason, m.iova, m.last) for m in found] == [("absent", 0x200000, 0x2FFFFF)]
    with pytest.raises(ValueError, match="range"):
        verify(*built.args, want, start=5, last=4)


@pytest.mark.parametrize("place", [0, 511, 512, 700, 1023, 1024, 1500])
@pytest.mark.parametrize("what", ["order", "overlap", "backwards", "prot"])
def test_unsorted_expectations_are_found_wherever_they_are(new_table, place, what):
    fmt = SWEPT[0]
    built = new_table(fmt)
    n = 1600
    iova = np.arange(n, dtype=np.uint64) << np.uint64(12)
    last = iova + np.uint64(4095)
    prot = np.full(n, 3, np.uint8)
    pa = np.random.default_rng(1).permutation(n).astype(np.uint64) << np.uint64(12)
    built.table.map(Extents(iova, last, pa, prot))
    iova, last = iova.copy(), last.copy()
    if what == "order":
        iova[place], last[place] = 1 << 40, (1 << 40) + 4095
    elif what == "overlap":
        last[place] += np.uint64(4096)
    elif what == "backwards":
        iova[place], last[place] = last[place], iova[place]
    else:
        prot[place] = 4
    for compiled in (False, True):
        with pytest.raises(ValueError, match="sorted"):
            verify(*built.args, Extents(iova, last, pa, prot), compiled=compiled)


def test_the_fast_way_down_says_the_same(new_table):
    for fmt in SWEPT:
        built = new_table(fmt, seed=3)
        shift = fmt.levels[0].shift
        span = fmt.levels[0].items << shift
        built.table.map(
            Extents.of([(n * span, n * span + (1 << shift) - 1, n << shift, 3) for n in range(1, 60, 2)]),
            max_lg2=shift,
        )
        tm = TableMemory(fmt, built.ram)
        for damage in (0, 1, 1 << 40):
            path = walk(*built.args, 3 * span).steps
            _, at, item = path[-2]
            built.ram.store64(at, item ^ damage)
            a, b = descend(tm, built.table.root_pa), descend(tm, built.table.root_pa, straight=straight)
            for column in ("base", "pa", "row", "prot"):
                assert getattr(a, column).tolist() == getattr(b, column).tolist()
            for column in ("iova", "last", "reason", "level", "at", "item"):
                assert getattr(a.problems, column).tolist() == getattr(b.problems, column).tolist()
            built.ram.store64(at, item)
        # A table that points to the root.
        loop = item & ~fmt.levels[1].table_pa_mask | fmt.levels[1].pa_word(built.table.root_pa, leaf=False)
        built.ram.store64(at, loop)
        a, b = descend(tm, built.table.root_pa), descend(tm, built.table.root_pa, straight=straight)
        assert a.problems.reason.tolist() == b.problems.reason.tolist()
        assert len(a.problems) == 1


def test_order_in_memory():
    rng = np.random.default_rng(1)
    for rows in (
        rng.permutation(1000),
        rng.integers(0, 1 << 40, 1000),
        np.arange(1000),
        np.zeros(9, np.int64),
    ):
        place, ordered = kernels.in_memory_order(rows.astype(np.int64))
        assert sorted(place.tolist()) == list(range(len(rows)))
        assert ordered.tolist() == rows[place].tolist()
    place, ordered = kernels.in_memory_order(rng.permutation(1000))
    assert ordered.tolist() == list(range(1000))
    rows, chosen = rng.permutation(1000), np.arange(0, 1000, 3)
    place, ordered = kernels.in_memory_order(rows, chosen)
    assert set(place.tolist()) == set(chosen.tolist())
    assert ordered.tolist() == sorted(rows[chosen].tolist()) == rows[place].tolist()


@pytest.mark.parametrize("damage", [None, "loop", "absent", "leaf", "reserved", "permission", "ghost"])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("fmt", SWEPT, ids=format_id)
def test_the_straight_way_down(fmt, sparse, damage):
    """Down a tree as Linux writes it, with tables at pas whose numbers differ in high bits only, as far as
    there is no damage; from there on the general way.
    """
    ram, unit, shift, given = Ram.of(1 << 30), fmt.table_bytes, fmt.levels[0].shift, []

    def alloc(n, size=unit):
        if size > unit:
            given.extend(range(3 << 28, (3 << 28) + size, unit))
            return np.array([3 << 28], np.uint64)
        for _ in range(n):
            given.append(unit * (1 + len(given) // 2) + (1 << 28) * (len(given) & 1))
        return np.array(given[-n:], np.uint64)

    table = Table.create(fmt, ram, alloc, lambda gone, size=0: None)
    step = 1 << (fmt.levels[1].shift + fmt.levels[1].index_bits)
    for n in range(40):
        table.map(Extents.of([(n * step, n * step + (1 << shift) - 1, n << shift, 3)]), max_lg2=shift)
    spec, steps = fmt.levels[1], walk(fmt, ram, table.root_pa, 7 * step).steps
    item, other = steps[-2][2], {
        None: steps[-2][2],
        "loop": steps[-2][2] & ~spec.table_pa_mask | spec.pa_word(steps[-2][1] & -unit, leaf=False),
        "absent": steps[-2][2] & ~spec.table_pa_mask | spec.pa_word(1 << 38, leaf=False),
        "leaf": fmt.leaf_bits(1, 3) if spec.lg2s else 0,
        "reserved": steps[-2][2] | spec.table_reserved & -spec.table_reserved,
        "permission": steps[-2][2] ^ (spec.tw_mask & -spec.tw_mask),
        "ghost": steps[-2][2] & ~spec.valid_mask,
    }[damage]  # fmt: skip
    ram.store64(steps[-2][1], other)
    mem = ram
    if sparse:
        mem = PageMemory(np.array(given, np.uint64), ram.rows(unit).data[np.array(given) // unit])
    tm = TableMemory(fmt, mem)
    quick, slow, both = (
        straight(tm, table.root_pa),
        *(descend(tm, table.root_pa, straight=way) for way in (None, straight)),
    )
    assert quick is not None
    assert quick.level == (0 if item == other or other == 0 else 1)
    assert both.alike == set(range(quick.level + 1, fmt.top_level + 1))
    assert slow.alike == set()
    for name in ("base", "pa", "row", "prot"):
        assert getattr(both, name).tolist() == getattr(slow, name).tolist()
        assert getattr(both, name).dtype == getattr(slow, name).dtype
    for name in ("pages", "bases", "prots"):
        assert [part.tolist() for part in getattr(both, name)] == [
            part.tolist() for part in getattr(slow, name)
        ]
    for part in ("leaves", "problems"):
        a, b = getattr(both, part), getattr(slow, part)
        for name in a.__slots__:
            assert getattr(a, name).tolist() == getattr(b, name).tolist()


def test_threads(monkeypatch):
    monkeypatch.setenv("IOKEEP_THREADS", "1")
    assert kernels.thread_count(1 << 40) == 1
    monkeypatch.setenv("IOKEEP_THREADS", "2")
    assert kernels.thread_count(1 << 20) == 1
    assert kernels.thread_count(1 << 20, 3) == 3
    done = []
    kernels.over_threads(lambda a, b: done.append((a, b)), 10, 4096, 3)
    assert sorted(done) == [(0, 3), (3, 6), (6, 10)]


#: variables of the kernels that hold addresses, items and masks
WORDS = {
    "wrong", "want", "word", "start", "end", "at", "odd", "pa0", "pa1", "top", "total", "bad", "to", "ref",
    "same", "item", "sum_x", "sum_y", "sum_k", "sum_l", "differ", "there", "slot",
    "stop", "begin", "upper", "span", "f", "z", "p", "lo", "hi", "page", "group", "prior", "follows",
    "number", "expect", "g", "factor", "key", "next_iova", "next_pa", "sort", "whole", "outside",
    "q", "length", "blocks", "plain", "numbered", "numbers", "inner", "mixed", "holes", "to_begin",
}  # fmt: skip
COLUMNS = ("iova", "last", "pa", "prot")
#: kernels that the test below compiles
NAMES = {
    "_plan", "_runs", "_mixed", "_below", "_note", "_owners", "_count", "_pages", "_ramps", "_frames",
    "_add_up", "read_runs", "read_pages", "write_pages", "compare_pages", "join_runs", "sum_alike",
    "sum_holed", "weigh", "sum_extents", "in_place", "_order", "_run", "link",
}  # fmt: skip


def test_no_signed_word_and_no_float(new_table):
    """uint64 mixed with a signed integer silently becomes int64 or float64: no variable of a kernel is a
    float, and none that holds a word is anything but uint64.
    """
    from numba import config, njit

    built = new_table(SWEPT[0], seed=1)
    rows = [(n << 12, (n << 12) + 4095, (n ^ 1) << 12, 3) for n in range(512)]
    want = Extents.of([*rows, (1 << 21, (9 << 21) - 1, 1 << 30, 3)])
    built.table.map(want, max_lg2=12, compiled=True)
    pages = [(n << 12, (n << 12) + 4095, n << 12, 3) for n in range(1 << 20, (1 << 20) + 1500)]
    built.table.map(Extents.of(pages), compiled=True)
    run = Extents.of([(1 << 36, (1 << 36) + (1500 << 12) - 1, 0, 3)])
    built.table.map(run, max_lg2=12, compiled=True)
    want = Extents(
        *(np.concatenate([getattr(e, c) for e in (want, Extents.of(pages), run)]) for c in COLUMNS)
    )
    assert verify(*built.args, want, compiled=True).equal
    built.table.map_frames(1 << 38, np.arange(1500, dtype=np.uint64) << np.uint64(12), 3, compiled=True)
    kernels.in_memory_order(np.arange(9)[::-1].copy())
    kernels.in_memory_order(np.array([3, 2, 2]))
    built.ram.store64(walk(*built.args, 0).steps[-1][1], 0)
    digest(*built.args, bytes(16), compiled=True)
    seen = set()
    assert diff(*built.args, *built.args, compiled=True).equal
    extents(*built.args, compiled=True)
    for module in (descent, fill, kernels, run_kernels, sweep, sum_kernels):
        for name, called in vars(module).items():
            kernel = getattr(called, "__wrapped__", called)
            for signature in getattr(kernel, "signatures", []):
                seen.add(name)
                fresh = njit(kernel.py_func)
                fresh.compile(signature)
                (overload,) = fresh.overloads.values()
                for variable, kind in overload.type_annotation.typemap.items():
                    assert "float" not in str(kind), (name, variable, kind)
                    if variable.split(".")[0] in WORDS:
                        assert "uint64" in str(kind), (name, variable, kind)
    assert config.DISABLE_JIT or seen >= NAMES


def test_without_a_compiler_the_same_code_runs():
    """NUMBA_DISABLE_JIT=1: the kernels are plain Python, and no warning tells of words that wrap."""
    code = (
        "import numpy as np\n"
        "from iokeep.mem.ram import Ram\n"
        "from iokeep.pt.build import Table\n"
        "from iokeep.pt.extents import Extents\n"
        "from iokeep.pt.registry import open_format\n"
        "from iokeep.pt.verify import verify\n"
        "ram = Ram.of(1 << 20)\n"
        "stock = list(range(4096, 1 << 20, 4096))[::-1]\n"
        "alloc = lambda n: np.array([stock.pop() for _ in range(n)], np.uint64)\n"
        "fmt = open_format('vtdss', {})\n"
        "t = Table.create(fmt, ram, alloc, lambda pas: None)\n"
        "want = Extents.of([(0, (5 << 20) - 1, 1 << 63 >> 20, 3)]"
        " + [((8 << 20) + n * 4096, (8 << 20) + n * 4096 + 4095, (n ^ 5) << 12, 1) for n in range(512)])\n"
        "t.map(want, max_lg2=12, compiled=True)\n"
        "large = Extents.of([(1 << 30, (3 << 30) + (5 << 21) - 1, 1 << 32, 3)])\n"
        "t.map(large, max_lg2=21)\n"
        "both = zip(*([getattr(e, c) for c in ('iova', 'last', 'pa', 'prot')] for e in (want, large)))\n"
        "want = Extents(*(np.concatenate(columns) for columns in both))\n"
        "assert verify(fmt, ram, t.root_pa, want, compiled=True).equal\n"
        "from iokeep.pt.diff import diff\n"
        "from iokeep.pt.digest import digest_extents\n"
        "from iokeep.pt.table_digest import digest\n"
        "from iokeep.pt.leaves import extents\n"
        "assert diff(fmt, ram, t.root_pa, fmt, ram, t.root_pa, compiled=True).equal\n"
        "found = extents(fmt, ram, t.root_pa, compiled=True)[0]\n"
        "assert found.mapped_bytes == want.mapped_bytes\n"
        "assert digest(fmt, ram, t.root_pa, bytes(16), compiled=True) == digest_extents(want, bytes(16))\n"
        "from iokeep.pt.walk import walk\n"
        "ram.store64(walk(fmt, ram, t.root_pa, 0x5000).steps[-1][1], 0)\n"
        "assert not verify(fmt, ram, t.root_pa, want, compiled=True).equal\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code],
        capture_output=True, text=True, check=False, env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
