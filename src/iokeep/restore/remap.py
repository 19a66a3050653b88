# SPDX-License-Identifier: Apache-2.0
"""The live update that a kernel without preserved domains can do: RAM survives, translations are made anew.

Linux 7.3 carries memfds over a kexec and nothing of iommufd, VFIO or the IOMMU. So the device must be quiet
from before the kexec until :func:`remap` is done, the IOMMU stops translating in between, and the VMM maps
its areas again in a new iommufd. What can be kept is kept: guest RAM in its very frames, and the proof that
every IOVA leads where it led. Until that proof the device has bus mastering off; where it fails, the device
is detached and nothing is finished.

:func:`carries_domains` asks a kernel whether it can do better (``save`` and ``restore``); no version is
looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from iokeep.errors import InputError, IokeepError, KernelRefused, UsageError
from iokeep.iommufd.client import Iommufd, VfioDevice
from iokeep.luo.client import Session
from iokeep.restore.manifest import MANIFEST_TOKEN, Area, DeviceEntry, Manifest
from iokeep.restore.plan import make_plan
from iokeep.restore.policies import POLICIES
from iokeep.restore.proof import Frames, Proof, Table, expected_extents, prove
from iokeep.restore.run import Live, load_manifest
from iokeep.restore.save import Saved, preserve_files, saving
from iokeep.uapi.probe import known_ioctls
from iokeep.uapi.transport import Transport

__all__ = ["FindTable", "Remapped", "carries_domains", "remap", "save_files"]

#: where the table is that a device works on now
FindTable = Callable[[DeviceEntry], Table]

_NEEDED = {
    "IOMMU_HWPT_LIVEUPDATE_MARK_PRESERVE",
    "IOMMU_HWPT_LIVEUPDATE_ADOPT",
    "IOMMU_LIVEUPDATE_GET_INFO",
}


def carries_domains(transport: Transport) -> bool:
    """Whether this kernel can preserve domains and give them back proved: then use ``save`` and
    ``restore``.
    """
    return (known_ioctls(transport) or frozenset()) >= _NEEDED


def save_files(
    transport: Transport,
    session: Session,
    manifest: Manifest,
    files: Mapping[int, int],
    watch: Callable[[str], None] | None = None,
) -> Saved:
    """Preserve a VMM's memfds and its manifest, and nothing else; devices must be quiet already.

    :param files: token -> descriptor of each memfd. :param watch: told before each file.
    :raises UsageError: a precondition fails; nothing was done. :raises KernelRefused: the kernel said no; the
        session was closed. :raises KernelRefusedPartly: and the closing failed too.
    """
    problems = manifest.problems()
    for entry in manifest.files:
        if entry.token not in files:
            problems.append(f"file token {entry.token:#x} is in the manifest, but no descriptor was given")
        elif (size := transport.fstat(files[entry.token]).st_size) != entry.size:
            problems.append(f"file {entry.name} has {size:#x} bytes, the manifest says {entry.size:#x}")
    if problems:
        raise UsageError("not ready to be saved: " + "; ".join(problems))
    say = watch or (lambda text: None)
    with saving(transport, session) as saved:
        preserve_files(saved, manifest, files, 1, say)
    return saved


@dataclass(slots=True)
class Remapped:
    """How it ended.

    :param outcome: "restored" (proved, the session is finished) or "refused" (devices are detached, the
        session is there to be tried again). :param reason: why it was refused.
    :param proofs: HWPT token -> what its tables said. :param live: what the VMM holds.
    """

    outcome: str = "refused"
    reason: str = ""
    proofs: dict[int, Proof] = field(default_factory=dict)
    live: Live | None = None


def remap(
    transport: Transport,
    session: Session,
    *,
    devices: Mapping[int, VfioDevice],
    find: FindTable,
    frames: Frames | None = None,
    areas: Iterable[Area] | None = None,
    watch: Callable[[str], None] | None = None,
) -> Remapped:
    """Give a VMM its address spaces back in a new iommufd, and prove them to be what they were.

    :param session: retrieved, not finished. :param devices: device token -> its file, opened anew and not
        bound; bus mastering stays off, and is the caller's to enable once the outcome is "restored".
    :param find: where a device's table is. :param frames: names what differs; without it only the seal is
        compared.
    :param areas: what to replay; the manifest's areas if None. :param watch: told at each step.
    :return: also where the proof or the kernel refused; then all that was made is gone again.
    :raises UsageError: areas that cannot be replayed, or a device is missing; nothing was made.
    """
    say = watch or (lambda step: None)
    live = Live(transport, session)
    out = Remapped(live=live)
    try:
        say("retrieve")
        live.manifest_fd = session.retrieve(MANIFEST_TOKEN)
        manifest, _ = load_manifest(transport, live.manifest_fd)
        live.manifest = manifest
        wanted = make_plan(manifest, POLICIES["rebuild"], areas).areas
        missing = [d.path for d in manifest.devices if d.token not in devices]
        if missing:
            raise UsageError(f"no file was given for device {missing[0]}")
        for entry in manifest.files:
            fd = live.files[entry.token] = session.retrieve(entry.token)
            size = transport.fstat(fd).st_size
            if size != entry.size:
                raise InputError(f"file {entry.name} came back with {size:#x} bytes, not {entry.size:#x}")
        say("replay")
        _build(live, manifest, wanted, devices)
        say("prove")
        out.proofs = _prove(live, manifest, find, frames)
        wrong = [proof for proof in out.proofs.values() if not proof.equal]
        if wrong:
            out.reason = wrong[0].reason
            _give_up(live, devices)
            return out
        say("finish")
        session.finish()
        out.outcome = "restored"
    except (KernelRefused, InputError, OSError) as error:
        out.reason = error.what if isinstance(error, IokeepError) else str(error)
        _give_up(live, devices)
    except UsageError:
        _give_up(live, devices)
        raise
    return out


def _build(live: Live, manifest: Manifest, areas: Iterable[Area], devices: Mapping[int, VfioDevice]) -> None:
    live.iommufd = Iommufd(live.transport)
    for device in manifest.devices:
        live.devices[device.token] = devices[device.token]
        live.device_ids[device.token] = devices[device.token].bind(live.iommufd)
    for index in range(manifest.ioases):
        live.ioases[index] = live.iommufd.ioas_alloc()
    for area in areas:
        fd = live.files[area.file]
        live.ioases[area.ioas].map_file(fd, area.offset, area.length, iova=area.iova, prot=area.prot)
    ioas_of = {hwpt.token: hwpt.ioas for hwpt in manifest.hwpts}
    for device in manifest.devices:
        target = live.hwpts.get(device.hwpt)
        if target is None:
            number = live.device_ids[device.token]
            target = live.iommufd.hwpt_alloc(number, live.ioases[ioas_of[device.hwpt]].id)
            live.hwpts[device.hwpt] = target
        live.devices[device.token].attach(target)


def _prove(live: Live, manifest: Manifest, find: FindTable, frames: Frames | None) -> dict[int, Proof]:
    pas = None
    if frames is not None:
        pas = {f.token: frames(live.files[f.token], f.size) for f in manifest.files}
    out = {}
    for hwpt in manifest.hwpts:
        on = [device for device in manifest.devices if device.hwpt == hwpt.token]
        if not on:
            raise InputError(f"HWPT token {hwpt.token:#x} has no device: nothing walks its tables")
        mine = [area for area in manifest.areas if area.ioas == hwpt.ioas]
        expected = None if pas is None else expected_extents(mine, pas)
        for device in on:
            proof = out[hwpt.token] = prove(find(device), hwpt.seal, expected)
            if not proof.equal:
                break
    return out


def _give_up(live: Live, devices: Mapping[int, VfioDevice]) -> None:
    """Close all but the session: devices first, so that no table is in use when the iommufd goes."""
    live.devices = dict(devices)
    live.close()
    live.iommufd = None
    live.ioases, live.hwpts, live.device_ids = {}, {}, {}
