# SPDX-License-Identifier: Apache-2.0
"""The VMM's own record, ``iokeep-manifest-v2``: what it had set up, in a memfd of its own that the session
preserves.

No kernel hands a VMM its areas back (there is no ioctl that lists an IOAS), so the VMM carries them itself:
areas by file token, the tokens of files, HWPTs, iommufd and devices, and a journal that a restarted VMM reads
(:mod:`iokeep.restore.journal`). All numbers are little-endian; ranges are closed.

=========  =====  ==================================================================
offset     bytes  header (128 bytes)
=========  =====  ==================================================================
0          24     ``iokeep-manifest-v2``, zero-padded
24         8      header length = 128
32         8      payload length in bytes
40         8      offset of the journal in this file, a multiple of 4096
48         8      number of slots of the journal
56         32     blake2b-256 over bytes 0 ... 55 and 88 up to the journal (padding too)
88         40     zero
=========  =====  ==================================================================

The payload is one counts block and then fixed-size records and columns, in the order of :class:`Manifest`'s
fields. Nothing in it is trusted: counts are bounded before anything is allocated, and every reference is
checked.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import dataclass

import numpy as np

from iokeep.errors import InputError, UsageError

__all__ = [
    "COMPATIBLE",
    "MANIFEST_TOKEN",
    "Area",
    "DeviceEntry",
    "FileEntry",
    "HwptEntry",
    "Manifest",
    "file_bytes",
    "header_of",
]

#: version string of this record; a reader that does not know it refuses
COMPATIBLE = "iokeep-manifest-v2"
#: well-known token of the manifest's memfd in every session ("ioKMani1" as ASCII)
MANIFEST_TOKEN = 0x696F4B4D616E6931

HEADER_BYTES = 128
FRAME = 4096
MAX_FILES = 4096
MAX_IOASES = 256
MAX_HWPTS = 256
MAX_DEVICES = 256
MAX_AREAS = 1 << 20
MAX_NOTE = 1 << 16
MAX_SLOTS = 1 << 16
NAME_BYTES = 64
SLOT_BYTES = 64
#: a key of 16 bytes and a digest of 32 (:mod:`iokeep.pt.digest`)
SEAL_BYTES = 48
TOP = 2**64 - 1

_COUNTS = struct.Struct("<QIIIIQI4x")  # iommufd token, files, IOASes, HWPTs, devices, areas, note bytes
_FILE = struct.Struct("<QQ64s")
_HWPT = struct.Struct("<QI4x48s")
_DEVICE = struct.Struct("<QQ64s")
_AREA_BYTES = 4 * 8 + 4 + 1
MAX_PAYLOAD = (
    _COUNTS.size
    + MAX_FILES * _FILE.size
    + MAX_HWPTS * _HWPT.size
    + MAX_DEVICES * _DEVICE.size
    + MAX_AREAS * _AREA_BYTES
    + MAX_NOTE
)


@dataclass(frozen=True, slots=True, order=True)
class Area:
    """One area as user space set it up: ``IOMMU_IOAS_MAP_FILE`` at a fixed IOVA.

    :param iova: first IOVA. :param last: last IOVA (closed); both ends on 4 KiB borders.
    :param file: token of the file. :param offset: bytes from the file's start.
    :param prot: 1 = readable, 2 = writable by devices. :param ioas: index of the IOAS.
    """

    iova: int
    last: int
    file: int
    offset: int
    prot: int
    ioas: int = 0

    @property
    def length(self) -> int:
        """Bytes of the area."""
        return self.last - self.iova + 1


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A preserved memfd: its token, size in bytes and name (at most 64 bytes of UTF-8)."""

    token: int
    size: int
    name: str


@dataclass(frozen=True, slots=True)
class HwptEntry:
    """A preserved HWPT: its token within the iommufd and the index of its IOAS.

    :param seal: what it translated when it was saved, as :func:`iokeep.restore.proof.seal_of` says it;
        empty = not recorded.
    """

    token: int
    ioas: int = 0
    seal: bytes = b""


