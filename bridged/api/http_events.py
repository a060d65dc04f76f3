"""Event streams (Server-Sent Events): a job until its end, a target, or everything, as it happens.

Every stream begins with how things are. The stream of a job numbers its events as the log does: who comes back with
``Last-Event-ID`` gets what the log has since then, also after a restart of the daemon. The streams of a target and of
everything are numbered by the ``Recent`` updates, a bounded memory of this life of the daemon; who comes back too late, or
after a restart, gets ``reset`` and looks at everything anew.

Events: ``job`` (an update, as WATCH gives it), ``target`` (its state, when anything of it changed), ``end`` (the whole job; the
stream ends), ``reset``. A comment comes every 15 seconds, so that both sides find out that the other has gone. Nothing waits
for a reader: who does not read for ``drain_timeout_s`` is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Iterator
from typing import Any

from bridged.api import web
from bridged.api.http_call import EVENTS, SAFE, Answer, Call, Operation, Param, encoded
from bridged.api.http_jobs import JOB, TARGET, resource_of, target_resource
from bridged.api.ports import next_update
from bridged.api.replies import update_data
from bridged.errors import BridgedError, TooMany
from bridged.jobs.model import TERMINAL, Job, Update
from bridged.protocol.verbs import Scope

RECENT_LIMIT = 512  # Updates in memory for who comes back: some 300 bytes each, minutes of a busy gateway.
PAGE = 200  # Entries of a log that are held at once for one reader.
RETRY_MS = 2000  # How long a browser waits before it comes back.

LAST = Param(
    "Last-Event-ID", "header", "id of the last event that you have", {"type": "string", "pattern": r"[A-Za-z0-9.]{1,40}"}
)


class Recent:
    """The last updates that are worth a number, and who wants to be woken when a target changes."""

    def __init__(self) -> None:
        self.life = secrets.token_hex(4)
        self._count = 0
        self._updates: OrderedDict[int, Update] = OrderedDict()
        self._numbers: dict[tuple[str, int], int] = {}
        self._latest: OrderedDict[str, int] = OrderedDict()
        self._waiting: set[asyncio.Event] = set()

    def note(self, _job: Job, update: Update) -> None:
        """Called for every update before anybody is shown it. Mere progress repeats a number and is not remembered."""
        if self._latest.get(update.job, -1) >= update.seq:
            return
        self._latest[update.job] = update.seq
        self._latest.move_to_end(update.job)
        while len(self._latest) > RECENT_LIMIT:
            self._latest.popitem(last=False)
        self._count += 1
        self._updates[self._count] = update
        self._numbers[update.job, update.seq] = self._count
        while len(self._updates) > RECENT_LIMIT:
            _, old = self._updates.popitem(last=False)
            self._numbers.pop((old.job, old.seq), None)

    def id_of(self, update: Update) -> str:
        """Empty for what has no number."""
        number = self._numbers.get((update.job, update.seq))
        return f"{self.life}.{number}" if number is not None else ""

    def since(self, last: str) -> list[Update] | None:
        """What came after the event with this id; None when that is not known any more."""
        life, _, number = last.partition(".")
        if life != self.life or not number.isdigit() or int(number) > self._count:
            return None
        first = next(iter(self._updates), self._count + 1)
        if int(number) < first - 1:
            return None
        return [update for at, update in self._updates.items() if at > int(number)]

    def targets_changed(self) -> None:
        for event in self._waiting:
            event.set()

    @contextlib.contextmanager
    def waking(self) -> Iterator[asyncio.Event]:
        event = asyncio.Event()
        self._waiting.add(event)
        try:
            yield event
        finally:
            self._waiting.discard(event)


class Stream:
    """One open response."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._response = web.StreamResponse(headers={**SAFE, "Content-Type": EVENTS, "X-Accel-Buffering": "no"})

    async def open(self) -> None:
        await self._in_time(self._response.prepare(self._call.request))
        await self._write(f"retry: {RETRY_MS}\n\n".encode())

    async def send(self, event: str, data: Any, event_id: str = "") -> None:
        head = f"id: {event_id}\n" if event_id else ""
        await self._write(f"{head}event: {event}\ndata: ".encode() + encoded(data) + b"\n\n")

    async def beat(self) -> None:
        await self._write(b": so that you know that we are here\n\n")

    async def close(self) -> web.StreamResponse:
        with contextlib.suppress(ConnectionError, TimeoutError):
            await self._in_time(self._response.write_eof())
        return self._response

    async def _write(self, data: bytes) -> None:
        await self._in_time(self._response.write(data))

    async def _in_time(self, work: Any) -> None:
        try:
            async with asyncio.timeout(self._call.limits.drain_timeout_s):
                await work
        except TimeoutError:
            if (transport := self._call.request.transport) is not None:
                transport.abort()
            raise ConnectionResetError("a reader of events did not read") from None


