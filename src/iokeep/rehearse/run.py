# SPDX-License-Identifier: Apache-2.0
"""A rehearsal: a whole live update on the software host, with devices at work from the first step to the
last.

The orchestrator here is the measuring host, the operator who asks for the kexec, and the VMM's custodian
(what systemd's fd store or a supervisor is): it holds duplicates of the VMM's descriptors, so that a VMM
that was killed can be started again.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from iokeep.errors import CapabilityError, InputError, IokeepError, KernelRefused, UsageError
from iokeep.luo.client import LiveUpdate, Session
from iokeep.mem.capture import Capture
from iokeep.mem.ranges import Range
from iokeep.pt.extents import Extents
from iokeep.pt.leaves import leaves
from iokeep.pt.registry import open_format
from iokeep.rehearse import measure
from iokeep.rehearse.capture import save_between
from iokeep.rehearse.inject import (
    KILL_STEPS,
    REPLAY_FAULTS,
    STEPS,
    TABLE_FAULTS,
    Fault,
    Injected,
    change_tables,
)
from iokeep.rehearse.machine import captured
from iokeep.rehearse.scenario import Scenario, check_memory, like, pc
from iokeep.rehearse.vmm import pattern
from iokeep.restore.policies import policy_of
from iokeep.soft.hardware import bar
from iokeep.soft.host import SoftHost
from iokeep.soft.kernel.profiles import profile_of
from iokeep.uapi.soft import SoftTransport

__all__ = ["SCHEMA", "Options", "RehearsalFailed", "load_like", "rehearse"]

SCHEMA = "iokeep.rehearse-v1"
FRAME = 0x1000
SESSION = "vm-1"
MAX_DEVICES = 32
#: seconds that "after" waits for enough transactions at most
AFTER_SECONDS = 10.0
#: seconds until a VMM that says nothing is taken for dead
VMM_TIMEOUT = 240.0
#: the version that version-skew makes the first kernel write
SKEWED = "iokeep-iommufd-v2"


class RehearsalFailed(IokeepError):
    """The machinery of the rehearsal itself failed; the ends of the logs are in the message."""

    kind = "rehearsal"


@dataclass(frozen=True, slots=True)
class Options:
    """What to rehearse; see ``iokeep rehearse --help``. ``like`` is a capture directory, "" = a PC.

    ``transactions``: DMA that there is at least. ``capture``: a new directory for what lies between the
    kernels, "" = none.
    """

    policy: str = "adopt"
    format: str = "vtdss"
    memory: int = 1 << 30
    page_size: str = "mixed"
    devices: int = 2
    seed: int = 1
    kernel_from: str = "soft-7.3"
    kernel_to: str = "soft-7.4"
    like: str = ""
    inject: tuple[Fault, ...] = ()
    unsafe: bool = False
    transactions: int = 1_100_000
    capture: str = ""

    def check(self) -> None:
        """:raises UsageError: what does not fit together."""
        policy_of(self.policy, unsafe=self.unsafe)
        if not 1 <= self.devices <= MAX_DEVICES:
            raise UsageError(f"{self.devices} devices: 1 ... {MAX_DEVICES} are possible")
        for name in (self.kernel_from, self.kernel_to):
            if not profile_of(name).liveupdate:
                raise UsageError(
                    f"kernel profile {name} preserves no iommufd: there is no update to rehearse",
                    "choose soft-7.3 or soft-7.4",
                )
        kills = [f for f in self.inject if f.name == "kill-at"]
        if len(kills) > 1:
            raise UsageError("only one kill-at in one rehearsal")
        if self.capture and Path(self.capture).exists():
            raise UsageError(f"--capture {self.capture}: something is there already", "name a new directory")
        names = [f.text for f in self.inject]
        if len(set(names)) != len(names):
            raise UsageError("a fault is injected twice")


def load_like(source: str) -> Scenario:
    """The scenario of a capture. :raises InputError: it is unreadable. :raises CapabilityError: not for
    this host."""
    capture = Capture.load(source)
    meta = capture.meta
    name = Path(source).name
    mode = meta.get("mode", "legacy")
    mode = mode if isinstance(mode, str) else ""
    captured(name, capture.format, capture.config, mode)  # refused before the table is read
    found = leaves(open_format(capture.format, capture.config), capture.memory, capture.root_pa)
    source_facts = {"source": str(source), "kernel": str(meta.get("kernel", "")), "leaves": len(found)}
    return like(
        name,
        capture.format,
        capture.config,
        mode,
        (found.iova, found.pa, found.lg2, found.prot),
        source_facts,
    )


def rehearse(options: Options, progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Run a rehearsal; the body of the document ``iokeep.rehearse-v1``.

    :raises UsageError, InputError, CapabilityError: it cannot be run. :raises RehearsalFailed: a bug of ours.
    """
    options.check()
    scenario = (
        load_like(options.like)
        if options.like
        else pc(options.memory, options.page_size, options.format, options.seed)
    )
    check_memory(scenario.ram_bytes, scenario.name)
    with _Rehearsal(options, scenario, progress or (lambda text: None)) as r:
        return r.run()


