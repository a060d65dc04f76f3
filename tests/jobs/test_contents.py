"""Parsers that take long: they hold up neither the daemon nor jobs that need none, and who ends waits for none."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bridged.errors import CorruptImage, Stopped
from bridged.images.content import wanted
from bridged.images.model import Image
from bridged.jobs.contents import PARSERS, Contents
from bridged.jobs.model import Job, JobKind, JobState
from tests.jobs.bench import FIRMWARE_FILE, OTHER, OTHER_FILE, Bench, MemoryStore, run

TARGETS = ("m1", "m2", "m3", "m4", "m5", "m6")
SLOW = "firmware.elf@0x08000000"


class Slow:
    """Makes the parser of ``firmware.elf`` wait for ``go``. ``calls``: where it was parsed to, ``most``: how many at once."""

    def __init__(self, store: MemoryStore) -> None:
        self.go = threading.Event()
        self.calls: list[int | None] = []
        self.now = self.most = 0
        self._load = store.load
        store.unparsed.add(FIRMWARE_FILE)
        store.load = self.load  # type: ignore[method-assign]

    def load(self, staged: Any, base_address: int | None = None, type_hint: str = "auto") -> Image:
        if staged.sha256 == FIRMWARE_FILE:
            self.calls.append(base_address)
            self.now += 1
            self.most = max(self.most, self.now)
            assert self.go.wait(10)
            self.now -= 1
        return self._load(staged, base_address, type_hint)

    async def busy(self, count: int = PARSERS) -> None:
        while self.now < count:
            await asyncio.sleep(0.001)


async def waiting(bench: Bench, count: int) -> None:
    """Until so many jobs and plans wait for a parser or its end."""
    while sum(build.waiting for build in bench.jobs._contents._builds.values()) != count:
        await asyncio.sleep(0.001)


def test_slow_images_on_all_targets_leave_the_threads_of_the_daemon_alone(tmp_path: Path) -> None:
    async def work() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(len(TARGETS) - 1))
        async with Bench(tmp_path, *TARGETS) as bench:
            await bench.end(await bench.submit(kind=JobKind.IDENTIFY))
            slow = Slow(bench.store)
            try:
                jobs = [await bench.submit(name, patch=f"0x08000000:{n:02x}") for n, name in enumerate(TARGETS)]
                await waiting(bench, len(jobs))
                await slow.busy()
                await asyncio.wait_for(asyncio.to_thread(lambda: None), 2)  # The beat of the watchdog.
                assert (await bench.jobs.plan("m1", "other.elf", {"force": "vectors"}))["target"] == "m1"
            finally:
                slow.go.set()
            assert [(await bench.end(job)).state for job in jobs] == [JobState.SUCCEEDED] * len(jobs)
            assert (slow.most, len(slow.calls)) == (PARSERS, len(jobs))

    run(work)


def test_the_same_image_is_parsed_once_for_all_that_want_it(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path, *TARGETS) as bench:
            slow = Slow(bench.store)
            jobs = [await bench.submit(name) for name in TARGETS]
            await waiting(bench, len(jobs))
            await slow.busy(1)
            await bench.jobs.cancel(jobs[0].id)
            assert (await bench.end(jobs[0])).state is JobState.CANCELED, "the others still want it"
            slow.go.set()
            assert [(await bench.end(job)).state for job in jobs[1:]] == [JobState.SUCCEEDED] * 5
            assert slow.calls == [None]
            # What comes of it is a refusal for all of them, and is tried again by the next one.
            slow.go.clear()
            bench.store.load_error = CorruptImage("no image")
            jobs = [await bench.submit(name) for name in TARGETS]
            await waiting(bench, len(jobs))
            await slow.busy(1)
            slow.go.set()
            assert [(await bench.end(job)).state for job in jobs] == [JobState.REJECTED] * 6
            assert len(slow.calls) == 2
            bench.store.load_error = None
            assert (await bench.flash()).state is JobState.SUCCEEDED

    run(work)


def test_a_cancel_and_a_stop_wait_for_no_parser(tmp_path: Path) -> None:
    """Neither that of the job nor those of the jobs before it; a plan is told, too."""

    async def work() -> None:
        async with Bench(tmp_path, *TARGETS) as bench:
            slow = Slow(bench.store)
            try:
                jobs = []
                for n, name in enumerate(TARGETS):
                    jobs.append(await bench.submit(name, patch=f"0x08000000:{n:02x}"))
                    await waiting(bench, len(jobs))
                    await slow.busy(min(n + 1, PARSERS))
                for job in (jobs[0], jobs[-1]):
                    await bench.jobs.cancel(job.id)
                    assert (await bench.end(job)).state is JobState.CANCELED
                assert len(slow.calls) == PARSERS, "no third one is started for a job that has gone"
                plan = asyncio.ensure_future(bench.jobs.plan("m1", SLOW, {"force": "vectors"}))
                await waiting(bench, len(jobs) - 1)
                await bench.jobs.stop()
                with pytest.raises(Stopped):
                    await plan
                left = {bench.jobs.get(job.id).state for job in jobs[1:-1]}
                assert left == {JobState.INTERRUPTED}
            finally:
                slow.go.set()
            assert len(slow.calls) == PARSERS
        async with Bench(tmp_path, *TARGETS) as again:
            ended: list[Job] = [await again.end(job) for job in jobs]
            assert [job.state for job in ended] == [JobState.CANCELED, *[JobState.SUCCEEDED] * 4, JobState.CANCELED]

    run(work)


def test_of_several_images_none_is_begun_when_nobody_wants_them_any_more(tmp_path: Path) -> None:
    async def work() -> None:
        store = MemoryStore(tmp_path)
        slow, contents = Slow(store), Contents(store)
        loaded = []
        load = store.load
        store.load = lambda *of: loaded.append(of[0].sha256) or load(*of)  # type: ignore[func-returns-value,method-assign]
        both = asyncio.ensure_future(contents.build(wanted("firmware.elf,other.elf@0x08004000", {})))
        await slow.busy(1)
        both.cancel()
        with pytest.raises(asyncio.CancelledError):
            await both
        slow.go.set()
        store.unparsed.add(OTHER_FILE)
        assert (await contents.build(wanted("other.elf", {}))).image == OTHER
        assert sorted(loaded) == sorted([FIRMWARE_FILE, OTHER_FILE])
        contents.close()
        with pytest.raises(Stopped):
            await contents.build(wanted("other.elf", {}))

    run(work)
