"""The sanity check of a vector table: would a Cortex-M start from this image at all? Pure: no I/O, no clock.

A Cortex-M loads two words at reset: the stack pointer and the address of the reset handler (ARMv7-M Architecture Reference
Manual, section B1.5.5; ARMv6-M likewise). A file that was linked for another part, the wrong half of a build, or a BIN at the
wrong address shows in these eight bytes in nearly every case. What is *not* known here: whether the code works.

The check is an advice with teeth: it raises, and a caller that was told ``force=vectors`` does not call it. Nothing is said
about an image that starts outside the flash (the plan refuses those), and an image behind a bootloader is checked at its own
first address, because that is where its vectors are.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from bridged.chips.model import Chip, Range
from bridged.errors import ImageNotBootable
from bridged.images.model import Image

VECTORS_BYTES = 8
STACK_ALIGN_BYTES = 4  # The processor clears the lowest two bits itself; 8 is only what the C calling standard asks for.


@dataclass(frozen=True, slots=True)
class Vectors:
    """The first two words of a vector table and where it was found."""

    address: int
    stack_pointer: int
    reset: int


def vector_address(image: Image, flash: Range) -> int | None:
    """Where the vectors of this image must be: the flash base if the image reaches it, else its first flash address."""
    return next((max(s.address, flash.start) for s in image.segments if s.address < flash.end and flash.start < s.end), None)


def check_vectors(image: Image, flash: Range, ram: Sequence[Range]) -> Vectors | None:
    """The vectors of the image, or None where it holds no byte of ``flash``.

    Raises ``ImageNotBootable``, with what was found, unless the stack pointer lies in (or at the end of) one of ``ram`` and the
    reset vector is odd (Thumb) and points into the image.
    """
    address = vector_address(image, flash)
    if address is None:
        return None
    segment = next(s for s in image.segments if s.address <= address < s.end)
    table = segment.data[address - segment.address :][:VECTORS_BYTES]
    if len(table) < VECTORS_BYTES:
        raise ImageNotBootable(
            f"the vector table at {address:#010x} needs {VECTORS_BYTES} bytes, the image has {len(table)} there",
            address=address,
        )
    stack_pointer, reset = struct.unpack("<II", table)
    faults = []
    # A full-descending stack starts one word below the pointer, so the end of a RAM is a usual value and its start is not.
    if stack_pointer % STACK_ALIGN_BYTES or not any(r.start < stack_pointer <= r.end for r in ram):
        known = ", ".join(f"{r.start:#010x}..{r.end:#010x}" for r in ram) or "none known"
        faults.append(f"the stack pointer is {stack_pointer:#010x}, expected a multiple of 4 in RAM ({known})")
    if not reset & 1:
        faults.append(f"the reset vector is {reset:#010x}, expected an odd address (Thumb code)")
    if not any(s.address <= reset & ~1 < s.end for s in image.segments):
        faults.append(
            f"the reset vector is {reset:#010x}, expected an address inside the image ({image.start:#010x}..{image.end:#010x})"
        )
    if faults:
        raise ImageNotBootable(
            f"vector table at {address:#010x}: {'; '.join(faults)}",
            address=address,
            stack_pointer=stack_pointer,
            reset_vector=reset,
        )
    return Vectors(address, stack_pointer, reset)


def check_vectors_for(image: Image, chip: Chip, flash_bytes: int) -> Vectors | None:
    """``check_vectors`` with the memories of ``chip``, of which this part has ``flash_bytes`` of flash."""
    return check_vectors(image, Range(chip.flash_base, chip.flash_base + flash_bytes), chip.ram)
