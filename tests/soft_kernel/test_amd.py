# SPDX-License-Identifier: Apache-2.0
"""The AMD-Vi driver: device table, attachment, growth, flushing, boot over an IOMMU that is at work."""

import errno
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from soft_machine import MIB, Caller, refused, settled

from iokeep.errors import IokeepError
from iokeep.pt.registry import open_format
from iokeep.pt.roots import amd
from iokeep.soft.hardware.iommu import FrontEnd
from iokeep.soft.hardware.platform import Platform
from iokeep.soft.hardware.units import amd as r
from iokeep.soft.kernel import queue
from iokeep.soft.kernel.builtin import install
from iokeep.soft.kernel.drivers.amd import AmdVi
from iokeep.soft.kernel.frames import OutOfMemory
from iokeep.soft.kernel.iommu import Inherited
from iokeep.soft.kernel.kernel import Kernel
from iokeep.soft.kernel.klog import Klog
from iokeep.soft.kernel.params import Params
from iokeep.uapi import iommufd as uapi

TIB = 1 << 40
RUNNING = r.CONTROL_IOMMU_EN | r.CONTROL_CMDBUF_EN | r.CONTROL_EVT_LOG_EN | r.CONTROL_COHERENT_EN


def bare(platform, **params):
    """A kernel that has not booted."""
    return Kernel(platform, "soft-7.3", Params(params), Klog(None))


def boot(devices=2, platform=None, **params):
    kernel = bare(platform or Platform.create(32 * MIB, devices, iommu="amd"), **params)
    install(kernel)
    kernel.pump = lambda: [service() for service in kernel.platform.iommu.local_front_ends.values()]
    kernel.boot()
    return kernel


@pytest.fixture
def kernel():
    kernel = boot(3)
    yield kernel
    settled(kernel)


def entry(kernel, index):
    """The device table entry of a device, from the register on."""
    regs = kernel.platform.iommu
    at = amd.device_table_pa(regs.read64(r.MMIO_DEV_TABLE)) + kernel.platform.bdf(index) * 32
    return tuple(kernel.platform.ram.load64(at + 8 * i) for i in range(4))


def attached(kernel, c, fd, index=0, areas=()):
    """A device, an IOAS with file-backed (iova, length) areas, an HWPT of it and its domain."""
    ioas, v = c.ioas(fd), c.vfio(index)
    dev = c.bind(v, fd)
    m = c.memfd(size=4 * MIB)
    for iova, length in areas:
        c.map_file(fd, ioas, m, 0, length, iova)
    hwpt = c.hwpt(fd, dev, ioas)
    c.attach(v, hwpt)
    return SimpleNamespace(v=v, dev=dev, ioas=ioas, hwpt=hwpt, domain=c.process.file(fd).hwpt(hwpt).domain)


def test_boot(kernel):
    regs = kernel.platform.iommu
    assert regs.read64(r.MMIO_CONTROL) == RUNNING
    assert regs.read32(r.MMIO_STATUS) == r.STATUS_CMDBUF_RUN | r.STATUS_EVT_RUN
    assert regs.read64(r.MMIO_CMD_BUF) >> 56 == regs.read64(r.MMIO_EVT_BUF) >> 56 == 9  # 512 entries
    assert regs.read64(r.MMIO_DEV_TABLE) & 0x1FF == 0  # one page reaches 00:06.0
    table = kernel.iommu.structure_pages()
    words = np.frombuffer(kernel.platform.ram.read(int(table[0]), 4096), np.uint64).reshape(-1, 4)
    assert np.unique(words, axis=0).tolist() == [[1, 0, 0, 0]]  # V alone
    assert kernel.iommu.version == 0
    assert kernel.iommu.mode == "v1"


def test_hw_info(c, fd):
    v = c.vfio()
    dev = c.bind(v, fd)
    hva = c.user.put(16)
    info = uapi.iommu_hw_info(size=40, dev_id=dev, data_len=16, data_uptr=hva)
    c.ioctl(fd, uapi.IOMMU_GET_HW_INFO, info)
    assert info.out_data_type == uapi.IOMMU_HW_INFO_TYPE_AMD
    assert int.from_bytes(c.user.buffers[hva][:8], "little") == r.EXT_FEATURES


