# SPDX-License-Identifier: Apache-2.0
"""RISC-V IOMMU: the way from the device directory table pointer (``ddtp``) to a page table, the commands of
its command queue, the records of its fault queue.

Source: RISC-V IOMMU Architecture Specification (riscv-non-isa/riscv-iommu, "the specification" below),
chapter "Data Structures": device directory, device context, "Device-context configuration checks", process
directory, "Process to translate an IOVA"; chapter "In-memory queue interface". Checked against Linux
drivers/iommu/riscv/iommu-bits.h, the reference model in the specification's repository (iommu_ref_model), and
a capture of a running kernel.

Entries are plain ints, one per 64-bit word, lowest word first; a PPN counts 4096 bytes. Little-endian
structures and tables only (fctl.BE = 0), and RV64 tables only (fctl.GXL = 0, tc.SXL = 0).
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from iokeep.mem.memory import Memory
from iokeep.pt.roots import base
from iokeep.pt.roots.base import Path, TableRoot, bits, number_field, pa_field, read_step, refuse

# -- ddtp, and the entries that lead on: V, PPN in [53:10] -------------------------------------------------
DDTP_MODE_MASK = bits(3, 0)
DDTP_BUSY = 1 << 4
DDTP_RESERVED = bits(9, 5) | bits(63, 54)
PPN_SHIFT = 10
PPN_MASK = bits(53, 10)
MODE_OFF, MODE_BARE, MODE_1LVL, MODE_2LVL, MODE_3LVL = range(5)
LEVELS_OF_DDTP = {MODE_1LVL: 1, MODE_2LVL: 2, MODE_3LVL: 3}
V = 1 << 0
NON_LEAF_RESERVED = bits(9, 1) | bits(63, 54)
PA_MASK = bits(55, 12)

# -- capabilities and fctl registers -------------------------------------------------------------------
CAP_ATS, CAP_T2GPA = 1 << 25, 1 << 26
CAP_MSI_FLAT = 1 << 22
CAP_SVPBMT = 1 << 15
CAP_AMO_HWAD = 1 << 24
CAP_QOSID = 1 << 41
CAP_PAS_SHIFT, CAP_PAS_MASK = 32, 0x3F
FCTL_BE, FCTL_WSI, FCTL_GXL = 1 << 0, 1 << 1, 1 << 2

# -- device context ------------------------------------------------------------------------------------
DC_BASE_WORDS, DC_EXTENDED_WORDS = 4, 8
TC_EN_ATS, TC_EN_PRI, TC_T2GPA, TC_DTF, TC_PDTV = (1 << n for n in (1, 2, 3, 4, 5))
TC_PRPR, TC_GADE, TC_SADE, TC_DPE, TC_SBE, TC_SXL = (1 << n for n in (6, 7, 8, 9, 10, 11))
TC_RESERVED = bits(23, 12) | bits(63, 32)
ATP_MODE_SHIFT = 60
ATP_PPN_MASK = bits(43, 0)
FSC_RESERVED = MSIPTP_RESERVED = bits(59, 44)
GSCID_SHIFT, GSCID_BITS = 44, 16
PSCID_SHIFT, PSCID_BITS = 12, 20
TA_RESERVED = bits(11, 0) | bits(39, 32)
TA_QOS = bits(63, 40)  # RCID and MCID, reserved without capabilities.QOSID
MSI_ADDRESS_RESERVED = bits(63, 52)
MSIPTP_OFF, MSIPTP_FLAT = 0, 1
ATP_BARE = 0
#: iosatp.MODE and iohgatp.MODE with SXL = 0, GXL = 0 -> levels; 8 is Sv39 and Sv39x4
LEVELS_OF_ATP = {8: 3, 9: 4, 10: 5}
ATP_OF_LEVELS = {levels: mode for mode, levels in LEVELS_OF_ATP.items()}
#: capabilities bit of each first-stage and second-stage mode
CAP_FIRST = {8: 1 << 9, 9: 1 << 10, 10: 1 << 11}
CAP_SECOND = {8: 1 << 17, 9: 1 << 18, 10: 1 << 19}

# -- process directory ---------------------------------------------------------------------------------
#: pdtp.MODE -> levels; a process id is PDI[0] of 8 bits, PDI[1] of 9, PDI[2] of 3
LEVELS_OF_PDTP = {1: 1, 2: 2, 3: 3}
PID_BITS = {1: 8, 2: 17, 3: 20}
CAP_PDTP = {1: 1 << 38, 2: 1 << 39, 3: 1 << 40}
PC_TA_RESERVED = bits(11, 3) | bits(63, 32)


class FaultReason(base.FaultCode):
    """Causes in fault records (specification, "Fault/Event-Queue"; Linux RISCV_IOMMU_FQ_CAUSE_*)."""

    EXECUTE_ACCESS_FAULT = 1, "instruction access fault"
    READ_MISALIGNED = 4, "the read is misaligned"
    READ_ACCESS_FAULT = 5, "a table or the page is not in memory (read)"
    WRITE_MISALIGNED = 6, "the write is misaligned"
    WRITE_ACCESS_FAULT = 7, "a table or the page is not in memory (write)"
    EXECUTE_PAGE_FAULT = 12, "the first stage translates no instruction fetch"
    READ_PAGE_FAULT = 13, "the first stage translates no read"
    WRITE_PAGE_FAULT = 15, "the first stage translates no write"
    EXECUTE_GUEST_FAULT = 20, "the second stage translates no instruction fetch"
    READ_GUEST_FAULT = 21, "the second stage translates no read"
    WRITE_GUEST_FAULT = 23, "the second stage translates no write"
    DMA_DISABLED = 256, "all inbound transactions are disallowed"
    DDT_LOAD_FAULT = 257, "a device directory entry is not in memory"
    DDT_INVALID = 258, "the device directory entry is not valid"
    DDT_MISCONFIGURED = 259, "the device directory entry is misconfigured"
    TTYP_BLOCKED = 260, "the transaction type is disallowed"
    MSI_LOAD_FAULT = 261, "an MSI table entry is not in memory"
    MSI_INVALID = 262, "the MSI table entry is not valid"
    MSI_MISCONFIGURED = 263, "the MSI table entry is misconfigured"
    MRIF_FAULT = 264, "the memory-resident interrupt file is not in memory"
    PDT_LOAD_FAULT = 265, "a process directory entry is not in memory"
    PDT_INVALID = 266, "the process directory entry is not valid"
    PDT_MISCONFIGURED = 267, "the process directory entry is misconfigured"
    DDT_CORRUPTED = 268, "the device directory is corrupted"
    PDT_CORRUPTED = 269, "the process directory is corrupted"
    MSI_CORRUPTED = 270, "the MSI table is corrupted"
    MRIF_CORRUPTED = 271, "the memory-resident interrupt file is corrupted"
    INTERNAL_ERROR = 272, "internal data path error"
    MSI_WRITE_FAULT = 273, "the IOMMU's own MSI write faulted"
    PT_CORRUPTED = 274, "a page table is corrupted"


#: causes that are recorded although tc.DTF is set (specification, table of tc.DTF's effect)
DTF_REPORTED = frozenset((256, 257, 258, 259, 268, 272, 273))


#: what an absent, an invalid and a misconfigured directory entry is reported as
Codes = tuple[FaultReason, FaultReason, FaultReason]
_DDT = FaultReason.DDT_LOAD_FAULT, FaultReason.DDT_INVALID, FaultReason.DDT_MISCONFIGURED
_PDT = FaultReason.PDT_LOAD_FAULT, FaultReason.PDT_INVALID, FaultReason.PDT_MISCONFIGURED


class RootFault(base.RootFault):
    """No page table; ``reason`` is a :class:`FaultReason`."""

    kind = "riscv-root"
    record = "RISC-V IOMMU cause"


@dataclass(frozen=True, slots=True, kw_only=True)
class RootInfo(base.RootInfo):
    """What the device directory says about one device.

    ``domain_id`` is the PSCID of a first stage, the GSCID of a second stage or of "nested".

    :param pscid: tag of the first stage. :param gscid: tag of the second stage.
    :param first: "nested" and no process directory: the first-stage table, its ``root_pa`` guest physical.
    :param directory: "nested" with a process directory: its guest physical address, not followed.
    :param msiptp: the MSI page table pointer, None without one.
    """

    pscid: int = 0
    gscid: int = 0
    first: TableRoot | None = None
    directory: int | None = None
    msiptp: int | None = None


@dataclass(frozen=True, slots=True)
class Registers:
    """The registers that the way depends on. :param caps: capabilities. :param fctl: features control."""

    ddtp: int
    caps: int
    fctl: int = 0

    @property
    def extended(self) -> bool:
        """Device contexts of 64 bytes."""
        return bool(self.caps & CAP_MSI_FLAT)


def device_index(device_id: int, *, extended: bool) -> tuple[int, int, int]:
    """DDI[0], DDI[1], DDI[2]: 7, 9 and 8 bits of the id, or 6, 9 and 9 with 64-byte contexts."""
    low = 6 if extended else 7
    return device_id & ((1 << low) - 1), device_id >> low & 0x1FF, device_id >> (low + 9)


def find_root(mem: Memory, regs: Registers, device_id: int, process_id: int | None = None) -> RootInfo:
    """Follow ``ddtp`` to the page table that translates untranslated requests of ``device_id``.

    :param device_id: 24 bits; for PCI the requester id.
    :param process_id: 20 bits; None = a request without.
    :raises RootFault: an entry is absent, not valid or misconfigured, or the request is blocked.
    """
    number_field("device id", device_id, 24)
    where = f"ddtp {regs.ddtp:#x}"
    mode = regs.ddtp & DDTP_MODE_MASK
    if mode == MODE_OFF:
        raise RootFault(FaultReason.DMA_DISABLED, where, ())
    if regs.fctl & (FCTL_BE | FCTL_GXL):
        why = f"fctl {regs.fctl:#x}: big-endian structures and RV32 guests are not read"
        raise RootFault(FaultReason.DDT_MISCONFIGURED, where, (), why)
    if mode == MODE_BARE:
        return RootInfo(translation="pass-through", table=None, domain_id=0, pasid=None, path=())
    levels = LEVELS_OF_DDTP.get(mode)
    if levels is None or regs.ddtp & DDTP_RESERVED:
        raise RootFault(FaultReason.DMA_DISABLED, where, (), "the mode or a bit that is set is reserved")
    index = device_index(device_id, extended=regs.extended)
    if any(index[levels:]):
        why = f"device id {device_id:#x} is wider than a directory of {levels} levels"
        raise RootFault(FaultReason.TTYP_BLOCKED, where, (), why)
    table = ppn_pa(regs.ddtp)
    path: Path = ()
    for level in range(levels - 1, 0, -1):
        table, path = _next(mem, "ddte", table + index[level] * 8, path, _DDT)
    words = DC_EXTENDED_WORDS if regs.extended else DC_BASE_WORDS
    pa = table + index[0] * words * 8
    path = read_step(mem, "dc", pa, words, path, RootFault, FaultReason.DDT_LOAD_FAULT)
    return of_device_context(mem, regs, path, process_id)


def ppn_pa(word: int) -> int:
    """pa that ``ddtp`` or a directory entry leads to."""
    return (word & PPN_MASK) >> PPN_SHIFT << 12


def _next(mem: Memory, name: str, pa: int, path: Path, codes: Codes) -> tuple[int, Path]:
    """Follow one non-leaf entry of a device or process directory."""
    path = read_step(mem, name, pa, 1, path, RootFault, codes[0])
    entry = path[-1].words[0]
    if not entry & V:
        raise refuse(RootFault, codes[1], path)
    if entry & NON_LEAF_RESERVED:
        raise refuse(RootFault, codes[2], path, "a reserved bit is set")
    return ppn_pa(entry), path


def _bad_dc(path: Path, why: str) -> base.RootFault:
    return refuse(RootFault, FaultReason.DDT_MISCONFIGURED, path, why)


def _check_dc(regs: Registers, path: Path) -> None:
    """Specification, "Device-context configuration checks"."""
    w = path[-1].words
    tc, iohgatp, ta, fsc = w[:4]
    caps = regs.caps
    if not tc & V:
        raise refuse(RootFault, FaultReason.DDT_INVALID, path)
    reserved = tc & TC_RESERVED | fsc & FSC_RESERVED | ta & TA_RESERVED
    reserved |= 0 if caps & CAP_QOSID else ta & TA_QOS
    if len(w) == DC_EXTENDED_WORDS:
        reserved |= w[4] & MSIPTP_RESERVED | (w[5] | w[6]) & MSI_ADDRESS_RESERVED | w[7]
    if reserved:
        raise _bad_dc(path, "a reserved bit is set")
    if tc & (TC_SXL | TC_SBE):
        raise _bad_dc(path, "tc.SXL and tc.SBE have to be as fctl.GXL and fctl.BE, 0")
    hmode = iohgatp >> ATP_MODE_SHIFT
    rules = (
        (not caps & CAP_ATS and tc & (TC_EN_ATS | TC_EN_PRI | TC_PRPR), "ATS is not supported"),
        (not tc & TC_EN_ATS and tc & (TC_T2GPA | TC_EN_PRI), "T2GPA or EN_PRI without EN_ATS"),
        (not tc & TC_EN_PRI and tc & TC_PRPR, "PRPR without EN_PRI"),
        (tc & TC_T2GPA and (not caps & CAP_T2GPA or hmode == ATP_BARE), "T2GPA is not possible"),
        (not tc & TC_PDTV and tc & TC_DPE, "DPE without PDTV"),
        (not caps & CAP_AMO_HWAD and tc & (TC_SADE | TC_GADE), "SADE or GADE without AMO_HWAD"),
        (
            hmode != ATP_BARE and not caps & CAP_SECOND.get(hmode, 0),
            f"iohgatp.MODE {hmode} is not supported",
        ),
        (hmode != ATP_BARE and iohgatp & 3, "the second-stage root is not aligned to 16 KiB"),
    )
    for broken, why in rules:
        if broken:
            raise _bad_dc(path, why)
    if len(w) == DC_EXTENDED_WORDS:
        mode = w[4] >> ATP_MODE_SHIFT
        if mode > MSIPTP_FLAT or (mode != MSIPTP_OFF and hmode == ATP_BARE):
            raise _bad_dc(path, f"msiptp.MODE {mode}")
    fmode = fsc >> ATP_MODE_SHIFT
    supported = CAP_PDTP if tc & TC_PDTV else CAP_FIRST
    if fmode != ATP_BARE and not caps & supported.get(fmode, 0):
        raise _bad_dc(path, f"fsc.MODE {fmode} is not supported")


def _root(
    regs: Registers, word: int, stage: int, tc: int, path: Path, reason: FaultReason
) -> TableRoot | None:
    """The table of an iosatp or iohgatp, whose mode is known to be good; None: Bare.

    Its configuration says what decides a translation: whether hardware sets A and D, and whether an item may
    have a memory type.
    """
    mode = word >> ATP_MODE_SHIFT
    if mode == ATP_BARE:
        return None
    pa = (word & ATP_PPN_MASK) << 12
    if pa >> (regs.caps >> CAP_PAS_SHIFT & CAP_PAS_MASK):
        raise refuse(RootFault, reason, path, f"root {pa:#x} is beyond capabilities.PAS")
    config = {
        "levels": LEVELS_OF_ATP[mode],
        "stage": stage,
        "svpbmt": int(bool(regs.caps & CAP_SVPBMT)),
        "hardware_ad": int(bool(tc & (TC_SADE if stage == 1 else TC_GADE))),
    }
    return TableRoot("riscv64", config, pa)


def of_device_context(mem: Memory, regs: Registers, path: Path, process_id: int | None = None) -> RootInfo:
    """Go on from a device context, the last entry of ``path``."""
    _check_dc(regs, path)
    w = path[-1].words
    tc, iohgatp, ta, fsc = w[:4]
    if process_id is not None:
        wide = process_id < 0 or process_id >> PID_BITS.get(fsc >> ATP_MODE_SHIFT, 20)
        if not tc & TC_PDTV or wide:
            why = f"process id {process_id:#x}: no process directory, or it is wider"
            raise refuse(RootFault, FaultReason.TTYP_BLOCKED, path, why)
    elif tc & TC_PDTV and tc & TC_DPE:
        process_id = 0
    second = _root(regs, iohgatp, 2, tc, path, FaultReason.DDT_MISCONFIGURED)
    gscid = iohgatp >> GSCID_SHIFT & ((1 << GSCID_BITS) - 1)
    pscid = ta >> PSCID_SHIFT & ((1 << PSCID_BITS) - 1)
    msi = (w[4] & ATP_PPN_MASK) << 12 if len(w) > 4 and w[4] >> ATP_MODE_SHIFT == MSIPTP_FLAT else None
    reason = FaultReason.DDT_MISCONFIGURED
    if tc & TC_PDTV:
        pdtp = fsc >> ATP_MODE_SHIFT
        if process_id is None or pdtp == ATP_BARE:
            fsc = 0
        elif second is not None:
            return RootInfo(
                translation="nested", table=second, domain_id=gscid, pasid=process_id, path=path,
                gscid=gscid, directory=(fsc & ATP_PPN_MASK) << 12, msiptp=msi,
            )  # fmt: skip
        else:
            path = _process_context(mem, regs, fsc, process_id, path)
            ta, fsc = path[-1].words
            pscid = ta >> PSCID_SHIFT & ((1 << PSCID_BITS) - 1)
            reason = FaultReason.PDT_MISCONFIGURED
    first = _root(regs, fsc, 1, tc, path, reason) if fsc else None
    if second is None:
        table, kind, tag = first, "first-stage" if first else "pass-through", pscid if first else 0
    else:
        table, kind, tag = second, "nested" if first else "second-stage", gscid
    return RootInfo(
        translation=kind, table=table, domain_id=tag, pasid=process_id, path=path,
        pscid=pscid if first else 0, gscid=gscid if second else 0,
        first=first if second else None, msiptp=msi,
    )  # fmt: skip


def first_stage_of(guest: Memory, regs: Registers, info: RootInfo) -> tuple[TableRoot | None, Path]:
    """The first stage of "nested", its root guest physical, and the way to it. None: it is Bare.

    :param guest: guest physical memory, where a process directory is. :raises RootFault: as
        :func:`find_root`.
    """
    if info.directory is None or info.pasid is None:
        return info.first, info.path
    tc, fsc = info.path[-1].words[0], info.path[-1].words[3]
    path = _process_context(guest, regs, fsc, info.pasid, info.path)
    reason = FaultReason.PDT_MISCONFIGURED
    return _root(regs, path[-1].words[1], 1, tc, path, reason), path


def _process_context(mem: Memory, regs: Registers, pdtp: int, process_id: int, path: Path) -> Path:
    """Specification, "Process to locate the Process-context", second stage Bare."""
    table = (pdtp & ATP_PPN_MASK) << 12
    index = process_id & 0xFF, process_id >> 8 & 0x1FF, process_id >> 17
    for level in range(LEVELS_OF_PDTP[pdtp >> ATP_MODE_SHIFT] - 1, 0, -1):
        pa = table + index[level] * 8
        table, path = _next(mem, "pdte", pa, path, _PDT)
    pa = table + index[0] * 16
    path = read_step(mem, "pc", pa, 2, path, RootFault, FaultReason.PDT_LOAD_FAULT)
    ta, fsc = path[-1].words
    if not ta & V:
        raise refuse(RootFault, FaultReason.PDT_INVALID, path)
    mode = fsc >> ATP_MODE_SHIFT
    if ta & PC_TA_RESERVED or fsc & FSC_RESERVED:
        raise refuse(RootFault, FaultReason.PDT_MISCONFIGURED, path, "a reserved bit is set")
    if mode != ATP_BARE and not regs.caps & CAP_FIRST.get(mode, 0):
        raise refuse(RootFault, FaultReason.PDT_MISCONFIGURED, path, f"fsc.MODE {mode} is not supported")
    return path


# -- encoders --------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a device context: levels 3, 4 or 5; its tag is the PSCID (first) or GSCID (second)."""

    root_pa: int
    levels: int
    tag: int = field(default=0)


