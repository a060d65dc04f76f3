"""STM32U0, U3, U5, WB, WBA and WL: ECC, hardware baud-rate detection (WB0 is another family: ``table_foreign``).

Sources: AN2606 (2026) tables 2, 3, 7, 226; pages and bank bits from OpenOCD's driver and embassy. No erase times are known for
the 4 and 8 KiB pages of U3, U5 and WBA: five times what like parts need.

U3, U5 and WBA keep their boot addresses and TZEN in registers; no option field is listed because nobody has shown that the
loader lets a host read them.
"""

from __future__ import annotations

from dataclasses import replace

from bridged.chips.model import AppCheck, Confidence, EntryCheck, OptionField, Quirk
from bridged.chips.rows import (
    AN2606,
    BASE,
    EMPTY_FLAG_STICKS,
    KIB,
    MIB,
    agreed,
    cite,
    dual,
    ids,
    memory,
    pages,
    pins,
    quirk,
    read,
    span,
    spans,
    uniform,
    unsure,
)

_SLOW_4K = (4 * KIB, 0.02, 0.1)
_SLOW_8K = (8 * KIB, 0.02, 0.1)

# A register, which the loader may or may not let a host read.
_U5_DUALBANK = OptionField("DUALBANK", 0x40022040, 21, 1, Confidence.UNSURE)


def _pin_checks(optr: int) -> tuple[EntryCheck, EntryCheck]:
    """WB and WL, as L4: bits 23 nBOOT1, 26 nSWBOOT0 of the option register."""
    return (
        EntryCheck(
            OptionField("nSWBOOT0", optr, 26, 1, Confidence.MEMORY),
            frozenset({1}),
            "the BOOT0 pin is ignored (option bit nSWBOOT0 is 0)",
        ),
        EntryCheck(
            OptionField("nBOOT1", optr, 23, 1, Confidence.MEMORY),
            frozenset({1}),
            "BOOT0 high starts from SRAM (option bit nBOOT1 is 0)",
        ),
    )


def _app_check(optr: int) -> tuple[AppCheck]:
    field = OptionField("nBOOT0:nSWBOOT0", optr, 26, 0b11, Confidence.MEMORY)
    return (AppCheck(field, frozenset({0}), "nSWBOOT0 and nBOOT0 are 0: the application never starts"),)


_NO_TIMES = unsure("layouts.erase_s mass_erase_max_s", "no figure known; generous")
_NO_OPTIONS = unsure("option_bytes entry_checks app_checks", "registers; whether the loader lets a host read them is not known")
_ONE_SOURCE = agreed("pid names flash_base flash_max_bytes", f"{AN2606} and OpenOCD")

