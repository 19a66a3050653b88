# SPDX-License-Identifier: Apache-2.0
"""The emulated device of CONFIG_IOMMUFD_TEST for the software kernel: an access behind a descriptor.

From drivers/iommu/iommufd/selftest.c of Linux 7.3.4, iommufd_test_access_*: only the driver is a mock, the
accesses are the software kernel's own.
"""

import errno
from dataclasses import dataclass

from conf_selftest import (
    IOMMU_TEST_OP_ACCESS_PAGES,
    IOMMU_TEST_OP_ACCESS_REPLACE_IOAS,
    IOMMU_TEST_OP_ACCESS_RW,
    IOMMU_TEST_OP_CREATE_ACCESS,
    IOMMU_TEST_OP_DESTROY_ACCESS_PAGES,
    IOMMU_TEST_OP_MD_CHECK_REFS,
    MOCK_ACCESS_RW_SLOW_PATH,
    MOCK_ACCESS_RW_WRITE,
    MOCK_FLAGS_ACCESS_CREATE_NEEDS_PIN_PAGES,
    MOCK_FLAGS_ACCESS_SYZ,
    MOCK_FLAGS_ACCESS_WRITE,
)

from iokeep.soft.kernel.access import Access
from iokeep.soft.kernel.files import File
from iokeep.soft.kernel.frames import FRAME_BYTES
from iokeep.soft.kernel.pages import ULONG_MAX
from iokeep.soft.kernel.syserror import SysError

#: more than this is not tried
_MOST_BYTES = 16 << 20


@dataclass
class Item:
    """Pages that the device has pinned."""

    iova: int
    length: int
    number: int


class AccessFile(File):
    """The descriptor of an emulated device; its driver."""

    kind_name = "mock access"

    def __init__(self, kernel, *, needs_pin_pages):
        super().__init__(kernel, "[iommufd_test_staccess]")
        self.needs_pin_pages = needs_pin_pages
        self.access = None
        self.items = []
        self.next_number = 0

    def unmap(self, iova, length):
        """All that touches the range is unpinned."""
        last = iova + length - 1
        for item in list(self.items):
            if iova <= item.iova + item.length - 1 and last >= item.iova:
                self.items.remove(item)
                self.access.unpin_pages(item.iova, item.length)

    def release(self):
        if self.access is not None:
            self.unmap(0, ULONG_MAX)
            self.access.close()


def _create(ictx, call, cmd):
    flags = cmd.create_access.flags
    if flags & ~MOCK_FLAGS_ACCESS_CREATE_NEEDS_PIN_PAGES:
        raise SysError(errno.EOPNOTSUPP, f"access flags {flags:#x}")
    file = AccessFile(ictx.kernel, needs_pin_pages=bool(flags & MOCK_FLAGS_ACCESS_CREATE_NEEDS_PIN_PAGES))
    access = Access.create(ictx, file)
    try:
        access.attach(cmd.id)
    except SysError:
        access.close()
        file.put()
        raise
    file.access = access
    cmd.create_access.out_access_fd = call.process.install(file)
    call.respond(cmd)


def _staccess(call, fd):
    """iommufd_access_get."""
    file = call.process.fds.get(fd)
    if not isinstance(file, AccessFile):
        raise SysError(errno.EBADFD, f"fd {fd} is no access")
    return file


def _replace_ioas(ictx, call, cmd):
    _staccess(call, cmd.id).access.replace(cmd.access_replace_ioas.ioas_id)


def _syz_iova(access, iova):
    """iommufd_test_syz_conv_iova: the low half of what stands for an IOVA is the number of an area."""
    if access.ioas is None or iova & 0xFFFFFFFF >= len(access.ioas.areas):
        return 0
    return access.ioas.areas[iova & 0xFFFFFFFF].iova + (iova >> 32)


