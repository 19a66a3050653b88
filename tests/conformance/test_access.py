# SPDX-License-Identifier: Apache-2.0
"""Emulated devices: what they pin, read and write by IOVA (access_*, user_copy, ro_unshare of the fixtures
iommufd_ioas and iommufd_mock_domain of the kernel's selftest), and what becomes of it when areas go.
"""

import numpy as np
import pytest
from conf_env import HUGE, PAGE, RW, ULONG_MAX, R, Refused, W, outcome
from conf_machine import MIB
from conf_marks import KINDS, kinds, needs_mock
from conf_rows import ABSENT, BASE
from conf_selftest import (
    MOCK_ACCESS_RW_SLOW_PATH,
    MOCK_FLAGS_ACCESS_SYZ,
    MOCK_FLAGS_ACCESS_WRITE,
    MOCK_PAGE_SIZE,
)
from test_rows import attach

pytestmark = needs_mock
WRITE, SLOW = MOCK_FLAGS_ACCESS_WRITE, MOCK_ACCESS_RW_SLOW_PATH
#: pages of user memory, in the first memfd, and of the second
PAGES = 64
#: areas of the IOAS, all of 4 pages: name -> (iova, what, page there, flags); "right" follows on "left"
AREAS = {
    "user": (BASE, "user", 0, RW),
    "readable": (BASE + 0x10000, "user", 4, R),
    "writable": (BASE + 0x20000, "file", 8, W),
    "left": (BASE + 0x30000, "file", 12, RW),
    "right": (BASE + 0x34000, "user", 16, RW),
    "file": (BASE + 0x40000, "file", 0, RW),
}
AREA = 4 * PAGE
#: without a device nobody looks at what is mapped
UNSEEN = {
    "past the end": (BASE + 0x50000, "file", PAGES, RW),
    "no memory": (BASE + 0x60000, "none", 0, RW),
    "no file of memory": (BASE + 0x70000, "kmsg", 0, RW),
}


