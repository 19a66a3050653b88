# SPDX-License-Identifier: Apache-2.0
"""Mappings of one process that another looks at (fork_gone and fork_present of the fixture iommufd_ioas of
the kernel's selftest, and change_process).
"""

import pytest
from conf_env import PAGE, RW, R, outcome
from conf_marks import kinds, needs_mock
from conf_rows import BASE
from conf_selftest import MOCK_ACCESS_RW_SLOW_PATH
from test_rows import attach

pytestmark = needs_mock
SLOW = MOCK_ACCESS_RW_SLOW_PATH
AREA = 4 * PAGE
CONTENT = bytes((i * 7 + i // PAGE) % 251 for i in range(AREA))


class Scene:
    """An iommufd that two processes have, an emulated device; the second process maps memory of its own."""

    def __init__(self, env, other, kind):
        self.env, self.other = env, other
        self.fd = env.iommu()
        self.ioas = env.ioas(self.fd)
        if kind:
            attach(env, self.fd, self.ioas, kind)
        self.access = env.access(self.fd, self.ioas)
        self.shared = other.do("take", env.t.getpid(), self.fd)
        self.hva = other.do("allocate", AREA)
        other.do("store", self.hva, CONTENT)

    def map(self, iova=BASE, flags=RW):
        return self.other.do("call", "map", self.shared, self.ioas, self.hva, AREA, iova, flags)

    def rw(self, iova, data, flags=0):
        return outcome(self.env.rw, self.fd, self.access, iova, data, flags)

    def pin(self, iova, length):
        return outcome(self.env.pin, self.fd, self.access, iova, length)


@pytest.fixture
def other(machine):
    """A second process; it ends with the test, or earlier."""
    process = machine.process()
    ended = []
    end = process.exit
    process.exit = lambda: ended.append(end())
    yield process
    if not ended:
        process.exit()


def shown(scene):
    """What becomes of a further device."""
    answer = outcome(scene.env.mock, scene.fd, scene.ioas)
    return answer if isinstance(answer, str) else "attached"


@kinds
def test_memory_of_a_process_that_is_gone(env, other, kind):
    """fork_gone: what a domain has pinned stays; what nobody has pinned cannot be any more."""
    s = Scene(env, other, kind)
    assert s.map() == BASE
    other.exit()
    if kind:
        assert s.rw(BASE, AREA) == CONTENT
        assert s.rw(BASE + 5, b"written") == b"written"
        assert s.rw(BASE, 20, SLOW) == CONTENT[:5] + b"written" + CONTENT[12:20]
        assert s.pin(BASE, AREA) == 0
        assert shown(s) == "attached"
        copied = env.ioas(s.fd)
        attach(env, s.fd, copied, "mock")
        assert env.copy(s.fd, copied, s.ioas, BASE, AREA, BASE) == BASE
    else:
        for flags in (0, SLOW):
            assert s.rw(BASE, 8, flags) == "EFAULT"
            assert s.rw(BASE, b"8" * 8, flags) == "EFAULT"
            assert s.rw(BASE + PAGE - 1, 2, flags) == "EFAULT"
        assert s.pin(BASE, PAGE) == "EFAULT"
        assert shown(s) == "EFAULT"
        copied = env.ioas(s.fd)
        attach(env, s.fd, copied, "mock")
        assert outcome(env.copy, s.fd, copied, s.ioas, BASE, AREA, BASE) == "EFAULT"
    assert outcome(env.call, s.fd, "IOMMU_IOAS_CHANGE_PROCESS") == "EINVAL"
    assert env.unmap(s.fd, s.ioas, BASE, AREA) == AREA


@kinds
@pytest.mark.parametrize("flags", [0, SLOW], ids=["fast", "slow"])
def test_memory_of_a_process_that_is_there(env, other, kind, flags):
    """fork_present: read and written across processes, page by page and over their borders."""
    s = Scene(env, other, kind)
    assert s.map() == BASE
    assert shown(s) == "attached"
    for start, length in ((0, 1), (PAGE - 50, 100), (PAGE, PAGE), (3, AREA - 3), (AREA - 1, 1)):
        now = other.do("load", s.hva, AREA)
        assert s.rw(BASE + start, length, flags) == now[start : start + length]
        data = bytes((start + i) % 239 for i in range(length))
        assert s.rw(BASE + start, data, flags) == data
        assert other.do("load", s.hva, AREA) == now[:start] + data + now[start + length :]
    assert s.pin(BASE, AREA) == 0
    other.exit()
    assert s.rw(BASE, AREA, flags) == now[:start] + data


@kinds
def test_pages_of_a_mapping_that_is_gone(env, other, kind):
    """While its process lives one page is looked up anew, and more of them where they are pinned."""
    s = Scene(env, other, kind)
    assert s.map() == BASE
    assert s.pin(BASE, 2 * PAGE) == 0
    other.do("free", s.hva)
    assert s.rw(BASE, 8) == "EFAULT"
    assert s.rw(BASE, 8, SLOW) == "EFAULT"
    assert s.rw(BASE, 2 * PAGE) == CONTENT[: 2 * PAGE]
    assert s.rw(BASE + PAGE, 2 * PAGE) == (CONTENT[PAGE : 3 * PAGE] if kind else "EFAULT")
    other.exit()
    assert s.rw(BASE, 8) == CONTENT[:8]


@kinds
def test_a_file_of_a_process_that_is_gone(env, other, kind):
    """The file stays as long as it is mapped."""
    s = Scene(env, other, kind)
    file = other.do("call", "memfd", AREA)
    shown_at = other.do("allocate", AREA, file)
    other.do("store", shown_at, CONTENT)
    assert other.do("call", "map_file", s.shared, s.ioas, file, 0, AREA, BASE) == BASE
    other.exit()
    assert s.rw(BASE, AREA) == CONTENT
    assert s.pin(BASE, AREA) == 0
    assert shown(s) == "attached"
    env.call(s.fd, "IOMMU_IOAS_CHANGE_PROCESS")
    assert s.rw(BASE, b"handed on") == b"handed on"


@kinds
def test_change_process(env, other, kind):
    """Files are handed on to whoever asks, with what is pinned of them; memory is not, whoever asks."""
    s = Scene(env, other, kind)
    file = env.memfd(AREA)
    mapping = env.mmap(file, AREA)
    mapping.write(0, CONTENT)
    env.map_file(s.fd, s.ioas, file, 0, AREA, BASE + AREA)
    assert s.pin(BASE + AREA, PAGE) == 0

    def change():
        here = outcome(env.call, s.fd, "IOMMU_IOAS_CHANGE_PROCESS")
        there = other.do("call", "call", s.shared, "IOMMU_IOAS_CHANGE_PROCESS")
        return [each if isinstance(each, str) else 0 for each in (here, there)]

    assert change() == [0, 0]
    assert s.map() == BASE
    assert change() == ["EINVAL", "EINVAL"]
    env.map(s.fd, s.ioas, mapping.hva, AREA, BASE + 2 * AREA, R)
    env.unmap(s.fd, s.ioas, BASE, AREA)
    assert change() == ["EINVAL", "EINVAL"]
    env.unmap(s.fd, s.ioas, BASE + 2 * AREA, AREA)
    assert change() == [0, 0]
    env.close(s.fd)
    access = other.do("take", env.t.getpid(), s.access)
    assert other.do("call", "rw", s.shared, access, BASE + AREA, 9) == CONTENT[:9]
    assert other.do("call", "rw", s.shared, access, BASE + AREA, b"from there") == b"from there"
    assert mapping.read(0, 10) == b"from there"
