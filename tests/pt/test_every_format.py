# SPDX-License-Identifier: Apache-2.0
"""One suite over every format in every kind of configuration: built, walked, proved, damaged."""

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from table_support import format_id, rows_of

from iokeep.errors import InputError, MemoryAbsent
from iokeep.mem.ram import Ram
from iokeep.pt import reference
from iokeep.pt.build import AlreadyMapped
from iokeep.pt.digest import digest_extents
from iokeep.pt.extents import Extents
from iokeep.pt.layout import kernel_layout, table_layout
from iokeep.pt.leaves import extents, leaves
from iokeep.pt.registry import open_format
from iokeep.pt.table_digest import digest
from iokeep.pt.tables import REASONS, TableMemory, descend, expand, table_pages
from iokeep.pt.verify import verify
from iokeep.pt.walk import walk

CONFIGS = [
    ("vtdss", {"levels": 4}),
    ("x86_64", {"levels": 5}),
    ("x86_64", {"levels": 4, "sign_extend": 0, "c_bit": 51}),
    *(("amdv1", {"levels": n}) for n in range(1, 7)),
    ("amdv1", {"levels": 4, "output_bits": 48, "force_coherence": 0}),
    ("amdv1", {"levels": 5, "c_bit": 47}),
    *(("riscv64", {"levels": n, "stage": stage}) for n in (3, 4, 5) for stage in (1, 2)),
    ("riscv64", {"levels": 3, "svnapot": 0, "svpbmt": 0, "hardware_ad": 1, "output_bits": 44}),
    *(("s390_zpci", {"levels": n}) for n in range(1, 6)),
    ("arm_lpae_s1", {"granule": 4096, "input_bits": 39, "output_bits": 40, "ttbr": 1}),
    ("arm_lpae_s1", {"granule": 16384, "input_bits": 48, "output_bits": 48}),
    ("arm_lpae_s1", {"granule": 65536, "input_bits": 52, "output_bits": 52}),
    ("arm_lpae_s1", {"granule": 4096, "input_bits": 52, "output_bits": 52}),
    ("arm_lpae_s2", {"granule": 4096, "input_bits": 40, "output_bits": 40}),
    ("arm_lpae_s2", {"granule": 4096, "input_bits": 44, "output_bits": 44}),
    ("arm_lpae_s2", {"granule": 16384, "input_bits": 40, "output_bits": 40}),
    ("arm_lpae_s2", {"granule": 65536, "input_bits": 44, "output_bits": 44}),
    ("arm_lpae_s1", {"quirks": "0x80"}),
    ("arm_lpae_s2", {"granule": 4096, "input_bits": 40, "output_bits": 40, "hw_dirty": 1}),
    ("arm_mali_lpae", {}),
    ("arm_v7s", {}),
]
FORMATS = [open_format(*config) for config in CONFIGS]
PLAIN = [fmt for fmt in FORMATS if fmt.name in reference.DECODERS]
ALL = 2**64 - 1
KEY = b"0123456789abcdef"


every = pytest.mark.parametrize("fmt", FORMATS, ids=format_id)


def said(fmt, prot):
    """The prot that the format can say."""
    return 3 if prot == 2 and not fmt.write_only else prot


def extend(fmt, raw):
    return int(fmt.extend(np.array([raw], np.uint64))[0])


def output_limit(fmt):
    """All pas below this power of two can be said."""
    return fmt.config.get("c_bit") or fmt.levels[0].leaf_pa(ALL).bit_length()


def store(fmt, ram, at, level, item):
    order = "little" if fmt.byte_order == "<" else "big"
    ram.write(at, (item ^ fmt.levels[level].invert).to_bytes(fmt.item_bytes, order))


def pgsize_leaves(fmt, iova, last, pa):
    """drivers/iommu/iommu.c, iommu_pgsize(): at each point the largest size that fits and divides both."""
    out = []
    while iova <= last:
        lg2 = max(n for n in fmt.leaf_lg2s if 1 << n <= last - iova + 1 and not (iova | pa) % (1 << n))
        out.append((iova, pa, lg2))
        iova, pa = iova + (1 << lg2), pa + (1 << lg2)
    return out


# -- the format as data --------------------------------------------------------------------------------


def _pa_bits(spec, mask):
    for piece, _ in spec.pa_pieces:
        mask |= piece
    return mask


