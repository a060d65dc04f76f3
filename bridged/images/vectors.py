"""The sanity check of a vector table: would a Cortex-M start from this image at all? Pure: no I/O, no clock.

A Cortex-M loads two words at reset: the stack pointer and the address of the reset handler (ARMv7-M Architecture Reference
Manual, section B1.5.5; ARMv6-M likewise). A file that was linked for another part, the wrong half of a build, or a BIN at the
wrong address shows in these eight bytes in nearly every case. What is *not* known here: whether the code works.

The check is an advice with teeth: it raises, and a caller that was told ``force=vectors`` does not call it. Nothing is said
about an image that starts outside the flash (the plan refuses those), and an image behind a bootloader is checked at its own
first address, because that is where its vectors are.

Of several images in one flash (``spans``) the one that the part starts from must have a table: the one at the flash base, else
the first that begins with what looks like one (a bootloader that stays will start it), else the first. Any other is checked
where it looks so, because data must be allowed and an application at the wrong address must not. A table belongs to its own
image: a reset vector into the bootloader beside it is the mistake that this finds. Patches are no images: they never decide
where the vectors are.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from bridged.chips.model import Chip, Range
from bridged.errors import ImageNotBootable
from bridged.images.model import Image, Span

VECTORS_BYTES = 8
STACK_ALIGN_BYTES = 4  # The processor clears the lowest two bits itself; 8 is only what the C calling standard asks for.

# Code-side RAM (CCM, ITCM excluded: it starts at 0 like an empty table) and the SRAM region of ARMv6-M to ARMv8-M.
_RAM_OF_ANY = (Range(0x10000000, 0x10100000), Range(0x20000000, 0x40000000))


@dataclass(frozen=True, slots=True)
class Vectors:
    """The first two words of a vector table and where it was found."""

    address: int
    stack_pointer: int
    reset: int


def vector_address(image: Image, flash: Range, spans: Sequence[Span] = ()) -> int | None:
    """Where the vectors of this image must be: the flash base if the image reaches it, else its first flash address; with
    ``spans`` see the module docstring."""
    starts = [max(s.start, flash.start) for s in spans if s.start < flash.end and flash.start < s.end]
    if not starts:
        return next(
            (max(s.address, flash.start) for s in image.segments if s.address < flash.end and flash.start < s.end), None
        )
    if any(s.address <= flash.start < s.end for s in image.segments):
        return flash.start
    return next((start for start in starts if _looks_like_a_table(image, start, flash)), starts[0])


def vector_addresses(image: Image, flash: Range, spans: Sequence[Span] = ()) -> tuple[int, ...]:
    """All places where something could be started: that of ``vector_address`` first, then every other image of ``spans`` (every
    segment, where there is one image) that begins with what looks like a table: slots that a bootloader chooses from.
    """
    first = vector_address(image, flash, spans)
    if first is None:
        return ()
    starts = [max(s.start, flash.start) for s in spans] or [s.address for s in image.segments]
    others = (a for a in starts if a != first and flash.start <= a < flash.end and _looks_like_a_table(image, a, flash))
    return (first, *dict.fromkeys(others))


def _looks_like_a_table(image: Image, address: int, flash: Range) -> bool:
    return looks_like_a_table(image.read(address, VECTORS_BYTES), flash)


def looks_like_a_table(table: bytes, flash: Range) -> bool:
    """A stack pointer where some Cortex-M has RAM, and an odd reset vector into the flash of a part of any size."""
    stack_pointer, reset = struct.unpack("<II", table)
    in_ram = any(r.start < stack_pointer <= r.end for r in _RAM_OF_ANY) and not stack_pointer % STACK_ALIGN_BYTES
    return in_ram and bool(reset & 1) and reset >> 24 == flash.start >> 24


def check_vectors(image: Image, flash: Range, ram: Sequence[Range], spans: Sequence[Span] = ()) -> Vectors | None:
    """The vectors that the part starts from, or None where the image holds no byte of ``flash``.

    Raises ``ImageNotBootable``, with what was found, unless the stack pointer lies in (or at the end of) one of ``ram`` and the
    reset vector is odd (Thumb) and points into the image; with ``spans`` so for each of them that must have a table.
    """
    address = vector_address(image, flash, spans)
    if address is None:
        return None
    for span in spans:
        start = max(span.start, flash.start)
        if span.end <= flash.start or start >= flash.end or start == address:
            continue
        if _looks_like_a_table(image, start, flash):
            _check_table(image, start, ram, span)
    # The flash base may hold nothing but a patch: then the whole image is what its vectors may point into.
    return _check_table(image, address, ram, next((s for s in spans if s.start <= address < s.end), None))


def _check_table(image: Image, address: int, ram: Sequence[Range], span: Span | None) -> Vectors:
    segment = next(s for s in image.segments if s.address <= address < s.end)
    table = segment.data[address - segment.address :][:VECTORS_BYTES]
    start, end = (span.start, span.end) if span else (image.start, image.end)
    whose = f" of {span.name}" if span else ""
    if len(table) < VECTORS_BYTES:
        raise ImageNotBootable(
            f"the vector table{whose} at {address:#010x} needs {VECTORS_BYTES} bytes, the image has {len(table)} there",
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
    if not start <= reset & ~1 < end or not any(s.address <= reset & ~1 < s.end for s in image.segments):
        faults.append(f"the reset vector is {reset:#010x}, expected an address inside the image ({start:#010x}..{end:#010x})")
    if faults:
        raise ImageNotBootable(
            f"vector table{whose} at {address:#010x}: {'; '.join(faults)}",
            address=address,
            stack_pointer=stack_pointer,
            reset_vector=reset,
        )
    return Vectors(address, stack_pointer, reset)


def flash_range(chip: Chip, flash_bytes: int) -> Range:
    return Range(chip.flash_base, chip.flash_base + flash_bytes)


def check_vectors_for(image: Image, chip: Chip, flash_bytes: int, spans: Sequence[Span] = ()) -> Vectors | None:
    """``check_vectors`` with the memories of ``chip``, of which this part has ``flash_bytes`` of flash."""
    return check_vectors(image, flash_range(chip, flash_bytes), chip.ram, spans)
