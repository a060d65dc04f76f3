"""NRST, BOOT0 and power of one target: how they are driven, and in what order they move.

Used by the daemon and by the session process; hence the standard library only. The daemon opens lines (``lines_open.py``,
``gpio.py``), describes them as JSON plus descriptors, and the session process makes the same driver of it (``inherit``):
no step of a dialogue waits for the daemon. This module speaks of *logical* states (held in reset, loader selected, power
on); what level that is at the pin comes from the configuration. It knows neither AN3155 nor hazards (the session's
business), and it opens nothing.

Invariants:

- In one ``set`` a reset is asserted first and released last, with BOOT0 and power settled in between: the chip looks at
  BOOT0 when NRST rises.
- A line that is not wired can be told to be idle, which it is; anything else raises ``LineUnavailable``. BOOT0 by hand
  takes any order and does nothing: a person or a jumper holds it.
- ``idle`` tries every line even if one fails, and then raises the first failure.

Levels: on a modem line an asserted DTR or RTS is taken as *low* at the pin (RS-232 logic behind a TTL adapter); ``!dtr``
is the wiring with a transistor or another inverter in between.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import select
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar

from bridged.errors import BridgedError, ConfigError, LineUnavailable
from bridged.protocol.flow import Pause, SetLines

if TYPE_CHECKING:  # Types only: the session process need not load what reads configuration files.
    from bridged import config
    from bridged.target.uart import Uart

BY_HAND = "by-hand"
ANSWER_TIMEOUT_S = 2.0  # A line box at the end of a slow USB or network link answers in milliseconds; this is a dead one.
ANSWER_LIMIT_BYTES = 200  # "ok", or one line with a reason.
STALE_READS = 16  # 64 KiB that nobody asked for: a box that is out of its mind.
POWER_OFF_S = 0.5  # Board capacitors, and a chip that is fed through its TX/RX pins, need this long to fall below 1 V.
WAIT_LIMIT_S = 10.0  # Of one wait in a sequence: capacitors and supervisors take less, and a session must end some time.

# Linux uapi, linux/gpio.h: _IOWR(0xB4, 0x0E to get or 0x0F to set, struct gpio_v2_line_values), two u64: bits, then mask.
_LINE_VALUES = struct.Struct("=QQ")
_GET_VALUES = (3 << 30) | (_LINE_VALUES.size << 16) | (0xB4 << 8) | 0x0E
_SET_VALUES = (3 << 30) | (_LINE_VALUES.size << 16) | (0xB4 << 8) | 0x0F


class Line(StrEnum):
    """The lines of a target; the values of those that are driven are also the names of the arguments of ``set``.

    ``SAFE`` and ``ALIVE`` are inputs: what the target says of itself, for the interlock and the health probe.
    """

    RESET = "reset"
    BOOT0 = "boot0"
    POWER = "power"
    SAFE = "safe"
    ALIVE = "alive"

    @property
    def pin(self) -> str:
        """What configuration files, line boxes and people call it."""
        return "nrst" if self is Line.RESET else self.value


INPUTS = (Line.SAFE, Line.ALIVE)
_IDLE = {Line.RESET: False, Line.BOOT0: False, Line.POWER: True}


class Lines(ABC):
    """The control lines of one target. Subclasses know one way of driving them."""

    kind: ClassVar[str]

    def __init__(self, wired: Collection[Line], boot0_by_hand: bool = False, fds: Sequence[int] = ()) -> None:
        self._driven = frozenset(wired) - set(INPUTS)
        self._inputs = frozenset(wired) & set(INPUTS)
        self._fds = list(fds)
        self.boot0_by_hand = boot0_by_hand

    @property
    def has_reset(self) -> bool:
        return Line.RESET in self._driven

    @property
    def has_boot0(self) -> bool:
        """Whether BOOT0 can be high; with ``boot0_by_hand`` somebody else sees to it."""
        return Line.BOOT0 in self._driven or self.boot0_by_hand

    @property
    def has_power(self) -> bool:
        return Line.POWER in self._driven

    @property
    def inputs(self) -> frozenset[Line]:
        """What the target says by lines of its own."""
        return self._inputs

    def active(self, line: Line) -> bool:
        """Whether an input is in its active state. Raises ``LineUnavailable``."""
        if line not in self._inputs:
            raise LineUnavailable(f"Reading {line.pin}: it is not wired (lines.{line.pin} is empty)", line=line.pin)
        return self._read(line)

    def set(self, reset: bool | None = None, boot0: bool | None = None, power: bool | None = None) -> None:
        """Drive lines to logical states, None leaves one as it is (``flow.SetLines``). Raises ``LineUnavailable``."""
        order: list[tuple[Line, bool | None]] = [(Line.BOOT0, boot0), (Line.POWER, power)]
        # BOOT0 before power: where NRST is not wired, the chip looks at BOOT0 when its supply rises.
        order.insert(0 if reset else len(order), (Line.RESET, reset))
        for line, state in order:
            if state is not None:
                self._set_one(line, state)

    def idle(self) -> None:
        """BOOT0 low, power on, and at last reset released: the application runs, or the loader if it was entered."""
        first: BridgedError | None = None
        for line in (Line.BOOT0, Line.POWER, Line.RESET):
            try:
                self._set_one(line, _IDLE[line])
            except BridgedError as error:
                first = first or error
        if first is not None:
            raise first

    def _set_one(self, line: Line, state: bool) -> None:
        if line in self._driven:
            self._drive(line, state)
        elif state is not _IDLE[line] and not (line is Line.BOOT0 and self.boot0_by_hand):
            raise LineUnavailable(f"Setting {line.pin.upper()}: it is not wired (lines.{line.pin} is empty)", line=line.pin)

    def gone(self) -> str:
        """Why these lines are no more, in words; empty while they are there. Asked once a second, so it moves nothing."""
        return ""

    @abstractmethod
    def _drive(self, line: Line, state: bool) -> None:
        """Bring one driven line to a logical state."""

    @abstractmethod
    def _read(self, line: Line) -> bool:
        """Whether one input is active."""

    def describe(self) -> dict[str, Any]:
        """JSON-ready; together with ``fds`` all that ``inherit`` needs."""
        return {"kind": self.kind, "boot0_by_hand": self.boot0_by_hand}

    def fds(self) -> list[int]:
        """Descriptors that the session process has to inherit, in the order that ``describe`` refers to."""
        return list(self._fds)

    def close(self) -> None:
        """Close the descriptors. Levels stay or fall to the hardware's default: call ``idle`` before."""
        while self._fds:
            os.close(self._fds.pop())

    def _fd(self, index: int = 0) -> int:
        if index >= len(self._fds):
            raise LineUnavailable(f"Setting lines ({self.kind}): they were closed", kind=self.kind)
        return self._fds[index]


