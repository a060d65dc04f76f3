"""A simulated device in real time: a pty instead of a serial port, and a socket instead of the control lines.

One thread for each device. Bytes are paced at the host's baud rate (the master sees it; a pty has no parity, so that counts
as right) on absolute deadlines: lateness of one byte never delays the next. Times that the device sees are exact, however
late this thread runs; only what the host sees is late then.

Line box: a Unix stream socket, one command a line, ``nrst 0``, ``boot0 1``, ``power 1`` (0 is electrically low), each answered
``ok`` or ``error TEXT``. When the last connection closes the lines are idle: NRST high, BOOT0 low, power on.

A pty differs from a UART: no parity, no modem lines, no break, no glitch when it is opened. Nothing is softened for that.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import select
import socket
import struct
import threading
import time
import tty
from collections import deque
from pathlib import Path
from types import TracebackType

from bridged.errors import LinkError
from bridged.sim.device import Device
from bridged.sim.wire import Burst, Format, hear

_TCGETS2 = 0x802C542A  # asm-generic/ioctls.h; `termios` names no rates beyond its table
_TERMIOS2_BYTES = 44
_READ_BYTES = 65536
_PIECE_NS = 10_000_000  # long answers come in pieces, as from the FIFO of a UART
_LINE_LIMIT = 80
_SAVE_AFTER_NS = 1_000_000_000
_CONNECTION_LIMIT = 8
_SELECT_LIMIT = 1024  # select() takes no descriptor beyond


class PtyPort:
    """A pty: ``fd`` is our end, ``path`` names the host's. Another transport may take its place (a pair of real ttys)."""

    def __init__(self) -> None:
        self.fd, self._slave = os.openpty()
        # The slave stays open here: without any, the master would read EIO between two hosts.
        tty.setraw(self._slave)
        os.set_blocking(self.fd, False)
        self.path = os.ttyname(self._slave)

    def host_format(self) -> Format:
        """What the host is set to; a pty has no parity, so that counts as right."""
        return Format(_host_baud(self.fd), "?")

    def receiver(self) -> Format | None:
        """The host's format where we have to work out what it hears of ours; None where the transport does that."""
        return self.host_format()

    def send(self, burst: Burst) -> int:
        """What the host hears of ``burst``; how many bytes it did not fetch in time."""
        form = self.host_format()
        data = burst.data
        if not burst.format.agrees(form):
            data = bytes(h.value for h in hear(burst, Format(form.baud, burst.format.parity)))
        return len(data) - self._write(data)

    def _write(self, data: bytes) -> int:
        try:
            return os.write(self.fd, data) if data else 0
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EIO):
                raise
            return 0

    def close(self) -> None:
        for fd in (self.fd, self._slave):
            with contextlib.suppress(OSError):
                os.close(fd)


