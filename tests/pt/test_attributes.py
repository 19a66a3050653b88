# SPDX-License-Identifier: Apache-2.0
"""Memory attributes: every bit of one is found by diff and, where it is stated, by verify; no other is."""

import numpy as np
import pytest

from iokeep.errors import InputError
from iokeep.mem.capture import read_expected
from iokeep.pt.diff import diff
from iokeep.pt.extents import Extents
from iokeep.pt.formats.base import CACHE, MMIO, NOEXEC, PRIV
from iokeep.pt.registry import open_format
from iokeep.pt.traits import Attributes
from iokeep.pt.verify import verify
from iokeep.pt.walk import walk

CONFIGS = [
    ("vtdss", {"snoop": 1}),
    ("x86_64", {}),
    ("amdv1", {}),
    ("amdv1", {"c_bit": 47, "levels": 4}),
    ("riscv64", {}),
    ("riscv64", {"svpbmt": 0, "svnapot": 0, "stage": 2}),
    ("arm_lpae_s1", {}),
    ("arm_lpae_s1", {"granule": 65536, "output_bits": 52, "input_bits": 48}),
    ("arm_lpae_s1", {"granule": 16384, "input_bits": 47, "lpa2": 1, "output_bits": 52, "hw_access": 1}),
    ("arm_lpae_s2", {"input_bits": 40, "output_bits": 40}),
    ("arm_lpae_s2", {"fwb": 1}),
    ("arm_mali_lpae", {}),
    ("arm_v7s", {}),
    ("arm_v7s", {"quirks": 3}),
    ("s390_zpci", {}),
]


def config_id(config):
    return "-".join([config[0], *(f"{k}{v}" for k, v in config[1].items())])


@pytest.fixture(params=CONFIGS, ids=config_id)
def one(request):
    return open_format(*request.param)


def store(fmt, ram, at, item, level):
    raw = item ^ fmt.levels[level].invert
    ram.write(at, raw.to_bytes(fmt.item_bytes, "little" if fmt.byte_order == "<" else "big"))


def sizes(fmt):
    """One leaf size of each kind that fits: with or without contiguous entries, each level."""
    for level, spec in enumerate(fmt.levels):
        for lg2 in spec.lg2s:
            if lg2 <= min(fmt.input_lg2 - 1, 38):
                yield level, lg2


def test_every_bit_of_a_leaf_in_diff(one, new_table):
    """A flip is found unless the bit is ignored and no attribute; an attribute that may have any value is one
    of the reason attrs, with names."""
    for level, lg2 in list(sizes(one))[:6]:
        size = 1 << lg2
        truth = Extents.of([(one.iova_base + size, one.iova_base + 2 * size - 1, size, 3)])
        a, b = new_table(one), new_table(one)
        for built in (a, b):
            built.table.map(truth)
        assert diff(*a.args, *b.args).equal
        found_level, at, item = walk(*b.args, one.iova_base + size).steps[-1]
        assert found_level == level
        spec = one.levels[level]
        run = spec.contig_of(item)
        memory = spec.memory if run is None or run.memory is None else run.memory
        counts = sum(mask for _, mask in memory)
        ignored = spec.leaf_ignored & ~(0 if run is None else run.mask | (run.reserved or 0))
        for bit in range(8 * one.item_bytes):
            store(one, b.ram, at, item ^ 1 << bit, level)
            verdict = diff(*a.args, *b.args)
            matters = bool(counts >> bit & 1) or not ignored >> bit & 1
            assert verdict.equal == (not matters), (level, lg2, bit, verdict.mismatches)
            if counts & spec.leaf_ignored & ~spec.leaf_attrs & 1 << bit and run is None:
                (only,) = verdict.mismatches
                assert (only.reason, only.iova) == ("attrs", one.iova_base + size)
                assert only.expected_attrs != only.found_attrs
                assert verdict.differ == {"attrs": max(size >> 12, 1)}
                back = diff(*b.args, *a.args).mismatches
                assert [(m.reason, m.expected_attrs) for m in back] == [("attrs", only.found_attrs)]
        store(one, b.ram, at, item, level)
        assert diff(*a.args, *b.args).equal
        if run is None:
            continue
        second = int.from_bytes(
            b.ram.read(at + one.item_bytes, one.item_bytes), "little" if one.byte_order == "<" else "big"
        )
        for bit in range(8 * one.item_bytes):
            if counts >> bit & 1:
                store(one, b.ram, at + one.item_bytes, second ^ 1 << bit, level)
                assert not diff(*a.args, *b.args).equal, (level, lg2, bit)


