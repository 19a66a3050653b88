# SPDX-License-Identifier: Apache-2.0
"""What an errno means for one ioctl, and what to do next: text for the errors of the client libraries.

Sources: the code of Linux 7.3.4 (drivers/iommu/iommufd, drivers/vfio/device_cdev.c, kernel/liveupdate) and
what a running 7.3.4 was seen to answer; for the proposed ioctls :mod:`iokeep.uapi.proposal`. Operations go
by their C name.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from iokeep.errors import CapabilityError, KernelRefused

if TYPE_CHECKING:
    import ctypes

    from iokeep.uapi.transport import Transport

_Text = tuple[str, str]

_MAP: dict[str, _Text] = {
    "EEXIST": ("part of the IOVA range is mapped already", "unmap it first, or choose another iova"),
    "ENOSPC": ("no free IOVA range is long enough", "look at iova_ranges(), or unmap something"),
    "EOVERFLOW": (
        "start and length, or iova and length, pass the end of the 64-bit space",
        "check the length",
    ),
    "EINVAL": (
        "iova, length or start is not a multiple of the IOMMU's page size, length is 0, neither read "
        "nor write is "
        "asked for, or the IOVA is reserved (MSI window 0xfee00000-0xfeefffff) or outside of what the "
        "IOAS allows; "
        "with an HWPT attached also: the file cannot be pinned (no memfd, or past its end)",
        "compare with iova_ranges() and the size of the file",
    ),
    "EOPNOTSUPP": ("a flag that this kernel does not know", "check the flags against this kernel's version"),
    "EPERM": ("writing is asked for on pages that may only be read", "map read-only, or check the seals"),
    "ENOENT": ("there is no such IOAS in this iommufd", "check the id"),
    "EBUSY": (
        "the IOAS is immutable: its iommufd is preserved in a live-update session",
        "close the session first",
    ),
    "ENOMEM": (
        "the memory lock limit is reached, or the kernel is out of memory",
        "raise RLIMIT_MEMLOCK (ulimit -l)",
    ),
    "EFAULT": (
        "the user memory is not there, or cannot be pinned as asked (a device BAR, or a read-only mapping)",
        "map files with MAP_FILE; map a BAR by its dma-buf",
    ),
}

_TOO_NEW: _Text = (
    "the structure has fields that this kernel does not know, and they are not zero",
    "leave the newer fields zero on this kernel",
)

_ADOPT: dict[str, _Text] = {
    "EINVAL": (
        "the tables of the prior domain are not what is expected, or an argument is out of range",
        "look at the mismatches; nothing was changed",
    ),
    "ENOENT": (
        "no such IOAS, HWPT or token in this iommufd",
        "use the iommufd that the session gave back, and a token from before the kexec (liveupdate_info())",
    ),
    "EBUSY": ("the prior domain is reclaimed already", "each token can be adopted once"),
    "EPERM": ("this kernel was not booted to adopt unseen", "do not use the trust policy; adopt validates"),
    "EOPNOTSUPP": (
        "this kernel is not tested with the table format or the features of the prior domain, or does "
        "not know a flag",
        "rebuild the tables on this kernel, or boot one that knows the format",
    ),
    "EUCLEAN": (
        "the record of the prior domain is damaged: its digest, its counts or its root do not fit",
        "do not adopt; rebuild, and keep an image of the memory (iokeep handover check)",
    ),
    "EFAULT": ("the mismatch array is not in this process's memory", "check mismatch_uptr and its capacity"),
    "ENOTTY": (
        "this kernel has no IOMMU_HWPT_LIVEUPDATE_* ioctls (no Linux release has)",
        "use the software host: iokeep rehearse",
    ),
}

_NO_HWPT: _Text = ("there is no such paging HWPT in this iommufd", "check the id")
_DATA_FAULT = ("the driver's data is not in this process's memory", "check data_uptr and the length")
_NO_VIOMMU: _Text = (
    "there is no such vIOMMU or device in this iommufd",
    "make the vIOMMU first; check the ids",
)
_NO_VIRTUAL: _Text = (
    "the IOMMU's driver offers no vIOMMU of that type, or flags or a reserved field is not 0",
    "hw_info() says what the IOMMU is; only some have a vIOMMU",
)
_NO_DIRTY: _Text = (
    "the HWPT was made without dirty tracking, or a flag is unknown",
    "make it with IOMMU_HWPT_ALLOC_DIRTY_TRACKING, where hw_info() shows the capability",
)
_NO_FLAGS: _Text = ("flags must be 0", "leave them 0")
_RESERVED: _Text = ("a reserved field is not 0", "leave it 0")
_RANGES_FAULT: _Text = ("the array of ranges is not in this process's memory", "check its address")

_NO_DESCRIPTOR: _Text = ("this process has no descriptor left", "raise RLIMIT_NOFILE (ulimit -n)")

# kernel/liveupdate/luo_session.c luo_session_create(), luo_session_retrieve(); kho_block.c
_CREATE_SESSION: dict[str, _Text] = {
    "EINVAL": ("the name is empty or longer than 63 bytes", "choose another name"),
    "EEXIST": (
        "a session of that name is open for the next kexec",
        "choose another name, or close every descriptor of the other session",
    ),
    "ENOSPC": ("there are 510000 sessions", "close sessions that are not needed"),
    "ENOMEM": ("no memory for another session", "close sessions that are not needed"),
    "EMFILE": _NO_DESCRIPTOR,
}
_RETRIEVE_SESSION: dict[str, _Text] = {
    "EINVAL": (
        "the session was retrieved already in this boot",
        "keep its descriptor, or have who retrieved it pass it on",
    ),
    "ENOENT": (
        "no session of that name came over the kexec, or it was retrieved and closed: the last close ends it",
        "check the name (iokeep handover show lists them); its files are lost if it was closed",
    ),
    "EMFILE": _NO_DESCRIPTOR,
}

MEANINGS: Mapping[str, Mapping[str, _Text]] = MappingProxyType(
    {
        "open": {
            "EBUSY": (
                "somebody has it open; /dev/liveupdate has one user at a time",
                "ask the agent for a session",
            ),
            "EIO": (
                "the records of the previous kernel could not be read; this lasts until the next boot",
                "iokeep handover check says what is wrong with them",
            ),
            "ENOENT": ("there is no such device node", "check the path and the kernel's options"),
        },
        "IOMMU_DESTROY": {
            "ENOENT": ("there is no such object in this iommufd", "check the id"),
            "EBUSY": (
                "the object is in use: an HWPT by a device, an IOAS by an HWPT, a nesting parent or vIOMMU "
                "by what is made on it, a queue by its descriptor, or it is preserved",
                "detach the devices, close queues, destroy what was made later first, or close the session",
            ),
        },
        "IOMMU_IOAS_ALLOC": {"EOPNOTSUPP": _NO_FLAGS},
        "IOMMU_IOAS_ALLOW_IOVAS": {
            "EOPNOTSUPP": _RESERVED,
            "EFAULT": _RANGES_FAULT,
            "EADDRINUSE": (
                "a range that must stay allowed conflicts with a reserved one of an attached device",
                "compare with iova_ranges()",
            ),
            "EINVAL": ("a range is empty, not aligned or overlaps another", "sort the ranges, [start, last]"),
            "ENOENT": ("there is no such IOAS in this iommufd", "check the id"),
        },
        "IOMMU_IOAS_IOVA_RANGES": {
            "EOPNOTSUPP": _RESERVED,
            "EFAULT": _RANGES_FAULT,
            "EMSGSIZE": ("there are more ranges than fit", "ask again with more room"),
            "ENOENT": ("there is no such IOAS in this iommufd", "check the id"),
        },
        "IOMMU_IOAS_MAP": _MAP,
        "IOMMU_IOAS_MAP_FILE": {
            **_MAP,
            "EBADF": ("the file descriptor is not open", "keep the memfd open until it is mapped"),
        },
        "IOMMU_IOAS_COPY": {
            **_MAP,
            "ENOENT": (
                "there is no such IOAS, or the source range has a hole",
                "map the whole source range first",
            ),
        },
        "IOMMU_IOAS_UNMAP": {
            "ENOENT": (
                "nothing is mapped there, or an area lies there only in part (areas are never split); "
                "areas before it "
                "are unmapped already",
                "unmap whole areas, [start, last] as they were mapped",
            ),
            "EBUSY": (
                "the IOAS is immutable (its iommufd is preserved), a hardware queue of a vIOMMU is in an "
                "area, or another thread is at work on it",
                "close the session or destroy the queue first, or try again",
            ),
            "EDEADLOCK": ("an access has not let go of its pages", "detach what uses the area"),
            "EDEADLK": ("an access has not let go of its pages", "detach what uses the area"),
            "EINVAL": ("iova and length are not aligned", "use the range as it was mapped"),
            "EOVERFLOW": ("iova and length pass the end of the 64-bit space", "check the length"),
        },
        "IOMMU_OPTION": {
            "EPERM": ("RLIMIT_MODE needs CAP_SYS_RESOURCE", "set it in the process that opens the iommufd"),
            "EBUSY": ("RLIMIT_MODE can change only before the first object", "set it right after open"),
            "EOPNOTSUPP": (
                "unknown option, or object_id or a reserved field is not zero",
                "RLIMIT_MODE takes object_id 0, HUGE_PAGES an IOAS",
            ),
            "EINVAL": (
                "the value is neither 0 nor 1, or the IOAS has areas and an HWPT",
                "turn HUGE_PAGES off before anything is mapped or attached",
            ),
            "ENOENT": ("there is no such IOAS in this iommufd", "check the id"),
        },
        "IOMMU_HWPT_ALLOC": {
            "EINVAL": (
                "pt_id is no IOAS or HWPT that can be a parent, or the data does not fit",
                "check pt_id",
            ),
            "EOPNOTSUPP": (
                "the IOMMU offers no such HWPT (dirty tracking, nesting parent, PASID)",
                "leave the flag out",
            ),
            "ENOENT": (
                "there is no such device or fault queue in this iommufd",
                "bind the device first; check the ids",
            ),
            "EFAULT": _DATA_FAULT,
            "EBUSY": ("the iommufd is preserved in a live-update session", "close the session first"),
            "EADDRINUSE": ("an area lies in a reserved range of the device", "compare with iova_ranges()"),
        },
        "IOMMU_VFIO_IOAS": {
            "ENODEV": ("no compat IOAS is set", "set one, or attach a VFIO container first"),
            "ENOENT": ("there is no such IOAS in this iommufd", "check the id"),
            "EOPNOTSUPP": (
                "op is not GET, SET or CLEAR, or a reserved field is not 0",
                "use one of IOMMU_VFIO_IOAS_GET, _SET and _CLEAR",
            ),
        },
        "IOMMU_HWPT_SET_DIRTY_TRACKING": {"ENOENT": _NO_HWPT, "EOPNOTSUPP": _NO_DIRTY},
        "IOMMU_HWPT_GET_DIRTY_BITMAP": {
            "ENOENT": _NO_HWPT,
            "EOPNOTSUPP": _NO_DIRTY,
            "EINVAL": (
                "length or page_size is 0, the range is not aligned to the IOMMU's pages or to page_size, or "
                "nothing is mapped in a part of it",
                "ask for whole areas in pages that iova_alignment() allows",
            ),
            "EOVERFLOW": ("iova and length pass the end of the 64-bit space", "check the length"),
        },
        "IOMMU_HWPT_INVALIDATE": {
            "ENOENT": ("there is no such object in this iommufd", "check the id"),
            "EINVAL": (
                "the object is neither a nested HWPT nor a vIOMMU, or an entry is of no use: no data, a "
                "length of 0 or above a page, more than 524288, a type that the driver does not know",
                "entry_num comes back as the number that was done",
            ),
            "EOPNOTSUPP": (
                "the driver caches nothing for guests, an entry has a flag that it does not know, or a "
                "reserved field is not 0",
                "entry_num comes back as the number that was done",
            ),
            "EFAULT": _DATA_FAULT,
            "E2BIG": ("an entry has bytes that the driver does not know and that are not 0", "shorten it"),
        },
        "IOMMU_GET_HW_INFO": {
            "ENOENT": ("there is no such device in this iommufd", "bind the device first"),
            "EOPNOTSUPP": (
                "the IOMMU is not of the type that is asked for, or flags or a reserved field is not 0",
                "ask for IOMMU_HW_INFO_TYPE_DEFAULT",
            ),
            "EFAULT": ("the buffer is not in this process's memory", "check data_uptr and data_len"),
        },
        "IOMMU_FAULT_QUEUE_ALLOC": {"EOPNOTSUPP": _NO_FLAGS},
        "IOMMU_VIOMMU_ALLOC": {
            "ENOENT": ("there is no such device or HWPT in this iommufd", "bind the device first"),
            "EOPNOTSUPP": _NO_VIRTUAL,
            "EINVAL": (
                "the HWPT is no nesting parent, or the data is not of the type's size",
                "make it with IOMMU_HWPT_ALLOC_NEST_PARENT; check data_len",
            ),
            "EFAULT": _DATA_FAULT,
        },
        "IOMMU_VDEVICE_ALLOC": {
            "ENOENT": _NO_VIOMMU,
            "EEXIST": ("the device, or the virtual id, is in a vIOMMU already", "a device is in one at most"),
            "EINVAL": ("the device is behind another IOMMU than the vIOMMU", "use a device of that IOMMU"),
        },
        "IOMMU_VEVENTQ_ALLOC": {
            "ENOENT": _NO_VIOMMU,
            "EINVAL": ("the depth is 0 or above 524288", "choose another depth"),
            "EEXIST": ("the vIOMMU has a queue of that type", "one queue of each type"),
            "EOPNOTSUPP": _NO_VIRTUAL,
        },
        "IOMMU_HW_QUEUE_ALLOC": {
            "ENOENT": (
                "there is no such vIOMMU in this iommufd, or the queue's memory is not mapped in its parent",
                "check the id; map the queue first",
            ),
            "EINVAL": ("the length is 0, or the driver has no queue of that index", "check both"),
            "EEXIST": ("the vIOMMU has a queue of that index", "destroy that first"),
            "EIO": (
                "the driver takes queues in the order of their indices only",
                "make the one before first",
            ),
            "EFAULT": (
                "the queue is not in consecutive frames, or its memory cannot be pinned",
                "use huge pages, aligned to the queue's length",
            ),
            "EPERM": ("the queue's memory is not mapped to be read", "map it READ"),
            "EADDRINUSE": ("the IOAS has areas that are no whole pages", "unmap them"),
            "ERANGE": ("the length passes the end of the 64-bit space", "check the length"),
            "ENOMEM": ("the queue is too long", "check the length"),
            "EOVERFLOW": ("iova and length pass the end of the 64-bit space", "check the length"),
            "EOPNOTSUPP": _NO_VIRTUAL,
        },
        "IOMMU_IOAS_NOIOMMU_GET_PA": {
            "EPERM": ("CAP_SYS_RAWIO is missing", "run as root"),
            "ENOENT": ("there is no such IOAS, or nothing is mapped at the iova", "check both"),
            "EINVAL": ("the length is 0", "ask for a byte at least"),
            "EOVERFLOW": ("the iova is the last of the 64-bit space", "nothing can be mapped there"),
            "EOPNOTSUPP": (
                "the IOAS is behind an IOMMU, which keeps its pages to itself, or the kernel has no noiommu "
                "mode",
                "only an IOAS of a noiommu device can tell (CONFIG_VFIO_NOIOMMU)",
            ),
        },
        "IOMMU_IOAS_CHANGE_PROCESS": {
            "EOPNOTSUPP": _RESERVED,
            "EINVAL": ("the iommufd has a mapping that is no file", "map all memory with MAP_FILE"),
            "EBUSY": ("another thread is at work on an area", "try again"),
        },
        "VFIO_DEVICE_BIND_IOMMUFD": {
            "EFAULT": ("the VF token is not in this process's memory", "check its address"),
            "EACCES": (
                "the VF token is missing or wrong",
                "use the token that the driver of the PF was given",
            ),
            "ENODEV": (
                "the device is gone, or the HWPT has a fault queue and the device no PRI",
                "use an HWPT without a fault queue",
            ),
            "EINVAL": (
                "the device file is bound already, or the descriptor is negative",
                "open a new device file to bind again",
            ),
            "EBADF": ("the iommufd descriptor is not open", "keep the iommufd open"),
            "EBADFD": ("the descriptor is no iommufd", "open /dev/iommu"),
            "EPERM": (
                "a device that came over the kexec may only be bound to the iommufd that it was "
                "preserved with, or the "
                "platform has no safe interrupt remapping",
                "use the iommufd of the same session; else see iommufd.allow_unsafe_interrupts",
            ),
            "EBUSY": (
                "another driver, file or group owns the device",
                "close its other users; unbind other drivers of its IOMMU group",
            ),
        },
        "VFIO_DEVICE_ATTACH_IOMMUFD_PT": {
            "EFAULT": ("user memory of the IOAS cannot be pinned", "map files with MAP_FILE"),
            "ENOMEM": _MAP["ENOMEM"],
            "EOPNOTSUPP": ("the device or its driver has no PASIDs", "attach without a PASID"),
            # drivers/iommu/iommufd/device.c iommufd_hwpt_pasid_compat()
            "EINVAL": (
                "the device is not bound, or the HWPT cannot serve it (another IOMMU, other widths; for a "
                "PASID, an HWPT made without IOMMU_HWPT_ALLOC_PASID, or one such attached without a PASID)",
                "bind first; use an HWPT made for this device, for PASIDs with IOMMU_HWPT_ALLOC_PASID",
            ),
            "ENOSPC": ("the PASID has more than 31 bits", "choose another; hw_info() says their width"),
            "ENOENT": (
                "there is no such IOAS or HWPT in this iommufd, or the HWPT was made by a vIOMMU that does "
                "not know the device",
                "check pt_id; make a vdevice first",
            ),
            "EBUSY": (
                "the device is attached in another way, or preserved in a live-update session",
                "detach, or close the session first",
            ),
            "EPERM": (
                "the device is on its prior domain, and this HWPT is not proved to translate the same, "
                "or changed since",
                "adopt the prior domain, or compare() this HWPT with it, then attach at once",
            ),
            "EADDRINUSE": ("an area lies in a reserved range of the device", "compare with iova_ranges()"),
            "ENODEV": ("the device is gone", "close the file; open it anew when the device is back"),
        },
        "VFIO_DEVICE_RESET": {
            "EINVAL": (
                "the device has no way to be reset alone, or is not bound to an iommufd",
                "bind it first; closing the file resets what vfio-pci can",
            ),
        },
        "VFIO_DEVICE_DETACH_IOMMUFD_PT": {
            "EOPNOTSUPP": ("the device or its driver has no PASIDs", "detach without a PASID"),
            "EBUSY": ("the device is preserved in a live-update session", "close the session first"),
            "EINVAL": ("the device is not bound to an iommufd", "bind it first"),
        },
        "VFIO_DEVICE_GET_REGION_INFO": {
            "EINVAL": (
                "the device is not bound, or has no such region",
                "bind first; info() says how many regions it has",
            )
        },
        "VFIO_DEVICE_GET_INFO": {"EINVAL": ("the device is not bound to an iommufd", "bind it first")},
        "LIVEUPDATE_IOCTL_CREATE_SESSION": _CREATE_SESSION,
        "LIVEUPDATE_IOCTL_RETRIEVE_SESSION": _RETRIEVE_SESSION,
        "LIVEUPDATE_SESSION_PRESERVE_FD": {
            "EEXIST": ("the token is used in this session", "choose another token"),
            "EBADF": ("the file descriptor is not open", "keep the file open until it is preserved"),
            "ENOENT": (
                "this kernel cannot preserve a file of that kind (Linux 7.3: memfds, and files of a tmpfs "
                "that have no name; not hugetlb, iommufd, VFIO), or an iommufd maps a file that is not "
                "preserved in this session",
                "leave out what iokeep host preflight names; preserve memfds, iommufd, devices in this order",
            ),
            "EBUSY": (
                "this file, or the same memfd by another descriptor, is preserved already, or it came over "
                "the last kexec and that session is not finished",
                "one file is preserved once, in one session; finish the session that it came with first",
            ),
            "ENOMEM": (
                "no memory to pin the file's pages and fill its holes, or the file has 1 TiB or more, which "
                "Linux 7.3 cannot list",
                "free memory; split the file over memfds that are smaller than 1 TiB",
            ),
            "EINVAL": (
                "the session came over the kexec and takes nothing new, or the file is not ready: an "
                "iommufd with areas "
                "of other than sealed, preserved memfds, or a device whose HWPT is not preserved",
                "preserve in this order: memfds (sealed SEAL|GROW|SHRINK before they are mapped), "
                "iommufd, devices",
            ),
            "EOPNOTSUPP": ("the file has a seal or a feature that cannot be preserved", "check the seals"),
            "ENOSPC": ("the session is full", "use another session"),
            "EFBIG": ("the file has more pages than the record can count", "use smaller memfds"),
            "EPERM": ("this file may not be preserved", "leave it out"),
        },
        "LIVEUPDATE_SESSION_RETRIEVE_FD": {
            "ENOENT": (
                "no file with that token in this session",
                "check the token; iokeep handover show lists them",
            ),
            "EINVAL": (
                "the session was made in this boot: its files are still yours",
                "retrieve after the kexec",
            ),
            # mm/memfd_luo.c memfd_luo_retrieve(): what it has taken apart by then is gone
            "EIO": (
                "a page of the file cannot be restored; the answer stays the same for this boot, and the "
                "file's content is lost",
                "see the kernel log",
            ),
            "ENOMEM": (
                "no memory for the file (a cgroup's limit too); the answer stays the same for this boot, and "
                "the file's content is lost",
                "retrieve in a cgroup that has room for guest RAM",
            ),
            "EMFILE": _NO_DESCRIPTOR,
            "EOPNOTSUPP": (
                "this kernel cannot bring back a file of that kind; the answer stays the same for this boot",
                "go on without it: finish() drops it",
            ),
        },
        "LIVEUPDATE_SESSION_FINISH": {
            "EBUSY": (
                "something is not reclaimed: a prior domain that is not adopted, or a device that is "
                "not bound (never for memfds: what was not retrieved is dropped)",
                "adopt or rebuild every HWPT and bind every device, or give them up first",
            ),
            "EINVAL": ("the session was made in this boot, or reserved is not 0", "finish after the kexec"),
        },
        "LIVEUPDATE_SESSION_GET_NAME": {"EINVAL": _RESERVED},
        "IOMMU_HWPT_LIVEUPDATE_MARK_PRESERVE": {
            "EADDRINUSE": ("another HWPT of this iommufd has the token", "choose another token"),
            "ENOENT": ("there is no such HWPT in this iommufd", "check the id"),
            "EBUSY": ("the iommufd is preserved already", "mark before the iommufd is preserved"),
            "EINVAL": ("only an HWPT of an IOAS with file mappings can be preserved", "map with MAP_FILE"),
            "ENOTTY": _ADOPT["ENOTTY"],
        },
        "IOMMU_HWPT_LIVEUPDATE_ADOPT": _ADOPT,
        "IOMMU_HWPT_LIVEUPDATE_COMPARE": _ADOPT,
        "IOMMU_LIVEUPDATE_GET_INFO": {"ENOTTY": _ADOPT["ENOTTY"], "EFAULT": _ADOPT["EFAULT"]},
        "IOMMU_HWPT_LIVEUPDATE_PROGRESS": {
            "ENOENT": ("there is no such HWPT in this iommufd", "check the id"),
            "ENOTTY": _ADOPT["ENOTTY"],
            "EFAULT": _ADOPT["EFAULT"],
        },
        "reboot_kexec": {
            # kernel/kexec_core.c kernel_kexec(), kernel/pid_namespace.c reboot_pid_ns()
            "EINVAL": (
                "no kernel is loaded, a preserved file refused to freeze, or this process is in a PID "
                "namespace of its own (a container), which cannot kexec",
                "load one (kexec -s -l, iokeep.uapi.kexec.load); see the kernel log",
            ),
            "EBUSY": ("another kexec_load is at work, or a session changes right now", "try again"),
            "EPERM": ("CAP_SYS_BOOT is missing", "run as root"),
        },
    }
)

_COMMON: dict[str, _Text] = {
    "E2BIG": _TOO_NEW,
    "EINVAL": ("an argument breaks a rule of this call", "check sizes, alignment and reserved fields"),
    "ENOTTY": ("this kernel does not have this call", "iokeep host doctor says what the kernel offers"),
    "EFAULT": ("a pointer does not lead to this process's memory", "check the addresses in the structure"),
    "EBADF": ("the file descriptor is not open", "open it again, or keep it open as long as it is used"),
    "EMFILE": _NO_DESCRIPTOR,
    "ENOENT": ("there is no such object", "check the id"),
    "ENOMEM": ("the kernel is out of memory", "free memory, or raise the limit of the cgroup"),
    "EPERM": ("a permission is missing", "run as root, or with the capability that the call wants"),
    "EBUSY": ("the object is in use", "end what uses it, and try again"),
    "EINTR": ("a signal came in between", "try again"),
    "EUCLEAN": (
        "an adopted table is not what the IOAS says there: the range is quarantined, nothing was changed",
        "IOMMU_HWPT_LIVEUPDATE_PROGRESS lists the ranges; the guest's device must leave this HWPT",
    ),
}

# EOPNOTSUPP and ENOTSUP, EDEADLK and EDEADLOCK, EAGAIN and EWOULDBLOCK are one number on Linux.
_PREFERRED = {errno.EOPNOTSUPP: "EOPNOTSUPP", errno.EDEADLK: "EDEADLK", errno.EAGAIN: "EAGAIN"}


def name(number: int) -> str:
    """An errno's C name, "EINVAL"; an unknown one as a number, "errno 4095"."""
    return _PREFERRED.get(number) or errno.errorcode.get(number) or f"errno {number}"


