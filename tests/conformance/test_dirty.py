# SPDX-License-Identifier: Apache-2.0
"""Dirty tracking of mock devices (the fixture iommufd_dirty_tracking of the kernel's selftest)."""

import pytest
from conf_env import FOR_PASIDS, NEST, PAGE, TRACKED, R, W, outcome, uapi
from conf_marks import needs_mock
from conf_rows import BASE
from conf_selftest import (
    IOMMU_TEST_OP_PASID_ATTACH,
    IOMMU_TEST_OP_PASID_DETACH,
    MOCK_FLAGS_DEVICE_NO_DIRTY,
    MOCK_FLAGS_DEVICE_PASID,
    MOCK_IOMMUPT_HUGE,
    iommu_hwpt_selftest,
)

pytestmark = needs_mock
ON, NO_CLEAR = uapi.IOMMU_HWPT_DIRTY_TRACKING_ENABLE, uapi.IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR
PAGES = 64
#: pages with no area: a hole
HOLE = range(40, 44)


class Scene:
    """A tracked HWPT that shows PAGES pages, each an area of its own: no leaf is larger than a page."""

    def __init__(self, env):
        self.env = env
        self.fd = env.iommu()
        self.ioas = env.ioas(self.fd)
        memfd = env.memfd(PAGES * PAGE)
        for n in range(PAGES):
            if n not in HOLE:
                env.map_file(self.fd, self.ioas, memfd, n * PAGE, PAGE, BASE + n * PAGE)
        self.stdev, _, self.dev = env.mock(self.fd, self.ioas, 0)
        self.hwpt = env.hwpt(self.fd, self.dev, self.ioas, TRACKED)
        env.mock_replace(self.fd, self.stdev, self.hwpt)

    def track(self, flags=ON, hwpt=None):
        fields = {"hwpt_id": hwpt or self.hwpt, "flags": flags}
        answer = outcome(self.env.call, self.fd, "IOMMU_HWPT_SET_DIRTY_TRACKING", **fields)
        return answer if isinstance(answer, str) else 0

    def write(self, *pages, page=PAGE):
        bits = sum(1 << n for n in pages)
        return outcome(self.env.written, self.fd, self.hwpt, BASE, PAGES * PAGE, page, bits)

    def read(self, flags=0, *, first=0, pages=PAGES, page=PAGE, before=0, data=None, skip=0):
        """The numbers of the bits that are set afterwards in a bitmap that began with ``before``."""
        size = -(-pages * PAGE // page // 8) + skip + 1
        at = self.env.buffer(bytes(skip) + before.to_bytes(size - skip, "little"))
        answer = outcome(
            self.env.call, self.fd, "IOMMU_HWPT_GET_DIRTY_BITMAP",
            hwpt_id=self.hwpt, flags=flags, iova=BASE + first * PAGE, length=pages * PAGE, page_size=page,
            data=at + skip if data is None else data,
        )  # fmt: skip
        if isinstance(answer, str):
            return answer
        bits = int.from_bytes(self.env.bytes_at(at + skip, size - skip), "little")
        return [n for n in range(8 * (size - skip)) if bits >> n & 1]


@pytest.fixture
def scene(env):
    return Scene(env)


def test_only_what_can_track_tracks(scene):
    env, fd = scene.env, scene.fd
    _, plain, dev = env.mock(fd, scene.ioas, MOCK_FLAGS_DEVICE_NO_DIRTY)
    assert outcome(env.hwpt, fd, dev, scene.ioas, TRACKED) == "EOPNOTSUPP"
    assert scene.track(hwpt=plain) == "EOPNOTSUPP"
    assert scene.track(0, hwpt=plain) == "EOPNOTSUPP"
    # a device that cannot is refused by an HWPT that does
    assert outcome(env.mock, fd, scene.hwpt, MOCK_FLAGS_DEVICE_NO_DIRTY) == "EINVAL"
    stdev, _, _ = env.mock(fd, plain, MOCK_FLAGS_DEVICE_NO_DIRTY)
    assert outcome(env.mock_replace, fd, stdev, scene.hwpt) == "EINVAL"
    assert outcome(env.mock_replace, fd, stdev, plain) == plain
    assert outcome(env.mock, fd, scene.ioas, 2) == "EINVAL"


@pytest.mark.parametrize("flags", [0, MOCK_FLAGS_DEVICE_NO_DIRTY])
def test_hardware_information(scene, flags):
    _, _, dev = scene.env.mock(scene.fd, scene.ioas, flags)
    info = scene.env.call(scene.fd, "IOMMU_GET_HW_INFO", dev_id=dev)
    assert bool(info.out_capabilities & uapi.IOMMU_HW_CAP_DIRTY_TRACKING) == (not flags)


def test_on_and_off(scene):
    assert scene.write(1) == "EINVAL"  # the mock device's writes are seen while it is on
    assert [scene.track(), scene.track(), scene.write(1), scene.track(0), scene.track(0)] == [0, 0, 1, 0, 0]
    assert scene.write(1) == "EINVAL"
    assert scene.track(ON | 2) == "EOPNOTSUPP"


def pasid(scene, op, stdev, pt=0):
    answer = outcome(scene.env.pasid, scene.fd, op, stdev, 100, pt)
    return answer if isinstance(answer, str) else 0


def test_pasids(scene):
    """pasid_set_dirty_tracking of the kernel's selftest."""
    env, fd = scene.env, scene.fd
    hwpt = env.hwpt(fd, scene.dev, scene.ioas, TRACKED | FOR_PASIDS)
    stdev, _, _ = env.mock(fd, hwpt, MOCK_FLAGS_DEVICE_PASID)
    assert pasid(scene, IOMMU_TEST_OP_PASID_ATTACH, stdev, hwpt) == 0
    assert [scene.track(hwpt=hwpt), scene.track(0, hwpt=hwpt)] == [0, 0]
    assert pasid(scene, IOMMU_TEST_OP_PASID_DETACH, stdev) == 0
    env.destroy(fd, stdev)
    # on an HWPT that takes no PASIDs
    stdev, _, dev = env.mock(fd, env.ioas(fd), MOCK_FLAGS_DEVICE_PASID | MOCK_FLAGS_DEVICE_NO_DIRTY)
    assert pasid(scene, IOMMU_TEST_OP_PASID_ATTACH, stdev, hwpt) == "EINVAL"
    # on one that does: only for the device itself the mock driver asks whether it tracks dirt
    assert outcome(env.mock_replace, fd, stdev, hwpt) == "EINVAL"
    env.mock_replace(fd, stdev, env.hwpt(fd, dev, scene.ioas, FOR_PASIDS))
    assert pasid(scene, IOMMU_TEST_OP_PASID_ATTACH, stdev, hwpt) == 0
    assert pasid(scene, IOMMU_TEST_OP_PASID_DETACH, stdev) == 0


def test_a_nesting_parent_tracks(scene):
    """Also while devices are on nested HWPTs above it."""
    env, fd = scene.env, scene.fd
    parent = env.hwpt(fd, scene.dev, scene.ioas, TRACKED | NEST)
    nested = env.hwpt(fd, scene.dev, parent, 0, bytes(iommu_hwpt_selftest()))
    env.mock_replace(fd, scene.stdev, nested)
    scene.hwpt = parent
    assert scene.track() == 0
    assert scene.write(1, 5) == 2
    assert scene.read(pages=32) == [1, 5]
    assert outcome(env.written, fd, nested, BASE, PAGE, PAGE, 1) == "ENOENT"


def test_a_table_of_huge_pages_tracks(scene):
    """Small pages of it are read like those of any other."""
    data = bytes(iommu_hwpt_selftest(0, MOCK_IOMMUPT_HUGE))
    scene.hwpt = scene.env.hwpt(scene.fd, scene.dev, scene.ioas, TRACKED, data)
    assert scene.track() == 0
    assert scene.write(3, 12) == 2
    assert scene.read(pages=32) == [3, 12]


def test_what_was_written_is_read_once(scene):
    scene.track()
    assert scene.read() == []
    assert scene.write(0, 3, 7, 8, 63) == 5
    assert scene.read() == [0, 3, 7, 8, 63][:4]  # behind a hole nothing is read: the answer is 0 all the same
    assert scene.read() == []
    assert scene.read(first=44, pages=20) == [19]


def test_looking_does_not_clear(scene):
    scene.track()
    scene.write(5, 6)
    assert scene.read(NO_CLEAR) == scene.read(NO_CLEAR) == [5, 6]
    assert scene.read() == [5, 6]
    assert scene.read(NO_CLEAR) == []


def test_a_part_is_read(scene):
    scene.track()
    scene.write(2, 9, 17, 30)
    assert scene.read(first=8, pages=16) == [1, 9]
    assert scene.read(pages=32) == [2, 30]


def test_bits_are_added(scene):
    scene.track()
    scene.write(4)
    assert scene.read(before=0b1000_0001) == [0, 4, 7]


@pytest.mark.parametrize("skip", [0, 8, 24])
@pytest.mark.parametrize("page", [2048, PAGE, 2 * PAGE, 4 * PAGE])
def test_sizes_of_pages(scene, page, skip):
    """A bit of the bitmap stands for ``page`` bytes; a leaf sets all that it touches."""
    scene.track()
    scene.write(3, 12)
    wanted = sorted({(n * PAGE + half) // page for n in (3, 12) for half in (0, PAGE // 2)})
    assert scene.read(pages=32, page=page, skip=skip) == wanted


def test_beginning_forgets(scene):
    scene.track()
    scene.write(1, 2)
    assert scene.track() == 0
    assert scene.read(pages=32) == []
    scene.write(3)
    assert scene.track(0) == 0
    assert scene.read(pages=32) == [3]  # ending does not


def test_a_bitmap_that_is_not_there_takes_nothing(scene):
    scene.track()
    scene.write(1)
    assert scene.read(pages=32, data=8) == []
    assert scene.read(pages=32) == []


def test_what_goes_takes_its_dirt_along(scene):
    scene.track()
    scene.write(1, 2)
    env, fd = scene.env, scene.fd
    assert env.unmap(fd, scene.ioas, BASE + PAGE, PAGE) == PAGE
    env.map_file(fd, scene.ioas, env.memfd(PAGE), 0, PAGE, BASE + PAGE)
    assert scene.read(pages=32) == [2]


def test_a_read_only_area_is_read_too(scene):
    env, fd = scene.env, scene.fd
    for n, flags in enumerate((R, W)):
        env.map_file(fd, scene.ioas, env.memfd(PAGE), 0, PAGE, BASE + (PAGES + n) * PAGE, flags)
    scene.track()
    assert scene.read(first=44, pages=PAGES - 42) == []


@pytest.mark.parametrize(
    ("iova", "length", "page", "answer"),
    [(BASE, PAGE, 0, "EINVAL"), (BASE, 0, PAGE, "EINVAL"), (BASE + 1, PAGE, PAGE, "EINVAL"),
     (BASE, PAGE + 1, PAGE, "EINVAL"), (BASE, PAGE, PAGE, 0)],
)  # fmt: skip
def test_the_mock_devices_writes(scene, iova, length, page, answer):
    scene.track()
    fields = {"iova": iova, "length": length, "page_size": page, "uptr": scene.env.buffer(8)}
    got = outcome(scene.env.test, scene.fd, 13, scene.hwpt, **{f"dirty__{k}": v for k, v in fields.items()})
    assert (got if isinstance(got, str) else got.dirty.out_nr_dirty) == answer
