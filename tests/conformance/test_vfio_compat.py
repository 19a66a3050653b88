# SPDX-License-Identifier: Apache-2.0
"""VFIO's type 1 on /dev/iommu (simple_ioctls ... set_iommu_cmd of the fixture iommufd, and the fixture
vfio_compat_mock_domain of the kernel's selftest).
"""

import ctypes
import random

import pytest
from conf_env import HUGE, PAGE, ULONG_MAX, make, outcome, uapi, vfio
from conf_marks import MACHINE, kinds, needs_mock
from conf_rows import BASE
from conf_selftest import MOCK_APERTURE_LAST, MOCK_APERTURE_START
from test_rows import attach

V1, V2 = vfio.VFIO_TYPE1_IOMMU, vfio.VFIO_TYPE1v2_IOMMU
versions = pytest.mark.parametrize("version", [V1, V2], ids=["v1", "v2"])
RW = vfio.VFIO_DMA_MAP_FLAG_READ | vfio.VFIO_DMA_MAP_FLAG_WRITE
ALL = vfio.VFIO_DMA_UNMAP_FLAG_ALL
AREA = 16 * PAGE
INFO = vfio.VFIO_IOMMU_GET_INFO


class Container:
    """An iommufd as a program of VFIO has it; ``kind``: what is in its group."""

    def __init__(self, env, kind=None, version=None, *, compat=True, pages=64):
        self.env = env
        self.fd = env.iommu()
        self.memory = env.mmap(-1, pages * PAGE)
        self.hva = self.memory.hva
        self.hwpt = None
        if not compat:
            return
        self.ioas = env.ioas(self.fd)
        if kind:
            _, self.hwpt = attach(env, self.fd, self.ioas, kind)
        env.call(self.fd, "IOMMU_VFIO_IOAS", op=uapi.IOMMU_VFIO_IOAS_SET, ioas_id=self.ioas)
        if version:
            assert self.number(vfio.VFIO_SET_IOMMU, version) == 0

    def number(self, request, arg=0):
        """An ioctl that takes a number, or an address where nothing is: its value or errno."""
        return outcome(self.env.sys, self.env.t.ioctl, self.fd, request, arg)

    def _call(self, request, struct, fields):
        arg = make(struct, {"argsz": ctypes.sizeof(struct), **fields})
        return outcome(self.env.sys, self.env.t.ioctl, self.fd, request, arg), arg

    def map(self, **fields):
        fields = {"flags": RW, "vaddr": self.hva, "iova": BASE, "size": AREA, **fields}
        return self._call(vfio.VFIO_IOMMU_MAP_DMA, vfio.vfio_iommu_type1_dma_map, fields)[0]

    def unmap(self, **fields):
        """(value or errno, size after it)"""
        fields = {"iova": BASE, "size": AREA, **fields}
        value, arg = self._call(vfio.VFIO_IOMMU_UNMAP_DMA, vfio.vfio_iommu_type1_dma_unmap, fields)
        return value, arg.size

    def info(self, argsz, room=512):
        """(value or errno, the buffer)"""
        kind = type("Info", (ctypes.Structure,), {"_fields_": [("raw", ctypes.c_uint8 * room)]})
        arg = kind()
        raw = argsz.to_bytes(4, "little").ljust(argsz, b"\0")[:room].ljust(room, b"\xaa")
        ctypes.memmove(ctypes.addressof(arg), raw, room)
        return outcome(self.env.sys, self.env.t.ioctl, self.fd, INFO, arg), bytes(arg)


def test_what_there_is(env):
    c = Container(env, compat=False)
    assert c.number(vfio.VFIO_GET_API_VERSION) == vfio.VFIO_API_VERSION
    assert c.number(vfio.VFIO_GET_API_VERSION, 99) == vfio.VFIO_API_VERSION
    known = {V1, V2, vfio.VFIO_UNMAP_ALL}
    known |= {vfio.VFIO_NOIOMMU_IOMMU} if MACHINE.noiommu else set()
    for kind in [*range(13), 1 << 31, 1 << 40, ULONG_MAX]:
        if kind != vfio.VFIO_DMA_CC_IOMMU:
            assert c.number(vfio.VFIO_CHECK_EXTENSION, kind) == int(kind in known), kind


