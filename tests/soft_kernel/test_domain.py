# SPDX-License-Identifier: Apache-2.0
"""Domains whatever the format: tables of other sizes than a page, tables that grow at the top, the queue's
ring.
"""

from __future__ import annotations

import errno

import numpy as np
import pytest
from soft_machine import boot, settled

from iokeep.errors import IokeepError
from iokeep.pt.extents import Extents
from iokeep.pt.registry import open_format
from iokeep.soft.kernel.frames import FRAME_BYTES, Kind
from iokeep.soft.kernel.iommu import Domain, holds_root
from iokeep.soft.kernel.queue import CommandQueue
from iokeep.soft.kernel.syserror import SysError

MIB = 1 << 20
#: format, configuration, bytes of the root
ROOTS = [
    ("arm_lpae_s2", {"granule": 4096, "input_bits": 40, "output_bits": 40, "start_level": 1}, 8192),
    ("arm_lpae_s2", {"granule": 4096, "input_bits": 43, "output_bits": 44, "start_level": 1}, 65536),
    ("arm_lpae_s1", {"granule": 4096, "input_bits": 40, "output_bits": 48}, 16),
    ("arm_lpae_s1", {"granule": 16384, "input_bits": 36, "output_bits": 48}, 16384),
    ("riscv64", {"levels": 3, "stage": 2}, 16384),
]


@pytest.mark.parametrize(("name", "config", "root_bytes"), ROOTS)
def test_tables_of_any_size_are_whole_frames_that_come_back(name, config, root_bytes):
    kernel = boot()
    free = kernel.frames.n_free
    fmt = open_format(name, config)
    assert fmt.root_bytes == root_bytes
    domain = Domain(kernel.iommu, fmt, 9)
    size = max(root_bytes, FRAME_BYTES)
    assert domain.root_pa % size == 0
    assert holds_root(fmt, domain.root_pa, domain.table_pages)
    root = set(range(domain.root_pa, domain.root_pa + size, FRAME_BYTES))
    assert root <= set(domain.table_pages.tolist())
    pages = [(3 * MIB, 4 * MIB - 1, 8 * MIB, 3), (1 << 31, (1 << 31) + 0x3FFF, 16 * MIB, 1)]
    domain.map(Extents.of(pages))
    # What the format itself reaches is what the domain holds.
    reached = set()
    for pa in domain.table.pages().tolist():
        level_size = size if pa == domain.root_pa else fmt.table_bytes
        reached |= set(range(pa, pa + level_size, FRAME_BYTES))
    assert reached == set(domain.table_pages.tolist())
    assert (kernel.frames.kind[domain.table_pfns] == Kind.PGTABLE).all()
    found = domain.iova_to_phys(np.array([3 * MIB + 5, 1 << 31, 5], np.uint64))
    assert found.tolist() == [8 * MIB + 5, 16 * MIB, 0]
    # A large leaf takes the place of emptied tables, which go back frame by frame.
    domain.unmap(3 * MIB, 4 * MIB - 1)
    big = 1 << fmt.levels[1].shift
    domain.map(Extents.of([(0, big - 1, big, 3)]))
    domain.free()
    assert kernel.frames.n_free == free
    settled(kernel)


def test_a_root_is_whole_aligned_and_among_the_pages():
    fmt = open_format("riscv64", {"stage": 2})
    pages = np.arange(0x10000, 0x14000, 0x1000, dtype=np.uint64)
    assert holds_root(fmt, 0x10000, pages)
    assert not holds_root(fmt, 0x10000, pages[:3])
    assert not holds_root(fmt, 0x11000, np.append(pages, np.uint64(0x14000)))
    assert not holds_root(fmt, 2**64 - 0x4000, pages)
    small = open_format("arm_lpae_s1", {"input_bits": 40})
    assert holds_root(small, 0x11040, pages)
    assert not holds_root(small, 0x11044, pages)


