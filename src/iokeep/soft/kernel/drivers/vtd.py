# SPDX-License-Identifier: Apache-2.0
"""The VT-d driver: root, context and PASID tables in memory, attachment, invalidation.

Follows drivers/iommu/intel/{iommu,pasid,cache}.c. The store that switches a device to another domain is
that of the root entry (legacy mode) or of the PASID directory entry (scalable mode).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from iokeep.errors import IokeepError
from iokeep.mem.ranges import Range
from iokeep.pt.formats.base import Format
from iokeep.pt.registry import open_format
from iokeep.pt.roots import vtd as codec
from iokeep.pt.roots.base import RootFault
from iokeep.soft.hardware.units import vtd as reg
from iokeep.soft.kernel.frames import (
    FRAME_BYTES,
    FRAME_SHIFT,
    I64,
    TAG_KERNEL,
    U64,
    Claim,
    Kind,
    OutOfMemory,
    pfns_of,
)
from iokeep.soft.kernel.iommu import Domain, Inherited, Iommu, PciDevice
from iokeep.soft.kernel.queue import Command, CommandQueue
from iokeep.uapi import iommufd as uapi

if TYPE_CHECKING:
    from iokeep.soft.hardware.unit import Unit
    from iokeep.soft.kernel.frames import FrameAllocator
    from iokeep.soft.kernel.kernel import Kernel

#: RID_PASID of every context entry (IOMMU_NO_PASID)
NO_PASID = 0
#: PDTS of our PASID directories: 2**7 entries in their one page, 8192 PASIDs
PDTS = 0


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


class InvalidationQueue(CommandQueue):
    """Queued invalidation (specification 6.5.2): 256 descriptors.

    :param wide: descriptors of 256 bits, as scalable mode has them. The other parameters as the base has
        them.
    """

    def __init__(
        self, unit: Unit, frames: FrameAllocator, *, wide: bool, pump: Callable[[], None] | None
    ) -> None:
        step, order = (32, 1) if wide else (16, 0)
        super().__init__("DMAR", unit, frames, command_bytes=step, order=order, pump=pump)
        self._wide = wide

    def start(self, command: int) -> int:
        """Set the queue up in fresh frames and enable it (dmar_enable_qi); GCMD's value with QIE.

        A queue that an earlier kernel left enabled is stopped first: its memory is not ours.

        :param command: the GCMD bits that stay as they are.
        """
        regs = self.unit
        regs.write32(reg.DMAR_GCMD_REG, command & ~reg.DMA_GCMD_QIE)
        self.until(lambda: not regs.read32(reg.DMAR_GSTS_REG) & reg.DMA_GSTS_QIES, "queue disable")
        self.allocate()
        regs.write64(reg.DMAR_IQA_REG, self.pa | self.order | (reg.IQA_DW if self._wide else 0))
        regs.write64(reg.DMAR_IQT_REG, 0)
        command |= reg.DMA_GCMD_QIE
        regs.write32(reg.DMAR_GCMD_REG, command)
        self.until(lambda: bool(regs.read32(reg.DMAR_GSTS_REG) & reg.DMA_GSTS_QIES), "queue enable")
        return command

    def _wait(self, sequence: int) -> Command:
        return codec.inv_wait(self.status_pa, sequence)

    def _encode(self, command: Command) -> bytes:
        w0, w1, w2, w3 = command
        return codec.descriptor_bytes((w0, w1, w2, w3), wide=self._wide)

    def _ring(self, tail: int) -> None:
        self.unit.write64(reg.DMAR_IQT_REG, tail % self.entries * self.command_bytes)

    def _error(self) -> str:
        return "invalidation queue error" if self.unit.read32(reg.DMAR_FSTS_REG) & reg.DMA_FSTS_IQE else ""


class Vtd(Iommu):
    """The VT-d of the platform.

    Parameters of the kernel: ``iommu`` = legacy, scalable-fs (first stage) or scalable-ss; ``levels`` = 3, 4
    or 5.
    """

    NAME = "DMAR"
    MODES = ("legacy", "scalable-fs", "scalable-ss")
    #: Linux never gives 0 and FLPT_DEFAULT_DID to a paging domain
    FIRST_ID = 2
    #: intel_iommu_get_resv_regions: IOAPIC_RANGE_START ... END
    RESERVED = (Range(0xFEE0_0000, 0xFEEF_FFFF),)
    REGISTER_BASE = 0xFED90000
    HAS_NESTED_DOMAINS = True

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self.regs = kernel.platform.iommu
        self.cap = self.regs.read64(reg.DMAR_CAP_REG)
        self.ecap = self.regs.read64(reg.DMAR_ECAP_REG)
        self.fmt = self._format(kernel.params.number("levels", 4))
        self._at = _Structures()
        self._queue: InvalidationQueue | None = None
        self._command = 0
        self._max_am = self.cap >> 48 & 0x3F

    @property
    def scalable(self) -> bool:
        """Scalable mode, not legacy mode."""
        return self.mode != "legacy"

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

    def _adopt_structures(self, state: Inherited) -> None:
        pages = set(state.structure_pages.tolist())
        scalable = (
            state.root_register & codec.RTADDR_TTM_MASK
        ) >> codec.RTADDR_TTM_SHIFT == codec.TTM_SCALABLE
        at = _Structures(root_pa=state.root_register & codec.PA_MASK)

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
        self._at.root_pa = self._pages()
        self.regs.write64(reg.DMAR_RTADDR_REG, codec.rtaddr_value(self._at.root_pa, scalable=self.scalable))
        self.regs.write32(reg.DMAR_GCMD_REG, self._command | reg.DMA_GCMD_SRTP)
        flush = [codec.inv_context_global()]
        if self.scalable:
            flush.append(codec.inv_pasid_cache(0, codec.PC_GLOBAL))
        self._submit([*flush, codec.inv_iotlb_global()])
        self._command |= reg.DMA_GCMD_TE
        self.regs.write32(reg.DMAR_GCMD_REG, self._command)
        self.kernel.log(
            f"DMAR: {self.mode}, {self.fmt.name} {len(self.fmt.levels)} levels, "
            f"root table {self._at.root_pa:#x}"
        )

    @property
    def root_register(self) -> int:
        """Value of RTADDR_REG."""
        return self.regs.read64(reg.DMAR_RTADDR_REG)

    @property
    def version(self) -> int:
        """Value of VER_REG."""
        return self.regs.read32(reg.DMAR_VER_REG)

    @property
    def n_ids(self) -> int:
        """2**(4 + 2 * CAP.ND)."""
        return 1 << (4 + 2 * (self.cap & 7))

    def hw_info(self) -> tuple[int, bytes]:
        """CAP and ECAP as the registers have them (intel_iommu_hw_info)."""
        info = uapi.iommu_hw_info_vtd()
        info.cap_reg, info.ecap_reg = self.cap, self.ecap
        return uapi.IOMMU_HW_INFO_TYPE_INTEL_VTD, bytes(info)

    def _held_mode(self) -> str:
        return "scalable-ss" if self.root_register & codec.RTADDR_TTM_MASK else "legacy"

    def _held_structures(self) -> U64:
        pas: set[int] = {self.root_register & codec.PA_MASK}
        for dev in self.devices:
            try:
                path = codec.find_root(self.kernel.frames.ram, self.root_register, dev.bdf).path
            except RootFault as error:
                path = error.path
            pas.update(step.pa & ~(FRAME_BYTES - 1) for step in path)
        return np.array(sorted(pas), np.uint64)

    def _table_pas(self) -> list[int]:
        pas = [self._at.root_pa, *self._at.contexts.values()]
        for pasid in self._at.pasids.values():
            pas += (pasid.directory_pa, pasid.table_pa)
        return pas

    def structure_pages(self) -> U64:
        """pas of the root, context and PASID tables: what must survive for hardware to go on. Sorted."""
        return np.array(sorted(self._table_pas()), np.uint64)

    # ---- attachment

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

    def _replace(self, dev: PciDevice, domain: Domain) -> I64:
        """From one domain to another: a copy of the table with the entry, switched to by one 64-bit store."""
        ram = self.kernel.frames.ram
        aside = self._pages()
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
        return np.array([old >> FRAME_SHIFT], np.int64)

    def _block(self, dev: PciDevice) -> None:
        """Clear the entry, its present bit first."""
        ram = self.kernel.frames.ram
        if self.scalable:
            pa, words = self._at.pasids[dev.index].table_pa, 8
        else:
            pa, words = codec.context_entry_pa(self._at.contexts[dev.bdf >> 8], dev.bdf, scalable=False), 2
        for i in range(words):
            ram.store64(pa + 8 * i, 0)

    def _context_entry(self, domain: Domain) -> tuple[int, ...]:
        return codec.context_entry(domain.root_pa, domain.levels, domain.domain_id)

    def _pasid_entry(self, domain: Domain) -> tuple[int, ...]:
        if domain.fmt.name == "x86_64":
            return codec.pasid_entry_first_stage(domain.root_pa, domain.levels, domain.domain_id)
        return codec.pasid_entry_second_stage(domain.root_pa, domain.levels, domain.domain_id)

    def _context_table(self, bus: int) -> int:
        pa = self._at.contexts.get(bus)
        if pa is None:
            pa = self._pages()
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
            context = self._pages()
            word = codec.sm_root_entry(context, None)[0]
            ram.store64(self._at.root_pa + (key >> 1) * codec.ROOT_ENTRY_BYTES + 8 * (key & 1), word)
            self._at.contexts[key] = context
        directory = self._pages()
        try:
            table = self._pages()
        except OutOfMemory:
            self.kernel.frames.put(np.array([directory >> FRAME_SHIFT], np.int64))
            raise
        ram.store64(directory, codec.pasid_dir_entry(table))
        entry = codec.sm_context_entry(directory, PDTS, NO_PASID)
        self._store_last_first(codec.context_entry_pa(context, dev.bdf, scalable=True), entry)
        pasid = _Pasid(directory, table)
        self._at.pasids[dev.index] = pasid
        return pasid

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

    def _structure_frames(self) -> Iterable[Claim]:
        pas = self._table_pas() if self._at.root_pa else []
        yield Claim("VT-d structures", pfns_of(np.array(pas, np.uint64)), tag=TAG_KERNEL)
        if self._queue is not None:
            yield Claim("VT-d invalidation queue", self._queue.pfns, tag=TAG_KERNEL)
