# SPDX-License-Identifier: Apache-2.0
"""The new kernel's side of the handover: what is kept, what is freed, and what is never touched.

Runs before any frame is handed out. There are three ways to go on:

* *nothing*: no handover, or a KHO FDT of another version. Linux then boots as if there were none
  (kernel/liveupdate/kexec_handover.c, kho_populate(): a warning), and so does this kernel;
* *restored*: everything was read, every rule holds. What the tree preserves is reserved, the IOMMU goes on
  translating, prior domains are held;
* *held*: something is damaged or of a version that this kernel does not know. Every frame that has an
  owner stays as it is, and the IOMMU with it; /dev/liveupdate gives EIO. Devices and their memory go on.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from iokeep.errors import InputError, IokeepError
from iokeep.handover.abi import KHO_FDT_COMPATIBLE
from iokeep.handover.iommu import DomainRecord, IommufdRecord, IommuRecord, VfioRecord
from iokeep.handover.luo import File as FileRecord
from iokeep.handover.reader import Handover, read_handover
from iokeep.mem.memory import Memory
from iokeep.pt.registry import open_format
from iokeep.soft.hardware import bar
from iokeep.soft.kernel import vfio
from iokeep.soft.kernel.adopt import Priors
from iokeep.soft.kernel.frames import (
    FIRMWARE_FRAMES,
    FRAME_BYTES,
    FRAME_SHIFT,
    I64,
    U32,
    Claim,
    Kind,
    pfns_of,
)
from iokeep.soft.kernel.freeze import Freeze
from iokeep.soft.kernel.iommu import Inherited, holds_root
from iokeep.soft.kernel.kho import KhoOut
from iokeep.soft.kernel.liveupdate import LiveUpdateDevice
from iokeep.soft.kernel.luo import FileHandler, IncomingFile, IncomingSession, Luo
from iokeep.soft.kernel.preserve_iommufd import IommufdHandler
from iokeep.soft.kernel.preserve_memfd import IncomingMemfd, MemfdHandler
from iokeep.soft.kernel.preserve_vfio import VfioHandler
from iokeep.soft.kernel.profiles import Profile, profile_of
from iokeep.soft.kernel.syserror import SysError
from iokeep.soft.kernel.vfio import node_path

if TYPE_CHECKING:
    from iokeep.soft.kernel.files import File
    from iokeep.soft.kernel.kernel import Kernel
    from iokeep.soft.kernel.process import Process


class Damaged(Exception):
    """The handover breaks a rule; the text says which. The kernel then holds everything."""


@dataclass(slots=True)
class Restored:
    """A handover that was read and checked.

    Frames (int64 pfns, sorted): ``preserved`` all of them; ``tables`` by domain index; ``structures`` of the
    IOMMUs; ``other``: what the tree has beyond these and the memfds (records, and anything that no
    record names). ``memfds`` and ``iommufds`` and ``vfios`` by the pa of their record.
    """

    liveupdate_num: int
    kexec_count: int
    sessions: list[IncomingSession]
    iommu: IommuRecord | None
    preserved: I64
    tables: dict[int, I64] = field(default_factory=dict)
    structures: I64 = field(default_factory=lambda: np.zeros(0, np.int64))
    other: I64 = field(default_factory=lambda: np.zeros(0, np.int64))
    memfds: dict[int, IncomingMemfd] = field(default_factory=dict)
    iommufds: dict[int, IommufdRecord] = field(default_factory=dict)
    vfios: dict[int, VfioRecord] = field(default_factory=dict)
    #: an IOMMU record is there, of a version that this kernel does not know: its name
    foreign_iommu: str = ""


def read_boot(mem: Memory, fdt_pa: int, tags: U32, profile: Profile) -> Restored | None:
    """Read the handover whose FDT is at ``fdt_pa``; None where it is of another KHO version.

    :param tags: owner tag of each frame.
    :raises Damaged: it cannot be used.
    """
    try:
        handover = read_handover(mem, fdt_pa)
    except InputError as error:
        raise Damaged(error.what) from error
    if handover.compatible != KHO_FDT_COMPATIBLE:
        return None
    if handover.problems:
        raise Damaged("; ".join(handover.problems[:8]))
    if handover.luo is None:
        raise Damaged("there is no LUO record")
    if not handover.luo.supported:
        raise Damaged(f"LUO record of version {handover.luo.compatible!r}")
    try:
        preserved = handover.preserved.frames().astype(np.int64)
    except InputError as error:
        raise Damaged(error.what) from error
    if len(preserved) and (int(preserved[0]) < FIRMWARE_FRAMES or int(preserved[-1]) >= len(tags)):
        raise Damaged(f"the tree preserves frames {int(preserved[0]):#x} ... {int(preserved[-1]):#x}")
    return _restored(handover, preserved, tags, profile)


def _restored(handover: Handover, preserved: I64, tags: U32, profile: Profile) -> Restored:
    assert handover.luo is not None
    flbs = {flb.name: flb for flb in handover.flbs if flb.count}
    foreign = [name for name in flbs if name != profile.iommu_record or not profile.liveupdate]
    iommu = handover.iommu if not foreign and profile.iommu_record in flbs else None
    if not foreign and flbs and iommu is None:
        raise Damaged(f"record {profile.iommu_record} cannot be read")
    out = Restored(
        liveupdate_num=handover.liveupdate_num,
        kexec_count=handover.metadata.kexec_count if handover.metadata else 0,
        sessions=[],
        iommu=iommu,
        preserved=preserved,
        foreign_iommu=foreign[0] if foreign else "",
    )
    owned: list[tuple[str, I64]] = []
    for session in handover.sessions:
        files = []
        for file in session.files:
            files.append(IncomingFile(file.token, file.compatible, file.data_pa))
            if file.memfd is not None:
                memfd = _memfd(file, tags)
                out.memfds[file.data_pa] = memfd
                owned.append((f"memfd token {file.token:#x} of session {session.name}", memfd.pfns))
            elif isinstance(file.record, IommufdRecord):
                out.iommufds[file.data_pa] = file.record
            elif isinstance(file.record, VfioRecord):
                out.vfios[file.data_pa] = file.record
        out.sessions.append(IncomingSession(session.name, tuple(files)))
    if iommu is not None:
        for domain in iommu.domains:
            out.tables[domain.index] = pfns_of(np.unique(domain.table_pages))
            owned.append((f"tables of domain {domain.index}", out.tables[domain.index]))
        pages = [hw.structure_pages for hw in iommu.iommus]
        out.structures = pfns_of(np.unique(np.concatenate(pages))) if pages else out.structures
        owned.append(("IOMMU structures", out.structures))
    kept = np.zeros(len(tags), np.bool_)
    kept[preserved] = True
    metadata = np.array(sorted(pa >> FRAME_SHIFT for pa in handover.pages), np.int64)
    metadata = metadata[metadata < len(tags)]
    owned.append(("records", metadata[kept[metadata]]))
    _check_owners(owned, kept)
    if iommu is not None:
        _check_references(iommu, out)
    for what, pfns in owned:
        if what != "records":
            kept[pfns] = False
    out.other = np.flatnonzero(kept).astype(np.int64)
    return out


def _memfd(file: FileRecord, tags: U32) -> IncomingMemfd:
    memfd = file.memfd
    assert memfd is not None
    pages, frames = memfd.frames()
    pfns = frames.astype(np.int64)
    if len(pfns) and int(pfns.max()) >= len(tags):
        raise Damaged(f"memfd token {file.token:#x}: frame {int(pfns.max()):#x} is not in this memory")
    tag = int(tags[pfns[0]]) if len(pfns) else 0
    if not bool((tags[pfns] == tag).all()):
        raise Damaged(f"memfd token {file.token:#x}: its frames have several owners")
    return IncomingMemfd(file.token, memfd.pos, memfd.size, memfd.seals, pages.astype(np.int64), pfns, tag)


def _check_owners(owned: list[tuple[str, I64]], kept: NDArray[np.bool_]) -> None:
    """Every frame that a record names is preserved, and none has two owners. ``kept`` bool[frames]."""
    seen = np.zeros(len(kept), np.bool_)
    total = 0
    for what, pfns in owned:
        inside = (pfns >= 0) & (pfns < len(kept))
        lost = pfns[~inside] if not inside.all() else pfns[~kept[pfns]]
        if len(lost):
            raise Damaged(f"{what}: frame {int(lost[0]):#x} is not preserved ({len(lost)} such frames)")
        twice = pfns[seen[pfns]]
        seen[pfns] = True
        total += len(pfns)
        if len(twice) or int(np.count_nonzero(seen)) != total:
            where = f"frame {int(twice[0]):#x}" if len(twice) else "a frame"
            raise Damaged(f"{what}: {where} has two owners")


def _check_references(iommu: IommuRecord, out: Restored) -> None:
    """What records say of each other must fit."""
    domains = {d.index for d in iommu.domains}
    devices = {(d.segment, d.bdf): d for d in iommu.devices}
    tokens: set[tuple[int, int]] = set()
    for record in out.iommufds.values():
        for hwpt in record.hwpts:
            if hwpt.domain_index not in domains:
                raise Damaged(
                    f"HWPT token {hwpt.token:#x} refers to domain {hwpt.domain_index}, which is not there"
                )
            tokens.add((id(record), hwpt.domain_index))
    if len({index for _, index in tokens}) != len(tokens):
        raise Damaged("two iommufds refer to the same domain")
    for file in out.vfios.values():
        device = devices.get((file.segment, file.bdf))
        if device is None or device.index != file.device_index:
            raise Damaged(f"device {file.bdf:#x} is not in the IOMMU record")


def owned_frames(tags: U32) -> I64:
    """Every frame beyond the firmware's that anybody owned: what the *held* way keeps (int64 pfns)."""
    pfns = np.flatnonzero(tags != 0).astype(np.int64)
    return pfns[pfns >= FIRMWARE_FRAMES]


