"""The serial port: what a pty can show is shown on a pty; what it cannot (parity, modem lines, counters) by a driver with
habits, put behind the one function through which settings travel. Real drivers are proven in the VM test.
That driver is what they share, so they are one file."""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import stat
import struct
import subprocess
import sys
import termios
import threading
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridged.errors import (
    HINTS,
    BaudUnavailable,
    BridgedError,
    LineUnavailable,
    LinkError,
    ParityUnavailable,
    PortBusy,
    PortForbidden,
    PortGone,
)
from bridged.target import holder
from bridged.target import uart as module
from bridged.target.uart import Counters, Uart, driver_name, is_pty_device
from tests.support import take

# From the kernel's headers by a C compiler, not from our code.
TCGETS2, TCSETS2, TIOCGICOUNT, TIOCGEXCL = 0x802C542A, 0x402C542B, 0x545D, 0x80045440
# struct termios2 with CS8|PARENB|CREAD|CLOCAL, once with B115200 and once with BOTHER.
B115200_8E1 = bytes.fromhex("0000000000000000b219000000000000000000000000000100000000000000000000000000c2010000c20100")
B250000_8E1 = bytes.fromhex("0000000000000000b019000000000000000000000000000100000000000000000000000090d0030090d00300")
REAL_IOCTL: Callable[[int, int, Any], int] = fcntl.ioctl


@dataclass
class Pty:
    """Master and path of a pty whose slave nobody has open."""

    master: int
    path: str

    def say(self, data: bytes) -> None:
        assert os.write(self.master, data) == len(data)

    def hear(self, count: int) -> bytes:
        return take(self.master, count)


@pytest.fixture
def line() -> Iterator[Pty]:
    master, slave = pty.openpty()
    path = os.ttyname(slave)
    os.close(slave)
    found = Pty(master, path)
    yield found
    if found.master >= 0:
        os.close(found.master)


@pytest.fixture
def uart(line: Pty) -> Iterator[Uart]:
    port = Uart.open(line.path)
    yield port
    port.close()


# --- bytes --------------------------------------------------------------------------------------------------------------


def test_bytes_pass_unchanged_both_ways(line: Pty, uart: Uart) -> None:
    every = bytes(range(256))
    uart.write_all(every, 1)
    assert line.hear(256) == every
    line.say(every)
    got = b""
    while len(got) < 256:
        assert uart.wait_readable(10)
        got += uart.read(100)
    assert got == every


