"""A flight recording explained: from its entries to commands, stages and answers, with how long each side took.

``decode`` reads the text of a recording (``recording.py``) and gives a ``Recording``: one ``Event`` for each command of the
loader (AN3155), each synchronisation, each frame of the second-stage loader (``trace_stub.py``), each block of XMODEM, each
note of the session, and for whatever else went over the wire. ``trace_text.py`` shows them.

Invariants:

- Any text is decoded, without an exception. A recording may begin in the middle (the recorder gives up its older half) and end
  there (its writer was killed); what makes no sense is shown as bytes that nothing explains, never guessed at.
- Every entry belongs to exactly one event, so no byte is lost or told twice.
- What is *not* known is left out (``None``): a missing answer is told apart from silence, which was waited for.

Times: an answer's ``answer_s`` runs from the first byte sent to the first byte received. The bytes need their time on the wire;
what is left (``target_s``) is the target at work, and its adapter: one with a latency timer adds up to 16 ms to each answer.
``gap_s`` is the host's: from the last byte received to the next one sent. Standard library only; the command line imports this.

How a stage looks, the decoder that follows it and the words for it are one file: a new command needs all three.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from statistics import median

from bridged.protocol import xmodem
from bridged.protocol.an3155 import ACK, NACK, SYNC, Command, MassErase, checksum
from bridged.protocol.recording import DONE, HAZARD_OVER, JOURNALED, Entry, Sign, parse
from bridged.protocol.trace_event import SHOWN_BYTES, Answer, Event, Kind, Stage, said, shown
from bridged.protocol.trace_stub import Frames

HOST_LATE_S = 0.005  # A gap that one notices among thousands: the usual one is 0.1 ms, on the smallest gateway 0.5 ms.
OUTLIER_SAMPLES = 8  # Before that nobody knows what is usual for a stage.
OUTLIER_FACTOR, OUTLIER_S = 5.0, 0.010  # An answer is slow when it takes five times the usual and 10 ms more than it.
UNREADABLE_LINES = 1000  # Told as one event.


@dataclass(frozen=True, slots=True)
class Sums:
    """Where the time went, in seconds. ``rest_s``: pauses, lines, the journal; what is nobody's delay."""

    total_s: float
    wire_s: float
    target_s: float
    silent_s: float
    host_s: float

    @property
    def rest_s(self) -> float:
        return max(0.0, self.total_s - self.wire_s - self.target_s - self.silent_s - self.host_s)


@dataclass(frozen=True, slots=True)
class Recording:
    """``whole``: it begins with the start of a session. ``ended``: it has the end of one, which a killed one has not."""

    events: tuple[Event, ...]
    sums: Sums
    whole: bool
    ended: bool
    entries: tuple[Entry, ...] = field(repr=False, default=())

    @property
    def flagged(self) -> list[Event]:
        return [event for event in self.events if event.flags]


def decode(text: str) -> Recording:
    """What happened in a recording. Never raises."""
    entries = parse(text)
    decoder = _Decoder(entries)
    events = tuple(_with_outliers(sorted(decoder.run(), key=lambda event: event.entries[0].line)))
    total = max(0.0, entries[-1].at - entries[0].at) if entries else 0.0
    stages = [stage for event in events for stage in event.stages]
    sums = Sums(
        total,
        decoder.wire_s,
        sum(stage.target_s or 0.0 for stage in stages),
        sum(stage.silent_s or 0.0 for stage in stages),
        sum(stage.gap_s or 0.0 for stage in stages),
    )
    whole = bool(events) and events[0].kind is Kind.SESSION
    ended = any(event.kind is Kind.END for event in events)
    return Recording(events, sums, whole, ended, tuple(entries))


def _with_outliers(events: list[Event]) -> Iterator[Event]:
    """Flags the answers that took much longer than the same stage usually does."""
    times: dict[tuple[str, str], list[float]] = {}
    for event in events:
        for stage in event.stages:
            if stage.target_s is not None and event.kind is not Kind.FRAME:  # Which wait for each other.
                times.setdefault((event.title, stage.name), []).append(stage.target_s)
    usual = {key: median(found) for key, found in times.items() if len(found) >= OUTLIER_SAMPLES}
    for event in events:
        slow = []
        for stage in event.stages:
            middle = usual.get((event.title, stage.name))
            if middle is not None and (stage.target_s or 0.0) > max(OUTLIER_FACTOR * middle, middle + OUTLIER_S):
                slow.append(f"slow answer ({stage.name}): {stage.target_s:.4f} s, usually {middle:.4f} s")
        yield replace(event, flags=(*event.flags, *slow)) if slow else event


