# SPDX-License-Identifier: Apache-2.0
"""Formats as data: every bit has exactly one meaning, and the kernel's very bits come out."""

import numpy as np
import pytest

from iokeep.errors import InputError
from iokeep.pt.formats.base import COLUMNS
from iokeep.pt.registry import FORMATS, open_format

CONFIGS = [
    (name, {"levels": levels, "output_bits": bits, "max_leaf_lg2": leaf})
    for name, counts in (("vtdss", (3, 4, 5)), ("x86_64", (4, 5)))
    for levels in counts
    for bits in (39, 46, 52)
    for leaf in (12, 21, 30)
]
ALL = (1 << 64) - 1


def _one_meaning(masks):
    seen = 0
    for mask in masks:
        assert seen & mask == 0, hex(seen & mask)
        seen |= mask
    assert seen == ALL, hex(ALL ^ seen)


@pytest.mark.parametrize(("name", "config"), CONFIGS)
def test_every_bit_has_one_meaning(name, config):
    fmt = open_format(name, config)
    for level in fmt.levels:
        if level.leaf:
            perm = level.valid_mask | level.r_mask | level.w_mask
            _one_meaning(
                (
                    perm,
                    level.leaf_mask,
                    level.leaf_pa_mask,
                    level.leaf_attrs,
                    level.leaf_ignored,
                    level.leaf_reserved,
                )
            )
        if level.table:
            perm = level.valid_mask | level.tr_mask | level.tw_mask
            _one_meaning(
                (
                    perm,
                    level.leaf_mask,
                    level.table_pa_mask,
                    level.table_attrs,
                    level.table_ignored,
                    level.table_reserved,
                )
            )


@pytest.mark.parametrize(("name", "config"), CONFIGS)
def test_what_the_kernel_writes_is_valid_in_the_format(name, config):
    fmt = open_format(name, config)
    for number, level in enumerate(fmt.levels):
        if level.leaf:
            for prot in (1, 2, 3):
                item = int(fmt.leaf_items(number, np.zeros(1, np.uint64), np.array([prot], np.uint8))[0])
                assert item & level.valid_mask
                assert item & level.leaf_mask == level.leaf_value
                assert item & level.leaf_reserved == 0
                assert item & level.leaf_attrs == level.leaf_attrs_value
                found = (item & level.r_mask == level.r_value) | (item & level.w_mask == level.w_value) << 1
                assert found == (prot if fmt.write_only or prot == 1 else 3)
        if level.table:
            item = int(fmt.table_items(number, np.array([0x1000], np.uint64))[0])
            assert item & level.table_pa_mask == 0x1000
            assert item & level.table_reserved == 0
            assert not level.leaf or item & level.leaf_mask != level.leaf_value
            assert item & level.tr_mask == level.tr_value
            assert item & level.tw_mask == level.tw_value


def test_bits_seen_in_real_kernels():
    pa, prot = np.array([0x200000] * 3, np.uint64), np.array([1, 2, 3], np.uint8)
    ss = open_format("vtdss", {})
    assert [hex(v) for v in ss.leaf_items(0, pa, prot).tolist()] == ["0x200001", "0x200002", "0x200003"]
    assert [hex(v) for v in ss.leaf_items(1, pa, prot).tolist()] == ["0x200081", "0x200082", "0x200083"]
    assert hex(int(ss.table_items(1, pa[:1])[0])) == "0x200403"
    fs = open_format("x86_64", {})
    assert [hex(v) for v in fs.leaf_items(0, pa, prot).tolist()] == ["0x200025", "0x200067", "0x200067"]
    assert hex(int(fs.leaf_items(1, pa, prot)[2])) == "0x2000e7"
    assert hex(int(fs.table_items(3, pa[:1])[0])) == "0x200227"


def test_words_are_the_masks():
    fmt = open_format("vtdss", {"levels": 3})
    words = fmt.words()
    assert words.shape == (3, len(COLUMNS))
    assert words.dtype == np.uint64
    assert int(words[2, COLUMNS.index("leaf_pa_mask")]) == fmt.levels[2].leaf_pa_mask
    assert int(words[1, COLUMNS.index("index_mask")]) == 511
    assert [int(v) for v in words[:, COLUMNS.index("may_table")]] == [0, 1, 1]


@pytest.mark.parametrize(
    "config",
    [
        {"levels": 7},
        {"levels": "4"},
        {"levels": True},
        {"levels": None},
        {"nonsense": 1},
        {"output_bits": 57},
        {"levels": 4.0},
    ],
)
def test_configurations_that_no_hardware_has(config):
    for name in FORMATS:
        with pytest.raises(InputError):
            open_format(name, config)


def test_formats_that_are_not_built_are_named():
    with pytest.raises(InputError, match="sv32") as info:
        open_format("sv32", {})
    assert "vtdss" in info.value.hint


def test_sign_extension():
    fmt = open_format("x86_64", {})
    assert fmt.covers(0x7FFF_FFFF_FFFF)
    assert not fmt.covers(0x8000_0000_0000)
    assert fmt.covers(0xFFFF_8000_0000_0000)
    raw = np.array([0, 0x7FFF_FFFF_F000, 0x8000_0000_0000, 0xFFFF_FFFF_F000], np.uint64)
    assert [hex(v) for v in fmt.extend(raw).tolist()] == [
        "0x0", "0x7ffffffff000", "0xffff800000000000", "0xfffffffffffff000",
    ]  # fmt: skip
    assert fmt.covers_array(fmt.extend(raw)).all()
    assert not fmt.covers_array(raw[2:]).any()
