"""A conversation with a gateway that outlives the links that carry it: what can be said twice is said again on a new one."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TypeVar

from bridged.client.gateway import Gateway
from bridged.errors import BadRequest, BridgedError, DaemonUnreachable, from_dict
from bridged.protocol.line import format_request
from bridged.protocol.reply import Reply, parse_reply

T = TypeVar("T")

CHUNK_BYTES = 64 * 1024
SILENCE_S = 60.0  # The gateway says something at least every 15 s while it works for us; four times that is a dead link.
BACKOFF_S = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
RETRY_S = 60.0


class Refused(Exception):
    """The gateway answered with an error; it is the result of the request. ``error``: the same, typed."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(f"{reply.data.get('message') or ''} [{reply.text}]".strip())
        self.reply = reply

    @property
    def error(self) -> BridgedError:
        facts = {key[5:]: value for key, value in self.reply.data.items() if key.startswith("fact.")}
        return from_dict({"code": self.reply.text, "message": self.reply.data.get("message", ""), "facts": facts})


class LinkLost(Exception):
    """The connection broke, or nobody spoke for too long."""


class Link:
    """One connection that has said hello. Every failure is ``LinkLost``, except a peer that is not bridged."""

    def __init__(self, gateway: Gateway) -> None:
        self._buffer = bytearray()
        self.sent_bytes = 0
        try:
            self._sock = gateway.connect()
        except OSError as error:
            raise LinkLost(f"{error.strerror or error}") from error
        try:
            self._sock.settimeout(SILENCE_S)
            greeting = self.reply()
            if greeting.code != 220:
                raise Refused(greeting)
            self._expect(b"HELLO proto=1 format=json\n", 250)
            if gateway.token:
                self._expect(format_request("AUTH", gateway.token), 235)
        except BadRequest as error:
            self.close()
            text = f"{gateway.address} answers, but not as bridged does: {error.message}"
            raise DaemonUnreachable(text) from error
        except BaseException:
            self.close()
            raise

    def _expect(self, request: bytes, code: int) -> None:
        self.send(request)
        if (reply := self.reply()).code != code:
            raise Refused(reply)

    def close(self) -> None:
        self._sock.close()

    def send(self, data: bytes) -> None:
        try:
            self._sock.sendall(data)
        except OSError as error:
            raise LinkLost(f"sending failed: {error.strerror or error}") from error
        self.sent_bytes += len(data)

    def _fill(self) -> None:
        try:
            chunk = self._sock.recv(CHUNK_BYTES)
        except OSError as error:
            raise LinkLost(f"receiving failed: {error.strerror or error}") from error
        if not chunk:
            raise LinkLost("the gateway closed the connection")
        self._buffer += chunk

    def reply(self) -> Reply:
        """One reply line. A gateway that is closing down counts as a lost link: it, or the next one, will be back."""
        searched = 0
        while (at := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched > 1 << 20:
                raise BadRequest(f"a reply without end: {bytes(self._buffer[:80])!r}")
            self._fill()
        found = bytes(self._buffer[: at + 1])
        del self._buffer[: at + 1]
        reply = parse_reply(found)
        if reply.code == 421:
            raise LinkLost(str(reply.data.get("message") or "the gateway is shutting down"))
        return reply

    def bytes_from_now_on(self) -> tuple[socket.socket, bytes]:
        """The connection after its last reply line, and what has come behind that already."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return self._sock, rest

    def raw(self, count: int) -> Iterator[bytes]:
        """Exactly ``count`` raw bytes, in pieces."""
        while count:
            if not self._buffer:
                self._fill()
            piece = bytes(self._buffer[:count])
            del self._buffer[: len(piece)]
            count -= len(piece)
            yield piece


class Console:
    """A target's serial port: its bytes, both ways, until the connection ends. ``fileno`` is for ``select``."""

    def __init__(self, link: Link) -> None:
        self._sock, self._before = link.bytes_from_now_on()
        # Nobody has to say anything here for hours, so a gateway that vanished is found by probes.
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if self._sock.family != socket.AF_UNIX:
            for option, value in ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 6)):
                self._sock.setsockopt(socket.IPPROTO_TCP, option, value)

    def fileno(self) -> int:
        return self._sock.fileno()

    def read(self) -> bytes:
        """What has come, without waiting; empty where that was nothing, or part of a TLS record. Raises ``LinkLost``."""
        found, self._before = self._before, b""
        self._sock.settimeout(0)
        while True:
            try:
                piece = self._sock.recv(CHUNK_BYTES)
            except OSError as error:
                # ssl.SSLWantReadError, named by what it says, so that a plain connection need not import ssl.
                if isinstance(error, BlockingIOError) or type(error).__name__ == "SSLWantReadError":
                    return found
                raise LinkLost(f"receiving failed: {error.strerror or error}") from error
            if not piece:
                if found:
                    return found  # The end comes again.
                raise LinkLost("the gateway closed the connection")
            found += piece
            if len(found) > CHUNK_BYTES and not getattr(self._sock, "pending", int)():
                return found

    def write(self, data: bytes) -> None:
        """Raises ``LinkLost``, also when the gateway takes nothing for ``SILENCE_S``."""
        self._sock.settimeout(SILENCE_S)
        try:
            self._sock.sendall(data)
        except OSError as error:
            raise LinkLost(f"sending failed: {error.strerror or error}") from error

    def close(self) -> None:
        self._sock.close()

    def __enter__(self) -> Console:
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self.close()