def meaning(operation: str, number: int) -> tuple[str, str]:
    """What an errno means for an operation, and what to do next ("" where nothing is known to help).

    :param operation: C name of the ioctl, or "open", "reboot_kexec".
    """
    short = name(number)
    found = MEANINGS.get(operation, {}).get(short) or _COMMON.get(short)
    return found or (os.strerror(number), "")


class IoctlRefused(KernelRefused):
    """The kernel refused one call; nothing was changed by it unless its meaning says so.

    :param operation: C name of the ioctl.
    :param number: the errno.
    :param objects: what the call was about, ids as numbers and addresses as hex, in order.
    :param note: more about this very case, for the first line.
    """

    kind = "refused"

    def __init__(self, operation: str, number: int, objects: Mapping[str, object], note: str = "") -> None:
        self.operation = operation
        self.errno = number
        self.errno_name = name(number)
        self.objects = dict(objects)
        self.meaning, hint = meaning(operation, number)
        about = ", ".join(f"{key} {value}" for key, value in self.objects.items())
        what = f"{operation}({about}): {self.errno_name}: {note or self.meaning}"
        super().__init__(what, hint)


_NODES = {
    "/dev/iommu": ("CONFIG_IOMMUFD", "load the module iommufd"),
    "/dev/liveupdate": ("CONFIG_LIVEUPDATE", "boot with kho=on liveupdate=on"),
    "/dev/vfio/devices/": ("CONFIG_VFIO_DEVICE_CDEV and CONFIG_VFIO_PCI", "bind the device to vfio-pci"),
}


