# SPDX-License-Identifier: Apache-2.0
"""Captures: round trips, and everything that a hostile or broken one can be."""

import contextlib
import io
import json
import shutil
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from iokeep.errors import InputError, MemoryAbsent
from iokeep.mem import capture as capture_module
from iokeep.mem.capture import Capture, PageMemory, read_tsv, tsv_lines

DATA = Path(__file__).parents[1] / "data" / "captures"
GOOD = DATA / "vtd-legacy-small"


@pytest.fixture
def copy(tmp_path):
    target = tmp_path / "capture"
    shutil.copytree(GOOD, target)
    return target


def npy(header, body=b"", version=1):
    raw = header if isinstance(header, bytes) else repr(header).encode()
    width = 2 if version == 1 else 4
    return b"\x93NUMPY" + bytes([version, 0]) + len(raw).to_bytes(width, "little") + raw + body


def write_npz(path, members, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, raw in members:
            archive.writestr(name, raw)


def array(a):
    out = io.BytesIO()
    np.save(out, a)
    return out.getvalue()


PA = np.array([0x1000, 0x2000], np.uint64)
PAGE = np.zeros((2, 4096), np.uint8)


def test_real_captures_load():
    for path in sorted(p for p in DATA.iterdir() if p.is_dir()):
        capture = Capture.load(path)
        if path.name.startswith(("vtd-", "luo-")):
            assert capture.format in ("vtdss", "x86_64")
            assert capture.config == {"levels": 3 if "aw39" in path.name else 4}
        assert len(capture.memory.read(capture.root_pa, 4096)) == 4096
        text = "".join(tsv_lines(*capture.truth()))
        assert text == (path / "truth.tsv").read_text()


def test_save_and_load(tmp_path):
    rng = np.random.default_rng(1)
    data = rng.integers(0, 256, (3, 16384), np.uint8)
    pas = np.array([0xC0000, 0x8000, 2**63], np.uint64)
    columns = ([0, 2**64 - 4096], [4095, 2**64 - 1], [2**63, 0])
    truth = (*(np.array(v, np.uint64) for v in columns), np.array([3, 2], np.uint8))
    meta = {"format": "x", "config": {"a": 1}, "root_pa": "0x8000", "kernel": "k"}
    Capture(meta, pas, data).save(tmp_path / "c", truth)
    back = Capture.load(tmp_path / "c")
    assert back.meta == {"schema": "iokeep.capture-v1", **meta}
    assert back.memory.read(0x8000 + 5, 100) == data[1, 5:105].tobytes()
    assert back.memory.read(2**63, 16384) == data[2].tobytes()
    for a, b in zip(back.truth(), truth, strict=True):
        assert a.tolist() == b.tolist()
    with pytest.raises(InputError, match="exists"):
        back.save(tmp_path / "c")


def test_page_memory_is_sparse():
    mem = PageMemory(
        np.array([0x3000, 0x1000, 0x2000, 0x8000], np.uint64),
        np.arange(4 * 4096).reshape(4, -1).astype(np.uint8),
    )
    assert mem.read(0x1FFC, 8) == mem.read(0x1FFC, 4) + mem.read(0x2000, 4)
    for pa, length in ((0, 1), (0x3FFF, 2), (0x4000, 8), (2**64 - 1, 1), (2**64, 1), (-1, 1), (0x7FFF, 2)):
        with pytest.raises(MemoryAbsent):
            mem.read(pa, length)
    assert mem.read(0x1000, 0) == b""
    rows = mem.rows(4096)
    assert rows.index(np.array([0x1000, 0x1FFF, 0x4000, 0x8000, 0, 2**64 - 1], np.uint64)).tolist() == [
        0,
        0,
        -1,
        3,
        -1,
        -1,
    ]
    wide = mem.rows(8192)
    assert wide.index(np.array([0x0, 0x2000, 0x3000, 0x8000], np.uint64)).tolist() == [-1, 0, 0, -1]
    assert wide.data[0].tobytes() == mem.read(0x2000, 8192)
    big = PageMemory(np.array([0x10000], np.uint64), np.zeros((1, 16384), np.uint8))
    assert big.rows(4096).index(np.array([0x10000, 0x13000, 0x14000], np.uint64)).tolist() == [0, 3, -1]
    assert PageMemory(np.zeros(0, np.uint64), np.zeros((0, 4096), np.uint8)).rows(4096).index(
        PA
    ).tolist() == [-1, -1]
    for bad in ([0x1000, 0x1000], [0x1000, 0x2001]):
        with pytest.raises(ValueError):
            PageMemory(np.array(bad, np.uint64), PAGE)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "JSON|column"),
        ("[]", "object"),
        ("{", "line 1"),
        ('{"schema": "iokeep.capture-v1"}', "format"),
        ('{"schema": "iokeep.capture-v2"}', "iokeep.capture-v2"),
        ('{"schema": 7}', "7"),
        ('{"schema": "iokeep.capture-v1", "format": 7, "root_pa": "0x1000"}', "format"),
        ('{"schema": "iokeep.capture-v1", "format": "vtdss", "root_pa": 4096}', "root_pa"),
        ('{"schema": "iokeep.capture-v1", "format": "vtdss", "root_pa": "0x12345678123456789"}', "root_pa"),
        ('{"schema": "iokeep.capture-v1", "format": "vtdss", "root_pa": "-1"}', "root_pa"),
        ('{"schema": "iokeep.capture-v1", "format": "vtdss", "root_pa": "0x1", "config": 5}', "config"),
        ("[" * 100000, "JSON"),
        ("1" * 10000, "JSON"),
        ('{"schema": "\ud800"}'.encode("utf-8", "surrogatepass"), "UTF-8"),
    ],
)  # fmt: skip
def test_bad_meta(copy, text, rule):
    (copy / "meta.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=rule) as info:
        Capture.load(copy)
    assert "meta.json" in info.value.what


def test_absent_parts(copy, tmp_path):
    for path in (tmp_path / "nothing", GOOD / "meta.json"):
        with pytest.raises(InputError, match="directory"):
            Capture.load(path)
    (copy / "truth.tsv").unlink()
    assert not Capture.load(copy).has_truth
    with pytest.raises(InputError, match=r"truth\.tsv"):
        Capture.load(copy).truth()
    (copy / "tables.npz").unlink()
    with pytest.raises(InputError, match=r"tables\.npz"):
        Capture.load(copy)
    (copy / "meta.json").unlink()
    with pytest.raises(InputError, match=r"meta\.json"):
        Capture.load(copy)


DATA_OK = ("data.npy", array(PAGE))


def claim(**fields):
    """A pa.npy with a header of its own."""
    return ("pa.npy", npy({"descr": "<u8", "fortran_order": False, **fields}, bytes(64)))


BAD_TABLES = {
    "not a zip": b"nonsense",
    "empty": b"",
    "no data": [("pa.npy", array(PA))],
    "no pa": [DATA_OK],
    "pa of floats": [("pa.npy", array(PA.astype(float))), DATA_OK],
    "pa of objects": [claim(descr="|O", shape=(2,)), DATA_OK],
    "signed pa": [("pa.npy", array(PA.astype(np.int64))), DATA_OK],
    "big-endian pa": [("pa.npy", array(PA.astype(">u8"))), DATA_OK],
    "two-dimensional pa": [("pa.npy", array(PA.reshape(2, 1))), DATA_OK],
    "flat data": [("pa.npy", array(PA)), ("data.npy", array(PAGE.reshape(-1)))],
    "odd pages": [("pa.npy", array(PA)), ("data.npy", array(PAGE[:, :2048]))],
    "wide data": [("pa.npy", array(PA)), ("data.npy", array(PAGE.view(np.uint64)))],
    "fortran": [("pa.npy", array(PA)), ("data.npy", array(np.asfortranarray(PAGE)))],
    "too few pages": [("pa.npy", array(PA)), ("data.npy", array(PAGE[:1]))],
    "pa twice": [("pa.npy", array(PA[[0, 0]])), DATA_OK],
    "unaligned pa": [("pa.npy", array(PA + np.uint64(8))), DATA_OK],
    "huge claim": [claim(shape=(10**9,)), DATA_OK],
    "huger claim": [claim(shape=(10**30,)), DATA_OK],
    "negative shape": [claim(shape=(-1,)), DATA_OK],
    "no shape": [claim(), DATA_OK],
    "code in the header": [("pa.npy", npy(b"__import__('os')")), DATA_OK],
    "not npy": [("pa.npy", b"xx"), DATA_OK],
    "header cut": [("pa.npy", array(PA)[:9]), DATA_OK],
    "long header": [("pa.npy", npy(b" " * 60000)), DATA_OK],
    "body cut": [("pa.npy", array(PA)[:-1]), DATA_OK],
    "body too long": [("pa.npy", array(PA) + b"x"), DATA_OK],
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_TABLES)
def test_bad_tables(copy, what):
    members = BAD_TABLES[what]
    if isinstance(members, bytes):
        (copy / "tables.npz").write_bytes(members)
    else:
        write_npz(copy / "tables.npz", members)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"tables\.npz"):
            Capture.load(copy)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_member_twice(copy):
    write_npz(copy / "tables.npz", [("pa.npy", array(PA)), ("pa.npy", array(PA)), DATA_OK])
    with pytest.raises(InputError, match="2 members"):
        Capture.load(copy)


