# SPDX-License-Identifier: Apache-2.0
"""Smaller clients of KHO: kexec-metadata, memblock's reserve_mem regions, and the array of scratch areas."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from iokeep.errors import InputError, MemoryAbsent
from iokeep.handover import abi, fdt
from iokeep.handover.abi import PAGE_SIZE
from iokeep.handover.trail import Trail
from iokeep.mem.memory import Memory
from iokeep.uapi import kho

#: the biggest sub-blob that is read, and the most scratch areas (one per NUMA node and two more)
MAX_BLOB = 64 * PAGE_SIZE
MAX_SCRATCH = 1026


@dataclass(frozen=True, slots=True)
class KexecMetadata:
    """``kho_kexec_metadata``: the kernel that handed over, and how many kexecs there were before and with
    this.
    """

    version: int
    previous_release: str
    kexec_count: int


@dataclass(frozen=True, slots=True)
class ReservedMem:
    """A ``reserve_mem=`` region: ``start`` pa and ``size`` bytes."""

    name: str
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Scratch:
    """A scratch area, where the next kernel boots; size 0 is legal."""

    pa: int
    size: int


def read_kexec_metadata(trail: Trail, pa: int, blob_size: int) -> KexecMetadata | None:
    """``kexec-metadata``; None, and a problem, where it cannot be read."""
    if blob_size < abi.kho_kexec_metadata.itemsize:
        trail.problem(f"kexec-metadata at {pa:#x} has {blob_size} bytes, too few for version 1")
        return None
    if not trail.claim(pa, "kexec-metadata"):
        return None
    row = np.frombuffer(trail.page(pa), abi.kho_kexec_metadata, 1)[0]
    version = int(row["version"])
    if version != abi.KHO_METADATA_VERSION:
        trail.problem(f"kexec-metadata at {pa:#x} has version {version}, supported: 1")
        return None
    release = bytes(row["previous_release"]).partition(b"\0")[0].decode("utf-8", "backslashreplace")
    return KexecMetadata(version, release, int(row["kexec_count"]))


def read_memblock(trail: Trail, pa: int, blob_size: int) -> tuple[ReservedMem, ...]:
    """``memblock-v1``: an FDT of its own with one ``reserve-mem-v1`` node per region (mm/memblock.c)."""
    if not fdt.HEADER_LENGTH <= blob_size <= MAX_BLOB:
        trail.problem(f"memblock blob at {pa:#x} has an impossible size of {blob_size} bytes")
        return ()
    pages = -(-blob_size // PAGE_SIZE)
    if not all(trail.claim(pa + number * PAGE_SIZE, "memblock FDT") for number in range(pages)):
        return ()
    try:
        root = fdt.parse(trail.mem.read(pa, blob_size), f"memblock FDT at {pa:#x}")
    except MemoryAbsent:
        raise
    except InputError as error:
        trail.problem(error.what)
        return ()
    if root.text("compatible") != kho.MEMBLOCK_KHO_NODE_COMPATIBLE:
        trail.problem(
            f"memblock FDT at {pa:#x} is {root.text('compatible')!r}, supported: "
            f"{kho.MEMBLOCK_KHO_NODE_COMPATIBLE!r}: reserve_mem regions are not found again"
        )
        return ()
    regions = []
    for node in root.children:
        start, size = node.u64("start"), node.u64("size")
        if node.text("compatible") != kho.RESERVE_MEM_KHO_NODE_COMPATIBLE or start is None or size is None:
            trail.problem(f"memblock FDT at {pa:#x}: node {node.name!r} is no reserve-mem-v1, or incomplete")
        else:
            regions.append(ReservedMem(node.name, start, size))
    return tuple(regions)


def read_scratch(mem: Memory, pa: int, length: int) -> tuple[Scratch, ...]:
    """The array of ``struct kho_scratch`` of ``length`` bytes at ``pa``.

    :raises InputError: the length is no whole number of entries, or too big. :raises MemoryAbsent: it is
        not here.
    """
    entry = abi.kho_scratch.itemsize
    if length % entry or not 0 <= length <= MAX_SCRATCH * entry:
        raise InputError(f"scratch array at {pa:#x}: {length} bytes are not 0 ... {MAX_SCRATCH} entries")
    rows = np.frombuffer(mem.read(pa, length), abi.kho_scratch)
    return tuple(Scratch(int(row["addr"]), int(row["size"])) for row in rows)
