# SPDX-License-Identifier: Apache-2.0
"""After the kexec: retrieve, replay, and give the devices their HWPT by a policy; or leave everything as it
was.

Plan, check, act with a journal, verify, commit; undo in reverse. The commit point is the first attach of a
device: before it, everything that was made is destroyed again (an adopted prior domain goes back to
*held*), and the devices stay on the prior tables throughout. Behind it a restarted VMM goes forward, for
there is no way back.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from iokeep.errors import InputError, IokeepError, KernelRefused, KernelRefusedPartly, UsageError
from iokeep.iommufd.client import Ioas, Iommufd, Mismatch, NotEqual, VfioDevice
from iokeep.luo.client import Session
from iokeep.restore.journal import Entry, Journal, Kind
from iokeep.restore.manifest import HEADER_BYTES, MANIFEST_TOKEN, Area, Manifest, header_of, read_payload
from iokeep.restore.plan import check_priors, make_plan
from iokeep.restore.policies import Policy, policy_of
from iokeep.uapi.transport import Transport

__all__ = ["Live", "RestoreResult", "Step", "load_manifest", "restore"]

#: told at the start of each step and as it goes on: (step, done, of how many)
Watch = Callable[[str, int, int], None]
#: object ids that are tried when a VMM died between an ioctl and the note of its result
_SEARCH = 64


@dataclass(frozen=True, slots=True)
class Step:
    """One step: its name, its start on CLOCK_MONOTONIC (ns) and how long it took (ns)."""

    name: str
    start_ns: int
    ns: int


@dataclass(slots=True)
class Live:
    """What a restored VMM holds. After a refused restore the same without ``ioases`` and ``hwpts``.

    ``files``, ``hwpts`` and ``devices`` go by token, ``ioases`` by index. ``close`` gives the descriptors
    back; the session holds files and devices until it is finished.
    """

    transport: Transport
    session: Session
    manifest: Manifest | None = None
    manifest_fd: int = -1
    files: dict[int, int] = field(default_factory=dict)
    iommufd: Iommufd | None = None
    ioases: dict[int, Ioas] = field(default_factory=dict)
    hwpts: dict[int, int] = field(default_factory=dict)
    devices: dict[int, VfioDevice] = field(default_factory=dict)
    device_ids: dict[int, int] = field(default_factory=dict)

    def close(self) -> None:
        """Close all descriptors but the session's. Idempotent."""
        for device in self.devices.values():
            device.close()
        if self.iommufd is not None:
            self.iommufd.close()
        for fd in [*self.files.values(), self.manifest_fd]:
            if fd >= 0:
                self.transport.close(fd)
        self.devices, self.files, self.manifest_fd = {}, {}, -1


@dataclass(slots=True)
class RestoreResult:
    """How a restore ended.

    :param outcome: "restored" or "refused" (nothing adopted, devices still on the prior tables).
    :param reason: why it was refused, or "". :param mismatches: the first of ``total_mismatches`` ranges
        that differ.
    :param pages: 4 KiB pages proved (by sealed: whose set-up was). :param areas: areas replayed.
    :param table_bytes: bytes of tables that were read for the proof. :param validate_ns: CPU time in ns of
        the kernel for the proof.
    :param layout_differences: ranges with another leaf size than this kernel's own map would choose
        (adopt), or than the prior domain has (rebuild). :param steps: what was done when. :param journal:
        its entries, as text.
    :param resumed: a journal of a VMM that died was found; what was done with it.
    """

    policy: str
    outcome: str = "refused"
    reason: str = ""
    mismatches: list[Mismatch] = field(default_factory=list)
    total_mismatches: int = 0
    pages: int = 0
    areas: int = 0
    table_bytes: int = 0
    validate_ns: int = 0
    layout_differences: int = 0
    steps: list[Step] = field(default_factory=list)
    journal: list[str] = field(default_factory=list)
    resumed: str = ""
    live: Live | None = None


def load_manifest(transport: Transport, fd: int) -> tuple[Manifest, Journal]:
    """The manifest and the journal in the memfd ``fd``. :raises InputError: damaged, or of another
    version."""
    size = transport.fstat(fd).st_size
    header = header_of(transport.pread(fd, HEADER_BYTES, 0), size)
    manifest = read_payload(transport.pread(fd, header.journal_offset, 0), header)

    def read(length: int, offset: int) -> bytes:
        return transport.pread(fd, length, offset)

    def write(data: bytes, offset: int) -> int:
        return transport.pwrite(fd, data, offset)

    return manifest, Journal(read, write, header.journal_offset, header.slots, header.digest)


