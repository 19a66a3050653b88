# SPDX-License-Identifier: Apache-2.0
"""The kernel itself: memory, files, processes, devices of one boot; registries that its modules fill."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from iokeep.errors import UsageError
from iokeep.soft.kernel.files import DebugFile, File, Ioctl, SysrqFile
from iokeep.soft.kernel.frames import Audit, Claim, FrameAllocator
from iokeep.soft.kernel.klog import Klog
from iokeep.soft.kernel.memlock import status
from iokeep.soft.kernel.params import Params
from iokeep.soft.kernel.placement import Placement
from iokeep.soft.kernel.process import NoUserMemory, Process, UserMemory

if TYPE_CHECKING:
    from iokeep.soft.hardware.platform import Platform
    from iokeep.soft.kernel.device import IommufdDevice
    from iokeep.soft.kernel.hwpt import Hwpt
    from iokeep.soft.kernel.iommu import Domain, Iommu
    from iokeep.soft.kernel.iommufd import Iommufd
    from iokeep.soft.kernel.syscalls import Result
    from iokeep.soft.kernel.vfio import VfioDeviceFile
    from iokeep.uapi.wire import Request

#: opens a device node for a process: a new file with one reference. :raises SysError: why not.
OpenNode = Callable[[Process], File]
#: serves one ioctl of a file type that the type's own table does not know
IoctlHandler = Callable[[Any, Ioctl], int]


class Kernel:
    """One boot of the software kernel on a platform.

    Life: construct; let modules register (``ioctl_extensions``, ``device_nodes``, hooks); :meth:`boot`; serve
    system calls; :meth:`reboot_kexec` or :meth:`shutdown`.

    :param platform: physical memory, registers, tags. :param profile: name of the kernel version
        ("soft-7.3").
    :param params: the command line.
    """

    def __init__(
        self,
        platform: Platform,
        profile: str = "soft-7.3",
        params: Params | None = None,
        klog: Klog | None = None,
    ) -> None:
        self.platform = platform
        self.profile = profile
        self.params = params or Params()
        self.klog = klog or Klog()
        self.frames = FrameAllocator(platform, seed=self.params.number("seed", 0))
        self.placement = Placement(self.params.text("placement", "2m-scattered"))
        self._placements = {
            key.removeprefix("placement."): Placement(spec)
            for key, spec in self.params.items()
            if key.startswith("placement.")
        }
        #: open files by inode number
        self.files: dict[int, File] = {}
        #: live processes by pid
        self.processes: dict[int, Process] = {}
        self._next_pid = 1000
        #: pages that are charged to the user, who is the same for all processes (user_struct.locked_vm)
        self.locked_pages = 0
        #: called while another party (a device in the same process) must make progress: in-process tests set
        #: it
        self.pump: Callable[[], None] | None = None
        #: (file type, request) -> handler, asked before the type's own ioctls (subclasses match too)
        self.ioctl_extensions: dict[tuple[type[File], int], IoctlHandler] = {}
        #: path -> open function
        self.device_nodes: dict[str, OpenNode] = {
            "/dev/kmsg": self._open_kmsg,
            "/sys/kernel/debug/iokeep/audit": self._open_audit,
            "/proc/sysrq-trigger": lambda process: SysrqFile(self),
        }
        #: run at boot before anything is allocated: reserve preserved memory, hand prior domains to the IOMMU
        #: driver
        self.early_boot_hooks: list[Callable[[Kernel], None]] = []
        #: run at boot when the IOMMU driver is up
        self.boot_hooks: list[Callable[[Kernel], None]] = []
        #: run in order by reboot_kexec; an exception (SysError) stops it, and the hooks that ran are asked to
        #: undo
        self.reboot_hooks: list[Callable[[Kernel], None]] = []
        #: undo of reboot_hooks, run in reverse order when a later one fails
        self.reboot_undo_hooks: list[Callable[[Kernel], None]] = []
        #: asked before a VFIO device is bound to an iommufd; SysError refuses
        self.bind_checks: list[Callable[[VfioDeviceFile, Iommufd], None]] = []
        #: asked before a device is attached to an HWPT; SysError refuses
        self.attach_checks: list[Callable[[IommufdDevice, Hwpt], None]] = []
        #: told after it was, with the domain that translated for the device before (None: blocked)
        self.attached_hooks: list[Callable[[IommufdDevice, Hwpt, Domain | None], None]] = []
        #: VFIO files that are bound, by device index
        self.vfio_bound: dict[int, VfioDeviceFile] = {}
        #: warnings since boot ("WARN_ON"): a kernel that has any is not to be trusted
        self.warnings = 0
        #: further holders of frames, asked by audit()
        self.claimants: list[Callable[[], Iterable[Claim]]] = []
        #: run while no call is served: each does a little of its work if that is due, and says in how many
        #: seconds it wants to be asked again
        self.background: list[Callable[[], float]] = []
        #: set by reboot_kexec when every hook succeeded: the server ends the process
        self.rebooting = False
        self._iommu: Iommu | None = None

    # ---- log

    def log(self, message: str) -> None:
        """One entry in the kernel log."""
        self.klog.log(message)

    def warn(self, message: str) -> None:
        """Something that must not be (WARN_ON); the kernel goes on."""
        self.warnings += 1
        self.log(f"WARNING: {message}")

    # ---- life

    @property
    def iommu(self) -> Iommu:
        """The IOMMU driver. :raises UsageError: before boot."""
        if self._iommu is None:
            raise UsageError("the kernel has not booted yet")
        return self._iommu

    def boot(self) -> None:
        """Bring the kernel up: reserve what was preserved, poison the rest, start the IOMMU driver, then
        modules.
        """
        from iokeep.soft.kernel.drivers import driver_of

        self.log(
            f"iokeep software kernel, profile {self.profile}: {' '.join(self.params.words())}".rstrip(": ")
        )
        self._iommu = driver_of(self)
        for hook in self.early_boot_hooks:
            hook(self)
        n = self.frames.poison_free()
        self.log(f"memory: {self.frames.n_frames} frames, {self.frames.n_free} free, {n} of these poisoned")
        self._iommu.start()
        for hook in self.boot_hooks:
            hook(self)

    def reboot_kexec(self) -> None:
        """reboot(LINUX_REBOOT_CMD_KEXEC): hooks serialise; then the kernel ends, leaving memory and hardware
        as is.

        :raises SysError: a hook refused; the ones before it were undone and the kernel goes on.
        """
        from iokeep.soft.kernel.syserror import SysError

        for number, hook in enumerate(self.reboot_hooks):
            try:
                hook(self)
            except SysError:
                for undo in reversed(self.reboot_undo_hooks[:number]):
                    undo(self)
                raise
        self.log("reboot: kexec")
        self.rebooting = True

    def shutdown(self) -> None:
        """End of all processes, as a power-off does; the kernel stays usable for an audit."""
        for pid in sorted(self.processes):
            self.exit_process(pid)

    def work(self) -> float:
        """Background work that is due; in how many seconds there is more (infinite: none)."""
        return min((one() for one in self.background), default=math.inf)

    # ---- processes

    def syscall(self, process: Process, request: Request) -> Result:
        """One system call of ``process``. :raises SysError: the errno that it fails with."""
        from iokeep.soft.kernel.syscalls import syscall

        return syscall(self, process, request)

    def spawn(
        self, user: UserMemory | None = None, pid: int | None = None, *, privileged: bool = True
    ) -> Process:
        """A new process (a client that connected). ``pid``: its number where the client has its own."""
        if pid is None or pid in self.processes:
            while self._next_pid in self.processes:
                self._next_pid += 1
            pid = self._next_pid
            self._next_pid += 1
        process = Process(self, pid, user or NoUserMemory(), privileged=privileged)
        self.processes[pid] = process
        self.device_nodes[f"/proc/{pid}/status"] = lambda _: DebugFile(
            self, "status", lambda: status(process)
        )
        return process

    def exit_process(self, pid: int) -> None:
        """The process is gone: everything that it had open is closed."""
        process = self.processes.pop(pid, None)
        if process is not None:
            del self.device_nodes[f"/proc/{pid}/status"]
            process.exit()

    # ---- files

    def placement_of(self, name: str) -> Placement:
        """Where the pages of the memfd ``name`` go: parameter ``placement.NAME``, else the boot's
        ``placement``.
        """
        return self._placements.get(name, self.placement)

    def ioctl_handler(self, file: File, request: int) -> IoctlHandler | None:
        """The module that serves ``request`` on this type of file, if any."""
        for cls in type(file).__mro__:
            handler = self.ioctl_extensions.get((cls, request))
            if handler is not None:
                return handler
        return None

    # ---- inspection

    def claims(self) -> Iterable[Claim]:
        """What every live object says of the frames it holds."""
        for file in list(self.files.values()):
            yield from file.claims()
        for process in self.processes.values():
            yield from process.claims()
        if self._iommu is not None:
            yield from self._iommu.claims()
        for claimant in self.claimants:
            yield from claimant()

    def audit(self) -> Audit:
        """Compare the page allocator with every live object."""
        return self.frames.audit(self.claims())

    def _open_kmsg(self, process: Process) -> File:
        return DebugFile(self, "kmsg", lambda: self.klog.text().encode())

    def _open_audit(self, process: Process) -> File:
        return DebugFile(self, "audit", lambda: (json.dumps(self.audit().as_json()) + "\n").encode())
