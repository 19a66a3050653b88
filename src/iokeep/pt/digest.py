# SPDX-License-Identifier: Apache-2.0
"""A keyed digest of what a table translates: the same from a table, in any cut into leaves, and from extents.

**Definition** (``iokeep-digest-v1``). Key: 16 bytes, fresh and random for every use. All arithmetic is on
unsigned 64-bit integers, modulo 2**64. The first 2050 words of ``shake_256(b"iokeep-digest-v1" || key)``,
each 8 bytes little-endian, are K[512], K'[512], L[512], L'[512], s, t; all but s and t have bit 0 set to 1.

A page of 4096 bytes at iova, which translates to pa with prot (IOMMU_READ 1 | IOMMU_WRITE 2, never 0), has
with n = pa >> 12 two words::

    a = 4 * n + prot                      b = 4 * ((n mod 2**20) * 2**20 + n div 2**20) + prot

and with i = (iova >> 12) & 511, j = (iova >> 21) & 511, g = iova >> 30 it adds::

    (mix(g ^ s) | 1) * K'[j] * K[i] * a   to X        (mix(g ^ t) | 1) * L'[j] * L[i] * b   to Y

mix is the finaliser of splitmix64. The digest is ``blake2b(X_le64 || Y_le64 || pages_le64, key=key,
person=b"iokeep-digest-v1", digest_size=32)`` where pages is the number of mapped pages, modulo 2**64.

**Why so.** X and Y are sums, so a map adds to them and an unmap subtracts (:meth:`Digest.add`,
:meth:`Digest.remove`), whatever else is mapped. Within 1 GiB of IOVAs a run of consecutive pages costs O(1)
(prefix sums of K and i*K, of K' and j*K'), so that a leaf of any size needs no look at its pages, and what a
set of areas must give costs O(areas). All factors are odd: one page that is missing, extra or changed is
always noticed, whatever bit differs. Where several differ, the sums agree by chance only: a multilinear sum
of degree 3 misses a difference whose lowest set bit is z with about 2**(z + 14 - 64), and a and b hold the
frame number's halves in opposite order, so that at most one of both has a large z. It is a check against
accidents and stale state with a fresh key; it is not a MAC against someone who knows the key.
"""

from __future__ import annotations

import hashlib

import numpy as np

from iokeep.errors import InputError
from iokeep.mem.memory import I64
from iokeep.pt.choice import loaded, worth_compiled
from iokeep.pt.extents import U8, U64, Extents

KEY_BYTES = 16
DIGEST_BYTES = 32
_PERSON = b"iokeep-digest-v1"
_SLOTS = 512
#: frames of a run are consecutive in both words only within 2**20 frames
_FOLD = 20
#: log2 of the pages of the largest block that one prefix sum covers
_BLOCK = 18
_BATCH = 1 << 14
#: more blocks of 1 GiB than these are no real mapping, and would take minutes
_BLOCK_LIMIT = 1 << 24
#: so many extents are worth the start of compiled code, and its loading where Numba has started already
_COMPILED_COLD, _COMPILED_NEAR = 1 << 22, 1 << 17


def _u(value: int) -> np.uint64:
    return np.uint64(value)


