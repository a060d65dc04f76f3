"""A Cortex-M in Unicorn with the peripherals that the second-stage loader needs, each as strict as the silicon or stricter.

Anything that real hardware would refuse, ignore or punish is written into ``violations``: an access to a peripheral whose
clock is off or that is not there, a store of another width than a word, a byte sent while the transmitter is full or the pins
are not the USART's, a DMA that is changed while it runs, that serves another request, or whose memory it cannot reach; a clock
that is faster than flash and buses are at that moment, a PLL out of its range or changed while it runs.

Time is virtual. The CPU runs in slices of instructions (``SLICE``), each worth ``cycles`` clocks; within a slice time moves on
with each access to a peripheral. Where the loader only waits, time is moved to the next thing that happens, so that an erase of
20 s costs nothing. Addresses and bits are from memory of the reference manuals, written down a second time (``parts.py``), and
independent of ``chips.second_stage``.

``Machine`` has the shape of ``sim.device.Device`` as far as ``sim.virtual`` needs it: the flows of ``protocol`` run against the
real binary. It is one file because every peripheral in it moves the same clock.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import unicorn
from unicorn import arm_const

from bridged.sim.wire import Burst, Format, hear
from bridged.stub import FIELDS
from tests.stub.flash_models import Controller
from tests.stub.parts import DmaKind, Part

emulator: Any = unicorn  # it has no type hints

SLICE = 256  # instructions between two looks at the time
CYCLES_PER_INSTRUCTION = 1.5  # of a Cortex-M0+; the bus matrix makes it worse than 1
FLASH_READS = 1 / 12  # of an instruction, where it computes a CRC or compares: each takes as long as flash has wait states
ACCESS_INSTRUCTIONS = 8  # what an access to a peripheral is worth within a slice
IDLE_POLLS = 3  # looks at something that did not happen yet, after which the time is moved on
LONGEST_SKIP_NS = 500_000
WAITS_WITHOUT_REFRESH = 8  # looks after which the watchdog must have been refreshed
OSCILLATOR_NS, OSCILLATOR_LOOK_NS = 150_000, 10_000  # until it is ready, or the clock has changed over to it; each look at it
PUSHED = 128  # what the ROM loader may have on the stack when it jumps
STACK_PAINT = 0xDEADBEEF
SCS = 0xE000E000


class Peripheral(Protocol):
    def read(self, offset: int) -> int: ...
    def write(self, offset: int, value: int) -> None: ...


class Registers:
    """Plain registers: those that exist keep what is written; others are a violation. ``follow``: bits that track others,
    after ``settle`` has found that it is time."""

    def __init__(
        self, name: str, values: Mapping[int, int], bad: Callable[[str], None], follow: Callable[[dict[int, int]], None]
    ):
        self.name, self.values, self.bad, self.follow = name, dict(values), bad, follow
        self.due_ns: int | None = None
        follow(self.values)

    def settle(self, now_ns: int) -> bool:
        """Whether bits have followed just now."""
        if self.due_ns is None or now_ns < self.due_ns:
            return False
        self.due_ns = None
        self.follow(self.values)
        return True

    def read(self, offset: int) -> int:
        if offset not in self.values:
            self.bad(f"{self.name}: read of register {offset:#x}")
        return self.values.get(offset, 0)

    def write(self, offset: int, value: int) -> None:
        if offset not in self.values:
            self.bad(f"{self.name}: write of {value:#x} to register {offset:#x}")
        self.values[offset] = value


class Usart:
    """Both register layouts. One byte in the data register, one in the shift register, each way."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.v2 = machine.part.usart_v2
        self.registers = {0x00: 0, 0x04: 0, 0x08: 0, 0x0C: 0} if self.v2 else {0x08: 0, 0x0C: 0, 0x10: 0, 0x14: 0}
        self.shift_free = 0  # when the shift register is empty
        self.waiting: int | None = None  # the byte in the data register
        self.written_at = 0
        self.overrun = False

    def reg(self, name: str) -> int:
        return self.registers[
            {"cr1": 0x00, "cr3": 0x08, "brr": 0x0C}[name] if self.v2 else {"cr1": 0x0C, "cr3": 0x14, "brr": 0x08}[name]
        ]

    @property
    def on(self) -> bool:
        return bool(self.reg("cr1") >> (0 if self.v2 else 13) & 1)

    @property
    def format(self) -> Format:
        return Format(self.machine.usart_hz / max(1, self.reg("brr")), "N")

    def read(self, offset: int) -> int:
        machine = self.machine
        if offset == (0x1C if self.v2 else 0x00):
            self.pump()
            free = self.waiting is None
            idle = free and machine.now_ns >= self.shift_free
            if not free:
                machine.polled(self.shift_free)
            elif not idle:
                machine.polled(self.shift_free, certain=False)  # only who waits for the end of transmission looks again
            return (0x80 if free else 0) | (0x40 if idle else 0) | (0x08 if self.overrun else 0)
        if offset in self.registers:
            return self.registers[offset]
        machine.bad(f"USART: read of register {offset:#x}")
        return 0

    def write(self, offset: int, value: int) -> None:
        machine = self.machine
        if offset == (0x28 if self.v2 else 0x04):
            self.pump()
            if not self.on or not self.reg("cr1") & 8:
                machine.bad("USART: byte sent while off")
            elif self.waiting is not None:
                machine.bad("USART: byte sent while the data register is full")
            else:
                machine.check_pins()
                self.waiting, self.written_at = value & 0xFF, machine.now_ns
                self.pump()
            machine.progress()
            return
        if offset not in self.registers:
            machine.bad(f"USART: write of {value:#x} to register {offset:#x}")
            return
        cr1, brr, cr3 = (0x00, 0x0C, 0x08) if self.v2 else (0x0C, 0x08, 0x14)
        allowed = 0x0D if self.v2 else 0x200C
        if offset == cr1 and value & ~allowed:
            machine.bad(f"USART: CR1 {value:#x} is not 8N1 without interrupts")
        if offset == cr1 and self.on and not value & (1 if self.v2 else 1 << 13) and machine.now_ns < self.shift_free:
            machine.bad("USART: switched off in the middle of a byte")
        if offset == cr1 and self.on and not value & (1 if self.v2 else 1 << 13):
            machine.deaf_now(self.format.byte_ns)
        if self.v2 and self.on and offset == brr:
            machine.bad("USART: BRR changed while on")
        if self.v2 and self.on and offset == cr3 and (value ^ self.registers[cr3]) & 1 << 12:
            machine.bad("USART: OVRDIS changed while on")
        if offset == brr and value < 16:
            machine.bad(f"USART: BRR {value} is less than 16")
        self.registers[offset] = value

    def pump(self) -> None:
        """The data register moves into the shift register when that is free."""
        machine = self.machine
        if self.waiting is None or machine.now_ns < self.shift_free:
            return
        form = self.format
        start = max(self.written_at, self.shift_free)
        machine.emit(bytes([self.waiting]), start, form)
        self.shift_free = start + form.byte_ns
        self.waiting = None

    def receive(self, value: int) -> None:
        """A byte is complete in the shift register."""
        if not self.on or not self.reg("cr1") & 4:
            self.machine.lost += 1
        elif not self.reg("cr3") & 0x40 or not self.machine.dma.request(value):
            # Nobody takes it: the next one overruns it.
            self.overrun = True
            self.machine.lost += 1


