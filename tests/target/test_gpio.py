"""Finding and requesting GPIO lines, against a small strict stand-in for the library. Real gpiochips are proven in the VM
test; what is compared with the real library here is that our settings mean to it what they should."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from bridged import config
from bridged.errors import BridgedError, ConfigError, LineUnavailable
from bridged.target import gpio as module
from bridged.target.gpio import HEADER, SUPPLY, Seen, look, open_gpio
from bridged.target.lines import GpioLines, Line
from bridged.target.lines_open import open_lines
from bridged.target.uart import Uart


class Direction(Enum):
    INPUT = "input"
    OUTPUT = "output"


class Drive(Enum):
    PUSH_PULL = "push-pull"
    OPEN_DRAIN = "open-drain"


class Value(Enum):
    INACTIVE = 0
    ACTIVE = 1


@dataclass(frozen=True)
class Settings:
    direction: Direction
    drive: Drive | None = None
    active_low: bool = False
    output_value: Value | None = None

    @property
    def shown(self) -> str:
        if self.direction is Direction.INPUT:
            assert (self.drive, self.output_value) == (None, None), "an input drives nothing"
            return f"input{' active-low' if self.active_low else ''}"
        assert self.drive is not None
        assert self.output_value is not None
        return f"{self.drive.value}{' active-low' if self.active_low else ''} {self.output_value.name.lower()}"


@dataclass
class Chip:
    """One chip of the machine. ``used``: consumer by offset; ``fails``: errno for a request."""

    label: str
    names: list[str]
    used: dict[int, str] = field(default_factory=dict)
    fails: int = 0
    closed_to_us: int = 0
    requested: list[dict[int, Settings]] = field(default_factory=list)
    consumers: list[str] = field(default_factory=list)
    released: int = 0


class Machine:
    """Chips by device node, and the module ``gpiod`` that finds them."""

    def __init__(self, dev: Path) -> None:
        self.dev = dev
        self.chips: dict[str, Chip] = {}
        self.fds: list[int] = []

    def add(self, node: str, chip: Chip) -> Chip:
        (self.dev / node).touch()
        self.chips[str(self.dev / node)] = chip
        return chip

    def module(self) -> ModuleType:
        library = ModuleType("gpiod")
        library.__file__ = "/somewhere/gpiod/__init__.py"
        for name, value in {
            "__version__": "2.2.0",
            "line": SimpleNamespace(Direction=Direction, Drive=Drive, Value=Value),
            "LineSettings": Settings,
            "Chip": lambda path: OpenChip(self._chip(path), path),
            "request_lines": self.request_lines,
        }.items():
            setattr(library, name, value)
        return library

    def _chip(self, path: str) -> Chip:
        chip = self.chips.get(os.path.realpath(path))
        if chip is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        if chip.closed_to_us:
            raise OSError(chip.closed_to_us, os.strerror(chip.closed_to_us))
        return chip

    def request_lines(self, path: str, *, consumer: str, config: dict[int, Settings]) -> SimpleNamespace:
        chip = self._chip(path)
        number = chip.fails or (errno.EBUSY if chip.used.keys() & config.keys() else 0)
        if not all(0 <= offset < len(chip.names) for offset in config):
            number = errno.EINVAL
        if number:
            raise OSError(number, os.strerror(number))
        assert all(settings.shown for settings in config.values())
        chip.requested.append(config)
        chip.consumers.append(consumer)
        read, write = os.pipe()
        os.close(read)
        self.fds.append(write)

        def release() -> None:
            chip.released += 1
            os.close(write)

        # The kernel numbers the bits of a request in its own order; here the reverse of what was asked.
        return SimpleNamespace(fd=write, offsets=list(reversed(config)), release=release)


class OpenChip:
    def __init__(self, chip: Chip, path: str) -> None:
        self.chip, self.path = chip, path

    def __enter__(self) -> OpenChip:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def get_info(self) -> SimpleNamespace:
        return SimpleNamespace(name=os.path.basename(self.path), label=self.chip.label, num_lines=len(self.chip.names))

    def get_line_info(self, offset: int) -> SimpleNamespace:
        assert 0 <= offset < len(self.chip.names)
        consumer = self.chip.used.get(offset)
        return SimpleNamespace(name=self.chip.names[offset], used=consumer is not None, consumer=consumer or "")


def header(**renamed: str) -> list[str]:
    return [renamed.get(f"GPIO{n}", f"GPIO{n}") for n in range(54)]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    (tmp_path / "null").touch()
    found = Machine(tmp_path)
    monkeypatch.setitem(sys.modules, "gpiod", found.module())
    return found


@pytest.fixture
def pi5(machine: Machine) -> Chip:
    """The header's chip under a number that says nothing, a second name for it, and chips of other purposes."""
    chip = machine.add("gpiochip0", Chip("pinctrl-rp1", header()))
    (machine.dev / "gpiochip4").symlink_to(machine.dev / "gpiochip0")
    machine.add("gpiochip10", Chip("gpio-brcmstb@107d508500", ["-", "2712_BOOT_CS_N", "", ""]))
    return chip


