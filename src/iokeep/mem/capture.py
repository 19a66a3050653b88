# SPDX-License-Identifier: Apache-2.0
"""Captures: the table pages of one domain in a directory, ``iokeep.capture-v1``.

* ``meta.json``: ``schema``, ``format``, ``config``, ``root_pa`` ("0x..."), and what else is known.
* ``tables.npz``: ``pa`` uint64[n] and ``data`` uint8[n, page]: n pages, page = 4096, or the granule.
* ``truth.tsv`` (optional): header ``iova pa length prot``, one extent a line.

Nothing in it is trusted: sizes are checked against the size of the file before anything is allocated.
"""

from __future__ import annotations

import ast
import json
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from iokeep.errors import InputError, MemoryAbsent
from iokeep.mem.memory import I64, U8, U64

SCHEMA = "iokeep.capture-v1"
#: a capture beyond these is refused unread
META_LIMIT = 16 << 20
TSV_LIMIT = 8 << 30
#: deflate cannot compress better than 1032 : 1 (RFC 1951: 258 bytes need at least 2 bits)
DEFLATE_RATIO = 1032
PAGE_SIZES = (4096, 16384, 65536)
#: prot as in truth.tsv -> IOMMU_READ | IOMMU_WRITE
PROT = {"rw": 3, "r-": 1, "-w": 2}

ExtentRows = tuple[U64, U64, U64, U8]


@dataclass(frozen=True, slots=True)
class PageRows:
    """Rows view of sparse pages. ``data`` uint8[n, row_bytes]; ``pas`` uint64[n] sorted pa of each row."""

    data: U8
    pas: U64
    row_bytes: int

    @property
    def linear(self) -> bool:
        """See :attr:`iokeep.mem.memory.Rows.linear`."""
        return False

    def index(self, pas: U64) -> I64:
        """See :meth:`iokeep.mem.memory.Rows.index`."""
        if not len(self.pas):
            return np.full(len(pas), -1, np.int64)
        want = pas & ~np.uint64(self.row_bytes - 1)
        at = np.minimum(np.searchsorted(self.pas, want), len(self.pas) - 1)
        return np.where(self.pas[at] == want, at, -1).astype(np.int64)


class PageMemory:
    """Memory made of pages; a page that is not there is absent, not zero.

    :param pas: uint64[n], multiples of the page size, each once. :param data: uint8[n, page].
    """

    def __init__(self, pas: U64, data: U8) -> None:
        order = np.argsort(pas, kind="stable")
        in_order = bool((order[1:] > order[:-1]).all())
        self.page = int(data.shape[1])
        self._rows = PageRows(
            np.ascontiguousarray(data if in_order else data[order]),
            pas if in_order else pas[order],
            self.page,
        )
        if bool((self._rows.pas & np.uint64(self.page - 1)).any()) or bool(
            (self._rows.pas[1:] == self._rows.pas[:-1]).any()
        ):
            raise ValueError("pages are not aligned, or not each once")

    def read(self, pa: int, length: int) -> bytes:
        """See :meth:`iokeep.mem.memory.Memory.read`."""
        if pa < 0 or length < 0 or pa + length > 1 << 64:
            raise MemoryAbsent(max(pa, 0), length)
        out = []
        while length:
            offset = pa % self.page
            n = min(length, self.page - offset)
            row = int(self._rows.index(np.array([pa], np.uint64))[0])
            if row < 0:
                raise MemoryAbsent(pa, length)
            out.append(self._rows.data[row, offset : offset + n].tobytes())
            pa, length = pa + n, length - n
        return b"".join(out)

    def rows(self, row_bytes: int) -> PageRows:
        """See :meth:`iokeep.mem.memory.Memory.rows`. Rows larger than a page are there where all their pages
        are.
        """
        if row_bytes == self.page:
            return self._rows
        pas, data = self._rows.pas, self._rows.data
        if row_bytes < self.page:
            parts = self.page // row_bytes
            steps = np.arange(parts, dtype=np.uint64) * np.uint64(row_bytes)
            return PageRows(data.reshape(-1, row_bytes), (pas[:, None] + steps).reshape(-1), row_bytes)
        parts = row_bytes // self.page
        starts = np.flatnonzero((pas & np.uint64(row_bytes - 1)) == 0)
        starts = starts[starts + parts <= len(pas)]
        span = np.uint64(row_bytes - self.page)
        whole = starts[pas[starts + parts - 1] - pas[starts] == span]
        chosen = whole[:, None] + np.arange(parts)
        return PageRows(data[chosen].reshape(len(whole), row_bytes), pas[whole], row_bytes)


