"""A row of ``chips.second_stage``, the flash of one part and the loader's code, put together: what is written to RAM.

Pure: no flow, no wire. The RAM is divided from below: context and code, stack, inlet, ring, block, table of the CRC.
``sector_code`` translates a sector of the chip tables into what the loader's ERASE takes, which is the number in the flash
controller's register and not the code of AN3155.
"""

from __future__ import annotations

from dataclasses import dataclass

from bridged import stub
from bridged.chips.model import FlashMap, Sector
from bridged.chips.second_stage import NO_SECOND_BANK, SecondStage, Symbol
from bridged.errors import Unsupported

BYTE_WITHIN_S = 0.1  # Within a frame; an adapter may stop for a latency timer of 16 ms, or a busy hub.
GREET_EVERY_S = 0.05
CONFIRM_WITHIN_S = 0.5
RATE_ERROR = 0.025  # of about 4 % that a receiver takes (half a bit in 10.5), shared with the other end's clock
INLET_BYTES = 1024  # 10 ms at 921600 baud; the loader empties it at least every 3 ms, while it programs 256 bytes
CRC_TABLE_BYTES = 1024
SHORTEST_BRR = 16  # USARTDIV of 1 with oversampling by 16


@dataclass(frozen=True, slots=True)
class Upload:
    """What to write, and what is known of it afterwards. ``build``: what the greeting must repeat."""

    address: int
    image: bytes
    build: bytes
    ring_bytes: int
    block_bytes: int
    clock_hz: int
    unit_bytes: int


def make_upload(row: SecondStage, flash: FlashMap, baud: int, code: stub.Code) -> Upload:
    """Raises ``Unsupported`` when the row does not fit its RAM, or ``baud`` its clock."""
    address = row.ram.start
    stack = (address + stub.CODE_OFFSET + len(code.code) + stub.STACK_BYTES + 7) & ~7
    inlet, block_max = stack, row.block_bytes + 4
    ring = inlet + INLET_BYTES
    block = ring + row.ring_bytes
    table = block + block_max
    if table + CRC_TABLE_BYTES > row.ram.end:
        raise Unsupported(
            f"the second-stage loader needs {table + CRC_TABLE_BYTES - address} bytes of RAM from {address:#010x}, "
            f"and there are {row.ram.size}",
            pid=row.pid,
        )
    brr = divisor(row.clock_hz, baud)
    known = {Symbol.INLET: inlet, Symbol.INLET_BYTES: INLET_BYTES}
    pokes = tuple(
        stub.Poke(p.address, p.keep, known[p.value] if isinstance(p.value, Symbol) else p.value, p.wait) for p in row.pokes
    )
    second = next((s.address for s in flash.sectors if s.bank == 2), NO_SECOND_BANK)
    registers, usart, base = row.flash, row.usart, row.usart_base
    fields = {
        "stack": stack,
        "ring_mask": row.ring_bytes - 1,
        "block_max": block_max,
        "brr": brr,
        "usart_status": base + usart.status,
        "usart_data": base + usart.data,
        "usart_cr1": base + usart.cr1,
        "usart_brr": base + usart.brr,
        "cr1_off": usart.off,
        "cr1_on": usart.on,
        "watchdog": row.watchdog,
        "rx_input": row.rx[0],
        "rx_mask": 1 << row.rx[1],
        "inlet": inlet,
        "inlet_mask": INLET_BYTES - 1,
        "ring": ring,
        "remaining": row.remaining,
        "block": block,
        "table": table,
        "byte_limit": round(BYTE_WITHIN_S * row.clock_hz),
        "greet_every": round(GREET_EVERY_S * row.clock_hz),
        "confirm_within": round(CONFIRM_WITHIN_S * row.clock_hz),
        "flash_start": flash.sectors[0].address,
        "flash_end": flash.sectors[-1].end,
        "flash_base": registers.base,
        "bank2_start": second if registers.bank_step else NO_SECOND_BANK,
        "bank2_step": registers.bank_step,
        "key_at": registers.key,
        "status_at": registers.status,
        "control_at": registers.control,
        "clear_at": registers.clear,
        "address_at": registers.address,
        "busy": registers.busy,
        "errors": registers.errors,
        "clear": registers.clear_bits,
        "lock": registers.lock,
        "program": registers.program,
        "erase": registers.erase,
        "start": registers.start,
        "sector_shift": registers.sector_shift,
        "unit": registers.unit_bytes,
        "width": registers.store_bytes,
    }
    return Upload(
        address=address,
        image=stub.image(code, address, fields, pokes),
        build=code.build,
        ring_bytes=row.ring_bytes,
        block_bytes=row.block_bytes,
        clock_hz=row.clock_hz,
        unit_bytes=registers.unit_bytes,
    )


def divisor(clock_hz: float, baud: int) -> int:
    """BRR for ``baud``. Raises ``Unsupported`` where the clock is too slow, or misses the rate by more than ``RATE_ERROR``."""
    brr = round(clock_hz / baud)
    if brr < SHORTEST_BRR or abs(clock_hz / brr / baud - 1) > RATE_ERROR:
        raise Unsupported(f"{baud} baud cannot be made from {clock_hz / 1e6:.1f} MHz", baud=baud)
    return brr


def rate_near(clock_hz: float, baud: int) -> tuple[int, int]:
    """The rate and BRR to use for ``baud``: itself, or what the clock makes of it, where the two are too far apart.

    Most ports take any rate; one that does not says so (``BaudUnavailable``).
    """
    brr = max(SHORTEST_BRR, round(clock_hz / baud))
    made = clock_hz / brr
    return (baud if abs(made / baud - 1) <= RATE_ERROR / 2 else round(made)), brr


def sector_code(row: SecondStage, flash: FlashMap, sector: Sector) -> int:
    """What the flash controller calls ``sector``; 0 where it goes by the address."""
    if row.flash.address:
        return 0
    first = next(s for s in flash.sectors if s.bank == sector.bank)
    return row.flash.code_of_bank[sector.bank - 1] + sector.code - first.code
