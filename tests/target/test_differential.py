"""Sectors that hold already what they shall are read and left alone; nothing is taken for granted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bridged.errors import BridgedError
from bridged.events import SectorErased, SectorProven
from bridged.images.model import Image, Span
from bridged.protocol.flow import Checkpoint
from bridged.target.request import Past, Result
from tests.target.bench import Bench, make_image

CHIPS = ["F407", "L476", "F103xB", "H743"]
SIZE = 160 * 1024


def changed(image: Image, at: int, value: int = 0x5A) -> Image:
    """The same with one byte changed."""
    (segment,) = image.segments
    data = bytearray(segment.data)
    data[at] ^= value
    return Image.of([(segment.address, bytes(data))])


def flashed(chip: str, image: Image | None = None) -> tuple[Bench, Image, Result, Past]:
    """A part with an image in it, and what the journal knows of it then."""
    bench = Bench(chip)
    image = image or make_image(bench.chip, SIZE if chip != "F103xB" else 48 * 1024)
    result = bench.run("flash", image)
    return bench, image, result, Past(uid=result.uid, sectors=tuple(bench.events(SectorProven)))


@pytest.mark.parametrize("chip", CHIPS)
def test_the_same_again_erases_nothing_and_is_proven_whole(chip: str) -> None:
    bench, image, first, past = flashed(chip)
    assert past.sectors
    result = bench.run("flash", image, past=past)
    assert (result.sectors_erased, result.bytes_written, result.changed) == (0, 0, False)
    assert result.sectors_skipped == first.sectors_erased
    assert (result.evidence, result.bytes_compared) == ("full", image.size_bytes)
    assert bench.events(SectorErased) == []
    assert bench.boots()


@pytest.mark.parametrize("chip", CHIPS)
def test_a_change_costs_its_own_sector_and_the_one_with_the_vectors(chip: str) -> None:
    bench, image, first, past = flashed(chip)
    last = changed(image, image.size_bytes - 100)
    result = bench.run("flash", last, past=past)
    erased = [e.address for e in bench.events(SectorErased)]
    assert len(erased) == 2
    assert erased[0] == bench.chip.flash_base  # first, so that no mixture can start
    assert result.sectors_skipped == first.sectors_erased - 2
    assert result.evidence == "full"
    assert bench.holds(last)
    assert bench.boots()
    # What is reported as proven is what the next job may rely on: all of it.
    proofs = {p.address for p in bench.events(SectorProven)}
    assert proofs == {p.address for p in past.sectors}


def test_a_change_in_an_application_behind_a_bootloader_takes_both_tables_along() -> None:
    bench = Bench("F407")
    bootloader = make_image(bench.chip, 10 * 1024)
    application = make_image(bench.chip, 100 * 1024, offset=64 * 1024, seed=2)
    spans = tuple(Span(name, i.start, i.end) for name, i in (("boot", bootloader), ("app", application)))
    first = bench.run("flash", bootloader.merged_with(application), spans=spans)
    past = Past(uid=first.uid, sectors=tuple(bench.events(SectorProven)))
    changed_app = changed(application, 90 * 1024)
    result = bench.run("flash", bootloader.merged_with(changed_app), spans=spans, past=past)
    erased = [e.address for e in bench.events(SectorErased)]
    assert erased == [0x08000000, 0x08010000, 0x08020000], "that of the part, that of the application, and what changed"
    assert (result.sectors_skipped, result.evidence) == (first.sectors_erased - 3, "full")
    # A change in the bootloader leaves the application alone.
    past = replace(past, sectors=tuple(bench.events(SectorProven)))
    bench.run("flash", changed(bootloader, 9000).merged_with(changed_app), spans=spans, past=past)
    assert [e.address for e in bench.events(SectorErased)] == [0x08000000]
    assert bench.holds(changed_app)


@pytest.mark.parametrize("chip", CHIPS)
def test_what_changed_behind_our_back_is_found(chip: str) -> None:
    bench, image, _, past = flashed(chip)
    at = image.start + image.size_bytes - 50
    offset = at - bench.chip.flash_base
    bench.device.memory.flash[offset] ^= 0x10  # a cell that has forgotten
    assert not bench.holds(image)
    result = bench.run("flash", image, past=past)
    assert result.sectors_erased == 2
    assert bench.holds(image)


def test_another_board_has_no_past() -> None:
    bench, image, first, past = flashed("F407")
    result = bench.run("flash", image, past=Past(uid="00" * 12, sectors=past.sectors))
    assert result.sectors_erased == first.sectors_erased


def test_a_sector_with_foreign_bytes_keeps_them_when_it_is_left_alone() -> None:
    bench = Bench("F407")
    image = make_image(bench.chip, 100 * 1024)
    end = bench.chip.flash_base + 127 * 1024
    bench.device.memory.program(end, b"calibration data")
    result = bench.run("flash", image)
    assert result.bytes_kept
    past = Past(uid=result.uid, sectors=tuple(bench.events(SectorProven)))
    again = bench.run("flash", changed(image, 20000), past=past)
    assert bench.holds(changed(image, 20000))
    assert bench.flash(end, 16) == b"calibration data"
    assert again.sectors_skipped >= 1


@pytest.mark.parametrize("chip", ["F407", "L476"])
def test_interrupted_anywhere_it_never_boots_half_and_ends_right_when_resumed(chip: str) -> None:
    for cut in range(6, 400, 29):
        bench, image, _, past = flashed(chip)
        new = changed(image, image.size_bytes - 100)
        count = 0

        def stop(_step: Checkpoint, cut: int = cut) -> None:
            nonlocal count
            count += 1
            if count == cut:
                raise KeyboardInterrupt

        proven: list[SectorProven] = []
        kept = b""
        try:
            bench.run("flash", new, past=past, checkpoint=stop)
        except (KeyboardInterrupt, BridgedError):
            proven = bench.events(SectorProven)
            kept = next((b.kept for b in bench.account.barriers if b.kept), b"")
        else:
            break
        whole = bench.holds(image) or bench.holds(new)
        assert whole or not bench.boots()
        result = bench.run("flash", new, kept, proven=tuple(proven) if kept else ())
        assert result.evidence == "full"
        assert bench.holds(new)


def test_a_sample_of_what_is_still_there_takes_less_than_two_seconds_and_proves_nothing() -> None:
    bench, image, _, known = flashed("F407")
    past = Past(uid=known.uid, content=image.digest, age_s=3600.25)
    result = bench.run("ensure", image, past=past, evidence="sample", listen_s=0.0)
    assert (result.evidence, result.age_s, result.changed) == ("sample", 3600.2, False)
    assert 0 < result.bytes_compared < image.size_bytes / 10
    assert result.baud == 115200
    assert bench.account.total_s < 2.0
    assert bench.boots()


def test_samples_are_others_each_time_so_that_a_change_anywhere_is_found_in_the_end() -> None:
    bench, image, _, known = flashed("F407", make_image(Bench("F407").chip, 16 * 1024))
    bench.device.memory.flash[0x1234] ^= 0x10  # one block of 64, of which each sample has 16
    found = []
    for age_s in (0.0, 0.001, 0.002, 0.003):
        past = Past(uid=known.uid, content=image.digest, age_s=age_s)
        other = Bench("F407")
        other.device.memory.flash[:] = bench.device.memory.flash
        found.append(other.run("ensure", image, past=past, evidence="sample").evidence)
        assert (found[-1] == "full") is other.holds(image), (
            "found, written anew, proven; or not seen, and not said to be proven"
        )
    assert sorted(found) == ["full", "sample", "sample", "sample"]


def test_what_was_proven_of_another_image_says_nothing_about_this_one() -> None:
    bench, image, _, known = flashed("F407", make_image(Bench("F407").chip, 16 * 1024))
    past = Past(uid=known.uid, content="ab" * 32, age_s=1.0)
    result = bench.run("ensure", image, past=past, evidence="sample")
    assert (result.evidence, result.bytes_compared) == ("full", image.size_bytes)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_sample_that_differs_or_another_board_is_compared_whole(swapped: bool) -> None:
    bench, image, _, known = flashed("F407")
    new = changed(image, image.size_bytes - 1)  # the last block is always looked at
    past = Past(uid="" if swapped else known.uid, content=(image if swapped else new).digest, age_s=1.0)
    wanted = image if swapped else new
    result = bench.run("ensure", wanted, past=past, evidence="sample")
    assert (result.evidence, result.changed) == ("full", not swapped)
    assert bench.holds(wanted)
