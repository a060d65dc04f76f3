"""Images over the line server: bytes are consumed exactly, what is synced is kept, and GET gives whole files."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from bridged.errors import (
    NoSync,
    StorageFull,
)
from bridged.jobs.model import JobKind, JobState
from bridged.protocol.reply import parse_reply
from tests.api.fakes import Script
from tests.api.line_bench import LIMITS, Client, World, run, sha

DATA = b"firmware" * 512
LONG = [("write", done, 100_000) for done in range(0, 100_001, 1000)]
STEPS = [("sync", 0, 0), ("write", 2048, 4096), ("write", 4096, 4096), ("verify", 4096, 4096)]


def test_put_have_get(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        data = bytes(range(256)) * 4096  # 1 MiB
        c = await w.connect()
        await c.say(f"PUT {len(data)} {sha(data)} name='my app.bin' type=bin".encode() + b"\n" + data)
        assert (await c.reply()).code == 354
        assert (await c.reply()).data == {
            "image": f"sha256:{sha(data)}",
            "size": "1048576",
            "complete": "1",
            "name": "my app.bin",
        }
        have = await c.ask(f"HAVE {sha(data).upper()}")
        assert have.data == {"offset": "1048576", "size": "1048576", "complete": "1"}
        for ref in (sha(data), f"sha256:{sha(data)}", "'my app.bin'"):
            await c.say(f"GET {ref}")
            assert (await c.reply()).data == {"size": "1048576", "sha256": sha(data)}
            assert await asyncio.wait_for(c.reader.readexactly(len(data)), 10) == data
        # It is here already, and yet every byte is consumed: the script after it does not lose step.
        await c.say(f"PUT {len(data)} {sha(data)}\n".encode() + data + b"PING\n")
        assert [(await c.reply()).code for _ in range(3)] == [354, 250, 250]
        assert w.uploads == [(len(data), False)] * 2

    run(tmp_path, body)


def test_a_recording_comes_back_and_is_named_where_it_is_kept(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        text = "    0.000000 # session identify\n    0.000100 > 7F\n    0.150000 < \n" * 3000
        gate = asyncio.Event()
        w.jobs.expect(
            Script(JobKind.IDENTIFY, "motor1", end=JobState.FAILED, error=NoSync("no byte came"), gate=gate),
            Script(JobKind.IDENTIFY, "motor1", end=JobState.SUCCEEDED),
        )
        c = await w.connect()
        await c.ask("ID motor1")
        w.jobs.traces.save("j1", text)
        assert "trace" not in (await c.ask("STATUS j1")).data, "of a run before this one"
        gate.set()
        failed = await c.ask("WAIT j1")
        assert (failed.code, failed.text, failed.data["trace"]) == (450, "NO_SYNC", "j1")
        assert (await c.ask("STATUS j1")).data["trace"] == "j1"
        assert (await c.ask("WATCH j1")).data["trace"] == "j1"
        await c.say("TRACE j1\nPING")
        assert (await c.reply()).data == {"job": "j1", "size": str(len(text))}
        assert await asyncio.wait_for(c.reader.readexactly(len(text)), 10) == text.encode()
        assert (await c.reply()).text == "PONG"
        assert "trace" not in (await c.ask("ID motor1 wait=1")).data
        missing = await c.ask("TRACE j2")
        assert (missing.code, missing.text) == (404, "UNKNOWN_TRACE")
        assert "trace=1" in missing.data["remedy"]
        assert (await c.ask("TRACE j9")).text == "UNKNOWN_JOB"
        assert (await c.ask("TRACE ../../state.db")).text == "UNKNOWN_JOB"
        assert (await c.ask("TRACE")).code == 501

    run(tmp_path, body)


def test_what_a_read_job_read_comes_back(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        result = {"sha256": sha(DATA), "size": len(DATA)}
        w.jobs.expect(Script(JobKind.READ, "motor1", "", {"address": 0, "length": 16}, result=result))
        w.jobs.expect(Script(JobKind.IDENTIFY, "motor1"))
        w.jobs.results["j1"] = tmp_path / "j1.bin"
        w.jobs.results["j1"].write_bytes(DATA)
        c = await w.connect()
        await c.ask("READ motor1 0x0 16 wait=1")
        w.store.add(b"not that", "j1")  # Anybody may call an image so.
        await c.say("GET j1")
        assert (await c.reply()).data == {"size": str(len(DATA)), "sha256": sha(DATA)}
        assert await c.reader.readexactly(len(DATA)) == DATA
        await c.ask("ID motor1 wait=1")
        assert (await c.ask("GET j2")).text == "BAD_REQUEST"

    run(tmp_path, body)


def test_wrong_digest_consumes_the_bytes_and_says_554(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        c = await w.connect()
        await c.say(f"PUT {len(DATA)} {sha(b'other')}\n".encode() + DATA + b"PING\n")
        assert [(r.code, r.text) for r in [await c.reply() for _ in range(3)]] == [
            (354, "SEND"),
            (554, "DIGEST_MISMATCH"),
            (250, "PONG"),
        ]

    run(tmp_path, body)


@pytest.mark.parametrize("options", ["type=uf2", "nmae=x", "name=", "name=a,b", "name=app@0x08000000"])
def test_a_put_with_a_bad_option_still_consumes_its_bytes(tmp_path: Path, options: str) -> None:
    async def body(w: World) -> None:
        c = await w.connect()
        # Were the bytes taken for commands, they would cancel a job.
        data = b"CANCEL j1 force=1\n"
        await c.say(f"PUT {len(data)} {sha(data)} {options}\n".encode() + data + b"PING\n")
        assert [(await c.reply()).code for _ in range(3)] == [354, 501, 250]

    run(tmp_path, body)


def test_a_put_whose_length_is_unknown_closes(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        for line in ("PUT", "PUT x" + "0" * 64, f"PUT 0 {sha(b'')}", f"PUT 4 {sha(b'')} offset=5", f"PUT -1 {sha(b'')}"):
            c = await w.connect()
            await c.say(line + "\nPING")
            assert parse_reply(await c.rest()).code == 501, line

    run(tmp_path, body)


def test_too_big_is_refused_before_a_byte_of_it_is_read(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        c = await w.connect()
        size = LIMITS.image_bytes + 1
        await c.say(f"PUT {size} {sha(b'')}\n".encode() + bytes(300_000))
        reply = parse_reply(await c.rest())
        assert (reply.code, reply.text) == (552, "IMAGE_TOO_LARGE")

    run(tmp_path, body)


def test_a_full_disk_is_said_after_the_bytes(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        w.store.refuse = StorageFull("the store holds 512 of 512 MiB")
        c = await w.connect()
        await c.say(f"PUT {len(DATA)} {sha(DATA)}\n".encode() + DATA + b"PING\n")
        assert [(await c.reply()).code for _ in range(3)] == [354, 452, 250]
        w.store.refuse = None

        def full(count: int) -> None:
            raise StorageFull(f"no space left after {count} bytes")

        w.store.on_write = full
        await c.say(f"PUT {len(DATA)} {sha(DATA)}\n".encode() + DATA + b"PING\n")
        assert [(await c.reply()).code for _ in range(3)] == [354, 452, 250]

    run(tmp_path, body)


def test_a_client_that_vanishes_resumes_where_the_store_has_synced(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        data = bytes(range(251)) * 800
        seen = asyncio.Event()
        loop = asyncio.get_running_loop()
        w.store.on_write = lambda count: loop.call_soon_threadsafe(seen.set) if count >= 100_000 else None
        c = await w.connect()
        await c.say(f"PUT {len(data)} {sha(data)} name=app\n".encode() + data[:100_000])
        await asyncio.wait_for(seen.wait(), 10)
        c.writer.transport.abort()
        await w.settle()
        c = await w.connect()
        have = await c.ask(f"HAVE {sha(data)}")
        assert (have.data["offset"], have.data["complete"]) == ("100000", "0")
        # At any other place it is refused, and the bytes are consumed nevertheless.
        offset = int(have.data["offset"])
        await c.say(f"PUT {len(data)} {sha(data)} offset={offset - 100}\n".encode() + data[offset - 100 :])
        assert (await c.reply()).code == 354
        wrong = await c.reply()
        assert (wrong.code, wrong.data["fact.offset"]) == (501, str(offset))
        await c.say(f"PUT {len(data)} {sha(data)} offset={offset} name=app\n".encode() + data[offset:])
        assert [(await c.reply()).code for _ in range(2)] == [354, 250]
        assert w.uploads[-1] == (len(data) - offset, True)

    run(tmp_path, body)


def test_half_a_put_that_ends_in_half_close_is_told(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        c = await w.connect()
        await c.say(f"PUT {len(DATA)} {sha(DATA)}\n".encode() + DATA[:-1])
        c.writer.write_eof()
        replies = [parse_reply(x) for x in (await c.rest()).splitlines()]
        assert [(r.code, r.text) for r in replies] == [(354, "SEND"), (501, "BAD_REQUEST")]

    run(tmp_path, body)


async def _half_a_put(w: World, data: bytes, count: int) -> Client:
    """A client that has sent ``count`` bytes of ``data``, which the store has taken, and then says nothing more."""
    seen = asyncio.Event()
    loop = asyncio.get_running_loop()
    w.store.on_write = lambda taken: loop.call_soon_threadsafe(seen.set) if taken >= count else None
    client = await w.connect()
    await client.say(f"PUT {len(data)} {sha(data)} name=app\n".encode() + data[:count])
    await asyncio.wait_for(seen.wait(), 10)
    return client


@pytest.mark.parametrize("first", ["HAVE", "PUT"])
def test_a_client_that_comes_back_takes_over_its_silent_upload(tmp_path: Path, first: str) -> None:
    """No FIN and no RST came from the connection that died; the daemon still believes in it."""

    async def body(w: World) -> None:
        data = bytes(range(251)) * 800
        dead = await _half_a_put(w, data, 100_000)
        c = await w.connect()
        if first == "HAVE":
            have = await c.ask(f"HAVE {sha(data)}")
            assert (have.data["offset"], have.data["complete"]) == ("100000", "0")
        await c.say(f"PUT {len(data)} {sha(data)} offset=100000 name=app\n".encode() + data[100_000:])
        assert [(await c.reply()).code for _ in range(2)] == [354, 250]
        told = [parse_reply(x) for x in (await dead.rest()).splitlines()]
        assert [(r.code, r.text) for r in told] == [(354, "SEND"), (421, "IDLE")]
        assert "another connection goes on" in str(told[-1].data["message"])
        assert w.store.get(sha(data)).path.read_bytes() == data

    run(tmp_path, body, replace(LIMITS, takeover_s=0.0))


def test_an_active_upload_is_not_disturbed(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        data = bytes(range(251)) * 800
        active = await _half_a_put(w, data, 100_000)
        c = await w.connect()
        assert (await c.ask(f"HAVE {sha(data)}")).code == 404, "nothing of it was synced yet"
        await c.say(f"PUT {len(data)} {sha(data)}\n".encode() + data)
        assert (await c.reply()).code == 354
        refused = await c.reply()
        assert (refused.code, refused.text) == (429, "TOO_MANY")
        assert 1 <= float(str(refused.data["fact.retry_after_s"])) <= 60
        await active.say(data[100_000:])
        assert [(await active.reply()).code for _ in range(2)] == [354, 250]

    run(tmp_path, body, replace(LIMITS, takeover_s=60.0))


def test_a_principal_does_not_take_over_from_another(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        data = bytes(range(251)) * 800
        path = tmp_path / "line.sock"
        await w.server.listen_unix(path)
        silent = await _half_a_put(w, data, 100_000)
        other = Client(*await asyncio.open_unix_connection(path))
        assert (await other.reply()).code == 220
        assert (await other.ask(f"HAVE {sha(data)}")).code == 404
        await other.say(f"PUT {len(data)} {sha(data)}\n".encode() + data)
        assert [(await other.reply()).code for _ in range(2)] == [354, 250]
        await silent.say(data[100_000:])
        assert [(await silent.reply()).code for _ in range(2)] == [354, 250]

    run(tmp_path, body, replace(LIMITS, takeover_s=0.0))


def test_tcp_finds_clients_that_vanished(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        await w.connect()
        (connection,) = w.server._connections.values()
        sock = connection.writer.get_extra_info("socket")
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        idle, interval, probes = (sock.getsockopt(socket.IPPROTO_TCP, option) for option in options)
        assert idle + interval * probes == 60
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000, (
            "those of a stream, with bytes on their way"
        )

    run(tmp_path, body)


def test_one_that_pipelines_gives_way_after_each_command(tmp_path: Path) -> None:
    """A thousand commands that are all there already are no reason to let others wait for the last of them."""

    async def body(w: World) -> None:
        greedy, other = await w.connect(), await w.connect()
        await greedy.say(b"PING\n" * 5000 + b"QUIT\n")
        assert (await other.ask("PING")).code == 250
        assert not greedy.reader.at_eof()
        before = bytes(greedy.reader._buffer).count(b"PONG")  # type: ignore[attr-defined]
        assert before < 2500, "answered most of them before the one command of the other"
        assert (await greedy.rest()).count(b"PONG") == 5000

    run(tmp_path, body)


def test_a_long_log_comes_in_pieces_and_whole(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        w.jobs.expect(Script(JobKind.IDENTIFY, "motor1"))
        c = await w.connect()
        job = (await c.ask("ID motor1 wait=1")).data["job"]
        template = w.jobs.updates[str(job)][-1]
        w.jobs.updates[str(job)] += [replace(template, seq=template.seq + n) for n in range(1, 1000)]
        everything = w.jobs.updates[str(job)]
        await c.say(f"LOG {job}")
        replies = await c.replies()
        assert len(replies) - 1 == len(everything)
        assert (replies[-1].data["entries"], replies[-1].data["next"]) == (str(len(everything)), str(everything[-1].seq + 1))

    run(tmp_path, body)
