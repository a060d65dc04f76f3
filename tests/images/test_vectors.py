"""The sanity check of the vector table: what starts passes, what cannot start is refused with what was found."""

from __future__ import annotations

import struct

import pytest

from bridged.chips import by_pid
from bridged.chips.model import Range
from bridged.errors import ImageNotBootable
from bridged.images.model import Image, Span
from bridged.images.vectors import Vectors, check_vectors, check_vectors_for, vector_address, vector_addresses
from tests.firmware_npm import Hub, hubs

FLASH = Range(0x08000000, 0x08080000)
RAM = (Range(0x20000000, 0x20010000), Range(0x10000000, 0x10004000))


def table(stack_pointer: int, reset: int, address: int = FLASH.start, length: int = 1024) -> Image:
    return Image.of([(address, (struct.pack("<II", stack_pointer, reset) + bytes(length))[:length])])


@pytest.mark.parametrize("stack_pointer", [0x20010000, 0x2000FFF8, 0x20000004, 0x20008004, 0x10004000])
def test_good_stack_pointers(stack_pointer: int) -> None:
    assert check_vectors(table(stack_pointer, 0x08000101), FLASH, RAM) == Vectors(FLASH.start, stack_pointer, 0x08000101)


@pytest.mark.parametrize(
    ("stack_pointer", "reset", "says"),
    [
        (0x20010004, 0x08000101, "stack pointer is 0x20010004"),
        (0x20000000, 0x08000101, "stack pointer is 0x20000000"),  # the first push would leave the RAM
        (0x20008002, 0x08000101, "stack pointer is 0x20008002"),
        (0xFFFFFFFF, 0x08000101, "stack pointer is 0xffffffff"),
        (0x20010000, 0x08000100, "expected an odd address"),
        (0x20010000, 0x08000401, "reset vector is 0x08000401, expected an address inside the image (0x08000000..0x08000400)"),
        (0x20010000, 0x00000101, "reset vector is 0x00000101, expected an address inside"),
        (0xFFFFFFFF, 0xFFFFFFFF, "reset vector is 0xffffffff, expected an address inside"),
    ],
)
def test_what_cannot_start(stack_pointer: int, reset: int, says: str) -> None:
    with pytest.raises(ImageNotBootable) as caught:
        check_vectors(table(stack_pointer, reset), FLASH, RAM)
    assert says in caught.value.message
    assert caught.value.facts == {"address": FLASH.start, "stack_pointer": stack_pointer, "reset_vector": reset}


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(ImageNotBootable, match=r"stack pointer .*; the reset vector .* odd .*; the reset vector .* inside"):
        check_vectors(table(0, 0), FLASH, RAM)


def test_behind_a_bootloader_the_vectors_are_at_the_first_address() -> None:
    found = check_vectors(table(0x20010000, 0x08008101, 0x08008000), FLASH, RAM)
    assert found == Vectors(0x08008000, 0x20010000, 0x08008101)


def test_an_image_that_reaches_the_flash_base_is_checked_there() -> None:
    # Something in memory below the flash comes first in the image; the vectors are at the flash base nevertheless.
    image = table(0x20010000, 0x08000101).merged_with(Image.of([(0x07000000, bytes(64))]))
    assert check_vectors(image, FLASH, RAM) == Vectors(0x08000000, 0x20010000, 0x08000101)


def test_outside_the_flash_there_is_nothing_to_check() -> None:
    assert check_vectors(Image.of([(0x20000000, bytes(64))]), FLASH, RAM) is None
    assert check_vectors(Image.of([(FLASH.end, bytes(64))]), FLASH, RAM) is None


@pytest.mark.parametrize("length", [1, 7])
def test_an_image_shorter_than_its_vectors(length: int) -> None:
    with pytest.raises(ImageNotBootable, match=rf"needs 8 bytes, the image has {length} there"):
        check_vectors(table(0x20010000, 0x08000001, length=length), FLASH, RAM)


def test_reset_handler_in_another_segment() -> None:
    image = table(0x20010000, 0x08004001).merged_with(Image.of([(0x08004000, bytes(16))]))
    assert check_vectors(image, FLASH, RAM) is not None
    with pytest.raises(ImageNotBootable, match="inside the image"):
        check_vectors(table(0x20010000, 0x08003001).merged_with(Image.of([(0x08004000, bytes(16))])), FLASH, RAM)


# --- several images -----------------------------------------------------------------------------------------------

APP_AT = 0x08008000
BOOT = table(0x20010000, 0x08000101)
APP = table(0x20008000, APP_AT + 0x101, APP_AT)
DATA_AT = 0x08004000
DATA = Image.of([(DATA_AT, b"settings" * 64)])


def together(*images: Image) -> tuple[Image, tuple[Span, ...]]:
    ordered = sorted(images, key=lambda image: image.start)
    whole = Image.of((seg.address, seg.data) for image in ordered for seg in image.segments)
    return whole, tuple(Span(f"part{n}", image.start, image.end) for n, image in enumerate(ordered))


