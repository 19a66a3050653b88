# SPDX-License-Identifier: Apache-2.0
"""/dev/iommu: the file, its objects, and one function for each ioctl.

Each function follows the one of the same name in drivers/iommu/iommufd of Linux 7.3 (ioas.c, device.c,
vfio_compat.c; those of hw_pagetable.c, eventq.c and viommu.c are in hwpt.py, eventq.py and viommu.py), so
that the same call fails for the same reason with the same errno.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from iokeep.mem.ranges import Range
from iokeep.pt.extents import PROT_R, PROT_W
from iokeep.soft.kernel.device import IommufdDevice
from iokeep.soft.kernel.eventq import iommufd_fault_alloc, iommufd_veventq_alloc
from iokeep.soft.kernel.files import File, Ioctl
from iokeep.soft.kernel.frames import FRAME_BYTES, I64, Claim
from iokeep.soft.kernel.hwpt import (
    HwptPaging,
    iommufd_hwpt_alloc,
    iommufd_hwpt_get_dirty_bitmap,
    iommufd_hwpt_invalidate,
    iommufd_hwpt_set_dirty_tracking,
)
from iokeep.soft.kernel.ioas import Ioas, Piece, unmap_last
from iokeep.soft.kernel.memlock import account_of, hand_over
from iokeep.soft.kernel.mmaps import Mmaps
from iokeep.soft.kernel.objects import IommufdObject
from iokeep.soft.kernel.pages import ULONG_MAX, Pages
from iokeep.soft.kernel.process import Backing, Vma, backing_of
from iokeep.soft.kernel.syserror import SysError
from iokeep.soft.kernel.vfio_compat import vfio_ioctl
from iokeep.soft.kernel.viommu import (
    Viommu,
    iommufd_hw_queue_alloc_ioctl,
    iommufd_vdevice_alloc_ioctl,
    iommufd_viommu_alloc_ioctl,
)
from iokeep.uapi import iommufd as uapi
from iokeep.uapi.copy_struct import IOMMU_IOCTLS, copy_struct_in

if TYPE_CHECKING:
    from iokeep.soft.kernel.kernel import Kernel
    from iokeep.soft.kernel.process import Process

_MAP_FLAGS = uapi.IOMMU_IOAS_MAP_FIXED_IOVA | uapi.IOMMU_IOAS_MAP_WRITEABLE | uapi.IOMMU_IOAS_MAP_READABLE
#: ranges that one IOAS_ALLOW_IOVAS may bring; Linux has no bound but its memory
_MAX_RANGES = 1 << 16


class Iommufd(File):
    """An open /dev/iommu (struct iommufd_ctx).

    ``objects`` id -> object. ``preserved``: a live update session holds it: IOASes cannot change (EBUSY).
    """

    kind_name = "iommufd"

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel, "iommufd")
        self.objects: dict[int, IommufdObject] = {}
        self.preserved = False
        self.account_mm = False
        self.vfio_ioas: Ioas | None = None
        self.mmaps = Mmaps()
        self._lowest = 1
        #: ids of objects that the kernel had to destroy: nobody else gets them
        self._tombstones: set[int] = set()

    # ---- objects (main.c)

    def add(self, item: IommufdObject) -> int:
        """List an object under the lowest free id (XA_FLAGS_ALLOC1); the id."""
        number = self._lowest
        while number in self.objects or number in self._tombstones:
            number += 1
        self._lowest = number + 1
        self.objects[number] = item
        item.id = number
        return number

    def find(self, number: int) -> IommufdObject:
        """iommufd_get_object for any type. :raises SysError: ENOENT."""
        item = self.objects.get(number)
        if item is None:
            raise SysError(errno.ENOENT, f"iommufd has no object {number}")
        return item

    def ioas(self, number: int) -> Ioas:
        """:raises SysError: ENOENT."""
        item = self.find(number)
        if not isinstance(item, Ioas):
            raise SysError(errno.ENOENT, f"{item.type_name} {number} is no IOAS")
        return item

    def hwpt(self, number: int) -> HwptPaging:
        """:raises SysError: ENOENT."""
        item = self.find(number)
        if not isinstance(item, HwptPaging):
            raise SysError(errno.ENOENT, f"{item.type_name} {number} is no paging HWPT")
        return item

    def device(self, number: int) -> IommufdDevice:
        """:raises SysError: ENOENT."""
        item = self.find(number)
        if not isinstance(item, IommufdDevice):
            raise SysError(errno.ENOENT, f"{item.type_name} {number} is no device")
        return item

    def viommu(self, number: int) -> Viommu:
        """:raises SysError: ENOENT."""
        item = self.find(number)
        if not isinstance(item, Viommu):
            raise SysError(errno.ENOENT, f"{item.type_name} {number} is no vIOMMU")
        return item

    def bury(self, number: int) -> None:
        """iommufd_object_tombstone_user: destroy an object that its owner may not know to be gone; its id is
        not used again. :raises SysError: EBUSY.
        """
        self.remove(number)
        self._tombstones.add(number)

    @property
    def empty(self) -> bool:
        """There are no objects, and were none that had to be destroyed."""
        return not self.objects and not self._tombstones

    def remove(self, number: int) -> None:
        """iommufd_object_remove: destroy an object that nobody else uses. :raises SysError: ENOENT, EBUSY."""
        item = self.find(number)
        if item.users != 1:
            raise SysError(errno.EBUSY, f"{item.type_name} {number} has {item.users - 1} users")
        self._drop(number)

    def unlist(self, item: IommufdObject) -> None:
        """iommufd_object_abort: the object was never finished; its id is free again."""
        del self.objects[item.id]
        self._lowest = min(self._lowest, item.id)

    def _drop(self, number: int) -> None:
        item = self.objects[number]
        self.unlist(item)
        item.destroy()

    def forget_compat(self, ioas: Ioas) -> None:
        """The compat IOAS is destroyed."""
        if self.vfio_ioas is ioas:
            self.vfio_ioas = None

    def release(self) -> None:
        """iommufd_fops_release: leaves of the graph of users first, until nothing is left."""
        while self.objects:
            dropped = False
            for number in sorted(self.objects):
                # one that goes may take others along
                if number in self.objects and self.objects[number].users == 1:
                    self._drop(number)
                    dropped = True
            if not dropped:
                names = ", ".join(f"{item.type_name} {number}" for number, item in self.objects.items())
                raise AssertionError(f"iommufd released with objects in use: {names}")

    def claims(self) -> Iterable[Claim]:
        """The pins of every IOAS, and those of accesses."""
        for item in self.objects.values():
            yield from item.claims()
        # pages that copies share are in several IOASes
        held = {
            id(area.pages): area.pages
            for item in self.objects.values()
            if isinstance(item, Ioas)
            for area in item.areas
            if area.accesses
        }
        for pages in held.values():
            yield from pages.claims()

    # ---- mmap

    def map_pages(self, offset: int, length: int, *, writable: bool) -> tuple[I64 | None, Backing]:
        """iommufd_fops_mmap. :raises SysError: ENXIO."""
        pfns = self.mmaps.map(offset, length)
        self.kernel.frames.get(pfns)
        return pfns, backing_of(pfns)

    def unmapped(self, vma: Vma) -> None:
        """iommufd_fops_vma_close."""
        self.mmaps.unmapped(vma.offset)

    # ---- ioctl

    def ioctl(self, call: Ioctl) -> int:
        """iommufd_fops_ioctl. :raises SysError: ENOTTY for what is in no table."""
        handler = _HANDLERS.get(call.request)
        if handler is None:
            return vfio_ioctl(self, call)
        try:
            cmd = copy_struct_in(IOMMU_IOCTLS[call.request].struct, call.raw)
        except OSError as error:
            raise SysError(error.errno or errno.EFAULT, str(error)) from error
        return handler(self, call, cmd) or 0


def open_iommu(process: Process) -> File:
    """open("/dev/iommu")."""
    return Iommufd(process.kernel)


def _reserved(cmd: Any, *names: str) -> None:
    for name in names or ("__reserved",):
        if getattr(cmd, name):
            raise SysError(errno.EOPNOTSUPP, f"{type(cmd).__name__}.{name} is not 0")


# ---- IOAS (ioas.c)


def iommufd_destroy(ictx: Iommufd, call: Ioctl, cmd: uapi.iommu_destroy) -> None:
    """IOMMU_DESTROY."""
    if isinstance(ictx.objects.get(cmd.id), Ioas) and ictx.objects[cmd.id].users == 1:
        ictx.ioas(cmd.id).check_mutable()
    ictx.remove(cmd.id)


def iommufd_ioas_alloc_ioctl(ictx: Iommufd, call: Ioctl, cmd: uapi.iommu_ioas_alloc) -> None:
    """IOMMU_IOAS_ALLOC."""
    if cmd.flags:
        raise SysError(errno.EOPNOTSUPP, f"IOAS_ALLOC flags {cmd.flags:#x}")
    cmd.out_ioas_id = ictx.add(Ioas(ictx))
    call.respond(cmd)


def iommufd_ioas_iova_ranges(ictx: Iommufd, call: Ioctl, cmd: uapi.iommu_ioas_iova_ranges) -> None:
    """IOMMU_IOAS_IOVA_RANGES; too small an array gets what fits, the number needed, and EMSGSIZE."""
    _reserved(cmd)
    ioas = ictx.ioas(cmd.ioas_id)
    ranges = ioas.holes()
    room = cmd.num_iovas
    fits = ranges[:room]
    if fits:
        rows = (uapi.iommu_iova_range * len(fits))()
        for row, hole in zip(rows, fits, strict=True):
            row.start, row.last = hole.start, hole.last
        call.process.copy_to_user(cmd.allowed_iovas, bytes(rows))
    cmd.num_iovas = len(ranges)
    cmd.out_iova_alignment = ioas.iova_alignment
    call.respond(cmd)
    if len(ranges) > room:
        raise SysError(
            errno.EMSGSIZE, f"IOAS {ioas.id} has {len(ranges)} ranges, there is room for {room}", respond=True
        )


def iommufd_ioas_allow_iovas(ictx: Iommufd, call: Ioctl, cmd: uapi.iommu_ioas_allow_iovas) -> None:
    """IOMMU_IOAS_ALLOW_IOVAS."""
    _reserved(cmd)
    ioas = ictx.ioas(cmd.ioas_id)
    if cmd.num_iovas > _MAX_RANGES:
        raise SysError(errno.ENOMEM, f"ALLOW_IOVAS of {cmd.num_iovas} ranges")
    size = ctypes.sizeof(uapi.iommu_iova_range)
    allowed: list[Range] = []
    if cmd.num_iovas:
        raw = call.process.copy_from_user(cmd.allowed_iovas, cmd.num_iovas * size)
        for at in range(0, len(raw), size):
            row = uapi.iommu_iova_range.from_buffer_copy(raw, at)
            if row.start >= row.last:
                raise SysError(errno.EINVAL, f"allowed range {row.start:#x} ... {row.last:#x}")
            allowed.append(Range(row.start, row.last))
        ordered = sorted(allowed)
        for a, b in pairwise(ordered):
            if b.start <= a.last:
                raise SysError(errno.EINVAL, f"allowed ranges overlap at {b.start:#x}")
    ioas.set_allowed(allowed)


def _map_prot(flags: int) -> int:
    """conv_iommu_prot, and the checks on flags that MAP, MAP_FILE and COPY share after the overflow check."""
    prot = 0
    if flags & uapi.IOMMU_IOAS_MAP_READABLE:
        prot |= PROT_R
    if flags & uapi.IOMMU_IOAS_MAP_WRITEABLE:
        prot |= PROT_W
    if not prot:
        raise SysError(errno.EINVAL, "a mapping that can neither be read nor written")
    return prot


def _map_flags(flags: int) -> None:
    if flags & ~_MAP_FLAGS:
        raise SysError(errno.EOPNOTSUPP, f"map flags {flags:#x}")


def _below_max(**values: int) -> None:
    for name, value in values.items():
        if value >= ULONG_MAX:
            raise SysError(errno.EOVERFLOW, f"{name} {value:#x}")


def iommufd_ioas_map(ictx: Iommufd, call: Ioctl, cmd: uapi.iommu_ioas_map) -> None:
    """IOMMU_IOAS_MAP."""
    _map_flags(cmd.flags)
    _reserved(cmd)
    _below_max(iova=cmd.iova, length=cmd.length)
    prot = _map_prot(cmd.flags)
    ioas = ictx.ioas(cmd.ioas_id)
    iova = cmd.iova if cmd.flags & uapi.IOMMU_IOAS_MAP_FIXED_IOVA else None
    cmd.iova = ioas.map_user(call.process, cmd.user_va, cmd.length, iova, prot)
    call.respond(cmd)


def iommufd_ioas_map_file(ictx: Iommufd, call: Ioctl, cmd: uapi.iommu_ioas_map_file) -> None:
    """IOMMU_IOAS_MAP_FILE. The file is only looked at when its pages are pinned: once a domain shows the
    IOAS.
    """
    _map_flags(cmd.flags)
    _below_max(iova=cmd.iova, length=cmd.length)
    prot = _map_prot(cmd.flags)
    ioas = ictx.ioas(cmd.ioas_id)
    # iopt_map_file_pages
    if not cmd.length:
        raise SysError(errno.EINVAL, "MAP_FILE of nothing")
    if cmd.start + cmd.length - 1 > ULONG_MAX:
        raise SysError(errno.EOVERFLOW, f"start {cmd.start:#x} + {cmd.length:#x}")
    file = call.process.file(cmd.fd)
    start_byte = cmd.start % FRAME_BYTES
    pages = Pages(
        ictx.kernel,
        start_byte,
        cmd.length,
        writable=bool(prot & PROT_W),
        process=call.process,
        account=account_of(call.process, by_process=ictx.account_mm),
        file=file,
        offset=cmd.start - start_byte,
    )
    iova = cmd.iova if cmd.flags & uapi.IOMMU_IOAS_MAP_FIXED_IOVA else None
    cmd.iova = ioas.map_pieces([Piece(pages, start_byte, cmd.length)], cmd.length, iova, prot)
    call.respond(cmd)


def iommufd_ioas_copy(ictx: Iommufd, call: Ioctl, cmd: uapi.iommu_ioas_copy) -> None:
    """IOMMU_IOAS_COPY: any contiguously mapped range, parts of areas too."""
    _map_flags(cmd.flags)
    _below_max(length=cmd.length, src_iova=cmd.src_iova, dst_iova=cmd.dst_iova)
    prot = _map_prot(cmd.flags)
    pieces = ictx.ioas(cmd.src_ioas_id).pieces_of(cmd.src_iova, cmd.length)
    try:
        target = ictx.ioas(cmd.dst_ioas_id)
    except SysError:
        for piece in pieces:
            piece.pages.put()
        raise
    iova = cmd.dst_iova if cmd.flags & uapi.IOMMU_IOAS_MAP_FIXED_IOVA else None
    cmd.dst_iova = target.map_pieces(pieces, cmd.length, iova, prot)
    call.respond(cmd)


def iommufd_ioas_unmap(ictx: Iommufd, call: Ioctl, cmd: uapi.iommu_ioas_unmap) -> None:
    """IOMMU_IOAS_UNMAP."""
    ioas = ictx.ioas(cmd.ioas_id)
    everything = cmd.iova == 0 and cmd.length == ULONG_MAX
    last = ULONG_MAX
    if not everything:
        _below_max(iova=cmd.iova, length=cmd.length)
        last = unmap_last(cmd.iova, cmd.length)
    cmd.length, error = ioas.unmap(cmd.iova, last)
    if error is not None:
        raise error
    if not cmd.length and not everything:
        raise SysError(errno.ENOENT, f"IOAS {ioas.id}: nothing is mapped in {cmd.iova:#x} ... {last:#x}")
    call.respond(cmd)


def iommufd_ioas_change_process(ictx: Iommufd, call: Ioctl, cmd: uapi.iommu_ioas_change_process) -> None:
    """IOMMU_IOAS_CHANGE_PROCESS: only where every mapping is of a file: no page belongs to a process."""
    _reserved(cmd)
    areas = [area for item in ictx.objects.values() if isinstance(item, Ioas) for area in item.areas]
    for area in areas:
        if area.pages.file is None:
            raise SysError(
                errno.EINVAL, f"IOAS {area.ioas.id}: {area.iova:#x} maps user memory, not a file: unmap it"
            )
    hand_over((area.pages for area in areas), call.process)


def iommufd_option(ictx: Iommufd, call: Ioctl, cmd: uapi.iommu_option) -> None:
    """IOMMU_OPTION."""
    _reserved(cmd)
    if cmd.option_id == uapi.IOMMU_OPTION_RLIMIT_MODE:
        _option_rlimit_mode(ictx, call, cmd)
    elif cmd.option_id == uapi.IOMMU_OPTION_HUGE_PAGES:
        _option_huge_pages(ictx.ioas(cmd.object_id), cmd)
    else:
        raise SysError(errno.EOPNOTSUPP, f"option {cmd.option_id}")
    call.respond(cmd)


def _option_rlimit_mode(ictx: Iommufd, call: Ioctl, cmd: uapi.iommu_option) -> None:
    if cmd.object_id:
        raise SysError(errno.EOPNOTSUPP, "RLIMIT_MODE is no option of an object")
    if cmd.op == uapi.IOMMU_OPTION_OP_GET:
        cmd.val64 = int(ictx.account_mm)
    elif cmd.op == uapi.IOMMU_OPTION_OP_SET:
        if not call.process.privileged:
            raise SysError(errno.EPERM, "RLIMIT_MODE needs CAP_SYS_RESOURCE")
        if not ictx.empty:
            raise SysError(errno.EBUSY, "RLIMIT_MODE can only be set before there are objects")
        if cmd.val64 not in (0, 1):
            raise SysError(errno.EINVAL, f"RLIMIT_MODE {cmd.val64}")
        ictx.account_mm = bool(cmd.val64)
    else:
        raise SysError(errno.EOPNOTSUPP, f"option op {cmd.op}")


def _option_huge_pages(ioas: Ioas, cmd: uapi.iommu_option) -> None:
    if cmd.op == uapi.IOMMU_OPTION_OP_GET:
        cmd.val64 = int(not ioas.disable_large_pages)
    elif cmd.op == uapi.IOMMU_OPTION_OP_SET:
        if cmd.val64 not in (0, 1):
            raise SysError(errno.EINVAL, f"HUGE_PAGES {cmd.val64}")
        ioas.set_huge_pages(bool(cmd.val64))
    else:
        raise SysError(errno.EOPNOTSUPP, f"option op {cmd.op}")


def iommufd_vfio_ioas(ictx: Iommufd, call: Ioctl, cmd: uapi.iommu_vfio_ioas) -> None:
    """IOMMU_VFIO_IOAS."""
    _reserved(cmd)
    if cmd.op == uapi.IOMMU_VFIO_IOAS_GET:
        if ictx.vfio_ioas is None:
            raise SysError(errno.ENODEV, "no compat IOAS")
        cmd.ioas_id = ictx.vfio_ioas.id
        call.respond(cmd)
    elif cmd.op == uapi.IOMMU_VFIO_IOAS_SET:
        ictx.vfio_ioas = ictx.ioas(cmd.ioas_id)
    elif cmd.op == uapi.IOMMU_VFIO_IOAS_CLEAR:
        ictx.vfio_ioas = None
    else:
        raise SysError(errno.EOPNOTSUPP, f"VFIO_IOAS op {cmd.op}")


def iommufd_ioas_noiommu_get_pa(ictx: Iommufd, call: Ioctl, cmd: uapi.iommu_ioas_noiommu_get_pa) -> None:
    """IOMMU_IOAS_NOIOMMU_GET_PA: there is an IOMMU, so no IOAS is a noiommu one."""
    if not call.process.privileged:
        raise SysError(errno.EPERM, "NOIOMMU_GET_PA needs CAP_SYS_RAWIO")
    if cmd.flags:
        raise SysError(errno.EOPNOTSUPP, f"NOIOMMU_GET_PA flags {cmd.flags:#x}")
    _reserved(cmd)
    if not cmd.length:
        raise SysError(errno.EINVAL, "NOIOMMU_GET_PA of nothing")
    _below_max(iova=cmd.iova)
    ioas = ictx.ioas(cmd.ioas_id)
    if ioas.area_at(cmd.iova, cmd.iova) is None:
        raise SysError(errno.ENOENT, f"nothing is mapped at {cmd.iova:#x}")
    raise SysError(errno.EOPNOTSUPP, f"IOAS {ioas.id} is behind an IOMMU")


# ---- devices (device.c)


def iommufd_get_hw_info(ictx: Iommufd, call: Ioctl, cmd: uapi.iommu_hw_info) -> None:
    """IOMMU_GET_HW_INFO."""
    if cmd.flags & ~uapi.IOMMU_HW_INFO_FLAG_INPUT_TYPE or any(getattr(cmd, "__reserved")):
        raise SysError(errno.EOPNOTSUPP, f"GET_HW_INFO flags {cmd.flags:#x}")
    wanted = cmd.in_data_type if cmd.flags & uapi.IOMMU_HW_INFO_FLAG_INPUT_TYPE else 0
    idev = ictx.device(cmd.dev_id)
    own_type, data = idev.iommu.hw_info()
    if wanted not in (uapi.IOMMU_HW_INFO_TYPE_DEFAULT, own_type):
        raise SysError(errno.EOPNOTSUPP, f"hardware info of type {wanted} from an IOMMU of type {own_type}")
    if cmd.data_len:
        out = data[: cmd.data_len]
        # trailing bytes of a bigger buffer are zeroed; what is written at once is bounded here
        call.process.copy_to_user(cmd.data_uptr, out)
        at, left = cmd.data_uptr + len(out), cmd.data_len - len(out)
        while left > 0:
            n = min(left, 1 << 20)
            call.process.copy_to_user(at, bytes(n))
            at, left = at + n, left - n
    cmd.data_len = len(data)
    cmd.out_data_type = own_type
    cmd.out_capabilities = 0 if idev.dev.has_ats else uapi.IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED
    if idev.iommu.tracks_dirty(idev.dev):
        cmd.out_capabilities |= uapi.IOMMU_HW_CAP_DIRTY_TRACKING
    cmd.out_max_pasid_log2 = max(0, idev.dev.max_pasids.bit_length() - 1)
    call.respond(cmd)


_Handler = Callable[[Iommufd, Ioctl, Any], int | None]

_HANDLERS: dict[int, _Handler] = {
    uapi.IOMMU_DESTROY: iommufd_destroy,
    uapi.IOMMU_IOAS_ALLOC: iommufd_ioas_alloc_ioctl,
    uapi.IOMMU_IOAS_ALLOW_IOVAS: iommufd_ioas_allow_iovas,
    uapi.IOMMU_IOAS_COPY: iommufd_ioas_copy,
    uapi.IOMMU_IOAS_IOVA_RANGES: iommufd_ioas_iova_ranges,
    uapi.IOMMU_IOAS_MAP: iommufd_ioas_map,
    uapi.IOMMU_IOAS_UNMAP: iommufd_ioas_unmap,
    uapi.IOMMU_OPTION: iommufd_option,
    uapi.IOMMU_VFIO_IOAS: iommufd_vfio_ioas,
    uapi.IOMMU_HWPT_ALLOC: iommufd_hwpt_alloc,
    uapi.IOMMU_GET_HW_INFO: iommufd_get_hw_info,
    uapi.IOMMU_HWPT_SET_DIRTY_TRACKING: iommufd_hwpt_set_dirty_tracking,
    uapi.IOMMU_HWPT_GET_DIRTY_BITMAP: iommufd_hwpt_get_dirty_bitmap,
    uapi.IOMMU_HWPT_INVALIDATE: iommufd_hwpt_invalidate,
    uapi.IOMMU_FAULT_QUEUE_ALLOC: iommufd_fault_alloc,
    uapi.IOMMU_IOAS_MAP_FILE: iommufd_ioas_map_file,
    uapi.IOMMU_VIOMMU_ALLOC: iommufd_viommu_alloc_ioctl,
    uapi.IOMMU_VDEVICE_ALLOC: iommufd_vdevice_alloc_ioctl,
    uapi.IOMMU_IOAS_CHANGE_PROCESS: iommufd_ioas_change_process,
    uapi.IOMMU_VEVENTQ_ALLOC: iommufd_veventq_alloc,
    uapi.IOMMU_HW_QUEUE_ALLOC: iommufd_hw_queue_alloc_ioctl,
    uapi.IOMMU_IOAS_NOIOMMU_GET_PA: iommufd_ioas_noiommu_get_pa,
}
