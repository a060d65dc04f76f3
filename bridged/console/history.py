"""What a target said: a ring in memory for those who come late, and a log file with times.

``History`` is plain data. ``Stamper`` turns bytes into lines of text with the time of their first byte, without a file.
``Log`` writes these with a thread, never on the loop: what a full or slow disk does not take is dropped and counted, and the
console goes on. Files are rotated at a size (``NAME``, ``NAME.1``, ``NAME.2`` ...), so that their space is bounded.

A line of the file is ``2026-11-22T23:05:01.123Z text``, in UTC, with bytes that are not printable ASCII as ``\\xNN``: whatever
a target says, a line of the log is a line, and cannot move a terminal's cursor.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

LINE_BYTES = 4096  # Of what a target says without a line end, before the log begins a new line.
PENDING_BYTES = 1 << 20  # Text that waits for the disk; at 3 Mbaud a second of it.
WRITE_EVERY_S = 0.5  # An SD card is to see a few larger writes rather than many small ones.


class History:
    """The last ``limit`` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._data = bytearray()

    def add(self, data: bytes) -> None:
        if not self.limit:
            return
        self._data += data
        # Cut only once it is twice too long: cutting at each byte would move the whole ring each time.
        if len(self._data) > 2 * self.limit:
            del self._data[: -self.limit]

    def tail(self, count: int) -> bytes:
        """The last ``count`` bytes at most."""
        count = min(count, self.limit, len(self._data))
        return bytes(memoryview(self._data)[len(self._data) - count :]) if count else b""


_SHOWN = [chr(value) if 32 <= value < 127 and value != 0x5C else f"\\x{value:02x}" for value in range(256)]
_SHOWN[0x5C], _SHOWN[0x09] = "\\\\", "\t"


class Stamper:
    """Bytes to lines with times. ``feed`` gives the lines that are whole; ``rest`` the one that is not."""

    def __init__(self) -> None:
        self._line = bytearray()
        self._began = 0.0

    def feed(self, data: bytes, at: float) -> str:
        out = []
        for piece in data.splitlines(keepends=True):
            if not self._line:
                self._began = at
            self._line += piece
            if piece[-1:] == b"\n" or len(self._line) >= LINE_BYTES:
                out.append(self._take())
        return "".join(out)

    def rest(self) -> str:
        return self._take() if self._line else ""

    def _take(self) -> str:
        text = bytes(self._line).rstrip(b"\r\n")
        self._line.clear()
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(self._began))
        shown = text.decode("latin-1").translate(_SHOWN_TABLE)
        return f"{when}.{int(self._began * 1000) % 1000:03d}Z {shown}\n"


_SHOWN_TABLE = dict(enumerate(_SHOWN))


class Log:
    """The log file of one console. ``feed`` never waits; ``close`` writes what is left."""

    def __init__(
        self, path: Path, limit_bytes: int, files: int, *, name: str = "", utc: Callable[[], float] = time.time
    ) -> None:
        self.path, self.limit_bytes, self.files = path, limit_bytes, files
        self.dropped = 0
        self._name, self._utc = name, utc
        self._stamper = Stamper()
        self._pending: list[str] = []
        self._size = 0
        self._lost = 0
        self._failed = ""
        self._task: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()

    def feed(self, data: bytes) -> None:
        if self._size + len(data) > PENDING_BYTES:
            self._lost += len(data)
            self.dropped += len(data)
        else:
            self._put(self._stamper.feed(data, self._utc()))
        self._begin()

    def note(self, text: str) -> None:
        """What is no word of the target's: a job, a writer, the port."""
        self._put(self._stamper.rest())
        self._put(self._stamper.feed(f"--- {text}\n".encode("ascii", "replace"), self._utc()))
        self._begin()

    def _put(self, text: str) -> None:
        if text:
            self._pending.append(text)
            self._size += len(text)

    def _begin(self) -> None:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._write(), name=f"console log {self.path}")

    async def close(self) -> None:
        self._hurry.set()
        if self._task is not None:
            await self._task
        self._put(self._stamper.rest())
        await self._flush()

    async def _write(self) -> None:
        """One piece after the other, as long as there are any."""
        while self._pending or self._lost:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WRITE_EVERY_S):
                    await self._hurry.wait()
            await self._flush()
        self._task = None

    async def _flush(self) -> None:
        if self._lost:
            self._put(self._stamper.feed(f"--- {self._lost} bytes were lost here\n".encode(), self._utc()))
            self._lost = 0
        text, self._pending, self._size = "".join(self._pending), [], 0
        if not text:
            return
        try:
            await asyncio.to_thread(self._append, text.encode("ascii", "replace"))
        except OSError as error:
            self.dropped += len(text)
            if self._failed != str(error):
                self._failed = str(error)
                log.error("console of %s: its log %s cannot be written: %s", self._name, self.path, error.strerror or error)
        else:
            if self._failed:
                log.warning("console of %s: its log %s is written again", self._name, self.path)
            self._failed = ""

    def _append(self, data: bytes) -> None:
        """Blocking, in one thread at a time."""
        # Not through a link that somebody else put there.
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
        try:
            size = os.fstat(fd).st_size
            if size and size + len(data) > self.limit_bytes:
                os.close(fd)
                fd = -1
                self._rotate()
                fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
        finally:
            if fd >= 0:
                os.close(fd)

    def _rotate(self) -> None:
        names = [self.path, *(self.path.with_name(f"{self.path.name}.{number}") for number in range(1, self.files + 1))]
        for older, newer in zip(reversed(names), [*reversed(names[:-1])], strict=False):
            if newer.exists():
                newer.replace(older)
        if not self.files:
            self.path.unlink(missing_ok=True)
