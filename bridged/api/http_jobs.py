"""Targets, jobs, plans and recordings over HTTP: the same job functions as the line protocol, as resources.

A job is submitted to its target, ``POST /v1/targets/{target}/jobs``, and is then ``/v1/jobs/{job}``. What a kind of job takes
is the table of verbs of the line protocol, read from JSON by ``requests.values_of``; what comes back are the fields of
``replies``. Nothing here waits for a target.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bridged.api import consoles, web
from bridged.api.http_call import (
    CHUNK_BYTES,
    SAFE,
    Answer,
    Body,
    Call,
    Limits,
    Operation,
    Param,
    encoded,
    etag,
    reply,
    tags_match,
)
from bridged.api.http_problem import Refused
from bridged.api.replies import job_data, target_data, update_data
from bridged.api.requests import VERB_OF, submission, values_of
from bridged.api.transfers import in_thread
from bridged.errors import BadRequest, BridgedError, Changed, UnknownJob, UnknownTrace
from bridged.jobs.model import TERMINAL, Job, JobKind, JobState
from bridged.protocol.verbs import Scope

PAGE_LIMIT = 200  # Jobs or images of one answer; some 1 KiB each.
LOG_LIMIT = 500  # Entries of a log in one answer.
TRACE_BYTES = 16 << 20  # Larger recordings are given as they are, not decoded: decoding holds some ten times as much.

TARGET = Param("target", "path", "name of a target", {"type": "string", "pattern": r"[A-Za-z0-9_-]{1,32}"}, True)
JOB = Param("job", "path", "id of a job", {"type": "string", "pattern": r"[A-Za-z0-9]{1,32}"}, True)
KEY = Param(
    "Idempotency-Key",
    "header",
    "1 to 128 printable characters, with or without quotes: the same key and request again find the same job",
    {"type": "string", "pattern": r"[!-~]{1,128}"},
)
CURSOR = Param(
    "cursor", "query", "`next` of the answer before", {"type": "string", "pattern": r"[A-Za-z0-9.-]{1,120}", "minLength": 1}
)
COUNT = Param("limit", "query", "at most so many", {"type": "integer", "minimum": 1, "maximum": PAGE_LIMIT, "default": 50})
IF_MATCH = Param(
    "If-Match", "header", "ETag of the target: refused with 412 when it has changed since", {"type": "string", "maxLength": 400}
)
IF_NONE_MATCH = Param(
    "If-None-Match", "header", "ETag of what you have: 304 when it is still so", {"type": "string", "maxLength": 400}
)
DECODING = asyncio.Semaphore(1)  # Decoding a long recording takes a second of a processor that the daemon shares.


def job_resource(job: Job, traced: bool) -> dict[str, Any]:
    """As STATUS gives it, with the whole error and whether a recording is kept."""
    data = job_data(job)
    data.pop("message")
    data.pop("remedy")
    return data | {"problem": job.error, "trace": traced}


async def resource_of(call: Call, job: Job) -> dict[str, Any]:
    kept = await in_thread(call.jobs.trace_file, job.id) if job.terminal else None
    return job_resource(job, kept is not None)


# --- targets ------------------------------------------------------------------------------------------------------


def target_resource(call: Call, info: dict[str, Any]) -> dict[str, Any]:
    """As INFO gives it, with who holds it: a job, a lock, or who writes on its console."""
    name = str(info["name"])
    held = consoles.holder(call.services.consoles[name]) if name in call.services.consoles else {}
    shown = {key.removeprefix("owner_"): value for key, value in held.items() if key != "owner_since"}
    return target_data(info) | {"held": shown or None}


async def list_targets(call: Call) -> web.StreamResponse:
    return tagged(call, encoded({"targets": [target_resource(call, info) for info in call.jobs.targets()]}))


async def get_target(call: Call) -> web.StreamResponse:
    return tagged(call, _target_body(call))


def _target_body(call: Call) -> bytes:
    return encoded(target_resource(call, call.jobs.info(call.path["target"])))


def tagged(call: Call, body: bytes) -> web.Response:
    """200 with an ETag, or 304."""
    tag = etag(body)
    asked = call.header("If-None-Match")
    if asked and tags_match(asked, tag):
        return web.Response(status=304, headers={"ETag": tag})
    return web.Response(body=body, content_type="application/json", headers={"ETag": tag})


async def plan(call: Call) -> web.StreamResponse:
    data = await call.json()
    values = values_of("PLAN", {"target": call.path["target"], **data})
    with _well_formed():
        return reply(await call.jobs.plan(values.pop("target"), values.pop("image"), values))


# --- jobs ---------------------------------------------------------------------------------------------------------


async def submit(call: Call) -> web.StreamResponse:
    data = await call.json()
    kind = data.pop("kind", None)
    if not isinstance(kind, str) or kind not in set(JobKind):
        raise BadRequest(f"kind {str(kind)[:40]!r}: expected {' or '.join(JobKind)}")
    name = call.path["target"]
    if reserved := {"target", "id", "wait"} & data.keys():
        raise BadRequest(
            f"{sorted(reserved)[0]} is no option of a job over HTTP: the target is in the path, an id in its header"
        )
    verb = VERB_OF[JobKind(kind)]
    sub = submission(verb, {**values_of(verb, {"target": name, **data}), "id": key_of(call)}, call.principal.name)
    if (wanted := call.header("If-Match")) and not tags_match(wanted, etag(_target_body(call))):
        raise Changed(f"target {name} is not as it was when you looked at it", target=name)
    with _well_formed():
        job = await call.jobs.submit(sub)
    return reply(await resource_of(call, job), 202, {"Location": f"/v1/jobs/{job.id}"})


@contextlib.contextmanager
def _well_formed() -> Iterator[None]:
    """What a request as a whole cannot mean, though each of its fields is right, has a number of its own."""
    try:
        yield
    except BadRequest as error:
        raise Refused(error, 422) from error


def key_of(call: Call) -> str:
    """The draft of Idempotency-Key makes it a quoted string; people write it without."""
    text = call.header("Idempotency-Key")
    return text[1:-1] if len(text) > 2 and text[0] == text[-1] == '"' else text


async def list_jobs(call: Call) -> web.StreamResponse:
    limit, state = call.query["limit"], call.query.get("state")
    try:
        found = call.jobs.list(
            call.query.get("target"), JobState(state) if state else None, limit, call.query.get("cursor", "")
        )
    except UnknownJob as error:
        text = "the cursor is too old: the job that it names has been removed; begin with the first page"
        raise Refused(BadRequest(text), 410) from error
    traced = await in_thread(lambda: {j.id for j in found if j.terminal and call.jobs.trace_file(j.id)})
    jobs = [job_resource(job, job.id in traced) for job in found]
    return reply({"jobs": jobs, "next": found[-1].id if len(found) == limit else None})


async def get_job(call: Call) -> web.StreamResponse:
    job = call.jobs.get(call.path["job"])
    if (seconds := call.query["wait"]) and not job.terminal:
        await _ended(call, job.id, seconds)
        job = call.jobs.get(job.id)
    return reply(await resource_of(call, job))


async def _ended(call: Call, job_id: str, seconds: float) -> None:
    """Until the job has ended or the time is over."""
    source = call.jobs.watch(job_id=job_id)
    try:
        async with asyncio.timeout(seconds):
            async for update in source:
                if update.state in TERMINAL:
                    return
    except TimeoutError:
        pass
    finally:
        if (close := getattr(source, "aclose", None)) is not None:
            await close()


async def cancel(call: Call) -> web.StreamResponse:
    data = await call.json(optional=True)
    force = data.pop("force", False)
    if data or not isinstance(force, bool):
        raise BadRequest('the body of a cancel is {} or {"force": true}')
    job = await call.jobs.cancel(call.path["job"], force)
    return reply(await resource_of(call, job), 202, {"Location": f"/v1/jobs/{job.id}"})


async def log(call: Call) -> web.StreamResponse:
    limit = call.query["limit"]
    found = call.jobs.log(call.path["job"], call.query["from"], limit)
    following = found[-1].seq + 1 if len(found) == limit else None
    return reply({"entries": [update_data(update) for update in found], "next": following})


async def data_of(call: Call) -> web.StreamResponse:
    job = call.jobs.get(call.path["job"])
    path = await in_thread(call.jobs.read_result, job.id)
    return await send_file(call, path, f"{job.id}.bin", BadRequest(f"the bytes of job {job.id} were removed a moment ago"))


async def trace(call: Call) -> web.StreamResponse:
    job = call.jobs.get(call.path["job"])
    path = await in_thread(call.jobs.trace_file, job.id)
    none = UnknownTrace(f"no recording is kept of job {job.id} ({job.kind}, {job.state})", job=job.id)
    if path is None:
        raise none
    if not call.query["decoded"]:
        return await send_file(call, path, f"{job.id}.trace.txt", none, "text/plain; charset=utf-8")
    async with DECODING:
        text = await in_thread(_decoded, path, call.query["fold"])
    return web.Response(text=text, content_type="text/plain", charset="utf-8")


def _decoded(path: Path, fold: bool) -> str:
    from bridged.protocol import trace as recordings  # late: who never asks does not pay for it
    from bridged.protocol import trace_text

    try:
        if path.stat().st_size > TRACE_BYTES:
            raise Refused(BadRequest(f"the recording is larger than {TRACE_BYTES} bytes; fetch it without decoded=1"), 413)
        text = path.read_text("utf-8", "replace")
    except FileNotFoundError:
        raise UnknownTrace("the recording was removed a moment ago") from None
    return trace_text.table(recordings.decode(text), fold=fold)


async def send_file(
    call: Call, path: Path, name: str, gone: BridgedError, media: str = "application/octet-stream", tag: str = ""
) -> web.StreamResponse:
    """In pieces, each within the time that a slow reader has; never shown by a browser as a page of ours. Raises ``gone``."""
    try:
        file = await asyncio.to_thread(path.open, "rb")
    except FileNotFoundError:
        raise gone from None
    try:
        left = os.fstat(file.fileno()).st_size
        response = web.StreamResponse(headers={**SAFE, "Content-Disposition": f'attachment; filename="{name}"'})
        if tag:
            response.headers["ETag"] = tag
        response.headers["Content-Type"] = media
        response.content_length = left
        async with asyncio.timeout(call.limits.drain_timeout_s):
            await response.prepare(call.request)
        if call.request.method == "HEAD":
            return response
        while left:
            piece = await in_thread(file.read, min(left, CHUNK_BYTES))
            if not piece:
                break  # The length was promised: aiohttp closes the connection, so that short is not taken for whole.
            async with asyncio.timeout(call.limits.drain_timeout_s):
                await response.write(piece)
            left -= len(piece)
        return response
    finally:
        file.close()


_WHERE = {"Location": "where the job is"}
_TAG = {"ETag": "changes whenever anything of it does"}
_DECODED = Param("decoded", "query", "1: commands and answers in words", {"type": "boolean", "default": False})

OPERATIONS: tuple[Operation, ...] = (
    Operation(
        *("GET", "/v1/targets", "listTargets", "All targets: state, chip, what runs", Scope.READ, list_targets),
        {200: Answer("the targets", "Targets", headers=_TAG), 304: Answer("as you have it")},
        (IF_NONE_MATCH,),
        tag="targets",
    ),
    Operation(
        *("GET", "/v1/targets/{target}", "getTarget", "One target", Scope.READ, get_target),
        {200: Answer("the target", "Target", headers=_TAG), 304: Answer("as you have it")},
        (TARGET, IF_NONE_MATCH),
        tag="targets",
    ),
    Operation(
        *("POST", "/v1/targets/{target}/plan", "planFlash", "What a flash would do; touches nothing", Scope.READ, plan),
        {200: Answer("the plan", "Plan")},
        (TARGET,),
        Body("image and options", "PlanRequest"),
        tag="targets",
    ),
    Operation(
        *("POST", "/v1/targets/{target}/jobs", "submitJob", "Submit a job", Scope.FLASH, submit),
        {202: Answer("accepted: it survives whatever happens to you or to us", "Job", headers=_WHERE)},
        (TARGET, KEY, IF_MATCH),
        Body("kind and options", "JobRequest"),
        tag="jobs",
    ),
    Operation(
        *("GET", "/v1/jobs", "listJobs", "Jobs, the newest first", Scope.READ, list_jobs),
        {200: Answer("a page of jobs", "Jobs")},
        (
            Param("target", "query", "only of this target", dict(TARGET.schema)),
            Param("state", "query", "only in this state", {"type": "string", "enum": [str(state) for state in JobState]}),
            COUNT,
            CURSOR,
        ),
        tag="jobs",
    ),
    Operation(
        *("GET", "/v1/jobs/{job}", "getJob", "One job", Scope.READ, get_job),
        {200: Answer("the job", "Job")},
        (
            JOB,
            Param(
                "wait",
                "query",
                "seconds to wait for its end; it comes as it is then",
                {"type": "integer", "minimum": 0, "maximum": int(Limits().wait_s), "default": 0},
            ),
        ),
        tag="jobs",
    ),
    Operation(
        *("POST", "/v1/jobs/{job}/cancel", "cancelJob", "Cancel a job", Scope.FLASH, cancel),
        {202: Answer("it ends at the next safe moment", "Job", headers=_WHERE)},
        (JOB,),
        Body("`force`: even though the target is left without firmware", "CancelRequest", required=False),
        tag="jobs",
    ),
    Operation(
        *("GET", "/v1/jobs/{job}/log", "getLog", "The history of a job", Scope.READ, log),
        {200: Answer("states, phases and notable events", "Log")},
        (
            JOB,
            Param(
                "from", "query", "only from this number on", {"type": "integer", "minimum": 0, "maximum": 1 << 53, "default": 0}
            ),
            Param(
                "limit",
                "query",
                "at most so many",
                {"type": "integer", "minimum": 1, "maximum": LOG_LIMIT, "default": LOG_LIMIT},
            ),
        ),
        tag="jobs",
    ),
    Operation(
        *("GET", "/v1/jobs/{job}/data", "getData", "The bytes that a read job has read", Scope.READ, data_of),
        {200: Answer("the bytes", media="application/octet-stream")},
        (JOB,),
        tag="jobs",
    ),
    Operation(
        *("GET", "/v1/jobs/{job}/trace", "getTrace", "The recording of its dialogue", Scope.READ, trace),
        {200: Answer("every byte with its time", media="text/plain")},
        (
            JOB,
            _DECODED,
            Param("fold", "query", "0: a row for each command", {"type": "boolean", "default": True}),
        ),
        tag="jobs",
    ),
)