def opened(machine: Machine, **settings: Any) -> GpioLines:
    return open_gpio(config.Lines(kind="gpio", **settings), "bridged:m1", dev=str(machine.dev))


# --- names --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "offset"),
    [
        ("GPIO17", 17),
        ("17", 17),
        ("pin:11", 17),
        ("pin:40", 21),
        ("pinctrl-rp1:17", 17),
        ("gpiochip0:17", 17),
        ("pinctrl-rp1:53", 53),
    ],
)
def test_one_line_by_each_of_its_names(machine: Machine, pi5: Chip, spec: str, offset: int) -> None:
    lines = opened(machine, nrst=spec)
    assert [list(request) for request in pi5.requested] == [[offset]]
    assert lines.describe()["names"] == {"reset": f"pinctrl-rp1:{offset} GPIO{offset}"}
    lines.close()


def test_bcm_numbers_hold_where_the_device_tree_calls_lines_otherwise(machine: Machine) -> None:
    chip = machine.add("gpiochip0", Chip("pinctrl-bcm2711", header(GPIO14="TXD1", GPIO15="RXD1")))
    opened(machine, nrst="GPIO14", boot0="pin:10").close()
    assert set(chip.requested[0]) == {14, 15}


@pytest.mark.parametrize(
    ("spec", "error", "said"),
    [
        ("GPI017", LineUnavailable, "did you mean GPIO17"),
        ("NRST", LineUnavailable, "pinctrl-rp1 (54 lines), gpio-brcmstb@107d508500 (4 lines)"),
        ("GPIO99", LineUnavailable, "no line is called GPIO99"),
        ("GPIO28X", LineUnavailable, "no line is called GPIO28X"),
        ("pinctrl-rp2:17", LineUnavailable, "did you mean pinctrl-rp1?"),
        ("expander:1", LineUnavailable, "chips here: pinctrl-rp1, gpio-brcmstb@107d508500"),
        ("pinctrl-rp1:54", LineUnavailable, "lines 0 to 53"),
        ("pinctrl-rp1:x", ConfigError, "LABEL:OFFSET"),
        ("pin:6", ConfigError, "pin 6 is ground"),
        ("pin:1", ConfigError, "pin 1 is 3.3 V"),
        ("pin:2", ConfigError, "pin 2 is 5 V"),
        ("pin:41", ConfigError, "pins 1 to 40"),
        ("pin:x", ConfigError, "pins 1 to 40"),
    ],
)
def test_names_that_lead_nowhere(machine: Machine, pi5: Chip, spec: str, error: type[BridgedError], said: str) -> None:
    with pytest.raises(error) as caught:
        opened(machine, nrst=spec)
    assert said in caught.value.message
    assert spec in caught.value.message
    assert not pi5.requested


def test_names_that_lead_to_several_places(machine: Machine) -> None:
    for node in ("gpiochip0", "gpiochip1"):
        machine.add(node, Chip("mcp23017", ["NRST", "BOOT0"]))
    with pytest.raises(LineUnavailable, match="several lines are called NRST"):
        opened(machine, nrst="NRST")
    with pytest.raises(LineUnavailable, match="several GPIO chips are called"):
        opened(machine, nrst="mcp23017:0")
    opened(machine, nrst="gpiochip1:0").close()


def test_one_line_for_two_purposes(machine: Machine, pi5: Chip) -> None:
    with pytest.raises(ConfigError, match=r"lines.nrst and lines.boot0 are the same line, pinctrl-rp1:17 GPIO17"):
        opened(machine, nrst="GPIO17", boot0="pin:11")
    assert not pi5.requested


def test_the_header_is_a_header() -> None:
    """40 pins: 28 GPIOs, each BCM number from 0 to 27 once; the rest supply and ground."""
    assert sorted(HEADER.values()) == list(range(28))
    ground = {6, 9, 14, 20, 25, 30, 34, 39}
    assert set(HEADER) | set(SUPPLY) | ground == set(range(1, 41))
    assert not set(HEADER) & (set(SUPPLY) | ground)
    assert (HEADER[8], HEADER[10]) == (14, 15)  # TXD and RXD


