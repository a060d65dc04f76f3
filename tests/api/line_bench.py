"""A line server over real sockets with strict stand-ins behind it, and clients for it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridged.api.line import LineServer
from bridged.api.line_link import Limits
from bridged.config.values import Listen
from bridged.protocol.reply import Reply, parse_reply
from tests.api.fakes import FakeJobs, WatchedStore

LIMITS = Limits(image_bytes=2 << 20, connections=250, idle_timeout_s=20, linger_s=1.0)


class Client:
    """A client that reads whole replies and never hangs."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def line(self) -> bytes:
        return await asyncio.wait_for(self.reader.readline(), 10)

    async def reply(self) -> Reply:
        """One reply line, which must be well-formed."""
        found = await self.line()
        assert found.endswith(b"\n"), found
        return parse_reply(found)

    async def replies(self) -> list[Reply]:
        """Up to and with the last line of one answer."""
        found = [await self.reply()]
        while found[-1].more:
            found.append(await self.reply())
        return found

    async def say(self, text: str | bytes) -> None:
        self.writer.write(text if isinstance(text, bytes) else text.encode() + b"\n")
        await self.writer.drain()

    async def ask(self, text: str) -> Reply:
        await self.say(text)
        return (await self.replies())[-1]

    async def rest(self) -> bytes:
        return await asyncio.wait_for(self.reader.read(), 10)


@dataclass
class World:
    server: LineServer
    jobs: FakeJobs
    store: WatchedStore
    port: int
    uploads: list[tuple[int, bool]]

    async def connect(self, greeting: bool = True) -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port))
        if greeting:
            assert (await client.reply()).code == 220
        return client

    async def settle(self) -> None:
        """Until no connection is left: whatever a vanished client had started is over then."""
        async with asyncio.timeout(10):
            while self.server.connections:
                await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def world(root: Path, limits: Limits = LIMITS) -> AsyncIterator[World]:
    store = WatchedStore(root)
    jobs = FakeJobs(store)
    uploads: list[tuple[int, bool]] = []
    server = LineServer(jobs, store, "gw1", limits, lambda count, resumed: uploads.append((count, resumed)))
    port = await server.listen_tcp(Listen("127.0.0.1", 0))
    try:
        yield World(server, jobs, store, port, uploads)
    finally:
        await server.stop()
        await jobs.close()
        assert not jobs.surprises
        assert not jobs.scripts, "a job that was expected has not been asked for"
        assert store.open == 0, "an upload was left open"
        assert not jobs.watchers, "a watcher was left behind"


def run(root: Path, body: Callable[[World], Coroutine[Any, Any, None]], limits: Limits = LIMITS) -> None:
    async def main() -> None:
        async with world(root, limits) as w:
            await body(w)

    asyncio.run(main())


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
