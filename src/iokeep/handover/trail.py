# SPDX-License-Identifier: Apache-2.0
"""What a reader leaves behind on its way through the handover: whose page is whose, and what is wrong.

Every page of metadata belongs to one structure. :meth:`Trail.claim` enforces that, which finds loops in any
chain, pages that two structures share, and bounds the work by the memory that is there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from iokeep.handover.abi import PAGE_SIZE
from iokeep.mem.memory import Memory

#: problems that are listed; the rest is counted
MAX_PROBLEMS = 1000


@dataclass(slots=True)
class Trail:
    """One reading of one memory."""

    mem: Memory
    problems: list[str] = field(default_factory=list)
    #: pa of each metadata page that was read -> what it is
    pages: dict[int, str] = field(default_factory=dict)
    dropped: int = 0

    def problem(self, text: str) -> None:
        """Note one rule that is broken, as one line with the pa."""
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(text)
        else:
            self.dropped += 1

    def claim(self, pa: int, what: str) -> bool:
        """Take the page at ``pa`` for ``what``;
        False, and a problem, where it is no page or already taken.
        """
        if pa <= 0 or pa % PAGE_SIZE or pa >> 52:
            self.problem(f"{what}: {pa:#x} is not the pa of a page")
            return False
        if pa in self.pages:
            self.problem(f"{what}: page {pa:#x} is already the {self.pages[pa]} (a loop, or two owners)")
            return False
        self.pages[pa] = what
        return True

    def page(self, pa: int) -> bytes:
        """The 4096 bytes of a claimed page. :raises MemoryAbsent: it is not in this source."""
        return self.mem.read(pa, PAGE_SIZE)

    def finish(self) -> list[str]:
        """All problems, the last line counting those that were not listed."""
        more = [f"{self.dropped} more problems are not listed"] if self.dropped else []
        return self.problems + more
