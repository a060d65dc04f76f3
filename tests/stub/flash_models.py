"""Flash controllers as assertion-style models: what the silicon would refuse, ignore or answer with an error is a violation.

Written from the facts of the reference manuals as they are remembered, a second time and independently of
``chips.second_stage``; flash algorithms made by others against real silicon run on them without a violation
(``test_vendor_algorithms.py``). Nothing here was compared with silicon by us.

A model holds no bytes. ``Memory`` is where they are (the emulator's); the model decides what becomes of a store. Time is asked
from ``clock``; an erase or a program operation makes the controller busy until then. Faults on request: ``fail_next``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

KEYS = (0x45670123, 0xCDEF89AB)
BLANK = 0xFF


class Memory(Protocol):
    def read(self, address: int, count: int) -> bytes: ...
    def write(self, address: int, data: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class Area:
    """One sector: where it is, and what the controller calls it."""

    address: int
    size: int
    bank: int
    number: int


@dataclass(frozen=True, slots=True)
class Times:
    """Nanoseconds of one program operation, and of erasing a sector by its size."""

    program: int
    erase: Mapping[int, int]


@dataclass
class Bank:
    """The registers of one bank (most controllers have one set for all)."""

    number: int = 1
    control: int = 0
    status: int = 0
    locked: bool = True
    keys: int = 0
    address: int = 0
    busy_until: int = 0
    asked: bool = True  # whether the status was read since the last operation was started
    pending: list[tuple[int, int, int, bytes]] = field(default_factory=list)


@dataclass
class Controller:
    """What all have in common. Subclasses: offsets, bits, and the rules of one family."""

    areas: tuple[Area, ...]
    times: Times
    memory: Memory
    clock: Callable[[], int]
    violations: list[str]
    ecc_units: set[int] = field(default_factory=set)  # programmed since their erase, or not blank to begin with
    marginal: set[int] = field(default_factory=set)  # sectors whose erase was cut short: blank as they may read, they are not
    erases: list[int] = field(default_factory=list)
    held: bytes = b""  # what was in the sector of the last erase
    programmed: int = 0
    fail_program: dict[int, str] = field(default_factory=dict)  # address of a unit: "error", "wrong" or "stuck"
    fail_erase: dict[int, str] = field(default_factory=dict)

    ACCESS, ACCESS_AT_FIRST, WAIT_STATES = 0x00, 0, 0x7
    KEY, STATUS, CONTROL, CLEAR, ADDRESS = 0x04, 0x0C, 0x10, 0x0C, -1
    BUSY, LOCK, PROGRAM, ERASE, START = 1, 1, 1, 2, 4
    ERRORS, ONE_FOR_REFUSAL = 0, 0
    UNIT, WIDTHS, ECC = 1, (1,), False

    def __post_init__(self) -> None:
        self.banks = [Bank()]
        self.access = self.ACCESS_AT_FIRST

    @property
    def wait_states(self) -> int:
        return self.access & self.WAIT_STATES

    # --- registers

    def find(self, offset: int) -> tuple[Bank, int]:
        return self.banks[0], offset

    def busy(self, bank: Bank) -> bool:
        return self.clock() < bank.busy_until

    @property
    def works_until(self) -> int:
        return max(bank.busy_until for bank in self.banks)

    @property
    def erasing(self) -> bool:
        return self.clock() < self.works_until and any(bank.control & self.ERASE for bank in self.banks)

    @property
    def erased_share(self) -> float:
        """How far the erase is that is under way, the last of ``erases``."""
        area = self.area_at(self.erases[-1])
        assert self.erasing
        assert area is not None
        return 1 - (self.works_until - self.clock()) / self.times.erase[area.size]

    def bad(self, what: str) -> None:
        self.violations.append(f"flash {type(self).__name__}: {what}")

    def read(self, offset: int) -> int:
        bank, register = self.find(offset)
        if register == self.STATUS:
            self.commit(bank)
            bank.asked = True
            return bank.status | (self.BUSY if self.busy(bank) else 0)
        if register == self.CONTROL:
            return bank.control | (self.LOCK if bank.locked else 0)
        if register == self.CLEAR:
            return 0
        if register == self.ACCESS:
            return self.access
        if register in self.others():
            return self.others()[register]
        self.bad(f"read of register {offset:#x}")
        return 0

    def others(self) -> dict[int, int]:
        """Registers that may be read and written without any consequence that matters here: offset and value."""
        return {}

    def write(self, offset: int, value: int) -> None:
        bank, register = self.find(offset)
        self.commit(bank)
        if register == self.KEY:
            self.key(bank, value)
        elif register == self.CLEAR:
            bank.status &= ~value
        elif register == self.CONTROL:
            self.set_control(bank, value)
        elif register == self.ADDRESS:
            if self.busy(bank):
                self.bad("sector address while busy")
            bank.address = value
        elif register == self.ACCESS:
            self.access = value
        elif register not in self.others():
            self.bad(f"write of {value:#x} to register {offset:#x}")

    def key(self, bank: Bank, value: int) -> None:
        if not bank.locked:
            self.bad("key while unlocked: the silicon takes it as a wrong one and locks until a reset")
        elif value != KEYS[bank.keys]:
            self.bad(f"wrong key {value:#x}")
        else:
            bank.keys = (bank.keys + 1) % 2
            bank.locked = bank.keys != 0

    def set_control(self, bank: Bank, value: int) -> None:
        if self.busy(bank):
            self.bad("control register while busy")
        if bank.locked:
            if value & ~self.LOCK:
                self.bad("control register while locked")
            return
        if bank.pending:
            self.bad("a unit was begun and not finished")
        if value & self.LOCK:
            if value & (self.PROGRAM | self.ERASE | self.START):
                self.bad(f"locked with bits set: {value:#x}")
            bank.locked, bank.control = True, 0
            return
        if value & self.PROGRAM and value & self.ERASE:
            self.bad("program and erase at once")
        started = value & self.START
        if started and not value & self.ERASE:
            self.bad("start without erase")
        if started and value & ~self.START != bank.control & ~self.START:
            self.bad("started together with what is to be done: the sector must be chosen before")
        if value & (self.PROGRAM | self.ERASE) and bank.status & self.ERRORS:
            self.bad(f"begun with errors pending: {bank.status:#x}")
        bank.control = value & ~self.START
        if started:
            self.start_erase(bank)

    # --- erasing

    def chosen(self, bank: Bank) -> Area | None:
        raise NotImplementedError

    def start_erase(self, bank: Bank) -> None:
        area = self.chosen(bank)
        if area is None:
            self.bad(f"erase of a sector that does not exist (control {bank.control:#x}, address {bank.address:#x})")
            return
        bank.asked = False
        fault = self.fail_erase.pop(area.address, "")
        if fault == "error":
            bank.status |= self.ONE_FOR_REFUSAL
            return
        self.erases.append(area.address)
        self.marginal.discard(area.address)
        content = bytearray(b"\xff" * area.size)
        if fault == "wrong":
            content[area.size // 2] = 0xFE
        self.held = self.memory.read(area.address, area.size)
        self.memory.write(area.address, bytes(content))  # at once: who reads before it is over waits for that
        self.ecc_units -= set(range(area.address, area.address + area.size, self.UNIT))
        bank.busy_until = self.clock() + self.times.erase[area.size]

    # --- programming

    def bank_at(self, _address: int) -> Bank:
        return self.banks[0]

    def area_at(self, address: int) -> Area | None:
        return next((a for a in self.areas if a.address <= address < a.address + a.size), None)

    def store(self, address: int, size: int, value: int) -> None:
        """The CPU stores into flash. Called before the emulator carries it out; what it becomes is decided in ``commit``."""
        bank = self.bank_at(address)
        if bank.pending and len(bank.pending) * bank.pending[0][1] >= self.UNIT:
            self.commit(bank)
        if bank.locked or not bank.control & self.PROGRAM:
            self.bad(f"store at {address:#x} without PG")
        if self.busy(bank):
            self.bad(f"store at {address:#x} while busy")
        if not bank.asked and not bank.pending:
            self.bad(f"store at {address:#x} before the status after the last operation was read")
        if size not in self.widths(bank):
            self.bad(f"store of {size} bytes at {address:#x}")
        if address % size:
            self.bad(f"store at {address:#x} is not aligned")
        if bank.pending and address != bank.pending[-1][0] + size:
            self.bad(f"store at {address:#x} after {bank.pending[-1][0]:#x}: the unit is not written in order")
        if not bank.pending and address % self.unit(bank):
            self.bad(f"unit begun at {address:#x}")
        bank.pending.append((address, size, value & ((1 << 8 * size) - 1), self.memory.read(address, size)))
        if sum(size for _, size, _, _ in bank.pending) >= self.unit(bank):
            bank.asked = False
            bank.busy_until = self.clock() + self.times.program

    def widths(self, _bank: Bank) -> tuple[int, ...]:
        return self.WIDTHS

    def unit(self, _bank: Bank) -> int:
        return self.UNIT

    def commit(self, bank: Bank) -> None:
        """A whole unit was stored: what the array makes of it."""
        if not bank.pending or sum(size for _, size, _, _ in bank.pending) < self.unit(bank):
            return
        first = bank.pending[0][0]
        old = b"".join(before for _, _, _, before in bank.pending)
        new = b"".join(value.to_bytes(size, "little") for _, size, value, _ in bank.pending)
        bank.pending.clear()
        self.programmed += 1
        fault = self.fail_program.pop(first, "")
        if fault == "error":
            bank.status |= self.ONE_FOR_REFUSAL
            self.memory.write(first, old)
            return
        if fault == "stuck":
            new = old
        elif fault == "wrong":
            new = bytes([*new[:-1], new[-1] ^ 1])
        area = self.area_at(first)
        if area is not None and area.address in self.marginal:
            self.bad(f"unit at {first:#x} programmed in a sector whose erase was cut short")
        if self.ECC and first in self.ecc_units:
            self.bad(f"unit at {first:#x} programmed twice: its ECC is wrong now")
        if any(byte != BLANK for byte in old):
            self.bad(f"unit at {first:#x} programmed, and it was not blank")
        self.ecc_units.add(first)
        self.memory.write(first, bytes(a & b for a, b in zip(old, new, strict=True)))


class F1(Controller):
    """PM0075: half words, the sector by an address in AR. Also F0, F3."""

    KEY, STATUS, CONTROL, CLEAR, ADDRESS = 0x04, 0x0C, 0x10, 0x0C, 0x14
    BUSY, LOCK, PROGRAM, ERASE, START = 1 << 0, 1 << 7, 1 << 0, 1 << 1, 1 << 6
    ERRORS, ONE_FOR_REFUSAL = 0x14, 0x10
    UNIT, WIDTHS = 2, (2,)
    ACCESS_AT_FIRST = 0x30

    def chosen(self, bank: Bank) -> Area | None:
        return self.area_at(bank.address)


class F4(Controller):
    """RM0090: PSIZE says how wide a store is. Also F2, F7."""

    BUSY, LOCK, PROGRAM, ERASE, START = 1 << 16, 1 << 31, 1 << 0, 1 << 1, 1 << 16
    ERRORS, ONE_FOR_REFUSAL = 0xF2, 1 << 4
    ACCESS_AT_FIRST, WAIT_STATES = 0x701, 0xF

    def widths(self, bank: Bank) -> tuple[int, ...]:
        return (1 << (bank.control >> 8 & 3),)

    def unit(self, bank: Bank) -> int:
        return 1 << (bank.control >> 8 & 3)

    def chosen(self, bank: Bank) -> Area | None:
        number = bank.control >> 3 & 0x1F
        return next((a for a in self.areas if a.number == number), None)


class L4(Controller):
    """RM0351: double words with ECC. Also G4 (RM0440)."""

    KEY, STATUS, CONTROL, CLEAR = 0x08, 0x10, 0x14, 0x10
    BUSY, LOCK, PROGRAM, ERASE, START = 1 << 16, 1 << 31, 1 << 0, 1 << 1, 1 << 16
    ERRORS, ONE_FOR_REFUSAL = 0xC3FA, 1 << 3
    UNIT, WIDTHS, ECC = 8, (4,), True
    ACCESS_AT_FIRST = 0x601

    def chosen(self, bank: Bank) -> Area | None:
        number, second = bank.control >> 3 & 0xFF, bank.control >> 11 & 1
        return next((a for a in self.areas if (a.number, a.bank) == (number, second + 1)), None)


class G0(L4):
    """RM0444: as the L4; CFGBSY from the first word of a unit until it is programmed."""

    BUSY = 1 << 16
    ACCESS_AT_FIRST = 0x40600

    def read(self, offset: int) -> int:
        value = super().read(offset)
        if offset == self.STATUS and (self.banks[0].pending or self.busy(self.banks[0])):
            value |= 1 << 18
        return value

    def chosen(self, bank: Bank) -> Area | None:
        return next((a for a in self.areas if a.number == bank.control >> 3 & 0x3F), None)


class H7(Controller):
    """RM0433: words of 32 bytes with ECC; each bank has its registers; errors are cleared in CCR."""

    KEY, STATUS, CONTROL, CLEAR = 0x04, 0x10, 0x0C, 0x14
    BUSY, LOCK, PROGRAM, ERASE, START = 0x5, 1 << 0, 1 << 1, 1 << 2, 1 << 7
    ERRORS, ONE_FOR_REFUSAL = 0x07EE0000, 1 << 17
    UNIT, WIDTHS, ECC = 32, (4,), True
    ACCESS_AT_FIRST, WAIT_STATES = 0x37, 0xF

    def __post_init__(self) -> None:
        super().__post_init__()
        self.banks = [Bank(1), Bank(2)]
        self.second = next((a.address for a in self.areas if a.bank == 2), 1 << 32)

    def find(self, offset: int) -> tuple[Bank, int]:
        return self.banks[offset >> 8 & 1], offset & 0xFF

    def read(self, offset: int) -> int:
        value = super().read(offset)
        bank, register = self.find(offset)
        return value | (2 if register == self.STATUS and bank.pending else 0)  # WBNE: a word is begun

    def bank_at(self, address: int) -> Bank:
        return self.banks[address >= self.second]

    def chosen(self, bank: Bank) -> Area | None:
        number = bank.control >> 8 & 7
        return next((a for a in self.areas if (a.number, a.bank) == (number, bank.number)), None)
