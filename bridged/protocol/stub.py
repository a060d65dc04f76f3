"""The wire of the second-stage loader, host side: frames, questions, and a stream with a window. Flows without I/O.

Its other side is ``bridged/stub/stub.c``, where the frame is described. What this module does not know: chips, images, RAM, and
when to use the loader at all. Whoever calls it falls back to AN3155 at the first ``SecondStageFailed``.

How it keeps its promises on a line that loses and changes bytes:

- A frame counts only with its CRC-32, in both directions. Anything else is skipped up to the next mark.
- Questions (HELLO, CRC, READ, STATUS, BAUD, ABORT) carry a number that the answer repeats; they may be asked again at will.
- Commands that change flash are numbered without gap. The loader carries each out once, in this order, and goes on only after
  success, so an answer to number n says that all up to n are done. After a NAK a STATUS goes behind all that is under way, and
  everything is sent again from the number that it expects (go-back-N). A command sent twice is answered, not carried out again.
- No more bytes are on their way than fit into the loader's ring, so none is lost while it erases.
- Every ERASE declares its hazard before it is sent (P9); the hazard ends with its answer, or by its time. Few are under way at
  a time, so that this stays short.
- Who ends a stream from outside waits for what is under way: the answer to ABORT comes behind it.

An answer to a WRITE proves more than an ACK of AN3155 (the loader compared what it had programmed), and is still not the proof:
that is ``crc_map`` over the whole image at the end.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from bridged.errors import BaudUnavailable, BridgedError, Garbled, LoaderError, NoReply, SecondStageFailed
from bridged.protocol import an3155
from bridged.protocol.flow import Checkpoint, Flow, Hazard, Now, Receive, Send, SetFormat, Step

MARK = 0xA5
HEAD_BYTES = 7  # mark, verb, number, length, header check
FRAME_BYTES = HEAD_BYTES + 4  # around a payload
TRAIN = b"\x55" * 64  # 640 bits; the loader measures 256 of them, wherever it begins
GREETING_S, GREETING_WAIT_S = 1.0, 0.12  # in all, and after each train
ANSWER_S = 0.3  # beyond transmission and work; an adapter's latency and a busy gateway
CONFIRM_S = 0.5  # the loader returns to the old rate after this
CALLED_BACK_S = 0.1  # for one short frame, there and back; well within CONFIRM_S
TRIES = 6
STALLS = 12  # tries in a row without any progress
SILENT_TRIES, SILENT_S = 3, 20.0  # or so many, where they take long: an erase is waited for each time
WINDOW = 64  # frames; less than half of the numbers, so that old and new can be told apart
SLACK_BYTES = 64  # of the ring, for questions and noise
ERASES_AHEAD = 4  # with those of pages of 2 KiB the next data are there in time, also behind an adapter's 16 ms


class Verb(IntEnum):
    HELLO = 0
    ERASE = 1
    WRITE = 2
    FILL = 3
    CHECK = 4
    CRC = 5
    READ = 6
    BAUD = 7
    STATUS = 8
    ABORT = 9
    GO = 10
    NAK = 0x7F


class Reason(IntEnum):
    """Why the loader refuses; the same words as in stub.h."""

    NO_REASON = 0
    BAD_CRC = 1
    BAD_HEADER = 2
    TOO_LONG = 3
    OUT_OF_SEQUENCE = 4
    PAUSE = 5
    BAD_VERB = 6
    BAD_ARGUMENT = 7
    STOPPED = 8
    FLASH_ERROR = 9
    NOT_ERASED = 10
    NOT_BLANK = 11
    NOT_EQUAL = 12

    @property
    def by_wire(self) -> bool:
        """Whether sending it again may help: the line, not the loader."""
        return self in (Reason.BAD_CRC, Reason.BAD_HEADER, Reason.OUT_OF_SEQUENCE, Reason.PAUSE)


@dataclass(frozen=True, slots=True)
class Answer:
    verb: int
    number: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a NAK says. ``expected``: the number of the first command that was not carried out."""

    expected: int
    reason: Reason
    where: int
    detail: int


@dataclass(frozen=True, slots=True)
class Greeting:
    """What the loader knows of itself. ``train``: cycles of 256 bits of the train, 0 where it heard none."""

    protocol: int
    build: bytes
    ring_bytes: int
    block_max: int
    train: int
    brr: int
    cpuid: int
    ccr: int

    @property
    def data_cache(self) -> bool:
        return bool(self.ccr >> 16 & 1)

    def clock_hz(self, baud: int, nominal_hz: int) -> float:
        """The real clock, measured against the host's at ``baud``."""
        return self.train * baud / 256 if self.train else nominal_hz


