# SPDX-License-Identifier: Apache-2.0
"""AMD-Vi device table: entries of running kernels, encode and find, damage, noise."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iokeep.pt.roots import amd
from iokeep.pt.roots.amd import FaultReason, RootFault, find_root

TABLE, GCR3, GCR3_LOW, TOP = 0x4000, 0x20_0000, 0x20_1000, 0x20_2000
REGISTER = amd.device_table_register(TABLE, 0x20_0000 - 0x4000 & ~0xFFF)
DEVICE = 0x20
DTE = TABLE + DEVICE * 32

#: Linux 7.3.4, QEMU amd-iommu: captures amdv1-contigmix, amdv1-tr-mixed, amdv1-tr-small
LINUX_DTES = [
    ((0x6000000100BFB603, 0x8, 0, 0), 0x100BFB000, 3, 8),
    ((0x600000000AF53803, 0x8, 0, 0), 0xAF53000, 4, 8),
    ((0x600000000A5E3803, 0x8, 0, 0), 0xA5E3000, 4, 8),
]


@pytest.fixture(scope="module")
def machine(new_ram):
    """(dte, gcr3 entries) -> RAM with them; always the same RAM, cleaned where entries were."""
    ram = new_ram(0x21_0000)

    def build(dte, device=DEVICE, entries=()):
        ram.write(TABLE, bytes(0x20_0000 - TABLE))
        ram.write(GCR3, bytes(0x2000))
        ram.put(TABLE + device * 32, dte)
        for pa, word in entries:
            ram.put(pa, [word])
        return ram

    return build


@pytest.mark.parametrize(("words", "root_pa", "levels", "domain"), LINUX_DTES)
def test_entries_that_linux_wrote(machine, words, root_pa, levels, domain):
    assert amd.dte_host(root_pa, levels, domain) == words
    found = find_root(machine(words), REGISTER, DEVICE)
    assert (found.translation, found.format, dict(found.config)) == (
        "second-stage",
        "amdv1",
        {"levels": levels},
    )
    assert (found.root_pa, found.domain_id, found.prot, found.gcr3) == (root_pa, domain, 3, None)
    assert [(s.name, s.pa, s.words) for s in found.path] == [("dte", DTE, words)]


def test_register():
    assert amd.device_table_register(0x422000, 8192) == 0x422001  # captures amdv1-tr-*
    assert (amd.device_table_pa(0x422001), amd.device_table_bytes(0x422001)) == (0x422000, 8192)


@given(
    st.integers(0, 0xFDFF), st.integers(1, 6), st.integers(0, 0xFFFF), st.integers(0, 3), st.booleans(),
    st.integers(1, (1 << 40) - 1),
)  # fmt: skip
def test_host_encode_find(machine, device, levels, domain, prot, dirty, frame):
    dte = amd.dte_host(frame << 12, levels, domain, prot=prot, dirty=dirty, ats=dirty)
    found = find_root(machine(dte, device), REGISTER, device)
    assert (found.root_pa, found.config["levels"], found.domain_id) == (frame << 12, levels, domain)
    assert found.prot == prot


@given(st.integers(0, 2), st.sampled_from([4, 5]), st.integers(0, (1 << 20) - 1), st.integers(0, 0xFFFF))
def test_guest_encode_find(machine, glx, levels, pasid, domain):
    pasid &= (1 << amd.PASID_BITS_OF_GLX[glx]) - 1
    # Only the last level is a table of its own: the upper ones may be the same page.
    entries = [(GCR3 + (pasid >> 9 * level & 0x1FF) * 8, amd.gcr3_entry(GCR3)) for level in (2, 1)]
    dte = amd.dte_guest(GCR3, glx, levels, domain)
    low = pasid & 0x1FF
    upper = [pasid >> 9 * level & 0x1FF for level in range(glx, 0, -1)]
    if low in upper:
        return
    ram = machine(dte, entries=[*entries[2 - glx :], (GCR3 + low * 8, amd.gcr3_entry(TOP))])
    found = find_root(ram, REGISTER, DEVICE, pasid)
    assert (found.translation, found.format, found.root_pa) == ("first-stage", "x86_64", TOP)
    assert (found.config["levels"], found.domain_id, found.pasid) == (levels, domain, pasid)
    assert found.config.get("sign_extend", 1) == (1 if pasid else 0)
    assert [s.name for s in found.path] == ["dte"] + ["gcr3"] * (glx + 1)
    assert found.gcr3 == amd.Gcr3(GCR3, glx, levels)


@given(st.integers(0, (1 << 40) - 1))
def test_gcr3_address_is_spread_over_three_fields(machine, frame):
    dte = amd.dte_guest(frame << 12, 0, 4, 1, giov=False)
    found = find_root(machine(dte), REGISTER, DEVICE)  # no PASID, no GIOV: no guest request
    assert found.gcr3.address == frame << 12
    assert found.translation == "pass-through"


def test_giov_selects_the_guest_table_of_pasid_0(machine):
    ram = machine(amd.dte_guest(GCR3, 0, 4, 1), entries=[(GCR3, amd.gcr3_entry(TOP))])
    found = find_root(ram, REGISTER, DEVICE)
    assert (found.translation, found.root_pa, found.pasid) == ("first-stage", TOP, 0)


def test_nested_names_the_host_table(machine):
    host, guest = amd.dte_host(TOP, 4, 7), amd.dte_guest(0x7000_0000, 1, 5, 7)
    both = tuple(a | b for a, b in zip(host, guest, strict=True))
    found = find_root(machine(both), REGISTER, DEVICE)
    assert (found.translation, found.format, found.root_pa) == ("nested", "amdv1", TOP)
    assert found.gcr3 == amd.Gcr3(0x7000_0000, 1, 5)
    without = (both[0] & ~amd.GIOV, *both[1:])
    assert find_root(machine(without), REGISTER, DEVICE).translation == "second-stage"


def test_without_translation(machine):
    found = find_root(machine(amd.dte_pass_through(9)), REGISTER, DEVICE)
    assert (found.translation, found.format, found.root_pa, found.domain_id) == ("pass-through", None, 0, 9)
    assert find_root(machine((0xFFFE, 0, 0, 0)), REGISTER, DEVICE).translation == "pass-through"  # V = 0
    nothing = (amd.V | amd.TV, 0, 0, 0)  # as Linux starts with: neither IR nor IW
    assert find_root(machine(nothing), REGISTER, DEVICE).prot == 0


def test_blocked(machine, reason_of):
    assert amd.dte_blocked() == (1, 0, 0, 0)  # Linux, amd_iommu_make_clear_dte(): DTE_FLAG_V alone
    ram = machine(amd.dte_blocked())
    assert reason_of(RootFault, lambda: find_root(ram, REGISTER, DEVICE)) == FaultReason.IO_PAGE_FAULT


GOOD = amd.dte_host(TOP, 4, 7)
GUEST = amd.dte_guest(GCR3, 0, 4, 7)


@pytest.mark.parametrize(
    ("dte", "pasid", "reason"),
    [
        ((GOOD[0] | 4, *GOOD[1:]), None, FaultReason.ILLEGAL_DEV_TABLE_ENTRY),
        ((GOOD[0] | 1 << 63, *GOOD[1:]), None, FaultReason.ILLEGAL_DEV_TABLE_ENTRY),
        ((GOOD[0], GOOD[1], 1 << 52, 0), None, FaultReason.ILLEGAL_DEV_TABLE_ENTRY),
        ((GOOD[0], GOOD[1], 0, 1), None, FaultReason.ILLEGAL_DEV_TABLE_ENTRY),
        ((GOOD[0] | 7 << 9, *GOOD[1:]), None, FaultReason.ILLEGAL_DEV_TABLE_ENTRY),
        ((GOOD[0] & ~2, *GOOD[1:]), None, FaultReason.IO_PAGE_FAULT),
        (GOOD, 1, FaultReason.IO_PAGE_FAULT),
        ((GUEST[0] | 3 << 56, *GUEST[1:]), None, FaultReason.ILLEGAL_DEV_TABLE_ENTRY),
        ((*GUEST[:2], 2 << 54, 0), None, FaultReason.ILLEGAL_DEV_TABLE_ENTRY),
        (GUEST, None, FaultReason.IO_PAGE_FAULT),  # its entry is 0
        (GUEST, 512, FaultReason.IO_PAGE_FAULT),
        (amd.dte_guest(1 << 51, 0, 4, 7), None, FaultReason.PAGE_TAB_HARDWARE_ERROR),
    ],
)
def test_damage(machine, reason_of, dte, pasid, reason):
    assert reason_of(RootFault, lambda: find_root(machine(dte), REGISTER, DEVICE, pasid)) == reason


def test_beyond_the_table(machine, reason_of):
    ram = machine(GOOD)
    illegal, absent = FaultReason.ILLEGAL_DEV_TABLE_ENTRY, FaultReason.DEV_TAB_HARDWARE_ERROR
    assert reason_of(RootFault, lambda: find_root(ram, TABLE, 128)) == illegal
    assert reason_of(RootFault, lambda: find_root(ram, REGISTER | 1 << 9, DEVICE)) == illegal
    assert reason_of(RootFault, lambda: find_root(ram, 1 << 40 | 511, DEVICE)) == absent
    with pytest.raises(ValueError, match="16 bits"):
        find_root(ram, REGISTER, 1 << 16)


@given(
    st.binary(min_size=32, max_size=32), st.binary(min_size=64, max_size=64), st.none() | st.integers(0, 7)
)
def test_noise_never_crashes(machine, noise, gcr3, pasid):
    words = [int.from_bytes(noise[i : i + 8], "little") for i in range(0, 32, 8)]
    ram = machine(words)
    ram.write(GCR3, gcr3)
    try:
        found = find_root(ram, REGISTER, DEVICE, pasid)
    except RootFault:
        return
    assert found.table is None or found.config["levels"] in range(1, 7)


def test_encoders_refuse_what_does_not_fit():
    for call in (
        lambda: amd.device_table_register(TABLE, 0),
        lambda: amd.device_table_register(TABLE + 1, 4096),
        lambda: amd.dte_host(TOP, 7, 1),
        lambda: amd.dte_host(TOP, 4, 1 << 16),
        lambda: amd.dte_host(TOP + 1, 4, 1),
        lambda: amd.dte_guest(TOP, 3, 4, 1),
        lambda: amd.dte_guest(TOP, 0, 3, 1),
        lambda: amd.gcr3_entry(1 << 52),
        lambda: amd.completion_wait(4, 0),
        lambda: amd.completion_wait(1 << 52, 0),
        lambda: amd.completion_wait(8, 1 << 64),
        lambda: amd.invalidate_devtab_entry(1 << 16),
        lambda: amd.invalidate_iommu_pages(1 << 16),
        lambda: amd.invalidate_iommu_pages(1, 2, 1),
        lambda: amd.invalidate_iommu_pages(1, 0, 1 << 64),
    ):
        with pytest.raises(ValueError):
            call()


# -- commands ----------------------------------------------------------------------------------------------
def linux_command(kind, *data):
    """struct iommu_cmd (amd_iommu_types.h): four u32, and CMD_SET_TYPE() in the top of the second."""
    low, high, *rest = (*data, 0, 0, 0, 0)[:4]
    return low | (high | kind << 28) << 32, rest[0] | rest[1] << 32


def linux_inv_address(start, size):
    """build_inv_address() of iommu.c, in its own steps."""
    if (start + size - 1 >> 12) == start >> 12:
        return start & ~0xFFF
    end = start + size - 1
    msb_diff = (end ^ start).bit_length() - 1
    if msb_diff > 51:
        start = 0x7FFFFFFFFFFFFFFF
    else:
        start |= (1 << msb_diff) - 1
    return start & 0xFFFFFFFFFFFFF000 | 1


PA = st.integers(0, (1 << 49) - 1).map(lambda n: n << 3)
IOVAS = st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)).map(sorted)


@given(PA, st.integers(0, 2**64 - 1))
def test_completion_wait(pa, data):
    command = amd.completion_wait(pa, data)
    # CMD_COMPL_WAIT 1, CMD_COMPL_WAIT_STORE_MASK 1; Linux stores 32 bits of data or 64
    assert command == linux_command(1, pa & 0xFFFFFFFF | 1, pa >> 32, data & 0xFFFFFFFF, data >> 32)
    decoded = amd.decode_command(command)
    assert (decoded.opcode, decoded.store_pa, decoded.store_data) == (amd.Opcode.COMPLETION_WAIT, pa, data)


def test_completion_wait_without_a_store():
    decoded = amd.decode_command(linux_command(1, 2))  # only an interrupt
    assert (decoded.opcode, decoded.store_pa) == (amd.Opcode.COMPLETION_WAIT, None)


@given(st.integers(0, 0xFFFF))
def test_commands_of_linux(number):
    assert amd.invalidate_devtab_entry(number) == linux_command(2, number)
    assert amd.decode_command(linux_command(2, number)).device_id == number
    assert amd.invalidate_iommu_all() == linux_command(8)
    assert amd.decode_command(linux_command(8)).opcode == amd.Opcode.INVALIDATE_IOMMU_ALL
    assert amd.decode_command(linux_command(5, number)).device_id == number
    everything = linux_command(3, 0, number, 0xFFFFF000 | 3, 0x7FFFFFFF)
    assert amd.invalidate_iommu_pages(number) == everything
    decoded = amd.decode_command(everything)
    assert (decoded.domain_id, decoded.start, decoded.last) == (number, 0, 2**64 - 1)


@given(st.integers(0, 0xFFFF), IOVAS)
def test_invalidated_range(domain, ends):
    start, last = ends
    command = amd.invalidate_iommu_pages(domain, start, last)
    address = linux_inv_address(start, last - start + 1)
    assert command == linux_command(3, 0, domain, address & 0xFFFFFFFF | 2, address >> 32)
    decoded = amd.decode_command(command)
    assert decoded.domain_id == domain
    assert decoded.start <= start
    assert last <= decoded.last
    size = decoded.last - decoded.start + 1
    assert size & size - 1 == 0
    assert decoded.start % size == 0
    if 4096 < size < 1 << 64:  # and no smaller one does
        assert start // (size // 2) != last // (size // 2)


@pytest.mark.parametrize(
    ("word", "start", "last"),
    [
        (0x12345000, 0x12345000, 0x12345FFF),
        (0x12345001, 0x12344000, 0x12347FFF),  # 01 from bit 12 on: 16 KiB
        (0x12346001, 0x12346000, 0x12347FFF),  # 0: 8 KiB
        (0xFF001, 0, 0x1FFFFF),  # eight ones: 2 MiB
        (0x7FFFFFFFFFFFF001, 0, 2**64 - 1),
        (0xFFFFFFFFFFFFF001, 0, 2**64 - 1),
        (0xFFFFFFFFFFFFF000, 0xFFFFFFFFFFFFF000, 2**64 - 1),
    ],
)
def test_sizes_in_addresses(word, start, last):
    assert amd.pages_range(word) == (start, last)


@pytest.mark.parametrize(
    "words",
    [
        (0, 0),
        linux_command(4, 8),  # INVALIDATE_IOTLB_PAGES: no device here has an IOTLB
        linux_command(6),  # PREFETCH_IOMMU_PAGES: EFR.PreFSup is 0
        linux_command(7, 8),  # COMPLETE_PPR_REQUEST: EFR.PPRSup is 0
        (0xF << 60, 0),
        linux_command(1, 1, 1 << 20),
        linux_command(2, 1 << 16),
        linux_command(2, 8, 0, 1),
        linux_command(3, 1, 8),  # a PASID
        linux_command(3, 0, 8, 4),  # GN: EFR.GTSup is 0
        linux_command(3, 0, 8 | 1 << 16),
        linux_command(3, 0, 8, 1 << 11),
        linux_command(8, 1),
        linux_command(8, 0, 0, 0, 1),
    ],
)
def test_illegal_commands(words):
    assert amd.decode_command(words) is None


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_noise_as_a_command(low, high):
    decoded = amd.decode_command((low, high))
    if decoded is not None:
        assert low >> 60 == decoded.opcode
        assert decoded.start <= decoded.last


# -- events ------------------------------------------------------------------------------------------------
def test_events_as_linux_reads_them():
    """iommu_print_event(): EVENT_TYPE_SHIFT 28, EVENT_DOMID_MASK_LO, EVENT_FLAGS_SHIFT 16 of event[1]."""
    assert [int(code) for code in FaultReason] == [1, 2, 3, 4, 5, 6]  # EVENT_TYPE_ILL_DEV ... CMD_HARD_ERR
    event = amd.Event(
        FaultReason.IO_PAGE_FAULT, 0x20, 0x1234, amd.EVENT_PR | amd.EVENT_RW | amd.EVENT_PE, 0xABCD_0000_1238
    )
    low, high = amd.encode_event(event)
    data = (low & 0xFFFFFFFF, low >> 32, high & 0xFFFFFFFF, high >> 32)
    assert data[1] >> 28 & 0xF == 2  # EVENT_TYPE_IO_FAULT
    assert data[0] & 0xFFFF == 0x20
    assert data[1] & 0xFFFF == 0x1234
    assert data[1] >> 16 & 0xFFF == 0x070  # EVENT_FLAG_RW is 0x020
    assert data[3] << 32 | data[2] == 0xABCD_0000_1238
    assert amd.EVENT_I == 0x008


@given(st.data(), st.sampled_from(list(FaultReason)), st.integers(0, 2**64 - 1))
def test_event_encode_decode(data, code, address):
    rule = amd._EVENTS[code]
    event = amd.Event(
        code,
        data.draw(st.integers(0, 0xFFFF)) & rule.device,
        data.draw(st.integers(0, 0xFFFF)) & rule.domain,
        data.draw(st.integers(0, 0xFFF)) & rule.flags,
        address & rule.address,
    )
    assert amd.decode_event(amd.encode_event(event)) == event
    noise = amd.Event(code, event.device_id, event.domain_id, event.flags, address)
    assert amd.decode_event(amd.encode_event(noise)) == event  # low bits that are not logged


def test_events_that_do_not_exist():
    for event in (
        amd.Event(FaultReason.ILLEGAL_COMMAND_ERROR, 8),
        amd.Event(FaultReason.ILLEGAL_DEV_TABLE_ENTRY, 8, 1),
        amd.Event(FaultReason.DEV_TAB_HARDWARE_ERROR, flags=amd.EVENT_PR),
        amd.Event(FaultReason.IO_PAGE_FAULT, 1 << 16),
        amd.Event(FaultReason.IO_PAGE_FAULT, address=1 << 64),
    ):
        with pytest.raises(ValueError, match="does not fit"):
            amd.encode_event(event)
    with pytest.raises(ValueError, match="unknown"):
        amd.decode_event((0xA << 60, 0))
    with pytest.raises(ValueError, match="reserved"):
        amd.decode_event((0x5 << 60 | 1, 0))
    with pytest.raises(ValueError, match="reserved"):
        amd.decode_event((0x5 << 60, 8))
