# SPDX-License-Identifier: Apache-2.0
"""Peers in C, compiled when there is a compiler: a walk per page, and one pass table by table."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from iokeep.mem.memory import I64, U64
from iokeep.mem.ram import Ram
from iokeep.pt.extents import Extents
from iokeep.pt.formats.base import Format

SOURCE = Path(__file__).with_name("peers.c")
_FLAGS = ("-O3", "-march=native", "-shared", "-fPIC")


def _at(array: U64 | I64) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@dataclass(frozen=True, slots=True)
class Peers:
    """The compiled peers."""

    library: ctypes.CDLL

    def walk_pages(self, fmt: Format, ram: Ram, root_pa: int, e: Extents) -> int:
        """Walk to every expected page of 4096 bytes; how many are not there. One prot in all of ``e``."""
        names = ("shift", "items", "valid_mask", "leaf_mask", "leaf_value", "table_pa_mask", "leaf_pa_mask")
        rows = [[getattr(s, n) for n in names] + [int(s.table), int(s.leaf)] for s in fmt.levels]
        levels = np.array(rows, np.uint64)
        levels[:, 1] -= np.uint64(1)
        spec = fmt.levels[0]
        perm = spec.leaf_base | spec.prot_bits[int(e.prot[0])]
        care = ~spec.leaf_ignored & (2**64 - 1)
        columns = (_at(np.ascontiguousarray(c)) for c in (e.iova, e.last, e.pa))
        numbers = (ctypes.c_uint64(n) for n in (len(e), perm, care))
        return int(
            self.library.walk_pages(
                ctypes.c_void_p(ram.bytes.ctypes.data), ctypes.c_uint64(root_pa), _at(levels),
                ctypes.c_uint64(fmt.top_level), *columns, *numbers,
            )
        )  # fmt: skip

    def sweep_tables(self, fmt: Format, ram: Ram, rows: I64, words: U64) -> int:
        """Compare whole tables with ramps that begin with ``words``; how many differ."""
        spec = fmt.levels[0]
        numbers = (len(rows), spec.items, 1 << spec.shift, ~spec.leaf_ignored & (2**64 - 1))
        return int(
            self.library.sweep_tables(
                _at(ram.words), _at(rows), _at(words), *(ctypes.c_uint64(n) for n in numbers)
            )
        )


def can_read(fmt: Format) -> bool:
    """Whether the peers know this format: one test says what is present, the OA is where it is in the pa."""
    return fmt.item_bytes == 8 and fmt.byte_order == "<" and not any(
        s.pa_shift or s.pa_pieces or s.next_levels or s.invert or s.leaf_values for s in fmt.levels
    )  # fmt: skip


def compiler() -> str | None:
    """The C compiler, if there is one."""
    return next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)


def compile_peers() -> Peers | str:
    """The peers, or why there are none."""
    command = compiler()
    if command is None:
        return "no C compiler (cc, gcc or clang) is installed"
    with tempfile.TemporaryDirectory(prefix="iokeep-bench-") as place:
        out = Path(place) / "peers.so"
        done = subprocess.run(
            [command, *_FLAGS, "-o", str(out), str(SOURCE)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            return f"{command} failed: {done.stderr.strip().splitlines()[-1:]}"
        try:
            library = ctypes.CDLL(str(out))
        except OSError as error:
            return f"what {command} made cannot be loaded: {error}"
    library.walk_pages.restype = library.sweep_tables.restype = ctypes.c_uint64
    return Peers(library)
