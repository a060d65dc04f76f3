"""``Jobs``: submit, run, watch, cancel. One queue and one running job for each target; targets run in parallel.

Each target has a *lane*: its queue and one task that takes the jobs in the order of their submission. Lanes of targets that
share wires (``shares`` in the configuration) have one lock between them. A lane first brings back what a crash left in a
session (P4, P9), then runs jobs. This module decides *when* something happens to a target; what happens is behind
``TargetPort``. It knows nothing of sockets, formats or processes.

Order of things, on which P5 stands:

- A state is on disk before anybody is shown it, and before anything follows from it. The one exception is ``interrupted``
  right after a restart, which says no more than the ``running`` that the journal has.
- Before a session starts the journal says that the target is in one; before its first destructive command the journal has the
  kept bytes, the hazard and the loss of what was known about the flash, in one transaction.
- Phase changes and notable events wait for the next commit (SD cards); ``seq`` leaps after a restart, so that a number that
  was shown and lost is not used again.

How a session's end becomes a state is in ``_outcome``, and nowhere else. A new image that is unhealthy is followed by a second
session of the same job, which restores the last known good one: see ``rollback`` and ``_go_back``.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar
from weakref import WeakSet

from bridged.config import Config, neighbours, parse_range
from bridged.config import Policy as PolicyConfig
from bridged.config import Target as TargetConfig
from bridged.errors import (
    BadRequest,
    BridgedError,
    Canceled,
    ConsentMissing,
    DeadlineExceeded,
    DigestMismatch,
    EntryWouldBeLost,
    ImageError,
    JournalError,
    LayoutUnknown,
    NotAllowed,
    NotCancellable,
    OutsideUnreadable,
    PortGone,
    QueueFull,
    SessionDied,
    Stopped,
    StorageError,
    StorageFailed,
    StorageFull,
    TargetBroken,
    TooLarge,
    TooMany,
    Unhealthy,
    UnknownImage,
    UnknownTarget,
    VerifyError,
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
from bridged.images.model import Image, Span
from bridged.jobs import policy, rollback
from bridged.jobs.journal import Backup, Change, Journal, OpenSession, TargetRecord, update_of
from bridged.jobs.model import ID_CHARS, Job, JobKind, JobState, Submission, Update, advance, note
from bridged.jobs.past import learned, past_of
from bridged.jobs.results import JOB_LIMIT_BYTES, Results
from bridged.jobs.watch import Watch
from bridged.target.kept import was_empty
from bridged.target.request import NO_PAST, Past
from bridged.target.wishes import wishes_of

log = logging.getLogger(__name__)
T = TypeVar("T")
_JobList = list[Job]
_UpdateList = list[Update]
_InfoList = list[dict[str, Any]]

FREE_BYTES = 8 << 20  # A session writes some 100 KiB of journal and up to a flash of kept bytes; below this none starts.
PROGRESS_S = 0.2  # Progress of a job is shown at most so often.
REQUEST_BYTES = 16384  # Canonical text of one request: it is stored with the job and with its idempotency id.
LOG_LIMIT = 2000  # Notable events of one job in its log; state and phase changes beyond that are still taken.
SAVE_EVERY = 100  # So many entries of the log may wait for the next commit.
SEQ_LEAP = 10 * LOG_LIMIT  # More than a crash can have lost.
REMEMBERED = 1000  # Ended jobs held in memory; older ones are read from the journal.
LIST_LIMIT = 1000  # Jobs of one answer; some 300 bytes each.
OLD_SESSION_S = 30.0  # An old session process sees that its daemon is gone and releases its target; no longer than this.
PARK_S = 150.0  # How long ``stop`` waits for sessions: the longest command is an erase, within its hazard.
PLANS_WAITING = 8  # Who may only look can have images parsed: one at a time, or they take the threads and memory of jobs.
RETRY_S = 1.0  # How often a write that failed for want of room is tried again.

WITH_IMAGE = frozenset({JobKind.FLASH, JobKind.ENSURE, JobKind.VERIFY})
CHANGING = frozenset({JobKind.OPTION_BYTES, JobKind.PROTECT, JobKind.UNPROTECT})
DESTRUCTIVE = frozenset({JobKind.FLASH, JobKind.ENSURE, JobKind.ERASE, JobKind.XMODEM}) | CHANGING
PROVING = WITH_IMAGE | {JobKind.ERASE}
WRITING = frozenset({JobKind.FLASH, JobKind.ENSURE, JobKind.XMODEM})  # What a policy is asked about.
SENDING = WITH_IMAGE | {JobKind.XMODEM}
REFUSALS = (ImageError, WrongChip, EntryWouldBeLost, LayoutUnknown, OutsideUnreadable, NotAllowed, BadRequest)
PARKED = "stopped"
ABSENT = "target_absent"
LOCKED = "lock"
WINDOW = "window"
WINDOW_S = 20.0  # How often is looked whether the maintenance window of a target has opened.
RESTART = "restart"


class TargetPort(Protocol):
    """What a lane needs of a target. All of it is called in the event loop's thread, and calls back there.

    ``state``: idle, busy, absent or broken. ``hold_off`` keeps everybody from port and lines, and comes before the target is
    opened. ``run`` has released the target when it returns or raises, or the target is ``broken``, or ``unreleased``: its
    port vanished with its lines, and ``release_after`` is to be called when it is back. ``keeps_from``: a person has locked
    it, so that new jobs of another principal wait, until ``wait_free`` returns.
    """

    @property
    def name(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def last_trace(self) -> str: ...
    @property
    def unreleased(self) -> bool: ...

    async def run(
        self,
        kind: str,
        params: dict[str, Any],
        image: Image | None,
        *,
        job_id: str,
        kept: bytes = b"",
        proven: tuple[SectorProven, ...] = (),
        spans: tuple[Span, ...] = (),
        past: Past = NO_PAST,
        on_event: Callable[[Event], None],
        on_progress: Callable[[int], None],
        on_barrier: Callable[[str, float, bytes], Awaitable[None]],
    ) -> dict[str, Any]: ...

    def cancel(self) -> None: ...
    def stop(self) -> None: ...
    def hold_off(self, hazard_s: float) -> None: ...
    async def release_after(self, hazard_s: float, empty: str = "", *, erased: bool = False) -> None: ...
    async def wait_idle_hardware(self, timeout_s: float) -> bool: ...
    async def wait_present(self) -> None: ...
    def keeps_from(self, principal: str) -> bool: ...
    async def wait_free(self, principal: str) -> None: ...


class StorePort(Protocol):
    """What is needed of the image store; all of it blocks and is called in threads."""

    def get(self, ref: str) -> Any: ...
    def load(self, staged: Any, base_address: int | None = None, type_hint: str = "auto") -> Image: ...
    def save_trace(self, job_id: str, text: str) -> Path | None: ...


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


@dataclass(frozen=True, slots=True)
class Clock:
    """All that this module knows of time, so that tests can say what it is."""

    utc: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic
    boottime: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME)
    boot_id: str = field(default_factory=_boot_id)
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


def hazard_left_s(session: OpenSession, clock: Clock) -> float:
    """How long nobody may touch the target, from now, with the process of that session gone or going (P9).

    The journal has the longest single command of a stage, not when the last one began. Within the same boot the session may
    have been killed a moment ago, in the middle of a command that it had just begun: the whole time counts, from now. After a
    reboot every command began before this boot did: what has passed since then is taken off.
    """
    if not session.hazard_s or session.boot_id == clock.boot_id:
        return session.hazard_s
    return max(0.0, session.hazard_s - clock.boottime())


def empty_chip(journal: Journal, job_id: str, record: TargetRecord | None, settings: TargetConfig) -> str:
    """Which chip ``release_after`` has to start after its reset, because its flash was empty before ``job_id``; or nothing.

    Parts that check for that at power-on enter their loader at every reset until their power is cycled (AN2606).
    """
    if not was_empty(journal.backup(job_id).kept):
        return ""
    return settings.chip or (f"{record.pid:#05x}" if record and record.pid else "")


@dataclass(slots=True)
class _Live:
    """A job that has not ended, and what is only in memory about it. ``lock`` is held while its state changes."""

    job: Job
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    cancel: bool = False
    in_session: bool = False
    image_name: str = ""
    verdict: policy.Verdict = policy.Verdict()
    uid: str = ""
    backup: Backup = Backup()
    resumed: bool = False
    restore: rollback.Restore | None = None
    unsaved: list[Update] = field(default_factory=list)
    unsaved_proven: list[SectorProven] = field(default_factory=list)
    saving: bool = False
    logged: int = 0
    phase_since: float = 0.0
    shown: float = 0.0

    def pending(self) -> tuple[tuple[Update, ...], tuple[SectorProven, ...]]:
        return tuple(self.unsaved), tuple(self.unsaved_proven)

    def saved(self, pending: tuple[tuple[Update, ...], tuple[SectorProven, ...]]) -> None:
        updates, proven = set(u.seq for u in pending[0]), set(pending[1])
        self.unsaved = [u for u in self.unsaved if u.seq not in updates]
        self.unsaved_proven = [p for p in self.unsaved_proven if p not in proven]


@dataclass(slots=True)
class _Debt:
    """A target that a crash left in a session of ``job``. ``until``: monotonic end of its hazard; ``tried``: releasing it
    failed once."""

    until: float
    job: str
    tried: bool = False


@dataclass(slots=True)
class _Group:
    """Targets that share wires, and so run one at a time."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    lanes: list[_Lane] = field(default_factory=list)