def _mix(z: U64) -> U64:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64 bits."""
    z = (z ^ (z >> _u(30))) * _u(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> _u(27))) * _u(0x94D049BB133111EB)
    return z ^ (z >> _u(31))


class _Lane:
    """Keys of one sum, for whole pages and tables."""

    def __init__(self, page: U64, table: U64, salt: np.uint64) -> None:
        self.page, self.table, self.salt = page, table, salt

    def block(self, g: U64) -> U64:
        """Factor of each block of 1 GiB."""
        return _mix(g ^ self.salt) | _u(1)

    def weights(self, v: U64) -> U64:
        """Factor of each block of 2 MiB, by its number."""
        g, low = v >> _u(9), int(v.min() if len(v) else 0) >> 9
        span = int(v.max() if len(v) else 0) - (low << 9) >> 9
        if span < len(v):  # neighbours share their block
            blocks = self.block(np.arange(low, low + span + 1, dtype=np.uint64))
            factor = np.take(blocks, (g - _u(low)).view(np.int64), mode="clip")
        else:
            factor = self.block(g)
        factor *= np.take(self.table, (v & _u(_SLOTS - 1)).view(np.int64), mode="clip")
        return factor


class _Keys:
    """Keys of both sums, X in row 0 and Y in row 1, for runs of pages; prefix sums have 513 places: sum over
    slots below i.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a digest key has {KEY_BYTES} bytes, not {len(key)}")
        stream = hashlib.shake_256(_PERSON + key).digest(8 * (4 * _SLOTS + 2))
        words = np.frombuffer(stream, "<u8").astype(np.uint64, copy=False)
        odd = (words[: 4 * _SLOTS] | _u(1)).reshape(2, 2, _SLOTS)
        page, table = odd[:, 0], odd[:, 1]
        slot = np.arange(_SLOTS, dtype=np.uint64)
        sums = np.zeros((4, 2, _SLOTS + 1), np.uint64)
        np.cumsum((page, page * slot, table, table * slot), axis=2, out=sums[..., 1:])
        self._pages, self._pages_by_slot, self._tables, self._tables_by_slot = self._below_all = sums
        self._table = np.zeros((2, _SLOTS + 1), np.uint64)  # a run may end with the last slot
        self._table[:, :_SLOTS] = table
        self._page = page
        self._salt = words[-2:, None]
        self.lanes = tuple(_Lane(page[n], self._table[n], words[n - 2]) for n in (0, 1))

    def _below(self, q: U64) -> tuple[U64, U64]:
        """Sums over the pages below the q-th of a block of 1 GiB: of the factors, and of number * factor."""
        j, i = (q >> _u(9)).view(np.int64), (q & _u(_SLOTS - 1)).view(np.int64)
        part, before = self._table[:, j], self._tables[:, j]
        pages, whole = self._pages[:, i], self._pages[:, -1:]
        numbered = (self._tables_by_slot[:, j] << _u(9)) * whole + before * self._pages_by_slot[:, -1:]
        inner = (j.view(np.uint64) << _u(9)) * pages + self._pages_by_slot[:, i]
        return before * whole + part * pages, numbered + part * inner

    def extents(self, e: Extents) -> tuple[int, int, int]:
        """X, Y and the number of pages of extents, by compiled code. Errors as of :meth:`Digest.add`."""
        from iokeep.pt.sum_kernels import NO_PROT, TOO_MANY, UNEVEN, sum_extents

        out = np.zeros(3, np.uint64)
        keys = self._page, self._table, self._below_all, self._salt.reshape(-1)
        said = sum_extents(e.iova, e.last, e.pa, e.prot, *keys, _BLOCK_LIMIT, out)
        if said == TOO_MANY:
            raise _too_many()
        if said in (UNEVEN, NO_PROT):
            raise _uneven() if said == UNEVEN else _no_prot()
        x, y, pages = out.tolist()
        return x, y, pages

    def runs(self, first: U64, length: U64, word: U64) -> tuple[int, int]:
        """X and Y of pieces within one block each.

        :param word: uint64[2, n] of their first pages; with each page it grows by 4, and by 4 * 2**20.
        """
        q, n = first & _u((1 << _BLOCK) - 1), len(first)
        plain, numbered = self._below(np.concatenate((q, q + length)))
        step = np.array([[4], [4 << _FOLD]], np.uint64)
        total = (word - step * q) * (plain[:, n:] - plain[:, :n]) + step * (numbered[:, n:] - numbered[:, :n])
        total *= _mix((first >> _u(_BLOCK)) ^ self._salt) | _u(1)
        x, y = np.add.reduce(total, axis=1, dtype=np.uint64).tolist()
        return x, y


def _uneven() -> ValueError:
    return ValueError("a run is not a multiple of 4096 bytes")


def _no_prot() -> ValueError:
    return ValueError("a run has no permission")


def _too_many() -> InputError:
    return InputError(f"more than {_BLOCK_LIMIT >> 10} TiB are mapped: this is no mapping of a machine")


def fold(n: U64) -> U64:
    """Frame numbers with their low 20 bits above the others."""
    return ((n & _u((1 << _FOLD) - 1)) << _u(_FOLD)) + (n >> _u(_FOLD))


