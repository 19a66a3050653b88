# SPDX-License-Identifier: Apache-2.0
"""VT-d's look-up against find_root; types of the compiled code; no cache directory."""

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
from iokeep.pt.roots import vtd
from iokeep.pt.roots.base import TableRoot
from iokeep.pt.roots.vtd import FaultReason
from iokeep.soft.hardware import engine
from iokeep.soft.hardware.platform import HardwareLock
from iokeep.soft.hardware.unit import W_NOT_PRESENT
from iokeep.soft.hardware.units import vtd as r

RAM = 1 << 20


def looked_up(ram, rtaddr, bdf):
    pages = np.zeros((3, 2048), np.uint64)
    unit = r.VtdUnit(pages[0], pages[1], pages[2:], ram, HardwareLock(-1))
    unit.hidden[r.HIDDEN_ROOT] = rtaddr
    try:
        return unit.look_up(bdf)
    except vtd.RootFault as e:
        return e


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
def test_look_up_equals_find_root(ttm, bdf, rid_pasid, damage, kind):
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
    got = looked_up(ram, rtaddr, bdf)
    reason = got.reason if isinstance(got, vtd.RootFault) else 0
    found = found_or_fault(ram, rtaddr, bdf)
    path = {step.name: step.words for step in found.path}
    # Legal entries, but this IOMMU has no device-TLB; the check comes before the PASID tables.
    device_tlb = "context" in path and path["context"][0] & (4 if scalable else 0xC)
    if isinstance(found, vtd.RootFault):
        assert reason == found.reason or (reason == FaultReason.SM_CONTEXT_INVALID and device_tlb)
        return
    if found.translation in ("nested", "pass-through") or device_tlb:
        assert reason in (
            FaultReason.CONTEXT_INVALID,
            FaultReason.SM_CONTEXT_INVALID,
            FaultReason.SM_PASID_INVALID,
        )
        return
    assert reason == 0
    assert got.table == TableRoot(found.format, {"levels": found.levels}, found.root_pa)
    first = found.format == "x86_64"
    assert got.owner == found.domain_id | (found.pasid or 0) << 16 | (r.OWNER_FIRST if first else 0)
    assert got.silent == any(e.name != "root" and e.words[0] & vtd.FPD for e in found.path)
    missing = [FaultReason(codes[W_NOT_PRESENT - 1]) for codes in got.codes]
    assert missing == (
        [FaultReason.SM_FIRST_NOT_PRESENT] * 2
        if first
        else [FaultReason.SM_NO_READ, FaultReason.SM_NO_WRITE]
        if scalable
        else [FaultReason.NO_READ, FaultReason.NO_WRITE]
    )


def test_no_signed_or_float_in_the_compiled_code(tmp_path):
    if not engine.COMPILED:
        pytest.skip("NUMBA_DISABLE_JIT is set")
    program = (
        "from iokeep.soft.hardware import engine as e\n"
        "import numba\n"
        "functions = (e.mix, e.any_of, e.pa_of, e.ruled_leaf, e.ruled_next, e.walk, e.translate, e.burst)\n"
        "e.burst.compile(e.BURST_SIGNATURE)\n"
        "from numba import types as t\n"
        "allowed = set('row head level number at f g way slot low high middle tried count'.split())\n"
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