class Events:
    """The operations, and how many streams are open."""

    def __init__(self) -> None:
        self.recent = Recent()
        self._open: Counter[str] = Counter()

    @contextlib.contextmanager
    def _admitted(self, call: Call) -> Iterator[None]:
        who, limits = call.principal.name, call.limits
        if self._open.total() >= limits.streams or self._open[who] >= limits.streams_each:
            raise TooMany(
                f"{self._open[who]} event streams of {who} are open, {self._open.total()} in all", limit=limits.streams
            )
        self._open[who] += 1
        try:
            yield
        finally:
            self._open[who] -= 1
            if not self._open[who]:
                del self._open[who]

    async def job(self, call: Call) -> web.StreamResponse:
        """Replays the log after ``Last-Event-ID``, then goes on as it happens, and ends with the job."""
        job = call.jobs.get(call.path["job"])
        last = call.header("Last-Event-ID")
        seen = min(int(last), job.seq) if last.isdigit() else -1
        if job.terminal and seen >= job.seq:
            return web.Response(status=204)  # A browser that hears this does not come back.
        with self._admitted(call):
            stream = Stream(call)
            await stream.open()
            try:
                if seen >= 0:
                    while found := call.jobs.log(job.id, seen + 1, PAGE):
                        for update in found:
                            await stream.send("job", update_data(update), str(update.seq))
                        seen = found[-1].seq
                        if len(found) < PAGE:
                            break
                await self._follow(call, stream, job.id, seen)
            except (ConnectionError, BridgedError):
                pass  # The reader has gone, lost its rights, or the job was forgotten meanwhile: the stream ends.
            return await stream.close()

    async def _follow(self, call: Call, stream: Stream, job_id: str, seen: int) -> None:
        source = call.jobs.watch(job_id=job_id)
        async for update in beating(call, stream, source):
            if isinstance(update, Update) and update.seq >= seen:
                # Mere progress has the number of the update before it: it is shown, and not counted as seen anew.
                await stream.send("job", update_data(update), str(update.seq))
                if update.state in TERMINAL:
                    break
        job = call.jobs.get(job_id)
        if job.terminal:
            await stream.send("end", await resource_of(call, job), str(job.seq))

    async def target(self, call: Call) -> web.StreamResponse:
        call.jobs.info(call.path["target"])
        return await self._all(call, call.path["target"])

    async def everything(self, call: Call) -> web.StreamResponse:
        return await self._all(call, None)

    async def _all(self, call: Call, target: str | None) -> web.StreamResponse:
        last = call.header("Last-Event-ID")
        with self._admitted(call), self.recent.waking() as wake:
            stream = Stream(call)
            shown: dict[str, bytes] = {}
            source = call.jobs.watch(target=target)
            missed = self.recent.since(last) if last else []
            await stream.open()
            try:
                if missed is None:
                    await stream.send("reset", {})
                for old in missed or ():
                    if target in (None, old.target) and call.principal.may(Scope.READ, old.target):
                        await stream.send("job", update_data(old), self.recent.id_of(old))
                await self._targets(call, stream, shown, target)
                async for update in beating(call, stream, source, wake):
                    if update is None:
                        await self._targets(call, stream, shown, target)
                        continue
                    number = self.recent.id_of(update)
                    await stream.send("job", update_data(update), number)
                    await self._targets(call, stream, shown, update.target)
            except (ConnectionError, BridgedError):
                pass
            return await stream.close()

    async def _targets(self, call: Call, stream: Stream, shown: dict[str, bytes], name: str | None) -> None:
        """What is not as it was shown."""
        rows = call.jobs.targets() if name is None else [call.jobs.info(name)]
        for row in rows:
            data = target_resource(call, row)
            body = encoded(data)
            if shown.get(str(row["name"])) != body:
                shown[str(row["name"])] = body
                await stream.send("target", data)

    def operations(self) -> tuple[Operation, ...]:
        answer = Answer("events as they happen", media=EVENTS)
        return (
            Operation(
                *("GET", "/v1/jobs/{job}/events", "jobEvents", "Follow a job to its end", Scope.READ, self.job),
                {200: answer, 204: Answer("it has ended, and you have its last event")},
                (JOB, LAST),
                tag="events",
            ),
            Operation(
                *("GET", "/v1/targets/{target}/events", "targetEvents", "Follow a target", Scope.READ, self.target),
                {200: answer},
                (TARGET, LAST),
                tag="events",
            ),
            Operation(
                *("GET", "/v1/events", "allEvents", "Follow everything", Scope.READ, self.everything),
                {200: answer},
                (LAST,),
                tag="events",
            ),
        )


async def beating(
    call: Call, stream: Stream, source: AsyncIterator[Update], wake: asyncio.Event | None = None
) -> AsyncIterator[Update | None]:
    """The updates of ``source``, a heartbeat whenever nothing was sent for long, and None when ``wake`` was set."""
    pending = asyncio.ensure_future(next_update(source))
    waker = asyncio.ensure_future(wake.wait()) if wake is not None else None
    lost = asyncio.ensure_future(call.lost.wait())
    try:
        while not call.services.stopping:
            waiting = {pending, lost} | ({waker} if waker is not None else set())
            done, _ = await asyncio.wait(waiting, timeout=call.limits.heartbeat_s, return_when=asyncio.FIRST_COMPLETED)
            if lost in done:
                return
            if not done:
                call.jobs.require(Scope.READ, None, "watching")  # A token that was revoked sees nothing more.
                await stream.beat()
            if waker is not None and wake is not None and waker in done:
                wake.clear()
                waker = asyncio.ensure_future(wake.wait())
                yield None
            if pending in done:
                update = pending.result()
                if update is None:
                    return
                yield update
                pending = asyncio.ensure_future(next_update(source))
    finally:
        for task in (pending, waker, lost):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task
        if (close := getattr(source, "aclose", None)) is not None:
            await close()
