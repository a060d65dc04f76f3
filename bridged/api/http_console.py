"""The console over HTTP: a WebSocket for the bytes of the target's port, and the lock. One more client of ``console.room``.

Binary messages are raw bytes in both directions. Text messages are JSON, for what is not of the target: from here ``notice`` (a
sentence for the person), ``suspended`` (a job has the port, or the target is absent) and ``writing`` (whether what this client
sends goes to the target); from the client ``{"take": true}`` (I want to write now, instead of who does). Who came with
``mode=ro`` never writes.

A browser can send no ``Authorization`` with a WebSocket: a token may come as the subprotocol ``token.TOKEN`` beside ours, is
read like a header, and is never sent back. Rules (one writer, bounded readers, jobs first) are the room's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections import deque
from typing import Any

from bridged.api import consoles, web
from bridged.api.http_call import SAFE, Answer, Body, Call, Operation, Param, reply
from bridged.api.http_jobs import TARGET
from bridged.api.http_problem import Refused
from bridged.console.room import READ_ONLY, READ_WRITE, Console, Seat
from bridged.errors import BadRequest, NotAllowed, TargetBusy
from bridged.protocol.verbs import Scope

PROTOCOL = "bridged.console.v1"
TOKEN_PROTOCOL = "token."
MESSAGE_LIMIT_BYTES = 64 * 1024  # Of one message of a client: a long paste.
HEARTBEAT_S = 20.0  # A ping at least so often; who does not answer is gone.
CLOSE_S = 3.0  # For the last words to be fetched.
REPLAY_LIMIT_BYTES = 1 << 20  # More than any history holds.
NOTE_LIMIT = 80  # Characters of a lock's note: as LOCK takes it.
SEND_BUFFER_BYTES = 128 * 1024  # Of the kernel, as for raw consoles; by itself it takes 4 MiB for a client that does not read.
TOLD_LIMIT = 256  # Notices that a client has not fetched; each is an answer to something that it did, or news of the target.

MODE = Param(
    "mode", "query", "rw: type; ro: only look", {"type": "string", "enum": [READ_WRITE, READ_ONLY], "default": READ_WRITE}
)
REPLAY = Param(
    "replay", "query", "bytes of the history first", {"type": "integer", "minimum": 0, "maximum": REPLAY_LIMIT_BYTES}
)
FORCE = Param("force", "query", "1: an administrator takes it from whoever has it", {"type": "boolean", "default": False})


class Wire:
    """The WebSocket as ``room.Sink``: what is to be sent waits here, in order and counted; ``send`` takes it out."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self.socket = web.WebSocketResponse(
            protocols=(PROTOCOL,), heartbeat=HEARTBEAT_S, compress=False, max_msg_size=MESSAGE_LIMIT_BYTES, timeout=2.0
        )
        self.socket.headers.update(SAFE)
        self._waiting: deque[bytes | dict[str, Any]] = deque()
        self._bytes = self._told = 0
        self._wake = asyncio.Event()
        self.free = asyncio.Event()
        self.free.set()
        self.dropped = asyncio.Event()
        self.seat: Seat | None = None
        self._writing: bool | None = None

    # --- room.Sink --------------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        self._waiting.append(data)
        self._bytes += len(data)
        self._wake.set()

    def unread(self) -> int:
        transport = self._call.request.transport
        return self._bytes + (transport.get_write_buffer_size() if transport is not None else 0)

    def hold(self, held: bool) -> None:
        if held:
            self.free.clear()
        else:
            self.free.set()

    def notice(self, text: str) -> None:
        self.tell({"notice": text})

    def suspend(self, suspended: bool) -> None:
        self.tell({"suspended": suspended})

    def look(self, _modem: object, _errors: object) -> None:
        """Called several times a second: rights are looked at, and who writes."""
        if not self._call.services.authority.valid(self._call.principal):
            self.drop("the credential of this connection does not count any more")
        writing = self.seat is not None and self.seat.writing
        if writing is not self._writing:
            self._writing = writing
            self.tell({"writing": writing})

    def drop(self, reason: str) -> None:
        self.notice(reason)
        self.dropped.set()
        self.free.set()

    # --- the other side of it ---------------------------------------------------------------------------------------

    def tell(self, data: dict[str, Any]) -> None:
        """Bytes are bounded by the room; this is bounded here: who talks and does not listen is thrown out."""
        if self._told >= TOLD_LIMIT:
            self.dropped.set()
            self.free.set()
            return
        self._told += 1
        self._waiting.append(data)
        self._wake.set()

    async def send(self) -> None:
        """Until the connection ends or the client does not read."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                item = self._waiting.popleft()
                if isinstance(item, dict):
                    self._told -= 1
                    await self._in_time(self.socket.send_str(json.dumps(item)))
                    continue
                pieces = [item]
                while self._waiting and isinstance(self._waiting[0], bytes):
                    pieces.append(self._waiting.popleft())  # type: ignore[arg-type]
                data = b"".join(pieces)
                try:
                    await self._in_time(self.socket.send_bytes(data))
                finally:
                    self._bytes -= len(data)

    async def _in_time(self, work: Any) -> None:
        async with asyncio.timeout(self._call.limits.drain_timeout_s):
            await work


def console_of(call: Call) -> Console:
    return consoles.find(call.services.consoles, call.path["target"])


async def console(call: Call) -> web.StreamResponse:
    mode, console = call.query["mode"], console_of(call)
    if mode == READ_WRITE:
        try:
            call.jobs.require(Scope.CONSOLE, console.name, "writing to the console")
        except NotAllowed as error:
            call.jobs.note("console", target=console.name, result=error.code)
            raise
    _check_upgrade(call)
    wire = Wire(call)
    right = call.principal.may(Scope.ADMIN)
    transport = call.request.transport
    if transport is not None and (sock := transport.get_extra_info("socket")) is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    seat = console.sit(wire, call.principal.source, call.principal.name, mode, replay=call.query.get("replay"))
    wire.seat = seat
    try:
        await wire.socket.prepare(call.request)
        wire.look(None, None)
        await _pump(wire, seat, right)
    finally:
        seat.leave()
    with contextlib.suppress(Exception):
        async with asyncio.timeout(CLOSE_S):
            await wire.socket.close()
    if transport is not None and transport.get_write_buffer_size():
        transport.abort()  # It does not read: an orderly close would wait for that.
    return wire.socket


async def _pump(wire: Wire, seat: Seat, right: bool) -> None:
    """Both directions, until one of them ends."""
    tasks = [
        asyncio.ensure_future(wire.send()),
        asyncio.ensure_future(_hear(wire, seat, right)),
        asyncio.ensure_future(wire.dropped.wait()),
    ]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if wire.dropped.is_set():
            await asyncio.wait(tasks[:1], timeout=0.5)  # Time for the reason to be sent.
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _hear(wire: Wire, seat: Seat, right: bool) -> None:
    while True:
        await wire.free.wait()  # A client that is faster than the UART waits: its next message is not read.
        message = await wire.socket.receive()
        if message.type is web.WSMsgType.BINARY:
            seat.say(message.data)
            wire.look(None, None)
        elif message.type is web.WSMsgType.TEXT:
            _said(wire, seat, message.data, right)
        else:
            return


def _said(wire: Wire, seat: Seat, text: str, right: bool) -> None:
    try:
        asked = json.loads(text) if len(text) < 1000 else None
    except (ValueError, RecursionError):
        asked = None
    if asked != {"take": True}:
        wire.notice('not understood: text is {"take": true}, bytes for the target are binary')
        return
    try:
        seat.claim(take=True, right=right)
    except TargetBusy as error:
        wire.notice(error.message)
    wire.look(None, None)


def _check_upgrade(call: Call) -> None:
    """What aiohttp would refuse with an error of its own, and a log line with everything that was offered."""
    request = call.request
    upgrade = "upgrade" in request.headers.get("Connection", "").lower()
    if not upgrade or request.headers.get("Upgrade", "").lower() != "websocket":
        raise Refused(BadRequest("this is a WebSocket: Upgrade is missing"), 426, {"Upgrade": "websocket"})
    if request.headers.get("Sec-WebSocket-Version") != "13" or len(request.headers.get("Sec-WebSocket-Key", "")) != 24:
        raise Refused(BadRequest("a WebSocket of version 13 has a key of 24 characters"), 400, {"Sec-WebSocket-Version": "13"})
    offered = offers(request)
    if offered and PROTOCOL not in offered:
        raise BadRequest(f"Sec-WebSocket-Protocol must have {PROTOCOL}")


def offers(request: web.BaseRequest) -> list[str]:
    header = request.headers.get("Sec-WebSocket-Protocol", "")
    return [word.strip() for word in header.split(",")] if header else []


def token_of(request: web.BaseRequest) -> str:
    """A token that came as a subprotocol; empty where none did."""
    found = [word for word in offers(request) if word.startswith(TOKEN_PROTOCOL)]
    return found[0].removeprefix(TOKEN_PROTOCOL) if found and request.headers.get("Upgrade", "").lower() == "websocket" else ""


# --- the lock -----------------------------------------------------------------------------------------------------


async def lock(call: Call) -> web.StreamResponse:
    asked = await call.json(optional=True)
    note, ttl = asked.pop("note", ""), asked.pop("ttl", consoles.DEFAULT_TTL_S)
    if asked or not isinstance(note, str) or len(note) > NOTE_LIMIT or not note.isprintable():
        raise BadRequest(f'the body of a lock is {{"ttl": SECONDS, "note": TEXT}}, a text of at most {NOTE_LIMIT} characters')
    if isinstance(ttl, bool) or not isinstance(ttl, int | float) or not 1 <= ttl <= 86400:
        raise BadRequest("ttl is from 1 to 86400 seconds")
    right = call.query["force"] and call.principal.may(Scope.ADMIN)
    done = await consoles.lock(console_of(call), call.jobs, {"note": note, "ttl": ttl}, right=right)
    return reply(dict(done.data))


async def unlock(call: Call) -> web.StreamResponse:
    right = call.query["force"] and call.principal.may(Scope.ADMIN)
    await consoles.unlock(console_of(call), call.jobs, right=right)
    return web.Response(status=204)


OPERATIONS: tuple[Operation, ...] = (
    Operation(
        *("GET", "/v1/targets/{target}/console", "console", "The target's serial port, as a WebSocket", Scope.READ, console),
        {101: Answer("bytes in binary messages, notices in text")},
        (TARGET, MODE, REPLAY),
        text="`mode=rw` needs scope `console`.",
        tag="console",
    ),
    Operation(
        *("PUT", "/v1/targets/{target}/lock", "lockTarget", "Reserve a target for yourself", Scope.CONSOLE, lock),
        {200: Answer("it is yours", "Lock")},
        (TARGET, FORCE),
        Body("how long, and why", "LockRequest", required=False),
        tag="console",
    ),
    Operation(
        *("DELETE", "/v1/targets/{target}/lock", "unlockTarget", "Give a reserved target back", Scope.CONSOLE, unlock),
        {204: Answer("it is free")},
        (TARGET, FORCE),
        tag="console",
    ),
)
