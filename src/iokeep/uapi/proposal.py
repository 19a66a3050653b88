# SPDX-License-Identifier: Apache-2.0
"""The ioctls that iokeep proposes for /dev/iommu; no Linux release has them, the software kernel does.

Numbers follow the last one of Linux 7.3 (0x95, IOMMU_IOAS_NOIOMMU_GET_PA). MARK_PRESERVE has the shape of
the series "iommu: Add live update state preservation" from v2 on (27 April 2026), whose number is not
known; the others do what the review of "iommufd: Serialise persisted iommufds and ioas" (October 2024)
asked for: user space builds the IOAS again, the kernel proves that the prior domain holds exactly that, and
only then adopts it. All follow /dev/iommu's rules: size first, unknown tail must be zero
(:mod:`iokeep.uapi.copy_struct`).
"""

from __future__ import annotations

import ctypes

IOMMU_HWPT_LIVEUPDATE_MARK_PRESERVE = 0x3B96
IOMMU_HWPT_LIVEUPDATE_ADOPT = 0x3B97
IOMMU_HWPT_LIVEUPDATE_COMPARE = 0x3B98
IOMMU_LIVEUPDATE_GET_INFO = 0x3B99
IOMMU_HWPT_LIVEUPDATE_PROGRESS = 0x3B9A

# iommu_hwpt_liveupdate_adopt.flags
IOMMU_LIVEUPDATE_ADOPT_VALIDATE_ONLY = 1
IOMMU_LIVEUPDATE_ADOPT_TRUST = 2
IOMMU_LIVEUPDATE_ADOPT_DEFERRED = 4
IOMMU_LIVEUPDATE_ADOPT_SEALED = 8

# iommu_hwpt_liveupdate_progress.flags
IOMMU_LIVEUPDATE_PROGRESS_SWEEP = 1

# iommu_hwpt_liveupdate_progress.out_state
IOMMU_LIVEUPDATE_VALIDATING = 0
IOMMU_LIVEUPDATE_VALIDATED = 1
IOMMU_LIVEUPDATE_QUARANTINED = 2

# iommu_liveupdate_hwpt.flags
IOMMU_LIVEUPDATE_HWPT_RECLAIMED = 1

# iommu_liveupdate_mismatch.reason
IOMMU_MISMATCH_MISSING = 1
IOMMU_MISMATCH_EXTRA = 2
IOMMU_MISMATCH_PA = 3
IOMMU_MISMATCH_PROT = 4
IOMMU_MISMATCH_RESERVED = 5
IOMMU_MISMATCH_LOOP = 6
IOMMU_MISMATCH_ROOT = 7
IOMMU_MISMATCH_ABSENT = 8
IOMMU_MISMATCH_ATTRS = 9
IOMMU_MISMATCH_CONTIG = 10
IOMMU_MISMATCH_DIGEST = 11
# A leaf, or a contiguous entry, [iova, last] that crosses the edge of an area: the area cannot be unmapped
# without it. The areas have to be mapped as they were, or a new HWPT built and COMPAREd.
IOMMU_MISMATCH_SPAN = 12

# expected_pa or found_pa where there is none; expected_prot/found_prot are 0 there.
IOMMU_MISMATCH_NO_PA = 0xFFFFFFFFFFFFFFFF
# level where the mismatch is not at one table level.
IOMMU_MISMATCH_NO_LEVEL = 0xFFFFFFFF
# expected_prot and found_prot: IOMMU_READ and IOMMU_WRITE of include/linux/iommu.h.
IOMMU_MISMATCH_READ = 1
IOMMU_MISMATCH_WRITE = 2

