# SPDX-License-Identifier: Apache-2.0
"""Tables in software RAM, and captures of real kernels."""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from iokeep.mem.capture import Capture
from iokeep.mem.ram import Ram
from iokeep.pt.build import Table
from iokeep.pt.extents import Extents
from iokeep.pt.registry import open_format

# The helpers of this directory become importable (tests have no packages).
sys.path.insert(0, str(Path(__file__).parent))

DATA = Path(__file__).parents[1] / "data" / "captures"


@dataclass
class Built:
    """A table, its memory, and what was allocated and freed."""

    fmt: object
    ram: Ram
    table: Table
    given: list = field(default_factory=list)
    freed: list = field(default_factory=list)

    @property
    def args(self):
        return self.fmt, self.ram, self.table.root_pa


def build_table(fmt, size=4 << 20, seed=None):
    """An empty table in RAM of ``size`` bytes; table pages in order, or shuffled by ``seed``.

    The upper half of the RAM is for tables of other sizes than ``fmt.table_bytes``.
    """
    unit = fmt.table_bytes
    uniform = {fmt.bytes_of(n) for n in range(len(fmt.levels))} <= {unit}
    size = max(size, 64 * unit)
    ram = Ram.of(size if uniform else 2 * size)
    free_pas = np.arange(unit, size, unit, dtype=np.uint64)
    if seed is not None:
        np.random.default_rng(seed).shuffle(free_pas)
    stocks = {unit: free_pas.tolist()}
    given, freed, top = [], [], [2 * size]

    def stock_of(table_bytes):
        if table_bytes not in stocks:
            count = max(size // 4 // table_bytes, 4)
            top[0] = (top[0] - count * table_bytes) & -table_bytes
            assert top[0] >= size, "the test's RAM is too small"
            stocks[table_bytes] = [top[0] + n * table_bytes for n in range(count)]
        return stocks[table_bytes]

    def alloc(n, table_bytes=unit):
        stock = stock_of(table_bytes)
        pas, stock[:n] = stock[:n], []
        assert len(pas) == n, "the test's RAM is too small"
        for pa in pas:
            ram.write(pa, bytes(table_bytes))
        given.extend(pas)
        return np.array(pas, np.uint64)

    def free(pas, table_bytes=unit):
        freed.extend(pas.tolist())
        stock_of(table_bytes).extend(pas.tolist())
        for pa in pas.tolist():
            ram.write(pa, b"\xa5" * table_bytes)  # poison: nobody may look there again

    return Built(fmt, ram, Table.create(fmt, ram, alloc, free), given, freed)


FORMATS = [
    open_format("vtdss", {"levels": 3}),
    open_format("vtdss", {"levels": 4}),
    open_format("vtdss", {"levels": 5}),
    open_format("x86_64", {"levels": 4}),
    open_format("x86_64", {"levels": 5}),
    open_format("x86_64", {"levels": 4, "sign_extend": 0}),
    open_format("vtdss", {"levels": 4, "output_bits": 46, "max_leaf_lg2": 21, "snoop": 1}),
    open_format("x86_64", {"levels": 4, "output_bits": 39, "max_leaf_lg2": 12}),
]


def format_id(fmt):
    return f"{fmt.name}-{'-'.join(str(v) for v in fmt.config.values())}"


@pytest.fixture(params=FORMATS, ids=format_id, scope="session")
def fmt(request):
    return request.param


@pytest.fixture(scope="session")
def formats():
    return FORMATS


@pytest.fixture(scope="session")
def new_table():
    return build_table


def _capture_paths():
    paths = {p.name: p for p in sorted(DATA.iterdir()) if p.name.startswith(("vtd-", "luo-"))}
    more = os.environ.get("IOKEEP_CAPTURES")
    if more:
        for path in sorted(Path(more).iterdir()):
            if path.name.startswith(("vtd-", "luo-")) and (path / "truth.tsv").is_file():
                paths.setdefault(path.name, path)
    return paths


CAPTURES = _capture_paths()


@pytest.fixture(params=CAPTURES.values(), ids=CAPTURES.keys(), scope="session")
def capture(request):
    return Capture.load(request.param)


@pytest.fixture(scope="session")
def load_capture():
    """name -> (fmt, memory, root_pa, truth)."""

    def load(name):
        capture = Capture.load(DATA / name)
        fmt = open_format(capture.format, capture.config)
        return fmt, capture.memory, capture.root_pa, Extents(*capture.truth())

    return load


@pytest.fixture(scope="session")
def page_dict():
    """Extents -> {iova of page: (pa, prot)}."""

    def pages(extents):
        out = {}
        columns = (extents.iova.tolist(), extents.last.tolist(), extents.pa.tolist(), extents.prot.tolist())
        for a, z, p, q in zip(*columns, strict=True):
            for offset in range(0, z - a + 1, 4096):
                out[a + offset] = (p + offset, q)
        return out

    return pages
