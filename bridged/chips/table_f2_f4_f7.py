"""STM32F2, F4 and F7: few large sectors, erase times of seconds, software baud-rate detection, no ECC.

Sources: AN2606 (2026) tables 2, 3, 7, 226 and the limitation lists. Sector sizes agree in all public tables. Erase times are
the data sheets' worst case with x8 parallelism (the loader assumes the lowest supply voltage), from memory.

Option bytes of F4 and F7 in memory are 16-bit values followed by their complement: the upper half of the option register
lies in the word 8 bytes after the lower half, so register bit 30 (DB1M) is bit 14 at 0x1FFFC008 and register bit 29 (nDBANK)
is bit 13 at 0x1FFF0008. (A tool that takes bit 29 of the word at 0x1FFF0000 reads the complement of a protection bit.)
"""

from __future__ import annotations

from dataclasses import replace

from bridged.chips.model import AppCheck, BankSpec, Confidence, EntryCheck, Layout, OptionField, Quirk, Run
from bridged.chips.rows import (
    AN2606,
    AN3155,
    BASE,
    KIB,
    MIB,
    agreed,
    cite,
    dual,
    ids,
    memory,
    pins,
    quirk,
    read,
    span,
    spans,
    unsure,
)

# Sizes with typical and worst erase time at x8; `*` in ST's tables is a count of 0 here.
_SMALL = (Run(4, 16 * KIB, 0.4, 0.8), Run(1, 64 * KIB, 1.2, 2.4), Run(0, 128 * KIB, 2.0, 4.0))
_LARGE = (Run(4, 32 * KIB, 0.4, 0.8), Run(1, 128 * KIB, 1.2, 2.4), Run(0, 256 * KIB, 2.0, 4.0))

_DB1M = OptionField("DB1M", 0x1FFFC008, 14, 1, Confidence.AGREED)
_BFB2 = OptionField("BFB2", 0x1FFFC000, 4, 1, Confidence.MEMORY)
_NDBANK = OptionField("nDBANK", 0x1FFF0008, 13, 1, Confidence.AGREED)
_NDBOOT = OptionField("nDBOOT", 0x1FFF0008, 12, 1, Confidence.MEMORY)
_BOOT_ADD0 = OptionField("BOOT_ADD0", 0x1FFF0010, 0, 0xFFFF, Confidence.AGREED)
_BOOT_ADD1 = OptionField("BOOT_ADD1", 0x1FFF0018, 0, 0xFFFF, Confidence.AGREED)

# 0x0040 is address 0x00100000 >> 14: the loader as seen through ITCM.
_F7_PIN = EntryCheck(_BOOT_ADD1, frozenset({0x0040}), "BOOT0 high does not lead to the loader (BOOT_ADD1 is not 0x0040)")
_F7_APP = AppCheck(
    _BOOT_ADD0,
    frozenset({0x0040}),
    "BOOT_ADD0 is 0x0040, so BOOT0 low leads to the loader as well: the application never starts; the factory value is 0x0080",
)
_F7_SINGLE = (Layout("single", (BankSpec(_LARGE),)),)

# F42x/F46x: in dual-bank mode bank 2 always begins with sector 12.
_F4_DUAL = (
    dual(_SMALL, "dual", (2 * MIB,), bank2_code=12),
    Layout("single", (BankSpec(_SMALL),), (512 * KIB,)),
    Layout("single", (BankSpec(_SMALL),), (1 * MIB,), (_DB1M, 0)),
    # Not confirmed: the hardware numbers the second bank from 12; that its loader does so on 1 MiB parts was not read.
    dual(_SMALL, "dual", (1 * MIB,), (_DB1M, 1), bank2_code=12, confirmed=False),
)
_F76_LAYOUTS = (
    Layout("single", (BankSpec(_LARGE),), (1 * MIB, 2 * MIB), (_NDBANK, 1)),
    dual(_SMALL, "dual", (2 * MIB,), (_NDBANK, 0), bank2_code=12),
    # Not confirmed: as for the F42x with 1 MiB.
    dual(_SMALL, "dual", (1 * MIB,), (_NDBANK, 0), bank2_code=12, confirmed=False),
)

_JITTER = "At 115200 baud the measured rate may be up to 5 % off: reset and try again, or use 57600."

