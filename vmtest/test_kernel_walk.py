# SPDX-License-Identifier: Apache-2.0
"""``iokeep bench run --kernel-source``: the kernel's own page-table code, compiled here, reads our tables."""

from __future__ import annotations

import json

import numpy as np
import pytest

from iokeep.bench.cases import FORMATS, LEAVES, build, cases
from iokeep.bench.kernel_walk import KernelSource
from iokeep.cli.main import main
from vmtest.kernel import source

SIZE = 16 << 20


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
