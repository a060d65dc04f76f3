"""Errors over HTTP: RFC 9457 problem documents with our stable codes. The only place that turns a code into a number.

``STATUS`` names the codes whose number says more than that of their class; ``status_of`` knows the rest. A handler that must
answer with another number (412, 415, 460 ...) or with headers raises ``Refused`` around the error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from bridged.api import web
from bridged.errors import BY_CODE, BridgedError, ChipError, ImageError, JobError, RequestError, TargetError

MEDIA = "application/problem+json"
RETRY_AFTER_S = 5  # Where nothing better is known.

STATUS: dict[str, int] = {
    "IMAGE_TOO_LARGE": 413,
    "UNKNOWN_IMAGE": 404,
    "NOT_SAFE_TO_STOP": 409,
    "TARGET_BROKEN": 409,
    "PORT_BUSY": 409,
    "UNKNOWN_JOB": 404,
    "UNKNOWN_TRACE": 404,
    "UNKNOWN_TARGET": 404,
    "UNKNOWN_CREDENTIAL": 404,
    "UNKNOWN_PATH": 404,
    "ID_CONFLICT": 422,
    "QUEUE_FULL": 429,
    "TOO_MANY": 429,
    "STOPPED": 503,
    "DAEMON_UNREACHABLE": 503,
    "STORAGE": 500,
    "STORAGE_FULL": 507,
    "STORAGE_FAILED": 500,
    "JOURNAL": 500,
    "CHANGED": 412,
    "NOT_ALLOWED": 403,
    "SIGNATURE": 403,
    "POLICY": 403,
    "CONSENT_MISSING": 422,
    "FOREIGN_ORIGIN": 403,
    "LOGIN_FIRST": 401,
    "BAD_TOKEN": 401,
    "TOO_LARGE": 413,
}
# Of a class where the code has no line above, the most special one first. 502: the gateway works, its target does not.
_CLASSES: tuple[tuple[type[BridgedError], int], ...] = (
    (ImageError, 422),
    (ChipError, 422),
    (TargetError, 502),
    (JobError, 409),
    (RequestError, 400),
)


class Refused(Exception):
    """An error with a number, or headers, of its own."""

    def __init__(self, error: BridgedError, status: int = 0, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(error.message)
        self.error, self.status, self.headers = error, status or status_of(error.code), dict(headers or {})


def status_of(code: str) -> int:
    if code in STATUS:
        return STATUS[code]
    cls = BY_CODE.get(code, BridgedError)
    return next((number for known, number in _CLASSES if issubclass(cls, known)), 500)


def document(error: BridgedError, status: int) -> dict[str, Any]:
    """``title`` is the code: it is what never changes from one occurrence to the next."""
    data = error.as_dict()
    return {
        "type": f"urn:bridged:error:{error.code}",
        "title": error.code,
        "status": status,
        "detail": data.pop("message"),
        **data,
    }


def answer(error: BridgedError, status: int = 0, headers: Mapping[str, str] | None = None) -> web.Response:
    status = status or status_of(error.code)
    sent = dict(headers or {})
    if status in (429, 503):
        # What the error knows itself beats the general answer.
        seconds = error.facts.get("retry_after_s")
        sent.setdefault("Retry-After", str(max(1, round(seconds)) if isinstance(seconds, int | float) else RETRY_AFTER_S))
    if status == 401:
        sent.setdefault("WWW-Authenticate", 'Bearer realm="bridged"')
    body = json.dumps(document(error, status), separators=(",", ":"), default=str).encode()
    return web.Response(body=body, status=status, content_type=MEDIA, headers=sent)
