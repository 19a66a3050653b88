# SPDX-License-Identifier: Apache-2.0
"""Writes what Linux 7.3 leaves in memory for its successor: FDT, radix tree, LUO, memfd; the same bytes.

Memory comes from the caller's ``alloc(npages: int, preserved: bool) -> pa``
(:data:`iokeep.handover.abi.Alloc`): ``npages`` contiguous frames, zeroed. ``preserved`` is what Linux does
with that page, read off the captures of a real 7.3.4 (``tests/data/kho``) and tested against them:

* preserved (True), each an order-0 block: the FDT page, the kexec-metadata page, the LUO page, the FLB
  page, every session and file block, every ``memfd_luo_ser`` page, every vmalloc chunk and every page of
  the folio array; iokeep's own records likewise, as one run of frames;
* not preserved (False): the pages of the radix tree. The scratch array is not preserved either.

:func:`write_handover` itself adds the frames that it allocates with ``preserved=True`` to the tree that it
writes. The caller's ``preserved`` tree holds everything else: memfd folios with their orders, what
:func:`write_memfd` and :func:`iokeep.handover.records.write_record` allocated before, table pages, IOMMU
structures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from iokeep.handover import abi, fdt
from iokeep.handover.abi import PAGE_SIZE, Alloc
from iokeep.handover.radix import PreservedTree
from iokeep.mem.memory import U64, WritableMemory
from iokeep.uapi import kho


@dataclass(frozen=True, slots=True)
class FileOut:
    """A file of a session: the handler's ``compatible`` (at most 47 bytes), its u64 ``data`` and the
    user's token.
    """

    compatible: str
    data: int
    token: int


@dataclass(frozen=True, slots=True)
class SessionOut:
    """A session: name of 1 ... 63 bytes, files in the order of their preservation."""

    name: str
    files: Sequence[FileOut] = ()


@dataclass(frozen=True, slots=True)
class FlbOut:
    """File-lifecycle-bound data: ``name`` (at most 47 bytes), u64 ``data``, ``count`` = files that use it."""

    name: str
    data: int
    count: int


@dataclass(frozen=True, slots=True)
class MemfdOut:
    """A memfd: ``pos`` and ``size`` in bytes, ``seals`` F_SEAL_*, ``flags`` of the record (0 in 7.3).

    One entry per folio: ``pfn`` uint64[n] of its first frame, ``index`` uint64[n] its first page in the
    file. A folio is as big as its block in the preserved tree. ``folio_flags``: one value, or one for each.
    """

    pos: int
    size: int
    seals: int
    pfn: U64
    index: U64
    flags: int = 0
    folio_flags: int | U64 = abi.MEMFD_LUO_FOLIO_DIRTY | abi.MEMFD_LUO_FOLIO_UPTODATE


@dataclass(frozen=True, slots=True)
class SubtreeOut:
    """A client of KHO: node ``name``, pa of its blob and the blob's size in bytes (the blob's frames
    preserved).
    """

    name: str
    data_pa: int
    size: int


@dataclass(slots=True)
class _Recording:
    """Passes allocations on and keeps the preserved ones."""

    inner: Alloc
    pfns: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def __call__(self, npages: int, preserved: bool) -> int:
        pa = self.inner(npages, preserved)
        if preserved:
            self.pfns.append(pa >> abi.PAGE_SHIFT)
            self.counts.append(npages)
        return pa

    def tree(self) -> PreservedTree:
        return PreservedTree.of_ranges(np.array(self.pfns, np.uint64), np.array(self.counts, np.uint64))


def _text(value: str, room: int, what: str) -> bytes:
    data = value.encode()
    if not 0 < len(data) < room or b"\0" in data:
        raise ValueError(f"{what} {value!r} must be 1 ... {room - 1} bytes without NUL")
    return data


def write_blocks(mem: WritableMemory, alloc: Alloc, entries: NDArray[np.void]) -> int:
    """Chain of page-sized blocks (``include/linux/kho/abi/block.h``) that hold ``entries``;
    pa of the first, 0 if none.
    """
    per_block = (PAGE_SIZE - abi.kho_block_header_ser.itemsize) // entries.dtype.itemsize
    starts = range(0, len(entries), per_block)
    pas = [alloc(1, True) for _ in starts]
    for number, start in enumerate(starts):
        part = entries[start : start + per_block]
        header = np.zeros(1, abi.kho_block_header_ser)
        header["next"] = pas[number + 1] if number + 1 < len(pas) else 0
        header["count"] = len(part)
        mem.write(pas[number], header.tobytes() + part.tobytes())
    return pas[0] if pas else 0


def write_vmalloc(mem: WritableMemory, alloc: Alloc, data: bytes) -> NDArray[np.void]:
    """A preserved vmalloc area of ``data`` (not empty): the ``kho_vmalloc`` that describes it.

    As ``kho_preserve_vmalloc()`` does, a chunk that becomes full gets a successor at once, even an empty one.
    """
    npages = -(-len(data) // PAGE_SIZE)
    pages = np.array([alloc(1, True) for _ in range(npages)], np.uint64)
    for number, pa in enumerate(pages):
        mem.write(int(pa), data[number * PAGE_SIZE : (number + 1) * PAGE_SIZE])
    chunks = [alloc(1, True) for _ in range(npages // abi.CHUNK_PAGES + 1)]
    for number, pa in enumerate(chunks):
        chunk = np.zeros(1, abi.kho_vmalloc_chunk)
        part = pages[number * abi.CHUNK_PAGES : (number + 1) * abi.CHUNK_PAGES]
        chunk["hdr"]["next"] = chunks[number + 1] if number + 1 < len(chunks) else 0
        chunk["phys"][0, : len(part)] = part
        mem.write(pa, chunk.tobytes())
    out = np.zeros(1, abi.kho_vmalloc)
    out["first"], out["total_pages"], out["flags"] = chunks[0], npages, abi.KHO_VMALLOC_ALLOC
    return out


def write_memfd(mem: WritableMemory, alloc: Alloc, memfd: MemfdOut) -> int:
    """``memfd-v2``: the folio array and the ``memfd_luo_ser``, whose pa is returned (= ``FileOut.data``).

    :raises ValueError: arrays differ in length, or a pfn, a flag or a size does not fit.
    """
    pfn, index = np.asarray(memfd.pfn, np.uint64), np.asarray(memfd.index, np.uint64)
    if len(pfn) != len(index):
        raise ValueError(f"{len(pfn)} folios but {len(index)} indices")
    flags = np.broadcast_to(np.asarray(memfd.folio_flags, np.uint64), pfn.shape)
    if np.any(pfn >> np.uint64(52)) or np.any(flags >> np.uint64(12)):
        raise ValueError("a folio's pfn is beyond 52 bits or its flags beyond 12")
    pa = alloc(1, True)
    record = np.zeros(1, abi.memfd_luo_ser)
    record["pos"], record["size"], record["seals"] = memfd.pos, memfd.size, memfd.seals
    record["flags"], record["nr_folios"] = memfd.flags, len(pfn)
    if len(pfn):
        folios = np.zeros(len(pfn), abi.memfd_luo_folio_ser)
        folios["pfn_flags"], folios["index"] = pfn | flags << np.uint64(52), index
        record["folios"] = write_vmalloc(mem, alloc, folios.tobytes())
    mem.write(pa, record.tobytes())
    return pa


def rewrite_pos(mem: WritableMemory, memfd_pa: int, pos: int) -> None:
    """The file position saved once more at freeze (``memfd_luo_freeze()``)."""
    mem.write(memfd_pa, pos.to_bytes(8, "little"))


def rewrite_seals(mem: WritableMemory, memfd_pa: int, seals: int) -> None:
    """The seals likewise: some may have been added since."""
    kind, at = abi.memfd_luo_ser.fields["seals"][:2]  # type: ignore[index]
    mem.write(memfd_pa + at, np.array(seals, kind).tobytes())


def write_luo(
    mem: WritableMemory,
    alloc: Alloc,
    *,
    sessions: Sequence[SessionOut],
    flbs: Sequence[FlbOut] = (),
    liveupdate_num: int,
    compatible: str = kho.LUO_ABI_COMPATIBLE,
) -> int:
    """``luo_ser`` with its FLBs, sessions and files; returns its pa.

    :raises ValueError: a name or number does not fit.
    """
    luo_pa = alloc(1, True)
    flb_pa = alloc(1, True)
    if len(flbs) > abi.FLBS_PER_PAGE:
        raise ValueError(f"{len(flbs)} FLBs, at most {abi.FLBS_PER_PAGE} fit")
    flb_header = np.zeros(1, abi.luo_flb_header_ser)
    flb_header["pgcnt"], flb_header["count"] = 1, len(flbs)
    flb_rows = np.zeros(len(flbs), abi.luo_flb_ser)
    for row, flb in zip(flb_rows, flbs, strict=True):
        row["name"], row["data"], row["count"] = _text(flb.name, 48, "FLB"), flb.data, flb.count
    mem.write(flb_pa, flb_header.tobytes() + flb_rows.tobytes())
    rows = np.zeros(len(sessions), abi.luo_session_ser)
    for row, session in zip(rows, sessions, strict=True):
        files = np.zeros(len(session.files), abi.luo_file_ser)
        for item, file in zip(files, session.files, strict=True):
            item["compatible"] = _text(file.compatible, 48, "compatible")
            item["data"], item["token"] = file.data, file.token
        row["name"] = _text(session.name, 64, "session name")
        row["file_set_ser"] = (write_blocks(mem, alloc, files), len(files))
    head = np.zeros(1, abi.luo_ser)
    head["compatible"], head["liveupdate_num"] = compatible.encode(), liveupdate_num
    head["sessions_pa"], head["flbs_pa"] = write_blocks(mem, alloc, rows), flb_pa
    mem.write(luo_pa, head.tobytes())
    return luo_pa


def write_metadata(mem: WritableMemory, alloc: Alloc, previous_release: str, kexec_count: int) -> int:
    """``kexec-metadata``: release of the kernel that is replaced (at most 64 bytes) and the number of
    kexecs so far.
    """
    pa = alloc(1, True)
    record = np.zeros(1, abi.kho_kexec_metadata)
    record["version"], record["kexec_count"] = abi.KHO_METADATA_VERSION, kexec_count
    record["previous_release"] = _text(previous_release, 65, "release")
    mem.write(pa, record.tobytes())
    return pa


def kho_fdt(root_pa: int, subtrees: Sequence[SubtreeOut], compatible: str = kho.KHO_FDT_COMPATIBLE) -> bytes:
    """KHO's FDT: ``subtrees`` in the order in which they were added; the blob has the newest first."""

    def u64(value: int) -> bytes:
        return value.to_bytes(8, "little")

    root = fdt.Node(
        "",
        [("compatible", compatible.encode() + b"\0"), (kho.KHO_FDT_MEMORY_MAP_PROP_NAME, u64(root_pa))],
        [
            # fdt_setprop() puts a new property first, so blob-size, set last, leads
            fdt.Node(
                s.name,
                [
                    (kho.KHO_SUB_TREE_SIZE_PROP_NAME, u64(s.size)),
                    (kho.KHO_SUB_TREE_PROP_NAME, u64(s.data_pa)),
                ],
            )
            for s in reversed(subtrees)
        ],
    )
    names = (kho.KHO_FDT_MEMORY_MAP_PROP_NAME, "compatible", kho.KHO_SUB_TREE_PROP_NAME)
    return fdt.build(root, (*names, kho.KHO_SUB_TREE_SIZE_PROP_NAME) if subtrees else names[:2])


