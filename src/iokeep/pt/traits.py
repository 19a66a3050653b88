# SPDX-License-Identifier: Apache-2.0
"""What leaves say beside what they translate to: memory attributes in named fields, and how they are cut.

What a format can say is data of its file (``LevelSpec.memory``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from iokeep.mem.memory import U8, U64
from iokeep.pt.formats.base import Bits, Format
from iokeep.pt.tables import Items

_ONE = np.uint64(1)
_MAX = np.uint64(2**64 - 1)


class Attributes:
    """The fields of a format, packed into one word: the same field in the same place at every level.

    :param fmt: the format. ``places``: name -> (shift, width) in the word.
    """

    def __init__(self, fmt: Format) -> None:
        self.fmt = fmt
        widths: dict[str, int] = {}
        for spec in fmt.levels:
            for fields in (spec.memory, *(c.memory or () for c in spec.contig)):
                for name, mask in fields:
                    widths[name] = max(widths.get(name, 0), mask.bit_count())
        self.places: dict[str, tuple[int, int]] = {}
        shift = 0
        for name, width in widths.items():
            self.places[name] = (shift, width)
            shift += width

    def _pack(self, items: U64, fields: Bits) -> tuple[U64, int]:
        word, said = np.zeros(len(items), np.uint64), 0
        for name, mask in fields:
            low, (shift, _) = (mask & -mask).bit_length() - 1, self.places[name]
            word |= ((items & np.uint64(mask)) >> np.uint64(low)) << np.uint64(shift)
            said |= (mask >> low) << shift
        return word, said

    def words(self, items: Items) -> tuple[U64, U64]:
        """The word of each leaf, and which of its bits the leaf states."""
        word, said = np.zeros(len(items), np.uint64), np.zeros(len(items), np.uint64)
        for level in np.unique(items.level).tolist():
            spec = self.fmt.levels[level]
            mine = items.level == level
            item = items.item[mine]
            packed, mask = self._pack(item, spec.memory)
            stated = np.full(len(item), mask, np.uint64)
            for contig in spec.contig:
                if contig.memory is not None:
                    part = (item & np.uint64(contig.mask)) == np.uint64(contig.value)
                    packed[part], mask = self._pack(item[part], contig.memory)
                    stated[part] = np.uint64(mask)
            word[mine], said[mine] = packed, stated
        return word, said


@dataclass(frozen=True, slots=True)
class Traits:
    """Maximal runs of leaves that are alike but for what they translate to; sorted, disjoint.

    ``iova``, ``last`` uint64[n] closed; ``lg2`` uint8[n] of the leaves' bytes, ``level`` uint8[n]; ``word``
    and ``said`` uint64[n] of :class:`Attributes`; ``alive`` uint8[n]: something may pass; ``keep`` uint8[n]:
    the bit nT is set.
    """

    iova: U64
    last: U64
    lg2: U8
    level: U8
    word: U64
    said: U64
    alive: U8
    keep: U8

    def __len__(self) -> int:
        return len(self.iova)

    @classmethod
    def join(cls, parts: list[Traits]) -> Traits:
        """One from disjoint parts in any order."""
        if not parts:
            z64, z8 = np.zeros(0, np.uint64), np.zeros(0, np.uint8)
            return cls(z64, z64, z8, z8, z64, z64, z8, z8)
        columns = [np.concatenate([getattr(p, c) for p in parts]) for c in cls.__slots__]
        if len(parts) > 1:
            order = np.argsort(columns[0], kind="stable")
            columns = [c[order] for c in columns]
        if len(columns[0]) < 2:
            return cls(*columns)
        iova, last = columns[:2]
        joins = (iova[1:] == last[:-1] + _ONE) & (last[:-1] != _MAX)
        for column in columns[2:]:
            joins &= column[1:] == column[:-1]
        first = np.flatnonzero(np.concatenate((np.ones(1, np.bool_), ~joins)))
        end = np.concatenate((first[1:] - 1, np.array([len(joins)])))
        return cls(iova[first], last[end], *(c[first] for c in columns[2:]))
