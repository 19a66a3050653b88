# SPDX-License-Identifier: Apache-2.0
"""Set-up of `make test-vm-arm`: all that is slow or needs root, before pytest starts."""

from __future__ import annotations

import sys

from vmtest.apt import Missing
from vmtest.arm.machine import machines, system
from vmtest.kernel import say

if __name__ == "__main__":
    try:
        for name, machine in machines().items():
            say(f"{name}: QEMU {machine.qemu.name}, kernel {system(machine)[0].path}")
    except Missing as error:
        say(str(error))
        sys.exit(4)
