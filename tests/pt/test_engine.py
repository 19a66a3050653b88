# SPDX-License-Identifier: Apache-2.0
"""The engine against the obvious implementation, on tables that nobody sane wrote."""

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from table_support import rows_of

from iokeep.errors import InputError, MemoryAbsent
from iokeep.mem.capture import PageMemory
from iokeep.mem.ram import Ram
from iokeep.pt import reference
from iokeep.pt.digest import digest_extents
from iokeep.pt.extents import Extents
from iokeep.pt.leaves import extents, leaf_items, leaves
from iokeep.pt.table_digest import digest
from iokeep.pt.tables import REASONS, TableMemory, descend, expand, table_pages
from iokeep.pt.verify import verify
from iokeep.pt.walk import walk

PAGES = 12


@st.composite
def wild_tables(draw, fmts):
    """A format and RAM of a few pages with a few items each: plausible ones, damaged ones, noise."""
    fmt = draw(st.sampled_from(fmts))
    ram = Ram.of(PAGES * 4096)
    slots = st.sampled_from([0, 1, 2, 255, 256, 510, 511])
    for page in range(1, PAGES):
        for _ in range(draw(st.integers(0, 5))):
            level = draw(st.integers(0, fmt.top_level))
            spec = fmt.levels[level]
            kind = draw(st.sampled_from(["table", "table", "leaf", "flip", "noise"]))
            if kind == "noise":
                item = draw(st.integers(0, 2**64 - 1))
            elif kind == "table" and spec.table:
                item = draw(st.integers(1, PAGES + 1)) << 12 | spec.table_base
            else:
                item = spec.leaf_base | spec.prot_bits[draw(st.integers(0, 3))]
                item |= (draw(st.integers(0, 2**40)) << 12) & spec.leaf_pa_mask
            if kind == "flip":
                item ^= 1 << draw(st.integers(0, 63))
            ram.store64(page * 4096 + draw(slots) * 8, item)
    return fmt, ram


def engine_tree(fmt, mem, root):
    """The engine's answer in the reference's form."""
    tm = TableMemory(fmt, mem)
    upper = descend(tm, root)
    parts, problems = [upper.leaves], [upper.problems]
    for items, bad in expand(tm, upper.base, upper.pa, upper.row, upper.prot):
        parts.append(items)
        problems.append(bad)
    found = sorted(
        (int(i), level, int(pa), prot)
        for p in parts
        for level, i, pa, prot in zip(
            p.level.tolist(), fmt.extend(p.iova).tolist(), p.pa.tolist(), p.prot.tolist(), strict=True
        )
    )
    bad = sorted(
        (a, z, REASONS[r])
        for p in problems
        for a, z, r in zip(
            fmt.extend(p.iova).tolist(), fmt.extend(p.last).tolist(), p.reason.tolist(), strict=True
        )
    )
    pages = {pa for p in upper.pages for pa in p.tolist()}
    return [(level, iova, pa, prot) for iova, level, pa, prot in found], bad, pages


@settings(max_examples=300)
@given(data=st.data())
def test_engine_equals_reference_on_wild_tables(formats, data):
    fmt, ram = data.draw(wild_tables(formats))
    want = reference.tree(fmt, ram, 4096)
    found, bad, pages = engine_tree(fmt, ram, 4096)
    assert found == sorted(want.leaves, key=lambda leaf: leaf[1])
    assert bad == want.bad
    assert pages == want.pages
    unreadable = any(reason in ("loop", "absent") for _, _, reason in want.bad)
    if unreadable:
        for job in (extents, leaves, table_pages):
            with pytest.raises((InputError, MemoryAbsent)):
                job(fmt, ram, 4096)
    else:
        runs, _ = extents(fmt, ram, 4096)
        assert rows_of(runs) == reference.extents(want)
        everything = leaves(fmt, ram, 4096)
        assert [(i, p) for _, i, p, _ in found] == list(
            zip(everything.iova.tolist(), everything.pa.tolist(), strict=True)
        )
        key = b"0123456789abcdef"
        assert digest(fmt, ram, 4096, key) == digest_extents(runs, key)
        # A part of the space gives the part of the leaves.
        start = data.draw(st.sampled_from([0, *everything.iova.tolist()]))
        last = data.draw(st.integers(start, 2**64 - 1))
        some = leaves(fmt, ram, 4096, start, last)
        inside = (everything.last >= np.uint64(start)) & (everything.iova <= np.uint64(last))
        assert some.iova.tolist() == everything.iova[inside].tolist()
    for _, iova, _, _ in want.leaves[:4]:
        for probe in (iova, iova + 0xFFF):
            try:
                expected = reference.walk(fmt, ram, 4096, probe)
            except MemoryAbsent:
                continue
            got = walk(fmt, ram, 4096, probe)
            assert (None if got.pa is None else (got.pa, got.prot)) == expected