@dataclass(frozen=True, slots=True)
class Status:
    expected: int
    reason: Reason
    where: int
    detail: int
    stopped: bool
    frames: int
    bad_frames: int
    bad_headers: int
    gaps: int
    pauses: int


Told = Callable[[float], Iterable[Step]]


def _nothing(_seconds: float) -> Iterable[Step]:
    return ()


@dataclass(frozen=True, slots=True)
class Command:
    """One sequenced verb. ``work_s``: the longest it may take; ``hazard_s``: for how long a reset would do damage (P9).

    ``told``: the steps to yield when it is known to be carried out, each command's in its turn; it is given the seconds
    since the command before it. ``content_at``: the address of image content that is most of it, for the recorder.
    """

    verb: Verb
    payload: bytes
    work_s: float
    hazard_s: float = 0.0
    told: Told = _nothing
    content_at: int | None = None


# --- frames -----------------------------------------------------------------------------------------------------------


def frame(verb: int, number: int, payload: bytes = b"") -> bytes:
    head = struct.pack("<BBH", verb, number, len(payload))
    running = zlib.crc32(head)
    check = struct.pack("<H", ~running & 0xFFFF)
    body = head + check + payload
    return bytes([MARK]) + body + struct.pack("<I", zlib.crc32(body))


def head_of(data: bytes) -> tuple[int, int, int] | None:
    """Verb, number and length from seven bytes, None when they are no header."""
    if data[0] != MARK or ~zlib.crc32(data[1:5]) & 0xFFFF != int.from_bytes(data[5:7], "little"):
        return None
    verb, number, count = struct.unpack_from("<BBH", data, 1)
    return verb, number, count


def erase(sectors: Sequence[tuple[int, int, int]], work_s: float, hazard_s: float, told: Told = _nothing) -> Command:
    """``sectors``: address, number in the flash controller's register, and size of each."""
    return Command(Verb.ERASE, b"".join(struct.pack("<III", *s) for s in sectors), work_s, hazard_s, told)


def write(address: int, data: bytes, work_s: float, told: Told = _nothing) -> Command:
    """``data`` where a uniform block goes as a FILL, which is three words."""
    if len(data) >= 64 and data.count(data[0]) == len(data):
        return Command(Verb.FILL, struct.pack("<III", address, len(data), data[0]), work_s, 0.0, told)
    return Command(Verb.WRITE, struct.pack("<I", address) + data, work_s, 0.0, told, address)


def check(address: int, data: bytes, work_s: float) -> Command:
    """Nothing that follows is carried out unless ``data`` is at ``address``."""
    return Command(Verb.CHECK, struct.pack("<III", address, len(data), zlib.crc32(data)), work_s)


def _failed(message: str, refusal: Refusal | None = None, verb: Verb | None = None) -> SecondStageFailed:
    if refusal is None:
        return SecondStageFailed(message)
    return SecondStageFailed(
        f"{message}{f' {verb.name}' if verb is not None else ''}: {refusal.reason.name} at {refusal.where:#010x} "
        f"({refusal.detail:#x})",
        verb=verb.name if verb is not None else "",
        reason=refusal.reason.name,
        address=refusal.where,
        detail=refusal.detail,
    )