# --- what the commands look like ----------------------------------------------------------------------------------


class _Shape(Enum):
    """How the frame of a stage looks (AN3155)."""

    WORD = "four bytes and their XOR"
    LENGTH = "a byte and its complement"
    BLOCK = "length, content, XOR"
    LIST = "a list with its XOR, or FF 00"

    def fits(self, entry: Entry) -> bool:
        size = len(entry.data)
        if self is _Shape.BLOCK and entry.sign is Sign.CONTENT:
            return True
        if entry.sign is not Sign.SENT:
            return False
        match self:
            case _Shape.WORD:
                return size == 5
            case _Shape.LENGTH:
                return size == 2
            case _Shape.BLOCK:
                return size > 2 and size == entry.data[0] + 3
            case _Shape.LIST:
                return size > 2 or entry.data == b"\xff\x00"

    def intact(self, entry: Entry) -> bool:
        """Whether its checksum is right."""
        if entry.sign is Sign.CONTENT or entry.data == b"\xff\x00":
            return True
        return checksum(entry.data) == (0xFF if self is _Shape.LENGTH else 0)


_ADDRESS = ("address", _Shape.WORD)
_STAGES: dict[Command, tuple[tuple[str, _Shape], ...]] = {
    Command.GET: (),
    Command.GET_VERSION: (),
    Command.GET_ID: (),
    Command.READ_MEMORY: (_ADDRESS, ("length", _Shape.LENGTH)),
    Command.GO: (_ADDRESS,),
    Command.WRITE_MEMORY: (_ADDRESS, ("data", _Shape.BLOCK)),
    Command.ERASE: (("page list", _Shape.LIST),),
    Command.EXTENDED_ERASE: (("page list", _Shape.LIST),),
    Command.SPECIAL: (("sub-code", _Shape.LIST), ("data", _Shape.LIST)),
    Command.EXTENDED_SPECIAL: (("sub-code", _Shape.LIST), ("first data", _Shape.LIST), ("second data", _Shape.LIST)),
    Command.WRITE_PROTECT: (("sector list", _Shape.LIST),),
    Command.WRITE_UNPROTECT: (),
    Command.READOUT_PROTECT: (),
    Command.READOUT_UNPROTECT: (),
    Command.GET_CHECKSUM: (
        _ADDRESS,
        ("size", _Shape.WORD),
        ("polynomial", _Shape.WORD),
        ("initial value", _Shape.WORD),
    ),
}
_OPCODES = frozenset(int(command) for command in Command)
_SPECIAL_ERASE = {what.to_bytes(2, "big"): what.name.lower().replace("_", " ") for what in MassErase}


def _opcode(entry: Entry) -> Command | None:
    data = entry.data
    if entry.sign is Sign.SENT and len(data) == 2 and data[0] ^ data[1] == 0xFF and data[0] in _OPCODES:
        return Command(data[0])
    return None


# --- the decoder --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Frame:
    """A frame on its way to be a stage: what was sent, and what came until something else happened."""

    name: str
    sent: Entry
    gap_s: float | None
    frame_s: float
    heard: list[Entry] = field(default_factory=list)
    answers: tuple[int, int] = (ACK, NACK)

    @property
    def got(self) -> bytes:
        return b"".join(entry.data for entry in self.heard)

    @property
    def answer(self) -> Answer:
        got = self.got
        if got:
            good, bad = self.answers
            return {good: Answer.ACK, bad: Answer.NACK}.get(got[0], Answer.GARBAGE)
        return Answer.SILENCE if self.heard else Answer.MISSING

    def stage(self) -> Stage:
        answer, got = self.answer, self.got
        first = next((entry for entry in self.heard if entry.data), None)
        answer_s = target_s = silent_s = None
        if first is not None:
            answer_s = max(0.0, first.at - self.sent.at)
            target_s = max(0.0, answer_s - (self.sent.sent_bytes + 1) * self.frame_s)
        elif self.heard:
            silent_s = max(0.0, self.heard[-1].at - self.sent.at - self.sent.sent_bytes * self.frame_s)
        came = b"" if answer is Answer.ACK else got[:SHOWN_BYTES]
        at = self.sent.at
        return Stage(self.name, at, self.sent.sent_bytes, answer, answer_s, target_s, self.gap_s, silent_s, came)


