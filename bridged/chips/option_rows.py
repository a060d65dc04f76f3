"""The option-byte layouts that can be cited, by product id. Nothing here was tried on silicon by this project.

A layout is written only where its whole block is known, lies in one piece that the loader takes in one Write Memory, and its
bits were read in ST's document or agree in several public sources; ``why_not`` says why others are shown only.

Sources: RM0091 rev 10, RM0313, RM0364, RM0365 and RM0366 (F0, F3), option byte description; PM0075 (F1), section 2.5; RM0090
rev 21 (F405 to F439), tables 15 to 17; the reference manuals of F401 and F446 as quoted in public code, and uVision's option
byte file of the F401; several users' dumps and headers of F74x; RM0490 rev 5 (C0), table 18; ST's open boot loader and public
headers (G0); public flashing code for L4 and G4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from bridged.chips.model import Chip, Confidence, Provenance, Range
from bridged.chips.options import Field, OptionLayout, Rdp, Storage, Wrp, WrpKind

_MODERN_RDP = Rdp(0xAA, 0xCC)


def _bits(address: int, text: str, *, settable: bool = True) -> tuple[Field, ...]:
    """``"BOR_LEV 2 3"``: name, lowest and highest bit; one bit where only one is given; several by comma."""
    made = []
    for part in text.split(","):
        name, low, *high = part.split()
        width = int(high[0]) - int(low) + 1 if high else 1
        made.append(Field(name, address, int(low), (1 << width) - 1, settable))
    return tuple(made)


# --- F0, F1, F3: 16 bytes, each value followed by its complement ----------------------------------------------------

_OLD = Range(0x1FFFF800, 0x1FFFF810)
_OLD_COMMON = (
    *_bits(_OLD.start, "RDP 0 7", settable=False),
    *_bits(0x1FFFF804, "Data0 0 7"),
    *_bits(0x1FFFF806, "Data1 0 7"),
    *(f for n in range(4) for f in _bits(0x1FFFF808 + 2 * n, f"WRP{n} 0 7")),
)
_GROUPS = Wrp(WrpKind.GROUPS, ("WRP0", "WRP1", "WRP2", "WRP3"))
_USER = 0x1FFFF802
_OLD_USER = "WDG_SW 0,nRST_STOP 1,nRST_STDBY 2"

_F0 = OptionLayout(
    "F0",
    Provenance("RM0091 rev 10, option bytes", Confidence.READ),
    _OLD,
    Storage.BYTES,
    (*_OLD_COMMON, *_bits(_USER, f"{_OLD_USER},nBOOT1 4,VDDA_MONITOR 5,RAM_PARITY_CHECK 6")),
    _MODERN_RDP,
    _GROUPS,
)
# F04x and F09x have two bits more (BOOT_SEL, nBOOT0), which are reserved in the F070 and F030 of the same product ids.
_F0_BOOT = replace(_F0, fields=(*_F0.fields, *_bits(_USER, "nBOOT0 3,BOOT_SEL 7")))
_F3 = replace(
    _F0,
    name="F3",
    source=Provenance("RM0313, RM0364, RM0365, RM0366, option byte description", Confidence.READ),
    fields=(*_OLD_COMMON, *_bits(_USER, f"{_OLD_USER},nBOOT1 4,VDDA_MONITOR 5,SRAM_PE 6")),
)
_F37 = replace(_F3, name="F37x", fields=(*_F3.fields, *_bits(_USER, "SDADC12_VDD_MONITOR 7")))
_F1 = OptionLayout(
    "F1",
    Provenance("PM0075, option byte description; the unit of write protection from memory", Confidence.READ),
    _OLD,
    Storage.BYTES,
    (*_OLD_COMMON, *_bits(_USER, _OLD_USER)),
    Rdp(0xA5, None),
    _GROUPS,
)

# --- F4: two values of 16 bits, 8 bytes apart -------------------------------------------------------------------------

_F4_BLOCK = Range(0x1FFFC000, 0x1FFFC010)
_F4_USER = (
    *_bits(0x1FFFC000, "RDP 8 15", settable=False),
    *_bits(0x1FFFC000, "BOR_LEV 2 3,WDG_SW 5,nRST_STOP 6,nRST_STDBY 7"),
)
_F40 = OptionLayout(
    "F405",
    Provenance("RM0090 rev 21, tables 15 and 16", Confidence.READ),
    _F4_BLOCK,
    Storage.HALF_WORDS,
    (*_F4_USER, *_bits(0x1FFFC008, "nWRP 0 11")),
    _MODERN_RDP,
    Wrp(WrpKind.SECTORS, ("nWRP",)),
)
_SPRMOD = _bits(0x1FFFC008, "SPRMOD 15", settable=False)
_F42 = replace(
    _F40,
    name="F42x",
    source=Provenance("RM0090 rev 21, tables 15 and 17", Confidence.READ),
    fields=(
        *_F40.fields,
        *_bits(0x1FFFC000, "BFB2 4", settable=False),
        *_bits(0x1FFFC008, "DB1M 14", settable=False),
        *_SPRMOD,
    ),
    wrp=Wrp(WrpKind.SECTORS, ("nWRP",), "SPRMOD"),
    why_not="they lie in two pieces, and what the loader does to the second one while it writes the first is not known",
)


def _f4(name: str, bits: str, source: str) -> OptionLayout:
    """One bank with PCROP; ``bits`` of write protection."""
    return replace(
        _F40,
        name=name,
        source=Provenance(source, Confidence.AGREED),
        fields=(*_F4_USER, *_bits(0x1FFFC008, f"nWRP {bits}"), *_SPRMOD),
        wrp=Wrp(WrpKind.SECTORS, ("nWRP",), "SPRMOD"),
    )


_F401_SOURCE = "uVision's option byte file of the F401, public code that quotes the reference manual"
_F401C = _f4("F401xB/C", "0 5", _F401_SOURCE)
_F401E = _f4("F401xD/E", "0 7", _F401_SOURCE)
_F446 = _f4("F446", "0 7", "public code that quotes table 9 of the reference manual")

# --- F7: four values of 16 bits ---------------------------------------------------------------------------------------

_F7_FIELDS = (
    *_bits(0x1FFF0000, "RDP 8 15", settable=False),
    *_bits(0x1FFF0000, "BOR_LEV 2 3,WWDG_SW 4,IWDG_SW 5,nRST_STOP 6,nRST_STDBY 7"),
    *_bits(0x1FFF0008, "IWDG_STDBY 14,IWDG_STOP 15"),
    *_bits(0x1FFF0010, "BOOT_ADD0 0 15"),
    *_bits(0x1FFF0018, "BOOT_ADD1 0 15"),
)
_F74 = OptionLayout(
    "F74x",
    Provenance("a public header with the option words and their factory values, several users' dumps", Confidence.AGREED),
    Range(0x1FFF0000, 0x1FFF0020),
    Storage.HALF_WORDS,
    (*_F7_FIELDS, *_bits(0x1FFF0008, "nWRP 0 7")),
    _MODERN_RDP,
    Wrp(WrpKind.SECTORS, ("nWRP",)),
)
_F76 = replace(
    _F74,
    name="F76x",
    source=Provenance("a public description of the F767's option words, nDBANK as public code reads it", Confidence.AGREED),
    # nDBANK changes the layout of the flash under the application, and nDBOOT the meaning of the pin.
    fields=(*_F7_FIELDS, *_bits(0x1FFF0008, "nWRP 0 11"), *_bits(0x1FFF0008, "nDBOOT 12,nDBANK 13", settable=False)),
)

# --- C0, G0, G4, L4: words of 32 bits, 8 bytes apart ------------------------------------------------------------------

_OPTR = 0x1FFF7800
_C0_BLOCK = Range(_OPTR, _OPTR + 0x80)
_G0_OPTR = (
    *_bits(_OPTR, "RDP 0 7", settable=False),
    *_bits(_OPTR, "BOR_EN 8,BORR_LEV 9 10,BORF_LEV 11 12,nRST_STOP 13,nRST_STDBY 14,nRST_SHDW 15"),
    *_bits(_OPTR, "IWDG_SW 16,IWDG_STOP 17,IWDG_STDBY 18,WWDG_SW 19,RAM_PARITY_CHECK 22"),
    *_bits(_OPTR, "nBOOT_SEL 24,nBOOT1 25,nBOOT0 26,NRST_MODE 27 28,IRHEN 29"),
    *_bits(0x1FFF7870, "BOOT_LOCK 16", settable=False),
)


def _pages(bits: int, *, settable: bool) -> tuple[Field, ...]:
    return tuple(
        Field(name, address, shift, (1 << bits) - 1, settable)
        for address, area in ((0x1FFF7818, "A"), (0x1FFF7820, "B"))
        for name, shift in ((f"WRP1{area}_STRT", 0), (f"WRP1{area}_END", 16))
    )


_AREAS = Wrp(WrpKind.AREAS, ("WRP1A_STRT", "WRP1A_END", "WRP1B_STRT", "WRP1B_END"))
_PCROP_FIELDS = tuple(
    Field(name, address, 0, 0x1FF, settable=False)
    for name, address in (
        ("PCROP1A_STRT", 0x1FFF7808),
        ("PCROP1A_END", 0x1FFF7810),
        ("PCROP1B_STRT", 0x1FFF7828),
        ("PCROP1B_END", 0x1FFF7830),
    )
)
_PCROP = (("PCROP1A_STRT", "PCROP1A_END"), ("PCROP1B_STRT", "PCROP1B_END"))
_C0 = OptionLayout(
    "C0",
    Provenance("RM0490 rev 5, table 18", Confidence.READ),
    _C0_BLOCK,
    Storage.WORDS,
    (*_G0_OPTR, *_pages(7, settable=True), *_PCROP_FIELDS),
    _MODERN_RDP,
    _AREAS,
    _PCROP,
)
# Public sources differ in whether a page number of the G0 has 6 or 7 bits: enough to show it, not to write it. PCROP likewise.
_G0 = replace(
    _C0,
    name="G0",
    source=Provenance("ST's open boot loader for the words, public headers for the bits", Confidence.AGREED),
    fields=(*_G0_OPTR, *_pages(6, settable=False)),
    pcrop=(),
)
_LATER = "the rest of the option bytes lies where this loader may not show it, and is not known well enough"
_G0_DUAL = replace(
    _G0, name="G0Bx", fields=(*_G0_OPTR, *_bits(_OPTR, "nSWAP_BANK 20,DUAL_BANK 21", settable=False)), wrp=None, why_not=_LATER
)
_G4 = OptionLayout(
    "G4",
    Provenance("public flashing code (a comment on the words of L4 and G4, masks of a debug probe)", Confidence.AGREED),
    Range(_OPTR, _OPTR + 0x30),
    Storage.WORDS,
    (*_bits(_OPTR, "RDP 0 7", settable=False), *_bits(0x1FFF7828, "BOOT_LOCK 16", settable=False)),
    _MODERN_RDP,
    why_not=_LATER,
)
_L4 = replace(_G4, name="L4", block=Range(_OPTR, _OPTR + 0x10), fields=_bits(_OPTR, "RDP 0 7", settable=False))

LAYOUTS: Mapping[int, OptionLayout] = {
    **dict.fromkeys((0x440, 0x444, 0x448), _F0),
    **dict.fromkeys((0x442, 0x445), _F0_BOOT),
    **dict.fromkeys((0x410, 0x412, 0x414, 0x418, 0x420, 0x428, 0x430), _F1),
    **dict.fromkeys((0x422, 0x438, 0x439, 0x446), _F3),
    0x432: _F37,
    0x413: _F40,
    0x419: _F42,
    0x423: _F401C,
    0x433: _F401E,
    0x421: _F446,
    0x449: _F74,
    0x451: _F76,
    **dict.fromkeys((0x443, 0x453, 0x44C, 0x493, 0x44D), _C0),
    **dict.fromkeys((0x456, 0x460, 0x466), _G0),
    0x467: _G0_DUAL,
    **dict.fromkeys((0x468, 0x469, 0x479), _G4),
    **dict.fromkeys((0x415, 0x435, 0x461, 0x462, 0x464), _L4),
}


def layout_of(chip: Chip) -> OptionLayout | None:
    """The layout of ``chip``, None where none can be cited."""
    return LAYOUTS.get(chip.pid)
