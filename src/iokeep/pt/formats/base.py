# SPDX-License-Identifier: Apache-2.0
"""What a page-table format says of itself: levels, index bits, masks and encodings, all as data.

Vocabulary of the kernel's generic_pt: level 0 holds the smallest leaves, the top level is the root; an *item*
is one slot of a table, an *entry* may be several items (contiguous); ``_lg2`` are log2 sizes in bytes.

How a format states itself (what it does not state costs nothing: each level's code is chosen by its data):

* **Geometry.** A table of a level has ``2**index_bits`` items of ``item_bytes``, so that tables may differ
  in size by level, be smaller than a page of memory (s390, Armv7s) or larger. The top level's ``index_bits``
  make the root: 2 items or 8192, at a pa that is a multiple of its own size (``root_align``). Other bytes of
  its page are other memory. Tables that may begin at less than their size say so by ``table_align``.
* **Bytes.** ``byte_order``; ``LevelSpec.invert`` is xor-ed onto each item before any mask is used, so that
  a level whose empty item is not 0 (s390: the invalid bit is set) reads like every other: empty is 0.
* **Present.** ``(item & valid_mask) != 0``; where values decide (Arm: bits 1:0), ``valid_values`` as well.
* **Leaf or table.** ``leaf``/``table`` where a level has only one; else ``(item & leaf_mask) ==
  leaf_value``, or any pair of ``leaf_values`` (RISC-V: R, W or X; AMD: next level 0 or 7).
  ``next_levels`` where a table item itself says how far down it leads (AMD); the IOVA bits skipped are zero.
* **Addresses.** ``(item & *_pa_mask) << pa_shift``, and ``(item & mask) << shift`` for each of ``pa_pieces``
  (Arm 64K/52: ``(0xf000, 36)``; RISC-V: ``pa_shift`` 2).
* **Contiguous entries.** ``contig``: see :class:`Contig`. ``contig_select`` marks items that claim to be part
  of one: where no :class:`Contig` matches, the claim is reserved.
* **Permissions by value.** ``w_values`` where more than one coding lets writes pass (Arm: hardware's dirty
  state, "writable-clean" and "writable-dirty").
* **Wrong by value.** ``leaf_bad``, ``table_bad``: pairs that hardware has reserved (RISC-V: W without R).
* **IOVAs.** ``sign_extend``, or ``iova_base``: the constant upper bits (Arm TTBR1: all ones).
* **Memory attributes.** ``memory``: named fields of leaves that are part of equality; ``terms`` of the format
  say which values of them are IOMMU_CACHE, IOMMU_NOEXEC, IOMMU_MMIO and IOMMU_PRIV in the kernel's words.
* **Linux's view.** ``occupied_mask`` (of the format, or of one level); ``build_lg2s``: sizes that Linux
  makes, where it does not make all that hardware has.

The word columns below (``SHIFT`` ... ) are one row per level. They are all that a walker needs where
:attr:`Format.in_words` holds, in the engine as in the software IOMMU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
#: "any of": (mask, value) where ``(item & mask) == value``; or (mask, shift) of :attr:`LevelSpec.pa_pieces`
Pairs = tuple[tuple[int, int], ...]
#: (name, mask) of fields of an item, each of neighbouring bits
Bits = tuple[tuple[str, int], ...]
#: IOMMU_CACHE, IOMMU_NOEXEC, IOMMU_MMIO, IOMMU_PRIV (include/linux/iommu.h) and their names here
CACHE, NOEXEC, MMIO, PRIV = 1 << 2, 1 << 3, 1 << 4, 1 << 5
TERMS = {"cache": CACHE, "noexec": NOEXEC, "mmio": MMIO, "priv": PRIV}


def any_of(items: U64, pairs: Pairs) -> NDArray[np.bool_]:
    """Where ``(item & mask) == value`` for any of the pairs."""
    found = np.zeros(items.shape, np.bool_)
    for mask, value in pairs:
        found |= (items & np.uint64(mask)) == np.uint64(value)
    return found


@dataclass(frozen=True, slots=True)
class Contig:
    """Contiguous entries of one size: ``2**lg2`` neighbouring items, aligned, that are one leaf.

    :param mask: with ``value``: an item where ``(item & mask) == value`` is part of one.
    :param lg2: log2 of the number of items; 0 = one item that is coded the same way.
    :param replicated: all items are equal, and OA bits below the whole size come from the IOVA, as hardware
        takes them (AMD, Svnapot, Armv7s). False: a hint, each item has its own OA (Arm).
    :param reserved: :param attrs: :param attrs_value: instead of the level's ``leaf_*``; None = the level's
        (``leaf_reserved`` without the bits of ``mask``). :param base: instead of ``leaf_base``.

    Translation is per item, as hardware does it. Items of a run that do not agree are an inconsistency.
    """

    mask: int
    value: int
    lg2: int
    replicated: bool = True
    reserved: int | None = None
    attrs: int | None = None
    attrs_value: int | None = None
    base: int | None = None
    #: :attr:`LevelSpec.memory` and :attr:`LevelSpec.named`, where they lie elsewhere in its items
    memory: Bits | None = None
    named: Bits | None = None


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
    :param w_values: where not empty, a leaf grants writes where it matches any of these pairs, and ``w_mask``
        is all their bits. The first is what software writes; no other differs from it but in ``w_mask``.
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
        table item, with ``table_attrs_value``.

    :param valid_values: where not empty, a present item also matches one of them.
    :param leaf_values: where not empty, they decide instead of ``leaf_mask`` and ``leaf_value``;
        ``leaf_mask`` is then all their bits.
    :param leaf_bad: a leaf that matches one of them is reserved. :param table_bad: likewise a table item.
    :param pa_shift: pa = masked item << ``pa_shift``. :param pa_pieces: (mask, shift): bits of the pa that
        are not in their place: ``(item & mask) << shift``.
    :param next_levels: (mask, value, level): a table item leads to the level of the first that matches; one
        that matches none is reserved. Empty = always one level down.
    :param contig: contiguous entries of this level. :param contig_select: (mask, value): an item that
        matches and that no ``contig`` matches is reserved.
    :param memory: memory attributes of a leaf, as (name, mask): part of equality wherever attributes are
        compared, also where any value is allowed (those are among ``leaf_ignored``).
    :param named: what else may be in a leaf besides type, permissions and OA. :param table_named: likewise in
        a table item. Bits that have no name are unknown to the format gate.
    :param keep_bit: nT, the bit of a leaf that keeps it out of caches that could conflict; 0 = there is none.
    :param invert: xor-ed onto every item of this level before any mask is used; no bits of a pa.
    :param occupied_mask: instead of the format's. :param build_lg2s: log2 sizes that Linux makes at this
        level; None = all.

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
    table_attrs_value: int = 0
    valid_values: Pairs = ()
    leaf_values: Pairs = ()
    leaf_bad: Pairs = ()
    table_bad: Pairs = ()
    pa_shift: int = 0
    pa_pieces: Pairs = ()
    next_levels: tuple[tuple[int, int, int], ...] = ()
    contig: tuple[Contig, ...] = ()
    contig_select: tuple[int, int] | None = None
    w_values: Pairs = ()
    invert: int = 0
    occupied_mask: int | None = None
    build_lg2s: tuple[int, ...] | None = None
    memory: Bits = ()
    named: Bits = ()
    table_named: Bits = ()
    keep_bit: int = 0

    @property
    def items(self) -> int:
        """Items in a table of this level."""
        return 1 << self.index_bits

    @property
    def lg2s(self) -> tuple[int, ...]:
        """Log2 of the leaf sizes that Linux makes at this level, smallest first."""
        if not self.leaf:
            return ()
        if self.build_lg2s is not None:
            return self.build_lg2s
        return tuple(sorted({self.shift, *(self.shift + c.lg2 for c in self.contig)}))

    # -- one item --------------------------------------------------------------------------------------

    def is_present(self, item: int) -> bool:
        """Hardware takes the item for present."""
        return bool(item & self.valid_mask) and (
            not self.valid_values or any(item & m == v for m, v in self.valid_values)
        )

    def is_leaf(self, item: int) -> bool:
        """A present item is a leaf."""
        if not (self.leaf and self.table):
            return self.leaf
        if self.leaf_values:
            return any(item & m == v for m, v in self.leaf_values)
        return item & self.leaf_mask == self.leaf_value

    def contig_of(self, item: int) -> Contig | None:
        """The contiguous entry that a leaf says it is part of."""
        return next((c for c in self.contig if item & c.mask == c.value), None)

    def leaf_prot(self, item: int) -> int:
        """What a leaf grants by itself, PROT_R | PROT_W."""
        write = item & self.w_mask == self.w_value
        if self.w_values:
            write = any(item & m == v for m, v in self.w_values)
        return int(item & self.r_mask == self.r_value) | int(write) << 1

    def bad_leaf(self, item: int) -> int | None:
        """Bits of a leaf that make it reserved, None = it is sound."""
        reserved, run = self.leaf_reserved, None
        if self.contig:
            run = self.contig_of(item)
            if run is not None:
                reserved = reserved & ~run.mask if run.reserved is None else run.reserved
            elif self.contig_select is not None and item & self.contig_select[0] == self.contig_select[1]:
                return item & (self.contig_select[0] | self.leaf_pa_mask)
        if item & reserved:
            return item & reserved
        return next((mask for mask, value in self.leaf_bad if item & mask == value), None)

    def bad_table(self, item: int) -> int | None:
        """Bits of a table item that make it reserved, None = it is sound."""
        if item & self.table_reserved:
            return item & self.table_reserved
        bad = next((mask for mask, value in self.table_bad if item & mask == value), None)
        if bad is None and self.next_levels and all(item & m != v for m, v, _ in self.next_levels):
            return self.next_levels[0][0]
        return bad

    def next_level(self, item: int, level: int) -> int:
        """The level that a sound table item of this level, which is number ``level``, leads to."""
        return next((n for m, v, n in self.next_levels if item & m == v), level - 1)

    def table_pa(self, item: int) -> int:
        """Pa of the table that an item points to."""
        return self._pa(item, self.table_pa_mask)

    def leaf_pa(self, item: int) -> int:
        """OA as it stands in a leaf; a replicated contiguous entry has its size in the low bits."""
        return self._pa(item, self.leaf_pa_mask)

    def _pa(self, item: int, mask: int) -> int:
        pa = (item & mask) << self.pa_shift
        for piece, shift in self.pa_pieces:
            pa |= (item & piece) << shift
        return pa

    def pa_word(self, pa: int, *, leaf: bool = True) -> int:
        """The bits of an item that say ``pa``."""
        word = (pa >> self.pa_shift) & (self.leaf_pa_mask if leaf else self.table_pa_mask)
        for piece, shift in self.pa_pieces:
            word |= (pa >> shift) & piece
        return word

    # -- arrays of items -------------------------------------------------------------------------------

    def are_leaves(self, items: U64) -> NDArray[np.bool_]:
        """:meth:`is_leaf` of whole arrays."""
        if not (self.leaf and self.table):
            return np.full(len(items), self.leaf)
        if self.leaf_values:
            return any_of(items, self.leaf_values)
        leaf: NDArray[np.bool_] = (items & np.uint64(self.leaf_mask)) == np.uint64(self.leaf_value)
        return leaf

    def leaf_prots(self, items: U64) -> NDArray[np.uint8]:
        """:meth:`leaf_prot` of whole arrays."""
        r: NDArray[np.bool_] = (items & np.uint64(self.r_mask)) == np.uint64(self.r_value)
        if self.w_values:
            w = any_of(items, self.w_values)
        else:
            w = (items & np.uint64(self.w_mask)) == np.uint64(self.w_value)
        prot: NDArray[np.uint8] = r.view(np.uint8) | (w.view(np.uint8) << np.uint8(1))
        return prot

    def one_writable(self, items: U64) -> U64:
        """Leaves with every coding of "may be written" turned into the first of ``w_values``."""
        if not self.w_values:
            return items
        rest, first = np.uint64(~self.w_mask & (2**64 - 1)), np.uint64(self.w_values[0][1])
        return np.where(any_of(items, self.w_values), (items & rest) | first, items).astype(np.uint64)

    def table_pas(self, items: U64) -> U64:
        """:meth:`table_pa` of whole arrays."""
        return self._pas(items, self.table_pa_mask)

    def leaf_pas(self, items: U64) -> U64:
        """:meth:`leaf_pa` of whole arrays."""
        return self._pas(items, self.leaf_pa_mask)

    def _pas(self, items: U64, mask: int) -> U64:
        pa: U64 = items & np.uint64(mask)
        if self.pa_shift:
            pa <<= np.uint64(self.pa_shift)
        for piece, shift in self.pa_pieces:
            pa |= (items & np.uint64(piece)) << np.uint64(shift)
        return pa

    def pa_words(self, pas: U64, *, leaf: bool = True) -> U64:
        """:meth:`pa_word` of whole arrays; pas that the item can say."""
        if not self.pa_shift and not self.pa_pieces:
            return pas
        words: U64 = (pas >> np.uint64(self.pa_shift)) & np.uint64(
            self.leaf_pa_mask if leaf else self.table_pa_mask
        )
        for piece, shift in self.pa_pieces:
            words |= (pas >> np.uint64(shift)) & np.uint64(piece)
        return words


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
    :param table_bytes: bytes of a table below the root, as they are allocated, where all have one size; else
        the commonest (see :meth:`bytes_of`).
    :param table_align: a table begins at a multiple of this, where that is less than its size.
    :param sign_extend: the IOVA's bits above the input size equal its top input bit.
    :param write_only: the format can say write-only; where not, "-w" becomes "rw".
    :param iova_base: the IOVA's bits above the input size are these (0, or all ones for TTBR1).
    :param occupied_mask: Linux's page-table code takes an item for empty where ``(item & occupied_mask) ==
    0``. That
        is not always what hardware takes for absent (``valid_mask``): ``iommu_iova_to_phys`` and the
        -EADDRINUSE of
        ``iommu_map`` follow this one.
    :param outranks: (field, values): in two-stage translation a leaf decides the memory type (IOMMU_CACHE,
        IOMMU_MMIO) alone unless this field has one of the values, which leave it to the other stage. None:
        the weaker type of both stages holds.
    :param terms: (flag, field, values): a leaf has the IOMMU_* flag where the field of ``memory`` has one of
        the values. What is not here the format cannot say.
    """

    name: str
    config: Mapping[str, int | str]
    spec: str
    levels: tuple[LevelSpec, ...] = field(repr=False)
    item_bytes: int = 8
    byte_order: str = "<"
    table_bytes: int = 4096
    table_align: int = 1 << 30
    sign_extend: bool = False
    iova_base: int = 0
    write_only: bool = True
    occupied_mask: int = 2**64 - 1
    features: Mapping[str, bool] = field(default_factory=lambda: MappingProxyType({}))
    terms: tuple[tuple[int, str, tuple[int, ...]], ...] = ()
    outranks: tuple[str, tuple[int, ...]] | None = None

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
        """Log2 of every leaf size in bytes that Linux makes, smallest first."""
        return tuple(lg2 for level in self.levels for lg2 in level.lg2s)

    def bytes_of(self, level: int) -> int:
        """Bytes of a table of this level: its items, and nothing else of its page."""
        return self.item_bytes << self.levels[level].index_bits

    @property
    def root_bytes(self) -> int:
        """Bytes of the root table."""
        return self.bytes_of(self.top_level)

    @property
    def root_align(self) -> int:
        """The root's pa is a multiple of this."""
        return min(self.root_bytes, self.table_align)

    @property
    def invert(self) -> int:
        """Bits that are inverted at any level."""
        out = 0
        for level in self.levels:
            out |= level.invert
        return out

    def occupied(self, level: int) -> int:
        """``occupied_mask`` of this level."""
        mask = self.levels[level].occupied_mask
        return self.occupied_mask if mask is None else mask

    @property
    def in_words(self) -> bool:
        """True where :meth:`words` says all that a walker must know, for 64-bit little-endian items."""
        plain = self.item_bytes == 8 and self.byte_order == "<" and not self.iova_base
        return plain and not any(
            s.valid_values or s.leaf_values or s.leaf_bad or s.table_bad or s.pa_shift or s.pa_pieces
            or s.next_levels or s.contig or s.contig_select or s.w_values or s.invert
            for s in self.levels
        )  # fmt: skip

    @property
    def item_dtype(self) -> np.dtype[np.unsignedinteger]:
        """How one item lies in memory."""
        return np.dtype(f"{self.byte_order}u{self.item_bytes}")

    def covers(self, iova: int) -> bool:
        """True where the table can translate this IOVA; with sign extension the upper half counts."""
        if self.sign_extend:
            high = iova >> (self.input_lg2 - 1)
            return high in (0, (1 << (65 - self.input_lg2)) - 1)
        return iova >> self.input_lg2 == self.iova_base >> self.input_lg2

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
        high_bits = np.uint64(self.iova_base >> self.input_lg2)
        low: NDArray[np.bool_] = (iovas >> np.uint64(self.input_lg2)) == high_bits
        return low

    def extend(self, raw: U64) -> U64:
        """IOVAs from their input bits: sign-extended, or above ``iova_base``, where the format does so."""
        if not self.sign_extend:
            return raw | np.uint64(self.iova_base) if self.iova_base else raw
        top = np.uint64(1 << (self.input_lg2 - 1))
        return (raw ^ top) - top

    def leaf_items(self, level: int, pa: U64, prot: NDArray[np.uint8], contig: Contig | None = None) -> U64:
        """Leaf items as the kernel writes them, before byte order, after ``invert``.

        :param pa: OAs, uint64[n], multiples of the leaf size within ``leaf_pa_mask``; of a replicated
            contiguous entry the OA of the whole. :param prot: uint8[n] of 1 ... 3. :param contig: items of
            this contiguous entry.
        """
        spec = self.levels[level]
        perms = np.array([self.leaf_bits(level, p, contig) for p in range(4)], np.uint64)
        return spec.pa_words(pa) | perms[prot]

    def leaf_bits(self, level: int, prot: int, contig: Contig | None = None) -> int:
        """All bits of a leaf but its OA, after ``invert``: or-ed to the OA's bits they are the item."""
        spec = self.levels[level]
        base = spec.leaf_base
        if contig is not None:
            base = contig.value | (base & ~contig.mask if contig.base is None else contig.base)
        return (spec.prot_bits[prot] | base) ^ spec.invert

    def table_items(self, level: int, pa: U64) -> U64:
        """Items of this level that point to the tables at ``pa``, as the kernel writes them."""
        spec = self.levels[level]
        return (spec.pa_words(pa, leaf=False) | np.uint64(spec.table_base)) ^ np.uint64(spec.invert)

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
