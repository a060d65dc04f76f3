"""The raw console on a pty: bytes both ways, one writer, history, slow readers, hotplug, locks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import tty
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from bridged import errors
from bridged.api import entrance
from bridged.config.file import InvalidConfig, load
from bridged.config.values import listeners
from bridged.console import room, server
from bridged.console.server import Admission
from tests.console.rig import Bench, bench


def play(root: Path, act: Callable[[Bench], Awaitable[None]], **settings: Any) -> None:
    async def main() -> None:
        async with asyncio.timeout(30), bench(root, **settings) as found:
            await act(found)

    asyncio.run(main())


def test_bytes_go_both_ways_unchanged(tmp_path: Path) -> None:
    every = bytes(range(256)) * 3

    async def act(b: Bench) -> None:
        client = await b.connect()
        await b.until(lambda: b.console.seats)
        await b.say(every)
        assert await client.take(len(every)) == every
        client.say(every)
        assert await b.hear(len(every)) == every
        figures = b.console.figures()
        assert (figures.bytes_in, figures.bytes_out, figures.dropped_bytes) == (768, 768, 0)
        assert (figures.readers, figures.writers) == (0, 1)
        await client.close()
        await b.until(lambda: not b.console.seats)
        assert b.target.leases.holder is None

    play(tmp_path, act)


def test_many_read_one_writes_and_the_other_is_told(tmp_path: Path) -> None:
    async def act(b: Bench) -> None:
        one, two = await b.connect(), await b.connect()
        await b.until(lambda: len(b.console.seats) == 2)
        one.say(b"first")
        assert await b.hear(5) == b"first"
        two.say(b"second")
        said = await two.expect(b"]\r\n")
        assert b"not sent: Writing: here#1 writes on its console" in said
        assert b.heard_now() == b""
        assert b.console.figures().dropped_bytes == 6
        await b.say(b"both hear this")
        for client in (one, two):
            assert await client.take(14) == b"both hear this"
        await one.close()
        await b.until(lambda: len(b.console.seats) == 1)
        two.say(b"now")
        assert await b.hear(3) == b"now"

    play(tmp_path, act)


def test_a_silent_writer_makes_way(tmp_path: Path) -> None:
    async def act(b: Bench) -> None:
        one, two = await b.connect(), await b.connect()
        one.say(b"a")
        await b.hear(1)
        await asyncio.sleep(0.15)
        two.say(b"b")
        assert await b.hear(1) == b"b"

    play(tmp_path, act, writer_idle_s=0.1)


def test_who_comes_late_gets_the_end_of_the_history(tmp_path: Path) -> None:
    async def act(b: Bench) -> None:
        await b.say(b"x" * 3000 + b"the end")
        await b.until(lambda: b.console.bytes_in == 3007)
        client = await b.connect()
        assert await client.take(1024) == b"x" * 1017 + b"the end"
        await b.say(b", and more")
        assert await client.take(10) == b", and more"

    play(tmp_path, act, replay_kib=1)


def test_a_reader_that_stalls_loses_bytes_alone_and_hears_how_many(tmp_path: Path) -> None:
    piece = bytes(range(32, 127)) * 40

    async def act(b: Bench) -> None:
        good = await b.connect()
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(raw, ("127.0.0.1", b.port))
        await b.until(lambda: len(b.console.seats) == 2)
        # How much the kernel takes for it in between is not known here; what counts is ours.
        sent = 0
        while not any(seat.lost for seat in b.console.seats):
            await b.say(piece)
            assert await good.take(len(piece)) == piece
            sent += len(piece)
            assert sent < 64 << 20
        stalled = next(seat for seat in b.console.seats if seat.lost)
        assert stalled.sink.unread() <= b.console.buffer_bytes
        await b.say(piece)
        assert await good.take(len(piece)) == piece
        lost = b.console.figures().dropped_bytes
        assert lost >= len(piece)
        # It reads again: first what was kept, then how many bytes are missing, then what comes.
        got = bytearray()

        async def read() -> None:
            while True:
                got.extend(await loop.sock_recv(raw, 1 << 16))

        reading = asyncio.ensure_future(read())
        await b.until(lambda: stalled.sink.unread() == 0)
        await b.say(b"<on again>")
        await b.until(lambda: got.endswith(b"<on again>"))
        reading.cancel()
        raw.close()
        kept, _, rest = bytes(got).partition(b"\r\n[bridged: ")
        assert rest == f"{lost} bytes were lost here: this client did not keep up]\r\n<on again>".encode()
        assert kept == (piece * (sent // len(piece) + 1))[: len(kept)], "what it got is without a gap"
        assert len(kept) + lost == sent + len(piece)

    play(tmp_path, act, buffer_kib=16)


def test_a_reader_that_never_comes_back_is_thrown_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "STALL_S", 0.05)

    async def act(b: Bench) -> None:
        raw = socket.create_connection(("127.0.0.1", b.port))
        await b.until(lambda: b.console.seats)
        deadline = asyncio.get_running_loop().time() + 20
        while b.console.seats:
            await b.say(b"x" * 4000)
            assert asyncio.get_running_loop().time() < deadline
        raw.close()

    play(tmp_path, act, buffer_kib=16)


def test_a_writer_that_is_faster_than_the_port_is_held_and_loses_nothing(tmp_path: Path) -> None:
    data = bytes(range(256)) * 8192

    async def act(b: Bench) -> None:
        client = await b.connect()
        client.say(data)
        await b.until(lambda: b.target.congested)  # Nobody takes it off the port: a pty holds some KiB.
        assert b.console.bytes_out < 1 << 20
        assert await b.hear(len(data), 20) == data
        assert b.console.figures().dropped_bytes == 0

    play(tmp_path, act)


def test_the_device_may_come_late_and_vanish_and_return(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def act(b: Bench) -> None:
        client = await b.connect()
        client.say(b"too early")
        await client.expect(b"[bridged: not sent: the target is absent: ")
        for _ in range(2):
            master, slave = os.openpty()
            tty.setraw(slave)
            os.set_blocking(master, False)
            b.link.unlink(missing_ok=True)
            b.link.symlink_to(os.ttyname(slave))
            await client.expect(b"[bridged: the port is back]\r\n")
            os.write(master, b"hello")
            assert await client.expect(b"hello") == b"hello"
            b.link.unlink()
            os.close(slave)
            os.close(master)
            client.say(b"typed while it goes")
            await client.expect(b"tty vanished]\r\n")
        assert b.console.seats, "the client is there still"

    play(tmp_path, act, present=False)
    assert "Traceback" not in caplog.text


def test_what_is_said_after_the_clients_end_of_input_still_arrives(tmp_path: Path) -> None:
    async def act(b: Bench) -> None:
        client = await b.connect()
        client.say(b"version\n")
        client.writer.write_eof()
        assert await b.hear(8) == b"version\n"
        await b.say(b"1.2.3\n")
        assert await client.ended() == b"1.2.3\n"
        await b.until(lambda: not b.console.seats)

    play(tmp_path, act)


@pytest.mark.parametrize("protocol", ["raw", "rfc2217"])
def test_a_web_page_types_nothing(tmp_path: Path, protocol: str) -> None:
    """A browser lets any page ask any port of its machine, to which ``ssh -L`` may lead, and the body is as the page likes."""

    async def act(b: Bench) -> None:
        noted: list[tuple[str, ...]] = []
        b.console.record = lambda *words: noted.append(words)
        rest = b"\r\nHost: localhost\r\n\r\nreboot\r\n"
        long = b"x" * 300_000  # More than is read at once.
        lines = (b"GET / HTTP/1.1", b"OPTIONS * HTTP/2.0", b"POST /" + long + b" HTTP/1.1", b"RE-BOOT" + long + b" / HTTP/1.1")
        for line in lines:
            page = await b.connect()
            page.say(line + rest)
            with contextlib.suppress(ConnectionError):
                await page.ended()
            await page.close()
        await b.until(lambda: not b.console.seats)
        refused = ("console write", "bench", "FOREIGN_PROTOCOL")
        assert [(words[2], words[3], words[4]) for words in noted if "HTTP" in words] == [refused] * len(lines)
        assert b.heard_now() == b""
        person = await b.connect()
        person.say(b"GET / please\n")
        assert await b.hear(13) == b"GET / please\n"
        person.say(b"GET / HTTP/1.1\n")
        assert await b.hear(15) == b"GET / HTTP/1.1\n", "only the first words are looked at"
        await person.close()
        await b.until(lambda: not b.console.seats)
        program = await b.connect()
        program.say(b"3A" * 1000)
        assert await b.hear(2000) == b"3A" * 1000

    play(tmp_path, act, protocol=protocol, replay_kib=0)


def test_rights_and_limits_of_clients(tmp_path: Path) -> None:
    others = [Admission(f"other-{n}", "x") for n in range(room.RESERVED_SEATS + 1)]
    writer = Admission("writer", "x")
    rights = [Admission("reader", "x", write=False), Admission("nobody", "x", read=False), writer, writer, *others]

    async def act(b: Bench) -> None:
        reader, nobody, writer, again, *others, late = [await b.connect() for _ in range(len(rights))]
        assert b"nobody has no right to this target" in await nobody.ended()
        assert b"2 clients are at the console of bench, which is the limit" in await again.ended()
        # Whoever has all the seats keeps nobody else out, and a crowd of others is bounded, too.
        assert b"which is the limit" in await late.ended()
        await b.until(lambda: len(b.console.seats) == 2 + len(others))
        reader.say(b"no")
        assert b"came to read only" in await reader.expect(b"]\r\n")
        writer.say(b"yes")
        assert await b.hear(3) == b"yes"

    play(tmp_path, act, clients=2, admit=lambda _info, _target: rights.pop(0))


def test_a_lock_keeps_others_from_writing_and_runs_out(tmp_path: Path) -> None:
    names = ["ann", "bob"]

    async def act(b: Bench) -> None:
        ann, bob = await b.connect(), await b.connect()
        await b.until(lambda: len(b.console.seats) == 2)
        bob.say(b"b")
        await b.hear(1)
        await b.console.lock("ann", 60, "measuring", right=False)
        bob.say(b"b")
        assert b"ann has locked it (measuring)" in await bob.expect(b"]\r\n")
        ann.say(b"a")
        assert await b.hear(1) == b"a"
        with pytest.raises(errors.TargetBusy) as refused:
            await b.console.lock("bob", 60, "", right=False)
        assert refused.value.facts["owner"] == "ann"
        with pytest.raises(errors.TargetBusy):
            await b.console.unlock("bob", right=False)
        await b.console.lock("bob", 0.05, "", right=True)
        holder = b.console.holder
        assert holder is not None
        assert (holder.kind, holder.holder) == ("lock", "bob")
        await b.until(lambda: b.target.leases.lock is None)
        ann.say(b"a")
        assert await b.hear(1) == b"a"
        assert not await b.console.unlock("ann", right=False)

    play(tmp_path, act, admit=lambda _info, _target: Admission(names.pop(0), "x"))


def test_half_open_clients_are_found_by_the_kernel(tmp_path: Path) -> None:
    async def act(b: Bench) -> None:
        client = await b.connect()
        await b.until(lambda: b.console.seats)
        sink = b.console.seats[0].sink
        assert isinstance(sink, server.Raw)
        sock = sink._transport.get_extra_info("socket")
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == entrance.KEEPALIVE_IDLE_S
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000
        await client.close()

    play(tmp_path, act)


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "192.0.2.1:7200", "plaintext:192.0.2.1:7200", "tls:192.0.2.1:7200"])
def test_nothing_beyond_loopback_can_be_bound_where_nobody_can_show_a_certificate(tmp_path: Path, listen: str) -> None:
    async def act(b: Bench) -> None:
        with pytest.raises(errors.NotAllowed, match=r"needs TLS and that: set tls\.certificate, tls\.key and tls\.client_ca"):
            await b.listeners.listen_tcp(listeners(listen)[0])
        with socket.socket() as everywhere:
            everywhere.bind(("0.0.0.0", 0))
            with pytest.raises(errors.NotAllowed, match="needs TLS and that"):
                await b.listeners.listen_socket(everywhere, "plaintext")

    play(tmp_path, act)
    text = f'[targets.a]\nport = "/dev/x"\n[targets.a.console]\nlisten = "127.0.0.1:7201 {listen}"\n'
    for tls in ("", '[tls]\ncertificate = "/c"\nkey = "/k"\n'):
        with pytest.raises(InvalidConfig, match=r"needs TLS and that: .*client_ca.*CONSOLE of the line protocol") as found:
            load(tls + text)
        assert [(m.key, m.line) for m in found.value.errors] == [("targets.a.console.listen", (tls + text).count("\n"))]
    allowed = f'[tls]\ncertificate = "/c"\nkey = "/k"\nclient_ca = "/a"\n{text}'
    if "plaintext" in listen:
        with pytest.raises(InvalidConfig, match="client certificate only"):
            load(allowed)
    else:
        load(allowed)
