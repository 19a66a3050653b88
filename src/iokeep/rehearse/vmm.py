# SPDX-License-Identifier: Apache-2.0
"""The VMM of a rehearsal: a process that uses the public library on a transport, and its devices' BARs.

``python -m iokeep.rehearse.vmm`` reads one JSON line, its configuration, from stdin, and then answers to
its own questions: it prints an event as a JSON line and waits for a line. Its roles:

* ``before``: sets the guest up, starts DMA, preserves everything; the kexec ends it.
* ``after``: retrieves, replays, restores by a policy, lets the devices work on everything, unmaps everything.

Either can be killed at any time: it is started again with what its custodian holds (``state``) and carries
on.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iokeep.errors import IokeepError, KernelRefused, KernelRefusedPartly
from iokeep.iommufd.client import Ioas, Iommufd, Mismatch, VfioDevice
from iokeep.luo.client import Session
from iokeep.mem.ranges import Range, merge, subtract
from iokeep.rehearse.inject import REPLAY_FAULTS, change_replay
from iokeep.restore.manifest import (
    MANIFEST_TOKEN,
    Area,
    DeviceEntry,
    FileEntry,
    HwptEntry,
    Manifest,
)
from iokeep.restore.policies import policy_of
from iokeep.restore.run import Live, RestoreResult, load_manifest, restore
from iokeep.restore.save import SEALS_WANTED, save
from iokeep.soft.hardware import bar
from iokeep.uapi.soft import SoftTransport
from iokeep.uapi.transport import Mapping

FRAME = 0x1000
MFD_CLOEXEC = 0x1
MFD_ALLOW_SEALING = 0x2
IOMMUFD_TOKEN = 0x1000
HWPT_TOKEN = 0x2000
DEVICE_TOKEN = 0x3000
#: the guest's own pattern: the last 64-byte line of each page, which no device uses (device i uses line i)
GUEST_LINE = 63 * 64
#: seconds that the kernel's own sweep gets before the VMM drives it to its end
_SWEEP_SECONDS = 5.0
#: pages that are probed behind each end of the areas
_MAX_PROBES = 64

U64 = NDArray[np.uint64]


class Gone(Exception):
    """The orchestrator is gone."""


class Control:
    """The pipe to the orchestrator, and the order to die.

    :param kill_at: step in which this process kills itself, or "".
    """

    def __init__(self, kill_at: str = "") -> None:
        self.kill_at = kill_at
        self.step_now = ""

    def tell(self, event: str, **fields: Any) -> None:
        """One event."""
        sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
        sys.stdout.flush()

    def ask(self, event: str, **fields: Any) -> dict[str, Any]:
        """One event, and the answer to it. :raises Gone: there is nobody to answer."""
        self.tell(event, **fields)
        return self.hear()

    def hear(self) -> dict[str, Any]:
        """One line from the orchestrator. :raises Gone: end of file."""
        line = sys.stdin.readline()
        if not line:
            raise Gone
        answer: dict[str, Any] = json.loads(line)
        return answer

    def step(self, name: str) -> None:
        """A new step begins; returns when the devices count under it."""
        if name != self.step_now:
            self.step_now = name
            self.ask("step", step=name)

    def at(self, step: str, done: int, total: int) -> None:
        """Progress within a step: the place to die is behind its middle, or its start where it has no
        parts."""
        if total == 0:
            self.step(step)
        if step == self.kill_at and (done * 2 > total or (total == 0 and step in ("finish", "after"))):
            self.die()

    def die(self) -> None:
        """Be killed, as by the kernel's OOM killer: nothing is closed in an orderly way."""
        os.kill(os.getpid(), signal.SIGKILL)


# ---- what both roles need


def pattern(file: int, pages: int, seed: int) -> U64:
    """What the guest's CPU writes into the last line of each page: uint64[pages], never 0."""
    index = np.arange(pages, dtype=np.uint64) + np.uint64(file << 40)
    mixed = (index + np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)
    return mixed ^ (mixed >> np.uint64(29)) | np.uint64(1)


