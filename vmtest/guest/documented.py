# SPDX-License-Identifier: Apache-2.0
"""Guest program: the examples of docs/real-host.md for a live update of memory, as printed, over a kexec.

Only the next kernel's files and command line are this machine's. It is started again behind the jump.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

STAGE = "iokeep.stage=3"


def example(section: int) -> str:
    """The Python example of a section."""
    text = Path("docs/real-host.md").read_text()
    found = re.search(rf"^## {section}\..*?```python\n(.*?)```", text, re.MULTILINE | re.DOTALL)
    assert found is not None, f"section {section} has no example"
    return found[1]


def main() -> None:
    """The program."""
    cmdline = Path("/proc/cmdline").read_text().strip()
    if STAGE in cmdline:
        exec(example(6), {})
        return
    code = example(5)
    for printed, here in (
        ('"/boot/vmlinuz-next"', repr(f"{os.environ['IOKEEP_VM_KERNEL']}/bzImage")),
        (', Path("/boot/initrd.img-next")', ""),
        ('"root=/dev/sda2 ro kho=on liveupdate=on"', repr(f"{cmdline} {STAGE}")),
    ):
        assert code.count(printed) == 1, printed
        code = code.replace(printed, here)
    exec(code, {})


if __name__ == "__main__":
    main()
