"""The console as a WebSocket and the lock, against a real console on a pty."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from bridged.api.auth import Authority
from bridged.api.http_call import Limits
from bridged.api.http_console import PROTOCOL, TOLD_LIMIT, Wire
from bridged.jobs.journal import Journal
from bridged.protocol.verbs import Scope
from tests.api.http_bench import Bench, bench
from tests.api.test_http_attacks import closed, head, status
from tests.console import rig

WHERE = "/v1/targets/bench/console"
LIMITS = Limits(image_bytes=2 << 20)


class Terminal:
    """A browser's end: bytes and notices apart."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self.bytes = b""
        self.told: list[dict[str, Any]] = []

    async def next(self) -> bool:
        """One more message; False at the end."""
        async with asyncio.timeout(10):
            message = await self.socket.receive()
        if message.type is aiohttp.WSMsgType.BINARY:
            self.bytes += message.data
        elif message.type is aiohttp.WSMsgType.TEXT:
            self.told.append(json.loads(message.data))
        else:
            return False
        return True

    async def until(self, true: Callable[[Terminal], Any]) -> None:
        while not true(self):
            assert await self.next(), f"it ended with {self.bytes!r} {self.told}"

    def notices(self) -> str:
        return " | ".join(told["notice"] for told in self.told if "notice" in told)


@contextlib.asynccontextmanager
async def terminal(web: Bench, query: str = "", **more: Any) -> AsyncIterator[Terminal]:
    settings: dict[str, Any] = {"protocols": [PROTOCOL], **more}
    async with web.client.ws_connect(f"{web.url}{WHERE}{query}", **settings) as socket:
        yield Terminal(socket)


def run(
    root: Path,
    body: Callable[[Bench, rig.Bench], Coroutine[Any, Any, None]],
    *,
    authority: Authority | None = None,
    **more: Any,
) -> None:
    async def main() -> None:
        (root / "board").mkdir()
        async with rig.bench(root / "board", **more) as board:
            async with bench(root, LIMITS, consoles={"bench": board.console}, authority=authority) as web:
                await body(web, board)
            assert not board.console.seats, "a client was left at the console"

    asyncio.run(main())


def test_bytes_go_both_ways_unchanged(tmp_path: Path) -> None:
    every = bytes(range(256))

    async def body(web: Bench, board: rig.Bench) -> None:
        async with terminal(web) as term:
            assert term.socket.protocol == PROTOCOL
            await board.say(b"hello " + every)
            await term.until(lambda t: t.bytes == b"hello " + every)
            await term.socket.send_bytes(every)
            assert await board.hear(256) == every
            await term.until(lambda t: {"writing": True} in t.told)

    run(tmp_path, body)


def test_history_comes_first(tmp_path: Path) -> None:
    async def body(web: Bench, board: rig.Bench) -> None:
        await board.say(b"booted\r\nready\r\n")
        await board.until(lambda: board.console.bytes_in == 15)
        async with terminal(web) as term:
            await term.until(lambda t: t.bytes == b"booted\r\nready\r\n")
        async with terminal(web, "?replay=7") as term:
            await term.until(lambda t: t.bytes == b"ready\r\n")
        async with terminal(web, "?replay=0") as term:
            await board.say(b"!")
            await term.until(lambda t: t.bytes == b"!")

    run(tmp_path, body)


def test_one_writes_and_the_others_look(tmp_path: Path) -> None:
    async def body(web: Bench, board: rig.Bench) -> None:
        async with terminal(web) as one, terminal(web) as two, terminal(web, "?mode=ro") as three:
            await one.socket.send_bytes(b"one")
            assert await board.hear(3) == b"one"
            await two.socket.send_bytes(b"two")
            await two.until(lambda t: "not sent" in t.notices())
            await three.socket.send_bytes(b"three")
            await three.until(lambda t: "not sent" in t.notices())
            await two.socket.send_str('{"take": true}')
            await two.until(lambda t: {"writing": True} in t.told)
            await two.socket.send_bytes(b"two")
            assert await board.hear(3) == b"two"
            await one.until(lambda t: [told["writing"] for told in t.told if "writing" in told][-2:] == [True, False])
            await three.socket.send_str('{"take": true}')
            await three.until(lambda t: "read only" in t.notices())
            await board.say(b"all of you")
            for term in (one, two, three):
                await term.until(lambda t: t.bytes.endswith(b"all of you"))

    run(tmp_path, body)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"take": 1, "x": 2}', "[" * 900, "x" * 5000])
