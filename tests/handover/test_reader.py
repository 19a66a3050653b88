# SPDX-License-Identifier: Apache-2.0
"""The reader against what programs in the guest knew, and against every rule that a handover can break."""

import ctypes
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import iokeep
from iokeep.errors import InputError, MemoryAbsent
from iokeep.handover import abi
from iokeep.handover.check import LINUX_7_3, SOFT_7_3, Profile, check, notes
from iokeep.handover.iommu import (
    DeviceRecord,
    DomainRecord,
    HwptRecord,
    IoasRecord,
    IommufdRecord,
    IommuHwRecord,
    IommuRecord,
    VfioRecord,
)
from iokeep.handover.metadata import ReservedMem, Scratch, read_scratch
from iokeep.handover.radix import PreservedTree
from iokeep.handover.reader import read_handover
from iokeep.handover.writer import FileOut, FlbOut, MemfdOut, SessionOut, write_handover, write_memfd
from iokeep.uapi import kho


def decoded(handover):
    return [
        {
            "name": s.name,
            "files": [
                {
                    "token": f"{f.token:#x}",
                    "kind": f.kind,
                    "size": f.memfd.size,
                    "pos": f.memfd.pos,
                    "seals": f.memfd.seals,
                    "extents": [list(r) for r in zip(*(a.tolist() for a in f.extents()), strict=True)],
                }
                for f in s.files
            ],
        }
        for s in handover.sessions
    ]


def test_decodes_what_the_guest_knew(capture):
    got = read_handover(capture.memory, capture.fdt_pa)
    keys = ("token", "kind", "size", "pos", "seals", "extents")
    assert decoded(got) == [
        {"name": s["name"], "files": [{k: f[k] for k in keys} for f in s["files"]]}
        for s in capture.truth["sessions"]
    ]
    assert got.compatible == "kho-v4"
    assert got.luo.compatible == "luo-v5"
    assert got.liveupdate_num == 1
    assert got.metadata.previous_release == capture.truth["uname"][2]
    assert got.preserved.pages == capture.meta["preserved_pages"]
    array = capture.meta["scratch_array"]
    scratch = read_scratch(capture.memory, int(array["pa"], 16), array["size"])
    assert [[s.pa, s.size] for s in scratch] == capture.truth["scratch"]
    problems = check(got, LINUX_7_3, scratch)
    if capture.name == "s6-51dup-F":
        assert len(problems) == 1
        assert "count 0" in problems[0]
        assert "panics" in problems[0]
    else:
        assert problems == []


def test_the_memblock_subtree_and_the_seal_bug(open_capture):
    capture = open_capture("s2-sessions-F")
    got = read_handover(capture.memory, capture.fdt_pa)
    assert got.reserved_mem == (ReservedMem("labmem", 0x17BB00000, 1 << 20),)
    assert list(got.subnodes) == ["memblock", "LUO", "kexec-metadata"]
    assert [f.name for f in got.flbs] == [f"liveupdate-test-flb-v{i}" for i in range(3)]
    assert {f.count for f in got.flbs} == {14}
    (note,) = notes(got)
    assert "token 0x4" in note
    assert "0x3e" in note
    # folios reach past the size of a huge-page file: 3 MiB in two folios of 2 MiB
    thp3 = got.session("alpha").files[1].memfd
    assert thp3.order.tolist() == [9, 9]
    assert [a.tolist() for a in thp3.extents()] == [[0], [1076224], [768]]


LAYOUTS = [
    "kho_block_header_ser",
    "kho_vmalloc",
    "kho_vmalloc_chunk",
    "kho_kexec_metadata",
    "luo_ser",
    "luo_session_ser",
    "luo_file_ser",
    "luo_flb_header_ser",
    "luo_flb_ser",
    "memfd_luo_ser",
    "memfd_luo_folio_ser",
]


