# SPDX-License-Identifier: Apache-2.0
"""The /dev/iommu client against a scripted kernel: structures as the kernel sees them, and refusals."""

import ctypes
import errno

import pytest

from iokeep.errors import CapabilityError, KernelRefused
from iokeep.iommufd.client import (
    READ,
    WRITE,
    AdoptResult,
    CompareResult,
    HwInfo,
    Ioas,
    Iommufd,
    IommufdError,
    Mismatch,
    NotEqual,
    PriorHwpt,
    Progress,
    VfioDevice,
)
from iokeep.uapi import iommufd as uapi
from iokeep.uapi import proposal, vfio
from iokeep.uapi.copy_struct import (
    IOMMU_IOCTLS,
    PROPOSED_IOCTLS,
    VFIO_IOCTLS,
    copy_struct_in,
    copy_struct_out,
)
from iokeep.uapi.wire import WireError

TABLES = {**IOMMU_IOCTLS, **PROPOSED_IOCTLS, **VFIO_IOCTLS}
NO_PA = 2**64 - 1


class Kernel:
    """Takes structures by the kernel's rule, lets the test answer, copies back as the kernel does."""

    name = "scripted"

    def __init__(self, **answers):
        self.answers = answers
        self.calls = []
        self.open_fds = []
        self.mapped = []

    def open(self, path):
        if path in self.answers:
            raise OSError(self.answers[path], path)
        self.open_fds.append(10 + len(self.open_fds))
        return self.open_fds[-1]

    def close(self, fd):
        self.open_fds.remove(fd)

    def ioctl(self, fd, request, arg):
        op = TABLES[request]
        cmd = copy_struct_in(op.struct, bytes(arg))
        self.calls.append((fd, op.name, cmd))
        answer = self.answers.get(op.name, lambda cmd: 0)
        try:
            return answer(cmd) or 0
        finally:
            raw = copy_struct_out(cmd)
            ctypes.memmove(ctypes.addressof(arg), raw, len(raw))

    def mmap(self, fd, length, offset=0):
        self.mapped.append((fd, length, offset))
        return "mapping"

    @property
    def last(self):
        return self.calls[-1][2]


def refuse(number):
    def answer(cmd):
        raise OSError(number, "refused")

    return answer


def store(**fields):
    def answer(cmd):
        for name, value in fields.items():
            setattr(cmd, name, value)

    return answer


def test_open_and_close():
    kernel = Kernel()
    with Iommufd(kernel) as iommufd:
        assert kernel.open_fds == [10]
        assert iommufd.fd == 10
    assert kernel.open_fds == []
    iommufd.close()
    with pytest.raises(CapabilityError, match="CONFIG_IOMMUFD"):
        Iommufd(Kernel(**{"/dev/iommu": errno.ENOENT}))
    kernel = Kernel()
    kernel.open_fds.append(77)
    Iommufd(kernel, 77).close()
    assert kernel.open_fds == []


def test_close_when_the_kernel_is_gone():
    class Gone(Kernel):
        def close(self, fd):
            raise WireError(errno.ECONNRESET, "gone")

    Iommufd(Gone()).close()
    VfioDevice(Gone(), 5).close()


@pytest.fixture
def kernel():
    return Kernel(IOMMU_IOAS_ALLOC=store(out_ioas_id=3))


@pytest.fixture
def ioas(kernel):
    return Iommufd(kernel).ioas_alloc()


def test_ioas(kernel, ioas):
    assert (ioas.id, ioas.iommufd.ioas(9).id) == (3, 9)
    assert isinstance(ioas, Ioas)
    ioas.destroy()
    assert kernel.calls[-1][:2] == (10, "IOMMU_DESTROY")
    assert kernel.last.id == 3