def restore(
    transport: Transport,
    session: Session,
    policy: str = "adopt",
    *,
    areas: Iterable[Area] | None = None,
    watch: Watch | None = None,
    unsafe: bool = False,
    held: Mapping[int, int] | None = None,
    capacity: int = 16,
) -> RestoreResult:
    """Restore the VMM that was saved in ``session`` (retrieved, not finished).

    :param areas: what to replay; the manifest's areas if None.
    :param watch: told at each step. :param unsafe: allow policy trust.
    :param held: token -> descriptor that a custodian kept; these are used and not retrieved.
    :param capacity: how many mismatches to fetch.
    :return: also where the kernel or a damaged record refused; then everything is undone.
    :raises UsageError: no such policy, or areas that cannot be replayed; everything is undone.
    :raises KernelRefusedPartly: something failed behind the commit point, or an undo failed; the message
        says what is left.
    """
    return _Run(
        transport, session, policy_of(policy, unsafe=unsafe), areas, watch, held or {}, capacity
    ).run()


class _Run:
    """One restore."""

    def __init__(
        self,
        transport: Transport,
        session: Session,
        policy: Policy,
        areas: Iterable[Area] | None,
        watch: Watch | None,
        held: Mapping[int, int],
        capacity: int,
    ) -> None:
        self.transport = transport
        self.session = session
        self.policy = policy
        self.wanted = None if areas is None else tuple(areas)
        self.watch = watch or (lambda step, done, total: None)
        self.held = held
        self.capacity = capacity
        self.live = Live(transport, session)
        self.result = RestoreResult(policy.name, live=self.live)
        self.journal: Journal | None = None
        self.committed = False
        self._step: tuple[str, int] | None = None

    # ---- the course

    def run(self) -> RestoreResult:
        try:
            self._begin("retrieve")
            manifest, journal = self._retrieve_manifest()
            self._retrieve(manifest)
            forward = self._resume(journal)
            self._bind(manifest, journal)
            areas = make_plan(manifest, self.policy, self.wanted).areas
            if not forward:
                assert self.live.iommufd is not None
                check_priors(manifest, self.live.iommufd.liveupdate_info())
                journal.add(Kind.BEGIN, self.policy.number)
                self._begin("replay")
                self._replay(manifest, journal, areas)
                if self.policy.prove:
                    self._begin(self.policy.prove)
                    self._prove(manifest, journal)
            self.result.areas = len(areas)
            self._begin(self.policy.take)
            self._take(manifest, journal)
            self._begin("finish")
            self._finish(journal)
        except NotEqual as e:
            self.result.mismatches = list(e.mismatches)
            self.result.total_mismatches = max(e.total, len(e.mismatches))
            self._refuse(e)
        except (KernelRefused, InputError, OSError) as e:
            self._refuse(e)
        except UsageError as e:
            self._end()
            self._undo(e)
            raise
        else:
            self._end()
            self.result.outcome = "restored"
        if self.journal is not None:
            self.result.journal = [entry.text() for entry in self.journal.entries]
        return self.result

    def _begin(self, step: str) -> None:
        self._end()
        self.watch(step, 0, 0)
        self._step = (step, time.monotonic_ns())

    def _end(self) -> None:
        if self._step is not None:
            name, start = self._step
            self.result.steps.append(Step(name, start, time.monotonic_ns() - start))
            self._step = None

    def _refuse(self, error: Exception) -> None:
        """Undo, and say why in the result. Behind the commit point there is nothing to undo to."""
        self._end()
        reason = error.what if isinstance(error, IokeepError) else f"{error}"
        if self.committed:
            raise KernelRefusedPartly(
                f"restore by {self.policy.name}: {reason}; devices are on their new HWPT already",
                "call restore() again: the journal goes on where this stopped",
            ) from error
        self._undo(error)
        self.result.outcome = "refused"
        self.result.reason = reason

    # ---- retrieve

    def _fetch(self, token: int) -> int:
        fd = self.held.get(token)
        return self.session.retrieve(token) if fd is None else fd

    def _retrieve_manifest(self) -> tuple[Manifest, Journal]:
        try:
            self.live.manifest_fd = self._fetch(MANIFEST_TOKEN)
        except (KernelRefused, OSError) as e:
            if _errno(e) != errno.ENOENT:
                raise
            raise InputError(
                "the session holds no manifest: it was finished already, or iokeep did not save it",
                "a custodian that kept descriptors of a finished session hands them to the VMM",
            ) from e
        manifest, journal = load_manifest(self.transport, self.live.manifest_fd)
        self.live.manifest, self.journal = manifest, journal
        return manifest, journal

    def _retrieve(self, manifest: Manifest) -> None:
        total = len(manifest.files) + 1 + len(manifest.devices)
        for n, entry in enumerate(manifest.files):
            self.watch("retrieve", n + 1, total)
            fd = self._fetch(entry.token)
            self.live.files[entry.token] = fd
            size = self.transport.fstat(fd).st_size
            if size != entry.size:
                raise InputError(
                    f"file token {entry.token:#x} ({entry.name}) came back with {size:#x} bytes, "
                    f"the manifest says {entry.size:#x}"
                )
        self.live.iommufd = Iommufd(self.transport, self._fetch(manifest.iommufd))
        for device in manifest.devices:
            self.live.devices[device.token] = VfioDevice(self.transport, self._fetch(device.token))
        self.watch("retrieve", total, total)

    def _bind(self, manifest: Manifest, journal: Journal) -> None:
        """Bind each device to the retrieved iommufd, unless a dead predecessor has done so: the file is the
        same."""
        assert self.live.iommufd is not None
        known = {e.b: e.a for e in journal.entries if e.kind is Kind.BOUND}
        for device in manifest.devices:
            if device.token in known:
                self.live.device_ids[device.token] = known[device.token]
                continue
            try:
                number = self.live.devices[device.token].bind(self.live.iommufd)
            except (KernelRefused, OSError) as e:
                # EINVAL: bound already. Its id was lost with the predecessor; only rebuild needs it, and
                # looks for it.
                if _errno(e) != errno.EINVAL:
                    raise
                continue
            self.live.device_ids[device.token] = number
            journal.add(Kind.BOUND, number, device.token)

    # ---- a predecessor that died

    def _resume(self, journal: Journal) -> bool:
        """Undo what a dead predecessor left, or take over behind its commit point. True = go forward."""
        assert self.live.iommufd is not None
        left = [e for e in journal.live() if e.kind not in (Kind.BEGIN, Kind.BOUND, Kind.REFUSED)]
        if not left:
            return False
        if any(e.kind in (Kind.INTENT_ATTACH, Kind.ATTACHED) for e in left):
            begun = [e.a for e in journal.entries if e.kind is Kind.BEGIN]
            if begun and begun[-1] != self.policy.number:
                raise UsageError(
                    f"an earlier restore by policy number {begun[-1]} has attached devices already",
                    "restore with the same policy",
                )
            self.committed = True
            for e in left:
                if e.kind is Kind.IOAS:
                    self.live.ioases[e.b] = self.live.iommufd.ioas(e.a)
                elif e.kind in (Kind.HWPT, Kind.ADOPTED):
                    self.live.hwpts[e.b] = e.a
                elif e.kind is Kind.PROVED:
                    self._proved(e)
            self.result.resumed = "went on behind the commit point of a restore that was cut off"
            return True
        undone = self._undo_entries(journal)
        self.result.resumed = f"undid {undone} leftovers of a restore that was cut off"
        return False

    # ---- replay

    def _replay(self, manifest: Manifest, journal: Journal, areas: Sequence[Area]) -> None:
        live = self.live
        assert live.iommufd is not None
        for index in range(manifest.ioases):
            journal.add(Kind.INTENT_IOAS, index)
            ioas = live.iommufd.ioas_alloc()
            journal.add(Kind.IOAS, ioas.id, index)
            live.ioases[index] = ioas
            allowed = ioas.iova_ranges()
            for a in areas:
                inside = any(start <= a.iova and a.last <= last for start, last in allowed)
                if a.ioas == index and not inside:
                    where = f"area iova {a.iova:#x}-{a.last:#x}"
                    raise UsageError(f"{where} is not in what IOAS {ioas.id} allows")
        for n, a in enumerate(areas):
            self.watch("replay", n + 1, len(areas))
            live.ioases[a.ioas].map_file(live.files[a.file], a.offset, a.length, iova=a.iova, prot=a.prot)
            self.result.areas = n + 1

    # ---- prove and take

    def _prove(self, manifest: Manifest, journal: Journal) -> None:
        live = self.live
        assert live.iommufd is not None
        for n, entry in enumerate(manifest.hwpts):
            self.watch(self.policy.prove, n + 1, len(manifest.hwpts))
            ioas = live.ioases[entry.ioas]
            if self.policy.name == "rebuild":
                journal.add(Kind.INTENT_HWPT, entry.token)
                number = self._hwpt_alloc(manifest, entry.token, ioas.id)
                journal.add(Kind.HWPT, number, entry.token)
                live.hwpts[entry.token] = number
                compared = live.iommufd.compare(number, entry.token, capacity=self.capacity)
                ns = compared.compare_ns
                pages, table_bytes = compared.pages, compared.table_bytes
                layout = compared.layout_differences
            else:
                sealed = self.policy.name == "sealed"
                found = live.iommufd.adopt(
                    ioas.id, entry.token, validate_only=True, sealed=sealed, capacity=self.capacity
                )
                ns, pages, table_bytes = found.validate_ns, found.pages, found.table_bytes
                layout = 0 if sealed else found.layout_differences
            self._proved(journal.add(Kind.PROVED, pages, table_bytes, ns, layout))

    def _proved(self, entry: Entry) -> None:
        """Count one proof, this VMM's or its predecessor's."""
        self.result.pages += entry.a
        self.result.table_bytes += entry.b
        self.result.validate_ns += entry.c
        self.result.layout_differences += entry.d

    def _hwpt_alloc(self, manifest: Manifest, token: int, ioas_id: int) -> int:
        """A HWPT of the IOAS, for a device that is on the prior domain of ``token``."""
        assert self.live.iommufd is not None
        device = next((d.token for d in manifest.devices if d.hwpt == token), None)
        if device is None:
            raise UsageError(f"HWPT token {token:#x} has no device: there is nothing to rebuild it for")
        number = self.live.device_ids.get(device)
        if number is not None:
            return self.live.iommufd.hwpt_alloc(number, ioas_id)
        for number in range(1, _SEARCH):
            try:
                return self.live.iommufd.hwpt_alloc(number, ioas_id)
            except (KernelRefused, OSError) as e:
                if _errno(e) not in (errno.ENOENT, errno.EINVAL):
                    raise
        raise InputError(f"device token {device:#x} is bound, but its id is not in the journal")

    def _take(self, manifest: Manifest, journal: Journal) -> None:
        live, result = self.live, self.result
        assert live.iommufd is not None
        for entry in manifest.hwpts:
            if entry.token in live.hwpts:
                continue
            ioas = live.ioases[entry.ioas]
            journal.add(Kind.INTENT_ADOPT, ioas.id, entry.token)
            name = self.policy.name
            found = live.iommufd.adopt(
                ioas.id,
                entry.token,
                trust=name == "trust",
                deferred=name == "deferred",
                sealed=name == "sealed",
                capacity=self.capacity,
            )
            journal.add(Kind.ADOPTED, found.hwpt_id, entry.token, ioas.id)
            live.hwpts[entry.token] = found.hwpt_id
            if not result.table_bytes:
                result.table_bytes = found.table_bytes
        for n, device in enumerate(manifest.devices):
            self.watch(self.policy.take, n + 1, len(manifest.devices))
            number = live.hwpts[device.hwpt]
            journal.add(Kind.INTENT_ATTACH, number, device.token)
            try:
                live.devices[device.token].attach(number)
            except (KernelRefused, OSError):
                if n:
                    self.committed = True
                raise
            journal.add(Kind.ATTACHED, number, device.token)
            self.committed = True

    def _finish(self, journal: Journal) -> None:
        self.committed = True
        self.session.finish()
        journal.add(Kind.FINISHED)

    # ---- undo

    def _undo(self, error: Exception) -> None:
        if self.journal is None or self.live.iommufd is None or self.committed:
            return
        try:
            self._undo_entries(self.journal)
            self.journal.add(Kind.REFUSED)
        except (KernelRefused, OSError) as worse:
            raise KernelRefusedPartly(
                f"restore by {self.policy.name}: {error}; and the undo failed: {worse}",
                "the journal in the manifest knows what is left",
            ) from error
        self.live.ioases, self.live.hwpts = {}, {}

    def _undo_entries(self, journal: Journal) -> int:
        """Destroy, in reverse, what the journal says was made and what its open intents may have made."""
        assert self.live.iommufd is not None
        live = journal.live()
        made = [e for e in live if e.kind in (Kind.IOAS, Kind.HWPT, Kind.ADOPTED)]
        undone = 0
        for intent in reversed(journal.open_intents()):
            undone += self._undo_intent(intent, made, journal)
        for e in reversed(made):
            try:
                self.live.iommufd.destroy(e.a)
            except (KernelRefused, OSError) as error:
                # ENOENT: destroyed by a predecessor that died before it could say so.
                if _errno(error) != errno.ENOENT:
                    raise
            journal.undone(e)
            undone += 1
        for e in live:
            if e.kind in (Kind.INTENT_ATTACH, Kind.ATTACHED):
                journal.undone(e)
        return undone

    def _undo_intent(self, intent: Entry, made: Sequence[Entry], journal: Journal) -> int:
        """An ioctl that may have made an object whose id nobody noted: destroy what is there and is not
        known.

        Nothing else can be there: this iommufd came over the kexec without an IOAS or a HWPT of its own.
        """
        assert self.live.iommufd is not None
        known = {e.a for e in made} | {e.a for e in journal.entries if e.kind is Kind.BOUND}
        gone = 0
        for number in range(1, _SEARCH):
            if number in known:
                continue
            try:
                self.live.iommufd.destroy(number)
                gone += 1
            except (KernelRefused, OSError) as e:
                if _errno(e) not in (errno.ENOENT, errno.EBUSY, errno.EINVAL):
                    raise
        journal.undone(intent)
        return gone


def _errno(error: Exception) -> int | None:
    number = getattr(error, "errno", None)
    return number if isinstance(number, int) else None
