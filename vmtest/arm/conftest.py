# SPDX-License-Identifier: Apache-2.0
"""Tests on a stock arm64 kernel. ``make test-vm-arm`` runs them, with this conftest alone."""

from __future__ import annotations

from vmtest.arm.machine import machines, system
from vmtest.conftest import pytest_collection_finish, pytest_configure

__all__ = ["pytest_collection_finish", "pytest_configure", "pytest_report_header"]


def pytest_report_header() -> list[str]:
    """Which kernels, which QEMU."""
    return [
        f"{name}: linux {system(machine)[0].version} by QEMU {machine.qemu.name}"
        for name, machine in machines().items()
    ]
