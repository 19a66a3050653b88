# SPDX-License-Identifier: Apache-2.0
"""vIOMMUs of mock devices: their devices, nested HWPTs, caches and events (the fixture iommufd_viommu of the
kernel's selftest).
"""

import ctypes
import os

import pytest
from conf_env import FAULT, FOR_PASIDS, NEST, PAGE, TRACKED, ULONG_MAX, outcome, uapi
from conf_marks import MACHINE, needs_mock, needs_vfio
from conf_scene import Scene
from conf_selftest import (
    IOMMU_HWPT_DATA_SELFTEST,
    IOMMU_TEST_DEV_CACHE_DEFAULT,
    IOMMU_TEST_INVALIDATE_FLAG_ALL,
    IOMMU_TEST_OP_DEV_CHECK_CACHE,
    IOMMU_TEST_OP_TRIGGER_IOPF,
    IOMMU_TEST_OP_TRIGGER_VEVENT,
    IOMMU_VEVENTQ_TYPE_SELFTEST,
    IOMMU_VIOMMU_INVALIDATE_DATA_SELFTEST,
    IOMMU_VIOMMU_TYPE_SELFTEST,
    MOCK_DEV_CACHE_NUM,
    iommu_hwpt_selftest,
    iommu_viommu_invalidate_selftest,
    iommu_viommu_selftest,
)

from iokeep.iommufd.client import Iommufd, IommufdError
from iokeep.iommufd.viommu import Event, EventQueue, InvalidationRefused, Viommu, invalidate
from iokeep.uapi.errnos import MEANINGS

pytestmark = needs_mock
DATA = bytes(iommu_hwpt_selftest())
TYPE, EVENTS = IOMMU_VIOMMU_TYPE_SELFTEST, IOMMU_VEVENTQ_TYPE_SELFTEST
LOST = uapi.IOMMU_VEVENTQ_FLAG_LOST_EVENTS
HEADER, ONE = 8, 12


class Events:
    """The queue of a vIOMMU: ``id``, ``fd``."""

    def __init__(self, env, iommufd, viommu, depth):
        self.env = env
        fields = {"viommu_id": viommu, "type": EVENTS, "veventq_depth": depth}
        made = env.call(iommufd, "IOMMU_VEVENTQ_ALLOC", **fields)
        self.id, self.fd = made.out_veventq_id, env.owned(made.out_veventq_fd)

    def read(self, length=10 * ONE):
        """[(sequence, virt_id or "lost")], or the errno's name."""
        raw = outcome(self.env.read, self.fd, length)
        if isinstance(raw, str):
            return raw
        out, words = [], [int.from_bytes(raw[at : at + 4], "little") for at in range(0, len(raw), 4)]
        while words:
            flags, sequence = words[:2]
            assert flags in (0, LOST)
            out.append((sequence, "lost" if flags else words[2]))
            words = words[2 if flags else 3 :]
        return out


