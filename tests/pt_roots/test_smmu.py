# SPDX-License-Identifier: Apache-2.0
"""SMMUv3 stream table and context descriptors: entries of running kernels, encode and find, damage, noise."""

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iokeep.pt.roots import smmu
from iokeep.pt.roots.base import TableRoot
from iokeep.pt.roots.smmu import Aborted, FaultReason, Registers, RootFault, find_root

STREAMS, L2, CDS, CD_L2, TOP, TOP1 = 0x1_0000, 0x2_0000, 0x3_0000, 0x4_0000, 0x8_0000, 0x9_0000
SID = 0x18

#: Debian 7.2.13 behind QEMU's SMMUv3: captures a64-vfio-00_03.0, a64-dma-00_06.0
LINUX_S1 = {"granule": 4096, "input_bits": 48, "output_bits": 44, "start_level": 0, "root_entries": 512}
LINUX_STES = [
    ((0x4492400B, 0xD6, 0, 0, 0, 0, 0, 0), 0x44924000),
    ((0x44A0100B, 0xD6, 0, 0, 0, 0, 0, 0), 0x44A01000),
]
LINUX_CDS = [
    ((0x5E204C0003510, 0x48B85000, 0, 0xFFFFFFFFF404FF44, 0, 0, 0, 0), 0x48B85000, 5),
    ((0x4E204C0003510, 0x44A00000, 0, 0xFFFFFFFFF404FF44, 0, 0, 0, 0), 0x44A00000, 4),
]
#: Debian 7.2.13 with 16K pages: capture a64-16k-s2-vfio-00_03.0
LINUX_S2_STE = (0xD, 0, 0x44CB59400000005, 0x4D30C000, 0, 0, 0, 0)
LINUX_S2 = {"granule": 16384, "input_bits": 44, "output_bits": 44, "start_level": 1, "root_entries": 256}
LINUX_IDR = {"idr1": 0x2730010, "idr3": 0x1414, "idr5": 0x74}


@pytest.fixture(scope="module")
def machine(new_ram):
    """(ste, cd, ...) -> (RAM, registers): a two-level stream table with SPLIT 8."""
    ram = new_ram(0x10_0000)

    def build(ste, cd=None, sid=SID, cd_pa=CDS):
        ram.write(0, bytes(0x7_0000))
        ram.put(STREAMS + (sid >> 8) * 8, [smmu.l1_stream_descriptor(L2, 9)])
        ram.put(L2 + (sid & 0xFF) * 64, ste)
        if cd is not None:
            ram.put(cd_pa, cd)
        return ram, Registers(smmu.strtab_base(STREAMS), smmu.strtab_base_cfg(16, 8))

    return build


def test_registers_of_a_running_kernel():
    assert smmu.strtab_base(0x44936000) == 0x4000000044936000
    assert smmu.strtab_base_cfg(16, 8) == 0x10210


@pytest.mark.parametrize(("words", "pa"), LINUX_STES)
def test_stream_entries_that_linux_wrote(words, pa):
    assert smmu.ste_stage1(pa) == words


@pytest.mark.parametrize(("words", "pa", "asid"), LINUX_CDS)
def test_context_descriptors_that_linux_wrote(machine, words, pa, asid):
    root = TableRoot("arm_lpae_s1", LINUX_S1, pa)
    assert smmu.context_descriptor(root, asid=asid) == words
    ram, regs = machine(smmu.ste_stage1(CDS), words)
    found = find_root(ram, dataclasses.replace(regs, **LINUX_IDR), SID)
    assert found.table == root
    assert (found.translation, found.domain_id, found.asid) == ("first-stage", asid, asid)
    assert (found.mair, found.upper) == (smmu.LINUX_MAIR, None)
    assert [s.name for s in found.path] == ["l1std", "ste", "cd"]
    assert found.path[-1].words == words


def test_second_stage_that_linux_wrote(machine):
    root = TableRoot("arm_lpae_s2", LINUX_S2, 0x4D30C000)
    assert smmu.ste_stage2(root, 5) == LINUX_S2_STE
    ram, regs = machine(LINUX_S2_STE)
    found = find_root(ram, dataclasses.replace(regs, **LINUX_IDR), SID)
    assert (found.table, found.translation, found.vmid, found.domain_id) == (root, "second-stage", 5, 5)


