# SPDX-License-Identifier: Apache-2.0
"""The page allocator: owners, references, pins, and what a wrong unpin does."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iokeep.errors import UsageError
from iokeep.mem.ram import Ram
from iokeep.soft.kernel.frames import (
    FIRMWARE_FRAMES,
    POISON,
    TAG_FREE,
    TAG_KERNEL,
    Claim,
    FrameAllocator,
    FrameRuns,
    Kind,
    OutOfMemory,
)
from iokeep.soft.kernel.placement import Placement


class Memory:
    def __init__(self, frames=8192):
        self.ram = Ram.of(frames * 4096)
        self.tags = np.zeros(frames, np.uint32)


@pytest.fixture
def frames():
    return FrameAllocator(Memory())


def clean(frames, *claims):
    audit = frames.audit(claims)
    assert (audit.leaked, audit.wrongly_freed, audit.bad_unpins, audit.bad_puts) == (0, 0, 0, 0), audit
    return audit


def test_alloc_and_put(frames):
    pfns = frames.alloc(10, 77, Kind.MEMFD)
    assert len(set(pfns.tolist())) == 10
    assert pfns.min() >= FIRMWARE_FRAMES
    assert (frames.tags[pfns] == 77).all()
    assert clean(frames, Claim("t", pfns, tag=77)).by_kind["memfd"] == 10
    assert frames.audit([]).leaked == 10
    frames.put(pfns)
    assert (frames.tags[pfns] == TAG_FREE).all()
    assert (frames.ram.bytes[int(pfns[3]) * 4096 : int(pfns[3]) * 4096 + 4096] == POISON).all()
    clean(frames)


def test_alloc_zeroes_unless_told_not_to(frames):
    pfn = int(frames.alloc(1, 20, Kind.KERNEL)[0])
    frames.ram.write(pfn * 4096, b"x" * 4096)
    frames.put(np.array([pfn]))
    again = frames.alloc(frames.n_free, 21, Kind.KERNEL)
    assert not frames.words[again].any()


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 5)), max_size=20))
def test_runs_of_frames(runs):
    pfns = np.array([a + n for a, count in runs for n in range(count)], np.int64)
    found = FrameRuns.of(pfns)
    assert found.pfns().tolist() == pfns.tolist()
    assert found.total == len(pfns)
    assert not (found.first[1:] == (found.first + found.count)[:-1]).any()
    parts = [FrameRuns.of(np.arange(a, a + count)) for a, count in runs]
    assert FrameRuns.join(parts).pfns().tolist() == pfns.tolist()


@pytest.mark.parametrize("length", [1, 300])
def test_runs_are_pinned_as_their_frames(frames, length):
    taken = np.concatenate([frames.alloc(length, 77, Kind.MEMFD) for _ in range(3)])
    frames.pin(taken[:1])
    frames.pin_runs(FrameRuns.of(taken))
    assert frames.pin_count[taken].tolist() == [2] + [1] * (len(taken) - 1)
    clean(frames, Claim("t", taken, tag=77), Claim("p", taken, pins=1), Claim("q", taken[:1], pins=1))
    frames.unpin(taken)
    frames.unpin(taken[:1])
    clean(frames, Claim("t", taken, tag=77))


def test_orders_are_aligned_and_whole(frames):
    firsts = frames.alloc(3, 20, Kind.KERNEL, order=9)
    assert (firsts % 512 == 0).all()
    every = (firsts[:, None] + np.arange(512)).reshape(-1)
    assert (frames.ref[every] == 1).all()
    frames.put(every)
    clean(frames)


def test_run_is_contiguous(frames):
    frames.claim(np.arange(300, 4000, 2), 30, Kind.KERNEL)
    first = frames.alloc_run(100, 20, Kind.HANDOVER)
    assert (frames.tags[first : first + 100] == 20).all()
    assert first >= 3999


def test_out_of_memory_takes_nothing(frames):
    free = frames.n_free
    with pytest.raises(OutOfMemory):
        frames.alloc(free + 1, 20, Kind.KERNEL)
    with pytest.raises(OutOfMemory):
        frames.alloc(1, 20, Kind.KERNEL, order=13)
    with pytest.raises(OutOfMemory):
        frames.claim(np.array([FIRMWARE_FRAMES, 0]), 20, Kind.KERNEL)
    with pytest.raises(OutOfMemory):
        frames.claim(np.array([frames.n_frames]), 20, Kind.KERNEL)
    assert frames.n_free == free
    frames.alloc(free, 20, Kind.KERNEL)
    with pytest.raises(OutOfMemory):
        frames.alloc(1, 20, Kind.KERNEL)


def test_small_allocations_use_every_frame(frames):
    free = frames.n_free
    for _ in range(free):
        frames.alloc(1, TAG_KERNEL, Kind.PGTABLE)
    assert frames.n_free == 0


def test_pinned_frame_outlives_its_owner(frames):
    pfns = frames.alloc(4, 50, Kind.MEMFD)
    frames.pin(pfns)
    frames.put(pfns)
    assert (frames.kind[pfns] == Kind.MEMFD).all()
    clean(frames, Claim("pin", pfns, refs=1, pins=1))
    frames.unpin(pfns)
    assert (frames.kind[pfns] == Kind.FREE).all()
    clean(frames)


def test_wrong_unpin_frees_under_the_owner(frames):
    owner = frames.alloc(2, 50, Kind.MEMFD)
    frames.unpin(owner[:1])
    assert frames.bad_unpins == 1
    assert frames.kind[owner[0]] == Kind.FREE
    audit = frames.audit([Claim("owner", owner, tag=50)])
    assert audit.wrongly_freed == 1
    assert audit.wrongly_freed_pfns == [int(owner[0])]
    # and the frame's next owner can lose it too
    thief = np.array([owner[0]])
    frames.claim(thief, 60, Kind.MEMFD)
    frames.put(owner)
    audit = frames.audit([Claim("next owner", thief, tag=60)])
    assert audit.wrongly_freed == 1
    assert frames.kind[owner[0]] == Kind.FREE


def test_wrong_unpin_of_a_held_frame_is_one_reference_too_few(frames):
    pfns = frames.alloc(1, 50, Kind.MEMFD)
    frames.get(pfns)
    frames.unpin(pfns)
    assert frames.bad_unpins == 1
    assert frames.audit([Claim("a", pfns, tag=50), Claim("b", pfns)]).wrongly_freed == 0
    frames.put(pfns)
    assert frames.audit([Claim("a", pfns, tag=50)]).wrongly_freed == 1


def test_unpin_of_pfn_zero_and_beyond_memory_is_counted(frames):
    frames.unpin(np.array([0, 0, 0, frames.n_frames + 5]))
    assert frames.bad_unpins == 4
    assert frames.audit([]).wrongly_freed == 1


def test_leak_of_a_pin_is_seen(frames):
    pfns = frames.alloc(3, 50, Kind.MEMFD)
    frames.pin(pfns[1:])
    audit = frames.audit([Claim("owner", pfns, tag=50)])
    assert audit.leaked == 2
    assert audit.leaked_pfns == pfns[1:].tolist()


def test_claim_with_a_foreign_tag_is_no_owner(frames):
    pfns = frames.alloc(1, 50, Kind.MEMFD)
    assert frames.audit([Claim("x", pfns, tag=51)]).wrongly_freed == 1


def test_double_put_is_counted(frames):
    pfns = frames.alloc(1, 50, Kind.MEMFD)
    frames.put(pfns)
    frames.put(pfns)
    assert frames.bad_puts == 1
    assert int(frames.ref[pfns[0]]) == 0


def test_inodes_continue_above_what_the_tags_say():
    memory = Memory()
    first = FrameAllocator(memory)
    ino = first.new_ino()
    first.alloc(1, ino, Kind.MEMFD)
    second = FrameAllocator(memory)
    assert second.new_ino() > ino


def test_boot_keeps_tags_of_preserved_frames_and_poisons_the_rest():
    memory = Memory()
    first = FrameAllocator(memory)
    kept = first.alloc(4, 90, Kind.MEMFD)
    lost = first.alloc(4, 91, Kind.MEMFD)
    second = FrameAllocator(memory)
    second.claim(kept, None, Kind.RESERVED)
    assert second.poison_free() == 4
    assert (second.tags[kept] == 90).all()
    assert (second.tags[lost] == TAG_FREE).all()
    assert (second.words[lost].view(np.uint8) == POISON).all()
    assert not second.words[kept].any()


@pytest.mark.parametrize("spec", ["contiguous", "2m-scattered", "4k-random", "mixed:3"])
def test_placements_are_free_distinct_frames(frames, spec):
    plan = Placement(spec).plan(frames, 3000)
    assert len(set(plan.tolist())) == 3000
    assert (frames.kind[plan] == Kind.FREE).all()
    blocks = plan[: 3000 // 512 * 512].reshape(-1, 512)
    huge = (blocks[:, 0] % 512 == 0) & (np.diff(blocks, axis=1) == 1).all(axis=1)
    if spec in ("contiguous", "2m-scattered"):
        assert huge.all()
    elif spec == "4k-random":
        assert not huge.any()
    else:
        assert 0 < np.count_nonzero(huge) < len(huge)
    assert (np.diff(plan) == 1).all() == (spec == "contiguous")
    # others stay away from planned frames
    assert not np.isin(frames.alloc(frames.n_free - 3000, 20, Kind.KERNEL), plan).any()


def test_mixed_placement_follows_its_seed():
    a, b, c = (Placement(s).plan(FrameAllocator(Memory()), 2048) for s in ("mixed:1", "mixed:1", "mixed:2"))
    assert (a == b).all()
    assert (a != c).any()


def test_listed_placement(frames, tmp_path):
    path = tmp_path / "pfns.npy"
    np.save(path, np.array([900, 700, 800]))
    placement = Placement(str(path))
    assert placement.plan(frames, 3).tolist() == [900, 700, 800]
    with pytest.raises(OutOfMemory):
        placement.plan(frames, 3)  # planned by somebody now
    np.save(path, np.array([5]))
    with pytest.raises(OutOfMemory, match="not free"):
        Placement(str(path)).plan(frames, 1)
    np.save(path, np.array([901, 901]))
    with pytest.raises(UsageError, match="twice"):
        Placement(str(path))
    with pytest.raises(UsageError):
        Placement(str(tmp_path / "absent.npy"))
    with pytest.raises(UsageError):
        Placement("sideways")
