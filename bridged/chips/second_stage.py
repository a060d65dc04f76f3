"""Where and how the second-stage loader runs on a part: one row a product id; a part without a row is flashed by AN3155.

A row says everything that the loader does not know by itself (``bridged/stub/stub.h``): where in RAM it goes, the pokes that
set clocks, pins, DMA and USART, and the registers of the flash controller. It holds no algorithm: ``target`` puts a row and
the loader's code together.

Everything that a register is called or where it lies is from memory of the reference manuals unless the row's provenance says
otherwise, and nothing of it was ever tried on silicon. A wrong row costs a second: the loader does not greet, the target is
reset, and the job goes on with AN3155.

Only the first USART is in the rows, on PA9 and PA10, since every loader listens there. The loader always runs from the internal
oscillator, and where that is slow, multiplied by the PLL: the ROM leaves the clocks as it likes after Go (AN3155), so a row
selects them anew. A CPU at 16 MHz needs as long for a word as its flash. The rates are well below what each part may, at the
lowest supply and a hot oscillator, and CPU and USART always have the same one, which is what the loader measures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

from bridged.chips.model import Chip, Confidence, Provenance, Quirk, Range
from bridged.chips.rows import AN2606, KIB

NO_SECOND_BANK = 0xFFFFFFFF
# For one byte, as counted in emulation: of a CRC, and of all that is done with a byte that is written (reception, CRC of its
# frame, comparison, programming, comparison), the flash's own time not counted.
CRC_CYCLES = 20
WRITE_CYCLES = 75
UPLOAD_BYTES = 3744  # Context and code at most
START_S = 0.25  # Go, train, greeting, and the change of the rate


class Symbol(Enum):
    """A value that is known only when the RAM is divided up."""

    INLET = "address of what the DMA fills"
    INLET_BYTES = "size of it"


@dataclass(frozen=True, slots=True)
class Poke:
    """``register = (register & keep) | value``, or with ``wait``: until ``register & keep == value``."""

    address: int
    keep: int
    value: int | Symbol
    wait: bool = False


@dataclass(frozen=True, slots=True)
class UsartRegisters:
    """One of the two register layouts of ST's USARTs. Offsets, and the values of CR1 with the USART off and on (8N1)."""

    name: str
    status: int
    data: int
    cr1: int
    brr: int
    off: int
    on: int


@dataclass(frozen=True, slots=True)
class FlashRegisters:
    """One kind of flash controller. Offsets from its base, masks, and values of its control register.

    ``errors``: bits of the status register after which a command has failed; ``clear_bits``: written to ``clear`` before.
    ``unit_bytes`` is programmed at once by stores of ``store_bytes``, in ``unit_typ_s`` as a rule. ``address``: register that
    takes the address of a sector; 0 where the sector's number goes into the control register. ``code_of_bank``: the number of
    the first sector of each bank.
    ``bank_step``: how much higher the registers of the second bank lie; 0 where both banks have the same.
    """

    name: str
    base: int
    key: int
    status: int
    control: int
    clear: int
    address: int
    busy: int
    errors: int
    clear_bits: int
    lock: int
    program: int
    erase: int
    start: int
    sector_shift: int
    unit_bytes: int
    store_bytes: int
    unit_typ_s: float
    code_of_bank: tuple[int, ...]
    bank_step: int = 0


@dataclass(frozen=True, slots=True)
class SecondStage:
    """One part. ``ram``: what the loader may use from its first to its last byte. ``clock_hz``: nominal, of CPU and USART.

    ``ring_bytes`` is a power of two: what may come while flash is erased. ``block_bytes`` of image content are in one frame.
    ``rx``: input register of the port of the RX pin, and its bit. ``remaining``: the register that counts down.
    """

    pid: int
    ram: Range
    ring_bytes: int
    block_bytes: int
    clock_hz: int
    usart_base: int
    usart: UsartRegisters
    rx: tuple[int, int]
    remaining: int
    watchdog: int
    flash: FlashRegisters
    pokes: tuple[Poke, ...]
    provenance: Mapping[str, Provenance]


# --- registers --------------------------------------------------------------------------------------------------------

USART_V1 = UsartRegisters("v1", status=0x00, data=0x04, cr1=0x0C, brr=0x08, off=0x000C, on=0x200C)  # F1, F2, F4
USART_V2 = UsartRegisters("v2", status=0x1C, data=0x28, cr1=0x00, brr=0x0C, off=0x000C, on=0x000D)  # all later ones

