# SPDX-License-Identifier: Apache-2.0
"""Preserved vmalloc areas: chunks of {next pa, 511 pas}, ended by a zero (``struct kho_vmalloc`` in
``include/linux/kho/abi/kexec_handover.h``; ``kho_restore_vmalloc()`` in
``kernel/liveupdate/kexec_handover.c``).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from iokeep.handover import abi
from iokeep.handover.abi import PAGE_SIZE
from iokeep.handover.trail import Trail


def read_vmalloc(trail: Trail, area: NDArray[np.void], wanted: int, what: str) -> bytes:
    """The first ``wanted`` bytes of the area, or fewer, and a problem, where it is broken or shorter.

    :param area: one ``kho_vmalloc``.
    :raises MemoryAbsent: a chunk or a page is not in this source.
    """
    first, total = int(area["first"]), int(area["total_pages"])
    order, flags = int(area["order"]), int(area["flags"])
    if flags & ~(abi.KHO_VMALLOC_ALLOC | abi.KHO_VMALLOC_HUGE_VMAP):
        trail.problem(f"{what}: vmalloc flags {flags:#x} are unknown")
    if order > abi.MAX_PAGE_ORDER:
        trail.problem(f"{what}: vmalloc order {order} is more than {abi.MAX_PAGE_ORDER}")
        return b""
    if wanted > total * PAGE_SIZE:
        trail.problem(f"{what}: {wanted} bytes do not fit into vmalloc of {total} pages")
    each = 1 << order
    if total * PAGE_SIZE >= wanted + each * PAGE_SIZE:
        trail.problem(f"{what}: vmalloc of {total} pages is more than {wanted} bytes need")
        return b""
    out: list[bytes] = []
    pa, found, number, left = first, 0, 0, wanted
    while pa:
        if not trail.claim(pa, f"{what} vmalloc chunk {number}"):
            return b"".join(out)
        chunk = np.frombuffer(trail.page(pa), abi.kho_vmalloc_chunk, 1)[0]
        phys = chunk["phys"]
        used = int(np.argmin(phys)) if not phys.all() else abi.CHUNK_PAGES
        for entry in phys[:used]:
            if found + each > total:
                trail.problem(f"{what}: vmalloc chunk {pa:#x} lists more than {total} pages: restore fails")
                return b"".join(out)
            for part in range(each):
                frame = int(entry) + part * PAGE_SIZE
                if not trail.claim(frame, f"{what} vmalloc page {found + part}"):
                    return b"".join(out)
                if left > 0:
                    out.append(trail.page(frame)[:left])
                    left -= len(out[-1])
            found += each
        pa, number = int(chunk["hdr"]["next"]), number + 1
    if found != total:
        trail.problem(f"{what}: vmalloc chunks list {found} pages, total_pages is {total}: restore fails")
    return b"".join(out)
