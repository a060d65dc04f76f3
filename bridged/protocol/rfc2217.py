"""RFC 2217, Telnet Com Port Control Option: the payload of its subnegotiations, as bytes to meaning and back. No I/O.

A client sends a command with a value, the access server (we) answers with the command plus 100 and the value that is in force.
``parse`` never raises: what is too short, too long or unknown is ``None``, and is not answered. Numbers are big-endian.

``Control`` has the values of SET-CONTROL, ``ModemState`` and ``LineState`` the bits of the notifications. Section numbers are
those of RFC 2217. Names are the RFC's.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag

from bridged.protocol import telnet

SERVER = 100  # Added to a command that the access server sends.
SIGNATURE_CHARS = 200  # A name and a version; what we say with it is one sentence.


class Command(IntEnum):
    """Section 3, as the client sends them."""

    SIGNATURE = 0
    SET_BAUDRATE = 1
    SET_DATASIZE = 2
    SET_PARITY = 3
    SET_STOPSIZE = 4
    SET_CONTROL = 5
    NOTIFY_LINESTATE = 6
    NOTIFY_MODEMSTATE = 7
    FLOWCONTROL_SUSPEND = 8
    FLOWCONTROL_RESUME = 9
    SET_LINESTATE_MASK = 10
    SET_MODEMSTATE_MASK = 11
    PURGE_DATA = 12


class Control(IntEnum):
    """SET-CONTROL."""

    ASK_FLOW = 0
    FLOW_NONE = 1
    FLOW_XON = 2
    FLOW_RTS = 3
    ASK_BREAK = 4
    BREAK_ON = 5
    BREAK_OFF = 6
    ASK_DTR = 7
    DTR_ON = 8
    DTR_OFF = 9
    ASK_RTS = 10
    RTS_ON = 11
    RTS_OFF = 12
    ASK_FLOW_IN = 13
    FLOW_IN_NONE = 14
    FLOW_IN_XON = 15
    FLOW_IN_RTS = 16
    FLOW_DCD = 17
    FLOW_IN_DTR = 18
    FLOW_DSR = 19


class Purge(IntEnum):
    RECEIVED = 1
    UNSENT = 2
    BOTH = 3


class ModemState(IntFlag):
    """The upper four are levels, the lower four what changed since the last notification (RI: its end)."""

    CTS_CHANGED = 1
    DSR_CHANGED = 2
    RI_ENDED = 4
    CD_CHANGED = 8
    CTS = 16
    DSR = 32
    RI = 64
    CD = 128


class LineState(IntFlag):
    DATA_READY = 1
    OVERRUN = 2
    PARITY = 4
    FRAMING = 8
    BREAK = 16
    HOLDING_EMPTY = 32
    SHIFT_EMPTY = 64
    TIMEOUT = 128


PARITIES = {1: "N", 2: "O", 3: "E", 4: "M", 5: "S"}
PARITY_VALUES = {name: value for value, name in PARITIES.items()}
STOP_BITS = {1: 1, 2: 2, 3: 2}  # 1.5 stop bits are what a UART makes of 2 with 5 data bits; elsewhere there are none.
DATA_SIZES = (5, 6, 7, 8)

_VALUE_BYTES = {
    Command.SET_BAUDRATE: 4,
    Command.SET_DATASIZE: 1,
    Command.SET_PARITY: 1,
    Command.SET_STOPSIZE: 1,
    Command.SET_CONTROL: 1,
    Command.SET_LINESTATE_MASK: 1,
    Command.SET_MODEMSTATE_MASK: 1,
    Command.PURGE_DATA: 1,
    Command.FLOWCONTROL_SUSPEND: 0,
    Command.FLOWCONTROL_RESUME: 0,
}


@dataclass(frozen=True, slots=True)
class Request:
    """One command of a client. ``value``: its number; of SIGNATURE the ``text``, empty where the client asks for ours.

    NOTIFY-LINESTATE and NOTIFY-MODEMSTATE from a client are questions (the RFC gives them no meaning; clients poll with them).
    """

    command: Command
    value: int = 0
    text: str = ""


def parse(payload: bytes) -> Request | None:
    """The payload of a COM-PORT-OPTION subnegotiation. None: nothing that can be understood."""
    if not payload:
        return None
    try:
        command = Command(payload[0])
    except ValueError:
        return None
    rest = payload[1:]
    if command is Command.SIGNATURE:
        text = rest[:SIGNATURE_CHARS].decode("ascii", "replace")
        return Request(command, text="".join(c if c.isprintable() else "?" for c in text))
    if command in (Command.NOTIFY_LINESTATE, Command.NOTIFY_MODEMSTATE):
        return Request(command, rest[0] if rest else 0)
    if len(rest) != _VALUE_BYTES[command]:
        return None
    return Request(command, int.from_bytes(rest, "big"))


def answer(command: Command, value: int | None = None) -> bytes:
    """A whole subnegotiation of the access server: an answer or a notification. ``value`` None: it has none."""
    width = _VALUE_BYTES.get(command, 1)
    body = b"" if value is None else value.to_bytes(width, "big")
    return telnet.subnegotiation(telnet.COM_PORT, bytes((command + SERVER,)) + body)


def signature(text: str) -> bytes:
    """Who we are, or what there is to say: clients show it or drop it; it never gets among the data."""
    shown = text[:SIGNATURE_CHARS].encode("ascii", "replace")
    return telnet.subnegotiation(telnet.COM_PORT, bytes((Command.SIGNATURE + SERVER,)) + shown)


def modem_state(now: frozenset[str], before: frozenset[str] | None) -> int:
    """The value of NOTIFY-MODEMSTATE; ``before`` None: nothing was told yet, so nothing changed."""
    state = 0
    for name, level, changed in (
        ("cts", ModemState.CTS, ModemState.CTS_CHANGED),
        ("dsr", ModemState.DSR, ModemState.DSR_CHANGED),
        ("ri", ModemState.RI, ModemState.RI_ENDED),
        ("cd", ModemState.CD, ModemState.CD_CHANGED),
    ):
        state |= level if name in now else 0
        if before is not None and (name in now) != (name in before) and not (name == "ri" and name in now):
            state |= changed
    return state
