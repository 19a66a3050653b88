# SPDX-License-Identifier: Apache-2.0
"""From the ``hw`` part of a capture's meta.json to the page table, whatever the IOMMU.

``hw`` holds registers and, as a second witness, entries on the way: ``root_register`` and ``dte`` (AMD-Vi),
``root_register``, ``root_entry``, ``ctx_lo``, ``ctx_hi``, ``pasid_dir_entry``, ``pasid_entry`` (VT-d),
``smmu_regs``, ``ste``, ``cd`` (SMMUv3), ``ddtp``, ``caps``, ``dc`` (RISC-V), ``iota`` (s390). The way is
followed in memory. Where the capture has no memory for an entry, the recorded one stands in; where it has
both, they have to be equal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from iokeep.errors import InputError, MemoryAbsent
from iokeep.mem.memory import Memory, Rows
from iokeep.pt.roots import amd, riscv, s390, smmu, vtd
from iokeep.pt.roots.base import READ, WRITE, Path, PathStep, TableRoot

Hw = Mapping[str, object]
#: guest physical memory, by what a second-stage table makes of it
Guest = Callable[[TableRoot], Memory]


@dataclass(frozen=True, slots=True)
class Found:
    """The page table of a requester.

    :param iommu: "vtd", "amd", "smmuv3", "riscv" or "s390". :param translation: as in
        :class:`iokeep.pt.roots.base.RootInfo`.
    :param table: the table, None for "pass-through"; of "nested" the second stage.
    :param domain_id: the tag of cached translations. :param path: the entries read, in order.
    :param prot: what the entries above the table let through (IOMMU_READ | IOMMU_WRITE).
    :param upper: an SMMU's second first-stage table, that of TTB1 where ``table`` (of "nested": ``first``) is
        that of TTB0.
    :param first: of "nested", where guest physical memory was given: the first stage, its ``root_pa`` a gpa.
        None: requests bypass it.
    """

    iommu: str
    translation: str
    table: TableRoot | None
    domain_id: int
    path: Path
    prot: int = READ | WRITE
    upper: TableRoot | None = None
    first: TableRoot | None = None


def find_root_of(
    hw: Hw,
    mem: Memory,
    device: int | str | None = None,
    *,
    pasid: int | None = None,
    iommu: str | None = None,
    guest: Guest | None = None,
) -> Found | None:
    """Follow the registers in ``hw`` to the page table of a device.

    :param device: requester id, stream id or device id, or a PCI name; None = the one that ``hw`` names.
    :param pasid: PASID, SSID or process id of the request.
    :param iommu: as in :class:`Found`; None = the one that the keys of ``hw`` say: a ``root_register``
        without ``dte`` is VT-d's.
    :param guest: guest physical memory of a second-stage table. Given, the way of a "nested" requester is
        followed to its first stage, whose structures are there.
    :returns: None where ``hw`` names no register.
    :raises InputError: ``hw`` is malformed, contradicts the memory, or leads to no table (``RootFault``).
    """
    for name, key, finder in _FINDERS:
        if name == iommu or (iommu is None and key in hw):
            return finder(hw, mem, device, pasid, guest)
    if iommu is not None:
        raise ValueError(f"IOMMU {iommu!r}: it is one of {', '.join(name for name, _, _ in _FINDERS)}")
    return None


# -- reading hw ------------------------------------------------------------------------------------------
def _number(hw: Hw, key: str) -> int:
    value = hw.get(key)
    if isinstance(value, str) and re.fullmatch(r"0x[0-9a-fA-F]{1,16}", value):
        return int(value, 16)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 64:
        return value
    raise InputError(f'hw: "{key}" = {str(value)[:40]!r} is no 64-bit value')


def _optional(hw: Hw, key: str) -> int | None:
    return _number(hw, key) if key in hw else None


def _part(hw: Hw, key: str) -> Hw:
    value = hw.get(key)
    if not isinstance(value, dict):
        raise InputError(f'hw: "{key}" is no object')
    return value


def _words(hw: Hw, key: str, count: int) -> tuple[int, ...] | None:
    """The recorded entry ``key``, a list of ``count`` words; None: not recorded."""
    if key not in hw:
        return None
    value = hw[key]
    if not isinstance(value, list) or len(value) != count:
        raise InputError(f'hw: "{key}" is no list of {count} words')
    return tuple(_number({key: word}, key) for word in value)


def _device(hw: Hw, device: int | str | None, key: str, width: int) -> int:
    """The id of the device: ``device``, else hw[key], else hw["bdf"]."""
    value = device
    if value is None:
        value = _number(hw, key) if key in hw else str(hw.get("bdf"))[:64]
    if isinstance(value, str):
        try:
            value = vtd.parse_bdf(value)
        except ValueError as e:
            raise InputError(f"hw: {e}") from e
    if not 0 <= value < 1 << width:
        raise InputError(f"device id {value:#x} is not {width} bits")
    return value


@dataclass(frozen=True, slots=True)
class _Recorded:
    """Memory, and recorded entries by pa for where it is absent."""

    mem: Memory
    entries: Mapping[int, tuple[int, ...]]

    def read(self, pa: int, length: int) -> bytes:
        try:
            return self.mem.read(pa, length)
        except MemoryAbsent:
            words = self.entries.get(pa)
            if words is None or len(words) * 8 != length:
                raise
            return b"".join(word.to_bytes(8, "little") for word in words)

    def rows(self, row_bytes: int) -> Rows:
        return self.mem.rows(row_bytes)


def _agree(path: Path, recorded: Mapping[str, tuple[int, ...] | None]) -> None:
    """Entries on the way against the recorded ones (lowest words). :raises InputError: they differ."""
    for step in path:
        words = recorded.get(step.name)
        if words is not None and step.words[: len(words)] != words:
            text = " ".join(f"{word:#x}" for word in words)
            raise InputError(f"hw: the {step.name} at pa {step.pa:#x} is not the recorded one ({text})")


# -- one function for each IOMMU -------------------------------------------------------------------------
def _find_smmu(
    hw: Hw, mem: Memory, device: int | str | None, pasid: int | None, guest: Guest | None
) -> Found:
    regs = _part(hw, "smmu_regs")
    idr = _part(regs, "IDR") if "IDR" in regs else regs
    registers = smmu.Registers(
        strtab_base=_number(regs, "STRTAB_BASE"),
        strtab_base_cfg=_number(regs, "STRTAB_BASE_CFG"),
        cr0=_number(regs, "CR0") if "CR0" in regs else smmu.CR0_SMMUEN,
        cr2=_optional(regs, "CR2"),
        idr1=_optional(idr, "IDR1"),
        idr3=_optional(idr, "IDR3"),
        idr5=_optional(idr, "IDR5"),
    )
    ste, cd = _words(hw, "ste", smmu.STE_WORDS), _words(hw, "cd", smmu.CD_WORDS)
    entries = {}
    for words, key in ((ste, "ste_pa"), (cd, "cd_pa")):
        if words is not None and key in hw:
            entries[_number(hw, key)] = words
    memory = _Recorded(mem, entries)
    sid = _device(hw, device, "sid", 32)
    own = device is None or sid == _optional(hw, "sid")
    try:
        info = smmu.find_root(memory, registers, sid, pasid)
    except smmu.RootFault as e:
        # The stream table itself is not in the capture: go on from the recorded entry.
        if e.reason != smmu.FaultReason.F_STE_FETCH or e.path or ste is None or not own:
            raise
        step = PathStep("ste", _number(hw, "ste_pa"), ste)
        info = smmu.of_stream_entry(memory, registers, (step,), pasid)
    if own:
        _agree(info.path, {"ste": ste, "cd": cd if pasid is None else None})
        for step in info.path:
            at = _optional(hw, f"{step.name}_pa") if pasid is None or step.name == "ste" else None
            if at not in (None, step.pa):
                raise InputError(f"hw: the {step.name} is at pa {step.pa:#x}, not at the recorded {at:#x}")
    if info.translation == "nested" and info.table is not None and guest is not None:
        inner = smmu.first_stage_of(_Recorded(guest(info.table), entries), registers, info)
        if inner is not None:
            return Found(
                "smmuv3", "nested", info.table, info.domain_id, inner.path,
                upper=inner.upper, first=inner.table,
            )  # fmt: skip
    return Found("smmuv3", info.translation, info.table, info.domain_id, info.path, upper=info.upper)


_DC_FIELDS = ("tc", "iohgatp", "ta", "fsc", "msiptp", "msi_addr_mask", "msi_addr_pattern", "rsvd")


def _find_riscv(
    hw: Hw, mem: Memory, device: int | str | None, pasid: int | None, guest: Guest | None
) -> Found:
    fctl = _number(hw, "fctl") if "fctl" in hw else 0
    registers = riscv.Registers(_number(hw, "ddtp"), _number(hw, "caps"), fctl)
    recorded: tuple[int, ...] | None = None
    if "dc" in hw:
        dc = _part(hw, "dc")
        count = riscv.DC_EXTENDED_WORDS if registers.extended else riscv.DC_BASE_WORDS
        recorded = tuple(_number(dc, field) if field in dc else 0 for field in _DC_FIELDS[:count])
    device_id = _device(hw, device, "device_id", 24)
    own = device is None or device_id == _optional(hw, "device_id")
    try:
        info = riscv.find_root(mem, registers, device_id, pasid)
    except riscv.RootFault as e:
        if e.reason != riscv.FaultReason.DDT_LOAD_FAULT or recorded is None or not own:
            raise
        # The pa of a context is known only by its directory, which is not in the capture.
        info = riscv.of_device_context(mem, registers, (*e.path, PathStep("dc", 0, recorded)), pasid)
    if own:
        _agree(info.path, {"dc": recorded})
    first, path = info.first, info.path
    if info.translation == "nested" and info.table is not None and guest is not None:
        first, path = riscv.first_stage_of(guest(info.table), registers, info)
    return Found("riscv", info.translation, info.table, info.domain_id, path, first=first)


def _find_s390(
    hw: Hw, mem: Memory, device: int | str | None, pasid: int | None, guest: Guest | None
) -> Found:
    info = s390.find_root(_number(hw, "iota"))
    return Found("s390", info.translation, info.table, info.domain_id, info.path)


def _find_amd(hw: Hw, mem: Memory, device: int | str | None, pasid: int | None, guest: Guest | None) -> Found:
    register = _number(hw, "root_register")
    device_id = _device(hw, device, "device_id", 16)
    dte = _words(hw, "dte", 4)
    own = device is None or "bdf" not in hw or device_id == _device(hw, None, "device_id", 16)
    entries = {}
    if dte is not None and own:
        entries[amd.device_table_pa(register) + device_id * amd.DTE_BYTES] = dte
    info = amd.find_root(_Recorded(mem, entries), register, device_id, pasid)
    if own:
        _agree(info.path, {"dte": dte})
    first, path = None, info.path
    if info.translation == "nested" and info.table is not None and guest is not None:
        inner = amd.first_stage_of(guest(info.table), info)
        first, path = inner.table, inner.path
    return Found("amd", info.translation, info.table, info.domain_id, path, info.prot, first=first)


def _find_vtd(hw: Hw, mem: Memory, device: int | str | None, pasid: int | None, guest: Guest | None) -> Found:
    bdf = _device(hw, device, "device_id", 16)
    info = vtd.find_root(mem, _number(hw, "root_register"), bdf, pasid)
    if device is None:
        context = [_optional(hw, "ctx_lo"), _optional(hw, "ctx_hi")]
        recorded = {"context": tuple(word for word in context if word is not None)}
        for name, key in (("root", "root_entry"), ("pasid-dir", "pasid_dir_entry")):
            if key in hw:
                recorded[name] = (_number(hw, key),)
        entry = _words(hw, "pasid_entry", 8) if pasid is None else None
        _agree(info.path, {**recorded, "pasid": entry})
    first = None
    if info.format is None:
        table = None
    elif info.second is not None:
        # The first stage of "nested" is in guest physical memory.
        table = TableRoot("vtdss", {"levels": info.second[0]}, info.second[1])
        first = TableRoot(info.format, {"levels": info.levels}, info.root_pa)
    else:
        table = TableRoot(info.format, {"levels": info.levels}, info.root_pa)
    return Found("vtd", info.translation, table, info.domain_id, info.path, first=first)


_Finder = Callable[[Hw, Memory, int | str | None, int | None, Guest | None], Found]
#: IOMMU, and the key of ``hw`` that only it has; VT-d is what is left
_FINDERS: tuple[tuple[str, str, _Finder], ...] = (
    ("smmuv3", "smmu_regs", _find_smmu),
    ("riscv", "ddtp", _find_riscv),
    ("s390", "iota", _find_s390),
    ("amd", "dte", _find_amd),
    ("vtd", "root_register", _find_vtd),
)
