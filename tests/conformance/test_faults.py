# SPDX-License-Identifier: Apache-2.0
"""Fault queues with mock devices, whose page requests IOMMU_TEST_CMD makes.

(The fault parts of alloc_hwpt_nested and pasid_attach in the kernel's selftest.)
"""

import ctypes
import errno
import os
import select

import pytest
from conf_env import FAULT, FOR_PASIDS, PAGE, outcome, uapi
from conf_marks import KINDS, MACHINE, needs_mock
from conf_rows import ABSENT
from conf_scene import Scene
from conf_selftest import (
    IOMMU_TEST_OP_PASID_ATTACH,
    IOMMU_TEST_OP_PASID_DETACH,
    IOMMU_TEST_OP_PASID_REPLACE,
    IOMMU_TEST_OP_TRIGGER_IOPF,
    MOCK_FLAGS_DEVICE_NO_DIRTY,
    MOCK_FLAGS_DEVICE_PASID,
    iommu_hwpt_selftest,
)

from iokeep.iommufd.client import Iommufd
from iokeep.iommufd.viommu import FaultQueue

pytestmark = needs_mock
ONE = ctypes.sizeof(uapi.iommu_hwpt_pgfault)
OK, INVALID = uapi.IOMMUFD_PAGE_RESP_SUCCESS, uapi.IOMMUFD_PAGE_RESP_INVALID
LAST, WITH_PASID = uapi.IOMMU_PGFAULT_FLAGS_LAST_PAGE, uapi.IOMMU_PGFAULT_FLAGS_PASID_VALID
RW = uapi.IOMMU_PGFAULT_PERM_READ | uapi.IOMMU_PGFAULT_PERM_WRITE


class Queue:
    """A fault queue: ``id``, ``fd``."""

    def __init__(self, env, iommufd):
        self.env = env
        made = env.call(iommufd, "IOMMU_FAULT_QUEUE_ALLOC")
        self.id, self.fd = made.out_fault_id, env.owned(made.out_fault_fd)

    def read(self, most=8):
        """Faults that are there, or the errno's name."""
        raw = outcome(self.env.read, self.fd, most * ONE)
        if isinstance(raw, str):
            return raw
        assert len(raw) % ONE == 0
        return [uapi.iommu_hwpt_pgfault.from_buffer_copy(raw, at) for at in range(0, len(raw), ONE)]

    def addresses(self, most=8):
        """Where the faults are that are there."""
        found = self.read(most)
        return found if isinstance(found, str) else [fault.addr for fault in found]

    def answer(self, *answers):
        """(cookie, code): how many were taken, or the errno's name."""
        data = b"".join(bytes(uapi.iommu_hwpt_page_response(*each)) for each in answers)
        done = outcome(self.env.write, self.fd, data)
        return done if isinstance(done, str) else done // 8


class Faults(Scene):
    """A device with PASIDs on "paging", an HWPT whose faults go to a queue."""

    def __init__(self, env):
        super().__init__(env, MOCK_FLAGS_DEVICE_NO_DIRTY | MOCK_FLAGS_DEVICE_PASID)
        self.queue = Queue(env, self.fd)
        self.paging = self.hwpt(self.ioas)
        self.nested = self.hwpt(self.parent, data=bytes(iommu_hwpt_selftest()))
        self.replace(self.paging)

    def hwpt(self, pt, data=b"", queue=None):
        fault = (queue or self.queue).id
        return self.env.hwpt(self.fd, self.dev, pt, FAULT | FOR_PASIDS, data, fault_id=fault)

    def replace(self, pt):
        """None of these is refused."""
        assert super().replace(pt) is None

    def pasid(self, op, pasid, pt=0):
        self.env.pasid(self.fd, op, self.stdev, pasid, pt)

    def trigger(self, addr, pasid=0, dev=None, grpid=2, perm=RW):
        fields = {"dev_id": dev or self.dev, "pasid": pasid, "grpid": grpid, "perm": perm, "addr": addr}
        fields = {f"trigger_iopf__{key}": given for key, given in fields.items()}
        answer = outcome(self.env.test, self.fd, IOMMU_TEST_OP_TRIGGER_IOPF, **fields)
        return answer if isinstance(answer, str) else None


