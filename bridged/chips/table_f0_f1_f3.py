"""STM32F0, F1 and F3: small pages, even parity, software baud-rate detection, no ECC.

Sources: AN2606 (2026) tables 2, 3, 7, 226 and the limitation lists; erase times of F1 from the data sheet of the F103, the
others assumed equal; the user option byte from RM0091 rev 10 and RM0313, option byte description.

F1 loaders before the XL-density one have no version byte and know only the one-byte page erase 0x43.
"""

from __future__ import annotations

from dataclasses import replace

from bridged.chips.model import AppCheck, Confidence, EntryCheck, OptionField, Quirk
from bridged.chips.rows import (
    AN2606,
    BASE,
    EMPTY_FLAG_STICKS,
    KIB,
    cite,
    ids,
    memory,
    pins,
    quirk,
    read,
    span,
    spans,
    uniform,
    unsure,
)

# The word at 0x1FFFF800 is nUSER:USER:nRDP:RDP, so bit n of USER is bit 16+n of the word.
_NBOOT1 = OptionField("nBOOT1", 0x1FFFF800, 16 + 4, 1, Confidence.READ)
_BOOT_SEL = OptionField("BOOT_SEL", 0x1FFFF800, 16 + 7, 1, Confidence.READ)
# nBOOT0 is bit 3 and BOOT_SEL bit 7 of USER: with both clear the loader starts whatever the pin says.
_BOOT_SEL_NBOOT0 = OptionField("BOOT_SEL:nBOOT0", 0x1FFFF800, 16 + 3, 0b1_0001, Confidence.READ)

_BOOT1 = EntryCheck(_NBOOT1, frozenset({1}), "BOOT0 high starts from SRAM (option bit nBOOT1 is 0)")
_PIN = EntryCheck(_BOOT_SEL, frozenset({1}), "the BOOT0 pin is ignored (option bit BOOT_SEL is 0)")
_APP = AppCheck(_BOOT_SEL_NBOOT0, frozenset({0}), "BOOT_SEL and nBOOT0 are 0: the loader starts whatever the BOOT0 pin says")

_OPTION_SOURCE = read("entry_checks app_checks", "RM0091 rev 10 and RM0313, option byte description")

_1K = (uniform(1 * KIB, 0.02, 0.04),)
_2K = (uniform(2 * KIB, 0.02, 0.04),)

# --- F0 -----------------------------------------------------------------------------------------------------------

F0 = replace(
    BASE,
    family="F0",
    flash_size_register=0x1FFFF7CC,
    uid_address=0x1FFFF7AC,
    layouts=_1K,
    loader_id_address=0x1FFFF7A6,
    startup_s=(0.001612,),
    activation_pattern="2",
    entry_checks=(_BOOT1,),
    option_bytes=spans("1FFFF800-1FFFF80F"),
    ram=spans("20000000-20007FFF"),
    provenance=cite(BASE, _OPTION_SOURCE),
)
_F0_EMPTY = replace(
    F0,
    activation_pattern="6",
    entry_checks=(_PIN, _BOOT1),
    app_checks=(_APP,),
    empty_check=True,
    quirks=(EMPTY_FLAG_STICKS,),
)

# --- F1 -----------------------------------------------------------------------------------------------------------

F1 = replace(
    BASE,
    family="F1",
    flash_size_register=0x1FFFF7E0,
    uid_address=0x1FFFF7E8,
    layouts=_1K,
    usart_protocol="2.2",
    erase_command=0x43,
    startup_s=(0.001227,),
    activation_pattern="1",  # BOOT1 is a pin (PB2): it must be low, and no option byte tells
    usart_pins=pins("1:PA9/PA10"),
    system_memory=span("1FFFF000-1FFFF7FF"),
    option_bytes=spans("1FFFF800-1FFFF80F"),
    ram=spans("20000000-20017FFF"),
    provenance=cite(
        BASE,
        read("layouts.erase_s mass_erase_max_s", "data sheet of the STM32F103x8/B, flash memory characteristics"),
        read("loader_ids loader_id_address", f"{AN2606} table 226: no version byte"),
        read("uid_address", "RM0008, device electronic signature"),
        memory("names", "flash code letters of the density classes"),
    ),
)
_F1_VALUE = replace(F1, loader_id_address=0x1FFFF7D6, loader_ids=ids("10"))

