"""Jobs over the line server: submit, wait, watch, cancel, the log and the recording."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from bridged.api import line_jobs
from bridged.api.line_link import Limits
from bridged.errors import (
    BridgedError,
    NoSync,
    PortBusy,
    QueueFull,
    VerifyError,
)
from bridged.jobs.model import JobKind, JobState
from bridged.protocol.reply import parse_reply
from tests.api.fakes import Script
from tests.api.line_bench import Client, World, run

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