class Capture:
    """One capture.

    :param meta: ``meta.json`` as a dict. :param pas: uint64[n] pages. :param data: uint8[n, page].
    :param path: where it came from, or None.
    """

    def __init__(self, meta: Mapping[str, Any], pas: U64, data: U8, path: Path | None = None) -> None:
        self.meta = dict(meta)
        self.path = path
        self.memory = PageMemory(pas, data)

    @property
    def format(self) -> str:
        """Name of the page-table format."""
        return _text(self.meta, "format", self._where)

    @property
    def config(self) -> dict[str, Any]:
        """Configuration of the format."""
        config = self.meta.get("config", {})
        if not isinstance(config, dict):
            raise InputError(f'{self._where}: "config" is not an object')
        return config

    @property
    def root_pa(self) -> int:
        """Pa of the root table."""
        return _address(self.meta, "root_pa", self._where)

    @property
    def _where(self) -> str:
        return str(self.path / "meta.json") if self.path else "meta"

    @property
    def has_truth(self) -> bool:
        """True where there is a ``truth.tsv``."""
        return self.path is not None and (self.path / "truth.tsv").is_file()

    @classmethod
    def load(cls, path: str | Path) -> Capture:
        """Read a capture directory. :raises InputError: it is none, or any part of it is malformed."""
        path = Path(path)
        meta, pas, data = read_pages(path)
        out = cls(meta, pas, data, path)
        # Fail here, with the file's name, not when they are first used.
        _ = out.format, out.config, out.root_pa
        return out

    def truth(self) -> ExtentRows:
        """``truth.tsv`` as arrays (iova, last, pa, prot). :raises InputError: absent or malformed."""
        if self.path is None:
            raise InputError("this capture is not from a directory and has no truth.tsv")
        return read_tsv(self.path / "truth.tsv")

    def save(self, path: str | Path, truth: ExtentRows | None = None) -> None:
        """Write the directory. :raises InputError: something is already there."""
        path = Path(path)
        rows = self.memory.rows(self.memory.page)
        write_pages(path, self.meta, rows.pas, rows.data)
        if truth is not None:
            with (path / "truth.tsv").open("w", encoding="ascii") as file:
                for part in tsv_lines(*truth):
                    file.write(part)


def read_pages(path: Path) -> tuple[dict[str, Any], U64, U8]:
    """``meta.json`` and the pages (pa uint64[n], data uint8[n, page]) of a capture directory of any content.

    :raises InputError: it is none, or any part of it is malformed.
    """
    if not path.is_dir():
        raise InputError(
            f"{path}: {'is no directory' if path.exists() else 'no such directory'}",
            "a SOURCE is a capture: a directory with meta.json and tables.npz",
        )
    return _read_meta(path / "meta.json"), *_read_tables(path / "tables.npz")


