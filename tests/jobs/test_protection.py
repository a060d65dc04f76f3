"""Protection and option bytes as jobs: the real service and journal, and real sessions on a simulated part in virtual time.

Only processes and wires are missing: what the owner of a target does when a session dies (wait out the hazard, back to the
application) is done by ``SimulatedTarget``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from bridged import chips, errors
from bridged.config import Target as TargetConfig
from bridged.errors import BridgedError, SessionDied
from bridged.events import Event, SectorProven
from bridged.images.model import Image, Span
from bridged.jobs.journal import Journal
from bridged.jobs.model import Job, JobKind, JobState
from bridged.protocol.flow import Barrier
from bridged.sim import virtual
from bridged.sim.application import Behaviour
from bridged.sim.device import Device
from bridged.sim.loader import Timing
from bridged.sim.virtual import Account, PowerCut, VirtualUart
from bridged.target import session
from bridged.target.expect import Conversation
from bridged.target.request import NO_PAST, Past, Request
from bridged.target.wishes import ERASE_EVERYTHING, wishes_of
from tests.jobs import bench as scripted
from tests.jobs.bench import TIMEOUT_S, run
from tests.target.bench import WIRED, make_image

GOOD, BAD = (make_image(chips.find("F407"), 3000, seed=n, banner=text) for n, text in ((1, b"good"), (2, b"bad")))
WHOLE: dict[str, Any] = {"unprotect": True, "protect": True, "force": ERASE_EVERYTHING}


class SimulatedTarget(scripted.ScriptedTarget):
    """Its sessions are real ones, on a simulated F407. ``deaths``: after how many frames the next sessions are killed."""

    def __init__(self, health: str = "") -> None:
        super().__init__("m1", scripted.Wires(scripted.Time()))
        self.probe = Conversation(expect=health) if health else Conversation()
        timing = Timing(mass_erase_s=1.0, sector_erase_s=0.2)
        chip = chips.find("F407")
        self.device = Device(chip, flash_bytes=512 * 1024, rate_error=0.0, timing=timing, application=Behaviour(), seed=7)
        self.account = Account()
        self.sessions = 0
        self.deaths: list[int | None] = []

    def put(self, image: Image, *, rdp: int) -> None:
        for seg in image.segments:
            self.device.memory.program(seg.address, seg.data)
        self.device.memory.set_rdp(rdp)

    def holds(self, image: Image) -> bool:
        return all(self.device.memory.read(seg.address, len(seg.data)) == seg.data for seg in image.segments)

    async def run(
        self,
        kind: str,
        params: dict[str, Any],
        image: Image | None,
        *,
        job_id: str,  # noqa: ARG002
        kept: bytes = b"",
        proven: tuple[SectorProven, ...] = (),
        spans: tuple[Span, ...] = (),  # noqa: ARG002
        past: Past = NO_PAST,
        on_event: Callable[[Event], None],
        on_progress: Callable[[int], None],  # noqa: ARG002
        on_barrier: Callable[[str, float, bytes], Awaitable[None]],
    ) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        self.sessions += 1
        self.account = Account()
        request = Request(
            kind,
            WIRED,
            "F407",
            health=self.probe,
            force=frozenset(str(params.get("force") or "").split(",")) - {""},
            discard_outside=params.get("outside") == "discard",
            proven=proven,
            past=past,
            wishes=wishes_of(kind, params),
        )
        waiting_s = [0.0]

        def barrier(step: Barrier) -> None:
            waiting_s[0] = 0.0 if step.state == "erased" else step.hazard_s
            work = on_barrier(step.state, step.hazard_s, step.kept)
            asyncio.run_coroutine_threadsafe(_as_coroutine(work), loop).result(TIMEOUT_S)

        def work() -> dict[str, Any]:
            done = virtual.run(
                session.run(request, image, kept),
                self.device,
                account=self.account,
                barrier=barrier,
                report=lambda event: loop.call_soon_threadsafe(on_event, event),  # type: ignore[arg-type]
                cut_after_exchange=self.deaths.pop(0) if self.deaths else None,
            )
            return {**done.to_dict(), "data": done.data}

        try:
            return await asyncio.to_thread(work)
        except PowerCut:
            self._release(waiting_s[0])
            raise SessionDied("killed") from None
        finally:
            await asyncio.sleep(0)

    def _release(self, hazard_s: float) -> None:
        uart = VirtualUart(self.device)
        uart.pause(hazard_s)
        assert not self.device.hazard, "the hazard is longer than was told"
        uart.set_lines(boot0=False, reset=True)
        uart.pause(0.05)
        uart.set_lines(reset=False)
        uart.pause(0.3)

    async def release_after(self, hazard_s: float, empty: str = "", *, erased: bool = False) -> None:  # noqa: ARG002
        self._release(hazard_s)


async def _as_coroutine(work: Awaitable[None]) -> None:
    await work


class Bench(scripted.Bench):
    def __init__(self, root: Path, target: SimulatedTarget, **settings: Any) -> None:
        super().__init__(root, health=target.probe.expect, **settings)
        self.target = target
        lane = self.jobs._lanes["m1"]
        lane.port = target
        self.store.images = {scripted.FIRMWARE_FILE: GOOD, scripted.OTHER_FILE: BAD}

    async def __aenter__(self) -> Bench:
        await super().__aenter__()
        return self

    async def job(self, kind: JobKind, **params: Any) -> Job:
        return await self.end(await self.submit(kind=kind, **params))


def result_of(job: Job) -> dict[str, Any]:
    assert job.state is JobState.SUCCEEDED, job.error
    assert job.result is not None
    return job.result


def test_a_field_protected_target_is_updated_in_one_job_and_ensure_answers_by_record(tmp_path: Path) -> None:
    async def work() -> None:
        target = SimulatedTarget()
        target.put(BAD, rdp=1)
        async with Bench(tmp_path, target) as bench:
            refused = await bench.job(JobKind.FLASH)
            assert (refused.state, refused.reason) == (JobState.FAILED, "READ_PROTECTED")
            assert not refused.touched
            done = await bench.job(JobKind.FLASH, **WHOLE)
            assert (result_of(done)["evidence"], result_of(done)["protected"]) == ("full", True)
            assert target.holds(GOOD)
            assert target.device.memory.rdp == 1
            phases = list(dict.fromkeys(u.phase for u in bench.jobs.log(done.id)))
            wanted = ["unprotect", "erase", "write", "verify", "boot", "protect"]
            assert [p for p in phases if p in wanted] == wanted
            proven = bench.jobs.info("m1")["proven"]
            bench.time.pass_(3600)
            same = await bench.job(JobKind.ENSURE)
            assert (result_of(same)["evidence"], result_of(same)["changed"]) == ("record", False)
            assert result_of(same)["age_s"] >= 3600
            info = bench.jobs.info("m1")
            assert (info["proven"], info["evidence"]) == (proven, "full"), "a record does not get younger by being asked"
            assert info["uid"], "what cannot be read is not forgotten"
            other = await bench.job(JobKind.ENSURE, image="other.elf")
            assert (other.state, other.reason) == (JobState.FAILED, "READ_PROTECTED")
            # And with the wish it is done, whatever is there.
            again = await bench.job(JobKind.ENSURE, image="other.elf", **WHOLE)
            assert result_of(again)["evidence"] == "full"
            assert target.holds(BAD)
            assert (bench.journal.sessions(), target.account.violations) == ([], [])

    run(work)


def test_an_ensure_by_record_is_void_after_anything_was_erased(tmp_path: Path) -> None:
    async def work() -> None:
        target = SimulatedTarget()
        async with Bench(tmp_path, target) as bench:
            result_of(await bench.job(JobKind.FLASH, protect=True, outside="discard"))
            assert bench.jobs.info("m1")["content"] == GOOD.digest
            result_of(await bench.job(JobKind.UNPROTECT, force=ERASE_EVERYTHING))
            assert bench.jobs.info("m1")["content"] == ""
            result_of(await bench.job(JobKind.PROTECT))
            nothing = await bench.job(JobKind.ENSURE)
            assert (nothing.state, nothing.reason) == (JobState.FAILED, "READ_PROTECTED")

    run(work)


def test_protecting_keeps_what_is_known_of_the_flash(tmp_path: Path) -> None:
    async def work() -> None:
        target = SimulatedTarget()
        async with Bench(tmp_path, target) as bench:
            result_of(await bench.job(JobKind.FLASH, outside="discard"))
            options = result_of(await bench.job(JobKind.OPTION_BYTES, set="BOR_LEV:1"))["options"]
            assert (options["before"]["fields"]["BOR_LEV"], options["after"]["fields"]["BOR_LEV"]) == (3, 1)
            result_of(await bench.job(JobKind.PROTECT, what="write", sectors="5"))
            result_of(await bench.job(JobKind.PROTECT))
            assert bench.jobs.info("m1")["content"] == GOOD.digest
            assert result_of(await bench.job(JobKind.ENSURE))["evidence"] == "record"

    run(work)


@pytest.mark.parametrize("when", range(0, 130, 3))
def test_the_one_job_survives_the_death_of_its_session_at_any_frame(tmp_path: Path, when: int) -> None:
    async def work() -> None:
        target = SimulatedTarget()
        target.put(BAD, rdp=1)
        target.deaths = [when, when // 2]  # And of the one after it.
        async with Bench(tmp_path, target, resume_limit=5) as bench:
            done = await bench.job(JobKind.FLASH, **WHOLE)
            assert (result_of(done)["evidence"], result_of(done)["protected"]) == ("full", True)
            assert target.holds(GOOD)
            assert target.device.memory.rdp == 1
            assert (target.account.violations, target.device.stats.hazard_resets) == ([], [])
            assert done.attempts == target.sessions
            assert bench.journal.sessions() == []

    run(work)


def test_a_daemon_that_is_killed_before_the_protection_does_not_erase_again_for_it(tmp_path: Path) -> None:
    """What is on disk then says that all is proven: the next daemon protects, and erases nothing."""

    async def first() -> None:
        target = SimulatedTarget()
        target.put(BAD, rdp=1)
        async with Bench(tmp_path, target) as bench:
            step = target.run

            async def dies(*args: Any, **named: Any) -> dict[str, Any]:
                barrier = named["on_barrier"]

                async def on_barrier(state: str, hazard_s: float, kept: bytes) -> None:
                    await barrier(state, hazard_s, kept)
                    if state == "protecting":
                        raise errors.Stopped("the daemon is stopping")

                return await step(*args, **{**named, "on_barrier": on_barrier})

            target.run = dies  # type: ignore[method-assign]
            job = await bench.submit(**WHOLE)
            while not bench.jobs.get(job.id).touched or target.device.memory.rdp or not target.holds(GOOD):
                await asyncio.sleep(0.01)
            bench.jobs._book.stopping.set()
            while bench.jobs.get(job.id).state is JobState.RUNNING:
                await asyncio.sleep(0.01)
            bench.jobs._book.stopping.clear()
            found.append((job.id, target))

    async def second() -> None:
        job_id, target = found[0]
        target = _again(target)
        before = target.device.stats.mass_erases, sum(target.device.stats.erases.values())
        async with Bench(tmp_path, target, journal=Journal.open(tmp_path / "state.db")) as bench:
            done = await bench.end(bench.jobs.get(job_id))
            assert (result_of(done)["evidence"], result_of(done)["protected"]) == ("full", True)
            assert (target.device.stats.mass_erases, sum(target.device.stats.erases.values())) == before
            assert target.device.memory.rdp == 1
            assert target.holds(GOOD)

    found: list[tuple[str, SimulatedTarget]] = []
    run(first)
    run(second)


def _again(target: SimulatedTarget) -> SimulatedTarget:
    """The same board behind a new daemon."""
    new = SimulatedTarget()
    new.device = target.device
    return new


def test_what_is_restored_is_protected_as_well(tmp_path: Path) -> None:
    async def work() -> None:
        target = SimulatedTarget(health="good")
        async with Bench(tmp_path, target) as bench:
            result_of(await bench.job(JobKind.FLASH, protect=True, outside="discard"))
            assert target.device.memory.rdp == 1
            done = await bench.job(JobKind.FLASH, image="other.elf", **WHOLE)
            assert done.state is JobState.ROLLED_BACK, done.error
            assert target.holds(GOOD)
            assert target.device.memory.rdp == 1, "a field-protected target is never left open"

    run(work)


@pytest.mark.parametrize(
    ("kind", "params", "error"),
    [
        (JobKind.UNPROTECT, {}, errors.ConsentMissing),
        (JobKind.FLASH, {"unprotect": True}, errors.ConsentMissing),
        (JobKind.ENSURE, {"unprotect": True, "force": "vectors"}, errors.ConsentMissing),
        (JobKind.OPTION_BYTES, {"set": "RDP:2"}, errors.NotAllowed),
        (JobKind.OPTION_BYTES, {"set": "BOOT_LOCK:1"}, errors.NotAllowed),
        (JobKind.OPTION_BYTES, {"raw": "0x1FFFC000:EFAA"}, errors.BadRequest),
        (JobKind.PROTECT, {"what": "write"}, errors.BadRequest),
    ],
)
def test_what_can_never_run_waits_in_no_queue(
    tmp_path: Path, kind: JobKind, params: dict[str, Any], error: type[BridgedError]
) -> None:
    async def work() -> None:
        async with Bench(tmp_path, SimulatedTarget()) as bench:
            with pytest.raises(error):
                await bench.submit(kind=kind, **params)
            assert bench.jobs.list() == []

    run(work)


def test_raw_bytes_that_would_lock_the_part_are_refused_and_the_job_says_so(tmp_path: Path) -> None:
    async def work() -> None:
        target = SimulatedTarget()
        async with Bench(tmp_path, target) as bench:
            done = await bench.job(JobKind.OPTION_BYTES, raw="0x1FFFC000:EFCC", fields="RDP")
            assert (done.state, done.reason, done.touched) == (JobState.REJECTED, "NOT_ALLOWED", False)
            assert target.device.memory.rdp == 0

    run(work)


def test_a_plan_says_that_everything_may_be_erased(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path, SimulatedTarget()) as bench:
            bench.jobs._lanes["m1"].settings = TargetConfig(chip="F407", flash_kib=512)
            assert "if_protected" not in await bench.jobs.plan("m1", "firmware.elf", {})
            assert "whole flash" in (await bench.jobs.plan("m1", "firmware.elf", WHOLE))["if_protected"]
            with pytest.raises(errors.ConsentMissing):
                await bench.jobs.plan("m1", "firmware.elf", {"unprotect": True})
            bench.jobs._lanes["m1"].settings = TargetConfig(chip="F407", flash_kib=512, protect=["0x08060000+1"])
            await bench.jobs.plan("m1", "firmware.elf", {})
            with pytest.raises(errors.NotAllowed):
                await bench.jobs.plan("m1", "firmware.elf", WHOLE)

    run(work)
