# SPDX-License-Identifier: Apache-2.0
"""The process of one device: ``python -m iokeep.soft.hardware.device --index I --ram-fd N ...``

It knows nothing of kernels: it has the three memfds of the platform, and goes on while kernels end and
begin. It ends on SIGTERM, or when its parent is gone.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import signal
import sys
import time
from collections.abc import Sequence

from iokeep.soft.hardware import bar
from iokeep.soft.hardware.platform import Platform

_PR_SET_PDEATHSIG = 1  # prctl(2)
_PARENT_CHECK_S = 0.5


def spawn_arguments(platform: Platform, index: int) -> tuple[list[str], tuple[int, ...]]:
    """(argv, fds to pass) to start the process of device ``index``, for :class:`subprocess.Popen`."""
    fds = platform.fds
    argv = [sys.executable, "-m", "iokeep.soft.hardware.device", "--index", str(index)]
    argv += ["--ram-fd", str(fds.ram), "--regs-fd", str(fds.regs), "--tags-fd", str(fds.tags)]
    return argv, (fds.ram, fds.regs, fds.tags)


def _die_with_parent(parent: int) -> bool:
    """Ask for SIGTERM when the parent ends; False if it is gone already."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    return os.getppid() == parent


def run(platform: Platform, index: int, parent: int) -> None:
    """Be device ``index`` until SIGTERM or until process ``parent`` is gone."""
    window = platform.bars[index]
    bar.write_register(window, bar.PID, os.getpid())
    bar.write_register(window, bar.STATE, bar.STATE_STARTING)
    begin = time.perf_counter_ns()
    from iokeep.soft.hardware import engine
    from iokeep.soft.hardware.dma import DmaEngine
    from iokeep.soft.hardware.iommu import FrontEnd

    engine.compile_burst()
    bar.write_register(window, bar.COMPILE_NS, time.perf_counter_ns() - begin)
    device = DmaEngine(FrontEnd(platform, index), window)
    stop = False

    def end(_signal: int, _frame: object) -> None:
        nonlocal stop
        stop = True

    signal.signal(signal.SIGTERM, end)
    gc.collect()
    gc.disable()  # nothing in the loop makes cycles, and a collection is a gap in the DMA
    next_look = time.monotonic() + _PARENT_CHECK_S
    rounds = 0
    while not stop:
        pause = device.pump()
        rounds += 1
        if pause:
            time.sleep(pause)
        if pause or not rounds & 0x3FF:
            now = time.monotonic()
            if now >= next_look:
                next_look = now + _PARENT_CHECK_S
                if os.getppid() != parent:
                    break
    device.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 0 after SIGTERM or the end of the parent."""
    parser = argparse.ArgumentParser(prog="iokeep.soft.hardware.device", description="one DMA device")
    for name in ("ram", "regs", "tags"):
        parser.add_argument(f"--{name}-fd", type=int, required=True, help=f"memfd of the {name}")
    parser.add_argument("--index", type=int, required=True, help="number of the device")
    args = parser.parse_args(argv)
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the host, which ends its devices
    if not _die_with_parent(parent):
        return 0
    with Platform.from_fds(args.ram_fd, args.regs_fd, args.tags_fd) as platform:
        run(platform, args.index, parent)
    return 0


if __name__ == "__main__":
    sys.exit(main())
