"""What is fuzzed: one function for each border that bytes of strangers cross. It takes bytes, and returns or raises.

A target raises only when something is wrong: an exception that is no typed error, a wait without end, a broken promise. What
it considers a fair refusal (a ``BridgedError``) it swallows. The same functions are run by three runners: ``test_fuzz``
(hypothesis, in every test run), ``run`` (atheris, guided by coverage: minutes in CI, hours in ``make soak``), and the replay
of the corpus, which holds a seed for each golden file and one input for each finding.

Targets are deterministic: no clock, no random source, no thread. Inputs that steer something are taken apart by ``Bytes``,
which never runs dry: after the last byte come zeros. To add one: a function here, a row in ``TARGETS``, seeds in ``seeds``.
All borders stand in one file, so that one that is missing is seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import os
import shutil
import socket
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bridged import app, chips, config, events
from bridged.config.difference import Difference, difference
from bridged.config.file import InvalidConfig, load, warnings_of
from bridged.console import server as console_server
from bridged.console.room import Console
from bridged.console.server import Admission
from bridged.errors import BridgedError, ConfigError, ImageError, LineUnavailable, LoaderError, RequestError
from bridged.events import SectorProven
from bridged.images import formats, parser
from bridged.images.model import Image
from bridged.images.store import Store
from bridged.jobs.journal import Journal
from bridged.jobs.model import Job, JobKind, JobState, advance, update_of
from bridged.jobs.records import Backup, Change, OpenSession, TargetRecord
from bridged.protocol import an3155, line
from bridged.protocol.an3155 import MassErase, Timing
from bridged.protocol.flow import Drain, Flow, Hazard, Now, Pause, Receive, Send, SetLines, Step
from bridged.protocol.reply import error_reply, format_reply, parse_reply
from bridged.sim import virtual
from bridged.sim.device import Device
from bridged.sim.virtual import VirtualUart
from bridged.target import board as boards
from bridged.target import lines as wires
from bridged.target import session
from bridged.target.board import Board
from bridged.target.lease import Leases
from bridged.target.owner import Frame
from bridged.target.request import Request, Result, Wiring
from tests.target.bench import LINES, WIRED, make_image

VIRTUAL_LIMIT_S = 4 * 3600.0  # A dialogue that goes wrong at each of its steps; the daemon ends a session long before.
STEP_LIMIT = 400_000


class Bytes:
    """Takes an input apart. After its last byte come zeros."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        found = self.data[self.at : self.at + count]
        self.at += count
        return found + bytes(count - len(found))

    def byte(self) -> int:
        return self.take(1)[0]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def choice(self, options: Any) -> Any:
        return options[self.byte() % len(options)]

    def rest(self) -> bytes:
        found = self.data[self.at :]
        self.at = len(self.data)
        return found

    @property
    def empty(self) -> bool:
        return self.at >= len(self.data)


# --- images -------------------------------------------------------------------------------------------------------

UNPACKED_BYTES = 1 << 20


def fuzz_images(data: bytes) -> None:
    """The first byte: type hint and whether an address is given; then the file."""
    source = Bytes(data)
    first = source.byte()
    hint = parser.TYPE_HINTS[(first & 0x7F) % len(parser.TYPE_HINTS)]
    address = 0x08000000 if first & 0x80 else None
    content = source.rest()
    try:
        image = formats.parse(content, hint, address, UNPACKED_BYTES)
    except (ImageError, RequestError) as error:
        checked_error(error)
        return
    assert Image.decode(image.encode()) == image
    assert image.size_bytes <= max(len(content), UNPACKED_BYTES)
    assert len(image.encode()) <= parser.encoded_limit(max(len(content), UNPACKED_BYTES))


def fuzz_image_encoding(data: bytes) -> None:
    """What the parser process hands to the daemon."""
    try:
        image = Image.decode(data)
    except ImageError as error:
        checked_error(error)
        return
    assert image.encode() == data, "two encodings of one content"


