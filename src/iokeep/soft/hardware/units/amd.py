# SPDX-License-Identifier: Apache-2.0
"""AMD-Vi registers: offsets, fields, capabilities, and what a write does; the event log.

Source: AMD I/O Virtualization Technology (IOMMU) specification (48882): commands 2.4, event logging 2.5, MMIO
registers 3.4. Offsets and fields checked against Linux drivers/iommu/amd/amd_iommu_types.h, what enabling,
stopping and restarting do against init.c (``iommu_enable_command_buffer()``, ``amd_iommu_restart_log()``)
and against QEMU hw/i386/amd_iommu.c.

Interrupts are not modelled: software reads the event log.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from iokeep.errors import MemoryAbsent
from iokeep.pt.registry import open_format
from iokeep.pt.roots import amd
from iokeep.pt.roots.amd import Event, FaultReason, Opcode, RootFault
from iokeep.pt.walk import walk
from iokeep.soft.hardware.unit import (
    ANY,
    EVERYWHERE,
    FE_OVERFLOW,
    H_UNIT,
    Context,
    Fault,
    Invalidation,
    Match,
    Ring,
    Unit,
    requester_id,
)

# -- offsets (bytes), specification 3.4; all registers have 64 bits --------------------------------------
MMIO_DEV_TABLE = 0x0000
MMIO_CMD_BUF = 0x0008
MMIO_EVT_BUF = 0x0010
MMIO_CONTROL = 0x0018
MMIO_EXT_FEATURES = 0x0030
MMIO_EXT_FEATURES2 = 0x01A0
MMIO_CMD_HEAD = 0x2000
MMIO_CMD_TAIL = 0x2008
MMIO_EVT_HEAD = 0x2010
MMIO_EVT_TAIL = 0x2018
MMIO_STATUS = 0x2020
_REGISTERS = (
    MMIO_DEV_TABLE, MMIO_CMD_BUF, MMIO_EVT_BUF, MMIO_CONTROL, MMIO_EXT_FEATURES, MMIO_EXT_FEATURES2,
    MMIO_CMD_HEAD, MMIO_CMD_TAIL, MMIO_EVT_HEAD, MMIO_EVT_TAIL, MMIO_STATUS,
)  # fmt: skip

# -- base address registers of the command buffer and of the event log -------------------------------------
BUF_LEN_SHIFT = 56  # the buffer has 2**length entries of 16 bytes; 8 ... 15
BUF_LEN_MASK = 0xF << BUF_LEN_SHIFT
BUF_LEN_LEAST = 8
_POINTER_MASK = 0x7FFF0  # heads and tails: byte offsets

# -- control register ------------------------------------------------------------------------------------
CONTROL_IOMMU_EN = 1 << 0
CONTROL_EVT_LOG_EN = 1 << 2
CONTROL_COHERENT_EN = 1 << 10  # accesses of the IOMMU itself snoop; they always do here
CONTROL_CMDBUF_EN = 1 << 12
_CONTROL = CONTROL_IOMMU_EN | CONTROL_EVT_LOG_EN | CONTROL_COHERENT_EN | CONTROL_CMDBUF_EN

# -- status register -------------------------------------------------------------------------------------
STATUS_EVT_OVERFLOW = 1 << 0  # write 1 to clear
STATUS_EVT_INT = 1 << 1  # an entry was written; write 1 to clear
STATUS_EVT_RUN = 1 << 3
STATUS_CMDBUF_RUN = 1 << 4
_STATUS_CLEARS = STATUS_EVT_OVERFLOW | STATUS_EVT_INT

# -- extended feature register ---------------------------------------------------------------------------
FEATURE_IA = 1 << 6  # INVALIDATE_IOMMU_ALL
FEATURE_HATS_SHIFT = 10  # host tables of 4 + HATS levels
FEATURE_HATS_MASK = 3 << FEATURE_HATS_SHIFT
#: what the model does, and nothing that it does not do: no guest translation, PPR log, prefetch, dirty bits
EXT_FEATURES = FEATURE_IA | 2 << FEATURE_HATS_SHIFT

#: own word of the hidden state: events are logged since EventLogEn was last set
_H_LOGGING = H_UNIT

#: a fault code is FaultReason | EVENT_* flags << FLAGS_SHIFT
FLAGS_SHIFT = 4
_REASON_MASK = (1 << FLAGS_SHIFT) - 1
_REASONS = {int(reason): reason for reason in FaultReason}


def _page_fault(flags: int) -> int:
    return FaultReason.IO_PAGE_FAULT | flags << FLAGS_SHIFT


#: by outcome of the walk (specification 2.5.3, IO_PAGE_FAULT; the RW flag follows from the request)
_CODES = (
    int(FaultReason.PAGE_TAB_HARDWARE_ERROR),
    _page_fault(0),
    _page_fault(amd.EVENT_PR | amd.EVENT_RZ),
    _page_fault(amd.EVENT_PR | amd.EVENT_PE),
    _page_fault(amd.EVENT_PR),
)


class AmdUnit(Unit):
    """The AMD-Vi registers."""

    KIND = "amd"

    def hw(self) -> Mapping[str, object]:
        """The registers that lead to the tables, as the ``hw`` part of a capture has them."""
        return {"root_register": f"{self._get(MMIO_DEV_TABLE):#x}"}

    def power_on(self) -> None:
        """Reset values of a new platform. The buffers have their least length (specification 3.4.1)."""
        self._put(MMIO_CMD_BUF, BUF_LEN_LEAST << BUF_LEN_SHIFT)
        self._put(MMIO_EVT_BUF, BUF_LEN_LEAST << BUF_LEN_SHIFT)
        self._put(MMIO_EXT_FEATURES, EXT_FEATURES)

    def _get(self, offset: int) -> int:
        return int(self.bank[offset >> 3])

    def _put(self, offset: int, value: int) -> None:
        self.bank[offset >> 3] = np.uint64(value)

    def read64(self, offset: int) -> int:
        """Read a 64-bit register (byte offset)."""
        if offset not in _REGISTERS:
            raise ValueError(f"no 64-bit register at offset {offset:#x}")
        return self._status() if offset == MMIO_STATUS else self._get(offset)

    def read32(self, offset: int) -> int:
        """Read half of a register (4-byte aligned byte offset)."""
        value = self.read64(offset & ~4)
        return value >> 32 if offset & 4 else value & 0xFFFFFFFF

    def write64(self, offset: int, value: int) -> None:
        """Write a 64-bit register. :raises ValueError: it does not exist here, is read-only, or may not be
        written now.
        """
        if not 0 <= value < 1 << 64:
            raise ValueError(f"{value:#x} is not 64 bits")
        with self.lock.held():
            if offset == MMIO_DEV_TABLE:
                self._put(offset, value & ~amd.DEVTAB_RESERVED)
            elif offset == MMIO_CONTROL:
                self._control(value)
            elif offset in (MMIO_CMD_BUF, MMIO_EVT_BUF):
                self._buffer(offset, value)
            elif offset in (MMIO_CMD_HEAD, MMIO_CMD_TAIL, MMIO_EVT_HEAD, MMIO_EVT_TAIL):
                self._pointer(offset, value)
            elif offset == MMIO_STATUS:
                self._put(offset, self._get(offset) & ~(value & _STATUS_CLEARS))
            else:
                raise ValueError(f"no writable 64-bit register at offset {offset:#x}")
        if offset == MMIO_CMD_TAIL:
            self.queue.kick()

    def write32(self, offset: int, value: int) -> None:
        """Write the lower half of a head, a tail or the status, the upper half of which is reserved."""
        if offset < MMIO_CMD_HEAD:
            raise ValueError(f"no writable 32-bit register at offset {offset:#x}")
        self.write64(offset, value)

    def _control(self, value: int) -> None:
        if value & ~_CONTROL:
            raise ValueError(f"control register: {value & ~_CONTROL:#x} is not modelled")
        old = self._get(MMIO_CONTROL)
        self._put(MMIO_CONTROL, value)
        on = bool(value & CONTROL_IOMMU_EN)
        logging = on and bool(value & CONTROL_EVT_LOG_EN)
        if not logging or not (old & CONTROL_IOMMU_EN and old & CONTROL_EVT_LOG_EN):
            self.hidden[_H_LOGGING] = np.uint64(logging)
        self.translating = on
        # Heads and tails stay as they are: a queue goes on where it stopped.
        self.queue.set_enabled(on and bool(value & CONTROL_CMDBUF_EN), self.queue_head)

    def _buffer(self, offset: int, value: int) -> None:
        running, head, tail = (
            (STATUS_CMDBUF_RUN, MMIO_CMD_HEAD, MMIO_CMD_TAIL)
            if offset == MMIO_CMD_BUF
            else (STATUS_EVT_RUN, MMIO_EVT_HEAD, MMIO_EVT_TAIL)
        )
        if self._status() & running:
            raise ValueError(f"the buffer register at {offset:#x} is written while the buffer is in use")
        value &= amd.PA_MASK | BUF_LEN_MASK
        if value >> BUF_LEN_SHIFT < BUF_LEN_LEAST:
            raise ValueError(f"a buffer of 2**{value >> BUF_LEN_SHIFT} entries: {BUF_LEN_LEAST} is the least")
        self._put(offset, value)
        self._put(head, 0)
        self._put(tail, 0)

    def _pointer(self, offset: int, value: int) -> None:
        base = MMIO_CMD_BUF if offset in (MMIO_CMD_HEAD, MMIO_CMD_TAIL) else MMIO_EVT_BUF
        size = self._buffer_bytes(base)
        if value & ~_POINTER_MASK or value >= size:
            raise ValueError(f"{value:#x} is no entry of a buffer of {size:#x} bytes")
        status = self._status()
        if offset == MMIO_CMD_HEAD and status & STATUS_CMDBUF_RUN:
            raise ValueError("the command head is written while commands are fetched")
        if offset == MMIO_EVT_TAIL and status & STATUS_EVT_RUN:
            raise ValueError("the event tail is written while events are logged")
        self._put(offset, value)

    def _buffer_bytes(self, base: int) -> int:
        return amd.COMMAND_BYTES << (self._get(base) >> BUF_LEN_SHIFT & 0xF)

    def _status(self) -> int:
        value = self._get(MMIO_STATUS)
        if self._logging:
            value |= STATUS_EVT_RUN
        if (self.queue.enabled and not self.queue.failed) or not self.queue.stopped():
            value |= STATUS_CMDBUF_RUN
        return value

    # -- events ------------------------------------------------------------------------------------------
    @property
    def _logging(self) -> bool:
        return bool(self.hidden[_H_LOGGING]) and not self._get(MMIO_STATUS) & STATUS_EVT_OVERFLOW

    def _log(self, event: Event) -> bool:
        """Append to the event log (specification 2.5.1); False: the event is lost. The lock is held."""
        if not self._logging:
            return False
        size, tail = self._buffer_bytes(MMIO_EVT_BUF), self._get(MMIO_EVT_TAIL)
        after = (tail + amd.EVENT_BYTES) % size
        if after == self._get(MMIO_EVT_HEAD):
            self._overflow()
            return False
        raw = b"".join(word.to_bytes(8, "little") for word in amd.encode_event(event))
        try:
            self.ram.write((self._get(MMIO_EVT_BUF) & amd.PA_MASK) + tail, raw)
        except MemoryAbsent:
            return False  # nothing is left to report it with
        self._put(MMIO_EVT_TAIL, after)
        self._put(MMIO_STATUS, self._get(MMIO_STATUS) | STATUS_EVT_INT)
        return True

    def _overflow(self) -> None:
        """Events are lost from now on, until software clears the overflow and enables the log again."""
        if self.hidden[_H_LOGGING]:
            self._put(MMIO_STATUS, self._get(MMIO_STATUS) | STATUS_EVT_OVERFLOW)
            self.hidden[_H_LOGGING] = np.uint64(0)

    def record_faults(self, index: int, faults: Sequence[Fault], dropped: int) -> None:
        """Into the event log. Faults that the front-end had no room for count as an overflow of it."""
        lost = False
        for fault in faults:
            lost |= not self._log(self._event(requester_id(index), fault))
        if dropped:
            self._overflow()
        if lost or dropped:
            self.front_ends[index, FE_OVERFLOW] = np.uint64(1)

    def _event(self, device_id: int, fault: Fault) -> Event:
        reason = _REASONS[fault.code & _REASON_MASK]
        flags = fault.code >> FLAGS_SHIFT | (amd.EVENT_RW if fault.need & 2 else 0)
        if reason == FaultReason.ILLEGAL_DEV_TABLE_ENTRY:
            return Event(reason, device_id, 0, flags | self._reserved(device_id), fault.iova)
        if reason == FaultReason.DEV_TAB_HARDWARE_ERROR:
            flags |= amd.EVENT_TARGET_ABORT
            return Event(reason, device_id, 0, flags, self._entry_pa(device_id))
        domain = fault.owner & amd.DOMAIN_MASK
        if reason == FaultReason.PAGE_TAB_HARDWARE_ERROR:
            flags |= amd.EVENT_TARGET_ABORT
            return Event(reason, device_id, domain, flags, self._absent_pa(device_id, fault.iova))
        return Event(reason, device_id, domain, flags, fault.iova)

    def _entry_pa(self, device_id: int) -> int:
        return amd.device_table_pa(self._get(MMIO_DEV_TABLE)) + device_id * amd.DTE_BYTES

    def _reserved(self, device_id: int) -> int:
        """EVENT_RZ where the entry of a device has a reserved bit set, else 0."""
        try:
            raw = self.ram.read(self._entry_pa(device_id), amd.DTE_BYTES)
        except MemoryAbsent:
            return 0
        words = tuple(int.from_bytes(raw[i : i + 8], "little") for i in range(0, amd.DTE_BYTES, 8))
        return amd.EVENT_RZ if amd.dte_reserved(words) else 0

    def _absent_pa(self, device_id: int, iova: int) -> int:
        """pa of the item of the page table that is not in memory; 0: it is there by now."""
        try:
            table = self.look_up(device_id).table
            walk(open_format(table.format, dict(table.config)), self.ram, table.root_pa, iova)
        except MemoryAbsent as absent:
            return absent.pa
        except RootFault:
            pass
        return 0

    def fault_text(self, code: int) -> str:
        """Specification 2.5, with the flags that say more."""
        reason = _REASONS[code & _REASON_MASK]
        flags = code >> FLAGS_SHIFT
        if flags & amd.EVENT_PE:
            return "the request lacks the permission"
        if flags & amd.EVENT_RZ:
            return "a reserved bit is set on the way"
        return reason.text

    # -- for front-ends ----------------------------------------------------------------------------------
    def look_up(self, device_id: int) -> Context:
        """See :meth:`Unit.look_up`. There is no guest translation here (EFR.GTSup is 0), and no kernel lets a
        device pass untranslated: where an entry says so (V = 0, or Mode = 0), requests fault all the same.
        """
        found = self.found(device_id)
        if found.translation in ("first-stage", "nested"):
            raise RootFault(FaultReason.ILLEGAL_DEV_TABLE_ENTRY, "dte", found.path, "GV is set")
        if found.table is None:
            raise RootFault(FaultReason.IO_PAGE_FAULT, "dte", found.path, "requests pass untranslated")
        return Context(found.table, found.domain_id, (_CODES, _CODES), found.prot)

    # -- for the queue -----------------------------------------------------------------------------------
    def ring(self) -> Ring:
        """Command buffer base address register."""
        size = self._buffer_bytes(MMIO_CMD_BUF)
        return Ring(self._get(MMIO_CMD_BUF) & amd.PA_MASK, size, amd.COMMAND_BYTES, size)

    @property
    def queue_head(self) -> int:
        """Command head pointer."""
        return int(self.bank[MMIO_CMD_HEAD >> 3])

    @queue_head.setter
    def queue_head(self, head: int) -> None:
        self.bank[MMIO_CMD_HEAD >> 3] = np.uint64(head)

    @property
    def queue_tail(self) -> int:
        """Command tail pointer."""
        return int(self.bank[MMIO_CMD_TAIL >> 3])

    def decode(self, words: tuple[int, ...]) -> Invalidation | None:
        """Specification 2.4. PDE makes no difference: no item that points to a table is cached here."""
        item = amd.decode_command(words)
        if item is None:
            return None
        if item.opcode == Opcode.COMPLETION_WAIT:
            if item.store_pa is None:
                return Invalidation()
            if item.store_pa >> 3 >= self.ram.words.size:
                return None
            return Invalidation(status=(item.store_pa, item.store_data, 8))
        if item.opcode == Opcode.INVALIDATE_DEVTAB_ENTRY:
            return Invalidation(context=(Match(amd.DEVICE_MASK, item.device_id), ANY))
        if item.opcode == Opcode.INVALIDATE_IOMMU_PAGES:
            return Invalidation(tlb=(Match(amd.DOMAIN_MASK, item.domain_id), item.start, item.last))
        if item.opcode == Opcode.INVALIDATE_IOMMU_ALL:
            return Invalidation(context=(ANY, ANY), tlb=(ANY, *EVERYWHERE))
        return Invalidation()  # interrupts are not remapped here

    def queue_failed(self, words: tuple[int, ...] | None) -> None:
        """Log why; commands are fetched again after CmdBufEn was cleared and set (specification 2.4)."""
        at = self.ring().pa + self.queue_head
        item = None if words is None else amd.decode_command(words)
        if words is not None and item is None:
            self._log(Event(FaultReason.ILLEGAL_COMMAND_ERROR, address=at))
            return
        pa = at if item is None or item.store_pa is None else item.store_pa
        self._log(Event(FaultReason.COMMAND_HARDWARE_ERROR, flags=amd.EVENT_TARGET_ABORT, address=pa))