def write_pages(path: Path, meta: Mapping[str, Any], pas: U64, data: U8) -> None:
    """Write ``meta.json`` and ``tables.npz`` into a new directory. :raises InputError: something is there."""
    try:
        path.mkdir(parents=True, exist_ok=False)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    body = {"schema": SCHEMA, **{k: v for k, v in meta.items() if k != "schema"}}
    (path / "meta.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    np.savez_compressed(path / "tables.npz", pa=pas, data=data)


# -- meta.json -----------------------------------------------------------------------------------------


def _read_limited(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            # read(limit) would allocate the limit.
            size = os.fstat(file.fileno()).st_size
            raw = file.read(min(size, limit) + 1)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    if len(raw) > limit:
        raise InputError(f"{path}: more than {limit} bytes")
    return raw


def _read_meta(path: Path) -> dict[str, Any]:
    raw = _read_limited(path, META_LIMIT)
    try:
        meta = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start}: not UTF-8") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}") from error
    except (RecursionError, ValueError) as error:  # nested too deep; an integer of too many digits
        raise InputError(f"{path}: not readable as JSON: {str(error)[:80]}") from error
    if not isinstance(meta, dict):
        raise InputError(f"{path}: not a JSON object")
    if meta.get("schema") != SCHEMA:
        raise InputError(
            f"{path}: schema {str(meta.get('schema'))[:64]!r} is not known", f"this reads {SCHEMA!r}"
        )
    return meta


def _text(meta: Mapping[str, Any], key: str, where: str) -> str:
    value = meta.get(key)
    if not isinstance(value, str):
        raise InputError(f'{where}: "{key}" is missing or no string')
    return value


def _address(meta: Mapping[str, Any], key: str, where: str) -> int:
    text = _text(meta, key, where)
    if not re.fullmatch(r"0x[0-9a-fA-F]{1,16}", text):
        raise InputError(f'{where}: "{key}" = {text[:40]!r} is no "0x..." value of at most 64 bits')
    return int(text, 16)


# -- tables.npz ----------------------------------------------------------------------------------------


def _read_tables(path: Path) -> tuple[U64, U8]:
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            pas = _read_npy(archive, "pa", path, size)
            if pas.dtype != np.dtype("<u8") or pas.ndim != 1:
                raise InputError(f"{path}: pa is {pas.dtype}{list(pas.shape)}, not uint64[n]")
            data = _read_npy(archive, "data", path, size)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except (
        zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, RuntimeError, EOFError, ValueError,
    ) as error:  # fmt: skip
        # RuntimeError: encrypted; NotImplementedError: a compression method that zipfile lacks
        # zipfile quotes whole headers, which in a damaged file are anything
        why = str(error) if str(error).isprintable() and len(str(error)) < 200 else type(error).__name__
        raise InputError(f"{path}: not a readable .npz: {why}") from error
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] not in PAGE_SIZES:
        raise InputError(
            f"{path}: data is {data.dtype}{list(data.shape)}, not uint8[n, 4096 | 16384 | 65536]"
        )
    if len(pas) != len(data):
        raise InputError(f"{path}: {len(pas)} pas for {len(data)} pages")
    pas = pas.astype(np.uint64, copy=False)
    bad = np.flatnonzero(pas & np.uint64(data.shape[1] - 1))
    if len(bad):
        raise InputError(
            f"{path}: pa[{bad[0]}] = {int(pas[bad[0]]):#x} is not aligned to {data.shape[1]} bytes"
        )
    ordered = np.sort(pas)
    twice = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(twice):
        raise InputError(f"{path}: pa {int(ordered[twice[0]]):#x} is there twice")
    return pas, data


def _read_npy(archive: zipfile.ZipFile, name: str, path: Path, file_size: int) -> NDArray[Any]:
    """One array; its claimed size is checked against what the file can hold before anything is allocated."""
    members = [m for m in archive.infolist() if m.filename == f"{name}.npy"]
    if len(members) != 1:
        raise InputError(f"{path}: {len(members)} members {name}.npy, wanted one")
    member = members[0]
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InputError(f"{path}: {name}.npy is compressed by method {member.compress_type}, not by deflate")
    if member.compress_size > file_size or member.file_size > file_size * DEFLATE_RATIO + 4096:
        raise InputError(
            f"{path}: {name}.npy claims {member.file_size} bytes, more than {file_size} bytes can hold"
        )
    with archive.open(member) as file:
        dtype, shape, header = _npy_header(file, f"{path}: {name}.npy")
        count = 1
        for n in shape:
            count *= n
        want = count * dtype.itemsize
        if want != member.file_size - header:
            raise InputError(
                f"{path}: {name}.npy: {dtype}{list(shape)} needs {want} bytes, "
                f"the member has {member.file_size - header}"
            )
        out = np.empty(want, np.uint8)
        done = 0
        while done < want:
            part = file.read(min(want - done, 16 << 20))
            if not part:
                raise InputError(f"{path}: {name}.npy ends at byte {header + done} of {member.file_size}")
            out[done : done + len(part)] = np.frombuffer(part, np.uint8)
            done += len(part)
        if file.read(1):
            raise InputError(f"{path}: {name}.npy is longer than it claims")
    return out.view(dtype).reshape(shape)


