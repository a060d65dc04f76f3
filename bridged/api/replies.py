"""Jobs, updates and targets as clients see them: which fields go out, in which order, under which code.

Pure: from the records of ``jobs`` to fields (``…_data``, which HTTP has as well) and to ``protocol.reply.Reply``. How a line
looks on the wire is the codec's business, who gets it the server's. How a job that has ended is told is in ``final_reply``, and
nowhere else.
"""

from __future__ import annotations

import datetime
from typing import Any

from bridged.errors import BridgedError, Canceled, DeadlineExceeded, NotAllowed
from bridged.jobs.model import Job, JobKind, JobState, Update
from bridged.jobs.records import AuditEntry, Credential
from bridged.protocol.reply import Reply, failure_reply


def utc(seconds: float) -> str | None:
    """RFC 3339 in UTC with milliseconds; ``None`` for 0, which means "not yet"."""
    if not seconds:
        return None
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def job_summary(job: Job) -> dict[str, Any]:
    """One line of JOBS."""
    return {
        "job": job.id,
        "kind": job.kind,
        "target": job.target,
        "state": job.state,
        "phase": job.phase or None,
        "reason": job.reason or None,
        "done": job.done,
        "total": job.total,
        "error": (job.error or {}).get("code"),
        "image": ",".join(f"sha256:{part}" for part in job.image.split(",")) if job.image else None,
        "created": utc(job.created),
        "ended": utc(job.ended),
    }


def job_data(job: Job) -> dict[str, Any]:
    """Everything about one job."""
    rest = {
        "seq": job.seq,
        "attempts": job.attempts,
        "content": job.content or None,
        "principal": job.principal or None,
        "source": job.source or None,
        "started": utc(job.started),
        "params": job.params or None,
        "message": (job.error or {}).get("message"),
        "remedy": (job.error or {}).get("remedy"),
        "result": job.result,
    }
    return job_summary(job) | rest


def final_reply(job: Job) -> Reply:
    """The line that says how a job ended: 250 done, 251 nothing was to be done, else the error with its evidence."""
    context: dict[str, Any] = {"job": job.id, "kind": job.kind, "target": job.target, "state": job.state}
    if job.state is JobState.SUCCEEDED:
        result = dict(job.result or {})
        found = result.pop("findings", None) or []
        if job.kind is JobKind.DOCTOR:
            result |= {f"{level}s": sum(f["level"] == level for f in found) for level in ("problem", "warning")}
        return Reply(251 if unchanged(job) else 250, "", context | result)
    error = job.error or _error_of(job).as_dict()
    reply = failure_reply(error, context | {"phase": job.phase or None})
    code = 550 if job.state is JobState.REJECTED else 400 if reply.code in (421, 423, 429) else reply.code
    return Reply(code, reply.text, dict(reply.data) | ({"result": job.result} if job.result else {}))


def findings(job: Job) -> list[Reply]:
    """What a DOCTOR job has found, a line each, before its final one."""
    return [Reply(250, "", finding | {"target": job.target}, more=True) for finding in (job.result or {}).get("findings") or []]


def unchanged(job: Job) -> bool:
    return job.kind in (JobKind.FLASH, JobKind.ENSURE) and (job.result or {}).get("changed") is False


def _error_of(job: Job) -> BridgedError:
    """For a job that ended badly without an error of its own."""
    text = f"job {job.id} on {job.target} ended as {job.state}" + (f" ({job.reason})" if job.reason else "")
    classes: dict[JobState, type[BridgedError]] = {
        JobState.CANCELED: Canceled,
        JobState.REJECTED: NotAllowed,
        JobState.TIMED_OUT: DeadlineExceeded,
    }
    return classes.get(job.state, BridgedError)(text)


def update_data(update: Update) -> dict[str, Any]:
    return {
        "job": update.job,
        "target": update.target,
        "seq": update.seq,
        "at": utc(update.at),
        "state": update.state,
        "phase": update.phase or None,
        "done": update.done,
        "total": update.total,
        "rate": round(update.rate),
        "code": update.code or None,
        "reason": update.reason or None,
        **update.event,
    }


def progress(update: Update) -> Reply:
    return Reply(150, "", update_data(update), more=True)


def progress_of(job: Job) -> Reply:
    data = {
        "job": job.id,
        "target": job.target,
        "seq": job.seq,
        "state": job.state,
        "phase": job.phase or None,
        "reason": job.reason or None,
        "done": job.done,
        "total": job.total,
    }
    return Reply(150, "", data, more=True)


def credential_data(credential: Credential) -> dict[str, Any]:
    """Never the secret, nor its digest; what a certificate is called is no secret."""
    kind, _, value = credential.key.partition(":")
    return {
        "name": credential.name,
        "kind": "certificate" if kind == "cert" else "token",
        "certificate": value if kind == "cert" else None,
        "scopes": credential.scopes,
        "targets": credential.targets or None,
        "created": utc(credential.created),
        "expires": utc(credential.expires),
        "by": credential.made_by or None,
    }


def audit_data(entry: AuditEntry) -> dict[str, Any]:
    data = {"at": utc(entry.at), "who": entry.who or "nobody", "from": entry.source, "what": entry.what}
    rest = {"target": entry.target, "job": entry.job, "result": entry.result, "detail": entry.detail}
    return data | {key: value or None for key, value in rest.items()}


def target_data(info: dict[str, Any]) -> dict[str, Any]:
    """``name`` goes out as ``target``, the word that every other line uses; times as people read them."""
    data = {"target": info["name"], **{key: value for key, value in info.items() if key != "name"}}
    for key in ("identified", "proven"):
        if isinstance(data.get(key), int | float):
            data[key] = utc(data[key])
    data["pid"] = data.get("pid") or None
    return data
