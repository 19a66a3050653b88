# SPDX-License-Identifier: Apache-2.0
"""``python -m iokeep.soft.kernel``: one kernel process of the software host."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from pathlib import Path

from iokeep.errors import IokeepError
from iokeep.soft.hardware.platform import Platform
from iokeep.soft.kernel.builtin import install
from iokeep.soft.kernel.kernel import Kernel
from iokeep.soft.kernel.params import Params
from iokeep.soft.kernel.server import OOPS_STATUS, Oops, Server


def main(argv: list[str] | None = None) -> int:
    """Boot on the platform behind the given memfds and serve until the reboot; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m iokeep.soft.kernel", description=__doc__)
    parser.add_argument("--ram-fd", type=int, required=True, help="memfd of the physical memory")
    parser.add_argument("--regs-fd", type=int, required=True, help="memfd of the registers")
    parser.add_argument("--tags-fd", type=int, required=True, help="memfd of the frames' owner tags")
    parser.add_argument("--socket", type=Path, required=True, help="where to serve system calls")
    parser.add_argument("--profile", default="soft-7.3", help="which kernel this is")
    parser.add_argument(
        "--param", action="append", default=[], metavar="KEY=VALUE", help="kernel command line"
    )
    args = parser.parse_args(argv)
    try:
        platform = Platform.from_fds(args.ram_fd, args.regs_fd, args.tags_fd)
        kernel = Kernel(platform, args.profile, Params.parse(args.param))
        install(kernel)
        kernel.boot()
        server = Server(kernel, args.socket)
    except IokeepError as error:
        print(f"kernel panic: {error}" + (f"\n{error.hint}" if error.hint else ""), file=sys.stderr)
        return error.exit_code
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    try:
        server.run()
    except Oops:
        # Nothing of this kernel's state can be trusted: no exit handlers, no releases.
        sys.stderr.flush()
        os._exit(OOPS_STATUS)
    server.close()
    if not kernel.rebooting:
        kernel.shutdown()
    return 0


if __name__ == "__main__":
    try:
        status = main()
    except Exception:  # noqa: BLE001  (the outermost frame: an unknown failure must not look like an end)
        traceback.print_exc()
        status = OOPS_STATUS
    sys.exit(status)