def test_entries(kernel, c, fd):
    x = attached(kernel, c, fd, 1)
    domain = x.domain
    assert (domain.fmt.name, domain.levels, domain.domain_id) == ("amdv1", 3, 1)
    assert dict(domain.fmt.config)["force_coherence"] == 1
    # DTE_FLAG_V, TV, mode 3, the root, IR and IW; the domain id
    assert entry(kernel, 1) == (3 << 61 | domain.root_pa | 3 << 9 | 3, 1, 0, 0)
    assert entry(kernel, 0) == entry(kernel, 2) == (1, 0, 0, 0)
    found = kernel.iommu.root_of(kernel.iommu.devices[1])
    assert (found.root_pa, found.format, found.domain_id) == (domain.root_pa, "amdv1", 1)
    assert found.fmt.config == domain.fmt.config
    c.detach(x.v)
    assert entry(kernel, 1) == (1, 0, 0, 0)
    c.destroy(fd, x.hwpt)


def test_what_the_driver_says_of_pasids_faults_and_guests(kernel, c, fd):
    """As Linux's on an AMD IOMMU without PASIDs and PRI (tests/conformance/test_vfio.py, test_rows.py)."""
    x = attached(kernel, c, fd)
    faults = uapi.iommu_fault_alloc(size=16)
    c.ioctl(fd, uapi.IOMMU_FAULT_QUEUE_ALLOC, faults)
    hwpt = uapi.iommu_hwpt_alloc(size=48, dev_id=x.dev, pt_id=x.ioas, flags=4, fault_id=faults.out_fault_id)
    c.ioctl(fd, uapi.IOMMU_HWPT_ALLOC, hwpt)
    assert c.attach(x.v, hwpt.out_hwpt_id) == hwpt.out_hwpt_id
    with refused(errno.EOPNOTSUPP):
        c.hwpt(fd, x.dev, x.ioas, uapi.IOMMU_HWPT_ALLOC_PASID)
    hwpt = uapi.iommu_hwpt_alloc(size=48, dev_id=x.dev, pt_id=x.hwpt, data_type=0x7EAD, data_len=8)
    with refused(errno.EOPNOTSUPP):
        c.ioctl(fd, uapi.IOMMU_HWPT_ALLOC, hwpt)
    for parent, number in ((99, errno.ENOENT), (x.hwpt, errno.EINVAL)):
        viommu = uapi.iommu_viommu_alloc(size=40, type=0x7EAD, dev_id=x.dev, hwpt_id=parent)
        with refused(number):
            c.ioctl(fd, uapi.IOMMU_VIOMMU_ALLOC, viommu)


def test_reserved_regions(c, fd):
    v = c.vfio()
    c.bind(v, fd)
    ioas = c.ioas(fd)
    c.attach(v, ioas)
    holes = [(0xFEE00000, 0xFEEFFFFF), (0xFD_0000_0000, 0xFF_FFFF_FFFF)]
    ranges = c.ranges(fd, ioas)[0]
    assert [(a[1] + 1, b[0] - 1) for a, b in itertools.pairwise(ranges)] == holes
    # Six levels reach every IOVA.
    assert (ranges[0][0], ranges[-1][1]) == (0, 2**64 - 1)


def test_leaves_of_every_size_but_512g(kernel):
    sizes = {n for level in kernel.iommu.larger(kernel.iommu.fmt).levels for n in level.build_lg2s}
    assert {12, 13, 16, 20, 21, 29, 30, 38, 40} <= sizes  # amdv1pt: every power of two ...
    assert 39 not in sizes  # ... but 512G


def test_a_device_moves_by_a_copy_of_the_table(kernel, c, fd):
    x = attached(kernel, c, fd, 0)
    attached(kernel, c, fd, 1)
    neighbour = entry(kernel, 1)
    new = c.hwpt(fd, x.dev, c.ioas(fd))
    before, register = kernel.iommu.structure_pages().tolist(), kernel.iommu.root_register
    c.attach(x.v, new)
    domain = c.process.file(fd).hwpt(new).domain
    assert entry(kernel, 0)[1] == domain.domain_id != x.domain.domain_id
    assert entry(kernel, 1) == neighbour
    assert not set(before) & set(kernel.iommu.structure_pages().tolist())
    assert register != kernel.iommu.root_register
    assert kernel.audit().leaked == 0
    c.destroy(fd, x.hwpt)


