# SPDX-License-Identifier: Apache-2.0
"""kexec_file_load(2) and the jump: refusals say what the errno means. The rest is vmtest's."""

import errno
from pathlib import Path

import pytest

from iokeep.errors import InputError, KernelRefused
from iokeep.uapi import kexec
from iokeep.uapi.wire import WireError


def descriptors():
    return sorted(each.name for each in Path("/proc/self/fd").iterdir())


class Host:
    def __init__(self, error=None):
        self.error = error
        self.jumped = False

    def reboot_kexec(self):
        if self.error:
            raise self.error
        self.jumped = True


def test_no_such_file(tmp_path):
    before = descriptors()
    with pytest.raises(InputError, match="none"):
        kexec.load(tmp_path / "none", "")
    (tmp_path / "kernel").write_bytes(b"x")
    with pytest.raises(InputError, match="initrd"):
        kexec.load(tmp_path / "kernel", "", tmp_path / "initrd")
    assert descriptors() == before


def test_a_file_that_is_no_kernel(tmp_path):
    """Without the call, or the right to it, the kernel says that instead."""
    (tmp_path / "kernel").write_bytes(b"x" * 4096)
    with pytest.raises(
        KernelRefused, match=r"^kexec_file_load: E(NOEXEC|PERM|NOSYS|KEYREJECTED|INVAL): "
    ) as caught:
        kexec.load(tmp_path / "kernel", "quiet")
    assert caught.value.exit_code == 5


def test_every_refusal_has_a_next_step():
    for code, (why, hint) in kexec._MEANINGS.items():
        assert why, code
        assert hint, code


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.EINVAL, "no kernel is loaded"), (errno.EPERM, "CAP_SYS_BOOT"), (errno.EBUSY, "at work")],
)
def test_a_jump_that_is_refused(code, words):
    with pytest.raises(KernelRefused, match=words) as caught:
        kexec.jump(Host(OSError(code, "no")))
    assert (caught.value.errno, bool(caught.value.hint)) == (code, True)


def test_the_jump():
    host = Host()
    kexec.jump(host)
    assert host.jumped
    with pytest.raises(WireError):
        kexec.jump(Host(WireError(errno.ECONNRESET, "gone")))