class Carrier:
    """The live-update half of one kernel: LUO, its handlers, prior domains, and the way through boot
    and reboot.

    :param kernel: the kernel that it is built into.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.profile = profile_of(kernel.profile)
        self.priors = Priors(kernel, self.profile)
        self._freeze: Freeze | None = None
        #: what preserved files have in memory for the next kernel already
        self.kho = KhoOut(kernel.frames)
        self.memfds = MemfdHandler(kernel, self.kho.part, self.priors.free_later)
        self.handlers: list[FileHandler] = [self.memfds]
        self.iommufds: IommufdHandler | None = None
        self.vfios: VfioHandler | None = None
        if self.profile.liveupdate:
            flb = (self.profile.iommu_record,)
            self.iommufds = IommufdHandler(
                kernel,
                self.priors,
                self.memfds,
                self.profile.iommufd_record,
                flb,
                self.kho.part,
                lambda: self.freeze,
            )
            self.memfds.shown = self.iommufds.shows
            self.vfios = VfioHandler(
                kernel, self.priors, self.iommufds, self.profile.vfio_record, flb, lambda: self.freeze
            )
            self.handlers += [self.iommufds, self.vfios]
        self.luo = Luo(kernel.log, self.handlers)
        self.liveupdate_num = 0
        self.kexec_count = 0
        #: frames that the boot keeps for nobody in particular: records, and what no record names
        self.kept: I64 = np.zeros(0, np.int64)
        #: why everything is held, or ""
        self.held = ""

    @property
    def freeze(self) -> Freeze:
        """The freeze that is going on."""
        if self._freeze is None:
            raise AssertionError("no freeze is going on")
        return self._freeze

    def install(self) -> None:
        """Register with the kernel, before its boot."""
        kernel = self.kernel
        kernel.device_nodes["/dev/liveupdate"] = lambda process: LiveUpdateDevice(kernel, self.luo)
        kernel.early_boot_hooks.append(lambda _: self.early_boot())
        kernel.boot_hooks.append(lambda _: self.late_boot())
        kernel.reboot_hooks.append(lambda _: self.reboot())
        kernel.claimants.append(self.claims)
        if self.profile.liveupdate:
            self.priors.install()
        if self.vfios is not None:
            self.vfios.install()

    def claims(self) -> Iterable[Claim]:
        """What LUO, the boot and a freeze hold."""
        yield from self.memfds.claims()
        if len(self.kept):
            yield Claim("kept by the boot", self.kept)
        yield from self.kho.claims()

    # ---- boot

    def early_boot(self) -> None:
        """Decide what is kept; before any frame is handed out."""
        kernel = self.kernel
        boot, tags = kernel.platform.boot, kernel.platform.tags
        fdt_pa = boot.fdt_addr
        if not fdt_pa:
            self._stop_devices(range(kernel.platform.n_devices))
            return
        try:
            restored = read_boot(kernel.frames.ram, fdt_pa, tags, self.profile)
            if restored is None:
                # kho_populate(): a warning, and an ordinary boot with nothing reserved
                kernel.log(f"KHO: the FDT at {fdt_pa:#x} is of another version: nothing is kept")
                self._stop_devices(range(kernel.platform.n_devices))
            else:
                self._restore(restored)
        except Damaged as error:
            self._hold(str(error))
        boot.clear()

    def late_boot(self) -> None:
        """After the IOMMU driver is up: devices that were not carried must not translate."""
        if self.vfios is not None:
            self.vfios.close_nodes()
        if self.held:
            for dev in self.kernel.iommu.devices:
                self.kernel.device_nodes[node_path(dev)] = self._refuse
            return
        for dev in self.kernel.iommu.devices:
            if dev.index not in self.priors.devices:
                self.kernel.iommu.block_unknown(dev)

    def _refuse(self, process: Process) -> File:
        raise SysError(errno.EBUSY, f"devices are held as they are: {self.held}")

    def _stop_devices(self, indices: Iterable[int]) -> None:
        """Devices that nobody carried over lose their bus mastering and are reset, before memory is
        reused.
        """
        for index in indices:
            window = self.kernel.platform.bars[index]
            at_work = bar.read_register(window, bar.ENABLE) or bar.read_register(window, bar.ENABLE_ACK)
            if at_work:
                vfio.reset(self.kernel, self.kernel.iommu.devices[index])

    def _restore(self, restored: Restored) -> None:
        kernel, driver = self.kernel, self.kernel.iommu
        if restored.foreign_iommu and self.profile.liveupdate:
            raise Damaged(f"IOMMU record {restored.foreign_iommu!r} is not {self.profile.iommu_record!r}")
        priors: list[tuple[DomainRecord, I64]] = []
        if restored.iommu is not None:
            hardware = restored.iommu.iommus
            if len(hardware) != 1 or hardware[0].root_table != driver.root_register:
                raise Damaged(f"the IOMMU's root table is {driver.root_register:#x}, the record has another")
            for record in restored.iommu.domains:
                try:
                    open_format(record.format, dict(record.config))
                except InputError as error:
                    raise Damaged(f"domain {record.index}: {error.what}") from error
                if record.domain_id < driver.FIRST_ID:
                    raise Damaged(f"domain {record.index} has the reserved domain id {record.domain_id}")
                priors.append((record, restored.tables[record.index]))
            ids = [record.domain_id for record, _ in priors]
            if len(set(ids)) != len(ids):
                raise Damaged("two domains have the same domain id")
            bdfs = {dev.bdf: dev for dev in driver.devices}
            for device in restored.iommu.devices:
                if device.segment or device.bdf not in bdfs:
                    raise Damaged(f"device {device.segment:04x}:{device.bdf:#x} is not there")
            try:
                driver.inherit(Inherited(driver.root_register, hardware[0].structure_pages))
            except IokeepError as error:
                raise Damaged(error.what) from error
        carried = set()
        kernel.frames.claim(restored.preserved, None, Kind.RESERVED)
        kernel.frames.saw_ino(int(kernel.platform.tags[restored.preserved].max(initial=0)))
        if restored.iommu is not None:
            for record, pfns in priors:
                self._prior(record, pfns)
            for device in restored.iommu.devices:
                dev = next(d for d in driver.devices if d.bdf == device.bdf)
                prior = self.priors.domains[device.domain_index]
                assert prior.domain is not None
                prior.devices.add(dev)
                self.priors.devices[dev.index] = prior
                driver.restored_device(dev, prior.domain)
                carried.add(dev.index)
        self._stop_devices(i for i in range(kernel.platform.n_devices) if i not in carried)
        self.memfds.incoming = restored.memfds
        if self.iommufds is not None and self.vfios is not None:
            self.iommufds.incoming = restored.iommufds
            self.vfios.incoming = restored.vfios
            for iommufd in restored.iommufds.values():
                for hwpt in iommufd.hwpts:
                    self.priors.domains[hwpt.domain_index].token = hwpt.token
        self.kept = restored.other
        self.liveupdate_num = restored.liveupdate_num
        self.kexec_count = restored.kexec_count
        self.luo = Luo(kernel.log, self.handlers, restored.sessions)
        self.luo.all_finished = self._all_finished
        kernel.log(
            f"KHO: live update {restored.liveupdate_num}: {len(restored.preserved)} frames kept, "
            f"{len(restored.sessions)} sessions, {len(priors)} prior domains, {len(carried)} devices at work"
        )
        if not restored.sessions:
            self._all_finished()

    def _prior(self, record: DomainRecord, pfns: I64) -> None:
        pages = record.table_pages
        if not len(pages):
            raise Damaged(f"domain {record.index} has no table pages")
        fault = ""
        if not holds_root(open_format(record.format, dict(record.config)), record.root_pa, pages):
            fault = f"root {record.root_pa:#x} is not among its {len(pages)} table pages"
        prior = self.priors.add(record, pfns, fault)
        driver = self.kernel.iommu
        if fault:
            prior.domain = driver.hold_domain(prior.fmt, record.domain_id, pages)
        else:
            prior.domain = driver.restore_domain(prior.fmt, record.root_pa, record.domain_id, pages)

    def _all_finished(self) -> None:
        """The last incoming session is finished: what nobody claimed is freed."""
        if len(self.kept):
            when = "once adopted tables are proved" if self.priors.adoptions else "now"
            self.kernel.log(f"KHO: {len(self.kept)} preserved frames that nobody claimed are freed {when}")
            self.priors.free_later(self.kept)
            self.kept = np.zeros(0, np.int64)

    def _hold(self, why: str) -> None:
        """Keep everything as it is: frames with an owner, the IOMMU, the devices."""
        kernel = self.kernel
        self.held = why
        kernel.log(f"KHO: {why}")
        kernel.log("KHO: everything is kept as it is: memory with an owner, the IOMMU, devices at work")
        frames = kernel.frames
        fresh = frames.kind == Kind.FREE
        owned = owned_frames(kernel.platform.tags[: frames.n_frames])
        frames.claim(owned[fresh[owned]], None, Kind.RESERVED)
        self.kept = owned
        self.priors.domains.clear()
        self.priors.devices.clear()
        pages = kernel.iommu.hold()
        self.kept = np.setdiff1d(owned, pfns_of(pages))
        self.luo = Luo(kernel.log, self.handlers, incoming_error=why)

    # ---- reboot

    def reboot(self) -> None:
        """liveupdate_reboot(): write everything, or undo everything and fail with the errno."""
        kernel = self.kernel
        if self.held:
            raise SysError(errno.EBUSY, f"what came over the last kexec is held: {self.held}")
        boot = kernel.platform.boot
        self._freeze = Freeze(kernel, self.profile, self.kho.part())
        try:
            sessions = self.luo.freeze()
        except BaseException:
            self._abort()
            raise
        try:
            fdt_pa = self.freeze.write(sessions, self.luo, self.liveupdate_num + 1, self.kexec_count + 1)
        except BaseException:
            self.luo.unfreeze()
            self._abort()
            raise
        self.freeze.shut_devices_down()
        boot.fdt_size = FRAME_BYTES
        boot.fdt_addr = fdt_pa
        kernel.log(
            f"KHO: {len(sessions)} sessions, {len(self.freeze.domains)} domains, "
            f"{len(self.freeze.devices)} devices go over the kexec, "
            f"{self.freeze.out.written_bytes} bytes written"
        )

    def _abort(self) -> None:
        self.freeze.out.drop()
        self._freeze = None


_CARRIERS: WeakKeyDictionary[Kernel, Carrier] = WeakKeyDictionary()


def install(kernel: Kernel) -> None:
    """Build live update into a kernel that has not booted."""
    carrier = _CARRIERS[kernel] = Carrier(kernel)
    carrier.install()


def carrier_of(kernel: Kernel) -> Carrier:
    """The live-update half of a kernel. :raises KeyError: it has none."""
    return _CARRIERS[kernel]
