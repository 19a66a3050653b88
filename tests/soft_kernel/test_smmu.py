# SPDX-License-Identifier: Apache-2.0
"""The SMMUv3 driver: what it writes for hardware, attachment without a gap, invalidation, inheritance."""

import ctypes
import errno

import numpy as np
import pytest
from soft_machine import MIB, Caller, refused, settled

from iokeep.errors import IokeepError, UsageError
from iokeep.pt.extents import PROT_R, PROT_W, Extents
from iokeep.pt.roots import smmu as codec
from iokeep.pt.roots.base import RootFault
from iokeep.pt.roots.smmu import FaultReason
from iokeep.soft.hardware.iommu import FrontEnd
from iokeep.soft.hardware.platform import Platform
from iokeep.soft.hardware.units import smmu as reg
from iokeep.soft.kernel.builtin import install
from iokeep.soft.kernel.drivers.smmu import Smmu
from iokeep.soft.kernel.frames import FRAME_SHIFT, TAG_KERNEL, Kind
from iokeep.soft.kernel.iommu import Inherited
from iokeep.soft.kernel.kernel import Kernel
from iokeep.soft.kernel.klog import Klog
from iokeep.soft.kernel.params import Params
from iokeep.soft.kernel.queue import HardwareTimeout
from iokeep.uapi import iommufd as uapi

IOVA = 0x4000_0000
STAGES = {"stage-1": "arm_lpae_s1", "stage-2": "arm_lpae_s2"}


def boot(devices=3, platform=None, **params):
    platform = platform or Platform.create(32 * MIB, devices, iommu="smmuv3")
    kernel = Kernel(platform, "soft-7.3", Params(params), Klog(None))
    install(kernel)
    kernel.boot()
    return kernel


@pytest.fixture(params=STAGES)
def kernel(request):
    kernel = boot(iommu=request.param)
    yield kernel
    settled(kernel)


def attached(c, fd, ioas, index=0):
    v = c.vfio(index)
    dev = c.bind(v, fd)
    c.attach(v, ioas)
    return v, dev


def roots(kernel):
    out = []
    for dev in kernel.iommu.devices:
        try:
            out.append(kernel.iommu.root_of(dev).root_pa)
        except RootFault:
            out.append(None)
    return out


def frontend(kernel, index=0):
    """A front-end that the kernel lets go on while it waits, as if in another process."""
    fe = FrontEnd(kernel.platform, index)
    kernel.platform.iommu.local_front_ends.clear()
    kernel.pump = fe.service
    return fe


def test_registers_after_boot(kernel):
    regs = kernel.platform.iommu
    enabled = reg.CR0_SMMUEN | reg.CR0_CMDQEN | reg.CR0_EVENTQEN
    assert regs.read32(reg.CR0) == regs.read32(reg.CR0ACK) == enabled
    assert regs.read32(reg.STRTAB_BASE_CFG) == codec.strtab_base_cfg(16, 6)
    assert regs.read32(reg.CR2) == reg.CR2_PTM | reg.CR2_RECINVSID
    assert kernel.iommu.fmt.name == STAGES[kernel.iommu.mode]
    assert roots(kernel) == [None] * 3
    for dev in kernel.iommu.devices:  # no second level of the stream table yet
        with pytest.raises(RootFault) as caught:
            kernel.iommu.root_of(dev)
        assert caught.value.reason == FaultReason.C_BAD_STREAMID


def test_hw_info(kernel, c, fd):
    ioas = c.ioas(fd)
    _, dev = attached(c, fd, ioas)
    hva = c.user.put(ctypes.sizeof(uapi.iommu_hw_info_arm_smmuv3))
    cmd = uapi.iommu_hw_info(size=40, dev_id=dev, data_len=40, data_uptr=hva)
    c.ioctl(fd, uapi.IOMMU_GET_HW_INFO, cmd)
    assert (cmd.out_data_type, cmd.data_len) == (uapi.IOMMU_HW_INFO_TYPE_ARM_SMMUV3, 40)
    info = uapi.iommu_hw_info_arm_smmuv3.from_buffer_copy(c.user.buffers[hva])
    assert list(info.idr) == [kernel.platform.iommu.read32(4 * i) for i in range(6)]
    assert (info.iidr, info.aidr, info.flags) == (0, 1, 0)


