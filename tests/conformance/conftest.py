# SPDX-License-Identifier: Apache-2.0
"""The machine that the suite runs on: IOKEEP_MACHINE=soft (default), or kernel: the running one, as root."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_configure(config):
    from conf_machine import machine_name

    machine_name()  # a wrong name ends the run here


@pytest.fixture(scope="session")
def machine():
    from conf_machine import open_machine

    opened = open_machine()
    yield opened
    opened.close()


@pytest.fixture
def env(machine):
    """A process of its own for the case, which the kernel warns of nothing in."""
    from conf_env import Env

    before = machine.warnings()
    with Env(machine) as opened:
        yield opened
    assert machine.warnings() == before


def pytest_terminal_summary(terminalreporter):
    from conf_machine import NOTES

    for note in NOTES:
        terminalreporter.write_line(f"conformance: {note}")
