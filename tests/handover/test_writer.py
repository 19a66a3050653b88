# SPDX-License-Identifier: Apache-2.0
"""What the writer writes is what Linux 7.3.4 wrote: each capture is written again, to the same pas."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iokeep.handover import fdt
from iokeep.handover.abi import CHUNK_PAGES
from iokeep.handover.check import check
from iokeep.handover.radix import PreservedTree
from iokeep.handover.reader import read_handover
from iokeep.handover.writer import (
    FileOut,
    FlbOut,
    MemfdOut,
    SessionOut,
    SubtreeOut,
    rewrite_pos,
    write_handover,
    write_memfd,
)


class Script:
    """An allocator that gives the pas of the capture, in the order in which the writer asks for them."""

    def __init__(self, box, tree):
        self.box, self.tree, self.pas = box, tree, []

    def expect(self, pas):
        assert self.pas == [], "the writer asked for fewer pages than the kernel had"
        self.pas = list(pas)

    def __call__(self, npages, preserved):
        assert npages == 1
        pa = self.pas.pop(0)
        # the rule of the writer's docstring, checked against the kernel's own tree page by page
        assert bool(self.tree.contains(np.array([pa >> 12], np.uint64))[0]) is preserved
        assert pa not in self.box.pages
        self.box.pages[pa] = bytearray(4096)
        return pa


def radix_nodes(mem, root):
    """pas of the radix nodes, level by level, in order of their keys."""
    levels = [[root]]
    for _ in range(5):
        levels.append([int(v) for pa in levels[-1] for v in np.frombuffer(mem.read(pa, 4096), "<u8") if v])
    return [pa for level in levels for pa in level]


def test_every_capture_is_written_again_byte_for_byte(capture, new_box):
    mem = capture.memory
    want = read_handover(mem, capture.fdt_pa)
    box = new_box()
    script = Script(box, want.preserved)
    owner = {what: pa for pa, what in want.pages.items()}

    def numbered(prefix):
        found = [(int(w.rsplit(" ", 1)[1]), pa) for w, pa in owner.items() if w.rsplit(" ", 1)[0] == prefix]
        return [pa for _, pa in sorted(found)]

    sessions, blocks = [], []
    for session in want.sessions:
        files = []
        for file in session.files:
            what = f"session {session.name!r} token {file.token:#x}"
            script.expect(
                [file.data_pa, *numbered(f"{what} vmalloc page"), *numbered(f"{what} vmalloc chunk")]
            )
            memfd = file.memfd
            pa = write_memfd(
                box,
                script,
                MemfdOut(
                    memfd.pos,
                    memfd.size,
                    memfd.seals,
                    memfd.pfn,
                    memfd.index,
                    memfd.flags,
                    memfd.folio_flags,
                ),
            )
            files.append(FileOut(file.compatible, pa, file.token))
        blocks += numbered(f"session {session.name!r} files block")
        sessions.append(SessionOut(session.name, files))
    session_blocks = numbered("sessions block")
    # 7.3.4's bug chains a block that holds nothing; the writer has no use for it
    chained = session_blocks[-(-len(sessions) // 51) :]
    flb_pa = owner["FLB page"]
    subtrees = [SubtreeOut(n.name, n.data_pa, n.size) for n in want.subnodes.values() if n.name == "memblock"]
    script.expect(
        [
            want.fdt_pa,
            want.subnodes["kexec-metadata"].data_pa,
            want.luo.pa,
            flb_pa,
            *blocks,
            *[pa for pa in session_blocks if pa not in chained],
            *radix_nodes(mem, want.root_pa),
        ]
    )
    fdt_pa = write_handover(
        box,
        script,
        sessions=sessions,
        flbs=[FlbOut(f.name, f.data, f.count) for f in want.flbs],
        preserved=want.preserved,
        liveupdate_num=want.liveupdate_num,
        previous_release=want.metadata.previous_release,
        kexec_count=want.metadata.kexec_count,
        subtrees=subtrees,
    )
    assert fdt_pa == capture.fdt_pa
    assert script.pas == []
    untouched = {owner["memblock FDT"]} if subtrees else set()
    assert set(box.pages) == set(want.pages) - set(chained) - untouched
    for pa, page in box.pages.items():
        kernel = bytearray(mem.pages[pa])
        if pa == fdt_pa:  # libfdt leaves what was there behind totalsize
            size = fdt.total_size(kernel, "")
            kernel[size:], page = bytes(4096 - size), page
        if chained and pa == session_blocks[0]:
            kernel[:8] = bytes(8)
        assert page == kernel, f"{want.pages[pa]} at {pa:#x}"


def handover(box, sessions=(), preserved=None, **more):
    empty = PreservedTree.of(np.zeros(0, np.uint64))
    kwargs = {"liveupdate_num": 3, "previous_release": "7.3.4-test", "kexec_count": 2, **more}
    return write_handover(
        box, box.alloc, sessions=sessions, preserved=empty if preserved is None else preserved, **kwargs
    )


NAMES = st.text(
    st.characters(min_codepoint=33, max_codepoint=0x2FF, categories=("L", "N")), min_size=1, max_size=15
)


@st.composite
def memfds(draw):
    """(size, [(index, order)]) of a file in folios of mixed order, the last one perhaps past its size."""
    folios, index = [], 0
    for order in draw(st.lists(st.sampled_from([0, 0, 0, 3, 9]), max_size=6)):
        index = -(-index // (1 << order)) * (1 << order) if not folios else index
        if index % (1 << order):
            order = 0
        folios.append((index, order))
        index += 1 << order
    size = 0 if not folios else (folios[-1][0] << 12) + draw(st.integers(1, 4096 << folios[-1][1]))
    return size, folios


@given(st.dictionaries(NAMES, st.lists(memfds(), max_size=4), max_size=4), st.booleans())
def test_what_is_written_is_read(new_box, plan, scattered):
    box = new_box()
    frame = [1 << 22]

    def place(order):
        pfn = -(-frame[0] // (1 << order)) * (1 << order)
        frame[0] = pfn + (1 << order) + (1 if scattered else 0)
        return pfn

    sessions, want, folios = [], [], []
    for name, files in plan.items():
        outs, wants = [], []
        for token, (size, parts) in enumerate(files):
            pfn = [place(order) for _, order in parts]
            folios += list(zip(pfn, (order for _, order in parts), strict=True))
            index = np.array([i for i, _ in parts], np.uint64)
            pa = write_memfd(box, box.alloc, MemfdOut(7, size, 6, np.array(pfn, np.uint64), index))
            outs.append(FileOut("memfd-v2", pa, token << 60))
            pages = -(-size // 4096)
            flat = {
                i + k: p + k
                for p, (i, order) in zip(pfn, parts, strict=True)
                for k in range(1 << order)
                if i + k < pages
            }
            wants.append((token << 60, size, flat))
        sessions.append(SessionOut(name, outs))
        want.append((name, wants))
    tree = PreservedTree.of(
        np.array([p for p, _ in folios], np.uint64), np.array([o for _, o in folios], np.uint8)
    )
    got = read_handover(box, handover(box, sessions, tree.union(box.tree())))
    assert check(got) == []
    assert (got.liveupdate_num, got.metadata.previous_release, got.metadata.kexec_count) == (
        3,
        "7.3.4-test",
        2,
    )
    read = []
    for session in got.sessions:
        files = []
        for file in session.files:
            index, pfn = file.memfd.frames()
            files.append((file.token, file.memfd.size, dict(zip(index.tolist(), pfn.tolist(), strict=True))))
            runs = list(zip(*(a.tolist() for a in file.extents()), strict=True))
            assert all(i + n != j or p + n != q for (i, p, n), (j, q, _) in pairwise(runs))
        read.append((session.name, files))
    assert read == want
    # every preserved frame is a folio's or one that was asked for as preserved
    asked = {pfn + k for pfn, n in box.preserved for k in range(n)}
    content = {pfn + k for pfn, order in folios for k in range(1 << order)}
    assert set(got.preserved.frames().tolist()) == asked | content


@pytest.mark.parametrize("pages", [1, CHUNK_PAGES - 1, CHUNK_PAGES, CHUNK_PAGES + 1, 2 * CHUNK_PAGES])
def test_vmalloc_chunks_at_their_limits(box, pages):
    n = pages * 256
    pfn = np.arange(n, dtype=np.uint64) + np.uint64(1 << 24)
    pa = write_memfd(box, box.alloc, MemfdOut(0, n << 12, 0, pfn, np.arange(n, dtype=np.uint64)))
    first = box.u64(pa + 32)
    chunks = []
    while first:
        chunks.append(int(np.count_nonzero(np.frombuffer(box.read(first, 4096), "<u8")[1:])))
        first = box.u64(first)
    # a chunk that is full gets a successor at once: exactly 511 pages make a full and an empty one
    assert chunks == [CHUNK_PAGES] * (pages // CHUNK_PAGES) + [pages % CHUNK_PAGES]
    fdt_pa = handover(
        box, [SessionOut("s", [FileOut("memfd-v2", pa, 1)])], PreservedTree.of(pfn).union(box.tree())
    )
    file = read_handover(box, fdt_pa).sessions[0].files[0]
    assert [a.tolist() for a in file.extents()] == [[0], [1 << 24], [n]]


@pytest.mark.parametrize("n", [0, 1, 51, 52, 102, 103])
def test_session_blocks_at_their_limits(box, n):
    got = read_handover(box, handover(box, [SessionOut(f"s{i}") for i in range(n)]))
    assert [s.name for s in got.sessions] == [f"s{i}" for i in range(n)]
    assert check(got) == []
    assert sum("sessions block" in what for what in got.pages.values()) == -(-n // 51)


def test_file_blocks_at_their_limit(box):
    files = [FileOut("memfd-v2", write_memfd(box, box.alloc, none()), i) for i in range(64)]
    got = read_handover(box, handover(box, [SessionOut("s", files)], box.tree()))
    assert [f.token for f in got.sessions[0].files] == list(range(64))
    assert check(got) == []


def none():
    return MemfdOut(0, 0, 0, np.zeros(0, np.uint64), np.zeros(0, np.uint64))


def test_pos_is_saved_again_at_freeze(box):
    pa = write_memfd(box, box.alloc, none())
    rewrite_pos(box, pa, 77)
    got = read_handover(box, handover(box, [SessionOut("s", [FileOut("memfd-v2", pa, 1)])], box.tree()))
    assert got.sessions[0].files[0].memfd.pos == 77


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"sessions": [SessionOut("")]}, "session name"),
        ({"sessions": [SessionOut("x" * 64)]}, "session name"),
        ({"sessions": [SessionOut("a\0b")]}, "session name"),
        ({"sessions": [SessionOut("s", [FileOut("x" * 48, 0, 0)])]}, "compatible"),
        ({"flbs": [FlbOut("x" * 48, 0, 0)]}, "FLB"),
        ({"flbs": [FlbOut(str(i), 0, 0) for i in range(64)]}, "64 FLBs"),
        ({"previous_release": "x" * 65}, "release"),
        (
            {"subtrees": [SubtreeOut("n" * 30 + str(i), 0, 0) for i in range(80)]},
            "does not fit into its page",
        ),
    ],
)
def test_what_does_not_fit_is_refused(box, more, why):
    with pytest.raises(ValueError, match=why):
        handover(box, **more)


def test_memfd_that_does_not_fit_is_refused(box):
    one = np.ones(1, np.uint64)
    with pytest.raises(ValueError, match="1 folios but 0 indices"):
        write_memfd(box, box.alloc, MemfdOut(0, 1, 0, one, np.zeros(0, np.uint64)))
    with pytest.raises(ValueError, match="beyond 52 bits"):
        write_memfd(box, box.alloc, MemfdOut(0, 1, 0, one << np.uint64(52), one))
    with pytest.raises(ValueError, match="beyond 12"):
        write_memfd(box, box.alloc, MemfdOut(0, 1, 0, one, one, folio_flags=1 << 12))
