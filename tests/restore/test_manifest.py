# SPDX-License-Identifier: Apache-2.0
"""The manifest: what goes in comes out, and no damaged byte is believed."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iokeep.errors import InputError, UsageError
from iokeep.restore.manifest import (
    HEADER_BYTES,
    Area,
    DeviceEntry,
    FileEntry,
    HwptEntry,
    Manifest,
    file_bytes,
    header_of,
    read_payload,
)

SMALL = Manifest(
    iommufd=0x10,
    files=(FileEntry(1, 0x40_0000, "ram"), FileEntry(2, 0x1000, "rom")),
    hwpts=(HwptEntry(7),),
    devices=(DeviceEntry(0x20, 7, "/dev/vfio/devices/vfio0"),),
    areas=(Area(0, 0x1F_FFFF, 1, 0, 3), Area(0x1_0000_0000, 0x1_0000_0FFF, 2, 0, 1)),
    note=b"{}",
)


def load(raw: bytes) -> Manifest:
    return read_payload(raw, header_of(raw, len(raw)))


@st.composite
def manifests(draw):
    files = draw(st.lists(st.integers(1, 64), min_size=1, max_size=4))
    entries = tuple(FileEntry(i + 1, n * 4096, draw(st.text("aé-", max_size=8))) for i, n in enumerate(files))
    areas, at = [], 0
    for _ in range(draw(st.integers(0, 8))):
        f = draw(st.integers(0, len(files) - 1))
        pages = draw(st.integers(1, files[f]))
        offset = draw(st.integers(0, files[f] - pages))
        at += draw(st.integers(0, 2**20))
        areas.append(
            Area(at * 4096, (at + pages) * 4096 - 1, f + 1, offset * 4096, draw(st.sampled_from([1, 2, 3])))
        )
        at += pages
    hwpts = tuple(
        HwptEntry(t, 0, draw(st.sampled_from([b"", bytes(range(48))])))
        for t in draw(st.sets(st.integers(0, 2**64 - 1), max_size=3))
    )
    devices = tuple(DeviceEntry(100 + i, h.token, f"vfio{i}") for i, h in enumerate(hwpts))
    return Manifest(99, entries, hwpts, devices, tuple(areas), 1, draw(st.binary(max_size=50)))


@given(manifests())
def test_what_goes_in_comes_out(m):
    assert load(file_bytes(m)) == m


def test_every_single_byte_matters():
    raw = file_bytes(SMALL, slots=1)
    front = struct.unpack_from("<Q", raw, 40)[0]
    for at in range(front):
        for change in (1, 0x80, 0xFF):
            bad = bytearray(raw)
            bad[at] ^= change
            with pytest.raises(InputError):
                load(bytes(bad))


@given(st.binary(max_size=400))
def test_noise_is_refused(noise):
    with pytest.raises(InputError):
        load(noise)


@given(st.binary(max_size=300))
@settings(max_examples=50)
def test_a_noise_payload_with_good_lengths_is_refused_or_valid(noise):
    try:
        m = Manifest.from_bytes(noise)
    except InputError:
        return
    assert not m.problems()


def test_huge_counts_are_refused_before_anything_is_allocated():
    payload = bytearray(SMALL.to_bytes())
    struct.pack_into("<Q", payload, 24, 2**60)
    with pytest.raises(InputError, match=r"claims 1152921504606846976 areas"):
        Manifest.from_bytes(bytes(payload))


def test_another_version_is_named():
    raw = bytearray(file_bytes(SMALL))
    raw[:24] = b"iokeep-manifest-v3".ljust(24, b"\0")
    with pytest.raises(InputError, match=r"'iokeep-manifest-v3'.*reads 'iokeep-manifest-v2'"):
        load(bytes(raw))


def test_a_cut_file_is_refused():
    raw = file_bytes(SMALL)
    for length in (0, 10, HEADER_BYTES, HEADER_BYTES + 5, 4096):
        with pytest.raises(InputError):
            load(raw[:length])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"areas": (Area(0, 0xFFF, 9, 0, 3),)}, "file token 0x9"),
        ({"areas": (Area(0, 0x40_0FFF, 1, 0, 3),)}, "ends behind file token 0x1"),
        ({"areas": (Area(0, 0x1FFF, 1, 0, 3), Area(0x1000, 0x1FFF, 1, 0, 3))}, "overlaps"),
        ({"areas": (Area(1, 0x1000, 1, 0, 3),)}, "4 KiB pages"),
        ({"areas": (Area(0, 0xFFF, 1, 0, 0),)}, "prot 0x0"),
        ({"areas": (Area(0, 0xFFF, 1, 0, 3, 4),)}, "IOAS 4 of 1"),
        ({"iommufd": 1}, "used twice"),
        ({"devices": (DeviceEntry(0x20, 8, "x"),)}, "HWPT token 0x8"),
        ({"hwpts": (HwptEntry(7), HwptEntry(7))}, "same token"),
        ({"hwpts": (HwptEntry(7, 0, b"short"),)}, "seal is not 48 bytes"),
        ({"files": (FileEntry(1, 0x40_0000, "x" * 65), FileEntry(2, 0x1000, ""))}, "longer than 64"),
    ],
)
def test_an_impossible_set_up_is_named_before_it_is_written(change, text):
    fields = {
        k: getattr(SMALL, k) for k in ("iommufd", "files", "hwpts", "devices", "areas", "ioases", "note")
    }
    with pytest.raises(UsageError, match=text):
        file_bytes(Manifest(**{**fields, **change}))
