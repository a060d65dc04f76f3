"""STM32L0, L1, L4 (with L4+) and L5.

L0 and L1 have small pages, erase to 0x00, and (as far as the public tables agree) no mass erase in the ROM. L4 and L5 have
ECC over 8 bytes: a double word is programmed once between erases.

Sources: AN2606 (2026) tables 2, 3, 7, 226 and the limitation lists; the bits that select one or two banks as in OpenOCD's
driver for L4 and its relatives. The user option register of an L4 lies at 0x1FFF7800, its complement 4 bytes after it.
"""

from __future__ import annotations

from dataclasses import replace

from bridged.chips.model import AppCheck, Confidence, EntryCheck, OptionField, Quirk
from bridged.chips.rows import (
    AN2606,
    AN3155,
    BASE,
    EMPTY_FLAG_STICKS,
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

# L4: bits 20 BFB2, 21 DUALBANK or DB1M, 22 DBANK, 23 nBOOT1, 26 nSWBOOT0, 27 nBOOT0 of the option register.
_OPTR = 0x1FFF7800
_SW = OptionField("nSWBOOT0", _OPTR, 26, 1, Confidence.MEMORY)
_BOOT1 = OptionField("nBOOT1", _OPTR, 23, 1, Confidence.MEMORY)
_BOOT = OptionField("nBOOT0:nSWBOOT0", _OPTR, 26, 0b11, Confidence.MEMORY)
_BFB2 = OptionField("BFB2", _OPTR, 20, 1, Confidence.MEMORY)
_DUALBANK = OptionField("DUALBANK", _OPTR, 21, 1, Confidence.AGREED)
_DB1M = OptionField("DB1M", _OPTR, 21, 1, Confidence.AGREED)
_DBANK = OptionField("DBANK", _OPTR, 22, 1, Confidence.AGREED)
_PIN_CHECK = EntryCheck(_SW, frozenset({1}), "the BOOT0 pin is ignored (option bit nSWBOOT0 is 0)")
_BOOT1_CHECK = EntryCheck(_BOOT1, frozenset({1}), "BOOT0 high starts from SRAM (option bit nBOOT1 is 0)")
_APP = AppCheck(_BOOT, frozenset({0}), "nSWBOOT0 and nBOOT0 are 0: the application never starts")

# L0: nBOOT1 is bit 31 of the option register, whose upper half lies in the second option word.
_L0_BOOT1 = OptionField("nBOOT1", 0x1FF80004, 15, 1, Confidence.MEMORY)
_L0_BOOT1_CHECK = EntryCheck(_L0_BOOT1, frozenset({1}), "BOOT0 high starts from SRAM (option bit nBOOT1 is 0)")

# L5: no option bytes in memory; these are bits of the register, which the loader may or may not let a host read.
_L5_DBANK = OptionField("DBANK", 0x40022040, 22, 1, Confidence.UNSURE)
_L5_DB256K = OptionField("DB256K", 0x40022040, 21, 1, Confidence.UNSURE)

_2K = (2 * KIB, 0.0125, 0.025)
_4K = (4 * KIB, 0.0125, 0.025)
_8K = (8 * KIB, 0.0125, 0.025)

_TRIMMED = (256 * KIB, 512 * KIB)
_L47_LAYOUTS = (
    dual(pages(*_2K), "dual", (1 * MIB,)),
    # Not confirmed: the reference manual numbers bank 2 from 256 on trimmed parts too; the loader's view was not read.
    dual(pages(*_2K), "dual", _TRIMMED, (_DUALBANK, 1), bank2_code=256, confirmed=False),
    dual(pages(*_2K), "dual-linear", _TRIMMED, confirmed=False),
    uniform(*_2K, "single", _TRIMMED, (_DUALBANK, 0)),
    uniform(*_2K, "single", (128 * KIB,)),
)

L0 = replace(
    BASE,
    family="L0",
    flash_size_register=0x1FF8007C,
    uid_address=0x1FF80050,
    layouts=(uniform(128, 0.0032, 0.004),),
    erased_value=0x00,
    write_align_bytes=8,
    mass_erase=False,
    mass_erase_max_s=10.0,  # only as the wait after Readout Unprotect
    read_max_bytes=128,
    loader_id_address=0x1FF00FFE,
    activation_pattern="2",
    entry_checks=(_L0_BOOT1_CHECK,),
    usart_pins=pins("1:PA9/PA10 2:PA2/PA3"),
    system_memory=span("1FF00000-1FF00FFF"),
    option_bytes=spans("1FF80000-1FF8001F"),
    ram=spans("20000000-20004FFF"),
    provenance=cite(
        BASE,
        agreed("uid_address", "reference manual and public tables"),
        agreed("mass_erase", "stm32loader and newer stm32flash; an older stm32flash only knew it of the L05x"),
        read("write_align_bytes", f"{AN2606} table 7"),
        agreed("read_max_bytes", "stm32loader"),
    ),
)
L1 = replace(
    BASE,
    family="L1",
    flash_size_register=0x1FF800CC,
    uid_address=0x1FF800D0,
    # Two banks on L1xxxD and L1xxxE, counted through.
    layouts=(uniform(256, 0.0032, 0.004),),
    erased_value=0x00,
    write_align_bytes=8,
    mass_erase=False,
    mass_erase_max_s=20.0,  # only as the wait after Readout Unprotect
    loader_id_address=0x1FF01FFE,
    startup_s=(0.000708, 0.08),
    activation_pattern="1",  # BOOT1 is a pin and no option byte tells
    usart_pins=pins("1:PA9/PA10 2:PD5/PD6"),
    system_memory=span("1FF00000-1FF01FFF"),
    option_bytes=spans("1FF80000-1FF8001F"),
    ram=spans("20000000-20013FFF"),
    provenance=cite(
        BASE,
        agreed("mass_erase", "stm32loader and newer stm32flash"),
        read("write_align_bytes", f"{AN2606} table 7"),
    ),
)
_L1_SMALL = replace(
    L1,
    flash_size_register=0x1FF8004C,
    uid_address=0x1FF80050,
    flash_max_bytes=128 * KIB,
    loader_id_address=0x1FF00FFE,
    loader_ids=ids("20"),
    startup_s=(0.000542,),
    system_memory=span("1FF00000-1FF00FFF"),
    quirks=(
        quirk(
            Quirk.NO_NACK_ON_BAD_ADDRESS,
            "V2.0: a refused address gets no NACK; the next two bytes are taken as a command.",
            "20",
        ),
    ),
)
L4 = replace(
    BASE,
    family="L4",
    flash_size_register=0x1FFF75E0,
    uid_address=0x1FFF7590,
    layouts=(uniform(*_2K),),
    write_align_bytes=8,
    flash_word_bytes=8,
    ecc=True,
    mass_erase_max_s=0.025,
    loader_id_address=0x1FFF6FFE,
    startup_s=(0.00086,),
    activation_pattern="6",
    entry_checks=(_PIN_CHECK, _BOOT1_CHECK),
    app_checks=(_APP,),
    empty_check=True,
    usart_pins=pins("1:PA9/PA10 2:PA2/PA3 3:PC10/PC11"),
    system_memory=span("1FFF0000-1FFF6FFF"),
    option_bytes=spans("1FFF7800-1FFF780F"),
    otp=span("1FFF7000-1FFF73FF"),
    ram=spans("20000000-2009FFFF 10000000-1000FFFF"),
    quirks=(EMPTY_FLAG_STICKS,),
    provenance=cite(
        BASE,
        agreed("uid_address", "reference manual and public tables"),
        read("write_align_bytes", f"{AN2606} table 7"),
        agreed("flash_word_bytes ecc otp", "OpenOCD and embassy"),
    ),
)
_L4_PLUS = replace(
    L4,
    mass_erase_max_s=0.05,
    activation_pattern="6?",
    usart_pins=pins("1: 2: 3:"),
    provenance=cite(
        L4,
        unsure("activation_pattern empty_check entry_checks app_checks", "taken to be as the other L4; not read for this part"),
        agreed("layouts", "AN2606, embassy and OpenOCD (stm32flash and stm32loader differ); smaller parts in two banks unsure"),
    ),
)

CHIPS = (
    replace(
        L0,
        pid=0x457,
        names=("L010x3/4", "L011", "L021"),
        flash_max_bytes=16 * KIB,
        loader_ids=ids("C2 C3"),
        startup_s=(0.00063,),
        activation_pattern="6?",
        entry_checks=(),
        empty_check=True,
        usart_pins=pins("2:PA2/PA3,PA9/PA10"),
        quirks=(EMPTY_FLAG_STICKS, quirk(Quirk.NO_RAM_ACCESS, "The loader offers no RAM to the host.")),
        provenance=cite(
            L0,
            unsure("activation_pattern entry_checks", "not read for this part; the empty check is documented"),
            memory("usart_pins", f"{AN2606}; PA9/PA10 from memory"),
        ),
    ),
    replace(
        L0,
        pid=0x425,
        names=("L010x6", "L031", "L041"),
        flash_max_bytes=32 * KIB,
        loader_ids=ids("C0"),
        startup_s=(0.00062,),
        usart_pins=pins("2:PA9/PA10,PA2/PA3"),
        quirks=(quirk(Quirk.NO_RAM_ACCESS, "The loader can neither read nor write SRAM."),),
    ),
    replace(
        L0,
        pid=0x417,
        names=("L010x8", "L051", "L052", "L053", "L062", "L063"),
        flash_max_bytes=64 * KIB,
        loader_ids=ids("C0"),
        startup_s=(0.00022,),
        activation_pattern="1",
        entry_checks=(),
        stub_ram=spans("20001000-20001FFF"),
    ),
    replace(
        L0,
        pid=0x447,
        names=("L010xB", "L071", "L072", "L073", "L081", "L082", "L083"),
        flash_max_bytes=192 * KIB,
        loader_id_address=0x1FF01FFE,
        loader_ids=ids("40 41 B1 B2"),
        startup_s=(0.00071,),
        activation_pattern="2,7",
        system_memory=span("1FF00000-1FF01FFF"),
        stub_ram=spans("20001400-20004FFF"),
        provenance=cite(L0, unsure("stub_ram", "V4.1 from 20001000, V11.2 from 20001400, stm32flash from 20002000")),
    ),
    # --- L1
    replace(
        _L1_SMALL,
        pid=0x416,
        names=("L1xxx6/8/B",),
        usart_protocol="3.0",
        stub_ram=spans("20000800-20003FFF"),
    ),
    replace(
        _L1_SMALL,
        pid=0x429,
        names=("L1xxx6/8/B-A",),
        flash_size_mask=0xFF,
        stub_ram=spans("20001000-20007FFF"),
        provenance=cite(_L1_SMALL, memory("flash_size_mask", "OpenOCD (stm32lx); the reference manual was not read")),
    ),
    replace(
        L1,
        pid=0x427,
        names=("L1xxxC",),
        flash_max_bytes=256 * KIB,
        loader_ids=ids("40"),
        stub_ram=spans("20001000-20007FFF"),
        quirks=(quirk(Quirk.TWO_NACKS, "Two NACKs to Read, Write and Go under readout protection."),),
    ),
    replace(
        L1,
        pid=0x436,
        names=("L1xxxD",),
        flash_max_bytes=384 * KIB,
        loader_ids=ids("45"),
        activation_pattern="4",
        option_bytes=spans("1FF80000-1FF8009F"),
        stub_ram=spans("20001000-2000BFFF"),
        flash_size_codes=((0, 384), (1, 256)),
        provenance=cite(
            L1,
            unsure("mass_erase", "an older stm32flash allows it, the newer and stm32loader do not"),
            memory("flash_size_codes", "OpenOCD (stm32lx), which cites RM0038 rev 8, 30.1.1; the manual was not read"),
        ),
    ),
    replace(
        L1,
        pid=0x437,
        names=("L1xxxE",),
        flash_max_bytes=512 * KIB,
        loader_ids=ids("40"),
        startup_s=(0.000708, 0.2),
        activation_pattern="4?",
        option_bytes=spans("1FF80000-1FF8009F"),
        stub_ram=spans("20001000-20013FFF"),
        provenance=cite(L1, unsure("activation_pattern", "not read for this part")),
    ),
    # --- L4
    replace(
        L4,
        pid=0x464,
        names=("L412", "L422"),
        flash_max_bytes=128 * KIB,
        loader_ids=ids("D1"),
        stub_ram=spans("20003100-20007FFF"),
        provenance=cite(L4, unsure("stub_ram", f"{AN2606} from 20002100, stm32flash from 20003100: the smaller range")),
    ),
    replace(
        L4,
        pid=0x435,
        names=("L431", "L432", "L433", "L442", "L443"),
        flash_max_bytes=256 * KIB,
        loader_ids=ids("91"),
        startup_s=(0.00086, 0.1),
        stub_ram=spans("20003100-2000BFFF"),
    ),
    replace(
        L4,
        pid=0x462,
        names=("L451", "L452", "L462"),
        flash_max_bytes=512 * KIB,
        loader_ids=ids("92"),
        stub_ram=spans("20003100-2001FFFF"),
    ),
    replace(
        L4,
        pid=0x415,
        names=("L471", "L475", "L476", "L485", "L486"),
        flash_max_bytes=1 * MIB,
        layouts=_L47_LAYOUTS,
        mass_erase_max_s=0.05,
        loader_ids=ids("A1 A2 A3 90 91 92"),
        startup_s=(0.055, 2.56),  # with and without a 32 kHz crystal
        activation_pattern="7",
        bank_choice=_BFB2,
        entry_checks=(_BOOT1_CHECK,),
        app_checks=(),
        empty_check=False,
        option_bytes=spans("1FFF7800-1FFF780F 1FFFF800-1FFFF80F"),
        stub_ram=spans("20003100-20017FFF"),
        quirks=(quirk(Quirk.RAM_WRITE_BROKEN, "V10.1 and V9.0 corrupt writes to SRAM.", "A1 90"),),
        provenance=cite(L4, agreed("layouts", f"{TABLES}; parts below 1 MiB in dual-bank mode unsure")),
    ),
    replace(
        L4,
        pid=0x461,
        names=("L496", "L4A6"),
        flash_max_bytes=1 * MIB,
        layouts=_L47_LAYOUTS,
        mass_erase_max_s=0.05,
        loader_ids=ids("93"),
        startup_s=(0.0769, 0.1),
        option_bytes=spans("1FFF7800-1FFF780F 1FFFF800-1FFFF80F"),
        stub_ram=spans("20003100-2003FFFF"),
        quirks=(EMPTY_FLAG_STICKS, quirk(Quirk.BANK_ERASE_BROKEN, "V9.3: bank erase gets a NACK; erase by pages.", "93")),
        provenance=cite(L4, agreed("layouts", f"{TABLES}; parts below 1 MiB in dual-bank mode unsure")),
    ),
    replace(
        _L4_PLUS,
        pid=0x470,
        names=("L4R5", "L4R7", "L4R9", "L4S5", "L4S7", "L4S9"),
        flash_max_bytes=2 * MIB,
        layouts=(
            dual(pages(*_4K), "dual", (2 * MIB,), (_DBANK, 1)),
            uniform(*_8K, "single", (2 * MIB,), (_DBANK, 0)),
            # Not confirmed: the start of the second bank's numbers on trimmed parts.
            dual(pages(*_4K), "dual", (1 * MIB,), (_DB1M, 1), bank2_code=256, confirmed=False),
            dual(pages(*_4K), "dual-linear", (1 * MIB,), confirmed=False),
            replace(uniform(*_8K, "single", (1 * MIB,), (_DB1M, 0)), confirmed=False),
        ),
        loader_ids=ids("95"),
        startup_s=(0.0101,),
        stub_ram=spans("20003200-2009FFFF"),
    ),
    replace(
        _L4_PLUS,
        pid=0x471,
        names=("L4P5", "L4Q5"),
        flash_max_bytes=1 * MIB,
        layouts=(
            # Not confirmed: stm32flash and stm32loader do not agree with the layout of the L4R, of which this is a half.
            dual(pages(*_4K), "dual", (1 * MIB,), (_DBANK, 1), confirmed=False),
            uniform(*_8K, "single", (1 * MIB,), (_DBANK, 0)),
            dual(pages(*_4K), "dual", (512 * KIB,), (_DB1M, 1), confirmed=False),
            replace(uniform(*_8K, "single", (512 * KIB,), (_DB1M, 0)), confirmed=False),
        ),
        loader_ids=ids("90"),
        startup_s=(0.0099,),
        stub_ram=spans("20004000-2004FFFF"),
    ),
    replace(
        L4,
        family="L5",
        pid=0x472,
        names=("L552", "L562"),
        flash_max_bytes=512 * KIB,
        flash_size_register=0x0BFA05E0,
        uid_address=0x0BFA0590,
        layouts=(
            dual(pages(*_2K), "dual", (512 * KIB,), (_L5_DBANK, 1)),
            uniform(*_4K, "single", (512 * KIB,), (_L5_DBANK, 0)),
            dual(pages(*_2K), "dual", (256 * KIB,), (_L5_DB256K, 1), confirmed=False),
            replace(uniform(*_4K, "single", (256 * KIB,), (_L5_DB256K, 0)), confirmed=False),
        ),
        write_align_bytes=16,
        mass_erase_max_s=0.05,
        loader_id_address=0x0BF97FFE,
        loader_ids=ids("92"),
        startup_s=(0.00039,),
        hardware_autobaud=True,
        activation_pattern="12",
        entry_checks=(),
        app_checks=(),
        empty_check=False,
        usart_pins=pins("1: 2: 3:"),
        system_memory=span("0BF90000-0BF97FFF"),
        option_bytes=(),
        otp=span("0BFA0000-0BFA01FF"),
        stub_ram=spans("20004000-2003FFFF"),
        ram=spans("20000000-2003FFFF 30000000-3003FFFF"),  # the second is the secure alias
        quirks=(),
        provenance=cite(
            L4,
            agreed("layouts", f"{TABLES}: 2 KiB pages, stlink 4 KiB; which of them is an option bit; 256 KiB unsure"),
            read("write_align_bytes", f"{AN2606} table 7"),
            memory("uid_address"),
            unsure("option_bytes entry_checks app_checks", "registers; whether the loader lets a host read them is not known"),
            read("read_max_bytes write_max_bytes", AN3155),
        ),
    ),
)
