# SPDX-License-Identifier: Apache-2.0
"""Damaged handovers: a clean result, problems, or InputError; never a crash, a loop, or memory for claims."""

import random
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iokeep.errors import InputError
from iokeep.handover.check import check, notes
from iokeep.handover.iommu import IommufdRecord, IommuRecord, VfioRecord
from iokeep.handover.radix import PreservedTree
from iokeep.handover.reader import read_handover
from iokeep.handover.writer import FileOut, FlbOut, MemfdOut, SessionOut, write_handover, write_memfd


def survive(mem, fdt_pa):
    """Read, check and use all of it; True where it could be read."""
    try:
        got = read_handover(mem, fdt_pa)
        for problem in check(got):
            assert isinstance(problem, str)
            assert "\n" not in problem
        notes(got)
        for session in got.sessions:
            for file in session.files:
                file.extents()
        got.preserved.frames()
    except InputError:
        return False
    return True


INTERESTING = [
    0,
    1,
    2,
    51,
    52,
    63,
    64,
    511,
    512,
    1 << 12,
    1 << 31,
    1 << 32,
    10**9,
    1 << 52,
    1 << 63,
    2**64 - 1,
]


def damage(mem, rng, pages):
    """One damage to one of the metadata pages."""
    pa = rng.choice(pages)
    kind = rng.randrange(5)
    if kind == 0:  # a byte
        mem.write(pa + rng.randrange(4096), bytes([rng.randrange(256)]))
    elif kind == 1:  # a byte of what is in use, at the page's start
        mem.write(pa + rng.randrange(160), bytes([rng.randrange(256)]))
    elif kind == 2:  # a word, to a value at some limit
        mem.put64(pa + 8 * rng.choice([rng.randrange(12), rng.randrange(512)]), rng.choice(INTERESTING))
    elif kind == 3:  # a pointer, to another page of the handover: loops, shared pages, wrong types
        used = [8 * i for i, w in enumerate(np.frombuffer(mem.read(pa, 4096), "<u8")) if w] or [0]
        mem.put64(pa + rng.choice(used), rng.choice(pages))
    else:  # a page is gone, or another one lies in its place
        if rng.randrange(3) == 0:
            mem.pages.pop(pa)
            pages.remove(pa)
        else:
            mem.pages[pa] = bytearray(mem.pages[rng.choice(pages)])


def fuzz(mem, fdt_pa, pages, seed, rounds):
    rng = random.Random(seed)
    outcomes = {survive(mem, fdt_pa)}
    for _ in range(rounds):
        broken, left = mem.copy(), list(pages)
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            if left:
                damage(broken, rng, left)
        outcomes.add(survive(broken, fdt_pa))
    return outcomes


def test_damaged_captures(capture):
    pages = list(read_handover(capture.memory, capture.fdt_pa).pages)
    capture.memory.pages = {pa: capture.memory.pages[pa] for pa in pages}
    assert fuzz(capture.memory, capture.fdt_pa, pages, capture.name, 150) == {True, False}


def written(box):
    pfn = np.arange(700, dtype=np.uint64) * np.uint64(2) + np.uint64(1 << 24)
    big = write_memfd(box, box.alloc, MemfdOut(5, 700 << 12, 6, pfn, np.arange(700, dtype=np.uint64)))
    files = [
        FileOut("memfd-v2", big, 1),
        FileOut(IommufdRecord.COMPATIBLE, IommufdRecord((), ()).write(box, box.alloc), 2),
        FileOut(VfioRecord.COMPATIBLE, VfioRecord(0, 1, 0, 2).write(box, box.alloc), 3),
        FileOut("other-v1", 0, 4),
    ]
    flb = FlbOut(IommuRecord.COMPATIBLE, IommuRecord((), (), ()).write(box, box.alloc), 1)
    return write_handover(
        box,
        box.alloc,
        sessions=[SessionOut("vm", files), *(SessionOut(f"s{i}") for i in range(55))],
        flbs=[flb],
        preserved=PreservedTree.of(pfn).union(box.tree()),
        liveupdate_num=1,
        previous_release="x",
        kexec_count=1,
    )


@given(st.integers(0, 2**32))
def test_damaged_written_handovers(new_box, seed):
    box = new_box()
    fdt_pa = written(box)
    fuzz(box, fdt_pa, list(read_handover(box, fdt_pa).pages), seed, 4)


@pytest.mark.parametrize("claim", [10**9, 2**32 - 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize(
    "word", ["nr_folios", "total_pages", "both", "sessions", "files", "flbs", "blob-size"]
)
def test_claims_cost_no_memory(box, word, claim):
    fdt_pa = written(box)
    at = {what.split("0x1 ")[-1]: pa for pa, what in read_handover(box, fdt_pa).pages.items()}
    record = at["memfd record"]
    if word in ("nr_folios", "both"):
        box.put64(record + 24, claim)
    if word in ("total_pages", "both"):
        box.write(record + 40, (claim & 0xFFFFFFFF).to_bytes(4, "little"))
    if word == "sessions":
        box.put64(at["sessions block 0"] + 8, claim)
    if word == "files":
        box.put64(at["session 'vm' files block 0"] + 8, claim)
    if word == "flbs":
        box.put64(at["FLB page"] + 8, claim)
    if word == "blob-size":
        page = box.read(fdt_pa, 4096)
        box.write(fdt_pa, page.replace((73).to_bytes(8, "little"), claim.to_bytes(8, "little")))
    tracemalloc.start()
    try:
        survive(box, fdt_pa)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_a_chain_of_blocks_has_an_end(box):
    # every page of a big memory chained to the next, then back to the first
    fdt_pa = written(box)
    at = {what: pa for pa, what in read_handover(box, fdt_pa).pages.items()}
    pas = [at["sessions block 1"], *(box.alloc(1, True) for _ in range(2000))]
    for pa, following in zip(pas, [*pas[1:], pas[0]], strict=True):
        box.put64(pa, following)
        box.put64(pa + 8, 1)
    got = read_handover(box, fdt_pa)
    assert any("a loop" in problem for problem in got.problems)
    assert len(got.problems) <= 1001  # the rest is counted
    assert got.problems[-1].endswith("more problems are not listed")
