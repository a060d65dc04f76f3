"""Hostile and unlucky clients of the line server: what they send costs nobody else anything."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from bridged.api.line_link import Limits
from bridged.jobs.model import JobKind
from bridged.protocol.reply import parse_reply
from tests.api.fakes import Script
from tests.api.line_bench import LIMITS, World, run, sha

DATA = b"firmware" * 512
LONG = [("write", done, 100_000) for done in range(0, 100_001, 1000)]
STEPS = [("sync", 0, 0), ("write", 2048, 4096), ("write", 4096, 4096), ("verify", 4096, 4096)]


def test_pipelined_commands_are_answered_in_order_after_half_close(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        digest = sha(DATA)
        w.jobs.expect(Script(JobKind.FLASH, "motor1", digest, {}, STEPS, result={"changed": True}))
        c = await w.connect()
        await c.say(
            f"PUT {len(DATA)} {digest} name=app.bin\n".encode() + DATA + b"FLASH motor1 app.bin wait=1\nPING\nQUIT\nPING\n"
        )
        c.writer.write_eof()
        replies = [parse_reply(x) for x in (await c.rest()).splitlines()]
        final = [r.code for r in replies if r.code != 150]
        assert final == [354, 250, 250, 250, 221]
        assert 150 in [r.code for r in replies]

    run(tmp_path, body)


@pytest.mark.parametrize(
    "first",
    [
        b"GET / HTTP/1.1\r\nHost: gw:7100\r\n\r\n",
        b"POST /jobs HTTP/1.1\r\n\r\nFLASH motor1 app.bin\r\n",
        b"PUT /x HTTP/1.1\r\n\r\n",
        b"OPTIONS * HTTP/1.0\r\n",
        b"Host: gw\r\nID motor1\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(64)),
        b"SSH-2.0-OpenSSH_9.2\r\n",
    ],
)
def test_other_protocols_get_one_clear_line_and_are_never_obeyed(tmp_path: Path, first: bytes) -> None:
    async def body(w: World) -> None:
        c = await w.connect()
        await c.say(first + b"ID motor1\n")
        reply = parse_reply(await c.rest())
        assert (reply.code, reply.text) == (500, "FOREIGN_PROTOCOL")
        assert not w.jobs.submissions

    run(tmp_path, body)


def test_a_line_without_end_is_refused_as_soon_as_it_is_too_long(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        c = await w.connect()
        await c.say(b"P" * 1024)
        assert parse_reply(await c.rest()).code == 500
        c = await w.connect()
        await c.say(b"PING " + b" " * (1024 - 6) + b"\n")
        assert (await c.reply()).text == "PONG"

    run(tmp_path, body)


def test_a_cut_off_line_is_never_carried_out(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        c = await w.connect()
        await c.say(b"PING\nID motor1")
        c.writer.write_eof()
        replies = [parse_reply(x) for x in (await c.rest()).splitlines()]
        assert [(r.code, r.text) for r in replies] == [(250, "PONG"), (500, "BAD_REQUEST")]
        assert not w.jobs.submissions

    run(tmp_path, body)


def test_rubbish_is_answered_line_by_line_and_closed_after_a_while(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        c = await w.connect()
        await c.say(b"\xff\x00\n\x80 x\n" * 100)
        replies = [parse_reply(x) for x in (await c.rest()).splitlines()]
        assert [r.code for r in replies] == [501] * LIMITS.mistakes + [429]
        assert (await (await w.connect()).ask("PING")).text == "PONG"

    run(tmp_path, body)


def test_idle_clients_are_closed_also_within_a_put(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        silent, stalled = await w.connect(), await w.connect()
        await stalled.say(f"PUT {len(DATA)} {sha(DATA)}\n".encode() + DATA[:10])
        assert (await stalled.reply()).code == 354
        assert parse_reply(await silent.rest()).code == 421
        assert parse_reply(await stalled.rest()).text == "IDLE"

    run(tmp_path, body, Limits(idle_timeout_s=0.5, linger_s=0.05))


def test_a_slow_reader_is_closed_and_holds_up_nobody(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        data = bytes(2 << 20)
        w.store.add(data, "big")
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", w.port))
        sock.sendall(b"GET big\n" * 20)  # 40 MiB that nobody fetches
        other = await w.connect()
        for _ in range(20):
            assert (await asyncio.wait_for(other.ask("PING"), 5)).text == "PONG"
        other.writer.close()
        await w.settle()
        sock.close()

    run(tmp_path, body, Limits(drain_timeout_s=0.3, linger_s=0.05, write_buffer_bytes=16384))


def test_two_hundred_connections_and_the_limit(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        clients = await asyncio.gather(*(w.connect() for _ in range(200)))
        replies = await asyncio.gather(*(c.ask("PING") for c in clients))
        assert [r.text for r in replies] == ["PONG"] * 200
        refused = await w.connect(greeting=False)
        reply = parse_reply(await refused.rest())
        assert (reply.code, reply.text) == (429, "TOO_MANY")
        for c in clients:
            c.writer.close()
        await w.settle()
        await w.connect()

    run(tmp_path, body, Limits(connections=200, linger_s=0.2))


def test_stop_tells_everybody_and_ends(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        w.jobs.expect(Script(JobKind.IDENTIFY, "motor1", "", {}, STEPS, gate=asyncio.Event()))
        idle, waiting, silent = await w.connect(), await w.connect(), await w.connect()
        await waiting.say("ID motor1 wait=1")
        assert (await waiting.reply()).code == 150
        silent.writer.write_eof()
        await asyncio.wait_for(w.server.stop(), 5)
        assert parse_reply(await idle.rest()).code == 421
        last = parse_reply((await waiting.rest()).splitlines()[-1])
        assert (last.code, last.text) == (421, "STOPPED")
        with pytest.raises(ConnectionRefusedError):
            await w.connect()
        assert not w.jobs.get("j1").terminal

    run(tmp_path, body, Limits(linger_s=0.1))
