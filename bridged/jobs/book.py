"""The jobs that this process knows, and the one way in which they change: on disk first, then shown (P5).

- A state is on disk before anybody is shown it, and before anything follows from it.
- Phase changes and notable events wait for the next commit (SD cards); ``seq`` leaps after a restart, so that a number that
  was shown and lost is not used again.

What a state should be, and when, is for others to say.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar
from weakref import WeakSet

from bridged.errors import BridgedError, JournalError, StorageError
from bridged.events import Event
from bridged.jobs.journal import Journal
from bridged.jobs.known import Known
from bridged.jobs.lane import Live
from bridged.jobs.model import Job, JobState, Update, advance, note, update_of
from bridged.jobs.ports import Clock
from bridged.jobs.records import Backup, Change, OpenSession, TargetRecord
from bridged.jobs.results import Results
from bridged.jobs.watch import Watch

log = logging.getLogger(__name__)
T = TypeVar("T")

PROGRESS_S = 0.2  # Progress of a job is shown at most so often.
SAVE_EVERY = 100  # So many entries of the log may wait for the next commit.
REMEMBERED = 1000  # Ended jobs held in memory; older ones are read from the journal.


class Book:
    """``live``, ``ended``: jobs by id. ``trouble``: why the last write failed, empty if it did not.
    ``stopping``: the daemon ends.

    ``keep``: how many ended jobs the journal keeps. ``retry_s``: how often a write that failed for want of room is tried again.
    """

    def __init__(self, journal: Journal, known: Known, results: Results, clock: Clock, keep: int, retry_s: float) -> None:
        self._journal = journal
        self._known = known
        self._results = results
        self._clock = clock
        self._keep = keep
        self._retry_s = retry_s
        self.live: dict[str, Live] = {}
        self.ended: OrderedDict[str, Job] = OrderedDict()
        self.watches: WeakSet[Watch] = WeakSet()
        self.errands: set[asyncio.Task[Any]] = set()
        self.stopping = asyncio.Event()
        self.trouble = ""
        self.on_update: list[Callable[[Job, Update], None]] = []
        self.on_event: list[Callable[[Job, Event], None]] = []

    def get(self, job_id: str) -> Job:
        """Raises ``UnknownJob``."""
        live = self.live.get(job_id)
        if live is not None:
            return live.job
        return self.ended.get(job_id) or self._journal.job(job_id)

    async def step(
        self, live: Live, to: JobState | None, *, close: str = "", anew: Backup | None = None, **changes: Any
    ) -> None:
        """With ``live.lock`` held: the next state (None: the same with other fields), on disk, then shown.

        ``anew``: the job will work on other content; see ``Change``.
        """
        job = note(live.job, **changes) if to is None else advance(live.job, to, **self._times(to), **changes)
        update = update_of(job, self._clock.utc())
        pending = live.pending()
        record = self._known.unwritten(job.target)
        await self.write(
            Change(
                job=job,
                updates=(*pending[0], update),
                proven=pending[1],
                backup=anew,
                anew=anew is not None,
                close=close,
                target=record,
            ),
        )
        if record is not None:
            self._known.written(record)
        live.saved(pending)
        live.job = job
        if job.terminal:
            self._forget(live)
        self.show(live, update)

    def _times(self, to: JobState) -> dict[str, float]:
        return {"ended": self._clock.utc()} if to not in (JobState.WAITING, JobState.RUNNING, JobState.INTERRUPTED) else {}

    def note(self, live: Live, event: dict[str, Any] | None = None, **changes: Any) -> None:
        """Something worth a line in the log: shown at once, written with the next commit."""
        live.job = note(live.job, **changes)
        update = update_of(live.job, self._clock.utc(), rate=self._rate(live), event=event)
        live.unsaved.append(update)
        if len(live.unsaved) >= SAVE_EVERY:
            self.save_soon(live)
        self.show(live, update)

    def progress(self, live: Live, done: int) -> None:
        live.job = replace(live.job, done=done)
        now = self._clock.monotonic()
        if now - live.shown >= PROGRESS_S or done == live.job.total:
            live.shown = now
            self.show(live, update_of(live.job, self._clock.utc(), rate=self._rate(live)), lasting=False)

    def _rate(self, live: Live) -> float:
        elapsed_s = self._clock.monotonic() - live.phase_since
        return live.job.done / elapsed_s if live.job.done and elapsed_s > 0 else 0.0

    def tell(self, live: Live, event: Event) -> None:
        """What a session tells, whether it is worth a line or not."""
        for hook in self.on_event:
            _guarded(hook, live.job, event)

    def show(self, live: Live, update: Update, *, lasting: bool = True) -> None:
        for hook in self.on_update:
            _guarded(hook, live.job, update)
        for watch in list(self.watches):
            watch.offer(update, lasting=lasting)

    # --- writing --------------------------------------------------------------------------------------------------

    async def save(
        self,
        live: Live,
        *,
        session: OpenSession | None = None,
        backup: Backup | None = None,
        record: TargetRecord | None = None,
        anew: bool = False,
    ) -> None:
        """What waits to be written for a job, in its state. ``anew``: see ``Change``."""
        pending = live.pending()
        change = Change(
            job=live.job, updates=pending[0], proven=pending[1], session=session, backup=backup, target=record, anew=anew
        )
        await self.write(change)
        live.saved(pending)

    def save_soon(self, live: Live) -> None:
        """Without waiting. While one write is under way the next ones gather: an SD card sets the pace."""
        if not live.saving:
            live.saving = True
            self.begin(self._save_all(live))

    async def _save_all(self, live: Live) -> None:
        try:
            while live.in_session and (live.unsaved_proven or len(live.unsaved) >= SAVE_EVERY):
                await self.save(live)
        except BridgedError as error:
            log.warning("job %s: %s; the session goes on", live.job.id, error.message)
        finally:
            live.saving = False

    async def write(self, change: Change) -> None:
        await self.written(self._journal.apply(change))

    async def written(self, future: Future[T]) -> T:
        try:
            # Shielded: whoever stops waiting does not undo what the journal was given.
            answer = await asyncio.shield(asyncio.wrap_future(future))
        except (StorageError, JournalError) as error:
            self.trouble = error.message
            raise
        self.trouble = ""
        return answer

    def _forget(self, live: Live) -> None:
        job = live.job
        self.live.pop(job.id, None)
        self.ended[job.id] = job
        while len(self.ended) > min(REMEMBERED, self._keep):
            self.ended.popitem(last=False)
        live.ended.set()
        self.begin(self._prune())

    async def _prune(self) -> None:
        with contextlib.suppress(BridgedError):
            for job_id in await self.written(self._journal.prune(self._keep)):
                self.ended.pop(job_id, None)
                await asyncio.to_thread(self._results.drop, job_id)

    # --- what outlives who asked for it ---------------------------------------------------------------------------

    async def errand(self, work: Coroutine[Any, Any, T]) -> T:
        """Carry ``work`` to its end also when the client who asked for it goes away in the middle."""
        return await asyncio.shield(self.begin(work))

    def begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.ensure_future(work)
        self.errands.add(task)
        task.add_done_callback(self.errands.discard)
        return task

    async def pause(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._retry_s):
                await self.stopping.wait()


def _guarded(hook: Callable[..., None], *arguments: Any) -> None:
    """Who listens cannot hurt who works."""
    try:
        hook(*arguments)
    except Exception:
        log.exception("a listener failed")
