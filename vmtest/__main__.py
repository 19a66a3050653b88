# SPDX-License-Identifier: Apache-2.0
"""Set-up of `make test-vm`: all that is slow or needs root, before pytest starts.

``python -m vmtest source`` prints where a kernel's source is, for ``iokeep bench run --kernel-source``.
"""

from __future__ import annotations

import sys

from vmtest.apt import Missing
from vmtest.kernel import kernel, say, source
from vmtest.vm import machines

if __name__ == "__main__":
    try:
        if sys.argv[1:] == ["source"]:
            print(source())
            sys.exit(0)
        for name, machine in machines().items():
            say(f"{name}: QEMU {machine.qemu.name}")
        say(f"kernel {kernel().path}")
        say(f"its source {source()}")
    except Missing as error:
        say(str(error))
        sys.exit(4)