#: format, flags -> bits of a 4K or 64K page as Linux writes them (the citations are in the formats' files)
LINUX = [
    ("arm_lpae_s1", {}, CACHE, 1 << 2 | 1 << 6),
    ("arm_lpae_s1", {}, 0, 1 << 6),
    ("arm_lpae_s1", {}, MMIO, 2 << 2 | 1 << 6),
    ("arm_lpae_s1", {}, CACHE | MMIO, 2 << 2 | 1 << 6),
    ("arm_lpae_s1", {}, CACHE | NOEXEC, 1 << 2 | 3 << 53 | 1 << 6),
    ("arm_lpae_s1", {}, CACHE | PRIV, 1 << 2),
    ("arm_lpae_s2", {}, CACHE, 0xF << 2),
    ("arm_lpae_s2", {}, 0, 5 << 2),
    ("arm_lpae_s2", {}, MMIO | NOEXEC, 1 << 2 | 3 << 53),
    ("arm_lpae_s2", {"fwb": 1}, CACHE, 6 << 2),
    ("arm_lpae_s2", {"fwb": 1}, MMIO, 1 << 2),
    ("arm_mali_lpae", {}, CACHE, 1 << 2),
    ("arm_v7s", {}, CACHE, 3 << 2 | 1 << 6 | 1 << 5),
    ("arm_v7s", {}, PRIV, 1 << 6),
    ("riscv64", {}, CACHE, 1 << 3),
    ("riscv64", {}, CACHE | NOEXEC, 0),
    ("riscv64", {}, 0, 1 << 3 | 1 << 61),
    ("riscv64", {}, MMIO, 1 << 3 | 2 << 61),
]


@pytest.mark.parametrize(("name", "config", "flags", "bits"), LINUX)
def test_flags_as_linux_writes_them(name, config, flags, bits, new_table):
    fmt = open_format(name, config)
    built = new_table(fmt)
    page = 1 << fmt.levels[0].shift
    rows = [(page, 2 * page - 1, page, 3)]
    built.table.map(Extents.of(rows))
    level, at, item = walk(*built.args, page).steps[-1]
    decided = 0
    for _, field, _ in fmt.terms:
        decided |= dict(fmt.levels[level].memory)[field]
    store(fmt, built.ram, at, item & ~decided | bits, level)

    def verdict(stated):
        areas = Extents.of(rows)
        attrs = np.array([stated], np.uint8)
        return verify(*built.args, Extents(areas.iova, areas.last, areas.pa, areas.prot, attrs))

    said = sum({flag for flag, _, _ in fmt.terms})
    for stated in range(0, 64, 4):
        same = (stated ^ flags) & said
        if stated & MMIO & said and flags & MMIO:
            same &= ~CACHE
        if (flags | stated) & said & MMIO and same == CACHE:
            continue  # CACHE beside MMIO is not written
        found = verdict(stated)
        assert found.equal == (not same), (stated, flags, found.mismatches)
        if same:
            (only,) = found.mismatches
            assert only.reason == "attrs"
            assert f"expected {only.expected_attrs}, found {only.found_attrs}" in only.text
            assert found.pages == 0
        assert set(found.attrs_compared) | set(found.attrs_not_compared) == {
            "cache",
            "noexec",
            "mmio",
            "priv",
        }
    assert verify(*built.args, Extents.of(rows)).attrs_compared is None


def test_runs_of_attributes_are_one_mismatch_each(new_table):
    fmt = open_format("arm_lpae_s2", {"input_bits": 40, "output_bits": 40})
    a, b = new_table(fmt), new_table(fmt)
    rows = [(n << 12, (n << 12) + 0xFFF, (7 * n % 64 + 1) << 12, 3) for n in range(2048)]
    for built in (a, b):
        built.table.map(Extents.of(rows))
    for n in [*range(16, 600), 1000, 1001]:
        level, at, item = walk(*b.args, n << 12).steps[-1]
        store(fmt, b.ram, at, item & ~(0xF << 2) | 5 << 2, level)
    for compiled in (False, True):
        attributes = diff(*a.args, *b.args)
        assert [(m.iova >> 12, m.last >> 12, m.reason) for m in attributes.mismatches] == [
            (16, 599, "attrs"), (1000, 1001, "attrs"),
        ]  # fmt: skip
        assert attributes.differ == {"attrs": 586}
        assert attributes.pages == 2048 - 586
        areas = Extents.of(rows)
        attrs = np.full(2048, CACHE, np.uint8)
        stated = Extents(areas.iova, areas.last, areas.pa, areas.prot, attrs)
        verdict = verify(*b.args, stated, compiled=compiled)
        assert (verdict.total, verdict.pages) == (2, 2048 - 586)
        assert verify(*a.args, stated, compiled=compiled).equal
        attrs[[*range(16, 600), 1000, 1001]] = 0
        assert verify(*b.args, stated, compiled=compiled).equal
    text = attributes.mismatches[0]
    assert text.expected_attrs.startswith("cache,memattr=0xf")
    assert text.found_attrs.startswith("memattr=0x5")


def test_across_formats_what_both_can_say(new_table):
    s1, s2 = open_format("arm_lpae_s1", {}), open_format("arm_lpae_s2", {})
    truth = Extents.of([(0, 0x3FFFFF, 1 << 30, 3)])
    a, b = new_table(s1), new_table(s2)
    a.table.map(truth)
    b.table.map(truth)
    verdict = diff(*a.args, *b.args)
    assert verdict.equal
    assert verdict.attrs_compared == ("cache", "noexec", "mmio")
    assert {"priv", "ng", "sh", "ns", "fnxs"} <= set(verdict.attrs_not_compared)
    level, at, item = walk(*b.args, 0).steps[-1]
    store(s2, b.ram, at, item | 3 << 53, level)
    (only,) = diff(*a.args, *b.args).mismatches
    assert (only.reason, only.expected_attrs, only.found_attrs) == ("attrs", "cache", "cache,noexec")
    vtd = new_table(open_format("vtdss", {}))
    vtd.table.map(truth)
    verdict = diff(*vtd.args, *b.args)
    assert verdict.equal
    assert verdict.attrs_compared == ()
    assert {"snp", "emt", "memattr", "xn"} <= set(verdict.attrs_not_compared)


