"""One client of the line protocol as its commands see it: who it is, what it sent, and how it is answered.

A ``Link`` bounds both directions: at most one chunk and one line wait to be consumed, and a client that does not read is closed
after ``drain_timeout_s``. It knows no verb but for the right to say it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from bridged.api.auth import Authority, Peer, Principal
from bridged.api.guarded import Guarded
from bridged.api.ports import JobsApi, StoreApi
from bridged.api.transfers import Transfers, in_thread
from bridged.console.room import Console
from bridged.errors import BadRequest, NotAllowed, TooMany, WrongToken
from bridged.protocol import line as codec
from bridged.protocol.reply import Reply, error_reply, format_reply
from bridged.protocol.verbs import VERBS, Scope

log = logging.getLogger(__name__)

CHUNK_BYTES = 64 * 1024  # What asyncio reads at once, and a quarter of what the store syncs at once.


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the server; the first three come from the configuration. docs/limits.md is made from these lines."""

    image_bytes: int = 32 << 20  # Largest file that PUT takes.
    connections: int = 1000  # At once, of one principal.
    idle_timeout_s: float = 300.0  # Without a word; someone who types by hand thinks, a dead client does not come back.
    drain_timeout_s: float = 30.0  # A phone on a bad link can stall for 20 s; TCP itself would hold on for 15 minutes.
    heartbeat_s: float = 15.0  # A line in every stream at least so often: finds dead peers, keeps NAT entries alive.
    linger_s: float = 2.0  # For the last line to arrive before the connection is closed.
    write_buffer_bytes: int = 256 * 1024  # Of answers that a client has not fetched, before we wait for it.
    mistakes: int = 50  # In a row: what makes so many is no client.
    login_timeout_s: float = 30.0  # For the next line of somebody who has shown no token yet; long enough to paste one.
    takeover_s: float = 5.0  # An upload silent for so long gives way to its sender's next connection; TCP resends sooner.


@dataclass(slots=True)
class Shared:
    """What all connections share. ``gateway``: its name. ``on_upload(bytes, resumed)`` is told about every upload that came to
    an end; ``on_drain`` ends the daemon when its jobs have ended; ``one_too_many`` says whether somebody has too many."""

    jobs: JobsApi
    store: StoreApi
    limits: Limits
    authority: Authority
    gateway: str
    transfers: Transfers
    consoles: Mapping[str, Console]
    on_upload: Callable[[int, bool], None]
    one_too_many: Callable[[Principal], TooMany | None]
    on_drain: Callable[[], Awaitable[None]] | None = None
    stopping: bool = False


class Gone(Exception):
    """The client cannot be reached any more; there is nobody to tell."""


class Bye(Exception):
    """The connection ends now; ``reply`` is the last line."""

    def __init__(self, reply: Reply | None = None) -> None:
        super().__init__()
        self.reply = reply


