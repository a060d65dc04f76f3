"""The job service over scripted targets: how sessions end, who waits for whom, what is on disk before what."""

from __future__ import annotations

import asyncio
import struct
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest

from bridged.config import Config, Lines
from bridged.errors import (
    BadRequest,
    BridgedError,
    Canceled,
    ConsentMissing,
    CorruptImage,
    DeadlineExceeded,
    EntryWouldBeLost,
    IdempotencyConflict,
    JournalError,
    LineUnavailable,
    Nack,
    NotCancellable,
    PortGone,
    QueueFull,
    SessionDied,
    Stopped,
    StorageFull,
    TooLarge,
    UnknownImage,
    UnknownJob,
    UnknownTarget,
    VerifyError,
    WrongChip,
)
from bridged.events import Event, SectorErased
from bridged.images.store import Store
from bridged.jobs.admission import FREE_BYTES
from bridged.jobs.journal import Journal
from bridged.jobs.model import TERMINAL, Job, JobKind, JobState, Submission, Update
from bridged.jobs.ports import Clock, StorePort, TargetPort
from bridged.jobs.records import Backup, Change, OpenSession, TargetRecord
from bridged.jobs.recovery import hazard_left_s
from bridged.jobs.service import Jobs
from bridged.target.owner import Target
from tests.jobs.bench import (
    FIRMWARE,
    FIRMWARE_FILE,
    HAZARD_S,
    KEPT,
    OTHER_FILE,
    SECTORS,
    TIMEOUT_S,
    Bench,
    Script,
    ScriptedTarget,
    Time,
    Wires,
    run,
    sectors_of,
)

DIED = SessionDied("killed")


def test_the_real_target_and_store_fit(tmp_path: Path) -> None:
    """Checked by the type checker: what the service asks for is what the rooms below have."""

    def service(target: Target, store: Store, journal: Journal) -> Jobs:
        ports: dict[str, TargetPort] = {target.name: target}
        images: StorePort = store
        return Jobs(Config(), journal, images, ports)

    assert callable(service)
    scripted: TargetPort = ScriptedTarget("m1", Wires(Time()))
    assert scripted.state == "idle"
    assert tmp_path.exists()


# --- how a session ends -------------------------------------------------------------------------------------------


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
            assert (done.id in bench.store.traces) == (not isinstance(error, Canceled)), "the flight recording is kept"
            assert (await bench.flash()).state is JobState.SUCCEEDED, "the next job works"

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


# --- what is known of a target ------------------------------------------------------------------------------------


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


# --- submitting ---------------------------------------------------------------------------------------------------


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


# --- canceling ----------------------------------------------------------------------------------------------------


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


# --- waiting ------------------------------------------------------------------------------------------------------