@dataclass(slots=True)
class _Open:
    """What is being put together: a command, a synchronisation, a block of XMODEM (``command`` None) or bytes that nothing
    explains."""

    kind: Kind
    command: Command | None = None
    frames: list[_Frame] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)


class _Decoder:
    """Walks through the entries once. ``wire_s``: the time that all bytes were on the wire, at the rate of their time."""

    def __init__(self, entries: list[Entry]) -> None:
        self._entries = entries
        self._done: list[Event] = []
        self._open: _Open | None = None
        self._frame_s = 11 / 115200
        self._barrier_at: float | None = None
        self._frames = Frames(self._done.append)
        self._sent_blocks = _Blocks()
        self.wire_s = 0.0

    def run(self) -> list[Event]:
        before: Entry | None = None
        for entry in self._entries:
            self.wire_s += (entry.sent_bytes + entry.received_bytes) * self._frame_s
            if entry.sign is Sign.NOTE:
                self._note(entry)
            elif entry.sign is Sign.OTHER:
                self._close()
                self._unreadable(entry)
            elif entry.sign is Sign.RECEIVED:
                self._received(entry)
            else:
                self._sent(entry, before)
            before = entry
        self._close()
        self._frames.end()
        return self._done

    # --- bytes ---

    def _sent(self, entry: Entry, before: Entry | None) -> None:
        gap_s = None
        if before is not None and (before.sign not in (Sign.NOTE, Sign.OTHER) or before.text.startswith("hazard")):
            gap_s = max(0.0, entry.at - before.at)
        if self._frames.sent(entry, self._frame_s, gap_s):
            self._close()
            return
        now = self._open
        if now is not None and now.command is not None and (name := self._expected(now, entry)):
            self._add(now, name, entry, gap_s)
        elif (command := _opcode(entry)) is not None:
            self._begin(_Open(Kind.COMMAND, command), "opcode", entry, gap_s)
        elif entry.sign is Sign.CONTENT:
            # Only Write Memory sends content; its first stages were in the half that was given up.
            lone = _Open(Kind.COMMAND, Command.WRITE_MEMORY, flags=["its beginning was not recorded"])
            self._begin(lone, "data", entry, gap_s)
        elif self._sent_blocks.fits(entry):
            self._begin(_Open(Kind.BLOCK), self._sent_blocks.name(entry), entry, gap_s)
            self._open.frames[-1].answers = _XMODEM_ANSWERS  # type: ignore[union-attr]
        elif entry.data == bytes([SYNC]):
            self._begin(_Open(Kind.SYNC), "sync", entry, gap_s)
        elif now is not None and now.kind is Kind.BYTES and now.frames and now.frames[-1].sent.data == entry.data:
            if now.frames[-1].got:
                self._begin(_Open(Kind.BYTES), "bytes", entry, gap_s)
            else:
                self._add(now, "bytes", entry, gap_s)
        else:
            self._begin(_Open(Kind.BYTES), "bytes", entry, gap_s)

    def _expected(self, now: _Open, entry: Entry) -> str:
        """The name of the stage that ``entry`` is in the command at hand; empty where it is not one."""
        assert now.command is not None
        if now.frames[-1].answer is not Answer.ACK or now.frames[0].name != "opcode":
            return ""
        stages = _STAGES[now.command]
        if len(now.frames) > len(stages):
            return ""
        name, shape = stages[len(now.frames) - 1]
        if not shape.fits(entry):
            return ""
        if not shape.intact(entry):
            now.flags.append(f"wrong checksum sent ({name})")
        return name

    def _begin(self, new: _Open, name: str, entry: Entry, gap_s: float | None) -> None:
        self._close()
        self._open = new
        self._add(new, name, entry, gap_s)

    def _add(self, now: _Open, name: str, entry: Entry, gap_s: float | None) -> None:
        now.frames.append(_Frame(name, entry, gap_s, self._frame_s))
        now.entries.append(entry)

    def _received(self, entry: Entry) -> None:
        if (self._open is None or not self._open.frames) and self._frames.received(entry, self._frame_s):
            self._close()
            return
        if self._open is None:
            self._open = _Open(Kind.BYTES)
        if self._open.frames:
            self._open.frames[-1].heard.append(entry)
        self._open.entries.append(entry)

    # --- notes ---

    def _note(self, entry: Entry) -> None:
        word, _, rest = entry.text.partition(" ")
        if word != "hazard":  # Which is declared in the middle of a command.
            self._close()
        if word == "lines":
            self._frames.end()  # Whatever ran in RAM does so no more.
            self._sent_blocks = _Blocks()
        kind, title, flags = _NOTES.get(word, Kind.NOTE), rest, []
        if word == JOURNALED:
            kind = Kind.BARRIER
        seconds = 0.0
        match kind:
            case Kind.LINES:
                title = _lines_text(rest)
            case Kind.FORMAT:
                title = self._format(rest)
            case Kind.HAZARD:
                over = entry.text == HAZARD_OVER
                title = "the hazard is over" if over else f"nobody may reset the target for {rest}"
            case Kind.BARRIER if word == JOURNALED:
                title = f"the journal has {rest} on disk"
                seconds = max(0.0, entry.at - self._barrier_at) if self._barrier_at is not None else 0.0
            case Kind.BARRIER:
                self._barrier_at = entry.at
                title = f"waiting until the journal has {rest} on disk"
            case Kind.RETRY | Kind.WARNING:
                flags = [word]
            case Kind.COUNTERS:
                flags = [f"{count} {name} errors" for name, count in _COUNT.findall(rest) if count.strip("0")]
                title = "the driver counted " + (rest.replace("=", " ") or "nothing")
            case Kind.END:
                flags = ["the session failed"] if rest else []
                title = rest or "the session ended well"
            case Kind.NOTE:
                title = entry.text
        self._done.append(Event(kind, entry.at, seconds, title, flags=tuple(flags), entries=(entry,)))

    def _format(self, rest: str) -> str:
        match = re.fullmatch(r"([1-9][0-9]{1,8}) 8([NEO])([12])", rest)
        if match is None:
            return rest
        baud, stop_bits = int(match[1]), int(match[3])
        self._frame_s = (9 + stop_bits + (match[2] != "N")) / baud
        return f"{baud} baud, 8{match[2]}{stop_bits}"

    def _unreadable(self, entry: Entry) -> None:
        last = self._done[-1] if self._done else None
        if last is not None and last.kind is Kind.UNREADABLE and len(last.entries) < UNREADABLE_LINES:
            entries = (*last.entries, entry)
            self._done[-1] = replace(last, title=f"{len(entries)} lines that cannot be read", entries=entries)
            return
        flags = ("unreadable",)
        self._done.append(Event(Kind.UNREADABLE, entry.at, 0.0, "a line that cannot be read", flags=flags, entries=(entry,)))

    # --- putting an event together ---

    def _close(self) -> None:
        now, self._open = self._open, None
        if now is None:
            return
        first, last = now.entries[0].at, now.entries[-1].at
        stages = tuple(frame.stage() for frame in now.frames)
        make = {Kind.COMMAND: _command, Kind.SYNC: _synchronisation, Kind.BLOCK: self._sent_blocks.event}.get(now.kind, _bytes)
        event = make(now, Event(now.kind, first, max(0.0, last - first), "", stages=stages, entries=tuple(now.entries)))
        late = [
            f"the host took {stage.gap_s:.4f} s before {stage.name}"
            for stage in stages
            if stage.gap_s is not None and stage.gap_s > HOST_LATE_S
        ]
        self._done.append(replace(event, flags=(*now.flags, *event.flags, *late)))


