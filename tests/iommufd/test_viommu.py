# SPDX-License-Identifier: Apache-2.0
"""Fault queues, vIOMMUs, dirty tracking, options and PASIDs: structures as the kernel sees them."""

import ctypes
import errno

import pytest

from iokeep.iommufd.client import Iommufd, IommufdError, VfioDevice
from iokeep.iommufd.viommu import Event, EventQueue, FaultQueue, InvalidationRefused, Viommu, invalidate
from iokeep.soft.testing import LocalHost
from iokeep.uapi import iommufd as uapi
from iokeep.uapi import vfio
from iokeep.uapi.copy_struct import IOMMU_IOCTLS, VFIO_IOCTLS, copy_struct_in, copy_struct_out

TABLES = {**IOMMU_IOCTLS, **VFIO_IOCTLS}


class Kernel:
    """Takes structures by the kernel's rule and answers with fields by the ioctl's name."""

    name = "scripted"

    def __init__(self, **answers):
        self.answers = answers
        self.calls = []
        self.closed = []
        self.queue = b""

    def close(self, fd):
        self.closed.append(fd)

    def read(self, fd, length):
        assert length >= len(self.queue)
        return self.queue

    def write(self, fd, data):
        self.written = data
        return len(data)

    def poll(self, fd, events):
        return events if self.queue else 0

    def ioctl(self, fd, request, arg):
        if request == vfio.VFIO_DEVICE_RESET:
            self.calls.append(("VFIO_DEVICE_RESET", None))
            return 0
        op = TABLES[request]
        cmd = copy_struct_in(op.struct, bytes(arg))
        self.calls.append((op.name, cmd))
        for field, value in self.answers.get(op.name, {}).items():
            setattr(cmd, field, value)
        raw = copy_struct_out(cmd)
        ctypes.memmove(ctypes.addressof(arg), raw, len(raw))
        return 0

    @property
    def last(self):
        return self.calls[-1][1]


def test_fault_queue():
    kernel = Kernel(IOMMU_FAULT_QUEUE_ALLOC={"out_fault_id": 4, "out_fault_fd": 9})
    with FaultQueue(Iommufd(kernel, 3)) as queue:
        assert (queue.id, queue.fd) == (4, 9)
    assert kernel.closed == [9]
    queue.close()
    assert kernel.closed == [9]


def test_faults():
    kernel = Kernel(IOMMU_FAULT_QUEUE_ALLOC={"out_fault_id": 4, "out_fault_fd": 9})
    with FaultQueue(Iommufd(kernel, 3)) as queue:
        assert (queue.ready(), queue.read()) == (False, [])
        made = [uapi.iommu_hwpt_pgfault(dev_id=n, cookie=n + 1, addr=n << 12) for n in range(3)]
        kernel.queue = b"".join(map(bytes, made))
        assert queue.ready()
        assert [(f.dev_id, f.cookie, f.addr) for f in queue.read(3)] == [
            (n, n + 1, n << 12) for n in range(3)
        ]
        assert queue.respond((1, uapi.IOMMUFD_PAGE_RESP_SUCCESS), (7, uapi.IOMMUFD_PAGE_RESP_INVALID)) == 2
        assert kernel.written == b"".join(n.to_bytes(4, "little") for n in (1, 0, 7, 1))


def test_events():
    kernel = Kernel(
        IOMMU_VIOMMU_ALLOC={"out_viommu_id": 7},
        IOMMU_VEVENTQ_ALLOC={"out_veventq_id": 9, "out_veventq_fd": 11},
    )
    with EventQueue(Viommu(Iommufd(kernel, 3), 1, 2, 1), 1, 64) as queue:
        assert queue.read(4) == []
        heads = [bytes(uapi.iommufd_vevent_header(*each)) for each in ((0, 5), (0, 8), (1, 9))]
        kernel.queue = heads[0] + b"data" + heads[1] + b"more" + heads[2]
        assert queue.ready()
        assert queue.read(4, 3) == [Event(5, b"data"), Event(8, b"more"), Event(9, None)]


