# SPDX-License-Identifier: Apache-2.0
"""PASIDs of mock devices (the fixture iommufd_device_pasid of the kernel's selftest); a VFIO device's are in
test_vfio.py.
"""

import pytest
from conf_env import FOR_PASIDS, outcome
from conf_marks import needs_mock
from conf_rows import ABSENT
from conf_scene import Scene
from conf_selftest import (
    IOMMU_TEST_OP_PASID_ATTACH,
    IOMMU_TEST_OP_PASID_CHECK_HWPT,
    IOMMU_TEST_OP_PASID_DETACH,
    IOMMU_TEST_OP_PASID_REPLACE,
    MOCK_FLAGS_DEVICE_NO_DIRTY,
    MOCK_FLAGS_DEVICE_PASID,
    MOCK_PASID_WIDTH,
    iommu_hwpt_selftest,
)

pytestmark = needs_mock
OPS = {
    "attach": IOMMU_TEST_OP_PASID_ATTACH,
    "replace": IOMMU_TEST_OP_PASID_REPLACE,
    "detach": IOMMU_TEST_OP_PASID_DETACH,
    "is": IOMMU_TEST_OP_PASID_CHECK_HWPT,
}
LAST = (1 << MOCK_PASID_WIDTH) - 1
#: lists of (operation, PASID, what it is attached to) with their answers. "a" and "b" are HWPTs made for
#: PASIDs, "plain" is not; "n" and "m" are nested ones made for PASIDs, "lone" is not, "parent" is below them;
#: the device is on "a" to begin with. "device" moves the device itself
TRACES = [
    [("is", 5, "none", None), ("attach", 5, "a", None), ("is", 5, "a", None), ("is", 5, "none", "EINVAL"),
     ("is", 5, "b", "EINVAL"), ("detach", 5, "none", None), ("is", 5, "none", None)],
    [("attach", 5, "a", None), ("attach", 5, "a", "EBUSY"), ("attach", 5, "b", "EBUSY"),
     ("attach", 6, "b", None), ("is", 6, "b", None), ("is", 5, "a", None)],
    [("replace", 5, "a", "EINVAL"), ("attach", 5, "a", None), ("replace", 5, "b", None),
     ("is", 5, "b", None), ("replace", 5, "b", None), ("is", 5, "b", None)],
    [("attach", 5, "plain", "EINVAL"), ("attach", 5, "ioas", "EINVAL"), ("attach", 5, "absent", "ENOENT"),
     ("attach", 5, "dev", "EINVAL"), ("is", 5, "none", None), ("is", 5, "ioas", "EINVAL"),
     ("is", 5, "absent", "ENOENT")],
    [("attach", 5, "a", None), ("replace", 5, "plain", "EINVAL"), ("replace", 5, "ioas", "EINVAL"),
     ("replace", 5, "absent", "ENOENT"), ("is", 5, "a", None)],
    [("attach", LAST, "a", None), ("attach", LAST + 1, "a", "EINVAL"), ("is", LAST, "a", None)],
    [("attach", 0, "a", "EBUSY"), ("attach", 0, "b", "EBUSY")],
    [("detach", 5, "none", None), ("detach", 5, "none", None)],
    [("attach", 5, "a", None), ("device", 0, "plain", "EINVAL"), ("device", 0, "ioas", "EINVAL"),
     ("device", 0, "b", None), ("is", 5, "a", None), ("detach", 5, "none", None),
     ("device", 0, "plain", None), ("attach", 5, "a", "EINVAL")],
    [("attach", 5, "b", None), ("destroy", 0, "b", "EBUSY"), ("detach", 5, "none", None),
     ("destroy", 0, "b", None)],
    [("attach", 5, "b", None), ("replace", 5, "a", None), ("destroy", 0, "b", None)],
    [("attach", 5, "n", None), ("is", 5, "n", None), ("attach", 5, "m", "EBUSY"), ("attach", 5, "n", "EBUSY"),
     ("destroy", 0, "n", "EBUSY"), ("destroy", 0, "parent", "EBUSY"), ("replace", 5, "m", None),
     ("is", 5, "m", None), ("destroy", 0, "n", None), ("replace", 5, "a", None), ("destroy", 0, "m", None)],
    [("attach", 5, "lone", "EINVAL"), ("attach", 5, "parent", "EINVAL"), ("is", 5, "none", None),
     ("attach", 5, "n", None), ("replace", 5, "lone", "EINVAL"), ("replace", 5, "parent", "EINVAL"),
     ("is", 5, "n", None), ("device", 0, "lone", "EINVAL"), ("device", 0, "parent", "EINVAL")],
    [("device", 0, "lone", None), ("attach", 5, "n", "EINVAL"), ("device", 0, "n", None),
     ("attach", 5, "n", None), ("attach", 6, "a", None), ("device", 0, "lone", "EINVAL"),
     ("is", 0, "n", None)],
    # PASID 0 is the device itself
    [("is", 0, "a", None), ("replace", 0, "n", None), ("is", 0, "n", None), ("replace", 0, "ioas", None),
     ("is", 0, "n", "EINVAL"), ("is", 0, "none", "EINVAL"), ("replace", 0, "dev", "EINVAL"),
     ("detach", 0, "none", None), ("is", 0, "none", None), ("replace", 0, "a", "EINVAL"),
     ("device", 0, "a", "EINVAL"), ("device", 0, "absent", "ENOENT"), ("device", 0, "ioas", "EINVAL"),
     ("attach", 5, "plain", "EINVAL"), ("attach", 5, "n", None), ("attach", 0, "plain", "EINVAL"),
     ("attach", 0, "m", None), ("is", 0, "m", None), ("attach", 0, "m", "EBUSY")],
    # the mock driver fails every second change of this one: the old HWPT stays
    [("attach", 1024, "a", None), ("replace", 1024, "n", "ENOMEM"), ("is", 1024, "a", None),
     ("detach", 1024, "none", None), ("attach", 1024, "n", None), ("is", 1024, "n", None)],
    [("attach", 1024, "a", None), ("replace", 1024, "a", None), ("attach", 1024, "n", "EBUSY"),
     ("replace", 1024, "plain", "EINVAL"), ("replace", 1024, "n", "ENOMEM"), ("replace", 1024, "n", None)],
    [("attach", 1024, "a", None), ("replace", 1024, "b", "ENOMEM"), ("is", 1024, "a", None),
     ("replace", 1024, "b", None), ("is", 1024, "b", None), ("destroy", 0, "b", "EBUSY")],
]  # fmt: skip


