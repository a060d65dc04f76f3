"""The job service as a whole: its ports, a disk that is full or fails, what stays in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest

from bridged.config import Config
from bridged.errors import (
    BridgedError,
    JournalError,
    SessionDied,
    StorageFull,
    UnknownJob,
)
from bridged.images.store import Store
from bridged.jobs.admission import FREE_BYTES
from bridged.jobs.journal import Journal
from bridged.jobs.model import TERMINAL, Job, JobKind, JobState, Update
from bridged.jobs.ports import Images, TargetPort
from bridged.jobs.records import Change
from bridged.jobs.service import Jobs
from bridged.target.owner import Target
from tests.jobs.bench import (
    FIRMWARE_FILE,
    OTHER_FILE,
    Bench,
    Script,
    ScriptedTarget,
    Time,
    Wires,
    run,
)

DIED = SessionDied("killed")


def test_the_real_target_and_store_fit(tmp_path: Path) -> None:
    """Checked by the type checker: what the service asks for is what the rooms below have."""

    def service(target: Target, store: Store, journal: Journal) -> Jobs:
        ports: dict[str, TargetPort] = {target.name: target}
        images: Images = store
        return Jobs(Config(), journal, images, ports)

    assert callable(service)
    scripted: TargetPort = ScriptedTarget("m1", Wires(Time()))
    assert scripted.state == "idle"
    assert tmp_path.exists()


# --- a full or failing disk ------------------------------------------------------------------------------------------


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
            await bench.end(await bench.submit(image="other.elf"))
            bench["m1"].reached.clear()
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
            assert bench.jobs.pinned() == {FIRMWARE_FILE, OTHER_FILE}, "after a crash the last good one is the one on disk"
            failing.refuses = lambda _change: False
            assert (await bench.end(job)).state is JobState.SUCCEEDED
            assert bench.jobs.pinned() == {FIRMWARE_FILE}
            assert [u.state async for u in watch][-1] is JobState.SUCCEEDED
            assert bench.jobs.ready() == (True, "")
            assert len(bench["m1"].runs) == 2

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


# --- memory ----------------------------------------------------------------------------------------------------------


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