@pytest.mark.parametrize(
    ("iova", "prot", "flags"),
    [
        (0x100000, READ | WRITE, 7),
        (0, READ | WRITE, 7),
        (None, READ | WRITE, 6),
        (0x1000, READ, 5),
        (0x1000, WRITE, 3),
        (0x1000, 0, 1),
    ],
)
def test_map_file(kernel, ioas, iova, prot, flags):
    kernel.answers["IOMMU_IOAS_MAP_FILE"] = store(iova=0x7000) if iova is None else store()
    assert ioas.map_file(5, 0x2000, 0x4000, iova, prot) == (0x7000 if iova is None else iova)
    cmd = kernel.last
    assert (cmd.size, cmd.flags, cmd.ioas_id, cmd.fd, cmd.start, cmd.length) == (
        40,
        flags,
        3,
        5,
        0x2000,
        0x4000,
    )


def test_map(kernel, ioas):
    assert ioas.map(0x7F0000000000, 0x1000, 0x5000, READ) == 0x5000
    cmd = kernel.last
    assert (cmd.flags, cmd.user_va, cmd.length, cmd.iova) == (5, 0x7F0000000000, 0x1000, 0x5000)


def test_copy(kernel, ioas):
    kernel.answers["IOMMU_IOAS_COPY"] = store(dst_iova=0x9000)
    assert ioas.copy(ioas.iommufd.ioas(4), 0x1000, 0x2000) == 0x9000
    cmd = kernel.last
    assert (cmd.flags, cmd.dst_ioas_id, cmd.src_ioas_id, cmd.src_iova, cmd.length) == (
        6,
        3,
        4,
        0x1000,
        0x2000,
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda ioas: ioas.map_file(5, 0, 2**64, 0),
        lambda ioas: ioas.map_file(5, -1, 4096, 0),
        lambda ioas: ioas.map_file(5, 0, 4096, 2**64),
        lambda ioas: ioas.map_file(5, 0, 4096, 0, prot=4),
        lambda ioas: ioas.map(-1, 4096),
        lambda ioas: ioas.unmap(0, 2**64),
        lambda ioas: ioas.copy(ioas, 2**65, 1),
        lambda ioas: ioas.iommufd.adopt(1, 2**64),
        lambda ioas: ioas.iommufd.adopt(1, 1, capacity=-1),
        lambda ioas: ioas.iommufd.compare(1, 1, capacity=1 << 30),
        lambda ioas: ioas.iommufd.mark_preserve(1, -1),
    ],
)
def test_values_that_do_not_fit_are_not_cut(kernel, ioas, call):
    before = len(kernel.calls)
    with pytest.raises(ValueError):
        call(ioas)
    assert len(kernel.calls) == before


def test_unmap(kernel, ioas):
    kernel.answers["IOMMU_IOAS_UNMAP"] = store(length=0x3000)
    assert ioas.unmap(0x1000, 0x9000) == 0x3000
    assert (kernel.last.iova, kernel.last.ioas_id) == (0x1000, 3)
    kernel.answers["IOMMU_IOAS_UNMAP"] = lambda cmd: setattr(
        cmd, "length", 0 if cmd.length == 2**64 - 1 else 1
    )
    assert ioas.unmap_all() == 0


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (
            errno.EEXIST,
            ["EEXIST", "mapped already", "ioas 3", "iova 0x5000", "length 0x1000", "file 7", "start 0x0"],
        ),
        (errno.EINVAL, ["EINVAL", "MSI window"]),
        (errno.EBUSY, ["EBUSY", "preserved"]),
        (errno.E2BIG, ["E2BIG"]),
    ],
)
def test_map_refused(kernel, ioas, number, words):
    kernel.answers["IOMMU_IOAS_MAP_FILE"] = refuse(number)
    with pytest.raises(IommufdError) as caught:
        ioas.map_file(7, 0, 0x1000, 0x5000)
    error = caught.value
    assert isinstance(error, KernelRefused)
    assert error.errno == number
    assert error.operation == "IOMMU_IOAS_MAP_FILE"
    assert error.hint
    for word in words:
        assert word in error.what, word
    assert isinstance(error.__cause__, OSError)


