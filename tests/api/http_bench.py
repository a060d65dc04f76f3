"""An HTTP server over real sockets with strict stand-ins behind it, and two clients: a polite one and one that sends bytes."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from bridged.api.auth import Authority
from bridged.api.http import HttpServer
from bridged.api.http_call import Limits, Services
from bridged.api.metrics import Metrics
from bridged.api.transfers import Transfers
from bridged.config.values import Listen
from tests.api.fakes import FakeJobs, WatchedStore

LIMITS = Limits(image_bytes=2 << 20)


@dataclass
class Event:
    """One event of a stream; ``comment`` for a heartbeat."""

    name: str = ""
    data: Any = None
    id: str = ""


@dataclass
class Stream:
    response: aiohttp.ClientResponse

    async def event(self) -> Event | None:
        """The next one, None at the end of the stream."""
        found = Event()
        async with asyncio.timeout(10):
            while line := await self.response.content.readline():
                text = line.decode().rstrip("\n")
                key, _, value = text.partition(": ")
                if not text and found != Event():
                    return found
                if key == "" and text:
                    found.name = "comment"
                elif key == "event":
                    found.name = value
                elif key == "id":
                    found.id = value
                elif key == "data":
                    found.data = json.loads(value)
        return None

    async def events(self) -> list[Event]:
        found = []
        while (event := await self.event()) is not None:
            found.append(event)
        return found


@dataclass
class Bench:
    server: HttpServer
    jobs: FakeJobs
    store: WatchedStore
    port: int
    client: aiohttp.ClientSession
    uploads: list[tuple[int, bool]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def ask(self, method: str, path: str, **more: Any) -> tuple[int, Any, Any]:
        """Status, headers and the body: JSON where it is, else text."""
        async with self.client.request(method, self.url + path, **more) as response:
            raw = await response.read()
            is_json = "json" in response.headers.get("Content-Type", "") and raw
            return response.status, response.headers, json.loads(raw) if is_json else raw

    async def problem(self, method: str, path: str, **more: Any) -> tuple[int, str]:
        """Status and code of what must be a problem document."""
        status, headers, body = await self.ask(method, path, **more)
        assert headers["Content-Type"] == "application/problem+json", (status, body)
        assert body["status"] == status
        assert body["title"] == body["code"]
        assert body["cause"]
        assert body["remedy"]
        return status, body["code"]

    async def raw(self, data: bytes) -> bytes:
        """Everything that comes back for these bytes, until the server closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(data)
            with contextlib.suppress(ConnectionError):
                await writer.drain()
            with contextlib.suppress(ConnectionError):
                return await asyncio.wait_for(reader.read(), 15)
            return b""
        finally:
            writer.close()

    @contextlib.asynccontextmanager
    async def stream(self, path: str, last: str = "") -> AsyncIterator[Stream]:
        headers = {"Last-Event-ID": last} if last else {}
        async with self.client.get(self.url + path, headers=headers) as response:
            assert response.status == 200, await response.text()
            assert response.headers["Content-Type"] == "text/event-stream"
            yield Stream(response)

    async def settle_streams(self) -> None:
        async with asyncio.timeout(10):
            while self.jobs.watchers:
                await asyncio.sleep(0.001)

    async def settle(self) -> None:
        """Until nothing is open in the store: whatever a vanished client had sent is there then."""
        async with asyncio.timeout(10):
            while self.store.open or not self.store.uploads:
                await asyncio.sleep(0.001)


async def scrape(accept: str) -> tuple[bytes, str]:
    return Metrics(["motor1"]).render(accept)


@contextlib.asynccontextmanager
async def bench(root: Path, limits: Limits = LIMITS, takeover_s: float = 5.0, **more: Any) -> AsyncIterator[Bench]:
    store = WatchedStore(root)
    jobs = FakeJobs(store)
    uploads: list[tuple[int, bool]] = []
    services = Services(
        jobs,
        store,
        more.pop("authority", None) or Authority(),
        Transfers(takeover_s),
        limits,
        "gw1",
        more.pop("consoles", {}),
        lambda count, resumed: uploads.append((count, resumed)),
        scrape,
    )
    server = HttpServer(services, **more)
    jobs.on_update.append(server.events.recent.note)
    port = await server.listen_tcp(Listen("127.0.0.1", 0))
    async with aiohttp.ClientSession() as client:
        try:
            yield Bench(server, jobs, store, port, client, uploads)
        finally:
            await server.stop()
            await jobs.close()
    assert not jobs.surprises
    assert not jobs.scripts, "a job that was expected has not been asked for"
    assert store.open == 0, "an upload was left open"
    assert not jobs.watchers, "a watcher was left behind"
    assert server.connections == 0


def run(root: Path, body: Callable[[Bench], Coroutine[Any, Any, None]], limits: Limits = LIMITS, **more: Any) -> None:
    async def main() -> None:
        async with bench(root, limits, **more) as found:
            await body(found)

    asyncio.run(main())
