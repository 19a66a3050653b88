# SPDX-License-Identifier: Apache-2.0
"""Queues of events that user space reads from a descriptor (drivers/iommu/iommufd/eventq.c).

Page faults of devices, which wait for an answer, and events of vIOMMUs, which do not.
"""

from __future__ import annotations

import ctypes
import errno
import select
from abc import ABC, abstractmethod
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
    from iokeep.soft.kernel.viommu import Viommu


class EventQueue(IommufdObject, ABC):
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


#: VEVENTQ_MAX_DEPTH
_MAX_EVENTS = 1 << 19
_SEQUENCE_MASK = (1 << 31) - 1
_FAULT_BYTES = ctypes.sizeof(uapi.iommu_hwpt_pgfault)
_HEADER_BYTES = ctypes.sizeof(uapi.iommufd_vevent_header)
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


class VeventQueue(EventQueue):
    """Events of one type of a vIOMMU, which it is a user of (struct iommufd_veventq).

    No more than ``depth`` wait; where one did not fit, a header without data says so behind the last, until
    another one comes: its sequence number tells then.
    """

    type_name = "veventq"
    file_name = "[iommufd-viommu-event]"

    def __init__(self, viommu: Viommu, event_type: int, depth: int) -> None:
        super().__init__(viommu.iommufd)
        self._viommu = viommu
        self._type = event_type
        self._depth = depth
        #: sequence numbers with data
        self._deliver: deque[tuple[int, bytes]] = deque()
        #: the sequence number of the last event that was lost behind these
        self._lost: int | None = None
        self._sequence = 0

    def add(self, data: bytes) -> None:
        """iommufd_vevent_handler."""
        if len(self._deliver) == self._depth:
            self._lost = self._sequence
        else:
            self._lost = None
            self._deliver.append((self._sequence, data))
        self._sequence = (self._sequence + 1) & _SEQUENCE_MASK

    def read(self, length: int) -> bytes:
        """iommufd_veventq_fops_read: whole events only.

        :raises SysError: EINVAL: no room for a header, or for the first event.
        """
        if length < _HEADER_BYTES:
            raise SysError(errno.EINVAL, f"read of {length} bytes, a header has {_HEADER_BYTES}")
        out = bytearray()
        while self._deliver:
            sequence, data = self._deliver[0]
            if _HEADER_BYTES + len(data) > length - len(out):
                if not out:
                    raise SysError(errno.EINVAL, "no room for an event")
                return bytes(out)
            self._deliver.popleft()
            out += bytes(uapi.iommufd_vevent_header(0, sequence)) + data
        if self._lost is not None and length - len(out) >= _HEADER_BYTES:
            out += bytes(uapi.iommufd_vevent_header(uapi.IOMMU_VEVENTQ_FLAG_LOST_EVENTS, self._lost))
            self._lost = None
        return bytes(out)

    def write(self, data: bytes) -> int:
        """Events are not answered. :raises SysError: EINVAL."""
        raise SysError(errno.EINVAL, f"{self.file_name} cannot be written")

    def poll(self) -> int:
        """POLLIN where there is something, also only that events were lost."""
        waiting = self._deliver or self._lost is not None
        return select.POLLIN | select.POLLRDNORM if waiting else 0

    def destroy(self) -> None:
        """iommufd_veventq_destroy."""
        del self._viommu.event_queues[self._type]
        self._viommu.users -= 1


def iommufd_veventq_alloc(ictx: Iommufd, call: Ioctl, cmd: uapi.iommu_veventq_alloc) -> None:
    """IOMMU_VEVENTQ_ALLOC."""
    if cmd.flags or getattr(cmd, "__reserved") or cmd.type == uapi.IOMMU_VEVENTQ_TYPE_DEFAULT:
        raise SysError(errno.EOPNOTSUPP, f"event queue of type {cmd.type}, flags {cmd.flags:#x}")
    if not 0 < cmd.veventq_depth <= _MAX_EVENTS:
        raise SysError(errno.EINVAL, f"event queue of depth {cmd.veventq_depth}")
    viommu = ictx.viommu(cmd.viommu_id)
    if cmd.type in viommu.event_queues:
        raise SysError(errno.EEXIST, f"vIOMMU {viommu.id} has a queue for events of type {cmd.type:#x}")
    queue = VeventQueue(viommu, cmd.type, cmd.veventq_depth)
    cmd.out_veventq_fd = call.process.install(EventFile(queue))
    viommu.users += 1
    viommu.event_queues[cmd.type] = queue
    cmd.out_veventq_id = ictx.add(queue)
    call.respond(cmd)


def iommufd_fault_alloc(ictx: Iommufd, call: Ioctl, cmd: uapi.iommu_fault_alloc) -> None:
    """IOMMU_FAULT_QUEUE_ALLOC."""
    if cmd.flags:
        raise SysError(errno.EOPNOTSUPP, f"fault queue flags {cmd.flags:#x}")
    queue = FaultQueue(ictx)
    cmd.out_fault_fd = call.process.install(EventFile(queue))
    cmd.out_fault_id = ictx.add(queue)
    call.respond(cmd)