def test_without_a_compat_ioas(env):
    """Where a container would have no group."""
    c = Container(env, compat=False)
    assert c.number(vfio.VFIO_CHECK_EXTENSION, vfio.VFIO_DMA_CC_IOMMU) == "ENODEV"
    assert [c.number(vfio.VFIO_SET_IOMMU, kind) for kind in (V1, V2)] == ["ENODEV"] * 2
    assert [c.number(vfio.VFIO_SET_IOMMU, kind) for kind in (0, 2, 6, 8, 1 << 40 | V2)] == ["EINVAL"] * 5
    assert (c.map(), c.unmap()[0], c.info(24)[0]) == ("ENODEV", "ENODEV", "ENODEV")
    # the structure comes first
    assert (c.map(argsz=1), c.unmap(argsz=1)[0], c.info(15)[0]) == ("EINVAL", "EINVAL", "EINVAL")
    assert (c.map(flags=4), c.unmap(flags=1 << 31)[0]) == ("EINVAL", "EINVAL")
    assert (c.map(flags=0), c.unmap(flags=ALL)[0], c.unmap(size=0)[0]) == ("ENODEV", "ENODEV", "ENODEV")
    for request in (vfio.VFIO_IOMMU_MAP_DMA, vfio.VFIO_IOMMU_UNMAP_DMA, INFO):
        assert c.number(request, 8) == "EFAULT"


@kinds
def test_what_there_is_not(env, kind):
    """Groups, dirty pages of type 1, devices: on other files, or nowhere."""
    c = Container(env, kind)
    for request in (
        vfio.VFIO_IOMMU_DIRTY_PAGES, vfio.VFIO_IOMMU_ENABLE, vfio.VFIO_IOMMU_DISABLE,
        vfio.VFIO_GROUP_GET_STATUS, vfio.VFIO_GROUP_SET_CONTAINER, vfio.VFIO_GROUP_UNSET_CONTAINER,
        vfio.VFIO_GROUP_GET_DEVICE_FD, vfio.VFIO_DEVICE_GET_INFO, vfio.VFIO_DEVICE_RESET,
    ):  # fmt: skip
        assert c.number(request, c.hva) == "ENOTTY", hex(request)


@kinds
def test_cache_coherency(env, kind):
    """VFIO_DMA_CC_IOMMU: whether every HWPT makes DMA snoop the caches. QEMU's VT-d cannot, AMD's always."""
    c = Container(env, kind)
    answer = {None: 1, "mock": 0, "vfio": int(MACHINE.iommu == "amd")}[kind]
    assert c.number(vfio.VFIO_CHECK_EXTENSION, vfio.VFIO_DMA_CC_IOMMU) == answer


@kinds
def test_set_iommu(env, kind):
    """Type 1 of old has no huge pages, and does not begin when something is mapped."""
    c = Container(env, kind)
    assert env.huge_pages(c.fd, c.ioas) == 1
    assert c.number(vfio.VFIO_SET_IOMMU, V2) == 0
    assert env.huge_pages(c.fd, c.ioas) == 1
    assert c.map() == 0
    assert c.number(vfio.VFIO_SET_IOMMU, V1) == ("EINVAL" if kind else 0)
    assert c.number(vfio.VFIO_SET_IOMMU, V2) == 0
    assert c.unmap() == (0, AREA)
    assert c.number(vfio.VFIO_SET_IOMMU, V1) == 0
    assert c.number(vfio.VFIO_SET_IOMMU, V1) == 0
    assert env.huge_pages(c.fd, c.ioas) == 0
    assert c.number(vfio.VFIO_SET_IOMMU, vfio.VFIO_NOIOMMU_IOMMU) == "EINVAL"


