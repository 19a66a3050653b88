# SPDX-License-Identifier: Apache-2.0
"""One process's view of a machine: system calls with few words, and what it opened is closed again."""

import ctypes
import errno as errnos
import os
import select

from conf_selftest import (
    IOMMU_HWPT_DATA_SELFTEST,
    IOMMU_TEST_CMD,
    IOMMU_TEST_OP_ACCESS_PAGES,
    IOMMU_TEST_OP_ACCESS_REPLACE_IOAS,
    IOMMU_TEST_OP_ACCESS_RW,
    IOMMU_TEST_OP_ADD_RESERVED,
    IOMMU_TEST_OP_CREATE_ACCESS,
    IOMMU_TEST_OP_DESTROY_ACCESS_PAGES,
    IOMMU_TEST_OP_DIRTY,
    IOMMU_TEST_OP_MD_CHECK_MAP,
    IOMMU_TEST_OP_MD_CHECK_REFS,
    IOMMU_TEST_OP_MOCK_DOMAIN_FLAGS,
    IOMMU_TEST_OP_MOCK_DOMAIN_REPLACE,
    IOMMU_TEST_OP_SET_TEMP_MEMORY_LIMIT,
    MOCK_ACCESS_RW_WRITE,
    MOCK_FLAGS_ACCESS_CREATE_NEEDS_PIN_PAGES,
    MOCK_FLAGS_DEVICE_NO_DIRTY,
    command,
)

from iokeep.uapi import iommufd as uapi
from iokeep.uapi import liveupdate as luo
from iokeep.uapi import vfio
from iokeep.uapi.errnos import name as errno_name

R, W = uapi.IOMMU_IOAS_MAP_READABLE, uapi.IOMMU_IOAS_MAP_WRITEABLE
FIXED = uapi.IOMMU_IOAS_MAP_FIXED_IOVA
RW = R | W
#: what HWPT_ALLOC makes: a nesting parent, an HWPT with dirty tracking, one whose faults go to a queue, one
#: for PASIDs
NEST, TRACKED = uapi.IOMMU_HWPT_ALLOC_NEST_PARENT, uapi.IOMMU_HWPT_ALLOC_DIRTY_TRACKING
FAULT, FOR_PASIDS = uapi.IOMMU_HWPT_FAULT_ID_VALID, uapi.IOMMU_HWPT_ALLOC_PASID
ULONG_MAX = (1 << 64) - 1
MFD_ALLOW_SEALING = 2
HUGE = 1 << 21
PAGE = 4096


class Refused(Exception):
    """A system call failed. ``name``: the errno's C name."""

    def __init__(self, number):
        super().__init__(errno_name(number))
        self.number = number
        self.name = errno_name(number)


def outcome(call, /, *args, **fields):
    """What a call did: its result, or the errno's name."""
    try:
        return call(*args, **fields)
    except Refused as refused:
        return refused.name