class Link:
    """A conversation with one running loader. ``baud``: the rate of the line now, ``brr`` what makes it in the loader, known
    from its first answer on; ``ring_bytes``: what may be on its way."""

    def __init__(self, baud: int, ring_bytes: int) -> None:
        self.baud, self.brr = baud, 0
        self.ring_bytes = ring_bytes
        self.resent = 0  # commands that were sent more than once
        self._number = 0
        self._left = bytearray()

    @property
    def byte_s(self) -> float:
        return 10 / self.baud

    # --- receiving ----------------------------------------------------------------------------------------------------

    def receive(self, now: float, until: float) -> Flow[Answer | None]:
        """The next good frame; None when none began by ``until``, though something else may come for ever: an application that
        runs instead of the loader, or a loader at another rate. Who calls has just asked for the time, ``now``."""
        left = self._left
        while now < until:
            while len(left) < HEAD_BYTES:
                got: bytes = yield Receive(HEAD_BYTES - len(left), until - now if not left else ANSWER_S)
                if not got:
                    left.clear()
                    return None
                left += got
                at = left.find(MARK)
                if at:
                    del left[: at if at > 0 else len(left)]
                    now = yield Now()
                    if now >= until:
                        return None
            head = head_of(bytes(left[:HEAD_BYTES]))
            if head is None:
                self._skip_to_mark()
                now = yield Now()
                continue
            verb, number, count = head
            size = FRAME_BYTES + count
            while len(left) < size:
                got = yield Receive(size - len(left), ANSWER_S + (size - len(left)) * self.byte_s)
                if not got:
                    break
                left += got
            body, check = left[1 : size - 4], left[size - 4 : size]
            if len(left) < size or zlib.crc32(body) != int.from_bytes(check, "little"):
                self._skip_to_mark()
                now = yield Now()
                continue
            del left[:size]
            return Answer(verb, number, bytes(body[HEAD_BYTES - 1 :]))
        return None

    def _skip_to_mark(self) -> None:
        at = self._left.find(MARK, 1)
        del self._left[: at if at >= 0 else len(self._left)]

    # --- questions ----------------------------------------------------------------------------------------------------

    def ask(
        self,
        verb: Verb,
        payload: bytes = b"",
        *,
        work_s: float = 0.0,
        expect: int = 0,
        tries: int = TRIES,
        behind: bool = False,
    ) -> Flow[bytes]:
        """Ask until it is answered. ``expect``: length of the answer's payload, for how long to wait. ``behind``: commands are
        under way, and refusals of these may come first."""
        for _ in range(tries):
            self._number = (self._number + 1) & 0xFF
            data = frame(verb, self._number, payload)
            yield Send(data)
            limit_s = ANSWER_S + work_s + (len(data) + expect + FRAME_BYTES) * self.byte_s
            now: float = yield Now()
            deadline = now + limit_s
            while now < deadline:
                answer = yield from self.receive(now, deadline)
                if answer is None:
                    break
                if answer.verb == verb | 0x80 and answer.number == self._number:
                    return answer.payload
                refusal = refusal_of(answer)
                if refusal is None or (behind and answer.number != self._number):
                    now = yield Now()  # an answer to something before, or one more greeting, and there may be many
                    continue
                if not refusal.reason.by_wire and answer.number == self._number:
                    raise _failed("the second-stage loader refuses", refusal, verb)
                break
        raise _failed(f"the second-stage loader did not answer {verb.name}, asked {tries} times at {self.baud} baud")

    def hello(self) -> Flow[Greeting]:
        """Begin anew: the next command has the number 0, and ABORT is forgotten."""
        greeting = greeting_of((yield from self.ask(Verb.HELLO, expect=36)))
        self.brr = greeting.brr
        return greeting

    def crc_map(self, address: int, stride: int, count: int, *, byte_s: float) -> Flow[list[int]]:
        """CRC-32 (zlib's) of ``count`` pieces of ``stride`` bytes. ``byte_s``: how long the target takes for one byte."""
        work_s = 2 * stride * count * byte_s
        payload = struct.pack("<III", address, stride, count)
        found = yield from self.ask(Verb.CRC, payload, work_s=work_s, expect=4 * count)
        if len(found) != 4 * count:
            raise _failed(f"{len(found)} bytes of CRC came, expected {4 * count}")
        return list(struct.unpack(f"<{count}I", found))

    def read(self, address: int, count: int) -> Flow[bytes]:
        """``count`` bytes of memory, at most a block."""
        found = yield from self.ask(Verb.READ, struct.pack("<II", address, count), expect=count)
        if len(found) != count:
            raise _failed(f"{len(found)} bytes came from {address:#010x}, expected {count}")
        return found

    def status(self) -> Flow[Status]:
        return status_of((yield from self.ask(Verb.STATUS, expect=40)))

    def _behind_all(self, work_s: float) -> Flow[Status | None]:
        """Ask behind everything that is under way, and let the answers to that pass; None when it falls silent."""
        self._number = (self._number + 1) & 0xFF
        yield Send(frame(Verb.STATUS, self._number))
        for _ in range(4 * WINDOW):
            now: float = yield Now()
            answer = yield from self.receive(now, now + ANSWER_S + work_s)
            if answer is None:
                break
            if answer.verb == Verb.STATUS | 0x80 and answer.number == self._number:
                return status_of(answer.payload)
        return None

    def abort(self, *, work_s: float = 0.0) -> Flow[Status]:
        """Refuse what is sent from now on. What is in the ring is done first, so the answer means that the flash rests."""
        return status_of((yield from self.ask(Verb.ABORT, work_s=work_s, expect=40, behind=True)))

    def change_rate(self, baud: int, brr: int) -> Flow[bool]:
        """Go to ``baud``; False when the line does not carry it, and both ends are at the old rate again.

        Any good frame confirms the new rate to the loader, and an answer to the host. Where the line carries the rate only
        towards the target (a slow level shifter, an adapter that loses bytes), the loader stays there although nothing is
        heard, so it is told to come back in the one direction that may work. Where none does, it comes back by itself.
        """
        old = self.baud
        yield from self.ask(Verb.BAUD, struct.pack("<I", brr))
        # The loader changes when its answer has left it; what it hears before a good frame is noise.
        try:
            yield SetFormat(baud, "N")
        except BaudUnavailable:
            yield SetFormat(old, "N")
        else:
            self.baud = baud
            if (yield from self._is_heard()):
                self.brr = brr
                return True
            self._number = (self._number + 1) & 0xFF
            yield Send(frame(Verb.BAUD, self._number, struct.pack("<I", self.brr)))
            yield Receive(FRAME_BYTES, CALLED_BACK_S)
            self.baud = old
            self._left.clear()
            yield SetFormat(old, "N")
        # At once, since what confirms the old rate to a loader that was called back must come within CONFIRM_S, too; and often
        # enough to outlast that of a loader that was not.
        yield from self.ask(Verb.STATUS, expect=40)
        return False

    def _is_heard(self) -> Flow[bool]:
        try:
            yield from self.ask(Verb.STATUS, expect=40, tries=2)
        except LoaderError:
            return False
        return True

    # --- commands -----------------------------------------------------------------------------------------------------

    def run(self, commands: Sequence[Command], first: int = 0, *, hazard_least_s: float = 0.0) -> Flow[int]:
        """Have ``commands`` carried out, numbered from ``first`` on; returns the number after the last.

        ``hazard_least_s``: no hazard that is declared is shorter. Raises ``SecondStageFailed`` when the loader refuses a
        command for another reason than the line, or nothing moves any more.
        """
        frames = [frame(c.verb, (first + n) & 0xFF, c.payload) for n, c in enumerate(commands)]
        done = sent = furthest = stalls = 0
        deadline: float | None = None  # of the present try; answers to what was sent twice do not move it
        since: float = yield Now()

        def hazard(under_way: Sequence[Command]) -> Hazard:
            """Erases that are under way follow each other, so their times add up; none: the hazard is over."""
            seconds = sum(c.hazard_s for c in under_way)
            return Hazard(max(seconds, hazard_least_s) if seconds else 0)

        while done < len(commands):
            try:
                yield Checkpoint()
            except BridgedError:
                yield from self._let_finish(commands[done:furthest])
                raise
            while sent < len(commands) and self._may_send(commands, frames, done, sent):
                if commands[sent].hazard_s:
                    yield hazard(commands[done : max(furthest, sent + 1)])
                yield Send(frames[sent], commands[sent].content_at, HEAD_BYTES + 4, 4)
                self.resent += sent < furthest
                sent += 1
                furthest = max(furthest, sent)
            now: float = yield Now()
            if deadline is None:
                on_wire_s = sum(len(f) for f in frames[done:sent]) * self.byte_s
                deadline = now + ANSWER_S + on_wire_s + commands[done].work_s
            answer = (yield from self.receive(now, deadline)) if now < deadline else None
            before, again = done, answer is None
            if answer is not None and (refusal := refusal_of(answer)) is not None:
                ahead = (refusal.expected - first - done) & 0xFF
                done += ahead if ahead <= sent - done else 0
                if not refusal.reason.by_wire:
                    # It goes no further than this one, so nothing is being erased any more.
                    if any(c.hazard_s for c in commands[before:sent]):
                        yield Hazard(0)
                    raise _failed("the second-stage loader refuses", refusal, commands[done].verb)
                # Every spoilt frame is refused, also those that will be sent again anyway. Were the window sent anew for each
                # such refusal, a window with more than one spoilt frame would cause more of them than it answers, for ever. So
                # whatever is on its way comes first; behind it, one answer says how far all of it came.
                status = yield from self._behind_all(max((c.work_s for c in commands[done:sent]), default=0.0))
                if status is not None:
                    ahead = (status.expected - first - done) & 0xFF
                    done += ahead if ahead <= sent - done else 0
                again = True
            elif answer is not None and answer.verb in COMMANDS:
                ahead = (answer.number - first - done) & 0xFF
                done += ahead + 1 if ahead < sent - done else 0
            if done > before:
                now = yield Now()
            for command in commands[before:done]:
                if command.hazard_s:
                    yield hazard(commands[done:furthest])
                yield from command.told(now - since)
                since = now
            if again:
                sent, deadline = done, None
            if done > before:
                stalls, deadline = 0, None
            elif again:
                stalls += 1
                now = yield Now()
                if stalls > STALLS or (stalls >= SILENT_TRIES and now - since > SILENT_S):
                    raise _failed(f"command {done} of {len(commands)} to the second-stage loader was not carried out")
        return (first + len(commands)) & 0xFF

    def _let_finish(self, under_way: Sequence[Command]) -> Flow[None]:
        """The hazard ends with the answer, if one comes; else by its time."""
        try:
            yield from self.abort(work_s=sum(c.work_s for c in under_way))
            yield Hazard(0)
        except LoaderError:
            pass

    def _may_send(self, commands: Sequence[Command], frames: list[bytes], done: int, sent: int) -> bool:
        if sent == done:
            return True
        if commands[sent].hazard_s and sum(c.hazard_s > 0 for c in commands[done:sent]) >= ERASES_AHEAD:
            return False
        return sent - done < WINDOW and sum(map(len, frames[done : sent + 1])) <= self.ring_bytes - SLACK_BYTES