def test_set_iommu_wants_whole_pages(env):
    c = Container(env)
    assert c.map(size=PAGE + 1) == 0
    assert c.number(vfio.VFIO_SET_IOMMU, V1) == "EADDRINUSE"
    assert env.huge_pages(c.fd, c.ioas) == 1


#: fields of MAP_DMA -> answer; "n" without a device, "d" with one
MAPS = [
    ({}, 0, "nd"),
    ({"argsz": 31}, "EINVAL", "nd"),
    ({"argsz": 32}, 0, "nd"),
    ({"argsz": 1 << 30}, 0, "nd"),
    ({"flags": vfio.VFIO_DMA_MAP_FLAG_VADDR}, "EINVAL", "nd"),
    ({"flags": RW | 8}, "EINVAL", "nd"),
    ({"flags": vfio.VFIO_DMA_MAP_FLAG_READ}, 0, "nd"),
    # with a device, 7.3.4 warns of it before it says EINVAL
    ({"flags": 0}, 0, "n"),
    ({"size": 0}, "EINVAL", "nd"),
    ({"size": PAGE + 1}, 0, "n"),
    ({"size": PAGE + 1}, "EINVAL", "d"),
    ({"iova": BASE + 1}, 0, "n"),
    ({"iova": BASE + 1}, "EINVAL", "d"),
    ({"iova": BASE + 0x40000}, "EEXIST", "nd"),
    ({"iova": BASE + 0x40000 - AREA + PAGE}, "EEXIST", "nd"),
    ({"iova": ULONG_MAX - PAGE + 1, "size": 2 * PAGE}, "EOVERFLOW", "nd"),
    ({"vaddr": ULONG_MAX - PAGE + 1}, "EOVERFLOW", "nd"),
    ({"vaddr": 8 * PAGE}, 0, "n"),
    ({"vaddr": 8 * PAGE}, "EFAULT", "d"),
    ({"size": ULONG_MAX, "vaddr": 0}, "EINVAL", "nd"),
]


@kinds
def test_map(env, kind):
    c = Container(env, kind)
    assert c.map(iova=BASE + 0x40000) == 0
    for fields, answer, where in MAPS:
        if ("d" if kind else "n") in where:
            assert c.map(**fields) == answer, fields
            if answer == 0:
                whole = {"iova": fields.get("iova", BASE), "size": fields.get("size", AREA)}
                assert c.unmap(**whole) == (0, whole["size"])
    assert c.unmap(iova=0, size=0, flags=ALL) == (0, AREA)


@kinds
@versions
def test_unmap(env, kind, version):
    """The fixture's "map", and every refusal with what is said of the size."""
    c = Container(env, kind, version)
    assert c.map() == 0
    assert c.unmap() == (0, AREA)
    assert c.unmap() == (0, 0)  # nothing there is no error
    assert c.map() == 0
    assert c.unmap(argsz=23) == ("EINVAL", AREA)
    assert c.unmap(flags=vfio.VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP) == ("EINVAL", AREA)
    assert c.unmap(flags=vfio.VFIO_DMA_UNMAP_FLAG_VADDR) == ("EINVAL", AREA)
    assert c.unmap(flags=ALL) == ("EINVAL", AREA)
    assert c.unmap(flags=ALL, iova=0) == ("EINVAL", AREA)
    assert c.unmap(size=0) == ("EINVAL", 0)
    assert c.unmap(iova=ULONG_MAX, size=2) == ("EOVERFLOW", 0)
    assert c.unmap(iova=BASE - PAGE, size=AREA + 3 * PAGE) == (0, AREA)
    for i in range(4):
        assert c.map(iova=BASE + i * 2 * AREA) == 0
    assert c.unmap(iova=0, size=0, flags=ALL) == (0, 4 * AREA)
    assert c.unmap(iova=0, size=0, flags=ALL) == (0, 0)
    small = list(range(16))
    for i in small:
        assert c.map(iova=BASE + i * PAGE, vaddr=c.hva + i * PAGE, size=PAGE) == 0
    random.Random(7).shuffle(small)
    for i in small:
        assert c.unmap(iova=BASE + i * PAGE, size=PAGE) == (0, PAGE)
    assert env.ranges(c.fd, c.ioas)[1] == (
        PAGE if version == V1 or kind == "vfio" else 2048 if kind == "mock" else 1
    )


