# SPDX-License-Identifier: Apache-2.0
"""Boot the kernel in QEMU and run one program in it, with this host's files and this Python.

The guest sees the host's file system read-only under a scratch layer, and the run's directory read-write.
Guest and host talk in lines of JSON over a virtio port; the exit status comes that way too, never from the
console. A guest that panics, hangs or dies ends with an error that names the log.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from iokeep.errors import MemoryAbsent
from iokeep.mem.memory import I64, U8, U64, Memory, Rows
from iokeep.mem.ram import Ram
from vmtest.apt import Missing
from vmtest.kernel import cache, kernel, say
from vmtest.qemu import Qemu, installed, newer

ROOT = Path(__file__).parent.parent
#: below 0xb0000000 q35 has all RAM at pa 0: offsets in the RAM file are physical addresses
MEMORY = 2 << 30
KEEP = 40
#: for a kernel that panics as soon as it looks for its root
_KVM_SECONDS = 8
_PR_SET_PDEATHSIG = 1
_DMA_MASK = 2**64 - 1
_COMMON = (
    "console=ttyS0 panic=-1 oops=panic loglevel=6 kho=on liveupdate=on "
    "no_timer_check "  # on a busy host the timer is late, and then the kernel panics
    "iommufd.allow_unsafe_interrupts=1 "  # QEMU's AMD IOMMU remaps no interrupts
    "root=root rootfstype=9p rootflags=trans=virtio,version=9p2000.L,msize=1048576,cache=loose ro"
)


@dataclass(frozen=True, slots=True)
class Mode:
    """One IOMMU. ``devices``: QEMU's option, by names that its versions gave it; ``cmdline``: the kernel's;
    ``format``: of its page tables; ``newer``: worth a newer QEMU.
    """

    name: str
    devices: tuple[str, ...]
    cmdline: str
    format: str
    newer: bool = False


@dataclass(frozen=True, slots=True)
class Machine:
    """A mode, the QEMU that has it, and that QEMU's option for it."""

    mode: Mode
    qemu: Qemu
    device: str


_VTD = "intel-iommu,intremap=on,aw-bits=48"
_MODES = (
    Mode("vtd-legacy", (_VTD,), "intel_iommu=on,sm_off", "vtdss"),
    Mode(
        "vtd-second-stage",
        (f"{_VTD},scalable-mode=on", f"{_VTD},x-scalable-mode=on"),
        "intel_iommu=on,sm_on",
        "vtdss",
    ),
    Mode(
        "vtd-first-stage",
        (f"{_VTD},scalable-mode=on,fsts=on", f"{_VTD},x-scalable-mode=on,x-flts=on"),
        "intel_iommu=on,sm_on",
        "x86_64",
        newer=True,
    ),
    Mode("amd", ("amd-iommu,intremap=on",), "", "amdv1"),
)


class GuestError(RuntimeError):
    """The guest did not come to an end of its own: it panicked, hung, or QEMU failed."""


@functools.cache
def machines() -> Mapping[str, Machine]:
    """The IOMMUs that can be had here, by the name of the mode."""
    out = {}
    for mode in _MODES:
        for find in (installed, newer)[: 1 + mode.newer]:
            try:
                qemu = find()
            except Missing as error:
                if find is installed:
                    raise
                say(f"no {mode.name}: {error}")
                continue
            device = next(filter(qemu.has, mode.devices), None)
            if device is not None:
                out[mode.name] = Machine(mode, qemu, device)
                break
    return out


