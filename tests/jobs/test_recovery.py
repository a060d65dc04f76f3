"""After a crash: what was left in a session is released after its hazard, and every job comes to its end."""

from __future__ import annotations

import asyncio
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from bridged.errors import (
    DeadlineExceeded,
    LineUnavailable,
    PortGone,
    SessionDied,
    StorageError,
)
from bridged.jobs.model import Job, JobKind, JobState
from bridged.jobs.ports import Clock
from bridged.jobs.records import Backup, Change, OpenSession, TargetRecord
from bridged.jobs.recovery import hazard_left_s
from tests.jobs.bench import (
    HAZARD_S,
    Bench,
    Script,
    Time,
    became,
    run,
)

DIED = SessionDied("killed")


def test_hazard_that_is_left() -> None:
    session = OpenSession("m1", "j", 10.0, "boot-1", 0.0)
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
        session = OpenSession("a", "job-a", hazard_s, time.boot_id, 1.0)
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
        session = OpenSession("m1", "job", 0.0, "x", 1.0)
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
        session = OpenSession("m1", "job", 0.0, "x", 1.0)
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


def test_a_target_in_debt_is_released_however_many_jobs_have_ended_since(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path, "m1", "m2", keep=10) as bench:
            bench["m1"].scripts = [Script(fail_at="erasing", error=DIED)]
            bench["m1"].unreleased = True
            bench["m1"].release_error = LineUnavailable("NRST does not move")
            left = await bench.flash()
            assert left.state is JobState.FAILED
            assert [session.job for session in bench.journal.sessions()] == [left.id]
            for _ in range(12):
                await bench.end(await bench.submit("m2", JobKind.RESET))
            assert left.id in [job.id for job in bench.jobs.list(limit=100)], "it is asked what it did there"
            bench["m1"].release_error = None
            bench["m1"].set_state("idle")
            assert (await bench.flash()).state is JobState.SUCCEEDED
            assert bench["m1"].erased == [True]
            await bench.end(await bench.submit("m2", JobKind.RESET))
            while left.id in [job.id for job in bench.jobs.list(limit=100)]:
                await asyncio.sleep(0)  # Forgotten like any other by now.

    run(work)


@pytest.mark.parametrize("broken", [StorageError("an I/O error"), RuntimeError("a defect")])
def test_a_job_that_timed_out_ends_also_when_what_it_kept_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: Exception
) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:

            def backup(_job_id: str) -> Backup:
                raise broken

            monkeypatch.setattr(bench.journal, "backup", backup)
            bench["m1"].scripts = [Script(fail_at="boot", error=DeadlineExceeded("too long"))]
            ended = await bench.flash()
            assert ended.state is (JobState.TIMED_OUT if isinstance(broken, StorageError) else JobState.FAILED)
            assert (await bench.flash()).state is JobState.SUCCEEDED, "the lane goes on"

    run(work)


def test_a_target_that_is_absent_after_a_crash_is_released_when_it_comes(tmp_path: Path) -> None:
    async def work() -> None:
        bench = Bench(tmp_path)
        job = Job("job", JobKind.RESET, "m1", JobState.QUEUED, 1, "", "", {}, "", 1.0)
        bench.journal.admit(job, "", "{}").result(5)
        session = OpenSession("m1", "job", 0.0, "x", 1.0)
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
