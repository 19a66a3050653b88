# SPDX-License-Identifier: Apache-2.0
"""VFIO device files: bind, attach, replace, detach, and what they refuse (drivers/vfio/device_cdev.c)."""

import ctypes

import pytest
from conf_env import FAULT, FIXED, FOR_PASIDS, PAGE, RW, Extended, outcome, vfio
from conf_marks import MACHINE, needs_vfio
from conf_rows import ABSENT, BASE

pytestmark = needs_vfio
MSI_WINDOW = 0xFEE00000


def bind(env, fd, iommufd, /, **fields):
    fields = {"argsz": 16, "iommufd": iommufd, **fields}
    return outcome(env.call, fd, "VFIO_DEVICE_BIND_IOMMUFD", **fields)


def attach(env, fd, pt, /, **fields):
    found = outcome(env.call, fd, "VFIO_DEVICE_ATTACH_IOMMUFD_PT", **{"argsz": 12, "pt_id": pt, **fields})
    return found if isinstance(found, str) else found.pt_id


def detach(env, fd, **fields):
    found = outcome(env.call, fd, "VFIO_DEVICE_DETACH_IOMMUFD_PT", **{"argsz": 8, **fields})
    return found if isinstance(found, str) else 0


def bound(env):
    """(device file, iommufd, device id)"""
    iommufd = env.iommu()
    fd = env.open(MACHINE.vfio[0])
    return fd, iommufd, bind(env, fd, iommufd).out_devid


BIND = [
    ({"argsz": 0}, "EINVAL"),
    ({"argsz": 15}, "EINVAL"),
    ({"flags": 2}, "EINVAL"),
    ({"flags": 2, "iommufd": -1}, "EINVAL"),
    ({"iommufd": -1}, "EINVAL"),
    ({"iommufd": 0x3FF0}, "EBADF"),
    ({"iommufd": "memfd"}, "EBADFD"),
    # not a virtual function: a token is refused before the iommufd is looked at
    ({"argsz": 24, "flags": vfio.VFIO_DEVICE_BIND_FLAG_TOKEN, "token_uuid_ptr": 8}, "EFAULT"),
    ({"argsz": 24, "flags": 1, "token_uuid_ptr": 8, "iommufd": 0x3FF0}, "EFAULT"),
    ({"argsz": 24, "flags": 1, "token_uuid_ptr": "buffer"}, "EINVAL"),
    ({"argsz": 24, "flags": 1, "token_uuid_ptr": "buffer", "iommufd": 0x3FF0}, "EINVAL"),
]


@pytest.mark.parametrize(("fields", "answer"), BIND)
def test_bind_refuses(env, fields, answer):
    names = {"memfd": env.memfd(PAGE), "buffer": env.buffer(16)}
    fields = {key: names.get(given, given) for key, given in fields.items()}
    fd = env.open(MACHINE.vfio[0])
    assert bind(env, fd, env.iommu(), **fields) == answer
    # and it can be bound afterwards
    assert not isinstance(bind(env, fd, env.iommu()), str)


def test_bind_tail(env):
    iommufd, fd = env.iommu(), env.open(MACHINE.vfio[0])
    struct = vfio.vfio_device_bind_iommufd
    size = ctypes.sizeof(struct)
    longer = Extended.of(struct, {"argsz": size + 8, "iommufd": iommufd}, 1)
    assert outcome(env.ioctl, fd, vfio.VFIO_DEVICE_BIND_IOMMUFD, longer) == "E2BIG"
    zeros = Extended.of(struct, {"argsz": size + 8, "iommufd": iommufd}, 0)
    assert not isinstance(outcome(env.ioctl, fd, vfio.VFIO_DEVICE_BIND_IOMMUFD, zeros), str)


def test_bind_twice(env):
    fd, iommufd, _ = bound(env)
    assert bind(env, fd, iommufd) == "EINVAL"
    assert bind(env, fd, -1) == "EINVAL"
    other = env.open(MACHINE.vfio[0])
    assert bind(env, other, iommufd) == "EINVAL"
    assert bind(env, other, 0x3FF0) == "EBADF"
    env.close(fd)
    assert not isinstance(bind(env, other, iommufd), str)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("VFIO_DEVICE_ATTACH_IOMMUFD_PT", {"argsz": 12, "pt_id": 1}),
        ("VFIO_DEVICE_DETACH_IOMMUFD_PT", {"argsz": 8}),
        ("VFIO_DEVICE_GET_INFO", {}),
        ("VFIO_DEVICE_GET_REGION_INFO", {}),
    ],
)
def test_nothing_before_bind(env, name, fields):
    assert outcome(env.call, env.open(MACHINE.vfio[0]), name, **fields) == "EINVAL"


