# SPDX-License-Identifier: Apache-2.0
"""Nested HWPTs of mock devices: a guest's domain of four IOTLB entries on a nesting parent.

(alloc_hwpt_nested of the fixture iommufd_ioas, alloc_hwpt of iommufd_mock_domain in the kernel's selftest.)
"""

import pytest
from conf_env import FAULT, FOR_PASIDS, NEST, PAGE, TRACKED, outcome, uapi
from conf_marks import needs_mock
from conf_rows import ABSENT, BASE, BOGUS
from conf_scene import Scene
from conf_selftest import (
    IOMMU_HWPT_DATA_SELFTEST,
    IOMMU_HWPT_INVALIDATE_DATA_SELFTEST,
    IOMMU_TEST_INVALIDATE_FLAG_ALL,
    IOMMU_TEST_IOTLB_DEFAULT,
    IOMMU_TEST_OP_MD_CHECK_IOTLB,
    MOCK_IOMMUPT_DEFAULT,
    MOCK_IOMMUPT_HUGE,
    MOCK_IOTLB_NUM,
    iommu_hwpt_invalidate_selftest,
    iommu_hwpt_selftest,
)

pytestmark = needs_mock
DATA = bytes(iommu_hwpt_selftest(iotlb=IOMMU_TEST_IOTLB_DEFAULT))
FULL = [IOMMU_TEST_IOTLB_DEFAULT] * MOCK_IOTLB_NUM
ALL = IOMMU_TEST_INVALIDATE_FLAG_ALL
INVALIDATE = IOMMU_HWPT_INVALIDATE_DATA_SELFTEST


class Nested(Scene):
    """Nested HWPTs on the parent."""

    def nested(self, flags=0, **fields):
        return self.env.hwpt(self.fd, self.dev, self.parent, flags, DATA, **fields)

    def iotlb(self, hwpt):
        """The entries, found by asking for what can be in them; None: something else."""
        return [next((v for v in (0, *FULL) if self.has(hwpt, i, v) is None), None) for i in range(4)]

    def has(self, hwpt, number, value):
        fields = {"check_iotlb__id": number, "check_iotlb__iotlb": value}
        answer = outcome(self.env.test, self.fd, IOMMU_TEST_OP_MD_CHECK_IOTLB, hwpt, **fields)
        return answer if isinstance(answer, str) else None

    def invalidate(self, hwpt, *entries, data_type=INVALIDATE, **fields):
        """``entries``: (flags, IOTLB entry)."""
        structs = [iommu_hwpt_invalidate_selftest(*entry) for entry in entries]
        return self.env.invalidate(self.fd, hwpt, data_type, structs, **fields)


@pytest.fixture
def scene(env):
    return Nested(env)