def content(number):
    """What is in a memfd: no two pages are alike, nor any two files."""
    i = np.arange(PAGES * PAGE)
    return ((number + i * 7 + i // PAGE) % 251).astype(np.uint8).tobytes()


class Scene:
    """An iommufd, an IOAS with areas, an emulated device that may pin; ``kind``: what shows the IOAS."""

    def __init__(self, env, kind, *, flags=1, areas=AREAS):
        self.env = env
        self.fd = env.iommu()
        self.files = [env.memfd(PAGES * PAGE) for _ in range(2)]
        self.maps = [env.mmap(file, PAGES * PAGE) for file in self.files]
        for number, mapping in enumerate(self.maps):
            mapping.write(0, content(number))
        self.kmsg = env.open("/dev/kmsg")
        self.ioas = env.ioas(self.fd)
        self.kind = kind
        self.dev = self.hwpt = None
        if kind:
            self.dev, self.hwpt = attach(env, self.fd, self.ioas, kind)
        for name in areas:
            self.map(name)
        self.access = env.access(self.fd, self.ioas, flags)

    def map(self, name, ioas=None):
        iova, what, page, flags = {**AREAS, **UNSEEN}[name]
        ioas = ioas or self.ioas
        if what in ("user", "none"):
            hva = self.maps[0].hva + page * PAGE if what == "user" else 8 << 12
            return self.env.map(self.fd, ioas, hva, AREA, iova, flags)
        file = self.files[1] if what == "file" else self.kmsg
        return self.env.map_file(self.fd, ioas, file, page * PAGE, AREA, iova, flags)

    def unmap(self, iova, length, ioas=None):
        return outcome(self.env.unmap, self.fd, ioas or self.ioas, iova, length)

    def pin(self, iova, length, flags=0, hva=0, access=None):
        return outcome(self.env.pin, self.fd, access or self.access, iova, length, flags, hva)

    def unpin(self, number):
        return outcome(self.env.unpin, self.fd, self.access, number)

    def rw(self, iova, data, flags=0):
        return outcome(self.env.rw, self.fd, self.access, iova, data, flags)

    def pins(self, number, page, pages=1):
        """Pins of pages of a file: the same of all, else None."""
        hva = self.maps[number].hva + page * PAGE
        return next((n for n in range(9) if self.env.pins(self.fd, hva, pages * PAGE, n)), None)

    def content(self, name, offset=0, length=AREA):
        _, what, page, _ = AREAS[name]
        return self.maps[0 if what == "user" else 1].read(page * PAGE + offset, length)

    def alignment(self, ioas=None):
        return self.env.ranges(self.fd, ioas or self.ioas)[1]


def at(name, offset=0):
    return AREAS[name][0] + offset


#: (iova, length, flags, answer); answers without a device where they differ are in UNSEEN_PINS
PINS = [
    (at("user"), PAGE, 0, 0),
    (at("user"), AREA, WRITE, 0),
    (at("user"), 1, 0, 0),
    (at("user", PAGE), PAGE + 1, 0, 0),
    (at("user", 1), 1, 0, "EINVAL"),
    (at("user", 2048), 2048, 0, "EINVAL"),
    (at("user"), 0, 0, "EINVAL"),
    (at("user"), AREA + 1, 0, "ENOENT"),
    (at("user", -PAGE), PAGE, 0, "ENOENT"),
    (at("user", -PAGE), 2 * PAGE, 0, "ENOENT"),
    (0, PAGE, 0, "ENOENT"),
    (ULONG_MAX, 1, 0, "ENOENT"),
    (ULONG_MAX, 2, 0, "EOVERFLOW"),
    (ULONG_MAX - 0xFFF, 0x2000, 0, "EOVERFLOW"),
    (at("user"), 16 * MIB, 0, "ENOENT"),
    (at("user"), 16 * MIB + 1, 0, "ENOMEM"),
    (at("user"), 16 * MIB + 1, 2, "ENOMEM"),
    (at("user"), PAGE, 2, "EOPNOTSUPP"),
    (at("user"), PAGE, 4, "EOPNOTSUPP"),
    (at("readable"), PAGE, 0, 0),
    (at("readable"), PAGE, WRITE, "EPERM"),
    (at("readable", 1), PAGE, WRITE, "EINVAL"),
    (at("writable"), PAGE, WRITE, 0),
    (at("writable"), PAGE, 0, "EPERM"),
    (at("left"), 2 * AREA, WRITE, 0),
    (at("left", 3 * PAGE), 2 * PAGE, 0, 0),
    (at("left", 3 * PAGE), AREA + 2 * PAGE, 0, "ENOENT"),
    (at("file"), AREA, WRITE, 0),
    # (number of the area, offset) in its halves
    (5, PAGE, MOCK_FLAGS_ACCESS_SYZ, 0),
    (5 | 1 << 32, PAGE, MOCK_FLAGS_ACCESS_SYZ, "EINVAL"),
    (6, PAGE, MOCK_FLAGS_ACCESS_SYZ, "ENOENT"),
]


@kinds
def test_what_can_be_pinned(env, kind):
    s = Scene(env, kind)
    plain = s.pins(0, 0, PAGES), s.pins(1, 40, 8)
    number = 0
    for iova, length, flags, answer in PINS:
        got = s.pin(iova, length, flags)
        assert got == (answer or number), (hex(iova), length, flags)
        if not answer:
            assert s.unpin(number) is None
            number += 1
        assert (s.pins(0, 0, PAGES), s.pins(1, 40, 8)) == plain


def test_what_cannot_be_found(env):
    s = Scene(env, None, areas=[*AREAS, *UNSEEN])
    for name, answer in (
        ("past the end", "EINVAL"),
        ("no memory", "EFAULT"),
        ("no file of memory", "EINVAL"),
    ):
        iova = UNSEEN[name][0]
        assert s.pin(iova, PAGE) == answer
        assert s.pin(iova, AREA, WRITE) == answer
        for flags in (0, SLOW):
            assert s.rw(iova, 8, flags) == answer
            assert s.rw(iova, b"8" * 8, flags) == answer
            assert s.rw(iova, 2 * PAGE, flags) == answer


@kinds
def test_a_pin_is_of_the_pages_that_are_mapped(env, kind):
    s = Scene(env, kind)
    hva = s.maps[0].hva
    assert s.pin(at("user"), AREA, hva=hva) == 0
    assert s.pin(at("user"), AREA, hva=hva + PAGE) == "EBADE"
    assert s.pin(at("user"), AREA, hva=8) == "EFAULT"
    assert s.pin(at("user", PAGE), PAGE, hva=hva + PAGE) == 1
    assert s.pin(at("left"), AREA, hva=s.maps[1].hva + 12 * PAGE) == 2
    assert s.pins(0, 4, 4) == bool(kind)  # a refused one leaves no pin


@kinds
def test_pins_are_counted_once(env, kind):
    """access_pin: pins of the same pages, of overlapping ones, and domains that come and go under them."""
    s = Scene(env, kind, areas=["user"])
    shown = int(bool(kind))
    for pages in (1, 2, 4):
        first = s.pin(at("user"), pages * PAGE, hva=s.maps[0].hva)
        again = s.pin(at("user"), pages * PAGE, WRITE)
        over = s.pin(at("user", (pages - 1) * PAGE), (5 - pages) * PAGE)
        assert s.pins(0, 0, 4) == 1
        _, hwpt, dev = stdev = env.mock(s.fd, s.ioas) if kind != "vfio" else (None, s.hwpt, None)
        if kind != "vfio":
            assert env.check_map(s.fd, hwpt, at("user"), AREA, s.maps[0].hva)
            assert s.pins(0, 0, 4) == 1
            env.destroy(s.fd, stdev[0])
        assert s.pins(0, 0, 4) == 1
        assert s.unpin(first) is None
        assert s.unpin(first) == "ENOENT"
        assert s.pins(0, 0, 4) == 1
        assert s.unpin(over) is None
        assert s.pins(0, 0, pages) == 1
        assert pages == 4 or s.pins(0, pages, 4 - pages) == shown
        assert s.unpin(again) is None
        assert s.pins(0, 0, 4) == shown
        assert dev is None or isinstance(dev, int)


def test_a_domain_goes_under_a_pin(env):
    """access_domain_destory: pages that are not pinned elsewhere are let go, across a huge page's border."""
    s = Scene(env, None, areas=())
    file = env.memfd(2 * HUGE)
    mapping = env.mmap(file, 2 * HUGE)
    env.map(s.fd, s.ioas, mapping.hva, 2 * HUGE, BASE)
    stdev, _, _ = env.mock(s.fd, s.ioas)
    number = s.pin(BASE + PAGE, PAGE, hva=mapping.hva + PAGE)
    assert env.pins(s.fd, mapping.hva, 2 * HUGE, 1)
    env.destroy(s.fd, stdev)
    assert env.pins(s.fd, mapping.hva + PAGE, PAGE, 1)
    assert env.pins(s.fd, mapping.hva, PAGE, 0)
    assert env.pins(s.fd, mapping.hva + 2 * PAGE, 2 * HUGE - 2 * PAGE, 0)
    assert s.unpin(number) is None
    assert env.pins(s.fd, mapping.hva, 2 * HUGE, 0)


@kinds
def test_unmap_asks_to_unpin(env, kind):
    """access_pin_unmap, with two devices that have pinned, one of them twice."""
    s = Scene(env, kind)
    other = env.access(s.fd, s.ioas)
    pinned = [s.pin(at("user"), PAGE), s.pin(at("user"), AREA), s.pin(at("file"), AREA)]
    others = s.pin(at("user", PAGE), PAGE, access=other)
    assert s.unmap(at("user"), PAGE) == "ENOENT"
    assert s.pins(0, 0, 4) == 1
    assert s.unmap(at("user"), AREA) == AREA
    assert s.pins(0, 0, 4) == 0
    assert [s.unpin(number) for number in pinned] == ["ENOENT", "ENOENT", None]
    assert outcome(env.unpin, s.fd, other, others) == "ENOENT"
    assert s.pin(at("user"), PAGE) == "ENOENT"
    # a pin over two areas goes whole with one of them
    both = s.pin(at("left"), 2 * AREA)
    assert s.unmap(at("right"), AREA) == AREA
    assert s.unpin(both) == "ENOENT"
    assert s.pins(1, 12, 4) == int(bool(kind))
    # areas before one that is cut are gone, and what was pinned of them
    first = s.pin(at("left"), AREA)
    assert s.unmap(at("left"), at("file", PAGE) - at("left")) == "ENOENT"
    assert s.unpin(first) == "ENOENT"
    assert s.pins(1, 12, 4) == 0
    assert s.unmap(0, ULONG_MAX) == 3 * AREA
    assert (s.pins(0, 0, PAGES), s.pins(1, 0, PAGES)) == (0, 0)


@kinds
@pytest.mark.parametrize("flags", [0, SLOW], ids=["fast", "slow"])
def test_read_and_write(env, kind, flags):
    """access_rw: bytes around the borders of pages and areas."""
    s = Scene(env, kind, flags=0)
    for name in ("user", "left", "file"):
        for start in (0, 1, PAGE - 50, PAGE - 1, PAGE, PAGE + 49):
            for length in (1, 2, 7, 51, 64, PAGE, 2 * PAGE + 3):
                assert s.rw(at(name, start), length, flags) == s.content(name, start, length)
                data = bytes((start + length + i) % 253 for i in range(length))
                before = s.content(name)
                assert s.rw(at(name, start), data, flags) == data
                assert s.content(name) == before[:start] + data + before[start + length :]
    assert s.rw(at("left", AREA - 9), 18, flags) == s.content("left", AREA - 9, 9) + s.content("right", 0, 9)
    both = bytes(range(200))
    assert s.rw(at("left", AREA - 100), both, flags) == both
    assert (s.content("left", AREA - 100, 100), s.content("right", 0, 100)) == (both[:100], both[100:])
    assert s.pins(0, 0, 4) == int(bool(kind))


#: (iova, bytes or what is written, flags, answer)
READS = [
    (at("user"), 0, 0, "EINVAL"),
    (at("user"), b"", 0, "EINVAL"),
    (at("user", AREA - 1), 2, 0, "ENOENT"),
    (at("user", -1), 2, 0, "ENOENT"),
    (ULONG_MAX, 2, 0, "EOVERFLOW"),
    (ULONG_MAX, 1, 0, "ENOENT"),
    (at("readable"), b"xy", 0, "EPERM"),
    (at("readable"), b"xy", SLOW, "EPERM"),
    (at("writable"), 2, 0, "EPERM"),
    (at("writable"), 2, SLOW, "EPERM"),
    (at("user"), 2, 2, "EOPNOTSUPP"),
    (at("user"), 2, 8, "EOPNOTSUPP"),
    (at("user"), 16 * MIB, 0, "ENOENT"),
    (at("user"), 16 * MIB + 1, 2, "ENOMEM"),
    (6, 8, MOCK_FLAGS_ACCESS_SYZ, "ENOENT"),
]


@kinds
def test_what_cannot_be_read_or_written(env, kind):
    s = Scene(env, kind)
    before = s.maps[0].read(0, PAGES * PAGE), s.maps[1].read(0, PAGES * PAGE)
    for iova, data, flags, answer in READS:
        assert s.rw(iova, data, flags) == answer, (hex(iova), data, flags)
    assert (s.maps[0].read(0, PAGES * PAGE), s.maps[1].read(0, PAGES * PAGE)) == before
    assert s.rw(5 | 9 << 32, 8, MOCK_FLAGS_ACCESS_SYZ) == s.content("file", 9, 8)
    # what lies before the hole is written
    assert s.rw(at("user", AREA - 4), b"12345678") == "ENOENT"
    assert s.content("user", AREA - 4, 4) == b"1234"
    fields = {"access_rw__iova": at("user"), "access_rw__length": 8, "access_rw__uptr": 8}
    assert outcome(env.test, s.fd, 8, s.access, **fields) == "EFAULT"
    assert outcome(env.test, s.fd, 8, s.access, **fields, access_rw__flags=WRITE) == "EFAULT"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "vfio"], ids=lambda kind: kind or "alone")
