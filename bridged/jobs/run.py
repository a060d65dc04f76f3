"""One run of one job: from its turn to its end, or to interrupted again.

- Before a session starts the journal says that the target is in one; before its first destructive command the journal has the
  kept bytes, the hazard and the loss of what was known about the flash, in one transaction.
- How a session's end becomes a state is in ``_outcome``, and nowhere else.
- A new image that is unhealthy is followed by a second session of the same job, which restores the last known good one: see
  ``rollback`` and ``_go_back``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bridged.errors import (
    BadRequest,
    BridgedError,
    Canceled,
    DeadlineExceeded,
    DigestMismatch,
    EntryWouldBeLost,
    ImageError,
    JournalError,
    LayoutUnknown,
    NotAllowed,
    OutsideUnreadable,
    PortGone,
    SessionDied,
    Stopped,
    StorageError,
    Unhealthy,
    WrongChip,
    from_dict,
)
from bridged.events import (
    Event,
    Identified,
    Phase,
    PhaseStarted,
    Restoring,
    RolledBack,
    SectorErased,
    SectorProven,
    StepDone,
    encode,
)
from bridged.images import content
from bridged.images.content import Content, Wanted
from bridged.images.model import Image, Span
from bridged.jobs import policy, rollback
from bridged.jobs.admission import Admission
from bridged.jobs.book import Book
from bridged.jobs.contents import Contents
from bridged.jobs.journal import Journal
from bridged.jobs.known import Known
from bridged.jobs.lane import Debt, Lane, Live
from bridged.jobs.model import ABSENT, DESTRUCTIVE, PARKED, PROVING, WRITING, Job, JobKind, JobState
from bridged.jobs.ports import Clock
from bridged.jobs.records import Backup, OpenSession
from bridged.jobs.recovery import Recovery
from bridged.jobs.results import Results
from bridged.jobs.traces import Traces
from bridged.target.request import Past

log = logging.getLogger(__name__)

LOG_LIMIT = 2000  # Notable events of one job in its log; state and phase changes beyond that are still taken.
REFUSALS = (ImageError, WrongChip, EntryWouldBeLost, LayoutUnknown, OutsideUnreadable, NotAllowed, BadRequest)


class Runner:
    """``resume_limit``: so many attempts, orderly stops not counted, before an interrupted job is given up."""

    def __init__(
        self,
        journal: Journal,
        contents: Contents,
        results: Results,
        traces: Traces,
        book: Book,
        known: Known,
        admission: Admission,
        recovery: Recovery,
        clock: Clock,
        resume_limit: int,
    ) -> None:
        self._journal = journal
        self._contents = contents
        self._results = results
        self._traces = traces
        self._book = book
        self._known = known
        self._admission = admission
        self._recovery = recovery
        self._clock = clock
        self._resume_limit = resume_limit

    async def run(self, lane: Lane, live: Live) -> None:
        """From queued, waiting or interrupted to a terminal state, or to interrupted again."""
        before = live.job
        live.resumed = before.state is JobState.INTERRUPTED
        live.restore = rollback.Restore.of(before)
        attempts = before.attempts - (live.restore.attempts - 1 if live.restore else 0)
        if live.resumed and before.reason != PARKED and attempts > self._resume_limit:
            text = f"interrupted in {before.attempts} of {before.attempts} attempts (the last time: {before.reason})"
            last = before.error or SessionDied(text).as_dict()
            last = {**last, "facts": {**last["facts"], "attempts": before.attempts}}
            await self._recovery.start_anyway(lane, before.id)
            await self._finish(lane, live, {}, from_dict(last))
            return
        try:
            if before.kind in DESTRUCTIVE:
                self._admission.check_space()
        except StorageError as error:
            await self._finish(lane, live, {}, error)
            return
        async with live.lock:
            if live.job.terminal:
                return  # Canceled while we came here.
            await self._book.step(
                live,
                JobState.RUNNING,
                phase=(Phase.RESTORE if live.restore else Phase.STAGE).value,
                reason="",
                error=None,
                done=0,
                total=0,
                started=before.started or self._clock.utc(),
                attempts=before.attempts + (0 if live.resumed and before.reason == PARKED else 1),
            )
        live.phase_since = self._clock.monotonic()
        result, problem = await self._attempt(lane, live)
        if isinstance(problem, Unhealthy) and live.restore is None:
            problem = await self._go_back(lane, live, problem)
            if live.restore is not None:
                result, problem = await self._attempt(lane, live)
        state = _outcome(problem, live.job.touched)
        if state is JobState.INTERRUPTED:
            # A session that stopped by itself, because it heard nothing of the journal, counts as an attempt like any other.
            parked = isinstance(problem, Stopped) and self._book.stopping.is_set()
            gone = isinstance(problem, PortGone)
            reason = PARKED if parked else ABSENT if gone else str(problem.code if problem else "")
            await self.end(lane, live, state, problem, reason=reason)
        else:
            if isinstance(problem, DeadlineExceeded):
                await self._recovery.start_anyway(lane, live.job.id)
            self._known.ended(lane, live, result, problem)
            await self._finish(lane, live, result, problem)

    async def _attempt(self, lane: Lane, live: Live) -> tuple[dict[str, Any], BridgedError | None]:
        """One session, and what it died of."""
        result: dict[str, Any] = {}
        problem: BridgedError | None = None
        lane.port.last_trace = ""  # A job that ends before it has a session must not be given the recording of another one.
        try:
            result = await self._session(lane, live)
        except BridgedError as error:
            problem = error
        except Exception as error:
            log.exception("defect while job %s ran", live.job.id)
            problem = BridgedError(f"{type(error).__name__}: {error}")
        finally:
            live.in_session = False
        if lane.port.unreleased and lane.debt is None:
            lane.debt = Debt(self._clock.monotonic(), live.job.id)  # The session stays in the journal until it is paid (P4).
        await self._keep_trace(lane, live, problem)
        return result, problem

    async def _go_back(self, lane: Lane, live: Live, unhealthy: Unhealthy) -> BridgedError:
        """Begin to restore the last known good: ``live.restore`` is set and on disk then. Without one the error says why.

        ``Stopped`` while the daemon ends: the job is parked, and finds its image unhealthy again when it goes on.
        """
        record = self._known.of(lane.name)
        why = "the job was canceled" if live.cancel else rollback.why_not(record, live.job)
        if not why:
            restore = rollback.begin(record, live.job, unhealthy)
            try:
                self._admission.check_space()
                # Before the journal says so: a file that is lost, or means something else now, is nothing to go back to.
                built = await self._staged(live, restore.wanted())
                if built.image.digest == restore.content:
                    async with live.lock:
                        # What was proven and kept until now belongs to the other content; in flash it is all there.
                        live.unsaved_proven.clear()
                        told = restore.as_result()
                        anew = Backup(live.uid)
                        await self._book.step(live, None, anew=anew, phase=Phase.RESTORE.value, done=0, total=0, result=told)
                    live.restore = restore
                    return unhealthy
                why = f"{restore.name} does not give the content any more that was proven ({restore.content[:12]})"
            except BridgedError as error:
                if self._book.stopping.is_set():  # Whatever it says: the parser may have heard the same signal.
                    return Stopped("the daemon is stopping")
                why = f"{restore.name} cannot be restored: {error.code}: {error.message}"
        return Unhealthy(f"{unhealthy.message}; there is nothing to go back to: {why}", **unhealthy.facts)

    async def _finish(self, lane: Lane, live: Live, result: dict[str, Any], problem: BridgedError | None) -> None:
        """End a job, with what came of its restore if it was in one."""
        restore = live.restore
        state = JobState.FAILED if live.job.state is JobState.INTERRUPTED else _outcome(problem, live.job.touched)
        if restore is None:
            await self.end(lane, live, state, problem, result=result or None)
        elif problem is None:
            done = RolledBack(restore.name, restore.content, str(result.get("health", "")))
            self._book.note(live, event=encode(done))
            said = f"{restore.name} was restored and proven" + (", and is healthy" if done.health else "")
            told = {**result, "restored": restore.name, "restored_image": restore.image}
            await self.end(lane, live, JobState.ROLLED_BACK, restore.said(said), result=told)
        elif state is JobState.CANCELED:
            await self.end(lane, live, state, problem, result=restore.as_result(problem))
        else:
            said = f"restoring {restore.name} failed: {problem.code}: {problem.message}"
            await self.end(lane, live, JobState.FAILED, restore.said(said), result=restore.as_result(problem))

    async def end(
        self,
        lane: Lane,
        live: Live,
        to: JobState,
        problem: BridgedError | dict[str, Any] | None,
        *,
        reason: str = "",
        result: dict[str, Any] | None = None,
    ) -> None:
        """The end of a run. It is not shown before it is on disk, so a disk that takes nothing delays it; it never loses it."""
        error = problem.as_dict() if isinstance(problem, BridgedError) else problem
        # Lines that are not back at idle stay in the journal: the next start tries again.
        close = lane.name if lane.debt is None and lane.port.state != "broken" else ""
        result = result or live.job.result  # A job that is interrupted in its restore remembers that it is.
        changes: dict[str, Any] = {"error": error, "result": result, "reason": reason or str((error or {}).get("code", ""))}
        while True:
            try:
                async with live.lock:
                    if not live.job.terminal:
                        await self._book.step(live, to, close=close, **changes)
                return
            except (StorageError, JournalError) as trouble:
                if live.job.reason != trouble.code:
                    log.warning("job %s has ended as %s and that cannot be written: %s", live.job.id, to, trouble.message)
                    self._book.note(live, reason=trouble.code)  # So that who looks sees what a job waits for that seems to run.
                if self._book.stopping.is_set():
                    return  # It is taken up again at the next start; what it proved is proven then.
                await self._book.pause()

    async def _keep_trace(self, lane: Lane, live: Live, problem: BridgedError | None) -> None:
        text = lane.port.last_trace
        if text and ((problem is not None and not isinstance(problem, Stopped | Canceled)) or live.job.params.get("trace")):
            with contextlib.suppress(BridgedError, OSError):
                await asyncio.to_thread(self._traces.save, live.job.id, text)

    # --- one session ----------------------------------------------------------------------------------------------

    async def _session(self, lane: Lane, live: Live) -> dict[str, Any]:
        job, restore = live.job, live.restore
        image: Image | None = None
        spans: tuple[Span, ...] = ()
        if job.image:
            wanted = restore.wanted() if restore else content.wanted(job.image, job.params)
            if job.kind in WRITING and restore is None:
                # One that has begun to erase is finished, whatever the rules say by now; the version that it proves counts.
                with contextlib.suppress(*([BridgedError] if job.touched else [])):
                    live.verdict = await asyncio.to_thread(self._admission.check_policy, lane, job.image, job.params)
            loaded = await self._staged(live, wanted)
            image, live.image_name, spans = loaded.image, loaded.name, loaded.spans
            if restore is None:
                live.job = job = replace(live.job, content=image.digest)
            elif image.digest != restore.content:
                raise DigestMismatch(f"{restore.name} does not give the content any more that was proven in {lane.name}")
        past = await asyncio.to_thread(self._known.past, live.job)
        if image is not None and restore is None and _by_record(job, past, image):
            age_s = round(past.age_s, 1)
            return {"kind": job.kind.value, "changed": False, "content": image.digest, "evidence": "record", "age_s": age_s}
        proven: tuple[SectorProven, ...] = ()
        if job.touched:
            proven = await asyncio.to_thread(self._journal.proven, job.id)
            live.backup = await asyncio.to_thread(self._journal.backup, job.id)
        else:
            # What an earlier attempt found right it may find otherwise now, and erase: nothing was put on disk for it.
            live.unsaved_proven.clear()
        live.uid = ""
        await self._book.save(live, session=self._opened(lane, live, 0.0), anew=not job.touched)
        self._check_wanted(live)
        live.in_session = True
        result = await lane.port.run(
            (JobKind.FLASH if restore else job.kind).value,
            restore.params(job.params) if restore else dict(job.params),
            image,
            job_id=job.id,
            kept=live.backup.kept,
            proven=proven,
            spans=spans,
            past=past,
            on_event=lambda event: self._observe(lane, live, event),
            on_progress=lambda done: self._book.progress(live, done),
            on_barrier=lambda state, hazard_s, kept: self._barrier(lane, live, state, hazard_s, kept),
        )
        live.in_session = False
        data = result.pop("data", None)
        if job.kind is JobKind.READ:
            result.update(await asyncio.to_thread(self._results.save, job.id, bytes(data or b"")))
        less = _weaker(job, result)
        if less and (result.get("changed") or result.get("content") != past.content):
            raise BridgedError(f"the session of job {job.id} answered by a record that says something else")
        if job.kind in PROVING and not less and result.get("evidence") != "full":  # P3, whatever the session thinks.
            raise BridgedError(f"the session of job {job.id} ended without a full comparison", evidence=result.get("evidence"))
        if image is not None and result.get("content") != image.digest:
            raise BridgedError(
                f"the session of job {job.id} proved other content than the image's", content=result.get("content")
            )
        return result

    async def _staged(self, live: Live, wanted: Wanted) -> Content:
        """Parsing, and waiting for a parser, can take minutes: a stop and a cancel end it."""
        self._check_wanted(live)
        live.staging = asyncio.ensure_future(self._contents.build(wanted))
        try:
            return await live.staging
        except asyncio.CancelledError:
            self._check_wanted(live)
            raise
        finally:
            live.staging = None

    def _check_wanted(self, live: Live) -> None:
        if self._book.stopping.is_set():
            raise Stopped("the daemon is stopping")
        if live.cancel:
            raise Canceled("canceled before the restore began" if live.restore else "canceled before anything was touched")

    def _opened(self, lane: Lane, live: Live, hazard_s: float) -> OpenSession:
        clock = self._clock
        return OpenSession(lane.name, live.job.id, hazard_s, clock.boot_id, clock.utc())

    async def _barrier(self, lane: Lane, live: Live, state: str, hazard_s: float, kept: bytes) -> None:
        """Returns when the journal has it. ``erased`` ends the hazard; every other state begins a destructive stage."""
        if state == "erased":
            # A session that has erased is let go on whatever the disk does; the hazard stays noted then, which only costs time.
            with contextlib.suppress(StorageError, JournalError):
                await self._book.save(live, session=self._opened(lane, live, 0.0))
            return
        if self._book.stopping.is_set():
            raise Stopped("the daemon is stopping; nothing was erased")
        if live.cancel and not live.job.touched:
            raise Canceled("canceled before anything was erased")
        if (live.resumed or live.restore) and live.backup.uid and live.uid and live.uid != live.backup.uid:
            raise WrongChip(
                f"the job was interrupted on the chip with unique id {live.backup.uid}, and now {live.uid} answers: the kept "
                "bytes and the proven sectors belong to the other one",
                expected=live.backup.uid,
                found=live.uid,
            )
        if not live.job.touched and live.restore is None:
            answered = self._known.of(lane.name).pid
            policy.check_chip(policy.Target(lane.name, answered), live.verdict)
        backup = Backup(live.uid or live.backup.uid, kept or live.backup.kept)
        before, record = live.job, self._known.get(lane.name)
        live.job = replace(live.job, touched=True)  # At once: whoever saves this job meanwhile must not say otherwise.
        if state == "erasing":  # Protection and option bytes leave the flash as it is.
            self._known.void(lane.name)
        opened = self._opened(lane, live, hazard_s)
        try:
            await self._book.save(live, session=opened, backup=backup, record=self._known.get(lane.name))
        except BridgedError:
            live.job = replace(live.job, touched=before.touched)
            if record is not None:
                self._known.put_back(record)
            raise
        live.backup = backup

    def _observe(self, lane: Lane, live: Live, event: Event) -> None:
        self._book.tell(live, event)
        if isinstance(event, SectorProven):
            live.unsaved_proven.append(event)
            self._book.save_soon(live)
        elif isinstance(event, PhaseStarted):
            live.phase_since = self._clock.monotonic()
            if live.restore is not None:
                step = encode(Restoring(event.phase.value))
                self._book.note(live, event=step, phase=Phase.RESTORE.value, done=0, total=event.total)
            else:
                self._book.note(live, phase=event.phase.value, done=0, total=event.total)
            # A request to end that came while the session was being set up may have reached nobody.
            if live.cancel:
                lane.port.cancel()
            if self._book.stopping.is_set():
                lane.port.stop()
        elif not isinstance(event, SectorErased | StepDone):
            if isinstance(event, Identified):
                self._known.identified(live, event)
            live.logged += 1
            if live.logged <= LOG_LIMIT:
                self._book.note(live, event=encode(event))


def _outcome(problem: BridgedError | None, touched: bool) -> JobState:
    """The state that the end of a session means."""
    if problem is None:
        return JobState.SUCCEEDED
    if isinstance(problem, Stopped | SessionDied | PortGone):
        return JobState.INTERRUPTED  # The target of a port that is gone is as it is: the job goes on when it is back.
    if isinstance(problem, Canceled):
        return JobState.CANCELED
    if isinstance(problem, DeadlineExceeded):
        return JobState.TIMED_OUT
    if isinstance(problem, REFUSALS) and not touched:
        return JobState.REJECTED
    return JobState.FAILED


def _by_record(job: Job, past: Past, image: Image) -> bool:
    """Whether an ensure asked for no more than the record, which has the answer. The target is not even reset then."""
    asked = job.params.get("evidence") == "record" and not job.params.get("protect")
    return job.kind is JobKind.ENSURE and asked and past.content == image.digest


def _weaker(job: Job, result: Mapping[str, Any]) -> bool:
    """Whether an ensure ended with less than a proof, as it may: it asked for a sample, or protection lets nobody look."""
    if job.kind is not JobKind.ENSURE:
        return False
    evidence = result.get("evidence")
    return (evidence == "sample" == job.params.get("evidence")) or (evidence == "record" and bool(result.get("protected")))
