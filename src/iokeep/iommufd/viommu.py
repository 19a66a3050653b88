# SPDX-License-Identifier: Apache-2.0
"""What a guest's own IOMMU needs of /dev/iommu: fault queues, vIOMMUs with their devices, events and queues.

Only some IOMMU drivers have these; the others answer EOPNOTSUPP. Sources: Documentation/userspace-api/
iommufd.rst and include/uapi/linux/iommufd.h.
"""

from __future__ import annotations

import ctypes
import select
from collections.abc import Sequence
from dataclasses import dataclass

from iokeep.iommufd.client import Iommufd, IommufdError
from iokeep.uapi import iommufd as uapi
from iokeep.uapi.errnos import checked_ioctl
from iokeep.uapi.owner import FdOwner


def _call(iommufd: Iommufd, name: str, request: int, arg: ctypes.Structure, /, **about: object) -> None:
    checked_ioctl(iommufd.transport, iommufd.fd, name, request, arg, about, IommufdError)


class _Queue(FdOwner):
    def ready(self) -> bool:
        """Whether there is something to read. A process of Linux may also wait for ``fd`` with poll(2)."""
        return bool(self.transport.poll(self.fd, select.POLLIN))


class FaultQueue(_Queue):
    """A queue of IO page faults.

    :ivar id: what an HWPT is made with (``hwpt_alloc(..., flags=IOMMU_HWPT_FAULT_ID_VALID, fault_id=id)``).
    """

    def __init__(self, iommufd: Iommufd) -> None:
        arg = uapi.iommu_fault_alloc(size=ctypes.sizeof(uapi.iommu_fault_alloc))
        _call(iommufd, "IOMMU_FAULT_QUEUE_ALLOC", uapi.IOMMU_FAULT_QUEUE_ALLOC, arg, iommufd=iommufd.fd)
        super().__init__(iommufd.transport, int(arg.out_fault_fd))
        self.id = int(arg.out_fault_id)

    def read(self, most: int = 64) -> list[uapi.iommu_hwpt_pgfault]:
        """Faults that are there, the oldest first, and no more than ``most`` (1 or more); none: empty. Each
        waits for an answer to its ``cookie``.
        """
        size = ctypes.sizeof(uapi.iommu_hwpt_pgfault)
        raw = self.transport.read(self.fd, most * size)
        return [uapi.iommu_hwpt_pgfault.from_buffer_copy(raw, at) for at in range(0, len(raw), size)]

    def respond(self, *answers: tuple[int, int]) -> int:
        """Answer faults by (cookie, IOMMUFD_PAGE_RESP_*): the device tries again, or is told no. How many
        were taken: the kernel stops at the first unknown cookie, also one whose device has left its HWPT.

        :raises OSError: EINVAL: that was the first of them.
        """
        raw = b"".join(bytes(uapi.iommu_hwpt_page_response(*answer)) for answer in answers)
        return self.transport.write(self.fd, raw) // ctypes.sizeof(uapi.iommu_hwpt_page_response)


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a vIOMMU.

    :param sequence: one more than that of the event before, modulo 2^31; more: events between were lost.
    :param data: the structure of the queue's type; None: events were lost here, and none has come since.
    """

    sequence: int
    data: bytes | None


class EventQueue(_Queue):
    """A queue of a vIOMMU's events, of one type. :ivar id: the object's."""

    def __init__(self, viommu: Viommu, queue_type: int, depth: int) -> None:
        arg = uapi.iommu_veventq_alloc(
            size=ctypes.sizeof(uapi.iommu_veventq_alloc),
            viommu_id=viommu.id,
            type=queue_type,
            veventq_depth=depth,
        )
        name = "IOMMU_VEVENTQ_ALLOC"
        _call(viommu.iommufd, name, uapi.IOMMU_VEVENTQ_ALLOC, arg, viommu=viommu.id, type=queue_type)
        super().__init__(viommu.iommufd.transport, int(arg.out_veventq_fd))
        self.id = int(arg.out_veventq_id)

    def read(self, data_bytes: int, most: int = 64) -> list[Event]:
        """Events that are there, the oldest first, and no more than ``most`` (1 or more); none: empty.

        :param data_bytes: bytes of the structure of the queue's type.
        """
        header = ctypes.sizeof(uapi.iommufd_vevent_header)
        raw = self.transport.read(self.fd, most * (header + data_bytes))
        out, at = [], 0
        while at < len(raw):
            head = uapi.iommufd_vevent_header.from_buffer_copy(raw, at)
            at += header
            data = None
            if not head.flags & uapi.IOMMU_VEVENTQ_FLAG_LOST_EVENTS:
                data = raw[at : at + data_bytes]
                at += data_bytes
            out.append(Event(int(head.sequence), data))
        return out


class Viommu:
    """A slice of a physical IOMMU for one guest, on a nesting parent HWPT. :ivar id: the object's.

    :param viommu_type: IOMMU_VIOMMU_TYPE_*. :param data: the structure of that type, written back where the
        driver answers in it.
    """

    def __init__(
        self, iommufd: Iommufd, dev_id: int, hwpt_id: int, viommu_type: int, data: bytearray | None = None
    ) -> None:
        buffer = (ctypes.c_char * len(data)).from_buffer(data) if data else None
        arg = uapi.iommu_viommu_alloc(
            size=ctypes.sizeof(uapi.iommu_viommu_alloc),
            type=viommu_type,
            dev_id=dev_id,
            hwpt_id=hwpt_id,
            data_len=0 if data is None else len(data),
            data_uptr=0 if buffer is None else ctypes.addressof(buffer),
        )
        name = "IOMMU_VIOMMU_ALLOC"
        _call(iommufd, name, uapi.IOMMU_VIOMMU_ALLOC, arg, device=dev_id, hwpt=hwpt_id, type=viommu_type)
        self.iommufd = iommufd
        self.id = int(arg.out_viommu_id)

    def vdevice(self, dev_id: int, virt_id: int) -> int:
        """The guest knows this device by ``virt_id`` (a stream or requester id); the object's id."""
        arg = uapi.iommu_vdevice_alloc(
            size=ctypes.sizeof(uapi.iommu_vdevice_alloc), viommu_id=self.id, dev_id=dev_id, virt_id=virt_id
        )
        name = "IOMMU_VDEVICE_ALLOC"
        about: dict[str, object] = {"viommu": self.id, "device": dev_id, "virt_id": f"{virt_id:#x}"}
        _call(self.iommufd, name, uapi.IOMMU_VDEVICE_ALLOC, arg, **about)
        return int(arg.out_vdevice_id)

    def hw_queue(self, queue_type: int, index: int, iova: int, length: int) -> int:
        """A queue in guest memory that hardware reads by itself; the object's id.

        :param iova: where the nesting parent has it. :param length: bytes.
        """
        arg = uapi.iommu_hw_queue_alloc(
            size=ctypes.sizeof(uapi.iommu_hw_queue_alloc),
            viommu_id=self.id,
            type=queue_type,
            index=index,
            nesting_parent_iova=iova,
            length=length,
        )
        name = "IOMMU_HW_QUEUE_ALLOC"
        about: dict[str, object] = {"viommu": self.id, "index": index, "iova": f"{iova:#x}"}
        _call(self.iommufd, name, uapi.IOMMU_HW_QUEUE_ALLOC, arg, **about)
        return int(arg.out_hw_queue_id)

    def destroy(self) -> None:
        """Destroy it; EBUSY while a device, an HWPT or a queue is on it."""
        self.iommufd.destroy(self.id)


