"""What a decoded recording consists of: events, their stages, and how a stage was answered. See ``trace.py``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from bridged.protocol.an3155 import looks_like_text
from bridged.protocol.recording import Entry

SHOWN_BYTES = 24  # Of what nobody expected.


class Kind(StrEnum):
    COMMAND = "command"
    FRAME = "frame"  # of the second-stage loader
    BLOCK = "block"  # of XMODEM
    SYNC = "sync"
    BYTES = "bytes"
    SESSION = "session"
    PHASE = "phase"
    LINES = "lines"
    FORMAT = "format"
    HAZARD = "hazard"
    BARRIER = "barrier"
    RETRY = "retry"
    WARNING = "warning"
    COUNTERS = "counters"
    END = "end"
    NOTE = "note"
    UNREADABLE = "unreadable"


class Answer(StrEnum):
    ACK = "ACK"
    NACK = "NACK"
    SILENCE = "silence"
    GARBAGE = "garbage"
    MISSING = "not recorded"


@dataclass(frozen=True, slots=True)
class Stage:
    """One frame and its answer. ``silent_s``: how long was waited in vain. ``came``: the first bytes, where it is no ACK.

    Of a frame of the second-stage loader, many of which are under way at once: ``answer_s`` runs from when it could have begun
    with it (all of it was there, and the one before was answered), ``target_s`` is what of that the wire was idle.
    """

    name: str
    at: float
    sent_bytes: int
    answer: Answer
    answer_s: float | None = None
    target_s: float | None = None
    gap_s: float | None = None
    silent_s: float | None = None
    came: bytes = b""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened. ``seconds``: until its last entry. ``flags``: what a person should look at, in words.

    ``title`` and ``detail`` say it for people; ``address``, ``length`` and ``opcode`` are there where it is a command or a
    frame that has them; of a block of XMODEM the address is its place in what is sent. ``entries``: the lines of the recording
    that it was made from.
    """

    kind: Kind
    at: float
    seconds: float
    title: str
    detail: str = ""
    opcode: int | None = None
    address: int | None = None
    length: int | None = None
    stages: tuple[Stage, ...] = ()
    flags: tuple[str, ...] = ()
    entries: tuple[Entry, ...] = ()

    @property
    def answer(self) -> Answer | None:
        """How its last stage was answered."""
        return self.stages[-1].answer if self.stages else None

    @property
    def sent_bytes(self) -> int:
        return sum(entry.sent_bytes for entry in self.entries)

    @property
    def received_bytes(self) -> int:
        return sum(entry.received_bytes for entry in self.entries)

    @property
    def end(self) -> int | None:
        """Address after the last byte that it is about."""
        return None if self.address is None or self.length is None else self.address + self.length


def shown(data: bytes) -> str:
    text = data[:SHOWN_BYTES].hex(" ").upper()
    return f"{text} and {len(data) - SHOWN_BYTES} more" if len(data) > SHOWN_BYTES else text


def said(data: bytes) -> str:
    """What was received, as text where it is text."""
    bare = data.strip(b"\x00\x7f")
    return repr(bare[:200].decode("ascii", "replace").strip()) if looks_like_text(bare) else shown(data)