@every
def test_every_bit_has_a_meaning(fmt):
    """A bit is translation, permission, attribute, reserved or ignored; some also tell a leaf."""
    everything = (1 << 8 * fmt.item_bytes) - 1
    for spec in fmt.levels:
        for leaf in (True, False):
            if not (spec.leaf if leaf else spec.table):
                continue
            perm = spec.valid_mask | (spec.r_mask | spec.w_mask if leaf else spec.tr_mask | spec.tw_mask)
            masks = [
                _pa_bits(spec, spec.leaf_pa_mask if leaf else spec.table_pa_mask),
                spec.leaf_attrs if leaf else spec.table_attrs,
                spec.leaf_reserved if leaf else spec.table_reserved,
                spec.leaf_ignored if leaf else spec.table_ignored,
            ]
            coded = spec.leaf_mask | perm
            for pairs in (spec.valid_values, spec.leaf_bad if leaf else spec.table_bad):
                for mask, _ in pairs:
                    coded |= mask
            for contig in spec.contig if leaf else ():
                coded |= contig.mask
            for mask, _, _ in () if leaf else spec.next_levels:
                coded |= mask
            union = coded
            for n, mask in enumerate(masks):
                union |= mask
                assert not any(mask & other for other in masks[n + 1 :])
            assert union == everything, hex(everything ^ union)
            assert not perm & (masks[0] | masks[2])


@every
def test_what_the_kernel_writes_is_valid(fmt):
    for number, spec in enumerate(fmt.levels):
        if spec.leaf:
            for contig in (None, *spec.contig):
                lg2 = spec.shift + (contig.lg2 if contig else 0)
                pa = 1 << lg2 if lg2 < output_limit(fmt) else 0
                for prot in (1, 2, 3):
                    raw = fmt.leaf_items(
                        number, np.array([pa], np.uint64), np.array([prot], np.uint8), contig
                    )
                    item = int(raw[0]) ^ spec.invert
                    assert spec.is_present(item)
                    assert spec.is_leaf(item)
                    assert spec.bad_leaf(item) is None
                    assert spec.contig_of(item) is contig
                    assert spec.leaf_pa(item) >> lg2 << lg2 == pa
                    assert spec.leaf_prot(item) == said(fmt, prot)
        if spec.table:
            below = fmt.bytes_of(number - 1)
            item = int(fmt.table_items(number, np.array([below], np.uint64))[0]) ^ spec.invert
            assert spec.is_present(item)
            assert not spec.is_leaf(item)
            assert spec.bad_table(item) is None
            assert spec.table_pa(item) == below
            assert spec.next_level(item, number) == number - 1
            assert item & spec.table_attrs == spec.table_attrs_value


def test_bits_seen_in_real_kernels():
    one, prot = np.array([0x200000] * 3, np.uint64), np.array([1, 2, 3], np.uint8)
    amd = open_format("amdv1", {})
    assert [hex(v) for v in amd.leaf_items(0, one, prot).tolist()] == [
        "0x3000000000200001", "0x5000000000200001", "0x7000000000200001",
    ]  # fmt: skip
    two = amd.leaf_items(0, one, prot, amd.levels[0].contig[0])
    assert hex(int(two[2])) == "0x7000000000200e01"  # 8 KiB: no ones
    four = amd.leaf_items(0, one, prot, amd.levels[0].contig[1])
    assert hex(int(four[2])) == "0x7000000000201e01"  # 16 KiB: bit 12
    assert [hex(int(amd.table_items(n, one[:1])[0])) for n in (1, 2)] == [
        "0x6000000000200201", "0x6000000000200401",
    ]  # fmt: skip
    riscv = open_format("riscv64", {})
    assert [hex(v) for v in riscv.leaf_items(0, one, prot).tolist()] == ["0x8005b", "0x800df", "0x800df"]
    assert hex(int(riscv.leaf_items(0, one, prot, riscv.levels[0].contig[0])[2])) == "0x80000000000820df"
    assert hex(int(riscv.table_items(1, one[:1])[0])) == "0x80001"
    s390 = open_format("s390_zpci", {"iota": "0x2d4c804"})
    assert len(s390.levels) == 3
    assert [hex(v) for v in s390.leaf_items(0, one, prot).tolist()] == ["0x200200", "0x200000", "0x200000"]
    assert [hex(int(s390.table_items(n, one[:1])[0])) for n in (1, 2)] == ["0x200000", "0x200007"]


