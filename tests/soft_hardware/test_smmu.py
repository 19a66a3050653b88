# SPDX-License-Identifier: Apache-2.0
"""The SMMUv3: registers, both queues, look-up, and a front-end that translates by it."""

import numpy as np
import pytest
from front_ends import detached
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iokeep.pt.build import Table
from iokeep.pt.extents import Extents
from iokeep.pt.registry import open_format
from iokeep.pt.roots import smmu
from iokeep.pt.roots.base import TableRoot
from iokeep.pt.roots.smmu import FaultReason
from iokeep.pt.walk import walk
from iokeep.soft.hardware.iommu import FrontEnd
from iokeep.soft.hardware.platform import Platform
from iokeep.soft.hardware.unit import ANY, FE_OVERFLOW, Fault, Match
from iokeep.soft.hardware.units import smmu as r

STAGES = ("arm_lpae_s1", "arm_lpae_s2")
ENABLED = r.CR0_SMMUEN | r.CR0_EVENTQEN | r.CR0_CMDQEN
IOVA = 1 << 30


class Machine:
    """A platform with an SMMU, frames that are never freed, one domain for all devices, both queues.

    :param lg2: of the entries of both queues.
    """

    def __init__(self, stage="arm_lpae_s1", devices=1, lg2=4, start=True, **config):
        self.platform = Platform.create(8 << 20, devices, iommu="smmuv3")
        self.ram, self.regs = self.platform.ram, self.platform.iommu
        self.next, self.id, self.lg2 = 64 << 12, 5, lg2
        self.fmt = open_format(stage, {"granule": 4096, "input_bits": 48, "output_bits": 48, **config})
        self.table = self.new_table()
        self.streams, self.level2 = self.pages(2), self.pages(1)
        self.contexts = [self.pages(1) for _ in range(devices)]
        self.commands, self.events = self.pages(1), self.pages(1)
        sid = self.platform.bdf(0)
        self.ram.store64(self.streams + (sid >> 6) * 8, smmu.l1_stream_descriptor(self.level2, 7))
        for index in range(devices):
            self.attach(index)
        self.prod = 0
        if not start:
            return
        self.regs.write64(r.STRTAB_BASE, smmu.strtab_base(self.streams))
        self.regs.write32(r.STRTAB_BASE_CFG, smmu.strtab_base_cfg(16, 6))
        self.regs.write32(r.CR2, r.CR2_RECINVSID)
        self.regs.write64(r.CMDQ_BASE, self.commands | lg2)
        self.regs.write64(r.EVENTQ_BASE, self.events | lg2)
        self.regs.write32(r.CR0, ENABLED)

    def pages(self, n):
        self.next = -(-self.next // (n << 12)) * (n << 12)
        pa, self.next = self.next, self.next + (n << 12)
        return pa

    def new_table(self):
        def alloc(n, size=0):
            return np.array([self.pages(max(1, (size or self.fmt.table_bytes) >> 12)) for _ in range(n)])

        return Table.create(self.fmt, self.ram, lambda *a: alloc(*a).astype(np.uint64), lambda *_: None)

    def put(self, pa, words):
        for i, word in enumerate(words):
            self.ram.store64(pa + 8 * i, word)

    def ste(self, index=0):
        return self.level2 + (self.platform.bdf(index) & 63) * 64

    def attach(self, index, table=None, number=None):
        number = self.id if number is None else number
        root = TableRoot(self.fmt.name, self.fmt.config, (table or self.table).root_pa)
        if self.fmt.name == "arm_lpae_s1":
            self.put(self.contexts[index], smmu.context_descriptor(root, asid=number))
            self.put(self.ste(index), smmu.ste_stage1(self.contexts[index]))
        else:
            self.put(self.ste(index), smmu.ste_stage2(root, number))

    def map(self, iova, pa, length, prot=3, table=None):
        (table or self.table).map(Extents.of([(iova, iova + length - 1, pa, prot)]))

    def submit(self, *commands):
        """Put commands and a SYNC into the queue; the value of CMDQ_CONS when they are done."""
        size = 1 << self.lg2
        for command in (*commands, smmu.sync()):
            self.put(self.commands + self.prod % size * 16, command)
            self.prod = (self.prod + 1) % (2 * size)
        self.regs.write32(r.CMDQ_PROD, self.prod)
        return self.prod

    def inv(self, *args, number=None):
        """The command by address (or range) of this stage."""
        number = self.id if number is None else number
        return (smmu.tlbi_nh_va if self.fmt.name == "arm_lpae_s1" else smmu.tlbi_s2_ipa)(number, *args)

    @property
    def cons(self):
        return self.regs.read32(r.CMDQ_CONS)

    def event(self, number):
        at = self.events + number % (1 << self.lg2) * 32
        return smmu.decode_event([self.ram.load64(at + 8 * i) for i in range(4)])

    @property
    def recorded(self):
        return self.regs.read32(r.EVENTQ_PROD)


# -- registers -------------------------------------------------------------------------------------------
def test_identification_claims_what_the_model_does(machine):
    read = machine(start=False).regs.read32
    assert read(r.IDR0) & 3 == 3  # both stages
    assert read(r.IDR0) >> 2 & 3 == 2  # AArch64
    for absent in (9, 10, 13, 14, 16, 19):  # HYP, ATS, MSI, SEV, PRI, CD2L
        assert not read(r.IDR0) >> absent & 1
    assert read(r.IDR0) >> 6 & 3 == 0  # HTTU
    assert read(r.IDR0) >> 24 & 3 == 1  # no stalls
    assert read(r.IDR1) & 0x3F == 16
    assert read(r.IDR1) >> 6 & 0x1F == 0  # no substreams
    assert read(r.IDR3) == 1 << 10  # RIL; BBML 0
    assert read(r.IDR5) == 0x75
    assert (read(r.IDR2), read(r.IDR4), read(r.IIDR), read(r.AIDR)) == (0, 0, 0, 1)


def test_enable_bits_guard_registers(machine):
    m = machine()
    assert m.regs.read32(r.CR0) == m.regs.read32(r.CR0ACK) == ENABLED
    assert m.regs.translating
    for offset in (r.STRTAB_BASE, r.CMDQ_BASE, r.EVENTQ_BASE):
        with pytest.raises(ValueError, match="read-only"):
            m.regs.write64(offset, 0)
    for offset in (r.STRTAB_BASE_CFG, r.CMDQ_CONS, r.EVENTQ_PROD):
        with pytest.raises(ValueError, match="read-only"):
            m.regs.write32(offset, 0)
    m.regs.write32(r.CR0, 0)
    assert (m.regs.read32(r.CR0ACK), m.regs.translating) == (0, False)
    m.regs.write64(r.CMDQ_BASE, 0x4000 | 31)
    assert m.regs.read64(r.CMDQ_BASE) == 0x4000 | 19  # no more than IDR1.CMDQS
    m.regs.write32(r.CR1, 2**32 - 1)
    assert m.regs.read32(r.CR1) == 0xFFF


def test_what_is_no_register(machine):
    regs = machine().regs
    for call in (
        lambda: regs.read32(0x2),
        lambda: regs.read32(0x1000),
        lambda: regs.read32(0x11000),
        lambda: regs.read64(r.CMDQ_PROD),
        lambda: regs.write32(r.IDR0, 0),
        lambda: regs.write32(r.GERROR, 0),
        lambda: regs.write32(0xA8, 0),  # the event queue's indexes are on page 1
        lambda: regs.write64(r.CR0, 0),
    ):
        with pytest.raises(ValueError):
            call()


def test_registers_lead_to_the_table_as_a_capture_would_have_them(machine):
    m = machine()
    found = m.regs.found(m.platform.bdf(0))
    assert found.table == TableRoot("arm_lpae_s1", found.table.config, m.table.root_pa)
    assert (found.domain_id, found.translation) == (5, "first-stage")


# -- command queue -----------------------------------------------------------------------------------------
def test_wrap_bit_tells_full_from_empty(machine):
    m = machine(lg2=2)
    done = [m.submit(smmu.cfgi_all()) == m.cons for _ in range(5)]
    assert all(done)
    assert m.cons == 10 % 8
    m.submit(smmu.cfgi_all(), smmu.cfgi_all(), smmu.cfgi_all())  # four at once: a full queue
    assert m.cons == 14 % 8


def test_illegal_command_stops_the_queue(machine):
    m = machine()
    m.submit(smmu.cfgi_all())
    bad = m.prod
    m.submit((0x20, 0), smmu.cfgi_all())  # TLBI_EL2_ALL
    assert m.regs.read32(r.GERROR) & r.GERROR_CMDQ_ERR
    assert m.cons == bad | r.CERROR_ILL << r.CONS_ERR_SHIFT
    m.submit(smmu.cfgi_all())
    assert m.cons & ~r.CONS_ERR == bad  # nothing more until the error is acknowledged
    m.put(m.commands + bad * 16, smmu.sync())  # as arm_smmu_cmdq_skip_err() mends it
    m.regs.write32(r.GERRORN, m.regs.read32(r.GERROR))
    assert m.cons & ~r.CONS_ERR == m.prod
    # The next error toggles GERROR back.
    m.submit((0xFF, 0))
    assert m.regs.read32(r.GERROR) == 0 != m.regs.read32(r.GERRORN)


def test_command_that_is_not_in_memory(machine):
    m = machine(start=False)
    m.regs.write64(r.CMDQ_BASE, 1 << 40 | 4)
    m.regs.write32(r.CR0, r.CR0_CMDQEN)
    m.regs.write32(r.CMDQ_PROD, 1)
    assert m.cons == r.CERROR_ABT << r.CONS_ERR_SHIFT
    m.regs.write32(r.CR0, 0)
    with pytest.raises(ValueError, match="acknowledged"):
        m.regs.write32(r.CR0, r.CR0_CMDQEN)


def test_queue_is_taken_over_at_its_indexes(machine):
    m = machine()
    m.submit(smmu.cfgi_all())
    m.regs.write32(r.CR0, r.CR0_SMMUEN)
    assert m.regs.read32(r.CR0ACK) == r.CR0_SMMUEN
    other = m.pages(1)
    m.regs.write64(r.CMDQ_BASE, other | 4)
    m.regs.write32(r.CMDQ_PROD, 3)
    m.regs.write32(r.CMDQ_CONS, 3)
    m.regs.write32(r.CR0, r.CR0_SMMUEN | r.CR0_CMDQEN)
    m.commands, m.prod = other, 3
    assert m.submit(smmu.tlbi_nsnh_all()) == m.cons == 5


def test_acknowledgement_waits_for_a_front_end(machine):
    m = machine()
    m.map(IOVA, 0x200000, 4096)
    fe = detached(m)
    assert fe.translate(IOVA, True) == (0x200000, 0)
    m.submit(m.inv(IOVA))
    m.regs.write32(r.CR0, r.CR0_SMMUEN)
    assert m.regs.read32(r.CR0ACK) == r.CR0_SMMUEN | r.CR0_CMDQEN
    fe.service()
    assert m.regs.read32(r.CR0ACK) == r.CR0_SMMUEN


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_command_is_neutral_or_refused(machine, w0, w1):
    m = machine()
    for op in smmu.Op:
        item = m.regs.decode((w0 & ~0xFF | op, w1))
        assert (item is None) == (smmu.decode_command((w0 & ~0xFF | op, w1)) is None)
    m.platform.close()


def test_whose_entries_a_command_forgets(machine):
    decode = machine().regs.decode
    first, second = r.STAGE_1 | 2 << 16 | 7, r.STAGE_2 | 2 << 16
    other = r.STAGE_1 | 3 << 16 | 7
    for command, goes in (
        (smmu.tlbi_nh_asid(7, 2), (first,)),
        (smmu.tlbi_nh_va(7, IOVA, 2), (first,)),
        (smmu.tlbi_nh_vaa(IOVA, 2), (first,)),
        (smmu.tlbi_nh_all(2), (first,)),
        (smmu.tlbi_s12_vmall(2), (first, second)),
        (smmu.tlbi_s2_ipa(2, IOVA), (second,)),
        (smmu.tlbi_nsnh_all(), (first, second, other)),
        (smmu.tlbi_nh_asid(8, 2), ()),
    ):
        owners, _, _ = decode(command).tlb
        assert tuple(o for o in (first, second, other) if owners(o)) == goes
    sid, owner = decode(smmu.cfgi_ste_range(0x45, 6)).context
    assert [s for s in (0x3F, 0x40, 0x7F, 0x80) if sid(s)] == [0x40, 0x7F]
    assert owner == ANY
    assert decode(smmu.cfgi_all()).context[0](0xFFFF)
    sid, owner = decode(smmu.cfgi_cd(0x20)).context
    assert (sid, owner(first), owner(second)) == (Match(2**32 - 1, 0x20), True, False)
    assert decode(smmu.cfgi_cd(0x20, 1)).context is None  # no substreams
    assert decode(smmu.sync()) == decode((smmu.Op.PREFETCH_CONFIG, 0))


# -- translation ---------------------------------------------------------------------------------------------
#: granule, input bits, leaf sizes
SHAPES = [
    ("arm_lpae_s1", 4096, 48, (12, 21)),
    ("arm_lpae_s1", 4096, 39, (12, 21)),
    ("arm_lpae_s1", 16384, 47, (14,)),
    ("arm_lpae_s1", 65536, 42, (16,)),
    ("arm_lpae_s2", 4096, 48, (12, 21)),
    ("arm_lpae_s2", 4096, 40, (12, 21)),  # two concatenated roots
    ("arm_lpae_s2", 4096, 44, (12, 21)),  # a root of 32 entries
    ("arm_lpae_s2", 16384, 40, (14,)),
    ("arm_lpae_s2", 65536, 44, (16,)),
]


@pytest.mark.parametrize(("stage", "granule", "input_bits", "sizes"), SHAPES)
def test_translates_and_faults(machine, stage, granule, input_bits, sizes):
    output = {40: 40, 44: 44}.get(input_bits, 48)
    m = machine(stage, granule=granule, input_bits=input_bits, output_bits=output)
    fe = FrontEnd(m.platform, 0)
    top = (1 << input_bits) - (1 << 30)
    for base in (IOVA, top):
        for lg2 in sizes:
            m.map(base + (1 << 25) * (lg2 - 11), 0x400000, 1 << lg2)
            at = base + (1 << 25) * (lg2 - 11) + (1 << lg2) - 8
            assert fe.translate(at, True) == (0x400000 + (1 << lg2) - 8, 0)
            assert fe.translate(at + 8, False) == (None, FaultReason.F_TRANSLATION)
    m.map(IOVA, 0x300000 // granule * granule, granule, prot=1)
    assert fe.translate(IOVA, False) == (0x300000 // granule * granule, 0)
    assert fe.translate(IOVA, True) == (None, FaultReason.F_PERMISSION)
    assert fe.translate(1 << input_bits, False) == (None, FaultReason.F_TRANSLATION)


@pytest.mark.parametrize("stage", STAGES)
def test_contiguous_hint(machine, stage):
    m = machine(stage)
    m.map(IOVA, 0x400000, 16 * 4096)
    for i in range(16):  # the sixteen leaves become one entry
        _, pa, item = walk(m.fmt, m.ram, m.table.root_pa, IOVA + i * 4096).steps[-1]
        m.ram.store64(pa, item | m.fmt.levels[0].contig[0].mask)
    fe = detached(m)
    assert fe.translate(IOVA + 0x5008, True) == (0x405008, 0)
    m.table.unmap(IOVA, IOVA + 16 * 4096 - 1)
    # One entry serves all sixteen pages until any of them is invalidated.
    assert fe.translate(IOVA + 0xF000, True) == (0x40F000, 0)
    m.submit(m.inv(IOVA))
    fe.service()
    assert fe.translate(IOVA + 0xF000, True)[0] is None


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", [4096, 1 << 21])
def test_stale_until_invalidated(machine, stage, size):
    m = machine(stage)
    m.map(IOVA, 0x400000, size)
    fe = detached(m)
    assert fe.translate(IOVA, True)[0] == 0x400000
    m.table.unmap(IOVA, IOVA + size - 1)
    m.map(IOVA, 0x600000, size)
    assert fe.translate(IOVA, True)[0] == 0x400000
    wrong = smmu.tlbi_s2_ipa(m.id, IOVA) if stage == "arm_lpae_s1" else smmu.tlbi_nh_va(m.id, IOVA)
    for command in (m.inv(IOVA, number=m.id + 1), m.inv(IOVA + size), wrong, smmu.cfgi_all()):
        m.submit(command)
        fe.service()
        assert fe.translate(IOVA, True)[0] == 0x400000
    # Any page of a block takes the whole block with it.
    prod = m.submit(m.inv(IOVA + size - 4096))
    assert m.cons != prod
    assert fe.service() == 2
    assert m.cons == prod
    assert fe.translate(IOVA, True)[0] == 0x600000


def test_range_invalidation(machine):
    m = machine()
    m.map(IOVA, 0x400000, 64 * 4096)
    fe = detached(m)

    def cached():
        m.table.unmap(IOVA, IOVA + 64 * 4096 - 1)
        found = [i for i in range(64) if fe.translate(IOVA + i * 4096, False)[0] is not None]
        m.map(IOVA, 0x400000, 64 * 4096)
        return found

    for i in range(64):
        fe.translate(IOVA + i * 4096, True)
    assert cached() == list(range(64))
    ranges = smmu.ranges_of(IOVA + 3 * 4096, IOVA + 44 * 4096 - 1, 4096)
    m.submit(*(m.inv(at) for at in ranges))
    fe.service()
    last = 44 + ((44 - 3) & 31 == 1)
    assert cached() == [*range(3), *range(last, 64)]


@pytest.mark.parametrize("stage", STAGES)
def test_context_is_stale_until_invalidated(machine, stage):
    m = machine(stage, devices=2)
    other = m.new_table()
    m.map(IOVA, 0x400000, 4096)
    m.map(IOVA, 0x600000, 4096, table=other)
    fes = [detached(m, 0), detached(m, 1)]

    def service():
        for fe in fes:
            fe.service()

    assert [fe.translate(IOVA, True)[0] for fe in fes] == [0x400000] * 2
    m.attach(0, other, m.id + 1)
    sid = m.platform.bdf(0)
    m.submit(smmu.tlbi_nsnh_all(), smmu.cfgi_ste(m.platform.bdf(1)))
    service()
    assert [fe.translate(IOVA, True)[0] for fe in fes] == [0x400000] * 2
    if stage == "arm_lpae_s2":  # a context descriptor is none of its business
        m.submit(smmu.cfgi_cd_all(sid))
        service()
        assert fes[0].translate(IOVA, True)[0] == 0x400000
    m.submit(smmu.cfgi_cd(sid) if stage == "arm_lpae_s1" else smmu.cfgi_ste(sid))
    service()
    # The old translations stay under the old id, where nobody looks any more.
    assert [fe.translate(IOVA, True)[0] for fe in fes] == [0x600000, 0x400000]


def test_both_halves(machine):
    m = machine()
    upper = open_format("arm_lpae_s1", {**m.fmt.config, "ttbr": 1})
    table = Table.create(upper, m.ram, lambda n: np.array([m.pages(1) for _ in range(n)], np.uint64), None)
    high = 2**64 - (1 << 30)
    table.map(Extents.of([(high, high + 0xFFF, 0x600000, 3)]))
    m.map(IOVA, 0x400000, 4096)
    roots = (
        TableRoot("arm_lpae_s1", m.fmt.config, m.table.root_pa),
        TableRoot("arm_lpae_s1", upper.config, table.root_pa),
    )
    m.put(m.contexts[0], smmu.context_descriptor(*roots, asid=5))
    fe = FrontEnd(m.platform, 0)
    assert fe.translate(IOVA + 8, True) == (0x400008, 0)
    assert fe.translate(high + 8, True) == (0x600008, 0)
    assert fe.translate(1 << 50, True) == (None, FaultReason.F_TRANSLATION)


# -- events --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stage", STAGES)
def test_events_of_walks(machine, stage):
    m = machine(stage, devices=2)
    second = stage == "arm_lpae_s2"
    m.map(IOVA, 0x400000, 4096, prot=1)
    fe = FrontEnd(m.platform, 1)
    fe.translate(IOVA + 0x8, True)
    fe.translate(IOVA + 0x1008, False)
    assert m.recorded == 2
    assert m.event(0) == smmu.Event(
        code=FaultReason.F_PERMISSION, sid=m.platform.bdf(1), stage2=second, cls=smmu.CLASS_IN,
        iova=IOVA + 0x8, ipa=IOVA if second else 0,
    )  # fmt: skip
    assert m.event(1) == smmu.Event(
        code=FaultReason.F_TRANSLATION, sid=m.platform.bdf(1), stage2=second, cls=smmu.CLASS_IN, read=True,
        iova=IOVA + 0x1008, ipa=IOVA + 0x1000 if second else 0,
    )  # fmt: skip
    m.ram.store64(m.table.root_pa, 1 << 40 | 3)  # a table that is not there
    fe.translate(0x1000, False)
    event = m.event(2)
    expected = smmu.CLASS_IN if second else smmu.CLASS_TT
    assert (event.code, event.cls, event.ipa) == (FaultReason.F_WALK_EABT, expected, 0)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda item: item & ~(1 << 10), FaultReason.F_ACCESS),
        (lambda item: item & ~2, FaultReason.F_TRANSLATION),  # a block at level 3
        (lambda item: item | 1 << 47, FaultReason.F_ADDR_SIZE),  # 44 bits are the output size
        (lambda item: item, FaultReason.F_PERMISSION),
    ],
)
def test_events_say_what_is_wrong_with_the_descriptor(machine, stage, change, reason):
    m = machine(stage, input_bits=44, output_bits=44)
    m.map(IOVA, 0x400000, 4096, prot=1)
    _, pa, item = walk(m.fmt, m.ram, m.table.root_pa, IOVA).steps[-1]
    m.ram.store64(pa, change(item))
    assert FrontEnd(m.platform, 0).translate(IOVA, True)[0] is None
    event = m.event(0)
    assert (event.code, event.iova, event.read) == (reason, IOVA, False)
    # A table that has changed since, or is gone, leaves the outcome of the walk.
    for change_again in (lambda: m.ram.store64(pa, 0), lambda: m.put(m.ste(), smmu.ste_abort())):
        change_again()
        m.regs.record_faults(0, [Fault(int(FaultReason.F_PERMISSION), IOVA, 2, r.STAGE_1)], 0)
        assert m.event(m.recorded - 1).code == FaultReason.F_PERMISSION


