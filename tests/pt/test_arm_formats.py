# SPDX-License-Identifier: Apache-2.0
"""Arm formats as data: geometry, every bit against plain words, what Linux writes, what is refused."""

import itertools

import numpy as np
import pytest

from iokeep.errors import InputError
from iokeep.pt.formats.plain_arm import DECODERS, contiguous_items
from iokeep.pt.registry import open_format

G4, G16, G64 = 4096, 16384, 65536


def lpae(stage, granule, size, out=48, **more):
    return f"arm_lpae_s{stage}", {"granule": granule, "input_bits": size, "output_bits": out, **more}


CONFIGS = [
    lpae(1, G4, 16),
    lpae(1, G4, 32, 40),
    lpae(1, G4, 39, 40, ttbr=1),
    lpae(1, G4, 48, 44),
    lpae(1, G4, 48, 48, hw_access=1),
    lpae(1, G4, 48, 48, hw_access=1, hw_dirty=1),
    lpae(1, G4, 52, 52),
    lpae(1, G4, 48, 48, lpa2=1),
    lpae(1, G16, 36),
    lpae(1, G16, 47, 42),
    lpae(1, G16, 48),
    lpae(1, G16, 52, 52),
    lpae(1, G64, 17, 32),
    lpae(1, G64, 42, 36),
    lpae(1, G64, 48),
    lpae(1, G64, 52, 52),
    lpae(2, G4, 40, 40),
    lpae(2, G4, 42, 42),
    lpae(2, G4, 44, 44),
    lpae(2, G4, 48, 48, fwb=1),
    lpae(2, G4, 52, 52),
    lpae(2, G16, 40, 40),
    lpae(2, G16, 48, 48),
    lpae(2, G16, 52, 52),
    lpae(2, G64, 44, 44),
    lpae(2, G64, 46, 44, start_level=2),
    lpae(2, G64, 52, 52, hw_access=1),
    lpae(2, G4, 40, 40, hw_dirty=1),
    ("arm_mali_lpae", {}),
    ("arm_mali_lpae", {"input_bits": 36, "output_bits": 32}),
    ("arm_v7s", {}),
    ("arm_v7s", {"quirks": "0x2"}),
    ("arm_v7s", {"quirks": 1}),
]


def config_id(config):
    return "-".join([config[0], *(f"{k}{v}" for k, v in config[1].items())])


@pytest.fixture(params=CONFIGS, ids=config_id, scope="module")
def arm(request):
    return open_format(*request.param)


def plain(fmt, item, level):
    """The item in plain words as one comparable tuple: None, "reserved", or (leaf, pa, prot, attrs)."""
    entry = DECODERS[fmt.name](item, level, fmt.config)
    if entry is None:
        return None
    if entry.reserved:
        return "reserved"
    return entry.leaf, entry.pa, int(entry.read) | int(entry.write) << 1, entry.attrs


def masked(fmt, item, level):
    """The same from the masks."""
    spec = fmt.levels[level]
    if not spec.is_present(item):
        return None
    if not spec.is_leaf(item):
        if spec.bad_table(item) is not None:
            return "reserved"
        prot = (item & spec.tr_mask == spec.tr_value) | (item & spec.tw_mask == spec.tw_value) << 1
        return False, spec.table_pa(item), prot, item & spec.table_attrs != 0
    if spec.bad_leaf(item) is not None:
        return "reserved"
    pa, attrs, wanted = spec.leaf_pa(item), spec.leaf_attrs, spec.leaf_attrs_value
    run = spec.contig_of(item)
    if run is not None:
        if run.replicated:
            pa &= -1 << (spec.shift + run.lg2)
        if run.attrs is not None:
            attrs, wanted = run.attrs, run.attrs_value
    return True, pa, spec.leaf_prot(item), item & attrs != wanted


def seeds(fmt, level):
    """Items to start from: what Linux writes, and every type with nothing else."""
    spec = fmt.levels[level]
    out = [0, 1, 2, 3, 1 << 10 | 1, 1 << 10 | 3]
    pa = np.array([spec.leaf_pa_mask & 0x5A5A_5A5A_0000_0000 & -(1 << spec.shift)], np.uint64)
    for prot in (1, 2, 3) if spec.leaf else ():
        for contig in (None, *spec.contig):
            whole = pa & np.uint64(2**64 - (1 << (spec.shift + (contig.lg2 if contig else 0))))
            items = fmt.leaf_items(level, whole, np.array([prot], np.uint8), contig)
            out.append(int(items[0]))
    if spec.table:
        out.append(int(fmt.table_items(level, np.array([spec.table_pa_mask & 0x1234_0000], np.uint64))[0]))
    return out