def _npy_header(file: IO[bytes], where: str) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    """dtype, shape and length of a .npy header (NEP 1), parsed strictly."""
    magic = file.read(8)
    if len(magic) < 8 or magic[:6] != b"\x93NUMPY" or magic[6] not in (1, 2, 3):
        raise InputError(f"{where}: byte 0: not a .npy header")
    width = 2 if magic[6] == 1 else 4
    raw = file.read(width)
    if len(raw) < width:
        raise InputError(f"{where}: byte 8: ends in its header")
    length = struct.unpack("<H" if width == 2 else "<I", raw)[0]
    if length > 4096:
        raise InputError(f"{where}: byte 8: a header of {length} bytes")
    text = file.read(length)
    try:
        fields = ast.literal_eval(text.decode("latin-1").strip())
        dtype, order, shape = fields["descr"], fields["fortran_order"], fields["shape"]
    except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError) as error:
        raise InputError(f"{where}: byte 10: malformed header") from error
    if dtype not in ("<u8", "|u1") or order is not False:
        raise InputError(
            f"{where}: dtype {str(dtype)[:32]!r}, fortran_order {str(order)[:8]}: not '<u8' or '|u1', False"
        )
    if (
        not isinstance(shape, tuple)
        or not 1 <= len(shape) <= 2
        or not all(type(n) is int and 0 <= n < 1 << 40 for n in shape)
    ):
        raise InputError(f"{where}: malformed shape")
    return np.dtype(dtype), shape, 8 + width + length


# -- truth.tsv -----------------------------------------------------------------------------------------

_HEADER = b"iova\tpa\tlength\tprot\n"
#: further columns, which may follow in any order
_FURTHER = (b"attrs", b"lg2")
#: attrs of a TSV file -> IOMMU_CACHE, IOMMU_NOEXEC, IOMMU_MMIO, IOMMU_PRIV
ATTRS = {"cache": 1 << 2, "noexec": 1 << 3, "mmio": 1 << 4, "priv": 1 << 5}
_LINE = re.compile(rb"(0x[0-9a-f]{1,16})\t(0x[0-9a-f]{1,16})\t(0x[0-9a-f]{1,17})\t(rw|r-|-w)")


def read_tsv(path: str | Path) -> ExtentRows:
    """Extents from a TSV file: (iova, last, pa, prot) arrays, sorted and disjoint.

    :raises InputError: naming file and line of what is wrong.
    """
    return read_expected(path)[0]


