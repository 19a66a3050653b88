# SPDX-License-Identifier: Apache-2.0
"""VT-d: registers, capabilities, what a write does, commands, fault records.

Source: VT-d specification revision 4.x, chapter 11 (register descriptions), 6.5.2 (queued invalidation),
7.1.3 and 7.2.1 (faults); offsets checked against Linux drivers/iommu/intel/iommu.h.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from iokeep.pt.roots import base, vtd
from iokeep.pt.roots.find import Found
from iokeep.pt.roots.vtd import FaultReason, RootFault
from iokeep.soft.hardware.unit import (
    ANY,
    EVERYWHERE,
    FE_OVERFLOW,
    H_UNIT,
    PAGE,
    Context,
    Fault,
    Invalidation,
    Match,
    Ring,
    Unit,
    requester_id,
)

# -- offsets (bytes), specification chapter 11 -----------------------------------------------------
DMAR_VER_REG = 0x00
DMAR_CAP_REG = 0x08
DMAR_ECAP_REG = 0x10
DMAR_GCMD_REG = 0x18
DMAR_GSTS_REG = 0x1C
DMAR_RTADDR_REG = 0x20
DMAR_FSTS_REG = 0x34
DMAR_IQH_REG = 0x80
DMAR_IQT_REG = 0x88
DMAR_IQA_REG = 0x90
DMAR_FRCD_REG = 0x220  # CAP_REG.FRO * 16; one record of 16 bytes per front-end

# -- GCMD_REG and GSTS_REG ---------------------------------------------------------------------------
DMA_GCMD_TE = 1 << 31
DMA_GCMD_SRTP = 1 << 30
DMA_GCMD_QIE = 1 << 26
DMA_GSTS_TES = 1 << 31
DMA_GSTS_RTPS = 1 << 30
DMA_GSTS_QIES = 1 << 26

# -- FSTS_REG ----------------------------------------------------------------------------------------
DMA_FSTS_PFO = 1 << 0
DMA_FSTS_PPF = 1 << 1
DMA_FSTS_IQE = 1 << 4
DMA_FSTS_FRI_SHIFT = 8

# -- FRCD_REG, second word ---------------------------------------------------------------------------
FRCD_F = 1 << 63
FRCD_READ = 1 << 62  # T1: 1 = read request, 0 = write request
FRCD_REASON_SHIFT = 32

# -- IQA_REG, IQT_REG --------------------------------------------------------------------------------
IQA_QS_MASK = 7  # the queue is 4096 << QS bytes
IQA_DW = 1 << 11  # descriptors of 256 bits
IQT_MASK = 0x7FFF0

HIDDEN_ROOT = H_UNIT  # hidden word: RTADDR_REG as latched by GCMD_REG.SRTP

# -- owner tags: domain id | PASID << 16 | OWNER_FIRST where a first-stage table translates --------------
_PASID_SHIFT = 16
OWNER_FIRST = 1 << 40
_DID = vtd.DID_MASK
_OWNER = (1 << 48) - 1

#: bits of the function number that CC_DESC.FM takes out of the comparison (specification 6.5.2.1)
_FUNCTION_MASK = (0, 4, 6, 7)

MAMV = 18  # page-selective invalidation of up to 2**18 pages


def capabilities(n_devices: int) -> tuple[int, int, int]:
    """(VER_REG, CAP_REG, ECAP_REG) of this IOMMU: what the model does, and nothing that it does not do."""
    cap = (
        6  # ND: 16-bit domain ids
        | 0b01110 << 8  # SAGAW: 3, 4 and 5 levels
        | (57 - 1) << 16  # MGAW
        | (DMAR_FRCD_REG // 16) << 24  # FRO
        | 0b0011 << 34  # SSLPS: 2M and 1G
        | 1 << 39  # PSI: page-selective invalidation
        | (n_devices - 1) << 40  # NFR
        | MAMV << 48
        | 3 << 54  # DWD, DRD: writes and reads are drained
        | 1 << 56  # FS1GP
        | 1 << 60  # FS5LP
    )
    ecap = (
        1  # C: page walks are coherent
        | 1 << 1  # QI
        | 0xF << 8  # IRO: where the register-based interface would be; only the queue is modelled
        | 1 << 43  # SMTS
        | 1 << 46  # SSTS
        | 1 << 47  # FSTS
        | 1 << 48  # SMPWCS
    )
    return 0x40, cap, ecap


def _codes(
    access: FaultReason,
    not_present: FaultReason | None,
    reserved: FaultReason,
    denied: tuple[FaultReason, FaultReason],
    width: FaultReason,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Reasons for (reads, writes) by outcome; ``not_present`` None: as if the access were denied."""
    read, write = (
        tuple(int(reason) for reason in (access, not_present or right, reserved, right, width))
        for right in denied
    )
    return read, write


