# SPDX-License-Identifier: Apache-2.0
"""Memory's own speed: what every reader of tables is measured by."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from iokeep.bench.cases import Built
from iokeep.mem.memory import I64
from iokeep.pt.extents import Extents

Method = Callable[[], object]


def limit(built: Built, rows: I64) -> Method:
    """Read the tables of level 0 once, as fast as memory is, in the order in which they lie.

    :param rows: of these tables.
    """
    words = built.ram.words.reshape(-1, built.fmt.levels[0].items)
    if not len(rows):
        return lambda: None
    first, last = int(rows.min()), int(rows.max()) + 1
    flat = words[first:last].reshape(-1)
    return lambda: np.bitwise_or.reduce(flat)


def inputs(tables: Method, e: Extents) -> Method:
    """What has to be done to the tables, and to read the expectation once: where each page is an extent of
    its own, that is three times as many bytes.
    """
    columns = e.iova, e.last, e.pa, e.prot

    def run() -> None:
        tables()
        for column in columns:
            np.bitwise_or.reduce(column)

    return run


def must(right: bool) -> None:
    """:raises AssertionError: a method got it wrong."""
    if not right:
        raise AssertionError("a method got it wrong: its time means nothing")
