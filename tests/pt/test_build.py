# SPDX-License-Identifier: Apache-2.0
"""Building tables against a dict model, and against the sizes and places that Linux chooses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from table_support import rows_of

from iokeep.errors import MemoryAbsent
from iokeep.pt import build as build_module
from iokeep.pt import reference
from iokeep.pt.build import AlreadyMapped, Table
from iokeep.pt.extents import Extents
from iokeep.pt.leaves import extents
from iokeep.pt.tables import table_pages
from iokeep.pt.verify import verify
from iokeep.pt.walk import walk

K4, M2, G1 = 1 << 12, 1 << 21, 1 << 30


def pgsize(iova, pa, size, lg2s):
    """drivers/iommu/iommu.c, iommu_pgsize(): the largest size that fits and that divides iova and pa."""
    return max(lg2 for lg2 in lg2s if 1 << lg2 <= size and (iova | pa) & ((1 << lg2) - 1) == 0)


def model_leaves(iova, last, pa, lg2s):
    out = []
    while iova <= last:
        lg2 = pgsize(iova, pa, last - iova + 1, lg2s)
        out.append((iova, pa, lg2))
        iova, pa = iova + (1 << lg2), pa + (1 << lg2)
    return out


@st.composite
def areas(draw, fmt=None):
    """Sorted, disjoint extents within 4 GiB, aligned in all the ways that matter."""
    rows, iova = [], 0
    for _ in range(draw(st.integers(1, 6))):
        align = draw(st.sampled_from([K4, K4, M2, G1]))
        iova = (iova + align - 1) & -align
        size = draw(st.sampled_from([K4, 5 * K4, M2, M2 + K4, 3 * M2 - K4]))
        pa = draw(st.integers(0, 7)) * align
        if align == G1 and draw(st.booleans()):
            size = draw(st.sampled_from([G1, G1 + M2, G1 + K4]))
        else:
            iova += draw(st.integers(0, 3)) * K4
            pa += iova & (align - 1) if draw(st.booleans()) else 0
        rows.append((iova, iova + size - 1, pa, draw(st.sampled_from([1, 2, 3]))))
        iova += size + draw(st.sampled_from([0, K4, M2]))
    return Extents.of(rows)


@settings(max_examples=80)
@given(data=st.data(), want=areas(), max_lg2=st.sampled_from([None, 12, 21]), seed=st.integers(0, 2))
def test_leaf_sizes_are_those_of_iommu_map(formats, new_table, data, want, max_lg2, seed):
    fmt = data.draw(st.sampled_from(formats))
    if max_lg2 == 12 or fmt.leaf_lg2s == (12,):
        want = Extents.of([r for r in rows_of(want) if r[1] - r[0] < 8 * M2])
        if not len(want):
            return
    built = new_table(fmt, size=8 << 20, seed=seed)
    built.table.map(want, max_lg2)
    lg2s = [lg2 for lg2 in fmt.leaf_lg2s if max_lg2 is None or lg2 <= max_lg2]
    model = [leaf for a, z, p, _ in rows_of(want) for leaf in model_leaves(a, z, p, lg2s)]
    found = built.table.leaves()
    assert list(zip(found.iova.tolist(), found.pa.tolist(), found.lg2.tolist(), strict=True)) == model
    prots = want.prot if fmt.write_only else np.where(want.prot == 2, 3, want.prot).astype(np.uint8)
    expected = Extents(want.iova, want.last, want.pa, prots)
    assert rows_of(extents(*built.args)[0]) == rows_of(expected.canonical())
    assert verify(*built.args, want).equal
    assert sorted(built.given) == built.table.pages().tolist() == table_pages(*built.args).tolist()


@settings(max_examples=60)
@given(data=st.data(), want=areas())
def test_small_and_large_maps_write_the_same_items(formats, new_table, data, want):
    """One extent at a time goes item by item, all at once goes by arrays: the same leaves, the same items."""
    fmt = data.draw(st.sampled_from(formats))
    one, all_ = new_table(fmt, size=8 << 20), new_table(fmt, size=8 << 20)
    want = Extents.of([r for r in rows_of(want) if r[1] - r[0] < 8 * M2])
    for a, z, p, q in rows_of(want):
        one.table.map(Extents.of([(a, z, p, q)]))
    segments = build_module._SMALL_ITEMS
    build_module._SMALL_ITEMS = 0
    try:
        all_.table.map(want)
    finally:
        build_module._SMALL_ITEMS = segments
    a, b = one.table.leaves(), all_.table.leaves()
    for name in ("iova", "pa", "lg2", "prot", "item"):
        assert getattr(a, name).tolist() == getattr(b, name).tolist()


@settings(max_examples=60)
@given(
    data=st.data(),
    first=st.integers(0, 2**20),
    pages=st.integers(1024, 9000),
    frame=st.integers(0, 2**20),
    prot=st.integers(1, 3),
    seed=st.integers(0, 3),
)
def test_a_long_run_of_pages_compiled(formats, new_table, data, first, pages, frame, prot, seed):
    """One extent of single pages, from any item of a table to any other, some of them under tables that are
    there: the bytes are those that NumPy writes.
    """
    fmt = data.draw(st.sampled_from([f for f in formats if f.levels[0].lg2s]))
    shift, near = fmt.levels[0].shift, data.draw(st.sampled_from([None, -3, -700, 1, 5000, 1 << 19]))
    want = Extents.of([(first << shift, ((first + pages) << shift) - 1, frame << shift, prot)])
    tables = []
    for compiled in (False, True):
        built = new_table(fmt, size=8 << 20, seed=seed)
        if near is not None and first + near >= 0:
            at = first + (near if near < 1 else near + pages) << shift
            built.table.map(Extents.of([(at, at + (1 << shift) - 1, 1 << 30, 3)]), max_lg2=shift)
        built.table.map(want, max_lg2=shift, compiled=compiled, threads=2)
        tables.append(built)
    one, other = tables
    assert one.given == other.given
    assert one.ram.bytes.tobytes() == other.ram.bytes.tobytes()
    assert verify(*other.args, other.table.leaves().extents(), compiled=False).equal


def test_items_are_the_kernels(new_table, formats):
    for fmt, table, leaf_rw, leaf_r, large in (
        (formats[1], 0x403, 0x3, 0x1, 0x83),
        (formats[3], 0x227, 0x67, 0x25, 0xE7),
    ):
        built = new_table(fmt)
        built.table.map(
            Extents.of([(0, 0xFFF, 0x7000, 3), (0x1000, 0x1FFF, 0x7000, 1), (M2, 2 * M2 - 1, M2, 3)])
        )
        *upper, leaf = walk(*built.args, 0).steps
        assert [item & 0xFFF for _, _, item in upper] == [table] * 3
        assert leaf[2] == 0x7000 | leaf_rw
        assert walk(*built.args, 0x1000).steps[-1][2] == 0x7000 | leaf_r
        assert walk(*built.args, M2).steps[-1][2] == M2 | large


def test_map_of_an_occupied_iova_changes_nothing(new_table, fmt):
    built = new_table(fmt, size=16 << 20)
    large = G1 if len(fmt.leaf_lg2s) > 1 else M2
    built.table.map(Extents.of([(M2, M2 + K4 - 1, 0x5000, 3), (G1, G1 + large - 1, G1, 3)]))
    before, given = built.ram.bytes.copy(), list(built.given)
    many = [(n << 12, (n << 12) + 0xFFF, n << 12, 3) for n in range(2000) if n != 512]
    for rows in (
        [(M2, M2 + K4 - 1, 0, 3)],
        [(0, 2 * M2 - 1, 0, 3)],
        [(0, 4 * M2 - 1, 0, 3)],
        [(0, K4 - 1, 0, 3), (G1 + K4, G1 + 2 * K4 - 1, 0, 3)],
        [*many, (G1, G1 + K4 - 1, 0, 3)],
        [*many, (1 << 33, (1 << 33) + 3 * G1 - 1, 0, 3), (G1, G1 + K4 - 1, 0, 3)][:2001],
        [(n << 12, (n << 12) + 0xFFF, n << 12, 3) for n in range(2000)],
    ):
        with pytest.raises(AlreadyMapped) as info:
            built.table.map(Extents.of(rows))
        assert built.table.iova_to_phys(np.array([info.value.iova], np.uint64))[0]
        assert (built.ram.bytes == before).all()
        assert built.given == given
        assert built.freed == []


def test_a_large_leaf_takes_the_place_of_an_emptied_table(new_table, formats):
    """Linux: clear_contig() in iommu_pt.h frees the empty table, then installs the leaf."""
    for fmt in formats[:5]:
        built = new_table(fmt, size=16 << 20)
        small = Extents.of([(0, 4 * M2 - 1, 0, 3), (G1, G1 + K4 - 1, 0x9000, 3)])
        built.table.map(small, max_lg2=12)
        with_tables = len(built.table.pages())
        gone = built.table.unmap(0, 4 * M2 - 1)
        assert len(gone) == 2048
        assert len(built.table.pages()) == with_tables  # emptied tables stay linked
        assert built.freed == []
        again = Extents.of([(0, 4 * M2 - 1, 8 * M2, 3)])
        built.table.map(again)
        assert len(built.freed) == 4
        assert set(built.table.leaves(0, 4 * M2 - 1).lg2.tolist()) == {21}
        assert verify(*built.args, Extents.of([*rows_of(again), (G1, G1 + K4 - 1, 0x9000, 3)])).equal
        built.table.unmap(0, 4 * M2 - 1)
        built.table.unmap(G1, G1 + K4 - 1)
        if 30 in fmt.leaf_lg2s:
            built.table.map(Extents.of([(0, 3 * G1 - 1, G1, 1)]))  # over tables of two levels
            assert built.table.leaves().lg2.tolist() == [30, 30, 30]
            assert len(set(built.freed)) == len(built.freed)
            assert sorted(set(built.given) - set(built.freed)) == built.table.pages().tolist()


def test_unmap_never_splits(new_table, formats):
    built = new_table(formats[1])
    built.table.map(Extents.of([(0, 4 * M2 - 1, 0, 3), (8 * M2, 8 * M2 + 0xFFF, 0, 3)]))
    before = built.ram.bytes.copy()
    for a, z in ((0, K4 - 1), (K4, 4 * M2 - 1), (0, 4 * M2 - 1 - K4), (M2 + K4, 1 << 40)):
        with pytest.raises(ValueError, match="cuts the leaf"):
            built.table.unmap(a, z)
        assert (built.ram.bytes == before).all()
    assert len(built.table.unmap(6 * M2, 7 * M2)) == 0
    assert len(built.table.unmap(M2, 2 * M2 - 1)) == 1
    assert built.table.unmap(0, (1 << 48) - 1).iova.tolist() == [0, 2 * M2, 3 * M2, 8 * M2]
    with pytest.raises(ValueError, match="no range"):
        built.table.unmap(5, 4)


@pytest.mark.parametrize(
    "rows",
    [
        [(1, 0x1000, 0, 3)], [(0, 0xFFE, 0, 3)], [(0, 0xFFF, 1, 3)], [(0, 0xFFF, 0, 0)], [(0, 0xFFF, 0, 4)],
        [(0, 0x1FFF, 0, 3), (0x1000, 0x2FFF, 0, 3)], [(1 << 60, (1 << 60) + 0xFFF, 0, 3)],
        [(0, 0xFFF, 1 << 52, 3)],
        [(0, 0x1FFF, (1 << 52) - 0x1000, 3)], [(0, 2**64 - 1, 0, 3)], [(0x2000, 0xFFF, 0, 3)],
    ],
)  # fmt: skip
def test_what_cannot_be_expressed(new_table, fmt, rows):
    built = new_table(fmt)
    before = built.ram.bytes.copy()
    with pytest.raises(ValueError):
        built.table.map(Extents.of(rows))
    assert (built.ram.bytes == before).all()


def test_upper_half_of_a_sign_extended_space(new_table, formats):
    fmt = formats[3]
    built = new_table(fmt)
    rows = [(0x7FFF_FFFF_F000, 0x7FFF_FFFF_FFFF, 0x1000, 3), (2**64 - K4, 2**64 - 1, 0x2000, 3)]
    built.table.map(Extents.of(rows))
    assert rows_of(extents(*built.args)[0]) == rows
    assert verify(*built.args, Extents.of(rows)).equal
    assert built.table.iova_to_phys(np.array([2**64 - 1, 0x7FFF_FFFF_F001, 1 << 47], np.uint64)).tolist() == [
        0x2FFF, 0x1001, 0,
    ]  # fmt: skip
    assert len(built.table.leaves(1 << 63, 2**64 - 1)) == 1
    assert built.table.unmap(0, 2**64 - 1).pa.tolist() == [0x1000, 0x2000]


def test_iova_to_phys_follows_linux_not_hardware(new_table, formats):
    """vtdss_pt_load_entry_raw(): any bit makes an item; x86_64_pt_load_entry_raw(): P does."""
    for fmt, found in ((formats[1], 0x9000), (formats[3], 0)):
        built = new_table(fmt)
        built.table.map(Extents.of([(0, 0xFFF, 0x9000, 3)]))
        at = walk(*built.args, 0).steps[-1][1]
        built.ram.store64(at, 0x9000)  # R = W = 0, P = 0
        assert walk(*built.args, 0).pa is None
        assert built.table.iova_to_phys(np.zeros(1, np.uint64)).tolist() == [found]
        if found:
            with pytest.raises(AlreadyMapped):
                built.table.map(Extents.of([(0, 0xFFF, 0x9000, 3)]))
            assert len(built.table.unmap(0, 0xFFF)) == 1
        built.table.map(Extents.of([(0, 0xFFF, 0x9000, 3)]))
        built.ram.store64(at, built.ram.load64(at) | 1 << 62)  # a reserved bit or attribute stops nobody here
        assert built.table.iova_to_phys(np.zeros(1, np.uint64)).tolist() == [0x9000]


def test_iova_to_phys_through_an_absent_table(new_table, formats):
    built = new_table(formats[1])
    built.table.map(Extents.of([(0, 0xFFF, 0x9000, 3)]))
    _, at, item = walk(*built.args, 0).steps[1]
    built.ram.store64(at, item | 1 << 45)
    with pytest.raises(MemoryAbsent):
        built.table.iova_to_phys(np.zeros(1, np.uint64))


def test_iova_to_phys_of_many(new_table, fmt):
    built = new_table(fmt, size=16 << 20)
    rng = np.random.default_rng(7)
    pa = (rng.permutation(4096).astype(np.uint64) + np.uint64(1 << 12)) << np.uint64(12)
    iova = (np.arange(4096, dtype=np.uint64) + np.uint64(100)) << np.uint64(12)
    built.table.map(Extents(iova, iova + np.uint64(0xFFF), pa, np.full(4096, 3, np.uint8)))
    built.table.map(Extents.of([(G1, G1 + 3 * M2 - 1, G1, 1)]))
    probe = rng.integers(0, 2 * G1, 20000).astype(np.uint64)
    probe[:4096] = iova + rng.integers(0, 4096, 4096).astype(np.uint64)
    got = built.table.iova_to_phys(probe)
    order = np.argsort(probe)
    assert (built.table.iova_to_phys(probe[order]) == got[order]).all()
    for i in [*range(0, 20000, 97), *range(50)]:
        want = reference.walk(*built.args, int(probe[i]))
        assert int(got[i]) == (want[0] if want else 0)
    assert built.table.iova_to_phys(np.zeros(0, np.uint64)).tolist() == []


def test_free_all_gives_every_page_back_once(new_table, fmt):
    built = new_table(fmt)
    built.table.map(Extents.of([(0, 5 * M2 + 0xFFF, 0x1000, 3), (G1, G1 + M2 - 1, G1, 1)]))
    built.table.free_all()
    assert sorted(built.freed) == sorted(built.given)


def test_a_table_goes_on_where_another_left_off(new_table, fmt):
    """Adoption: a new Table on the old root."""
    built = new_table(fmt)
    built.table.map(Extents.of([(0, M2 - 1, M2, 3)]))
    again = Table(fmt, built.ram, built.table.root_pa, built.table._alloc, built.table._free)
    again.map(Extents.of([(M2, 2 * M2 - 1, 2 * M2, 3)]))
    assert rows_of(extents(*built.args)[0]) == [(0, 2 * M2 - 1, M2, 3)]


class Model(RuleBasedStateMachine):
    """Random maps and unmaps; the model is a dict of leaves as Linux would have made them."""

    fmts: tuple = ()
    build = None

    @initialize(n=st.integers(0, 7), seed=st.integers(0, 3))
    def start(self, n, seed):
        self.fmt = self.fmts[n]
        self.built = self.build(self.fmt, size=6 << 20, seed=seed)
        self.leaves = {}  # iova -> (pa, lg2, prot)

    def mapped(self, iova, last):
        return any(a <= last and iova <= a + (1 << lg2) - 1 for a, (_, lg2, _) in self.leaves.items())

    @rule(
        page=st.integers(0, 4 * 512), pages=st.sampled_from([1, 2, 16, 511, 512, 513, 1024]),
        prot=st.integers(1, 3),
        pa=st.integers(0, 1 << 12), aligned=st.booleans(), high=st.booleans(),
    )  # fmt: skip
    def map(self, page, pages, prot, pa, aligned, high):
        if aligned:
            page, pa = page & ~511, pa & ~511
        iova = page * K4
        if high:
            iova += (1 << (self.fmt.input_lg2 - 1)) - 8 * M2 if not self.fmt.sign_extend else 2**64 - 8 * M2
        last = iova + pages * K4 - 1
        extent = Extents.of([(iova, last, pa * K4, prot)])
        if self.mapped(iova, last):
            with pytest.raises(AlreadyMapped):
                self.built.table.map(extent)
            return
        self.built.table.map(extent)
        got = prot if self.fmt.write_only or prot == 1 else 3
        for a, p, lg2 in model_leaves(iova, last, pa * K4, self.fmt.leaf_lg2s):
            self.leaves[a] = (p, lg2, got)

    @rule(
        page=st.integers(0, 5 * 512), pages=st.sampled_from([1, 3, 512, 513, 4096]), everything=st.booleans()
    )
    def unmap(self, page, pages, everything):
        a, z = (0, 2**64 - 1) if everything else (page * K4, (page + pages) * K4 - 1)
        touched = [i for i, (_, lg2, _) in self.leaves.items() if i <= z and a <= i + (1 << lg2) - 1]
        cut = [i for i in touched if i < a or i + (1 << self.leaves[i][1]) - 1 > z]
        if cut:
            with pytest.raises(ValueError, match="cuts"):
                self.built.table.unmap(a, z)
            return
        gone = self.built.table.unmap(a, z)
        assert gone.iova.tolist() == sorted(touched)
        for i in touched:
            del self.leaves[i]

    @invariant()
    def same(self):
        if not hasattr(self, "built"):
            return
        found = self.built.table.leaves()
        rows = zip(*(getattr(found, c).tolist() for c in ("iova", "pa", "lg2", "prot")), strict=True)
        assert {i: (p, lg2, q) for i, p, lg2, q in rows} == self.leaves
        probes = [x for i, (_, lg2, _) in list(self.leaves.items())[:50] for x in (i, i + (1 << lg2) - 1)]
        probes += [
            i + (1 << lg2) for i, (_, lg2, _) in list(self.leaves.items())[:50] if i + (1 << lg2) < 2**64
        ]
        got = self.built.table.iova_to_phys(np.array(probes, np.uint64)).tolist()
        for probe, pa in zip(probes, got, strict=True):
            want = 0
            for i in (probe & -K4, probe & -M2, probe & -G1):
                if i in self.leaves and probe < i + (1 << self.leaves[i][1]):
                    want = self.leaves[i][0] + probe - i
            assert pa == want
        runs = sorted((i, i + (1 << lg2) - 1, p, q) for i, (p, lg2, q) in self.leaves.items())
        verdict = verify(*self.built.args, Extents.of(runs))
        assert verdict.equal, verdict.mismatches
        live = set(self.built.given) - set(self.built.freed)
        assert live >= set(self.built.table.pages().tolist())


def test_random_maps_and_unmaps(formats, new_table):
    from hypothesis.stateful import run_state_machine_as_test

    machine = type("Bound", (Model,), {"fmts": tuple(formats), "build": staticmethod(new_table)})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=120, stateful_step_count=25, deadline=None)
    )