@settings(max_examples=200)
@given(data=st.data())
def test_verify_equals_reference_on_wild_tables(formats, page_dict, data):
    fmt, ram = data.draw(wild_tables(formats))
    tree = reference.tree(fmt, ram, 4096)
    small = [leaf for leaf in tree.leaves if leaf[0] == 0]
    rows = []
    for _, iova, pa, prot in small:
        what = data.draw(st.sampled_from(["same", "same", "same", "pa", "prot", "drop"]))
        if what == "pa":
            pa ^= 0x1000
        if what == "prot":
            prot ^= 1
        if what != "drop" and prot:
            rows.append((iova, iova + 0xFFF, pa, prot))
    extra = data.draw(st.integers(0, 2**20)) << 12
    if all(extra != row[0] for row in rows):
        rows.append((extra, extra + 0xFFF, 0x5000, 3))
    want = Extents.of(rows)
    if any(level > 0 for level, _, _, _ in tree.leaves):
        return  # the reference goes page by page
    wrong, bad = reference.verify(fmt, ram, 4096, page_dict(want))
    for compiled in (False, True):
        verdict = verify(fmt, ram, 4096, want, limit=100000, compiled=compiled)
        assert verdict.equal == (not wrong and not bad)
        pages, opaque = {}, set()
        for m in verdict.mismatches:
            if m.reason in ("reserved", "loop", "absent"):
                opaque.add((m.iova, m.last, m.reason))
            elif m.reason != "attrs":
                for iova in range(m.iova, m.last, 4096):
                    pages[iova] = m.reason
        assert pages == wrong
        assert opaque == {b for b in bad if b[2] != "attrs"}
        attrs = {(a, z) for a, z, reason in bad if reason == "attrs"}
        for m in verdict.mismatches:
            if m.reason == "attrs":
                assert any(a <= m.iova and m.last <= z for a, z in attrs) or len(attrs) > 1
        assert not attrs or not verdict.equal
        assert verdict.total == len(verdict.mismatches)


@settings(max_examples=100)
@given(seed=st.integers(0, 2**32), data=st.data())
def test_random_bytes_never_crash_or_hang(formats, seed, data):
    fmt = data.draw(st.sampled_from(formats))
    keep = np.uint64(
        data.draw(st.sampled_from([2**64 - 1, 0xFFF, PAGES * 4096 - 1, PAGES * 4096 + 4095 - 0x80]))
    )
    ram = Ram.of(PAGES * 4096)
    ram.words[:] = np.random.default_rng(seed).integers(0, 2**64, len(ram.words), np.uint64) & keep
    for job in (extents, leaves, table_pages):
        with contextlib.suppress(InputError, MemoryAbsent):
            job(fmt, ram, 0)
    with contextlib.suppress(InputError):
        assert verify(fmt, ram, 0, Extents.empty(), limit=3).total >= 0


def _link(ram, fmt, level, page, slot, target):
    ram.store64(page * 4096 + slot * 8, target * 4096 | fmt.levels[level].table_base)


def test_a_table_that_is_its_own_ancestor(fmt):
    ram = Ram.of(64 << 10)
    _link(ram, fmt, fmt.top_level, 1, 3, 1)
    with pytest.raises(InputError, match="loop"):
        extents(fmt, ram, 4096)
    verdict = verify(fmt, ram, 4096, Extents.empty())
    assert [m.reason for m in verdict.mismatches] == ["loop"]
    assert verdict.mismatches[0].level == fmt.top_level
    assert verdict.mismatches[0].iova == 3 << fmt.levels[-1].shift