COMMANDS = {verb | 0x80 for verb in (Verb.ERASE, Verb.WRITE, Verb.FILL, Verb.CHECK)}


def refusal_of(answer: Answer) -> Refusal | None:
    return refusal_of_payload(answer.payload) if answer.verb == Verb.NAK | 0x80 else None


def refusal_of_payload(payload: bytes) -> Refusal | None:
    if len(payload) != 16:
        return None
    expected, reason, where, detail = struct.unpack("<IIII", payload)
    return Refusal(expected & 0xFF, _reason(reason), where, detail)


def greeting_of(payload: bytes) -> Greeting:
    if len(payload) != 36:
        raise _failed(f"a greeting of {len(payload)} bytes came, expected 36")
    protocol, mask, block_max, train, brr, cpuid, ccr = struct.unpack("<I8x6I", payload)
    return Greeting(protocol, payload[4:12], mask + 1, block_max, train, brr, cpuid, ccr)


def status_of(payload: bytes) -> Status:
    if len(payload) != 40:
        raise _failed(f"a status of {len(payload)} bytes came, expected 40")
    expected, reason, where, detail, stopped, *counts = struct.unpack("<10I", payload)
    frames, bad_frames, bad_headers, gaps, pauses = counts
    return Status(expected, _reason(reason), where, detail, bool(stopped), frames, bad_frames, bad_headers, gaps, pauses)