class NoLines(Lines):
    """Nothing is wired; a person (BOOT0 by hand) or the application brings the chip into its loader."""

    kind = "none"

    def __init__(self, boot0_by_hand: bool = False) -> None:
        super().__init__((), boot0_by_hand)

    def _drive(self, line: Line, state: bool) -> None:
        raise AssertionError(f"{line} is not driven, asked for {state}")

    def _read(self, line: Line) -> bool:
        raise AssertionError(f"{line} is not wired")


class ModemLines(Lines):
    """DTR and RTS of the target's own serial port; CTS, DSR, RI and CD as inputs."""

    kind = "modem"

    def __init__(self, uart: Uart, signals: Mapping[Line, tuple[str, bool]], boot0_by_hand: bool = False) -> None:
        """``signals``: for each line ``("dtr" | "rts" | an input's name, the signal's state that means the logical True)``."""
        super().__init__(signals, boot0_by_hand)
        self._uart = uart
        self._signals = dict(signals)

    @classmethod
    def of(cls, lines: config.Lines, uart: Uart) -> ModemLines:
        """From the configuration; raises ``ConfigError`` where a name is no modem line or is used twice."""
        signals: dict[Line, tuple[str, bool]] = {}
        for line in (*wired(lines), *inputs(lines)):
            name = getattr(lines, line.pin)
            signal = name.removeprefix("!")
            known = ("cts", "dsr", "ri", "cd") if line in INPUTS else ("dtr", "rts")
            if signal not in known:
                expected = ", ".join(f"{one}, !{one}" for one in known)
                raise ConfigError(f'lines.{line.pin} = "{name}": one of {expected} was expected', key=f"lines.{line.pin}")
            if any(signal == taken for taken, _ in signals.values()):
                raise ConfigError(f'lines.{line.pin} = "{name}": {signal} drives another line already', key=f"lines.{line.pin}")
            # Asserted is low at the pin, unless the wiring inverts it.
            signals[line] = (signal, level_of(lines, line, True) is name.startswith("!"))
        return cls(uart, signals, lines.boot0 == BY_HAND)

    def _drive(self, line: Line, state: bool) -> None:
        signal, active = self._signals[line]
        asserted = state is active
        self._uart.set_modem(dtr=asserted if signal == "dtr" else None, rts=asserted if signal == "rts" else None)

    def _read(self, line: Line) -> bool:
        signal, active = self._signals[line]
        return (signal in self._uart.modem()) is active

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "signals": {line.value: list(signal) for line, signal in self._signals.items()}}