class PtyDevice:
    """Runs ``device`` behind a pty. ``path`` is the port for the host; ``lines_path`` the line box, when asked for.

    ``port``: another transport than a pty of our own. ``paced`` False: bytes take no time (erases, programming and start-up
    still do). ``boot_loader``: it starts in its loader whatever the pins say, until the next reset. Use it as a context
    manager, or ``start`` and ``stop``. Look into ``device`` from another thread only under ``lock``.
    """

    def __init__(
        self,
        device: Device,
        *,
        link: Path | None = None,
        lines_path: Path | None = None,
        flash_file: Path | None = None,
        paced: bool = True,
        boot_loader: bool = False,
        port: PtyPort | None = None,
    ) -> None:
        self.device = device
        self.lock = threading.Lock()
        self.link = link
        self.lines_path = lines_path
        self.flash_file = flash_file
        self.lost_to_host = 0  # bytes that the host did not fetch in time
        self._paced = paced
        self._boot_loader = boot_loader
        self._port = port or PtyPort()
        self.path = self._port.path
        self._stop_read, self._stop_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._server: socket.socket | None = None
        self._connections: dict[int, tuple[socket.socket, bytearray]] = {}
        self._pending: deque[Burst] = deque()
        self._rx_free_ns = 0
        self._base_ns = time.monotonic_ns() - device.now_ns
        self._saved: bytes | None = None
        self._looked_ns = 0
        self._thread = threading.Thread(target=self._loop, name=f"sim {self.path}", daemon=True)
        self._watched: list[int] = []

    # --- life -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Raises ``LinkError`` when a path cannot be made."""
        try:
            self._load()
            if self.link is not None:
                _symlink(self.path, self.link)
            if self.lines_path is not None:
                self._server = _listen(self.lines_path)
        except (OSError, ValueError) as error:
            self._close()
            raise LinkError(f"Starting a simulated device at {self.path}: {error}") from error
        self._watched = [self._port.fd, self._stop_read]
        if self._server is not None:
            self._watched.append(self._server.fileno())
        if max(self._watched) >= _SELECT_LIMIT:
            self._close()
            raise LinkError(f"Starting a simulated device at {self.path}: this process has too many files open")
        self._base_ns = time.monotonic_ns() - self.device.now_ns
        # Power comes only now, so that a flash file already counts for what the chip starts.
        self.device.set_lines(self.device.now_ns, power=True)
        if self._boot_loader:
            self.device.force_loader()
        self._thread.start()

    def stop(self) -> None:
        """End the thread and remove what was made; the host then reads end of file."""
        if self._thread.is_alive():
            os.write(self._stop_write, b"x")
            self._thread.join()
        self._save(final=True)
        self._close()

    def __enter__(self) -> PtyDevice:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _close(self) -> None:
        for sock, _ in self._connections.values():
            sock.close()
        self._connections.clear()
        if self._server is not None:
            self._server.close()
            if self.lines_path is not None:
                self.lines_path.unlink(missing_ok=True)
            self._server = None
        if self.link is not None and self.link.is_symlink() and os.readlink(self.link) == self.path:
            self.link.unlink()
        self._port.close()
        for fd in (self._stop_read, self._stop_write):
            with contextlib.suppress(OSError):
                os.close(fd)

    def _load(self) -> None:
        if self.flash_file is not None and self.flash_file.exists():
            self._saved = self.flash_file.read_bytes()
            self.device.memory.load_flash(self._saved)

    def _save(self, final: bool = False) -> None:
        """Flash to disk once it was left alone for a moment, and at the end."""
        if self.flash_file is None:
            return
        now = self._now()
        if not final and (now - self._looked_ns < _SAVE_AFTER_NS or self.device.hazard):
            return
        self._looked_ns = now
        content = bytes(self.device.memory.flash)
        if content != self._saved:
            part = self.flash_file.with_name(self.flash_file.name + ".part")
            part.write_bytes(content)
            part.replace(self.flash_file)
            self._saved = content

    # --- the loop -------------------------------------------------------------------------------------------------

    def _now(self) -> int:
        return time.monotonic_ns() - self._base_ns

    def _loop(self) -> None:
        while True:
            with self.lock:
                wait_s = self._work()
            # Not poll(): its milliseconds, rounded up, would add several byte times to every turnaround.
            for fd in select.select(self._watched, (), (), wait_s)[0]:
                if fd == self._stop_read:
                    return
                with self.lock:
                    if fd == self._port.fd:
                        self._from_host()
                    elif self._server is not None and fd == self._server.fileno():
                        self._accept()
                    else:
                        self._from_box(fd)

    def _work(self) -> float | None:
        """Do all that is due; how long nothing will be, in s (None: until somebody says something)."""
        while True:
            now = self._now()
            self._feed_due(now)
            for burst in self.device.collect(max(now, self.device.now_ns), self._port.receiver()):
                self.lost_to_host += self._port.send(burst)
            self._save()
            times = [self._pending[0].end_ns] if self._pending else []
            end = self.device.output_end_ns()
            if end is not None:
                if not self._paced:
                    self._skip(end - now)
                    continue
                times.append(min(end, now + _PIECE_NS))
            event = self.device.next_ns()
            if event is not None and end is None:
                times.append(event)
            if self.flash_file is not None:
                times.append(now + _SAVE_AFTER_NS)
            if not times:
                return None
            left = min(times) - self._now()
            if left > 0:
                return left / 1e9

    def _skip(self, span_ns: int) -> None:
        """Let the device's clock jump: bytes that take no time."""
        if span_ns > 0:
            self._base_ns -= span_ns

    def _feed_due(self, now: int) -> None:
        while self._pending:
            due, rest = self._pending[0].split(now)
            if due is not None:
                self.device.feed(due.data, due.start_ns, due.format)
            if rest is not None:
                self._pending[0] = rest
                return
            self._pending.popleft()

    def _from_host(self) -> None:
        try:
            data = os.read(self._port.fd, _READ_BYTES)
        except BlockingIOError:
            return
        form = self._port.host_format()
        start = max(self._now(), self._rx_free_ns)
        burst = Burst(start, form.byte_ns, data, form)
        self._pending.append(burst)
        self._rx_free_ns = burst.end_ns
        if not self._paced:
            self._skip(burst.end_ns - self._now())

    # --- the line box ---------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        if self._server is None:
            return
        try:
            sock, _ = self._server.accept()
        except OSError:
            return
        if len(self._connections) >= _CONNECTION_LIMIT or sock.fileno() >= _SELECT_LIMIT:
            sock.close()
            return
        sock.setblocking(False)
        self._connections[sock.fileno()] = (sock, bytearray())
        self._watched.append(sock.fileno())

    def _from_box(self, fd: int) -> None:
        sock, buffer = self._connections[fd]
        try:
            data = sock.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        buffer += data
        answers = bytearray()
        while b"\n" in buffer:
            line, _, rest = bytes(buffer).partition(b"\n")
            buffer[:] = rest
            answers += self._command(line.decode("ascii", "replace").strip()) + b"\n"
        try:
            if answers:
                sock.sendall(answers)
        except OSError:
            data = b""
        if not data or len(buffer) > _LINE_LIMIT:
            self._watched.remove(fd)
            del self._connections[fd]
            sock.close()
            if not self._connections:
                self._set(nrst=True, boot0=False, power=True)

    def _command(self, line: str) -> bytes:
        match line.split():
            case [("nrst" | "boot0" | "power") as name, ("0" | "1") as level]:
                self._set(**{name: level == "1"})
                return b"ok"
            case [("safe" | "alive") as name, "?"]:
                now = self._now()
                self._feed_due(now)
                self.device.advance(max(now, self.device.now_ns))
                return b"1" if self.device.level(name) else b"0"
        return f'error "{line[:_LINE_LIMIT]}" is not: nrst|boot0|power 0|1, safe|alive ?'.encode()

    def _set(self, *, nrst: bool | None = None, boot0: bool | None = None, power: bool | None = None) -> None:
        now = self._now()
        self._feed_due(now)
        self.device.set_lines(max(now, self.device.now_ns), nrst=nrst, boot0=boot0, power=power)


def _host_baud(fd: int) -> int:
    """The speed that the host set at its end, any number; 38400 (the kernel's default) where it set none."""
    block = array.array("B", bytes(_TERMIOS2_BYTES))
    try:
        fcntl.ioctl(fd, _TCGETS2, block, True)
        (speed,) = struct.unpack_from("=I", block, _TERMIOS2_BYTES - 4)
    except OSError:
        speed = 0
    return int(speed) or 38400


def _symlink(target: str, link: Path) -> None:
    """``link`` points at ``target``, also where an older link was; anything else at that path is left alone."""
    if link.is_symlink():
        link.unlink()
    link.symlink_to(target)


def _listen(path: Path) -> socket.socket:
    if path.is_socket():
        path.unlink()
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        server.bind(str(path))
        server.listen(_CONNECTION_LIMIT)
    except OSError:
        server.close()
        raise
    return server