def test_layouts_are_the_manifests():
    manifest = json.loads((Path(iokeep.__file__).parent / "uapi/abi/linux-7.3.4.json").read_text())
    structs = manifest["headers"]["kho"]["structs"]
    for name in LAYOUTS:
        dtype = getattr(abi, name)
        assert dtype.itemsize == structs[name]["size"] == ctypes.sizeof(getattr(kho, name))
        for member in structs[name]["members"]:
            if "bits" not in member:
                field, offset = dtype.fields[member["name"]][:2]
                assert (field.itemsize, offset) == (member["size"], member["offset"])
    assert (abi.SESSIONS_PER_BLOCK, abi.FILES_PER_BLOCK, abi.FLBS_PER_PAGE) == (51, 63, 63)


# -- one broken rule each -------------------------------------------------------------------------------


@pytest.fixture
def world(box):
    """A session with a memfd of 600 pages and an empty one, 60 without: (memory, fdt_pa, places by name)."""
    pfn = np.arange(600, dtype=np.uint64) + np.uint64(1 << 24)
    big = write_memfd(box, box.alloc, MemfdOut(0, 600 << 12, 0, pfn, np.arange(600, dtype=np.uint64)))
    empty = write_memfd(box, box.alloc, MemfdOut(0, 0, 0, pfn[:0], pfn[:0]))
    files = [FileOut("memfd-v2", big, 1), FileOut("memfd-v2", empty, 2)]
    fdt_pa = write_handover(
        box,
        box.alloc,
        sessions=[SessionOut("one", files), *(SessionOut(f"s{i}") for i in range(60))],
        flbs=[FlbOut("flb", 1, 1)],
        preserved=PreservedTree.of(pfn).union(box.tree()),
        liveupdate_num=1,
        previous_release="x",
        kexec_count=1,
    )
    good = read_handover(box, fdt_pa)
    assert check(good) == []
    at = {re.sub(r"session 'one' ", "", what): pa for pa, what in good.pages.items()}
    return box, fdt_pa, at


def problems_of(world, *, supported=None):
    got = read_handover(world[0], world[1])
    return check(got, supported) if supported else check(got)


def rewrite_fdt(world, old, new):
    box, fdt_pa, _ = world
    page = box.read(fdt_pa, 4096)
    assert page.count(old) == 1
    box.write(fdt_pa, page.replace(old, new))


def test_another_kho_version_is_not_decoded(world):
    rewrite_fdt(world, b"kho-v4\0", b"kho-v5\0")
    got = read_handover(world[0], world[1])
    assert got.compatible == "kho-v5"
    assert got.sessions == ()
    assert len(got.preserved) == 0
    (problem,) = check(got)
    assert "boots with nothing reserved" in problem
    assert "kho-v5" in problem


def test_another_luo_version_is_not_decoded(world):
    box, _, at = world
    box.write(at["luo_ser"], b"luo-v6\0\0")
    got = read_handover(box, world[1])
    assert not got.luo.supported
    assert got.sessions == ()
    (problem,) = check(got)
    assert "luo-v6" in problem
    assert "panic" in problem


def test_a_profile_of_another_version_is_a_problem(world):
    lines = problems_of(
        world, supported=Profile("next", kho="kho-v5", luo="luo-v6", files=frozenset({"memfd-v3"}))
    )
    assert len(lines) == 4
    assert all("next" in line for line in lines)


def test_a_truncated_luo_blob(world):
    rewrite_fdt(world, (32).to_bytes(8, "little"), (31).to_bytes(8, "little"))
    (problem,) = problems_of(world)
    assert "31 bytes" in problem
    assert "panic" in problem


ONE = int.from_bytes(b"one", "little")


