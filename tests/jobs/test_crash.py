"""The daemon is killed at every commit, and again while it recovers: each accepted job ends exactly once (P5).

A scenario runs to its end while the journal is copied after each commit, in the writer thread, before anybody is told. Each
copy is what a power cut would have left behind. A new service is then started on a copy, with targets that were not there
before, and must bring everything to an end; its own commits are copied in turn.
"""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridged.errors import BridgedError, DeadlineExceeded, Nack, SessionDied, WrongChip
from bridged.jobs.journal import Journal
from bridged.jobs.model import TERMINAL, Job, JobKind, JobState
from bridged.jobs.records import OpenSession
from tests.jobs.bench import FIRMWARE, KEPT, Bench, Run, Script, Time, run

NAMES = ("m1", "m2", "m3")
SHARES = {"m1": ["m2"]}
DIED = SessionDied("killed")


@dataclass(frozen=True)
class Moment:
    """What a crash right after one commit leaves behind, and what had been said to clients until then."""

    files: Path
    accepted: tuple[tuple[str, str], ...]
    shown_ended: tuple[tuple[str, JobState], ...]
    shown_seq: tuple[tuple[str, int], ...]


@dataclass
class Recorder:
    """Copies the journal at each commit; hears what clients are told."""

    root: Path
    moments: list[Moment] = field(default_factory=list)
    accepted: dict[str, str] = field(default_factory=dict)
    ended: dict[str, JobState] = field(default_factory=dict)
    seqs: dict[str, int] = field(default_factory=dict)
    twice: list[str] = field(default_factory=list)

    def attach(self, bench: Bench) -> None:
        bench.journal.on_commit = lambda: self.copy(bench.root)
        bench.jobs.on_update.append(lambda job, update: self.hear(job, update.seq))

    def hear(self, job: Job, seq: int) -> None:
        self.seqs[job.id] = seq
        if job.terminal:
            self.twice += [job.id] if job.id in self.ended else []
            self.ended[job.id] = job.state

    def copy(self, source: Path) -> None:
        into = self.root / f"moment-{len(self.moments):03}"
        into.mkdir(parents=True)
        for name in ("state.db", "state.db-wal"):
            if (source / name).exists():
                shutil.copy(source / name, into / name)
        told = tuple(self.accepted.items()), tuple(self.ended.items()), tuple(self.seqs.items())
        self.moments.append(Moment(into, *told))


@dataclass(frozen=True)
class Step:
    """One job of a scenario: what is asked, and how its sessions go before one succeeds."""

    target: str
    kind: JobKind = JobKind.FLASH
    scripts: tuple[Script, ...] = ()
    id: str = ""
    cancel: bool = False


async def scenario(bench: Bench, recorder: Recorder, steps: list[Step]) -> None:
    for step in steps:
        bench[step.target].scripts += [replace(script) for script in step.scripts]
        job = await bench.submit(step.target, step.kind, step.id)
        recorder.accepted[job.id] = step.target
        if step.cancel:
            await bench.jobs.cancel(job.id, force=True)
    for job_id in recorder.accepted:
        await bench.jobs.wait(job_id)


@dataclass(frozen=True)
class Before:
    """What the journal of a moment says."""

    jobs: dict[str, Job]
    sessions: dict[str, OpenSession]
    proven: dict[str, tuple[object, ...]]
    kept: dict[str, bytes]


def look(files: Path) -> Before:
    journal = Journal.open(files / "state.db")
    jobs = {job.id: job for job in journal.jobs(limit=1000)}
    found = Before(
        jobs,
        {session.target: session for session in journal.sessions()},
        {job_id: journal.proven(job_id) for job_id in jobs},
        {job_id: journal.backup(job_id).kept for job_id in jobs},
    )
    journal.close()
    return found


async def recover(moment: Moment, work: Path, recorder: Recorder | None = None) -> None:
    """Start on what ``moment`` left and check that every promise holds."""
    shutil.copytree(moment.files, work)
    before = look(work)
    missing = {job for job, _ in moment.accepted} - set(before.jobs)
    assert not missing, f"accepted and lost: {missing}"
    for job_id, state in moment.shown_ended:
        assert before.jobs[job_id].state is state, "shown as ended before it was on disk"
    time = Time(boot_id="boot-1", mono_s=50.0)
    bench = Bench(work, *NAMES, shares=SHARES, time=time)
    if recorder is not None:
        recorder.attach(bench)
        recorder.accepted.update(moment.accepted)
    async with bench:
        for job_id in before.jobs:
            await bench.jobs.wait(job_id)
        for name in NAMES:
            while bench.jobs._lanes[name].debt is not None:
                await asyncio.sleep(0)
        check_ends(bench, before, moment)
        check_targets(bench, before, time)
        assert bench.journal.sessions() == []
    assert recorder is None or recorder.twice == [], "a job ends once"


def check_ends(bench: Bench, before: Before, moment: Moment) -> None:
    ran: dict[str, list[Run]] = {}
    for target in bench.targets.values():
        for one in target.runs:
            ran.setdefault(one.job, []).append(one)
    seqs = dict(moment.shown_seq)
    for job_id, was in before.jobs.items():
        now = bench.jobs.get(job_id)
        ends = [update for update in bench.jobs.log(job_id) if update.state in TERMINAL]
        assert now.state in TERMINAL
        assert [update.state for update in ends] == [now.state], f"{job_id} ended {len(ends)} times"
        runs = ran.get(job_id, [])
        if was.terminal:
            assert now == was, "an ended job changed"
            assert not runs, f"{job_id} was run again after it had ended"
            continue
        assert now.seq > seqs.get(job_id, 0), "a number that was shown was used again"
        exhausted = was.attempts > 3 and was.state is not JobState.QUEUED
        assert len(runs) == (0 if exhausted else 1)
        for one in runs:
            assert one.proven == before.proven[job_id], "exactly what was journaled as proven is skipped"
            assert one.kept == (KEPT if was.touched else b""), "the kept bytes survive"


