# SPDX-License-Identifier: Apache-2.0
"""Queues of events that user space reads from a descriptor (drivers/iommu/iommufd/eventq.c): page faults."""

from __future__ import annotations

import ctypes
import errno
import select
from abc import abstractmethod
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from iokeep.soft.kernel.files import File, Ioctl
from iokeep.soft.kernel.objects import IommufdObject
from iokeep.soft.kernel.syserror import SysError
from iokeep.uapi import iommufd as uapi

if TYPE_CHECKING:
    from iokeep.soft.kernel.device import IommufdDevice
    from iokeep.soft.kernel.iommufd import Iommufd


class EventQueue(IommufdObject):
    """What is read from a descriptor (struct iommufd_eventq), which is a user of it while it is open."""

    #: what the descriptor is called
    file_name: ClassVar[str]

    @abstractmethod
    def read(self, length: int) -> bytes:
        """Events that fit into ``length`` bytes, which are taken out. :raises SysError: what a read is
        refused for.
        """

    @abstractmethod
    def write(self, data: bytes) -> int:
        """Answers; bytes that were taken. :raises SysError: what a write is refused for."""

    @abstractmethod
    def poll(self) -> int:
        """POLL*: what can be done now."""


class EventFile(File):
    """The descriptor of a queue. It has no position: anonymous inodes of Linux that nothing opened (no
    FMODE_PREAD, FMODE_PWRITE, FMODE_LSEEK).
    """

    kind_name = "iommufd event queue"

    def __init__(self, queue: EventQueue) -> None:
        super().__init__(queue.iommufd.kernel, queue.file_name)
        self._queue = queue
        queue.users += 1
        queue.iommufd.get()

    def release(self) -> None:
        """Lets the queue go."""
        self._queue.users -= 1
        self._queue.iommufd.put()

    def read(self, length: int) -> bytes:
        """read(2)."""
        return self._queue.read(length)

    def write(self, data: bytes) -> int:
        """write(2)."""
        return self._queue.write(data)

    def poll(self) -> int:
        """poll(2)."""
        return self._queue.poll()

    def pread(self, length: int, offset: int) -> bytes:
        """pread(2)."""
        raise SysError(errno.ESPIPE, f"{self.name} has no position")

    def pwrite(self, data: bytes, offset: int) -> int:
        """pwrite(2)."""
        raise SysError(errno.ESPIPE, f"{self.name} has no position")


@dataclass(eq=False, slots=True)
class Fault:
    """A page request that a device waits for: the last, here the only one, of its group (struct iopf_group).

    :param idev: the device. :param handle: the PASID whose attachment took it, 0: that of the device itself.
    :param message: as user space gets it; ``cookie`` is 0 until then.
    """

    idev: IommufdDevice
    handle: int
    message: uapi.iommu_hwpt_pgfault

    def respond(self, code: int) -> None:
        """iopf_group_response. :param code: IOMMUFD_PAGE_RESP_*."""
        self.idev.iommu.page_response(self.idev.dev, self.message.pasid, self.message.grpid, code)


_FAULT_BYTES = ctypes.sizeof(uapi.iommu_hwpt_pgfault)
_RESPONSE_BYTES = ctypes.sizeof(uapi.iommu_hwpt_page_response)


class FaultQueue(EventQueue):
    """The faults of the HWPTs that were made with it, on their way to user space and back."""

    type_name = "fault"
    file_name = "[iommufd-pgfault]"

    def __init__(self, iommufd: Iommufd) -> None:
        super().__init__(iommufd)
        self._deliver: deque[Fault] = deque()
        #: read and not answered yet, by cookie
        self._response: dict[int, Fault] = {}

    def add(self, fault: Fault) -> None:
        """iommufd_fault_iopf_handler."""
        self._deliver.append(fault)

    def answer_all(self, idev: IommufdDevice, handle: int) -> None:
        """iommufd_auto_response_faults: the attachment that these came by ends, nobody will answer them."""

        def mine(fault: Fault) -> bool:
            return fault.idev is idev and fault.handle == handle

        gone = [fault for fault in (*self._deliver, *self._response.values()) if mine(fault)]
        self._deliver = deque(fault for fault in self._deliver if not mine(fault))
        self._response = {cookie: fault for cookie, fault in self._response.items() if not mine(fault)}
        for fault in gone:
            fault.respond(uapi.IOMMUFD_PAGE_RESP_INVALID)

    def read(self, length: int) -> bytes:
        """iommufd_fault_fops_read: whole faults only. :raises SysError: ESPIPE: ``length`` is no multiple of
        a fault's; EINVAL: there is one, and no room.
        """
        if length % _FAULT_BYTES:
            raise SysError(errno.ESPIPE, f"read of {length} bytes, a fault has {_FAULT_BYTES}")
        out = bytearray()
        while self._deliver:
            if length - len(out) < _FAULT_BYTES:
                if not out:
                    raise SysError(errno.EINVAL, "no room for a fault")
                break
            fault = self._deliver.popleft()
            cookie = 1
            while cookie in self._response:
                cookie += 1
            self._response[cookie] = fault
            fault.message.cookie = cookie
            out += bytes(fault.message)
        return bytes(out)

    def write(self, data: bytes) -> int:
        """iommufd_fault_fops_write: answers until one is wrong. :raises SysError: ESPIPE: not whole answers;
        EINVAL: the first one has an unknown code or cookie.
        """
        if len(data) % _RESPONSE_BYTES:
            raise SysError(errno.ESPIPE, f"write of {len(data)} bytes, an answer has {_RESPONSE_BYTES}")
        done = 0
        for done in range(0, len(data), _RESPONSE_BYTES):
            answer = uapi.iommu_hwpt_page_response.from_buffer_copy(data, done)
            known = (uapi.IOMMUFD_PAGE_RESP_SUCCESS, uapi.IOMMUFD_PAGE_RESP_INVALID)
            fault = self._response.pop(answer.cookie, None) if answer.code in known else None
            if fault is None:
                if not done:
                    raise SysError(errno.EINVAL, f"answer {answer.code} to fault {answer.cookie}")
                return done
            fault.respond(answer.code)
        return len(data)

    def poll(self) -> int:
        """An answer can always be written."""
        return select.POLLOUT | (select.POLLIN | select.POLLRDNORM if self._deliver else 0)

    def destroy(self) -> None:
        """No HWPT has it any more, and so no device a fault in it."""
        if self._deliver or self._response:
            raise AssertionError(f"fault queue {self.id} destroyed with faults in it")


def iommufd_fault_alloc(ictx: Iommufd, call: Ioctl, cmd: uapi.iommu_fault_alloc) -> None:
    """IOMMU_FAULT_QUEUE_ALLOC."""
    if cmd.flags:
        raise SysError(errno.EOPNOTSUPP, f"fault queue flags {cmd.flags:#x}")
    queue = FaultQueue(ictx)
    cmd.out_fault_fd = call.process.install(EventFile(queue))
    cmd.out_fault_id = ictx.add(queue)
    call.respond(cmd)
