# SPDX-License-Identifier: Apache-2.0
"""The kernel log: a bounded ring of lines with seconds since boot, also written to stderr."""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import TextIO

#: lines kept; the oldest go first, as in a full printk ring
MAX_LINES = 20_000


class Klog:
    """The log of one kernel.

    :param stream: where lines go too, or None to keep them in memory only.
    """

    def __init__(self, stream: TextIO | None = sys.stderr) -> None:
        self._start = time.monotonic()
        self._lines: deque[str] = deque(maxlen=MAX_LINES)
        self._stream = stream

    def log(self, message: str) -> None:
        """Append ``message``, one entry for each of its lines."""
        stamp = f"[{time.monotonic() - self._start:12.6f}] "
        for line in message.splitlines() or [""]:
            self._lines.append(stamp + line)
            if self._stream is not None:
                try:
                    print(stamp + line, file=self._stream, flush=True)
                except (OSError, ValueError):  # whoever read our stderr is gone; the ring still has the line
                    self._stream = None

    def text(self) -> str:
        """All kept lines, oldest first, each with its newline."""
        return "".join(line + "\n" for line in self._lines)
