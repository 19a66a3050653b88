# SPDX-License-Identifier: Apache-2.0
"""The IOAS: areas by IOVA, allowed and reserved ranges, the domains that show them.

Follows drivers/iommu/iommufd/io_pagetable.c and ioas.c; the order of checks, and so which errno wins, is
theirs.
"""

from __future__ import annotations

import errno
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from iokeep.mem.ranges import Range, merge, subtract
from iokeep.pt.extents import PROT_W
from iokeep.soft.kernel.frames import FRAME_BYTES, FRAME_SHIFT, Claim
from iokeep.soft.kernel.memlock import account_of
from iokeep.soft.kernel.objects import IommufdObject
from iokeep.soft.kernel.pages import ULONG_MAX, Area, Pages
from iokeep.soft.kernel.syserror import SysError

if TYPE_CHECKING:
    from iokeep.soft.kernel.access import Access
    from iokeep.soft.kernel.deferred import Adoption
    from iokeep.soft.kernel.hwpt import HwptPaging
    from iokeep.soft.kernel.iommu import Domain
    from iokeep.soft.kernel.iommufd import Iommufd
    from iokeep.soft.kernel.process import Process

#: how often accesses are asked to unpin an area before the kernel gives up (iopt_unmap_iova_range)
_UNMAP_TRIES = 100
#: an automatic IOVA is not aligned to more than this (HPAGE_SIZE of x86-64)
HPAGE_BYTES = 1 << 21


