# SPDX-License-Identifier: Apache-2.0
"""Hardware queues of mock vIOMMUs: queues in a guest's memory, whose pages stay mapped.

(hw_queue of the fixture iommufd_viommu in the kernel's selftest.)
"""

import pytest
from conf_env import PAGE, RW, ULONG_MAX, R, W, outcome, uapi
from conf_marks import needs_mock
from conf_rows import BASE
from conf_scene import Scene
from conf_selftest import (
    IOMMU_HW_QUEUE_TYPE_SELFTEST,
    IOMMU_TEST_HW_QUEUE_MAX,
    IOMMU_VIOMMU_TYPE_SELFTEST,
)

from iokeep.uapi.errnos import MEANINGS

pytestmark = needs_mock
PAGES = 8


class Queues(Scene):
    """A vIOMMU on an IOAS with PAGES areas of a page, then a page that can be written only, then a hole."""

    def __init__(self, env):
        super().__init__(env)
        self.viommu = self.make()

    def fill(self):
        env, memfd = self.env, self.env.memfd((PAGES + 1) * PAGE)
        for n in range(PAGES + 1):
            env.map_file(self.fd, self.ioas, memfd, n * PAGE, PAGE, BASE + n * PAGE, W if n == PAGES else RW)

    def make(self):
        fields = {"type": IOMMU_VIOMMU_TYPE_SELFTEST, "dev_id": self.dev, "hwpt_id": self.parent}
        return self.env.call(self.fd, "IOMMU_VIOMMU_ALLOC", **fields).out_viommu_id

    def queue(self, index=0, iova=BASE, length=PAGE, **fields):
        """Its id, or the errno's name."""
        wanted = {"viommu_id": self.viommu, "type": IOMMU_HW_QUEUE_TYPE_SELFTEST, "index": index, **fields}
        wanted = {**self.given(wanted), "nesting_parent_iova": iova, "length": length}
        made = outcome(self.env.call, self.fd, "IOMMU_HW_QUEUE_ALLOC", **wanted)
        return made if isinstance(made, str) else made.out_hw_queue_id

    def unmap(self, page, pages=1):
        return outcome(self.env.unmap, self.fd, self.ioas, BASE + page * PAGE, pages * PAGE)


@pytest.fixture
def scene(env):
    return Queues(env)


END = BASE + PAGES * PAGE
#: what ALLOC answers, in the order of the kernel's checks
ROWS = [
    ({}, 0),
    ({"flags": 1}, "EOPNOTSUPP"),
    ({"type": uapi.IOMMU_HW_QUEUE_TYPE_DEFAULT}, "EOPNOTSUPP"),
    ({"type": uapi.IOMMU_HW_QUEUE_TYPE_DEFAULT, "length": 0}, "EOPNOTSUPP"),
    ({"length": 0}, "EINVAL"),
    ({"length": 0, "viommu_id": "absent"}, "EINVAL"),
    ({"iova": ULONG_MAX}, "EOVERFLOW"),
    ({"iova": ULONG_MAX, "viommu_id": "absent"}, "EOVERFLOW"),
    ({"viommu_id": "absent"}, "ENOENT"),
    ({"viommu_id": "parent"}, "ENOENT"),
    ({"type": 1}, "EOPNOTSUPP"),
    ({"type": 1, "viommu_id": "absent"}, "ENOENT"),
    ({"iova": 0, "length": ULONG_MAX}, "ERANGE"),
    ({"iova": 1, "length": ULONG_MAX - PAGE}, "ENOMEM"),
    ({"iova": BASE, "length": 1 << 60}, "ENOMEM"),
    ({"iova": 0}, "ENOENT"),
    ({"iova": END + PAGE}, "ENOENT"),
    ({"iova": BASE - 1, "length": 2}, "ENOENT"),
    ({"iova": END, "index": 9}, "EPERM"),
    ({"iova": END + PAGE, "index": 9}, "ENOENT"),
    ({"index": 1}, "EIO"),
    ({"index": IOMMU_TEST_HW_QUEUE_MAX}, "EINVAL"),
    ({"index": 1 << 31}, "EINVAL"),
    ({"length": 1}, 0),
    ({"iova": BASE + PAGE - 1, "length": 1}, 0),
    ({"iova": BASE + 17, "length": PAGE - 17}, 0),
]


@pytest.mark.parametrize(("fields", "answer"), ROWS, ids=str)
def test_alloc(scene, fields, answer):
    made = scene.queue(**fields)
    assert (made if isinstance(made, str) else 0) == answer
    assert isinstance(made, str) or made == scene.viommu + 1
    # what was refused has taken nothing, and pins nothing
    if isinstance(made, str):
        assert outcome(scene.env.unmap, scene.fd, scene.ioas) == (PAGES + 1) * PAGE
        assert scene.env.ioas(scene.fd) == scene.viommu + 1


