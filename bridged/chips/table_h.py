"""STM32H5 and H7: ECC over wide flash words, hardware baud-rate detection; H5 by product state instead of RDP levels.

Sources: AN2606 (2026) tables 2, 3, 7, 226 and the limitation lists (H74x has the longest of all); program words from OpenOCD
and embassy, of which the larger is taken; erase times of the 8 KiB parts are not known and generous.

BOOT_ADD of an H7 is bits 31..16 of an address: 0x1FF0 is the loader. (The F7 counts in units of 16 KiB: its 0x0040 would be
no memory at all here.) It is read in the option register that the loader maps at 0x52002020.
"""

from __future__ import annotations

from dataclasses import replace

from bridged.chips.model import AppCheck, Confidence, EntryCheck, OptionField, Quirk
from bridged.chips.rows import (
    AN2606,
    BASE,
    KIB,
    MIB,
    TABLES,
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

_8K = (8 * KIB, 0.02, 0.1)
_128K = (128 * KIB, 2.0, 4.0)

_BOOT_ADD0 = OptionField("BOOT_ADD0", 0x52002040, 0, 0xFFFF, Confidence.MEMORY)
_BOOT_ADD1 = OptionField("BOOT_ADD1", 0x52002040, 16, 0xFFFF, Confidence.MEMORY)
_H7_PIN = EntryCheck(_BOOT_ADD1, frozenset({0x1FF0}), "BOOT0 high does not lead to the loader (BOOT_ADD1 is not 0x1FF0)")
_H7_APP = AppCheck(
    _BOOT_ADD0,
    frozenset({0x1FF0}),
    "BOOT_ADD0 is 0x1FF0, so BOOT0 low leads to the loader as well: the application never starts; the factory value is 0x0800",
)
_POWER_CYCLE = "After Go the supply mode stays locked (PWR_CR3) until the power is cycled; start the application by a reset."

H5 = replace(
    BASE,
    family="H5",
    flash_size_register=0x08FFF80C,
    uid_address=0x08FFF800,
    write_align_bytes=16,
    flash_word_bytes=16,
    ecc=True,
    mass_erase_max_s=20.0,
    usart_protocol="4.0",
    hardware_autobaud=True,
    activation_pattern="17",
    usart_pins=pins("1: 2: 3:"),
    ram=spans("20000000-2017FFFF 30000000-3017FFFF"),  # the second is the secure alias
    provenance=cite(
        BASE,
        unsure("layouts", "two banks of 8 KiB pages; the loader's numbers for the second are in no public table"),
        unsure("layouts.erase_s mass_erase_max_s", "no figure known; generous"),
        unsure("option_bytes entry_checks app_checks", "registers; not reachable as far as known"),
        unsure("otp", "not known"),
        read("erase_command mass_erase", f"{AN2606} table 3 and stm32loader"),
        memory("boot0_pin_obeyed", "the product state decides as well"),
    ),
)

H7 = replace(
    BASE,
    family="H7",
    flash_size_register=0x1FF1E880,
    uid_address=0x1FF1E800,
    write_align_bytes=32,
    flash_word_bytes=32,
    ecc=True,
    mass_erase_max_s=30.0,
    write_ack_max_s=2.0,
    loader_id_address=0x1FF1E7FE,
    startup_s=(0.054,),
    hardware_autobaud=True,
    activation_pattern="10",
    entry_checks=(_H7_PIN,),
    app_checks=(_H7_APP,),
    usart_pins=pins("1:PA9/PA10 2:PA2/PA3 3:PB10/PB11,PD8/PD9"),
    system_memory=span("1FF00000-1FF1E7FF"),
    option_bytes=spans("52002020-5200204B"),
    ram=spans("20000000-2001FFFF 24000000-240FFFFF 30000000-3004FFFF 38000000-3800FFFF 00000000-0000FFFF"),
    provenance=cite(
        BASE,
        agreed("uid_address", "reference manual and public tables"),
        agreed("write_align_bytes flash_word_bytes", f"OpenOCD and embassy; {AN2606} table 7 says 8"),
        read("option_bytes", f"{AN2606}: registers that the loader maps"),
        unsure("otp", "not known"),
    ),
)

CHIPS = (
    replace(
        H5,
        pid=0x474,
        names=("H503",),
        flash_max_bytes=128 * KIB,
        layouts=(dual(pages(*_8K), sizes=(128 * KIB,), confirmed=False),),
        loader_id_address=0x0BF8FFFE,
        loader_ids=ids("E1 E2"),
        startup_s=(0.0015,),
        system_memory=span("0BF87000-0BF8FFFF"),
        stub_ram=spans("20004000-20007FFF"),
        # A user reports that of 16-byte writes, all acknowledged, only the first was programmed: whole blocks, verified.
    ),
    replace(
        H5,
        pid=0x478,
        names=("H523", "H533"),
        flash_max_bytes=512 * KIB,
        layouts=(dual(pages(*_8K), sizes=(256 * KIB, 512 * KIB), confirmed=False),),
        loader_id_address=0x0BF9FFFE,
        loader_ids=ids("E2"),
        startup_s=(0.0027,),
        system_memory=span("0BF97000-0BF9FFFF"),
        stub_ram=spans("20004000-20043FFF"),
        provenance=cite(H5, unsure("loader_id_address", f"{AN2606} prints 0BF8FFFE, outside its own system-memory range")),
    ),
    replace(
        H5,
        pid=0x484,
        names=("H562", "H563", "H573"),
        flash_max_bytes=2 * MIB,
        layouts=(dual(pages(*_8K), sizes=(1 * MIB, 2 * MIB), confirmed=False),),
        loader_id_address=0x0BF9FAFE,
        loader_ids=ids("E5"),
        startup_s=(0.0018,),
        system_memory=span("0BF97000-0BF9FFFF"),
        stub_ram=spans("20004000-2009FFFF"),
        provenance=cite(H5, unsure("stub_ram", f"{AN2606} and stm32loader say from 20000000; its siblings begin at 20004000")),
    ),
    replace(
        H5,
        pid=0x47A,
        names=("H5E", "H5F"),
        flash_max_bytes=4 * MIB,
        layouts=(dual(pages(*_8K), sizes=(4 * MIB,), confirmed=False),),
        loader_id_address=0x0BFB5FFE,
        loader_ids=ids("F0"),
        startup_s=(0.0117, 0.200),  # with and without a crystal
        system_memory=span("0BFAC000-0BFB7FFF"),
        stub_ram=spans("20004000-2017FFFF"),
        provenance=cite(H5, read("pid names flash_max_bytes", f"{AN2606} only")),
    ),
    # --- H7
    replace(
        H7,
        pid=0x483,
        names=("H723", "H725", "H730", "H733", "H735"),
        flash_max_bytes=1 * MIB,
        layouts=(uniform(*_128K, name="single"),),
        loader_ids=ids("91 92 93"),
        stub_ram=spans("20004100-2001FFFF 24004000-2404FFFF"),
        quirks=(quirk(Quirk.POWER_CYCLE_AFTER_GO, f"V9.1 and V9.2: {_POWER_CYCLE}", "91 92"),),
    ),
    replace(
        H7,
        pid=0x450,
        names=("H742", "H743", "H745", "H747", "H750", "H753", "H755", "H757"),
        flash_max_bytes=2 * MIB,
        layouts=(
            dual(pages(*_128K), "dual", (2 * MIB,)),
            uniform(*_128K, name="single", sizes=(128 * KIB,)),  # H750: one sector
            # Not confirmed: the second bank stays at 0x08100000; whether its first sector is then number 8 or 4 was not read.
            dual(pages(*_128K), "dual", (1 * MIB,), bank2_offset=1 * MIB, bank2_code=8, confirmed=False),
            dual(pages(*_128K), "dual-linear", (1 * MIB,), bank2_offset=1 * MIB, confirmed=False),
        ),
        mass_erase_max_s=60.0,
        loader_ids=ids("D2 D3 90 91 92"),
        startup_s=(0.054, 0.056),  # with and without a crystal
        # PB15 low blocks detection on V9.0 to V9.2; V13.2: USART2 is dead; the stack pointer must be below RAM end - 16.
        usart_pins=pins("1:PA9/PA10,PB14/PB15 2:PA2/PA3 3:PB10/PB11"),
        stub_ram=spans("20004100-2001FFFF 24005000-2407FFFF"),
        quirks=(
            quirk(Quirk.GET_COUNT_WRONG, "V9.0: Get announces 13 commands and there are 11.", "90"),
            quirk(Quirk.GO_FIRST_ACK_MISSING, "V9.0: the first acknowledgement of Go is missing.", "90"),
            quirk(Quirk.EXTRA_RESET_AFTER_POWER_UP, "V9.0: one more reset after power-up, or a pull-up on PA11.", "90"),
            quirk(Quirk.GO_BROKEN, "V13.2: Go does not work.", "D2"),
            quirk(Quirk.BANK_ERASE_BROKEN, "V13.3: bank erase does not work over USART.", "D3"),
            quirk(
                Quirk.ERASE_NOT_AWAITED,
                "V9.1: an erase of bank 2 is acknowledged before it is finished, and the next flash command hangs.",
                "91",
            ),
            quirk(Quirk.TWO_SYNC_BYTES, "USART1 on PB14/PB15 (and only there) needs 0x7F twice."),
            quirk(Quirk.POWER_CYCLE_AFTER_GO, f"Up to V9.0: {_POWER_CYCLE}", "D2 D3 90"),
        ),
        provenance=cite(H7, agreed("layouts", f"{TABLES}; parts of 1 MiB unsure")),
    ),
    replace(
        H7,
        pid=0x480,
        names=("H7A3", "H7B3", "H7B0"),
        flash_max_bytes=2 * MIB,
        flash_size_register=0x08FFF80C,
        uid_address=0x08FFF800,
        layouts=(
            # Not confirmed: stm32flash and stm32loader know 1 MiB at most, so no table shows the numbers of bank 2.
            dual(pages(*_8K), "dual", (2 * MIB,), confirmed=False),
            dual(pages(*_8K), "dual", (1 * MIB,), bank2_offset=1 * MIB, bank2_code=128, confirmed=False),
            dual(pages(*_8K), "dual-linear", (1 * MIB,), confirmed=False),
            uniform(*_8K, name="single", sizes=(128 * KIB,)),  # H7B0
        ),
        flash_word_bytes=16,
        mass_erase_max_s=30.0,
        loader_id_address=0x1FF13FFE,
        loader_ids=ids("90 91 92"),
        startup_s=(0.545,),
        system_memory=span("1FF00000-1FF13FFF"),
        stub_ram=spans("20004100-2001FFFF 24034000-2407FFFF"),
        quirks=(quirk(Quirk.POWER_CYCLE_AFTER_GO, f"V9.0 and V9.1: {_POWER_CYCLE}", "90 91"),),
        provenance=cite(
            H7,
            unsure("layouts flash_max_bytes", "2 MiB of 8 KiB pages by OpenOCD and embassy; others say 1 MiB, stlink 128 KiB"),
            unsure("layouts.erase_s mass_erase_max_s", "no figure known; generous"),
            agreed("flash_size_register", "OpenOCD and stlink; stm32loader's family default is wrong here"),
            memory("uid_address"),
            unsure("flash_word_bytes", "OpenOCD 16, embassy 32; aligned to 32 either way"),
        ),
    ),
    replace(
        H7,
        pid=0x485,
        names=("H7Rx", "H7Sx"),
        flash_max_bytes=64 * KIB,  # external flash is out of reach of this loader
        flash_size_register=0x08FFF80C,
        uid_address=0x08FFF800,
        layouts=(uniform(*_8K, name="single"),),
        write_align_bytes=16,
        flash_word_bytes=16,
        mass_erase_max_s=20.0,
        usart_protocol="4.0",
        loader_id_address=0x1FF1FCFE,
        loader_ids=ids("E3 E5"),
        startup_s=(0.054, 0.6),
        activation_pattern="",
        entry_checks=(),
        app_checks=(),
        usart_pins=pins("1: 2: 3: 4:"),
        system_memory=span("1FF18000-1FF1FFFF"),
        option_bytes=(),
        stub_ram=spans("24024000-24071FFF 20000000-2002FFFF"),
        ram=spans("20000000-2002FFFF 24000000-2407FFFF 30000000-30007FFF 00000000-0002FFFF"),
        provenance=cite(
            H7,
            agreed("pid names flash_max_bytes layouts", f"{AN2606} and OpenOCD"),
            unsure("layouts.erase_s mass_erase_max_s", "no figure known; generous"),
            unsure("startup_s activation_pattern entry_checks app_checks boot0_pin_obeyed", "not read for this part"),
            unsure("option_bytes", "registers; not reachable as far as known"),
            read("write_align_bytes", f"{AN2606} table 7"),
            unsure("stub_ram", f"{AN2606} gives four ranges, two of which begin at the RAM base; the large other two"),
            memory("uid_address"),
        ),
    ),
)