@kinds
def test_type_1_cuts(env, kind):
    """A part can be unmapped, and what lies beside it stays as it is."""
    c = Container(env, kind, V1)
    number = MACHINE.mock
    assert c.map() == 0
    assert c.unmap(iova=BASE + 4 * PAGE, size=4 * PAGE) == (0, 4 * PAGE)
    assert c.unmap(iova=BASE + 4 * PAGE, size=4 * PAGE) == (0, 0)
    if kind == "mock":
        assert env.check_map(c.fd, c.hwpt, BASE, 4 * PAGE, c.hva)
        assert env.check_map(c.fd, c.hwpt, BASE + 8 * PAGE, 8 * PAGE, c.hva + 8 * PAGE)
        assert not env.check_map(c.fd, c.hwpt, BASE + 4 * PAGE, PAGE, c.hva + 4 * PAGE)
    if number:
        pages = [int(bool(kind))] * 4 + [0] * 4 + [int(bool(kind))] * 8
        assert all(env.pins(c.fd, c.hva + i * PAGE, PAGE, n) for i, n in enumerate(pages))
    assert c.unmap(iova=BASE + PAGE + 1, size=PAGE) == ("EINVAL", PAGE)
    assert c.unmap(iova=BASE + 2 * PAGE, size=PAGE + 1) == ("EINVAL", PAGE + 1)
    # it was cut before its end was found to be no border of a page; an unmap over all takes both
    assert c.unmap(iova=BASE, size=6 * PAGE) == (0, 4 * PAGE)
    # from a hole into an area: its other part stays
    assert c.unmap(iova=BASE, size=10 * PAGE) == (0, 2 * PAGE)
    # a wrap is an end, and cuts
    assert c.unmap(iova=BASE + 12 * PAGE, size=ULONG_MAX - BASE) == ("EOVERFLOW", 0)
    assert c.unmap(iova=BASE + 12 * PAGE, size=4 * PAGE) == (0, 4 * PAGE)
    assert c.unmap(iova=0, size=0, flags=ALL) == (0, 2 * PAGE)


@needs_mock
@versions
def test_what_is_pinned_is_not_cut(env, version):
    """Nor unmapped in parts; as a whole it is, and the pin goes."""
    c = Container(env, None, version)
    assert c.map() == 0
    access = env.access(c.fd, c.ioas)
    number = env.pin(c.fd, access, BASE, PAGE)
    assert c.unmap(size=PAGE) == (("EINVAL", PAGE) if version == V1 else ("ENOENT", 0))
    assert c.unmap(iova=BASE - PAGE, size=4 * PAGE) == (
        ("EINVAL", 4 * PAGE) if version == V1 else ("ENOENT", 0)
    )
    assert c.unmap() == (0, AREA)
    assert outcome(env.unpin, c.fd, access, number) == "ENOENT"


