# SPDX-License-Identifier: Apache-2.0
"""Guest program: a VMM that is carried over a real kexec, with the kernel that there is.

First kernel: guest RAM in memfds, areas mapped by file, a device that does DMA; seal, quiesce, preserve,
kexec.
Second kernel: retrieve; a replay that is wrong is refused; the right one is proved, and the device
works again.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from dataclasses import replace
from pathlib import Path

from iokeep.iommufd.client import READ, WRITE, Iommufd
from iokeep.luo.client import LiveUpdate
from iokeep.mem.live import LiveMemory
from iokeep.pt.gather import gather
from iokeep.pt.registry import open_format
from iokeep.pt.roots.find import find_root_of
from iokeep.restore.manifest import Area, DeviceEntry, FileEntry, HwptEntry, Manifest
from iokeep.restore.proof import Table, pagemap_frames, seal_of
from iokeep.restore.remap import Remapped, carries_domains, remap, save_files
from iokeep.uapi import kexec
from iokeep.uapi.kernel import KernelTransport
from vmtest.guest.edu import ADDRESSES, Edu
from vmtest.guest.talk import Host
from vmtest.guest.truth import hardware

MODE = os.environ["IOKEEP_VM_MODE"]
PAGE, MIB = 4096, 1 << 20
RAM, ROM = 1, 2
HWPT, DEVICE = 0x20, 0x30
SESSION = "vm-1"
RAM_BYTES, ROM_BYTES = 16 * MIB, 16 * PAGE
BDF = ADDRESSES[0]


def areas() -> tuple[Area, ...]:
    """A PC's RAM below a hole, pages in another order, and a ROM that devices may read only."""
    out = [Area(0, 8 * MIB - 1, RAM, 0, 3), Area(0xFFFF0000, 0xFFFFFFFF, ROM, 0, 1)]
    order = list(range(1024))
    random.Random(7).shuffle(order)
    for n, page in enumerate(order):
        if n % 5:
            iova = 0x100000000 + n * PAGE
            out.append(Area(iova, iova + PAGE - 1, RAM, 8 * MIB + page * PAGE, 1 + n % 3))
    return tuple(out)


def wrong(right: tuple[Area, ...]) -> tuple[Area, ...]:
    """The mistakes that a VMM can make, one of each: offset, permission, a page left out, a page too many.

    Each is one page, so that the first mismatches name all four.
    """
    out = list(right)
    out[3] = replace(out[3], offset=0)
    # from read-only: a format that has no write-only shows that too
    mistaken = next(n for n in range(4, len(out)) if out[n].prot == READ)
    out[mistaken] = replace(out[mistaken], prot=READ | WRITE)
    gone = out.pop(9)
    out.append(Area(0x200000000, 0x200000FFF, RAM, gone.offset, 3))
    return tuple(out)


def find_table(device: DeviceEntry) -> Table:
    """The table that the IOMMU walks for a device now, from its root register."""
    hw = hardware(MODE, device.path)
    with LiveMemory() as memory:
        found = find_root_of(hw, memory, iommu=str(hw["iommu"]))  # type: ignore[arg-type]
        assert found is not None
        assert found.table is not None
        fmt = open_format(found.table.format, found.table.config)
        return Table(fmt, gather(fmt, memory.read, found.table.root_pa), found.table.root_pa)


def contents(kernel: KernelTransport, fds: dict[int, int]) -> dict[str, str]:
    """Digest of each file."""
    out = {}
    for token, fd in fds.items():
        out[str(token)] = hashlib.blake2b(kernel.pread(fd, kernel.fstat(fd).st_size, 0)).hexdigest()
    return out


def check_dma(kernel: KernelTransport, edu: Edu, ram: int, source: int, target: int) -> None:
    """The device copies a page within the 8 MiB at iova 0, and memory shows it."""
    data = os.urandom(PAGE)
    kernel.pwrite(ram, data, source)
    edu.copy(source, target, PAGE)
    assert kernel.pread(ram, PAGE, target) == data, "DMA did not arrive"


def say(text: str) -> None:
    """One line of the transcript."""
    print(text, flush=True)