def test_entries_as_linux_writes_them(kernel, c, fd):
    ioas = c.ioas(fd)
    attached(c, fd, ioas, 1)
    dev = kernel.iommu.devices[1]
    found = kernel.platform.iommu.found(dev.bdf)
    domain = dev.domain
    assert found.table.root_pa == domain.root_pa
    assert (found.domain_id, domain.domain_id) == (1, 1)
    names = [step.name for step in found.path]
    if kernel.iommu.mode == "stage-1":
        assert (found.translation, names) == ("first-stage", ["l1std", "ste", "cd"])
        # TTB1 off, 4K, 48 bits; V, AA64, R, A, ASET, IPS of 48 bits
        assert found.path[2].words == (
            1 << 48 | 0x0000_E205_8000_3510 | 1 << 30, domain.root_pa, 0, codec.LINUX_MAIR, 0, 0, 0, 0,
        )  # fmt: skip
    else:
        assert (found.translation, names) == ("second-stage", ["l1std", "ste"])
        assert found.path[1].words[0] == 0xD
        assert found.path[1].words[2] & 0xFFFF == 1
    # The neighbours in the same page of the stream table abort.
    with pytest.raises(RootFault) as caught:
        kernel.iommu.root_of(kernel.iommu.devices[0])
    assert caught.value.reason == FaultReason.ABORTED


def test_dma_follows_map_and_unmap(kernel, c, fd):
    ioas = c.ioas(fd)
    m = c.memfd(size=4 * MIB)
    v, _ = attached(c, fd, ioas)
    fe = frontend(kernel)
    c.map_file(fd, ioas, m, 0, 4 * MIB, IOVA)
    pas = [fe.translate(IOVA + i * 4096, True)[0] for i in range(1024)]
    assert None not in pas
    assert all(kernel.platform.tags[pa >> 12] == c.fstat(m)[0] for pa in pas)
    c.unmap(fd, ioas, IOVA, 4 * MIB)
    for i in range(1024):
        assert fe.translate(IOVA + i * 4096, False) == (None, FaultReason.F_TRANSLATION)
    c.detach(v)
    assert fe.translate(IOVA, False) == (None, FaultReason.ABORTED)


def test_attach_forgets_the_entry_that_aborted(kernel, c, fd):
    """STE.V = 1 of an aborting entry: unlike one that is not valid it may be cached."""
    ioas = c.ioas(fd)
    m = c.memfd(size=MIB)
    c.map_file(fd, ioas, m, 0, MIB, IOVA)
    v, _ = attached(c, fd, ioas)
    c.detach(v)
    submitted = []
    queue = kernel.iommu._queue
    real = queue.submit
    queue.submit = lambda commands: (submitted.extend(commands), real(commands))[1]
    c.attach(v, ioas)
    assert codec.cfgi_ste(kernel.iommu.devices[0].bdf) in submitted


def test_replace_moves_one_device_and_leaves_its_neighbours(kernel, c, fd):
    ioas, other = c.ioas(fd), c.ioas(fd)
    vs = [attached(c, fd, ioas, i)[0] for i in range(3)]
    before = roots(kernel)
    pages = set(kernel.iommu.structure_pages().tolist())
    moved = c.attach(vs[1], other)
    after = roots(kernel)
    assert after[0] == before[0] == after[2]
    assert after[1] == c.process.file(fd).hwpt(moved).domain.root_pa != before[1]
    exchanged = 2 if kernel.iommu.mode == "stage-1" else 1
    now = set(kernel.iommu.structure_pages().tolist())
    assert len(now - pages) == len(pages - now) == exchanged
    assert kernel.audit().leaked == 0
    c.attach(vs[1], ioas)
    assert roots(kernel) == before


