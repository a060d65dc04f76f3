"""``docs/chips.md``: every part that is known, from the rows of ``bridged/chips``. ``tests.build_docs`` writes it."""

from __future__ import annotations

import re
from itertools import groupby

from bridged.chips import CHIPS
from bridged.chips.model import Chip, Confidence, Layout

LETTERS = {
    Confidence.READ: "R",
    Confidence.AGREED: "A",
    Confidence.MEMORY: "M",
    Confidence.UNSURE: "U",
    Confidence.SILICON: "S",
}
# Table 2 of AN2606, in words: when a reset leads into the loader. BOOT1 is a pin, other names are option bits.
PATTERNS = {
    "1": "BOOT0 high and the pin BOOT1 low",
    "2": "BOOT0 high and nBOOT1 = 1",
    "3, 4, 5": "as 1; with BFB2 also where neither bank has a valid stack pointer",
    "6": "BOOT0 high, nBOOT1 = 1, nSWBOOT0 = 1; or nBOOT0 = 0, nBOOT1 = 1, nSWBOOT0 = 0; or BOOT0 low and the flash empty",
    "7": "as 2; with BFB2 also where neither bank has a valid stack pointer",
    "8": "BOOT0 high and BOOT_ADD1 = 0x0040; or BOOT0 low and BOOT_ADD0 = 0x0040",
    "9": "as 8, where nDBANK = 1 or nDBOOT = 1; else where no bank can be started",
    "10": "BOOT0 high and BOOT_ADD1 = 0x1FF0; or BOOT0 low and BOOT_ADD0 = 0x1FF0",
    "11": "nBOOT1 = 1, BOOT_LOCK = 0, and BOOT0 high with nBOOT0_SEL = 0 (from the factory 1: the pin is ignored), or nBOOT0 = "
    "0 with nBOOT0_SEL = 1; or the flash empty",
    "12": "TZEN = 0, and the boot address that BOOT0 (or nBOOT0) chooses is the loader's",
    "13": "nBOOT1 = 1, and BOOT0 high with nSWBOOT0 = 1, or nBOOT0 = 0 with nSWBOOT0 = 0; or the flash empty",
    "14": "as 15; with BFB2 also where neither bank has a valid stack pointer",
    "15": "nBOOT1 = 1, BOOT_LOCK = 0, BOOT0 high, nSWBOOT0 = 1; or nBOOT0 = 0, nSWBOOT0 = 0",
    "16": "BOOT0 high, nBOOT1 = 1, nSWBOOT0 = 1; or nBOOT0 = 0, nBOOT1 = 1, nSWBOOT0 = 0",
    "17": "BOOT0 high while the product state is open",
    "18": "PA10 (the loader's RX) high during the reset",
    "19": "BOOTSEL = 1 and BOOT0 high; or BOOTSEL = 0 and the bit BOOT0 = 1; or the flash empty",
}
HEAD = """\
# Chips

<!-- Made from bridged/chips by: python -m tests.build_docs -->

{parts} product ids are known, every one of ST's AN2606 among them. {silicon}
Each fact has a source and says how sure it is; what is unsure is treated with care: longer waits, a first erase that is
looked at, or a refusal until the configuration says what is so. `bridged id TARGET` asks your chip. How to connect it:
[wiring](wiring.md); parts with a faster loader: [second stage](second-stage.md); option bytes that can be written:
[protection](protection.md); how to add a part: [extending](extending.md).

- **flash**: the largest of that product id, and how it is cut (sectors as the erase command counts them; several layouts where
  a size or an option bit decides). A layout with **?** is erased only when the configuration states it (`layout`, `flash_kib`).
- **in**: how the loader is entered, by the pattern of AN2606 ([below](#patterns)). *pin ignored*: with the option bytes from
  the factory. *empty*: a part with empty flash starts its loader by itself, which is no way back.
- **pins**: TX/RX of the loader's USARTs, as seen from the target; in italics where they are not known.
- **ready**: from reset until the loader listens; a second time where it takes longer without a crystal.
- **baud**: the rate that is tried first, and the fastest that is tried by itself.
- **sure**: how well layout, way in, pins and times to start are known, in this order. R: read in ST's document; A: several
  public tables agree; M: from memory; U: sources disagree or are silent; S: tried on silicon.
- **quirks**: what some loader versions do otherwise than their document says, [explained below](#quirks); bridged reads the
  version and acts by it.
"""
FOREIGN_TEXT = """\
Parts that answer at the same port and speak another protocol: they are identified and read, and what would erase, write or
protect them is refused (`UNSUPPORTED`), whatever the configuration states. A bootloader of their own in their flash
can be spoken to by [XMODEM](xmodem.md): the ROM loader has no part in that.
"""
SURE = ("layouts", "activation_pattern", "usart_pins", "startup_s")