def test_text_that_means_nothing_is_told(tmp_path: Path, text: str) -> None:
    async def body(web: Bench, board: rig.Bench) -> None:
        async with terminal(web) as term:
            await term.socket.send_str(text)
            await term.until(lambda t: "not understood" in t.notices())
            await term.socket.send_bytes(b"x")
            assert await board.hear(1) == b"x"

    run(tmp_path, body)


def test_a_message_that_is_too_long_ends_it(tmp_path: Path) -> None:
    async def body(web: Bench, board: rig.Bench) -> None:
        async with terminal(web) as term:
            await term.socket.send_bytes(bytes(70_000))
            while await term.next():
                pass
            assert term.socket.close_code == aiohttp.WSCloseCode.MESSAGE_TOO_BIG
        assert board.heard_now() == b""

    run(tmp_path, body)


def test_a_writer_that_is_faster_than_the_port_is_held_and_loses_nothing(tmp_path: Path) -> None:
    data = bytes(range(256)) * 1024

    async def body(web: Bench, board: rig.Bench) -> None:
        async with terminal(web) as term:
            sending = asyncio.ensure_future(_send(term, data))
            assert await board.hear(len(data), 30) == data
            await sending

    run(tmp_path, body)


async def _send(term: Terminal, data: bytes) -> None:
    for at in range(0, len(data), 5000):
        await term.socket.send_bytes(data[at : at + 5000])


def test_a_reader_that_does_not_keep_up_loses_bytes_and_is_told(tmp_path: Path) -> None:
    async def body(web: Bench, board: rig.Bench) -> None:
        async with terminal(web) as fast, terminal(web) as slow:
            piece = bytes(range(256)) * 64
            total = 0
            connection = slow.socket._response.connection
            assert connection is not None
            assert connection.transport is not None
            connection.transport.pause_reading()
            while not any(seat.lost for seat in board.console.seats):
                await board.say(piece)
                total += len(piece)
                while len(fast.bytes) < total:
                    assert await fast.next()
                assert total < 64 << 20
            connection.transport.resume_reading()

            async def more() -> None:
                while True:
                    await board.say(b"?")
                    await asyncio.sleep(0.01)

            telling = asyncio.ensure_future(more())
            await slow.until(lambda t: "bytes were lost here" in t.notices())
            telling.cancel()

    run(tmp_path, body, buffer_kib=16)


