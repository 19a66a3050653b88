# SPDX-License-Identifier: Apache-2.0
"""Guest program: map every layout, tell the host where the tables are and what all witnesses say, wait, go
on.
"""

from __future__ import annotations

import os

from iokeep.iommufd.client import Iommufd
from iokeep.uapi.kernel import KernelTransport
from vmtest.guest.edu import ADDRESSES, Edu
from vmtest.guest.inside import inside
from vmtest.guest.layouts import LAYOUTS, Guest, reserve_huge_pages
from vmtest.guest.talk import Host
from vmtest.guest.truth import Trace, dump, hardware

MODE = os.environ["IOKEEP_VM_MODE"]


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
                guest = Guest(ioas)
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