@pytest.mark.parametrize(
    ("where", "offset", "value", "why"),
    [
        ("sessions block 1", 8, 0, r"sessions: block 1 at 0x\w+ has count 0, .* panics"),
        ("sessions block 0", 8, 52, r"count 52, at most 51 fit: .* panics"),
        ("sessions block 1", 8, 10**9, r"count 1000000000, at most 51"),
        ("sessions block 1", 0, "sessions block 0", r"already the sessions block 0"),
        ("sessions block 1", 0, "sessions block 1", r"already the sessions block 1"),
        ("sessions block 0", 0, 0x1001, r"0x1001 is not the pa of a page"),
        ("sessions block 0", 16 + 80, ONE, r"session 'one' is there twice: .* EIO"),
        ("sessions block 0", 16 + 80, 0, r"session '': name\[64\]"),
        ("sessions block 0", 16 + 72, 3, r"file_set_ser.count is 3, its blocks at 0x\w+ hold 2"),
        ("sessions block 0", 16 + 64, 0, r"file_set_ser.count is 2, its blocks at 0x0 hold 0"),
        ("sessions block 0", 16 + 80 + 64, "files block 0", r"already the .*'one' files block 0"),
        ("files block 0", 8, 64, r"count 64, at most 63 fit: .* EIO"),
        ("files block 0", 0, "luo_ser", r"already the luo_ser"),
        ("files block 0", 16, int.from_bytes(b"memfd-v9", "little"), r"no handler for 'memfd-v9' in .* EIO"),
        ("files block 0", 16 + 64 + 56, 1, r"token 0x1 is there twice"),
        ("files block 0", 16 + 64 + 48, "token 0x1 memfd record", r"already the .* token 0x1 memfd record"),
        ("token 0x1 memfd record", 16, 0x40, r"seals 0x40, memfd-v2 knows 0x3f"),
        ("token 0x1 memfd record", 16, 1 << 32, r"flags 0x1, unused flags must be 0"),
        ("token 0x1 memfd record", 0, 1 << 63, r"beyond any file"),
        ("token 0x1 memfd record", 8, 1 << 63, r"beyond any file"),
        ("token 0x1 memfd record", 8, 601 << 12, r"1 of 601 pages have no frame, first at index 600"),
        ("token 0x1 memfd record", 24, 10**9, r"16000000000 bytes do not fit into vmalloc of 3 pages"),
        ("token 0x1 memfd record", 24, 100, r"vmalloc of 3 pages is more than 1600 bytes need"),
        ("token 0x1 memfd record", 32, 0, r"chunks list 0 pages, total_pages is 3"),
        ("token 0x1 memfd record", 32, "luo_ser", r"already the luo_ser"),
        ("token 0x1 memfd record", 40, 2 | 1 << 32, r"lists more than 2 pages"),
        ("token 0x1 memfd record", 40, 3 | 9 << 32, r"vmalloc flags 0x9 are unknown"),
        ("token 0x1 memfd record", 40, 3 | 1 << 32 | 11 << 48, r"vmalloc order 11"),
        ("token 0x2 memfd record", 32, 0x1000, r"a folio array but nr_folios 0"),
        ("token 0x1 vmalloc chunk 0", 0, "token 0x1 vmalloc chunk 0", r"already the .* token 0x1 vmalloc"),
        ("token 0x1 vmalloc chunk 0", 16, "token 0x1 vmalloc page 0", r"already the .* token 0x1 vmalloc"),
        ("token 0x1 vmalloc chunk 0", 16, 0, r"chunks list 1 pages, total_pages is 3"),
        ("token 0x1 vmalloc page 0", 0, 77 | 3 << 52, r"not start a block of the preserved tree \(1 of 600"),
        ("token 0x1 vmalloc page 0", 0, 0, r"1 of 600 pages have no frame, first at index 0"),
        ("token 0x1 vmalloc page 0", 0, (1 << 24) | 7 << 52, r"unknown flags 0x4"),
        ("token 0x1 vmalloc page 0", 0, (1 << 24) + 1 | 3 << 52, r"belongs to .* token 0x1 and to"),
        ("token 0x1 vmalloc page 0", 8, 1, r"page 1 of the file has two folios"),
        ("token 0x1 vmalloc page 0", 8, 2**64 - 1, r"1 of 600 pages have no frame, first at index 0"),
        ("FLB page", 0, 2, r"pgcnt 2"),
        ("FLB page", 8, 64, r"count 64, at most 63"),
        ("FLB page", 16, 0, r"name '' is not"),
        ("kexec-metadata", 0, 2, r"version 2, supported: 1"),
    ],
)  # fmt: skip
def test_each_broken_rule_is_one_clear_line(world, where, offset, value, why):
    box, _, at = world
    box.put64(at[where] + offset, at[value] if isinstance(value, str) else value)
    lines = problems_of(world)
    assert any(re.search(why, line) for line in lines), lines
    assert all("\n" not in line for line in lines)


