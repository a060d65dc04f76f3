"""``bridged init`` on the machines of the doctor's tests: what it sees, what it asks, what it writes, what it refuses."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from bridged import chips, config, init
from bridged.config.file import load
from bridged.doctor import boards
from tests.target.test_gpio import Chip as GpioChip
from tests.test_doctor import FT232, HEALTHY, STLINK, Fake

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Gateway:
    """One machine, its configuration file, and the person at its terminal. ``lines``: what was said to that person."""

    machine: Fake
    file: Path
    capture: pytest.CaptureFixture[str]
    asked: list[str] = field(default_factory=list)
    out: str = ""
    err: str = ""

    def run(self, *argv: str, answers: list[str] | None = None) -> int:
        """``answers`` None: nobody is there. An answer may be empty: the default."""
        left: Iterator[str] = iter(answers or [])
        self.asked.clear()

        def ask(question: str) -> str:
            self.asked.append(question)
            try:
                return next(left)
            except StopIteration:
                raise EOFError from None

        words = [*argv, "--config", str(self.file)]
        try:
            code = init.main(words + (["--defaults"] if answers is None else []), self.machine, ask)
        except SystemExit as error:
            code = int(error.code or 0)
        said = self.capture.readouterr()
        self.out, self.err = said.out, said.err
        assert not list(left), "a question that was expected was not asked"
        return code

    def target(self, name: str) -> config.Target:
        return load(self.file, check_chip=chips.wrong_choice).targets[name]


Make = Callable[[str], Gateway]


@pytest.fixture
def gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Make:
    def made(name: str) -> Gateway:
        root = tmp_path / name
        root.mkdir()
        machine = Fake(root)
        HEALTHY[name](machine)
        gpio = getattr(machine, "gpio", None)
        monkeypatch.setitem(sys.modules, "gpiod", gpio.module() if gpio else None)
        return Gateway(machine, root / "bridged.toml", capsys)

    return made


# --- by itself --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pi3", "pi4", "pi5"])
def test_on_a_pi_everything_but_the_chip_is_seen(gateway: Make, name: str) -> None:
    pi = gateway(name)
    assert pi.run("--chip", "NUCLEO-F756ZG") == 0, pi.out
    made = pi.target("nucleo-f756zg")
    assert (made.port, made.chip) == ("/dev/ttyAMA0", "F756")
    assert (made.lines.kind, made.lines.nrst, made.lines.boot0) == ("gpio", "GPIO17", "GPIO27")
    assert "use PC10/PC11" in pi.file.read_text(), "the traps of the board"
    assert "sudo systemctl restart bridged   and then   bridged id nucleo-f756zg" in pi.out
    assert "0 problem" not in pi.out
    assert " ok" in pi.out, "doctor had a look"


def test_without_a_chip_whatever_answers_is_accepted(gateway: Make) -> None:
    pi = gateway("pi4")
    assert pi.run() == 0
    assert pi.target("target").chip == ""
    other = gateway("pi5")
    other.machine.state("bridged.service", "inactive", "disabled")
    other.run()
    assert "sudo systemctl enable --now bridged" in other.out


def test_on_a_pc_the_adapter_has_its_stable_name_and_its_modem_lines(gateway: Make) -> None:
    pc = gateway("pc")
    assert pc.run("motor1", "--chip", "F407") == 0, pc.out + pc.err
    made = pc.target("motor1")
    assert made.port.startswith("/dev/serial/by-id/usb-FTDI")
    assert (made.lines.kind, made.lines.nrst, made.lines.boot0) == ("modem", "dtr", "rts")


def test_an_st_link_has_no_lines(gateway: Make) -> None:
    bench = gateway("bench")
    bench.run("--chip", "NUCLEO-L476RG")
    made = bench.target("nucleo-l476rg")
    assert made.port == "/dev/serial/by-id/usb-STLINK"
    assert made.lines.kind == "none"


def test_lines_that_are_called_so_are_meant(gateway: Make) -> None:
    """An industrial gateway whose device tree names them."""
    pi = gateway("pi4")
    pi.machine.write("/proc/device-tree/model", "Some Gateway\0")
    pi.machine.gpio.add("gpiochip1", GpioChip("board", ["NRST", "BOOT0"]))  # type: ignore[attr-defined]
    assert pi.run("--chip", "F407") == 0, pi.out
    assert pi.target("f407").lines.nrst == "NRST"


# --- asking -----------------------------------------------------------------------------------------------------------


def test_what_is_asked_has_a_default_and_what_has_a_flag_is_not_asked(gateway: Make) -> None:
    pi = gateway("pi4")
    assert pi.run(answers=["", "NUCLEO-H743ZI", "", "", "", ""]) == 0, pi.out
    assert [question.split(" ")[0] for question in pi.asked] == ["Which", "Chip", "How", "NRST", "BOOT0", "Name"]
    assert pi.target("nucleo-h743zi").chip == "H743"
    assert "/dev/ttyAMA0" in pi.out
    again = gateway("pi5")
    flags = ["motor1", "--port", "/dev/ttyAMA0", "--chip", "F407", "--lines", "gpio", "--nrst", "pin:11", "--boot0", "pin:13"]
    assert again.run(*flags, answers=[]) == 0, again.out
    assert again.asked == []
    assert again.target("motor1").lines.nrst == "pin:11"


def test_a_wrong_answer_is_explained_and_asked_again(gateway: Make) -> None:
    pi = gateway("pi4")
    answers = ["7", "ttyAMA0", "1", "F999", "F4", "F407", "wires", "none", "motor1"]
    assert pi.run(answers=answers) in (0, 1)
    for text in ("a number from 1 to 1", "no chip is called 'F999'", "may be any of", "one of gpio, modem, none"):
        assert text in pi.out
    assert pi.target("motor1").lines.kind == "none"


def test_two_adapters_are_never_guessed_between(gateway: Make) -> None:
    pc = gateway("pc")
    pc.machine.usb("ttyUSB1", {**FT232, "serial": "B"}, socket_name="1-2")
    assert pc.run("--chip", "F407") == 2
    assert "--port" in pc.err
    assert "/dev/ttyUSB1" in pc.err
    assert not pc.file.exists()
    # A person may say; the numbers are those of the list.
    assert pc.run("--chip", "F407", "--lines", "none", answers=["2", ""]) in (0, 1)
    assert pc.target("f407").port == "/dev/ttyUSB1"


def test_nobody_answers_any_more(gateway: Make) -> None:
    pi = gateway("pi4")
    assert pi.run(answers=[""]) == 2
    assert "--chip" in pi.err
    assert not pi.file.exists()


# --- ports that lead nowhere ------------------------------------------------------------------------------------------


def test_the_mini_uart_is_not_offered_and_the_remedy_is_for_this_model(gateway: Make) -> None:
    pi = gateway("pi4")
    pi.machine.at("/dev/ttyAMA0").unlink()
    pi.machine.at("/sys/class/tty/ttyAMA0/device").unlink()
    pi.machine.tty("ttyS0", "/sys/devices/platform/soc/fe215040.serial", "bcm2835-aux-uart", 4, kind="4")
    pi.machine.link("/dev/serial0", "/dev/ttyS0")
    assert pi.run("--chip", "F407") == 2
    assert "no parity" in pi.err
    pi.run("--chip", "F407", answers=[])
    assert "dtoverlay=disable-bt" in pi.out
    assert not pi.file.exists()


def test_bluetooth_and_debug_connector_are_not_offered(gateway: Make) -> None:
    pi = gateway("pi3")
    pi.machine.at("/dev/serial0").unlink()
    pi.machine.link("/dev/serial1", "/dev/ttyAMA0")
    assert pi.run("--chip", "F407") == 2
    assert "Bluetooth" in pi.err
    five = gateway("pi5")
    five.machine.at("/sys/class/tty/ttyAMA0/device").unlink()
    assert five.run("--chip", "F407") == 2
    assert "debug connector" in five.err
    five.run("--chip", "F407", answers=[])
    assert "dtparam=uart0=on" in five.out


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_second_target_is_added_and_the_rest_stays_to_the_byte(gateway: Make) -> None:
    pi = gateway("pi4")
    old = '# mine\n[gateway]\nname = "shed"   # not the barn\n' + pi.machine.configuration
    pi.file.write_text(old)
    pi.file.chmod(0o640)
    pi.machine.usb("ttyUSB0", FT232)
    pi.machine.link("/dev/serial/by-id/usb-FTDI", "/dev/ttyUSB0")
    assert pi.run("--chip", "F407", "--lines", "gpio") == 0, pi.out + pi.err
    text = pi.file.read_text()
    assert text.startswith(old.rstrip())
    made = pi.target("f407")
    assert made.port == "/dev/serial/by-id/usb-FTDI", "the UART of the header is taken"
    assert (made.lines.nrst, made.lines.boot0) == ("GPIO22", "GPIO23"), "so are the lines"
    assert stat.S_IMODE(pi.file.stat().st_mode) == 0o640
    assert [path.name for path in pi.file.parent.glob(".bridged*")] == [], "nothing is left beside it"


def test_the_reference_configuration_of_the_package_is_a_beginning(gateway: Make) -> None:
    pi = gateway("pi4")
    reference = (ROOT / "config" / "bridged.toml").read_text()
    pi.file.write_text(reference)
    assert pi.run("--chip", "F407") == 0, pi.out
    assert pi.file.read_text().startswith(reference.rstrip())


@pytest.mark.parametrize(
    ("old", "argv", "code", "said"),
    [
        ("[targets.a]\n", ["--chip", "F407"], 1, "mistakes"),
        ("nonsense", ["--chip", "F407"], 1, "mistakes"),
        ('[targets.a]\nport = "/dev/x"\n', ["a", "--chip", "F407"], 2, "already"),
        ("", ["--chip", "F999"], 1, "F999"),
        ("", ["a b", "--chip", "F407"], 1, "as it was"),
        ("", ["--chip", "F407", "--port", 'x"y'], 1, "as it was"),
        ("targets = {}\n", ["--chip", "F407"], 1, "as it was"),
    ],
)
def test_what_cannot_be_leaves_the_file_as_it_was(gateway: Make, old: str, argv: list[str], code: int, said: str) -> None:
    pi = gateway("pi4")
    if old:
        pi.file.write_text(old)
    assert pi.run(*argv) == code, pi.out + pi.err
    assert said in pi.err
    assert (pi.file.read_text() if old else pi.file.exists()) == (old or False)


def test_printing_writes_nothing(gateway: Make) -> None:
    pi = gateway("pi4")
    assert pi.run("--chip", "F407", "--print") == 0
    assert load(pi.out).targets["f407"].chip == "F407"
    assert not pi.file.exists()


def test_problems_of_the_machine_are_told_at_the_end(gateway: Make) -> None:
    pi = gateway("pi4")
    pi.machine.state("serial-getty@ttyAMA0.service", "active", "enabled")
    assert pi.run("--chip", "F407") == 1
    assert "login prompt" in pi.out
    assert pi.file.exists(), "it is the machine that has to change"
    same = gateway("pi5")
    assert same.run("--chip", "F407", "--lines", "gpio", "--nrst", "GPIO17", "--boot0", "pin:11") == 1
    assert "same line" in same.out


def test_a_file_that_may_not_be_written(gateway: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pi = gateway("pi4")

    def forbidden(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkstemp", forbidden)
    assert pi.run("--chip", "F407") == 77
    assert "Permission denied" in pi.err


def test_a_write_that_fails_leaves_nothing_behind(gateway: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pi = gateway("pi4")
    pi.file.write_text("# mine\n")

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fails)
    assert pi.run("--chip", "F407") == 1
    assert "No space left" in pi.err
    assert pi.file.read_text() == "# mine\n"
    assert [path.name for path in pi.file.parent.glob(".bridged*")] == []


# --- tables -----------------------------------------------------------------------------------------------------------


def test_boards_name_a_part_of_theirs() -> None:
    for board in boards.BOARDS:
        assert chips.find(board.chip).pid == board.pid
    assert boards.is_stlink(STLINK["idVendor"], STLINK["idProduct"])


def test_every_pi_is_told_from_the_others() -> None:
    for model, name in (
        ("Raspberry Pi 3 Model B Plus Rev 1.3", "Raspberry Pi 3"),
        ("Raspberry Pi 4 Model B Rev 1.4", "Raspberry Pi 4"),
        ("Raspberry Pi 5 Model B Rev 1.0", "Raspberry Pi 5"),
        ("Raspberry Pi Zero 2 W Rev 1.0", "Raspberry Pi Zero 2 W"),
    ):
        pi = boards.pi_of(model)
        assert pi is not None
        assert pi.name == name
    assert boards.pi_of("Raspberry Pi 400 Rev 1.0") is None
    assert boards.pi_of("") is None
