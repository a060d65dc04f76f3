"""The vocabulary in which the ``table_*`` modules write their rows.

A table makes one template ``Chip`` for a family with ``dataclasses.replace(BASE, ...)``, then one row a product id with
``replace(template, pid=..., ...)``: a row says only what differs, and the type checker sees every field.

Ranges are written as ST prints them: hexadecimal, last address included. ``cite`` lays notes over the provenance of a
template: a row that overrides a value says where the new value comes from. There is on purpose no function here that claims
a trial on silicon; a row may say so only together with a report that names part, loader version and date.

Documents: AN2606 (2026) "system memory boot mode"; AN3155 rev 20 "USART protocol"; "public tables" are the device tables of
stm32flash, stm32loader, stlink, OpenOCD and embassy stm32-data as of 2025-26, compared with each other.

Rule for ``confirmed``: the numbers that the loader's erase command takes are certain where sectors are counted through from
the flash base in one bank, or where two public flashing tables agree. In a second bank with anything else (another start of
the numbering, a hole, a part smaller than the largest) they are not, and the row says so.
"""

from __future__ import annotations

from collections.abc import Mapping

from bridged.chips.model import (
    BankSpec,
    Chip,
    Confidence,
    Layout,
    OptionField,
    Provenance,
    Quirk,
    QuirkRow,
    Range,
    Run,
)

KIB = 1024
MIB = 1024 * KIB

AN2606 = "AN2606 (2026)"
AN3155 = "AN3155 rev 20"
TABLES = "public tables (stm32flash, stm32loader, stlink, OpenOCD, embassy)"


# --- values ---------------------------------------------------------------------------------------------------------


def span(text: str) -> Range:
    """``"1FFF0000-1FFF77FF"``, last address included as in ST's documents."""
    first, last = text.split("-")
    return Range(int(first, 16), int(last, 16) + 1)


def spans(text: str) -> tuple[Range, ...]:
    return tuple(map(span, text.split()))


def ids(text: str) -> frozenset[int]:
    """``"70 90 91"``: values of the loader's version byte."""
    return frozenset(int(word, 16) for word in text.split())


def pins(text: str) -> tuple[tuple[int, str], ...]:
    """``"1:PA9/PA10 3:PB10/PB11,PC10/PC11 2:"``: USART number, then TX/RX pairs; none where they are not known."""
    return tuple(
        (int(usart), pair) for usart, _, pairs in (w.partition(":") for w in text.split()) for pair in pairs.split(",")
    )


def quirk(kind: Quirk, text: str, loader_ids: str = "", source: str = AN2606) -> QuirkRow:
    return QuirkRow(kind, ids(loader_ids), text, source)


# --- sector layouts -------------------------------------------------------------------------------------------------


def uniform(
    size_bytes: int,
    typ_s: float,
    max_s: float,
    name: str = "uniform",
    sizes: tuple[int, ...] = (),
    when: tuple[OptionField, int] | None = None,
) -> Layout:
    """Equal sectors, counted through from the flash base."""
    return Layout(name, (BankSpec((Run(0, size_bytes, typ_s, max_s),)),), sizes, when)


def dual(
    runs: tuple[Run, ...],
    name: str = "dual",
    sizes: tuple[int, ...] = (),
    when: tuple[OptionField, int] | None = None,
    bank2_offset: int | None = None,
    bank2_code: int | None = None,
    confirmed: bool = True,
) -> Layout:
    """Two banks of half the flash each. Without ``bank2_*`` addresses and numbers go on after the first bank."""
    return Layout(name, (BankSpec(runs), BankSpec(runs, bank2_offset, None, bank2_code)), sizes, when, confirmed)


def pages(size_bytes: int, typ_s: float, max_s: float) -> tuple[Run, ...]:
    """Equal sectors to the end of a bank, for ``dual``."""
    return (Run(0, size_bytes, typ_s, max_s),)


# --- provenance -----------------------------------------------------------------------------------------------------

Note = tuple[Confidence, str, str]


def read(fields: str, source: str = AN2606) -> Note:
    """Names of fields, separated by blanks; read in ``source``."""
    return Confidence.READ, fields, source


def agreed(fields: str, source: str = TABLES) -> Note:
    return Confidence.AGREED, fields, source


def memory(fields: str, why: str = "not read in any document") -> Note:
    return Confidence.MEMORY, fields, why


