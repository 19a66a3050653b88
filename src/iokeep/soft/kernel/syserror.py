# SPDX-License-Identifier: Apache-2.0
"""The errno that a system call of the software kernel ends with."""

from __future__ import annotations

import errno as _errno
import os


class SysError(Exception):
    """A system call fails with an errno. Anything else that escapes a system call is an oops.

    :param errno: positive errno, as errno.EINVAL.
    :param why: the reason, for the kernel log; the caller sees the errno only.
    :param respond: the argument structure is copied out although the call fails (EMSGSIZE of IOVA_RANGES does
        so).
    """

    def __init__(self, errno: int, why: str = "", *, respond: bool = False) -> None:
        super().__init__(f"{_errno.errorcode.get(errno, errno)}: {why or os.strerror(errno)}")
        self.errno = errno
        self.why = why
        self.respond = respond
