# SPDX-License-Identifier: Apache-2.0
"""Accesses as drivers inside of the kernel use them; what a real kernel can judge is in
tests/conformance/test_access.py.
"""

import errno

import pytest
from soft_machine import MIB, Caller, boot, refused, settled

from iokeep.soft.kernel.access import Access

IOVA = 0x10000000
PAGE = 4096


class Driver:
    """An emulated device's driver that unpins what it is asked to, or does not."""

    needs_pin_pages = True

    def __init__(self, *, obeys=True):
        self.obeys = obeys
        self.access = None
        self.pinned = []
        self.asked = []

    def pin(self, iova, length):
        pfns = self.access.pin_pages(iova, length)
        self.pinned.append((iova, length))
        return pfns

    def unmap(self, iova, length):
        self.asked.append((iova, length))
        if self.obeys:
            while self.pinned:
                self.access.unpin_pages(*self.pinned.pop())


@pytest.fixture
def kernel():
    kernel = boot(placement="mixed:1")
    yield kernel
    settled(kernel)


@pytest.fixture
def place(c):
    """(descriptor of an iommufd, IOAS, memfd of 1 MiB that is mapped at IOVA)"""
    fd = c.iommu()
    ioas, m = c.ioas(fd), c.memfd("ram", MIB)
    c.map_file(fd, ioas, m, 0, MIB, IOVA)
    return fd, ioas, m


def make(c, place, driver):
    fd, ioas, _ = place
    access = Access.create(c.process.file(fd), driver)
    if driver is not None:
        driver.access = access
    access.attach(ioas)
    return access


def pins(kernel):
    return int(kernel.frames.pin_count.sum())


def test_pins_are_the_pages_of_the_file(kernel, c, place):
    access = make(c, place, driver := Driver())
    got = driver.pin(IOVA + 3 * PAGE, 5 * PAGE)
    assert got.tolist() == c.process.file(place[2]).pfns[3:8].tolist()
    assert pins(kernel) == 5
    audit = kernel.audit()
    assert (audit.leaked, audit.wrongly_freed) == (0, 0)
    access.close()
    assert pins(kernel) == 0
    assert driver.asked == [(0, 2**64 - 1)]


def test_claims_count_a_page_once(kernel, c, place):
    """Areas that share pages, domains and overlapping pins: each page is pinned once, and claimed once."""
    fd, ioas, _ = place
    access = make(c, place, driver := Driver())
    c.copy(fd, ioas, ioas, IOVA, MIB // 2, IOVA + MIB)
    for start in (0, 2, 4):
        driver.pin(IOVA + start * PAGE, 4 * PAGE)
        driver.pin(IOVA + MIB + start * PAGE, 4 * PAGE)
    assert pins(kernel) == 8
    vfio = c.vfio()
    c.bind(vfio, fd)
    c.attach(vfio, ioas)
    assert pins(kernel) == 256
    audit = kernel.audit()
    assert (audit.leaked, audit.wrongly_freed) == (0, 0)
    c.detach(vfio)
    assert pins(kernel) == 8
    audit = kernel.audit()
    assert (audit.leaked, audit.wrongly_freed) == (0, 0)
    c.unmap(fd, ioas, IOVA, MIB)
    assert driver.pinned == []
    assert pins(kernel) == 0
    access.close()


def test_memory_that_is_pinned_outlives_its_owner(kernel, c, place):
    access = make(c, place, driver := Driver())
    other = Caller(kernel)
    hva, _, _ = other.mmap(-1, 2 * PAGE)
    shared = other.getfd(c.process.pid, place[0])
    other.map(shared, place[1], hva, 2 * PAGE, IOVA + MIB)
    driver.pin(IOVA + MIB, PAGE)
    access.write(c.process, IOVA + MIB, b"kept")
    other.exit()
    assert access.read(c.process, IOVA + MIB, 4) == b"kept"
    with refused(errno.EFAULT):
        access.read(c.process, IOVA + MIB + PAGE, 4)
    with refused(errno.EFAULT):
        driver.pin(IOVA + MIB + PAGE, PAGE)
    access.close()


def test_a_driver_that_does_not_unpin(kernel, c, place):
    """The kernel asks, gives up and says so; then the area can be pinned and cut no more."""
    fd, ioas, _ = place
    access = make(c, place, driver := Driver(obeys=False))
    driver.pin(IOVA, PAGE)
    with refused(errno.EDEADLOCK):
        c.unmap(fd, ioas, IOVA, MIB)
    assert len(set(driver.asked)) == 1
    assert driver.asked[0] == (IOVA, MIB)
    assert kernel.warnings == 1
    with refused(errno.EINVAL):
        driver.pin(IOVA, PAGE)
    with refused(errno.EINVAL):
        access.read(c.process, IOVA, 8)
    with refused(errno.EBUSY):
        c.process.file(fd).ioas(ioas).cut(IOVA + PAGE - 1)
    driver.obeys = True
    assert c.unmap(fd, ioas, IOVA, MIB) == MIB
    access.close()
    kernel.warnings = 0


def test_an_area_that_is_pinned_is_not_cut(kernel, c, place):
    """iopt_area_split: nobody knows which half a pin is of."""
    fd, ioas, _ = place
    access = make(c, place, driver := Driver())
    driver.pin(IOVA, PAGE)
    with refused(errno.EINVAL):
        c.process.file(fd).ioas(ioas).cut(IOVA + 2 * PAGE - 1)
    access.unpin_pages(*driver.pinned.pop())
    c.process.file(fd).ioas(ioas).cut(IOVA + 2 * PAGE - 1)
    assert c.unmap(fd, ioas, IOVA, 2 * PAGE) == 2 * PAGE
    access.close()


def test_what_the_iommufd_itself_has_pinned_stays(kernel, c, place):
    """An internal access (a queue that hardware reads): its areas cannot be unmapped."""
    fd, ioas, _ = place
    access = make(c, place, None)
    access.pin_pages(IOVA, PAGE)
    with refused(errno.EBUSY):
        c.unmap(fd, ioas, IOVA, MIB)
    with refused(errno.EBUSY):
        c.unmap(fd, ioas)
    with refused(errno.EBUSY):
        c.unmap(fd, ioas, IOVA, PAGE)
    access.unpin_pages(IOVA, PAGE)
    with refused(errno.ENOENT):
        c.unmap(fd, ioas, IOVA, PAGE)
    assert c.unmap(fd, ioas, IOVA, MIB) == MIB
    access.detach()
    access.close()


def test_misuse_is_warned_of(kernel, c, place):
    """Where Linux has WARN_ON."""
    access = make(c, place, driver := Driver())
    with refused(errno.EINVAL):
        access.attach(place[1])
    access.unpin_pages(IOVA, PAGE)
    driver.pin(IOVA, 2 * PAGE)
    access.unpin_pages(IOVA, PAGE)
    access.unpin_pages(IOVA, 0)
    access.unpin_pages(IOVA + MIB, PAGE)
    assert kernel.warnings == 5
    assert pins(kernel) == 2
    driver.access.detach()
    with refused(errno.ENOENT):
        access.pin_pages(IOVA, PAGE)
    with refused(errno.ENOENT):
        access.read(c.process, IOVA, 1)
    with refused(errno.ENOENT):
        access.replace(place[1])
    access.close()
    kernel.warnings = 0
