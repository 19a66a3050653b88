# SPDX-License-Identifier: Apache-2.0
"""Guest program, as ``tables`` is, for a kernel that has only VFIO's older interface: map every layout, tell
the host what was asked for and what this kernel says, wait; then DMA by one more mapping.
"""

from __future__ import annotations

import os

from vmtest.guest.edu import ADDRESSES, Edu, bind
from vmtest.guest.inside import inside
from vmtest.guest.layouts import LAYOUTS, PAGE, Guest, reserve_huge_pages
from vmtest.guest.talk import Host
from vmtest.guest.truth import Trace, hardware
from vmtest.guest.type1 import Container

MODE = os.environ["IOKEEP_VM_MODE"]
SOURCE, TARGET = 0x100000, 0x7F0000000


def moved() -> bool:
    """Whether the device moves a page from one iova to another."""
    with Container(ADDRESSES[0]) as container:
        edu = Edu(ADDRESSES[0], container.device)
        with edu.file:
            guest = Guest(container)
            memory = guest.kernel.mmap(-1, 2 * PAGE)
            memory.write(0, bytes(range(256)) * (PAGE // 256))
            container.map(memory.hva, PAGE, iova=SOURCE, prot=1)
            container.map(memory.hva + PAGE, PAGE, iova=TARGET, prot=2)
            edu.start()
            edu.copy(SOURCE, TARGET, PAGE)
            return memory.read(PAGE, PAGE) == memory.read(0, PAGE)


def main() -> None:
    """The program."""
    host = Host()
    reserve_huge_pages()
    bind()
    for name, build in LAYOUTS.items():
        with Trace() as trace, Container(ADDRESSES[0]) as container:
            edu = Edu(ADDRESSES[0], container.device)
            with edu.file:
                guest = Guest(container)
                build(guest)
                hw = hardware(MODE, edu.bdf)
                host.ask(
                    layout=name,
                    hw=hw,
                    asked=sorted(guest.rows.values()),
                    trace=trace.lines(),
                    kcore=inside(hw, "/proc/kcore"),
                )
    host.say(moved=moved())
    host.close()


main()
