# SPDX-License-Identifier: Apache-2.0
"""SMMUv3: register pages 0 and 1, command queue, event queue, what a write does.

Source: Arm SMMUv3 architecture specification (IHI 0070), chapter 6 (registers), 3.5 and 4.1 (command queue),
7.1 (its errors), 7.2 to 7.5 (events, overflow, global errors); offsets checked against Linux
drivers/iommu/arm/arm-smmu-v3/arm-smmu-v3.h, behaviour against QEMU hw/arm/smmuv3.c.

An SMMU of the Non-secure world with both stages, without nesting of one in the other, EL2, substreams, ATS,
PRI, stalls, MSIs, and without bypass: neither SMMUEN = 0 nor a STE lets a transaction through untranslated.
Secure and Realm pages do not exist. Registers that no software here uses (GBPA, IRQ_CTRL and what belongs to
interrupts) do not exist either.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from iokeep.errors import InputError
from iokeep.pt.formats.base import Format
from iokeep.pt.registry import open_format
from iokeep.pt.roots import base, smmu
from iokeep.pt.roots.base import RootFault
from iokeep.pt.roots.smmu import FaultReason
from iokeep.pt.walk import walk
from iokeep.soft.hardware.unit import (
    ANY,
    FE_OVERFLOW,
    PAGE,
    Context,
    Fault,
    Invalidation,
    Match,
    Ring,
    Unit,
    requester_id,
)

# -- offsets (bytes), specification 6.2; page 1 lies 64 KiB above page 0 --------------------------------
IDR0, IDR1, IDR2, IDR3, IDR4, IDR5 = (0x00, 0x04, 0x08, 0x0C, 0x10, 0x14)
IIDR, AIDR = 0x18, 0x1C
CR0, CR0ACK, CR1, CR2 = 0x20, 0x24, 0x28, 0x2C
GERROR, GERRORN = 0x60, 0x64
STRTAB_BASE, STRTAB_BASE_CFG = 0x80, 0x88
CMDQ_BASE, CMDQ_PROD, CMDQ_CONS = 0x90, 0x98, 0x9C
EVENTQ_BASE = 0xA0
PAGE_1 = 0x10000
EVENTQ_PROD, EVENTQ_CONS = PAGE_1 + 0xA8, PAGE_1 + 0xAC

# -- CR0, CR2, GERROR, queues --------------------------------------------------------------------------
CR0_SMMUEN = smmu.CR0_SMMUEN
CR0_EVENTQEN, CR0_CMDQEN = 1 << 2, 1 << 3
CR0_BITS = CR0_SMMUEN | CR0_EVENTQEN | CR0_CMDQEN
CR1_BITS = 0xFFF
CR2_RECINVSID, CR2_PTM = 1 << 1, 1 << 2
CR2_BITS = CR2_RECINVSID | CR2_PTM
GERROR_CMDQ_ERR, GERROR_EVENTQ_ABT_ERR = 1 << 0, 1 << 2
QUEUE_RA = 1 << 62
QUEUE_ADDR = ((1 << 52) - 1) & ~0x1F
QUEUE_LOG2SIZE = 0x1F
CONS_ERR_SHIFT = 24
CONS_ERR = 0x7F << CONS_ERR_SHIFT
CERROR_ILL, CERROR_ABT = 1, 2
#: EVENTQ_PROD.OVFLG, EVENTQ_CONS.OVACKFLG
OVERFLOW = 1 << 31

# -- identification ------------------------------------------------------------------------------------
SIDSIZE = 16
#: largest queues: 2**19 entries, as QEMU
LOG2QUEUE = 19
_IDR = {
    IDR0: (
        1 << 0  # S2P
        | 1 << 1  # S1P
        | 2 << 2  # TTF: AArch64 tables
        | 1 << 4  # COHACC
        | 1 << 12  # ASID16
        | 1 << 18  # VMID16
        | 2 << 21  # TTENDIAN: little-endian
        | 1 << 24  # STALL_MODEL: no stalls
        | 1 << 26  # TERM_MODEL: terminated transactions are aborted
        | 1 << 27  # ST_LEVEL: two-level stream tables
    ),
    IDR1: SIDSIZE | LOG2QUEUE << 16 | LOG2QUEUE << 21,  # SSIDSIZE 0
    IDR2: 0,
    IDR3: 1 << 10,  # RIL: range invalidation; BBML 0
    IDR4: 0,
    IDR5: 5 | 1 << 4 | 1 << 5 | 1 << 6,  # OAS 48 bits; GRAN4K, GRAN16K, GRAN64K
    IIDR: 0,
    AIDR: 1,  # SMMUv3.1
}

# -- owner tags: ASID | VMID << 16 | stage << 32 ---------------------------------------------------------
VMID_SHIFT, STAGE_SHIFT = 16, 32
ASID_MASK, VMID_MASK, STAGE_MASK = 0xFFFF, 0xFFFF << VMID_SHIFT, 3 << STAGE_SHIFT
STAGE_1, STAGE_2 = 1 << STAGE_SHIFT, 2 << STAGE_SHIFT
_SID_MASK = (1 << 32) - 1
#: of a walk's outcomes: W_ACCESS, W_NOT_PRESENT, W_RESERVED, W_DENIED, W_WIDTH; the item says more exactly
_CODES = (
    int(FaultReason.F_WALK_EABT),
    int(FaultReason.F_TRANSLATION),
    int(FaultReason.F_ADDR_SIZE),
    int(FaultReason.F_PERMISSION),
    int(FaultReason.F_TRANSLATION),
)
_REASONS = {int(reason): reason for reason in FaultReason}
#: registers that software may write at any time, and the bits that they have
_PLAIN = {CR1: CR1_BITS, CR2: CR2_BITS}


class SmmuUnit(Unit):
    """An SMMUv3. Offsets from :data:`PAGE_1` on are those of register page 1."""

    KIND = "smmuv3"

    # -- registers ---------------------------------------------------------------------------------------
    def power_on(self) -> None:
        """See Unit."""
        for offset, value in _IDR.items():
            self._put(offset, value)

    @staticmethod
    def _index(offset: int) -> int:
        """Index into ``bank32``, where page 1 follows page 0."""
        return (offset if offset < PAGE else offset - PAGE_1 + PAGE) >> 2

    def _get(self, offset: int) -> int:
        return int(self.bank32[self._index(offset)])

    def _put(self, offset: int, value: int) -> None:
        self.bank32[self._index(offset)] = np.uint32(value)

    def _get64(self, offset: int) -> int:
        return int(self.bank[offset >> 3])

    def read32(self, offset: int) -> int:
        """See Unit."""
        if offset & 3 or not (0 <= offset < PAGE or PAGE_1 <= offset < PAGE_1 + PAGE):
            raise ValueError(f"no 32-bit register at offset {offset:#x}")
        if offset == CR0ACK:
            busy = not self.queue.enabled and not self.queue.stopped()
            return self._get(CR0) | (CR0_CMDQEN if busy else 0)
        return self._get(offset)

    def read64(self, offset: int) -> int:
        """See Unit."""
        if offset not in (STRTAB_BASE, CMDQ_BASE, EVENTQ_BASE):
            raise ValueError(f"no 64-bit register at offset {offset:#x}")
        return self._get64(offset)

    def write32(self, offset: int, value: int) -> None:
        """See Unit."""
        with self.lock.held():
            if offset == CR0:
                self._set_cr0(value)
            elif offset == GERRORN:
                self._acknowledge(value)
            elif offset in _PLAIN:
                self._put(offset, value & _PLAIN[offset])
            elif offset == STRTAB_BASE_CFG:
                self._guard(offset, CR0_SMMUEN, "SMMUEN")
                self._put(offset, value)
            elif offset == CMDQ_CONS:
                self._guard(offset, CR0_CMDQEN, "CMDQEN")
                self._put(offset, value & (self._wrap(CMDQ_BASE) | CONS_ERR))
            elif offset == CMDQ_PROD:
                self._put(offset, value & self._wrap(CMDQ_BASE))
            elif offset == EVENTQ_CONS:
                self._put(offset, value & (self._wrap(EVENTQ_BASE) | OVERFLOW))
            elif offset == EVENTQ_PROD:
                self._guard(offset, CR0_EVENTQEN, "EVENTQEN")
                self._put(offset, value & (self._wrap(EVENTQ_BASE) | OVERFLOW))
            else:
                raise ValueError(f"no writable 32-bit register at offset {offset:#x}")
        if offset == CMDQ_PROD:
            self.queue.kick()

    def write64(self, offset: int, value: int) -> None:
        """See Unit."""
        with self.lock.held():
            if offset == STRTAB_BASE:
                self._guard(offset, CR0_SMMUEN, "SMMUEN")
                value &= smmu.STRTAB_BASE_RA | smmu.STRTAB_ADDR
            elif offset in (CMDQ_BASE, EVENTQ_BASE):
                enable = (CR0_CMDQEN, "CMDQEN") if offset == CMDQ_BASE else (CR0_EVENTQEN, "EVENTQEN")
                self._guard(offset, *enable)
                value &= QUEUE_RA | QUEUE_ADDR | QUEUE_LOG2SIZE
                # LOG2SIZE is limited to IDR1.CMDQS, IDR1.EVENTQS (6.3.26, 6.3.29).
                value = value & ~QUEUE_LOG2SIZE | min(value & QUEUE_LOG2SIZE, LOG2QUEUE)
            else:
                raise ValueError(f"no writable 64-bit register at offset {offset:#x}")
            self.bank[offset >> 3] = np.uint64(value)

    def _guard(self, offset: int, bit: int, name: str) -> None:
        """A register that may only be written while an enable bit is 0, in CR0 and in CR0ACK."""
        if (self._get(CR0) | self.read32(CR0ACK)) & bit:
            raise ValueError(
                f"register {offset:#x} is read-only while CR0.{name} or its acknowledgement is 1"
            )

    def _wrap(self, base_offset: int) -> int:
        """Index and wrap bit of a queue."""
        return (2 << (self._get64(base_offset) & QUEUE_LOG2SIZE)) - 1

    def _set_cr0(self, value: int) -> None:
        """CR0 (6.3.9): SMMUEN and EVENTQEN act at once; CMDQEN = 0 when no command is being executed."""
        value &= CR0_BITS
        if value & CR0_CMDQEN and not self.queue.enabled and self._pending_error() & GERROR_CMDQ_ERR:
            raise ValueError("CMDQEN is set while GERROR.CMDQ_ERR is not acknowledged")
        self._put(CR0, value)
        self.translating = bool(value & CR0_SMMUEN)
        self.queue.set_enabled(bool(value & CR0_CMDQEN), self.queue_head)

    def _pending_error(self) -> int:
        return self._get(GERROR) ^ self._get(GERRORN)

    def _raise_error(self, bit: int) -> None:
        """Global errors toggle their bit unless they are active (7.5)."""
        if not self._pending_error() & bit:
            self._put(GERROR, self._get(GERROR) ^ bit)

    def _acknowledge(self, value: int) -> None:
        before = self._pending_error()
        self._put(GERRORN, value & (GERROR_CMDQ_ERR | GERROR_EVENTQ_ABT_ERR))
        if before & ~self._pending_error() & GERROR_CMDQ_ERR:
            self.queue.clear_error()

    def hw(self) -> dict[str, object]:
        """See Unit."""
        return {
            "smmu_regs": {
                "STRTAB_BASE": f"{self._get64(STRTAB_BASE):#x}",
                "STRTAB_BASE_CFG": f"{self._get(STRTAB_BASE_CFG):#x}",
                "CR0": f"{self._get(CR0):#x}",
                "CR2": f"{self._get(CR2):#x}",
                "IDR": {f"IDR{i}": f"{_IDR[4 * i]:#x}" for i in (0, 1, 3, 5)},
            }
        }

    # -- look-up -----------------------------------------------------------------------------------------
    def look_up(self, device_id: int) -> Context:
        """See Unit; also what makes an entry bad by the features that this SMMU does not have."""
        found = self.found(device_id)
        path = found.path
        ste = next((step for step in path if step.name == "ste"), None)
        if ste is None or found.table is None:
            raise base.refuse(smmu.RootFault, FaultReason.C_BAD_STE, path, "this SMMU has no bypass")
        second = found.translation == "second-stage"
        if found.translation == "nested":
            raise base.refuse(smmu.RootFault, FaultReason.C_BAD_STE, path, "this SMMU does not nest")
        if ste.words[1] & smmu.S1STALLD or (second and ste.words[1] & smmu.S2FWB):
            raise base.refuse(smmu.RootFault, FaultReason.C_BAD_STE, path, "S1STALLD or S2FWB is set")
        vmid = ste.words[2] & smmu.S2VMID
        if second:
            word = ste.words[2]
            if word & (smmu.S2HA | smmu.S2HD | smmu.S2S):
                raise base.refuse(smmu.RootFault, FaultReason.C_BAD_STE, path, "S2HA, S2HD or S2S is set")
            owner = STAGE_2 | vmid << VMID_SHIFT
            silent = not word & smmu.S2R
        else:
            word = path[-1].words[0]
            # No HTTU, no stalls, and TERM_MODEL = 1.
            if word & (smmu.CD_HA | smmu.CD_HD | smmu.CD_S) or not word & smmu.CD_A:
                raise base.refuse(smmu.RootFault, FaultReason.C_BAD_CD, path, "HA, HD or S is set, or A is 0")
            owner = STAGE_1 | vmid << VMID_SHIFT | found.domain_id
            silent = not word & smmu.CD_R
        return Context(
            table=found.table, owner=owner, codes=(_CODES, _CODES), upper=found.upper, silent=silent
        )

    def silent(self, fault: RootFault) -> bool:
        """An aborted stream records nothing, and a bad stream id only with CR2.RECINVSID."""
        if fault.reason == FaultReason.C_BAD_STREAMID:
            return not self._get(CR2) & CR2_RECINVSID
        return fault.reason == FaultReason.ABORTED

    # -- events ------------------------------------------------------------------------------------------
    def fault_text(self, code: int) -> str:
        """See Unit."""
        reason = _REASONS.get(code)
        return f"event {code:#x}" if reason is None else f"{reason.name}: {reason.text}"

    def record_faults(self, index: int, faults: Sequence[Fault], dropped: int) -> None:
        """See Unit: into the event queue (7.2.1); a full queue overflows (7.4)."""
        lost = dropped
        for fault in faults:
            reason = self._exactly(requester_id(index), fault)
            if reason <= smmu.EVT_ID:
                lost += not self._put_event(smmu.event_words(self._event(requester_id(index), reason, fault)))
        if lost and self._get(CR0) & CR0_EVENTQEN:
            self.front_ends[index, FE_OVERFLOW] = np.uint64(1)
            prod, cons = self._get(EVENTQ_PROD), self._get(EVENTQ_CONS)
            if not (prod ^ cons) & OVERFLOW:
                self._put(EVENTQ_PROD, prod ^ OVERFLOW)

    def _exactly(self, sid: int, fault: Fault) -> FaultReason:
        """What the item that ended a walk says more exactly than the walk's outcome: an access flag of 0 goes
        before the permissions, and what is no valid descriptor before its address. Of a table that has
        changed since, the outcome.
        """
        reason = _REASONS[fault.code]
        if reason not in (FaultReason.F_PERMISSION, FaultReason.F_ADDR_SIZE):
            return reason
        try:
            context = self.look_up(sid)
            for table in (context.table, context.upper):
                fmt = open_format(table.format, table.config) if table is not None else None
                if table is not None and fmt is not None and fmt.covers(fault.iova):
                    level, _, item = walk(fmt, self.ram, table.root_pa, fault.iova).steps[-1]
                    return _reason_of(reason, fmt, level, item)
        except InputError:
            pass
        return reason

    @staticmethod
    def _event(sid: int, reason: FaultReason, fault: Fault) -> smmu.Event:
        if reason < FaultReason.F_WALK_EABT:
            return smmu.Event(code=reason, sid=sid)
        second = fault.owner & STAGE_MASK == STAGE_2
        walk = reason == FaultReason.F_WALK_EABT
        return smmu.Event(
            code=reason,
            sid=sid,
            read=not fault.need & 2,
            stage2=second,
            cls=smmu.CLASS_TT if walk and not second else smmu.CLASS_IN,
            iova=fault.iova,
            ipa=fault.iova & smmu.EVT_IPA if second and not walk else 0,
        )

    def _put_event(self, words: Sequence[int]) -> bool:
        """Append a record; False: the queue is full."""
        if not self._get(CR0) & CR0_EVENTQEN or self._pending_error() & GERROR_EVENTQ_ABT_ERR:
            return True
        value = self._get64(EVENTQ_BASE)
        size = 1 << (value & QUEUE_LOG2SIZE)
        prod, cons, wrap = self._get(EVENTQ_PROD), self._get(EVENTQ_CONS), 2 * size - 1
        if (prod ^ cons) & wrap == size:
            return False
        length = size * smmu.EVENT_BYTES
        pa = (value & QUEUE_ADDR) // length * length + (prod & (size - 1)) * smmu.EVENT_BYTES
        if pa + smmu.EVENT_BYTES > self.ram.size:
            self._raise_error(GERROR_EVENTQ_ABT_ERR)
            return True
        for i, word in enumerate(words):
            self.ram.store64(pa + 8 * i, word)
        self._put(EVENTQ_PROD, prod & ~wrap | (prod + 1) & wrap)
        return True

    # -- command queue -----------------------------------------------------------------------------------
    def ring(self) -> Ring:
        """See Unit; a wrap bit above the index."""
        value = self._get64(CMDQ_BASE)
        size = smmu.COMMAND_BYTES << (value & QUEUE_LOG2SIZE)
        return Ring((value & QUEUE_ADDR) // size * size, size, smmu.COMMAND_BYTES, 2 * size)

    @property
    def queue_head(self) -> int:
        """CMDQ_CONS.RD in bytes."""
        return (self._get(CMDQ_CONS) & self._wrap(CMDQ_BASE)) * smmu.COMMAND_BYTES

    @queue_head.setter
    def queue_head(self, head: int) -> None:
        self._put(CMDQ_CONS, self._get(CMDQ_CONS) & CONS_ERR | head // smmu.COMMAND_BYTES)

    @property
    def queue_tail(self) -> int:
        """CMDQ_PROD.WR in bytes."""
        return self._get(CMDQ_PROD) * smmu.COMMAND_BYTES

    def queue_failed(self, words: tuple[int, ...] | None) -> None:
        """CMDQ_CONS.ERR, then GERROR.CMDQ_ERR (7.1)."""
        error = CERROR_ABT if words is None else CERROR_ILL
        self._put(CMDQ_CONS, self._get(CMDQ_CONS) & ~CONS_ERR | error << CONS_ERR_SHIFT)
        self._raise_error(GERROR_CMDQ_ERR)

    def decode(self, words: tuple[int, ...]) -> Invalidation | None:
        """See Unit."""
        command = smmu.decode_command(words)
        if command is None:
            return None
        op = command.op
        if op in (smmu.Op.CFGI_STE, smmu.Op.CFGI_STE_RANGE):
            mask = _SID_MASK >> command.sid_lg2 << command.sid_lg2
            return Invalidation(context=(Match(mask, command.sid), ANY))
        if op in (smmu.Op.CFGI_CD, smmu.Op.CFGI_CD_ALL):
            if command.ssid:
                return Invalidation()  # IDR1.SSIDSIZE = 0
            return Invalidation(context=(Match(_SID_MASK, command.sid), Match(STAGE_MASK, STAGE_1)))
        if op < smmu.Op.TLBI_NH_ALL or op == smmu.Op.SYNC:
            return Invalidation()
        return Invalidation(tlb=(_owners(command), command.start, command.last))


def _reason_of(reason: FaultReason, fmt: Format, level: int, item: int) -> FaultReason:
    spec = fmt.levels[level]
    if not spec.is_present(item):
        return reason
    leaf = spec.is_leaf(item)
    if reason == FaultReason.F_PERMISSION:
        flagged = fmt.config["hw_access"] or item & dict(spec.named)["accessed"]
        return reason if flagged or not leaf else FaultReason.F_ACCESS
    reserved = spec.leaf_reserved if leaf else spec.table_reserved
    return reason if item & reserved else FaultReason.F_TRANSLATION


def _owners(command: smmu.Command) -> Match:
    """Whose translations a TLBI command forgets (4.4.2 to 4.4.4)."""
    vmid = command.vmid << VMID_SHIFT
    if command.op == smmu.Op.TLBI_NSNH_ALL:
        return ANY
    if command.op == smmu.Op.TLBI_S12_VMALL:
        return Match(VMID_MASK, vmid)
    if command.op == smmu.Op.TLBI_S2_IPA:
        return Match(STAGE_MASK | VMID_MASK, STAGE_2 | vmid)
    if command.op in (smmu.Op.TLBI_NH_ALL, smmu.Op.TLBI_NH_VAA):
        return Match(STAGE_MASK | VMID_MASK, STAGE_1 | vmid)
    return Match(STAGE_MASK | VMID_MASK | ASID_MASK, STAGE_1 | vmid | command.asid)
