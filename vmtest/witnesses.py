# SPDX-License-Identifier: Apache-2.0
"""What witnesses say of one table: its memory, what was asked for, the kernel's trace events."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from iokeep.mem.memory import Memory
from iokeep.pt.extents import PROT_R, PROT_W, Extents
from iokeep.pt.leaves import extents
from iokeep.pt.registry import open_format
from iokeep.pt.roots.find import find_root_of
from iokeep.pt.verify import verify

_PAGE = 4096


@dataclass(frozen=True, slots=True)
class Seen:
    """One layout while it was mapped."""

    told: Mapping[str, Any]
    table: Extents
    verdict: str
    format: str
    config: Mapping[str, object]


def rows(values: list[list[int]]) -> Extents:
    """Extents out of rows."""
    return Extents.of([tuple(row) for row in values]).canonical()  # type: ignore[misc]


def look(told: Mapping[str, Any], ram: Memory) -> Seen:
    """Read the device's table out of the machine's RAM."""
    found = find_root_of(told["hw"], ram, iommu=told["hw"]["iommu"])
    assert found is not None
    assert found.table is not None
    fmt = open_format(found.table.format, found.table.config)
    table, problems = extents(fmt, ram, found.table.root_pa)
    assert not len(problems)
    verdict = verify(fmt, ram, found.table.root_pa, rows(told["asked"]))
    text = "equal" if verdict.equal else "; ".join(each.text for each in verdict.mismatches)
    return Seen(told, table, text, fmt.name, found.table.config)


def same(a: Extents, b: Extents) -> bool:
    """The same translations."""
    pairs = ((a.iova, b.iova), (a.last, b.last), (a.pa, b.pa), (a.prot, b.prot))
    return all(np.array_equal(x, y) for x, y in pairs)


def traced(lines: Iterable[str]) -> Extents:
    """What the events iommu:map and iommu:unmap leave mapped; they say no permissions: all are read-write."""
    pages: dict[int, int] = {}
    for line in lines:
        fields = {k: int(v, 0) for k, v in re.findall(r"(iova|paddr|size)=(0x[0-9a-f]+|\d+)", line)}
        for at in range(0, fields["size"], _PAGE):
            if "paddr" in fields:
                pages[fields["iova"] + at] = fields["paddr"] + at
            else:
                pages.pop(fields["iova"] + at, None)
    both = PROT_R | PROT_W
    return Extents.of([(iova, iova + _PAGE - 1, pa, both) for iova, pa in pages.items()]).canonical()


def without_prot(table: Extents) -> Extents:
    """The same translations, all read-write."""
    return Extents(
        table.iova, table.last, table.pa, np.full(len(table), PROT_R | PROT_W, np.uint8)
    ).canonical()
