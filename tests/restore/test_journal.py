# SPDX-License-Identifier: Apache-2.0
"""The journal outlives its writer: entries come back, a torn tail is no entry, damage is refused."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iokeep.errors import InputError, UsageError
from iokeep.restore.journal import Journal, Kind

KEY = b"k" * 32


class File:
    def __init__(self, slots=8):
        self.raw = bytearray(4096 + max(slots * 64, 64))
        struct.pack_into("<QQ", self.raw, 0, 0, 2**64 - 1)
        self.slots = slots

    def read(self, length, offset):
        return bytes(self.raw[offset : offset + length])

    def write(self, data, offset):
        self.raw[offset : offset + len(data)] = data

    def open(self, key=KEY):
        return Journal(self.read, self.write, 0, self.slots, key)


def test_entries_come_back():
    f = File()
    j = f.open()
    j.add(Kind.BEGIN, 1)
    e = j.add(Kind.IOAS, 5, 0)
    j.undone(e)
    assert f.open().entries == j.entries
    assert [x.kind for x in f.open().live()] == []


def test_a_torn_write_leaves_no_entry():
    f = File()
    j = f.open()
    j.add(Kind.BEGIN, 1)
    head = bytes(f.raw[:16])
    j.add(Kind.IOAS, 5, 0)
    f.raw[:16] = head  # the writer died before the count
    assert [e.kind for e in f.open().entries] == [Kind.BEGIN]


def test_every_byte_of_what_is_counted_matters():
    f = File()
    j = f.open()
    j.add(Kind.BEGIN, 1)
    j.add(Kind.ADOPTED, 5, 6, 7)
    good = bytes(f.raw)
    for at in [*range(16), *range(4096, 4096 + 128)]:
        f.raw[:] = good
        f.raw[at] ^= 0x41
        with pytest.raises(InputError):
            f.open()


def test_the_journal_of_another_manifest_is_refused():
    f = File()
    f.open().add(Kind.BEGIN)
    with pytest.raises(InputError, match="entry 0"):
        f.open(b"other")


def test_a_full_journal_says_so():
    f = File(slots=2)
    j = f.open()
    j.add(Kind.BEGIN)
    j.add(Kind.IOAS)
    with pytest.raises(UsageError, match="all 2 slots"):
        j.add(Kind.IOAS)


def test_open_intents_are_found():
    f = File()
    j = f.open()
    j.add(Kind.INTENT_IOAS, 0)
    j.add(Kind.IOAS, 9, 0)
    j.add(Kind.INTENT_HWPT, 7)
    assert [(e.kind, e.a) for e in f.open().open_intents()] == [(Kind.INTENT_HWPT, 7)]
    j.add(Kind.HWPT, 3, 7)
    j.add(Kind.INTENT_ADOPT, 9, 7)
    assert [e.kind for e in j.open_intents()] == [Kind.INTENT_ADOPT]
    j.add(Kind.ADOPTED, 3, 7, 9)
    assert not j.open_intents()


@given(st.binary(max_size=300))
def test_noise_never_breaks_it(noise):
    f = File()
    f.raw[: len(noise)] = noise
    try:
        f.open()
    except InputError:
        return
    assert f.raw[:16] == struct.pack("<QQ", 0, 2**64 - 1)