@pytest.fixture
def growing(monkeypatch):
    """A kernel whose driver lets AMD v1 tables grow to 5 levels, and the roots that hardware was told."""
    kernel = boot()
    told = []

    def larger(fmt):
        levels = len(fmt.levels)
        if fmt.name != "amdv1" or levels == 5:
            return None
        return open_format("amdv1", {**fmt.config, "levels": levels + 1})

    def grow(domain):
        if len(told) == 2:
            raise SysError(errno.ENOMEM, "no")
        told.append((domain.levels, domain.root_pa))

    monkeypatch.setattr(kernel.iommu, "larger", larger)
    monkeypatch.setattr(kernel.iommu, "grow", grow)
    return kernel, told


def test_a_table_grows_at_the_top(growing):
    kernel, told = growing
    domain = Domain(kernel.iommu, open_format("amdv1", {"levels": 3}), 9)
    assert domain.aperture_last == (1 << 57) - 1
    domain.map(Extents.of([(MIB, 2 * MIB - 1, 4 * MIB, 3)]))
    root = domain.root_pa
    assert told == []
    far = 1 << 50
    domain.map(Extents.of([(far, far + MIB - 1, 5 * MIB, 3)]))
    assert [levels for levels, _ in told] == [4, 5]
    assert domain.levels == 5
    assert domain.fmt.config["levels"] == 5
    assert domain.root_pa == told[-1][1] != root
    assert domain.iova_to_phys(np.array([MIB, far], np.uint64)).tolist() == [4 * MIB, 5 * MIB]
    assert domain.aperture_last == (1 << 57) - 1
    with pytest.raises(SysError) as e:
        domain.map(Extents.of([(1 << 60, (1 << 60) + MIB - 1, 5 * MIB, 3)]))
    assert e.value.errno == errno.ERANGE
    domain.free()
    settled(kernel)


def test_a_growth_that_the_driver_refuses_leaves_the_table(growing):
    kernel, told = growing
    told += [None, None]
    domain = Domain(kernel.iommu, open_format("amdv1", {"levels": 3}), 9)
    pages = domain.table_pages.tolist()
    with pytest.raises(SysError) as e:
        domain.map(Extents.of([(1 << 40, (1 << 40) + MIB - 1, 5 * MIB, 3)]))
    assert e.value.errno == errno.ENOMEM
    assert domain.levels == 3
    assert domain.table_pages.tolist() == pages
    domain.free()
    settled(kernel)


def test_a_domain_that_is_only_held_keeps_the_frames_and_reads_nothing():
    kernel = boot()
    pfns = kernel.frames.alloc(3, 2, Kind.RESERVED)
    pages = pfns.astype(np.uint64) << np.uint64(12)
    domain = kernel.iommu.hold_domain(open_format("riscv64", {"stage": 2}), 9, pages)
    assert domain.iova_to_phys(np.array([0], np.uint64)).tolist() == [0]
    with pytest.raises(IokeepError, match="taken"):
        kernel.iommu.hold_domain(open_format("vtdss", {}), 9, pages)
    assert not kernel.audit().leaked
    domain.free()
    assert (kernel.frames.kind[pfns] == Kind.FREE).all()
    settled(kernel)


class _Ring(CommandQueue):
    """Hardware that consumes at once and counts in a tail with a wrap bit."""

    def __init__(self, kernel):
        super().__init__("ring", kernel.platform.iommu, kernel.frames, command_bytes=16, pump=None)
        self.ram = kernel.frames.ram
        self.tail = 0
        self.seen = []

    def _wait(self, sequence):
        return (0xEE, sequence)

    def _ring(self, tail):
        while self.tail != tail:
            at = self.pa + self.tail % self.entries * 16
            self.seen.append((self.ram.load64(at), self.ram.load64(at + 8)))
            self.tail = (self.tail + 1) % (2 * self.entries)
        self.ram.write(self.status_pa, self.seen[-1][1].to_bytes(4, "little"))


def test_the_ring_wraps_and_takes_more_commands_than_it_has_room_for():
    kernel = boot()
    ring = _Ring(kernel)
    assert not len(ring.pfns)
    ring.allocate()
    assert len(ring.pfns) == 2
    ring.submit([(n,) for n in range(600)])
    ring.submit([])
    sent = [word for word, other in ring.seen if word != 0xEE or not other]
    assert sent == list(range(600))
    assert [other for word, other in ring.seen if word == 0xEE and other] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="24 bytes"):
        ring.submit([(1, 2, 3)])
