# SPDX-License-Identifier: Apache-2.0
"""What cases need of the machine that the suite runs on, and the kinds of devices that they run with."""

import pytest
from conf_machine import device_kinds, open_machine

MACHINE = open_machine()
#: what shows an IOAS; None: nothing does
KINDS = [None, *device_kinds(MACHINE)]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind or "alone")
#: the mock IOMMU comes with its devices, emulated ones too
needs_mock = pytest.mark.skipif(not MACHINE.mock, reason="this machine has no mock IOMMU")
needs_vfio = pytest.mark.skipif(not MACHINE.vfio, reason="this machine has no VFIO device")