U0 = replace(
    BASE,
    family="U0",
    layouts=(uniform(2 * KIB, 0.02, 0.04),),
    write_align_bytes=8,
    flash_word_bytes=8,
    ecc=True,
    hardware_autobaud=True,
    activation_pattern="16?",
    empty_check=True,
    usart_pins=pins("1: 2: 3:"),
    otp=span("1FFF6800-1FFF6BFF"),
    ram=spans("20000000-20009FFF"),
    quirks=(EMPTY_FLAG_STICKS,),
    provenance=cite(
        BASE,
        _ONE_SOURCE,
        unsure(
            "activation_pattern boot0_pin_obeyed entry_checks app_checks", "section not read; the empty check is documented"
        ),
        unsure("uid_address option_bytes", "not known for this family"),
    ),
)
U5 = replace(
    BASE,
    family="U5",
    flash_size_register=0x0BFA07A0,
    uid_address=0x0BFA0700,
    write_align_bytes=16,
    flash_word_bytes=16,
    ecc=True,
    mass_erase_max_s=20.0,
    loader_id_address=0x0BF99EFE,
    startup_s=(0.00039,),
    hardware_autobaud=True,
    activation_pattern="12",
    usart_pins=pins("1:PA9/PA10 2:PA2/PA3 3:PC10/PC11"),
    system_memory=span("0BF90000-0BF9FFFF"),
    otp=span("0BFA0000-0BFA01FF"),
    ram=spans("20000000-202EFFFF 28000000-28003FFF 30000000-302EFFFF"),
    provenance=cite(
        BASE,
        _NO_TIMES,
        _NO_OPTIONS,
        read("write_align_bytes", f"{AN2606} table 7"),
        unsure("layouts", "OpenOCD and embassy for pages and banks; the loader's numbers in bank 2 are in no public table"),
    ),
)
U3 = replace(
    U5,
    family="U3",
    # Not confirmed: numbers and place of bank 2 are in no public table.
    layouts=(dual(pages(*_SLOW_4K), confirmed=False),),
    write_align_bytes=8,
    flash_word_bytes=8,
    usart_protocol="4.0",
    loader_id_address=0x0BF98FFE,
    usart_pins=pins("1: 3:"),
    system_memory=span("0BF8F000-0BF9FFFF"),
    provenance=cite(U5, _ONE_SOURCE),
)
WB = replace(
    BASE,
    family="WB",
    flash_size_register=0x1FFF75E0,
    uid_address=0x1FFF7590,
    write_align_bytes=8,
    flash_word_bytes=8,
    ecc=True,
    mass_erase_max_s=0.025,
    loader_id_address=0x1FFF6FFE,
    startup_s=(0.00039,),
    hardware_autobaud=True,
    activation_pattern="16?",
    empty_check=True,
    usart_pins=pins("1:PA9/PA10"),
    system_memory=span("1FFF0000-1FFF6FFF"),
    otp=span("1FFF7000-1FFF73FF"),
    ram=spans("20000000-2003FFFF 10000000-1000FFFF"),
    quirks=(EMPTY_FLAG_STICKS,),
    provenance=cite(
        BASE,
        read("write_align_bytes", f"{AN2606} table 7"),
        agreed("flash_word_bytes ecc otp", "OpenOCD and embassy"),
        unsure("activation_pattern", "section not read; the empty check is documented"),
        memory("usart_pins", f"{AN2606} names USART1; the pins are from memory"),
    ),
)
WBA = replace(
    BASE,
    family="WBA",
    write_align_bytes=16,
    flash_word_bytes=16,
    ecc=True,
    mass_erase_max_s=20.0,
    hardware_autobaud=True,
    activation_pattern="12",
    usart_pins=pins("1: 2:"),
    ram=spans("20000000-2007FFFF 30000000-3007FFFF"),
    provenance=cite(BASE, _NO_TIMES, _NO_OPTIONS, _ONE_SOURCE, read("write_align_bytes", f"{AN2606} table 7")),
)

