# SPDX-License-Identifier: Apache-2.0
"""What lies between the two kernels of a rehearsal, as captures that the tools read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from iokeep.handover.reader import read_handover
from iokeep.mem.capture import Capture, ExtentRows, write_pages
from iokeep.mem.memory import U64
from iokeep.pt.extents import Extents
from iokeep.pt.roots.vtd import find_root
from iokeep.pt.tables import table_pages
from iokeep.rehearse.measure import Table
from iokeep.soft.hardware.platform import Platform
from iokeep.soft.hardware.units import vtd as registers

PAGE = 4096


def save_between(
    path: Path, platform: Platform, kernel: str, table: Table, before: Extents, scenario: str
) -> None:
    """Write ``path``/handover and ``path``/table, once the first kernel has ended.

    :param kernel: profile of that kernel. :param table: what the devices' DMA goes through.
    :param before: what it translated when the kernel still ran; it becomes ``truth.tsv``, so that a fault
        that was injected since is a difference.
    :raises InputError: something is there already, or the handover cannot be read.
    """
    rtaddr = platform.iommu.read64(registers.DMAR_RTADDR_REG)
    common = {"kernel": f"{kernel} (software host)", "machine": "iokeep software host", "how": scenario}
    fdt_pa = int(platform.boot.fdt_addr)
    pages = np.array(sorted(read_handover(platform.ram, fdt_pa).pages), np.uint64)
    meta = {**common, "name": "handover", "kho_fdt_pa": f"{fdt_pa:#x}"}
    write_pages(path / "handover", meta, pages, _content(platform, pages))
    way = [step.pa for step in find_root(platform.ram, rtaddr, platform.bdf(0)).path]
    tables = np.append(table_pages(table.fmt, platform.ram, table.root_pa), np.array(way, np.uint64))
    tables = np.unique(tables & ~np.uint64(PAGE - 1))
    bus, devfn = platform.bdf(0) >> 8, platform.bdf(0) & 0xFF
    described: dict[str, Any] = {
        **common,
        "name": "table",
        "format": table.fmt.name,
        "config": dict(table.fmt.config),
        "root_pa": f"{table.root_pa:#x}",
        "truth": "what the table translated while its kernel still ran",
        "hw": {"root_register": f"{rtaddr:#x}", "bdf": f"0000:{bus:02x}:{devfn >> 3:02x}.{devfn & 7}"},
    }
    truth: ExtentRows = (before.iova, before.last, before.pa, before.prot)
    Capture(described, tables, _content(platform, tables)).save(path / "table", truth)


def _content(platform: Platform, pages: U64) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    rows = platform.ram.rows(PAGE)
    return rows.data[rows.index(pages)]
