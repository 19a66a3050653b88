# SPDX-License-Identifier: Apache-2.0
"""Arrays of addresses."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from iokeep.mem.arrays import unique

WORDS = st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 5).map(lambda n: n << 61), max_size=9)


@given(parts=st.lists(WORDS, min_size=1, max_size=3))
def test_unique(parts):
    out = unique(*(np.array(p, np.uint64) for p in parts))
    assert out.tolist() == sorted({word for p in parts for word in p})
    assert out.dtype == np.uint64