def test_every_bit_of_every_item_as_the_specification_says(arm):
    width = arm.item_bytes * 8
    for level in range(len(arm.levels)):
        starts = seeds(arm, level)
        for seed in starts:
            assert masked(arm, seed, level) == plain(arm, seed, level), (level, hex(seed))
            # Every bit, and from what Linux writes every two bits.
            twice = range(width) if seed in (starts[-1], starts[6]) else ()
            for a, b in itertools.chain(
                ((bit, 64) for bit in range(width)), itertools.combinations(twice, 2)
            ):
                item = seed ^ 1 << a ^ (1 << b if b < 64 else 0)
                assert masked(arm, item, level) == plain(arm, item, level), (level, hex(item))


def test_random_items_as_the_specification_says(arm):
    rng = np.random.default_rng(1)
    width = arm.item_bytes * 8
    for level in range(len(arm.levels)):
        for keep in (2**64 - 1, ~(3 << 48 | 1 << 50 | 1 << 16)):
            for item in rng.integers(0, 2**width, 1500, np.uint64).tolist():
                item &= keep
                assert masked(arm, item, level) == plain(arm, item, level), (level, hex(item))


def test_every_bit_has_one_meaning(arm):
    everything = (1 << arm.item_bytes * 8) - 1
    for level in arm.levels:
        moved, claimed = 0, 0
        for mask, _ in level.pa_pieces:
            moved |= mask
        for contig in level.contig:
            claimed |= contig.mask
        types = level.valid_mask | level.leaf_mask
        for mask, _ in (*level.leaf_bad, *level.table_bad):
            types |= mask
        kinds = []
        if level.leaf:
            permission, address = level.r_mask | level.w_mask, level.leaf_pa_mask | moved
            if arm.name == "arm_v7s":  # the type bit is PXN or XN too
                types, claimed = level.leaf_mask or 1 << 1, claimed & ~level.valid_mask
            kinds.append(
                (
                    types | claimed,
                    permission,
                    address,
                    level.leaf_attrs,
                    level.leaf_ignored,
                    level.leaf_reserved,
                )
            )
        if level.table:
            permission, address = level.tr_mask | level.tw_mask, level.table_pa_mask | moved
            types |= level.valid_mask
            kinds.append(
                (types, permission, address, level.table_attrs, level.table_ignored, level.table_reserved)
            )
        for masks in kinds:
            seen = 0
            for mask in masks:
                assert seen & mask == 0, hex(seen & mask)
                seen |= mask
            assert seen == everything, hex(everything ^ seen)


@pytest.mark.parametrize(
    ("stage", "granule", "size", "out", "start", "entries"),
    [
        (1, G4, 48, 48, 0, 512),
        (1, G4, 40, 40, 0, 2),
        (1, G4, 39, 40, 1, 512),
        (1, G4, 32, 40, 1, 4),
        (1, G4, 25, 48, 2, 16),
        (1, G4, 16, 48, 3, 16),
        (1, G4, 49, 52, -1, 2),
        (1, G4, 52, 52, -1, 16),
        (1, G16, 48, 48, 0, 2),
        (1, G16, 47, 48, 1, 2048),
        (1, G16, 36, 48, 2, 2048),
        (1, G16, 25, 48, 3, 2048),
        (1, G16, 52, 52, 0, 32),
        (1, G64, 48, 48, 1, 64),
        (1, G64, 52, 52, 1, 1024),
        (1, G64, 42, 42, 2, 8192),
        (1, G64, 29, 42, 3, 8192),
        (1, G64, 17, 42, 3, 2),
        (2, G4, 48, 48, 0, 512),
        (2, G4, 44, 44, 0, 32),
        (2, G4, 42, 42, 1, 8 * 512),
        (2, G4, 40, 40, 1, 2 * 512),
        (2, G4, 39, 40, 1, 512),
        (2, G16, 48, 48, 1, 2 * 2048),
        (2, G16, 44, 44, 1, 256),
        (2, G16, 40, 40, 2, 16 * 2048),
        (2, G16, 36, 36, 2, 2048),
        (2, G64, 44, 44, 1, 4),
        (2, G64, 40, 40, 2, 2048),
        (2, G64, 52, 52, 1, 1024),
    ],
)
def test_roots(stage, granule, size, out, start, entries):
    fmt = open_format(*lpae(stage, granule, size, out))
    assert fmt.config["start_level"] == start
    assert fmt.config["root_entries"] == entries
    assert len(fmt.levels) == 4 - start
    assert fmt.input_lg2 == size
    assert fmt.root_bytes == entries * 8 == fmt.root_align
    assert all(fmt.bytes_of(level) == granule for level in range(fmt.top_level))
    # What follows may be said too, and nothing else.
    name, config = lpae(stage, granule, size, out, start_level=start, root_entries=entries)
    assert open_format(name, config) is fmt
    with pytest.raises(InputError):
        open_format(name, {**config, "root_entries": entries * 2})


