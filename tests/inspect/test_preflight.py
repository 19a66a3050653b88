# SPDX-License-Identifier: Apache-2.0
"""What preflight says of descriptors, by rule and of real ones."""

import os

import pytest

from iokeep.errors import CapabilityError
from iokeep.inspect.preflight import (
    SESSIONS_PER_BLOCK,
    FileFacts,
    ProcFs,
    Wanted,
    candidates,
    check_name,
    kind_of,
    preflight,
    seal_names,
)

MIB = 1 << 20
SEALED = 7


def memfd(inode, seals=SEALED, size=MIB, **fields):
    return FileFacts("/memfd:ram (deleted)", "memfd", (1, inode), size, size, seals, **fields)


IOMMUFD = FileFacts("/dev/iommu", "iommufd", (6, 9))
DEVICE = FileFacts("/dev/vfio/devices/vfio0", "vfio", (6, 10))


class Host:
    """Processes as a dict of descriptors."""

    def __init__(self, files, mapped=(), sessions=(), free=None):
        self.free = free
        self.files = files
        self.maps = set(mapped)
        self.sessions = list(sessions)

    def descriptors(self, pid):
        return sorted(self.files)

    def facts(self, pid, fd):
        return self.files.get(fd)

    def mapped(self, pid):
        return self.maps

    def session_names(self):
        return self.sessions

    def available(self):
        return self.free


def verdict(files, wanted=None, **options):
    host = Host(files, options.pop("mapped", ()), options.pop("sessions", ()), options.pop("free", None))
    wanted = [Wanted(7, fd) for fd in files] if wanted is None else wanted
    return preflight(host, wanted, **options)


def reasons(found):
    return [(problem.severity, problem.errno) for problem in found.all_problems()]


def test_a_sealed_memfd_is_fine():
    found = verdict({3: memfd(1)})
    assert found.preserves
    assert found.all_problems() == []


@pytest.mark.parametrize(
    ("facts", "severity", "errno", "text"),
    [
        (memfd(1, seals=0), "warning", "", "not sealed SEAL|SHRINK|GROW"),
        (memfd(1, seals=1), "warning", "", "not sealed SHRINK|GROW"),
        (memfd(1, seals=SEALED | 32), "warning", "", "MFD_NOEXEC_SEAL"),
        (memfd(1, seals=SEALED | 64), "refused", "EOPNOTSUPP", "0x40"),
        (memfd(1, size=1 << 44), "refused", "EFBIG", "16 TiB"),
        (memfd(1, size=(1 << 44) - 4096), "refused", "ENOMEM", "1 TiB or more"),
        (memfd(1, size=1 << 40), "refused", "ENOMEM", "1024 GiB"),
        (FileFacts("/memfd:x", "path", (1, 1)), "refused", "EBADF", "O_PATH"),
        (memfd(1, seals=None), "warning", "", "seals cannot be read"),
        (
            FileFacts("/memfd:x", "memfd", (1, 1), 2 * MIB, MIB, SEALED),
            "warning",
            "",
            "1 MiB of it are holes",
        ),
        (FileFacts("/memfd:x", "hugetlb", (1, 1), MIB, MIB, SEALED), "refused", "ENOENT", "hugetlb"),
        (FileFacts("pipe:[5]", "pipe", (1, 1)), "refused", "ENOENT", "a pipe"),
        (FileFacts("/etc/hosts", "file", (1, 1)), "refused", "ENOENT", "a file"),
        (FileFacts("x", "session", (1, 1)), "refused", "ENOENT", "a live-update session"),
        (IOMMUFD, "refused", "ENOENT", "an iommufd"),
        (DEVICE, "refused", "ENOENT", "a VFIO device"),
    ],
)
def test_one_file(facts, severity, errno, text):
    found = verdict({3: facts})
    (problem,) = found.files[0].problems
    assert (problem.severity, problem.errno) == (severity, errno)
    assert text in problem.why
    assert found.preserves == (severity == "warning")


def test_a_memfd_that_was_sealed_against_all():
    """With its write seals on it comes back as it was."""
    assert verdict({3: memfd(1, seals=63)}).all_problems() == []


def test_just_below_a_tebibyte():
    assert verdict({3: memfd(1, size=(1 << 40) - 4096)}).all_problems() == []


