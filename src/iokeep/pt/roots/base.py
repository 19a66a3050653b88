# SPDX-License-Identifier: Apache-2.0
"""What the ways from an IOMMU's register to a page table have in common: the path, the table, the refusal.

Everything read here is memory that another kernel wrote, so nothing is believed: each index is checked, and
each entry for reserved bits; the number of entries on a way is fixed, and an entry that is not there is a
fault.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from iokeep.errors import InputError, MemoryAbsent
from iokeep.mem.memory import Memory

#: IOMMU_READ, IOMMU_WRITE
READ, WRITE = 1, 2


def bits(high: int, low: int) -> int:
    """The mask of bits [high:low]."""
    return (1 << (high + 1)) - (1 << low)


@dataclass(frozen=True, slots=True)
class PathStep:
    """One entry on the way; ``name`` as its specification calls it; ``pa``; its 64-bit words."""

    name: str
    pa: int
    words: tuple[int, ...]


Path = tuple[PathStep, ...]


@dataclass(frozen=True, slots=True)
class TableRoot:
    """A page table; ``format`` and ``config`` as :func:`iokeep.pt.registry.open_format` takes them."""

    format: str
    config: Mapping[str, object]
    root_pa: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RootInfo:
    """What the IOMMU's structures say about one requester.

    :param translation: "first-stage", "second-stage", "nested" or "pass-through".
    :param table: the table whose root is a pa: that of the only stage; the second stage of "nested", whose
        first is in guest physical memory; None for "pass-through".
    :param domain_id: the number that tags cached translations.
    :param pasid: the PASID (SSID, process id) that selected the table, else None.
    :param path: the entries read, in order.
    """

    translation: str
    table: TableRoot | None
    domain_id: int
    pasid: int | None
    path: Path

    @property
    def format(self) -> str | None:
        """Page-table format of the table."""
        return self.table.format if self.table else None

    @property
    def config(self) -> Mapping[str, object]:
        """Configuration of the table, empty for "pass-through"."""
        return self.table.config if self.table else {}

    @property
    def root_pa(self) -> int:
        """Root of the table, 0 for "pass-through"."""
        return self.table.root_pa if self.table else 0


class FaultCode(int, enum.Enum):
    """Codes of an IOMMU's event or fault records, each with a few words; see the enumerations made of it."""

    text: str

    def __new__(cls, value: int, text: str) -> FaultCode:
        """One member: its number, and its ``text``."""
        made = int.__new__(cls, value)
        made._value_ = value
        made.text = text
        return made


class RootFault(InputError):
    """The structures lead to no page table.

    :param reason: what hardware would record. :param where: the entry.
    :param why: what is wrong with it, if the words of ``reason`` do not say it.
    :param path: the entries read before, the faulty one last.
    """

    kind = "root"
    record = "fault"

    def __init__(self, reason: FaultCode, where: str, path: Path, why: str = "") -> None:
        super().__init__(f"{where}: {why or reason.text} ({self.record} {int(reason):#x} {reason.name})")
        self.reason = reason
        self.path = path


def refuse(fault: type[RootFault], reason: FaultCode, path: Path, why: str = "") -> RootFault:
    """The fault that the last entry of ``path`` raises."""
    last = path[-1]
    words = " ".join(f"{w:#x}" for w in last.words)
    return fault(reason, f"{last.name} at pa {last.pa:#x} ({words})", path, why)


def read_step(
    mem: Memory, name: str, pa: int, words: int, path: Path, fault: type[RootFault], absent: FaultCode
) -> Path:
    """``path`` and the entry of ``words`` little-endian 64-bit words at ``pa``.

    :raises RootFault: for ``absent``, where the memory has no such pa.
    """
    try:
        raw = mem.read(pa, words * 8)
    except MemoryAbsent as e:
        raise fault(absent, f"{name} at pa {pa:#x}", path) from e
    values = tuple(int.from_bytes(raw[i : i + 8], "little") for i in range(0, len(raw), 8))
    return (*path, PathStep(name, pa, values))


def pa_field(what: str, pa: int, mask: int) -> int:
    """``pa`` as a field of an entry. :raises ValueError: it has bits outside of ``mask``."""
    if pa & ~mask or pa < 0:
        raise ValueError(f"{what} pa {pa:#x} does not fit the field {mask:#x}")
    return pa


def number_field(what: str, value: int, width: int) -> int:
    """``value`` as an unsigned field of ``width`` bits. :raises ValueError: it is not."""
    if not 0 <= value < 1 << width:
        raise ValueError(f"{what} {value:#x} is not {width} bits")
    return value
