"""One run of a job over scripted targets: how sessions end, what is known afterwards, what an interruption leads to."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from bridged.errors import (
    BadRequest,
    BridgedError,
    Canceled,
    CorruptImage,
    DeadlineExceeded,
    EntryWouldBeLost,
    LineUnavailable,
    Nack,
    SessionDied,
    Stopped,
    VerifyError,
    WrongChip,
)
from bridged.events import Event, SectorErased
from bridged.jobs.model import JobKind, JobState, Submission
from tests.jobs.bench import (
    FIRMWARE,
    FIRMWARE_FILE,
    KEPT,
    OTHER_FILE,
    SECTORS,
    Bench,
    Script,
    run,
    sectors_of,
)

DIED = SessionDied("killed")


# --- how a session ends ----------------------------------------------------------------------------------------------


def test_a_flash_from_submission_to_proof(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            events: list[Event] = []
            states: list[tuple[JobState, str]] = []
            bench.jobs.on_event.append(lambda _job, event: events.append(event))
            bench.jobs.on_update.append(lambda job, update: states.append((job.state, update.phase)))
            job = await bench.submit(addr=0x08000000)
            assert (job.state, job.image, job.principal) == (JobState.QUEUED, f"{FIRMWARE_FILE}@0x08000000", "tester")
            done = await bench.end(job)
            assert (done.state, done.content, done.attempts, done.touched) == (JobState.SUCCEEDED, FIRMWARE.digest, 1, True)
            assert done.result is not None
            assert done.result["evidence"] == "full"
            assert done.error is None
            assert bench["m1"].runs[0].kind == "flash"
            assert any(isinstance(event, SectorErased) for event in events), "metrics see every event"
            phases = list(dict.fromkeys(phase for state, phase in states if state is JobState.RUNNING))
            assert phases == ["stage", "lock", "identify", "erase", "write", "verify", "boot"]
            assert states[0] == (JobState.QUEUED, "")
            assert states[-1] == (JobState.SUCCEEDED, "boot")
            log = bench.jobs.log(job.id)
            assert [u.seq for u in log] == sorted({u.seq for u in log})
            assert [u.event["event"] for u in log if u.event] == ["Identified", "Planned"]
            assert bench.jobs.log(job.id, log[3].seq) == log[3:]
            info = bench.jobs.info("m1")
            assert (info["content"], info["image"], info["image_name"]) == (FIRMWARE.digest, job.image, "firmware.elf")
            assert (info["uid"], info["pid"], info["evidence"], info["owner"]) == ("0011", 0x449, "full", "")
            assert bench.journal.sessions() == [], "released, and the journal knows"
            assert bench.jobs.pinned() == {FIRMWARE_FILE}

    run(work)


@pytest.mark.parametrize(
    ("error", "at", "state"),
    [
        (Nack("NACK"), "erased", JobState.FAILED),
        (VerifyError("differs"), "proven-2", JobState.FAILED),
        (WrongChip("other chip"), "identify", JobState.REJECTED),
        (EntryWouldBeLost("no BOOT0"), "identify", JobState.REJECTED),
        (WrongChip("changed its mind"), "erased", JobState.FAILED),
        (DeadlineExceeded("too long"), "proven-1", JobState.TIMED_OUT),
        (Canceled("by whom?"), "lock", JobState.CANCELED),
    ],
)
def test_what_an_error_means(tmp_path: Path, error: BridgedError, at: str, state: JobState) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            bench["m1"].scripts = [Script(fail_at=at, error=error)]
            done = await bench.flash()
            assert done.state is state
            assert done.error is not None
            assert (done.error["code"], done.reason) == (error.code, error.code)
            assert done.touched == (at in ("erased", "proven-1", "proven-2"))
            assert bench.jobs.log(done.id)[-1].code == error.code
            kept = bench.jobs.trace_file(done.id) is not None
            assert kept == (not isinstance(error, Canceled)), "the flight recording is kept"
            assert (await bench.flash()).state is JobState.SUCCEEDED, "the next job works"

    run(work)


def test_a_job_without_a_session_has_no_recording_of_another_one(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            assert (await bench.flash()).state is JobState.SUCCEEDED
            assert bench["m1"].last_trace, "a session has recorded something"
            bench.free_bytes = 0
            refused = await bench.flash()
            assert refused.reason == "STORAGE_FULL"
            assert bench.jobs.trace_file(refused.id) is None

    run(work)


def test_a_defect_ends_the_job_and_not_the_daemon(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            bench["m1"].scripts = [Script(fail_at="erased", error=ZeroDivisionError("a defect"))]  # type: ignore[arg-type]
            done = await bench.flash()
            assert done.state is JobState.FAILED
            assert done.error is not None
            assert done.error["code"] == "INTERNAL"
            assert (await bench.flash()).state is JobState.SUCCEEDED

    run(work)


@pytest.mark.parametrize("script", [Script(evidence=""), Script(evidence="sample"), Script(content="0" * 64)])
def test_nothing_succeeds_without_a_full_comparison(tmp_path: Path, script: Script) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            bench["m1"].scripts = [script]
            done = await bench.flash()
            assert done.state is JobState.FAILED
            assert bench.jobs.info("m1")["content"] == ""

    run(work)


def test_an_image_that_cannot_be_loaded_is_rejected_untouched(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            bench.store.load_error = CorruptImage("line 7")
            done = await bench.flash()
            assert (done.state, done.reason) == (JobState.REJECTED, "IMAGE_CORRUPT")
            assert bench["m1"].runs == []

    run(work)


def test_ensure_that_is_already_true(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            bench["m1"].scripts = [Script(changed=False)]
            done = await bench.end(await bench.submit(kind=JobKind.ENSURE))
            assert done.state is JobState.SUCCEEDED
            assert done.result is not None
            assert (done.result["changed"], done.touched) == (False, False)

    run(work)


def test_ensure_by_record_touches_nothing_and_says_what_it_stands_on(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            first = await bench.end(await bench.submit(kind=JobKind.ENSURE, evidence="record"))
            assert first.result is not None
            assert first.result["evidence"] == "full"  # There was no record to answer from.
            assert len(bench["m1"].runs) == 1
            proven = bench.jobs.info("m1")["proven"]
            again = await bench.end(await bench.submit(kind=JobKind.ENSURE, evidence="record"))
            assert (again.state, again.touched) == (JobState.SUCCEEDED, False)
            assert again.result is not None
            assert again.result["evidence"] == "record"
            assert again.result["age_s"] >= 0
            assert again.result["changed"] is False, "which is how every client knows that nothing was to be done"
            assert len(bench["m1"].runs) == 1
            assert bench.jobs.info("m1")["proven"] == proven  # A record does not get younger by being asked.

    run(work)


@pytest.mark.parametrize(("asked", "changed", "state"), [("sample", False, "succeeded"), ("sample", True, "failed"),
                                                         ("full", False, "failed")])  # fmt: skip
def test_a_sample_is_enough_only_where_it_was_asked_for(tmp_path: Path, asked: str, changed: bool, state: str) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            await bench.end(await bench.submit(kind=JobKind.FLASH))
            proven = bench.jobs.info("m1")["proven"]
            bench["m1"].scripts = [Script(evidence="sample", changed=changed)]
            done = await bench.end(await bench.submit(kind=JobKind.ENSURE, evidence=asked))
            assert done.state == state
            assert bench.jobs.info("m1")["proven"] in (proven, 0.0)
            assert bench["m1"].runs[-1].past.content

    run(work)


def test_what_a_flash_proved_is_what_the_next_may_leave_alone(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            await bench.end(await bench.submit(kind=JobKind.FLASH))
            await bench.end(await bench.submit(kind=JobKind.FLASH))
            await bench.end(await bench.submit(kind=JobKind.FLASH, mode="full"))
            first, second, third = (r.past for r in bench["m1"].runs)
            assert first.sectors == ()
            assert set(second.sectors) == set(sectors_of(bench["m1"].runs[0].image))
            assert third.sectors == ()
            bench["m1"].scripts = [Script(fail_at="erased", error=SessionDied("gone"))] * 5
            await bench.end(await bench.submit(kind=JobKind.FLASH))
            await bench.end(await bench.submit(kind=JobKind.FLASH))
            assert bench["m1"].runs[-1].past.sectors == ()  # Nobody knows any more.
            assert bench["m1"].runs[0].past.settled
            await bench.end(await bench.submit(kind=JobKind.FLASH))
            last = bench["m1"].runs[-1].past
            assert last.sectors, "what was proven since is known"
            assert not last.settled, "and what the failed one may have left half erased is not"

    run(work)


def test_a_rate_that_failed_is_known_to_every_job_but_an_examination_which_looks_anew(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            bench["m1"].scripts = [
                Script(baud=115200, bad_bauds=(460800,)),
                Script(fail_at="boot", error=Nack("no"), baud=9600, bad_bauds=(115200,)),
                Script(),
                Script(baud=460800),
            ]
            for kind in (JobKind.FLASH, JobKind.FLASH, JobKind.IDENTIFY, JobKind.DOCTOR, JobKind.VERIFY):
                await bench.end(await bench.submit(kind=kind))
            rates = [(run.past.good_bauds, run.past.bad_bauds) for run in bench["m1"].runs]
            known = (115200,), (460800,)
            assert rates == [((), ()), known, known, ((115200,), ()), ((115200, 460800), ())]

    run(work)


def test_read_keeps_its_bytes_in_a_file(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            done = await bench.end(await bench.submit(kind=JobKind.READ, address=0x08000000, length=16))
            assert done.result is not None
            assert done.result["size"] == 16
            assert "data" not in done.result
            assert bench.jobs.read_result(done.id).read_bytes() == b"\x12\x34" * 8
            reset = await bench.end(await bench.submit(kind=JobKind.RESET))
            with pytest.raises(BadRequest):
                bench.jobs.read_result(reset.id)

    run(work)


# --- what is known of a target ---------------------------------------------------------------------------------------


def test_the_record_is_void_from_the_erase_on_and_when_the_board_is_another(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            await bench.flash()
            bench["m1"].scripts = [
                Script(fail_at="identify", error=Nack("x")),
                Script(fail_at="identify", error=Nack("x"), uid="0022"),
                Script(),
                Script(fail_at="erasing", error=Nack("x")),
            ]
            known = []
            for _ in range(4):
                await bench.flash()
                info = bench.jobs.info("m1")
                known.append((info["uid"], bool(info["content"])))
            assert known == [("0011", True), ("0022", False), ("0011", True), ("0011", False)]
            assert bench.jobs.pinned() == {FIRMWARE_FILE}, "the last good image is kept for the way back"

    run(work)


def test_a_failed_comparison_voids_the_record_it_contradicts(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            await bench.flash()
            bench["m1"].scripts = [Script(fail_at="boot", error=VerifyError("differs"), changed=False)]
            other = await bench.jobs.submit(Submission(JobKind.VERIFY, "m1", OTHER_FILE))
            assert (await bench.end(other)).state is JobState.FAILED
            assert bench.jobs.info("m1")["content"] == FIRMWARE.digest
            bench["m1"].scripts = [Script(fail_at="boot", error=VerifyError("differs"), changed=False)]
            await bench.end(await bench.submit(kind=JobKind.VERIFY))
            assert bench.jobs.info("m1")["content"] == ""

    run(work)


# --- interruptions ---------------------------------------------------------------------------------------------------


def test_a_dead_session_is_resumed_with_what_it_had_proven_and_kept(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            bench["m1"].scripts = [Script(fail_at="proven-1", error=DIED)]
            done = await bench.flash()
            assert (done.state, done.attempts) == (JobState.SUCCEEDED, 2)
            first, second = bench["m1"].runs
            assert (first.kept, first.proven) == (b"", ())
            assert (second.kept, second.proven) == (KEPT, SECTORS[:1])
            states = [u.state for u in bench.jobs.log(done.id)]
            assert list(dict.fromkeys(states)) == [
                JobState.QUEUED,
                JobState.RUNNING,
                JobState.INTERRUPTED,
                JobState.SUCCEEDED,
            ]

    run(work)


def test_what_was_right_before_the_first_erase_does_not_count_after_it(tmp_path: Path) -> None:
    """The first attempt leaves a sector alone, the next one erases it: somebody may have been at the target in between."""

    async def work() -> None:
        async with Bench(tmp_path) as bench:
            bench["m1"].scripts = [
                Script(fail_at="before-erase", error=DIED, stayed=SECTORS[:1]),
                Script(fail_at="erased", error=DIED),
            ]
            done = await bench.flash()
            assert (done.state, done.attempts) == (JobState.SUCCEEDED, 3)
            assert [r.kept for r in bench["m1"].runs] == [b"", b"", KEPT]
            assert [r.proven for r in bench["m1"].runs] == [(), (), ()]

    run(work)


def test_a_session_that_keeps_dying_fails_at_the_limit(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path, resume_limit=2) as bench:
            bench["m1"].scripts = [Script(fail_at="erased", error=DIED)] * 5
            done = await bench.flash()
            assert (done.state, done.attempts, len(bench["m1"].runs)) == (JobState.FAILED, 3, 3)
            assert done.error is not None
            assert (done.error["code"], done.error["facts"]["attempts"]) == ("SESSION_DIED", 3)

    run(work)


def test_another_board_in_the_middle_of_a_job_is_not_written(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            bench["m1"].scripts = [Script(fail_at="proven-1", error=DIED), Script(uid="0022")]
            done = await bench.flash()
            assert (done.state, done.reason) == (JobState.FAILED, "WRONG_CHIP")
            assert len(bench["m1"].runs) == 2

    run(work)


def test_stop_parks_and_the_next_start_goes_on(tmp_path: Path) -> None:
    """Also more often than the resume limit: an orderly stop is nobody's failure."""

    async def work() -> None:
        job_id = ""
        for stop in range(4):
            async with Bench(tmp_path, resume_limit=1) as bench:
                bench["m1"].scripts = [Script(hold_at="proven-1")]
                job_id = job_id or (await bench.submit()).id
                queued = await bench.submit(id="the next one")
                await bench["m1"].at("proven-1").wait()
                watch = bench.jobs.watch(job_id)
                waiting = asyncio.ensure_future(bench.jobs.wait(job_id))
                await bench.jobs.stop()
                assert (await waiting).state is JobState.INTERRUPTED
                assert [u.state async for u in watch][-1] is JobState.INTERRUPTED, "a watch ends with the service"
                assert bench["m1"].released == 0, "a stop resets nothing by itself"
                with pytest.raises(Stopped):
                    await bench.submit()
                assert bench.jobs.ready() == (False, "stopping")
                assert bench["m1"].runs[0].proven == (SECTORS[:1] if stop else ())
        async with Bench(tmp_path, resume_limit=1) as bench:
            assert (await bench.jobs.wait(job_id)).state is JobState.SUCCEEDED
            assert (await bench.end(queued)).state is JobState.SUCCEEDED
            assert bench.jobs.get(job_id).attempts == 1
            assert [r.job for r in bench["m1"].runs] == [job_id, queued.id]
            assert bench["m1"].released == 0, "it was released in order before"

    run(work)