def test_holes_that_memory_cannot_fill():
    """Once for a file that is named twice, and over all files together."""
    files = {n: FileFacts("/memfd:x", "memfd", (1, min(n, 4)), 4 * MIB, MIB, SEALED) for n in (3, 4, 5)}
    fine = verdict(files, [Wanted(7, 3), Wanted(7, 4)], free=6 * MIB)
    assert fine.preserves
    short = verdict(files, [Wanted(7, 3), Wanted(7, 4)], free=6 * MIB - 1)
    assert [(p.severity, p.errno) for p in short.problems] == [("refused", "ENOMEM")]
    assert "6 MiB of these files are holes" in short.problems[0].why
    assert verdict(files, free=6 * MIB).problems == []


def test_the_kernels_first_answer_comes_first():
    files = {3: memfd(1, seals=0), 4: FileFacts("pipe:[5]", "pipe", (1, 9))}
    found = verdict(files, [Wanted(7, 3, 1), Wanted(7, 4, 1), Wanted(7, 3, 1)])
    assert [p.errno for p in found.files[1].problems] == ["EEXIST", "ENOENT"]
    assert [p.errno for p in found.files[2].problems] == ["EEXIST", "EBUSY", ""]


def test_closed():
    found = verdict({}, [Wanted(7, 3)])
    assert reasons(found) == [("refused", "EBADF")]


def test_tokens_and_files_twice():
    files = {3: memfd(1), 4: memfd(2), 5: memfd(1)}
    found = verdict(files, [Wanted(7, 3, 1), Wanted(7, 4, 1), Wanted(7, 5, 2), Wanted(7, 4)])
    assert reasons(found) == [("refused", "EEXIST"), ("refused", "EBUSY"), ("refused", "EBUSY")]
    assert "token 0x1 is already that of descriptor 7:3" in found.files[1].problems[0].why
    assert "7:3" in found.files[2].problems[0].why


def test_order_on_a_kernel_that_preserves_iommufds():
    files = {3: memfd(1), 4: IOMMUFD, 5: DEVICE}
    right = [Wanted(7, 3), Wanted(7, 4), Wanted(7, 5)]
    assert verdict(files, right, preserves_iommufd=True).preserves
    wrong = verdict(files, [Wanted(7, 5), Wanted(7, 4), Wanted(7, 3)], preserves_iommufd=True)
    assert reasons(wrong) == [("refused", "EINVAL"), ("refused", "EINVAL")]
    assert "comes before an iommufd" in wrong.files[0].problems[0].why
    assert "comes before a memfd" in wrong.files[1].problems[0].why


def test_memfds_that_are_left_out():
    found = verdict({3: memfd(1)}, mapped=[(1, 1), (1, 2), (1, 3)])
    assert found.preserves
    assert "2 more memfds" in found.problems[0].why


def test_nothing():
    found = verdict({}, [])
    assert "nothing to preserve" in found.problems[0].why
    assert not found.preserves


@pytest.mark.parametrize("name", ["", "x" * 64, "a\0b", "\u00e9" * 32, "\udcff" * 64])
def test_names_that_cannot_be(name):
    assert [(p.severity, p.errno) for p in check_name(name, [])] == [("refused", "EINVAL")]


def test_a_name_that_is_there():
    assert check_name("vm-1", ["vm-2"]) == []
    assert [p.errno for p in check_name("vm-1", ["vm-1", "vm-2"])] == ["EEXIST"]


def test_the_name_that_breaks_the_next_boot():
    """Linux 7.3.4: CREATE_SESSION links a new block before it sees that the name is there."""
    sessions = [f"vm-{n}" for n in range(SESSIONS_PER_BLOCK)]
    found = verdict({3: memfd(1)}, name="vm-1", sessions=sessions)
    assert reasons(found) == [("refused", "EEXIST"), ("warning", "")]
    assert "panics at boot" in found.problems[1].why


@pytest.mark.parametrize(
    ("link", "kind"),
    [
        ("/memfd:ram (deleted)", "memfd"),
        ("/dev/iommu", "iommufd"),
        ("/dev/vfio/devices/vfio3", "vfio"),
        ("anon_inode:[luo_session] vm-1", "session"),
        ("anon_inode:[eventfd]", "eventfd"),
        ("anon_inode:kvm-vm", "kvm-vm"),
        ("pipe:[77]", "pipe"),
        ("socket:[8]", "socket"),
        ("/etc/hosts", "file"),
    ],
)
def test_kinds(link, kind):
    assert kind_of(link) == kind


