# SPDX-License-Identifier: Apache-2.0
"""Whole Arm tables: the engine against plain words, roots of every shape, boundaries, captures of kernels."""

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from table_support import format_id, rows_of

from iokeep.errors import InputError, MemoryAbsent
from iokeep.mem.capture import Capture, PageMemory, tsv_lines
from iokeep.pt.digest import digest_extents
from iokeep.pt.extents import Extents
from iokeep.pt.formats.plain_arm import DECODERS
from iokeep.pt.leaves import extents, leaves
from iokeep.pt.registry import open_format
from iokeep.pt.table_digest import digest
from iokeep.pt.tables import REASONS, TableMemory, descend, expand, table_pages
from iokeep.pt.verify import verify
from iokeep.pt.walk import walk

CONFIGS = [
    ("arm_lpae_s1", {"granule": 4096, "input_bits": 48, "output_bits": 48}),
    ("arm_lpae_s1", {"granule": 4096, "input_bits": 39, "output_bits": 40, "ttbr": 1}),
    ("arm_lpae_s1", {"granule": 4096, "input_bits": 40, "output_bits": 44}),
    ("arm_lpae_s1", {"granule": 4096, "input_bits": 52, "output_bits": 52}),
    ("arm_lpae_s1", {"granule": 4096, "input_bits": 16, "output_bits": 32}),
    ("arm_lpae_s1", {"granule": 16384, "input_bits": 48, "output_bits": 48}),
    ("arm_lpae_s1", {"granule": 16384, "input_bits": 52, "output_bits": 52, "ttbr": 1}),
    ("arm_lpae_s1", {"granule": 65536, "input_bits": 48, "output_bits": 44}),
    ("arm_lpae_s1", {"granule": 65536, "input_bits": 52, "output_bits": 52}),
    ("arm_lpae_s2", {"granule": 4096, "input_bits": 40, "output_bits": 40}),
    ("arm_lpae_s2", {"granule": 4096, "input_bits": 42, "output_bits": 42}),
    ("arm_lpae_s2", {"granule": 4096, "input_bits": 44, "output_bits": 44}),
    ("arm_lpae_s2", {"granule": 4096, "input_bits": 34, "output_bits": 48, "start_level": 2}),
    ("arm_lpae_s2", {"granule": 16384, "input_bits": 40, "output_bits": 40}),
    ("arm_lpae_s2", {"granule": 16384, "input_bits": 48, "output_bits": 48}),
    ("arm_lpae_s2", {"granule": 65536, "input_bits": 44, "output_bits": 44}),
    ("arm_lpae_s2", {"granule": 65536, "input_bits": 46, "output_bits": 52, "start_level": 2}),
    ("arm_mali_lpae", {}),
    ("arm_mali_lpae", {"input_bits": 36}),
    ("arm_v7s", {}),
    ("arm_v7s", {"quirks": 2}),
]
ARMS = [open_format(*config) for config in CONFIGS]


@pytest.fixture(params=ARMS, ids=format_id, scope="module")
def arm(request):
    return request.param