class Guest(Scene):
    """The parent has a vIOMMU, and a nested HWPT by that."""

    def __init__(self, env):
        super().__init__(env)
        self.viommu = self.make()
        self.nested = self.hwpt()
        self.names |= {"viommu": self.viommu, "nested": self.nested, "buffer": env.buffer(64)}

    def make(self, **fields):
        """Another vIOMMU, or the errno's name."""
        wanted = {"type": TYPE, "dev_id": self.dev, "hwpt_id": self.parent, **fields}
        made = outcome(self.env.call, self.fd, "IOMMU_VIOMMU_ALLOC", **wanted)
        return made if isinstance(made, str) else made.out_viommu_id

    def hwpt(self, viommu=None, flags=0, **fields):
        return self.env.hwpt(self.fd, self.dev, viommu or self.viommu, flags, DATA, **fields)

    def vdevice(self, virt_id=0x99, viommu=None, dev=None):
        """Its id, or the errno's name."""
        fields = {"viommu_id": viommu or self.viommu, "dev_id": dev or self.dev, "virt_id": virt_id}
        made = outcome(self.env.call, self.fd, "IOMMU_VDEVICE_ALLOC", **fields)
        return made if isinstance(made, str) else made.out_vdevice_id

    def queue(self, depth=2, viommu=None):
        return Events(self.env, self.fd, viommu or self.viommu, depth)

    def trigger(self, n=1, dev=None):
        """What the last of n events was answered with."""
        for _ in range(n):
            fields = {"trigger_vevent__dev_id": dev or self.dev}
            answer = outcome(self.env.test, self.fd, IOMMU_TEST_OP_TRIGGER_VEVENT, **fields)
        return answer if isinstance(answer, str) else None

    def caches(self, dev=None):
        """Which entries are still full."""

        def has(number, value):
            fields = {"check_dev_cache__id": number, "check_dev_cache__cache": value}
            answer = outcome(self.env.test, self.fd, IOMMU_TEST_OP_DEV_CHECK_CACHE, dev or self.dev, **fields)
            return not isinstance(answer, str)

        full = [n for n in range(MOCK_DEV_CACHE_NUM) if has(n, IOMMU_TEST_DEV_CACHE_DEFAULT)]
        assert all(has(n, 0) for n in range(MOCK_DEV_CACHE_NUM) if n not in full)
        assert not has(MOCK_DEV_CACHE_NUM, 0)
        return full

    def invalidate(self, *entries, viommu=None, data_type=IOMMU_VIOMMU_INVALIDATE_DATA_SELFTEST, **fields):
        structs = [iommu_viommu_invalidate_selftest(*entry) for entry in entries]
        return self.env.invalidate(self.fd, viommu or self.viommu, data_type, structs, **fields)

    def vfio(self):
        """Another device, behind another IOMMU."""
        device = self.env.open(MACHINE.vfio[0])
        return self.env.call(device, "VFIO_DEVICE_BIND_IOMMUFD", argsz=16, iommufd=self.fd).out_devid


@pytest.fixture
def scene(env):
    return Guest(env)


# ---- vIOMMUs

ROWS = [
    ({}, 0),
    ({"flags": 1}, "EOPNOTSUPP"),
    ({"flags": 1, "dev_id": "absent"}, "EOPNOTSUPP"),
    ({"type": uapi.IOMMU_VIOMMU_TYPE_DEFAULT}, "EOPNOTSUPP"),
    ({"type": uapi.IOMMU_VIOMMU_TYPE_ARM_SMMUV3}, "EOPNOTSUPP"),
    ({"type": 0xDEAD}, "EOPNOTSUPP"),
    ({"type": 0xDEAD, "hwpt_id": "absent"}, "EOPNOTSUPP"),
    ({"type": 0xDEAD, "dev_id": "absent"}, "ENOENT"),
    ({"dev_id": "ioas"}, "ENOENT"),
    ({"hwpt_id": 0}, "ENOENT"),
    ({"hwpt_id": "absent"}, "ENOENT"),
    ({"hwpt_id": "ioas"}, "ENOENT"),
    ({"hwpt_id": "nested"}, "ENOENT"),
    ({"hwpt_id": "viommu"}, "ENOENT"),
    ({"hwpt_id": "plain"}, "EINVAL"),
    ({"hwpt_id": "auto"}, "EINVAL"),
    ({"hwpt_id": "plain", "data_len": 8, "data_uptr": 0}, "EINVAL"),
    ({"data_uptr": 8}, 0),
    ({"data_len": 24, "data_uptr": "buffer"}, 0),
    ({"data_len": 8, "data_uptr": "buffer"}, 0),
    ({"data_len": 7, "data_uptr": "buffer"}, "EINVAL"),
    ({"data_len": 25, "data_uptr": "buffer"}, "EINVAL"),
    ({"data_len": 24, "data_uptr": 0}, "EFAULT"),
    ({"data_len": 24, "data_uptr": 8}, "EFAULT"),
]


@pytest.mark.parametrize(("fields", "answer"), ROWS, ids=str)
def test_alloc(scene, fields, answer):
    before = scene.nested
    made = scene.make(**scene.given(fields))
    assert (made if isinstance(made, str) else 0) == answer
    assert isinstance(made, str) or made == before + 1
    # what was refused has taken nothing
    assert scene.make() == before + 1 + (not isinstance(made, str))


def test_the_order_of_destruction(scene):
    assert scene.destroy(scene.parent, scene.viommu, scene.ioas) == ["EBUSY"] * 3
    other = scene.make()
    assert scene.destroy(scene.nested, scene.viommu, scene.parent) == [None, None, "EBUSY"]
    assert scene.destroy(other, scene.parent) == [None, None]


