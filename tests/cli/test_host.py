# SPDX-License-Identifier: Apache-2.0
"""``iokeep host`` from the command line: text, JSON by its schema, exit codes."""

import json
import os
import subprocess
from pathlib import Path

import jsonschema
import pytest

from iokeep.cli.main import main

SCHEMAS = Path(__file__).parents[2] / "docs/schemas"


def document(capsys, *arguments):
    code = main(["host", *map(str, arguments), "--json"])
    found = json.loads(capsys.readouterr().out)
    name = "error" if "error" in found else found["schema"]
    jsonschema.Draft202012Validator(json.loads((SCHEMAS / f"{name}.json").read_text())).validate(found)
    return code, found


@pytest.fixture
def ram():
    fd = os.memfd_create("vm\x1b[2J", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096)
    yield fd
    os.close(fd)


def test_doctor_on_this_machine(capsys):
    code, found = document(capsys, "doctor")
    assert code == (4 if found["missing"] else 0)
    assert found["abilities"]["rehearse"] is True
    assert main(["host", "doctor"]) == code
    out = capsys.readouterr().out
    assert out.startswith(f"Linux {found['release']}\n")
    assert "can      rehearse" in out
    for check in found["checks"]:
        assert check["found"] in out


def test_doctor_without_an_iommu(capsys, tmp_path):
    code, found = document(capsys, "doctor", "--root", tmp_path)
    assert code == 4
    assert found["checks"][0]["name"] == "IOMMU"
    assert found["missing"] >= 5
    main(["host", "doctor", "--root", str(tmp_path)])
    out = capsys.readouterr().out
    assert "MISSING  IOMMU" in out
    assert "-> turn it on in the firmware" in out
    assert "cannot   keep devices translating over a kexec" in out


def test_preflight_of_descriptors(capsys, ram):
    code, found = document(capsys, "preflight", "--fd", f"self:{ram}=0x10", f"{os.getpid()}:{ram}=17")
    assert code == 1
    first, second = found["files"]
    assert (first["kind"], first["token"], second["token"]) == ("memfd", "0x10", "0x11")
    assert second["problems"][0]["errno"] == "EBUSY"
    assert main(["host", "preflight", "--fd", f"self:{ram}"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.endswith("the session would be preserved\n")


def test_preflight_of_a_process(capsys, ram):
    code, found = document(capsys, "preflight", "--pid", os.getpid())
    assert ram in [file["fd"] for file in found["files"]]
    assert code == (0 if found["preserves"] else 1)


def test_preflight_of_a_process_that_has_nothing(capsys):
    child = subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL)
    try:
        code, found = document(capsys, "preflight", "--pid", child.pid)
        assert (code, found["preserves"], found["files"]) == (1, False, [])
        assert main(["host", "preflight", "--pid", str(child.pid)]) == 1
        assert capsys.readouterr().out.endswith("an empty session would be preserved\n")
    finally:
        child.kill()
        child.wait()


def test_preflight_with_a_name(capsys, ram):
    assert main(["host", "preflight", "--fd", f"self:{ram}", "--name", "x" * 64]) == 1
    out = capsys.readouterr().out
    assert "refused (EINVAL): a session name" in out
    assert out.endswith("refused for 1 reason\n")


@pytest.mark.parametrize("text", ["1", "1:", "a:1", "1:2=x", "1:2=0x10000000000000000", "-1:2"])
def test_no_descriptor(capsys, text):
    assert main(["host", "preflight", f"--fd={text}"]) == 2


def test_no_such_process(capsys, tmp_path):
    code, found = document(capsys, "preflight", "--pid", 4711, "--root", tmp_path)
    assert code == 4
    assert found["error"]["kind"] == "capability"


def test_usage(capsys):
    assert main(["host"]) == 2
    assert main(["host", "preflight"]) == 2
