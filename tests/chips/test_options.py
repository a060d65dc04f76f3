"""Option-byte layouts: the data is sound, a merge changes what it names and nothing else, what must never be is never made."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridged import chips
from bridged.chips.model import Confidence
from bridged.chips.option_rows import LAYOUTS, layout_of
from bridged.chips.options import (
    NEVER,
    OptionLayout,
    Storage,
    changes,
    check,
    decode,
    known_fields,
    refuse_names,
    with_fields,
    with_protected,
    with_raw,
)
from bridged.errors import BadRequest, BridgedError, NotAllowed, Unsupported

# What parts hold as they leave the factory, from ST's documents and users' dumps.
FACTORY = {
    0x440: "aa55ff00 ff00ff00 ff00ff00 ff00ff00",  # RM0091: 0x00FF55AA
    0x410: "a55aff00 ff00ff00 ff00ff00 ff00ff00",
    0x413: "efaa1055efaa1055 ffff0000ffff0000",
    0x449: "ffaa0055ffffffff ffff0000ffffffff 80007fffffffffff 4000bfffffffffff",  # 0x5500AAFF, 0xFF7F0080, 0xFFBF0040
}
WRITABLE = sorted(pid for pid, layout in LAYOUTS.items() if not layout.why_not)


def factory(pid: int) -> bytes:
    return bytes.fromhex(FACTORY[pid])


def blank(layout: OptionLayout) -> bytes:
    """All ones with the complements that belong to them, and level 0."""
    rdp = layout.field("RDP")
    made = bytearray(b"\xff" * layout.block.size)
    at = rdp.address - layout.block.start
    made[at + rdp.shift // 8] = layout.rdp.level_0
    size, stride = layout.storage.size, layout.storage.stride
    for at in range(0, layout.block.size - 2 * size + 1, stride):
        made[at + size : at + 2 * size] = bytes(b ^ 0xFF for b in made[at : at + size])
    return bytes(made)


@pytest.mark.parametrize("pid", sorted(LAYOUTS))
def test_a_layout_is_sound(pid: int) -> None:
    layout, chip = LAYOUTS[pid], chips.CHIPS[pid]
    assert layout_of(chip) is layout
    assert layout.source.source
    assert layout.source.confidence in (Confidence.READ, Confidence.AGREED), "only what can be cited"
    assert any(area.covers(layout.block.start, layout.block.end) for area in chip.option_bytes)
    assert layout.block.size <= 256, "one Write Memory"
    if not layout.why_not:
        assert chip.option_bytes == (layout.block,), "a block that is written is all that there is"
    assert len({f.name for f in layout.fields}) == len(layout.fields)
    taken: dict[int, int] = {}
    for field in layout.fields:
        assert layout.block.covers(field.address, field.address + 2 * layout.storage.size), field
        assert (field.address - layout.block.start) % layout.storage.stride == 0, field
        assert (field.mask << field.shift).bit_length() <= 8 * layout.storage.size, field
        assert not taken.get(field.address, 0) & field.mask << field.shift, f"{field.name} lies over another"
        taken[field.address] = taken.get(field.address, 0) | field.mask << field.shift
        assert not (field.settable and (field.name == "RDP" or NEVER.get(field.name, 0) is None)), field
    for name in (layout.wrp.fields if layout.wrp else ()) + tuple(n for pair in layout.pcrop for n in pair):
        assert layout.field(name)
    # What the rows of the chip say of single bits is the same, where both say something.
    for option in known_fields(chip):
        for field in layout.fields:
            if field.name == option.name:
                word = 1 << field.shift + 8 * ((field.address - option.address) % 4)
                assert option.value(word) == 1, f"{chip.title}: {field.name} lies elsewhere in its row"


@pytest.mark.parametrize("pid", sorted(FACTORY))
def test_factory_contents_are_understood(pid: int) -> None:
    layout, chip = LAYOUTS[pid], chips.CHIPS[pid]
    flash = chip.flash_map(chip.flash_max_bytes)
    seen = decode(chip, layout, {layout.block.start: factory(pid)}, flash)
    assert (seen.level, seen.protected, seen.broken) == (0, (), ())
    assert seen.to_dict()["readout_protection"] == 0
    assert with_fields(layout, factory(pid), {}) == factory(pid)


@pytest.mark.parametrize(("pid", "value", "level"), [(0x440, 0x00, 1), (0x440, 0xCC, 2), (0x410, 0xCC, 1), (0x413, 0x55, 1)])
def test_levels(pid: int, value: int, level: int) -> None:
    assert LAYOUTS[pid].rdp.level(value) == level


def test_a_cut_off_write_is_seen() -> None:
    layout, chip = LAYOUTS[0x413], chips.CHIPS[0x413]
    block = bytearray(factory(0x413))
    block[2] ^= 1
    assert decode(chip, layout, {layout.block.start: bytes(block)}, None).broken == (0x1FFFC000,)
    assert decode(chip, layout, {layout.block.start: b"\xff" * 16}, None).broken == (0x1FFFC000, 0x1FFFC008)


@given(st.data())
def test_a_merge_changes_what_it_names_and_nothing_else(data: st.DataObject) -> None:
    layout = LAYOUTS[data.draw(st.sampled_from(WRITABLE))]
    before = bytearray(blank(layout))
    for at in range(layout.block.size):  # Whatever is stored where no field is stays as it is.
        if at % layout.storage.stride < layout.storage.size and layout.block.start + at not in {
            f.address + i for f in layout.fields for i in range(layout.storage.size)
        }:
            before[at] = data.draw(st.integers(0, 255))
    settable = [f for f in layout.fields if f.settable]
    chosen = data.draw(st.lists(st.sampled_from(settable), min_size=1, max_size=4, unique=True))
    values = {f.name: data.draw(st.integers(0, f.mask)) for f in chosen}
    after = with_fields(layout, bytes(before), values)
    assert len(after) == len(before)
    assert {name: layout.get(after, name) for name in values} == values
    assert set(changes(layout, bytes(before), after)) <= set(values)
    assert decode(chips.CHIPS[WRITABLE[0]], layout, {layout.block.start: after}, None).broken == ()
    untouched = {f.address for f in layout.fields} - {f.address for f in chosen}
    for address in untouched:
        at, size = address - layout.block.start, layout.storage.size
        assert after[at : at + size] == before[at : at + size]


@given(st.data())
def test_no_way_leads_to_what_must_never_be(data: st.DataObject) -> None:
    """Any raw bytes anywhere, naming any fields: what passes has level 0, no lock, and a BOOT0 that leads into the loader."""
    pid = data.draw(st.sampled_from(WRITABLE))
    layout, chip = LAYOUTS[pid], chips.CHIPS[pid]
    before = blank(layout)
    for entry in chip.entry_checks:
        field = next((f for f in layout.fields if f.name == entry.option.name), None)
        if field is not None:
            at = field.address - layout.block.start
            word = int.from_bytes(before[at : at + layout.storage.size], "little")
            word = word & ~(field.mask << field.shift) | min(entry.values) << field.shift
            spot = bytearray(before)
            spot[at : at + layout.storage.size] = word.to_bytes(layout.storage.size, "little")
            before = with_fields(layout, bytes(spot), {})
    lock = next((f for f in layout.fields if f.name == "BOOT_LOCK"), None)
    if lock is not None:  # All ones is locked; a part in the field is not.
        spot = bytearray(before)
        spot[lock.address - layout.block.start + lock.shift // 8] &= ~(1 << lock.shift % 8)
        before = with_fields(layout, bytes(spot), {})
    check(chip, layout, before, before)
    at = data.draw(st.integers(0, layout.block.size - 1))
    raw = data.draw(st.binary(min_size=1, max_size=min(8, layout.block.size - at)))
    named = [f.name for f in layout.fields]
    try:
        after = with_raw(layout, before, [(layout.block.start + at, raw)], named)
        check(chip, layout, before, after)
    except (NotAllowed, BadRequest):
        return
    assert layout.rdp.level(layout.get(after, "RDP")) == 0
    assert lock is None or layout.get(after, "BOOT_LOCK") == 0
    for entry in chip.entry_checks:
        at = entry.option.address - layout.block.start
        if 0 <= at <= layout.block.size - 4:
            assert entry.holds(int.from_bytes(after[at : at + 4], "little"))


@pytest.mark.parametrize("values", [{"RDP": 2}, {"rdp": 0xCC}, {"BOOT_LOCK": 0}, {"tzen": 1}, {"PRODUCT_STATE": 0x17}])
def test_names_that_are_never_written(values: dict[str, int]) -> None:
    with pytest.raises(NotAllowed):
        refuse_names(values)


@given(st.data())
def test_protecting_sectors_adds_and_never_widens(data: st.DataObject) -> None:
    pid = data.draw(st.sampled_from([p for p in WRITABLE if LAYOUTS[p].wrp]))
    layout, chip = LAYOUTS[pid], chips.CHIPS[pid]
    flash = chip.flash_map(chip.flash_max_bytes)
    block = _none_protected(blank(layout), layout)
    codes = [s.code for s in flash.sectors]
    wanted: set[int] = set()
    for _ in range(2):
        first = data.draw(st.integers(0, len(codes) - 1))
        more = set(codes[first : first + data.draw(st.integers(1, 8))])
        try:
            values = with_protected(layout, block, flash, more)
        except (BadRequest, Unsupported):
            return
        block = with_fields(layout, block, values)
        wanted |= more
        found = decode(chip, layout, {layout.block.start: block}, flash).protected
        assert found is not None
        assert {s.code for s in flash.sectors if any(r.covers(s.address, s.end) for r in found)} == wanted


def _none_protected(block: bytes, layout: OptionLayout) -> bytes:
    assert layout.wrp is not None
    made = bytearray(block)
    if layout.storage is Storage.WORDS:
        for name in layout.wrp.fields[1::2]:
            made[layout.field(name).address - layout.block.start + 2] = 0x80  # The last page: 0.
    if layout.wrp.pcrop_mode:
        made[9] = 0x3F
    return with_fields(layout, bytes(made), {})


def test_a_part_without_a_layout_shows_what_its_rows_know() -> None:
    chip = chips.find("H743")
    assert layout_of(chip) is None
    raw = {chip.option_bytes[0].start: bytes(0x20) + bytes.fromhex("0008f01f") + bytes(8)}
    seen = decode(chip, None, raw, None)
    assert seen.to_dict()["fields"] == {"BOOT_ADD0": "0x0800", "BOOT_ADD1": "0x1ff0"} | {
        name: value for name, value in seen.fields.items() if not name.startswith("BOOT_ADD")
    }
    assert (seen.level, seen.protected) == (None, None)
    with pytest.raises(BridgedError):
        LAYOUTS[0x413].field("nothing of the kind")
