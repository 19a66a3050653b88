# SPDX-License-Identifier: Apache-2.0
"""A keyed digest of what a table translates: the same from a table, in any cut into leaves, and from extents.

**Definition** (``iokeep-digest-v1``). Key: 16 bytes, fresh and random for every use. All arithmetic is on
unsigned 64-bit integers, modulo 2**64. ``stream = blake2b(counter_le64, key=key, person=b"iokeep-digest-v1",
digest_size=64)`` for counter 0, 1, 2 ..., read as little-endian 64-bit words gives, in this order, K[512],
L[512], s, t.

The IOVA space is cut into blocks of 2 MiB, number v = iova >> 21. A page of 4096 bytes at slot i = (iova >>
12) & 511 of its block, which translates to pa with prot (IOMMU_READ 1 | IOMMU_WRITE 2, never 0), has with n =
pa >> 12 two words::

    a = 4 * n + prot                      b = 4 * ((n mod 2**20) * 2**20 + n div 2**20) + prot

A block with at least one mapped page has x = sum of K[i] * a and y = sum of L[i] * b over its mapped pages,
and adds ``mix(x ^ mix(v ^ s))`` to X and ``mix(y ^ mix(v ^ t))`` to Y; mix is the finaliser of splitmix64.
The digest is ``blake2b(X_le64 || Y_le64 || pages_le64, key=key, person=b"iokeep-digest-v1", digest_size=32)``
where pages is the number of mapped pages.

**Why so.** x and y are linear, so a run of consecutive pages costs O(1) (prefix sums of K, i*K): a 2 MiB leaf
needs no look at 512 pages. A multilinear sum misses a difference d with probability 2**(trailing zeros of d -
64); a and b hold the frame number's halves in opposite order, so that together one changed page is missed
with at most 2**-64, whatever bit differs. The mixing binds a block to its place. It is a check against
accidents and stale state with a fresh key; it is not a MAC against someone who knows the key.
"""

from __future__ import annotations

import hashlib

import numpy as np

from iokeep.errors import InputError
from iokeep.mem.memory import I64, Memory
from iokeep.pt.extents import U8, U64, Extents
from iokeep.pt.formats.base import Format
from iokeep.pt.leaves import Leaves
from iokeep.pt.tables import Items, TableMemory, descend, expand, raise_unreadable

KEY_BYTES = 16
DIGEST_BYTES = 32
_MASK = 2**64 - 1
_PERSON = b"iokeep-digest-v1"
_SLOTS = 512
#: frames of a run are consecutive in both words only within 2**20 frames
_FOLD = 20
_BLOCK_LG2 = 21
_BATCH = 1 << 16
#: more blocks than these (512 TiB) are no real mapping, and would take minutes
_BLOCK_LIMIT = 1 << 28


def _u(value: int) -> np.uint64:
    return np.uint64(value)