def test_a_viommu_waits_for_all_that_is_on_it(scene):
    queue, vdevice = scene.queue(), scene.vdevice()
    scene.env.close(queue.fd)
    for number in (queue.id, vdevice, scene.nested):
        assert scene.destroy(scene.viommu) == "EBUSY"
        assert scene.destroy(number) is None
    assert scene.destroy(scene.viommu) is None


def test_what_is_left_goes_with_the_iommufd(scene):
    """Closing the iommufd finds the order."""
    scene.vdevice()
    scene.replace(scene.nested)
    scene.env.close(scene.queue().fd)
    scene.make(data_len=24, data_uptr=scene.names["buffer"])


def test_every_errno_is_explained():
    """What a refusal means for that ioctl, in the words of the client library."""
    tables = {
        "IOMMU_VIOMMU_ALLOC": ROWS,
        "IOMMU_HWPT_ALLOC": HWPT_ROWS,
        "IOMMU_VEVENTQ_ALLOC": QUEUE_ROWS,
        "IOMMU_HWPT_INVALIDATE": [(0, answer[0]) for _, answer in WRONG] + [(0, "EOPNOTSUPP"), (0, "E2BIG")],
        "IOMMU_VDEVICE_ALLOC": [(0, "ENOENT"), (0, "EEXIST"), (0, "EINVAL")],
    }
    refusals = {(name, row[1]) for name, rows in tables.items() for row in rows if isinstance(row[1], str)}
    assert sorted(pair for pair in refusals if pair[1] not in MEANINGS[pair[0]]) == []


# ---- pages of a vIOMMU


def with_page(scene, word=0xBEEF):
    """A vIOMMU that was told a word: (its id, what it answered)."""
    data = iommu_viommu_selftest(in_data=word)
    made = scene.make(data_len=ctypes.sizeof(data), data_uptr=ctypes.addressof(data))
    assert data.out_data == word
    assert data.out_mmap_length == 2 * PAGE
    return made, data.out_mmap_offset


def test_a_page_is_mapped(scene):
    viommu, offset = with_page(scene)
    mapping = scene.env.mmap(scene.fd, 2 * PAGE, offset)
    assert mapping.read(0, 8) == (0xBEEF).to_bytes(8, "little")
    assert scene.destroy(viommu) == "EBUSY"
    again = scene.env.mmap(scene.fd, 2 * PAGE, offset)
    mapping.write(PAGE, b"seen")
    assert again.read(PAGE, 4) == b"seen"
    mapping.close()
    assert scene.destroy(viommu) == "EBUSY"
    again.close()
    assert scene.destroy(viommu) is None
    assert outcome(scene.env.mmap, scene.fd, 2 * PAGE, offset) == "ENXIO"


def test_nothing_else_is_mapped(scene):
    assert outcome(scene.env.mmap, scene.fd, PAGE, 0) == "ENXIO"
    viommu, offset = with_page(scene)
    wrong = [(1, 0), (2, 1), (2, 2), (1, 1), (4, 0), (3, 0)]
    for pages, more in wrong:
        got = outcome(scene.env.mmap, scene.fd, pages * PAGE, offset + more * PAGE)
        assert got == "ENXIO", (pages, more)
    assert scene.destroy(viommu) is None