def fuzz_parser_report(data: bytes) -> None:
    """What a parser process that strangers have taken over may say: exit status, then the line of its pipe."""
    source = Bytes(data)
    code = source.choice((0, 0, 0, 1, -9, -11, -24, 255))
    try:
        status = parser._understood(code, source.rest(), "these bytes", parser.DEFAULT_LIMITS)
    except ImageError as error:
        checked_error(error)
        return
    if "code" in status:
        told = parser._reported(status)
        assert isinstance(told, ImageError | RequestError)
        checked_error(told)


def checked_error(error: BridgedError) -> None:
    """An error can be told: in a line of the protocol, in both formats, and in a record; and it comes back the same."""
    json.dumps(error.as_dict())
    assert error.code != "INTERNAL"
    assert len(error.message) < 64_000
    for as_json in (False, True):
        told = parse_reply(format_reply(error_reply(error), as_json))
        assert told.text == error.code


# --- line protocol ------------------------------------------------------------------------------------------------


def fuzz_line(data: bytes) -> None:
    """A line of a client: parsed, bound, and said again."""
    name = line.foreign(data[:4])
    try:
        request = line.parse(data)
        assert not name, "obeyed a line that starts as another protocol does"
        values = line.bind(request)
        assert all(value is not None for key, value in values.items() if key != "range")
        if request.verb == "PUT":
            size, offset = line.put_extent(request)
            assert 0 <= offset <= size
    except RequestError as error:
        checked_error(error)
        return
    assert b"\n" not in data.removesuffix(b"\n"), "obeyed two lines as one"
    with contextlib.suppress(RequestError):  # Quoting may take it over the limit.
        again = line.parse(line.format_request(request.verb, *request.args, **dict(request.options)))
        assert again == request


def fuzz_reply(data: bytes) -> None:
    """A line of a daemon, as the command line reads it."""
    try:
        reply = parse_reply(data)
    except RequestError as error:
        checked_error(error)
        return
    for as_json in (False, True):
        said = format_reply(reply, as_json)
        assert said.endswith(b"\n")
        assert said.count(b"\n") == 1
        assert said.isascii()
        once = parse_reply(said)
        assert parse_reply(format_reply(once, as_json)) == once


# --- configuration ------------------------------------------------------------------------------------------------


def _check_places(error: ConfigError, lines: int) -> None:
    assert isinstance(error, InvalidConfig)
    assert all(1 <= mistake.line <= lines and mistake.column >= 1 for mistake in error.errors), error.message


