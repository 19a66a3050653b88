# SPDX-License-Identifier: Apache-2.0
"""The container of iokeep's own records: a version, a length and a digest before any byte is believed.

Layout, little-endian, at a page boundary of preserved memory (contiguous frames when longer than one)::

    0   char compatible[48]   "iokeep-<thing>-v<n>", zero padded
    48  u64  length           bytes of payload
    56  u64  header_length    96
    64  u8   digest[32]       BLAKE2b-256 of the payload
    96  u8   payload[length]

:class:`Pack` and :class:`Unpack` code payloads: every value is a multiple of 8 bytes long, so that arrays
stay aligned.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import numpy as np

from iokeep.errors import InputError
from iokeep.handover.abi import PAGE_SIZE, Alloc
from iokeep.mem.memory import U8, U64, Memory, WritableMemory

_HEADER = struct.Struct("<48sQQ32s")
HEADER_LENGTH = _HEADER.size
#: longest payload that is written or read: 10**6 areas fit twice
MAX_PAYLOAD = 256 << 20
#: longest text, in bytes of UTF-8
MAX_TEXT = 65536
_STEP = 1 << 20


def pages_of(length: int) -> int:
    """Frames of 4096 bytes that hold ``length`` bytes, at least 1."""
    return max(1, -(-length // PAGE_SIZE))


def digest_of(payload: bytes) -> bytes:
    """The 32-byte BLAKE2b digest that the header carries."""
    return hashlib.blake2b(payload, digest_size=32).digest()


def record_bytes(compatible: str, payload: bytes) -> bytes:
    """Header and payload of one record. :raises ValueError: the name or the payload does not fit."""
    name = compatible.encode()
    if not 0 < len(name) < 48 or b"\0" in name:
        raise ValueError(f"record name {compatible!r} must be 1 ... 47 bytes without NUL")
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"record {compatible}: payload of {len(payload)} bytes is more than {MAX_PAYLOAD}")
    return _HEADER.pack(name, len(payload), HEADER_LENGTH, digest_of(payload)) + payload


def write_record(mem: WritableMemory, alloc: Alloc, compatible: str, payload: bytes) -> int:
    """Write a record into new preserved frames, ``alloc(npages, True)``, and return its pa."""
    data = record_bytes(compatible, payload)
    pa = alloc(pages_of(len(data)), True)
    mem.write(pa, data)
    return pa


def record_compatible(mem: Memory, pa: int) -> str:
    """The version string at ``pa``. :raises InputError: it is no such string."""
    raw = mem.read(pa, 48)
    name, _, rest = raw.partition(b"\0")
    if (
        not name
        or rest.strip(b"\0")
        or len(name) > 47
        or not name.isascii()
        or not name.decode().isprintable()
    ):
        raise InputError(f"record at {pa:#x}: compatible[48] is not a zero-padded name: {raw[:16].hex()}...")
    return name.decode()


def record_pages(mem: Memory, pa: int) -> int:
    """Frames that the record at ``pa`` occupies, by its (bounded) length alone."""
    length = int.from_bytes(mem.read(pa + 48, 8), "little")
    if length > MAX_PAYLOAD:
        raise InputError(f"record at {pa:#x}: length {length:#x} is more than {MAX_PAYLOAD:#x}")
    return pages_of(HEADER_LENGTH + length)


def read_record(mem: Memory, pa: int, compatible: str | Sequence[str]) -> bytes:
    """Payload of the record at ``pa``.

    :param compatible: the version string(s) that the caller can decode; anything else is refused, never
        guessed.
    :raises InputError: misaligned, another version, impossible length, or the digest does not match; says
        which.
    :raises MemoryAbsent: part of it is not in this source.
    """
    supported = (compatible,) if isinstance(compatible, str) else tuple(compatible)
    if pa <= 0 or pa % PAGE_SIZE:
        raise InputError(f"record pa {pa:#x} is not the start of a page (wanted {supported[0]})")
    found = record_compatible(mem, pa)
    if found not in supported:
        raise InputError(
            f"record at {pa:#x} has version {found!r}; supported: {', '.join(supported)}",
            "the other kernel writes a version that this one was not tested with",
        )
    _, length, header_length, digest = _HEADER.unpack(mem.read(pa, HEADER_LENGTH))
    if header_length != HEADER_LENGTH:
        raise InputError(
            f"record {found} at {pa:#x}: header_length {header_length:#x}, must be {HEADER_LENGTH:#x}"
        )
    if length > MAX_PAYLOAD:
        raise InputError(f"record {found} at {pa:#x}: length {length:#x} is more than {MAX_PAYLOAD:#x}")
    parts = []
    at, end = pa + HEADER_LENGTH, pa + HEADER_LENGTH + length
    while at < end:  # in steps, so that a damaged length meets absent memory before it costs much
        parts.append(mem.read(at, min(_STEP, end - at)))
        at += len(parts[-1])
    payload = b"".join(parts)
    if digest_of(payload) != digest:
        raise InputError(f"record {found} at {pa:#x}: digest of its {length} bytes does not match: damaged")
    return payload


class Pack:
    """Builds a payload; every item is padded with zeros to a multiple of 8 bytes."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def _put(self, data: bytes) -> None:
        self._parts.append(data)
        self._parts.append(bytes(-len(data) % 8))

    def u64(self, *values: int) -> None:
        """Unsigned 64-bit words. :raises ValueError: a value does not fit."""
        for value in values:
            if not 0 <= value < 1 << 64:
                raise ValueError(f"{value} is not an unsigned 64-bit value")
            self._parts.append(value.to_bytes(8, "little"))

    def raw(self, data: bytes, length: int) -> None:
        """Exactly ``length`` bytes. :raises ValueError: ``data`` has another length."""
        if len(data) != length:
            raise ValueError(f"{len(data)} bytes where {length} belong")
        self._put(data)

    def text(self, value: str) -> None:
        """u64 length, then UTF-8."""
        data = value.encode()
        if len(data) > MAX_TEXT:
            raise ValueError(f"text of {len(data)} bytes is more than {MAX_TEXT}")
        self.u64(len(data))
        self._put(data)

    def words(self, values: U64) -> None:
        """u64 count, then the words."""
        self.u64(len(values))
        self._put(np.asarray(values, "<u8").tobytes())

    def octets(self, values: U8) -> None:
        """u64 count, then one byte each."""
        self.u64(len(values))
        self._put(np.asarray(values, np.uint8).tobytes())

    def payload(self) -> bytes:
        """What was put so far."""
        return b"".join(self._parts)