@pytest.mark.parametrize(
    ("granule", "size", "start", "entries"),
    [
        (G4, 43, 1, 16 * 512), (G4, 43, 0, 16), (G4, 34, 2, 16 * 512), (G4, 34, 1, 16), (G4, 25, 3, 16 * 512),
        (G16, 47, 1, 2048), (G16, 40, 2, 16 * 2048), (G16, 40, 1, 16), (G16, 29, 3, 16 * 2048),
        (G64, 46, 2, 16 * 8192), (G64, 46, 1, 16), (G64, 33, 3, 16 * 8192),
    ],
)  # fmt: skip
def test_a_stage_2_start_level_is_a_choice(granule, size, start, entries):
    for more in ({"start_level": start}, {"root_entries": entries}):
        fmt = open_format(*lpae(2, granule, size, 48, **more))
        assert (fmt.config["start_level"], fmt.config["root_entries"]) == (start, entries)
        assert fmt.root_bytes == entries * 8


@pytest.mark.parametrize(
    ("name", "config"),
    [
        lpae(1, 8192, 48),
        lpae(1, G4, 49, lpa2=0),
        lpae(1, G16, 48, 52, lpa2=0),
        lpae(1, G4, 48, 52, lpa2=0),
        lpae(1, G4, 53),
        lpae(1, G4, 15),
        lpae(1, G64, 16),
        lpae(1, G64, 52, 52, lpa2=1),
        lpae(1, G4, 48, 47),
        lpae(1, G4, 48, start_level=1),
        lpae(1, G4, 40, start_level=1),
        lpae(1, G4, 48, ttbr=2),
        lpae(1, G4, 48, fwb=1),
        lpae(2, G4, 48, ttbr=1),
        lpae(2, G4, 44, 44, start_level=1),
        lpae(2, G4, 39, start_level=0),
        lpae(2, G4, 40, start_level=-1),
        lpae(2, G4, 40, root_entries=3),
        lpae(2, G4, 40, root_entries=1 << 14),
        lpae(1, G4, 48, quirks="0x8"),
        lpae(1, G4, 48, quirks="nonsense"),
        lpae(1, G4, 48, quirks=-1),
        lpae(1, G4, 48, quirks=True),
        lpae(2, G4, 48, quirks="0x20"),
        ("arm_mali_lpae", {"granule": G16}),
        ("arm_mali_lpae", {"input_bits": 49}),
        ("arm_mali_lpae", {"output_bits": 48}),
        ("arm_mali_lpae", {"start_level": 1}),
        ("arm_mali_lpae", {"root_entries": 256}),
        ("arm_mali_lpae", {"quirks": "1"}),
        ("arm_v7s", {"output_bits": 35}),
        ("arm_v7s", {"quirks": "0x8"}),
        ("arm_v7s", {"quirks": "0x10"}),
        ("arm_v7s", {"quirks": 1 << 20}),
        ("arm_v7s", {"granule": 4096}),
    ],
)
def test_configurations_that_no_hardware_has(name, config):
    with pytest.raises(InputError) as info:
        open_format(name, config)
    assert name in str(info.value)


def test_quirks_say_what_other_keys_say():
    assert open_format(*lpae(1, G4, 48, quirks="0x20")) is open_format(*lpae(1, G4, 48, ttbr=1))
    assert open_format(*lpae(1, G4, 48, quirks="0x81")) is open_format(
        *lpae(1, G4, 48, hw_access=1, hw_dirty=1)
    )
    assert open_format(*lpae(1, G4, 48, quirks="0x1")) is open_format(*lpae(1, G4, 48))
    assert open_format(*lpae(2, G4, 48, quirks=0x100)) is open_format(*lpae(2, G4, 48, fwb=1))


