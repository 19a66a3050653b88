# SPDX-License-Identifier: Apache-2.0
"""Every family, against tables that real kernels wrote and what those kernels said (docs/oracles.md)."""

import lzma
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from iokeep.mem.capture import Capture, tsv_lines
from iokeep.pt.digest import digest_extents
from iokeep.pt.extents import Extents
from iokeep.pt.leaves import extents
from iokeep.pt.registry import FORMATS, open_format
from iokeep.pt.table_digest import digest
from iokeep.pt.verify import verify
from iokeep.pt.walk import walk

DATA = Path(__file__).parents[1] / "data"
KEY = bytes(range(16))


def _paths():
    found = {p.name: p for p in sorted((DATA / "captures").iterdir()) if p.is_dir()}
    found |= {p.name: p for p in sorted((DATA / "captures-xz").iterdir()) if p.is_dir()}
    more = os.environ.get("IOKEEP_CAPTURES")
    for path in sorted(Path(more).iterdir()) if more else []:
        if (path / "truth.tsv").is_file():
            found.setdefault(path.name, path)
    return found


PATHS = _paths()


@pytest.fixture(params=PATHS.values(), ids=PATHS.keys(), scope="module")
def real(request, tmp_path_factory):
    path = request.param
    packed = path / "truth.tsv.xz"
    if packed.is_file():
        path = Path(shutil.copytree(path, tmp_path_factory.mktemp("capture") / path.name))
        (path / "truth.tsv").write_bytes(lzma.decompress(packed.read_bytes()))
    capture = Capture.load(path)
    return capture, open_format(capture.format, capture.config), Extents(*capture.truth())


def test_every_format_has_a_capture_in_the_repository():
    here = [p for p in PATHS.values() if DATA in p.parents]
    assert {Capture.load(p).format for p in here} == set(FORMATS)


def test_every_capture_says_where_it_comes_from(real):
    meta = real[0].meta
    for key in ("kernel", "machine", "how", "truth"):
        assert isinstance(meta[key], str), key
        assert meta[key]


def test_it_dumps_byte_for_byte(real):
    capture, fmt, _ = real
    found, problems = extents(fmt, capture.memory, capture.root_pa)
    text = "".join(tsv_lines(found.iova, found.last, found.pa, found.prot))
    assert text.encode() == (capture.path / "truth.tsv").read_bytes()
    assert len(problems) == 0


def test_it_verifies_and_a_wrong_truth_does_not(real):
    capture, fmt, truth = real
    verdict = verify(fmt, capture.memory, capture.root_pa, truth)
    assert verdict.equal
    assert verdict.pages == capture.meta["mapped_bytes"] >> 12
    n = len(truth) // 2
    pa, prot = truth.pa.copy(), truth.prot.copy()
    pa[n] ^= np.uint64(1 << 20)
    wrong = verify(fmt, capture.memory, capture.root_pa, Extents(truth.iova, truth.last, pa, truth.prot))
    assert wrong.differ == {"pa": int(truth.last[n] - truth.iova[n] + np.uint64(1)) >> 12}
    prot[n] = 1 if prot[n] != 1 else 3
    wrong = verify(fmt, capture.memory, capture.root_pa, Extents(truth.iova, truth.last, truth.pa, prot))
    assert list(wrong.differ) == ["prot"]
    keep = np.arange(len(truth)) != n
    fewer = Extents(*(c[keep] for c in (truth.iova, truth.last, truth.pa, truth.prot)))
    assert list(verify(fmt, capture.memory, capture.root_pa, fewer).differ) == ["extra"]


def test_walks_end_where_the_kernel_says(real):
    capture, fmt, truth = real
    for i in range(0, len(truth), max(1, len(truth) // 100)):
        for iova in (int(truth.iova[i]), int(truth.last[i])):
            found = walk(fmt, capture.memory, capture.root_pa, iova)
            assert found.pa == int(truth.pa[i]) + iova - int(truth.iova[i])
            assert found.prot == int(truth.prot[i])
    mapped = set(truth.iova.tolist())
    for after in (truth.last[:100] + np.uint64(1)).tolist():
        if after not in mapped and after:
            assert walk(fmt, capture.memory, capture.root_pa, after).pa is None


def test_its_digest_is_that_of_the_truth(real):
    capture, fmt, truth = real
    assert digest(fmt, capture.memory, capture.root_pa, KEY) == digest_extents(truth, KEY)
