# SPDX-License-Identifier: Apache-2.0
"""``iokeep rehearse``: what is asked for, and usage errors before anything runs."""

import json

import pytest

from iokeep.cli.main import build_parser, main
from iokeep.cli.rehearse import options_of
from iokeep.errors import InputError, UsageError
from iokeep.rehearse.inject import Fault


def options(*words):
    return options_of(build_parser("rehearse").parse_args(["rehearse", *words]))


def test_defaults():
    o = options()
    assert (o.policy, o.format, o.memory, o.page_size, o.devices) == ("adopt", "vtdss", 1 << 30, "mixed", 2)
    assert (o.kernel_from, o.kernel_to, o.seed, o.inject, o.unsafe) == ("soft-7.3", "soft-7.4", 1, (), False)


def test_the_command_line_wins_over_the_file(tmp_path):
    spec = tmp_path / "spec.toml"
    spec.write_text(
        'memory = "64M"\npolicy = "rebuild"\ninject = ["pte-bit", "kill-at=replay"]\ndevices = 1\n'
    )
    o = options(str(spec), "--policy", "adopt")
    assert (o.memory, o.policy, o.devices) == (64 << 20, "adopt", 1)
    assert o.inject == (Fault("pte-bit"), Fault("kill-at", "replay"))


@pytest.mark.parametrize(
    ("text", "why"),
    [("memory = 5", "wrong type"), ("colour = 'red'", "unknown key 'colour'"), ("x =", "no TOML"),
     ("devices = true", "wrong type"), ("inject = 'pte-bit'", "wrong type")],
)  # fmt: skip
def test_a_bad_spec_is_bad_input(tmp_path, text, why):
    spec = tmp_path / "spec.toml"
    spec.write_text(text)
    with pytest.raises(InputError, match=why):
        options(str(spec))


def test_no_spec():
    with pytest.raises(InputError, match=r"nowhere\.toml"):
        options("nowhere.toml")


@pytest.mark.parametrize(
    "words",
    [
        ["--memory", "lots"],
        ["--memory", "1M"],
        ["--page-size", "8K"],
        ["--format", "s390_zpci"],
        ["--devices", "0"],
        ["--devices", "99"],
        ["--policy", "hope"],
        ["--policy", "trust"],
        ["--inject", "gremlins"],
        ["--inject", "kill-at=lunch"],
        ["--inject", "kill-at=replay", "--inject", "kill-at=boot"],
        ["--inject", "pte-bit", "--inject", "pte-bit"],
        ["--from", "soft-9.9"],
        ["--to", "linux-7.3"],
        ["--seed", "-1"],
        ["--like", "x", "--memory", "1G"],
    ],
)
def test_usage_errors_come_before_anything_runs(words, capsys):
    assert main(["rehearse", *words]) == 2
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err.startswith("error: ")


def test_trust_says_why_it_is_refused(capsys):
    assert main(["rehearse", "--policy", "trust"]) == 2
    assert "--unsafe" in capsys.readouterr().err


def test_bad_like_is_bad_input(tmp_path, capsys):
    assert main(["rehearse", "--like", str(tmp_path)]) == 3
    assert "meta.json" in capsys.readouterr().err


def test_an_error_is_a_document_with_json(capsys):
    assert main(["rehearse", "--json", "--policy", "hope"]) == 2
    doc = json.loads(capsys.readouterr().out)
    assert doc["schema"] == "iokeep.rehearse-v1"
    assert "hope" in doc["error"]["message"]


def test_too_much_memory_is_a_missing_capability(capsys):
    assert main(["rehearse", "--memory", "8T"]) == 4
    assert "are available" in capsys.readouterr().err


def test_options_that_fit_are_checked():
    with pytest.raises(UsageError, match="one kill-at"):
        options("--inject", "kill-at=replay", "--inject", "kill-at=boot").check()
