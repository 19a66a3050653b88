# SPDX-License-Identifier: Apache-2.0
"""s390 zPCI: the I/O translation anchor (IOTA) of a PCI function is the root, with its type in the low bits.

Source: Linux arch/s390/include/asm/pci_dma.h (``ZPCI_IOTA_*``); checked against a capture of a running
kernel. The anchor is registered by an instruction, so there is no structure in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from iokeep.pt.roots import base
from iokeep.pt.roots.base import TableRoot, bits, number_field, pa_field

ORIGIN_MASK = bits(63, 12)
ENABLED = 1 << 11  # ZPCI_IOTA_IOT_ENABLED
TYPE_SHIFT = 2
#: designation type -> levels of the table: segment, region third, region second, region first table
LEVELS_OF_TYPE = {0: 2, 1: 3, 2: 4, 3: 5}
_TYPE_OF_LEVELS = {levels: code for code, levels in LEVELS_OF_TYPE.items()}


class FaultReason(base.FaultCode):
    """Why an anchor leads to no table; hardware has no code for it."""

    BAD_IOTA = 1, "the I/O translation anchor is no table"


class RootFault(base.RootFault):
    """No page table; ``reason`` is a :class:`FaultReason`."""

    kind = "s390-root"
    record = "zPCI anchor"


@dataclass(frozen=True, slots=True, kw_only=True)
class RootInfo(base.RootInfo):
    """What the anchor says. :param levels: tables on the way to a page."""

    levels: int


def find_root(iota: int) -> RootInfo:
    """The table of an anchor. :raises RootFault: it is disabled, or not of a table type."""
    number_field("IOTA", iota, 64)
    levels = LEVELS_OF_TYPE.get(iota >> TYPE_SHIFT & 7)
    if not iota & ENABLED or levels is None:
        why = "not enabled" if levels else "a type without tables"
        raise RootFault(FaultReason.BAD_IOTA, f"IOTA {iota:#x}", (), why)
    table = TableRoot("s390_zpci", {"iota": f"{iota:#x}"}, iota & ORIGIN_MASK)
    return RootInfo(translation="first-stage", table=table, domain_id=0, pasid=None, path=(), levels=levels)


def iota_value(root_pa: int, levels: int) -> int:
    """IOTA for a table of 2 to 5 ``levels``, frame size 4096, storage key 0."""
    if levels not in _TYPE_OF_LEVELS:
        raise ValueError(f"a table of {levels} levels does not exist (2 to 5)")
    return pa_field("table", root_pa, ORIGIN_MASK) | ENABLED | _TYPE_OF_LEVELS[levels] << TYPE_SHIFT
