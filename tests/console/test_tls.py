"""Console ports in TLS: who has shown which certificate may do what, with openssl, socat and pyserial as the other side.

Everybody here comes from loopback, where nobody has a right without a certificate (``auth.loopback = []``): as from elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import serial  # type: ignore[import-untyped]

from bridged import config
from bridged.api import consoles, handshakes
from bridged.api.auth import Authority
from bridged.api.entrance import Entrance
from bridged.api.tls import Tls
from bridged.jobs.journal import Journal
from bridged.jobs.records import AuditEntry
from bridged.protocol.verbs import Scope
from tests.console.rig import Bench, Client, bench
from tests.support import require_tool
from tests.test_client import Certificates, taken_at

EVERY = bytes(range(256))


@dataclass
class Site:
    bench: Bench
    authority: Authority
    certificates: Certificates
    root: Path

    async def somebody(self, name: str, scope: Scope = Scope.CONSOLE, targets: tuple[str, ...] = ()) -> tuple[Path, Path]:
        """Certificate and key of one who has rights."""
        await self.authority.grant(name, [scope], targets, certificate=f"{name}.example")
        return self.certificates.make(f"{name}.example")

    def socat(self, shown: tuple[Path, Path]) -> str:
        """The address of this port, for socat."""
        certificate, key = shown
        options = f"cert={certificate},key={key},cafile={self.root}/ca.pem,commonname=gw.example"
        return f"OPENSSL:127.0.0.1:{self.bench.port},{options}"

    async def connect(self, shown: tuple[Path, Path] | None = None) -> Client:
        context = ssl.create_default_context(cafile=str(self.root / "ca.pem"))
        if shown is not None:
            context.load_cert_chain(*shown)
        where = ("127.0.0.1", self.bench.port)
        return Client(*await asyncio.open_connection(*where, ssl=context, server_hostname="gw.example"))

    async def audit(self, what: str = "console") -> list[AuditEntry]:
        """Oldest first."""
        return [entry for entry in reversed(await self.authority.audit(100)) if entry.what.startswith(what)]


@contextlib.asynccontextmanager
async def site(root: Path, **settings: Any) -> AsyncIterator[Site]:
    certificates = Certificates(root)
    certificate, key = certificates.make("gw.example")
    tls = Tls(config.Tls(str(certificate), str(key), client_ca=str(root / "ca.pem")))
    journal = Journal.open(root / "state.db")
    authority = Authority(config.Auth(loopback=[]), journal)
    try:
        admit = partial(consoles.admission, authority)
        async with bench(root, admit=admit, tls=tls, listen="tls:127.0.0.1:0", **settings) as found:
            found.console.record = partial(consoles.record, authority)
            yield Site(found, authority, certificates, root)
    finally:
        journal.close()


def play(root: Path, act: Callable[[Site], Awaitable[None]], **settings: Any) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), site(root, **settings) as found:
            await act(found)

    asyncio.run(main())


def test_openssl_types_and_is_closed_when_its_certificate_loses_its_rights(tmp_path: Path) -> None:
    require_tool("openssl", "openssl")

    async def act(s: Site) -> None:
        certificate, key = await s.somebody("ann")
        openssl = await asyncio.create_subprocess_exec(
            *("openssl", "s_client", "-quiet", "-verify_return_error", "-verify_hostname", "gw.example"),
            *("-connect", f"127.0.0.1:{s.bench.port}", "-CAfile", str(tmp_path / "ca.pem")),
            *("-cert", str(certificate), "-key", str(key)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert openssl.stdin is not None
        assert openssl.stdout is not None
        openssl.stdin.write(b"version\n")
        assert await s.bench.hear(8, 20) == b"version\n"
        await s.bench.say(b"1.2.3\r\n")
        assert await openssl.stdout.readline() == b"1.2.3\r\n"
        await s.authority.revoke("ann")
        openssl.stdin.write(b"and more")
        assert b"the credential of this connection does not count any more" in await openssl.stdout.read()
        openssl.stdin.close()
        await openssl.wait()
        await s.bench.until(lambda: not s.bench.console.seats)
        assert s.bench.target.leases.holder is None

    play(tmp_path, act)


def test_who_may_what_is_as_on_the_line_protocol_and_the_audit_log_has_it(tmp_path: Path) -> None:
    async def act(s: Site) -> None:
        nobody = await s.connect()
        assert b"a client certificate is missing (bridged token add NAME --certificate WHO" in await nobody.ended()
        stranger = await s.connect(s.certificates.make("stranger.example"))
        assert b"a client certificate was not given any rights" in await stranger.ended()
        assert await s.audit() == [], "whoever only knocks fills no log"
        elsewhere = await s.connect(await s.somebody("else", targets=("other",)))
        assert b"cert-else has no right to this target" in await elsewhere.ended()

        ann = await s.connect(await s.somebody("ann"))
        bob = await s.connect(await s.somebody("bob", Scope.READ, ("bench",)))
        await s.bench.until(lambda: len(s.bench.console.seats) == 2)
        await s.bench.say(b"both")
        for client in (ann, bob):
            assert await client.take(4) == b"both"
        ann.say(b"secret")
        assert await s.bench.hear(6) == b"secret"
        for _ in range(2):
            bob.say(b"no")
            await asyncio.sleep(0)
        assert b"came to read only" in await bob.expect(b"]\r\n")
        await ann.close()
        await s.bench.until(lambda: len(s.bench.console.seats) == 1)

        said = await s.audit()
        words = [(e.who, e.what, e.result, e.detail.partition(" ")[0]) for e in said]
        assert words == [
            ("cert-else", "console", "NOT_ALLOWED", ""),
            ("cert-ann", "console", "ok", "rw"),
            ("cert-bob", "console", "ok", "ro"),
            ("cert-ann", "console write", "ok", "as"),
            ("cert-bob", "console write", "TARGET_BUSY", "came"),
            ("cert-ann", "console end", "ok", said[-1].source + "#1"),
        ]
        assert {e.target for e in said} == {"bench"}
        assert all(e.source.startswith("127.0.0.1:") for e in said)
        assert said[-1].detail.endswith(" s, 6 bytes sent")
        assert "secret" not in str(said)
        await bob.close()

    play(tmp_path, act)


def test_a_certificate_of_another_authority_or_an_expired_one_gets_nowhere(tmp_path: Path) -> None:
    async def act(s: Site) -> None:
        await s.somebody("ann")
        (tmp_path / "evil").mkdir()
        evil = Certificates(tmp_path / "evil").make("ann.example")
        expired = s.certificates.make("ann.example", days=-1)
        for shown in (evil, expired):
            client = await s.connect(shown)  # In TLS 1.3 the client is done before it is looked at.
            client.say(b"x")
            with contextlib.suppress(ssl.SSLError, ConnectionError):
                assert await client.ended() == b""
        reader, writer = await asyncio.open_connection("127.0.0.1", s.bench.port)
        writer.write(b"in plain text\n")
        assert b"bridged" not in await reader.read()
        writer.close()
        assert s.bench.heard_now() == b""
        assert await s.audit() == []

    play(tmp_path, act)


def test_socat_makes_a_serial_device_of_it(tmp_path: Path) -> None:
    require_tool("socat", "socat")

    async def act(s: Site) -> None:
        link = tmp_path / "pty"
        socat = subprocess.Popen(["socat", f"pty,link={link},raw,echo=0", s.socat(await s.somebody("ann"))])
        try:
            await s.bench.until(lambda: link.exists() and s.bench.console.seats, 20)
            port = os.open(link, os.O_RDWR | os.O_NOCTTY)
            os.write(port, EVERY)
            assert await s.bench.hear(256) == EVERY
            await s.bench.say(EVERY)
            got = b""
            while len(got) < 256:
                got += await asyncio.to_thread(os.read, port, 256)
            assert got == EVERY
            os.close(port)
        finally:
            socat.terminate()
            socat.wait(10)

    play(tmp_path, act, replay_kib=0)


def test_pyserial_controls_the_port_through_a_tunnel(tmp_path: Path) -> None:
    """pyserial's RFC 2217 knows no TLS: socat has the certificate, and stands where stunnel would."""
    require_tool("socat", "socat")

    def use(port: int) -> bytes:
        with serial.serial_for_url(f"rfc2217://127.0.0.1:{port}?timeout=10", baudrate=57600, timeout=10) as found:
            found.write(EVERY)
            got: bytes = found.read(256)
            found.baudrate = 115200
            found.rts = False
            return got

    async def act(s: Site) -> None:
        tunnel = await asyncio.create_subprocess_exec(
            *("socat", "-d", "-d", "TCP-LISTEN:0,bind=127.0.0.1", s.socat(await s.somebody("ann"))), stderr=subprocess.PIPE
        )
        assert tunnel.stderr is not None
        try:
            while b"listening on" not in (line := await tunnel.stderr.readline()):
                assert line, "socat ended"
            using = asyncio.create_task(asyncio.to_thread(use, int(line.rpartition(b":")[2])))
            assert await s.bench.hear(256, 20) == EVERY
            assert s.bench.target.frame.baud == 57600
            await s.bench.say(EVERY)
            assert await using == EVERY
        finally:
            with contextlib.suppress(ProcessLookupError):
                tunnel.terminate()
            await tunnel.communicate()
        await s.bench.until(lambda: not s.bench.console.seats)

    play(tmp_path, act, protocol="rfc2217", replay_kib=0)


