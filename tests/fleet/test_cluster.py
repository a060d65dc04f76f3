"""Three nodes on loopback, of both versions, and the ones that lead die: during a download, and while a job runs."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from bridged.errors import FleetError
from bridged.fleet import control, setup, wire
from bridged.fleet import link as link_module
from bridged.fleet.arguments import parser
from bridged.fleet.connector import Connector
from bridged.fleet.link import Access, Link
from tests.e2e.virtual_gateway import VirtualGateway
from tests.fleet.broker import SERVERS, Broker
from tests.fleet.members import TARGET, artifact, command, connector, operator, running, until
from tests.fleet.test_connector import IMAGE

BIG = (IMAGE * 4)[:1000_000]  # 16 chunks


async def again(broker: Broker, link: Link | None, rollout: str) -> tuple[Link, wire.Report | None]:
    """An operator's look, over a link that breaks with its node."""
    for _ in range(40):
        try:
            if link is None or link.over.is_set():
                link = await operator(broker)
            return link, (await control.reports(link, rollout)).get(("gw1", "m1"))
        except FleetError:
            await asyncio.sleep(0.5)
    raise AssertionError("no operator's link")


async def prepared(broker: Broker) -> Link:
    """A cluster that has just come up does not answer everybody at once."""
    for _ in range(20):
        link = await operator(broker)
        try:
            await setup.prepare(link, 3)
            await setup.admit(link, "gw1")
        except FleetError:
            await link.close()
            await asyncio.sleep(0.5)
        else:
            return link
    raise AssertionError("the cluster does not come up")


async def ended(broker: Broker, link: Link | None, rollout: str) -> tuple[Link, wire.Report]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        link, found = await again(broker, link, rollout)
        if found and found.ended:
            return link, found
        await asyncio.sleep(0.1)
    raise AssertionError(f"{rollout} did not end: {found}")


def node_of(broker: Broker, made: Connector) -> int:
    return broker.ports.index(int(urlsplit(made.server).port or 0))


@pytest.mark.parametrize("which", SERVERS)
def test_the_nodes_that_lead_die(tmp_path: Path, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "ANSWER_S", 3.0)  # What a dead node does not answer is asked again sooner.

    async def work() -> None:
        link = await prepared(broker)
        # Another gateway is admitted, months later: the copies of what is there stay, and what is missing gets as many.
        await link.js.delete_stream(wire.STATES)
        changed = await setup.prepare(link, parser().parse_args(["init", "--gateway", "gw3"]).replicas)
        assert changed == [f"stream {wire.STATES}"]
        for stream in (wire.COMMANDS, wire.STATES):
            assert (await link.js.stream_info(stream)).config.num_replicas == 3
        image = artifact(tmp_path / "big.bin", BIG)
        await control.put(link, tmp_path / "big.bin", type="bin")
        (tmp_path / "gw").mkdir()
        one = command("gw1", "r1", image)
        host = VirtualGateway(tmp_path / "gw", {"m1": ("L476", {})}, settings=TARGET)
        async with host, running(connector(host, "gw1", Access(broker.servers), poll_s=5.0)) as made:
            await until(lambda: made.connected)
            came = made._came
            dead: list[int] = []

            def cut(count: int) -> None:
                """In the middle of the download the node that we are connected to dies, and with it leaders."""
                came(count)
                if made.chunk_bytes >= len(BIG) // 2 and not dead:
                    dead.append(node_of(broker, made))
                    broker.kill(dead[0])

            made._came = cut  # type: ignore[method-assign]
            await link.publish(one.subject, one.encode(), only_first=True)
            link, found = await ended(broker, link, "r1")
            assert (found.state, found.evidence) == ("succeeded", "full"), found
            assert dead, "nobody died"
            # What was missing came over the link, and the chunk again that had come and was not written when the link broke.
            assert made.chunk_bytes - len(BIG) in (0, wire.CHUNK_BYTES)
            broker.start(dead[0])
            broker.wait()

            # While a job runs, the leader of its reports dies.
            loose = asyncio.Event()
            submit = made._jobs.submit

            async def held(sub: Any) -> Any:
                job = await submit(sub)
                await loose.wait()
                return job

            made._jobs.submit = held  # type: ignore[method-assign]
            two = command("gw1", "r2", None, kind="identify")
            for _ in range(20):
                try:
                    link, _ = await again(broker, link, "r2")
                    await link.publish(two.subject, two.encode(), only_first=True)
                    break
                except FleetError:
                    await asyncio.sleep(0.5)
            await until(lambda: len(host.jobs.list()) == 2, "r2 is submitted")
            broker.kill(broker.leader_of(wire.REPORTS))
            loose.set()
            link, found = await ended(broker, link, "r2")
            assert found.state == "succeeded"
            await until(lambda: not made._ledger.untold(), "everything is told")
            assert len(host.jobs.list()) == 2, "no job is lost, and none is run twice"
            await until(lambda: not made._entries, "and none is still waited for")
        await link.close()

    with Broker(tmp_path / "nats", which, nodes=3) as broker:
        asyncio.run(work())


def test_a_download_goes_on_after_the_gateway_was_off(tmp_path: Path) -> None:
    """Killed in the middle, it moves again at most what the image store had not synced."""

    async def work() -> None:
        link = await operator(broker)
        await setup.prepare(link)
        await setup.admit(link, "gw1")
        image = artifact(tmp_path / "big.bin", BIG)
        await control.put(link, tmp_path / "big.bin", type="bin")
        (tmp_path / "gw").mkdir()
        one = command("gw1", "r1", image)
        await link.publish(one.subject, one.encode())
        half, stops = asyncio.Event(), list[int]()
        host = VirtualGateway(tmp_path / "gw", {"m1": ("L476", {})}, settings=TARGET)
        async with host, running(connector(host, "gw1", Access(broker.servers))) as made:
            came = made._came

            def stop(count: int) -> None:
                came(count)
                if made.chunk_bytes >= 600_000:
                    stops.append(count)
                    half.set()
                    raise asyncio.CancelledError

            made._came = stop  # type: ignore[method-assign]
            await asyncio.wait_for(half.wait(), 30)
        first = made.chunk_bytes
        host = VirtualGateway(tmp_path / "gw", {"m1": ("L476", {})}, settings=TARGET)
        async with host, running(connector(host, "gw1", Access(broker.servers))) as made:
            _, found = await ended(broker, link, "r1")
            assert found.state == "succeeded"
            # The chunk that had come when it was stopped was not written yet.
            assert first + made.chunk_bytes == len(BIG) + sum(stops)
        await link.close()

    with Broker(tmp_path / "nats") as broker:
        asyncio.run(work())
