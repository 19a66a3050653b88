# SPDX-License-Identifier: Apache-2.0
"""Every ioctl of /dev/iommu with what it must answer, as data.

A row is (ioctl, fields, answer, where). ``fields`` overrides the structure: numbers, or names that
:func:`test_rows.scene` gives a meaning: "ioas" (with the areas of AREAS), "empty" (an IOAS with none), "dev",
"boxed" (an IOAS that allows two pages), "hwpt" (attached, automatic), "own" (made by HWPT_ALLOC), "fault"
(a fault queue), "memfd", "kmsg" (a file with no pages), "closed" (no descriptor), "absent" (no object),
"bad" (no memory), "buffer" (64 KiB), "hva" (a mapping of the memfd), "reserved" (an IOVA that a device
reserves), ("ranges", ...) an array. ``answer``: 0, an errno's name, or {field: value} that must come back.
``where``: "n" without a device, "d" with one attached to "ioas", "v" with a VFIO device only.

From drivers/iommu/iommufd of Linux 7.3.4 in the order of its checks: a row with two faults says which wins.
"""

from conf_env import FAULT, FIXED, NEST, RW, TRACKED, ULONG_MAX, R, W
from conf_env import uapi as u

BASE = 1 << 24
AREA = 0x10000
#: (iova, prot): areas of AREA bytes of the memfd from offset 0 on; the third follows on the second
AREAS = ((BASE, 3), (BASE + 0x20000, 3), (BASE + 0x30000, 3), (BASE + 0x40000, 1))
FREE = BASE + 0x100000
ABSENT = 0x7FFF0000
MEMFD_BYTES = 0x80000

F, FRW = FIXED, FIXED | RW

MAP = {"flags": FRW, "ioas_id": "ioas", "user_va": "hva", "length": AREA, "iova": FREE}
MAP_FILE = {"flags": FRW, "ioas_id": "ioas", "fd": "memfd", "start": 0, "length": AREA, "iova": FREE}
COPY = {
    "flags": FRW,
    "dst_ioas_id": "empty",
    "src_ioas_id": "ioas",
    "length": AREA,
    "dst_iova": FREE,
    "src_iova": BASE,
}
UNMAP = {"ioas_id": "ioas", "iova": BASE, "length": AREA}
ALLOW = {"ioas_id": "empty", "num_iovas": 1, "allowed_iovas": ("ranges", (FREE, FREE + AREA))}
RANGES = {"ioas_id": "ioas", "num_iovas": 64, "allowed_iovas": "buffer"}
HUGE = {"option_id": u.IOMMU_OPTION_HUGE_PAGES, "object_id": "ioas"}
RLIMIT = {"option_id": u.IOMMU_OPTION_RLIMIT_MODE}
SET, GET = {"op": u.IOMMU_OPTION_OP_SET}, {"op": u.IOMMU_OPTION_OP_GET}
HWPT = {"dev_id": "dev", "pt_id": "ioas"}
INFO = {"dev_id": "dev", "data_len": 64, "data_uptr": "buffer"}
DIRTY = {"hwpt_id": "hwpt", "iova": BASE, "length": AREA, "page_size": 0x1000, "data": "buffer"}
INVALIDATE = {"hwpt_id": "hwpt", "data_uptr": "buffer", "entry_len": 8, "entry_num": 1}
GET_PA = {"ioas_id": "ioas", "iova": BASE, "length": 0x1000}
#: a data type that no driver has
BOGUS = 0x7EAD


def _maps(name, base, extra):
    """What MAP and MAP_FILE have in common."""
    return [
        (name, base, {"iova": FREE}, "nd"),
        (name, {**base, "flags": F | R}, {"iova": FREE}, "nd"),
        (name, {**base, "flags": FRW | 8}, "EOPNOTSUPP", "nd"),
        (name, {**base, "flags": F}, "EINVAL", "nd"),
        (name, {**base, "flags": F | 8}, "EOPNOTSUPP", "n"),
        (name, {**base, "iova": ULONG_MAX}, "EOVERFLOW", "nd"),
        (name, {**base, "length": ULONG_MAX}, "EOVERFLOW", "nd"),
        (name, {**base, "flags": F, "length": ULONG_MAX}, "EOVERFLOW", "n"),
        (name, {**base, "flags": F, "ioas_id": "absent"}, "EINVAL", "n"),
        (name, {**base, "ioas_id": "absent"}, "ENOENT", "nd"),
        (name, {**base, "ioas_id": "absent", "length": 0}, "ENOENT", "n"),
        (name, {**base, "ioas_id": "dev"}, "ENOENT", "d"),
        (name, {**base, "ioas_id": "hwpt"}, "ENOENT", "d"),
        (name, {**base, "length": 0}, "EINVAL", "nd"),
        (name, {**base, "length": AREA + 1}, 0, "n"),
        (name, {**base, "length": AREA + 1}, "EINVAL", "d"),
        (name, {**base, "iova": FREE + 1}, 0, "n"),
        (name, {**base, "iova": FREE + 1}, "EINVAL", "d"),
        (name, {**base, "iova": ULONG_MAX - 0x1FFF}, "EOVERFLOW", "nd"),
        (name, {**base, "iova": BASE}, "EEXIST", "nd"),
        (name, {**base, "iova": BASE - 0x8000}, "EEXIST", "n"),
        (name, {**base, "iova": BASE + AREA - 0x1000}, "EEXIST", "nd"),
        (name, {**base, "iova": BASE + AREA}, {"iova": BASE + AREA}, "nd"),
        (name, {**base, "iova": "reserved"}, "EINVAL", "d"),
        (name, {**base, "iova": "reserved"}, 0, "n"),
        *extra,
    ]


