# SPDX-License-Identifier: Apache-2.0
"""``iokeep bench run --kernel-source`` where there is no kernel's source, or not what it needs of one.

With one it is tested in vmtest/test_kernel_walk.py, which fetches it.
"""

import json
from pathlib import Path

import jsonschema
import pytest

from iokeep.bench import peers as peers_module
from iokeep.bench.cases import FORMATS
from iokeep.bench.kernel_walk import _FORMATS, KernelSource
from iokeep.cli.main import main

RUN = ["bench", "run", "--size", "8M", "--repeat", "1", "--job", "verify", "--format", "vtdss",
       "--layout", "contiguous", "--tables", "shuffled"]  # fmt: skip
SCHEMA = Path(__file__).parents[2] / "docs/schemas/iokeep.bench-v1.json"


def of(tree, *, version="VERSION = 7\nPATCHLEVEL = 3\nSUBLEVEL = 4\n", generic_pt=True):
    (tree / "Makefile").write_text(f"# SPDX-License-Identifier: GPL-2.0\n{version}EXTRAVERSION =\n")
    if generic_pt:
        (tree / "drivers/iommu/generic_pt").mkdir(parents=True)
        (tree / "drivers/iommu/generic_pt/iommu_pt.h").touch()
    return tree


def test_every_format_that_is_measured_has_a_kernel_side():
    assert set(_FORMATS) == set(FORMATS)


def test_what_is_no_kernel_tree_is_refused_before_anything_is_measured(tmp_path, capsys):
    (tmp_path / "bare").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "old").mkdir()
    for path, why in (
        (tmp_path / "nowhere", "Makefile cannot be read"),
        (tmp_path / "bare", "Makefile cannot be read"),
        (of(tmp_path / "other", version="all:\n"), "names no version"),
        (
            of(tmp_path / "old", version="VERSION = 6\nPATCHLEVEL = 1\nSUBLEVEL = 0\n", generic_pt=False),
            "Linux 6.1.0, without drivers/iommu/generic_pt",
        ),
    ):
        assert main([*RUN, "--kernel-source", str(path)]) == 3
        err = capsys.readouterr().err
        assert str(path) in err
        assert why in err
        assert "unpacked Linux 7.x source" in err


def test_it_is_a_peer_in_c_of_verify(tmp_path, capsys):
    assert main([*RUN, "--no-peers", "--kernel-source", str(of(tmp_path))]) == 2
    assert "--no-peers" in capsys.readouterr().err
    other = ["digest" if word == "verify" else word for word in RUN]
    assert main([*other, "--kernel-source", str(tmp_path)]) == 2
    assert "--job verify" in capsys.readouterr().err


def test_without_a_compiler_a_word_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers_module.shutil, "which", lambda name: None)
    assert main([*RUN, "--kernel-source", str(of(tmp_path))]) == 0
    out = capsys.readouterr().out
    assert "without iova_to_phys of vtdss: no C compiler" in out
    assert "numpy, iova_to_phys" not in out
    assert "compiled with" not in out


def test_source_that_does_not_compile_is_no_error(tmp_path, capsys):
    assert main([*RUN, "--kernel-source", str(of(tmp_path)), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    jsonschema.validate(document, json.loads(SCHEMA.read_text(encoding="utf-8")))
    assert document["kernel_source"]["version"] == "7.3.4"
    assert "failed on Linux 7.3.4" in document["kernel_source"]["missing"]["vtdss"]
    assert "iova_to_phys" not in {row["method"] for row in document["results"]}
    assert {row["speedup"]["iova_to_phys"] for row in document["results"]} == {None}


@pytest.mark.parametrize("twice", [True, False])
def test_a_format_is_compiled_once(tmp_path, monkeypatch, twice):
    calls = []
    monkeypatch.setattr(KernelSource, "_compile", lambda self, name: calls.append(name) or "not here")
    source = KernelSource.at(of(tmp_path))
    for name in ["vtdss", "vtdss" if twice else "amdv1"]:
        assert source.walk(name) is None
    assert calls == (["vtdss"] if twice else ["vtdss", "amdv1"])
    assert source.missing == dict.fromkeys(calls, "not here")
