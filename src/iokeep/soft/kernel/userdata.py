# SPDX-License-Identifier: Apache-2.0
"""Structures of an IOMMU driver in the memory of a caller: one, or an array of them.

Follows include/linux/iommu.h of Linux 7.3: struct iommu_user_data, struct iommu_user_data_array, and the
helpers iommu_copy_struct_*; iommufd passes them on without a look inside.
"""

from __future__ import annotations

import ctypes
import errno
from dataclasses import dataclass
from typing import TypeVar

from iokeep.soft.kernel.process import Process
from iokeep.soft.kernel.syserror import SysError
from iokeep.uapi.copy_struct import end_of

_Struct = TypeVar("_Struct", bound=ctypes.Structure)


def _copy(process: Process, struct: type[_Struct], uptr: int, length: int) -> _Struct:
    """copy_struct_from_user: a shorter structure is filled up with zeros.

    :raises SysError: E2BIG: bytes behind it that are not zero; EFAULT.
    """
    raw = process.copy_from_user(uptr, length) if length else b""
    known = ctypes.sizeof(struct)
    if any(raw[known:]):
        raise SysError(errno.E2BIG, f"{struct.__name__} of {length} bytes: those behind {known} are not zero")
    out = struct()
    ctypes.memmove(ctypes.addressof(out), raw, min(length, known))
    return out


def _bounded(struct: type[ctypes.Structure], length: int, first: str) -> None:
    if not end_of(struct, first) <= length <= ctypes.sizeof(struct):
        raise SysError(
            errno.EINVAL,
            f"{struct.__name__} of {length} bytes, not {end_of(struct, first)} to {ctypes.sizeof(struct)}",
        )


def _typed(given: int, wanted: int) -> None:
    if given != wanted:
        raise SysError(errno.EINVAL, f"data of type {given:#x}, not {wanted:#x}")


@dataclass(frozen=True, slots=True)
class UserData:
    """One structure of ``length`` bytes at ``uptr``, of a driver's type."""

    process: Process
    data_type: int
    uptr: int
    length: int

    def read(self, struct: type[_Struct], wanted: int, first: str) -> _Struct:
        """iommu_copy_struct_from_user. :param first: the last field that its first version had.

        :raises SysError: EINVAL: of another type, too short, or longer than this kernel knows; EFAULT.
        """
        _typed(self.data_type, wanted)
        _bounded(struct, self.length, first)
        return _copy(self.process, struct, self.uptr, self.length)

    def write(self, value: ctypes.Structure) -> None:
        """iommu_copy_struct_to_user, of a structure that was read from here. :raises SysError: EFAULT."""
        self.process.copy_to_user(self.uptr, bytes(value)[: self.length])


@dataclass(slots=True)
class UserArray:
    """``entry_num`` structures of ``entry_len`` bytes each, from ``uptr`` on. ``done``: how many a driver has
    dealt with; it says so also where it fails.
    """

    process: Process
    data_type: int
    uptr: int
    entry_len: int
    entry_num: int
    done: int = 0

    def entry(self, index: int, struct: type[_Struct], wanted: int, first: str) -> _Struct:
        """iommu_copy_struct_from_user_array; see :meth:`UserData.read`."""
        at = self.uptr + index * self.entry_len
        return UserData(self.process, self.data_type, at, self.entry_len).read(struct, wanted, first)

    def whole(self, struct: type[_Struct], wanted: int) -> list[_Struct]:
        """iommu_copy_struct_from_full_user_array: entries of any length. :raises SysError: EINVAL: of another
        type, or none; E2BIG, EFAULT.
        """
        _typed(self.data_type, wanted)
        if not self.entry_num:
            raise SysError(errno.EINVAL, "an array of nothing")
        if self.entry_len == ctypes.sizeof(struct):
            raw = self.process.copy_from_user(self.uptr, self.entry_num * self.entry_len)
            return [struct.from_buffer_copy(raw, at) for at in range(0, len(raw), self.entry_len)]
        return [
            _copy(self.process, struct, self.uptr + index * self.entry_len, self.entry_len)
            for index in range(self.entry_num)
        ]
