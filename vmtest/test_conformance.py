# SPDX-License-Identifier: Apache-2.0
"""The conformance suite, and the kernel's own selftests, on a real kernel."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import pytest

from vmtest import vm
from vmtest.guest_programs import Boot, counts, in_turn, notes, pytest_of

#: random traces for each kind of device; IOKEEP_TRACES=500 and more when something changed
TRACES = os.environ.get("IOKEEP_TRACES", "20")
#: accesses of emulated devices pass no IOMMU, and are slow in a guest
_VFIO = "vfio and not test_access"
#: mode -> (tests, kind and mode of the software kernel's IOMMU). Behind all but the first only what a VFIO
#: device has a part in: the rest does not look at the hardware
CHOSEN = {
    "vtd-legacy": ("", "vtd", "legacy"),
    "vtd-second-stage": (_VFIO, "vtd", "scalable-ss"),
    "vtd-first-stage": (_VFIO, "vtd", "scalable-fs"),
    "amd": (_VFIO, "amd", ""),
}


@contextlib.contextmanager
def answers(mode: str) -> Iterator[str]:
    """A file of what the software kernel says to the traces: here that takes seconds, in a guest minutes."""
    command = [sys.executable, "tests/conformance/conf_answers.py", *CHOSEN[mode][1:], TRACES, "0", "40"]
    environment = {**os.environ, "PYTHONPATH": "src"}
    done = subprocess.run(command, cwd=vm.ROOT, env=environment, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    with tempfile.NamedTemporaryFile("w", suffix=".json", prefix="iokeep-answers-") as file:
        file.write(done.stdout)
        file.flush()
        yield file.name


@Boot
def suite(mode: str) -> tuple[dict[str, int], list[str]]:
    """tests/conformance on the real kernel: every case there, and random traces on both kernels at once."""
    program = in_turn(
        f"{sys.executable} -c 'from vmtest.guest.edu import bind; bind()'",
        pytest_of("-q", "tests/conformance", "-k", CHOSEN[mode][0]),
    )
    machine, name = vm.machines()[mode], f"conformance-{mode}"
    with answers(mode) as path:
        environment = {
            "IOKEEP_MACHINE": "kernel",
            "IOKEEP_TRACES": TRACES,
            "IOKEEP_ANSWERS": path,
            "IOKEEP_BESIDE": CHOSEN[mode][2],
        }
        with vm.boot(machine, program, name=name, environment=environment, seconds=900) as guest:
            guest.check()
    assert not guest.kernel_complaints(), f"see {guest.directory}"
    return counts(guest.directory), notes(guest.directory, "conformance:")


@Boot
def selftests(mode: str) -> str:
    """What the kernel's own selftests print."""
    script = (
        "echo 200 > /proc/sys/vm/nr_hugepages; "
        "for each in iommu/iommufd iommu/iommufd_fail_nth liveupdate/liveupdate; do "
        '"$IOKEEP_VM_KERNEL/selftests/$each"; done; true'
    )
    with vm.boot(vm.machines()[mode], ["sh", "-c", script], name="selftests", seconds=400) as guest:
        guest.check()
        return (guest.directory / "output.log").read_text()


@pytest.mark.parametrize("mode", [suite.case(mode) for mode in CHOSEN if mode in vm.machines()])
def test_the_kernel_and_the_software_kernel_say_the_same(
    mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ran, said = suite(mode)
    with capsys.disabled():
        print(f"\n{mode}: {ran['tests']} conformance cases on the real kernel", *said, sep="\n")
    assert ran["failures"] == ran["errors"] == 0
    assert ran["tests"] > (100 if CHOSEN[mode][0] else 600)


@pytest.mark.parametrize("mode", [selftests.case("vtd-legacy")])
def test_the_kernels_own_selftests(mode: str) -> None:
    """The yardstick works: a kernel that fails its own tests proves nothing about ours.

    dmabuf_* fail in 7.3.4 for a bug of the test hook.
    """
    text = selftests(mode)
    failed = set(re.findall(r"^not ok \d+ (\S+)", text, re.MULTILINE))
    assert {name for name in failed if ".dmabuf_" not in name} == set()
    assert len(re.findall(r"^ok \d+ ", text, re.MULTILINE)) > 200