#: what HWPT_ALLOC with data on a parent answers, in the order of the kernel's checks
ROWS = [
    ({}, 0),
    ({"flags": FOR_PASIDS}, 0),
    ({"data_len": 4}, 0),
    ({"data_type": uapi.IOMMU_HWPT_DATA_NONE}, "EINVAL"),
    ({"data_len": 0}, "EINVAL"),
    ({"data_type": uapi.IOMMU_HWPT_DATA_NONE, "data_len": 0}, "EOPNOTSUPP"),
    ({"data_type": IOMMU_HWPT_DATA_SELFTEST + 1}, "EOPNOTSUPP"),
    ({"data_type": IOMMU_HWPT_DATA_SELFTEST + 1, "data_uptr": 0}, "EOPNOTSUPP"),
    ({"data_len": 3}, "EINVAL"),
    ({"data_len": 9}, "EINVAL"),
    ({"data_len": 3, "data_uptr": 0}, "EINVAL"),
    ({"data_uptr": 0}, "EFAULT"),
    ({"data_uptr": 8}, "EFAULT"),
    ({"flags": NEST}, "EOPNOTSUPP"),
    ({"flags": TRACKED}, "EOPNOTSUPP"),
    ({"flags": NEST, "pt_id": "plain"}, "EOPNOTSUPP"),
    ({"flags": 1 << 31}, "EOPNOTSUPP"),
    ({"flags": FAULT, "fault_id": "absent"}, "ENOENT"),
    ({"flags": FAULT, "fault_id": "absent", "data_type": BOGUS}, "EOPNOTSUPP"),
    ({"flags": FAULT, "fault_id": "ioas"}, "ENOENT"),
    ({"pt_id": "plain"}, "EINVAL"),
    ({"pt_id": "plain", "data_uptr": 0}, "EINVAL"),
    ({"pt_id": "auto"}, "EINVAL"),
    ({"pt_id": "dev"}, "EINVAL"),
    ({"pt_id": "absent"}, "EINVAL"),
    ({"dev_id": "ioas"}, "ENOENT"),
    ({"dev_id": "absent", "pt_id": "plain"}, "ENOENT"),
    # on an IOAS the data is of a paging domain
    ({"pt_id": "ioas"}, 0),
    ({"pt_id": "ioas", "flags": NEST}, 0),
    ({"pt_id": "ioas", "flags": NEST | FOR_PASIDS}, 0),
    ({"pt_id": "ioas", "data_type": BOGUS}, "EOPNOTSUPP"),
    ({"pt_id": "ioas", "data_len": 3}, "EINVAL"),
    ({"pt_id": "ioas", "data_uptr": 0}, "EFAULT"),
    ({"pt_id": "ioas", "flags": ~NEST & 0xFFFFFFFF}, "EOPNOTSUPP"),
    ({"pt_id": "ioas", "flags": NEST | FAULT}, "EOPNOTSUPP"),
    ({"pt_id": "ioas", "flags": NEST | TRACKED}, "EOPNOTSUPP"),
]


@pytest.mark.parametrize(("fields", "answer"), ROWS, ids=str)
def test_alloc(scene, fields, answer):
    wanted = scene.given({"flags": 0, "dev_id": "dev", "pt_id": "parent", **fields})
    dev, pt, flags = (wanted.pop(key) for key in ("dev_id", "pt_id", "flags"))
    got = outcome(scene.env.hwpt, scene.fd, dev, pt, flags, DATA, **wanted)
    assert (got if isinstance(got, str) else 0) == answer
    assert isinstance(got, str) or got == scene.plain + 1
    # what was refused has taken nothing
    if isinstance(got, str):
        assert scene.nested() == scene.plain + 1


@pytest.mark.parametrize(
    ("kind", "answer"), [(MOCK_IOMMUPT_DEFAULT, 0), (MOCK_IOMMUPT_HUGE, 0), (2, "EOPNOTSUPP")]
)
def test_kinds_of_tables(scene, kind, answer):
    """What a paging domain of the mock driver can be; for a nested one it is nothing."""
    data = bytes(iommu_hwpt_selftest(5, kind))
    got = outcome(scene.env.hwpt, scene.fd, scene.dev, scene.ioas, NEST, data)
    assert (got if isinstance(got, str) else 0) == answer
    nested = scene.env.hwpt(scene.fd, scene.dev, scene.parent, 0, data)
    assert [scene.has(nested, n, 5) for n in range(4)] == [None] * 4


def test_a_table_that_reaches_further(scene):
    env, fd = scene.env, scene.fd
    ioas, memfd = env.ioas(fd), env.memfd(2 * PAGE)
    hva = env.mmap(memfd, 2 * PAGE).hva
    hwpt = env.hwpt(fd, scene.dev, ioas, 0, bytes(iommu_hwpt_selftest(0, MOCK_IOMMUPT_HUGE)))
    assert env.ranges(fd, ioas) == ([(0, (1 << 38) - 1)], PAGE)
    assert outcome(env.map, fd, ioas, hva, 2048, BASE) == "EINVAL"
    for iova in (0, (1 << 31) - PAGE, (1 << 38) - 2 * PAGE):
        assert env.map(fd, ioas, hva, 2 * PAGE, iova) == iova
        assert env.check_map(fd, hwpt, iova, 2 * PAGE, hva)
        assert not env.check_map(fd, hwpt, iova, PAGE, hva + PAGE)
    assert outcome(env.map, fd, ioas, hva, PAGE, 1 << 38) == "EINVAL"
    assert not env.check_map(fd, hwpt, 2048, 2048, hva)  # not in its pages
    assert env.unmap(fd, ioas) == 6 * PAGE


