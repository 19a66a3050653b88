# SPDX-License-Identifier: Apache-2.0
"""What iommufd needs of an IOMMU driver, whatever the IOMMU: domains, devices, attachment, flushing.

Follows include/linux/iommu.h: ``iommu_ops`` and ``iommu_domain_ops``. The drivers are in
:mod:`iokeep.soft.kernel.drivers`, one for each kind of IOMMU.

A device is moved from one domain to another *hitlessly*: the structure above its entry is copied, the copy
changed, and one 64-bit store switches hardware to the copy. Every transaction meets the old translation or
the new one.
"""

from __future__ import annotations

import errno
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np

from iokeep.errors import IokeepError
from iokeep.mem.ranges import Range
from iokeep.pt.build import AlreadyMapped, Table
from iokeep.pt.diff import normalised
from iokeep.pt.digest import KEY_BYTES, Digest
from iokeep.pt.extents import Extents
from iokeep.pt.formats.base import Format
from iokeep.pt.registry import open_format
from iokeep.pt.roots.base import RootFault, TableRoot
from iokeep.pt.roots.find import find_root_of
from iokeep.pt.roots.vtd import bdf_text
from iokeep.pt.shape import crossing
from iokeep.soft.hardware.platform import Platform
from iokeep.soft.kernel.frames import (
    FRAME_SHIFT,
    I64,
    TAG_KERNEL,
    U64,
    Claim,
    Kind,
    OutOfMemory,
    pas_of,
    pfns_of,
)
from iokeep.soft.kernel.nesting import GuestOps
from iokeep.soft.kernel.syserror import SysError
from iokeep.uapi.iommufd import IOMMU_HWPT_ALLOC_DIRTY_TRACKING, IOMMU_HWPT_ALLOC_NEST_PARENT

if TYPE_CHECKING:
    from iokeep.soft.kernel.deferred import Adoption
    from iokeep.soft.kernel.iommufd import Iommufd
    from iokeep.soft.kernel.kernel import Kernel
    from iokeep.soft.kernel.userdata import UserData


@dataclass(eq=False)
class PciDevice:
    """A device behind the IOMMU.

    :param index: its number on the platform. :param bdf: requester id. ``domain``: what translates its DMA,
        None = blocked. ``owner``: the iommufd that its DMA belongs to. ``max_pasids``: one more than its last
        PASID; no device of a platform has any.
    """

    index: int
    bdf: int
    domain: Domain | None = None
    owner: Iommufd | None = None
    has_ats: bool = False
    max_pasids: int = 0

    @property
    def name(self) -> str:
        """0000:00:04.0"""
        return bdf_text(self.bdf)


class DirtyOps(Protocol):
    """Which pages devices have written (struct iommu_dirty_ops)."""

    def track(self, enable: bool) -> None:
        """Begin or end."""

    def read(self, iova: int, last: int, *, clear: bool) -> Iterable[Range]:
        """What was written in [iova, last], in whole leaves."""