def test_ids_are_the_lowest_free_ones(env):
    fd, iommufd, dev = bound(env)
    assert dev == 1
    ioas = env.ioas(iommufd)
    assert (ioas, attach(env, fd, ioas)) == (2, 3)
    assert env.hwpt(iommufd, dev, ioas) == 4
    assert detach(env, fd) == 0
    assert env.ioas(iommufd) == 3  # the automatic HWPT went with its device


def test_attach_refuses(env):
    fd, iommufd, dev = bound(env)
    ioas = env.ioas(iommufd)
    assert attach(env, fd, ioas, argsz=11) == "EINVAL"
    assert attach(env, fd, ioas, flags=2) == "EINVAL"
    assert attach(env, fd, ABSENT) == "ENOENT"
    assert attach(env, fd, dev) == "EINVAL"
    assert detach(env, fd, argsz=7) == "EINVAL"
    assert detach(env, fd, flags=2) == "EINVAL"
    # what is behind the first version of these two is not looked at
    longer = Extended.of(vfio.vfio_device_attach_iommufd_pt, {"argsz": 24, "pt_id": ioas}, ABSENT)
    assert not isinstance(outcome(env.ioctl, fd, vfio.VFIO_DEVICE_ATTACH_IOMMUFD_PT, longer), str)


def test_attach_replace_detach(env):
    fd, iommufd, dev = bound(env)
    first, second = env.ioas(iommufd), env.ioas(iommufd)
    auto = attach(env, fd, first)
    assert attach(env, fd, first) == auto
    assert outcome(env.destroy, iommufd, auto) == "EBUSY"
    assert outcome(env.destroy, iommufd, first) == "EBUSY"
    own = env.hwpt(iommufd, dev, second)
    assert outcome(env.destroy, iommufd, second) == "EBUSY"
    assert attach(env, fd, own) == own
    assert outcome(env.destroy, iommufd, auto) == "ENOENT"  # went with its last device
    assert outcome(env.destroy, iommufd, first) is None
    assert outcome(env.destroy, iommufd, own) == "EBUSY"
    assert detach(env, fd) == 0
    assert detach(env, fd) == 0
    assert outcome(env.destroy, iommufd, own) is None
    assert outcome(env.destroy, iommufd, dev) == "EBUSY"


def test_a_device_brings_its_ranges(env):
    fd, iommufd, _ = bound(env)
    ioas, memfd = env.ioas(iommufd), env.memfd(16 * PAGE)
    assert env.ranges(iommufd, ioas) == ([(0, (1 << 64) - 1)], 1)
    attach(env, fd, ioas)
    ranges, alignment = env.ranges(iommufd, ioas)
    assert alignment == PAGE
    assert not any(start <= MSI_WINDOW <= last for start, last in ranges)
    assert any(start <= BASE <= last for start, last in ranges)
    for iova in (MSI_WINDOW - PAGE, MSI_WINDOW, MSI_WINDOW + 0xFF000):
        assert outcome(env.map_file, iommufd, ioas, memfd, 0, 2 * PAGE, iova) == "EINVAL"
    assert env.map_file(iommufd, ioas, memfd, 0, PAGE, MSI_WINDOW - PAGE) == MSI_WINDOW - PAGE
    assert env.map_file(iommufd, ioas, memfd, 0, PAGE, MSI_WINDOW + (1 << 20)) == MSI_WINDOW + (1 << 20)
    detach(env, fd)
    assert env.ranges(iommufd, ioas) == ([(0, (1 << 64) - 1)], 1)


@pytest.mark.parametrize("iova", [MSI_WINDOW, MSI_WINDOW - PAGE])
def test_attach_to_an_ioas_with_the_msi_window_in_use(env, iova):
    fd, iommufd, _ = bound(env)
    ioas = env.ioas(iommufd)
    env.map_file(iommufd, ioas, env.memfd(16 * PAGE), 0, 2 * PAGE, iova)
    assert attach(env, fd, ioas) == "EADDRINUSE"
    assert env.unmap(iommufd, ioas) == 2 * PAGE
    assert not isinstance(attach(env, fd, ioas), str)


def test_attach_to_an_ioas_that_cannot_be_shown(env):
    fd, iommufd, _ = bound(env)
    memfd = env.memfd(4 * PAGE)
    past, odd, nothing = env.ioas(iommufd), env.ioas(iommufd), env.ioas(iommufd)
    env.map_file(iommufd, past, memfd, 0, 8 * PAGE, BASE)
    assert attach(env, fd, past) == "EINVAL"
    env.map_file(iommufd, odd, memfd, 0, PAGE, BASE + 512)
    assert attach(env, fd, odd) == "EADDRINUSE"
    env.map(iommufd, nothing, 0x1000, PAGE, BASE)
    assert attach(env, fd, nothing) == "EFAULT"
    allowed = env.ioas(iommufd)
    env.allow(iommufd, allowed, [(MSI_WINDOW, MSI_WINDOW + PAGE - 1)])
    assert attach(env, fd, allowed) == "EADDRINUSE"
    assert detach(env, fd) == 0


