# SPDX-License-Identifier: Apache-2.0
"""What people read: figures with units, a table that lines up, progress only where somebody watches."""

import io
import json

import pytest

from iokeep.report.json import document, hexed
from iokeep.report.text import Progress, count, duration, mismatch, rehearsal, size, table

DOC = {
    "policy": "adopt", "outcome": "restored", "reason": "", "seed": 1,
    "kernels": {"from": "soft-7.3", "to": "soft-7.4"},
    "guest": {"name": "vm-1", "ram": 1 << 30, "page_size": "mixed", "format": "vtdss", "devices": 2,
              "files": 4, "areas": 7},
    "injected": [],
    "dma": {"transactions": 2417332, "bytes": 1, "lost": 0, "misdirected": 0, "faults": 0, "max_gap_us": 38.2,
            "during_kexec": 412003, "denied": 77, "leaks": 0},
    "timeline": [
        {"step": "preserve", "start_ms": 0.0, "ms": 4.1, "transactions": 5000, "max_gap_us": 12.0},
        {"step": "validate", "start_ms": 9.0, "ms": 0.1, "transactions": 0, "max_gap_us": 0.0},
    ],
    "restore": {"pages": 262656, "areas": 5, "table_bytes": 4096, "ms": 0.1, "ns_per_page": 0.36,
                "mismatches": []},
    "frames": {"leaked": 0, "wrongly_freed": 0},
}  # fmt: skip


def test_figures():
    assert count(412003) == "412 003"
    assert [size(1 << 30), size(3 << 19), size(17)] == ["1 GiB", "1.5 MiB", "17 B"]
    assert [duration(0.038), duration(4.1), duration(1234)] == ["38 us", "4.1 ms", "1.23 s"]
    assert table([["a", "1"], ["bbb", "22"]], right=(1,)) == ["a     1", "bbb  22"]


def test_the_table_of_a_good_run():
    out = rehearsal(DOC)
    assert out.startswith(
        "vm-1: 1 GiB in 4K and 2M pages, vtdss, 2 devices   soft-7.3 -> soft-7.4   policy adopt\n"
    )
    assert "262 656 pages, 0 differences, 0.36 ns/page" in out
    assert (
        "restored: 2 417 332 DMA transactions, 0 lost, 0 misdirected, longest gap 38 us; 0 frames leaked"
        in out
    )
    assert "5 000 DMA, gap 12 us" in out
    assert out.endswith("0 wrongly freed\n")


def test_a_compile_is_shown_as_such():
    assert "compile" not in rehearsal(DOC)
    assert "  compile   6.21 s  the DMA engine, once per machine\n" in rehearsal(
        {**DOC, "compile_ms": 6210.0}
    )


def test_the_table_of_a_refused_run_names_the_place():
    m = {"iova": "0x1000", "last": "0x1fff", "expected_pa": "0x5000", "expected_prot": "rw", "found_pa": None,
         "found_prot": None, "reason": "missing"}  # fmt: skip
    doc = {**DOC, "outcome": "refused", "reason": "the tables differ", "next": "try this"}
    doc["restore"] = {**DOC["restore"], "mismatches": [m], "total_mismatches": 12}
    doc["injected"] = [{"fault": "drop-area", "what": "left out", "iova": "0x1000"}]
    out = rehearsal(doc)
    assert "12 differences" in out
    assert "iova 0x1000-0x1fff: expected pa 0x5000 rw, found nothing (missing)" in out
    assert "... 12 in all" in out
    assert "injected drop-area: left out" in out
    assert "why: the tables differ\nnext: try this\n" in out


def test_a_mismatch_of_one_place():
    assert (
        mismatch({"iova": "0x0", "last": "0x0", "reason": "root"})
        == "iova 0x0: expected nothing, found nothing (root)"
    )
    shape = {"iova": "0x0", "last": "0x1fffff", "reason": "loop"}
    assert mismatch(shape) == "iova 0x0-0x1fffff: the tables are not fit to be adopted (loop)"
    assert mismatch({**shape, "reason": "span"}) == (
        "iova 0x0-0x1fffff: one leaf crosses the edge of an area (span)"
    )


class Tty(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_for_a_tty_only():
    off, on = io.StringIO(), Tty()
    for stream in (off, on):
        p = Progress(stream)
        p.say("boot")
        p.say("x")
        p.done()
    assert off.getvalue() == ""
    assert on.getvalue() == "\rboot\rx   \r \r"
    assert Progress(Tty(), quiet=True).say("x") is None


def test_json():
    assert hexed(None) is None
    assert hexed(2**64 - 1) == "0xffffffffffffffff"
    text = document("iokeep.x-v1", {"a": 1})
    assert text.endswith("}\n")
    assert list(json.loads(text)) == ["schema", "a"]
    with pytest.raises(ValueError):
        document("iokeep.x-v1", {"a": float("nan")})


@pytest.mark.parametrize(("policy", "words"), [("deferred", ()), ("sealed", ("the digest that was sealed",))])
def test_what_is_proved_later(policy, words):
    steps = [{**DOC["timeline"][0], "step": s} for s in ("validate", "adopt", "teardown")]
    m = {"iova": "0x1000", "last": "0x1fff", "expected_pa": "0x5000", "expected_prot": "rw",
         "found_pa": "0x6000", "found_prot": "rw", "reason": "pa"}  # fmt: skip
    doc = {**DOC, "policy": policy, "outcome": "contained", "reason": "quarantined", "timeline": steps}
    doc["restore"] = {**DOC["restore"], "mismatches": [m], "total_mismatches": 1}
    out = rehearsal(doc)
    for text in (
        *words,
        "each range proved before its use",
        "unmaps all but what is quarantined",
        "contained: ",
    ):
        assert text in out
    digest = {**m, "reason": "digest"}
    assert mismatch(digest) == "the areas are not those whose translations were sealed (digest)"
