# SPDX-License-Identifier: Apache-2.0
"""``table verify``: the translation; apart from it how the table is cut, and whether a switch is hitless."""

import json

import numpy as np
import pytest

from iokeep.cli.main import main
from iokeep.mem.capture import Capture
from iokeep.mem.ram import Ram
from iokeep.pt.build import Table
from iokeep.pt.extents import Extents
from iokeep.pt.registry import open_format

TWO_M = "iova\tpa\tlength\tprot\n0x200000\t0x600000\t0x200000\trw\n"


def table(path, name, config, rows, max_lg2=None):
    fmt, ram = open_format(name, config), Ram.of(1 << 16)
    given = [0x1000]

    def alloc(n, size=4096):
        start = -(-given[0] // size) * size
        given[0] = start + n * size
        return np.uint64(start) + np.arange(n, dtype=np.uint64) * np.uint64(size)

    built = Table.create(fmt, ram, alloc, lambda *_: None)
    built.map(Extents.of(rows), max_lg2)
    meta = {"format": name, "config": config, "root_pa": hex(built.root_pa)}
    pas = np.arange(0, 1 << 16, 4096, dtype=np.uint64)
    Capture(meta, pas, ram.rows(4096).data.copy()).save(path)
    (path / "truth.tsv").write_text(TWO_M)
    return path


@pytest.fixture
def small(tmp_path):
    """2M that a kernel would map by one leaf, mapped by 512."""
    rows = [(0x20_0000, 0x3F_FFFF, 0x60_0000, 3)]
    return table(tmp_path / "small", "arm_lpae_s1", {"input_bits": 39, "output_bits": 40}, rows, 12)


def run(capsys, *words):
    code = main(["table", "verify", *map(str, words)])
    return (code, *capsys.readouterr())


def test_two_verdicts_apart(small, capsys):
    code, out, _ = run(capsys, small)
    assert code == 0
    assert out.splitlines() == [
        "equal: 512 pages (2 MiB) proved, 12 KiB of arm_lpae_s1 tables",
        "layout differs from what a kernel makes: 1 ranges (translations are not affected)",
        "  iova 0x200000-0x3fffff: leaves of 4K, a kernel makes 2M",
        "live switch without break-before-make: level 0 forbids, level 1 forbids, level 2 allows it",
    ]
    code, out, _ = run(capsys, small, "--json")
    document = json.loads(out)
    assert (code, document["equal"], document["layout_equal"], document["layout_of"]) == (
        0,
        True,
        False,
        "kernel",
    )
    assert document["layout"] == [
        {"iova": "0x200000", "last": "0x3fffff", "leaf_bytes_expected": 2 << 20, "leaf_bytes_found": 4096}
    ]
    assert document["bbm"]["allowed_by_level"] == [False, False, True]
    assert document["bbm"]["ranges"] == [
        {
            "iova": "0x200000", "last": "0x3fffff", "kind": "size", "leaf_bytes_found": 4096,
            "leaf_bytes_expected": 2 << 20, "allowed_from_level": 2,
        }
    ]  # fmt: skip


def test_what_counts_for_the_exit_code(small, capsys):
    assert run(capsys, small, "--layout")[0] == 1
    assert [run(capsys, small, "--bbm", level)[0] for level in (0, 1, 2)] == [1, 1, 0]
    assert "level 0 forbids it" in run(capsys, small, "--bbm", 0)[1]


def test_lg2_states_the_sizes(small, tmp_path, capsys):
    expected = tmp_path / "expected.tsv"
    lines = TWO_M.splitlines()
    expected.write_text(f"{lines[0]}\tlg2\n{lines[1]}\t12\n")
    code, out, _ = run(capsys, small, "--against", expected, "--layout", "--bbm", 0, "-j")
    document = json.loads(out)
    assert (code, document["layout_of"], document["layout_equal"]) == (0, "lg2", True)
    expected.write_text(f"{lines[0]}\tattrs\tlg2\n{lines[1]}\tcache\t16\n")
    code, out, _ = run(capsys, small, "--against", expected, "--layout", "--bbm", 1)
    assert code == 1
    assert "leaves of 4K, column lg2 says 64K" in out
    assert "contiguous 4K to 64K" in out


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ("13", "is no leaf size of arm_lpae_s1"),
        ("30", "no multiples of it"),
        ("x", "line 2: lg2 'x' is no log2"),
        ("64", "line 2: lg2 '64' is no log2"),
    ],
)
def test_a_wrong_lg2(small, tmp_path, capsys, column, words):
    expected = tmp_path / "expected.tsv"
    lines = TWO_M.splitlines()
    expected.write_text(f"{lines[0]}\tlg2\n{lines[1]}\t{column}\n")
    code, out, err = run(capsys, small, "--against", expected)
    assert (code, out) == (3, "")
    assert words in err
    expected.write_text(f"{lines[0]}\tlg3\n{lines[1]}\t12\n")
    assert "columns attrs and lg2" in run(capsys, small, "--against", expected)[2]


def test_what_a_kernel_makes_has_no_layout_line(tmp_path, capsys):
    rows = [(0x20_0000, 0x3F_FFFF, 0x60_0000, 3)]
    path = table(tmp_path / "c", "amdv1", {"levels": 3}, rows)
    assert run(capsys, path, "--layout", "--bbm", 0) == (
        0,
        "equal: 512 pages (2 MiB) proved, 8 KiB of amdv1 tables\n"
        "live switch without break-before-make: level 0 allows it\n",
        "",
    )


def test_a_wrong_pa_forbids_the_switch_at_every_level(small, capsys):
    (small / "truth.tsv").write_text(TWO_M.replace("0x600000", "0x800000"))
    code, out, _ = run(capsys, small, "--bbm", 2, "-j")
    document = json.loads(out)
    assert (code, document["equal"]) == (1, False)
    assert document["bbm"]["allowed_by_level"] == [False, False, False]