@pytest.fixture
def scene(env):
    return Faults(env)


def test_a_fault_is_read_and_answered(scene):
    assert scene.trigger(0xDEADBEAF) is None
    (fault,) = scene.queue.read()
    named = {name: getattr(fault, name) for name, _ in fault._fields_}
    assert named == {
        "flags": LAST, "dev_id": scene.dev, "pasid": 0, "grpid": 2, "perm": RW, "__reserved": 0,
        "addr": 0xDEADBEAF, "length": 0, "cookie": 1,
    }  # fmt: skip
    assert scene.queue.read() == []
    assert scene.queue.answer((1, OK)) == 1
    assert scene.queue.answer((1, OK)) == "EINVAL"


def test_by_the_client_library(scene):
    with Iommufd(scene.env.t, scene.env.t.open("/dev/iommu")) as iommufd, FaultQueue(iommufd) as queue:
        env, fd = scene.env, iommufd.fd
        ioas = iommufd.ioas_alloc()
        stdev, _, dev = env.mock(fd, ioas.id)
        env.mock_replace(fd, stdev, iommufd.hwpt_alloc(dev, ioas.id, flags=FAULT, fault_id=queue.id))
        assert (queue.ready(), queue.read()) == (False, [])
        for addr in range(3):
            env.test(fd, IOMMU_TEST_OP_TRIGGER_IOPF, trigger_iopf__dev_id=dev, trigger_iopf__addr=addr)
        assert queue.ready()
        assert [(fault.addr, fault.cookie) for fault in queue.read(2)] == [(0, 1), (1, 2)]
        assert queue.respond((2, OK), (3, OK), (1, OK)) == 1
        with pytest.raises(OSError) as refused:
            queue.respond((3, OK))
        assert refused.value.errno == errno.EINVAL


def test_fields_go_through(scene):
    scene.trigger((1 << 64) - 1, grpid=(1 << 32) - 1, perm=0xFFFF)
    (fault,) = scene.queue.read()
    assert (fault.addr, fault.grpid, fault.perm) == ((1 << 64) - 1, (1 << 32) - 1, 0xFFFF)


def test_who_is_asked(scene):
    assert [scene.trigger(0, dev=each) for each in (ABSENT, scene.ioas, scene.stdev)] == ["ENOENT"] * 3
    if "vfio" in KINDS:
        device = scene.env.open(MACHINE.vfio[0])
        bind = {"argsz": 16, "iommufd": scene.fd}
        assert scene.trigger(0, dev=scene.env.call(device, "VFIO_DEVICE_BIND_IOMMUFD", **bind).out_devid) == (
            "EINVAL"
        )


def test_sizes_of_reads(scene):
    queue, env = scene.queue, scene.env
    for length in (1, ONE - 1, ONE + 1, 8):
        assert outcome(env.read, queue.fd, length) == "ESPIPE"
    assert [env.read(queue.fd, length) for length in (0, ONE)] == [b"", b""]
    for addr in range(5):
        scene.trigger(addr)
    assert [outcome(env.read, queue.fd, length) for length in (0, 1)] == ["EINVAL", "ESPIPE"]
    assert [queue.addresses(n) for n in (1, 2, 4, 4)] == [[0], [1, 2], [3, 4], []]


def test_sizes_of_answers(scene):
    queue, env = scene.queue, scene.env
    scene.trigger(0)
    queue.read()
    for length in (1, 7, 9):
        assert outcome(env.write, queue.fd, bytes(length)) == "ESPIPE"
    assert outcome(env.write, queue.fd, b"") == 0
    assert queue.answer((1, INVALID)) == 1


