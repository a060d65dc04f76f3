"""The line protocol's server: TCP on loopback and a Unix socket, for ``nc``, scripts and our own command line.

One task serves one connection and answers its commands in order; what a client pipelines is answered in the order it was
sent, also after it has closed its sending side (``nc -N``). The grammar and the table of verbs are ``protocol.line``; what
is done is ``jobs`` and the image store. Document: the line-protocol chapter of the docs.

Invariants:

- Beyond loopback nothing is spoken in plain text unless the configuration asks for it, and nothing is answered without a token
  or a certificate (P7). The Unix socket is 0660 from the moment it can be found.
- Each verb has its scope in the table; each target is asked for in ``guarded``. No line of a client is ever logged.
- Every input has a bound: line length, size of an upload, connections, time without a word, mistakes in a row. Every output
  has one too: a client that does not read is closed after ``drain_timeout_s``; nobody else waits for it.
- The bytes of a PUT are consumed exactly, also where they are refused, so that a piped script never loses step; where their
  number cannot be known or is above the limit the connection is closed instead.
- An upload is never held in memory, and the store is only called in threads: the loop is never blocked by a disk.
- A client that goes away changes nothing: its job runs on (P1), the synced part of its upload stays for the next PUT.
- A line that was cut off (no line end before the end of the connection) is never carried out.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from bridged import __version__
from bridged.api import consoles
from bridged.api.auth import Authority, Peer, Principal
from bridged.api.guarded import Guarded
from bridged.api.handshakes import Handshakes
from bridged.api.ports import JobsApi, StagedFile, StoreApi, Upload
from bridged.api.replies import (
    audit_data,
    credential_data,
    final_reply,
    findings,
    job_data,
    job_summary,
    progress,
    progress_of,
    target_data,
    unchanged,
    update_data,
)
from bridged.api.requests import KINDS, submission
from bridged.api.tls import HANDSHAKE_S, Tls, transport
from bridged.api.transfers import Transfer, Transfers, in_thread
from bridged.config import Listen
from bridged.console.room import Console
from bridged.errors import (
    BadRequest,
    BridgedError,
    ConfigError,
    ForeignProtocol,
    ImageTooLarge,
    LoginFirst,
    NotAllowed,
    Stopped,
    TooLarge,
    TooMany,
    UnknownImage,
    UnknownJob,
    UnknownTarget,
    UnknownTrace,
    UnknownVerb,
    WrongToken,
)
from bridged.jobs.model import TERMINAL, Job, JobKind, JobState, Update
from bridged.protocol import line as codec
from bridged.protocol.line import Reply, Request, Scope

log = logging.getLogger(__name__)

CHUNK_BYTES = 64 * 1024  # What asyncio reads at once, and a quarter of what the store syncs at once.
BACKLOG = 512  # Connections that the kernel holds until we take them: a burst of a thousand is taken within this.
RESERVED_CONNECTIONS = 32  # Beyond ``Limits.connections`` of one principal: the others, an administrator above all, get in.
REFUSED_CONNECTIONS = 64  # So many that are one too many may take their time to read why; the next ones are closed at once.
TEXT_PROGRESS_S = 1.0  # Mere progress at most so often for people who read text; programs (JSON) get every update.
STRANGERS_EACH = 16  # Connections of one address that has shown no token yet; a browser opens six, a script one.
WRONG_TOKENS = 3  # On one connection; then it is closed.
AUDIT_PAGE = 1000  # Entries of one AUDIT; some 200 bytes each.
MISTAKES = (BadRequest, UnknownVerb, LoginFirst, NotAllowed)
LOG_PAGE = 200  # Entries of a log held for one client at a time.
# A client on TCP whose machine vanished is found within 30 + 3 * 10 s, also while nobody has anything to say to it.
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 30, 10, 3


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


class _Gone(Exception):
    """The client cannot be reached any more; there is nobody to tell."""


class _Bye(Exception):
    """The connection ends now; ``reply`` is the last line."""

    def __init__(self, reply: Reply | None = None) -> None:
        super().__init__()
        self.reply = reply


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
    ) -> None:
        self.jobs, self.store, self.limits = jobs, store, limits or Limits()
        self.authority, self.tls = authority or Authority(), tls
        self.gateway = gateway or socket.gethostname()
        self.on_upload = on_upload or (lambda _bytes, _resumed: None)
        self.stopping = False
        self.on_drain: Callable[[], Awaitable[None]] | None = None
        self._servers: list[asyncio.Server] = []
        self._connections: dict[asyncio.Task[None], _Connection] = {}
        self._refusing = 0
        self._handshakes = Handshakes()
        self.transfers = transfers or Transfers(self.limits.takeover_s)
        self.consoles: Mapping[str, Console] = consoles or {}
        self._socket_path: Path | None = None

    @property
    def connections(self) -> int:
        return len(self._connections)

    async def listen_tcp(self, listen: Listen) -> int:
        """Returns the port (useful where 0 was asked for). Raises ``NotAllowed`` (P7) or ``ConfigError``."""
        secure = self._secure(listen)
        common: dict[str, Any] = {"limit": CHUNK_BYTES, "backlog": BACKLOG}
        try:
            if secure:
                bound = self._handshakes.listen(listen.host, listen.port)
                found = [await asyncio.start_server(self._accept, sock=sock, **common, **secure) for sock in bound]
            else:
                found = [await asyncio.start_server(self._accept, listen.host, listen.port, **common)]
        except OSError as error:
            text = f"listening on {listen} failed: {error.strerror or error}"
            raise ConfigError(text, host=listen.host, port=listen.port) from error
        self._servers += found
        port: int = found[0].sockets[0].getsockname()[1]
        return port

    def _secure(self, listen: Listen) -> dict[str, Any]:
        context = transport(listen, self.tls, "The line protocol")
        return {} if context is None else {"ssl": context, "ssl_handshake_timeout": HANDSHAKE_S, "ssl_shutdown_timeout": 1.0}

    async def listen_unix(self, path: Path, mode: int = 0o660) -> None:
        """Takes the place of a socket that a dead daemon left, never of one that answers. Raises ``ConfigError``."""
        sock = await asyncio.to_thread(bind_unix, path, mode)
        self._servers.append(await asyncio.start_unix_server(self._accept, sock=sock, limit=CHUNK_BYTES, backlog=BACKLOG))
        self._socket_path = path

    async def listen_socket(self, sock: socket.socket, scheme: str = "") -> None:
        """A listening socket that was passed in (socket activation); the same rule holds for it."""
        if sock.family == socket.AF_UNIX:
            server = await asyncio.start_unix_server(self._accept, sock=sock, limit=CHUNK_BYTES, backlog=BACKLOG)
        else:
            secure = self._secure(Listen(str(sock.getsockname()[0]), int(sock.getsockname()[1]), scheme))
            if secure:
                sock = self._handshakes.over(sock)
            server = await asyncio.start_server(self._accept, sock=sock, limit=CHUNK_BYTES, backlog=BACKLOG, **secure)
        self._servers.append(server)

    async def stop(self, grace_s: float = 5.0) -> None:
        """No new connection; every client is told 421 after the command that it is in, or within ``grace_s``."""
        self.stopping = True
        for server in self._servers:
            server.close()
        if self._socket_path is not None:
            with contextlib.suppress(OSError):
                self._socket_path.unlink()
        for task, connection in list(self._connections.items()):
            if connection.interruptible:
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
        self._handshakes.taken(writer.get_extra_info("socket").fileno())
        connection = _Connection(self, reader, writer)
        if error := self.one_too_many(connection.who):
            # Beyond a bound not even a farewell may cost us anything: a flood would otherwise take all descriptors.
            self._refusing += 1
            try:
                await connection.refuse(codec.error_reply(error), patient=self._refusing <= REFUSED_CONNECTIONS)
            finally:
                self._refusing -= 1
            return
        self._connections[task] = connection
        try:
            await connection.serve()
        finally:
            del self._connections[task]

    def one_too_many(self, who: Principal) -> TooMany | None:
        """No principal can lock out the others: a few connections more than one may have are there for them.

        Those whom nobody knows yet get few each and half of all together, so that no crowd of them keeps a token out.
        """
        count, limit = len(self._connections), self.limits.connections
        own = sum(connection.who.name == who.name for connection in self._connections.values())
        if not who.known:
            strangers = sum(not connection.who.known for connection in self._connections.values())
            if own >= STRANGERS_EACH or strangers >= limit // 2:
                return TooMany(f"{own} connections without a token are open from there", limit=STRANGERS_EACH)
        if count >= limit and (own >= limit or count >= limit + RESERVED_CONNECTIONS):
            return TooMany(f"{count} connections are open, which is the limit", limit=limit)
        return None


def _keep_alive(sock: socket.socket) -> None:
    """Have the kernel find clients whose machine or link died without a word."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)


