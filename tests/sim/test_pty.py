"""Real time: the pty, the line box and the command line. Waits are for events with generous limits, never for a time."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bridged.errors import LinkError
from bridged.sim.application import Behaviour
from bridged.sim.device import Device, Mode
from bridged.sim.loader import Timing
from bridged.sim.pty import PtyDevice
from tests.sim.dialogue import bootable, frame, make
from tests.support import take

LIMIT_S = 20.0  # for what takes milliseconds, on a machine that is busy with something else


@pytest.fixture
def box_path(tmp_path: Path) -> Path:
    return tmp_path / "box"


@contextmanager
def port(path: str | Path, baud: int = termios.B115200) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    try:
        tty.setraw(fd)
        settings = termios.tcgetattr(fd)
        settings[4] = settings[5] = baud
        termios.tcsetattr(fd, termios.TCSANOW, settings)
        yield fd
    finally:
        os.close(fd)


@contextmanager
def line_box(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(LIMIT_S)
        sock.connect(str(path))
        yield sock


def command(sock: socket.socket, *lines: str) -> list[str]:
    sock.sendall("".join(f"{line}\n" for line in lines).encode())
    answer = b""
    while answer.count(b"\n") < len(lines):
        data = sock.recv(1000)
        assert data
        answer += data
    return answer.decode().splitlines()


def enter(sock: socket.socket) -> None:
    assert command(sock, "boot0 1", "nrst 0", "nrst 1") == ["ok", "ok", "ok"]


def wait_for(runner: PtyDevice, mode: Mode) -> None:
    deadline = time.monotonic() + LIMIT_S
    while True:
        with runner.lock:
            now = runner.device.mode
        if now is mode:
            return
        assert time.monotonic() < deadline, now
        select.select([], [], [], 0.002)


def off(chip: str = "F407", **options: object) -> Device:
    """Made without power: the pty switches it on."""
    return make(chip, powered=False, **options)


def test_a_host_enters_the_loader_by_the_line_box_and_talks(box_path: Path) -> None:
    with PtyDevice(off(), lines_path=box_path) as runner, port(runner.path) as fd, line_box(box_path) as sock:
        enter(sock)
        wait_for(runner, Mode.MEASURING)
        os.write(fd, b"\x7f")
        assert take(fd, 1) == b"\x79"
        os.write(fd, b"\x00\xff")
        assert take(fd, 15) == bytes.fromhex("790b310001021121314463738292 79")
        assert runner.device.stats.overruns == 0


def test_bytes_are_paced_at_the_rate_of_the_host(box_path: Path) -> None:
    """A 256-byte read at 57600 needs 268 byte times and is never faster."""
    with PtyDevice(off(), lines_path=box_path) as runner, port(runner.path, termios.B57600) as fd, line_box(box_path) as sock:
        enter(sock)
        wait_for(runner, Mode.MEASURING)
        os.write(fd, b"\x7f")
        assert take(fd, 1) == b"\x79"
        start = time.monotonic()
        for data, count in ((b"\x11\xee", 1), (frame("08 00 00 00 sum"), 1), (b"\xff\x00", 257)):
            os.write(fd, data)
            assert len(take(fd, count)) == count
        assert time.monotonic() - start >= 268 * 11 / 57600
        assert round(runner.device.baud) == 57600


def test_unpaced_bytes_take_no_time_but_erases_do(box_path: Path) -> None:
    device = off(timing=Timing(sector_erase_s=0.3, startup_s=0.05))
    with (
        PtyDevice(device, lines_path=box_path, paced=False) as runner,
        line_box(box_path) as sock,
        port(runner.path, termios.B1200) as fd,
    ):
        enter(sock)
        wait_for(runner, Mode.MEASURING)
        os.write(fd, b"\x7f")
        assert take(fd, 1) == b"\x79"
        start = time.monotonic()
        for _ in range(4):
            for data, count in ((b"\x11\xee", 1), (frame("08 00 00 00 sum"), 1), (b"\xff\x00", 257)):
                os.write(fd, data)
                assert len(take(fd, count)) == count
        assert time.monotonic() - start < 4 * 268 * 11 / 1200  # 9.8 s on a wire
        os.write(fd, b"\x44\xbb")
        assert take(fd, 1) == b"\x79"
        start = time.monotonic()
        os.write(fd, frame("00 00 00 01 sum"))
        assert take(fd, 1) == b"\x79"
        assert time.monotonic() - start >= 0.29


def test_the_application_prints_and_answers(box_path: Path) -> None:
    device = off()
    device.memory.load_flash(bootable(device.chip, banner=b"version 3"))
    with PtyDevice(device, lines_path=box_path) as runner, port(runner.path) as fd:
        assert take(fd, 11) == b"version 3\r\n"
        os.write(fd, b"who\r")
        assert take(fd, 8) == b"ok who\r\n"


def test_an_application_at_another_rate_is_noise() -> None:
    device = off(application=Behaviour(baud=9600, startup_s=0.3))
    device.memory.load_flash(bootable(device.chip, banner=b"version 3"))
    with PtyDevice(device) as runner, port(runner.path) as fd:
        found = take(fd, 1)
        assert found
        assert b"v" not in found


def test_closing_the_line_box_makes_the_lines_idle(box_path: Path) -> None:
    device = off()
    device.memory.load_flash(bootable(device.chip))
    with PtyDevice(device, lines_path=box_path) as runner:
        with line_box(box_path) as sock:
            assert command(sock, "boot0 1", "nrst 0") == ["ok", "ok"]
            with runner.lock:
                assert (device.lines["nrst"], device.lines["boot0"]) == (False, True)
        wait_for(runner, Mode.APPLICATION)
        with runner.lock:
            assert device.lines == {"nrst": True, "boot0": False, "boot1": False, "power": True}


def test_power_by_the_line_box(box_path: Path) -> None:
    with PtyDevice(off(), lines_path=box_path) as runner, line_box(box_path) as sock:
        assert command(sock, "power 0") == ["ok"]
        wait_for(runner, Mode.OFF)
        assert command(sock, "boot0 1", "power 1") == ["ok", "ok"]
        wait_for(runner, Mode.MEASURING)


def test_the_line_box_tells_what_the_application_says_by_lines(box_path: Path) -> None:
    device = off(application=Behaviour(safe_after_s=3600))
    device.memory.program(device.memory.base, bootable(device.chip))
    with PtyDevice(device, lines_path=box_path) as runner, line_box(box_path) as sock:
        assert command(sock, "nrst 0", "safe ?", "alive ?") == ["ok", "0", "0"], "no application runs"
        assert command(sock, "nrst 1") == ["ok"]
        wait_for(runner, Mode.APPLICATION)
        assert command(sock, "safe ?", "alive ?") == ["0", "1"]


@pytest.mark.parametrize("line", ["nrst", "nrst 2", "reset 1", "nrst 0 1", "", "boot1 1", "\u00ff"])
def test_a_line_box_answers_nonsense_with_an_error(box_path: Path, line: str) -> None:
    with PtyDevice(off(), lines_path=box_path), line_box(box_path) as sock:
        (answer,) = command(sock, line)
        assert answer.startswith("error ")
        assert command(sock, "boot0 0") == ["ok"]


def test_a_line_without_end_closes_the_connection(box_path: Path) -> None:
    with PtyDevice(off(), lines_path=box_path), line_box(box_path) as sock:
        sock.sendall(b"n" * 1000)
        assert sock.recv(100) == b""


def test_links_and_sockets_are_made_and_removed(tmp_path: Path) -> None:
    link, box = tmp_path / "link", tmp_path / "box"
    link.symlink_to("/nowhere")
    with PtyDevice(off(), link=link, lines_path=box) as runner:
        assert os.readlink(link) == runner.path
        assert box.is_socket()
    assert not link.is_symlink()
    assert not box.exists()


def test_what_is_no_link_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(LinkError):
        PtyDevice(off(), link=path).start()
    assert path.read_text() == "data"


def test_flash_survives_in_its_file(tmp_path: Path) -> None:
    file = tmp_path / "flash"
    device = off()
    device.memory.load_flash(bootable(device.chip))
    with PtyDevice(device, flash_file=file):
        pass
    assert file.read_bytes() == bytes(device.memory.flash)
    again = off()
    with PtyDevice(again, flash_file=file) as runner, port(runner.path) as fd:
        # Not the banner: on a busy machine it may have been said, or half said, before this port was open.
        wait_for(runner, Mode.APPLICATION)
        os.write(fd, b"ping\n")
        heard = b""
        while b"ok ping\r\n" not in heard and (more := take(fd, 1)):
            heard += more
        assert heard.endswith(b"ok ping\r\n")


def test_a_host_that_hangs_up_finds_the_device_again() -> None:
    device = off()
    device.memory.load_flash(bootable(device.chip))
    with PtyDevice(device) as runner:
        for text in (b"one", b"two"):
            with port(runner.path) as fd:
                wait_for(runner, Mode.APPLICATION)
                termios.tcflush(fd, termios.TCIFLUSH)
                os.write(fd, text + b"\n")
                deadline = time.monotonic() + LIMIT_S
                found = b""
                while b"ok " + text + b"\r\n" not in found:
                    assert time.monotonic() < deadline
                    found += take(fd, 1)


# --- the command line -----------------------------------------------------------------------------------------------


def simulator(*arguments: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "bridged.sim.main", *arguments]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_command_line(tmp_path: Path, number: signal.Signals) -> None:
    links = [tmp_path / "a", tmp_path / "b"]
    box = tmp_path / "box"
    process = simulator(
        "--chip", "F756", "--chip", "L476", "--link", str(links[0]), "--link", str(links[1]), "--lines", str(box),
        "--boot", "loader", "--startup-s", "0.01", "--rate-error", "0", "--erase-s", "never", "--mass-erase-s", "1.5",
        "--option", "nBOOT1=1", "--fault", "lose:rx:99", "--seed", "3",
    )  # fmt: skip
    assert process.stdout is not None
    try:
        lines = [process.stdout.readline() for _ in range(3)]
        first, second = (dict(word.split("=", 1) for word in line.split()) for line in lines[:2])
        assert lines[2] == "ready\n"
        assert (first["device"], first["chip"], first["link"], first["lines"]) == ("0", "F756", str(links[0]), str(box))
        assert (second["device"], second["chip"], second["link"]) == ("1", "L476", str(links[1]))
        assert "lines" not in second
        for link, words, pid in ((links[0], first, b"\x04\x49"), (links[1], second, b"\x04\x15")):
            assert os.readlink(link) == words["pty"]
            with port(link) as fd:
                answer = b""
                deadline = time.monotonic() + LIMIT_S
                while not answer.endswith(b"\x79"):  # it may still start up; then the byte is lost
                    assert time.monotonic() < deadline
                    os.write(fd, b"\x7f")
                    answer = take(fd, 1, within_s=0.5)
                os.write(fd, b"\x02\xfd")
                assert take(fd, 5) == b"\x79\x01" + pid + b"\x79"
    finally:
        process.send_signal(number)
        _, errors = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, errors) == (0, "")
    assert not links[0].is_symlink()
    assert not box.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--chip", "F756", "--fault", "explode:rx:1"), "explode:rx:1"),
        (("--chip", "Z80"), "Z80"),
        (("--chip", "F756", "--option", "nonsense=1"), "nonsense"),
        (("--chip", "F756", "--option", "nonsense"), "NAME=VALUE"),
        (("--chip", "F756", "--flash-kib", "123456"), "126418944"),
        ((), "--chip"),
    ],
)
def test_mistakes_on_the_command_line(arguments: tuple[str, ...], words: str) -> None:
    process = simulator(*arguments)
    out, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 2
    assert words in errors
    assert "Traceback" not in errors
    assert out == ""


def test_help_lists_the_faults() -> None:
    process = simulator("--help")
    out, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0
    assert "misprogram:ADDRESS" in out
