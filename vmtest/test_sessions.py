# SPDX-License-Identifier: Apache-2.0
"""Sessions on the real kernel: what preflight says and the kernel then does, and what comes over a kexec."""

from __future__ import annotations

import json
import runpy
import sys
from typing import Any

import pytest

from vmtest import vm
from vmtest.guest_programs import Boot, counts, first_kernel, in_turn, module, notes, pytest_of

#: the cases, which the software host has too (tests/conformance/test_kexec.py)
KEXEC = "tests/conformance/conf_kexec.py"
WANTED: dict[str, str] = runpy.run_path(str(vm.ROOT / KEXEC))["REAL"]
MODE = "vtd-legacy"


@Boot
def run(mode: str) -> tuple[dict[str, int], list[list[Any]], str]:
    """guest/test_preflight.py, then sessions over a kexec, then the documentation's over another."""
    tests = pytest_of("--confcutdir=vmtest/guest", "vmtest/guest/test_preflight.py")
    program = in_turn(
        first_kernel(tests),
        f'(grep -q iokeep.stage=3 /proc/cmdline || {sys.executable} {KEXEC} "$IOKEEP_VM_KERNEL/bzImage")',
        module("documented"),
    )
    with vm.boot(vm.machines()[mode], program, name="sessions", seconds=300) as guest:
        guest.check()
    rows = [json.loads(line.removeprefix("row ")) for line in notes(guest.directory, "row ")]
    return counts(guest.directory), rows, (guest.directory / "output.log").read_text()


@pytest.mark.parametrize("mode", [run.case(MODE)])
def test_preflight_says_what_the_kernel_does(mode: str) -> None:
    ran = run(mode)[0]
    assert ran["tests"] >= 40
    assert ran["failures"] == ran["errors"] == ran["skipped"] == 0


@pytest.mark.parametrize("case", [run.case(MODE, each) for each in WANTED])
def test_the_other_side_of_a_kexec(case: str) -> None:
    found = [answer for name, answer in run(MODE)[1] if name == case]
    assert found == [WANTED[case]]


@pytest.mark.parametrize("mode", [run.case(MODE)])
def test_every_row_is_wanted(mode: str) -> None:
    assert {name for name, _ in run(mode)[1]} == set(WANTED)


@pytest.mark.parametrize("mode", [run.case(MODE)])
def test_the_examples_of_the_documentation(mode: str) -> None:
    """A second live update, of the kernel that the first one booted."""
    assert run(mode)[2].endswith("\na guest's memory\n")


@Boot
def broken(mode: str) -> tuple[str, str]:
    """A duplicate name at a full block: what the program printed, and how the machine ended."""
    machine = vm.machines()[mode]
    with vm.boot(machine, in_turn(module("broken_name")), name="broken-name", seconds=200) as guest:
        try:
            guest.wait()
        except vm.GuestError as error:
            return (guest.directory / "output.log").read_text(), str(error)
    return (guest.directory / "output.log").read_text(), f"exit status {guest.status}"


@pytest.mark.parametrize("mode", [broken.case(MODE)])
def test_the_name_that_breaks_the_next_boot(mode: str) -> None:
    """A bug of Linux 7.3.4, and why preflight warns. Where this fails, the kernel is mended: say so there."""
    printed, end = broken(mode)
    assert "preflight: refused EEXIST" in printed
    assert "preflight: warning : 51 sessions are open" in printed
    assert "kernel: EEXIST" in printed
    assert "jump, with 51 sessions" in printed
    assert "Kernel panic - not syncing: The incoming tree failed to initialize" in end
