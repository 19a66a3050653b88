# SPDX-License-Identifier: Apache-2.0
"""Layouts of the records that Linux 7.3 leaves in memory, as NumPy structured types with the kernel's
member names.

Sources: ``include/linux/kho/abi/{kexec_handover,block,luo,memfd}.h`` of Linux 7.3. All members are native
little-endian on x86_64; NumPy types state it ("<"), so that a reader on another host agrees.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT

#: ``alloc(npages, preserved) -> pa``: ``npages`` contiguous, zeroed 4096-byte frames.
#: ``preserved`` says whether Linux adds these frames to the preserved-memory tree.
Alloc = Callable[[int, bool], int]

KHO_FDT_COMPATIBLE = "kho-v4"
KHO_FDT_MEMORY_MAP_PROP_NAME = "preserved-memory-map"
KHO_SUB_TREE_PROP_NAME = "preserved-data"
KHO_SUB_TREE_SIZE_PROP_NAME = "blob-size"
KHO_METADATA_NODE_NAME = "kexec-metadata"
LUO_KHO_ENTRY_NAME = "LUO"
LUO_ABI_COMPATIBLE = "luo-v5"
MEMBLOCK_KHO_FDT = "memblock"
MEMBLOCK_KHO_NODE_COMPATIBLE = "memblock-v1"
RESERVE_MEM_KHO_NODE_COMPATIBLE = "reserve-mem-v1"
MEMFD_LUO_FH_COMPATIBLE = "memfd-v2"

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
#: the seals that memfd-v2 carries: F_SEAL_SEAL|SHRINK|GROW|WRITE|FUTURE_WRITE|EXEC
#: (include/uapi/linux/fcntl.h)
MEMFD_LUO_ALL_SEALS = 0x3F
MEMFD_PFN_MASK = (1 << 52) - 1

kho_block_header_ser = np.dtype([("next", "<u8"), ("count", "<u8")])
kho_vmalloc = np.dtype([("first", "<u8"), ("total_pages", "<u4"), ("flags", "<u2"), ("order", "<u2")])
kho_vmalloc_chunk = np.dtype([("next", "<u8"), ("phys", "<u8", (511,))])
kho_kexec_metadata = np.dtype([("version", "<u4"), ("previous_release", "S65"), ("kexec_count", "<u4")])
luo_ser = np.dtype(
    [("compatible", "S8"), ("liveupdate_num", "<u8"), ("sessions_pa", "<u8"), ("flbs_pa", "<u8")]
)
luo_file_set_ser = np.dtype([("files", "<u8"), ("count", "<u8")])
luo_session_ser = np.dtype([("name", "S64"), ("file_set_ser", luo_file_set_ser)])
luo_file_ser = np.dtype([("compatible", "S48"), ("data", "<u8"), ("token", "<u8")])
luo_flb_header_ser = np.dtype([("pgcnt", "<u8"), ("count", "<u8")])
luo_flb_ser = np.dtype([("name", "S48"), ("data", "<u8"), ("count", "<u8")])
memfd_luo_ser = np.dtype(
    [
        ("pos", "<u8"),
        ("size", "<u8"),
        ("seals", "<u4"),
        ("flags", "<u4"),
        ("nr_folios", "<u8"),
        ("folios", kho_vmalloc),
    ]
)
#: ``pfn`` is a bit-field of 52 bits with 12 bits of flags above it: kept as one word, split by masks
memfd_luo_folio_ser = np.dtype([("pfn_flags", "<u8"), ("index", "<u8")])

#: entries in one 4096-byte block or page
SESSIONS_PER_BLOCK = (PAGE_SIZE - kho_block_header_ser.itemsize) // luo_session_ser.itemsize
FILES_PER_BLOCK = (PAGE_SIZE - kho_block_header_ser.itemsize) // luo_file_ser.itemsize
FLBS_PER_PAGE = (PAGE_SIZE - luo_flb_header_ser.itemsize) // luo_flb_ser.itemsize
FOLIOS_PER_PAGE = PAGE_SIZE // memfd_luo_folio_ser.itemsize
CHUNK_PAGES = 511
