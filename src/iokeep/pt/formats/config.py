# SPDX-License-Identifier: Apache-2.0
"""Reading a format's configuration (``config`` in meta.json, or of a handover record): nothing is guessed."""

from __future__ import annotations

from collections.abc import Mapping

from iokeep.errors import InputError


def integers(
    name: str, config: Mapping[str, object], allowed: Mapping[str, tuple[int, tuple[int, ...]]]
) -> dict[str, int]:
    """The complete configuration of format ``name``.

    :param config: what the input says; a key that is missing takes its default.
    :param allowed: key -> (default, values that hardware has).
    :raises InputError: an unknown key, a value that is no integer, or one that hardware does not have.
    """
    for key in config:
        if key not in allowed:
            raise InputError(
                f"format {name}: unknown configuration key {str(key)[:64]!r}", f"known: {', '.join(allowed)}"
            )
    out = {}
    for key, (default, values) in allowed.items():
        value = config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value not in values:
            raise InputError(
                f"format {name}: configuration {key} = {str(value)[:64]!r} is not one that hardware has",
                f"{key}: {', '.join(map(str, values))}",
            )
        out[key] = value
    return out
