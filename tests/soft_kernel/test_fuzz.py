# SPDX-License-Identifier: Apache-2.0
"""Whatever a process sends: an errno, never a bug of the kernel, and nothing left behind."""

import contextlib
import struct

from hypothesis import given, settings
from hypothesis import strategies as st
from soft_machine import Caller, boot, settled

from iokeep.soft.kernel.syserror import SysError
from iokeep.uapi.copy_struct import IOMMU_IOCTLS, LIVEUPDATE_IOCTLS, PROPOSED_IOCTLS, VFIO_IOCTLS
from iokeep.uapi.wire import NARGS, WITH_PAYLOAD, Call

REQUESTS = sorted({*IOMMU_IOCTLS, *PROPOSED_IOCTLS, *LIVEUPDATE_IOCTLS, *VFIO_IOCTLS, 0x3B6F, 0x3B9A})
CALLS = sorted(call for call in Call if call in NARGS and call not in (Call.HELLO, Call.REBOOT_KEXEC))
PATHS = [
    b"/dev/iommu",
    b"/dev/vfio/devices/vfio0",
    b"/dev/kmsg",
    b"/dev/liveupdate",
    b"/nowhere",
    b"\xff",
    b"a\0b",
]
words = st.one_of(
    st.integers(0, 8),
    st.sampled_from(
        [0, 4095, 4096, 8192, 1 << 20, 1 << 21, 0xFEE00000, 1 << 47, 1 << 48, 1 << 63, 2**64 - 4096]
    ),
    st.sampled_from([2**64 - 1, 2**63 - 1, 2**32 - 1, 2**31, 0x7F00_0000_0000, 0x1000_0000_0000]),
    st.integers(0, 2**64 - 1),
)
payloads = st.one_of(
    st.sampled_from(PATHS),
    st.lists(words, max_size=10).map(lambda v: struct.pack(f"<{len(v)}Q", *v)),
    st.tuples(st.sampled_from([8, 12, 16, 24, 32, 40, 48, 72]), st.lists(st.integers(0, 9), max_size=19)).map(
        lambda t: struct.pack(f"<{1 + len(t[1])}I", t[0], *t[1]).ljust(t[0], b"\0")
    ),
    st.binary(max_size=100),
)
steps = st.lists(
    st.tuples(st.sampled_from(CALLS), st.integers(-2, 9), st.lists(words, min_size=3, max_size=3), payloads),
    max_size=30,
)


@settings(max_examples=300, deadline=None)
@given(steps=steps, requests=st.lists(st.sampled_from(REQUESTS), min_size=30, max_size=30))
def test_any_calls(steps, requests):
    kernel = boot(4 << 20)
    c = Caller(kernel)
    c.user.put(4096)
    fd = c.iommu()
    v = c.vfio()
    c.bind(v, fd)
    c.memfd("ram", 1 << 20)
    ioas = c.ioas(fd)
    c.attach(v, ioas)
    for (call, number, args, payload), request in zip(steps, requests, strict=False):
        if call == Call.IOCTL:
            args = [request]
        with contextlib.suppress(SysError):  # any other exception is a bug of the kernel
            c.call(call, number, tuple(args[: NARGS[call]]), payload if call in WITH_PAYLOAD else b"")
    # A file mapped into itself keeps itself alive, as in Linux: take such areas out first.
    for file in list(kernel.files.values()):
        for item in list(getattr(file, "objects", {}).values()):
            if item.type_name == "ioas" and not file.preserved:
                item.unmap(0, 2**64 - 1)
    settled(kernel)
