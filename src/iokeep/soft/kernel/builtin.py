# SPDX-License-Identifier: Apache-2.0
"""What is built into the kernel: device nodes of iommufd and VFIO, and the live-update modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iokeep.soft.kernel import vfio
from iokeep.soft.kernel.iommufd import open_iommu

if TYPE_CHECKING:
    from iokeep.soft.kernel.kernel import Kernel


def install(kernel: Kernel) -> None:
    """Register everything; to be called once, before boot."""
    from iokeep.soft.kernel import boot

    kernel.device_nodes["/dev/iommu"] = open_iommu
    kernel.boot_hooks.append(_vfio_nodes)
    boot.install(kernel)


def _vfio_nodes(kernel: Kernel) -> None:
    for dev in kernel.iommu.devices:
        kernel.device_nodes[vfio.node_path(dev)] = vfio.opener(dev)
