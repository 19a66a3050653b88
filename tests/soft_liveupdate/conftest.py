# SPDX-License-Identifier: Apache-2.0
"""Hosts that are always stopped."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from iokeep.soft.testing import LocalHost


@pytest.fixture
def hosts():
    """Makes LocalHosts and stops them all."""
    made = []

    def make(*args, **kw):
        host = LocalHost(*args, **kw)
        made.append(host)
        return host

    yield make
    for host in made:
        host.stop()


@pytest.fixture
def host(hosts):
    return hosts()
