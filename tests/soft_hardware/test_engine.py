# SPDX-License-Identifier: Apache-2.0
"""The compiled walker against find_root and the obvious walk; types; no cache directory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import iokeep
from iokeep.mem.ram import Ram
from iokeep.pt.registry import open_format
from iokeep.pt.roots import vtd
from iokeep.pt.roots.vtd import FaultReason
from iokeep.soft.hardware import engine
from iokeep.soft.hardware.iommu import hardware_formats
from iokeep.soft.hardware.units import vtd as r

RAM = 1 << 20
FORMATS, KINDS = engine.format_tables(hardware_formats())


def plain_walk(fmt, ram, root, iova, write):
    """One item at a time, from the level specifications: (outcome, pa)."""
    bits = fmt.input_lg2
    if fmt.sign_extend:
        if iova >> (bits - 1) not in (0, (1 << (65 - bits)) - 1):
            return 5, 0
    elif iova >> bits:
        return 5, 0
    may_read = may_write = True
    table = root
    for spec in reversed(fmt.levels):
        pa = table + (iova >> spec.shift & (1 << spec.index_bits) - 1) * 8
        if pa + 8 > ram.size:
            return 1, 0
        item = ram.load64(pa)
        if not item & spec.valid_mask:
            return 2, 0
        if spec.leaf and (not spec.table or item & spec.leaf_mask == spec.leaf_value):
            if item & spec.leaf_reserved:
                return 3, 0
            may_read &= item & spec.r_mask == spec.r_value
            may_write &= item & spec.w_mask == spec.w_value
            if not (may_write if write else may_read):
                return 4, 0
            return 0, item & spec.leaf_pa_mask | iova & (1 << spec.shift) - 1
        if not spec.table or item & spec.table_reserved:
            return 3, 0
        may_read &= item & spec.tr_mask == spec.tr_value
        may_write &= item & spec.tw_mask == spec.tw_value
        table = item & spec.table_pa_mask
    raise AssertionError("level 0 has no table items")


words = st.one_of(
    st.integers(0, 2**64 - 1),
    # entries that lead somewhere: a frame of the memory and some low and high bits
    st.builds(
        lambda frame, low, high: frame << 12 | low | high << 52,
        st.integers(0, RAM // 4096),
        st.sampled_from([0, 1, 2, 3, 5, 7, 0x67, 0x25, 0x80, 0x83, 0x87, 0xE7, 0x403, 0x227, 0x800, 0xFFF]),
        st.sampled_from([0, 0, 0, 1, 0x7FF, 0x800]),
    ),
)


@given(
    st.integers(0, len(engine.KINDS) - 1),
    st.lists(words, min_size=5, max_size=5),
    st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 2**39 - 1), st.integers(2**64 - 2**47, 2**64 - 1)),
    st.booleans(),
)
def test_walk_equals_the_obvious_walk(kind, items, iova, write):
    name, levels = engine.KINDS[kind]
    fmt = open_format(name, {"levels": levels})
    ram = Ram.of(RAM)
    table = root = 0x10000
    # Put each item where the walk will look for it, as far as the items lead.
    for spec, item in zip(reversed(fmt.levels), items, strict=False):
        pa = table + (iova >> spec.shift & 511) * 8
        if pa + 8 > ram.size:
            break
        ram.store64(pa, item)
        table = item & spec.table_pa_mask
    need = np.uint64(2 if write else 1)
    outcome, pa, _, _ = engine.walk(
        ram.words, FORMATS, KINDS, np.uint64(kind), np.uint64(root), np.uint64(iova), need
    )
    assert (int(outcome), int(pa)) == plain_walk(fmt, ram, root, iova, write)


def resolved(ram, rtaddr, bdf):
    bank = np.zeros(512, np.uint64)
    bank[r.HIDDEN_ROOT >> 3] = rtaddr
    unit = np.zeros(engine.UNIT_WORDS, np.uint64)
    unit[engine.C_BDF] = bdf
    return int(engine.resolve(ram.words, bank, unit)), unit


def found_or_fault(ram, rtaddr, bdf):
    try:
        return vtd.find_root(ram, rtaddr, bdf)
    except vtd.RootFault as e:
        return e


ROOT, CTX, CTX2, DIR, TAB = 0x1000, 0x2000, 0x3000, 0x4000, 0x6000
small = st.one_of(
    st.integers(0, 2**64 - 1),
    st.builds(
        lambda pa, low, high: pa | low | high << 32,
        st.sampled_from([CTX, CTX2, DIR, TAB, 0x7000, 1 << 40]),
        st.integers(0, 0xFFF),
        st.sampled_from([0, 0, 0, 1, 1 << 20]),
    ),
    st.integers(0, 0xFFF),
)


@given(
    st.integers(0, 3),
    st.sampled_from([0x20, 0xA0, 0x7F8, 0xFF]),
    st.integers(0, 70),
    st.lists(
        st.tuples(st.sampled_from(["root", "ctx", "dir", "pasid"]), st.integers(0, 7), small), max_size=2
    ),
    st.sampled_from([("vtdss", 3), ("vtdss", 4), ("vtdss", 5), ("x86_64", 4), ("x86_64", 5)]),
)
def test_resolve_equals_find_root(ttm, bdf, rid_pasid, damage, kind):
    ram = Ram.of(RAM)
    name, levels = kind
    scalable = ttm == 1
    at = {"root": vtd.root_entry_pa(ROOT, bdf), "dir": DIR + (rid_pasid >> 6) * 8}
    at["pasid"] = TAB + (rid_pasid & 63) * 64
    if scalable:
        at["ctx"] = vtd.context_entry_pa(CTX2 if bdf & 0x80 else CTX, bdf, scalable=True)
        entries = [
            (at["root"], vtd.sm_root_entry(CTX, CTX2)),
            (at["ctx"], vtd.sm_context_entry(DIR, 0, rid_pasid)),
        ]
        encode = vtd.pasid_entry_first_stage if name == "x86_64" else vtd.pasid_entry_second_stage
        entries += [(at["dir"], (vtd.pasid_dir_entry(TAB),)), (at["pasid"], encode(0x7000, levels, 9))]
    else:
        at["ctx"] = vtd.context_entry_pa(CTX, bdf, scalable=False)
        entries = [(at["root"], vtd.root_entry(CTX)), (at["ctx"], vtd.context_entry(0x7000, levels, 9))]
    for pa, values in entries:
        for i, value in enumerate(values):
            ram.store64(pa + 8 * i, value)
    sizes = {"root": 2, "ctx": 4 if scalable else 2, "dir": 1, "pasid": 8}
    for what, word, value in damage:
        ram.store64(at[what] + word % sizes[what] * 8, value)
    rtaddr = ROOT | ttm << 10
    reason, unit = resolved(ram, rtaddr, bdf)
    found = found_or_fault(ram, rtaddr, bdf)
    path = {step.name: step.words for step in found.path}
    # Legal entries, but this IOMMU has no device-TLB; the check comes before the PASID tables.
    device_tlb = "context" in path and path["context"][0] & (4 if scalable else 0xC)
    if isinstance(found, vtd.RootFault):
        assert reason == found.reason or (reason == FaultReason.SM_CONTEXT_INVALID and device_tlb)
        assert not unit[engine.C_VALID]
        return
    if found.translation in ("nested", "pass-through") or device_tlb:
        assert reason in (
            FaultReason.CONTEXT_INVALID,
            FaultReason.SM_CONTEXT_INVALID,
            FaultReason.SM_PASID_INVALID,
        )
        return
    assert reason == 0
    assert engine.KINDS[int(unit[engine.C_KIND])] == (found.format, found.levels)
    assert int(unit[engine.C_ROOT]) == found.root_pa
    assert int(unit[engine.C_DID]) == found.domain_id
    assert int(unit[engine.C_PASID]) == (found.pasid or 0)


def test_no_signed_or_float_in_the_compiled_code(tmp_path):
    if not engine.COMPILED:
        pytest.skip("NUMBA_DISABLE_JIT is set")
    program = (
        "from iokeep.soft.hardware import engine as e\n"
        "import numba\n"
        "functions = (e.mix, e.second_stage_kind, e.resolve, e.walk, e.fault_reason, e.translate, e.burst)\n"
        "e.burst.compile(e.BURST_SIGNATURE)\n"
        "from numba import types as t\n"
        "allowed = set('row level number at way slot low high middle tried count'.split())\n"
        "for f in functions:\n"
        "    assert f.nopython_signatures, f\n"
        "    for s in f.nopython_signatures:\n"
        "        wanted = {t.uint64} if f is not e.burst else {t.int64}\n"
        "        got = s.return_type\n"
        "        assert set(got.types if isinstance(got, t.BaseTuple) else [got]) == wanted, (f, s)\n"
        "    for result in f.overloads.values():\n"
        "        for name, kind in result.type_annotation.typemap.items():\n"
        "            kind = t.unliteral(kind)\n"
        "            assert not isinstance(kind, t.Float), (f, name, kind)\n"
        "            plain = name.split('.')[0]\n"
        "            if kind == t.int64 and not name.startswith(('$', 'arg.')) and plain.isidentifier():\n"
        "                assert plain in allowed, (f, name, kind)\n"
        "print('checked')\n"
    )
    # Cached code has no annotations: compile afresh, in a directory of its own.
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", program]
    out = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert out.stdout.strip() == "checked", out.stderr


def test_without_any_place_for_a_cache(tmp_path):
    """Read-only package and home: compiled without a cache instead of failing."""
    copy = tmp_path / "site" / "iokeep"
    shutil.copytree(Path(iokeep.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    program = (
        "import numba.core.caching as c\n"
        "c.CacheImpl._locator_classes = []\n"  # what numba finds where nothing is writable
        "from iokeep.soft.hardware import engine as e\n"
        "import numpy as np\n"
        "print(e.__file__, int(e.mix(np.uint64(1))))\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}
    env["PYTHONPATH"] = str(tmp_path / "site")
    out = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr
    path, value = out.stdout.split()
    assert path.startswith(str(copy))
    with np.errstate(over="ignore"):
        assert int(value) == int(engine.mix(np.uint64(1)))


@given(st.integers(0, 2**64 - 1))
def test_mix_is_splitmix(x):
    m = 2**64 - 1
    y = (x ^ x >> 31) * 0x9E3779B97F4A7C15 & m
    y = (y ^ y >> 27) * 0xBF58476D1CE4E5B9 & m
    with np.errstate(over="ignore"):
        assert int(engine.mix(np.uint64(x))) == y ^ y >> 31
