"""Submitting and canceling: what is taken, under which id, and what can be taken back when."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from bridged.errors import (
    BadRequest,
    BridgedError,
    IdempotencyConflict,
    NotCancellable,
    QueueFull,
    SessionDied,
    TooLarge,
    UnknownImage,
    UnknownJob,
    UnknownTarget,
)
from bridged.jobs.model import JobKind, JobState, Submission
from tests.jobs.bench import (
    FIRMWARE_FILE,
    TIMEOUT_S,
    Bench,
    Script,
    run,
)

DIED = SessionDied("killed")


# --- submitting ------------------------------------------------------------------------------------------------------


def test_the_same_id_is_the_same_job(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            first, second = await asyncio.gather(
                bench.submit(id="order-1", addr=1 << 27), bench.submit(id="order-1", addr=1 << 27)
            )
            assert first.id == second.id
            done = await bench.end(first)
            assert (await bench.submit(id="order-1", addr=1 << 27)) == done
            with pytest.raises(IdempotencyConflict):
                await bench.submit(id="order-1", addr=1)
            with pytest.raises(IdempotencyConflict):
                await bench.submit(id="order-1", kind=JobKind.ENSURE, addr=1 << 27)
        async with Bench(tmp_path) as bench:
            assert (await bench.submit(id="order-1", addr=1 << 27)) == done
            del bench.store.images[FIRMWARE_FILE]
            gone = Submission(JobKind.FLASH, "m1", FIRMWARE_FILE, {"addr": 1 << 27}, "order-1")
            assert (await bench.jobs.submit(gone)) == done, "also when the image has gone since"
            with pytest.raises(UnknownImage):
                await bench.jobs.submit(replace(gone, id="order-2"))
            assert bench["m1"].runs == []

    run(work)


@pytest.mark.parametrize(
    ("sub", "error"),
    [
        (Submission(JobKind.FLASH, "nobody", FIRMWARE_FILE), UnknownTarget),
        (Submission(JobKind.FLASH, "m1", "nothing"), UnknownImage),
        (Submission(JobKind.FLASH, "m1"), BadRequest),
        (Submission(JobKind.RESET, "m1", FIRMWARE_FILE), BadRequest),
        (Submission(JobKind.RESET, "m1", params={"x": object()}), BadRequest),
        (Submission(JobKind.RESET, "m1", params={"x": float("nan")}), BadRequest),
        (Submission(JobKind.RESET, "m1", params={"x": "y" * 20000}), BadRequest),
        (Submission(JobKind.RESET, "m1", id="x" * 200), BadRequest),
        (Submission(JobKind.READ, "m1", params={"address": 0, "length": (16 << 20) + 1}), TooLarge),
        (Submission(JobKind.READ, "m1", params={"address": 0xFFFFFFF0, "length": 17}), BadRequest),
        (Submission(JobKind.READ, "m1", params={"address": "0", "length": 1}), BadRequest),
        (Submission(JobKind.RESET, "m1", id="a\nb"), BadRequest),
    ],
)
def test_what_is_not_accepted(tmp_path: Path, sub: Submission, error: type[BridgedError]) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            with pytest.raises(error):
                await bench.jobs.submit(sub)
            assert bench.jobs.list() == []

    run(work)


def test_the_queue_is_bounded_and_in_order(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path, queue_limit=3) as bench:
            bench["m1"].scripts = [Script(hold_at="lock")]
            running = await bench.submit()
            await bench["m1"].at("lock").wait()
            waiting = [await bench.submit() for _ in range(3)]
            with pytest.raises(QueueFull):
                await bench.submit()
            assert bench.jobs.info("m1")["queued"] == 3
            assert bench.jobs.info("m1")["owner"] == running.id
            assert bench.jobs.info("m1")["state"] == "busy"
            bench["m1"].go.set()
            await bench.end(waiting[-1])
            assert [r.job for r in bench["m1"].runs] == [j.id for j in (running, *waiting)]
            assert [j.id for j in bench.jobs.list()] == [j.id for j in reversed((running, *waiting))]
            assert [j.id for j in bench.jobs.list(limit=1)] == [waiting[-1].id]
            pages = [bench.jobs.list(limit=2)]
            while pages[-1]:
                pages.append(bench.jobs.list(limit=2, before=pages[-1][-1].id))
            assert [j.id for page in pages for j in page] == [j.id for j in reversed((running, *waiting))]
            with pytest.raises(UnknownJob):
                bench.jobs.list(before="0" * 12)
            with pytest.raises(UnknownTarget):
                bench.jobs.list(target="m9")
            assert bench.jobs.list(target="m1", limit=0) == []
            assert len(bench.jobs.list(target="m1", state=JobState.SUCCEEDED)) == 4
            assert bench.jobs.list(state=JobState.QUEUED) == []

    run(work)


def test_a_client_who_goes_away_leaves_its_job_behind(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            loop, committed = asyncio.get_running_loop(), asyncio.Event()

            def on_commit() -> None:
                loop.call_soon_threadsafe(committed.set)
                found.wait(TIMEOUT_S)

            found = threading.Event()
            bench.journal.on_commit = on_commit
            asking = asyncio.ensure_future(bench.submit(id="order-1"))
            await committed.wait()  # On disk, and the service does not know it yet.
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            (known,) = bench.jobs.list()
            waiting = asyncio.ensure_future(bench.jobs.wait(known.id))
            again = asyncio.ensure_future(bench.submit(id="order-1"))
            await asyncio.wait([waiting, again], timeout=0.05)
            assert not waiting.done(), "a job that is about to be queued has not ended"
            found.set()
            job = await again
            assert (await waiting).state is JobState.SUCCEEDED
            assert (await bench.end(job)).state is JobState.SUCCEEDED
            assert len(bench.jobs.list()) == 1
            assert len(bench["m1"].runs) == 1

    run(work)


def test_unknown_jobs_and_targets(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            with pytest.raises(UnknownJob):
                bench.jobs.get("nobody")
            with pytest.raises(UnknownJob):
                bench.jobs.log("nobody")
            with pytest.raises(UnknownJob):
                bench.jobs.watch("nobody")
            with pytest.raises(UnknownJob):
                await bench.jobs.cancel("nobody")
            with pytest.raises(UnknownJob):
                await bench.jobs.wait("nobody")
            with pytest.raises(UnknownTarget):
                bench.jobs.info("nobody")
            with pytest.raises(UnknownTarget):
                bench.jobs.watch(target="nobody")
            assert [t["name"] for t in bench.jobs.targets()] == ["m1"]

    run(work)


# --- canceling -------------------------------------------------------------------------------------------------------


def test_cancel_before_the_erase_and_in_the_queue(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            bench["m1"].scripts = [Script(hold_at="identify")]
            first, second, third = [await bench.submit() for _ in range(3)]
            await bench["m1"].at("identify").wait()
            assert (await bench.jobs.cancel(second.id)).state is JobState.CANCELED
            assert (await bench.jobs.cancel(first.id)).state is JobState.RUNNING
            assert (await bench.end(first)).state is JobState.CANCELED
            assert (await bench.end(third)).state is JobState.SUCCEEDED
            assert [r.job for r in bench["m1"].runs] == [first.id, third.id]
            assert (await bench.jobs.cancel(first.id)).state is JobState.CANCELED
            with pytest.raises(NotCancellable, match="ended as succeeded"):
                await bench.jobs.cancel(third.id)

    run(work)


def test_between_erase_and_proof_only_force_cancels(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            bench["m1"].scripts = [Script(hold_at="erased")]
            job = await bench.submit()
            await bench["m1"].at("erased").wait()
            with pytest.raises(NotCancellable):
                await bench.jobs.cancel(job.id)
            assert bench.jobs.get(job.id).touched
            await bench.jobs.cancel(job.id, force=True)
            assert (await bench.end(job)).state is JobState.CANCELED
            assert bench.jobs.info("m1")["content"] == ""

    run(work)


def test_a_canceled_job_whose_session_dies_is_not_resumed(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            bench["m1"].scripts = [Script(hold_at="erasing", fail_at="erasing", error=DIED)]
            job = await bench.submit()
            await bench["m1"].at("erasing").wait()
            bench["m1"].set_state("absent", "unplugged")
            await bench.jobs.cancel(job.id, force=True)
            assert (await bench.end(job)).state is JobState.CANCELED, "and not when the target comes back, some day"
            assert len(bench["m1"].runs) == 1

    run(work)


def test_a_cancel_that_comes_just_before_the_barrier_prevents_the_erase(tmp_path: Path) -> None:
    """The session is past its last checkpoint: the barrier is what refuses."""

    async def work() -> None:
        async with Bench(tmp_path) as bench:
            target = bench["m1"]
            target.scripts = [Script(hold_at="before-erase")]
            job = await bench.submit()
            await target.at("before-erase").wait()
            live = bench.jobs._book.live[job.id]
            live.cancel = True  # As if the request had been made while the session's message was on its way.
            target.go.set()
            done = await bench.end(job)
            assert (done.state, done.touched) == (JobState.CANCELED, False)
            assert not target.at("erasing").is_set()

    run(work)
