"""The plan, over all chips, layouts and sizes: exactly the image, no other sector, aligned, and the vectors last."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridged import chips
from bridged.chips.model import Chip, FlashMap
from bridged.errors import ImageDoesNotFit, LayoutUnknown
from bridged.events import SectorProven
from bridged.images.model import Image
from bridged.images.plan import Plan, make_plan


def maps() -> list[tuple[Chip, FlashMap]]:
    """Every layout of every chip at every size that it can have: those that the layout names, and halves of the largest."""
    found = []
    for chip in chips.CHIPS.values():
        for layout in chip.layouts:
            for size in sorted({chip.flash_max_bytes >> n for n in range(5)} | set(layout.sizes)):
                try:
                    found.append((chip, chip.flash_map(size, layout.name)))
                except LayoutUnknown:
                    continue
    return found


MAPS = maps()


@st.composite
def cases(draw: st.DrawFn) -> tuple[Chip, FlashMap, Image]:
    """A flash and an image of one to four segments in it, near sector bounds where most mistakes live."""
    chip, flash = draw(st.sampled_from(MAPS))
    parts: list[tuple[int, bytes]] = []
    for _ in range(draw(st.integers(1, 4))):
        sector = draw(st.sampled_from(flash.sectors))
        start = draw(st.one_of(st.just(sector.address), st.integers(sector.address, sector.end - 1)))
        room = min(flash.base + flash.size_bytes, start + 3 * sector.size_bytes, start + 40_000) - start
        length = draw(st.integers(1, max(1, room)))
        fill = draw(st.sampled_from([chip.erased_value, 0x5A, None]))
        data = bytes([fill]) * length if fill is not None else bytes((start + i * 7) & 0xFF for i in range(length))
        if flash.covers(start, start + length) and not any(a < start + length and start < a + len(d) for a, d in parts):
            parts.append((start, data))
    if not parts:
        parts.append((flash.base, b"\x01\x02\x03\x04"))
    return chip, flash, Image.of(parts)


def flashed(plan: Plan, before: dict[int, bytes]) -> dict[int, bytes]:
    """Carry the plan out on plain memory: erased sectors, then blocks. Writing outside of what was erased fails."""
    after = dict(before)
    blank = plan.chip.erased_value
    for sector in plan.erase:
        after[sector.address] = bytes([blank]) * sector.size_bytes
    written: set[int] = set()
    for block in plan.blocks():
        sector = next(s for s in plan.erase if s.address <= block.address < s.end)
        assert block.address + len(block.data) <= sector.end, "a block crosses a sector"
        assert block.address not in written, "a block is written twice"
        written.add(block.address)
        at = block.address - sector.address
        old = after[sector.address]
        assert old[at : at + len(block.data)] == bytes([blank]) * len(block.data), "a word is programmed twice"
        after[sector.address] = old[:at] + block.data + old[at + len(block.data) :]
    return after


@settings(max_examples=400, deadline=None)
@given(cases())
def test_the_plan_gives_exactly_the_image_and_touches_no_other_sector(case: tuple[Chip, FlashMap, Image]) -> None:
    chip, flash, image = case
    plan = make_plan(image, chip, flash)
    touched = {s.address for s in plan.erase}
    needed = {s.address for s in flash.sectors if any(g.address < s.end and s.address < g.end for g in image.segments)}
    assert touched == needed, "exactly the sectors that share a byte with the image"
    before = {s.address: bytes([s.code & 0x7F]) * s.size_bytes for s in flash.sectors if s.address in needed}
    after = flashed(plan, before)
    for sector in plan.erase:
        assert after[sector.address] == image.read(sector.address, sector.size_bytes, chip.erased_value)
    for block in plan.blocks():
        assert block.address % chip.write_align_bytes == 0
        assert len(block.data) % chip.write_align_bytes == 0
        assert block.address % len(block.data) == 0
        assert 0 < len(block.data) <= chip.write_max_bytes
        assert block.data.count(chip.erased_value) < len(block.data), "a blank block is not written"


@settings(max_examples=300, deadline=None)
@given(cases())
def test_the_proof_reads_every_byte_of_the_image_once_in_the_fewest_reads(case: tuple[Chip, FlashMap, Image]) -> None:
    chip, flash, image = case
    plan = make_plan(image, chip, flash)
    covered = sorted(plan.reads())
    seen = [(a, a + n) for a, n in covered]
    assert all(0 < n <= chip.read_max_bytes for _, n in covered)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(seen)), "a byte is read twice"
    assert Image.of([(a, image.read(a, n)) for a, n in covered]) == image
    least = sum(-(-len(s.data) // chip.read_max_bytes) for s in image.segments)
    assert len(covered) <= least + 2, "the block with the vectors may cost two more reads"


@settings(max_examples=300, deadline=None)
@given(cases())
def test_the_vectors_are_erased_first_and_written_and_proven_last(case: tuple[Chip, FlashMap, Image]) -> None:
    chip, flash, image = case
    plan = make_plan(image, chip, flash)
    (vectors,), (block,) = plan.vectors, plan.held()
    assert plan.erase[0].address <= vectors < plan.erase[0].end
    assert vectors in (flash.base, image.start)
    inside = [b.address in block for b in plan.blocks()]
    assert inside.count(True) <= 1
    assert not any(inside[:-1]), "the block with the vectors is the last one"
    held = [a in block for a, _ in plan.reads()]
    assert held == sorted(held), "and so are its reads"


@settings(max_examples=300, deadline=None)
@given(cases(), st.data())
def test_so_it_is_with_several_tables_the_one_that_the_part_starts_from_behind_all(
    case: tuple[Chip, FlashMap, Image], data: Any
) -> None:
    chip, flash, image = case
    inside = st.sampled_from([a for s in image.segments for a in {s.address, s.end - 1}])
    vectors = tuple(data.draw(st.lists(inside, min_size=1, max_size=3, unique=True)))
    plan = make_plan(image, chip, flash, vectors=vectors)
    held = plan.held()
    assert all(any(a in block for block in held) for a in vectors)
    assert vectors[0] in held[-1]
    where = [next((n + 1 for n, block in enumerate(held) if b.address in block), 0) for b in plan.blocks()]
    assert where == sorted(where)
    tail = [any(a in block for block in held) for a, _ in plan.reads()]
    assert tail == sorted(tail)
    assert Image.of([(a, image.read(a, n)) for a, n in sorted(plan.reads())]) == image
    first = plan.erase[: len({s.code for s in plan.erase for a in vectors if s.address <= a < s.end})]
    assert all(any(s.address <= a < s.end for a in vectors) for s in first), "nothing can be started once erasing has begun"
    assert first[0].address <= vectors[0] < first[0].end


@settings(max_examples=300, deadline=None)
@given(cases(), st.data())
def test_kept_bytes_fill_the_gaps_and_nothing_else(case: tuple[Chip, FlashMap, Image], data: Any) -> None:
    chip, flash, image = case
    plan = make_plan(image, chip, flash)
    gaps = plan.outside
    for gap in gaps:
        assert flash.covers(gap.start, gap.end)
        assert not any(s.address < gap.end and gap.start < s.end for s in image.segments)
    assert sum(g.size for g in gaps) == plan.erase_bytes - image.size_bytes
    if not gaps:
        return
    gap = data.draw(st.sampled_from(gaps))
    kept = Image.of([(gap.start, b"kept"[: gap.size])])
    whole = plan.keeping(kept)
    assert whole.erase == plan.erase
    assert whole.outside == ()
    assert whole.content == image.merged_with(kept)
    after = flashed(whole, {s.address: b"" for s in whole.erase})
    for sector in whole.erase:
        assert after[sector.address] == whole.content.read(sector.address, sector.size_bytes, chip.erased_value)


@settings(max_examples=200, deadline=None)
@given(cases(), st.data())
def test_resuming_erases_again_what_is_not_proven(case: tuple[Chip, FlashMap, Image], data: Any) -> None:
    chip, flash, image = case
    plan = make_plan(image, chip, flash)
    proven = data.draw(st.lists(st.sampled_from(plan.erase), unique=True))
    records = [SectorProven(s.address, s.size_bytes, plan.sector_digest(s)) for s in proven]
    again = make_plan(image, chip, flash, records, image)
    left = [s for s in plan.erase if s not in proven]
    if not left:
        assert again.erase == ()
    else:
        assert set(again.erase) == {*left, plan.erase[0]}, "with any change the vectors change"
    lies = [SectorProven(s.address, s.size_bytes, "0" * 64) for s in proven]
    assert make_plan(image, chip, flash, lies, image).erase == plan.erase


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(MAPS), st.integers(-300, 300))
def test_an_image_that_leaves_the_flash_is_refused(which: tuple[Chip, FlashMap], shift: int) -> None:
    chip, flash = which
    end = flash.sectors[-1].end
    image = Image.of([(max(0, end + shift), bytes(512))])
    if shift <= -512:
        make_plan(image, chip, flash)
        return
    with pytest.raises(ImageDoesNotFit) as caught:
        make_plan(image, chip, flash)
    assert caught.value.facts["flash_bytes"] == flash.size_bytes


def test_every_chip_with_flash_was_planned_for() -> None:
    assert {chip.pid for chip, _ in MAPS} >= {c.pid for c in chips.CHIPS.values() if c.layouts and c.layout_confirmed}
    assert len(MAPS) > 200