CHIPS = (
    replace(
        U0,
        pid=0x459,
        names=("U031",),
        flash_max_bytes=64 * KIB,
        flash_size_register=0x1FFF3EA0,
        loader_id_address=0x1FFF37FE,
        loader_ids=ids("B0"),
        startup_s=(0.0045,),
        system_memory=span("1FFF0000-1FFF37FF"),
        stub_ram=spans("20001500-20002FFF"),
    ),
    replace(
        U0,
        pid=0x489,
        names=("U073", "U083"),
        flash_max_bytes=256 * KIB,
        flash_size_register=0x1FFF6EA0,
        loader_id_address=0x1FFF67FE,
        loader_ids=ids("D0"),
        startup_s=(0.0056,),
        system_memory=span("1FFF0000-1FFF67FF"),
        stub_ram=spans("20002170-20009FFF"),
        provenance=cite(U0, read("hardware_autobaud", f"{AN2606}: USART1 and 2; USART3 measures by software, up to 2 % off")),
    ),
    # --- U3
    replace(
        U3,
        pid=0x454,
        names=("U375", "U385"),
        flash_max_bytes=1 * MIB,
        loader_ids=ids("E2"),
        startup_s=(0.0044,),
        stub_ram=spans("20004000-2003FFFF"),
    ),
    replace(
        U3,
        pid=0x42A,
        names=("U3B5", "U3C5"),
        flash_max_bytes=2 * MIB,
        loader_ids=ids("E0"),
        startup_s=(0.0045,),
        stub_ram=spans("20004000-2009FFFF"),
    ),
    # --- U5; the largest part of each is always in two banks, the others by option bit
    replace(
        U5,
        pid=0x455,
        names=("U535", "U545"),
        flash_max_bytes=512 * KIB,
        layouts=(
            dual(pages(*_SLOW_8K), "dual", (512 * KIB,), confirmed=False),
            dual(pages(*_SLOW_8K), "dual", (128 * KIB, 256 * KIB), (_U5_DUALBANK, 1), confirmed=False),
            uniform(*_SLOW_8K, "single", (128 * KIB, 256 * KIB), (_U5_DUALBANK, 0)),
        ),
        loader_ids=ids("91"),
        usart_pins=pins("1: 3:"),
        stub_ram=spans("20004000-2003FFFF"),
        provenance=cite(U5, unsure("stub_ram", f"{AN2606} prints an end of 2023FFFF, the part has 256 KiB to 2003FFFF")),
    ),
    replace(
        U5,
        pid=0x482,
        names=("U575", "U585"),
        flash_max_bytes=2 * MIB,
        layouts=(
            dual(pages(*_SLOW_8K), "dual", (2 * MIB,)),
            dual(pages(*_SLOW_8K), "dual", (1 * MIB,), (_U5_DUALBANK, 1), confirmed=False),
            uniform(*_SLOW_8K, "single", (1 * MIB,), (_U5_DUALBANK, 0)),
        ),
        loader_ids=ids("92 93"),  # V9.2: RDP level and secure option bytes cannot change in one write
        stub_ram=spans("20004000-200BFFFF"),
        provenance=cite(U5, agreed("layouts", "all public tables for 2 MiB; 1 MiB in two banks unsure")),
    ),
    replace(
        U5,
        pid=0x481,
        names=("U595", "U599", "U5A5", "U5A9"),
        flash_max_bytes=4 * MIB,
        layouts=(
            dual(pages(*_SLOW_8K), "dual", (4 * MIB,), confirmed=False),
            dual(pages(*_SLOW_8K), "dual", (2 * MIB,), (_U5_DUALBANK, 1), confirmed=False),
            uniform(*_SLOW_8K, "single", (2 * MIB,), (_U5_DUALBANK, 0)),
        ),
        loader_ids=ids("92"),
        stub_ram=spans("20004000-2026FFFF"),
    ),
    replace(
        U5,
        pid=0x476,
        names=("U5F7", "U5F9", "U5G7", "U5G9"),
        flash_max_bytes=4 * MIB,
        layouts=(
            dual(pages(*_SLOW_8K), "dual", (4 * MIB,), confirmed=False),
            dual(pages(*_SLOW_8K), "dual", (2 * MIB,), (_U5_DUALBANK, 1), confirmed=False),
            uniform(*_SLOW_8K, "single", (2 * MIB,), (_U5_DUALBANK, 0)),
        ),
        loader_ids=ids("90"),
        stub_ram=spans("20004000-202EFFFF"),
    ),
    # --- WB
    replace(
        WB,
        pid=0x494,
        names=("WB10", "WB15"),
        flash_max_bytes=320 * KIB,
        layouts=(uniform(2 * KIB, 0.0125, 0.025),),
        loader_ids=ids("B1"),
        entry_checks=_pin_checks(0x1FFF7800),
        app_checks=_app_check(0x1FFF7800),
        option_bytes=spans("1FFF7800-1FFF787F"),
        quirks=(EMPTY_FLAG_STICKS, quirk(Quirk.NO_RAM_ACCESS, "No range of RAM is known that the loader offers.")),
        provenance=cite(
            WB,
            unsure("erased_value", "embassy says 0x00 for this part, all others 0xFF"),
            unsure("stub_ram", f"{AN2606} gives a range beyond the part's RAM"),
        ),
    ),
    replace(
        WB,
        pid=0x495,
        # Page numbers count for the area of the CM4 only, below SFSA; above lies the radio stack.
        names=("WB30", "WB35", "WB50", "WB55"),
        flash_max_bytes=1 * MIB,
        layouts=(uniform(4 * KIB, 0.0125, 0.025),),
        usart_protocol="3.2",
        loader_ids=ids("D5"),
        entry_checks=_pin_checks(0x1FFF8000),
        app_checks=_app_check(0x1FFF8000),
        option_bytes=spans("1FFF8000-1FFF807F"),
        stub_ram=spans("20004000-2000BFFF"),
    ),
    replace(
        WB,
        pid=0x496,
        names=("WB3x (0x496)",),  # AN2606 has the WB30 and WB35 under 0x495
        flash_max_bytes=512 * KIB,
        layouts=(uniform(4 * KIB, 0.0125, 0.025),),
        layout_confirmed=False,  # one source, and that for a debugger
        provenance=cite(
            WB,
            unsure("pid names flash_base flash_max_bytes layouts layout_confirmed", "OpenOCD only; AN2606 says 0x495"),
            unsure(
                "loader_ids loader_id_address stub_ram system_memory option_bytes entry_checks app_checks usart_protocol "
                "startup_s usart_pins activation_pattern empty_check erase_command mass_erase write_align_bytes",
                "taken to be as the WB55; no document has this product id",
            ),
        ),
    ),
    # --- WBA
    replace(
        WBA,
        pid=0x4B2,
        names=("WBA2",),
        flash_max_bytes=512 * KIB,
        flash_size_register=0x0BF8D7A0,
        layouts=(uniform(*_SLOW_4K),),
        layout_confirmed=False,  # no public flashing table has this part
        usart_protocol="4.0",
        loader_id_address=0x0BF8CCFE,
        loader_ids=ids("D0"),
        startup_s=(0.0023,),
        usart_pins=pins("1:"),
        system_memory=span("0BF85000-0BF8CDFF"),
        otp=span("0BF8D000-0BF8D1FF"),
        stub_ram=spans("20003000-20017FFF"),
        provenance=cite(
            WBA, unsure("layouts layout_confirmed", "OpenOCD only"), unsure("uid_address", "not known for this part")
        ),
    ),
    replace(
        WBA,
        pid=0x492,
        names=("WBA52", "WBA54", "WBA55"),
        flash_max_bytes=1 * MIB,
        flash_size_register=0x0BF907A0,
        uid_address=0x0BF90700,
        layouts=(uniform(*_SLOW_8K),),
        loader_id_address=0x0BF8FEFE,
        loader_ids=ids("B0 B1"),
        startup_s=(0.00039,),
        system_memory=span("0BF88000-0BF8FFFF"),
        otp=span("0BF90000-0BF901FF"),
        stub_ram=spans("20001800-20001FFF"),  # stm32loader: from 20000000
    ),
    replace(
        WBA,
        pid=0x4B0,
        names=("WBA62", "WBA63", "WBA64", "WBA65"),
        flash_max_bytes=2 * MIB,
        flash_size_register=0x0BFA07A0,
        uid_address=0x0BFA0700,
        layouts=(uniform(*_SLOW_8K),),
        layout_confirmed=False,  # probably two banks; no public flashing table has this part
        usart_protocol="4.0",
        loader_id_address=0x0BF97EFE,
        loader_ids=ids("D2"),
        startup_s=(0.0027,),
        system_memory=span("0BF90000-0BF9FFFF"),
        otp=span("0BFA0000-0BFA01FF"),
        stub_ram=spans("20003000-2007FFFF"),
        provenance=cite(WBA, unsure("layouts layout_confirmed", "8 KiB pages by OpenOCD only; probably two banks")),
    ),
    # --- WL
    replace(
        BASE,
        pid=0x497,
        family="WL",
        names=("WL54", "WL55", "WLE4", "WLE5"),
        flash_max_bytes=256 * KIB,
        flash_size_register=0x1FFF75E0,
        uid_address=0x1FFF7590,
        layouts=(uniform(2 * KIB, 0.0125, 0.025),),
        write_align_bytes=8,
        flash_word_bytes=8,
        ecc=True,
        mass_erase_max_s=0.025,
        loader_id_address=0x1FFF3EFE,
        loader_ids=ids("C4"),
        startup_s=(0.00039,),
        hardware_autobaud=True,
        activation_pattern="13?",
        entry_checks=_pin_checks(0x1FFF7800),
        app_checks=_app_check(0x1FFF7800),
        empty_check=True,
        usart_pins=pins("1: 2:"),
        system_memory=span("1FFF0000-1FFF3FFF"),
        option_bytes=spans("1FFF7800-1FFF7FFF"),
        otp=span("1FFF7000-1FFF73FF"),
        ram=spans("20000000-2000FFFF 10000000-10007FFF"),
        stub_ram=spans("20002000-2000FFFF"),
        quirks=(EMPTY_FLAG_STICKS,),
        provenance=cite(
            BASE,
            unsure("activation_pattern empty_check", "section not read"),
            read("write_align_bytes", f"{AN2606} table 7"),
            agreed("uid_address flash_word_bytes ecc otp", "OpenOCD and embassy"),
        ),
    ),
)