class Domain:
    """A paging domain: a table, its id in the IOMMU's caches, and the devices that it translates for.

    The frames of the table are remembered apart from the table: a table that was tampered with cannot make
    the driver free what is not its own.
    """

    def __init__(
        self, iommu: Iommu, fmt: Format, domain_id: int, root_pa: int | None = None, pages: U64 | None = None
    ) -> None:
        self.iommu = iommu
        self.domain_id = domain_id
        self.devices: set[PciDevice] = set()
        self._pfns: set[int] = set()
        self._unlinked: list[I64] = []
        self._freed = False
        #: an adopted table that is not wholly proved: what proves it
        self.proof: Adoption | None = None
        #: where the driver can, and the domain was made for it
        self.dirty: DirtyOps | None = None
        #: digest of what it translates, kept up to date from the moment it is to be preserved
        self.seal: Digest | None = None
        #: bytes of a table where the table code names no size
        self._table_bytes = fmt.table_bytes
        ram = iommu.kernel.frames.ram
        if pages is not None:
            self._pfns.update(pfns_of(pages).tolist())
        if root_pa is None:
            self.table = Table.create(fmt, ram, self._alloc, self._unlink)
        else:
            self.table = Table(fmt, ram, root_pa, self._alloc, self._unlink)

    @property
    def fmt(self) -> Format:
        """Format of the table, with the levels that it has now."""
        return self.table.fmt

    @property
    def levels(self) -> int:
        """Levels of the table."""
        return len(self.fmt.levels)

    @property
    def root_pa(self) -> int:
        """Root of the table."""
        return self.table.root_pa

    @property
    def page_bytes(self) -> int:
        """The smallest page that it can map: what IOVAs are aligned to."""
        return 1 << self.fmt.levels[0].shift

    @property
    def _largest(self) -> Format:
        """The format with as many levels as the table can grow to."""
        fmt = self.fmt
        while (larger := self.iommu.larger(fmt)) is not None:
            fmt = larger
        return fmt

    @property
    def page_sizes(self) -> int:
        """Bit n: it can have leaves of 2**n bytes (pgsize_bitmap)."""
        return sum(1 << lg2 for lg2 in set(self._largest.leaf_lg2s))

    @property
    def enforces_coherency(self) -> bool:
        """DMA of its devices snoops the CPU's caches whatever a device asks for."""
        return self.iommu.ENFORCES_COHERENCY

    @property
    def aperture_start(self) -> int:
        """First IOVA that the domain can map."""
        return 0

    @property
    def aperture_last(self) -> int:
        """Last IOVA that the domain can map: of the first stage's sign-extended space the lower half; of a
        table that grows, what its largest size reaches.
        """
        fmt = self._largest
        return (1 << (fmt.input_lg2 - fmt.sign_extend)) - 1

    @property
    def table_pfns(self) -> I64:
        """Frames of all table pages, sorted."""
        return np.array(sorted(self._pfns), np.int64)

    @property
    def table_pages(self) -> U64:
        """pas of all table pages of 4096 bytes, sorted: a larger table is several of them."""
        return pas_of(self.table_pfns)

    def need(self, iova: int, last: int) -> None:
        """Before anything of [iova, last] is read back or changed: the table there is what iommufd believes.

        :raises SysError: EUCLEAN: it was adopted, and is not; nothing has changed.
        """
        if self.proof is not None:
            self.proof.need(iova, last)

    def _believed(self, iova: int, last: int) -> None:
        if self.proof is not None and not self.proof.holds(iova, last):
            raise AssertionError(f"domain {self.domain_id}: {iova:#x} ... {last:#x} is used before its proof")

    def leaf_across(self, iova: int) -> bool:
        """A leaf, or a contiguous entry, begins before ``iova`` and goes on at it."""
        cuts = np.array([iova], np.uint64)
        return bool(len(crossing(self.fmt, self.iommu.kernel.frames.ram, self.root_pa, cuts)))

    # ---- what iommu_domain_ops do

    def map(self, extents: Extents, max_lg2: int | None = None) -> None:
        """Map all of ``extents`` (iommu_map for each run). A table that can grow does so where they need it.

        :raises SysError: EINVAL: neither to be read nor written; ENOMEM, EADDRINUSE, ERANGE. Nothing is
            mapped then.
        """
        if not extents.prot.all():  # VFIO_IOMMU_MAP_DMA lets it come so far; NS_MAP of generic_pt/iommu_pt.h
            raise SysError(
                errno.EINVAL, f"domain {self.domain_id}: a leaf that can neither be read nor written"
            )
        for i in range(len(extents) if self.proof is not None else 0):
            self._believed(int(extents.iova[i]), int(extents.last[i]))
        try:
            if len(extents):
                self._grow(int(extents.last[-1]))
            self.table.map(extents, max_lg2)
        except OutOfMemory as error:
            raise SysError(errno.ENOMEM, f"domain {self.domain_id}: {error}") from error
        except AlreadyMapped as error:
            raise SysError(errno.EADDRINUSE, f"domain {self.domain_id}: {error}") from error
        except ValueError as error:
            raise SysError(errno.ERANGE, f"domain {self.domain_id}: {error}") from error
        if self._unlinked:
            self._release_unlinked()
        if self.seal is not None:
            self.seal.add(normalised(extents, self.fmt.write_only))

    def _grow(self, last: int) -> None:
        """New levels on top until the table reaches ``last`` (iova), or cannot grow any more. :raises
        SysError: what the driver refuses; the table is as it was before that level.
        """
        while last >> self.fmt.input_lg2 and (fmt := self.iommu.larger(self.fmt)) is not None:
            before = self.table
            self.table = before.grown(fmt)
            try:
                self.iommu.grow(self)
            except BaseException:
                root = pfns_of(np.array([self.root_pa], np.uint64))
                self.table = before
                self._pfns.difference_update(root.tolist())
                self.iommu.kernel.frames.put(root)
                raise

    def unmap(self, iova: int, last: int) -> None:
        """Unmap [iova, last] and flush: no DMA reaches the pages when it returns (iommu_unmap_nofail).

        Where the table does not hold what the kernel believes, it warns and leaves what it cannot take out.
        """
        self._believed(iova, last)
        try:
            removed = self.table.unmap(iova, last)
        except (ValueError, IokeepError) as error:
            self.iommu.kernel.warn(f"domain {self.domain_id}: unmap of {iova:#x} ... {last:#x}: {error}")
            self.iommu.flush_range(self, iova, last)
            return
        if len(removed):
            self.iommu.flush_range(self, iova, last)
        if self.seal is not None:
            self.seal.remove(removed.extents())

    def set_seal(self, shown: Extents) -> Digest:
        """Begin a digest of what the domain translates, under a fresh key. :param shown: what that is."""
        self.seal = Digest(secrets.token_bytes(KEY_BYTES))
        self.seal.add(normalised(shown, self.fmt.write_only))
        return self.seal

    def iova_to_phys(self, iovas: U64) -> U64:
        """pa of each IOVA, 0 where nothing translates (iommu_iova_to_phys)."""
        if self.proof is not None and len(iovas):
            self._believed(int(iovas.min()), int(iovas.max()))
        try:
            return self.table.iova_to_phys(iovas)
        except IokeepError as error:
            self.iommu.kernel.warn(f"domain {self.domain_id}: iova_to_phys: {error}")
            return np.array([self._one_phys(iova) for iova in iovas], np.uint64)

    def _one_phys(self, iova: np.uint64) -> int:
        try:
            return int(self.table.iova_to_phys(np.array([iova], np.uint64))[0])
        except IokeepError:
            return 0

    def free(self, put: Callable[[I64], None] | None = None) -> None:
        """Give the table's frames and the domain id back. The domain must have no devices.

        :param put: takes the frames; the allocator if None.
        """
        if self._freed:
            return
        if self.devices:
            raise AssertionError(f"domain {self.domain_id} freed under {len(self.devices)} devices")
        self._freed = True
        pfns = self.table_pfns
        self._pfns.clear()
        (put or self.iommu.kernel.frames.put)(pfns)
        self.iommu.forget(self)

    # ---- table pages

    def _alloc(self, n: int, size: int = 0) -> U64:
        """n zeroed tables of ``size`` bytes, a power of two; 0: of the format's. One smaller than a page has
        the page to itself (iommu_alloc_pages_node_sz()).
        """
        order = max(0, (size or self._table_bytes).bit_length() - 1 - FRAME_SHIFT)
        pfns = self.iommu.kernel.frames.alloc(n, TAG_KERNEL, Kind.PGTABLE, order=order)
        self._pfns.update(self._frames_of(pfns, order).tolist())
        return pas_of(pfns)

    def _unlink(self, pas: U64, size: int = 0) -> None:
        """Tables that no item points to any more; hardware may still have them in its caches."""
        order = max(0, (size or self._table_bytes).bit_length() - 1 - FRAME_SHIFT)
        self._unlinked.append(self._frames_of(pfns_of(pas), order))

    @staticmethod
    def _frames_of(firsts: I64, order: int) -> I64:
        return (firsts[:, None] + np.arange(1 << order, dtype=np.int64)).reshape(-1)

    def _release_unlinked(self) -> None:
        self.iommu.flush_domain(self)
        for pfns in self._unlinked:
            mine = pfns[np.array([int(p) in self._pfns for p in pfns], np.bool_)]
            self._pfns.difference_update(mine.tolist())
            self.iommu.kernel.frames.put(mine)
        self._unlinked.clear()

    def claims(self) -> Iterable[Claim]:
        """The table's frames."""
        yield Claim(f"domain {self.domain_id}", self.table_pfns, tag=TAG_KERNEL)