@dataclass
class Sparse:
    """Tables written item by item in pages of 64 KiB anywhere in physical memory."""

    fmt: object
    root_pa: int
    next_pa: int
    pages: dict = field(default_factory=dict)

    @classmethod
    def empty(cls, fmt, fill=0):
        """The root lies at a multiple of its own size, in a page full of other bytes."""
        size = fmt.root_bytes
        root = 0x7001_0000 if size >= 0x10000 else 0x7000_0000 + 3 * size
        root &= -size
        out = cls(fmt, root, 0x8000_0000)
        for pa in range(root & -0x10000, root + size, 0x10000):
            out.pages[pa] = bytearray(b"\xc7" * 0x10000)
        out.write(root, bytes([fill]) * size)
        return out

    def write(self, pa, data):
        while data:
            page, offset = pa & -0x10000, pa & 0xFFFF
            n = min(len(data), 0x10000 - offset)
            self.pages.setdefault(page, bytearray(0x10000))[offset : offset + n] = data[:n]
            pa, data = pa + n, data[n:]

    def load(self, pa):
        page = self.pages[pa & -0x10000]
        offset = pa & 0xFFFF
        return int.from_bytes(page[offset : offset + self.fmt.item_bytes], "little")

    def store(self, pa, item):
        self.write(pa, item.to_bytes(self.fmt.item_bytes, "little"))

    def new_table(self, level, pa=None):
        size = self.fmt.bytes_of(level)
        if pa is None:
            pa = (self.next_pa + size - 1) & -size
            self.next_pa = pa + size
        self.write(pa, bytes(size))
        return pa

    def at(self, iova, level, tables=()):
        """Pa of the item of ``level`` for ``iova``; tables on the way are made, at ``tables`` first."""
        fmt, pa, stock = self.fmt, self.root_pa, list(tables)
        for n in range(fmt.top_level, level - 1, -1):
            spec = fmt.levels[n]
            at = pa + ((iova >> spec.shift) & (spec.items - 1)) * fmt.item_bytes
            if n == level:
                return at
            item = self.load(at)
            if not item:
                below = self.new_table(n - 1, stock.pop(0) if stock else None)
                item = int(fmt.table_items(n, np.array([below], np.uint64))[0])
                self.store(at, item)
            pa = DECODERS[fmt.name](item, n, fmt.config).pa
        raise AssertionError

    def put(self, iova, level, pa, prot, contig=None, tables=()):
        """A leaf; a contiguous entry whole."""
        spec, fmt = self.fmt.levels[level], self.fmt
        count = 1 << contig.lg2 if contig else 1
        for n in range(count):
            own = pa if contig is None or contig.replicated else pa + (n << spec.shift)
            item = int(
                fmt.leaf_items(level, np.array([own], np.uint64), np.array([prot], np.uint8), contig)[0]
            )
            self.store(self.at(iova + (n << spec.shift), level, tables), item)

    @property
    def memory(self):
        pas = sorted(self.pages)
        data = np.frombuffer(b"".join(bytes(self.pages[pa]) for pa in pas), np.uint8).reshape(len(pas), -1)
        return PageMemory(np.array(pas, np.uint64), data.copy())

    @property
    def args(self):
        return self.fmt, self.memory, self.root_pa


def base_of(fmt):
    """First IOVA of the table's space."""
    return (1 << 64) - (1 << fmt.input_lg2) if fmt.config.get("ttbr") else 0


def plain_tree(fmt, mem, root_pa):
    """Items one by one, in plain words: leaves (iova, size, pa, prot), bad (iova, last, reason), tables."""
    decode, found, bad, seen = DECODERS[fmt.name], [], [], {root_pa: fmt.top_level}
    visits = [(root_pa, base_of(fmt), 3)]
    for level in range(fmt.top_level, -1, -1):
        spec, below = fmt.levels[level], []
        size = 1 << spec.shift
        raw_size = spec.items * fmt.item_bytes
        for pa, base, granted in visits:
            items = np.frombuffer(mem.read(pa, raw_size), fmt.item_dtype)
            for index in np.flatnonzero(items).tolist():
                item = int(items[index])
                entry = decode(item, level, fmt.config)
                if entry is None:
                    continue
                iova = base + (index << spec.shift)
                if entry.reserved:
                    bad.append((iova, iova + size - 1, "reserved"))
                    continue
                if entry.attrs:
                    bad.append((iova, iova + size - 1, "attrs"))
                prot = granted & (int(entry.read) | int(entry.write) << 1)
                if entry.leaf:
                    own = entry.pa
                    if fmt.name == "arm_v7s":  # supersection, large page: 16 items, the rest from the IOVA
                        large = item >> 18 & 1 if level else item & 3 == 1
                        own |= (index & 15) << spec.shift if large else 0
                    found.append((iova, size, own, prot))
                elif seen.get(entry.pa, level - 1) != level - 1:
                    bad.append((iova, iova + size - 1, "loop"))
                else:
                    try:
                        mem.read(entry.pa, fmt.levels[level - 1].items * fmt.item_bytes)
                    except MemoryAbsent:
                        bad.append((iova, iova + size - 1, "absent"))
                        continue
                    seen[entry.pa] = level - 1
                    below.append((entry.pa, iova, prot))
        visits = below
    return sorted(found), sorted(bad), seen


