# SPDX-License-Identifier: Apache-2.0
"""Flattened device trees: reader and writer of version 17 (Devicetree Specification v0.4, chapter 5).

Header, structure and lengths are big-endian 32-bit words. What Linux puts *into* KHO's properties is native
little-endian and only 4-byte aligned; that is the business of the callers.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from iokeep.errors import InputError

FDT_MAGIC = 0xD00DFEED
FDT_BEGIN_NODE = 1
FDT_END_NODE = 2
FDT_PROP = 3
FDT_NOP = 4
FDT_END = 9
FDT_VERSION = 17
FDT_LAST_COMPATIBLE_VERSION = 16
_HEADER = struct.Struct(">10I")
HEADER_LENGTH = _HEADER.size
#: nesting that is read: KHO uses 1, memblock 1
MAX_DEPTH = 16


@dataclass(slots=True)
class Node:
    """A node: ``name`` ("" for the root), properties and children in the order of the blob."""

    name: str
    props: list[tuple[str, bytes]] = field(default_factory=list)
    children: list[Node] = field(default_factory=list)

    def get(self, name: str) -> bytes | None:
        """Value of the first property of that name."""
        return next((value for n, value in self.props if n == name), None)

    def text(self, name: str) -> str | None:
        """A property as one NUL-terminated string; None when absent or not such a string."""
        value = self.get(name)
        if not value or value[-1] or b"\0" in value[:-1]:
            return None
        try:
            return value[:-1].decode()
        except UnicodeDecodeError:
            return None

    def u64(self, name: str) -> int | None:
        """A property as one native little-endian u64, as KHO stores them;
        None when absent or of another length.
        """
        value = self.get(name)
        return int.from_bytes(value, "little") if value is not None and len(value) == 8 else None


def total_size(header: bytes, what: str) -> int:
    """``totalsize`` of the blob that starts with ``header`` (at least 8 bytes).

    :raises InputError: no magic.
    """
    magic, size = struct.unpack_from(">II", header)
    if magic != FDT_MAGIC:
        raise InputError(f"{what}: magic is {magic:#010x}, an FDT has {FDT_MAGIC:#010x}")
    return int(size)


def parse(data: bytes, what: str = "FDT") -> Node:
    """The root node of a blob. Bytes behind ``totalsize`` are ignored.

    :raises InputError: names the byte and the rule that the blob breaks.
    """
    if len(data) < HEADER_LENGTH:
        raise InputError(f"{what}: {len(data)} bytes are no FDT header")
    size = total_size(data, what)
    _, _, off_struct, off_strings, _, version, last_compatible, _, size_strings, size_struct = (
        _HEADER.unpack_from(data)
    )
    if size > len(data) or size < HEADER_LENGTH:
        raise InputError(f"{what}: totalsize {size:#x} is not within the {len(data):#x} bytes there")
    if version < FDT_LAST_COMPATIBLE_VERSION or last_compatible > FDT_VERSION:
        raise InputError(
            f"{what}: FDT version {version} (compatible to {last_compatible}); supported: 16, 17"
        )
    if off_struct % 4 or off_struct + size_struct > size or off_strings + size_strings > size:
        raise InputError(f"{what}: structure or strings block reaches beyond totalsize {size:#x}")
    strings = data[off_strings : off_strings + size_strings]
    at, end = off_struct, off_struct + size_struct

    def fail(rule: str) -> InputError:
        return InputError(f"{what}: byte {at:#x}: {rule}")

    def word() -> int:
        nonlocal at
        if at + 4 > end:
            raise fail("the structure block ends early")
        value = int.from_bytes(data[at : at + 4], "big")
        at += 4
        return value

    root: Node | None = None
    path: list[Node] = []
    while True:
        token = word()
        if token == FDT_BEGIN_NODE:
            stop = data.find(b"\0", at, end)
            if stop < 0:
                raise fail("a node's name does not end")
            try:
                node = Node(data[at:stop].decode("ascii"))
            except UnicodeDecodeError:
                raise fail("a node's name is not ASCII") from None
            at = (stop + 4) & ~3
            if path:
                path[-1].children.append(node)
            elif root is None:
                root = node
            else:
                raise fail("a second root node")
            path.append(node)
            if len(path) > MAX_DEPTH:
                raise fail(f"more than {MAX_DEPTH} levels of nodes")
        elif token == FDT_END_NODE:
            if not path:
                raise fail("END_NODE without a node")
            path.pop()
        elif token == FDT_PROP:
            length, name_at = word(), word()
            if not path:
                raise fail("a property outside of a node")
            if path[-1].children:
                raise fail("a property after a subnode")
            stop = strings.find(b"\0", name_at) if name_at < len(strings) else -1
            if stop < 0:
                raise fail(f"property name at string {name_at:#x} is outside of the strings block")
            if at + length > end:
                raise fail(f"property of {length:#x} bytes reaches beyond the structure block")
            try:
                name = strings[name_at:stop].decode("ascii")
            except UnicodeDecodeError:
                raise fail("a property's name is not ASCII") from None
            path[-1].props.append((name, data[at : at + length]))
            at = (at + length + 3) & ~3
        elif token == FDT_END:
            if path or root is None:
                raise fail("END within a node" if path else "no root node")
            return root
        elif token != FDT_NOP:
            raise fail(f"unknown token {token:#x}")


def build(root: Node, strings: Sequence[str] = ()) -> bytes:
    """The blob of a tree as libfdt packs it: header, empty reservation map, structure, strings.

    :param strings: names that come first in the strings block, in this order; others follow as they are
        met. (libfdt's order depends on the calls that made the blob; readers do not care, byte-for-byte
        comparison does.)
    """
    table = bytearray()
    offsets: dict[str, int] = {}

    def string(name: str) -> int:
        if name not in offsets:
            offsets[name] = len(table)
            table.extend(name.encode("ascii") + b"\0")
        return offsets[name]

    for name in strings:
        string(name)
    out = bytearray()

    def pad() -> None:
        out.extend(bytes(-len(out) % 4))

    def emit(node: Node) -> None:
        out.extend(struct.pack(">I", FDT_BEGIN_NODE) + node.name.encode("ascii") + b"\0")
        pad()
        for name, value in node.props:
            out.extend(struct.pack(">III", FDT_PROP, len(value), string(name)) + value)
            pad()
        for child in node.children:
            emit(child)
        out.extend(struct.pack(">I", FDT_END_NODE))

    emit(root)
    out.extend(struct.pack(">I", FDT_END))
    reserve = bytes(16)
    off_struct = HEADER_LENGTH + len(reserve)
    off_strings = off_struct + len(out)
    header = _HEADER.pack(
        FDT_MAGIC,
        off_strings + len(table),
        off_struct,
        off_strings,
        HEADER_LENGTH,
        FDT_VERSION,
        FDT_LAST_COMPATIBLE_VERSION,
        0,
        len(table),
        len(out),
    )
    return header + reserve + bytes(out) + bytes(table)