# BSY, PGERR and WRPRTERR; PG, PER, STRT, LOCK. Half words.
FLASH_F1 = FlashRegisters(
    name="F1",
    base=0x40022000,
    key=0x04,
    status=0x0C,
    control=0x10,
    clear=0x0C,
    address=0x14,
    busy=1 << 0,
    errors=0x14,
    clear_bits=0x34,
    lock=1 << 7,
    program=1 << 0,
    erase=1 << 1,
    start=1 << 6,
    sector_shift=0,
    unit_bytes=2,
    store_bytes=2,
    unit_typ_s=52e-6,
    code_of_bank=(0,),
)
# BSY, OPERR to PGSERR; PG, SER and STRT with x8 parallelism, which every supply voltage allows. Bank 2 from 16 (SNB bit 4).
FLASH_F4 = FlashRegisters(
    name="F4",
    base=0x40023C00,
    key=0x04,
    status=0x0C,
    control=0x10,
    clear=0x0C,
    address=0,
    busy=1 << 16,
    errors=0xF2,
    clear_bits=0xF3,
    lock=1 << 31,
    program=1 << 0,
    erase=1 << 1,
    start=1 << 16,
    sector_shift=3,
    unit_bytes=1,
    store_bytes=1,
    unit_typ_s=16e-6,
    code_of_bank=(0, 16),
)
# The same with x32, for a supply of at least 2.7 V: about four times as fast.
FLASH_F4_X32 = replace(FLASH_F4, name="F4 x32", program=0x201, erase=0x202, unit_bytes=4, store_bytes=4)
# BSY; OPERR, PROGERR, WRPERR, PGAERR, SIZERR, PGSERR, MISERR, FASTERR. Double words with ECC. BKER is bit 11.
FLASH_L4 = FlashRegisters(
    name="L4",
    base=0x40022000,
    key=0x08,
    status=0x10,
    control=0x14,
    clear=0x10,
    address=0,
    busy=1 << 16,
    errors=0x03FA,
    clear_bits=0xC3FB,
    lock=1 << 31,
    program=1 << 0,
    erase=1 << 1,
    start=1 << 16,
    sector_shift=3,
    unit_bytes=8,
    store_bytes=4,
    unit_typ_s=90e-6,
    code_of_bank=(0, 256),
)
# As the L4, with BSY2 and CFGBSY beside BSY1.
FLASH_G0 = replace(FLASH_L4, name="G0", busy=0x70000, unit_typ_s=85e-6, code_of_bank=(0,))
# BSY, WBNE and QW; WRPERR, PGSERR, STRBERR, INCERR, OPERR, RDPERR, RDSERR, DBECCERR; x64. Words of 32 bytes with ECC.
FLASH_H7 = FlashRegisters(
    name="H7",
    base=0x52002000,
    key=0x04,
    status=0x10,
    control=0x0C,
    clear=0x14,
    address=0,
    busy=0x7,
    errors=0x05EE0000,
    clear_bits=0x0FEF0000,
    lock=1 << 0,
    program=0x32,
    erase=0x34,
    start=1 << 7,
    sector_shift=8,
    unit_bytes=32,
    store_bytes=4,
    unit_typ_s=110e-6,
    code_of_bank=(0, 0),
    bank_step=0x100,
)


# --- pokes ------------------------------------------------------------------------------------------------------------


def _put(address: int, value: int | Symbol) -> Poke:
    return Poke(address, 0, value)


def _set(address: int, bits: int) -> Poke:
    return Poke(address, 0xFFFFFFFF, bits)


def _field(address: int, mask: int, value: int) -> Poke:
    return Poke(address, 0xFFFFFFFF ^ mask, value)


def _until(address: int, mask: int, value: int) -> Poke:
    return Poke(address, mask, value, wait=True)


def _hsi(
    rcc: int, config: int, on: int, ready: int, select: int, selected: tuple[int, int], prescalers: int
) -> tuple[Poke, ...]:
    """Switch to the internal oscillator, without division."""
    return (
        _set(rcc, 1 << on),
        _until(rcc, 1 << ready, 1 << ready),
        _field(rcc + config, prescalers, select),
        _until(rcc + config, *selected),
    )


@dataclass(frozen=True, slots=True)
class _Pll:
    """``config``: register, mask and value of the multiplier, source the internal oscillator. ``wait``: the flash's access
    control register, mask and value for as many wait states as the rate needs at the lowest supply. ``switch``: the register
    that selects the clock, its field and that of its state, and the value that means the PLL."""

    config: tuple[int, int, int]
    wait: tuple[int, int, int]
    switch: tuple[int, int, int, int]