@pytest.mark.parametrize("iota", ["0x4", "nonsense", -1, 1 << 64, "0x810", True])
def test_anchors_that_designate_no_table(iota):
    with pytest.raises(InputError):
        open_format("s390_zpci", {"iota": iota})


# -- built, and read back ------------------------------------------------------------------------------


def _spots(fmt, lg2):
    """Raw IOVAs of leaves of one size where tables begin and end, and at the ends of the space."""
    size, top = 1 << lg2, 1 << fmt.input_lg2
    out = {0, top - size, top // 2 - size, top // 2}
    for spec in fmt.levels[:-1]:
        edge = 1 << (spec.shift + spec.index_bits)
        out |= {edge - size, edge, top - edge}
    return sorted(raw for raw in out if raw >= 0 and raw + size <= top and raw % size == 0)


@every
def test_walk_at_every_level_and_boundary(fmt, new_table):
    for lg2 in fmt.leaf_lg2s:
        for raw in _spots(fmt, lg2):
            built = new_table(fmt)
            iova, size = extend(fmt, raw), 1 << lg2
            pa = max((1 << output_limit(fmt)) - size, 0) & -size
            want = Extents.of([(iova, iova + size - 1, pa, 3)])
            built.table.map(want)
            found = built.table.leaves()
            assert (found.iova.tolist(), found.pa.tolist(), found.lg2.tolist()) == ([iova], [pa], [lg2])
            for offset in (0, size // 2, size - 1):
                step = walk(*built.args, iova + offset)
                assert (step.pa, step.prot, step.leaf_lg2) == (pa + offset, 3, lg2)
                assert built.table.iova_to_phys(np.array([iova + offset], np.uint64))[0] == pa + offset
            for outside in (iova - 1, iova + size):
                if 0 <= outside <= ALL:
                    assert walk(*built.args, outside).pa is None
            assert rows_of(extents(*built.args)[0]) == rows_of(want)
            assert verify(*built.args, want).equal
            assert built.table.unmap(iova, iova + size - 1).iova.tolist() == [iova]
            assert len(built.table.leaves()) == 0
            built.table.free_all()
            assert sorted(built.freed) == sorted(built.given)


@st.composite
def mappings(draw, fmt):
    """Sorted, disjoint extents around the places where tables begin, aligned in all the ways that matter."""
    page = fmt.levels[0].shift
    top, limit = 1 << fmt.input_lg2, 1 << output_limit(fmt)
    starts = [0, top // 2, top - (1 << min(26, fmt.input_lg2))]
    rows, iova = [], draw(st.sampled_from(starts))
    bound = min(iova + (1 << 26), top)  # 64 MiB: no more tables than there is RAM for
    if iova == top // 2:
        bound = min(bound, top)
    for _ in range(draw(st.integers(1, 6))):
        lg2 = draw(st.sampled_from([page, *[n for n in fmt.leaf_lg2s if n <= 25]]))
        count = draw(st.sampled_from([1, 1, 2, 3, 7]))
        extra = draw(st.sampled_from([0, 0, 1 << page]))
        iova = (iova + (1 << lg2) - 1 & -(1 << lg2)) + (draw(st.sampled_from([0, 0, 1])) << page)
        length = (count << lg2) + extra
        if iova + length > bound:
            break
        pa = draw(st.integers(0, (limit >> page) - 1)) << page
        if draw(st.booleans()):
            pa = (pa & -(1 << lg2)) | (iova & ((1 << lg2) - 1))
        pa = min(pa, limit - length & -(1 << page))
        rows.append((iova, iova + length - 1, pa, draw(st.sampled_from([3, 3, 1, 2]))))
        iova += length + (draw(st.sampled_from([0, 0, 1, 5])) << page)
    return Extents.of([(extend(fmt, a), extend(fmt, z), p, q) for a, z, p, q in rows])


@settings(max_examples=150)
@given(data=st.data(), seed=st.integers(0, 2))
def test_build_then_extents_is_the_identity(new_table, data, seed):
    fmt = data.draw(st.sampled_from(FORMATS))
    want = data.draw(mappings(fmt))
    built = new_table(fmt, size=8 << 20, seed=seed)
    built.table.map(want)
    model = [leaf for a, z, p, _ in rows_of(want) for leaf in pgsize_leaves(fmt, a, z, p)]
    found = leaves(*built.args)
    assert list(zip(found.iova.tolist(), found.pa.tolist(), found.lg2.tolist(), strict=True)) == model
    linux = built.table.leaves()
    assert (linux.iova.tolist(), linux.lg2.tolist()) == (found.iova.tolist(), found.lg2.tolist())
    truth = [(a, z, p, said(fmt, q)) for a, z, p, q in rows_of(want)]
    got, problems = extents(*built.args)
    assert len(problems) == 0
    assert rows_of(got) == rows_of(Extents.of(truth).canonical())
    verdict = verify(*built.args, want, layout=kernel_layout(fmt, want))
    assert verdict.equal, verdict.mismatches
    assert verdict.layout_equal
    if len(want):
        layout, chosen = table_layout(*built.args), kernel_layout(fmt, want)
        assert (layout.iova.tolist(), layout.lg2.tolist()) == (chosen.iova.tolist(), chosen.lg2.tolist())
    assert digest(*built.args, KEY) == digest_extents(Extents.of(truth), KEY)
    assert set(built.given) - set(built.freed) == set(table_pages(*built.args).tolist())
    probes = [x for a, z, _, _ in rows_of(want) for x in (a, z, (a + z) // 2)] * 4
    phys = built.table.iova_to_phys(np.array(probes, np.uint64)).tolist()
    for probe, pa in zip(probes, phys, strict=True):
        a, _, p, q = next(row for row in truth if row[0] <= probe <= row[1])
        assert pa == p + probe - a
        step = walk(*built.args, probe)
        assert (step.pa, step.prot) == (pa, q)
    if fmt in PLAIN:
        tree = reference.tree(*built.args)
        assert tree.bad == []
        assert [(i, tree.lg2[i], p) for _, i, p, _ in tree.leaves] == [(i, n, p) for i, p, n in model]


class Model(RuleBasedStateMachine):
    """Random maps and unmaps; the model is a dict of leaves as Linux would have made them."""

    build = None

    @initialize(fmt=st.sampled_from(FORMATS), seed=st.integers(0, 3))
    def start(self, fmt, seed):
        self.fmt = fmt
        self.page = fmt.levels[0].shift
        self.built = self.build(fmt, size=6 << 20, seed=seed)
        self.leaves = {}  # iova -> (pa, lg2, prot)

    def touched(self, a, z):
        return [i for i, (_, lg2, _) in self.leaves.items() if i <= z and a <= i + (1 << lg2) - 1]

    def place(self, page, pages, high):
        top = 1 << self.fmt.input_lg2
        pages = min(pages, top >> self.page)
        raw = min(page << self.page, top - (pages << self.page))
        if high:
            raw = top - (pages << self.page) - raw % min(1 << 24, top - (pages << self.page) + 1)
            raw &= -1 << self.page
        iova = extend(self.fmt, raw)
        return iova, iova + (pages << self.page) - 1

    @rule(
        page=st.integers(0, 700), pages=st.sampled_from([1, 1, 2, 4, 8, 16, 31, 256, 512, 513]),
        pa=st.integers(0, 1 << 11), prot=st.integers(1, 3), aligned=st.booleans(), high=st.booleans(),
    )  # fmt: skip
    def map(self, page, pages, pa, prot, aligned, high):
        if aligned:
            page = page & -pages if pages & (pages - 1) == 0 else page
            pa = page & 0xFFF
        a, z = self.place(page, pages, high)
        extent = Extents.of([(a, z, pa << self.page, prot)])
        if self.touched(a, z):
            with pytest.raises(AlreadyMapped):
                self.built.table.map(extent)
            return
        self.built.table.map(extent)
        for i, p, lg2 in pgsize_leaves(self.fmt, a, z, pa << self.page):
            self.leaves[i] = (p, lg2, said(self.fmt, prot))

    @rule(page=st.integers(0, 900), pages=st.sampled_from([1, 2, 16, 512, 2000]), whole=st.booleans())
    def unmap(self, page, pages, whole):
        a, z = (0, ALL) if whole else self.place(page, pages, False)
        touched = self.touched(a, z)
        if any(i < a or i + (1 << self.leaves[i][1]) - 1 > z for i in touched):
            with pytest.raises(ValueError, match="cuts"):
                self.built.table.unmap(a, z)
            return
        assert self.built.table.unmap(a, z).iova.tolist() == sorted(touched)
        for i in touched:
            del self.leaves[i]

    @rule()
    def grow(self):
        """AMD: a new root above the old one; what was mapped stays."""
        if self.fmt.name == "amdv1" and self.fmt.config["levels"] < 6:
            self.fmt = open_format("amdv1", {**self.fmt.config, "levels": self.fmt.config["levels"] + 1})
            self.built.table = self.built.table.grown(self.fmt)
            self.built.fmt = self.fmt

    @invariant()
    def same(self):
        if not hasattr(self, "built"):
            return
        found = self.built.table.leaves()
        rows = zip(*(getattr(found, c).tolist() for c in ("iova", "pa", "lg2", "prot")), strict=True)
        assert {i: (p, lg2, q) for i, p, lg2, q in rows} == self.leaves
        edges = [(i, i + (1 << lg2) - 1, p, q) for i, (p, lg2, q) in sorted(self.leaves.items())]
        verdict = verify(*self.built.args, Extents.of(edges))
        assert verdict.equal, verdict.mismatches
        probes = np.array([x for a, z, _, _ in edges for x in (a, z)], np.uint64)
        want = [x for a, z, p, _ in edges for x in (p, p + z - a)]
        assert self.built.table.iova_to_phys(probes).tolist() == want
        live = set(self.built.given) - set(self.built.freed)
        assert live == set(self.built.table.pages().tolist())


def test_random_maps_and_unmaps(new_table):
    machine = type("Bound", (Model,), {"build": staticmethod(new_table)})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=80, stateful_step_count=15, deadline=None)
    )


@every
def test_holes_at_every_level(fmt, new_table):
    """A table item that is emptied takes away what it maps, and no more."""
    page = 1 << fmt.levels[0].shift
    for level, spec in enumerate(fmt.levels):
        built = new_table(fmt)
        span = 1 << spec.shift
        rows = [(0, page - 1, page * 3, 3)]
        if 2 * span <= 1 << fmt.input_lg2 and level:
            rows.append((span, span + page - 1, page * 5, 3))
        truth = Extents.of([(extend(fmt, a), extend(fmt, z), p, q) for a, z, p, q in rows])
        built.table.map(truth)
        step = next(s for s in walk(*built.args, extend(fmt, 0)).steps if s[0] == level)
        store(fmt, built.ram, step[1], level, 0)
        assert walk(*built.args, extend(fmt, 0)).why == f"not present at level {level}"
        verdict = verify(*built.args, truth)
        assert [(m.reason, m.iova, m.last) for m in verdict.mismatches] == [
            ("missing", extend(fmt, 0), extend(fmt, page - 1))
        ]
        assert rows_of(extents(*built.args)[0]) == rows_of(truth)[1:]


# -- damaged -------------------------------------------------------------------------------------------


@every
def test_every_bit_of_leaves_and_table_items(fmt, new_table):
    """A flip is found, or the bit is one that hardware ignores."""
    for lg2 in fmt.leaf_lg2s:
        built = new_table(fmt)
        size = 1 << lg2
        raw = size if 2 * size <= 1 << fmt.input_lg2 else 0
        pa = size if lg2 + 1 < output_limit(fmt) else 0
        iova = extend(fmt, raw)
        truth = Extents.of([(iova, iova + size - 1, pa, 3)])
        built.table.map(truth)
        # the last item of a contiguous entry
        for level, at, item in walk(*built.args, iova + size - 1).steps:
            spec = fmt.levels[level]
            leaf = spec.is_leaf(item)
            ignored = spec.leaf_ignored if leaf else spec.table_ignored
            run = spec.contig_of(item) if leaf else None
            if run is not None:
                ignored &= ~run.mask
                for _, mask in spec.memory if hasattr(spec, "memory") else ():
                    ignored &= ~mask  # one item of a run must not differ from the others
            if leaf and lg2 - spec.shift > 3:
                bits = {0, 1, 9, 12, 58, 60, 63} & set(range(8 * fmt.item_bytes))
            else:
                bits = range(8 * fmt.item_bytes)
            for bit in bits:
                if not leaf and len(spec.next_levels) > 1 and 1 << bit < built.ram.size:
                    continue  # another table of the same tree, which may skip to the same leaf
                store(fmt, built.ram, at, level, item ^ 1 << bit)
                verdict = verify(*built.args, truth)
                # Arm with hardware's dirty state has several ways to say "may be written".
                like = leaf and spec.w_values and spec.w_mask >> bit & 1
                like = like and spec.leaf_prot(item ^ 1 << bit) == spec.leaf_prot(item)
                assert verdict.equal == bool(ignored >> bit & 1 or like), (
                    lg2,
                    level,
                    bit,
                    verdict.mismatches,
                )
            store(fmt, built.ram, at, level, item)
        assert verify(*built.args, truth).equal


@every
def test_contiguous_entries(fmt, new_table):
    """Whole ones are one leaf; in a torn one each item translates by itself, and verify says so."""
    for level, spec in enumerate(fmt.levels):
        for contig in spec.contig:
            lg2 = spec.shift + contig.lg2
            size, item_size = 1 << lg2, 1 << spec.shift
            if size > 1 << fmt.input_lg2 or lg2 > output_limit(fmt):
                continue
            built = new_table(fmt)
            raw = size if 2 * size <= 1 << fmt.input_lg2 else 0
            iova, pa = extend(fmt, raw), size if lg2 + 1 <= output_limit(fmt) - 1 else 0
            # A leaf brings the tables; then the entry is written by hand, whether Linux makes it or not.
            first = item_size if spec.shift in fmt.leaf_lg2s else 2 * item_size  # Linux: no leaf of 512G
            most = first.bit_length() - 1
            built.table.map(Extents.of([(iova, iova + first - 1, pa, 3)]), max_lg2=most)
            at = walk(*built.args, iova).steps[-1][1]
            step = np.arange(1 << contig.lg2, dtype=np.uint64) << np.uint64(spec.shift)
            pas = np.full(len(step), pa, np.uint64) if contig.replicated else np.uint64(pa) + step
            good = fmt.leaf_items(level, pas, np.full(len(pas), 3, np.uint8), contig)
            good ^= np.uint64(spec.invert)
            for n, item in enumerate(good.tolist()):
                store(fmt, built.ram, at + n * fmt.item_bytes, level, item)
            truth = Extents.of([(iova, iova + size - 1, pa, 3)])
            found = leaves(*built.args)
            assert (found.iova.tolist(), found.lg2.tolist()) == ([iova], [lg2])
            assert verify(*built.args, truth).equal
            assert rows_of(extents(*built.args)[0]) == rows_of(truth)
            inside = iova + size - 1
            assert len(leaves(*built.args, inside, inside)) == 1
            if lg2 <= 34:  # the digest looks at every 2 MiB
                assert digest(*built.args, KEY) == digest_extents(truth, KEY)
            with pytest.raises(ValueError, match="cuts"):
                built.table.unmap(inside - item_size + 1, inside)
            with pytest.raises(AlreadyMapped):
                built.table.map(Extents.of([(inside - item_size + 1, inside, 0, 3)]), max_lg2=spec.shift)
            last = at + (len(good) - 1) * fmt.item_bytes
            only = int(fmt.leaf_items(level, pas[-1:], np.array([1], np.uint8), contig)[0]) ^ spec.invert
            store(fmt, built.ram, last, level, only)  # read-only
            verdict = verify(*built.args, truth)
            assert {m.reason for m in verdict.mismatches} == {"contig", "prot"}
            assert walk(*built.args, inside).pa == pa + size - 1
            assert len(leaves(*built.args)) == len(good)
            store(fmt, built.ram, last, level, 0)  # not there
            verdict = verify(*built.args, truth)
            assert [(m.reason, m.iova, m.last) for m in verdict.mismatches] == [
                ("contig", iova, inside - item_size),
                ("missing", inside - item_size + 1, inside),
            ]
            assert walk(*built.args, iova).pa == pa
            store(fmt, built.ram, last, level, int(good[-1]))
            assert built.table.unmap(iova, inside).lg2.tolist() == [lg2]
            assert not any(
                fmt.levels[level].is_present(int(item))
                for item in TableMemory(fmt, built.ram).items(
                    TableMemory(fmt, built.ram).index(
                        level, np.array([at & -fmt.bytes_of(level)], np.uint64)
                    ),
                    level,
                )[0]
            )


def test_amd_sizes_that_do_not_belong_to_a_level(new_table):
    """Next level 7 with a size of another level, or with the level's own size, is reserved."""
    fmt = open_format("amdv1", {"levels": 3})
    built = new_table(fmt)
    truth = Extents.of([(0, (1 << 22) - 1, 1 << 22, 3)])
    built.table.map(truth)
    level, at, item = walk(*built.args, 0).steps[-1]
    assert (level, hex(item)) == (1, "0x70000000005ffe01")
    for address in ((1 << 22) - 0x1000 & ~(1 << 20), 0x400000, 0x400000 | 0x3FF000 | 1 << 30):
        store(fmt, built.ram, at, level, item & ~0x000F_FFFF_FFFF_F000 | address)
        reasons = {m.reason for m in verify(*built.args, truth).mismatches}
        assert reasons & {"reserved", "contig"}, hex(address)
    store(fmt, built.ram, at, level, item & ~0xE00)  # next level 0 with bits below its size
    assert "reserved" in walk(*built.args, 0).why


def test_amd_next_level_skipping():
    """Level 4 of the table leads to page tables at once; the IOVA bits between must be 0."""
    fmt = open_format("amdv1", {"levels": 4})
    ram = Ram.of(64 << 10)
    skip = 0x3000 | 1 << 0 | 1 << 9 | 3 << 61  # next level 1
    store(fmt, ram, 0x1000 + 8 * 5, 3, skip)
    leaf = int(fmt.leaf_items(0, np.array([0x7000], np.uint64), np.array([3], np.uint8))[0])
    store(fmt, ram, 0x3000 + 8 * 2, 0, leaf)
    base = 5 << 39
    assert walk(fmt, ram, 0x1000, base + 0x2123).pa == 0x7123
    assert [level for level, _, _ in walk(fmt, ram, 0x1000, base + 0x2123).steps] == [3, 0]
    beyond = walk(fmt, ram, 0x1000, base + 0x2123 + (1 << 21))
    assert beyond.pa is None
    assert "not zero" in beyond.why
    truth = Extents.of([(base + 0x2000, base + 0x2FFF, 0x7000, 3)])
    assert rows_of(extents(fmt, ram, 0x1000)[0]) == rows_of(truth)
    assert verify(fmt, ram, 0x1000, truth).equal
    assert len(leaves(fmt, ram, 0x1000, base + (1 << 21), base + (1 << 39) - 1)) == 0
    assert table_pages(fmt, ram, 0x1000).tolist() == [0x1000, 0x3000]
    for wrong in (0, 4, 5, 6):  # 4 is the table's own level; 0 at level 3 is a leaf
        store(fmt, ram, 0x1000 + 8 * 5, 3, skip & ~0xE00 | wrong << 9)
        assert not verify(fmt, ram, 0x1000, truth).equal
    store(fmt, ram, 0x1000 + 8 * 5, 3, 0x1000 | 1 | 1 << 9 | 3 << 61)
    assert [m.reason for m in verify(fmt, ram, 0x1000, truth).mismatches] == ["loop"]


PAGES = 16


@st.composite
def wild_tables(draw):
    """A format and RAM with tables of a few items each: plausible ones, damaged ones, noise."""
    fmt = draw(st.sampled_from(PLAIN))
    unit = max(fmt.bytes_of(n) for n in range(len(fmt.levels)))
    unit = max(unit, 4096)
    ram = Ram.of(PAGES * unit)
    if any(spec.invert for spec in fmt.levels):  # 0 is valid there
        ram.words[:] = np.uint64(0x20040000_00000000)
        ram.words.view(">u8")[:] = 0x420
    for page in range(1, PAGES):
        for _ in range(draw(st.integers(0, 4))):
            level = draw(st.integers(0, fmt.top_level))
            spec = fmt.levels[level]
            kind = draw(st.sampled_from(["table", "table", "leaf", "run", "flip", "noise"]))
            slot = draw(st.sampled_from([0, 1, 2, 16, spec.items // 2, spec.items - 1])) % spec.items
            count = 1
            if kind == "noise":
                item = draw(st.integers(0, ALL))
            elif kind == "table" and spec.table:
                target = draw(st.integers(1, PAGES + 1)) * unit + draw(st.sampled_from([0, 0, 0x800]))
                item = spec.pa_word(target, leaf=False) | spec.table_base
                if spec.next_levels and draw(st.booleans()):
                    mask, value, _ = draw(st.sampled_from(spec.next_levels))
                    item = item & ~mask | value
            else:
                item = spec.leaf_base | spec.prot_bits[draw(st.integers(0, 3))]
                item |= spec.pa_word(draw(st.integers(0, 2**40)) << 12)
                if kind == "run" and spec.contig:
                    contig = draw(st.sampled_from(spec.contig))
                    item = item & ~contig.mask | contig.value
                    count = draw(st.sampled_from([1, 1 << contig.lg2, 1 << contig.lg2]))
                    slot = slot >> contig.lg2 << contig.lg2
                    count = min(count, spec.items - slot)
            if kind == "flip":
                item ^= 1 << draw(st.integers(0, 63))
            for n in range(count):
                store(fmt, ram, page * unit + (slot + n) * fmt.item_bytes, level, item)
            if count > 1 and draw(st.booleans()):
                n = draw(st.integers(0, count - 1))
                flipped = item ^ 1 << draw(st.integers(0, 63))
                store(fmt, ram, page * unit + (slot + n) * fmt.item_bytes, level, flipped)
    return fmt, ram, unit


@settings(max_examples=300)
@given(data=st.data())
def test_engine_equals_reference_on_wild_tables(data):
    fmt, ram, root = data.draw(wild_tables())
    want = reference.tree(fmt, ram, root)
    upper = descend(TableMemory(fmt, ram), root)
    parts, problems = [upper.leaves], [upper.problems]
    for items, bad in expand(TableMemory(fmt, ram), upper.base, upper.pa, upper.row, upper.prot):
        parts.append(items)
        problems.append(bad)
    found = sorted(
        (i, level, pa, prot, lg2)
        for p in parts
        for level, i, pa, prot, lg2 in zip(
            p.level.tolist(), fmt.extend(p.iova).tolist(), p.pa.tolist(), p.prot.tolist(), p.lg2.tolist(),
            strict=True,
        )
    )  # fmt: skip
    assert found == [(i, level, pa, prot, want.lg2[i]) for level, i, pa, prot in want.leaves]
    bad = sorted(
        (a, z, REASONS[r])
        for p in problems
        for a, z, r in zip(
            fmt.extend(p.iova).tolist(), fmt.extend(p.last).tolist(), p.reason.tolist(), strict=True
        )
    )
    assert bad == want.bad
    assert {pa for p in upper.pages for pa in p.tolist()} == want.pages
    if any(reason in ("loop", "absent") for _, _, reason in want.bad):
        with pytest.raises((InputError, MemoryAbsent)):
            extents(fmt, ram, root)
        return
    runs, _ = extents(fmt, ram, root)
    assert rows_of(runs) == reference.extents(want)
    everything = leaves(fmt, ram, root)
    start = data.draw(st.sampled_from([0, *everything.iova.tolist(), *everything.last.tolist()]))
    last = data.draw(st.integers(start, ALL))
    some = leaves(fmt, ram, root, start, last)
    inside = (everything.last >= np.uint64(start)) & (everything.iova <= np.uint64(last))
    assert some.iova.tolist() == everything.iova[inside].tolist()
    verdict = verify(fmt, ram, root, runs, dead_leaves=False)
    assert verdict.equal == (want.bad == []), verdict.mismatches
    for _, iova, _, _ in want.leaves[:6]:
        for probe in (iova, iova + (1 << want.lg2[iova]) - 1):
            step = walk(fmt, ram, root, probe)
            assert (None if step.pa is None else (step.pa, step.prot)) == reference.walk(
                fmt, ram, root, probe
            )


@settings(max_examples=120)
@given(seed=st.integers(0, 2**32), data=st.data())
def test_random_bytes_never_crash_or_hang(seed, data):
    fmt = data.draw(st.sampled_from(FORMATS))
    unit = max(fmt.bytes_of(n) for n in range(len(fmt.levels)))
    unit = min(max(unit, 4096), 65536)
    keep = np.uint64(data.draw(st.sampled_from([ALL, 0xFFF, PAGES * unit - 1, PAGES * unit + 4095 - 0x80])))
    ram = Ram.of(max(PAGES * unit, fmt.root_bytes))
    noise = np.random.default_rng(seed).integers(0, 2**64, len(ram.words), np.uint64) & keep
    sparse = data.draw(st.booleans())
    if sparse:
        noise[np.random.default_rng(seed).random(len(noise)) < 0.97] = 0
    ram.words[:] = noise if fmt.byte_order == "<" else noise.byteswap()
    for job in (extents, leaves, table_pages):
        with contextlib.suppress(InputError, MemoryAbsent):
            job(fmt, ram, 0)
    with contextlib.suppress(InputError):
        assert verify(fmt, ram, 0, Extents.empty(), limit=3).total >= 0
    for iova in (0, 0x1000, ALL):
        with contextlib.suppress(MemoryAbsent):
            walk(fmt, ram, 0, extend(fmt, iova & (1 << fmt.input_lg2) - 1))