def test_read_and_write_unaligned(env, kind):
    """access_rw_unaligned: an area that begins inside of a page, by an access that needs no pages."""
    s = Scene(env, kind, flags=0, areas=())
    env.map(s.fd, s.ioas, s.maps[0].hva, AREA, BASE + MOCK_PAGE_SIZE)
    for flags in (0, SLOW):
        for start in (0, MOCK_PAGE_SIZE - 3, PAGE - 3, AREA - 9):
            data = bytes((start + i + flags) % 255 for i in range(9))
            assert s.rw(BASE + MOCK_PAGE_SIZE + start, data, flags) == data
            assert s.maps[0].read(start, 9) == data
            assert s.rw(BASE + MOCK_PAGE_SIZE + start, 9, flags) == data
    assert s.pin(BASE + MOCK_PAGE_SIZE, PAGE) == "EOPNOTSUPP"
    assert outcome(env.access, s.fd, s.ioas) == "EADDRINUSE"
    assert s.alignment() == (MOCK_PAGE_SIZE if kind else 1)


@kinds
def test_alignment(env, kind):
    """Where an access may pin, areas are whole pages, as long as it is there."""
    s = Scene(env, kind, areas=())
    other = {None: 1, "mock": MOCK_PAGE_SIZE, "vfio": PAGE}[kind]
    assert s.alignment() == PAGE
    assert outcome(env.map, s.fd, s.ioas, s.maps[0].hva, PAGE + 2048, BASE) == "EINVAL"
    assert outcome(env.map, s.fd, s.ioas, s.maps[0].hva + 2048, PAGE, BASE) == "EINVAL"
    assert outcome(env.map, s.fd, s.ioas, s.maps[0].hva, PAGE, BASE + 2048) == "EINVAL"
    env.close(s.access)
    assert s.alignment() == other
    plain = env.access(s.fd, s.ioas, 0)
    assert s.alignment() == other
    aligned = env.ioas(s.fd)
    env.access_replace(s.fd, plain, aligned)
    assert s.alignment(aligned) == 1
    pinning = env.access(s.fd, aligned)
    assert s.alignment(aligned) == PAGE
    env.close(pinning)
    assert s.alignment(aligned) == 1