def test_a_parent_may_be_made_by_a_device_that_tracks_dirt(scene):
    _, _, dev = scene.env.mock(scene.fd, scene.ioas, 0)
    assert isinstance(scene.env.hwpt(scene.fd, dev, scene.ioas, NEST | TRACKED), int)


def test_the_order_of_destruction(scene):
    one, two = scene.nested(), scene.nested()
    assert outcome(scene.env.hwpt, scene.fd, scene.dev, one, 0, DATA) == "EINVAL"
    assert scene.destroy(scene.parent) == "EBUSY"
    assert scene.destroy(one) is None
    assert scene.destroy(scene.parent) == "EBUSY"
    assert scene.destroy(two) is None
    assert scene.destroy(scene.parent) is None
    assert scene.destroy(two) == "ENOENT"


def test_a_device_is_moved(scene):
    one, two = scene.nested(), scene.nested()
    assert scene.replace(one) is None
    assert scene.destroy(scene.auto) == "ENOENT"  # it went with its last device
    assert [scene.destroy(one), scene.destroy(scene.parent), scene.destroy(scene.ioas)] == ["EBUSY"] * 3
    assert scene.replace(two) is None
    assert [scene.destroy(two), scene.destroy(one)] == ["EBUSY", None]
    assert scene.replace(scene.parent) is None
    assert [scene.destroy(two), scene.destroy(scene.parent)] == [None, "EBUSY"]
    assert scene.replace(scene.ioas) is None
    assert [scene.destroy(scene.parent), scene.destroy(scene.plain)] == [None, None]


def test_devices_come_and_go(scene):
    """The rotation of the selftest's alloc_hwpt, with a nesting parent and a nested HWPT."""
    for pt in (scene.parent, scene.nested(), scene.plain):
        assert scene.replace(pt) is None
        assert scene.destroy(pt) == "EBUSY"
        stdev, hwpt, _ = scene.env.mock(scene.fd, pt)
        assert hwpt == pt
        assert scene.destroy(stdev) is None
    assert scene.replace(scene.ioas) is None


def test_mapping_goes_on_below(scene):
    one = scene.nested()
    assert scene.replace(one) is None
    env, hva = scene.env, scene.env.mmap(scene.env.memfd(PAGE), PAGE).hva
    assert env.map(scene.fd, scene.ioas, hva, PAGE, BASE + PAGE) == BASE + PAGE
    assert env.check_map(scene.fd, scene.parent, BASE + PAGE, PAGE, hva)
    assert outcome(env.check_map, scene.fd, one, BASE, PAGE, hva) == "ENOENT"
    assert env.unmap(scene.fd, scene.ioas) == 2 * PAGE


def test_two_iommufds_do_not_share(scene):
    other = scene.env.iommu()
    ioas = scene.env.ioas(other)
    _, _, dev = scene.env.mock(other, ioas)
    assert outcome(scene.env.hwpt, other, dev, scene.parent, 0, DATA) == "EINVAL"


@pytest.mark.parametrize("dirty", ["IOMMU_HWPT_SET_DIRTY_TRACKING", "IOMMU_HWPT_GET_DIRTY_BITMAP"])
def test_dirt_is_not_tracked_above(scene, dirty):
    one = scene.nested()
    assert outcome(scene.env.call, scene.fd, dirty, hwpt_id=one) == "ENOENT"


# ---- the IOTLB


