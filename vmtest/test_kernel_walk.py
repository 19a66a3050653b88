# SPDX-License-Identifier: Apache-2.0
"""``iokeep bench run --kernel-source``: the kernel's own page-table code, compiled here, reads our tables."""

from __future__ import annotations

import json

import numpy as np
import pytest

from iokeep.bench.cases import FORMATS, LEAVES, build, cases, fill
from iokeep.bench.kernel_walk import KernelSource
from iokeep.cli.main import main
from iokeep.mem.ram import Ram
from iokeep.pt.extents import Extents
from iokeep.pt.formats.base import Format
from iokeep.pt.registry import open_format
from vmtest.kernel import source

SIZE = 16 << 20


#: granule in KiB, input and output bits; concatenated roots at stage 2 where the kernel makes them
STAGE_1 = ((4, 39, 48), (4, 48, 48), (16, 47, 44), (16, 48, 48), (64, 48, 48), (64, 52, 52))
STAGE_2 = (
    (4, 40, 40), (4, 42, 42), (4, 44, 44), (4, 48, 48), (16, 40, 40), (16, 44, 44), (16, 48, 48),
    (64, 44, 44), (64, 52, 52),
)  # fmt: skip


def arm(granule: int, input_bits: int, output_bits: int) -> dict[str, int]:
    return {"granule": granule << 10, "input_bits": input_bits, "output_bits": output_bits}


@pytest.fixture(scope="module")
def tree() -> KernelSource:
    return KernelSource.at(source())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("leaf", LEAVES)
def test_it_finds_every_page_and_every_page_that_is_elsewhere(
    tree: KernelSource, name: str, leaf: str
) -> None:
    walk = tree.walk(name)
    assert walk is not None, tree.missing
    for case in cases(["verify"], [name], [], [], [leaf], 4 << 30 if leaf in ("1G", "mixed") else SIZE):
        built = build(case)
        walk.open(built.fmt, built.ram, built.root_pa)
        assert walk.wrong_pages(built.extents) == 0
        first = int(built.extents.last[0] - built.extents.iova[0] + np.uint64(1)) >> 12
        built.extents.pa[0] ^= np.uint64(1 << 30)
        assert walk.wrong_pages(built.extents) == first
        built.extents.pa[0] ^= np.uint64(1 << 30)
        built.extents.last[-1] += np.uint64(2 << 12)  # not mapped
        assert walk.wrong_pages(built.extents) == 2


def scattered(fmt: Format) -> Extents:
    """Extents of any length all over what the table can translate, holes between them."""
    rng = np.random.default_rng(7)
    page, lg2, bits = fmt.levels[0].shift, min(32, fmt.input_lg2 - 6), int(fmt.config["output_bits"])
    slots = rng.permutation(1 << min(fmt.input_lg2 - lg2, 20))[:100] << max(0, fmt.input_lg2 - lg2 - 20)
    rows = []
    for slot in sorted(slots.tolist()):
        size = 1 << int(rng.integers(page, min(lg2 - 1, 30) + 1))  # a leaf, or many, or a leaf and a bit
        length = size + (int(rng.integers(0, 3)) << page)
        fine = size if rng.integers(0, 2) else 1 << page
        offset = int(rng.integers(0, 1 << (lg2 - 2))) & -fine
        pa = int(rng.integers(fine, 1 << (bits - 1))) & -fine
        iova = int(fmt.extend(np.array([(slot << lg2) + offset], np.uint64))[0])
        rows.append((iova, iova + length - 1, pa, 3))
    return Extents.of(sorted(rows))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        *(("vtdss", {"levels": n}) for n in (3, 4, 5)),
        *(("x86_64", {"levels": n}) for n in (4, 5)),
        *(("amdv1", {"levels": n}) for n in (2, 3, 4, 5, 6)),
        *(("riscv64", {"levels": n}) for n in (3, 4, 5)),
        *(("arm_lpae_s1", arm(*n)) for n in STAGE_1),
        *(("arm_lpae_s2", arm(*n)) for n in STAGE_2),
    ],
    ids=str,
)  # fmt: skip
def test_it_reads_our_tables_in_every_configuration(
    tree: KernelSource, name: str, config: dict[str, int]
) -> None:
    """What the kernel's code takes a table of ours for, page by page: a reader that is not ours."""
    fmt = open_format(name, config)
    e = scattered(fmt)
    ram = Ram.of(4096 * fmt.table_bytes)
    pas = np.arange(64, 4096, dtype=np.uint64) * np.uint64(fmt.table_bytes)
    table = fill(fmt, ram, np.random.default_rng(1).permutation(pas), e, None)
    walk = tree.walk(name)
    assert walk is not None, tree.missing
    walk.open(fmt, ram, table.root_pa)
    assert walk.wrong_pages(e) == 0
    holes = e.last + np.uint64(1)
    assert walk.wrong_pages(Extents(holes, holes + np.uint64(4095), e.pa, e.prot)) == len(e)


def test_it_is_a_peer_like_the_others(capsys: pytest.CaptureFixture[str], tree: KernelSource) -> None:
    words = "bench run --job verify --job digest --size 16M --layout contiguous --tables shuffled --repeat 1"
    where = ["--kernel-source", str(tree.path)]
    assert main([*words.split(), *where, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["kernel_source"]["version"] == tree.version
    assert document["kernel_source"]["missing"] == {}
    assert str(tree.path) not in json.dumps(document)
    own = [row for row in document["results"] if row["method"] == "iova_to_phys"]
    assert [(row["job"], row["format"]) for row in own] == [("verify", "vtdss"), ("verify", "arm_lpae_s2")]
    for row in document["results"]:
        assert (row["speedup"]["iova_to_phys"] is None) == (row["job"] != "verify")
    assert main([*words.split(), *where, "--format", "vtdss"]) == 0
    out = capsys.readouterr().out
    assert "times faster than c_walk, c_table, numpy, iova_to_phys\n" in out
    assert f"Linux {tree.version}, compiled with -O2" in out