def page() -> str:
    chips = sorted(CHIPS.values(), key=lambda chip: (bool(chip.foreign), chip.family, chip.pid))
    on_silicon = [chip for chip in chips if Confidence.SILICON in {note.confidence for note in chip.provenance.values()}]
    silicon = f"**Proven on silicon: {', '.join(f'`{chip.pid:#05x}`' for chip in on_silicon)}.**"
    if not on_silicon:
        silicon = "**Proven on silicon: none**; nothing here was tried on hardware by this project."
    out = [HEAD.format(parts=len(chips), silicon=silicon)]
    for family, rows in groupby((chip for chip in chips if not chip.foreign), key=lambda chip: chip.family):
        out.append(f"## STM32{family}\n")
        out.append("| product id | parts | flash | in | pins | ready | baud | sure | silicon | quirks |")
        out.append("|---|---|---|---|---|---|---|---|---|---|")
        out += [_row(chip) for chip in rows]
        out.append("")
    out += ["## Identified and refused\n", FOREIGN_TEXT, "| product id | parts | why |", "|---|---|---|"]
    for (names, why), rows in groupby((chip for chip in chips if chip.foreign), key=lambda chip: (chip.names, chip.foreign)):
        out.append(f"| {', '.join(f'`{chip.pid:#05x}`' for chip in rows)} | {', '.join(names)} | {why} |")
    out += ["", "## Patterns\n", "| pattern | a reset leads into the loader with |", "|---|---|"]
    out += [f"| {number} | {text} |" for number, text in PATTERNS.items()]
    out += ["", "A pattern with a question mark was not read but inferred from parts like it.", "", "## Quirks\n"]
    out += ["| quirk | parts | loader versions | what it is | source |", "|---|---|---|---|---|"]
    out += _quirks(chips)
    return "\n".join(out) + "\n"


def _row(chip: Chip) -> str:
    silicon = "yes" if Confidence.SILICON in {note.confidence for note in chip.provenance.values()} else "no"
    entry = f"{chip.activation_pattern or '?'}{'' if chip.boot0_pin_obeyed else ', pin ignored'}{', empty' * chip.empty_check}"
    ready = " or ".join(dict.fromkeys(_time(seconds) for seconds in chip.startup_s)) or "?"
    rates = f"{chip.first_baud}" + (f", {chip.max_baud}" if chip.max_baud != chip.first_baud else "")
    sure = "".join(LETTERS[chip.provenance[name].confidence] for name in SURE)
    quirks = ", ".join(dict.fromkeys(row.quirk.value for row in chip.quirks))
    cells = [f"`{chip.pid:#05x}`", ", ".join(chip.names), _flash(chip), entry, _pins(chip), ready, rates, sure, silicon, quirks]
    return "| " + " | ".join(cells) + " |"


def _time(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def _pins(chip: Chip) -> str:
    known: dict[int, list[str]] = {}
    for number, pair in chip.usart_pins:
        known.setdefault(number, []).extend([pair] if pair else [])
    return "; ".join(f"USART{number} {' '.join(pairs) or '*unknown*'}" for number, pairs in known.items()) or "*unknown*"


def _flash(chip: Chip) -> str:
    at = "" if chip.flash_base == 0x08000000 else f" at `{chip.flash_base:#010x}`"
    cuts = list(dict.fromkeys(_cut(layout, chip.layout_confirmed) for layout in chip.layouts))
    return f"{chip.flash_max_bytes // 1024} KiB{at}: {'; '.join(cuts) or '?'}"


def _cut(layout: Layout, chip_confirmed: bool) -> str:
    runs = [
        "+".join(f"{f'{run.count}x' if run.count else ''}{_kib(run.size_bytes)}" for run in bank.runs) for bank in layout.banks
    ]
    text = runs[0] if len(runs) == 1 else f"2 banks of {runs[0]}" if len(set(runs)) == 1 else " and ".join(runs)
    sizes = f" (of {'/'.join(_kib(size) for size in layout.sizes)})" if layout.sizes else ""
    return f"{text}{sizes}{'' if layout.confirmed and chip_confirmed else ' **?**'}"


def _kib(size: int) -> str:
    return f"{size // 1024}K" if size >= 1024 else f"{size}B"


def _quirks(chips: list[Chip]) -> list[str]:
    rows: dict[tuple[str, str, str, str], list[str]] = {}
    for chip in chips:
        for one in chip.quirks:
            versions = ", ".join(f"{value >> 4}.{value & 15}" for value in sorted(one.loader_ids)) or "all"
            rows.setdefault((one.quirk.value, versions, one.text, one.source), []).append(f"`{chip.pid:#05x}`")
    return [
        f"| {kind} | {', '.join(found)} | {versions} | {re.sub(r'[|]', ' ', text)} | {source} |"
        for (kind, versions, text, source), found in sorted(rows.items())
    ]
