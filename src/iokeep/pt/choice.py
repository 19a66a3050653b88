# SPDX-License-Identifier: Apache-2.0
"""Whether compiled code is worth it for a job; imports no Numba.

Starting Numba takes longer than to read small tables by NumPy, so each job has two bounds: one where
its compiled code is loaded already, and one where it is not.
"""

from __future__ import annotations

import os
import sys


def jit() -> bool:
    """Numba may compile. With ``NUMBA_DISABLE_JIT=1`` it may not, and its loops would run as plain Python."""
    return os.environ.get("NUMBA_DISABLE_JIT", "0") == "0"


def loaded(module: str) -> bool:
    """``iokeep.pt.<module>``, of compiled code, is imported: its use costs no start."""
    return f"iokeep.pt.{module}" in sys.modules


def worth_compiled(asked: bool | None, module: str, size: int, warm: int, cold: int) -> bool:
    """Whether ``iokeep.pt.<module>`` is to do it: as asked, or (None) from a size on.

    :param size: bytes of tables. :param warm: :param cold: bytes from which on it is, where the module is
        loaded and where it is not.
    """
    if asked is not None:
        return asked
    return jit() and size >= (warm if loaded(module) else cold)
