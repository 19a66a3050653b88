# SPDX-License-Identifier: Apache-2.0
"""The preserved tree against the kernel's algorithm written out plainly, and against sets."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iokeep.errors import InputError, MemoryAbsent
from iokeep.handover.radix import LiveTree, PreservedTree
from iokeep.mem.ram import Ram


def key_of(pfn, order):
    return 1 << (52 - order) | (pfn << 12) >> (12 + order)


def kernel_tree(blocks):
    """kho_radix_add_page(): nested dicts for levels 5 ... 1, an int bitmap at level 0."""
    root = {}
    for pfn, order in blocks:
        key, node = key_of(pfn, order), root
        for level in range(5, 1, -1):
            node = node.setdefault(key >> (15 + 9 * (level - 1)) & 511, {})
        slot = key >> 15 & 511
        node[slot] = node.get(slot, 0) | 1 << (key & 0x7FFF)
    return root


def memory_tree(mem, pa, level=5):
    if level == 0:
        return int.from_bytes(mem.read(pa, 4096), "little")
    table = np.frombuffer(mem.read(pa, 4096), "<u8")
    return {int(i): memory_tree(mem, int(table[i]), level - 1) for i in np.flatnonzero(table)}


@st.composite
def blocks(draw, max_pfn=1 << 40, max_order=10):
    out = []
    for order in draw(st.lists(st.integers(0, max_order), max_size=30)):
        base = draw(st.sampled_from([0, 1 << 20, (1 << 28) - 1 << 12, max_pfn - (1 << 11)]))
        out.append((base + draw(st.integers(0, 2000)) >> order << order, order))
    return out


def tree_of(pairs):
    return PreservedTree.of(
        np.array([p for p, _ in pairs], np.uint64), np.array([o for _, o in pairs], np.uint8)
    )


@given(blocks())
def test_written_tree_is_the_kernels(new_box, pairs):
    box = new_box()
    root = tree_of(pairs).write(box, box.alloc)
    assert memory_tree(box, root) == kernel_tree(pairs)
    assert box.preserved == []  # Linux does not preserve the tree's own pages


@given(blocks())
def test_read_gives_back_what_was_written(new_box, pairs):
    box = new_box()
    tree = tree_of(pairs)
    again = PreservedTree.read(box, tree.write(box, box.alloc))
    assert list(zip(again.pfn.tolist(), again.order.tolist(), strict=True)) == sorted(set(pairs))
    assert again.problems == ()
    assert sorted(again.node_pas.tolist()) == sorted(box.other)


@given(blocks(max_pfn=1 << 20))
def test_frames_contains_orders_pages(pairs):
    tree = tree_of(pairs)
    want = {f for pfn, order in pairs for f in range(pfn, pfn + (1 << order))}
    assert tree.frames().tolist() == sorted(want)
    assert tree.pages == sum(1 << order for _, order in set(pairs))
    probe = np.array(sorted(want | {f + 1 for f in want} | {0, 1 << 50}), np.uint64)
    assert tree.contains(probe).tolist() == [f in want for f in probe.tolist()]
    starts = {}
    for pfn, order in pairs:
        starts[pfn] = min(order, starts.get(pfn, 99))
    assert tree.orders(probe).tolist() == [starts.get(f, -1) for f in probe.tolist()]
    start, last = tree.intervals()
    assert {f for a, b in zip(start.tolist(), last.tolist(), strict=True) for f in range(a, b + 1)} == want
    assert (start[1:] > last[:-1] + np.uint64(1)).all()


@given(st.lists(st.tuples(st.integers(0, 1 << 21), st.integers(0, 5000)), max_size=8))
def test_ranges_split_as_kho_preserve_pages(runs):
    want = set()
    for pfn, count in runs:
        end = pfn + count
        while pfn < end:
            align = 52 if pfn == 0 else (pfn & -pfn).bit_length() - 1
            order = min(align, (end - pfn).bit_length() - 1)
            want.add((pfn, order))
            pfn += 1 << order
    tree = PreservedTree.of_ranges(
        np.array([p for p, _ in runs], np.uint64), np.array([n for _, n in runs], np.uint64)
    )
    assert set(zip(tree.pfn.tolist(), tree.order.tolist(), strict=True)) == want


def test_the_key_of_the_documented_example(box):
    root = PreservedTree.of(np.array([0x1003C6], np.uint64)).write(box, box.alloc)
    pa = root
    for slot in (2, 0, 0, 0, 32):
        table = np.frombuffer(box.read(pa, 4096), "<u8")
        assert np.flatnonzero(table).tolist() == [slot]
        pa = int(table[slot])
    leaf = box.read(pa, 4096)
    assert leaf[0x78] == 1 << 6
    assert sum(leaf) == 1 << 6


def test_capture_counts_and_contains_no_radix_page(capture):
    from iokeep.handover.reader import read_handover

    tree = read_handover(capture.memory, capture.fdt_pa).preserved
    assert tree.pages == capture.meta["preserved_pages"] == len(tree.frames())
    assert not tree.contains(tree.node_pas >> np.uint64(12)).any()
    assert tree.problems == ()


@pytest.mark.parametrize(("pfn", "order"), [(1, 1), (0x201, 9), (1 << 52, 0), (0, 53)])
def test_of_refuses_what_no_block_can_be(pfn, order):
    with pytest.raises(ValueError, match=r"multiple|beyond"):
        PreservedTree.of(np.array([pfn], np.uint64), np.array([order], np.uint8))


def test_loops_shared_nodes_and_odd_pointers_are_problems(box):
    root = PreservedTree.of(np.array([5], np.uint64)).write(box, box.alloc)
    child = next(v for v in np.frombuffer(box.read(root, 4096), "<u8").tolist() if v)
    box.put64(root, root)
    box.put64(root + 8 * 100, child)
    box.put64(root + 8 * 101, 0x1234)
    tree = PreservedTree.read(box, root)
    assert tree.pfn.tolist() == [5]
    assert sum("second time" in p for p in tree.problems) == 2
    assert any("0x1234 is not the pa of a page" in p for p in tree.problems)


def test_keys_without_an_order_are_problems_and_are_dropped(box):
    root = PreservedTree.of(np.array([5], np.uint64)).write(box, box.alloc)
    child = next(v for v in np.frombuffer(box.read(root, 4096), "<u8").tolist() if v)
    slot = np.flatnonzero(np.frombuffer(box.read(root, 4096), "<u8"))[0]
    box.put64(root + 8 * int(slot), 0)
    box.put64(root + 8 * 511, child)  # bits above 52: no order has such a key
    tree = PreservedTree.read(box, root)
    assert len(tree) == 0
    assert "has no order bit" in tree.problems[0]


def test_absurd_claims_are_refused_not_allocated(box):
    root = PreservedTree.of(np.array([0], np.uint64), 52).write(box, box.alloc)
    tree = PreservedTree.read(box, root)
    assert tree.pages == 1 << 52
    assert tree.contains(np.array([1 << 51], np.uint64)).all()
    with pytest.raises(InputError, match="claims"):
        tree.frames()


def test_absent_node_names_its_pa(box):
    root = PreservedTree.of(np.array([5], np.uint64)).write(box, box.alloc)
    leaf = box.other[-1]
    del box.pages[leaf]
    with pytest.raises(MemoryAbsent) as error:
        PreservedTree.read(box, root)
    assert error.value.pa == leaf


def test_root_must_be_a_page(box):
    for pa in (0, 0x1001):
        with pytest.raises(InputError, match="not the pa of a page"):
            PreservedTree.read(box, pa)


def test_a_dense_tree_is_array_work(box):
    pfn = np.arange(1 << 18, dtype=np.uint64) + np.uint64(1 << 20)
    tree = PreservedTree.read(box, PreservedTree.of(pfn).write(box, box.alloc))
    assert np.array_equal(tree.frames(), pfn)


@settings(max_examples=60)
@given(
    steps=st.lists(
        st.tuples(
            st.booleans(), st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 10)), max_size=6)
        ),
        max_size=6,
    )
)
def test_a_live_tree_reads_like_one_that_was_written_at_once(steps):
    ram = Ram.of(4 << 20)
    pages = iter(range(0x1000, 4 << 20, 0x1000))
    live = LiveTree(ram, lambda npages, preserved: next(pages))
    model = set()
    for add, blocks in steps:
        blocks = [((pfn >> order) << order, order) for pfn, order in blocks]
        if not add:  # only what is there goes
            blocks = [b for b in blocks if b in model]
        part = PreservedTree.of(
            np.array([b[0] for b in blocks], np.uint64), np.array([b[1] for b in blocks], np.uint8)
        )
        (live.add if add else live.discard)(part)
        model = model | set(blocks) if add else model - set(blocks)
    found = PreservedTree.read(ram, live.root_pa)
    assert not found.problems
    assert set(zip(found.pfn.tolist(), found.order.tolist(), strict=True)) == model
