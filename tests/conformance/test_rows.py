# SPDX-License-Identifier: Apache-2.0
"""The rows of conf_rows.py, and the rules for sizes and tails that every ioctl has in common."""

import ctypes

import pytest
from conf_env import RW, Env, Extended, Refused, outcome, vfio
from conf_machine import device_kinds, open_machine
from conf_rows import ABSENT, AREA, AREAS, FREE, MEMFD_BYTES, NOIOMMU_ROWS, ROWS

from iokeep.uapi.copy_struct import IOMMU_IOCTLS
from iokeep.uapi.errnos import MEANINGS

#: an IOVA that is reserved while a device of the kind is attached: below the mock's aperture, an MSI window
RESERVED = {"mock": 0x10000, "vfio": 0xFEE00000}
MACHINE = open_machine()
KINDS = device_kinds(MACHINE)


def attach(env, iommufd, ioas, kind, index=0):
    """A device on an IOAS: its id, and the HWPT."""
    if kind == "mock":
        _, hwpt, dev = env.mock(iommufd, ioas)
        return dev, hwpt
    fd = env.open(MACHINE.vfio[index])
    dev = env.call(fd, "VFIO_DEVICE_BIND_IOMMUFD", argsz=16, iommufd=iommufd).out_devid
    hwpt = env.call(fd, "VFIO_DEVICE_ATTACH_IOMMUFD_PT", argsz=12, pt_id=ioas).pt_id
    return dev, hwpt


def scene(env, kind):
    """What the names in rows stand for; ``kind`` of device, or None."""
    iommufd = env.iommu()
    memfd = env.memfd(MEMFD_BYTES)
    names = {"iommufd": iommufd, "memfd": memfd, "absent": ABSENT, "bad": 8, "buffer": env.buffer(1 << 16)}
    names["ioas"] = env.ioas(iommufd)
    for i, (iova, prot) in enumerate(AREAS):
        flags = RW if prot == 3 else RW & ~2
        env.map_file(iommufd, names["ioas"], memfd, i * AREA, AREA, iova, flags)
    names["empty"] = env.ioas(iommufd)
    names["boxed"] = env.ioas(iommufd)
    env.allow(iommufd, names["boxed"], [(FREE, FREE + 0x1FFF)])
    names["hva"] = env.mmap(memfd, MEMFD_BYTES).hva
    names["kmsg"] = env.open("/dev/kmsg")
    names["closed"] = 0x3FF0  # a number that no descriptor gets
    queue = env.call(iommufd, "IOMMU_FAULT_QUEUE_ALLOC")
    env.owned(queue.out_fault_fd)
    names["fault"] = queue.out_fault_id
    names["reserved"] = RESERVED[kind or "vfio"]
    names["dev"] = names["hwpt"] = names["own"] = ABSENT
    if kind:
        names["dev"], names["hwpt"] = attach(env, iommufd, names["ioas"], kind)
        names["own"] = env.hwpt(iommufd, names["dev"], names["ioas"])
    return names


def value(env, names, given):
    if isinstance(given, str):
        return names[given]
    if isinstance(given, tuple) and given[0] == "ranges":
        return env.buffer(b"".join(n.to_bytes(8, "little") for pair in given[1:] for n in pair))
    if isinstance(given, tuple):
        return names[given[0]] + given[1]
    return given


def label(row):
    name, fields, answer, _ = row
    about = ",".join(f"{k}={v:#x}" if isinstance(v, int) else f"{k}={v}" for k, v in fields.items())
    return f"{name.removeprefix('IOMMU_')}({about})={answer}"


def placed(rows):
    """(row, kind of device or None) for all that this machine can run."""
    out = []
    for row in rows:
        where = row[3]
        kinds = [None] if "n" in where else []
        kinds += KINDS if "d" in where else []
        kinds += ["vfio"] if "v" in where and "vfio" in KINDS else []
        out += [pytest.param(row, kind, id=f"{kind or 'alone'}:{label(row)}") for kind in kinds]
    return out


#: what the driver of another IOMMU says of its own: it has no nested domains, and a vIOMMU of any type
_NESTED = "data_type=0x7ead,data_len=0x8,data_uptr=buffer)=EINVAL"
OTHERWISE = {
    "amd": {
        f"HWPT_ALLOC(dev_id=dev,pt_id=own,{_NESTED}": "EOPNOTSUPP",
        f"HWPT_ALLOC(dev_id=dev,pt_id=hwpt,{_NESTED}": "EOPNOTSUPP",
        "VIOMMU_ALLOC(type=0x7ead,dev_id=dev,hwpt_id=absent)=EOPNOTSUPP": "ENOENT",
    }
}


