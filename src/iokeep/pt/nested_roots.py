# SPDX-License-Identifier: Apache-2.0
"""From the ``hw`` part of a capture's meta.json to both stages of a requester whose translation is nested.

The structures that lead to stage 1 (an SMMU's context descriptors, AMD's guest CR3 table, RISC-V's process
directory) are in guest physical memory, so that stage 2 is walked for each of them; VT-d's PASID table entry
and RISC-V's device context name both roots.
"""

from __future__ import annotations

from dataclasses import dataclass

from iokeep.errors import InputError
from iokeep.mem.memory import Memory, Rows
from iokeep.pt.formats.base import Format
from iokeep.pt.nested import StageTwoFault
from iokeep.pt.registry import open_format
from iokeep.pt.roots.base import TableRoot
from iokeep.pt.roots.find import Found, Hw, find_root_of
from iokeep.pt.walk import walk


@dataclass(frozen=True, slots=True)
class Stages:
    """Both stages: ``first.root_pa`` is a gpa. :param found: the way from the register."""

    first: TableRoot
    second: TableRoot
    found: Found


class GuestMemory:
    """Guest physical memory by walks of stage 2, for the few reads of the structures above stage 1."""

    def __init__(self, fmt: Format, root_pa: int, mem: Memory) -> None:
        self.fmt, self.root_pa, self.mem = fmt, root_pa, mem

    def read(self, pa: int, length: int) -> bytes:
        """``length`` bytes from the gpa ``pa``. :raises StageTwoFault, MemoryAbsent: any is not there."""
        out = []
        while length > 0:
            n = min(length, 4096 - pa % 4096)
            path = walk(self.fmt, self.mem, self.root_pa, pa)
            if path.pa is None or not path.prot & 1:
                why = path.why or "it may not be read"
                what = f"stage 2: gpa {pa:#x}, where a structure that leads to stage 1 is: {why}"
                hint = f"root of stage 2: {self.root_pa:#x}, format {self.fmt.name}; is it this guest's?"
                raise StageTwoFault(pa, what, hint)
            out.append(self.mem.read(path.pa, n))
            pa, length = pa + n, length - n
        return b"".join(out)

    def rows(self, row_bytes: int) -> Rows:
        """Structures are read entry by entry."""
        raise NotImplementedError("read() is all that is needed")


def find_stages(
    hw: Hw, mem: Memory, device: int | str | None = None, *, pasid: int | None = None, upper: bool = False
) -> Stages:
    """Follow the registers in ``hw`` to both tables.

    :param device: :param pasid: as for :func:`iokeep.pt.roots.find.find_root_of`.
    :param upper: an SMMU's stage 1 under TTB1 instead of that under TTB0.
    :raises InputError: ``hw`` names no register, leads to no table, or to a translation that is not nested.
    """

    def guest(second: TableRoot) -> GuestMemory:
        return GuestMemory(open_format(second.format, dict(second.config)), second.root_pa, mem)

    found = find_root_of(hw, mem, device, pasid=pasid, guest=guest)
    if found is None:
        raise InputError(
            'meta.json: "hw" names no register of an IOMMU',
            "name stage 1 with --stage1 FORMAT --stage1-root GPA",
        )
    if found.translation != "nested" or found.table is None:
        raise InputError(
            f"hw: the translation of this requester is {found.translation}, not nested",
            "leave --nested out, or choose --device and --pasid",
        )
    first = found.first
    if upper and first is not None and not first.config.get("ttbr"):
        first = found.upper
    if first is None:
        raise InputError(
            "hw: requests bypass stage 1" if not upper else "hw: TTB1 has no table (EPD1)",
            "choose --pasid (substream id)" if not upper else "leave --ttbr out",
        )
    return Stages(first, found.table, found)