def _frames(call, uptr, pages):
    """get_user_pages: the frame of each page."""
    pfns = []
    for file, offset, part in call.process.resolve(uptr, pages * FRAME_BYTES, write=False):
        pfns += file.fault(offset // FRAME_BYTES, (offset + part - 1) // FRAME_BYTES).tolist()
    return pfns


def _pages(ictx, call, cmd):
    given = cmd.access_pages
    iova, length, flags = given.iova, given.length, given.flags
    if length > _MOST_BYTES:
        raise SysError(errno.ENOMEM, f"{length:#x} bytes")
    if flags & ~(MOCK_FLAGS_ACCESS_WRITE | MOCK_FLAGS_ACCESS_SYZ):
        raise SysError(errno.EOPNOTSUPP, f"flags {flags:#x}")
    file = _staccess(call, cmd.id)
    if not file.needs_pin_pages:
        raise SysError(errno.EOPNOTSUPP, "this access does not pin")
    if flags & MOCK_FLAGS_ACCESS_SYZ:
        iova = _syz_iova(file.access, iova)
    pfns = file.access.pin_pages(iova, length, write=bool(flags & MOCK_FLAGS_ACCESS_WRITE))
    if given.uptr:
        try:
            wanted = _frames(call, given.uptr - iova % FRAME_BYTES, len(pfns))
            if wanted != pfns.tolist():
                raise SysError(errno.EBADE, f"{iova:#x} shows something else")
        except SysError:
            file.access.unpin_pages(iova, length)
            raise
    file.items.append(Item(iova, length, file.next_number))
    given.out_access_pages_id = file.next_number
    file.next_number += 1
    call.respond(cmd)


def _destroy_pages(ictx, call, cmd):
    file = _staccess(call, cmd.id)
    for item in file.items:
        if item.number == cmd.destroy_access_pages.access_pages_id:
            file.items.remove(item)
            file.access.unpin_pages(item.iova, item.length)
            return
    raise SysError(errno.ENOENT, "no such pages")


def _rw(ictx, call, cmd):
    given = cmd.access_rw
    iova, length, flags = given.iova, given.length, given.flags
    if length > _MOST_BYTES:
        raise SysError(errno.ENOMEM, f"{length:#x} bytes")
    if flags & ~(MOCK_ACCESS_RW_WRITE | MOCK_ACCESS_RW_SLOW_PATH | MOCK_FLAGS_ACCESS_SYZ):
        raise SysError(errno.EOPNOTSUPP, f"flags {flags:#x}")
    access = _staccess(call, cmd.id).access
    write, slow = bool(flags & MOCK_ACCESS_RW_WRITE), bool(flags & MOCK_ACCESS_RW_SLOW_PATH)
    data = call.process.copy_from_user(given.uptr, length) if write else b""
    if flags & MOCK_FLAGS_ACCESS_SYZ:
        iova = _syz_iova(access, iova)
    if write:
        access.write(call.process, iova, data, slow=slow)
    else:
        call.process.copy_to_user(given.uptr, access.read(call.process, iova, length, slow=slow))


def _check_refs(ictx, call, cmd):
    """iommufd_test_md_check_refs: every page behind a user mapping has so many pins."""
    uptr, length = cmd.check_refs.uptr, cmd.check_refs.length
    if length % FRAME_BYTES or uptr % FRAME_BYTES or uptr + length > ULONG_MAX:
        raise SysError(errno.EINVAL, "not in pages")
    for pfn in _frames(call, uptr, length // FRAME_BYTES) if length else ():
        if ictx.kernel.frames.pin_count[pfn] != cmd.check_refs.refs:
            raise SysError(errno.EIO, f"frame {pfn:#x} has another number of pins")


OPS = {
    IOMMU_TEST_OP_MD_CHECK_REFS: _check_refs,
    IOMMU_TEST_OP_CREATE_ACCESS: _create,
    IOMMU_TEST_OP_DESTROY_ACCESS_PAGES: _destroy_pages,
    IOMMU_TEST_OP_ACCESS_PAGES: _pages,
    IOMMU_TEST_OP_ACCESS_RW: _rw,
    IOMMU_TEST_OP_ACCESS_REPLACE_IOAS: _replace_ioas,
}
