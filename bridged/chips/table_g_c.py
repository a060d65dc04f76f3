"""STM32C0, C5, G0 and G4: 2 KiB pages (C5: 8 KiB), ECC, hardware baud-rate detection on the first USART.

Sources: AN2606 (2026) tables 2, 3, 7, 226 and the limitation lists; bank bits as in OpenOCD's driver; the option bits that
decide whether the BOOT0 pin counts from the reference manuals, by memory. On G0 the pin is ignored as the part leaves the
factory (nBOOT_SEL is 1; the pin is SWCLK as well).

BOOT_LOCK of the G0x1 is not checked: the G0x0 shares the product ids and has no such bit, and a locked part does not get here
by its pin in the first place.
"""

from __future__ import annotations

from dataclasses import replace

from bridged.chips.model import AppCheck, Confidence, EntryCheck, OptionField, Quirk
from bridged.chips.rows import (
    AN2606,
    BASE,
    EMPTY_FLAG_STICKS,
    KIB,
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

_OPTR = 0x1FFF7800  # the option register as it lies in the option area

# G0 and C0: bits 24 nBOOT_SEL, 25 nBOOT1, 26 nBOOT0.
_G0_SEL = OptionField("nBOOT_SEL", _OPTR, 24, 1, Confidence.MEMORY)
_G0_BOOT1 = OptionField("nBOOT1", _OPTR, 25, 1, Confidence.MEMORY)
_G0_BOOT = OptionField("nBOOT0:nBOOT1:nBOOT_SEL", _OPTR, 24, 0b111, Confidence.MEMORY)
_G0_ENTRY = (
    EntryCheck(_G0_SEL, frozenset({0}), "the BOOT0 pin is ignored (option bit nBOOT_SEL is 1, as from the factory)"),
    EntryCheck(_G0_BOOT1, frozenset({1}), "BOOT0 high starts from SRAM (option bit nBOOT1 is 0)"),
)
_G0_APP = (
    # nBOOT_SEL 1 (pin ignored) and nBOOT0 0: the loader with nBOOT1 1, SRAM with nBOOT1 0; never the application.
    AppCheck(_G0_BOOT, frozenset({0b011, 0b001}), "nBOOT_SEL is 1 and nBOOT0 is 0: the application never starts"),
)
# G4: bits 23 nBOOT1, 26 nSWBOOT0, 27 nBOOT0; BOOT_LOCK is bit 16 beside the securable area.
_G4_SW = OptionField("nSWBOOT0", _OPTR, 26, 1, Confidence.MEMORY)
_G4_BOOT1 = OptionField("nBOOT1", _OPTR, 23, 1, Confidence.MEMORY)
_G4_LOCK = OptionField("BOOT_LOCK", 0x1FFF7828, 16, 1, Confidence.MEMORY)
_G4_BOOT = OptionField("nBOOT0:nSWBOOT0", _OPTR, 26, 0b11, Confidence.MEMORY)
_G4_ENTRY = (
    EntryCheck(_G4_SW, frozenset({1}), "the BOOT0 pin is ignored (option bit nSWBOOT0 is 0)"),
    EntryCheck(_G4_BOOT1, frozenset({1}), "BOOT0 high starts from SRAM (option bit nBOOT1 is 0)"),
    EntryCheck(_G4_LOCK, frozenset({0}), "the part always starts from flash (BOOT_LOCK is 1)"),
)
_G4_APP = (AppCheck(_G4_BOOT, frozenset({0}), "nSWBOOT0 and nBOOT0 are 0: the application never starts"),)

_G0_DUAL = OptionField("DUAL_BANK", _OPTR, 21, 1, Confidence.AGREED)
_G4_DBANK = OptionField("DBANK", _OPTR, 22, 1, Confidence.AGREED)

_PAGE = (2 * KIB, 0.02, 0.04)
_G4_PAGE = (2 * KIB, 0.0125, 0.025)
_CLEARED = (
    "The loader clears the empty flag when it starts: a reset before programming boots blank flash and hangs, "
    "so do not reset between attempts to synchronise unless BOOT0 is held."
)

C0 = replace(
    BASE,
    family="C0",
    flash_size_register=0x1FFF75A0,
    uid_address=0x1FFF7550,
    layouts=(uniform(*_PAGE),),
    write_align_bytes=8,
    flash_word_bytes=8,
    ecc=True,
    loader_id_address=0x1FFF17FE,
    hardware_autobaud=True,
    activation_pattern="11?",
    boot0_pin_obeyed=False,
    entry_checks=_G0_ENTRY,
    app_checks=_G0_APP,
    empty_check=True,
    usart_pins=pins("1:PA9/PA10"),
    option_bytes=spans("1FFF7800-1FFF787F"),
    otp=span("1FFF7000-1FFF73FF"),
    ram=spans("20000000-20008FFF"),
    quirks=(EMPTY_FLAG_STICKS,),
    provenance=cite(
        BASE,
        unsure("activation_pattern boot0_pin_obeyed entry_checks app_checks", "taken to be as G0; not read for this family"),
    ),
)
C5 = replace(
    BASE,
    family="C5",
    # Numbering and place of bank 2 were read in one document only and move with the size.
    layouts=(dual(pages(8 * KIB, 0.02, 0.1)),),
    layout_confirmed=False,
    write_align_bytes=16,
    flash_word_bytes=16,
    ecc=True,
    mass_erase_max_s=20.0,
    usart_protocol="4.0",
    loader_id_address=0x0BF885FE,
    startup_s=(0.0048, 0.012),  # with and without a crystal
    hardware_autobaud=True,
    activation_pattern="19",
    empty_check=True,
    system_memory=span("0BF80080-0BF885FF"),
    ram=spans("20000000-2003FFFF"),
    quirks=(EMPTY_FLAG_STICKS,),
    provenance=cite(
        BASE,
        read("pid family names flash_base flash_max_bytes", f"{AN2606} only"),
        unsure("layouts layout_confirmed", f"{AN2606} only: two banks of 8 KiB pages, the second one's base moves with size"),
        unsure("flash_size_register uid_address otp option_bytes", "not known for this family"),
        unsure("layouts.erase_s mass_erase_max_s", "no figure known; generous"),
        unsure("boot0_pin_obeyed entry_checks app_checks", "the factory value of BOOTSEL was not read"),
        unsure("loader_ids", f"{AN2606} prints three digits for a byte; both readings are listed"),
    ),
)
G0 = replace(
    BASE,
    family="G0",
    flash_size_register=0x1FFF75E0,
    uid_address=0x1FFF7590,
    layouts=(uniform(*_PAGE),),
    write_align_bytes=8,
    flash_word_bytes=8,
    ecc=True,
    startup_s=(0.00039,),
    hardware_autobaud=True,
    activation_pattern="11",
    boot0_pin_obeyed=False,
    entry_checks=_G0_ENTRY,
    app_checks=_G0_APP,
    empty_check=True,
    option_bytes=spans("1FFF7800-1FFF787F"),
    otp=span("1FFF7000-1FFF73FF"),
    ram=spans("20000000-20023FFF"),
    quirks=(EMPTY_FLAG_STICKS,),
    provenance=cite(
        BASE,
        agreed("write_align_bytes flash_word_bytes", f"hardware and embassy 8; {AN2606} table 7 says 4"),
        agreed("uid_address", "reference manual and public tables"),
    ),
)
G4 = replace(
    BASE,
    family="G4",
    flash_size_register=0x1FFF75E0,
    uid_address=0x1FFF7590,
    layouts=(uniform(*_G4_PAGE),),
    write_align_bytes=8,
    flash_word_bytes=8,
    ecc=True,
    mass_erase_max_s=0.025,
    loader_id_address=0x1FFF6FFE,
    startup_s=(0.00039,),
    hardware_autobaud=True,
    activation_pattern="15",
    entry_checks=_G4_ENTRY,
    app_checks=_G4_APP,
    usart_pins=pins("1:PA9/PA10 2:PA2/PA3 3:PC10/PC11"),
    system_memory=span("1FFF0000-1FFF6FFF"),
    option_bytes=spans("1FFF7800-1FFF782F"),
    otp=span("1FFF7000-1FFF73FF"),
    ram=spans("20000000-2001FFFF 10000000-10007FFF"),
    provenance=cite(BASE, agreed("uid_address", "reference manual and public tables")),
)

_C0_U1_ONLY = read("hardware_autobaud", f"{AN2606}: USART1 only, the others measure by software with up to 2 % error")
_G0_U1_ONLY = read("hardware_autobaud", f"{AN2606}: USART1 only, USART2 measures by software with up to 4 % error")

CHIPS = (
    replace(
        C0,
        pid=0x443,
        names=("C011",),
        flash_max_bytes=32 * KIB,
        loader_ids=ids("51"),
        startup_s=(0.0021,),
        system_memory=span("1FFF0000-1FFF17FF"),
        stub_ram=spans("20001000-20002FFF"),
        provenance=cite(
            C0, unsure("stub_ram", "AN2606 contradicts itself; embassy knows 6 KiB of RAM: no stub without a trial")
        ),
    ),
    replace(
        C0,
        pid=0x453,
        names=("C031",),
        flash_max_bytes=32 * KIB,
        loader_ids=ids("52"),
        startup_s=(0.0021,),
        system_memory=span("1FFF0000-1FFF17FF"),
        stub_ram=spans("20002000-20002FFF"),
        provenance=cite(C0, unsure("stub_ram", "AN2606 prints a reversed range, tables differ: no stub without a trial")),
    ),
    replace(
        C0,
        pid=0x44C,
        names=("C051",),
        flash_max_bytes=64 * KIB,
        usart_protocol="4.0",
        loader_id_address=0x1FFF2FFE,
        loader_ids=ids("B0"),
        startup_s=(0.002262,),
        system_memory=span("1FFF0000-1FFF2FFF"),
        stub_ram=spans("20001400-20002FFF"),
        usart_pins=pins("1: 2:"),
        provenance=cite(C0, _C0_U1_ONLY),
    ),
    replace(
        C0,
        pid=0x493,
        names=("C071",),
        flash_max_bytes=128 * KIB,
        loader_id_address=0x1FFF67FE,
        loader_ids=ids("D1"),
        startup_s=(0.002358,),
        system_memory=span("1FFF0000-1FFF6FFF"),
        stub_ram=spans("20002300-20005FFF"),
        usart_pins=pins("1: 2:"),
        provenance=cite(C0, _C0_U1_ONLY),
    ),
    replace(
        C0,
        pid=0x44D,
        names=("C091", "C092"),
        flash_max_bytes=256 * KIB,
        usart_protocol="4.0",
        loader_id_address=0x1FFF3FFE,
        loader_ids=ids("121 21"),
        startup_s=(0.001527,),
        system_memory=span("1FFF0000-1FFF3FFF"),
        stub_ram=spans("20002400-200077FF"),
        usart_pins=pins("1: 2: 3:"),
        provenance=cite(
            C0, _C0_U1_ONLY, unsure("loader_ids", f"{AN2606} prints 121, too large for a byte; both readings are listed")
        ),
    ),
    # --- C5
    replace(
        C5,
        pid=0x44E,
        names=("C551", "C552", "C562"),
        flash_max_bytes=512 * KIB,
        loader_ids=ids("101 1"),
        stub_ram=spans("20003C40-2001FFFF"),
        usart_pins=pins("1:PA9/PA10 2:PA2/PA3 3:PD8/PD9 4:PA0/PA1"),
    ),
    replace(
        C5,
        pid=0x44F,
        names=("C531", "C532", "C542"),
        flash_max_bytes=256 * KIB,
        loader_ids=ids("100 0"),
        stub_ram=spans("20003C00-2000FFFF"),
        usart_pins=pins("1: 2: 4:"),
    ),
    replace(
        C5,
        pid=0x45A,
        names=("C591", "C593", "C5A3"),
        flash_max_bytes=1024 * KIB,
        loader_ids=ids("100 0"),
        stub_ram=spans("20003C00-2003FFFF"),
        usart_pins=pins("1: 2: 3: 4:"),
    ),
    # --- G0
    replace(
        G0,
        pid=0x466,
        names=("G030", "G031", "G041"),
        flash_max_bytes=64 * KIB,
        loader_id_address=0x1FFF1FFE,
        loader_ids=ids("51 52 53 54"),  # V5.1 and V5.2: PA3 low blocks all detection
        usart_pins=pins("1:PA9/PA10,PA11/PA12 2:PA2/PA3"),  # PA11/PA12 on small packages
        system_memory=span("1FFF0000-1FFF1FFF"),
        stub_ram=spans("20001000-20001FFF"),
        provenance=cite(G0, _G0_U1_ONLY),
    ),
    replace(
        G0,
        pid=0x456,
        names=("G050", "G051", "G061"),
        flash_max_bytes=64 * KIB,
        loader_id_address=0x1FFF1FFE,
        loader_ids=ids("50 51"),  # V5.0: jitter on USART2
        usart_pins=pins("1:PA9/PA10,PA11/PA12 2:PA2/PA3"),
        system_memory=span("1FFF0000-1FFF1FFF"),
        stub_ram=spans("20001000-20001FFF"),
        provenance=cite(G0, _G0_U1_ONLY),
    ),
    replace(
        G0,
        pid=0x460,
        names=("G070", "G071", "G081"),
        flash_max_bytes=128 * KIB,
        sectors_per_erase=1,
        loader_id_address=0x1FFF6FFE,
        loader_ids=ids("B0 B1 B2 B3 B4"),
        usart_pins=pins("1:PA9/PA10 2:PA2/PA3 3:PC10/PC11"),  # V11.3: PC11 low slows detection
        system_memory=span("1FFF0000-1FFF6FFF"),
        stub_ram=spans("20002700-20008FFF"),
        quirks=(
            quirk(Quirk.OPTION_LAUNCH_MISSING, "V11.2: written option bytes are not launched.", "B2"),
            quirk(Quirk.ONE_SECTOR_PER_ERASE, "V11.3: an erase of several pages is not awaited; erase one.", "B3"),
            quirk(Quirk.ERASE_NOT_AWAITED, "V11.3: wait 40 ms after the acknowledgement of an erase.", "B3"),
            quirk(Quirk.EMPTY_FLAG_CLEARED_BY_LOADER, f"V11.3: {_CLEARED}", "B3"),
            quirk(Quirk.EMPTY_FLAG_STICKS, EMPTY_FLAG_STICKS.text, "B0 B1 B2 B4"),
        ),
        provenance=cite(G0, read("sectors_per_erase", f"{AN2606}, limitations of V11.3")),
    ),
    replace(
        G0,
        pid=0x467,
        names=("G0B0", "G0B1", "G0C1"),
        flash_max_bytes=512 * KIB,
        # DUAL_BANK is 1 from the factory. The reference manual numbers bank 2 from 256 whatever the size; ST's own library
        # counts from 0 in each bank, and a wrong number may erase another page. What the loader expects is not documented.
        layouts=(
            uniform(*_PAGE, sizes=(128 * KIB,)),
            dual(pages(*_PAGE), "dual", (256 * KIB, 512 * KIB), (_G0_DUAL, 1), bank2_code=256, confirmed=False),
            dual(pages(*_PAGE), "dual-linear", (256 * KIB, 512 * KIB), confirmed=False),
            replace(uniform(*_PAGE, "single", (256 * KIB, 512 * KIB), (_G0_DUAL, 0)), confirmed=False),
        ),
        mass_erase_max_s=0.08,
        sectors_per_erase=1,
        loader_id_address=0x1FFF9FFE,
        loader_ids=ids("D0 92"),
        usart_pins=pins("1:PA9/PA10 2:PA2/PA3 3:PC10/PC11"),
        system_memory=span("1FFF0000-1FFF6FFF"),  # and 1FFF8000-1FFFEFFF
        stub_ram=spans("20004000-2001FFFF"),
        quirks=(
            quirk(Quirk.ONE_SECTOR_PER_ERASE, "An erase of several pages of bank 2 in one command fails."),
            quirk(Quirk.EMPTY_FLAG_CLEARED_BY_LOADER, _CLEARED),
        ),
        provenance=cite(
            G0,
            unsure("layouts", "which page numbers the loader expects in bank 2 is not documented, and users report trouble"),
            read("sectors_per_erase", f"{AN2606}, limitations of this loader"),
        ),
    ),
    # --- G4
    replace(
        G4,
        pid=0x468,
        names=("G431", "G441"),
        flash_max_bytes=128 * KIB,
        loader_ids=ids("D3 D4"),
        stub_ram=spans("20004000-200057FF"),
    ),
    replace(
        G4,
        pid=0x469,
        names=("G471", "G473", "G474", "G483", "G484"),
        flash_max_bytes=512 * KIB,
        layouts=(
            dual(pages(*_G4_PAGE), "dual", (512 * KIB,), (_G4_DBANK, 1)),
            uniform(4 * KIB, 0.0125, 0.025, "single", (128 * KIB, 256 * KIB, 512 * KIB), (_G4_DBANK, 0)),
            # Not confirmed: OpenOCD puts the second bank of trimmed parts at 0x08040000, a user of a G474RB found no hole.
            dual(
                pages(*_G4_PAGE),
                "dual",
                (128 * KIB, 256 * KIB),
                (_G4_DBANK, 1),
                bank2_offset=256 * KIB,
                bank2_code=128,
                confirmed=False,
            ),
            dual(pages(*_G4_PAGE), "dual-linear", (128 * KIB, 256 * KIB), confirmed=False),
        ),
        mass_erase_max_s=0.05,
        loader_ids=ids("D3 D4 D5"),  # V13.3: booting from bank 2 is broken
        activation_pattern="14",
        bank_choice=OptionField("BFB2", _OPTR, 20, 1, Confidence.MEMORY),
        stub_ram=spans("20004000-20017FFF"),
        provenance=cite(
            G4, agreed("layouts", "public tables and OpenOCD's driver; parts below 512 KiB unsure in dual-bank mode")
        ),
    ),
    replace(
        G4,
        pid=0x479,
        names=("G491", "G4A1"),
        flash_max_bytes=512 * KIB,
        loader_ids=ids("D2"),
        stub_ram=spans("20004000-2001BFFF"),
        usart_pins=pins("1: 2: 3:"),
        provenance=cite(G4, memory("entry_checks app_checks", "as for the G431")),
    ),
)
