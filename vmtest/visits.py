# SPDX-License-Identifier: Apache-2.0
"""One boot behind each IOMMU, which several tests look at: layouts of mappings, the clients' tests, and then
a live update, whose kexec ends the kernel that had them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from iokeep.mem.memory import Memory
from iokeep.pt.extents import Extents
from iokeep.pt.leaves import extents
from iokeep.pt.registry import open_format
from iokeep.pt.roots.find import find_root_of
from vmtest import vm
from vmtest.guest_programs import GUEST_TESTS, Boot, counts, first_kernel, in_turn, module, pytest_of
from vmtest.witnesses import Seen, look


@dataclass
class Visit:
    """What was seen.

    :ivar layouts: by name. :ivar clients: counts of guest/test_client.py. :ivar steps: what the live update
        told, by step. :ivar tables: the device's translations at the steps that have some, read from outside
        of the machine. :ivar text: the live update's transcript.
    """

    layouts: dict[str, Seen] = field(default_factory=dict)
    clients: dict[str, int] = field(default_factory=dict)
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    tables: dict[str, Extents] = field(default_factory=dict)
    text: str = ""


def table_now(ram: Memory, hw: Mapping[str, Any]) -> Extents:
    """The device's translations, read from outside of the machine."""
    found = find_root_of(hw, ram, iommu=hw["iommu"])
    assert found is not None
    assert found.table is not None
    table, problems = extents(open_format(found.table.format, found.table.config), ram, found.table.root_pa)
    assert not len(problems)
    return table


@Boot
def visit(mode: str) -> Visit:
    """Boot once for each IOMMU."""
    out = Visit()
    program = in_turn(
        first_kernel(module("tables")),
        # what failed is in its report
        first_kernel(f"{pytest_of('--confcutdir=vmtest/guest', GUEST_TESTS)} || true"),
        module("live_update"),
    )
    with vm.boot(vm.machines()[mode], program, name=mode, seconds=600) as guest:
        ram = guest.memory()
        for told in guest.documents():
            if "layout" in told:
                out.layouts[told["layout"]] = look(told, ram)
            else:
                out.steps[told["step"]] = told
                if "hw" in told:
                    out.tables[told["step"]] = table_now(ram, told["hw"])
            guest.send(go="on")
        guest.check_status()
    out.clients = counts(guest.directory)
    text = (guest.directory / "output.log").read_text()
    out.text = text[text.index("kernel: ") :]
    print(out.text, f"logs: {guest.directory}", sep="")
    assert not guest.kernel_complaints(), f"see {guest.directory}"
    return out
