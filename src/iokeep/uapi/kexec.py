# SPDX-License-Identifier: Apache-2.0
"""kexec_file_load(2) and reboot(2): load the next kernel, and jump into it."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from pathlib import Path

from iokeep.errors import CapabilityError, InputError, KernelRefused
from iokeep.uapi.errnos import IoctlRefused
from iokeep.uapi.transport import Transport

# arch/x86/entry/syscalls/syscall_64.tbl; include/uapi/asm-generic/unistd.h
_NUMBERS = {"x86_64": 320, "aarch64": 294, "riscv64": 294}
# include/uapi/linux/kexec.h
KEXEC_FILE_UNLOAD = 0x1
KEXEC_FILE_NO_INITRAMFS = 0x4

_MEANINGS = {
    errno.EPERM: (
        "CAP_SYS_BOOT is missing, or lockdown or kernel.kexec_load_disabled forbids it",
        "run as root",
    ),
    errno.EBUSY: ("another kexec_load is at work, or a live-update session is being frozen", "try again"),
    errno.ENOEXEC: (
        "the file is no kernel image that this kernel can load",
        "give the kernel's bzImage or Image",
    ),
    errno.ENOSYS: ("this kernel has no CONFIG_KEXEC_FILE", "build the kernel with CONFIG_KEXEC_FILE"),
    errno.EKEYREJECTED: ("the image's signature is not trusted", "use a signed image"),
    errno.ENOMEM: ("there is no room for the image", "free memory, or give a smaller initrd"),
    # kernel/liveupdate/kexec_handover.c kho_locate_mem_hole(): with KHO an image lies in its scratch areas
    errno.EADDRNOTAVAIL: (
        "there is no room for the image where the next kernel may be",
        "boot with larger scratch areas (kho_scratch=), or give a smaller initrd",
    ),
}


def _call(kernel: int, initrd: int, cmdline: bytes, flags: int) -> None:
    number = _NUMBERS.get(platform.machine())
    if number is None:
        raise CapabilityError(f"kexec_file_load is not known for {platform.machine()}")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    failed = libc.syscall(
        ctypes.c_long(number), ctypes.c_long(kernel), ctypes.c_long(initrd),
        ctypes.c_ulong(len(cmdline)), ctypes.c_char_p(cmdline), ctypes.c_ulong(flags),
    )  # fmt: skip
    if failed:
        code = ctypes.get_errno()
        why, hint = _MEANINGS.get(code, (os.strerror(code), ""))
        raise KernelRefused(f"kexec_file_load: {errno.errorcode.get(code, code)}: {why}", hint)


def load(kernel: Path, cmdline: str, initrd: Path | None = None) -> None:
    """Load ``kernel`` to be jumped into. With ``kho=on`` the running kernel adds what it hands over.

    :param cmdline: of the next kernel; a live update wants ``kho=on liveupdate=on`` in it too.
    :raises InputError: a file cannot be read. :raises KernelRefused: with what the errno means here.
    """
    fds: list[int] = []
    try:
        for path in (kernel, initrd):
            if path is not None:
                try:
                    fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
                except OSError as error:
                    raise InputError(f"{path}: {error.strerror}") from error
        flags = KEXEC_FILE_NO_INITRAMFS if initrd is None else 0
        _call(fds[0], -1 if initrd is None else fds[1], cmdline.encode() + b"\0", flags)
    finally:
        for fd in fds:
            os.close(fd)


def unload() -> None:
    """Unload what was loaded. :raises KernelRefused: with what the errno means here."""
    _call(-1, -1, b"\0", KEXEC_FILE_UNLOAD)


def jump(transport: Transport) -> None:
    """Jump into the loaded kernel now, with no shutdown of user space; no return on the real kernel.

    :raises IoctlRefused: with what the errno means here; sessions and their files are as before.
    """
    try:
        transport.reboot_kexec()
    except ConnectionError:
        raise
    except OSError as error:
        raise IoctlRefused("reboot_kexec", error.errno or errno.EIO, {}) from error
