"""The HTTP server: listeners, bounds on connections, who may ask at all, and the way from a request to its handler.

``aiohttp`` is used below its application: its parser and its responses, with a router, checks and bounds of our own, made from
the rows of ``http_call.Operation``. Handlers are in ``http_jobs``, ``http_images``, ``http_tus`` and ``http_events``.

Invariants:

- What a listener speaks, plain text or TLS, is decided where it is for all listeners: ``tls.transport`` (P7).
- Every input has a bound: connections of one address and in all, bytes and time of a header, bytes and time of a body, time to
  take an answer. Bodies are never decompressed: what is small on the wire is small in memory.
- A browser that was sent by somebody else's page gets nothing: the name that it asked for must be ours (DNS rebinding), its
  Origin must be that name (cross-site requests), and nothing of ours is shown inside a page that is not.
- Rights are asked in one place, before the handler and before a byte of the body is read.
- A client that goes away changes nothing: its job runs on, the synced part of its upload stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import socket
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, cast
from urllib.parse import unquote

from bridged import __version__
from bridged.api import http_console, http_images, http_jobs, http_page, web
from bridged.api.auth import Peer, Principal, Proxies, is_loopback
from bridged.api.entrance import Entrance, port_of
from bridged.api.guarded import Guarded
from bridged.api.hosts import Hosts
from bridged.api.http_call import SAFE, Answer, Call, Operation, Param, Services, encoded, etag, reply, tags_match
from bridged.api.http_events import Events
from bridged.api.http_problem import Refused, answer
from bridged.api.http_tus import Uploads
from bridged.api.tls import Tls
from bridged.config.values import Listen
from bridged.errors import (
    BadRequest,
    BridgedError,
    ForeignOrigin,
    LoginFirst,
    NotAllowed,
    TooMany,
    UnknownPath,
)
from bridged.protocol.verbs import Scope

log = logging.getLogger(__name__)

BACKLOG = 128  # Connections that the kernel holds until we take them.
RESERVED_CONNECTIONS = 32  # Beyond ``Limits.connections``, for this machine.
REMOTE_EACH = 64  # Of one address elsewhere; a browser opens six, and one for each stream of events.
HEAD_BYTES = 32 * 1024  # Of a whole header; browsers send 1 KiB, and cookies of everything else on localhost.
LINE_BYTES = 8190  # Of the request line and of each field.
MAX_FIELDS = 64  # Browsers send some 20.
LINGER_S = 2.0  # For the rest of a body that nobody wants, so that its sender can read why.


class HttpServer:
    """All listeners of HTTP. ``hosts``: names under which this gateway is reached, besides addresses and localhost."""

    def __init__(
        self, services: Services, hosts: Iterable[str] = (), tls: Tls | None = None, proxies: Proxies | None = None
    ) -> None:
        self.services, self.events = services, Events()
        self._proxies = proxies or Proxies()
        self.entrance = Entrance("HTTP", tls)
        self._hosts = Hosts((services.gateway, *hosts))
        self.operations: tuple[Operation, ...] = (
            *self._own_operations(),
            *http_jobs.OPERATIONS,
            *http_images.OPERATIONS,
            *Uploads().operations(),
            *self.events.operations(),
            *http_console.OPERATIONS,
            *http_page.OPERATIONS,
        )
        self._router = Router(self.operations)
        self._document = b""
        self._listeners: list[asyncio.Server] = []
        self._of_address: Counter[str] = Counter()
        self._server = _Server(self)

    # --- life -----------------------------------------------------------------------------------------------------

    async def listen_tcp(self, listen: Listen) -> int:
        """Returns the port. Raises ``NotAllowed`` (P7) or ``ConfigError``."""
        found = await self.entrance.open(listen, self._serve)
        self._listeners += found
        return port_of(found)

    async def _serve(self, **where: Any) -> asyncio.Server:
        return await asyncio.get_running_loop().create_server(self._connected, backlog=BACKLOG, **where)

    async def listen_socket(self, sock: socket.socket, scheme: str = "") -> None:
        """A listening socket that was passed in (socket activation); the same rule holds for it."""
        self._listeners.append(await self.entrance.take(sock, scheme, self._serve))

    async def stop(self, grace_s: float = 2.0) -> None:
        """No new connection; what is being answered has ``grace_s`` to its end."""
        self.services.stopping = True
        for listener in self._listeners:
            listener.close()
        self._server.pre_shutdown()
        await self._server.shutdown(grace_s)

    @property
    def connections(self) -> int:
        return self._of_address.total()

    def _connected(self) -> asyncio.Protocol:
        return _Connection(self._server, self)

    def admit(self, host: str) -> bool:
        """Whether one more connection of this address is taken; each that is must be ``dismiss``ed."""
        limit = self.services.limits.connections
        most = limit if is_loopback(host) else min(limit, REMOTE_EACH)
        # From elsewhere all together get no more than ``limit``: a crowd of them does not keep out who sits at the gateway.
        everybody = self._of_address.total() if is_loopback(host) else self._of_address.total() + RESERVED_CONNECTIONS
        if self._of_address[host] >= most or everybody >= limit + RESERVED_CONNECTIONS:
            return False
        self._of_address[host] += 1
        return True

    def dismiss(self, host: str) -> None:
        self._of_address[host] -= 1
        if self._of_address[host] <= 0:
            del self._of_address[host]

    # --- one request ----------------------------------------------------------------------------------------------

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Every request comes through here; whatever happens becomes an answer, or the end of the connection."""
        headers: Mapping[str, str] = {}
        try:
            response = await self._answer(request)
        except Refused as refused:
            response, headers = answer(refused.error, refused.status), refused.headers
        except BridgedError as error:
            response = answer(error)
        except (ConnectionError, TimeoutError):
            return self._broken(request)  # There is nobody to tell.
        except Exception:
            log.exception("HTTP: %s %s ended by a defect", request.method, request.path)
            response = answer(BridgedError("a defect ended this request; the daemon's log has it"))
        if response.prepared:
            return response
        if request.writer.output_size > 0:
            return self._broken(request)  # Half an answer is out: a second one would be taken for its rest.
        response.headers.update(headers)
        if headers.get("Connection") == "close":
            response.force_close()
        for name, value in SAFE.items():
            response.headers.setdefault(name, value)
        return response

    def _broken(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("the connection was ended")

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.headers.get("Transfer-Encoding", "chunked").lower() != "chunked":
            # The parser takes it for a request without a body; a proxy before us may think otherwise.
            raise Refused(BadRequest("Transfer-Encoding must be chunked"), 501, {"Connection": "close"})
        self._check_browser(request)
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise Refused(BadRequest("a body is taken as it is: Content-Encoding must be identity"), 415)
        operation, path = self._router.find(request)
        connection = cast(_Connection, request.protocol)
        principal = await self._who(request, connection)
        jobs = Guarded(self.services.jobs, self.services.authority, principal)
        if operation.scope is not None:
            try:
                jobs.require(operation.scope, path.get("target"), operation.summary.lower())
            except NotAllowed as error:
                jobs.note(operation.name, target=path.get("target", ""), result=error.code)
                raise
        query = bound(operation, request)
        return await operation.handler(Call(request, operation, self.services, principal, jobs, path, query, connection.lost))

    async def _who(self, request: web.BaseRequest, connection: _Connection) -> Principal:
        """By its token where it has one, else by where it comes from. A connection remembers the token that it showed last."""
        authority = self.services.authority
        peer = self._proxies.asking(connection.peer, request.headers.getall("X-Forwarded-For", []))
        said = request.headers.get("Authorization", "")
        if not said and (offered := http_console.token_of(request)):
            said = f"Bearer {offered}"
        if not said:
            return authority.known(peer)
        scheme, _, token = said.partition(" ")
        if scheme.lower() != "bearer":
            raise LoginFirst("Authorization must be: Bearer TOKEN")
        digest = hashlib.sha256(f"{peer.host} {token}".encode()).digest()
        if connection.shown is not None and connection.shown[0] == digest and authority.valid(connection.shown[1]):
            return connection.shown[1]
        connection.shown = (digest, await authority.login(peer, token.strip()))
        return connection.shown[1]

    # --- browsers -------------------------------------------------------------------------------------------------

    def _check_browser(self, request: web.BaseRequest) -> None:
        """Raises ``ForeignOrigin`` for what a page of somebody else made a browser ask."""
        hosts = request.headers.getall("Host", [])
        if len(hosts) != 1:
            raise BadRequest(f"a request has one Host, this one has {len(hosts)}")
        if not self._hosts.ours(hosts[0]):
            raise Refused(ForeignOrigin(f"this gateway is not called {hosts[0][:80]!r}", host=hosts[0][:80]), 421)
        origin = request.headers.get("Origin")
        if origin is not None and origin.partition("://")[2].lower() != hosts[0].lower():
            raise ForeignOrigin(f"a page of {origin[:80]!r} may not ask here", origin=origin[:80])
        if request.headers.get("Sec-Fetch-Site", "none") in ("cross-site", "same-site") and not (
            # Somebody followed a link to our page: that shows it, and does nothing.
            request.headers.get("Sec-Fetch-Mode") == "navigate"
            and request.method == "GET"
            and not request.path.startswith("/v1")
        ):
            raise ForeignOrigin("a page of somebody else may not ask here", site=request.headers["Sec-Fetch-Site"][:20])

    # --- what is nobody's secret ----------------------------------------------------------------------------------

    def _own_operations(self) -> tuple[Operation, ...]:
        alive = {200: Answer("it lives", media="text/plain")}
        ready = {200: Answer("jobs are taken", "Ready"), 503: Answer("not now, and why", "Ready")}
        openapi = {200: Answer("this document", media="application/json")}
        return (
            Operation("GET", "/livez", "livez", "Does the daemon live?", None, self._livez, alive, tag="service"),
            Operation("GET", "/readyz", "readyz", "Does it take jobs?", None, self._readyz, ready, tag="service"),
            Operation("GET", "/v1/openapi.json", "openapi", "This document", None, self._openapi, openapi, tag="service"),
            Operation(
                *("GET", "/v1", "whoAmI", "Version, and who you are here", None, self._service),
                {200: Answer("version, name of the gateway, your name and scopes", "Service")},
                tag="service",
            ),
            Operation(
                *("GET", "/metrics", "metrics", "What is counted, for Prometheus", Scope.READ, self._metrics),
                {200: Answer("its text format, or OpenMetrics where Accept asks for that", media="text/plain")},
                text="Names all targets, so it needs a right to all of them.",
                tag="service",
            ),
        )

    async def _livez(self, _call: Call) -> web.StreamResponse:
        return web.Response(text="ok\n")

    async def _readyz(self, call: Call) -> web.StreamResponse:
        ready, reason = self.services.jobs.ready()
        if not call.principal.known:
            reason = "" if ready else "not now"  # Why is in words of this machine: paths, disks, targets.
        return reply({"ready": ready, "reason": reason}, 200 if ready else 503, {} if ready else {"Retry-After": "5"})

    async def _metrics(self, call: Call) -> web.StreamResponse:
        """As on the listener of its own, which is for loopback only; here with TLS and rights, as everything here."""
        if call.principal.targets is not None:
            raise NotAllowed(f"metrics are of all targets; {call.principal.name} has a right to some", scope=Scope.READ.value)
        if self.services.scrape is None:
            raise UnknownPath("this gateway counts nothing")
        body, media = await self.services.scrape(call.header("Accept"))
        return web.Response(body=body, headers={"Content-Type": media})

    async def _service(self, call: Call) -> web.StreamResponse:
        who = call.principal
        scopes = sorted(str(scope) for scope in who.scopes)
        return reply({"version": __version__, "gateway": self.services.gateway, "principal": who.name, "scopes": scopes})

    async def _openapi(self, call: Call) -> web.StreamResponse:
        if not self._document:
            from bridged.api.http_openapi import document  # late: most gateways are never asked

            self._document = encoded(document(self.operations))
        tag = etag(self._document)
        if tags_match(call.header("If-None-Match"), tag):
            return web.Response(status=304, headers={"ETag": tag})
        return web.Response(body=self._document, content_type="application/json", headers={"ETag": tag})


class Router:
    """From method and path to a row. Raises ``UnknownPath``, also for a known path with another method."""

    def __init__(self, operations: Iterable[Operation]) -> None:
        self._paths: dict[tuple[str, ...], dict[str, Operation]] = {}
        for operation in operations:
            row = self._paths.setdefault(tuple(operation.path.split("/")[1:]), {})
            assert operation.method not in row, operation.name
            row[operation.method] = operation

    def find(self, request: web.BaseRequest) -> tuple[Operation, dict[str, str]]:
        """The row, and what stands in its braces, decoded and checked."""
        raw = request.rel_url.raw_path
        try:
            words = tuple(unquote(word, errors="strict") for word in raw.split("/")[1:])
        except UnicodeDecodeError:
            raise BadRequest(f"the path {raw[:80]!r} is no UTF-8") from None
        for segments, row in self._paths.items():
            if len(segments) != len(words):
                continue
            if all(segment == word or (segment[:1] == "{" and word) for segment, word in zip(segments, words, strict=True)):
                operation = self._of_method(row, request.method, raw)
                values = {s[1:-1]: word for s, word in zip(segments, words, strict=True) if s[:1] == "{"}
                params = {param.name: param for param in operation.params if param.where == "path"}
                return operation, {name: str(params[name].value(word)) for name, word in values.items()}
        raise UnknownPath(f"there is nothing at {raw[:120]!r}", path=raw[:120])

    def _of_method(self, row: Mapping[str, Operation], method: str, path: str) -> Operation:
        found = row.get(method)
        if found is None and method == "HEAD" and "GET" in row and not row["GET"].endless:
            found = row["GET"]
        if found is None:
            allowed = ", ".join(sorted(row))
            error = UnknownPath(f"{method[:20]} of {path[:80]!r}: expected {allowed}", path=path[:80], allowed=allowed)
            raise Refused(error, 405, {"Allow": allowed})
        return found


def bound(operation: Operation, request: web.BaseRequest) -> dict[str, Any]:
    """Parameters of the query and of headers, checked, with their defaults. Raises ``BadRequest``."""
    known = {param.name: param for param in operation.params if param.where == "query"}
    values: dict[str, Any] = {p.name: p.schema["default"] for p in known.values() if "default" in p.schema}
    given = request.rel_url.query
    for name in given:
        if name not in known:
            expected = ", ".join(known) or "none"
            raise BadRequest(f"unknown parameter {name[:40]!r}; there are: {expected}", parameter=name[:40])
        if len(given.getall(name)) > 1:
            raise BadRequest(f"parameter {name} is given twice", parameter=name)
        values[name] = known[name].value(given[name])
    for param in operation.params:
        if param.where == "header" and param.name in request.headers:
            _check_header(param, request.headers.getall(param.name))
    return values


def _check_header(param: Param, given: list[str]) -> None:
    if len(given) > 1:
        raise BadRequest(f"header {param.name} is given twice", header=param.name)
    if "enum" not in param.schema:  # What is a choice has numbers of its own in tus.
        param.value(given[0])


class _Server(web.Server):
    """Keeps the connections, for the end."""

    def __init__(self, owner: HttpServer) -> None:
        super().__init__(owner.handle, handler_cancellation=True)


class _Connection(web.RequestHandler):
    """One connection: bounds that the parser does not know, and errors in our words."""

    def __init__(self, server: _Server, owner: HttpServer) -> None:
        self._limits = owner.services.limits
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=self._limits.head_timeout_s,
            access_log=cast(logging.Logger, None),  # None is meant for none; its type does not say so.
            logger=log,
            max_line_size=LINE_BYTES,
            max_field_size=LINE_BYTES,
            max_headers=MAX_FIELDS,
            lingering_time=LINGER_S,
            auto_decompress=False,
        )
        self.lost = asyncio.Event()
        self.peer = Peer()
        self.shown: tuple[bytes, Principal] | None = None
        self._owner = owner
        self._admitted = False
        self._head = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._owner.entrance.taken(transport.get_extra_info)
        self.peer = Peer.of(transport.get_extra_info)
        self._admitted = self._owner.admit(self.peer.host)
        super().connection_made(transport)
        if not self._admitted:
            self._farewell(TooMany("too many connections are open"), 503)

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._admitted:
            self._admitted = False
            self._owner.dismiss(self.peer.host)
        self.lost.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        waiting = self._waiter is not None and not self._waiter.done()
        super().data_received(data)
        if waiting and self._waiter is not None and not self._waiter.done():
            # Still no whole header: fields within their bounds, but no end of them.
            self._head += len(data)
            if self._head > HEAD_BYTES:
                self._farewell(BadRequest(f"a header has at most {HEAD_BYTES} bytes", limit=HEAD_BYTES), 431)
        else:
            self._head = 0

    def _farewell(self, error: BridgedError, status: int) -> None:
        """One answer without a request, and the end."""
        if self.transport is None:
            return
        response = answer(error, status)
        body = cast(bytes, response.body)
        lines = [f"HTTP/1.1 {status} {response.reason}", "Connection: close", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in response.headers.items() if name != "Content-Length"]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.force_close()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Called for what is no HTTP; ``HttpServer.handle`` lets nothing else through."""
        if request.writer.output_size > 0:
            raise ConnectionError("half an answer is out")
        if status >= 500:
            log.error("HTTP: a request ended by a defect", exc_info=exc)
        response = answer(BadRequest((message or "this is no HTTP/1.1 that we understand")[:300]), status)
        response.headers.update(SAFE)
        response.force_close()
        return response

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Nobody waits for ever for a client that does not read."""
        try:
            async with asyncio.timeout(self._limits.drain_timeout_s):
                return await super().finish_response(request, resp, start_time)
        except TimeoutError:
            with contextlib.suppress(Exception):
                if self.transport is not None:
                    self.transport.abort()
            return resp, True