@dataclass
class Inherited:
    """The IOMMU as another kernel left it, translating (see :meth:`Iommu.inherit`).

    :param root_register: value of the register that the way to every table begins at. :param
        structure_pages: pas of all tables between that register and the page tables.
    """

    root_register: int
    structure_pages: U64


def root_of(platform: Platform, bdf: int) -> Found:
    """What the platform's IOMMU finds for a requester, read from its registers and memory.

    :raises RootFault: nothing translates.
    """
    hardware = platform.iommu
    found = find_root_of(hardware.hw(), platform.ram, bdf, iommu=hardware.KIND)
    if found is None or found.table is None:
        raise IokeepError(f"{bdf_text(bdf)} passes through, which no kernel here sets up")
    return Found(found.table, found.domain_id)


@dataclass(frozen=True, slots=True)
class Found:
    """What hardware finds for a device. :param domain_id: the tag of cached translations."""

    root: TableRoot
    domain_id: int

    @property
    def root_pa(self) -> int:
        """Root of the table."""
        return self.root.root_pa

    @property
    def format(self) -> str:
        """Name of the table's format."""
        return self.root.format

    @property
    def fmt(self) -> Format:
        """Format of the table, in the configuration that the structures state."""
        return open_format(self.root.format, dict(self.root.config))


