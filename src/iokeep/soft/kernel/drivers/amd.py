# SPDX-License-Identifier: Apache-2.0
"""The AMD-Vi driver: device table in memory, attachment, command buffer, event log, tables that grow.

Follows drivers/iommu/amd/{init,iommu}.c, but for two things. A device goes from one domain to another by a
copy of the device table, to which one store of the base register switches: Linux writes the two words with
mode, root and domain id by one cmpxchg16b, which has no likeness here. And an IOMMU that another kernel left
translating is never switched off, not even for a moment: requests would pass untranslated.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from iokeep.errors import IokeepError
from iokeep.mem.ranges import Range
from iokeep.pt.formats.base import Format
from iokeep.pt.registry import open_format
from iokeep.pt.roots import amd as codec
from iokeep.soft.hardware.units import amd as reg
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
from iokeep.soft.kernel.syserror import SysError
from iokeep.soft.kernel.viommu import Viommu
from iokeep.uapi import iommufd as uapi

if TYPE_CHECKING:
    from iokeep.soft.hardware.unit import Unit
    from iokeep.soft.kernel.kernel import Kernel
    from iokeep.soft.kernel.userdata import UserData

#: command buffer and event log have 2**order frames: 512 entries (CMD_BUFFER_SIZE, EVT_BUFFER_SIZE)
BUFFER_ORDER = 1
_BUFFER_LEN = (FRAME_BYTES << BUFFER_ORDER).bit_length() - 1 - 4 << reg.BUF_LEN_SHIFT
_COMMAND_EVENTS = (codec.FaultReason.ILLEGAL_COMMAND_ERROR, codec.FaultReason.COMMAND_HARDWARE_ERROR)
#: MAX_DOMAIN_ID
DOMAIN_IDS = 1 << 16


class AmdViommu(Viommu):
    """A vIOMMU with which nothing can be done (amd_viommu_ops)."""

    def init(self, data: UserData | None) -> None:
        """amd_iommufd_viommu_init: the data is not looked at."""


class CommandBuffer(CommandQueue):
    """The command buffer (specification 2.4; iommu_queue_command_sync, iommu_completion_wait).

    :param why: what the event log says of a command. The other parameters as the base has them.
    """

    def __init__(
        self, unit: Unit, frames: FrameAllocator, pump: Callable[[], None] | None, why: Callable[[], str]
    ) -> None:
        super().__init__(
            AmdVi.NAME, unit, frames, command_bytes=codec.COMMAND_BYTES, order=BUFFER_ORDER, pump=pump
        )
        self._why = why

    def program(self) -> None:
        """Set the buffer up in fresh frames; one that an earlier kernel left is stopped already."""
        self.until(lambda: not self._running, "command buffer disable")
        self.allocate()
        self.unit.write64(reg.MMIO_CMD_BUF, self.pa | _BUFFER_LEN)
        self.unit.write32(reg.MMIO_CMD_HEAD, 0)
        self.unit.write32(reg.MMIO_CMD_TAIL, 0)

    @property
    def _running(self) -> bool:
        return bool(self.unit.read32(reg.MMIO_STATUS) & reg.STATUS_CMDBUF_RUN)

    def _wait(self, sequence: int) -> Command:
        return codec.completion_wait(self.status_pa, sequence)

    def _ring(self, tail: int) -> None:
        self.unit.write32(reg.MMIO_CMD_TAIL, tail % self.entries * self.command_bytes)

    def _error(self) -> str:
        return "" if self._running else f"the IOMMU fetches no commands any more: {self._why()}"

    def _state(self) -> str:
        return f"{super()._state()}, command head {self.unit.read32(reg.MMIO_CMD_HEAD):#x}"


class AmdVi(Iommu):
    """The AMD-Vi of the platform.

    Parameters of the kernel: ``iommu`` = v1, host tables; ``levels`` = 1 ... 6 that a table begins with. It
    grows to what an area needs.
    """

    NAME = "AMD-Vi"
    MODES = ("v1",)
    #: IOMMU_PTE_FC is always set (amd_iommu_enforce_cache_coherency)
    ENFORCES_COHERENCY = True
    #: MSI_RANGE_START and HT_RANGE_START ... (amd_iommu_get_resv_regions)
    RESERVED = (Range(0xFEE00000, 0xFEEFFFFF), Range(0xFD_0000_0000, 0xFF_FFFF_FFFF))
    REGISTER_BASE = 0xFED80000

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self.regs = kernel.platform.iommu
        # An earlier kernel's event log and command buffer lie in memory that is anybody's now.
        self._control = self.regs.read64(reg.MMIO_CONTROL) & ~(reg.CONTROL_EVT_LOG_EN | reg.CONTROL_CMDBUF_EN)
        self.regs.write64(reg.MMIO_CONTROL, self._control)
        self.features = self.regs.read64(reg.MMIO_EXT_FEATURES)
        self.fmt = self._format(kernel.params.number("levels", 3))
        self._queue: CommandBuffer | None = None
        self._table_pa = 0
        self._table_bytes = 0
        self._log_pa = 0

    def alloc_paging(self, dev: PciDevice, flags: int, data: UserData | None) -> Domain:
        """amd_iommu_domain_alloc_paging_flags: an IOMMU without PASIDs has no domains for them either."""
        if flags & uapi.IOMMU_HWPT_ALLOC_PASID:
            raise SysError(errno.EOPNOTSUPP, f"{dev.name}: this IOMMU has no PASIDs")
        return super().alloc_paging(dev, flags, data)

    def enable_iopf(self, dev: PciDevice) -> None:
        """attach_device: where a device has no PRI, faults are not turned on, and nothing says so."""

    def viommu_class(self, dev: PciDevice, viommu_type: int) -> type[Viommu] | None:
        """amd_iommufd_get_viommu_size: it does not look at the type; no HWPT here can carry one."""
        return AmdViommu

    @property
    def _most_levels(self) -> int:
        """amd_iommu_hpt_level"""
        return 4 + ((self.features & reg.FEATURE_HATS_MASK) >> reg.FEATURE_HATS_SHIFT)

    def _format(self, levels: int) -> Format:
        if not 1 <= levels <= self._most_levels:
            raise IokeepError(f"the IOMMU has no host tables of {levels} levels (EFR.HATS)")
        return open_format("amdv1", {"levels": levels})

    # ---- boot

    def _adopt_structures(self, state: Inherited) -> None:
        pa = codec.device_table_pa(state.root_register)
        length = codec.device_table_bytes(state.root_register)
        pages = set(state.structure_pages.tolist())
        for page in range(pa, pa + length, FRAME_BYTES):
            if page not in pages:
                raise IokeepError(f"device table page {page:#x} is not among the preserved structure pages")
        for dev in self.devices:
            if dev.bdf * codec.DTE_BYTES >= length:
                raise IokeepError(f"{dev.name} is beyond the device table of {length:#x} bytes")
        self._table_pa, self._table_bytes = pa, length

    def start(self) -> None:
        """Program the IOMMU, or take over one that is translating (early_enable_iommus)."""
        frames = self.kernel.frames
        if self._inherited is not None:
            frames.give(pfns_of(self._inherited.structure_pages), TAG_KERNEL, Kind.KERNEL)
            reached = set(self._table_pas())
            spare = [pa for pa in self._inherited.structure_pages.tolist() if pa not in reached]
            frames.put(pfns_of(np.array(spare, np.uint64)))
        else:
            self._new_table()
        self._queue = CommandBuffer(self.regs, frames, self._pump, self._bad_command)
        self._queue.program()
        self._log_pa = self._pages(1 << BUFFER_ORDER)
        self.regs.write64(reg.MMIO_EVT_BUF, self._log_pa | _BUFFER_LEN)
        self.regs.write32(reg.MMIO_EVT_HEAD, 0)
        self.regs.write32(reg.MMIO_EVT_TAIL, 0)
        self.regs.write32(reg.MMIO_STATUS, reg.STATUS_EVT_OVERFLOW | reg.STATUS_EVT_INT)
        self._control |= reg.CONTROL_COHERENT_EN | reg.CONTROL_CMDBUF_EN | reg.CONTROL_EVT_LOG_EN
        self._control |= reg.CONTROL_IOMMU_EN
        self.regs.write64(reg.MMIO_CONTROL, self._control)
        self._queue.submit([codec.invalidate_iommu_all()])
        since = "translating since before the kexec" if self._inherited is not None else self.fmt.name
        self.kernel.log(f"{self.NAME}: {since}, device table {self._table_pa:#x}")

    def _bad_command(self) -> str:
        """The last event of a command in the log (iommu_print_event)."""
        ram, size = self.kernel.frames.ram, FRAME_BYTES << BUFFER_ORDER
        head, tail = self.regs.read32(reg.MMIO_EVT_HEAD), self.regs.read32(reg.MMIO_EVT_TAIL)
        while tail != head:
            tail = (tail - codec.EVENT_BYTES) % size
            words = ram.load64(self._log_pa + tail), ram.load64(self._log_pa + tail + 8)
            try:
                event = codec.decode_event(words)
            except ValueError as error:
                return f"the event log is damaged: {error}"
            if event.code in _COMMAND_EVENTS:
                return f"{event.code.name} at pa {event.address:#x}"
        return "no event says why"

    def _new_table(self) -> None:
        """A device table for all requester ids that there are, all of them blocked. An IOMMU that another
        kernel left translating blocks from here on.
        """
        needed = (max(dev.bdf for dev in self.devices) + 1) * codec.DTE_BYTES
        pages = 1 << (-(-needed // FRAME_BYTES) - 1).bit_length()
        self._table_pa, self._table_bytes = self._pages(pages), pages * FRAME_BYTES
        blocked = b"".join(word.to_bytes(8, "little") for word in codec.dte_blocked())
        self.kernel.frames.ram.write(self._table_pa, blocked * (self._table_bytes // codec.DTE_BYTES))
        self._set_table()

    def _set_table(self) -> None:
        value = codec.device_table_register(self._table_pa, self._table_bytes)
        self.regs.write64(reg.MMIO_DEV_TABLE, value)

    @property
    def root_register(self) -> int:
        """Value of the device table base register."""
        return self.regs.read64(reg.MMIO_DEV_TABLE)

    @property
    def version(self) -> int:
        """AMD-Vi has no version register."""
        return 0

    @property
    def n_ids(self) -> int:
        """DomainID has 16 bits."""
        return DOMAIN_IDS

    def hw_info(self) -> tuple[int, bytes]:
        """EFR and EFR2 as the registers have them (amd_iommufd_hw_info)."""
        info = uapi.iommu_hw_info_amd()
        info.efr, info.efr2 = self.features, self.regs.read64(reg.MMIO_EXT_FEATURES2)
        return uapi.IOMMU_HW_INFO_TYPE_AMD, bytes(info)

    def _held_structures(self) -> U64:
        register, ram_bytes = self.root_register, self.kernel.frames.ram.size
        pa = codec.device_table_pa(register)
        pages = range(pa, pa + codec.device_table_bytes(register), FRAME_BYTES)
        return np.array([page for page in pages if page < ram_bytes], np.uint64)

    def _table_pas(self) -> list[int]:
        return list(range(self._table_pa, self._table_pa + self._table_bytes, FRAME_BYTES))

    def structure_pages(self) -> U64:
        """pas of the device table: what must survive for hardware to go on. Sorted."""
        return np.array(self._table_pas(), np.uint64)

    # ---- attachment

    def _entry_pa(self, dev: PciDevice) -> int:
        return self._table_pa + dev.bdf * codec.DTE_BYTES

    @staticmethod
    def _entry(domain: Domain) -> codec.Dte:
        return codec.dte_host(domain.root_pa, domain.levels, domain.domain_id)

    def _attach(self, dev: PciDevice, domain: Domain) -> None:
        """From blocked: fill the entry, the word with TV last. A blocked entry has V, so it may be cached."""
        self._store_last_first(self._entry_pa(dev), self._entry(domain))
        self._submit([codec.invalidate_devtab_entry(dev.bdf)])

    def _replace(self, dev: PciDevice, domain: Domain) -> I64:
        """From one domain to another: a copy of the device table, switched to by one store of the base
        register.
        """
        ram, old = self.kernel.frames.ram, self._table_pas()
        aside = self._pages(len(old))
        ram.write(aside, ram.read(self._table_pa, self._table_bytes))
        self._table_pa = aside
        self._store_last_first(self._entry_pa(dev), self._entry(domain))
        self._set_table()
        return pfns_of(np.array(old, np.uint64))

    def _block(self, dev: PciDevice) -> None:
        """Clear the entry but for V, the word with TV first."""
        pa, ram = self._entry_pa(dev), self.kernel.frames.ram
        for i, word in enumerate(codec.dte_blocked()):
            ram.store64(pa + 8 * i, word)

    # ---- growth

    def larger(self, fmt: Format) -> Format | None:
        """One level more, up to what the IOMMU has (PT_FEAT_DYNAMIC_TOP)."""
        levels = len(fmt.levels) + 1
        return open_format("amdv1", {**fmt.config, "levels": levels}) if levels <= self._most_levels else None

    def grow(self, domain: Domain) -> None:
        """Mode and root of each device's entry by one store, then the cached entries (amd_iommu_change_top).

        Cached translations stay: both roots translate the same.
        """
        word = self._entry(domain)[0]
        for dev in domain.devices:
            self.kernel.frames.ram.store64(self._entry_pa(dev), word)
        if domain.devices:
            self._submit([codec.invalidate_devtab_entry(dev.bdf) for dev in domain.devices])

    # ---- caches

    def _submit(self, commands: list[codec.Command]) -> None:
        if self._queue is None:
            raise IokeepError("the IOMMU driver has not started")
        self._queue.submit(commands)

    def _flush_device(self, dev: PciDevice, domain_id: int) -> None:
        """After the entry of ``dev`` changed: it, and what was cached under the old id."""
        self._submit([codec.invalidate_devtab_entry(dev.bdf), codec.invalidate_iommu_pages(domain_id)])

    def flush_range(self, domain: Domain, iova: int, last: int) -> None:
        """Forget what is cached of [iova, last]; DMA that began before is over when this returns."""
        if domain.devices:
            self._submit([codec.invalidate_iommu_pages(domain.domain_id, iova, last)])

    def flush_domain(self, domain: Domain) -> None:
        """Forget all that is cached of the domain."""
        if domain.devices:
            self._submit([codec.invalidate_iommu_pages(domain.domain_id)])

    def _structure_frames(self) -> Iterable[Claim]:
        yield Claim(f"{self.NAME} device table", pfns_of(self.structure_pages()), tag=TAG_KERNEL)
        if self._queue is not None:
            yield Claim(f"{self.NAME} command buffer", self._queue.pfns, tag=TAG_KERNEL)
        if self._log_pa:
            first = self._log_pa >> FRAME_SHIFT
            log = np.arange(first, first + (1 << BUFFER_ORDER), dtype=np.int64)
            yield Claim(f"{self.NAME} event log", log, tag=TAG_KERNEL)