def test_offsets(scene):
    """The lowest that are free."""
    made = [with_page(scene, n) for n in range(3)]
    assert [offset // PAGE for _, offset in made] == [1, 3, 5]
    assert scene.destroy(made[1][0], made[0][0]) == [None, None]
    assert [with_page(scene)[1] // PAGE for _ in range(3)] == [1, 3, 7]
    mapping = scene.env.mmap(scene.fd, 2 * PAGE, made[2][1])
    assert mapping.read(0, 4) == (2).to_bytes(4, "little")


# ---- devices of a guest


@pytest.mark.parametrize("virt_id", [0, 0x99, (1 << 32) - 1, 1 << 32, ULONG_MAX], ids=hex)
def test_vdevice(scene, virt_id):
    vdevice = scene.vdevice(virt_id)
    assert vdevice == scene.nested + 1
    assert [scene.vdevice(virt_id), scene.vdevice(virt_id ^ 1)] == ["EEXIST"] * 2
    _, _, dev = scene.env.mock(scene.fd, scene.ioas)
    assert scene.vdevice(virt_id, dev=dev) == "EEXIST"
    assert isinstance(scene.vdevice(virt_id ^ 1, dev=dev), int)
    assert scene.destroy(vdevice) is None
    assert scene.vdevice(virt_id) == vdevice


def test_vdevice_of_what_is_none(scene):
    for name in ("absent", "ioas", "dev", "nested", "parent"):
        assert scene.vdevice(viommu=scene.names[name]) == "ENOENT"
    for name in ("absent", "ioas", "stdev", "viommu", "nested"):
        assert scene.vdevice(dev=scene.names[name]) == "ENOENT"
    assert scene.destroy(scene.nested) is None


def test_one_number_in_two_vioommus(scene):
    other = scene.make()
    _, _, dev = scene.env.mock(scene.fd, scene.ioas)
    one, two = scene.vdevice(5), scene.vdevice(5, other, dev)
    assert scene.vdevice(5, other) == "EEXIST"
    assert scene.destroy(one, two) == [None, None]


@needs_vfio
def test_another_iommu(scene):
    dev = scene.vfio()
    assert scene.vdevice(dev=dev) == "EINVAL"
    data = {"data_type": IOMMU_HWPT_DATA_SELFTEST}
    assert outcome(scene.env.hwpt, scene.fd, dev, scene.viommu, 0, DATA, **data) == "EINVAL"
    assert outcome(scene.env.hwpt, scene.fd, dev, scene.viommu, NEST) == "EINVAL"


def test_a_vdevice_goes_with_its_device(scene):
    """Its id stays taken: who has it may not know."""
    vdevice = scene.vdevice()
    assert scene.destroy(scene.stdev) is None
    assert scene.destroy(vdevice, scene.dev) == ["ENOENT"] * 2
    _, _, dev = scene.env.mock(scene.fd, scene.ioas)
    assert scene.vdevice(viommu=vdevice, dev=dev) == "ENOENT"
    again = scene.vdevice(dev=dev)
    assert isinstance(again, int)
    assert again != vdevice
    assert scene.destroy(scene.nested, scene.viommu) == [None, "EBUSY"]
    assert scene.destroy(again, scene.viommu) == [None, None]


def test_what_is_buried_is_not_empty(scene):
    """An iommufd with nothing but the id of such a vdevice is not new."""
    scene.vdevice()
    objects = [scene.stdev, scene.nested, scene.viommu, scene.plain, scene.parent, scene.ioas]
    assert scene.destroy(*objects) == [None] * len(objects)
    option = {"option_id": uapi.IOMMU_OPTION_RLIMIT_MODE, "op": uapi.IOMMU_OPTION_OP_SET, "val64": 1}
    assert outcome(scene.env.call, scene.fd, "IOMMU_OPTION", **option) == "EBUSY"


# ---- nested HWPTs by a vIOMMU

HWPT_ROWS = [
    ({}, 0),
    ({"flags": FOR_PASIDS}, 0),
    ({"data_len": 4}, 0),
    ({"flags": NEST}, "EOPNOTSUPP"),
    ({"flags": TRACKED}, "EOPNOTSUPP"),
    ({"flags": 1 << 31}, "EOPNOTSUPP"),
    ({"data_type": uapi.IOMMU_HWPT_DATA_NONE, "data_len": 0}, "EOPNOTSUPP"),
    ({"data_type": uapi.IOMMU_HWPT_DATA_NONE}, "EINVAL"),
    ({"data_type": 0x7EAD}, "EOPNOTSUPP"),
    ({"data_len": 3}, "EINVAL"),
    ({"data_len": 9}, "EINVAL"),
    ({"data_uptr": 0}, "EFAULT"),
    ({"flags": FAULT, "fault_id": "absent"}, "ENOENT"),
    ({"flags": FAULT | 1 << 31, "fault_id": "absent"}, "EOPNOTSUPP"),
    ({"flags": FAULT, "fault_id": "viommu"}, "ENOENT"),
    ({"pt_id": "nested"}, "EINVAL"),
    ({"dev_id": "viommu"}, "ENOENT"),
]


@pytest.mark.parametrize(("fields", "answer"), HWPT_ROWS, ids=str)
def test_alloc_hwpt(scene, fields, answer):
    wanted = scene.given({"flags": 0, "dev_id": "dev", "pt_id": "viommu", **fields})
    dev, pt, flags = (wanted.pop(key) for key in ("dev_id", "pt_id", "flags"))
    got = outcome(scene.env.hwpt, scene.fd, dev, pt, flags, DATA, **wanted)
    assert (got if isinstance(got, str) else 0) == answer
    assert scene.hwpt() == scene.nested + 1 + (not isinstance(got, str))


def test_only_what_the_guest_knows_is_attached(scene):
    assert scene.replace(scene.nested) == "ENOENT"
    assert outcome(scene.env.mock, scene.fd, scene.nested) == "ENOENT"
    vdevice = scene.vdevice()
    assert scene.replace(scene.nested) is None
    assert scene.destroy(scene.nested, scene.viommu, scene.auto) == ["EBUSY", "EBUSY", "ENOENT"]
    other = scene.hwpt(scene.make())
    assert scene.replace(other) == "ENOENT"  # that of another guest
    assert scene.destroy(vdevice) is None  # it is not a user of it
    assert scene.replace(scene.nested) is None
    assert scene.replace(scene.hwpt()) == "ENOENT"
    assert scene.replace(scene.ioas) is None
    assert scene.replace(scene.nested) == "ENOENT"


def test_faults(scene):
    made = scene.env.call(scene.fd, "IOMMU_FAULT_QUEUE_ALLOC")
    queue, number = scene.env.owned(made.out_fault_fd), made.out_fault_id
    iopf = scene.hwpt(flags=FAULT, fault_id=number)
    assert scene.replace(iopf) == "ENOENT"
    scene.vdevice()
    assert scene.replace(iopf) is None
    assert scene.destroy(iopf) == "EBUSY"
    fields = {"dev_id": scene.dev, "pasid": 1, "grpid": 2, "addr": 0xDEADBEAF}
    fields = {f"trigger_iopf__{key}": value for key, value in fields.items()}
    scene.env.test(scene.fd, IOMMU_TEST_OP_TRIGGER_IOPF, **fields)
    fault = uapi.iommu_hwpt_pgfault.from_buffer_copy(scene.env.read(queue, 40))
    assert (fault.dev_id, fault.pasid, fault.addr) == (scene.dev, 1, 0xDEADBEAF)
    assert scene.replace(scene.ioas) is None
    scene.env.close(queue)
    assert scene.destroy(number, iopf, number) == ["EBUSY", None, None]


# ---- caches

FULL = list(range(MOCK_DEV_CACHE_NUM))
ALL = IOMMU_TEST_INVALIDATE_FLAG_ALL
#: entries (flags, virtual number, cache) -> (answer, how many were done), which are still full
BATCHES = [
    ([], (None, 0), FULL),
    ([(0, 0x99, 1)], (None, 1), [0, 2, 3]),
    ([(0, 0x99, 2), (0, 0x99, 3)], (None, 2), [0, 1]),
    ([(ALL, 0x99, 0)], (None, 1), []),
    ([(ALL, 0x99, 4)], ("EINVAL", 0), FULL),
    ([(ALL, 0x9, 0)], ("EINVAL", 0), FULL),
    ([(0, 0x99, 4)], ("EINVAL", 0), FULL),
    ([(0, 0x9, 0)], ("EINVAL", 0), FULL),
    ([(0xFFFFFFFF, 0x99, 0)], ("EOPNOTSUPP", 0), FULL),
    ([(2, 0x9, 9)], ("EOPNOTSUPP", 0), FULL),
    ([(0, 0x99, 0), (0xFFFFFFFF, 0x99, 1)], ("EOPNOTSUPP", 1), [1, 2, 3]),
    ([(0, 0x99, 0), (0, 0x99, 4), (0, 0x99, 1)], ("EINVAL", 1), [1, 2, 3]),
    ([(0, 0x99, 0), (0, 0x99, 1), (0, 0x9, 2)], ("EINVAL", 2), [2, 3]),
    ([(0, 0x99, 0)] * 40, (None, 40), [1, 2, 3]),
]


@pytest.mark.parametrize(("entries", "answer", "left"), BATCHES, ids=str)
def test_invalidate(scene, entries, answer, left):
    _, _, dev = scene.env.mock(scene.fd, scene.ioas)
    scene.vdevice(0x99)
    scene.vdevice(0x98, dev=dev)
    assert scene.invalidate(*entries) == answer
    assert (scene.caches(), scene.caches(dev)) == (left, FULL)


#: fields, of one entry for the number 0 -> (errno, how many were done)
WRONG = [
    ({"data_type": 0xDADBEEF}, ("EINVAL", 0)),
    ({"data_type": 0xDADBEEF, "entry_num": 0}, ("EINVAL", 0)),
    ({"data_type": 0xDADBEEF, "data_uptr": 8}, ("EINVAL", 0)),
    ({"entry_len": 13}, (None, 1)),
    ({"entry_len": 16}, (None, 1)),
    ({"entry_len": 11}, (None, 1)),
    ({"entry_len": 1}, (None, 1)),
    ({"entry_len": 0}, ("EINVAL", 0)),
    ({"entry_len": PAGE + 1}, ("EINVAL", 0)),
    ({"entry_num": (1 << 19) + 1}, ("EINVAL", 0)),
    ({"data_uptr": 0}, ("EINVAL", 0)),
    ({"data_uptr": 8}, ("EFAULT", 0)),
    ({"data_uptr": 8, "entry_len": 16}, ("EFAULT", 0)),
    ({"entry_num": 0, "data_uptr": 0, "entry_len": 0}, (None, 0)),
    ({"__reserved": 1}, ("EOPNOTSUPP", 0)),
]


@pytest.mark.parametrize(("fields", "answer"), WRONG, ids=str)
def test_sizes_of_invalidations(scene, fields, answer):
    """A shorter entry is filled up with zeros, a longer one must have them."""
    scene.vdevice(0)
    fields = {"data_uptr": scene.names["buffer"], **fields}
    assert scene.invalidate((0, 0, 0), **fields) == answer
    assert scene.caches() == ([1, 2, 3] if answer[1] else FULL)


def test_a_longer_entry_with_something_behind(scene):
    scene.vdevice(0)
    at = scene.env.buffer(bytes(12) + b"\0\0\0\1" + bytes(16))
    assert scene.invalidate((0, 0, 0), data_uptr=at, entry_len=16) == ("E2BIG", 0)
    # entries are copied before the first is done
    assert scene.invalidate((0, 0, 0), data_uptr=at - 0, entry_len=15) == (None, 1)
    one = scene.env.buffer(bytes(16) + bytes(12) + b"\1\0\0\0")
    assert scene.invalidate((0, 0, 0), data_uptr=one, entry_len=16, entry_num=2) == ("E2BIG", 0)


def test_a_nested_hwpt_and_its_viommu_are_two(scene):
    scene.vdevice(0)
    assert scene.invalidate((0, 0, 0), viommu=scene.nested) == (
        "EINVAL",
        0,
    )  # the IOTLB's entries are shorter
    assert scene.caches() == FULL


# ---- events

QUEUE_ROWS = [
    ({}, 0),
    ({"veventq_depth": 1 << 19}, 0),
    ({"type": 1}, 0),
    ({"flags": 1}, "EOPNOTSUPP"),
    ({"__reserved": 1}, "EOPNOTSUPP"),
    ({"type": 0, "veventq_depth": 0}, "EOPNOTSUPP"),
    ({"veventq_depth": 0}, "EINVAL"),
    ({"veventq_depth": (1 << 19) + 1}, "EINVAL"),
    ({"veventq_depth": 0, "viommu_id": "absent"}, "EINVAL"),
    ({"viommu_id": "absent"}, "ENOENT"),
    ({"viommu_id": "nested"}, "ENOENT"),
]


@pytest.mark.parametrize(("fields", "answer"), QUEUE_ROWS, ids=str)
def test_alloc_queue(scene, fields, answer):
    wanted = scene.given({"viommu_id": "viommu", "type": EVENTS, "veventq_depth": 2, **fields})
    got = outcome(scene.env.call, scene.fd, "IOMMU_VEVENTQ_ALLOC", **wanted)
    assert (got if isinstance(got, str) else 0) == answer
    if isinstance(got, str):
        return
    fd = scene.env.owned(got.out_veventq_fd)
    assert got.out_veventq_id == scene.nested + 1
    assert outcome(scene.env.call, scene.fd, "IOMMU_VEVENTQ_ALLOC", **wanted) == "EEXIST"
    assert scene.destroy(got.out_veventq_id, scene.viommu) == ["EBUSY"] * 2
    scene.env.close(fd)
    assert scene.destroy(got.out_veventq_id) is None
    again = scene.env.call(scene.fd, "IOMMU_VEVENTQ_ALLOC", **wanted)
    assert scene.env.owned(again.out_veventq_fd) >= 0


def test_events_of_whom(scene):
    queue = scene.queue()
    assert [scene.trigger(dev=scene.names[name]) for name in ("absent", "ioas")] == ["ENOENT"] * 2
    assert scene.trigger() == "ENOENT"
    scene.vdevice()
    assert scene.trigger() == "ENOENT"  # not attached
    assert scene.replace(scene.nested) is None
    assert scene.trigger() is None
    assert queue.read() == [(0, 0x99)]
    assert scene.replace(scene.parent) is None
    assert scene.trigger() == "ENOENT"
    assert queue.read() == []


def test_events_without_a_queue(scene):
    scene.vdevice()
    scene.replace(scene.nested)
    assert scene.trigger() == "EOPNOTSUPP"
    queue = scene.queue()
    assert scene.trigger() is None
    scene.env.close(queue.fd)
    assert scene.trigger() is None  # nobody reads, and that is all
    assert scene.destroy(queue.id) is None
    assert scene.trigger() == "EOPNOTSUPP"
    assert scene.queue().read() == []


@pytest.mark.parametrize(
    ("virt_id", "said"), [(0, None), (1 << 32, 0), ((1 << 32) + 7, 7), (ULONG_MAX, (1 << 32) - 1)]
)
def test_numbers_in_events(scene, virt_id, said):
    """The mock driver does not tell of device 0, and says 32 bits of the others."""
    queue = scene.queue()
    scene.vdevice(virt_id)
    scene.replace(scene.nested)
    assert scene.trigger() == ("ENOENT" if said is None else None)
    assert queue.read() == ([] if said is None else [(0, said)])


def test_a_new_number(scene):
    """It is looked up when a device gets to another vIOMMU."""
    queue = scene.queue()
    vdevice = scene.vdevice(0x99)
    scene.replace(scene.nested)
    scene.destroy(vdevice)
    scene.vdevice(0x88)
    scene.trigger()
    scene.replace(scene.hwpt())
    scene.trigger()
    assert queue.read() == [(0, 0x99), (1, 0x99)]
    scene.replace(scene.ioas)
    scene.replace(scene.nested)
    scene.trigger()
    assert queue.read() == [(2, 0x88)]


#: depth of the queue, and what happens: a number of events, or a read of so many bytes with what it gives
READS = [
    (2, [("read", 0, "EINVAL"), ("read", 7, "EINVAL"), ("read", 8, []), ("read", 11, [])]),
    (2, [1, ("read", 0, "EINVAL"), ("read", 7, "EINVAL"), ("read", 8, "EINVAL"), ("read", 11, "EINVAL"),
         ("read", 12, [(0, 1)]), ("read", 12, [])]),
    (4, [4, ("read", 12, [(0, 1)]), ("read", 35, [(1, 1), (2, 1)]), ("read", 36, [(3, 1)])]),
    # one is lost
    (2, [3, ("read", 36, [(0, 1), (1, 1), (2, "lost")]), ("read", 36, [])]),
    (2, [3, ("read", 24, [(0, 1), (1, 1)]), ("read", 8, [(2, "lost")]), ("read", 8, [])]),
    (2, [3, ("read", 31, [(0, 1), (1, 1)]), ("read", 36, [(2, "lost")])]),
    (2, [3, ("read", 32, [(0, 1), (1, 1), (2, "lost")]), 1, ("read", 36, [(3, 1)])]),
    # the last loss is what is said
    (2, [5, ("read", 36, [(0, 1), (1, 1), (4, "lost")])]),
    # and not even that where another event tells it by its number
    (2, [4, ("read", 12, [(0, 1)]), 1, ("read", 36, [(1, 1), (4, 1)])]),
    (2, [3, ("read", 24, [(0, 1), (1, 1)]), 1, ("read", 36, [(3, 1)])]),
    (2, [3, ("read", 24, [(0, 1), (1, 1)]), 3, ("read", 36, [(3, 1), (4, 1), (5, "lost")])]),
    (1, [2, ("read", 12, [(0, 1)]), ("read", 12, [(1, "lost")]), 1, ("read", 12, [(2, 1)])]),
    (1, [9, ("read", 20, [(0, 1), (8, "lost")]), ("read", 20, [])]),
]  # fmt: skip


@pytest.mark.parametrize(("depth", "steps"), READS, ids=str)
def test_reads(scene, depth, steps):
    queue = scene.queue(depth)
    scene.vdevice(1)
    scene.replace(scene.nested)
    for step in steps:
        if isinstance(step, int):
            assert scene.trigger(step) is None
        else:
            assert queue.read(step[1]) == step[2]


def test_poll_and_write(scene):
    queue, env = scene.queue(1), scene.env
    poll = lambda: env.poll(queue.fd)  # noqa: E731
    scene.vdevice(1)
    scene.replace(scene.nested)
    assert poll() == (False, False)
    scene.trigger(2)
    assert poll() == (True, False)
    assert queue.read(12) == [(0, 1)]
    assert poll() == (True, False)  # one was lost
    assert queue.read(12) == [(1, "lost")]
    assert poll() == (False, False)
    assert [outcome(env.write, queue.fd, data) for data in (b"", bytes(8))] == ["EINVAL"] * 2
    for call, *args in ((env.t.pread, ONE, 0), (env.t.pwrite, bytes(8), 0), (env.t.lseek, 0, os.SEEK_SET)):
        assert outcome(env.sys, call, queue.fd, *args) == "ESPIPE"


def test_two_devices_one_queue(scene):
    queue = scene.queue(4)
    stdev, _, dev = scene.env.mock(scene.fd, scene.ioas)
    scene.vdevice(1)
    scene.vdevice(2, dev=dev)
    scene.replace(scene.nested)
    scene.env.mock_replace(scene.fd, stdev, scene.nested)
    scene.trigger()
    scene.trigger(dev=dev)
    scene.trigger()
    assert queue.read() == [(0, 1), (1, 2), (2, 1)]


def test_by_the_client_library(scene):
    with Iommufd(scene.env.t, scene.env.t.open("/dev/iommu")) as iommufd:
        env, ioas = scene.env, iommufd.ioas_alloc()
        stdev, _, dev = env.mock(iommufd.fd, ioas.id)
        parent = iommufd.hwpt_alloc(dev, ioas.id, NEST)
        data = bytearray(iommu_viommu_selftest(in_data=77))
        viommu = Viommu(iommufd, dev, parent, TYPE, data)
        assert iommu_viommu_selftest.from_buffer_copy(data).out_data == 77
        nested = iommufd.hwpt_alloc(dev, viommu.id, data_type=IOMMU_HWPT_DATA_SELFTEST, data=DATA)
        vdevice = viommu.vdevice(dev, 5)
        env.mock_replace(iommufd.fd, stdev, nested)
        with EventQueue(viommu, EVENTS, 2) as queue:
            assert (queue.ready(), queue.read(4)) == (False, [])
            for _ in range(3):
                env.test(iommufd.fd, IOMMU_TEST_OP_TRIGGER_VEVENT, trigger_vevent__dev_id=dev)
            assert queue.ready()
            five = (5).to_bytes(4, "little")
            assert queue.read(4, 3) == [Event(0, five), Event(1, five), Event(2, None)]
        entries = [bytes(iommu_viommu_invalidate_selftest(0, 5, n)) for n in range(2)]
        assert invalidate(iommufd, viommu.id, IOMMU_VIOMMU_INVALIDATE_DATA_SELFTEST, entries) == 2
        entries.insert(1, bytes(iommu_viommu_invalidate_selftest(0, 6, 0)))
        with pytest.raises(InvalidationRefused) as refused:
            invalidate(iommufd, viommu.id, IOMMU_VIOMMU_INVALIDATE_DATA_SELFTEST, entries)
        assert (refused.value.errno_name, refused.value.done) == ("EINVAL", 1)
        with pytest.raises(IommufdError):
            viommu.destroy()
        env.mock_replace(iommufd.fd, stdev, ioas.id)
        for number in (vdevice, nested, queue.id, viommu.id, parent):
            iommufd.destroy(number)
