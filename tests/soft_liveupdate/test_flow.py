# SPDX-License-Identifier: Apache-2.0
"""Whole live updates on a software host in one process."""

import pytest
from liveupdate_support import Guest, clean, nothing_left


@pytest.mark.parametrize("params", [{}, {"iommu": "scalable-fs"}, {"iommu": "scalable-ss"}, {"levels": 3}])
def test_adopt(hosts, params):
    host = hosts(params=params)
    before = Guest(host).start().preserve()
    after = before.kexec("soft-7.4", params).retrieve()
    result = after.adopt()
    assert result.pages == sum(length for _, length, _, _ in after.areas) >> 12
    assert result.layout_differences == 0
    host.run()
    clean(host)
    after.session.finish()
    host.run()
    clean(host)
    after.exit()
    nothing_left(host)


@pytest.mark.parametrize("params", [{}, {"iommu": "scalable-fs"}])
def test_rebuild(hosts, params):
    host = hosts(params=params)
    before = Guest(host).start().preserve()
    after = before.kexec("soft-7.4", params).retrieve()
    result = after.rebuild()
    assert result.layout_differences == 0
    host.run()
    clean(host)
    after.session.finish()
    clean(host)
    after.exit()
    nothing_left(host)