class Session:
    """The conversation with a gateway across as many connections as it takes.

    ``call`` repeats its action on a new connection after a lost one, so every action must be one that may be said twice.
    """

    def __init__(self, gateway: Gateway, retry_s: float, note: Callable[[str], None] = lambda _text: None) -> None:
        self.gateway, self.retry_s, self._note = gateway, retry_s, note
        self._link: Link | None = None
        self._ever = False
        self._deadline = 0.0
        self._failures = 0

    def close(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None

    def alive(self) -> None:
        """Something went forward: the patience for the next breakdown starts anew."""
        if self._failures:
            self._note("connected again")
        self._failures = 0

    def excuse(self, seconds: float) -> None:
        """So long bytes went out, and whether they arrived is only known later: that is slow, and not gone."""
        self._deadline += seconds

    def call(self, action: Callable[[Link], T]) -> T:
        """Raises ``DaemonUnreachable`` when the gateway was never there, or did not come back in time."""
        while True:
            try:
                if self._link is None:
                    self._link = Link(self.gateway)
                    self._ever = True
                result = action(self._link)
            except LinkLost as lost:
                self.close()
                self._wait_after(lost)
            except BaseException:
                self.close()  # In the middle of a conversation nobody knows what comes next.
                raise
            else:
                self.alive()
                return result

    def _wait_after(self, lost: LinkLost) -> None:
        now, where = time.monotonic(), self.gateway.address
        if not self._failures:
            self._deadline = now + self.retry_s
        if not self._ever:
            raise DaemonUnreachable(f"connecting to {where} failed: {lost}", gateway=str(where)) from lost
        pause = BACKOFF_S[min(self._failures, len(BACKOFF_S) - 1)]
        if now + pause > self._deadline:
            text = f"the connection to {where} was lost and did not come back within {self.retry_s:g} s: {lost}"
            raise DaemonUnreachable(text, gateway=str(where)) from lost
        if not self._failures:
            self._note(f"connection lost ({lost}); trying again")
        self._failures += 1
        time.sleep(pause)

    def take(self, action: Callable[[Link], T]) -> T:
        """As ``call``, and from then on the connection belongs to what ``action`` gave back."""
        result = self.call(action)
        self._link = None
        return result

    def ask(self, request: bytes, each: Callable[[Reply], None] = lambda _reply: None) -> Reply:
        """Says one line; ``each`` gets every line of the answer but the last, which is returned."""

        def action(link: Link) -> Reply:
            link.send(request)
            while True:
                reply = link.reply()
                if not reply.more:
                    return reply
                self.alive()
                each(reply)

        return self.call(action)