def read_expected(path: str | Path) -> tuple[ExtentRows, U8 | None, U8 | None]:
    """:func:`read_tsv`, the IOMMU_* flags of each extent where there is a column ``attrs``, and log2 of its
    leaves' bytes where there is a column ``lg2``.

    ``attrs`` is "-", or names of :data:`ATTRS` with commas between; ``lg2`` is a decimal number, 10 ... 63.

    :raises InputError: naming file and line of what is wrong.
    """
    path = Path(path)
    parts: list[ExtentRows] = []
    flags: list[U8] = []
    sizes: list[U8] = []
    further: list[bytes] = []
    try:
        if path.stat().st_size > TSV_LIMIT:
            raise InputError(f"{path}: more than {TSV_LIMIT} bytes")
        with path.open("rb") as file:
            header = file.readline(64)
            base, _, rest = header.rstrip(b"\n").partition(b"prot")
            further = rest.split(b"\t")[1:]
            known = rest[:1] in (b"", b"\t") and len(set(further)) == len(further)
            if base + b"prot\n" != _HEADER or not known or any(name not in _FURTHER for name in further):
                raise InputError(
                    f"{path}: line 1: not the header iova, pa, length, prot (tab-separated)",
                    "columns attrs and lg2 may follow",
                )
            number, before = 2, -1
            while block := file.read(_BLOCK):
                if not block.endswith(b"\n"):
                    block += file.readline(128)
                for name in reversed(further):
                    split, into = (_split_attrs, flags) if name == b"attrs" else (_split_lg2, sizes)
                    block, more = split(block, path, number)
                    into.append(more)
                rows = _parse_fast(block)
                if rows is None or int(rows[0][0]) <= before:
                    rows = _parse_lines(block, path, number, before)
                parts.append(rows)
                number, before = number + len(rows[0]), int(rows[1][-1])
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    if not parts:
        none, nothing = np.zeros(0, np.uint64), np.zeros(0, np.uint8)
        attrs, lg2 = (nothing if name in further else None for name in _FURTHER)
        return (none, none, none, nothing), attrs, lg2
    rows = (
        np.concatenate([p[0] for p in parts]),
        np.concatenate([p[1] for p in parts]),
        np.concatenate([p[2] for p in parts]),
        np.concatenate([p[3] for p in parts]),
    )
    return rows, np.concatenate(flags) if flags else None, np.concatenate(sizes) if sizes else None


def _shown(text: bytes) -> str:
    return repr(text[:60].decode("ascii", "replace"))


def _split_lg2(block: bytes, path: Path, number: int) -> tuple[bytes, U8]:
    """Lines without their last column, and the leaf size that it says."""
    lines: list[bytes] = []
    sizes: list[int] = []
    for line in block.removesuffix(b"\n").split(b"\n"):
        rest, _, text = line.rpartition(b"\t")
        if not re.fullmatch(rb"[1-9][0-9]", text) or int(text) > 63:
            raise InputError(
                f"{path}: line {number + len(lines)}: lg2 {_shown(text)} is no log2 of a leaf's bytes",
                "lg2 is a decimal number: 12 is 4K, 21 is 2M, 30 is 1G",
            )
        lines.append(rest)
        sizes.append(int(text))
    return b"\n".join(lines) + b"\n", np.array(sizes, np.uint8)


def _split_attrs(block: bytes, path: Path, number: int) -> tuple[bytes, U8]:
    """Lines without their last column, and the flags that it says."""
    known: dict[bytes, int] = {b"-": 0}
    lines: list[bytes] = []
    flags: list[int] = []
    for line in block.removesuffix(b"\n").split(b"\n"):
        rest, _, text = line.rpartition(b"\t")
        value = known.get(text)
        if value is None:
            value = 0
            for name in text.decode("ascii", "replace").split(","):
                if name not in ATTRS:
                    raise InputError(
                        f"{path}: line {number + len(lines)}: attrs {_shown(text)} is not known",
                        f"attrs is -, or of {', '.join(ATTRS)} with commas between",
                    )
                value |= ATTRS[name]
            known[text] = value
        lines.append(rest)
        flags.append(value)
    return b"\n".join(lines) + b"\n", np.array(flags, np.uint8)


_BLOCK = 4 << 20
_NIBBLE = np.full(256, 255, np.uint8)
_NIBBLE[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)


def _hex_column(raw: U8, start: I64, end: I64) -> U64 | None:
    """Values of the fields raw[start:end], each 0x and 1 to 16 digits; None where one is not."""
    digits = end - start - 2
    if int(digits.min()) < 1 or int(digits.max()) > 16:
        return None
    if bool((raw[start] != ord("0")).any() or (raw[start + 1] != ord("x")).any()):
        return None
    value = np.zeros(len(start), np.uint64)
    for k in range(int(digits.max())):
        inside = digits > k
        nibble = _NIBBLE[raw[np.where(inside, start + 2 + k, start)]]  # beyond the end: the leading 0
        if int(nibble.max()) == 255:
            return None
        value = np.where(inside, (value << np.uint64(4)) | nibble, value)
    return value


