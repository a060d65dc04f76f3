"""`bridged console`, `lock` and `unlock` as processes, against the real line server and console of a target on a pty."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import re
import subprocess
import sys
import termios
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from bridged.api.line import LineServer
from bridged.api.line_link import Limits
from bridged.cli.exits import Exit
from bridged.client import Client, Gateway, LinkLost
from bridged.config.values import Listen
from tests.api.fakes import FakeJobs, WatchedStore
from tests.console.rig import Bench, bench


class Site:
    def __init__(self, b: Bench, server: LineServer, port: int) -> None:
        self.b, self.server, self.port = b, server, port

    def argv(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "bridged", "-g", f"127.0.0.1:{self.port}", "--retry-for", "5", *words]

    async def run(self, *words: str, said: bytes = b"") -> tuple[int, bytes, str]:
        """A command to its end, without a terminal."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*self.argv(*words), stdin=pipe, stdout=pipe, stderr=pipe)
        out, err = await process.communicate(said)
        assert process.returncode is not None
        return process.returncode, out, err.decode()


@contextlib.asynccontextmanager
async def site(root: Path) -> AsyncIterator[Site]:
    async with bench(root) as b:
        store = WatchedStore(root)
        jobs = FakeJobs(store)
        server = LineServer(jobs, store, "gw1", Limits(linger_s=0.1), consoles={"bench": b.console})
        try:
            yield Site(b, server, await server.listen_tcp(Listen("127.0.0.1", 0)))
        finally:
            await server.stop()
            await jobs.close()


def play(root: Path, act: Callable[[Site], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), site(root) as found:
            await act(found)

    asyncio.run(main())


class Terminal:
    """A command on a terminal of its own, and the person at it."""

    def __init__(self, argv: list[str]) -> None:
        self.master, slave = pty.openpty()
        self.before = termios.tcgetattr(slave)
        self.process = subprocess.Popen(argv, stdin=slave, stdout=slave, stderr=slave)
        self.slave = slave
        self.seen = b""
        os.set_blocking(self.master, False)

    async def see(self, text: bytes, within_s: float = 20.0) -> None:
        async with asyncio.timeout(within_s):
            while text not in self.seen:
                with contextlib.suppress(BlockingIOError):
                    self.seen += os.read(self.master, 4096)
                await asyncio.sleep(0.005)

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    async def ended(self, within_s: float = 20.0) -> int:
        return await asyncio.to_thread(self.process.wait, within_s)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


def test_a_person_at_a_terminal(tmp_path: Path) -> None:
    async def act(s: Site) -> None:
        terminal = Terminal(s.argv("console", "bench"))
        try:
            await terminal.see(b"Ctrl-] leaves")
            await s.b.until(lambda: s.b.console.seats)
            await s.b.say(b"boot> ")
            await terminal.see(b"boot> ")
            # Ctrl-C and Ctrl-D are keys of the target's; a key comes without waiting for the line.
            terminal.type(b"v\x03\x04\r")
            assert await s.b.hear(4) == b"v\x03\x04\r"
            assert terminal.seen.endswith(b"boot> "), "nothing is echoed here"
            terminal.type(b"q\x1dnever sent")
            assert await terminal.ended() == Exit.DONE
            assert await s.b.hear(1) == b"q"
            assert termios.tcgetattr(terminal.slave) == terminal.before, "the terminal is as it was"
            await asyncio.sleep(0.05)
            assert s.b.heard_now() == b"", "what came behind the key that leaves"
        finally:
            terminal.close()

    play(tmp_path, act)


def test_who_only_looks_on_types_nothing(tmp_path: Path) -> None:
    async def act(s: Site) -> None:
        terminal = Terminal(s.argv("console", "bench", "--read-only"))
        try:
            await terminal.see(b"Ctrl-] leaves")
            await s.b.until(lambda: s.b.console.seats)
            terminal.type(b"x")
            await s.b.say(b"tick\r\n")
            await terminal.see(b"tick")
            terminal.type(b"\x1d")
            assert await terminal.ended() == Exit.DONE
            assert s.b.heard_now() == b""
        finally:
            terminal.close()

    play(tmp_path, act)


def test_a_script_asks_and_waits_for_the_answer(tmp_path: Path) -> None:
    async def answer(s: Site) -> None:
        assert await s.b.hear(8, 20) == b"version\n"
        await s.b.say(b"1.")
        await asyncio.sleep(0.05)  # The answer comes in pieces.
        await s.b.say(b"2.3\r\nand more")

    async def act(s: Site) -> None:
        asked = s.run("console", "bench", "--until", r"\d\.\d\.\d\r\n", "--within", "20", said=b"version\n")
        (code, out, err), _ = await asyncio.gather(asked, answer(s))
        assert (code, err) == (Exit.DONE, "")
        assert out.startswith(b"1.2.3\r\n")

    play(tmp_path, act)


def test_what_is_not_said_in_time_and_the_time_alone(tmp_path: Path) -> None:
    async def act(s: Site) -> None:
        code, _, err = await s.run("console", "bench", "--until", "ready", "--within", "0.3")
        assert code == Exit.TIMED_OUT
        assert "bench did not say 'ready' within 0.3 s" in err
        assert (await s.run("console", "bench", "--within", "0.1"))[0] == Exit.DONE
        assert (await s.run("console", "bench", "--until", "("))[0] == Exit.USAGE
        code, _, err = await s.run("console", "nobody", "--within", "0.1")
        assert code == Exit.NO_TARGET
        assert "UNKNOWN_TARGET" in err

    play(tmp_path, act)


def test_the_past_comes_first_where_it_is_asked_for(tmp_path: Path) -> None:
    async def act(s: Site) -> None:
        await s.b.say(b"said long ago\r\n")
        await s.b.until(lambda: s.b.console.history.tail(15) == b"said long ago\r\n")
        code, out, _ = await s.run("console", "bench", "--replay", "5", "--until", "ago\r\n", "--within", "20")
        assert (code, out) == (Exit.DONE, b"ago\r\n")

    play(tmp_path, act)


def test_a_gateway_that_comes_back_is_asked_again_and_nothing_is_shown_twice(tmp_path: Path) -> None:
    async def act(s: Site) -> None:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *s.argv("console", "bench", "--until", "second"), stdin=pipe, stdout=pipe, stderr=pipe
        )
        await s.b.until(lambda: s.b.console.seats, 20)
        await s.b.say(b"first ")
        assert process.stdout is not None
        assert await process.stdout.readexactly(6) == b"first "
        await s.server.stop()
        await s.b.until(lambda: not s.b.console.seats)
        again = LineServer(
            s.server.shared.jobs, s.server.shared.store, "gw1", Limits(linger_s=0.1), consoles={"bench": s.b.console}
        )
        await again.listen_tcp(Listen("127.0.0.1", s.port))
        try:
            await s.b.until(lambda: s.b.console.seats, 20)
            await s.b.say(b"second")
            out, err = await process.communicate()
        finally:
            await again.stop()
        assert out == b"second"
        assert b"connection lost" in err
        assert process.returncode == Exit.DONE

    play(tmp_path, act)


