# SPDX-License-Identifier: Apache-2.0
"""Guest program: map every layout, tell the host where the tables are and what all witnesses say, wait, go
on.
"""

from __future__ import annotations

import os

from iokeep.iommufd.client import Iommufd
from iokeep.mem.live import LiveMemory
from iokeep.pt.gather import gather
from iokeep.pt.leaves import extents
from iokeep.pt.registry import open_format
from iokeep.pt.roots.find import find_root_of
from iokeep.uapi.kernel import KernelTransport
from vmtest.guest.edu import ADDRESSES, Edu
from vmtest.guest.layouts import LAYOUTS, Guest, reserve_huge_pages
from vmtest.guest.talk import Host
from vmtest.guest.truth import Trace, dump, hardware

MODE = os.environ["IOKEEP_VM_MODE"]


def inside(hw: dict[str, object], path: str) -> list[list[int]]:
    """The extents as they are read from inside of the guest, (iova, last, pa, prot)."""
    with LiveMemory(path) as memory:
        found = find_root_of(hw, memory, iommu=str(hw["iommu"]))  # type: ignore[arg-type]
        assert found is not None
        assert found.table is not None
        fmt = open_format(found.table.format, found.table.config)
        pages = gather(fmt, memory.read, found.table.root_pa)
        all_of, problems = extents(fmt, pages, found.table.root_pa)
        assert not len(problems)
        columns = (all_of.iova, all_of.last, all_of.pa, all_of.prot)
        return [list(row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def main() -> None:
    """The program."""
    host = Host()
    reserve_huge_pages()
    for name, build in LAYOUTS.items():
        edu = Edu(ADDRESSES[0])
        with Iommufd(KernelTransport()) as iommufd, edu.file:
            edu.file.bind(iommufd)
            with Trace() as trace:
                ioas = iommufd.ioas_alloc()
                edu.file.attach(ioas.id)
                guest = Guest(ioas, ioas.iova_ranges()[-1][1])
                build(guest)
                lines = trace.lines()
            hw = hardware(MODE, edu.bdf)
            host.ask(
                layout=name,
                hw=hw,
                asked=sorted(guest.rows.values()),
                debugfs=dump(edu.bdf),
                trace=lines,
                kcore=inside(hw, "/proc/kcore"),
                devmem=inside(hw, "/dev/mem"),
            )
    host.close()


main()
