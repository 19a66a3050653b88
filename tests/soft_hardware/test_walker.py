# SPDX-License-Identifier: Apache-2.0
"""The compiled walker against iokeep.pt.walk: every format of 64-bit little-endian items, every rule."""

import lzma
import mmap
import os
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iokeep.errors import MemoryAbsent
from iokeep.mem.capture import Capture
from iokeep.mem.ram import Ram
from iokeep.pt.extents import Extents
from iokeep.pt.formats.base import LevelSpec
from iokeep.pt.registry import open_format
from iokeep.pt.tables import table_pages
from iokeep.pt.walk import walk
from iokeep.soft.hardware import engine
from iokeep.soft.hardware.unit import W_ACCESS, W_DENIED, W_NOT_PRESENT, W_RESERVED, W_WIDTH

DATA = Path(__file__).parents[1] / "data"
ALL = 2**64 - 1
CONFIGS = [
    *(("vtdss", {"levels": n}) for n in (3, 4, 5)),
    ("vtdss", {"levels": 4, "output_bits": 46, "max_leaf_lg2": 21, "snoop": 1}),
    *(("x86_64", {"levels": n}) for n in (4, 5)),
    ("x86_64", {"levels": 4, "sign_extend": 0}),
    ("x86_64", {"levels": 4, "output_bits": 39, "max_leaf_lg2": 12}),
    *(("amdv1", {"levels": n}) for n in range(1, 7)),
    ("amdv1", {"levels": 4, "output_bits": 48, "force_coherence": 0}),
    ("amdv1", {"levels": 5, "c_bit": 47}),
    *(("riscv64", {"levels": n, "stage": stage}) for n in (3, 4, 5) for stage in (1, 2)),
    ("riscv64", {"levels": 3, "svnapot": 0, "svpbmt": 0, "hardware_ad": 0, "output_bits": 44}),
    ("riscv64", {"levels": 4, "hardware_ad": 1}),
    ("arm_lpae_s1", {"quirks": "0x80"}),
    ("arm_lpae_s2", {"granule": 4096, "input_bits": 40, "output_bits": 40, "hw_dirty": 1}),
    ("arm_lpae_s1", {"granule": 4096, "input_bits": 39, "output_bits": 40, "ttbr": 1}),
    ("arm_lpae_s1", {"granule": 4096, "input_bits": 48, "output_bits": 48}),
    ("arm_lpae_s1", {"granule": 16384, "input_bits": 48, "output_bits": 48}),
    ("arm_lpae_s1", {"granule": 65536, "input_bits": 52, "output_bits": 52}),
    ("arm_lpae_s1", {"granule": 4096, "input_bits": 52, "output_bits": 52}),
    ("arm_lpae_s2", {"granule": 4096, "input_bits": 40, "output_bits": 40}),
    ("arm_lpae_s2", {"granule": 4096, "input_bits": 44, "output_bits": 44}),
    ("arm_lpae_s2", {"granule": 16384, "input_bits": 40, "output_bits": 40}),
    ("arm_lpae_s2", {"granule": 65536, "input_bits": 44, "output_bits": 44}),
    ("arm_mali_lpae", {}),
]
FORMATS = [open_format(*config) for config in CONFIGS]
RAM = 4 << 20


def format_id(fmt):
    return "-".join([fmt.name, *(str(v) for v in fmt.config.values())])


every = pytest.mark.parametrize("fmt", FORMATS, ids=format_id)


def compiled(words, walker, iova, need, prot=3):
    got = engine.walk(words, walker, np.uint64(prot), np.uint64(iova), np.uint64(need))
    return tuple(int(word) for word in got)


def expected(fmt, mem, root, iova, need, prot=3):
    """(outcome, pa, lg2, rights) as pt.walk has it; None: not compared."""
    try:
        got = walk(fmt, mem, root, iova)
    except MemoryAbsent:
        return W_ACCESS, 0, 0, 0
    rights = got.prot & prot
    if got.pa is not None and rights & need == need:
        return 0, got.pa, got.leaf_lg2, rights
    if got.pa is not None or "permission" in got.why:
        return W_DENIED, 0, got.leaf_lg2, rights
    outcome = next(
        o
        for text, o in (
            ("beyond", W_WIDTH),
            ("not present", W_NOT_PRESENT),
            ("leads to", W_NOT_PRESENT),
            ("reserved", W_RESERVED),
        )
        if text in got.why
    )
    return outcome, 0, 0, 0