def holds_root(fmt: Format, root_pa: int, pages: U64) -> bool:
    """Whether all of a root at ``root_pa`` lies in the ``pages`` (pas of 4096 bytes), aligned as hardware
    wants it.
    """
    frame = 1 << FRAME_SHIFT
    have = set(pages.tolist())
    return root_pa % fmt.root_align == 0 and all(
        pa in have for pa in range(root_pa & -frame, root_pa + fmt.root_bytes, frame)
    )


class Iommu(GuestOps, ABC):
    """The driver of the platform's IOMMU: what all kinds have in common.

    :ivar fmt: format of the domains that it makes. :ivar devices: by index on the platform.
    :ivar domains: live domains by id.
    :ivar mode: how it translates, one of ``MODES``: the kernel's ``iommu`` parameter.
    """

    #: what log lines begin with, as Linux's driver of this IOMMU does
    NAME: ClassVar[str]
    #: values of the kernel's ``iommu`` parameter; the first is the default
    MODES: ClassVar[tuple[str, ...]]
    #: the first id that a paging domain gets
    FIRST_ID: ClassVar[int] = 1
    #: its domains make DMA snoop the CPU's caches (IOMMU_CAP_ENFORCE_CACHE_COHERENCY)
    ENFORCES_COHERENCY: ClassVar[bool] = False
    #: IOVAs that no area may have where a device is attached (iommu_get_resv_regions)
    RESERVED: ClassVar[tuple[Range, ...]] = ()
    #: pa of the registers in the records, where firmware's tables would have them
    REGISTER_BASE: ClassVar[int]

    fmt: Format

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.mode = kernel.params.choice("iommu", self.MODES[0], self.MODES)
        self.devices = [PciDevice(i, kernel.platform.bdf(i)) for i in range(kernel.platform.n_devices)]
        self.domains: dict[int, Domain] = {}
        self._inherited: Inherited | None = None

    # ---- boot

    def inherit(self, state: Inherited) -> None:
        """At an early boot hook: go on with the structures that the old kernel left, which this kernel's
        allocator has reserved. :raises IokeepError: they lead out of the pages that were preserved.
        """
        self._adopt_structures(state)
        self._inherited = state

    @abstractmethod
    def _adopt_structures(self, state: Inherited) -> None:
        """Note where the structures are, checked against ``state.structure_pages``; nothing is written."""

    @abstractmethod
    def start(self) -> None:
        """Program the IOMMU, or take over one that is translating (``_inherited``)."""

    def hold(self) -> U64:
        """Take over the IOMMU as it is, where no record can be believed: no domain is known, and every device
        goes on by the structures that hardware uses. Returns the pas of these.
        """
        for dev in self.devices:
            dev.domain = None
        self.domains.clear()
        pages = self._held_structures()
        self.mode = self._held_mode()
        try:
            self.inherit(Inherited(self.root_register, pages))
        except IokeepError as error:
            self.kernel.log(f"{self.NAME}: {error.what}")
        return pages

    def _held_mode(self) -> str:
        """The mode that the registers say."""
        return self.mode

    @abstractmethod
    def _held_structures(self) -> U64:
        """pas of the structures that hardware uses for the devices, found from the registers. Sorted; what is
        not there is left out.
        """

    # ---- what the hardware is

    @property
    @abstractmethod
    def root_register(self) -> int:
        """Value of the register that the way to every table begins at."""

    @property
    @abstractmethod
    def version(self) -> int:
        """Value of the version register, for the record (u32); 0 where there is none."""

    @abstractmethod
    def structure_pages(self) -> U64:
        """pas of all tables between the register and the page tables, which must survive for hardware to go
        on. Sorted.
        """

    @abstractmethod
    def hw_info(self) -> tuple[int, bytes]:
        """What IOMMU_GET_HW_INFO tells: (enum iommu_hw_info_type, the structure)."""

    def root_of(self, dev: PciDevice) -> Found:
        """What hardware will find for ``dev``, read from memory.

        :raises RootFault: nothing translates.
        """
        return root_of(self.kernel.platform, dev.bdf)

    # ---- domains

    @property
    @abstractmethod
    def n_ids(self) -> int:
        """One more than the last domain id that hardware can tell apart."""

    def tracks_dirty(self, dev: PciDevice) -> bool:
        """Whether a domain for ``dev`` can say which pages were written (IOMMU_CAP_DIRTY_TRACKING)."""
        return False

    def alloc_paging(self, dev: PciDevice, flags: int, data: UserData | None) -> Domain:
        """An empty domain as HWPT_ALLOC wants it for ``dev`` (domain_alloc_paging_flags).

        :param flags: IOMMU_HWPT_ALLOC_*. :param data: of the driver; None: it is told nothing.
        :raises SysError: EOPNOTSUPP: no IOMMU here nests or takes data; see :meth:`alloc_domain`.
        """
        if flags & IOMMU_HWPT_ALLOC_NEST_PARENT:
            raise SysError(errno.EOPNOTSUPP, f"{dev.name}: this IOMMU has no nested translation")
        if data is not None:
            raise SysError(errno.EOPNOTSUPP, f"a paging domain with data of type {data.data_type:#x}")
        return self.alloc_domain(dirty=bool(flags & IOMMU_HWPT_ALLOC_DIRTY_TRACKING))

    def owns(self, domain: Domain) -> bool:
        """Whether this driver made the domain (domain->owner)."""
        return domain.iommu is self

    def alloc_domain(self, *, dirty: bool = False) -> Domain:
        """An empty domain. :raises SysError: ENOMEM, ENOSPC (no domain id left); EOPNOTSUPP: ``dirty``."""
        if dirty:
            raise SysError(errno.EOPNOTSUPP, "this IOMMU has no dirty tracking")
        domain_id = self.FIRST_ID
        while domain_id in self.domains:
            domain_id += 1
        if domain_id >= self.n_ids:
            raise SysError(errno.ENOSPC, f"all {len(self.domains)} domain ids are in use")
        try:
            domain = Domain(self, self.fmt, domain_id)
        except OutOfMemory as error:
            raise SysError(errno.ENOMEM, f"domain: {error}") from error
        self.domains[domain_id] = domain
        return domain

    def restore_domain(self, fmt: Format, root_pa: int, domain_id: int, table_pages: U64) -> Domain:
        """A domain around tables that came over the kexec; their frames, reserved until now, become its own.

        :raises IokeepError: the id is taken, or the root is not among the pages.
        """
        if domain_id in self.domains or not self.FIRST_ID <= domain_id < self.n_ids:
            raise IokeepError(f"domain id {domain_id} of a prior domain is taken")
        if not holds_root(fmt, root_pa, table_pages):
            raise IokeepError(f"root {root_pa:#x} of prior domain {domain_id} is not among its table pages")
        return self._around(fmt, root_pa, domain_id, table_pages)

    def hold_domain(self, fmt: Format, domain_id: int, table_pages: U64) -> Domain:
        """As :meth:`restore_domain` where the root is not to be believed: a domain that keeps the frames, and
        whose table is an empty one that no hardware uses.

        :raises IokeepError: the id is taken.
        """
        if domain_id in self.domains or not self.FIRST_ID <= domain_id < self.n_ids:
            raise IokeepError(f"domain id {domain_id} of a prior domain is taken")
        return self._around(fmt, None, domain_id, table_pages)

    def _around(self, fmt: Format, root_pa: int | None, domain_id: int, table_pages: U64) -> Domain:
        domain = Domain(self, fmt, domain_id, root_pa, table_pages)
        self.kernel.frames.give(pfns_of(table_pages), TAG_KERNEL, Kind.PGTABLE)
        self.domains[domain_id] = domain
        return domain

    def forget(self, domain: Domain) -> None:
        """The domain is freed; its id may be used again."""
        if self.domains.get(domain.domain_id) is domain:
            del self.domains[domain.domain_id]

    def larger(self, fmt: Format) -> Format | None:
        """The format of a table of ``fmt`` that has one level more; None: it does not grow, or no further."""
        return None

    def grow(self, domain: Domain) -> None:
        """The table of ``domain`` has a new root (``root_pa``, ``levels``), one level above the old one:
        hardware uses it when this returns. Both roots translate the same until then.

        :raises SysError: hardware goes on with the old root.
        """
        raise AssertionError(f"{self.NAME}: tables of {domain.fmt.name} do not grow")

    # ---- attachment

    def restored_device(self, dev: PciDevice, domain: Domain) -> None:
        """Hardware translates for ``dev`` through ``domain`` already: only note it."""
        dev.domain = domain
        domain.devices.add(dev)

    def set_domain(self, dev: PciDevice, domain: Domain | None) -> None:
        """What translates DMA of ``dev`` from now on; None blocks it. When it returns nothing of the old is
        cached.

        From one domain to another there is no instant without translation. :raises SysError: ENOMEM; nothing
        changed.
        """
        old, aside = dev.domain, None
        if domain is old:
            return
        try:
            if domain is None:
                self._block(dev)
            elif old is None:
                self._attach(dev, domain)
            else:
                aside = self._replace(dev, domain)
        except OutOfMemory as error:
            raise SysError(errno.ENOMEM, f"{dev.name}: {error}") from error
        dev.domain = domain
        if domain is not None:
            domain.devices.add(dev)
        if old is not None:
            self._flush_device(dev, old.domain_id)
            old.devices.discard(dev)
        if aside is not None:
            self.kernel.frames.put(aside)

    def block_unknown(self, dev: PciDevice) -> None:
        """Stop the translation of a device that no record knows, whatever it leads to."""
        try:
            left = self.root_of(dev)
        except RootFault:
            return
        self._block(dev)
        self._flush_device(dev, left.domain_id)

    @abstractmethod
    def _attach(self, dev: PciDevice, domain: Domain) -> None:
        """From blocked: fill the entry, its valid bit last."""

    @abstractmethod
    def _replace(self, dev: PciDevice, domain: Domain) -> I64:
        """From one domain to another, hitlessly; the frames (pfns) that the IOMMU does not use any more
        once its caches are flushed.
        """

    @abstractmethod
    def _block(self, dev: PciDevice) -> None:
        """Clear the entry, its valid bit first."""

    # ---- caches

    @abstractmethod
    def _flush_device(self, dev: PciDevice, domain_id: int) -> None:
        """After the entry of ``dev`` changed: forget it, and what was cached under the old id. When it
        returns no DMA by the old entry is in flight.
        """

    @abstractmethod
    def flush_range(self, domain: Domain, iova: int, last: int) -> None:
        """Forget what is cached of [iova, last]; DMA that began before is over when this returns. Nothing to
        do for a domain without devices.
        """

    @abstractmethod
    def flush_domain(self, domain: Domain) -> None:
        """Forget all that is cached of the domain. Nothing to do for a domain without devices."""

    # ---- helpers of the drivers

    def _pump(self) -> None:
        if self.kernel.pump is not None:
            self.kernel.pump()

    def _pages(self, n: int = 1) -> int:
        """``n`` zeroed frames in a row, a power of two, aligned to their size; the pa of the first."""
        order = n.bit_length() - 1
        pfn = int(self.kernel.frames.alloc(1, TAG_KERNEL, Kind.KERNEL, order=order)[0])
        return pfn << FRAME_SHIFT

    def _store_last_first(self, pa: int, words: Sequence[int]) -> None:
        """Store an entry of 64-bit words so that its first one, which has the valid bit, is visible last."""
        ram = self.kernel.frames.ram
        for i in range(len(words) - 1, -1, -1):
            ram.store64(pa + 8 * i, words[i])

    # ---- inspection

    @abstractmethod
    def _structure_frames(self) -> Iterable[Claim]:
        """Frames of the structures and the queues."""

    def claims(self) -> Iterable[Claim]:
        """Frames of the structures, the queues, and all tables."""
        yield from self._structure_frames()
        for domain in self.domains.values():
            yield from domain.claims()