def test_who_talks_and_does_not_listen_is_thrown_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each text that means nothing has an answer, and answers that nobody fetches are memory."""

    async def stuck(_wire: Wire) -> None:  # As behind a full socket; filling a real one takes seconds.
        await asyncio.Event().wait()

    monkeypatch.setattr(Wire, "send", stuck)

    async def body(web: Bench, board: rig.Bench) -> None:
        async with terminal(web) as term:
            wire = board.console.seats[0].sink
            assert isinstance(wire, Wire)
            for _ in range(4 * TOLD_LIMIT):
                await term.socket.send_str("x")
            while await term.next():
                pass
            assert len(wire._waiting) == TOLD_LIMIT

    run(tmp_path, body)


def test_a_lock_keeps_others_from_writing(tmp_path: Path) -> None:
    async def body(web: Bench, board: rig.Bench) -> None:
        path = "/v1/targets/bench/lock"
        status_, _, lock = await web.ask("PUT", path, json={"ttl": 60, "note": "measuring"})
        assert (status_, lock["target"], lock["owner"], lock["ttl"]) == (200, "bench", "local", 60)
        assert board.console.holder is not None
        assert board.console.holder.note == "measuring"
        for bad in ({"ttl": 0}, {"ttl": "1"}, {"ttl": True}, {"note": 1}, {"note": "x" * 81}, {"note": "\n"}, {"odd": 1}):
            assert await web.problem("PUT", path, json=bad) == (400, "BAD_REQUEST"), bad
        assert (await web.ask("DELETE", path))[0] == 204
        assert (await web.ask("DELETE", path))[0] == 204
        assert board.console.holder is None
        assert await web.problem("PUT", "/v1/targets/other/lock") == (404, "UNKNOWN_TARGET")
        assert (await web.ask("PUT", path))[0] == 200

    run(tmp_path, body)


# --- who may


def test_rights_and_tokens(tmp_path: Path) -> None:
    (tmp_path / "book").mkdir()
    journal = Journal.open(tmp_path / "book" / "state.db")
    authority = closed(journal)

    async def body(web: Bench, board: rig.Bench) -> None:
        tokens = {}
        for name, scope, targets in (
            ("reader", Scope.READ, ()),
            ("typist", Scope.CONSOLE, ()),
            ("elsewhere", Scope.CONSOLE, ("other",)),
        ):
            _, tokens[name] = await authority.grant(name, [scope], targets)

        async def refused(query: str, *protocols: str) -> int:
            with pytest.raises(aiohttp.WSServerHandshakeError) as found:
                async with terminal(web, query, protocols=[PROTOCOL, *protocols]):
                    pass
            return found.value.status

        assert await refused("") == 401
        assert await refused("", "token." + "bridged_" + "A" * 43) == 401
        assert await refused("", f"token.{tokens['reader']}") == 403
        assert await refused("?mode=ro", f"token.{tokens['elsewhere']}") == 403
        assert await refused("?mode=odd", f"token.{tokens['typist']}") == 400
        async with terminal(web, "?mode=ro", protocols=[PROTOCOL, f"token.{tokens['reader']}"]) as look:
            async with terminal(web, protocols=[PROTOCOL, f"token.{tokens['typist']}"]) as term:
                assert term.socket.protocol == PROTOCOL, "the token is not sent back"
                await term.socket.send_bytes(b"hi")
                assert await board.hear(2) == b"hi"
                await authority.revoke("typist")
                while await term.next():
                    pass
                assert "does not count any more" in term.notices()
            await board.say(b"still here")
            await look.until(lambda t: t.bytes.endswith(b"still here"))
        read = {"Authorization": f"Bearer {tokens['reader']}"}
        assert await web.problem("PUT", "/v1/targets/bench/lock", headers=read) == (403, "NOT_ALLOWED")

    try:
        run(tmp_path, body, authority=authority)
    finally:
        journal.close()


def test_a_page_of_somebody_else_gets_no_console(tmp_path: Path) -> None:
    async def body(web: Bench, board: rig.Bench) -> None:
        for headers in ({"Origin": "http://evil.example.com"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
            with pytest.raises(aiohttp.WSServerHandshakeError) as found:
                async with terminal(web, headers=headers):
                    pass
            assert found.value.status == 403
        async with terminal(web, headers={"Origin": web.url, "Sec-Fetch-Site": "same-origin"}) as term:
            await board.say(b"x")
            await term.until(lambda t: t.bytes == b"x")

    run(tmp_path, body)


def test_what_is_no_websocket_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = [
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
    ]

    async def body(web: Bench, board: rig.Bench) -> None:
        secret = "token.bridged_" + "S" * 43
        for lines, expected in (
            ([], 426),
            (good[:1], 426),
            ([*good[:2], "Sec-WebSocket-Version: 8", good[3]], 400),
            (good[:3], 400),
            ([*good[:3], "Sec-WebSocket-Key: short"], 400),
            ([*good, "Sec-WebSocket-Protocol: chat"], 400),
            ([*good, f"Sec-WebSocket-Protocol: {secret}"], 401),
        ):
            close = [] if good[1] in lines else ["Connection: close"]
            reader, writer = await asyncio.open_connection("127.0.0.1", web.port)
            writer.write(head("GET", WHERE, *lines, *close))
            assert status(await asyncio.wait_for(reader.readline(), 5)) == expected, lines
            writer.close()
        assert secret not in caplog.text
        assert "S" * 43 not in caplog.text
        assert not board.console.seats

    run(tmp_path, body)


def test_the_daemon_stops_and_consoles_end(tmp_path: Path) -> None:
    async def body(web: Bench, board: rig.Bench) -> None:
        async with terminal(web) as term:
            await term.until(lambda t: t.told)
            await board.console.close()
            while await term.next():
                pass
            assert "stopping" in term.notices()

    run(tmp_path, body)
