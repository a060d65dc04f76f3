"""The ROM loader of a simulated STM32 after its synchronisation: every command of AN3155, as the silicon answers it.

Written as the ROM is: one loop that waits for a byte, without any time-out. It is a generator that asks for bytes (an
``int``), for time (``Work``: erasing, programming) or to leave (``Leave``), and knows neither wires nor clocks; the device
around it does. While it works or sends it does not read, and what comes then is the device's matter.

What is deliberately not here: kindness. A protected sector, a misaligned write, a page number that does not exist are
answered with ACK, because the silicon does so. Sources: AN3155 for the sequences, AN2606 for the deviations of versions
(``Chip.quirks``), ST's open boot loader where these two are silent (list buffer of 581 pages, start address checked only).
The ROM is one program with one state, and so is this: one file.
"""

from __future__ import annotations

import operator
import random
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from enum import Enum
from functools import reduce
from typing import Literal

from bridged.chips.model import Chip, Quirk, Sector
from bridged.sim.faults import Faults
from bridged.sim.memory import BusFault, Memory, TornWord

ACK = 0x79
NACK = 0x1F

GET, GET_VERSION, GET_ID, READ, GO, WRITE = 0x00, 0x01, 0x02, 0x11, 0x21, 0x31
ERASE, EXTENDED_ERASE, SPECIAL, EXTENDED_SPECIAL = 0x43, 0x44, 0x50, 0x51
WRITE_PROTECT, WRITE_UNPROTECT, READOUT_PROTECT, READOUT_UNPROTECT, GET_CHECKSUM = 0x63, 0x73, 0x82, 0x92, 0xA1

_ALLOWED_PROTECTED = {GET, GET_VERSION, GET_ID, READOUT_UNPROTECT, SPECIAL}
_LIST_CAPACITY = 581  # pages that the receive buffer of the open boot loader holds: of a longer list only the last ones count
_VOLTAGE_ADDRESS = 0xFFFF0000
_SUBCODES = {"H5": {0x01, 0x02, 0x83}, "C5": {0x02, 0xA4}, "U5": {0x82}}

Seconds = float | Literal["typical"] | None
"""A time: seconds; ``typical``: the chip table's value with some spread; None: it never ends."""

# Programming of 256 bytes, typical, as the loader does it. F2/F4/F7: 16 us for 4 bytes; F0/F1/F3: 52 us a half-word;
# L4/G0/G4 and relatives: 82 us for 8 bytes; H7: 100 us for 32; H5/U5: 118 us for 16; L0/L1: 3.3 ms a half-page. From memory.
_PROGRAM_S = {
    **dict.fromkeys(("F2", "F4", "F7"), 0.001024),
    **dict.fromkeys(("F0", "F1", "F3"), 0.0067),
    **dict.fromkeys(("H7", "H7R", "H7RS", "H7R/S"), 0.0008),
    **dict.fromkeys(("H5", "U5", "U3", "C5", "WBA", "L5"), 0.0019),
    **dict.fromkeys(("L0", "L1"), 0.0066),
}


@dataclass(frozen=True, slots=True)
class Timing:
    """How long things take. ``startup_s`` and ``program_s_per_256`` None: as the family does.

    ``spread``: real erases differ; each one is drawn between ``1 - spread`` and ``1 + spread`` times the typical value, and
    never exceeds the chip table's worst case. ``reply_s``: from the end of the host's last byte to the start of the answer.
    """

    startup_s: float | None = None
    sector_erase_s: Seconds = "typical"
    mass_erase_s: Seconds = "typical"
    spread: float = 0.25
    program_s_per_256: float | None = None
    option_write_s: float = 0.05
    reply_s: float = 5e-6
    sync_reply_s: float = 2e-4
    checksum_s_per_word: float = 5e-8


