"""The demo firmware: rebuilt bit for bit, plausible as an image, and run in an emulated Cortex-M.

The emulator has flash, 64 KiB of RAM and exactly the registers that a correct start needs; any other access to a
peripheral, and any USART access before its clock is on, fails the test. What it cannot show: whether the register addresses
are those of the silicon. They are from memory of the reference manuals and are written down here a second time.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import struct
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import pytest
import unicorn
from elftools.elf.elffile import ELFFile
from unicorn import arm_const

from bridged.sim.demo_images import DemoImage, demo_image, demo_images
from tests import build_firmware

emulator: Any = unicorn  # it has no type hints

FLASH_BASE, FLASH_BYTES = 0x08000000, 0x100000
RAM_BASE, RAM_BYTES = 0x20000000, 0x10000
CHIPS = ("L476", "F756", "H743")


@dataclass(frozen=True)
class Board:
    """What a start must do on this chip: clock enables (register, bit), pins, the USART, and the oscillator after reset."""

    clock_hz: int
    gpio_enable: tuple[int, int]
    usart_enable: tuple[int, int]
    gpio: int
    pins: tuple[int, int]
    usart: int


BOARDS = {
    "L476": Board(4_000_000, (0x4002104C, 0), (0x40021058, 17), 0x48000000, (2, 3), 0x40004400),
    "F756": Board(16_000_000, (0x40023830, 2), (0x40023840, 18), 0x40020800, (10, 11), 0x40004800),
    "H743": Board(64_000_000, (0x580244E0, 1), (0x580244E8, 18), 0x58020400, (10, 11), 0x40004800),
}

CR1, BRR, ISR, ICR, RDR, TDR = 0x00, 0x0C, 0x1C, 0x20, 0x24, 0x28
ORE, RXNE, TXE = 1 << 3, 1 << 5, 1 << 7


@dataclass
class Machine:
    """A strict machine: every register that the board has, nothing else. TXE is busy for a few polls after each byte."""

    board: Board
    flash: bytes
    registers: dict[int, int] = field(default_factory=dict)
    sent: bytearray = field(default_factory=bytearray)
    received: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    busy_polls: int = 0
    overrun: bool = False
    polls_idle: int = 0

    def __post_init__(self) -> None:
        gpio, low = self.board.gpio, self.board.pins[0] < 8
        self.afr = gpio + (0x20 if low else 0x24)
        for address in (self.board.gpio_enable[0], self.board.usart_enable[0], gpio, self.afr):
            self.registers[address] = 0
        # All pins analog after reset, as on the L4: a read-modify-write must clear bits too.
        self.registers[gpio] = 0xFFFFFFFF
        self.cpu = emulator.Uc(emulator.UC_ARCH_ARM, emulator.UC_MODE_THUMB | emulator.UC_MODE_MCLASS)
        self.cpu.mem_map(FLASH_BASE, FLASH_BYTES, emulator.UC_PROT_READ | emulator.UC_PROT_EXEC)
        self.cpu.mem_write(FLASH_BASE, self.flash.ljust(FLASH_BYTES, b"\xff"))
        self.cpu.mem_map(RAM_BASE, RAM_BYTES, emulator.UC_PROT_READ | emulator.UC_PROT_WRITE)
        self.cpu.mem_write(RAM_BASE, b"\xa5" * RAM_BYTES)  # RAM is never zero by luck
        pages = {address & ~0xFFF for address in (*self.registers, self.board.usart)}
        for page in pages:
            self.cpu.mmio_map(page, 0x1000, self._read, page, self._write, page)
        self.cpu.hook_add(emulator.UC_HOOK_MEM_UNMAPPED, self._unmapped)
        stack, reset = struct.unpack_from("<II", self.flash)
        self.cpu.reg_write(arm_const.UC_ARM_REG_SP, stack)
        self.cpu.reg_write(arm_const.UC_ARM_REG_MSP, stack)
        self.pc = reset

    def run(self) -> bytes:
        """Run until it only waits for input; returns everything sent since the last call."""
        self.sent.clear()
        self.polls_idle = 0
        try:
            self.cpu.emu_start(self.pc, 0, count=3_000_000)
        except emulator.UcError as error:
            self.faults.append(str(error))
        assert self.faults == []
        self.pc = self.cpu.reg_read(arm_const.UC_ARM_REG_PC) | 1
        return bytes(self.sent)

    def _fault(self, text: str) -> int:
        self.faults.append(text)
        self.cpu.emu_stop()
        return 0

    def _unmapped(self, _cpu: object, _access: int, address: int, _size: int, _value: int, _data: object) -> bool:
        self._fault(f"access to {address:#010x}, where nothing is")
        return False

    def _on(self, enable: tuple[int, int]) -> bool:
        return bool(self.registers[enable[0]] >> enable[1] & 1)

    def _allowed(self, address: int) -> bool:
        if address >> 10 == self.board.usart >> 10:
            return self._on(self.board.usart_enable)
        if address >> 10 == self.board.gpio >> 10:
            return address in self.registers and self._on(self.board.gpio_enable)
        return address in self.registers

    def _read(self, _cpu: object, offset: int, size: int, page: int) -> int:
        address = page + offset
        if size != 4 or not self._allowed(address):
            return self._fault(f"read of {size} bytes at {address:#010x}")
        if address in self.registers:
            return self.registers[address]
        register = address - self.board.usart
        if register == ISR:
            return self._status()
        if register == RDR and self.received:
            return self.received.pop(0)
        return self._fault(f"read of USART register {register:#x}")

    def _status(self) -> int:
        ready = self.busy_polls == 0
        self.busy_polls = max(0, self.busy_polls - 1)
        if ready and not self.received:
            # Nothing to do for a while: whoever runs the machine has the next word.
            self.polls_idle += 1
            if self.polls_idle > 100:
                self.cpu.emu_stop()
        return (TXE if ready else 0) | (RXNE if self.received else 0) | (ORE if self.overrun else 0)

    def _write(self, _cpu: object, offset: int, size: int, value: int, page: int) -> None:
        address = page + offset
        if size != 4 or not self._allowed(address):
            self._fault(f"write of {size} bytes at {address:#010x}")
        elif address in self.registers:
            self.registers[address] = value
        else:
            self._write_usart(address - self.board.usart, value)

    def _write_usart(self, register: int, value: int) -> None:
        if register == BRR:
            self.rates.append(self.board.clock_hz / value)
        elif register == CR1 and value == 0b1101 and self.rates:  # UE, TE, RE; 8 data bits, no parity, after the rate
            pass
        elif register == ICR and value == ORE:
            self.overrun = False
        elif register == TDR and self.busy_polls == 0 and self._pins_are_the_usarts():
            self.sent.append(value)
            self.busy_polls = 3
            self.polls_idle = 0
        else:
            self._fault(f"write of {value:#x} to USART register {register:#x}")

    def _pins_are_the_usarts(self) -> bool:
        modes, functions = self.registers[self.board.gpio], self.registers[self.afr]
        return all(modes >> 2 * pin & 3 == 2 and functions >> 4 * (pin % 8) & 0xF == 7 for pin in self.board.pins)


def flash_of(image: DemoImage) -> bytes:
    """Flash as it is after programming: every PT_LOAD at its load address."""
    flash = bytearray(b"\xff" * FLASH_BYTES)
    for segment in ELFFile(BytesIO(image.read())).iter_segments():
        if segment["p_type"] == "PT_LOAD" and segment["p_filesz"]:
            at = segment["p_paddr"] - FLASH_BASE
            flash[at : at + segment["p_filesz"]] = segment.data()
    return bytes(flash)


@pytest.mark.skipif(
    importlib.util.find_spec("ziglang") is None, reason="no compiler: pip install ziglang==" + build_firmware.COMPILER_VERSION
)
def test_committed_images_are_what_their_sources_give() -> None:
    assert build_firmware.check() == []


def test_manifest_names_three_chips_and_their_sources() -> None:
    assert tuple(image.chip for image in demo_images()) == CHIPS
    assert all(f"STM32{image.chip}, version " in image.banner for image in demo_images())
    assert len({image.sha256 for image in demo_images()}) == len(CHIPS)


def test_a_damaged_image_is_not_handed_out() -> None:
    image = demo_image("L476")
    damaged = dataclasses.replace(image, sha256="0" * 64)
    with pytest.raises(ValueError, match="differs from the manifest"):
        damaged.read()


@pytest.mark.parametrize("chip", CHIPS)
def test_elf_says_nothing_about_the_machine_that_built_it(chip: str) -> None:
    content = demo_image(chip).read()
    assert b"/" not in content.split(b"hello from", 1)[0]
    names = {section.name for section in ELFFile(BytesIO(content)).iter_sections()}
    assert not [name for name in names if name.startswith((".debug", ".comment", ".note", ".symtab"))]


@pytest.mark.parametrize("chip", CHIPS)
def test_vector_table_is_plausible(chip: str) -> None:
    image, flash = demo_image(chip), flash_of(demo_image(chip))
    stack, reset, *others = struct.unpack_from("<16I", flash)
    assert RAM_BASE < stack <= RAM_BASE + RAM_BYTES - 16
    assert stack % 8 == 0
    assert reset == image.entry
    assert reset & 1
    end = image.load_address + image.load_bytes
    assert all(entry & 1 and image.load_address < entry < end for entry in (reset, *others) if entry)
    assert flash[image.load_bytes :] == b"\xff" * (FLASH_BYTES - image.load_bytes)


@pytest.mark.parametrize("chip", CHIPS)
def test_descriptor_is_there_once_and_holds_the_banner(chip: str) -> None:
    image, flash = demo_image(chip), flash_of(demo_image(chip))
    assert flash.count(b"BRIDGED-APP1\0") == 1
    assert flash.count(image.banner.encode() + b"\0") == 1
    assert b"BRIDGED-APP1\0" + image.banner.encode() + b"\0" in flash[:4096]


@pytest.mark.parametrize(("chip", "sector_bytes", "sectors"), [("L476", [2048] * 64, 30), ("H743", [131072] * 8, 2)])
def test_image_fills_several_sectors(chip: str, sector_bytes: list[int], sectors: int) -> None:
    left, touched = demo_image(chip).load_bytes, 0
    for size in sector_bytes:
        if left > 0:
            left, touched = left - size, touched + 1
    assert touched == sectors


def test_f756_image_reaches_into_the_large_sector_and_all_have_a_blank_stretch() -> None:
    assert 4 * 32768 < demo_image("F756").load_bytes < 4 * 32768 + 131072
    for image in demo_images():
        assert b"\xff" * 4096 in flash_of(image)[: image.load_bytes]


@pytest.mark.parametrize("chip", CHIPS)
def test_it_prints_its_banner_at_the_right_rate_and_answers_lines(chip: str) -> None:
    image, board = demo_image(chip), BOARDS[chip]
    machine = Machine(board, flash_of(image))
    assert machine.run() == image.banner.encode() + b"\r\n"
    assert len(machine.rates) == 1
    assert machine.rates[0] == pytest.approx(115200, rel=0.02)
    machine.received += b"ping\n"
    assert machine.run() == b"ok ping\r\n"
    machine.overrun = True
    machine.received += b"with return\r\n\n"
    assert machine.run() == b"ok with return\r\nok \r\n"
    assert not machine.overrun


def test_a_line_that_never_ends_stays_in_its_buffer() -> None:
    machine = Machine(BOARDS["F756"], flash_of(demo_image("F756")))
    machine.run()
    before = machine.cpu.mem_read(RAM_BASE + 256, RAM_BYTES - 4096)
    machine.received += b"x" * 1000 + b"\n"
    assert machine.run() == b"ok " + b"x" * 95 + b"\r\n"
    assert machine.cpu.mem_read(RAM_BASE + 256, RAM_BYTES - 4096) == before