def ddtp_value(table_pa: int, levels: int) -> int:
    """``ddtp`` for a device directory of 1, 2 or 3 levels."""
    number_field("directory levels - 1", levels - 1, 2)
    return (pa_field("device directory", table_pa, PA_MASK) >> 2) | (MODE_1LVL + levels - 1)


def directory_entry(table_pa: int) -> int:
    """Non-leaf entry of a device or a process directory."""
    return (pa_field("directory", table_pa, PA_MASK) >> 2) | V


def _atp(stage: Stage | None) -> int:
    if stage is None:
        return 0
    if stage.levels not in ATP_OF_LEVELS:
        raise ValueError(f"a table of {stage.levels} levels does not exist (3, 4 or 5)")
    return ATP_OF_LEVELS[stage.levels] << ATP_MODE_SHIFT | pa_field("root", stage.root_pa, PA_MASK) >> 12


def device_context(
    first: Stage | None = None, second: Stage | None = None, *, extended: bool, tc: int = 0
) -> tuple[int, ...]:
    """Device context of 8 (``extended``) or 4 words, both stages by choice; ``tc``: further bits of tc."""
    if second is not None and second.root_pa & 0x3FFF:
        raise ValueError(f"second-stage root {second.root_pa:#x} is not aligned to 16 KiB")
    iohgatp = _atp(second)
    if second is not None:
        iohgatp |= number_field("GSCID", second.tag, GSCID_BITS) << GSCID_SHIFT
    ta = number_field("PSCID", first.tag, PSCID_BITS) << PSCID_SHIFT if first else 0
    return (tc | V, iohgatp, ta, _atp(first)) + ((0, 0, 0, 0) if extended else ())