#: answers to faults 1, 2 and 3 -> what the write says, and the cookies that are left
ANSWERS = [
    ([(1, OK)], 1, [2, 3]),
    ([(3, OK), (1, INVALID), (2, OK)], 3, []),
    ([(1, OK), (1, OK), (2, OK)], 1, [2, 3]),
    ([(1, OK), (2, 2), (3, OK)], 1, [2, 3]),
    ([(1, 2)], "EINVAL", [1, 2, 3]),
    ([(0, OK)], "EINVAL", [1, 2, 3]),
    ([(4, OK), (1, OK)], "EINVAL", [1, 2, 3]),
    ([(4, 9)], "EINVAL", [1, 2, 3]),
]


@pytest.mark.parametrize(("answers", "done", "left"), ANSWERS, ids=str)
def test_answers(scene, answers, done, left):
    for addr in range(3):
        scene.trigger(addr)
    assert [fault.cookie for fault in scene.queue.read()] == [1, 2, 3]
    assert scene.queue.answer(*answers) == done
    assert [n for n in range(6) if scene.queue.answer((n, OK)) == 1] == left


def test_cookies_are_used_again(scene):
    for addr in range(4):
        scene.trigger(addr)
    assert [fault.cookie for fault in scene.queue.read(3)] == [1, 2, 3]
    assert scene.queue.answer((2, OK)) == 1
    scene.trigger(9)
    assert [(fault.addr, fault.cookie) for fault in scene.queue.read()] == [(3, 2), (9, 4)]


def test_poll(scene):
    poll = lambda: scene.env.poll(scene.queue.fd)  # noqa: E731
    assert poll() == (False, True)
    scene.trigger(0)
    scene.trigger(1)
    assert poll() == (True, True)
    scene.queue.read(1)
    assert poll() == (True, True)
    scene.queue.read(1)
    assert poll() == (False, True)


def test_a_queue_has_no_position(scene):
    t, fd = scene.env.t, scene.queue.fd
    for call, *args in ((t.pread, ONE, 0), (t.pwrite, bytes(8), 0), (t.lseek, 0, os.SEEK_SET)):
        assert outcome(scene.env.sys, call, fd, *args) == "ESPIPE"


def test_poll_of_other_files(scene):
    """/dev/iommu has no poll of its own; a closed descriptor is said to be none."""
    assert scene.env.poll(scene.fd) == (True, True)
    memfd = scene.env.memfd(PAGE)
    assert scene.env.poll(memfd) == (True, True)
    assert scene.env.t.poll(0x3FF0, select.POLLIN) == select.POLLNVAL


def test_read_and_write_of_other_files(scene):
    env = scene.env
    memfd = env.memfd(PAGE)
    assert [env.write(memfd, b"abc"), env.write(memfd, b"de")] == [3, 2]
    assert env.read(memfd, 4) == bytes(4)  # it goes on where the writes have ended
    env.t.lseek(memfd, 1, os.SEEK_SET)
    assert [env.read(memfd, 3), env.read(memfd, 3)] == [b"bcd", b"e\0\0"]
    assert [outcome(env.read, scene.fd, 8), outcome(env.write, scene.fd, b"x")] == ["EINVAL", "EINVAL"]
    assert [outcome(env.read, 0x3FF0, 8), outcome(env.write, 0x3FF0, b"x")] == ["EBADF", "EBADF"]


def test_the_order_of_destruction(scene):
    queue = scene.queue
    assert scene.destroy(queue.id) == "EBUSY"
    scene.env.close(queue.fd)
    assert scene.destroy(queue.id) == "EBUSY"
    scene.replace(scene.ioas)
    assert [scene.destroy(each) for each in (scene.paging, queue.id, scene.nested)] == [None, "EBUSY", None]
    assert scene.destroy(queue.id) is None


def test_a_queue_that_nobody_reads_takes_faults(scene):
    scene.env.close(scene.queue.fd)
    assert scene.trigger(0) is None


