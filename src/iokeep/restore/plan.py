# SPDX-License-Identifier: Apache-2.0
"""What a restore will do, in order, and whether it can: made before anything is done, and printable."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from iokeep.errors import InputError
from iokeep.iommufd.client import PriorHwpt
from iokeep.restore.manifest import MANIFEST_TOKEN, Area, Manifest
from iokeep.restore.policies import Policy

__all__ = ["Call", "Plan", "check_priors", "make_plan"]

_PROT = {1: "r-", 2: "-w", 3: "rw"}


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the plan: the step that it belongs to, the kernel's name for it, and what it is about."""

    step: str
    call: str
    about: str

    def __str__(self) -> str:
        return f"{self.step:9} {self.call}({self.about})"


@dataclass(frozen=True, slots=True)
class Plan:
    """A restore by ``policy`` of ``areas`` (sorted by IOAS and iova); ``calls`` in the order that they are
    made."""

    policy: Policy
    areas: tuple[Area, ...]
    calls: tuple[Call, ...]

    @property
    def steps(self) -> tuple[str, ...]:
        """The steps, each once, in order."""
        return tuple(dict.fromkeys(c.step for c in self.calls))


def make_plan(manifest: Manifest, policy: Policy, areas: Iterable[Area] | None = None) -> Plan:
    """Plan a restore.

    :param areas: what to replay; the manifest's areas if None.
    :raises UsageError: areas that cannot be mapped: of unknown files, beyond their ends, overlapping.
    """
    wanted = manifest.areas if areas is None else tuple(areas)
    replace(manifest, areas=wanted).check()
    wanted = tuple(sorted(wanted, key=lambda a: (a.ioas, a.iova)))
    retrieve = "LIVEUPDATE_SESSION_RETRIEVE_FD"
    calls = [Call("retrieve", retrieve, f"manifest, token {MANIFEST_TOKEN:#x}")]
    calls += [Call("retrieve", retrieve, f"file {f.name}, token {f.token:#x}") for f in manifest.files]
    calls.append(Call("retrieve", retrieve, f"iommufd, token {manifest.iommufd:#x}"))
    for d in manifest.devices:
        calls.append(Call("retrieve", retrieve, f"device {d.path}, token {d.token:#x}"))
        calls.append(Call("retrieve", "VFIO_DEVICE_BIND_IOMMUFD", d.path))
    for index in range(manifest.ioases):
        calls.append(Call("replay", "IOMMU_IOAS_ALLOC", f"IOAS {index}"))
    for a in wanted:
        about = f"iova {a.iova:#x}-{a.last:#x}, file token {a.file:#x} from {a.offset:#x}, {_PROT[a.prot]}"
        calls.append(Call("replay", "IOMMU_IOAS_MAP_FILE", about))
    for h in manifest.hwpts:
        about = f"token {h.token:#x}, IOAS {h.ioas}"
        if policy.name == "rebuild":
            calls.append(Call(policy.prove, "IOMMU_HWPT_ALLOC", about))
            calls.append(Call(policy.prove, "IOMMU_HWPT_LIVEUPDATE_COMPARE", about))
        elif policy.prove:
            calls.append(Call(policy.prove, "IOMMU_HWPT_LIVEUPDATE_ADOPT", f"{about}, VALIDATE_ONLY"))
    if policy.name != "rebuild":
        flag = ", TRUST" if policy.name == "trust" else ""
        for h in manifest.hwpts:
            calls.append(
                Call(policy.take, "IOMMU_HWPT_LIVEUPDATE_ADOPT", f"token {h.token:#x}, IOAS {h.ioas}{flag}")
            )
    for d in manifest.devices:
        calls.append(Call(policy.take, "VFIO_DEVICE_ATTACH_IOMMUFD_PT", f"{d.path}, HWPT token {d.hwpt:#x}"))
    calls.append(Call("finish", "LIVEUPDATE_SESSION_FINISH", "session"))
    return Plan(policy, wanted, tuple(calls))


def check_priors(manifest: Manifest, priors: Iterable[PriorHwpt]) -> None:
    """Does the retrieved iommufd hold every prior domain that the manifest names, unclaimed?

    :raises InputError: one is missing, or somebody has it already.
    """
    held = {p.token: p for p in priors}
    for h in manifest.hwpts:
        found = held.get(h.token)
        if found is None:
            there = ", ".join(f"{t:#x}" for t in held) or "none"
            raise InputError(
                f"no prior domain with HWPT token {h.token:#x} came over the kexec; there are: {there}"
            )
        if found.reclaimed:
            raise InputError(f"the prior domain with HWPT token {h.token:#x} is reclaimed already")
