# SPDX-License-Identifier: Apache-2.0
"""VT-d root, context and PASID entries: captures of real kernels, encode and find, damage, descriptors."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iokeep.errors import MemoryAbsent
from iokeep.mem.ram import Ram
from iokeep.pt.roots import vtd
from iokeep.pt.roots.vtd import FaultReason, RootFault, find_root

PLACES = [
    Path(os.environ["IOKEEP_CAPTURES"]) if "IOKEEP_CAPTURES" in os.environ else None,
    Path(__file__).parents[1] / "data" / "captures",
]
CAPTURES = {
    path.parent.name: path.parent
    for place in PLACES
    if place is not None
    for path in sorted(place.glob("*/meta.json"))
    if path.parent.name.startswith(("vtd-", "luo-vtd"))
}


class Pages:
    """The pages of a capture, as physical memory."""

    def __init__(self, path):
        with np.load(path / "tables.npz") as z:
            self.pages = {int(pa): z["data"][i].tobytes() for i, pa in enumerate(z["pa"])}

    def read(self, pa, length):
        page = self.pages.get(pa & ~0xFFF)
        if page is None or (pa & 0xFFF) + length > 4096:
            raise MemoryAbsent(pa, length)
        return page[pa & 0xFFF : (pa & 0xFFF) + length]


@pytest.mark.skipif(not CAPTURES, reason="no captures: set IOKEEP_CAPTURES")
@pytest.mark.parametrize("name", sorted(CAPTURES))
def test_captures_of_real_kernels(name):
    meta = json.loads((CAPTURES[name] / "meta.json").read_text())
    hw = meta["hw"]
    found = find_root(Pages(CAPTURES[name]), int(hw["root_register"], 16), vtd.parse_bdf(hw["bdf"]))
    assert found.root_pa == int(meta["root_pa"], 16)
    assert found.format == meta["format"]
    assert found.levels == meta["config"]["levels"]
    assert found.domain_id == hw["domain_id"]
    assert found.mode == meta["mode"]
    steps = {step.name: step.words for step in found.path}
    assert steps["root"][0] == int(hw["root_entry"], 16)
    assert steps["context"][:2] == (int(hw["ctx_lo"], 16), int(hw["ctx_hi"], 16))
    if found.mode == "scalable":
        assert steps["pasid-dir"][0] == int(hw["pasid_dir_entry"], 16)
        assert steps["pasid"] == tuple(int(w, 16) for w in hw["pasid_entry"])
        # Our encoders say what Linux says, bit for bit.
        encode = {
            "first-stage": vtd.pasid_entry_first_stage,
            "second-stage": vtd.pasid_entry_second_stage,
        }[found.translation]
        assert encode(found.root_pa, found.levels, found.domain_id) == steps["pasid"]
        assert vtd.pasid_dir_entry(steps["pasid-dir"][0] & ~0xFFF) == steps["pasid-dir"][0]
        pdts = steps["context"][0] >> 9 & 7
        assert vtd.sm_context_entry(steps["context"][0] & ~0xFFF, pdts) == steps["context"]
    else:
        assert vtd.context_entry(found.root_pa, found.levels, found.domain_id) == steps["context"]
        assert vtd.root_entry(steps["root"][0] & ~0xFFF) == steps["root"]


def put(ram, pa, words):
    ram.write(pa, b"".join(w.to_bytes(8, "little") for w in words))


ROOT, CTX, CTX2, DIR, TAB, TOP = 0x1000, 0x2000, 0x3000, 0x4000, 0x6000, 0x7000


def legacy(bdf=0x20, levels=4, did=5):
    ram = Ram.of(1 << 16)
    put(ram, vtd.root_entry_pa(ROOT, bdf), vtd.root_entry(CTX))
    put(ram, vtd.context_entry_pa(CTX, bdf, scalable=False), vtd.context_entry(TOP, levels, did))
    return ram, vtd.rtaddr_value(ROOT, scalable=False)


def scalable(bdf=0x20, entry=None, rid_pasid=0):
    ram = Ram.of(1 << 16)
    put(ram, vtd.root_entry_pa(ROOT, bdf), vtd.sm_root_entry(CTX, CTX2))
    table = CTX2 if bdf & 0x80 else CTX
    entry_pa = vtd.context_entry_pa(table, bdf, scalable=True)
    put(ram, entry_pa, vtd.sm_context_entry(DIR, 0, rid_pasid))
    put(ram, DIR + (rid_pasid >> 6) * 8, [vtd.pasid_dir_entry(TAB)])
    put(ram, TAB + (rid_pasid & 63) * 64, entry or vtd.pasid_entry_second_stage(TOP, 4, 5))
    return ram, vtd.rtaddr_value(ROOT, scalable=True)


@given(st.integers(0, 0xFFFF), st.sampled_from([3, 4, 5]), st.integers(0, 0xFFFF))
def test_legacy_encode_find(bdf, levels, did):
    ram, rtaddr = legacy(bdf, levels, did)
    found = find_root(ram, rtaddr, bdf)
    assert (found.format, found.levels, found.root_pa, found.domain_id) == ("vtdss", levels, TOP, did)
    assert found.translation == "second-stage"
    assert found.pasid is None


@given(
    st.integers(0, 0xFFFF),
    st.sampled_from([("x86_64", 4), ("x86_64", 5), ("vtdss", 3), ("vtdss", 4), ("vtdss", 5)]),
    st.integers(0, 0xFFFF),
    st.integers(0, 8191),
)
def test_scalable_encode_find(bdf, kind, did, rid_pasid):
    name, levels = kind
    encode = vtd.pasid_entry_first_stage if name == "x86_64" else vtd.pasid_entry_second_stage
    ram, rtaddr = scalable(bdf, encode(TOP, levels, did), rid_pasid)
    found = find_root(ram, rtaddr, bdf)
    assert (found.format, found.levels, found.root_pa, found.domain_id) == (name, levels, TOP, did)
    assert found.pasid == rid_pasid
    assert find_root(ram, rtaddr, bdf, rid_pasid).root_pa == TOP
    with pytest.raises(RootFault) as e:
        find_root(ram, rtaddr, bdf, 128 * 64)
    assert e.value.reason == FaultReason.SM_PASID_TOO_LARGE


def reason_after(ram, rtaddr, pa, word, bdf=0x20):
    ram.store64(pa, word)
    with pytest.raises(RootFault) as e:
        find_root(ram, rtaddr, bdf)
    assert f"{int(e.value.reason):#x}" in str(e.value)
    return e.value.reason


ROOT_20, CTX_20, SM_CTX_20 = ROOT, CTX + 0x200, CTX + 0x400


@pytest.mark.parametrize(
    ("pa", "word", "reason"),
    [
        (ROOT_20, 0, FaultReason.ROOT_NOT_PRESENT),
        (ROOT_20, CTX | 3, FaultReason.ROOT_RESERVED),
        (ROOT_20 + 8, 1, FaultReason.ROOT_RESERVED),
        (ROOT_20, 1 << 52 | CTX | 1, FaultReason.ROOT_RESERVED),
        (ROOT_20, 1 << 40 | 1, FaultReason.CONTEXT_ACCESS),
        (CTX_20, 0, FaultReason.CONTEXT_NOT_PRESENT),
        (CTX_20, TOP | 0x11, FaultReason.CONTEXT_RESERVED),
        (CTX_20 + 8, 0x582, FaultReason.CONTEXT_RESERVED),
        (CTX_20 + 8, 1 << 24 | 0x502, FaultReason.CONTEXT_RESERVED),
        (CTX_20 + 8, 0x500, FaultReason.CONTEXT_INVALID),
        (CTX_20 + 8, 0x504, FaultReason.CONTEXT_INVALID),
        (CTX_20, TOP | 3 << 2 | 1, FaultReason.CONTEXT_INVALID),
    ],
)
def test_legacy_damage(pa, word, reason):
    assert reason_after(*legacy(), pa, word) == reason


@pytest.mark.parametrize(
    ("pa", "word", "reason"),
    [
        (ROOT_20, 0, FaultReason.SM_ROOT_NOT_PRESENT),
        (ROOT_20, CTX | 5, FaultReason.SM_ROOT_RESERVED),
        (ROOT_20, 1 << 40 | 1, FaultReason.SM_CONTEXT_ACCESS),
        (SM_CTX_20, DIR, FaultReason.SM_CONTEXT_NOT_PRESENT),
        (SM_CTX_20, DIR | 0x21, FaultReason.SM_CONTEXT_RESERVED),
        (SM_CTX_20 + 24, 1, FaultReason.SM_CONTEXT_RESERVED),
        (SM_CTX_20 + 8, 128 * 64, FaultReason.SM_RID_PASID_TOO_LARGE),
        (SM_CTX_20, 1 << 40 | 1, FaultReason.SM_PASID_DIR_ACCESS),
        (DIR, 0, FaultReason.SM_PASID_DIR_NOT_PRESENT),
        (DIR, TAB | 5, FaultReason.SM_PASID_DIR_RESERVED),
        (DIR, 1 << 40 | 1, FaultReason.SM_PASID_ACCESS),
        (TAB, 0, FaultReason.SM_PASID_NOT_PRESENT),
        (TAB, TOP | 0x489, FaultReason.SM_PASID_RESERVED),
        (TAB + 56, 1, FaultReason.SM_PASID_RESERVED),
        (TAB, TOP | 0x81, FaultReason.SM_PASID_INVALID),
        (TAB, TOP | 0x9, FaultReason.SM_PASID_INVALID),
    ],
)
def test_scalable_damage(pa, word, reason):
    assert reason_after(*scalable(), pa, word) == reason


def test_nested_and_pass_through_are_told_apart():
    ram, rtaddr = scalable(entry=(TOP | 0xC9, 7, 0x8000, 0, 0, 0, 0, 0))
    found = find_root(ram, rtaddr, 0x20)
    assert (found.translation, found.root_pa, found.second) == ("nested", 0x8000, (4, TOP))
    ram, rtaddr = scalable(entry=(0x101, 7, 0, 0, 0, 0, 0, 0))
    assert find_root(ram, rtaddr, 0x20).translation == "pass-through"
    ram, rtaddr = legacy()
    ram.store64(CTX_20, 0x9)
    found = find_root(ram, rtaddr, 0x20)
    assert (found.translation, found.format, found.levels) == ("pass-through", None, 0)


def test_modes_that_do_not_translate():
    ram, rtaddr = legacy()
    for ttm in (2, 3):
        with pytest.raises(RootFault) as e:
            find_root(ram, rtaddr | ttm << 10, 0x20)
        assert e.value.reason == FaultReason.SM_ROOT_TABLE_INVALID
    with pytest.raises(ValueError, match="16 bits"):
        find_root(ram, rtaddr, 1 << 16)


@given(st.binary(min_size=512, max_size=512), st.integers(0, 7), st.booleans())
def test_noise_never_crashes(noise, where, is_scalable):
    ram, rtaddr = scalable() if is_scalable else legacy()
    ram.write(0x1000 * where + 0x200, noise)
    try:
        found = find_root(ram, rtaddr, 0x20)
    except RootFault:
        return
    assert found.levels in (0, 3, 4, 5)


def test_encoders_refuse_what_does_not_fit():
    for call in (
        lambda: vtd.root_entry(0x1001),
        lambda: vtd.root_entry(1 << 52),
        lambda: vtd.context_entry(TOP, 2, 1),
        lambda: vtd.context_entry(TOP, 4, 1 << 16),
        lambda: vtd.pasid_entry_first_stage(TOP, 3, 1),
        lambda: vtd.pasid_entry_second_stage(TOP, 6, 1),
        lambda: vtd.sm_context_entry(DIR, 8),
        lambda: vtd.inv_wait(2, 1),
        lambda: vtd.inv_wait(4, 1 << 32),
        lambda: vtd.inv_iotlb_pages(1, 0x1000, 1),
        lambda: vtd.inv_context_device(1, 1 << 16),
        lambda: vtd.descriptor_bytes((1, 0, 1, 0), wide=False),
    ):
        with pytest.raises(ValueError):
            call()


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_page_mask_covers(a, b):
    start, last = min(a, b), max(a, b)
    block = vtd.page_mask(start, last, 18)
    if block is None:
        assert (start >> 12 >> 18) != (last >> 12 >> 18)
        return
    iova, am = block
    assert iova <= start
    assert last <= iova + (4096 << am) - 1
    if am:  # and no smaller block does
        assert (start >> 12 >> (am - 1)) != (last >> 12 >> (am - 1))
    decoded = vtd.decode_descriptor(vtd.inv_iotlb_pages(9, iova, am))
    assert (decoded.start, decoded.last) == (iova, iova + (4096 << am) - 1)


@given(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF), st.integers(0, 0xFFFFF))
def test_descriptors_decode(did, bdf, pasid):
    d = vtd.decode_descriptor
    assert d(vtd.inv_context_global()).granularity == vtd.G_GLOBAL
    assert d(vtd.inv_context_domain(did)).domain_id == did
    device = d(vtd.inv_context_device(did, bdf, 2))
    assert (device.domain_id, device.source_id, device.function_mask) == (did, bdf, 2)
    assert d(vtd.inv_iotlb_global()).granularity == vtd.G_GLOBAL
    assert d(vtd.inv_iotlb_domain(did)).domain_id == did
    cache = d(vtd.inv_pasid_cache(did, vtd.PC_PASID, pasid))
    assert (cache.kind, cache.domain_id, cache.pasid) == (vtd.INV_PASID_CACHE, did, pasid)
    assert d(vtd.inv_piotlb_pasid(did, pasid)).pasid == pasid
    pages = d(vtd.inv_piotlb_pages(did, 0x200000, 9, pasid, ih=True))
    assert (pages.start, pages.last, pages.pasid) == (0x200000, 0x3FFFFF, pasid)
    wait = d(vtd.inv_wait(0x1234, 7, fence=True))
    assert (wait.status_pa, wait.status_data) == (0x1234, 7)


@pytest.mark.parametrize(
    "words",
    [
        (0, 0, 0, 0),
        (0xF, 0, 0, 0),
        (vtd.INV_CONTEXT, 0, 0, 0),  # granularity 0 is reserved
        (vtd.INV_CONTEXT | 0x10 | 1 << 9, 0, 0, 0),
        (vtd.INV_IOTLB | 0x10, 1 << 8, 0, 0),
        (vtd.INV_IOTLB | 0x10 | 1 << 40, 0, 0, 0),
        (vtd.INV_IOTLB | 0x10, 0, 1, 0),
        (vtd.INV_WAIT | vtd.WAIT_SW, 1, 0, 0),
        (vtd.INV_PASID_IOTLB | 0x10, 0, 0, 0),
        (vtd.INV_PASID_CACHE | 0x20, 0, 0, 0),
        (0x3, 0, 0, 0),  # device-TLB: this IOMMU has none (ECAP_REG.DT)
    ],
)
def test_bad_descriptors(words):
    assert vtd.decode_descriptor(words) is None


def test_bdf_text():
    assert vtd.bdf_text(0x20) == "0000:00:04.0"
    assert vtd.parse_bdf("0000:00:04.0") == 0x20
    assert vtd.parse_bdf("ff:1f.7") == 0xFFFF
    with pytest.raises(ValueError, match="PCI"):
        vtd.parse_bdf("00:20.0")