def test_viommu():
    kernel = Kernel(
        IOMMU_VIOMMU_ALLOC={"out_viommu_id": 7},
        IOMMU_VDEVICE_ALLOC={"out_vdevice_id": 8},
        IOMMU_VEVENTQ_ALLOC={"out_veventq_id": 9, "out_veventq_fd": 11},
        IOMMU_HW_QUEUE_ALLOC={"out_hw_queue_id": 10},
    )
    data = bytearray(b"guest data")
    viommu = Viommu(Iommufd(kernel, 3), 1, 2, uapi.IOMMU_VIOMMU_TYPE_ARM_SMMUV3, data)
    assert (kernel.last.dev_id, kernel.last.hwpt_id, kernel.last.data_len) == (1, 2, 10)
    assert viommu.id == 7
    assert viommu.vdevice(1, 0x42) == 8
    assert (kernel.last.viommu_id, kernel.last.virt_id) == (7, 0x42)
    with EventQueue(viommu, 1, 64) as queue:
        assert (queue.id, queue.fd, kernel.last.veventq_depth) == (9, 11, 64)
    assert viommu.hw_queue(1, 2, 0x1000, 0x2000) == 10
    assert (kernel.last.index, kernel.last.nesting_parent_iova, kernel.last.length) == (2, 0x1000, 0x2000)
    viommu.destroy()
    assert kernel.last.id == 7


def test_invalidate():
    kernel = Kernel()
    iommufd = Iommufd(kernel, 3)
    assert invalidate(iommufd, 5, 1, [b"x" * 16, b"y" * 16]) == 2
    assert (kernel.last.hwpt_id, kernel.last.entry_len, kernel.last.entry_num) == (5, 16, 2)
    assert invalidate(iommufd, 5, 1, []) == 0
    assert kernel.last.data_uptr == 0
    with pytest.raises(ValueError, match="several lengths"):
        invalidate(iommufd, 5, 1, [b"x", b"yy"])


def test_invalidations_that_stop():
    """How many were done is told."""

    class Refusing(Kernel):
        def ioctl(self, fd, request, arg):
            super().ioctl(fd, request, arg)
            raise OSError(errno.EOPNOTSUPP, "no")

    kernel = Refusing(IOMMU_HWPT_INVALIDATE={"entry_num": 1})
    with pytest.raises(InvalidationRefused) as refused:
        invalidate(Iommufd(kernel, 3), 5, 1, [b"x" * 16, b"y" * 16])
    assert (refused.value.done, refused.value.errno, refused.value.operation) == (
        1,
        errno.EOPNOTSUPP,
        "IOMMU_HWPT_INVALIDATE",
    )


def test_dirty_tracking():
    kernel = Kernel()
    iommufd = Iommufd(kernel, 3)
    iommufd.set_dirty_tracking(4, True)
    assert (kernel.last.hwpt_id, kernel.last.flags) == (4, 1)
    assert iommufd.dirty_bitmap(4, 0x10000, 0x9000) == bytes(2)
    assert (kernel.last.iova, kernel.last.length, kernel.last.page_size) == (0x10000, 0x9000, 4096)
    iommufd.dirty_bitmap(4, 0, 1 << 21, 1 << 21, clear=False)
    assert kernel.last.flags == uapi.IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR
    for wrong in ((0, 0), (0, 1), (0, 4096, 3), (0, 1 << 62)):
        with pytest.raises(ValueError, match="pages"):
            iommufd.dirty_bitmap(4, *wrong)