def test_a_kernel_that_is_gone_is_not_a_refusal(kernel, ioas):
    def gone(cmd):
        raise WireError(errno.ECONNRESET, "gone")

    kernel.answers["IOMMU_IOAS_MAP_FILE"] = gone
    with pytest.raises(ConnectionError):
        ioas.map_file(7, 0, 0x1000)


@pytest.mark.parametrize("count", [0, 3, 16, 17, 500])
def test_iova_ranges(kernel, ioas, count):
    """The kernel's way: it says how many there are, writes what fits, and refuses with EMSGSIZE otherwise."""
    ranges = [(n << 20, (n << 20) + 0xFFFFF) for n in range(count)]

    def answer(cmd):
        room, cmd.num_iovas, cmd.out_iova_alignment = cmd.num_iovas, count, 4096
        for n in range(min(room, count)):
            pair = uapi.iommu_iova_range(*ranges[n])
            ctypes.memmove(cmd.allowed_iovas + 16 * n, bytes(pair), 16)
        if count > room:
            raise OSError(errno.EMSGSIZE, "too many")

    kernel.answers["IOMMU_IOAS_IOVA_RANGES"] = answer
    assert ioas.iova_ranges() == ranges
    assert ioas.iova_alignment() == 4096


@pytest.mark.parametrize("said", [0, 16, 2**32 - 1])
def test_iova_ranges_from_a_kernel_that_makes_no_sense(kernel, ioas, said):
    def answer(cmd):
        cmd.num_iovas = said
        raise OSError(errno.EMSGSIZE, "too many")

    kernel.answers["IOMMU_IOAS_IOVA_RANGES"] = answer
    with pytest.raises(IommufdError):
        ioas.iova_ranges()


def test_allow_iovas(kernel, ioas):
    seen = []

    def answer(cmd):
        raw = ctypes.string_at(cmd.allowed_iovas, 16 * cmd.num_iovas) if cmd.num_iovas else b""
        seen.append(raw)

    kernel.answers["IOMMU_IOAS_ALLOW_IOVAS"] = answer
    ioas.allow_iovas([(0, 0xFFF), (0x2000, 2**64 - 1)])
    ioas.allow_iovas([])
    assert seen == [
        bytes(uapi.iommu_iova_range(0, 0xFFF)) + bytes(uapi.iommu_iova_range(0x2000, 2**64 - 1)),
        b"",
    ]


def test_huge_pages(kernel, ioas):
    state = {"value": 1}

    def answer(cmd):
        assert (cmd.option_id, cmd.object_id) == (uapi.IOMMU_OPTION_HUGE_PAGES, 3)
        if cmd.op == uapi.IOMMU_OPTION_OP_SET:
            state["value"] = cmd.val64
        else:
            assert cmd.val64 == 0
            cmd.val64 = state["value"]

    kernel.answers["IOMMU_OPTION"] = answer
    assert ioas.huge_pages() is True
    assert ioas.huge_pages(False) is False
    assert ioas.huge_pages() is False


def test_hwpt(kernel, ioas):
    seen = []

    def answer(cmd):
        seen.append(ctypes.string_at(cmd.data_uptr, cmd.data_len) if cmd.data_len else b"")
        cmd.out_hwpt_id = 8

    kernel.answers["IOMMU_HWPT_ALLOC"] = answer
    iommufd = ioas.iommufd
    assert iommufd.hwpt_alloc(5, ioas.id) == 8
    flags = uapi.IOMMU_HWPT_FAULT_ID_VALID
    assert iommufd.hwpt_alloc(5, 3, flags, data_type=1, data=b"s1 table", fault_id=4) == 8
    cmd = kernel.last
    assert (cmd.dev_id, cmd.pt_id, cmd.flags, cmd.data_type, cmd.fault_id) == (5, 3, flags, 1, 4)
    assert seen == [b"", b"s1 table"]


