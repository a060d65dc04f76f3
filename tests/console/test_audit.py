"""Who was at a console is in the audit log, whatever the wire: a port of its own, CONSOLE of the line protocol, a WebSocket."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import aiohttp
import pytest

from bridged.api import consoles
from bridged.api.line import LineServer
from bridged.api.line_link import Limits as LineLimits
from bridged.config.values import Listen
from bridged.jobs.journal import Journal
from bridged.protocol.verbs import Scope
from tests.api.http_bench import bench
from tests.api.test_http_attacks import closed
from tests.api.test_http_console import LIMITS, terminal
from tests.console import rig


def test_every_wire_of_a_console_is_in_the_audit_log_and_nothing_that_was_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consoles, "EOF_LINGER_S", 0.05)

    async def act(journal: Journal) -> list[tuple[str, ...]]:
        authority = closed(journal)
        tokens = {}
        for name, scope in (("ann", Scope.CONSOLE), ("bob", Scope.CONSOLE), ("eve", Scope.READ), ("root", Scope.ADMIN)):
            _, tokens[name] = await authority.grant(name, [scope])
        (tmp_path / "board").mkdir()
        async with (
            rig.bench(tmp_path / "board") as b,
            bench(tmp_path, LIMITS, consoles={"bench": b.console}, authority=authority) as web,
        ):
            b.console.record = partial(consoles.record, authority)
            line = LineServer(
                web.jobs, web.store, "gw1", LineLimits(linger_s=0.1), authority=authority, consoles={"bench": b.console}
            )
            port = await line.listen_tcp(Listen("127.0.0.1", 0))

            async def said(name: str, *lines: str) -> rig.Client:
                client = rig.Client(*await asyncio.open_connection("127.0.0.1", port))
                client.say("\n".join([f"AUTH {tokens[name]}", *lines, ""]).encode())
                return client

            own = await b.connect()  # Everybody may here, as on a gateway that trusts loopback.
            await b.until(lambda: b.console.seats)
            own.say(b"hunter1")
            await b.hear(7)
            ann = await said("ann", "CONSOLE bench replay=0")
            await ann.expect(b"423 TARGET_BUSY")
            root = await said("root", "CONSOLE bench force=1 replay=0")
            await root.expect(b"101 CONSOLE")
            root.say(b"hunter2")
            await b.hear(7)
            eve = await said("eve", "CONSOLE bench", "LOCK bench", "CONSOLE bench ro replay=0")
            await eve.expect(b"101 CONSOLE")
            with pytest.raises(aiohttp.WSServerHandshakeError):
                async with terminal(web, headers={"Authorization": f"Bearer {tokens['eve']}"}):
                    pass
            await root.close()
            await b.until(lambda: all(seat.principal != "token-root" for seat in b.console.seats))
            async with terminal(web, headers={"Authorization": f"Bearer {tokens['bob']}"}) as term:
                for _ in range(3):
                    await term.socket.send_bytes(b"hunter3")
                await b.hear(21)
            await b.until(lambda: all(seat.principal != "token-bob" for seat in b.console.seats))
            ann.say(b"LOCK bench note=measuring\n")
            await ann.expect(b"owner=token-ann")
            bob = await said("bob", "UNLOCK bench", "LOCK bench")
            for _ in range(2):
                await bob.expect(b"423 TARGET_BUSY")
            await b.say(b"hunter4")
            for client in (own, ann, eve, bob):
                await client.close()
            await b.until(lambda: not b.console.seats)
            await line.stop()
        found = [entry for entry in reversed(await authority.audit(100)) if entry.what != "login"]
        assert {entry.target for entry in found if entry.result != "NOT_ALLOWED"} == {"bench"}
        assert all(entry.source == "here" or entry.source.startswith("127.0.0.1:") for entry in found)
        return [(entry.who, entry.what, entry.result, entry.detail) for entry in found]

    async def main(journal: Journal) -> list[tuple[str, ...]]:
        async with asyncio.timeout(60):
            return await act(journal)

    (tmp_path / "book").mkdir()
    journal = Journal.open(tmp_path / "book" / "state.db")
    try:
        found = asyncio.run(main(journal))
    finally:
        journal.close()
    brief = [(who, what, result) for who, what, result, _ in found]
    assert brief[:-2] == [
        ("local", "console", "ok"),
        ("local", "console write", "ok"),
        ("token-ann", "console", "ok"),
        ("token-ann", "console write", "TARGET_BUSY"),
        ("token-ann", "console end", "ok"),
        ("token-root", "console", "ok"),
        ("token-root", "console write", "ok"),
        ("token-eve", "console", "NOT_ALLOWED"),
        ("token-eve", "lock", "NOT_ALLOWED"),
        ("token-eve", "console", "ok"),
        ("token-eve", "console", "NOT_ALLOWED"),
        ("token-root", "console end", "ok"),
        ("token-bob", "console", "ok"),
        ("token-bob", "console write", "ok"),
        ("token-bob", "console end", "ok"),
        ("token-ann", "lock", "ok"),
        ("token-bob", "unlock", "TARGET_BUSY"),
        ("token-bob", "lock", "TARGET_BUSY"),
    ], found
    assert sorted(brief[-2:]) == [("local", "console end", "ok"), ("token-eve", "console end", "ok")], found
    details = [detail for *_, detail in found]
    assert details[3] == "here#1 has it"
    assert details[6] == "taken over from here#1"
    assert "measuring" in details
    assert any(detail.endswith(" s, 21 bytes sent") for detail in details)
    assert "hunter" not in str(found)