def test_hardware_never_sees_a_gap(kernel, c, fd, monkeypatch):
    """After each single store of a growth and of a replace the walk gives the old table or the new one."""
    x = attached(kernel, c, fd, 0, [(0, MIB)])
    ram, seen = type(kernel.platform.ram), []
    real64, real = ram.store64, ram.write

    def look():
        found = kernel.iommu.root_of(kernel.iommu.devices[0])
        seen.append((found.root_pa, len(found.fmt.levels), found.domain_id))

    def states(call):
        seen.clear()
        look()
        with monkeypatch.context() as patch:
            patch.setattr(ram, "store64", lambda self, pa, value: (real64(self, pa, value), look())[0])
            patch.setattr(ram, "write", lambda self, pa, data: (real(self, pa, data), look())[0])
            call()
        look()
        return [key for key, _ in itertools.groupby(seen)]

    def state(domain):
        return domain.root_pa, domain.levels, domain.domain_id

    m = c.memfd(size=MIB)
    before = state(x.domain)
    found = states(lambda: c.map_file(fd, x.ioas, m, 0, MIB, TIB))
    assert found == [before, state(x.domain)]
    assert x.domain.levels == 4
    other = c.hwpt(fd, x.dev, x.ioas)
    found = states(lambda: c.attach(x.v, other))
    assert found == [state(x.domain), state(c.process.file(fd).hwpt(other).domain)]
    c.destroy(fd, x.hwpt)


def test_growth(kernel, c, fd):
    x = attached(kernel, c, fd, 0, [(0, MIB)])
    ioas, domain = x.ioas, x.domain
    second = c.vfio(1)
    c.bind(second, fd)
    c.attach(second, x.hwpt)
    front_ends = [FrontEnd(kernel.platform, i) for i in range(2)]
    pa = front_ends[0].translate(0x5000, False)[0]
    root, m = domain.root_pa, c.memfd(size=MIB)
    c.map_file(fd, ioas, m, 0, MIB, TIB)
    assert (domain.levels, len(domain.table_pages)) == (4, 3 + 4)
    assert domain.root_pa != root
    assert entry(kernel, 0) == entry(kernel, 1) == amd.dte_host(domain.root_pa, 4, domain.domain_id)
    for fe in front_ends:
        assert fe.translate(0x5000, False) == (pa, 0)
        want = int(domain.iova_to_phys(np.array([TIB], np.uint64))[0])
        assert want
        assert fe.translate(TIB, True) == (want, 0)
    c.map_file(fd, ioas, m, 0, MIB, 1 << 60)
    assert domain.levels == 6
    assert front_ends[1].translate(0x5000, False) == (pa, 0)
    c.unmap(fd, ioas, 1 << 60, MIB)
    assert front_ends[1].translate(1 << 60, False)[0] is None
    assert domain.levels == 6  # a table does not shrink


def test_a_domain_without_devices_grows(kernel, c, fd):
    x = attached(kernel, c, fd)
    c.detach(x.v)
    m = c.memfd(size=MIB)
    c.map_file(fd, x.ioas, m, 0, MIB, 8 * TIB)
    assert x.domain.levels == 4
    c.attach(x.v, x.hwpt)
    assert entry(kernel, 0)[0] >> 9 & 7 == 4


def test_levels():
    for levels in (1, 2, 4, 6):
        kernel = boot(levels=str(levels))
        c = Caller(kernel)
        assert attached(kernel, c, c.iommu()).domain.levels == levels
        settled(kernel)
    with pytest.raises(IokeepError, match="HATS"):
        boot(levels="7")


def test_unmap_flushes_exactly_what_it_must(kernel, c, fd):
    x = attached(kernel, c, fd, 0, [(0, 4 * MIB)])
    fe = FrontEnd(kernel.platform, 0)
    assert fe.translate(0x1000, True)[1] == 0
    sent = []
    real = kernel.iommu._submit
    kernel.iommu._submit = lambda commands: (sent.extend(commands), real(commands))[1]
    c.unmap(fd, x.ioas, 0, 4 * MIB)
    assert fe.translate(0x1000, True)[0] is None
    ranges = [(d.domain_id, d.start, d.last) for d in map(amd.decode_command, sent)]
    assert ranges[0] == (x.domain.domain_id, 0, 4 * MIB - 1)


