"""Dialogues with a simulated device as text, for the tests of this room: ``> 31 CE`` is sent, ``< 79`` must come.

The check is strict: exactly these bytes, in this order, and nothing after the last one. ``< -`` says that nothing comes.
``sum`` at the end of a line of bytes to be sent stands for their XOR, ``inv`` for the complement of the last one.
"""

from __future__ import annotations

from functools import reduce
from operator import xor
from typing import Any

from bridged.chips import find
from bridged.chips.model import Chip
from bridged.sim.device import Device, Mode
from bridged.sim.virtual import VirtualUart
from bridged.sim.wire import Format

LONG_S = 200.0  # longer than anything that ends; virtual seconds cost nothing
QUIET_S = 0.5
STACK = 0x20002000


def make(chip: str | Chip, **options: Any) -> Device:
    """A device without any rate error, unless ``options`` say so."""
    options.setdefault("rate_error", 0.0)
    return Device(chip if isinstance(chip, Chip) else find(chip), **options)


def enter(device: Device, form: Format | None = None, **options: Any) -> VirtualUart:
    """BOOT0 high, reset, start-up, and no byte yet."""
    uart = VirtualUart(device, form or Format(115200, device.chip.parity), **options)
    uart.set_lines(reset=True, boot0=True)
    uart.pause(0.02)
    uart.set_lines(reset=False)
    uart.pause(1.2 * max(device.chip.startup_s, default=0.1) + 0.01)
    return uart


def synced(chip: str | Chip | Device, form: Format | None = None, **options: Any) -> VirtualUart:
    """A device in its loader, after the ACK to 0x7F."""
    device = chip if isinstance(chip, Device) else make(chip, **options)
    uart = enter(device, form)
    talk(uart, "> 7F", "< 79")
    assert device.mode is Mode.LOADER
    return uart


def frame(text: str) -> bytes:
    words = text.split()
    ending = words.pop() if words[-1] in ("sum", "inv") else ""
    data = bytes(int(word, 16) for word in words)
    if ending == "sum":
        return data + bytes((reduce(xor, data, 0),))
    return data + bytes((data[-1] ^ 0xFF,)) if ending else data


def talk(uart: VirtualUart, *lines: str) -> None:
    """Each line is sent, or must be what comes; at the end nothing more may come."""
    for line in lines:
        direction, _, text = line.partition(" ")
        if direction == ">":
            uart.send(frame(text))
        elif text == "-":
            found = uart.drain(QUIET_S, LONG_S)
            assert found == b"", f"{line!r}: came {found.hex(' ')}"
        else:
            wanted = bytes.fromhex(text)
            found = uart.receive(len(wanted), LONG_S)
            assert found == wanted, f"{line!r}: came {found.hex(' ')}"
    left = uart.drain(0.05, 1.0)
    assert left == b"", f"after {lines[-1]!r}: {left.hex(' ')}"


def address(value: int) -> str:
    return value.to_bytes(4, "big").hex(" ")


def write(uart: VirtualUart, at: int, data: bytes, last: str = "79") -> None:
    body = bytes((len(data) - 1,)) + data
    talk(uart, "> 31 CE", "< 79", f"> {address(at)} sum", "< 79", f"> {body.hex(' ')} sum", f"< {last}")


def read(uart: VirtualUart, at: int, count: int) -> bytes:
    talk(uart, "> 11 EE", "< 79", f"> {address(at)} sum", "< 79")
    uart.send(frame(f"{count - 1:02x} inv"))
    found = uart.receive(count + 1, LONG_S)
    assert found[:1] == b"\x79", found
    return found[1:]


def erase(uart: VirtualUart, *codes: int, last: str = "79") -> None:
    """Extended erase of a list of sectors."""
    body = (len(codes) - 1).to_bytes(2, "big") + b"".join(code.to_bytes(2, "big") for code in codes)
    talk(uart, "> 44 BB", "< 79", f"> {body.hex(' ')} sum", f"< {last}")


def bootable(chip: Chip, size: int = 1024, banner: bytes | None = b"hello") -> bytes:
    """An image that starts: stack pointer in RAM, odd reset vector, code there, and a banner."""
    code = bytes(range(1, 256)) * (size // 255 + 1)
    head = STACK.to_bytes(4, "little") + (chip.flash_base + 0x101).to_bytes(4, "little")
    body = bytearray(head + code[: size - 8])
    if banner is not None:
        text = b"BRIDGED-APP1\0" + banner + b"\0"
        body[0x200 : 0x200 + len(text)] = text
    return bytes(body)