def test_kinds_by_file_system():
    tmpfs, hugetlbfs, ext4 = 0x01021994, 0x958458F6, 0xEF53
    assert kind_of("/dev/shm/x", nlink=1, filesystem=tmpfs) == "file"
    assert kind_of("/tmp/x (deleted)", filesystem=tmpfs) == "shmem"
    assert kind_of("/tmp/#7 (deleted)", filesystem=ext4) == "file"
    assert kind_of("/memfd:ram (deleted)", filesystem=hugetlbfs) == "hugetlb"
    assert kind_of("/memfd:ram (deleted)", filesystem=tmpfs) == "memfd"


def test_seal_names():
    assert seal_names(0) == "none"
    assert seal_names(7 | 64) == "SEAL|SHRINK|GROW|0x40"


# ---- this process


@pytest.fixture
def ram():
    fd = os.memfd_create("preflight", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, MIB)
    os.pwrite(fd, b"x" * MIB, 0)
    yield fd
    os.close(fd)


def test_a_real_memfd(ram):
    facts = ProcFs().facts(os.getpid(), ram)
    assert (facts.kind, facts.size, facts.allocated, facts.seals) == ("memfd", MIB, MIB, 0)
    assert (os.fstat(ram).st_dev, os.fstat(ram).st_ino) == facts.inode
    import fcntl

    fcntl.fcntl(ram, fcntl.F_ADD_SEALS, SEALED)
    assert preflight(ProcFs(), [Wanted(os.getpid(), ram)]).files[0].problems == []


def test_a_descriptor_for_a_path_only(ram):
    fd = os.open(f"/proc/self/fd/{ram}", os.O_PATH)
    try:
        assert ProcFs().facts(os.getpid(), fd).kind == "path"
    finally:
        os.close(fd)


def test_a_file_of_a_tmpfs_without_a_name():
    """Whatever this machine has at /dev/shm; a tmpfs, as a rule."""
    fd = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR)
    try:
        facts = ProcFs().facts(os.getpid(), fd)
        assert facts.kind == "shmem"
        assert facts.seals is not None
    finally:
        os.close(fd)


def test_free_memory(tmp_path):
    assert ProcFs(tmp_path).available() is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   8192 kB\nCmaFree:   4096 kB\n")
    assert ProcFs(tmp_path).available() == 4 * MIB
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\n")
    assert ProcFs(tmp_path).available() is None
    assert ProcFs().available() > 0


def test_candidates_of_this_process(ram):
    again = os.dup(ram)
    read, write = os.pipe()
    try:
        found = [wanted.fd for wanted in candidates(ProcFs(), os.getpid())]
        assert ram in found
        assert not {again, read, write} & set(found)
        assert ProcFs().facts(os.getpid(), read).kind == "pipe"
        assert ProcFs().facts(os.getpid(), 1 << 20) is None
    finally:
        for fd in (again, read, write):
            os.close(fd)


def test_mapped_memfds(ram):
    import mmap

    with mmap.mmap(ram, MIB):
        facts = ProcFs().facts(os.getpid(), ram)
        assert facts.inode in ProcFs().mapped(os.getpid())


def test_no_such_process(tmp_path):
    with pytest.raises(CapabilityError, match="no process"):
        ProcFs(tmp_path).descriptors(1)
    with pytest.raises(CapabilityError, match="no process"):
        ProcFs(tmp_path).facts(1, 0)


def test_sessions_of_a_tree(tmp_path):
    for pid, links in {
        1: ["anon_inode:[luo_session] vm-2", "/dev/null", None],
        2: ["anon_inode:[luo_session] vm 1"],
    }.items():
        directory = tmp_path / f"proc/{pid}/fd"
        directory.mkdir(parents=True)
        for fd, link in enumerate(links):
            if link is None:
                (directory / str(fd)).touch()  # as a descriptor that was closed just now, it cannot be read
            else:
                (directory / str(fd)).symlink_to(link)
    processes = ProcFs(tmp_path)
    assert processes.session_names() == ["vm 1", "vm-2"]
    assert processes.facts(1, 0).kind == "session"
    assert processes.facts(1, 5) is None
