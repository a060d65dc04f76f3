"""NRST, BOOT0 and the power of a target: whether its lines are there, free, and may be requested."""

from __future__ import annotations

import re
from contextlib import suppress

from bridged.doctor.boards import is_stlink
from bridged.doctor.examination import Examination, Findings, unit_allows
from bridged.doctor.machine import Machine
from bridged.errors import BridgedError, LineUnavailable
from bridged.findings import MACHINE, found
from bridged.target import gpio

HEADER_UART = {"ttyAMA0", "ttyS0"}  # On GPIO14 and GPIO15 of a Raspberry Pi.
HEADER_UART_LINES = (14, 15)


def library(e: Examination) -> Findings:
    """Once for all targets: without any GPIO line nobody needs it."""
    if not e.seen_lines:
        return
    try:
        version = gpio.library_version()
    except LineUnavailable as error:
        code = "DOCTOR_GPIOD_OLD" if "version" in error.facts else "DOCTOR_GPIOD_MISSING"
        yield found(code, MACHINE, error.message)
        return
    titles = []
    with suppress(LineUnavailable):  # None, or none that we may open: told below, or for the target.
        titles = gpio.chip_titles(str(e.machine.at("/dev")))
    yield found("DOCTOR_GPIOD", MACHINE, f"gpiod {version}; chips: {', '.join(titles) or 'none to be seen'}", version=version)
    chips_here = [name for name in e.machine.names("/dev") if re.fullmatch(r"gpiochip\d+", name)]
    if not chips_here:
        yield found("DOCTOR_GPIO_NONE", MACHINE, "/dev has no gpiochip")
        return
    if e.runner != e.machine.caller and not any(e.machine.may(e.runner, f"/dev/{name}") for name in chips_here):
        text = f"user {e.runner.name} may open none of {', '.join(f'/dev/{name}' for name in chips_here)}"
        yield found("DOCTOR_GPIO_FORBIDDEN", MACHINE, text, user=e.runner.name)


def lines(e: Examination, name: str) -> Findings:
    lines = e.config.targets[name].lines
    match lines.kind:
        case "gpio":
            yield from _gpio_lines(e, name)
        case "modem":
            yield from _modem_lines(e, name)
        case "socket":
            yield from _line_box(e.machine, name, lines.socket)
        case _:
            if not e.config.targets[name].application.enter:
                yield found(
                    "DOCTOR_LINES_NONE", name, "neither NRST nor BOOT0 is wired: every job needs a person at the target"
                )


def _gpio_lines(e: Examination, name: str) -> Findings:
    looked = e.seen_lines[name]
    if isinstance(looked, LineUnavailable):
        if not looked.facts.get("errno"):
            return  # No library, no chip: that is said once, for the machine.
        code = "DOCTOR_GPIO_FORBIDDEN" if e.runner == e.machine.caller else "DOCTOR_CALLER_FORBIDDEN"
        yield found(code, name, f"you ({e.machine.caller.name}) may not look at its lines: {looked.message}")
        return
    good = []
    taken: dict[tuple[str, int], str] = {}
    for pin, seen in looked.items():
        if isinstance(seen, BridgedError):
            yield found("DOCTOR_LINE_MISSING", name, seen.message, pin=pin)
            continue
        place = (seen.chip, seen.offset)
        if place in taken:
            yield found(
                "DOCTOR_LINE_SHARED", name, f"lines.{taken[place]} and lines.{pin} are the same line, {seen.place}", pin=pin
            )
        taken.setdefault(place, pin)
        yield from _line_of_others(e, name, pin, seen)
        if seen.consumer is not None and not seen.consumer.startswith("bridged:"):
            text = f"{pin} ({seen.place}) is in use by {seen.consumer or 'the kernel or an unnamed program'}"
            yield found("DOCTOR_LINE_BUSY", name, text, pin=pin, consumer=seen.consumer)
        elif seen.label in gpio.HEADER_CHIPS and seen.offset in HEADER_UART_LINES and _header_uart_used(e):
            which = "TXD" if seen.offset == HEADER_UART_LINES[0] else "RXD"
            yield found("DOCTOR_LINE_ON_UART", name, f"{pin} ({seen.place}) is {which} of the header's UART", pin=pin)
        else:
            good.append(f"{pin} = {seen.place}")
    if good:
        yield found("DOCTOR_LINES", name, ", ".join(good))
    if e.unit is not None and not unit_allows(e.unit, "", {"char-gpiochip"}):
        remedy = "`sudo systemctl edit bridged`: [Service], DeviceAllow=char-gpiochip rw"
        yield found("DOCTOR_UNIT_DEVICE", name, f"{e.unit.path} does not allow char-gpiochip", remedy, kind="char-gpiochip")


def _line_of_others(e: Examination, name: str, pin: str, seen: gpio.Seen) -> Findings:
    """The configuration compares names; here the same line is found under another name."""
    for other, looked in e.seen_lines.items():
        if other == name or other in e.config.targets[name].shares or isinstance(looked, LineUnavailable):
            continue
        for its_pin, its in looked.items():
            if isinstance(its, gpio.Seen) and (its.chip, its.offset) == (seen.chip, seen.offset):
                text = f"{pin} ({seen.place}) is {its_pin} of {other} as well"
                yield found("DOCTOR_LINE_SHARED", name, text, pin=pin, other=other)


def _header_uart_used(e: Examination) -> bool:
    return any(port is not None and port.name in HEADER_UART and port.usb is None for port in e.ports.values())


def _modem_lines(e: Examination, name: str) -> Findings:
    port = e.ports[name]
    if port is None:
        if e.machine.resolve(e.config.targets[name].port).startswith("/dev/pts/"):
            yield found("DOCTOR_MODEM_LINES", name, "a pseudo terminal has no DTR and RTS")
        return
    if port.usb is None and e.machine.is_pi:
        yield found("DOCTOR_MODEM_LINES", name, f"{port.device}: DTR is on no pin of the header, RTS only by an overlay")
    elif port.usb is not None and is_stlink(port.usb.vendor, port.usb.product):
        yield found("DOCTOR_MODEM_LINES", name, f"{port.device}: an ST-LINK does not bring DTR and RTS to pins")
    else:
        yield found("DOCTOR_MODEM_PULSE", name, f"opening {port.device} raises DTR and RTS, so the target may be reset once")


def _line_box(machine: Machine, name: str, path: str) -> Findings:
    node = machine.node(path)
    if node is None or not node.is_socket:
        what = "does not exist" if node is None else "is no socket"
        yield found("DOCTOR_LINE_BOX_MISSING", name, f"the line box {path} {what}", socket=path)
    elif not machine.listening(path):
        yield found("DOCTOR_LINE_BOX_DEAD", name, f"nobody listens at the line box {path}", socket=path)
    else:
        yield found("DOCTOR_LINES", name, f"line box {path}", socket=path)