@pytest.mark.parametrize(
    ("stage", "offset", "word", "reason"),
    [
        ("arm_lpae_s1", 0, 0, FaultReason.C_BAD_STE),
        ("arm_lpae_s1", 0, 1 << 40 | 0xB, FaultReason.F_CD_FETCH),
        ("arm_lpae_s1", 0, 9, FaultReason.C_BAD_STE),  # bypass
        ("arm_lpae_s1", 8, smmu.S1STALLD, FaultReason.C_BAD_STE),
        ("arm_lpae_s2", 8, smmu.S2FWB, FaultReason.C_BAD_STE),
        ("arm_lpae_s2", 16, 0, FaultReason.C_BAD_STE),
        ("arm_lpae_s1", 4096, 0, FaultReason.C_BAD_CD),
        ("arm_lpae_s1", 4096, smmu.CD_HA, FaultReason.C_BAD_CD),
        ("arm_lpae_s1", 4096, smmu.CD_S, FaultReason.C_BAD_CD),
    ],
)
def test_events_of_configuration(machine, stage, offset, word, reason):
    m = machine(stage)
    at = m.contexts[0] if offset == 4096 else m.ste() + offset
    if word in (smmu.CD_HA, smmu.CD_S, smmu.S1STALLD, smmu.S2FWB):
        word |= m.ram.load64(at)
    m.ram.store64(at, word)
    fe = FrontEnd(m.platform, 0)
    assert fe.translate(IOVA, True) == (None, reason)
    assert m.event(0) == smmu.Event(code=reason, sid=m.platform.bdf(0))
    # Entries that fault are not cached: mended, it works.
    m.attach(0)
    m.map(IOVA, 0x400000, 4096)
    assert fe.translate(IOVA, True) == (0x400000, 0)