def plain_extents(found):
    """Canonical rows (iova, last, pa, prot) of what passes anything."""
    out = []
    for iova, size, pa, prot in found:
        if not prot:
            continue
        if out and out[-1][1] + 1 == iova and out[-1][2] + iova - out[-1][0] == pa and out[-1][3] == prot:
            out[-1][1] = iova + size - 1
        else:
            out.append([iova, iova + size - 1, pa, prot])
    return [tuple(row) for row in out]


@st.composite
def wild(draw, fmts):
    """A table with plausible, damaged and random items."""
    fmt = draw(st.sampled_from(fmts))
    tree = Sparse.empty(fmt)
    space = 1 << fmt.input_lg2
    for _ in range(draw(st.integers(1, 8))):
        level = draw(st.sampled_from([n for n, s in enumerate(fmt.levels) if s.leaf]))
        spec = fmt.levels[level]
        contig = draw(st.sampled_from([None, *spec.contig]))
        unit = 1 << spec.shift + (contig.lg2 if contig else 0)
        near = draw(st.sampled_from([0, space - 1, space // 2]))
        iova = (near + draw(st.integers(-3, 3)) * unit) % space & -unit
        pa = draw(st.integers(0, 2**52)) & ((1 << fmt.config["output_bits"]) - 1) & -unit
        with contextlib.suppress(KeyError, AttributeError):  # the way there was damaged
            tree.put(iova, level, pa, draw(st.integers(1, 3)), contig)
            at = tree.at(iova, draw(st.integers(level, fmt.top_level)))
            kind = draw(st.sampled_from(["good", "good", "flip", "noise"]))
            if kind == "flip":
                tree.store(at, tree.load(at) ^ 1 << draw(st.integers(0, fmt.item_bytes * 8 - 1)))
            if kind == "noise":
                tree.store(at, draw(st.integers(0, (1 << fmt.item_bytes * 8) - 1)))
    return tree


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_engine_reads_what_plain_words_say(data):
    tree = data.draw(wild(ARMS))
    fmt, mem, root = tree.args
    found, bad, seen = plain_tree(fmt, mem, root)
    hard = [b for b in bad if b[2] in ("loop", "absent")]
    tm = TableMemory(fmt, mem)
    upper = descend(tm, root)
    problems = [upper.problems]
    for _, more in expand(tm, upper.base, upper.pa, upper.row, upper.prot):
        problems.append(more)
    got = sorted(
        (a, z, REASONS[r])
        for p in problems
        for a, z, r in zip(
            fmt.extend(p.iova).tolist(), fmt.extend(p.last).tolist(), p.reason.tolist(), strict=True
        )
    )
    assert [b for b in got if b[2] != "contig"] == bad
    if hard:
        for job in (extents, leaves, table_pages):
            with pytest.raises((InputError, MemoryAbsent)):
                job(fmt, mem, root)
        return
    runs, _ = extents(fmt, mem, root)
    want = plain_extents(found)
    assert rows_of(runs) == want
    assert set(table_pages(fmt, mem, root).tolist()) == set(seen)
    assert digest(fmt, mem, root, b"k" * 16) == digest_extents(runs, b"k" * 16)
    verdict = verify(fmt, mem, root, Extents.of(want), dead_leaves=False)
    assert verdict.equal == (not got)
    for iova, size, pa, prot in found[:6]:
        for offset in (0, size - 1):
            step = walk(fmt, mem, root, iova + offset)
            assert (step.pa, step.prot) == ((pa + offset, prot) if prot else (None, 0))
    if want and not got:
        iova, last, pa, prot = want[-1]
        page = 1 << fmt.levels[0].shift
        for other in ([*want[:-1]], [*want[:-1], (iova, last, pa ^ page, prot)]):
            assert not verify(fmt, mem, root, Extents.of(other)).equal


def test_the_first_and_the_last_iova_of_every_level(arm):
    """A leaf of every size at both ends of the space and of the space below one item of each level."""
    for number, spec in enumerate(arm.levels):
        if not spec.leaf:
            continue
        for contig in (None, *spec.contig):
            size = 1 << spec.shift + (contig.lg2 if contig else 0)
            tree, want = Sparse.empty(arm), {}
            for above in arm.levels[number:]:
                end = 1 << above.shift + above.index_bits
                for raw in {0, end // 2 & -size, end - size}:
                    want[raw + base_of(arm)] = (size * (len(want) + 1)) & (
                        (1 << arm.config["output_bits"]) - 1
                    )
            if size << 1 > 1 << arm.config["output_bits"]:
                want = dict.fromkeys(want, 0)
            for iova, pa in want.items():
                tree.put(iova, number, pa, 3, contig)
            fmt, mem, root = tree.args
            found = leaves(fmt, mem, root)
            assert found.iova.tolist() == sorted(want)
            assert set(found.lg2.tolist()) == {size.bit_length() - 1}
            for iova, pa in want.items():
                for offset in (0, size // 2, size - 1):
                    step = walk(fmt, mem, root, iova + offset)
                    assert (step.pa, step.prot, step.leaf_lg2) == (pa + offset, 3, size.bit_length() - 1)
            expected = Extents.of([(i, i + size - 1, p, 3) for i, p in sorted(want.items())])
            assert verify(fmt, mem, root, expected).equal
            for outside in ((base_of(fmt) - 1) % 2**64, (base_of(fmt) + (1 << fmt.input_lg2)) % 2**64):
                assert walk(fmt, mem, root, outside).pa is None or fmt.input_lg2 == 64


def test_every_item_of_the_root_and_nothing_beyond(arm):
    """The root lies in a page of other bytes; each of its items counts, its neighbours do not."""
    tree = Sparse.empty(arm)
    top = arm.levels[-1]
    if arm.top_level == 0:
        for index in range(top.items):
            tree.put(index << top.shift, 0, index << top.shift, 1)
    else:
        tree.new_table(arm.top_level - 1, 0x9000_0000)
        item = int(arm.table_items(arm.top_level, np.array([0x9000_0000], np.uint64))[0])
        chosen = range(top.items) if top.items < 1 << 15 else range(top.items // 2, top.items)
        for index in chosen:
            tree.store(tree.root_pa + index * arm.item_bytes, item)
    fmt, mem, root = tree.args
    upper = descend(TableMemory(fmt, mem), root)
    assert len(upper.problems) == 0
    if arm.top_level == 1:
        assert len(upper.base) == len(chosen)
    if arm.top_level == 0:
        runs, problems = extents(fmt, mem, root)
        assert rows_of(runs) == [(0, (1 << fmt.input_lg2) - 1, 0, 1)]
        assert len(problems) == 0
    with pytest.raises(InputError, match="multiple"):
        extents(fmt, mem, root + arm.root_bytes // 2)
    absent = PageMemory(np.array([0x1000_0000], np.uint64), np.zeros((1, 0x10000), np.uint8))
    with pytest.raises(MemoryAbsent):
        extents(fmt, absent, root)


@pytest.mark.parametrize(
    ("granule", "pa", "table_pa"),
    [(65536, 0xF_1234_5678_0000, 0xA_0000_8000_0000), (4096, 0xF_1234_5678_9000, 0xD_0000_8000_3000),
     (16384, 0xE_1234_5678_8000, 0xB_0000_8000_4000)],
)  # fmt: skip
@pytest.mark.parametrize("stage", [1, 2])
def test_52_bits_of_output_for_leaves_and_for_tables(stage, granule, pa, table_pa):
    name = f"arm_lpae_s{stage}"
    fmt = open_format(name, {"granule": granule, "input_bits": 48, "output_bits": 52})
    tree = Sparse.empty(fmt)
    tree.put(0x1234_5678_0000, 0, pa, 3, tables=[table_pa + n * granule for n in range(3)])
    _, mem, root = tree.args
    assert walk(fmt, mem, root, 0x1234_5678_0123).pa == pa + 0x123
    assert max(table_pages(fmt, mem, root).tolist()) >= table_pa
    expected = Extents.of([(0x1234_5678_0000, 0x1234_5678_0000 + granule - 1, pa, 3)])
    assert verify(fmt, mem, root, expected).equal
    # The same descriptors with 48 bits of output have bits set that must be zero.
    less = open_format(
        name, {"granule": granule, "input_bits": 48, "output_bits": 48, "lpa2": int(granule < 65536)}
    )
    step = walk(less, mem, root, 0x1234_5678_0000)
    assert step.pa is None
    assert "reserved" in step.why


def test_an_extent_across_a_piece_of_the_pa():
    """PA[51:48] and PA[51:50] are no ramp in the item: runs across 2**48 and 2**50 are proved."""
    for granule, edge in ((65536, 1 << 48), (4096, 1 << 50), (16384, 1 << 50)):
        fmt = open_format("arm_lpae_s1", {"granule": granule, "input_bits": 48, "output_bits": 52})
        tree, count = Sparse.empty(fmt), fmt.levels[0].items
        first = edge - granule * (count // 2)
        for n in range(count):
            tree.put(n * granule, 0, first + n * granule, 3)
        want = Extents.of([(0, count * granule - 1, first, 3)])
        _, mem, root = tree.args
        assert rows_of(extents(fmt, mem, root)[0]) == rows_of(want)
        for compiled in (False, True):
            assert verify(fmt, mem, root, want, compiled=compiled).equal
            assert not verify(
                fmt, mem, root, Extents.of([(0, count * granule - 1, first + granule, 3)]), compiled=compiled
            ).equal


HINTS = [f for f in ARMS if f.name.startswith("arm_lpae")]


@pytest.mark.parametrize("fmt", HINTS, ids=format_id)
def test_the_contiguous_hint(fmt):
    for level, spec in enumerate(fmt.levels):
        for contig in spec.contig:
            size = 1 << spec.shift + contig.lg2
            first = base_of(fmt)
            tree = Sparse.empty(fmt)
            tree.put(first, level, 0, 3, contig)
            _, mem, root = tree.args
            found = leaves(fmt, mem, root)
            assert (found.iova.tolist(), found.lg2.tolist()) == ([first], [size.bit_length() - 1])
            want = Extents.of([(first, first + size - 1, 0, 3)])
            assert verify(fmt, mem, root, want).equal
            # One item without the hint: it translates as before, and the run is inconsistent.
            at = tree.at(first + (1 << spec.shift), level)
            tree.store(at, tree.load(at) & ~contig.mask)
            verdict = verify(fmt, tree.memory, root, want)
            assert rows_of(extents(fmt, tree.memory, root)[0]) == rows_of(want)
            assert {m.reason for m in verdict.mismatches} == {"contig"}
            # One that says everything that the others say, but is not valid: hardware may take it from them.
            tree.store(at, (tree.load(at) | contig.mask) & ~spec.valid_mask)
            page = 1 << spec.shift
            want = Extents.of(
                [(first, first + page - 1, 0, 3), (first + 2 * page, first + size - 1, 2 * page, 3)]
            )
            assert rows_of(extents(fmt, tree.memory, root)[0]) == rows_of(want)
            verdict = verify(fmt, tree.memory, root, want)
            assert {m.reason for m in verdict.mismatches} == {"contig"}


@pytest.mark.parametrize("bit", range(64))
@pytest.mark.parametrize("name", ["arm_lpae_s1", "arm_lpae_s2"])
def test_bits_of_a_table_item(name, bit):
    """APTable[1] takes writes away, NSTable and software bits do nothing, RES0 bits are reserved."""
    fmt = open_format(name, {})
    tree = Sparse.empty(fmt)
    tree.put(0, 0, 0x5000, 3)
    at = tree.at(0, 1)
    tree.store(at, tree.load(at) ^ 1 << bit)
    verdict = verify(fmt, tree.memory, tree.root_pa, Extents.of([(0, 4095, 0x5000, 3)]))
    if 11 < bit < 48:
        assert [m.reason for m in verdict.mismatches] == ["absent"] or bit < 16
        assert not verdict.equal
        return
    step = walk(fmt, tree.memory, tree.root_pa, 0x123)
    ignored = [*range(2, 12), *range(51, 59)] + ([63] if name == "arm_lpae_s1" else [])
    if bit in ignored:
        assert verdict.equal
    else:
        assert not verdict.equal
    if name == "arm_lpae_s1" and bit == 62:
        assert (step.pa, step.prot) == (0x5123, 1)
        assert [m.reason for m in verdict.mismatches] == ["prot"]
    elif name == "arm_lpae_s1" and bit in (59, 60, 61):
        assert (step.pa, step.prot) == (0x5123, 3)
        assert {m.reason for m in verdict.mismatches} == {"attrs"}
    elif bit in (48, 49, 50) or (name == "arm_lpae_s2" and bit > 58):
        assert [m.reason for m in verdict.mismatches] == ["reserved"]
    elif bit == 0:
        assert [m.reason for m in verdict.mismatches] == ["missing"]


@pytest.mark.parametrize("name", ["arm_lpae_s1", "arm_lpae_s2", "arm_v7s"])
def test_a_leaf_without_the_access_flag_lets_nothing_pass(name):
    fmt = open_format(name, {})
    tree = Sparse.empty(fmt)
    tree.put(0, 0, 0x5000, 3)
    at = tree.at(0, 0)
    tree.store(at, tree.load(at) & ~(1 << (4 if name == "arm_v7s" else 10)))
    _, mem, root = tree.args
    assert walk(fmt, mem, root, 0).pa is None
    assert rows_of(extents(fmt, mem, root)[0]) == []
    want = Extents.of([(0, 4095, 0x5000, 3)])
    assert [m.reason for m in verify(fmt, mem, root, want).mismatches] == ["prot"]
    lenient = open_format(name, {"quirks": 2} if name == "arm_v7s" else {"hw_access": 1})
    assert walk(lenient, mem, root, 0).pa == 0x5000
    assert verify(lenient, mem, root, want).equal


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), data=st.data())
def test_random_bytes_never_crash_or_hang(seed, data):
    fmt = data.draw(st.sampled_from(ARMS))
    keep = data.draw(st.sampled_from([2**64 - 1, 0xF_FFFF, 0x7_FFFF & ~0xF000, 0xFF0_0000_0007_FFFF]))
    words = np.random.default_rng(seed).integers(0, 2**64, 8 * 8192, np.uint64) & np.uint64(keep)
    if data.draw(st.booleans()):
        words |= np.uint64(0x0000_0001_0000_0001)
    mem = PageMemory(
        np.arange(8, dtype=np.uint64) << np.uint64(16), words.view(np.uint8).reshape(8, -1).copy()
    )
    for job in (extents, leaves, table_pages):
        with contextlib.suppress(InputError, MemoryAbsent):
            job(fmt, mem, 0)
    with contextlib.suppress(InputError, MemoryAbsent):
        assert verify(fmt, mem, 0, Extents.empty(), limit=3).total >= 0
    for iova in (base_of(fmt), base_of(fmt) + (1 << fmt.input_lg2) - 1):
        with contextlib.suppress(MemoryAbsent):
            walk(fmt, mem, 0, iova)


# -- captures --------------------------------------------------------------------------------------------

DATA = Path(__file__).parents[1] / "data" / "captures"


def _captures():
    found = {p.name: p for p in sorted(DATA.glob("a64-*"))}
    if os.environ.get("IOKEEP_CAPTURES"):
        for path in sorted(Path(os.environ["IOKEEP_CAPTURES"]).glob("a64-*")):
            found.setdefault(path.name, path)
    return found


CAPTURES = _captures()


@pytest.fixture(params=CAPTURES.values(), ids=CAPTURES.keys(), scope="module")
def real(request):
    return Capture.load(request.param)


def test_captures_dump_and_verify_as_the_kernel_says(real):
    fmt = open_format(real.format, real.config)
    runs, problems = extents(fmt, real.memory, real.root_pa)
    text = "".join(tsv_lines(runs.iova, runs.last, runs.pa, runs.prot))
    assert text.encode() == (real.path / "truth.tsv").read_bytes()
    assert len(problems) == 0
    assert runs.mapped_bytes == real.meta["mapped_bytes"]
    verdict = verify(fmt, real.memory, real.root_pa, Extents(*real.truth()))
    assert verdict.equal
    assert verdict.pages == real.meta["mapped_bytes"] >> 12


def test_captures_in_plain_words(real):
    fmt = open_format(real.format, real.config)
    found, bad, seen = plain_tree(fmt, real.memory, real.root_pa)
    assert bad == []
    assert plain_extents(found) == rows_of(Extents(*real.truth()))
    assert set(table_pages(fmt, real.memory, real.root_pa).tolist()) == set(seen)


def test_captures_say_their_configuration_twice(real):
    """start_level and root_entries follow from the other keys."""
    short = {k: v for k, v in real.config.items() if k not in ("start_level", "root_entries")}
    assert open_format(real.format, short) is open_format(real.format, real.config)


# -- building --------------------------------------------------------------------------------------------


def test_captures_built_again_have_the_kernels_leaves(real, new_table):
    """The same leaf sizes; the same descriptors, but for memory attributes that the extents do not say."""
    fmt = open_format(real.format, real.config)
    built = new_table(fmt, size=32 << 20)
    truth = Extents(*real.truth())
    built.table.map(truth)
    was, now = leaves(fmt, real.memory, real.root_pa), leaves(*built.args)
    assert was.iova.tolist() == now.iova.tolist()
    assert was.lg2.tolist() == now.lg2.tolist()
    assert verify(*built.args, truth).equal
    differ = np.bitwise_or.reduce(was.item ^ now.item)
    allowed = {
        "arm_lpae_s1": 0x7 << 2 | 1 << 6 | 0x3 << 8 | 3 << 53,  # AttrIndx, AP[1], SH, XN
        "arm_lpae_s2": 0xF << 2 | 0x3 << 8 | 3 << 53,  # MemAttr, SH, XN
        "arm_mali_lpae": 0x7 << 2 | 3 << 53,  # attribute index, never execute
        # C, B, XN; in the second level AP[1], TEX, in large pages TEX and XN; in the first AP[1], TEX
        "arm_v7s": 0xC | 0x11 | 1 << 5 | 7 << 6 | 7 << 12 | 1 << 15 | 1 << 11,
    }[fmt.name]
    if "vfio" in real.meta["name"]:  # VFIO maps all as IOMMU_CACHE
        allowed = 0
    assert int(differ) & ~allowed == 0
    # Linux leaves emptied tables linked; else there are as many.
    assert 0 <= len(table_pages(fmt, real.memory, real.root_pa)) - len(built.table.pages()) <= 5


def plan(rng, fmt, count):
    """Disjoint extents of every size that the format has, at both ends of the space and between."""
    space, page = 1 << fmt.input_lg2, 1 << fmt.levels[0].shift
    out, used = [], []
    for _ in range(count):
        leaf = 1 << int(rng.choice([lg2 for lg2 in fmt.leaf_lg2s if lg2 <= fmt.input_lg2]))
        size = min(leaf * int(rng.integers(1, 4)), space)
        # Large leaves stay aligned, or their extents would be millions of small ones.
        grain = leaf if size // page > 1 << 14 else page
        start = int(rng.choice([0, space - size, space // 2])) + int(rng.integers(-2, 3)) * leaf
        start = max(0, min(start + int(rng.choice([0, grain])), space - size)) & -grain
        if any(a < start + size and start < a + n for a, n in used):
            continue
        top = ((1 << fmt.config["output_bits"]) - size) & -grain
        if top < 0:
            continue
        used.append((start, size))
        pa = int(rng.choice([min(start, top), top // 2 & -grain, top]))
        prot = 3 if fmt.features.get("no_perms") else int(rng.integers(1, 4))
        out.append((start + base_of(fmt), start + base_of(fmt) + size - 1, pa, prot))
    return sorted(out)


@pytest.mark.parametrize("seed", range(4))
def test_what_was_mapped_is_what_is_read(arm, seed, new_table):
    rng = np.random.default_rng(seed)
    rows_in = plan(rng, arm, 10)
    assert rows_in
    built = new_table(arm, size=16 << 20, seed=seed)
    want = Extents.of(rows_in)
    built.table.map(want)
    truth = want.canonical()
    if not arm.write_only:
        truth = Extents.of([(a, z, p, q if q != 2 else 3) for a, z, p, q in rows_of(want)]).canonical()
    runs, problems = extents(*built.args)
    assert rows_of(runs) == rows_of(truth)
    assert len(problems) == 0
    assert verify(*built.args, want).equal
    found, bad, _ = plain_tree(*built.args)
    assert bad == []
    assert plain_extents(found) == rows_of(truth)
    for iova, last, pa, _ in rows_in:
        probe = np.array([iova, last], np.uint64)
        assert built.table.iova_to_phys(probe).tolist() == [pa, pa + last - iova]
    while rows_in:
        iova, last, pa, _ = rows_in.pop(int(rng.integers(len(rows_in))))
        gone = built.table.unmap(iova, last)
        assert gone.iova[0] == iova
        assert int(gone.pa[0]) == pa
        left = Extents.of(rows_in) if rows_in else Extents.empty()
        assert verify(*built.args, left).equal
    built.table.free_all()
