"""The memories of a simulated STM32: flash with its programming rules, option bytes, RAM, system memory, unique id.

It knows addresses and silicon rules, and nothing of commands, time or wires. Sources: the families' reference manuals as
far as remembered, AN2606 table 7 for the alignment that each loader demands, and the rows of ``bridged.chips``.

Invariants: flash changes only through ``program``, ``erase`` and the ``interrupt_*`` pair; nothing here ever makes a wrong
host look right (a write that silicon would not do leaves the cells as they are, without telling).
"""

from __future__ import annotations

import bisect
import random
from enum import Enum

from bridged.chips.model import Chip, FlashMap, Layout, OptionField, Range, Sector


class BusFault(Exception):
    """The loader touched memory that is not there: it hangs in its fault handler."""


class TornWord(BusFault):
    """It read a word of ECC flash that a power cut has torn: two bits are wrong, which raises an NMI."""


class Rule(Enum):
    """What happens to a word that was programmed before."""

    CLEARS_BITS = 1  # F2, F4, F7: the result is old AND new
    NEEDS_BLANK = 2  # F0, F1, F3, L0, L1, L4, G0, G4 ...: refused unless the word is erased (or, with 0xFF erased, new is 0)
    ONCE = 3  # H5, H7, U5 ...: ECC is written with the word, also with a word of 0xFF; a second write breaks it


_CLEARS_BITS = {"F2", "F4", "F7"}
_ONCE = {"H5", "H7", "U3", "U5", "C5", "WBA"}

# AN2606 table 7: address and length of a Write Memory must be multiples of this, or it and all later ones fail.
_ALIGN_BYTES = {
    **dict.fromkeys(("F0", "F1", "F2", "F3", "F4", "G0", "WB0", "WL3"), 4),
    **dict.fromkeys(("C0", "F7", "G4", "H7", "L0", "L1", "L4", "U0", "U3", "WB", "WL"), 8),
    **dict.fromkeys(("C5", "H5", "H7R", "H7RS", "H7R/S", "L5", "U5", "WBA"), 16),
}

# Where the level of readout protection sits in the option bytes, from their base, and the value of level 0 (RM0091 and RM0313
# for F0 and F3, PM0075 for F1, RM0090 for F4).
_RDP = {
    "F1": (0, 0xA5),
    **dict.fromkeys(("F2", "F4", "F7"), (1, 0xAA)),
    **dict.fromkeys(("F0", "F3", "L0", "L1", "L4", "L5", "G0", "G4", "C0", "U0", "WB", "WL"), (0, 0xAA)),
}
_RDP_LEVEL_2 = 0xCC
_NO_LEVEL_2 = {"F1"}

# How option bytes are stored: (stride, bytes of a value), with its complement right after it. The flash controller computes
# the complement when they are written, whatever the host sent.
_STORED = {
    **dict.fromkeys(("F0", "F1", "F3"), (2, 1)),
    **dict.fromkeys(("F4", "F7"), (8, 2)),
    **dict.fromkeys(("G0", "G4", "C0", "L4"), (8, 4)),
}

# Factory content where it is known: offset from the base, value. What is not listed is all ones.
_FACTORY_WORDS: dict[str, dict[int, int]] = {
    "F1": {0: 0xA5},
    "F0": {0: 0xAA},
    "F3": {0: 0xAA},
    "F4": {0: 0xAAEF},
    "F7": {0: 0xAAFF},
    "C0": {0: 0x3FFFFEAA, 0x10: 0xFFFFFE00, 0x18: 0xFF80FFFF, 0x20: 0xFF80FFFF, 0x30: 0xFFFFFE00, 0x70: 0xFFFEFF80},
    "G0": {0: 0x3FFFFEAA, 0x10: 0xFFFFFE00, 0x18: 0xFF80FFFF, 0x20: 0xFF80FFFF, 0x30: 0xFFFFFE00, 0x70: 0xFFFEFF80},
    "G4": {0: 0xFFEFF8AA, 0x10: 0x00FF0000, 0x18: 0xFF00FFFF, 0x20: 0xFF00FFFF, 0x28: 0xFF00FF00},
    "L4": {0: 0xFFEFF8AA},
}
_SPRMOD = {0x419, 0x421, 0x423, 0x431, 0x433, 0x434, 0x441, 0x458, 0x463}  # F4 parts in which bit 15 of nWRP means PCROP