@dataclass(slots=True)
class Stats:
    """What happened to one device since it was made.

    ``overruns``: bytes that came while the loader erased or programmed, or that were lost while it was sending; a correct host
    causes none. ``ignored``: bytes that came while nobody listened (reset, start-up, deaf, HardFault). ``hazard_resets``:
    resets or power losses in the middle of an erase or an option-byte write, each ``(time in ns, what was going on)``.
    """

    bytes_in: int = 0
    bytes_out: int = 0
    overruns: int = 0
    ignored: int = 0
    parity_errors: int = 0
    nacks: int = 0
    syncs: int = 0
    commands: Counter[int] = field(default_factory=Counter)
    erases: Counter[int] = field(default_factory=Counter)
    mass_erases: int = 0
    programs: int = 0
    resets: int = 0
    self_resets: int = 0
    power_cycles: int = 0
    hazard_resets: list[tuple[int, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


class Kind(Enum):
    ERASE = "erase"
    PROGRAM = "program"
    OPTION = "option bytes"
    COMPUTE = "compute"


@dataclass(frozen=True, slots=True)
class Work:
    """The loader is busy for ``duration_ns`` (None: for ever), then ``done`` takes effect.

    ``cut`` instead, with the fraction that was over, when a reset comes first. ``awaited`` False: the loader goes on at once.
    """

    kind: Kind
    duration_ns: int | None
    done: Callable[[], None]
    cut: Callable[[float], None]
    awaited: bool = True


@dataclass(frozen=True, slots=True)
class Leave:
    """The loader ends: ``reset`` (system reset), ``go`` (jump through the vector table at ``address``) or ``hang``."""

    how: str
    address: int = 0
    why: str = ""


Request = int | Work | Leave
Run = Generator[Request, bytes, None]
Answer = Generator[Request, bytes, bool]


def _nothing() -> None:
    return


def _uncut(_: float) -> None:
    return


def _xor(data: bytes) -> int:
    return reduce(operator.xor, data, 0)


def protocol_version(text: str) -> int:
    """``3.1`` to 0x31; the first number where a row has several."""
    for word in text.replace("(", " ").split():
        major, dot, minor = word.partition(".")
        if dot and major.isdigit() and minor[:1].isdigit():
            return int(major) << 4 | int(minor[0])
    return 0x31


class Loader:
    """One run of the loader, from synchronisation to the next reset."""

    def __init__(
        self,
        chip: Chip,
        memory: Memory,
        *,
        loader_id: int | None,
        protocol: int,
        checksum: bool,
        extended_special: bool,
        timing: Timing,
        faults: Faults,
        stats: Stats,
        rng: random.Random,
        send: Callable[[bytes], None],
        background_busy: Callable[[], bool],
    ) -> None:
        self.chip = chip
        self.memory = memory
        self.loader_id = loader_id
        self.protocol = protocol
        self.timing = timing
        self.faults = faults
        self.stats = stats
        self.rng = rng
        self.send = send
        self.background_busy = background_busy
        self.bad = False  # set by the device: a byte of this stage came with wrong parity or without a stop bit
        self.opcode = 0
        self.voltage_range = 0  # F2, F4, F7: 0 = x8 parallelism, 3 = x32
        self._handlers: dict[int, Callable[[], Run]] = {
            GET: self._get,
            GET_VERSION: self._get_version,
            GET_ID: self._get_id,
            READ: self._read,
            GO: self._go,
            WRITE: self._write,
        }
        if chip.erase_command == ERASE:
            self._handlers[ERASE] = self._erase
        else:
            self._handlers[EXTENDED_ERASE] = self._extended_erase
        if chip.family in _SUBCODES:
            self._handlers[SPECIAL] = self._special
        if extended_special:
            self._handlers[EXTENDED_SPECIAL] = self._extended_special
        if chip.parity != "N":  # WB0, WL3, BlueNRG: another family of loaders
            self._handlers[WRITE_PROTECT] = self._write_protect
            self._handlers[WRITE_UNPROTECT] = self._write_unprotect
        if chip.family != "H5":  # its protection is the product state
            self._handlers[READOUT_PROTECT] = self._readout_protect
            self._handlers[READOUT_UNPROTECT] = self._readout_unprotect
        if checksum:
            self._handlers[GET_CHECKSUM] = self._get_checksum

    def has(self, quirk: Quirk) -> bool:
        """A quirk of certain versions holds only for a part that is known to have one of them."""
        return any(row.quirk is quirk and (not row.loader_ids or self.loader_id in row.loader_ids) for row in self.chip.quirks)

    def run(self) -> Run:
        while True:
            first = (yield 1)[0]
            if self._spoilt():
                self._refuse()
                continue
            second = (yield 1)[0]
            handler = self._handlers.get(first)
            if self._spoilt() or second != first ^ 0xFF or handler is None:
                self._refuse()
                continue
            self.opcode = first
            self.stats.commands[first] += 1
            self.faults.command(first)
            if self.memory.rdp and first not in _ALLOWED_PROTECTED:
                self._refuse()
                if self.has(Quirk.TWO_NACKS) and first in (READ, WRITE, GO):
                    self._refuse()
                continue
            try:
                yield from handler()
            except BusFault as fault:
                self.stats.faults.append(str(fault))
                yield Leave("hang", why=str(fault))

    # --- answers --------------------------------------------------------------------------------------------------

    def _spoilt(self) -> bool:
        bad, self.bad = self.bad, False
        return bad

    def _refuse(self) -> None:
        self.stats.nacks += 1
        self.send(bytes((NACK,)))

    def _answer(self, stage: str, good: bool = True, then: bytes = b"") -> Answer:
        """ACK (and ``then`` right behind it) or NACK, unless a fault was asked for here. Whether the command goes on."""
        fault = self.faults.stage(self.opcode, stage)
        good = not self._spoilt() and good
        ack = bytes((ACK,))
        if fault is not None:
            if fault.action == "nack":
                good = False
            elif fault.action == "hang":
                yield Leave("hang", why=f"fault at {self.opcode:#04x} {stage}")
            elif fault.action == "late":
                yield Work(Kind.COMPUTE, round(fault.seconds * 1e9), _nothing, _uncut)
            elif fault.action == "lose":
                ack = b""
            elif fault.action == "flip":
                ack = bytes((ACK ^ fault.mask,))
        if not good:
            self._refuse()
            return False
        self.send(ack + then)
        return True

    def _open(self, then: bytes = b"") -> Answer:
        return self._answer("opcode", then=then)

    def _block(self, stage: str, count: int) -> Generator[Request, bytes, bytes | None]:
        """``count`` bytes and their checksum, without any answer when good; None (and NACK) when the checksum is wrong."""
        data = yield count + 1
        good = _xor(data) == (0xFF if count == 1 else 0)  # a single byte is followed by its complement
        if good and not self.bad:
            return data[:count]
        yield from self._answer(stage, good=False)
        return None

    def _address(self, allowed: Callable[[int], bool]) -> Generator[Request, bytes, int | None]:
        """The address stage up to its ACK; None when it was refused."""
        data = yield from self._block("address", 4)
        if data is None:
            return None
        address = int.from_bytes(data, "big")
        good = allowed(address)
        if not good and self.has(Quirk.NO_NACK_ON_BAD_ADDRESS):
            return None
        return address if (yield from self._answer("address", good)) else None

    # --- information ----------------------------------------------------------------------------------------------

    def _get(self) -> Run:
        codes = bytes(sorted(self._handlers))
        count = len(codes) + 2 if self.has(Quirk.GET_COUNT_WRONG) else len(codes)
        if (yield from self._open(bytes((count, self.protocol)) + codes)):
            yield from self._answer("done")

    def _get_version(self) -> Run:
        if (yield from self._open(bytes((self.protocol, 0, 0)))):
            yield from self._answer("done")

    def _get_id(self) -> Run:
        pid = self.chip.pid.to_bytes(2, "big")
        # The loaders of WB0, WL3 and BlueNRG give three bytes, the product last.
        body = bytes((1,)) + pid if self.chip.parity != "N" else bytes((2, 0)) + pid
        if (yield from self._open(body)):
            yield from self._answer("done")

    def _read(self) -> Run:
        if not (yield from self._open()):
            return
        address = yield from self._address(self._may_read)
        if address is None:
            return
        length = yield from self._block("length", 1)
        if length is None:
            return
        count = length[0] + 1
        if self.background_busy():
            yield Leave("hang", why="flash command while an erase goes on in the background")
        data = self.memory.read(address, count)
        yield from self._answer("length", then=self.faults.cells("misread", address, data))

    def _may_read(self, address: int) -> bool:
        if self.memory.in_ram(address) and self.has(Quirk.NO_RAM_ACCESS):
            return False
        return self.memory.readable(address)

    def _go(self) -> Run:
        if self.has(Quirk.GO_FIRST_ACK_MISSING):
            self._spoilt()
        elif not (yield from self._open()):
            return
        address = yield from self._address(lambda a: self.memory.in_flash(a) or self.memory.in_ram(a))
        if address is None:
            return
        yield Leave("hang", why="Go of this loader version") if self.has(Quirk.GO_BROKEN) else Leave("go", address)

    def _get_checksum(self) -> Run:
        if not (yield from self._open()):
            return
        address = yield from self._address(lambda a: a % 4 == 0 and self._may_read(a))
        if address is None:
            return
        size = yield from self._block("words", 4)
        if size is None:
            return
        words = int.from_bytes(size, "big")
        try:
            data = self.memory.read(address, words * 4) if 0 < words <= 1 << 24 else b""
        except TornWord:
            raise
        except BusFault:
            data = b""
        if not (yield from self._answer("words", bool(data))):
            return
        values: list[int] = []
        for stage in ("poly", "init"):
            block = yield from self._block(stage, 4)
            if block is None or not (yield from self._answer(stage)):
                return
            values.append(int.from_bytes(block, "big"))
        yield Work(Kind.COMPUTE, round(words * self.timing.checksum_s_per_word * 1e9), _nothing, _uncut)
        crc = crc32_mpeg(data, *values).to_bytes(4, "big")
        yield from self._answer("done", then=crc + bytes((_xor(crc),)))

    # --- write ----------------------------------------------------------------------------------------------------

    def _may_write(self, address: int) -> bool:
        if self.memory.in_flash(address):
            return True
        if self.memory.in_ram(address):
            return not self.has(Quirk.NO_RAM_ACCESS)
        if address == _VOLTAGE_ADDRESS:
            return self.chip.family in ("F2", "F4", "F7")
        return address == self.memory.option_base

    def _write(self) -> Run:
        if not (yield from self._open()):
            return
        address = yield from self._address(self._may_write)
        if address is None:
            return
        length = yield 1
        frame = yield length[0] + 2
        data = frame[:-1]
        good = _xor(frame) == length[0] and not self.bad
        if not good:
            yield from self._answer("data", good=False)
            return
        if address == _VOLTAGE_ADDRESS:
            good = len(data) <= 4 and data[0] <= 4 and data[1:].count(0xFF) == len(data) - 1
            self.voltage_range = data[0] if good else self.voltage_range
            yield from self._answer("data", good)
        elif self.memory.in_flash(address):
            yield from self._program(address, data)
            yield from self._answer("data")
        elif self.memory.in_ram(address):
            broken = self.has(Quirk.RAM_WRITE_BROKEN)
            self.memory.write_ram(address, bytes(b ^ 0x5A for b in data) if broken else data)
            yield from self._answer("data")
        else:
            yield from self._write_options(data)

    def _program(self, address: int, data: bytes) -> Run:
        if self.background_busy():
            yield Leave("hang", why="flash command while an erase goes on in the background")
        per_256 = self.timing.program_s_per_256
        seconds = _PROGRAM_S.get(self.chip.family, 0.0026) if per_256 is None else per_256
        if self.voltage_range >= 3:
            seconds /= 4
        data = self.faults.cells("misprogram", address, data)
        self.stats.programs += 1
        yield Work(
            Kind.PROGRAM,
            round(seconds * 1e9 * len(data) / 256),
            lambda: self.memory.program(address, data),
            lambda fraction: self.memory.interrupt_program(address, data, fraction),
        )

    def _option_work(self, done: Callable[[], None]) -> Work:
        return Work(Kind.OPTION, round(self.timing.option_write_s * 1e9), done, lambda _: self.memory.corrupt_options())

    def _write_options(self, data: bytes) -> Run:
        yield self._option_work(lambda: self.memory.write_options(data))
        yield from self._answer("data")
        if not self.has(Quirk.OPTION_LAUNCH_MISSING):
            yield Leave("reset")

    # --- erase ----------------------------------------------------------------------------------------------------

    def _draw(self, typical_s: float, max_s: float) -> float:
        typical_s = typical_s or max_s / 2 or 0.02
        drawn = typical_s * (1 + self.timing.spread * (2 * self.rng.random() - 1))
        if self.voltage_range >= 3:
            drawn /= 2
        return min(drawn, max_s) if max_s else drawn

    def _erase_sectors(self, sectors: list[Sector], awaited: bool = True) -> Run:
        hang = self.faults.erase_hangs()
        for sector in sectors:
            wanted = self.timing.sector_erase_s
            seconds = self._draw(sector.erase_typ_s, sector.erase_max_s) if wanted == "typical" else wanted
            if sector.code in self.memory.protected:
                continue  # the controller refuses at once, and nobody is told
            self.stats.erases[sector.code] += 1
            yield Work(
                Kind.ERASE,
                None if hang or seconds is None else round(seconds * 1e9),
                lambda s=sector: self.memory.erase(s),  # type: ignore[misc]
                lambda fraction, s=sector: self.memory.interrupt_erase(s, fraction),  # type: ignore[misc]
                awaited,
            )

    def _mass_erase(self, banks: set[int], *, regression: bool = False) -> Run:
        if not regression and self.background_busy():
            yield Leave("hang", why="flash command while an erase goes on in the background")
        hang = self.faults.erase_hangs()
        part = [s for s in self.memory.sectors.values() if s.bank in banks]
        if not regression and any(s.code in self.memory.protected for s in part):
            return  # One protected sector, and nothing at all is erased (RM0090, RM0490); nobody is told.
        self.stats.mass_erases += 1
        share = sum(s.size_bytes for s in part) / self.memory.map.size_bytes
        wanted = self.timing.mass_erase_s
        worst = self.chip.mass_erase_max_s
        seconds = self._draw(worst * share / 2, worst * share) if wanted == "typical" else wanted

        def done() -> None:
            for sector in part:
                self.stats.erases[sector.code] += 1
                self.memory.erase(sector, all_the_same=regression)

        def cut(fraction: float) -> None:
            for sector in part:
                self.memory.interrupt_erase(sector, fraction, all_the_same=regression)

        awaited = regression or not self.has(Quirk.ERASE_NOT_AWAITED)
        yield Work(Kind.ERASE, None if hang or seconds is None else round(seconds * 1e9), done, cut, awaited)

    def _all_banks(self) -> set[int]:
        return {s.bank for s in self.memory.map.sectors}

    def _erase(self) -> Run:
        if not (yield from self._open()):
            return
        count = (yield 1)[0]
        if count == 0xFF:
            check = (yield 1)[0]
            # Anything but 0x00 is acknowledged and does nothing (AN3155).
            if check == 0 and not self.bad:
                if self.chip.mass_erase:
                    yield from self._mass_erase(self._all_banks())
                else:
                    yield from self._answer("list", good=False)
                    return
            yield from self._answer("list")
            return
        data = yield count + 2
        if _xor(data) != count or self.bad:
            yield from self._answer("list", good=False)
            return
        yield from self._erase_codes(list(data[:-1]))

    def _extended_erase(self) -> Run:
        if not (yield from self._open()):
            return
        head = yield 2
        count = int.from_bytes(head, "big")
        if count >= 0xFFF0:
            check = (yield 1)[0]
            good = check == _xor(head) and not self.bad and count >= 0xFFFD
            banks = self._all_banks()
            if count == 0xFFFF:
                good = good and self.chip.mass_erase
            else:
                bank = 0xFFFF - count
                good = good and len(banks) > 1 and not self.has(Quirk.BANK_ERASE_BROKEN)
                banks = {bank}
            if good:
                yield from self._mass_erase(banks)
            yield from self._answer("list", good)
            return
        size = 2 * (count + 1)
        data = yield size + 1
        if _xor(head) ^ _xor(data) or self.bad:
            yield from self._answer("list", good=False)
            return
        codes = [int.from_bytes(data[at : at + 2], "big") for at in range(0, size, 2)]
        yield from self._erase_codes(codes[-_LIST_CAPACITY:])

    def _erase_codes(self, codes: list[int]) -> Run:
        if self.background_busy():
            yield Leave("hang", why="flash command while an erase goes on in the background")
        # A number without a sector is an error of the flash driver, and those are not told.
        sectors = [self.memory.sectors[code] for code in codes if code in self.memory.sectors]
        if self.has(Quirk.ONE_SECTOR_PER_ERASE):
            # Where it is known for the second bank only, the first bank's sectors are not concerned.
            several = len(self._all_banks()) > 1
            first = sectors[0] if sectors else None
            sectors = [s for s in sectors if s is first or (several and s.bank == 1)]
        yield from self._erase_sectors(sectors, awaited=not self.has(Quirk.ERASE_NOT_AWAITED))
        yield from self._answer("list")

    # --- protection -----------------------------------------------------------------------------------------------

    def _write_protect(self) -> Run:
        if not (yield from self._open()):
            return
        count = (yield 1)[0]
        data = yield count + 2
        if not (yield from self._answer("list", _xor(data) == count)):
            return
        codes = set(data[:-1]) & set(self.memory.sectors)
        yield self._option_work(lambda: self.memory.protect(codes))
        yield Leave("reset")

    def _write_unprotect(self) -> Run:
        if not (yield from self._open()):
            return
        yield self._option_work(lambda: self.memory.protect(set()))
        if (yield from self._answer("done")):
            yield Leave("reset")

    def _readout_protect(self) -> Run:
        if not (yield from self._open()):
            return
        yield self._option_work(lambda: self.memory.store_rdp(1))
        if (yield from self._answer("done")):
            yield Leave("reset")

    def _readout_unprotect(self) -> Run:
        if not (yield from self._open()):
            return
        # Both ACKs come before anything is erased; the second one proves nothing.
        if not (yield from self._answer("done")):
            return
        # Level 0 comes after the erase, so whoever finds it knows that everything is gone (RM0090); write protection stays.
        yield from self._mass_erase(self._all_banks(), regression=True)
        self.memory.wipe_ram()
        yield self._option_work(self.memory.regress)
        yield Leave("reset")

    def _special(self) -> Run:
        if not (yield from self._open()):
            return
        sub = yield from self._block("address", 2)
        if sub is None:
            return
        code = int.from_bytes(sub, "big")
        allowed = code in _SUBCODES.get(self.chip.family, set()) and (not self.memory.rdp or code in (0x02, 0x82))
        if not (yield from self._answer("address", allowed)):
            return
        if (yield from self._packet("data", 128)) is None:
            return
        # The answer: no data, and a status of one byte, 0.
        if (yield from self._answer("data", then=b"\0\0\0\x01\0")) and (yield from self._answer("done")) and code == 0x02:
            yield Leave("reset")

    def _extended_special(self) -> Run:
        if not (yield from self._open()):
            return
        sub = yield from self._block("address", 2)
        if sub is None or not (yield from self._answer("address", False)):
            return  # no sub-code of this command is published for any chip here

    def _packet(self, stage: str, limit: int) -> Generator[Request, bytes, bytes | None]:
        """Length (2 bytes), data, checksum; refused when longer than ``limit``."""
        head = yield 2
        length = int.from_bytes(head, "big")
        if length > limit:
            yield from self._answer(stage, good=False)
            return None
        data = yield length + 1
        if _xor(head) ^ _xor(data) or self.bad:
            yield from self._answer(stage, good=False)
            return None
        return data[:-1]


def _crc_table(polynomial: int) -> list[int]:
    table = []
    for value in range(256):
        crc = value << 24
        for _ in range(8):
            crc = (crc << 1 ^ (polynomial if crc & 0x80000000 else 0)) & 0xFFFFFFFF
        table.append(crc)
    return table


def crc32_mpeg(data: bytes, polynomial: int = 0x04C11DB7, initial: int = 0xFFFFFFFF) -> int:
    """CRC of little-endian 32-bit words, most significant bit first, without reflection: the STM32's CRC unit."""
    table = _crc_table(polynomial)
    crc = initial
    for at in range(0, len(data), 4):
        for value in reversed(data[at : at + 4]):
            crc = (crc << 8 & 0xFFFFFFFF) ^ table[crc >> 24 ^ value]
    return crc