def write_handover(
    mem: WritableMemory,
    alloc: Alloc,
    *,
    sessions: Sequence[SessionOut],
    flbs: Sequence[FlbOut] = (),
    preserved: PreservedTree | Callable[[], int],
    liveupdate_num: int,
    previous_release: str,
    kexec_count: int,
    subtrees: Sequence[SubtreeOut] = (),
) -> int:
    """Everything that the next kernel finds from the FDT on; returns the pa of the FDT.

    :param preserved: frames that must survive and that this function does not allocate itself (module
        docstring). Or, where the tree is in memory already (:class:`~iokeep.handover.radix.LiveTree`), a
        function that brings it up to date with all that ``alloc`` gave and returns the pa of its root.
    :param subtrees: further KHO clients, e.g. memblock, newer than LUO and kexec-metadata.
    :raises ValueError: a name or a number does not fit, or the FDT does not fit into its page.
    """
    recording = _Recording(alloc)
    fdt_pa = recording(1, True)
    metadata_pa = write_metadata(mem, recording, previous_release, kexec_count)
    luo_pa = write_luo(mem, recording, sessions=sessions, flbs=flbs, liveupdate_num=liveupdate_num)
    clients = [
        SubtreeOut(kho.KHO_METADATA_NODE_NAME, metadata_pa, abi.kho_kexec_metadata.itemsize),
        SubtreeOut(kho.LUO_KHO_ENTRY_NAME, luo_pa, abi.luo_ser.itemsize),
        *subtrees,
    ]
    if isinstance(preserved, PreservedTree):
        root_pa = preserved.union(recording.tree()).write(mem, alloc)
    else:
        root_pa = preserved()
    blob = kho_fdt(root_pa, clients)
    if len(blob) > PAGE_SIZE:
        raise ValueError(f"KHO FDT of {len(blob)} bytes does not fit into its page")
    mem.write(fdt_pa, blob)
    return fdt_pa


__all__ = [
    "Alloc",
    "FileOut",
    "FlbOut",
    "MemfdOut",
    "SessionOut",
    "SubtreeOut",
    "kho_fdt",
    "rewrite_pos",
    "rewrite_seals",
    "write_blocks",
    "write_handover",
    "write_luo",
    "write_memfd",
    "write_metadata",
    "write_vmalloc",
]