def test_options():
    kernel = Kernel(IOMMU_OPTION={"val64": 1}, IOMMU_VFIO_IOAS={"ioas_id": 6})
    iommufd = Iommufd(kernel, 3)
    assert iommufd.charge_by_process() is True
    assert kernel.last.op == uapi.IOMMU_OPTION_OP_GET
    assert iommufd.charge_by_process(True) is True
    assert (kernel.last.option_id, kernel.last.op) == (
        uapi.IOMMU_OPTION_RLIMIT_MODE,
        uapi.IOMMU_OPTION_OP_SET,
    )
    assert iommufd.compat_ioas() == 6
    assert iommufd.compat_ioas(5) == 6
    assert kernel.last.op == uapi.IOMMU_VFIO_IOAS_SET
    assert iommufd.compat_ioas(clear=True) == 0
    assert kernel.last.op == uapi.IOMMU_VFIO_IOAS_CLEAR


def test_pasids_tokens_reset():
    kernel = Kernel(VFIO_DEVICE_BIND_IOMMUFD={"out_devid": 1}, VFIO_DEVICE_ATTACH_IOMMUFD_PT={"pt_id": 9})
    device = VfioDevice(kernel, 5)
    device.bind(Iommufd(kernel, 3), b"\1" * 16)
    assert (kernel.last.argsz, kernel.last.flags) == (24, vfio.VFIO_DEVICE_BIND_FLAG_TOKEN)
    assert device.attach(2, pasid=77) == 9
    assert (kernel.last.argsz, kernel.last.flags, kernel.last.pasid) == (
        16,
        vfio.VFIO_DEVICE_ATTACH_PASID,
        77,
    )
    device.detach(pasid=77)
    assert (kernel.last.argsz, kernel.last.flags) == (12, vfio.VFIO_DEVICE_DETACH_PASID)
    device.reset()
    assert kernel.calls[-1][0] == "VFIO_DEVICE_RESET"
    with pytest.raises(ValueError, match="16 bytes"):
        device.bind(Iommufd(kernel, 3), b"short")


def test_on_the_software_host():
    """The same calls against a kernel that has none of it: refused with a reason, nothing left open."""
    with LocalHost(32 << 20, devices=False) as host:
        transport = host.transport()
        with Iommufd(transport) as iommufd, VfioDevice(transport, "/dev/vfio/devices/vfio0") as device:
            assert iommufd.charge_by_process(True) is True
            dev = device.bind(iommufd)
            ioas = iommufd.ioas_alloc()
            hwpt = device.attach(ioas.id)
            device.reset()
            with FaultQueue(iommufd) as queue:
                assert queue.id > hwpt
            iommufd.compat_ioas(ioas.id)
            assert iommufd.compat_ioas() == ioas.id
            for name, number, call in (
                ("IOMMU_OPTION", errno.EBUSY, lambda: iommufd.charge_by_process(False)),
                ("IOMMU_VIOMMU_ALLOC", errno.EOPNOTSUPP, lambda: Viommu(iommufd, dev, hwpt, 1)),
                ("IOMMU_HWPT_INVALIDATE", errno.EINVAL, lambda: invalidate(iommufd, hwpt, 1, [b"x" * 8])),
                (
                    "IOMMU_HWPT_SET_DIRTY_TRACKING",
                    errno.EOPNOTSUPP,
                    lambda: iommufd.set_dirty_tracking(hwpt, True),
                ),
                (
                    "IOMMU_HWPT_GET_DIRTY_BITMAP",
                    errno.EOPNOTSUPP,
                    lambda: iommufd.dirty_bitmap(hwpt, 0, 4096),
                ),
                ("IOMMU_IOAS_NOIOMMU_GET_PA", errno.ENOENT, lambda: iommufd.noiommu_pa(ioas.id, 0, 4096)),
                ("VFIO_DEVICE_ATTACH_IOMMUFD_PT", None, lambda: device.attach(ioas.id, pasid=5)),
            ):
                with pytest.raises(IommufdError) as refused:
                    call()
                assert refused.value.operation == name
                assert number is None or refused.value.errno == number
                assert refused.value.meaning
