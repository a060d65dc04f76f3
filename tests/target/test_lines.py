"""Control lines: the order in which they move, what reaches each kind of driver, and that the session process drives the
very same lines. Real gpiochips are proven in the VM test; here the kernel's end of the GPIO request is a strict fake.
All drivers make the same promises, so they are one file."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import socket
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridged import config
from bridged.config.values import BY_HAND
from bridged.errors import ConfigError, LineUnavailable, PortGone
from bridged.protocol.flow import Pause, SetLines
from bridged.target import lines as module
from bridged.target import uart as uart_module
from bridged.target.lines import (
    GpioLines,
    Line,
    Lines,
    ModemLines,
    NoLines,
    SocketLines,
    default_enter,
    default_leave,
    inherit,
    line_values,
    parse_sequence,
)
from bridged.target.lines_open import open_lines
from bridged.target.uart import Uart

R, B, P = Line.RESET, Line.BOOT0, Line.POWER
NO_UART = Uart.inherit(-1, "/dev/none", False)


class Recorder(Lines):
    """Remembers what was driven; refuses the lines in ``broken``."""

    kind = "recorder"

    def __init__(self, *driven: Line, boot0_by_hand: bool = False, broken: tuple[Line, ...] = ()) -> None:
        super().__init__(driven, boot0_by_hand)
        self.moves: list[tuple[Line, bool]] = []
        self.broken = broken

    def _drive(self, line: Line, state: bool) -> None:
        if line in self.broken:
            raise LineUnavailable(f"{line} is broken", line=line.pin)
        self.moves.append((line, state))

    def _read(self, line: Line) -> bool:
        return line is Line.SAFE


# --- order and absence --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "moves"),
    [
        ((True, True, None), [(R, True), (B, True)]),
        ((False, True, None), [(B, True), (R, False)]),
        ((False, False, True), [(B, False), (P, True), (R, False)]),
        ((True, False, False), [(R, True), (B, False), (P, False)]),
        ((None, True, True), [(B, True), (P, True)]),
        ((None, None, None), []),
        ((False, None, None), [(R, False)]),
    ],
)
def test_reset_is_asserted_first_and_released_last(
    asked: tuple[bool | None, bool | None, bool | None], moves: list[tuple[Line, bool]]
) -> None:
    lines = Recorder(R, B, P)
    lines.set(*asked)
    assert lines.moves == moves


def test_idle_releases_reset_last_and_tries_every_line() -> None:
    lines = Recorder(R, B, P)
    lines.idle()
    assert lines.moves == [(B, False), (P, True), (R, False)]
    lines = Recorder(R, B, P, broken=(B, P))
    with pytest.raises(LineUnavailable, match="boot0 is broken"):
        lines.idle()
    assert lines.moves == [(R, False)]


@given(
    driven=st.sets(st.sampled_from(list(Line))),
    by_hand=st.booleans(),
    asked=st.tuples(*[st.sampled_from([None, False, True])] * 3),
)
def test_a_line_that_is_not_wired_is_idle_and_cannot_be_anything_else(
    driven: set[Line], by_hand: bool, asked: tuple[bool | None, bool | None, bool | None]
) -> None:
    lines = Recorder(*driven, boot0_by_hand=by_hand)
    wanted = {line: state for line, state in zip((R, B, P), asked, strict=True) if state is not None}
    excused = {B} if by_hand else set()
    impossible = {line for line, state in wanted.items() if state != (line is P)} - driven - excused
    if impossible:
        with pytest.raises(LineUnavailable, match="not wired"):
            lines.set(*asked)
    else:
        lines.set(*asked)
        assert dict(lines.moves) == {line: state for line, state in wanted.items() if line in driven}
    assert (lines.has_reset, lines.has_power) == (R in driven, P in driven)
    assert lines.has_boot0 == (B in driven or by_hand)
    lines.idle()


# --- sequences ----------------------------------------------------------------------------------------------------------

BOTH = config.Lines(kind="gpio", nrst="GPIO17", boot0="GPIO18", reset_s=0.02, boot0_setup_s=0.005)


def reset_pulse(seconds: float) -> list[SetLines | Pause]:
    return [SetLines(reset=True), Pause(seconds), SetLines(reset=False)]


@pytest.mark.parametrize(
    ("lines", "enter", "leave"),
    [
        (BOTH, [SetLines(boot0=True), *reset_pulse(0.02)], [SetLines(boot0=False), *reset_pulse(0.02)]),
        (config.Lines(kind="gpio", nrst="A"), reset_pulse(0.02), reset_pulse(0.02)),
        (config.Lines(kind="gpio", nrst="A", boot0="by-hand"), reset_pulse(0.02), reset_pulse(0.02)),
        (config.Lines(kind="gpio", nrst="A", boot0_setup_s=0.5), reset_pulse(0.02), reset_pulse(0.02)),
        (
            config.Lines(kind="gpio", nrst="A", boot0="B", boot0_setup_s=0.5),
            [SetLines(boot0=True), *reset_pulse(0.5)],
            [SetLines(boot0=False), *reset_pulse(0.5)],
        ),
        (
            config.Lines(kind="gpio", boot0="B", power="C"),
            [SetLines(boot0=True), SetLines(power=False), Pause(module.POWER_OFF_S), SetLines(power=True)],
            [SetLines(boot0=False), SetLines(power=False), Pause(module.POWER_OFF_S), SetLines(power=True)],
        ),
        (config.Lines(kind="none", boot0="by-hand"), [], []),
        (config.Lines(), [], []),
    ],
)
def test_default_sequences(lines: config.Lines, enter: list[SetLines | Pause], leave: list[SetLines | Pause]) -> None:
    assert default_enter(lines) == tuple(enter)
    assert default_leave(lines) == tuple(leave)


def test_an_own_sequence_speaks_of_levels_at_the_pins() -> None:
    steps = ["boot0=1", "nrst=0", " wait = 0.05 ", "nrst=1"]
    assert parse_sequence(steps, BOTH) == (
        SetLines(boot0=True),
        SetLines(reset=True),
        Pause(0.05),
        SetLines(reset=False),
    )
    inverted = config.Lines(
        kind="gpio", nrst="A", boot0="B", power="C", nrst_active_low=False, boot0_active_low=True, power_active_low=True
    )
    assert parse_sequence(["power=1", "boot0=0", "nrst=1", "nrst=0", "power=0"], inverted) == (
        SetLines(power=False),
        SetLines(boot0=True),
        SetLines(reset=True),
        SetLines(reset=False),
        SetLines(power=True),
    )
    assert parse_sequence([], BOTH) == ()


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (["boot0"], "boot0"),
        (["boot0=2"], "boot0=2"),
        (["reset=0"], "reset=0"),
        (["=1"], "=1"),
        (["wait=soon"], "0 to 10 seconds"),
        (["wait=-1"], "0 to 10 seconds"),
        (["wait=nan"], "0 to 10 seconds"),
        (["wait=inf"], "0 to 10 seconds"),
        (["wait=10.1"], "0 to 10 seconds"),
        (["power=1"], "lines.power names no line"),
        (["boot0=1", "nrst=0"], "held in reset"),
    ],
)
def test_a_sequence_that_cannot_be_meant(steps: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_sequence(steps, BOTH)


def test_a_sequence_may_not_end_without_power_nor_drive_what_a_person_holds() -> None:
    with pytest.raises(ConfigError, match="without power"):
        parse_sequence(["power=0"], config.Lines(kind="gpio", power="C"))
    with pytest.raises(ConfigError, match="boot0 names no line"):
        parse_sequence(["boot0=1"], config.Lines(kind="gpio", nrst="A", boot0="by-hand"))


# --- GPIO ---------------------------------------------------------------------------------------------------------------


class Request:
    """The kernel's end of GPIO line requests: strict about number, size and mask. One value a bit, None: never set."""

    def __init__(self, bits_of: dict[int, int]) -> None:
        self.values: dict[int, list[bool | None]] = {fd: [None] * bits for fd, bits in bits_of.items()}
        self.gone = False

    def ioctl(self, fd: int, request: int, argument: bytes | bytearray, mutate: bool = False) -> int:
        # GPIO_V2_LINE_GET_VALUES_IOCTL and ..._SET_..., from the kernel's header by a C compiler.
        assert request in (0xC010B40E, 0xC010B40F)
        assert len(argument) == 16
        if self.gone:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        bits, mask = int.from_bytes(argument[:8], sys.byteorder), int.from_bytes(argument[8:], sys.byteorder)
        lines = self.values[fd]
        if not mask or mask >> len(lines) or bits & ~mask:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        for bit in range(len(lines)):
            if request == 0xC010B40F and mask >> bit & 1:
                lines[bit] = bool(bits >> bit & 1)
        if isinstance(argument, bytearray) and mutate and request == 0xC010B40E:
            found = sum(1 << bit for bit, level in enumerate(lines) if level and mask >> bit & 1)
            argument[:8] = found.to_bytes(8, sys.byteorder)
        return 0