ROWS = [
    # ---- IOMMU_DESTROY (main.c)
    ("IOMMU_DESTROY", {"id": 0}, "ENOENT", "nd"),
    ("IOMMU_DESTROY", {"id": "absent"}, "ENOENT", "nd"),
    ("IOMMU_DESTROY", {"id": "empty"}, 0, "nd"),
    ("IOMMU_DESTROY", {"id": "ioas"}, 0, "n"),
    ("IOMMU_DESTROY", {"id": "ioas"}, "EBUSY", "d"),
    ("IOMMU_DESTROY", {"id": "hwpt"}, "EBUSY", "d"),
    ("IOMMU_DESTROY", {"id": "own"}, 0, "d"),
    ("IOMMU_DESTROY", {"id": "dev"}, "EBUSY", "d"),
    ("IOMMU_DESTROY", {"id": "fault"}, "EBUSY", "nd"),
    # ---- IOAS (ioas.c)
    ("IOMMU_IOAS_ALLOC", {}, 0, "nd"),
    ("IOMMU_IOAS_ALLOC", {"flags": 1}, "EOPNOTSUPP", "nd"),
    ("IOMMU_IOAS_ALLOW_IOVAS", ALLOW, 0, "nd"),
    ("IOMMU_IOAS_ALLOW_IOVAS", {**ALLOW, "ioas_id": "ioas"}, 0, "nd"),
    ("IOMMU_IOAS_ALLOW_IOVAS", {**ALLOW, "num_iovas": 0, "allowed_iovas": "bad"}, 0, "nd"),
    ("IOMMU_IOAS_ALLOW_IOVAS", {**ALLOW, "__reserved": 1}, "EOPNOTSUPP", "n"),
    ("IOMMU_IOAS_ALLOW_IOVAS", {**ALLOW, "ioas_id": "absent"}, "ENOENT", "nd"),
    ("IOMMU_IOAS_ALLOW_IOVAS", {**ALLOW, "ioas_id": "dev"}, "ENOENT", "d"),
    ("IOMMU_IOAS_ALLOW_IOVAS", {**ALLOW, "allowed_iovas": "bad"}, "EFAULT", "nd"),
    ("IOMMU_IOAS_ALLOW_IOVAS", {**ALLOW, "allowed_iovas": ("ranges", (9, 8))}, "EINVAL", "nd"),
    ("IOMMU_IOAS_ALLOW_IOVAS", {**ALLOW, "allowed_iovas": ("ranges", (8, 8))}, "EINVAL", "nd"),
    (
        "IOMMU_IOAS_ALLOW_IOVAS",
        {**ALLOW, "num_iovas": 2, "allowed_iovas": ("ranges", (0x1000, 0x2FFF), (0x2000, 0x3FFF))},
        "EINVAL",
        "nd",
    ),
    (
        "IOMMU_IOAS_ALLOW_IOVAS",
        {**ALLOW, "num_iovas": 2, "allowed_iovas": ("ranges", (0x4000, 0x4FFF), (0x1000, 0x1FFF))},
        0,
        "n",
    ),
    ("IOMMU_IOAS_ALLOW_IOVAS", {**ALLOW, "allowed_iovas": ("ranges", (0, ULONG_MAX))}, 0, "nd"),
    (
        "IOMMU_IOAS_ALLOW_IOVAS",
        {**ALLOW, "ioas_id": "ioas", "allowed_iovas": ("ranges", (0, ULONG_MAX))},
        "EADDRINUSE",
        "d",
    ),
    ("IOMMU_IOAS_IOVA_RANGES", RANGES, 0, "nd"),
    ("IOMMU_IOAS_IOVA_RANGES", RANGES, {"num_iovas": 1, "out_iova_alignment": 1}, "n"),
    ("IOMMU_IOAS_IOVA_RANGES", {**RANGES, "__reserved": 1}, "EOPNOTSUPP", "n"),
    ("IOMMU_IOAS_IOVA_RANGES", {**RANGES, "ioas_id": "absent"}, "ENOENT", "nd"),
    ("IOMMU_IOAS_IOVA_RANGES", {**RANGES, "num_iovas": 0}, "EMSGSIZE", "nd"),
    ("IOMMU_IOAS_IOVA_RANGES", {**RANGES, "num_iovas": 0, "allowed_iovas": "bad"}, "EMSGSIZE", "n"),
    ("IOMMU_IOAS_IOVA_RANGES", {**RANGES, "allowed_iovas": "bad"}, "EFAULT", "nd"),
    *_maps(
        "IOMMU_IOAS_MAP",
        MAP,
        [
            ("IOMMU_IOAS_MAP", {**MAP, "__reserved": 1}, "EOPNOTSUPP", "n"),
            ("IOMMU_IOAS_MAP", {**MAP, "user_va": ULONG_MAX - 0xFFF}, "EOVERFLOW", "nd"),
            ("IOMMU_IOAS_MAP", {**MAP, "user_va": ULONG_MAX - 0xFFF, "length": 0}, "EINVAL", "n"),
            ("IOMMU_IOAS_MAP", {**MAP, "user_va": 0, "length": ULONG_MAX - 1}, "EINVAL", "nd"),
            ("IOMMU_IOAS_MAP", {**MAP, "user_va": "bad"}, 0, "n"),
            ("IOMMU_IOAS_MAP", {**MAP, "user_va": 0x1000}, "EFAULT", "d"),
            ("IOMMU_IOAS_MAP", {**MAP, "user_va": "bad", "iova": BASE}, "EEXIST", "n"),
            ("IOMMU_IOAS_MAP", {**MAP, "user_va": ("hva", 1)}, 0, "n"),
            ("IOMMU_IOAS_MAP", {**MAP, "user_va": ("hva", 1)}, "EINVAL", "d"),
            (
                "IOMMU_IOAS_MAP",
                {**MAP, "flags": R | W, "user_va": 0x1000, "length": 1 << 63},
                "EOVERFLOW",
                "nd",
            ),
            ("IOMMU_IOAS_MAP", {**MAP, "flags": R | W, "ioas_id": "boxed"}, "ENOSPC", "n"),
        ],
    ),
    *_maps(
        "IOMMU_IOAS_MAP_FILE",
        MAP_FILE,
        [
            ("IOMMU_IOAS_MAP_FILE", {**MAP_FILE, "fd": "closed"}, "EBADF", "nd"),
            ("IOMMU_IOAS_MAP_FILE", {**MAP_FILE, "fd": -1}, "EBADF", "nd"),
            ("IOMMU_IOAS_MAP_FILE", {**MAP_FILE, "fd": "closed", "ioas_id": "absent"}, "ENOENT", "n"),
            ("IOMMU_IOAS_MAP_FILE", {**MAP_FILE, "fd": "closed", "length": 0}, "EINVAL", "n"),
            ("IOMMU_IOAS_MAP_FILE", {**MAP_FILE, "fd": "closed", "start": ULONG_MAX}, "EOVERFLOW", "n"),
            ("IOMMU_IOAS_MAP_FILE", {**MAP_FILE, "start": ULONG_MAX - 0xFFF}, "EOVERFLOW", "nd"),
            ("IOMMU_IOAS_MAP_FILE", {**MAP_FILE, "start": 0, "length": ULONG_MAX - 1}, "EINVAL", "nd"),
            ("IOMMU_IOAS_MAP_FILE", {**MAP_FILE, "start": MEMFD_BYTES}, 0, "n"),
            ("IOMMU_IOAS_MAP_FILE", {**MAP_FILE, "start": MEMFD_BYTES}, "EINVAL", "d"),
            ("IOMMU_IOAS_MAP_FILE", {**MAP_FILE, "start": MEMFD_BYTES - 0x1000}, "EINVAL", "d"),
            ("IOMMU_IOAS_MAP_FILE", {**MAP_FILE, "fd": "kmsg"}, 0, "n"),
            ("IOMMU_IOAS_MAP_FILE", {**MAP_FILE, "fd": "kmsg"}, "EINVAL", "d"),
            ("IOMMU_IOAS_MAP_FILE", {**MAP_FILE, "start": 1}, 0, "n"),
            ("IOMMU_IOAS_MAP_FILE", {**MAP_FILE, "start": 1}, "EINVAL", "d"),
            ("IOMMU_IOAS_MAP_FILE", {**MAP_FILE, "flags": R | W, "length": 1 << 63}, "EOVERFLOW", "nd"),
            ("IOMMU_IOAS_MAP_FILE", {**MAP_FILE, "flags": R | W, "ioas_id": "boxed"}, "ENOSPC", "n"),
            # without FIXED_IOVA the iova is ignored, but not one that cannot be
            ("IOMMU_IOAS_MAP_FILE", {**MAP_FILE, "flags": R | W, "iova": ULONG_MAX}, "EOVERFLOW", "n"),
            ("IOMMU_IOAS_MAP_FILE", {**MAP_FILE, "flags": R | W, "iova": BASE + 1}, 0, "nd"),
        ],
    ),
    ("IOMMU_IOAS_COPY", COPY, {"dst_iova": FREE}, "nd"),
    ("IOMMU_IOAS_COPY", {**COPY, "dst_ioas_id": "ioas"}, {"dst_iova": FREE}, "nd"),
    ("IOMMU_IOAS_COPY", {**COPY, "dst_ioas_id": "ioas", "dst_iova": BASE}, "EEXIST", "nd"),
    ("IOMMU_IOAS_COPY", {**COPY, "src_iova": BASE + 0x28000}, {"dst_iova": FREE}, "nd"),
    ("IOMMU_IOAS_COPY", {**COPY, "src_iova": BASE + 0x1000, "length": 0x2000}, 0, "nd"),
    ("IOMMU_IOAS_COPY", {**COPY, "src_iova": BASE + 0x8000}, "ENOENT", "nd"),
    ("IOMMU_IOAS_COPY", {**COPY, "src_iova": BASE - 0x1000}, "ENOENT", "nd"),
    ("IOMMU_IOAS_COPY", {**COPY, "src_iova": FREE}, "ENOENT", "nd"),
    ("IOMMU_IOAS_COPY", {**COPY, "src_iova": ULONG_MAX - 0xFFF}, "EOVERFLOW", "nd"),
    ("IOMMU_IOAS_COPY", {**COPY, "length": 0}, "EINVAL", "nd"),
    ("IOMMU_IOAS_COPY", {**COPY, "flags": FRW | 8}, "EOPNOTSUPP", "nd"),
    ("IOMMU_IOAS_COPY", {**COPY, "flags": F}, "EINVAL", "nd"),
    ("IOMMU_IOAS_COPY", {**COPY, "flags": F, "length": ULONG_MAX}, "EOVERFLOW", "n"),
    ("IOMMU_IOAS_COPY", {**COPY, "length": ULONG_MAX}, "EOVERFLOW", "n"),
    ("IOMMU_IOAS_COPY", {**COPY, "src_iova": ULONG_MAX}, "EOVERFLOW", "n"),
    ("IOMMU_IOAS_COPY", {**COPY, "dst_iova": ULONG_MAX}, "EOVERFLOW", "n"),
    ("IOMMU_IOAS_COPY", {**COPY, "src_ioas_id": "absent"}, "ENOENT", "nd"),
    ("IOMMU_IOAS_COPY", {**COPY, "src_ioas_id": "absent", "length": 0}, "ENOENT", "n"),
    ("IOMMU_IOAS_COPY", {**COPY, "dst_ioas_id": "absent"}, "ENOENT", "nd"),
    ("IOMMU_IOAS_COPY", {**COPY, "dst_ioas_id": "absent", "length": 0}, "EINVAL", "n"),
    ("IOMMU_IOAS_COPY", {**COPY, "src_iova": BASE + 0x40000}, "EPERM", "nd"),
    ("IOMMU_IOAS_COPY", {**COPY, "src_iova": BASE + 0x40000, "flags": F | R}, {"dst_iova": FREE}, "nd"),
    ("IOMMU_IOAS_COPY", {**COPY, "dst_ioas_id": "ioas", "dst_iova": FREE + 1}, 0, "n"),
    ("IOMMU_IOAS_COPY", {**COPY, "dst_ioas_id": "ioas", "dst_iova": FREE + 1}, "EINVAL", "d"),
    ("IOMMU_IOAS_COPY", {**COPY, "dst_ioas_id": "ioas", "length": 0x1001}, "EINVAL", "d"),
    (
        "IOMMU_IOAS_COPY",
        {**COPY, "dst_ioas_id": "ioas", "src_iova": BASE + 1, "length": 0x1000},
        "EINVAL",
        "d",
    ),
    ("IOMMU_IOAS_COPY", {**COPY, "dst_ioas_id": "ioas", "dst_iova": "reserved"}, "EINVAL", "d"),
    ("IOMMU_IOAS_COPY", {**COPY, "flags": R | W, "dst_ioas_id": "boxed"}, "ENOSPC", "n"),
    ("IOMMU_IOAS_UNMAP", UNMAP, {"length": AREA}, "nd"),
    ("IOMMU_IOAS_UNMAP", {**UNMAP, "ioas_id": "absent"}, "ENOENT", "nd"),
    ("IOMMU_IOAS_UNMAP", {**UNMAP, "ioas_id": "absent", "length": 0}, "ENOENT", "n"),
    ("IOMMU_IOAS_UNMAP", {**UNMAP, "iova": ULONG_MAX}, "EOVERFLOW", "nd"),
    ("IOMMU_IOAS_UNMAP", {**UNMAP, "length": ULONG_MAX}, "EOVERFLOW", "nd"),
    ("IOMMU_IOAS_UNMAP", {**UNMAP, "length": 0}, "EINVAL", "nd"),
    ("IOMMU_IOAS_UNMAP", {**UNMAP, "length": ULONG_MAX - 1}, "EOVERFLOW", "nd"),
    ("IOMMU_IOAS_UNMAP", {**UNMAP, "iova": FREE}, "ENOENT", "nd"),
    ("IOMMU_IOAS_UNMAP", {**UNMAP, "length": 0x1000}, "ENOENT", "nd"),
    ("IOMMU_IOAS_UNMAP", {**UNMAP, "length": 1}, "ENOENT", "nd"),
    ("IOMMU_IOAS_UNMAP", {**UNMAP, "iova": BASE + 0x1000}, "ENOENT", "nd"),
    ("IOMMU_IOAS_UNMAP", {**UNMAP, "iova": BASE + 0x20000, "length": 0x18000}, "ENOENT", "nd"),
    ("IOMMU_IOAS_UNMAP", {**UNMAP, "iova": BASE - 0x5001, "length": 0x35001}, {"length": 2 * AREA}, "nd"),
    ("IOMMU_IOAS_UNMAP", {**UNMAP, "iova": BASE, "length": 0x50000}, {"length": 4 * AREA}, "nd"),
    ("IOMMU_IOAS_UNMAP", {**UNMAP, "iova": 0, "length": ULONG_MAX}, {"length": 4 * AREA}, "nd"),
    ("IOMMU_IOAS_UNMAP", {"ioas_id": "empty", "iova": 0, "length": ULONG_MAX}, {"length": 0}, "nd"),
    ("IOMMU_IOAS_UNMAP", {"ioas_id": "empty", "iova": 0, "length": ULONG_MAX - 1}, "ENOENT", "nd"),
    ("IOMMU_IOAS_CHANGE_PROCESS", {}, 0, "nd"),
    ("IOMMU_IOAS_CHANGE_PROCESS", {"__reserved": 1}, "EOPNOTSUPP", "nd"),
    # ---- options, compatibility
    ("IOMMU_OPTION", {**HUGE, **GET}, {"val64": 1}, "nd"),
    ("IOMMU_OPTION", {**HUGE, **SET, "val64": 1}, 0, "nd"),
    ("IOMMU_OPTION", {**HUGE, **SET, "val64": 0}, 0, "n"),
    ("IOMMU_OPTION", {**HUGE, **SET, "val64": 0}, "EINVAL", "d"),
    ("IOMMU_OPTION", {**HUGE, **SET, "val64": 2}, "EINVAL", "nd"),
    ("IOMMU_OPTION", {**HUGE, "op": 2}, "EOPNOTSUPP", "nd"),
    ("IOMMU_OPTION", {**HUGE, **GET, "__reserved": 1}, "EOPNOTSUPP", "n"),
    ("IOMMU_OPTION", {**HUGE, **GET, "object_id": "absent"}, "ENOENT", "nd"),
    ("IOMMU_OPTION", {**HUGE, "op": 2, "object_id": "absent"}, "ENOENT", "n"),
    ("IOMMU_OPTION", {**GET, "option_id": 99, "object_id": "absent"}, "EOPNOTSUPP", "n"),
    ("IOMMU_OPTION", {**RLIMIT, **GET}, {"val64": 0}, "nd"),
    ("IOMMU_OPTION", {**RLIMIT, **GET, "object_id": 1}, "EOPNOTSUPP", "n"),
    ("IOMMU_OPTION", {**RLIMIT, **SET, "val64": 1}, "EBUSY", "nd"),
    ("IOMMU_OPTION", {**RLIMIT, **SET, "val64": 2}, "EBUSY", "n"),
    ("IOMMU_OPTION", {**RLIMIT, "op": 2}, "EOPNOTSUPP", "n"),
    ("IOMMU_VFIO_IOAS", {"op": u.IOMMU_VFIO_IOAS_GET}, "ENODEV", "nd"),
    ("IOMMU_VFIO_IOAS", {"op": u.IOMMU_VFIO_IOAS_SET, "ioas_id": "ioas"}, 0, "nd"),
    ("IOMMU_VFIO_IOAS", {"op": u.IOMMU_VFIO_IOAS_SET, "ioas_id": "absent"}, "ENOENT", "n"),
    ("IOMMU_VFIO_IOAS", {"op": u.IOMMU_VFIO_IOAS_CLEAR}, 0, "nd"),
    ("IOMMU_VFIO_IOAS", {"op": 9}, "EOPNOTSUPP", "n"),
    ("IOMMU_VFIO_IOAS", {"op": u.IOMMU_VFIO_IOAS_CLEAR, "__reserved": 1}, "EOPNOTSUPP", "n"),
    # ---- HWPTs (hw_pagetable.c)
    ("IOMMU_HWPT_ALLOC", HWPT, 0, "d"),
    ("IOMMU_HWPT_ALLOC", {**HWPT, "pt_id": "empty"}, 0, "d"),
    ("IOMMU_HWPT_ALLOC", {**HWPT, "flags": FAULT, "fault_id": "fault"}, 0, "d"),
    ("IOMMU_HWPT_ALLOC", {**HWPT, "__reserved": 1}, "EOPNOTSUPP", "nd"),
    ("IOMMU_HWPT_ALLOC", {**HWPT, "data_len": 8, "data_uptr": "buffer"}, "EINVAL", "nd"),
    ("IOMMU_HWPT_ALLOC", {**HWPT, "data_type": 1}, "EINVAL", "nd"),
    ("IOMMU_HWPT_ALLOC", {**HWPT, "data_type": 1, "dev_id": "absent"}, "EINVAL", "n"),
    ("IOMMU_HWPT_ALLOC", {**HWPT, "dev_id": "absent"}, "ENOENT", "nd"),
    ("IOMMU_HWPT_ALLOC", {**HWPT, "dev_id": "ioas"}, "ENOENT", "nd"),
    ("IOMMU_HWPT_ALLOC", {**HWPT, "pt_id": "absent"}, "EINVAL", "d"),
    ("IOMMU_HWPT_ALLOC", {**HWPT, "pt_id": "dev"}, "EINVAL", "d"),
    ("IOMMU_HWPT_ALLOC", {**HWPT, "pt_id": "fault"}, "EINVAL", "d"),
    ("IOMMU_HWPT_ALLOC", {**HWPT, "flags": 0x100}, "EOPNOTSUPP", "d"),
    ("IOMMU_HWPT_ALLOC", {**HWPT, "flags": FAULT | NEST, "fault_id": "fault"}, "EOPNOTSUPP", "d"),
    ("IOMMU_HWPT_ALLOC", {**HWPT, "flags": FAULT, "fault_id": "absent"}, "ENOENT", "d"),
    ("IOMMU_HWPT_ALLOC", {**HWPT, "flags": FAULT, "fault_id": "ioas"}, "ENOENT", "d"),
    ("IOMMU_HWPT_ALLOC", {**HWPT, "flags": FAULT | TRACKED, "fault_id": "absent"}, "EOPNOTSUPP", "d"),
    ("IOMMU_HWPT_ALLOC", {**HWPT, "flags": TRACKED}, "EOPNOTSUPP", "d"),
    ("IOMMU_HWPT_ALLOC", {**HWPT, "flags": NEST}, "EOPNOTSUPP", "v"),
    (
        "IOMMU_HWPT_ALLOC",
        {**HWPT, "data_type": BOGUS, "data_len": 8, "data_uptr": "buffer"},
        "EOPNOTSUPP",
        "d",
    ),
    ("IOMMU_HWPT_ALLOC", {**HWPT, "pt_id": "own"}, "EOPNOTSUPP", "d"),
    ("IOMMU_HWPT_ALLOC", {**HWPT, "pt_id": "own", "flags": TRACKED}, "EOPNOTSUPP", "d"),
    (
        "IOMMU_HWPT_ALLOC",
        {**HWPT, "pt_id": "own", "data_type": BOGUS, "data_len": 8, "data_uptr": "buffer"},
        "EINVAL",
        "d",
    ),
    (
        "IOMMU_HWPT_ALLOC",
        {**HWPT, "pt_id": "hwpt", "data_type": BOGUS, "data_len": 8, "data_uptr": "buffer"},
        "EINVAL",
        "d",
    ),
    ("IOMMU_HWPT_SET_DIRTY_TRACKING", {"hwpt_id": "hwpt", "flags": 1}, "EOPNOTSUPP", "d"),
    ("IOMMU_HWPT_SET_DIRTY_TRACKING", {"hwpt_id": "hwpt"}, "EOPNOTSUPP", "d"),
    ("IOMMU_HWPT_SET_DIRTY_TRACKING", {"hwpt_id": "absent", "flags": 2}, "EOPNOTSUPP", "nd"),
    ("IOMMU_HWPT_SET_DIRTY_TRACKING", {"hwpt_id": "absent"}, "ENOENT", "nd"),
    ("IOMMU_HWPT_SET_DIRTY_TRACKING", {"hwpt_id": "ioas"}, "ENOENT", "nd"),
    ("IOMMU_HWPT_GET_DIRTY_BITMAP", DIRTY, "EOPNOTSUPP", "d"),
    ("IOMMU_HWPT_GET_DIRTY_BITMAP", {**DIRTY, "flags": 2}, "EOPNOTSUPP", "nd"),
    ("IOMMU_HWPT_GET_DIRTY_BITMAP", {**DIRTY, "hwpt_id": "absent", "__reserved": 1}, "EOPNOTSUPP", "n"),
    ("IOMMU_HWPT_GET_DIRTY_BITMAP", {**DIRTY, "hwpt_id": "absent"}, "ENOENT", "nd"),
    ("IOMMU_HWPT_GET_DIRTY_BITMAP", {**DIRTY, "hwpt_id": "absent", "length": 0}, "ENOENT", "n"),
    ("IOMMU_HWPT_GET_DIRTY_BITMAP", {**DIRTY, "length": 0}, "EINVAL", "d"),
    ("IOMMU_HWPT_GET_DIRTY_BITMAP", {**DIRTY, "length": 0, "iova": ULONG_MAX}, "EINVAL", "d"),
    ("IOMMU_HWPT_GET_DIRTY_BITMAP", {**DIRTY, "iova": ULONG_MAX - 0xFFF}, "EOVERFLOW", "d"),
    ("IOMMU_HWPT_GET_DIRTY_BITMAP", {**DIRTY, "iova": BASE + 1}, "EINVAL", "d"),
    ("IOMMU_HWPT_GET_DIRTY_BITMAP", {**DIRTY, "length": AREA + 1}, "EINVAL", "d"),
    ("IOMMU_HWPT_GET_DIRTY_BITMAP", {**DIRTY, "page_size": 0}, "EINVAL", "d"),
    ("IOMMU_HWPT_GET_DIRTY_BITMAP", {**DIRTY, "page_size": 1 << 40}, "EINVAL", "d"),
    ("IOMMU_HWPT_INVALIDATE", INVALIDATE, "EINVAL", "d"),
    ("IOMMU_HWPT_INVALIDATE", {**INVALIDATE, "entry_num": 0}, "EINVAL", "d"),
    ("IOMMU_HWPT_INVALIDATE", {**INVALIDATE, "__reserved": 1}, "EOPNOTSUPP", "nd"),
    ("IOMMU_HWPT_INVALIDATE", {**INVALIDATE, "hwpt_id": "absent"}, "ENOENT", "nd"),
    ("IOMMU_HWPT_INVALIDATE", {**INVALIDATE, "hwpt_id": "absent", "entry_num": 0}, "ENOENT", "n"),
    ("IOMMU_HWPT_INVALIDATE", {**INVALIDATE, "hwpt_id": "absent", "data_uptr": 0}, "EINVAL", "n"),
    ("IOMMU_HWPT_INVALIDATE", {**INVALIDATE, "hwpt_id": "absent", "entry_len": 0}, "EINVAL", "n"),
    ("IOMMU_HWPT_INVALIDATE", {**INVALIDATE, "hwpt_id": "absent", "entry_len": 4097}, "EINVAL", "n"),
    ("IOMMU_HWPT_INVALIDATE", {**INVALIDATE, "hwpt_id": "absent", "entry_num": (1 << 19) + 1}, "EINVAL", "n"),
    ("IOMMU_HWPT_INVALIDATE", {**INVALIDATE, "hwpt_id": "absent", "entry_num": 1 << 19}, "ENOENT", "n"),
    ("IOMMU_HWPT_INVALIDATE", {**INVALIDATE, "hwpt_id": "ioas"}, "EINVAL", "n"),
    # ---- devices (device.c)
    ("IOMMU_GET_HW_INFO", INFO, 0, "d"),
    ("IOMMU_GET_HW_INFO", {**INFO, "data_len": 0, "data_uptr": 0}, 0, "d"),
    ("IOMMU_GET_HW_INFO", {**INFO, "data_len": 4}, 0, "d"),
    ("IOMMU_GET_HW_INFO", {**INFO, "flags": 2}, "EOPNOTSUPP", "nd"),
    ("IOMMU_GET_HW_INFO", {**INFO, "__reserved": [1, 0, 0]}, "EOPNOTSUPP", "nd"),
    ("IOMMU_GET_HW_INFO", {**INFO, "dev_id": "absent"}, "ENOENT", "nd"),
    ("IOMMU_GET_HW_INFO", {**INFO, "dev_id": "absent", "data_uptr": 0}, "ENOENT", "n"),
    ("IOMMU_GET_HW_INFO", {**INFO, "data_uptr": 0}, "EFAULT", "d"),
    ("IOMMU_GET_HW_INFO", {**INFO, "data_uptr": "bad"}, "EFAULT", "d"),
    (
        "IOMMU_GET_HW_INFO",
        {**INFO, "flags": u.IOMMU_HW_INFO_FLAG_INPUT_TYPE, "in_data_type": BOGUS},
        "EOPNOTSUPP",
        "d",
    ),
    ("IOMMU_GET_HW_INFO", {**INFO, "in_data_type": BOGUS}, 0, "d"),
    # ---- faults, vIOMMU (eventq.c, viommu.c)
    ("IOMMU_FAULT_QUEUE_ALLOC", {"flags": 1}, "EOPNOTSUPP", "nd"),
    ("IOMMU_VIOMMU_ALLOC", {"flags": 1, "type": 1}, "EOPNOTSUPP", "n"),
    ("IOMMU_VIOMMU_ALLOC", {"type": 0, "dev_id": "absent"}, "EOPNOTSUPP", "n"),
    ("IOMMU_VIOMMU_ALLOC", {"type": 1, "dev_id": "absent"}, "ENOENT", "nd"),
    ("IOMMU_VIOMMU_ALLOC", {"type": BOGUS, "dev_id": "dev", "hwpt_id": "absent"}, "EOPNOTSUPP", "d"),
    ("IOMMU_VDEVICE_ALLOC", {"viommu_id": "absent", "dev_id": "absent"}, "ENOENT", "nd"),
    ("IOMMU_VDEVICE_ALLOC", {"viommu_id": "ioas", "dev_id": "dev"}, "ENOENT", "d"),
    ("IOMMU_VEVENTQ_ALLOC", {"flags": 1, "type": 1, "veventq_depth": 1}, "EOPNOTSUPP", "n"),
    ("IOMMU_VEVENTQ_ALLOC", {"__reserved": 1, "type": 1, "veventq_depth": 1}, "EOPNOTSUPP", "n"),
    ("IOMMU_VEVENTQ_ALLOC", {"type": 0, "veventq_depth": 0}, "EOPNOTSUPP", "n"),
    ("IOMMU_VEVENTQ_ALLOC", {"type": 1, "veventq_depth": 0, "viommu_id": "absent"}, "EINVAL", "n"),
    (
        "IOMMU_VEVENTQ_ALLOC",
        {"type": 1, "veventq_depth": (1 << 19) + 1, "viommu_id": "absent"},
        "EINVAL",
        "n",
    ),
    ("IOMMU_VEVENTQ_ALLOC", {"type": 1, "veventq_depth": 1 << 19, "viommu_id": "absent"}, "ENOENT", "n"),
    ("IOMMU_HW_QUEUE_ALLOC", {"flags": 1, "type": 1, "length": 1}, "EOPNOTSUPP", "n"),
    ("IOMMU_HW_QUEUE_ALLOC", {"type": 0, "length": 0}, "EOPNOTSUPP", "n"),
    ("IOMMU_HW_QUEUE_ALLOC", {"type": 1, "length": 0, "viommu_id": "absent"}, "EINVAL", "n"),
    (
        "IOMMU_HW_QUEUE_ALLOC",
        {"type": 1, "length": 0x2000, "nesting_parent_iova": ULONG_MAX - 0xFFF, "viommu_id": "absent"},
        "EOVERFLOW",
        "n",
    ),
    ("IOMMU_HW_QUEUE_ALLOC", {"type": 1, "length": 0x1000, "viommu_id": "absent"}, "ENOENT", "n"),
]

