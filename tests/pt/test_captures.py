# SPDX-License-Identifier: Apache-2.0
"""Tables that real kernels wrote, against what the same kernels said of them."""

import numpy as np
from table_support import rows_of

from iokeep.mem.capture import tsv_lines
from iokeep.pt import reference
from iokeep.pt.diff import diff
from iokeep.pt.digest import digest_extents
from iokeep.pt.extents import Extents
from iokeep.pt.layout import kernel_layout
from iokeep.pt.leaves import extents, leaves
from iokeep.pt.registry import open_format
from iokeep.pt.table_digest import digest
from iokeep.pt.tables import table_pages
from iokeep.pt.verify import verify
from iokeep.pt.walk import walk


def _open(capture):
    return open_format(capture.format, capture.config), capture.memory, capture.root_pa


def test_extents_are_the_kernels(capture):
    found, problems = extents(*_open(capture))
    text = "".join(tsv_lines(found.iova, found.last, found.pa, found.prot))
    assert text.encode() == (capture.path / "truth.tsv").read_bytes()
    assert len(problems) == 0
    assert found.mapped_bytes == capture.meta["mapped_bytes"]


def test_leaf_sizes_are_the_kernels(capture):
    found = leaves(*_open(capture))
    sizes, counts = np.unique(found.lg2, return_counts=True)
    assert {hex(1 << s): c for s, c in zip(sizes.tolist(), counts.tolist(), strict=True)} == capture.meta[
        "leaf_sizes"
    ]


def test_verify_proves_the_kernels_truth(capture):
    truth = Extents(*capture.truth())
    verdict = verify(*_open(capture), truth)
    assert verdict.equal
    assert verdict.mismatches == []
    assert verdict.pages == capture.meta["mapped_bytes"] >> 12
    assert verdict.table_bytes == len(table_pages(*_open(capture))) * 4096


def test_digest_from_tables_and_from_the_kernels_truth(capture):
    key = bytes(range(16))
    assert digest(*_open(capture), key) == digest_extents(Extents(*capture.truth()), key)


def test_reference_reads_the_same(capture):
    fmt, mem, root = _open(capture)
    truth = Extents(*capture.truth())
    if len(truth) > 20000:
        return  # the obvious implementation takes a minute there
    rows = rows_of(truth)
    tree = reference.tree(fmt, mem, root)
    assert reference.extents(tree) == rows
    assert tree.bad == []
    assert sorted(tree.pages) == table_pages(fmt, mem, root).tolist()


def test_walk_first_and_last_byte_of_every_extent(capture):
    fmt, mem, root = _open(capture)
    truth = Extents(*capture.truth())
    for i in range(0, len(truth), max(1, len(truth) // 200)):
        for iova in (int(truth.iova[i]), int(truth.last[i])):
            found = walk(fmt, mem, root, iova)
            assert found.pa == int(truth.pa[i]) + iova - int(truth.iova[i])
            assert found.prot == int(truth.prot[i])
            assert [level for level, _, _ in found.steps] == list(
                range(fmt.top_level, fmt.top_level - len(found.steps), -1)
            )


def test_the_guest_after_kexec_translates_as_before(load_capture):
    verdict = diff(*load_capture("luo-vtd-before")[:3], *load_capture("luo-vtd-after")[:3])
    assert verdict.equal
    assert verdict.total == 0
    assert verdict.layout_equal


def test_a_wrong_replay_is_named_page_by_page(load_capture, page_dict):
    *before, truth_before = load_capture("luo-vtd-neg-before")
    *after, truth_after = load_capture("luo-vtd-neg-after-bad")
    verdict = diff(*before, *after, limit=10000)
    assert not verdict.equal
    counts = {}
    for m in verdict.mismatches:
        counts[m.reason] = counts.get(m.reason, 0) + (m.last - m.iova + 1) // 4096
    assert counts == {"pa": 2056, "prot": 256, "missing": 2, "extra": 3}
    a, b = page_dict(truth_before), page_dict(truth_after)
    named = {iova for m in verdict.mismatches for iova in range(m.iova, m.last, 4096)}
    assert named == {iova for iova in set(a) | set(b) if a.get(iova) != b.get(iova)}
    assert verdict.total == len(verdict.mismatches)


def test_layout_is_what_iommu_map_chooses(load_capture):
    fmt, mem, root, truth = load_capture("vtd-legacy-huge2m")
    verdict = verify(fmt, mem, root, truth, layout=kernel_layout(fmt, truth))
    assert verdict.layout_equal
    verdict = verify(fmt, mem, root, truth, layout=kernel_layout(fmt, truth, max_lg2=12))
    assert verdict.equal
    assert verdict.layout_equal is False
    assert sum(r.last - r.iova + 1 for r in verdict.layout) == 32 << 21
    assert {(r.lg2_a, r.lg2_b) for r in verdict.layout} == {(12, 21)}


def test_first_stage_and_second_stage_of_one_layout_differ_only_in_pa(load_capture):
    """Different guests: other frames, but no permission differs where a format can say it."""
    verdict = diff(*load_capture("vtd-smfs-small")[:3], *load_capture("vtd-smss-small")[:3], limit=100)
    assert {m.reason for m in verdict.mismatches} == {"pa"}