@pytest.mark.parametrize(
    ("name", "config", "sizes"),
    [
        (*lpae(1, G4, 48), (12, 21, 30)),
        (*lpae(1, G4, 52, 52), (12, 21, 30, 39)),
        (*lpae(2, G4, 40, 40), (12, 21, 30)),
        (*lpae(1, G16, 48), (14, 25)),
        (*lpae(1, G16, 52, 52), (14, 25, 36)),
        (*lpae(1, G64, 48), (16, 29)),
        (*lpae(1, G64, 52, 52), (16, 29, 42)),
        (*lpae(2, G64, 48, 52), (16, 29, 42)),
        ("arm_mali_lpae", {}, (12, 21, 30)),
        ("arm_v7s", {}, (12, 16, 20, 24)),
    ],
)
def test_leaf_sizes(name, config, sizes):
    assert open_format(name, config).leaf_lg2s == sizes


def test_the_contiguous_hint_joins_as_many_as_each_level_says(arm):
    if not arm.name.startswith("arm_lpae"):
        return
    for number, level in enumerate(arm.levels):
        want = contiguous_items(number, arm.config["granule"]) if level.leaf else 1
        if want > level.items:
            want = 1
        assert [1 << c.lg2 for c in level.contig] == ([want] if want > 1 else [])


def items_of(name, config, level, pa, contig=None):
    fmt = open_format(name, config)
    pas, prot = np.array([pa] * 3, np.uint64), np.array([1, 2, 3], np.uint8)
    run = fmt.levels[level].contig[contig] if contig is not None else None
    return [hex(v) for v in fmt.leaf_items(level, pas, prot, run).tolist()]


def test_bits_seen_in_real_kernels():
    """The descriptors of the captures a64-vfio, a64-16k-s2-vfio, a64-mod-* for IOMMU_CACHE."""
    assert items_of(*lpae(1, G4, 48), 0, 0x5000) == ["0x5fc7", "0x5f47", "0x5f47"]
    assert items_of(*lpae(1, G4, 48), 1, 0x200000) == ["0x200fc5", "0x200f45", "0x200f45"]
    assert items_of(*lpae(2, G16, 44, 44), 0, 0x4000) == ["0x477f", "0x47bf", "0x47ff"]
    assert items_of(*lpae(2, G16, 44, 44), 1, 0x2000000) == ["0x200077d", "0x20007bd", "0x20007fd"]
    assert items_of("arm_mali_lpae", {}, 0, 0x5000) == ["0x5245", "0x5285", "0x52c5"]
    assert items_of("arm_mali_lpae", {}, 2, 1 << 30) == ["0x40000245", "0x40000285", "0x400002c5"]
    assert items_of("arm_v7s", {}, 0, 0x5000) == ["0x5e7e", "0x5c7e", "0x5c7e"]
    assert items_of("arm_v7s", {}, 0, 0x50000, 0) == ["0x51e3d", "0x51c3d", "0x51c3d"]
    assert items_of("arm_v7s", {}, 1, 0x500000) == ["0x539c0e", "0x531c0e", "0x531c0e"]
    assert items_of("arm_v7s", {}, 1, 0x5000000, 0) == ["0x5079c0e", "0x5071c0e", "0x5071c0e"]
    for name, table in (("arm_lpae_s1", 3), ("arm_lpae_s2", 3), ("arm_mali_lpae", 3), ("arm_v7s", 1)):
        fmt = open_format(name, {})
        assert int(fmt.table_items(1, np.array([0x400000], np.uint64))[0]) == 0x400000 | table
    # PA[51:48] in 15:12, PA[51:50] in 9:8
    wide = lpae(1, G64, 52, 52)
    assert items_of(*wide, 0, 0xC354A40000 << 12)[2] == hex(0x354A40000000 | 0xCF47)
    assert items_of(*lpae(1, G4, 52, 52), 0, 0x9354A40000 << 12)[2] == hex(0x1354A40000000 | 0xE47)
    assert items_of(*lpae(2, G4, 48, 48, fwb=1), 0, 0x1000)[2] == hex(0x1000 | 0x7DB)
