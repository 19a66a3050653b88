# SPDX-License-Identifier: Apache-2.0
"""What pinned pages count as, for processes without CAP_IPC_LOCK (change_process, with its three kinds of
accounting, of the kernel's selftest): RLIMIT_MEMLOCK, VmLck, VmPin.
"""

import pytest
from conf_env import PAGE, RW, uapi
from conf_marks import needs_mock
from conf_rows import BASE

pytestmark = needs_mock
#: pages that a process may lock; IOMMU_OPTION_RLIMIT_MODE: of the user, or of the process itself
LIMIT = 16
modes = pytest.mark.parametrize("by_process", [0, 1], ids=["user", "mm"])


@pytest.fixture
def processes(machine, env):
    """Makes processes; they end with the test, before what is checked then."""
    made = []

    def make():
        made.append(machine.process())
        return made[-1]

    yield make
    for process in made:
        process.exit()


class Vmm:
    """A process that may lock LIMIT pages, its iommufd and an IOAS."""

    def __init__(self, process, by_process, limit=LIMIT):
        self.process = process
        if limit is not None:
            process.restrict(limit)
        self.fd = self.call("iommu")
        assert self.option(by_process) is None
        self.ioas = self.call("ioas", self.fd)
        self.hva = process.do("allocate", 64 * PAGE)
        self.file = self.call("memfd", 64 * PAGE)

    def call(self, name, *args, **fields):
        return self.process.do("call", name, *args, **fields)

    def option(self, by_process):
        fields = {"option_id": uapi.IOMMU_OPTION_RLIMIT_MODE, "op": uapi.IOMMU_OPTION_OP_SET}
        answer = self.call("call", self.fd, "IOMMU_OPTION", val64=by_process, **fields)
        return answer if isinstance(answer, str) else None

    def map(self, page, pages, iova=0, ioas=None):
        """User memory at BASE + iova pages; "mapped" or the errno."""
        hva = self.hva + page * PAGE
        answer = self.call("map", self.fd, ioas or self.ioas, hva, pages * PAGE, BASE + iova * PAGE)
        return answer if isinstance(answer, str) else "mapped"

    def map_file(self, page, pages, iova=0):
        args = self.file, page * PAGE, pages * PAGE, BASE + iova * PAGE, RW
        answer = self.call("map_file", self.fd, self.ioas, *args)
        return answer if isinstance(answer, str) else "mapped"

    def unmap(self, iova, pages):
        return self.call("unmap", self.fd, self.ioas, BASE + iova * PAGE, pages * PAGE)

    def attach(self, ioas=None):
        """A further mock device: its selftest object, or the errno."""
        answer = self.call("mock", self.fd, ioas or self.ioas)
        return answer if isinstance(answer, str) else answer[0]

    def change(self, fd=None):
        answer = self.call("call", fd or self.fd, "IOMMU_IOAS_CHANGE_PROCESS")
        return answer if isinstance(answer, str) else "changed"

    def locked(self):
        return self.process.do("locked")


@modes
def test_a_limit(processes, by_process):
    """What is pinned counts once, from the first domain on, whatever shows it; above the limit is ENOMEM, and
    nothing has changed.
    """
    v = Vmm(processes(), by_process)

    def counts(pages):
        return v.locked() == (pages * by_process, pages)

    assert v.map(0, 10) == "mapped"
    assert counts(0)
    first = v.attach()
    assert counts(10)
    assert v.map(20, 7, 20) == "ENOMEM"
    assert counts(10)
    assert v.map(20, 6, 20) == "mapped"
    assert counts(16)
    assert v.map(40, 1, 40) == "ENOMEM"
    assert v.call("copy", v.fd, v.ioas, v.ioas, BASE, 10 * PAGE, BASE + 50 * PAGE) == BASE + 50 * PAGE
    second = v.attach()
    assert counts(16)
    assert v.call("destroy", v.fd, first) is None
    assert v.unmap(0, 10) == 10 * PAGE
    assert counts(16)
    assert v.unmap(50, 10) == 10 * PAGE
    assert counts(6)
    # the same memory mapped again is pinned again
    assert v.map(20, 6, 0) == "mapped"
    assert counts(12)
    assert v.map(20, 6, 10) == "ENOMEM"
    assert v.map_file(0, 4, 10) == "mapped"
    assert v.map_file(0, 1, 14) == "ENOMEM"
    assert counts(16)
    assert v.call("destroy", v.fd, second) is None
    assert counts(0)
    assert v.map(40, 1, 40) == "mapped"
    assert v.attach() == "ENOMEM"
    assert counts(0)
    assert v.unmap(40, 1) == PAGE
    assert isinstance(v.attach(), int)
    assert counts(16)
    v.call("close", v.fd)
    assert counts(0)


