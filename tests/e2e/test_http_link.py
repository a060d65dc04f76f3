"""HTTP over a bad link, and under load: an upload re-sends a piece a cut at most, and a flash does not notice fifty clients.

``Fault`` is a TCP proxy of our own: it delays each direction, stalls, limits the rate and cuts connections. Its times are
those of a bad radio link (2 s of delay, a cut every 30 s) divided by 25: what counts is how many pieces are sent for how many
cuts. With the real times, a few minutes: ``BRIDGED_LINK_SCALE=1``.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import os
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import pytest

from bridged import chips
from bridged.sim.loader import Timing
from tests.e2e.gateway import Gateway
from tests.support import free_port
from tests.target.bench import make_image

pytestmark = pytest.mark.alone

SCALE = float(os.environ.get("BRIDGED_LINK_SCALE", "0.04"))
PIECE_BYTES = 64 * 1024
TUS = {"Tus-Resumable": "1.0.0"}


@dataclass
class Fault:
    """``passed``: bytes of bodies towards the gateway would be hard to tell apart from headers, so all bytes are counted."""

    port: int
    delay_s: float = 0.0
    rate_bytes_s: float = 0.0
    cut_every_s: float = 0.0
    stall_s: float = 0.0
    cuts: int = 0
    stalls: int = 0
    passed: int = 0
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[int]:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        cutter = asyncio.ensure_future(self._cut()) if self.cut_every_s else None
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            if cutter is not None:
                cutter.cancel()
            server.close()
            for writer in list(self._writers):
                writer.transport.abort()

    async def _cut(self) -> None:
        """Without a word to either side, as a radio does."""
        while True:
            await asyncio.sleep(self.cut_every_s)
            if self._writers:
                self.cuts += 1
            for writer in list(self._writers):
                writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.port)
        self._writers |= {writer, far_writer}
        try:
            await asyncio.gather(self._carry(reader, far_writer, up=True), self._carry(far_reader, writer, up=False))
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            for one in (writer, far_writer):
                self._writers.discard(one)
                one.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool) -> None:
        while data := await reader.read(4096):
            await asyncio.sleep(self.delay_s if not up or self.passed == 0 else 0)
            if up:
                self.passed += len(data)
                if self.rate_bytes_s:
                    await asyncio.sleep(len(data) / self.rate_bytes_s)
                if self.stall_s and self.passed // 200_000 > self.stalls:
                    self.stalls += 1
                    await asyncio.sleep(self.stall_s)
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError


async def upload(url: str, data: bytes) -> tuple[int, int]:
    """As a careful client does it; how many bytes of pieces were sent in all, and how many requests failed."""
    sha256 = hashlib.sha256(data).hexdigest()
    where, sent, failed, offset = f"{url}/v1/uploads/{sha256}", 0, 0, -1
    timeout = aiohttp.ClientTimeout(total=max(2.0, 50 * SCALE))
    async with aiohttp.ClientSession(timeout=timeout) as session:
        while offset < len(data):
            try:
                if offset < 0:
                    async with session.head(where, headers=TUS) as response:
                        if response.status == 200:
                            offset = int(response.headers["Upload-Offset"])
                            continue
                    words = "sha256 " + base64.b64encode(sha256.encode()).decode()
                    headers = {**TUS, "Upload-Length": str(len(data)), "Upload-Metadata": words}
                    async with session.post(f"{url}/v1/uploads", headers=headers) as response:
                        offset = 0 if response.status == 201 else -1
                    continue
                piece = data[offset : offset + PIECE_BYTES]
                headers = {**TUS, "Upload-Offset": str(offset), "Content-Type": "application/offset+octet-stream"}
                sent += len(piece)
                async with session.patch(where, headers=headers, data=piece) as response:
                    if response.status != 204:
                        raise aiohttp.ClientError(str(response.status))
                    offset = int(response.headers["Upload-Offset"])
            except (aiohttp.ClientError, TimeoutError, OSError):
                failed += 1
                offset = -1
                await asyncio.sleep(SCALE)
    return sent, failed


@pytest.mark.timeout(120 if SCALE <= 0.2 else 900)
def test_a_mebibyte_over_a_link_that_breaks_again_and_again(tmp_path: Path) -> None:
    data = random.Random(5).randbytes(1 << 20)
    port = free_port()

    async def main() -> None:
        fault = Fault(port, delay_s=2 * SCALE, rate_bytes_s=12_000 / SCALE, cut_every_s=30 * SCALE, stall_s=15 * SCALE)
        began = time.monotonic()
        async with fault.running() as far:
            sent, failed = await upload(f"http://127.0.0.1:{far}", data)
        print(
            f"\n{time.monotonic() - began:.0f} s, {fault.cuts} cuts, {fault.stalls} stalls, {sent - len(data)} bytes sent twice"
        )
        assert fault.cuts >= 2, "it was not cut often enough to say anything"
        assert failed >= 1
        assert fault.stalls >= 3
        assert sent - len(data) <= (fault.cuts + 1) * PIECE_BYTES, "more than a piece was sent again for a cut"
        async with aiohttp.ClientSession() as session:
            url = f"http://127.0.0.1:{port}/v1/images/sha256:{hashlib.sha256(data).hexdigest()}/data"
            async with session.get(url) as response:
                assert await response.read() == data

    with Gateway(tmp_path, {"m1": "F756"}, http=f"127.0.0.1:{port}"):
        asyncio.run(main())


def test_a_flash_does_not_notice_fifty_clients(tmp_path: Path) -> None:
    """Figures are told, not gated: this machine has other things to do. What must hold: nobody is refused, the same bytes are
    said to the loader as without them, and memory does not grow with the requests."""
    image = make_image(chips.find("L476"), 8_000).segments[0].data
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    timing = Timing(sector_erase_s=0.02, spread=0, startup_s=0.01)

    async def flash(session: aiohttp.ClientSession) -> dict[str, Any]:
        body = {"kind": "flash", "image": "app.bin", "addr": 0x08000000, "mode": "full", "trace": True}
        async with session.post(f"{url}/v1/targets/m1/jobs", json=body) as response:
            job = (await response.json())["job"]
        while True:
            async with session.get(f"{url}/v1/jobs/{job}?wait=5") as response:
                found: dict[str, Any] = await response.json()
            if found["ended"]:
                return found

    async def client(session: aiohttp.ClientSession, stop: asyncio.Event, took: list[float], wrong: list[int]) -> None:
        paths = ("/v1/targets", "/v1/jobs?limit=5", "/v1/targets/m1", "/livez")
        number = 0
        while not stop.is_set():
            began = time.monotonic()
            async with session.get(f"{url}{paths[number % len(paths)]}") as response:
                await response.read()
                if response.status != 200:
                    wrong.append(response.status)
            took.append(time.monotonic() - began)
            number += 1
            await asyncio.sleep(max(0.0, 0.1 - took[-1]))  # 50 clients, 10 requests a second each

    async def dialogue(session: aiohttp.ClientSession, job: str) -> list[str]:
        async with session.get(f"{url}/v1/jobs/{job}/trace") as response:
            lines = (await response.text()).splitlines()
        return [line.split(maxsplit=1)[1] for line in lines if " > " in line]

    async def main(gateway: Gateway) -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            sha256 = hashlib.sha256(image).hexdigest()
            async with session.put(f"{url}/v1/images/sha256:{sha256}?name=app.bin", data=image) as response:
                assert response.status == 201
            await flash(session)
            alone = await flash(session)
            stop, took, wrong = asyncio.Event(), list[float](), list[int]()
            clients = [asyncio.ensure_future(client(session, stop, took, wrong)) for _ in range(50)]
            await asyncio.sleep(1.0)
            before = gateway.rss_bytes()
            began, count = time.monotonic(), len(took)
            crowded = await flash(session)
            served, seconds = len(took) - count, time.monotonic() - began
            after = gateway.rss_bytes()
            stop.set()
            await asyncio.gather(*clients)
            assert wrong == []
            for job in (alone, crowded):
                assert job["state"] == "succeeded", job
            assert await dialogue(session, crowded["job"]) == await dialogue(session, alone["job"])
            assert after - before < 4 << 20, "memory grows with the requests"
            took.sort()
            worst, middle, grown = took[int(len(took) * 0.99)] * 1e3, median(took) * 1e3, (after - before) / 1024
            print(f"\n{served / seconds:.0f} requests/s during a flash of {seconds:.1f} s")
            print(f"latency: median {middle:.1f} ms, 99 % {worst:.1f} ms; memory {grown:+.0f} KiB")

    with Gateway(tmp_path, {"m1": "L476"}, http=f"127.0.0.1:{port}", paced=True, settings={"timing": timing}) as gateway:
        asyncio.run(main(gateway))