@dataclass(slots=True)
class _Lane:
    name: str
    port: TargetPort
    group: _Group
    queue: deque[_Live] = field(default_factory=deque)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    free: asyncio.Event = field(default_factory=asyncio.Event)
    running: _Live | None = None
    debt: _Debt | None = None
    admitting: int = 0
    dirty: bool = False  # the record of the target changed since it was last written

    def head(self) -> _Live | None:
        while self.queue and self.queue[0].job.terminal:
            self.queue.popleft()
        return self.queue[0] if self.queue else None

    @property
    def waiting(self) -> int:
        return sum(not live.job.terminal and live is not self.running for live in self.queue)


class Jobs:
    """See the module docstring. Call ``start`` before the targets are opened: it tells them which hazards to wait out."""

    def __init__(
        self,
        config: Config,
        journal: Journal,
        store: StorePort,
        targets: Mapping[str, TargetPort],
        *,
        clock: Clock | None = None,
        free_bytes: Callable[[Path], int] | None = None,
        retry_s: float = RETRY_S,
        park_s: float = PARK_S,
    ) -> None:
        self._config = config
        self._journal = journal
        self._store = store
        self._policy = policy.Policy(config.signing)
        self._clock = clock or Clock()
        self._free_bytes = free_bytes or _free_bytes
        self._retry_s = retry_s
        self._park_s = park_s
        self._results = Results(journal.path.parent / "results")
        self._lanes = _lanes(config, targets)
        self._live: dict[str, _Live] = {}
        self._admitting: dict[str, asyncio.Event] = {}  # Jobs on their way to the disk, by id.
        self._ended: OrderedDict[str, Job] = OrderedDict()
        self._records: dict[str, TargetRecord] = {}
        self._watches: WeakSet[Watch] = WeakSet()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._errands: set[asyncio.Task[Any]] = set()
        self._started = False
        self._stopping = asyncio.Event()
        self._draining = False
        self._planning = asyncio.Lock()
        self._plans: set[asyncio.Task[dict[str, Any]]] = set()
        self._trouble = ""
        self.on_update: list[Callable[[Job, Update], None]] = []
        self.on_event: list[Callable[[Job, Event], None]] = []

    # --- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take up what the journal has: nothing is forgotten, nothing is run twice (P5)."""
        self._records = {record.name: record for record in await asyncio.to_thread(self._journal.targets)}
        for job in await asyncio.to_thread(self._journal.active):
            await self._recover(job)
        for session in await asyncio.to_thread(self._journal.sessions):
            await self._recover_session(session)
        for lane in self._lanes.values():
            head = lane.head()
            if head is None or head.job.state is not JobState.INTERRUPTED:
                lane.free.set()
        # Those in debt are started first, so that they come first for the lock that they share with others.
        for lane in sorted(self._lanes.values(), key=lambda found: found.debt is None):
            self._tasks[lane.name] = asyncio.create_task(self._serve(lane), name=f"lane of {lane.name}")
        self._started = True

    async def stop(self) -> None:
        """Park what runs (it is resumed at the next start), then close the journal. Bounded by ``park_s``."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        for lane in self._lanes.values():
            if lane.running is None and lane.name in self._tasks:
                self._tasks[lane.name].cancel()  # It waits for something, moves nothing, and the journal has all it knows.
            elif lane.running is not None and lane.running.in_session:
                lane.port.stop()
        tasks = list(self._tasks.values())
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=self._park_s)
            for task in late:
                log.error("%s did not come to its end within %g s", task.get_name(), self._park_s)
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for watch in list(self._watches):
            watch.close()
        for live in self._live.values():
            live.ended.set()
        if self._errands:
            await asyncio.wait(self._errands, timeout=self._park_s)
        await asyncio.to_thread(self._journal.close)

    async def drain(self) -> None:
        """Start no further job and wait for those that have begun, but not for absent targets. The rest stays journaled."""
        self._draining = True
        for lane in self._lanes.values():
            await lane.free.wait()

    def ready(self) -> tuple[bool, str]:
        """Whether jobs can be taken and destructive ones started, and why not."""
        if not self._started:
            return False, "starting"
        if self._stopping.is_set():
            return False, "stopping"
        if self._trouble:
            return False, self._trouble
        try:
            self._check_space()
        except StorageError as error:
            return False, error.message
        return True, ""

    # --- what clients ask -----------------------------------------------------------------------------------------

    async def submit(self, sub: Submission) -> Job:
        """Accept a job: once this returns it survives anything. With a known ``id`` and the same request: that job.

        Raises ``UnknownTarget``, ``UnknownImage``, ``BadRequest``, ``IdempotencyConflict``, ``QueueFull``, ``StorageError``,
        and ``Stopped`` while the daemon ends.
        """
        return await self._errand(self._submit(sub))

    async def cancel(self, job_id: str, force: bool = False) -> Job:
        """End a job: at once where it waits, at the next checkpoint where it runs (so it may still be running on return).

        Raises ``UnknownJob``, and ``NotCancellable`` when it has ended otherwise, or when an erase may have begun and ``force``
        is not given. A cancel never cuts a hazard short, forced or not.
        """
        await self._admission(job_id)
        live = self._live.get(job_id)
        if live is not None:
            return await self._errand(self._cancel(live, force))
        job = self.get(job_id)
        if job.state is not JobState.CANCELED:
            raise NotCancellable(f"job {job_id} has ended as {job.state}", job=job_id, state=job.state.value)
        return job

    def get(self, job_id: str) -> Job:
        live = self._live.get(job_id)
        if live is not None:
            return live.job
        return self._ended.get(job_id) or self._journal.job(job_id)

    def list(self, target: str | None = None, state: JobState | None = None, limit: int = 50, before: str = "") -> _JobList:
        """Newest first, at most ``limit`` and ``LIST_LIMIT``, fewer only at the end; ``before``: only older ones than this job.

        Raises ``UnknownJob`` when nothing is known of ``before`` (any more).
        """
        limit = min(max(limit, 0), LIST_LIMIT)
        shown: list[Job] = []
        while len(shown) < limit:
            wanted = limit - len(shown)
            found = self._journal.jobs(target, state, wanted, before)
            now = [self._live[job.id].job if job.id in self._live else job for job in found]
            shown += [job for job in now if state is None or job.state is state]
            if len(found) < wanted:
                break
            before = found[-1].id
        return shown

    def log(self, job_id: str, from_seq: int = 0, limit: int | None = None) -> _UpdateList:
        """State and phase changes and notable events, oldest first; mere progress is not kept. Raises ``UnknownJob``.

        ``limit``: at most so many; the next ones begin after the ``seq`` of the last.
        """
        job = self.get(job_id)
        found = {update.seq: update for update in self._journal.log(job_id, from_seq, limit)}
        live = self._live.get(job_id)
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
            now = [live.job for live in self._live.values() if target in (None, live.job.target)]
        watch = Watch(self.log, [update_of(job, self._clock.utc()) for job in now], job=job_id, target=target)
        if self._stopping.is_set():
            watch.close()
        self._watches.add(watch)
        return watch

    async def wait(self, job_id: str, timeout_s: float | None = None) -> Job:
        """The job once it has ended; as it is when the time ran out or the daemon stops."""
        await self._admission(job_id)
        live = self._live.get(job_id)
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
        record = self._records.get(name, TargetRecord(name))
        owner = lane.running.job.id if lane.running else ""
        return {
            "name": name,
            "state": lane.port.state,
            "reason": lane.port.reason,
            "chip": self._settings(name).chip,
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
        """What a flash would do, without touching anything; see ``images.dry_run``."""
        from bridged.images.dry_run import Seen, dry_run  # late: it loads the tables of all chips

        self._lane(target)
        settings, record = self._settings(target), self._records.get(target, TargetRecord(target))

        def work() -> dict[str, Any]:
            options = params or {}
            wishes = wishes_of(JobKind.FLASH.value, options)
            wanted = content.wanted(image_ref, options)
            made = content.build(wanted, self._store)
            spans = made.spans or (Span(made.name, made.image.start, made.image.end),)
            spans += tuple(Span("patch", patch.address, patch.end) for patch in wanted.patches)
            found = dry_run(
                made.image,
                chip=settings.chip,
                flash_bytes=settings.flash_kib * 1024,
                layout=settings.layout,
                baud=settings.baud,
                seen=Seen(record.pid, record.flash_bytes, record.layout),
                spans=made.spans,
                discard_outside=options.get("outside") == "discard",
                force=frozenset(str(options.get("force") or "").split(",")),
                protect=[parse_range(text) for text in settings.protect],
                unprotect=wishes.unprotect,
            )
            parts = [{"name": span.name, "start": span.start, "end": span.end} for span in spans]
            proven = record.content == made.image.digest
            return {"target": target, "part": parts, **found, "content": made.image.digest, "proven": proven}

        if len(self._plans) >= PLANS_WAITING:
            raise TooMany(f"{len(self._plans)} plans are being made already", limit=PLANS_WAITING)
        # It is made to its end: who asks and goes away must not have a second parser started beside the first.
        plan = asyncio.ensure_future(self._planned(work))
        self._plans.add(plan)
        plan.add_done_callback(self._plans.discard)
        return await asyncio.shield(plan)

    async def _planned(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        async with self._planning:
            return await asyncio.to_thread(work)

    def read_result(self, job_id: str) -> Path:
        """The file with the bytes that a ``read`` job read.

        Raises ``UnknownJob``; ``BadRequest`` when there are none, or none any more.
        """
        job = self.get(job_id)
        path = self._results.path(job_id)
        if job.kind is not JobKind.READ or job.state is not JobState.SUCCEEDED or not path.exists():
            raise BadRequest(f"job {job_id} ({job.kind}, {job.state}) has no bytes to show, or they are too old", job=job_id)
        return path

    def pinned(self) -> set[str]:
        """Images that no clean-up may remove: those of jobs that have not ended, and the last good one of each target."""
        good = {image for record in self._records.values() for image in (record.image, record.good_image)}
        active = {live.job.image for live in self._live.values()}
        restored = {restore.image for live in self._live.values() if (restore := rollback.Restore.of(live.job))}
        return set[str]().union(*(content.files(image) for image in good | active | restored))

    # --- submitting and canceling ---------------------------------------------------------------------------------

    async def _submit(self, sub: Submission) -> Job:
        if self._stopping.is_set():
            raise Stopped("the daemon is stopping and takes no more jobs")
        lane = self._lane(sub.target)
        if (sub.kind in SENDING) != bool(sub.image):
            raise BadRequest(f"a job of kind {sub.kind} {'needs an' if sub.kind in SENDING else 'takes no'} image")
        settings = self._config.targets.get(sub.target)
        if sub.kind is JobKind.XMODEM and settings is not None and not settings.xmodem.success.expect:
            raise BadRequest(
                f"targets.{sub.target}.xmodem.success.expect is not configured: nothing would say whether a transfer went well",
                target=sub.target,
            )
        if len(sub.id) > ID_CHARS or not sub.id.isprintable():
            raise BadRequest(f"an id has at most {ID_CHARS} printable characters")
        if sub.kind is JobKind.READ:
            _check_range(sub.params)
        wishes_of(sub.kind.value, sub.params)  # What is never done, or not said clearly enough, waits in no queue.
        if sub.image:
            asked = content.wanted(sub.image, sub.params)
            sub = replace(sub, image=asked.image, params=asked.params(sub.params))
            try:
                files = await asyncio.to_thread(lambda: [self._store.get(part.ref) for part in asked.parts])
            except UnknownImage:
                # A repeated request for an image that has gone since still finds its job.
                known = self._journal.submitted(sub.id, _canonical(sub)) if sub.id else ""
                if not known:
                    raise
                return await self._known(known)
            sub = replace(sub, image=asked.resolved([str(file.sha256) for file in files]).image)
        request = _canonical(sub)
        if sub.id and (known := self._journal.submitted(sub.id, request)):
            return await self._known(known)
        self._check_neighbours(sub)
        if sub.kind in WRITING:
            await asyncio.to_thread(self._check_policy, sub.target, sub.image, sub.params)
        if lane.waiting + lane.admitting >= self._config.jobs.queue_limit:
            raise QueueFull(
                f"{lane.waiting} jobs wait for target {lane.name}", target=lane.name, limit=self._config.jobs.queue_limit
            )
        params = json.loads(request)["params"]
        now = self._clock.utc()
        job = Job(secrets.token_hex(6), sub.kind, sub.target, JobState.QUEUED, 1, sub.image, "", params, sub.principal, now)
        job = replace(job, source=sub.source)
        lane.admitting += 1
        self._admitting[job.id] = settled = asyncio.Event()
        try:
            admitted = await self._written(self._journal.admit(job, sub.id, request))
            if admitted == job.id:
                live = _Live(job)
                self._live[job.id] = live
                lane.queue.append(live)
                lane.wake.set()
                self._show(live, update_of(job, now))
                return job
        finally:
            lane.admitting -= 1
            del self._admitting[job.id]
            settled.set()
        return await self._known(admitted)  # The same id came twice at the same time.

    async def _known(self, job_id: str) -> Job:
        await self._admission(job_id)
        return self.get(job_id)

    async def _admission(self, job_id: str) -> None:
        """A job is on disk a moment before it is queued here; who finds it there must not take it for one that has ended."""
        if (settled := self._admitting.get(job_id)) is not None:
            await settled.wait()

    def _check_neighbours(self, sub: Submission) -> None:
        """Who resets a neighbour names it. Raises ``ConsentMissing``; ``BadRequest`` where what is named is none."""
        found = neighbours(self._config.targets, sub.target) if sub.target in self._config.targets else ()
        named = [name for name in str(sub.params.get("resets") or "").split(",") if name]
        if strange := [name for name in named if name not in found]:
            known = f"it resets {', '.join(found)} as well" if found else "it resets no other target"
            raise BadRequest(
                f"resets={','.join(strange)}: a job on {sub.target} does not reset that; {known}", target=sub.target
            )
        if missing := [name for name in found if name not in named]:
            raise ConsentMissing(
                f"a job on {sub.target} resets {', '.join(missing)} as well, which shares its NRST or power: say resets="
                f"{','.join(found)}",
                target=sub.target,
                resets=",".join(found),
            )

    async def _cancel(self, live: _Live, force: bool) -> Job:
        if live.job.touched and not force:
            doing = "has begun to erase and nothing is proven yet"
            if live.restore:
                doing = "restores the last known good image and nothing is proven yet"
            elif live.job.kind in CHANGING:
                doing = "has begun to change protection or option bytes"
            raise NotCancellable(
                f"job {live.job.id} {doing} (phase {live.job.phase or 'none'})",
                job=live.job.id,
                phase=live.job.phase,
            )
        live.cancel = True
        lane = self._lane(live.job.target)
        if not live.in_session:
            async with live.lock:
                # What an interrupted one left in its target is the lane's to bring back, with or without the job.
                if live.job.state in (JobState.QUEUED, JobState.WAITING, JobState.INTERRUPTED):
                    await self._step(live, JobState.CANCELED, error=Canceled("canceled before it ran").as_dict())
        if live.in_session:
            lane.port.cancel()
        lane.wake.set()
        return live.job

    # --- recovery -------------------------------------------------------------------------------------------------

    async def _recover(self, job: Job) -> None:
        live = _Live(job)
        self._live[job.id] = live
        if job.state is JobState.RUNNING:
            live.job = replace(advance(job, JobState.INTERRUPTED, reason=RESTART), seq=job.seq + SEQ_LEAP)
            live.unsaved.append(update_of(live.job, self._clock.utc()))
            with contextlib.suppress(StorageError):  # The journal says "running", which means the same at the next start.
                await self._save(live)
        lane = self._lanes.get(job.target)
        if lane is not None:
            lane.queue.append(live)
            return
        error = UnknownTarget(f"target {job.target} is not in the configuration any more", target=job.target)
        with contextlib.suppress(StorageError):
            async with live.lock:
                await self._step(live, JobState.FAILED, error=error.as_dict(), reason=error.code)

    async def _recover_session(self, session: OpenSession) -> None:
        left_s = hazard_left_s(session, self._clock)
        lane = self._lanes.get(session.target)
        if lane is None:
            log.warning("target %s was left in a session and is not configured any more: not released", session.target)
            with contextlib.suppress(StorageError):
                await self._write(Change(close=session.target))
            return
        lane.debt = _Debt(self._clock.monotonic() + left_s, session.job)
        for mate in lane.group.lanes:  # Opening a neighbour would move the same wires.
            mate.port.hold_off(left_s)

    async def _settle(self, lane: _Lane) -> BridgedError | None:
        """With the lock of the group: bring what a crash left there back to its application. The error of ``lane`` itself."""
        problem: BridgedError | None = None
        for mate in lane.group.lanes:
            debt = mate.debt
            if debt is None or (debt.tried and mate is not lane):
                continue
            debt.tried = True
            left_s = max(0.0, debt.until - self._clock.monotonic())
            try:
                # Both may take long and may be broken off by a stop, with nothing moved. The release itself may not: an errand.
                await mate.port.wait_idle_hardware(left_s + OLD_SESSION_S)
                await self._clock.sleep(max(0.0, debt.until - self._clock.monotonic()))
                if mate.port.state == "absent":
                    continue  # Its own lane waits for it.
                await self._release(mate, debt.job)
            except BridgedError as error:
                log.warning("target %s could not be released after a crash: %s", mate.name, error.message)
                if mate is lane and not isinstance(error, PortGone):  # Gone again: it is absent, and waited for.
                    problem = error
                continue
            mate.debt = None
            mate.wake.set()
            with contextlib.suppress(StorageError):
                await self._write(Change(close=mate.name))
        return problem

    async def _release(self, lane: _Lane, job_id: str) -> None:
        """Back to the application, also of a part that was empty when its power came on. Raises what the target raises."""
        record, settings = self._records.get(lane.name), self._settings(lane.name)
        empty = await asyncio.to_thread(empty_chip, self._journal, job_id, record, settings)
        await self._errand(lane.port.release_after(0.0, empty, erased=self.get(job_id).touched))

    async def _start_anyway(self, lane: _Lane, job_id: str) -> None:
        """A job ends after its session died in the middle: nobody else will start a part that a reset does not start."""
        record, settings = self._records.get(lane.name), self._settings(lane.name)
        empty = await asyncio.to_thread(empty_chip, self._journal, job_id, record, settings)
        if empty and lane.port.state == "idle":
            with contextlib.suppress(BridgedError):
                await self._release(lane, job_id)

    # --- lanes ----------------------------------------------------------------------------------------------------

    async def _serve(self, lane: _Lane) -> None:
        said = ""
        while not self._stopping.is_set():
            try:
                await self._turn(lane)
                said = ""
            except StorageError as error:
                if error.code != said:  # Once, and not every second: the log may be on the same disk.
                    log.warning("target %s waits for the disk: %s", lane.name, error.message)
                    said = error.code
                await self._pause()
            except Exception:  # A defect ends its job, not the lane.
                log.exception("defect in the lane of target %s", lane.name)
                await self._pause()

    async def _turn(self, lane: _Lane) -> None:
        """One job, or one thing to wait for."""
        lane.wake.clear()  # What happens from here on is seen below, or wakes.
        live = lane.head()
        if live is not None and live.cancel:  # Canceled while it ran, and its session died of something else.
            await self._end(lane, live, JobState.CANCELED, Canceled("canceled, and interrupted before that could be heard"))
            return
        untried = lane.debt is not None and not lane.debt.tried
        absent = lane.port.state == "absent"
        if not untried and not absent and self._shut(lane, live):
            await self._wait_window(lane, live)
            return
        if self._held(live) or (live is None and not untried and not (lane.debt and absent)):
            await lane.wake.wait()
            return
        if absent and not untried:
            if live is not None:
                await self._hold(live, ABSENT)
            await self._wait_present(lane)
            return
        if live is not None and self._locked(lane, live) and (live := self._let_by(lane, live)) and self._locked(lane, live):
            await self._hold(live, LOCKED)
            await self._wait_for(lane, lane.port.wait_free(live.job.principal))
            return
        if live is not None and lane.group.lock.locked():
            await self._hold(live, LOCKED)
        async with lane.group.lock:
            problem = await self._settle(lane)
            live = lane.head()
            if live is None or self._stopping.is_set() or self._held(live):
                return
            if self._shut(lane, live) or self._locked(lane, live):
                return
            if lane.port.state == "absent" or (lane.debt is not None and problem is None):
                return  # Gone, or gone for a moment while it was released: once more.
            elif problem is not None:
                await self._end(lane, live, JobState.FAILED, problem)
            elif lane.port.state == "broken":
                text = f"target {lane.name} is marked broken: {lane.port.reason}"
                await self._end(lane, live, JobState.FAILED, TargetBroken(text, target=lane.name))
            else:
                lane.running = live
                lane.free.clear()
                try:
                    await self._run(lane, live)
                finally:
                    lane.running = None
                    if live.job.state is not JobState.INTERRUPTED:
                        lane.free.set()

    def _held(self, live: _Live | None) -> bool:
        """While draining only jobs that have begun go on."""
        return self._draining and (live is None or live.job.state is not JobState.INTERRUPTED)

    def _shut(self, lane: _Lane, live: _Live | None) -> bool:
        """Whether a job must wait for the maintenance window. One that has begun goes on: its target is stopped already."""
        if live is None or live.job.state is JobState.INTERRUPTED or live.cancel:
            return False
        return not policy.is_open(self._settings(lane.name).policy, self._clock.utc())

    async def _wait_window(self, lane: _Lane, live: _Live | None) -> None:
        if live is not None:
            await self._hold(live, WINDOW)
        await self._wait_for(lane, self._clock.sleep(WINDOW_S))

    def _locked(self, lane: _Lane, live: _Live | None) -> bool:
        """A job that was interrupted goes on whoever has locked its target: that would stay half written."""
        fresh = live is not None and live.job.state in (JobState.QUEUED, JobState.WAITING)
        return live is not None and fresh and lane.debt is None and lane.port.keeps_from(live.job.principal)

    def _let_by(self, lane: _Lane, live: _Live) -> _Live:
        """The head of the queue is locked out: the first job of somebody who is not comes before it."""
        for other in lane.queue:
            if not other.job.terminal and not self._locked(lane, other):
                lane.queue.remove(other)
                lane.queue.appendleft(other)
                return other
        return live

    async def _hold(self, live: _Live, reason: str) -> None:
        """Say why a job waits. One that was interrupted stays so."""
        async with live.lock:
            if live.job.state is JobState.QUEUED:
                await self._step(live, JobState.WAITING, reason=reason)
            elif live.job.state is JobState.WAITING and live.job.reason != reason:
                await self._step(live, None, reason=reason)

    async def _wait_present(self, lane: _Lane) -> None:
        lane.free.set()
        await self._wait_for(lane, lane.port.wait_present())
        if lane.port.state != "absent" and lane.debt is not None:
            lane.debt.tried = False

    async def _wait_for(self, lane: _Lane, what: Awaitable[None]) -> None:
        """Until ``what`` has happened, or something else in this lane."""
        waits = [asyncio.ensure_future(what), asyncio.ensure_future(lane.wake.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for waiting in waits:
                waiting.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    async def _pause(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._retry_s):
                await self._stopping.wait()

    # --- one run of one job ---------------------------------------------------------------------------------------

    async def _run(self, lane: _Lane, live: _Live) -> None:
        """From queued, waiting or interrupted to a terminal state, or to interrupted again."""
        before = live.job
        live.resumed = before.state is JobState.INTERRUPTED
        live.restore = rollback.Restore.of(before)
        attempts = before.attempts - (live.restore.attempts - 1 if live.restore else 0)
        if live.resumed and before.reason != PARKED and attempts > self._config.jobs.resume_limit:
            text = f"interrupted in {before.attempts} of {before.attempts} attempts (the last time: {before.reason})"
            last = before.error or SessionDied(text).as_dict()
            last = {**last, "facts": {**last["facts"], "attempts": before.attempts}}
            await self._start_anyway(lane, before.id)
            await self._finish(lane, live, {}, from_dict(last))
            return
        try:
            if before.kind in DESTRUCTIVE:
                self._check_space()
        except StorageError as error:
            await self._finish(lane, live, {}, error)
            return
        async with live.lock:
            if live.job.terminal:
                return  # Canceled while we came here.
            await self._step(
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
            parked = isinstance(problem, Stopped) and self._stopping.is_set()
            gone = isinstance(problem, PortGone)
            reason = PARKED if parked else ABSENT if gone else str(problem.code if problem else "")
            await self._end(lane, live, state, problem, reason=reason)
        else:
            if isinstance(problem, DeadlineExceeded):
                await self._start_anyway(lane, live.job.id)
            self._remember(lane, live, result, problem)
            await self._finish(lane, live, result, problem)

    async def _attempt(self, lane: _Lane, live: _Live) -> tuple[dict[str, Any], BridgedError | None]:
        """One session, and what it died of."""
        result: dict[str, Any] = {}
        problem: BridgedError | None = None
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
            lane.debt = _Debt(self._clock.monotonic(), live.job.id)  # The session stays in the journal until it is paid (P4).
        await self._keep_trace(lane, live, problem)
        return result, problem

    async def _go_back(self, lane: _Lane, live: _Live, unhealthy: Unhealthy) -> Unhealthy:
        """Begin to restore the last known good: ``live.restore`` is set and on disk then. Without one the error says why."""
        record = self._records.get(lane.name, TargetRecord(lane.name))
        why = "the job was canceled" if live.cancel else rollback.why_not(record, live.job)
        if not why:
            restore = rollback.begin(record, live.job, unhealthy)
            try:
                self._check_space()
                # Before the journal says so: a file that is lost, or means something else now, is nothing to go back to.
                built = await asyncio.to_thread(content.build, restore.wanted(), self._store)
                if built.image.digest == restore.content:
                    async with live.lock:
                        # What was proven and kept until now belongs to the other content; in flash it is all there.
                        live.unsaved_proven.clear()
                        told = restore.as_result()
                        anew = Backup(live.uid)
                        await self._step(live, None, anew=anew, phase=Phase.RESTORE.value, done=0, total=0, result=told)
                    live.restore = restore
                    return unhealthy
                why = f"{restore.name} does not give the content any more that was proven ({restore.content[:12]})"
            except BridgedError as error:
                why = f"{restore.name} cannot be restored: {error.code}: {error.message}"
        return Unhealthy(f"{unhealthy.message}; there is nothing to go back to: {why}", **unhealthy.facts)

    async def _finish(self, lane: _Lane, live: _Live, result: dict[str, Any], problem: BridgedError | None) -> None:
        """End a job, with what came of its restore if it was in one."""
        restore = live.restore
        state = JobState.FAILED if live.job.state is JobState.INTERRUPTED else _outcome(problem, live.job.touched)
        if restore is None:
            await self._end(lane, live, state, problem, result=result or None)
        elif problem is None:
            done = RolledBack(restore.name, restore.content, str(result.get("health", "")))
            self._note(live, event=encode(done))
            said = f"{restore.name} was restored and proven" + (", and is healthy" if done.health else "")
            told = {**result, "restored": restore.name, "restored_image": restore.image}
            await self._end(lane, live, JobState.ROLLED_BACK, restore.said(said), result=told)
        elif state is JobState.CANCELED:
            await self._end(lane, live, state, problem, result=restore.as_result(problem))
        else:
            said = f"restoring {restore.name} failed: {problem.code}: {problem.message}"
            await self._end(lane, live, JobState.FAILED, restore.said(said), result=restore.as_result(problem))

    async def _session(self, lane: _Lane, live: _Live) -> dict[str, Any]:
        job, restore = live.job, live.restore
        image: Image | None = None
        spans: tuple[Span, ...] = ()
        if job.image:
            wanted = restore.wanted() if restore else content.wanted(job.image, job.params)
            if job.kind in WRITING and restore is None and not job.touched:
                live.verdict = await asyncio.to_thread(self._check_policy, lane.name, job.image, job.params)
            loaded = await asyncio.to_thread(content.build, wanted, self._store)
            image, live.image_name, spans = loaded.image, loaded.name, loaded.spans
            if restore is None:
                live.job = job = replace(live.job, content=image.digest)
            elif image.digest != restore.content:
                raise DigestMismatch(f"{restore.name} does not give the content any more that was proven in {lane.name}")
        past = await asyncio.to_thread(self._past, lane, live)
        if image is not None and restore is None and _by_record(job, past, image):
            return {"kind": job.kind.value, "content": image.digest, "evidence": "record", "age_s": round(past.age_s, 1)}
        proven: tuple[SectorProven, ...] = ()
        if job.touched:
            proven = await asyncio.to_thread(self._journal.proven, job.id)
            live.backup = await asyncio.to_thread(self._journal.backup, job.id)
        live.uid = ""
        await self._save(live, session=self._opened(lane, live, 0.0))
        if self._stopping.is_set():
            raise Stopped("the daemon is stopping")
        if live.cancel:
            raise Canceled("canceled before the restore began" if restore else "canceled before anything was touched")
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
            on_progress=lambda done: self._progress(live, done),
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

    def _past(self, lane: _Lane, live: _Live) -> Past:
        """What the session may know beforehand; nothing about sectors where the job wants all of them written."""
        record, job = self._records.get(lane.name, TargetRecord(lane.name)), live.job
        differs = job.kind in WITH_IMAGE and not job.touched and job.params.get("mode") != "full"
        sectors = self._journal.sectors(lane.name) if differs else ()
        past = past_of(record, sectors, self._clock.utc(), in_doubt=self._journal.in_doubt(lane.name))
        return past if differs else replace(past, settled=False)

    def _opened(self, lane: _Lane, live: _Live, hazard_s: float) -> OpenSession:
        clock = self._clock
        return OpenSession(lane.name, live.job.id, hazard_s, clock.boottime(), clock.boot_id, clock.utc())

    async def _barrier(self, lane: _Lane, live: _Live, state: str, hazard_s: float, kept: bytes) -> None:
        """Returns when the journal has it. ``erased`` ends the hazard; every other state begins a destructive stage."""
        if state == "erased":
            # A session that has erased is let go on whatever the disk does; the hazard stays noted then, which only costs time.
            with contextlib.suppress(StorageError, JournalError):
                await self._save(live, session=self._opened(lane, live, 0.0))
            return
        if self._stopping.is_set():
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
            answered = self._records.get(lane.name, TargetRecord(lane.name)).pid
            policy.check_chip(policy.Target(lane.name, answered), live.verdict)
        backup = Backup(live.uid or live.backup.uid, kept or live.backup.kept)
        before, record = live.job, self._records.get(lane.name)
        live.job = replace(live.job, touched=True)  # At once: whoever saves this job meanwhile must not say otherwise.
        if state == "erasing":  # Protection and option bytes leave the flash as it is.
            self._void(lane)
        opened = self._opened(lane, live, hazard_s)
        try:
            await self._save(live, session=opened, backup=backup, record=self._records.get(lane.name))
        except BridgedError:
            live.job = replace(live.job, touched=before.touched)
            if record is not None:
                self._records[lane.name] = record
            raise
        live.backup = backup

    # --- what a session tells -------------------------------------------------------------------------------------

    def _observe(self, lane: _Lane, live: _Live, event: Event) -> None:
        for hook in self.on_event:
            _guarded(hook, live.job, event)
        if isinstance(event, SectorProven):
            live.unsaved_proven.append(event)
            self._save_soon(live)
        elif isinstance(event, PhaseStarted):
            live.phase_since = self._clock.monotonic()
            if live.restore is not None:
                step = encode(Restoring(event.phase.value))
                self._note(live, event=step, phase=Phase.RESTORE.value, done=0, total=event.total)
            else:
                self._note(live, phase=event.phase.value, done=0, total=event.total)
            # A request to end that came while the session was being set up may have reached nobody.
            if live.cancel:
                lane.port.cancel()
            if self._stopping.is_set():
                lane.port.stop()
        elif not isinstance(event, SectorErased | StepDone):
            if isinstance(event, Identified):
                self._identified(lane, live, event)
            live.logged += 1
            if live.logged <= LOG_LIMIT:
                self._note(live, event=encode(event))

    def _note(self, live: _Live, event: dict[str, Any] | None = None, **changes: Any) -> None:
        """Something worth a line in the log: shown at once, written with the next commit."""
        live.job = note(live.job, **changes)
        update = update_of(live.job, self._clock.utc(), rate=self._rate(live), event=event)
        live.unsaved.append(update)
        if len(live.unsaved) >= SAVE_EVERY:
            self._save_soon(live)
        self._show(live, update)

    def _progress(self, live: _Live, done: int) -> None:
        live.job = replace(live.job, done=done)
        now = self._clock.monotonic()
        if now - live.shown >= PROGRESS_S or done == live.job.total:
            live.shown = now
            self._show(live, update_of(live.job, self._clock.utc(), rate=self._rate(live)), lasting=False)

    def _rate(self, live: _Live) -> float:
        elapsed_s = self._clock.monotonic() - live.phase_since
        return live.job.done / elapsed_s if live.job.done and elapsed_s > 0 else 0.0

    def _show(self, live: _Live, update: Update, *, lasting: bool = True) -> None:
        for hook in self.on_update:
            _guarded(hook, live.job, update)
        for watch in list(self._watches):
            watch.offer(update, lasting=lasting)

    # --- what is known of a target --------------------------------------------------------------------------------

    def _identified(self, lane: _Lane, live: _Live, event: Identified) -> None:
        live.uid = event.uid
        old = self._records.get(lane.name, TargetRecord(lane.name))
        if event.protected and old.pid == event.pid:
            return  # It is not allowed to say more than that; what is known of it stays.
        if old.content and (old.pid, old.uid) != (event.pid, event.uid):
            self._void(lane)  # Another board, or one that does not say which it is.
        self._records[lane.name] = replace(
            self._records.get(lane.name, old),
            pid=event.pid,
            family=event.family,
            names=event.names,
            uid=event.uid,
            flash_bytes=event.flash_bytes,
            layout=event.layout,
            loader=event.loader,
            identified=self._clock.utc(),
        )
        lane.dirty = True

    def _void(self, lane: _Lane) -> None:
        old = self._records.get(lane.name, TargetRecord(lane.name))
        self._records[lane.name] = replace(old, content="", image="", image_name="", evidence="", proven=0.0)
        lane.dirty = True

    def _remember(self, lane: _Lane, live: _Live, result: dict[str, Any], problem: BridgedError | None) -> None:
        record, job = self._records.get(lane.name, TargetRecord(lane.name)), live.job
        if problem is None and result.get("baud"):
            record = self._records[lane.name] = learned(record, result, self._clock.utc())
            lane.dirty = True
        if problem is None and job.kind in WITH_IMAGE and result.get("evidence") == "full":
            restore = live.restore
            # One that cannot be asked (it needs a power cycle first) is proven, and not known to live.
            healthy = not self._probed(lane.name) or result.get("health") == "passed"
            good = rollback.good_fields(record, job, live.image_name) if healthy and restore is None else {}
            self._records[lane.name] = replace(
                record,
                content=restore.content if restore else job.content,
                image=restore.image if restore else job.image,
                image_name=live.image_name,
                evidence=str(result["evidence"]),
                proven=self._clock.utc(),
                version=record.version if restore else policy.newest(record.version, live.verdict.version),
                **good,
            )
            lane.dirty = True
        elif isinstance(problem, VerifyError) and record.content == job.content:
            self._void(lane)

    def _probed(self, name: str) -> bool:
        """Whether a health probe is configured."""
        settings = self._settings(name)
        return bool(settings.application.health.send or settings.application.health.expect or settings.lines.alive)

    # --- writing --------------------------------------------------------------------------------------------------

    async def _step(
        self, live: _Live, to: JobState | None, *, close: str = "", anew: Backup | None = None, **changes: Any
    ) -> None:
        """With ``live.lock`` held: the next state (None: the same with other fields), on disk, then shown.

        ``anew``: the job will work on other content; see ``Change``.
        """
        job = note(live.job, **changes) if to is None else advance(live.job, to, **self._times(to), **changes)
        update = update_of(job, self._clock.utc())
        pending = live.pending()
        lane = self._lanes.get(job.target)
        record = self._records.get(job.target) if lane and lane.dirty else None
        await self._write(
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
        if lane and record is self._records.get(job.target):
            lane.dirty = False
        live.saved(pending)
        live.job = job
        if job.terminal:
            self._forget(live)
        self._show(live, update)

    def _times(self, to: JobState) -> dict[str, float]:
        return {"ended": self._clock.utc()} if to not in (JobState.WAITING, JobState.RUNNING, JobState.INTERRUPTED) else {}

    async def _end(
        self,
        lane: _Lane,
        live: _Live,
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
                        await self._step(live, to, close=close, **changes)
                return
            except (StorageError, JournalError) as trouble:
                if live.job.reason != trouble.code:
                    log.warning("job %s has ended as %s and that cannot be written: %s", live.job.id, to, trouble.message)
                    self._note(live, reason=trouble.code)  # So that who looks sees what a job waits for that seems to run.
                if self._stopping.is_set():
                    return  # It is taken up again at the next start; what it proved is proven then.
                await self._pause()

    def _forget(self, live: _Live) -> None:
        job = live.job
        self._live.pop(job.id, None)
        self._ended[job.id] = job
        while len(self._ended) > min(REMEMBERED, self._config.jobs.keep):
            self._ended.popitem(last=False)
        live.ended.set()
        self._begin(self._prune())

    async def _prune(self) -> None:
        with contextlib.suppress(BridgedError):
            for job_id in await self._written(self._journal.prune(self._config.jobs.keep)):
                self._ended.pop(job_id, None)
                await asyncio.to_thread(self._results.drop, job_id)

    async def _save(
        self,
        live: _Live,
        *,
        session: OpenSession | None = None,
        backup: Backup | None = None,
        record: TargetRecord | None = None,
    ) -> None:
        """What waits to be written for a job, in its state."""
        pending = live.pending()
        await self._write(
            Change(job=live.job, updates=pending[0], proven=pending[1], session=session, backup=backup, target=record)
        )
        live.saved(pending)

    def _save_soon(self, live: _Live) -> None:
        """Without waiting. While one write is under way the next ones gather: an SD card sets the pace."""
        if not live.saving:
            live.saving = True
            self._begin(self._save_all(live))

    async def _save_all(self, live: _Live) -> None:
        try:
            while live.in_session and (live.unsaved_proven or len(live.unsaved) >= SAVE_EVERY):
                await self._save(live)
        except BridgedError as error:
            log.warning("job %s: %s; the session goes on", live.job.id, error.message)
        finally:
            live.saving = False

    async def _write(self, change: Change) -> None:
        await self._written(self._journal.apply(change))

    async def _written(self, future: Future[T]) -> T:
        try:
            # Shielded: whoever stops waiting does not undo what the journal was given.
            answer = await asyncio.shield(asyncio.wrap_future(future))
        except (StorageError, JournalError) as error:
            self._trouble = error.message
            raise
        self._trouble = ""
        return answer

    def _check_policy(self, name: str, image: str, params: Mapping[str, Any]) -> policy.Verdict:
        """Blocking. Raises ``BadSignature``, ``AgainstPolicy``, ``UnknownImage``."""
        settings, record = self._settings(name), self._records.get(name, TargetRecord(name))
        sig = str(params.get("sig") or "")
        if not sig and settings.policy == PolicyConfig():
            return policy.Verdict()
        wanted = content.wanted(image, params)
        files = [(str(found.sha256), Path(found.path)) for found in (self._store.get(part.ref) for part in wanted.parts)]
        target = policy.Target(name, record.pid, record.version)
        return self._policy.check(settings.policy, target, wanted, files, sig)

    # --- small things ---------------------------------------------------------------------------------------------

    async def _keep_trace(self, lane: _Lane, live: _Live, problem: BridgedError | None) -> None:
        text = lane.port.last_trace
        if text and ((problem is not None and not isinstance(problem, Stopped | Canceled)) or live.job.params.get("trace")):
            with contextlib.suppress(BridgedError, OSError):
                await asyncio.to_thread(self._store.save_trace, live.job.id, text)

    def _settings(self, name: str) -> TargetConfig:
        return self._config.targets.get(name, TargetConfig())

    def _lane(self, name: str) -> _Lane:
        lane = self._lanes.get(name)
        if lane is None:
            raise UnknownTarget(f"there is no target {name[:64]!r}; there are: {', '.join(self._lanes) or 'none'}")
        return lane

    def _check_space(self) -> None:
        path = self._journal.path.parent
        try:
            free = self._free_bytes(path)
        except OSError as error:
            raise StorageFailed(f"the file system of {path}: {error.strerror or error}", errno=error.errno) from error
        if free < FREE_BYTES:
            text = f"{path} has {free >> 10} KiB left, a job that erases needs {FREE_BYTES >> 10} KiB"
            raise StorageFull(text, free_bytes=free, needed_bytes=FREE_BYTES)

    async def _errand(self, work: Coroutine[Any, Any, T]) -> T:
        """Carry ``work`` to its end also when the client who asked for it goes away in the middle."""
        return await asyncio.shield(self._begin(work))

    def _begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.ensure_future(work)
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)
        return task


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


def _check_range(params: Mapping[str, Any]) -> None:
    """What a job may read. Raises ``BadRequest`` and ``TooLarge``."""
    address, length = params.get("address") or 0, params.get("length") or 0
    if not isinstance(address, int) or not isinstance(length, int) or address < 0 or length < 0 or address + length > 1 << 32:
        raise BadRequest("a job of kind read takes an address and a length within the 32-bit address space")
    if length > JOB_LIMIT_BYTES:
        text = f"{length} bytes are to be read, one job reads at most {JOB_LIMIT_BYTES}"
        raise TooLarge(text, length=length, limit=JOB_LIMIT_BYTES)


def _canonical(sub: Submission) -> str:
    """The same text for the same request. Raises ``BadRequest`` for what is no JSON or too much of it."""
    asked = {"kind": sub.kind.value, "target": sub.target, "image": sub.image, "params": sub.params}
    try:
        text = json.dumps(asked, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadRequest(f"the options of the job are no plain values: {error}") from error
    if len(text) > REQUEST_BYTES:
        raise BadRequest(f"the options of the job take {len(text)} bytes, the limit is {REQUEST_BYTES}", limit=REQUEST_BYTES)
    return text


def _lanes(config: Config, targets: Mapping[str, TargetPort]) -> dict[str, _Lane]:
    """A lane for each target; targets that share wires, directly or through others, are one group."""
    groups: dict[str, set[str]] = {name: {name} for name in targets}
    for name, settings in _sharing(config.targets.items(), groups):
        joined = set[str]().union(*(groups[other] for other in (name, *settings)))
        for other in joined:
            groups[other] = joined
    made: dict[int, _Group] = {}
    lanes: dict[str, _Lane] = {}
    for name, port in targets.items():
        group = made.setdefault(id(groups[name]), _Group())
        lanes[name] = _Lane(name, port, group)
        group.lanes.append(lanes[name])
    return lanes


def _sharing(targets: Iterable[tuple[str, TargetConfig]], known: Mapping[str, object]) -> Iterable[tuple[str, tuple[str, ...]]]:
    return ((name, tuple(other for other in one.shares if other in known)) for name, one in targets if name in known)


def _free_bytes(path: Path) -> int:
    found = os.statvfs(path)
    if found.f_flag & os.ST_RDONLY:
        # ext4 after an error of the disk, up to Linux 6.14; later ones go on saying that it can be written, and refuse.
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    return found.f_bavail * found.f_frsize


def _guarded(hook: Callable[..., None], *arguments: Any) -> None:
    """Who listens cannot hurt who works."""
    try:
        hook(*arguments)
    except Exception:
        log.exception("a listener failed")
