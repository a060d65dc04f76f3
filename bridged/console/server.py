"""The console's own listeners: a TCP port and a Unix socket for each target, raw or telnet with RFC 2217.

``Listeners`` opens them and makes a connection of each client; ``Raw`` and ``Telnet`` are the two wires (``room.Sink``), in
plain text and in TLS alike. What a client may is asked of ``admit``, and where a listener may be bound and what it speaks there
of ``Entrance`` (P7); the caller gives both. Who may write at a time is decided in ``room``.

RFC 2217, as we keep it:

- Answers tell what is in force. What a client may not set (it is not the writer, or the port cannot do it) is answered with the
  present value, which clients report as refused.
- The one exception: DTR and RTS that are wired to NRST, BOOT0 or the power are acknowledged and do not move, unless the
  configuration leaves them to clients. Every client sets both when it connects, and would give up without the acknowledgement.
- While a job has the port the client gets FLOWCONTROL-SUSPEND and a SIGNATURE that says why, and nothing among its data;
  afterwards FLOWCONTROL-RESUME. A telnet client without RFC 2217 is told as a raw one is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bridged import __version__, config
from bridged.config.values import Listen
from bridged.console.room import READ_ONLY, READ_WRITE, Console, Seat
from bridged.errors import BridgedError, ForeignProtocol, NotAllowed
from bridged.protocol import rfc2217, telnet
from bridged.protocol.rfc2217 import Command, Control, LineState, Purge
from bridged.target.uart import Counters

log = logging.getLogger(__name__)

BACKLOG = 128  # A burst of reconnecting clients is taken within this; one console has room for 32 anyway.
SEND_BUFFER_BYTES = 128 * 1024  # Of the kernel, for one client; by itself it takes 4 MiB for one that does not read.
REPLIES_BYTES = 64 * 1024  # Of telnet's answers that a client has not fetched, beside the bytes of the target.
# The first line of a request, and the beginning of one that is longer than what was read: a page chooses method and path.
HTTP_LINE = re.compile(rb"\S+ \S+ HTTP/\d")
HTTP_PART = re.compile(rb"[\w!#$%&'*+.^`|~-]+(?: \S*(?: H?T?T?P?/?[\d.]*\r?)?)?")
HTTP_PART_BYTES = 512  # Shorter ones come whole: a browser sends its header at once ...
HTTP_METHOD_BYTES = 8192  # ... so that no word alone of less than this is one, as digits that somebody pipes.
EOF_LINGER_S = 2.0  # After a client closed its sending side (nc -N): time for the target's answer.


@dataclass(frozen=True, slots=True)
class Admission:
    """What a new client may: ``principal`` is what locks and writers go by, ``source`` where it comes from, for people.

    ``valid``: whether what it showed still counts. ``known``: it is somebody, if one without a right to this console.
    """

    principal: str
    source: str
    read: bool = True
    write: bool = True
    known: bool = True
    valid: Callable[[], bool] = lambda: True


Admit = Callable[[Callable[[str], Any], str], Admission]
"""Given ``get_extra_info`` of the connection and the name of the target."""

Serve = Callable[..., Awaitable[asyncio.Server]]


class Entrance(Protocol):
    """What is needed of ``api.entrance.Entrance``."""

    async def open(self, listen: Listen, serve: Serve) -> list[asyncio.Server]: ...
    async def take(self, sock: socket.socket, scheme: str, serve: Serve) -> asyncio.Server: ...
    def taken(self, info: Callable[[str], Any]) -> None: ...


class Raw(asyncio.Protocol):
    """Bytes and nothing else. Also the part that ``Telnet`` shares with it."""

    escape = False

    def __init__(self, console: Console, admit: Admit, taken: Callable[[Callable[[str], Any]], None]) -> None:
        """``taken``: told of who has a seat. Whom nobody gave one is counted among the handshakes until it is gone."""
        self.console = console
        self._admit, self._taken = admit, taken
        self._transport: asyncio.Transport
        self._valid: Callable[[], bool]
        self._seat: Seat | None = None
        self._linger: asyncio.TimerHandle | None = None
        self._heard = False

    # --- asyncio ----------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        sock = transport.get_extra_info("socket")
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        who = self._admit(transport.get_extra_info, self.console.name)
        self._valid = who.valid
        try:
            if not who.read:
                raise NotAllowed(self._refusal(who))
            self._begin()
            mode = READ_WRITE if who.write else READ_ONLY
            self._seat = self.console.sit(self, who.source, who.principal, mode, escape=self.escape)
            self._taken(transport.get_extra_info)
        except BridgedError as error:
            # Whoever only knocks must not be able to fill the log.
            level = logging.INFO if who.known else logging.DEBUG
            log.log(level, "console of %s: %s was turned away: %s", self.console.name, who.source, error.message)
            self._inline(error.message)
            transport.close()

    def _refusal(self, who: Admission) -> str:
        text = f"{who.source} may not read the console of {self.console.name}"
        if who.known:
            return f"{text}: {who.principal} has no right to this target"
        if self._transport.get_extra_info("sslcontext") is None:
            return f"{text}: nothing is allowed without a login here; use CONSOLE of the line protocol"
        shown = "was not given any rights" if self._transport.get_extra_info("peercert") else "is missing"
        return f"{text}: a client certificate {shown} (bridged token add NAME --certificate WHO --scope console)"

    def _begin(self) -> None:
        """Before the history is sent."""

    def data_received(self, data: bytes) -> None:
        if self._hears(data) and self._seat is not None:
            self._seat.say(data)

    def _hears(self, data: bytes) -> bool:
        """Whether it is for us. A web page that makes a browser ask this port must not type at the target: a browser begins
        with the line of a request, and what follows it is as the page likes."""
        if self._seat is None or self._transport.is_closing():
            return False
        if not self._heard and _is_http(data):
            error = ForeignProtocol("this is a serial port and no web server; nothing was sent to it")
            log.warning("console of %s: %s speaks HTTP and was closed", self.console.name, self._seat.name)
            self._seat.note("console write", error.code, "HTTP")
            self.drop(error.message)
            return False
        self._heard = True
        return True

    def eof_received(self) -> bool:
        """The client will say nothing more, and may listen still; who comes next may write at once."""
        if self._seat is not None:
            self._seat.done_writing()
        if self._transport.get_extra_info("sslcontext") is not None:
            return False  # asyncio knows no TLS that is closed in one direction only.
        self._linger = asyncio.get_running_loop().call_later(EOF_LINGER_S, self._transport.close)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        if self._linger is not None:
            self._linger.cancel()
        if self._seat is not None:
            if exc is not None:
                log.info("console of %s: the connection of %s broke: %s", self.console.name, self._seat.name, exc)
            seat, self._seat = self._seat, None
            seat.leave()

    # --- room.Sink ---------------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    def unread(self) -> int:
        return self._transport.get_write_buffer_size()

    def hold(self, held: bool) -> None:
        if held:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def notice(self, text: str) -> None:
        if self.console.settings.notices == "inline":
            self._inline(text)

    def _inline(self, text: str) -> None:
        self.write(f"\r\n[bridged: {text}]\r\n".encode("ascii", "replace"))

    def suspend(self, suspended: bool) -> None:
        """A raw client has no way to be told."""

    def look(self, modem: frozenset[str], errors: Counters | None) -> None:  # noqa: ARG002
        """Nor to hear of lines. Called several times a second: rights are looked at."""
        if not self._valid() and not self._transport.is_closing():
            self.drop("the credential of this connection does not count any more")

    def drop(self, reason: str) -> None:
        self.notice(reason)
        if self.unread() > self.console.buffer_bytes // 2:
            self._transport.abort()  # It does not read: an orderly close would wait for that.
        else:
            self._transport.close()


def _is_http(first: bytes) -> bool:
    line, end, _ = first.partition(b"\n")
    if end:
        return HTTP_LINE.match(line) is not None
    limit = HTTP_PART_BYTES if b" " in line else HTTP_METHOD_BYTES
    return len(line) >= limit and HTTP_PART.fullmatch(line) is not None


_FLOW_OF = {Control.FLOW_NONE: "", Control.FLOW_XON: "xon", Control.FLOW_RTS: "rts"}
_FLOW_VALUE = {flow: value for value, flow in _FLOW_OF.items()}
_FLOW_IN_VALUE = {"": Control.FLOW_IN_NONE, "xon": Control.FLOW_IN_XON, "rts": Control.FLOW_IN_RTS}


class Telnet(Raw):
    """Telnet, with RFC 2217 for who speaks it."""

    escape = True

    def __init__(self, console: Console, admit: Admit, taken: Callable[[Callable[[str], Any]], None]) -> None:
        super().__init__(console, admit, taken)
        self._parser = telnet.Parser()
        both = (telnet.BINARY, telnet.SUPPRESS_GO_AHEAD, telnet.COM_PORT)
        self._options = telnet.Options(ours=(*both, telnet.ECHO), theirs=both)
        self._com_port = False
        self._binary = False
        self._modem_mask = 0xFF  # RFC 2217: as long as the client says nothing else.
        self._line_mask = 0
        self._modem: frozenset[str] | None = None
        self._levels = 0
        self._dtr = self._rts = True  # As Linux sets them at open.
        self._break = False
        self._kept: bytearray | None = None  # What waits for the client's FLOWCONTROL-RESUME.

    def _begin(self) -> None:
        # ECHO: nobody's terminal is to echo by itself; the target does, or does not. SUPPRESS-GO-AHEAD with it: a character
        # at a time. COM-PORT is asked for with DO, to which a client without it says WONT.
        ours = (telnet.ECHO, telnet.SUPPRESS_GO_AHEAD, telnet.BINARY)
        self._transport.write(self._options.ask(ours=ours, theirs=(telnet.BINARY, telnet.COM_PORT)))

    def data_received(self, data: bytes) -> None:
        if not self._hears(data):
            return
        for item in self._parser.feed(data):
            if self._seat is None or self._transport.is_closing():
                return
            if self.unread() > self.console.buffer_bytes + REPLIES_BYTES:
                # It asks and asks, and fetches no answer: each is a few times as long as its question.
                log.info("console of %s: %s does not read and was closed", self.console.name, self._seat.name)
                self._transport.abort()
                return
            match item:
                case telnet.Data(said):
                    self._seat.say(said)
                case telnet.Option():
                    self._option(item)
                case telnet.Subnegotiation(telnet.COM_PORT, payload):
                    request = rfc2217.parse(payload)
                    if request is not None:
                        self._serve(request)
                case telnet.Command(telnet.BREAK):
                    with contextlib.suppress(BridgedError):
                        self._pulse_break(self._seat)
                case telnet.Command(telnet.AYT):
                    self._transport.write(b"\r\n[bridged: yes]\r\n")

    def eof_received(self) -> bool:
        return False  # Telnet knows no half-closed connection; and a program that closes opens again a moment later.

    def _option(self, item: telnet.Option) -> None:
        out, changed = self._options.heard(item)
        if out:
            self._transport.write(out)
        if not changed:
            return
        self._parser.binary = self._options.they_do(telnet.BINARY)
        self._binary = self._options.we_do(telnet.BINARY)
        spoken = self._options.they_do(telnet.COM_PORT) or self._options.we_do(telnet.COM_PORT)
        if spoken and not self._com_port:
            self._com_port = True
            self._tell_modem(self.console.target.modem())
            if not self.console.target.talkable:
                self.suspend(True)

    def _pulse_break(self, seat: Seat) -> None:
        seat.set_break(True)
        asyncio.get_running_loop().call_later(0.25, seat.set_break, False)

    # --- room.Sink ---------------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """``data`` has 0xFF doubled already, for all telnet clients at once."""
        if not self._binary:
            data = telnet.padded(data)
        if self._kept is not None:
            self._kept += data
        else:
            self._transport.write(data)

    def unread(self) -> int:
        kept = 0 if self._kept is None else len(self._kept)
        return self._transport.get_write_buffer_size() + kept

    def notice(self, text: str) -> None:
        if self._com_port:
            self._transport.write(rfc2217.signature(f"bridged: {text}"))
        else:
            super().notice(text)

    def suspend(self, suspended: bool) -> None:
        if self._com_port:
            self._transport.write(rfc2217.answer(Command.FLOWCONTROL_SUSPEND if suspended else Command.FLOWCONTROL_RESUME))

    def look(self, modem: frozenset[str], errors: Counters | None) -> None:
        super().look(modem, errors)
        if not self._com_port or self._transport.is_closing():
            return
        if modem != self._modem:
            self._tell_modem(modem)
        if errors is not None and self._line_mask:
            state = (
                (LineState.OVERRUN if errors.overrun or errors.buf_overrun else 0)
                | (LineState.PARITY if errors.parity else 0)
                | (LineState.FRAMING if errors.frame else 0)
                | (LineState.BREAK if errors.brk else 0)
            ) & self._line_mask
            if state:
                self._transport.write(rfc2217.answer(Command.NOTIFY_LINESTATE, state))

    def _tell_modem(self, modem: frozenset[str]) -> None:
        state = rfc2217.modem_state(modem, self._modem)
        # The mask chooses which changes are told; the first notification tells the levels in any case.
        if self._modem is None or state & self._modem_mask & 0x0F or (state ^ self._levels) & self._modem_mask & 0xF0:
            self._transport.write(rfc2217.answer(Command.NOTIFY_MODEMSTATE, state & self._modem_mask))
        self._modem, self._levels = modem, state & 0xF0

    # --- RFC 2217 ------------------------------------------------------------------------------------------------------

    def _serve(self, request: rfc2217.Request) -> None:
        seat = self._seat
        assert seat is not None
        command, value = request.command, request.value
        match command:
            case Command.SIGNATURE:
                if request.text:
                    log.info("console of %s: %s is %s", self.console.name, seat.name, request.text)
                else:
                    self._transport.write(rfc2217.signature(f"bridged {__version__} {self.console.name}"))
                return
            case Command.NOTIFY_MODEMSTATE:
                state = rfc2217.modem_state(self.console.target.modem(), None)
                self._transport.write(rfc2217.answer(command, state))
                return
            case Command.NOTIFY_LINESTATE:
                self._transport.write(rfc2217.answer(command, 0))
                return
            case Command.FLOWCONTROL_SUSPEND:
                seat.muted = True
                self._kept = bytearray() if self._kept is None else self._kept
                return
            case Command.FLOWCONTROL_RESUME:
                seat.muted = False
                kept, self._kept = self._kept, None
                if kept:
                    self._transport.write(bytes(kept))
                return
            case Command.SET_LINESTATE_MASK:
                self._line_mask = value
            case Command.SET_MODEMSTATE_MASK:
                self._modem_mask = value
            case Command.PURGE_DATA:
                if value not in list(Purge):
                    return
                self._purge(seat, Purge(value))
            case Command.SET_CONTROL:
                control = self._control(seat, value)
                if control is None:
                    return
                value = control
            case _:
                value = self._set(seat, command, value)
        self._transport.write(rfc2217.answer(command, value))

    def _purge(self, seat: Seat, what: Purge) -> None:
        if what in (Purge.RECEIVED, Purge.BOTH) and self._kept:
            self._kept.clear()
        if what in (Purge.UNSENT, Purge.BOTH) and seat.writing:
            self.console.target.purge_output()

    def _set(self, seat: Seat, command: Command, value: int) -> int:
        """Speed or format: what is in force afterwards. 0 asks for it."""
        try:
            match command:
                case Command.SET_BAUDRATE if value:
                    if config.BAUD_LOW <= value <= config.BAUD_HIGH:
                        seat.set_frame(baud=value)
                case Command.SET_DATASIZE if value in rfc2217.DATA_SIZES:
                    seat.set_frame(data_bits=value)
                case Command.SET_PARITY if value in rfc2217.PARITIES:
                    seat.set_frame(parity=rfc2217.PARITIES[value])
                case Command.SET_STOPSIZE if value in rfc2217.STOP_BITS:
                    seat.set_frame(stop_bits=rfc2217.STOP_BITS[value])
        except BridgedError as error:
            log.info("console of %s: %s was refused: %s", self.console.name, seat.name, error.message)
            self.notice(error.message)
        frame = self.console.target.frame
        match command:
            case Command.SET_BAUDRATE:
                return frame.baud
            case Command.SET_DATASIZE:
                return frame.data_bits
            case Command.SET_PARITY:
                return rfc2217.PARITY_VALUES[frame.parity]
            case _:
                # 1.5 stop bits are 2 to us, and were asked for as 3.
                return value if rfc2217.STOP_BITS.get(value) == frame.stop_bits else frame.stop_bits

    def _control(self, seat: Seat, value: int) -> int | None:
        """SET-CONTROL: the value to answer with, None for one that nobody knows."""
        target = self.console.target
        try:
            asked = Control(value)
        except ValueError:
            return None
        try:
            match asked:
                case Control.FLOW_NONE | Control.FLOW_XON | Control.FLOW_RTS:
                    seat.set_frame(flow=_FLOW_OF[asked])
                case Control.BREAK_ON | Control.BREAK_OFF:
                    seat.set_break(asked is Control.BREAK_ON)
                    self._break = asked is Control.BREAK_ON
                case Control.DTR_ON | Control.DTR_OFF:
                    seat.set_signal("dtr", asked is Control.DTR_ON)
                    self._dtr = asked is Control.DTR_ON
                case Control.RTS_ON | Control.RTS_OFF:
                    seat.set_signal("rts", asked is Control.RTS_ON)
                    self._rts = asked is Control.RTS_ON
        except BridgedError as error:
            self.notice(error.message)
        match asked:
            case Control.ASK_BREAK | Control.BREAK_ON | Control.BREAK_OFF:
                return Control.BREAK_ON if self._break else Control.BREAK_OFF
            case Control.ASK_DTR | Control.DTR_ON | Control.DTR_OFF:
                return Control.DTR_ON if self._dtr else Control.DTR_OFF
            case Control.ASK_RTS | Control.RTS_ON | Control.RTS_OFF:
                return Control.RTS_ON if self._rts else Control.RTS_OFF
            case Control.ASK_FLOW | Control.FLOW_NONE | Control.FLOW_XON | Control.FLOW_RTS:
                return _FLOW_VALUE[target.frame.flow]
            case Control.FLOW_DCD | Control.FLOW_DSR:
                return _FLOW_VALUE[target.frame.flow]
            case _:  # Inbound is as outbound: Linux has one setting.
                return _FLOW_IN_VALUE[target.frame.flow]


class Listeners:
    """The listeners of one console."""

    def __init__(self, console: Console, admit: Admit, entrance: Entrance) -> None:
        self.console = console
        self._factory = Telnet if console.settings.protocol == "rfc2217" else Raw
        self._admit, self._entrance = admit, entrance
        self._servers: list[asyncio.Server] = []
        self._path: Path | None = None

    def _accept(self) -> Raw:
        return self._factory(self.console, self._admit, self._entrance.taken)

    async def _serve(self, **where: Any) -> asyncio.Server:
        return await asyncio.get_running_loop().create_server(self._accept, backlog=BACKLOG, **where)

    async def listen_tcp(self, listen: Listen) -> int:
        """Returns the port. Raises ``NotAllowed`` (P7) or ``ConfigError``."""
        found = await self._entrance.open(listen, self._serve)
        self._servers += found
        bound: int = found[0].sockets[0].getsockname()[1]
        return bound

    async def listen_socket(self, sock: socket.socket, scheme: str = "") -> None:
        """A listening socket that was passed in (socket activation); the same rule holds for it."""
        if sock.family == socket.AF_UNIX:
            # Not create_unix_server: from Python 3.13 on it removes the path at its end, and the next daemon has no clients.
            self._servers.append(await self._serve(sock=sock))
        else:
            self._servers.append(await self._entrance.take(sock, scheme, self._serve))

    async def listen_unix(self, path: Path, bind: Callable[[Path, int], socket.socket]) -> None:
        """``bind``: makes a listening socket that never answers to the wrong people. Raises ``ConfigError``."""
        sock = await asyncio.to_thread(bind, path, 0o660)
        self._servers.append(await self._serve(sock=sock))
        self._path = path

    async def close(self) -> None:
        for server in self._servers:
            server.close()
        if self._path is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
