# SPDX-License-Identifier: Apache-2.0
"""What was found out about a format, kept: the same questions come with every table."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from iokeep.pt.formats.base import Format

_T = TypeVar("_T")


class Memo(Generic[_T]):
    """Answers by format and key; a format is known by its identity, and kept so that it stays its own.

    :param most: so many answers; then all are forgotten.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: dict[tuple[int, Hashable], tuple[Format, _T]] = {}

    def get(self, fmt: Format, key: Hashable, make: Callable[[], _T]) -> _T:
        """The answer; ``make`` finds it the first time."""
        place = id(fmt), key
        known = self._known.get(place)
        if known is None:
            if len(self._known) >= self._most:
                self._known.clear()
            known = self._known[place] = fmt, make()
        return known[1]
