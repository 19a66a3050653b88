# SPDX-License-Identifier: Apache-2.0
"""Prior domains: held since boot, adopted after validation (or before it, see :mod:`deferred`), or replaced
by a domain that was proved equal.

The ioctls 0x96 ... 0x9a of docs/adoption-uapi.md, and the rules of attachment for devices that came over
the kexec. Nothing here believes user space or the old kernel: what an IOAS says is compared with what the
tables hold, and the tables with what hardware uses, before iommufd reads a PFN back from them.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from iokeep.errors import InputError, IokeepError
from iokeep.handover.iommu import DomainRecord
from iokeep.pt.compare import Mismatch, Verdict
from iokeep.pt.deferred import TICK
from iokeep.pt.diff import diff, normalised
from iokeep.pt.digest import digest_extents
from iokeep.pt.formats.base import Format
from iokeep.pt.layout import compare_layouts, kernel_layout, table_layout
from iokeep.pt.registry import open_format
from iokeep.pt.shape import crossing
from iokeep.pt.verify import verify
from iokeep.soft.kernel.deferred import Adoption, areas_in, expected_extents
from iokeep.soft.kernel.device import IommufdDevice
from iokeep.soft.kernel.files import Ioctl
from iokeep.soft.kernel.frames import I64, Claim, pas_of
from iokeep.soft.kernel.hwpt import Hwpt, HwptPaging
from iokeep.soft.kernel.ioas import Ioas
from iokeep.soft.kernel.iommufd import Iommufd
from iokeep.soft.kernel.syserror import SysError
from iokeep.uapi import proposal as uapi
from iokeep.uapi.copy_struct import copy_struct_in

if TYPE_CHECKING:
    from iokeep.soft.kernel.iommu import Domain, PciDevice
    from iokeep.soft.kernel.kernel import Kernel
    from iokeep.soft.kernel.profiles import Profile

#: mismatches that one call may ask for; more are counted, not copied
MAX_MISMATCHES = 4096
#: ADOPT itself counts layout differences up to these table bytes; VALIDATE_ONLY always does
LAYOUT_ALWAYS = 16 << 20
#: DEFERRED and SEALED: the sweep reads so many bytes of tables per second (parameter sweep_rate, 0 = none by
#: itself), and about ``TICK`` at a time (sweep_tick)
SWEEP_RATE = 256 << 20
#: after a tick it rests at least so many times as long as that took: calls come first
_SWEEP_REST = 3
#: seconds until the sweep tries again where it could not go on
_SWEEP_RETRY = 1.0
#: out_layout_differences where they were not counted
NOT_COUNTED = 2**32 - 1
_NUMBERS = {text: number for number, text in uapi.MISMATCH_REASONS.items()}
_MAX = 2**64 - 1

_LATER = uapi.IOMMU_LIVEUPDATE_ADOPT_DEFERRED | uapi.IOMMU_LIVEUPDATE_ADOPT_SEALED
#: what ADOPT takes: one way, and where there is something to prove at once also only that
_ADOPT_FLAGS = (
    0,
    uapi.IOMMU_LIVEUPDATE_ADOPT_VALIDATE_ONLY,
    uapi.IOMMU_LIVEUPDATE_ADOPT_TRUST,
    uapi.IOMMU_LIVEUPDATE_ADOPT_DEFERRED,
    uapi.IOMMU_LIVEUPDATE_ADOPT_SEALED,
    uapi.IOMMU_LIVEUPDATE_ADOPT_SEALED | uapi.IOMMU_LIVEUPDATE_ADOPT_VALIDATE_ONLY,
)

HELD = "held"
ADOPTED = "adopted"
FREED = "freed"


@dataclass(eq=False, slots=True)
class PriorDomain:
    """A domain whose tables came over the kexec.

    :param pfns: frames of its tables. :param fmt: its format.
    :param fault: why the record cannot be used (EUCLEAN), or "". :param unsupported: why it is not in the
        tested set (EOPNOTSUPP), or "".
    :param token: of its HWPT; None until the iommufd's record says so. ``devices``: the restored devices on
        it.
    ``domain``: the driver's domain around the tables, from boot on.
    """

    record: DomainRecord
    pfns: I64
    fmt: Format
    fault: str = ""
    unsupported: str = ""
    token: int | None = None
    domain: Domain | None = None
    devices: set[PciDevice] = field(default_factory=set)
    state: str = HELD
    hwpt: AdoptedHwpt | None = None
    #: HWPTs that were proved equal -> generation of their IOAS at that time
    proofs: WeakKeyDictionary[HwptPaging, int] = field(default_factory=WeakKeyDictionary)

    @property
    def reclaimed(self) -> bool:
        """Nobody needs the session for it any more."""
        return self.state != HELD or not self.devices


class AdoptedHwpt(HwptPaging):
    """A HWPT around a prior domain. While restored devices are on that domain, destroying it gives the domain
    back: the areas lose their pins, the tables stay.
    """

    def __init__(self, iommufd: Iommufd, ioas: Ioas, domain: Domain, prior: PriorDomain) -> None:
        super().__init__(iommufd, ioas, domain)
        self.prior: PriorDomain | None = prior
        #: the proof of its table, over or not; None where it was proved before
        self.adoption: Adoption | None = None

    def destroy(self) -> None:
        """See the class."""
        prior = self.prior
        if prior is None or not prior.devices:
            if prior is not None:
                prior.state, prior.hwpt = FREED, None
            super().destroy()
            return
        self.ioas.hwpts.remove(self)
        give_back(self.ioas, self.domain)
        self.ioas.users -= 1
        prior.state, prior.hwpt = HELD, None


def give_back(ioas: Ioas, domain: Domain) -> None:
    """Take an adopted domain off its IOAS without touching its tables: Ioas.add_domain(adopted=True)
    backwards.
    """
    index = ioas.domains.index(domain)
    tail = ioas.domains.pop()
    if index < len(ioas.domains):
        ioas.domains[index] = tail
    for area in ioas.areas:
        if area.storage is not domain:
            continue
        if ioas.domains:
            area.move(ioas.domains[0])
        else:
            area.release()
    if domain.proof is not None:
        domain.proof.end()
    ioas.unreserve(domain)
    ioas._set_alignment()


@dataclass(eq=False)
class Priors:
    """All prior domains and restored devices of this boot, and who may do what with them.

    :param tested: format name -> features that this kernel is tested with. :param trust: the boot parameter
        unsafe_adopt.
    """

    kernel: Kernel
    profile: Profile
    domains: dict[int, PriorDomain] = field(default_factory=dict)
    #: restored devices by platform index, until their session is finished
    devices: dict[int, PriorDomain] = field(default_factory=dict)
    #: retrieved iommufds (until finish) -> their prior domains by token
    iommufds: WeakKeyDictionary[Iommufd, dict[int, PriorDomain]] = field(default_factory=WeakKeyDictionary)
    #: adopted domains that are not proved, oldest first
    adoptions: list[Adoption] = field(default_factory=list)
    #: preserved frames that nobody claimed: kept while a table that is not proved may lead there
    waiting: list[I64] = field(default_factory=list)
    _next_tick: float = 0.0
    #: HWPTs that user space marked -> token
    marks: WeakKeyDictionary[HwptPaging, int] = field(default_factory=WeakKeyDictionary)

    @property
    def trust(self) -> bool:
        """Booted with unsafe_adopt=1."""
        return self.kernel.params.flag("unsafe_adopt")

    def install(self) -> None:
        """Register the ioctls and the rules of attachment."""
        kernel = self.kernel
        for request, handler in (
            (uapi.IOMMU_HWPT_LIVEUPDATE_MARK_PRESERVE, self.mark_preserve),
            (uapi.IOMMU_HWPT_LIVEUPDATE_ADOPT, self.adopt),
            (uapi.IOMMU_HWPT_LIVEUPDATE_COMPARE, self.compare),
            (uapi.IOMMU_LIVEUPDATE_GET_INFO, self.get_info),
            (uapi.IOMMU_HWPT_LIVEUPDATE_PROGRESS, self.progress),
        ):
            kernel.ioctl_extensions[(Iommufd, request)] = _checked(handler)
        kernel.attach_checks.append(self.check_attach)
        kernel.attached_hooks.append(self.attached)
        kernel.claimants.append(self.claims)
        kernel.background.append(self.sweep)
        self._sweep_rate = kernel.params.number("sweep_rate", SWEEP_RATE)
        self._sweep_tick = max(kernel.params.number("sweep_tick", TICK), 1)

    # ---- boot

    def add(self, record: DomainRecord, pfns: I64, fault: str) -> PriorDomain:
        """A prior domain as its record says; ``fault`` where the record cannot be used.

        :raises InputError: this kernel cannot read such tables at all.
        """
        fmt = open_format(record.format, dict(record.config))
        prior = PriorDomain(record, pfns, fmt, fault=fault)
        known = self.profile.formats.get(record.format)
        if known is None:
            prior.unsupported = f"format {record.format!r} is not in the tested set of {self.profile.name}"
        elif unknown := sorted(set(record.features) - known):
            prior.unsupported = f"features {', '.join(unknown)} of {record.format} are not in the tested set"
        elif dict(fmt.config) != dict(record.config):
            config = dict(record.config)
            prior.unsupported = f"configuration {config} of {record.format} is not in the tested set"
        if not fault and record.top_level != fmt.top_level:
            prior.fault = f"top level {record.top_level}, the format has {fmt.top_level}"
        self.domains[record.index] = prior
        return prior

    def claims(self) -> Iterable[Claim]:
        """Tables of prior domains that the driver has no domain for, and frames that wait."""
        for pfns in self.waiting:
            yield Claim("kept while an adopted table is not proved", pfns)
        for prior in self.domains.values():
            if prior.domain is None and prior.state == HELD:
                yield Claim(f"prior domain {prior.record.index}", prior.pfns)

    def release(self, prior: PriorDomain) -> None:
        """Free the tables of a prior domain that no device uses and nobody adopted."""
        if prior.state != HELD or prior.devices:
            return
        prior.state = FREED
        if prior.domain is not None:
            prior.domain.free(self.free_later)
            prior.domain = None
        else:
            self.free_later(prior.pfns)

    # ---- adopted, and not proved yet

    def free_later(self, pfns: I64) -> None:
        """Free frames that came over the kexec: now, or as soon as no adopted table of this boot is unproved.

        A wrong table may lead there, and devices go on by it.
        """
        if not len(pfns):
            return
        self.waiting.append(pfns)
        self._settle()

    def _settle(self) -> None:
        if self.adoptions:
            return
        for pfns in self.waiting:
            self.kernel.frames.put(pfns)
        self.waiting.clear()

    def _ended(self, adoption: Adoption) -> None:
        self.adoptions.remove(adoption)
        self._settle()

    def sweep(self) -> float:
        """The background sweep: a tick if it is due; in how many seconds the next one is."""
        adoption = next((a for a in self.adoptions if a.pending), None)
        if adoption is None or self._sweep_rate <= 0:
            return math.inf
        now = time.monotonic()
        if now < self._next_tick:
            return self._next_tick - now
        try:
            read = adoption.tick(self._sweep_tick)
        except SysError as error:
            self.kernel.log(f"iommufd: {adoption.name}: the sweep cannot go on: {error}")
            self._next_tick = now + _SWEEP_RETRY
        else:
            spent = time.monotonic() - now
            self._next_tick = now + spent + max(read / self._sweep_rate, _SWEEP_REST * spent)
        return max(self._next_tick - time.monotonic(), 0.0)

    # ---- attachment

    def check_attach(self, idev: IommufdDevice, hwpt: Hwpt) -> None:
        """A restored device moves only to where its DMA is the same; no other device gets to a table that is
        known to be wrong. :raises SysError: EPERM, EUCLEAN.
        """
        prior = self.devices.get(idev.dev.index)
        if prior is None or idev.dev not in prior.devices:
            proof = hwpt.paging.domain.proof
            if proof is not None and proof.quarantined and idev.dev.domain is not hwpt.domain:
                raise SysError(errno.EUCLEAN, f"{proof.name} has quarantined ranges: no device is added")
            return
        if hwpt is prior.hwpt:
            return
        if isinstance(hwpt, HwptPaging) and prior.proofs.get(hwpt) == hwpt.ioas.generation:
            return
        raise SysError(
            errno.EPERM,
            f"{idev.dev.name} is restored: HWPT {hwpt.id} neither adopted its prior domain nor "
            "was it proved equal",
        )

    def attached(self, idev: IommufdDevice, hwpt: Hwpt, before: Domain | None) -> None:
        """A restored device has moved: where it was the last one, its prior domain is freed."""
        prior = self.devices.get(idev.dev.index)
        if prior is None or idev.dev not in prior.devices or hwpt is prior.hwpt:
            return
        prior.devices.discard(idev.dev)
        if not prior.devices and prior.state == HELD:
            self.kernel.log(f"live update: prior domain {prior.record.index} is replaced and freed")
            self.release(prior)

    # ---- looking up

    def _prior(self, iommufd: Iommufd, token: int) -> PriorDomain:
        prior = self.iommufds.get(iommufd, {}).get(token)
        if prior is None:
            raise SysError(errno.ENOENT, f"iommufd has no prior domain with token {token:#x}")
        if prior.state != HELD:
            raise SysError(errno.EBUSY, f"token {token:#x} is reclaimed already ({prior.state})")
        if prior.fault:
            raise SysError(errno.EUCLEAN, f"record of token {token:#x}: {prior.fault}")
        if prior.unsupported:
            raise SysError(errno.EOPNOTSUPP, f"token {token:#x}: {prior.unsupported}")
        return prior

    def _wrong_root(self, prior: PriorDomain) -> Mismatch | None:
        """What hardware uses is not what the record says."""
        for dev in sorted(prior.devices, key=lambda d: d.bdf):
            recorded = ""
            try:
                info = self.kernel.iommu.root_of(dev)
                found: int | None = info.root_pa
                right = (info.root_pa, info.domain_id, info.format) == (
                    prior.record.root_pa,
                    prior.record.domain_id,
                    prior.record.format,
                )
                # What the structures state of the table's shape; the rest is no hardware's to know.
                stated = [key for key in info.root.config if key in info.fmt.config]
                shapes = [
                    ", ".join(f"{key} {fmt.config.get(key)}" for key in stated)
                    for fmt in (info.fmt, prior.fmt)
                ]
                right = right and shapes[0] == shapes[1]
                text = f"root {info.root_pa:#x} ({info.format}, {shapes[0]}, domain id {info.domain_id})"
                if found == prior.record.root_pa:
                    recorded = f" ({prior.record.format}, {shapes[1]}, domain id {prior.record.domain_id})"
            except InputError as error:  # RootFault, or a shape that the format does not have
                found, right, text = None, False, error.what
            if not right:
                wanted = prior.record.root_pa
                text = f"hardware translates {dev.name} by {text}, the record has root {wanted:#x}{recorded}"
                return Mismatch(0, _MAX, wanted, 0, found, 0, "root", None, text)
        return None

    # ---- ioctls

    def mark_preserve(self, ictx: Iommufd, call: Ioctl) -> None:
        """IOMMU_HWPT_LIVEUPDATE_MARK_PRESERVE."""
        cmd = copy_struct_in(uapi.iommu_hwpt_liveupdate_mark_preserve, call.raw)
        hwpt = ictx.hwpt(cmd.hwpt_id)
        if ictx.preserved:
            raise SysError(errno.EBUSY, "the iommufd is preserved")
        for other, token in self.marks.items():
            if other.iommufd is not ictx or ictx.objects.get(other.id) is not other:
                continue
            if other is not hwpt and token == cmd.hwpt_token:
                raise SysError(errno.EADDRINUSE, f"HWPT {other.id} has token {token:#x}")
            if other is hwpt and token != cmd.hwpt_token:
                raise SysError(errno.EINVAL, f"HWPT {hwpt.id} is marked with token {token:#x} already")
        if hwpt.domain.seal is None:
            with contextlib.suppress(SysError):  # what cannot be sealed is refused when it is preserved
                hwpt.domain.set_seal(expected_extents(hwpt.ioas))
        self.marks[hwpt] = cmd.hwpt_token
        call.respond(cmd)

    def marked(self, ictx: Iommufd) -> list[tuple[HwptPaging, int]]:
        """The marked HWPTs of an iommufd with their tokens, by id."""
        items = [(h, t) for h, t in self.marks.items() if ictx.objects.get(h.id) is h]
        return sorted(items, key=lambda item: item[0].id)

    def adopt(self, ictx: Iommufd, call: Ioctl) -> None:
        """IOMMU_HWPT_LIVEUPDATE_ADOPT."""
        cmd = copy_struct_in(uapi.iommu_hwpt_liveupdate_adopt, call.raw)
        if cmd.flags not in _ADOPT_FLAGS or getattr(cmd, "__reserved"):
            raise SysError(errno.EOPNOTSUPP, f"ADOPT flags {cmd.flags:#x}")
        trust = bool(cmd.flags & uapi.IOMMU_LIVEUPDATE_ADOPT_TRUST)
        if trust and not self.trust:
            raise SysError(errno.EPERM, "ADOPT_TRUST needs the boot parameter unsafe_adopt=1")
        ioas = ictx.ioas(cmd.ioas_id)
        prior = self._prior(ictx, cmd.hwpt_token)
        ioas.check_mutable()
        domain, fmt = prior.domain, prior.fmt
        if domain is None:
            raise AssertionError("a held prior domain without a domain")
        later = bool(cmd.flags & _LATER)
        if later:
            self._check_start(cmd, call, ioas, prior)
        elif not trust:
            self._validate(cmd, call, ioas, prior, fmt)
        cmd.out_hwpt_id = 0
        if not cmd.flags & uapi.IOMMU_LIVEUPDATE_ADOPT_VALIDATE_ONLY:
            name = f"prior domain {prior.record.index}"
            adoption = Adoption(ioas, domain, name, prior.pfns, self._ended) if later else None
            ioas.add_domain(domain, adopted=True, proof=adoption)
            if adoption is not None:
                self.adoptions.append(adoption)
            hwpt = AdoptedHwpt(ictx, ioas, domain, prior)
            hwpt.adoption = adoption
            ioas.hwpts.append(hwpt)
            prior.state, prior.hwpt = ADOPTED, hwpt
            cmd.out_hwpt_id = ictx.add(hwpt)
            how = "TRUSTED, UNVALIDATED" if trust else f"{cmd.out_pages} pages validated"
            if later:
                how = "to be validated before use"
            self.kernel.log(f"iommufd: prior domain {prior.record.index} is HWPT {hwpt.id} now, {how}")
        call.respond(cmd)

    def _check_start(
        self, cmd: uapi.iommu_hwpt_liveupdate_adopt, call: Ioctl, ioas: Ioas, prior: PriorDomain
    ) -> None:
        """What is checked before an adoption whose proof comes later: the root; where the record is sealed,
        also the digest.
        """
        start = time.thread_time_ns()
        wrong = self._wrong_root(prior)
        if wrong is None and cmd.flags & uapi.IOMMU_LIVEUPDATE_ADOPT_SEALED:
            wrong = self._wrong_digest(ioas, prior)
            cmd.out_pages = _totals(ioas) >> 12 if wrong is None else 0
        capacity = min(cmd.mismatch_capacity, MAX_MISMATCHES)
        if wrong is not None:
            verdict = Verdict(equal=False, mismatches=[wrong], total=1)
        else:
            verdict = self._crossed(ioas, prior, capacity)
        cmd.out_validate_ns = time.thread_time_ns() - start
        pages = cmd.out_pages
        self._fill(cmd, verdict)
        cmd.out_pages = pages if verdict.equal else 0
        cmd.out_layout_differences = NOT_COUNTED
        self._refuse(cmd, call, verdict, capacity, f"IOAS {ioas.id}")

    def _crossed(self, ioas: Ioas, prior: PriorDomain, limit: int) -> Verdict:
        """Leaves of the prior table that cross an edge of an area: an unmap of that area alone could not take
        them out (iommufd maps each area by its own). One walk for each edge.
        """
        edges = np.array([e for a in ioas.areas for e in (a.iova, a.last + 1)][:-1], np.uint64)
        if ioas.areas and ioas.areas[-1].last < _MAX:
            edges = np.append(edges, np.uint64(ioas.areas[-1].last + 1))
        try:
            found = crossing(prior.fmt, self.kernel.frames.ram, prior.record.root_pa, edges)
        except IokeepError as error:
            absent = Mismatch(0, _MAX, prior.record.root_pa, 0, None, 0, "absent", None, error.what)
            return Verdict(equal=False, mismatches=[absent], total=1)
        rows = []
        for i in range(min(len(found), max(limit, 1))):
            iova, last = int(found.iova[i]), int(found.last[i])
            area = next(areas_in(ioas, iova, last))
            edge = area.iova if area.iova > iova else area.last + 1
            text = (
                f"iova {iova:#x}-{last:#x}: span: a leaf of {last - iova + 1:#x} bytes crosses the edge of "
                f"an area at {edge:#x}, which could not be unmapped without it: map the areas as they were "
                "mapped before the kexec, or build a new HWPT and COMPARE it"
            )
            row = Mismatch(iova, last, None, 0, int(found.pa[i]), int(found.prot[i]), "span", None, text)
            rows.append(row)
        return Verdict(equal=not len(found), mismatches=rows, total=len(found))

    def _wrong_digest(self, ioas: Ioas, prior: PriorDomain) -> Mismatch | None:
        """The areas are not those whose translations the old kernel sealed. No table is read."""
        record = prior.record
        expected = normalised(expected_extents(ioas).canonical(), prior.fmt.write_only)
        if hmac.compare_digest(digest_extents(expected, record.digest_key), record.digest):
            return None
        text = (
            f"the areas of IOAS {ioas.id} translate {expected.mapped_bytes} bytes otherwise than the "
            f"{record.mapped_bytes} bytes that were sealed"
        )
        return Mismatch(0, _MAX, None, None, None, None, "digest", None, text)

    def _validate(
        self,
        cmd: uapi.iommu_hwpt_liveupdate_adopt,
        call: Ioctl,
        ioas: Ioas,
        prior: PriorDomain,
        fmt: Format,
    ) -> None:
        expected = expected_extents(ioas)
        capacity = min(cmd.mismatch_capacity, MAX_MISMATCHES)
        start = time.thread_time_ns()
        verdict = self._guarded(
            lambda: verify(
                fmt,
                self.kernel.frames.ram,
                prior.record.root_pa,
                expected,
                limit=max(capacity, 1),
                owned=pas_of(prior.pfns),
            ),
            prior,
        )
        if verdict.equal:
            crossed = self._crossed(ioas, prior, capacity)
            verdict = verdict if crossed.equal else crossed
        cmd.out_validate_ns = time.thread_time_ns() - start
        self._fill(cmd, verdict)
        self._refuse(cmd, call, verdict, capacity, f"IOAS {ioas.id}")
        if cmd.flags & uapi.IOMMU_LIVEUPDATE_ADOPT_VALIDATE_ONLY or verdict.table_bytes <= LAYOUT_ALWAYS:
            ours = kernel_layout(fmt, expected, ioas.max_leaf_lg2)
            theirs = table_layout(fmt, self.kernel.frames.ram, prior.record.root_pa)
            _, total = compare_layouts(ours, theirs, 0)
            cmd.out_layout_differences = min(total, NOT_COUNTED - 1)
        else:
            cmd.out_layout_differences = NOT_COUNTED

    def compare(self, ictx: Iommufd, call: Ioctl) -> None:
        """IOMMU_HWPT_LIVEUPDATE_COMPARE."""
        cmd = copy_struct_in(uapi.iommu_hwpt_liveupdate_compare, call.raw)
        if cmd.flags or getattr(cmd, "__reserved") or getattr(cmd, "__reserved2"):
            raise SysError(errno.EOPNOTSUPP, f"COMPARE flags {cmd.flags:#x}")
        hwpt = ictx.hwpt(cmd.hwpt_id)
        prior = self._prior(ictx, cmd.hwpt_token)
        fmt = prior.fmt
        if hwpt.domain.proof is not None:  # it is what the other one is measured by
            hwpt.domain.proof.need_all()
        capacity = min(cmd.mismatch_capacity, MAX_MISMATCHES)
        ram = self.kernel.frames.ram
        start = time.thread_time_ns()
        verdict = self._guarded(
            lambda: diff(
                hwpt.domain.fmt,
                ram,
                hwpt.domain.root_pa,
                fmt,
                ram,
                prior.record.root_pa,
                limit=max(capacity, 1),
            ),
            prior,
        )
        cmd.out_compare_ns = time.thread_time_ns() - start
        self._fill(cmd, verdict)
        self._refuse(cmd, call, verdict, capacity, f"HWPT {hwpt.id}")
        prior.proofs[hwpt] = hwpt.ioas.generation
        call.respond(cmd)

    def _guarded(self, check: Callable[[], Verdict], prior: PriorDomain) -> Verdict:
        """The hardware's root first, then ``check``; tables that are none at all are a mismatch, no crash."""
        wrong = self._wrong_root(prior)
        if wrong is not None:
            return Verdict(equal=False, mismatches=[wrong], total=1)
        try:
            return check()
        except IokeepError as error:
            found = Mismatch(0, _MAX, prior.record.root_pa, 0, None, 0, "absent", None, error.what)
            return Verdict(equal=False, mismatches=[found], total=1)

    @staticmethod
    def _fill(
        cmd: uapi.iommu_hwpt_liveupdate_adopt | uapi.iommu_hwpt_liveupdate_compare, verdict: Verdict
    ) -> None:
        cmd.out_pages = max(verdict.pages, 0)
        cmd.out_table_bytes = verdict.table_bytes
        cmd.out_layout_differences = min(verdict.layout_total, 2**32 - 1)
        cmd.out_mismatches = min(verdict.total, 2**32 - 1)

    def _refuse(
        self,
        cmd: uapi.iommu_hwpt_liveupdate_adopt | uapi.iommu_hwpt_liveupdate_compare,
        call: Ioctl,
        verdict: Verdict,
        capacity: int,
        what: str,
    ) -> None:
        """EINVAL with the ranges where the verdict is not equal; the structure is copied out all the same."""
        if verdict.equal:
            return
        rows = verdict.mismatches[:capacity]
        if rows:
            call.process.copy_to_user(cmd.mismatch_uptr, b"".join(bytes(_row(m)) for m in rows))
        call.respond(cmd)
        for m in verdict.mismatches[:4]:
            self.kernel.log(f"iommufd: {what} against token {cmd.hwpt_token:#x}: {m.text}")
        raise SysError(
            errno.EINVAL,
            f"{what} is not what the prior domain of token {cmd.hwpt_token:#x} translates: "
            f"{verdict.total} ranges differ",
            respond=True,
        )

    def progress(self, ictx: Iommufd, call: Ioctl) -> None:
        """IOMMU_HWPT_LIVEUPDATE_PROGRESS."""
        cmd = copy_struct_in(uapi.iommu_hwpt_liveupdate_progress, call.raw)
        if cmd.flags & ~uapi.IOMMU_LIVEUPDATE_PROGRESS_SWEEP:
            raise SysError(errno.EOPNOTSUPP, f"PROGRESS flags {cmd.flags:#x}")
        hwpt = ictx.hwpt(cmd.hwpt_id)
        adoption = hwpt.adoption if isinstance(hwpt, AdoptedHwpt) else None
        if adoption is not None and cmd.flags & uapi.IOMMU_LIVEUPDATE_PROGRESS_SWEEP:
            while adoption.pending and adoption.tick(1 << 30):
                pass
        proof = hwpt.domain.proof
        cmd.out_state = uapi.IOMMU_LIVEUPDATE_VALIDATED
        cmd.out_validated, cmd.out_unknown, cmd.out_quarantined = _totals(hwpt.ioas), 0, 0
        cmd.out_table_bytes = cmd.out_validate_ns = cmd.out_mismatches = 0
        if adoption is not None:
            cmd.out_table_bytes = adoption.state.table_bytes
            cmd.out_validate_ns = adoption.validate_ns
        if proof is not None:
            cmd.out_state = (
                uapi.IOMMU_LIVEUPDATE_VALIDATING if proof.pending else uapi.IOMMU_LIVEUPDATE_QUARANTINED
            )
            cmd.out_validated, cmd.out_unknown, cmd.out_quarantined = proof.progress()
            cmd.out_mismatches = min(proof.state.total, 2**32 - 1)
            rows = proof.state.mismatches[: min(cmd.mismatch_capacity, MAX_MISMATCHES)]
            if rows:
                call.process.copy_to_user(cmd.mismatch_uptr, b"".join(bytes(_row(m)) for m in rows))
        call.respond(cmd)

    def get_info(self, ictx: Iommufd, call: Ioctl) -> None:
        """IOMMU_LIVEUPDATE_GET_INFO."""
        cmd = copy_struct_in(uapi.iommu_liveupdate_info, call.raw)
        if cmd.flags:
            raise SysError(errno.EOPNOTSUPP, f"GET_INFO flags {cmd.flags:#x}")
        priors = self.iommufds.get(ictx, {})
        rows = []
        for token, prior in list(priors.items())[: cmd.hwpt_capacity]:
            row = uapi.iommu_liveupdate_hwpt()
            row.token = token
            row.flags = uapi.IOMMU_LIVEUPDATE_HWPT_RECLAIMED if prior.state != HELD else 0
            row.digest_lo = int.from_bytes(prior.record.digest[:8], "little")
            row.mapped_bytes = min(prior.record.mapped_bytes, _MAX)
            rows.append(bytes(row))
        if rows:
            call.process.copy_to_user(cmd.hwpt_uptr, b"".join(rows))
        cmd.out_hwpts = len(priors)
        call.respond(cmd)


def _totals(ioas: Ioas) -> int:
    """Bytes of all areas."""
    return sum(area.length for area in ioas.areas)


def _row(m: Mismatch) -> uapi.iommu_liveupdate_mismatch:
    row = uapi.iommu_liveupdate_mismatch()
    row.iova, row.last = m.iova, m.last
    row.expected_pa = uapi.IOMMU_MISMATCH_NO_PA if m.expected_pa is None else m.expected_pa
    row.found_pa = uapi.IOMMU_MISMATCH_NO_PA if m.found_pa is None else m.found_pa
    row.expected_prot, row.found_prot = m.expected_prot or 0, m.found_prot or 0
    row.reason = _NUMBERS[m.reason]
    row.level = uapi.IOMMU_MISMATCH_NO_LEVEL if m.level is None else m.level
    return row


def _checked(handler: Callable[[Iommufd, Ioctl], None]) -> Callable[[Iommufd, Ioctl], int]:
    """Turns copy_struct's OSError into the ioctl's errno."""

    def serve(ictx: Iommufd, call: Ioctl) -> int:
        try:
            handler(ictx, call)
        except OSError as error:
            raise SysError(error.errno or errno.EIO, str(error)) from error
        return 0

    return serve
