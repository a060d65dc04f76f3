"""What every HTTP handler works with: the table of operations, one request (``Call``), and the services behind it.

An ``Operation`` is one row: method, path, who may, what goes in, what comes out, and the function that does it. The router, the
checks of parameters and the OpenAPI document are all made from the rows, so none of them can say something else. Handlers
know neither sockets nor headers of security: that is ``http``; nor how an error looks: that is ``http_problem``.

Invariants: a parameter that is not in the row is refused; a body is read only up to a bound and within a time.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bridged.api import web
from bridged.api.auth import Authority, Principal
from bridged.api.guarded import Guarded
from bridged.api.http_problem import Refused
from bridged.api.ports import JobsApi, StoreApi
from bridged.api.transfers import Transfers
from bridged.console.room import Console
from bridged.errors import BadRequest, TooLarge
from bridged.protocol.verbs import Scope

JSON_BYTES = 64 * 1024  # Of a body in JSON: the line protocol says every job within 1 KiB.
JSON_DEPTH = 16  # No document of ours goes deeper than 3.
CHUNK_BYTES = 64 * 1024  # Of a file that is sent or received: a quarter of what the store syncs at once.
JSON = "application/json"
# On every answer that does not say otherwise: nothing is guessed, kept, framed, or lent to pages of others.
SAFE: Mapping[str, str] = {
    "Server": "bridged",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
EVENTS = "text/event-stream"


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the server; ``image_bytes`` and the first three times come from the configuration."""

    image_bytes: int = 32 << 20  # Largest file that is taken.
    connections: int = 200  # At once; a stream of events or a console holds one for as long as it lasts.
    idle_timeout_s: float = 300.0  # Between two pieces of an upload; a phone on a bad link comes back within minutes.
    head_timeout_s: float = 20.0  # From the connection, or the last answer, to the end of the next request's header.
    body_timeout_s: float = 20.0  # For a whole body in JSON.
    drain_timeout_s: float = 30.0  # For a client to take what it asked for, piece by piece.
    heartbeat_s: float = 15.0  # A comment in every event stream at least so often: finds dead peers, keeps NAT entries alive.
    streams: int = 100  # Event streams at once; each holds up to 256 updates.
    streams_each: int = 32  # Of one principal, so that one page with a defect leaves some to the others.
    wait_s: float = 60.0  # Longest that one request waits for the end of a job.


@dataclass(frozen=True, slots=True)
class Param:
    """One parameter of an operation. ``schema``: JSON Schema of a string or an integer, which is also what is checked."""

    name: str
    where: str  # path, query or header
    text: str
    schema: Mapping[str, Any]
    required: bool = False

    def value(self, text: str) -> Any:
        """Raises ``BadRequest`` saying what is allowed."""
        schema = self.schema
        if schema["type"] == "boolean":
            if text not in ("0", "1", "true", "false"):
                raise BadRequest(f"{self.name}={text[:40]!r}: expected 0 or 1", parameter=self.name)
            return text in ("1", "true")
        if schema["type"] == "integer":
            low, high = schema["minimum"], schema["maximum"]
            if not re.fullmatch(r"[0-9]{1,18}", text) or not low <= int(text) <= high:
                raise BadRequest(f"{self.name}={text[:40]!r}: expected a number from {low} to {high}", parameter=self.name)
            return int(text)
        if "enum" in schema and text not in schema["enum"]:
            expected = " or ".join(schema["enum"])
            raise BadRequest(f"{self.name}={text[:40]!r}: expected {expected}", parameter=self.name)
        if len(text) > schema.get("maxLength", len(text)):
            raise BadRequest(f"{self.name} has at most {schema['maxLength']} characters", parameter=self.name)
        if "pattern" in schema and not re.fullmatch(schema["pattern"], text):
            raise BadRequest(f"{self.name}={text[:40]!r}: expected {self.text}", parameter=self.name)
        return text


@dataclass(frozen=True, slots=True)
class Answer:
    """What an operation gives. ``schema``: name of a component, or empty where there is no body."""

    text: str
    schema: str = ""
    media: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Body:
    """What an operation takes. ``schema``: name of a component; empty: bytes."""

    text: str
    schema: str = ""
    media: str = JSON
    required: bool = True