def unmap_last(iova: int, length: int) -> int:
    """The last IOVA of an unmap (iopt_unmap_iova). :raises SysError: EINVAL, EOVERFLOW."""
    if not length:
        raise SysError(errno.EINVAL, "UNMAP of nothing")
    if iova + length - 1 > ULONG_MAX:
        raise SysError(errno.EOVERFLOW, f"iova {iova:#x} + {length:#x}")
    return iova + length - 1


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of pages that is to be mapped (struct iopt_pages_list); holds a reference on them."""

    pages: Pages
    start_byte: int
    length: int


class Ioas(IommufdObject):
    """One IO address space (struct iommufd_ioas and its io_pagetable)."""

    type_name = "ioas"

    def __init__(self, iommufd: Iommufd) -> None:
        super().__init__(iommufd)
        #: sorted by iova, disjoint
        self.areas: list[Area] = []
        self._starts: list[int] = []
        self.allowed: list[Range] = []
        #: (range, owner): what no area may touch, and the domain or device that says so
        self.reserved: list[tuple[Range, object]] = []
        #: domains that show the areas, in the order that they were added; [0] stores the PFNs of new areas
        self.domains: list[Domain] = []
        #: HWPTs of this IOAS, automatic ones too
        self.hwpts: list[HwptPaging] = []
        #: number -> access of an emulated device
        self.accesses: dict[int, Access] = {}
        self.iova_alignment = 1
        self.disable_large_pages = False
        #: changes with every change of the areas: proofs about a table name the generation that they hold for
        self.generation = 0

    @property
    def max_leaf_lg2(self) -> int | None:
        """Largest leaf for new mappings: 4 KiB where HUGE_PAGES is off, else what fits (None)."""
        return FRAME_SHIFT if self.disable_large_pages else None

    def check_mutable(self) -> None:
        """:raises SysError: EBUSY while a live update session holds the iommufd."""
        if self.iommufd.preserved:
            raise SysError(errno.EBUSY, f"IOAS {self.id}: its iommufd is preserved, it cannot be changed")

    # ---- looking things up

    def area_at(self, iova: int, last: int) -> Area | None:
        """The first area that touches [iova, last] (iopt_area_iter_first)."""
        i = bisect_right(self._starts, iova) - 1
        if i >= 0 and self.areas[i].last >= iova:
            return self.areas[i]
        i += 1
        return self.areas[i] if i < len(self.areas) and self.areas[i].iova <= last else None

    def contiguous(self, iova: int, last: int) -> Iterator[tuple[Area, int, int]]:
        """The areas that show [iova, last] without a hole, each with its part of the range, closed
        (iopt_for_each_contig_area). :raises SysError: ENOENT at a hole, after the areas before it.
        """
        at = iova
        while True:
            area = self.area_at(at, at)
            if area is None:
                raise SysError(errno.ENOENT, f"IOAS {self.id}: nothing is mapped at {at:#x}")
            end = min(last, area.last)
            yield area, at, end
            if end == last:
                return
            at = end + 1

    def _insert(self, area: Area) -> None:
        i = bisect_left(self._starts, area.iova)
        self._starts.insert(i, area.iova)
        self.areas.insert(i, area)
        self.generation += 1

    def _remove(self, area: Area) -> None:
        i = bisect_left(self._starts, area.iova)
        if self.areas[i] is not area:
            raise AssertionError(f"area at {area.iova:#x} is not in IOAS {self.id}")
        del self._starts[i]
        del self.areas[i]
        self.generation += 1

    # ---- mapping

    def map_user(self, process: Process, hva: int, length: int, iova: int | None, prot: int) -> int:
        """Map memory of a process (iopt_map_user_pages); the IOVA. :param iova: None = find one."""
        if hva + length > ULONG_MAX:
            raise SysError(errno.EOVERFLOW, f"user_va {hva:#x} + {length:#x}")
        start_byte = hva % FRAME_BYTES
        pages = Pages(
            self.iommufd.kernel,
            start_byte,
            length,
            writable=bool(prot & PROT_W),
            process=process,
            account=account_of(process, by_process=self.iommufd.account_mm),
            uptr=hva - start_byte,
        )
        return self.map_pieces([Piece(pages, start_byte, length)], length, iova, prot)

    def map_pieces(self, pieces: list[Piece], length: int, iova: int | None, prot: int) -> int:
        """Map pieces one after the other (iopt_map_pages); the IOVA of the first. Takes over their
        references.

        :param iova: None = find one.
        """
        areas: list[Area] = []
        try:
            self.check_mutable()
            if length & (self.iova_alignment - 1) or not length:
                raise SysError(
                    errno.EINVAL, f"length {length:#x} is not a multiple of {self.iova_alignment:#x}"
                )
            if iova is None:
                first = pieces[0]
                iova = self._find_iova(first.pages.alignment_hint + first.start_byte, length)
            else:
                self._check_iova(iova, length)
            at = iova
            for piece in pieces:
                areas.append(self._insert_area(piece, at, prot))
                at += piece.length
            filled: list[Area] = []
            try:
                for area in areas:
                    area.fill(self.domains)
                    filled.append(area)
            except SysError:
                for area in filled:
                    area.unfill(self.domains)
                raise
        except SysError:
            for area in areas:
                self._remove(area)
            for piece in pieces:
                piece.pages.put()
            raise
        return iova

    def _insert_area(self, piece: Piece, iova: int, prot: int) -> Area:
        """iopt_insert_area."""
        if prot & PROT_W and not piece.pages.writable:
            raise SysError(
                errno.EPERM, f"IOAS {self.id}: a writable mapping of pages that were mapped read-only"
            )
        if piece.start_byte % FRAME_BYTES & (self.iova_alignment - 1):
            raise SysError(
                errno.EINVAL, f"offset {piece.start_byte:#x} is not aligned to {self.iova_alignment:#x}"
            )
        last = iova + piece.length - 1
        if last > ULONG_MAX or piece.start_byte + piece.length - 1 > ULONG_MAX:
            raise SysError(errno.EOVERFLOW, f"iova {iova:#x} + {piece.length:#x}")
        area = Area(self, iova, last, piece.pages, piece.start_byte, prot)
        self._insert(area)
        return area

    def _check_iova(self, iova: int, length: int) -> None:
        """iopt_check_iova."""
        if iova & (self.iova_alignment - 1):
            raise SysError(errno.EINVAL, f"iova {iova:#x} is not aligned to {self.iova_alignment:#x}")
        last = iova + length - 1
        if last > ULONG_MAX:
            raise SysError(errno.EOVERFLOW, f"iova {iova:#x} + {length:#x}")
        wanted = Range(iova, last)
        for reserved, _ in self.reserved:
            if reserved.overlaps(wanted):
                raise SysError(
                    errno.EINVAL,
                    f"IOAS {self.id}: {iova:#x} ... {last:#x} is in the reserved range "
                    f"{reserved.start:#x} ... {reserved.last:#x}",
                )
        if self.area_at(iova, last) is not None:
            raise SysError(errno.EEXIST, f"IOAS {self.id}: {iova:#x} ... {last:#x} is mapped already")

    def _find_iova(self, hint: int, length: int) -> int:
        """iopt_alloc_iova: never 0, aligned like the hva or file offset so that huge pages can be used."""
        if length >= ULONG_MAX // 2:
            raise SysError(errno.EOVERFLOW, f"a mapping of {length:#x} bytes")
        alignment = 1 << (length - 1).bit_length()
        if hint:
            alignment = min(alignment, hint & -hint)
        alignment = min(alignment, HPAGE_BYTES)
        if alignment < self.iova_alignment:
            raise SysError(errno.EINVAL, f"{hint:#x} is not aligned to {self.iova_alignment:#x}")
        offset = hint % FRAME_BYTES
        bounds = Range(FRAME_BYTES, ULONG_MAX - FRAME_BYTES)
        allowed = merge(self.allowed) if self.allowed else [bounds]
        used = sorted([r for r, _ in self.reserved] + [Range(a.iova, a.last) for a in self.areas])
        for span in allowed:
            span = Range(max(span.start, bounds.start), min(span.last, bounds.last))
            # __alloc_iova_check_used: the span must hold the mapping at its first aligned place
            start = (-(-span.start // alignment) * alignment) | offset
            if start >= span.last or span.last - start < length - 1:
                continue
            for hole in subtract([Range(start, span.last)], used):
                at = (-(-hole.start // alignment) * alignment) | offset
                if at < hole.last and hole.last - at >= length - 1:
                    return at
        raise SysError(errno.ENOSPC, f"IOAS {self.id}: no free IOVA range of {length:#x} bytes")

    def pieces_of(self, iova: int, length: int) -> list[Piece]:
        """What is mapped at [iova, iova + length): contiguous areas or parts of them (iopt_get_pages)."""
        if not length:
            raise SysError(errno.EINVAL, "a copy of nothing")
        last = iova + length - 1
        if last > ULONG_MAX:
            raise SysError(errno.EOVERFLOW, f"iova {iova:#x} + {length:#x}")
        pieces: list[Piece] = []
        try:
            for area, at, end in self.contiguous(iova, last):
                if area.storage is not None:
                    area.storage.need(at, end)
                pieces.append(Piece(area.pages.get(), area.start_byte + at - area.iova, end - at + 1))
        except SysError:
            for piece in pieces:
                piece.pages.put()
            raise
        return pieces

    def _need(self, area: Area) -> None:
        """Before an area goes or is cut: every domain that shows it is proved there. :raises SysError:
        EUCLEAN, and nothing has changed.
        """
        for domain in self.domains:
            domain.need(area.iova, area.last)

    def unmap(self, iova: int, last: int) -> tuple[int, SysError | None]:
        """Remove every area in [iova, last] (iopt_unmap_iova_range): the bytes removed, and what ended it.

        Areas before one that is only partly covered (ENOENT) or locked (EBUSY) are gone, as in Linux. What
        accesses have pinned they are asked to let go.

        :raises SysError: EBUSY: a live update session holds the iommufd; EUCLEAN: a part is quarantined.
            Nothing has changed.
        """
        self.check_mutable()
        if any(domain.proof is not None for domain in self.domains):
            at = iova
            while at <= last and (area := self.area_at(at, last)) is not None:
                if iova <= area.iova and area.last <= last:
                    self._need(area)
                at = area.last + 1
        unmapped = tries = 0
        start = iova
        while start <= last and (area := self.area_at(start, last)) is not None:
            name = f"IOAS {self.id}: area {area.iova:#x} ... {area.last:#x}"
            if area.locks:
                return unmapped, SysError(errno.EBUSY, f"{name} is locked by an object: destroy that first")
            if area.iova < start or area.last > last:
                return unmapped, SysError(
                    errno.ENOENT, f"{name} is only partly in {iova:#x} ... {last:#x}: unmap whole areas"
                )
            if area.iova != start:
                tries = 0
            if area.accesses:
                start = area.iova
                area.prevent_access = True
                self.notify_unmap(area.iova, area.length)
                tries += 1
                if tries > _UNMAP_TRIES:
                    self.iommufd.kernel.warn(f"{name}: {area.accesses} pins of accesses stay")
                    return unmapped, SysError(errno.EDEADLOCK, f"{name} is pinned, and stays so")
                continue
            area.unfill(self.domains)
            self._remove(area)
            area.pages.put()
            unmapped += area.length
            start = area.last + 1
        return unmapped, None

    # ---- accesses

    def add_access(self, access: Access) -> int:
        """An access looks at this IOAS from now on (iopt_add_access); its number here.

        :raises SysError: EADDRINUSE: areas are not aligned as it needs them. Nothing changed.
        """
        number = next(n for n in count() if n not in self.accesses)
        self.accesses[number] = access
        try:
            self._set_alignment()
        except SysError:
            del self.accesses[number]
            raise
        return number

    def remove_access(self, number: int) -> None:
        """iopt_remove_access."""
        del self.accesses[number]
        self._set_alignment()

    def notify_unmap(self, iova: int, length: int) -> None:
        """Have drivers let go of [iova, iova + length) (iommufd_access_notify_unmap)."""
        for _, access in sorted(self.accesses.items()):
            if access.ops is not None:
                access.ops.unmap(iova, length)

    def cut(self, iova: int) -> None:
        """Split the area so that one ends at ``iova`` (iopt_area_split)."""
        self.check_mutable()
        area = self.area_at(iova, iova)
        if area is None or iova in (area.iova, area.last):
            return
        if area.prevent_access:
            raise SysError(errno.EBUSY, f"the area at {area.iova:#x} is about to be unmapped")
        start = iova + 1
        rhs_byte = area.start_byte + start - area.iova
        if (start | rhs_byte) & (self.iova_alignment - 1):
            raise SysError(errno.EINVAL, f"a cut at {start:#x} is not aligned to {self.iova_alignment:#x}")
        if area.accesses:
            raise SysError(errno.EINVAL, f"the area at {area.iova:#x} is pinned by accesses")
        if area.storage is not None and not self.disable_large_pages:
            raise SysError(errno.EINVAL, f"the area at {area.iova:#x} may be mapped with huge pages")
        self._need(area)
        for domain in self.domains:
            if domain.leaf_across(start):
                raise SysError(
                    errno.EINVAL,
                    f"a leaf of an adopted table crosses {start:#x} in the area at {area.iova:#x}",
                )
        self._remove(area)
        left = Area(self, area.iova, iova, area.pages, area.start_byte, area.prot)
        right = Area(self, start, area.last, area.pages.get(), rhs_byte, area.prot)
        if area.storage is not None:
            del area.pages.stored[id(area)]
            left.store(area.storage)
            right.store(area.storage)
        self._insert(left)
        self._insert(right)

    # ---- ranges

    def holes(self) -> list[Range]:
        """The IOVA ranges that are not reserved (iommufd_ioas_iova_ranges)."""
        return subtract([Range(0, ULONG_MAX)], [r for r, _ in self.reserved])

    def set_allowed(self, ranges: list[Range]) -> None:
        """iopt_set_allow_iova. :raises SysError: EADDRINUSE."""
        for wanted in ranges:
            for reserved, _ in self.reserved:
                if reserved.overlaps(wanted):
                    raise SysError(
                        errno.EADDRINUSE,
                        f"IOAS {self.id}: {wanted.start:#x} ... {wanted.last:#x} touches a reserved range",
                    )
        self.allowed = sorted(ranges)

    def reserve(self, wanted: Range, owner: object) -> None:
        """iopt_reserve_iova. :raises SysError: EADDRINUSE."""
        if self.area_at(wanted.start, wanted.last) is not None or any(
            a.overlaps(wanted) for a in self.allowed
        ):
            raise SysError(
                errno.EADDRINUSE,
                f"IOAS {self.id}: {wanted.start:#x} ... {wanted.last:#x} must be reserved, "
                "but is mapped or allowed",
            )
        insort(self.reserved, (wanted, owner), key=lambda item: item[0])

    def unreserve(self, owner: object) -> None:
        """iopt_remove_reserved_iova."""
        self.reserved = [item for item in self.reserved if item[1] is not owner]

    # ---- huge pages and alignment

    def set_huge_pages(self, enable: bool) -> None:
        """iopt_enable_large_pages, iopt_disable_large_pages.

        :raises SysError: EINVAL once something is mapped.
        """
        if enable:
            self.disable_large_pages = False
            self._set_alignment()
            return
        if self.disable_large_pages:
            return
        if self.domains and self.areas:
            raise SysError(errno.EINVAL, f"IOAS {self.id}: domains have pages mapped already")
        self.disable_large_pages = True
        try:
            self._set_alignment()
        except SysError:
            self.disable_large_pages = False
            raise

    def _set_alignment(self) -> None:
        """iopt_calculate_iova_alignment."""
        new = FRAME_BYTES if self.disable_large_pages else 1
        new = max([new, *(domain.page_bytes for domain in self.domains)])
        new = max([new, *(access.iova_alignment for access in self.accesses.values())])
        if new > self.iova_alignment:
            self._check_alignment(new)
        self.iova_alignment = new

    def _check_alignment(self, alignment: int) -> None:
        mask = alignment - 1
        for area in self.areas:
            if (area.iova | area.length | area.page_offset) & mask:
                raise SysError(
                    errno.EADDRINUSE,
                    f"IOAS {self.id}: area at {area.iova:#x} is not aligned to {alignment:#x}",
                )

    # ---- domains

    def add_domain(self, domain: Domain, *, adopted: bool = False, proof: Adoption | None = None) -> None:
        """Show all areas in ``domain`` (iopt_table_add_domain).

        :param adopted: the domain's table holds them already: pages are pinned, the table is not touched.
        :param proof: that is not proved yet, and this is what will prove it: nothing is pinned either.
        :raises SysError: nothing changed.
        """
        if domain in self.domains:
            raise SysError(errno.EEXIST, f"IOAS {self.id}: the domain is added already")
        alignment = max(domain.page_bytes, self.iova_alignment)
        if alignment > FRAME_BYTES:
            raise SysError(
                errno.EINVAL,
                f"IOAS {self.id}: IOMMU pages of {alignment:#x} bytes are larger than the kernel's page, "
                "and nothing guarantees that so much is contiguous",
            )
        if alignment != self.iova_alignment:
            self._check_alignment(alignment)
        try:
            if domain.aperture_start:
                self.reserve(Range(0, domain.aperture_start - 1), domain)
            if domain.aperture_last != ULONG_MAX:
                self.reserve(Range(domain.aperture_last + 1, ULONG_MAX), domain)
            filled: list[Area] = []
            try:
                for area in self.areas:
                    if proof is not None:
                        area.fill_deferred(domain)
                    elif adopted:
                        area.fill_adopted(domain)
                    else:
                        area.fill_more(domain)
                    filled.append(area)
            except SysError:
                for area in filled:
                    self._undo_fill(area, domain, adopted=adopted)
                raise
        except SysError:
            self.unreserve(domain)
            raise
        self.iova_alignment = alignment
        self.domains.append(domain)
        if proof is not None:
            proof.begin()

    def _undo_fill(self, area: Area, domain: Domain, *, adopted: bool) -> None:
        if not adopted:
            if area.storage is domain:
                area.unfill_last(domain)
            else:
                domain.unmap(area.iova, area.last)
        elif area.storage is domain:
            # The table stays: only the pins that fill_adopted took go again, found at their origin.
            del area.pages.stored[id(area)]
            area.storage = None
            for r in area.pages.unpinned(area.first_page, area.last_page):
                area.pages.kernel.frames.unpin(area.pages.lookup(r.start, r.last))
            area.pages.charge()

    def remove_domain(self, domain: Domain) -> None:
        """Take the areas out of ``domain`` (iopt_table_remove_domain); pages of the last one are unpinned.

        The table of a domain that is not wholly proved is not taken apart: it is about to be freed.
        """
        index = self.domains.index(domain)
        # iopt_table_remove_domain keeps the xarray dense by moving its last entry into the gap.
        tail = self.domains.pop()
        if index < len(self.domains):
            self.domains[index] = tail
        for area in self.areas:
            if self.domains:
                if area.storage is domain:
                    area.move(self.domains[0])
                if domain.proof is None:
                    domain.unmap(area.iova, area.last)
            elif area.storage is not None and domain.proof is not None:
                area.release()
            elif area.storage is not None:
                area.unfill_last(domain)
        if domain.proof is not None:
            domain.proof.end()
        self.unreserve(domain)
        self._set_alignment()

    # ---- end

    def destroy(self) -> None:
        """iommufd_ioas_destroy."""
        self.iommufd.forget_compat(self)
        for area in list(self.areas):
            area.unfill(self.domains)
            self._remove(area)
            area.pages.put()

    def claims(self) -> Iterable[Claim]:
        """The pins of all areas."""
        for area in self.areas:
            yield from area.claims()