class Unpack:
    """Reads a payload back; every length is compared with what is left before anything is allocated.

    :param what: how the record is called in errors.
    """

    def __init__(self, payload: bytes, what: str) -> None:
        self._data = payload
        self._at = 0
        self.what = what

    def fail(self, rule: str) -> InputError:
        """The error that names this record, the byte and the broken rule."""
        return InputError(f"{self.what}: byte {self._at:#x}: {rule}")

    def _take(self, length: int) -> bytes:
        padded = length + -length % 8
        if padded > len(self._data) - self._at:
            raise self.fail(f"{length} bytes wanted, {len(self._data) - self._at} left")
        out = self._data[self._at : self._at + length]
        if any(self._data[self._at + length : self._at + padded]):
            raise self.fail("padding is not zero")
        self._at += padded
        return out

    def u64(self, most: int = (1 << 64) - 1, name: str = "value") -> int:
        """One word, at most ``most``."""
        value = int.from_bytes(self._take(8), "little")
        if value > most:
            self._at -= 8
            raise self.fail(f"{name} {value:#x} is more than {most:#x}")
        return value

    def count(self, least_bytes: int, name: str) -> int:
        """A number of items that take ``least_bytes`` each: refused where they cannot all be in the
        payload.
        """
        value = self.u64()
        if value * least_bytes > len(self._data) - self._at:
            raise self.fail(f"{name} {value} cannot fit into the {len(self._data) - self._at} bytes left")
        return value

    def raw(self, length: int) -> bytes:
        """Exactly ``length`` bytes."""
        return self._take(length)

    def text(self) -> str:
        """UTF-8 text."""
        length = self.u64(MAX_TEXT, "text length")
        data = self._take(length)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise self.fail("text is not UTF-8") from None

    def words(self, name: str) -> U64:
        """uint64[n]."""
        count = self.count(8, name)
        return np.frombuffer(self._take(count * 8), "<u8").astype(np.uint64)

    def octets(self, name: str) -> U8:
        """uint8[n]."""
        count = self.count(1, name)
        return np.frombuffer(self._take(count), np.uint8).copy()

    def end(self) -> None:
        """:raises InputError: bytes are left over."""
        if self._at != len(self._data):
            raise self.fail(f"{len(self._data) - self._at} bytes after the last field")
