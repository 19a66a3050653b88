#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Generate src/iokeep/uapi/{iommufd,liveupdate,vfio,kho}.py from the kernel ABI manifest.

The manifest (uapi/abi/linux-*.json) was taken from a compiler's view of the kernel's headers, so every size
and offset is a fact; this tool refuses to write a structure whose ctypes layout would differ from it.

    tools/gen_abi.py            write the modules
    tools/gen_abi.py --check    exit 1 when a module on disk is not what this tool writes
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
UAPI = ROOT / "src" / "iokeep" / "uapi"
MANIFEST = UAPI / "abi" / "linux-7.3.4.json"
MODULES = {"iommufd.h": "iommufd", "liveupdate.h": "liveupdate", "vfio.h": "vfio", "kho": "kho"}

SCALARS = {
    "__u8": ("c_uint8", 1),
    "u8": ("c_uint8", 1),
    "__u16": ("c_uint16", 2),
    "u16": ("c_uint16", 2),
    "__u32": ("c_uint32", 4),
    "u32": ("c_uint32", 4),
    "__s32": ("c_int32", 4),
    "__u64": ("c_uint64", 8),
    "u64": ("c_uint64", 8),
    "__le64": ("c_uint64", 8),
    "char": ("c_char", 1),
    "unsigned int": ("c_uint32", 4),
    "unsigned short": ("c_uint16", 2),
    "unsigned long": ("c_uint64", 8),  # the manifest is for LP64
}
ARRAY = re.compile(r"^(?P<item>.*?) \[(?P<count>\d*)\]$")


