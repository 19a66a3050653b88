# SPDX-License-Identifier: Apache-2.0
"""Reads everything that a kernel handed over, from the KHO FDT on, and trusts none of it.

It raises only where it cannot go on: memory that is not there, an FDT that is none, a radix root that is
none. A rule that is broken elsewhere becomes one line in ``problems``, and reading goes on beside it. A
version that it does not know is never decoded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from iokeep.errors import InputError, MemoryAbsent
from iokeep.handover import fdt
from iokeep.handover.abi import PAGE_SHIFT, PAGE_SIZE
from iokeep.handover.iommu import IommuRecord
from iokeep.handover.luo import Flb, Luo, Session, claim_record, read_luo
from iokeep.handover.metadata import KexecMetadata, ReservedMem, read_kexec_metadata, read_memblock
from iokeep.handover.radix import PreservedTree
from iokeep.handover.trail import Trail
from iokeep.mem.memory import Memory
from iokeep.uapi import kho


@dataclass(frozen=True, slots=True)
class Subtree:
    """A client's node in the KHO FDT: pa of its blob and the blob's size in bytes."""

    name: str
    data_pa: int
    size: int


@dataclass(frozen=True, slots=True)
class Handover:
    """What one kernel left for the next.

    ``compatible``: of the FDT at ``fdt_pa`` (``fdt_size`` bytes); ``root_pa``: of the radix tree;
    ``subnodes`` in the FDT's order, newest first. ``luo``, ``metadata``, ``iommu``: None where there is
    none or it cannot be decoded. ``pages``: each metadata page that was read -> what it is. ``problems``:
    one line each, from reading.
    """

    compatible: str
    fdt_pa: int
    fdt_size: int
    root_pa: int
    subnodes: dict[str, Subtree]
    preserved: PreservedTree
    luo: Luo | None
    metadata: KexecMetadata | None
    reserved_mem: tuple[ReservedMem, ...]
    iommu: IommuRecord | None
    pages: dict[int, str]
    problems: tuple[str, ...]

    @property
    def liveupdate_num(self) -> int:
        """Number of this live update, 0 where there is no LUO record."""
        return self.luo.liveupdate_num if self.luo else 0

    @property
    def sessions(self) -> tuple[Session, ...]:
        """Sessions in the order of the record."""
        return self.luo.sessions if self.luo else ()

    @property
    def flbs(self) -> tuple[Flb, ...]:
        """FLBs in the order of the record."""
        return self.luo.flbs if self.luo else ()

    def session(self, name: str) -> Session | None:
        """The first session of that name."""
        return next((s for s in self.sessions if s.name == name), None)


def read_handover(mem: Memory, fdt_pa: int) -> Handover:
    """Read the handover whose KHO FDT is at ``fdt_pa``.

    :raises InputError: no FDT there, or no usable root of the preserved tree.
    :raises MemoryAbsent: metadata is not in this source; content of files need not be.
    """
    trail = Trail(mem)
    if not trail.claim(fdt_pa, "KHO FDT"):
        raise InputError(trail.problems[0], "kho_fdt_pa is what the boot loader data or meta.json says")
    page = mem.read(fdt_pa, PAGE_SIZE)
    what = f"KHO FDT at {fdt_pa:#x}"
    root = fdt.parse(page, what)
    size = fdt.total_size(page, what)
    compatible = (root.get("compatible") or b"").rstrip(b"\0").decode("utf-8", "backslashreplace")
    subnodes = _subnodes(trail, root, what)
    if compatible != kho.KHO_FDT_COMPATIBLE:
        trail.problem(
            f"{what} is {compatible!r}, supported is {kho.KHO_FDT_COMPATIBLE!r}: not decoded; the next "
            "kernel boots with nothing reserved"
        )
        none = PreservedTree.of(np.zeros(0, np.uint64))
        return Handover(
            compatible,
            fdt_pa,
            size,
            0,
            subnodes,
            none,
            None,
            None,
            (),
            None,
            trail.pages,
            tuple(trail.finish()),
        )
    root_pa = root.u64(kho.KHO_FDT_MEMORY_MAP_PROP_NAME)
    if not root_pa:
        raise InputError(f"{what}: property {kho.KHO_FDT_MEMORY_MAP_PROP_NAME} is no u64 pa")
    tree = PreservedTree.read(mem, root_pa)
    for problem in tree.problems:
        trail.problem(problem)
    for pa in tree.node_pas.tolist():
        if pa in trail.pages:
            trail.problem(f"radix tree: node {pa:#x} is the {trail.pages[pa]} too")
        trail.pages.setdefault(pa, "radix node")
    luo = metadata = None
    reserved: tuple[ReservedMem, ...] = ()
    if (node := subnodes.get(kho.KHO_METADATA_NODE_NAME)) is not None:
        metadata = read_kexec_metadata(trail, node.data_pa, node.size)
    if (node := subnodes.get(kho.MEMBLOCK_KHO_FDT)) is not None:
        reserved = read_memblock(trail, node.data_pa, node.size)
    if (node := subnodes.get(kho.LUO_KHO_ENTRY_NAME)) is not None:
        luo = read_luo(trail, node.data_pa, node.size, tree)
    iommu = _iommu(trail, luo)
    _preserved(trail, tree)
    return Handover(
        compatible,
        fdt_pa,
        size,
        root_pa,
        subnodes,
        tree,
        luo,
        metadata,
        reserved,
        iommu,
        trail.pages,
        tuple(trail.finish()),
    )


def _subnodes(trail: Trail, root: fdt.Node, what: str) -> dict[str, Subtree]:
    out: dict[str, Subtree] = {}
    for node in root.children:
        pa, size = node.u64(kho.KHO_SUB_TREE_PROP_NAME), node.u64(kho.KHO_SUB_TREE_SIZE_PROP_NAME)
        if pa is None or size is None:
            trail.problem(
                f"{what}: node {node.name!r} has no u64 {kho.KHO_SUB_TREE_PROP_NAME} and "
                f"{kho.KHO_SUB_TREE_SIZE_PROP_NAME}: its client finds nothing"
            )
        elif node.name in out:
            trail.problem(f"{what}: node {node.name!r} is there twice")
        else:
            out[node.name] = Subtree(node.name, pa, size)
    return out


def _iommu(trail: Trail, luo: Luo | None) -> IommuRecord | None:
    flb = next((f for f in luo.flbs if f.name == IommuRecord.COMPATIBLE), None) if luo else None
    if flb is None or flb.count == 0 or not claim_record(trail, flb.data, "IOMMU record"):
        return None
    try:
        return IommuRecord.read(trail.mem, flb.data)
    except MemoryAbsent:
        raise
    except InputError as error:
        trail.problem(f"FLB {flb.name}: {error.what}")
        return None


def _preserved(trail: Trail, tree: PreservedTree) -> None:
    """Every metadata page must be preserved, or the next kernel reads what its boot left there."""
    owned = {pa: what for pa, what in trail.pages.items() if what != "radix node"}
    pas = np.array(list(owned), np.uint64)
    for pa in pas[~tree.contains(pas >> np.uint64(PAGE_SHIFT))].tolist():
        trail.problem(f"{owned[pa]} at {pa:#x} is not in the preserved tree: the next kernel overwrites it")


__all__ = ["Handover", "Subtree", "read_handover"]
