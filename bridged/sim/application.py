"""The firmware in the simulated flash, as far as a UART shows it: whether it starts, its banner, its answers.

No code is executed. The image counts as an application when the chip could start it: a stack pointer in RAM, an odd reset
vector inside flash, and programmed flash where that vector points; anything else ends in a HardFault and is silent. The
banner comes from the image itself: the magic ``BRIDGED-APP1`` and a zero byte, then text up to the next zero byte; so what is
printed proves what was flashed.
"""

from __future__ import annotations

from dataclasses import dataclass

from bridged.chips.model import Range
from bridged.sim.memory import Memory
from bridged.sim.wire import Format

MAGIC = b"BRIDGED-APP1\0"
_BANNER_LIMIT = 512
_LINE_LIMIT = 256

# Where a row knows no RAM: the places where STM32s have it.
_ANY_RAM = (Range(0x10000000, 0x10100000), Range(0x20000000, 0x20400000), Range(0x24000000, 0x24400000))


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How the application uses its UART. ``trigger``: a line on which it jumps into the ROM loader; empty: none.

    ``echo``: it sends back every byte as it comes. ``answer``: it replies ``ok LINE`` to a line. ``safe_after_s``,
    ``alive_after_s``: when, after its start, it drives the pins high by which it says so; infinity for never.
    """

    baud: int = 115200
    parity: str = "N"
    startup_s: float = 0.01
    echo: bool = False
    answer: bool = True
    trigger: bytes = b""
    safe_after_s: float = 0.0
    alive_after_s: float = 0.0

    @property
    def format(self) -> Format:
        return Format(self.baud, self.parity)


class Application:
    """One run of the application, from its reset vector to the next reset."""

    def __init__(self, banner: bytes, behaviour: Behaviour) -> None:
        self.banner = banner
        self.behaviour = behaviour
        self.triggered = False
        self._line = bytearray()

    def start(self) -> bytes:
        return self.banner + b"\r\n"

    def receive(self, data: bytes) -> bytes:
        """What it sends in answer to ``data``."""
        out = bytearray()
        for value in data:
            if self.behaviour.echo:
                out.append(value)
            if value not in b"\r\n":
                self._line.append(value)
                del self._line[:-_LINE_LIMIT]
                continue
            line = bytes(self._line)
            self._line.clear()
            if not line:
                continue
            if self.behaviour.trigger and line == self.behaviour.trigger:
                self.triggered = True
                return bytes(out)
            if self.behaviour.answer:
                out += b"ok " + line + b"\r\n"
        return bytes(out)


def has_stack_pointer(memory: Memory, address: int) -> bool:
    """Whether the word there points into RAM."""
    stack = int.from_bytes(memory.read(address, 4), "little")
    return any(r.start < stack <= r.end for r in memory.chip.ram or _ANY_RAM) and stack % 4 == 0


def load(memory: Memory, address: int, behaviour: Behaviour) -> Application | None:
    """The application whose vector table is at ``address``; None when the chip would end in a HardFault."""
    chip, flash, flash_base = memory.chip, memory.flash, memory.base
    at = address - flash_base
    if not 0 <= at <= len(flash) - 8:
        return None
    reset = int.from_bytes(flash[at + 4 : at + 8], "little")
    if not has_stack_pointer(memory, address):
        return None
    entry = reset & ~1
    # F7 images may be linked for the ITCM view of flash.
    if chip.family == "F7" and 0x00200000 <= entry < 0x00400000:
        entry += flash_base - 0x00200000
    if not reset & 1 or not memory.in_flash(entry):
        return None
    code = flash[entry - flash_base : entry - flash_base + 4]
    if code.count(chip.erased_value) == len(code):
        return None
    found = flash.find(MAGIC, at)
    if found < 0:
        return Application(f"application at {address:#010x} started".encode(), behaviour)
    text = flash[found + len(MAGIC) : found + len(MAGIC) + _BANNER_LIMIT]
    return Application(bytes(text.split(b"\0", 1)[0]), behaviour)
