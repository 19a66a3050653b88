# SPDX-License-Identifier: Apache-2.0
"""What the running kernel itself says of its IO page tables: registers, debugfs, trace events."""

from __future__ import annotations

import os
import re
from pathlib import Path

DEBUG = Path("/sys/kernel/debug/iommu")
TRACING = Path("/sys/kernel/tracing")


def hardware(mode: str, bdf: str) -> dict[str, object]:
    """The ``hw`` part of a capture: the IOMMU's root register."""
    if mode == "amd":
        mmio = DEBUG / "amd/iommu00/mmio"
        mmio.write_text("0x0")  # Device Table Base Address Register
        (value,) = re.findall(r"Value:(0x[0-9a-f]+)", mmio.read_text())
        return {"root_register": value, "bdf": bdf, "iommu": "amd"}
    text = (DEBUG / "intel/iommu_regset").read_text()
    (value,) = re.findall(r"^RTADDR\s+\S+\s+(0x[0-9a-f]+)", text, re.MULTILINE)
    return {"root_register": value, "bdf": bdf, "iommu": "vtd"}


def dump(bdf: str) -> str:
    """debugfs's dump of the device's domain (VT-d), "" where the driver has none."""
    path = DEBUG / "intel" / bdf / "domain_translation_struct"
    return path.read_text() if path.exists() else ""


class Trace:
    """The trace events iommu:map and iommu:unmap while this is open."""

    def __enter__(self) -> Trace:
        (TRACING / "buffer_size_kb").write_text("8192")
        (TRACING / "trace").write_text("")
        self._switch("1")
        return self

    def __exit__(self, *error: object) -> None:
        self._switch("0")

    def _switch(self, value: str) -> None:
        for event in ("map", "unmap"):
            (TRACING / "events/iommu" / event / "enable").write_text(value)

    def lines(self) -> list[str]:
        """The events so far."""
        text = (TRACING / "trace").read_text()
        return [line.split(": ", 1)[1] for line in text.splitlines() if " IOMMU: iova=" in line]


def frames_of(hva: int, length: int) -> list[int]:
    """pa of each 4 KiB page of this process's memory."""
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:  # noqa: PTH123
        raw = os.pread(pagemap.fileno(), length // 4096 * 8, hva // 4096 * 8)
    words = [int.from_bytes(raw[i : i + 8], "little") for i in range(0, len(raw), 8)]
    assert all(word >> 63 for word in words), "a page is not there"
    return [(word & (1 << 55) - 1) * 4096 for word in words]
