# SPDX-License-Identifier: Apache-2.0
"""Second half of the guest's first process: run the program, say its exit status, switch off."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

# include/uapi/linux/reboot.h; QEMU runs with -no-reboot
RESTART = 0x01234567


def port() -> str:
    """The virtio port to the host."""
    (name,) = (p for p in Path("/sys/class/virtio-ports").iterdir() if (p / "name").read_text() == "iokeep\n")
    return f"/dev/{name.name}"


def main() -> None:
    """Never returns."""
    directory = sys.argv[1]
    os.environ["IOKEEP_VM_PORT"] = port()
    try:
        with Path(directory, "output.log").open("ab", buffering=0) as log:
            done = subprocess.run(
                ["sh", f"{directory}/run"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False
            )
        status = done.returncode if done.returncode >= 0 else 128 - done.returncode
    except BaseException as error:  # noqa: BLE001  (the first process must not end)
        print(f"init: {error!r}", file=sys.stderr)
        status = 125
    with Path(port()).open("wb", buffering=0) as channel:
        channel.write(json.dumps({"exit": status}).encode() + b"\n")
    os.sync()
    ctypes.CDLL(None).reboot(RESTART)


main()