def test_one_format_in_two_configurations(new_table):
    """Both are as their configuration wants them; together they differ."""
    truth = Extents.of([(0, 0xFFF, 0x1000, 3)])
    plain, snooped = (new_table(open_format("vtdss", {"snoop": n})) for n in (0, 1))
    for built in (plain, snooped):
        built.table.map(truth)
        assert verify(*built.args, truth).equal
    (only,) = diff(*plain.args, *snooped.args).mismatches
    assert (only.reason, only.expected_attrs, only.found_attrs) == ("attrs", "-", "snp")


def test_how_a_mapping_is_cut_is_no_attribute(new_table):
    for name in ("arm_v7s", "x86_64", "amdv1", "riscv64"):
        fmt = open_format(name, {})
        truth = Extents.of([(1 << 24, (2 << 24) - 1, 1 << 24, 3)])
        large, small = new_table(fmt), new_table(fmt)
        large.table.map(truth)
        small.table.map(truth, max_lg2=12)
        verdict = diff(*large.args, *small.args)
        assert verdict.equal
        assert verdict.layout_equal is False


def test_a_leaf_that_lets_nothing_pass_has_no_attributes(new_table):
    fmt = open_format("arm_lpae_s2", {})
    a, b = new_table(fmt), new_table(fmt)
    rows = Extents.of([(0, 0xFFF, 0x1000, 3), (0x1000, 0x1FFF, 0x9000, 3)])
    for built in (a, b):
        built.table.map(rows)
        level, at, item = walk(*built.args, 0x1000).steps[-1]
        store(fmt, built.ram, at, item & ~(3 << 6) ^ (4 if built is b else 0), level)
    assert diff(*a.args, *b.args).equal


def test_fields_do_not_overlap(one):
    attributes = Attributes(one)
    assert sum(width for _, width in attributes.places.values()) <= 64
    for spec in one.levels:
        for fields in (spec.memory, *(c.memory or () for c in spec.contig)):
            seen = 0
            for name, mask in fields:
                assert mask, name
                assert not seen & mask, name
                low = mask & -mask
                assert mask // low & (mask // low + 1) == 0, f"{name}: not neighbours"
                seen |= mask
        total = sum(mask for _, mask in spec.memory) if spec.leaf else spec.leaf_attrs
        assert total & ~(spec.leaf_attrs | spec.leaf_ignored) == 0
        assert spec.leaf_attrs & ~total & ~spec.keep_bit == 0, hex(spec.leaf_attrs & ~total)


def test_attrs_column(tmp_path):
    path = tmp_path / "expected.tsv"
    rows = [("0x1000", "-"), ("0x2000", "cache"), ("0x3000", "noexec,priv"), ("0x4000", "cache,mmio")]
    lines = "".join(f"{iova}\t{iova}\t0x1000\trw\t{attrs}\n" for iova, attrs in rows)
    path.write_text("iova\tpa\tlength\tprot\tattrs\n" + lines)
    (iova, last, _, prot), attrs, _ = read_expected(path)
    assert iova.tolist() == [0x1000, 0x2000, 0x3000, 0x4000]
    assert last.tolist() == [0x1FFF, 0x2FFF, 0x3FFF, 0x4FFF]
    assert prot.tolist() == [3] * 4
    assert attrs.tolist() == [0, CACHE, NOEXEC | PRIV, CACHE | MMIO]
    assert Extents(iova, last, iova, prot, attrs).canonical().iova.tolist() == iova.tolist()
    path.write_text("iova\tpa\tlength\tprot\tattrs\n")
    assert read_expected(path)[1].tolist() == []
    path.write_text("iova\tpa\tlength\tprot\n0x0\t0x0\t0x1000\trw\n")
    assert read_expected(path)[1] is None


@pytest.mark.parametrize("bad", ["", "cache,", "CACHE", "cache cache", "rw"])
def test_attrs_that_are_not_known(tmp_path, bad):
    path = tmp_path / "expected.tsv"
    path.write_text(
        f"iova\tpa\tlength\tprot\tattrs\n0x0\t0x0\t0x1000\trw\t-\n0x1000\t0x0\t0x1000\trw\t{bad}\n"
    )
    with pytest.raises(InputError, match="line 3"):
        read_expected(path)


def test_a_line_without_the_column(tmp_path):
    path = tmp_path / "expected.tsv"
    path.write_text("iova\tpa\tlength\tprot\tattrs\n0x0\t0x0\t0x1000\trw\n")
    with pytest.raises(InputError, match="line 2"):
        read_expected(path)
