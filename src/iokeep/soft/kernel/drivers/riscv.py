# SPDX-License-Identifier: Apache-2.0
"""The RISC-V IOMMU driver: device directory in memory, attachment, invalidation, the two queues.

Follows drivers/iommu/riscv/iommu.c, but for three things: the directory has two levels, which is what the 16
bits of a PCI requester id need; a device goes from one domain to another hitlessly, by the store of the
non-leaf entry above its context, where Linux takes the context's V bit away for a moment; and there are
domains of the second stage too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from iokeep.errors import IokeepError
from iokeep.pt.formats.base import Format
from iokeep.pt.registry import open_format
from iokeep.pt.roots import riscv as codec
from iokeep.pt.roots.base import RootFault
from iokeep.soft.hardware.units import riscv as reg
from iokeep.soft.kernel.frames import (
    FRAME_BYTES,
    FRAME_SHIFT,
    I64,
    TAG_KERNEL,
    U64,
    Claim,
    FrameAllocator,
    Kind,
    pfns_of,
)
from iokeep.soft.kernel.iommu import Domain, Inherited, Iommu, PciDevice
from iokeep.soft.kernel.queue import Command, CommandQueue
from iokeep.uapi import iommufd as uapi

if TYPE_CHECKING:
    from iokeep.soft.hardware.unit import Unit
    from iokeep.soft.kernel.kernel import Kernel

#: ranges from here on are flushed as the whole address space (RISCV_IOMMU_IOTLB_INVAL_LIMIT)
INVAL_LIMIT = 2 << 20
#: levels of the device directory
DIRECTORY_LEVELS = 2
#: the command queue has 2**order frames: 512 commands, what the largest flush by pages needs
COMMAND_ORDER = 1
DC_BYTES = codec.DC_BASE_WORDS * 8
_STAGES = {"first-stage": 1, "second-stage": 2}


class RiscvQueue(CommandQueue):
    """The command queue (specification, "Command-Queue"; riscv_iommu_queue_enable, riscv_iommu_cmd_sync)."""

    def __init__(self, unit: Unit, frames: FrameAllocator, pump: Callable[[], None] | None) -> None:
        super().__init__(
            RiscvIommu.NAME, unit, frames, command_bytes=reg.COMMAND_BYTES, order=COMMAND_ORDER, pump=pump
        )

    def start(self) -> None:
        """Set the queue up in fresh frames and enable it. A queue that an earlier kernel left enabled is
        stopped first: its memory is not ours.
        """
        unit, going = self.unit, reg.QUEUE_ON | reg.QUEUE_BUSY
        unit.write32(reg.CQCSR, 0)
        self.until(lambda: not unit.read32(reg.CQCSR) & going, "queue disable")
        self.allocate()
        unit.write64(reg.CQB, reg.queue_base(self.pa, self.entries.bit_length() - 1))
        unit.write32(reg.CQT, 0)
        unit.write32(reg.CQCSR, reg.QUEUE_EN)
        self.until(lambda: unit.read32(reg.CQCSR) & going == reg.QUEUE_ON, "queue enable")

    def _wait(self, sequence: int) -> Command:
        return codec.iofence_c((self.status_pa, sequence))

    def _ring(self, tail: int) -> None:
        self.unit.write32(reg.CQT, tail % self.entries)

    def _error(self) -> str:
        value = self.unit.read32(reg.CQCSR)
        if value & reg.CMD_ILL:
            return "illegal command"
        return "memory fault of the command queue" if value & reg.QUEUE_MF else ""

    def _state(self) -> str:
        return f"{super()._state()}, cqh {self.unit.read32(reg.CQH):#x}"


class RiscvIommu(Iommu):
    """The RISC-V IOMMU of the platform.

    Parameters of the kernel: ``iommu`` = first-stage or second-stage; ``levels`` = 3, 4 or 5 (Sv39, Sv48,
    Sv57), the most that the IOMMU has where it is not given.
    """

    NAME = "riscv-iommu"
    MODES = ("first-stage", "second-stage")
    #: pa of the IOMMU in QEMU's "virt" machine
    REGISTER_BASE = 0x3010000

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self.regs = kernel.platform.iommu
        # The fault queue of an earlier kernel lies in memory that is anybody's now.
        self.regs.write32(reg.FQCSR, 0)
        self.caps = self.regs.read64(reg.CAPABILITIES)
        self.fmt = self._format(kernel.params.number("levels", self._most_levels))
        self._root_pa = 0
        #: DDI[1] -> pa of its page of device contexts
        self._leaves: dict[int, int] = {}
        self._queue: RiscvQueue | None = None
        self._fault_pa = 0

    @property
    def _modes(self) -> dict[int, int]:
        """iosatp or iohgatp mode -> its capability."""
        return codec.CAP_FIRST if self.mode == "first-stage" else codec.CAP_SECOND

    @property
    def _most_levels(self) -> int:
        """riscv_iommu_alloc_paging_domain() takes the largest too."""
        return max(
            (codec.LEVELS_OF_ATP[mode] for mode, cap in self._modes.items() if self.caps & cap), default=3
        )

    def _format(self, levels: int) -> Format:
        if not self.caps & self._modes.get(codec.ATP_OF_LEVELS.get(levels, 0), 0):
            raise IokeepError(f"the IOMMU has no {self.mode} tables of {levels} levels (capabilities)")
        config = {
            "levels": levels,
            "stage": _STAGES[self.mode],
            # Every RISC-V IOMMU has Svnapot (specification, "capabilities"); hardware sets A and D only where
            # tc.SADE or tc.GADE says so, which we do not.
            "svnapot": 1,
            "svpbmt": int(bool(self.caps & codec.CAP_SVPBMT)),
            "hardware_ad": 0,
        }
        return open_format("riscv64", config)

    @property
    def _registers(self) -> codec.Registers:
        return codec.Registers(self.root_register, self.caps, self.regs.read32(reg.FCTL))

    # ---- boot

    def _adopt_structures(self, state: Inherited) -> None:
        pages = set(state.structure_pages.tolist())
        ddtp = state.root_register
        levels = codec.LEVELS_OF_DDTP.get(ddtp & codec.DDTP_MODE_MASK)
        if levels != DIRECTORY_LEVELS:
            raise IokeepError(f"ddtp {ddtp:#x} is no directory of {DIRECTORY_LEVELS} levels")

        def known(word: int, what: str) -> int:
            pa = codec.ppn_pa(word)
            if pa not in pages:
                raise IokeepError(
                    f"RISC-V IOMMU {what} at pa {pa:#x} is not among the preserved structure pages"
                )
            return pa

        root = known(ddtp, "device directory")
        ram, leaves = self.kernel.frames.ram, {}
        for index in range(FRAME_BYTES // 8):
            word = ram.load64(root + 8 * index)
            if word & codec.V:
                leaves[index] = known(word, f"directory page {index:#x}")
        self._root_pa, self._leaves = root, leaves

    def start(self) -> None:
        """Program the IOMMU, or take over one that is translating."""
        frames = self.kernel.frames
        self._queue = RiscvQueue(self.regs, frames, self._pump)
        if self._inherited is not None:
            frames.give(pfns_of(self._inherited.structure_pages), TAG_KERNEL, Kind.KERNEL)
            reached = set(self._table_pas())
            spare = [pa for pa in self._inherited.structure_pages.tolist() if pa not in reached]
            frames.put(pfns_of(np.array(spare, np.uint64)))
            self._queue.start()
            self._start_faults()
            self.kernel.log(
                f"{self.NAME}: {self.mode}, translating since before the kexec, "
                f"device directory {self._root_pa:#x}"
            )
            return
        # A directory of a kernel that handed nothing over is not ours: DMA through it must stop first.
        self.regs.write64(reg.DDTP, codec.MODE_OFF)
        self._queue.start()
        self._start_faults()
        self._root_pa = self._pages()
        self._submit([codec.iodir_inval_ddt(), codec.iotinval_vma(), codec.iotinval_gvma()])
        self.regs.write64(reg.DDTP, codec.ddtp_value(self._root_pa, DIRECTORY_LEVELS))
        if self.root_register & codec.DDTP_MODE_MASK != codec.MODE_2LVL:
            raise IokeepError(f"the IOMMU takes no directory of {DIRECTORY_LEVELS} levels (ddtp)")
        self.kernel.log(
            f"{self.NAME}: {self.mode}, {self.fmt.name} {len(self.fmt.levels)} levels, "
            f"device directory {self._root_pa:#x}"
        )

    def _start_faults(self) -> None:
        self._fault_pa = self._pages()
        entries = FRAME_BYTES // reg.RECORD_BYTES
        self.regs.write64(reg.FQB, reg.queue_base(self._fault_pa, entries.bit_length() - 1))
        self.regs.write32(reg.FQH, 0)
        self.regs.write32(reg.FQCSR, reg.QUEUE_EN)

    @property
    def root_register(self) -> int:
        """Value of ddtp."""
        return self.regs.read64(reg.DDTP)

    @property
    def version(self) -> int:
        """capabilities.version."""
        return self.caps & reg.VERSION_MASK

    @property
    def n_ids(self) -> int:
        """PSCIDs have 20 bits, GSCIDs 16."""
        return 1 << (codec.PSCID_BITS if self.mode == "first-stage" else codec.GSCID_BITS)

    def hw_info(self) -> tuple[int, bytes]:
        """Nothing: Linux's driver has no hw_info operation (7.3)."""
        return uapi.IOMMU_HW_INFO_TYPE_NONE, b""

    def _held_mode(self) -> str:
        for dev in self.devices:
            try:
                stage = self.root_of(dev).root.config["stage"]
            except (RootFault, IokeepError):
                continue
            return "first-stage" if stage == 1 else "second-stage"
        return self.mode

    def _held_structures(self) -> U64:
        registers = self._registers
        levels = codec.LEVELS_OF_DDTP.get(registers.ddtp & codec.DDTP_MODE_MASK)
        pas = {codec.ppn_pa(registers.ddtp)} if levels else set()
        for dev in self.devices:
            try:
                path = codec.find_root(self.kernel.frames.ram, registers, dev.bdf).path
            except RootFault as error:
                path = error.path
            pas.update(step.pa & ~(FRAME_BYTES - 1) for step in path)
        return np.array(sorted(pas), np.uint64)

    def _table_pas(self) -> list[int]:
        return [self._root_pa, *self._leaves.values()]

    def structure_pages(self) -> U64:
        """pas of the device directory: what must survive for hardware to go on. Sorted."""
        return np.array(sorted(self._table_pas()), np.uint64)

    # ---- attachment

    def _context_pa(self, leaf_pa: int, dev: PciDevice) -> int:
        return leaf_pa + codec.device_index(dev.bdf, extended=False)[0] * DC_BYTES

    def _entry_pa(self, dev: PciDevice) -> int:
        return self._root_pa + codec.device_index(dev.bdf, extended=False)[1] * 8

    def _leaf(self, dev: PciDevice) -> int:
        """The page with the context of a device, made where it is missing (riscv_iommu_get_dc)."""
        index = codec.device_index(dev.bdf, extended=False)[1]
        if index not in self._leaves:
            pa = self._pages()
            self.kernel.frames.ram.store64(self._entry_pa(dev), codec.directory_entry(pa))
            self._leaves[index] = pa
        return self._leaves[index]

    def _context(self, domain: Domain) -> tuple[int, ...]:
        stage = codec.Stage(domain.root_pa, domain.levels, domain.domain_id)
        if _stage(domain) == 1:
            return codec.device_context(stage, extended=False)
        return codec.device_context(None, stage, extended=False)

    def _attach(self, dev: PciDevice, domain: Domain) -> None:
        """From blocked: fill the context, tc.V last. Contexts without V are not cached."""
        self._store_last_first(self._context_pa(self._leaf(dev), dev), self._context(domain))

    def _replace(self, dev: PciDevice, domain: Domain) -> I64:
        """From one domain to another: a copy of the page of contexts, switched to by one 64-bit store."""
        ram = self.kernel.frames.ram
        index = codec.device_index(dev.bdf, extended=False)[1]
        old, aside = self._leaves[index], self._pages()
        ram.write(aside, ram.read(old, FRAME_BYTES))
        self._store_last_first(self._context_pa(aside, dev), self._context(domain))
        ram.store64(self._entry_pa(dev), codec.directory_entry(aside))
        self._leaves[index] = aside
        return np.array([old >> FRAME_SHIFT], np.int64)

    def _block(self, dev: PciDevice) -> None:
        """Clear the context, tc.V first (riscv_iommu_attach_blocking_domain)."""
        pa = self._context_pa(self._leaf(dev), dev)
        for word in range(codec.DC_BASE_WORDS):
            self.kernel.frames.ram.store64(pa + 8 * word, 0)

    # ---- caches

    def _submit(self, commands: Sequence[Command]) -> None:
        if self._queue is None:
            raise IokeepError("the IOMMU driver has not started")
        self._queue.submit(commands)

    def _flush_device(self, dev: PciDevice, domain_id: int) -> None:
        """After the context of ``dev`` changed (specification, "Changing device directory table entry").

        A replaced device has another non-leaf entry, which only an invalidation without DID takes out of the
        caches. A prior domain may be of the other stage than ours, so what was cached under the old id goes
        in both.
        """
        replaced = dev.domain is not None
        commands = [
            codec.iodir_inval_ddt(None if replaced else dev.bdf),
            codec.iotinval_vma(pscid=domain_id),
        ]
        if not domain_id >> codec.GSCID_BITS:
            commands += [codec.iotinval_vma(gscid=domain_id), codec.iotinval_gvma(gscid=domain_id)]
        self._submit(commands)

    def flush_range(self, domain: Domain, iova: int, last: int) -> None:
        """Forget what is cached of [iova, last], page by page or all of the domain
        (riscv_iommu_iotlb_inval); DMA that began before is over when this returns.
        """
        if not domain.devices:
            return
        first = iova & -FRAME_BYTES
        if last - first >= INVAL_LIMIT - 1:
            self.flush_domain(domain)
        else:
            self._submit([_inval(domain, page) for page in range(first, last + 1, FRAME_BYTES)])

    def flush_domain(self, domain: Domain) -> None:
        """Forget all that is cached of the domain, entries above the leaves included."""
        if domain.devices:
            self._submit([_inval(domain, None)])

    def _structure_frames(self) -> Iterable[Claim]:
        pas = self._table_pas() if self._root_pa else []
        yield Claim("RISC-V device directory", pfns_of(np.array(pas, np.uint64)), tag=TAG_KERNEL)
        if self._queue is not None:
            yield Claim("RISC-V command queue", self._queue.pfns, tag=TAG_KERNEL)
        if self._fault_pa:
            fault = np.array([self._fault_pa >> FRAME_SHIFT], np.int64)
            yield Claim("RISC-V fault queue", fault, tag=TAG_KERNEL)


def _stage(domain: Domain) -> int:
    """1 or 2: what the tables of the domain are made for."""
    return int(domain.fmt.config["stage"])


def _inval(domain: Domain, iova: int | None) -> Command:
    if _stage(domain) == 1:
        return codec.iotinval_vma(iova=iova, pscid=domain.domain_id)
    return codec.iotinval_gvma(iova=iova, gscid=domain.domain_id)