class Env:
    """Descriptors and mappings of one case; a context manager."""

    def __init__(self, machine):
        self.machine = machine
        self.t = machine.transport
        self.fds = []
        self.maps = []
        self.keep = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for mapping in reversed(self.maps):
            mapping.close()
        for fd in reversed(self.fds):
            self.t.close(fd)

    # ---- files

    def sys(self, call, *args):
        """A system call. :raises Refused:"""
        try:
            return call(*args)
        except ConnectionError:
            raise
        except OSError as error:
            raise Refused(error.errno) from error

    def owned(self, fd):
        self.fds.append(fd)
        return fd

    def open(self, path):
        return self.owned(self.sys(self.t.open, path))

    def close(self, fd):
        self.fds.remove(fd)
        self.t.close(fd)

    def memfd(self, size, flags=MFD_ALLOW_SEALING, name="conformance"):
        fd = self.owned(self.sys(self.t.memfd_create, name, flags))
        if size:
            self.sys(self.t.ftruncate, fd, size)
        return fd

    def mmap(self, fd, length, offset=0):
        mapping = self.sys(self.t.mmap, fd, length, offset)
        self.maps.append(mapping)
        return mapping

    def buffer(self, data):
        """The address of bytes that the kernel may read and write; a number makes zeroed ones."""
        size = data if isinstance(data, int) else len(data)
        made = ctypes.create_string_buffer(size) if isinstance(data, int) else None
        made = made or ctypes.create_string_buffer(data, size)
        self.keep.append(made)
        return ctypes.addressof(made)

    def bytes_at(self, address, length):
        return ctypes.string_at(address, length)

    def read(self, fd, length):
        return self.sys(self.t.read, fd, length)

    def write(self, fd, data):
        return self.sys(self.t.write, fd, data)

    def poll(self, fd):
        """Whether the file can be read, whether it can be written."""
        found = self.sys(self.t.poll, fd, select.POLLIN | select.POLLOUT)
        return bool(found & select.POLLIN), bool(found & select.POLLOUT)

    # ---- ioctls

    def ioctl(self, fd, request, arg):
        """:raises Refused:"""
        self.sys(self.t.ioctl, fd, request, arg)
        return arg

    def call(self, fd, name, /, **fields):
        """An ioctl by the name of its C structure's request; size is filled in."""
        request, struct = REQUESTS[name]
        first = struct._fields_[0][0]
        fields.setdefault(first, ctypes.sizeof(struct))
        return self.ioctl(fd, request, make(struct, fields))

    def iommu(self):
        return self.open("/dev/iommu")

    def ioas(self, fd):
        return self.call(fd, "IOMMU_IOAS_ALLOC").out_ioas_id

    def map_file(self, fd, ioas, file, start, length, iova=None, flags=RW):
        flags |= FIXED if iova is not None else 0
        return self.call(
            fd, "IOMMU_IOAS_MAP_FILE",
            flags=flags, ioas_id=ioas, fd=file, start=start, length=length, iova=iova or 0,
        ).iova  # fmt: skip

    def map(self, fd, ioas, hva, length, iova=None, flags=RW):
        flags |= FIXED if iova is not None else 0
        return self.call(
            fd, "IOMMU_IOAS_MAP", flags=flags, ioas_id=ioas, user_va=hva, length=length, iova=iova or 0
        ).iova

    def copy(self, fd, dst, src, src_iova, length, iova=None, flags=RW):
        flags |= FIXED if iova is not None else 0
        return self.call(
            fd, "IOMMU_IOAS_COPY",
            flags=flags, dst_ioas_id=dst, src_ioas_id=src, length=length, dst_iova=iova or 0,
            src_iova=src_iova,
        ).dst_iova  # fmt: skip

    def unmap(self, fd, ioas, iova=0, length=ULONG_MAX):
        return self.call(fd, "IOMMU_IOAS_UNMAP", ioas_id=ioas, iova=iova, length=length).length

    def destroy(self, fd, number):
        self.call(fd, "IOMMU_DESTROY", id=number)

    def ranges(self, fd, ioas, room=64):
        """(ranges, alignment)"""
        at = self.buffer(16 * room)
        found = self.call(fd, "IOMMU_IOAS_IOVA_RANGES", ioas_id=ioas, num_iovas=room, allowed_iovas=at)
        raw = self.bytes_at(at, 16 * found.num_iovas)
        words = [int.from_bytes(raw[i : i + 8], "little") for i in range(0, len(raw), 8)]
        return list(zip(words[::2], words[1::2], strict=True)), found.out_iova_alignment

    def allow(self, fd, ioas, ranges):
        raw = b"".join(a.to_bytes(8, "little") + b.to_bytes(8, "little") for a, b in ranges)
        self.call(
            fd, "IOMMU_IOAS_ALLOW_IOVAS",
            ioas_id=ioas, num_iovas=len(ranges), allowed_iovas=self.buffer(raw or 8),
        )  # fmt: skip

    def huge_pages(self, fd, ioas, value=None):
        op = uapi.IOMMU_OPTION_OP_GET if value is None else uapi.IOMMU_OPTION_OP_SET
        return self.call(
            fd, "IOMMU_OPTION",
            option_id=uapi.IOMMU_OPTION_HUGE_PAGES, op=op, object_id=ioas, val64=value or 0,
        ).val64  # fmt: skip

    def hwpt(self, fd, dev, pt, flags=0, data=b"", **fields):
        """:param data: for the mock driver; with it the HWPT is nested where pt is no IOAS."""
        fields = {"flags": flags, "dev_id": dev, "pt_id": pt, **fields}
        if data:
            fields = {"data_type": IOMMU_HWPT_DATA_SELFTEST, "data_uptr": self.buffer(data), **fields}
            fields = {"data_len": len(data), **fields}
        return self.call(fd, "IOMMU_HWPT_ALLOC", **fields).out_hwpt_id

    def invalidate(self, fd, number, data_type, entries, **fields):
        """(errno's name or None, how many were done); ``entries`` are structures."""
        request, struct = REQUESTS["IOMMU_HWPT_INVALIDATE"]
        raw = b"".join(map(bytes, entries))
        given = {
            "size": ctypes.sizeof(struct), "hwpt_id": number, "data_uptr": self.buffer(raw or 8),
            "data_type": data_type, "entry_len": len(raw) // max(1, len(entries)), "entry_num": len(entries),
        }  # fmt: skip
        arg = make(struct, {**given, **fields})
        answer = outcome(self.ioctl, fd, request, arg)
        return answer if isinstance(answer, str) else None, arg.entry_num

    # ---- the mock IOMMU

    def test(self, fd, op, number=0, /, **fields):
        arg = command(op, number)
        for key, value in fields.items():
            part, name = key.split("__")
            setattr(getattr(arg, part), name, value)
        return self.ioctl(fd, IOMMU_TEST_CMD, arg)

    def mock(self, fd, pt, flags=MOCK_FLAGS_DEVICE_NO_DIRTY):
        """A new mock device, attached: (selftest object, HWPT, device)."""
        flags = {"mock_domain__dev_flags": flags}
        made = self.test(fd, IOMMU_TEST_OP_MOCK_DOMAIN_FLAGS, pt, **flags).mock_domain
        return made.out_stdev_id, made.out_hwpt_id, made.out_idev_id

    def written(self, fd, hwpt, iova, length, page, bits):
        """A device behind a mock HWPT writes to the pages whose bits are set; how many."""
        at = self.buffer(bits.to_bytes(-(-length // page // 8) or 1, "little"))
        fields = {"iova": iova, "length": length, "page_size": page, "uptr": at}
        fields = {f"dirty__{key}": given for key, given in fields.items()}
        return self.test(fd, IOMMU_TEST_OP_DIRTY, hwpt, **fields).dirty.out_nr_dirty

    def pasid(self, fd, op, stdev, pasid, pt=0):
        """One of IOMMU_TEST_OP_PASID_*."""
        self.test(fd, op, stdev, pasid__pasid=pasid, pasid__pt_id=pt)

    def mock_replace(self, fd, stdev, pt):
        fields = {"mock_domain_replace__pt_id": pt}
        return self.test(fd, IOMMU_TEST_OP_MOCK_DOMAIN_REPLACE, stdev, **fields).mock_domain_replace.pt_id

    def access(self, fd, ioas, flags=MOCK_FLAGS_ACCESS_CREATE_NEEDS_PIN_PAGES):
        """The descriptor of a new emulated device that looks at an IOAS."""
        made = self.test(fd, IOMMU_TEST_OP_CREATE_ACCESS, ioas, create_access__flags=flags)
        return self.owned(made.create_access.out_access_fd)

    def access_replace(self, fd, access, ioas):
        self.test(fd, IOMMU_TEST_OP_ACCESS_REPLACE_IOAS, access, access_replace_ioas__ioas_id=ioas)

    def pin(self, fd, access, iova, length, flags=0, hva=0):
        """Pin pages by an access, which must be those behind hva (0: any); their number."""
        fields = {"flags": flags, "iova": iova, "length": length, "uptr": hva}
        fields = {f"access_pages__{key}": given for key, given in fields.items()}
        return self.test(fd, IOMMU_TEST_OP_ACCESS_PAGES, access, **fields).access_pages.out_access_pages_id

    def unpin(self, fd, access, number):
        fields = {"destroy_access_pages__access_pages_id": number}
        self.test(fd, IOMMU_TEST_OP_DESTROY_ACCESS_PAGES, access, **fields)

    def rw(self, fd, access, iova, data, flags=0):
        """Write bytes by an access, or read as many as ``data`` says; what is in the buffer after it."""
        write = not isinstance(data, int)
        length = len(data) if write else data
        at = self.buffer(data or 1)
        flags |= MOCK_ACCESS_RW_WRITE if write else 0
        fields = {"iova": iova, "length": length, "uptr": at, "flags": flags}
        fields = {f"access_rw__{key}": given for key, given in fields.items()}
        self.test(fd, IOMMU_TEST_OP_ACCESS_RW, access, **fields)
        return self.bytes_at(at, length)

    def pins(self, fd, hva, length, refs):
        """Whether each page behind hva has so many pins."""
        fields = {"check_refs__uptr": hva, "check_refs__length": length, "check_refs__refs": refs}
        try:
            self.test(fd, IOMMU_TEST_OP_MD_CHECK_REFS, **fields)
        except Refused as refused:
            if refused.number == errnos.EIO:
                return False
            raise
        return True

    def memory_limit(self, fd, limit):
        """Bytes that the kernel takes for a batch of pages, everywhere, until it is set again."""
        self.test(fd, IOMMU_TEST_OP_SET_TEMP_MEMORY_LIMIT, memory_limit__limit=limit)

    def add_reserved(self, fd, ioas, start, length):
        fields = {"add_reserved__start": start, "add_reserved__length": length}
        self.test(fd, IOMMU_TEST_OP_ADD_RESERVED, ioas, **fields)

    def check_map(self, fd, hwpt, iova, length, hva):
        """Whether a mock HWPT shows the pages behind hva at iova."""
        fields = {"check_map__iova": iova, "check_map__length": length, "check_map__uptr": hva}
        try:
            self.test(fd, IOMMU_TEST_OP_MD_CHECK_MAP, hwpt, **fields)
        except Refused as refused:
            if refused.number == errnos.EINVAL:
                return False
            raise
        return True


class Extended:
    """A structure with bytes behind it: what a newer program would send."""

    @staticmethod
    def of(struct, fields, tail):
        kind = type(
            "Extended", (ctypes.Structure,), {"_fields_": [("head", struct), ("tail", ctypes.c_uint64)]}
        )
        out = kind(tail=tail)
        out.head = make(struct, fields)
        return out


def make(struct, fields):
    """A structure by its fields, also those whose names begin with two underscores."""
    out = struct()
    kinds = {field[0]: field[1] for field in struct._fields_}
    for name, value in fields.items():
        if isinstance(value, bytes):
            value = kinds[name](*value.ljust(ctypes.sizeof(kinds[name]), b"\0"))
        elif isinstance(value, list):
            value = kinds[name](*value)
        setattr(out, name, value)
    return out


def _requests():
    from iokeep.uapi.copy_struct import IOMMU_IOCTLS, LIVEUPDATE_IOCTLS, VFIO_IOCTLS

    return {
        op.name: (op.request, op.struct)
        for table in (IOMMU_IOCTLS, LIVEUPDATE_IOCTLS, VFIO_IOCTLS)
        for op in table.values()
    }


REQUESTS = _requests()
PAGE_BYTES = os.sysconf("SC_PAGESIZE")
assert PAGE_BYTES == PAGE, "the suite is written for pages of 4 KiB"
__all__ = [
    "Env", "Extended", "FAULT", "FIXED", "FOR_PASIDS", "HUGE", "NEST", "PAGE", "R", "REQUESTS", "RW",
    "Refused", "TRACKED", "ULONG_MAX", "W", "errno_name", "luo", "make", "outcome", "uapi", "vfio",
]  # fmt: skip