class InvalidationRefused(IommufdError):
    """The kernel stopped at an entry. :ivar done: how many before it were done, and stay so."""

    done = 0


def invalidate(iommufd: Iommufd, hwpt_id: int, data_type: int, entries: Sequence[bytes]) -> int:
    """Drop what the IOMMU has cached of a guest's tables.

    :param hwpt_id: a nested HWPT, or a vIOMMU. :param data_type: IOMMU_HWPT_INVALIDATE_DATA_* or
        IOMMU_VIOMMU_INVALIDATE_DATA_*. :param entries: structures of that type, all of one length.
    :returns: how many were done: all.
    :raises InvalidationRefused: not all.
    """
    if len({len(entry) for entry in entries}) > 1:
        raise ValueError("entries of several lengths")
    raw = b"".join(entries)
    buffer = ctypes.create_string_buffer(raw, max(1, len(raw)))
    arg = uapi.iommu_hwpt_invalidate(
        size=ctypes.sizeof(uapi.iommu_hwpt_invalidate),
        hwpt_id=hwpt_id,
        data_uptr=ctypes.addressof(buffer) if entries else 0,
        data_type=data_type,
        entry_len=len(entries[0]) if entries else 0,
        entry_num=len(entries),
    )
    about: dict[str, object] = {"hwpt": hwpt_id, "type": data_type, "entries": len(entries)}
    operation, request = "IOMMU_HWPT_INVALIDATE", uapi.IOMMU_HWPT_INVALIDATE
    try:
        checked_ioctl(iommufd.transport, iommufd.fd, operation, request, arg, about, InvalidationRefused)
    except InvalidationRefused as refused:
        refused.done = int(arg.entry_num)
        raise
    return int(arg.entry_num)