# Words for the reasons, as reports and iokeep.pt.verify say them.
MISMATCH_REASONS: dict[int, str] = {
    IOMMU_MISMATCH_MISSING: "missing",
    IOMMU_MISMATCH_EXTRA: "extra",
    IOMMU_MISMATCH_PA: "pa",
    IOMMU_MISMATCH_PROT: "prot",
    IOMMU_MISMATCH_RESERVED: "reserved",
    IOMMU_MISMATCH_LOOP: "loop",
    IOMMU_MISMATCH_ROOT: "root",
    IOMMU_MISMATCH_ABSENT: "absent",
    IOMMU_MISMATCH_ATTRS: "attrs",
    IOMMU_MISMATCH_CONTIG: "contig",
    IOMMU_MISMATCH_DIGEST: "digest",
    IOMMU_MISMATCH_SPAN: "span",
}


class iommu_hwpt_liveupdate_mark_preserve(ctypes.Structure):
    """Mark an HWPT to be preserved with its iommufd (IOMMU_HWPT_LIVEUPDATE_MARK_PRESERVE), 16 bytes.

    hwpt_token names the HWPT after the kexec; EADDRINUSE when another HWPT of this iommufd has it.
    """

    size: int
    hwpt_id: int
    hwpt_token: int
    _fields_ = [
        ("size", ctypes.c_uint32),
        ("hwpt_id", ctypes.c_uint32),
        ("hwpt_token", ctypes.c_uint64),
    ]


