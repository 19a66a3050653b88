# SPDX-License-Identifier: Apache-2.0
"""Profiles of the format gate in files: what one kernel is tested to take, as its developer states it.

JSON or TOML, ``"schema": "iokeep.gate-v1"`` (docs/schemas/iokeep.gate-v1.json): ``name``, and in ``formats``
for each format ``config`` (key -> values), ``leaf`` and ``table`` (named field -> values) and ``leaf_bytes``.
As in ``gate_profiles``: a field that is not listed must be 0, a configuration key that is not listed may have
any value; without ``leaf_bytes`` leaves may have every size that Linux makes. The ``descriptor`` of ``iokeep
table show --json`` has this shape, so that what one host has may be the gate of another; that document is
taken as a whole, too.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iokeep.errors import InputError, UsageError
from iokeep.pt.gate import Descriptor, Gate
from iokeep.pt.gate_profiles import PROFILES, Allowed
from iokeep.pt.registry import FORMATS, open_format

SCHEMA = "iokeep.gate-v1"
SHOW_SCHEMA = "iokeep.table-show-v1"
#: a file beyond this is refused unread
LIMIT = 1 << 20
#: what a descriptor says besides: it is for people, and no gate looks at it
DESCRIPTIVE = (
    "leaf_features", "table_features", "leaf_fields", "table_fields", "leaf_bytes", "contiguous_items",
    "unknown", "stale", "levels",
)  # fmt: skip
_KEYS = ("config", "leaf", "table", "leaf_bytes")
#: configurations that have fields which the default has not
_MORE: Mapping[str, Mapping[str, object]] = {
    "amdv1": {"c_bit": 47}, "x86_64": {"c_bit": 47}, "arm_lpae_s2": {"fwb": 1}, "arm_v7s": {"quirks": 2},
}  # fmt: skip


def find_gate(text: str) -> Gate:
    """A profile by name, or from the file of that name (it has a "/", ends in .json or .toml, or exists).

    :raises UsageError: no profile and no file. :raises InputError: a file that is no profile.
    """
    if text in PROFILES:
        return Gate(text, PROFILES[text])
    if os.sep in text or text.endswith((".json", ".toml")) or Path(text).is_file():
        return load_gate(Path(text))
    raise UsageError(
        f"--gate {text[:64]!r} is no profile",
        f"profiles: {', '.join(PROFILES)}; or a file, NAME.json or NAME.toml",
    )


def load_gate(path: Path) -> Gate:
    """A profile from a file. :raises InputError: naming the file, the key and the rule."""
    try:
        with path.open("rb") as file:
            raw = file.read(min(os.fstat(file.fileno()).st_size, LIMIT) + 1)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}", "--gate takes a profile's name, or a file") from error
    if len(raw) > LIMIT:
        raise InputError(f"{path}: more than {LIMIT} bytes: this is no profile")
    try:
        text = raw.decode("utf-8")
        document = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start}: not UTF-8") from error
    except json.JSONDecodeError as error:
        hint = "the name of a file in TOML ends in .toml"
        raise InputError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}", hint) from error
    except (ValueError, RecursionError) as error:  # tomllib.TOMLDecodeError is a ValueError
        raise InputError(f"{path}: {str(error)[:120]}") from error
    return read_gate(document, str(path))


def read_gate(document: object, where: str) -> Gate:
    """A profile from its document. :raises InputError: naming the key and the rule."""
    top = _table(document, where)
    schema = top.get("schema")
    if schema == SHOW_SCHEMA:  # what `table show --json` printed
        where = f"{where}: descriptor"
        top = _table(top.get("descriptor"), where)
        schema = top.get("schema")
    if schema != SCHEMA:
        raise InputError(f"{where}: schema {str(schema)[:64]!r} is not known", f"this reads {SCHEMA!r}")
    for key in top:
        if key not in ("schema", "name", "formats", *DESCRIPTIVE):
            raise InputError(f"{where}: unknown key {key[:64]!r}", "known: schema, name, formats")
    name = top.get("name")
    if not isinstance(name, str) or not name:
        raise InputError(f'{where}: "name" is missing or no string')
    formats = _table(top.get("formats"), f"{where}: formats")
    if not formats:
        raise InputError(f"{where}: formats is empty: no table would pass")
    return Gate(
        name, {key: _allowed(key, part, f"{where}: formats.{key[:64]}") for key, part in formats.items()}
    )


def _table(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: missing, or no object")
    return value


def _allowed(name: str, part: object, where: str) -> Allowed:
    if name not in FORMATS:
        raise InputError(f"{where}: no such page-table format", f"formats: {', '.join(FORMATS)}")
    values = _table(part, where)
    for key in values:
        if key not in _KEYS:
            raise InputError(f"{where}: unknown key {key[:64]!r}", f"known: {', '.join(_KEYS)}")
    config_keys, leaf, table = _known(name)
    columns = []
    for key, known in (("config", config_keys), ("leaf", leaf), ("table", table)):
        listed = _table(values.get(key, {}), f"{where}.{key}")
        for field in listed:
            if field not in known:
                what = "configuration key" if key == "config" else "field"
                raise InputError(
                    f"{where}.{key}: {name} has no {what} {field[:64]!r}",
                    f"it has {', '.join(sorted(known))}",
                )
        columns.append({k: _values(v, f"{where}.{key}.{k}") for k, v in listed.items()})
    sizes = None
    if "leaf_bytes" in values:
        numbers = _values(values["leaf_bytes"], f"{where}.leaf_bytes")
        for n in numbers:
            if n <= 0 or n & (n - 1):
                raise InputError(f"{where}.leaf_bytes: {n} is no power of two")
        sizes = tuple(n.bit_length() - 1 for n in numbers)
    return Allowed(columns[0], columns[1], columns[2], sizes)


def _values(value: object, where: str) -> tuple[int, ...]:
    """A list of numbers, or of "0x..."."""
    if not isinstance(value, list) or len(value) > 4096:
        raise InputError(f"{where}: no list of values", "write [0, 1], for a single value [1]")
    out: list[int] = []
    for one in value:
        number = one
        if isinstance(one, str) and one.lower().startswith("0x"):
            try:
                number = int(one, 16)
            except ValueError:
                number = None
        if isinstance(number, bool) or not isinstance(number, int) or not -1 <= number < 1 << 64:
            raise InputError(f"{where}: {str(one)[:40]!r} is no value", 'values are numbers, or "0x..."')
        out.append(number)
    return tuple(out)


def _known(name: str) -> tuple[set[str], set[str], set[str]]:
    """Configuration keys of a format, and the names of fields in its leaves and table items."""
    config: set[str] = set()
    leaf: set[str] = set()
    table: set[str] = set()
    for given in ({}, _MORE.get(name, {})):
        fmt = open_format(name, given)
        config |= set(fmt.config)
        for spec in fmt.levels:
            kinds = [spec.memory, spec.named]
            for contig in spec.contig:
                kinds += [contig.memory or (), contig.named or ()]
            leaf |= {field for kind in kinds for field, _ in kind}
            table |= {field for field, _ in spec.table_named}
    return config, leaf, table


def document_of(found: Descriptor, name: str) -> dict[str, Any]:
    """The gate that takes exactly what a table has: its configuration, fields and leaf sizes."""
    return {
        "schema": SCHEMA,
        "name": name,
        "formats": {
            found.name: {
                "config": {key: [value] for key, value in found.config.items()},
                "leaf": {key: values for key, values in found.leaf.items() if values != [0]},
                "table": {key: values for key, values in found.table.items() if values != [0]},
                "leaf_bytes": [1 << lg2 for lg2 in sorted(found.sizes)],
            }
        },
    }
