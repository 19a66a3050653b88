# SPDX-License-Identifier: Apache-2.0
"""What runs in the guest: this Python, this environment, this project's files."""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Generic, TypeVar

import pytest
from _pytest.mark import ParameterSet

from vmtest.vm import ROOT

T = TypeVar("T")
GUEST_TESTS = "vmtest/guest/test_client.py"
#: boots at the same time: each guest has one busy CPU
_POOL = ThreadPoolExecutor(2)


class Boot(Generic[T]):
    """A boot that many tests look at, by mode: it happens once, also when it fails; ``start`` begins it
    early.
    """

    def __init__(self, call: Callable[[str], T]) -> None:
        self._call = call
        self._runs: dict[str, Future[T]] = {}

    def start(self, mode: str) -> Future[T]:
        """See to it that it runs, or has run."""
        if mode not in self._runs:
            compiled()
            self._runs[mode] = _POOL.submit(self._call, mode)
        return self._runs[mode]

    def __call__(self, mode: str) -> T:
        """Its result. :raises Exception: what it failed with."""
        return self.start(mode).result()

    def case(self, mode: str, *values: str) -> ParameterSet:
        """A parameter of a test (``values``, else the mode) that looks at this boot."""
        return pytest.param(*(values or (mode,)), marks=pytest.mark.boots(self, mode))


def module(name: str) -> str:
    """The command of one of the guest's programs."""
    return shlex.join([sys.executable, "-m", f"vmtest.guest.{name}"])


def pytest_of(*arguments: str) -> str:
    """The command of a run of pytest; :func:`counts` reads its result."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "pytest_timeout", *arguments]
    # looking for plugins is a fifth of what pytest does before the first test
    return f'PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 {shlex.join(command)} --junitxml="$IOKEEP_VM_RUN/junit.xml"'


@functools.cache
def compiled() -> None:
    """Have the bytecode of all that the guest imports written here, pytest's own too: that takes a minute of
    each guest otherwise.
    """
    collect = ["pytest", "--collect-only", "-qq", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": f"src:{ROOT}", "IOKEEP_VM_MODE": "", "IOKEEP_MACHINE": "soft"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    for command in (
        ["compileall", "-q", "src", "vmtest", "tests/conformance"],
        [*collect, "tests/conformance"],
        [*collect, "--confcutdir=vmtest/guest", GUEST_TESTS],
    ):
        subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, check=False
        )


def in_turn(*commands: str) -> list[str]:
    """A program that runs commands until one fails."""
    return ["sh", "-c", " && ".join(commands)]


def first_kernel(command: str) -> str:
    """A command that is left out behind a kexec (whose command line says ``iokeep.stage=``)."""
    return f"(grep -q iokeep.stage= /proc/cmdline || {command})"


def counts(directory: Path) -> dict[str, int]:
    """Of a run of pytest: tests, failures, errors, skipped."""
    suite = ET.parse(directory / "junit.xml").getroot().find("testsuite")
    assert suite is not None
    return {key: int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")}


def notes(directory: Path, prefix: str) -> list[str]:
    """Lines of the program's output that begin with ``prefix``."""
    text = (directory / "output.log").read_text()
    return re.findall(rf"^{re.escape(prefix)}.*$", text, re.MULTILINE)
