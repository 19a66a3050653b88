# SPDX-License-Identifier: Apache-2.0
"""AMD-Vi: the way from the device table base register to a page table; commands and events.

Source: AMD I/O Virtualization Technology (IOMMU) specification (48882, "the specification" below): device
table entry and guest CR3 table (2.2), commands (2.4), event logging (2.5). Checked against Linux
drivers/iommu/amd/amd_iommu_types.h (field positions), init.c (``iommu_set_device_table()``) and iommu.c
(``set_dte_gcr3_table()``, ``amd_iommu_set_dte_v1()``, ``build_inv_iommu_pages()``, ``iommu_print_event()``),
against QEMU hw/i386/amd_iommu.{c,h} (reserved bits, the meaning of V and TV), and against captures of
running kernels.

Entries, commands and events are plain ints, one per 64-bit word, lowest word first. All pas are bytes;
tables are whole 4096 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from iokeep.mem.memory import Memory
from iokeep.pt.roots import base
from iokeep.pt.roots.base import READ, WRITE, Path, TableRoot, bits, number_field, pa_field, read_step, refuse

PA_MASK = bits(51, 12)

# -- Device Table Base Address Register (MMIO offset 0) ------------------------------------------------
#: the table is (SIZE + 1) * 4096 bytes
DEVTAB_SIZE_MASK = bits(8, 0)
DEVTAB_RESERVED = bits(11, 9) | bits(63, 52)

# -- device table entry, 256 bits; positions below are within each 64-bit word -----------------------------
DTE_BYTES = 32
# word 0
V = 1 << 0
TV = 1 << 1
HAD = bits(8, 7)  # host access and dirty tracking
MODE_SHIFT = 9
MODE_MASK = 7 << MODE_SHIFT
PPR = 1 << 52
GPRP = 1 << 53
GIOV = 1 << 54  # requests without PASID use the guest CR3 of PASID 0
GV = 1 << 55
GLX_SHIFT = 56
GLX_MASK = 3 << GLX_SHIFT
GCR3_14_12_SHIFT = 58
IR = 1 << 61
IW = 1 << 62
# word 1
DOMAIN_MASK = bits(15, 0)
GCR3_30_15_SHIFT = 16
IOTLB = 1 << 32
GCR3_51_31_SHIFT = 43
# word 2
GUEST_PAGING_SHIFT = 54
GUEST_PAGING_MASK = 3 << GUEST_PAGING_SHIFT
#: reserved bits of the four words (QEMU hw/i386/amd_iommu.h, AMDVI_DTE_QUAD*_RESERVED)
DTE_RESERVED = (bits(6, 2) | bits(63, 63), 0, bits(53, 52), bits(14, 0) | bits(53, 48))

#: Mode = levels of the host page table; 0: none, 7: reserved
MODE_NONE = 0
LEVELS_OF_MODE = {mode: mode for mode in range(1, 7)}
#: GuestPagingMode -> levels of the guest page table
LEVELS_OF_GUEST = {0: 4, 1: 5}
GUEST_OF_LEVELS = {levels: code for code, levels in LEVELS_OF_GUEST.items()}

# -- guest CR3 table: 512 entries of 8 bytes, GLX + 1 levels, indexed by 9 bits of the PASID each ------------
GCR3_VALID = 1 << 0
GCR3_RESERVED = bits(63, 52)
#: PASID bits that GLX levels decode
PASID_BITS_OF_GLX = {0: 9, 1: 18, 2: 20}


class FaultReason(base.FaultCode):
    """Events, by the code in the event log (specification, event logging; Linux EVENT_TYPE_*)."""

    ILLEGAL_DEV_TABLE_ENTRY = 0x1, "the device table entry is programmed wrongly"
    IO_PAGE_FAULT = 0x2, "the request has no translation"
    DEV_TAB_HARDWARE_ERROR = 0x3, "the device table is not in memory"
    PAGE_TAB_HARDWARE_ERROR = 0x4, "a table below the device table entry is not in memory"
    ILLEGAL_COMMAND_ERROR = 0x5, "the command is unknown, or a reserved bit of it is set"
    COMMAND_HARDWARE_ERROR = 0x6, "the command buffer, or where a command stores, is not in memory"


class RootFault(base.RootFault):
    """No page table; ``reason`` is a :class:`FaultReason`."""

    kind = "amd-root"
    record = "AMD-Vi event"


@dataclass(frozen=True, slots=True)
class Gcr3:
    """The guest CR3 table of an entry: its address, GLX, and the levels of the tables it points to."""

    address: int
    glx: int
    levels: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RootInfo(base.RootInfo):
    """What the device table says about one requester.

    :param prot: what IR and IW let through at all (IOMMU_READ | IOMMU_WRITE).
    :param gcr3: the guest CR3 table, None where GV is 0. Of "nested" it is only named, not read: it may be
        in guest physical memory.
    """

    prot: int
    gcr3: Gcr3 | None = None


def device_table_pa(register: int) -> int:
    """pa of the device table."""
    return register & PA_MASK


def device_table_bytes(register: int) -> int:
    """Length of the device table."""
    return ((register & DEVTAB_SIZE_MASK) + 1) << 12


def find_root(mem: Memory, register: int, device_id: int, pasid: int | None = None) -> RootInfo:
    """Follow the device table base register to the page table that translates requests of ``device_id``.

    :param register: Device Table Base Address Register (u64). Segmented device tables are not followed.
    :param device_id: requester id (u16): bus << 8 | device << 3 | function.
    :param pasid: the PASID of the request; None = a request without PASID.
    :raises RootFault: the entry is absent or programmed wrongly, or no request gets through it.
    """
    number_field("device id", device_id, 16)
    where = f"device table base register {register:#x}"
    if register & DEVTAB_RESERVED:
        raise RootFault(FaultReason.ILLEGAL_DEV_TABLE_ENTRY, where, (), "a reserved bit is set")
    if device_id * DTE_BYTES >= device_table_bytes(register):
        why = (
            f"device id {device_id:#x} is beyond the device table of {device_table_bytes(register):#x} bytes"
        )
        raise RootFault(FaultReason.ILLEGAL_DEV_TABLE_ENTRY, where, (), why)
    pa = device_table_pa(register) + device_id * DTE_BYTES
    path = read_step(mem, "dte", pa, 4, (), RootFault, FaultReason.DEV_TAB_HARDWARE_ERROR)
    return _of_dte(mem, path, pasid)


def dte_reserved(words: tuple[int, ...]) -> bool:
    """A device table entry has a reserved bit set."""
    return any(word & reserved for word, reserved in zip(words, DTE_RESERVED, strict=True))


def _bad(path: Path, why: str, reason: FaultReason = FaultReason.ILLEGAL_DEV_TABLE_ENTRY) -> base.RootFault:
    return refuse(RootFault, reason, path, why)


def _of_dte(mem: Memory, path: Path, pasid: int | None) -> RootInfo:
    w = path[-1].words
    if not w[0] & V:
        # Everything else is ignored, every request passes untranslated.
        return RootInfo(translation="pass-through", table=None, domain_id=0, pasid=None, path=path, prot=3)
    if dte_reserved(w):
        raise _bad(path, "a reserved bit is set")
    if not w[0] & TV:
        raise _bad(path, "TV is 0: requests are blocked", FaultReason.IO_PAGE_FAULT)
    did = w[1] & DOMAIN_MASK
    prot = (READ if w[0] & IR else 0) | (WRITE if w[0] & IW else 0)
    mode = (w[0] & MODE_MASK) >> MODE_SHIFT
    if mode != MODE_NONE and mode not in LEVELS_OF_MODE:
        raise _bad(path, f"Mode {mode} is reserved")
    host = None
    if mode != MODE_NONE:
        host = TableRoot("amdv1", {"levels": LEVELS_OF_MODE[mode]}, w[0] & PA_MASK)
    gcr3 = _gcr3(path) if w[0] & GV else None
    # Without GIOV only requests with a PASID are guest requests.
    if gcr3 is None or (pasid is None and not w[0] & GIOV):
        if pasid is not None:
            raise _bad(path, "GV is 0: requests with a PASID are blocked", FaultReason.IO_PAGE_FAULT)
        kind = "pass-through" if host is None else "second-stage"
        return RootInfo(
            translation=kind, table=host, domain_id=did, pasid=None, path=path, prot=prot, gcr3=gcr3
        )
    number = pasid or 0
    if not 0 <= number < 1 << PASID_BITS_OF_GLX[gcr3.glx]:
        raise _bad(path, f"PASID {number:#x} is beyond GLX {gcr3.glx}", FaultReason.IO_PAGE_FAULT)
    if host is not None:
        return RootInfo(
            translation="nested", table=host, domain_id=did, pasid=number, path=path, prot=prot, gcr3=gcr3
        )
    return _guest_root(mem, gcr3, number, path, did, prot)


def first_stage_of(guest: Memory, info: RootInfo) -> RootInfo:
    """The first stage of "nested"; its root is guest physical.

    The guest CR3 table root pointer and the entries of the guest CR3 table are guest physical addresses where
    the request is translated by a host table too (specification, guest CR3 table).

    :param guest: guest physical memory. :raises RootFault: as :func:`find_root`.
    """
    if info.gcr3 is None:
        raise ValueError("the entry has no guest CR3 table")
    return _guest_root(guest, info.gcr3, info.pasid or 0, info.path, info.domain_id, info.prot)


def _guest_root(mem: Memory, gcr3: Gcr3, number: int, path: Path, did: int, prot: int) -> RootInfo:
    path = _follow_gcr3(mem, gcr3, number, path)
    # PASID 0 decodes the full width unsigned, others take canonical addresses (Linux amd/iommu.c,
    # amd_iommu_domain_alloc_paging_v2()).
    config = {"levels": gcr3.levels} if number else {"levels": gcr3.levels, "sign_extend": 0}
    guest = TableRoot("x86_64", config, path[-1].words[0] & PA_MASK)
    return RootInfo(
        translation="first-stage", table=guest, domain_id=did, pasid=number, path=path, prot=prot, gcr3=gcr3
    )


def _gcr3(path: Path) -> Gcr3:
    w = path[-1].words
    glx = (w[0] & GLX_MASK) >> GLX_SHIFT
    levels = LEVELS_OF_GUEST.get((w[2] & GUEST_PAGING_MASK) >> GUEST_PAGING_SHIFT)
    if glx not in PASID_BITS_OF_GLX or levels is None:
        raise _bad(path, f"GLX {glx} or the guest paging mode is reserved")
    address = (w[0] >> GCR3_14_12_SHIFT & 7) << 12
    address |= (w[1] >> GCR3_30_15_SHIFT & 0xFFFF) << 15
    address |= (w[1] >> GCR3_51_31_SHIFT & 0x1FFFFF) << 31
    return Gcr3(address, glx, levels)


def _follow_gcr3(mem: Memory, gcr3: Gcr3, pasid: int, path: Path) -> Path:
    table = gcr3.address
    for level in range(gcr3.glx, -1, -1):
        pa = table + (pasid >> 9 * level & 0x1FF) * 8
        path = read_step(mem, "gcr3", pa, 1, path, RootFault, FaultReason.PAGE_TAB_HARDWARE_ERROR)
        entry = path[-1].words[0]
        if not entry & GCR3_VALID:
            raise _bad(path, "the guest CR3 entry is not valid", FaultReason.IO_PAGE_FAULT)
        if entry & GCR3_RESERVED:
            raise _bad(path, "a reserved bit is set in the guest CR3 entry", FaultReason.IO_PAGE_FAULT)
        table = entry & PA_MASK
    return path


# -- encoders --------------------------------------------------------------------------------------------
Dte = tuple[int, int, int, int]


def device_table_register(table_pa: int, length: int) -> int:
    """Device Table Base Address Register for a table of ``length`` bytes (4096 ... 2 MiB, whole 4096)."""
    if length & 0xFFF or not 4096 <= length <= (DEVTAB_SIZE_MASK + 1) << 12:
        raise ValueError(f"a device table of {length:#x} bytes does not exist")
    return pa_field("device table", table_pa, PA_MASK) | ((length >> 12) - 1)


def dte_blocked() -> Dte:
    """Entry that lets nothing through: V alone, as Linux clears one (``amd_iommu_make_clear_dte()``)."""
    return V, 0, 0, 0


def dte_pass_through(domain_id: int) -> Dte:
    """Entry without translation (Mode 0), as Linux writes it for an identity domain."""
    return V | TV | IR | IW, number_field("domain id", domain_id, 16), 0, 0


def dte_host(
    root_pa: int,
    levels: int,
    domain_id: int,
    *,
    prot: int = READ | WRITE,
    dirty: bool = False,
    ats: bool = False,
) -> Dte:
    """Entry for a host page table (format amdv1) of 1 to 6 ``levels``.

    :param dirty: hardware sets the access and dirty bits. :param ats: the device may send ATS requests.
    """
    if levels not in LEVELS_OF_MODE:
        raise ValueError(f"a host page table of {levels} levels does not exist (1 to 6)")
    word = V | TV | levels << MODE_SHIFT | pa_field("host page table", root_pa, PA_MASK)
    word |= (IR if prot & READ else 0) | (IW if prot & WRITE else 0) | (HAD if dirty else 0)
    return word, number_field("domain id", domain_id, 16) | (IOTLB if ats else 0), 0, 0


def dte_guest(
    gcr3_pa: int, glx: int, levels: int, domain_id: int, *, giov: bool = True, ats: bool = False
) -> Dte:
    """Entry for guest page tables (format x86_64) of 4 or 5 ``levels`` below a guest CR3 table.

    :param glx: levels of that table - 1. :param giov: requests without PASID use PASID 0.
    """
    if levels not in GUEST_OF_LEVELS or glx not in PASID_BITS_OF_GLX:
        raise ValueError(f"guest page tables of {levels} levels or GLX {glx} do not exist")
    pa_field("guest CR3 table", gcr3_pa, PA_MASK)
    word0 = V | TV | IR | IW | GV | (GIOV if giov else 0) | glx << GLX_SHIFT
    word0 |= (gcr3_pa >> 12 & 7) << GCR3_14_12_SHIFT
    word1 = (gcr3_pa >> 15 & 0xFFFF) << GCR3_30_15_SHIFT | (gcr3_pa >> 31) << GCR3_51_31_SHIFT
    word1 |= number_field("domain id", domain_id, 16) | (IOTLB if ats else 0)
    return word0, word1, GUEST_OF_LEVELS[levels] << GUEST_PAGING_SHIFT, 0


def gcr3_entry(pa: int) -> int:
    """Entry of a guest CR3 table: the next level, or the root of a guest page table."""
    return pa_field("guest CR3", pa, PA_MASK) | GCR3_VALID


# -- commands (specification 2.4), 128 bits ---------------------------------------------------------------
Command = tuple[int, int]
COMMAND_BYTES = 16
OPCODE_SHIFT = 60
_WORD = bits(63, 0)


class Opcode(IntEnum):
    """Commands of an IOMMU without guest translation, PPR log and device IOTLBs (Linux CMD_*)."""

    COMPLETION_WAIT = 0x1
    INVALIDATE_DEVTAB_ENTRY = 0x2
    INVALIDATE_IOMMU_PAGES = 0x3
    INVALIDATE_INTERRUPT_TABLE = 0x5
    INVALIDATE_IOMMU_ALL = 0x8


WAIT_STORE = 1 << 0  # S: the second word is stored
WAIT_INTERRUPT = 1 << 1
WAIT_FLUSH = 1 << 2  # F: later commands wait for this one
WAIT_PA_MASK = bits(51, 3)
DEVICE_MASK = bits(15, 0)
PAGES_DOMAIN_SHIFT = 32
PAGES_SIZE = 1 << 0  # S: the address says a size
PAGES_PDE = 1 << 1  # items that point to tables are forgotten too
PAGES_GN = 1 << 2  # guest translations
PAGES_IOVA_MASK = bits(63, 12)
#: reserved bits of the two words; PASID and GN belong to guest translation
_COMMAND_RESERVED = {
    Opcode.COMPLETION_WAIT: (bits(59, 52), 0),
    Opcode.INVALIDATE_DEVTAB_ENTRY: (bits(59, 16), _WORD),
    Opcode.INVALIDATE_IOMMU_PAGES: (bits(31, 0) | bits(59, 48), bits(11, 3) | PAGES_GN),
    Opcode.INVALIDATE_INTERRUPT_TABLE: (bits(59, 16), _WORD),
    Opcode.INVALIDATE_IOMMU_ALL: (bits(59, 0), _WORD),
}


@dataclass(frozen=True, slots=True)
class Invalidation:
    """A decoded command.

    ``device_id``, ``domain_id``, ``start`` and ``last`` (iova, closed) hold what that command says.
    ``store_pa``: None if nothing is stored; ``store_data`` is 64 bits.
    """

    opcode: Opcode
    device_id: int = 0
    domain_id: int = 0
    start: int = 0
    last: int = _WORD
    store_pa: int | None = None
    store_data: int = 0


def completion_wait(store_pa: int, data: int) -> Command:
    """COMPLETION_WAIT that stores the u64 ``data`` at the 8-byte aligned ``store_pa`` (2.4.1)."""
    word = Opcode.COMPLETION_WAIT << OPCODE_SHIFT | WAIT_STORE
    return word | pa_field("completion store", store_pa, WAIT_PA_MASK), number_field("data", data, 64)


def invalidate_devtab_entry(device_id: int) -> Command:
    """INVALIDATE_DEVTAB_ENTRY (2.4.2): the device table entry of one requester."""
    return Opcode.INVALIDATE_DEVTAB_ENTRY << OPCODE_SHIFT | number_field("device id", device_id, 16), 0


def invalidate_iommu_pages(domain_id: int, start: int = 0, last: int = _WORD) -> Command:
    """INVALIDATE_IOMMU_PAGES (2.4.3): translations of a domain, all levels of its tables (PDE = 1).

    :param start: ... ``last``: the closed range of iovas; what is forgotten is the smallest range that an
        address can say, :func:`pages_range` of the second word, as Linux' ``build_inv_address()`` makes it.
    """
    word = Opcode.INVALIDATE_IOMMU_PAGES << OPCODE_SHIFT
    word |= number_field("domain id", domain_id, 16) << PAGES_DOMAIN_SHIFT
    return word, _pages_address(start, last) | PAGES_PDE


def invalidate_iommu_all() -> Command:
    """INVALIDATE_IOMMU_ALL (2.4.8): everything cached; an IOMMU with EFR.IASup has it."""
    return Opcode.INVALIDATE_IOMMU_ALL << OPCODE_SHIFT, 0


def _pages_address(start: int, last: int) -> int:
    if not 0 <= start <= last <= _WORD:
        raise ValueError(f"[{start:#x}, {last:#x}] is no range of iovas")
    top = ((start ^ last) >> 12).bit_length() + 11  # the highest bit that changes within the range
    if top < 12:
        return start & PAGES_IOVA_MASK
    if top > 51:
        # Bits 63:52 are those of a sign extension: everything.
        return _WORD >> 1 & PAGES_IOVA_MASK | PAGES_SIZE
    return (start | bits(top - 1, 0)) & PAGES_IOVA_MASK | PAGES_SIZE


def pages_range(word: int) -> tuple[int, int]:
    """The closed range of iovas that the second word of INVALIDATE_IOMMU_PAGES means (2.4.3).

    Without S it is one page. With S the lowest 0 of the address from bit 12 on is the highest bit of an
    offset into the range; where there is none, the range is everything.
    """
    start = word & PAGES_IOVA_MASK
    if not word & PAGES_SIZE:
        return start, start | bits(11, 0)
    ones = start >> 12
    lowest = 12 + (~ones & ones + 1).bit_length() - 1
    mask = bits(min(lowest, 63), 0)
    return start & ~mask, start & ~mask | mask


def decode_command(words: tuple[int, ...]) -> Invalidation | None:
    """Decode a command of two words; None where hardware logs ILLEGAL_COMMAND_ERROR."""
    low, high = words
    try:
        opcode = Opcode(low >> OPCODE_SHIFT)
    except ValueError:
        return None
    reserved = _COMMAND_RESERVED[opcode]
    if low & reserved[0] or high & reserved[1]:
        return None
    if opcode == Opcode.COMPLETION_WAIT:
        if not low & WAIT_STORE:
            return Invalidation(opcode)
        return Invalidation(opcode, store_pa=low & WAIT_PA_MASK, store_data=high)
    if opcode == Opcode.INVALIDATE_IOMMU_PAGES:
        start, last = pages_range(high)
        domain = low >> PAGES_DOMAIN_SHIFT & DOMAIN_MASK
        return Invalidation(opcode, domain_id=domain, start=start, last=last)
    return Invalidation(opcode, device_id=low & DEVICE_MASK)


# -- event log entries (specification 2.5), 128 bits -------------------------------------------------------
EVENT_BYTES = 16
EVENT_DOMAIN_SHIFT = 32
EVENT_FLAGS_SHIFT = 48
EVENT_CODE_SHIFT = 60
# flags, as they lie from EVENT_FLAGS_SHIFT on (Linux EVENT_FLAG_*)
EVENT_I = 1 << 3  # an interrupt request
EVENT_PR = 1 << 4  # the page is present
EVENT_RW = 1 << 5  # a write
EVENT_PE = 1 << 6  # the permission is missing
EVENT_RZ = 1 << 7  # a reserved bit is set
EVENT_TR = 1 << 8  # a translation request
EVENT_TARGET_ABORT = 2 << 9  # Type of a hardware error


@dataclass(frozen=True, slots=True)
class _EventRule:
    """Bits of the two words that an event has; 0 elsewhere."""

    flags: int
    address: int
    domain: int = 0
    device: int = DEVICE_MASK


_EVENTS = {
    FaultReason.ILLEGAL_DEV_TABLE_ENTRY: _EventRule(EVENT_I | EVENT_RW | EVENT_RZ | EVENT_TR, bits(63, 2)),
    FaultReason.IO_PAGE_FAULT: _EventRule(bits(8, 3), _WORD, DOMAIN_MASK),
    FaultReason.DEV_TAB_HARDWARE_ERROR: _EventRule(EVENT_I | EVENT_RW | EVENT_TR | 3 << 9, bits(63, 4)),
    FaultReason.PAGE_TAB_HARDWARE_ERROR: _EventRule(
        EVENT_I | EVENT_RW | EVENT_TR | 3 << 9, bits(63, 4), DOMAIN_MASK
    ),
    FaultReason.ILLEGAL_COMMAND_ERROR: _EventRule(0, bits(63, 4), device=0),
    FaultReason.COMMAND_HARDWARE_ERROR: _EventRule(3 << 9, bits(63, 4), device=0),
}
_CODES = {int(code): code for code in _EVENTS}


@dataclass(frozen=True, slots=True)
class Event:
    """An entry of the event log.

    :param flags: EVENT_*. :param address: the iova of the request (ILLEGAL_DEV_TABLE_ENTRY, IO_PAGE_FAULT),
        else the pa that the IOMMU could not use; its low 2 or 4 bits are not logged, except in
        IO_PAGE_FAULT.
    """

    code: FaultReason
    device_id: int = 0
    domain_id: int = 0
    flags: int = 0
    address: int = 0


def encode_event(event: Event) -> tuple[int, int]:
    """The two words of an entry. :raises ValueError: the event has no such field, or a value does not fit."""
    rule = _EVENTS[event.code]
    for what, value, mask in (
        ("device id", event.device_id, rule.device),
        ("domain id", event.domain_id, rule.domain),
        ("flags", event.flags, rule.flags),
        ("address", event.address, _WORD),
    ):
        if value & ~mask or value < 0:
            raise ValueError(f"{event.code.name}: {what} {value:#x} does not fit the field {mask:#x}")
    low = event.code << EVENT_CODE_SHIFT | event.flags << EVENT_FLAGS_SHIFT
    return low | event.domain_id << EVENT_DOMAIN_SHIFT | event.device_id, event.address & rule.address


def decode_event(words: tuple[int, ...]) -> Event:
    """An entry of the log. :raises ValueError: an event that an IOMMU without the optional features never
    logs, or a reserved bit is set.
    """
    low, high = words
    code = _CODES.get(low >> EVENT_CODE_SHIFT)
    if code is None:
        raise ValueError(f"event code {low >> EVENT_CODE_SHIFT:#x} is unknown")
    rule = _EVENTS[code]
    known = bits(63, 60) | rule.flags << EVENT_FLAGS_SHIFT | rule.domain << EVENT_DOMAIN_SHIFT | rule.device
    if low & ~known or high & ~rule.address:
        raise ValueError(f"{code.name}: a reserved bit is set in {low:#x} {high:#x}")
    flags = low >> EVENT_FLAGS_SHIFT & rule.flags
    return Event(code, low & rule.device, low >> EVENT_DOMAIN_SHIFT & rule.domain, flags, high)
