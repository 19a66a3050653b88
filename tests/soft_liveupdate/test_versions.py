# SPDX-License-Identifier: Apache-2.0
"""The next kernel is another one, or what it finds is damaged: it keeps everything, and says so."""

import errno

import numpy as np
import pytest
from liveupdate_support import SEALS, Guest, check_audit, clean, fails

from iokeep.errors import IokeepError
from iokeep.handover.check import check
from iokeep.handover.reader import read_handover
from iokeep.iommufd.client import VfioDevice
from iokeep.luo.client import LiveUpdate
from iokeep.pt.table_digest import digest
from iokeep.soft.hardware import bar


def held(guest):
    """Devices go on, nothing can be retrieved, nothing is reset; the kernel works."""
    host = guest.host
    before = host.stats().transactions
    host.run(16)
    assert host.stats().transactions > before
    t = host.transport()
    for _ in range(2):
        with fails(errno.EIO):
            LiveUpdate(t)
    with fails(errno.EBUSY):
        VfioDevice(t, "/dev/vfio/devices/vfio0")
    fd = t.memfd_create("new", 0)
    t.ftruncate(fd, 1 << 20)
    t.pwrite(fd, b"works", 0)
    host.run(16)
    clean(host)


@pytest.mark.parametrize(
    ("params", "profile"),
    [({}, "soft-7.2"), ({"truncate_records": 1}, "soft-7.4")],
    ids=["older-kernel", "truncated"],
)
def test_held(hosts, params, profile):
    host = hosts(params=params)
    guest = Guest(host).start().preserve()
    guest = guest.kexec(profile)
    held(guest)
    t = host.transport()
    with fails(errno.EBUSY):
        t.reboot_kexec()  # nobody could carry that on
    assert "everything is kept as it is" in host.log()


def test_an_unknown_record_version(hosts):
    """The IOMMU's record is understood, the iommufd's is not: the domain is held, LUO gives EIO."""
    host = hosts(params={"records_version": "iokeep-iommufd-v9"})
    guest = Guest(host).start().preserve().kexec("soft-7.4")
    t = host.transport()
    for _ in range(2):
        with fails(errno.EIO):
            LiveUpdate(t)
    assert "no registered handler for compatible 'iokeep-iommufd-v9'" in host.log()
    with fails(errno.EBUSY):
        VfioDevice(t, "/dev/vfio/devices/vfio0")
    before = host.stats().transactions
    host.run(16)
    assert host.stats().transactions > before
    clean(host)
    assert guest.rows


def test_another_iommu_mode(hosts):
    host = hosts(params={"iommu": "scalable-fs"})
    guest = Guest(host).start().preserve().kexec("soft-7.4", {"iommu": "legacy"})
    held(guest)


def test_mainline_starts_from_nothing(hosts):
    """linux-7.3 keeps the memory, but not the IOMMU: devices are stopped, as by a reset."""
    host = hosts()
    guest = Guest(host).start().preserve().kexec("linux-7.3")
    before = host.stats().transactions
    host.run(16)
    assert host.stats().transactions == before
    with fails(errno.EIO):
        LiveUpdate(host.transport())
    check_audit(host)
    assert guest.rows


def test_another_kho_version_keeps_nothing(hosts):
    host = hosts()
    guest = Guest(host).start().preserve()
    guest.transport.reboot_kexec()
    ram, fdt_pa = host.platform.ram, host.platform.boot.fdt_addr
    page = ram.read(fdt_pa, 4096)
    assert page.count(b"kho-v4\0") == 1
    ram.write(fdt_pa, page.replace(b"kho-v4\0", b"kho-v5\0"))
    host.kexec("soft-7.4")
    assert "of another version" in host.log()
    before = host.stats().transactions
    host.run(16)
    assert host.stats().transactions == before
    luo = LiveUpdate(host.transport())
    with fails(errno.ENOENT):
        luo.retrieve("vm-1")
    audit = check_audit(host)
    assert not {"memfd", "reserved", "pgtable"} & set(audit.by_kind)


def test_memory_only_needs_no_iommu(hosts):
    host = hosts()
    guest = Guest(host).start()
    session = guest.open_luo().create("ram")
    session.preserve(guest.memfd, 1)
    after = guest.kexec()
    before = host.stats().transactions
    host.run(16)
    assert host.stats().transactions == before  # its iommufd was not preserved
    t = after.transport = host.transport()
    session = after.open_luo().retrieve("ram")
    fd = session.retrieve(1)
    assert t.pread(fd, 12, 0x7000) == b"guest memory"
    session.finish()
    VfioDevice(t, "/dev/vfio/devices/vfio0").close()
    check_audit(host)