def test_a_replace_answers_what_was_open(scene):
    """Read or not, faults of the attachment that ends are answered by the kernel."""
    for addr in range(3):
        scene.trigger(addr)
    assert len(scene.queue.read(1)) == 1
    scene.replace(scene.nested)
    assert scene.queue.addresses() == []
    assert scene.queue.answer((1, OK)) == "EINVAL"
    scene.trigger(7)
    assert scene.queue.addresses() == [7]


def test_a_detach_answers_what_was_open(scene):
    scene.trigger(0)
    assert scene.destroy(scene.stdev) is None
    assert scene.queue.addresses() == []
    assert scene.destroy(scene.paging) is None


def test_a_replace_by_the_same_answers_nothing(scene):
    scene.trigger(1)
    scene.replace(scene.paging)
    assert scene.queue.addresses() == [1]


@pytest.mark.parametrize("name", ["ioas", "parent"])
def test_where_nobody_handles_them(scene, name):
    scene.replace(getattr(scene, name))
    assert scene.trigger(0) is None
    assert scene.queue.read() == []


def test_two_devices_two_queues(scene):
    env, fd = scene.env, scene.fd
    other = Queue(env, fd)
    stdev, _, dev = env.mock(fd, scene.paging)
    hwpt = scene.hwpt(scene.ioas, queue=other)
    scene.trigger(1)
    scene.trigger(2, dev=dev)
    assert [(fault.addr, fault.dev_id) for fault in scene.queue.read()] == [(1, scene.dev), (2, dev)]
    scene.replace(hwpt)  # takes the first device's fault along, not the second's
    assert [scene.queue.answer((n, OK)) for n in (1, 2)] == ["EINVAL", 1]
    scene.trigger(3)
    scene.trigger(4, dev=dev)
    assert [other.addresses(), scene.queue.addresses()] == [[3], [4]]
    assert scene.destroy(stdev) is None


def test_faults_of_a_pasid(scene):
    scene.replace(scene.paging)
    scene.pasid(IOMMU_TEST_OP_PASID_ATTACH, 100, scene.nested)
    scene.trigger(1, pasid=100)
    (fault,) = scene.queue.read()
    assert (fault.pasid, fault.flags, fault.addr) == (100, LAST | WITH_PASID, 1)
    assert scene.queue.answer((fault.cookie, OK)) == 1
    scene.trigger(2, pasid=100)
    scene.trigger(3)
    scene.pasid(IOMMU_TEST_OP_PASID_REPLACE, 100, scene.paging)
    assert scene.queue.addresses() == [3]
    scene.trigger(4, pasid=100)
    scene.pasid(IOMMU_TEST_OP_PASID_DETACH, 100)
    assert scene.queue.addresses() == []


def test_faults_of_a_pasid_that_is_not_attached(scene):
    """With a guest's PASID table they go to the nested HWPT of the device, else nowhere."""
    scene.trigger(1, pasid=5)
    assert scene.queue.read() == []
    scene.replace(scene.nested)
    scene.trigger(2, pasid=5)
    (fault,) = scene.queue.read()
    assert (fault.pasid, fault.addr, fault.flags) == (5, 2, LAST | WITH_PASID)
    scene.pasid(IOMMU_TEST_OP_PASID_ATTACH, 5, scene.paging)  # it does not take the other's faults along
    scene.trigger(3, pasid=5)
    scene.pasid(IOMMU_TEST_OP_PASID_DETACH, 5)
    assert scene.queue.addresses() == []
    assert scene.queue.answer((fault.cookie, OK)) == 1


def test_a_pasid_without_a_queue(scene):
    """What a PASID is attached to takes its faults, also where it handles none."""
    scene.replace(scene.nested)
    plain = scene.env.hwpt(scene.fd, scene.dev, scene.ioas, FOR_PASIDS)
    scene.pasid(IOMMU_TEST_OP_PASID_ATTACH, 5, plain)
    scene.trigger(1, pasid=5)
    assert scene.queue.read() == []
    scene.pasid(IOMMU_TEST_OP_PASID_DETACH, 5)