def first_kernel(host: Host) -> None:
    """Everything up to the jump."""
    kernel = KernelTransport()
    say(f"kernel: {os.uname().release}, IOMMU {MODE}")
    say(f"carries domains over a kexec: {'yes' if carries_domains(kernel) else 'no'} (asked by ioctl)")
    fds = {}
    for token, name, size in ((RAM, "ram", RAM_BYTES), (ROM, "rom", ROM_BYTES)):
        fds[token] = kernel.memfd_create(name)
        kernel.ftruncate(fds[token], size)
        kernel.pwrite(fds[token], random.Random(token).randbytes(size), 0)
    edu, iommufd = Edu(BDF), Iommufd(kernel)
    edu.file.bind(iommufd)
    ioas = iommufd.ioas_alloc()
    edu.file.attach(ioas.id)
    wanted = areas()
    for area in wanted:
        ioas.map_file(fds[area.file], area.offset, area.length, iova=area.iova, prot=area.prot)
    edu.start()
    for n in range(2):
        check_dma(kernel, edu, fds[RAM], n * PAGE, (100 + n) * PAGE)
    say(f"mapped: {len(wanted)} areas; DMA works: 2 pages copied by the device and compared")
    table = find_table(DeviceEntry(DEVICE, HWPT, BDF))
    found = table.extents()
    say(f"sealed: {found.mapped_bytes // PAGE} pages, root at pa {table.root_pa:#x}, format {table.fmt.name}")
    host.ask(step="before", hw=hardware(MODE, BDF), root=table.root_pa)
    edu.master(False)
    edu.file.close()
    say("quiesced: bus mastering off, device closed")
    manifest = Manifest(
        iommufd=0x10,
        files=(FileEntry(RAM, RAM_BYTES, "ram"), FileEntry(ROM, ROM_BYTES, "rom")),
        hwpts=(HwptEntry(HWPT, 0, seal_of(found)),),
        devices=(DeviceEntry(DEVICE, HWPT, BDF),),
        areas=wanted,
        note=json.dumps(
            {"contents": contents(kernel, fds), "left": time.time(), "root": table.root_pa}
        ).encode(),
    )
    session = LiveUpdate(kernel).create(SESSION)
    save_files(kernel, session, manifest, fds, watch=lambda what: say(f"preserve: {what}"))
    image = Path(os.environ["IOKEEP_VM_KERNEL"]) / "bzImage"
    kexec.load(image, Path("/proc/cmdline").read_text().strip() + " iokeep.stage=2")
    say("kexec: the next kernel is loaded; jump")
    host.ask(step="kexec")
    kernel.reboot_kexec()


def report(result: Remapped) -> None:
    """What a restore said."""
    for token, proof in result.proofs.items():
        verdict = "equal" if proof.equal else f"{proof.total} ranges differ"
        say(f"  proof: HWPT token {token:#x}: {proof.pages} pages read from the tables: {verdict}")
        for mismatch in proof.mismatches[:4]:
            say(f"    {mismatch.text}")
    say(f"{result.outcome}{': ' + result.reason if result.reason else ''}")


def second_kernel(host: Host) -> None:
    """Everything behind the jump."""
    kernel = KernelTransport()
    say(f"kernel: {os.uname().release}, the second one, up {time.clock_gettime(time.CLOCK_BOOTTIME):.1f} s")
    session = LiveUpdate(kernel).retrieve(SESSION)
    right = areas()

    def attempt(name: str, replayed: tuple[Area, ...]) -> tuple[Remapped, Edu]:
        edu = Edu(BDF)
        say(f"replay: {name}, {len(replayed)} areas; bus mastering {'on' if edu_masters(edu) else 'off'}")
        frames = pagemap_frames(kernel)
        devices = {DEVICE: edu.file}
        result = remap(kernel, session, devices=devices, find=find_table, frames=frames, areas=replayed)
        report(result)
        return result, edu

    refused, _ = attempt(
        "one wrong offset, one wrong permission, one area missing, one too many", wrong(right)
    )
    told = [
        {"iova": m.iova, "last": m.last, "reason": m.reason}
        for proof in refused.proofs.values()
        for m in proof.mismatches
    ]
    host.ask(step="refused", outcome=refused.outcome, reason=refused.reason, mismatches=told)
    restored, edu = attempt("what the manifest says", right)
    live = restored.live
    assert live is not None
    if restored.outcome == "restored":
        assert live.manifest is not None
        note = json.loads(live.manifest.note)
        same = contents(kernel, live.files) == note["contents"]
        say(f"content: {'every byte is as before' if same else 'DIFFERENT'}")
        edu.start()
        for n in range(2):
            check_dma(kernel, edu, live.files[RAM], n * PAGE, (200 + n) * PAGE)
        say("DMA works: 2 pages copied by the device and compared")
        say(f"without translation for {time.time() - note['left']:.1f} s: from the quiet device to here")
        root = find_table(DeviceEntry(DEVICE, HWPT, BDF)).root_pa
        say(f"the tables are new ones: root at pa {root:#x}, before the kexec {note['root']:#x}")
        hw = hardware(MODE, BDF)
        host.ask(step="restored", outcome="restored", content=same, hw=hw)
    else:
        host.ask(step="restored", outcome=restored.outcome, reason=restored.reason)
    live.close()
    session.close()


def edu_masters(edu: Edu) -> bool:
    """Whether the device may do DMA, read from sysfs: its VFIO file is not bound yet."""
    config = Path(f"/sys/bus/pci/devices/{edu.bdf}/config").read_bytes()
    return bool(config[4] & 4)


def main() -> None:
    """The program."""
    host = Host()
    second = "iokeep.stage=2" in Path("/proc/cmdline").read_text()
    (second_kernel if second else first_kernel)(host)
    host.close()


main()