def metadata_bytes(host):
    """Every byte of every page that the handover's reader looks at, and of the boot page's pointer."""
    handover = read_handover(host.platform.ram, host.platform.boot.fdt_addr)
    assert not handover.problems
    return handover.pages


@pytest.mark.parametrize("placement", ["2m-scattered", "4k-random"])
def test_what_is_handed_over_reads_well(hosts, placement):
    """The reader of real images finds nothing wrong; every frame that DMA reaches is preserved."""
    host = hosts(params={"placement": placement}, devices=False)
    guest = Guest(host).start().preserve()
    pfns = next(f for f in host.kernel.files.values() if f.name == "ram").pfns.copy()
    domain = guest.host.kernel.iommu.devices[0].domain
    shown = domain.table.leaves().extents()
    guest.transport.reboot_kexec()
    found = read_handover(host.platform.ram, host.platform.boot.fdt_addr)
    assert check(found) == []
    assert found.liveupdate_num == 1
    (session,) = found.sessions
    assert [f.kind for f in session.files] == ["memfd", "iommufd", "vfio-pci"]
    assert session.files[0].memfd.seals == SEALS
    assert np.array_equal(session.files[0].memfd.frames()[1], pfns.astype(np.uint64))
    assert (9 in found.preserved.by_order) == (placement == "2m-scattered")
    for pa, iova, last in zip(shown.pa.tolist(), shown.iova.tolist(), shown.last.tolist(), strict=True):
        frames = np.arange(pa >> 12, (pa + last - iova >> 12) + 1, dtype=np.uint64)
        assert found.preserved.contains(frames).all()
    (record,) = found.iommu.domains
    assert record.digest == digest(domain.fmt, host.platform.ram, domain.root_pa, record.digest_key)
    assert record.mapped_bytes == sum(length for _, length, _, _ in guest.areas)
    assert found.preserved.contains(record.table_pages >> np.uint64(12)).all()
    areas = session.files[1].record.ioases[0]
    assert areas.iova.tolist() == [a[0] for a in guest.areas]
    assert areas.offset.tolist() == [a[2] for a in guest.areas]


def test_damaged_bytes_never_do_damage(hosts):
    """One byte of one metadata page is changed at a time: refused, or the guest comes back whole."""
    outcomes = {"held": 0, "eio": 0, "whole": 0, "refused": 0, "cold": 0}
    rng = np.random.default_rng(20261122)
    places = None
    for number in range(60):
        host = hosts(16 << 20, params={"placement": "contiguous"})
        guest = Guest(host, ((0x10000, 0x20000, 0, 3), (0x4000_0000, 0x8000, 0x30000, 1)), 0x40000)
        guest.start().preserve()
        guest.transport.reboot_kexec()
        ram = host.platform.ram
        pages = sorted(metadata_bytes(host))
        if places is None:
            # bytes that are not zero matter most; some zero bytes of each page too
            places = []
            for page in pages:
                data = np.frombuffer(ram.read(page, 4096), np.uint8)
                used = np.flatnonzero(data)
                count = min(len(used), 12)
                places += [(pages.index(page), int(at)) for at in rng.choice(used, count, replace=False)]
                places.append((pages.index(page), int(rng.integers(4096))))
            rng.shuffle(places)
        page, at = places[number % len(places)]
        pa = pages[page] + at
        value = ram.read(pa, 1)[0] ^ (1 << int(rng.integers(8)))
        ram.write(pa, bytes([value]))
        host.kexec("soft-7.4")
        outcomes[outcome(host, guest)] += 1
        host.stop()
    assert outcomes["held"] > 10, outcomes
    assert outcomes["whole"] > 3, outcomes


def outcome(host, guest):
    """What became of the guest; whatever it is, no device went astray and no frame was lost."""
    log = host.log()
    stopped = "of another version" in log
    before = host.stats().transactions
    host.run(8)
    if stopped:
        return "cold"
    assert host.stats().transactions > before, log
    result = "held" if "everything is kept" in log else ""
    after = Guest(host, guest.areas, guest.file_bytes, rows=guest.rows)
    after.transport = host.transport()
    try:
        after.open_luo()
        after.session = after.luo.retrieve("vm-1")
        after.retrieve_files()
        after.adopt()
        after.session.finish()
        result = "whole"
    except (OSError, IokeepError) as error:
        number = getattr(error, "errno", None) or errno.EBADMSG  # a client may refuse what it reads, too
        result = result or ("eio" if number == errno.EIO else "refused")
        if result == "held":
            assert number == errno.EIO
    host.run(8)
    clean(host)
    assert bar.read_status(host.platform.bars[0]).logged == 0
    return result