def test_hw_info(kernel, ioas):
    def answer(cmd):
        info = bytes(uapi.iommu_hw_info_vtd(flags=1, cap_reg=2, ecap_reg=3))
        ctypes.memmove(cmd.data_uptr, info, len(info))
        cmd.data_len, cmd.out_data_type = len(info), uapi.IOMMU_HW_INFO_TYPE_INTEL_VTD
        cmd.out_capabilities, cmd.out_max_pasid_log2 = 1, 20

    kernel.answers["IOMMU_GET_HW_INFO"] = answer
    info = ioas.iommufd.hw_info(5)
    raw = bytes(uapi.iommu_hw_info_vtd(flags=1, cap_reg=2, ecap_reg=3))
    assert info == HwInfo(uapi.IOMMU_HW_INFO_TYPE_INTEL_VTD, raw, 1, 20)


def test_change_process(kernel, ioas):
    ioas.iommufd.change_process()
    assert kernel.calls[-1][1] == "IOMMU_IOAS_CHANGE_PROCESS"


def test_mark_preserve(kernel, ioas):
    ioas.iommufd.mark_preserve(8, 2**64 - 1)
    assert (kernel.last.hwpt_id, kernel.last.hwpt_token) == (8, 2**64 - 1)
    kernel.answers["IOMMU_HWPT_LIVEUPDATE_MARK_PRESERVE"] = refuse(errno.ENOTTY)
    with pytest.raises(IommufdError, match="no Linux release has"):
        ioas.iommufd.mark_preserve(8, 1)


def test_adopt(kernel, ioas):
    kernel.answers["IOMMU_HWPT_LIVEUPDATE_ADOPT"] = store(
        out_hwpt_id=8, out_pages=100, out_table_bytes=4096, out_validate_ns=55, out_layout_differences=2
    )
    assert ioas.iommufd.adopt(3, 0x77) == AdoptResult(8, 100, 4096, 55, 2)
    assert (kernel.last.flags, kernel.last.ioas_id, kernel.last.hwpt_token) == (0, 3, 0x77)
    assert kernel.last.mismatch_capacity == 16
    ioas.iommufd.adopt(3, 0x77, validate_only=True, trust=True, capacity=0)
    assert (kernel.last.flags, kernel.last.mismatch_capacity, kernel.last.mismatch_uptr) == (3, 0, 0)


ROWS = [
    proposal.iommu_liveupdate_mismatch(0x1000, 0x1FFF, 0x5000, 0x6000, 3, 3, proposal.IOMMU_MISMATCH_PA, 0),
    proposal.iommu_liveupdate_mismatch(
        0x2000, 0x3FFF, 0x7000, NO_PA, 3, 0, proposal.IOMMU_MISMATCH_MISSING, 1
    ),
    proposal.iommu_liveupdate_mismatch(0x9000, 0x9FFF, NO_PA, 0x8000, 0, 1, proposal.IOMMU_MISMATCH_EXTRA, 0),
    proposal.iommu_liveupdate_mismatch(0, 2**64 - 1, NO_PA, NO_PA, 0, 0, 99, 2**32 - 1),
]
MISMATCHES = [
    Mismatch(0x1000, 0x1FFF, 0x5000, 3, 0x6000, 3, "pa", 0),
    Mismatch(0x2000, 0x3FFF, 0x7000, 3, None, None, "missing", 1),
    Mismatch(0x9000, 0x9FFF, None, None, 0x8000, 1, "extra", 0),
    Mismatch(0, 2**64 - 1, None, None, None, None, "reason 99", None),
]


def differ(total):
    def answer(cmd):
        for n in range(min(cmd.mismatch_capacity, len(ROWS))):
            ctypes.memmove(cmd.mismatch_uptr + 48 * n, bytes(ROWS[n]), 48)
        cmd.out_mismatches = total
        raise OSError(errno.EINVAL, "not equal")

    return answer


