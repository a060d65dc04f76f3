"""One session process, seen from the daemon: starting it with the open descriptors, its messages, its deadline, its end.

``Session`` answers barriers, passes events and progress on, and kills the process at its deadline, but never during a hazard
(P9). What is to be done with the target when it died without a result is the business of ``owner``; the process itself is
``worker``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import bridged
from bridged.errors import BadRequest, BridgedError, SessionDied
from bridged.events import Event, Planned, Synced, decode
from bridged.images import memfd
from bridged.images.model import Image
from bridged.target import lines as wires
from bridged.target.board import Board
from bridged.target.request import Request
from bridged.target.uart import Uart

PROGRESS_S = 0.2
ENTER_LIMIT_S = 120.0  # Until the plan states its own limit: all attempts at all rates need about 20 s.

Barrier = Callable[[str, float, bytes], Awaitable[None]]

# The standard library and this package are all that a session needs: without the rest of the environment (-I, -S) it is up
# sooner and 1 MiB smaller, and nothing that lies about or is set there gets into it.
WORKER = "import sys; sys.path.append(sys.argv[1]); from bridged.target.worker import main; sys.exit(main(sys.argv[2:]))"
WORKER_ROOT = str(Path(bridged.__file__).parents[1])


class Session:
    """One session process: starting it, its messages, its end."""

    def __init__(
        self,
        uart: Uart,
        lines: wires.Lines,
        request: Request,
        on_event: Callable[[Event], None],
        on_progress: Callable[[int], None],
        on_barrier: Barrier | None,
        on_heard: Callable[[bytes], None],
    ) -> None:
        self.board = Board.create()
        self.out = os.memfd_create("bridged-out", os.MFD_CLOEXEC)
        self.pid: int | None = None
        self.ending = "nothing"
        self.past_deadline = False
        self.erased = False  # It has asked whether it may begin to erase.
        self.limit_s = enter_limit_s(request)
        self._baud = 0  # The lowest so far.
        self._uart, self._lines, self._request = uart, lines, request
        self._on_event, self._on_progress, self._on_barrier = on_event, on_progress, on_barrier
        self._on_heard = on_heard
        self._mine, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._mine.setblocking(False)
        self._deadline = time.monotonic() + self.limit_s
        self._tasks: set[asyncio.Task[None]] = set()

    def close(self) -> None:
        self._mine.close()
        self._theirs.close()
        self.board.close()
        os.close(self.out)

    def ask(self, what: str) -> None:
        """``cancel`` or ``stop``. Sent once; the socket has room for it, the session reads it at its next checkpoint."""
        with contextlib.suppress(OSError):
            self._mine.send(json.dumps({"do": what}).encode())

    async def run(self, image: Image | None, kept: bytes) -> None:
        """Start the process and stay until it has ended, whatever happens to it."""
        loop = asyncio.get_running_loop()
        image_fd = await asyncio.to_thread(memfd.seal, image) if image is not None else -1
        kept_fd = _filled("bridged-kept", kept) if kept else -1
        spec = {
            "control": self._theirs.fileno(),
            "board": self.board.fd,
            "out": self.out,
            "uart": self._uart.fd,
            "uart_path": self._uart.path,
            "uart_is_pty": self._uart.is_pty,
            "lines": self._lines.describe(),
            "line_fds": self._lines.fds(),
            "image": image_fd,
            "kept": kept_fd,
            "request": self._request.to_dict(),
        }
        spec_fd = _filled("bridged-spec", json.dumps(spec).encode())
        fds = {spec_fd, self._theirs.fileno(), self.board.fd, self.out, self._uart.fd, *self._lines.fds(), image_fd, kept_fd}
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-IS", "-c", WORKER, WORKER_ROOT, str(spec_fd)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                pass_fds=sorted(fds - {-1}),
                start_new_session=True,
            )
        except OSError as error:  # Out of memory or processes: nothing has moved, and the job may be tried again.
            raise SessionDied(f"the session process could not be started: {error.strerror}", errno=error.errno) from error
        finally:
            for fd in (image_fd, kept_fd, spec_fd):
                if fd >= 0:
                    os.close(fd)
        self.pid = process.pid
        self._theirs.close()
        loop.add_reader(self._mine.fileno(), self._read)
        ended = asyncio.ensure_future(process.wait())
        try:
            await self._watch(process, ended)
        finally:
            self._read()
            loop.remove_reader(self._mine.fileno())
            for task in self._tasks:
                task.cancel()
        status = process.returncode
        self.ending = f"signal {-status}" if status is not None and status < 0 else f"exit status {status}"

    async def _watch(self, process: asyncio.subprocess.Process, ended: asyncio.Future[int]) -> None:
        """Report progress; past the deadline kill the process, but never during a hazard. Cancelling us stops the session."""
        done = -1
        while not ended.done():
            try:
                await asyncio.wait({ended}, timeout=PROGRESS_S)
            except asyncio.CancelledError:
                # The daemon is going down in a hurry. The session hears it from the closing socket, finishes its command and
                # releases the target by itself.
                self._mine.shutdown(socket.SHUT_RDWR)
                raise
            if self.board.done != done:
                done = self.board.done
                self._on_progress(done)
            if time.monotonic() > self._deadline and not self.board.hazard_left_s and not self.past_deadline:
                self.past_deadline = True
                process.kill()

    def _read(self) -> None:
        while True:
            try:
                data = self._mine.recv(1 << 18)
            except (BlockingIOError, OSError):
                return
            if not data:
                with contextlib.suppress(ValueError, OSError):
                    asyncio.get_running_loop().remove_reader(self._mine.fileno())
                return
            try:
                self._take(data)
            except Exception as error:
                # A message that makes no sense, or a listener that failed: neither may keep the target from being released.
                told = f"a message of the session process was not taken: {data[:200]!r}"
                asyncio.get_running_loop().call_exception_handler({"message": told, "exception": error})

    def _take(self, data: bytes) -> None:
        """One message of the session process. Raises ``ValueError`` and whatever a listener raises."""
        message = json.loads(data)
        if not isinstance(message, dict):
            raise ValueError("not an object")
        if "barrier" in message:
            self.erased |= message["barrier"] == "erasing"
            task = asyncio.ensure_future(self._barrier(message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return
        if "heard" in message:
            self._on_heard(str(message["heard"]).encode("latin-1"))
            return
        event = decode(message)
        if isinstance(event, Planned):
            self.limit_s = event.limit_s
            self._deadline = time.monotonic() + event.limit_s
        elif isinstance(event, Synced):
            self._stretch(event.baud)
        self._on_event(event)

    def _stretch(self, baud: int) -> None:
        """What was planned at a higher rate takes longer at ``baud``, and nobody may end it half-way for that."""
        if 0 < baud < self._baud:
            more_s = max(0.0, self._deadline - time.monotonic()) * (self._baud / baud - 1)
            self._deadline += more_s
            self.limit_s += more_s
        self._baud = min(baud, self._baud or baud)

    async def _barrier(self, message: dict[str, Any]) -> None:
        kept = os.pread(self.out, int(message["kept_bytes"]), 0)
        answer: dict[str, Any] = {"ok": True}
        try:
            if self._on_barrier is None:
                raise BadRequest("this session was started without a journal and may change nothing")
            await self._on_barrier(str(message["barrier"]), float(message["hazard_s"]), kept)
        except BridgedError as error:
            answer = {"error": error.as_dict()}
        with contextlib.suppress(OSError):
            self._mine.send(json.dumps(answer).encode())


def enter_limit_s(request: Request) -> float:
    """How long a session may take that has stated no plan: also one that has none, and talks with the application."""
    return ENTER_LIMIT_S + request.interlock.within_s + 4 * request.listen_s


def _filled(name: str, data: bytes) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    memfd.write_all(fd, data)
    return fd
