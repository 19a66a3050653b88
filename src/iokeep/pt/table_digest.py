# SPDX-License-Identifier: Apache-2.0
"""The digest (``digest``) of what a table translates."""

from __future__ import annotations

import numpy as np

from iokeep.mem.memory import I64, Memory
from iokeep.pt.choice import worth_compiled
from iokeep.pt.digest import Digest, fold
from iokeep.pt.extents import U8, U64, Extents
from iokeep.pt.formats.base import Format
from iokeep.pt.leaves import PLAIN_TABLES, LargeRuns, Leaves, kernels_down
from iokeep.pt.tables import TableMemory, descend, expand, raise_unreadable

#: tables from so many bytes on are summed by compiled code, where it is loaded and where it is not
COMPILED_WARM = 4 << 20
COMPILED_COLD = 256 << 20


def digest(
    fmt: Format,
    mem: Memory,
    root_pa: int,
    key: bytes,
    *,
    compiled: bool | None = None,
    threads: int | None = None,
) -> bytes:
    """The digest of what a table translates. Bad leaves (reserved bits) do not translate and do not count.

    :param compiled: by Numba (True), by NumPy alone (False), or by size (None). The result is the same.
    :param threads: of the compiled sums; None = as ``kernels.thread_count`` says.
    :raises MemoryAbsent, InputError: a table is absent or in a loop.
    """
    out = Digest(key)
    tm = TableMemory(fmt, mem)
    large = LargeRuns(tm, compiled, threads)
    upper = descend(tm, root_pa, straight=kernels_down(compiled), known=large)
    raise_unreadable(fmt, upper.problems)
    for found in (*large.extents(), Leaves.of(fmt, upper.leaves).extents()):
        out.add(found)
    spec, tables = fmt.levels[0], upper.tables(fmt)
    compiled = worth_compiled(
        compiled, "sum_kernels", len(tables) * fmt.table_bytes, COMPILED_WARM, COMPILED_COLD
    )
    blocks = (spec.shift, spec.index_bits) == (12, 9)
    left = np.arange(len(tables))
    if len(tables) >= (1 if compiled else PLAIN_TABLES):
        from iokeep.pt import runs, sums

        if runs.readable(tm):
            if not blocks or runs.likely(tm, tables):  # a table that is one run costs no sum
                read = runs.runs_of(tm, tables, threads, compiled=compiled)
                out.add(read.extents(spec), compiled=compiled)
                left = read.others()
            if blocks and len(left):
                left = sums.add_tables(out, tm, upper, left, threads, compiled=compiled)
    parts = (upper.base[left], upper.pa[left], upper.row[left], upper.prot[left])
    if blocks and fmt.in_words:
        _add_words(out, tm, parts[0], parts[2], parts[3])
        return out.digest()
    for items, _ in expand(tm, *parts):
        out.add(_living(Leaves.of(fmt, items)))
    return out.digest()


def _living(leaves: Leaves) -> Extents:
    """The leaves that let something pass, one extent each."""
    alive = leaves.prot != 0
    return Extents(leaves.iova[alive], leaves.last[alive], leaves.pa[alive], leaves.prot[alive])


def _add_words(out: Digest, tm: TableMemory, base: U64, row: I64, prot: U8) -> None:
    """Count tables of level 0 by NumPy, in formats that are all in words."""
    base = tm.fmt.extend(base)
    step = 64
    for lo in range(0, len(base), step):
        part = slice(lo, lo + step)
        a, b, pages = _words(tm, row[part], prot[part])
        out.add_tables(base[part], a @ out.lanes[0].page, b @ out.lanes[1].page, pages)


def _words(tm: TableMemory, row: I64, prot: U8) -> tuple[U64, U64, int]:
    """Both words of every item of tables of level 0, 0 where nothing translates, and the number of those that
    do.
    """
    spec = tm.fmt.levels[0]
    items = tm.items(row)
    r = (items & np.uint64(spec.r_mask)) == np.uint64(spec.r_value)
    w = (items & np.uint64(spec.w_mask)) == np.uint64(spec.w_value)
    grants = (r.view(np.uint8) | (w.view(np.uint8) << np.uint8(1))) & prot[:, None]
    grants[((items & np.uint64(spec.valid_mask)) == 0) | ((items & np.uint64(spec.leaf_reserved)) != 0)] = 0
    n = (items & np.uint64(spec.leaf_pa_mask)) >> np.uint64(12)
    dead = grants == 0
    a = (n << np.uint64(2)) | grants
    b = (fold(n) << np.uint64(2)) | grants
    pages = grants.size
    if dead.any():
        a[dead] = 0
        b[dead] = 0
        pages -= int(dead.sum())
    return a, b, pages