def test_hardware_never_sees_a_gap_at_replace(kernel, c, fd, monkeypatch):
    """After each single store of a replace, DMA with empty caches and DMA with warm ones meets the old
    memory or the new memory; after the replace the new.
    """
    ioas, other = c.ioas(fd), c.ioas(fd)
    a, b = c.memfd(size=MIB), c.memfd(size=MIB)
    c.map_file(fd, ioas, a, 0, MIB, IOVA)
    c.map_file(fd, other, b, 0, MIB, IOVA)
    v, dev = attached(c, fd, ioas)
    attached(c, fd, ioas, 1)
    new = c.hwpt(fd, dev, other)
    warm, cold = FrontEnd(kernel.platform, 0), FrontEnd(kernel.platform, 2)
    cold.bdf = warm.bdf
    kernel.platform.iommu.local_front_ends.clear()

    def service():
        warm.service()
        cold.service()

    kernel.pump = service
    inos = [c.fstat(f)[0] for f in (a, b)]
    ram, seen = kernel.platform.ram, []

    def owner(fe):
        pa, reason = fe.translate(IOVA + 0x8, True)
        assert pa is not None, reason
        return inos.index(kernel.platform.tags[pa >> 12])

    assert owner(warm) == 0
    real64, real = type(ram).store64, type(ram).write

    def look():
        if kernel.platform.lock._depth:
            return  # an event or a status: hardware itself stores
        cold.flush()
        seen.append((owner(cold), owner(warm)))

    monkeypatch.setattr(type(ram), "store64", lambda self, pa, value: (real64(self, pa, value), look())[0])
    monkeypatch.setattr(type(ram), "write", lambda self, pa, data: (real(self, pa, data), look())[0])
    c.attach(v, new)
    monkeypatch.undo()
    assert {cold for cold, _ in seen} == {0, 1}
    assert seen == sorted(seen)
    assert (owner(cold), owner(warm)) == (1, 1)


@pytest.mark.parametrize("blocked", [False, True])
def test_an_id_that_is_used_again_finds_nothing_of_the_old_domain(kernel, c, fd, blocked):
    ioases = [c.ioas(fd) for _ in range(3)]
    files = [c.memfd(size=MIB) for _ in ioases]
    for ioas, file in zip(ioases, files, strict=True):
        c.map_file(fd, ioas, file, 0, MIB, IOVA)
    fe = frontend(kernel)
    v, _ = attached(c, fd, ioases[0])
    number = kernel.iommu.devices[0].domain.domain_id
    assert fe.translate(IOVA, True)[0] is not None
    if blocked:
        c.detach(v)
    else:
        c.attach(v, ioases[1])
    c.attach(v, ioases[2])
    assert kernel.iommu.devices[0].domain.domain_id == number
    assert kernel.platform.tags[fe.translate(IOVA, True)[0] >> 12] == c.fstat(files[2])[0]


def test_no_memory_for_a_replace_changes_nothing(kernel, c, fd, monkeypatch):
    from iokeep.soft.kernel.frames import OutOfMemory

    ioas, other = c.ioas(fd), c.ioas(fd)
    v, dev = attached(c, fd, ioas)
    new = c.hwpt(fd, dev, other)
    before = roots(kernel)
    real, left = kernel.iommu._pages, [0]

    def pages(n=1):
        if not left[0]:
            raise OutOfMemory("for the test")
        left[0] -= 1
        return real(n)

    monkeypatch.setattr(kernel.iommu, "_pages", pages)
    for room in range(2 if kernel.iommu.mode == "stage-1" else 1):
        left[0] = room
        with refused(errno.ENOMEM):
            c.attach(v, new)
        assert roots(kernel) == before
    monkeypatch.undo()
    c.attach(v, new)


def test_ids_are_not_shared_between_domains(kernel, c, fd):
    ioases = [c.ioas(fd) for _ in range(3)]
    for i, ioas in enumerate(ioases):
        attached(c, fd, ioas, i)
    found = [kernel.iommu.root_of(dev).domain_id for dev in kernel.iommu.devices]
    assert sorted(found) == [1, 2, 3]
    assert kernel.iommu.n_ids == 65536


def sizes(input_bits, output_bits=None, **more):
    return {"input_bits": str(input_bits), "output_bits": str(output_bits or input_bits), **more}