@modes
def test_pins_count_too(processes, by_process):
    v = Vmm(processes(), by_process)
    assert v.map(0, 40) == "mapped"
    access = v.call("access", v.fd, v.ioas)
    assert v.call("pin", v.fd, access, BASE, 17 * PAGE) == "ENOMEM"
    assert v.locked() == (0, 0)
    assert v.call("pin", v.fd, access, BASE, 10 * PAGE) == 0
    assert v.call("pin", v.fd, access, BASE + 4 * PAGE, 10 * PAGE) == 1
    assert v.locked() == (14 * by_process, 14)
    assert v.call("pin", v.fd, access, BASE + 20 * PAGE, 3 * PAGE) == "ENOMEM"
    assert v.locked() == (14 * by_process, 14)
    # bytes that are read and written pin nothing for long
    assert v.call("rw", v.fd, access, BASE, 40 * PAGE, 4) == bytes(40 * PAGE)
    assert v.attach() == "ENOMEM"
    assert v.call("unpin", v.fd, access, 0) is None
    assert v.locked() == (10 * by_process, 10)
    assert v.unmap(0, 40) == 40 * PAGE
    assert v.locked() == (0, 0)


@modes
def test_two_processes_of_a_user(processes, by_process):
    one, other = Vmm(processes(), by_process), Vmm(processes(), by_process)
    assert isinstance(one.attach(), int)
    assert isinstance(other.attach(), int)
    assert one.map(0, 10) == "mapped"
    assert other.map(0, 7) == ("mapped" if by_process else "ENOMEM")
    assert other.map(10, 6, 10) == "mapped"
    assert other.locked() == ((13, 13) if by_process else (0, 6))
    assert one.unmap(0, 10) == 10 * PAGE
    assert other.map(30, 10, 30) == ("ENOMEM" if by_process else "mapped")


@modes
def test_change_process(processes, env, by_process):
    """The count goes with the pages, where the next process may have them."""
    one, other, small = (Vmm(processes(), by_process, limit) for limit in (LIMIT, 2 * LIMIT, 5))
    assert one.map_file(0, 10) == "mapped"
    assert one.call("copy", one.fd, one.ioas, one.ioas, BASE, 10 * PAGE, BASE + 20 * PAGE) == BASE + 20 * PAGE
    assert isinstance(one.attach(), int)
    assert one.locked() == (10 * by_process, 10)
    pid = one.process.do("pid")
    assert small.change(small.process.do("take", pid, one.fd)) == "ENOMEM"
    assert (one.locked(), small.locked()) == ((10 * by_process, 10), (0, 0))
    shared = other.process.do("take", pid, one.fd)
    assert other.change(shared) == "changed"
    assert (one.locked(), other.locked()) == ((0, 0), (10 * by_process, 10))
    assert other.change(shared) == "changed"
    assert one.map_file(20, 16, 40) == ("mapped" if by_process else "ENOMEM")
    assert one.unmap(0, 10) == 10 * PAGE
    assert one.unmap(20, 10) == 10 * PAGE
    assert (one.locked(), other.locked()) == ((16, 16) if by_process else (0, 0), (0, 0))


def test_nobody_is_charged(processes, env):
    """account_none: with CAP_IPC_LOCK there is no limit. What is pinned is said of who pinned it."""
    one, other = Vmm(processes(), 1, None), Vmm(processes(), 1, None)
    assert one.map_file(0, 10) == "mapped"
    assert isinstance(one.attach(), int)
    assert one.locked() == (0, 10)
    assert other.change(other.process.do("take", one.process.do("pid"), one.fd)) == "changed"
    assert (one.locked(), other.locked()) == ((0, 10), (0, 0))
    assert one.map(0, 20, 20) == "mapped"
    assert one.locked() == (0, 30)
