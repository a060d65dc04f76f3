"""Rollback: an image that is proven and does not live makes way for the last known good one, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest

from bridged.config import Policy
from bridged.errors import (
    BridgedError,
    CorruptImage,
    DeadlineExceeded,
    EntryWouldBeLost,
    Nack,
    NotCancellable,
    PortGone,
    SessionDied,
    WrongChip,
)
from bridged.events import Event, RolledBack
from bridged.images.model import Image
from bridged.jobs.admission import FREE_BYTES
from bridged.jobs.database import MIGRATIONS, VERSION
from bridged.jobs.journal import Journal
from bridged.jobs.model import TERMINAL, Job, JobKind, JobState
from bridged.jobs.rollback import Restore
from tests.jobs.bench import (
    FIRMWARE,
    FIRMWARE_FILE,
    HAZARD_S,
    KEPT_OF_OTHER,
    OTHER,
    OTHER_FILE,
    Bench,
    Script,
    Time,
    run,
    sectors_of,
)
from tests.jobs.test_crash import Moment, Recorder

DIED = SessionDied("killed")


def probed(root: Path, **settings: Any) -> Bench:
    """A bench with a health probe that ``FIRMWARE`` does not pass."""
    bench = Bench(root, health="ok", **settings)
    bench["m1"].sick = (FIRMWARE,)
    return bench


async def good(bench: Bench, **params: Any) -> Job:
    done = await bench.flash(image="other.elf", **params)
    assert done.state is JobState.SUCCEEDED
    bench["m1"].reached.clear()
    return done


def flashed(bench: Bench) -> list[Image | None]:
    return [one.image for one in bench["m1"].runs]


async def became_restoring(bench: Bench, job: Job) -> None:
    while Restore.of(bench.jobs.get(job.id)) is None:
        await asyncio.sleep(0)


# --- how it ends --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [JobKind.FLASH, JobKind.ENSURE])
def test_an_unhealthy_image_makes_way_for_the_last_good_one(tmp_path: Path, kind: JobKind) -> None:
    async def work() -> None:
        async with probed(tmp_path) as bench:
            await good(bench, patch="0x08000200:aa")
            wanted = bench["m1"].runs[0].image
            events: list[Event] = []
            phases: list[str] = []
            bench.jobs.on_event.append(lambda _job, event: events.append(event))
            bench.jobs.on_update.append(lambda _job, update: phases.append(update.phase))
            done = await bench.end(await bench.submit(kind=kind, outside="discard", force="vectors", entry="one-shot"))
            assert (done.state, done.reason, done.attempts) == (JobState.ROLLED_BACK, "UNHEALTHY", 1)
            assert done.error is not None
            assert done.error["code"] == "UNHEALTHY"
            assert "it said nothing; other.elf (patched) was restored and proven, and is healthy" in done.error["message"]
            assert done.error["facts"] == {"within_s": 3.0}
            assert done.result is not None
            assert (done.result["evidence"], done.result["health"]) == ("full", "passed")
            assert (done.result["restored"], done.result["restored_image"]) == ("other.elf (patched)", OTHER_FILE)
            assert (done.content, done.result["content"]) == (FIRMWARE.digest, wanted.digest if wanted else "")
            first, second = bench["m1"].runs[1:]
            assert (first.image, second.image, second.kind) == (FIRMWARE, wanted, "flash")
            assert (second.kept, second.proven) == (b"", ()), "nothing of the other content"
            assert second.params == {"force": "interlock,vectors", "entry": "one-shot"}
            order = list(dict.fromkeys(phases))
            assert order[order.index("health") :] == ["health", "restore"]
            steps = [u.event["step"] for u in bench.jobs.log(done.id) if u.event.get("event") == "Restoring"]
            assert steps == ["lock", "identify", "erase", "write", "verify", "boot"]
            (told,) = [u.event for u in bench.jobs.log(done.id) if u.event.get("event") == "RolledBack"]
            assert RolledBack(told["image"], told["content"], told["health"]).health == "passed"
            info = bench.jobs.info("m1")
            assert (info["content"], info["image"], info["evidence"]) == (wanted.digest if wanted else "", OTHER_FILE, "full")
            assert bench.journal.sessions() == []
            assert bench.jobs.trace_file(done.id), "of the session that found it out"
            # And once more: what was restored is still the last known good.
            assert (await bench.flash()).state is JobState.ROLLED_BACK

    run(work)


def failed(done: Job, *words: str) -> dict[str, Any]:
    assert (done.state, done.reason) == (JobState.FAILED, "UNHEALTHY")
    assert done.error is not None
    assert all(word in done.error["message"] for word in words), done.error["message"]
    return done.result or {}


def test_without_another_image_it_fails_and_says_so(tmp_path: Path) -> None:
    async def work() -> None:
        async with probed(tmp_path) as bench:
            failed(await bench.flash(), "it said nothing", "nothing to go back to", "no other image")
            assert bench.jobs.pinned() == set()
            bench["m1"].sick = ()
            assert (await bench.flash()).state is JobState.SUCCEEDED
            bench["m1"].sick = (FIRMWARE,)
            failed(await bench.flash(), "nothing to go back to", "this very one")
            assert len(bench["m1"].runs) == 3

    run(work)


def test_another_chip_does_not_get_the_bytes_of_the_one_before(tmp_path: Path) -> None:
    async def work() -> None:
        async with probed(tmp_path) as bench:
            await good(bench)
            bench["m1"].scripts = [Script(uid="0022")]
            failed(await bench.flash(), "other.elf", "belongs to another chip")
            assert flashed(bench) == [OTHER, FIRMWARE]

    run(work)


@pytest.mark.parametrize("how", ["gone", "other content", "full"])
def test_a_good_image_that_cannot_be_had(tmp_path: Path, how: str) -> None:
    async def work() -> None:
        async with probed(tmp_path) as bench:
            await good(bench)
            bench["m1"].scripts = [Script(hold_at="boot")]
            job = await bench.submit()
            await bench["m1"].at("boot").wait()
            if how == "gone":
                del bench.store.images[OTHER_FILE]
            elif how == "full":
                bench.free_bytes = FREE_BYTES - 1
            else:
                bench.store.images[OTHER_FILE] = Image.of([(0x08000000, b"changed")])
            bench["m1"].go.set()
            words = {"gone": "UNKNOWN_IMAGE", "full": "STORAGE_FULL", "other content": "does not give the content any more"}
            failed(await bench.end(job), "nothing to go back to", words[how])
            assert len(bench["m1"].runs) == 2

    run(work)


@pytest.mark.parametrize(
    ("error", "at"),
    [
        (Nack("refused"), "erased"),
        (EntryWouldBeLost("no BOOT0"), "identify"),
        (DeadlineExceeded("late"), "proven-1"),
        (WrongChip("another"), "identify"),
    ],
)
def test_a_restore_that_fails_says_both(tmp_path: Path, error: BridgedError, at: str) -> None:
    async def work() -> None:
        async with probed(tmp_path) as bench:
            await good(bench)
            bench["m1"].scripts = [Script(), Script(fail_at=at, error=error)]
            result = failed(await bench.flash(), "it said nothing", f"restoring other.elf failed: {error.code}")
            assert (result["unhealthy"]["code"], result["restore_error"]["code"]) == ("UNHEALTHY", error.code)
            assert result["restore"]["content"] == OTHER.digest
            assert bench.jobs.info("m1")["content"] == ""
            assert await good(bench)

    run(work)


def test_a_restored_image_that_is_not_healthy_either(tmp_path: Path) -> None:
    async def work() -> None:
        async with probed(tmp_path) as bench:
            await good(bench)
            bench["m1"].sick = (FIRMWARE, OTHER)
            result = failed(await bench.flash(), "restoring other.elf failed: UNHEALTHY")
            assert result["restore_error"]["code"] == "UNHEALTHY"
            assert flashed(bench) == [OTHER, FIRMWARE, OTHER]

    run(work)


def test_a_restore_on_a_swapped_board_is_refused_before_it_erases(tmp_path: Path) -> None:
    async def work() -> None:
        async with probed(tmp_path) as bench:
            await good(bench)
            bench["m1"].scripts = [Script(), Script(uid="0022")]
            result = failed(await bench.flash(), "WRONG_CHIP", "unique id 0011")
            assert result["restore_error"]["facts"] == {"expected": "0011", "found": "0022"}

    run(work)


@pytest.mark.parametrize("heard", [False, True], ids=["parser goes on", "parser hears the signal"])
def test_a_stop_while_the_last_known_good_is_parsed_parks_the_job(tmp_path: Path, heard: bool) -> None:
    async def work() -> None:
        async with probed(tmp_path) as bench:
            await good(bench)
            go, begun, load = threading.Event(), threading.Event(), bench.store.load

            def slow(staged: Any, *of: Any) -> Image:
                if staged.sha256 == OTHER_FILE:
                    begun.set()
                    assert go.wait(10)
                    if heard:
                        raise CorruptImage("the parser process crashed (SIGTERM)")
                return load(staged, *of)

            bench.store.unparsed.add(OTHER_FILE)
            bench.store.load = slow  # type: ignore[assignment,method-assign]
            job = await bench.submit()
            assert await asyncio.to_thread(begun.wait, 10)
            stopping = asyncio.ensure_future(bench.jobs.stop())
            await asyncio.sleep(0)
            if heard:
                go.set()
            await stopping
            go.set()
            assert bench.jobs.get(job.id).state is JobState.INTERRUPTED
        async with probed(tmp_path) as again:
            assert (await again.end(job)).state is JobState.ROLLED_BACK

    run(work)


# --- what is good -------------------------------------------------------------------------------------------------


def test_only_what_was_proven_and_asked_is_good(tmp_path: Path) -> None:
    """With a probe: an image that was found there already was not asked; one that was asked stays good."""

    async def work() -> None:
        async with probed(tmp_path) as bench:
            for kind in (JobKind.ENSURE, JobKind.VERIFY):
                bench["m1"].scripts = [Script(changed=False)]
                assert (await bench.end(await bench.submit(kind=kind, image="other.elf"))).state is JobState.SUCCEEDED
                failed(await bench.flash(), "no other image was proven and healthy")
            await good(bench)
            bench["m1"].scripts = [Script(changed=False)]
            await bench.end(await bench.submit(kind=JobKind.VERIFY))
            assert bench.jobs.pinned() == {FIRMWARE_FILE, OTHER_FILE}, "found there now, and the last good one"
            assert (await bench.flash()).state is JobState.ROLLED_BACK

    run(work)


def test_without_a_probe_proven_is_good(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            bench["m1"].scripts = [Script(changed=False)]
            await bench.end(await bench.submit(kind=JobKind.VERIFY, image="other.elf"))
            bench["m1"].sick = (FIRMWARE,)  # A probe is configured by now.
            done = await bench.flash()
            assert (done.state, (done.result or {})["health"]) == (JobState.ROLLED_BACK, "")
            assert done.error is not None
            assert done.error["message"].endswith("other.elf was restored and proven")

    run(work)


def test_what_a_verify_found_is_good_only_where_nothing_better_is_known(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            await bench.flash()
            bench["m1"].scripts = [Script(changed=False)]
            await bench.end(await bench.submit(kind=JobKind.VERIFY, image="other.elf"))
            assert bench.jobs.pinned() == {FIRMWARE_FILE, OTHER_FILE}, "found there now, and the last good one"

    async def ruled() -> None:
        rules = Policy(no_downgrade=True)
        async with Bench(tmp_path / "ruled", rules=rules) as bench:
            bench["m1"].scripts = [Script(changed=False)]
            await bench.end(await bench.submit(kind=JobKind.VERIFY, image="other.elf"))
            assert not bench.jobs._known.of("m1").good_content, "nobody has asked whether it may be written"

    run(work)
    (tmp_path / "ruled").mkdir()
    run(ruled)


def test_it_survives_a_restart_and_is_pinned(tmp_path: Path) -> None:
    async def work() -> None:
        async with probed(tmp_path) as bench:
            await good(bench, type="elf", patch="0x08000200:aa")
            content = bench["m1"].runs[0].image
        async with probed(tmp_path) as again:
            assert again.jobs.pinned() == {OTHER_FILE}
            assert (await again.flash()).state is JobState.ROLLED_BACK
            assert flashed(again) == [FIRMWARE, content]

    run(work)


def test_a_journal_from_before_knows_no_good_content(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    path.parent.mkdir(exist_ok=True)
    with sqlite3.connect(path) as old:
        old.executescript(f"{MIGRATIONS[0]}; PRAGMA application_id = {0x42524447}; PRAGMA user_version = 1;")
        row = ("m1", 0x449, "F7", "", "0011", 1, "", "", 1.0, "c" * 64, "f" * 64, "app", "full", 1.0, "f" * 64)
        old.execute(f"INSERT INTO targets VALUES ({', '.join('?' * len(row))})", row)
    old.close()
    journal = Journal.open(path)
    (record,) = journal.targets()
    journal.close()
    assert (record.good_image, record.good_content, record.good_pid, record.image_name) == ("f" * 64, "", 0, "app")
    assert VERSION > 1


# --- interrupted, canceled, stopped -------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [DIED, PortGone("unplugged")])
@pytest.mark.parametrize("at", ["lock", "identify", "erasing", "erased", "proven-1", "boot"])
def test_an_interrupted_restore_is_resumed_and_never_the_bad_image(tmp_path: Path, at: str, error: BridgedError) -> None:
    async def work() -> None:
        async with probed(tmp_path, resume_limit=1) as bench:
            await good(bench)
            # The restore has tries of its own, whatever the first session needed.
            bench["m1"].scripts = [Script(fail_at="erased", error=DIED), Script(), Script(fail_at=at, error=error)]
            done = await bench.flash()
            assert (done.state, done.attempts) == (JobState.ROLLED_BACK, 3)
            assert flashed(bench) == [OTHER, FIRMWARE, FIRMWARE, OTHER, OTHER]
            last = bench["m1"].runs[-1]
            assert last.kept == (KEPT_OF_OTHER if at in ("erasing", "erased", "proven-1", "boot") else b"")
            assert last.proven == sectors_of(OTHER)[: {"proven-1": 1, "boot": 2}.get(at, 0)]

    run(work)


def test_a_restore_that_is_interrupted_again_and_again_fails(tmp_path: Path) -> None:
    async def work() -> None:
        async with probed(tmp_path, resume_limit=2) as bench:
            await good(bench)
            bench["m1"].scripts = [Script(), *(Script(fail_at="erased", error=DIED) for _ in range(9))]
            result = failed(await bench.flash(), "restoring other.elf failed: SESSION_DIED")
            assert result["restore_error"]["facts"]["attempts"] == 3
            assert flashed(bench) == [OTHER, FIRMWARE, OTHER, OTHER, OTHER]

    run(work)


def test_a_restore_is_not_canceled_without_force(tmp_path: Path) -> None:
    async def work() -> None:
        async with probed(tmp_path) as bench:
            await good(bench)
            bench["m1"].scripts = [Script(), Script(hold_at="identify")]
            job = await bench.submit()
            await became_restoring(bench, job)
            bench["m1"].reached.clear()
            await bench["m1"].at("identify").wait()
            with pytest.raises(NotCancellable, match="restores the last known good image"):
                await bench.jobs.cancel(job.id)
            assert bench.jobs.get(job.id).phase == "restore"
            await bench.jobs.cancel(job.id, force=True)
            done = await bench.end(job)
            assert (done.state, done.reason) == (JobState.CANCELED, "CANCELED")
            assert done.result is not None
            assert done.result["unhealthy"]["code"] == "UNHEALTHY", "what was going on is told"

    run(work)


def test_who_forced_the_end_does_not_get_a_restore(tmp_path: Path) -> None:
    async def work() -> None:
        async with probed(tmp_path) as bench:
            await good(bench)
            bench["m1"].scripts = [Script(hold_at="boot")]
            job = await bench.submit()
            await bench["m1"].at("boot").wait()
            bench.jobs._book.live[job.id].cancel = True  # Heard too late for the last checkpoint.
            bench["m1"].go.set()
            failed(await bench.end(job), "nothing to go back to", "canceled")
            assert flashed(bench) == [OTHER, FIRMWARE]

    run(work)


def test_a_stop_in_the_middle_of_a_restore_parks_it(tmp_path: Path) -> None:
    async def work() -> None:
        async with probed(tmp_path) as bench:
            await good(bench)
            bench["m1"].scripts = [Script(), Script(hold_at="proven-1")]
            job = await bench.submit()
            await became_restoring(bench, job)
            bench["m1"].reached.clear()
            await bench["m1"].at("proven-1").wait()
        async with probed(tmp_path) as again:
            parked = again.jobs.get(job.id)
            assert (parked.state, parked.reason) == (JobState.INTERRUPTED, "stopped")
            assert OTHER_FILE in again.jobs.pinned()
            done = await again.end(job)
            assert (done.state, done.attempts) == (JobState.ROLLED_BACK, 1)
            assert flashed(again) == [OTHER]
            assert (again["m1"].runs[0].kept, again["m1"].runs[0].proven) == (KEPT_OF_OTHER, sectors_of(OTHER)[:1])

    run(work)


def test_an_image_that_is_lost_in_the_middle_of_a_restore(tmp_path: Path) -> None:
    async def work() -> None:
        async with probed(tmp_path) as bench:
            await good(bench)
            bench["m1"].scripts = [Script(), Script(hold_at="erased", fail_at="erased", error=DIED)]
            job = await bench.submit()
            await became_restoring(bench, job)
            bench["m1"].reached.clear()
            await bench["m1"].at("erased").wait()
            bench.store.load_error = CorruptImage("the card is failing")
            bench["m1"].go.set()
            failed(await bench.end(job), "restoring other.elf failed: IMAGE_CORRUPT")

    run(work)


# --- killed at every commit ---------------------------------------------------------------------------------------


def play(root: Path) -> tuple[Recorder, str]:
    recorder = Recorder(root / "first")
    jobs: list[str] = []

    async def work() -> None:
        async with probed(root / "live") as bench:
            await good(bench)
            recorder.attach(bench)
            job = await bench.submit()
            recorder.accepted[job.id] = "m1"
            jobs.append(job.id)
            assert (await bench.end(job)).state is JobState.ROLLED_BACK

    run(work)
    return recorder, jobs[0]


async def recover(moment: Moment, work: Path, job_id: str, recorder: Recorder | None = None) -> str:
    """Start on what ``moment`` left. ``first``, ``restore`` or ``ended``: where the job was."""
    shutil.copytree(moment.files, work)
    journal = Journal.open(work / "state.db")
    was, proven, kept = journal.job(job_id), journal.proven(job_id), journal.backup(job_id).kept
    hazards = [session.hazard_s for session in journal.sessions()]
    journal.close()
    bench = probed(work, time=Time(mono_s=50.0))
    if recorder is not None:
        recorder.attach(bench)
    async with bench:
        done = await bench.jobs.wait(job_id)
        assert done.state is JobState.ROLLED_BACK
        ends = [update.state for update in bench.jobs.log(job_id) if update.state in TERMINAL]
        assert ends == [JobState.ROLLED_BACK], "once"
        restoring = Restore.of(was) is not None
        expected = [] if was.terminal else [OTHER] if restoring else [FIRMWARE, OTHER]
        assert flashed(bench) == expected
        if expected:
            assert (bench["m1"].runs[0].proven, bench["m1"].runs[0].kept) == (proven, kept)
            assert set(proven) <= set(sectors_of(expected[0])), "nothing of the other content is believed"
        assert bench["m1"].released == len(hazards)
        assert sum(bench.time.slept) == pytest.approx(sum(hazards))
        assert (bench.jobs.info("m1")["content"], bench.jobs.pinned()) == (OTHER.digest, {OTHER_FILE})
        assert bench.journal.sessions() == []
    return "ended" if was.terminal else "restore" if restoring else "first"


def test_a_crash_at_every_commit_of_a_rollback(tmp_path: Path) -> None:
    recorder, job = play(tmp_path)
    seen: list[str] = []

    async def work(moment: Moment, number: int) -> None:
        seen.append(await recover(moment, tmp_path / f"again-{number}", job))

    for number, moment in enumerate(m for m in recorder.moments if m.accepted):
        run(lambda m=moment, n=number: work(m, n))  # type: ignore[misc]
    assert [seen.count(where) > 2 for where in ("first", "restore")] == [True, True]
    assert seen == sorted(seen, key=("first", "restore", "ended").index), "no way back"
    assert HAZARD_S > 0


def test_a_second_crash_at_every_commit_of_the_recovery(tmp_path: Path) -> None:
    recorder, job = play(tmp_path)
    first = next(m for m in recorder.moments if m.accepted)
    second = Recorder(tmp_path / "second")
    second.accepted[job] = "m1"

    async def work(moment: Moment, into: str, recorder: Recorder | None = None) -> None:
        await recover(moment, tmp_path / into, job, recorder)

    run(lambda: work(first, "again", second))
    assert len(second.moments) > 8
    for number, moment in enumerate(second.moments):
        run(lambda m=moment, n=number: work(m, f"third-{n}"))  # type: ignore[misc]