@pytest.mark.parametrize(
    ("params", "start", "entries"),
    [
        (sizes(47, 48, granule="16K"), 1, 2048),
        ({"granule": "16K"}, 0, 2),
        ({"granule": "64K"}, 1, 64),
        ({"input_bits": "39"}, 1, 512),
        (sizes(40, iommu="stage-2"), 1, 1024),
        (sizes(42, iommu="stage-2"), 1, 4096),
        (sizes(44, iommu="stage-2"), 0, 32),
        (sizes(40, 48, iommu="stage-2"), 0, 2),
        (sizes(40, 48, iommu="stage-2", start_level="1"), 1, 1024),
        ({"iommu": "stage-2", "granule": "16K"}, 1, 4096),
        (sizes(40, iommu="stage-2", granule="16K"), 2, 32768),
        (sizes(44, 48, iommu="stage-2", granule="64K"), 1, 4),
    ],
)
def test_table_parameters(params, start, entries):
    """What arm_lpae_concat_mandatory() makes of the sizes; hardware finds the same, and translates by it."""
    kernel = boot(1, **params)
    driver, frames = kernel.iommu, kernel.frames
    dev, domain = driver.devices[0], driver.alloc_domain()
    driver.set_domain(dev, domain)
    found = driver.root_of(dev)
    assert (found.fmt.config["start_level"], found.fmt.config["root_entries"]) == (start, entries)
    assert dict(found.fmt.config) == dict(domain.fmt.config)
    fe = frontend(kernel)
    block = frames.alloc(1, TAG_KERNEL, Kind.KERNEL, order=10)
    pa = int(block[0]) << FRAME_SHIFT
    domain.map(Extents.of([(IOVA, IOVA + 4 * MIB - 1, pa, PROT_R | PROT_W)]))
    assert fe.translate(IOVA + 4 * MIB - 8, True) == (pa + 4 * MIB - 8, 0)
    domain.unmap(IOVA, IOVA + 4 * MIB - 1)
    assert fe.translate(IOVA + 4 * MIB - 8, True) == (None, FaultReason.F_TRANSLATION)
    driver.set_domain(dev, None)
    domain.free()
    frames.put(np.arange(block[0], block[0] + 1024))
    settled(kernel)


@pytest.mark.parametrize("granule", ["16K", "64K"])
def test_iommufd_takes_no_granule_above_its_page(granule):
    """iopt_table_add_domain(): "we can't guarantee higher contiguity"."""
    kernel = boot(1, granule=granule)
    c = Caller(kernel)
    fd = c.iommu()
    ioas, v = c.ioas(fd), c.vfio(0)
    c.bind(v, fd)
    with refused(errno.EINVAL):
        c.attach(v, ioas)


@pytest.mark.parametrize(
    "params",
    [
        {"iommu": "legacy"},
        {"granule": "8K"},
        {"input_bits": "52"},
        {"output_bits": "52"},
        {"iommu": "stage-2", "granule": "64K", "input_bits": "52"},
    ],
)
def test_parameters_that_the_hardware_does_not_have(params):
    with pytest.raises(UsageError):
        boot(1, **params)


def test_msi_window_is_reserved(kernel, c, fd):
    ioas = c.ioas(fd)
    m = c.memfd(size=MIB)
    attached(c, fd, ioas)
    with refused(errno.EINVAL):
        c.map_file(fd, ioas, m, 0, 4096, 0x0800_0000)
    c.map_file(fd, ioas, m, 0, 4096, 0x0810_0000)


def test_more_devices_than_a_page_of_the_stream_table_has():
    kernel = boot(40)
    c = Caller(kernel)
    fd = c.iommu()
    ioas = c.ioas(fd)
    for i in (0, 3, 4, 30, 39):
        attached(c, fd, ioas, i)
    assert sum(r is not None for r in roots(kernel)) == 5
    assert len(kernel.iommu._at.streams) == 4
    settled(kernel)


# -- inheritance ---------------------------------------------------------------------------------------------
def successor(kernel):
    """Another driver on the machine as the kernel left it."""
    heir = Smmu(kernel)
    heir.inherit(Inherited(kernel.iommu.root_register, kernel.iommu.structure_pages()))
    return heir


