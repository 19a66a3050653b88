# SPDX-License-Identifier: Apache-2.0
"""The preserved-memory tree of KHO: which frames the next kernel must not touch, and of which order.

Linux 7.3 ``kernel/liveupdate/kexec_handover.c`` (``kho_radix_encode_key``, ``kho_radix_add_page``) and
``include/linux/kho/abi/kexec_handover.h``: the key of a block is ``1 << (52 - order) | pa >> (12 +
order)``; table levels 5 ... 1 index it by bits ``15 + 9 (level - 1)`` and up, 512 u64 pas each; a leaf is a
page of 32768 bits, bit number = the key's low 15 bits, bytes in little-endian order. The pages of the tree
itself are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from iokeep.errors import InputError
from iokeep.handover.abi import PAGE_SIZE, Alloc
from iokeep.mem.memory import U8, U64, Memory, WritableMemory

#: bit of the order-0 marker in a key (KHO_ORDER_0_LOG2 = 64 - PAGE_SHIFT)
ORDER_0_LG2 = 52
BITMAP_LG2 = 15
TABLE_LG2 = 9
#: levels of tables above the leaves (KHO_TREE_MAX_DEPTH - 1)
TOP_LEVEL = 5
#: entries that a tree may hold before it is refused: 1 TiB of single frames, 2.4 GB of arrays
MAX_ENTRIES = 1 << 28
#: frames that :meth:`PreservedTree.frames` lists at most: 4 TiB, 8 GiB of array
MAX_FRAMES = 1 << 30

_ONE = np.uint64(1)


def _encode(pfn: U64, order: U8) -> U64:
    wide = order.astype(np.uint64)
    return (_ONE << (np.uint64(ORDER_0_LG2) - wide)) | (pfn >> wide)


@dataclass(frozen=True, slots=True)
class PreservedTree:
    """Blocks of ``2**order`` frames each, sorted by (pfn, order), each once.

    ``pfn`` uint64[n], a multiple of ``2**order``; ``order`` uint8[n], 0 ... 52. ``node_pas`` uint64: the
    pages that the tree was read from, root first (empty for a tree made by :meth:`of`). ``problems``: what
    a reader survived.
    """

    pfn: U64
    order: U8
    node_pas: U64 = field(default_factory=lambda: np.zeros(0, np.uint64))
    problems: tuple[str, ...] = ()

    @classmethod
    def of(cls, pfn: U64, order: U8 | int = 0) -> PreservedTree:
        """From the first pfn of each block (uint64[n], any order, duplicates joined) and its order.

        :raises ValueError: a pfn is not a multiple of its block's size, or beyond 2**52.
        """
        pfn = np.asarray(pfn, np.uint64)
        orders = np.broadcast_to(np.asarray(order, np.uint8), pfn.shape)
        wide = orders.astype(np.uint64)
        if len(pfn) and (int(wide.max()) > ORDER_0_LG2 or int(pfn.max()) >> ORDER_0_LG2):
            raise ValueError("a preserved block has a pfn or an order beyond 52 bits")
        if np.any(pfn & ((_ONE << wide) - _ONE)):
            raise ValueError("a preserved block's pfn is not a multiple of 2**order")
        # kho-v4 keys are unique for (pfn, order): sort and drop duplicates by key, then bring into pfn order.
        _, first = np.unique(_encode(pfn, orders), return_index=True)
        pfn, orders = pfn[first], orders[first]
        by_pfn = np.lexsort((orders, pfn))
        return cls(pfn[by_pfn], orders[by_pfn].copy())

    @classmethod
    def of_ranges(cls, pfn: U64, count: U64) -> PreservedTree:
        """From runs of ``count`` frames at ``pfn``, split as ``kho_preserve_pages()`` does.

        The rule: as many times as needed the biggest block that is aligned at the run's start and fits into
        the rest. A run of 2**n frames at a multiple of 2**n is thus one block, as ``kho_preserve_folio()``
        would add it.
        """
        start = np.asarray(pfn, np.uint64).copy()
        left = np.asarray(count, np.uint64).copy()
        pfns: list[U64] = []
        orders: list[U8] = []
        while len(start := start[left > 0]):
            left = left[left > 0]
            # min(count_trailing_zeros(pfn), ilog2(left)); pfn 0 is aligned to anything
            low = start & (~start + _ONE)
            align = np.where(start == 0, np.uint64(ORDER_0_LG2), _floor_lg2(low))
            order = np.minimum(align, _floor_lg2(left))
            pfns.append(start)
            orders.append(order.astype(np.uint8))
            size = _ONE << order
            start, left = start + size, left - size
        if not pfns:
            return cls.of(np.zeros(0, np.uint64))
        return cls.of(np.concatenate(pfns), np.concatenate(orders))

    def __len__(self) -> int:
        return len(self.pfn)

    def union(self, other: PreservedTree) -> PreservedTree:
        """All blocks of both."""
        return PreservedTree.of(
            np.concatenate((self.pfn, other.pfn)), np.concatenate((self.order, other.order))
        )

    @property
    def by_order(self) -> dict[int, int]:
        """Number of blocks of each order that occurs."""
        orders, counts = np.unique(self.order, return_counts=True)
        return {int(order): int(count) for order, count in zip(orders, counts, strict=True)}

    @property
    def pages(self) -> int:
        """Frames of 4096 bytes in all blocks."""
        return sum(count << order for order, count in self.by_order.items())

    def intervals(self) -> tuple[U64, U64]:
        """(start, last): maximal runs of preserved pfns, closed, sorted, disjoint."""
        if not len(self.pfn):
            return self.pfn, self.pfn
        last = self.pfn + ((_ONE << self.order.astype(np.uint64)) - _ONE)
        reach = np.maximum.accumulate(last)
        first = np.concatenate(([True], self.pfn[1:] > reach[:-1] + _ONE))
        at = np.flatnonzero(first)
        end = np.concatenate((at[1:] - 1, [len(self.pfn) - 1]))
        return self.pfn[at], reach[end]

    def contains(self, pfn: U64) -> NDArray[np.bool_]:
        """bool[k]: which of the pfns uint64[k] lie in a preserved block."""
        pfn = np.asarray(pfn, np.uint64)
        start, last = self.intervals()
        if not len(start):
            return np.zeros(pfn.shape, np.bool_)
        at = np.searchsorted(start, pfn, side="right") - 1
        return np.asarray((at >= 0) & (pfn <= last[np.maximum(at, 0)]), np.bool_)

    def orders(self, pfn: U64) -> NDArray[np.int8]:
        """int8[k]: the order of the block that *starts* at each pfn, -1 where none does.

        Where blocks of several orders start there it is the smallest: ``kho_preserved_memory_reserve()``
        meets it last (its key is the greatest) and overwrites the order that ``kho_restore_folio()`` will
        use.
        """
        pfn = np.asarray(pfn, np.uint64)
        if not len(self.pfn):
            return np.full(pfn.shape, -1, np.int8)
        at = np.minimum(np.searchsorted(self.pfn, pfn, side="left"), len(self.pfn) - 1)
        return np.where(self.pfn[at] == pfn, self.order[at].astype(np.int8), np.int8(-1))

    def frames(self) -> U64:
        """Every preserved 4096-byte frame: sorted uint64 pfns, each once.

        :raises InputError: more than ``MAX_FRAMES`` (a damaged order claims absurd sizes).
        """
        start, last = self.intervals()
        total = int((last - start).astype(object).sum()) + len(start) if len(start) else 0
        if total > MAX_FRAMES:
            raise InputError(
                f"preserved tree claims {total} frames, more than {MAX_FRAMES}",
                "the tree is damaged: see the orders in `iokeep handover show`",
            )
        counts = (last - start + _ONE).astype(np.int64)
        base = np.repeat(start, counts)
        within = np.arange(total, dtype=np.uint64) - np.repeat(
            (np.cumsum(counts) - counts).astype(np.uint64), counts
        )
        return base + within

    def write(self, mem: WritableMemory, alloc: Alloc) -> int:
        """Write the tree as Linux does and return the pa of its root.

        :param alloc: called as ``alloc(1, False)`` for each node: Linux does not preserve the pages of the
            tree.
        """
        keys = np.unique(_encode(self.pfn, self.order))
        # ids[l]: the distinct prefixes that name the nodes of level l; level 0 = the bitmaps
        ids: list[U64] = [np.unique(keys >> np.uint64(BITMAP_LG2))]
        for _ in range(TOP_LEVEL - 1):
            ids.append(np.unique(ids[-1] >> np.uint64(TABLE_LG2)))
        ids.append(np.zeros(1, np.uint64))  # the root is there for an empty tree too
        pas = [np.array([alloc(1, False) for _ in level], np.uint64) for level in reversed(ids)][::-1]
        for level in range(TOP_LEVEL, 0, -1):
            parent = ids[level - 1] >> np.uint64(TABLE_LG2)
            slot = ids[level - 1] & np.uint64(511)
            for number, pa in enumerate(pas[level]):
                mine = parent == ids[level][number]
                table = np.zeros(512, "<u8")
                table[slot[mine].astype(np.int64)] = pas[level - 1][mine]
                mem.write(int(pa), table.tobytes())
        leaf_of = np.searchsorted(ids[0], keys >> np.uint64(BITMAP_LG2))
        ends = np.searchsorted(leaf_of, np.arange(len(ids[0])), side="right")
        begin = 0
        for number, pa in enumerate(pas[0]):
            low = (keys[begin : ends[number]] & np.uint64((1 << BITMAP_LG2) - 1)).astype(np.int64)
            bits = np.zeros(1 << BITMAP_LG2, np.uint8)
            bits[low] = 1
            mem.write(int(pa), np.packbits(bits, bitorder="little").tobytes())
            begin = int(ends[number])
        return int(pas[TOP_LEVEL][0])

    @classmethod
    def read(cls, mem: Memory, root_pa: int) -> PreservedTree:
        """Read the tree whose root is at ``root_pa``; loops, odd pointers and impossible keys go to
        ``problems``.

        :raises MemoryAbsent: a node is not in this source. :raises InputError: more than ``MAX_ENTRIES``
            blocks.
        """
        problems: list[str] = []
        if root_pa == 0 or root_pa % PAGE_SIZE:
            raise InputError(f"preserved-memory-map {root_pa:#x} is not the pa of a page")
        seen: set[int] = {root_pa}
        nodes: list[tuple[int, int]] = [(0, root_pa)]
        for level in range(TOP_LEVEL, 0, -1):
            below: list[tuple[int, int]] = []
            for prefix, pa in nodes:
                table = np.frombuffer(mem.read(pa, PAGE_SIZE), "<u8")
                for slot in np.flatnonzero(table):
                    child = int(table[slot])
                    where = f"radix level {level} node {pa:#x} slot {int(slot)}"
                    if child % PAGE_SIZE or child >> 52:
                        problems.append(f"{where}: {child:#x} is not the pa of a page")
                    elif child in seen:
                        problems.append(
                            f"{where}: node {child:#x} is linked a second time (loop or shared node)"
                        )
                    else:
                        seen.add(child)
                        below.append((prefix << TABLE_LG2 | int(slot), child))
            nodes = below
        pfns: list[U64] = []
        orders: list[U8] = []
        total = 0
        for prefix, pa in nodes:
            page = np.frombuffer(mem.read(pa, PAGE_SIZE), np.uint8)
            total += int(np.bitwise_count(page).sum())
            if total > MAX_ENTRIES:
                raise InputError(f"preserved tree at {root_pa:#x} holds more than {MAX_ENTRIES} blocks")
            low = np.flatnonzero(np.unpackbits(page, bitorder="little")).astype(np.uint64)
            keys = np.uint64(prefix << BITMAP_LG2) | low
            good = (keys != 0) & (keys >> np.uint64(ORDER_0_LG2 + 1) == 0)
            if not good.all():
                bad = int(keys[~good][0])
                problems.append(
                    f"radix leaf {pa:#x}: key {bad:#x} has no order bit in 0 ... {ORDER_0_LG2}"
                    f" ({int((~good).sum())} such bits)"
                )
                keys = keys[good]
            msb = _floor_lg2(keys)
            order = np.uint64(ORDER_0_LG2) - msb
            pfns.append((keys ^ (_ONE << msb)) << order)
            orders.append(order.astype(np.uint8))
        tree = cls.of(
            np.concatenate(pfns) if pfns else np.zeros(0, np.uint64),
            np.concatenate(orders) if orders else np.zeros(0, np.uint8),
        )
        return cls(tree.pfn, tree.order, np.array(sorted(seen), np.uint64), tuple(problems))


class LiveTree:
    """The tree in memory while blocks come and go, as Linux keeps it: a block is added when it is preserved,
    so that nothing is left to do at the reboot.

    :param alloc: called as ``alloc(1, False)`` for each node, which it gives zeroed. A node stays until the
        whole tree is given up.
    """

    def __init__(self, mem: WritableMemory, alloc: Alloc) -> None:
        self._mem = mem
        self._alloc = alloc
        self.root_pa = alloc(1, False)
        #: (level, prefix) -> pa; level 0 = the bitmaps
        self._nodes: dict[tuple[int, int], int] = {(TOP_LEVEL, 0): self.root_pa}

    def add(self, blocks: PreservedTree) -> None:
        """These blocks must survive."""
        self._change(blocks, True)

    def discard(self, blocks: PreservedTree) -> None:
        """These need not any more."""
        self._change(blocks, False)

    def _change(self, blocks: PreservedTree, there: bool) -> None:
        if not len(blocks):
            return
        keys = np.sort(_encode(blocks.pfn, blocks.order))
        leaf = keys >> np.uint64(BITMAP_LG2)
        first = np.flatnonzero(np.concatenate((np.ones(1, np.bool_), leaf[1:] != leaf[:-1])))
        for begin, end in zip(first.tolist(), [*first[1:].tolist(), len(keys)], strict=True):
            prefix = int(leaf[begin])
            pa = self._node(0, prefix) if there else self._nodes.get((0, prefix), 0)
            if not pa:
                continue  # never added: what would have added it ran out of memory
            low = (keys[begin:end] & np.uint64((1 << BITMAP_LG2) - 1)).astype(np.int64)
            bits = np.zeros(1 << BITMAP_LG2, np.uint8)
            bits[low] = 1
            mask = np.packbits(bits, bitorder="little")
            page = np.frombuffer(self._mem.read(pa, PAGE_SIZE), np.uint8)
            self._mem.write(pa, (page | mask if there else page & ~mask).tobytes())

    def _node(self, level: int, prefix: int) -> int:
        pa = self._nodes.get((level, prefix))
        if pa is None:
            above = self._node(level + 1, prefix >> TABLE_LG2)
            pa = self._nodes[level, prefix] = self._alloc(1, False)
            self._mem.write(above + 8 * (prefix & 511), pa.to_bytes(8, "little"))
        return pa


def _floor_lg2(value: U64) -> U64:
    """Index of the highest set bit of each value (all nonzero), exact over 64 bits."""
    out = np.zeros(value.shape, np.uint64)
    rest = value.copy()
    for step in (32, 16, 8, 4, 2, 1):
        big = rest >> np.uint64(step) != 0
        rest = np.where(big, rest >> np.uint64(step), rest)
        out += np.where(big, np.uint64(step), np.uint64(0))
    return out


__all__ = ["LiveTree", "MAX_ENTRIES", "MAX_FRAMES", "PreservedTree"]
