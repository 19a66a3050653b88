# SPDX-License-Identifier: Apache-2.0
"""RISC-V device and process directories: the context of a running kernel, encode and find, damage, noise."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iokeep.pt.roots import riscv
from iokeep.pt.roots.riscv import FaultReason, Registers, RootFault, Stage, find_root

#: QEMU 11.1.3, Debian 7.2.13: capture rv-sv39-dev
LINUX_CAPS = 0x78E2CF4F10
LINUX_DC = (1, 0, 0x1000, 0x8000000000087791, 0, 0, 0, 0)
#: the same with all process directory modes
CAPS = LINUX_CAPS | 7 << 38
BASE = CAPS & ~riscv.CAP_MSI_FLAT
DDT = (0x1000, 0x2000, 0x3000)  # root last
PDT = (0x4000, 0x5000, 0x6000)
TOP, GTOP = 0x1_0000, 0x2_0000
DEVICE = 24


@pytest.fixture(scope="module")
def machine(new_ram):
    """(dc, ...) -> (RAM, registers): a device directory of ``levels`` levels, a context for one device."""
    ram = new_ram(0x8000)

    def build(dc, device=DEVICE, levels=3, caps=CAPS):
        ram.write(0, bytes(0x8000))
        index = riscv.device_index(device, extended=len(dc) == 8)
        for level in range(levels - 1, 0, -1):
            ram.put(DDT[level] + index[level] * 8, [riscv.directory_entry(DDT[level - 1])])
        ram.put(DDT[0] + index[0] * len(dc) * 8, dc)
        return ram, Registers(riscv.ddtp_value(DDT[levels - 1], levels), caps)

    return build


def test_context_that_linux_wrote(machine):
    assert riscv.ddtp_value(0x839D7000, 3) == 0x20E75C04
    assert riscv.device_context(Stage(0x87791000, 3, 1), extended=True) == LINUX_DC
    found = find_root(*machine(LINUX_DC, caps=LINUX_CAPS), DEVICE)
    assert (found.translation, found.format, found.root_pa) == ("first-stage", "riscv64", 0x87791000)
    # QEMU has no Svpbmt and no AMO_HWAD
    config = {"levels": 3, "stage": 1, "svpbmt": 0, "hardware_ad": 0}
    assert (dict(found.config), found.domain_id) == (config, 1)
    assert [s.name for s in found.path] == ["ddte", "ddte", "dc"]
    assert found.path[-1].words == LINUX_DC


def test_device_id_split():
    assert riscv.device_index(0xABCDEF, extended=False) == (0x6F, 0x19B, 0xAB)
    assert riscv.device_index(0xABCDEF, extended=True) == (0x2F, 0x137, 0x157)


STAGES = st.builds(
    Stage,
    st.integers(0, (1 << 42) - 1).map(lambda n: n << 14),
    st.sampled_from([3, 4, 5]),
    st.integers(0, 0xFFFF),
)


@given(
    st.integers(0, (1 << 24) - 1), st.integers(1, 3), st.booleans(), st.none() | STAGES, st.none() | STAGES
)
def test_encode_find(machine, device, levels, extended, first, second):
    bits = {1: 6, 2: 15, 3: 24}[levels] if extended else {1: 7, 2: 16, 3: 24}[levels]
    device &= (1 << bits) - 1
    dc = riscv.device_context(first, second, extended=extended)
    ram, regs = machine(dc, device, levels, CAPS if extended else BASE)
    found = find_root(ram, regs, device)
    kinds = {(0, 0): "pass-through", (1, 0): "first-stage", (0, 1): "second-stage", (1, 1): "nested"}
    assert found.translation == kinds[bool(first), bool(second)]
    stage = second or first
    if stage is None:
        assert found.table is None
    else:
        assert (found.config["levels"], found.config["stage"]) == (stage.levels, 2 if second else 1)
        assert (found.root_pa, found.domain_id) == (stage.root_pa, stage.tag)
    if first and second:
        assert (found.first.root_pa, found.first.config["levels"]) == (first.root_pa, first.levels)
        assert (found.pscid, found.gscid) == (first.tag, second.tag)
    assert len(found.path) == levels
    if levels < 3:
        with pytest.raises(RootFault) as e:
            find_root(ram, regs, 1 << bits)
        assert e.value.reason == FaultReason.TTYP_BLOCKED


@given(st.integers(1, 3), st.integers(0, (1 << 20) - 1), STAGES)
def test_process_directory(machine, levels, pid, stage):
    pid &= (1 << riscv.PID_BITS[levels]) - 1
    dc = list(riscv.device_context(extended=True, tc=riscv.TC_PDTV))
    dc[3] = riscv.pdtp(PDT[levels - 1], levels)
    ram, regs = machine(dc)
    index = pid & 0xFF, pid >> 8 & 0x1FF, pid >> 17
    for level in range(levels - 1, 0, -1):
        ram.put(PDT[level] + index[level] * 8, [riscv.directory_entry(PDT[level - 1])])
    ram.put(PDT[0] + index[0] * 16, riscv.process_context(stage))
    found = find_root(ram, regs, DEVICE, pid)
    assert (found.translation, found.root_pa, found.domain_id) == ("first-stage", stage.root_pa, stage.tag)
    assert (found.pasid, len(found.path)) == (pid, 3 + levels)
    assert find_root(ram, regs, DEVICE).translation == "pass-through"  # no process id, DPE 0
    if levels < 3:
        with pytest.raises(RootFault) as e:
            find_root(ram, regs, DEVICE, 1 << riscv.PID_BITS[levels])
        assert e.value.reason == FaultReason.TTYP_BLOCKED


def test_process_directory_of_a_guest_is_named_not_read(machine):
    dc = list(riscv.device_context(None, Stage(GTOP, 4, 7), extended=True, tc=riscv.TC_PDTV | riscv.TC_DPE))
    dc[3] = riscv.pdtp(0x7000_0000, 2)
    found = find_root(*machine(dc), DEVICE)
    assert (found.translation, found.root_pa, found.directory) == ("nested", GTOP, 0x7000_0000)
    assert (found.pasid, found.domain_id, found.first) == (0, 7, None)


def test_msi_table_is_named(machine):
    dc = list(riscv.device_context(None, Stage(GTOP, 4, 7), extended=True))
    dc[4] = 1 << 60 | 0x1234
    assert find_root(*machine(dc), DEVICE).msiptp == 0x1234000


def test_modes_without_a_directory(machine, reason_of):
    ram, regs = machine(LINUX_DC)
    assert find_root(ram, Registers(1, CAPS), DEVICE).translation == "pass-through"
    for ddtp in (0, 5, regs.ddtp | 1 << 5, regs.ddtp | 1 << 54):
        other = Registers(ddtp, CAPS)
        assert reason_of(RootFault, lambda r=other: find_root(ram, r, DEVICE)) == FaultReason.DMA_DISABLED
    big = Registers(regs.ddtp, CAPS, riscv.FCTL_BE)
    assert reason_of(RootFault, lambda: find_root(ram, big, DEVICE)) == FaultReason.DDT_MISCONFIGURED
    with pytest.raises(ValueError, match="24 bits"):
        find_root(ram, regs, 1 << 24)


DC_PA = DDT[0] + DEVICE * 64
BOTH = riscv.device_context(Stage(TOP, 3, 1), Stage(GTOP, 4, 2), extended=True)


@pytest.mark.parametrize(
    ("pa", "word", "reason"),
    [
        (DDT[2], 0, FaultReason.DDT_INVALID),
        (DDT[2], BOTH[0] | 2, FaultReason.DDT_MISCONFIGURED),
        (DDT[1], 1 << 54 | 1, FaultReason.DDT_MISCONFIGURED),
        (DDT[1], 1 << 40 | 1, FaultReason.DDT_LOAD_FAULT),
        (DC_PA, 0, FaultReason.DDT_INVALID),
        (DC_PA, 1 | 1 << 12, FaultReason.DDT_MISCONFIGURED),
        (DC_PA, 1 | 1 << 32, FaultReason.DDT_MISCONFIGURED),
        (DC_PA, 1 | riscv.TC_SXL, FaultReason.DDT_MISCONFIGURED),
        (DC_PA, 1 | riscv.TC_EN_PRI, FaultReason.DDT_MISCONFIGURED),
        (DC_PA, 1 | riscv.TC_T2GPA, FaultReason.DDT_MISCONFIGURED),
        (DC_PA, 1 | riscv.TC_EN_ATS | riscv.TC_PRPR, FaultReason.DDT_MISCONFIGURED),
        (DC_PA, 1 | riscv.TC_DPE, FaultReason.DDT_MISCONFIGURED),
        (DC_PA, 1 | riscv.TC_PDTV, FaultReason.DDT_MISCONFIGURED),  # fsc.MODE 8 is no pdtp.MODE
        (DC_PA + 8, BOTH[1] + (2 << 60), FaultReason.DDT_MISCONFIGURED),
        (DC_PA + 8, BOTH[1] | 1, FaultReason.DDT_MISCONFIGURED),  # not aligned to 16 KiB
        (DC_PA + 16, 1, FaultReason.DDT_MISCONFIGURED),
        (DC_PA + 16, 1 << 40, FaultReason.DDT_MISCONFIGURED),  # RCID without QOSID
        (DC_PA + 24, 7 << 60, FaultReason.DDT_MISCONFIGURED),
        (DC_PA + 24, BOTH[3] | 1 << 44, FaultReason.DDT_MISCONFIGURED),
        (DC_PA + 32, 2 << 60, FaultReason.DDT_MISCONFIGURED),
        (DC_PA + 56, 1, FaultReason.DDT_MISCONFIGURED),
    ],
)
def test_damage(machine, reason_of, pa, word, reason):
    ram, regs = machine(BOTH)
    ram.put(pa, [word])
    assert reason_of(RootFault, lambda: find_root(ram, regs, DEVICE)) == reason


def test_capabilities_bound_the_context(machine, reason_of):
    bad = FaultReason.DDT_MISCONFIGURED
    for cap in (1 << 9, 1 << 18):  # Sv39, Sv48x4
        ram, regs = machine(BOTH, caps=CAPS & ~cap)
        assert reason_of(RootFault, lambda m=ram, r=regs: find_root(m, r, DEVICE)) == bad
    ram, regs = machine(
        riscv.device_context(Stage(1 << 40, 3), extended=True), caps=CAPS & ~(0x3F << 32) | 40 << 32
    )
    assert reason_of(RootFault, lambda: find_root(ram, regs, DEVICE)) == bad  # beyond PAS


@pytest.mark.parametrize(
    ("pa", "words", "reason"),
    [
        (PDT[1], [0], FaultReason.PDT_INVALID),
        (PDT[1], [3], FaultReason.PDT_MISCONFIGURED),
        (PDT[1], [1 << 40 | 1], FaultReason.PDT_LOAD_FAULT),
        (PDT[0], [0], FaultReason.PDT_INVALID),
        (PDT[0], [9, 0], FaultReason.PDT_MISCONFIGURED),
        (PDT[0], [1, 7 << 60], FaultReason.PDT_MISCONFIGURED),
        (PDT[0], [1, 8 << 60 | 1 << 44], FaultReason.PDT_MISCONFIGURED),
    ],
)
def test_process_directory_damage(machine, reason_of, pa, words, reason):
    dc = list(riscv.device_context(extended=True, tc=riscv.TC_PDTV | riscv.TC_DPE))
    dc[3] = riscv.pdtp(PDT[1], 2)
    ram, regs = machine(dc)
    ram.put(PDT[1], [riscv.directory_entry(PDT[0])])
    ram.put(PDT[0], riscv.process_context(Stage(TOP, 3)))
    assert find_root(ram, regs, DEVICE).root_pa == TOP
    ram.put(pa, words)
    assert reason_of(RootFault, lambda: find_root(ram, regs, DEVICE)) == reason


@given(
    st.binary(min_size=64, max_size=64), st.integers(0, 0x1F), st.none() | st.integers(0, 3), st.booleans()
)
def test_noise_never_crashes(machine, noise, tc, pid, extended):
    ram, regs = machine(BOTH if extended else BOTH[:4], caps=CAPS if extended else BASE)
    pa = find_root(ram, regs, DEVICE).path[-1].pa
    ram.write(pa + 8, noise[: 56 if extended else 24])
    ram.put(pa, [1 | tc << 5])
    try:
        found = find_root(ram, regs, DEVICE, pid)
    except RootFault:
        return
    assert found.table is None or found.config["levels"] in (3, 4, 5)


def test_encoders_refuse_what_does_not_fit():
    for call in (
        lambda: riscv.ddtp_value(0x1001, 3),
        lambda: riscv.ddtp_value(0x1000, 0),
        lambda: riscv.directory_entry(1 << 56),
        lambda: riscv.device_context(Stage(TOP, 2), extended=True),
        lambda: riscv.device_context(None, Stage(0x1000, 3), extended=True),
        lambda: riscv.device_context(Stage(TOP, 3, 1 << 20), extended=True),
        lambda: riscv.pdtp(0x1000, 4),
    ):
        with pytest.raises(ValueError):
            call()


@pytest.mark.parametrize("cap", [0, riscv.CAP_AMO_HWAD, riscv.CAP_SVPBMT])
def test_what_decides_a_translation_is_in_the_configuration(machine, cap):
    stages = ((Stage(TOP, 3), None, riscv.TC_SADE), (None, Stage(GTOP, 3), riscv.TC_GADE))
    for first, second, update in stages:
        hardware = int(cap == riscv.CAP_AMO_HWAD)
        dc = riscv.device_context(first, second, extended=True, tc=update if hardware else 0)
        config = find_root(*machine(dc, caps=CAPS | cap), DEVICE).config
        assert (config["hardware_ad"], config["svpbmt"]) == (hardware, int(cap == riscv.CAP_SVPBMT))