@kinds
def test_users_and_ids(env, kind):
    s = Scene(env, kind)
    before = env.ioas(s.fd)
    own = env.access(s.fd, before)
    after = env.ioas(s.fd)
    assert after == before + 2
    # the object between them is the access
    assert outcome(env.destroy, s.fd, before + 1) == "EBUSY"
    assert outcome(env.mock, s.fd, before + 1) == "EINVAL"
    assert outcome(env.map_file, s.fd, before + 1, s.files[0], 0, PAGE, BASE) == "ENOENT"
    assert outcome(env.destroy, s.fd, before) == "EBUSY"
    assert outcome(env.access, s.fd, before, 2) == "EOPNOTSUPP"
    assert outcome(env.access, s.fd, ABSENT) == "ENOENT"
    assert outcome(env.access, s.fd, before + 1) == "ENOENT"
    assert env.ioas(s.fd) == after + 1  # what was refused has left no object
    assert outcome(env.access_replace, s.fd, own, ABSENT) == "ENOENT"
    assert outcome(env.access_replace, s.fd, s.fd, before) == "EBADFD"
    assert outcome(env.access_replace, s.fd, 0x3FF0, before) == "EBADFD"
    assert outcome(env.pin, s.fd, s.fd, BASE, PAGE) == "EBADFD"
    assert outcome(env.unpin, s.fd, 0x3FF0, 0) == "EBADFD"
    assert outcome(env.rw, s.fd, s.files[0], BASE, 8) == "EBADFD"
    env.close(own)
    assert outcome(env.destroy, s.fd, before + 1) == "ENOENT"
    assert outcome(env.destroy, s.fd, before) is None
    assert outcome(env.destroy, s.fd, s.ioas) == "EBUSY"