_NOTES = {
    "session": Kind.SESSION,
    "phase": Kind.PHASE,
    "lines": Kind.LINES,
    "format": Kind.FORMAT,
    "hazard": Kind.HAZARD,
    "barrier": Kind.BARRIER,
    "retry": Kind.RETRY,
    "warning": Kind.WARNING,
    "counters": Kind.COUNTERS,
    DONE: Kind.END,
}
_COUNT = re.compile(r"([a-z]+)=([0-9]+)")
_LEVELS = {
    "reset=True": "NRST low: in reset",
    "reset=False": "NRST released",
    "boot0=True": "BOOT0 high: loader",
    "boot0=False": "BOOT0 low: application",
    "power=True": "power on",
    "power=False": "power off",
}


def _lines_text(rest: str) -> str:
    return ", ".join(_LEVELS.get(word, word) for word in rest.split() if not word.endswith("=None")) or "no line moves"


def _trouble(frame: _Frame) -> list[str]:
    """What is wrong with the answer of one stage."""
    got = frame.got
    match frame.answer:
        case Answer.ACK:
            return []
        case Answer.NACK:
            more = f", then {said(got[1:])}" if got[1:].strip(bytes([NACK])) else f" {len(got)} times" if len(got) > 1 else ""
            return [f"NACK ({frame.name}){more}"]
        case Answer.SILENCE:
            seconds = frame.stage().silent_s or 0.0
            return [f"silence of {seconds:.3f} s ({frame.name})"]
        case Answer.GARBAGE:
            return [f"{said(got)} came instead of an ACK ({frame.name})"]
        case Answer.MISSING:
            return [f"no answer was recorded ({frame.name})"]