_LIBC = ctypes.CDLL(None)


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _old_runs_go(base: Path) -> None:
    runs = sorted((each for each in base.iterdir() if each.is_dir()), key=lambda p: p.stat().st_mtime)
    for each in runs[:-KEEP]:
        shutil.rmtree(each, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class _RowsAbove:
    rows: Rows
    base: int

    @property
    def data(self) -> U8:
        return self.rows.data

    @property
    def linear(self) -> bool:
        return False

    def index(self, pas: U64) -> I64:
        return self.rows.index(pas - np.uint64(self.base))  # below the base it wraps, beyond the end


@dataclass(frozen=True, slots=True)
class Above:
    """Physical memory that begins at ``base``, a multiple of 64 KiB."""

    ram: Ram
    base: int

    def read(self, pa: int, length: int) -> bytes:
        """See :meth:`iokeep.mem.memory.Memory.read`."""
        if pa < self.base:
            raise MemoryAbsent(pa, length, f"RAM begins at {self.base:#x}")
        return self.ram.read(pa - self.base, length)

    def rows(self, row_bytes: int) -> Rows:
        """See :meth:`iokeep.mem.memory.Memory.rows`."""
        return _RowsAbove(self.ram.rows(row_bytes), self.base)


@dataclass
class Guest:
    """A booted guest and the program in it. A context manager: leaving it ends QEMU.

    :param directory: of this run: ``console.log``, ``output.log``, and what the program leaves there.
    :param ram: its physical memory, a memfd, from pa ``base`` on.
    """

    directory: Path
    ram: int
    base: int
    seconds: float
    process: subprocess.Popen[bytes]
    channel: socket.socket
    status: int | None = None
    _buffer: bytes = b""
    _deadline: float = field(default=0.0)

    def __post_init__(self) -> None:
        self._deadline = time.monotonic() + self.seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.channel.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.ram)

    def _failed(self, what: str) -> GuestError:
        log = self.directory / "console.log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        # a panic's reason stands before its trace
        reasons = [line for line in lines[:-12] if _complains(line)][-4:]
        shown = [f"  | {line}" for line in (*reasons, *lines[-12:])]
        return GuestError("\n".join([what, *shown, f"logs: {self.directory}"]))

    def receive(self) -> dict[str, Any] | None:
        """The next document from the guest; None when the program has ended (:attr:`status` says how)."""
        while b"\n" not in self._buffer:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise self._failed(f"no end after {self.seconds:.0f} s")
            self.channel.settimeout(min(left, 1.0))
            try:
                data = self.channel.recv(1 << 16)
            except TimeoutError:
                continue
            if not data:
                self.process.wait()
                raise self._failed(f"the guest stopped with no exit status (QEMU: {self.process.returncode})")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        document: dict[str, Any] = json.loads(line)
        if "exit" in document:
            self.status = int(document["exit"])
            return None
        return document

    def send(self, **document: object) -> None:
        """A document for the guest."""
        self.channel.sendall(json.dumps(document).encode() + b"\n")

    def documents(self) -> Iterator[dict[str, Any]]:
        """All documents up to the program's end."""
        while (document := self.receive()) is not None:
            yield document

    def wait(self) -> int:
        """The program's exit status; documents on the way are dropped."""
        for _ in self.documents():
            pass
        assert self.status is not None
        return self.status

    def check(self) -> None:
        """Wait for the end. :raises GuestError: the exit status is not 0."""
        self.wait()
        self.check_status()

    def check_status(self) -> None:
        """The program has ended. :raises GuestError: not with 0."""
        if self.status:
            log = self.directory / "output.log"
            tail = log.read_text(errors="replace")[-6000:] if log.exists() else ""
            raise GuestError(f"exit status {self.status}\n{tail}\nlogs: {self.directory}")

    def memory(self) -> Memory:
        """Its physical memory, while it runs."""
        ram = Ram.shared(self.ram)
        return Above(ram, self.base) if self.base else ram

    def kernel_complaints(self) -> list[str]:
        """Lines of the console that say that the kernel found a fault of its own."""
        text = (self.directory / "console.log").read_text(errors="replace")
        return list(filter(_complains, text.splitlines()))


def _complains(line: str) -> bool:
    marks = ("WARNING:", "BUG:", "Oops", "Call Trace", "general protection", "Kernel panic")
    return any(mark in line for mark in marks)


@functools.cache
def accelerator() -> tuple[str, ...]:
    """QEMU's options for the CPU: KVM where this kernel gets as far with it as to miss its root, else
    software emulation. There are KVMs that start any guest and run only kernels that are made for them.
    """
    kvm = ("-accel", "kvm", "-cpu", "max,la57=off", "-smp", "2", "-machine", "kernel-irqchip=split")
    if os.environ.get("IOKEEP_VM_ACCEL") != "tcg" and os.access("/dev/kvm", os.R_OK | os.W_OK):
        command = [
            *installed().command, "-nodefaults", "-display", "none", "-no-reboot", "-machine", "q35", *kvm,
            "-kernel", str(kernel().image), "-append", "console=ttyS0 panic=-1", "-serial", "stdio",
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, check=False, timeout=_KVM_SECONDS)
        except subprocess.TimeoutExpired:
            done = None
        if done and not done.returncode and b"Linux version" in done.stdout:
            return kvm
    # a second CPU costs as much again here, and two guests run at a time
    return ("-accel", "tcg", "-cpu", "max,la57=off", "-smp", "1")