def test_tables_of_many_buses():
    kernel = boot(40)
    register = kernel.iommu.root_register
    assert amd.device_table_bytes(register) == 0x4000  # 01:0b.0: 349 entries of 32 bytes
    c = Caller(kernel)
    fd = c.iommu()
    for index in (0, 30, 39):
        attached(kernel, c, fd, index)
    assert [bool(entry(kernel, i)[0] & amd.TV) for i in (0, 1, 30, 39)] == [True, False, True, True]
    pages = kernel.iommu.structure_pages()
    assert np.diff(pages.astype(np.int64)).tolist() == [4096] * 3
    settled(kernel)


def test_no_memory_for_a_copy_changes_nothing(kernel, c, fd, monkeypatch):
    x = attached(kernel, c, fd)
    other = c.hwpt(fd, x.dev, x.ioas)
    before = entry(kernel, 0), kernel.iommu.root_register

    def none(*_args, **_kwargs):
        raise OutOfMemory("for the test")

    with monkeypatch.context() as patch:
        patch.setattr(kernel.iommu, "_pages", none)
        with refused(errno.ENOMEM):
            c.attach(x.v, other)
    assert before == (entry(kernel, 0), kernel.iommu.root_register)


def test_a_command_buffer_that_stopped(kernel, c, fd, monkeypatch):
    x = attached(kernel, c, fd)
    monkeypatch.setattr(queue, "TIMEOUT", 0.5)
    with pytest.raises(queue.HardwareTimeout, match="ILLEGAL_COMMAND_ERROR at pa 0x"):
        kernel.iommu._submit([(0xF << 60, 0)])
    regs = kernel.platform.iommu
    regs.write64(r.MMIO_CONTROL, RUNNING & ~r.CONTROL_CMDBUF_EN)
    regs.write32(r.MMIO_CMD_HEAD, regs.read32(r.MMIO_CMD_TAIL))
    regs.write64(r.MMIO_CONTROL, RUNNING)
    c.detach(x.v)


# -- over an IOMMU that is at work -------------------------------------------------------------------------
def test_boot_without_a_handover_blocks_what_was_translated():
    old = boot()
    platform = old.platform
    c = Caller(old)
    attached(old, c, c.iommu(), 0, [(0, MIB)])
    fe = FrontEnd(platform, 0)
    assert fe.translate(0, False)[1] == 0
    new = boot(platform=platform)
    assert platform.iommu.translating
    assert fe.translate(0, False)[0] is None
    assert entry(new, 0) == (1, 0, 0, 0)
    settled(new)


def test_the_event_log_of_another_kernel_is_not_written_to():
    """From the first moment on: its memory is anybody's."""
    old = boot()
    AmdVi(bare(old.platform))
    regs = old.platform.iommu
    before = regs.read64(r.MMIO_EVT_TAIL)
    assert FrontEnd(old.platform, 0).translate(0, False)[0] is None
    assert regs.read64(r.MMIO_EVT_TAIL) == before
    assert regs.read32(r.MMIO_STATUS) == 0
    assert regs.translating
    old.platform.close()


def test_inherited_structures_are_checked():
    old = boot()
    platform = old.platform
    c = Caller(old)
    attached(old, c, c.iommu(), 0, [(0, MIB)])
    pages, register = old.iommu.structure_pages(), old.iommu.root_register
    fresh = AmdVi(bare(platform))
    with pytest.raises(IokeepError, match="not among the preserved"):
        fresh.inherit(Inherited(register, pages[:0]))
    fresh.inherit(Inherited(register, pages))
    assert fresh.structure_pages().tolist() == pages.tolist()
    assert fresh.root_of(fresh.devices[0]).fmt == open_format("amdv1", {"levels": 3})
    assert fresh.hold().tolist() == pages.tolist()
    platform.close()


def test_a_device_table_that_is_too_small():
    small = boot(2)
    many = boot(40)
    fresh = AmdVi(bare(many.platform))
    with pytest.raises(IokeepError, match="beyond the device table"):
        fresh.inherit(Inherited(small.iommu.root_register, small.iommu.structure_pages()))
    for kernel in (small, many):
        kernel.platform.close()