def test_handshakes_are_bounded_and_who_is_turned_away_is_counted_until_it_is_gone(tmp_path: Path) -> None:
    async def act(s: Site) -> None:
        entrance = s.bench.listeners._entrance
        assert isinstance(entrance, Entrance)
        pending = entrance.handshakes
        shown = await s.somebody("ann")
        ann = await s.connect(shown)
        await s.bench.until(lambda: s.bench.console.seats)
        assert len(pending) == 0, "who has a seat is counted by the console"
        stranger = await s.connect()
        assert b"is missing" in await stranger.expect(b"]\r\n")
        assert len(pending) <= 1
        silent = [await asyncio.open_connection("127.0.0.1", s.bench.port) for _ in range(100)]
        ended = [asyncio.ensure_future(reader.read()) for reader, _ in silent]
        await s.bench.until(lambda: sum(task.done() for task in ended) + len(pending) >= 100, 10)
        assert 0 < len(pending) <= 4 * handshakes.PENDING_EACH
        assert taken_at(s.bench.port) <= 4 * handshakes.PENDING_EACH + 2
        await s.bench.say(b"!")
        assert await ann.take(1) == b"!", "who is there already notices nothing"
        for _, writer in silent:
            writer.close()
        await asyncio.gather(*ended, return_exceptions=True)
        await s.bench.until(lambda: len(pending) == 0)
        again = await s.connect(shown)
        await s.bench.until(lambda: len(s.bench.console.seats) == 2)
        for client in (ann, stranger, again):
            await client.close()

    play(tmp_path, act)


def test_a_slow_reader_is_bounded_and_a_fast_writer_held_in_tls_too(tmp_path: Path) -> None:
    piece = EVERY * 16

    async def act(s: Site) -> None:
        shown = await s.somebody("ann")
        slow, ann = await s.connect(shown), await s.connect(shown)
        await s.bench.until(lambda: len(s.bench.console.seats) == 2)
        slow.writer.transport.pause_reading()  # type: ignore[attr-defined]
        while not any(seat.lost for seat in s.bench.console.seats):
            await s.bench.say(piece)
            assert await ann.take(len(piece)) == piece
            assert s.bench.console.bytes_in < 64 << 20
        seat = next(seat for seat in s.bench.console.seats if seat.lost)
        assert seat.sink.unread() <= s.bench.console.buffer_bytes
        data = EVERY * 2048
        ann.say(data)
        assert await s.bench.hear(len(data), 20) == data
        slow.writer.transport.abort()
        await ann.close()

    play(tmp_path, act, buffer_kib=16)
