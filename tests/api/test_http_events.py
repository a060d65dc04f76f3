"""Event streams: what comes first, what is replayed, when they end, and that they are bounded."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import aiohttp

from bridged.api.http_call import Limits
from bridged.api.http_events import RECENT_LIMIT, Recent
from bridged.errors import NoSync
from bridged.jobs.model import Job, JobKind, JobState, Update
from tests.api.fakes import Script
from tests.api.http_bench import Bench, run

RESET = {"kind": "reset"}


async def submit(bench: Bench, *, target: str = "motor1", **more: Any) -> str:
    bench.jobs.expect(Script(JobKind.RESET, target, **more))
    _, _, job = await bench.ask("POST", f"/v1/targets/{target}/jobs", json=RESET)
    return str(job["job"])


def test_a_job_is_followed_to_its_end(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        gate = asyncio.Event()
        job = await submit(bench, steps=[("sync", 0, 0), ("write", 10, 100), ("write", 50, 100)], mere_progress=True, gate=gate)
        async with bench.stream(f"/v1/jobs/{job}/events") as stream:
            gate.set()
            events = await stream.events()
        assert [e.name for e in events[-2:]] == ["job", "end"]
        assert events[-1].data["state"] == "succeeded"
        updates = [e for e in events if e.name == "job"]
        assert all(e.id == str(e.data["seq"]) for e in updates)
        assert updates[-1].data["state"] == "succeeded"
        numbers = [int(e.id) for e in updates]
        assert numbers == sorted(numbers)
        # Who has the last event is told not to come back.
        status, _, _ = await bench.ask("GET", f"/v1/jobs/{job}/events", headers={"Last-Event-ID": events[-1].id})
        assert status == 204

    run(tmp_path, body)


def test_who_comes_back_misses_nothing(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        gate = asyncio.Event()
        job = await submit(bench, steps=[("sync", 0, 0), ("erase", 0, 0), ("write", 9, 100)], gate=gate)
        async with asyncio.timeout(5):
            while bench.jobs.jobs[job].phase != "write":
                await asyncio.sleep(0)
        async with bench.stream(f"/v1/jobs/{job}/events", last="3") as stream:
            seen = [await stream.event() for _ in range(3)]
            assert [e.data["phase"] for e in seen if e] == ["erase", "write", "write"]
            assert [e.id for e in seen if e] == ["4", "5", "5"]
            async with bench.stream(f"/v1/jobs/{job}/events", last="9" * 40) as ahead:
                gate.set()
                assert [e.name for e in await ahead.events()][-2:] == ["job", "end"], "an id that is none of ours hangs nobody"
            rest = await stream.events()
            assert [e.name for e in rest] == ["job", "end"]

    run(tmp_path, body)


def test_a_job_that_has_ended_is_told_at_once(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        job = await submit(bench, at_once=True, end=JobState.FAILED, error=NoSync("silence"))
        async with bench.stream(f"/v1/jobs/{job}/events") as stream:
            events = await stream.events()
        assert [e.name for e in events] == ["job", "end"]
        assert events[-1].data["problem"]["code"] == "NO_SYNC"

    run(tmp_path, body)


def test_everything_and_one_target(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        async with bench.stream("/v1/events") as every, bench.stream("/v1/targets/motor2/events") as second:
            first = [await every.event() for _ in range(2)]
            assert [(e.name, e.data["target"]) for e in first if e] == [("target", "motor1"), ("target", "motor2")]
            shown = await second.event()
            assert shown is not None
            assert shown.data["target"] == "motor2"
            one = await submit(bench, at_once=True)
            two = await submit(bench, target="motor2", at_once=True)
            jobs = [await every.event() for _ in range(4)]
            assert [(e.data["job"], e.data["state"]) for e in jobs if e] == [
                (one, "queued"),
                (one, "succeeded"),
                (two, "queued"),
                (two, "succeeded"),
            ]
            only = [await second.event() for _ in range(2)]
            assert [e.data["job"] for e in only if e] == [two, two]
            bench.jobs.states["motor2"] = "absent"
            bench.server.events.recent.targets_changed()
            for stream in (every, second):
                changed = await stream.event()
                assert changed is not None
                assert (changed.name, changed.data["target"], changed.data["state"]) == ("target", "motor2", "absent")

    run(tmp_path, body)


def test_the_stream_of_everything_goes_on_where_it_was(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        async with bench.stream("/v1/events") as stream:
            await submit(bench, at_once=True)
            seen = [e for e in [await stream.event() for _ in range(4)] if e and e.name == "job"]
        missed = await submit(bench, target="motor2", at_once=True)
        async with bench.stream("/v1/events", last=seen[-1].id) as stream:
            found = [await stream.event() for _ in range(2)]
            assert [(e.data["job"], e.data["state"]) for e in found if e] == [(missed, "queued"), (missed, "succeeded")]
        async with bench.stream("/v1/targets/motor1/events", last=seen[-1].id) as stream:
            event = await stream.event()
            assert event is not None
            assert event.name == "target", "the other target's job is not of this stream"
        async with bench.stream("/v1/events", last="0badc0de.1") as stream:
            event = await stream.event()
            assert event is not None
            assert event.name == "reset"
        assert await bench.problem("GET", "/v1/events", headers={"Last-Event-ID": "a b"}) == (400, "BAD_REQUEST")

    run(tmp_path, body)


def test_a_heartbeat_and_readers_that_go(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        job = await submit(bench, gate=asyncio.Event())
        async with bench.stream(f"/v1/jobs/{job}/events") as stream:
            names = [(e.name if e else "") for e in [await stream.event() for _ in range(3)]]
            assert names == ["job", "comment", "comment"]
            stream.response.close()
        async with asyncio.timeout(5):
            while bench.jobs.watchers:
                await asyncio.sleep(0.01)

    run(tmp_path, body, Limits(heartbeat_s=0.1))


def test_a_reader_who_goes_is_noticed_before_the_next_heartbeat(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        async with bench.stream("/v1/events") as stream:
            await stream.event()
            stream.response.close()
        async with asyncio.timeout(5):
            while bench.jobs.watchers:
                await asyncio.sleep(0.01)

    run(tmp_path, body)


def test_streams_are_counted(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        async with bench.stream("/v1/events"), bench.stream("/v1/events"):
            status, headers, told = await bench.ask("GET", "/v1/events")
            assert (status, told["code"]) == (429, "TOO_MANY")
            assert headers["Retry-After"]
        await bench.settle_streams()
        async with bench.stream("/v1/events"):
            pass

    run(tmp_path, body, Limits(streams_each=2))


def test_a_stream_ends_with_the_daemon(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        async with bench.stream("/v1/events") as stream:
            await stream.event()
            await asyncio.wait_for(bench.server.stop(0.2), 5)
            ended = False
            with contextlib.suppress(aiohttp.ClientError):
                while await stream.event() is not None:
                    pass  # What was on its way.
                ended = True
            assert ended or stream.response.closed or stream.response.content.exception()

    run(tmp_path, body)


def test_recent_updates_are_bounded() -> None:
    recent = Recent()
    job = Job("j", JobKind.RESET, "motor1", JobState.RUNNING, 0, "", "", {}, "", 0.0)

    def update(seq: int) -> Update:
        return Update("j", "motor1", seq, 0.0, JobState.RUNNING, "", 0, 0)

    for seq in range(2 * RECENT_LIMIT):
        recent.note(job, update(seq))
        recent.note(job, update(seq))  # mere progress
    ids = recent.id_of(update(2 * RECENT_LIMIT - 1))
    assert ids == f"{recent.life}.{2 * RECENT_LIMIT}"
    assert recent.since(ids) == []
    assert recent.since(f"{recent.life}.1") is None
    found = recent.since(f"{recent.life}.{RECENT_LIMIT}")
    assert found is not None
    assert [u.seq for u in found] == list(range(RECENT_LIMIT, 2 * RECENT_LIMIT))
    assert recent.since(f"{recent.life}.{3 * RECENT_LIMIT}") is None
    assert recent.since("nonsense") is None
    assert len(recent._numbers) == len(recent._updates) == RECENT_LIMIT
