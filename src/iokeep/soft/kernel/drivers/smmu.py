# SPDX-License-Identifier: Apache-2.0
"""The SMMUv3 driver: stream tables and context descriptors in memory, attachment, invalidation.

Follows drivers/iommu/arm/arm-smmu-v3/arm-smmu-v3.c, with a stream table of two levels whose second level is
one page (SPLIT 6; Linux has 8), so that a copy of it is small: the store that switches a device to another
domain is that of the level 1 descriptor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from iokeep.errors import IokeepError, UsageError
from iokeep.mem.ranges import Range
from iokeep.pt.formats.base import Format
from iokeep.pt.registry import open_format
from iokeep.pt.roots import smmu as codec
from iokeep.pt.roots.base import RootFault, TableRoot
from iokeep.soft.hardware.units import smmu as reg
from iokeep.soft.kernel.frames import (
    FRAME_BYTES,
    FRAME_SHIFT,
    I64,
    TAG_KERNEL,
    U64,
    Claim,
    FrameAllocator,
    Kind,
    OutOfMemory,
    pfns_of,
)
from iokeep.soft.kernel.iommu import Domain, Inherited, Iommu, PciDevice
from iokeep.soft.kernel.queue import Command, CommandQueue
from iokeep.uapi import iommufd as uapi

if TYPE_CHECKING:
    from iokeep.soft.hardware.unit import Unit
    from iokeep.soft.kernel.kernel import Kernel

#: stream ids of 2**SPLIT devices share a page of the second level
SPLIT = 6
LOG2SIZE = reg.SIDSIZE
L1_BYTES = 8 << (LOG2SIZE - SPLIT)
#: a level 1 descriptor's span: 2**(span - 1) entries
SPAN = SPLIT + 1
#: the event queue has one page
LOG2EVENTS = FRAME_SHIFT - 5
CR2 = reg.CR2_PTM | reg.CR2_RECINVSID


@dataclass
class _Structures:
    """Where the tables above the domains are."""

    #: the first level of the stream table
    root_pa: int = 0
    #: stream id >> SPLIT -> page of the second level
    streams: dict[int, int] = field(default_factory=dict)
    #: device index -> page of its context descriptor
    contexts: dict[int, int] = field(default_factory=dict)

    def pas(self) -> list[int]:
        """All of them, by 4096 bytes."""
        level1 = range(self.root_pa, self.root_pa + L1_BYTES, FRAME_BYTES)
        return [*level1, *self.streams.values(), *self.contexts.values()]


class SmmuQueue(CommandQueue):
    """The command queue (specification 3.5 and chapter 4): 256 commands in one page."""

    def __init__(self, unit: Unit, frames: FrameAllocator, pump: Callable[[], None] | None) -> None:
        super().__init__("SMMUv3", unit, frames, command_bytes=codec.COMMAND_BYTES, pump=pump)

    def start(self) -> None:
        """Set the queue up in fresh frames; the caller enables it."""
        self.allocate()
        lg2 = self.entries.bit_length() - 1
        self.unit.write64(reg.CMDQ_BASE, self.pa | lg2 | reg.QUEUE_RA)
        self.unit.write32(reg.CMDQ_PROD, 0)
        self.unit.write32(reg.CMDQ_CONS, 0)

    def _wait(self, sequence: int) -> Command:
        return codec.sync()

    def _ring(self, tail: int) -> None:
        self.unit.write32(reg.CMDQ_PROD, tail)

    def _done(self, tail: int, sequence: int) -> bool:
        """CMDQ_CONS has reached the end of what was queued (arm_smmu_cmdq_poll_until_consumed())."""
        return self.unit.read32(reg.CMDQ_CONS) & ~reg.CONS_ERR == tail

    def _error(self) -> str:
        pending = self.unit.read32(reg.GERROR) ^ self.unit.read32(reg.GERRORN)
        if not pending & reg.GERROR_CMDQ_ERR:
            return ""
        cons = self.unit.read32(reg.CMDQ_CONS)
        return f"command queue error {(cons & reg.CONS_ERR) >> reg.CONS_ERR_SHIFT} (cons {cons:#x})"


class Smmu(Iommu):
    """The SMMUv3 of the platform.

    Parameters of the kernel: ``iommu`` = stage-1 or stage-2; ``granule`` = 4K (default), 16K or 64K;
    ``input_bits`` (default 48) and ``output_bits`` (default: what the SMMU has) of the tables;
    ``start_level`` of stage 2, as Arm counts (default: what Linux makes of the sizes). A domain id is an ASID
    and a VMID at once: whichever the domain's stage has.
    """

    NAME = "SMMUv3"
    MODES = ("stage-1", "stage-2")
    #: arm_smmu_get_resv_regions: MSI_IOVA_BASE, MSI_IOVA_LENGTH
    RESERVED = (Range(0x0800_0000, 0x080F_FFFF),)
    #: QEMU hw/arm/virt.c, VIRT_SMMU
    REGISTER_BASE = 0x09050000

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self.regs = kernel.platform.iommu
        self.idr = tuple(self.regs.read32(offset) for offset in range(reg.IDR0, reg.IDR5 + 4, 4))
        self.fmt = self._format()
        self._at = _Structures()
        self._queue: SmmuQueue | None = None
        self._events_pa = 0

    def _format(self) -> Format:
        """arm_smmu_domain_finalise() and arm_64_lpae_alloc_pgtable_s1(), _s2()."""
        params = self.kernel.params
        oas = codec.ADDRESS_BITS[self.idr[5] & codec.IDR5_OAS]
        sizes = {"4K": 4096, "16K": 16384, "64K": 65536}
        config: dict[str, object] = {
            "granule": sizes[params.choice("granule", "4K", tuple(sizes))],
            "input_bits": params.number("input_bits", 48),
            "output_bits": params.number("output_bits", oas),
        }
        if params.text("start_level"):
            config["start_level"] = params.number("start_level", 0)
        # VAX = 0 and OAS bound the sizes of both stages.
        for name, most in (("input_bits", 48 if self.mode == "stage-1" else oas), ("output_bits", oas)):
            if params.number(name, most) > most:
                raise UsageError(f"kernel parameter {name}={params.text(name)}: the SMMU has {most} bits")
        return open_format("arm_lpae_s1" if self.mode == "stage-1" else "arm_lpae_s2", config)

    # ---- boot

    def _adopt_structures(self, state: Inherited) -> None:
        pages = set(state.structure_pages.tolist())
        cfg = self.regs.read32(reg.STRTAB_BASE_CFG)
        if cfg != codec.strtab_base_cfg(LOG2SIZE, SPLIT):
            raise IokeepError(f"STRTAB_BASE_CFG {cfg:#x} is not that of a stream table of this driver")
        ram = self.kernel.frames.ram
        at = _Structures(root_pa=state.root_register & codec.STRTAB_ADDR & -L1_BYTES)

        def known(pa: int, what: str) -> int:
            if pa not in pages:
                raise IokeepError(f"SMMUv3 {what} at pa {pa:#x} is not among the preserved structure pages")
            return pa

        for pa in at.pas():
            known(pa, "stream table")
        for index in range(L1_BYTES // 8):
            word = ram.load64(at.root_pa + 8 * index)
            if word & codec.L1_SPAN:
                if word & codec.L1_SPAN != SPAN:
                    raise IokeepError(f"level 1 descriptor {word:#x} is not one of this driver")
                at.streams[index] = known(word & codec.L1_L2PTR, f"stream table of ids {index << SPLIT:#x}")
        for dev in self.devices:
            stream = at.streams.get(dev.bdf >> SPLIT)
            word = ram.load64(self._entry_pa(stream, dev)) if stream is not None else 0
            if word & codec.STE_V and word >> codec.CONFIG_SHIFT & 7 == codec.CONFIG_S1:
                at.contexts[dev.index] = known(word & codec.S1CONTEXTPTR, f"context descriptor of {dev.name}")
        self._at = at

    def start(self) -> None:
        """Program the SMMU, or take over one that is translating (arm_smmu_device_reset())."""
        frames, regs = self.kernel.frames, self.regs
        self._queue = SmmuQueue(regs, frames, self._pump)
        # Old queues are stopped first: their memory is not ours. A stream table of a kernel that handed
        # nothing over is not ours either: DMA through it must stop.
        kept = regs.read32(reg.CR0) & reg.CR0_SMMUEN if self._inherited is not None else 0
        self._write_cr0(kept)
        regs.write32(reg.GERRORN, regs.read32(reg.GERROR))
        if self._inherited is not None:
            frames.give(pfns_of(self._inherited.structure_pages), TAG_KERNEL, Kind.KERNEL)
            reached = set(self._at.pas())
            spare = [pa for pa in self._inherited.structure_pages.tolist() if pa not in reached]
            frames.put(pfns_of(np.array(spare, np.uint64)))
        else:
            self._at.root_pa = self._pages(L1_BYTES // FRAME_BYTES)
            regs.write64(reg.STRTAB_BASE, codec.strtab_base(self._at.root_pa))
            regs.write32(reg.STRTAB_BASE_CFG, codec.strtab_base_cfg(LOG2SIZE, SPLIT))
        regs.write32(reg.CR2, CR2)
        self._queue.start()
        self._write_cr0(kept | reg.CR0_CMDQEN)
        self._queue.submit([codec.cfgi_all(), codec.tlbi_nsnh_all()])
        self._events_pa = self._pages()
        regs.write64(reg.EVENTQ_BASE, self._events_pa | LOG2EVENTS | reg.QUEUE_RA)
        regs.write32(reg.EVENTQ_PROD, 0)
        regs.write32(reg.EVENTQ_CONS, 0)
        self._write_cr0(reg.CR0_CMDQEN | reg.CR0_EVENTQEN | kept)
        self._write_cr0(reg.CR0_CMDQEN | reg.CR0_EVENTQEN | reg.CR0_SMMUEN)
        since = "translating since before the kexec, " if self._inherited is not None else ""
        levels = len(self.fmt.levels)
        self.kernel.log(
            f"SMMUv3: {self.mode}, {self.fmt.name} {levels} levels, {since}stream table {self._at.root_pa:#x}"
        )

    def _write_cr0(self, value: int) -> None:
        """arm_smmu_write_reg_sync()."""
        assert self._queue is not None
        self.regs.write32(reg.CR0, value)
        self._queue.until(lambda: self.regs.read32(reg.CR0ACK) == value, "CR0ACK")

    @property
    def root_register(self) -> int:
        """Value of STRTAB_BASE."""
        return self.regs.read64(reg.STRTAB_BASE)

    @property
    def version(self) -> int:
        """Value of AIDR."""
        return self.regs.read32(reg.AIDR)

    @property
    def n_ids(self) -> int:
        """ASIDs and VMIDs have 16 bits (IDR0.ASID16, VMID16)."""
        return 1 << 16

    def hw_info(self) -> tuple[int, bytes]:
        """IDRs, IIDR and AIDR as the registers have them (arm_smmu_hw_info)."""
        info = uapi.iommu_hw_info_arm_smmuv3()
        for i, value in enumerate(self.idr):
            info.idr[i] = value
        info.iidr, info.aidr = self.regs.read32(reg.IIDR), self.regs.read32(reg.AIDR)
        return uapi.IOMMU_HW_INFO_TYPE_ARM_SMMUV3, bytes(info)

    def _held_structures(self) -> U64:
        pas: set[int] = set(_Structures(self.root_register & codec.STRTAB_ADDR & -L1_BYTES).pas())
        for dev in self.devices:
            try:
                path = self.regs.found(dev.bdf).path
            except RootFault as error:
                path = error.path
            pas.update(step.pa & ~(FRAME_BYTES - 1) for step in path)
        return np.array(sorted(pas), np.uint64)

    def structure_pages(self) -> U64:
        """pas of the stream tables and of the context descriptors. Sorted."""
        return np.array(sorted(self._at.pas()), np.uint64)

    # ---- attachment

    @staticmethod
    def _entry_pa(stream: int, dev: PciDevice) -> int:
        return stream + (dev.bdf & ((1 << SPLIT) - 1)) * codec.STE_BYTES

    def _attach(self, dev: PciDevice, domain: Domain) -> None:
        """From blocked: an entry that aborts may be cached, so that it is forgotten here."""
        stream = self._stream_table(dev)
        context = None
        if domain.fmt.name == "arm_lpae_s1":
            context = self._at.contexts.get(dev.index)
            if context is None:
                context = self._at.contexts[dev.index] = self._pages()
        self._fill(self._entry_pa(stream, dev), context, domain)
        self._submit([codec.cfgi_ste(dev.bdf), codec.cfgi_cd_all(dev.bdf)])

    def _replace(self, dev: PciDevice, domain: Domain) -> I64:
        """From one domain to another: a copy of the second level, and a new context descriptor; the store of
        the level 1 descriptor switches to them.
        """
        ram = self.kernel.frames.ram
        key = dev.bdf >> SPLIT
        aside = self._pages()
        context = None
        if domain.fmt.name == "arm_lpae_s1":
            try:
                context = self._pages()
            except OutOfMemory:
                self.kernel.frames.put(np.array([aside >> FRAME_SHIFT], np.int64))
                raise
        old = [self._at.streams[key]]
        ram.write(aside, ram.read(old[0], FRAME_BYTES))
        self._fill(self._entry_pa(aside, dev), context, domain)
        ram.store64(self._at.root_pa + 8 * key, codec.l1_stream_descriptor(aside, SPAN))
        self._at.streams[key] = aside
        if dev.index in self._at.contexts:
            old.append(self._at.contexts.pop(dev.index))
        if context is not None:
            self._at.contexts[dev.index] = context
        return pfns_of(np.array(old, np.uint64))

    def _block(self, dev: PciDevice) -> None:
        """Abort, in one store; the rest of the entry has no meaning then."""
        self._store_first_first(self._entry_pa(self._at.streams[dev.bdf >> SPLIT], dev), codec.ste_abort())
        context = self._at.contexts.get(dev.index)
        if context is not None:
            self._store_first_first(context, (0,) * codec.CD_WORDS)

    def _fill(self, entry_pa: int, context: int | None, domain: Domain) -> None:
        """The entry for a domain, from an aborting one or in a copy; ``context``: page of its descriptor."""
        root = TableRoot(domain.fmt.name, domain.fmt.config, domain.root_pa)
        if context is None:
            self._store_last_first(entry_pa, codec.ste_stage2(root, domain.domain_id))
            return
        self._store_last_first(context, codec.context_descriptor(root, asid=domain.domain_id))
        self._store_last_first(entry_pa, codec.ste_stage1(context))

    def _store_first_first(self, pa: int, words: Iterable[int]) -> None:
        for i, word in enumerate(words):
            self.kernel.frames.ram.store64(pa + 8 * i, word)

    def _stream_table(self, dev: PciDevice) -> int:
        """Page of the second level, filled with aborting entries (arm_smmu_init_l2_strtab())."""
        key = dev.bdf >> SPLIT
        pa = self._at.streams.get(key)
        if pa is None:
            pa = self._pages()
            for i in range(1 << SPLIT):
                self.kernel.frames.ram.store64(pa + i * codec.STE_BYTES, codec.ste_abort()[0])
            self.kernel.frames.ram.store64(self._at.root_pa + 8 * key, codec.l1_stream_descriptor(pa, SPAN))
            self._at.streams[key] = pa
        return pa

    # ---- caches

    def _submit(self, commands: list[Command]) -> None:
        if self._queue is None:
            raise IokeepError("the IOMMU driver has not started")
        self._queue.submit(commands)

    def _forget(self, domain: Domain | None) -> Command:
        """Everything cached of a domain; of one that is not known, everything."""
        if domain is None:
            return codec.tlbi_nsnh_all()
        if domain.fmt.name == "arm_lpae_s1":
            return codec.tlbi_nh_asid(domain.domain_id)
        return codec.tlbi_s12_vmall(domain.domain_id)

    def _flush_device(self, dev: PciDevice, domain_id: int) -> None:
        """After the entry of ``dev`` changed: the entry, what led to it, its context descriptor, and what was
        cached under the old id.
        """
        forget = self._forget(self.domains.get(domain_id))
        self._submit([codec.cfgi_ste(dev.bdf), codec.cfgi_cd_all(dev.bdf), forget])

    def flush_range(self, domain: Domain, iova: int, last: int) -> None:
        """Forget what is cached of [iova, last]; DMA that began before is over when this returns."""
        if not domain.devices:
            return
        ranges = codec.ranges_of(iova, last, domain.fmt.table_bytes)
        if domain.fmt.name == "arm_lpae_s1":
            self._submit([codec.tlbi_nh_va(domain.domain_id, at) for at in ranges])
        else:
            self._submit([codec.tlbi_s2_ipa(domain.domain_id, at) for at in ranges])

    def flush_domain(self, domain: Domain) -> None:
        """Forget all that is cached of the domain."""
        if domain.devices:
            self._submit([self._forget(domain)])

    def _structure_frames(self) -> Iterable[Claim]:
        pas = self._at.pas() if self._at.root_pa else []
        yield Claim("SMMUv3 structures", pfns_of(np.array(pas, np.uint64)), tag=TAG_KERNEL)
        if self._queue is not None:
            yield Claim("SMMUv3 command queue", self._queue.pfns, tag=TAG_KERNEL)
        if self._events_pa:
            events = np.array([self._events_pa], np.uint64)
            yield Claim("SMMUv3 event queue", pfns_of(events), tag=TAG_KERNEL)
