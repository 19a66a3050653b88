# SPDX-License-Identifier: Apache-2.0
"""iokeep's records: encode and decode are inverse, and no damaged byte gets through."""

import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iokeep.errors import InputError, MemoryAbsent
from iokeep.handover.iommu import (
    MODES,
    DeviceRecord,
    DomainRecord,
    HwptRecord,
    IoasRecord,
    IommufdRecord,
    IommuHwRecord,
    IommuRecord,
    VfioRecord,
)
from iokeep.handover.records import (
    HEADER_LENGTH,
    MAX_PAYLOAD,
    Pack,
    Unpack,
    read_record,
    record_bytes,
    record_compatible,
    record_pages,
    write_record,
)

U16, U32, U64 = st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
TEXT = st.text(max_size=12)
WORDS = st.sets(U64, max_size=8).map(lambda s: np.array(sorted(s), np.uint64))


@st.composite
def ioases(draw, index):
    edges = sorted(draw(st.sets(U64, max_size=12)))
    iova, last = np.array(edges[0::2], np.uint64), np.array(edges[1::2], np.uint64)
    n = min(len(iova), len(last))
    iova, last = iova[:n], last[:n]
    offset = np.array(
        [draw(st.integers(0, 2**64 - 1 - int(z - a))) for a, z in zip(iova, last, strict=True)], np.uint64
    )
    token = np.array([draw(U64) for _ in range(n)], np.uint64)
    prot = np.array([draw(st.integers(1, 3)) for _ in range(n)], np.uint8)
    flags = np.array([draw(st.integers(0, 1)) for _ in range(n)], np.uint8)
    return IoasRecord(index, iova, last, token, offset, prot, flags)


@st.composite
def iommufds(draw):
    indices = draw(st.lists(U32, min_size=1, max_size=3, unique=True))
    tokens = draw(st.lists(U64, max_size=3, unique=True))
    hwpts = tuple(HwptRecord(t, draw(U32), draw(st.sampled_from(indices))) for t in tokens)
    return IommufdRecord(hwpts, tuple(draw(ioases(i)) for i in indices))


CONFIG = st.dictionaries(TEXT, st.one_of(st.integers(-(2**63), 2**63), TEXT), max_size=3)


@st.composite
def iommus(draw):
    domains = tuple(
        DomainRecord(
            index,
            draw(TEXT),
            draw(CONFIG),
            tuple(draw(st.lists(TEXT, max_size=3))),
            draw(U64),
            draw(U32),
            draw(st.integers(0, 15)),
            draw(WORDS),
            draw(st.binary(min_size=32, max_size=32)),
            draw(st.binary(min_size=16, max_size=16)),
            draw(U64),
            draw(U64),
        )
        for index in draw(st.lists(U32, min_size=1, max_size=3, unique=True))
    )
    where = draw(st.lists(st.tuples(U16, U16), max_size=3, unique=True))
    devices = tuple(
        DeviceRecord(n, draw(U64), s, b, draw(st.sampled_from(domains)).index, draw(st.sampled_from(MODES)))
        for n, (s, b) in enumerate(where)
    )
    hw = st.builds(IommuHwRecord, U64, U64, st.sampled_from(MODES), U32, WORDS)
    return IommuRecord(domains, devices, tuple(draw(st.lists(hw, max_size=2))))


VFIOS = st.builds(VfioRecord, U16, U16, U32, U64)