@kinds
def test_replace(env, kind):
    """To another IOAS: with nothing pinned, or not at all."""
    s = Scene(env, kind)
    other, unaligned = env.ioas(s.fd), env.ioas(s.fd)
    env.map(s.fd, other, s.maps[1].hva + 20 * PAGE, AREA, BASE)
    env.map(s.fd, unaligned, s.maps[1].hva, PAGE + 1, BASE)
    kept = s.pin(at("user"), AREA)
    env.access_replace(s.fd, s.access, s.ioas)
    assert s.pins(0, 0, 4) == 1
    assert outcome(env.access_replace, s.fd, s.access, unaligned) == "EADDRINUSE"
    assert outcome(env.access_replace, s.fd, s.access, ABSENT) == "ENOENT"
    assert s.pins(0, 0, 4) == 1
    assert s.unpin(kept) is None
    assert s.pin(at("user"), AREA) == kept + 1
    env.access_replace(s.fd, s.access, other)
    assert s.unpin(kept + 1) == "ENOENT"
    assert s.pins(0, 0, 4) == int(bool(kind))
    assert s.alignment(other) == PAGE
    assert s.alignment() == (PAGE if kind == "vfio" else MOCK_PAGE_SIZE if kind else 1)
    assert s.rw(BASE, 8) == s.maps[1].read(20 * PAGE, 8)
    assert s.pin(BASE, AREA, hva=s.maps[1].hva + 20 * PAGE) == kept + 2
    assert outcome(env.destroy, s.fd, other) == "EBUSY"
    assert s.unmap(0, ULONG_MAX, other) == AREA
    assert s.pins(1, 20, 4) == 0