def process_context(first: Stage) -> tuple[int, int]:
    """Process context: ta, fsc."""
    return number_field("PSCID", first.tag, PSCID_BITS) << PSCID_SHIFT | V, _atp(first)


def pdtp(table_pa: int, levels: int) -> int:
    """``fsc`` of a device context with tc.PDTV: a process directory of 1, 2 or 3 levels."""
    if levels not in PID_BITS:
        raise ValueError(f"a process directory of {levels} levels does not exist (1, 2 or 3)")
    return levels << ATP_MODE_SHIFT | pa_field("process directory", table_pa, PA_MASK) >> 12


# -- commands (specification, "Command-Queue"; Linux RISCV_IOMMU_CMD_*) -----------------------------------
#: two words, as in the queue
Command = tuple[int, int]
COMMAND_WORDS = 2
OPCODE_MASK, FUNC_SHIFT, FUNC_MASK = bits(6, 0), 7, 7
IOTINVAL, IOFENCE, IODIR = 1, 2, 3
FUNC_VMA, FUNC_GVMA = 0, 1
FUNC_FENCE_C = 0
FUNC_INVAL_DDT, FUNC_INVAL_PDT = 0, 1
#: IOTINVAL and IOFENCE: the operand ADDR is valid
AV = 1 << 10
IOTINVAL_PSCV, IOTINVAL_GV = 1 << 32, 1 << 33
IOTINVAL_PSCID_SHIFT, IOTINVAL_GSCID_SHIFT = 12, 44
IOTINVAL_ADDR_SHIFT = 10  # of the second word: IOVA >> 12
IOFENCE_WSI, IOFENCE_PR, IOFENCE_PW = 1 << 11, 1 << 12, 1 << 13
IOFENCE_DATA_SHIFT = 32
IODIR_DV = 1 << 33
IODIR_PID_SHIFT, IODIR_DID_SHIFT = 12, 40
DID_BITS, PID_BITS_MAX = 24, 20
#: reserved bits of the first and of the second word; without capabilities.NL and capabilities.S
_COMMAND_RESERVED = {
    IOTINVAL: (1 << 11 | bits(43, 34) | bits(63, 60), bits(9, 0) | bits(63, 62)),
    IOFENCE: (bits(31, 14), bits(63, 62)),
    IODIR: (bits(11, 10) | 1 << 32 | bits(39, 34), bits(63, 0)),
}


