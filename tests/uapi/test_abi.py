# SPDX-License-Identifier: Apache-2.0
"""The generated modules are what the manifest says, to the byte."""

import ctypes
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from iokeep.uapi import copy_struct, iommufd, kho, liveupdate, proposal, vfio

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = json.loads((ROOT / "src/iokeep/uapi/abi/linux-7.3.4.json").read_text())
MODULES = {"iommufd.h": iommufd, "liveupdate.h": liveupdate, "vfio.h": vfio, "kho": kho}
STRUCTS = [
    (header, name, entry)
    for header, part in MANIFEST["headers"].items()
    for name, entry in part["structs"].items()
]


def test_generated_modules_are_current():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/gen_abi.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_manifest_is_covered():
    assert set(MANIFEST["headers"]) == set(MODULES)
    assert len(STRUCTS) > 100


@pytest.mark.parametrize(("header", "name", "entry"), STRUCTS, ids=[each[1] for each in STRUCTS])
def test_struct_layout(header, name, entry):
    struct = getattr(MODULES[header], name)
    assert ctypes.sizeof(struct) == entry["size"]
    bit_fields = {}
    for member in entry["members"]:
        if "bits" in member:
            bit_fields.setdefault(8 * (member["offset"] // 8), []).append(member)
        elif member["name"] is None:
            for arm in member["members"]:
                field = getattr(struct, arm["name"])
                assert field.offset == member["offset"] + arm["offset"], arm["name"]
                assert field.size == arm["size"], arm["name"]
        else:
            field = getattr(struct, member["name"])
            assert field.offset == member["offset"], member["name"]
            assert field.size == member["size"], member["name"]
    for members in bit_fields.values():
        field = getattr(struct, "_".join(member["name"] for member in members))
        assert (field.offset, field.size) == (0, 8)
        for member in members:
            stem = f"{name}_{member['name']}".upper()
            assert getattr(kho, f"{stem}_SHIFT") == member["bit_offset"]
            assert getattr(kho, f"{stem}_MASK") == ((1 << member["bits"]) - 1) << member["bit_offset"]


@pytest.mark.parametrize("header", list(MODULES))
def test_constants(header):
    module, part = MODULES[header], MANIFEST["headers"][header]
    wanted = dict(part.get("constants", {}))
    for values in part.get("enums", {}).values():
        wanted.update(values)
    # The manifest has a pointer where the header has a string.
    pointers = {name for name in wanted if name.startswith("VFIO_DEVICE_API_") and name.endswith("_STRING")}
    assert not [name for name in pointers if hasattr(module, name)]
    for name in sorted(wanted.keys() - pointers):
        assert getattr(module, name) == wanted[name], name
    for name, value in part.get("strings", {}).items():
        assert getattr(module, name) == value


def test_union_arms_share_bytes():
    info = iommufd.iommu_hw_info(in_data_type=7)
    assert info.out_data_type == 7


def test_proposed_numbers_follow_the_kernels_last():
    taken = {
        value for name, value in vars(iommufd).items() if name.startswith("IOMMU_") and value >> 8 == 0x3B
    }
    proposed = [
        proposal.IOMMU_HWPT_LIVEUPDATE_MARK_PRESERVE,
        proposal.IOMMU_HWPT_LIVEUPDATE_ADOPT,
        proposal.IOMMU_HWPT_LIVEUPDATE_COMPARE,
        proposal.IOMMU_LIVEUPDATE_GET_INFO,
        proposal.IOMMU_HWPT_LIVEUPDATE_PROGRESS,
    ]
    assert proposed == [max(taken) + 1 + n for n in range(5)]


@pytest.mark.parametrize(
    ("struct", "size"),
    [
        (proposal.iommu_hwpt_liveupdate_mark_preserve, 16),
        (proposal.iommu_hwpt_liveupdate_adopt, 72),
        (proposal.iommu_hwpt_liveupdate_compare, 72),
        (proposal.iommu_liveupdate_info, 24),
        (proposal.iommu_hwpt_liveupdate_progress, 72),
        (proposal.iommu_liveupdate_hwpt, 32),
        (proposal.iommu_liveupdate_mismatch, 48),
    ],
)
def test_proposed_structs_have_no_hidden_padding(struct, size):
    assert ctypes.sizeof(struct) == size
    at = 0
    for name, kind in struct._fields_:
        assert getattr(struct, name).offset == at, name
        at += ctypes.sizeof(kind)
    assert at == size


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc: the proposal's layout is checked against C")
def test_proposed_structs_in_c(tmp_path):
    """The same declarations in C give the same offsets: ctypes is not asked to judge itself."""
    names = {ctypes.c_uint32: "uint32_t", ctypes.c_uint64: "uint64_t"}
    lines = ["#include <stdint.h>", "#include <stddef.h>", "#include <stdio.h>"]
    prints, wanted = [], []
    for name, struct in sorted(vars(proposal).items()):
        if not (isinstance(struct, type) and issubclass(struct, ctypes.Structure)):
            continue
        body = " ".join(f"{names[kind]} {field};" for field, kind in struct._fields_)
        lines.append(f"struct {name} {{ {body} }};")
        prints.append(f'printf("%zu\\n", sizeof(struct {name}));')
        wanted.append(ctypes.sizeof(struct))
        for field, _ in struct._fields_:
            prints.append(f'printf("%zu\\n", offsetof(struct {name}, {field}));')
            wanted.append(getattr(struct, field).offset)
    source = tmp_path / "probe.c"
    source.write_text("\n".join([*lines, "int main(void) {", *prints, "return 0; }"]))
    subprocess.run(["gcc", "-o", str(tmp_path / "probe"), str(source)], check=True)
    out = subprocess.run([str(tmp_path / "probe")], check=True, capture_output=True, text=True).stdout
    assert [int(word) for word in out.split()] == wanted
    assert len(wanted) > 40


def test_every_iommu_ioctl_of_the_manifest_has_a_rule():
    wanted = {
        value
        for name, value in MANIFEST["headers"]["iommufd.h"]["constants"].items()
        if name.startswith("IOMMU_") and value >> 8 == 0x3B
    }
    assert set(copy_struct.IOMMU_IOCTLS) == wanted
    luo = MANIFEST["headers"]["liveupdate.h"]["constants"]
    assert set(copy_struct.LIVEUPDATE_IOCTLS) == {value for value in luo.values() if value >> 8 == 0xBA}


def test_import_is_light():
    """Importing the ABI and the clients must not load NumPy (nor anything that does)."""
    code = (
        "import sys, iokeep.uapi.soft, iokeep.uapi.kernel, iokeep.uapi.probe, iokeep.iommufd.client, "
        "iokeep.luo.client; print('numpy' in sys.modules, 'numba' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_modules_import_by_name():
    for name in ("iommufd", "liveupdate", "vfio", "kho", "proposal"):
        assert importlib.import_module(f"iokeep.uapi.{name}").__doc__