@dataclass(frozen=True, slots=True)
class Operation:
    """One row. ``scope`` ``None``: everybody, for what says nothing about targets. Names in braces are segments of the path."""

    method: str
    path: str
    name: str
    summary: str
    scope: Scope | None
    handler: Callable[[Call], Awaitable[web.StreamResponse]]
    answers: Mapping[int, Answer]
    params: tuple[Param, ...] = ()
    body: Body | None = None
    text: str = ""
    tag: str = ""

    @property
    def endless(self) -> bool:
        """Whether its answer has no end: a stream of events, or a WebSocket."""
        return 101 in self.answers or any(answer.media == EVENTS for answer in self.answers.values())


@dataclass(slots=True)
class Services:
    """What stands behind the handlers."""

    jobs: JobsApi
    store: StoreApi
    authority: Authority
    transfers: Transfers
    limits: Limits = field(default_factory=Limits)
    gateway: str = ""
    consoles: Mapping[str, Console] = field(default_factory=dict)
    on_upload: Callable[[int, bool], None] = lambda _bytes, _resumed: None
    # The page for Prometheus and its content type, in the format that this Accept prefers.
    scrape: Callable[[str], Awaitable[tuple[bytes, str]]] | None = None
    stopping: bool = False


@dataclass(slots=True)
class Call:
    """One request after it was admitted. ``jobs``: the job functions as ``principal`` may use them. ``lost``: set when its
    connection has ended."""

    request: web.BaseRequest
    operation: Operation
    services: Services
    principal: Principal
    jobs: Guarded
    path: Mapping[str, str]
    query: Mapping[str, Any]
    lost: asyncio.Event

    @property
    def limits(self) -> Limits:
        return self.services.limits

    def header(self, name: str) -> str:
        return self.request.headers.get(name, "")

    async def json(self, *, optional: bool = False) -> dict[str, Any]:
        """The body, an object. Raises ``BadRequest``, ``TooLarge``, ``Refused``. ``optional``: none is an empty one."""
        if optional and not self.request.body_exists:
            return {}
        check_media(self.request, JSON)
        data = bytearray()
        go_on(self.request)
        try:
            async with asyncio.timeout(self.limits.body_timeout_s):
                while piece := await self.request.content.readany():
                    data += piece
                    if len(data) > JSON_BYTES:
                        raise TooLarge(f"a body in JSON has at most {JSON_BYTES} bytes", limit=JSON_BYTES)
        except web.BROKEN_OFF as error:
            raise BadRequest("the body broke off") from error
        except TimeoutError:
            raise Refused(BadRequest(f"the body did not come within {self.limits.body_timeout_s:g} s"), 408) from None
        return {} if optional and not data else parsed(bytes(data))


def check_media(request: web.BaseRequest, expected: str) -> None:
    found = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if found != expected:
        raise Refused(BadRequest(f"Content-Type is {found[:80]!r}, expected {expected}", expected=expected), 415)


def go_on(request: web.BaseRequest) -> None:
    """Say 100 to a client that waits for it, now that nothing speaks against its body."""
    if request.headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


def parsed(data: bytes) -> dict[str, Any]:
    """A JSON object without a name that comes twice, and not too deep. Raises ``BadRequest``."""
    if _too_deep(data):
        raise BadRequest(f"the body is nested deeper than {JSON_DEPTH} levels", limit=JSON_DEPTH)
    try:
        found = json.loads(data, object_pairs_hook=_object, parse_constant=_no_constant)
    except BadRequest:
        raise
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is no JSON: {str(error)[:120]}") from None
    if not isinstance(found, dict):
        raise BadRequest("the body must be a JSON object")
    return found


def _too_deep(data: bytes) -> bool:
    """Counted before parsing, brackets in strings included: those of a harmless document are fewer by far."""
    depth = deepest = 0
    for byte in data:
        if byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"]}":
            depth -= 1
    return deepest > JSON_DEPTH


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise BadRequest("a name comes twice in one object of the body")
    return found


def _no_constant(name: str) -> Any:
    raise BadRequest(f"{name} is no JSON")


def reply(data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(body=encoded(data), status=status, content_type=JSON, headers=headers)


def encoded(data: Any) -> bytes:
    return json.dumps(data, separators=(",", ":"), allow_nan=False, default=str).encode()


def etag(body: bytes) -> str:
    """Strong: it changes with every byte of the representation."""
    return f'"{hashlib.sha256(body).hexdigest()[:32]}"'


def tags_match(header: str, tag: str) -> bool:
    """``If-Match`` or ``If-None-Match`` against our tag."""
    return header.strip() == "*" or tag in (word.strip().removeprefix("W/") for word in header.split(","))
