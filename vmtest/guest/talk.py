# SPDX-License-Identifier: Apache-2.0
"""The guest's end of the port: documents to the host and back."""

from __future__ import annotations

import json
import os
from typing import Any, BinaryIO


class Host:
    """The host, over the port. Opened once: a virtio port takes one opener."""

    def __init__(self) -> None:
        self._port: BinaryIO = open(os.environ["IOKEEP_VM_PORT"], "r+b", buffering=0)  # noqa: SIM115, PTH123

    def say(self, **document: object) -> None:
        """Tell the host."""
        data = json.dumps(document).encode() + b"\n"
        while data:
            data = data[self._port.write(data) or 0 :]

    def ask(self, **document: object) -> dict[str, Any]:
        """Tell the host, and wait for its answer."""
        self.say(**document)
        line = b""
        while not line.endswith(b"\n"):
            line += self._port.read(1 << 12) or b""
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Let go of the port, so that init can say the exit status."""
        self._port.close()
