"""In the guest: what the kernel says about two GPIO lines, told to a line box, as a board with NRST and BOOT0 wires.

The source are the kernel's ``gpio:`` tracepoints, which record every change with its time, however short; ``/sys/.../value`` of
gpio-sim is looked at now and then for what has no tracepoint (a request that is given back). ``Level`` is also what the tests
judge recorded lines with.

    python3 follow.py CHIP NRST-OFFSET BOOT0-OFFSET BOX

``CHIP``: name of the gpio-sim chip in configfs; ``BOX``: Unix socket or character device of a line box of ``bridged sim``.
Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

TRACING = Path("/sys/kernel/tracing")
CONFIGFS = Path("/sys/kernel/config/gpio-sim")
LOOK_S = 0.2

EVENT = re.compile(
    r"\s(?P<at>\d+\.\d+): gpio_(?P<what>value|direction): (?P<number>\d+) +(?P<word>set|get|in|out) \(?(?P<value>-?\d+)"
)


@dataclass
class Level:
    """One pin, from its events. ``pull``: what it is while nobody drives it."""

    pull: int
    drives: bool = False
    value: int = 0

    def take(self, what: str, word: str, value: int) -> None:
        if what == "direction":
            self.drives = word == "out"
        elif word == "set":
            # Only of lines that are driven, whether or not their direction was seen. Open-drain is emulated by the kernel: a
            # released line is told as "set 1", and "in" within a fraction of a millisecond.
            self.drives, self.value = True, value

    @property
    def high(self) -> int:
        return self.value if self.drives else self.pull


@dataclass(frozen=True)
class Event:
    at_s: float
    number: int
    what: str
    word: str
    value: int


def parse(text: str) -> list[Event]:
    return [
        Event(float(m["at"]), int(m["number"]), m["what"], m["word"], int(m["value"]))
        for m in map(EVENT.search, text.splitlines())
        if m
    ]


def chip_place(name: str) -> tuple[Path, int]:
    """Folder of the chip's lines in sysfs, and the global number of its line 0."""
    device = (CONFIGFS / name / "dev_name").read_text().strip()
    bank = next(path for path in (CONFIGFS / name).iterdir() if path.is_dir())
    chip = (bank / "chip_name").read_text().strip()
    numbers = re.search(rf"^{chip}: GPIOs (\d+)-", Path("/sys/kernel/debug/gpio").read_text(), re.MULTILINE)
    if numbers is None:
        raise FileNotFoundError(f"{chip} is not in /sys/kernel/debug/gpio")
    return Path(f"/sys/devices/platform/{device}/{chip}"), int(numbers[1])


def instance(name: str) -> Path:
    """A trace buffer of our own, recording the gpio events."""
    folder = TRACING / "instances" / name
    folder.mkdir(exist_ok=True)
    (folder / "trace_clock").write_text("mono")
    (folder / "events" / "gpio" / "enable").write_text("1")
    return folder


class Box:
    """The other end: a line box."""

    def __init__(self, path: str) -> None:
        if path.startswith("/dev/"):
            self._fd = os.open(path, os.O_RDWR)
        else:
            box = socket.socket(socket.AF_UNIX)
            box.connect(path)
            self._fd = box.detach()

    def set(self, name: str, high: int) -> None:
        os.write(self._fd, f"{name} {high}\n".encode())
        answer = b""
        while not answer.endswith(b"\n"):
            answer += os.read(self._fd, 100)
        if answer != b"ok\n":
            raise RuntimeError(f"{name} {high}: {answer!r}")


def follow(chip: str, offsets: dict[str, int], box: Box) -> None:
    folder = instance(f"follow-{chip}-{min(offsets.values())}")
    pipe = os.open(folder / "trace_pipe", os.O_RDONLY | os.O_NONBLOCK)
    while True:
        with contextlib.suppress(OSError, StopIteration):
            _follow(chip, offsets, box, pipe)
        # The chip is gone: nobody drives the pins, and the pulls of the board hold.
        box.set("boot0", 0)
        box.set("nrst", 1)
        time.sleep(LOOK_S)


def _follow(chip: str, offsets: dict[str, int], box: Box, pipe: int) -> None:
    sysfs, base = chip_place(chip)
    values = {name: os.open(sysfs / f"sim_gpio{offset}" / "value", os.O_RDONLY) for name, offset in offsets.items()}
    levels = {base + offset: (name, Level(pull=int(name == "nrst"))) for name, offset in offsets.items()}
    said: dict[str, int] = {}

    def say(name: str, high: int) -> None:
        if said.get(name) != high:
            box.set(name, high)
            said[name] = high

    try:
        while True:
            if select.select([pipe], [], [], LOOK_S)[0]:
                with contextlib.suppress(BlockingIOError):
                    for event in parse(os.read(pipe, 65536).decode()):
                        if event.number in levels:
                            name, level = levels[event.number]
                            level.take(event.what, event.word, event.value)
                            say(name, level.high)
                continue
            for name, fd in values.items():
                say(name, int(os.pread(fd, 8, 0)))
    finally:
        for fd in values.values():
            os.close(fd)


if __name__ == "__main__":
    follow(sys.argv[1], {"nrst": int(sys.argv[2]), "boot0": int(sys.argv[3])}, Box(sys.argv[4]))
