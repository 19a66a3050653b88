# SPDX-License-Identifier: Apache-2.0
"""Faults do what their names say, exactly once, and only where no device works."""

import numpy as np
import pytest

from iokeep.errors import UsageError
from iokeep.mem.ram import Ram
from iokeep.mem.ranges import Range
from iokeep.pt.build import Table
from iokeep.pt.extents import Extents
from iokeep.pt.leaves import leaves
from iokeep.pt.registry import open_format
from iokeep.pt.verify import verify
from iokeep.rehearse.inject import (
    KILL_STEPS,
    REPLAY_FAULTS,
    Fault,
    change_replay,
    change_tables,
    parse_fault,
)
from iokeep.restore.manifest import Area, FileEntry

MIB2 = 0x20_0000
QUIET = [Range(0x20_0000, 0x3F_FFFF), Range(0x4000_0000, 0x4000_FFFF)]
UNPLUGGED = Range(0x80_0000_0000, 0x80_0000_0FFF)


class Bench:
    """A table of 2M and 4K leaves with an emptied table, in private RAM."""

    def __init__(self, name, **config):
        self.fmt = open_format(name, config)
        self.mem = Ram.of(64 << 20)
        self.next = 0x1000

        def alloc(n, size=4096):
            self.next = -(-self.next // size) * size
            pas = np.arange(n, dtype=np.uint64) * np.uint64(size) + np.uint64(self.next)
            self.next += n * size
            return pas

        self.table = Table.create(self.fmt, self.mem, alloc, lambda *gone: None)
        # each by itself, so that no format joins them to something larger
        rows = [(at, at + MIB2 - 1, 0x80_0000 + at, 3) for at in range(0, 0x80_0000, MIB2)]
        rows += [(0x10_0000_0000, 0x10_0000_FFFF, 0x180_0000, 1)]
        rows += [
            (0x4000_0000 + i * 4096, 0x4000_0000 + i * 4096 + 4095, 0x100_0000 + 2 * i * 4096, 3)
            for i in range(16)
        ]
        self.want = Extents.of(rows).canonical()
        for row in (*rows, (UNPLUGGED.start, UNPLUGGED.last, 0x1C0_0000, 3)):
            self.table.map(Extents.of([row]))
        self.table.unmap(UNPLUGGED.start, UNPLUGGED.last)
        self.tags = np.full(len(self.mem.bytes) // 4096, 20, np.uint32)
        self.tags[0x100_0000 >> 12 : 0x120_0000 >> 12] = 21

    def inject(self, name):
        return change_tables(name, self.fmt, self.mem, self.table.root_pa, QUIET, self.tags, [UNPLUGGED])

    def verdict(self):
        return verify(self.fmt, self.mem, self.table.root_pa, self.want)


KINDS = {
    "vtdss": {"levels": 4},
    "x86_64": {"levels": 4},
    "amdv1": {"levels": 4},
    "arm_lpae_s1": {},
    "arm_lpae_s2": {"input_bits": 40, "output_bits": 40, "start_level": 1},
    "riscv64": {"levels": 4},
}


@pytest.fixture(params=list(KINDS))
def bench(request):
    b = Bench(request.param, **KINDS[request.param])
    assert b.verdict().equal
    return b


@pytest.mark.parametrize(
    ("name", "config", "size"),
    [
        ("amdv1", {"levels": 4}, 0x8000),
        ("amdv1", {"levels": 4}, MIB2 * 2),
        ("riscv64", {"levels": 4}, 0x1_0000),
    ],
)
@pytest.mark.parametrize("fault", ["pte-bit", "pte-swap", "unknown-bit"])
def test_contiguous_entries_are_damaged_as_such(name, config, size, fault):
    """A swap moves every item of both; a bit tears one, and the rest is what is found missing or moved."""
    b = Bench(name, **config)
    at = 0xA0_0000_0000
    rows = [(at + i * 2 * size, at + i * 2 * size + size - 1, 0x200_0000 + i * 2 * size, 3) for i in (0, 1)]
    for row in rows:
        b.table.map(Extents.of([row]))
    want = Extents.of(
        [*zip(*(getattr(b.want, c).tolist() for c in ("iova", "last", "pa", "prot")), strict=True), *rows]
    )
    quiet = [Range(at, at + 4 * size - 1)]
    found = leaves(b.fmt, b.mem, b.table.root_pa, at, at + 4 * size - 1)
    assert (1 << found.lg2.astype(int) == size).all()
    injected = change_tables(fault, b.fmt, b.mem, b.table.root_pa, quiet, b.tags, [])
    verdict = verify(b.fmt, b.mem, b.table.root_pa, want)
    assert not verdict.equal
    assert injected.iova == at
    if fault == "pte-swap":
        assert {m.reason for m in verdict.mismatches} == {"pa"}
        after = leaves(b.fmt, b.mem, b.table.root_pa, at, at + 4 * size - 1)
        assert after.pa.tolist() == found.pa.tolist()[::-1]
        assert (1 << after.lg2.astype(int) == size).all()


@pytest.mark.parametrize("name", ["pte-bit", "pte-swap"])
def test_a_changed_pa_is_in_a_quiet_range_and_seen(bench, name):
    injected = bench.inject(name)
    verdict = bench.verdict()
    assert not verdict.equal
    assert all(any(q.start <= m.iova and m.last <= q.last for q in QUIET) for m in verdict.mismatches)
    assert injected.iova in {m.iova for m in verdict.mismatches}
    assert {m.reason for m in verdict.mismatches} == {"pa"}


def test_pte_bit_points_at_somebody_elses_frame(bench):
    injected = bench.inject("pte-bit")
    found = next(m for m in bench.verdict().mismatches if m.iova == injected.iova)
    assert bench.tags[found.found_pa >> 12] != bench.tags[found.expected_pa >> 12]


def test_an_unknown_bit_is_refused_as_such(bench):
    bench.inject("unknown-bit")
    verdict = bench.verdict()
    assert not verdict.equal
    assert {m.reason for m in verdict.mismatches} <= {"reserved", "attrs"}


def test_an_unknown_bit_above_small_leaves_is_reserved_too(bench):
    """Where the small leaf has no reserved bit, the item above it has, if all behind it is quiet."""
    bench.table.map(Extents.of([(0x90_0000_0000, 0x90_0000_0FFF, 0x1E0_0000, 3)]))
    quiet = [Range(0x90_0000_0000, 0x90_0000_0FFF)]
    args = (bench.fmt, bench.mem, bench.table.root_pa, quiet, bench.tags, [UNPLUGGED])
    injected = change_tables("unknown-bit", *args)
    assert injected.iova == 0x90_0000_0000
    assert "reserved" in injected.what
    rows = list(zip(*(getattr(bench.want, c).tolist() for c in ("iova", "last", "pa", "prot")), strict=True))
    with_it = Extents.of([*rows, (0x90_0000_0000, 0x90_0000_0FFF, 0x1E0_0000, 3)])
    verdict = verify(bench.fmt, bench.mem, bench.table.root_pa, with_it)
    assert not verdict.equal
    assert "reserved" in {m.reason for m in verdict.mismatches}


def test_leaf_size_keeps_every_translation(bench):
    before = leaves(bench.fmt, bench.mem, bench.table.root_pa)
    bench.inject("leaf-size")
    assert bench.verdict().equal
    after = leaves(bench.fmt, bench.mem, bench.table.root_pa)
    assert len(after) == len(before) + 511
    assert after.extents().pa.tolist() == before.extents().pa.tolist()


def test_leaf_size_without_big_leaves_is_a_usage_error(bench):
    with pytest.raises(UsageError, match="2 MiB leaf"):
        change_tables(
            "leaf-size", bench.fmt, bench.mem, bench.table.root_pa, QUIET[1:], bench.tags, [UNPLUGGED]
        )


FILES = [FileEntry(1, 0x80_0000, "ram0"), FileEntry(2, 0x20_0000, "ram1")]
AREAS = [Area(0, 0x3F_FFFF, 1, 0, 3), Area(0x4000_0000, 0x401F_FFFF, 2, 0, 3)]
LIMITS = [Range(0, 2**47 - 1)]


def view(areas):
    """page of IOVA -> (file, file page, prot): what the areas mean."""
    out = {}
    for a in areas:
        for i in range(a.length // 4096):
            assert a.iova // 4096 + i not in out
            out[a.iova // 4096 + i] = (a.file, a.offset // 4096 + i, a.prot)
    return out


@pytest.mark.parametrize("name", REPLAY_FAULTS)
def test_a_replay_fault_changes_only_a_quiet_range(name):
    quiet = [Range(0x20_0000, 0x3F_FFFF)]
    areas, injected = change_replay(name, AREAS, FILES, quiet, LIMITS)
    was, now = view(AREAS), view(areas)
    assert was != now
    changed = {p for p in was.keys() | now.keys() if was.get(p) != now.get(p)}
    if name == "extra-area":
        assert not changed & was.keys()
        assert injected.iova // 4096 in changed
    else:
        assert changed <= set(range(0x200, 0x400))
        assert min(changed) == injected.iova // 4096
    for a in areas:
        assert a.offset + a.length <= next(f.size for f in FILES if f.token == a.file)
    assert areas == sorted(areas)


def test_no_wrong_file_where_there_is_only_one():
    with pytest.raises(UsageError, match="one file only"):
        change_replay("wrong-file", AREAS[:1], FILES[:1], [Range(0, 0xFFFF)], LIMITS)


def test_an_extra_area_finds_a_hole_below_a_small_limit():
    areas = [Area(0, 0x3F_FFFF, 1, 0, 3), Area(0x7F_0000, 0x7F_FFFF, 1, 0x40_0000, 3)]
    out, injected = change_replay("extra-area", areas, FILES, [], [Range(0, 0x7F_FFFF)])
    view(out)
    assert injected.iova < 0x7F_0000


def test_names_are_checked():
    assert parse_fault("pte-bit") == Fault("pte-bit")
    assert parse_fault("kill-at=replay") == Fault("kill-at", "replay")
    assert parse_fault("kill-at=replay").text == "kill-at=replay"
    for bad in ("pte-bits", "kill-at", "kill-at=", "kill-at=lunch", "pte-bit=1", ""):
        with pytest.raises(UsageError):
            parse_fault(bad)
    assert len(set(KILL_STEPS)) == len(KILL_STEPS)