@pytest.mark.parametrize("what", ["user", "file"])
def test_a_copy_of_pinned_pages(env, what):
    """user_copy: pinned where no domain is, copied to where one is; then the access looks elsewhere."""
    s = Scene(env, "mock", areas=())
    number, hva = (0, s.maps[0].hva) if what == "user" else (1, s.maps[1].hva)

    def filled():
        ioas = env.ioas(s.fd)
        if what == "user":
            env.map(s.fd, ioas, hva, AREA, 2 * BASE)
        else:
            env.map_file(s.fd, ioas, s.files[1], 0, AREA, 2 * BASE)
        return ioas

    first, second = filled(), filled()
    env.access_replace(s.fd, s.access, first)
    pinned = s.pin(2 * BASE, AREA, hva=hva)
    assert env.copy(s.fd, s.ioas, first, 2 * BASE, AREA, BASE, W) == BASE
    assert env.check_map(s.fd, s.hwpt, BASE, AREA, hva)
    assert s.pins(number, 0, 4) == 1
    env.access_replace(s.fd, s.access, second)
    assert s.unpin(pinned) == "ENOENT"
    assert s.pins(number, 0, 4) == 1
    assert s.unmap(BASE, AREA) == AREA
    assert s.pins(number, 0, 4) == 0
    env.destroy(s.fd, first)
    pinned = s.pin(2 * BASE, AREA, hva=hva)
    env.copy(s.fd, s.ioas, second, 2 * BASE, AREA, BASE, W)
    assert env.check_map(s.fd, s.hwpt, BASE, AREA, hva)
    # the copy and what was mapped have their own origins of pages here
    assert s.unmap(2 * BASE, AREA, second) == AREA
    assert s.unpin(pinned) == "ENOENT"
    assert s.pins(number, 0, 4) == 1
    assert env.check_map(s.fd, s.hwpt, BASE, AREA, hva)
    env.close(s.access)
    env.destroy(s.fd, second)


@kinds
def test_two_mappings_of_a_page_are_two_pins(env, kind):
    s = Scene(env, kind, areas=["user"])
    env.map(s.fd, s.ioas, s.maps[0].hva, AREA, BASE + 0x80000)
    env.copy(s.fd, s.ioas, s.ioas, BASE, AREA, BASE + 0x90000)
    for iova in (BASE, BASE + 0x80000, BASE + 0x90000):
        assert isinstance(s.pin(iova, AREA), int)
    assert s.pins(0, 0, 4) == 2


@kinds
def test_an_access_outlives_the_descriptor(env, kind):
    """An access keeps its iommufd, whose areas go with it."""
    s = Scene(env, kind, flags=1, areas=["user", "file"]) if kind != "vfio" else Scene(env, None)
    other = env.iommu()
    assert isinstance(s.pin(at("user"), AREA), int)
    env.close(s.fd)
    s.fd = other
    assert s.rw(at("file"), 8) == s.content("file", 0, 8)
    assert isinstance(s.pin(at("file"), AREA), int)
    assert (s.pins(0, 0, 4), s.pins(1, 0, 4)) == (1, 1)
    env.close(s.access)
    assert (s.pins(0, 0, 4), s.pins(1, 0, 4)) == (0, 0)


@kinds
def test_change_process(env, kind):
    """Accesses change nothing: pages of files can be handed on, pinned or not, those of a process cannot."""
    s = Scene(env, kind, areas=["user", "file"])
    assert isinstance(s.pin(at("file"), AREA), int)
    assert outcome(env.call, s.fd, "IOMMU_IOAS_CHANGE_PROCESS") == "EINVAL"
    assert s.unmap(at("user"), AREA) == AREA
    env.call(s.fd, "IOMMU_IOAS_CHANGE_PROCESS")
    assert s.pins(1, 0, 4) == 1
    assert s.rw(at("file", 5), b"handed on") == b"handed on"
    assert s.content("file", 5, 9) == b"handed on"
    with pytest.raises(Refused, match="EOPNOTSUPP"):
        env.call(s.fd, "IOMMU_IOAS_CHANGE_PROCESS", __reserved=1)


@kinds
def test_a_page_that_is_mapped_for_reading_stays(env, kind):
    """ro_unshare, with anonymous memory: a write after the pin does not move the page."""
    s = Scene(env, kind, areas=())
    fresh = env.mmap(-1, AREA)
    env.map(s.fd, s.ioas, fresh.hva, AREA, BASE, R)
    assert s.pin(BASE, PAGE, hva=fresh.hva) == 0
    fresh.write(0, b"x" * AREA)
    assert s.pin(BASE, AREA, hva=fresh.hva) == 1
    assert kind != "mock" or env.check_map(s.fd, s.hwpt, BASE, AREA, fresh.hva)
    assert s.rw(BASE + 1, 3) == b"xxx"
    assert s.pin(BASE, PAGE, WRITE) == "EPERM"
