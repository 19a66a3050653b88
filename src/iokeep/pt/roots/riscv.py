# SPDX-License-Identifier: Apache-2.0
"""RISC-V IOMMU: the way from the device directory table pointer (``ddtp``) to a page table.

Source: RISC-V IOMMU Architecture Specification (riscv-non-isa/riscv-iommu, "the specification" below),
chapter "Data Structures": device directory, device context, "Device-context configuration checks", process
directory, "Process to translate an IOVA". Checked against Linux drivers/iommu/riscv/iommu-bits.h and a
capture of a running kernel.

Entries are plain ints, one per 64-bit word, lowest word first; a PPN counts 4096 bytes. Little-endian
structures and tables only (fctl.BE = 0), and RV64 tables only (fctl.GXL = 0, tc.SXL = 0).
"""

from __future__ import annotations

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
CAP_AMO_HWAD = 1 << 24
CAP_QOSID = 1 << 41
CAP_PAS_SHIFT, CAP_PAS_MASK = 32, 0x3F
FCTL_BE, FCTL_GXL = 1 << 0, 1 << 2

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
_CAP_FIRST = {8: 1 << 9, 9: 1 << 10, 10: 1 << 11}
_CAP_SECOND = {8: 1 << 17, 9: 1 << 18, 10: 1 << 19}

# -- process directory ---------------------------------------------------------------------------------
#: pdtp.MODE -> levels; a process id is PDI[0] of 8 bits, PDI[1] of 9, PDI[2] of 3
LEVELS_OF_PDTP = {1: 1, 2: 2, 3: 3}
PID_BITS = {1: 8, 2: 17, 3: 20}
_CAP_PDTP = {1: 1 << 38, 2: 1 << 39, 3: 1 << 40}
PC_TA_RESERVED = bits(11, 3) | bits(63, 32)


class FaultReason(base.FaultCode):
    """Causes in fault records (specification, "Fault/Event-Queue"; Linux RISCV_IOMMU_FQ_CAUSE_*)."""

    DMA_DISABLED = 256, "all inbound transactions are disallowed"
    DDT_LOAD_FAULT = 257, "a device directory entry is not in memory"
    DDT_INVALID = 258, "the device directory entry is not valid"
    DDT_MISCONFIGURED = 259, "the device directory entry is misconfigured"
    TTYP_BLOCKED = 260, "the transaction type is disallowed"
    PDT_LOAD_FAULT = 265, "a process directory entry is not in memory"
    PDT_INVALID = 266, "the process directory entry is not valid"
    PDT_MISCONFIGURED = 267, "the process directory entry is misconfigured"


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
    table = (regs.ddtp & PPN_MASK) >> PPN_SHIFT << 12
    path: Path = ()
    for level in range(levels - 1, 0, -1):
        table, path = _next(mem, "ddte", table + index[level] * 8, path, _DDT)
    words = DC_EXTENDED_WORDS if regs.extended else DC_BASE_WORDS
    pa = table + index[0] * words * 8
    path = read_step(mem, "dc", pa, words, path, RootFault, FaultReason.DDT_LOAD_FAULT)
    return of_device_context(mem, regs, path, process_id)


def _next(mem: Memory, name: str, pa: int, path: Path, codes: Codes) -> tuple[int, Path]:
    """Follow one non-leaf entry of a device or process directory."""
    path = read_step(mem, name, pa, 1, path, RootFault, codes[0])
    entry = path[-1].words[0]
    if not entry & V:
        raise refuse(RootFault, codes[1], path)
    if entry & NON_LEAF_RESERVED:
        raise refuse(RootFault, codes[2], path, "a reserved bit is set")
    return (entry & PPN_MASK) >> PPN_SHIFT << 12, path


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
            hmode != ATP_BARE and not caps & _CAP_SECOND.get(hmode, 0),
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
    supported = _CAP_PDTP if tc & TC_PDTV else _CAP_FIRST
    if fmode != ATP_BARE and not caps & supported.get(fmode, 0):
        raise _bad_dc(path, f"fsc.MODE {fmode} is not supported")


def _root(regs: Registers, word: int, stage: int, path: Path, reason: FaultReason) -> TableRoot | None:
    """The table of an iosatp or iohgatp, whose mode is known to be good; None: Bare."""
    mode = word >> ATP_MODE_SHIFT
    if mode == ATP_BARE:
        return None
    pa = (word & ATP_PPN_MASK) << 12
    if pa >> (regs.caps >> CAP_PAS_SHIFT & CAP_PAS_MASK):
        raise refuse(RootFault, reason, path, f"root {pa:#x} is beyond capabilities.PAS")
    return TableRoot("riscv64", {"levels": LEVELS_OF_ATP[mode], "stage": stage}, pa)


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
    second = _root(regs, iohgatp, 2, path, FaultReason.DDT_MISCONFIGURED)
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
    first = _root(regs, fsc, 1, path, reason) if fsc else None
    if second is None:
        table, kind, tag = first, "first-stage" if first else "pass-through", pscid if first else 0
    else:
        table, kind, tag = second, "nested" if first else "second-stage", gscid
    return RootInfo(
        translation=kind, table=table, domain_id=tag, pasid=process_id, path=path,
        pscid=pscid if first else 0, gscid=gscid if second else 0,
        first=first if second else None, msiptp=msi,
    )  # fmt: skip


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
    if mode != ATP_BARE and not regs.caps & _CAP_FIRST.get(mode, 0):
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