class SocketLines(Lines):
    """A line box behind a connected Unix stream socket: relays, another machine, or the simulator.

    One request a line, ``nrst 0``, ``boot0 1``, ``power 1`` (0 is electrically low at the pin), each answered by ``ok`` or
    by words that say why not; inputs are asked by ``safe ?`` and answered by ``0`` or ``1``. The descriptor is non-blocking.
    Both processes may use the connection, one after the other: an answer that a killed session left behind is discarded before
    the next request. A box that swallows an answer for good is out of step from then on, and every request fails until it is
    connected anew.
    """

    kind = "socket"

    def __init__(self, fd: int, active_high: Mapping[Line, bool], boot0_by_hand: bool = False, where: str = "") -> None:
        """``active_high``: for each line whether electrically high is the logical True."""
        super().__init__(active_high, boot0_by_hand, [fd])
        self._active_high = dict(active_high)
        self._where = where
        self._buffer = b""
        self._owed = 0  # Answers to requests that timed out; they still come, before the one that we wait for.

    @classmethod
    def of(cls, lines: config.Lines, fd: int) -> SocketLines:
        active_high = {line: level_of(lines, line, True) for line in (*wired(lines), *inputs(lines))}
        return cls(fd, active_high, lines.boot0 == BY_HAND, lines.socket)

    def _drive(self, line: Line, state: bool) -> None:
        request = f"{line.pin} {int(state is self._active_high[line])}"
        self._ask(request, ("ok",))

    def _read(self, line: Line) -> bool:
        return (self._ask(f"{line.pin} ?", ("0", "1")) == "1") is self._active_high[line]

    def _ask(self, request: str, expected: Sequence[str]) -> str:
        """The answer to ``request``, which is one of ``expected``."""
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        if not self._owed:
            self._discard_stale(request)
        self._send(request, deadline)
        self._owed += 1
        while self._owed:
            answer = self._answer(request, deadline)
            self._owed -= 1
        said = answer.strip().decode("utf-8", "replace")
        if said not in expected:
            wanted = " or ".join(f'"{word}"' for word in expected)
            raise LineUnavailable(
                f'Line box {self._where}: "{request}" was answered by "{said}", {wanted} was expected',
                request=request,
                answer=said,
                socket=self._where,
            )
        return said

    def gone(self) -> str:
        poller = select.poll()
        poller.register(self._fd(), select.POLLRDHUP)
        return f"the line box {self._where} closed the connection" if poller.poll(0) else ""

    def _discard_stale(self, request: str) -> None:
        self._buffer = b""
        reads = 0
        while self._poll(select.POLLIN, 0):
            if (reads := reads + 1) > STALE_READS:
                raise self._failed(request, "it does not stop talking")
            self._receive(request)
            self._buffer = b""

    def _send(self, request: str, deadline: float) -> None:
        rest = f"{request}\n".encode()
        while rest:
            if not self._poll(select.POLLOUT, deadline - time.monotonic()):
                raise self._failed(request, f"it took no request within {ANSWER_TIMEOUT_S:g} s")
            try:
                rest = rest[os.write(self._fd(), rest) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise self._failed(request, str(error.strerror or error)) from error

    def _answer(self, request: str, deadline: float) -> bytes:
        while b"\n" not in self._buffer:
            if len(self._buffer) > ANSWER_LIMIT_BYTES:
                raise self._failed(request, f"more than {ANSWER_LIMIT_BYTES} bytes came without the end of a line")
            if not self._poll(select.POLLIN, deadline - time.monotonic()):
                raise self._failed(request, f"no answer within {ANSWER_TIMEOUT_S:g} s")
            self._receive(request)
        answer, _, self._buffer = self._buffer.partition(b"\n")
        return answer

    def _receive(self, request: str) -> None:
        try:
            data = os.read(self._fd(), 4096)
        except BlockingIOError:
            return
        except OSError as error:
            raise self._failed(request, str(error.strerror or error)) from error
        if not data:
            raise self._failed(request, "it closed the connection")
        self._buffer += data

    def _poll(self, events: int, timeout_s: float) -> bool:
        poller = select.poll()
        poller.register(self._fd(), events)
        # A hang-up counts as ready: the read or write that follows says what happened.
        return bool(poller.poll(max(0.0, timeout_s) * 1000))

    def _failed(self, request: str, reason: str) -> LineUnavailable:
        return LineUnavailable(f'Line box {self._where}, "{request}": {reason}', request=request, socket=self._where)

    def describe(self) -> dict[str, Any]:
        active_high = {line.value: high for line, high in self._active_high.items()}
        return {**super().describe(), "active_high": active_high, "where": self._where}


class GpioLines(Lines):
    """Lines of one or several GPIO line requests (character device, uapi v2) that somebody made before.

    The kernel applies active-low and open-drain from the request, so values are logical here. The lines stay requested as
    long as any process holds the descriptor; a request that no process holds any more releases its lines.
    """

    kind = "gpio"

    def __init__(
        self,
        requests: Sequence[int],
        bits: Mapping[Line, tuple[int, int]],
        names: Mapping[Line, str],
        boot0_by_hand: bool = False,
    ) -> None:
        """``bits``: for each line the index of its request and its bit in there; ``names`` for messages."""
        super().__init__(bits, boot0_by_hand, requests)
        self._bits = dict(bits)
        self._names = dict(names)

    def _drive(self, line: Line, state: bool) -> None:
        index, bit = self._bits[line]
        try:
            fcntl.ioctl(self._fd(index), _SET_VALUES, line_values({bit: state}))
        except OSError as error:
            raise self._failed(f"Setting {line.pin.upper()}", line, error) from error

    def _read(self, line: Line) -> bool:
        index, bit = self._bits[line]
        asked = bytearray(_LINE_VALUES.pack(0, 1 << bit))
        try:
            fcntl.ioctl(self._fd(index), _GET_VALUES, asked, True)
        except OSError as error:
            raise self._failed(f"Reading {line.pin}", line, error) from error
        return bool(_LINE_VALUES.unpack(asked)[0] >> bit & 1)

    def _failed(self, attempted: str, line: Line, error: OSError) -> LineUnavailable:
        name = self._names.get(line, "")
        why = "its GPIO chip is gone" if error.errno == errno.ENODEV else str(error.strerror or error)
        return LineUnavailable(f"{attempted} ({name}): {why}", line=line.pin, name=name, errno=error.errno or 0)

    def gone(self) -> str:
        for line, (index, bit) in self._bits.items():
            try:
                fcntl.ioctl(self._fd(index), _GET_VALUES, line_values({bit: False}))
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return f"the GPIO chip of {line.pin} ({self._names.get(line, '')}) vanished"
        return ""

    def describe(self) -> dict[str, Any]:
        return {
            **super().describe(),
            "bits": {line.value: list(place) for line, place in self._bits.items()},
            "names": {line.value: name for line, name in self._names.items()},
        }


def line_values(values: Mapping[int, bool]) -> bytes:
    """``struct gpio_v2_line_values``: which bits of a request change (mask), and to what (bits)."""
    mask = sum(1 << bit for bit in values)
    return _LINE_VALUES.pack(sum(1 << bit for bit, state in values.items() if state), mask)


def inherit(description: Mapping[str, Any], fds: Sequence[int], uart: Uart) -> Lines:
    """The driver that ``describe`` described, over inherited descriptors (the same ones in the same order)."""
    by_hand = bool(description["boot0_by_hand"])
    match description["kind"]:
        case NoLines.kind:
            return NoLines(by_hand)
        case ModemLines.kind:
            return ModemLines(uart, {Line(k): (str(s), bool(a)) for k, (s, a) in description["signals"].items()}, by_hand)
        case SocketLines.kind:
            active_high = {Line(k): bool(high) for k, high in description["active_high"].items()}
            return SocketLines(fds[0], active_high, by_hand, str(description["where"]))
        case GpioLines.kind:
            bits = {Line(k): (int(index), int(bit)) for k, (index, bit) in description["bits"].items()}
            return GpioLines(fds, bits, {Line(k): str(name) for k, name in description["names"].items()}, by_hand)
    raise ValueError(f"no driver of lines is called {description['kind']!r}")


# --- from the configuration ---------------------------------------------------------------------------------------------


def wired(lines: config.Lines) -> tuple[Line, ...]:
    """The lines that bridged drives itself."""
    if lines.kind == "none":
        return ()
    return tuple(line for line in Line if line not in INPUTS and getattr(lines, line.pin) not in ("", BY_HAND))


def inputs(lines: config.Lines) -> tuple[Line, ...]:
    """The lines by which the target says something of itself."""
    return () if lines.kind == "none" else tuple(line for line in INPUTS if getattr(lines, line.pin))


def level_of(lines: config.Lines, line: Line, state: bool) -> bool:
    """Whether the pin is electrically high in this logical state."""
    return state is not bool(getattr(lines, f"{line.pin}_active_low"))


def default_enter(lines: config.Lines) -> tuple[SetLines | Pause, ...]:
    """Into the loader: BOOT0 high, reset, release (without NRST: the supply off and on). Empty where nothing is wired.

    The chip's start-up time after the release is not in here: it comes from the chip table.
    """
    return _restart(lines, loader=True)


def default_leave(lines: config.Lines) -> tuple[SetLines | Pause, ...]:
    """Into the application: BOOT0 low, reset, release (without NRST: the supply off and on)."""
    return _restart(lines, loader=False)


def _restart(lines: config.Lines, *, loader: bool) -> tuple[SetLines | Pause, ...]:
    driven = wired(lines)
    steps: list[SetLines | Pause] = [SetLines(boot0=loader)] if Line.BOOT0 in driven else []
    # BOOT0 moved before the pulse began, so the pulse itself is its setup time.
    setup_s = lines.boot0_setup_s if Line.BOOT0 in driven else 0.0
    if Line.RESET in driven:
        steps += [SetLines(reset=True), Pause(max(lines.reset_s, setup_s)), SetLines(reset=False)]
    elif Line.POWER in driven:
        steps += [SetLines(power=False), Pause(max(POWER_OFF_S, lines.reset_s, setup_s)), SetLines(power=True)]
    return tuple(steps)


def parse_sequence(steps: Sequence[str], lines: config.Lines) -> tuple[SetLines | Pause, ...]:
    """An own sequence of the configuration, whose levels are those of the pins, as steps of a flow.

    Raises ``ConfigError`` for a step that cannot be read, for a line that is not driven, and for a sequence that leaves the
    target held in reset or without power.
    """
    parsed: list[SetLines | Pause] = []
    last = dict(_IDLE)
    for text in steps:
        name, equals, value = (part.strip() for part in text.partition("="))
        if name == "wait" and equals:
            parsed.append(Pause(_seconds(text, value)))
            continue
        line = next((line for line in _IDLE if line.pin == name), None)
        if line is None or value not in ("0", "1"):
            raise ConfigError(
                f'Sequence step "{text}": boot0=0|1, nrst=0|1, power=0|1 or wait=SECONDS was expected', step=text, key="lines"
            )
        if line not in wired(lines):
            raise ConfigError(f'Sequence step "{text}": lines.{name} names no line that bridged drives', step=text, key="lines")
        last[line] = level_of(lines, line, True) is (value == "1")
        parsed.append(SetLines(**{line.value: last[line]}))
    if last[Line.RESET] or not last[Line.POWER]:
        what = "held in reset" if last[Line.RESET] else "without power"
        raise ConfigError(f"Sequence {', '.join(steps)}: it leaves the target {what}", key="lines")
    return tuple(parsed)


def _seconds(text: str, value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= WAIT_LIMIT_S:
        raise ConfigError(f'Sequence step "{text}": 0 to {WAIT_LIMIT_S:g} seconds was expected', step=text, key="lines")
    return seconds