def test_it_begins_full(scene):
    one = scene.nested()
    assert scene.iotlb(one) == FULL
    assert scene.has(one, MOCK_IOTLB_NUM, 0) == "EINVAL"
    assert [scene.has(pt, 0, 0) for pt in (scene.parent, scene.ioas, ABSENT)] == ["ENOENT"] * 3


#: entries -> (answer, how many were done, which IOTLB entries are left)
BATCHES = [
    ([], (None, 0), FULL),
    ([(0, 1)], (None, 1), [FULL[0], 0, FULL[2], FULL[3]]),
    ([(0, 2), (0, 3)], (None, 2), [*FULL[:2], 0, 0]),
    ([(ALL, 0)], (None, 1), [0] * 4),
    ([(ALL, 3)], (None, 1), [0] * 4),
    ([(ALL, 4)], ("EINVAL", 0), FULL),
    ([(0, 4)], ("EINVAL", 0), FULL),
    ([(0xFFFFFFFF, 0)], ("EOPNOTSUPP", 0), FULL),
    ([(2, 9)], ("EOPNOTSUPP", 0), FULL),
    ([(0, 0), (0xFFFFFFFF, 1)], ("EOPNOTSUPP", 1), [0, *FULL[1:]]),
    ([(0, 0), (0, 4)], ("EINVAL", 1), [0, *FULL[1:]]),
    ([(0, 0), (0, 1), (0, 4), (0, 2)], ("EINVAL", 2), [0, 0, *FULL[2:]]),
    ([(0, 0)] * 40, (None, 40), [0, *FULL[1:]]),
]


@pytest.mark.parametrize(("entries", "answer", "left"), BATCHES, ids=str)
def test_invalidate(scene, entries, answer, left):
    one, two = scene.nested(), scene.nested()
    assert scene.invalidate(one, *entries) == answer
    assert (scene.iotlb(one), scene.iotlb(two)) == (left, FULL)


#: fields -> (errno, how many were done), of one entry
WRONG = [
    ({"data_type": 0xDADBEEF}, ("EINVAL", 0)),
    ({"data_type": 0xDADBEEF, "entry_num": 0}, ("EINVAL", 0)),
    ({"data_type": 0xDADBEEF, "data_uptr": 0}, ("EINVAL", 0)),
    ({"entry_len": 9}, ("EINVAL", 0)),
    ({"entry_len": 7}, ("EINVAL", 0)),
    ({"entry_len": 1}, ("EINVAL", 0)),
    ({"entry_len": 0}, ("EINVAL", 0)),
    ({"entry_len": PAGE}, ("EINVAL", 0)),
    ({"entry_len": PAGE + 1}, ("EINVAL", 0)),
    ({"entry_num": 1 << 19, "data_uptr": 8}, ("EFAULT", 0)),
    ({"entry_num": (1 << 19) + 1}, ("EINVAL", 0)),
    ({"data_uptr": 0}, ("EINVAL", 0)),
    ({"data_uptr": 8}, ("EFAULT", 0)),
    ({"entry_num": 0, "data_uptr": 0, "entry_len": 0}, (None, 0)),
    ({"entry_num": 0, "entry_len": PAGE + 1}, (None, 0)),
    ({"__reserved": 1}, ("EOPNOTSUPP", 0)),
]


@pytest.mark.parametrize(("fields", "answer"), WRONG, ids=str)
def test_what_is_no_invalidation(scene, fields, answer):
    one = scene.nested()
    assert scene.invalidate(one, (0, 0), **fields) == answer
    assert scene.iotlb(one) == FULL


@pytest.mark.parametrize("name", ["parent", "plain", "auto", "ioas", "dev"])
def test_only_a_nested_one_has_caches(scene, name):
    assert scene.invalidate(scene.names[name], (0, 0)) == ("EINVAL", 0)
    assert scene.invalidate(ABSENT, (0, 0)) == ("ENOENT", 0)


def test_what_is_left_goes_with_the_iommufd(scene):
    """Nothing is destroyed here: closing the iommufd finds the order."""
    one = scene.nested()
    assert scene.replace(one) is None
    scene.nested(FOR_PASIDS)
