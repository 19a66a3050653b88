# SPDX-License-Identifier: Apache-2.0
"""An adopted table that is not proved yet: who may read PFNs back from it, and when.

ADOPT with DEFERRED or SEALED makes the prior domain the storage of the areas without a look at its tables and
without a pin. From then on, until all is proved:

* :meth:`Adoption.need` is asked before a PFN is read back from a range or the range changes. It proves what
  is unknown there, pins the pages that were proved (found in their file), and fails with EUCLEAN where
  something else is in the table;
* the files of the areas are held: they cannot lose a page (``Memfd.holders``), so that pages which DMA
  reaches stay allocated without a pin of each;
* what is quarantined stays as it is under running DMA. When the HWPT goes, pages are given back by what
  their file says, and the table goes as a whole: nothing is ever read back from a quarantined range.

``validated`` can only grow: mapping and unmapping happen in proved ranges, and leave them proved.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from iokeep.mem.ranges import Range
from iokeep.pt.deferred import Deferred, Quarantine
from iokeep.pt.extents import Extents
from iokeep.soft.kernel.files import Memfd
from iokeep.soft.kernel.frames import I64, pas_of
from iokeep.soft.kernel.pages import ULONG_MAX, Area
from iokeep.soft.kernel.syserror import SysError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from iokeep.soft.kernel.ioas import Ioas
    from iokeep.soft.kernel.iommu import Domain

#: quarantines that the kernel log names; the others are counted
_LOGGED = 16


def expected_extents(ioas: Ioas, start: int = 0, last: int = ULONG_MAX, *, stored: bool = False) -> Extents:
    """What a table of this IOAS must hold in [start, last]: the PFNs of its areas, from their origin.
    O(areas) and O(runs of consecutive frames) behind them.

    Extents of areas that reach beyond are cut at page boundaries.

    :param stored: without areas that no domain stores: those that are being mapped at the moment.
    :raises SysError: as a fill.
    """
    parts = []
    for area in areas_in(ioas, start, last):
        if stored and area.storage is None:
            continue
        first, end = area.pages_in(start, last)
        parts.append(area.extents(area.pages.runs(first, end), first))
    if not parts:
        return Extents.empty()
    return Extents(
        np.concatenate([p.iova for p in parts]),
        np.concatenate([p.last for p in parts]),
        np.concatenate([p.pa for p in parts]),
        np.concatenate([p.prot for p in parts]),
    )


def areas_in(ioas: Ioas, start: int, last: int) -> Iterator[Area]:
    """The areas that touch [start, last], in order."""
    while start <= last and (area := ioas.area_at(start, last)) is not None:
        yield area
        start = area.last + 1


class Adoption:
    """The proof of one adopted domain, under way.

    :param domain: its ``proof`` is this object until everything is proved or the domain is taken away.
    :param name: for messages. :param pfns: frames of its tables, sorted.
    :param ended: told when there is nothing left to wait for.
    :raises SysError: EINVAL: an area does not show a memory file, whose pages could be held.
    """

    def __init__(
        self, ioas: Ioas, domain: Domain, name: str, pfns: I64, ended: Callable[[Adoption], None]
    ) -> None:
        kernel = domain.iommu.kernel
        self.ioas = ioas
        self.domain = domain
        self.name = name
        #: CPU time of the proof so far, in ns
        self.validate_ns = 0
        self._ended = ended
        self._kernel = kernel
        self._over = False
        files: dict[int, Memfd] = {}
        for area in ioas.areas:
            file = area.pages.memfd
            if not isinstance(file, Memfd):
                where = f"IOAS {ioas.id} area {area.iova:#x} ... {area.last:#x}"
                raise SysError(errno.EINVAL, f"{where} shows no memfd: its pages cannot be held unproved")
            files[file.ino] = file
        self._files = list(files.values())
        self.state = Deferred(
            domain.fmt,
            kernel.frames.ram,
            domain.root_pa,
            self._expect,
            owned=lambda: pas_of(pfns),
            proved=self._proved,
            condemned=self._condemned,
        )
        self._logged = 0

    def begin(self) -> None:
        """The domain is the IOAS's now."""
        for file in self._files:
            file.holders += 1
        self.domain.proof = self

    def end(self) -> None:
        """The domain was taken off its IOAS, or all is proved. Idempotent."""
        if self._over:
            return
        self._over = True
        self.domain.proof = None
        for file in self._files:
            file.holders -= 1
        self._ended(self)

    # ---- what iommufd asks

    @property
    def pending(self) -> bool:
        """Something is unknown."""
        return not self._over and not self.state.done

    @property
    def quarantined(self) -> bool:
        """Something is wrong."""
        return bool(self.state.quarantined)

    def need(self, start: int, last: int) -> None:
        """Before anything of [start, last] is read back or changed. :raises SysError: EUCLEAN."""
        before = time.thread_time_ns()
        bad = self.state.need(start, last)
        self.validate_ns += time.thread_time_ns() - before
        self._check_over()
        if bad:
            raise SysError(
                errno.EUCLEAN,
                f"{self.name}: {bad[0].start:#x} ... {bad[0].last:#x} is quarantined: "
                f"the table is not what IOAS {self.ioas.id} says",
            )

    def need_all(self) -> None:
        """Prove everything now. :raises SysError: EUCLEAN."""
        self.need(0, ULONG_MAX)

    def holds(self, start: int, last: int) -> bool:
        """All of [start, last] is proved."""
        return not self.state.validated.outside(start, last)

    def tick(self, budget: int) -> int:
        """A piece of the sweep: about ``budget`` bytes of tables; how many were read, 0 = nothing left."""
        before = time.thread_time_ns()
        read = self.state.sweep(budget)
        self.validate_ns += time.thread_time_ns() - before
        self._check_over()
        return read

    def progress(self) -> tuple[int, int, int]:
        """Bytes of the areas that are proved, unknown, quarantined."""
        proved = condemned = total = 0
        for area in self.ioas.areas:
            total += area.length
            proved += sum(r.size for r in self.state.validated.within(area.iova, area.last))
            condemned += sum(r.size for r in self.state.quarantined.within(area.iova, area.last))
        return proved, total - proved - condemned, condemned

    # ---- what the proof tells

    def _expect(self, start: int, last: int) -> Extents:
        return expected_extents(self.ioas, start, last, stored=True)

    def _proved(self, r: Range) -> None:
        for area in areas_in(self.ioas, *r):
            if area.storage is self.domain and area.lazy:
                area.pin(*area.pages_in(*r))

    def _condemned(self, quarantine: Quarantine) -> None:
        self._logged += 1
        if self._logged <= _LOGGED:
            r = quarantine.range
            self._kernel.log(
                f"iommufd: {self.name}: {r.start:#x} ... {r.last:#x} is quarantined, its DMA is left as it "
                f"is: {quarantine.mismatch.text}"
            )
        elif self._logged == _LOGGED + 1:
            self._kernel.log(f"iommufd: {self.name}: more ranges are quarantined")

    def _check_over(self) -> None:
        if self._over or not self.state.done:
            return
        if self.state.sound:
            self._kernel.log(
                f"iommufd: {self.name}: all proved, {self.state.table_bytes} bytes of tables were read"
            )
            self.end()