@dataclass(frozen=True, slots=True)
class DeviceEntry:
    """A preserved VFIO device: its token, the token of the HWPT that it is attached to, and its path."""

    token: int
    hwpt: int
    path: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that a VMM must know to set its IOASes up again.

    ``ioases`` is their number; an :class:`Area`'s and a :class:`HwptEntry`'s ``ioas`` is an index below it.
    ``note`` is up to 64 KiB of the VMM's own bytes, carried unread.
    """

    iommufd: int
    files: tuple[FileEntry, ...]
    hwpts: tuple[HwptEntry, ...]
    devices: tuple[DeviceEntry, ...]
    areas: tuple[Area, ...]
    ioases: int = 1
    note: bytes = b""

    def problems(self) -> list[str]:
        """What is wrong with this set-up, every item with its place; an empty list = a valid manifest."""
        out: list[str] = []
        for what, count, limit in (
            ("files", len(self.files), MAX_FILES),
            ("IOASes", self.ioases, MAX_IOASES),
            ("HWPTs", len(self.hwpts), MAX_HWPTS),
            ("devices", len(self.devices), MAX_DEVICES),
            ("areas", len(self.areas), MAX_AREAS),
            ("note bytes", len(self.note), MAX_NOTE),
        ):
            if not 0 <= count <= limit:
                out.append(f"{count} {what}; a manifest holds at most {limit}")
        if out:
            return out
        tokens = (
            [f.token for f in self.files] + [d.token for d in self.devices] + [self.iommufd, MANIFEST_TOKEN]
        )
        seen: set[int] = set()
        for token in tokens:
            if token in seen:
                out.append(f"token {token:#x} is used twice in one session")
            seen.add(token)
        out += [f"token {t:#x} is not 64 bits" for t in tokens if not 0 <= t <= TOP]
        hwpts = [h.token for h in self.hwpts]
        if len(set(hwpts)) != len(hwpts):
            out.append("two HWPTs have the same token")
        for h in self.hwpts:
            if not 0 <= h.ioas < self.ioases:
                out.append(f"HWPT token {h.token:#x} names IOAS {h.ioas} of {self.ioases}")
            if h.seal and (len(h.seal) != SEAL_BYTES or not h.seal.strip(b"\0")):
                out.append(f"HWPT token {h.token:#x}: its seal is not {SEAL_BYTES} bytes")
        for d in self.devices:
            if d.hwpt not in hwpts:
                out.append(
                    f"device token {d.token:#x} ({d.path}) names HWPT token {d.hwpt:#x}, which is not listed"
                )
        for entry, name in [(f.token, f.name) for f in self.files] + [
            (d.token, d.path) for d in self.devices
        ]:
            if len(name.encode()) > NAME_BYTES or "\0" in name:
                out.append(f"token {entry:#x}: its name is longer than {NAME_BYTES} bytes or holds a NUL")
        sizes = {f.token: f.size for f in self.files}
        before: Area | None = None
        for a in sorted(self.areas, key=lambda x: (x.ioas, x.iova)):
            where = f"area iova {a.iova:#x}-{a.last:#x}"
            if (
                not (0 <= a.iova <= a.last <= TOP)
                or a.iova % FRAME
                or (a.last + 1) % FRAME
                or a.offset % FRAME
            ):
                out.append(f"{where} is not whole 4 KiB pages of the IOVA space")
            elif not 0 <= a.ioas < self.ioases:
                out.append(f"{where} names IOAS {a.ioas} of {self.ioases}")
            elif a.prot not in (1, 2, 3):
                out.append(f"{where}: prot {a.prot:#x} is none of r-, -w, rw")
            elif a.file not in sizes:
                out.append(f"{where} names file token {a.file:#x}, which is not listed")
            elif a.offset < 0 or a.offset + a.length > sizes[a.file]:
                out.append(f"{where} ends behind file token {a.file:#x} of {sizes[a.file]:#x} bytes")
            elif before is not None and before.ioas == a.ioas and a.iova <= before.last:
                out.append(f"{where} overlaps the area at iova {before.iova:#x}-{before.last:#x}")
            before = a
        return out

    def check(self) -> None:
        """:raises UsageError: naming the first problem."""
        found = self.problems()
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise UsageError(f"manifest: {found[0]}{more}")

    def to_bytes(self) -> bytes:
        """The payload. :raises UsageError: this set-up is not valid (see :meth:`problems`)."""
        self.check()
        n = len(self.areas)
        parts = [
            _COUNTS.pack(
                self.iommufd,
                len(self.files),
                self.ioases,
                len(self.hwpts),
                len(self.devices),
                n,
                len(self.note),
            )
        ]
        parts += [_FILE.pack(f.token, f.size, f.name.encode()) for f in self.files]
        parts += [_HWPT.pack(h.token, h.ioas, h.seal) for h in self.hwpts]
        parts += [_DEVICE.pack(d.token, d.hwpt, d.path.encode()) for d in self.devices]
        areas = sorted(self.areas, key=lambda x: (x.ioas, x.iova))
        for field in ("iova", "last", "file", "offset"):
            parts.append(np.array([getattr(a, field) for a in areas], "<u8").tobytes())
        parts.append(np.array([a.ioas for a in areas], "<u4").tobytes())
        parts.append(np.array([a.prot for a in areas], "u1").tobytes())
        parts.append(self.note)
        return b"".join(parts)

    @classmethod
    def from_bytes(cls, payload: bytes) -> Manifest:
        """Read a payload. :raises InputError: at the first thing that does not fit, naming it."""
        if len(payload) < _COUNTS.size or len(payload) > MAX_PAYLOAD:
            raise InputError(f"manifest: a payload of {len(payload)} bytes")
        iommufd, n_files, ioases, n_hwpts, n_devices, n_areas, n_note = _COUNTS.unpack_from(payload)
        for what, count, limit in (
            ("files", n_files, MAX_FILES),
            ("IOASes", ioases, MAX_IOASES),
            ("HWPTs", n_hwpts, MAX_HWPTS),
            ("devices", n_devices, MAX_DEVICES),
            ("areas", n_areas, MAX_AREAS),
            ("note bytes", n_note, MAX_NOTE),
        ):
            if count > limit:
                raise InputError(f"manifest: it claims {count} {what}; at most {limit} are allowed")
        want = _COUNTS.size + n_files * _FILE.size + n_hwpts * _HWPT.size + n_devices * _DEVICE.size
        want += n_areas * _AREA_BYTES + n_note
        if want != len(payload):
            raise InputError(f"manifest: {len(payload)} bytes, but its counts ask for {want}")
        at = _COUNTS.size
        files, hwpts, devices = [], [], []
        for _ in range(n_files):
            token, size, raw = _FILE.unpack_from(payload, at)
            files.append(FileEntry(token, size, _text(raw, f"file token {token:#x}")))
            at += _FILE.size
        for _ in range(n_hwpts):
            token, ioas, raw = _HWPT.unpack_from(payload, at)
            hwpts.append(HwptEntry(token, ioas, raw if raw.strip(b"\0") else b""))
            at += _HWPT.size
        for _ in range(n_devices):
            token, hwpt, raw = _DEVICE.unpack_from(payload, at)
            devices.append(DeviceEntry(token, hwpt, _text(raw, f"device token {token:#x}")))
            at += _DEVICE.size
        columns: list[list[int]] = []
        for dtype, width in (("<u8", 8), ("<u8", 8), ("<u8", 8), ("<u8", 8), ("<u4", 4), ("u1", 1)):
            columns.append(np.frombuffer(payload, dtype, n_areas, at).tolist())
            at += n_areas * width
        iova, last, file, offset, of, prot = columns
        areas = tuple(map(Area, iova, last, file, offset, prot, of))
        out = cls(iommufd, tuple(files), tuple(hwpts), tuple(devices), areas, ioases, payload[at:])
        found = out.problems()
        if found:
            raise InputError(f"manifest: {found[0]}")
        return out


def _text(raw: bytes, what: str) -> str:
    """A zero-padded name. :raises InputError: bytes behind the NUL, or no UTF-8."""
    name, _, rest = raw.partition(b"\0")
    if rest.strip(b"\0"):
        raise InputError(f"manifest: the name of {what} has bytes behind its NUL")
    try:
        return name.decode()
    except UnicodeDecodeError as e:
        raise InputError(f"manifest: the name of {what} is not UTF-8 at byte {e.start}") from e


@dataclass(frozen=True, slots=True)
class Header:
    """The parts of a manifest's header that say where things are; all in bytes but ``slots``."""

    payload_length: int
    journal_offset: int
    slots: int
    digest: bytes