def _reason(value: int) -> Reason:
    return Reason(value) if value in set(Reason) else Reason.NO_REASON


# --- getting there ----------------------------------------------------------------------------------------------------


def start(address: int, build: bytes, baud: int, timing: an3155.Timing) -> Flow[tuple[Link, Greeting]]:
    """Go, the train, and the greeting of the loader with this ``build``; the line is at ``baud`` 8N1 then.

    Raises what Go raises before it has its address, and ``SecondStageFailed`` when nobody greets within ``GREETING_S``, or who
    greets is not fit to be used.
    """
    try:
        yield from an3155.go(address, timing)
    except (Garbled, NoReply) as error:
        # Its ACK may be lost, or the first greeting touch it; a loader that did not start will not greet.
        if error.facts.get("stage") != "address":
            raise
    yield SetFormat(baud, "N")
    link = Link(baud, 0)
    greeting: Greeting | None = None
    train_s = len(TRAIN) * link.byte_s
    for _ in range(max(2, round(GREETING_S / (2 * train_s + GREETING_WAIT_S)))):
        yield Send(TRAIN)
        now: float = yield Now()  # the train may be under way still
        answer = yield from link.receive(now, now + train_s + GREETING_WAIT_S)
        if answer is not None and answer.verb == Verb.HELLO | 0x80:
            greeting = greeting_of(answer.payload)
        if greeting is not None and greeting.train:
            break
    if greeting is None:
        raise _failed(f"the second-stage loader did not greet within {GREETING_S:.3g} s after Go to {address:#010x}")
    greeting = yield from link.hello()
    if greeting.build != build or greeting.protocol != 1:
        raise _failed(f"another program greets: build {greeting.build.hex()}, expected {build.hex()}")
    if greeting.data_cache:
        raise _failed("the data cache is on: what the DMA writes would not be what the loader reads")
    link.ring_bytes = greeting.ring_bytes
    return link, greeting