# -- configurations: granule, input bits, output bits -> start level, entries of the root -------------------
@pytest.mark.parametrize(
    ("granule", "input_bits", "start", "entries"),
    [
        (4096, 48, 0, 512), (4096, 39, 1, 512), (4096, 40, 0, 2), (4096, 36, 1, 64), (4096, 25, 2, 16),
        (16384, 48, 0, 2), (16384, 47, 1, 2048), (16384, 36, 2, 2048), (16384, 37, 1, 2),
        (65536, 48, 1, 64), (65536, 52, 1, 1024), (65536, 42, 2, 8192), (65536, 43, 1, 2),
    ],
)  # fmt: skip
def test_first_stage_levels(granule, input_bits, start, entries):
    config = smmu.stage1_config(granule, input_bits, 48)
    assert (config["start_level"], config["root_entries"]) == (start, entries)
    assert "ttbr" not in config
    assert smmu.stage1_config(granule, input_bits, 48, 1)["ttbr"] == 1


@pytest.mark.parametrize(
    ("granule", "input_bits", "start", "entries"),
    [
        (4096, 40, 1, 1024), (4096, 42, 1, 4096), (4096, 43, 1, 8192), (4096, 44, 0, 32), (4096, 32, 1, 4),
        (16384, 40, 2, 32768), (16384, 48, 1, 4096), (16384, 44, 1, 256), (65536, 44, 1, 4),
        (65536, 46, 2, 131072), (65536, 52, 1, 1024),
    ],
)  # fmt: skip
def test_second_stage_levels(machine, granule, input_bits, start, entries):
    config = smmu.stage2_config(granule, input_bits, 52 if input_bits == 52 else 48, start)
    assert config["root_entries"] == entries
    root = TableRoot("arm_lpae_s2", config, 1 << 44)
    assert find_root(*machine(smmu.ste_stage2(root, 9)), SID).table == root


@pytest.mark.parametrize(("granule", "input_bits", "start"), [(4096, 44, 1), (4096, 39, 0), (16384, 36, 1)])
def test_second_stage_start_level_that_does_not_fit(machine, reason_of, granule, input_bits, start):
    with pytest.raises(ValueError, match="start level"):
        smmu.stage2_config(granule, input_bits, 48, start)
    good = smmu.ste_stage2(TableRoot("arm_lpae_s2", smmu.stage2_config(4096, 40, 48, 1), 0), 1)
    tg = {4096: 0, 16384: 2}[granule]
    sl0 = {level: code for code, level in smmu.START_OF_SL0[granule].items()}[start]
    word = good[2] & ~(0x3F << 32 | 3 << 38 | 3 << 46)
    word |= (64 - input_bits) << 32 | sl0 << 38 | tg << 46
    ram, regs = machine((*good[:2], word, *good[3:]))
    assert reason_of(RootFault, lambda: find_root(ram, regs, SID)) == FaultReason.C_BAD_STE


GRANULES = st.sampled_from([4096, 16384, 65536])


