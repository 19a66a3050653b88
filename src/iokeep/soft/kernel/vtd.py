# SPDX-License-Identifier: Apache-2.0
"""The IOMMU driver: root, context and PASID tables in memory, domains, attachment, invalidation.

Follows drivers/iommu/intel/{iommu,pasid,cache}.c. A device is moved from one domain to another *hitlessly*:
the structure above its entry is copied, the copy changed, and one 64-bit store switches hardware to the copy
(legacy: the root entry; scalable mode: the PASID directory entry). Every transaction meets the old
translation or the new one.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from iokeep.errors import IokeepError
from iokeep.pt.build import AlreadyMapped, Table
from iokeep.pt.extents import Extents
from iokeep.pt.formats.base import Format
from iokeep.pt.registry import open_format
from iokeep.pt.roots import vtd as codec
from iokeep.soft.hardware import registers as reg
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
from iokeep.soft.kernel.queue import InvalidationQueue
from iokeep.soft.kernel.syserror import SysError

if TYPE_CHECKING:
    from iokeep.soft.kernel.iommufd import Iommufd
    from iokeep.soft.kernel.kernel import Kernel

#: domain ids that Linux never gives to a paging domain: 0, and FLPT_DEFAULT_DID
FIRST_DID = 2
#: RID_PASID of every context entry (IOMMU_NO_PASID)
NO_PASID = 0
#: PDTS of our PASID directories: 2**7 entries in their one page, 8192 PASIDs
PDTS = 0
MODES = ("legacy", "scalable-fs", "scalable-ss")


@dataclass(eq=False)
class PciDevice:
    """A device behind the IOMMU.

    :param index: its number on the platform. :param bdf: requester id. ``domain``: what translates its DMA,
        None = blocked. ``owner``: the iommufd that its DMA belongs to.
    """

    index: int
    bdf: int
    domain: Domain | None = None
    owner: Iommufd | None = None
    has_ats: bool = False

    @property
    def name(self) -> str:
        """0000:00:04.0"""
        return codec.bdf_text(self.bdf)


class Domain:
    """A paging domain: a table, its id in the IOMMU's caches, and the devices that it translates for.

    The frames of the table are remembered apart from the table: a table that was tampered with cannot make
    the driver free what is not its own.
    """

    def __init__(
        self, vtd: Vtd, fmt: Format, domain_id: int, root_pa: int | None = None, pages: U64 | None = None
    ) -> None:
        self.vtd = vtd
        self.fmt = fmt
        self.domain_id = domain_id
        self.devices: set[PciDevice] = set()
        self._pfns: set[int] = set()
        self._unlinked: list[I64] = []
        self._freed = False
        ram = vtd.kernel.frames.ram
        if root_pa is None:
            self.table = Table.create(fmt, ram, self._alloc, self._unlink)
        else:
            self._pfns.update(
                pfns_of(pages if pages is not None else np.array([root_pa], np.uint64)).tolist()
            )
            self.table = Table(fmt, ram, root_pa, self._alloc, self._unlink)

    @property
    def levels(self) -> int:
        """Levels of the table."""
        return len(self.fmt.levels)

    @property
    def root_pa(self) -> int:
        """Root of the table."""
        return self.table.root_pa

    @property
    def aperture_last(self) -> int:
        """Last IOVA that the domain can map: of the first stage's sign-extended space the lower half."""
        return (1 << (self.fmt.input_lg2 - self.fmt.sign_extend)) - 1

    @property
    def table_pfns(self) -> I64:
        """Frames of all table pages, sorted."""
        return np.array(sorted(self._pfns), np.int64)

    @property
    def table_pages(self) -> U64:
        """pas of all table pages, sorted."""
        return pas_of(self.table_pfns)

    # ---- what iommu_domain_ops do

    def map(self, extents: Extents, max_lg2: int | None = None) -> None:
        """Map all of ``extents`` (iommu_map for each run).

        :raises SysError: ENOMEM, EADDRINUSE; nothing is mapped then.
        """
        try:
            self.table.map(extents, max_lg2)
        except OutOfMemory as error:
            raise SysError(errno.ENOMEM, f"domain {self.domain_id}: {error}") from error
        except AlreadyMapped as error:
            raise SysError(errno.EADDRINUSE, f"domain {self.domain_id}: {error}") from error
        except ValueError as error:
            raise SysError(errno.ERANGE, f"domain {self.domain_id}: {error}") from error
        if self._unlinked:
            self._release_unlinked()

    def unmap(self, iova: int, last: int) -> None:
        """Unmap [iova, last] and flush: no DMA reaches the pages when it returns (iommu_unmap_nofail).

        Where the table does not hold what the kernel believes, it warns and leaves what it cannot take out.
        """
        try:
            removed = self.table.unmap(iova, last)
        except (ValueError, IokeepError) as error:
            self.vtd.kernel.warn(f"domain {self.domain_id}: unmap of {iova:#x} ... {last:#x}: {error}")
            self.vtd.flush_range(self, iova, last)
            return
        if len(removed):
            self.vtd.flush_range(self, iova, last)

    def iova_to_phys(self, iovas: U64) -> U64:
        """pa of each IOVA, 0 where nothing translates (iommu_iova_to_phys)."""
        try:
            return self.table.iova_to_phys(iovas)
        except IokeepError as error:
            self.vtd.kernel.warn(f"domain {self.domain_id}: iova_to_phys: {error}")
            return np.array([self._one_phys(iova) for iova in iovas], np.uint64)

    def _one_phys(self, iova: np.uint64) -> int:
        try:
            return int(self.table.iova_to_phys(np.array([iova], np.uint64))[0])
        except IokeepError:
            return 0

    def free(self) -> None:
        """Give the table's frames and the domain id back. The domain must have no devices."""
        if self._freed:
            return
        if self.devices:
            raise AssertionError(f"domain {self.domain_id} freed under {len(self.devices)} devices")
        self._freed = True
        frames = self.vtd.kernel.frames
        frames.put(self.table_pfns)
        self._pfns.clear()
        self.vtd.forget(self)

    # ---- table pages

    def _alloc(self, n: int) -> U64:
        pfns = self.vtd.kernel.frames.alloc(n, TAG_KERNEL, Kind.PGTABLE)
        self._pfns.update(pfns.tolist())
        return pas_of(pfns)

    def _unlink(self, pas: U64) -> None:
        """Pages that no item points to any more; hardware may still have them in its caches."""
        self._unlinked.append(pfns_of(pas))

    def _release_unlinked(self) -> None:
        self.vtd.flush_domain(self)
        for pfns in self._unlinked:
            mine = pfns[np.array([int(p) in self._pfns for p in pfns], np.bool_)]
            self._pfns.difference_update(mine.tolist())
            self.vtd.kernel.frames.put(mine)
        self._unlinked.clear()

    def claims(self) -> Iterable[Claim]:
        """The table's frames."""
        yield Claim(f"domain {self.domain_id}", self.table_pfns, tag=TAG_KERNEL)