def _operation(opcode: int, func: int) -> int:
    return opcode | func << FUNC_SHIFT


def iotinval_vma(*, iova: int | None = None, pscid: int | None = None, gscid: int | None = None) -> Command:
    """Forget translations of the first stage: of one page, one address space, one VM, or all of the host's.

    :param gscid: None: translations without a second stage. :param iova: None: all, and non-leaf entries.
    """
    word = _operation(IOTINVAL, FUNC_VMA)
    if pscid is not None:
        word |= number_field("PSCID", pscid, PSCID_BITS) << IOTINVAL_PSCID_SHIFT | IOTINVAL_PSCV
    return _iotinval(word, iova, gscid)


def iotinval_gvma(*, iova: int | None = None, gscid: int | None = None) -> Command:
    """Forget translations of the second stage. :param iova: guest physical, of a page; with ``gscid`` only.
    :param gscid: None: of all VMs.
    """
    if iova is not None and gscid is None:
        raise ValueError("IOTINVAL.GVMA takes an address only with a GSCID")
    return _iotinval(_operation(IOTINVAL, FUNC_GVMA), iova, gscid)


def _iotinval(word: int, iova: int | None, gscid: int | None) -> Command:
    if gscid is not None:
        word |= number_field("GSCID", gscid, GSCID_BITS) << IOTINVAL_GSCID_SHIFT | IOTINVAL_GV
    if iova is None:
        return word, 0
    return word | AV, pa_field("page", iova, bits(63, 12)) >> 12 << IOTINVAL_ADDR_SHIFT