@pytest.mark.parametrize("call", ["adopt", "compare"])
@pytest.mark.parametrize(("total", "capacity", "listed"), [(4, 16, 4), (1000, 4, 4), (2, 16, 2), (3, 0, 0)])
def test_failed_validation(kernel, ioas, call, total, capacity, listed):
    for name in ("ADOPT", "COMPARE"):
        kernel.answers[f"IOMMU_HWPT_LIVEUPDATE_{name}"] = differ(total)
    with pytest.raises(NotEqual) as caught:
        getattr(ioas.iommufd, call)(3, 0x77, capacity=capacity)
    error = caught.value
    assert error.mismatches == MISMATCHES[:listed]
    assert error.total == total
    assert (error.exit_code, error.errno) == (1, errno.EINVAL)
    assert f"{total} ranges" in error.what
    assert "token 0x77" in error.what
    if listed:
        assert "iova 0x1000-0x1fff: pa at level 0: expected pa 0x5000 rw, found pa 0x6000 rw" in error.what
        assert str(MISMATCHES[1]).endswith("missing at level 1: expected pa 0x7000 rw, found nothing")


@pytest.mark.parametrize("call", ["adopt", "compare"])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBUSY, errno.ENOENT, errno.EUCLEAN, errno.EPERM])
def test_other_refusals_of_adopt_are_no_verdict(kernel, ioas, call, number):
    for name in ("ADOPT", "COMPARE"):
        kernel.answers[f"IOMMU_HWPT_LIVEUPDATE_{name}"] = refuse(number)
    with pytest.raises(IommufdError) as caught:
        getattr(ioas.iommufd, call)(3, 0x77)
    assert not isinstance(caught.value, NotEqual)
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    ("words", "flags"),
    [({}, 0), ({"validate_only": True}, 1), ({"trust": True}, 2), ({"deferred": True}, 4),
     ({"sealed": True}, 8), ({"sealed": True, "validate_only": True}, 9)],
)  # fmt: skip
def test_flags_of_adopt(kernel, ioas, words, flags):
    kernel.answers["IOMMU_HWPT_LIVEUPDATE_ADOPT"] = store(out_hwpt_id=8)
    ioas.iommufd.adopt(3, 0x77, **words)
    assert kernel.last.flags == flags


@pytest.mark.parametrize(
    ("state", "text"), [(0, "validating"), (1, "validated"), (2, "quarantined"), (7, "state 7")]
)
@pytest.mark.parametrize(("total", "capacity", "listed"), [(0, 16, 0), (4, 16, 4), (1000, 4, 4), (3, 0, 0)])
def test_progress(kernel, ioas, state, text, total, capacity, listed):
    def answer(cmd):
        for n in range(min(cmd.mismatch_capacity, len(ROWS))):
            ctypes.memmove(cmd.mismatch_uptr + 48 * n, bytes(ROWS[n]), 48)
        cmd.out_state, cmd.out_mismatches = state, total
        cmd.out_validated, cmd.out_unknown, cmd.out_quarantined = 0x5000, 0x3000, 0x1000
        cmd.out_table_bytes, cmd.out_validate_ns = 8192, 77

    kernel.answers["IOMMU_HWPT_LIVEUPDATE_PROGRESS"] = answer
    found = ioas.iommufd.progress(8, sweep=state == 1, capacity=capacity)
    assert found == Progress(text, 0x5000, 0x3000, 0x1000, 8192, 77, total, MISMATCHES[:listed])
    assert (kernel.last.hwpt_id, kernel.last.flags) == (8, int(state == 1))


def test_progress_of_no_hwpt(kernel, ioas):
    kernel.answers["IOMMU_HWPT_LIVEUPDATE_PROGRESS"] = refuse(errno.ENOENT)
    with pytest.raises(IommufdError, match="no such HWPT"):
        ioas.iommufd.progress(999)


def test_a_quarantined_range_says_what_to_do(kernel, ioas):
    kernel.answers["IOMMU_IOAS_UNMAP"] = refuse(errno.EUCLEAN)
    with pytest.raises(IommufdError, match="quarantined") as caught:
        ioas.unmap(0, 0x1000)
    assert "PROGRESS" in caught.value.hint


