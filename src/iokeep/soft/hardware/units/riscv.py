# SPDX-License-Identifier: Apache-2.0
"""RISC-V IOMMU: its registers, what a write does, and what a look-up finds.

Source: RISC-V IOMMU Architecture Specification, version 1.0 ("the specification"): chapter "Memory-mapped
register interface" for the registers, "In-memory queue interface" for what the queues do; offsets and bits
checked against Linux drivers/iommu/riscv/iommu-bits.h. Where the specification leaves a behaviour open, the
one of its reference model (iommu_ref_model) is taken, but a write that a driver must never do raises.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from iokeep.errors import MemoryAbsent
from iokeep.pt.roots import base, riscv
from iokeep.pt.roots.base import RootFault, bits
from iokeep.pt.roots.riscv import FaultReason, FaultRecord, Kind, Ttyp
from iokeep.soft.hardware.unit import (
    ANY,
    EVERYWHERE,
    PAGE,
    W_ACCESS,
    Context,
    Fault,
    Invalidation,
    Match,
    Ring,
    Unit,
    requester_id,
)

# -- offsets (bytes), specification chapter "Memory-mapped register interface" ----------------------------
CAPABILITIES = 0x00
FCTL = 0x08
DDTP = 0x10
CQB, CQH, CQT = 0x18, 0x20, 0x24
FQB, FQH, FQT = 0x28, 0x30, 0x34
PQB, PQH, PQT = 0x38, 0x40, 0x44  # read-only 0: no ATS
CQCSR, FQCSR, PQCSR = 0x48, 0x4C, 0x50
IPSR = 0x54
ICVEC = 0x2F8  # read-only 0: one wire for all causes
_REGISTERS_64 = frozenset((CAPABILITIES, DDTP, CQB, FQB, PQB, ICVEC))
_REGISTERS_32 = frozenset((FCTL, CQH, CQT, FQH, FQT, PQH, PQT, CQCSR, FQCSR, PQCSR, IPSR))

# -- capabilities ----------------------------------------------------------------------------------------
VERSION_MASK, VERSION_1_0 = 0xFF, 0x10
IGS_WSI = 1 << 28  # interrupts by wire only: here the bits of ipsr are the wires
PAS = 56

# -- cqb and fqb: LOG2SZ-1 in [4:0], PPN in [53:10] ----------------------------------------------------------
LOG2SZ_MASK = bits(4, 0)

# -- cqcsr and fqcsr -------------------------------------------------------------------------------------
QUEUE_EN, QUEUE_IE, QUEUE_MF = 1 << 0, 1 << 1, 1 << 8
QUEUE_ON, QUEUE_BUSY = 1 << 16, 1 << 17
CMD_TO, CMD_ILL, FENCE_W_IP = 1 << 9, 1 << 10, 1 << 11
FQOF = 1 << 9
_CQ_CLEARED_BY_1 = QUEUE_MF | CMD_TO | CMD_ILL | FENCE_W_IP
_CQ_STOPPED = QUEUE_MF | CMD_TO | CMD_ILL
_FQ_CLEARED_BY_1 = QUEUE_MF | FQOF

# -- ipsr ----------------------------------------------------------------------------------------------
CIP, FIP = 1 << 0, 1 << 1

# -- owner tag of cached translations: PSCID, GSCID, and which of the two are valid ------------------------
_GSCID_SHIFT = riscv.PSCID_BITS
OWNER_PSCV = 1 << (riscv.PSCID_BITS + riscv.GSCID_BITS)
OWNER_GV = OWNER_PSCV << 1
_PSCID_MASK = (1 << riscv.PSCID_BITS) - 1
_GSCID_MASK = ((1 << riscv.GSCID_BITS) - 1) << _GSCID_SHIFT

COMMAND_BYTES = riscv.COMMAND_WORDS * 8
RECORD_BYTES = riscv.FAULT_WORDS * 8


def _codes(access: FaultReason, page: FaultReason) -> tuple[int, ...]:
    """Causes by outcome of a walk: a table that is not in memory is an access fault, the rest page faults."""
    return tuple(int(access if outcome == W_ACCESS else page) for outcome in range(1, 6))


#: by stage: (reads, writes)
CODES = {
    1: (
        _codes(FaultReason.READ_ACCESS_FAULT, FaultReason.READ_PAGE_FAULT),
        _codes(FaultReason.WRITE_ACCESS_FAULT, FaultReason.WRITE_PAGE_FAULT),
    ),
    2: (
        _codes(FaultReason.READ_ACCESS_FAULT, FaultReason.READ_GUEST_FAULT),
        _codes(FaultReason.WRITE_ACCESS_FAULT, FaultReason.WRITE_GUEST_FAULT),
    ),
}
_GUEST_FAULTS = (FaultReason.READ_GUEST_FAULT, FaultReason.WRITE_GUEST_FAULT)


def capabilities() -> int:
    """What the model does, and nothing that it does not do: either stage alone, 32-byte device contexts."""
    value = VERSION_1_0 | riscv.CAP_SVPBMT | IGS_WSI | PAS << riscv.CAP_PAS_SHIFT
    for cap in (*riscv.CAP_FIRST.values(), *riscv.CAP_SECOND.values()):
        value |= cap
    return value


def owner_of(*, pscid: int | None = None, gscid: int | None = None) -> int:
    """Tag of translations by the first stage of a PSCID or the second stage of a GSCID."""
    owner = 0 if pscid is None else pscid | OWNER_PSCV
    return owner | (0 if gscid is None else gscid << _GSCID_SHIFT | OWNER_GV)


def queue_base(pa: int, log2_entries: int) -> int:
    """cqb or fqb for a queue of 2**``log2_entries`` (1 ... 32) entries at ``pa``."""
    if not 1 <= log2_entries <= 32:
        raise ValueError(f"a queue of 2**{log2_entries} entries does not exist")
    return base.pa_field("queue", pa, riscv.PA_MASK) >> 2 | (log2_entries - 1)


class RiscvUnit(Unit):
    """The RISC-V IOMMU of the platform. Registers of 64 bits are accessed whole."""

    KIND = "riscv"

    # -- for software ------------------------------------------------------------------------------------
    def power_on(self) -> None:
        """ddtp Off: no inbound transaction is allowed."""
        self.bank[CAPABILITIES >> 3] = np.uint64(capabilities())
        self.bank32[FCTL >> 2] = np.uint32(riscv.FCTL_WSI)

    def read32(self, offset: int) -> int:
        """Read a 32-bit register."""
        if offset not in _REGISTERS_32:
            raise ValueError(f"no 32-bit register at offset {offset:#x}")
        value = int(self.bank32[offset >> 2])
        if offset == CQCSR:
            if not self.queue.enabled and not self.queue.stopped():
                value |= QUEUE_ON | QUEUE_BUSY  # commands that were fetched are being processed
            elif self.queue.enabled:
                value |= QUEUE_ON
        return value

    def read64(self, offset: int) -> int:
        """Read a 64-bit register."""
        if offset not in _REGISTERS_64:
            raise ValueError(f"no 64-bit register at offset {offset:#x}")
        return int(self.bank[offset >> 3])

    def write64(self, offset: int, value: int) -> None:
        """ddtp, cqb, fqb."""
        if offset == DDTP:
            self._write_ddtp(value)
        elif offset in (CQB, FQB):
            csr, index = (CQCSR, CQT) if offset == CQB else (FQCSR, FQH)
            if self.read32(csr) & (QUEUE_EN | QUEUE_ON | QUEUE_BUSY):
                raise ValueError(f"the base register at {offset:#x} is written while its queue is on")
            self.bank[offset >> 3] = np.uint64(value & (riscv.PPN_MASK | LOG2SZ_MASK))
            self.bank32[index >> 2] = np.uint32(0)
        else:
            raise ValueError(f"no writable 64-bit register at offset {offset:#x}")

    def write32(self, offset: int, value: int) -> None:
        """cqt, fqh, cqcsr, fqcsr, ipsr."""
        if offset == CQT:
            self.bank32[CQT >> 2] = np.uint32(value & (self._entries(CQB) - 1))
            self.queue.kick()
        elif offset == FQH:
            self.bank32[FQH >> 2] = np.uint32(value & (self._entries(FQB) - 1))
        elif offset == CQCSR:
            self._write_cqcsr(value)
        elif offset == FQCSR:
            self._write_fqcsr(value)
        elif offset == IPSR:
            with self.lock.held():
                self._clear32(IPSR, value)
                self._raise_pending()
        else:
            raise ValueError(f"no writable 32-bit register at offset {offset:#x}")

    def _write_ddtp(self, value: int) -> None:
        """Illegal modes and changes from one directory to another are ignored, as the reference model does.

        What front-ends have cached stays until it is invalidated; Off and Bare take effect at once.
        """
        with self.lock.held():
            mode = value & riscv.DDTP_MODE_MASK
            old = self.read64(DDTP) & riscv.DDTP_MODE_MASK
            directories = riscv.LEVELS_OF_DDTP
            legal = mode in directories or mode in (riscv.MODE_OFF, riscv.MODE_BARE)
            if not legal or (mode in directories and old in directories):
                return
            self.bank[DDTP >> 3] = np.uint64(value & (riscv.PPN_MASK | riscv.DDTP_MODE_MASK))
            self.translating = mode in directories

    def _write_cqcsr(self, value: int) -> None:
        with self.lock.held():
            before = self.read32(CQCSR)
            if before & QUEUE_BUSY:
                return
            enabled, enable = bool(before & QUEUE_EN), bool(value & QUEUE_EN)
            self._clear32(CQCSR, value & _CQ_CLEARED_BY_1)
            kept = int(self.bank32[CQCSR >> 2]) & _CQ_CLEARED_BY_1
            if enable and not enabled:
                kept = 0
            self.bank32[CQCSR >> 2] = np.uint32(kept | value & (QUEUE_EN | QUEUE_IE))
            self._raise_pending()
            self.queue.set_enabled(enable)
        if enable and self.queue.failed and not self.read32(CQCSR) & _CQ_STOPPED:
            self.queue.clear_error()

    def _write_fqcsr(self, value: int) -> None:
        with self.lock.held():
            before = int(self.bank32[FQCSR >> 2])
            kept = before & _FQ_CLEARED_BY_1 & ~value
            if value & QUEUE_EN and not before & QUEUE_EN:
                kept = 0
                self.bank32[FQT >> 2] = np.uint32(0)
            on = QUEUE_EN | QUEUE_ON if value & QUEUE_EN else 0
            self.bank32[FQCSR >> 2] = np.uint32(kept | on | value & QUEUE_IE)
            self._raise_pending()

    def _clear32(self, offset: int, value: int) -> None:
        self.bank32[offset >> 2] = np.uint32(int(self.bank32[offset >> 2]) & ~value)

    def _set32(self, offset: int, value: int) -> None:
        self.bank32[offset >> 2] = np.uint32(int(self.bank32[offset >> 2]) | value)

    def _raise_pending(self) -> None:
        """ipsr says again what is still so."""
        for csr, causes, bit in ((CQCSR, _CQ_CLEARED_BY_1, CIP), (FQCSR, _FQ_CLEARED_BY_1, FIP)):
            value = int(self.bank32[csr >> 2])
            if value & QUEUE_IE and value & causes:
                self._set32(IPSR, bit)

    def hw(self) -> dict[str, object]:
        """ddtp, capabilities and fctl."""
        return {
            "ddtp": f"{self.read64(DDTP):#x}",
            "caps": f"{self.read64(CAPABILITIES):#x}",
            "fctl": f"{self.read32(FCTL):#x}",
        }

    def fault_text(self, code: int) -> str:
        """The words of a cause."""
        return next((reason.text for reason in FaultReason if reason == code), f"cause {code}")

    # -- for front-ends ----------------------------------------------------------------------------------
    def look_up(self, device_id: int) -> Context:
        """Follow ddtp to the only stage of a device. Two stages, and none, are what the model cannot do."""
        found = self.found(device_id)
        tc = found.path[-1].words[0] if found.path else 0
        if found.table is None or found.translation not in ("first-stage", "second-stage"):
            why = f"device {device_id:#x}: {found.translation}, which this IOMMU does not do"
            raise riscv.RootFault(FaultReason.DDT_MISCONFIGURED, "dc", found.path, why)
        first = found.translation == "first-stage"
        return Context(
            table=found.table,
            owner=owner_of(pscid=found.domain_id) if first else owner_of(gscid=found.domain_id),
            codes=CODES[1 if first else 2],
            silent=bool(tc & riscv.TC_DTF),
        )

    def silent(self, fault: RootFault) -> bool:
        """tc.DTF, for the faults that it keeps from being recorded."""
        contexts = [step for step in fault.path if step.name == "dc"]
        return bool(
            contexts and contexts[0].words[0] & riscv.TC_DTF and int(fault.reason) not in riscv.DTF_REPORTED
        )

    def record_faults(self, index: int, faults: Sequence[Fault], dropped: int) -> None:
        """Into the fault queue, while it is on and has had no error."""
        for fault in faults:
            self._record(requester_id(index), fault)
        if dropped and self._recording:
            self._fault_error(FQOF)

    @property
    def _recording(self) -> bool:
        state = int(self.bank32[FQCSR >> 2])
        return bool(state & QUEUE_ON) and not state & _FQ_CLEARED_BY_1

    def _fault_error(self, bit: int) -> None:
        self._set32(FQCSR, bit)
        self._raise_pending()

    def _record(self, device_id: int, fault: Fault) -> None:
        if not self._recording:
            return
        tail, entries = int(self.bank32[FQT >> 2]), self._entries(FQB)
        if (tail + 1) % entries == int(self.bank32[FQH >> 2]):
            self._fault_error(FQOF)
            return
        record = FaultRecord(
            cause=fault.code,
            ttyp=Ttyp.WRITE if fault.need & base.WRITE else Ttyp.READ,
            device_id=device_id,
            iotval=fault.iova,
            # Of a guest page fault the guest physical address: of a second stage alone the IOVA.
            iotval2=fault.iova & ~3 if fault.code in _GUEST_FAULTS else 0,
        )
        raw = b"".join(word.to_bytes(8, "little") for word in record.words())
        try:
            self.ram.write(self._base(FQB) + tail * RECORD_BYTES, raw)
        except MemoryAbsent:
            self._fault_error(QUEUE_MF)
            return
        self.bank32[FQT >> 2] = np.uint32((tail + 1) % entries)
        if int(self.bank32[FQCSR >> 2]) & QUEUE_IE:
            self._set32(IPSR, FIP)

    # -- for the queue -----------------------------------------------------------------------------------
    def _base(self, offset: int) -> int:
        return (self.read64(offset) & riscv.PPN_MASK) << 2

    def _entries(self, offset: int) -> int:
        return 2 << (self.read64(offset) & LOG2SZ_MASK)

    def ring(self) -> Ring:
        """As cqb says; cqh and cqt are indices."""
        size = self._entries(CQB) * COMMAND_BYTES
        return Ring(self._base(CQB), size, COMMAND_BYTES, size)

    @property
    def queue_head(self) -> int:
        """cqh in bytes."""
        return int(self.bank32[CQH >> 2]) * COMMAND_BYTES

    @queue_head.setter
    def queue_head(self, head: int) -> None:
        before = self.queue_head
        self.bank32[CQH >> 2] = np.uint32(head // COMMAND_BYTES)
        if self.queue.enabled and head != before:
            self._completed(before)

    @property
    def queue_tail(self) -> int:
        """cqt in bytes."""
        return int(self.bank32[CQT >> 2]) * COMMAND_BYTES

    def _completed(self, at: int) -> None:
        """The command at byte ``at`` is done: an IOFENCE.C may raise the wire."""
        raw = self.ram.read(self._base(CQB) + at, COMMAND_BYTES)
        command = riscv.decode_command(_words(raw), self._registers())
        if command is not None and command.wsi:
            self._set32(CQCSR, FENCE_W_IP)
            self._raise_pending()

    def _registers(self) -> riscv.Registers:
        return riscv.Registers(self.read64(DDTP), self.read64(CAPABILITIES), int(self.bank32[FCTL >> 2]))

    def decode(self, words: tuple[int, ...]) -> Invalidation | None:
        """One command; None: cmd_ill, or cqmf where a fence has to store outside of memory."""
        command = riscv.decode_command(words, self._registers())
        if command is None:
            return None
        if command.kind is Kind.FENCE:
            if command.status is None:
                return Invalidation()
            pa, data = command.status
            return Invalidation(status=(pa, data, 4)) if pa < self.ram.size else None
        if command.kind is Kind.DDT:
            who = ANY if command.device_id is None else Match(bits(23, 0), command.device_id)
            return Invalidation(context=(who, ANY))
        if command.kind is Kind.PDT:
            return Invalidation()  # nothing of a process directory is cached
        return Invalidation(tlb=_selected(command))

    def queue_failed(self, words: tuple[int, ...] | None) -> None:
        """cmd_ill, or cqmf where memory failed."""
        illegal = words is not None and riscv.decode_command(words, self._registers()) is None
        self._set32(CQCSR, CMD_ILL if illegal else QUEUE_MF)
        self._raise_pending()


def _words(raw: bytes) -> tuple[int, ...]:
    return tuple(int.from_bytes(raw[i : i + 8], "little") for i in range(0, len(raw), 8))


def _selected(command: riscv.Decoded) -> tuple[Match, int, int]:
    """What IOTINVAL takes out, and no more than that: VMA translations of a first stage, GVMA those of a
    second stage. Entries are not told apart by the G bit, which nobody here sets.
    """
    if command.kind is Kind.VMA:
        mask, want = OWNER_PSCV | OWNER_GV, OWNER_PSCV
        if command.pscid is not None:
            mask, want = mask | _PSCID_MASK, want | command.pscid
    else:
        mask, want = OWNER_GV, OWNER_GV
    if command.gscid is not None:
        mask, want = mask | _GSCID_MASK, want | command.gscid << _GSCID_SHIFT | OWNER_GV
    elif command.kind is Kind.GVMA:
        return Match(mask, want), *EVERYWHERE  # of all VMs: the address does not count
    if command.iova is None:
        return Match(mask, want), *EVERYWHERE
    return Match(mask, want), command.iova, command.iova + PAGE - 1
