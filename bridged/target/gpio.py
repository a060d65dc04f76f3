"""GPIO lines by name: from what the configuration says to one line request a chip, handed over as plain descriptors.

Daemon only. It needs ``gpiod`` 2.2 or later (libgpiod's binding for the character device, uapi v2), imported when the first
GPIO target is opened, so that gateways without one do without it. What happens to the lines afterwards is ``lines.py``'s
business; this module drives nothing but the initial levels.

A line is named in one of these ways; never by the bare number of a chip, which differs between kernels (on a Raspberry Pi 5
the header moved from gpiochip4 to gpiochip0):

- ``GPIO17``, ``NRST``: the name that the device tree or the driver gives the line; ``17`` means ``GPIO17``;
- ``pin:11``: a pin of the 40-pin header of a Raspberry Pi;
- ``pinctrl-rp1:17``: label (or name) of the chip, and the offset.

Invariants: the request itself sets idle (NRST released, BOOT0 low, power on), so no level in between is ever on a pin; NRST
is open-drain, so that a debugger or a button may pull it as well; lines of one chip are one request.

Real chips are proven in the VM test (gpio-sim under a real kernel); unit tests cover names, settings and errors.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from bridged import config
from bridged.errors import BridgedError, ConfigError, LineUnavailable
from bridged.target.lines import BY_HAND, INPUTS, GpioLines, Line, inputs, wired

NEEDED_VERSION = (2, 2)
CONSUMER_LIMIT = 31  # GPIO_MAX_NAME_SIZE of the kernel, less its final zero.

# The 40-pin header of a Raspberry Pi (all models since the B+): pin to BCM number. The others are supply and ground.
HEADER = {
    3: 2, 5: 3, 7: 4, 8: 14, 10: 15, 11: 17, 12: 18, 13: 27, 15: 22, 16: 23, 18: 24, 19: 10, 21: 9, 22: 25, 23: 11, 24: 8,
    26: 7, 27: 0, 28: 1, 29: 5, 31: 6, 32: 12, 33: 13, 35: 19, 36: 16, 37: 26, 38: 20, 40: 21,
}  # fmt: skip
SUPPLY = {1: "3.3 V", 17: "3.3 V", 2: "5 V", 4: "5 V"}
# The controllers behind that header. Their offsets are the BCM numbers, whatever the device tree calls the lines (older
# ones call GPIO14 "TXD1").
HEADER_CHIPS = ("pinctrl-bcm2835", "pinctrl-bcm2711", "pinctrl-rp1")


@dataclass(frozen=True, slots=True)
class _Chip:
    """What one GPIO chip says about itself; ``lines``: names by offset, empty where a line has none."""

    path: str
    name: str
    label: str
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Place:
    """One line, found."""

    chip: _Chip
    offset: int

    def __str__(self) -> str:
        name = self.chip.lines[self.offset]
        return f"{self.chip.label}:{self.offset}" + (f" {name}" if name else "")


def open_gpio(lines: config.Lines, consumer: str, *, dev: str = "/dev") -> GpioLines:
    """Request the configured lines at their idle levels. ``consumer`` is what ``gpioinfo`` shows.

    Raises ``LineUnavailable`` (no such line, taken by somebody, no permission, chip gone, library missing or too old) and
    ``ConfigError`` (a name that cannot be right, one line for two purposes).
    """
    gpiod = _library()
    chips = _chips(gpiod, dev)
    places: dict[Line, _Place] = {}
    for line in (*wired(lines), *inputs(lines)):
        place = _find(line, getattr(lines, line.pin), chips)
        for other, taken in places.items():
            if taken == place:
                raise ConfigError(f"lines.{other.pin} and lines.{line.pin} are the same line, {place}", key=f"lines.{line.pin}")
        places[line] = place
    fds: list[int] = []
    bits: dict[Line, tuple[int, int]] = {}
    try:
        for path in dict.fromkeys(place.chip.path for place in places.values()):
            here = {line: place for line, place in places.items() if place.chip.path == path}
            fd, offsets = _request(gpiod, path, here, lines, consumer)
            bits |= {line: (len(fds), offsets.index(place.offset)) for line, place in here.items()}
            fds.append(fd)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return GpioLines(fds, bits, {line: str(place) for line, place in places.items()}, lines.boot0 == BY_HAND)


@dataclass(frozen=True, slots=True)
class Seen:
    """One configured line as it is now. ``consumer``: None where nobody uses it, empty for somebody without a name."""

    place: str
    chip: str
    label: str
    offset: int
    consumer: str | None


def library_version() -> str:
    """Of the binding. Raises ``LineUnavailable``; with a ``version`` among its facts where it is too old."""
    return str(_library().__version__)


def chip_titles(dev: str = "/dev") -> list[str]:
    """Label and size of every chip. Raises ``LineUnavailable``."""
    return [f"{chip.label} ({len(chip.lines)} lines)" for chip in _chips(_library(), dev)]


def look(lines: config.Lines, *, dev: str = "/dev") -> dict[Line, Seen | BridgedError]:
    """Where the configured lines are and who uses them; for one that is not found, why. Requests nothing: no pin changes.

    Raises ``LineUnavailable`` where there is no library, no chip, or none that we may open.
    """
    gpiod = _library()
    chips = _chips(gpiod, dev)
    found: dict[Line, Seen | BridgedError] = {}
    for line in (*wired(lines), *inputs(lines)):
        try:
            place = _find(line, getattr(lines, line.pin), chips)
        except BridgedError as error:
            found[line] = error
            continue
        chip = place.chip
        found[line] = Seen(str(place), chip.path, chip.label, place.offset, _consumer(gpiod, chip.path, place.offset))
    return found


def _settings(gpiod: ModuleType, line: Line, lines: config.Lines) -> Any:
    """Output, polarity, and the idle level from the first moment; an input drives nothing and is left as it is biased."""
    if line in INPUTS:
        active_low = bool(getattr(lines, f"{line.pin}_active_low"))
        return gpiod.LineSettings(direction=gpiod.line.Direction.INPUT, active_low=active_low)
    value, drive = gpiod.line.Value, gpiod.line.Drive
    # Open-drain can only pull low. With an inverting transistor in between (not active-low) high is what resets, and a line
    # that floats there would do nothing: push-pull then, and the transistor is the open drain.
    floats = line is Line.RESET and lines.nrst_open_drain and lines.nrst_active_low
    return gpiod.LineSettings(
        direction=gpiod.line.Direction.OUTPUT,
        drive=drive.OPEN_DRAIN if floats else drive.PUSH_PULL,
        active_low=bool(getattr(lines, f"{line.pin}_active_low")),
        output_value=value.ACTIVE if line is Line.POWER else value.INACTIVE,
    )


def _request(
    gpiod: ModuleType, path: str, places: dict[Line, _Place], lines: config.Lines, consumer: str
) -> tuple[int, list[int]]:
    """One request; its descriptor (ours, independent of the library's objects) and its offsets in the order of their bits."""
    wanted = {place.offset: _settings(gpiod, line, lines) for line, place in places.items()}
    try:
        request = gpiod.request_lines(path, consumer=consumer[:CONSUMER_LIMIT], config=wanted)
    except OSError as error:
        raise _request_error(gpiod, path, places, error) from error
    try:
        # The request lives as long as any descriptor of it: with our own, the library's object may go.
        return os.dup(request.fd), list(request.offsets)
    finally:
        request.release()


def _request_error(gpiod: ModuleType, path: str, places: dict[Line, _Place], error: OSError) -> LineUnavailable:
    shown = ", ".join(f"{line.pin} ({place})" for line, place in places.items())
    facts: dict[str, str | int] = {"chip": path, "errno": error.errno or 0}
    if error.errno == errno.EBUSY:
        for line, place in places.items():
            holder = _consumer(gpiod, path, place.offset)
            if holder is not None:
                facts |= {"line": line.pin, "consumer": holder}
                used_by = holder or "the kernel or an unnamed consumer"
                return LineUnavailable(f"Requesting {line.pin} ({place}): it is in use by {used_by}", **facts)
    if error.errno in (errno.ENODEV, errno.ENOENT, errno.ENXIO):
        return LineUnavailable(f"Requesting {shown}: the GPIO chip {path} is gone", **facts)
    return LineUnavailable(f"Requesting {shown} on {path}: {error.strerror or error}", **facts)


def _consumer(gpiod: ModuleType, path: str, offset: int) -> str | None:
    """Who uses a line; empty: unnamed; None: nobody (any more)."""
    try:
        with gpiod.Chip(path) as chip:
            info = chip.get_line_info(offset)
    except OSError:
        return None
    return str(info.consumer or "") if info.used else None


# --- finding lines ------------------------------------------------------------------------------------------------------


def _chips(gpiod: ModuleType, dev: str) -> list[_Chip]:
    """Every chip once: some kernels keep a second name of a chip as a link."""
    names = [name for name in os.listdir(dev) if re.fullmatch(r"gpiochip\d+", name)]
    paths = sorted({os.path.realpath(os.path.join(dev, name)) for name in names})
    found: list[_Chip] = []
    refused: OSError | None = None
    for path in paths:
        try:
            with gpiod.Chip(path) as chip:
                info = chip.get_info()
                lines = tuple(chip.get_line_info(offset).name or "" for offset in range(info.num_lines))
        except OSError as error:  # Not ours to open, or unplugged a moment ago.
            refused = refused or error
            continue
        found.append(_Chip(path, info.name, info.label, lines))
    if found:
        return found
    if refused is not None:
        reason = (
            f"{refused.strerror or refused} (group gpio?)" if refused.errno in (errno.EACCES, errno.EPERM) else refused.strerror
        )
        raise LineUnavailable(f"Opening {', '.join(paths)}: {reason}", errno=refused.errno or 0) from refused
    raise LineUnavailable(f"Looking for GPIO lines: {dev} has no gpiochip", dev=dev)


def _find(line: Line, spec: str, chips: list[_Chip]) -> _Place:
    key = f"lines.{line.pin}"
    if spec.startswith("pin:"):
        bcm = HEADER.get(int(spec[4:])) if spec[4:].isdecimal() else None
        if bcm is None:
            what = _not_a_gpio(spec[4:])
            raise ConfigError(f'{key} = "{spec}": {what}; a GPIO pin of the 40-pin header was expected', key=key)
        return _by_name(line, spec, f"GPIO{bcm}", chips)
    if ":" in spec:
        return _by_offset(line, spec, chips)
    return _by_name(line, spec, f"GPIO{spec}" if spec.isdecimal() else spec, chips)


def _not_a_gpio(pin: str) -> str:
    if not pin.isdecimal() or not 1 <= int(pin) <= 40:
        return "the header has pins 1 to 40"
    return f"pin {pin} is {SUPPLY.get(int(pin), 'ground')}"


def _by_offset(line: Line, spec: str, chips: list[_Chip]) -> _Place:
    label, _, digits = spec.rpartition(":")  # A label may contain colons, an offset may not.
    if not digits.isdecimal():
        raise ConfigError(f'lines.{line.pin} = "{spec}": LABEL:OFFSET was expected', key=f"lines.{line.pin}")
    offset = int(digits)
    found = [chip for chip in chips if label in (chip.label, chip.name)]
    if not found:
        known = [chip.label for chip in chips]
        advice = _did_you_mean(label, known) or f"chips here: {', '.join(known)}"
        text = f'{line.pin} = "{spec}": no GPIO chip is labelled "{label}"; {advice}'
        raise LineUnavailable(text, line=line.pin, name=spec)
    if len(found) > 1:
        paths = ", ".join(f"{chip.label} = {chip.name}" for chip in found)
        raise LineUnavailable(f'{line.pin} = "{spec}": several GPIO chips are called "{label}": {paths}', line=line.pin)
    chip = found[0]
    if offset >= len(chip.lines):
        text = f'{line.pin} = "{spec}": {chip.label} has lines 0 to {len(chip.lines) - 1}'
        raise LineUnavailable(text, line=line.pin, name=spec)
    return _Place(chip, offset)


def _by_name(line: Line, spec: str, name: str, chips: list[_Chip]) -> _Place:
    found = [_Place(chip, offset) for chip in chips for offset, known in enumerate(chip.lines) if known == name]
    if len(found) > 1:
        where = ", ".join(f"{place.chip.label}:{place.offset}" for place in found)
        raise LineUnavailable(f'{line.pin} = "{spec}": several lines are called {name}; say which: {where}', line=line.pin)
    if found:
        return found[0]
    bcm = re.fullmatch(r"GPIO(\d{1,2})", name)
    headers = [chip for chip in chips if chip.label in HEADER_CHIPS]
    if bcm and int(bcm[1]) in HEADER.values() and len(headers) == 1:
        return _Place(headers[0], int(bcm[1]))
    names = sorted({known for chip in chips for known in chip.lines if known})
    labels = ", ".join(f"{chip.label} ({len(chip.lines)} lines)" for chip in chips)
    advice = _did_you_mean(name, names) or f"chips here: {labels}"
    raise LineUnavailable(f'{line.pin} = "{spec}": no line is called {name}; {advice}', line=line.pin, name=spec)


def _did_you_mean(wanted: str, known: list[str]) -> str:
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.6)
    return f"did you mean {', '.join(near)}?" if near else ""


def _library() -> ModuleType:
    """The binding, if it is one that we can use; two incompatible generations share its name."""
    needed = ".".join(map(str, NEEDED_VERSION))
    remedy = f"Python package gpiod >= {needed} is needed (pip install 'gpiod>={needed}')"
    try:
        import gpiod
    except ImportError as error:
        raise LineUnavailable(f"Loading the GPIO library: {error}; {remedy}", library="gpiod") from error
    if not hasattr(gpiod, "request_lines"):
        version = str(getattr(gpiod, "__version__", getattr(gpiod, "version_string", lambda: "1.x")()))
        raise LineUnavailable(
            f"Loading the GPIO library: {gpiod.__file__} is of the old API, version {version} (Debian 12's python3-libgpiod, "
            f"or gpiod 1.5); {remedy}",
            library="gpiod",
            version=version,
        )
    version = str(gpiod.__version__)
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers < NEEDED_VERSION:
        raise LineUnavailable(
            f"Loading the GPIO library: gpiod {version} is too old; {remedy}", library="gpiod", version=version
        )
    return gpiod