class Digest:
    """A digest that follows a mapping: what is mapped is added, what is unmapped is removed, in any order.

    :param key: 16 random bytes. :param sums: of a digest before (:attr:`sums`), to go on with.
    """

    def __init__(self, key: bytes, sums: tuple[int, int, int] = (0, 0, 0)) -> None:
        self._keys = _Keys(key)
        self.lanes = self._keys.lanes
        self._key = key
        self._sums = list(sums)

    @property
    def key(self) -> bytes:
        """The 16 bytes that it is keyed with."""
        return self._key

    @property
    def sums(self) -> tuple[int, int, int]:
        """X, Y and the number of pages."""
        return self._sums[0], self._sums[1], self._sums[2]

    def change(self, x: int, y: int, pages: int) -> None:
        """Add to the sums; all modulo 2**64."""
        for n, more in enumerate((x, y, pages)):
            self._sums[n] = (self._sums[n] + more) % 2**64

    def add(self, extents: Extents, *, compiled: bool | None = None) -> None:
        """Count what the extents translate. They are disjoint, in any order and cut.

        :param compiled: by Numba (True), by NumPy alone (False), or by number (None). The result is the same.
        :raises ValueError: not multiples of 4096 bytes, or a prot of nothing.
        :raises InputError: more is mapped than any machine has. Nothing was changed.
        """
        self.change(*self._sum(extents, compiled))

    def remove(self, extents: Extents) -> None:
        """The opposite of :meth:`add`: of what was counted before, in any cut."""
        x, y, pages = self._sum(extents, None)
        self.change(-x, -y, -pages)

    def _sum(self, e: Extents, compiled: bool | None) -> tuple[int, int, int]:
        if not len(e):
            return 0, 0, 0
        cold = _COMPILED_NEAR if loaded("kernels") else _COMPILED_COLD
        if worth_compiled(compiled, "sum_kernels", len(e), 1, cold):
            return self._keys.extents(e)
        page = _u(12)
        if bool(((e.iova | e.pa | (e.last + _u(1))) & _u(4095)).any()):
            raise _uneven()
        if bool(((e.prot == 0) | (e.prot > 3)).any()):
            raise _no_prot()
        first, end, frame = e.iova >> page, e.last >> page, e.pa >> page
        # Where no run crosses a block or a fold, each is one piece.
        cut = ((first ^ end) >> _u(_BLOCK)) | ((frame ^ (frame + (end - first))) >> _u(_FOLD))
        total = [0, 0, 0]
        whole = np.flatnonzero(cut == 0)
        for lo in range(0, len(whole), _BATCH):
            part: I64 | slice = whole[lo : lo + _BATCH]
            if len(whole) == len(e):
                part = slice(lo, lo + _BATCH)
            self._pieces(first[part], end[part] - first[part] + _u(1), frame[part], e.prot[part], total)
        some = np.flatnonzero(cut)
        blocks = ((end[some] >> _u(_BLOCK)) - (first[some] >> _u(_BLOCK))) + _u(1)
        if len(some) and (int(blocks.max()) > _BLOCK_LIMIT or int(blocks.sum()) > _BLOCK_LIMIT):
            raise _too_many()
        ends = np.cumsum(blocks).astype(np.int64)
        for lo in range(0, int(ends[-1]) if len(some) else 0, _BATCH):
            nth = np.arange(lo, min(lo + _BATCH, int(ends[-1])))
            of = np.searchsorted(ends, nth, side="right")
            at = some[of]
            g = (first[at] >> _u(_BLOCK)) + (nth - ends[of]).astype(np.uint64) + blocks[of]
            begin = np.maximum(first[at], g << _u(_BLOCK))
            stop = np.minimum(end[at], (g << _u(_BLOCK)) + _u((1 << _BLOCK) - 1))
            length, n, prot = stop - begin + _u(1), frame[at] + (begin - first[at]), e.prot[at]
            head = _u(1 << _FOLD) - (n & _u((1 << _FOLD) - 1))
            wrap = head < length  # a block is smaller than a fold: once at most
            if wrap.any():
                tail = head[wrap]
                self._pieces(begin[wrap] + tail, length[wrap] - tail, n[wrap] + tail, prot[wrap], total)
                length = np.minimum(length, head)
            self._pieces(begin, length, n, prot, total)
        return total[0], total[1], total[2]

    def _pieces(self, first: U64, length: U64, n: U64, prot: U8, total: list[int]) -> None:
        """Add the sums of pieces within one block and one fold each."""
        word = (np.stack((n, fold(n))) << _u(2)) + prot
        if bool((length == 1).all()):
            v, slot = first >> _u(9), (first & _u(_SLOTS - 1)).view(np.int64)
            for lane, keys in enumerate(self.lanes):
                word[lane] *= np.take(keys.page, slot, mode="clip")
                word[lane] *= keys.weights(v)
                total[lane] += int(np.add.reduce(word[lane], dtype=np.uint64))
            total[2] += len(n)
            return
        x, y = self._keys.runs(first, length, word)
        total[0] += x
        total[1] += y
        total[2] += int(length.sum())

    def add_tables(self, base: U64, x: U64, y: U64, pages: int) -> None:
        """Count whole tables of 512 pages. :param base: IOVA of each. :param x: :param y: their sums of K * a
        and L * b.
        """
        v = base >> _u(21)
        for n, sums in enumerate((x, y)):
            self._sums[n] += int(np.add.reduce(self.lanes[n].weights(v) * sums, dtype=np.uint64))
        self.change(0, 0, pages)

    def digest(self) -> bytes:
        """The 32 bytes."""
        data = b"".join(n.to_bytes(8, "little") for n in self._sums)
        return hashlib.blake2b(data, key=self._key, person=_PERSON, digest_size=DIGEST_BYTES).digest()


def digest_extents(extents: Extents, key: bytes, *, compiled: bool | None = None) -> bytes:
    """The digest of what extents translate.

    :param extents: disjoint, in any cut; multiples of 4096 bytes. Where a format has no write-only the caller
        passes "rw" for "-w" (``diff.normalised``). :param compiled: as for :meth:`Digest.add`.
    :raises ValueError: not multiples of 4096 bytes, or a prot of nothing.
    """
    out = Digest(key)
    out.add(extents, compiled=compiled)
    return out.digest()