#: specification 7.1.3, for the tables of (legacy, scalable second stage, scalable first stage)
_LEGACY = _codes(
    FaultReason.PAGING_ACCESS,
    None,
    FaultReason.PAGING_RESERVED,
    (FaultReason.NO_READ, FaultReason.NO_WRITE),
    FaultReason.BEYOND_WIDTH,
)
_SECOND = _codes(
    FaultReason.SM_SECOND_ACCESS,
    None,
    FaultReason.SM_SECOND_RESERVED,
    (FaultReason.SM_NO_READ, FaultReason.SM_NO_WRITE),
    FaultReason.SM_SECOND_BEYOND_WIDTH,
)
_FIRST = _codes(
    FaultReason.SM_FIRST_ACCESS,
    FaultReason.SM_FIRST_NOT_PRESENT,
    FaultReason.SM_FIRST_RESERVED,
    (FaultReason.SM_NO_READ, FaultReason.SM_NO_WRITE),
    FaultReason.SM_NOT_CANONICAL,
)


class VtdUnit(Unit):
    """The VT-d registers."""

    KIND = "vtd"

    def hw(self) -> Mapping[str, object]:
        """The registers that lead to the tables, as the ``hw`` part of a capture has them."""
        return {"root_register": f"{self.read64(DMAR_RTADDR_REG):#x}"}

    def power_on(self) -> None:
        """Reset values of a new platform."""
        ver, cap, ecap = capabilities(len(self.front_ends))
        self.bank32[DMAR_VER_REG >> 2] = np.uint32(ver)
        self.bank[DMAR_CAP_REG >> 3] = np.uint64(cap)
        self.bank[DMAR_ECAP_REG >> 3] = np.uint64(ecap)

    def read64(self, offset: int) -> int:
        """Read a 64-bit register (8-byte aligned byte offset)."""
        if offset & 7 or not 0 <= offset < PAGE:
            raise ValueError(f"no 64-bit register at offset {offset:#x}")
        return (
            self.read32(offset) | self.read32(offset + 4) << 32
            if offset < 0x40
            else int(self.bank[offset >> 3])
        )

    def read32(self, offset: int) -> int:
        """Read a 32-bit register (4-byte aligned byte offset)."""
        if offset & 3 or not 0 <= offset < PAGE:
            raise ValueError(f"no 32-bit register at offset {offset:#x}")
        if offset == DMAR_GCMD_REG:
            return 0  # write-only
        if offset == DMAR_FSTS_REG:
            return self._fsts()
        value = int(self.bank32[offset >> 2])
        if offset == DMAR_GSTS_REG and (self.queue.enabled or not self.queue.stopped()):
            value |= DMA_GSTS_QIES
        return value

    def write64(self, offset: int, value: int) -> None:
        """Write a 64-bit register. :raises ValueError: it does not exist here or is read-only."""
        if offset == DMAR_RTADDR_REG:
            self.bank[offset >> 3] = np.uint64(value)
        elif offset == DMAR_IQA_REG:
            if self.queue.enabled:
                raise ValueError("IQA_REG is written while the invalidation queue is enabled")
            self.bank[offset >> 3] = np.uint64(value)
        elif offset == DMAR_IQT_REG:
            tail, ring = value & IQT_MASK, self.ring()
            if tail != value or tail % ring.step or tail >= ring.size:
                raise ValueError(f"IQT_REG {value:#x} is no descriptor of a queue of {ring.size:#x} bytes")
            self.bank[offset >> 3] = np.uint64(tail)
            self.queue.kick()
        elif self._is_fault_record(offset):
            self._clear_fault(offset, value)
        else:
            raise ValueError(f"no writable 64-bit register at offset {offset:#x}")

    def write32(self, offset: int, value: int) -> None:
        """Write a 32-bit register. :raises ValueError: it does not exist here or is read-only."""
        if offset == DMAR_GCMD_REG:
            self._command(value)
        elif offset == DMAR_FSTS_REG:
            self._clear_status(value)
        elif offset % 16 == 12 and self._is_fault_record(offset - 4):
            self._clear_fault(offset - 4, value << 32)
        else:
            raise ValueError(f"no writable 32-bit register at offset {offset:#x}")

    def _command(self, value: int) -> None:
        with self.lock.held():
            status = int(self.bank32[DMAR_GSTS_REG >> 2])
            if value & DMA_GCMD_SRTP:
                self.hidden[HIDDEN_ROOT] = self.bank[DMAR_RTADDR_REG >> 3]
                status |= DMA_GSTS_RTPS
            status = status & ~DMA_GSTS_TES | (DMA_GSTS_TES if value & DMA_GCMD_TE else 0)
            self.bank32[DMAR_GSTS_REG >> 2] = np.uint32(status)
            self.translating = bool(value & DMA_GCMD_TE)
            self.queue.set_enabled(bool(value & DMA_GCMD_QIE))

    def _is_fault_record(self, offset: int) -> bool:
        first = DMAR_FRCD_REG
        return first <= offset < first + 16 * len(self.front_ends) and offset % 16 == 8

    def _clear_fault(self, offset: int, value: int) -> None:
        if value & FRCD_F:  # write 1 to clear; the rest is read-only
            self.bank[offset >> 3] &= np.uint64(FRCD_F - 1)

    def fault_record(self, index: int) -> tuple[int, int]:
        """FRCD_REG of front-end ``index``: (low, high) words."""
        at = (DMAR_FRCD_REG >> 3) + 2 * index
        return int(self.bank[at]), int(self.bank[at + 1])

    def _fsts(self) -> int:
        value = DMA_FSTS_PFO if self.front_ends[:, FE_OVERFLOW].any() else 0
        pending = [i for i in range(len(self.front_ends)) if self.fault_record(i)[1] & FRCD_F]
        if pending:
            value |= DMA_FSTS_PPF | pending[0] << DMA_FSTS_FRI_SHIFT
        if self.queue.failed:
            value |= DMA_FSTS_IQE
        return value

    def _clear_status(self, value: int) -> None:
        if value & DMA_FSTS_PFO:
            self.front_ends[:, FE_OVERFLOW] = np.uint64(0)
        if value & DMA_FSTS_IQE:
            self.queue.clear_error()

    # -- for front-ends ----------------------------------------------------------------------------------
    def look_up(self, device_id: int) -> Context:
        """See :meth:`Unit.look_up`. There is no pass-through, nesting and device-TLB here (ECAP_REG.PT, NEST,
        DT are 0), which makes those programmings invalid.
        """
        found = self._find(device_id)
        path = {step.name: step.words for step in found.path}
        context = path["context"]
        pasid = path.get("pasid")
        if pasid is None:
            if found.table is None or context[0] & vtd.CONTEXT_TT_MASK:
                raise _refused(FaultReason.CONTEXT_INVALID, found.path)
            return Context(found.table, found.domain_id, _LEGACY, silent=_silent(found.path))
        if found.table is None or found.translation == "nested":
            raise _refused(FaultReason.SM_PASID_INVALID, found.path)
        number = context[1] & vtd.RID_PASID_MASK
        owner = found.domain_id | number << _PASID_SHIFT
        if found.translation == "first-stage":
            return Context(found.table, owner | OWNER_FIRST, _FIRST, silent=_silent(found.path))
        return Context(found.table, owner, _SECOND, silent=_silent(found.path))

    def _find(self, device_id: int) -> Found:
        try:
            found = self.found(device_id, {"root_register": int(self.hidden[HIDDEN_ROOT])})
        except RootFault as e:
            early = e.reason in (FaultReason.SM_CONTEXT_NOT_PRESENT, FaultReason.SM_CONTEXT_RESERVED)
            if not early and _device_tlb(e.path):
                raise _refused(FaultReason.SM_CONTEXT_INVALID, e.path) from e
            raise
        if _device_tlb(found.path):
            raise _refused(FaultReason.SM_CONTEXT_INVALID, found.path)
        return found

    def silent(self, fault: base.RootFault) -> bool:
        """FPD is set in one of the entries read."""
        return _silent(fault.path)

    def record_faults(self, index: int, faults: Sequence[Fault], dropped: int) -> None:
        """Primary fault logging (specification 7.2.1): one record per front-end, kept until it is cleared."""
        at = (DMAR_FRCD_REG >> 3) + 2 * index
        for fault in faults:
            if int(self.bank[at + 1]) & FRCD_F:
                dropped += 1
                continue
            high = requester_id(index) | fault.code << FRCD_REASON_SHIFT | FRCD_F
            self.bank[at] = np.uint64(fault.iova & ~(PAGE - 1))
            self.bank[at + 1] = np.uint64(high if fault.need & 2 else high | FRCD_READ)
        if dropped:
            self.front_ends[index, FE_OVERFLOW] = np.uint64(1)

    def fault_text(self, code: int) -> str:
        """Specification 7.1.3."""
        return _REASONS.get(code, f"fault reason {code:#x}")

    # -- for the queue -----------------------------------------------------------------------------------
    def ring(self) -> Ring:
        """IQA_REG."""
        iqa = int(self.bank[DMAR_IQA_REG >> 3])
        size = PAGE << (iqa & IQA_QS_MASK)
        return Ring(iqa & vtd.PA_MASK, size, 32 if iqa & IQA_DW else 16, size)

    @property
    def queue_head(self) -> int:
        """IQH_REG."""
        return int(self.bank[DMAR_IQH_REG >> 3])

    @queue_head.setter
    def queue_head(self, head: int) -> None:
        self.bank[DMAR_IQH_REG >> 3] = np.uint64(head)

    @property
    def queue_tail(self) -> int:
        """IQT_REG."""
        return int(self.bank[DMAR_IQT_REG >> 3])

    def decode(self, words: tuple[int, ...]) -> Invalidation | None:
        """Specification 6.5.2."""
        item = vtd.decode_descriptor(words)
        if item is None:
            return None
        domain = Match(_DID, item.domain_id)
        if item.kind == vtd.INV_WAIT:
            return (
                Invalidation()
                if item.status_pa is None
                else Invalidation(status=(item.status_pa, item.status_data, 4))
            )
        if item.kind == vtd.INV_CONTEXT:
            if item.granularity == vtd.G_GLOBAL:
                return Invalidation(context=(ANY, ANY))
            if item.granularity == vtd.G_DOMAIN:
                return Invalidation(context=(ANY, domain))
            # DID is that of the cached entry: a driver that passes the new one leaves the old one cached.
            mask = 0xFFFF & ~_FUNCTION_MASK[item.function_mask]
            return Invalidation(context=(Match(mask, item.source_id & mask), domain))
        if item.kind == vtd.INV_PASID_CACHE:
            if item.granularity == vtd.PC_GLOBAL:
                return Invalidation(context=(ANY, ANY))
            if item.granularity == vtd.PC_DOMAIN:
                return Invalidation(context=(ANY, domain))
            mask = _DID | vtd.RID_PASID_MASK << _PASID_SHIFT
            return Invalidation(context=(ANY, Match(mask, item.domain_id | item.pasid << _PASID_SHIFT)))
        if item.kind == vtd.INV_PASID_IOTLB:
            # First stage only: domain, PASID and stage must be equal.
            want = item.domain_id | item.pasid << _PASID_SHIFT | OWNER_FIRST
            return Invalidation(tlb=(Match(_OWNER, want), item.start, item.last))
        if item.granularity == vtd.G_GLOBAL:
            return Invalidation(tlb=(ANY, *EVERYWHERE))
        if item.granularity == vtd.G_DOMAIN:
            return Invalidation(tlb=(domain, *EVERYWHERE))
        second = Match(_DID | OWNER_FIRST, item.domain_id)
        return Invalidation(tlb=(second, item.start, item.last))


_REASONS = {int(reason): reason.text for reason in FaultReason}


def _device_tlb(path: base.Path) -> bool:
    """The scalable context entry on the way enables the device-TLB."""
    return any(s.name == "context" and len(s.words) == 4 and s.words[0] & vtd.SM_CONTEXT_DTE for s in path)


def _silent(path: base.Path) -> bool:
    return any(s.name != "root" and s.words[0] & vtd.FPD for s in path)


def _refused(reason: FaultReason, path: base.Path) -> RootFault:
    return RootFault(reason, f"{path[-1].name} entry at pa {path[-1].pa:#x}", path)
