# SPDX-License-Identifier: Apache-2.0
"""What pinned pages count as: RLIMIT_MEMLOCK, VmLck and VmPin (iopt_pages_update_pinned of
drivers/iommu/iommufd/pages.c, iommufd_ioas_change_process of ioas.c).
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterable
from enum import Enum
from typing import TYPE_CHECKING

from iokeep.soft.kernel.frames import FRAME_SHIFT
from iokeep.soft.kernel.syserror import SysError

if TYPE_CHECKING:
    from iokeep.soft.kernel.pages import Pages
    from iokeep.soft.kernel.process import Process


class Account(Enum):
    """Who is charged (IOPT_PAGES_ACCOUNT_*)."""

    #: nobody: the process that mapped them has CAP_IPC_LOCK
    NONE = 0
    #: the user, over all processes
    USER = 1
    #: the process, in VmLck, as VFIO does it
    MM = 2


def account_of(process: Process, *, by_process: bool) -> Account:
    """How pages are counted that ``process`` maps. :param by_process: IOMMU_OPTION_RLIMIT_MODE is 1."""
    if process.ipc_lock:
        return Account.NONE
    return Account.MM if by_process else Account.USER


def update(process: Process, account: Account, pages: int, *, force: bool = False) -> None:
    """``pages`` more are pinned, or fewer where that is below 0.

    :param force: also above the limit. :raises SysError: ENOMEM: above RLIMIT_MEMLOCK; nothing has changed.
    """
    kernel = process.kernel
    before = {Account.NONE: 0, Account.USER: kernel.locked_pages, Account.MM: process.locked_pages}[account]
    limit = process.memlock_bytes >> FRAME_SHIFT
    if account is not Account.NONE and pages > 0 and before + pages > limit and not force:
        raise SysError(
            errno.ENOMEM,
            f"pid {process.pid}: {before} + {pages} locked pages are above RLIMIT_MEMLOCK, {limit} pages",
        )
    if account is Account.USER:
        kernel.locked_pages += pages
    elif account is Account.MM:
        process.locked_pages += pages
    process.pinned_pages += pages


def hand_over(every: Iterable[Pages], to: Process) -> None:
    """Pages of files are the new process's from now on, and so is what they count for.

    As in Linux 7.3, VmPin of pages that nobody is charged for stays with the process before, and goes down
    with this one. :raises SysError: ENOMEM: that would be above its limit; nothing has changed.
    """
    moving = {id(pages): pages for pages in every}.values()
    charged = [pages for pages in moving if pages.account is not Account.NONE and pages.process is not to]
    sums = Counter[Account]()
    for pages in charged:
        sums[pages.account] += pages.charged
    done: list[Account] = []
    try:
        for account in (Account.USER, Account.MM):
            update(to, account, sums[account])
            done.append(account)
    except SysError:
        for account in done:
            update(to, account, -sums[account])
        raise
    for pages in charged:
        update(pages.process, pages.account, -pages.charged)
    for pages in moving:
        pages.process = to


def status(process: Process) -> bytes:
    """/proc/PID/status, as far as memory that is locked goes (task_mem of fs/proc/task_mmu.c)."""
    lines = [f"Pid:\t{process.pid}"]
    for name, pages in (("VmLck", process.locked_pages), ("VmPin", process.pinned_pages)):
        lines.append(f"{name}:\t{(pages << FRAME_SHIFT - 10) % (1 << 64):8} kB")
    return "\n".join([*lines, ""]).encode()
