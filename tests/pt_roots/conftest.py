# SPDX-License-Identifier: Apache-2.0
"""Words in software RAM, and the damage of single ones."""

import pytest

from iokeep.mem.ram import Ram


class Words(Ram):
    """RAM that entries are put into, word by word."""

    def put(self, pa, words):
        self.write(pa, b"".join(w.to_bytes(8, "little") for w in words))


@pytest.fixture(scope="session")
def new_ram():
    """size -> RAM with ``put(pa, words)``."""
    return Words.of


@pytest.fixture(scope="session")
def reason_of():
    """Call, and the reason of the RootFault that it raises, which the text names."""

    def reason(fault, call):
        with pytest.raises(fault) as e:
            call()
        assert e.value.reason.name in str(e.value)
        assert e.value.exit_code == 3
        return e.value.reason

    return reason