# --- requests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "nrst", "boot0", "power"),
    [
        ({}, "open-drain active-low inactive", "push-pull inactive", "push-pull active"),
        ({"nrst_open_drain": False}, "push-pull active-low inactive", "push-pull inactive", "push-pull active"),
        # Behind a transistor high is what resets: a line that can only pull low could never do it.
        ({"nrst_active_low": False}, "push-pull inactive", "push-pull inactive", "push-pull active"),
        (
            {"boot0_active_low": True, "power_active_low": True},
            "open-drain active-low inactive",
            "push-pull active-low inactive",
            "push-pull active-low active",
        ),
    ],
)
def test_one_request_idle_from_the_first_moment(
    machine: Machine, pi5: Chip, settings: dict[str, Any], nrst: str, boot0: str, power: str
) -> None:
    opened(machine, nrst="GPIO17", boot0="GPIO18", power="GPIO22", **settings).close()
    assert [{offset: s.shown for offset, s in request.items()} for request in pi5.requested] == [
        {17: nrst, 18: boot0, 22: power}
    ]
    assert pi5.consumers == ["bridged:m1"]


def test_inputs_are_requested_with_the_outputs_and_drive_nothing(machine: Machine, pi5: Chip) -> None:
    lines = opened(machine, nrst="GPIO17", safe="GPIO22", alive="GPIO23", alive_active_low=True)
    assert lines.inputs == {Line.SAFE, Line.ALIVE}
    lines.close()
    (request,) = pi5.requested
    assert [request[offset].shown for offset in (22, 23)] == ["input", "input active-low"]


def test_our_settings_mean_the_same_to_the_real_library() -> None:
    gpiod = pytest.importorskip("gpiod", minversion="2.2")
    made = module._settings(gpiod, Line.RESET, config.Lines(kind="gpio", nrst="A"))
    assert (made.direction, made.drive) == (gpiod.line.Direction.OUTPUT, gpiod.line.Drive.OPEN_DRAIN)
    assert (made.active_low, made.output_value) == (True, gpiod.line.Value.INACTIVE)
    made = module._settings(gpiod, Line.POWER, config.Lines(kind="gpio", power="A"))
    assert (made.drive, made.active_low, made.output_value) == (gpiod.line.Drive.PUSH_PULL, False, gpiod.line.Value.ACTIVE)
    made = module._settings(gpiod, Line.SAFE, config.Lines(kind="gpio", safe="A", safe_active_low=True))
    assert (made.direction, made.active_low) == (gpiod.line.Direction.INPUT, True)


def test_bits_follow_the_requests_own_order_and_the_descriptor_is_ours(machine: Machine, pi5: Chip) -> None:
    lines = opened(machine, nrst="GPIO17", boot0="GPIO18")
    assert lines.describe()["bits"] == {"reset": [0, 1], "boot0": [0, 0]}
    assert pi5.released == 1  # The library's object is gone,
    (fd,) = lines.fds()
    os.fstat(fd)  # our descriptor of the same request is not.
    lines.close()


def test_lines_on_two_chips_are_two_requests(machine: Machine, pi5: Chip) -> None:
    expander = machine.add("gpiochip5", Chip("mcp23017", ["", "BOOT"]))
    lines = opened(machine, nrst="GPIO17", boot0="BOOT", power="GPIO22")
    assert [set(request) for request in pi5.requested + expander.requested] == [{17, 22}, {1}]
    assert lines.describe()["bits"] == {"reset": [0, 1], "power": [0, 0], "boot0": [1, 0]}
    assert len(lines.fds()) == 2
    lines.close()
    expander.fails = errno.EBUSY
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(LineUnavailable):
        opened(machine, nrst="GPIO17", boot0="BOOT")
    assert len(os.listdir("/proc/self/fd")) == before


def test_boot0_by_hand_is_not_requested(machine: Machine, pi5: Chip) -> None:
    lines = opened(machine, nrst="GPIO17", boot0="by-hand")
    assert [set(request) for request in pi5.requested] == [{17}]
    assert (lines.has_boot0, lines.boot0_by_hand) == (True, True)
    lines.close()


def test_a_long_name_of_a_consumer_is_cut(machine: Machine, pi5: Chip) -> None:
    open_gpio(config.Lines(kind="gpio", nrst="GPIO17"), "b" * 80, dev=str(machine.dev)).close()
    assert pi5.consumers == ["b" * 31]