def missing_node(path: str, number: int) -> CapabilityError | None:
    """Why a device node cannot be opened, as an error to act on; None when path and errno say nothing.

    :param number: the errno of open(2).
    """
    for node, (option, remedy) in _NODES.items():
        if path != node and not (node.endswith("/") and path.startswith(node)):
            continue
        if number in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            return CapabilityError(
                f"{path} does not exist on this kernel: it needs {option}",
                f"build the kernel with {option} and {remedy}; or use the software host (iokeep rehearse)",
            )
        if number in (errno.EACCES, errno.EPERM):
            return CapabilityError(
                f"{path}: {os.strerror(number)}: this process may not open it",
                f"run as a user that may read and write {path} (ls -l {path}), or be given its descriptor",
            )
    return None


def checked_ioctl(
    transport: Transport,
    fd: int,
    operation: str,
    request: int,
    arg: ctypes.Structure,
    objects: Mapping[str, object],
    error: type[IoctlRefused],
) -> int:
    """One ioctl whose refusal is an error to act on.

    :raises IoctlRefused: of type *error*, from the OSError.
    :raises ConnectionError: the kernel of a software host is gone; that is no refusal.
    """
    try:
        return transport.ioctl(fd, request, arg)
    except ConnectionError:
        raise
    except OSError as cause:
        raise error(operation, cause.errno or errno.EIO, objects) from cause


def open_node(transport: Transport, path: str, error: type[IoctlRefused]) -> int:
    """Open a device node.

    :raises CapabilityError: it is missing or forbidden.
    :raises IoctlRefused: of type *error*, for another errno.
    """
    try:
        return transport.open(path)
    except ConnectionError:
        raise
    except OSError as cause:
        number = cause.errno or errno.EIO
        missing = missing_node(path, number)
        if missing is not None:
            raise missing from cause
        raise error("open", number, {"path": path}) from cause


def close_fd(transport: Transport, fd: int) -> None:
    """close(2), quiet when the kernel of a software host is gone: the descriptor went with it."""
    with contextlib.suppress(ConnectionError):
        transport.close(fd)
