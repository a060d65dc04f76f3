"""The second-stage loader's part of a recording: frames of both directions to events, each frame with its answer.

Frames are under way many at a time, and one answer says that all commands up to its number are done (``stub.py``). So an event
is ready when its answer is found, which may be long after; ``trace.py`` puts the events in order again. Image content is in the
recording by its address; the check behind it cannot be verified then.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

from bridged.protocol.recording import Entry, Sign
from bridged.protocol.stub import (
    COMMANDS,
    FRAME_BYTES,
    HEAD_BYTES,
    MARK,
    Verb,
    greeting_of,
    head_of,
    refusal_of_payload,
    status_of,
)
from bridged.protocol.trace_event import Answer, Event, Kind, Stage, said

TRAIN_LEAST = 16  # bytes of 0x55
NAK = Verb.NAK | 0x80


@dataclass(slots=True)
class _Sent:
    """A frame on its way. ``left``: bytes of it that were not seen yet; ``wire_end``: when all of it is with the loader."""

    verb: int
    number: int
    size: int
    left: int
    payload: bytes
    gap_s: float | None
    entries: list[Entry]
    wire_end: float = 0.0
    silent_s: float | None = None
    flags: list[str] = field(default_factory=list)


class Frames:
    """One conversation after the other. ``done`` is given each event; ``sent`` and ``received`` say whether an entry is one of
    theirs, and every entry that is will be in one event."""

    def __init__(self, done: Callable[[Event], None]) -> None:
        self._done = done
        self._active = False
        self._open: _Sent | None = None
        self._waiting: list[_Sent] = []
        self._buffer = bytearray()
        self._given: list[tuple[Entry, int]] = []  # Entries whose bytes are in the buffer, and how many each has left there.
        self._fresh: list[Entry] = []  # Of these, those that belong to no event yet.
        self._wire_end = self._answered = 0.0

    def end(self) -> None:
        """Nothing more comes of it: whatever is still open is told as it is."""
        if self._open is not None:
            self._open.flags.append("broken off")
            self._waiting.append(self._open)
            self._open = None
        for sent in self._waiting:
            if sent.silent_s is None:
                sent.flags.append("no answer was recorded")
            self._tell(sent, Answer.MISSING if sent.silent_s is None else Answer.SILENCE)
        self._waiting.clear()
        self._noise(len(self._buffer))
        self._active = False

    # --- to the loader ------------------------------------------------------------------------------------------------

    def sent(self, entry: Entry, frame_s: float, gap_s: float | None) -> bool:
        now = self._open
        if now is not None:
            if entry.sent_bytes <= now.left and entry.sign in (Sign.SENT, Sign.CONTENT):
                now.entries.append(entry)
                self._progress(now, entry, frame_s)
                return True
            self._open = None
            now.flags.append("broken off")
            self._waiting.append(now)
        data = entry.data
        if entry.sign is Sign.SENT and len(data) >= TRAIN_LEAST and not data.strip(b"\x55"):
            self._active = True
            self._on_wire(entry, frame_s)
            detail = f"{len(data)} bytes of 55, for its clock to be measured"
            self._done(Event(Kind.FRAME, entry.at, 0.0, _title("train"), detail, entries=(entry,)))
            return True
        head = head_of(data[:HEAD_BYTES]) if entry.sign is Sign.SENT and len(data) >= HEAD_BYTES else None
        if head is None or len(data) > head[2] + FRAME_BYTES:
            if self._active and entry.sign is Sign.SENT:
                self.end()  # Somebody else is spoken to.
            return False
        self._active = True
        verb, number, count = head
        for before in [s for s in self._waiting if (s.verb, s.number) == (verb, number)]:
            self._waiting.remove(before)  # Sent again.
            if before.silent_s is not None:
                before.flags.append(f"silence of {before.silent_s:.3f} s")
            self._tell(before, Answer.NACK if before.silent_s is None else Answer.SILENCE)
        gap_s = None if self._waiting else gap_s
        size = count + FRAME_BYTES
        self._open = _Sent(verb, number, size, size, data[HEAD_BYTES:], gap_s, [entry])
        self._progress(self._open, entry, frame_s)
        return True

    def _progress(self, now: _Sent, entry: Entry, frame_s: float) -> None:
        self._on_wire(entry, frame_s)
        now.left -= entry.sent_bytes
        now.wire_end = self._wire_end
        if now.left:
            return
        whole = now.entries[0].data
        if len(now.entries) == 1 and zlib.crc32(whole[1:-4]) != int.from_bytes(whole[-4:], "little"):
            now.flags.append("wrong checksum sent")
        self._open = None
        self._waiting.append(now)

    def _on_wire(self, entry: Entry, frame_s: float) -> None:
        self._wire_end = max(self._wire_end, entry.at) + entry.sent_bytes * frame_s

    # --- from the loader ----------------------------------------------------------------------------------------------

    def received(self, entry: Entry, frame_s: float) -> bool:
        if not self._active:
            # A recording may begin in the middle, and an answer is known by its header.
            if len(entry.data) < HEAD_BYTES or head_of(entry.data[:HEAD_BYTES]) is None:
                return False
            self._active = True
        if not entry.data:
            if not self._waiting:
                return False
            oldest = self._waiting[0]
            oldest.entries.append(entry)
            oldest.silent_s = max(0.0, entry.at - max(oldest.wire_end, self._answered))
            return True
        self._buffer += entry.data
        self._given.append((entry, len(entry.data)))
        self._fresh.append(entry)
        while self._buffer:
            mark = self._buffer.find(MARK)
            if mark:
                self._noise(mark if mark > 0 else len(self._buffer))
                continue
            if len(self._buffer) < HEAD_BYTES:
                break
            head = head_of(bytes(self._buffer[:HEAD_BYTES]))
            size = FRAME_BYTES + head[2] if head else 0
            if head and len(self._buffer) < size:
                break
            data = bytes(self._buffer[:size])
            if not head or zlib.crc32(data[1:-4]) != int.from_bytes(data[-4:], "little"):
                mark = self._buffer.find(MARK, 1)
                self._noise(mark if mark > 0 else len(self._buffer))
                continue
            self._answer(head[0], head[1], data[HEAD_BYTES:-4], self._take(size), frame_s)
        return True

    def _take(self, count: int) -> list[Entry]:
        """``count`` bytes leave the buffer; the entries of which they are, unless another event has them."""
        del self._buffer[:count]
        taken: list[Entry] = []
        while count:
            entry, left = self._given.pop(0)
            if self._fresh and self._fresh[0] is entry:
                taken.append(self._fresh.pop(0))
            if left > count:
                self._given.insert(0, (entry, left - count))
            count -= min(left, count)
        return taken

    def _noise(self, count: int) -> None:
        data = bytes(self._buffer[:count])
        entries = self._take(count)
        if not entries:
            return  # Of an entry that an event has.
        seconds = max(0.0, entries[-1].at - entries[0].at)
        flags = ("no frame of the second-stage loader",)
        self._done(Event(Kind.BYTES, entries[0].at, seconds, "Heard", said(data), flags=flags, entries=tuple(entries)))

    def _answer(self, verb: int, number: int, payload: bytes, entries: list[Entry], frame_s: float) -> None:
        at = entries[0].at if entries else self._answered
        first = at - (len(entries[0].data) if entries else 0) * frame_s
        if verb == NAK:
            self._refused(number, payload, entries, at)
        elif (found := self._whose(verb, number)) is None:
            title, detail = (
                ("greeting", _told(verb, payload))
                if verb == Verb.HELLO | 0x80
                else ("answer", f"{_name(verb)} {number}, once more")
            )
            self._plain(title, detail, entries, at)
        else:
            if found.verb | 0x80 in COMMANDS:
                for earlier in self._waiting[: self._waiting.index(found)]:
                    if earlier.verb | 0x80 in COMMANDS:
                        self._tell(earlier, Answer.ACK)
                self._waiting = [
                    s for s in self._waiting if s.verb | 0x80 not in COMMANDS or s.entries[0].line > found.entries[0].line
                ]
            if found in self._waiting:
                self._waiting.remove(found)
            begun = max(found.wire_end, self._answered)
            idle_s = max(0.0, first - max(self._wire_end, self._answered))
            found.entries += entries
            self._tell(found, Answer.ACK, max(0.0, first - begun), idle_s, _told(verb, payload))
        self._answered = max(self._answered, entries[-1].at if entries else at)

    def _whose(self, verb: int, number: int) -> _Sent | None:
        return next((s for s in self._waiting if (s.verb | 0x80, s.number) == (verb, number)), None)

    def _refused(self, number: int, payload: bytes, entries: list[Entry], at: float) -> None:
        refusal = refusal_of_payload(payload)
        if refusal is None:
            self._plain("NAK", f"number {number}, {len(payload)} bytes", entries, at, "a NAK of another length")
            return
        detail = f"to number {number}, number {refusal.expected} is expected"
        why = refusal.reason.name
        if not refusal.reason.by_wire:
            why += f" at {refusal.where:#010x} ({refusal.detail:#x})"
            asked = next((s for s in self._waiting if s.number == number), None)
            if asked is not None:
                self._waiting.remove(asked)
                asked.flags.append("refused")
                self._tell(asked, Answer.NACK)
        self._plain("NAK", detail, entries, at, why)

    def _plain(self, title: str, detail: str, entries: list[Entry], at: float, *flags: str) -> None:
        if entries:
            seconds = max(0.0, entries[-1].at - at)
            self._done(Event(Kind.FRAME, at, seconds, _title(title), detail, flags=flags, entries=tuple(entries)))

    # --- events -------------------------------------------------------------------------------------------------------

    def _tell(
        self, sent: _Sent, answer: Answer, answer_s: float | None = None, target_s: float | None = None, told: str = ""
    ) -> None:
        first, last = sent.entries[0], sent.entries[-1]
        detail, address, length = _asked(sent.verb, sent.payload, sent.size - FRAME_BYTES)
        silent_s = sent.silent_s if answer is Answer.SILENCE else None
        stage = Stage("frame", first.at, sent.size - sent.left, answer, answer_s, target_s, sent.gap_s, silent_s)
        self._done(
            Event(
                Kind.FRAME,
                first.at,
                max(0.0, last.at - first.at),
                _title(_name(sent.verb)),
                ": ".join(filter(None, (detail, told))),
                sent.verb,
                address,
                length,
                (stage,),
                tuple(sent.flags),
                tuple(sent.entries),
            )
        )


def _title(what: str) -> str:
    return f"2nd stage {what}"


def _name(verb: int) -> str:
    verb &= 0x7F
    return Verb(verb).name.lower() if verb in set(Verb) else f"verb {verb:#04x}"


def _asked(verb: int, payload: bytes, size: int) -> tuple[str, int | None, int | None]:
    """What a frame asks for, its address and length where it has them. ``payload`` may lack the end."""
    words = [word for (word,) in struct.iter_unpack("<I", payload[: len(payload) // 4 * 4][:12])]
    match verb, words:
        case Verb.WRITE, [address, *_] if size >= 4:
            return f"{address:#010x}, {size - 4} bytes", address, size - 4
        case Verb.ERASE, [address, _, count] if size == 12:
            return f"{address:#010x}, {count} bytes", address, count
        case Verb.FILL, [address, count, value] if size == 12:
            return f"{address:#010x}, {count} bytes of {value & 0xFF:02X}", address, count
        case Verb.CHECK, [address, count, crc] if size == 12:
            return f"{address:#010x}, {count} bytes with CRC {crc:#010x}", address, count
        case Verb.CRC, [address, stride, count] if size == 12:
            return f"{address:#010x}, {count} times {stride} bytes", address, stride * count
        case Verb.READ, [address, count, *_] if size == 8:
            return f"{address:#010x}, {count} bytes", address, count
        case Verb.BAUD, [divisor, *_] if size == 4:
            return f"divisor {divisor}", None, None
        case Verb.GO, [address, *_] if size == 4:
            return (f"{address:#010x}" if address else "reset"), None, None
    return (f"{size} bytes" if size else ""), None, None


def _told(verb: int, payload: bytes) -> str:
    """What an answer says, beyond that it is one."""
    if verb == Verb.HELLO | 0x80 and len(payload) == 36:
        g = greeting_of(payload)
        return f"build {g.build.hex()}, ring of {g.ring_bytes} bytes, divisor {g.brr}, 256 bits in {g.train} cycles"
    if verb in (Verb.STATUS | 0x80, Verb.ABORT | 0x80) and len(payload) == 40:
        s = status_of(payload)
        return f"{s.frames} frames, {s.bad_frames} spoilt, {s.bad_headers} bad headers, {s.gaps} gaps, {s.pauses} pauses"
    return ""