@given(st.one_of(iommufds(), iommus(), VFIOS))
def test_decode_of_encode_is_identity(new_box, record):
    assert type(record).from_bytes(record.to_bytes()) == record
    box = new_box()
    assert type(record).read(box, record.write(box, box.alloc)) == record
    # one run of preserved frames
    (run,) = box.preserved
    assert run[1] == -(-(HEADER_LENGTH + len(record.to_bytes())) // 4096)


EXAMPLES = [
    IommufdRecord(
        (HwptRecord(5, 0, 1),),
        (
            IoasRecord(
                1,
                np.array([0, 1 << 20], np.uint64),
                np.array([0xFFFFF, 2**64 - 1], np.uint64),
                np.array([1, 2], np.uint64),
                np.array([0, 0], np.uint64),
                np.array([3, 1], np.uint8),
                np.array([0, 1], np.uint8),
            ),
        ),
    ),
    IommuRecord(
        (
            DomainRecord(
                0,
                "vtdss",
                {"levels": 4},
                ("contig",),
                0x1000,
                2,
                3,
                np.array([0x1000, 0x2000], np.uint64),
                bytes(range(32)),
                bytes(16),
                1 << 30,
                2,
            ),
        ),
        (DeviceRecord(0, 9, 0, 0x20, 0, "legacy"),),
        (IommuHwRecord(0xFED90000, 0x41C000, "legacy", 0x10, np.array([0x41C000], np.uint64)),),
    ),
    VfioRecord(0, 0x20, 0, 7),
]
IDS = [type(e).__name__ for e in EXAMPLES]


@pytest.mark.parametrize("record", EXAMPLES, ids=IDS)
def test_every_single_byte_mutation_is_refused(box, record):
    pa = record.write(box, box.alloc)
    good = box.read(pa, HEADER_LENGTH + len(record.to_bytes()))
    for at in range(len(good)):
        for flip in (0x01, 0x80, 0xFF):
            box.write(pa + at, bytes([good[at] ^ flip]))
            with pytest.raises(InputError):
                type(record).read(box, pa)
            box.write(pa + at, good[at : at + 1])
    assert type(record).read(box, pa) == record


@pytest.mark.parametrize("record", EXAMPLES, ids=IDS)
def test_truncated_payloads_are_refused(record):
    payload = record.to_bytes()
    for cut in range(len(payload)):
        with pytest.raises(InputError):
            type(record).from_bytes(payload[:cut])
    with pytest.raises(InputError, match="after the last field"):
        type(record).from_bytes(payload + bytes(8))


@given(st.sampled_from(EXAMPLES), st.lists(st.tuples(st.integers(0, 2000), U64), min_size=1, max_size=4))
def test_a_forged_payload_is_decoded_or_refused(record, changes):
    # as if the digest were right: whatever comes, only InputError, and no count is believed
    payload = bytearray(record.to_bytes())
    for at, value in changes:
        at = at % len(payload) & ~7
        payload[at : at + 8] = value.to_bytes(8, "little")
    try:
        got = type(record).from_bytes(bytes(payload))
    except InputError:
        return
    assert type(record).from_bytes(got.to_bytes()) == got


def forged(record, word, value):
    payload = bytearray(record.to_bytes())
    payload[8 * word : 8 * word + 8] = value.to_bytes(8, "little")
    return bytes(payload)


@pytest.mark.parametrize(
    ("record", "word", "value", "why"),
    [
        (0, 0, 10**9, "hwpts 1000000000 cannot fit"),
        (0, 0, 2**64 - 1, "cannot fit"),
        (0, 2, 2**32, "domain_index 0x100000000 is more"),
        (0, 3, 2, "refers to IOAS 2"),
        (0, 6, 2**61, "iova 2305843009213693952 cannot fit"),
        (0, 7, 1 << 21, "an area ends before|overlap"),
        (0, 8, 1, "overlap"),
        (0, 17, 1 << 63, "beyond 2..64 in its file"),
        (0, 19, 0x0400, "prot"),
        (0, 19, 0x010303, "padding is not zero"),
        (0, 21, 0x0201, "unknown flag"),
        (1, 0, 3, "domains 3 cannot fit"),
        (1, 2, 2**40, "text length"),
        (1, 3, 0xFF, "not UTF-8"),
        (1, 5, int.from_bytes(b"[" * 8, "little"), "not JSON"),
        (1, 12, 16, "top_level 0x10"),
        (1, 14, 0x2000, "table_pages are not increasing"),
        (1, 30, 0, "mode 0"),
        (1, 30, 99, "mode 0x63"),
        (2, 0, 1 << 16, "segment"),
        (2, 1, 1 << 16, "bdf"),
        (2, 2, 1 << 32, "device_index"),
    ],
)
def test_each_rule_names_itself(record, word, value, why):
    example = EXAMPLES[record]
    with pytest.raises(InputError, match=why) as error:
        type(example).from_bytes(forged(example, word, value))
    assert example.COMPATIBLE in str(error.value)
    assert "byte 0x" in str(error.value)


def test_config_must_be_an_object_of_numbers_and_texts():
    for config in ("[]", '{"a": 1.5}', '{"a": true}', '{"a": null}', "[" * 50000):
        d = EXAMPLES[1].domains[0]
        out = Pack()
        out.u64(1, d.index)
        out.text(d.format)
        out.text(config)
        out.u64(*[0] * 20)
        with pytest.raises(InputError, match="config"):
            IommuRecord.from_bytes(out.payload())
    assert json.loads("{}") == {}


def test_references_and_duplicates_are_refused():
    one = EXAMPLES[0]
    twice = IommufdRecord((one.hwpts[0], one.hwpts[0]), one.ioases)
    with pytest.raises(InputError, match="same token"):
        IommufdRecord.from_bytes(twice.to_bytes())
    with pytest.raises(InputError, match="IOASes have the same index"):
        IommufdRecord.from_bytes(IommufdRecord((), one.ioases * 2).to_bytes())
    iommu = EXAMPLES[1]
    with pytest.raises(InputError, match="domains have the same index"):
        IommuRecord.from_bytes(IommuRecord(iommu.domains * 2, (), ()).to_bytes())
    with pytest.raises(InputError, match="refers to domain 0, which is not there"):
        IommuRecord.from_bytes(IommuRecord((), iommu.devices, ()).to_bytes())
    with pytest.raises(InputError, match="devices have the same"):
        IommuRecord.from_bytes(IommuRecord(iommu.domains, iommu.devices * 2, ()).to_bytes())


def test_the_writer_checks_too():
    bad = IoasRecord(
        0, *(np.array([x], np.uint64) for x in (5, 4, 0, 0)), np.array([3], np.uint8), np.array([0], np.uint8)
    )
    with pytest.raises(ValueError, match="ends before"):
        IommufdRecord((), (bad,)).to_bytes()
    with pytest.raises(ValueError, match="unsigned 64-bit"):
        VfioRecord(0, 0, 0, -1).to_bytes()
    with pytest.raises(ValueError, match="mode 'sva'"):
        IommuRecord((), (DeviceRecord(0, 0, 0, 0, 0, "sva"),), ()).to_bytes()


def test_page_lists_are_sorted_by_the_writer():
    hw = IommuHwRecord(0, 0, "scalable", 0, np.array([9, 3, 9], np.uint64))
    (got,) = IommuRecord.from_bytes(IommuRecord((), (), (hw,)).to_bytes()).iommus
    assert got.structure_pages.tolist() == [3, 9]


# -- the container --------------------------------------------------------------------------------------


def test_another_version_is_refused_by_name(box):
    pa = write_record(box, box.alloc, "iokeep-iommu-v2", b"whatever")
    with pytest.raises(InputError, match=r"version 'iokeep-iommu-v2'; supported: iokeep-iommu-v1") as error:
        IommuRecord.read(box, pa)
    assert error.value.exit_code == 3
    assert read_record(box, pa, ("iokeep-iommu-v1", "iokeep-iommu-v2")) == b"whatever"
    assert record_compatible(box, pa) == "iokeep-iommu-v2"


@pytest.mark.parametrize(
    ("at", "data", "why"),
    [
        (0, b"\0", "not a zero-padded name"),
        (47, b"x", "not a zero-padded name"),
        (0, b"\xff", "not a zero-padded name"),
        (0, b"\x1b", "not a zero-padded name"),
        (48, (MAX_PAYLOAD + 1).to_bytes(8, "little"), "length"),
        (48, b"\x09", "digest"),
        (56, b"\x61", "header_length 0x61"),
        (64, b"\xff", "digest"),
        (96, b"\xff", "digest"),
    ],
)
def test_the_container_says_what_is_wrong(box, at, data, why):
    pa = write_record(box, box.alloc, "iokeep-x-v1", b"12345678")
    box.write(pa + at, data)
    with pytest.raises(InputError, match=why) as error:
        read_record(box, pa, "iokeep-x-v1")
    assert f"{pa:#x}" in str(error.value)


def test_records_longer_than_a_page_are_contiguous(box):
    payload = bytes(range(256)) * 100
    pa = write_record(box, box.alloc, "iokeep-x-v1", payload)
    assert box.preserved == [(pa >> 12, 7)]
    assert record_pages(box, pa) == 7
    assert read_record(box, pa, "iokeep-x-v1") == payload
    del box.pages[pa + 3 * 4096]
    with pytest.raises(MemoryAbsent) as error:
        read_record(box, pa, "iokeep-x-v1")
    assert error.value.pa == pa + 3 * 4096


def test_a_claimed_length_costs_no_memory(box):
    pa = write_record(box, box.alloc, "iokeep-x-v1", b"")
    box.put64(pa + 48, MAX_PAYLOAD)
    with pytest.raises(MemoryAbsent):
        read_record(box, pa, "iokeep-x-v1")


@pytest.mark.parametrize("name", ["", "x" * 48, "a\0b"])
def test_names_that_do_not_fit(name):
    with pytest.raises(ValueError, match=r"1 \.\.\. 47 bytes"):
        record_bytes(name, b"")


def test_a_record_starts_at_a_page(box):
    for pa in (0, 0x1008):
        with pytest.raises(InputError, match="not the start of a page"):
            read_record(box, pa, "x")


def test_golden_bytes():
    # version 1 for ever: a change of these bytes needs a new version string
    data = record_bytes(VfioRecord.COMPATIBLE, VfioRecord(1, 0x20, 3, 7).to_bytes())
    assert data[:64] == b"iokeep-vfio-pci-v1" + bytes(30) + struct.pack("<QQ", 32, 96)
    assert data[96:] == struct.pack("<QQQQ", 1, 0x20, 3, 7)
    assert EXAMPLES[0].to_bytes() == struct.pack(
        "<4Q 2Q 3Q 3Q 3Q 3Q QQ QQ",
        *(1, 5, 0, 1),
        *(1, 1),
        *(2, 0, 1 << 20),
        *(2, 0xFFFFF, 2**64 - 1),
        *(2, 1, 2),
        *(2, 0, 0),
        *(2, 0x0103),
        *(2, 0x0100),
    )


def test_a_hundred_thousand_areas(box):
    n = 100_000
    iova = np.arange(n, dtype=np.uint64) << np.uint64(16)
    ioas = IoasRecord(
        0,
        iova,
        iova + np.uint64(0xFFF),
        np.ones(n, np.uint64),
        iova,
        np.full(n, 3, np.uint8),
        np.zeros(n, np.uint8),
    )
    record = IommufdRecord((), (ioas,))
    assert IommufdRecord.read(box, record.write(box, box.alloc)) == record


def test_items_are_bounded_and_padded():
    out = Pack()
    out.raw(b"abc", 3)
    assert out.payload() == b"abc" + bytes(5)
    with pytest.raises(ValueError, match="2 bytes where 3 belong"):
        out.raw(b"ab", 3)
    with pytest.raises(ValueError, match="text of"):
        out.text("x" * 70000)
    with pytest.raises(InputError, match="8 bytes wanted, 0 left"):
        Unpack(b"", "it").u64()