@pytest.mark.parametrize(
    "what",
    ["KHO FDT", "luo_ser", "sessions block 1", "files block 0", "token 0x1 vmalloc chunk 0", "FLB page"],
)
def test_a_record_page_that_is_not_preserved(world, what):
    box, fdt_pa, at = world
    got = read_handover(box, fdt_pa)
    rest = got.preserved.pfn != np.uint64(at[what] >> 12)
    root = PreservedTree.of(got.preserved.pfn[rest], got.preserved.order[rest]).write(box, box.alloc)
    rewrite_fdt(world, got.root_pa.to_bytes(8, "little"), root.to_bytes(8, "little"))
    (problem,) = problems_of(world)
    assert f"{at[what]:#x} is not in the preserved tree" in problem


def test_overlapping_blocks_and_orders_that_linux_cannot_have(world):
    box, fdt_pa, _ = world
    got = read_handover(box, fdt_pa)
    more = PreservedTree.of(np.array([1 << 24, 1 << 30], np.uint64), np.array([2, 19], np.uint8))
    root = got.preserved.union(more).write(box, box.alloc)
    rewrite_fdt(world, got.root_pa.to_bytes(8, "little"), root.to_bytes(8, "little"))
    lines = problems_of(world)
    assert any("overlaps another" in line for line in lines)
    assert any("of order 19" in line for line in lines)


def test_a_preserved_frame_in_scratch(world):
    got = read_handover(world[0], world[1])
    area = Scratch((1 << 36) + 0x5000, 0x1000)
    (problem,) = check(got, scratch=(Scratch(1 << 36, 0), area))
    assert "0x1000005000 lies in the scratch area" in problem


@pytest.mark.parametrize(
    "what", ["KHO FDT", "luo_ser", "sessions block 1", "token 0x1 vmalloc page 2", "FLB page"]
)
def test_absent_metadata_is_an_error_with_its_pa(world, what):
    box, fdt_pa, at = world
    del box.pages[at[what]]
    with pytest.raises(MemoryAbsent) as error:
        read_handover(box, fdt_pa)
    assert error.value.pa == at[what]
    assert f"{at[what]:#x}" in str(error.value)
    assert error.value.exit_code == 3


def test_no_fdt_is_an_error(world):
    box, fdt_pa, at = world
    with pytest.raises(InputError, match="magic"):
        read_handover(box, at["luo_ser"])
    for pa in (0, fdt_pa + 8, 1 << 60):
        with pytest.raises(InputError, match="not the pa of a page"):
            read_handover(box, pa)


# -- iokeep's own records -------------------------------------------------------------------------------


def array(*values, dtype=np.uint64):
    return np.array(values, dtype)


RAM = 1 << 24
TABLE, CONTEXT = 0x7000000, 0x7001000


def areas(token=1, offset=0, length=0x2000):
    one = np.uint8
    return IoasRecord(
        3,
        array(0x10000),
        array(0x10000 + length - 1),
        array(token),
        array(offset),
        array(3, dtype=one),
        array(0, dtype=one),
    )


def build_ours(
    box, *, ioas=None, domain=0, device=0, iommufd_token=7, features=(), format="vtdss", also=True
):
    pfn = np.arange(2, dtype=np.uint64) + np.uint64(RAM)
    ram = write_memfd(box, box.alloc, MemfdOut(0, 0x2000, 7, pfn, np.arange(2, dtype=np.uint64)))
    iommufd = IommufdRecord((HwptRecord(5, domain, 3),), (ioas or areas(),)).write(box, box.alloc)
    vfio = VfioRecord(0, 0x20, device, iommufd_token).write(box, box.alloc)
    record = IommuRecord(
        (
            DomainRecord(
                0, format, {"levels": 4}, features, TABLE, 2, 3, array(TABLE), bytes(32), bytes(16), 0x2000, 1
            ),
        ),
        (DeviceRecord(0, 8, 0, 0x20, 0, "legacy"),),
        (IommuHwRecord(0xFED90000, CONTEXT, "legacy", 0x10, array(CONTEXT)),),
    )
    flb = record.write(box, box.alloc)
    files = [
        FileOut("memfd-v2", ram, 1),
        FileOut(IommufdRecord.COMPATIBLE, iommufd, 7),
        FileOut(VfioRecord.COMPATIBLE, vfio, 8),
    ]
    tables = PreservedTree.of(array(TABLE >> 12, CONTEXT >> 12) if also else array())
    fdt_pa = write_handover(
        box,
        box.alloc,
        sessions=[SessionOut("vm", files)],
        flbs=[FlbOut(IommuRecord.COMPATIBLE, flb, 2)],
        preserved=box.tree().union(PreservedTree.of(pfn)).union(tables),
        liveupdate_num=1,
        previous_release="soft",
        kexec_count=1,
    )
    return box, fdt_pa, (iommufd, vfio, flb)


