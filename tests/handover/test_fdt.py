# SPDX-License-Identifier: Apache-2.0
"""FDT reader and writer: against the PyPI library ``fdt``, dtc where there is one, and a real kernel."""

import contextlib
import shutil
import struct
import subprocess

import fdt as other
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iokeep.errors import InputError
from iokeep.handover import fdt

NAMES = st.text("abcdefghijklmnopqrstuvwxyz-,0123456789", min_size=1, max_size=12).filter(
    lambda s: s[0].isalpha()
)
PROPS = st.dictionaries(NAMES, st.binary(max_size=24), max_size=4).map(lambda d: list(d.items()))


def nodes(depth):
    children = (
        st.just([]) if depth == 0 else st.lists(nodes(depth - 1), max_size=3, unique_by=lambda n: n.name)
    )
    return st.builds(fdt.Node, NAMES, PROPS, children)


ROOTS = st.builds(fdt.Node, st.just(""), PROPS, st.lists(nodes(2), max_size=3, unique_by=lambda n: n.name))


@given(ROOTS)
def test_parse_of_build_is_identity(root):
    assert fdt.parse(fdt.build(root)) == root


def from_other(node):
    props = []
    for prop in node.props:
        dtb = prop.to_dtb("", 0, 17)[0]
        length = struct.unpack(">I", dtb[4:8])[0]
        props.append((prop.name, dtb[12 : 12 + length]))
    return fdt.Node("" if node.name == "/" else node.name, props, [from_other(n) for n in node.nodes])


@given(ROOTS)
def test_the_other_library_reads_what_we_build(root):
    def normal(node):
        return (node.name, dict(node.props), sorted((normal(c) for c in node.children), key=lambda c: c[0]))

    parsed = other.parse_dtb(fdt.build(root))
    assert normal(from_other(parsed.root)) == normal(root)


@given(ROOTS)
def test_we_read_what_the_other_library_builds(root):
    blob = other.parse_dtb(fdt.build(root)).to_dtb(version=17)

    def normal(node):
        return (node.name, dict(node.props), sorted((normal(c) for c in node.children), key=lambda c: c[0]))

    assert normal(fdt.parse(blob)) == normal(root)


@pytest.mark.skipif(shutil.which("dtc") is None, reason="no dtc command: apt install device-tree-compiler")
@given(ROOTS)
def test_dtc_reads_what_we_build_and_we_read_what_it_writes(root):
    blob = fdt.build(root)
    done = subprocess.run(
        ["dtc", "-I", "dtb", "-O", "dtb", "-f", "-q", "-q"],
        input=blob,
        capture_output=True,
        check=True,
        timeout=60,
    )
    assert fdt.parse(done.stdout) == root


def test_the_kernels_blob(capture):
    page = capture.memory.read(capture.fdt_pa, 4096)
    root = fdt.parse(page)
    assert root.text("compatible") == "kho-v4"
    assert root.u64("preserved-memory-map") % 4096 == 0
    assert [n.name for n in root.children][-2:] == ["LUO", "kexec-metadata"]  # newest first
    assert any(page[fdt.total_size(page, "") :])  # what libfdt left behind totalsize is not zero


GOOD = fdt.build(fdt.Node("", [("compatible", b"kho-v4\0")], [fdt.Node("LUO", [("blob-size", bytes(8))])]))


@pytest.mark.parametrize(
    ("at", "value", "why"),
    [
        (0, 0, "magic"),
        (4, 1 << 20, "totalsize"),
        (4, 8, "totalsize"),
        (8, 57, "structure or strings"),
        (12, 1 << 30, "structure or strings"),
        (20, 15, "version"),
        (24, 18, "version"),
        (32, 4, "string"),
        (36, 4, "ends early|does not end"),
        (56, 7, "unknown token"),
        (56, 2, "END_NODE without"),
        (56, 3, "outside of a node|reaches beyond"),
        (56, 9, "no root node"),
        (68, 1 << 31, "reaches beyond"),
        (72, 1 << 31, "outside of the strings"),
    ],
)
def test_each_broken_word_is_named(at, value, why):
    blob = bytearray(GOOD)
    blob[at : at + 4] = struct.pack(">I", value)
    with pytest.raises(InputError, match=why):
        fdt.parse(bytes(blob))


@given(
    st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=6),
    st.integers(0, len(GOOD)),
)
def test_mutated_blobs_parse_or_are_refused(changes, cut):
    blob = bytearray(GOOD)
    for at, value in changes:
        blob[at] = value
    for data in (bytes(blob), bytes(blob[:cut])):
        with contextlib.suppress(InputError):
            fdt.parse(data)


def test_deep_nesting_is_refused():
    words = [struct.pack(">I", 1) + bytes(4)] * 1000
    strukt = b"".join(words)
    blob = struct.pack(
        ">10I", 0xD00DFEED, 56 + len(strukt), 56, 56 + len(strukt), 40, 17, 16, 0, 0, len(strukt)
    )
    with pytest.raises(InputError, match="levels"):
        fdt.parse(blob + bytes(16) + strukt)