def _parse_fast(block: bytes) -> ExtentRows | None:
    """Whole lines by array work; None where any of them is not of the plain form (then line by line)."""
    raw = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(raw == ord("\n"))
    tabs = np.flatnonzero(raw == ord("\t"))
    if not len(ends) or int(ends[-1]) != len(raw) - 1 or len(tabs) != 3 * len(ends):
        return None
    starts = np.concatenate((np.zeros(1, np.int64), ends[:-1] + 1))
    one, two, three = tabs[0::3], tabs[1::3], tabs[2::3]
    if bool((one < starts).any() or (three > ends - 3).any() or (ends - three != 3).any()):
        return None
    columns = [_hex_column(raw, a, b) for a, b in ((starts, one), (one + 1, two), (two + 1, three))]
    iova, pa, length = columns
    if iova is None or pa is None or length is None:
        return None
    first, second = raw[three + 1], raw[three + 2]
    r, w = first == ord("r"), second == ord("w")
    if not bool(((r | (first == ord("-"))) & (w | (second == ord("-"))) & (r | w)).all()):
        return None
    last = iova + (length - np.uint64(1))
    if bool(
        (length == 0).any()
        or (last < iova).any()
        or (pa + (length - np.uint64(1)) < pa).any()
        or (iova[1:] <= last[:-1]).any()
    ):
        return None
    return iova, last, pa, r.astype(np.uint8) | (w.astype(np.uint8) << np.uint8(1))


def _parse_lines(block: bytes, path: Path, number: int, before: int) -> ExtentRows:
    """Line by line: for what the fast path does not take, and to say what is wrong where."""
    rows: list[tuple[int, int, int, int]] = []
    for line in block.removesuffix(b"\n").split(b"\n"):
        match = _LINE.fullmatch(line)
        if match is None:
            raise InputError(
                f"{path}: line {number}: {line[:60]!r} is not iova, pa, length (0x...) "
                "and rw|r-|-w with tabs between"
            )
        iova, pa, length = (int(match[n], 16) for n in (1, 2, 3))
        if length == 0 or iova + length > 1 << 64 or pa + length > 1 << 64:
            raise InputError(f"{path}: line {number}: length {length:#x} is empty or goes beyond 2**64")
        if iova <= before:
            raise InputError(
                f"{path}: line {number}: iova {iova:#x} is not above {before:#x}, where the line before ends"
            )
        before = iova + length - 1
        rows.append((iova, before, pa, PROT[match[4].decode()]))
        number += 1
    columns = list(zip(*rows, strict=True))
    return (
        np.array(columns[0], np.uint64),
        np.array(columns[1], np.uint64),
        np.array(columns[2], np.uint64),
        np.array(columns[3], np.uint8),
    )


def attrs_text(flags: int) -> str:
    """``attrs`` of a TSV file."""
    return ",".join(name for name, flag in ATTRS.items() if flags & flag) or "-"


def tsv_lines(iova: U64, last: U64, pa: U64, prot: U8, attrs: U8 | None = None) -> Iterable[str]:
    """The text of a TSV file, some thousand lines at a time; ``attrs``: the column, None = without it."""
    names = {bits: text for text, bits in PROT.items()}
    if attrs is not None:
        yield _HEADER.decode().replace("\n", "\tattrs\n")
        columns = (iova.tolist(), last.tolist(), pa.tolist(), prot.tolist(), attrs.tolist())
        for a, z, p, q, f in zip(*columns, strict=True):
            yield f"{a:#x}\t{p:#x}\t{z - a + 1:#x}\t{names[q]}\t{attrs_text(f)}\n"
        return
    yield _HEADER.decode()
    for lo in range(0, len(iova), 8192):
        hi = lo + 8192
        yield "".join(
            f"{a:#x}\t{p:#x}\t{z - a + 1:#x}\t{names[q]}\n"
            for a, z, p, q in zip(
                iova[lo:hi].tolist(),
                last[lo:hi].tolist(),
                pa[lo:hi].tolist(),
                prot[lo:hi].tolist(),
                strict=True,
            )
        )
