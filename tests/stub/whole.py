"""A whole part: the simulated ROM loader until Go, then the emulated core with what was written to RAM, until the next reset.

Flash is handed over both ways, so that a session which begins with one loader and ends with the other sees one chip.
"""

from __future__ import annotations

from collections.abc import Callable

from bridged import chips
from bridged.sim.device import Device
from bridged.sim.loader import Timing
from bridged.sim.wire import Burst, Format
from bridged.stub import CODE_LIMIT_BYTES, CODE_OFFSET
from tests.stub.machine import Machine
from tests.stub.parts import PARTS

IMAGE_BYTES = CODE_OFFSET + CODE_LIMIT_BYTES
OBEY_BOOT0 = {"G071": {"nBOOT_SEL": 0}}  # From the factory the pin is ignored.
LOADER_IDS = {"H743": 0x92}  # The largest number is that of the oldest version.


class Whole:
    """Has what ``sim.virtual`` asks of a device. ``deaf``: what is started in RAM does nothing at all.

    ``spoil_frames``: what becomes of what the host sends at once to the second-stage loader; ``spoil_bytes``: of each byte
    (number, value) that it sends. ``spoil_rom``: the former for the ROM loader. ``on_start``: called with each emulated core
    before it runs. ``loader_id``: of the ROM loader, by itself one under which the second stage may be used.
    """

    def __init__(
        self,
        name: str,
        *,
        oscillator: float = 1.0,
        deaf: bool = False,
        spoil_frames: Callable[[bytes], bytes] | None = None,
        spoil_bytes: Callable[[int, int], bytes] | None = None,
        spoil_rom: Callable[[bytes], bytes] | None = None,
        on_start: Callable[[Machine], None] | None = None,
        timing: Timing | None = None,
        loader_id: int | None = None,
    ) -> None:
        self.part = PARTS[name]
        self.oscillator, self.deaf = oscillator, deaf
        self.spoil_frames, self.spoil_rom, self.spoil_bytes, self.on_start = spoil_frames, spoil_rom, spoil_bytes, on_start
        self.chip = chips.by_pid(self.part.pid)
        size = sum(a.size for a in self.part.areas)
        options = OBEY_BOOT0.get(name)
        self.rom = Device(
            self.chip,
            flash_bytes=size,
            options=options,
            loader_id=loader_id or LOADER_IDS.get(name),
            on_go=self._go,
            timing=timing or Timing(),
        )
        self.machine: Machine | None = None
        self.starts = self.erases = 0
        self.violations: list[str] = []

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
        machine.spoil_answers = self.spoil_bytes
        memory = device.memory
        machine.flash.marginal = {s.address for s in memory.map.sectors if s.code in memory.marginal}
        self.machine = machine
        self.starts += 1
        if self.on_start is not None:
            self.on_start(machine)

    def end(self) -> None:
        """What runs in RAM is no more; its flash is the part's, a sector half erased where that was under way."""
        if self.machine is not None:
            memory, flash = self.rom.memory, self.machine.flash
            if flash.erasing:
                self.machine.write(flash.erases[-1], flash.held)
            memory.load_flash(self.machine.read(self.part.areas[0].address, len(memory.flash)))
            memory.marginal = {s.code for s in memory.map.sectors if s.address in flash.marginal}
            if flash.erasing:
                sector = memory.map.sector_at(flash.erases[-1])
                assert sector is not None
                memory.interrupt_erase(sector, flash.erased_share)
            self.violations += self.machine.violations
            self.erases += len(flash.erases)
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
        spoil = self.spoil_rom if self.machine is None else self.spoil_frames
        (self.machine or self.rom).feed(spoil(data) if spoil else data, start_ns, form)

    def collect(self, until_ns: int, receiver: Format | None = None) -> list[Burst]:
        return (self.machine or self.rom).collect(until_ns, receiver)

    def arrival_ns(self, count: int, receiver: Format | None = None) -> int | None:
        return (self.machine or self.rom).arrival_ns(count, receiver)

    def set_lines(self, at_ns: int, *, nrst: bool | None = None, boot0: bool | None = None, power: bool | None = None) -> None:
        if nrst is False or power is False:
            if self.machine is not None:
                self.machine.advance(at_ns)
            self.end()
        self.rom.set_lines(at_ns, nrst=nrst, boot0=boot0, power=power)