def test_drain_finishes_what_runs_and_starts_nothing(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            bench["m1"].scripts = [Script(hold_at="erased", fail_at="proven-1", error=DIED)]
            first, second = await bench.submit(), await bench.submit()
            await bench["m1"].at("erased").wait()
            draining = asyncio.ensure_future(bench.jobs.drain())
            await asyncio.sleep(0)
            assert not draining.done()
            bench["m1"].go.set()
            await draining
            assert bench.jobs.get(first.id).state is JobState.SUCCEEDED, "also through a resumption"
            assert bench.jobs.get(second.id).state is JobState.QUEUED
        async with Bench(tmp_path) as bench:
            assert (await bench.end(second)).state is JobState.SUCCEEDED

    run(work)


def test_drain_does_not_wait_for_a_job_that_ended_without_going_on(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            bench["m1"].scripts = [Script(hold_at="erased", fail_at="erased", error=DIED)]
            job = await bench.submit()
            await bench["m1"].at("erased").wait()
            bench["m1"].unreleased = True
            bench["m1"].release_error = LineUnavailable("NRST does not move")
            bench["m1"].go.set()
            assert (await bench.end(job)).state is JobState.FAILED
            await bench.jobs.drain()

    run(work)


def test_drain_does_not_wait_for_a_job_that_was_canceled_while_it_was_interrupted(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path, "m1", "m2", shares={"m1": ["m2"]}) as bench:
            bench["m1"].scripts = [Script(hold_at="erased")]
            parked = await bench.submit()
            await bench["m1"].at("erased").wait()
        bench = Bench(tmp_path, "m1", "m2", shares={"m1": ["m2"]})
        group = bench.jobs._lanes["m1"].group
        await group.lock.acquire()  # A neighbour has the wires.
        async with bench:
            await asyncio.sleep(0)
            assert (await bench.jobs.cancel(parked.id, force=True)).state is JobState.CANCELED
            draining = asyncio.ensure_future(bench.jobs.drain())
            await asyncio.sleep(0)
            group.lock.release()
            await draining

    run(work)


def test_the_journal_knows_of_a_session_before_it_begins(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            bench["m1"].scripts = [Script(hold_at="lock")]
            job = await bench.submit()
            await bench["m1"].at("lock").wait()
            assert [(s.target, s.job, s.hazard_s) for s in bench.journal.sessions()] == [("m1", job.id, 0.0)]
            bench["m1"].go.set()
            await bench.end(job)
            assert bench.journal.sessions() == []

    run(work)
