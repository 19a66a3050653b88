# SPDX-License-Identifier: Apache-2.0
"""The guest of a rehearsal: layouts that cannot be wrong, and captured tables that come out leaf for leaf."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iokeep.errors import CapabilityError, UsageError
from iokeep.pt.registry import open_format
from iokeep.rehearse.machine import FORMATS, MACHINES
from iokeep.rehearse.scenario import (
    GIB,
    MIB2,
    Range,
    areas_of,
    check_memory,
    file_pages,
    like,
    parse_size,
    pc,
    renumber,
)
from iokeep.rehearse.vmm import rows_of


def greedy(areas, pfns):
    """Leaves as the kernel maps these areas: in each physically contiguous run the biggest size that
    divides and fits."""
    out = []
    for a in areas:
        at, last = a.iova, a.last
        while at <= last:
            page = (a.offset + at - a.iova) // 4096
            pa = int(pfns[page]) * 4096
            run = 4096
            while at + run <= last and int(pfns[page + run // 4096]) * 4096 == pa + run:
                run += 4096
            end = at + run
            while at < end:
                lg2 = next(s for s in (30, 21, 12) if (at | pa) % (1 << s) == 0 and at + (1 << s) <= end)
                out.append((at, pa, lg2, a.prot))
                at += 1 << lg2
                pa += 1 << lg2
    return out


@st.composite
def tables(draw):
    """Leaves that some kernel could have written: 4K and 2M, scattered, adjacent, aliased."""
    rows, at = [], draw(st.integers(0, 8)) * MIB2
    for _ in range(draw(st.integers(1, 12))):
        at += draw(st.sampled_from([0, 0, 4096, MIB2, 3 * MIB2 + 4096]))
        prot = draw(st.sampled_from([1, 3, 3]))
        if draw(st.booleans()):
            at = -(-at // MIB2) * MIB2
            rows.append((at, draw(st.integers(0, 40)) * MIB2, 21, prot))
            at += MIB2
        else:
            pa = draw(st.integers(0, 40)) * MIB2 + draw(st.sampled_from([0, 0x1000, 0x5000]))
            if draw(st.booleans()):
                at = -(-at // MIB2) * MIB2
            for i in range(draw(st.sampled_from([1, 3, 512, 600]))):
                rows.append((at, pa + i * 4096, 12, prot))
                at += 4096
    iova, pa, lg2, prot = (np.array(c) for c in zip(*rows, strict=True))
    return iova.astype(np.uint64), pa.astype(np.uint64), lg2.astype(np.uint8), prot.astype(np.uint8)


@given(tables())
def test_a_captured_table_comes_out_leaf_for_leaf(t):
    iova, pa, lg2, prot = t
    page, pfns = file_pages(pa, lg2)
    assert len(np.unique(pfns)) == len(pfns)
    areas = areas_of(iova, pa, lg2, prot, page, (12, 21, 30))
    want = list(zip(*(c.tolist() for c in (iova, pa, lg2, prot)), strict=True))
    assert greedy(areas, pfns) == want


@given(tables())
def test_areas_are_whole_and_no_more_than_needed(t):
    iova, pa, lg2, prot = t
    page, _ = file_pages(pa, lg2)
    areas = areas_of(iova, pa, lg2, prot, page, (12, 21, 30))
    assert sum(a.length for a in areas) == sum(1 << int(s) for s in lg2)
    for a, b in pairwise(areas):
        assert a.last < b.iova


@given(tables())
def test_renumbering_keeps_alignment_and_contiguity(t):
    _, pa, lg2, _ = t
    moved, end = renumber(pa, lg2)
    assert ((moved ^ pa) & np.uint64(MIB2 - 1) == 0).all()
    assert int(moved.max()) < end
    # Two leaves are in one region, or in touching ones, exactly where they were before.
    a, b = np.meshgrid(pa >> np.uint64(21), pa >> np.uint64(21))
    c, d = np.meshgrid(moved >> np.uint64(21), moved >> np.uint64(21))
    near = (a.astype(np.int64) - b.astype(np.int64)).clip(-2, 2)
    assert (near == (c.astype(np.int64) - d.astype(np.int64)).clip(-2, 2)).all()


def test_the_kernel_keeps_region_zero():
    moved, _ = renumber(np.array([0x1000], np.uint64), np.array([12], np.uint8))
    assert int(moved[0]) == MIB2 + 0x1000


def test_a_table_that_maps_nothing_is_no_guest():
    z = np.zeros(0, np.uint64)
    with pytest.raises(CapabilityError, match="maps nothing"):
        like("empty", "vtdss", {"levels": 4}, "legacy", (z, z, z.astype(np.uint8), z.astype(np.uint8)))


def test_a_format_without_hardware_is_said_to_be_so():
    z = np.zeros(0, np.uint64)
    with pytest.raises(CapabilityError, match="arm_mali_lpae"):
        like("arm", "arm_mali_lpae", {}, "", (z, z, z.astype(np.uint8), z.astype(np.uint8)))


@pytest.mark.parametrize("page_size", ["4K", "2M", "mixed"])
@pytest.mark.parametrize("memory", [16 << 20, 64 << 20, 1 << 30, 8 << 30, 300 << 30])
@pytest.mark.parametrize("format_name", FORMATS)
def test_a_pc_is_a_layout_that_a_kernel_takes(page_size, memory, format_name):
    s = pc(memory, page_size, format_name, 3)
    assert sum(f.size for f in s.files if f.name.startswith("ram")) == memory
    for a, b in pairwise(s.areas):
        assert a.last < b.iova
    prots = {a.prot for a in s.areas}
    assert prots == ({1, 2, 3} if open_format(format_name, {}).write_only else {1, 3})
    machine = MACHINES[format_name]
    assert (s.iommu, s.mode) == (machine.iommu, machine.mode)
    for a in s.areas:
        assert not any(r.overlaps(Range(a.iova, a.last)) for r in machine.reserved)
        assert machine.ram <= a.iova or not a.role.endswith("RAM")
        assert a.iova % 4096 == 0
        assert (a.last + 1) % 4096 == 0
        assert a.offset + a.length <= s.files[a.file].size
        assert a.last < 1 << 47
    assert s.ram_bytes > memory
    assert s.quiet
    # What the VMM really gives its devices: with the quiet ranges left out, and all of it.
    slots = {number: s.slot_base(number) for number in range(len(s.files))}
    tags = dict.fromkeys(slots, 16)
    busy = [Range(row.iova, row.last) for row in rows_of(s.areas, s.quiet, slots, tags)]
    assert all(not r.overlaps(q) for r in busy for q in s.quiet)
    assert sum(row.last - row.iova + 1 for row in rows_of(s.areas, [], slots, tags)) == s.mapped


def test_gigabyte_pages():
    s = pc(2 * GIB, "1G")
    assert s.files[0].pfns is not None
    assert (s.files[0].pfns[:: GIB // 4096] % (GIB // 4096) == 0).all()
    assert any(a.iova % GIB == 0 and a.length >= GIB for a in s.areas)


@pytest.mark.parametrize(
    ("memory", "page_size", "format_name"),
    [(1 << 20, "4K", "vtdss"), (16 << 20, "8K", "vtdss"), ((16 << 20) + 4096, "4K", "vtdss"),
     (3 << 20, "1G", "vtdss"), (1 << 50, "4K", "vtdss"), (16 << 20, "4K", "s390_zpci")],
)  # fmt: skip
def test_impossible_guests_are_usage_errors(memory, page_size, format_name):
    with pytest.raises(UsageError):
        pc(memory, page_size, format_name)


@pytest.mark.parametrize(
    ("text", "value"),
    [("4K", 4096), ("0x1000", 4096), ("2M", MIB2), ("1G", GIB), ("17", 17), ("1T", 1 << 40)],
)
def test_sizes(text, value):
    assert parse_size(text) == value


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "1k", "1.5G", "4KiB", "0x10K", "G", "1 G", "9" * 30, "0x" + "f" * 16]
)
def test_bad_sizes(text):
    with pytest.raises(UsageError):
        parse_size(text)


def test_more_memory_than_there_is():
    with pytest.raises(CapabilityError, match="MiB are available") as e:
        check_memory(1 << 40, "this", 1 << 30)
    assert e.value.exit_code == 4
