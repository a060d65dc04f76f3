"""A whole part: the simulated ROM loader until Go, then the emulated core with what was written to RAM, until the next reset.

Flash is handed over both ways, so that a session which begins with one loader and ends with the other sees one chip.
"""

from __future__ import annotations

from bridged import chips
from bridged.sim.device import Device
from bridged.sim.wire import Burst, Format
from tests.stub.machine import Machine
from tests.stub.parts import PARTS

IMAGE_BYTES = 0x280 + 3072


class Whole:
    """Has what ``sim.virtual`` asks of a device. ``deaf``: what is started in RAM does nothing at all."""

    def __init__(self, name: str, *, oscillator: float = 1.0, deaf: bool = False) -> None:
        self.part = PARTS[name]
        self.oscillator, self.deaf = oscillator, deaf
        self.chip = chips.by_pid(self.part.pid)
        self.rom = Device(self.chip, flash_bytes=sum(a.size for a in self.part.areas), on_go=self._go)
        self.machine: Machine | None = None

    def enter(self) -> None:
        """Into the ROM loader, as after BOOT0 high and a reset."""
        self.rom.force_loader()
        self.rom.advance(self.rom.now_ns + 3_000_000_000)

    def _go(self, device: Device, address: int) -> None:
        if self.deaf:
            return
        machine = Machine(
            self.part,
            address,
            device.memory.read(address, IMAGE_BYTES),
            oscillator=self.oscillator,
            flash_content=bytes(device.memory.flash),
        )
        machine.now_ns = machine.tick_base = device.now_ns
        machine.output.extend(device.collect(device.now_ns + 10_000_000))  # the ACK of Go is still on the wire
        self.machine = machine

    def _end(self) -> None:
        if self.machine is not None:
            self.rom.memory.flash[:] = self.machine.read(self.part.areas[0].address, len(self.rom.memory.flash))
            self.machine = None

    @property
    def now_ns(self) -> int:
        return (self.machine or self.rom).now_ns

    @property
    def stats(self) -> object:
        return self.rom.stats

    @property
    def hazard(self) -> str:
        return (self.machine or self.rom).hazard

    def feed(self, data: bytes, start_ns: int, form: Format) -> None:
        (self.machine or self.rom).feed(data, start_ns, form)

    def collect(self, until_ns: int, receiver: Format | None = None) -> list[Burst]:
        return (self.machine or self.rom).collect(until_ns, receiver)

    def arrival_ns(self, count: int, receiver: Format | None = None) -> int | None:
        return (self.machine or self.rom).arrival_ns(count, receiver)

    def set_lines(self, at_ns: int, *, nrst: bool | None = None, boot0: bool | None = None, power: bool | None = None) -> None:
        if nrst is False or power is False:
            if self.machine is not None:
                self.machine.advance(at_ns)
            self._end()
        self.rom.set_lines(at_ns, nrst=nrst, boot0=boot0, power=power)