def test_a_member_that_lies_about_its_size(copy):
    """The directory of the zip claims 2 TiB: refused before a byte is allocated."""
    write_npz(copy / "tables.npz", [("pa.npy", array(PA)), DATA_OK])
    raw = bytearray((copy / "tables.npz").read_bytes())
    at = raw.rindex(b"PK\x01\x02", 0, raw.rindex(b"data.npy"))
    raw[at + 24 : at + 28] = (0xFFFFFFF0).to_bytes(4, "little")
    (copy / "tables.npz").write_bytes(raw)
    with pytest.raises(InputError, match="more than"):
        Capture.load(copy)


def test_every_truncation_is_refused(copy):
    raw = (copy / "tables.npz").read_bytes()
    for length in range(0, len(raw), 37):
        (copy / "tables.npz").write_bytes(raw[:length])
        with pytest.raises(InputError):
            Capture.load(copy)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10**6), value=st.integers(0, 255))
def test_a_changed_byte_never_crashes(copy, at, value):
    raw = bytearray((GOOD / "tables.npz").read_bytes())
    raw[at % len(raw)] = value
    (copy / "tables.npz").write_bytes(raw)
    with contextlib.suppress(InputError):
        Capture.load(copy)


HEADER = "iova\tpa\tlength\tprot\n"
BAD_TSV = {
    "no header": "0x0\t0x0\t0x1000\trw\n",
    "empty file": "",
    "spaces": HEADER + "0x0 0x0 0x1000 rw\n",
    "five columns": HEADER + "0x0\t0x0\t0x1000\trw\tx\n",
    "bad prot": HEADER + "0x0\t0x0\t0x1000\t--\n",
    "wr": HEADER + "0x0\t0x0\t0x1000\twr\n",
    "decimal": HEADER + "4096\t0x0\t0x1000\trw\n",
    "capitals": HEADER + "0xA000\t0x0\t0x1000\trw\n",
    "length 0": HEADER + "0x0\t0x0\t0x0\trw\n",
    "beyond": HEADER + "0xfffffffffffff000\t0x0\t0x2000\trw\n",
    "pa beyond": HEADER + "0x0\t0xfffffffffffff000\t0x2000\trw\n",
    "overlap": HEADER + "0x0\t0x0\t0x2000\trw\n0x1000\t0x5000\t0x1000\trw\n",
    "backwards": HEADER + "0x5000\t0x0\t0x1000\trw\n0x1000\t0x5000\t0x1000\trw\n",
    "blank line": HEADER + "0x0\t0x0\t0x1000\trw\n\n0x1000\t0x5000\t0x1000\trw\n",
    "17 digits": HEADER + "0x00000000000000000\t0x0\t0x1000\trw\n",
    "no digits": HEADER + "0x\t0x0\t0x1000\trw\n",
    "binary": HEADER + "\x00\x01\n",
    "carriage return": HEADER + "0x0\t0x0\t0x1000\trw\r\n",
    "long line": HEADER + "0x0\t" + "0" * 1000 + "\n",
}