def test_inherits_what_hardware_uses(kernel, c, fd):
    ioas = c.ioas(fd)
    m = c.memfd(size=MIB)
    c.map_file(fd, ioas, m, 0, MIB, IOVA)
    for i in range(2):
        attached(c, fd, ioas, i)
    fe = frontend(kernel)
    pa = fe.translate(IOVA, True)
    old, register = kernel.iommu, kernel.platform.iommu.read64(reg.STRTAB_BASE)
    commands = kernel.platform.iommu.read64(reg.CMDQ_BASE)
    heir = successor(kernel)
    assert heir._at == old._at
    before = kernel.audit().allocated
    heir.start()
    assert kernel.platform.iommu.read64(reg.STRTAB_BASE) == register
    assert kernel.platform.iommu.read64(reg.CMDQ_BASE) != commands
    assert kernel.platform.iommu.translating
    assert fe.translate(IOVA, True) == pa
    assert kernel.audit().allocated == before + 3  # a queue, its status page, the event queue
    # It goes on where the old one was: put its frames where they were.
    kernel.frames.put(np.append(old._queue.pfns, np.int64(old._events_pa >> 12)))
    old._queue, old._events_pa = heir._queue, heir._events_pa


def test_pages_that_lead_nowhere_are_freed(kernel, c, fd):
    attached(c, fd, c.ioas(fd))
    old, spare = kernel.iommu, kernel.iommu._pages()
    heir = Smmu(kernel)
    heir.inherit(Inherited(old.root_register, np.append(old.structure_pages(), np.uint64(spare))))
    heir.start()
    assert kernel.frames.kind[spare >> 12] == Kind.FREE
    kernel.frames.put(np.append(old._queue.pfns, np.int64(old._events_pa >> 12)))
    old._queue, old._events_pa = heir._queue, heir._events_pa


def test_inherits_only_what_was_preserved(kernel, c, fd):
    attached(c, fd, c.ioas(fd))
    pages = kernel.iommu.structure_pages()
    for missing in pages.tolist():
        heir = Smmu(kernel)
        with pytest.raises(IokeepError, match=f"{missing:#x}"):
            heir.inherit(Inherited(kernel.iommu.root_register, pages[pages != missing]))
    root = kernel.iommu._at.root_pa
    word = kernel.frames.ram.load64(root)
    kernel.frames.ram.store64(root, word & ~codec.L1_SPAN | 3)
    with pytest.raises(IokeepError, match="not one of this driver"):
        successor(kernel)
    kernel.frames.ram.store64(root, word)


def test_holds_what_hardware_uses(kernel, c, fd):
    """Where no record can be believed, the structures are found from the registers."""
    attached(c, fd, c.ioas(fd))
    heir = Smmu(kernel)
    assert heir._held_structures().tolist() == kernel.iommu.structure_pages().tolist()
    heir.hold()
    assert heir._at == kernel.iommu._at
    assert heir.domains == {}


def test_a_device_that_no_record_knows_is_blocked(kernel, c, fd):
    attached(c, fd, c.ioas(fd))
    attached(c, fd, c.ioas(fd), 1)
    dev = kernel.iommu.devices[0]
    domain = dev.domain
    del kernel.iommu.domains[domain.domain_id]
    kernel.iommu.block_unknown(dev)
    kernel.iommu.block_unknown(kernel.iommu.devices[2])
    assert [r is None for r in roots(kernel)] == [True, False, True]
    kernel.iommu.domains[domain.domain_id] = domain


def test_stages_replace_each_other(kernel, c, fd):
    """The new kernel may make domains of the other stage: one store switches all the same."""
    ioas = c.ioas(fd)
    v, dev = attached(c, fd, ioas)
    other = boot(1, iommu=next(mode for mode in STAGES if mode != kernel.iommu.mode))
    kernel.iommu.fmt = other.iommu.fmt
    settled(other)
    new = c.hwpt(fd, dev, c.ioas(fd))
    c.attach(v, new)
    assert kernel.iommu.root_of(kernel.iommu.devices[0]).format == kernel.iommu.fmt.name
    assert kernel.audit().leaked == 0
    c.attach(v, ioas)


def test_error_of_the_queue_stops_the_kernel(monkeypatch):
    kernel = boot(1)
    with pytest.raises(HardwareTimeout, match="command queue error 1"):
        kernel.iommu._queue.submit([(0xFF, 0)])
    kernel.platform.close()
