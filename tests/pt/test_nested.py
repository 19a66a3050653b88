# SPDX-License-Identifier: Apache-2.0
"""Two-dimensional translation against a plain composition, in pairs of formats; and what goes wrong in it."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from table_support import rows_of

from iokeep.errors import InputError, MemoryAbsent
from iokeep.mem.capture import PageMemory
from iokeep.pt import nested as nested_module
from iokeep.pt.extents import Extents
from iokeep.pt.nested import Nested, StageTwoFault
from iokeep.pt.registry import open_format
from iokeep.pt.walk import walk

PAIRS = [
    (("x86_64", {}), ("vtdss", {})),
    (("x86_64", {"levels": 5}), ("vtdss", {"levels": 3})),
    (("x86_64", {}), ("amdv1", {"levels": 4})),
    (("x86_64", {"sign_extend": 0}), ("amdv1", {"levels": 3})),
    (("arm_lpae_s1", {"granule": 4096}), ("arm_lpae_s2", {"granule": 4096, "input_bits": 40})),
    (("arm_lpae_s1", {"granule": 4096}), ("arm_lpae_s2", {"granule": 65536, "input_bits": 44})),
    (
        ("arm_lpae_s1", {"granule": 65536, "input_bits": 42}),
        ("arm_lpae_s2", {"granule": 4096, "input_bits": 40}),
    ),
    (
        ("arm_lpae_s1", {"granule": 16384, "input_bits": 47, "ttbr": 1}),
        ("arm_lpae_s2", {"granule": 16384, "input_bits": 40}),
    ),
    (("riscv64", {"levels": 3}), ("riscv64", {"levels": 3, "stage": 2})),
    (("riscv64", {"levels": 4}), ("riscv64", {"levels": 5, "stage": 2})),
    (("vtdss", {}), ("x86_64", {})),
    (("s390_zpci", {"levels": 3}), ("vtdss", {})),
    (("arm_v7s", {}), ("arm_lpae_s2", {"granule": 4096, "input_bits": 40})),
]
FORMATS = [(open_format(*a), open_format(*b)) for a, b in PAIRS]
IDS = [f"{a.name}-under-{b.name}-{n}" for n, (a, b) in enumerate(FORMATS)]

HOST = 1 << 31
OUTPUT = 1 << 34


def page_bytes(ram, pa):
    return bytes(ram.bytes[pa : pa + 4096])


class Guest:
    """Tables of stage 1 at gpas 0 ..., and the memory that stage 2 makes them lie in.

    :param one: extents of stage 1, iova -> gpa. :param frames: order of the host's pages, by guest page.
    :param data: extents of stage 2 for gpas above the tables. :param holes: guest pages not mapped.
    """

    def __init__(self, pair, new_table, one, data, rng=None, holes=(), prot=None, patch=None):
        self.fmt, self.fmt_two = pair
        self.one = new_table(self.fmt, size=1 << 20, seed=int(rng.integers(1 << 30)) if rng else None)
        self.one.table.map(one)
        self.two = new_table(self.fmt_two, size=2 << 20)
        ram = self.one.ram
        unit = max(1 << self.fmt_two.levels[0].shift, 4096)
        units = ram.size // unit
        order = rng.permutation(units) if rng else np.arange(units)[::-1]
        self.holes = set(holes)
        self.unit = unit
        rows = [
            (g * unit, g * unit + unit - 1, HOST + int(order[g]) * unit, (prot or {}).get(g, 3))
            for g in range(units)
            if g not in self.holes
        ]
        self.two.table.map(Extents.of(rows + data))
        self.host = {pa: page_bytes(self.two.ram, pa) for pa in range(0, self.two.ram.size, 4096)}
        self.host_of = {}
        for first, last, pa, _ in rows:
            for offset in range(0, last - first + 1, 4096):
                self.host_of[first + offset] = pa + offset
                self.host[pa + offset] = page_bytes(ram, first + offset)
        self.guest = {g: page_bytes(ram, g) for g in self.host_of}
        if patch:
            patch(self)

    def memory(self):
        return memory_of(self.host)

    def nested(self, memory=None):
        root = self.one.table.root_pa
        mem = memory or self.memory()
        return Nested(self.fmt, root, self.fmt_two, self.two.table.root_pa, mem)

    def set_item(self, level, iova, item):
        """Overwrite the item of stage 1 that ``iova`` uses at ``level``, in host memory."""
        found = walk(self.fmt, self.one.ram, self.one.table.root_pa, iova)
        gpa = next(at for n, at, _ in found.steps if n == level)
        raw = bytearray(self.host[self.host_of[gpa & -4096]])
        size = self.fmt.item_bytes
        order = "little" if self.fmt.byte_order == "<" else "big"
        value = item ^ self.fmt.levels[level].invert
        raw[gpa & 4095 : (gpa & 4095) + size] = value.to_bytes(size, order)
        self.host[self.host_of[gpa & -4096]] = bytes(raw)


def memory_of(pages):
    pas = np.array(sorted(pages), np.uint64)
    data = np.frombuffer(b"".join(pages[pa] for pa in sorted(pages)), np.uint8).reshape(-1, 4096)
    return PageMemory(pas, data)


def compose(pair, guest_memory, root_gpa, host_memory, root_pa, iovas):
    """Page by page in plain Python: stage 1 in a copy of guest-physical memory, then stage 2 -> rows."""
    fmt, fmt_two = pair
    out = []
    for iova in iovas:
        one = walk(fmt, guest_memory, root_gpa, iova)
        if one.pa is None:
            continue
        two = walk(fmt_two, host_memory, root_pa, one.pa)
        prot = one.prot & two.prot
        if two.pa is None or not prot:
            continue
        if out:
            a, z, p, q = out[-1]
            if z + 1 == iova and p + (iova - a) == two.pa and q == prot:
                out[-1] = (a, iova + 4095, p, q)
                continue
        out.append((iova, iova + 4095, two.pa, prot))
    return out


def high_bits(fmt):
    """Where tests put their IOVAs: both ends of what the format covers."""
    if fmt.iova_base:
        return [fmt.iova_base, 2**64 - (1 << 24)]
    if fmt.sign_extend:
        return [0, 2**64 - (1 << 24)]
    return [0, (1 << fmt.input_lg2) - (1 << 24)]


def unit_of(fmt):
    return 1 << fmt.levels[0].shift


@st.composite
def mappings(draw, fmt, fmt_two):
    """Extents of stage 1, and of stage 2 above the tables: gpas that stage 1 knows, and that it does not."""
    u, v = unit_of(fmt), unit_of(fmt_two)
    big = max(u, v)
    data = []
    gpa = 64 << 20
    for _ in range(draw(st.integers(1, 6))):
        gpa += big * draw(st.integers(0, 3))
        size = v * draw(st.integers(1, 5)) if v < big else v
        pa = OUTPUT + v * draw(st.integers(0, 255))
        data.append((gpa, gpa + size - 1, pa, draw(st.sampled_from([1, 2, 3]))))
        gpa = -(-(gpa + size) // big) * big
    end = gpa + 4 * big
    one = []
    for base in high_bits(fmt):
        iova = base
        for _ in range(draw(st.integers(0, 5))):
            iova += u * draw(st.integers(0, 3))
            size = u * draw(st.integers(1, 6))
            at = draw(st.integers((64 << 20) // u, end // u)) * u
            one.append((iova, iova + size - 1, at, draw(st.sampled_from([1, 2, 3]))))
            iova += size
    return one, sorted(data)


def pages_of(rows):
    return [iova for a, z, _, _ in rows for iova in range(a, z, 4096)]


@pytest.mark.parametrize("pair", FORMATS, ids=IDS)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_both_stages_are_their_composition(pair, new_table, data):
    fmt, fmt_two = pair
    one, two = data.draw(mappings(fmt, fmt_two))
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    guest = Guest(pair, new_table, Extents.of(one), two, rng)
    host = guest.memory()
    nested = guest.nested(host)
    root, root_two = guest.one.table.root_pa, guest.two.table.root_pa
    want = compose(pair, memory_of(guest.guest), root, host, root_two, sorted(pages_of(one)))
    found, problems = nested.extents()
    assert rows_of(found) == want
    assert len(problems) == 0
    verdict = nested.verify(Extents.of(want))
    assert verdict.equal, verdict.mismatches
    assert verdict.pages == sum(z - a + 1 for a, z, _, _ in want) >> 12
    translated = {}
    for a, z, p, q in want:
        translated.update({iova: (p + iova - a, q) for iova in range(a, z, 4096)})
    for iova in sorted(pages_of(one))[:40]:
        path = nested.walk(iova + 8)
        pa, prot = translated.get(iova, (None, 0))
        assert (path.pa, path.prot) == (None if pa is None else pa + 8, prot)
        assert (path.why == "") == (path.stage == 0) == (pa is not None)
        assert [s.level for s in path.steps] == sorted((s.level for s in path.steps), reverse=True)
        for step in path.steps:
            assert step.fetch.pa == guest.host_of[step.gpa & -4096] + (step.gpa & 4095)
    if want:  # one page that is expected elsewhere, and one that is not expected
        a, z, p, q = want[-1]
        wrong = nested.verify(Extents.of([*want[:-1], (a, z, p ^ (1 << 20), q)]))
        assert [(m.reason, m.iova, m.last) for m in wrong.mismatches] == [("pa", a, z)]
        wrong = nested.verify(Extents.of(want[:-1]))
        assert wrong.differ == {"extra": (z - a + 1) >> 12}


def simple(fmt, fmt_two):
    """One mapping through both stages at iova ``base``, data at gpa 64 MiB."""
    u = max(unit_of(fmt), unit_of(fmt_two))
    base = high_bits(fmt)[0]
    one = Extents.of([(base, base + 2 * u - 1, 64 << 20, 3)])
    two = [(64 << 20, (64 << 20) + 2 * u - 1, OUTPUT, 3)]
    return base, one, two, u


@pytest.mark.parametrize("pair", FORMATS, ids=IDS)
def test_a_table_that_stage_two_does_not_map(pair, new_table):
    fmt, fmt_two = pair
    base, one, two, u = simple(fmt, fmt_two)
    whole = Guest(pair, new_table, one, two)
    path = whole.nested().walk(base)
    assert path.why == ""
    leaf_gpa = path.steps[-1].gpa
    if path.steps[0].gpa // whole.unit == leaf_gpa // whole.unit:
        pytest.skip("the root and the leaf's table lie in one page of stage 2")
    guest = Guest(pair, new_table, one, two, holes=[leaf_gpa // whole.unit])
    nested = guest.nested()
    path = nested.walk(base)
    assert (path.stage, path.pa) == (2, None)
    assert path.steps[-1].item is None
    for word in ("stage 2", f"level {path.steps[-1].level}", f"gpa {leaf_gpa:#x}", f"iova {base:#x}"):
        assert word in path.why
    with pytest.raises(StageTwoFault) as info:
        nested.extents()
    assert info.value.gpa // whole.unit == leaf_gpa // whole.unit
    expected = Extents.of([(base, base + 2 * u - 1, OUTPUT, 3)])
    verdict = nested.verify(expected)
    assert not verdict.equal
    assert set(verdict.differ) == {"absent"}
    assert "stage 2" in verdict.mismatches[0].text
    # read permission is what fetches need
    if fmt_two.write_only:
        guest = Guest(pair, new_table, one, two, prot={leaf_gpa // whole.unit: 2})
        assert "may not be read" in guest.nested().walk(base).why
        with pytest.raises(StageTwoFault, match="may not be read"):
            guest.nested().extents()


@pytest.mark.parametrize("pair", FORMATS, ids=IDS)
def test_a_root_that_stage_two_does_not_map(pair, new_table):
    base, one, two, _ = simple(*pair)
    whole = Guest(pair, new_table, one, two)
    root = whole.one.table.root_pa
    guest = Guest(pair, new_table, one, two, holes=[root // whole.unit])
    path = guest.nested().walk(base)
    assert path.stage == 2
    for job in (guest.nested().extents, lambda: guest.nested().verify(one)):
        with pytest.raises(StageTwoFault, match="root table at gpa") as info:
            job()
        assert info.value.exit_code == 3
    size = pair[0].root_bytes
    if size > whole.unit:  # the root's second half
        guest = Guest(pair, new_table, one, two, holes=[(root + size - 1) // whole.unit])
        with pytest.raises(StageTwoFault, match="root table at gpa"):
            guest.nested().extents()


@pytest.mark.parametrize("pair", FORMATS, ids=IDS)
def test_an_output_that_stage_two_does_not_map(pair, new_table):
    base, one, two, u = simple(*pair)
    first, _, pa, prot = two[0]
    guest = Guest(pair, new_table, one, [(first, first + u - 1, pa, prot)])
    nested = guest.nested()
    path = nested.walk(base + u)
    assert (path.stage, path.gpa, path.pa) == (2, first + u, None)
    assert path.output is not None
    assert f"gpa {first + u:#x}" in path.why
    assert f"iova {base + u:#x}" in path.why
    assert rows_of(nested.extents()[0]) == [(base, base + u - 1, pa, prot)]
    verdict = nested.verify(Extents.of([(base, base + 2 * u - 1, pa, prot)]))
    assert verdict.differ == {"missing": u >> 12}
    assert f"stage 2: gpa {first + u:#x}" in verdict.mismatches[0].text


X86 = FORMATS[0]


def chained(new_table, patch):
    base, one, two, u = simple(*X86)
    guest = Guest(X86, new_table, one, two, patch=patch)
    expected = Extents.of([(base, base + 2 * u - 1, OUTPUT, 3)])
    return guest, guest.nested(), expected


def test_a_stage_one_loop_by_gpa(new_table):
    def patch(guest):
        guest.set_item(1, 0, guest.one.table.root_pa | 0x227)

    _, nested, expected = chained(new_table, patch)
    with pytest.raises(InputError, match="serves at a higher level"):
        nested.extents()
    verdict = nested.verify(expected)
    assert set(verdict.differ) == {"loop"}
    assert "stage 1" in verdict.mismatches[0].text


def test_a_loop_by_another_gpa_of_the_same_page(new_table):
    """Stage 2 maps two gpas to one page, and stage 1 comes by the other one."""
    base, one, two, u = simple(*X86)
    plain = Guest(X86, new_table, one, two)
    root_host = plain.host_of[plain.one.table.root_pa]
    other = 96 << 20
    two = [*two, (other, other + 4095, root_host, 3)]
    guest = Guest(X86, new_table, one, two, patch=lambda g: g.set_item(1, 0, other | 0x227))
    nested = guest.nested()
    with pytest.raises(InputError, match="serves at a higher level, or in the other stage"):
        nested.extents()
    verdict = nested.verify(Extents.of([(base, base + 2 * u - 1, OUTPUT, 3)]))
    assert set(verdict.differ) == {"loop"}


def test_a_stage_one_table_that_is_a_table_of_stage_two(new_table):
    base, one, two, u = simple(*X86)
    other = 96 << 20
    root_two = Guest(X86, new_table, one, two).two.table.root_pa
    two = [*two, (other, other + 4095, root_two, 3)]
    guest = Guest(X86, new_table, one, two, patch=lambda g: g.set_item(1, 0, other | 0x227))
    verdict = guest.nested().verify(Extents.of([(base, base + 2 * u - 1, OUTPUT, 3)]))
    assert set(verdict.differ) == {"loop"}
    nested = Nested(X86[0], other, X86[1], root_two, guest.memory())
    with pytest.raises(InputError, match="a table of stage 2"):
        nested.extents()


def test_reserved_bits_of_either_stage(new_table):
    base, one, two, u = simple(*X86)
    expected = Extents.of([(base, base + 2 * u - 1, OUTPUT, 3)])
    guest = Guest(X86, new_table, one, two, patch=lambda g: g.set_item(1, 0, 1 << 13 | 0xE7))
    verdict = guest.nested().verify(expected)
    assert set(verdict.differ) == {"reserved"}
    assert "stage 1" in verdict.mismatches[0].text
    path = guest.nested().walk(base)
    assert (path.stage, path.level) == (1, 1)

    def bad_two(guest):
        found = walk(guest.fmt_two, guest.two.ram, guest.two.table.root_pa, 64 << 20)
        _, at, item = found.steps[1]
        raw = bytearray(guest.host[at & -4096])
        raw[at & 4095 : (at & 4095) + 8] = (item | 1 << 11).to_bytes(8, "little")
        guest.host[at & -4096] = bytes(raw)

    guest = Guest(X86, new_table, one, two, patch=bad_two)
    with pytest.raises(StageTwoFault):  # that item is above the gpas of the tables, too
        guest.nested().extents()

    def bad_leaf(guest):
        found = walk(guest.fmt_two, guest.two.ram, guest.two.table.root_pa, 64 << 20)
        _, at, item = found.steps[-1]
        raw = bytearray(guest.host[at & -4096])
        raw[at & 4095 : (at & 4095) + 8] = (item | 1 << 62).to_bytes(8, "little")
        guest.host[at & -4096] = bytes(raw)

    guest = Guest(X86, new_table, one, two, patch=bad_leaf)
    verdict = guest.nested().verify(expected)
    assert set(verdict.differ) == {"attrs"}
    assert verdict.mismatches[0].text.endswith("(stage 2)")
    found, problems = guest.nested().extents()
    assert rows_of(found) == rows_of(expected)
    assert problems.stage.tolist() == [2]


def test_memory_that_is_not_there_is_named(new_table):
    base, one, two, _ = simple(*X86)
    guest = Guest(X86, new_table, one, two)
    path = guest.nested().walk(base)
    pages = dict(guest.host)
    del pages[path.steps[-1].fetch.pa & -4096]
    nested = guest.nested(memory_of(pages))
    with pytest.raises(MemoryAbsent, match="stage-1 item at gpa"):
        nested.walk(base)
    with pytest.raises(MemoryAbsent, match="stage-1 item at gpa"):
        nested.extents()
    assert set(nested.verify(one).differ) == {"absent"}


def test_permissions_of_both(new_table):
    fmt, fmt_two = X86
    u = 4096
    one = Extents.of([(n * u, n * u + u - 1, (64 << 20) + n * u, p) for n, p in enumerate((1, 3, 1, 3, 1))])
    two = [
        ((64 << 20) + n * u, (64 << 20) + n * u + u - 1, OUTPUT + n * u, p)
        for n, p in enumerate((3, 1, 2, 2, 1))
    ]
    nested = Guest((fmt, fmt_two), new_table, one, two).nested()
    found = nested.extents()[0]
    got = {int(a): int(q) for a, q in zip(found.iova, found.prot, strict=True)}
    assert got == {0: 1, 0x3000: 2, 0x4000: 1}
    assert "no permission is left" in nested.walk(0x2000).why


def test_many_iovas_of_few_gpas_stay_bounded(new_table, monkeypatch):
    """Every item of stage 1 maps the same gpas, which stage 2 has in many pieces."""
    monkeypatch.setattr(nested_module, "ALIAS_LIMIT", 1 << 14)
    big = 2 << 20
    one = Extents.of([(n * big, n * big + big - 1, 64 << 20, 3) for n in range(300)])
    two = [((64 << 20) + n * 4096, (64 << 20) + n * 4096 + 4095, OUTPUT + n * 8192, 3) for n in range(512)]
    nested = Guest(X86, new_table, one, two).nested()
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="so often"):
            nested.extents()
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("pair", FORMATS, ids=IDS)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_random_bytes_as_tables(pair, new_table, seed):
    """Never a crash, a hang or unbounded memory: an answer, or an InputError."""
    rng = np.random.default_rng(seed)
    base, one, two, _ = simple(*pair)
    guest = Guest(pair, new_table, one, two, rng)
    for pa in [*list(guest.host_of.values())[:64], *list(guest.host)[:16]]:
        raw = np.frombuffer(guest.host[pa], np.uint8).copy()
        where = rng.integers(0, 4096, 24)
        raw[where] = rng.integers(0, 256, 24)
        guest.host[pa] = raw.tobytes()
    try:
        nested = guest.nested()
        verdict = nested.verify(one)
        found, _ = nested.extents()
        nested.walk(base)
    except InputError:
        return
    assert len(found) >= 0
    assert verdict.total >= 0
