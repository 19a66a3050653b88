# SPDX-License-Identifier: Apache-2.0
"""What iokeep's kernels hand over for iommufd, the IOMMU and a VFIO device: three records, one version each.

In shape they follow the proposals on the mailing list (``include/linux/kho/abi/{iommu,iommufd}.h`` of the
series "iommu: Add live update state preservation"): a LUO file for the iommufd, an FLB for domains, devices
and IOMMUs, a LUO file for the device. In content they carry what a verifier needs and those lack: the table
format with its configuration, the features used, the areas by file token, and a digest of the translations.

Each payload is a sequence of 8-byte aligned items (:mod:`iokeep.handover.records`), in the order of the
dataclass fields; a list is a u64 count and its items; an array a u64 count and its elements; text a u64
length and UTF-8. ``index`` numbers an object in its list and is what other records refer to. Nothing is
optional.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from iokeep.handover.abi import Alloc
from iokeep.handover.records import Pack, Unpack, read_record, write_record
from iokeep.mem.memory import U8, U64, Memory, WritableMemory

U32_MAX = (1 << 32) - 1
#: no domain, no IOAS: an index that is never used
NONE = U32_MAX
#: how a device or an IOMMU translates; the code in the record is the position + 1
MODES = (
    *("legacy", "scalable", "scalable-fs", "scalable-ss"),  # VT-d
    "v1",  # AMD-Vi
    *("stage-1", "stage-2"),  # SMMUv3
    *("first-stage", "second-stage"),  # RISC-V
)
#: bits of an area's ``flags``: FIXED_IOVA as in IOMMU_IOAS_MAP (include/uapi/linux/iommufd.h)
AREA_FIXED_IOVA = 1


def _empty64() -> U64:
    return np.zeros(0, np.uint64)


def _empty8() -> U8:
    return np.zeros(0, np.uint8)


def _mode_code(mode: str) -> int:
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is none of {', '.join(MODES)}")
    return MODES.index(mode) + 1


def _mode(items: Unpack) -> str:
    code = items.u64(len(MODES), "mode")
    if code == 0:
        raise items.fail("mode 0 is not used")
    return MODES[code - 1]


def _increasing(values: U64) -> bool:
    return not len(values) or bool(np.all(values[1:] > values[:-1]))


@dataclass(frozen=True, slots=True)
class HwptRecord:
    """A preserved HWPT: ``token`` u64 given by user space, the domain and the IOAS by index (u32)."""

    token: int
    domain_index: int
    ioas_index: int


@dataclass(frozen=True, slots=True)
class IoasRecord:
    """An IOAS and its areas: arrays of equal length, sorted by ``iova``, closed and disjoint.

    ``iova``, ``last`` uint64: the IOVAs; ``file_token`` uint64: the memfd in the same session; ``offset``
    uint64: byte in that file where ``iova`` starts; ``prot`` uint8 of PROT_R = 1 | PROT_W = 2; ``flags``
    uint8 of AREA_FIXED_IOVA.
    """

    index: int
    iova: U64 = field(default_factory=_empty64)
    last: U64 = field(default_factory=_empty64)
    file_token: U64 = field(default_factory=_empty64)
    offset: U64 = field(default_factory=_empty64)
    prot: U8 = field(default_factory=_empty8)
    flags: U8 = field(default_factory=_empty8)

    def fault(self) -> str:
        """The first rule that the areas break, or ""."""
        n = len(self.iova)
        if any(len(a) != n for a in (self.last, self.file_token, self.offset, self.prot, self.flags)):
            return "area arrays differ in length"
        if np.any(self.iova > self.last):
            return "an area ends before it starts"
        if np.any(self.iova[1:] <= self.last[:-1]):
            return "areas overlap or are not sorted by iova"
        if np.any(self.offset + (self.last - self.iova) < self.offset):
            return "an area reaches beyond 2**64 in its file"
        if np.any((self.prot == 0) | (self.prot > 3)):
            return "an area has a prot other than r-, -w, rw"
        if np.any(self.flags > AREA_FIXED_IOVA):
            return "an area has an unknown flag"
        return ""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, IoasRecord):
            return NotImplemented
        return self.index == other.index and all(
            np.array_equal(getattr(self, name), getattr(other, name))
            for name in ("iova", "last", "file_token", "offset", "prot", "flags")
        )

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class IommufdRecord:
    """A preserved iommufd: LUO file ``compatible``, its ``data`` = the pa of this record."""

    COMPATIBLE: ClassVar[str] = "iokeep-iommufd-v1"
    hwpts: tuple[HwptRecord, ...]
    ioases: tuple[IoasRecord, ...]

    def to_bytes(self) -> bytes:
        """The payload. :raises ValueError: a value does not fit or areas break :meth:`IoasRecord.fault`."""
        out = Pack()
        out.u64(len(self.hwpts))
        for h in self.hwpts:
            out.u64(h.token, h.domain_index, h.ioas_index)
        out.u64(len(self.ioases))
        for ioas in self.ioases:
            if fault := ioas.fault():
                raise ValueError(f"IOAS {ioas.index}: {fault}")
            out.u64(ioas.index)
            for words in (ioas.iova, ioas.last, ioas.file_token, ioas.offset):
                out.words(words)
            out.octets(ioas.prot)
            out.octets(ioas.flags)
        return out.payload()

    @classmethod
    def from_bytes(cls, payload: bytes) -> IommufdRecord:
        """Decode and check. :raises InputError: names the byte and the rule."""
        items = Unpack(payload, cls.COMPATIBLE)
        hwpts = []
        for _ in range(items.count(24, "hwpts")):
            token = items.u64()
            hwpts.append(
                HwptRecord(token, items.u64(U32_MAX, "domain_index"), items.u64(U32_MAX, "ioas_index"))
            )
        if len({h.token for h in hwpts}) != len(hwpts):
            raise items.fail("two HWPTs have the same token")
        ioases = []
        for _ in range(items.count(56, "ioases")):
            index = items.u64(U32_MAX, "IOAS index")
            iova, last = items.words("iova"), items.words("last")
            file_token, offset = items.words("file_token"), items.words("offset")
            ioas = IoasRecord(
                index, iova, last, file_token, offset, items.octets("prot"), items.octets("flags")
            )
            if fault := ioas.fault():
                raise items.fail(f"IOAS {index}: {fault}")
            ioases.append(ioas)
        indices = {i.index for i in ioases}
        if len(indices) != len(ioases):
            raise items.fail("two IOASes have the same index")
        for h in hwpts:
            if h.ioas_index not in indices:
                raise items.fail(f"HWPT token {h.token:#x} refers to IOAS {h.ioas_index}, which is not there")
        items.end()
        return cls(tuple(hwpts), tuple(ioases))

    def write(self, mem: WritableMemory, alloc: Alloc) -> int:
        """Write as a record into preserved frames; the pa."""
        return write_record(mem, alloc, self.COMPATIBLE, self.to_bytes())

    @classmethod
    def read(cls, mem: Memory, pa: int) -> IommufdRecord:
        """Read the record at ``pa``; see :func:`iokeep.handover.records.read_record`."""
        return cls.from_bytes(read_record(mem, pa, cls.COMPATIBLE))


@dataclass(frozen=True, slots=True)
class DomainRecord:
    """A domain whose tables stay in memory.

    ``format`` and ``config`` (JSON object, values int or str) as a capture's meta.json names them;
    ``features``: the table features in use, sorted; ``root_pa`` of the top table, ``top_level`` its level
    (0 = leaves); ``domain_id`` u32 as in the hardware's context entry; ``table_pages``: pa of every table
    page, root included, increasing; ``digest`` (32 bytes) of the translations, keyed by ``digest_key`` (16
    bytes); ``mapped_bytes`` and ``extents_count`` u64: of the canonical extents.
    """

    index: int
    format: str
    config: Mapping[str, int | str]
    features: tuple[str, ...]
    root_pa: int
    domain_id: int
    top_level: int
    table_pages: U64
    digest: bytes
    digest_key: bytes
    mapped_bytes: int
    extents_count: int

    @property
    def n_table_pages(self) -> int:
        """Number of table pages."""
        return len(self.table_pages)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DomainRecord):
            return NotImplemented
        return (
            all(
                getattr(self, name) == getattr(other, name)
                for name in self.__dataclass_fields__
                if name not in ("table_pages", "config")
            )
            and dict(self.config) == dict(other.config)
            and np.array_equal(self.table_pages, other.table_pages)
        )

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class DeviceRecord:
    """A device that keeps translating: ``token`` of its LUO file, ``segment`` u16, ``bdf`` u16, its
    domain, its mode.
    """

    index: int
    token: int
    segment: int
    bdf: int
    domain_index: int
    mode: str


@dataclass(frozen=True, slots=True)
class IommuHwRecord:
    """An IOMMU: ``register_base`` pa of its registers, ``root_table`` the value of the register that the way
    to every table begins at (RTADDR_REG, DEV_TAB_BAR, STRTAB_BASE, ddtp), ``mode``, ``version`` (u32, the
    register, 0 = there is none), ``structure_pages``: pa of every page of the tables between that register
    and the page tables, increasing.
    """

    register_base: int
    root_table: int
    mode: str
    version: int
    structure_pages: U64

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, IommuHwRecord):
            return NotImplemented
        return (self.register_base, self.root_table, self.mode, self.version) == (
            other.register_base,
            other.root_table,
            other.mode,
            other.version,
        ) and np.array_equal(self.structure_pages, other.structure_pages)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class IommuRecord:
    """All that the IOMMU core hands over: an FLB named ``COMPATIBLE``, its ``data`` = the pa of this
    record.
    """

    COMPATIBLE: ClassVar[str] = "iokeep-iommu-v1"
    domains: tuple[DomainRecord, ...]
    devices: tuple[DeviceRecord, ...]
    iommus: tuple[IommuHwRecord, ...]

    def to_bytes(self) -> bytes:
        """The payload; page lists are sorted here. :raises ValueError: a value does not fit."""
        out = Pack()
        out.u64(len(self.domains))
        for d in self.domains:
            out.u64(d.index)
            out.text(d.format)
            out.text(json.dumps(dict(d.config), sort_keys=True, separators=(",", ":")))
            out.u64(len(d.features))
            for feature in d.features:
                out.text(feature)
            out.u64(d.root_pa, d.domain_id, d.top_level)
            out.words(np.unique(d.table_pages))
            out.raw(d.digest, 32)
            out.raw(d.digest_key, 16)
            out.u64(d.mapped_bytes, d.extents_count)
        out.u64(len(self.devices))
        for v in self.devices:
            out.u64(v.index, v.token, v.segment, v.bdf, v.domain_index, _mode_code(v.mode))
        out.u64(len(self.iommus))
        for i in self.iommus:
            out.u64(i.register_base, i.root_table, _mode_code(i.mode), i.version)
            out.words(np.unique(i.structure_pages))
        return out.payload()

    @classmethod
    def from_bytes(cls, payload: bytes) -> IommuRecord:
        """Decode and check. :raises InputError: names the byte and the rule."""
        items = Unpack(payload, cls.COMPATIBLE)
        domains = [_domain(items) for _ in range(items.count(136, "domains"))]
        devices = []
        for _ in range(items.count(48, "devices")):
            index, token = items.u64(U32_MAX, "device index"), items.u64()
            segment, bdf = items.u64(0xFFFF, "segment"), items.u64(0xFFFF, "bdf")
            devices.append(
                DeviceRecord(index, token, segment, bdf, items.u64(U32_MAX, "domain_index"), _mode(items))
            )
        iommus = []
        for _ in range(items.count(40, "iommus")):
            base, root, mode = items.u64(), items.u64(), _mode(items)
            version, pages = items.u64(U32_MAX, "version"), items.words("structure_pages")
            if not _increasing(pages):
                raise items.fail(f"IOMMU {base:#x}: structure_pages are not increasing")
            iommus.append(IommuHwRecord(base, root, mode, version, pages))
        indices = {d.index for d in domains}
        if len(indices) != len(domains):
            raise items.fail("two domains have the same index")
        if len({v.index for v in devices}) != len(devices):
            raise items.fail("two devices have the same index")
        if len({(v.segment, v.bdf) for v in devices}) != len(devices):
            raise items.fail("two devices have the same segment and bdf")
        for v in devices:
            if v.domain_index not in indices:
                raise items.fail(f"device {v.bdf:#x} refers to domain {v.domain_index}, which is not there")
        items.end()
        return cls(tuple(domains), tuple(devices), tuple(iommus))

    def write(self, mem: WritableMemory, alloc: Alloc) -> int:
        """Write as a record into preserved frames; the pa."""
        return write_record(mem, alloc, self.COMPATIBLE, self.to_bytes())

    @classmethod
    def read(cls, mem: Memory, pa: int) -> IommuRecord:
        """Read the record at ``pa``; see :func:`iokeep.handover.records.read_record`."""
        return cls.from_bytes(read_record(mem, pa, cls.COMPATIBLE))


def _domain(items: Unpack) -> DomainRecord:
    index, name = items.u64(U32_MAX, "domain index"), items.text()
    text = items.text()
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        raise items.fail(f"domain {index}: config is not JSON") from None
    if not isinstance(config, dict) or not all(
        isinstance(v, (int, str)) and not isinstance(v, bool) for v in config.values()
    ):
        raise items.fail(f"domain {index}: config is not an object of numbers and texts")
    features = tuple(items.text() for _ in range(items.count(8, "features")))
    root_pa, domain_id = items.u64(), items.u64(U32_MAX, "domain_id")
    top_level = items.u64(15, "top_level")
    pages = items.words("table_pages")
    if not _increasing(pages):
        raise items.fail(f"domain {index}: table_pages are not increasing")
    digest, key = items.raw(32), items.raw(16)
    return DomainRecord(
        index,
        name,
        config,
        features,
        root_pa,
        domain_id,
        top_level,
        pages,
        digest,
        key,
        items.u64(),
        items.u64(),
    )


@dataclass(frozen=True, slots=True)
class VfioRecord:
    """A preserved VFIO PCI device: LUO file ``compatible``; ``segment`` and ``bdf`` u16, its index in
    :class:`IommuRecord`, and the LUO token of the iommufd that it is bound to.
    """

    COMPATIBLE: ClassVar[str] = "iokeep-vfio-pci-v1"
    segment: int
    bdf: int
    device_index: int
    iommufd_token: int

    def to_bytes(self) -> bytes:
        """The payload, 32 bytes."""
        out = Pack()
        out.u64(self.segment, self.bdf, self.device_index, self.iommufd_token)
        return out.payload()

    @classmethod
    def from_bytes(cls, payload: bytes) -> VfioRecord:
        """Decode and check. :raises InputError: names the byte and the rule."""
        items = Unpack(payload, cls.COMPATIBLE)
        segment, bdf = items.u64(0xFFFF, "segment"), items.u64(0xFFFF, "bdf")
        record = cls(segment, bdf, items.u64(U32_MAX, "device_index"), items.u64())
        items.end()
        return record

    def write(self, mem: WritableMemory, alloc: Alloc) -> int:
        """Write as a record into preserved frames; the pa."""
        return write_record(mem, alloc, self.COMPATIBLE, self.to_bytes())

    @classmethod
    def read(cls, mem: Memory, pa: int) -> VfioRecord:
        """Read the record at ``pa``; see :func:`iokeep.handover.records.read_record`."""
        return cls.from_bytes(read_record(mem, pa, cls.COMPATIBLE))


#: LUO file ``compatible`` -> (kind, reader) of the records that are ours
FILE_RECORDS: dict[str, tuple[str, Callable[[Memory, int], IommufdRecord | VfioRecord]]] = {
    IommufdRecord.COMPATIBLE: ("iommufd", IommufdRecord.read),
    VfioRecord.COMPATIBLE: ("vfio-pci", VfioRecord.read),
}

__all__ = [
    "AREA_FIXED_IOVA",
    "FILE_RECORDS",
    "MODES",
    "NONE",
    "DeviceRecord",
    "DomainRecord",
    "HwptRecord",
    "IoasRecord",
    "IommuHwRecord",
    "IommuRecord",
    "IommufdRecord",
    "VfioRecord",
]
