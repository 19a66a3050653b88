# SPDX-License-Identifier: Apache-2.0
"""Layouts of the records that Linux 7.3 leaves in memory, as NumPy structured types with the kernel's
member names.

Sources: ``include/linux/kho/abi/{kexec_handover,block,luo,memfd}.h`` of Linux 7.3. All members are native
little-endian on x86_64; NumPy types state it ("<"), so that a reader on another host agrees.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from iokeep.uapi import kho

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT

#: ``alloc(npages, preserved) -> pa``: ``npages`` contiguous, zeroed 4096-byte frames.
#: ``preserved`` says whether Linux adds these frames to the preserved-memory tree.
Alloc = Callable[[int, bool], int]

KHO_FDT_COMPATIBLE = kho.KHO_FDT_COMPATIBLE
LUO_ABI_COMPATIBLE = kho.LUO_ABI_COMPATIBLE
MEMFD_LUO_FH_COMPATIBLE = kho.MEMFD_LUO_FH_COMPATIBLE
KHO_BLOCK_MAX_BLOCKS = 10000
KHO_METADATA_VERSION = 1
#: include/linux/mmzone.h: the biggest folio that the buddy allocator, and so kho_restore_page(), knows
MAX_PAGE_ORDER = 10
#: kho_vmalloc.flags
KHO_VMALLOC_ALLOC = 1
KHO_VMALLOC_HUGE_VMAP = 2
#: memfd_luo_folio_ser.flags
MEMFD_LUO_FOLIO_DIRTY = 1
MEMFD_LUO_FOLIO_UPTODATE = 2
#: the seals that memfd-v2 carries: SEAL|SHRINK|GROW|WRITE|FUTURE_WRITE|EXEC (include/uapi/linux/fcntl.h)
MEMFD_LUO_ALL_SEALS = 0x3F


def _dtype(struct: type[ctypes.Structure]) -> np.dtype[np.void]:
    """The NumPy type of a kernel structure: same members, offsets and size, little-endian;
    char arrays as bytes.
    """
    fields: Any = struct._fields_
    formats: list[Any] = []
    for _, kind in fields:
        if issubclass(kind, ctypes.Structure):
            formats.append(_dtype(kind))
        elif issubclass(kind, ctypes.Array) and kind._type_ is ctypes.c_char:
            formats.append(f"S{kind._length_}")
        else:
            formats.append(np.dtype(kind).newbyteorder("<"))
    return np.dtype(
        {
            "names": [name for name, _ in fields],
            "formats": formats,
            "offsets": [getattr(struct, name).offset for name, _ in fields],
            "itemsize": ctypes.sizeof(struct),
        }
    )


kho_block_header_ser = _dtype(kho.kho_block_header_ser)
kho_vmalloc = _dtype(kho.kho_vmalloc)
kho_vmalloc_chunk = _dtype(kho.kho_vmalloc_chunk)
kho_kexec_metadata = _dtype(kho.kho_kexec_metadata)
luo_ser = _dtype(kho.luo_ser)
luo_session_ser = _dtype(kho.luo_session_ser)
luo_file_ser = _dtype(kho.luo_file_ser)
luo_flb_header_ser = _dtype(kho.luo_flb_header_ser)
luo_flb_ser = _dtype(kho.luo_flb_ser)
memfd_luo_ser = _dtype(kho.memfd_luo_ser)
#: ``pfn`` (52 bits) and ``flags`` (12 bits above) are one word, ``pfn_flags``
memfd_luo_folio_ser = _dtype(kho.memfd_luo_folio_ser)
#: include/linux/kexec_handover.h, ``struct kho_scratch``: no ABI header of its own in 7.3
kho_scratch = np.dtype([("addr", "<u8"), ("size", "<u8")])

#: entries in one 4096-byte block or page
SESSIONS_PER_BLOCK = (PAGE_SIZE - kho_block_header_ser.itemsize) // luo_session_ser.itemsize
FILES_PER_BLOCK = (PAGE_SIZE - kho_block_header_ser.itemsize) // luo_file_ser.itemsize
FLBS_PER_PAGE = (PAGE_SIZE - luo_flb_header_ser.itemsize) // luo_flb_ser.itemsize
CHUNK_PAGES = 511  # kho_vmalloc_chunk.phys
