"""Verbs of jobs: submit, wait and watch, cancel, and what is known of one afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from bridged.api.line_link import Command, Gone, Link
from bridged.api.ports import next_update
from bridged.api.replies import final_reply, findings, job_data, job_summary, progress, progress_of, unchanged, update_data
from bridged.api.requests import KINDS, submission
from bridged.api.transfers import in_thread
from bridged.errors import BadRequest, Stopped, UnknownTrace
from bridged.jobs.model import TERMINAL, Job, JobKind, JobState, Update
from bridged.protocol.reply import Reply

TEXT_PROGRESS_S = 1.0  # Mere progress at most so often for people who read text; programs (JSON) get every update.
LOG_PAGE = 200  # Entries of a log held for one client at a time.


async def _submit(verb: str, link: Link, values: dict[str, Any]) -> None:
    wait = values.pop("wait", False)
    job = await link.jobs.submit(submission(verb, values, link.who.name))
    if wait or (job.kind is JobKind.ENSURE and job.state is JobState.SUCCEEDED and unchanged(job)):
        await link.send(*await _final(link, await _follow(link, job, None) if wait else job))
    else:
        await link.send(Reply(250, "", {"job": job.id, "state": job.state, "target": job.target, "kind": job.kind}))


async def _plan(link: Link, values: dict[str, Any]) -> None:
    plan = await link.jobs.plan(values.pop("target"), values.pop("image"), values)
    lists = {key: value for key, value in plan.items() if isinstance(value, list) and all(isinstance(v, dict) for v in value)}
    rows = [Reply(250, key, row, more=True) for key, value in lists.items() for row in value]
    await link.send_many(rows)
    await link.send(Reply(250, "", {key: value for key, value in plan.items() if key not in lists}))


async def _jobs(link: Link, values: dict[str, Any]) -> None:
    state = None
    if "state" in values:
        try:
            state = JobState(values["state"].lower())
        except ValueError:
            raise BadRequest(f"JOBS: there is no state {values['state']}; expected {' or '.join(JobState)}") from None
    found = link.jobs.list(values.get("target"), state, values.get("limit", 50), values.get("before", ""))
    await link.send_many([Reply(250, "", job_summary(job), more=True) for job in found])
    await link.send(Reply(250, "", {"jobs": len(found)}))


async def _status(link: Link, values: dict[str, Any]) -> None:
    job = link.jobs.get(values["job"])
    await link.send(Reply(250, "", job_data(job) | await _traced(link, job)))


async def _wait(link: Link, values: dict[str, Any]) -> None:
    job = link.jobs.get(values["job"])
    if not job.terminal:
        job = await _follow(link, job, values.get("timeout"))
    if job.terminal:
        await link.send(*await _final(link, job))
    else:
        data = {"job": job.id, "state": job.state, "message": f"the job goes on: {job.state} {job.phase}".rstrip()}
        await link.send(Reply(408, "WAIT_TIMEOUT", data))


async def _watch(link: Link, values: dict[str, Any]) -> None:
    what = values["job|target|*"]
    names = [str(entry["name"]) for entry in link.jobs.targets()]
    if what != "*" and what not in names:
        job = link.jobs.get(what)
        await link.send(*await _final(link, job if job.terminal else await _follow(link, job, None)))
        return
    await link.send(Reply(150, "WATCHING", {"watch": what}, more=True))
    async with contextlib.aclosing(_updates(link, None, None if what == "*" else what, None)) as updates:
        async for update in updates:
            # Without a job there is no end: the sign of life says only that we are here.
            await link.send(Reply(150, "WATCHING", {"watch": what}, more=True) if update is None else progress(update))
    raise Stopped("the stream of updates has ended")


async def _cancel(link: Link, values: dict[str, Any]) -> None:
    job = await link.jobs.cancel(values["job"], values.get("force", False))
    await link.send(Reply(250, "", {"job": job.id, "state": job.state, "phase": job.phase or None}))


async def _log(link: Link, values: dict[str, Any]) -> None:
    count, following = 0, values.get("from", 0)
    while updates := link.jobs.log(values["job"], following, LOG_PAGE):
        await link.send_many([Reply(250, "", update_data(update), more=True) for update in updates])
        count, following = count + len(updates), updates[-1].seq + 1
        if len(updates) < LOG_PAGE:
            break
    await link.send(Reply(250, "", {"job": values["job"], "entries": count, "next": following}))


async def _trace(link: Link, values: dict[str, Any]) -> None:
    job_id = link.jobs.get(values["job"]).id
    path = await in_thread(link.jobs.trace_file, job_id)
    try:
        file = await asyncio.to_thread(path.open, "rb") if path is not None else None
    except FileNotFoundError:
        file = None  # A newer one took its place just now.
    if file is None:
        job = link.jobs.get(job_id)
        raise UnknownTrace(f"no recording is kept of job {job.id} ({job.kind}, {job.state})", job=job.id)
    await link.send_file(file, {"job": job_id})


async def _follow(link: Link, job: Job, timeout_s: float | None) -> Job:
    """Streams 150 lines until ``job`` has ended or the time is over; the job as it is then. Raises ``Stopped``."""
    loop = asyncio.get_running_loop()
    deadline = None if timeout_s is None else loop.time() + timeout_s
    seq, told = -1, 0.0
    async with contextlib.aclosing(_updates(link, job.id, None, deadline)) as updates:
        async for update in updates:
            if update is not None:
                # Mere progress repeats the number of the update before it.
                if link.json or update.seq != seq or loop.time() - told >= TEXT_PROGRESS_S:
                    seq, told = update.seq, loop.time()
                    await link.send(progress(update))
                ended = update.state in TERMINAL
            else:
                job = link.jobs.get(job.id)
                ended = job.terminal
                if not ended:
                    await link.send(progress_of(job))
            if ended:
                break
    job = link.jobs.get(job.id)
    if not job.terminal and (deadline is None or loop.time() < deadline):
        raise Stopped("the daemon is stopping; the job goes on after its next start", job=job.id)
    return job


async def _updates(
    link: Link, job_id: str | None, target: str | None, deadline: float | None
) -> AsyncGenerator[Update | None, None]:
    """Updates as they come, the first of them how things are; ``None`` when it is time for a sign of life.

    Raises ``Gone`` when the client has left, ``Stopped`` when the daemon stops.
    """
    loop = asyncio.get_running_loop()
    source = link.jobs.watch(job_id=job_id, target=target)
    pending = asyncio.ensure_future(next_update(source))
    try:
        while True:
            patience = link.limits.heartbeat_s
            if deadline is not None:
                patience = min(patience, max(0.0, deadline - loop.time()))
            if link.shared.stopping:
                raise Stopped("the daemon is stopping; jobs go on after its next start")
            link.interruptible = True
            try:
                done, _ = await asyncio.wait({pending, link.gone}, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            finally:
                link.interruptible = False
            if link.gone in done:
                raise Gone
            if pending in done:
                update = pending.result()
                if update is None:
                    return
                yield update
                pending = asyncio.ensure_future(next_update(source))
            elif deadline is not None and loop.time() >= deadline:
                return
            else:
                yield None
    finally:
        pending.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await pending
        close = getattr(source, "aclose", None)
        if close is not None:
            await close()


async def _final(link: Link, job: Job) -> list[Reply]:
    """What it found, if it looked for something, then how it ended, with the name of its recording where one is kept."""
    reply = final_reply(job)
    return [*findings(job), replace(reply, data={**reply.data, **await _traced(link, job)})]


async def _traced(link: Link, job: Job) -> dict[str, str]:
    kept = await in_thread(link.jobs.trace_file, job.id) if job.terminal else None
    return {"trace": job.id} if kept is not None else {}


COMMANDS: dict[str, Command] = {
    **{verb: functools.partial(_submit, verb) for verb in KINDS},
    "PLAN": _plan,
    "JOBS": _jobs,
    "STATUS": _status,
    "WAIT": _wait,
    "WATCH": _watch,
    "CANCEL": _cancel,
    "LOG": _log,
    "TRACE": _trace,
}