F4 = replace(
    BASE,
    family="F4",
    flash_size_register=0x1FFF7A22,
    uid_address=0x1FFF7A10,
    layouts=(Layout("single", (BankSpec(_SMALL),)),),
    loader_id_address=0x1FFF76DE,
    mass_erase_max_s=32.0,
    write_ack_max_s=2.0,
    activation_pattern="1",  # BOOT1 is a pin (PB2) and no option byte tells
    system_memory=span("1FFF0000-1FFF77FF"),
    option_bytes=spans("1FFFC000-1FFFC00F"),
    otp=span("1FFF7800-1FFF7A0F"),
    ram=spans("20000000-2005FFFF 10000000-1000FFFF"),
    provenance=cite(BASE, read("uid_address", "RM0090, device electronic signature")),
)
F2 = replace(F4, family="F2")
_F4_TWO_BANKS = replace(
    F4,
    layouts=_F4_DUAL,
    mass_erase_max_s=64.0,  # the data sheet's 32 s is for 1 MiB; whether both banks erase at once was not read
    option_bytes=spans("1FFFC000-1FFFC00F 1FFEC000-1FFEC00F"),
    activation_pattern="5",
    bank_choice=_BFB2,
    usart_pins=pins("1:PA9/PA10 3:PB10/PB11,PC10/PC11"),
    provenance=cite(
        F4,
        agreed(
            "layouts", "public tables; option byte DB1M as in RM0090 and uVision's option byte file; 1 MiB dual bank unsure"
        ),
    ),
)
F7 = replace(
    BASE,
    family="F7",
    layouts=_F7_SINGLE,
    write_align_bytes=8,
    loader_id_address=0x1FF0EDBE,
    mass_erase_max_s=32.0,
    write_ack_max_s=2.0,
    first_baud=57600,
    activation_pattern="8",
    entry_checks=(_F7_PIN,),
    app_checks=(_F7_APP,),
    usart_pins=pins("1:PA9/PA10 3:PB10/PB11,PC10/PC11"),
    system_memory=span("1FF00000-1FF0EDBF"),
    option_bytes=spans("1FFF0000-1FFF001F"),
    ram=spans("20000000-2007FFFF 00000000-00003FFF"),
    provenance=cite(
        BASE,
        unsure("flash_word_bytes", "the loader programs bytes; embassy says 16; aligned 256-byte blocks avoid the question"),
        agreed("entry_checks app_checks", f"{AN2606} table 2 for the values, several users' dumps for the addresses"),
        agreed("boot0_pin_obeyed", "several users' dumps of factory option words: 0xFF7F0080 and 0xFFBF0040"),
        read("first_baud max_baud", f"{AN2606}, limitations of the F7 loaders; {AN3155}"),
    ),
)
CHIPS = (
    replace(
        F2,
        pid=0x411,
        names=("F205", "F207", "F215", "F217"),
        flash_max_bytes=1 * MIB,
        loader_id_address=0x1FFF77DE,
        loader_ids=ids("20 33"),
        usart_protocol="3.0",  # 3.1 from loader V3 on
        startup_s=(0.0846, 0.134),  # V3.x, V2.x
        ram=spans("20000000-2001FFFF"),
        stub_ram=spans("20002000-2001FFFF"),
        usart_pins=pins("1:PA9/PA10 3:PB10/PB11,PC10/PC11"),
        quirks=(
            quirk(
                Quirk.NO_NACK_ON_BAD_ADDRESS,
                "Loader V2: a refused address gets no NACK; the next two bytes are taken as a command.",
                "20",
            ),
        ),
    ),
    # --- F4; Go leaves AHB1ENR at 0 on these (CCM RAM off), one more reason to start the application by a reset
    replace(
        F4,
        pid=0x413,
        names=("F405", "F407", "F415", "F417"),
        flash_max_bytes=1 * MIB,
        loader_id_address=0x1FFF77DE,
        loader_ids=ids("31 90 91"),
        startup_s=(0.0846, 0.096),  # V3.x and V9.x, V9.x without a crystal
        stub_ram=spans("20003000-2001FFFF"),  # V3.x from 20002000
        usart_pins=pins("1:PA9/PA10 3:PB10/PB11,PC10/PC11"),
        quirks=(
            quirk(
                Quirk.NO_NACK_ON_BAD_ADDRESS,
                "Loader V3.0: a refused address gets no NACK; the next two bytes are taken as a command.",
                "30",
            ),
            quirk(Quirk.TWO_NACKS, "Loader V3.1: two NACKs to Read, Write and Go under readout protection.", "31"),
        ),
    ),
    replace(
        _F4_TWO_BANKS,
        pid=0x419,
        names=("F427", "F429", "F437", "F439"),
        flash_max_bytes=2 * MIB,
        loader_ids=ids("70 90 91"),
        startup_s=(0.082, 0.097),  # V7.x and V9.x, without a crystal
        stub_ram=spans("20003000-2002FFFF"),
    ),
    replace(
        F4,
        pid=0x423,
        names=("F401xB/C",),
        flash_max_bytes=256 * KIB,
        loader_ids=ids("D1"),
        startup_s=(0.0745, 0.085),
        stub_ram=spans("20003000-2000FFFF"),
        usart_pins=pins("1:PA9/PA10 2:PD5/PD6"),
    ),
    replace(
        F4,
        pid=0x433,
        names=("F401xD/E",),
        flash_max_bytes=512 * KIB,
        loader_ids=ids("D1"),
        startup_s=(0.0745, 0.085),
        stub_ram=spans("20003000-20017FFF"),
        usart_pins=pins("1:PA9/PA10 2:PD5/PD6"),
    ),
    replace(
        F4,
        pid=0x458,
        names=("F410",),
        flash_max_bytes=128 * KIB,
        loader_ids=ids("B1"),
        startup_s=(0.000614,),
        stub_ram=spans("20003000-20007FFF"),
        usart_pins=pins("1:PA9/PA10 2:PA2/PA3"),
    ),
    replace(
        F4,
        pid=0x431,
        names=("F411",),
        flash_max_bytes=512 * KIB,
        loader_ids=ids("D0"),
        startup_s=(0.0745, 0.085),
        stub_ram=spans("20003000-2001FFFF"),
        usart_pins=pins("1:PA9/PA10 2:PD5/PD6"),
    ),
    replace(
        F4,
        pid=0x441,
        names=("F412",),
        flash_max_bytes=1 * MIB,  # OpenOCD says 512 KiB, the other tables and the F412xG 1 MiB
        loader_ids=ids("90 91"),  # tables 226 and 3
        startup_s=(0.000614, 0.180),
        stub_ram=spans("20003000-2003FFFF"),
        usart_pins=pins("1:PA9/PA10 2:PD5/PD6 3:PB10/PB11"),
    ),
    replace(
        F4,
        pid=0x421,
        names=("F446",),
        flash_max_bytes=512 * KIB,
        loader_ids=ids("90"),
        startup_s=(0.0736, 0.096),
        stub_ram=spans("20003000-2001FFFF"),
        usart_pins=pins("1:PA9/PA10 3:PB10/PB11,PC10/PC11"),
    ),
    replace(
        _F4_TWO_BANKS,
        pid=0x434,
        names=("F469", "F479"),
        flash_max_bytes=2 * MIB,
        loader_ids=ids("90"),
        startup_s=(0.0737, 0.230),
        stub_ram=spans("20003000-2005FFFF"),
    ),
    replace(
        F4,
        pid=0x463,
        names=("F413", "F423"),
        flash_max_bytes=1536 * KIB,
        mass_erase_max_s=48.0,
        loader_ids=ids("90"),
        startup_s=(0.000642, 0.165),
        stub_ram=spans("20003000-2004FFFF"),
        usart_pins=pins("1:PA9/PA10 2:PD5/PD6 3:PB10/PB11"),
    ),
    # --- F7
    replace(
        F7,
        pid=0x452,
        names=("F722", "F723", "F730", "F732", "F733"),
        flash_max_bytes=512 * KIB,
        flash_size_register=0x1FF07A22,
        uid_address=0x1FF07A10,
        layouts=(Layout("single", (BankSpec(_SMALL),)),),
        loader_ids=ids("90"),
        startup_s=(0.0179, 0.05),
        otp=span("1FF07800-1FF07A0F"),
        stub_ram=spans("20004000-2003FFFF"),
        quirks=(quirk(Quirk.RATE_JITTER, _JITTER, "90"),),
        provenance=cite(F7, agreed("flash_size_register", "OpenOCD and stlink; stm32loader's family default is wrong here")),
    ),
    replace(
        F7,
        pid=0x449,
        names=("F745", "F746", "F750", "F756"),
        flash_max_bytes=1 * MIB,
        flash_size_register=0x1FF0F442,
        uid_address=0x1FF0F420,
        loader_ids=ids("70 90"),
        startup_s=(0.0166, 0.05),
        otp=span("1FF0F000-1FF0F41F"),
        stub_ram=spans("20004000-2004FFFF"),
        quirks=(quirk(Quirk.RATE_JITTER, _JITTER, "70 90"),),
        provenance=cite(F7, agreed("uid_address", "reference manual and public tables")),
    ),
    replace(
        F7,
        pid=0x451,
        names=("F765", "F767", "F769", "F777", "F779"),
        flash_max_bytes=2 * MIB,
        flash_size_register=0x1FF0F442,
        uid_address=0x1FF0F420,
        layouts=_F76_LAYOUTS,
        mass_erase_max_s=64.0,
        loader_ids=ids("93"),
        startup_s=(0.0179, 0.05),
        activation_pattern="9",
        # V9.3 with nDBANK and nDBOOT both 0 looks at BOOT_ADD0 only, whatever the pin; nDBOOT 1 is asked for in any case.
        entry_checks=(
            _F7_PIN,
            EntryCheck(_NDBOOT, frozenset({1}), "in dual-bank boot mode the BOOT0 pin may be ignored (nDBOOT is 0)"),
        ),
        otp=span("1FF0F000-1FF0F41F"),
        stub_ram=spans("20004000-2007FFFF"),
        quirks=(quirk(Quirk.RATE_JITTER, _JITTER, "93"),),
        provenance=cite(
            F7,
            unsure("startup_s", "not given for this part; taken from the F72x"),
            agreed("layouts", "public tables; nDBANK as public code reads it; 1 MiB with nDBANK=0 unsure"),
            memory("mass_erase_max_s", "twice the figure for 1 MiB; whether both banks erase at once was not read"),
            agreed("uid_address", "reference manual and public tables"),
        ),
    ),
)
