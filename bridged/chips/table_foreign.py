"""Parts that answer at the same port but do not speak quite this protocol, or are not ST's: identified and read, never written.

``foreign`` says why. Most fields are unknown; what the rows carry comes from stm32loader, stm32flash and embassy. The product
ids of the GD32VW553 are four ASCII characters (command 0x06), hence 32 bits.
"""

from __future__ import annotations

from dataclasses import replace

from bridged.chips.model import Chip
from bridged.chips.rows import BASE, KIB, cite, ids, memory, pins, span, spans, uniform, unsure

_UNKNOWN = unsure(" ".join(sorted(BASE.provenance)), "not documented for this part; a harmless default")
_TABLES = "stm32loader and stm32flash"

FOREIGN = replace(
    BASE,
    layout_confirmed=False,
    mass_erase=False,
    mass_erase_max_s=60.0,
    erase_command=0x43,
    startup_s=(0.1, 0.6),
    boot0_pin_obeyed=False,
    provenance=cite(BASE, _UNKNOWN, unsure("pid family names foreign", _TABLES)),
)
_WB0 = replace(
    FOREIGN,
    family="WB0",
    flash_base=0x10040000,
    layouts=(uniform(2 * KIB, 0.02, 0.1),),
    parity="N",
    activation_pattern="18",  # PA10, the RX pin, high during reset: an idle line selects the loader
    usart_pins=pins("1:PA9/PA8"),
    ram=spans("20000000-2000FFFF"),
    foreign="another protocol family (AN4872, AN5471): no parity, Get ID answers three or four bytes, none of the commands "
    "0x44 0x63 0x73 0xA1 0x50; not supported",
    provenance=cite(
        FOREIGN,
        unsure("flash_base flash_max_bytes layouts parity activation_pattern", "stm32loader and embassy"),
        memory("usart_pins erase_command"),
    ),
)


def _gd32(pid: int) -> Chip:
    return replace(
        FOREIGN,
        pid=pid,
        family="GigaDevice",
        names=("GD32VW553",),
        layouts=(uniform(4 * KIB, 0.1, 1.0),),
        write_max_bytes=240,
        read_max_bytes=240,
        foreign="a GigaDevice RISC-V part: refuses Get ID and answers 0x06 with four characters; not supported",
        provenance=cite(FOREIGN, unsure("layouts write_max_bytes read_max_bytes", "stm32loader")),
    )


CHIPS = (
    replace(
        FOREIGN,
        pid=0x641,
        family="F1-like",
        names=("medium density PL",),
        flash_max_bytes=128 * KIB,
        layouts=(uniform(1 * KIB, 0.02, 0.04),),
        system_memory=span("1FFFF000-1FFFF7FF"),
        option_bytes=spans("1FFFF800-1FFFF80F"),
        ram=spans("20000000-20004FFF"),
        stub_ram=spans("20000200-20004FFF"),
        foreign="a clone or custom part that resembles a medium-density F1; ST does not document this product id",
    ),
    replace(
        FOREIGN,
        pid=0x9A8,
        family="STM32",
        names=("W with 128 KiB",),
        flash_max_bytes=128 * KIB,
        layouts=(uniform(1 * KIB, 0.02, 0.1),),
        system_memory=span("08040000-080407FF"),
        option_bytes=spans("08040800-0804080F"),
        ram=spans("20000000-20001FFF"),
        stub_ram=spans("20000200-20001FFF"),
        foreign="a discontinued radio part that AN2606 does not cover",
    ),
    replace(
        FOREIGN,
        pid=0x9B0,
        family="STM32",
        names=("W with 256 KiB",),
        flash_max_bytes=256 * KIB,
        layouts=(uniform(2 * KIB, 0.02, 0.1),),
        system_memory=span("08040000-080407FF"),
        option_bytes=spans("08040800-0804080F"),
        ram=spans("20000000-20003FFF"),
        stub_ram=spans("20000200-20003FFF"),
        foreign="a discontinued radio part that AN2606 does not cover",
    ),
    replace(_WB0, pid=0x3B, names=("WB05", "BlueNRG-LPS"), flash_max_bytes=192 * KIB),
    replace(_WB0, pid=0x3F, names=("WB06", "WB07", "BlueNRG-LP"), flash_max_bytes=256 * KIB),
    replace(_WB0, pid=0x06, names=("WB09",), flash_max_bytes=512 * KIB),
    replace(_WB0, pid=0x5F, family="WL3", names=("WL3x",)),
    replace(_WB0, pid=0x03, family="BlueNRG", names=("BlueNRG-1",), flash_max_bytes=160 * KIB),
    replace(_WB0, pid=0x2F, family="BlueNRG", names=("BlueNRG-2",), flash_max_bytes=256 * KIB),
    replace(
        FOREIGN,
        pid=0x801,
        family="Wiznet",
        names=("W7500",),
        foreign="a Wiznet part with a loader of its own; nothing of its flash is known here",
    ),
    *map(
        _gd32,
        sorted(ids("50494b36 504d4b36 50494836 504d4836 50494b37 504d4b37 50494837 504d4837")),
    ),
)
