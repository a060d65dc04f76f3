"""The grammar of a flight recording: its lines and the words of its notes, for those who write it and those who read it.

A recording is text, a line an entry: seconds from the first entry, then ``> `` bytes to the target, ``< `` bytes from it (none:
nothing came in that time), ``= `` image content sent (address, number of bytes; on the wire a length byte and a checksum are
around them; where a third number is 0, they have entries of their own), or ``# `` a note: what the session did besides, in the
words that ``note_of`` makes.

    0.104211 > 31 CE
    0.105033 < 79

The session process writes entries in binary (``target/board.py``), which turns them into this text; ``trace.py`` says what they
mean. What ``parse`` cannot read becomes an entry of kind ``OTHER``: a recording may have begun in the middle, and what people
send us was in a mail program before. No I/O; nothing here knows a command of the loader.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from bridged.events import Event, PhaseStarted, Retried, Warned
from bridged.protocol.flow import Barrier, Hazard, SetFormat, SetLines

MAX_NOTE_CHARS = 1000  # Of one note; notes quote what a target or a library said.
FRAME_BYTES = 2  # Around the content of a Write Memory: its length and its checksum (AN3155).


class Sign(Enum):
    """The kinds of an entry, by the sign that they have in the text."""

    SENT = ">"
    RECEIVED = "<"
    CONTENT = "="
    NOTE = "#"
    OTHER = "?"


@dataclass(frozen=True, slots=True)
class Entry:
    """One line. ``at``: seconds; a line that says none has that of the line before. ``line`` counts from 1.

    ``data``: bytes of SENT and RECEIVED. ``address``, ``count`` and ``around``: of CONTENT. ``text``: of NOTE and OTHER.
    """

    line: int
    at: float
    sign: Sign
    data: bytes = b""
    address: int = 0
    count: int = 0
    text: str = ""
    around: int = FRAME_BYTES

    @property
    def sent_bytes(self) -> int:
        """Bytes that it put on the wire towards the target."""
        if self.sign is Sign.CONTENT:
            return self.count + self.around
        return len(self.data) if self.sign is Sign.SENT else 0

    @property
    def received_bytes(self) -> int:
        return len(self.data) if self.sign is Sign.RECEIVED else 0


_LINE = re.compile(r"[ \t]*(?:([0-9]{1,9}\.[0-9]{1,9})[ \t]+)?([<>=#])(?: (.*))?")
_BYTES = re.compile(r"[0-9A-Fa-f]{2}(?: [0-9A-Fa-f]{2})*")
_CONTENT = re.compile(r"0x([0-9A-Fa-f]{1,8}) ([0-9]{1,6})( 0)?")


def parse(text: str) -> list[Entry]:
    """Every line that is not blank, in order. Never raises."""
    found: list[Entry] = []
    at = 0.0
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        entry = _parsed(number, at, line.rstrip("\r"))
        at = entry.at
        found.append(entry)
    return found


def _parsed(number: int, at: float, line: str) -> Entry:
    match = _LINE.fullmatch(line)
    if match is None:
        return Entry(number, at, Sign.OTHER, text=line)
    at = float(match[1]) if match[1] else at
    sign, rest = Sign(match[2]), (match[3] or "").rstrip()
    if sign is Sign.NOTE:
        return Entry(number, at, sign, text=rest)
    if sign is Sign.CONTENT:
        if content := _CONTENT.fullmatch(rest):
            around = 0 if content[3] else FRAME_BYTES
            return Entry(number, at, sign, address=int(content[1], 16), count=int(content[2]), around=around)
    elif _BYTES.fullmatch(rest) or (not rest and sign is Sign.RECEIVED):
        return Entry(number, at, sign, bytes.fromhex(rest))
    return Entry(number, at, Sign.OTHER, text=line)


# --- notes --------------------------------------------------------------------------------------------------------

HAZARD_OVER = "hazard over"
JOURNALED = "journaled"
DONE = "end"


def note_of(what: SetLines | SetFormat | Hazard | Barrier | Event) -> str:
    """The note for a step or an event; empty for one that leaves none."""
    match what:
        case SetLines():
            return f"lines reset={what.reset} boot0={what.boot0} power={what.power}"
        case SetFormat():
            return f"format {what.baud} 8{what.parity}{what.stop_bits}"
        case Hazard():
            return f"hazard {what.seconds:.3f} s" if what.seconds else HAZARD_OVER
        case Barrier():
            return f"barrier {what.state}"
        case PhaseStarted():
            return f"phase {what.phase}"
        case Retried():
            return one_line(f"retry {what.step}: {what.reason}")
        case Warned():
            return one_line(f"warning {what.code}: {what.text}")
        case _:
            return ""


def counters_note(*, frame: int, parity: int, overrun: int, breaks: int) -> str:
    """What the serial driver counted during the session."""
    return f"counters frame={frame} parity={parity} overrun={overrun} break={breaks}"


def one_line(text: str) -> str:
    """What others wrote into a message must not look like an entry of its own."""
    return " ".join(text.split())[:MAX_NOTE_CHARS]