def test_every_errno_is_explained():
    """What a refusal means, in the words of the client library."""
    refusals = {answer for _, answer in ROWS if isinstance(answer, str)} | {"EEXIST", "EADDRINUSE", "EFAULT"}
    assert sorted(each for each in refusals if each not in MEANINGS["IOMMU_HW_QUEUE_ALLOC"]) == []


def test_what_is_pinned_stays_mapped(scene):
    first = scene.queue(0)
    assert scene.queue(0) == "EEXIST"
    assert [scene.unmap(0), scene.unmap(1)] == ["EBUSY", PAGE]
    second = scene.queue(1, BASE + PAGE // 2, PAGE // 2)
    assert scene.destroy(first, scene.viommu) == ["EBUSY"] * 2
    assert scene.destroy(second) is None
    assert scene.unmap(0) == "EBUSY"
    assert scene.destroy(first) is None
    assert scene.unmap(0) == PAGE


def test_what_the_mock_driver_remembers(scene):
    """The mock driver of 7.3.4 has a bug: whichever queue goes, the place of queue 0 is free then."""
    first, second = scene.queue(0), scene.queue(1)
    assert scene.destroy(second) is None
    assert scene.queue(1) == "EEXIST"
    again = scene.queue(0)
    assert isinstance(again, int)
    assert scene.queue(0) == "EEXIST"
    assert scene.destroy(first, again) == [None, None]


def test_unmaps_around_it(scene):
    """Areas before the one that is pinned are gone when EBUSY comes."""
    queue = scene.queue(0, BASE + 3 * PAGE)
    assert scene.unmap(2, 3) == "EBUSY"
    assert [scene.unmap(n) for n in (2, 3, 4)] == ["ENOENT", "EBUSY", PAGE]
    assert outcome(scene.env.unmap, scene.fd, scene.ioas) == "EBUSY"
    assert scene.destroy(queue) is None
    assert outcome(scene.env.unmap, scene.fd, scene.ioas) > 0


def test_copies_of_what_is_pinned_are_free(scene):
    scene.queue()
    other = scene.env.ioas(scene.fd)
    assert scene.env.copy(scene.fd, other, scene.ioas, BASE, PAGE, BASE) == BASE
    assert outcome(scene.env.unmap, scene.fd, other) == PAGE


def test_its_access_is_an_object(scene):
    """It has the number behind the queue's, and cannot be destroyed by it."""
    queue = scene.queue()
    assert scene.env.ioas(scene.fd) == queue + 2
    assert scene.destroy(queue + 1) == "EBUSY"
    assert scene.destroy(queue) is None
    assert scene.destroy(queue + 1) == "ENOENT"


def test_the_access_is_a_user_of_the_ioas(scene):
    queue = scene.queue()
    assert scene.destroy(scene.ioas, scene.parent, scene.viommu) == ["EBUSY"] * 3
    assert scene.destroy(queue, scene.viommu) == [None, None]


def test_each_vioommu_has_its_own(scene):
    one = scene.queue()
    other = scene.make()
    two = scene.queue(viommu_id=other)
    assert [scene.queue(1), scene.queue(1, viommu_id=other)] != ["EIO", "EIO"]
    assert scene.unmap(0) == "EBUSY"
    assert scene.destroy(one, two) == ["EBUSY"] * 2


def test_an_ioas_with_half_pages(scene):
    """The mock IOMMU can have areas that are no whole pages, a pin cannot."""
    env = scene.env
    half = env.map_file(scene.fd, scene.ioas, env.memfd(PAGE), 0, PAGE // 2, END + 4 * PAGE)
    assert scene.queue() == "EADDRINUSE"
    env.unmap(scene.fd, scene.ioas, half, PAGE // 2)
    assert isinstance(scene.queue(), int)
    # and while there is one, no such area comes
    got = outcome(env.map_file, scene.fd, scene.ioas, env.memfd(PAGE), 0, PAGE // 2, END + 4 * PAGE)
    assert got == "EINVAL"


def test_what_is_not_consecutive(scene):
    """The same page twice: hardware would read on in another's memory."""
    env, at = scene.env, END + 4 * PAGE
    memfd = env.memfd(PAGE)
    for n in range(2):
        env.map_file(scene.fd, scene.ioas, memfd, 0, PAGE, at + n * PAGE, R)
    assert scene.queue(0, at, 2 * PAGE) == "EFAULT"
    assert scene.queue(0, at + PAGE - 8, 16) == "EFAULT"
    assert isinstance(scene.queue(0, at + PAGE, PAGE), int)


def test_what_is_left_goes_with_the_iommufd(scene):
    scene.queue(0)
    scene.queue(1)