def test_what_is_not_recorded(machine):
    m = machine()
    fe = FrontEnd(m.platform, 0)
    m.put(m.ste(), smmu.ste_abort())
    assert fe.translate(IOVA, True) == (None, FaultReason.ABORTED)
    assert m.recorded == 0
    m.attach(0)
    word = m.ram.load64(m.contexts[0])
    m.ram.store64(m.contexts[0], word & ~smmu.CD_R)
    assert fe.translate(IOVA, True) == (None, FaultReason.F_TRANSLATION)
    assert m.recorded == 0
    m.ram.store64(m.streams, 0)
    m.submit(smmu.cfgi_ste(m.platform.bdf(0)))
    m.regs.write32(r.CR2, 0)
    assert fe.translate(IOVA, True) == (None, FaultReason.C_BAD_STREAMID)
    assert m.recorded == 0
    m.regs.write32(r.CR2, r.CR2_RECINVSID)
    assert fe.translate(IOVA, True) == (None, FaultReason.C_BAD_STREAMID)
    assert m.recorded == 1
    assert "C_BAD_STREAMID" in m.regs.fault_text(FaultReason.C_BAD_STREAMID)


def fault(iova):
    return Fault(int(FaultReason.F_TRANSLATION), iova, 1, r.STAGE_1)