def test_a_shared_table_is_translated_twice(fmt):
    ram = Ram.of(64 << 10)
    chain = list(range(1, fmt.top_level + 2))
    for n, level in enumerate(range(fmt.top_level, 0, -1)):
        _link(ram, fmt, level, chain[n], 0, chain[n + 1])
    _link(ram, fmt, 1, chain[-2], 7, chain[-1])
    ram.store64(chain[-1] * 4096, 0x7000 | fmt.levels[0].leaf_base | fmt.levels[0].prot_bits[3])
    found = leaves(fmt, ram, 4096)
    assert found.iova.tolist() == [0, 7 << 21]
    assert found.pa.tolist() == [0x7000, 0x7000]
    assert len(table_pages(fmt, ram, 4096)) == len(chain)


def test_a_bomb_of_shared_tables_is_refused():
    """512 items of each table point to the same next table: 2**36 leaves in five pages."""
    from iokeep.pt.registry import open_format

    for name in ("vtdss", "x86_64"):
        fmt = open_format(name, {"levels": 5})
        ram = Ram.of(64 << 10)
        for n, level in enumerate(range(fmt.top_level, 0, -1)):
            for slot in range(512):
                _link(ram, fmt, level, n + 1, slot, n + 2)
        ram.words[5 * 512 : 6 * 512] = np.uint64(
            0x7000 | fmt.levels[0].leaf_base | fmt.levels[0].prot_bits[3]
        )
        for job in (extents, leaves, table_pages):
            with pytest.raises(InputError, match="shared"):
                job(fmt, ram, 4096)
        with pytest.raises(InputError, match="shared"):
            verify(fmt, ram, 4096, Extents.empty())
        # A walk, and a look at a part of the space, need no more than their path.
        assert walk(fmt, ram, 4096, 0x1000).pa == 0x7000
        assert len(leaves(fmt, ram, 4096, 0x200000, 0x3FFFFF)) == 512


def test_absent_memory_is_not_zero(fmt, new_table):
    built = new_table(fmt)
    built.table.map(Extents.of([(0x200000, 0x200FFF, 0x5000, 3), (1 << 30, (1 << 30) + 0xFFF, 0x6000, 3)]))
    pages = built.table.pages()
    data = built.ram.rows(4096).data
    lost = int(built.table._tm.rows.index(pages[-1:])[0]) * 4096
    kept = pages[pages != np.uint64(lost)]
    mem = PageMemory(kept, data[(kept >> np.uint64(12)).astype(np.int64)].copy())
    with pytest.raises(MemoryAbsent) as info:
        extents(fmt, mem, built.table.root_pa)
    assert info.value.pa == lost
    verdict = verify(fmt, mem, built.table.root_pa, extents(*built.args)[0])
    assert [m.reason for m in verdict.mismatches] == ["absent"]
    with pytest.raises(MemoryAbsent):
        verify(fmt, mem, 0x12345000, Extents.empty())
    with pytest.raises(InputError, match="multiple"):
        verify(fmt, mem, 0x12345, Extents.empty())


def test_a_range_needs_only_its_own_tables(fmt, new_table):
    built = new_table(fmt)
    built.table.map(Extents.of([(0x200000, 0x200FFF, 0x5000, 3), (1 << 30, (1 << 30) + 0xFFF, 0x6000, 3)]))
    far = leaf_items(TableMemory(fmt, built.ram), built.table.root_pa, 1 << 30, (1 << 30) + 0xFFF)[0]
    # Break the other sub-tree: what the range does not need is not read.
    at = next(at for _, at, _ in reversed(walk(*built.args, 0x200000).steps[:-1]))
    good = built.ram.load64(at)
    built.ram.store64(at, good | 0x0000_0077_0000_0000)
    assert (
        leaf_items(TableMemory(fmt, built.ram), built.table.root_pa, 1 << 30, (1 << 30) + 0xFFF)[0].pa
        == far.pa
    )
    with pytest.raises(MemoryAbsent):
        leaves(*built.args)


def test_iovas_beyond_the_input_bits_do_not_translate(fmt):
    ram = Ram.of(64 << 10)
    beyond = 1 << (fmt.input_lg2 if not fmt.sign_extend else fmt.input_lg2 - 1)
    assert walk(fmt, ram, 4096, beyond).pa is None
    assert "beyond" in walk(fmt, ram, 4096, beyond).why
    expected = Extents.of([(beyond, beyond + 0xFFF, 0x1000, 3)])
    verdict = verify(fmt, ram, 4096, expected)
    assert [(m.reason, m.iova) for m in verdict.mismatches] == [("missing", beyond)]
