"""The line server over real sockets, with strict stand-ins behind it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import shutil
import socket
import stat
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from bridged import __version__
from bridged.api import line_jobs
from bridged.api.auth import check_loopback, is_loopback
from bridged.api.line import LineServer
from bridged.api.line_link import Limits
from bridged.config.values import Listen
from bridged.errors import (
    BridgedError,
    ConfigError,
    NoSync,
    NotAllowed,
    PortBusy,
    QueueFull,
    StorageFull,
    VerifyError,
)
from bridged.jobs.model import JobKind, JobState
from bridged.protocol.reply import Reply, parse_reply
from tests.api.fakes import FakeJobs, Script, WatchedStore

LIMITS = Limits(image_bytes=2 << 20, connections=250, idle_timeout_s=20, linger_s=1.0)


class Client:
    """A client that reads whole replies and never hangs."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def line(self) -> bytes:
        return await asyncio.wait_for(self.reader.readline(), 10)

    async def reply(self) -> Reply:
        """One reply line, which must be well-formed."""
        found = await self.line()
        assert found.endswith(b"\n"), found
        return parse_reply(found)

    async def replies(self) -> list[Reply]:
        """Up to and with the last line of one answer."""
        found = [await self.reply()]
        while found[-1].more:
            found.append(await self.reply())
        return found

    async def say(self, text: str | bytes) -> None:
        self.writer.write(text if isinstance(text, bytes) else text.encode() + b"\n")
        await self.writer.drain()

    async def ask(self, text: str) -> Reply:
        await self.say(text)
        return (await self.replies())[-1]

    async def rest(self) -> bytes:
        return await asyncio.wait_for(self.reader.read(), 10)


@dataclass
class World:
    server: LineServer
    jobs: FakeJobs
    store: WatchedStore
    port: int
    uploads: list[tuple[int, bool]]

    async def connect(self, greeting: bool = True) -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port))
        if greeting:
            assert (await client.reply()).code == 220
        return client

    async def settle(self) -> None:
        """Until no connection is left: whatever a vanished client had started is over then."""
        async with asyncio.timeout(10):
            while self.server.connections:
                await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def world(root: Path, limits: Limits = LIMITS) -> AsyncIterator[World]:
    store = WatchedStore(root)
    jobs = FakeJobs(store)
    uploads: list[tuple[int, bool]] = []
    server = LineServer(jobs, store, "gw1", limits, lambda count, resumed: uploads.append((count, resumed)))
    port = await server.listen_tcp(Listen("127.0.0.1", 0))
    try:
        yield World(server, jobs, store, port, uploads)
    finally:
        await server.stop()
        await jobs.close()
        assert not jobs.surprises
        assert not jobs.scripts, "a job that was expected has not been asked for"
        assert store.open == 0, "an upload was left open"
        assert not jobs.watchers, "a watcher was left behind"


def run(root: Path, body: Callable[[World], Coroutine[Any, Any, None]], limits: Limits = LIMITS) -> None:
    async def main() -> None:
        async with world(root, limits) as w:
            await body(w)

    asyncio.run(main())


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- talk ---------------------------------------------------------------------------------------------------------


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


# --- jobs ---------------------------------------------------------------------------------------------------------

DATA = b"firmware" * 512
LONG = [("write", done, 100_000) for done in range(0, 100_001, 1000)]
STEPS = [("sync", 0, 0), ("write", 2048, 4096), ("write", 4096, 4096), ("verify", 4096, 4096)]


@pytest.mark.parametrize(("form", "lines"), [("text", 3), ("json", 3 + 100)])
def test_people_are_told_of_progress_now_and_then_and_programs_always(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, lines: int
) -> None:
    monkeypatch.setattr(line_jobs, "TEXT_PROGRESS_S", 1e9)

    async def body(w: World) -> None:
        digest = w.store.add(DATA)
        w.jobs.expect(Script(JobKind.VERIFY, "motor1", digest, {}, LONG, mere_progress=True))
        c = await w.connect()
        await c.say(f"HELLO proto=1 format={form}")
        await c.line()
        await c.say(f"VERIFY motor1 {digest} wait=1")
        told = [await c.line()]
        while b"150" in told[-1]:
            told.append(await c.line())
        assert b"250" in told[-1]
        assert len(told) == 1 + lines, "queued, the phase, the end; and between them what took longer than a second"

    run(tmp_path, body)