@pytest.fixture
def ours(box):
    return build_ours(box)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"domain": 1}, "HWPT 0x5 lacks domain 1 in the FLB"),
        ({"device": 2}, "device 2 is not in the FLB"),
        ({"iommufd_token": 1}, "token 0x1 is no iommufd of this session"),
        ({"iommufd_token": 9}, "token 0x9 is no iommufd of this session"),
        ({"ioas": areas(token=4)}, "area at iova 0x10000 maps token 0x4, no memfd"),
        ({"ioas": areas(token=7)}, "area at iova 0x10000 maps token 0x7, no memfd"),
        ({"ioas": areas(length=0x2001)}, "up to byte 0x2000, the file has 0x2000"),
        ({"ioas": areas(offset=0x1000)}, "up to byte 0x2fff, the file has 0x2000"),
        ({"features": ("force_snooping",)}, "does not know feature 'force_snooping'"),
        ({"format": "amdv1"}, "was not tested with format 'amdv1'"),
    ],
)
def test_records_that_do_not_fit_together(box, change, why):
    got = read_handover(*build_ours(box, **change)[:2])
    profile = replace(SOFT_7_3, formats={"vtdss": frozenset()})
    (problem,) = check(got, profile)
    assert why in problem


def test_tables_that_are_not_preserved(box):
    lines = check(read_handover(*build_ours(box, also=False)[:2]))
    assert [
        f"{pa:#x} is not preserved (1 of 1)" in line for pa, line in zip((TABLE, CONTEXT), lines, strict=True)
    ]


def test_our_records_are_decoded(ours):
    box, fdt_pa, _ = ours
    got = read_handover(box, fdt_pa)
    assert check(got) == []
    ram, iommufd, vfio = got.sessions[0].files
    assert (ram.kind, iommufd.kind, vfio.kind) == ("memfd", "iommufd", "vfio-pci")
    assert iommufd.record == IommufdRecord((HwptRecord(5, 0, 3),), (areas(),))
    assert vfio.record == VfioRecord(0, 0x20, 0, 7)
    assert got.iommu.domains[0].root_pa == TABLE
    assert got.iommu.devices[0].bdf == 0x20
    assert got.iommu.iommus[0].root_table == CONTEXT


def test_mainline_takes_none_of_our_files(ours):
    lines = check(read_handover(ours[0], ours[1]), LINUX_7_3)
    assert sum("no handler for" in line for line in lines) == 2
    assert sum("FLB" in line for line in lines) == 1


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_damaged_record_is_a_problem_not_a_guess(ours, which):
    box, fdt_pa, pas = ours
    box.write(pas[which] + 96, b"\xff")
    got = read_handover(box, fdt_pa)
    assert any("digest" in line and f"{pas[which]:#x}" in line for line in got.problems)
    decoded = [*(f.record for f in got.sessions[0].files[1:]), got.iommu]
    assert [d is None for d in decoded] == [i == which for i in range(3)]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_record_of_another_version_is_a_problem(ours, which):
    box, fdt_pa, pas = ours
    name = box.read(pas[which], 48).replace(b"-v1", b"-v2")
    box.write(pas[which], name)
    got = read_handover(box, fdt_pa)
    assert any("-v2" in line and "supported: " in line for line in got.problems)


def test_an_absurd_record_length(ours):
    box, fdt_pa, pas = ours
    box.put64(pas[0] + 48, 1 << 40)
    assert any("length" in line for line in read_handover(box, fdt_pa).problems)