def test_an_absent_target_is_waited_for(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            bench["m1"].set_state("absent", "unplugged")
            watch = bench.jobs.watch(target="m1")
            first, second = await bench.submit(), await bench.submit()
            async for update in watch:
                if update.state is JobState.WAITING:
                    break
            assert bench.jobs.get(first.id).reason == "target_absent"
            assert (await bench.jobs.cancel(first.id)).state is JobState.CANCELED
            bench["m1"].set_state("idle")
            assert (await bench.end(second)).state is JobState.SUCCEEDED
            assert [r.job for r in bench["m1"].runs] == [second.id]

    run(work)


def test_a_lock_makes_the_jobs_of_others_wait_and_lets_its_owner_by(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as b:
            b["m1"].lock("ann")
            others = await b.submit()
            while b.jobs.get(others.id).state is not JobState.WAITING:
                await asyncio.sleep(0)
            assert b.jobs.get(others.id).reason == "lock"
            own = await b.jobs.submit(Submission(JobKind.RESET, "m1", "", {}, "", "ann"))
            assert (await b.end(own)).state is JobState.SUCCEEDED, "it came later and does not wait behind the other"
            assert b.jobs.get(others.id).state is JobState.WAITING
            canceled = await b.submit()
            assert (await b.jobs.cancel(canceled.id)).state is JobState.CANCELED
            b["m1"].lock("")
            assert (await b.end(others)).state is JobState.SUCCEEDED

    run(work)


def test_a_job_that_was_interrupted_goes_on_whoever_has_locked_its_target(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as b:
            b["m1"].scripts = [Script(hold_at="erased", fail_at="erased", error=DIED)]
            job = await b.submit()
            await b["m1"].at("erased").wait()
            b["m1"].lock("ann")
            b["m1"].go.set()
            assert (await b.end(job)).state is JobState.SUCCEEDED
            assert len(b["m1"].runs) == 2

    run(work)


def test_a_broken_target_fails_its_jobs_with_the_reason(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            bench["m1"].set_state("broken", "NRST stays low")
            done = await bench.flash()
            assert (done.state, done.reason) == (JobState.FAILED, "TARGET_BROKEN")
            assert done.error is not None
            assert "NRST stays low" in done.error["message"]

    run(work)


def test_targets_that_share_wires_run_one_at_a_time(tmp_path: Path) -> None:
    """a shares with b, b with c (said by c): all three are one group; d is alone. The bench asserts the rest."""

    async def work() -> None:
        async with Bench(tmp_path, "a", "b", "c", "d", shares={"a": ["b"], "c": ["b"]}) as bench:
            bench["a"].scripts = [Script(hold_at="erased")]
            first = await bench.submit("a")
            await bench["a"].at("erased").wait()
            others = [await bench.submit(name) for name in ("c", "b", "c")]
            alone = await bench.flash("d")
            assert alone.state is JobState.SUCCEEDED, "another target goes on meanwhile"
            held = [bench.jobs.get(job.id) for job in others[:2]]
            assert [(j.state, j.reason) for j in held] == [(JobState.WAITING, "lock")] * 2
            bench["a"].go.set()
            assert {(await bench.end(job)).state for job in (first, *others)} == {JobState.SUCCEEDED}

    run(work)


def test_who_resets_a_neighbour_names_it(tmp_path: Path) -> None:
    async def work() -> None:
        bench = Bench(tmp_path, "a", "b", "c", shares={"a": ["b"], "b": ["a"]})
        one_nrst = Lines(kind="gpio", nrst="GPIO17")
        wired = {name: replace(one, lines=one_nrst) if name != "c" else one for name, one in bench.config.targets.items()}
        bench.jobs._admission.config = replace(bench.config, targets=wired)
        async with bench:
            for kind in (JobKind.FLASH, JobKind.IDENTIFY, JobKind.RESET, JobKind.DOCTOR):
                with pytest.raises(ConsentMissing, match="say resets=b") as refused:
                    await bench.submit("a", kind)
                assert refused.value.facts["resets"] == "b"
                assert (await bench.end(await bench.submit("a", kind, resets="b"))).state is JobState.SUCCEEDED
            for target, named in (("a", "b,c"), ("a", "c"), ("c", "a")):
                with pytest.raises(BadRequest, match="does not reset that"):
                    await bench.submit(target, JobKind.IDENTIFY, resets=named)
            assert (await bench.end(await bench.submit("c", JobKind.IDENTIFY))).state is JobState.SUCCEEDED
            job = await bench.submit("a", JobKind.IDENTIFY, "mine", resets="b")
            bench.jobs._admission.config = bench.config
            assert (await bench.submit("a", JobKind.IDENTIFY, "mine", resets="b")).id == job.id, "accepted is accepted"

    run(work)


def test_wait_gives_the_job_as_it_is_when_time_runs_out(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            bench["m1"].scripts = [Script(hold_at="lock")]
            job = await bench.submit()
            await bench["m1"].at("lock").wait()
            assert (await bench.jobs.wait(job.id, 0)).state is JobState.RUNNING

    run(work)


# --- interruptions ------------------------------------------------------------------------------------------------


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


# --- after a crash ------------------------------------------------------------------------------------------------


def test_hazard_that_is_left() -> None:
    session = OpenSession("m1", "j", 10.0, 500.0, "boot-1", 0.0)
    for boot_id, boottime, left_s in (
        ("boot-1", 501.0, 10.0),
        ("boot-1", 900.0, 10.0),
        ("boot-2", 3.0, 7.0),
        ("boot-2", 60, 0),
    ):
        clock = Clock(boottime=lambda now=boottime: now, boot_id=boot_id)  # type: ignore[misc]
        assert hazard_left_s(session, clock) == left_s
        assert hazard_left_s(replace(session, hazard_s=0.0), clock) == 0.0


@pytest.mark.parametrize("hazard_s", [0.0, HAZARD_S])
def test_only_the_target_that_was_in_a_session_is_released_and_after_its_hazard(tmp_path: Path, hazard_s: float) -> None:
    async def work() -> None:
        time = Time()
        names = ("a", "b", "c")
        bench = Bench(tmp_path, *names, shares={"a": ["b"]}, time=time)
        jobs = {n: Job(f"job-{n}", JobKind.RESET, n, JobState.QUEUED, 1, "", "", {}, "", 1.0) for n in names}
        for job in jobs.values():
            bench.journal.admit(job, "", "{}").result(5)
        session = OpenSession("a", "job-a", hazard_s, time.boot_s, time.boot_id, 1.0)
        bench.journal.apply(Change(replace(jobs["a"], state=JobState.RUNNING, attempts=1, seq=5), session=session)).result(5)
        async with bench:
            assert bench["b"].wires.until == (time.mono_s + hazard_s), "told before anybody could open its port"
            assert bench["c"].wires.until == 0
            done = {n: await bench.end(job) for n, job in jobs.items()}
            assert {job.state for job in done.values()} == {JobState.SUCCEEDED}
            assert [bench[n].released for n in names] == [1, 0, 0]
            assert time.slept == ([hazard_s] if hazard_s else []), "the wires of a and b did not move before: see the bench"
            assert done["a"].attempts == 2
            assert bench.journal.sessions() == []
            assert [u.state for u in bench.jobs.log("job-a")][:3] == [
                JobState.QUEUED,
                JobState.INTERRUPTED,
                JobState.RUNNING,
            ]
            assert bench.jobs.log("job-a")[1].seq > 1000, "numbers that were shown and lost are not used again"

    run(work)


EMPTY_BEFORE = b"BRKEPT2\n" + struct.pack("<II", 1, 0)  # As ``target.kept`` has it: nothing kept, and the flash was empty.


def test_a_part_that_was_empty_is_started_by_its_release_after_a_crash(tmp_path: Path) -> None:
    """The reset alone leads it into its loader again (AN2606); its job may have been canceled, so nobody else would do it."""

    async def work() -> None:
        bench = Bench(tmp_path)
        job = Job("job", JobKind.RESET, "m1", JobState.QUEUED, 1, "", "", {}, "", 1.0)
        bench.journal.admit(job, "", "{}").result(5)
        session = OpenSession("m1", "job", 0.0, 0.0, "x", 1.0)
        running = replace(job, state=JobState.RUNNING, attempts=1, seq=5)
        record, backup = TargetRecord("m1", pid=0x460), Backup("0011", EMPTY_BEFORE)
        bench.journal.apply(Change(running, session=session, backup=backup, target=record)).result(5)
        async with bench:
            assert (await bench.end(job)).state is JobState.SUCCEEDED
            assert (bench["m1"].released, bench["m1"].started_empty) == (1, ["0x460"])
            assert (await bench.flash()).state is JobState.SUCCEEDED
            assert bench["m1"].released == 1

    run(work)


@pytest.mark.parametrize("empty", [True, False])
def test_so_it_is_when_its_job_is_not_resumed_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty: bool) -> None:
    if empty:
        monkeypatch.setattr("tests.jobs.bench.KEPT", EMPTY_BEFORE)

    async def work() -> None:
        async with Bench(tmp_path, resume_limit=1) as bench:
            bench["m1"].scripts = [Script(fail_at="boot", error=SessionDied("killed")) for _ in range(2)]
            assert (await bench.flash()).state is JobState.FAILED
            assert bench["m1"].started_empty == (["0x449"] if empty else [])
            bench["m1"].scripts = [Script(fail_at="boot", error=DeadlineExceeded("too long"))]
            assert (await bench.flash()).state is JobState.TIMED_OUT
            assert bench["m1"].started_empty == (["0x449"] * 2 if empty else [])

    run(work)


def test_a_target_that_cannot_be_released_fails_its_job_and_stays_in_the_journal(tmp_path: Path) -> None:
    async def work() -> None:
        bench = Bench(tmp_path)
        job = Job("job", JobKind.RESET, "m1", JobState.QUEUED, 1, "", "", {}, "", 1.0)
        bench.journal.admit(job, "", "{}").result(5)
        session = OpenSession("m1", "job", 0.0, 0.0, "x", 1.0)
        bench.journal.apply(Change(replace(job, state=JobState.RUNNING, attempts=1, seq=5), session=session)).result(5)
        bench["m1"].release_error = LineUnavailable("NRST does not move")
        async with bench:
            done = await bench.end(job)
            assert (done.state, done.reason) == (JobState.FAILED, "LINE_UNAVAILABLE")
            assert bench.journal.sessions() == [session], "the next start tries again"
        again = Bench(tmp_path)
        async with again:
            await again.flash()
            assert again["m1"].released == 1
            assert again.journal.sessions() == []

    run(work)


def test_a_target_that_is_absent_after_a_crash_is_released_when_it_comes(tmp_path: Path) -> None:
    async def work() -> None:
        bench = Bench(tmp_path)
        job = Job("job", JobKind.RESET, "m1", JobState.QUEUED, 1, "", "", {}, "", 1.0)
        bench.journal.admit(job, "", "{}").result(5)
        session = OpenSession("m1", "job", 0.0, 0.0, "x", 1.0)
        bench.journal.apply(Change(replace(job, state=JobState.RUNNING, attempts=1, seq=5), session=session)).result(5)
        bench["m1"].set_state("absent", "unplugged")
        async with bench:
            assert (await bench.jobs.cancel("job")).state is JobState.CANCELED
            bench["m1"].set_state("idle")
            assert (await bench.flash()).state is JobState.SUCCEEDED
            assert bench["m1"].released == 1, "released before the next job, although its own job has gone"

    run(work)


def test_a_target_whose_port_vanished_with_its_lines_is_released_when_it_is_back(tmp_path: Path) -> None:
    """NRST on the adapter's own DTR: nobody could release the target, and the journal must not say that somebody did."""

    async def work() -> None:
        async with Bench(tmp_path) as bench:
            target = bench["m1"]
            target.scripts = [Script(hold_at="identify", fail_at="identify", error=PortGone("the device hung up"))]
            job = await bench.submit(kind=JobKind.IDENTIFY)
            await target.at("identify").wait()
            target.unreleased = True
            target.set_state("absent", "unplugged")
            target.go.set()
            await became(bench, job, JobState.INTERRUPTED)
            assert [session.target for session in bench.journal.sessions()] == ["m1"]
            await bench.jobs.cancel(job.id)
            target.set_state("idle")
            while bench.journal.sessions():
                await asyncio.sleep(0)
            assert (target.released, target.unreleased) == (1, False)
            assert (await bench.flash()).state is JobState.SUCCEEDED

    run(work)


# --- unplugged ----------------------------------------------------------------------------------------------------

GONE = PortGone("the device hung up")


async def became(bench: Bench, job: Job, state: JobState) -> Job:
    while bench.jobs.get(job.id).state is not state:
        await asyncio.sleep(0)
    return bench.jobs.get(job.id)


async def unplugged_at(bench: Bench, point: str, kind: JobKind = JobKind.FLASH, *, modem: bool = False) -> Job:
    """A job whose port hangs up at ``point``; ``modem``: NRST and BOOT0 went with it."""
    target = bench["m1"]
    target.scripts = [Script(hold_at=point, fail_at=point, error=GONE)]
    job = await bench.submit(kind=kind)
    await target.at(point).wait()
    target.unreleased = modem
    target.set_state("absent", "unplugged")
    target.go.set()
    return await became(bench, job, JobState.INTERRUPTED)


@pytest.mark.parametrize("modem", [False, True])
@pytest.mark.parametrize("point", ["lock", "identify", "before-erase", "erased", "proven-1", "boot"])
def test_a_job_whose_port_is_unplugged_goes_on_when_it_is_back(tmp_path: Path, point: str, modem: bool) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            job = await unplugged_at(bench, point, modem=modem)
            touched = point in ("erased", "proven-1", "boot")
            assert (job.reason, job.touched, job.attempts) == ("target_absent", touched, 1)
            assert job.error is not None
            assert job.error["code"] == "PORT_GONE"
            proven = bench.journal.proven(job.id)
            assert len(proven) == {"proven-1": 1, "boot": 2}.get(point, 0)
            for _ in range(50):
                await asyncio.sleep(0)
            assert len(bench["m1"].runs) == 1, "it waits, and does not try"
            bench["m1"].set_state("idle")
            done = await bench.end(job)
            assert (done.state, done.attempts, done.error, done.reason) == (JobState.SUCCEEDED, 2, None, "")
            assert (bench["m1"].runs[1].kept, bench["m1"].runs[1].proven) == (KEPT if touched else b"", proven)
            assert bench["m1"].released == modem, "what could not be released is released before anything else"
            assert bench.journal.sessions() == []

    run(work)


def test_a_target_that_is_gone_before_its_session_begins_is_waited_for(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            bench["m1"].scripts = [Script(fail_at="lock", error=GONE)]  # Still "idle": nobody has noticed yet.
            done = await bench.end(await bench.submit(kind=JobKind.IDENTIFY))
            assert (done.state, done.attempts) == (JobState.SUCCEEDED, 2)

    run(work)


def test_a_port_that_hangs_up_again_and_again_ends_its_job(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path, resume_limit=2) as bench:
            bench["m1"].scripts = [Script(fail_at="erased", error=GONE) for _ in range(9)]
            done = await bench.flash()
            assert (done.state, done.attempts, len(bench["m1"].runs)) == (JobState.FAILED, 3, 3)
            assert done.error is not None
            assert (done.error["code"], done.error["facts"]["attempts"]) == ("PORT_GONE", 3)

    run(work)


@pytest.mark.parametrize("point", ["identify", "erased"])
def test_an_unplugged_job_may_be_canceled_and_touched_only_by_force(tmp_path: Path, point: str) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            job = await unplugged_at(bench, point)
            if job.touched:
                with pytest.raises(NotCancellable):
                    await bench.jobs.cancel(job.id)
            assert (await bench.jobs.cancel(job.id, force=job.touched)).state is JobState.CANCELED
            bench["m1"].set_state("idle")
            assert (await bench.flash()).state is JobState.SUCCEEDED
            assert len(bench["m1"].runs) == 2

    run(work)


def test_an_unplugged_job_survives_a_restart(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            job = await unplugged_at(bench, "proven-1")
        async with Bench(tmp_path) as again:
            done = await again.end(job)
            assert (done.state, done.attempts) == (JobState.SUCCEEDED, 2)
            assert (again["m1"].runs[0].kept, again["m1"].runs[0].proven) == (KEPT, SECTORS[:1])

    run(work)


def test_a_port_that_goes_once_more_while_its_target_is_released(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            job = await unplugged_at(bench, "erased", modem=True)
            bench["m1"].release_error = GONE
            bench["m1"].set_state("idle")
            while bench["m1"].state != "absent":
                await asyncio.sleep(0)
            assert bench.jobs.get(job.id).state is JobState.INTERRUPTED
            bench["m1"].release_error = None
            bench["m1"].set_state("idle")
            assert (await bench.end(job)).state is JobState.SUCCEEDED
            assert bench["m1"].released == 1

    run(work)


def test_a_session_that_stops_by_itself_again_and_again_ends_its_job(tmp_path: Path) -> None:
    """It heard nothing of the journal for minutes. That is no stop of ours, so it counts."""

    async def work() -> None:
        async with Bench(tmp_path) as bench:
            bench["m1"].scripts = [Script(fail_at="before-erase", error=Stopped("no answer")) for _ in range(20)]
            done = await bench.flash()
            assert (done.state, done.reason) == (JobState.FAILED, "STOPPED")
            assert len(bench["m1"].runs) == 1 + bench.config.jobs.resume_limit

    run(work)


def test_jobs_of_a_target_that_is_not_configured_any_more_fail(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path, "m1", "old") as bench:
            bench["old"].scripts = [Script(hold_at="erased")]
            running, waiting = await bench.submit("old"), await bench.submit("old")
            await bench["old"].at("erased").wait()
        async with Bench(tmp_path, "m1") as bench:
            for job in (running, waiting):
                assert (bench.jobs.get(job.id).state, bench.jobs.get(job.id).reason) == (JobState.FAILED, "UNKNOWN_TARGET")

    run(work)


# --- a full or failing disk ---------------------------------------------------------------------------------------


def test_without_room_nothing_destructive_starts(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path, free_bytes=FREE_BYTES - 1) as bench:
            ready, why = bench.jobs.ready()
            assert not ready
            assert "KiB left" in why
            done = await bench.flash()
            assert (done.state, done.reason) == (JobState.FAILED, "STORAGE_FULL")
            assert bench["m1"].runs == []
            assert (await bench.end(await bench.submit(kind=JobKind.IDENTIFY))).state is JobState.SUCCEEDED
            bench.free_bytes = FREE_BYTES
            assert bench.jobs.ready() == (True, "")
            assert (await bench.flash()).state is JobState.SUCCEEDED

    run(work)


class FailingJournal:
    """A journal on a disk that refuses what ``refuses`` says."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.refuses: Callable[[Change], bool] = lambda _change: False
        self.refused = asyncio.Event()
        self.error: type[BridgedError] = StorageFull

    def __getattr__(self, name: str) -> object:
        return getattr(self._journal, name)

    def apply(self, change: Change) -> Future[None]:
        if not self.refuses(change):
            return self._journal.apply(change)
        self.refused.set()
        future: Future[None] = Future()
        future.set_exception(self.error("no space left on device"))
        return future


def test_a_full_disk_at_the_barrier_prevents_the_erase(tmp_path: Path) -> None:
    async def work() -> None:
        failing = FailingJournal(Journal.open(tmp_path / "state.db"))
        failing.refuses = lambda change: change.backup is not None
        async with Bench(tmp_path, journal=failing) as bench:  # type: ignore[arg-type]
            done = await bench.flash()
            assert (done.state, done.reason, done.touched) == (JobState.FAILED, "STORAGE_FULL", False)
            assert not bench["m1"].at("erasing").is_set()

    run(work)


@pytest.mark.parametrize("error", [StorageFull, JournalError])
def test_a_disk_that_fails_after_the_erase_delays_the_end_and_loses_nothing(tmp_path: Path, error: type[BridgedError]) -> None:
    async def work() -> None:
        failing = FailingJournal(Journal.open(tmp_path / "state.db"))
        failing.error = error
        async with Bench(tmp_path, journal=failing) as bench:  # type: ignore[arg-type]
            bench["m1"].scripts = [Script(hold_at="erasing")]
            job = await bench.submit()
            await bench["m1"].at("erasing").wait()
            failing.refuses = lambda _change: True
            watch = bench.jobs.watch(job.id)
            bench["m1"].go.set()
            await bench["m1"].at("boot").wait()
            failing.refused.clear()
            await failing.refused.wait()
            assert bench.jobs.get(job.id).state is JobState.RUNNING, "not shown before it is on disk"
            assert bench.jobs.ready()[0] is False
            failing.refuses = lambda _change: False
            assert (await bench.end(job)).state is JobState.SUCCEEDED
            assert [u.state async for u in watch][-1] is JobState.SUCCEEDED
            assert bench.jobs.ready() == (True, "")
            assert len(bench["m1"].runs) == 1

    run(work)


def test_a_broken_journal_is_no_reason_to_die(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            await bench.flash()
            await asyncio.to_thread(bench.journal.close)
            with pytest.raises(JournalError):
                await bench.submit()
            assert bench.jobs.ready()[0] is False

    run(work)


# --- memory -------------------------------------------------------------------------------------------------------


def test_old_jobs_are_forgotten_with_their_files(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path, keep=10) as bench:
            first = await bench.end(await bench.submit(kind=JobKind.READ, id="the first"))
            path = bench.jobs.read_result(first.id)
            for _ in range(12):
                await bench.end(await bench.submit(kind=JobKind.RESET))
            while len(bench.jobs.list(limit=100)) > 10 or path.exists():
                await asyncio.sleep(0)  # It is tidied up on the side.
            with pytest.raises(UnknownJob):
                bench.jobs.get(first.id)
            again = await bench.submit(kind=JobKind.READ, id="the first")
            assert again.id != first.id

    run(work)


def test_listeners_cannot_hurt_a_job(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            seen: list[Update] = []

            def bad(_job: Job, _what: object) -> None:
                raise RuntimeError("a defect in a listener")

            bench.jobs.on_update += [bad, lambda _job, update: seen.append(update)]
            bench.jobs.on_event.append(bad)
            assert (await bench.flash()).state is JobState.SUCCEEDED
            assert seen[-1].state in TERMINAL

    run(work)
