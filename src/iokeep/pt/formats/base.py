# SPDX-License-Identifier: Apache-2.0
"""What a page-table format says of itself: levels, index bits, masks and encodings, all as data.

Vocabulary of the kernel's generic_pt: level 0 holds the smallest leaves, the top level is the root; an *item*
is one slot of a table, an *entry* may be several items (contiguous); ``_lg2`` are log2 sizes in bytes.

The word columns below (``SHIFT`` ... ) are one row per level. They are all that a walker needs, in the engine
as in the software IOMMU, so that both serve every format by the same code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class LevelSpec:
    """One level of a format in one configuration. All masks are over one item, after ``^ invert``.

    :param shift: lowest IOVA bit that indexes this level = log2 of the bytes that one item maps.
    :param index_bits: IOVA bits that index this level; items in a table = 2**index_bits.
    :param leaf: items of this level may be leaves. :param table: items of this level may point to a table.
    :param valid_mask: the item is present where ``(item & valid_mask) != 0``.
    :param leaf_mask: with ``leaf_value``: a present item that may be both is a leaf where
        ``(item & leaf_mask) == leaf_value``.
    :param table_pa_mask: bits of the next table's pa. :param leaf_pa_mask: bits of the OA.
    :param r_mask: a leaf grants reads where ``(item & r_mask) == r_value``; likewise ``w_*`` writes.
    :param tr_mask: a table item lets reads through where ``(item & tr_mask) == tr_value``; likewise ``tw_*``.
        (0, 0 = always.)
    :param leaf_reserved: bits that must be zero in a leaf. :param table_reserved: likewise in a table item.
    :param leaf_ignored: bits that hardware ignores in a leaf or writes itself (accessed, dirty), and that are
    no
        part of equality. :param table_ignored: likewise in a table item.
    :param leaf_base: bits that the kernel sets in every leaf of this level, besides OA and permissions.
    :param table_base: bits that the kernel sets in every table item.
    :param prot_bits: bits that a leaf adds for prot 0 ... 3 (PROT_R | PROT_W). Where the format cannot say
        write-only, [PROT_W] equals [PROT_R | PROT_W].
    :param leaf_attrs: memory attributes and features of a leaf: neither translation nor permission, but part
    of
        equality; ``(item & leaf_attrs)`` must equal ``leaf_attrs_value``. :param table_attrs: likewise in a
        table item, where all must be zero.

    In a leaf, every bit belongs to exactly one of: valid/permission, leaf_mask, leaf_pa_mask, leaf_attrs,
    leaf_ignored, leaf_reserved; likewise in a table item. A test holds every format to that.
    """

    shift: int
    index_bits: int
    leaf: bool
    table: bool
    valid_mask: int
    leaf_mask: int
    leaf_value: int
    table_pa_mask: int
    leaf_pa_mask: int
    r_mask: int
    r_value: int
    w_mask: int
    w_value: int
    tr_mask: int
    tr_value: int
    tw_mask: int
    tw_value: int
    leaf_reserved: int
    table_reserved: int
    leaf_ignored: int
    table_ignored: int
    leaf_base: int
    table_base: int
    prot_bits: tuple[int, int, int, int]
    leaf_attrs: int = 0
    leaf_attrs_value: int = 0
    table_attrs: int = 0

    @property
    def items(self) -> int:
        """Items in a table of this level."""
        return 1 << self.index_bits


#: columns of :meth:`Format.words`, uint64[n_levels, len(COLUMNS)]
COLUMNS = (
    "shift", "index_mask", "valid_mask", "leaf_mask", "leaf_value", "table_pa_mask", "leaf_pa_mask",
    "r_mask", "r_value", "w_mask", "w_value", "tr_mask", "tr_value", "tw_mask", "tw_value",
    "leaf_reserved", "table_reserved", "may_leaf", "may_table",
)  # fmt: skip
(
    SHIFT, INDEX_MASK, VALID_MASK, LEAF_MASK, LEAF_VALUE, TABLE_PA_MASK, LEAF_PA_MASK,
    R_MASK, R_VALUE, W_MASK, W_VALUE, TR_MASK, TR_VALUE, TW_MASK, TW_VALUE,
    LEAF_RESERVED, TABLE_RESERVED, MAY_LEAF, MAY_TABLE,
) = range(len(COLUMNS))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Format:
    """A format in one configuration.

    :param name: "vtdss", "x86_64", ... as in meta.json.
    :param config: the configuration it was opened with, complete (defaults filled in).
    :param spec: the specification, with revision, that the masks come from.
    :param levels: one :class:`LevelSpec` per level, index 0 = smallest leaves, last = the root.
    :param item_bytes: bytes of one item (8, 4). :param byte_order: "<" or ">".
    :param table_bytes: bytes that one table below the root occupies (4096 for most).
    :param root_bytes: bytes of the root table; the root is ``root_align`` aligned.
    :param sign_extend: the IOVA's bits above the input size equal its top input bit.
    :param write_only: the format can say write-only; where not, "-w" becomes "rw".
    :param invert: xor-ed onto every item before any mask is used.
    :param occupied_mask: Linux's page-table code takes an item for empty where ``(item & occupied_mask) ==
    0``. That
        is not always what hardware takes for absent (``valid_mask``): ``iommu_iova_to_phys`` and the
        -EADDRINUSE of
        ``iommu_map`` follow this one.
    """

    name: str
    config: Mapping[str, int | str]
    spec: str
    levels: tuple[LevelSpec, ...] = field(repr=False)
    item_bytes: int = 8
    byte_order: str = "<"
    table_bytes: int = 4096
    root_bytes: int = 4096
    root_align: int = 4096
    sign_extend: bool = False
    write_only: bool = True
    invert: int = 0
    occupied_mask: int = 2**64 - 1
    features: Mapping[str, bool] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def top_level(self) -> int:
        """Level of the root table."""
        return len(self.levels) - 1

    @property
    def input_lg2(self) -> int:
        """Number of IOVA bits that the table translates."""
        top = self.levels[-1]
        return top.shift + top.index_bits

    @property
    def leaf_lg2s(self) -> tuple[int, ...]:
        """Log2 of every leaf size in bytes, smallest first."""
        return tuple(level.shift for level in self.levels if level.leaf)

    @property
    def item_dtype(self) -> np.dtype[np.unsignedinteger]:
        """How one item lies in memory."""
        return np.dtype(f"{self.byte_order}u{self.item_bytes}")

    def covers(self, iova: int) -> bool:
        """True where the table can translate this IOVA; with sign extension the upper half counts."""
        if self.sign_extend:
            high = iova >> (self.input_lg2 - 1)
            return high in (0, (1 << (65 - self.input_lg2)) - 1)
        return iova >> self.input_lg2 == 0

    def covers_array(self, iovas: U64) -> NDArray[np.bool_]:
        """:meth:`covers` of whole arrays."""
        if self.sign_extend:
            high: U64 = iovas >> np.uint64(self.input_lg2 - 1)
            ok: NDArray[np.bool_] = (high == np.uint64(0)) | (
                high == np.uint64((1 << (65 - self.input_lg2)) - 1)
            )
            return ok
        if self.input_lg2 == 64:
            return np.ones(iovas.shape, np.bool_)
        low: NDArray[np.bool_] = (iovas >> np.uint64(self.input_lg2)) == np.uint64(0)
        return low

    def extend(self, raw: U64) -> U64:
        """IOVAs from their input bits: sign-extended where the format does so."""
        if not self.sign_extend:
            return raw
        top = np.uint64(1 << (self.input_lg2 - 1))
        return (raw ^ top) - top

    def leaf_items(self, level: int, pa: U64, prot: NDArray[np.uint8]) -> U64:
        """Leaf items as the kernel writes them, before byte order, after ``invert``.

        :param pa: OAs, uint64[n], multiples of the leaf size within ``leaf_pa_mask``.
        :param prot: uint8[n] of 1 ... 3.
        """
        spec = self.levels[level]
        perms = np.array(spec.prot_bits, np.uint64) | np.uint64(spec.leaf_base)
        return (pa | perms[prot]) ^ np.uint64(self.invert)

    def table_items(self, level: int, pa: U64) -> U64:
        """Items of this level that point to the tables at ``pa``, as the kernel writes them."""
        return (pa | np.uint64(self.levels[level].table_base)) ^ np.uint64(self.invert)

    def words(self) -> U64:
        """The masks as uint64[n_levels, len(COLUMNS)], row = level, for array code and compiled walkers."""
        out = np.zeros((len(self.levels), len(COLUMNS)), np.uint64)
        for number, level in enumerate(self.levels):
            for column, name in enumerate(COLUMNS):
                if name == "index_mask":
                    value = (1 << level.index_bits) - 1
                elif name in ("may_leaf", "may_table"):
                    value = int(getattr(level, name[4:]))
                else:
                    value = getattr(level, name)
                out[number, column] = value
        return out