def test_event_queue_overflows(machine):
    m = machine(lg2=2)
    m.regs.record_faults(0, [fault(i << 12) for i in range(4)], 0)
    assert m.recorded == 4
    assert not m.platform.front_ends[0, FE_OVERFLOW]
    m.regs.record_faults(0, [fault(0x4000)], 0)
    assert m.recorded == 4 | r.OVERFLOW
    assert m.platform.front_ends[0, FE_OVERFLOW]
    assert [m.event(i).iova for i in range(4)] == [i << 12 for i in range(4)]
    # Unacknowledged, the flag does not toggle again, and events that find room are recorded.
    m.regs.write32(r.EVENTQ_CONS, 1)
    m.regs.record_faults(0, [fault(0x5000), fault(0x6000)], 0)
    assert (m.recorded, m.event(4).iova) == (5 | r.OVERFLOW, 0x5000)
    m.regs.write32(r.EVENTQ_CONS, 5 | r.OVERFLOW)
    m.regs.record_faults(0, [], 2)  # what a front-end could not keep
    assert m.recorded == 5


def test_event_queue_that_is_not_in_memory(machine):
    m = machine(start=False)
    m.regs.write64(r.EVENTQ_BASE, 1 << 40 | 4)
    m.regs.write32(r.CR0, r.CR0_EVENTQEN)
    m.regs.record_faults(0, [fault(0)], 0)
    assert m.regs.read32(r.GERROR) == r.GERROR_EVENTQ_ABT_ERR
    m.regs.record_faults(0, [fault(0)], 0)
    assert (m.regs.read32(r.GERROR), m.recorded) == (r.GERROR_EVENTQ_ABT_ERR, 0)
    m.regs.write32(r.CR0, 0)
    m.regs.record_faults(0, [fault(0)], 1)
    assert m.recorded == 0
