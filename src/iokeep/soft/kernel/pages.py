# SPDX-License-Identifier: Apache-2.0
"""Areas and the pages behind them: who pins which frames, and where iommufd finds their PFNs again.

Follows drivers/iommu/iommufd/pages.c. Once an area is filled into a domain, its PFNs are stored nowhere but
in that domain's table: they are read back by iova_to_phys when the area goes away, and what was read is
unpinned. Nothing else is trusted, so a wrong table does its damage.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from iokeep.mem.ranges import Range, RangeSet, merge, subtract
from iokeep.pt.extents import Extents
from iokeep.soft.kernel.files import File, PageFile
from iokeep.soft.kernel.frames import FRAME_BYTES, FRAME_SHIFT, I64, U64, Claim, FrameRuns, pas_of, pfns_of
from iokeep.soft.kernel.memlock import Account, update
from iokeep.soft.kernel.process import Process
from iokeep.soft.kernel.syserror import SysError

if TYPE_CHECKING:
    from iokeep.soft.kernel.ioas import Ioas
    from iokeep.soft.kernel.iommu import Domain
    from iokeep.soft.kernel.kernel import Kernel

ULONG_MAX = 2**64 - 1


@dataclass(eq=False, slots=True)
class Held:
    """PFNs of pages that accesses have pinned (struct iopt_pages_access, and its part of the xarray).

    :param users: pins of exactly these pages.
    """

    pfns: I64
    users: int = 0


class Pages:
    """A range of pages of one origin (struct iopt_pages), shared by an area and its copies.

    :param kernel: whose frames. :param start_byte: offset of the first byte in the first page.
    :param length: bytes. :param writable: pinned for writing, so that an area may be writable.
    :param process: who mapped them. :param account: who is charged while they are pinned.
    :param file: origin of a file mapping, with ``offset``, the byte in it where the first page begins; a
        reference is taken. Else it is the process's memory, with ``uptr``, its page-aligned hva.
    :raises SysError: EINVAL for length 0 or above 2**64 - 1 - page size.
    """

    def __init__(
        self,
        kernel: Kernel,
        start_byte: int,
        length: int,
        *,
        writable: bool,
        process: Process,
        account: Account,
        file: File | None = None,
        offset: int = 0,
        uptr: int = 0,
    ) -> None:
        if not 0 < length <= ULONG_MAX - FRAME_BYTES:  # iopt_alloc_pages
            raise SysError(errno.EINVAL, f"a mapping of {length:#x} bytes")
        self.kernel = kernel
        self.writable = writable
        self.n_pages = -(-(length + start_byte) // FRAME_BYTES)
        self.file = file.get() if file is not None else None
        self.offset = offset
        self.process = process
        self.account = account
        #: pages that it is charged for (last_npinned)
        self.charged = 0
        self.uptr = uptr
        self._references = 1
        #: areas that have a storage domain (domains_itree): their part of the pages is pinned
        self.stored: dict[int, Area] = {}
        #: (first, last) page numbers -> what accesses hold of exactly these (access_itree)
        self.held: dict[tuple[int, int], Held] = {}

    @property
    def memfd(self) -> PageFile | None:
        """The memory file behind a file mapping, where it is one."""
        return self.file.page_file() if self.file is not None else None

    @property
    def alignment_hint(self) -> int:
        """What an automatic IOVA should be aligned like: the hva or the file offset of the first page."""
        return self.offset if self.file is not None else self.uptr

    def get(self) -> Pages:
        """One more area (or list of pages to map) uses them."""
        self._references += 1
        return self

    def put(self) -> None:
        """One user less; the last one lets the file go."""
        self._references -= 1
        if self._references == 0 and self.file is not None:
            self.file.put()
            self.file = None

    # ---- PFNs

    def _living(self) -> Process | None:
        """The process whose memory this is, while it lives (mmget_not_zero)."""
        process = self.process
        return process if self.kernel.processes.get(process.pid) is process else None

    def lookup(self, first: int, last: int) -> I64:
        """As :meth:`runs`, frame by frame."""
        return self.runs(first, last).pfns()

    def runs(self, first: int, last: int) -> FrameRuns:
        """Frames of pages ``first`` ... ``last`` at their origin, holes filled, nothing pinned.

        :raises SysError: EINVAL not a memory file, or past its end (memfd_pin_folios); EFAULT bad user
            memory; ENOMEM.
        """
        n = last - first + 1
        if self.file is not None:
            memfd = self.file.page_file()
            if memfd is None:
                raise SysError(errno.EINVAL, f"{self.file.name} ({self.file.kind_name}) has no pages to pin")
            at = self.offset + first * FRAME_BYTES
            if at + n * FRAME_BYTES > memfd.size:
                raise SysError(
                    errno.EINVAL,
                    f"{memfd.name}: bytes {at:#x} ... {at + n * FRAME_BYTES - 1:#x} are past its end "
                    f"at {memfd.size:#x}",
                )
            return memfd.runs(at >> FRAME_SHIFT, (at >> FRAME_SHIFT) + n - 1)
        process = self._living()
        if process is None:
            raise SysError(errno.EFAULT, "the process that mapped this memory is gone")
        parts = []
        for file, offset, length in process.resolve(
            self.uptr + first * FRAME_BYTES, n * FRAME_BYTES, write=self.writable
        ):
            parts.append(file.runs(offset >> FRAME_SHIFT, (offset + length - 1) >> FRAME_SHIFT))
        return FrameRuns.join(parts)

    def unpinned(self, first: int, last: int) -> list[Range]:
        """The page numbers of ``first`` ... ``last`` that no stored area and no access has pinned."""
        whole = [Range(first, last)]
        if not self.stored and not self.held:
            return whole
        pinned = [r for a in self.stored.values() for r in a.pinned()]
        return subtract(whole, merge(pinned + self._held_ranges()))

    def acquire(self, first: int, last: int) -> tuple[I64, I64]:
        """PFNs of the pages, pinning those that nobody has: (all of them, the newly pinned ones).

        Pages that an access holds are known by it, those that an area has stored are read back from its
        domain, in this order, as pfn_reader does.
        :raises SysError: EUCLEAN: that domain's table is not what it should be there. Nothing is pinned then.
        """
        out = np.full(last - first + 1, -1, np.int64)
        known = self._held_ranges()
        for (a, b), held in self.held.items():
            at, end = max(first, a), min(last, b)
            if at <= end:
                out[at - first : end - first + 1] = held.pfns[at - a : end - a + 1]
        for area in self.stored.values():
            a, b = max(first, area.first_page), min(last, area.last_page)
            for r in subtract([Range(a, b)], merge(known)) if a <= b else ():
                out[r.start - first : r.last - first + 1] = area.read_back(r.start, r.last)
        fresh = self.unpinned(first, last)
        if fresh == [Range(first, last)]:
            pfns = self.lookup(first, last)
            self.kernel.frames.pin(pfns)
            return pfns, pfns
        taken = []
        for r in fresh:
            taken.append(self.lookup(r.start, r.last))
        for r, pfns in zip(fresh, taken, strict=True):
            self.kernel.frames.pin(pfns)
            out[r.start - first : r.last - first + 1] = pfns
        return out, np.concatenate(taken) if taken else np.zeros(0, np.int64)

    def charge(self, *, force: bool = False) -> None:
        """Account for what is pinned now (pfn_reader_user_update_pinned, update_unpinned).

        :param force: also above the limit. :raises SysError: ENOMEM: above RLIMIT_MEMLOCK: unpin them again.
        """
        pinned = [r for a in self.stored.values() for r in a.pinned()] + self._held_ranges()
        now = sum(r.last - r.start + 1 for r in merge(pinned))
        if now != self.charged:
            update(self.process, self.account, now - self.charged, force=force)
            self.charged = now

    # ---- accesses

    def _held_ranges(self) -> list[Range]:
        return [Range(*pages) for pages in self.held]

    def hold(self, first: int, last: int) -> I64:
        """An access pins pages ``first`` ... ``last`` (iopt_area_add_access); their PFNs.

        :raises SysError: as :meth:`acquire`; ENOMEM: above RLIMIT_MEMLOCK.
        """
        held = self.held.get((first, last))
        if held is None:
            held = self.held[first, last] = Held(self.acquire(first, last)[0])
        held.users += 1
        try:
            self.charge()
        except SysError:
            self.let_go(first, last)
            raise
        return held.pfns

    def let_go(self, first: int, last: int) -> bool:
        """Undo one :meth:`hold` of exactly these pages: what nobody else has is unpinned
        (iopt_pages_unfill_xarray). False: there is none.
        """
        held = self.held.get((first, last))
        if held is None:
            return False
        held.users -= 1
        if not held.users:
            del self.held[first, last]
            for r in self.unpinned(first, last):
                self.kernel.frames.unpin(held.pfns[r.start - first : r.last - first + 1])
            self.charge()
        return True

    def read(self, caller: Process, start_byte: int, length: int, *, slow: bool = False) -> bytes:
        """Bytes from ``start_byte`` on, counted as areas do (iopt_pages_rw_access): the caller's own memory
        by hva, that of files and other processes by frame.

        :param slow: by frame in any case. :raises SysError: as :meth:`acquire`; EFAULT.
        """
        if self._own(caller) and not slow:
            return caller.copy_from_user(self.uptr + start_byte, length)
        pfns, fresh = self._touch(start_byte, length, write=False)
        data = self.kernel.frames.read(pfns, start_byte % FRAME_BYTES, length)
        self.kernel.frames.unpin(fresh)
        return data

    def write(self, caller: Process, start_byte: int, data: bytes, *, slow: bool = False) -> None:
        """Store bytes, as :meth:`read` finds them."""
        if self._own(caller) and not slow:
            caller.copy_to_user(self.uptr + start_byte, data)
            return
        pfns, fresh = self._touch(start_byte, len(data), write=True)
        self.kernel.frames.write(pfns, start_byte % FRAME_BYTES, data)
        self.kernel.frames.unpin(fresh)

    def _own(self, caller: Process) -> bool:
        return self.file is None and self.process is caller

    def _touch(self, start_byte: int, length: int, *, write: bool) -> tuple[I64, I64]:
        """Frames of bytes, and those of them to be unpinned when all is done."""
        first, last = start_byte // FRAME_BYTES, (start_byte + length - 1) // FRAME_BYTES
        process = self._living()
        if self.file is None and first == last and process is not None:
            # iopt_pages_rw_page: one page is looked up where the process has it now, also one that is pinned
            hva = self.uptr + (first << FRAME_SHIFT)
            ((file, offset, _),) = process.resolve(hva, FRAME_BYTES, write=write)
            return file.fault(offset >> FRAME_SHIFT, offset >> FRAME_SHIFT), np.zeros(0, np.int64)
        return self.acquire(first, last)

    def claims(self) -> Iterable[Claim]:
        """The pins of accesses, as far as no stored area claims them."""
        earlier = merge([r for a in self.stored.values() for r in a.pinned()])
        for (first, last), held in self.held.items():
            for r in subtract([Range(first, last)], earlier):
                pfns = held.pfns[r.start - first : r.last - first + 1]
                yield Claim(f"access to pages {first} ... {last}", pfns, refs=1, pins=1)
            earlier = merge([*earlier, Range(first, last)])


@dataclass(eq=False, slots=True)
class Area:
    """``[iova, last]`` shows the pages from byte ``start_byte`` on (struct iopt_area).

    :param prot: PROT_R | PROT_W. :param storage: the domain whose table stores the PFNs, or None where
        nothing is pinned for this area. :param lazy: numbers of pages that are stored, but not pinned: the
        table of an adopted domain is not proved there. :param accesses: pins of accesses; ``locks``: those
        that forbid an unmap. :param prevent_access: it is about to go, nobody may pin it any more.
    """

    ioas: Ioas
    iova: int
    last: int
    pages: Pages
    start_byte: int
    prot: int
    storage: Domain | None = field(default=None)
    lazy: RangeSet = field(default_factory=RangeSet)
    accesses: int = 0
    locks: int = 0
    prevent_access: bool = False

    @property
    def length(self) -> int:
        """Bytes."""
        return self.last - self.iova + 1

    @property
    def page_offset(self) -> int:
        """Offset of ``iova`` in its page."""
        return self.start_byte % FRAME_BYTES

    @property
    def first_page(self) -> int:
        """Number of the first page, counted in ``pages``."""
        return self.start_byte // FRAME_BYTES

    @property
    def last_page(self) -> int:
        """Number of the last page."""
        return (self.start_byte + self.length - 1) // FRAME_BYTES

    @property
    def file_offset(self) -> int:
        """Byte of the file that ``iova`` shows (file mappings)."""
        return self.pages.offset + self.start_byte

    def iovas(self, first: int, last: int) -> U64:
        """IOVA of each page from ``first`` to ``last`` (numbers in ``pages``)."""
        number = first - self.first_page
        base = self.iova - self.page_offset + (number << FRAME_SHIFT)
        out = np.arange(last - first + 1, dtype=np.uint64) * np.uint64(FRAME_BYTES) + np.uint64(base)
        if number == 0:
            out[0] = self.iova  # the area may begin inside of its first page
        return out

    def span(self, first: int, last: int) -> Range:
        """The IOVAs that show pages ``first`` ... ``last`` (numbers in ``pages``)."""
        base = self.iova - self.page_offset
        start = base + ((first - self.first_page) << FRAME_SHIFT)
        end = base + ((last + 1 - self.first_page) << FRAME_SHIFT) - 1
        return Range(max(start, self.iova), min(end, self.last))

    def pages_in(self, start: int, last: int) -> tuple[int, int]:
        """Numbers of the first and the last page that [start, last], which touches the area, shows."""
        base = self.iova - self.page_offset
        first = self.first_page + ((max(start, self.iova) - base) >> FRAME_SHIFT)
        return first, self.first_page + ((min(last, self.last) - base) >> FRAME_SHIFT)

    def read_back(self, first: int, last: int) -> I64:
        """PFNs of pages as the storage domain's table says: PFN 0 where nothing translates
        (batch_from_domain). :raises SysError: EUCLEAN: that table was adopted, and is something else there.
        """
        if self.storage is None:
            raise AssertionError(f"area at {self.iova:#x} has no storage domain")
        self.storage.need(*self.span(first, last))
        return pfns_of(self.storage.iova_to_phys(self.iovas(first, last)))

    def extents(self, frames: FrameRuns, first: int | None = None) -> Extents:
        """What a table must hold for this area: an extent for each run of frames.

        :param frames: of all its pages, or of some from number ``first`` on.
        """
        number = self.first_page if first is None else first
        start, end = self.span(number, number + frames.total - 1)
        at = np.cumsum(frames.count) - frames.count
        # bytes that the area leaves out of its first page: IOVAs there, and the pa of the first extent
        skip = self.page_offset if number == self.first_page else 0
        iova = np.uint64(start - skip) + (at.astype(np.uint64) << np.uint64(FRAME_SHIFT))
        iova[0] = start
        last = np.append(iova[1:], np.uint64((end + 1) & ULONG_MAX)) - np.uint64(1)
        pa = pas_of(frames.first)
        pa[0] += np.uint64(skip)
        return Extents(iova, last, pa, np.full(len(at), self.prot, np.uint8))

    # ---- filling

    def fill(self, domains: list[Domain]) -> None:
        """Pin the pages and map them in every domain (iopt_area_fill_domains); the first one stores the PFNs.

        :raises SysError: nothing is pinned or mapped then.
        """
        if not domains:
            return
        for domain in domains:
            domain.need(self.iova, self.last)
        pfns, pinned = self.pages.acquire(self.first_page, self.last_page)
        done: list[Domain] = []
        try:
            extents = self.extents(FrameRuns.of(pfns))
            for domain in domains:
                domain.map(extents, self.ioas.max_leaf_lg2)
                done.append(domain)
        except SysError:
            for domain in done:
                domain.unmap(self.iova, self.last)
            self.pages.kernel.frames.unpin(pinned)
            raise
        self._stored(domains[0], lambda: self.unfill(domains))

    def fill_more(self, domain: Domain) -> None:
        """Map the area in one more domain (iopt_area_fill_domain); pins if no domain stores the PFNs yet.

        :raises SysError: nothing is pinned or mapped then.
        """
        pfns, pinned = self.pages.acquire(self.first_page, self.last_page)
        try:
            domain.map(self.extents(FrameRuns.of(pfns)), self.ioas.max_leaf_lg2)
        except SysError:
            self.pages.kernel.frames.unpin(pinned)
            raise
        if self.storage is not None:
            return
        self._stored(domain, lambda: self.unfill_last(domain))

    def fill_adopted(self, domain: Domain) -> None:
        """Pin the pages for a domain whose table maps them already: the domain becomes their storage.

        :raises SysError: nothing is pinned then.
        """
        _, pinned = self.pages.acquire(self.first_page, self.last_page)
        if self.storage is not None:
            return

        def undo() -> None:
            del self.pages.stored[id(self)]
            self.storage = None
            self.pages.kernel.frames.unpin(pinned)

        self._stored(domain, undo)

    def fill_deferred(self, domain: Domain) -> None:
        """``domain`` maps the pages already, as it will be proved: it becomes their storage, and no page is
        pinned before. O(1) in the pages.
        """
        if self.storage is None:
            self.lazy = RangeSet(self.pages.unpinned(self.first_page, self.last_page))
            self.store(domain)

    def pin(self, first: int, last: int) -> None:
        """The table was proved for pages ``first`` ... ``last``: pin those that nobody has pinned."""
        for part in self.lazy.within(first, last):
            for r in self.pages.unpinned(*part):
                self.pages.kernel.frames.pin_runs(self.pages.runs(r.start, r.last))
            self.lazy.discard(*part)
        self.pages.charge(force=True)

    def pinned(self) -> list[Range]:
        """Numbers of the pages that are pinned for this area, or were when it was stored."""
        return self.lazy.outside(self.first_page, self.last_page)

    def _stored(self, domain: Domain, undo: Callable[[], None]) -> None:
        """:meth:`store` of pinned pages, which are charged for. :raises SysError: ENOMEM; after ``undo``."""
        self.store(domain)
        try:
            self.pages.charge()
        except SysError:
            undo()
            raise

    def store(self, domain: Domain) -> None:
        """``domain`` keeps the PFNs of this area from now on."""
        self.storage = domain
        self.pages.stored[id(self)] = self

    def unfill(self, domains: list[Domain]) -> None:
        """Take the area out of all domains and unpin what no other area stores (iopt_area_unfill_domains)."""
        storage = self.storage
        if storage is None:
            return
        for domain in domains:
            if domain is not storage:
                domain.unmap(self.iova, self.last)
        self.unfill_last(storage)

    def unfill_last(self, storage: Domain) -> None:
        """Take the area out of the domain that stores its PFNs (iopt_area_unfill_domain).

        PFNs are read before their mapping goes, and unpinned after the flush, when no DMA can be under way.
        """
        storage.need(self.iova, self.last)
        del self.pages.stored[id(self)]
        spans = self.pages.unpinned(self.first_page, self.last_page)
        pfns = [self.read_back(r.start, r.last) for r in spans]
        self.storage = None
        storage.unmap(self.iova, self.last)
        for part in pfns:
            self.pages.kernel.frames.unpin(part)
        self.pages.charge()

    def release(self) -> None:
        """Let the storage domain go without a change of its table: unpin what no other area has pinned.

        Where that table is not proved, the file says which pages these are.
        """
        del self.pages.stored[id(self)]
        spans = self.pages.unpinned(self.first_page, self.last_page)
        left = [r for s in spans for r in self.lazy.outside(*s)]
        pfns = [part for r in left for part in self._held(r)]
        self.storage, self.lazy = None, RangeSet()
        for part in pfns:
            self.pages.kernel.frames.unpin(part)
        self.pages.charge()

    def move(self, storage: Domain) -> None:
        """Another domain that maps the area already stores its PFNs from now on."""
        self.storage = storage
        if self.lazy:
            proof = storage.proof
            spans = [Range(self.iova, self.last)]
            if proof is not None:
                spans = proof.state.validated.within(self.iova, self.last)
            for r in spans:
                self.pin(*self.pages_in(*r))

    def _held(self, r: Range) -> list[I64]:
        """PFNs of pinned pages (numbers in ``pages``), from the table as far as it is proved."""
        storage = self.storage
        if storage is None:
            raise AssertionError(f"area at {self.iova:#x} has no storage domain")
        proof = storage.proof
        if proof is None or proof.holds(*self.span(*r)):
            return [pfns_of(storage.iova_to_phys(self.iovas(*r)))]
        span = self.span(*r)
        trusted = proof.state.validated
        out = []
        for part in trusted.within(*span):
            out.append(pfns_of(storage.iova_to_phys(self.iovas(*self.pages_in(*part)))))
        for part in trusted.outside(*span):
            out.append(self.pages.lookup(*self.pages_in(*part)))
        return out

    def claims(self) -> Iterable[Claim]:
        """The pins that will be undone when this area goes: what its storage domain says."""
        if self.storage is None:
            return
        # Shared pages are pinned once: the first stored area of the list claims what several cover.
        earlier: list[Range] = []
        for area in self.pages.stored.values():
            if area is self:
                break
            earlier += area.pinned()
        for r in subtract(self.pinned(), merge(earlier)):
            for pfns in self._held(r):
                yield Claim(f"IOAS {self.ioas.id} area at {self.iova:#x}", pfns, refs=1, pins=1)