def iofence_c(
    status: tuple[int, int] | None = None, *, wsi: bool = False, reads: bool = True, writes: bool = True
) -> Command:
    """Wait until all commands before are done.

    :param status: (pa, u32) that is stored then; pa 4-byte aligned. :param wsi: raise cqcsr.fence_w_ip.
    :param reads: order DMA reads (PR). :param writes: order DMA writes (PW).
    """
    word = _operation(IOFENCE, FUNC_FENCE_C)
    for bit, given in ((IOFENCE_WSI, wsi), (IOFENCE_PR, reads), (IOFENCE_PW, writes)):
        word |= bit if given else 0
    if status is None:
        return word, 0
    pa, data = status
    word |= number_field("fence data", data, 32) << IOFENCE_DATA_SHIFT | AV
    return word, pa_field("fence status", pa, bits(63, 2)) >> 2


def iodir_inval_ddt(device_id: int | None = None) -> Command:
    """Forget the cached context of a device, None: all directory entries of all devices."""
    word = _operation(IODIR, FUNC_INVAL_DDT)
    if device_id is None:
        return word, 0
    return word | IODIR_DV | number_field("device id", device_id, DID_BITS) << IODIR_DID_SHIFT, 0


def iodir_inval_pdt(device_id: int, process_id: int) -> Command:
    """Forget the cached process context of a device."""
    word = _operation(IODIR, FUNC_INVAL_PDT) | IODIR_DV
    word |= number_field("process id", process_id, PID_BITS_MAX) << IODIR_PID_SHIFT
    return word | number_field("device id", device_id, DID_BITS) << IODIR_DID_SHIFT, 0


