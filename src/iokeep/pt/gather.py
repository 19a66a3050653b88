# SPDX-License-Identifier: Apache-2.0
"""The tables of one domain out of memory that can only be read: a running kernel's, of which nobody has
rows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from iokeep.errors import InputError
from iokeep.mem.capture import PageMemory
from iokeep.pt.formats.base import Format
from iokeep.pt.tables import ABSENT, TableMemory, descend

#: more pages than these (4 GiB of tables) are no real domain
LIMIT = 1 << 20
PAGE = 4096


def gather(fmt: Format, read: Callable[[int, int], bytes], root_pa: int) -> PageMemory:
    """All table pages below a root, each read once; a table that cannot be read stays absent.

    A domain that changes meanwhile gives pages of different times, as any look at it does.

    :param read: ``read(pa, length)``, e.g. :meth:`iokeep.mem.live.LiveMemory.read`.
    :raises MemoryAbsent: the root cannot be read. :raises InputError: there is no end of tables.
    """
    have: dict[int, bytes] = {}
    refused: set[int] = set()

    def load(pa: int, length: int) -> int:
        count = 0
        for at in range(pa - pa % PAGE, pa + length, PAGE):
            if at not in have:
                have[at] = read(at, PAGE)
                count += 1
        return count

    load(root_pa, fmt.root_bytes)
    while True:
        pas = np.array(sorted(have), np.uint64)
        data = np.frombuffer(b"".join(have[int(pa)] for pa in pas), np.uint8).reshape(-1, PAGE)
        memory = PageMemory(pas, data)
        problems = descend(TableMemory(fmt, memory), root_pa).problems
        problems = problems.take(problems.reason == ABSENT)
        fresh = 0
        for level, item in zip(problems.level.tolist(), problems.item.tolist(), strict=True):
            spec = fmt.levels[level]
            pa = spec.table_pa(item)
            if pa in refused:
                continue
            try:
                fresh += load(pa, fmt.bytes_of(spec.next_level(item, level)))
            except InputError:
                refused.add(pa)
        if not fresh:
            return memory
        if len(have) > LIMIT:
            raise InputError(f"more than {LIMIT} table pages below pa {root_pa:#x}: this is no domain")