def test_flash_with_wait_streams_progress_and_ends_with_the_final_code(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        digest = w.store.add(DATA, "app.bin")
        params = {
            "patch": "0x08000010:00aa,0x08000020:ff",
            "type": "bin",
            "outside": "discard",
            "entry": "one-shot",
            "force": "vectors",
            "mode": "full",
        }
        result = {
            "changed": True,
            "evidence": "full",
            "content": "ab" * 32,
            "seconds": 1.5,
            "phases": {"write": {"seconds": 1.0}},
        }
        image = f"{digest}@0x08000000"
        w.jobs.expect(Script(JobKind.FLASH, "motor1", image, params, STEPS, result=result))
        c = await w.connect()
        options = "addr=0x08000000 patch=0x08000020:FF,134217744:00aa type=bin outside=discard entry=one-shot"
        options += " force=vectors mode=full verify=full id=x1 wait=1"
        await c.say(f"FLASH motor1 app.bin {options}")
        *progress, last = await c.replies()
        assert {r.code for r in progress} == {150}
        assert [r.data["phase"] for r in progress if "phase" in r.data][-1] == "verify"
        seqs = [int(r.data["seq"]) for r in progress]
        assert seqs == sorted(seqs)
        assert (last.code, last.data["state"], last.data["evidence"]) == (250, "succeeded", "full")
        assert last.data["phases.write.seconds"] == "1"
        assert (await c.ask(f"STATUS {last.data['job']}")).data["image"] == f"sha256:{image}"
        # The same request with the same id finds the same job, ended as it is; another one is refused.
        again = await c.ask(f"FLASH motor1 app.bin {options}")
        assert (again.code, again.data["job"]) == (250, last.data["job"])
        other = await c.ask("FLASH motor1 app.bin id=x1")
        assert (other.code, other.text) == (409, "ID_CONFLICT")

    run(tmp_path, body)


@pytest.mark.parametrize(
    ("end", "error", "code", "name"),
    [
        (JobState.FAILED, NoSync("0x7F sent 3 times at 115200 8E1: no byte came", attempts=3), 450, "NO_SYNC"),
        (JobState.FAILED, VerifyError("0x08000010: expected 12, found FF", address=0x08000010), 554, "VERIFY_MISMATCH"),
        (JobState.FAILED, PortBusy("/dev/ttyUSB0 is held by process 7"), 400, "PORT_BUSY"),
        (JobState.FAILED, None, 451, "INTERNAL"),
        (JobState.CANCELED, None, 400, "CANCELED"),
        (JobState.TIMED_OUT, None, 400, "DEADLINE_EXCEEDED"),
        (JobState.REJECTED, None, 550, "NOT_ALLOWED"),
        (JobState.ROLLED_BACK, VerifyError("the new image differed"), 554, "VERIFY_MISMATCH"),
    ],
)
def test_how_a_job_can_end(tmp_path: Path, end: JobState, error: BridgedError | None, code: int, name: str) -> None:
    async def body(w: World) -> None:
        digest = w.store.add(DATA)
        w.jobs.expect(Script(JobKind.VERIFY, "motor1", digest, {}, STEPS, end=end, error=error))
        c = await w.connect()
        last = await c.ask(f"VERIFY motor1 {digest} wait=1")
        assert (last.code, last.text, last.data["state"]) == (code, name, end)
        assert last.data["job"] == "j1"
        assert last.data["remedy"]
        if error is not None:
            assert last.data["message"] == error.message
            assert {k for k in last.data if k.startswith("fact.")} == {f"fact.{k}" for k in error.facts}
        assert (await c.ask("WAIT j1")).code == code
        assert (await c.ask("WATCH j1")).code == code

    run(tmp_path, body)


def test_ensure_that_is_true_already_says_251_with_its_evidence(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        digest = w.store.add(DATA, "app.elf")
        result = {"changed": False, "evidence": "record", "age_s": 12.0}
        w.jobs.expect(Script(JobKind.ENSURE, "motor2", digest, {}, result=result, at_once=True))
        w.jobs.expect(Script(JobKind.ENSURE, "motor2", digest, {}, STEPS, result=result))
        c = await w.connect()
        reply = await c.ask("ENSURE motor2 app.elf")
        assert (reply.code, reply.data["evidence"], reply.data["age_s"]) == (251, "record", "12")
        assert (await c.ask("ENSURE motor2 app.elf wait=1")).code == 251

    run(tmp_path, body)


def test_every_kind_of_job_reaches_the_service_with_its_parameters(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        read = {"address": 0x08000000, "length": 65536}
        w.jobs.expect(
            Script(JobKind.READ, "motor1", "", read),
            Script(JobKind.ERASE, "motor1", "", {"address": 0x08008000, "length": 32768}),
            Script(JobKind.ERASE, "motor1", "", {"address": 0, "length": 0, "entry": "one-shot"}),
            Script(JobKind.RESET, "motor2", "", {"mode": "boot"}),
            Script(JobKind.IDENTIFY, "motor2", "", {"trace": True}),
        )
        c = await w.connect()
        assert (await c.ask("READ motor1 0x08000000 64K")).data["kind"] == "read"
        assert (await c.ask("ERASE motor1 0x08008000+0x8000")).data["state"] == "queued"
        assert (await c.ask("ERASE motor1 all entry=one-shot wait=1")).code == 250
        assert (await c.ask("RESET motor2 mode=boot")).code == 250
        assert (await c.ask("ID motor2 trace=1 wait=1")).data["state"] == "succeeded"
        assert {s.principal for s in w.jobs.submissions} == {"local"}
        await c.say("JOBS target=motor1 limit=2")
        rows = await c.replies()
        assert [r.data.get("job") for r in rows] == ["j3", "j2", None]
        assert rows[-1].data["jobs"] == "2"
        await c.say("JOBS state=SUCCEEDED")
        assert len(await c.replies()) == 6

    run(tmp_path, body)


def test_status_log_info_plan(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        digest = w.store.add(DATA, "app.bin")
        w.jobs.expect(Script(JobKind.FLASH, "motor1", digest, {}, STEPS, result={"changed": True}))
        c = await w.connect()
        await c.ask("FLASH motor1 app.bin wait=1")
        status = await c.ask("STATUS j1")
        assert (status.data["state"], status.data["image"], status.data["created"]) == (
            "succeeded",
            f"sha256:{digest}",
            "2023-11-14T22:13:20.000Z",
        )
        await c.say("LOG j1")
        entries = await c.replies()
        assert entries[-1].data["entries"] == str(len(entries) - 1) == "6"
        await c.say(f"LOG j1 from={entries[2].data['seq']}")
        assert (await c.replies())[0] == entries[2]
        await c.say("INFO motor1")
        info = await c.replies()
        assert {"chip": "F756"} in [dict(r.data) for r in info]
        await c.say("PLAN motor1 app.bin outside=discard")
        *sectors, total = await c.replies()
        assert [(s.text, s.data.get("start") or s.data["address"]) for s in sectors] == [
            ("part", "0x08000000"),
            ("range", "0x08000000"),
            ("range", "0x08008000"),
            ("range", "0x08010000"),
        ]
        assert (total.data["seconds"], total.data["image"]) == ("9.25", "app.bin")
        assert total.data["params.outside"] == "discard"

    run(tmp_path, body)


def test_cancel(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        digest = w.store.add(DATA, "app.bin")
        w.jobs.expect(Script(JobKind.FLASH, "motor1", digest, {}, [("write", 10, 100)], gate=asyncio.Event()))
        c = await w.connect()
        await c.ask("FLASH motor1 app.bin")
        timeout = await c.ask("WAIT j1 timeout=0.05")
        assert (timeout.code, timeout.data["state"]) == (408, "running")
        assert (await c.ask("CANCEL j1")).code == 409
        forced = await c.ask("CANCEL j1 force=1")
        assert (forced.code, forced.data["state"]) == (250, "canceled")

    run(tmp_path, body)


def test_service_errors_become_replies_and_a_defect_ends_one_connection_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(w: World) -> None:
        c = await w.connect()
        w.jobs.refuse = QueueFull("100 jobs wait for motor1", limit=100)
        reply = await c.ask("ID motor1")
        assert (reply.code, reply.text, reply.data["fact.limit"], reply.data["retryable"]) == (429, "QUEUE_FULL", "100", "1")
        w.jobs.refuse = TypeError("a defect")  # type: ignore[assignment]
        await c.say("ID motor1\nPING")
        assert parse_reply(await c.rest()).text == "INTERNAL"
        assert "a defect" in caplog.text
        assert (await (await w.connect()).ask("PING")).text == "PONG"

    run(tmp_path, body)


def test_watch_a_target_and_everything_until_the_client_leaves(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        w.jobs.expect(Script(JobKind.IDENTIFY, "motor1", "", {}, STEPS), Script(JobKind.IDENTIFY, "motor2", "", {}, STEPS))
        one, all_, submitter = await w.connect(), await w.connect(), await w.connect()
        await one.say("WATCH motor2")
        await all_.say("WATCH *")
        assert (await one.reply()).text == "WATCHING"
        assert (await all_.reply()).text == "WATCHING"
        await submitter.ask("ID motor1 wait=1")
        await submitter.ask("ID motor2 wait=1")

        async def target(client: Client) -> object:
            """Of the next update; signs of life come in between on a busy machine."""
            while (reply := await client.reply()).text == "WATCHING":
                pass
            return reply.data["target"]

        assert [await target(all_) for _ in range(12)] == ["motor1"] * 6 + ["motor2"] * 6
        assert [await target(one) for _ in range(6)] == ["motor2"] * 6
        one.writer.transport.abort()
        all_.writer.close()
        submitter.writer.close()

        async def quiet() -> None:
            while w.jobs.watchers:
                await asyncio.sleep(0.01)

        # The aborted one is noticed at once; the closed one when the next sign of life finds nobody.
        await asyncio.wait_for(quiet(), 5)

    run(tmp_path, body, Limits(heartbeat_s=0.05))


def test_signs_of_life_while_a_job_is_silent(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        gate = asyncio.Event()
        w.jobs.expect(Script(JobKind.IDENTIFY, "motor1", "", {}, [("erase", 0, 0)], gate=gate))
        c = await w.connect()
        await c.say("ID motor1 wait=1")
        seen = [await c.reply() for _ in range(6)]
        assert [r.data["phase"] for r in seen[-3:]] == ["erase"] * 3
        gate.set()
        assert (await c.replies())[-1].code == 250

    run(tmp_path, body, Limits(heartbeat_s=0.02))


def test_a_vanished_watcher_has_no_effect_on_the_job(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        gate = asyncio.Event()
        w.jobs.expect(Script(JobKind.IDENTIFY, "motor1", "", {}, STEPS, gate=gate))
        c = await w.connect()
        await c.say("ID motor1 wait=1")
        assert (await c.reply()).code == 150
        c.writer.transport.abort()
        await w.settle()
        assert w.jobs.get("j1").state is JobState.RUNNING
        gate.set()
        other = await w.connect()
        assert (await other.ask("WAIT j1")).code == 250

    run(tmp_path, body)


# --- uploads ------------------------------------------------------------------------------------------------------


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
        w.store.save_trace("j1", text)
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


# --- hostile and unlucky clients ----------------------------------------------------------------------------------


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

    run(tmp_path, body, Limits(idle_timeout_s=0.1, linger_s=0.05))


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


# --- listening ----------------------------------------------------------------------------------------------------


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


# --- the documented example, with the real nc ---------------------------------------------------------------------


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
