"""Option bytes: what the loader shows of them as named fields, and a block to write back. Pure; the layouts are data.

A layout says where the fields of a family lie in the block that the loader reads and writes, how the family stores the
complement of each value, and which fields a job may set. ``option_rows`` has the layouts, each with its document; a part
without one is shown as far as the rows of its table know single bits, and is never written.

Writing is read-merge-write of the whole block, because the loader erases all option bytes before it writes (AN3155). What must
never be written is refused here, by ``check``, however the new block came about: by a field, by raw bytes, or by a list of
sectors to protect. That is readout protection of level 2, BOOT_LOCK, TZEN and the product state, values after which BOOT0 high
does not lead into the loader, and any bit that no settable field of the layout owns.

A write-protected unit is told as sectors of the flash map. This module knows no wire, no job and no session.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from bridged.chips.model import Chip, FlashMap, OptionField, Provenance, Range, Sector, joined
from bridged.errors import BadRequest, NotAllowed, Unsupported

# Set to anything but these, on whatever part, by whatever way: for ever, or until somebody with a debugger comes.
NEVER: Mapping[str, frozenset[int] | None] = {
    "RDP": frozenset({2, 0xCC}),
    "BOOT_LOCK": None,
    "TZEN": None,
    "PRODUCT_STATE": None,
}
# With any other value NRST does not reset the part: 0 is reserved, and 2 makes a GPIO of it. Nobody could start the loader any
# more, nor find out what came of the write itself.
RESETS: Mapping[str, frozenset[int]] = {"NRST_MODE": frozenset({1, 3})}
GROUP_BYTES = 4096  # F0, F1, F3: one bit of write protection, whatever the page size.


class Storage(Enum):
    """How a family stores a value and its complement, which its flash controller computes: as (stride, value bytes)."""

    BYTES = (2, 1)  # F0, F1, F3: a byte, then its complement
    HALF_WORDS = (8, 2)  # F4, F7: two bytes, their complement, then four bytes that are not used
    WORDS = (8, 4)  # C0, G0, G4, L4: four bytes, then their complement

    @property
    def stride(self) -> int:
        return self.value[0]

    @property
    def size(self) -> int:
        return self.value[1]


@dataclass(frozen=True, slots=True)
class Field:
    """``mask`` before shifting, as in ``OptionField``; within one value. ``settable``: by a job that names it."""

    name: str
    address: int
    shift: int
    mask: int
    settable: bool = True


@dataclass(frozen=True, slots=True)
class Rdp:
    """Values of the RDP byte; anything else is level 1. ``level_2`` None: the family has none."""

    level_0: int
    level_2: int | None

    def level(self, value: int) -> int:
        return 0 if value == self.level_0 else 2 if value == self.level_2 else 1


class WrpKind(Enum):
    SECTORS = "sectors"  # a bit for each sector, from number 0 on; 0 protects
    GROUPS = "groups"  # a bit for each 4 KiB; 0 protects; the last of 32 is for all the rest
    AREAS = "areas"  # pairs of first and last page; first beyond last: none


@dataclass(frozen=True, slots=True)
class Wrp:
    """``fields``: lowest bits first, or (first, last, first, last). ``pcrop_mode``: a field; 1: the bits mean PCROP."""

    kind: WrpKind
    fields: tuple[str, ...]
    pcrop_mode: str = ""


@dataclass(frozen=True, slots=True)
class OptionLayout:
    """``why_not``: why its block may not be written; empty where it may. ``pcrop``: pairs of fields, first and last unit."""

    name: str
    source: Provenance
    block: Range
    storage: Storage
    fields: tuple[Field, ...]
    rdp: Rdp
    wrp: Wrp | None = None
    pcrop: tuple[tuple[str, str], ...] = ()
    why_not: str = ""

    def field(self, name: str) -> Field:
        """By its name in any case. Raises ``BadRequest`` naming those that there are."""
        for known in self.fields:
            if known.name.lower() == name.lower():
                return known
        settable = ", ".join(f.name for f in self.fields if f.settable) or "none"
        raise BadRequest(f"{self.name}: there is no option field {name[:40]!r}; there are: {settable}", field=name[:40])

    def get(self, block: bytes, name: str) -> int:
        spot = self.field(name)
        return _value(self, block, spot.address) >> spot.shift & spot.mask


@dataclass(frozen=True, slots=True)
class Decoded:
    """What a block says. ``level``: of readout protection. ``protected``, ``pcrop``: addresses, or None where not known.

    ``broken``: addresses of values whose stored complement is not theirs: a write that was cut off.
    """

    fields: dict[str, int]
    level: int | None
    protected: tuple[Range, ...] | None
    pcrop: tuple[Range, ...] | None
    broken: tuple[int, ...] = ()
    raw: dict[int, bytes] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; what is not known is left out."""
        out: dict[str, Any] = {"fields": {name: _shown(name, value) for name, value in self.fields.items()}}
        if self.level is not None:
            out["readout_protection"] = self.level
        for name, ranges in (("write_protected", self.protected), ("pcrop", self.pcrop)):
            if ranges is not None:
                out[name] = [f"{r.start:#010x}..{r.end - 1:#010x}" for r in ranges]
        if self.broken:
            out["broken"] = [f"{address:#010x}" for address in self.broken]
        out["raw"] = {f"{address:#010x}": data.hex() for address, data in self.raw.items()}
        return out


