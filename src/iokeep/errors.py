# SPDX-License-Identifier: Apache-2.0
"""Errors that a person can act on; each class has one exit code of the command line."""

from __future__ import annotations


class IokeepError(Exception):
    """Base of all errors raised on purpose.

    :param what: one line: the object, the hex address or byte, and the rule that it broke.
    :param hint: the next thing to do, or "".
    """

    exit_code = 70
    kind = "internal"

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint


class UsageError(IokeepError):
    """The command line or an argument is wrong."""

    exit_code = 2
    kind = "usage"


class InputError(IokeepError):
    """An input (image, capture, record, TSV) is unreadable, malformed or of an unsupported version."""

    exit_code = 3
    kind = "input"


class MemoryAbsent(InputError):
    """Physical memory that the source does not hold. Missing is never zero.

    :param pa: first physical address (bytes) that is absent.
    :param length: bytes wanted from there.
    :param why: what wanted it.
    """

    kind = "memory-absent"

    def __init__(self, pa: int, length: int, why: str = "", hint: str = "") -> None:
        text = f"memory at pa {pa:#x} (+{length:#x}) is not in this source"
        super().__init__(f"{text}: {why}" if why else text, hint)
        self.pa = pa
        self.length = length


class CapabilityError(IokeepError):
    """A capability, permission or device is missing."""

    exit_code = 4
    kind = "capability"


class KernelRefused(IokeepError):
    """The kernel refused; everything done before was rolled back."""

    exit_code = 5
    kind = "refused"


class KernelRefusedPartly(KernelRefused):
    """The kernel refused and the rollback is incomplete; the message lists what is left."""

    exit_code = 6
    kind = "refused-partly"
