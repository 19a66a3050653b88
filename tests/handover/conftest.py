# SPDX-License-Identifier: Apache-2.0
"""Memory for the tests: pages by pa, an allocator that records, and the captures of a real Linux 7.3.4.

IOKEEP_CAPTURES may name a directory that has ``kho/``: its captures are then tested too.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from iokeep.errors import MemoryAbsent
from iokeep.handover.radix import PreservedTree

DATA = Path(__file__).parent.parent / "data" / "kho"


class Pages:
    """Sparse memory of 4096-byte pages: what is not there is absent."""

    def __init__(self, pages: dict[int, bytes]) -> None:
        self.pages = {pa: bytearray(data) for pa, data in pages.items()}

    def read(self, pa: int, length: int) -> bytes:
        out = bytearray()
        while length:
            page, offset = pa & ~4095, pa & 4095
            if page not in self.pages:
                raise MemoryAbsent(pa, length)
            part = self.pages[page][offset : offset + length]
            out += part
            pa, length = pa + len(part), length - len(part)
        return bytes(out)

    def write(self, pa: int, data: bytes) -> None:
        while data:
            page, offset = pa & ~4095, pa & 4095
            if page not in self.pages:
                raise MemoryAbsent(pa, len(data))
            n = min(len(data), 4096 - offset)
            self.pages[page][offset : offset + n] = data[:n]
            pa, data = pa + n, data[n:]

    def u64(self, pa: int) -> int:
        return int.from_bytes(self.read(pa, 8), "little")

    def put64(self, pa: int, value: int) -> None:
        self.write(pa, value.to_bytes(8, "little"))

    def copy(self) -> "Pages":
        return Pages(self.pages)


@dataclass
class Box(Pages):
    """Memory that grows by ``alloc``: what the writer's caller is."""

    next_pa: int = 0x100000
    step: int = 4096
    preserved: list[tuple[int, int]] = field(default_factory=list)
    other: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__({})

    def alloc(self, npages: int, preserved: bool) -> int:
        pa = self.next_pa
        self.next_pa += npages * 4096 + self.step - 4096
        for number in range(npages):
            self.pages[pa + number * 4096] = bytearray(4096)
        if preserved:
            self.preserved.append((pa >> 12, npages))
        else:
            self.other.append(pa)
        return pa

    def tree(self) -> PreservedTree:
        pfn, count = np.array(self.preserved, np.uint64).reshape(-1, 2).T
        return PreservedTree.of_ranges(pfn, count)


@dataclass
class KhoCapture:
    name: str
    path: Path
    meta: dict
    truth: dict
    memory: Pages
    fdt_pa: int


def load(path: Path) -> KhoCapture:
    meta = json.loads((path / "meta.json").read_text())
    truth = json.loads((path / "truth.json").read_text())
    with np.load(path / "tables.npz") as tables:
        pages = {int(pa): data.tobytes() for pa, data in zip(tables["pa"], tables["data"], strict=True)}
    return KhoCapture(path.name, path, meta, truth, Pages(pages), int(meta["kho_fdt_pa"], 16))


def _paths() -> list[Path]:
    paths = sorted(p for p in DATA.iterdir() if p.is_dir())
    more = os.environ.get("IOKEEP_CAPTURES")
    if more:
        paths += sorted(p for p in (Path(more) / "kho").iterdir() if p.is_dir())
    return paths


PATHS = _paths()


@pytest.fixture(params=PATHS, ids=[f"{p.parent.parent.name}-{p.name}" for p in PATHS])
def capture(request: pytest.FixtureRequest) -> KhoCapture:
    return load(request.param)


@pytest.fixture
def open_capture() -> Callable[[str], KhoCapture]:
    return lambda name: load(DATA / name)


@pytest.fixture
def box() -> Box:
    return Box()


@pytest.fixture(scope="session")
def new_box() -> type[Box]:
    return Box