#: where the kernel has no noiommu mode, all of these are EOPNOTSUPP
NOIOMMU_ROWS = [
    ("IOMMU_IOAS_NOIOMMU_GET_PA", GET_PA, "EOPNOTSUPP", "nd"),
    ("IOMMU_IOAS_NOIOMMU_GET_PA", {**GET_PA, "flags": 1, "length": 0}, "EOPNOTSUPP", "n"),
    ("IOMMU_IOAS_NOIOMMU_GET_PA", {**GET_PA, "__reserved": 1}, "EOPNOTSUPP", "n"),
    ("IOMMU_IOAS_NOIOMMU_GET_PA", {**GET_PA, "length": 0, "ioas_id": "absent"}, "EINVAL", "n"),
    ("IOMMU_IOAS_NOIOMMU_GET_PA", {**GET_PA, "iova": ULONG_MAX, "ioas_id": "absent"}, "EOVERFLOW", "n"),
    ("IOMMU_IOAS_NOIOMMU_GET_PA", {**GET_PA, "iova": ULONG_MAX - 1}, "ENOENT", "n"),
    ("IOMMU_IOAS_NOIOMMU_GET_PA", {**GET_PA, "ioas_id": "absent"}, "ENOENT", "n"),
    ("IOMMU_IOAS_NOIOMMU_GET_PA", {**GET_PA, "iova": FREE}, "ENOENT", "nd"),
]
