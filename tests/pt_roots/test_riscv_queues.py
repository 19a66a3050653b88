# SPDX-License-Identifier: Apache-2.0
"""RISC-V commands and fault records: constants as Linux has them, what is illegal, encode and decode."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from iokeep.pt.roots import riscv
from iokeep.pt.roots.riscv import Decoded, FaultReason, FaultRecord, Kind, Registers, Ttyp

#: 3-level directory, all process directory modes, wired interrupts
REGS = Registers(riscv.ddtp_value(0x1000, 3), 7 << 38, riscv.FCTL_WSI)

PSCID, GSCID = st.integers(0, 2**20 - 1), st.integers(0, 2**16 - 1)
PAGE = st.integers(0, 2**52 - 1).map(lambda n: n << 12)
WORD = st.integers(0, 2**64 - 1)


@pytest.mark.parametrize(
    ("command", "low", "high"),
    [
        # drivers/iommu/riscv/iommu-bits.h: OPCODE [6:0], FUNC [9:7], AV 10, PSCID [31:12], PSCV 32, GV 33,
        # GSCID [59:44], second word: IOVA >> 12 in [61:10]
        (riscv.iotinval_vma(), 0x1, 0),
        (riscv.iotinval_vma(pscid=0xABCDE), 0x1_ABCDE_001, 0),
        (riscv.iotinval_vma(pscid=1, iova=0x12345000), 0x1_00001_401, 0x12345 << 10),
        (riscv.iotinval_vma(pscid=2, gscid=0xFACE), 0xFACE << 44 | 0x3_00002_001, 0),
        (riscv.iotinval_vma(iova=0xFFFF_FFFF_FFFF_F000), 0x401, 0x3FFF_FFFF_FFFF_FC00),
        (riscv.iotinval_gvma(), 0x81, 0),
        (riscv.iotinval_gvma(gscid=7), 7 << 44 | 0x2_0000_0081, 0),
        (riscv.iotinval_gvma(gscid=7, iova=0x3000), 7 << 44 | 0x2_0000_0481, 3 << 10),
        # AV 10, WSI 11, PR 12, PW 13, DATA [63:32], second word: pa >> 2
        (riscv.iofence_c(), 0x3002, 0),
        (riscv.iofence_c(reads=False, writes=False, wsi=True), 0x802, 0),
        (riscv.iofence_c((0x8765_4320, 0xDEADBEEF)), 0xDEADBEEF << 32 | 0x3402, 0x8765_4320 >> 2),
        # PID [31:12], DV 33, DID [63:40]
        (riscv.iodir_inval_ddt(), 0x3, 0),
        (riscv.iodir_inval_ddt(0x18), 0x18 << 40 | 0x2_0000_0003, 0),
        (riscv.iodir_inval_pdt(0xABCDEF, 0x12345), 0xABCDEF << 40 | 0x2_12345_083, 0),
    ],
)
def test_commands_are_as_linux_has_them(command, low, high):
    assert command == (low, high)
    assert riscv.decode_command(command, REGS) is not None


@given(st.none() | PAGE, st.none() | PSCID, st.none() | GSCID)
def test_iotinval(iova, pscid, gscid):
    operands = {"iova": iova, "gscid": gscid}
    vma = riscv.iotinval_vma(pscid=pscid, **operands)
    assert riscv.decode_command(vma, REGS) == Decoded(kind=Kind.VMA, pscid=pscid, **operands)
    if iova is None or gscid is not None:
        gvma = riscv.iotinval_gvma(**operands)
        assert riscv.decode_command(gvma, REGS) == Decoded(kind=Kind.GVMA, **operands)
        assert riscv.decode_command((gvma[0] | 1 << 32, gvma[1]), REGS) is None  # PSCV


@given(
    st.none() | st.tuples(st.integers(0, 2**62 - 1).map(lambda n: n << 2), st.integers(0, 2**32 - 1)),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_iofence(status, wsi, reads, writes):
    words = riscv.iofence_c(status, wsi=wsi, reads=reads, writes=writes)
    want = Decoded(kind=Kind.FENCE, status=status, wsi=wsi, reads=reads, writes=writes)
    assert riscv.decode_command(words, REGS) == want
    by_message = Registers(REGS.ddtp, REGS.caps, 0)
    assert (riscv.decode_command(words, by_message) is None) == wsi


@given(st.none() | st.integers(0, 2**24 - 1), st.integers(0, 2**20 - 1), st.integers(0, 4), st.booleans())
def test_iodir(device_id, pid, mode, extended):
    caps = 1 << 38 | (riscv.CAP_MSI_FLAT if extended else 0)  # PD8
    regs = Registers(mode, caps)
    room = {2: 6, 3: 15} if extended else {2: 7, 3: 16}
    wide = device_id is not None and device_id >> room.get(mode, 24) != 0
    want = None if wide else Decoded(kind=Kind.DDT, device_id=device_id)
    ddt = riscv.iodir_inval_ddt(device_id)
    assert riscv.decode_command(ddt, regs) == want
    assert riscv.decode_command((ddt[0] | 1 << 12, 0), regs) is None  # PID is reserved
    if device_id is not None:
        got = riscv.decode_command(riscv.iodir_inval_pdt(device_id, pid), regs)
        fine = not wide and pid < 256
        assert got == (Decoded(kind=Kind.PDT, device_id=device_id, process_id=pid) if fine else None)
    assert riscv.decode_command((0x83, 0), regs) is None  # INVAL_PDT without DV


@pytest.mark.parametrize(
    ("command", "reserved", "reserved_high"),
    [
        (riscv.iotinval_vma(), [11, *range(34, 44), *range(60, 64)], [*range(10), 62, 63]),
        (riscv.iotinval_gvma(), [11, *range(34, 44), *range(60, 64)], [*range(10), 62, 63]),
        (riscv.iofence_c(), range(14, 32), [62, 63]),
        (riscv.iodir_inval_ddt(1), [10, 11, 32, *range(34, 40)], range(64)),
        (riscv.iodir_inval_pdt(1, 1), [10, 11, 32, *range(34, 40)], range(64)),
    ],
)
def test_reserved_bits_are_illegal(command, reserved, reserved_high):
    assert riscv.decode_command(command, REGS) is not None
    for bit in reserved:
        assert riscv.decode_command((command[0] | 1 << bit, command[1]), REGS) is None, bit
    for bit in reserved_high:
        assert riscv.decode_command((command[0], command[1] | 1 << bit), REGS) is None, bit


@given(WORD, WORD)
@example(4, 0)  # ATS.INVAL, which no capability here has
@example(2 | 1 << 7, 0)
@example(0, 0)
def test_any_words(low, high):
    """What decodes is exactly what the encoders can say, but for the operands that are not valid."""
    got = riscv.decode_command((low, high), REGS)
    if got is None:
        return
    encoders = {
        Kind.VMA: lambda c: riscv.iotinval_vma(iova=c.iova, pscid=c.pscid, gscid=c.gscid),
        Kind.GVMA: lambda c: riscv.iotinval_gvma(iova=c.iova if c.gscid is not None else None, gscid=c.gscid),
        Kind.FENCE: lambda c: riscv.iofence_c(c.status, wsi=c.wsi, reads=c.reads, writes=c.writes),
        Kind.DDT: lambda c: riscv.iodir_inval_ddt(c.device_id),
        Kind.PDT: lambda c: riscv.iodir_inval_pdt(c.device_id, c.process_id),
    }
    again = encoders[got.kind](got)
    assert again[0] & 0x3FF == low & 0x3FF
    assert again[0] & ~low == 0
    assert again[1] & ~high == 0


RECORDS = st.builds(
    FaultRecord,
    cause=st.integers(0, 4095),
    ttyp=st.integers(0, 63),
    device_id=st.integers(0, 2**24 - 1),
    iotval=WORD,
    iotval2=WORD,
)


@given(RECORDS, st.none() | st.integers(0, 2**20 - 1), st.booleans())
def test_fault_records(record, pid, privileged):
    fields = ("cause", "ttyp", "device_id", "iotval", "iotval2")
    record = FaultRecord(
        **{name: getattr(record, name) for name in fields},
        process_id=pid,
        privileged=privileged and pid is not None,
    )
    words = record.words()
    # CAUSE [11:0], PID [31:12], PV 32, PRIV 33, TTYP [39:34], DID [63:40]; 0; iotval; iotval2
    head = record.cause | record.ttyp << 34 | record.device_id << 40
    if pid is not None:
        head |= pid << 12 | 1 << 32 | record.privileged << 33
    assert words == (head, 0, record.iotval, record.iotval2)
    assert riscv.decode_fault(words) == record


def test_fault_record_of_a_blocked_write():
    record = FaultRecord(cause=FaultReason.DDT_INVALID, ttyp=Ttyp.WRITE, device_id=0x20, iotval=0x1234)
    assert record.words() == (0x200C_0000_0102, 0, 0x1234, 0)


def test_encoders_refuse_what_does_not_fit():
    for call in (
        lambda: riscv.iotinval_vma(iova=0x1001),
        lambda: riscv.iotinval_vma(pscid=1 << 20),
        lambda: riscv.iotinval_gvma(gscid=1 << 16),
        lambda: riscv.iotinval_gvma(iova=0x1000),
        lambda: riscv.iofence_c((2, 0)),
        lambda: riscv.iofence_c((0, 1 << 32)),
        lambda: riscv.iodir_inval_ddt(1 << 24),
        lambda: riscv.iodir_inval_pdt(0, 1 << 20),
        lambda: FaultRecord(cause=4096, ttyp=0, device_id=0).words(),
        lambda: FaultRecord(cause=0, ttyp=64, device_id=0).words(),
        lambda: FaultRecord(cause=0, ttyp=0, device_id=0, privileged=True).words(),
    ):
        with pytest.raises(ValueError):
            call()