def _pll(rcc: int, pll: _Pll) -> tuple[Poke, ...]:
    """From the internal oscillator, which ``_hsi`` has selected, to the PLL: it may be changed only while it is off, and flash
    must be slow before the clock is fast."""
    register, field, shift, value = pll.switch
    return (
        _field(rcc, 1 << 24, 0),  # PLLON
        _until(rcc, 1 << 25, 0),  # PLLRDY
        _field(*pll.config),
        _field(*pll.wait),
        _until(*pll.wait),
        _set(rcc, 1 << 24),
        _until(rcc, 1 << 25, 1 << 25),
        _field(register, field, value),
        _until(register, field << shift, value << shift),
    )


def _pa9_pa10(gpioa: int, function: int) -> tuple[Poke, ...]:
    """Alternate function on both, pulled up so that an open line is idle."""
    return (
        _field(gpioa + 0x24, 0xFF0, function << 4 | function << 8),
        _field(gpioa + 0x0C, 0x3C0000, 0x140000),
        _field(gpioa + 0x00, 0x3C0000, 0x280000),
    )


def _usart_v1(base: int) -> tuple[Poke, ...]:
    return (_put(base + 0x0C, 0), _put(base + 0x10, 0), _put(base + 0x14, 1 << 6))  # CR3: DMAR


def _usart_v2(base: int) -> tuple[Poke, ...]:
    # CR3: DMAR, and OVRDIS, so that a byte that is overwritten does not stop those after it.
    return (_put(base + 0x00, 0), _put(base + 0x04, 0), _put(base + 0x08, 1 << 12 | 1 << 6))


def _stream(base: int, data: int, channel: int) -> tuple[Poke, ...]:
    """A stream of the DMA of F2, F4, F7 and H7: off, then bytes from ``data`` into the inlet, circular, highest priority."""
    control = channel << 25 | 3 << 16 | 1 << 10 | 1 << 8
    return (
        _put(base, 0),
        _until(base, 1, 0),
        _put(base + 0x04, Symbol.INLET_BYTES),
        _put(base + 0x08, data),
        _put(base + 0x0C, Symbol.INLET),
        _put(base + 0x14, 0),  # FCR: direct mode, no FIFO in which bytes could wait
        _put(base, control),
        _put(base, control | 1),
    )


def _channel(base: int, data: int) -> tuple[Poke, ...]:
    """A channel of the DMA of the other families."""
    return (
        _put(base, 0),
        _put(base + 0x04, Symbol.INLET_BYTES),
        _put(base + 0x08, data),
        _put(base + 0x0C, Symbol.INLET),
        _put(base, 0x30A0),
        _put(base, 0x30A1),
    )


_CACHES_OFF = 0x700  # ACR: PRFTEN, ICEN, DCEN. What a data cache holds of flash is stale after programming.

# HSI / 8 * 128 / 4 = 64 MHz. Below 2.1 V each 20 MHz need a wait state, and fewer at more.
_PLL_F4 = _Pll((0x40023804, 0x00437FFF, 1 << 16 | 128 << 6 | 8), (0x40023C00, 0x7 | _CACHES_OFF, 3), (0x40023808, 3, 2, 2))
_PLL_F7 = replace(_PLL_F4, wait=(0x40023C00, 0xF, 3))
# HSI16 / 2 * 14 / 2 = 56 MHz, in the range of the core's voltage that a reset selects.
_PLL_L4 = _Pll(
    (0x4002100C, 0x07007F73, 1 << 24 | 14 << 8 | 1 << 4 | 2), (0x40022000, 0x7 | _CACHES_OFF, 3), (0x40021008, 3, 2, 3)
)
_PLL_G0 = _Pll((0x4002100C, 0xF0007F73, 3 << 28 | 14 << 8 | 1 << 4 | 2), (0x40022000, 0x7, 2), (0x40021008, 7, 3, 2))
# HSI / 2 * 9 = 36 MHz: an F101 may not more.
_PLL_F1 = _Pll((0x40021004, 0x3F0000, 7 << 18), (0x40022000, 0x7, 1), (0x40021004, 3, 2, 2))


# --- rows -------------------------------------------------------------------------------------------------------------

_MEMORY = Provenance("reference manuals, from memory", Confidence.MEMORY)
_FROM_MEMORY = {
    name: _MEMORY for name in ("ram", "clock_hz", "usart_base", "usart", "rx", "remaining", "watchdog", "flash", "pokes")
} | {
    "pid": Provenance(AN2606, Confidence.READ),
    "ring_bytes": Provenance("chosen: what the RAM allows", Confidence.READ),
    "block_bytes": Provenance("chosen: what the RAM allows", Confidence.READ),
}
_IWDG = 0x40003000