@pytest.mark.parametrize("what", BAD_TSV)
def test_bad_tsv(tmp_path, what):
    path = tmp_path / "x.tsv"
    path.write_bytes(BAD_TSV[what].encode())
    with pytest.raises(InputError, match=r"x\.tsv: line [123]"):
        read_tsv(path)


def test_tsv_corners(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text(HEADER)
    assert [len(c) for c in read_tsv(path)] == [0, 0, 0, 0]
    path.write_text(HEADER + "0x0\t0x0\t0x10000000000000000\trw\n")
    assert [c.tolist() for c in read_tsv(path)] == [[0], [2**64 - 1], [0], [3]]
    path.write_text(HEADER + "0x1000\t0x2000\t0x1000\t-w\n0xffffffffffff0000\t0x0\t0x10000\tr-")
    assert [c.tolist() for c in read_tsv(path)] == [
        [0x1000, 2**64 - 65536],
        [0x1FFF, 2**64 - 1],
        [0x2000, 0],
        [2, 1],
    ]


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    gaps=st.lists(
        st.tuples(st.integers(1, 2**50), st.integers(0, 2**40), st.integers(0, 2**63), st.integers(1, 3)),
        max_size=40,
    ),
    block=st.sampled_from([40, 100, 1 << 22]),
)  # fmt: skip
@example(gaps=[(1, 0, 0, 3)], block=40)
def test_tsv_round_trip_in_blocks_of_any_size(tmp_path, monkeypatch, gaps, block):
    monkeypatch.setattr(capture_module, "_BLOCK", block)
    iova, rows = 0, []
    for gap, length, pa, prot in gaps:
        rows.append((iova + gap - 1, iova + gap - 1 + length, pa, prot))
        iova = rows[-1][1] + 1
    columns = [
        np.array([r[n] for r in rows], t) for n, t in enumerate((np.uint64, np.uint64, np.uint64, np.uint8))
    ]
    path = tmp_path / "x.tsv"
    path.write_text("".join(tsv_lines(*columns)))
    assert [c.tolist() for c in read_tsv(path)] == [c.tolist() for c in columns]


def test_an_error_names_the_line_in_any_block(tmp_path, monkeypatch):
    monkeypatch.setattr(capture_module, "_BLOCK", 64)
    lines = [f"{n << 12:#x}\t0x0\t0x1000\trw\n" for n in range(100)]
    lines[70] = "0x46000\t0x0\t0x1000\tr\n"
    path = tmp_path / "x.tsv"
    path.write_text(HEADER + "".join(lines))
    with pytest.raises(InputError, match="line 72"):
        read_tsv(path)
    lines[70] = lines[69]
    path.write_text(HEADER + "".join(lines))
    with pytest.raises(InputError, match="line 72: iova 0x45000 is not above 0x45fff"):
        read_tsv(path)


def test_meta_survives_a_round_trip(tmp_path):
    good = Capture.load(GOOD)
    good.save(tmp_path / "again", good.truth())
    assert json.loads((tmp_path / "again" / "meta.json").read_text()) == good.meta
    assert (tmp_path / "again" / "truth.tsv").read_bytes() == (GOOD / "truth.tsv").read_bytes()
