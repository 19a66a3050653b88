# SPDX-License-Identifier: Apache-2.0
"""A whole software host in one process, for fast tests: the kernel in a thread, devices turned by hand.

The same kernel, wire and hardware as in :mod:`iokeep.soft.host`; what is missing is that parties run at
the same time. Devices make progress when :meth:`LocalHost.run` is called and while the kernel waits for
hardware.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from iokeep.errors import IokeepError
from iokeep.soft.hardware import bar
from iokeep.soft.hardware.platform import Platform
from iokeep.soft.kernel.boot import Carrier, carrier_of
from iokeep.soft.kernel.builtin import install
from iokeep.soft.kernel.frames import Audit
from iokeep.soft.kernel.kernel import Kernel
from iokeep.soft.kernel.klog import Klog
from iokeep.soft.kernel.params import Params
from iokeep.soft.kernel.server import Server
from iokeep.uapi.soft import SoftTransport

if TYPE_CHECKING:
    from iokeep.soft.hardware.dma import DmaEngine

#: seconds to wait for the kernel's thread
_TIMEOUT = 60.0


class LocalHost:
    """A platform, a kernel in a thread, and the devices' engines.

    :ivar kernel: the running kernel: tests may look into it while no call is under way.
    :ivar carrier: its live-update half.

    :param devices: False: no DMA engine is made (and Numba is not imported). :param iommu: kind of the IOMMU.
    """

    def __init__(
        self,
        ram_bytes: int = 64 << 20,
        n_devices: int = 1,
        profile: str = "soft-7.3",
        params: Mapping[str, str | int] | None = None,
        *,
        devices: bool = True,
        iommu: str = "vtd",
    ) -> None:
        self.platform = Platform.create(ram_bytes, n_devices, iommu=iommu)
        self.directory = Path(tempfile.mkdtemp(prefix="iokeep-local-"))
        self.engines: list[DmaEngine] = []
        self._turning = threading.RLock()
        self._boots = 0
        self._failure: BaseException | None = None
        self.logs: list[Klog] = []
        self._transports: list[SoftTransport] = []
        if devices:
            from iokeep.soft.hardware.dma import DmaEngine
            from iokeep.soft.hardware.iommu import FrontEnd

            self.engines = [
                DmaEngine(FrontEnd(self.platform, i), w) for i, w in enumerate(self.platform.bars)
            ]
        self.kernel: Kernel
        self.carrier: Carrier
        self._boot(profile, params)

    def _boot(self, profile: str, params: Mapping[str, str | int] | None) -> None:
        words = [f"{key}={value}" for key, value in (params or {}).items()]
        klog = Klog(None)
        self.logs.append(klog)
        kernel = Kernel(self.platform, profile, Params.parse(words), klog)
        kernel.pump = self._pump
        install(kernel)
        self.carrier = carrier_of(kernel)
        self.kernel = kernel
        kernel.boot()
        self._server = Server(kernel, self.socket)
        self._thread = threading.Thread(target=self._serve, args=(self._server,), daemon=True)
        self._thread.start()

    def _serve(self, server: Server) -> None:
        try:
            server.run()
        except BaseException as error:  # noqa: BLE001  (an oops: kept for the test, which then sees it)
            self._failure = error
        finally:
            server.close()

    @property
    def socket(self) -> Path:
        """The socket of the running kernel."""
        return self.directory / f"kernel-{self._boots}.sock"

    # ---- devices

    def _pump(self) -> None:
        with self._turning:
            for engine in self.engines:
                engine.pump()

    def run(self, rounds: int = 8) -> None:
        """Let every device do some bursts."""
        for _ in range(rounds):
            self._pump()

    def set_ranges(self, index: int, rows: list[bar.RangeRow]) -> None:
        """Give a device its working set and start it, as its driver would through the BAR."""
        window = self.platform.bars[index]
        bar.write_ranges(window, rows, timeout=0)
        bar.enable(window, True, timeout=0)
        self.run(4)
        if bar.read_register(window, bar.GENERATION_ERROR):
            raise ValueError(f"device {index} refused its range table")

    def stop_device(self, index: int) -> None:
        """Quiesce a device."""
        bar.enable(self.platform.bars[index], False, timeout=0)
        self.run(2)

    def stats(self, index: int = 0) -> bar.StepStats:
        """Counters of a device, all steps."""
        return bar.decode_stats(self.platform.bars[index]).total

    # ---- the kernel's face

    def transport(self) -> SoftTransport:
        """A new process."""
        self.check()
        transport = SoftTransport(self.socket)
        self._transports.append(transport)
        return transport

    def check(self) -> None:
        """:raises IokeepError: the kernel hit a bug; its log is in the message."""
        if self._failure is not None:
            raise IokeepError(f"kernel oops: {self._failure}\n{self.log()}") from self._failure

    def log(self, boot: int = -1) -> str:
        """A kernel's log."""
        return self.logs[boot].text()

    def settle(self) -> None:
        """Wait until the kernel has noticed that processes ended: a call that is served after them."""
        for _ in range(2):
            probe = self.transport()
            probe.getpid()
            probe.disconnect()
            self._transports.remove(probe)

    def kexec(self, profile: str, params: Mapping[str, str | int] | None = None) -> None:
        """After reboot_kexec() of a client: boot another kernel on the same platform."""
        self._thread.join(_TIMEOUT)
        self.check()
        if self._thread.is_alive() or not self.kernel.rebooting:
            raise IokeepError("the kernel still runs: was reboot_kexec() called?")
        self._boots += 1
        self._boot(profile, params)

    def audit(self) -> Audit:
        """The running kernel's audit."""
        self.settle()
        return self.kernel.audit()

    def stop(self) -> None:
        """End everything. Idempotent."""
        for transport in self._transports:
            transport.disconnect()
        self._transports.clear()
        self._server.stop()
        self._thread.join(_TIMEOUT)
        for engine in self.engines:
            engine.close()
        self.engines.clear()
        self.platform.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> LocalHost:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
