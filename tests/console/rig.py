"""What the tests of the console have in common: a target on a pty of the test's own, in this process, with real listeners."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tty
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bridged import config
from bridged.api.entrance import Entrance
from bridged.api.tls import Tls, by_certificate
from bridged.config import values
from bridged.console import server
from bridged.console.room import Console
from bridged.console.server import Admission, Listeners
from bridged.target.owner import Target

EOF_LINGER_S = 0.4  # What a client that has said its last word is given for an answer; the targets here answer at once.


@dataclass
class Bench:
    """``master``: the target's end of the wire. ``port``: TCP port of the console."""

    target: Target
    console: Console
    listeners: Listeners
    port: int
    master: int
    link: Path

    async def say(self, data: bytes) -> None:
        """As the target."""
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self.master, view) :]
            except BlockingIOError:
                await asyncio.sleep(0.001)

    async def hear(self, count: int, within_s: float = 5.0) -> bytes:
        """What the target hears."""
        found = b""
        async with asyncio.timeout(within_s):
            while len(found) < count:
                try:
                    found += os.read(self.master, count - len(found))
                except BlockingIOError:
                    await asyncio.sleep(0.002)
        return found

    def heard_now(self) -> bytes:
        with contextlib.suppress(BlockingIOError):
            return os.read(self.master, 65536)
        return b""

    async def connect(self) -> Client:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        return Client(reader, writer)

    async def until(self, true: Callable[[], Any], within_s: float = 5.0) -> None:
        async with asyncio.timeout(within_s):
            while not true():
                await asyncio.sleep(0.002)


@dataclass
class Client:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def expect(self, text: bytes, within_s: float = 5.0) -> bytes:
        """Everything up to and with ``text``."""
        async with asyncio.timeout(within_s):
            return await self.reader.readuntil(text)

    async def take(self, count: int, within_s: float = 5.0) -> bytes:
        async with asyncio.timeout(within_s):
            return await self.reader.readexactly(count)

    def say(self, data: bytes) -> None:
        self.writer.write(data)

    async def ended(self, within_s: float = 5.0) -> bytes:
        """What was left, once the other side has closed."""
        async with asyncio.timeout(within_s):
            return await self.reader.read()

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


def admit_everybody(_info: object, _target: str) -> Admission:
    return Admission("local", "here")


@contextlib.asynccontextmanager
async def bench(
    root: Path,
    *,
    application: config.Application | None = None,
    lines: config.Lines | None = None,
    admit: Callable[..., Admission] = admit_everybody,
    present: bool = True,
    tls: Tls | None = None,
    listen: str = "127.0.0.1:0",
    **console: Any,
) -> AsyncIterator[Bench]:
    master, slave = os.openpty()
    tty.setraw(slave)
    os.set_blocking(master, False)
    link = root / "tty"
    if present:
        link.symlink_to(os.ttyname(slave))
    settings = config.Target(
        port=str(link),
        application=application or config.Application(listen_s=0.0),
        lines=lines or config.Lines(),
        console=replace(config.Console(), **console),
    )
    target = Target("bench", settings)
    room = Console(target, settings.console)
    lingering, server.EOF_LINGER_S = server.EOF_LINGER_S, EOF_LINGER_S
    target.listener = room
    listeners = Listeners(room, admit, Entrance("A console", tls, by_certificate))
    await target.open()
    try:
        if present:
            assert await target.wait_idle_hardware(5), target.reason
        port = await listeners.listen_tcp(values.listeners(listen)[0])
        yield Bench(target, room, listeners, port, master, link)
    finally:
        await listeners.close()
        await room.close()
        await target.close()
        server.EOF_LINGER_S = lingering
        os.close(master)
        os.close(slave)
