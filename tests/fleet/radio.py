"""What one gateway of a fleet costs on a link that is paid by the byte, through a proxy that counts::

    python -m tests.fleet.radio

The connector and the broker are the real ones, without TLS; jobs and images are the stand-ins of ``scale``. Counted is what TCP
carries, so its own headers and acknowledgements come on top. Prints the figures for docs/fleet.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from bridged.fleet import control, setup
from bridged.fleet.connector import Connector, Member
from bridged.fleet.ledger import Ledger
from bridged.fleet.link import Access
from bridged.fleet.rollout import Spec, plan
from tests.fleet.broker import Broker
from tests.fleet.members import operator, running, until
from tests.fleet.scale import IMAGE_BYTES, LightJobs, LightStore

NEVER_S = 100_000.0
COUNTED = 10  # of what comes again and again


class Counting:
    """A TCP proxy to ``port``; everything that went either way is kept."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.up, self.down = bytearray(), bytearray()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kept: bytearray) -> None:
        while data := await reader.read(65536):
            kept += data
            writer.write(data)
            await writer.drain()
        writer.close()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._port)
        with contextlib.suppress(ConnectionError):
            await asyncio.gather(self._carry(reader, back, self.up), self._carry(there, writer, self.down))

    async def __aenter__(self) -> str:
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        return f"nats://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def settled(self) -> tuple[int, int]:
        """What went up and down, once nothing has for a second."""
        while True:
            before = len(self.up), len(self.down)
            await asyncio.sleep(1)
            if (len(self.up), len(self.down)) == before:
                return before


@contextlib.asynccontextmanager
async def gateway(broker: Broker, folder: Path, poll_s: float = NEVER_S, ping_s: float = NEVER_S) -> AsyncIterator[Counting]:
    """``gw1``, connected and with its inventory told; again it is the same one."""
    counting, jobs = Counting(broker.ports[0]), LightJobs(random.Random(3))
    async with counting as server:
        member, ledger = Member("gw1", {"site": "s1"}, poll_s, 15.0), Ledger(folder / "gw1.db", "gw1")
        one = Connector(member, Access((server,), ping_s=ping_s), jobs, LightStore(), ledger)
        jobs.observe = one.observe
        async with running(one):
            await until(lambda: one.connected)
            yield counting


async def each(broker: Broker, folder: Path, what: bytes, poll_s: float, ping_s: float) -> tuple[float, float]:
    """Bytes up and down for each ``what`` that the gateway sends, with what comes back for it."""
    async with gateway(broker, folder, poll_s, ping_s) as wire:
        while wire.up.count(what) < 2:
            await asyncio.sleep(0.01)
        seen, up, down = wire.up.count(what), len(wire.up), len(wire.down)
        while wire.up.count(what) < seen + COUNTED:
            await asyncio.sleep(0.01)
        return (len(wire.up) - up) / COUNTED, (len(wire.down) - down) / COUNTED


async def measure(broker: Broker, folder: Path) -> dict[str, Any]:
    link = await operator(broker)
    await setup.prepare(link, 1)
    await setup.admit(link, "gw1")
    figures: dict[str, Any] = {}
    async with gateway(broker, folder) as wire:
        await until(lambda: b"state.gateway" in wire.up)
        figures["connect and inventory"] = await wire.settled()
    figures["a renewal"] = await each(broker, folder, b"CONSUMER.MSG.NEXT", 2.0, NEVER_S)
    figures["a ping"] = await each(broker, folder, b"PING\r\n", NEVER_S, 2.0)
    image = folder / "app.bin"
    image.write_bytes(random.Random(1).randbytes(IMAGE_BYTES))
    stored, _ = await control.put(link, image, type="bin")
    async with gateway(broker, folder) as wire:
        before = await wire.settled()
        spec = Spec("r1", stored.artifact, options={"addr": "0x08000000"})
        await control.create(link, spec, plan("r1", [("gw1", "m1")], ["100%"]), time.time())
        drive = control.Drive(link, "r1")
        await drive.begin()
        _, made = await drive.run(lambda _one, _made: None)
        assert made.tally.succeeded == 1, made
        after = await wire.settled()
        figures["a job"] = (after[0] - before[0], after[1] - before[1])
        figures["a job, down for each byte of the image"] = (after[1] - before[1]) / IMAGE_BYTES
    await link.close()
    return figures


def main() -> int:
    with tempfile.TemporaryDirectory() as folder, Broker(Path(folder) / "broker") as broker:
        figures = asyncio.run(measure(broker, Path(folder)))
    for name, value in figures.items():
        print(f"{name}: {json.dumps(value)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
