"""The line protocol's server: TCP on loopback and a Unix socket, for ``nc``, scripts and our own command line.

One task serves one connection and answers its commands in order; what a client pipelines is answered in the order it was
sent, also after it has closed its sending side (``nc -N``). The grammar is ``protocol.line`` and ``protocol.verbs``; what a
verb does and answers is in ``line_talk``, ``line_images``, ``line_jobs`` and ``line_consoles``.
Document: the line-protocol chapter of the docs.

Invariants:

- Beyond loopback nothing is spoken in plain text unless the configuration asks for it, and nothing is answered without a token
  or a certificate (P7). The Unix socket is 0660 from the moment it can be found.
- Each verb has its scope in the table; each target is asked for in ``guarded``. No line of a client is ever logged.
- Every input has a bound: line length, size of an upload, connections, time without a word, mistakes in a row. Every output
  has one too: a client that does not read is closed after ``drain_timeout_s``; nobody else waits for it.
- A client that goes away changes nothing: its job runs on (P1), the synced part of its upload stays for the next PUT.
- A line that was cut off (no line end before the end of the connection) is never carried out.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from bridged import __version__
from bridged.api import line_consoles, line_images, line_jobs, line_talk
from bridged.api.auth import Authority, Principal
from bridged.api.entrance import Entrance, port_of
from bridged.api.line_images import put
from bridged.api.line_link import CHUNK_BYTES, Bye, Command, Gone, Limits, Link, Shared
from bridged.api.ports import JobsApi, StoreApi
from bridged.api.tls import Tls
from bridged.api.transfers import Transfers
from bridged.api.unix import BACKLOG, bind_unix
from bridged.config.values import Listen
from bridged.console.room import Console
from bridged.errors import (
    BadRequest,
    BridgedError,
    ForeignProtocol,
    LoginFirst,
    NotAllowed,
    Stopped,
    TooMany,
    UnknownVerb,
)
from bridged.protocol import line as codec
from bridged.protocol.line import Request
from bridged.protocol.reply import Reply, error_reply, format_reply
from bridged.protocol.verbs import PROTOCOL_VERSION, VERBS

log = logging.getLogger(__name__)

RESERVED_CONNECTIONS = 32  # Beyond ``Limits.connections`` of one principal: the others, an administrator above all, get in.
REFUSED_CONNECTIONS = 64  # So many that are one too many may take their time to read why; the next ones are closed at once.
STRANGERS_EACH = 16  # Connections of one address that has shown no token yet; a browser opens six, a script one.
MISTAKES = (BadRequest, UnknownVerb, LoginFirst, NotAllowed)
COMMANDS: dict[str, Command] = {
    **line_talk.COMMANDS,
    **line_images.COMMANDS,
    **line_jobs.COMMANDS,
    **line_consoles.COMMANDS,
}


class LineServer:
    """All listeners of the line protocol. ``on_upload(bytes, resumed)`` is told about every upload that came to an end."""

    def __init__(
        self,
        jobs: JobsApi,
        store: StoreApi,
        gateway: str = "",
        limits: Limits | None = None,
        on_upload: Callable[[int, bool], None] | None = None,
        transfers: Transfers | None = None,
        authority: Authority | None = None,
        tls: Tls | None = None,
        consoles: Mapping[str, Console] | None = None,
        on_drain: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        limits = limits or Limits()
        self.shared = Shared(
            jobs,
            store,
            limits,
            authority or Authority(),
            gateway or socket.gethostname(),
            transfers or Transfers(limits.takeover_s),
            consoles or {},
            on_upload or (lambda _bytes, _resumed: None),
            self.one_too_many,
            on_drain,
        )
        self._servers: list[asyncio.Server] = []
        self._connections: dict[asyncio.Task[None], Link] = {}
        self._refusing = 0
        self._entrance = Entrance("The line protocol", tls)
        self._socket_path: Path | None = None

    @property
    def connections(self) -> int:
        return len(self._connections)

    async def listen_tcp(self, listen: Listen) -> int:
        """Returns the port (useful where 0 was asked for). Raises ``NotAllowed`` (P7) or ``ConfigError``."""
        found = await self._entrance.open(listen, self._serve)
        self._servers += found
        return port_of(found)

    async def _serve(self, **where: Any) -> asyncio.Server:
        return await asyncio.start_server(self._accept, limit=CHUNK_BYTES, backlog=BACKLOG, **where)

    async def listen_unix(self, path: Path, mode: int = 0o660) -> None:
        """Takes the place of a socket that a dead daemon left, never of one that answers. Raises ``ConfigError``."""
        sock = await asyncio.to_thread(bind_unix, path, mode)
        self._servers.append(await self._serve(sock=sock))
        self._socket_path = path

    async def listen_socket(self, sock: socket.socket, scheme: str = "") -> None:
        """A listening socket that was passed in (socket activation); the same rule holds for it."""
        if sock.family == socket.AF_UNIX:
            # Not start_unix_server: from Python 3.13 on it removes the path at its end, where clients wait for the next daemon.
            server = await self._serve(sock=sock)
        else:
            server = await self._entrance.take(sock, scheme, self._serve)
        self._servers.append(server)

    async def stop(self, grace_s: float = 5.0) -> None:
        """No new connection; every client is told 421 after the command that it is in, or within ``grace_s``."""
        self.shared.stopping = True
        for server in self._servers:
            server.close()
        if self._socket_path is not None:
            with contextlib.suppress(OSError):
                self._socket_path.unlink()
        for task, link in list(self._connections.items()):
            if link.interruptible:
                task.cancel()
        if self._connections:
            _, late = await asyncio.wait(list(self._connections), timeout=grace_s)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=grace_s)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._entrance.taken(writer.get_extra_info)
        link = Link(self.shared, reader, writer)
        if error := self.one_too_many(link.who):
            # Beyond a bound not even a farewell may cost us anything: a flood would otherwise take all descriptors.
            self._refusing += 1
            try:
                await _refuse(link, error_reply(error), patient=self._refusing <= REFUSED_CONNECTIONS)
            finally:
                self._refusing -= 1
            return
        self._connections[task] = link
        try:
            await _serve(link)
        finally:
            del self._connections[task]

    def one_too_many(self, who: Principal) -> TooMany | None:
        """No principal can lock out the others: a few connections more than one may have are there for them.

        Those whom nobody knows yet get few each and half of all together, so that no crowd of them keeps a token out.
        """
        count, limit = len(self._connections), self.shared.limits.connections
        own = sum(link.who.name == who.name for link in self._connections.values())
        if not who.known:
            strangers = sum(not link.who.known for link in self._connections.values())
            if own >= STRANGERS_EACH or strangers >= limit // 2:
                return TooMany(f"{own} connections without a token are open from there", limit=STRANGERS_EACH)
        if count >= limit and (own >= limit or count >= limit + RESERVED_CONNECTIONS):
            return TooMany(f"{count} connections are open, which is the limit", limit=limit)
        return None


async def _serve(link: Link) -> None:
    """The conversation with one client, from the greeting to the last line."""
    link.begin()
    last: Reply | None = None
    try:
        await _converse(link)
    except Gone:
        pass
    except Bye as bye:
        last = bye.reply
    except asyncio.CancelledError:  # Only ``LineServer.stop`` cancels us.
        last = error_reply(Stopped("the daemon is stopping; jobs go on after its next start"))
    except ConnectionError:
        pass
    except Exception:
        log.exception("line protocol: a connection ended by a defect")
        last = error_reply(BridgedError("a defect ended this connection; the daemon's log has it"))
    finally:
        with contextlib.suppress(Exception):
            await link.close(last)
        link.gone.cancel()


async def _refuse(link: Link, reply: Reply, *, patient: bool) -> None:
    """One line instead of a conversation. ``patient``: wait a moment for the client to fetch it."""
    with contextlib.suppress(Exception):
        if patient:
            await link.close(reply)
        else:
            link.writer.write(format_reply(reply, link.json))
            link.writer.close()


async def _converse(link: Link) -> None:
    greeting = f"bridged {__version__}"
    auth = "none" if link.who.known else "token"
    await link.send(Reply(220, greeting, {"gw": link.shared.gateway, "proto": PROTOCOL_VERSION, "auth": auth}))
    mistakes = 0
    while True:
        # Neither reading what was pipelined nor writing what the kernel takes at once waits: others would, for seconds.
        await asyncio.sleep(0)
        try:
            request = await _next(link)
            if request is None:
                return
            if request.verb == "PUT":
                await put(link, request)
            else:
                await _dispatch(link, request)
            mistakes = 0
        except BridgedError as error:
            if isinstance(error, Stopped) or not link.shared.authority.valid(link.who):
                raise Bye(error_reply(error)) from error
            mistakes = mistakes + 1 if isinstance(error, MISTAKES) else 0
            await link.send(error_reply(error))
            if mistakes >= link.limits.mistakes:
                too_many = TooMany(f"{mistakes} mistakes in a row; this does not look like a client", limit=mistakes)
                raise Bye(error_reply(too_many)) from error


async def _next(link: Link) -> Request | None:
    """The next request, ``None`` at the end. Blank lines are skipped: people press return to see whether we live."""
    limits = link.limits
    patience_s = limits.idle_timeout_s if link.who.known else min(limits.idle_timeout_s, limits.login_timeout_s)
    while True:
        if link.shared.stopping:
            raise Stopped("the daemon is stopping; jobs go on after its next start")
        try:
            link.interruptible = True
            async with asyncio.timeout(patience_s):
                found = await link.incoming.line()
        except TimeoutError:
            seconds = f"{patience_s:g}"
            raise Bye(Reply(421, "IDLE", {"message": f"nothing was said for {seconds} s; good-bye"})) from None
        except BadRequest as error:
            # What follows an endless or a cut-off line cannot be understood either.
            raise Bye(Reply(500, error.code, error_reply(error).data)) from error
        except ForeignProtocol as error:
            raise Bye(error_reply(error)) from error
        finally:
            link.interruptible = False
        if found is None:
            return None
        if found.strip():
            try:
                return codec.parse(found)
            except ForeignProtocol as error:
                raise Bye(error_reply(error)) from error


async def _dispatch(link: Link, request: Request) -> None:
    link.check(request.verb)
    command = COMMANDS.get(request.verb)
    if command is None or not VERBS[request.verb].available:
        await link.send(Reply(502, "NOT_IN_THIS_VERSION", {"message": f"{request.verb} is not in this version"}))
        return
    await command(link, codec.bind(request))
