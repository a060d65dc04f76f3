"""Jobs with several images and bytes of one unit: one content in the session, one meaning in the journal."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridged.errors import BadRequest, IdempotencyConflict, OverlappingImage, UnknownImage
from bridged.images.model import Image, Span
from bridged.jobs.model import JobKind, JobState, Submission
from tests.jobs.bench import FIRMWARE, FIRMWARE_FILE, OTHER, OTHER_FILE, Bench, Script, run

NAMED = "other.elf@0x08004000,firmware.elf"
CANONICAL = f"{OTHER_FILE}@0x08004000,{FIRMWARE_FILE}"
PATCH = "134217744:AABB,0x08008000:01"
BOTH = [(0x08000000, FIRMWARE.segments[0].data), (0x08004000, OTHER.segments[0].data)]
FIRST = FIRMWARE.segments[0].data
PATCHED = [(0x08000000, FIRST[:16] + b"\xaa\xbb" + FIRST[18:]), BOTH[1], (0x08008000, b"\x01")]


def flash(image: str = NAMED, id: str = "", kind: JobKind = JobKind.FLASH, **params: object) -> Submission:
    return Submission(kind, "m1", image, params, id, "tester")


def test_the_session_gets_one_image_and_where_its_parts_are(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            job = await bench.end(await bench.jobs.submit(flash(patch=PATCH)))
            assert (job.state, job.image) == (JobState.SUCCEEDED, CANONICAL)
            assert bench.store.used == ["other.elf", "firmware.elf"], "no clean-up takes them before the job is queued"
            assert job.params == {"patch": "0x08000010:aabb,0x08008000:01"}
            wanted = Image.of(PATCHED)
            (done,) = bench["m1"].runs
            assert done.image == wanted
            assert done.spans == (
                Span("firmware.elf", 0x08000000, 0x08000000 + FIRMWARE.size_bytes),
                Span("other.elf", 0x08004000, 0x08004000 + OTHER.size_bytes),
            )
            info = bench.jobs.info("m1")
            assert (info["content"], info["image"]) == (wanted.digest, CANONICAL)
            assert info["image_name"] == "other.elf+firmware.elf (patched)"
            assert bench.jobs.pinned() == {FIRMWARE_FILE, OTHER_FILE}
            plan = await bench.jobs.plan("m1", NAMED, {"patch": PATCH, "force": "vectors"})
            assert (plan["proven"], plan["content"]) == (True, wanted.digest)
            assert [part["name"] for part in plan["part"]] == ["firmware.elf", "other.elf", "patch", "patch"]

    run(work)


def test_one_image_alone_needs_no_telling_apart(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            await bench.flash()
            assert (bench["m1"].runs[0].image, bench["m1"].runs[0].spans) == (FIRMWARE, ())

    run(work)


def test_the_same_id_and_meaning_is_the_same_job_in_whatever_words(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            first = await bench.jobs.submit(flash(id="x", patch=PATCH))
            words = f"sha256:{OTHER_FILE.upper()}@0x8004000,{FIRMWARE_FILE}"
            again = await bench.jobs.submit(flash(words, "x", patch="0x08008000:01,0x08000010:aabb"))
            assert again.id == first.id
            for other in (
                flash(id="x"),
                flash(id="x", patch="0x08000010:aabc,0x08008000:01"),
                flash("firmware.elf,other.elf@0x08004000", "x", patch=PATCH),
                flash("firmware.elf", "x", patch=PATCH),
            ):
                with pytest.raises(IdempotencyConflict):
                    await bench.jobs.submit(other)
            alone = await bench.jobs.submit(flash("firmware.elf", "y", addr=0x08000000))
            assert (await bench.jobs.submit(flash("firmware.elf@0x08000000", "y"))).id == alone.id
            await bench.end(alone)
            # An image that has gone since: the job is found by what the journal has.
            del bench.store.images[OTHER_FILE]
            again = await bench.jobs.submit(flash(CANONICAL, "x", patch=PATCH))
            assert again.id == first.id
            with pytest.raises(UnknownImage):
                await bench.jobs.submit(flash(CANONICAL, "z", patch=PATCH))

    run(work)


def test_ensure_compares_the_combined_content(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            first = await bench.end(await bench.jobs.submit(flash(kind=JobKind.ENSURE, patch=PATCH)))
            assert first.content == Image.of(PATCHED).digest
            bench["m1"].scripts = [Script(changed=False)]
            again = await bench.end(await bench.jobs.submit(flash(kind=JobKind.ENSURE, patch=PATCH)))
            assert (again.content, (again.result or {})["changed"]) == (first.content, False)
            plain = await bench.end(await bench.jobs.submit(flash(kind=JobKind.VERIFY)))
            assert plain.content == Image.of(BOTH).digest != first.content
            # A session that proved anything else is never believed.
            bench["m1"].scripts = [Script(content=FIRMWARE.digest)]
            assert (await bench.end(await bench.jobs.submit(flash()))).state is JobState.FAILED

    run(work)


def test_an_overlap_is_a_refusal_that_names_both_and_touches_nothing(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            job = await bench.end(await bench.jobs.submit(flash("firmware.elf,other.elf")))
            assert job.state is JobState.REJECTED
            assert (job.error or {})["code"] == OverlappingImage.code
            assert "firmware.elf" in (job.error or {})["message"]
            assert "other.elf" in (job.error or {})["message"]
            assert bench["m1"].runs == []

    run(work)


@pytest.mark.parametrize(
    "bad",
    [
        flash("firmware.elf,"),
        flash("firmware.elf,other.elf", addr=0x08000000),
        flash(patch="0x10"),
        flash(patch=",".join(f"{at * 1024}:{'00' * 1024}" for at in range(9))),  # the request would be longer than is kept
    ],
)
def test_what_makes_no_sense_never_becomes_a_job(tmp_path: Path, bad: Submission) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            with pytest.raises(BadRequest):
                await bench.jobs.submit(bad)
            assert bench.jobs.list() == []

    run(work)


def test_after_a_restart_the_job_means_the_same_content(tmp_path: Path) -> None:
    async def work() -> None:
        bench = Bench(tmp_path)
        bench["m1"].scripts = [Script(hold_at="proven-1")]
        async with bench:
            job = await bench.jobs.submit(flash(patch=PATCH))
            await bench["m1"].at("proven-1").wait()
        second = Bench(tmp_path, time=bench.time)
        async with second:
            done = await second.end(second.jobs.get(job.id))
            assert (done.state, done.content) == (JobState.SUCCEEDED, Image.of(PATCHED).digest)
            assert second["m1"].runs[0].image == bench["m1"].runs[0].image == Image.of(PATCHED)
            assert second["m1"].runs[0].spans == bench["m1"].runs[0].spans

    run(work)