def test_a_frame_is_one_write(uart: Uart, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter makes a packet of each, and waits between two."""
    written: list[int] = []
    write = os.write

    def noted(fd: int, data: bytes) -> int:
        written.append(len(data))
        return write(fd, data)

    monkeypatch.setattr(os, "write", noted)
    for count in (1, 2, 5, 258):
        uart.write_all(bytes(count), 1)
    assert written == [1, 2, 5, 258]


def test_read_takes_no_more_than_asked_and_never_waits(line: Pty, uart: Uart) -> None:
    assert uart.read(10) == b""
    assert uart.wait_readable(0) is False
    line.say(b"\x79abc")
    assert uart.wait_readable(10)
    assert uart.read(1) == b"\x79"
    assert uart.read(0) == b""
    assert uart.read(10) == b"abc"


def test_a_port_that_takes_nothing_is_told_apart_from_one_that_is_gone(uart: Uart) -> None:
    with pytest.raises(LinkError) as caught:
        uart.write_all(bytes(1 << 20), 0.02)
    assert not isinstance(caught.value, PortGone)
    written = caught.value.facts["written"]
    assert isinstance(written, int)
    assert 0 < written < 1 << 20
    assert f"{written} of {1 << 20}" in caught.value.message


def test_a_full_buffer_is_waited_for(line: Pty, uart: Uart) -> None:
    data = os.urandom(1 << 17)
    heard: list[bytes] = []
    listener = threading.Thread(target=lambda: heard.append(line.hear(len(data))))
    listener.start()
    uart.write_all(data, 10)
    listener.join(10)
    assert heard == [data]


@pytest.mark.parametrize("use", ["read", "write", "wait"])
def test_a_hang_up_is_port_gone(line: Pty, uart: Uart, use: str) -> None:
    line.say(b"last")
    assert uart.wait_readable(10)
    os.close(line.master)
    line.master = -1

    def write() -> None:
        uart.write_all(b"x", 1)

    def read() -> None:
        for _ in range(3):  # What came before the hang-up may still be read; then it is told.
            if use == "read" or uart.wait_readable(10):
                uart.read(100)

    with pytest.raises(PortGone) as caught:
        write() if use == "write" else read()
    assert line.path in caught.value.message
    assert "errno" in caught.value.facts
    uart.close()


# --- format -------------------------------------------------------------------------------------------------------------


def test_any_rate_is_really_set_and_parity_on_a_pty_is_never_claimed(line: Pty, uart: Uart) -> None:
    for baud in (1200, 115200, 123456, 1_000_000):
        uart.set_format(baud, "E")
        seen = bytearray(44)
        fcntl.ioctl(line.master, TCGETS2, seen)
        assert struct.unpack_from("=2I", seen, 36) == (baud, baud)
    assert uart.is_pty
    assert uart.parity_real is False
    facts = uart.describe()
    assert (facts["driver"], facts["parity_real"], facts["baud"], facts["format"]) == ("pty", False, 1_000_000, "8N1")


def test_a_format_makes_the_port_raw_again_and_keeps_what_came(line: Pty, uart: Uart) -> None:
    left = termios.tcgetattr(uart.fd)
    left[0] |= termios.ICRNL | termios.IXON | termios.INPCK | termios.PARMRK
    left[1] |= termios.OPOST
    left[2] |= termios.HUPCL | termios.CRTSCTS
    left[6][termios.VMIN] = 0  # As pyserial does: with it an empty read would not mean a hang-up.
    termios.tcsetattr(uart.fd, termios.TCSANOW, left)
    line.say(b"kept\r")
    assert uart.wait_readable(10)
    uart.set_format(57600, "N", 2)
    iflag, oflag, cflag, lflag, _, _, cc = termios.tcgetattr(uart.fd)
    assert (iflag, oflag, lflag) == (0, 0, 0)
    assert cflag & (termios.HUPCL | termios.CRTSCTS) == 0
    assert cflag & termios.CSTOPB
    assert cflag & termios.CLOCAL
    assert cc[termios.VMIN] in (1, b"\x01")
    assert uart.read(10) == b"kept\n"  # Translated on arrival, under the old settings; not lost.
    line.say(b"raw\r")
    assert uart.wait_readable(10)
    assert uart.read(10) == b"raw\r"
    line.say(b"junk")
    assert uart.wait_readable(10)
    uart.flush_input()
    assert uart.read(10) == b""


@dataclass
class Driver:
    """What the kernel does below ``ioctl``, for one port that is no pty. It knows the requests named here and no others.

    ``habit`` is what this driver makes of the settings that it is given: (cflag, ospeed) to (cflag, ospeed).
    """

    habit: Callable[[int, int], tuple[int, int]] = lambda cflag, speed: (cflag, speed)
    settings: bytes = struct.pack("=8xI24x2I", termios.CS8 | termios.B9600 | termios.HUPCL, 9600, 9600)
    counts: tuple[int, ...] | None = None
    modem: int = termios.TIOCM_DTR | termios.TIOCM_RTS
    has_modem: bool = True
    serial_flags: int | None = None
    discipline: int = 0
    refuse: dict[int, int] = field(default_factory=dict)
    calls: list[int] = field(default_factory=list)

    def __call__(self, fd: int, request: int, argument: Any) -> int:
        assert fd >= 0
        self.calls.append(request)
        if request in self.refuse:
            raise OSError(self.refuse[request], os.strerror(self.refuse[request]))
        match request:
            case 0x802C542A:  # TCGETS2
                argument[:] = self.settings
            case 0x402C542B:  # TCSETS2
                cflag, speed = self.habit(*self._asked(argument))
                self.settings = argument[:8] + struct.pack("=I", cflag) + argument[12:36] + struct.pack("=2I", speed, speed)
            case 0x545D if self.counts is not None:  # TIOCGICOUNT
                argument[:] = struct.pack("=20i", *self.counts)
            case 0x5416 | 0x5417 if self.has_modem:  # TIOCMBIS, TIOCMBIC
                (bits,) = argument
                self.modem = self.modem | bits if request == 0x5416 else self.modem & ~bits
            case 0x541E if self.serial_flags is not None:  # TIOCGSERIAL
                argument[:72] = bytes(range(16)) + struct.pack("=i", self.serial_flags) + bytes(range(20, 72))
            case 0x541F if self.serial_flags is not None:  # TIOCSSERIAL
                assert argument[:16] == bytes(range(16))
                assert argument[20:72] == bytes(range(20, 72)), "only the flags may change"
                (self.serial_flags,) = struct.unpack_from("=i", argument, 16)
            case 0x5424:  # TIOCGETD
                argument[0] = self.discipline
            case 0x540B | 0x540C | 0x540D:  # TCFLSH, TIOCEXCL, TIOCNXCL
                pass
            case _:
                raise OSError(errno.ENOTTY, "Inappropriate ioctl for device")
        return 0

    def _asked(self, block: bytes) -> tuple[int, int]:
        (cflag,) = struct.unpack_from("=I", block, 8)
        (speed,) = struct.unpack_from("=I", block, 40)
        constants = {getattr(termios, f"B{rate}"): rate for rate in (9600, 57600, 115200, 1000000)} | {0o10000: speed}
        assert constants[cflag & 0o10017] == speed, "the constant and the number contradict each other"
        assert cflag >> 16 & 0o10017 == 0, "input speed has to follow output speed"
        return cflag, speed


@pytest.fixture
def put_driver(monkeypatch: pytest.MonkeyPatch, line: Pty) -> Iterator[Callable[[Driver], Uart]]:
    """A port that is no pty as far as anybody can tell; its bytes still travel over one."""
    fd = os.open(line.path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)

    def put(driver: Driver) -> Uart:
        monkeypatch.setattr(module, "_ioctl", driver)
        return Uart.inherit(fd, line.path, is_pty=False)

    yield put
    os.close(fd)


@pytest.mark.parametrize(("baud", "golden"), [(115200, B115200_8E1), (250000, B250000_8E1)])
def test_the_request_to_the_kernel_byte_for_byte(put_driver: Callable[[Driver], Uart], baud: int, golden: bytes) -> None:
    driver = Driver()
    put_driver(driver).set_format(baud, "E")
    assert driver.settings == golden
    assert driver.calls == [TCGETS2, TCSETS2, TCGETS2]


def drops(flags: int) -> Callable[[int, int], tuple[int, int]]:
    return lambda cflag, speed: (cflag & ~flags, speed)


def makes(factor: float) -> Callable[[int, int], tuple[int, int]]:
    return lambda cflag, speed: (cflag, round(speed * factor))


@pytest.mark.parametrize(
    ("habit", "asked", "wrong"),
    [
        (drops(0), (115200, "E", 1), None),
        (drops(0), (57600, "O", 2), None),
        (drops(termios.PARENB), (115200, "N", 1), None),  # The mini UART, asked for what it can.
        (drops(termios.PARENB), (115200, "E", 1), (ParityUnavailable, "8N1")),  # The mini UART, asked for parity.
        (drops(termios.PARENB | termios.PARODD), (115200, "O", 1), (ParityUnavailable, "8N1")),
        (drops(termios.PARODD), (115200, "O", 1), (ParityUnavailable, "8E1")),
        (drops(termios.CSTOPB), (115200, "N", 2), (ParityUnavailable, "8N1")),
        (lambda c, s: (c & ~termios.CSIZE | termios.CS7, s), (115200, "E", 1), (ParityUnavailable, "7E1")),
        (lambda c, s: (c | termios.PARENB, s), (115200, "N", 1), (ParityUnavailable, "8E1")),
        (makes(1.024), (115200, "E", 1), None),
        (makes(0.976), (115200, "E", 1), None),
        (makes(1.026), (115200, "E", 1), (BaudUnavailable, "118195")),
        (makes(0.974), (115200, "E", 1), (BaudUnavailable, "112205")),
        (lambda c, _: (c, 9600), (1_000_000, "E", 1), (BaudUnavailable, "9600")),
        (lambda c, _: (c, 0), (115200, "E", 1), (BaudUnavailable, "0 baud")),
    ],
)
def test_only_what_was_read_back_counts(
    put_driver: Callable[[Driver], Uart],
    habit: Callable[[int, int], tuple[int, int]],
    asked: tuple[int, str, int],
    wrong: tuple[type[LinkError], str] | None,
) -> None:
    uart = put_driver(Driver(habit))
    assert uart.parity_real
    if wrong is None:
        uart.set_format(*asked)
        return
    with pytest.raises(wrong[0]) as caught:
        uart.set_format(*asked)
    assert type(caught.value) is wrong[0]
    assert wrong[1] in caught.value.message
    assert f"{asked[0]} baud 8{asked[1]}{asked[2]}" in caught.value.message


@pytest.mark.parametrize(
    ("number", "expected"), [(errno.EINVAL, BaudUnavailable), (errno.EIO, PortGone), (errno.ENODEV, PortGone)]
)
def test_a_format_that_cannot_be_set(put_driver: Callable[[Driver], Uart], number: int, expected: type[BridgedError]) -> None:
    with pytest.raises(expected):
        put_driver(Driver(refuse={TCSETS2: number})).set_format(115200, "E")


@given(baud=st.integers(300, 4_000_000), parity=st.sampled_from("NEO"), stop_bits=st.sampled_from([1, 2]))
def test_an_honest_port_takes_every_format(baud: int, parity: str, stop_bits: int) -> None:
    settings = bytes(44)

    def honest(_: int, request: int, argument: Any) -> int:
        nonlocal settings
        if request == TCSETS2:
            settings = argument
        else:
            assert request == TCGETS2
            argument[:] = settings
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_ioctl", honest)
        Uart.inherit(0, "/dev/ttyX", False).set_format(baud, parity, stop_bits)
    (cflag,) = struct.unpack_from("=I", settings, 8)
    assert struct.unpack_from("=2I", settings, 36) == (baud, baud)
    assert bool(cflag & termios.PARENB) == (parity != "N")
    assert bool(cflag & termios.PARODD) == (parity == "O")
    assert bool(cflag & termios.CSTOPB) == (stop_bits == 2)


# --- counters, modem lines, latency -------------------------------------------------------------------------------------


def test_counters_and_their_difference(put_driver: Callable[[Driver], Uart]) -> None:
    wrapped = -1  # The kernel counts in 32 bits and shows them as signed.
    driver = Driver(counts=(9, 9, 9, 9, 100, 200, 1, 2, wrapped, 4, 5, *[9] * 9))
    uart = put_driver(driver)
    before = uart.counters()
    driver.counts = (8, 8, 8, 8, 164, 201, 1, 3, 63, 4, 7, *[8] * 9)
    after = uart.counters()
    assert before is not None
    assert after is not None
    assert after - before == Counters(rx=64, tx=1, frame=0, overrun=1, parity=64, brk=0, buf_overrun=2)
    assert (after - before).errors == 67


def test_a_port_without_counters_and_without_modem_lines_says_so(uart: Uart) -> None:
    assert uart.counters() is None
    for dtr, rts in ((True, None), (False, None), (None, True), (True, False)):
        with pytest.raises(LineUnavailable, match="no modem lines"):
            uart.set_modem(dtr, rts)
    uart.set_modem(None, None)  # Nothing asked, nothing that could fail.


def test_modem_lines_move_as_told_and_only_those(put_driver: Callable[[Driver], Uart]) -> None:
    driver = Driver(modem=termios.TIOCM_DTR | termios.TIOCM_RTS | termios.TIOCM_CTS)
    uart = put_driver(driver)
    kept = termios.TIOCM_CTS
    rows = [
        (False, None, kept | termios.TIOCM_RTS, 1),
        (None, False, kept, 1),
        (True, True, kept | termios.TIOCM_DTR | termios.TIOCM_RTS, 1),
        (False, True, kept | termios.TIOCM_RTS, 2),
        (True, False, kept | termios.TIOCM_DTR, 2),
        (False, False, kept, 1),
    ]
    for dtr, rts, expected, calls in rows:
        driver.calls.clear()
        uart.set_modem(dtr, rts)
        assert (driver.modem, len(driver.calls)) == (expected, calls), (dtr, rts)


def test_a_vanished_adapter_is_port_gone_from_every_call(put_driver: Callable[[Driver], Uart]) -> None:
    gone = dict.fromkeys((TCGETS2, TCSETS2, TIOCGICOUNT, 0x5416, 0x5417, 0x540B, 0x5411), errno.ENODEV)
    uart = put_driver(Driver(refuse=gone))
    for call in (
        lambda: uart.set_format(9600, "N"),
        uart.counters,
        lambda: uart.set_modem(dtr=True),
        uart.flush_input,
        uart.discard_output,
    ):
        with pytest.raises(PortGone):
            call()
    assert uart.describe()["path"] == uart.path


@pytest.mark.parametrize(("flags", "expected"), [(0x11000040, 0x11002040), (0x2040, 0x2040), (None, None)])
def test_low_latency_where_the_driver_has_it(
    monkeypatch: pytest.MonkeyPatch, line: Pty, flags: int | None, expected: int | None
) -> None:
    driver = Driver(serial_flags=flags)
    monkeypatch.setattr(module, "_ioctl", driver)
    monkeypatch.setattr(module, "is_pty_device", lambda _: False)
    uart = Uart.open(line.path)
    assert uart.low_latency is (flags is not None)
    assert driver.serial_flags == expected
    uart.close()


# --- opening ------------------------------------------------------------------------------------------------------------


def is_exclusive(fd: int) -> bool:
    flag = array("i", [0])
    fcntl.ioctl(fd, TIOCGEXCL, flag)
    return bool(flag[0])


def test_a_port_is_exclusive_until_it_is_closed(monkeypatch: pytest.MonkeyPatch, line: Pty) -> None:
    """The flag is the device's: left behind it keeps everybody out, us too, while anybody still has the device open."""
    monkeypatch.setattr(module, "is_pty_device", lambda _: False)
    monkeypatch.setattr(module, "find_holder", lambda *_args, **_more: None)
    other = os.open(line.path, os.O_RDWR | os.O_NOCTTY)
    try:
        uart = Uart.open(line.path)
        assert is_exclusive(other)
        uart.close()
        assert not is_exclusive(other)
    finally:
        os.close(other)


def test_a_pty_is_not_made_exclusive_since_the_flag_would_outlive_a_kill(uart: Uart) -> None:
    assert not is_exclusive(uart.fd)


def test_opening_takes_the_port_for_ourselves_and_leaves_no_trap_at_close(line: Pty, uart: Uart) -> None:
    assert not termios.tcgetattr(uart.fd)[2] & termios.HUPCL
    assert os.get_blocking(uart.fd) is False
    assert os.get_inheritable(uart.fd) is False
    with pytest.raises(PortBusy) as caught:
        Uart.open(line.path)
    assert caught.value.facts["pid"] == os.getpid()
    uart.close()
    uart.close()
    Uart.open(line.path).close()


CHILD = """
import fcntl, os, sys
from bridged.errors import BridgedError
from bridged.target.uart import Uart
how, path, user = sys.argv[1:]
if user != "same":
    os.setgroups([]); os.setgid(int(user)); os.setuid(int(user))
if how == "plain":
    fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    print("holding", flush=True)
    sys.stdin.read()
else:
    try:
        uart = Uart.open(path)
        uart.set_format(57600, "N")
        print("holding", flush=True)
        sys.stdin.read()
    except BridgedError as error:
        print(type(error).__name__, error.message, flush=True)
"""


def child(how: str, path: str, user: str = "same") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, how, path, user], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_a_port_of_another_process_is_busy_named_and_untouched(line: Pty) -> None:
    with child("careful", line.path) as holder:
        assert first_line(holder) == "holding\n"
        with pytest.raises(PortBusy) as caught:
            Uart.open(line.path)
        assert caught.value.facts["pid"] == holder.pid
        assert str(holder.pid) in caught.value.message
        assert str(caught.value.facts["command"]).startswith("python")
        assert termios.tcgetattr(line.master)[5] == termios.B57600
        holder.kill()
    Uart.open(line.path).close()  # A killed holder leaves no lock behind.