_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    """In the child, before exec: be killed when the thread that started it is gone (prctl(2))."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class _Died(Exception):
    """A VMM process ended without a last word."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


class _VmmProcess:
    """A VMM process and the pipe to it."""

    def __init__(self, config: Mapping[str, Any], log: Path) -> None:
        self.log = log
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "iokeep.rehearse.vmm"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,
                preexec_fn=_die_with_parent,  # this process starts no threads before
            )
        self._buffer = b""
        self.answer(config)

    def answer(self, what: Mapping[str, Any]) -> None:
        """One line to the VMM; nothing where it is gone."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(what).encode() + b"\n")
            self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """The next event. :raises _Died: the process ended. :raises RehearsalFailed: it says nothing."""
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        poll = select.poll()  # select() ends at descriptor 1023
        poll.register(fd, select.POLLIN)
        while b"\n" not in self._buffer:
            if not poll.poll(VMM_TIMEOUT * 1000):
                raise RehearsalFailed(f"the VMM has said nothing for {VMM_TIMEOUT:.0f} s")
            chunk = os.read(fd, 1 << 16)
            if not chunk:
                raise _Died(self.process.wait(30))
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        event: dict[str, Any] = json.loads(line)
        return event

    def end(self) -> None:
        """Kill it, if it still lives."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


class _Custodian:
    """A connection to the running kernel that holds the session and duplicates of the VMM's descriptors."""

    def __init__(self, transport: SoftTransport) -> None:
        self.transport = transport
        self.liveupdate: LiveUpdate | None = None
        self.session: Session | None = None
        self.state: dict[str, Any] = {}

    @property
    def pid(self) -> int:
        """As the kernel names this process."""
        return self.transport.getpid()

    def create(self) -> None:
        """A new session."""
        self.liveupdate = self.liveupdate or LiveUpdate(self.transport)
        self.session = self.liveupdate.create(SESSION)

    def retrieve(self) -> None:
        """The session that came over the kexec."""
        self.liveupdate = LiveUpdate(self.transport)
        self.session = self.liveupdate.retrieve(SESSION)

    def take(self, event: Mapping[str, Any]) -> None:
        """Duplicate what a VMM has published, in place of what was held before."""
        old, pid = self.state, event["pid"]

        def dup(fd: int) -> int:
            return self.transport.getfd(pid, fd) if fd >= 0 else -1

        self.state = {
            "files": {token: dup(fd) for token, fd in event["files"].items()},
            "iommufd": dup(event["iommufd"]),
            "devices": [dup(fd) for fd in event["devices"]],
            "state": event["state"],
        }
        self._close(old)

    def _close(self, state: Mapping[str, Any]) -> None:
        if not state:
            return
        for fd in [*state["devices"], state["iommufd"], *state["files"].values()]:
            if fd >= 0:
                self.transport.close(fd)

    def drop(self) -> None:
        """Close all duplicates."""
        self._close(self.state)
        self.state = {}

    def end_session(self) -> None:
        """Close the session, and so end it where it is the last descriptor."""
        if self.session is not None:
            self.session.close()
            self.session = None

    def disconnect(self) -> None:
        """End this connection: for the kernel, the process is gone."""
        self.transport.disconnect()


