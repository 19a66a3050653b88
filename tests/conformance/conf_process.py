# SPDX-License-Identifier: Apache-2.0
"""A second process of a machine: it does what the first tells it, with memory and descriptors of its own."""

import ctypes
import os
import pickle
import resource
import socket
import traceback
from types import SimpleNamespace

from conf_env import Env, outcome

from iokeep.uapi.kernel import KernelTransport

#: include/uapi/linux/capability.h
_CAPABILITY_VERSION_3, _CAP_IPC_LOCK = 0x20080522, 14


class Actor:
    """What a second process can be told to do."""

    def __init__(self, transport):
        self.env = Env(SimpleNamespace(transport=transport))
        self.memory = {}

    def pid(self):
        return self.env.t.getpid()

    def take(self, pid, fd):
        """A duplicate of another process's descriptor."""
        return self.env.owned(self.env.t.getfd(pid, fd))

    def allocate(self, length, file=-1):
        """The hva of memory, its own or of a file."""
        mapping = self.env.mmap(file, length)
        self.memory[mapping.hva] = mapping
        return mapping.hva

    def free(self, hva):
        mapping = self.memory.pop(hva)
        self.env.maps.remove(mapping)
        mapping.close()

    def store(self, hva, data, offset=0):
        self.memory[hva].write(offset, data)

    def load(self, hva, length, offset=0):
        return self.memory[hva].read(offset, length)

    def locked(self):
        """(VmLck, VmPin) of /proc/PID/status, pages"""
        fd = self.env.t.open(f"/proc/{self.env.t.getpid()}/status")
        lines = self.env.t.pread(fd, 1 << 16, 0).decode().splitlines()
        self.env.t.close(fd)
        found = dict(line.split(":", 1) for line in lines)
        return tuple(int(found[name].split()[0]) // 4 for name in ("VmLck", "VmPin"))

    def restrict(self, pages):
        """Of a real process: it may lock so many pages, and has no CAP_IPC_LOCK."""
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (pages << 12, pages << 12))
        libc = ctypes.CDLL(None, use_errno=True)
        header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
        sets = (ctypes.c_uint32 * 6)()  # (effective, permitted, inheritable) of 32 capabilities each
        assert libc.capget(header, sets) == 0
        sets[0] &= ~(1 << _CAP_IPC_LOCK)
        assert libc.capset(header, sets) == 0

    def call(self, name, *args, **fields):
        """A call of :class:`Env`: what it gives, or the errno's name."""
        return outcome(getattr(self.env, name), *args, **fields)


class SoftProcess:
    """Of the software host: another connection to its kernel."""

    def __init__(self, host):
        self._host = host
        self._transport = host.transport()
        self._actor = Actor(self._transport)

    def do(self, what, *args, **fields):
        return getattr(self._actor, what)(*args, **fields)

    def restrict(self, pages):
        """See :meth:`Actor.restrict`."""
        process = self._host.kernel.processes[self._transport.getpid()]
        process.ipc_lock, process.memlock_bytes = False, pages << 12

    def exit(self):
        """All at once, as exit(2) does it; it is over when this returns."""
        self._transport.disconnect()
        self._host.settle()


class ForkedProcess:
    """Of the running kernel: a child."""

    def __init__(self):
        here, there = socket.socketpair()
        self._pid = os.fork()
        if not self._pid:
            here.close()
            status = 1
            try:
                self._serve(there.makefile("rwb"))
                status = 0
            finally:
                os._exit(status)
        there.close()
        self._socket = here
        self._file = here.makefile("rwb")

    @staticmethod
    def _serve(file):
        actor = Actor(KernelTransport())
        while True:
            what, args, fields = pickle.load(file)
            if what == "exit":
                return
            try:
                answer = True, getattr(actor, what)(*args, **fields)
            except Exception:  # noqa: BLE001  (it is for the test to see)
                answer = False, traceback.format_exc()
            pickle.dump(answer, file)
            file.flush()

    def do(self, what, *args, **fields):
        pickle.dump((what, args, fields), self._file)
        self._file.flush()
        fine, answer = pickle.load(self._file)
        assert fine, answer
        return answer

    def restrict(self, pages):
        """See :meth:`Actor.restrict`."""
        self.do("restrict", pages)

    def exit(self):
        """It closes nothing by itself; it is over when this returns."""
        # no end of file tells it: processes that were made later have this socket too
        pickle.dump(("exit", (), {}), self._file)
        self._file.close()
        self._socket.close()
        assert os.waitpid(self._pid, 0)[1] == 0