#: (steps, answers): "own" is an HWPT made for PASIDs, "plain" one that is not. PASID 0 is the device itself,
#: and to VFIO another attachment of it; edu has no PASIDs, and the kernel notes the attachment all the same
PASIDS = [
    ([("own", 5)], ["own"]),
    ([("own", 5), ("own", 5), ("detach", 5), ("detach", 5)], ["own", "own", 0, 0]),
    ([("own", 1 << 20)], ["own"]),
    ([("own", 1 << 31)], ["ENOSPC"]),
    ([("plain", 5)], ["EINVAL"]),
    ([("ioas", 5)], ["EINVAL"]),
    ([("absent", 5), ("device", 5)], ["ENOENT", "EINVAL"]),
    ([("own", None), ("own", 5), ("detach", 5), ("detach", None)], ["own", "own", 0, 0]),
    ([("plain", None), ("own", 5)], ["plain", "EINVAL"]),
    ([("own", 5), ("plain", None), ("detach", 5), ("plain", None)], ["own", "EINVAL", 0, "plain"]),
    ([("own", 5), ("ioas", None)], ["own", "EINVAL"]),
    ([("plain", 0), ("own", 0), ("detach", 0)], ["plain", "own", 0]),
    ([("plain", 0), ("plain", None), ("detach", None), ("destroy", "plain")], ["plain", "EBUSY", 0, "EBUSY"]),
    ([("plain", None), ("plain", 0), ("absent", 0)], ["plain", "EBUSY", "ENOENT"]),
    ([("own", 5), ("destroy", "own"), ("detach", 5), ("destroy", "own")], ["own", "EBUSY", 0, None]),
]


@pytest.mark.parametrize(("steps", "answers"), PASIDS)
def test_pasids(env, steps, answers):
    fd, iommufd, dev = bound(env)
    ioas = env.ioas(iommufd)
    names = {"ioas": ioas, "absent": ABSENT, "device": dev}
    made = outcome(env.hwpt, iommufd, dev, ioas, FOR_PASIDS)
    if MACHINE.iommu == "amd":  # its driver makes such an HWPT only for a device that has PASIDs
        assert made == "EOPNOTSUPP"
        return
    names["own"] = made
    names["plain"] = env.hwpt(iommufd, dev, ioas)
    got = []
    for what, pasid in steps:
        if what == "destroy":
            got.append(outcome(env.destroy, iommufd, names[pasid]))
        elif what == "detach":
            got.append(detach(env, fd) if pasid is None else detach(env, fd, argsz=12, flags=1, pasid=pasid))
        elif pasid is None:
            got.append(attach(env, fd, names[what]))
        else:
            got.append(attach(env, fd, names[what], argsz=16, flags=1, pasid=pasid))
    assert got == [names.get(answer, answer) if isinstance(answer, str) else answer for answer in answers]


def test_pasids_need_their_field(env):
    fd, iommufd, _ = bound(env)
    assert attach(env, fd, env.ioas(iommufd), argsz=15, flags=1) == "EINVAL"
    assert detach(env, fd, argsz=11, flags=1) == "EINVAL"


def test_what_is_reserved_is_seen_before_faults(env):
    """An HWPT with a fault queue on an IOAS that has the MSI window in use: the window is seen first."""
    fd, iommufd, dev = bound(env)
    ioas = env.ioas(iommufd)
    env.map_file(iommufd, ioas, env.memfd(PAGE), 0, PAGE, MSI_WINDOW)
    queue = env.call(iommufd, "IOMMU_FAULT_QUEUE_ALLOC")
    env.owned(queue.out_fault_fd)
    fields = {"dev_id": dev, "pt_id": ioas, "flags": 4, "fault_id": queue.out_fault_id}
    made = env.call(iommufd, "IOMMU_HWPT_ALLOC", **fields).out_hwpt_id
    assert attach(env, fd, made) == "EADDRINUSE"
    env.destroy(iommufd, made)


def test_a_fault_queue_needs_pri(env):
    fd, iommufd, dev = bound(env)
    ioas = env.ioas(iommufd)
    queue = env.call(iommufd, "IOMMU_FAULT_QUEUE_ALLOC")
    env.owned(queue.out_fault_fd)
    made = env.call(
        iommufd, "IOMMU_HWPT_ALLOC", dev_id=dev, pt_id=ioas, flags=4, fault_id=queue.out_fault_id
    ).out_hwpt_id
    # AMD's driver turns no faults on, and so has nothing to refuse
    assert attach(env, fd, made) == (made if MACHINE.iommu == "amd" else "ENODEV")
    assert detach(env, fd) == 0
    env.destroy(iommufd, made)


