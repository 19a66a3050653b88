# SPDX-License-Identifier: Apache-2.0
"""The journal of a restore, kept behind the manifest in the same memfd, so that it outlives the VMM process.

A step that makes something is written down twice: INTENT before the ioctl, the result behind it. A
restarted VMM reads what its dead predecessor had reached and either undoes it in reverse or, behind the
commit point (ADOPTED, COMPARED), goes on.

The first 4 KiB of the journal hold ``u64 count, u64 ~count``, which one 16-byte write replaces; the slots
follow, 64 bytes each: ``u64 sequence, u32 kind, u32 0, u64 a, u64 b, u64 c, u64 d, u8 digest[16]``
(blake2b-128, keyed with the manifest's digest). A slot is written before the count that covers it: a torn
write leaves no entry, and an entry that does not match its digest is damage, not a torn write.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from iokeep.errors import InputError, UsageError
from iokeep.restore.manifest import FRAME, MAX_SLOTS, SLOT_BYTES, TOP

__all__ = ["Entry", "Journal", "Kind"]

_HEAD = struct.Struct("<QQ")
_SLOT = struct.Struct("<QIIQQQQ")


class Kind(IntEnum):
    """What an entry says. ``a``, ``b``, ``c`` by kind; INTENT_* stand before their ioctl."""

    BEGIN = 1  #: a restore starts; a = policy number
    INTENT_IOAS = 2  #: a = index of the IOAS
    IOAS = 3  #: a = object id, b = index. Undo: IOMMU_DESTROY
    INTENT_HWPT = 4  #: a = HWPT token
    HWPT = 5  #: a = object id, b = HWPT token. Undo: IOMMU_DESTROY
    BOUND = 6  #: a = device id, b = device token. Undo: close the device's file
    INTENT_ADOPT = 7  #: a = IOAS id, b = HWPT token
    ADOPTED = (
        8  #: a = object id of the HWPT, b = HWPT token, c = IOAS id. The commit point of adopt and trust
    )
    INTENT_ATTACH = 9  #: a = HWPT id, b = device token. The commit point of rebuild
    ATTACHED = 10  #: a = HWPT id, b = device token
    FINISHED = 11  #: the session is finished
    UNDONE = 12  #: a = sequence of the entry that was undone
    REFUSED = 13  #: the restore ended, all undone
    PROVED = 14  #: a = 4 KiB pages, b = bytes of tables, c = ns, d = layout differences of one proof


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry; ``sequence`` counts from 0."""

    sequence: int
    kind: Kind
    a: int = 0
    b: int = 0
    c: int = 0
    d: int = 0

    def text(self) -> str:
        """For people, e.g. ``3 IOAS a=0x1 b=0x0 c=0x0 d=0x0``."""
        return f"{self.sequence} {self.kind.name} a={self.a:#x} b={self.b:#x} c={self.c:#x} d={self.d:#x}"


class Journal:
    """Entries in order, persisted one by one.

    :param read: ``read(length, offset) -> bytes`` of the manifest's file.
    :param write: ``write(data, offset)``.
    :param offset: where the journal starts in the file. :param slots: how many entries it can hold.
    :param key: the manifest's digest, so that a journal cannot be taken for another manifest's.
    :raises InputError: the journal is damaged.
    """

    def __init__(
        self,
        read: Callable[[int, int], bytes],
        write: Callable[[bytes, int], object],
        offset: int,
        slots: int,
        key: bytes,
    ) -> None:
        if not 1 <= slots <= MAX_SLOTS:
            raise InputError(f"journal: {slots} slots; 1 ... {MAX_SLOTS} are allowed")
        self._write = write
        self._offset = offset
        self._slots = slots
        self._key = key
        self.entries: list[Entry] = []
        head = read(_HEAD.size, offset)
        if len(head) != _HEAD.size:
            raise InputError(f"journal: nothing at offset {offset:#x} of the manifest's file")
        count, complement = _HEAD.unpack(head)
        if count != TOP ^ complement or count > slots:
            raise InputError(f"journal: its head says {count:#x} and {complement:#x}; it holds {slots} slots")
        raw = read(count * SLOT_BYTES, offset + FRAME) if count else b""
        if len(raw) != count * SLOT_BYTES:
            raise InputError(f"journal: {count} entries claimed, {len(raw)} bytes there")
        for i in range(count):
            self.entries.append(self._parse(raw[i * SLOT_BYTES : (i + 1) * SLOT_BYTES], i))

    def _digest(self, raw: bytes) -> bytes:
        return hashlib.blake2b(raw, digest_size=16, key=self._key).digest()

    def _parse(self, raw: bytes, index: int) -> Entry:
        if not hmac.compare_digest(self._digest(raw[: _SLOT.size]), raw[_SLOT.size :]):
            raise InputError(f"journal: entry {index} does not match its digest")
        sequence, kind, zero, a, b, c, d = _SLOT.unpack_from(raw)
        if sequence != index or zero or kind not in Kind._value2member_map_:
            raise InputError(f"journal: entry {index} says sequence {sequence}, kind {kind}")
        return Entry(sequence, Kind(kind), a, b, c, d)

    def add(self, kind: Kind, a: int = 0, b: int = 0, c: int = 0, d: int = 0) -> Entry:
        """Append an entry; it is persisted when this returns. :raises UsageError: the journal is full."""
        n = len(self.entries)
        if n >= self._slots:
            raise UsageError(f"journal: all {self._slots} slots are used", "save with a bigger journal")
        entry = Entry(n, kind, a, b, c, d)
        raw = _SLOT.pack(n, kind, 0, a, b, c, d)
        self._write(raw + self._digest(raw), self._offset + FRAME + n * SLOT_BYTES)
        self._write(_HEAD.pack(n + 1, TOP ^ (n + 1)), self._offset)
        self.entries.append(entry)
        return entry

    def undone(self, entry: Entry) -> None:
        """Note that ``entry`` was undone."""
        self.add(Kind.UNDONE, entry.sequence)

    def live(self) -> list[Entry]:
        """Entries since the last BEGIN that are neither undone nor bookkeeping, oldest first."""
        start = max((e.sequence for e in self.entries if e.kind is Kind.BEGIN), default=-1)
        gone = {e.a for e in self.entries if e.kind is Kind.UNDONE}
        return [
            e
            for e in self.entries
            if e.sequence > start and e.sequence not in gone and e.kind is not Kind.UNDONE
        ]

    def open_intents(self) -> list[Entry]:
        """INTENT_* entries that no result and no UNDONE follows: the ioctl may or may not have happened."""
        results = {Kind.INTENT_IOAS: Kind.IOAS, Kind.INTENT_HWPT: Kind.HWPT, Kind.INTENT_ADOPT: Kind.ADOPTED}
        out = []
        live = self.live()
        for e in live:
            if e.kind in results:
                after = [x for x in live if x.sequence > e.sequence and x.kind is results[e.kind]]
                key = e.b if e.kind is Kind.INTENT_ADOPT else e.a
                if not any(x.b == key for x in after):
                    out.append(e)
        return out
