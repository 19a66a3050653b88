# SPDX-License-Identifier: Apache-2.0
"""A caller of a file's ``kernel``, and its iommufd. The helpers of this directory become importable (tests
have no packages).
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from soft_machine import Caller


@pytest.fixture
def c(kernel):
    return Caller(kernel)


@pytest.fixture
def fd(c):
    return c.iommu()