def check_targets(bench: Bench, before: Before, time: Time) -> None:
    for name, target in bench.targets.items():
        assert target.released == (name in before.sessions), f"{name}: released although it was in no session, or not at all"
        assert target.erased == [before.jobs[left.job].touched for left in before.sessions.values() if left.target == name]
    hazards = [session.hazard_s for session in before.sessions.values() if session.hazard_s]
    assert sum(time.slept) == pytest.approx(max(hazards, default=0.0)), "hazards are waited out, side by side"
    for job in before.jobs.values():
        session = before.sessions.get(job.target)
        # In phase stage the session before this one was closed in order, and the new one has not begun.
        if job.touched and job.state is JobState.RUNNING and job.phase != "stage":
            assert session is not None, "something may be half erased and nobody would release it"


def ends_right(bench: Bench) -> bool:
    return all(bench.jobs.info(name)["content"] in ("", FIRMWARE.digest) for name in NAMES)


def play(root: Path, steps: list[Step]) -> Recorder:
    recorder = Recorder(root / "first")

    async def work() -> None:
        bench = Bench(root / "live", *NAMES, shares=SHARES)
        recorder.attach(bench)
        async with bench:
            await scenario(bench, recorder, steps)
            assert ends_right(bench)

    run(work)
    assert recorder.twice == [], "a job ends once"
    return recorder


EVERYTHING = [
    Step("m1", scripts=(Script(fail_at="erasing", error=DIED), Script(fail_at="proven-1", error=DIED))),
    Step("m2", id="an order"),
    Step("m2", kind=JobKind.READ),
    Step("m3", scripts=(Script(fail_at="proven-2", error=Nack("refused")),)),
    Step("m3", kind=JobKind.ERASE),
    Step("m3", kind=JobKind.IDENTIFY, cancel=True),
]


def test_a_crash_at_every_commit_of_everything(tmp_path: Path) -> None:
    moments = play(tmp_path, EVERYTHING).moments
    assert len(moments) > 25
    touched = [any(job.touched for job in look_at.jobs.values()) for look_at in map(look, (m.files for m in moments))]
    assert any(touched), "the scenario must reach the erase"
    for number, moment in enumerate(moments):
        run(lambda m=moment, n=number: recover(m, tmp_path / f"again-{n}"))  # type: ignore[misc]


def test_a_second_crash_at_every_commit_of_the_recovery(tmp_path: Path) -> None:
    steps = [Step("m1", scripts=(Script(fail_at="proven-1", error=DIED),)), Step("m2")]
    moments = play(tmp_path, steps).moments
    worst = next(m for m in moments if any(s.hazard_s for s in look(m.files).sessions.values()))
    second = Recorder(tmp_path / "second")
    run(lambda: recover(worst, tmp_path / "again", second))
    assert len(second.moments) > 8
    for number, moment in enumerate(second.moments):
        run(lambda m=moment, n=number: recover(m, tmp_path / f"third-{n}"))  # type: ignore[misc]


def test_a_client_who_asks_again_after_any_crash_gets_its_one_job(tmp_path: Path) -> None:
    moments = play(tmp_path, [Step("m1", id="order-1")]).moments
    for number, moment in enumerate(moments):
        work = tmp_path / f"again-{number}"
        shutil.copytree(moment.files, work)

        async def ask(work: Path = work, moment: Moment = moment) -> None:
            async with Bench(work, *NAMES, shares=SHARES) as bench:
                job = await bench.submit("m1", id="order-1")
                assert not moment.accepted or job.id in dict(moment.accepted)
                assert (await bench.end(job)).state is JobState.SUCCEEDED
                assert len(bench.jobs.list()) == 1
                assert len(bench["m1"].runs) <= 1

        run(ask)


ERRORS: list[BridgedError] = [DIED, Nack("refused"), WrongChip("another"), DeadlineExceeded("late")]
scripts = st.builds(
    Script,
    fail_at=st.sampled_from(["lock", "identify", "erasing", "erased", "proven-1", "proven-2", "boot"]),
    error=st.sampled_from(ERRORS),
)
steps = st.builds(
    Step,
    target=st.sampled_from(NAMES),
    kind=st.sampled_from([JobKind.FLASH, JobKind.FLASH, JobKind.ENSURE, JobKind.ERASE, JobKind.READ, JobKind.RESET]),
    scripts=st.lists(scripts, max_size=5).map(tuple),
    cancel=st.booleans(),
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(steps, min_size=1, max_size=5), st.lists(st.integers(0, 10_000), min_size=1, max_size=3))
def test_any_jobs_and_any_crashes(jobs: list[Step], kills: list[int]) -> None:
    with TemporaryDirectory() as folder:
        root = Path(folder)
        recorder = play(root, jobs)
        for number, kill in enumerate(kills):
            if not recorder.moments:
                break  # Everything had ended: nothing was written any more.
            moment = recorder.moments[kill % len(recorder.moments)]
            recorder = Recorder(root / f"crash-{number}")
            run(lambda m=moment, n=number, r=recorder: recover(m, root / f"again-{n}", r))  # type: ignore[misc]
