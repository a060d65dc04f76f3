"""What an STM32 starts after a reset: its loader, the application in flash, or nothing useful.

AN2606 table 2, "activation patterns", as a function of the pins and option bits at the moment NRST is released. The number
of the pattern comes from the chip's row. Patterns that were not read in AN2606 follow their neighbours (each says so).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

LOADER_F7 = (0x0040, 0x7FC0)  # address >> 14: the loader through ITCM, and at 0x1FF00000
LOADER_H7 = 0x1FF0  # address >> 16


@dataclass(frozen=True, slots=True)
class Pins:
    """Levels at the moment of release. ``boot1`` is the BOOT1 pin of the older families (tied low on most boards)."""

    boot0: bool
    boot1: bool


@dataclass(frozen=True, slots=True)
class Start:
    """``loader``: the ROM loader runs. Otherwise the core starts at ``address``; None: nothing that could run is there."""

    loader: bool
    address: int | None = None


LOADER = Start(loader=True)
NOTHING = Start(loader=False)


def decide(pattern: int, pins: Pins, option: Callable[[str], int], empty: bool, flash_base: int) -> Start:
    """``empty``: the latched empty flag (always False on parts without the empty check)."""
    flash = Start(loader=False, address=flash_base)
    if pattern in (8, 9, 10):
        return _boot_address(pattern, pins, option, flash_base)
    if pattern in (2, 7):
        if pins.boot0:
            return LOADER if option("nBOOT1") else NOTHING
        return flash
    if pattern in (6, 13, 14, 15, 16):
        locked = pattern in (14, 15) and option("BOOT_LOCK") == 1
        high = pins.boot0 if option("nSWBOOT0") else option("nBOOT0") == 0
        return _modern(high, locked, option, empty, flash)
    if pattern == 11:
        high = pins.boot0 if option("nBOOT_SEL") == 0 else option("nBOOT0") == 0
        return _modern(high, option("BOOT_LOCK") == 1, option, empty, flash)
    if pattern == 12:
        # TZEN=0 with factory boot addresses: 0 points at flash, 1 at the loader. Secure boot is not modelled.
        high = pins.boot0 if option("nSWBOOT0") else option("nBOOT0") == 0
        if option("TZEN"):
            return flash
        return LOADER if high else flash
    if pattern == 19:
        high = pins.boot0 if option("BOOTSEL") else option("BOOT0") == 1
        return LOADER if high or empty else flash
    if pattern in (17, 18):
        return LOADER if pins.boot0 else flash
    # 1, 3, 4, 5, and rows without a pattern: two pins. High and high starts from SRAM, where nothing is.
    if not pins.boot0:
        return flash
    return NOTHING if pins.boot1 else LOADER


def choose_bank(flash_base: int, second_bank: int | None, stack_pointer_at: Callable[[int], bool]) -> Start:
    """BFB2 is set, and flash is to be started: the loader runs first and takes bank 2 where that begins with a stack pointer,
    else bank 1; where neither does it stays (AN2606 table 2, patterns 3, 4, 5, 7 and 14)."""
    for bank in (second_bank, flash_base):
        if bank is not None and stack_pointer_at(bank):
            return Start(loader=False, address=bank)
    return LOADER


def _modern(high: bool, locked: bool, option: Callable[[str], int], empty: bool, flash: Start) -> Start:
    if locked:
        return flash
    if high:
        return LOADER if option("nBOOT1") else NOTHING
    return LOADER if empty else flash


def _boot_address(pattern: int, pins: Pins, option: Callable[[str], int], flash_base: int) -> Start:
    high = pins.boot0
    if pattern == 9 and option("nDBANK") == 0 and option("nDBOOT") == 0:
        high = False  # loader 0x451 V9.3: only BOOT_ADD0 counts then, whatever the pin
    value = option("BOOT_ADD1" if high else "BOOT_ADD0")
    if pattern == 10:
        if value == LOADER_H7:
            return LOADER
        address = value << 16
    else:
        if value in LOADER_F7:
            return LOADER
        address = value << 14
        if 0x00200000 <= address < 0x00400000:  # flash as seen through ITCM
            address += flash_base - 0x00200000
    return Start(loader=False, address=address) if address >= flash_base else NOTHING
