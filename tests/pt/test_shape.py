# SPDX-License-Identifier: Apache-2.0
"""Tables that translate what is expected and are traps all the same; leaves that cross an edge."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from table_support import format_id

from iokeep.mem.ram import Ram
from iokeep.mem.ranges import Range
from iokeep.pt.deferred import Deferred
from iokeep.pt.extents import Extents
from iokeep.pt.leaves import leaves
from iokeep.pt.registry import open_format
from iokeep.pt.shape import crossing, only_leaves, unfit
from iokeep.pt.tables import TableMemory, descend
from iokeep.pt.verify import verify
from iokeep.pt.walk import walk

FORMATS = [
    open_format(*config)
    for config in (
        ("vtdss", {"levels": 4}),
        ("x86_64", {"levels": 4}),
        ("x86_64", {"levels": 5, "sign_extend": 0}),
        *(("amdv1", {"levels": n}) for n in (1, 2, 3, 6)),
        ("riscv64", {"levels": 3, "stage": 1}),
        ("riscv64", {"levels": 4, "stage": 2}),
        ("s390_zpci", {"levels": 3}),
        ("arm_lpae_s1", {"granule": 4096, "input_bits": 39, "output_bits": 40, "ttbr": 1}),
        ("arm_lpae_s1", {"granule": 65536, "input_bits": 52, "output_bits": 52}),
        ("arm_lpae_s2", {"granule": 4096, "input_bits": 40, "output_bits": 40}),
        ("arm_lpae_s2", {"granule": 16384, "input_bits": 40, "output_bits": 40}),
        ("arm_mali_lpae", {}),
        ("arm_v7s", {}),
    )
]
ALL = 2**64 - 1


@pytest.fixture(autouse=True, params=[False, True], ids=["numpy", "compiled"])
def which(request, monkeypatch):
    """With the compiled first look, and without."""
    monkeypatch.setattr("iokeep.pt.shape.loaded", lambda module: request.param)


every = pytest.mark.parametrize("fmt", FORMATS, ids=format_id)


def extend(fmt, raw):
    return int(fmt.extend(np.array([raw], np.uint64))[0])


def pages_of(built):
    """Pas of the 4096-byte pages of all its tables."""
    fmt, upper = built.fmt, descend(TableMemory(built.fmt, built.ram), built.table.root_pa)
    out = set()
    for depth, pas in enumerate(upper.pages):
        for pa in pas.tolist():
            out.update(range(pa & -4096, pa + fmt.bytes_of(fmt.top_level - depth), 4096))
    return np.array(sorted(out), np.uint64)


def load(built, level, at):
    order = "little" if built.fmt.byte_order == "<" else "big"
    raw = int.from_bytes(built.ram.read(at, built.fmt.item_bytes), order)
    return raw ^ built.fmt.levels[level].invert


def store(built, level, at, item):
    order = "little" if built.fmt.byte_order == "<" else "big"
    raw = (item ^ built.fmt.levels[level].invert).to_bytes(built.fmt.item_bytes, order)
    built.ram.write(at, raw)


def starts(fmt):
    """Where to map: the beginning, and the upper half where the space is sign-extended."""
    half = 1 << (fmt.input_lg2 - 1)
    return [0, half] if fmt.sign_extend else [0]


@dataclass
class Linked:
    """A page at ``iova``, and the path of items that leads there."""

    built: object
    iova: int
    steps: tuple
    small: int

    @property
    def truth(self):
        return Extents.of([(self.iova, self.iova + self.small - 1, self.small, 3)])


def linked(new_table, fmt, raw=0):
    built = new_table(fmt)
    small = 1 << fmt.levels[0].shift
    iova = extend(fmt, raw)
    built.table.map(Extents.of([(iova, iova + small - 1, small, 3)]))
    return Linked(built, iova, walk(*built.args, iova).steps, small)


def neighbour(case, level):
    """pa of another item of the table of a level on the path, and the IOVA at which its span begins."""
    fmt = case.built.fmt
    at = next(a for n, a, _ in case.steps if n == level)
    return at + fmt.item_bytes, case.iova + (1 << fmt.levels[level].shift)


def reasons(built, truth, owned, **kw):
    verdict = verify(*built.args, truth, owned=owned, **kw)
    assert verdict.equal == (verdict.total == 0)
    return [(m.reason, m.iova, m.last, m.level) for m in verdict.mismatches]


@every
def test_what_linux_builds_is_fit(new_table, fmt):
    built = new_table(fmt)
    small = 1 << fmt.levels[0].shift
    rows = []
    for raw in starts(fmt):
        rows += [(raw, small), (raw + 4 * small, 2 * small)]
        if fmt.top_level:
            rows.append((raw + (1 << fmt.levels[1].shift), 1 << fmt.levels[1].shift))
    truth = Extents.of([(extend(fmt, a), extend(fmt, a) + n - 1, a % (1 << 31), 3) for a, n in rows])
    built.table.map(truth)
    assert reasons(built, truth, pages_of(built)) == []
    tm = TableMemory(fmt, built.ram)
    assert not len(unfit(tm, descend(tm, built.table.root_pa), pages_of(built)))


@every
@pytest.mark.parametrize("empty", [True, False], ids=["empty", "alike"])
def test_a_table_at_two_places(new_table, fmt, empty):
    for level in range(1, fmt.top_level + 1):
        for raw in starts(fmt):
            case = linked(new_table, fmt, raw)
            built, size = case.built, 1 << fmt.levels[level].shift
            at, other = neighbour(case, level)
            store(built, level, at, next(i for n, _, i in case.steps if n == level))
            truth = Extents.of([(i, i + case.small - 1, case.small, 3) for i in (case.iova, other)])
            if empty:
                level0 = case.steps[-1]
                store(built, 0, level0[1], 0)
                truth = Extents.empty()
            owned = pages_of(built)
            assert verify(*built.args, truth).equal
            expected = [("loop", i, i + size - 1, level) for i in (case.iova, other)]
            assert reasons(built, truth, owned) == expected
            assert [m.reason for m in verify(*built.args, truth, owned=owned, limit=1).mismatches] == ["loop"]
            assert quarantined(built, truth, owned) == [(i, last) for _, i, last, _ in merged(expected)]


def merged(rows):
    out = []
    for reason, iova, last, level in rows:
        if out and out[-1][2] + 1 == iova:
            out[-1] = (reason, out[-1][1], last, level)
        else:
            out.append((reason, iova, last, level))
    return out


def quarantined(built, truth, owned, at=None):
    """What a need somewhere else quarantines: the shape is looked at before the first range is proved."""
    told = []
    state = Deferred(*built.args, lambda a, b: truth, owned=lambda: owned, condemned=told.append)
    asked = extend(built.fmt, (1 << built.fmt.input_lg2) - (1 << built.fmt.levels[0].shift))
    state.need(asked, asked)
    assert [q.range for q in told] == sorted(q.range for q in told)
    found = list(state.quarantined)
    while state.sweep(1 << 20):
        pass
    assert state.done
    assert list(state.quarantined) == found
    assert state.total == len(told)
    assert [m.reason for m in state.mismatches] == [q.mismatch.reason for q in told]
    return [(r.start, r.last) for r in found]


@every
def test_a_table_that_is_not_its_own(new_table, fmt):
    for level in range(fmt.top_level):
        case = linked(new_table, fmt)
        pa = fmt.levels[level + 1].table_pa(next(i for n, _, i in case.steps if n == level + 1))
        owned = pages_of(case.built)
        size = 1 << fmt.levels[level + 1].shift
        for gone in range(pa & -4096, pa + fmt.bytes_of(level), 4096):
            less = owned[owned != np.uint64(gone)]
            if gone == case.built.table.root_pa & -4096:
                continue  # tables smaller than a page
            expected = [("absent", case.iova, case.iova + size - 1, level + 1)]
            found = reasons(case.built, case.truth, less)
            if fmt.bytes_of(0) >= 4096:
                assert found == expected
            assert "absent" in {reason for reason, _, _, _ in found}
            assert quarantined(case.built, case.truth, less)


@every
def test_permissions_taken_away_above(new_table, fmt):
    """A read-only area under an item without W: right today, wrong for what is mapped there next."""
    for level in range(1, fmt.top_level + 1):
        spec = fmt.levels[level]
        if not spec.tw_mask:
            continue
        case = linked(new_table, fmt)
        at, item = next((a, i) for n, a, i in case.steps if n == level)
        for change in (item & ~spec.tw_mask, item | spec.tw_mask, item ^ spec.tw_mask):
            if change & spec.tw_mask == spec.tw_value or not spec.is_present(change):
                continue
            leaf = case.steps[-1]
            r_only = fmt.leaf_items(0, np.array([case.small], np.uint64), np.array([1], np.uint8))[0]
            store(case.built, 0, leaf[1], int(r_only) ^ fmt.levels[0].invert)
            store(case.built, level, at, change)
            truth = Extents.of([(case.iova, case.iova + case.small - 1, case.small, 1)])
            if not verify(*case.built.args, truth).equal:  # the value takes more away than W
                continue
            size = 1 << spec.shift
            assert reasons(case.built, truth, pages_of(case.built)) == [
                ("prot", case.iova, case.iova + size - 1, level)
            ]


def test_an_item_that_only_linux_takes_for_a_table(new_table):
    """VT-d: R = W = 0 is absent for hardware; vtdss_pt_load_entry_raw() looks for 0: a map writes there."""
    fmt = FORMATS[0]
    for level in range(1, fmt.top_level + 1):
        case = linked(new_table, fmt)
        built = case.built
        owned = pages_of(built)
        at, iova = neighbour(case, level)
        victim = 0x3F_F000
        store(built, level, at, victim | 1 << 10)
        assert verify(*built.args, case.truth).equal
        size = 1 << fmt.levels[level].shift
        expected = ("reserved", iova, iova + size - 1, level)
        assert reasons(built, case.truth, owned) == [expected]
        assert quarantined(built, case.truth, owned) == [expected[1:3]]
        before = built.ram.read(victim, 4096)
        built.table.map(Extents.of([(iova, iova + 0xFFF, 0x1000, 3)]))
        assert built.ram.read(victim, 4096) != before  # this is what it is about


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.name != "vtdss"], ids=lambda f: f.name)
def test_bits_of_an_absent_item_are_harmless_elsewhere(new_table, fmt):
    """Formats in which Linux and hardware agree on what is absent; others have it found."""
    for level in range(1, fmt.top_level + 1):
        case = linked(new_table, fmt)
        at, iova = neighbour(case, level)
        item = next(i for n, _, i in case.steps if n == level)
        spec = fmt.levels[level]
        absent = item & ~spec.valid_mask
        if spec.is_present(absent):
            continue
        store(case.built, level, at, absent)
        found = reasons(case.built, case.truth, pages_of(case.built))
        if found:
            assert found == [("reserved", iova, iova + (1 << spec.shift) - 1, level)]
        else:
            assert not absent & fmt.occupied(level) or spec.is_leaf(absent)


def test_an_item_that_skips_levels(new_table):
    fmt = open_format("amdv1", {"levels": 4})
    case = linked(new_table, fmt)
    built = case.built
    level2 = next((a, i) for n, a, i in case.steps if n == 2)
    table0 = fmt.levels[1].table_pa(next(i for n, _, i in case.steps if n == 1))
    store(built, 2, level2[0], level2[1] & ~0xE00 & ~fmt.levels[2].table_pa_mask | 1 << 9 | table0)
    assert verify(*built.args, case.truth).equal
    owned = pages_of(built)
    expected = ("reserved", case.iova, case.iova + (1 << fmt.levels[2].shift) - 1, 2)
    assert reasons(built, case.truth, owned) == [expected]
    assert quarantined(built, case.truth, owned) == [expected[1:3]]
    with pytest.raises(ValueError, match="not changed here"):
        built.table.unmap(case.iova, case.iova + 0xFFF)


def test_a_page_at_two_levels_condemns_both(new_table):
    fmt = FORMATS[0]
    case = linked(new_table, fmt)
    built = case.built
    far = case.iova + (1 << 39)
    built.table.map(Extents.of([(far, far + 0xFFF, 0x2000, 3)]))
    truth = Extents.of([(case.iova, case.iova + 0xFFF, 0x1000, 3), (far, far + 0xFFF, 0x2000, 3)])
    level1 = fmt.levels[2].table_pa(next(i for n, _, i in case.steps if n == 2))
    item_at = walk(*built.args, far).steps[2]
    store(built, 1, item_at[1], item_at[2] & ~fmt.levels[1].table_pa_mask | level1)
    found = quarantined(built, truth, pages_of(built))
    assert any(a <= case.iova <= b for a, b in found)
    assert any(a <= far <= b for a, b in found)


@settings(max_examples=100)
@given(fmt=st.sampled_from(FORMATS), data=st.data())
def test_tables_of_leaves_need_no_look(new_table, fmt, data):
    """What is unfit is the same where the descent leaves them out, whatever is in the table."""
    built = new_table(fmt)
    size = 1 << fmt.levels[min(fmt.top_level, 1)].shift
    rows = [(raw + n * size, size) for raw in starts(fmt) for n in range(data.draw(st.integers(1, 4)))]
    built.table.map(Extents.of([(extend(fmt, a), extend(fmt, a) + n - 1, a % (1 << 31), 3) for a, n in rows]))
    for raw in starts(fmt):
        for _, at, _ in walk(*built.args, extend(fmt, raw)).steps:
            if data.draw(st.booleans()):
                pa = at + data.draw(st.integers(0, 3)) * fmt.item_bytes
                bits = data.draw(st.sampled_from([0, 1, 1 << 12, 1 << (fmt.item_bytes * 8 - 1), 0x7000]))
                old = int.from_bytes(built.ram.read(pa, fmt.item_bytes), "little")
                built.ram.write(pa, (old ^ bits).to_bytes(fmt.item_bytes, "little"))
    owned = pages_of(built)[:: data.draw(st.sampled_from([1, 2]))]
    tm = TableMemory(fmt, built.ram)
    whole = unfit(tm, descend(tm, built.table.root_pa), owned)
    less = descend(tm, built.table.root_pa, known=lambda tables: only_leaves(tm, tables))
    found = unfit(tm, less, owned)
    for column in ("iova", "last", "reason", "level", "text"):
        assert getattr(found, column).tolist() == getattr(whole, column).tolist()


def test_owned_goes_with_a_whole_table(new_table):
    case = linked(new_table, FORMATS[0])
    with pytest.raises(ValueError, match="whole"):
        verify(*case.built.args, case.truth, owned=pages_of(case.built), start=0, last=0xFFF)


# ---- edges


@every
def test_leaves_across_an_edge(new_table, fmt):
    """Every leaf size that Linux makes: each cut is in the leaf that ``leaves`` names, or in none."""
    built = new_table(fmt)
    small = 1 << fmt.levels[0].shift
    most = 31 if len(fmt.leaf_lg2s) > 1 else 24
    room = min(fmt.input_lg2 - 1 - bool(fmt.sign_extend), most, fmt.levels[0].leaf_pa(ALL).bit_length() - 1)
    rows = [(raw + small, raw + (1 << room) - 2 * small - 1) for raw in starts(fmt)]
    truth = Extents.of([(extend(fmt, a), extend(fmt, b), a % (1 << 31), 3) for a, b in rows])
    built.table.map(truth)
    there = leaves(*built.args)
    assert {n for n in fmt.leaf_lg2s if n + 2 <= room} <= set(there.lg2.tolist())
    spans = sorted(zip(there.iova.tolist(), there.last.tolist(), there.pa.tolist(), strict=True))
    rng = np.random.default_rng(1)
    picked = [spans[0], spans[-1]]
    for lg2 in set(there.lg2.tolist()):
        mine = np.flatnonzero(there.lg2 == lg2)
        picked += [spans[i] for i in rng.choice(mine, 2)]
    for first, last, _ in picked:
        size = last - first + 1
        for cut in {first, first + 1, first + size // 2, first + small, last, last + 1, first - small}:
            cut %= 1 << 64
            want = next(((a, b, p) for a, b, p in spans if a < cut <= b), None)
            found = crossing(*built.args, np.array([cut], np.uint64))
            got = [*zip(found.iova.tolist(), found.last.tolist(), found.pa.tolist(), strict=True)]
            assert got == ([want] if want else []), (hex(cut), first, last)
    cuts = np.array([c for first, last, _ in picked for c in (first, last, last)], np.uint64)
    found = crossing(*built.args, cuts)
    assert found.iova.tolist() == sorted({a for a, b, _ in picked if b > a})
    assert len(crossing(*built.args, np.zeros(0, np.uint64))) == 0


@settings(max_examples=30)
@given(data=st.data())
def test_the_walk_to_an_edge_is_safe_in_noise(data):
    """Whatever the memory holds: it ends, reads nothing that is not there, and writes nothing."""
    fmt = data.draw(st.sampled_from(FORMATS))
    unit = max(fmt.bytes_of(n) for n in range(len(fmt.levels)))
    ram = Ram.of(8 * max(unit, 4096))
    seed = data.draw(st.integers(0, 2**32))
    ram.words[:] = np.random.default_rng(seed).integers(0, ALL, len(ram.words), np.uint64, endpoint=True)
    if data.draw(st.booleans()):
        ram.words &= np.uint64(0xFC00_0000_0000_0000 | 0x7FFF | 7)
    before = bytes(ram.bytes)
    cuts = np.array(data.draw(st.lists(st.integers(0, ALL), max_size=20)), np.uint64)
    found = crossing(fmt, ram, unit, cuts)
    assert bytes(ram.bytes) == before
    inside = [
        any(int(a) < c <= int(b) for c in cuts.tolist()) for a, b in zip(found.iova, found.last, strict=True)
    ]
    assert all(inside)


def test_a_root_that_needs_no_look(new_table):
    """What is unknown is looked at once, whatever is needed how often."""
    case = linked(new_table, FORMATS[0])
    asked = []
    state = Deferred(
        *case.built.args, lambda a, b: case.truth, owned=lambda: asked.append(1) or pages_of(case.built)
    )
    for _ in range(2):
        assert state.need(case.iova, case.iova + 0xFFF) == []
    assert asked == [1]
    assert state.validated.within(*Range(case.iova, case.iova + 0xFFF))