class Incoming:
    """What a client sent and nobody has consumed yet: at most one chunk and one line."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self._buffer = bytearray()
        self.eof = False

    async def line(self) -> bytes | None:
        """The next line with its end, ``None`` at the end of input. Raises ``BadRequest`` (too long), ``ForeignProtocol``."""
        searched = 0
        while (at := self._buffer.find(b"\n", searched, codec.MAX_LINE_BYTES)) < 0:
            searched = len(self._buffer)
            if name := codec.foreign(bytes(self._buffer[:4])):
                raise codec.foreign_error(name)  # TLS and SSH do not wait for a line end, nor shall we.
            if searched >= codec.MAX_LINE_BYTES:
                raise BadRequest(
                    f"a line may have {codec.MAX_LINE_BYTES} bytes and this one has more", limit=codec.MAX_LINE_BYTES
                )
            if not await self._more():
                if not self._buffer:
                    return None
                raise BadRequest("the last line has no line end; it may have been cut off and was not carried out")
        found = bytes(self._buffer[: at + 1])
        del self._buffer[: at + 1]
        return found

    async def raw(self, limit: int) -> bytes:
        """Between 1 and ``limit`` raw bytes; empty at the end of input."""
        if not self._buffer and not await self._more():
            return b""
        found = bytes(self._buffer[:limit])
        del self._buffer[:limit]
        return found

    async def _more(self) -> bool:
        if not self.eof:
            chunk = await self._reader.read(CHUNK_BYTES)
            self._buffer += chunk
            self.eof = not chunk
        return not self.eof


class Link:
    """``interruptible``: it only waits, so that a stopping server may cancel it at once. ``gone``: done when the client is.

    ``raw``: what is sent now are bytes of a file or of a target: a reply among them would be taken for one of them.
    """

    gone: asyncio.Task[None]

    def __init__(self, shared: Shared, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.shared, self.limits = shared, shared.limits
        self.incoming, self.writer = Incoming(reader), writer
        self.json = False
        self.interruptible = False
        self.raw = False
        self.wrong_tokens = 0
        self.peer = Peer.of(writer.get_extra_info)
        self.become(shared.authority.known(self.peer))
        writer.transport.set_write_buffer_limits(high=self.limits.write_buffer_bytes)

    def begin(self) -> None:
        """From here on ``gone`` is watched."""
        self.gone = asyncio.ensure_future(self._lost())

    def become(self, who: Principal) -> None:
        """From here on this is ``who``; ``jobs`` lets through what that one may do."""
        self.who, self.jobs = who, Guarded(self.shared.jobs, self.shared.authority, who)

    def check(self, verb: str) -> None:
        """The right to say this verb at all; which target it may touch is asked by ``jobs``. Raises ``Bye`` when revoked."""
        if not self.shared.authority.valid(self.who):
            raise Bye(error_reply(WrongToken(f"{self.who.credential} was revoked or has expired")))
        scope = VERBS[verb].scope
        if scope is not None:
            try:
                self.who.require(scope, None, verb)
                if scope is Scope.ADMIN and self.who.targets is not None:
                    # Tokens, the audit log and the daemon's end are of the whole gateway; a token made here may be, too.
                    raise NotAllowed(f"{verb} needs a right to all targets; {self.who.name} has one to some of them", verb=verb)
            except NotAllowed as error:
                self.jobs.note(verb.lower(), result=error.code)
                raise

    async def send(self, *replies: Reply) -> None:
        await self.send_bytes(b"".join(format_reply(reply, self.json) for reply in replies))

    async def send_bytes(self, data: bytes) -> None:
        """Waits only where the client does not keep up, and not for ever."""
        if self.gone.done():
            raise Gone
        self.writer.write(data)
        try:
            async with asyncio.timeout(self.limits.drain_timeout_s):
                await self.writer.drain()
        except TimeoutError:
            log.info("line protocol: a client did not read for %g s and was closed", self.limits.drain_timeout_s)
            self.writer.transport.abort()
            raise Gone from None
        except ConnectionError as error:
            raise Gone from error

    async def send_many(self, replies: list[Reply]) -> None:
        """Long answers in pieces, so that a slow client holds a few lines and not all of them."""
        for at in range(0, len(replies), 64):
            await self.send(*replies[at : at + 64])

    async def send_file(self, file: BinaryIO, data: dict[str, Any]) -> None:
        """250 with ``data`` and the size, then exactly so many bytes. Closes ``file``."""
        try:
            left = os.fstat(file.fileno()).st_size
            await self.send(Reply(250, "", {"size": left, **data}))
            self.raw = left > 0
            while left:
                piece = await in_thread(file.read, min(left, CHUNK_BYTES))
                if not piece:
                    # The number of bytes was promised; a short answer must not look like a whole one.
                    raise Bye
                await self.send_bytes(piece)
                left -= len(piece)
            self.raw = False
        finally:
            file.close()

    async def _lost(self) -> None:
        with contextlib.suppress(Exception):
            await self.writer.wait_closed()

    async def close(self, last: Reply | None) -> None:
        """Says the last line so that it arrives: closing a socket with unread input resets it, and a reset eats our words."""
        writer = self.writer
        try:
            if writer.transport.is_closing():
                return
            if last is not None and not self.raw:
                writer.write(format_reply(last, self.json))
            if writer.can_write_eof():
                writer.write_eof()
            with contextlib.suppress(TimeoutError, ConnectionError):
                async with asyncio.timeout(self.limits.linger_s):
                    while not self.incoming.eof and await self.incoming.raw(CHUNK_BYTES):
                        pass
                    await writer.drain()
        finally:
            writer.close()
            if writer.transport.get_write_buffer_size():
                # Half a conversation is still to be sent; a client that does not fetch it must not keep us.
                loop = asyncio.get_running_loop()
                loop.call_later(self.limits.drain_timeout_s, writer.transport.abort)


Command = Callable[[Link, dict[str, Any]], Awaitable[None]]
"""What a verb does: with the client, and with the checked values of its line."""