class _Rehearsal:
    """One run. A context manager: whatever happens, no process and no file is left."""

    def __init__(self, options: Options, scenario: Scenario, say: Callable[[str], None]) -> None:
        self.options = options
        self.scenario = scenario
        self.say = say
        self._stack = contextlib.ExitStack()
        self.host: SoftHost
        self.clock: measure.Clock
        self.custodian: _Custodian
        self.vmm: _VmmProcess | None = None
        self.vmm_pid = 0
        self.audit: dict[str, Any] = {}
        self.damaged = 0
        self.killed: list[str] = []
        self.injected: list[Injected] = []
        self.result: dict[str, Any] = {}
        self.guest_check: dict[str, int] | None = None
        self.problems: list[str] = []
        self.like_result: dict[str, Any] | None = None
        self.freeze: dict[str, Any] = {}
        self.kill_at = next((f.step for f in options.inject if f.name == "kill-at"), "")
        if self.kill_at in ("switch", "adopt"):
            self.kill_at = policy_of(options.policy, unsafe=options.unsafe).take
        self.names = tuple(f.name for f in options.inject)
        self.files_pa: list[tuple[int, Any, Any]] = []
        self.translated = Extents.empty()
        #: of the table, once it is there: its levels, and log2 of the IOVAs that devices can have
        self.levels = 0
        self.input_lg2 = 0

    def __enter__(self) -> _Rehearsal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.vmm is not None:
            self.vmm.end()
        self._stack.close()

    # ---- the course

    def run(self) -> dict[str, Any]:
        """All steps; the body of the document."""
        self.directory = Path(
            self._stack.enter_context(tempfile.TemporaryDirectory(prefix="iokeep-rehearse-"))
        )
        self.host = SoftHost.create(
            self.scenario.ram_bytes,
            self.options.devices,
            self.options.kernel_from,
            self._params(first=True),
            iommu=self.scenario.iommu,
            progress=self.say,
        )
        self._stack.callback(self.host.stop)
        self.clock = measure.Clock(self.host.set_step, KILL_STEPS, self.say)
        self.started = time.monotonic_ns()
        self.clock.begin("setup")
        try:
            self._before()
            self._kexec()
            self._after()
        except _Died as e:
            raise RehearsalFailed(f"the VMM ended with {e}{self._logs()}") from e
        except IokeepError as e:
            if isinstance(e, UsageError | InputError | CapabilityError | RehearsalFailed):
                raise
            raise RehearsalFailed(f"{e.what}{self._logs()}") from e
        return self._document()

    def _params(self, *, first: bool) -> dict[str, str | int]:
        """Command line of a kernel."""
        s = self.scenario
        params: dict[str, str | int] = {"iommu": s.mode, **s.params, "seed": self.options.seed}
        for f in s.files:
            placement = f.placement
            if f.pfns is not None:
                path = self.directory / f"{f.name}.npy"
                if first:
                    np.save(path, f.pfns, allow_pickle=False)
                placement = str(path)
            params[f"placement.{f.name}"] = placement
        if first:
            if "stale-root" in self.names:
                params["stale_root"] = 1
            if "truncate-records" in self.names:
                params["truncate_records"] = 1
            if "version-skew" in self.names:
                params["records_version"] = SKEWED
        elif self.options.policy == "trust":
            params["unsafe_adopt"] = 1
        return params

    def _config(self, role: str) -> dict[str, Any]:
        """What a VMM process is told."""
        s, o, c = self.scenario, self.options, self.custodian
        kill = self.kill_at if self.kill_at not in self.killed else ""
        assert c.session is not None
        return {
            "role": role,
            "socket": str(self.host.socket),
            "policy": o.policy,
            "unsafe": o.unsafe,
            "seed": o.seed,
            "kill_at": kill,
            "custodian": c.pid,
            "session_fd": c.session.fd,
            "state": c.state,
            "files": [{"name": f.name, "size": f.size} for f in s.files],
            "slots": {str(i + 1): s.slot_base(i) for i in range(len(s.files))},
            "areas": [[a.iova, a.last, a.file + 1, a.offset, a.prot] for a in s.areas],
            "unplugged": [[a.iova, a.last, a.file + 1, a.offset, a.prot] for a in s.unplugged],
            "quiet": [[r.start, r.last] for r in s.quiet],
            "devices": [f"/dev/vfio/devices/vfio{i}" for i in range(o.devices)],
            "inject": [f.name for f in o.inject if f.name in REPLAY_FAULTS],
            "input_lg2": self.input_lg2,
        }

    # ---- conversation

    def _start(self, role: str) -> None:
        self.vmm = _VmmProcess(self._config(role), self.directory / f"vmm-{role}.log")

    def _talk(self, role: str, until: str) -> dict[str, Any]:
        """Serve the VMM until it says ``until``; start it again when it was killed as planned."""
        while True:
            assert self.vmm is not None
            try:
                event = self.vmm.hear()
            except _Died as e:
                if e.status != -9 or not self.kill_at or self.kill_at in self.killed:
                    raise
                self._restart(role)
                continue
            if event["event"] == until:
                return event
            self._serve(event)

    def _serve(self, event: dict[str, Any]) -> None:
        assert self.vmm is not None
        kind = event["event"]
        if kind == "hello":
            self.vmm_pid = int(event["pid"])
        elif kind == "step":
            self.clock.begin(event["step"])
        elif kind == "fds":
            self.custodian.take(event)
        elif kind == "injected":
            one = Injected(event["fault"], event["what"], event["iova"])
            if one not in self.injected:
                self.injected.append(one)
        elif kind == "result":
            self.result = event
        elif kind == "checked":
            self.guest_check = event["guest"]
        elif kind == "proof":
            self._proved(event)
        elif kind == "running":
            self._wait_enough()
        elif kind == "failed":
            if event["exit"] == 2:
                raise UsageError(event["what"], event["hint"])
            raise RehearsalFailed(f"the VMM failed: {event['what']}{self._logs()}")
        else:
            raise RehearsalFailed(f"the VMM said {event!r}")
        self.vmm.answer({})

    def _proved(self, event: Mapping[str, Any]) -> None:
        """The proof that came after the adoption is at its end."""
        for key in ("pages", "table_bytes", "validate_ns", "total_mismatches", "mismatches"):
            self.result[key] = event[key]
        if event["state"] != "validated":
            self.result["outcome"] = "contained"
            self.result["reason"] = f"adopted, then quarantined: {event['total_mismatches']} ranges differ"

    def _restart(self, role: str) -> None:
        """The VMM was killed: wait until the kernel has buried it, and start another."""
        assert self.vmm is not None
        self.killed.append(self.kill_at)
        self.vmm.end()
        self._wait_buried()
        if role == "before" and self.kill_at == "setup":
            self.custodian.drop()
        elif role == "before":
            # Half a session is worth nothing: end it, and so take back what was preserved.
            self.custodian.end_session()
            self.custodian.create()
        self._start(role)

    def _wait_buried(self) -> None:
        """Until the kernel has noticed the VMM's end, so that nothing is held twice."""
        end = time.monotonic() + 10
        while time.monotonic() < end:
            try:
                self.custodian.transport.close(self.custodian.transport.getfd(self.vmm_pid, 0))
            except OSError as e:
                if e.errno == errno.ESRCH:
                    return
            time.sleep(0.002)
        raise RehearsalFailed(f"the kernel still knows process {self.vmm_pid} after 10 s{self._logs()}")

    def _wait_enough(self) -> None:
        """Let the devices work until the rehearsal has seen enough DMA."""
        start, enough = time.monotonic(), self.options.transactions
        while time.monotonic() - start < AFTER_SECONDS:
            self.host.check()
            if time.monotonic() - start > 0.25 and measure.transactions(self.host.platform) >= enough:
                return
            time.sleep(0.01)

    # ---- steps

    def _before(self) -> None:
        self.custodian = _Custodian(self.host.transport())
        self.custodian.create()
        self._start("before")
        self._talk("before", "saved")
        self.clock.end()
        self._look()

    def _look(self) -> None:
        """Before the kexec: what the tables hold, and where each page of the guest lies."""
        platform = self.host.platform
        table = measure.device_table(platform)
        self.levels = len(table.fmt.levels)
        self.input_lg2 = table.fmt.input_lg2 - table.fmt.sign_extend
        found = measure.table_leaves(platform, table)
        self.translated = found.extents()
        for a in self.scenario.areas:
            # pa of each page of the area, from the leaves that map it.
            iova = np.arange(a.iova, a.last + 1, FRAME, dtype=np.uint64)
            at = np.searchsorted(found.iova, iova, side="right") - 1
            pas = found.pa[at] + (iova - found.iova[at])
            pages = np.arange(a.offset // FRAME, a.offset // FRAME + len(iova), dtype=np.int64)
            self.files_pa.append((a.file, pages, pas))
        expected = self.scenario.expected
        if expected is not None:
            why = measure.compare_leaves(found, expected)
            sizes: dict[str, int] = {}
            for lg2 in sorted(set(found.lg2.tolist())):
                sizes[f"{1 << int(lg2):#x}"] = int(np.count_nonzero(found.lg2 == lg2))
            self.like_result = {
                **self.scenario.source,
                "equal": not why,
                "why": why,
                "leaf_sizes": sizes,
                "areas": len(self.scenario.areas),
            }
        self.freeze["table_pages"] = measure.count_table_pages(platform, table)

    def _guest_intact(self) -> int:
        """Pages of the guest whose own pattern is gone, looked up in physical memory."""
        damaged = 0
        patterns: dict[int, Any] = {}
        for file, pages, pas in self.files_pa:
            if file not in patterns:
                n = self.scenario.files[file].size // FRAME
                patterns[file] = pattern(file + 1, n, self.options.seed)
            found = measure.guest_words(self.host.platform, pas + np.uint64(63 * 64))
            damaged += int(np.count_nonzero(found != patterns[file][pages]))
        return damaged

    def _kexec(self) -> None:
        clock, host, o = self.clock, self.host, self.options
        clock.begin("freeze")
        self._maybe_kill("freeze")
        try:
            self.custodian.transport.reboot_kexec()
        except OSError as e:
            if e.errno not in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN):
                raise RehearsalFailed(f"the kernel refuses the kexec: {e}{self._logs()}") from e
        clock.begin("kexec")
        self._maybe_kill("kexec")
        host.kernels[-1].process.wait(60)
        if self.vmm is not None:
            self.vmm.end()
        for name in self.names:
            if name in TABLE_FAULTS:
                self._inject_tables(name)
        if o.capture:
            save_between(
                Path(o.capture),
                host.platform,
                o.kernel_from,
                measure.device_table(host.platform),
                self.translated,
                self.scenario.name,
            )
        clock.begin("boot")
        host.kexec(o.kernel_to, self._params(first=False))
        clock.end()

    def _maybe_kill(self, step: str) -> None:
        """Kill the VMM of the first kernel; nobody needs it any more, its session is held."""
        if self.kill_at == step and self.vmm is not None:
            self.vmm.end()
            self.killed.append(step)

    def _inject_tables(self, name: str) -> None:
        table = measure.device_table(self.host.platform)
        self.injected.append(
            change_tables(
                name,
                table.fmt,
                self.host.platform.ram,
                table.root_pa,
                self.scenario.quiet,
                self.host.platform.tags,
                [Range(a.iova, a.last) for a in self.scenario.unplugged],
            )
        )

    def _after(self) -> None:
        self.custodian = _Custodian(self.host.transport())
        for name, what in (
            ("stale-root", "the record names a root that the hardware does not use"),
            ("truncate-records", "the record of the iommufd is cut short"),
            ("version-skew", f"the record of the iommufd says version {SKEWED}"),
        ):
            if name in self.names:
                self.injected.append(Injected(name, what))
        self.clock.begin("retrieve")
        try:
            self.custodian.retrieve()
        except KernelRefused as e:
            self.result = {"outcome": "refused", "reason": self._why(e.what)}
            self._alone()
            return
        self._start("after")
        if self.kill_at == "boot" and self.vmm is not None:
            self._serve(self.vmm.hear())  # it has connected
            self._restart("after")
        last = self._talk("after", "done")
        self.problems += last.get("problems", [])
        assert self.vmm is not None
        self.vmm.answer({})
        self.vmm.end()
        self._end()

    def _why(self, reason: str) -> str:
        """A refusal, with what the kernel logged about it."""
        log = [line for line in self.host.kernel_log().splitlines() if "iokeep software kernel" not in line]
        said = [line for line in log if any(w in line for w in ("liveupdate", "luo", "iommu", "record"))]
        return f"{reason} (kernel log: {said[-1].strip()})" if said else reason

    def _alone(self) -> None:
        """No VMM can come back: the devices go on with nobody to care for them."""
        self.clock.begin("after")
        self._wait_enough()
        self.clock.begin("teardown")
        self._end()

    def _end(self) -> None:
        """Stop what still runs, give everything back, count."""
        restored = self.result.get("outcome") in ("restored", "contained")
        for window in self.host.platform.bars:
            if not restored:
                bar.command(window, bar.CMD_VERIFY_ALL, timeout=120)
            bar.enable(window, False, timeout=60)
        self.damaged = self._guest_intact() if not restored else 0
        self._wait_buried()
        self.custodian.drop()
        self.custodian.end_session()
        self.clock.end()
        self.audit = self.host.audit()

    def _logs(self) -> str:
        """Ends of all logs, for a failure."""
        out = []
        if hasattr(self, "host"):
            for n in range(len(self.host.kernels)):
                tail = "\n".join(self.host.kernel_log(n).splitlines()[-15:])
                out.append(f"kernel {n}:\n{tail}")
        for log in sorted(self.directory.glob("vmm-*.log")):
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
            if tail:
                out.append(f"{log.name}:\n{tail}")
        return "\n" + "\n".join(out) if out else ""

    # ---- the document

    def _document(self) -> dict[str, Any]:
        o, s, result = self.options, self.scenario, self.result
        platform = self.host.platform
        steps, total = measure.dma_of(platform)
        timeline = []
        for lap in self.clock.laps:
            number = KILL_STEPS.index(lap.name)
            stats = steps[number]
            timeline.append(
                {
                    "step": lap.name,
                    "start_ms": round((lap.start - self.started) / 1e6, 3),
                    "ms": round(lap.ns / 1e6, 3),
                    "transactions": stats.transactions,
                    "max_gap_us": round(stats.max_gap_ns / 1e3, 1),
                    "max_gap_on_cpu_us": round(stats.max_gap_on_cpu_ns / 1e3, 1),
                }
            )
        verify = [bar.read_status(w) for w in platform.bars]
        check = self.guest_check or {}
        lost = total.lost + sum(v.verify_lost for v in verify)
        misdirected = total.misdirected + sum(v.verify_misdirected for v in verify) + check.get("foreign", 0)
        faults = total.faults + sum(v.verify_faults for v in verify)
        damaged = check.get("damaged", 0) + self.damaged
        during = sum(steps[KILL_STEPS.index(n)].transactions for n in ("kexec", "boot"))
        validate_ns, pages = result.get("validate_ns", 0), result.get("pages", 0)
        audit = self.audit
        if self.kill_at and self.kill_at not in self.killed:
            self.problems.append(f"kill-at={self.kill_at}: that step was never reached")
        harm = {
            "lost": lost,
            "misdirected": misdirected,
            "faults": faults,
            "leaks": total.leaks,
            "leaked": audit["leaked"],
            "wrongly_freed": audit["wrongly_freed"],
            "bad_unpins": audit["bad_unpins"],
            "bad_puts": audit["bad_puts"],
            "guest_pages_damaged": damaged,
        }
        outcome = result.get("outcome", "refused")
        if any(harm.values()):
            outcome = "corrupted"
        reason = result.get("reason", "")
        if outcome == "corrupted":
            hurt = ", ".join(f"{k} {v}" for k, v in harm.items() if v)
            reason = f"{reason}; {hurt}" if reason else hurt
        return {
            "policy": o.policy,
            "outcome": outcome,
            "reason": reason,
            "seed": o.seed,
            "kernels": {"from": o.kernel_from, "to": o.kernel_to},
            "guest": {
                "name": SESSION,
                "scenario": s.name,
                "ram": s.ram,
                "memory": s.memory,
                "mapped": s.mapped,
                "page_size": s.page_size,
                "format": s.format,
                "levels": self.levels,
                "iommu": s.iommu,
                "mode": s.mode,
                "devices": o.devices,
                "files": len(s.files),
                "areas": len(s.areas),
            },
            "injected": [
                {"fault": i.fault, "what": i.what, "iova": None if i.iova is None else f"{i.iova:#x}"}
                for i in self.injected
            ],
            "killed": self.killed,
            "compile_ms": None if (ms := self.host.compile_ms) is None else round(ms, 3),
            "dma": {
                "transactions": total.transactions,
                "bytes": total.bytes,
                "lost": lost,
                "misdirected": misdirected,
                "faults": faults,
                "max_gap_us": round(total.max_gap_ns / 1e3, 1),
                "max_gap_on_cpu_us": round(total.max_gap_on_cpu_ns / 1e3, 1),
                "during_kexec": during,
                "denied": total.denied,
                "leaks": total.leaks,
                "verified": sum(v.verify_checked for v in verify),
                "incidents": measure.incidents(platform),
            },
            "timeline": timeline,
            "restore": {
                "pages": pages,
                "areas": result.get("areas", 0),
                "table_bytes": result.get("table_bytes", 0),
                "ms": round(validate_ns / 1e6, 4),
                "ns_per_page": round(validate_ns / pages, 4) if pages else 0.0,
                "mismatches": [
                    {**m, "expected_prot": _prot(m["expected_prot"]), "found_prot": _prot(m["found_prot"])}
                    for m in result.get("mismatches", [])
                ],
                "total_mismatches": result.get("total_mismatches", 0),
                "layout_differences": result.get("layout_differences", 0),
                "steps_ms": {name: round(ns / 1e6, 3) for name, _, ns in result.get("steps", [])},
                "resumed": result.get("resumed", ""),
                "journal": result.get("journal", []),
            },
            "frames": {
                "leaked": audit["leaked"],
                "wrongly_freed": audit["wrongly_freed"],
                "bad_unpins": audit["bad_unpins"],
                "bad_puts": audit["bad_puts"],
                "allocated": audit["allocated"],
                "by_kind": audit["by_kind"],
            },
            "proof": {
                "guest_pages": check.get("pages", 0),
                "guest_pages_damaged": damaged,
                "foreign_payloads": check.get("foreign", 0),
                "problems": self.problems,
            },
            "freeze": self.freeze,
            "like": self.like_result,
            "next": _next(o, outcome),
        }


def _prot(value: Any) -> str | None:
    return None if value is None else {0: "--", 1: "r-", 2: "-w", 3: "rw"}.get(value, f"{value:#x}")


def _next(options: Options, outcome: str) -> str:
    """What to try next."""
    if outcome == "restored" and not options.inject:
        return "iokeep rehearse --inject wrong-offset      what validation is for"
    if outcome in ("refused", "contained") and options.inject and options.policy != "trust":
        faults = " ".join(f"--inject {f.text}" for f in options.inject)
        return f"iokeep rehearse {faults} --policy trust --unsafe      what it would have done"
    return ""


assert set(STEPS) < set(KILL_STEPS)