def boot(
    machine: Machine,
    program: Sequence[str],
    *,
    name: str,
    seconds: float = 120.0,
    environment: Mapping[str, str] | None = None,
    cmdline: str = "",
) -> Guest:
    """Boot and run ``program`` (an argument vector, run in the project's root).

    :param name: of the run, for its directory. :param seconds: hard limit for all of it.
    """
    directory = run_directory(name)
    exports = {
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "IOKEEP_VM_RUN": str(directory),
        "IOKEEP_VM_KERNEL": str(kernel().path),
        "IOKEEP_VM_MODE": machine.mode.name,
        **(environment or {}),
    }
    (directory / "run").write_text(script(program, ROOT, exports))
    line = " ".join(
        (
            _COMMON, machine.mode.cmdline, cmdline, f"init={ROOT / 'vmtest/guest/init'}",
            f"iokeep.dir={directory} iokeep.python={sys.executable} iokeep.root={ROOT}",
        )
    )  # fmt: skip
    (directory / "cmdline").write_text(line + "\n")
    share = "security_model=none,multidevs=remap"
    command = [
        *machine.qemu.command, "-machine", "q35,memory-backend=ram", *accelerator(),
        "-device", machine.device,
        "-kernel", str(kernel().image), "-append", line,
        "-fsdev", f"local,id=root,path=/,readonly=on,{share}",
        "-device", "virtio-9p-pci,fsdev=root,mount_tag=root",
        "-fsdev", f"local,id=run,path={directory},{share}",
        "-device", "virtio-9p-pci,fsdev=run,mount_tag=run",
    ]  # fmt: skip
    return launch(command, directory, seconds=seconds)


def runs() -> Path:
    """Where the logs of all runs are."""
    return cache() / "runs"


def run_directory(name: str) -> Path:
    """A directory for the logs of one more run; the oldest ones go."""
    base = runs()
    base.mkdir(parents=True, exist_ok=True)
    _old_runs_go(base)
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=base))


def script(program: Sequence[str], root: Path, exports: Mapping[str, str]) -> str:
    """What the guest's shell runs: a program in the project's root, with an environment."""
    text = "".join(f"export {key}={shlex.quote(value)}\n" for key, value in exports.items())
    return f'{text}cd {shlex.quote(str(root))}\nexec {shlex.join(program)} "$@"\n'


def launch(
    machine: Sequence[str],
    directory: Path,
    *,
    seconds: float,
    base: int = 0,
    fds: Sequence[int] = (),
    ports: Sequence[str] = (),
) -> Guest:
    """Start QEMU with what all guests have: RAM that this process shares, a port, a console's log, two
    ``edu``.

    :param machine: program and options for the rest; its RAM is the memory backend "ram".
    :param directory: of the run. :param seconds: hard limit for all of it. :param base: pa of its RAM.
    :param fds: descriptors that the options name, closed here once QEMU has them.
    :param ports: virtio ports besides the one to this process; each is a character device of its name.
    """
    ram = os.memfd_create(f"iokeep-vm-{directory.name}")
    os.ftruncate(ram, MEMORY)
    listener = socket.socket(socket.AF_UNIX)
    sockets = tempfile.mkdtemp(prefix="iokeep-vm-")  # a socket's path has 107 bytes at most
    listener.bind(f"{sockets}/port")
    listener.listen(1)
    command = [
        *machine, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-name", directory.name, "-m", f"{MEMORY >> 20}M",
        "-object", f"memory-backend-file,id=ram,size={MEMORY},mem-path=/proc/self/fd/{ram},share=on",
        "-serial", f"file:{directory / 'console.log'}",
        "-chardev", f"socket,id=port,path={sockets}/port",
        "-device", "virtio-serial-pci", "-device", "virtserialport,chardev=port,name=iokeep",
        *(word for port in ports for word in ("-device", f"virtserialport,chardev={port},name={port}")),
        "-device", f"edu,addr=10.0,dma_mask={_DMA_MASK}", "-device", f"edu,addr=11.0,dma_mask={_DMA_MASK}",
    ]  # fmt: skip
    (directory / "qemu.sh").write_text(shlex.join(command) + "\n")
    with (directory / "qemu.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(ram, *fds),
            preexec_fn=_die_with_parent,
        )
    for fd in fds:
        os.close(fd)
    listener.settimeout(10)
    try:
        channel, _ = listener.accept()
    except TimeoutError:
        process.kill()
        os.close(ram)
        raise GuestError(f"QEMU did not start: {(directory / 'qemu.log').read_text()}") from None
    finally:
        listener.close()
        shutil.rmtree(sockets, ignore_errors=True)
    return Guest(directory, ram, base, seconds, process, channel)