class Layout:
    """Sizes and alignments of the structures of one header."""

    def __init__(self, structs: dict[str, Any]) -> None:
        self.structs = structs

    def of(self, member: dict[str, Any]) -> tuple[int, int]:
        """(size, alignment) in bytes of one member in the C ABI of x86-64."""
        text = member["type"]
        if found := ARRAY.match(text):
            size, align = self.of({"type": found["item"]})
            return size * int(found["count"] or 0), align
        if text.endswith("*"):
            return 8, 8
        if text in SCALARS:
            size = SCALARS[text][1]
            return size, size
        if text.startswith("struct "):
            inner = self.structs[text.removeprefix("struct ")]
            return inner["size"], max(self.of(each)[1] for each in fields_of(inner["members"]))
        if text.startswith("union"):
            arms = member.get("members")
            if not arms:  # a named union of pointer and physical address: the manifest gives its size only
                return member["size"], member["size"]
            pairs = [self.of(each) for each in arms]
            align = max(pair[1] for pair in pairs)
            return -(-max(pair[0] for pair in pairs) // align) * align, align
        raise SystemExit(f"gen_abi: unknown C type {text!r}")

    def needs_pack(self, name: str) -> bool:
        """Whether natural alignment does not give the manifest's offsets; refuses what packing cannot."""
        members = fields_of(self.structs[name]["members"])
        for packed in (False, True):
            at = 0
            widest = 1
            fits = True
            for member in members:
                size, align = self.of(member)
                align = 1 if packed else align
                widest = max(widest, align)
                at = -(-at // align) * align
                fits = fits and at == member["offset"]
                at += size
            if fits and -(-at // widest) * widest == self.structs[name]["size"]:
                return packed
        raise SystemExit(f"gen_abi: no layout explains struct {name}")


def fields_of(members: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Members with C bit-fields joined into the one integer that holds them."""
    out: list[dict[str, Any]] = []
    for member in members:
        if "bit_offset" not in member:
            out.append(member)
        elif member["bit_offset"] == 0:
            out.append(
                {"name": member["name"], "offset": member["offset"], "type": member["type"], "bits": [member]}
            )
        else:
            out[-1]["name"] += "_" + member["name"]
            out[-1]["bits"].append(member)
    return out


def ctype(member: dict[str, Any]) -> tuple[str, str]:
    """(ctypes expression, Python annotation) of a member that is no anonymous union."""
    text = member["type"]
    if found := ARRAY.match(text):
        item, _ = ctype({"type": found["item"]})
        if found["item"] == "char":
            return f"{item} * {int(found['count'])}", "bytes"
        return f"{item} * {int(found['count'] or 0)}", f"ctypes.Array[{item}]"
    if text.endswith("*") or text.startswith("union"):
        return "ctypes.c_uint64", "int"
    if text in SCALARS:
        return f"ctypes.{SCALARS[text][0]}", "int"
    name = text.removeprefix("struct ")
    return name, name


def structure(layout: Layout, name: str) -> list[str]:
    """Source lines of one structure, its unions first."""
    entry = layout.structs[name]
    packed = layout.needs_pack(name)
    lines: list[str] = []
    annotations: list[str] = []
    fields: list[str] = []
    anonymous: list[str] = []
    masks: list[str] = []
    for member in fields_of(entry["members"]):
        if member["name"] is None:
            union = f"_{name}_at_{member['offset']}"
            arms = [(arm["name"], *ctype(arm)) for arm in member["members"]]
            lines += ["", "", f"class {union}(ctypes.Union):"]
            lines += [f"    {arm}: {hint}" for arm, _, hint in arms]
            lines += ["    _fields_ = ["]
            lines += [f'        ("{arm}", {code}),' for arm, code, _ in arms]
            lines += ["    ]"]
            annotations += [f"    {arm}: {hint}" for arm, _, hint in arms]
            fields.append(f'        ("_at_{member["offset"]}", {union}),')
            anonymous.append(f'"_at_{member["offset"]}"')
            continue
        code, hint = ctype(member)
        annotations.append(f"    {member['name']}: {hint}")
        fields.append(f'        ("{member["name"]}", {code}),')
        for bits in member.get("bits", []):
            stem = f"{name}_{bits['name']}".upper()
            masks.append(f"{stem}_SHIFT = {bits['bit_offset']}")
            masks.append(f"{stem}_MASK = 0x{((1 << bits['bits']) - 1) << bits['bit_offset']:016X}")
    lines += ["", "", f"class {name}(ctypes.Structure):"]
    lines += [f'    """struct {name}, {entry["size"]} bytes."""', ""]
    lines += annotations
    if packed:
        lines += ["    _pack_ = 1", '    _layout_ = "ms"']
    if anonymous:
        lines += [f"    _anonymous_ = ({', '.join(anonymous)},)"]
    lines += ["    _fields_ = ["]
    lines += fields
    lines += ["    ]"]
    if masks:
        lines += ["", "", f"# Bit-fields of struct {name}: value = (field & MASK) >> SHIFT.", *masks]
    return lines


def order(structs: dict[str, Any]) -> list[str]:
    """Names so that a structure comes after those that it holds."""
    done: list[str] = []

    def visit(name: str) -> None:
        if name in done:
            return
        for member in structs[name]["members"]:
            for each in [member, *(member.get("members") or [])]:
                text = each["type"]
                if found := ARRAY.match(text):
                    text = found["item"]
                if text.startswith("struct "):
                    visit(text.removeprefix("struct "))
        done.append(name)

    for name in sorted(structs):
        visit(name)
    return done


def number(name: str, value: int) -> str:
    """An integer literal: request numbers and wide values in hex."""
    return f"{name} = 0x{value:X}" if value >= 1 << 12 else f"{name} = {value}"


def module(manifest: dict[str, Any], header: str) -> str:
    """Source text of the module of one header."""
    part = manifest["headers"][header]
    layout = Layout(part["structs"])
    where = "include/linux/kho/abi/*.h" if header == "kho" else f"include/uapi/linux/{header}"
    lines = [
        "# SPDX-License-Identifier: Apache-2.0",
        f'"""Linux {manifest["kernel"]} {where}.',
        "",
        f"Generated by tools/gen_abi.py from uapi/abi/{MANIFEST.name}; do not edit. Names are the kernel's.",
        '"""',
        "",
        "from __future__ import annotations",
        "",
        "import ctypes",
    ]
    for enum, values in sorted(part.get("enums", {}).items()):
        lines += ["", f"# enum {enum}"]
        lines += [number(name, value) for name, value in values.items()]
    constants = part.get("constants", {})
    strings = sorted(
        name for name in constants if name.startswith("VFIO_DEVICE_API_") and name.endswith("_STRING")
    )
    if constants:
        lines += ["", "# Constants and ioctl request numbers"]
        lines += [number(name, value) for name, value in sorted(constants.items()) if name not in strings]
    if strings:
        lines += [
            "",
            "# Left out: string constants, of which the manifest holds only a pointer of its compilation:",
        ]
        lines += [f"# {name}" for name in strings]
    if part.get("strings"):
        lines += ["", "# Strings"]
        lines += [f"{name} = {json.dumps(value)}" for name, value in part["strings"].items()]
    for name in order(part["structs"]):
        lines += structure(layout, name)
    return "\n".join(lines) + "\n"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="generate the ctypes modules of the kernel's ABI")
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 on a difference")
    args = parser.parse_args()
    manifest = json.loads(MANIFEST.read_text())
    stale = []
    for header, name in MODULES.items():
        path = UAPI / f"{name}.py"
        text = module(manifest, header)
        if args.check:
            if not path.exists() or path.read_text() != text:
                stale.append(str(path))
        else:
            path.write_text(text)
    for each in stale:
        print(f"gen_abi: {each} is not what the manifest gives; run tools/gen_abi.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
