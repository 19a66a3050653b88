# SPDX-License-Identifier: Apache-2.0
"""Formats by the name that captures and records use."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from iokeep.errors import InputError
from iokeep.pt.formats import (
    amdv1,
    arm_lpae_s1,
    arm_lpae_s2,
    arm_mali_lpae,
    arm_v7s,
    riscv64,
    s390_zpci,
    vtdss,
    x86_64,
)
from iokeep.pt.formats.base import Format

_OPENERS: dict[str, Callable[[Mapping[str, object]], Format]] = {
    "amdv1": amdv1.open_format,
    "arm_lpae_s1": arm_lpae_s1.open_format,
    "arm_lpae_s2": arm_lpae_s2.open_format,
    "arm_mali_lpae": arm_mali_lpae.open_format,
    "arm_v7s": arm_v7s.open_format,
    "riscv64": riscv64.open_format,
    "s390_zpci": s390_zpci.open_format,
    "vtdss": vtdss.open_format,
    "x86_64": x86_64.open_format,
}
_CACHE: dict[tuple[str, tuple[tuple[str, object], ...]], Format] = {}

#: names that :func:`open_format` knows
FORMATS = tuple(_OPENERS)


def open_format(name: str, config: Mapping[str, object]) -> Format:
    """The format ``name`` in configuration ``config`` (missing keys take the format's defaults).

    :raises InputError: a format that is not built, or a configuration that it cannot have.
    """
    opener = _OPENERS.get(name)
    if opener is None:
        raise InputError(
            f"page-table format {str(name)[:64]!r} is not built yet",
            f"formats that are: {', '.join(FORMATS)}",
        )
    fmt = opener(config)
    key = (fmt.name, tuple(sorted(fmt.config.items())))
    return _CACHE.setdefault(key, fmt)