def _digest(front: bytes) -> bytes:
    """Digest of all bytes before the journal, without the digest's own place."""
    h = hashlib.blake2b(front[:56], digest_size=32)
    h.update(memoryview(front)[88:])
    return h.digest()


def _journal_at(payload_length: int) -> int:
    """Offset of the journal behind a payload of so many bytes."""
    return -(-(HEADER_BYTES + payload_length) // FRAME) * FRAME


def file_bytes(manifest: Manifest, slots: int = 1024) -> bytes:
    """The whole file: header, payload, room for a journal of ``slots`` entries, in whole 4 KiB pages.

    :raises UsageError: the manifest is not valid.
    """
    if not 1 <= slots <= MAX_SLOTS:
        raise UsageError(f"manifest: a journal of {slots} slots; 1 ... {MAX_SLOTS} are allowed")
    payload = manifest.to_bytes()
    journal = _journal_at(len(payload))
    end = journal + FRAME + -(-slots * SLOT_BYTES // FRAME) * FRAME
    head = struct.pack("<24sQQQQ", COMPATIBLE.encode(), HEADER_BYTES, len(payload), journal, slots)
    front = (head.ljust(HEADER_BYTES, b"\0") + payload).ljust(journal, b"\0")
    front = front[:56] + _digest(front) + front[88:]
    # An empty journal: count 0 and its complement (see journal.py).
    return (front + struct.pack("<QQ", 0, TOP)).ljust(end, b"\0")


def header_of(raw: bytes, size: int) -> Header:
    """Check the first 128 bytes of a manifest file of ``size`` bytes. The digest is checked by
    :func:`read_payload`.

    :raises InputError: another version, or lengths that do not fit the file.
    """
    if len(raw) < HEADER_BYTES:
        raise InputError(f"manifest: {len(raw)} bytes; its header alone has {HEADER_BYTES}")
    name, header_length, length, journal, slots, digest = struct.unpack_from("<24sQQQQ32s", raw)
    found = name.rstrip(b"\0").decode("ascii", "backslashreplace")
    if name != COMPATIBLE.encode().ljust(24, b"\0"):
        raise InputError(f"manifest: version {found!r}; this iokeep reads {COMPATIBLE!r}")
    if header_length != HEADER_BYTES or raw[88:HEADER_BYTES].strip(b"\0"):
        raise InputError(
            f"manifest: header of {header_length} bytes with unknown content; expected {HEADER_BYTES}"
        )
    if length > MAX_PAYLOAD or not 1 <= slots <= MAX_SLOTS:
        raise InputError(f"manifest: payload of {length} bytes and {slots} journal slots are out of bounds")
    if journal != _journal_at(length) or journal + FRAME + slots * SLOT_BYTES > size:
        raise InputError(f"manifest: a journal at {journal:#x} does not fit a file of {size:#x} bytes")
    return Header(length, journal, slots, digest)


def read_payload(raw: bytes, header: Header) -> Manifest:
    """The manifest behind a checked header. ``raw`` is the file from its start up to the journal, or more.

    :raises InputError: the digest or the content is wrong.
    """
    front = raw[: header.journal_offset]
    if len(front) != header.journal_offset:
        raise InputError(f"manifest: the file ends after {len(front)} of {header.journal_offset} bytes")
    if not hmac.compare_digest(_digest(front), header.digest):
        raise InputError("manifest: its blake2b-256 digest does not match its bytes")
    return Manifest.from_bytes(front[HEADER_BYTES : HEADER_BYTES + header.payload_length])