def fuzz_config(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    try:
        loaded = load(text, check_chip=app._check_chip)
    except ConfigError as error:
        checked_error(error)
        _check_places(error, text.count("\n") + 1)
        return
    warnings_of(loaded)
    assert difference(loaded, loaded) == Difference()
    for target in loaded.targets.values():  # What is accepted can be used.
        wires.default_enter(target.lines)
        wires.default_leave(target.lines)
        for sequence in (target.lines.enter, target.lines.leave):
            assert len(wires.parse_sequence(sequence, target.lines)) == len(sequence)


# --- AN3155, host side: single commands ---------------------------------------------------------------------------

TIMING = Timing.at(115200)
FLOWS: tuple[Callable[[], Flow[Any]], ...] = (
    lambda: an3155.synchronise(TIMING),
    lambda: an3155.get(TIMING),
    lambda: an3155.get_version(TIMING),
    lambda: an3155.get_id(TIMING),
    lambda: an3155.read_memory(0x08000000, 256, TIMING),
    lambda: an3155.write_memory(0x08000000, bytes(256), TIMING),
    lambda: an3155.go(0x08000000, TIMING),
    lambda: an3155.get_checksum(0x08000000, 1024, TIMING, compute_s=1.0),
    lambda: an3155.erase([1, 2, 3], TIMING, wait_s=30.0),
    lambda: an3155.erase_all(TIMING, wait_s=30.0),
    lambda: an3155.extended_erase([1, 2, 3], TIMING, wait_s=30.0),
    lambda: an3155.extended_erase_special(MassErase.ALL, TIMING, wait_s=30.0),
)


class Script:
    """A target that answers with the next bytes of the input, whatever it was asked, in pieces of any size.

    Time is virtual: a Receive that gets less than it wants costs its time-out.
    """

    def __init__(self, source: Bytes) -> None:
        self.source = source
        self.now_s = 0.0
        self.steps = 0
        self.hazard_until_s = 0.0
        self.reset = self.boot0 = False
        self.watch = Watch()

    def answer(self, step: Step) -> Any:
        self.steps += 1
        assert self.steps < STEP_LIMIT, "a dialogue without end"
        assert self.now_s < VIRTUAL_LIMIT_S, "a dialogue that takes for ever"
        match step:
            case Send(data):
                assert 0 < len(data) <= 600
                self.now_s += len(data) * TIMING.byte_s
            case Receive(count, timeout_s):
                assert 0 < count <= 70_000
                assert 0 < timeout_s < 1000
                return self._said(count, timeout_s)
            case Drain(_quiet_s, limit_s):
                return self._said(self.source.byte(), limit_s)
            case Pause(seconds):
                assert 0 <= seconds < 1000
                self.now_s += seconds
            case Hazard(seconds):
                self.hazard_until_s = self.now_s + seconds if seconds else 0.0
            case SetLines(reset, boot0):
                self.now_s = max(self.now_s, self.hazard_until_s)
                self.reset = self.reset if reset is None else reset
                self.boot0 = self.boot0 if boot0 is None else boot0
            case Now():
                return self.now_s
        return None

    def _said(self, count: int, timeout_s: float) -> bytes:
        """A length byte below the count is a short answer; the end of the input is silence."""
        if self.source.empty:
            self.now_s += timeout_s
            return b""
        if count > 1 and (short := self.source.byte()) < 0x80:
            count = min(count, short)
            self.now_s += timeout_s
        return self.source.take(count) if not self.source.empty else b""


def played(flow: Flow[Any], answer: Callable[[Step], Any], watch: Watch) -> Any:
    """Run ``flow`` to its end, telling ``watch`` all that was asked and answered."""
    step = next(flow)
    while True:
        try:
            said = answer(step)
            watch.saw(step, said)
            step = flow.send(said)
        except StopIteration as end:
            return end.value


def fuzz_an3155_host(data: bytes) -> None:
    """The first byte: which command; then what the target says."""
    source = Bytes(data)
    flow = source.choice(FLOWS)()
    script = Script(source)
    try:
        played(flow, script.answer, script.watch)
    except LoaderError as error:
        checked_error(error)
    assert script.now_s < 60.0, "a single command never takes a minute"


# --- AN3155, host side: the whole session -------------------------------------------------------------------------


class Watch:
    """An honest witness: what the host was really told about each address since it last changed something there."""

    def __init__(self) -> None:
        self.known: dict[int, int] = {}
        self.changed = False
        self._address = self._count = -1

    def saw(self, step: Step, answer: Any) -> None:
        match step:
            case Send(data, payload_address):
                if payload_address is not None:
                    self.changed = True
                    for at in range(payload_address, payload_address + len(data) - 2):
                        self.known.pop(at, None)
                elif data[:2] in (b"\x43\xbc", b"\x44\xbb"):
                    self.changed = True
                    self.known.clear()
                elif len(data) == 5 and not an3155.checksum(data):
                    self._address = int.from_bytes(data[:4], "big")
                elif len(data) == 2 and data[0] ^ data[1] == 0xFF:
                    self._count = data[0] + 1
            case Receive(count) if count == self._count and self._address >= 0 and len(answer) == count:
                self.known.update(zip(range(self._address, self._address + count), answer, strict=True))

    def confirms(self, image: Image) -> bool:
        """Whether all of ``image`` was read back, and was right. A host may read in pieces of one byte only if it says so."""
        return all(self.known.get(s.address + at) == byte for s in image.segments for at, byte in enumerate(s.data))


PARTS = ("F756", "L476", "F407", "H743", "G071", "L053", "U575", "0x410")
KINDS = ("flash", "ensure", "verify", "erase", "read", "identify", "reset")


def _request(source: Bytes) -> tuple[Request, Image]:
    part, kind, bits = source.choice(PARTS), source.choice(KINDS), source.byte()
    chip = chips.find(part)
    image = make_image(chip, 600 + 40 * (bits & 3))
    request = Request(
        kind=kind,
        wiring=WIRED if not bits & 4 else Wiring(boot0_by_hand=True),
        chip=part if bits & 8 else "",
        discard_outside=bool(bits & 16),
        one_shot=bool(bits & 32),
        stay_in_loader=bool(bits & 64),
        force=frozenset({"vectors"}) if bits & 128 else frozenset(),
        listen_s=0.1,
        address=chip.flash_base,
        length=512 if kind == "read" else 0,
    )
    return request, image


def _judged(request: Request, image: Image, result: Result | None, watch: Watch, lines: tuple[bool, bool]) -> None:
    if result is not None and result.evidence:
        assert result.evidence == "full"
        assert request.kind in ("flash", "ensure", "verify", "erase")
        if request.kind != "erase":
            assert result.content == image.digest
            assert watch.confirms(image), "called proven what was not read back"
    if result is not None and request.kind in ("verify", "read", "identify", "reset"):
        assert not watch.changed, f"a job of kind {request.kind} changed the flash"
    if request.wiring.has_reset and not (request.stay_in_loader and result is not None):
        assert lines == (False, False), "NRST and BOOT0 are not back at idle"


def fuzz_session(data: bytes) -> None:
    """A whole session with a target that answers whatever the input says (P3, P4; ends in bounded time)."""
    source = Bytes(data)
    request, image = _request(source)
    script = Script(source)
    result: Result | None = None
    try:
        result = played(session.run(request, image), script.answer, script.watch)
    except BridgedError as error:
        checked_error(error)
    _judged(request, image, result, script.watch, (script.reset, script.boot0))


class BadWire:
    """Between the host and a simulated part: drops, flips, inserts and doubles bytes where the input says so.

    An accident is three bytes: how many bytes pass first (in either direction), what happens, and with which value.
    """

    def __init__(self, uart: VirtualUart, source: Bytes) -> None:
        self.uart, self.source = uart, source
        self._left = self._next()
        self._host_send, self._host_receive = uart.send, uart.receive
        uart.send = self.send  # type: ignore[method-assign]
        uart.receive = self.receive  # type: ignore[method-assign]

    def _next(self) -> int:
        return 1 << 40 if self.source.empty else self.source.byte() * 4

    def through(self, data: bytes) -> bytes:
        out = bytearray()
        for byte in data:
            self._left -= 1
            if self._left >= 0:
                out.append(byte)
                continue
            what, value = self.source.byte() % 5, self.source.byte()
            self._left = self._next()
            match what:
                case 0:
                    pass
                case 1:
                    out.append(byte ^ (value or 0xFF))
                case 2:
                    out += bytes([byte, value])
                case 3:
                    out += bytes([byte]) * (2 + value % 8)
                case 4:
                    out.append(0x1F if value & 1 else 0x79)
        return bytes(out)

    def send(self, data: bytes) -> None:
        changed = self.through(data)
        if changed:
            self._host_send(changed)

    def receive(self, count: int, timeout_s: float) -> bytes:
        got = self.through(self._host_receive(count, timeout_s))
        self.uart.inbox[:0] = got[count:]
        return got[:count]


@cache
def _options(part: str) -> tuple[tuple[str, int], ...]:
    return (("nBOOT_SEL", 0),) if part == "G071" else ()


def fuzz_session_bad_wire(data: bytes) -> None:
    """A whole session with a strict part behind a wire on which the input has accidents; then one without, which heals all."""
    source = Bytes(data)
    request, image = _request(source)
    part = chips.find(request.chip or "F756")
    if not request.chip:
        image = make_image(part, 700)
    device = Device(part, options=dict(_options(request.chip)), rate_error=0.0)
    uart = VirtualUart(device)
    watch = Watch()
    BadWire(uart, source)
    account = virtual.Account()
    result: Result | None = None
    steps = 0

    def before(number: int, _step: Step) -> None:
        nonlocal steps
        steps = number
        assert number < STEP_LIMIT, "a dialogue without end"
        assert uart.now_ns < VIRTUAL_LIMIT_S * 1e9, "a dialogue that takes for ever"

    def observed(flow: Flow[Result]) -> Flow[Result]:
        """``flow``, with the witness in between."""
        step = next(flow)
        while True:
            try:
                said = yield step
            except BaseException as error:
                step = flow.throw(error)
                continue
            watch.saw(step, said)
            try:
                step = flow.send(said)
            except StopIteration as end:
                value: Result = end.value
                return value

    try:
        result = virtual.run(observed(session.run(request, image)), uart, account=account, before=before)
    except BridgedError as error:
        checked_error(error)
    lines = (not device.lines["nrst"], device.lines["boot0"])
    _judged(request, image, result, watch, lines)
    assert not device.stats.hazard_resets, "a reset in the middle of an erase"
    if result is not None and result.evidence == "full" and request.kind != "erase":
        for seg in image.segments:
            assert device.memory.read(seg.address, len(seg.data)) == seg.data, "proven, and not what is in the flash"
    if request.kind in ("flash", "ensure", "erase") and request.wiring.has_reset and not device.stats.self_resets:
        again = Request(kind="flash", wiring=WIRED, chip=request.chip or "F756", discard_outside=True, listen_s=0.0)
        healed = virtual.run(session.run(again, image), VirtualUart(device))
        assert healed.evidence == "full", "after accidents a clean wire must do"


# --- AN3155, device side ------------------------------------------------------------------------------------------


def fuzz_an3155_device(data: bytes) -> None:
    """The simulated loader, fed anything: it survives, says a bounded amount, and its application area stays within."""
    source = Bytes(data)
    part = source.choice(PARTS)
    bits = source.byte()
    device = Device(chips.find(part), options=dict(_options(part)), rate_error=0.0, checksum=True, rdp=bits & 1)
    uart = VirtualUart(device)
    uart.set_lines(reset=True, boot0=True)
    uart.pause(0.02)
    uart.set_lines(reset=False)
    uart.pause(3.0)
    uart.send(b"\x7f")
    said = len(uart.drain(0.01, 0.1))
    while not source.empty:
        piece = source.rest() if bits & 2 else source.take(1 + source.byte() % 32)
        if bits & 4 and piece:  # complete what needs a checksum, or the fuzzer never gets past it
            piece += bytes([an3155.checksum(piece)])
        uart.send(piece)
        said += len(uart.drain(0.002, 0.05))
    uart.pause(1.0)
    said += len(uart.drain(0.01, 10.0))
    assert said <= device.stats.bytes_out
    device.memory.read(device.chip.flash_base, 256)


# --- between our own processes, and from our own disk -------------------------------------------------------------


def fuzz_events(data: bytes) -> None:
    """A message of a session process, which may be out of its mind, to the daemon."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not isinstance(found, dict):
        return
    try:
        event = events.decode(found)
    except ValueError:
        return
    assert events.decode(json.loads(json.dumps(events.encode(event)))) == event
    if isinstance(event, events.Planned):
        assert math.isfinite(event.limit_s)


def fuzz_board(data: bytes) -> None:
    """The board as a killed, or a mad, session process left it: pieces of (offset, length, bytes), then the daemon reads."""
    source = Bytes(data)
    board = Board.create()
    try:
        while not source.empty:
            area = source.choice((0, boards.HEADER_BYTES, boards.HEADER_BYTES + boards.RESULT_BYTES))
            at = area + source.number(1) * (1 if area == 0 else 8)
            os.pwrite(board.fd, source.take(source.byte()), min(at, boards.SIZE_BYTES - 256))
        result = board.result()
        assert result is None or isinstance(result, dict)
        assert 0.0 <= board.hazard_left_s <= boards.MAX_HAZARD_S
        assert board.done >= 0
        assert len(board.records()) < boards.SIZE_BYTES
        board.trace().encode()
        assert board.lines_failed in (False, True)
    finally:
        board.close()


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """In memory where there is such a place: these targets write a lot."""
    memory = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="bridged-fuzz-", dir=memory if os.access(memory, os.W_OK) else None))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@cache
def _journal_bytes() -> bytes:
    """A journal with everything in it, as one file."""
    with _folder() as root:
        journal = Journal.open(root / "state.db")
        job = Job("job1", JobKind.FLASH, "m1", JobState.QUEUED, 1, "f" * 64, "c" * 64, {"addr": 0x08000000}, "me", 100.0)
        journal.admit(job, "id-1", "{}").result(10)
        running = advance(job, JobState.RUNNING, phase="erase", started=101.0, touched=True)
        journal.apply(
            Change(
                job=running,
                updates=(update_of(running, 101.0, event={"event": "x"}),),
                proven=(SectorProven(0x08000000, 16384, "ab" * 32),),
                backup=Backup("0011", b"kept"),
                session=OpenSession("m1", "job1", 4.0, "boot", 101.0),
                target=TargetRecord("m1", pid=0x449, uid="0011", good_image="f" * 64),
            )
        ).result(10)
        journal.close()
        with contextlib.closing(sqlite3.connect(root / "state.db")) as connection:
            connection.execute("PRAGMA journal_mode = DELETE")
        return (root / "state.db").read_bytes()


def fuzz_journal(data: bytes) -> None:
    """A journal whose medium changed bytes: pieces of (offset, length, bytes). Read, or refused by a typed error."""
    source = Bytes(data)
    content = bytearray(_journal_bytes())
    while not source.empty:
        at = source.number(3) % len(content)
        piece = source.take(1 + source.byte() % 16)
        content[at : at + len(piece)] = piece[: len(content) - at]
    with _folder() as root:
        path = root / "state.db"
        path.write_bytes(content)
        try:
            journal = Journal.open(path)
        except BridgedError as error:
            checked_error(error)
            return
        reads: tuple[Callable[[], Any], ...] = (
            journal.active,
            journal.jobs,
            journal.sessions,
            journal.targets,
            lambda: journal.log("job1"),
            lambda: journal.job("job1"),
            lambda: journal.proven("job1"),
            lambda: journal.backup("job1"),
        )
        try:
            for read in reads:
                try:
                    read()
                except BridgedError as error:
                    checked_error(error)
        finally:
            journal.close()


def fuzz_store(data: bytes) -> None:
    """Sidecars and index of the store as a failing card gives them back."""
    source = Bytes(data)
    sha256 = "ab" * 32
    names = (
        "names.json",
        f"images/{sha256}",
        f"images/{sha256}.json",
        f"uploads/local/{sha256}.part",
        f"uploads/local/{sha256}.json",
    )
    with _folder() as root:
        for folder in ("images", "uploads/local"):
            (root / folder).mkdir(parents=True)
        while not source.empty:
            name = source.choice(names)
            (root / name).write_bytes(source.take(source.number(1) * 4))
        try:
            store = Store(root, 1 << 20, 1 << 19)
            assert store.usage_bytes >= 0
            offset, size, complete = store.have(sha256, "local")
            assert offset >= 0
            assert complete or size is None or offset <= size
            for staged in store.images():
                store.get(staged.sha256)
            store.collect(set())
        except BridgedError as error:
            checked_error(error)


def fuzz_line_box(data: bytes) -> None:
    """What a line box on a socket answers."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    try:
        theirs.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            theirs.send(data[:4096])
        theirs.close()
        box = wires.SocketLines.of(LINES, ours.fileno())
        with contextlib.suppress(LineUnavailable):
            box.set(reset=True, boot0=True)
            box.set(reset=False, boot0=False)
    finally:
        theirs.close()
        ours.close()


class _Wire(asyncio.Transport):
    """A connection that takes everything and remembers it."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "socket": socket.socket()})
        self.sent = bytearray()

    def write(self, data: Any) -> None:
        self.sent += data

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return False

    def close(self) -> None: ...
    def abort(self) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


class _Port:
    """A target that is there, takes what it is given, and checks what it is set to."""

    name, state, reason, talkable, congested = "fuzz", "idle", "", True, False

    def __init__(self) -> None:
        self.leases = Leases(lambda: 0.0, lambda: 0.0)
        self.frame = Frame(115200)
        self.signals: dict[str, bool] = {}
        self.written = bytearray()

    def write(self, data: bytes) -> bool:
        assert data, "nothing was written"
        self.written += data
        return True

    def set_frame(self, frame: Frame | None) -> None:
        self.frame = frame or Frame(115200)
        assert config.BAUD_LOW <= self.frame.baud <= config.BAUD_HIGH
        assert (self.frame.data_bits, self.frame.stop_bits) in {(bits, stop) for bits in (5, 6, 7, 8) for stop in (1, 2)}
        assert self.frame.parity in "NEOMS"
        assert self.frame.flow in ("", "rts", "xon")

    def asserted(self, name: str) -> bool:
        assert name in ("dtr", "rts")
        return self.signals.get(name, True)

    def set_signal(self, name: str, asserted: bool) -> None:
        assert (name, type(asserted)) == ("rts", bool), "a line of the target moved"
        self.signals[name] = asserted

    def purge_output(self) -> None: ...
    def wired_signals(self) -> frozenset[str]:
        return frozenset({"dtr"})

    def restore_signals(self) -> None:
        self.signals.clear()

    def set_break(self, active: bool) -> None: ...
    def modem(self) -> frozenset[str]:
        return frozenset()

    def counters(self) -> None: ...
    async def lease_changed(self) -> None: ...


class _TelnetHere(console_server.Telnet):
    def _pulse_break(self, seat: Any) -> None:
        """There is no loop, and so no time."""


def fuzz_telnet(data: bytes) -> None:
    """What a telnet client sends, whole and in pieces: the same bytes to the port, the same answers, and answers that end."""
    source = Bytes(data)
    cuts = [source.byte() for _ in range(4)]
    said = source.rest()
    outcomes = []
    for bounds in ([0, len(said)], [0, *sorted(min(cut, len(said)) for cut in cuts), len(said)]):
        port, wire = _Port(), _Wire()
        room = Console(port, config.Console(protocol="rfc2217", notices="off"), monotonic=lambda: 0.0)
        room._looking = True  # type: ignore[assignment]  # It would look around each quarter of a second.
        client = _TelnetHere(room, lambda _info, _target: Admission("fuzz", "fuzz"), lambda _info: None)
        try:
            client.connection_made(wire)
            room.heard(b"\r\xff said before")
            for start, end in itertools.pairwise(bounds):
                client.data_received(said[start:end])
            room.heard(b"\r\xff said after")
            assert len(wire.sent) <= 1000 + 300 * len(said), "a few bytes ask for very many"
            client.connection_lost(None)
        finally:
            wire.get_extra_info("socket").close()
        assert not room.seats
        assert port.leases.holder is None
        assert port.frame == Frame(115200), "what a client set lasts until it leaves"
        outcomes.append((bytes(port.written), bytes(wire.sent)))
    assert outcomes[0] == outcomes[1], "the cuts made a difference"


# --- the table ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Target:
    """``weight``: its share of the time; ``examples``: how many inputs the normal test run tries; ``max_bytes`` of an input."""

    run: Callable[[bytes], None]
    weight: int = 1
    examples: int = 60
    max_bytes: int = 4096


TARGETS: dict[str, Target] = {
    "images": Target(fuzz_images, weight=3, examples=200),
    "image-encoding": Target(fuzz_image_encoding, examples=60),
    "parser-report": Target(fuzz_parser_report, examples=60),
    "line": Target(fuzz_line, weight=2, examples=300, max_bytes=1100),
    "reply": Target(fuzz_reply, examples=200),
    "config": Target(fuzz_config, weight=2, examples=120),
    "an3155-host": Target(fuzz_an3155_host, examples=200, max_bytes=2048),
    "an3155-device": Target(fuzz_an3155_device, weight=2, examples=60, max_bytes=1024),
    "session": Target(fuzz_session, weight=3, examples=60),
    "session-bad-wire": Target(fuzz_session_bad_wire, weight=3, examples=30, max_bytes=128),
    "events": Target(fuzz_events, examples=100),
    "board": Target(fuzz_board, examples=40),
    "journal": Target(fuzz_journal, examples=12, max_bytes=512),
    "store": Target(fuzz_store, examples=20),
    "telnet": Target(fuzz_telnet, weight=2, examples=200, max_bytes=1024),
    "line-box": Target(fuzz_line_box, examples=40, max_bytes=1024),
}
