# SPDX-License-Identifier: Apache-2.0
"""The running kernel's IO page tables, read from inside of it."""

from __future__ import annotations

from iokeep.mem.live import LiveMemory
from iokeep.pt.gather import gather
from iokeep.pt.leaves import extents
from iokeep.pt.registry import open_format
from iokeep.pt.roots.find import find_root_of


def inside(hw: dict[str, object], path: str) -> list[list[int]]:
    """The extents as they are read from inside of the guest, (iova, last, pa, prot)."""
    with LiveMemory(path) as memory:
        found = find_root_of(hw, memory, iommu=str(hw["iommu"]))  # type: ignore[arg-type]
        assert found is not None
        assert found.table is not None
        fmt = open_format(found.table.format, found.table.config)
        pages = gather(fmt, memory.read, found.table.root_pa)
        all_of, problems = extents(fmt, pages, found.table.root_pa)
        assert not len(problems)
        columns = (all_of.iova, all_of.last, all_of.pa, all_of.prot)
        return [list(row) for row in zip(*(column.tolist() for column in columns), strict=True)]
