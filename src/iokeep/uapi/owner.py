# SPDX-License-Identifier: Apache-2.0
"""An open descriptor with one owner: a context manager whose ``close`` may be called again."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from iokeep.uapi.errnos import close_fd
from iokeep.uapi.transport import Transport


class FdOwner:
    """Base of the objects that own a descriptor.

    :param fd: an open descriptor of ``transport``, owned from here on; -1 once it is closed.
    """

    def __init__(self, transport: Transport, fd: int) -> None:
        self.transport = transport
        self.fd = fd

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor; idempotent."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            close_fd(self.transport, fd)