def guest_offsets(pages: int) -> U64:
    """Byte offsets of the guest's words in a file."""
    return np.arange(pages, dtype=np.uint64) * np.uint64(FRAME) + np.uint64(GUEST_LINE)


def rows_of(
    areas: Sequence[Area], holes: Sequence[Range], slots: dict[int, int], tags: dict[int, int]
) -> list[bar.RangeRow]:
    """Range-table rows: all of ``areas`` but ``holes``. ``slots`` and ``tags`` by file token."""
    rows = []
    for a in areas:
        flags = (bar.RANGE_READ if a.prot & 1 else 0) | (bar.RANGE_WRITE if a.prot & 2 else 0)
        for r in subtract([Range(a.iova, a.last)], list(holes)):
            page = (a.offset + r.start - a.iova) // FRAME
            rows.append(bar.RangeRow(r.start, r.last, slots[a.file] + page, tags[a.file], flags))
    return rows


def fit(rows: list[bar.RangeRow], capacity: int) -> list[bar.RangeRow]:
    """At most ``capacity`` rows, evenly chosen: the table of a BAR is finite."""
    if len(rows) <= capacity:
        return rows
    return [rows[i] for i in np.linspace(0, len(rows) - 1, capacity).astype(int).tolist()]


def probes_of(areas: Sequence[Area], also: Sequence[Range], top: int) -> list[bar.RangeRow]:
    """Rows where every access must fault: pages behind areas, ``also``, and what an area's prot forbids."""
    taken = [Range(a.iova, a.last) for a in areas]
    rows = []
    for r in subtract(list(also), taken):
        rows.append(bar.RangeRow(r.start, r.last, 0, 0, _PROBE))
    for a in areas[:: max(1, len(areas) // _MAX_PROBES)]:
        if a.last + FRAME < top:
            for r in subtract([Range(a.last + 1, a.last + FRAME)], taken):
                rows.append(bar.RangeRow(r.start, r.last, 0, 0, _PROBE))
        if a.prot == 1:
            rows.append(bar.RangeRow(a.iova, a.last, 0, 0, bar.RANGE_WRITE | bar.RANGE_EXPECT_FAULT))
        elif a.prot == 2:
            rows.append(bar.RangeRow(a.iova, a.last, 0, 0, bar.RANGE_READ | bar.RANGE_EXPECT_FAULT))
    return rows


_PROBE = bar.RANGE_READ | bar.RANGE_WRITE | bar.RANGE_EXPECT_FAULT


class Vmm:
    """What one VMM process holds."""

    def __init__(self, config: dict[str, Any], control: Control) -> None:
        self.config = config
        self.control = control
        self.transport = SoftTransport(config["socket"])
        self.slots: dict[int, int] = {int(k): v for k, v in config["slots"].items()}
        self.quiet = [Range(*r) for r in config["quiet"]]
        self.state: dict[str, Any] = config.get("state") or {}
        self.files: dict[int, int] = {}
        self.devices: list[VfioDevice] = []
        self.bars: list[Mapping] = []
        control.ask("hello", pid=self.transport.getpid())

    def take(self, fd: int) -> int:
        """A duplicate of a descriptor of the custodian."""
        return self.transport.getfd(self.config["custodian"], fd)

    def session(self) -> Session:
        """The session, which the custodian made or retrieved."""
        return Session(self.transport, self.take(self.config["session_fd"]))

    def publish(self, iommufd: Iommufd | None, **state: Any) -> None:
        """Let the custodian take duplicates of everything, so that this process may die."""
        self.control.ask(
            "fds",
            pid=self.transport.getpid(),
            files=self.files,
            iommufd=-1 if iommufd is None else iommufd.fd,
            devices=[d.fd for d in self.devices],
            state=state,
        )

    def map_bars(self) -> None:
        """Map BAR 0 of every device."""
        self.bars = [d.map_region(0) for d in self.devices]

    def tags(self) -> dict[int, int]:
        """Owner tag of each file's frames: its inode number."""
        return {token: self.transport.fstat(fd).st_ino for token, fd in self.files.items()}

    def give_ranges(self, rows: list[bar.RangeRow]) -> None:
        """The same range table for every device; returns when all work on it."""
        for window in self.bars:
            capacity = bar.read_register(window, bar.CAPACITY)
            bar.write_ranges(window, fit(rows, capacity), timeout=60)

    def check_guest(self) -> dict[str, int]:
        """The guest's CPU reads its memory: its own pattern, and whose payloads lie in each page.

        :return: pages checked, words of the guest that are gone, payloads of another page.
        """
        pages = damaged = foreign = 0
        for token, fd in self.files.items():
            size = self.transport.fstat(fd).st_size
            n = size // FRAME
            mapping = self.transport.mmap(fd, size)
            try:
                found = mapping.gather64(guest_offsets(n))
                wanted = pattern(token, n, self.config["seed"])
                damaged += int(np.count_nonzero(found != wanted))
                slots = np.arange(n, dtype=np.uint64) + np.uint64(self.slots[token])
                base = np.arange(n, dtype=np.uint64) * np.uint64(FRAME)
                for index in range(len(self.config["devices"])):
                    line = base + np.uint64(index * bar.LINE_BYTES)
                    there = mapping.gather64(line) != 0
                    whose = mapping.gather64(line + np.uint64(8))
                    foreign += int(np.count_nonzero(there & (whose != slots)))
                pages += n
            finally:
                mapping.close()
        return {"pages": pages, "damaged": damaged, "foreign": foreign}


# ---- before the kexec


class Before(Vmm):
    """The VMM of the first kernel."""

    iommufd: Iommufd
    hwpt: int
    manifest: Manifest

    def run(self) -> None:
        """From nothing, or from what a dead predecessor left, to a saved guest."""
        c = self.control
        self.manifest = self._manifest()
        if self.state:
            self._resume()
        else:
            c.step("setup")
            self._setup()
        c.step("preserve")
        self._preserve()
        c.ask("saved")
        # The kexec ends this process; until then it holds what it has.
        c.hear()

    def _manifest(self) -> Manifest:
        config = self.config
        return Manifest(
            iommufd=IOMMUFD_TOKEN,
            files=tuple(FileEntry(i + 1, f["size"], f["name"]) for i, f in enumerate(config["files"])),
            hwpts=(HwptEntry(HWPT_TOKEN),),
            devices=tuple(
                DeviceEntry(DEVICE_TOKEN + i, HWPT_TOKEN, path) for i, path in enumerate(config["devices"])
            ),
            areas=tuple(Area(*a) for a in config["areas"]),
            note=json.dumps({"seed": config["seed"]}).encode(),
        )

    def _setup(self) -> None:
        t, config = self.transport, self.config
        for entry in self.manifest.files:
            fd = t.memfd_create(entry.name, MFD_CLOEXEC | MFD_ALLOW_SEALING)
            t.ftruncate(fd, entry.size)
            t.fallocate(fd, 0, 0, entry.size)
            t.add_seals(fd, SEALS_WANTED)
            self.files[entry.token] = fd
            mapping = t.mmap(fd, entry.size)
            n = entry.size // FRAME
            mapping.scatter64(guest_offsets(n), pattern(entry.token, n, config["seed"]))
            mapping.close()
        self.iommufd = Iommufd(t, None)
        ioas = self.iommufd.ioas_alloc()
        unplugged = [Area(*a) for a in config["unplugged"]]
        areas = [*unplugged, *self.manifest.areas]
        for n, a in enumerate(areas):
            ioas.map_file(self.files[a.file], a.offset, a.length, iova=a.iova, prot=a.prot)
            self.control.at("setup", n + 1, len(areas))
        for path in config["devices"]:
            self.devices.append(VfioDevice(t, path))
        numbers = [d.bind(self.iommufd) for d in self.devices]
        self.hwpt = self.iommufd.hwpt_alloc(numbers[0], ioas.id)
        for d in self.devices:
            d.attach(self.hwpt)
        for a in unplugged:
            # Memory that was unplugged again: its tables stay linked, and empty.
            ioas.unmap(a.iova, a.length)
        self.map_bars()
        rows = rows_of(self.manifest.areas, self.quiet, self.slots, self.tags())
        self.give_ranges(rows)
        for window in self.bars:
            bar.enable(window, timeout=60)
        self.publish(self.iommufd, hwpt=self.hwpt, ioas=ioas.id, ranges=len(rows))

    def _resume(self) -> None:
        """The guest runs and its devices work; only this process is new."""
        state = self.state
        self.files = {int(k): self.take(fd) for k, fd in state["files"].items()}
        self.iommufd = Iommufd(self.transport, self.take(state["iommufd"]))
        self.devices = [VfioDevice(self.transport, self.take(fd)) for fd in state["devices"]]
        self.hwpt = state["state"]["hwpt"]

    def _preserve(self) -> None:
        total = len(self.manifest.files) + 2 + len(self.devices)
        done = 0

        def watch(what: str) -> None:
            nonlocal done
            done += 1
            self.control.at("preserve", done, total)

        save(
            self.transport,
            self.session(),
            self.manifest,
            files=self.files,
            iommufd=self.iommufd,
            hwpts={HWPT_TOKEN: self.hwpt},
            devices={d.token: self.devices[i] for i, d in enumerate(self.manifest.devices)},
            watch=watch,
        )


# ---- after the kexec


class After(Vmm):
    """The VMM of the second kernel."""

    areas: list[Area]
    original: tuple[Area, ...]
    ioas: Ioas
    iommufd: Iommufd | None = None
    hwpt: int = 0
    #: the tables are proved range by range
    later = False

    def run(self) -> None:
        """From the session to a guest that has given everything back."""
        self.later = policy_of(self.config["policy"], unsafe=True).later
        if self.state.get("iommufd", -1) >= 0 and self.state["state"].get("restored"):
            self._resume()
        else:
            if not self._restore():
                return
        if not self.state or self.state["state"].get("phase") != "teardown":
            self._after()
        self._teardown()

    def _resume(self) -> None:
        """Restored already; take over what the custodian holds."""
        state = self.state
        self.files = {int(k): self.take(fd) for k, fd in state["files"].items()}
        self.iommufd = Iommufd(self.transport, self.take(state["iommufd"]))
        self.devices = [VfioDevice(self.transport, self.take(fd)) for fd in state["devices"]]
        inner = state["state"]
        self.ioas = self.iommufd.ioas(inner["ioas"])
        self.hwpt = inner["hwpt"]
        self.areas = [Area(*a) for a in inner["areas"]]
        self.original = tuple(Area(*a) for a in inner["original"])
        self.map_bars()

    def _restore(self) -> bool:
        """Restore by the policy. False = refused, and all that a refused VMM does is done."""
        config, control = self.config, self.control
        # The step begins with the first call of the new VMM, which already reads the manifest.
        control.step("retrieve")
        try:
            session = self.session()
            replayed = self._mistaken(session)
            result = restore(
                self.transport,
                session,
                config["policy"],
                areas=replayed,
                watch=self._watch,
                unsafe=config["unsafe"],
            )
        except KernelRefusedPartly:
            raise  # not refused, and not restored either: a bug of ours or of the kernel
        except KernelRefused as e:
            control.ask("result", outcome="refused", reason=e.what)
            return self._refused(None)
        live = result.live
        assert live is not None
        control.ask("result", **self._facts(result))
        self.files = dict(live.files)
        self.devices = list(live.devices.values())
        self.iommufd = live.iommufd
        if result.outcome != "restored":
            return self._refused(live)
        assert live.manifest is not None
        assert self.iommufd is not None
        self.original = live.manifest.areas
        self.areas = list(self.original if replayed is None else replayed)
        self.ioas = live.ioases[0]
        self.hwpt = live.hwpts[HWPT_TOKEN]
        self.map_bars()
        self._publish("after")
        return True

    def _publish(self, phase: str) -> None:
        self.publish(
            self.iommufd,
            restored=True,
            phase=phase,
            ioas=self.ioas.id,
            hwpt=self.hwpt,
            areas=[_row(a) for a in self.areas],
            original=[_row(a) for a in self.original],
        )

    def _mistaken(self, session: Session) -> list[Area] | None:
        """The areas of a VMM that makes the mistake of ``inject``, or None for those of the manifest."""
        faults = [f for f in self.config["inject"] if f in REPLAY_FAULTS]
        if not faults:
            return None
        fd = session.retrieve(MANIFEST_TOKEN)
        manifest, _ = load_manifest(self.transport, fd)
        self.transport.close(fd)
        areas = list(manifest.areas)
        limits = [Range(0, (1 << self.config["input_lg2"]) - 1)]
        for name in faults:
            areas, injected = change_replay(name, areas, manifest.files, self.quiet, limits)
            self.control.ask("injected", fault=injected.fault, what=injected.what, iova=injected.iova)
        return areas

    def _watch(self, step: str, done: int, total: int) -> None:
        self.control.at(step, done, total)

    def _facts(self, result: RestoreResult) -> dict[str, Any]:
        return {
            "outcome": result.outcome,
            "reason": result.reason,
            "resumed": result.resumed,
            "pages": result.pages,
            "areas": result.areas,
            "table_bytes": result.table_bytes,
            "validate_ns": result.validate_ns,
            "layout_differences": result.layout_differences,
            "total_mismatches": result.total_mismatches,
            "mismatches": [_mismatch(m) for m in result.mismatches],
            "steps": [[s.name, s.start_ns, s.ns] for s in result.steps],
            "journal": result.journal,
        }

    # ---- refused: the devices stay where they are

    def _refused(self, live: Live | None) -> bool:
        self.control.step("after")
        self.control.ask("running")
        if live is not None:
            checked = self.check_guest() if len(live.files) == len(self.config["files"]) else None
            self.control.ask("checked", guest=checked)
        self.control.step("teardown")
        self.control.ask("done")
        return False

    # ---- restored: devices work on everything, then everything is unmapped

    def _after(self) -> None:
        control = self.control
        control.step("after")
        if control.kill_at == "after":
            control.die()
        tags = self.tags()
        bad = self._first_use() if self.later else []
        rows = rows_of(self.areas, bad, self.slots, tags)
        top = 1 << self.config["input_lg2"]
        also = [Range(a.iova, a.last) for a in self.original]
        also += [Range(a[0], a[1]) for a in self.config["unplugged"]]
        probes = probes_of(self.areas, also, top)
        if self.later:  # what the tables have in the quiet ranges is not known but where it is used
            probes = [
                p for p in probes if not any(q.overlaps(Range(p.iova, p.last)) for q in self.quiet + bad)
            ]
        capacity = bar.read_register(self.bars[0], bar.CAPACITY)
        self.give_ranges([*fit(rows, capacity - len(probes)), *probes])
        control.ask("running")
        for window in self.bars:
            bar.command(window, bar.CMD_VERIFY_ALL, timeout=120)
        control.ask("checked", guest=self.check_guest())
        self._publish("teardown")

    def _first_use(self) -> list[Range]:
        """Where no device works yet the VMM has each range proved before its devices use it; what is
        quarantined.

        IOAS_COPY reads the PFNs back, and so proves the range; the copy itself is not needed.
        """
        assert self.iommufd is not None
        scratch = self.iommufd.ioas_alloc()
        bad: list[Range] = []
        known = [Range(a.iova, a.last) for a in self.original]
        for a in self.areas:
            new = subtract([Range(a.iova, a.last)], known)
            old = [Range(max(a.iova, q.start), min(a.last, q.last)) for q in self.quiet]
            for r in merge([r for r in old if r.start <= r.last] + new):
                try:
                    scratch.copy(self.ioas, r.start, r.size, iova=r.start, prot=a.prot)
                except KernelRefused as e:
                    number = getattr(e, "errno", None)
                    if number == errno.EUCLEAN:
                        bad.append(r)
                    elif not (number == errno.ENOENT and self.state):  # a predecessor may have unmapped it
                        raise
        scratch.destroy()
        return bad

    def _proof(self) -> None:
        """Wait until all is known, and tell what was found."""
        assert self.iommufd is not None
        end = time.monotonic() + _SWEEP_SECONDS
        while (found := self.iommufd.progress(self.hwpt)).state == "validating" and time.monotonic() < end:
            time.sleep(0.002)
        if found.state == "validating":
            found = self.iommufd.progress(self.hwpt, sweep=True)
        total = sum(a.length for a in self.areas)
        self.control.ask(
            "proof",
            state=found.state,
            pages=(total - found.quarantined) // FRAME,
            table_bytes=found.table_bytes,
            validate_ns=found.validate_ns,
            total_mismatches=found.total,
            mismatches=[_mismatch(m) for m in found.mismatches],
        )

    def _teardown(self) -> None:
        """Unmap everything in two halves: devices first stop to use a range, then it goes, then probes must
        fault."""
        control = self.control
        control.step("teardown")
        assert self.iommufd is not None
        tags = self.tags()
        half = (len(self.areas) + 1) // 2
        left, gone, kept = list(self.areas), list[Area](), list[Area]()
        problems: list[str] = []
        resumed = bool(self.state)
        bad = self._first_use() if self.later else []
        for part in (self.areas[half:], self.areas[:half]):
            if not part:
                continue
            left = left[: len(left) - len(part)]
            using = rows_of(left, bad, self.slots, tags)
            self.give_ranges(using)
            for n, a in enumerate(part):
                try:
                    self.ioas.unmap(a.iova, a.length)
                except (KernelRefused, OSError) as e:
                    number = getattr(e, "errno", None)
                    if self.later and number == errno.EUCLEAN:
                        kept.append(a)
                    # A predecessor that was killed may have unmapped it.
                    elif not (resumed and number == errno.ENOENT):
                        problems.append(f"unmap iova {a.iova:#x}-{a.last:#x}: {e}")
                if control.kill_at == "teardown" and (n + 1) * 2 > len(part):
                    control.die()
            gone += [a for a in part if a not in kept]
            probes = [bar.RangeRow(a.iova, a.last, 0, 0, _PROBE) for a in gone]
            capacity = bar.read_register(self.bars[0], bar.CAPACITY)
            self.give_ranges(fit([*using, *fit(probes, max(1, capacity - len(using)))], capacity))
            self._wait_denied()
        if self.later:
            self._proof()
        for window in self.bars:
            bar.enable(window, False, timeout=60)
        for mapping in self.bars:
            mapping.close()
        for device in self.devices:
            device.detach()
        for what, number in (("HWPT", self.hwpt), ("IOAS", self.ioas.id)):
            try:
                self.iommufd.destroy(number)
            except (KernelRefused, OSError) as e:
                problems.append(f"destroy {what} {number}: {e}")
        for device in self.devices:
            device.close()
        self.iommufd.close()
        for fd in self.files.values():
            self.transport.close(fd)
        control.ask("done", problems=problems)

    def _wait_denied(self) -> None:
        """Until every device has met a few of the faults that it must meet (or none comes in a second)."""
        start = [bar.decode_stats(w).total for w in self.bars]
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            now = [bar.decode_stats(w).total for w in self.bars]
            if all(n.denied + n.leaks - s.denied - s.leaks >= 64 for n, s in zip(now, start, strict=True)):
                return
            time.sleep(0.001)


def _mismatch(m: Mismatch) -> dict[str, Any]:
    def pa(value: int | None) -> str | None:
        return None if value is None else f"{value:#x}"

    return {
        "iova": f"{m.iova:#x}",
        "last": f"{m.last:#x}",
        "expected_pa": pa(m.expected_pa),
        "expected_prot": m.expected_prot,
        "found_pa": pa(m.found_pa),
        "found_prot": m.found_prot,
        "reason": m.reason,
        "level": m.level,
    }


def _row(a: Area) -> list[int]:
    return [a.iova, a.last, a.file, a.offset, a.prot, a.ioas]


def main() -> int:
    """Run one VMM. The configuration is the first line of stdin."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the orchestrator
    line = sys.stdin.readline()
    if not line:
        return 0
    config = json.loads(line)
    control = Control(config.get("kill_at", ""))
    try:
        (Before if config["role"] == "before" else After)(config, control).run()
    except Gone:
        return 0
    except IokeepError as e:
        control.tell("failed", what=e.what, hint=e.hint, exit=e.exit_code)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