def scene(env, flags):
    s = Scene(env, flags)
    names = {**s.names, "none": 0}
    for name in ("a", "b"):
        names[name] = env.hwpt(s.fd, s.dev, s.ioas, FOR_PASIDS)
    for name, nested in (("n", FOR_PASIDS), ("m", FOR_PASIDS), ("lone", 0)):
        names[name] = env.hwpt(s.fd, s.dev, s.parent, nested, bytes(iommu_hwpt_selftest()))
    assert s.replace(names["a"]) is None
    return s.fd, s.stdev, names


@pytest.mark.parametrize("trace", TRACES, ids=lambda trace: "-".join(str(step[0]) for step in trace))
def test_pasids(env, trace):
    fd, stdev, names = scene(env, MOCK_FLAGS_DEVICE_NO_DIRTY | MOCK_FLAGS_DEVICE_PASID)
    got = []
    for op, pasid, name, _ in trace:
        if op == "device":
            found = outcome(env.mock_replace, fd, stdev, names[name])
            got.append(found if isinstance(found, str) else None)
        elif op == "destroy":
            got.append(outcome(env.destroy, fd, names[name]))
        else:
            got.append(outcome(env.pasid, fd, OPS[op], stdev, pasid, names[name]))
    for pasid in {step[1] for step in trace if step[1]}:
        env.pasid(fd, OPS["detach"], stdev, pasid)  # the mock device does not do it when it goes
    assert got == [step[3] for step in trace]


def test_a_device_that_has_none(env):
    fd, stdev, names = scene(env, MOCK_FLAGS_DEVICE_NO_DIRTY)
    for name in ("a", "n", "plain", "parent"):
        assert outcome(env.pasid, fd, OPS["attach"], stdev, 1, names[name]) == "EINVAL"
    # what is made for PASIDs is for devices without too
    for name in ("n", "a", "lone", "ioas"):
        assert isinstance(outcome(env.mock_replace, fd, stdev, names[name]), int)
    assert outcome(env.pasid, fd, OPS["attach"], names["dev"], 1, names["a"]) == "ENOENT"
    assert outcome(env.pasid, fd, OPS["attach"], ABSENT, 1, names["a"]) == "ENOENT"


@pytest.mark.parametrize(("flags", "bits"), [(0, 0), (MOCK_FLAGS_DEVICE_PASID, MOCK_PASID_WIDTH)])
def test_hardware_information(env, flags, bits):
    fd, _, names = scene(env, flags)
    assert env.call(fd, "IOMMU_GET_HW_INFO", dev_id=names["dev"]).out_max_pasid_log2 == bits
