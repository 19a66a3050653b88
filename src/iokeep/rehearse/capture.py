# SPDX-License-Identifier: Apache-2.0
"""What lies between the two kernels of a rehearsal, as captures that the tools read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from iokeep.errors import InputError
from iokeep.handover.reader import read_handover
from iokeep.mem.capture import Capture, ExtentRows, write_pages
from iokeep.mem.memory import U64
from iokeep.pt.extents import Extents
from iokeep.pt.roots.find import find_root_of
from iokeep.pt.roots.vtd import bdf_text
from iokeep.rehearse.measure import Table, table_frames
from iokeep.soft.hardware.platform import Platform

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
    bdf = platform.bdf(0)
    hw = platform.iommu.hw()
    found = find_root_of(hw, platform.ram, bdf, iommu=platform.iommu.KIND)
    if found is None:
        raise InputError(f"the registers of the {platform.iommu.KIND} lead nowhere")
    common = {"kernel": f"{kernel} (software host)", "machine": "iokeep software host", "how": scenario}
    fdt_pa = int(platform.boot.fdt_addr)
    pages = np.array(sorted(read_handover(platform.ram, fdt_pa).pages), np.uint64)
    meta = {**common, "name": "handover", "kho_fdt_pa": f"{fdt_pa:#x}"}
    write_pages(path / "handover", meta, pages, _content(platform, pages))
    way = np.array([step.pa for step in found.path], np.uint64) & ~np.uint64(PAGE - 1)
    tables = np.unique(np.append(table_frames(table.fmt, platform.ram, table.root_pa), way))
    witness: dict[str, object] = {"bdf": bdf_text(bdf)}
    if found.iommu == "amd":  # without its entry it would be read as a VT-d's
        witness["dte"] = list(found.path[-1].words)
    described: dict[str, Any] = {
        **common,
        "name": "table",
        "format": table.fmt.name,
        "config": dict(table.fmt.config),
        "root_pa": f"{table.root_pa:#x}",
        "truth": "what the table translated while its kernel still ran",
        "hw": _hex({**hw, **witness}),
    }
    truth: ExtentRows = (before.iova, before.last, before.pa, before.prot)
    Capture(described, tables, _content(platform, tables)).save(path / "table", truth)


def _hex(value: object) -> object:
    """Numbers as "0x..." texts, at any depth."""
    if isinstance(value, Mapping):
        return {key: _hex(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_hex(inner) for inner in value]
    return f"{value:#x}" if isinstance(value, int) and not isinstance(value, bool) else value


def _content(platform: Platform, pages: U64) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    rows = platform.ram.rows(PAGE)
    return rows.data[rows.index(pages)]