def _command(now: _Open, event: Event) -> Event:
    assert now.command is not None
    command, frames = now.command, now.frames
    flags = [text for frame in frames for text in _trouble(frame)]
    by_name = {frame.name: frame for frame in frames}
    last = frames[-1]
    complete = len(frames) == len(_STAGES[command]) + 1 and last.answer is Answer.ACK
    if not complete and not flags and not now.flags:
        flags.append(f"broken off after {last.name}")
    for frame in frames[:-1] if complete else frames:
        if frame.answer is Answer.ACK and len(frame.got) > 1:
            flags.append(f"{said(frame.got[1:])} came after the ACK ({frame.name})")
    address = length = None
    if (stage := by_name.get("address")) is not None:
        address = int.from_bytes(stage.sent.data[:4], "big")
    detail = ""
    if (block := by_name.get("data")) is not None and command is Command.WRITE_MEMORY:
        length = block.sent.count if block.sent.sign is Sign.CONTENT else block.sent.data[0] + 1
        if block.sent.sign is Sign.CONTENT:
            if address is not None and address != block.sent.address:
                flags.append(f"content for {block.sent.address:#010x} was sent")
            address = block.sent.address if address is None else address
    elif "length" in by_name:
        length = by_name["length"].sent.data[0] + 1
    elif "size" in by_name:
        length = 4 * int.from_bytes(by_name["size"].sent.data[:4], "big")
    elif "page list" in by_name:
        detail = _pages(command, by_name["page list"].sent.data)
    if address is not None:
        detail = f"{address:#010x}" + (f", {length} byte{'' if length == 1 else 's'}" if length is not None else "")
    if complete:
        told, wrong = _payload(command, last.got[1:], length)
        detail = f"{detail}: {told}" if told and detail else detail or told
        flags += wrong
    return replace(
        event,
        title=command.title,
        detail=detail,
        opcode=int(command),
        address=address,
        length=length,
        flags=tuple(flags),
    )


def _pages(command: Command, data: bytes) -> str:
    if command is Command.ERASE:
        pages = [] if data == b"\xff\x00" else list(data[1:-1])
        return _numbers(pages) if pages else "all"
    if data[:2] in _SPECIAL_ERASE:
        return _SPECIAL_ERASE[data[:2]]
    return _numbers([int.from_bytes(data[at : at + 2], "big") for at in range(2, len(data) - 2, 2)])


def _numbers(pages: list[int]) -> str:
    """``sectors 0..3, 7``."""
    runs: list[list[int]] = []
    for page in pages:
        if runs and page == runs[-1][1] + 1:
            runs[-1][1] = page
        else:
            runs.append([page, page])
    text = ", ".join(f"{a}" if a == b else f"{a}..{b}" for a, b in runs[:16]) + (", ..." if len(runs) > 16 else "")
    return f"sector{'' if len(pages) == 1 else 's'} {text}"


def _payload(command: Command, data: bytes, length: int | None) -> tuple[str, list[str]]:
    """What came after the last ACK, in words, and what is wrong with it."""
    end = bytes([ACK])
    match command:
        case Command.READ_MEMORY:
            return "", _size(data, length or 0)
        case Command.GET:
            version = f"protocol {data[1] >> 4}.{data[1] & 15}" if len(data) > 1 else ""
            codes = " ".join(f"{code:02X}" for code in data[2:-1])
            return f"{version}, commands {codes}" if codes else version, _counted(data)
        case Command.GET_ID:
            return (f"product id 0x{data[1:-1].hex()}" if len(data) > 2 else ""), _counted(data)
        case Command.GET_VERSION:
            version = f"protocol {data[0] >> 4}.{data[0] & 15}" if data else ""
            return version, _size(data, 4) or ([] if data.endswith(end) else ["no ACK at the end"])
        case Command.GET_CHECKSUM:
            if len(data) != 6 or data[:1] != end:
                return "", [*_size(data, 6), *([] if data[:1] in (end, b"") else ["no ACK before the checksum"])]
            return f"CRC 0x{data[1:5].hex()}", ["the answer's checksum is wrong"] if checksum(data[1:]) else []
        case Command.WRITE_UNPROTECT | Command.READOUT_PROTECT | Command.READOUT_UNPROTECT:
            return "", [] if data == end else [f"{said(data) or 'nothing'} came instead of a second ACK"]
        case Command.SPECIAL | Command.EXTENDED_SPECIAL:
            return shown(data), []
        case _:
            return "", [f"{said(data)} came after the ACK"] if data else []


