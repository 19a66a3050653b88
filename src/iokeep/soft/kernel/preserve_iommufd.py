# SPDX-License-Identifier: Apache-2.0
"""How an iommufd crosses the kexec: its marked HWPTs with their tables, and what its areas were.

The rules are those of the series "iommu: Add live update state preservation" (phase 1): only memfds
that are sealed against resizing and preserved in the same session, immutable from then on. One rule is
added: the frames in the tables must be those of the files. A memfd that was shrunk and grown between
map and seal is thus refused, not carried with DMA to frames that nobody preserves.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from iokeep.errors import IokeepError
from iokeep.handover.iommu import DomainRecord, HwptRecord, IoasRecord, IommufdRecord
from iokeep.pt.extents import Extents
from iokeep.pt.verify import verify
from iokeep.soft.kernel.adopt import PriorDomain, Priors
from iokeep.soft.kernel.deferred import expected_extents
from iokeep.soft.kernel.files import F_SEAL_GROW, F_SEAL_SEAL, F_SEAL_SHRINK, File, Memfd
from iokeep.soft.kernel.freeze import prepare_domain
from iokeep.soft.kernel.hwpt import HwptPaging
from iokeep.soft.kernel.ioas import Ioas
from iokeep.soft.kernel.iommufd import Iommufd
from iokeep.soft.kernel.luo import FileHandler, LuoFile, Session
from iokeep.soft.kernel.preserve_memfd import MemfdHandler
from iokeep.soft.kernel.syserror import SysError

if TYPE_CHECKING:
    from iokeep.soft.kernel.freeze import Freeze
    from iokeep.soft.kernel.kernel import Kernel
    from iokeep.soft.kernel.kho import KhoPart
    from iokeep.soft.kernel.pages import Area

SEALS = F_SEAL_SEAL | F_SEAL_GROW | F_SEAL_SHRINK


@dataclass(slots=True, eq=False)
class PreservedIommufd:
    """What LUO holds of a preserved iommufd: its marked HWPTs, each with its token and one more user; their
    domains (by id) and IOASes, described already; their tables, in the tree already.
    """

    iommufd: Iommufd
    session: Session
    hwpts: list[tuple[HwptPaging, int]]
    domains: dict[int, DomainRecord]
    ioases: tuple[IoasRecord, ...]
    part: KhoPart


@dataclass(eq=False)
class IommufdHandler(FileHandler):
    """LUO handler of iommufds.

    :param compatible: version of the record, of the kernel's profile. :param flb: the IOMMU core's FLB.
    :param part: makes a new part of the KHO output. :param freeze_now: the freeze that is going on.
    :param incoming: records that came over the kexec, by pa.
    """

    kernel: Kernel
    priors: Priors
    memfds: MemfdHandler
    compatible: str
    flb: tuple[str, ...]
    part: Callable[[], KhoPart]
    freeze_now: Callable[[], Freeze]
    incoming: dict[int, IommufdRecord] = field(default_factory=dict)
    held: list[PreservedIommufd] = field(default_factory=list)

    def can_preserve(self, file: File) -> bool:
        """Any iommufd."""
        return isinstance(file, Iommufd)

    # ---- in the old kernel

    def preserve(self, session: Session, file: File, token: int) -> PreservedIommufd:
        """Check every rule, then make the iommufd immutable. :raises SysError: EINVAL with the reason."""
        assert isinstance(file, Iommufd)
        hwpts = self.priors.marked(file)
        if not hwpts:
            raise SysError(errno.EINVAL, "iommufd: no HWPT is marked to be preserved")
        for ioas in {hwpt.ioas.id: hwpt.ioas for hwpt, _ in hwpts}.values():
            for area in ioas.areas:
                self._check_area(session, area)
        shown = {hwpt.domain.domain_id: (hwpt.domain, self._check_table(hwpt)) for hwpt, _ in hwpts}
        ioases = {hwpt.ioas.id: hwpt.ioas for hwpt, _ in hwpts}
        part = self.part()
        try:
            domains = {number: prepare_domain(part, *what) for number, what in shown.items()}
            records = tuple(self._ioas(session, ioas) for ioas in ioases.values())
            part.flush()
        except SysError:
            part.drop()
            raise
        file.preserved = True
        for hwpt, _ in hwpts:
            hwpt.users += 1
        private = PreservedIommufd(file, session, hwpts, domains, records, part)
        self.held.append(private)
        return private

    def _check_area(self, session: Session, area: Area) -> None:
        where = f"iommufd: IOAS {area.ioas.id} area {area.iova:#x} ... {area.last:#x}"
        file = area.pages.memfd
        if not isinstance(file, Memfd):
            raise SysError(errno.EINVAL, f"{where} is not backed by a memfd")
        if file.seals & SEALS != SEALS:
            missing = ", ".join(
                name
                for name, bit in (("SEAL", F_SEAL_SEAL), ("GROW", F_SEAL_GROW), ("SHRINK", F_SEAL_SHRINK))
                if not file.seals & bit
            )
            raise SysError(errno.EINVAL, f"{where}: memfd {file.name} lacks the seals {missing}")
        if session.token_of(self.memfds, file) is None:
            raise SysError(
                errno.EINVAL, f"{where}: memfd {file.name} is not preserved in session [{session.name}]"
            )

    def _check_table(self, hwpt: HwptPaging) -> Extents:
        """What the HWPT shows, proved. :raises SysError: EINVAL, EUCLEAN."""
        if hwpt.domain.proof is not None:
            hwpt.domain.proof.need_all()
        expected = expected_extents(hwpt.ioas)
        try:
            domain = hwpt.domain
            verdict = verify(
                domain.fmt,
                self.kernel.frames.ram,
                domain.root_pa,
                expected,
                limit=1,
                owned=domain.table_pages,
            )
        except IokeepError as error:
            raise SysError(errno.EINVAL, f"iommufd: HWPT {hwpt.id}: {error.what}") from error
        if not verdict.equal:
            first = verdict.mismatches[0].text
            raise SysError(
                errno.EINVAL, f"iommufd: HWPT {hwpt.id} does not show the frames of its files: {first}"
            )
        return expected

    def unpreserve(self, file: File, private: PreservedIommufd) -> None:
        """Mutable again; nothing of it is in the tree any more."""
        private.part.drop()
        for hwpt, _ in private.hwpts:
            hwpt.domain.seal = None  # the next time it is preserved there is a fresh key
        for hwpt, _ in private.hwpts:
            hwpt.users -= 1
        private.iommufd.preserved = False
        self.held.remove(private)

    def freeze(self, file: File, private: PreservedIommufd) -> int:
        """Domains into the FLB, HWPTs and areas into the record; its pa."""
        now = self.freeze_now()
        now.prepared.update(private.domains)
        record = IommufdRecord(
            hwpts=tuple(
                HwptRecord(token, now.add_domain(hwpt.domain), hwpt.ioas.id) for hwpt, token in private.hwpts
            ),
            ioases=private.ioases,
        )
        return now.write_iommufd(record)

    def _ioas(self, session: Session, ioas: Ioas) -> IoasRecord:
        tokens = []
        for area in ioas.areas:
            memfd = area.pages.memfd
            token = session.token_of(self.memfds, memfd) if memfd is not None else None
            if token is None:
                raise SysError(errno.EINVAL, f"iommufd: the file at {area.iova:#x} is no longer preserved")
            tokens.append(token)
        return IoasRecord(
            ioas.id,
            np.array([a.iova for a in ioas.areas], np.uint64),
            np.array([a.last for a in ioas.areas], np.uint64),
            np.array(tokens, np.uint64),
            np.array([a.file_offset for a in ioas.areas], np.uint64),
            np.array([a.prot for a in ioas.areas], np.uint8),
            np.zeros(len(ioas.areas), np.uint8),
        )

    # ---- in the new kernel

    def check_incoming(self, session: Session, entry: LuoFile) -> None:
        """Its record was read at boot."""
        if entry.data not in self.incoming:
            raise SysError(errno.EIO, f"no iommufd record at {entry.data:#x}")

    def _priors(self, entry: LuoFile) -> dict[int, PriorDomain]:
        record = self.incoming[entry.data]
        return {h.token: self.priors.domains[h.domain_index] for h in record.hwpts}

    def shows(self, session: Session) -> bool:
        """An iommufd of the session has prior domains: its tables show files of the session to devices. Which
        ones is known when the tables are proved, not before.
        """
        return any(self._priors(entry) for entry in session.files if entry.handler is self)

    def retrieve(self, session: Session, entry: LuoFile) -> File:
        """A new iommufd that can adopt the prior domains of the old one; it has no objects yet."""
        iommufd = Iommufd(self.kernel)
        self.priors.iommufds[iommufd] = self._priors(entry)
        return iommufd

    def can_finish(self, session: Session, entry: LuoFile) -> bool:
        """Every prior domain is reclaimed, or no device is on it."""
        for token, prior in self._priors(entry).items():
            if not prior.reclaimed:
                self.kernel.log(
                    f"luo: session [{session.name}]: prior domain of HWPT token {token:#x} is held"
                )
                return False
        return True

    def finish(self, session: Session, entry: LuoFile) -> None:
        """The iommufd is an ordinary one now; prior domains that nobody adopted and no device uses are
        freed.
        """
        for prior in self._priors(entry).values():
            self.priors.release(prior)
            if prior.hwpt is not None:
                prior.hwpt.prior = None
            del self.priors.domains[prior.record.index]
        if isinstance(entry.file, Iommufd):
            self.priors.iommufds.pop(entry.file, None)
