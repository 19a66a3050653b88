# SPDX-License-Identifier: Apache-2.0
"""How a restored device gets its HWPT: five ways, each with its guarantee."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from iokeep.errors import UsageError

__all__ = ["POLICIES", "Policy", "policy_of"]


@dataclass(frozen=True, slots=True)
class Policy:
    """One policy.

    :param number: in the journal. :param prove: name of the step that proves, or "" where nothing is proved.
    :param take: name of the step behind which devices work on the new HWPT.
    :param later: the tables are proved after that, range by range before its first use: a difference that is
        found then is contained, not refused. ``Iommufd.progress`` tells how far that is.
    :param guarantee: for people.
    """

    name: str
    number: int
    prove: str
    take: str
    guarantee: str
    later: bool = False


POLICIES: Mapping[str, Policy] = MappingProxyType(
    {
        p.name: p
        for p in (
            Policy(
                "rebuild",
                1,
                "validate",
                "switch",
                "exact: new tables, proved equal to the prior domain, then a hitless switch",
            ),
            Policy(
                "adopt", 2, "validate", "adopt", "exact: the prior tables, proved to be what the areas say"
            ),
            Policy("trust", 3, "", "adopt", "none: the prior tables, unseen"),
            Policy(
                "deferred",
                4,
                "",
                "adopt",
                "exact before any use: the prior tables at once, each range proved before it is read back",
                later=True,
            ),
            Policy(
                "sealed",
                5,
                "validate",
                "adopt",
                "the set-up proved by a digest at once, the tables as by deferred",
                later=True,
            ),
        )
    }
)


def policy_of(name: str, *, unsafe: bool = False) -> Policy:
    """The policy of this name.

    :param unsafe: the caller accepts a policy that guarantees nothing.
    :raises UsageError: no such policy, or trust without ``unsafe``.
    """
    if name not in POLICIES:
        raise UsageError(f"no policy {name!r}", f"choose one of: {', '.join(POLICIES)}")
    policy = POLICIES[name]
    if policy.name == "trust" and not unsafe:
        raise UsageError(
            "policy trust adopts the prior tables unseen: a wrong table then frees somebody else's pages",
            "choose adopt; or, to measure or to show the damage, add --unsafe",
        )
    return policy