def _shown(name: str, value: int) -> str | int:
    return f"{value:#06x}" if name.startswith("BOOT_") and "ADD" in name else f"{value:#x}" if value > 9 else value


# --- reading --------------------------------------------------------------------------------------------------------


def _value(layout: OptionLayout, block: bytes, address: int) -> int:
    at = address - layout.block.start
    return int.from_bytes(block[at : at + layout.storage.size], "little")


def _values(layout: OptionLayout) -> list[int]:
    """Addresses of the values that some field of the layout lies in."""
    return sorted({f.address for f in layout.fields})


def known_fields(chip: Chip) -> list[OptionField]:
    """Single bits that the rows of the chip name, each once: those that decide about loader, application and layout."""
    found = [check.option for check in chip.entry_checks] + [check.option for check in chip.app_checks]
    found += [layout.when[0] for layout in chip.layouts if layout.when] + ([chip.bank_choice] if chip.bank_choice else [])
    single: list[OptionField] = []
    for option in found:
        names = option.name.split(":")
        if len(names) == 1:
            single.append(option)
            continue
        bits = [bit for bit in reversed(range(32)) if option.mask >> bit & 1]
        single += [
            OptionField(name, option.address, option.shift + bit, 1, option.confidence)
            for name, bit in zip(names, bits, strict=True)
        ]
    return list({option.name: option for option in single}.values())


def areas(chip: Chip, layout: OptionLayout | None) -> tuple[Range, ...]:
    """What is to be read for ``decode``: the block of the layout first."""
    return chip.option_bytes if layout is None else (layout.block, *(r for r in chip.option_bytes if r != layout.block))


def decode(chip: Chip, layout: OptionLayout | None, raw: Mapping[int, bytes], flash: FlashMap | None) -> Decoded:
    """``raw``: bytes by their address, as many areas as the loader showed. ``flash``: to tell sectors by address."""
    fields: dict[str, int] = {}
    block = raw.get(layout.block.start) if layout else None
    level: int | None = None
    protected: tuple[Range, ...] | None = None
    pcrop: tuple[Range, ...] | None = None
    broken: tuple[int, ...] = ()
    if layout is not None and block is not None and len(block) == layout.block.size:
        fields = {f.name: layout.get(block, f.name) for f in layout.fields}
        level = layout.rdp.level(fields["RDP"])
        broken = tuple(a for a in _values(layout) if _complement(layout, block, a) != _inverse(layout, block, a))
        if flash is not None:
            protected, pcrop = _protected(layout, block, flash), _pcrop(layout, block, flash)
    for option in known_fields(chip):
        word = word_at(raw, option.address)
        if option.name not in fields and word is not None:
            fields[option.name] = option.value(word)
    return Decoded(fields, level, protected, pcrop, broken, dict(raw))