_F4 = SecondStage(
    pid=0x413,
    ram=Range(0x20003000, 0x20020000),
    ring_bytes=64 * KIB,
    block_bytes=4 * KIB,
    clock_hz=64_000_000,
    usart_base=0x40011000,
    usart=USART_V1,
    rx=(0x40020010, 10),
    remaining=0x40026444,
    watchdog=_IWDG,
    flash=FLASH_F4,
    pokes=(
        *_hsi(0x40023800, 0x08, 0, 1, 4 << 10, (0xC, 0), 0xFCF3),  # SW, HPRE, PPRE1 (its bus may not 64 MHz), PPRE2
        *_pll(0x40023800, _PLL_F4),
        _set(0x40023830, 1 << 22 | 1 << 0),  # AHB1ENR: DMA2, GPIOA
        _set(0x40023844, 1 << 4),  # APB2ENR: USART1
        *_pa9_pa10(0x40020000, 7),
        *_usart_v1(0x40011000),
        *_stream(0x40026440, 0x40011004, channel=4),  # DMA2, stream 2
    ),
    provenance=_FROM_MEMORY,
)

_F7 = replace(
    _F4,
    pid=0x449,
    ram=Range(0x20010000, 0x2004C000),  # SRAM1: not the DTCM before it, which is made for data
    ring_bytes=128 * KIB,
    usart=USART_V2,
    pokes=(
        *_hsi(0x40023800, 0x08, 0, 1, 4 << 10, (0xC, 0), 0xFCF3),
        *_pll(0x40023800, _PLL_F7),
        _set(0x40023830, 1 << 22 | 1 << 0),
        _set(0x40023844, 1 << 4),
        _field(0x40023890, 3, 0),  # DCKCFGR2: USART1 from PCLK2
        *_pa9_pa10(0x40020000, 7),
        *_usart_v2(0x40011000),
        *_stream(0x40026440, 0x40011024, channel=4),
    ),
)

_L4 = SecondStage(
    pid=0x415,
    ram=Range(0x20003100, 0x20018000),
    ring_bytes=64 * KIB,
    block_bytes=4 * KIB,
    clock_hz=56_000_000,
    usart_base=0x40013800,
    usart=USART_V2,
    rx=(0x48000010, 10),
    remaining=0x4002005C,
    watchdog=_IWDG,
    flash=FLASH_L4,
    pokes=(
        *_hsi(0x40021000, 0x08, 8, 10, 1, (0xC, 0x4), 0x3FF3),  # SW, HPRE, PPRE1, PPRE2
        *_pll(0x40021000, _PLL_L4),
        _set(0x40021048, 1 << 0),  # AHB1ENR: DMA1
        _set(0x4002104C, 1 << 0),  # AHB2ENR: GPIOA
        _set(0x40021060, 1 << 14),  # APB2ENR: USART1
        _field(0x40021088, 3, 0),  # CCIPR: USART1 from PCLK2
        *_pa9_pa10(0x48000000, 7),
        *_usart_v2(0x40013800),
        _field(0x400200A8, 0xF0000, 2 << 16),  # CSELR: channel 5 serves USART1_RX
        *_channel(0x40020058, 0x40013824),
    ),
    provenance=_FROM_MEMORY,
)

_G0 = SecondStage(
    pid=0x460,
    ram=Range(0x20002700, 0x20009000),
    ring_bytes=16 * KIB,
    block_bytes=4 * KIB,
    clock_hz=56_000_000,
    usart_base=0x40013800,
    usart=USART_V2,
    rx=(0x50000010, 10),
    remaining=0x4002000C,
    watchdog=_IWDG,
    flash=FLASH_G0,
    pokes=(
        *_hsi(0x40021000, 0x08, 8, 10, 0, (0x38, 0), 0x7F07),  # SW, HPRE, PPRE
        _field(0x40021000, 0x3800, 0),  # HSIDIV
        *_pll(0x40021000, _PLL_G0),
        _set(0x40021034, 1 << 0),  # IOPENR: GPIOA
        _set(0x40021038, 1 << 0),  # AHBENR: DMA1
        _set(0x40021040, 1 << 14),  # APBENR2: USART1
        _field(0x40021054, 3, 0),  # CCIPR: USART1 from PCLK
        *_pa9_pa10(0x50000000, 1),
        *_usart_v2(0x40013800),
        _put(0x40020800, 50),  # DMAMUX: channel 1 serves USART1_RX
        *_channel(0x40020008, 0x40013824),
    ),
    provenance=_FROM_MEMORY,
)