def test_a_holder_that_locks_nothing_is_found_too_but_on_a_pty_it_may_be_the_simulator(
    line: Pty, monkeypatch: pytest.MonkeyPatch
) -> None:
    with child("plain", line.path) as holder:
        assert first_line(holder) == "holding\n"
        Uart.open(line.path).close()
        monkeypatch.setattr(module, "is_pty_device", lambda _: False)
        with pytest.raises(PortBusy) as caught:
            Uart.open(line.path)
        assert caught.value.facts["pid"] == holder.pid
        holder.kill()


@pytest.mark.parametrize(
    ("text", "busy"),
    [("{other:10}\n", True), ("{other:10} minicom\n", True), ("{dead:10}\n", False), ("", False), ("0\n", False)],
)
def test_a_lock_file_counts_as_long_as_its_process_lives(
    line: Pty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, busy: bool
) -> None:
    """As of minicom, ser2net and pppd: also those of another user, whose open files may not be seen."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    monkeypatch.setattr(module, "is_pty_device", lambda _: False)
    monkeypatch.setattr(module, "find_holder", lambda *_args, **_more: None)
    monkeypatch.setattr(holder, "_LOCKS", str(tmp_path))
    link = tmp_path / "motor1"
    link.symlink_to(line.path)
    (tmp_path / f"LCK..{Path(line.path).name}").write_text(text.format(other=os.getppid(), dead=dead.pid))
    if not busy:
        Uart.open(str(link)).close()
        return
    with pytest.raises(PortBusy, match="locked, says its file") as caught:
        Uart.open(str(link))
    assert caught.value.facts["pid"] == os.getppid()


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it becomes another user")
NOBODY = "65534"


@needs_root
@pytest.mark.usefixtures("uart")
def test_another_user_is_stopped_by_the_kernel(line: Pty) -> None:
    os.chmod(line.path, 0o666)
    with child("careful", line.path, NOBODY) as other:
        assert first_line(other).startswith("PortBusy ")


@needs_root
def test_no_permission_is_told_with_the_group(line: Pty) -> None:
    os.chmod(line.path, 0o600)
    with child("careful", line.path, NOBODY) as other:
        said = first_line(other)
    assert said.startswith("PortForbidden ")
    assert NOBODY in said
    assert "dialout" in HINTS[PortForbidden.code].remedy


def test_a_lock_survives_inheritance(line: Pty) -> None:
    """The daemon may die while a session holds the port: the next daemon has to wait for that session."""
    uart = Uart.open(line.path)
    session = os.dup(uart.fd)
    uart.close()
    with pytest.raises(PortBusy):
        Uart.open(line.path)
    inherited = Uart.inherit(session, line.path, True)
    inherited.write_all(b"still", 1)
    assert line.hear(5) == b"still"
    inherited.close()
    Uart.open(line.path).close()


def test_what_is_no_serial_port(tmp_path: Path) -> None:
    plain = tmp_path / "file"
    plain.write_bytes(b"x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    rows: list[tuple[str, type[LinkError]]] = [
        (str(tmp_path / "absent"), PortGone),
        (str(plain), LinkError),
        (str(tmp_path), LinkError),
        (str(tmp_path / "loop"), LinkError),
        ("/dev/null", LinkError),
    ]
    for path, expected in rows:
        with pytest.raises(LinkError) as caught:
            Uart.open(path)
        assert type(caught.value) is expected, path
        assert path in caught.value.message
    assert plain.read_bytes() == b"x"


@pytest.mark.parametrize(
    ("driver", "expected"),
    [
        (Driver(discipline=15), PortBusy),  # N_HCI: Bluetooth sits on the PL011 of a Raspberry Pi
        (Driver(refuse={TCGETS2: errno.EIO}), PortGone),  # ttyS3 without hardware
        (Driver(refuse={TCSETS2: errno.ENODEV}), PortGone),
        (Driver(refuse={0x5424: errno.ENOTTY}), LinkError),
    ],
)
def test_opening_fails_whole(monkeypatch: pytest.MonkeyPatch, line: Pty, driver: Driver, expected: type[BridgedError]) -> None:
    before = set(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(module, "_ioctl", driver)
    monkeypatch.setattr(module, "is_pty_device", lambda _: False)
    with pytest.raises(LinkError) as caught:
        Uart.open(line.path)
    assert type(caught.value) is expected
    assert set(os.listdir("/proc/self/fd")) == before


def test_only_the_owner_discards_output_at_close(monkeypatch: pytest.MonkeyPatch, line: Pty) -> None:
    seen: list[tuple[int, Any]] = []

    def watched(fd: int, request: int, argument: Any) -> int:
        seen.append((request, argument))
        return REAL_IOCTL(fd, request, argument)

    uart = Uart.open(line.path)
    inherited = Uart.inherit(os.dup(uart.fd), line.path, True)
    monkeypatch.setattr(module, "_ioctl", watched)
    inherited.close()
    assert seen == []
    uart.close()
    assert seen == [(termios.TCFLSH, termios.TCOFLUSH), (termios.TIOCNXCL, 0)]


def test_a_pty_is_known_by_its_number() -> None:
    master, slave = pty.openpty()
    try:
        assert is_pty_device(os.fstat(slave).st_rdev)
        assert is_pty_device(os.fstat(master).st_rdev)
    finally:
        os.close(master)
        os.close(slave)
    for major, minor in ((4, 64), (188, 0), (166, 0), (204, 64), (5, 0)):  # ttyS0, ttyUSB0, ttyACM0, ttyAMA0, tty
        assert not is_pty_device(os.makedev(major, minor)), (major, minor)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize(
    ("links", "expected"),
    [
        (["uart-pl011"], "uart-pl011"),  # before Linux 6.5
        (["port", "ctrl", "bcm2835-aux-uart"], "bcm2835-aux-uart"),  # since then, with the bus serial-base in between
        (["port", "ctrl", None], ""),
        ([None], ""),
    ],
)
def test_driver_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: list[str | None], expected: str) -> None:
    device = tmp_path / "devices"
    for name in reversed(links):
        device /= "node"
        device.mkdir(parents=True)
        if name is not None:
            (device / "driver").symlink_to(f"../../bus/drivers/{name}")
    tty = tmp_path / "char" / "204:64"
    tty.mkdir(parents=True)
    (tty / "device").symlink_to(device)
    monkeypatch.setattr(module, "_SYS_CHAR", str(tmp_path / "char"))
    assert driver_name(os.makedev(204, 64)) == expected
    assert driver_name(os.makedev(204, 65)) == ""
