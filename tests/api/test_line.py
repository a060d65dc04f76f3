"""The line server over real sockets: greeting, help, login, listening, and the documented example with the real nc."""

from __future__ import annotations

import asyncio
import shutil
import socket
import stat
from pathlib import Path

import pytest

from bridged import __version__
from bridged.api.auth import check_loopback, is_loopback
from bridged.api.line import LineServer
from bridged.config.values import Listen
from bridged.errors import (
    ConfigError,
    NotAllowed,
)
from bridged.jobs.model import JobKind
from tests.api.fakes import Script
from tests.api.line_bench import Client, World, run, sha

DATA = b"firmware" * 512
LONG = [("write", done, 100_000) for done in range(0, 100_001, 1000)]
STEPS = [("sync", 0, 0), ("write", 2048, 4096), ("write", 4096, 4096), ("verify", 4096, 4096)]


# --- talk ------------------------------------------------------------------------------------------------------------


def test_greeting_and_small_talk(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        c = await w.connect(greeting=False)
        assert await c.line() == f"220 bridged {__version__} gw=gw1 proto=1 auth=none\n".encode()
        await c.say("ping\r")
        assert await c.line() == b"250 PONG\n"
        await c.say("")
        await c.say("  PING")
        assert await c.line() == b"250 PONG\n"
        await c.say("HELP")
        lines = await c.replies()
        assert {r.code for r in lines} == {214}
        assert any("FLASH" in r.text for r in lines)
        assert any(r.text.startswith("AUTH") for r in lines)
        await c.say("HELP flash")
        assert (await c.replies())[0].text.startswith("FLASH <target> <image>")
        assert (await c.ask("HELP FLASSH")).code == 500
        assert (await c.ask("HELLO proto=1")).data["format"] == "text"
        assert (await c.ask("HELLO")).code == 501
        assert (await c.ask("HELLO proto=2")).code == 501
        for verb in ("LOCK motor1", "UNLOCK motor1", "CONSOLE motor1"):
            reply = await c.ask(verb)
            assert (reply.code, reply.text) == (404, "UNKNOWN_TARGET"), "this server has no consoles"
        await c.say("QUIT\nPING")
        assert await c.rest() == b"221 good-bye\n"

    run(tmp_path, body)


def test_json_lines(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        c = await w.connect()
        await c.say("HELLO proto=1 format=json")
        assert (await c.line()).startswith(b'{"code":250,"more":false,')
        await c.say("TARGETS")
        lines = await c.replies()
        assert [r.data.get("target") for r in lines] == ["motor1", "motor2", None]
        assert lines[0].data["queued"] == 0
        error = await c.ask("STATUS nope")
        assert (error.code, error.text, error.data["retryable"]) == (404, "UNKNOWN_JOB", False)
        assert error.data["cause"]
        assert error.data["remedy"]
        assert (await c.ask("HELLO proto=1 format=text")).data["format"] == "text"
        await c.say("PING")
        assert await c.line() == b"250 PONG\n"

    run(tmp_path, body)


@pytest.mark.parametrize(
    ("line", "code", "error", "text"),
    [
        ("FLSH motor1 x", 500, "UNKNOWN_VERB", "did you mean FLASH?"),
        ("FLASH motor1", 501, "BAD_REQUEST", "<image> is missing"),
        ("FLASH motor1 a b", 501, "BAD_REQUEST", "b is one too many"),
        ("FLASH motor1 a wiat=1", 501, "BAD_REQUEST", "did you mean wait?"),
        ("FLASH motor1 a verify=crc", 501, "BAD_REQUEST", "expected full"),
        ("FLASH motor1 a mode=diff", 501, "BAD_REQUEST", "expected full"),
        ("FLASH motor1 a force=vector", 501, "BAD_REQUEST", "did you mean vectors?"),
        ("FLASH motor1 a wait=1 wait=0", 501, "BAD_REQUEST", "twice"),
        ("FLASH motor1 'a", 501, "BAD_REQUEST", "not closed"),
        ("FLASH motor1 nothing.bin", 404, "UNKNOWN_IMAGE", "nothing.bin"),
        ("ID motor9", 404, "UNKNOWN_TARGET", "motor9"),
        ("INFO motor9", 404, "UNKNOWN_TARGET", "motor9"),
        ("STATUS j9", 404, "UNKNOWN_JOB", "j9"),
        ("WAIT j9", 404, "UNKNOWN_JOB", "j9"),
        ("WATCH j9", 404, "UNKNOWN_JOB", "j9"),
        ("CANCEL j9", 404, "UNKNOWN_JOB", "j9"),
        ("LOG j9", 404, "UNKNOWN_JOB", "j9"),
        ("GET j9", 404, "UNKNOWN_JOB", "j9"),
        ("HAVE 1234", 501, "BAD_REQUEST", "64 hexadecimal digits"),
        ("HAVE " + "0" * 64, 404, "UNKNOWN_IMAGE", "nothing of"),
        ("READ motor1 0x08000000 0", 501, "BAD_REQUEST", "number of bytes"),
        ("READ motor1 0x108000000 4", 501, "BAD_REQUEST", "address"),
        ("ERASE motor1 0x08000000", 501, "BAD_REQUEST", "ADDR+LEN"),
        ("JOBS state=done", 501, "BAD_REQUEST", "succeeded"),
        ("PING \x01", 501, "BAD_REQUEST", "0x01"),
    ],
)
def test_every_refusal_is_one_line_with_cause_and_remedy(tmp_path: Path, line: str, code: int, error: str, text: str) -> None:
    async def body(w: World) -> None:
        c = await w.connect()
        await c.say(line)
        (reply,) = await c.replies()
        assert (reply.code, reply.text) == (code, error)
        assert text in reply.data["message"]
        assert reply.data["cause"]
        assert reply.data["remedy"]
        assert (await c.ask("PING")).text == "PONG", "the connection goes on"

    run(tmp_path, body)


# --- listening -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.5", "gw.example", "10.0.0.1"])
def test_nothing_beyond_loopback_can_be_bound(tmp_path: Path, host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(NotAllowed, match="ssh -L"):
        check_loopback(host, "x")

    async def body(w: World) -> None:
        with pytest.raises(NotAllowed, match="without TLS"):
            await w.server.listen_tcp(Listen(host, 0))

    run(tmp_path, body)


def test_a_passed_socket_obeys_the_same_rule(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        with socket.socket() as everywhere:
            everywhere.bind(("0.0.0.0", 0))
            with pytest.raises(NotAllowed):
                await w.server.listen_socket(everywhere)
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        await w.server.listen_socket(sock)
        w.port = sock.getsockname()[1]
        assert (await (await w.connect()).ask("PING")).text == "PONG"

    run(tmp_path, body)


def test_a_port_in_use_is_an_error_of_configuration(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        with pytest.raises(ConfigError, match="in use"):
            await w.server.listen_tcp(Listen("127.0.0.1", w.port))

    run(tmp_path, body)


def test_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "run.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))  # As a daemon that was killed leaves it.

    async def body(w: World) -> None:
        await w.server.listen_unix(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        w.jobs.expect(Script(JobKind.IDENTIFY, "motor1"))
        c = Client(*await asyncio.open_unix_connection(str(path)))
        assert (await c.reply()).code == 220
        assert (await c.ask("ID motor1 wait=1")).code == 250
        assert w.jobs.submissions[0].principal.startswith("uid-")
        other = LineServer(w.jobs, w.store, "other")
        with pytest.raises(ConfigError, match="another daemon answers"):
            await other.listen_unix(path)

    run(tmp_path, body)
    assert not path.exists()


# --- the documented example, with the real nc ------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("nc") is None, reason="nc is missing: apt-get install netcat-openbsd")
def test_the_example_of_the_docs_with_nc(tmp_path: Path) -> None:
    app = tmp_path / "app.bin"
    app.write_bytes(bytes(range(256)) * 2000)
    (tmp_path / "store").mkdir()
    script = (
        '{ printf \'PUT %s %s name=app.bin\\n\' "$(stat -c%s app.bin)" "$(sha256sum <app.bin|cut -c1-64)"; cat app.bin; '
        "printf 'FLASH motor1 app.bin wait=1\\nQUIT\\n'; } | nc -N 127.0.0.1 PORT | while read code rest; do "
        'case $code in 150*) ;; *) echo "$code";; esac; done'
    )

    async def body(w: World) -> None:
        w.jobs.expect(Script(JobKind.FLASH, "motor1", sha(app.read_bytes()), {}, STEPS, result={"changed": True}))
        process = await asyncio.create_subprocess_shell(
            script.replace("PORT", str(w.port)), cwd=tmp_path, stdout=asyncio.subprocess.PIPE
        )
        out, _ = await asyncio.wait_for(process.communicate(), 20)
        assert out.decode().split() == ["220", "354", "250", "250", "221"]

    run(tmp_path / "store", body)