_F1 = SecondStage(
    pid=0x410,
    ram=Range(0x20000200, 0x20005000),
    ring_bytes=8 * KIB,
    block_bytes=1 * KIB,
    clock_hz=36_000_000,
    usart_base=0x40013800,
    usart=USART_V1,
    rx=(0x40010808, 10),
    remaining=0x4002005C,
    watchdog=_IWDG,
    flash=FLASH_F1,
    pokes=(
        *_hsi(0x40021000, 0x04, 0, 1, 4 << 8, (0xC, 0), 0x3FF3),  # SW, HPRE, PPRE1 (24 MHz at most on an F102), PPRE2
        *_pll(0x40021000, _PLL_F1),
        _set(0x40021014, 1 << 0),  # AHBENR: DMA1
        _set(0x40021018, 1 << 14 | 1 << 2),  # APB2ENR: USART1, GPIOA
        _set(0x4001080C, 1 << 10),  # ODR: pull-up on PA10
        _field(0x40010804, 0xFF0, 0x8B0),  # CRH: PA9 alternate function, PA10 input with pull
        *_usart_v1(0x40013800),
        *_channel(0x40020058, 0x40013804),  # channel 5
    ),
    provenance=_FROM_MEMORY,
)

_H7 = SecondStage(
    pid=0x450,
    ram=Range(0x24005000, 0x24080000),  # AXI SRAM: no DMA of the second domain reaches the DTCM at 0x20000000
    ring_bytes=128 * KIB,
    block_bytes=4 * KIB,
    clock_hz=64_000_000,
    usart_base=0x40011000,
    usart=USART_V2,
    rx=(0x58020010, 10),
    remaining=0x40020014,
    watchdog=0x58004800,
    flash=FLASH_H7,
    pokes=(
        *_hsi(0x58024400, 0x10, 0, 2, 0, (0x38, 0), 0x7),
        _field(0x58024400, 0x18, 0),  # HSIDIV
        _field(0x52002000, 0xF, 2),  # ACR: enough for 64 MHz at any voltage; the ROM leaves what suits its own clock
        _put(0x58024418, 0),  # D1CFGR, D2CFGR: no division
        _put(0x5802441C, 0),
        _set(0x580244D8, 1 << 0),  # AHB1ENR: DMA1
        _set(0x580244E0, 1 << 0),  # AHB4ENR: GPIOA
        _set(0x580244F0, 1 << 4),  # APB2ENR: USART1
        _field(0x58024454, 0x38, 0),  # D2CCIP2R: USART1 from PCLK2
        *_pa9_pa10(0x58020000, 7),
        *_usart_v2(0x40011000),
        _put(0x40020800, 41),  # DMAMUX1: stream 0 serves USART1_RX
        *_stream(0x40020010, 0x40011024, channel=0),
    ),
    provenance=_FROM_MEMORY,
)

SECOND_STAGES: Mapping[int, SecondStage] = {row.pid: row for row in (_F4, _F7, _L4, _G0, _F1, _H7)}


WIDE_V = 2.7  # Lowest supply at which F2, F4 and F7 program and erase 32 bits at a time


def row_for(chip: Chip, supply_v: float = 0.0) -> SecondStage:
    """The row of a part that has one, with the width in which its flash is programmed at ``supply_v``; 0: not known."""
    row = SECOND_STAGES[chip.pid]
    return replace(row, flash=FLASH_F4_X32) if row.flash is FLASH_F4 and supply_v >= WIDE_V else row


def start_s(baud: int) -> float:
    """How long it takes to have the loader running, where the ROM loader is spoken to at ``baud``: written, and read back."""
    return START_S + 2.1 * UPLOAD_BYTES * 11 / baud


# What writes the loader into RAM and starts it must work, and what Go leaves behind must end with the reset at the end of the
# job: with a supply mode that stays locked the application would run otherwise than it does ever after.
LIMITATIONS = (
    Quirk.RAM_WRITE_BROKEN,
    Quirk.NO_RAM_ACCESS,
    Quirk.GO_BROKEN,
    Quirk.GO_FIRST_ACK_MISSING,
    Quirk.POWER_CYCLE_AFTER_GO,
)


def why_not(chip: Chip, loader_id: int | None) -> str:
    """Why this part with this loader version is flashed by AN3155, for a person; empty when it has a row and may use it."""
    if chip.pid not in SECOND_STAGES:
        return f"{chip.title} is not in the table of the second-stage loader"
    for quirk in LIMITATIONS:
        if chip.has(quirk, loader_id):
            return f"{chip.title}: its ROM loader has the limitation {quirk}"
    return ""