# Factory values of the bits that decide what starts (AN2606; the reference manuals as remembered). G0 ignores the pin!
_FACTORY = {
    "nboot0": 1,
    "nboot1": 1,
    "nbootsel": 1,
    "nswboot0": 1,
    "bootlock": 0,
    "tzen": 0,
    "bootsel": 1,
    "boot0": 0,
    "ndbank": 1,
    "ndboot": 1,
    "bfb2": 0,
    "productstate": 0xED,
}
_FACTORY_PATTERN = {
    8: {"bootadd0": 0x0080, "bootadd1": 0x0040},
    9: {"bootadd0": 0x0080, "bootadd1": 0x0040},
    10: {"bootadd0": 0x0800, "bootadd1": 0x1FF0},
}


def option_key(name: str) -> str:
    """One spelling for ``nBOOT0_SEL``, ``nBOOT_SEL``, ``BOOT_CM7_ADD0``, ``NSBOOTADD0`` and the like."""
    key = name.lower().replace("_", "").replace("-", "").replace("cm7", "")
    return {"nboot0sel": "nbootsel"}.get(key, key)


def _single(option: OptionField) -> list[OptionField]:
    """The fields of a combined one such as ``nBOOT0:nBOOT1``: one bit each, most significant first."""
    names = option.name.split(":")
    if len(names) == 1:
        return [option]
    bits = [bit for bit in reversed(range(32)) if option.mask >> bit & 1]
    return [
        OptionField(name, option.address, option.shift + bit, 1, option.confidence)
        for name, bit in zip(names, bits, strict=True)
    ]


def pattern_number(chip: Chip) -> int:
    """The first number of the row's activation pattern; 0 where there is none."""
    digits = ""
    for char in chip.activation_pattern:
        if char.isdigit():
            digits += char
        elif digits:
            break
    return int(digits or 0)


