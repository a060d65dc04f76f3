"""Whose turn it is: who waits for whom, for a lock, for a window, for a target that is unplugged."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from bridged.config import Lines
from bridged.errors import (
    BadRequest,
    ConsentMissing,
    NotCancellable,
    PortGone,
    SessionDied,
    Stopped,
)
from bridged.jobs.model import Job, JobKind, JobState, Submission
from tests.jobs.bench import (
    KEPT,
    SECTORS,
    Bench,
    Script,
    became,
    run,
)

DIED = SessionDied("killed")


# --- waiting ---------------------------------------------------------------------------------------------------------


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
            assert update.reason == "target_absent", "who waits with it is told, and need not ask"
            assert "target_absent" in [told.reason for told in bench.jobs.log(first.id)]
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


def test_a_half_written_target_is_finished_before_an_older_job_also_after_a_restart(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as b:
            b["m1"].lock("ann")
            older = await b.submit()
            b["m1"].scripts = [Script(hold_at="proven-1")]
            own = await b.jobs.submit(Submission(JobKind.FLASH, "m1", "other.elf", principal="ann"))
            await b["m1"].at("proven-1").wait()
        async with Bench(tmp_path) as b:  # No lock any more.
            for job in (older, own):
                assert (await b.end(job)).state is JobState.SUCCEEDED
            assert [run.job for run in b["m1"].runs] == [own.id, older.id]

    run(work)


def test_one_that_was_interrupted_before_its_erase_waits_for_the_lock_like_any_other(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as b:
            b["m1"].scripts = [Script(hold_at="identify", fail_at="identify", error=DIED)]
            job = await b.submit()
            await b["m1"].at("identify").wait()
            b["m1"].lock("ann")
            b["m1"].go.set()
            while b.jobs.get(job.id).reason != "lock":
                await asyncio.sleep(0)
            assert (b.jobs.get(job.id).state, len(b["m1"].runs)) == (JobState.INTERRUPTED, 1)
            await b.jobs.drain()  # It is not waited for: it is resumed at the next start.
            assert len(b["m1"].runs) == 1
        async with Bench(tmp_path) as b:
            assert (await b.end(job)).state is JobState.SUCCEEDED

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


# --- unplugged -------------------------------------------------------------------------------------------------------


GONE = PortGone("the device hung up")


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
