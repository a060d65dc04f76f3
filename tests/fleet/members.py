"""Gateways of a fleet for tests: the whole product in virtual time (``tests.e2e.virtual_gateway``) with the real connector,
against a real broker."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from bridged import config
from bridged.api.auth import Authority, Principal
from bridged.api.guarded import Guarded
from bridged.fleet.connector import Clock, Connector, Member
from bridged.fleet.download import PRINCIPAL
from bridged.fleet.ledger import Ledger
from bridged.fleet.link import Access, Link, connect
from bridged.fleet.wire import Artifact, Command
from bridged.protocol.verbs import Scope
from tests.e2e.virtual_gateway import NOWHERE, VirtualGateway
from tests.fleet.broker import Broker

QUICK = Clock(lot=lambda most: min(most, 0.1))
TARGET = config.Target(port=NOWHERE, application=config.Application(listen_s=0.0))


def connector(
    gateway: VirtualGateway, name: str, access: Access, clock: Clock = QUICK, poll_s: float = 30.0, progress_s: float = 0.0
) -> Connector:
    """Its ledger lies in the gateway's folder: another connector there is the same gateway after a restart."""
    who = Principal(PRINCIPAL, "nats", frozenset({Scope.READ, Scope.FLASH}))
    ledger = Ledger(gateway.root / "fleet.db", name)
    member = Member(name, {"site": "berlin"}, poll_s, progress_s)
    made = Connector(member, access, Guarded(gateway.jobs, Authority(), who), gateway.store, ledger, clock)
    gateway.jobs.on_update.append(made.observe)
    return made


@contextlib.asynccontextmanager
async def running(made: Connector) -> AsyncIterator[Connector]:
    task = asyncio.create_task(made.run())
    try:
        yield made
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        made._ledger.close()


async def operator(broker: Broker, name: str = "op") -> Link:
    for turn in range(20):
        with contextlib.suppress(Exception):
            return await connect(Access(broker.servers), "operator", f"_INBOX_{name}", turn)
        await asyncio.sleep(0.2)
    return await connect(Access(broker.servers), "operator", f"_INBOX_{name}")


async def until(what: Callable[[], object], said: str = "", seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"not within {seconds} s: {said}"
        await asyncio.sleep(0.02)


def artifact(path: Path, data: bytes) -> Artifact:
    path.write_bytes(data)
    return Artifact(hashlib.sha256(data).hexdigest(), len(data), path.name, "bin")


def command(name: str, rollout: str, one: Artifact | None, target: str = "m1", turn: int = 0, kind: str = "ensure") -> Command:
    options = {"addr": "0x08000000"} if one else {}
    return Command(name, rollout, target, turn, kind, one, options)
