# SPDX-License-Identifier: Apache-2.0
"""Before the kexec: put a VMM's files, its manifest, its iommufd and its devices into a session.

Every precondition is checked first, and all that is wrong is said at once. The order is the one that
live update asks for: memfds, then the iommufd that maps them, then the devices attached to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from iokeep.errors import IokeepError, KernelRefused, KernelRefusedPartly, UsageError
from iokeep.iommufd.client import Iommufd, VfioDevice
from iokeep.luo.client import Session
from iokeep.restore.manifest import MANIFEST_TOKEN, Manifest, file_bytes
from iokeep.uapi.transport import Transport

__all__ = ["SEALS_WANTED", "Saved", "check_save", "preserve_files", "save", "saving"]

# include/uapi/linux/fcntl.h
F_SEAL_SEAL = 0x1
F_SEAL_SHRINK = 0x2
F_SEAL_GROW = 0x4
MFD_CLOEXEC = 0x1
MFD_ALLOW_SEALING = 0x2
#: what a mapped file must have had when it was mapped, so that it can neither shrink nor grow under its pins
SEALS_WANTED = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW


@dataclass(slots=True)
class Saved:
    """A VMM that is ready for the kexec. Its IOASes are immutable until :meth:`cancel`."""

    transport: Transport
    session: Session
    manifest_fd: int

    def cancel(self) -> None:
        """Close the session and the manifest: all is as before :func:`save`, and the IOASes may change again.

        The session goes when its last descriptor is closed: a custodian that holds a duplicate must
        close it too.
        """
        self.session.close()
        if self.manifest_fd >= 0:
            self.transport.close(self.manifest_fd)
            self.manifest_fd = -1


def check_save(
    transport: Transport,
    manifest: Manifest,
    files: Mapping[int, int],
    hwpts: Mapping[int, int],
    devices: Mapping[int, VfioDevice],
) -> list[str]:
    """Everything that would make :func:`save` fail, each with its place; empty = ready. Arguments as
    there.
    """
    out = manifest.problems()
    for what, wanted, given in (
        ("file", {f.token for f in manifest.files}, set(files)),
        ("HWPT", {h.token for h in manifest.hwpts}, set(hwpts)),
        ("device", {d.token for d in manifest.devices}, set(devices)),
    ):
        for t in sorted(wanted - given):
            out.append(f"{what} token {t:#x} is in the manifest, but no descriptor was given")
        for t in sorted(given - wanted):
            out.append(f"{what} token {t:#x} was given, but the manifest does not know it")
    inodes: dict[int, int] = {}
    for entry in manifest.files:
        fd = files.get(entry.token)
        if fd is None:
            continue
        name = f"file token {entry.token:#x} ({entry.name})"
        try:
            stat, seals = transport.fstat(fd), transport.get_seals(fd)
        except OSError as e:
            out.append(f"{name}: {e.strerror}: it is no memfd, and only a memfd can be preserved")
            continue
        if stat.st_size != entry.size:
            out.append(f"{name} has {stat.st_size:#x} bytes, the manifest says {entry.size:#x}")
        if seals & SEALS_WANTED != SEALS_WANTED:
            out.append(f"{name} has seals {seals:#x}; SEAL, SHRINK and GROW ({SEALS_WANTED:#x}) are needed")
        if stat.st_ino in inodes:
            out.append(f"{name} is the same file as token {inodes[stat.st_ino]:#x}")
        inodes[stat.st_ino] = entry.token
    return out


@contextmanager
def saving(transport: Transport, session: Session) -> Iterator[Saved]:
    """What is preserved within is preserved whole, or not at all: a failure closes the session.

    :raises KernelRefused: the kernel said no, and nothing is preserved. :raises KernelRefusedPartly: and the
        closing failed too.
    """
    saved = Saved(transport, session, -1)
    try:
        yield saved
    except (IokeepError, OSError) as e:
        reason = e.what if isinstance(e, IokeepError) else f"{e.strerror or e}"
        hint = e.hint if isinstance(e, IokeepError) else ""
        try:
            saved.cancel()
        except (IokeepError, OSError) as worse:
            raise KernelRefusedPartly(
                f"save: {reason}; and the session could not be closed: {worse}",
                "close every descriptor of the session",
            ) from e
        raise KernelRefused(f"save: {reason}; the session is closed, nothing is preserved", hint) from e


def preserve_files(
    saved: Saved, manifest: Manifest, files: Mapping[int, int], slots: int, say: Callable[[str], None]
) -> None:
    """Preserve the memfds, and the manifest in one of its own, which ``saved`` holds from here on.

    Arguments as for :func:`save`; what the kernel says goes through.
    """
    transport, session = saved.transport, saved.session
    for entry in manifest.files:
        say(f"file {entry.name}")
        session.preserve(files[entry.token], entry.token)
    say("manifest")
    raw = file_bytes(manifest, slots)
    saved.manifest_fd = transport.memfd_create("iokeep-manifest", MFD_CLOEXEC | MFD_ALLOW_SEALING)
    transport.ftruncate(saved.manifest_fd, len(raw))
    transport.pwrite(saved.manifest_fd, raw, 0)
    transport.add_seals(saved.manifest_fd, SEALS_WANTED)
    session.preserve(saved.manifest_fd, MANIFEST_TOKEN)


def save(
    transport: Transport,
    session: Session,
    manifest: Manifest,
    *,
    files: Mapping[int, int],
    iommufd: Iommufd,
    hwpts: Mapping[int, int],
    devices: Mapping[int, VfioDevice],
    slots: int = 1024,
    watch: Callable[[str], None] | None = None,
) -> Saved:
    """Preserve a VMM's set-up in ``session``.

    :param files: token -> descriptor of each memfd. :param hwpts: token -> object id in ``iommufd``.
    :param devices: token -> open device. :param slots: entries that the journal in the manifest can take.
    :param watch: told before each object is preserved, in a few words.
    :raises UsageError: a precondition fails; nothing was done. :raises KernelRefused: the kernel said
        no; the session was closed, so that nothing is preserved. :raises KernelRefusedPartly: and the
        closing failed too.
    """
    problems = check_save(transport, manifest, files, hwpts, devices)
    if problems:
        raise UsageError("not ready to be saved: " + "; ".join(problems))
    say = watch or (lambda text: None)
    with saving(transport, session) as saved:
        preserve_files(saved, manifest, files, slots, say)
        for hwpt in manifest.hwpts:
            iommufd.mark_preserve(hwpts[hwpt.token], hwpt.token)
        say("iommufd")
        session.preserve(iommufd.fd, manifest.iommufd)
        for device in manifest.devices:
            say(f"device {device.path}")
            session.preserve(devices[device.token].fd, device.token)
    return saved
