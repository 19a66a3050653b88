# SPDX-License-Identifier: Apache-2.0
"""Formats that many tests read tables of, and extents as rows."""

from iokeep.pt.registry import open_format

#: a configuration of every format that compiled code sweeps
SWEPT = [
    open_format("vtdss", {}),
    open_format("x86_64", {}),
    open_format("arm_lpae_s1", {}),
    open_format("arm_lpae_s2", {}),
    open_format("arm_lpae_s2", {"granule": 16384}),
    open_format("riscv64", {}),
    open_format("amdv1", {}),
]
#: and one that it leaves to the general code
SHOWN = [*SWEPT, open_format("arm_v7s", {})]


def format_id(fmt):
    return "-".join([fmt.name, *(str(v) for v in fmt.config.values())])


def rows_of(extents):
    """[(iova, last, pa, prot)]"""
    columns = (extents.iova, extents.last, extents.pa, extents.prot)
    return list(zip(*(c.tolist() for c in columns), strict=True))
