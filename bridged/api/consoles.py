"""The consoles of ``console.room`` to the network: CONSOLE, LOCK and UNLOCK, and who may what at a port of their own.

``Dialog`` is the wire of a client that said CONSOLE: from 101 on its connection is raw bytes in both directions, to its end.
The rules (one writer, bounded readers, jobs first) are the room's; here are only the replies.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, Protocol

from bridged.api.auth import Authority, Peer, Principal
from bridged.api.guarded import Guarded
from bridged.console.room import READ_ONLY, READ_WRITE, Console, Seat
from bridged.console.server import Admission
from bridged.errors import BridgedError, NotAllowed, UnknownTarget
from bridged.protocol.reply import Reply
from bridged.protocol.verbs import Scope

CHUNK_BYTES = 4096  # Of what a client types or pipes at once: what the port holds before writers are held.
DEFAULT_TTL_S = 3600.0  # A person at a bench forgets to unlock; nobody should have to wait for that until tomorrow.
EOF_LINGER_S = 2.0  # After the client closed its sending side (nc -N): time for the target's answer.

Consoles = Mapping[str, Console]


def find(consoles: Consoles, target: str) -> Console:
    """Raises ``UnknownTarget``."""
    if target not in consoles:
        raise UnknownTarget(f"there is no target {target}", target=target)
    return consoles[target]


async def lock(console: Console, who: Guarded, values: Mapping[str, Any], *, right: bool) -> Reply:
    """Raises ``TargetBusy``; the audit log has it either way."""
    note = values.get("note", "")
    with _noted(console, who, "lock", note):
        lease = await console.lock(who.who.name, values.get("ttl", DEFAULT_TTL_S), note, right=right)
    return Reply(250, "", {"target": console.name, "owner": lease.principal, "ttl": round(lease.until - console.monotonic())})


async def unlock(console: Console, who: Guarded, *, right: bool) -> Reply:
    """Raises ``TargetBusy``. Unlocking what is not locked changes nothing, and says so."""
    with _noted(console, who, "unlock"):
        dropped = await console.unlock(who.who.name, right=right)
    return Reply(250 if dropped else 251, "", {"target": console.name})


@contextlib.contextmanager
def _noted(console: Console, who: Guarded, what: str, detail: str = "") -> Iterator[None]:
    try:
        yield
    except BridgedError as error:
        who.note(what, target=console.name, result=error.code, detail=detail)
        raise
    who.note(what, target=console.name, detail=detail)


def holder(console: Console) -> dict[str, Any]:
    """Who holds the target, for INFO: the fields are absent where nobody does."""
    lease = console.holder
    if lease is None:
        return {}
    return {"owner": lease.holder, "owner_kind": lease.kind, "owner_since": round(lease.since, 3), "owner_note": lease.note}


def admission(authority: Authority, info: Callable[[str], Any], target: str) -> Admission:
    """What somebody may at the port of a console: by where it comes from, or by the certificate that it has shown."""
    who = authority.known(Peer.of(info))
    read, write = who.may(Scope.READ, target), who.may(Scope.CONSOLE, target)
    if who.known and not read:
        authority.note(who, "console", target=target, result=NotAllowed.code)
    return Admission(who.name, who.source, read, write, who.known, lambda: authority.valid(who))


def record(authority: Authority, principal: str, source: str, what: str, target: str, result: str, detail: str) -> None:
    """What a console tells of its clients (``room.Record``) goes into the audit log, whatever their wire is."""
    authority.note(Principal(principal, source), what, target=target, result=result, detail=detail)


class Writer(Protocol):
    """What is used of an ``asyncio.StreamWriter``."""

    @property
    def transport(self) -> asyncio.WriteTransport: ...
    def write(self, data: bytes) -> None: ...


class Dialog:
    """One CONSOLE connection (``room.Sink``)."""

    def __init__(self, console: Console, writer: Writer, valid: Callable[[], bool] = lambda: True) -> None:
        """``valid``: whether the client's rights still count; a revoked token ends its console, too."""
        self._console, self._writer, self._valid = console, writer, valid
        self._free = asyncio.Event()
        self._free.set()
        self.dropped = asyncio.Event()

    async def run(
        self,
        who: str,
        principal: str,
        values: Mapping[str, Any],
        read: Callable[[int], Awaitable[bytes]],
        say: Callable[[Reply], Awaitable[None]],
        *,
        writing: bool,
        right: bool,
    ) -> None:
        """Until the client ends it, or is thrown out. ``read``: bytes as they come, none at the end. Raises ``TargetBusy``."""
        mode = READ_WRITE if writing else READ_ONLY
        console = self._console
        seat = console.sit(_Silent(), who, principal, mode, replay=0)
        try:
            if mode == READ_WRITE:
                # Who asks to write hears at once when somebody else does, and can come back to read only.
                seat.claim(take=bool(values.get("force")), right=right)
            await say(Reply(101, "CONSOLE", {"target": console.name, "mode": mode, "state": console.target.state}))
            seat.sink = self
            replay = values.get("replay", console.settings.replay_kib * 1024)
            if tail := console.history.tail(replay):
                self.write(tail)
            if not console.target.talkable:
                self.notice(console.why_silent())
            gone: asyncio.Task[Any] = asyncio.create_task(self.dropped.wait())
            try:
                await self._pump(seat, read, gone)
            finally:
                gone.cancel()
        finally:
            seat.leave()

    async def _pump(self, seat: Seat, read: Callable[[int], Awaitable[bytes]], gone: asyncio.Task[Any]) -> None:
        while not gone.done():
            await self._free.wait()
            reading: asyncio.Task[Any] = asyncio.create_task(_read(read))
            try:
                await asyncio.wait({reading, gone}, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    return
                data = reading.result()
            finally:
                reading.cancel()
            if not data:
                seat.done_writing()
                await asyncio.wait({gone}, timeout=EOF_LINGER_S)
                return
            seat.say(data)

    # --- room.Sink ---------------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        self._writer.write(data)

    def unread(self) -> int:
        return self._writer.transport.get_write_buffer_size()

    def hold(self, held: bool) -> None:
        if held:
            self._free.clear()
        else:
            self._free.set()

    def notice(self, text: str) -> None:
        if self._console.settings.notices == "inline":
            self.write(f"\r\n[bridged: {text}]\r\n".encode("ascii", "replace"))

    def suspend(self, suspended: bool) -> None:
        """Nothing but bytes goes over this wire."""

    def look(self, modem: object, errors: object) -> None:  # noqa: ARG002
        """No lines either. Called several times a second, so here rights are looked at."""
        if not self._valid():
            self.drop("the credential of this connection does not count any more")

    def drop(self, reason: str) -> None:
        self.notice(reason)
        self.dropped.set()
        self._free.set()


async def _read(read: Callable[[int], Awaitable[bytes]]) -> bytes:
    return await read(CHUNK_BYTES)


class _Silent:
    """The wire of a client that has not been told yet that it is at the console."""

    def write(self, data: bytes) -> None: ...
    def unread(self) -> int:
        return 0

    def hold(self, held: bool) -> None: ...
    def notice(self, text: str) -> None: ...
    def suspend(self, suspended: bool) -> None: ...
    def look(self, modem: object, errors: object) -> None: ...
    def drop(self, reason: str) -> None: ...
