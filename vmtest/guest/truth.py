# SPDX-License-Identifier: Apache-2.0
"""What the running kernel itself says of its IO page tables: registers, debugfs, trace events."""

from __future__ import annotations

import mmap
import os
import re
from pathlib import Path

DEBUG = Path("/sys/kernel/debug/iommu")
TRACING = Path("/sys/kernel/tracing")
_PAGE = mmap.PAGESIZE


def hardware(mode: str, bdf: str) -> dict[str, object]:
    """The ``hw`` part of a capture: the IOMMU's root register."""
    if mode.startswith("smmuv3"):
        return {"smmu_regs": _smmu_registers(), "bdf": bdf, "iommu": "smmuv3"}
    if mode == "amd":
        mmio = DEBUG / "amd/iommu00/mmio"
        mmio.write_text("0x0")  # Device Table Base Address Register
        (value,) = re.findall(r"Value:(0x[0-9a-f]+)", mmio.read_text())
        return {"root_register": value, "bdf": bdf, "iommu": "amd"}
    text = (DEBUG / "intel/iommu_regset").read_text()
    (value,) = re.findall(r"^RTADDR\s+\S+\s+(0x[0-9a-f]+)", text, re.MULTILINE)
    return {"root_register": value, "bdf": bdf, "iommu": "vtd"}


def _smmu_registers() -> dict[str, str]:
    """Registers of the only SMMUv3, by /dev/mem; with CONFIG_IO_STRICT_DEVMEM that needs ``iomem=relaxed``.

    Offsets: Arm IHI 0070, chapter 6, "Register formats"; registers are read in their own width.
    """
    first = min(int(at, 16) for at in re.findall(r"(\w+)-.*smmu", Path("/proc/iomem").read_text()))
    with open("/dev/mem", "rb", buffering=0) as memory:  # noqa: PTH123
        page = memoryview(mmap.mmap(memory.fileno(), 4096, prot=mmap.PROT_READ, offset=first))
    words, longs = page.cast("I"), page.cast("Q")
    narrow = {"IDR0": 0x0, "IDR1": 0x4, "IDR3": 0xC, "IDR5": 0x14, "CR0": 0x20, "CR2": 0x2C}
    narrow["STRTAB_BASE_CFG"] = 0x88
    out = {name: hex(words[at // 4]) for name, at in narrow.items()}
    return out | {"STRTAB_BASE": hex(longs[0x80 // 8])}


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
    """pa of each page of this process's memory."""
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:  # noqa: PTH123
        raw = os.pread(pagemap.fileno(), length // _PAGE * 8, hva // _PAGE * 8)
    words = [int.from_bytes(raw[i : i + 8], "little") for i in range(0, len(raw), 8)]
    assert all(word >> 63 for word in words), "a page is not there"
    return [(word & (1 << 55) - 1) * _PAGE for word in words]
