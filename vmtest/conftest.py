# SPDX-License-Identifier: Apache-2.0
"""Tests on a real kernel. They are not part of ``make test``; ``make test-vm`` runs them."""

from __future__ import annotations

import pytest

from vmtest import vm
from vmtest.kernel import kernel

#: what runs in the guest, and what has a target of its own
collect_ignore = ["guest", "arm"]


def pytest_report_header() -> list[str]:
    """Which kernel, which IOMMUs."""
    return [
        f"kernel: linux {kernel().version}, {kernel().path}",
        f"QEMU: {' '.join(vm.accelerator())}",
        *(f"{name}: by QEMU {each.qemu.name}" for name, each in vm.machines().items()),
        f"logs of each run: {vm.runs()}",
    ]


def pytest_configure(config: pytest.Config) -> None:
    """Markers are checked."""
    config.addinivalue_line("markers", "boots(boot, mode): the test looks at this boot")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin the boots that the chosen tests need, in their order, two at a time."""
    if session.config.option.collectonly:
        return
    for item in session.items:
        for mark in item.iter_markers("boots"):
            boot, mode = mark.args
            boot.start(mode)
