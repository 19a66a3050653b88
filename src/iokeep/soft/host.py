# SPDX-License-Identifier: Apache-2.0
"""The software host: one process for the kernel, one for each device, and nothing shared but memory and
registers.

``with SoftHost.create(...) as host`` builds a platform, starts the devices and kernel A. A client takes
``host.transport()`` (each one is a process in the kernel's eyes) and ends kernel A with
``reboot_kexec()``; then ``host.kexec("soft-7.4")`` starts kernel B on the same memory, under devices
that never stopped.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from iokeep.errors import IokeepError
from iokeep.soft.hardware import bar
from iokeep.soft.hardware.platform import Platform

if TYPE_CHECKING:
    from iokeep.uapi.soft import SoftTransport

AUDIT_PATH = "/sys/kernel/debug/iokeep/audit"
#: seconds that a kernel may take to boot, and to end after reboot(2)
KERNEL_TIMEOUT = 60.0
#: seconds that a device may take from its start to its first burst (a cold compile takes several)
DEVICE_TIMEOUT = 120.0
_LOG_TAIL = 40
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


class HostError(IokeepError):
    """A process of the software host failed; the end of its log is in the message."""

    kind = "software-host"


def _die_with_parent() -> None:
    """In the child, before exec: be killed when the thread that started it is gone (prctl(2))."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Kexec:
    """When what happened, in ns of CLOCK_MONOTONIC (time.monotonic_ns).

    ``ended``: the old kernel's process was gone. ``ready``: the new one serves system calls.
    """

    ended: int
    ready: int

    @property
    def ms(self) -> float:
        """Milliseconds without a kernel."""
        return (self.ready - self.ended) / 1e6


