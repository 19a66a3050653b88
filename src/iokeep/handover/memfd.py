# SPDX-License-Identifier: Apache-2.0
"""``memfd-v2``: what a preserved memfd consists of (``include/linux/kho/abi/memfd.h``,
``mm/memfd_luo.c``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from iokeep.handover import abi
from iokeep.handover.abi import PAGE_SHIFT, PAGE_SIZE
from iokeep.handover.radix import PreservedTree
from iokeep.handover.trail import Trail
from iokeep.handover.vmalloc import read_vmalloc
from iokeep.mem.memory import I64, U8, U64
from iokeep.uapi import kho

_ONE = np.uint64(1)
#: MAX_LFS_FILESIZE, the biggest size and position of a file
MAX_LFS_FILESIZE = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Memfd:
    """A memfd as recorded. ``pos``, ``size`` in bytes; ``seals`` F_SEAL_*; ``flags`` unused in 7.3.

    One entry per folio, in record order: ``pfn`` uint64[n] first frame, ``index`` uint64[n] first page in
    the file, ``order`` uint8[n] from the preserved tree (0 where it is not there), ``folio_flags`` uint64[n].
    """

    pos: int
    size: int
    seals: int
    flags: int
    pfn: U64
    index: U64
    order: U8
    folio_flags: U64

    @property
    def pages(self) -> int:
        """Pages of the file by its size, rounded up."""
        return -(-self.size // PAGE_SIZE)

    def extents(self) -> tuple[U64, U64, U64]:
        """(index, pfn, count): maximal runs in file order, cut at the file's size.

        A huge folio reaches past the size of its file; what lies there is not the file's content. Where
        folios claim the same page of the file (a problem), every claim is listed.
        """
        count = _ONE << self.order.astype(np.uint64)
        inside = (self.index < np.uint64(self.pages)) & (self.pfn != 0)
        by_index = np.argsort(self.index[inside], kind="stable")
        index, pfn = self.index[inside][by_index], self.pfn[inside][by_index]
        count = np.minimum(count[inside][by_index], np.uint64(self.pages) - index)
        if not len(index):
            return index, pfn, count
        joins = (index[1:] == index[:-1] + count[:-1]) & (pfn[1:] == pfn[:-1] + count[:-1])
        first = np.flatnonzero(np.concatenate(([True], ~joins)))
        return index[first], pfn[first], np.add.reduceat(count, first)

    def frames(self) -> tuple[U64, U64]:
        """(index, pfn) of every 4096-byte page within the size, uint64[n] each, in file order."""
        index, pfn, count = self.extents()
        sizes = count.astype(np.int64)
        within = np.arange(int(sizes.sum()), dtype=np.uint64) - np.repeat(
            (np.cumsum(sizes) - sizes).astype(np.uint64), sizes
        )
        return np.repeat(index, sizes) + within, np.repeat(pfn, sizes) + within


def read_memfd(trail: Trail, pa: int, tree: PreservedTree, what: str) -> Memfd | None:
    """The memfd whose ``memfd_luo_ser`` is at ``pa``; None, and a problem, where there cannot be one.

    :raises MemoryAbsent: a page of the record is not in this source.
    """
    if not trail.claim(pa, f"{what} memfd record"):
        return None
    record = np.frombuffer(trail.page(pa), abi.memfd_luo_ser, 1)[0]
    nr_folios, size = int(record["nr_folios"]), int(record["size"])
    entry = abi.memfd_luo_folio_ser.itemsize
    data = b""
    if nr_folios:
        data = read_vmalloc(trail, record["folios"], nr_folios * entry, what)
    elif record["folios"]["first"]:
        trail.problem(f"{what}: memfd record {pa:#x} has a folio array but nr_folios 0")
    have = len(data) // entry
    if have < nr_folios:
        trail.problem(f"{what}: memfd record {pa:#x} claims {nr_folios} folios, {have} are there")
    folios = np.frombuffer(data[: have * entry], abi.memfd_luo_folio_ser)
    words = folios["pfn_flags"].astype(np.uint64)
    pfn = words & np.uint64(kho.MEMFD_LUO_FOLIO_SER_PFN_MASK)
    orders = tree.orders(pfn)
    memfd = Memfd(
        int(record["pos"]),
        size,
        int(record["seals"]),
        int(record["flags"]),
        pfn,
        folios["index"].astype(np.uint64),
        np.maximum(orders, 0).astype(np.uint8),
        words >> np.uint64(kho.MEMFD_LUO_FOLIO_SER_FLAGS_SHIFT),
    )
    _check(trail, memfd, orders.astype(np.int64), pa, what)
    return memfd


def _check(trail: Trail, memfd: Memfd, orders: I64, pa: int, what: str) -> None:
    where = f"{what}: memfd record {pa:#x}"
    if memfd.seals & ~abi.MEMFD_LUO_ALL_SEALS:
        trail.problem(f"{where} has seals {memfd.seals:#x}, memfd-v2 knows {abi.MEMFD_LUO_ALL_SEALS:#x}")
    if memfd.flags:
        trail.problem(f"{where} has flags {memfd.flags:#x}, unused flags must be 0")
    if memfd.size > MAX_LFS_FILESIZE or memfd.pos > MAX_LFS_FILESIZE:
        trail.problem(f"{where} has size {memfd.size:#x} and pos {memfd.pos:#x}, beyond any file")
    known = np.uint64(abi.MEMFD_LUO_FOLIO_DIRTY | abi.MEMFD_LUO_FOLIO_UPTODATE)
    if np.any(odd := memfd.folio_flags & ~known):
        trail.problem(f"{where} has a folio with unknown flags {int(odd[odd != 0][0]):#x}")
    real = memfd.pfn != 0
    lost = np.flatnonzero(real & (orders < 0))
    if len(lost):
        first = int(lost[0])
        trail.problem(
            f"{where}: folio at pa {int(memfd.pfn[first]) << PAGE_SHIFT:#x} (index {int(memfd.index[first])})"
            f" does not start a block of the preserved tree ({len(lost)} of {len(real)} such folios): "
            "retrieve fails with EIO"
        )
    big = np.flatnonzero(real & (orders > abi.MAX_PAGE_ORDER))
    if len(big):
        first = int(big[0])
        trail.problem(
            f"{where}: folio at pa {int(memfd.pfn[first]) << PAGE_SHIFT:#x} has order {int(orders[first])}, "
            f"more than {abi.MAX_PAGE_ORDER}: retrieve fails with EIO"
        )
    # coverage of the file: which pages have no frame (they would read as zeros), which have two
    count = _ONE << memfd.order.astype(np.uint64)
    inside = real & (memfd.index < np.uint64(memfd.pages))
    by_index = np.argsort(memfd.index[inside], kind="stable")
    start, size = memfd.index[inside][by_index], count[inside][by_index]
    end = np.minimum(start + size, np.uint64(memfd.pages))
    if np.any(start[1:] < end[:-1]):
        twice = int(start[1:][start[1:] < end[:-1]][0])
        trail.problem(f"{where}: page {twice} of the file has two folios: retrieve fails")
    elif (covered := int((end - start).sum())) < memfd.pages:
        reach = np.concatenate((np.zeros(1, np.uint64), end))
        gaps = np.flatnonzero(np.append(start, np.uint64(memfd.pages)) > reach)
        hole = int(reach[gaps[0]])
        trail.problem(
            f"{where}: {memfd.pages - covered} of {memfd.pages} pages have no frame, first at index {hole}: "
            "they would read as zeros"
        )