def unsure(fields: str, why: str) -> Note:
    return Confidence.UNSURE, fields, why


def cite(over: Mapping[str, Provenance] | Chip, *notes: Note) -> dict[str, Provenance]:
    """The provenance of ``over`` with ``notes`` laid over it, later ones on top."""
    made = dict(over.provenance if isinstance(over, Chip) else over)
    for confidence, fields, source in notes:
        entry = Provenance(source, confidence)
        made.update((name, entry) for name in fields.split())
    return made


# --- what holds for an ordinary STM32 unless a family says otherwise ----------------------------------------------

BASE = Chip(
    pid=0,
    family="",
    names=(),
    flash_base=0x08000000,
    flash_max_bytes=0,
    flash_size_register=None,
    uid_address=None,
    layouts=(),
    layout_confirmed=True,
    erased_value=0xFF,
    write_align_bytes=4,
    flash_word_bytes=4,
    ecc=False,
    loader_id_address=None,
    loader_ids=frozenset(),
    usart_protocol="3.1",
    parity="E",
    erase_command=0x44,
    mass_erase=True,
    mass_erase_max_s=0.04,
    # The loader keeps only the last 581 numbers of a longer list and acknowledges all the same (Open Bootloader); 128 also
    # gives progress and bounded waiting.
    sectors_per_erase=128,
    write_max_bytes=256,
    read_max_bytes=256,
    write_ack_max_s=1.0,
    startup_s=(),
    first_baud=115200,
    max_baud=115200,
    hardware_autobaud=False,
    activation_pattern="",
    boot0_pin_obeyed=True,
    entry_checks=(),
    empty_check=False,
    usart_pins=(),
    system_memory=None,
    option_bytes=(),
    otp=None,
    ram=(),
    stub_ram=(),
    quirks=(),
    provenance=cite(
        {},
        agreed("pid family names flash_base", f"{AN2606} table 226 and {TABLES}"),
        agreed("flash_max_bytes flash_size_register layouts layout_confirmed erased_value option_bytes"),
        agreed(
            "flash_size_mask flash_size_codes", "OpenOCD, which names the parts whose register holds something else than KiB"
        ),
        memory("uid_address layouts.erase_s mass_erase_max_s flash_word_bytes ecc", "data sheets, from memory"),
        memory("otp", "reference manuals, from memory"),
        read("write_align_bytes", f"{AN2606} table 7, or the hardware's program word where that is larger"),
        read("loader_ids", f"{AN2606} tables 3 and 226"),
        read("loader_id_address stub_ram system_memory", f"{AN2606} table 226"),
        read("usart_protocol", f"{AN2606} table 3"),
        read("parity write_max_bytes read_max_bytes", AN3155),
        agreed("erase_command mass_erase", f"{AN2606}, stm32flash and stm32loader"),
        memory("sectors_per_erase", "Open Bootloader source (buffer of 1164 bytes); the ROM's limit is not published"),
        memory("write_ack_max_s", "worst programming time with x8 parallelism, and stm32flash's time-out"),
        read("startup_s", f"{AN2606}, minimum delay from reset to listening"),
        read("first_baud max_baud", f"{AN3155} section on the baud rate; {AN2606} limitations"),
        read("hardware_autobaud", f"{AN2606}, baud-rate detection"),
        read("activation_pattern", f"{AN2606} table 2"),
        memory("boot0_pin_obeyed", "factory option bytes, from memory"),
        memory("entry_checks app_checks", "reference manuals, from memory; each option field has a confidence of its own"),
        memory("bank_choice", f"{AN2606} table 2 for what it does; the place of the bit as remembered"),
        read("empty_check", f"{AN2606} table 2"),
        read("usart_pins", f"{AN2606}, configuration in system memory boot mode"),
        memory("ram", "generous for the whole family; only for judging a stack pointer"),
        read("quirks", f"{AN2606}, loader versions and limitations"),
        read("foreign", f"{AN2606}: speaks AN3155"),
    ),
)

EMPTY_FLAG_STICKS = quirk(
    Quirk.EMPTY_FLAG_STICKS,
    "The empty flag is evaluated at power-on and option load only: after the first flash of a virgin part a reset by NRST "
    "enters the loader again; cycle the power, or launch the option bytes.",
)
