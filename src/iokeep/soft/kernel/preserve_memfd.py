# SPDX-License-Identifier: Apache-2.0
"""How a memfd crosses the kexec: mm/memfd_luo.c of Linux 7.3, record "memfd-v2", the same bytes.

While preserved its size and pages are frozen (EPERM for truncate, punch and growing writes), ordinary writes
go on. Holes are filled first, every frame is pinned. A 2 MiB aligned block that is one folio is preserved as
one block of order 9.

Where a prior domain may show its pages to devices, a retrieved memfd stays held (EBUSY for truncate and
punch) until the session is finished: nobody pins them before the areas are back. Here Linux 7.3.4 differs:
memfd_luo_retrieve() gives out an ordinary file at once.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from iokeep.handover.abi import MEMFD_LUO_ALL_SEALS, MEMFD_LUO_FH_COMPATIBLE
from iokeep.handover.writer import MemfdOut, rewrite_pos, rewrite_seals, write_memfd
from iokeep.soft.kernel.files import File, Memfd
from iokeep.soft.kernel.frames import BLOCK, I64, Claim, Kind
from iokeep.soft.kernel.luo import FileHandler, LuoFile, Session
from iokeep.soft.kernel.syserror import SysError

if TYPE_CHECKING:
    from iokeep.soft.kernel.kernel import Kernel
    from iokeep.soft.kernel.kho import KhoPart

#: order of a 2 MiB folio
HUGE_ORDER = 9
_UINT_MAX = 2**32 - 1


@dataclass(slots=True, eq=False)
class PreservedMemfd:
    """What LUO holds of a preserved memfd: its pinned frames, and its record, written already."""

    memfd: Memfd
    pfns: I64
    part: KhoPart
    record_pa: int

    def claims(self) -> Iterable[Claim]:
        """The pins."""
        yield Claim(f"live update of {self.memfd.name}", self.pfns, refs=1, pins=1)


@dataclass(slots=True, eq=False)
class IncomingMemfd:
    """A memfd as it came over the kexec; until somebody retrieves it the boot holds its frames.

    ``pages`` int64[n] page numbers in the file, ``pfns`` int64[n] their frames, one row per 4 KiB page.
    """

    token: int
    pos: int
    size: int
    seals: int
    pages: I64
    pfns: I64
    tag: int
    #: no longer held by the boot: retrieved or freed
    gone: bool = False
    #: the retrieved file, as long as it must not lose a page
    held: Memfd | None = None

    def claims(self) -> Iterable[Claim]:
        """The frames, while nobody has them."""
        if not self.gone:
            yield Claim(f"preserved memfd, token {self.token:#x}", self.pfns)


def folios(pfns: I64) -> tuple[I64, I64, I64]:
    """(first pfn, page number, order) of each folio of a file whose pages have these frames.

    A block of 512 pages at a multiple of 512, in one 2 MiB aligned run of frames, is one folio of order 9:
    that is how the page cache allocates it (:meth:`PageFile._whole_blocks`).
    """
    n = len(pfns)
    whole = n // BLOCK * BLOCK
    blocks = pfns[:whole].reshape(-1, BLOCK)
    huge = (
        (blocks[:, 0] % BLOCK == 0) & (np.diff(blocks, axis=1) == 1).all(axis=1)
        if whole
        else np.zeros(0, bool)
    )
    first = np.ones(n, np.bool_)
    first[:whole] = (~np.repeat(huge, BLOCK)) | (np.arange(whole) % BLOCK == 0)
    index = np.flatnonzero(first).astype(np.int64)
    order = np.zeros(n, np.int64)
    order[:whole] = np.repeat(huge, BLOCK) * HUGE_ORDER
    return pfns[index], index, order[index]


@dataclass(eq=False)
class MemfdHandler(FileHandler):
    """LUO handler "memfd-v2".

    :param part: makes a new part of the KHO output. :param free: frees frames that came over the
        kexec and that nobody claimed, or keeps them while a wrong table may lead there.
    :param incoming: what came over the kexec by the pa of its record.
    """

    kernel: Kernel
    part: Callable[[], KhoPart]
    free: Callable[[I64], None]
    incoming: dict[int, IncomingMemfd] = field(default_factory=dict)
    #: whether a prior domain may show pages of a session's files
    shown: Callable[[Session], bool] = field(default=lambda session: False)
    held: list[PreservedMemfd] = field(default_factory=list)

    compatible = MEMFD_LUO_FH_COMPATIBLE
    flb = ()

    def can_preserve(self, file: File) -> bool:
        """A shmem file that no directory names."""
        return isinstance(file, Memfd)

    def get_id(self, file: File) -> Hashable:
        """The inode: one memfd opened twice is still one."""
        return ("inode", file.ino)

    def preserve(self, session: Session, file: File, token: int) -> PreservedMemfd:
        """Freeze size and pages, fill holes, pin, and write all that will not change.

        :raises SysError: EOPNOTSUPP seals; EFBIG; ENOMEM.
        """
        assert isinstance(file, Memfd)
        if file.seals & ~MEMFD_LUO_ALL_SEALS:
            raise SysError(errno.EOPNOTSUPP, f"memfd {file.name}: seals {file.seals:#x} cannot be carried")
        if file.n_pages > _UINT_MAX:
            raise SysError(errno.EFBIG, f"memfd {file.name}: {file.n_pages} pages")
        pfns = file.fault(0, file.n_pages - 1) if file.n_pages else np.zeros(0, np.int64)
        self.kernel.frames.pin(pfns)
        part = self.part()
        try:
            record_pa = self._write(part, file, pfns)
        except SysError:
            part.drop()
            self.kernel.frames.unpin(pfns)
            raise
        file.preserved = True
        private = PreservedMemfd(file, pfns, part, record_pa)
        self.held.append(private)
        return private

    def unpreserve(self, file: File, private: PreservedMemfd) -> None:
        """Unpin; the file may change again."""
        private.part.drop()
        self.kernel.frames.unpin(private.pfns)
        private.memfd.preserved = False
        self.held.remove(private)

    def freeze(self, file: File, private: PreservedMemfd) -> int:
        """Position and seals as they are now, into the record."""
        ram = self.kernel.frames.ram
        rewrite_pos(ram, private.record_pa, file.pos)
        rewrite_seals(ram, private.record_pa, private.memfd.seals)
        return private.record_pa

    def _write(self, out: KhoPart, memfd: Memfd, pfns: I64) -> int:
        """memfd_luo_ser and the folios; the pa of the record."""
        pfn, index, order = folios(pfns)
        out.preserve(pfn[order == 0])
        out.preserve(pfn[order == HUGE_ORDER], HUGE_ORDER)
        record = MemfdOut(
            pos=memfd.pos,
            size=memfd.size,
            seals=memfd.seals,
            pfn=pfn.astype(np.uint64),
            index=index.astype(np.uint64),
        )
        pa = write_memfd(self.kernel.frames.ram, out.alloc, record)
        out.flush()
        return pa

    def claims(self) -> Iterable[Claim]:
        """Pins of preserved files, and frames of incoming ones that nobody has."""
        for private in self.held:
            yield from private.claims()
        for memfd in self.incoming.values():
            yield from memfd.claims()

    # ---- in the new kernel

    def check_incoming(self, session: Session, entry: LuoFile) -> None:
        """Its record was read at boot."""
        if entry.data not in self.incoming:
            raise SysError(errno.EIO, f"no memfd record at {entry.data:#x}")

    def retrieve(self, session: Session, entry: LuoFile) -> File:
        """A memfd with the same frames, size, position and seals; its name is gone, as in Linux."""
        record = self.incoming[entry.data]
        kernel = self.kernel
        file = Memfd(kernel, "")
        if record.tag:
            # The inode number is the owner tag of the frames, and those carry the one of the old kernel.
            del kernel.files[file.ino]
            file.ino = record.tag
            kernel.files[file.ino] = file
        kernel.frames.give(record.pfns, file.tag, Kind.MEMFD)
        file.adopt_pages(record.size, record.pages, record.pfns)
        file.pos = record.pos
        file.seals = record.seals
        record.gone = True
        if self.shown(session):
            file.holders += 1
            record.held = file
        return file

    def finish(self, session: Session, entry: LuoFile) -> None:
        """memfd_luo_finish(): what nobody retrieved is freed; what was held is an ordinary file."""
        record = self.incoming.get(entry.data)
        if record is None:
            return
        if not record.gone:
            record.gone = True
            self.free(record.pfns)
        if record.held is not None:
            record.held.holders -= 1
            record.held = None
