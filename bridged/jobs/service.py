"""``Jobs``: what clients ask of the gateway, and its start and end. One queue and one running job for each target.

The promise is kept in the modules beside this one, each of which knows only those before it: ``model`` (states), ``journal``
(the file), ``lane`` (queues), ``known`` (what is known of a target), ``book`` (on disk first, then shown), ``admission`` (may
it?), ``recovery`` (what a crash left), ``run`` (one run of one job), ``turns`` (whose turn it is). What happens to a target is
behind ``TargetPort``. Nothing here knows of sockets, formats or processes.

An accepted job is on disk. The one state that is shown before it is there is ``interrupted`` right after a restart, which says
no more than the ``running`` that the journal has.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bridged.config import Config
from bridged.errors import (
    BadRequest,
    Canceled,
    NotCancellable,
    QueueFull,
    Stopped,
    StorageError,
    UnknownImage,
    UnknownJob,
    UnknownTarget,
)
from bridged.events import Phase
from bridged.images import content
from bridged.jobs import rollback
from bridged.jobs.admission import Admission, canonical, check_request
from bridged.jobs.book import Book
from bridged.jobs.contents import Contents
from bridged.jobs.journal import Journal
from bridged.jobs.known import Known
from bridged.jobs.lane import Lane, Live, lanes_of
from bridged.jobs.model import CHANGING, RESTART, WRITING, Job, JobKind, JobState, Submission, Update, advance, update_of
from bridged.jobs.plans import Plans
from bridged.jobs.ports import Clock, Images, TargetPort
from bridged.jobs.recovery import Recovery
from bridged.jobs.results import Results
from bridged.jobs.run import LOG_LIMIT, Runner
from bridged.jobs.traces import Traces
from bridged.jobs.turns import Turns
from bridged.jobs.watch import Watch

log = logging.getLogger(__name__)
_JobList = list[Job]
_UpdateList = list[Update]
_InfoList = list[dict[str, Any]]

SEQ_LEAP = 10 * LOG_LIMIT  # More than a crash can have lost.
LIST_LIMIT = 1000  # Jobs of one answer; some 300 bytes each.
PARK_S = 150.0  # How long ``stop`` waits for sessions: the longest command is an erase, within its hazard.
RETRY_S = 1.0  # How often a write that failed for want of room is tried again.


class Jobs:
    """See the module docstring. Call ``start`` before the targets are opened: it tells them which hazards to wait out."""

    def __init__(
        self,
        config: Config,
        journal: Journal,
        store: Images,
        targets: Mapping[str, TargetPort],
        *,
        clock: Clock | None = None,
        free_bytes: Callable[[Path], int] | None = None,
        retry_s: float = RETRY_S,
        park_s: float = PARK_S,
    ) -> None:
        self._journal = journal
        self._store = store
        self._clock = clock = clock or Clock()
        self._park_s = park_s
        self._queue_limit = config.jobs.queue_limit
        self._results = Results(journal.path.parent / "results")
        self._traces = Traces(journal.path.parent / "traces", config.store.traces)
        self._lanes = lanes_of(config, targets)
        self._known = Known(journal, clock)
        self._book = Book(journal, self._known, self._results, clock, config.jobs.keep, retry_s)
        self._admission = Admission(config, self._known, store, journal.path.parent, free_bytes)
        self._recovery = Recovery(journal, self._known, self._book, clock)
        self._contents = Contents(store)
        runner = Runner(
            journal,
            self._contents,
            self._results,
            self._traces,
            self._book,
            self._known,
            self._admission,
            self._recovery,
            clock,
            config.jobs.resume_limit,
        )
        self._turns = Turns(self._book, self._recovery, runner, clock)
        self._plans = Plans(self._contents)
        self._settling: dict[str, asyncio.Event] = {}  # Jobs on their way to the disk, by id.
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._started = False
        self.on_update = self._book.on_update
        self.on_event = self._book.on_event

    # --- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take up what the journal has: nothing is forgotten, nothing is run twice (P5)."""
        self._known.load(await asyncio.to_thread(self._journal.targets))
        for job in await asyncio.to_thread(self._journal.active):
            await self._recover(job)
        for session in await asyncio.to_thread(self._journal.sessions):
            await self._recovery.taken_up(session, self._lanes.get(session.target))
        # Those in debt are started first, so that they come first for the lock that they share with others.
        for lane in sorted(self._lanes.values(), key=lambda found: found.debt is None):
            self._tasks[lane.name] = asyncio.create_task(self._turns.serve(lane), name=f"lane of {lane.name}")
        self._started = True

    async def stop(self) -> None:
        """Park what runs (it is resumed at the next start), then close the journal. Bounded by ``park_s``."""
        if self._book.stopping.is_set():
            return
        self._book.stopping.set()
        for lane in self._lanes.values():
            if lane.running is None and lane.name in self._tasks:
                self._tasks[lane.name].cancel()  # It waits for something, moves nothing, and the journal has all it knows.
            elif lane.running is not None:
                lane.running.leave_staging()
                if lane.running.in_session:
                    lane.port.stop()
        tasks = list(self._tasks.values())
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=self._park_s)
            for task in late:
                log.error("%s did not come to its end within %g s", task.get_name(), self._park_s)
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self._contents.close()
        for watch in list(self._book.watches):
            watch.close()
        for live in self._book.live.values():
            live.ended.set()
        if self._book.errands:
            await asyncio.wait(self._book.errands, timeout=self._park_s)
        await asyncio.to_thread(self._journal.close)

    async def drain(self) -> None:
        """Start no further job and wait for those that have begun, but not for absent targets. The rest stays journaled."""
        self._turns.draining = True
        for lane in self._lanes.values():
            await lane.free.wait()

    def ready(self) -> tuple[bool, str]:
        """Whether jobs can be taken and destructive ones started, and why not."""
        if not self._started:
            return False, "starting"
        if self._book.stopping.is_set():
            return False, "stopping"
        if self._book.trouble:
            return False, self._book.trouble
        try:
            self._admission.check_space()
        except StorageError as error:
            return False, error.message
        return True, ""

    # --- what clients ask -----------------------------------------------------------------------------------------

    async def submit(self, sub: Submission) -> Job:
        """Accept a job: once this returns it survives anything. With a known ``id`` and the same request: that job.

        Raises ``UnknownTarget``, ``UnknownImage``, ``BadRequest``, ``IdempotencyConflict``, ``QueueFull``, ``StorageError``,
        and ``Stopped`` while the daemon ends.
        """
        return await self._book.errand(self._submit(sub))

    async def cancel(self, job_id: str, force: bool = False) -> Job:
        """End a job: at once where it waits, at the next checkpoint where it runs (so it may still be running on return).

        Raises ``UnknownJob``, and ``NotCancellable`` when it has ended otherwise, or when an erase may have begun and ``force``
        is not given. A cancel never cuts a hazard short, forced or not.
        """
        await self._settled(job_id)
        live = self._book.live.get(job_id)
        if live is not None:
            return await self._book.errand(self._cancel(live, force))
        job = self.get(job_id)
        if job.state is not JobState.CANCELED:
            raise NotCancellable(f"job {job_id} has ended as {job.state}", job=job_id, state=job.state.value)
        return job

    def get(self, job_id: str) -> Job:
        """Raises ``UnknownJob``."""
        return self._book.get(job_id)

    def find(self, id: str) -> Job:
        """The job that was submitted with this ``id`` of a client. Raises ``UnknownJob``."""
        if not (job_id := self._journal.submitted(id)):
            raise UnknownJob(f"nothing was submitted with the id {id[:64]!r}, or it is forgotten")
        return self.get(job_id)

    def list(self, target: str | None = None, state: JobState | None = None, limit: int = 50, before: str = "") -> _JobList:
        """Newest first, at most ``limit`` and ``LIST_LIMIT``, fewer only at the end; ``before``: only older ones than this job.

        Raises ``UnknownJob`` when nothing is known of ``before`` (any more).
        """
        limit = min(max(limit, 0), LIST_LIMIT)
        shown: list[Job] = []
        while len(shown) < limit:
            wanted = limit - len(shown)
            found = self._journal.jobs(target, state, wanted, before)
            now = [self._book.live[job.id].job if job.id in self._book.live else job for job in found]
            shown += [job for job in now if state is None or job.state is state]
            if len(found) < wanted:
                break
            before = found[-1].id
        if target is not None and not shown:
            self._lane(target)  # A name that was mistyped must not look like a target without jobs.
        return shown

    def log(self, job_id: str, from_seq: int = 0, limit: int | None = None) -> _UpdateList:
        """State and phase changes and notable events, oldest first; mere progress is not kept. Raises ``UnknownJob``.

        ``limit``: at most so many; the next ones begin after the ``seq`` of the last.
        """
        job = self.get(job_id)
        found = {update.seq: update for update in self._journal.log(job_id, from_seq, limit)}
        live = self._book.live.get(job_id)
        if live is not None:
            found.update((update.seq, update) for update in live.unsaved)
        return [found[seq] for seq in sorted(found) if from_seq <= seq <= job.seq][:limit]

    def watch(self, job_id: str | None = None, target: str | None = None) -> Watch:
        """Updates of one job, one target or everything, beginning with how things are.

        Raises ``UnknownJob``, ``UnknownTarget``.
        """
        if target is not None:
            self._lane(target)
        if job_id is not None:
            now = [self.get(job_id)]
        else:
            now = [live.job for live in self._book.live.values() if target in (None, live.job.target)]
        watch = Watch(self.log, [update_of(job, self._clock.utc()) for job in now], job=job_id, target=target)
        if self._book.stopping.is_set():
            watch.close()
        self._book.watches.add(watch)
        return watch

    async def wait(self, job_id: str, timeout_s: float | None = None) -> Job:
        """The job once it has ended; as it is when the time ran out or the daemon stops."""
        await self._settled(job_id)
        live = self._book.live.get(job_id)
        if live is None:
            return self.get(job_id)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await live.ended.wait()
        return live.job

    def targets(self) -> _InfoList:
        return [self.info(name) for name in self._lanes]

    def info(self, name: str) -> dict[str, Any]:
        """What is known of a target. ``content`` and ``image`` are what was last proven in its flash, empty where unknown.

        ``version``: the highest signed one ever proven there. ``owner``: the running job; ``queued``: how many wait.
        ``proven``, ``identified``: UTC seconds, 0 for never.
        """
        lane = self._lane(name)
        record = self._known.of(name)
        owner = lane.running.job.id if lane.running else ""
        return {
            "name": name,
            "state": lane.port.state,
            "reason": lane.port.reason,
            "chip": lane.settings.chip,
            "pid": record.pid,
            "family": record.family,
            "names": record.names,
            "uid": record.uid,
            "flash_bytes": record.flash_bytes,
            "layout": record.layout,
            "loader": record.loader,
            "identified": record.identified,
            "content": record.content,
            "image": record.image,
            "image_name": record.image_name,
            "evidence": record.evidence,
            "proven": record.proven,
            "version": record.version,
            "owner": owner,
            "queued": lane.waiting,
        }

    async def plan(self, target: str, image_ref: str, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What a flash would do, without touching anything. Raises ``UnknownTarget`` and ``TooMany``."""
        return await self._plans.make(self._lane(target), self._known.of(target), image_ref, params or {}, self._clock.utc())

    def read_result(self, job_id: str) -> Path:
        """The file with the bytes that a ``read`` job read.

        Raises ``UnknownJob``; ``BadRequest`` when there are none, or none any more.
        """
        job = self.get(job_id)
        path = self._results.path(job_id)
        if job.kind is not JobKind.READ or job.state is not JobState.SUCCEEDED or not path.exists():
            raise BadRequest(f"job {job_id} ({job.kind}, {job.state}) has no bytes to show, or they are too old", job=job_id)
        return path

    def trace_file(self, job_id: str) -> Path | None:
        """The recording of a job's last session, where one is kept. Blocking. Raises ``UnknownJob``."""
        return self._traces.file(self.get(job_id).id)

    def pinned(self) -> set[str]:
        """Images that no clean-up may remove: those of jobs that have not ended, and the last good one of each target."""
        good = {image for record in self._known.all() for image in (record.image, record.good_image)}
        active = {live.job.image for live in self._book.live.values()}
        restored = {restore.image for live in self._book.live.values() if (restore := rollback.Restore.of(live.job))}
        return set[str]().union(*(content.files(image) for image in good | active | restored))

    # --- submitting and canceling ---------------------------------------------------------------------------------

    async def _submit(self, sub: Submission) -> Job:
        if self._book.stopping.is_set():
            raise Stopped("the daemon is stopping and takes no more jobs")
        lane = self._lane(sub.target)
        check_request(sub, lane.settings)
        if sub.image:
            asked = content.wanted(sub.image, sub.params)
            sub = replace(sub, image=asked.image, params=asked.params(sub.params))
            try:
                files = await asyncio.to_thread(lambda: [self._store.use(part.ref) for part in asked.parts])
            except UnknownImage:
                # A repeated request for an image that has gone since still finds its job.
                known = self._journal.submitted(sub.id, canonical(sub)) if sub.id else ""
                if not known:
                    raise
                return await self._accepted(known)
            sub = replace(sub, image=asked.resolved([str(file.sha256) for file in files]).image)
        request = canonical(sub)
        if sub.id and (known := self._journal.submitted(sub.id, request)):
            return await self._accepted(known)
        self._admission.check_neighbours(sub)
        if sub.kind in WRITING:
            await asyncio.to_thread(self._admission.check_policy, lane, sub.image, sub.params)
        if lane.waiting + lane.admitting >= self._queue_limit:
            raise QueueFull(f"{lane.waiting} jobs wait for target {lane.name}", target=lane.name, limit=self._queue_limit)
        params = json.loads(request)["params"]
        now = self._clock.utc()
        job = Job(secrets.token_hex(6), sub.kind, sub.target, JobState.QUEUED, 1, sub.image, "", params, sub.principal, now)
        job = replace(job, source=sub.source)
        lane.admitting += 1
        self._settling[job.id] = settled = asyncio.Event()
        try:
            admitted = await self._book.written(self._journal.admit(job, sub.id, request))
            if admitted == job.id:
                live = Live(job)
                self._book.live[job.id] = live
                lane.queue.append(live)
                lane.wake.set()
                self._book.show(live, update_of(job, now))
                return job
        finally:
            lane.admitting -= 1
            del self._settling[job.id]
            settled.set()
        return await self._accepted(admitted)  # The same id came twice at the same time.

    async def _accepted(self, job_id: str) -> Job:
        await self._settled(job_id)
        return self.get(job_id)

    async def _settled(self, job_id: str) -> None:
        """A job is on disk a moment before it is queued here; who finds it there must not take it for one that has ended."""
        if (settled := self._settling.get(job_id)) is not None:
            await settled.wait()

    async def _cancel(self, live: Live, force: bool) -> Job:
        if live.job.touched and not force:
            doing = "has begun to erase and nothing is proven yet"
            if live.restore:
                doing = "restores the last known good image and nothing is proven yet"
            elif live.job.phase in (Phase.BOOT.value, Phase.HEALTH.value):
                doing = "has proven its image and starts it; it ends by itself"
            elif live.job.kind in CHANGING:
                doing = "has begun to change protection or option bytes"
            raise NotCancellable(
                f"job {live.job.id} {doing} (phase {live.job.phase or 'none'})",
                job=live.job.id,
                phase=live.job.phase,
            )
        live.cancel = True
        live.leave_staging()
        lane = self._lane(live.job.target)
        if not live.in_session:
            async with live.lock:
                # What an interrupted one left in its target is the lane's to bring back, with or without the job.
                if live.job.state in (JobState.QUEUED, JobState.WAITING, JobState.INTERRUPTED):
                    await self._book.step(live, JobState.CANCELED, error=Canceled("canceled before it ran").as_dict())
        if live.in_session:
            lane.port.cancel()
        lane.wake.set()
        return live.job

    # --- recovery -------------------------------------------------------------------------------------------------

    async def _recover(self, job: Job) -> None:
        live = Live(job)
        self._book.live[job.id] = live
        if job.state is JobState.RUNNING:
            live.job = replace(advance(job, JobState.INTERRUPTED, reason=RESTART), seq=job.seq + SEQ_LEAP)
            live.unsaved.append(update_of(live.job, self._clock.utc()))
            with contextlib.suppress(StorageError):  # The journal says "running", which means the same at the next start.
                await self._book.save(live)
        lane = self._lanes.get(job.target)
        if lane is not None:
            if live.half_done:  # It may have been let by one that waited for a lock, and comes before it still.
                lane.queue.appendleft(live)
            else:
                lane.queue.append(live)
            return
        error = UnknownTarget(f"target {job.target} is not in the configuration any more", target=job.target)
        with contextlib.suppress(StorageError):
            async with live.lock:
                await self._book.step(live, JobState.FAILED, error=error.as_dict(), reason=error.code)

    def _lane(self, name: str) -> Lane:
        lane = self._lanes.get(name)
        if lane is None:
            raise UnknownTarget(f"there is no target {name[:64]!r}; there are: {', '.join(self._lanes) or 'none'}")
        return lane