def word_at(raw: Mapping[int, bytes], address: int) -> int | None:
    """32 bits at ``address``, None where they were not read."""
    for start, data in raw.items():
        if start <= address and address + 4 <= start + len(data):
            return int.from_bytes(data[address - start : address - start + 4], "little")
    return None


def _complement(layout: OptionLayout, block: bytes, address: int) -> bytes:
    at, size = address - layout.block.start, layout.storage.size
    return block[at + size : at + 2 * size]


def _inverse(layout: OptionLayout, block: bytes, address: int) -> bytes:
    at, size = address - layout.block.start, layout.storage.size
    return bytes(b ^ 0xFF for b in block[at : at + size])


def _bits(layout: OptionLayout, block: bytes) -> tuple[int, int]:
    """The bits of write protection as one number, and how many there are."""
    assert layout.wrp is not None
    value = at = 0
    for name in layout.wrp.fields:
        value |= layout.get(block, name) << at
        at += layout.field(name).mask.bit_length()
    return value, at


def _pcrop_mode(layout: OptionLayout, block: bytes) -> bool:
    mode = layout.wrp.pcrop_mode if layout.wrp else ""
    return bool(mode) and layout.get(block, mode) == 1


def _unit_sectors(layout: OptionLayout, flash: FlashMap) -> list[list[Sector]] | None:
    """Which sectors each bit, or each page number, of write protection stands for; None where that is not known."""
    if layout.wrp is None:
        return None
    if layout.wrp.kind is WrpKind.GROUPS:
        units: list[list[Sector]] = [[] for _ in range(32)]
        for sector in flash.sectors:
            units[min((sector.address - flash.base) // GROUP_BYTES, 31)].append(sector)
        return units
    # Only where sectors are counted through one bank is it certain which bit is which.
    if len({s.bank for s in flash.sectors}) > 1 or [s.code for s in flash.sectors] != list(range(len(flash.sectors))):
        return None
    return [[sector] for sector in flash.sectors]


def _protected(layout: OptionLayout, block: bytes, flash: FlashMap) -> tuple[Range, ...] | None:
    units = _unit_sectors(layout, flash)
    if units is None or layout.wrp is None:
        return None
    if _pcrop_mode(layout, block):
        return ()
    return joined(sector.range for unit in _active(layout, block, len(units)) for sector in units[unit])


def _active(layout: OptionLayout, block: bytes, count: int) -> list[int]:
    """Numbers of the units that are protected."""
    assert layout.wrp is not None
    if layout.wrp.kind is WrpKind.AREAS:
        edges = [layout.get(block, name) for name in layout.wrp.fields]
        pairs = zip(edges[::2], edges[1::2], strict=True)
        return sorted({unit for first, last in pairs for unit in range(first, last + 1) if unit < count})
    bits, width = _bits(layout, block)
    return [unit for unit in range(min(width, count)) if not bits >> unit & 1]


def _pcrop(layout: OptionLayout, block: bytes, flash: FlashMap) -> tuple[Range, ...] | None:
    """C0, G0: units of a quarter of a page; F4: the sectors whose bit is 1, in that mode."""
    if layout.wrp is not None and layout.wrp.pcrop_mode:
        units = _unit_sectors(layout, flash)
        if units is None or not _pcrop_mode(layout, block):
            return None if units is None else ()
        bits, width = _bits(layout, block)
        return joined(s.range for unit in range(min(width, len(units))) if bits >> unit & 1 for s in units[unit])
    if not layout.pcrop:
        return None
    unit_bytes = flash.sectors[0].size_bytes // 4
    found = []
    for first, last in layout.pcrop:
        start, end = layout.get(block, first), layout.get(block, last)
        if start <= end:
            found.append(Range(flash.base + start * unit_bytes, flash.base + (end + 1) * unit_bytes))
    return tuple(found)


# --- making a new block ---------------------------------------------------------------------------------------------


def refuse_names(values: Mapping[str, int]) -> None:
    """What must never be set, by its name alone: also on parts whose layout nobody knows. Raises ``NotAllowed``."""
    for name, value in values.items():
        never = NEVER.get(name.upper(), frozenset())
        if never is None or value in never:
            raise NotAllowed(
                f"{name}={value:#x} is never written: it cannot be taken back through the loader and shuts people out for ever",
                field=name,
                value=value,
            )


def with_fields(layout: OptionLayout, block: bytes, values: Mapping[str, int]) -> bytes:
    """``block`` with ``values`` by field name, complements computed. Raises ``BadRequest``, ``NotAllowed``."""
    refuse_names(values)
    made = bytearray(block)
    for name, value in values.items():
        spot = layout.field(name)
        if not 0 <= value <= spot.mask:
            raise BadRequest(f"{spot.name}={value:#x}: its largest value is {spot.mask:#x}", field=spot.name)
        if not spot.settable:
            raise NotAllowed(f"{spot.name} is shown, and not written by this version", field=spot.name)
        old = _value(layout, bytes(made), spot.address)
        new = old & ~(spot.mask << spot.shift) | value << spot.shift
        at = spot.address - layout.block.start
        made[at : at + layout.storage.size] = new.to_bytes(layout.storage.size, "little")
    return _completed(layout, block, made)


def with_raw(layout: OptionLayout, block: bytes, patches: Iterable[tuple[int, bytes]], named: Iterable[str]) -> bytes:
    """``block`` with bytes laid over it; they may change the fields that the job names, and nothing else.

    Where they reach a complement they must be one. Raises ``BadRequest``, ``NotAllowed``.
    """
    made, touched = bytearray(block), set[int]()
    for address, data in patches:
        if not layout.block.covers(address, address + len(data)) or not data:
            raise BadRequest(
                f"{address:#010x}..{address + len(data) - 1:#010x} is not within the option bytes "
                f"({layout.block.start:#010x}..{layout.block.end - 1:#010x})",
                address=address,
            )
        at = address - layout.block.start
        made[at : at + len(data)] = data
        touched |= set(range(at, at + len(data)))
    done = _completed(layout, block, made)
    for at in sorted(touched):
        if done[at] != made[at]:
            raise BadRequest(
                f"{layout.block.start + at:#010x} holds the complement of another byte: it would be {done[at]:02x}, not "
                f"{made[at]:02x}",
                address=layout.block.start + at,
            )
    allowed = {layout.field(name).name for name in named}
    for changed in changes(layout, block, done):
        if changed not in allowed:
            raise NotAllowed(f"the bytes change {changed}, and the job does not name it", field=changed)
    return done


def _completed(layout: OptionLayout, before: bytes, values: bytearray) -> bytes:
    """``values`` with the complements of all; where the unused bytes of a value repeated it, they do so again."""
    made, size = bytearray(values), layout.storage.size
    for address in _values(layout):
        at = address - layout.block.start
        made[at + size : at + 2 * size] = _inverse(layout, bytes(made), address)
        if layout.storage is Storage.HALF_WORDS and before[at : at + 4] == before[at + 4 : at + 8]:
            made[at + 4 : at + 8] = made[at : at + 4]
    return bytes(made)


def changes(layout: OptionLayout, before: bytes, after: bytes) -> list[str]:
    """Names of the fields that differ; an address for a bit that no field owns."""
    names = [f.name for f in layout.fields if layout.get(before, f.name) != layout.get(after, f.name)]
    owned: dict[int, int] = {}
    for f in layout.fields:
        owned[f.address] = owned.get(f.address, 0) | f.mask << f.shift
    for at in range(0, layout.block.size, layout.storage.stride):
        address = layout.block.start + at
        differs = _value(layout, before, address) ^ _value(layout, after, address)
        if differs & ~owned.get(address, 0):
            names.append(f"{address:#010x}")
    return names


def with_protected(layout: OptionLayout, block: bytes, flash: FlashMap, codes: Iterable[int]) -> dict[str, int]:
    """Values of the fields that write-protect the sectors ``codes`` besides those that are protected already.

    Never more than is named: raises ``BadRequest`` where a unit of write protection holds other sectors, too, or where there
    are not enough areas; ``Unsupported`` where it is not known which bit protects which sector.
    """
    units = _unit_sectors(layout, flash)
    wrp = layout.wrp
    if units is None or wrp is None or not all(layout.field(name).settable for name in wrp.fields):
        raise Unsupported(f"{layout.name}: which option bits protect which sectors is not known well enough to write them")
    if _pcrop_mode(layout, block):
        raise Unsupported(f"{layout.name}: its bits stand for PCROP now ({wrp.pcrop_mode} is 1), and not for write protection")
    wanted = set(codes)
    if unknown := wanted - {s.code for s in flash.sectors}:
        raise BadRequest(f"there is no sector {min(unknown)}; the last one is {flash.sectors[-1].code}", sector=min(unknown))
    active = set(_active(layout, block, len(units)))
    for number, unit in enumerate(units):
        inside = {s.code for s in unit} & wanted
        if inside and number not in active and len(inside) != len(unit):
            listed = f"{unit[0].code}-{unit[-1].code}"
            raise BadRequest(f"sectors {listed} can only be protected together; name all of them", sector=min(inside))
        if inside:
            active.add(number)
    if wrp.kind is WrpKind.AREAS:
        return _as_areas(layout, wrp, sorted(active))
    bits, width = _bits(layout, block)
    if max(active, default=0) >= width:
        raise Unsupported(f"{layout.name}: sector {max(active)} has no bit of write protection")
    for number in active:
        bits &= ~(1 << number)
    values: dict[str, int] = {}
    for name in wrp.fields:
        mask = layout.field(name).mask
        values[name], bits = bits & mask, bits >> mask.bit_length()
    return values


def _as_areas(layout: OptionLayout, wrp: Wrp, active: list[int]) -> dict[str, int]:
    runs: list[list[int]] = []
    for unit in active:
        if runs and runs[-1][1] == unit - 1:
            runs[-1][1] = unit
        else:
            runs.append([unit, unit])
    pairs = list(zip(wrp.fields[::2], wrp.fields[1::2], strict=True))
    if len(runs) > len(pairs):
        raise BadRequest(f"{layout.name} can protect {len(pairs)} runs of sectors, and these are {len(runs)}", runs=len(runs))
    values: dict[str, int] = {}
    for number, (first, last) in enumerate(pairs):
        none = (layout.field(first).mask, 0)
        values[first], values[last] = runs[number] if number < len(runs) else none
    return values


def check(chip: Chip, layout: OptionLayout, before: bytes, after: bytes) -> None:
    """Whether ``after`` may take the place of ``before``. Raises ``NotAllowed`` or ``Unsupported``."""
    if layout.why_not:
        raise Unsupported(f"{chip.title}: its option bytes are shown and not written: {layout.why_not}", pid=chip.pid)
    rdp = layout.get(after, "RDP")
    if layout.rdp.level(rdp) == 2:
        raise NotAllowed(
            "readout protection of level 2 is never written: it can never be removed again", field="RDP", value=rdp
        )
    if layout.rdp.level(rdp) != layout.rdp.level(layout.get(before, "RDP")):
        raise NotAllowed("readout protection is set by PROTECT and removed by UNPROTECT, not by option bytes", field="RDP")
    for name, values in NEVER.items():
        if values is None and any(f.name == name for f in layout.fields) and layout.get(after, name):
            raise NotAllowed(f"{name} is never written", field=name)
    for changed in changes(layout, before, after):
        spot = next((f for f in layout.fields if f.name == changed), None)
        if spot is None or not spot.settable:
            raise NotAllowed(f"{changed} would change, and this version does not write it", field=changed)
        value = layout.get(after, changed)
        if value not in RESETS.get(changed, {value}):
            raise NotAllowed(
                f"{changed}={value:#x} is never written: NRST would not reset the part, and nothing could start the loader",
                field=changed,
                value=value,
            )
    for entry in chip.entry_checks:
        word = word_at({layout.block.start: after}, entry.option.address)
        if word is not None and not entry.holds(word):
            raise NotAllowed(
                f"with {entry.option.name}={entry.option.value(word):#x} {entry.otherwise}: nothing could start the loader",
                field=entry.option.name,
                value=entry.option.value(word),
            )


def same_values(layout: OptionLayout, one: bytes, other: bytes) -> bool:
    """Whether both say the same: the values of all fields, whatever is stored beside them."""
    return all(layout.get(one, f.name) == layout.get(other, f.name) for f in layout.fields)