@kinds
@versions
def test_huge_map(env, kind, version):
    """huge_map: 4 MiB in 16 parts."""
    c = Container(env, kind, version, pages=2 * HUGE // PAGE)
    assert c.map(size=2 * HUGE) == 0
    part = 2 * HUGE // 16
    parts = [BASE + i * part for i in range(16)]
    random.Random(8).shuffle(parts)
    if kind == "mock":
        assert env.check_map(c.fd, c.hwpt, BASE, 2 * HUGE, c.hva)
    for i, iova in enumerate(parts):
        assert c.unmap(iova=iova, size=part) == ((0, part) if version == V1 else ("ENOENT", 0))
        if kind == "mock" and version == V1:
            for left in parts[i + 1 : i + 3]:
                assert env.check_map(c.fd, c.hwpt, left, part, c.hva + left - BASE)
    assert c.unmap(iova=0, size=0, flags=ALL) == (0, 0 if version == V1 else 2 * HUGE)


def sizes_of(kind):
    """iova_pgsizes as far as every IOMMU of the kind is alike, and which bits that are."""
    every = (1 << 40) - 1
    if kind == "vfio" and MACHINE.iommu == "vtd":
        return PAGE | HUGE | 1 << 30, ULONG_MAX
    if kind == "vfio":
        return every & ~(PAGE - 1) & ~(1 << 39), every
    if kind == "mock":
        return (1 << 37) - PAGE, ULONG_MAX
    return ULONG_MAX & ~(PAGE - 1), ULONG_MAX


@kinds
@versions
def test_info(env, kind, version):
    """get_info: as much of a chain of capabilities as there is room for; not a byte is written behind it."""
    c = Container(env, kind, version)
    holes = env.ranges(c.fd, c.ioas)[0]
    whole = 24 + 16 + 16 + 16 * len(holes)
    sizes, bits = sizes_of(kind)
    full = bytearray(c.info(512)[1])
    for argsz in [16, 17, 20, 23, 24, *range(25, whole + 9), 256, 511]:
        value, raw = c.info(argsz)
        assert value == 0
        info = vfio.vfio_iommu_type1_info.from_buffer_copy(raw)
        assert (info.argsz, info.flags) == (whole, vfio.VFIO_IOMMU_INFO_PGSIZES | vfio.VFIO_IOMMU_INFO_CAPS)
        assert info.iova_pgsizes & bits == sizes
        wanted = bytearray(argsz) + b"\xaa" * (512 - argsz)
        wanted[: min(argsz, 24)] = raw[: min(argsz, 24)]
        if argsz >= 24:
            assert (info.cap_offset, info.pad) == (24 if argsz >= whole else 0, 0)
        if argsz >= 36:
            wanted[24:36] = full[24:36]
            wanted[28:32] = full[28:32] if argsz >= 40 else bytes(4)
        for n in range(len(holes)):
            if argsz >= 56 + 16 * (n + 1):
                wanted[56 + 16 * n : 72 + 16 * n] = full[56 + 16 * n : 72 + 16 * n]
        if argsz >= whole:
            wanted[40:56] = full[40:56]
        assert raw == wanted, argsz
    avail = vfio.vfio_iommu_type1_info_dma_avail.from_buffer_copy(full, 24)
    assert (avail.header.id, avail.header.version, avail.header.next) == (3, 1, 40)
    assert avail.avail == 2**32 - 1
    cap = vfio.vfio_iommu_type1_info_cap_iova_range.from_buffer_copy(full, 40)
    assert (cap.header.id, cap.header.version, cap.header.next) == (1, 1, 0)
    rows = (vfio.vfio_iova_range * cap.nr_iovas).from_buffer_copy(full, 56)
    assert [(row.start, row.end) for row in rows] == holes
    if kind == "mock":
        assert holes == [(MOCK_APERTURE_START, MOCK_APERTURE_LAST)]


@kinds
def test_what_the_older_interface_mapped(env, kind):
    """It is an IOAS as any other."""
    c = Container(env, kind, V2)
    assert c.map() == 0
    other = env.ioas(c.fd)
    assert env.copy(c.fd, other, c.ioas, BASE + PAGE, 2 * PAGE, BASE) == BASE
    assert outcome(env.call, c.fd, "IOMMU_IOAS_CHANGE_PROCESS") == "EINVAL"
    assert env.unmap(c.fd, c.ioas, BASE, AREA) == AREA
    assert env.map(c.fd, c.ioas, c.hva, AREA, BASE) == BASE
    assert c.unmap() == (0, AREA)
    env.call(c.fd, "IOMMU_VFIO_IOAS", op=uapi.IOMMU_VFIO_IOAS_SET, ioas_id=other)
    assert c.unmap() == (0, 2 * PAGE)
    env.destroy(c.fd, other)
    assert c.map() == "ENODEV"
