# SPDX-License-Identifier: Apache-2.0
"""Guest program: the session name that breaks the next boot of Linux 7.3, of which preflight warns."""

from __future__ import annotations

import os
from pathlib import Path

from iokeep.inspect.preflight import SESSIONS_PER_BLOCK, ProcFs, check_name
from iokeep.luo.client import LiveUpdate, LuoError
from iokeep.uapi import kexec
from iokeep.uapi.kernel import KernelTransport


def main() -> None:
    """Ends in the jump; the next kernel does not get as far as to start this again."""
    kernel = KernelTransport()
    device = LiveUpdate(kernel)
    sessions = [device.create(f"vm-{n}") for n in range(SESSIONS_PER_BLOCK)]
    for problem in check_name("vm-3", ProcFs().session_names()):
        print(f"preflight: {problem.severity} {problem.errno}: {problem.why}")
    try:
        device.create("vm-3")
    except LuoError as refused:
        print(f"kernel: {refused.errno_name}")
    image = Path(os.environ["IOKEEP_VM_KERNEL"]) / "bzImage"
    kexec.load(image, Path("/proc/cmdline").read_text().strip())
    print(f"jump, with {len(sessions)} sessions", flush=True)
    kexec.jump(kernel)


main()