def test_compare(kernel, ioas):
    kernel.answers["IOMMU_HWPT_LIVEUPDATE_COMPARE"] = store(
        out_pages=7, out_table_bytes=8192, out_compare_ns=9, out_layout_differences=1
    )
    assert ioas.iommufd.compare(8, 5) == CompareResult(7, 8192, 9, 1)
    assert (kernel.last.hwpt_id, kernel.last.hwpt_token) == (8, 5)


@pytest.mark.parametrize("count", [0, 2, 64, 65, 300])
def test_liveupdate_info(kernel, ioas, count):
    def answer(cmd):
        cmd.out_hwpts = count
        for n in range(min(count, cmd.hwpt_capacity)):
            row = proposal.iommu_liveupdate_hwpt(token=n, flags=n & 1, digest_lo=n * 3, mapped_bytes=n << 12)
            ctypes.memmove(cmd.hwpt_uptr + 32 * n, bytes(row), 32)

    kernel.answers["IOMMU_LIVEUPDATE_GET_INFO"] = answer
    assert ioas.iommufd.liveupdate_info() == [PriorHwpt(n, bool(n & 1), n * 3, n << 12) for n in range(count)]


def test_liveupdate_info_is_bounded(kernel, ioas):
    kernel.answers["IOMMU_LIVEUPDATE_GET_INFO"] = store(out_hwpts=2**32 - 1)
    with pytest.raises(IommufdError, match="more than"):
        ioas.iommufd.liveupdate_info()


def test_vfio(kernel, ioas):
    kernel.answers["VFIO_DEVICE_BIND_IOMMUFD"] = store(out_devid=21)
    kernel.answers["VFIO_DEVICE_ATTACH_IOMMUFD_PT"] = lambda cmd: setattr(cmd, "pt_id", cmd.pt_id + 1)
    with VfioDevice(kernel, "/dev/vfio/devices/vfio0") as device:
        assert device.bind(ioas.iommufd) == 21
        assert device.dev_id == 21
        assert (kernel.last.argsz, kernel.last.iommufd) == (16, ioas.iommufd.fd)
        assert device.attach(3) == 4
        assert kernel.last.argsz == 12
        device.detach()
        assert kernel.last.argsz == 8
        fd = device.fd
    assert fd not in kernel.open_fds
    device.close()


def test_vfio_node_missing():
    with pytest.raises(CapabilityError, match="VFIO"):
        VfioDevice(Kernel(**{"/dev/vfio/devices/vfio0": errno.ENOENT}), "/dev/vfio/devices/vfio0")


def test_vfio_refused(kernel, ioas):
    device = VfioDevice(kernel, 5)
    kernel.answers["VFIO_DEVICE_BIND_IOMMUFD"] = refuse(errno.EPERM)
    with pytest.raises(IommufdError, match="came over the kexec"):
        device.bind(ioas.iommufd)
    kernel.answers["VFIO_DEVICE_ATTACH_IOMMUFD_PT"] = refuse(errno.EPERM)
    with pytest.raises(IommufdError, match="not proved") as caught:
        device.attach(8)
    assert "pt 8" in caught.value.what


def test_vfio_regions(kernel):
    device = VfioDevice(kernel, 5)
    kernel.answers["VFIO_DEVICE_GET_INFO"] = store(num_regions=9)
    assert device.info().num_regions == 9
    flags = vfio.VFIO_REGION_INFO_FLAG_MMAP
    kernel.answers["VFIO_DEVICE_GET_REGION_INFO"] = store(size=0x4000, offset=2 << 40, flags=flags)
    assert device.map_region(2) == "mapping"
    assert kernel.last.index == 2
    assert kernel.mapped == [(5, 0x4000, 2 << 40)]
    for size, flags in [(0, vfio.VFIO_REGION_INFO_FLAG_MMAP), (0x1000, 0)]:
        kernel.answers["VFIO_DEVICE_GET_REGION_INFO"] = store(size=size, flags=flags)
        with pytest.raises(IommufdError, match="cannot be mapped"):
            device.map_region(0)
