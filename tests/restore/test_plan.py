# SPDX-License-Identifier: Apache-2.0
"""The plan says what is done, in the order in which it is done, and finds what cannot be done."""

import pytest

from iokeep.errors import InputError, UsageError
from iokeep.iommufd.client import PriorHwpt
from iokeep.restore.manifest import Area, DeviceEntry, FileEntry, HwptEntry, Manifest
from iokeep.restore.plan import check_priors, make_plan
from iokeep.restore.policies import POLICIES

M = Manifest(
    iommufd=5,
    files=(FileEntry(1, 0x2000, "ram"),),
    hwpts=(HwptEntry(7),),
    devices=(DeviceEntry(9, 7, "vfio0"),),
    areas=(Area(0x1000, 0x1FFF, 1, 0x1000, 1), Area(0, 0xFFF, 1, 0, 3)),
)


@pytest.mark.parametrize(
    ("policy", "steps", "calls"),
    [
        (
            "rebuild",
            ("retrieve", "replay", "validate", "switch", "finish"),
            ["HWPT_ALLOC", "COMPARE", "ATTACH"],
        ),
        (
            "adopt",
            ("retrieve", "replay", "validate", "adopt", "finish"),
            ["VALIDATE_ONLY", "ADOPT", "ATTACH"],
        ),
        ("trust", ("retrieve", "replay", "adopt", "finish"), ["TRUST", "ATTACH"]),
    ],
)
def test_the_order_of_calls(policy, steps, calls):
    plan = make_plan(M, POLICIES[policy])
    assert plan.steps == steps
    text = [str(c) for c in plan.calls]
    at = 0
    for want in [
        "manifest",
        "file ram",
        "iommufd",
        "device vfio0",
        "BIND",
        "IOAS_ALLOC",
        "iova 0x0",
        *calls,
        "FINISH",
    ]:
        at += next(i for i, line in enumerate(text[at:]) if want in line)
    assert [a.iova for a in plan.areas] == [0, 0x1000]
    assert "r-" in next(line for line in text if "iova 0x1000" in line)


def test_other_areas_are_checked_against_the_files():
    with pytest.raises(UsageError, match="ends behind"):
        make_plan(M, POLICIES["adopt"], [Area(0, 0x2FFF, 1, 0, 3)])


def test_prior_domains_must_be_there_and_free():
    check_priors(M, [PriorHwpt(7, False, 0, 0), PriorHwpt(8, True, 0, 0)])
    with pytest.raises(InputError, match=r"0x7 came over.*there are: 0x8"):
        check_priors(M, [PriorHwpt(8, False, 0, 0)])
    with pytest.raises(InputError, match="none"):
        check_priors(M, [])
    with pytest.raises(InputError, match="reclaimed"):
        check_priors(M, [PriorHwpt(7, True, 0, 0)])
