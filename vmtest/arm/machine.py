# SPDX-License-Identifier: Apache-2.0
"""Boot an arm64 system in QEMU's machine "virt" and run one of the guest's programs in it.

Nothing of the host's files is shared: the project's sources go in as the last part of the initramfs, what the
program prints comes out by a port.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmtest.apt import Missing
from vmtest.arm.system import FLAVOURS, Kernel, kernel, packed, program, sources, userland
from vmtest.kernel import say
from vmtest.qemu import ARM, Qemu, installed, newer
from vmtest.vm import ROOT, Guest, launch, run_directory, script

#: where machine "virt" has its RAM
BASE = 1 << 30
PROJECT = Path("/project")
#: imports what the guest's programs import, of which user space's bytecode is kept
_COMPILE = (
    "python3 -c 'import vmtest.guest.imports' && cd / && "
    "find usr/lib -name __pycache__ -o -name '*.pyc' | cpio -o -H newc 2>/dev/null"
)
_CMDLINE = (
    "console=ttyAMA0 panic=-1 oops=panic loglevel=6 rdinit=/init "
    "iomem=relaxed "  # root may read the SMMU's registers
)


@dataclass(frozen=True, slots=True)
class Mode:
    """One machine. ``flavour``: of the kernel; ``stage``: of its SMMUv3; ``format``: of its page tables."""

    name: str
    flavour: str
    stage: int
    format: str


@dataclass(frozen=True, slots=True)
class Machine:
    """A mode, the QEMU that has it, and that QEMU's machine and options for it."""

    mode: Mode
    qemu: Qemu
    board: str
    options: tuple[str, ...] = ()


_MODES = tuple(
    Mode(f"{flavour}-stage{stage}", flavour, stage, f"arm_lpae_s{stage}")
    for flavour in FLAVOURS
    for stage in (1, 2)
)


@functools.cache
def machines() -> Mapping[str, Machine]:
    """The machines that can be had here, by the name of the mode.

    QEMU 7.2 has the first stage only, and no property for it. Since 9.2 the newest board sets that property,
    to both.
    """
    out = {}
    for mode in _MODES:
        for find in (installed, newer):
            try:
                qemu = find(ARM)
            except Missing as error:
                if find is installed:
                    raise
                say(f"no {mode.name}: {error}")
                continue
            if qemu.has("arm-smmuv3,stage"):
                out[mode.name] = Machine(
                    mode, qemu, "virt-9.1", ("-global", f"arm-smmuv3.stage={mode.stage}")
                )
                break
            if mode.stage == 1:
                out[mode.name] = Machine(mode, qemu, "virt")
                break
    return out


def boot(machine: Machine, command: Sequence[str], *, seconds: float) -> Guest:
    """Boot and run a command (an argument vector, run in the project's root).

    :param seconds: hard limit for all of it.
    """
    return _boot(*system(machine), machine, command, seconds)


def system(machine: Machine) -> tuple[Kernel, Path]:
    """Kernel and user space, fetched when they are not in the cache."""
    return kernel(machine.mode.flavour), _user()


@functools.cache
def _user() -> Path:
    machine = next(iter(machines().values()))
    return userland(functools.partial(_compiled, kernel(machine.mode.flavour), machine))


def _compiled(chosen: Kernel, machine: Machine, user: Path) -> bytes:
    with _boot(chosen, user, machine, ["sh", "-c", _COMPILE], 400) as guest:
        guest.check()
        return (guest.directory / "output.log").read_bytes()


def _boot(chosen: Kernel, user: Path, machine: Machine, command: Sequence[str], seconds: float) -> Guest:
    mode = machine.mode
    directory = run_directory(mode.name)
    exports = {"PYTHONPATH": f"{PROJECT}/src:{PROJECT}", "IOKEEP_VM_MODE": f"smmuv3-stage{mode.stage}"}
    run = script(command, PROJECT, exports)
    (directory / "run").write_text(run)
    (directory / "cmdline").write_text(_CMDLINE + "\n")
    entries = (
        program("init", (ROOT / "vmtest/arm/init").read_bytes()),
        program("run/run", run.encode()),
        *sources(ROOT, ("src/iokeep", "vmtest"), PROJECT.name),
    )
    initramfs = os.memfd_create("initramfs")
    with os.fdopen(initramfs, "wb", closefd=False) as out:
        for part in (user, chosen.modules):
            with part.open("rb") as file:
                shutil.copyfileobj(file, out)
        out.writelines(packed(entries))
    options = [
        *machine.qemu.command, *machine.options,
        "-machine", f"{machine.board},memory-backend=ram,iommu=smmuv3,gic-version=3",
        "-accel", "tcg,thread=multi", "-smp", "2", "-cpu", "neoverse-n1",
        "-kernel", str(chosen.image), "-append", _CMDLINE, "-initrd", f"/proc/self/fd/{initramfs}",
        "-chardev", f"file,id=output,path={directory / 'output.log'}",
    ]  # fmt: skip
    return launch(options, directory, seconds=seconds, base=BASE, fds=(initramfs,), ports=("output",))