class Dma:
    """One channel or stream, and what must hold when it is switched on."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.kind: DmaKind = machine.part.dma
        k = self.kind
        self.registers = dict.fromkeys((k.control, k.count, k.peripheral, k.memory, *k.extra), 0)
        self.reload = 0
        self.taken = 0

    @property
    def on(self) -> bool:
        return bool(self.registers[self.kind.control] & 1)

    def read(self, offset: int) -> int:
        if offset == self.kind.count:
            self.machine.deliver()
            self.machine.looked = True
            if self.machine.inlet_is_empty():
                # It looks here in every wait, whatever it waits for: that may come first.
                ends = (self.machine.flash.works_until, self.machine.usart.shift_free)
                self.machine.polled(min((at for at in ends if at > self.machine.now_ns), default=None), certain=False)
        if offset not in self.registers:
            self.machine.bad(f"DMA: read of register {offset:#x}")
        return self.registers.get(offset, 0)

    def write(self, offset: int, value: int) -> None:
        k, bad = self.kind, self.machine.bad
        if offset not in self.registers:
            bad(f"DMA: write of {value:#x} to register {offset:#x}")
            return
        if self.on and offset != k.control:
            bad(f"DMA: register {offset:#x} changed while on")
        self.registers[offset] = value
        if offset == k.control and value & 1:
            self.start(value)

    def start(self, control: int) -> None:
        k, machine = self.kind, self.machine
        count, memory = self.registers[k.count], self.registers[k.memory]
        if control & k.relevant != k.expected:
            machine.bad(f"DMA: control {control:#x}, expected {k.expected:#x} in {k.relevant:#x}")
        if self.registers[k.peripheral] != machine.part.usart_base + (0x24 if machine.part.usart_v2 else 0x04):
            machine.bad(f"DMA: reads from {self.registers[k.peripheral]:#x}, which is not the receiver's data register")
        if not any(lo <= memory and memory + count <= hi for lo, hi in machine.part.dma_reach):
            machine.bad(f"DMA: cannot reach {memory:#x}..{memory + count:#x}")
        if not 0 < count < 65536 or machine.request_line() != machine.part.request:
            machine.bad(f"DMA: {count} transfers for request {machine.request_line()}")
        self.reload = count

    def request(self, value: int) -> bool:
        if not self.on:
            return False
        k = self.kind
        count = self.registers[k.count]
        at = self.registers[k.memory] + self.reload - count
        self.machine.cpu.mem_write(at, bytes([value]))
        self.registers[k.count] = count - 1 or self.reload
        self.taken += 1
        return True


@dataclass
class Stats:
    overruns: int = 0


@dataclass
class Machine:
    """``image`` is loaded and started as the ROM loader's Go does. ``oscillator``: its real speed (1.02: 2 % too fast)."""

    part: Part
    load_address: int
    image: bytes
    oscillator: float = 1.0
    cycles: float = CYCLES_PER_INSTRUCTION
    flash_content: bytes = b""
    drop_or_flip: Callable[[int, int], bytes] | None = None  # from the host: number and value of a byte to what arrives
    spoil_answers: Callable[[int, int], bytes] | None = None
    until_ns: int = 1 << 62  # a test that takes longer has gone wrong
    faster: float = 1.0  # than its registers say, flash and buses too: for the gate on overruns

    violations: list[str] = field(default_factory=list)
    now_ns: int = 0
    lost: int = 0
    instructions: int = 0
    watchdog_at: int = 0
    longest_watchdog_gap: int = 0
    resets: int = 0
    lines_moved: list[tuple[bool | None, ...]] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)

    def __post_init__(self) -> None:
        part = self.part
        cpu = self.cpu = emulator.Uc(emulator.UC_ARCH_ARM, emulator.UC_MODE_THUMB | emulator.UC_MODE_MCLASS)
        cpu.ctl_set_cpu_model(getattr(arm_const, f"UC_CPU_ARM_{part.core}"))
        for lo, hi in part.ram:
            cpu.mem_map(lo, (hi - lo + 4095) & ~4095)
            cpu.mem_write(lo, b"\xa5" * (hi - lo))  # RAM is never zero by luck
        self.flash_bytes = sum(area.size for area in part.areas)
        span = max(a.address + a.size for a in part.areas) - part.areas[0].address
        cpu.mem_map(part.areas[0].address, (span + 4095) & ~4095)
        cpu.mem_write(part.areas[0].address, (self.flash_content or b"\x5a" * span).ljust(span, b"\xff"))
        self.flash: Controller = part.controller(part.areas, part.times, self, self.time, self.violations)
        self.usart, self.dma = Usart(self), Dma(self)
        self.rcc = Registers("RCC", part.rcc, self.bad, part.follow)
        self.gpio = Registers("GPIOA", part.gpio, self.bad, lambda _: None)
        self.mux = Registers("DMAMUX", {0: 0}, self.bad, lambda _: None)
        self.blocks: dict[int, tuple[str, Peripheral, int]] = {}
        for name, base, device in (
            ("usart", part.usart_base, self.usart),
            ("dma", part.dma_base, self.dma),
            ("rcc", part.rcc_base, self.rcc),
            ("gpio", part.gpio_base, self.gpio),
            ("mux", part.mux_base, self.mux),
            ("flash", part.flash_base, self.flash),
            ("watchdog", part.watchdog, _Watchdog(self)),
        ):
            if base:
                self.blocks[base >> 10] = (name, device, base)
        for page in {block << 10 & ~0xFFF for block in self.blocks}:
            cpu.mmio_map(page, 0x1000, self._read, page, self._write, page)
        cpu.mmio_map(SCS, 0x1000, self._read_core, None, self._write_core, None)
        cpu.hook_add(emulator.UC_HOOK_MEM_UNMAPPED, self._unmapped)
        first, last = part.areas[0].address, part.areas[0].address + span - 1
        cpu.hook_add(emulator.UC_HOOK_MEM_WRITE, self._store, None, first, last)
        self.tick_base, self.ticks = 0, 0.0
        self.clock = part.clock(self.rcc.values)
        self.set_clock()
        self.systick, self.vectors = {0x10: 0, 0x14: 0}, 0
        self.slice_left, self.access_ns = 0, 0
        self.output: deque[Burst] = deque()
        self.incoming: deque[tuple[int, int]] = deque()
        self.levels: deque[tuple[int, int]] = deque()  # of the RX pin: when it changes, and to what
        self.level = self.pin_seen = 1
        self.pin_again = False
        self.in_bytes = self.out_bytes = 0
        self.polls = 0
        self.skip_to: int | None = None
        self.looked = False
        self.halted = False
        self.unrefreshed = 0
        cpu.mem_write(self.load_address, self.image)
        stack, entry = struct.unpack_from("<II", self.image)
        code_end = self.load_address + len(self.image)
        self.stack = (code_end, stack)
        cpu.mem_write(code_end, struct.pack("<I", STACK_PAINT) * ((stack - code_end) // 4))
        cpu.reg_write(arm_const.UC_ARM_REG_SP, stack - PUSHED)
        self.pc = entry

    # --- what the models ask for

    def bad(self, what: str) -> None:
        self.violations.append(f"{what} (pc {self.cpu.reg_read(arm_const.UC_ARM_REG_PC) - self.load_address:#x})")

    def time(self) -> int:
        return self.now_ns

    def read(self, address: int, count: int) -> bytes:
        return bytes(self.cpu.mem_read(address, count))

    def write(self, address: int, data: bytes) -> None:
        self.cpu.mem_write(address, data)

    def request_line(self) -> int:
        part = self.part
        if part.mux_base:
            return self.mux.values[0]
        if part.csel is not None:
            return self.dma.registers[part.csel] >> 16 & 0xF
        return part.request if part.dma.in_control is None else self.dma.registers[part.dma.control] >> part.dma.in_control & 7

    def check_pins(self) -> None:
        wrong = self.part.pins(self.gpio.values)
        for offset, mask, value in self.part.clocked:
            if self.rcc.values[offset] & mask != value:
                wrong += f" clock: RCC {offset:#x} is {self.rcc.values[offset]:#x}, not {value:#x} in {mask:#x}"
        if wrong:
            self.bad(f"USART: {wrong}")

    def set_clock(self) -> None:
        """After something that may have changed it."""
        was, self.clock = self.clock, self.part.clock(self.rcc.values)
        self.ticks += (self.now_ns - self.tick_base) * was.core * self.oscillator * self.faster / 1e9
        self.tick_base = self.now_ns
        self.cpu_hz = max(1.0, self.clock.core * self.oscillator * self.faster)
        self.usart_hz = self.clock.apb2 * self.oscillator * self.faster
        self.slice_cycles = SLICE * (self.cycles + FLASH_READS * self.flash.wait_states)
        if wrong := self.part.limits.broken(self.clock, self.flash.wait_states):
            self.bad(f"RCC: {wrong}")

    def check_pll(self, offset: int, value: int) -> None:
        """Before a register of RCC is written."""
        frozen, bits = self.part.limits.frozen
        if bits and offset == frozen and self.rcc.values[0] >> 24 & 1 and (value ^ self.rcc.values[frozen]) & bits:
            self.bad(f"RCC: the PLL is changed while it is on ({value:#x})")
        if bits and not offset and not value >> 24 & 1 and self.clock.vco:
            self.bad("RCC: the PLL is switched off while everything runs from it")

    def inlet_is_empty(self) -> bool:
        at = self.load_address + 4 * FIELDS.index("taken")
        (taken,) = struct.unpack("<I", self.read(at, 4))
        return self.dma.reload == 0 or taken == (self.dma.reload - self.dma.registers[self.dma.kind.count]) % self.dma.reload

    def clock_on(self, name: str) -> bool:
        gate = self.part.gates.get(name)
        return gate is None or bool(self.rcc.values[gate[0]] >> gate[1] & 1)

    # --- accesses

    def _step(self) -> None:
        if self.slice_left > ACCESS_INSTRUCTIONS:
            self.slice_left -= ACCESS_INSTRUCTIONS
            self.now_ns += self.access_ns

    def _read(self, _cpu: object, offset: int, size: int, page: int) -> int:
        self._step()
        address = page + offset
        name, device, base = self.blocks.get(address >> 10, ("", None, 0))
        if device is None or size != 4 or not self.clock_on(name):
            self.bad(f"read of {size} bytes at {address:#010x} ({name or 'nothing is there'})")
            return 0
        if name == "gpio" and address - base == self.part.input_register:
            return self._pin()
        if name == "rcc" and self.rcc.settle(self.now_ns):
            self.progress()
            self.set_clock()
        elif name == "rcc" and self.rcc.due_ns is not None:
            self.polled(self.now_ns + OSCILLATOR_LOOK_NS)
        if name == "flash" and self.now_ns < self.flash.works_until:
            self.polled(self.flash.works_until)
        elif name == "flash" and any(bank.pending for bank in self.flash.banks):
            self.polled(None)
        return device.read(address - base)

    def _write(self, _cpu: object, offset: int, size: int, value: int, page: int) -> None:
        self._step()
        address = page + offset
        name, device, base = self.blocks.get(address >> 10, ("", None, 0))
        if device is None or size != 4 or not self.clock_on(name):
            self.bad(f"write of {size} bytes at {address:#010x} ({name or 'nothing is there'})")
            return
        if name != "watchdog":
            self.progress()
        if name == "rcc":
            self.check_pll(address - base, value)
        device.write(address - base, value)
        if name == "rcc":
            self.rcc.due_ns = self.now_ns + OSCILLATOR_NS
        if name == "rcc" or (name == "flash" and address - base == self.flash.ACCESS):
            self.set_clock()

    def _pin(self) -> int:
        if self.pin_again:
            # Unicorn carries the load out anew after it was stopped there; what the CPU has seen was before the time moved on.
            self.pin_again = False
            return self.pin_seen << self.part.rx_pin
        self._move_pin()
        self.pin_seen = self.level
        self.polled(None)
        self.pin_again = self.skip_to is not None
        return self.level << self.part.rx_pin

    def _move_pin(self) -> None:
        while self.levels and self.levels[0][0] <= self.now_ns:
            self.level = self.levels.popleft()[1]
            self.progress()

    def _read_core(self, _cpu: object, offset: int, size: int, _data: object) -> int:
        self._step()
        if size != 4:
            self.bad(f"core register {offset:#x} read with {size} bytes")
        if offset == 0x18:
            if (self.systick[0x10] & 7, self.systick[0x14]) != (5, 0xFFFFFF):
                self.bad("SysTick: asked while it does not count the core's clock down from 2^24 - 1, or interrupts")
            return -round(self.ticks + (self.now_ns - self.tick_base) * self.cpu_hz / 1e9) & 0xFFFFFF
        if offset in self.systick:
            return self.systick[offset]
        if offset == 0xD00:
            return self.part.cpuid
        if offset == 0xD14:
            return 0x200
        self.bad(f"core register {offset:#x} read")
        return 0

    def _write_core(self, _cpu: object, offset: int, size: int, value: int, _data: object) -> None:
        self._step()
        if size != 4:
            self.bad(f"core register {offset:#x} written with {size} bytes")
        if offset in self.systick:
            self.systick[offset] = value
        elif offset == 0xD0C and value == 0x05FA0004:
            self.resets += 1
            self.halted = True
            self.cpu.emu_stop()
        elif offset == 0xD08:
            self.vectors = value
        else:
            self.bad(f"core register {offset:#x} written with {value:#x}")

    def _store(self, _cpu: object, _access: int, address: int, size: int, value: int, _data: object) -> None:
        self._step()
        self.progress()
        self.flash.store(address, size, value)

    def _unmapped(self, _cpu: object, _access: int, address: int, _size: int, _value: int, _data: object) -> bool:
        self.bad(f"access to {address:#010x}, where nothing is")
        return False

    # --- time

    def progress(self) -> None:
        self.polls = 0

    def polled(self, until_ns: int | None, *, certain: bool = True) -> None:
        """The loader looks whether something happened. After enough of it the slice ends, and time moves on.

        ``until_ns``: when it will happen, where that is known; where the loader ``certain``ly waits, two looks are enough.
        """
        self.polls += 2 if until_ns is not None and certain else 1
        if self.polls > IDLE_POLLS:
            self.skip_to = until_ns if until_ns is not None else 1 << 62
            self.cpu.emu_stop()

    def deaf_now(self, byte_ns: int) -> None:
        """The receiver is switched off: of a byte that is coming in nothing is left."""
        self.deliver()
        if self.incoming and self.incoming[0][0] - byte_ns < self.now_ns:
            self.incoming.popleft()
            self.lost += 1

    def deliver(self) -> None:
        """Bytes of the host that are complete by now reach the USART."""
        while self.incoming and self.incoming[0][0] <= self.now_ns:
            _, value = self.incoming.popleft()
            self.usart.receive(value)

    def advance(self, until_ns: int) -> None:
        """Let the CPU run until ``until_ns``."""
        if until_ns > self.until_ns:
            raise TimeoutError(f"not done after {self.until_ns / 1e9:.0f} s")
        while self.now_ns < until_ns and not self.halted and not self.violations:
            slice_ns = round(self.slice_cycles * 1e9 / self.cpu_hz)
            self.access_ns = slice_ns * ACCESS_INSTRUCTIONS // SLICE
            self.slice_left = SLICE
            started, self.skip_to, self.looked = self.now_ns, None, False
            try:
                self.cpu.emu_start(self.pc, 0, count=SLICE)
            except emulator.UcError as error:
                self.bad(f"CPU: {error}")
            self.pc = self.cpu.reg_read(arm_const.UC_ARM_REG_PC) | 1
            if self.skip_to is None:
                self.instructions += SLICE
                self.now_ns = max(self.now_ns, started + slice_ns)
                if not self.looked:
                    self.progress()  # It computes, and looks into the inlet in between.
            else:
                # A poll loop saw no change: on to whatever is next, but not so far that the loader's own clock is missed.
                times = [self.skip_to, self.now_ns + LONGEST_SKIP_NS, until_ns]
                if self.incoming:
                    times.append(self.incoming[0][0])
                self._move_pin()
                if self.levels:
                    times.append(self.levels[0][0])
                self.now_ns = max(self.now_ns, min(times))
                self.polls = 1
                self.waited()
            self.deliver()
            self.usart.pump()
        self.now_ns = max(self.now_ns, until_ns)
        self.deliver()

    def waited(self) -> None:
        """Time was moved on. A loop that waits without refreshing the watchdog is a violation, wherever it is."""
        self.unrefreshed += 1
        if self.unrefreshed > WAITS_WITHOUT_REFRESH:
            self.bad("a loop waits and does not refresh the watchdog")

    def refreshed(self) -> None:
        self.unrefreshed = 0
        gap = self.instructions - self.watchdog_at
        self.longest_watchdog_gap = max(self.longest_watchdog_gap, gap)
        self.watchdog_at = self.instructions

    # --- the wire, as sim.virtual sees it

    def emit(self, data: bytes, start_ns: int, form: Format) -> None:
        if self.spoil_answers is not None:
            data = self.spoil_answers(self.out_bytes, data[0])
        self.out_bytes += 1
        if not data:
            return
        self.output.append(Burst(start_ns, form.byte_ns, data, form))

    def feed(self, data: bytes, start_ns: int, form: Format) -> None:
        self.advance(start_ns)
        out = bytearray()
        for value in data:
            out += self.drop_or_flip(self.in_bytes, value) if self.drop_or_flip else bytes([value])
            self.in_bytes += 1
        if set(out) == {0x55} and form.parity in ("N", "?"):
            bit = 1e9 / form.baud
            self.levels += [(start_ns + round(n * bit), n & 1) for n in range(10 * len(out))]
        burst = Burst(start_ns, form.byte_ns, bytes(out), form)
        mine = self.usart.format
        if form.agrees(mine):
            self.incoming += [(start_ns + (k + 1) * form.byte_ns, value) for k, value in enumerate(out)]
        else:
            self.incoming += [(heard.at_ns, heard.value) for heard in hear(burst, mine)]

    def collect(self, until_ns: int, _receiver: Format | None = None) -> list[Burst]:
        self.advance(until_ns)
        taken = []
        while self.output and self.output[0].end_ns <= until_ns:
            taken.append(self.output.popleft())
        return taken

    def arrival_ns(self, count: int, _receiver: Format | None = None) -> int | None:
        if len(self.output) >= count:
            return self.output[count - 1].end_ns
        # Nobody knows; look again, not so soon while flash works for long.
        return self.now_ns + (5_000_000 if self.flash.works_until > self.now_ns + 10_000_000 else 200_000)

    def set_lines(self, at_ns: int, *, nrst: bool | None = None, boot0: bool | None = None, power: bool | None = None) -> None:
        self.advance(at_ns)
        self.lines_moved.append((nrst, boot0, power))

    @property
    def hazard(self) -> str:
        return "erase" if self.flash.erasing else ""

    # --- what tests ask

    def flash_is(self, address: int, count: int) -> bytes:
        return self.read(address, count)

    def registers(self) -> dict[str, int]:
        read = self.cpu.reg_read
        return {"msp": read(arm_const.UC_ARM_REG_MSP), "primask": read(arm_const.UC_ARM_REG_PRIMASK)}

    def stack_used(self) -> int:
        low, high = self.stack
        words = struct.unpack(f"<{(high - low) // 4}I", self.read(low, high - low))
        untouched: int = next((n for n, word in enumerate(words) if word != STACK_PAINT), len(words))
        return int(high - low - 4 * untouched)


class _Watchdog:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def read(self, offset: int) -> int:
        self.machine.bad(f"IWDG: read of {offset:#x}")
        return 0

    def write(self, offset: int, value: int) -> None:
        if offset or value != 0xAAAA:
            self.machine.bad(f"IWDG: {value:#x} to {offset:#x}")
        self.machine.refreshed()
