"""The sanity check of the vector table: what starts passes, what cannot start is refused with what was found."""

from __future__ import annotations

import struct

import pytest

from bridged.chips import by_pid
from bridged.chips.model import Range
from bridged.errors import ImageNotBootable
from bridged.images.model import Image
from bridged.images.vectors import Vectors, check_vectors, check_vectors_for
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