class iommu_hwpt_liveupdate_adopt(ctypes.Structure):
    """Validate a prior domain against an IOAS and make it an HWPT of that IOAS, 72 bytes.

    flags: VALIDATE_ONLY proves and changes nothing; TRUST adopts unseen (a kernel booted to allow it, else
    EPERM); DEFERRED adopts at once, each range is proved before it is first used; SEALED the same, after the
    recorded digest was found to be that of the IOAS. mismatch_uptr: array of mismatch_capacity struct
    iommu_liveupdate_mismatch. The structure is copied out on success and also with EINVAL of a failed
    validation, where out_mismatches is the number of mismatches found (it may exceed the capacity).
    out_pages counts 4 KiB pages proved, out_validate_ns nanoseconds.
    """

    size: int
    flags: int
    ioas_id: int
    out_hwpt_id: int
    hwpt_token: int
    mismatch_capacity: int
    out_mismatches: int
    mismatch_uptr: int
    out_pages: int
    out_table_bytes: int
    out_validate_ns: int
    out_layout_differences: int
    __reserved: int
    _fields_ = [
        ("size", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("ioas_id", ctypes.c_uint32),
        ("out_hwpt_id", ctypes.c_uint32),
        ("hwpt_token", ctypes.c_uint64),
        ("mismatch_capacity", ctypes.c_uint32),
        ("out_mismatches", ctypes.c_uint32),
        ("mismatch_uptr", ctypes.c_uint64),
        ("out_pages", ctypes.c_uint64),
        ("out_table_bytes", ctypes.c_uint64),
        ("out_validate_ns", ctypes.c_uint64),
        ("out_layout_differences", ctypes.c_uint32),
        ("__reserved", ctypes.c_uint32),
    ]


class iommu_hwpt_liveupdate_compare(ctypes.Structure):
    """Prove that an HWPT translates exactly as the prior domain of a token does, 72 bytes.

    Once proved (and unchanged since), the HWPT may replace the prior domain under a restored device. Copied
    out as ADOPT's structure is. out_layout_differences: ranges with other leaf sizes, which
    break-before-make cares about.
    """

    size: int
    flags: int
    hwpt_id: int
    __reserved: int
    hwpt_token: int
    mismatch_capacity: int
    out_mismatches: int
    mismatch_uptr: int
    out_pages: int
    out_table_bytes: int
    out_compare_ns: int
    out_layout_differences: int
    __reserved2: int
    _fields_ = [
        ("size", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("hwpt_id", ctypes.c_uint32),
        ("__reserved", ctypes.c_uint32),
        ("hwpt_token", ctypes.c_uint64),
        ("mismatch_capacity", ctypes.c_uint32),
        ("out_mismatches", ctypes.c_uint32),
        ("mismatch_uptr", ctypes.c_uint64),
        ("out_pages", ctypes.c_uint64),
        ("out_table_bytes", ctypes.c_uint64),
        ("out_compare_ns", ctypes.c_uint64),
        ("out_layout_differences", ctypes.c_uint32),
        ("__reserved2", ctypes.c_uint32),
    ]


class iommu_hwpt_liveupdate_progress(ctypes.Structure):
    """How far the proof of an adopted HWPT is (IOMMU_HWPT_LIVEUPDATE_PROGRESS), 72 bytes.

    flags: SWEEP proves what is left before it answers. out_state: VALIDATING (something is unknown),
    VALIDATED (all is proved), QUARANTINED (all is known, and something is wrong). out_validated,
    out_unknown and out_quarantined are bytes of the IOAS's areas. mismatch_uptr: array of mismatch_capacity
    struct iommu_liveupdate_mismatch; out_mismatches is the number found (it may exceed the capacity).
    """

    size: int
    flags: int
    hwpt_id: int
    out_state: int
    out_validated: int
    out_unknown: int
    out_quarantined: int
    out_table_bytes: int
    out_validate_ns: int
    mismatch_capacity: int
    out_mismatches: int
    mismatch_uptr: int
    _fields_ = [
        ("size", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("hwpt_id", ctypes.c_uint32),
        ("out_state", ctypes.c_uint32),
        ("out_validated", ctypes.c_uint64),
        ("out_unknown", ctypes.c_uint64),
        ("out_quarantined", ctypes.c_uint64),
        ("out_table_bytes", ctypes.c_uint64),
        ("out_validate_ns", ctypes.c_uint64),
        ("mismatch_capacity", ctypes.c_uint32),
        ("out_mismatches", ctypes.c_uint32),
        ("mismatch_uptr", ctypes.c_uint64),
    ]


class iommu_liveupdate_info(ctypes.Structure):
    """What a retrieved iommufd holds (IOMMU_LIVEUPDATE_GET_INFO), 24 bytes.

    hwpt_uptr: array of hwpt_capacity struct iommu_liveupdate_hwpt. out_hwpts is the number of prior
    domains; the first min(out_hwpts, hwpt_capacity) are written.
    """

    size: int
    flags: int
    out_hwpts: int
    hwpt_capacity: int
    hwpt_uptr: int
    _fields_ = [
        ("size", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("out_hwpts", ctypes.c_uint32),
        ("hwpt_capacity", ctypes.c_uint32),
        ("hwpt_uptr", ctypes.c_uint64),
    ]


class iommu_liveupdate_hwpt(ctypes.Structure):
    """One prior domain in the answer of IOMMU_LIVEUPDATE_GET_INFO, 32 bytes.

    digest_lo: the first 8 bytes, little-endian, of the record's digest; mapped_bytes: bytes that the domain
    maps.
    """

    token: int
    flags: int
    __reserved: int
    digest_lo: int
    mapped_bytes: int
    _fields_ = [
        ("token", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("__reserved", ctypes.c_uint32),
        ("digest_lo", ctypes.c_uint64),
        ("mapped_bytes", ctypes.c_uint64),
    ]


class iommu_liveupdate_mismatch(ctypes.Structure):
    """One range [iova, last] where the prior tables are not what is expected, 48 bytes."""

    iova: int
    last: int
    expected_pa: int
    found_pa: int
    expected_prot: int
    found_prot: int
    reason: int
    level: int
    _fields_ = [
        ("iova", ctypes.c_uint64),
        ("last", ctypes.c_uint64),
        ("expected_pa", ctypes.c_uint64),
        ("found_pa", ctypes.c_uint64),
        ("expected_prot", ctypes.c_uint32),
        ("found_prot", ctypes.c_uint32),
        ("reason", ctypes.c_uint32),
        ("level", ctypes.c_uint32),
    ]