def run_row(machine, row, kind):
    name, fields, answer, _ = row
    if kind == "vfio":
        answer = OTHERWISE.get(machine.iommu, {}).get(label(row), answer)
    before = machine.warnings()
    with Env(machine) as env:
        names = scene(env, kind)
        wanted = {key: value(env, names, given) for key, given in fields.items()}
        got = outcome(env.call, names["iommufd"], name, **wanted)
        if isinstance(answer, str):
            assert got == answer
        else:
            assert not isinstance(got, str), f"{got}, not a result"
            for key, expected in (answer or {}).items():
                assert getattr(got, key) == expected, key
    assert machine.warnings() == before


@pytest.mark.parametrize(("row", "kind"), placed(ROWS))
def test_row(machine, row, kind):
    run_row(machine, row, kind)


@pytest.mark.parametrize(("row", "kind"), placed(NOIOMMU_ROWS))
def test_noiommu_row(machine, row, kind):
    if not machine.noiommu:
        row = (*row[:2], "EOPNOTSUPP", row[3])
    run_row(machine, row, kind)


def test_every_ioctl_has_rows():
    assert {row[0] for row in ROWS + NOIOMMU_ROWS} == {op.name for op in IOMMU_IOCTLS.values()}


def test_every_errno_is_explained():
    """What a refusal means for that ioctl, in the words of the client library."""
    refusals = {(row[0], row[2]) for row in ROWS + NOIOMMU_ROWS if isinstance(row[2], str)}
    assert sorted(pair for pair in refusals if pair[1] not in MEANINGS.get(pair[0], {})) == []


# ---- sizes and tails (iommufd_fops_ioctl)


def good(name):
    """Fields of a call that is right, or wrong for a reason that comes after the structure."""
    return next(row[1] for row in ROWS + NOIOMMU_ROWS if row[0] == name)


@pytest.mark.parametrize("op", IOMMU_IOCTLS.values(), ids=lambda op: op.name)
def test_size_rules(machine, op):
    with Env(machine) as env:
        names = scene(env, None)
        fields = {key: value(env, names, given) for key, given in good(op.name).items()}
        full = ctypes.sizeof(op.struct)
        iommufd = names["iommufd"]
        for size in (0, 1, op.min_size - 1):
            assert outcome(env.call, iommufd, op.name, **{**fields, "size": size}) == "EINVAL", size
        longer = Extended.of(op.struct, {**fields, "size": full + 8}, 1)
        assert outcome(env.ioctl, iommufd, op.request, longer) == "E2BIG"
        # a page and more of bytes that are not there is a fault, not a size error
        one = outcome(env.call, iommufd, op.name, **fields)
        assert one != "E2BIG"


@pytest.mark.parametrize("op", IOMMU_IOCTLS.values(), ids=lambda op: op.name)
def test_a_tail_of_zeros_changes_nothing(machine, op):
    def answer(extra):
        with Env(machine) as env:
            names = scene(env, None)
            fields = {key: value(env, names, given) for key, given in good(op.name).items()}
            arg = Extended.of(op.struct, {**fields, "size": ctypes.sizeof(op.struct) + extra}, 0)
            got = outcome(env.ioctl, names["iommufd"], op.request, arg)
            if op.name == "IOMMU_FAULT_QUEUE_ALLOC" and not isinstance(got, str):
                env.owned(arg.head.out_fault_fd)
            return got if isinstance(got, str) else 0

    assert answer(8) == answer(0)


@pytest.mark.parametrize("op", [op for op in IOMMU_IOCTLS.values() if op.min_size < ctypes.sizeof(op.struct)],
                         ids=lambda op: op.name)  # fmt: skip
def test_the_first_version_of_a_structure_will_do(machine, op):
    """Fields that came later count as zero."""
    with Env(machine) as env:
        names = scene(env, None)
        fields = {key: value(env, names, given) for key, given in good(op.name).items()}
        got = outcome(env.call, names["iommufd"], op.name, **{**fields, "size": op.min_size})
        assert got != "E2BIG"
        zeroed = {k: v for k, v in fields.items() if getattr(op.struct, k).offset < op.min_size}
        again = outcome(env.call, names["iommufd"], op.name, **zeroed)
        assert (got if isinstance(got, str) else 0) == (again if isinstance(again, str) else 0)


def test_an_unknown_number_is_enotty(machine):
    with Env(machine) as env:
        iommufd = env.iommu()
        arg = vfio.vfio_device_info(argsz=ctypes.sizeof(vfio.vfio_device_info))
        for request in (0x3BFF, 0x3B00 + 200, 0x4004_3B80, 0x3C80):
            with pytest.raises(Refused) as refused:
                env.ioctl(iommufd, request, arg)
            assert refused.value.name == "ENOTTY", hex(request)