@dataclass(slots=True)
class _Child:
    """A process of the host and where its stderr goes."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def tail(self) -> str:
        try:
            lines = self.log.read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join(lines[-_LOG_TAIL:])

    def failed(self, what: str) -> HostError:
        text = self.tail()
        return HostError(f"{self.name}: {what}" + (f"\n{text}" if text else ""))


@dataclass(eq=False)
class SoftHost:
    """A running software host. Made by :meth:`create`; :meth:`stop` ends it, whatever happened before."""

    platform: Platform
    directory: Path
    devices: list[_Child] = field(default_factory=list)
    kernels: list[_Child] = field(default_factory=list)
    profiles: list[str] = field(default_factory=list)
    #: what the DMA engine's compile took, in ms; None = it was in the cache
    compile_ms: float | None = None
    _stopped: bool = False

    @classmethod
    def create(
        cls,
        ram_bytes: int,
        n_devices: int = 1,
        profile: str = "soft-7.3",
        params: Mapping[str, str | int] | None = None,
        *,
        iommu: str = "vtd",
        progress: Callable[[str], None] | None = None,
    ) -> SoftHost:
        """Build the platform, start the devices and the first kernel; returns when the kernel answers.

        :param ram_bytes: physical memory, a multiple of 4096. :param params: the kernel's command line.
        :param iommu: kind of its IOMMU ("vtd", "amd", "smmuv3", "riscv").
        :param progress: told in a few words what takes time (the first compile of the DMA engine does).
        :raises HostError: a process ended early or is not ready in time; everything is stopped then.
        """
        say = progress or (lambda text: None)
        host = cls(
            Platform.create(ram_bytes, n_devices, iommu=iommu), Path(tempfile.mkdtemp(prefix="iokeep-host-"))
        )
        atexit.register(host.stop)
        try:
            say(f"starting {n_devices} devices and kernel {profile}")
            host._start_kernel(profile, params)
            host._start_device(0)
            if not engine_is_compiled():
                say("compiling the DMA engine (once per machine, some seconds)")
                host._wait_devices()
                host.compile_ms = bar.read_register(host.platform.bars[0], bar.COMPILE_NS) / 1e6
            for index in range(1, n_devices):
                host._start_device(index)
            host._wait_devices()
            host._wait_kernel()
        except BaseException:
            host.stop()
            raise
        return host

    # ---- processes

    def _spawn(self, name: str, words: Sequence[str]) -> _Child:
        log = self.directory / f"{name}.log"
        fds = self.platform.fds
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", *words],
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                pass_fds=(fds.ram, fds.regs, fds.tags),
                start_new_session=True,  # a terminal's Ctrl-C is for the caller, who then calls stop()
                preexec_fn=_die_with_parent,
            )
        return _Child(name, process, log)

    def _fd_words(self) -> list[str]:
        fds = self.platform.fds
        return ["--ram-fd", f"{fds.ram}", "--regs-fd", f"{fds.regs}", "--tags-fd", f"{fds.tags}"]

    def _start_device(self, index: int) -> None:
        words = ["iokeep.soft.hardware.device", *self._fd_words(), "--index", f"{index}"]
        self.devices.append(self._spawn(f"device-{index}", words))

    def _start_kernel(self, profile: str, params: Mapping[str, str | int] | None) -> None:
        words = ["iokeep.soft.kernel", *self._fd_words(), "--profile", profile]
        number = len(self.kernels)
        words += ["--socket", str(self.directory / f"kernel-{number}.sock")]
        for key, value in (params or {}).items():
            words += ["--param", f"{key}={value}"]
        self.kernels.append(self._spawn(f"kernel-{number}", words))
        self.profiles.append(profile)

    def _wait_devices(self) -> None:
        deadline = time.monotonic() + DEVICE_TIMEOUT
        for index, child in enumerate(self.devices):
            window = self.platform.bars[index]
            while bar.read_register(window, bar.STATE) not in (bar.STATE_QUIESCED, bar.STATE_RUNNING):
                if child.process.poll() is not None:
                    raise child.failed(f"ended with status {child.process.returncode}")
                if time.monotonic() > deadline:
                    raise child.failed(f"not ready after {DEVICE_TIMEOUT:.0f} s")
                time.sleep(0.002)

    def _wait_kernel(self) -> None:
        child = self.kernels[-1]
        deadline = time.monotonic() + KERNEL_TIMEOUT
        while True:
            try:
                self.transport().disconnect()
                return
            except (FileNotFoundError, ConnectionRefusedError):
                pass
            if child.process.poll() is not None:
                raise child.failed(f"ended with status {child.process.returncode} at boot")
            if time.monotonic() > deadline:
                raise child.failed(f"does not answer after {KERNEL_TIMEOUT:.0f} s")
            time.sleep(0.002)

    @property
    def socket(self) -> Path:
        """The socket of the running kernel; another one for each boot."""
        return self.directory / f"kernel-{len(self.kernels) - 1}.sock"

    def check(self) -> None:
        """Look after the devices. :raises HostError: one of them has ended, which none does by itself."""
        for child in self.devices:
            if child.process.poll() is not None:
                raise child.failed(f"ended with status {child.process.returncode}")

    # ---- the kernel's face

    def transport(self) -> SoftTransport:
        """A new connection to the running kernel: a new process in its eyes."""
        from iokeep.uapi.soft import SoftTransport

        return SoftTransport(self.socket)

    def kexec(
        self,
        profile: str,
        params: Mapping[str, str | int] | None = None,
        *,
        timeout: float = KERNEL_TIMEOUT,
    ) -> Kexec:
        """Wait for the old kernel's end (a client called reboot_kexec) and boot the next one on the
        same memory.

        :raises HostError: the old kernel does not end in ``timeout`` seconds or ends with a failure, or
            the new one does not come up.
        """
        old = self.kernels[-1]
        try:
            status = old.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise old.failed(f"still running after {timeout:.0f} s: was reboot_kexec() called?") from None
        if status != 0:
            raise old.failed(f"ended with status {status}")
        ended = time.monotonic_ns()
        self._start_kernel(profile, params)
        self._wait_kernel()
        return Kexec(ended, time.monotonic_ns())

    def kernel_log(self, boot: int = -1) -> str:
        """What a kernel logged: 0 = the first boot, -1 = the newest."""
        try:
            return self.kernels[boot].log.read_text(errors="replace")
        except OSError:
            return ""

    def audit(self) -> dict[str, Any]:
        """The running kernel's audit of all frames ("iokeep.audit-v1")."""
        transport = self.transport()
        try:
            fd = transport.open(AUDIT_PATH)
            found: dict[str, Any] = json.loads(transport.pread(fd, 1 << 20, 0))
            transport.close(fd)
            return found
        finally:
            transport.disconnect()

    def set_step(self, number: int) -> None:
        """Devices count what happens from now on under step ``number``."""
        for window in self.platform.bars:
            bar.set_step(window, number)

    # ---- end

    def stop(self) -> None:
        """Kill every process, unmap the platform, remove the directory. Idempotent."""
        if self._stopped:
            return
        self._stopped = True
        atexit.unregister(self.stop)
        children = [*self.kernels, *self.devices]
        for child in children:
            if child.process.poll() is None:
                child.process.kill()
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(10)
        self.platform.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> SoftHost:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def engine_is_compiled() -> bool:
    """Numba's cache has the DMA engine, newer than its source; devices then start in parallel at once.

    Numba keeps it beside the source or, where that cannot be written, in the user's cache.
    """
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return True
    source = Path(bar.__file__).with_name("engine.py")
    user = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    places = [source.parent / "__pycache__", Path(user) / "numba"]
    if cache := os.environ.get("NUMBA_CACHE_DIR"):
        places = [Path(cache)]
    newest = max((f.stat().st_mtime for p in places for f in p.rglob("engine.burst-*.nbi")), default=0.0)
    return newest > source.stat().st_mtime