def one_item(draw, fmt, level):
    """An item of a level: any word, or one as a kernel writes it, perhaps with some bits turned."""
    spec, kind = fmt.levels[level], draw(st.sampled_from("wtttlllc"))
    if kind == "w":
        return draw(st.integers(0, ALL))
    pa = draw(st.integers(0, RAM // 65536 + 1)) << 16
    if kind == "t" and spec.table:
        item = int(fmt.table_items(level, np.array([pa], np.uint64))[0])
        if spec.next_levels and draw(st.booleans()):
            mask, value, _ = draw(st.sampled_from(spec.next_levels))
            item = item & ~mask | value
    elif spec.leaf:
        run = draw(st.sampled_from([None, *spec.contig])) if kind == "c" else None
        prot = np.array([draw(st.integers(1, 3))], np.uint8)
        large = pa >> 16 << (spec.shift + (run.lg2 if run else 0))
        where = np.array([large & spec.leaf_pa(ALL)], np.uint64)
        item = int(fmt.leaf_items(level, where, prot, run)[0])
    else:
        item = 0
    item ^= spec.invert
    for bit in draw(st.lists(st.integers(0, 63), max_size=2)) if draw(st.booleans()) else ():
        item ^= 1 << bit
    return item


def iovas(fmt):
    """IOVAs inside, at and beyond the ends of what the format translates."""
    first = fmt.iova_base & ALL
    inside = st.integers(0, (1 << fmt.input_lg2) - 1).map(
        lambda raw: int(fmt.extend(np.array([raw], np.uint64))[0])
    )
    top = (1 << fmt.input_lg2) - 1
    low = st.integers(0, 1 << 24).map(lambda raw: first | raw)
    edge = st.sampled_from(
        [0, top >> 1, (top >> 1) + 1, top, (top + 1) & ALL, ALL, (ALL << 40) & ALL, 1 << 63]
    )
    return st.one_of(inside, inside, low, edge)


def place(draw, fmt, ram, root, iova):
    """Items where a walk of ``iova`` looks for them, as far as they lead."""
    table, level = root, fmt.top_level
    while True:
        spec = fmt.levels[level]
        at = table + ((iova >> spec.shift) & (spec.items - 1)) * 8
        if at + 8 > ram.size:
            return
        item = one_item(draw, fmt, level)
        ram.store64(at, item ^ spec.invert)
        if not spec.is_present(item) or spec.is_leaf(item) or spec.bad_table(item) is not None:
            return
        table, level = spec.table_pa(item), spec.next_level(item, level)


@every
@settings(max_examples=80)
@given(data=st.data())
def test_walk_equals_pt_walk(fmt, data):
    ram = Ram.of(RAM)
    root = max(0x10000, fmt.root_bytes)
    iova = data.draw(iovas(fmt))
    if fmt.covers(iova):
        place(data.draw, fmt, ram, root, iova)
    walker = engine.walker((fmt, root))
    prot = data.draw(st.sampled_from([3, 3, 3, 1, 2, 0]))
    for need in (1, 2):
        for at in (iova, iova ^ 0xFFF, (iova + 4096) & ALL, iova ^ 1 << 21, iova ^ 1 << 40, iova ^ 1 << 63):
            want = expected(fmt, ram, root, at, need, prot)
            assert compiled(ram.words, walker, at, need, prot) == want, hex(at)


@settings(max_examples=60)
@given(data=st.data())
def test_two_tables(data):
    """TTB0 and TTB1: the IOVA says which; between them is nothing."""
    config = {"granule": 4096, "input_bits": 39, "output_bits": 40}
    low = open_format("arm_lpae_s1", config)
    high = open_format(
        "arm_lpae_s1", {**config, "granule": data.draw(st.sampled_from([4096, 16384])), "ttbr": 1}
    )
    ram = Ram.of(RAM)
    walker = engine.walker((low, 0x10000), (high, 0x20000))
    for fmt, root in ((low, 0x10000), (high, 0x20000)):
        iova = data.draw(iovas(fmt))
        if fmt.covers(iova):
            place(data.draw, fmt, ram, root, iova)
        other = high if fmt is low else low
        for at in (iova, iova ^ 0x1000, iova ^ 1 << 45):
            want = (W_WIDTH, 0, 0, 0)
            for one, pa in ((low, 0x10000), (high, 0x20000)):
                if one.covers(at):
                    want = expected(one, ram, pa, at, 1)
            assert compiled(ram.words, walker, at, 1) == want
        assert not any(fmt.covers(x) and other.covers(x) for x in (iova, 0, ALL))


#: what of a level a walk goes by; and what is for building, comparing and printing
WALKED = [
    "shift",
    "index_bits",
    "leaf",
    "table",
    "valid_mask",
    "leaf_mask",
    "leaf_value",
    "table_pa_mask",
    "leaf_pa_mask",
    "r_mask",
    "r_value",
    "w_mask",
    "w_value",
    "tr_mask",
    "tr_value",
    "tw_mask",
    "tw_value",
    "leaf_reserved",
    "table_reserved",
    "valid_values",
    "leaf_values",
    "leaf_bad",
    "table_bad",
    "pa_shift",
    "pa_pieces",
    "next_levels",
    "contig",
    "contig_select",
    "w_values",
    "invert",
]
NOT_WALKED = [
    "leaf_ignored",
    "table_ignored",
    "leaf_base",
    "table_base",
    "prot_bits",
    "leaf_attrs",
    "leaf_attrs_value",
    "table_attrs",
    "table_attrs_value",
    "occupied_mask",
    "build_lg2s",
    "memory",
    "named",
    "table_named",
    "keep_bit",
]


def test_the_walker_knows_all_that_a_format_can_say():
    """A new field of LevelSpec has to be thought about here, and in engine.walker()."""
    assert {f.name for f in fields(LevelSpec)} == {*WALKED, *NOT_WALKED}


def test_what_is_no_such_format():
    with pytest.raises(ValueError, match="64-bit"):
        engine.walker((open_format("s390_zpci", {"levels": 3}), 0x1000))
    with pytest.raises(ValueError, match="64-bit"):
        engine.walker((open_format("arm_v7s", {}), 0x4000))


def _captures():
    paths = {p.name: p for place in ("captures", "captures-xz") for p in sorted((DATA / place).iterdir())}
    return {n: p for n, p in paths.items() if p.is_dir() and not n.startswith("s390") and "v7s" not in n}


@pytest.mark.parametrize("path", _captures().values(), ids=_captures().keys())
def test_walk_equals_pt_walk_in_captures(path, tmp_path):
    if (path / "truth.tsv.xz").is_file():
        path = Path(shutil.copytree(path, tmp_path / path.name))
        (path / "truth.tsv").write_bytes(lzma.decompress((path / "truth.tsv.xz").read_bytes()))
    capture = Capture.load(path)
    fmt, mem, root = open_format(capture.format, capture.config), capture.memory, capture.root_pa
    pages = {root: fmt.root_bytes}
    for pa in table_pages(fmt, mem, root).tolist():
        pages.setdefault(pa, fmt.table_bytes)
    sparse = os.memfd_create("capture")
    os.ftruncate(sparse, (max(pa + n for pa, n in pages.items()) + 0xFFFF) & ~0xFFFF)
    flat = mmap.mmap(sparse, 0)
    os.close(sparse)
    for pa, length in pages.items():
        flat[pa : pa + length] = mem.read(pa, length)
    words = np.frombuffer(flat, np.uint64)
    walker = engine.walker((fmt, root))
    truth = Extents(*capture.truth())
    rng = np.random.default_rng(1)
    picks = rng.permutation(len(truth))[:150]
    ends = [0, (1 << fmt.input_lg2) - 1, ALL, fmt.iova_base, 1 << 63]
    for k in picks.tolist():
        iova, last = int(truth.iova[k]), int(truth.last[k])
        ends += [iova, (iova - 1) & ALL, last, (last + 1) & ALL, iova + int(rng.integers(0, last - iova + 1))]
    hits = 0
    for iova in ends:
        for need in (1, 2):
            want = expected(fmt, mem, root, iova, need)
            assert compiled(words, walker, iova, need) == want, hex(iova)
            hits += not want[0]
    assert hits >= 2 * len(picks)
