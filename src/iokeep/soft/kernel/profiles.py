# SPDX-License-Identifier: Apache-2.0
"""Which kernel a boot of the software host is: what it offers, what it writes, and what it is tested to read.

``soft-7.3`` and ``soft-7.4`` are Linux 7.3 with the live-update half of iommufd that docs/adoption-uapi.md
proposes. ``soft-7.2`` has it too, from before the records were what they are now: it knows none of their
versions.
``linux-7.3`` is mainline: memfds are preserved, iommufd and VFIO are not (PRESERVE_FD gives ENOENT), and its
IOMMU driver starts from nothing at every boot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from iokeep.errors import UsageError

IOMMUFD_COMPATIBLE = "iokeep-iommufd-v1"
IOMMU_COMPATIBLE = "iokeep-iommu-v1"
VFIO_COMPATIBLE = "iokeep-vfio-pci-v1"


@dataclass(frozen=True, slots=True)
class Profile:
    """One version of the kernel.

    :param name: what --profile says. :param release: what uname -r would say (it is in the kexec metadata).
    :param liveupdate: it has the ioctls and handlers of the proposal.
    :param iommufd_record: version of the iommufd's LUO record that it writes and reads; ``iommu_record``
        likewise (the FLB of the IOMMU core) and ``vfio_record``.
    :param formats: table formats that it is tested to adopt -> the features that it knows in each.
    """

    name: str
    release: str
    liveupdate: bool
    iommufd_record: str = IOMMUFD_COMPATIBLE
    iommu_record: str = IOMMU_COMPATIBLE
    vfio_record: str = VFIO_COMPATIBLE
    formats: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @property
    def reads(self) -> tuple[str, ...]:
        """Every record version that this kernel can read, Linux's own included."""
        linux = ("kho-v4", "luo-v5", "memfd-v2")
        if not self.liveupdate:
            return linux
        return (*linux, self.iommufd_record, self.iommu_record, self.vfio_record)


_FORMATS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "vtdss": frozenset(),
        "x86_64": frozenset({"sign_extend"}),
        "amdv1": frozenset({"force_coherence"}),
        "arm_lpae_s1": frozenset(),
        "arm_lpae_s2": frozenset(),
        "riscv64": frozenset({"svnapot", "sign_extend"}),
    }
)

PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        profile.name: profile
        for profile in (
            Profile("soft-7.3", "7.3.4-iokeep", liveupdate=True, formats=_FORMATS),
            Profile("soft-7.4", "7.4.0-iokeep", liveupdate=True, formats=_FORMATS),
            Profile(
                "soft-7.2",
                "7.2.13-iokeep",
                liveupdate=True,
                iommufd_record="iokeep-iommufd-v0",
                iommu_record="iokeep-iommu-v0",
                vfio_record="iokeep-vfio-pci-v0",
                formats=_FORMATS,
            ),
            Profile("linux-7.3", "7.3.4", liveupdate=False),
        )
    }
)


def profile_of(name: str) -> Profile:
    """The profile of this name. :raises UsageError: there is none; the message lists all."""
    try:
        return PROFILES[name]
    except KeyError:
        raise UsageError(f"no kernel profile {name!r}", f"choose one of: {', '.join(PROFILES)}") from None
