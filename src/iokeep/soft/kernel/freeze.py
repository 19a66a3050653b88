# SPDX-License-Identifier: Apache-2.0
"""The old kernel's last act: everything that must survive is written down, or the reboot fails and nothing
has changed. What cannot change after the files were preserved was written then (:func:`prepare_domain`, the
memfds' records), so that little is left to do here, however large the guest.

Parameters of the kernel that damage what is written, for rehearsals: ``records_version=NAME`` (the
version string of the iommufd's record), ``truncate_records=1`` (the record is cut short),
``stale_root=1`` (the domain's record names an older table, preserved too, that is not the one in use).
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from iokeep.handover.iommu import (
    DeviceRecord,
    DomainRecord,
    IommufdRecord,
    IommuHwRecord,
    IommuRecord,
    VfioRecord,
)
from iokeep.handover.records import write_record
from iokeep.handover.writer import FileOut, FlbOut, SessionOut
from iokeep.mem.memory import U64
from iokeep.pt.build import Table
from iokeep.pt.diff import normalised
from iokeep.pt.extents import Extents
from iokeep.pt.leaves import extents
from iokeep.soft.kernel import vfio
from iokeep.soft.kernel.frames import FRAME_BYTES
from iokeep.soft.kernel.kho import KhoPart
from iokeep.soft.kernel.luo import IncomingFile, IncomingSession, Luo
from iokeep.soft.kernel.syserror import SysError

if TYPE_CHECKING:
    from iokeep.soft.kernel.iommu import Domain, PciDevice
    from iokeep.soft.kernel.kernel import Kernel
    from iokeep.soft.kernel.profiles import Profile

#: pages that a stale table shows wrongly (stale_root)
_STALE_PAGES = 16


def prepare_domain(out: KhoPart, domain: Domain, shown: Extents) -> DomainRecord:
    """Preserve the tables of a domain and describe it, with the digest that it kept (or, where it has none,
    under a fresh key). Its mappings must not change any more.

    :param shown: what the tables translate, proved. :return: with index 0.
    :raises SysError: ENOMEM, EINVAL.
    """
    root_pa, pages = domain.root_pa, domain.table_pages
    out.preserve_pas(pages)
    if domain.iommu.kernel.params.flag("stale_root"):
        root_pa, pages = _stale_copy(out, domain)
        shown = extents(domain.fmt, out.frames.ram, root_pa)[0]
        domain.seal = None
    seal = domain.seal or domain.set_seal(shown)
    shown = normalised(shown, domain.fmt.write_only).canonical()
    return DomainRecord(
        index=0,
        format=domain.fmt.name,
        config=dict(domain.fmt.config),
        features=tuple(sorted(name for name, on in domain.fmt.features.items() if on)),
        root_pa=root_pa,
        domain_id=domain.domain_id,
        top_level=domain.fmt.top_level,
        table_pages=pages,
        digest=seal.digest(),
        digest_key=seal.key,
        mapped_bytes=shown.mapped_bytes,
        extents_count=len(shown),
    )


def _stale_copy(out: KhoPart, domain: Domain) -> tuple[int, U64]:
    """A table as it may have been earlier: the last pages of a run show the frames of its first ones."""
    kernel = domain.iommu.kernel
    ram = kernel.frames.ram
    pages: list[int] = []

    def alloc(n: int, size: int = 0) -> U64:
        size = size or domain.fmt.table_bytes
        pas = out.alloc_tables(n, size)
        for pa in pas.tolist():
            pages.extend(range(pa, pa + size, FRAME_BYTES))
        return pas

    old, _ = extents(domain.fmt, ram, domain.root_pa)
    if not len(old):
        raise SysError(errno.EINVAL, "stale_root: the domain maps nothing")
    columns = (old.iova.tolist(), old.last.tolist(), old.pa.tolist(), old.prot.tolist())
    rows = list(zip(*columns, strict=True))
    longest = max(range(len(rows)), key=lambda i: rows[i][1] - rows[i][0])
    iova, last, pa, prot = rows.pop(longest)
    total = (last - iova + 1) // FRAME_BYTES
    n = min(_STALE_PAGES, max(total // 2, 1))
    cut = last + 1 - n * FRAME_BYTES
    if cut > iova:
        rows.append((iova, cut - 1, pa, prot))
        rows.append((cut, last, pa, prot))
    else:  # single pages only: it shows the frame of another one
        rows.append((cut, last, int(old.pa[0 if longest else -1]), prot))
    table = Table.create(domain.fmt, ram, alloc, lambda *gone: None)
    table.map(Extents.of(rows))
    kernel.log(f"stale_root: domain {domain.domain_id} is recorded with root {table.root_pa:#x}")
    return table.root_pa, np.array(sorted(pages), np.uint64)


@dataclass(eq=False)
class Freeze:
    """One freeze: what was written so far."""

    kernel: Kernel
    profile: Profile
    out: KhoPart
    #: by domain id: what :func:`prepare_domain` made when the iommufds were preserved
    prepared: dict[int, DomainRecord] = field(default_factory=dict)
    domains: list[DomainRecord] = field(default_factory=list)
    devices: list[DeviceRecord] = field(default_factory=list)
    carried: list[PciDevice] = field(default_factory=list)
    _indices: dict[int, int] = field(default_factory=dict)

    # ---- called by the handlers

    def add_domain(self, domain: Domain) -> int:
        """List a domain that was prepared; its index."""
        if domain.domain_id in self._indices:
            return self._indices[domain.domain_id]
        index = len(self.domains)
        self.domains.append(replace(self.prepared[domain.domain_id], index=index))
        self._indices[domain.domain_id] = index
        return index

    def add_device(self, dev: PciDevice, token: int, domain: Domain) -> int:
        """Describe a device that goes on working; its index."""
        index = len(self.devices)
        self.devices.append(
            DeviceRecord(index, token, 0, dev.bdf, self.add_domain(domain), self.kernel.iommu.mode)
        )
        self.carried.append(dev)
        return index

    def write_iommufd(self, record: IommufdRecord) -> int:
        """The iommufd's record in preserved memory, damaged where the parameters say so; its pa."""
        ram = self.kernel.frames.ram
        pa = write_record(ram, self.out.alloc, self.iommufd_compatible, record.to_bytes())
        if self.kernel.params.flag("truncate_records"):
            length = int.from_bytes(ram.read(pa + 48, 8), "little")
            ram.write(pa + 48, (length // 2).to_bytes(8, "little"))
        return pa

    def write_vfio(self, record: VfioRecord) -> int:
        """The device's record in preserved memory; its pa."""
        return write_record(
            self.kernel.frames.ram, self.out.alloc, self.profile.vfio_record, record.to_bytes()
        )

    @property
    def iommufd_compatible(self) -> str:
        """Version string of the iommufd's record."""
        return self.kernel.params.text("records_version") or self.profile.iommufd_record

    # ---- the end

    def write(self, sessions: list[IncomingSession], luo: Luo, liveupdate_num: int, kexec_count: int) -> int:
        """Write the FLB, LUO's records, the tree and the FDT; the pa of the FDT."""
        flbs = []
        if self.domains or self.devices:
            record = IommuRecord(tuple(self.domains), tuple(self.devices), (self._hardware(),))
            pa = write_record(
                self.kernel.frames.ram, self.out.alloc, self.profile.iommu_record, record.to_bytes()
            )
            count = luo.flb_count.get(self.profile.iommu_record, 0)
            flbs.append(FlbOut(self.profile.iommu_record, pa, count))
        return self.out.write(
            [SessionOut(s.name, [self._file(f) for f in s.files]) for s in sessions],
            flbs,
            liveupdate_num=liveupdate_num,
            release=self.profile.release,
            kexec_count=kexec_count,
        )

    def _file(self, file: IncomingFile) -> FileOut:
        ours = file.compatible == self.profile.iommufd_record
        return FileOut(self.iommufd_compatible if ours else file.compatible, file.data, file.token)

    def _hardware(self) -> IommuHwRecord:
        driver = self.kernel.iommu
        pages = driver.structure_pages()
        self.out.preserve_pas(pages)
        return IommuHwRecord(
            register_base=driver.REGISTER_BASE,
            root_table=driver.root_register,
            mode=driver.mode,
            version=driver.version,
            structure_pages=pages,
        )

    def shut_devices_down(self) -> None:
        """What device_shutdown() does: devices that are not carried stop, and nothing translates for them."""
        driver = self.kernel.iommu
        for dev in driver.devices:
            if dev in self.carried or dev.domain is None:
                continue
            vfio.reset(self.kernel, dev)
            driver.set_domain(dev, None)
