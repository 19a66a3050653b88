# SPDX-License-Identifier: Apache-2.0
"""Tables out of memory that can only be read, and live memory in its two forms."""

import struct
from pathlib import Path

import numpy as np
import pytest

from iokeep.errors import CapabilityError, InputError, MemoryAbsent
from iokeep.mem.capture import Capture
from iokeep.mem.live import LiveMemory
from iokeep.pt.gather import gather
from iokeep.pt.leaves import extents
from iokeep.pt.registry import open_format
from iokeep.pt.tables import table_pages

CAPTURES = sorted((Path(__file__).parent.parent / "data" / "captures").iterdir())


@pytest.mark.parametrize("path", [p for p in CAPTURES if p.is_dir()], ids=lambda p: p.name)
def test_all_tables_are_found_and_nothing_else(path):
    capture = Capture.load(path)
    fmt = open_format(capture.format, capture.config)
    memory = gather(fmt, capture.memory.read, capture.root_pa)
    found, _ = extents(fmt, memory, capture.root_pa)
    wanted, _ = extents(fmt, capture.memory, capture.root_pa)
    assert np.array_equal(found.iova, wanted.iova)
    assert np.array_equal(found.pa, wanted.pa)
    assert np.array_equal(found.prot, wanted.prot)
    pages = table_pages(fmt, capture.memory, capture.root_pa)
    assert set(memory.rows(4096).pas.tolist()) >= set((pages & ~np.uint64(4095)).tolist())


def test_a_table_that_cannot_be_read_stays_absent():
    capture = Capture.load(next(p for p in CAPTURES if p.name == "vtd-legacy-small"))
    fmt = open_format(capture.format, capture.config)
    gone = int(table_pages(fmt, capture.memory, capture.root_pa)[-1])

    def read(pa, length):
        if pa == gone:
            raise MemoryAbsent(pa, length)
        return capture.memory.read(pa, length)

    with pytest.raises(MemoryAbsent, match=f"{gone:#x}"):
        extents(fmt, gather(fmt, read, capture.root_pa), capture.root_pa)


def core(segments, data=b""):
    """An ELF core as /proc/kcore is one: (virtual, pa, bytes, offset)."""
    head = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 4, 62, 1, 0, 64, 0, 0, 64, 56, len(segments), 0, 0, 0
    )
    rows = b"".join(
        struct.pack("<IIQQQQQQ", 1, 7, offset, va, pa, size, size, 4096) for va, pa, size, offset in segments
    )
    return (head + rows).ljust(4096, b"\0") + data


def test_kcore_is_read_by_physical_address(tmp_path):
    path = tmp_path / "kcore"
    none = 2**64 - 1
    data = bytes([1]) * 4096 + bytes([2]) * 4096
    path.write_bytes(
        core(
            [(0, 0x2000, 4096, 8192), (0, none, 4096, 4096), (0, 0x1000, 4096, 4096), (0, 0x1800, 16, 8192)],
            data,
        )
    )
    with LiveMemory(path) as memory:
        assert memory.read(0x1FFF, 1) == b"\1"
        assert memory.read(0x2000, 4096) == bytes([2]) * 4096
        for pa in (0, 0x3000, none, 0x2FFF):
            with pytest.raises(MemoryAbsent):
                memory.read(pa, 2)
    memory.close()


def test_another_file_is_offset_by_physical_address(tmp_path):
    path = tmp_path / "mem"
    path.write_bytes(bytes(4096) + b"x")
    with LiveMemory(path) as memory:
        assert memory.read(4096, 1) == b"x"
        with pytest.raises(MemoryAbsent, match="ends there"):
            memory.read(4096, 2)
        with pytest.raises(MemoryAbsent):
            memory.read(2**64, 2)


def test_what_is_no_core_is_refused(tmp_path):
    path = tmp_path / "kcore"
    path.write_bytes(core([(0, 2**64 - 1, 4096, 4096)]))
    with pytest.raises(InputError, match="physical address"):
        LiveMemory(path)
    path.write_bytes(core([]).replace(b"\x02\x01\x01", b"\x01\x01\x01", 1))
    with pytest.raises(InputError, match="no little-endian"):
        LiveMemory(path)
    with pytest.raises(CapabilityError, match="physical memory cannot be read"):
        LiveMemory(tmp_path / "absent")