class Memory:
    """All that can be read or written of one part. Made once for each simulated device; survives resets."""

    def __init__(
        self, chip: Chip, flash_map: FlashMap, loader_id: int | None, rng: random.Random, *, ecc_faults: bool = False
    ) -> None:
        """``ecc_faults``: on parts with ECC a word that was at work when the power went cannot be read until its sector is
        erased."""
        self.chip = chip
        self.ecc_faults = ecc_faults and chip.ecc
        self.torn: set[int] = set()  # addresses of such words
        self.map = flash_map
        self.base = flash_map.base
        self.end = max(s.end for s in flash_map.sectors)
        self.erased = chip.erased_value
        self.flash = bytearray([self.erased]) * (self.end - self.base)
        self.word_bytes = chip.flash_word_bytes
        self.align_bytes = _ALIGN_BYTES.get(chip.family, chip.write_align_bytes)
        if chip.family in _CLEARS_BITS:
            self.rule = Rule.CLEARS_BITS
        elif chip.family in _ONCE:
            self.rule = Rule.ONCE
        else:
            self.rule = Rule.NEEDS_BLANK
        self.sectors = {s.code: s for s in flash_map.sectors}
        self._order = sorted(flash_map.sectors, key=lambda s: s.address)
        self._starts = [s.address for s in self._order]
        self._contiguous = all(a.end == b.address for a, b in zip(self._order, self._order[1:], strict=False))
        self.protected: set[int] = set()  # sectors that the controller protects since the option bytes were loaded last
        self._listed: set[int] = set()  # the same by Write Protect, where no option byte is known for it
        self.marginal: set[int] = set()  # sectors whose last erase was cut short: whatever they read, they are not erased
        self.used = bytearray((self.end - self.base) // self.word_bytes) if self.rule is Rule.ONCE else bytearray()
        self.program_error = False  # sticky until reset: after one bad write nothing is programmed any more
        self.rdp = self._stored_rdp = 0
        self._rng = rng
        self.uid = bytes(rng.randrange(256) for _ in range(12))
        ram = chip.ram or chip.stub_ram
        self._ram = [(r, bytearray(r.size)) for r in ram]
        self._options = [(r, bytearray(b"\xff") * r.size) for r in chip.option_bytes]
        self._loaded = [(r, bytes(content)) for r, content in self._options]
        self._fields: dict[str, OptionField] = {}
        self._values: dict[str, int] = {}
        self._rom: dict[int, int] = {}
        self._readable = [r for r in (chip.system_memory, chip.otp) if r is not None]
        self._place_identity(loader_id)
        self._place_options()

    # --- identity and option bytes --------------------------------------------------------------------------------

    def _place_identity(self, loader_id: int | None) -> None:
        if loader_id is not None and self.chip.loader_id_address is not None:
            # One byte nearly everywhere; C09x and C5 have ids of two (AN2606), of which the low one is read first.
            for i, byte in enumerate(loader_id.to_bytes(2 if loader_id > 0xFF else 1, "little")):
                self._rom[self.chip.loader_id_address + i] = byte
                self._also_readable(self.chip.loader_id_address + i)
        if self.chip.uid_address is not None:
            self._rom.update((self.chip.uid_address + i, b) for i, b in enumerate(self.uid))
            self._also_readable(self.chip.uid_address)
        if self.chip.flash_size_register is not None:
            kib = self.map.size_bytes // 1024
            code = next((code for code, stands_for in self.chip.flash_size_codes if stands_for == kib), kib)
            size = (code | 0xFFFF & ~self.chip.flash_size_mask).to_bytes(2, "little")
            self._rom.update((self.chip.flash_size_register + i, b) for i, b in enumerate(size))
            self._also_readable(self.chip.flash_size_register)

    def _also_readable(self, address: int) -> None:
        if not any(address in r for r in self._readable):
            start = address & ~0xFF
            self._readable.append(Range(start, start + 0x100))

    def _place_options(self) -> None:
        self._values = {**_FACTORY, **_FACTORY_PATTERN.get(pattern_number(self.chip), {})}
        for check in self.chip.entry_checks:
            values = (self._part(check.option, bit, min(check.values)) for bit in range(check.option.name.count(":") + 1))
            for spot, value in zip(_single(check.option), values, strict=True):
                self._place_option(spot, value)
        for check_app in self.chip.app_checks:
            for spot in _single(check_app.option):
                self._place_option(spot, None)
        if self.chip.bank_choice is not None:
            self._place_option(self.chip.bank_choice, None)
        for layout in self.chip.layouts:
            if layout.when is not None and layout.name == self.map.layout and layout in self._possible():
                self._place_option(*layout.when, always=True)
        if self._options:
            for offset, word in _FACTORY_WORDS.get(self.chip.family, {}).items():
                self._put_factory(offset, word)
        for name in [key for key in self._fields if key in self._values]:
            self.set_option(name, self._values[name])
        self.set_rdp(0)

    def _put_factory(self, offset: int, word: int) -> None:
        content = self._options[0][1]
        _, size = _STORED[self.chip.family]
        if offset + size <= len(content):
            content[offset : offset + size] = word.to_bytes(size, "little")
        if self.chip.family == "F4" and self.chip.pid in _SPRMOD:
            content[9] = 0x3F

    def _possible(self) -> tuple[Layout, ...]:
        return self.chip.layouts_for(self.map.size_bytes)

    def _part(self, whole: OptionField, number: int, value: int) -> int:
        """The ``number``-th single field of a combined one, most significant first, out of ``value``."""
        single = _single(whole)[number]
        return value >> (single.shift - whole.shift) & single.mask

    def _place_option(self, spot: OptionField, value: int | None, always: bool = False) -> None:
        """Give an option bit its place, with its factory value where that is known, else ``value``."""
        key = self._key(spot.name)
        if key not in self._fields and not any(spot.address in r for r, _ in self._options):
            # A register rather than option bytes: the loader maps it where the row says.
            self._rom.update((spot.address + i, 0xFF) for i in range(4) if spot.address + i not in self._rom)
            self._also_readable(spot.address)
        self._fields[key] = spot
        wanted = value if always else self._values.get(key, value)
        if wanted is not None:
            self.set_option(key, wanted)

    def _key(self, name: str) -> str:
        key = option_key(name)
        # F0 calls the bit BOOT_SEL that others call nSWBOOT0.
        return "nswboot0" if key == "bootsel" and self.chip.family == "F0" else key

    def _store_rdp(self, level: int) -> None:
        place = _RDP.get(self.chip.family)
        if place is None or not self._options:
            return
        offset, level_0 = place
        self._options[0][1][offset] = {0: level_0, 1: 0x00, 2: _RDP_LEVEL_2}[level]
        self._complete()

    def _complete(self) -> None:
        """The complements of all values; F4 shows a word twice."""
        if self.chip.family not in _STORED or not self._options:
            return
        stride, size = _STORED[self.chip.family]
        for _, content in self._options:
            for at in range(0, len(content) - 2 * size + 1, stride):
                content[at + size : at + 2 * size] = bytes(b ^ 0xFF for b in content[at : at + size])
                if self.chip.family == "F4":
                    content[at + 4 : at + 8] = content[at : at + 4]

    def set_rdp(self, level: int) -> None:
        """Stored and in force."""
        self.store_rdp(level)
        self.load_options()
        self.rdp = level

    def store_rdp(self, level: int) -> None:
        """In force after the next load."""
        self._stored_rdp = level
        self._store_rdp(level)

    def load_options(self) -> None:
        """What is stored comes into force: at power-on, and by the reset after a change where the loader launches it."""
        self._loaded = [(r, bytes(content)) for r, content in self._options]
        place = _RDP.get(self.chip.family)
        if place is not None and self._options:
            now = self._options[0][1][place[0]]
            level_2 = now == _RDP_LEVEL_2 and self.chip.family not in _NO_LEVEL_2
            self._stored_rdp = 0 if now == place[1] else 2 if level_2 else 1
        self.rdp = self._stored_rdp
        self.protected = self._write_protected() | self._listed

    # --- write protection -----------------------------------------------------------------------------------------

    def _write_protected(self) -> set[int]:
        """Sectors that the option bytes protect, PCROP included; as the manuals of these families have it."""
        if not self._options:
            return set()
        content = self._options[0][1]
        family, codes = self.chip.family, sorted(self.sectors)
        if family in ("F0", "F1", "F3"):
            bits = sum(content[8 + 2 * n] << 8 * n for n in range(4))
            groups = {c: min((self.sectors[c].address - self.base) // 4096, 31) for c in codes}
            return {c for c in codes if not bits >> groups[c] & 1}
        if family in ("F4", "F7"):
            word = int.from_bytes(content[8:10], "little")
            if family == "F4" and self.chip.pid in _SPRMOD and word >> 15:
                return {c for c in codes if c < 12 and word >> c & 1}
            return {c for c in codes if c < 12 and not word >> c & 1}
        if family in ("C0", "G0") and len(content) >= 0x38:
            found: set[int] = set()
            for at in (0x18, 0x20):
                word = int.from_bytes(content[at : at + 4], "little")
                found |= set(range(word & 0x7F, (word >> 16 & 0x7F) + 1))
            for first, last in ((0x08, 0x10), (0x28, 0x30)):
                start, end = (int.from_bytes(content[at : at + 2], "little") & 0x1FF for at in (first, last))
                found |= {unit // 4 for unit in range(start, end + 1)}
            return found & set(codes)
        return set()

    def protect(self, codes: set[int]) -> None:
        """Write Protect: replaces the former set, in force after the next load. Empty: Write Unprotect."""
        family = self.chip.family
        if self._options and family in ("F4", "F7"):
            word = 0xFFFF
            for code in codes:
                word &= ~(1 << code) if code < 12 else 0xFFFF
            old = int.from_bytes(self._options[0][1][8:10], "little")
            self._options[0][1][8:10] = (old & 0xF000 | word & 0x0FFF).to_bytes(2, "little")
            self._listed = {code for code in codes if code >= 12}
        else:
            self._listed = set(codes)
            if not codes and self._options and family in ("F0", "F1", "F3"):
                for n in range(4):
                    self._options[0][1][8 + 2 * n] = 0xFF
            elif not codes and self._options and family in ("C0", "G0"):
                for at in (0x18, 0x20):
                    self._options[0][1][at : at + 4] = (0xFF80FFFF).to_bytes(4, "little")
        self._complete()

    def option(self, name: str) -> int:
        """Value of a named option bit or word; where no address is known for it, what was set or the factory value."""
        key = self._key(name)
        if key in self._fields:
            spot = self._fields[key]
            for area, content in self._loaded:
                if area.covers(spot.address, spot.address + 4):
                    return spot.value(int.from_bytes(content[spot.address - area.start :][:4], "little"))
            return spot.value(int.from_bytes(self._raw(spot.address, 4), "little"))
        if key not in self._values:
            raise KeyError(name)
        return self._values[key]

    def set_option(self, name: str, value: int) -> None:
        key = self._key(name)
        if key not in self._fields and key not in self._values:
            raise KeyError(name)
        self._values[key] = value
        spot = self._fields.get(key)
        if spot is not None:
            word = int.from_bytes(self._raw(spot.address, 4), "little")
            word = word & ~(spot.mask << spot.shift) | (value & spot.mask) << spot.shift
            self._poke(spot.address, word.to_bytes(4, "little"))
            self._complete()
            self._loaded = [(r, bytes(content)) for r, content in self._options]

    def __contains__(self, name: object) -> bool:
        """Whether there is an option of this name."""
        key = self._key(str(name))
        return key in self._fields or key in self._values

    def option_names(self) -> list[str]:
        return sorted({*self._fields, *self._values})

    def write_options(self, data: bytes) -> None:
        """All option bytes are erased, then ``data`` is written from their base; in force after the next load."""
        for spot, content in self._options:
            content[:] = b"\xff" * spot.size
        spot, content = self._options[0]
        content[: len(data)] = data[: spot.size]
        self._complete()

    def regress(self) -> None:
        """After the mass erase: level 0. F0, F1 and F3 erase all option bytes on the way (PM0075); the others keep the rest."""
        if self.chip.family in ("F0", "F1", "F3"):
            for spot, content in self._options:
                content[:] = b"\xff" * spot.size
            self._listed = set()
        self.store_rdp(0)

    def corrupt_options(self) -> None:
        """A reset in the middle of an option-byte write: erased, and not written again; the reset loads that."""
        for _, content in self._options:
            content[:] = b"\xff" * len(content)
        for key in self._values:
            if key.startswith("bootadd"):
                self._values[key] = 0xFFFF
        if self._options:
            self.load_options()

    @property
    def option_base(self) -> int | None:
        return self._options[0][0].start if self._options else None

    # --- plain access ---------------------------------------------------------------------------------------------

    def _raw(self, address: int, count: int) -> bytes:
        for spot, content in (*self._options, *self._ram):
            if spot.covers(address, address + count):
                return bytes(content[address - spot.start : address - spot.start + count])
        return bytes(self._rom.get(a, 0xFF) for a in range(address, address + count))

    def _poke(self, address: int, data: bytes) -> None:
        for spot, content in self._options:
            if address in spot:
                at = address - spot.start
                content[at : at + len(data)] = data[: spot.end - address]
                return
        self._rom.update((address + i, b) for i, b in enumerate(data))

    def in_flash(self, address: int) -> bool:
        if self._contiguous:
            return self.base <= address < self.end
        return self.sector_at(address) is not None

    def in_ram(self, address: int) -> bool:
        """RAM that the loader gives to the host; its own part is not."""
        return any(address in r for r in self.chip.stub_ram)

    def in_options(self, address: int) -> bool:
        return any(address in r for r, _ in self._options)

    def readable(self, address: int) -> bool:
        """Whether the loader accepts this start address for Read Memory. It checks the start only."""
        return (
            self.in_flash(address)
            or self.in_ram(address)
            or self.in_options(address)
            or any(address in r for r in self._readable)
        )

    def read(self, address: int, count: int) -> bytes:
        """Raises ``BusFault`` when flash or RAM ends within the range."""
        if self.base <= address < self.end:
            if address + count > self.end or not (self._contiguous or self.map.covers(address, address + count)):
                raise BusFault(f"read beyond flash at {address:#010x}")
            if self.torn and (torn := [a for a in self.torn if a < address + count and address < a + self.word_bytes]):
                raise TornWord(f"read of a torn word at {min(torn):#010x}")
            at = address - self.base
            return bytes(self.flash[at : at + count])
        for spot, content in self._ram:
            if address in spot:
                if address + count > spot.end:
                    raise BusFault(f"read beyond RAM at {address:#010x}")
                return bytes(content[address - spot.start : address - spot.start + count])
        return self._raw(address, count)

    def write_ram(self, address: int, data: bytes) -> None:
        for spot, content in self._ram:
            if address in spot:
                if address + len(data) > spot.end:
                    raise BusFault(f"write beyond RAM at {address:#010x}")
                content[address - spot.start : address - spot.start + len(data)] = data
                return
        raise BusFault(f"no RAM at {address:#010x}")

    def wipe_ram(self) -> None:
        for spot, content in self._ram:
            content[:] = bytes(spot.size)

    def load_flash(self, data: bytes) -> None:
        """Put content into flash as a factory would; what is missing at the end stays erased."""
        if len(data) > len(self.flash):
            raise ValueError(f"{len(data)} bytes do not fit into {len(self.flash)}")
        self.flash[:] = bytes([self.erased]) * len(self.flash)
        self.flash[: len(data)] = data
        self.torn.clear()
        if self.rule is Rule.ONCE:
            blank = bytes([self.erased]) * self.word_bytes
            words = (self.flash[at : at + self.word_bytes] != blank for at in range(0, len(self.flash), self.word_bytes))
            self.used[:] = bytes(words)

    # --- flash ----------------------------------------------------------------------------------------------------

    def sector_at(self, address: int) -> Sector | None:
        index = bisect.bisect_right(self._starts, address) - 1
        if index < 0:
            return None
        sector = self._order[index]
        return sector if address < sector.end else None

    def blank(self, start: int, end: int) -> bool:
        part = self.flash[start - self.base : end - self.base]
        return part.count(self.erased) == len(part)

    def program(self, address: int, data: bytes) -> None:
        """Program as the loader does: no error is told, the cells show what came of it."""
        end = address + len(data)
        if end > self.end or not (self._contiguous or self.map.covers(address, end)):
            raise BusFault(f"write beyond flash at {address:#010x}")
        if address % self.align_bytes or len(data) % self.align_bytes:
            self.program_error = True
        if self.program_error:
            return
        # Whole words: the loader fills up a partial one with the erased value.
        before, after = address % self.word_bytes, -end % self.word_bytes
        filler = bytes([self.erased])
        data = filler * before + data + filler * after
        address -= before
        at, size = address - self.base, len(data)
        first = self.sector_at(address)
        if not self.protected and self.rule is not Rule.ONCE:
            old = self.flash[at : at + size]
            if old.count(self.erased) == size:
                self.flash[at : at + size] = data
                return
        elif first is not None and first.code not in self.protected and address + size <= first.end:
            words = slice(at // self.word_bytes, (at + size) // self.word_bytes)
            if self.rule is Rule.ONCE and not any(self.used[words]) and self.blank(address, address + size):
                self.flash[at : at + size] = data
                self.used[words] = b"\x01" * (words.stop - words.start)
                return
        for offset in range(0, size, self.word_bytes):
            self._program_word(at + offset, data[offset : offset + self.word_bytes])
            if self.program_error:
                return

    def _program_word(self, at: int, new: bytes) -> None:
        size = self.word_bytes
        sector = self.sector_at(self.base + at)
        if sector is None or sector.code in self.protected:
            return
        old = self.flash[at : at + size]
        blank = old.count(self.erased) == size
        if self.rule is Rule.CLEARS_BITS:
            self.flash[at : at + size] = bytes(a & b for a, b in zip(old, new, strict=True))
        elif self.rule is Rule.NEEDS_BLANK:
            if blank:
                self.flash[at : at + size] = new
            elif self.erased and not any(new):
                self.flash[at : at + size] = new  # all zeros may always be written
            else:
                self.program_error = self.chip.ecc  # L4, G0, G4: the error flag also stops all that follows
        elif self.used[at // size]:
            # Data and ECC become the AND of the old and the new code word. Only equal data survives that; anything else
            # is "corrected" to something that was never written.
            if bytes(old) != new:
                self.flash[at : at + size] = bytes((a & b) ^ 0x01 for a, b in zip(old, new, strict=True))
        else:
            self.flash[at : at + size] = new
            self.used[at // size] = 1

    def interrupt_program(self, address: int, data: bytes, fraction: float) -> None:
        """Reset while a block is programmed: the words before are done, the one in work is undefined."""
        count = len(data) // self.word_bytes
        done = min(int(count * fraction), max(0, count - 1))
        size = self.word_bytes
        if self.program_error or done * size >= len(data):
            return
        if done:
            self.program(address, data[: done * size])
        word = data[done * size : (done + 1) * size]
        torn = bytes(b | self._rng.randrange(256) if self.erased else b & self._rng.randrange(256) for b in word)
        self.program(address + done * size, torn)
        if self.ecc_faults:
            self.torn.add(address + done * size)

    def erase(self, sector: Sector, *, all_the_same: bool = False) -> None:
        """Protected sectors are skipped in silence. ``all_the_same``: the regression of readout protection knows no others."""
        if sector.code in self.protected and not all_the_same:
            return
        self.flash[sector.address - self.base : sector.end - self.base] = bytes([self.erased]) * sector.size_bytes
        self._forget(sector)
        self.marginal.discard(sector.code)
        self.torn = {a for a in self.torn if not sector.address <= a < sector.end}

    def interrupt_erase(self, sector: Sector, fraction: float, *, all_the_same: bool = False) -> None:
        """Reset while a sector is erased: early on the old content is damaged, later it reads blank; it is neither."""
        if sector.code in self.protected and not all_the_same:
            return
        self.marginal.add(sector.code)
        part = slice(sector.address - self.base, sector.end - self.base)
        if fraction >= 0.7:
            self.flash[part] = bytes([self.erased]) * sector.size_bytes
        else:
            noise = int.from_bytes(self._rng.randbytes(sector.size_bytes), "little")
            old = int.from_bytes(self.flash[part], "little")
            mixed = old | noise if self.erased else old & noise
            self.flash[part] = mixed.to_bytes(sector.size_bytes, "little")
            if self.ecc_faults:
                self.torn.update(range(sector.address, sector.end, self.word_bytes))
        if self.rule is Rule.ONCE:
            words = slice(part.start // self.word_bytes, part.stop // self.word_bytes)
            self.used[words] = b"\x01" * (words.stop - words.start)

    def _forget(self, sector: Sector) -> None:
        if self.rule is Rule.ONCE:
            start = (sector.address - self.base) // self.word_bytes
            self.used[start : start + sector.size_bytes // self.word_bytes] = bytes(sector.size_bytes // self.word_bytes)
