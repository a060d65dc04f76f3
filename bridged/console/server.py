"""The console's own listeners: a TCP port and a Unix socket for each target, raw or telnet with RFC 2217.

``Listeners`` opens them and makes a connection of each client; ``Raw`` and ``Telnet`` are the two wires (``room.Sink``). What a
client may is asked of ``admit``, which the caller gives; who may write at a time is decided in ``room``. Where a listener may
be bound is decided in ``config`` (P7), and asked again here.

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
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridged import __version__, config
from bridged.config.values import wrong_loopback
from bridged.console.room import READ_ONLY, READ_WRITE, Console, Seat
from bridged.errors import BridgedError, ConfigError, NotAllowed
from bridged.protocol import rfc2217, telnet
from bridged.protocol.rfc2217 import Command, Control, LineState, Purge
from bridged.target.uart import Counters

log = logging.getLogger(__name__)

BACKLOG = 128  # A burst of reconnecting clients is taken within this; one console has room for 32 anyway.
# A client whose machine vanished is found within 30 + 3 * 10 s, also while the target says nothing.
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 30, 10, 3
SEND_BUFFER_BYTES = 128 * 1024  # Of the kernel, for one client; by itself it takes 4 MiB for one that does not read.
REPLIES_BYTES = 64 * 1024  # Of telnet's answers that a client has not fetched, beside the bytes of the target.
EOF_LINGER_S = 2.0  # After a client closed its sending side (nc -N): time for the target's answer.


@dataclass(frozen=True, slots=True)
class Admission:
    """What a new client may: ``principal`` is what locks and writers go by."""

    principal: str
    read: bool = True
    write: bool = True


Admit = Callable[[Callable[[str], Any], str], Admission]
"""Given ``get_extra_info`` of the connection and the name of the target."""


def keep_alive(sock: socket.socket) -> None:
    """Have the kernel find clients whose machine or link died without a word."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
    # A client with bytes on their way to it is not asked by keep-alive: these count from the oldest unacknowledged one.
    user_timeout_ms = (KEEPALIVE_IDLE_S + KEEPALIVE_PROBES * KEEPALIVE_INTERVAL_S) * 1000
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, user_timeout_ms)


class Raw(asyncio.Protocol):
    """Bytes and nothing else. Also the part that ``Telnet`` shares with it."""

    escape = False

    def __init__(self, console: Console, admit: Admit) -> None:
        self.console = console
        self._admit = admit
        self._transport: asyncio.Transport
        self._seat: Seat | None = None
        self._linger: asyncio.TimerHandle | None = None

    # --- asyncio ----------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        sock = transport.get_extra_info("socket")
        if sock.family != socket.AF_UNIX:
            keep_alive(sock)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        peer = transport.get_extra_info("peername")
        who = f"{peer[0]}:{peer[1]}" if sock.family != socket.AF_UNIX else "unix"
        rights = self._admit(transport.get_extra_info, self.console.name)
        try:
            if not rights.read:
                raise NotAllowed(f"{who} may not read the console of {self.console.name}")
            self._begin()
            mode = READ_WRITE if rights.write else READ_ONLY
            self._seat = self.console.sit(self, who, rights.principal, mode, escape=self.escape)
        except BridgedError as error:
            log.info("console of %s: %s was turned away: %s", self.console.name, who, error.message)
            self._inline(error.message)
            transport.close()

    def _begin(self) -> None:
        """Before the history is sent."""

    def data_received(self, data: bytes) -> None:
        if self._seat is not None:
            self._seat.say(data)

    def eof_received(self) -> bool:
        """The client will say nothing more, and may listen still; who comes next may write at once."""
        if self._seat is not None:
            self._seat.done_writing()
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

    def look(self, modem: frozenset[str], errors: Counters | None) -> None:
        """Nor to hear of lines."""

    def drop(self, reason: str) -> None:
        self.notice(reason)
        if self.unread() > self.console.buffer_bytes // 2:
            self._transport.abort()  # It does not read: an orderly close would wait for that.
        else:
            self._transport.close()


_FLOW_OF = {Control.FLOW_NONE: "", Control.FLOW_XON: "xon", Control.FLOW_RTS: "rts"}
_FLOW_VALUE = {flow: value for value, flow in _FLOW_OF.items()}
_FLOW_IN_VALUE = {"": Control.FLOW_IN_NONE, "xon": Control.FLOW_IN_XON, "rts": Control.FLOW_IN_RTS}


class Telnet(Raw):
    """Telnet, with RFC 2217 for who speaks it."""

    escape = True

    def __init__(self, console: Console, admit: Admit) -> None:
        super().__init__(console, admit)
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
        for item in self._parser.feed(data):
            if self._seat is None:
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
        if not self._com_port:
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

    def __init__(self, console: Console, admit: Admit) -> None:
        self.console = console
        self._factory = Telnet if console.settings.protocol == "rfc2217" else Raw
        self._admit = admit
        self._servers: list[asyncio.Server] = []
        self._path: Path | None = None

    def _accept(self) -> Raw:
        return self._factory(self.console, self._admit)

    async def listen_tcp(self, listen: str) -> int:
        """Returns the port. Raises ``NotAllowed`` (P7) or ``ConfigError``."""
        if why := wrong_loopback(listen):
            raise NotAllowed(f"The console of {self.console.name} on {listen}: {why}", listen=listen)
        host, _, port = listen.rpartition(":")
        try:
            server = await asyncio.get_running_loop().create_server(self._accept, host.strip("[]"), int(port), backlog=BACKLOG)
        except OSError as error:
            raise ConfigError(f"listening on {listen} failed: {error.strerror or error}", listen=listen) from error
        self._servers.append(server)
        bound: int = server.sockets[0].getsockname()[1]
        return bound

    async def listen_socket(self, sock: socket.socket) -> None:
        """A listening socket that was passed in (socket activation); the same rule holds for it."""
        loop = asyncio.get_running_loop()
        if sock.family == socket.AF_UNIX:
            self._servers.append(await loop.create_unix_server(self._accept, sock=sock))
            return
        host, port = sock.getsockname()[:2]
        listen = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        if why := wrong_loopback(listen):
            raise NotAllowed(f"The console of {self.console.name} on {listen}, which was passed in: {why}", listen=listen)
        self._servers.append(await loop.create_server(self._accept, sock=sock, backlog=BACKLOG))

    async def listen_unix(self, path: Path, bind: Callable[[Path, int], socket.socket]) -> None:
        """``bind``: makes a listening socket that never answers to the wrong people. Raises ``ConfigError``."""
        sock = await asyncio.to_thread(bind, path, 0o660)
        self._servers.append(await asyncio.get_running_loop().create_unix_server(self._accept, sock=sock))
        self._path = path

    async def close(self) -> None:
        for server in self._servers:
            server.close()
        if self._path is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