@dataclass
class Inherited:
    """The IOMMU as another kernel left it, translating (see :meth:`Vtd.inherit`).

    :param rtaddr: value of RTADDR_REG. :param structure_pages: pas of its root, context and PASID tables.
    """

    rtaddr: int
    structure_pages: U64


@dataclass
class _Pasid:
    """A device's PASID structures."""

    directory_pa: int
    table_pa: int


@dataclass
class _Structures:
    """Where the tables above the domains are."""

    root_pa: int = 0
    #: bus -> pa of its context table; scalable: (bus << 1 | upper half)
    contexts: dict[int, int] = field(default_factory=dict)
    #: device index -> PASID directory and table
    pasids: dict[int, _Pasid] = field(default_factory=dict)


class Vtd:
    """The IOMMU of the platform.

    Parameters of the kernel: ``iommu`` = legacy, scalable-fs (first stage) or scalable-ss; ``levels`` = 3, 4
    or 5.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.regs = kernel.platform.iommu
        self.mode = kernel.params.choice("iommu", "legacy", MODES)
        self.scalable = self.mode != "legacy"
        self.cap = self.regs.read64(reg.DMAR_CAP_REG)
        self.ecap = self.regs.read64(reg.DMAR_ECAP_REG)
        self.fmt = self._format(kernel.params.number("levels", 4))
        self.devices = [PciDevice(i, kernel.platform.bdf(i)) for i in range(kernel.platform.n_devices)]
        #: live domains by id
        self.domains: dict[int, Domain] = {}
        self._at = _Structures()
        self._inherited: Inherited | None = None
        self._queue: InvalidationQueue | None = None
        self._command = 0
        self._max_am = self.cap >> 48 & 0x3F

    def _format(self, levels: int) -> Format:
        first_stage = self.mode == "scalable-fs"
        if self.scalable and not self.ecap >> 43 & 1:
            raise IokeepError("the IOMMU has no scalable mode (ECAP.SMTS)")
        if first_stage:
            large = 30 if self.cap >> 56 & 1 else 21
            return open_format("x86_64", {"levels": levels, "max_leaf_lg2": large})
        if not self.cap >> 8 & 1 << (levels - 2):
            raise IokeepError(f"the IOMMU has no second-stage tables of {levels} levels (CAP.SAGAW)")
        sizes = self.cap >> 34 & 3
        return open_format(
            "vtdss", {"levels": levels, "max_leaf_lg2": 30 if sizes & 2 else 21 if sizes else 12}
        )

    # ---- boot

    def inherit(self, state: Inherited) -> None:
        """At an early boot hook: go on with the structures that the old kernel left, which this kernel's
        allocator has reserved. :raises IokeepError: they lead out of the pages that were preserved.
        """
        pages = set(state.structure_pages.tolist())
        scalable = (state.rtaddr & codec.RTADDR_TTM_MASK) >> codec.RTADDR_TTM_SHIFT == codec.TTM_SCALABLE
        at = _Structures(root_pa=state.rtaddr & codec.PA_MASK)

        def known(pa: int, what: str) -> int:
            if pa not in pages:
                raise IokeepError(f"VT-d {what} at pa {pa:#x} is not among the preserved structure pages")
            return pa

        known(at.root_pa, "root table")
        ram = self.kernel.frames.ram
        for bus in range(256):
            for half in range(2 if scalable else 1):
                word = ram.load64(at.root_pa + bus * codec.ROOT_ENTRY_BYTES + 8 * half)
                if word & codec.PRESENT:
                    key = bus << 1 | half if scalable else bus
                    at.contexts[key] = known(word & codec.PA_MASK, f"context table of bus {bus:#x}")
        if scalable:
            for dev in self.devices:
                context = at.contexts.get(dev.bdf >> 7)
                word = ram.load64(codec.context_entry_pa(context, dev.bdf, scalable=True)) if context else 0
                if word & codec.PRESENT:
                    directory = known(word & codec.PA_MASK, f"PASID directory of {dev.name}")
                    entry = ram.load64(directory)
                    if entry & codec.PRESENT:
                        table = known(entry & codec.PA_MASK, f"PASID table of {dev.name}")
                        at.pasids[dev.index] = _Pasid(directory, table)
        if scalable != self.scalable:
            raise IokeepError(
                f"the IOMMU runs in {'scalable' if scalable else 'legacy'} mode, "
                f"this kernel was booted for {self.mode}"
            )
        self._at = at
        self._inherited = state

    def start(self) -> None:
        """Program the IOMMU, or take over one that is translating."""
        frames = self.kernel.frames
        self._queue = InvalidationQueue(self.regs, frames, wide=self.scalable, pump=self._pump)
        self._command = self.regs.read32(reg.DMAR_GSTS_REG) & reg.DMA_GSTS_TES
        if self._inherited is not None:
            frames.give(pfns_of(self._inherited.structure_pages), TAG_KERNEL, Kind.KERNEL)
            reached = set(self._table_pas())
            spare = [pa for pa in self._inherited.structure_pages.tolist() if pa not in reached]
            frames.put(pfns_of(np.array(spare, np.uint64)))
            self._command = self._queue.start(self._command)
            self.kernel.log(
                f"DMAR: {self.mode}, translating since before the kexec, root table {self._at.root_pa:#x}"
            )
            return
        # A root table of a kernel that handed nothing over is not ours: DMA through it must stop first.
        self._command &= ~reg.DMA_GCMD_TE
        self._command = self._queue.start(self._command)
        self._at.root_pa = self._page()
        self.regs.write64(reg.DMAR_RTADDR_REG, codec.rtaddr_value(self._at.root_pa, scalable=self.scalable))
        self.regs.write32(reg.DMAR_GCMD_REG, self._command | reg.DMA_GCMD_SRTP)
        flush = [codec.inv_context_global()]
        if self.scalable:
            flush.append(codec.inv_pasid_cache(0, codec.PC_GLOBAL))
        self._queue.submit([*flush, codec.inv_iotlb_global()])
        self._command |= reg.DMA_GCMD_TE
        self.regs.write32(reg.DMAR_GCMD_REG, self._command)
        self.kernel.log(
            f"DMAR: {self.mode}, {self.fmt.name} {len(self.fmt.levels)} levels, "
            f"root table {self._at.root_pa:#x}"
        )

    def _pump(self) -> None:
        if self.kernel.pump is not None:
            self.kernel.pump()

    @property
    def rtaddr(self) -> int:
        """Value of RTADDR_REG."""
        return self.regs.read64(reg.DMAR_RTADDR_REG)

    def _table_pas(self) -> list[int]:
        pas = [self._at.root_pa, *self._at.contexts.values()]
        for pasid in self._at.pasids.values():
            pas += (pasid.directory_pa, pasid.table_pa)
        return pas

    def structure_pages(self) -> U64:
        """pas of the root, context and PASID tables: what must survive for hardware to go on. Sorted."""
        return np.array(sorted(self._table_pas()), np.uint64)

    # ---- domains

    def alloc_domain(self) -> Domain:
        """An empty domain. :raises SysError: ENOMEM, ENOSPC (no domain id left)."""
        domain_id = FIRST_DID
        while domain_id in self.domains:
            domain_id += 1
        if domain_id >= 1 << (4 + 2 * (self.cap & 7)):
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
        if domain_id in self.domains or domain_id < FIRST_DID:
            raise IokeepError(f"domain id {domain_id} of a prior domain is taken")
        if root_pa not in set(table_pages.tolist()):
            raise IokeepError(f"root {root_pa:#x} of prior domain {domain_id} is not among its table pages")
        domain = Domain(self, fmt, domain_id, root_pa, table_pages)
        self.kernel.frames.give(pfns_of(table_pages), TAG_KERNEL, Kind.PGTABLE)
        self.domains[domain_id] = domain
        return domain

    def forget(self, domain: Domain) -> None:
        """The domain is freed; its id may be used again."""
        if self.domains.get(domain.domain_id) is domain:
            del self.domains[domain.domain_id]

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
        old, aside = dev.domain, 0
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
        if aside:
            self.kernel.frames.put(np.array([aside >> FRAME_SHIFT], np.int64))

    def _attach(self, dev: PciDevice, domain: Domain) -> None:
        """From blocked: fill the entry, its present bit last. Not-present entries are not cached (CAP.CM =
        0).
        """
        if self.scalable:
            pasid = self._at.pasids.get(dev.index) or self._new_pasid(dev)
            self._store_last_first(pasid.table_pa, self._pasid_entry(domain))
        else:
            context = self._context_table(dev.bdf >> 8)
            self._store_last_first(
                codec.context_entry_pa(context, dev.bdf, scalable=False), self._context_entry(domain)
            )

    def _replace(self, dev: PciDevice, domain: Domain) -> int:
        """From one domain to another: a copy of the table with the entry, switched to by one 64-bit store."""
        ram = self.kernel.frames.ram
        aside = self._page()
        if self.scalable:
            pasid = self._at.pasids[dev.index]
            old = pasid.table_pa
            ram.write(aside, ram.read(old, codec.TABLE_BYTES))
            self._store_last_first(aside, self._pasid_entry(domain))
            ram.store64(pasid.directory_pa, codec.pasid_dir_entry(aside))
            pasid.table_pa = aside
        else:
            bus = dev.bdf >> 8
            old = self._at.contexts[bus]
            ram.write(aside, ram.read(old, codec.TABLE_BYTES))
            self._store_last_first(
                codec.context_entry_pa(aside, dev.bdf, scalable=False), self._context_entry(domain)
            )
            ram.store64(codec.root_entry_pa(self._at.root_pa, dev.bdf), codec.root_entry(aside)[0])
            self._at.contexts[bus] = aside
        return old

    def _block(self, dev: PciDevice) -> None:
        """Clear the entry, its present bit first."""
        ram = self.kernel.frames.ram
        if self.scalable:
            pa, words = self._at.pasids[dev.index].table_pa, 8
        else:
            pa, words = codec.context_entry_pa(self._at.contexts[dev.bdf >> 8], dev.bdf, scalable=False), 2
        for i in range(words):
            ram.store64(pa + 8 * i, 0)

    def _store_last_first(self, pa: int, words: tuple[int, ...]) -> None:
        """Store an entry so that its first word, which has the present bit, is visible last."""
        ram = self.kernel.frames.ram
        for i in range(len(words) - 1, -1, -1):
            ram.store64(pa + 8 * i, words[i])

    def _context_entry(self, domain: Domain) -> tuple[int, ...]:
        return codec.context_entry(domain.root_pa, domain.levels, domain.domain_id)

    def _pasid_entry(self, domain: Domain) -> tuple[int, ...]:
        if domain.fmt.name == "x86_64":
            return codec.pasid_entry_first_stage(domain.root_pa, domain.levels, domain.domain_id)
        return codec.pasid_entry_second_stage(domain.root_pa, domain.levels, domain.domain_id)

    def _context_table(self, bus: int) -> int:
        pa = self._at.contexts.get(bus)
        if pa is None:
            pa = self._page()
            self.kernel.frames.ram.store64(
                self._at.root_pa + bus * codec.ROOT_ENTRY_BYTES, codec.root_entry(pa)[0]
            )
            self._at.contexts[bus] = pa
        return pa

    def _new_pasid(self, dev: PciDevice) -> _Pasid:
        """Context table (where missing), PASID directory and PASID table of a device."""
        ram = self.kernel.frames.ram
        key = dev.bdf >> 7
        context = self._at.contexts.get(key)
        if context is None:
            context = self._page()
            word = codec.sm_root_entry(context, None)[0]
            ram.store64(self._at.root_pa + (key >> 1) * codec.ROOT_ENTRY_BYTES + 8 * (key & 1), word)
            self._at.contexts[key] = context
        directory = self._page()
        try:
            table = self._page()
        except OutOfMemory:
            self.kernel.frames.put(np.array([directory >> FRAME_SHIFT], np.int64))
            raise
        ram.store64(directory, codec.pasid_dir_entry(table))
        entry = codec.sm_context_entry(directory, PDTS, NO_PASID)
        self._store_last_first(codec.context_entry_pa(context, dev.bdf, scalable=True), entry)
        pasid = _Pasid(directory, table)
        self._at.pasids[dev.index] = pasid
        return pasid

    def _page(self) -> int:
        return int(self.kernel.frames.alloc(1, TAG_KERNEL, Kind.KERNEL)[0]) << FRAME_SHIFT

    # ---- caches

    def _submit(self, descriptors: list[codec.Descriptor]) -> None:
        if self._queue is None:
            raise IokeepError("the IOMMU driver has not started")
        self._queue.submit(descriptors)

    def _flush_device(self, dev: PciDevice, domain_id: int) -> None:
        """After the entry of ``dev`` changed: its context (or PASID) entry and what was cached under the old
        id.
        """
        if self.scalable:
            flush = [
                codec.inv_pasid_cache(domain_id, codec.PC_PASID, NO_PASID),
                codec.inv_piotlb_pasid(domain_id, NO_PASID),
                codec.inv_iotlb_domain(domain_id),
            ]
        else:
            flush = [codec.inv_context_device(domain_id, dev.bdf), codec.inv_iotlb_domain(domain_id)]
        self._submit(flush)

    def flush_range(self, domain: Domain, iova: int, last: int) -> None:
        """Forget what is cached of [iova, last]; DMA that began before is over when this returns."""
        if not domain.devices:
            return
        first_stage = domain.fmt.name == "x86_64"
        block = codec.page_mask(iova, last, self._max_am)
        if block is None:
            self.flush_domain(domain)
        elif first_stage:
            self._submit([codec.inv_piotlb_pages(domain.domain_id, block[0], block[1], NO_PASID)])
        else:
            self._submit([codec.inv_iotlb_pages(domain.domain_id, block[0], block[1])])

    def flush_domain(self, domain: Domain) -> None:
        """Forget all that is cached of the domain."""
        if not domain.devices:
            return
        if domain.fmt.name == "x86_64":
            self._submit([codec.inv_piotlb_pasid(domain.domain_id, NO_PASID)])
        else:
            self._submit([codec.inv_iotlb_domain(domain.domain_id)])

    # ---- inspection

    def root_of(self, dev: PciDevice) -> codec.RootInfo:
        """What hardware will find for ``dev``, read from memory.

        :raises codec.RootFault: nothing translates.
        """
        return codec.find_root(self.kernel.frames.ram, self.rtaddr, dev.bdf)

    def claims(self) -> Iterable[Claim]:
        """Frames of the structures, the queue, and all tables."""
        pas = self._table_pas() if self._at.root_pa else []
        yield Claim("VT-d structures", pfns_of(np.array(pas, np.uint64)), tag=TAG_KERNEL)
        if self._queue is not None:
            yield Claim("VT-d invalidation queue", self._queue.pfns, tag=TAG_KERNEL)
        for domain in self.domains.values():
            yield from domain.claims()
