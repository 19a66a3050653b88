# SPDX-License-Identifier: Apache-2.0
"""Stores past the cache write what plain ones write, aligned or not, and nothing beside.

Reading ahead does nothing that shows.
"""

import subprocess
import sys

import numpy as np
import pytest

from iokeep.pt import cache
from iokeep.pt.choice import jit
from iokeep.pt.kernels import compiled


@compiled
def _copy(room, begin, length, row):
    cache.stream(room[begin : begin + length], row)
    cache.done()
    cache.ahead(room[begin:])


@pytest.mark.parametrize("begin", range(9))
@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 8, 511, 512])
def test_stream(begin, length):
    room = np.full(600, 7, np.uint64)
    row = np.random.default_rng(length).integers(0, 2**64, 520, np.uint64)
    want = room.copy()
    want[begin : begin + length] = row[:length]
    _copy(room, begin, length, row)
    assert np.array_equal(room, want)


@pytest.mark.skipif(not jit(), reason="looks at what is compiled")
def test_other_types_are_refused():
    """A word that is signed or not 8 bytes is refused when compiled, not converted."""
    from numba.core.errors import TypingError

    with pytest.raises(TypingError):
        _copy(np.zeros(8, np.int64), 0, 4, np.zeros(4, np.uint64))
    with pytest.raises(TypingError):
        _copy(np.zeros(8, np.uint64), 0, 4, np.zeros(4, np.uint32))


def test_without_a_compiler_they_are_plain():
    code = (
        "import numpy as np\n"
        "from iokeep.pt import cache\n"
        "room = np.zeros(9, np.uint64)\n"
        "cache.stream(room[1:4], np.arange(5, dtype=np.uint64))\n"
        "cache.done()\n"
        "print(room.tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"NUMBA_DISABLE_JIT": "1", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[0, 0, 1, 2, 0, 0, 0, 0, 0]\n"