class Kind(enum.Enum):
    """What a command does."""

    VMA = "IOTINVAL.VMA"
    GVMA = "IOTINVAL.GVMA"
    FENCE = "IOFENCE.C"
    DDT = "IODIR.INVAL_DDT"
    PDT = "IODIR.INVAL_PDT"


_KINDS = {
    (IOTINVAL, FUNC_VMA): Kind.VMA,
    (IOTINVAL, FUNC_GVMA): Kind.GVMA,
    (IOFENCE, FUNC_FENCE_C): Kind.FENCE,
    (IODIR, FUNC_INVAL_DDT): Kind.DDT,
    (IODIR, FUNC_INVAL_PDT): Kind.PDT,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """A command; an operand that is not valid is None.

    :param iova: page of IOTINVAL. :param status: (pa, u32) that IOFENCE.C stores. :param wsi: it raises
        cqcsr.fence_w_ip. :param reads: PR. :param writes: PW.
    """

    kind: Kind
    pscid: int | None = None
    gscid: int | None = None
    iova: int | None = None
    status: tuple[int, int] | None = None
    wsi: bool = False
    reads: bool = False
    writes: bool = False
    device_id: int | None = None
    process_id: int | None = None


def _field(word: int, shift: int, width: int) -> int:
    return word >> shift & ((1 << width) - 1)


def device_id_bits(regs: Registers) -> int:
    """Bits of a device id that the directory of ``ddtp`` has room for; 24 where there is none."""
    levels = LEVELS_OF_DDTP.get(regs.ddtp & DDTP_MODE_MASK, 3)
    return DID_BITS if levels == 3 else (6 if regs.extended else 7) + 9 * (levels - 1)


def decode_command(words: Sequence[int], regs: Registers) -> Decoded | None:
    """Two words from the queue; None where hardware sets cqcsr.cmd_ill: a reserved encoding or bit, or what
    its capabilities do not have (ATS commands, the NL and S operands).
    """
    low, high = words
    reserved = _COMMAND_RESERVED.get(low & OPCODE_MASK)
    kind = _KINDS.get((low & OPCODE_MASK, low >> FUNC_SHIFT & FUNC_MASK))
    if kind is None or reserved is None or low & reserved[0] or high & reserved[1]:
        return None
    if kind in (Kind.VMA, Kind.GVMA):
        if kind is Kind.GVMA and low & IOTINVAL_PSCV:
            return None
        return Decoded(
            kind=kind,
            pscid=_field(low, IOTINVAL_PSCID_SHIFT, PSCID_BITS) if low & IOTINVAL_PSCV else None,
            gscid=_field(low, IOTINVAL_GSCID_SHIFT, GSCID_BITS) if low & IOTINVAL_GV else None,
            iova=_field(high, IOTINVAL_ADDR_SHIFT, 52) << 12 if low & AV else None,
        )
    if kind is Kind.FENCE:
        if low & IOFENCE_WSI and not regs.fctl & FCTL_WSI:
            return None
        return Decoded(
            kind=kind,
            status=(high << 2, low >> IOFENCE_DATA_SHIFT) if low & AV else None,
            wsi=bool(low & IOFENCE_WSI),
            reads=bool(low & IOFENCE_PR),
            writes=bool(low & IOFENCE_PW),
        )
    return _decode_iodir(kind, low, regs)


def _decode_iodir(kind: Kind, low: int, regs: Registers) -> Decoded | None:
    device_id = _field(low, IODIR_DID_SHIFT, DID_BITS) if low & IODIR_DV else None
    process_id = _field(low, IODIR_PID_SHIFT, PID_BITS_MAX)
    if device_id is not None and device_id >> device_id_bits(regs):
        return None
    if kind is Kind.DDT:
        return None if process_id else Decoded(kind=kind, device_id=device_id)
    width = max((PID_BITS[mode] for mode, cap in CAP_PDTP.items() if regs.caps & cap), default=8)
    if device_id is None or process_id >> width:
        return None
    return Decoded(kind=kind, device_id=device_id, process_id=process_id)


# -- fault records (specification, "Fault/Event-Queue"; Linux RISCV_IOMMU_FQ_*) ---------------------------
FAULT_WORDS = 4
FAULT_CAUSE_MASK = bits(11, 0)
FAULT_PID_SHIFT, FAULT_TTYP_SHIFT, FAULT_TTYP_BITS, FAULT_DID_SHIFT = 12, 34, 6, 40
FAULT_PV, FAULT_PRIV = 1 << 32, 1 << 33


class Ttyp(enum.IntEnum):
    """Type of the transaction that faulted."""

    NONE = 0
    EXECUTE = 1
    READ = 2
    WRITE = 3
    TRANSLATED_EXECUTE = 5
    TRANSLATED_READ = 6
    TRANSLATED_WRITE = 7
    ATS_REQUEST = 8
    MESSAGE_REQUEST = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultRecord:
    """One record of the fault queue.

    :param cause: :class:`FaultReason`, 12 bits. :param ttyp: :class:`Ttyp`, 6 bits. :param iotval: the IOVA
        of most causes. :param iotval2: the guest physical address of a second-stage fault.
    :param process_id: None: a request without (PV = 0).
    """

    cause: int
    ttyp: int
    device_id: int
    iotval: int = 0
    iotval2: int = 0
    process_id: int | None = None
    privileged: bool = False

    def words(self) -> tuple[int, int, int, int]:
        """The four words of the record. :raises ValueError: a field is too wide."""
        word = number_field("cause", int(self.cause), 12)
        word |= number_field("TTYP", int(self.ttyp), FAULT_TTYP_BITS) << FAULT_TTYP_SHIFT
        word |= number_field("device id", self.device_id, DID_BITS) << FAULT_DID_SHIFT
        if self.process_id is not None:
            pid = number_field("process id", self.process_id, PID_BITS_MAX)
            word |= FAULT_PV | pid << FAULT_PID_SHIFT | (FAULT_PRIV if self.privileged else 0)
        elif self.privileged:
            raise ValueError("a request without a process id is not privileged")
        return word, 0, number_field("iotval", self.iotval, 64), number_field("iotval2", self.iotval2, 64)


def decode_fault(words: Sequence[int]) -> FaultRecord:
    """The record in four words; the custom and reserved second word is not looked at."""
    head, _, iotval, iotval2 = words
    has_pid = bool(head & FAULT_PV)
    return FaultRecord(
        cause=head & FAULT_CAUSE_MASK,
        ttyp=_field(head, FAULT_TTYP_SHIFT, FAULT_TTYP_BITS),
        device_id=_field(head, FAULT_DID_SHIFT, DID_BITS),
        iotval=iotval,
        iotval2=iotval2,
        process_id=_field(head, FAULT_PID_SHIFT, PID_BITS_MAX) if has_pid else None,
        privileged=has_pid and bool(head & FAULT_PRIV),
    )