# --- F3 -----------------------------------------------------------------------------------------------------------

F3 = replace(
    BASE,
    family="F3",
    flash_size_register=0x1FFFF7CC,
    uid_address=0x1FFFF7AC,
    layouts=_2K,
    flash_word_bytes=2,
    loader_id_address=0x1FFFF796,
    activation_pattern="2",
    entry_checks=(_BOOT1,),
    usart_pins=pins("1:PA9/PA10 2:PA2/PA3"),
    system_memory=span("1FFFD800-1FFFF7FF"),
    option_bytes=spans("1FFFF800-1FFFF80F"),
    ram=spans("20000000-2000FFFF 10000000-10003FFF"),
    provenance=cite(
        BASE,
        _OPTION_SOURCE,
        unsure("flash_word_bytes", "half-word by memory, embassy says 8; writing aligned blocks avoids the question"),
    ),
)

CHIPS = (
    replace(
        F0,
        pid=0x440,
        names=("F05x", "F030x8"),
        flash_max_bytes=64 * KIB,
        loader_ids=ids("21"),
        system_memory=span("1FFFEC00-1FFFF7FF"),
        stub_ram=spans("20000800-20001FFF"),
        usart_pins=pins("1:PA9/PA10 2:PA14/PA15"),
        provenance=cite(F0, memory("usart_pins", f"{AN2606}; PA14/PA15 from memory")),
    ),
    replace(
        F0,
        pid=0x444,
        names=("F030x4/6", "F031", "F038"),
        flash_max_bytes=32 * KIB,
        loader_ids=ids("10"),
        system_memory=span("1FFFEC00-1FFFF7FF"),
        stub_ram=spans("20000800-20000FFF"),
        usart_pins=pins("1:PA9/PA10,PA14/PA15"),
        provenance=cite(F0, memory("usart_pins", f"{AN2606}; PA14/PA15 from memory")),
    ),
    replace(
        _F0_EMPTY,
        pid=0x442,
        names=("F030xC", "F09x"),
        flash_max_bytes=256 * KIB,
        layouts=_2K,
        loader_id_address=0x1FFFF796,
        loader_ids=ids("50 52"),
        startup_s=(0.002,),
        system_memory=span("1FFFD800-1FFFF7FF"),
        stub_ram=spans("20001800-20007FFF"),
        usart_pins=pins("1:PA9/PA10 2:PA2/PA3,PA14/PA15"),
    ),
    replace(
        _F0_EMPTY,
        pid=0x445,
        names=("F04x", "F070x6"),
        flash_max_bytes=32 * KIB,
        loader_id_address=0x1FFFF6A6,
        loader_ids=ids("A1 A2"),
        startup_s=(0.003, 0.230),  # F04x 0.06 ms; F070x6 3 ms with a crystal, 230 ms without
        system_memory=span("1FFFC400-1FFFF7FF"),
        usart_pins=pins("1:PA9/PA10 2:PA2/PA3,PA14/PA15"),
        quirks=(EMPTY_FLAG_STICKS, quirk(Quirk.NO_RAM_ACCESS, "The loader offers no RAM to the host.")),
        provenance=cite(_F0_EMPTY, memory("usart_pins", f"{AN2606}; PA14/PA15 from memory")),
    ),
    replace(
        F0,
        pid=0x448,
        names=("F070xB", "F071", "F072", "F078"),
        flash_max_bytes=128 * KIB,
        layouts=_2K,
        loader_id_address=0x1FFFF6A6,
        loader_ids=ids("A1 A2 A3"),  # tables 3 and 226 differ: A3 and A2
        startup_s=(0.006, 0.230),  # F07x 0.06 ms; F070xB 6 ms with a crystal, 230 ms without
        system_memory=span("1FFFC800-1FFFF7FF"),
        stub_ram=spans("20001800-20003FFF"),
        usart_pins=pins("1:PA9/PA10 2:PA14/PA15"),
    ),
    # --- F1
    replace(
        F1,
        pid=0x412,
        names=("F101x4/6", "F102x4/6", "F103x4/6"),
        flash_max_bytes=32 * KIB,
        stub_ram=spans("20000200-200027FF"),
    ),
    replace(
        F1,
        pid=0x410,
        names=("F101x8/B", "F102x8/B", "F103x8/B"),
        flash_max_bytes=128 * KIB,
        stub_ram=spans("20000200-20004FFF"),
    ),
    replace(
        F1,
        pid=0x414,
        names=("F101xC/D/E", "F103xC/D/E"),
        flash_max_bytes=512 * KIB,
        layouts=_2K,
        stub_ram=spans("20000200-2000FFFF"),
    ),
    replace(
        _F1_VALUE,
        pid=0x420,
        names=("F100x4/6/8/B",),
        flash_max_bytes=128 * KIB,
        stub_ram=spans("20000200-20001FFF"),
    ),
    replace(
        _F1_VALUE,
        pid=0x428,
        names=("F100xC/D/E",),
        flash_max_bytes=512 * KIB,
        layouts=_2K,
        stub_ram=spans("20000200-20007FFF"),
    ),
    replace(
        F1,
        pid=0x418,
        names=("F105", "F107"),
        flash_max_bytes=256 * KIB,
        layouts=_2K,
        startup_s=(0.001396, 0.5244),  # the second with PA9 (VBUS) high
        system_memory=span("1FFFB000-1FFFF7FF"),
        stub_ram=spans("20001000-2000FFFF"),
        usart_pins=pins("1:PA9/PA10 2:PD5/PD6"),
        # Parts with a date code before 937 cannot be used when PA10, PD6, PB5, PA11 or PA12 float; loader 2.0 answers 2.0.
    ),
    replace(
        F1,
        pid=0x430,
        names=("F101xF/G", "F103xF/G"),
        flash_max_bytes=1024 * KIB,
        layouts=_2K,  # two banks, counted through
        mass_erase_max_s=0.08,
        erase_command=0x44,
        usart_protocol="3.0",
        loader_id_address=0x1FFFF7D6,
        loader_ids=ids("21"),
        activation_pattern="3",
        system_memory=span("1FFFE000-1FFFF7FF"),
        stub_ram=spans("20000800-20017FFF"),
        usart_pins=pins("1:PA9/PA10 2:PD5/PD6"),
        quirks=(
            quirk(Quirk.NO_NACK_ON_BAD_ADDRESS, "A refused address gets no NACK; the next two bytes are taken as a command."),
        ),
        provenance=cite(F1, read("loader_ids loader_id_address", f"{AN2606} tables 3 and 226")),
    ),
    # --- F3
    replace(
        F3,
        pid=0x432,
        names=("F373", "F378"),
        flash_max_bytes=256 * KIB,
        loader_id_address=0x1FFFF7A6,
        loader_ids=ids("41 50"),
        startup_s=(0.0434,),  # with a crystal; 2.4 ms without, F378 1.5 ms
        first_baud=57600,
        max_baud=57600,  # the limit of the F378's loader; the product id does not tell the two apart
        usart_pins=pins("1:PA9/PA10 2:PD5/PD6"),
        stub_ram=spans("20001400-20007FFF"),  # F378 from 20001000
    ),
    replace(
        F3,
        pid=0x422,
        names=("F302xB/C", "F303xB/C", "F358"),
        flash_max_bytes=256 * KIB,
        loader_ids=ids("41 50"),
        startup_s=(0.0434,),  # with a crystal; 2.4 ms without, F358 1.5 ms
        usart_pins=pins("1:PA9/PA10 2:PD5/PD6"),
        stub_ram=spans("20001400-20009FFF"),
    ),
    replace(
        F3,
        pid=0x439,
        names=("F301", "F302x4/6/8", "F318"),
        flash_max_bytes=64 * KIB,
        loader_ids=ids("40 50"),
        startup_s=(0.045, 0.5608),  # with and without a crystal
        stub_ram=spans("20001800-20003FFF"),
    ),
    replace(
        F3,
        pid=0x438,
        names=("F303x4/6/8", "F334", "F328"),
        flash_max_bytes=64 * KIB,
        loader_ids=ids("50"),
        startup_s=(0.000155,),
        stub_ram=spans("20001800-20002FFF"),
    ),
    replace(
        F3,
        pid=0x446,
        names=("F302xD/E", "F303xD/E", "F398"),
        flash_max_bytes=512 * KIB,
        loader_ids=ids("40 50"),
        startup_s=(0.0075, 0.1467),  # with and without a crystal
        stub_ram=spans("20001800-2000FFFF"),
    ),
)