def test_looking_requests_nothing(machine: Machine, pi5: Chip) -> None:
    pi5.used = {18: "openocd", 22: ""}
    found = look(config.Lines(kind="gpio", nrst="pin:11", boot0="GPIO18", power="22"), dev=str(machine.dev))
    seen = {line: what for line, what in found.items() if isinstance(what, Seen)}
    assert {line: (what.offset, what.consumer) for line, what in seen.items()} == {
        Line.RESET: (17, None),
        Line.BOOT0: (18, "openocd"),
        Line.POWER: (22, ""),
    }
    assert not pi5.requested
    missing = look(config.Lines(kind="gpio", nrst="GPI017", boot0="GPIO27"), dev=str(machine.dev))
    assert isinstance(missing[Line.RESET], LineUnavailable)  # The other one is found all the same.
    assert isinstance(missing[Line.BOOT0], Seen)
    with pytest.raises(LineUnavailable, match="no gpiochip"):
        look(config.Lines(kind="gpio", nrst="GPIO17"), dev="/proc/self")


# --- failures -----------------------------------------------------------------------------------------------------------


def test_a_line_in_use_names_its_consumer(machine: Machine, pi5: Chip) -> None:
    pi5.used = {18: "openocd"}
    with pytest.raises(LineUnavailable, match=r"boot0 \(pinctrl-rp1:18 GPIO18\): it is in use by openocd") as caught:
        opened(machine, nrst="GPIO17", boot0="GPIO18")
    assert caught.value.facts["consumer"] == "openocd"
    pi5.used = {18: ""}
    with pytest.raises(LineUnavailable, match="the kernel or an unnamed consumer"):
        opened(machine, nrst="GPIO17", boot0="GPIO18")


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENODEV, "is gone"), (errno.EPERM, "Operation not permitted"), (errno.EBUSY, "Device or resource busy")],
)
def test_a_request_that_fails(machine: Machine, pi5: Chip, number: int, said: str) -> None:
    pi5.fails = number
    with pytest.raises(LineUnavailable) as caught:
        opened(machine, nrst="GPIO17")
    assert said in caught.value.message
    assert caught.value.facts["errno"] == number


def test_chips_that_cannot_be_opened_matter_only_if_none_can(machine: Machine) -> None:
    with pytest.raises(LineUnavailable, match="has no gpiochip"):
        opened(machine, nrst="GPIO17")
    machine.add("gpiochip1", Chip("locked", ["GPIO17"], closed_to_us=errno.EACCES))
    with pytest.raises(LineUnavailable, match=r"Permission denied \(group gpio\?\)"):
        opened(machine, nrst="GPIO17")
    machine.add("gpiochip2", Chip("pinctrl-bcm2835", header()))
    opened(machine, nrst="GPIO17").close()


def old_binding(library: ModuleType) -> None:
    """Debian 12's python3-libgpiod 1.6.3."""
    del library.__dict__["request_lines"], library.__dict__["__version__"]
    library.__dict__["version_string"] = lambda: "1.6.3"


def old_package(library: ModuleType) -> None:
    """gpiod 1.5.4, what a package index has for armv7."""
    del library.__dict__["request_lines"]
    library.__dict__["__version__"] = "1.5.4"


def too_old(library: ModuleType) -> None:
    library.__dict__["__version__"] = "2.1.3"


@pytest.mark.parametrize(("change", "said"), [(old_binding, "1.6.3"), (old_package, "1.5.4"), (too_old, "2.1.3")])
def test_a_library_of_the_wrong_generation_is_named(
    machine: Machine, pi5: Chip, change: Callable[[ModuleType], None], said: str
) -> None:
    change(sys.modules["gpiod"])
    with pytest.raises(LineUnavailable) as caught:
        opened(machine, nrst="GPIO17")
    assert said in caught.value.message
    assert "gpiod >= 2.2" in caught.value.message
    assert not pi5.requested


def test_a_missing_library_is_named(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gpiod", None)
    with pytest.raises(LineUnavailable, match=r"gpiod >= 2\.2"):
        opened(machine, nrst="GPIO17")


def test_newer_versions_are_welcome(machine: Machine, pi5: Chip) -> None:
    for version in ("2.2", "2.5.0", "2.10.1", "3.0"):
        sys.modules["gpiod"].__dict__["__version__"] = version
        opened(machine, nrst="GPIO17").close()
    assert len(pi5.requested) == 4


def test_the_factory_opens_gpio_lines(monkeypatch: pytest.MonkeyPatch, machine: Machine, pi5: Chip) -> None:
    monkeypatch.setattr("bridged.target.lines_open.open_gpio", lambda lines, name: open_gpio(lines, name, dev=str(machine.dev)))
    lines = open_lines(config.Lines(kind="gpio", nrst="GPIO17"), Uart.inherit(-1, "", False), "bridged:m2")
    assert isinstance(lines, GpioLines)
    assert pi5.consumers == ["bridged:m2"]
    lines.close()
