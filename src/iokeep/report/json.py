# SPDX-License-Identifier: Apache-2.0
"""JSON documents: one per run, 64-bit values as "0x..." strings, counts as numbers, never NaN."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["document", "hexed"]


def hexed(value: int | None) -> str | None:
    """An iova, pa or other 64-bit value as JSON has it: lower-case hex text; None stays None."""
    return None if value is None else f"{value:#x}"


def document(schema: str, body: Mapping[str, Any]) -> str:
    """One JSON document with its newline; ``schema`` (``iokeep.<thing>-v1``) comes first.

    :raises ValueError: NaN or infinity in ``body``.
    """
    return json.dumps({"schema": schema, **body}, indent=1, allow_nan=False) + "\n"