@pytest.mark.skipif(MACHINE.iommu == "amd", reason="AMD's driver refuses no HWPT that it has made")
def test_a_move_that_is_refused_keeps_what_is_reserved(env):
    """A listed bug of Linux 7.3.4 (iommufd_device_do_replace, err_unresv): within one IOAS the device's
    reserved ranges are given back, though it stays; then the MSI window can be mapped.
    """
    fd, iommufd, dev = bound(env)
    ioas = env.ioas(iommufd)
    queue = env.call(iommufd, "IOMMU_FAULT_QUEUE_ALLOC")
    env.owned(queue.out_fault_fd)
    own = env.hwpt(iommufd, dev, ioas)
    bad = env.hwpt(iommufd, dev, ioas, FAULT, fault_id=queue.out_fault_id)
    assert [attach(env, fd, own), attach(env, fd, bad)] == [own, "ENODEV"]
    mapped = outcome(env.map_file, iommufd, ioas, env.memfd(PAGE), 0, PAGE, MSI_WINDOW)
    assert mapped == (MSI_WINDOW if MACHINE.name == "kernel" else "EINVAL")
    # within two it keeps them
    other = env.ioas(iommufd)
    bad = env.hwpt(iommufd, dev, other, FAULT, fault_id=queue.out_fault_id)
    assert attach(env, fd, bad) == "ENODEV"
    assert env.map_file(iommufd, other, env.memfd(PAGE), 0, PAGE, MSI_WINDOW) == MSI_WINDOW


def test_info(env):
    fd, _, _ = bound(env)
    info = env.call(fd, "VFIO_DEVICE_GET_INFO")
    assert info.flags & vfio.VFIO_DEVICE_FLAGS_PCI
    assert (info.num_regions, info.num_irqs) == (vfio.VFIO_PCI_NUM_REGIONS, vfio.VFIO_PCI_NUM_IRQS)
    assert outcome(env.call, fd, "VFIO_DEVICE_GET_INFO", argsz=15) == "EINVAL"
    bar = env.call(fd, "VFIO_DEVICE_GET_REGION_INFO", index=vfio.VFIO_PCI_BAR0_REGION_INDEX)
    assert bar.size >= PAGE
    assert bar.flags & 7 == (
        vfio.VFIO_REGION_INFO_FLAG_READ | vfio.VFIO_REGION_INFO_FLAG_WRITE | vfio.VFIO_REGION_INFO_FLAG_MMAP
    )
    assert bar.offset == vfio.VFIO_PCI_BAR0_REGION_INDEX << 40
    assert env.call(fd, "VFIO_DEVICE_GET_REGION_INFO", index=5).size == 0
    for index in (vfio.VFIO_PCI_VGA_REGION_INDEX, vfio.VFIO_PCI_NUM_REGIONS, 1 << 20):
        assert outcome(env.call, fd, "VFIO_DEVICE_GET_REGION_INFO", index=index) == "EINVAL"
    assert outcome(env.call, fd, "VFIO_DEVICE_GET_REGION_INFO", argsz=31) == "EINVAL"


def test_closing_the_iommufd_first(env):
    """The device keeps the iommufd."""
    fd, iommufd, _ = bound(env)
    ioas = env.ioas(iommufd)
    env.map_file(iommufd, ioas, env.memfd(PAGE), 0, PAGE, BASE)
    hwpt = attach(env, fd, ioas)
    env.close(iommufd)
    assert attach(env, fd, ioas) == hwpt
    assert detach(env, fd) == 0


def test_closing_the_device_gives_everything_back(env):
    fd, iommufd, dev = bound(env)
    ioas = env.ioas(iommufd)
    attach(env, fd, ioas)
    env.close(fd)
    assert outcome(env.destroy, iommufd, dev) == "ENOENT"
    assert outcome(env.destroy, iommufd, ioas) is None
    again = env.open(MACHINE.vfio[0])
    assert bind(env, again, iommufd).out_devid == 1


def test_another_iommufd_does_not_know_the_device(env):
    fd, iommufd, dev = bound(env)
    other = env.iommu()
    ioas = env.ioas(other)
    fields = {"dev_id": dev, "pt_id": ioas}
    assert outcome(env.call, other, "IOMMU_HWPT_ALLOC", **fields) == "ENOENT"
    mine = env.ioas(iommufd)
    fields = {"flags": FIXED | RW, "ioas_id": mine, "fd": env.memfd(PAGE), "length": PAGE, "iova": BASE}
    assert not isinstance(outcome(env.call, iommufd, "IOMMU_IOAS_MAP_FILE", **fields), str)
    assert attach(env, fd, mine) != "ENOENT"