@pytest.mark.parametrize(
    ("images", "where"),
    [
        ((BOOT, APP), FLASH.start),
        ((BOOT, DATA, APP), FLASH.start),
        ((DATA, APP), APP_AT),  # the bootloader stays: what it will start is what has a table
        ((APP, Image.of([(0x08010000, b"data" * 8)])), APP_AT),
        ((APP, Image.of([(0x20000000, b"ram" * 8)])), APP_AT),
    ],
)
def test_the_part_starts_from_the_flash_base_or_the_first_table(images: tuple[Image, ...], where: int) -> None:
    image, spans = together(*images)
    assert vector_address(image, FLASH, spans) == where
    found = check_vectors(image, FLASH, RAM, spans)
    assert found is not None
    assert found.address == where


def test_every_place_where_something_could_be_started_is_found() -> None:
    slot_b = table(0x20008000, 0x08010101, 0x08010000)
    image, spans = together(DATA, APP, slot_b)
    assert vector_addresses(image, FLASH, spans) == (APP_AT, slot_b.start)
    assert vector_addresses(image, FLASH) == (DATA.start, APP_AT, slot_b.start), "one file: where it begins, as ever"
    image, spans = together(BOOT, DATA, slot_b, APP)
    assert vector_addresses(image, FLASH, spans) == (FLASH.start, APP_AT, slot_b.start)
    assert vector_addresses(Image.of([(0x20000000, b"ram" * 8)]), FLASH) == ()


def test_without_any_table_the_first_part_is_the_one_that_is_refused() -> None:
    image, spans = together(DATA, Image.of([(0x08010000, b"data" * 8)]))
    with pytest.raises(ImageNotBootable, match="vector table of part0 at 0x08004000"):
        check_vectors(image, FLASH, RAM, spans)


@pytest.mark.parametrize(
    ("app", "says"),
    [
        # Linked for the flash base and put behind a bootloader: its reset vector hits the bootloader's code.
        (
            table(0x20008000, 0x08000101, APP_AT),
            "part1 at 0x08008000: the reset vector is 0x08000101, expected an address inside",
        ),
        (table(0x20080000, APP_AT + 0x101, APP_AT), "part1 at 0x08008000: the stack pointer is 0x20080000"),  # a larger part
        (table(0x20008000, 0x08100101, APP_AT), "part1 at 0x08008000: the reset vector is 0x08100101"),  # likewise
    ],
)
def test_an_application_at_the_wrong_place_is_found_behind_its_bootloader(app: Image, says: str) -> None:
    image, spans = together(BOOT, app)
    with pytest.raises(ImageNotBootable) as caught:
        check_vectors(image, FLASH, RAM, spans)
    assert says in caught.value.message


def test_a_bootloader_may_not_start_in_the_application() -> None:
    image, spans = together(table(0x20010000, APP_AT + 0x101), APP)
    assert check_vectors(image, FLASH, RAM) is not None, "as one file nobody could tell"
    with pytest.raises(ImageNotBootable, match="part0 at 0x08000000: the reset vector"):
        check_vectors(image, FLASH, RAM, spans)


def test_a_patch_below_an_application_is_not_taken_for_its_vectors() -> None:
    image = APP.merged_with(Image.of([(DATA_AT, b"serial")]))
    spans = (Span("app", APP.start, APP.end),)
    assert vector_address(image, FLASH, spans) == APP_AT
    assert check_vectors(image, FLASH, RAM, spans) == Vectors(APP_AT, 0x20008000, APP_AT + 0x101)


def test_a_patch_at_the_flash_base_is_what_the_part_starts_from() -> None:
    image = APP.merged_with(Image.of([(FLASH.start, struct.pack("<II", 0x20010000, APP_AT + 0x101))]))
    assert check_vectors(image, FLASH, RAM, (Span("app", APP.start, APP.end),)) == Vectors(
        FLASH.start, 0x20010000, APP_AT + 0x101
    )


def test_parts_outside_the_flash_have_no_table() -> None:
    image, spans = together(Image.of([(0x20000000, bytes(64))]), Image.of([(0x30000000, bytes(64))]))
    assert check_vectors(image, FLASH, RAM, spans) is None


def real(hub: Hub, address: int) -> Image:
    return Image.of([(address, hub.data)])


def test_real_firmware_is_bootable_where_it_was_linked_for() -> None:
    for hub in hubs():
        flash = Range(0x08000000, 0x08000000 + hub.flash_bytes)
        found = check_vectors(real(hub, hub.address), flash, (hub.ram,))
        assert found is not None, hub.name
        assert found.address == hub.address, hub.name


def test_real_firmware_agrees_with_the_chip_tables() -> None:
    for hub in hubs():
        chip = by_pid(hub.pid)
        found = check_vectors_for(real(hub, hub.address), chip, hub.flash_bytes)
        assert found is not None, hub.name
        assert any(r.start < found.stack_pointer <= r.end for r in chip.ram), hub.name


def test_real_firmware_is_refused_far_from_where_it_was_linked_for() -> None:
    for hub in hubs():
        flash = Range(0x08000000, 0x08000000 + hub.flash_bytes)
        with pytest.raises(ImageNotBootable):
            check_vectors(real(hub, flash.end - 4096), flash, (hub.ram,))
        with pytest.raises(ImageNotBootable, match="stack pointer"):  # the same file for a part with less RAM
            check_vectors(real(hub, hub.address), flash, (Range(0x20000000, hub.ram.end - 8),))