def _mix(z: U64) -> U64:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64 bits."""
    z = (z ^ (z >> _u(30))) * _u(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> _u(27))) * _u(0x94D049BB133111EB)
    return z ^ (z >> _u(31))


class _Keys:
    """Everything derived from a key; prefix sums have 513 places: sum over slots below i."""

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a digest key has {KEY_BYTES} bytes, not {len(key)}")
        self.key = key
        need = (2 * _SLOTS + 2 + 7) // 8
        stream = b"".join(
            hashlib.blake2b(n.to_bytes(8, "little"), key=key, person=_PERSON, digest_size=64).digest()
            for n in range(need)
        )
        words = np.frombuffer(stream, "<u8").astype(np.uint64)
        self.k, self.l = words[:_SLOTS], words[_SLOTS : 2 * _SLOTS]
        self.s, self.t = words[2 * _SLOTS], words[2 * _SLOTS + 1]
        slot = np.arange(_SLOTS, dtype=np.uint64)
        zero = np.zeros(1, np.uint64)
        self.sum_k = np.concatenate((zero, np.cumsum(self.k, dtype=np.uint64)))
        self.sum_l = np.concatenate((zero, np.cumsum(self.l, dtype=np.uint64)))
        self.sum_ik = np.concatenate((zero, np.cumsum(self.k * slot, dtype=np.uint64)))
        self.sum_il = np.concatenate((zero, np.cumsum(self.l * slot, dtype=np.uint64)))


def _fold(n: U64) -> U64:
    return ((n & _u((1 << _FOLD) - 1)) << _u(_FOLD)) | (n >> _u(_FOLD))


class Digest:
    """A digest in the making: blocks may come in any order, but each block's pages all at once.

    :param key: 16 random bytes.
    """

    def __init__(self, key: bytes) -> None:
        self._keys = _Keys(key)
        self._x = 0
        self._y = 0
        self._pages = 0
        #: the last block of a batch: the next one may go on with it
        self._open: tuple[int, int, int] | None = None

    def _blocks(self, v: U64, x: U64, y: U64) -> None:
        keys = self._keys
        self._x += int(np.add.reduce(_mix(x ^ _mix(v ^ keys.s)), dtype=np.uint64))
        self._y += int(np.add.reduce(_mix(y ^ _mix(v ^ keys.t)), dtype=np.uint64))

    def add_runs(self, iova: U64, last: U64, pa: U64, prot: U8) -> None:
        """Runs, sorted and disjoint, that hold all mapped pages of every block they touch."""
        if not len(iova):
            return
        page = _u(12)
        if bool(((iova | pa | (last + _u(1))) & _u(4095)).any()):
            raise ValueError("a run is not a multiple of 4096 bytes")
        if bool(((prot == 0) | (prot > 3)).any()):
            raise ValueError("a run has no permission")
        first, end = iova >> page, last >> page  # in pages
        for lo in range(0, len(iova), _BATCH):
            part = slice(lo, lo + _BATCH)
            self._pages += int((end[part] - first[part]).sum()) + len(first[part])
        frame = pa >> page
        count = ((end >> _u(9)) - (first >> _u(9))) + _u(1)  # blocks that each run touches
        if bool((count > _BLOCK_LIMIT).any()) or int(count.sum()) > _BLOCK_LIMIT:
            raise InputError(
                f"more than {_BLOCK_LIMIT >> 19} TiB are mapped: this is no mapping of a machine"
            )
        ends = np.cumsum(count).astype(np.int64)
        total = int(ends[-1])
        for lo in range(0, total, _BATCH):
            nth = np.arange(lo, min(lo + _BATCH, total))
            at = np.searchsorted(ends, nth, side="right")
            v = (first[at] >> _u(9)) + (nth - ends[at]).astype(np.uint64) + count[at]
            begin = np.maximum(first[at], v << _u(9))
            stop = np.minimum(end[at], (v << _u(9)) + _u(511))
            self._pieces(begin, stop - begin + _u(1), frame[at] + (begin - first[at]), prot[at])
        if self._open is not None:
            v1, x1, y1 = (np.array([n], np.uint64) for n in self._open)
            self._open = None
            self._blocks(v1, x1, y1)

    def _pieces(self, begin: U64, length: U64, n: U64, prot: U8) -> None:
        """Pieces within one block each, sorted."""
        wrap = (_u(1 << _FOLD) - (n & _u((1 << _FOLD) - 1))) < length
        if wrap.any():
            head = _u(1 << _FOLD) - (n[wrap] & _u((1 << _FOLD) - 1))
            begin = np.concatenate((begin, begin[wrap] + head))
            n, prot = np.concatenate((n, n[wrap] + head)), np.concatenate((prot, prot[wrap]))
            length = np.concatenate((length, length[wrap] - head))
            length[np.flatnonzero(wrap)] = head
            order = np.argsort(begin, kind="stable")
            begin, length, n, prot = begin[order], length[order], n[order], prot[order]
        keys, four = self._keys, _u(4)
        i = (begin & _u(511)).astype(np.int64)
        j = i + length.astype(np.int64)
        a = four * n + prot
        b = four * _fold(n) + prot
        slot = i.astype(np.uint64)
        # sum of K[i+m] * (a + 4 m) = (a - 4 i) * sum K + 4 * sum of slot * K; b steps by 4 * 2**20
        step = _u(4 << _FOLD)
        dk, dl = keys.sum_k[j] - keys.sum_k[i], keys.sum_l[j] - keys.sum_l[i]
        x = (a - four * slot) * dk + four * (keys.sum_ik[j] - keys.sum_ik[i])
        y = (b - step * slot) * dl + step * (keys.sum_il[j] - keys.sum_il[i])
        v = begin >> _u(9)
        first = np.flatnonzero(np.concatenate((np.ones(1, np.bool_), v[1:] != v[:-1])))
        v, x, y = v[first], np.add.reduceat(x, first), np.add.reduceat(y, first)
        if self._open is not None:
            if self._open[0] == int(v[0]):
                x[:1] += _u(self._open[1])
                y[:1] += _u(self._open[2])
            else:
                v1, x1, y1 = (np.array([n], np.uint64) for n in self._open)
                self._blocks(v1, x1, y1)
        self._open = (int(v[-1]), int(x[-1]), int(y[-1]))
        self._blocks(v[:-1], x[:-1], y[:-1])

    def add_tables(self, base: U64, a: U64, b: U64, pages: int) -> None:
        """Whole blocks: words [n, 512], 0 where nothing is mapped. :param base: IOVA of each block."""
        some = a.any(axis=1)
        keys = self._keys
        x, y = a @ keys.k, b @ keys.l
        self._blocks(base[some] >> _u(_BLOCK_LG2), x[some], y[some])
        self._pages += pages

    def digest(self) -> bytes:
        """The 32 bytes."""
        data = b"".join((n & _MASK).to_bytes(8, "little") for n in (self._x, self._y, self._pages))
        return hashlib.blake2b(data, key=self._keys.key, person=_PERSON, digest_size=DIGEST_BYTES).digest()


def digest_extents(extents: Extents, key: bytes) -> bytes:
    """The digest of what extents translate.

    :param extents: sorted, disjoint, in any cut; multiples of 4096 bytes. Where a format has no write-only
        the caller passes "rw" for "-w" (``diff.normalised``).
    :raises ValueError: not multiples of 4096 bytes, or a prot of nothing.
    """
    out = Digest(key)
    out.add_runs(extents.iova, extents.last, extents.pa, extents.prot)
    return out.digest()


def digest(fmt: Format, mem: Memory, root_pa: int, key: bytes) -> bytes:
    """The digest of what a table translates. Bad leaves (reserved bits) do not translate and do not count.

    :raises MemoryAbsent, InputError: a table is absent or in a loop.
    """
    tm = TableMemory(fmt, mem)
    upper = descend(tm, root_pa)
    raise_unreadable(fmt, upper.problems)
    out = Digest(key)
    spec = fmt.levels[0]
    if (spec.shift, spec.index_bits) != (12, 9) or not fmt.in_words:
        return _digest_leaves(tm, root_pa, key)
    large = Leaves.of(fmt, upper.leaves)
    alive = large.prot != 0
    out.add_runs(large.iova[alive], large.last[alive], large.pa[alive], large.prot[alive])
    base = fmt.extend(upper.base)
    step = 64
    for lo in range(0, len(base), step):
        part = slice(lo, lo + step)
        a, b, pages = _words(tm, upper.row[part], upper.prot[part])
        out.add_tables(base[part], a, b, pages)
    return out.digest()


def _words(tm: TableMemory, row: I64, prot: U8) -> tuple[U64, U64, int]:
    """Both words of every item of tables of level 0, 0 where nothing translates, and the number of those that
    do.
    """
    spec = tm.fmt.levels[0]
    items = tm.items(row)
    r = (items & _u(spec.r_mask)) == _u(spec.r_value)
    w = (items & _u(spec.w_mask)) == _u(spec.w_value)
    grants = (r.view(np.uint8) | (w.view(np.uint8) << np.uint8(1))) & prot[:, None]
    grants[((items & _u(spec.valid_mask)) == 0) | ((items & _u(spec.leaf_reserved)) != 0)] = 0
    n = (items & _u(spec.leaf_pa_mask)) >> _u(12)
    dead = grants == 0
    a = (n << _u(2)) | grants
    b = (_fold(n) << _u(2)) | grants
    pages = grants.size
    if dead.any():
        a[dead] = 0
        b[dead] = 0
        pages -= int(dead.sum())
    return a, b, pages


def _digest_leaves(tm: TableMemory, root_pa: int, key: bytes) -> bytes:
    """For formats whose tables of level 0 are not the digest's blocks."""
    upper = descend(tm, root_pa)
    parts = [upper.leaves, *(items for items, _ in expand(tm, upper.base, upper.pa, upper.row, upper.prot))]
    return digest_extents(Leaves.of(tm.fmt, Items.join(parts, sort=True)).extents(), key)
