"""The gateway's side of a fleet: takes commands from its durable consumer, stages what they need, submits, and tells.

It is a client of the job functions like every other (``submission``, rights, policy, signatures, audit log), and of the image
store. It holds no rule about targets. Without a broker it does nothing, and no local job minds.

Order of things, on which "one message, at most one job" stands:

1. A message is written to the ledger and only then acknowledged. One that comes again (its acknowledgement was lost, a leader
   changed, streams were restored) is in there.
2. Before anything is begun, all that waits at the broker is taken: a command may be followed by its cancellation.
3. Its artifact is staged, whole and proven, then the job is submitted with the id of the command. Whether a command becomes a
   job, and whether it is taken back, expired or neither, is decided one after the other (``_deciding``): a cancellation that
   comes in the middle of a submission finds the job. After a crash between that and the note of it in the ledger the journal
   is asked for the id first, before anything is said of a command without a job.
4. How a job is goes into the ledger and from there to the broker, as the last state of each: what a broker did not get, it gets
   when it is back. Progress alone is told to whoever listens and forgotten.

One connection is one ``_session``; whatever breaks it, the next begins after a pause that grows and is drawn by lot, so that a
fleet does not come back in one second.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from bridged import __version__
from bridged.api.metrics import FleetFigures
from bridged.api.requests import KINDS, VERB_OF, submission, values_of
from bridged.errors import (
    BadRequest,
    BridgedError,
    ConfigError,
    FleetCommand,
    FleetError,
    FleetExpired,
    FleetRefused,
    FleetStale,
    FleetUnreachable,
    UnknownJob,
)
from bridged.fleet import select, wire
from bridged.fleet.download import PRINCIPAL, Store, download
from bridged.fleet.ledger import Entry, Ledger
from bridged.fleet.link import Access, Link, connect
from bridged.fleet.wire import Command, Progress, Report
from bridged.jobs.model import Job, JobKind, Submission, Update

log = logging.getLogger(__name__)

BATCH = 100
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 300.0  # 100,000 gateways that come back after an outage are some 400 connections a second.
STEADY_S = 60.0  # A session of this length was a good one: the next pause is short again.
RETRY_S = 30.0  # A command that cannot be carried out just now (disk, queue) is tried again.
RECHECK_S = 86400.0  # Inventory is compared with what was told so often, besides at each change.
MESSAGE_CHARS = 500  # Of an error, in a report.


class JobsPort(Protocol):
    """The job functions as this principal may use them: ``api.guarded.Guarded``."""

    async def submit(self, sub: Submission) -> Job: ...
    async def cancel(self, job_id: str, force: bool = False) -> Job: ...
    def get(self, job_id: str) -> Job: ...
    def find(self, id: str) -> Job: ...
    def targets(self) -> list[dict[str, Any]]: ...


@dataclass(frozen=True, slots=True)
class Member:
    """Who this gateway is in its fleet."""

    name: str
    labels: Mapping[str, str]
    poll_s: float = 600.0
    progress_s: float = 15.0


@dataclass(frozen=True, slots=True)
class Clock:
    utc: Callable[[], float] = time.time
    sleep: Callable[[float], Coroutine[Any, Any, None]] = asyncio.sleep
    lot: Callable[[float], float] = lambda most: random.uniform(0.2 * most, most)


class Connector:
    """``run`` until it is cancelled. ``observe`` is for ``Jobs.on_update``, ``changed`` for whatever changes a target."""

    def __init__(
        self, member: Member, access: Access, jobs: JobsPort, store: Store, ledger: Ledger, clock: Clock | None = None
    ) -> None:
        self.member, self._access, self._jobs, self._store, self._ledger = member, access, jobs, store, ledger
        self._clock = clock or Clock()
        self._entries: dict[str, Entry] = {}  # by job, those that have not ended
        self._wake_worker, self._wake_teller = asyncio.Event(), asyncio.Event()
        self._changed, self._caught_up = asyncio.Event(), asyncio.Event()
        self._deciding = asyncio.Lock()
        self._news: asyncio.Queue[Job] = asyncio.Queue()
        self._progress: dict[str, Update] = {}
        self._retry_at: dict[int, float] = {}
        self.connected = False
        self.server = ""  # where it is connected to, or was last
        self.trouble = ""
        self.connections = 0
        self.chunk_bytes = 0  # came over the link, those that were thrown away included
        self.commands: Counter[str] = Counter()  # taken, repeated, refused, cancellation
        self.ended: Counter[str] = Counter()  # by state

    # --- what the daemon tells us ---------------------------------------------------------------------------------

    def observe(self, job: Job, update: Update) -> None:
        """From ``Jobs.on_update``: must not wait, and must not fail."""
        if job.id not in self._entries:
            if job.terminal:
                self._changed.set()  # Somebody else's job: what is in the target may be another image now.
            return
        if job.seq == update.seq and update.state is job.state:
            self._progress[job.id] = update
        self._news.put_nowait(job)

    def changed(self) -> None:
        self._changed.set()

    async def figures(self) -> FleetFigures:
        waiting, untold = await asyncio.to_thread(self._ledger.counts)
        return FleetFigures(
            self.connected, self.connections, untold, waiting, self.chunk_bytes, dict(self.commands), dict(self.ended)
        )

    async def drifted(self) -> dict[str, bool]:
        """Whether something else is proven in a target than its last roll-out wanted; targets of ours that one has reached."""
        wanted = await asyncio.to_thread(self._ledger.wanted)
        rows = [{**row, "gateway": self.member.name, "target": row["name"]} for row in self._jobs.targets()]
        own = {str(row["target"]) for row in rows}
        desired = {(self.member.name, target): one for target, one in wanted.items() if target in own}
        return {found.target: found.what != "as wanted" for found in select.drift(desired, rows)}

    # --- life -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._take_news(), name="fleet: news")
            group.create_task(self._stay_connected(), name="fleet: link")

    async def _recall(self) -> None:
        """What happened to our jobs between the last word of the ledger and now: the daemon may have been killed."""
        for entry in await asyncio.to_thread(self._ledger.running):
            self._entries[entry.job] = entry
            try:
                self._news.put_nowait(self._jobs.get(entry.job))
            except UnknownJob as error:
                await self._end(entry, "failed", error)
            else:
                if entry.canceled:  # It was to be canceled at its next checkpoint, which is remembered here and nowhere else.
                    await self._cancel(entry)

    async def _stay_connected(self) -> None:
        pause_s, turn, said = FIRST_PAUSE_S, random.randrange(1 << 16), ""
        while True:
            started = asyncio.get_running_loop().time()
            try:
                await self._session(turn)
            except BridgedError as error:
                self.trouble = error.message
                if error.message != said:  # Once, and not each time for a month.
                    log.warning("fleet: %s; it is tried again", error.message)
                    said = error.message
                if isinstance(error, ConfigError | FleetRefused):
                    pause_s = max(pause_s, RETRY_S)
            except Exception:  # A defect here, or in nats-py, is no reason to stop anything else.
                log.exception("fleet: defect; it is tried again")
                pause_s = max(pause_s, RETRY_S)
            self.connected = False
            if asyncio.get_running_loop().time() - started > STEADY_S:
                pause_s, said = FIRST_PAUSE_S, ""
            await self._clock.sleep(self._clock.lot(pause_s))
            pause_s, turn = min(2 * pause_s, LONGEST_PAUSE_S), turn + 1

    async def _session(self, turn: int) -> None:
        link = await connect(self._access, f"bridged {self.member.name}", wire.inbox_of(self.member.name), turn)
        self.connected, self.server, self.trouble = True, link.server, ""
        self.connections += 1
        log.info("fleet: connected to %s as %s", link.server, self.member.name)
        self._caught_up.clear()
        works = (self._pull, self._work, self._tell, self._tell_inventory, self._tell_progress)
        tasks = [asyncio.create_task(self._again(link, work), name=f"fleet: {work.__name__}") for work in works]
        tasks.append(asyncio.create_task(_until(link.over), name="fleet: link"))
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if task.cancelled():
                    continue
                if (error := task.exception()) is not None:
                    raise error
            raise FleetUnreachable(f"the connection to {link.server} ended", server=link.server)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await link.close()

    async def _again(self, link: Link, work: Callable[[Link], Coroutine[Any, Any, None]]) -> None:
        """A broker without a leader answers nobody for seconds, or a stream lacks its quorum: the link is kept meanwhile, so
        that an election does not end in a rush of connections."""
        pause_s, said = FIRST_PAUSE_S, ""
        while True:
            started = asyncio.get_running_loop().time()
            try:
                await work(link)
            except FleetError as error:
                if link.over.is_set() or not _passing(error):
                    raise
                if error.message != said:
                    said = error.message
                    log.warning("fleet: %s; it is tried again", said)
            if asyncio.get_running_loop().time() - started > STEADY_S:
                pause_s, said = FIRST_PAUSE_S, ""
            await self._clock.sleep(self._clock.lot(pause_s))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    # --- commands -------------------------------------------------------------------------------------------------

    async def _pull(self, link: Link) -> None:
        pull = await link.pull(wire.COMMANDS, self.member.name)
        while True:
            while batch := await pull.get(BATCH):
                for message, acknowledge in batch:
                    await self._take(message.subject, message.data, message.at)
                    await acknowledge()
            # Only now: everything that waited is known, cancellations too.
            self._caught_up.set()
            self._wake_worker.set()
            while not (first := await pull.get(1, self.member.poll_s)):
                pass  # On a radio link an idle gateway is little more than this.
            for message, acknowledge in first:
                self._caught_up.clear()
                await self._take(message.subject, message.data, message.at)
                await acknowledge()

    async def _take(self, subject: str, data: bytes, at: float) -> None:
        """Raises ``StorageError`` where it cannot be remembered: then it is not acknowledged, and comes again."""
        try:
            found = wire.received(data, subject, self.member.name)
            if isinstance(found, wire.Cancel):
                async with self._deciding:
                    entry = await asyncio.to_thread(self._ledger.take_back, found, at)
                    self.commands["cancellation"] += 1
                    self._wake_teller.set()  # It may have left its mark.
                    if entry is not None:
                        await self._cancel(entry)
            elif await asyncio.to_thread(self._ledger.take, found, at):
                log.info("fleet: command %s: %s of %s", found.id, found.kind, found.target)
                self.commands["taken"] += 1
                self._wake_teller.set()
            else:
                self.commands["repeated"] += 1
        except (FleetCommand, FleetStale) as error:
            # Nobody can be told in a state that others would take for the one of a job.
            log.warning("fleet: refused: %s", error.message)
            self.commands["refused"] += 1

    async def _cancel(self, entry: Entry) -> None:
        if not entry.job:
            await self._is_over(entry)
            return
        try:
            await self._jobs.cancel(entry.job)
        except BridgedError as error:
            log.info("fleet: %s is not taken back: %s", entry.command.id, error.message)

    async def _work(self, link: Link) -> None:
        """One command after another: a radio link carries one download at a time best."""
        while True:
            await self._caught_up.wait()
            self._wake_worker.clear()
            waiting = await asyncio.to_thread(self._ledger.waiting)
            now = asyncio.get_running_loop().time()
            for entry in waiting:
                await self._caught_up.wait()
                if self._retry_at.get(entry.number, 0.0) <= now:
                    await self._carry_out(link, entry)
            later = [self._retry_at[e.number] for e in waiting if e.number in self._retry_at]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(min(later) if later else None):
                    await self._wake_worker.wait()

    async def _carry_out(self, link: Link, entry: Entry) -> None:
        command = entry.command
        self._retry_at.pop(entry.number, None)
        try:
            async with self._deciding:
                if await self._is_over(entry):
                    return
            sub = _submission(command)
            if command.artifact:
                await self._note(entry, replace(entry.report, state="staging", at=self._clock.utc()))
                await download(link, self._store, self._ledger, command.artifact, self._came)
            await _to_its_end(self._submit(entry, sub))
        except FleetUnreachable:
            raise
        except BridgedError as error:
            if error.retryable or _passing(error):
                log.warning("fleet: %s waits: %s", command.id, error.message)
                self._retry_at[entry.number] = asyncio.get_running_loop().time() + RETRY_S
                return
            await self._end(entry, "rejected", error)

    async def _submit(self, entry: Entry, sub: Submission) -> None:
        async with self._deciding:
            if not await self._is_over(entry):
                job = await self._jobs.submit(sub)
                await self._became(entry, job)

    async def _became(self, entry: Entry, job: Job) -> None:
        """Once there is a job, the ledger and we must know it, or its end is told to nobody before the next start."""
        self._entries[job.id] = await asyncio.to_thread(self._ledger.submitted, entry, job.id)
        # It may have changed, and even ended, before we listened.
        self._news.put_nowait(self._jobs.get(job.id))

    async def _is_over(self, entry: Entry) -> bool:
        """A job already, taken back, or too late. With ``_deciding`` held."""
        found = next((one for one in await asyncio.to_thread(self._ledger.waiting) if one.number == entry.number), None)
        if found is None:
            return True
        if (job := self._job_of(found.command)) is not None:
            await _to_its_end(self._became(found, job))
            if found.canceled:
                await self._cancel(replace(found, job=job.id))
            return True
        if found.canceled:
            await self._end(found, "canceled", None)
            return True
        now = await asyncio.to_thread(self._ledger.now, self._clock.utc())
        if entry.command.expires and now >= entry.command.expires:
            late = FleetExpired(f"command {entry.command.id} was to begin before {entry.command.expires:.0f}, it is {now:.0f}")
            await self._end(found, "expired", late)
            return True
        return False

    def _job_of(self, command: Command) -> Job | None:
        """Its job, if the journal has one that the ledger did not get to know: the power was cut, or the disk was full."""
        try:
            job = self._jobs.find(command.id)
        except UnknownJob:
            return None
        # Somebody else may have used the id; that is said when it is submitted.
        return job if (job.principal, job.target) == (PRINCIPAL, command.target) else None

    def _came(self, count: int) -> None:
        self.chunk_bytes += count

    # --- reports --------------------------------------------------------------------------------------------------

    async def _take_news(self) -> None:
        await self._insist(self._recall)
        while True:
            job = await self._news.get()
            await self._insist(partial(self._note_job, job))

    async def _insist(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """A full disk passes, and what was to be remembered is remembered then; nothing of a fleet ends the daemon."""
        said = ""
        while True:
            try:
                return await work()
            except BridgedError as error:
                if error.message != said:
                    said = error.message
                    log.warning("fleet: %s; it is tried again", said)
            except Exception:
                log.exception("fleet: defect; how a job ended may not be told")
                return None
            await self._clock.sleep(RETRY_S)

    async def _note_job(self, job: Job) -> None:
        entry = self._entries.get(job.id)
        if entry is None:
            return
        error, result = job.error or {}, job.result or {}
        now = Report(
            self.member.name,
            entry.command.rollout,
            entry.command.target,
            entry.command.round,
            str(job.state),
            job.id,
            job.phase,
            str(error.get("code", "")) or job.reason,
            str(error.get("message", ""))[:MESSAGE_CHARS],
            str(result.get("evidence", "")),
            self._clock.utc(),
        )
        # A phase is worth a message only while somebody looks on: progress has it.
        if replace(now, at=0, phase="") != replace(entry.report, at=0, phase=""):
            await self._note(entry, now)
            self._entries[job.id] = replace(entry, report=now)
        if job.terminal:
            self._entries.pop(job.id, None)
            self._progress.pop(job.id, None)
            self._changed.set()

    async def _note(self, entry: Entry, now: Report) -> bool:
        """Whether it is to be told: it is not where another end was noted before."""
        news = await asyncio.to_thread(self._ledger.note, entry, now)
        if news and now.ended:
            self.ended[now.state] += 1
        self._wake_teller.set()
        return news

    async def _end(self, entry: Entry, state: str, error: BridgedError | None) -> None:
        code, text = (error.code, error.message[:MESSAGE_CHARS]) if error else ("", "")
        if await self._note(entry, replace(entry.report, state=state, code=code, message=text, at=self._clock.utc())):
            log.info("fleet: command %s: %s%s", entry.command.id, state, f": {text}" if text else "")

    async def _tell(self, link: Link) -> None:
        while True:
            self._wake_teller.clear()
            while untold := await asyncio.to_thread(self._ledger.untold):
                for number, dirty, now in untold:
                    await link.publish(now.subject, now.encode())
                    await asyncio.to_thread(self._ledger.told, number, dirty)
            await self._wake_teller.wait()

    async def _tell_progress(self, link: Link) -> None:
        while self.member.progress_s:
            await asyncio.sleep(self.member.progress_s)
            progress, self._progress = self._progress, {}
            for job_id, update in progress.items():
                entry = self._entries.get(job_id)
                if entry is not None:
                    command = entry.command
                    now = Progress(self.member.name, command.rollout, command.target, update.phase, update.done, update.total)
                    now = replace(now, rate=round(update.rate))
                    await link.tell(now.subject, now.encode())
        await asyncio.Event().wait()

    async def _tell_inventory(self, link: Link) -> None:
        """What differs from what the broker was told: on a radio link the same words each morning would cost more than jobs."""
        me = {"gateway": self.member.name, "labels": dict(self.member.labels), "bridged": __version__}
        while True:
            self._changed.clear()
            rows = self._jobs.targets()
            await self._tell_if_new(
                link, wire.gateway_subject(self.member.name), {**me, "targets": sorted(str(row["name"]) for row in rows)}
            )
            for row in rows:
                if wire.TOKEN.fullmatch(str(row["name"])):
                    await self._tell_if_new(link, wire.target_subject(self.member.name, str(row["name"])), _inventory(me, row))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RECHECK_S):
                    await self._changed.wait()

    async def _tell_if_new(self, link: Link, subject: str, data: Mapping[str, Any]) -> None:
        raw = wire.encode_state(data)
        key, digest = f"told {subject}", hashlib.sha256(raw).hexdigest()
        if await asyncio.to_thread(self._ledger.get, key) != digest:
            await link.publish(subject, raw)
            await asyncio.to_thread(self._ledger.put, key, digest)


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """``work`` is not broken off where the link breaks, and the caller with it: who is cancelled waits for its end."""
    task, canceled = asyncio.ensure_future(work), False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            canceled = True
    if canceled:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("fleet: %s; it is tried again", error)
        raise asyncio.CancelledError
    task.result()


async def _until(event: asyncio.Event) -> None:
    await event.wait()


def _passing(error: BridgedError) -> bool:
    """What the broker said of itself, and not of what we asked for."""
    return type(error) in (FleetError, FleetUnreachable)


INVENTORY = (
    *("chip", "pid", "family", "names", "uid", "flash_bytes", "loader"),
    *("content", "image", "image_name", "version", "evidence", "proven"),
)


def _inventory(me: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """Of a target, what an operator selects by. Busy or idle changes with each job, and says nothing in a month."""
    state = str(row["state"]) if row["state"] in ("absent", "broken") else "present"
    reason = str(row["reason"])[:200] if state == "broken" else ""
    found = {"target": row["name"], "state": state, "reason": reason}
    return {**me, **found, **{key: row[key] for key in INVENTORY if row.get(key)}}


def _submission(command: Command) -> Submission:
    """As everybody's: the table of verbs checks the options. Raises ``BadRequest``."""
    if command.kind not in set(JobKind) or VERB_OF[JobKind(command.kind)] not in KINDS:
        raise BadRequest(f"kind {command.kind[:40]!r}: expected {' or '.join(JobKind)}")
    if reserved := {"target", "image", "id", "wait"} & command.options.keys():
        raise BadRequest(f"{sorted(reserved)[0]} is no option of a command of a fleet")
    verb, data = VERB_OF[JobKind(command.kind)], dict(command.options)
    if command.artifact:
        data["image"] = command.artifact.sha256
    values = values_of(verb, {"target": command.target, **data})
    return submission(verb, {**values, "id": command.id}, PRINCIPAL)
