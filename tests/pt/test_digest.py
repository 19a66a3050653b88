# SPDX-License-Identifier: Apache-2.0
"""The digest: by its definition, in every cut, and different for every difference."""

import hashlib
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from table_support import SHOWN

from iokeep.errors import InputError
from iokeep.pt import digest as digest_module
from iokeep.pt import leaves as leaves_module
from iokeep.pt import runs as runs_module
from iokeep.pt import table_digest
from iokeep.pt.diff import normalised
from iokeep.pt.digest import Digest, digest_extents
from iokeep.pt.extents import Extents
from iokeep.pt.leaves import extents
from iokeep.pt.table_digest import digest
from iokeep.pt.walk import walk

M64 = 2**64 - 1


def mix(z):
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M64
    return z ^ (z >> 31)


def by_definition(pages, key):
    """The docstring of iokeep.pt.digest, page by page in Python integers. pages: {iova: (pa, prot)}."""
    person = b"iokeep-digest-v1"
    raw = hashlib.shake_256(person + key).digest(8 * 2050)
    words = [int.from_bytes(raw[i : i + 8], "little") for i in range(0, len(raw), 8)]
    s, t = words[2048:]
    words = [word | 1 for word in words[:2048]]
    k, k1, m, m1 = words[:512], words[512:1024], words[1024:1536], words[1536:]
    big_x = big_y = 0
    for iova, (pa, prot) in pages.items():
        n, i, j, g = pa >> 12, (iova >> 12) & 511, (iova >> 21) & 511, iova >> 30
        big_x += (mix(g ^ s) | 1) * k1[j] * k[i] * (4 * n + prot)
        big_y += (mix(g ^ t) | 1) * m1[j] * m[i] * (4 * ((n % 2**20) * 2**20 + n // 2**20) + prot)
    data = b"".join((n & M64).to_bytes(8, "little") for n in (big_x, big_y, len(pages)))
    return hashlib.blake2b(data, key=key, person=person, digest_size=32).digest()


@st.composite
def runs(draw):
    rows, page = [], draw(st.integers(0, 2**36)) & ~0x3FF
    for _ in range(draw(st.integers(0, 8))):
        count = draw(st.sampled_from([1, 2, 511, 512, 513, 1500]))
        # frames around 2**20, where the folded word wraps
        frame = draw(st.sampled_from([0, 2**20 - 700, 2**39, 2**21 - 1])) + draw(st.integers(0, 600))
        rows.append((page << 12, ((page + count) << 12) - 1, frame << 12, draw(st.integers(1, 3))))
        page += count + draw(st.sampled_from([0, 0, 1, 512]))
    return Extents.of(rows)


@settings(max_examples=60)
@given(want=runs(), key=st.binary(min_size=16, max_size=16))
def test_definition(page_dict, want, key):
    pages = page_dict(want)
    said = by_definition(pages, key)
    cut = Extents.of([(i, i + 0xFFF, p, q) for i, (p, q) in pages.items()])
    for some in (want, cut, cut.canonical()):
        assert digest_extents(some, key, compiled=False) == digest_extents(some, key, compiled=True) == said


@settings(max_examples=60)
@given(
    rows=st.lists(
        st.tuples(st.integers(1, 2**20), st.integers(1, 2**20), st.integers(0, 2**40), st.integers(1, 3)),
        min_size=1,
        max_size=9,
    ),
    first=st.integers(0, 2**50),
)
def test_compiled_sums_of_large_extents(rows, first):
    """Across blocks of 1 GiB and folds of 4 GiB of frames."""
    out = []
    for gap, count, frame, prot in rows:
        first += gap
        out.append((first << 12, ((first + count) << 12) - 1, frame << 12, prot))
        first += count
    key, want = b"large-extents-ok", Extents.of(out)
    assert digest_extents(want, key, compiled=True) == digest_extents(want, key, compiled=False)


def test_definition_in_small_batches(page_dict, monkeypatch):
    monkeypatch.setattr(digest_module, "_BATCH", 3)
    rows = [(n << 12, (n << 12) + 0xFFF, (n * 7) << 12, 3) for n in range(0, 2000, 3)]
    want = Extents.of([*rows, (1 << 30, (1 << 30) + (40 << 20) - 1, 2**32 - 2**20, 1)])
    assert digest_extents(want, bytes(16), compiled=False) == by_definition(page_dict(want), bytes(16))


def test_the_same_in_every_cut_into_leaves(new_table, fmt):
    want = Extents.of(
        [(0, (1 << 23) - 1, 1 << 23, 3), (1 << 30, (1 << 31) - 1, 1 << 31, 1)][: 3 - (12 in fmt.leaf_lg2s)]
    )
    if fmt.leaf_lg2s == (12,):
        want = Extents.of([(0, (1 << 23) - 1, 1 << 23, 3)])
    key = b"k" * 16
    values = set()
    for lg2 in fmt.leaf_lg2s:
        built = new_table(fmt, size=8 << 20, seed=lg2)
        built.table.map(want, max_lg2=lg2)
        values.add(digest(*built.args, key))
    assert values == {digest_extents(want, key)}


def test_every_translated_bit_of_one_page_changes_it(new_table, fmt):
    built = new_table(fmt)
    rows = [(n << 12, (n << 12) + 0xFFF, (n * 5 + 1) << 12, 3) for n in range(700)]
    built.table.map(Extents.of(rows))
    key = b"0123456789abcdef"
    before = digest(*built.args, key)
    spec = fmt.levels[0]
    at = walk(*built.args, 5 << 12).steps[-1][1]
    item = built.ram.load64(at)
    for bit in range(64):
        built.ram.store64(at, item ^ 1 << bit)
        translated = (spec.leaf_pa_mask | spec.r_mask | spec.w_mask | spec.leaf_reserved) >> bit & 1
        assert (digest(*built.args, key) != before) == bool(translated)
    built.ram.store64(at, item)
    assert digest(*built.args, key) == before
    assert digest(*built.args, b"0123456789abcdeg") != before


def test_swapped_pages_and_shifted_ranges_change_it():
    a = [(0, 0xFFF, 0x1000, 3), (0x1000, 0x1FFF, 0x2000, 3), (1 << 21, (1 << 21) + 0xFFF, 0x5000, 3)]
    swapped = [(0, 0xFFF, 0x2000, 3), (0x1000, 0x1FFF, 0x1000, 3), a[2]]
    across = [(0, 0xFFF, 0x5000, 3), a[1], (1 << 21, (1 << 21) + 0xFFF, 0x1000, 3)]
    moved = [(i + (1 << 21), z + (1 << 21), p, q) for i, z, p, q in a]
    values = {digest_extents(Extents.of(rows), bytes(16)) for rows in (a, swapped, across, moved, a[:2], [])}
    assert len(values) == 6


@settings(max_examples=40)
@given(want=runs(), data=st.data())
def test_a_map_adds_and_an_unmap_takes_away(page_dict, want, data):
    key = b"incremental-key!"
    pages = page_dict(want)
    whole = digest_extents(want, key)
    gone = {i for i in pages if data.draw(st.booleans())} if len(pages) < 40 else set(list(pages)[3:999:7])
    some = Extents.of([(i, i + 0xFFF, *pages[i]) for i in sorted(gone)])
    rest = {i: page for i, page in pages.items() if i not in gone}
    follow = Digest(key)
    follow.add(want)
    follow.remove(some.canonical())
    assert follow.digest() == by_definition(rest, key)
    again = Digest(key, follow.sums)
    again.add(some)
    assert again.digest() == whole
    again.remove(want)
    assert again.sums == (0, 0, 0)


@settings(max_examples=30)
@given(which=st.integers(0, 9), seed=st.integers(0, 10**6), damage=st.integers(0, 3), data=st.data())
def test_compiled_equals_numpy_equals_extents(new_table, which, seed, damage, data):
    fmt = SHOWN[which % len(SHOWN)]
    rng = np.random.default_rng(seed)
    shift, items = fmt.levels[0].shift, fmt.levels[0].items
    rows = []
    for table in range(4):
        kind = rng.integers(5)
        prots = np.full(items, rng.integers(1, 4)) if kind < 3 else rng.integers(1, 4, items)
        slots = np.arange(items) if kind != 1 else np.flatnonzero(rng.integers(0, 2, items))
        frames = rng.permutation(items) if kind else np.arange(items)
        for slot in slots[: None if kind < 4 else 7].tolist():
            iova = (table * items + slot) << shift
            pa = int((1 << 20) - 300 + table * 2 * items + frames[slot]) << shift
            rows.append((iova, iova + (1 << shift) - 1, pa & fmt.levels[0].leaf_pa(M64), int(prots[slot])))
    want = Extents.of(rows)
    built = new_table(fmt, size=1 << 20, seed=seed & 1 or None)
    built.table.map(want, max_lg2=shift if seed & 2 else None)
    for _ in range(damage):
        at = walk(*built.args, rows[int(rng.integers(len(rows)))][0]).steps[-1][1]
        built.ram.store64(at, built.ram.load64(at) ^ 1 << int(rng.integers(64)))
    key = bytes(range(16))
    with mock.patch.object(runs_module, "readable", return_value=False):
        said = digest_extents(extents(*built.args)[0], key)
    with (
        mock.patch.object(leaves_module, "PLAIN_TABLES", 1),
        mock.patch.object(table_digest, "PLAIN_TABLES", 1),
        mock.patch.object(runs_module, "likely", return_value=bool(seed & 4)),
    ):
        assert digest(*built.args, key, compiled=False) == said
        assert digest(*built.args, key, compiled=True, threads=2) == said
    if not damage:
        assert said == digest_extents(normalised(want, fmt.write_only), key)


def test_the_expectation_of_a_tebibyte_is_o_of_areas(monkeypatch):
    """1 TiB in one area takes as many pieces as it has blocks of 1 GiB, whatever the pages."""
    seen = []
    inner = Digest._pieces
    monkeypatch.setattr(Digest, "_pieces", lambda self, *a: (seen.append(len(a[0])), inner(self, *a)))
    digest_extents(Extents.of([(1 << 40, (1 << 41) - 1, 1 << 42, 3)]), bytes(16), compiled=False)
    assert sum(seen) == 1024


@pytest.mark.parametrize("compiled", [False, True])
def test_bad_input(compiled):
    with pytest.raises(ValueError, match="16 bytes"):
        Digest(b"short")
    with pytest.raises(ValueError, match="4096"):
        digest_extents(Extents.of([(0, 0xFFE, 0, 3)]), bytes(16), compiled=compiled)
    with pytest.raises(ValueError, match="permission"):
        digest_extents(Extents.of([(0, 0xFFF, 0, 0)]), bytes(16), compiled=compiled)
    with pytest.raises(InputError, match="TiB"):
        digest_extents(Extents.of([(0, 2**63 - 1, 0, 3)]), bytes(16), compiled=compiled)
    half = [(n << 61, (n << 61) + (10 << 50) - 1, 0, 3) for n in range(2)]
    with pytest.raises(InputError, match="TiB"):
        digest_extents(Extents.of(half), bytes(16), compiled=compiled)
    assert digest_extents(Extents.empty(), bytes(16)) == by_definition({}, bytes(16))


def test_vectors():
    """Fixed values: a digest that an older version sealed must still be understood."""
    want = Extents.of([(0, 0x3FFFFF, 0x40000000, 3), (1 << 40, (1 << 40) + 0xFFF, 0xFFFFF000, 1)])
    assert digest_extents(want, bytes(range(16))).hex() == VECTOR
    assert np.frombuffer(bytes.fromhex(VECTOR), np.uint8).size == digest_module.DIGEST_BYTES


VECTOR = "63e6032fe5a9ca4d79ff1403c776e803987581e001595a6158a214a784eac021"
