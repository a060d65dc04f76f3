"""Readers of updates: none loses a change of state, none costs more than its bound, none slows a job down."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from bridged.jobs.model import Job, JobKind, JobState, Update
from bridged.jobs.watch import QUEUE_LIMIT, Watch
from tests.jobs.bench import Bench, Script, run


def an_update(job: str, seq: int, done: int = 0, state: JobState = JobState.RUNNING) -> Update:
    return Update(job, "m1", seq, 0.0, state, "write", done, 100)


def drain(watch: Watch) -> list[Update]:
    async def work() -> list[Update]:
        watch.close()
        return [update async for update in watch]

    return asyncio.run(work())


def test_a_reader_sees_each_change_once_and_in_order(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path, "m1", "m2") as bench:
            everything, only_m2 = bench.jobs.watch(), bench.jobs.watch(target="m2")
            job = await bench.submit("m1")
            one = bench.jobs.watch(job.id)
            updates = [update async for update in one]
            await bench.flash("m2")
            lasting = [u for u in updates if not u.done]
            assert [u.seq for u in lasting] == sorted(u.seq for u in lasting)
            assert updates[-1].state is JobState.SUCCEEDED
            assert {u.seq for u in bench.jobs.log(job.id)} <= {u.seq for u in updates}
            assert max(u.done for u in updates) == 512, "progress is shown, too"
            late = [u async for u in bench.jobs.watch(job.id)]
            assert [u.state for u in late] == [JobState.SUCCEEDED], "a watch on an ended job says so and ends"
            await bench.jobs.stop()
            assert {u.target async for u in everything} == {"m1", "m2"}
            assert {u.target async for u in only_m2} == {"m2"}

    run(work)


def test_a_reader_that_sleeps_through_it_all_misses_no_change(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path, keep=1000) as bench:
            sleeper = bench.jobs.watch()
            jobs: list[Job] = [await bench.flash() for _ in range(40)]
            held = len(sleeper._queue) + len(sleeper._progress)
            assert held <= QUEUE_LIMIT + 1, "bounded while nobody reads"
            assert sleeper._gaps, "this test must overflow the queue"
            logs = {job.id: bench.jobs.log(job.id) for job in jobs}
            seen: dict[str, list[int]] = {job.id: [] for job in jobs}
            while any(seq[-1:] != [logs[job][-1].seq] for job, seq in seen.items()):
                update = await anext(sleeper)
                if update.seq not in seen[update.job]:
                    seen[update.job].append(update.seq)
            assert seen == {job: [u.seq for u in log] for job, log in logs.items()}

    run(work)


def test_progress_is_shown_at_most_five_times_a_second(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            shown: list[tuple[str, int, float]] = []
            bench.jobs.on_update.append(lambda _job, update: shown.append((update.phase, update.done, update.rate)))
            bench["m1"].scripts = [Script(hold_at="erased")]
            job = await bench.submit()
            await bench["m1"].at("erased").wait()
            live = bench.jobs._book.live[job.id]
            bench.jobs._book.note(live, phase="write", done=0, total=100_000)
            live.phase_since = bench.time.mono_s
            shown.clear()
            for step in range(1, 1001):  # 10 s of a session that reports 100 times a second
                bench.time.pass_(0.01)
                bench.jobs._book.progress(live, step * 100)
            assert 45 <= len(shown) <= 51
            assert shown[-1][1] == 100_000, "the last one is shown"
            assert all(abs(rate - 10_000) < 1 for _, _, rate in shown)
            bench["m1"].go.set()
            await bench.end(job)

    run(work)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.booleans()), max_size=2000))
def test_any_mix_keeps_every_lasting_update(offers: list[tuple[str, bool]]) -> None:
    log: dict[str, list[Update]] = {"a": [], "b": []}
    watch = Watch(lambda job, seq: [u for u in log[job] if u.seq >= seq])
    for number, (job, lasting) in enumerate(offers):
        if lasting:
            log[job].append(an_update(job, len(log[job]) + 1))
            watch.offer(log[job][-1], lasting=True)
        else:
            watch.offer(an_update(job, len(log[job]), done=number + 1), lasting=False)
        assert len(watch._queue) <= QUEUE_LIMIT
    got = drain(watch)
    for job, updates in log.items():
        assert [u for u in got if u.job == job and not u.done] == updates
        progress = [u.done for u in got if u.job == job and u.done]
        assert len(progress) <= 1, "only the newest progress is worth showing"


def test_a_watch_that_is_dropped_is_forgotten(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            watches = [bench.jobs.watch() for _ in range(100)]
            await watches[0].aclose()
            assert [u async for u in watches[0]] == []
            del watches
            gc.collect()
            assert len(bench.jobs._book.watches) == 0
            done = await bench.end(await bench.submit(kind=JobKind.RESET))
            assert done.state is JobState.SUCCEEDED

    run(work)