def _size(data: bytes, expected: int) -> list[str]:
    if len(data) < expected:
        return [f"{len(data)} of {expected} bytes came"]
    return [f"{len(data) - expected} bytes more came than expected"] if len(data) > expected else []


def _counted(data: bytes) -> list[str]:
    """A count of bytes less one, the bytes, an ACK."""
    if not data:
        return ["no byte came after the ACK"]
    announced = data[0] + 3
    if len(data) != announced:
        return [f"{len(data)} bytes came, its count announced {announced}"]
    return [] if data[-1] == ACK else ["no ACK at the end"]


_XMODEM_ANSWERS = int(xmodem.Byte.ACK), int(xmodem.Byte.NAK)


class _Blocks:
    """A transfer by XMODEM: which block comes next, and where it belongs in what is sent."""

    def __init__(self) -> None:
        self.number, self.at, self.size = 1, 0, 0

    def fits(self, entry: Entry) -> bool:
        """Whether it is a block, or the end of a transfer that has begun."""
        data = entry.data
        if entry.sign is not Sign.SENT or not data:
            return False
        if data == bytes([xmodem.Byte.EOT]):
            return self.at + self.size > 0
        size = {xmodem.Byte.SOH: xmodem.SMALL, xmodem.Byte.STX: xmodem.LARGE}.get(data[0], 0)  # type: ignore[call-overload]
        return bool(size) and len(data) in (size + 4, size + 5) and data[1] ^ data[2] == 0xFF

    def name(self, entry: Entry) -> str:
        return "end" if len(entry.data) == 1 else "block"

    def event(self, now: _Open, event: Event) -> Event:
        frame = now.frames[-1]
        data, flags = frame.sent.data, _trouble(frame)
        if len(data) == 1:
            return replace(event, title="XMODEM end", flags=tuple(flags))
        size = xmodem.LARGE if data[0] == xmodem.Byte.STX else xmodem.SMALL
        crc = len(data) == size + 5
        if xmodem.frame(data[1], data[3 : 3 + size], crc=crc) != data:
            flags.append("wrong checksum sent")
        if self.size and data[1] == (self.number + 1) & 0xFF:
            self.at += self.size
        elif self.size and data[1] != self.number:
            flags.append(f"block {data[1]} came after {self.number}")
        self.number, self.size = data[1], size
        detail = f"number {data[1]}, {size} bytes, {'CRC' if crc else 'checksum'}"
        return replace(event, title="XMODEM block", detail=detail, address=self.at, length=size, flags=tuple(flags))


def _synchronisation(now: _Open, event: Event) -> Event:
    frame = now.frames[-1]
    got = frame.got
    flags: list[str] = []
    match frame.answer:
        case Answer.ACK:
            flags = [f"then {said(got[1:])}"] if got[1:] else []
        case Answer.NACK:
            flags = ["NACK: it had been synchronised before, so it was not reset"]
        case Answer.SILENCE:
            flags = [f"silence of {frame.stage().silent_s or 0.0:.3f} s"]
        case Answer.MISSING:
            flags = ["no answer was recorded"]
        case Answer.GARBAGE if set(got) == {SYNC}:
            flags = ["7F came back: what is sent is received"]
        case Answer.GARBAGE if len(got) <= 4 and got[-1] == ACK:
            flags = [f"{shown(got[:-1])} came before the ACK"]
        case Answer.GARBAGE:
            flags = [f"{said(got)} came instead of an ACK"]
    return replace(event, title="Synchronise", detail="7F", flags=tuple(flags))


def _bytes(now: _Open, event: Event) -> Event:
    if not now.frames:  # Only heard: an application that speaks, or the answer to what was not recorded.
        got = b"".join(entry.data for entry in now.entries)
        if not got:
            return replace(event, title="Nothing heard")
        return replace(event, title="Heard", detail=f"{said(got)}" + (f" ({len(got)} bytes)" if len(got) > 1 else ""))
    sent = now.frames[0].sent.data
    detail = shown(sent) + (f", {len(now.frames)} times" if len(now.frames) > 1 else "")
    got = now.frames[-1].got
    flags = [f"sent outside a command{f'; {said(got)} came' if got else ''}"]
    return replace(event, title="Bytes", detail=detail, flags=tuple(flags))