@st.composite
def first_stages(draw, ttbr):
    granule = draw(GRANULES)
    output = draw(st.sampled_from([32, 36, 40, 42, 44, 48] + ([52] if granule == 65536 else [])))
    config = smmu.stage1_config(granule, draw(st.integers(25, 52 if granule == 65536 else 48)), output, ttbr)
    size = max(config["root_entries"] * 8, 64)
    return TableRoot("arm_lpae_s1", config, draw(st.integers(0, (1 << 31) // size)) * size)


@given(
    st.none() | first_stages(0), st.none() | first_stages(1), st.integers(0, 0xFFFF), st.integers(0, 0xFFFF)
)
def test_first_stage_encode_find(machine, lower, upper, asid, sid):
    if lower is None and upper is None:
        with pytest.raises(ValueError, match="without a table"):
            smmu.context_descriptor(lower, upper, asid=asid)
        return
    cd = smmu.context_descriptor(lower, upper, asid=asid)
    found = find_root(*machine(smmu.ste_stage1(CDS), cd, sid), sid)
    output = max(r.config["output_bits"] for r in (lower, upper) if r)

    def seen(root):  # one output size for both
        bits = min(output, 52 if root.config["granule"] == 65536 else 48)
        return TableRoot(root.format, {**root.config, "output_bits": bits}, root.root_pa)

    assert found.asid == asid
    assert found.table == seen(lower or upper)
    assert found.upper == (seen(upper) if lower and upper else None)


def test_granule_codes_of_the_halves_differ():
    assert smmu.GRANULE_OF_TG0 == {0: 4096, 1: 65536, 2: 16384}
    assert smmu.GRANULE_OF_TG1 == {1: 16384, 2: 4096, 3: 65536}


def test_linear_stream_table_and_alignment(new_ram):
    ram = new_ram(0x4_0000)
    ste = smmu.ste_bypass()
    ram.put(0x1_0000 + 5 * 64, ste)
    regs = Registers(smmu.strtab_base(0x1_0000), smmu.strtab_base_cfg(8))
    found = find_root(ram, regs, 5)
    assert (found.translation, found.table, found.path[0].pa) == ("pass-through", None, 0x1_0140)
    # Hardware ignores the address bits below the size of the table.
    assert find_root(ram, Registers(0x1_0FC0, 8), 5).path[0].pa == 0x1_0140
    assert find_root(ram, Registers(0x1_0000, 8, cr0=0), 5).translation == "pass-through"


ROOT = TableRoot("arm_lpae_s1", LINUX_S1, TOP)
CD = smmu.context_descriptor(ROOT, asid=1)


@given(st.sampled_from([smmu.S1FMT_LINEAR, smmu.S1FMT_4K_L2, smmu.S1FMT_64K_L2]), st.integers(0, 2047))
def test_substreams(machine, form, ssid):
    if form == smmu.S1FMT_LINEAR:
        ssid &= 0xFF
        cd_pa, cdmax = CDS + ssid * 64, 8
    else:
        low = 6 if form == smmu.S1FMT_4K_L2 else 10
        cd_pa, cdmax = CD_L2 + (ssid & ((1 << low) - 1)) * 64, 11
    ste = smmu.ste_stage1(CDS, cdmax=cdmax, s1fmt=form, dss=smmu.S1DSS_TERMINATE)
    ram, regs = machine(ste, CD, cd_pa=cd_pa)
    if form != smmu.S1FMT_LINEAR:
        ram.put(CDS + (ssid >> low) * 8, [smmu.l1_context_descriptor(CD_L2)])
    found = find_root(ram, regs, SID, ssid)
    assert (found.table, found.pasid) == (ROOT, ssid)
    with pytest.raises(RootFault) as e:
        find_root(ram, regs, SID, 1 << cdmax)
    assert e.value.reason == FaultReason.C_BAD_SUBSTREAMID
    with pytest.raises(RootFault) as e:
        find_root(ram, regs, SID)
    assert e.value.reason == FaultReason.F_STREAM_DISABLED


def test_s1dss(machine, reason_of):
    for dss, kind in ((smmu.S1DSS_BYPASS, "pass-through"), (smmu.S1DSS_SSID0, "first-stage")):
        ram, regs = machine(smmu.ste_stage1(CDS, cdmax=4, dss=dss), CD)
        assert find_root(ram, regs, SID).translation == kind
    disabled = FaultReason.F_STREAM_DISABLED
    assert reason_of(RootFault, lambda: find_root(ram, regs, SID, 0)) == disabled
    # With S1CDMax 0, S1ContextPtr is the descriptor and there are no substreams.
    ram, regs = machine(smmu.ste_stage1(CDS, dss=smmu.S1DSS_TERMINATE), CD)
    assert find_root(ram, regs, SID).table == ROOT
    assert reason_of(RootFault, lambda: find_root(ram, regs, SID, 0)) == FaultReason.C_BAD_SUBSTREAMID


def test_nested_names_the_second_stage(machine):
    s2 = TableRoot("arm_lpae_s2", smmu.stage2_config(4096, 40, 44, 1), 0x80000)
    words = list(smmu.ste_stage2(s2, 3))
    words[0] |= smmu.ste_stage1(0x7000_0040)[0]
    found = find_root(*machine(words), SID)
    assert (found.translation, found.table, found.context_ipa) == ("nested", s2, 0x7000_0040)


def test_abort_has_no_table(machine, reason_of):
    ram, regs = machine(smmu.ste_abort())
    assert reason_of(Aborted, lambda: find_root(ram, regs, SID)) == FaultReason.ABORTED


def test_el2_without_e2h_has_one_half(machine):
    upper = TableRoot("arm_lpae_s1", {**LINUX_S1, "ttbr": 1}, TOP1)
    ste = list(smmu.ste_stage1(CDS))
    ste[1] |= smmu.STRW_EL2 << smmu.STRW_SHIFT
    ram, regs = machine(ste, smmu.context_descriptor(ROOT, upper, asid=1))
    assert find_root(ram, regs, SID).upper == upper
    assert find_root(ram, dataclasses.replace(regs, cr2=1), SID).upper == upper
    assert find_root(ram, dataclasses.replace(regs, cr2=0), SID).upper is None


STE_PA = L2 + SID * 64
S2 = smmu.ste_stage2(TableRoot("arm_lpae_s2", smmu.stage2_config(4096, 40, 44, 1), 0), 3)


@pytest.mark.parametrize(
    ("pa", "word", "reason"),
    [
        (STREAMS, 0, FaultReason.C_BAD_STREAMID),
        (STREAMS, L2 | 5, FaultReason.C_BAD_STREAMID),  # 16 entries
        (STREAMS, L2 | 10, FaultReason.C_BAD_STREAMID),  # reserved: beyond SPLIT + 1
        (STREAMS, 1 << 40 | 9, FaultReason.F_STE_FETCH),
        (STE_PA, 0, FaultReason.C_BAD_STE),
        (STE_PA, CDS | 0xB | 21 << 59, FaultReason.C_BAD_STE),
        (STE_PA, CDS | 0xB | 3 << 4 | 8 << 59, FaultReason.C_BAD_STE),
        (STE_PA, CDS | 0xB | 1 << 4 | 8 << 59, FaultReason.F_CD_FETCH),  # L1CD: the CD's first word
        (STE_PA, 1 << 40 | 0xB, FaultReason.F_CD_FETCH),
        (CDS, 0, FaultReason.C_BAD_CD),
        (CDS, CD[0] & ~smmu.CD_AA64, FaultReason.C_BAD_CD),
        (CDS, CD[0] | smmu.CD_ENDI, FaultReason.C_BAD_CD),
        (CDS, CD[0] | 1 << 14, FaultReason.C_BAD_CD),  # EPD0 and EPD1
        (CDS, CD[0] | 3 << 6, FaultReason.C_BAD_CD),  # TG0 3
        (CDS, CD[0] & ~(1 << 30), FaultReason.C_BAD_CD),  # TTB1 on, TG1 0
        (CDS, CD[0] & ~0x3F | 15, FaultReason.C_BAD_CD),  # 49 bits with 4K
        (CDS, CD[0] & ~0x3F | 40, FaultReason.C_BAD_CD),  # 24 bits without STT
        (CDS, CD[0] | 7 << 32, FaultReason.C_BAD_CD),
        (CDS + 8, TOP | 0x100, FaultReason.C_BAD_CD),
        (CDS + 8, 1 << 44, FaultReason.C_BAD_CD),
    ],
)
def test_first_stage_damage(machine, reason_of, pa, word, reason):
    ram, regs = machine(smmu.ste_stage1(CDS), CD)
    if pa == STE_PA and word >> 59 == 8:
        ram.put(CDS, [1 << 40 | 1])
    ram.put(pa, [word])
    assert reason_of(RootFault, lambda: find_root(ram, regs, SID)) == reason


@pytest.mark.parametrize(
    ("index", "word"),
    [
        (2, S2[2] & ~smmu.S2AA64),
        (2, S2[2] | smmu.S2ENDI),
        (2, S2[2] | 3 << 38),  # S2SL0
        (2, S2[2] | 3 << 46),  # S2TG
        (2, S2[2] | 7 << 48),  # S2PS
        (2, S2[2] & ~(0x3F << 32) | 16 << 32),  # wider than S2PS
        (3, 0x1000),  # not aligned to two concatenated tables
        (3, 1 << 44),
    ],
)
def test_second_stage_damage(machine, reason_of, index, word):
    ram, regs = machine(S2)
    ram.put(STE_PA + index * 8, [word])
    assert reason_of(RootFault, lambda: find_root(ram, regs, SID)) == FaultReason.C_BAD_STE


def test_registers_bound_the_stream(machine, reason_of):
    ram, regs = machine(S2)
    bad = FaultReason.C_BAD_STREAMID
    for changed in (
        {"strtab_base_cfg": 0x10210 & ~0x1F | 4},
        {"idr1": 4},
        {"strtab_base_cfg": 2 << 16 | 8 << 6 | 16},
        {"strtab_base_cfg": 1 << 16 | 7 << 6 | 16},
    ):
        other = dataclasses.replace(regs, **changed)
        assert reason_of(RootFault, lambda other=other: find_root(ram, other, SID)) == bad
    absent = dataclasses.replace(regs, strtab_base=1 << 50)
    assert reason_of(RootFault, lambda: find_root(ram, absent, SID)) == FaultReason.F_STE_FETCH
    # The output size is the smaller of IDR5.OAS and S2PS.
    narrow = dataclasses.replace(regs, idr5=2)
    assert find_root(ram, narrow, SID).config["output_bits"] == 40


@given(
    st.binary(min_size=64, max_size=64), st.binary(min_size=64, max_size=64), st.none() | st.integers(0, 3)
)
def test_noise_never_crashes(machine, ste, cd, ssid):
    first = int.from_bytes(ste[:8], "little") & ~smmu.S1CONTEXTPTR | CDS | 9
    ram, regs = machine([first], None)
    ram.write(STE_PA + 8, ste[8:])
    ram.write(CDS, cd)
    ram.put(CDS, [int.from_bytes(cd[:8], "little") | smmu.CD_V | smmu.CD_AA64])
    try:
        found = find_root(ram, regs, SID, ssid)
    except RootFault:
        return
    assert found.table is None or 0 <= found.config["start_level"] <= 3
    assert found.table is None or found.root_pa < 1 << 52


def test_encoders_refuse_what_does_not_fit():
    for call in (
        lambda: smmu.strtab_base(0x20),
        lambda: smmu.strtab_base_cfg(16, 7),
        lambda: smmu.l1_stream_descriptor(L2, 32),
        lambda: smmu.ste_stage1(0x20),
        lambda: smmu.context_descriptor(ROOT, asid=1 << 16),
        lambda: smmu.context_descriptor(TableRoot("arm_lpae_s1", {"granule": 8192}, 0), asid=1),
        lambda: smmu.ste_stage2(TableRoot("arm_lpae_s2", LINUX_S2, 4), 1),
    ):
        with pytest.raises(ValueError):
            call()


# -- commands: encoded, and as Linux's arm_smmu_cmdq_build_cmd() puts the fields of arm-smmu-v3.h ----
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (smmu.cfgi_ste(0x18), (0x03 | 0x18 << 32, 0)),
        (smmu.cfgi_ste(0x18, leaf=True), (0x03 | 0x18 << 32, 1)),
        (smmu.cfgi_ste_range(0x40, 6), (0x04 | 0x40 << 32, 5)),
        (smmu.cfgi_all(), (0x04, 31)),
        (smmu.cfgi_cd(0x18, 3), (0x05 | 3 << 12 | 0x18 << 32, 1)),
        (smmu.cfgi_cd_all(0x18), (0x06 | 0x18 << 32, 0)),
        (smmu.tlbi_nh_all(2), (0x10 | 2 << 32, 0)),
        (smmu.tlbi_nh_asid(5), (0x11 | 5 << 48, 0)),
        (smmu.tlbi_nh_asid(5, 2), (0x11 | 2 << 32 | 5 << 48, 0)),
        (smmu.tlbi_nh_va(5, 0xFFFF_F000), (0x12 | 5 << 48, 0xFFFF_F000)),
        (smmu.tlbi_nh_vaa(0x1000, 2, leaf=True), (0x13 | 2 << 32, 0x1001)),
        (smmu.tlbi_s12_vmall(7), (0x28 | 7 << 32, 0)),
        (smmu.tlbi_s2_ipa(7, 0x20_0000), (0x2A | 7 << 32, 0x20_0000)),
        (smmu.tlbi_nsnh_all(), (0x30, 0)),
        (smmu.sync(), (0x46 | 2 << 12, 0)),
        (smmu.sync(smmu.SYNC_NONE), (0x46, 0)),
        # 3 << 2 granules of 4K, 1 of 16K, 32 << 31 of 64K: NUM, SCALE and TG
        (
            smmu.tlbi_nh_va(5, smmu.Range(0x4000, 3, 2, 4096)),
            (0x12 | 2 << 12 | 2 << 20 | 5 << 48, 0x4000 | 1 << 10),
        ),
        (
            smmu.tlbi_s2_ipa(1, smmu.Range(0x8000, 1, 1, 16384), leaf=True),
            (0x2A | 1 << 20 | 1 << 32, 0x8001 | 2 << 10),
        ),
        (smmu.tlbi_nh_vaa(smmu.Range(0, 32, 31, 65536)), (0x13 | 31 << 12 | 31 << 20, 3 << 10)),
    ],
)
def test_commands_as_linux_builds_them(words, expected):
    assert words == expected
    assert smmu.decode_command(words) is not None


IDS = st.integers(0, 0xFFFF)


@given(IDS, IDS, st.integers(0, 2**32 - 1), st.integers(0, 2**20 - 1), st.integers(1, 32), st.booleans())
def test_commands_encode_decode(asid, vmid, sid, ssid, lg2, leaf):
    Op, Command, decode = smmu.Op, smmu.Command, smmu.decode_command
    assert decode(smmu.cfgi_ste(sid, leaf=leaf)) == Command(op=Op.CFGI_STE, sid=sid, leaf=leaf)
    block = decode(smmu.cfgi_ste_range(sid, lg2))
    assert block == Command(op=Op.CFGI_STE_RANGE, sid=sid >> lg2 << lg2, sid_lg2=lg2)
    assert block.sid <= sid < block.sid + (1 << lg2)
    assert decode(smmu.cfgi_cd(sid, ssid, leaf=leaf)) == Command(op=Op.CFGI_CD, sid=sid, ssid=ssid, leaf=leaf)
    assert decode(smmu.cfgi_cd_all(sid)) == Command(op=Op.CFGI_CD_ALL, sid=sid)
    assert decode(smmu.tlbi_nh_all(vmid)) == Command(op=Op.TLBI_NH_ALL, vmid=vmid)
    assert decode(smmu.tlbi_nh_asid(asid, vmid)) == Command(op=Op.TLBI_NH_ASID, asid=asid, vmid=vmid)
    assert decode(smmu.tlbi_s12_vmall(vmid)) == Command(op=Op.TLBI_S12_VMALL, vmid=vmid)
    iova = sid << 12
    page = {"start": iova, "last": iova + 0xFFF, "leaf": leaf, "vmid": vmid}
    assert decode(smmu.tlbi_nh_va(asid, iova, vmid, leaf=leaf)) == Command(
        op=Op.TLBI_NH_VA, asid=asid, **page
    )
    assert decode(smmu.tlbi_nh_vaa(iova, vmid, leaf=leaf)) == Command(op=Op.TLBI_NH_VAA, **page)
    assert decode(smmu.tlbi_s2_ipa(vmid, iova, leaf=leaf)) == Command(op=Op.TLBI_S2_IPA, **page)


@given(GRANULES, st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_ranges_cover_what_was_asked(granule, a, b):
    start, last = sorted((a, b))
    found = [smmu.decode_command(smmu.tlbi_nh_va(1, r)) for r in smmu.ranges_of(start, last, granule)]
    assert len(found) <= 11 + (last - start) // (granule << 36)
    assert found[0].start == start // granule * granule
    for before, after in itertools.pairwise(found):
        assert before.last + 1 == after.start
    # one granule more where a lone one would be a reserved command
    assert last <= found[-1].last <= last + 2 * granule


@given(st.binary(min_size=16, max_size=16))
def test_any_command_decodes_or_is_illegal(raw):
    words = [int.from_bytes(raw[i : i + 8], "little") for i in (0, 8)]
    for op in range(256):
        got = smmu.decode_command((words[0] & ~0xFF | op, words[1]))
        assert got is None or (got.op == op and 0 <= got.start <= got.last < 1 << 64)


@pytest.mark.parametrize(
    "words",
    [
        (0, 0),
        (0x20, 0),  # TLBI_EL2_ALL: IDR0.HYP = 0
        (0x40, 0),  # ATC_INV: IDR0.ATS = 0
        (0x41, 0),
        (0x44, 0),  # RESUME: no stall
        (0x03 | 1 << 10, 0),  # SSec
        (0x03, 2),
        (0x10 | 1 << 48, 0),
        (0x46 | 3 << 12, 0),
        (0x12, 0x1000 | 1 << 10),  # a range of NUM 0, SCALE 0, TTL 0
        (0x12, 0x4000 | 2 << 10 | 1 << 8),  # no leaves of level 1 with 16K
        (0x12 | 1 << 12, 0x1000),  # NUM without TG
        (0x12, 0x1100),  # TTL without TG
        (0x2A, 1 << 52),
    ],
)
def test_illegal_commands(words):
    assert smmu.decode_command(words) is None


# -- event records ----
def test_events_as_linux_reads_them():
    event = smmu.Event(
        code=FaultReason.F_TRANSLATION, sid=0x18, iova=0x1234, read=True, cls=smmu.CLASS_IN, stag=5
    )
    assert smmu.event_words(event) == (0x10 | 0x18 << 32, 5 | 1 << 35 | 2 << 40, 0x1234, 0)
    event = smmu.Event(
        code=FaultReason.F_PERMISSION, sid=0x20, ssid=3, iova=0x1234, ipa=0x1000, stage2=True, stall=True
    )
    expected = (0x13 | 1 << 11 | 3 << 12 | 0x20 << 32, 1 << 31 | 1 << 39, 0x1234, 0x1000)
    assert smmu.event_words(event) == expected
    event = smmu.Event(code=FaultReason.F_STE_FETCH, sid=0x18, fetch_pa=0x4000)
    assert smmu.event_words(event) == (0x03 | 0x18 << 32, 0, 0, 0x4000)


@st.composite
def events(draw):
    code = draw(st.sampled_from([reason for reason in FaultReason if reason <= smmu.EVT_ID]))
    fields = {"code": code, "sid": draw(st.integers(0, 2**32 - 1))}
    fields["ssid"] = draw(st.none() | st.integers(0, 2**20 - 1))
    if code >= FaultReason.F_WALK_EABT:
        for name in ("stall", "privileged", "instruction", "read", "stage2"):
            fields[name] = draw(st.booleans())
        fields["stag"], fields["cls"] = draw(IDS), draw(st.integers(0, 3))
        fields["iova"] = draw(st.integers(0, 2**64 - 1))
        if code != FaultReason.F_WALK_EABT:
            fields["ipa"] = draw(st.integers(0, 2**40 - 1)) << 12
    if code in (FaultReason.F_STE_FETCH, FaultReason.F_CD_FETCH, FaultReason.F_WALK_EABT):
        fields["fetch_pa"] = draw(st.integers(0, 2**49 - 1)) << 3
    return smmu.Event(**fields)


@given(events())
def test_events_encode_decode(event):
    assert smmu.decode_event(smmu.event_words(event)) == event


@pytest.mark.parametrize(
    "fields",
    [
        {"code": FaultReason.ABORTED},
        {"code": FaultReason.C_BAD_STE, "iova": 1},
        {"code": FaultReason.C_BAD_STE, "fetch_pa": 8},
        {"code": FaultReason.F_WALK_EABT, "fetch_pa": 8, "ipa": 0x1000},
        {"code": FaultReason.F_TRANSLATION, "ssid": 1 << 20},
        {"code": FaultReason.F_TRANSLATION, "ipa": 8},
    ],
)
def test_events_refuse_what_does_not_fit(fields):
    with pytest.raises(ValueError):
        smmu.event_words(smmu.Event(sid=1, **fields))
    assert smmu.decode_event((0x24, 0, 0, 0)) is None  # E_PAGE_REQUEST