def bind_unix(path: Path, mode: int) -> socket.socket:
    """Bound under a temporary name, given its mode, then renamed: it never answers to the wrong people, and never not."""
    if path.exists():
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                pass  # Left by a daemon that died.
            except OSError as error:
                raise ConfigError(f"{path} is in the way: {error.strerror or error}", path=str(path)) from error
            else:
                raise ConfigError(f"another daemon answers on {path}", path=str(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    sock = socket.socket(socket.AF_UNIX)
    try:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        sock.bind(str(temporary))
        temporary.chmod(mode)
        sock.listen(BACKLOG)
        temporary.rename(path)
    except OSError as error:
        sock.close()
        raise ConfigError(f"listening on {path} failed: {error.strerror or error}", path=str(path)) from error
    return sock


class _Incoming:
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


class _Connection:
    """One client. ``interruptible``: it only waits, so that a stopping server may cancel it at once."""

    def __init__(self, server: LineServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.server, self.limits = server, server.limits
        self.incoming, self.writer = _Incoming(reader), writer
        self.json = False
        self.interruptible = False
        self.raw = (
            False  # What is sent now are bytes of a file or of a target: a reply among them would be taken for one of them.
        )
        self.peer = Peer.of(writer.get_extra_info)
        self._is(server.authority.known(self.peer))
        self.wrong_tokens = 0
        sock = writer.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            _keep_alive(sock)
        writer.transport.set_write_buffer_limits(high=self.limits.write_buffer_bytes)
        self._commands: dict[str, Callable[[dict[str, Any]], Awaitable[None]]] = {
            "HELP": self._help,
            "PING": self._ping,
            "QUIT": self._quit,
            "HELLO": self._hello,
            "AUTH": self._auth,
            "TOKEN": self._token,
            "AUDIT": self._audit,
            "TARGETS": self._targets,
            "INFO": self._info,
            "HAVE": self._have,
            "GET": self._get,
            **{verb: functools.partial(self._submit, verb) for verb in KINDS},
            "PLAN": self._plan,
            "JOBS": self._jobs,
            "STATUS": self._status,
            "WAIT": self._wait,
            "WATCH": self._watch,
            "CANCEL": self._cancel,
            "LOG": self._log,
            "TRACE": self._trace,
            "DRAIN": self._drain,
            "LOCK": self._lock,
            "UNLOCK": self._unlock,
            "CONSOLE": self._console,
        }

    def _is(self, who: Principal) -> None:
        """From here on this is ``who``; ``jobs`` lets through what that one may do."""
        self.who, self.jobs = who, Guarded(self.server.jobs, self.server.authority, who)

    # --- life of a connection -------------------------------------------------------------------------------------

    async def serve(self) -> None:
        self._gone = asyncio.ensure_future(self._lost())
        last: Reply | None = None
        try:
            await self._loop()
        except _Gone:
            pass
        except _Bye as bye:
            last = bye.reply
        except asyncio.CancelledError:  # Only ``LineServer.stop`` cancels us.
            last = codec.error_reply(Stopped("the daemon is stopping; jobs go on after its next start"))
        except ConnectionError:
            pass
        except Exception:
            log.exception("line protocol: a connection ended by a defect")
            last = codec.error_reply(BridgedError("a defect ended this connection; the daemon's log has it"))
        finally:
            with contextlib.suppress(Exception):
                await self._close(last)
            self._gone.cancel()

    async def refuse(self, reply: Reply, *, patient: bool) -> None:
        """One line instead of a conversation. ``patient``: wait a moment for the client to fetch it."""
        with contextlib.suppress(Exception):
            if patient:
                await self._close(reply)
            else:
                self.writer.write(codec.format_reply(reply, self.json))
                self.writer.close()

    async def _loop(self) -> None:
        greeting = f"bridged {__version__}"
        auth = "none" if self.who.known else "token"
        await self._send(Reply(220, greeting, {"gw": self.server.gateway, "proto": codec.VERSION, "auth": auth}))
        mistakes = 0
        while True:
            # Neither reading what was pipelined nor writing what the kernel takes at once waits: others would, for seconds.
            await asyncio.sleep(0)
            try:
                request = await self._next()
                if request is None:
                    return
                if request.verb == "PUT":
                    await self._put(request)
                else:
                    await self._dispatch(request)
                mistakes = 0
            except BridgedError as error:
                if isinstance(error, Stopped) or not self.server.authority.valid(self.who):
                    raise _Bye(codec.error_reply(error)) from error
                mistakes = mistakes + 1 if isinstance(error, MISTAKES) else 0
                await self._send(codec.error_reply(error))
                if mistakes >= self.limits.mistakes:
                    too_many = TooMany(f"{mistakes} mistakes in a row; this does not look like a client", limit=mistakes)
                    raise _Bye(codec.error_reply(too_many)) from error

    async def _next(self) -> Request | None:
        """The next request, ``None`` at the end. Blank lines are skipped: people press return to see whether we live."""
        while True:
            if self.server.stopping:
                raise Stopped("the daemon is stopping; jobs go on after its next start")
            try:
                self.interruptible = True
                async with asyncio.timeout(self._patience_s):
                    found = await self.incoming.line()
            except TimeoutError:
                seconds = f"{self._patience_s:g}"
                raise _Bye(Reply(421, "IDLE", {"message": f"nothing was said for {seconds} s; good-bye"})) from None
            except BadRequest as error:
                # What follows an endless or a cut-off line cannot be understood either.
                raise _Bye(Reply(500, error.code, codec.error_reply(error).data)) from error
            except ForeignProtocol as error:
                raise _Bye(codec.error_reply(error)) from error
            finally:
                self.interruptible = False
            if found is None:
                return None
            if found.strip():
                try:
                    return codec.parse(found)
                except ForeignProtocol as error:
                    raise _Bye(codec.error_reply(error)) from error

    @property
    def _patience_s(self) -> float:
        return self.limits.idle_timeout_s if self.who.known else min(self.limits.idle_timeout_s, self.limits.login_timeout_s)

    def _check(self, verb: str) -> None:
        """The right to say this verb at all; which target it may touch is asked by ``jobs``. Raises ``_Bye`` when revoked."""
        if not self.server.authority.valid(self.who):
            raise _Bye(codec.error_reply(WrongToken(f"{self.who.credential} was revoked or has expired")))
        scope = codec.VERBS[verb].scope
        if scope is not None:
            try:
                self.who.require(scope, None, verb)
                if scope is Scope.ADMIN and self.who.targets is not None:
                    # Tokens, the audit log and the daemon's end are of the whole gateway; a token made here may be, too.
                    raise NotAllowed(f"{verb} needs a right to all targets; {self.who.name} has one to some of them", verb=verb)
            except NotAllowed as error:
                self.jobs.note(verb.lower(), result=error.code)
                raise

    async def _dispatch(self, request: Request) -> None:
        self._check(request.verb)
        command = self._commands.get(request.verb)
        if command is None or not codec.VERBS[request.verb].available:
            await self._send(Reply(502, "NOT_IN_THIS_VERSION", {"message": f"{request.verb} is not in this version"}))
            return
        await command(codec.bind(request))

    async def _send(self, *replies: Reply) -> None:
        await self._send_bytes(b"".join(codec.format_reply(reply, self.json) for reply in replies))

    async def _send_bytes(self, data: bytes) -> None:
        """Waits only where the client does not keep up, and not for ever."""
        if self._gone.done():
            raise _Gone
        self.writer.write(data)
        try:
            async with asyncio.timeout(self.limits.drain_timeout_s):
                await self.writer.drain()
        except TimeoutError:
            log.info("line protocol: a client did not read for %g s and was closed", self.limits.drain_timeout_s)
            self.writer.transport.abort()
            raise _Gone from None
        except ConnectionError as error:
            raise _Gone from error

    async def _lost(self) -> None:
        with contextlib.suppress(Exception):
            await self.writer.wait_closed()

    async def _close(self, last: Reply | None) -> None:
        """Says the last line so that it arrives: closing a socket with unread input resets it, and a reset eats our words."""
        writer = self.writer
        try:
            if writer.transport.is_closing():
                return
            if last is not None and not self.raw:
                writer.write(codec.format_reply(last, self.json))
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

    # --- talk -----------------------------------------------------------------------------------------------------

    async def _help(self, values: dict[str, Any]) -> None:
        lines = codec.help_lines(values.get("verb", ""))
        await self._send(*(Reply(214, text, more=i < len(lines)) for i, text in enumerate(lines, 1)))

    async def _ping(self, _values: dict[str, Any]) -> None:
        await self._send(Reply(250, "PONG"))

    async def _quit(self, _values: dict[str, Any]) -> None:
        raise _Bye(Reply(221, "good-bye"))

    async def _hello(self, values: dict[str, Any]) -> None:
        if "proto" not in values:
            raise BadRequest(f"HELLO: proto= is missing; expected: {codec.VERBS['HELLO'].synopsis}", verb="HELLO")
        self.json = values.get("format", "json" if self.json else "text") == "json"
        data = {"proto": codec.VERSION, "format": "json" if self.json else "text", "version": __version__}
        await self._send(Reply(250, "", data))

    async def _auth(self, values: dict[str, Any]) -> None:
        try:
            who = await self.server.authority.login(self.peer, values["token"])
        except WrongToken as error:
            self.wrong_tokens += 1
            if self.wrong_tokens >= WRONG_TOKENS:
                raise _Bye(codec.error_reply(error)) from error
            raise
        if too_many := self.server.one_too_many(who):
            raise _Bye(codec.error_reply(too_many))
        self._is(who)
        await self._send(Reply(235, "", {"name": who.name, "scopes": sorted(who.scopes), "targets": _sorted(who.targets)}))

    async def _token(self, values: dict[str, Any]) -> None:
        authority, action, name = self.server.authority, values["action"], values.get("name", "")
        if action == "list":
            found = authority.credentials()
            await self._send_many([Reply(250, "", credential_data(one), more=True) for one in found])
            await self._send(Reply(250, "", {"tokens": len(found)}))
            return
        if not name:
            raise BadRequest(f"TOKEN {action}: <name> is missing", verb="TOKEN")
        if action == "revoke":
            gone = await authority.revoke(name)
            self.jobs.note("token revoke", detail=name)
            await self._send(Reply(250, "", {"revoked": gone.name}))
            return
        scopes = [Scope(word) for word in values.get("scope", "").split(",") if word]
        targets = [word for word in values.get("targets", "").split(",") if word]
        known = [str(entry["name"]) for entry in self.jobs.targets()]
        if strange := [word for word in targets if word not in known]:
            raise UnknownTarget(f"there is no target {strange[0]}; there are: {', '.join(known) or 'none'}")
        made, token = await authority.grant(
            name,
            scopes,
            targets,
            lifetime_s=values.get("expires", 0.0),
            certificate=values.get("certificate", ""),
            by=self.who.name,
        )
        self.jobs.note("token add", detail=f"{name}: {made.scopes} on {made.targets or 'all targets'}")
        await self._send(Reply(250, "", credential_data(made) | ({"token": token} if token else {})))

    async def _audit(self, values: dict[str, Any]) -> None:
        found = await self.server.authority.audit(min(values.get("limit", 50), AUDIT_PAGE))
        await self._send_many([Reply(250, "", audit_data(entry), more=True) for entry in found])
        await self._send(Reply(250, "", {"entries": len(found)}))

    # --- images ---------------------------------------------------------------------------------------------------

    async def _have(self, values: dict[str, Any]) -> None:
        sha256 = values["sha256"]
        offset, size, complete = await self.server.transfers.have(self.server.store, self.who.name, sha256)
        if not offset and not complete:
            raise UnknownImage(f"nothing of {sha256} is staged", sha256=sha256)
        await self._send(Reply(250, "", {"offset": offset, "size": size, "complete": complete}))

    async def _put(self, request: Request) -> None:
        """354, the bytes, the answer. From 354 on the bytes are consumed, whatever the answer will be."""
        try:
            size, offset = codec.put_extent(request)
        except BadRequest as error:
            raise _Bye(codec.error_reply(error)) from error  # How many bytes would follow?
        if size > self.limits.image_bytes:
            too_large = ImageTooLarge(
                f"PUT of {size} bytes: at most {self.limits.image_bytes} are accepted", limit=self.limits.image_bytes
            )
            raise _Bye(codec.error_reply(too_large))
        upload: Upload | None = None
        failure: BridgedError | None = None
        if not self.who.known:
            # Bytes of somebody unknown are not even read.
            raise _Bye(codec.error_reply(LoginFirst("PUT needs a token with scope flash", scope=Scope.FLASH.value)))
        try:
            self._check("PUT")
            values = codec.bind(request)
            sha256, name, type_hint = values["sha256"], values.get("name", ""), values.get("type", "auto")
            arguments = (self.who.name, size, sha256, offset, self.jobs.image_name(name), type_hint)
            upload = await self.server.transfers.open(self.server.store, *arguments)
        except BridgedError as error:
            failure = error
        if isinstance(failure, ImageTooLarge | TooLarge):
            raise _Bye(codec.error_reply(failure))
        if upload is None:
            await self._swallow(size - offset, failure)
            return
        with self.server.transfers.running(self.who.name, sha256) as transfer:
            staged = await self._receive(upload, size, offset, transfer)
        self.jobs.note("put", detail=f"sha256:{staged.sha256} {name}".rstrip())
        answer = {"image": f"sha256:{staged.sha256}", "size": staged.size_bytes, "complete": True}
        await self._send(Reply(250, "", answer | ({"name": name} if name else {})))

    async def _swallow(self, count: int, failure: BridgedError | None) -> None:
        """The bytes of a PUT that was refused: a piped script has sent them already and must not lose step."""
        await self._send(Reply(354, "SEND", {"bytes": count}))
        received = 0
        try:
            while received < count:
                data = await self._raw(count - received, Transfer())
                if not data:
                    assert failure is not None
                    raise _Bye(codec.error_reply(failure))
                received += len(data)
        finally:
            self.server.on_upload(received, False)
        assert failure is not None
        raise failure

    async def _receive(self, upload: Upload, size: int, offset: int, transfer: Transfer) -> StagedFile:
        """The announced bytes into the store; a failure of the store is told after the last of them."""
        failure: BridgedError | None = None
        finished = False
        received = 0
        try:
            await self._send(Reply(354, "SEND", {"bytes": size - offset}))
            while received < size - offset:
                data = await self._raw(size - offset - received, transfer)
                if not data:
                    cut = BadRequest(
                        f"PUT announced {size - offset} bytes and the connection ended after {received}", received=received
                    )
                    raise _Bye(codec.error_reply(failure or cut))
                received += len(data)
                if failure is None:
                    try:
                        await in_thread(upload.write, data)
                    except BridgedError as error:
                        failure = error
            if failure is not None:
                raise failure
            staged = await in_thread(upload.finish)
            finished = True
        finally:
            if not finished:
                await in_thread(upload.abandon)
            self.server.on_upload(received, offset > 0)
        return staged

    async def _raw(self, limit: int, transfer: Transfer) -> bytes:
        try:
            async with transfer.waiting(self.limits.idle_timeout_s):
                return await self.incoming.raw(min(limit, CHUNK_BYTES))
        except TimeoutError:
            text = f"no byte of the announced data came for {self.limits.idle_timeout_s:g} s; what was synced is kept"
            if transfer.taken:
                text = "no byte came for a while and another connection goes on with this upload; what was synced is kept"
            raise _Bye(Reply(421, "IDLE", {"message": text})) from None
        except ConnectionError as error:
            raise _Gone from error

    async def _get(self, values: dict[str, Any]) -> None:
        ref = values["image|job"]
        try:
            path, sha256 = await self._result_of(ref)  # First: anybody may give his image the name of a job.
        except UnknownJob as unknown:
            if self.who.targets is not None:
                raise  # An image belongs to no target; who has a right to some of them only gets what their jobs have read.
            try:
                staged = await in_thread(self.server.store.get, ref)
            except UnknownImage:
                raise unknown from None
            path, sha256 = staged.path, staged.sha256
        try:
            file = await asyncio.to_thread(path.open, "rb")
        except FileNotFoundError:
            raise UnknownImage(f"{ref} was removed a moment ago", image=ref) from None
        await self._send_file(file, {"sha256": sha256})

    async def _send_file(self, file: BinaryIO, data: dict[str, Any]) -> None:
        """250 with ``data`` and the size, then exactly so many bytes. Closes ``file``."""
        try:
            left = os.fstat(file.fileno()).st_size
            await self._send(Reply(250, "", {"size": left, **data}))
            self.raw = left > 0
            while left:
                piece = await in_thread(file.read, min(left, CHUNK_BYTES))
                if not piece:
                    # The number of bytes was promised; a short answer must not look like a whole one.
                    raise _Bye
                await self._send_bytes(piece)
                left -= len(piece)
            self.raw = False
        finally:
            file.close()

    async def _result_of(self, ref: str) -> tuple[Path, str]:
        """File and digest of what the READ job ``ref`` has read. Raises ``UnknownJob``, ``BadRequest``."""
        job = self.jobs.get(ref)
        path = await in_thread(self.jobs.read_result, ref)
        return path, str((job.result or {}).get("sha256", ""))

    # --- jobs -----------------------------------------------------------------------------------------------------

    async def _submit(self, verb: str, values: dict[str, Any]) -> None:
        wait = values.pop("wait", False)
        job = await self.jobs.submit(submission(verb, values, self.who.name))
        if wait or (job.kind is JobKind.ENSURE and job.state is JobState.SUCCEEDED and unchanged(job)):
            await self._send(*await self._final(await self._follow(job, None) if wait else job))
        else:
            await self._send(Reply(250, "", {"job": job.id, "state": job.state, "target": job.target, "kind": job.kind}))

    async def _follow(self, job: Job, timeout_s: float | None) -> Job:
        """Streams 150 lines until ``job`` has ended or the time is over; the job as it is then. Raises ``Stopped``."""
        loop = asyncio.get_running_loop()
        deadline = None if timeout_s is None else loop.time() + timeout_s
        seq, told = -1, 0.0
        async with contextlib.aclosing(self._updates(job.id, None, deadline)) as updates:
            async for update in updates:
                if update is not None:
                    # Mere progress repeats the number of the update before it.
                    if self.json or update.seq != seq or loop.time() - told >= TEXT_PROGRESS_S:
                        seq, told = update.seq, loop.time()
                        await self._send(progress(update))
                    ended = update.state in TERMINAL
                else:
                    job = self.jobs.get(job.id)
                    ended = job.terminal
                    if not ended:
                        await self._send(progress_of(job))
                if ended:
                    break
        job = self.jobs.get(job.id)
        if not job.terminal and (deadline is None or loop.time() < deadline):
            raise Stopped("the daemon is stopping; the job goes on after its next start", job=job.id)
        return job

    async def _updates(
        self, job_id: str | None, target: str | None, deadline: float | None
    ) -> AsyncGenerator[Update | None, None]:
        """Updates as they come, the first of them how things are; ``None`` when it is time for a sign of life.

        Raises ``_Gone`` when the client has left, ``Stopped`` when the daemon stops.
        """
        loop = asyncio.get_running_loop()
        source = self.jobs.watch(job_id=job_id, target=target)
        pending = asyncio.ensure_future(_first(source))
        try:
            while True:
                patience = self.limits.heartbeat_s
                if deadline is not None:
                    patience = min(patience, max(0.0, deadline - loop.time()))
                if self.server.stopping:
                    raise Stopped("the daemon is stopping; jobs go on after its next start")
                self.interruptible = True
                try:
                    done, _ = await asyncio.wait({pending, self._gone}, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    self.interruptible = False
                if self._gone in done:
                    raise _Gone
                if pending in done:
                    update = pending.result()
                    if update is None:
                        return
                    yield update
                    pending = asyncio.ensure_future(_first(source))
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

    async def _final(self, job: Job) -> list[Reply]:
        """What it found, if it looked for something, then how it ended, with the name of its recording where one is kept."""
        reply = final_reply(job)
        return [*findings(job), replace(reply, data={**reply.data, **await self._traced(job)})]

    async def _traced(self, job: Job) -> dict[str, str]:
        kept = await in_thread(self.server.store.trace_file, job.id) if job.terminal else None
        return {"trace": job.id} if kept is not None else {}

    async def _trace(self, values: dict[str, Any]) -> None:
        job_id = self.jobs.get(values["job"]).id
        path = await in_thread(self.server.store.trace_file, job_id)
        try:
            file = await asyncio.to_thread(path.open, "rb") if path is not None else None
        except FileNotFoundError:
            file = None  # A newer one took its place just now.
        if file is None:
            job = self.jobs.get(job_id)
            raise UnknownTrace(f"no recording is kept of job {job.id} ({job.kind}, {job.state})", job=job.id)
        await self._send_file(file, {"job": job_id})

    async def _status(self, values: dict[str, Any]) -> None:
        job = self.jobs.get(values["job"])
        await self._send(Reply(250, "", job_data(job) | await self._traced(job)))

    async def _wait(self, values: dict[str, Any]) -> None:
        job = self.jobs.get(values["job"])
        if not job.terminal:
            job = await self._follow(job, values.get("timeout"))
        if job.terminal:
            await self._send(*await self._final(job))
        else:
            data = {"job": job.id, "state": job.state, "message": f"the job goes on: {job.state} {job.phase}".rstrip()}
            await self._send(Reply(408, "WAIT_TIMEOUT", data))

    async def _watch(self, values: dict[str, Any]) -> None:
        what = values["job|target|*"]
        names = [str(entry["name"]) for entry in self.jobs.targets()]
        if what != "*" and what not in names:
            job = self.jobs.get(what)
            await self._send(*await self._final(job if job.terminal else await self._follow(job, None)))
            return
        await self._send(Reply(150, "WATCHING", {"watch": what}, more=True))
        async with contextlib.aclosing(self._updates(None, None if what == "*" else what, None)) as updates:
            async for update in updates:
                # Without a job there is no end: the sign of life says only that we are here.
                await self._send(Reply(150, "WATCHING", {"watch": what}, more=True) if update is None else progress(update))
        raise Stopped("the stream of updates has ended")

    async def _cancel(self, values: dict[str, Any]) -> None:
        job = await self.jobs.cancel(values["job"], values.get("force", False))
        await self._send(Reply(250, "", {"job": job.id, "state": job.state, "phase": job.phase or None}))

    async def _drain(self, values: dict[str, Any]) -> None:  # noqa: ARG002
        if self.server.on_drain is None:
            raise NotAllowed("this listener cannot end its daemon")
        # The daemon's affair from here on, whether or not this client stays to see it.
        drained = asyncio.ensure_future(self.server.on_drain())
        while not drained.done():
            await asyncio.wait({drained, self._gone}, timeout=self.limits.heartbeat_s, return_when=asyncio.FIRST_COMPLETED)
            if self._gone.done():
                raise _Gone
            if not drained.done():
                await self._send(Reply(150, "DRAINING", more=True))
        await drained
        await self._send(Reply(250, "", {"drained": 1}))

    async def _log(self, values: dict[str, Any]) -> None:
        count, following = 0, values.get("from", 0)
        while updates := self.jobs.log(values["job"], following, LOG_PAGE):
            await self._send_many([Reply(250, "", update_data(update), more=True) for update in updates])
            count, following = count + len(updates), updates[-1].seq + 1
            if len(updates) < LOG_PAGE:
                break
        await self._send(Reply(250, "", {"job": values["job"], "entries": count, "next": following}))

    async def _jobs(self, values: dict[str, Any]) -> None:
        state = None
        if "state" in values:
            try:
                state = JobState(values["state"].lower())
            except ValueError:
                raise BadRequest(f"JOBS: there is no state {values['state']}; expected {' or '.join(JobState)}") from None
        found = self.jobs.list(values.get("target"), state, values.get("limit", 50), values.get("before", ""))
        await self._send_many([Reply(250, "", job_summary(job), more=True) for job in found])
        await self._send(Reply(250, "", {"jobs": len(found)}))

    async def _targets(self, _values: dict[str, Any]) -> None:
        found = self.jobs.targets()
        await self._send_many([Reply(250, "", target_data(entry), more=True) for entry in found])
        await self._send(Reply(250, "", {"targets": len(found)}))

    async def _info(self, values: dict[str, Any]) -> None:
        info = self.jobs.info(values["target"])
        rows = [(key, value) for key, value in target_data(info).items() if key != "target" and value not in (None, "")]
        if values["target"] in self.server.consoles:
            held = consoles.holder(self.server.consoles[values["target"]])
            rows += [(key, value) for key, value in held.items() if value not in (None, "")]
        await self._send_many([Reply(250, "", {key: value}, more=True) for key, value in rows])
        await self._send(Reply(250, "", {"target": values["target"]}))

    # --- consoles and locks ---------------------------------------------------------------------------------------

    def _console_of(self, target: str, scope: Scope, doing: str) -> Console:
        """Raises ``NotAllowed``, ``LoginFirst`` or ``UnknownTarget``."""
        self.who.require(scope, target, doing)
        return consoles.find(self.server.consoles, target)

    @property
    def _administers(self) -> bool:
        """Whether this client may take over what others hold."""
        return self.who.may(Scope.ADMIN)

    async def _lock(self, values: dict[str, Any]) -> None:
        console = self._console_of(values["target"], Scope.CONSOLE, "LOCK")
        right = bool(values.get("force")) and self._administers
        reply = await consoles.lock(console, self.who.name, values, right=right)
        self.server.authority.note(self.who, "lock", target=console.name, detail=values.get("note", ""))
        await self._send(reply)

    async def _unlock(self, values: dict[str, Any]) -> None:
        console = self._console_of(values["target"], Scope.CONSOLE, "UNLOCK")
        right = bool(values.get("force")) and self._administers
        reply = await consoles.unlock(console, self.who.name, right=right)
        self.server.authority.note(self.who, "unlock", target=console.name)
        await self._send(reply)

    async def _console(self, values: dict[str, Any]) -> None:
        """101, then raw bytes to the end of the connection: nothing after that is a command."""
        writing = values.get("mode", "rw") == "rw"
        doing = "CONSOLE rw" if writing else "CONSOLE ro"
        console = self._console_of(values["target"], Scope.CONSOLE if writing else Scope.READ, doing)

        async def begin(reply: Reply) -> None:
            await self._send(reply)
            self.raw = True

        dialog = consoles.Dialog(console, self.writer, lambda: self.server.authority.valid(self.who))
        self.server.authority.note(self.who, "console", target=console.name, detail="rw" if writing else "ro")
        self.interruptible = True
        try:
            await dialog.run(
                self.who.source, self.who.name, values, self.incoming.raw, begin, writing=writing, right=self._administers
            )
        finally:
            self.interruptible = False
        raise _Bye

    async def _plan(self, values: dict[str, Any]) -> None:
        plan = await self.jobs.plan(values.pop("target"), values.pop("image"), values)
        lists = {
            key: value for key, value in plan.items() if isinstance(value, list) and all(isinstance(v, dict) for v in value)
        }
        rows = [Reply(250, key, row, more=True) for key, value in lists.items() for row in value]
        await self._send_many(rows)
        await self._send(Reply(250, "", {key: value for key, value in plan.items() if key not in lists}))

    async def _send_many(self, replies: list[Reply]) -> None:
        """Long answers in pieces, so that a slow client holds a few lines and not all of them."""
        for at in range(0, len(replies), 64):
            await self._send(*replies[at : at + 64])


def _sorted(targets: frozenset[str] | None) -> list[str] | None:
    return None if targets is None else sorted(targets)


async def _first(source: AsyncIterator[Update]) -> Update | None:
    """The next update, ``None`` at the end. (A task must not raise ``StopAsyncIteration``.)"""
    async for update in source:
        return update
    return None