def test_line_values_byte_for_byte() -> None:
    assert line_values({0: True, 1: False, 2: True}) == bytes.fromhex("05000000000000000700000000000000")
    assert line_values({63: True}) == struct.pack("=QQ", 1 << 63, 1 << 63)


def test_gpio_lines_over_two_chips(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Request({70: 2, 71: 1})
    monkeypatch.setattr(module, "fcntl", kernel)
    made = GpioLines([70, 71], {B: (0, 0), R: (0, 1), P: (1, 0)}, {R: "rp1:17 GPIO17"})
    lines = inherit(json.loads(json.dumps(made.describe())), made.fds(), NO_UART)
    lines.set(boot0=True)
    assert kernel.values == {70: [True, None], 71: [None]}
    lines.set(reset=True)
    lines.set(power=False)
    assert kernel.values == {70: [True, True], 71: [False]}
    lines.idle()
    assert kernel.values == {70: [False, False], 71: [True]}
    assert lines.gone() == ""
    kernel.gone = True
    assert lines.gone() == "the GPIO chip of boot0 () vanished"
    with pytest.raises(LineUnavailable, match=r"NRST \(rp1:17 GPIO17\): its GPIO chip is gone"):
        lines.set(reset=False)


def test_gpio_inputs_are_read_and_not_driven(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Request({70: 3})
    monkeypatch.setattr(module, "fcntl", kernel)
    made = GpioLines([70], {R: (0, 0), Line.SAFE: (0, 1), Line.ALIVE: (0, 2)}, {Line.SAFE: "rp1:5 GPIO5"})
    lines = inherit(json.loads(json.dumps(made.describe())), made.fds(), NO_UART)
    assert lines.inputs == {Line.SAFE, Line.ALIVE}
    assert (lines.has_reset, lines.has_power) == (True, False)
    lines.idle()
    assert kernel.values == {70: [False, None, None]}
    kernel.values[70] = [True, True, False]
    assert (lines.active(Line.SAFE), lines.active(Line.ALIVE)) == (True, False)
    kernel.gone = True
    with pytest.raises(LineUnavailable, match=r"Reading safe \(rp1:5 GPIO5\): its GPIO chip is gone"):
        lines.active(Line.SAFE)


def test_an_input_that_is_not_wired_is_not_guessed() -> None:
    assert Recorder(R, Line.SAFE).active(Line.SAFE)
    with pytest.raises(LineUnavailable, match=r"lines.alive is empty"):
        Recorder(R, Line.SAFE).active(Line.ALIVE)


def test_closed_lines_drive_nobody_elses_descriptor() -> None:
    read, write = os.pipe()
    lines = GpioLines([read, write], {R: (0, 0)}, {})
    lines.close()
    lines.close()
    for fd in (read, write):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    with pytest.raises(LineUnavailable, match="closed"):
        lines.set(reset=True)


# --- DTR and RTS --------------------------------------------------------------------------------------------------------


@pytest.fixture
def modem(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the two signals do: ``+dtr`` asserted, ``-rts`` released."""
    seen: list[str] = []
    names = {termios.TIOCM_DTR: "dtr", termios.TIOCM_RTS: "rts"}

    def ioctl(_: int, request: int, argument: Any) -> int:
        sign = {termios.TIOCMBIS: "+", termios.TIOCMBIC: "-"}[request]
        seen.append(sign + names[argument[0]])
        return 0

    monkeypatch.setattr(uart_module, "_ioctl", ioctl)
    return seen


@pytest.mark.parametrize(
    ("settings", "enter"),
    [
        # The usual adapter: an asserted signal is low at the pin. NRST low holds in reset, BOOT0 high selects the loader.
        ({"nrst": "dtr", "boot0": "rts"}, ["-rts", "+dtr", "-dtr"]),
        ({"nrst": "rts", "boot0": "dtr"}, ["-dtr", "+rts", "-rts"]),
        ({"nrst": "dtr", "boot0": "!rts"}, ["+rts", "+dtr", "-dtr"]),
        ({"nrst": "!dtr", "boot0": "rts"}, ["-rts", "-dtr", "+dtr"]),
        ({"nrst": "!dtr", "boot0": "!rts"}, ["+rts", "-dtr", "+dtr"]),
        ({"nrst": "dtr", "boot0": "rts", "nrst_active_low": False}, ["-rts", "-dtr", "+dtr"]),
        ({"nrst": "dtr", "boot0": "rts", "boot0_active_low": True}, ["+rts", "+dtr", "-dtr"]),
        ({"nrst": "!dtr", "boot0": "!rts", "nrst_active_low": False, "boot0_active_low": True}, ["-rts", "+dtr", "-dtr"]),
        ({"nrst": "dtr"}, ["+dtr", "-dtr"]),
    ],
)
def test_modem_lines(modem: list[str], settings: dict[str, Any], enter: list[str]) -> None:
    configured = config.Lines(kind="modem", **settings)
    made = open_lines(configured, NO_UART, "bridged")
    idle, by_name = list(modem), {name[1:]: name for name in modem}
    modem.clear()
    lines = inherit(json.loads(json.dumps(made.describe())), made.fds(), NO_UART)
    for step in default_enter(configured):
        if isinstance(step, SetLines):
            lines.set(step.reset, step.boot0, step.power)
    assert modem == enter
    # Opening left BOOT0 where the loader is not, and NRST where it ends up after the pulse.
    assert idle[-1] == enter[-1]
    if "boot0" in settings:
        assert by_name[enter[0][1:]] != enter[0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"nrst": "cts"}, "dtr, !dtr, rts, !rts"),
        ({"safe": "rts"}, "cts, !cts"),
        ({"nrst": "dtr", "boot0": "!dtr"}, "dtr drives another line already"),
    ],
)
def test_modem_lines_that_cannot_be_meant(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ModemLines.of(config.Lines(kind="modem", **settings), NO_UART)


@pytest.mark.parametrize(
    ("settings", "asserted", "active"),
    [
        ({"safe": "cts"}, True, False),  # Asserted is low at the pin, and high is what says so.
        ({"safe": "cts"}, False, True),
        ({"safe": "!cts"}, True, True),
        ({"safe": "cts", "safe_active_low": True}, True, True),
        ({"safe": "!cts", "safe_active_low": True}, True, False),
    ],
)
def test_modem_inputs(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], asserted: bool, active: bool) -> None:
    monkeypatch.setattr(NO_UART, "modem", lambda: frozenset({"cts"} if asserted else set()))
    made = ModemLines.of(config.Lines(kind="modem", nrst="dtr", **settings), NO_UART)
    lines = inherit(json.loads(json.dumps(made.describe())), made.fds(), NO_UART)
    assert lines.active(Line.SAFE) is active


def test_a_port_that_vanished_with_its_modem_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(uart_module, "_ioctl", gone)
    with pytest.raises(PortGone):
        open_lines(config.Lines(kind="modem", nrst="dtr"), NO_UART, "bridged")


# --- line box -----------------------------------------------------------------------------------------------------------


class Box:
    """A line box: answers each request by the next of ``answers`` (``ok`` when none is left), strict about what it hears.

    An answer of None is no answer. ``closing`` ends the connection at the first request.
    """

    def __init__(self, listener: socket.socket) -> None:
        self.levels: dict[str, int] = {}
        self.heard: list[str] = []
        self.answers: list[bytes | None] = []
        self.closing = False
        self._listener = listener
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection, connection.makefile("rwb", buffering=0) as stream:
            while request := stream.readline():
                if self.closing:
                    connection.shutdown(socket.SHUT_RDWR)
                    return
                name, level = request.decode().removesuffix("\n").split(" ")
                if name in ("safe", "alive") and level == "?":
                    stream.write(self.answers.pop(0) or b"")
                    continue
                if name not in ("nrst", "boot0", "power") or level not in ("0", "1"):
                    stream.write(b"what?\n")
                    continue
                self.heard.append(f"{name} {level}")
                answer = self.answers.pop(0) if self.answers else b"ok\n"
                if answer == b"ok\n":
                    self.levels[name] = int(level)
                if answer is not None:
                    stream.write(answer)


@pytest.fixture
def box(tmp_path: Path) -> Iterator[tuple[Box, str]]:
    path = str(tmp_path / "box.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen(1)
        yield Box(listener), path


def boxed(path: str, **settings: Any) -> config.Lines:
    return config.Lines(kind="socket", socket=path, **{"nrst": "nrst", "boot0": "boot0", **settings})


def test_a_line_box_is_idle_once_opened_and_moves_in_order(box: tuple[Box, str]) -> None:
    configured = boxed(box[1], power="power")
    lines = open_lines(configured, NO_UART, "bridged")
    assert box[0].heard == ["boot0 0", "power 1", "nrst 1"]
    box[0].heard.clear()
    for step in default_enter(configured):
        if isinstance(step, SetLines):
            lines.set(step.reset, step.boot0, step.power)
    assert box[0].heard == ["boot0 1", "nrst 0", "nrst 1"]
    assert not os.get_blocking(lines.fds()[0])
    assert not os.get_inheritable(lines.fds()[0])
    lines.close()


def test_a_line_box_is_told_electrical_levels(box: tuple[Box, str]) -> None:
    lines = open_lines(
        boxed(box[1], power="power", nrst_active_low=False, boot0_active_low=True, power_active_low=True), NO_UART, "bridged"
    )
    assert box[0].levels == {"boot0": 1, "power": 0, "nrst": 0}
    lines.set(reset=True, boot0=True)
    assert box[0].levels == {"boot0": 0, "power": 0, "nrst": 1}
    lines.close()


def test_a_line_box_is_asked_for_inputs(box: tuple[Box, str]) -> None:
    opened = open_lines(boxed(box[1], safe="safe", alive="alive", alive_active_low=True), NO_UART, "bridged")
    lines = inherit(json.loads(json.dumps(opened.describe())), opened.fds(), NO_UART)
    box[0].answers += [b"1\n", b"0\n", b"1\n", b"0\n", b"perhaps\n"]
    assert [lines.active(line) for line in (Line.SAFE, Line.SAFE, Line.ALIVE, Line.ALIVE)] == [True, False, False, True]
    with pytest.raises(LineUnavailable, match=r'"safe [?]" was answered by "perhaps", "0" or "1" was expected'):
        lines.active(Line.SAFE)
    opened.close()


CHILD = """
import json, sys
from bridged.target.lines import inherit
from bridged.target.uart import Uart
assert "asyncio" not in sys.modules and "socket" not in sys.modules and "bridged.config" not in sys.modules
lines = inherit(json.loads(sys.argv[1]), [int(sys.argv[2])], Uart.inherit(-1, "", False))
lines.set(boot0=True)
lines.set(reset=True)
lines.set(reset=False)
"""


def test_another_process_drives_the_same_box(box: tuple[Box, str]) -> None:
    lines = open_lines(boxed(box[1]), NO_UART, "bridged")
    fds = lines.fds()
    box[0].heard.clear()
    command = [sys.executable, "-c", CHILD, json.dumps(lines.describe()), str(fds[0])]
    subprocess.run(command, pass_fds=fds, check=True, timeout=30)
    assert box[0].heard == ["boot0 1", "nrst 0", "nrst 1"]
    lines.idle()  # And afterwards the daemon goes on over the same connection.
    assert box[0].levels == {"boot0": 0, "nrst": 1}
    lines.close()


@pytest.mark.parametrize("pieces", [[b"o", b"k", b"\n"], [b"ok\r\n"], [b"ok\n"]])
def test_an_answer_in_pieces(pieces: list[bytes]) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    lines = SocketLines(ours.detach(), {R: False})

    def answer() -> None:
        assert theirs.recv(100) == b"nrst 0\n"
        for piece in pieces:
            theirs.send(piece)

    peer = threading.Thread(target=answer)
    peer.start()
    lines.set(reset=True)
    peer.join(10)
    lines.close()
    theirs.close()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"error: relay 3 stuck\n", "relay 3 stuck"),
        (b"OK\n", '"OK"'),
        (b"\n", 'answered by ""'),
        (b"okay\n", '"okay"'),
        (bytes(300), "more than 200 bytes"),
    ],
)
def test_anything_but_ok_is_a_failure(box: tuple[Box, str], answer: bytes, said: str) -> None:
    lines = open_lines(boxed(box[1]), NO_UART, "bridged")
    box[0].answers = [answer]
    with pytest.raises(LineUnavailable) as caught:
        lines.set(reset=True)
    assert said in caught.value.message
    assert "nrst 0" in caught.value.message
    lines.close()


def test_a_box_that_went_away(box: tuple[Box, str]) -> None:
    lines = open_lines(boxed(box[1]), NO_UART, "bridged")
    assert lines.gone() == ""
    box[0].closing = True
    for _ in range(2):
        with pytest.raises(LineUnavailable):
            lines.set(reset=True)
    assert "closed the connection" in lines.gone()
    lines.close()


def test_a_late_answer_is_not_taken_for_the_next_one(box: tuple[Box, str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = open_lines(boxed(box[1]), NO_UART, "bridged")
    monkeypatch.setattr(module, "ANSWER_TIMEOUT_S", 0.02)
    box[0].answers = [None]
    with pytest.raises(LineUnavailable, match="no answer within"):
        lines.set(reset=True)
    monkeypatch.setattr(module, "ANSWER_TIMEOUT_S", 10.0)
    box[0].answers = [b"ok\nno: BOOT0 is stuck\n"]  # The late one, and the one to the request that follows.
    with pytest.raises(LineUnavailable, match="BOOT0 is stuck"):
        lines.set(boot0=True)
    lines.set(reset=False)
    lines.close()


def test_a_late_answer_that_came_before_the_next_request_settles_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    lines = SocketLines(ours.detach(), {R: False})
    monkeypatch.setattr(module, "ANSWER_TIMEOUT_S", 0.0)
    with pytest.raises(LineUnavailable):
        lines.set(reset=True)
    monkeypatch.setattr(module, "ANSWER_TIMEOUT_S", 10.0)
    theirs.send(b"ok\n" * 2)
    lines.set(reset=False)
    assert theirs.recv(100) == b"nrst 0\nnrst 1\n"
    lines.close()
    theirs.close()


def test_an_answer_that_a_killed_session_left_behind_is_discarded(box: tuple[Box, str]) -> None:
    lines = open_lines(boxed(box[1]), NO_UART, "bridged")
    box[0].answers = [b"ok\nok\n", b"no: stuck\n"]
    lines.set(reset=True)
    with pytest.raises(LineUnavailable, match="stuck"):
        lines.set(reset=False)
    lines.close()


def test_a_box_that_does_not_stop_talking() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                theirs.send(b"ok\n" * 1000)
        lines = SocketLines.of(boxed("/box"), ours.fileno())
        with pytest.raises(LineUnavailable, match="it does not stop talking"):
            lines.set(reset=True)


def test_no_box_there(tmp_path: Path) -> None:
    dead = str(tmp_path / "dead.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(dead)
    rows = [(str(tmp_path / "absent"), "No such file"), (dead, "nobody listens there"), ("/x" * 200, "too long")]
    for path, said in rows:
        with pytest.raises(LineUnavailable) as caught:
            open_lines(boxed(path), NO_UART, "bridged")
        assert said in caught.value.message, path


def test_a_box_that_refuses_idle_leaves_nothing_open(box: tuple[Box, str]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    box[0].answers = [b"no\n"]
    with pytest.raises(LineUnavailable):
        open_lines(boxed(box[1]), NO_UART, "bridged")
    box[0].thread.join(10)  # It ends when it sees the end of the connection: nobody holds our side of it any more.
    assert not box[0].thread.is_alive()
    assert len(os.listdir("/proc/self/fd")) == before


# --- every kind ---------------------------------------------------------------------------------------------------------


def test_nothing_wired_and_boot0_by_hand() -> None:
    for by_hand in (False, True):
        lines = open_lines(config.Lines(kind="none", boot0="by-hand" if by_hand else ""), NO_UART, "bridged")
        again = inherit(json.loads(json.dumps(lines.describe())), lines.fds(), NO_UART)
        assert isinstance(again, NoLines)
        assert (again.has_reset, again.has_boot0, again.has_power) == (False, by_hand, False)
        assert again.boot0_by_hand is by_hand
        again.idle()
        with pytest.raises(LineUnavailable, match="NRST: it is not wired"):
            again.set(reset=True)


def test_a_description_survives_the_way_to_the_session() -> None:
    made: list[Callable[[bool], Lines]] = [
        NoLines,
        lambda by_hand: ModemLines(NO_UART, {R: ("dtr", True)}, by_hand),
        lambda by_hand: SocketLines(9, {R: False, P: True}, by_hand, "/run/box"),
        lambda by_hand: GpioLines([8, 9], {R: (1, 0), P: (0, 3)}, {R: "x:1"}, by_hand),
    ]
    for make, by_hand in itertools.product(made, (False, True)):
        lines = make(by_hand)
        again = inherit(json.loads(json.dumps(lines.describe())), lines.fds(), NO_UART)
        assert type(again) is type(lines)
        assert again.describe() == lines.describe()
        assert again.fds() == lines.fds()


def test_what_the_configuration_and_the_session_say_alike() -> None:
    """The session process does not load ``config``, so this word is written twice."""
    assert module.BY_HAND == BY_HAND


def test_an_unknown_kind_is_a_mistake_of_the_program() -> None:
    with pytest.raises(ValueError, match="telepathy"):
        inherit({"kind": "telepathy", "boot0_by_hand": False}, [], NO_UART)