def test_a_lock_keeps_others_from_typing(tmp_path: Path) -> None:
    async def act(s: Site) -> None:
        code, out, _ = await s.run("lock", "bench", "--ttl", "900", "--note", "measuring")
        assert (code, out) == (Exit.DONE, b"bench is locked for local, for 15.0 min\n")
        assert (await s.run("unlock", "bench"))[1] == b"bench is free again\n"
        assert (await s.run("unlock", "bench"))[1] == b"bench was not locked\n"

    play(tmp_path, act)


@pytest.mark.parametrize("size", [1, 65536, 300_000])
def test_the_client_of_programs(tmp_path: Path, size: int) -> None:
    data = bytes(range(256)) * (size // 256 + 1)

    def talk(port: int) -> bytes:
        with Client(Gateway.find(f"127.0.0.1:{port}", {}), retry_s=1) as client:
            assert client.lock("bench", 60)["owner"] == "local"
            with client.console("bench", replay=0) as console:
                console.write(b"go")
                found = b""
                deadline = time.monotonic() + 20
                while len(found) < size and time.monotonic() < deadline:
                    found += console.read()
            client.unlock("bench")
            assert re.fullmatch("free|idle|.*", client.targets()[0]["state"])  # The client itself goes on.
            return found

    async def act(s: Site) -> None:
        found, _ = await asyncio.gather(asyncio.to_thread(talk, s.port), answer(s))
        assert found == data[:size]

    async def answer(s: Site) -> None:
        assert await s.b.hear(2, 20) == b"go"
        await s.b.say(data[:size])

    play(tmp_path, act)


def test_the_end_of_the_connection_is_an_error_of_the_link(tmp_path: Path) -> None:
    def wait(port: int) -> str:
        with (
            Client(Gateway.find(f"127.0.0.1:{port}", {}), retry_s=1) as client,
            client.console("bench", write=False) as console,
        ):
            deadline = time.monotonic() + 20
            try:
                while time.monotonic() < deadline:
                    console.read()
            except LinkLost as lost:
                return str(lost)
        return "nothing was noticed"

    async def act(s: Site) -> None:
        async def stop() -> None:
            await s.b.until(lambda: s.b.console.seats, 20)
            await s.server.stop()

        said, _ = await asyncio.gather(asyncio.to_thread(wait, s.port), stop())
        assert said == "the gateway closed the connection"

    play(tmp_path, act)
