# SPDX-License-Identifier: Apache-2.0
"""Sessions over a kexec of the software host.

The real kernel's run is vmtest/test_sessions.py: its kexec ends what pytest runs on.
"""

import conf_kexec
import pytest
from conf_machine import machine_name

from iokeep.soft.testing import LocalHost

MIB = 1 << 20
pytestmark = pytest.mark.skipif(machine_name() == "kernel", reason="vmtest/test_sessions.py has them")


class Client:
    """A process of the software host, by its end."""

    def __init__(self, host, work):
        self._host = host
        self._transport = host.transport()
        self.fd = work(self._transport)
        self.pid = self._transport.getpid()

    def kill(self):
        self._transport.disconnect()
        self._host.settle()


@pytest.fixture(scope="module")
def answers():
    with LocalHost(64 * MIB, 1, devices=False) as host:
        t = host.transport()

        def client(work):
            return Client(host, work)

        rows = list(conf_kexec.before(t, client, real=False))
        conf_kexec.kexec.jump(t)
        host.kexec("soft-7.3")
        rows += conf_kexec.after(host.transport(), client, real=False)
        host.check()
    assert len(rows) == len(dict(rows))
    return dict(rows)


@pytest.mark.parametrize("case", [each for each in conf_kexec.WANTED if each not in conf_kexec.REAL_ONLY])
def test_the_other_side(answers, case):
    assert answers[case] == conf_kexec.WANTED[case]


def test_every_row_is_wanted(answers):
    assert set(answers) == set(conf_kexec.WANTED) - set(conf_kexec.REAL_ONLY)
