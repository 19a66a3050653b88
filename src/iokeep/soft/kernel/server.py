# SPDX-License-Identifier: Apache-2.0
"""The kernel's door: a Unix socket, one connection for each process, one call at a time."""

from __future__ import annotations

import contextlib
import errno
import selectors
import socket
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from iokeep.soft.kernel.process import Process
from iokeep.soft.kernel.syscalls import SysErrorWithPayload, syscall
from iokeep.soft.kernel.syserror import SysError
from iokeep.uapi import wire
from iokeep.uapi.wire import Call, Request, ServerConnection, socket_address

if TYPE_CHECKING:
    from iokeep.soft.kernel.kernel import Kernel

#: exit status of a kernel process that hit a bug of its own
OOPS_STATUS = 70


class Oops(Exception):
    """A system call ran into a bug: the kernel must not go on. The log has the traceback."""


class Server:
    """Serves system calls until the kernel reboots or :meth:`stop` is called.

    :param path: where the socket is made; it must not exist.
    """

    def __init__(self, kernel: Kernel, path: Path) -> None:
        self.kernel = kernel
        self._path = path
        self._running = True
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # The name appears when connections are taken, not before: who waits for it is never refused.
        unfinished = path.with_name(f"{path.name}~")
        with socket_address(unfinished) as address:
            self._listener.bind(address)
        try:
            self._listener.listen(64)
            path.hardlink_to(unfinished)
        finally:
            unfinished.unlink()
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._processes: dict[ServerConnection, Process | None] = {}

    def stop(self) -> None:
        """End :meth:`run` before its next call; for signal handlers and other threads."""
        self._running = False

    def run(self) -> None:
        """Serve. Returns after a reboot or :meth:`stop`. :raises Oops: the kernel hit a bug."""
        while self._running and not self.kernel.rebooting:
            for key, _ in self._selector.select(min(0.1, self._work())):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._serve(key.data)
                if self.kernel.rebooting:
                    break

    def _work(self) -> float:
        try:
            return self.kernel.work()
        except Exception as error:
            self.kernel.log(f"Oops: background work\n{traceback.format_exc()}")
            raise Oops(str(error)) from error

    def close(self) -> None:
        """Close every connection, without the exits of processes: those are shutdown's business."""
        for connection in self._processes:
            connection.close()
        self._processes.clear()
        self._selector.close()
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        connection = ServerConnection(sock)
        self._processes[connection] = None
        self._selector.register(sock, selectors.EVENT_READ, connection)

    def _serve(self, connection: ServerConnection) -> None:
        request = connection.recv(timeout=0.0)
        if request is None:
            self._gone(connection)
            return
        process = self._processes[connection]
        if process is None:
            self._hello(connection, request)
            return
        try:
            result = syscall(self.kernel, process, request)
        except SysErrorWithPayload as error:
            self._note(process, request, error)
            connection.error(error.errno, error.payload)
        except SysError as error:
            self._note(process, request, error)
            connection.error(error.errno)
        except Exception as error:
            self._oops(process, request)
            raise Oops(str(error)) from error
        else:
            connection.reply(result.value, result.payload)
        if connection.broken is not None:
            self._gone(connection)

    def _note(self, process: Process, request: Request, error: SysError) -> None:
        if error.why:
            self.kernel.log(f"pid {process.pid} {request.call.name}: {error}")

    def _oops(self, process: Process, request: Request) -> None:
        self.kernel.log(
            f"Oops: pid {process.pid}, {request.call.name} fd {request.fd} "
            f"args {' '.join(f'{a:#x}' for a in request.args)}\n{traceback.format_exc()}"
        )

    def _hello(self, connection: ServerConnection, request: Request) -> None:
        if request.call != Call.HELLO or request.args[0] != wire.VERSION:
            self.kernel.log(f"a client that speaks another protocol: {request.call.name} {request.args}")
            connection.error(errno.EPROTO)
            self._gone(connection)
            return
        process = self.kernel.spawn(connection)
        self._processes[connection] = process
        platform = self.kernel.platform
        sizes = (platform.ram.size, platform.regs_bytes)
        payload = b"".join(size.to_bytes(8, "little") for size in sizes)
        connection.reply(process.pid, payload, (platform.fds.ram, platform.fds.regs))

    def _gone(self, connection: ServerConnection) -> None:
        """The process ended: its connection is closed, and so is all that it had open."""
        process = self._processes.pop(connection)
        self._selector.unregister(connection)
        connection.close()
        if process is None:
            return
        try:
            self.kernel.exit_process(process.pid)
        except Exception as error:
            self.kernel.log(f"Oops: exit of pid {process.pid}\n{traceback.format_exc()}")
            raise Oops(str(error)) from error
