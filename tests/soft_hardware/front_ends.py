# SPDX-License-Identifier: Apache-2.0
"""Front-ends as other processes have them."""

from iokeep.soft.hardware.iommu import FrontEnd


def detached(m, index=0):
    """A front-end that the tail register does not pump, as if in another process."""
    fe = FrontEnd(m.platform, index)
    m.regs.local_front_ends.clear()
    return fe
